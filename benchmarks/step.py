"""Time and memory of one optimizer step: purestep beside torch.optim and torchopt.

    python -m benchmarks.step
    python -m benchmarks.step --sets mlp many --algorithms adamw --modes "torch fused" wrapper --rounds 50 --json step.json

All modes of a table are measured in one process. In each round every mode takes one step, in an order that is shuffled
anew, so that whatever else happens on the machine happens to all of them. The figures are medians and interquartile
ranges over the rounds.

The *floor* is the time it takes to move the bytes that a step has to read and write, at the speed of the faster of a plain
copy and a plain addition in place; both take their turns in every round. The copy alone would put the floor too high:
where it does not bypass the cache it also reads the memory that it is about to overwrite, and no one counts that. It is
an estimate still: a fused kernel on a large set can come out some percent below 1.

*Memory* is the peak, during one step more, of what was allocated beyond what was there when it began. A pure step counts
its results, three times the parameters with Adam, because the old ones live until it has returned.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from statistics import geometric_mean, median, quantiles
from time import perf_counter
from typing import Any

# The profiler announces itself on stderr, and complains about every tensor that is older than it.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.modes import ALGORITHMS, MODES, SETS, TORCH, Algorithm, ParameterSet, Run

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None

COPY, UPDATE = "copy", "update"  # timed among the modes
WARM_UP = 3  # steps: the first traces programs and makes states, the second finds them made
COPY_WORDS, UPDATE_WORDS = 2, 3  # numbers read or written per element by `Traffic.copy` and `Traffic.update`
BUFFER_LIMIT = 2**28  # bytes; beyond the caches the speed of memory no longer depends on how much is moved
TOLERANCE = 1e-4  # between the parameters of different modes after all steps: rounding adds up to about 1e-5


# ---------------------------------------------------------------------------------------------------------------- results


@dataclass(frozen=True)
class Row:
    """What was measured of one mode, and how it compares."""

    mode: str
    median_ms: float
    iqr_ms: float
    to_torch: float | None  # over torch's fastest mode in the same run; None if none was run
    to_floor: float
    peak_bytes: int
    peak_multiple: float  # of the parameters' size


@dataclass(frozen=True)
class Floor:
    """What the machine allows."""

    bytes: int  # that a step has to read and write
    copy_speed: float  # of a plain copy, in GB of reads and writes per second
    update_speed: float  # of a plain addition in place
    median_ms: float  # the bytes at the greater of these speeds
    iqr_ms: float


@dataclass(frozen=True)
class Table:
    """One algorithm on one set of parameters."""

    algorithm: str
    parameter_set: str
    tensors: int
    parameters: int
    rounds: int
    floor: Floor
    rows: list[Row]

    def over(self, mode: str, others: Sequence[str]) -> float | None:
        """The median time of a mode over that of the fastest of the others; None if they were not run."""
        times = {row.mode: row.median_ms for row in self.rows}
        known = [times[other] for other in others if other in times]
        return times[mode] / min(known) if mode in times and known else None


@dataclass(frozen=True)
class Summary:
    """The three comparisons that purestep promises something about."""

    algorithm: str
    parameter_set: str
    wrapper_to_torch: float | None
    donated_to_torch: float | None
    pure_to_torchopt: float | None


@dataclass(frozen=True)
class Mean:
    """Geometric means over all algorithms and sets."""

    mode: str
    to_torch: float | None
    to_floor: float


def summarize(table: Table) -> Summary:
    """The comparisons of a table that matter."""
    return Summary(
        table.algorithm,
        table.parameter_set,
        wrapper_to_torch=table.over("wrapper", TORCH),
        donated_to_torch=table.over("donated", TORCH),
        pure_to_torchopt=table.over("pure", ["torchopt"]),
    )


def means(tables: list[Table]) -> list[Mean]:
    """The geometric mean of each mode's ratios."""
    found = []
    for mode in [row.mode for row in tables[0].rows]:
        rows = [row for table in tables for row in table.rows if row.mode == mode]
        to_torch = [row.to_torch for row in rows if row.to_torch is not None]
        to_floor = geometric_mean([row.to_floor for row in rows])
        found.append(Mean(mode, geometric_mean(to_torch) if to_torch else None, to_floor))
    return found


# ------------------------------------------------------------------------------------------------------------ measurement


