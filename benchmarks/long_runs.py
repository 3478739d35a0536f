"""A million steps of every elementwise algorithm: counters past 2^24, memory that stays, and the numbers at the end.

    python -m benchmarks.long_runs                                # all of them, about an hour
    python -m benchmarks.long_runs --only adamw nadam --steps 100000
    python -m benchmarks.long_runs --json found.json              # goes on where it was interrupted

The problem is small: a quadratic of eight numbers with noise. Counters begin so that 2^24, where a float32 stops, is crossed
in the middle of the run. What is measured:

* *memory*: the resident set at 10 % and at 100 % of the steps, which must be the same to 1 %; *objects*: how
  many more there are;
* *counter*: it must be the first one plus the steps;
* *torch*: how far the parameters are at the end from those of `torch.optim`, in float64, with the same gradients and with
  counters that are float64 from the start, as a share of the largest;
* *leaf by leaf*: the same, from the leaf functions one by one with float64 counters, over 1,000 steps about 2^24.

Steps are donated ones by default (``--how pure``, ``--how optimizer``). With ``--seed`` other gradients are drawn.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from tqdm import tqdm

import purestep as ps
from benchmarks.plan import markdown
from purestep import optim
from purestep._engine.step_cache import repeatable
from purestep.saving import visit

STOP = 2**24
ROWS = 4096
"""So many noises, one after the other and again."""
ABOUT = 1000
"""So many steps are made leaf by leaf, too."""


def algorithms() -> dict[str, Any]:
    """The cases of the tests' registry that are whole algorithms and treat each element by itself."""
    from tests.cases import CASES

    own = [case for case in CASES if case.step is None and case.make.__module__.startswith("purestep.algorithms.")]
    return {case.name: case for case in own if elementwise(case.transform())}


def elementwise(t: ps.Transform) -> bool:
    """Whether a transform is one run of leafwise transforms, which treat each element by itself."""
    step = repeatable(t.plan)
    return step is not None and step.elementwise()