class Traffic:
    """The plainest ways of moving numbers through memory: about as many bytes as a step moves."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.buffer = 4 * (min(size // UPDATE_WORDS, BUFFER_LIMIT) // 4)  # bytes
        self.source = torch.full((self.buffer // 4,), 1.0)  # filled, because fresh zeros share one page of memory
        self.target = torch.full_like(self.source, 2.0)

    def copy(self) -> None:
        """Read one buffer, write the other."""
        self.target.copy_(self.source)

    def update(self) -> None:
        """Read both buffers, write one of them."""
        self.target.add_(self.source)

    def floor(self, copies: list[float], updates: list[float]) -> Floor:
        """The floor, from the milliseconds that copies and updates took."""
        copy_speed = COPY_WORDS * self.buffer / median(copies) / 1e6
        update_speed = UPDATE_WORDS * self.buffer / median(updates) / 1e6
        times, words = (updates, UPDATE_WORDS) if update_speed > copy_speed else (copies, COPY_WORDS)
        scale = self.size / (words * self.buffer)
        return Floor(self.size, copy_speed, update_speed, median_ms=scale * median(times), iqr_ms=scale * spread(times))


def measure(steps: dict[str, Callable[[], None]], rounds: int, label: str) -> dict[str, list[float]]:
    """The milliseconds of every step in every round."""
    for step in steps.values():
        for _ in range(WARM_UP):
            step()
    milliseconds: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    shuffle = random.Random(0).shuffle
    for _ in progress(range(rounds), label):
        shuffle(order)
        for name in order:
            step = steps[name]
            begin = perf_counter()
            step()
            milliseconds[name].append(1e3 * (perf_counter() - begin))
    return milliseconds


def progress(rounds: Iterable[int], label: str) -> Iterable[int]:
    """The same rounds, with a progress bar on stderr where tqdm is installed."""
    return rounds if tqdm is None else tqdm(rounds, desc=label, unit="round", leave=False)


def spread(values: list[float]) -> float:
    """The interquartile range."""
    if len(values) < 2:
        return 0.0
    first, _, third = quantiles(values, n=4, method="inclusive")
    return third - first


def peak_memory(run: Run) -> int:
    """The most bytes that were allocated at once during a step, above those at its start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run.step()  # the profiler sees only what it saw allocated being freed: here a pure step's state is allocated
        with record_function("measured"):
            run.step()
    # The profiler's tables add up what each operator allocates; only the raw events tell what was alive at one time.
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    names = [e.name() for e in events]
    sizes: list[int] = [e.nbytes() for e in events[names.index("measured") :] if e.name() == "[memory]"]
    return max(accumulate(sizes, initial=0))


def clones(tensors: list[Tensor]) -> list[Tensor]:
    """The same numbers in memory of their own."""
    return [x.clone() for x in tensors]


def check(runs: dict[str, Run], grads: list[Tensor], given: list[Tensor]) -> None:
    """Refuse to compare modes that did not compute the same thing."""
    if not all(map(torch.equal, grads, given)):
        raise RuntimeError("A mode has written to the gradients, which all modes share.")
    (first, reference), *others = [(name, run.parameters()) for name, run in runs.items()]
    for name, params in others:
        difference = max((p - q).abs().max().item() for p, q in zip(reference, params))
        if not difference <= TOLERANCE:
            raise RuntimeError(f"After the same steps, the parameters of {name!r} and {first!r} differ by {difference:.1e}.")


def compare(algorithm: Algorithm, parameter_set: ParameterSet, modes: Sequence[str], rounds: int) -> Table:
    """Measure these modes against each other."""
    params, grads = parameter_set.draw(seed=0), parameter_set.draw(seed=1)
    given = clones(grads)
    runs = {mode: MODES[mode](algorithm, clones(params), grads) for mode in modes}
    traffic = Traffic(algorithm.words * parameter_set.bytes)
    steps = {mode: run.step for mode, run in runs.items()} | {COPY: traffic.copy, UPDATE: traffic.update}
    milliseconds = measure(steps, rounds, f"{algorithm.name} on {parameter_set.name}")
    peaks = {mode: peak_memory(run) for mode, run in runs.items()}
    check(runs, grads, given)

    medians = {name: median(times) for name, times in milliseconds.items()}
    floor = traffic.floor(milliseconds[COPY], milliseconds[UPDATE])
    fastest = min([medians[mode] for mode in modes if mode in TORCH], default=None)
    rows = [
        Row(
            mode,
            median_ms=medians[mode],
            iqr_ms=spread(milliseconds[mode]),
            to_torch=medians[mode] / fastest if fastest else None,
            to_floor=medians[mode] / floor.median_ms,
            peak_bytes=peaks[mode],
            peak_multiple=peaks[mode] / parameter_set.bytes,
        )
        for mode in modes
    ]
    return Table(
        algorithm.name,
        parameter_set.name,
        tensors=len(parameter_set.shapes),
        parameters=parameter_set.parameters,
        rounds=rounds,
        floor=floor,
        rows=rows,
    )