class Problem:
    """Gradients of a quadratic, with noise."""

    def __init__(self, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.start = torch.randn(8, generator=draw, dtype=torch.float64)
        self.curvature = torch.logspace(-2, 0, 8, dtype=torch.float64)
        self.noise = list(0.1 * torch.randn(ROWS, 8, generator=draw, dtype=torch.float64))

    def gradient(self, p: Tensor, k: int) -> Tensor:
        return torch.addcmul(self.noise[k % ROWS], self.curvature, p)


def resident() -> int:
    """How many bytes of memory this process has."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError:  # the most so far: growth shows, and what is given back does not
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def counted(state: Any, count: float | None, dtype: torch.dtype | None = None) -> tuple[Any, set[float]]:
    """The state with this count, and the counts that it had."""
    found: set[float] = set()

    def leaf(name: str, x: Any, counts: bool = False) -> Any:
        if not isinstance(x, Tensor) or not counts:
            return x
        found.add(x.item())
        return x if count is None else torch.full_like(x, count, dtype=dtype or x.dtype)

    return visit(state, "", leaf, lambda name, history, around: history), found


class Run:
    """One algorithm, step by step."""

    def __init__(self, case: Any, problem: Problem, how: str, first: int) -> None:
        self.t, self.problem, self.how = case.transform(), problem, how
        self.p: Any = problem.start.clone()
        self.optimizer: Any = None
        if how == "optimizer":
            self.p = torch.nn.Parameter(self.p)
            self.optimizer = optim.Optimizer([self.p], self.t)
        else:
            self.state = self.t.init_state(self.p)
        self.step(0)  # a count of 0 means more than a number to some
        self.count(first)

    def count(self, count: float) -> None:
        if self.optimizer is None:
            self.state, _ = counted(self.state, count)
        for name, x in self.optimizer.state[self.p].items() if self.optimizer is not None else ():
            if name.endswith("step"):
                x.fill_(count)

    def counts(self) -> set[float]:
        if self.optimizer is None:
            return counted(self.state, None)[1]
        return {x.item() for name, x in self.optimizer.state[self.p].items() if name.endswith("step")}

    def step(self, k: int) -> None:
        if self.optimizer is not None:
            self.p.grad = self.problem.gradient(self.p.detach(), k)
            self.optimizer.step()
        else:
            g = self.problem.gradient(self.p, k)
            self.p, self.state = self.t.step(g, self.state, self.p, donate=self.how == "donate")


def of_torch(case: Any, problem: Problem, steps: int, first: int, bar: Any) -> Tensor | None:
    """The parameters at the end of the same run of torch's."""
    if case.twin is None:
        return None
    p = torch.nn.Parameter(problem.start.clone())
    twin = case.twin([p], **case.options[0])
    for k in range(steps + 1):
        if k == 1:
            for state in twin.state.values():
                if "step" in state:
                    state["step"] = torch.tensor(float(first), dtype=torch.float64)
        p.grad = problem.gradient(p.detach(), k)
        twin.step()
        bar.update(k > 0)
    return p.detach()


def apart(x: Tensor, y: Tensor) -> float:
    return float((x.detach() - y).abs().max() / y.abs().max())


def warm(case: Any, problem: Problem) -> None:
    """All that is imported and traced once."""
    t, p = case.transform(), problem.start
    state = counted(t.init_state(p), float(STOP))[0]
    for _ in range(3):
        p, state = t.step(p, state, p, executor="leaf")
    with tqdm(total=3, leave=False) as bar:
        of_torch(case, problem, 3, 1, bar)


def measure(case: Any, how: str, steps: int, seed: int) -> dict[str, Any]:
    """A run of one algorithm, and what is known of it at the end."""
    problem, first = Problem(seed), max(STOP - steps // 2, 1)
    warm(case, problem)
    run, found = Run(case, problem, how, first), {}
    begins = steps // 2 - min(ABOUT, steps) // 2
    leaf: Any = None
    started = time.perf_counter()
    with tqdm(total=steps, desc=f"{case.name:<28}", unit="step", mininterval=1.0, leave=False) as bar:
        for k in range(1, steps + 1):
            if k == steps // 10:
                gc.collect()
                found["memory"], found["objects"] = resident(), len(gc.get_objects())
            if k == begins + 1 and how != "optimizer":
                state, counts = counted(run.state, None)
                leaf = run.p.clone(), counted(pytree.tree_map(torch.clone, state), max(counts, default=0), torch.float64)[0]
            run.step(k)
            if leaf is not None and k == begins + min(ABOUT, steps - begins):
                q, state = leaf
                for j in range(begins + 1, k + 1):
                    q, state = case.transform().step(problem.gradient(q, j), state, q, executor="leaf")
                found["leaf"], leaf = apart(run.p, q), None
            if k % 1000 == 0:
                bar.update(1000)
        seconds = time.perf_counter() - started
        gc.collect()
        grown, objects = resident() / found["memory"] - 1, len(gc.get_objects()) - found["objects"]
        bar.reset()
        bar.set_description(f"{case.name:<28}, torch")
        theirs = of_torch(case, problem, steps, first, bar)
    counts = run.counts()
    return {
        "algorithm": case.name, "how": how, "steps": steps, "seed": seed, "us": 1e6 * seconds / steps,
        "memory": found["memory"], "grown": grown, "objects": objects, "counts": sorted(counts),
        "expected": float(first + steps), "torch": None if theirs is None else apart(run.p, theirs),
        "leaf": found.get("leaf"), "finite": bool(run.p.isfinite().all()),
    }  # fmt: skip


def right(found: dict[str, Any]) -> bool:
    counts = not found["counts"] or found["counts"] == [found["expected"]]
    near = all(found[name] is None or found[name] < 1e-6 for name in ("torch", "leaf"))
    return counts and near and found["finite"] and abs(found["grown"]) < 0.01


def row(found: dict[str, Any]) -> list[str]:
    def share(x: float | None) -> str:
        return "" if x is None else f"{x:.0e}"

    first, last = found["memory"] / 2**20, found["memory"] / 2**20 * (1 + found["grown"])
    memory = [f"{first:.1f}", f"{last:.1f}", f"{100 * found['grown']:+.2f} %", f"{found['objects']:+d}"]
    counts = ", ".join([f"{x:,.0f}" for x in found["counts"]])
    right_ = "yes" if right(found) else "NO"
    return [
        f"`{found['algorithm']}`",
        f"{found['us']:.0f}",
        *memory,
        counts,
        share(found["torch"]),
        share(found["leaf"]),
        right_,
    ]


HEAD = ["", "µs a step", "MiB at 10 %", "at 100 %", "growth", "objects", "counter", "from torch", "from leaf by leaf", "right"]


def main() -> None:
    every = algorithms()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=every, default=list(every), metavar="algorithm", help=", ".join(every))
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--how", choices=("donate", "pure", "optimizer"), default="donate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="keep what was found here; what it has already is not run again")
    options = parser.parse_args()
    torch.set_num_threads(1)
    known = json.loads(options.json.read_text()) if options.json is not None and options.json.exists() else []
    asked = {"how": options.how, "steps": options.steps, "seed": options.seed}
    for name in options.only:
        if any(all(x[k] == v for k, v in {**asked, "algorithm": name}.items()) for x in known):
            continue
        known.append(measure(every[name], **asked))
        if options.json is not None:
            options.json.write_text(json.dumps(known, indent=1))
    shown = [x for x in known if x["algorithm"] in options.only and all(x[k] == v for k, v in asked.items())]
    print(markdown(HEAD, [row(x) for x in shown]))
    if wrong := [x["algorithm"] for x in shown if not right(x)]:
        raise SystemExit(f"Wrong: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