# ----------------------------------------------------------------------------------------------------------------- output


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu_model(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,  # at the start: whether the machine was idle
        "platform": platform.platform(),
        "python": platform.python_version(),
        "purestep": version("purestep"),
        "torch": torch.__version__,
        "torchopt": version("torchopt") if "torchopt" in MODES else None,
    }


def cpu_model() -> str:
    """The processor's name; Python itself knows no more than its architecture on Linux."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def render(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table with aligned columns, the first to the left and the others to the right."""
    cells = [list(header), *map(list, lines)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    rule = ["-" * widths[0], *["-" * (width - 1) + ":" for width in widths[1:]]]
    aligned = [[line[0].ljust(widths[0]), *[x.rjust(width) for x, width in zip(line[1:], widths[1:])]] for line in cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in [aligned[0], rule, *aligned[1:]])


def ratio(x: float | None) -> str:
    """A ratio to two places, or a dash."""
    return "-" if x is None else f"{x:.2f}"


def show(table: Table) -> str:
    """The table of one algorithm and set of parameters, under a line that says what it is of."""
    floor = table.floor
    title = (
        f"{table.algorithm} on {table.parameter_set}: {table.tensors} tensors, {table.parameters / 1e6:.2f} M parameters, "
        f"{table.rounds} rounds; a copy moves {floor.copy_speed:.1f} GB/s, an update in place {floor.update_speed:.1f} GB/s"
    )
    header = ("mode", "median ms", "IQR ms", "/ torch's best", "/ floor", "peak MB", "/ parameters")
    lines = [
        (
            row.mode,
            f"{row.median_ms:.3f}",
            f"{row.iqr_ms:.3f}",
            ratio(row.to_torch),
            ratio(row.to_floor),
            f"{row.peak_bytes / 1e6:.2f}",
            ratio(row.peak_multiple),
        )
        for row in table.rows
    ]
    lines.append(("floor", f"{floor.median_ms:.3f}", f"{floor.iqr_ms:.3f}", "", "1.00", "", ""))
    return f"{title}\n\n{render(header, lines)}\n"


def show_summary(summaries: Iterable[Summary]) -> str:
    """The comparisons that matter, of all tables."""
    header = ("algorithm, set", "wrapper / torch's best", "donated / torch's best", "pure / torchopt")
    lines = [
        (f"{s.algorithm}, {s.parameter_set}", ratio(s.wrapper_to_torch), ratio(s.donated_to_torch), ratio(s.pure_to_torchopt))
        for s in summaries
    ]
    return f"Summary\n\n{render(header, lines)}\n"


def show_means(found: Iterable[Mean]) -> str:
    """The geometric means, of all modes."""
    lines = [(mean.mode, ratio(mean.to_torch), ratio(mean.to_floor)) for mean in found]
    table = render(("mode", "/ torch's best", "/ floor"), lines)
    return f"Geometric means of the ratios\n\n{table}\n"


def positive(text: str) -> int:
    """A whole number above 0, from the command line."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description="Time and memory of one optimizer step.")
    for name, choices in (("--algorithms", ALGORITHMS), ("--sets", SETS), ("--modes", MODES)):
        known = list(choices)
        text = f"of {', '.join(map(repr, known))}; all by default"
        parser.add_argument(name, nargs="+", choices=known, default=known, metavar="NAME", help=text)
    usual = ", ".join(f"{s.rounds} for {s.name!r}" for s in SETS.values())
    parser.add_argument("--rounds", type=positive, metavar="N", help=f"steps that are timed of each mode; by default {usual}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all of it, and facts about the machine, to this file")
    return parser.parse_args()


def main() -> None:
    """Measure, print, write."""
    options = arguments()
    if options.json:
        options.json.touch()  # a path that cannot be written is better known now than in a few minutes
    facts = machine()
    print(", ".join(f"{name} {value}" for name, value in facts.items()), end="\n\n")
    tables = []
    for algorithm in options.algorithms:
        for name in options.sets:
            table = compare(ALGORITHMS[algorithm], SETS[name], options.modes, options.rounds or SETS[name].rounds)
            gc.collect()  # what a set needs is several GB; an optimizer may hold itself in a cycle
            tables.append(table)
            print(show(table), flush=True)
    summaries, averages = [summarize(table) for table in tables], means(tables)
    print(show_summary(summaries))
    print(show_means(averages))
    if options.json:
        results = {
            "machine": facts,
            "tables": [asdict(table) for table in tables],
            "summary": [asdict(summary) for summary in summaries],
            "geometric_means": [asdict(mean) for mean in averages],
        }
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
