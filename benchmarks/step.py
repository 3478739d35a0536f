"""Time and memory of one optimizer step: purestep beside torch.optim and torchopt.

    python -m benchmarks.step
    python -m benchmarks.step --algorithms all --summary
    python -m benchmarks.step --sets mlp many --algorithms adamw --modes "torch fused" wrapper --rounds 50 --json step.json

Without arguments AdamW, Adam and SGD are measured, for as many rounds as give steady medians. "all" are all the algorithms of
torch.optim that purestep has, each on what it takes and in the modes that its classes have flags for; there a table is given
some seconds, and a slow algorithm gets fewer rounds.

All modes of a table are measured in one process. In each round every mode takes one step, in an order that is shuffled
anew, so that whatever else happens on the machine happens to all of them. The figures are medians and interquartile
ranges over the rounds.

The *floor* is the time it takes to move the bytes that a step has to read and write, at the speed of the faster of a plain
copy and a plain addition in place; both take their turns in every round. The copy alone would put the floor too high:
where it does not bypass the cache it also reads the memory that it is about to overwrite, and no one counts that. It is
an estimate still: a fused kernel on a large set can come out some percent below 1.

*Memory* is the peak, during one step more, of what was allocated beyond what was there when it began. A pure step counts
its results, three times the parameters with Adam, because the old ones live until it has returned.

The *summary* compares defaults, the classes without any flags, which is what changing the import changes; the fastest of
purestep's wrapper modes with the fastest of torch's; and single modes with their closest relatives. Below 1 is faster.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import random
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
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

from benchmarks.modes import (
    ALGORITHMS,
    MEASURABLE,
    MODES,
    SETS,
    TORCH,
    WRAPPER,
    Algorithm,
    ParameterSet,
    Run,
    modes_of,
    numbers,
)

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None

USUAL, ALL = ("adamw", "adam", "sgd"), "all"
COPY, UPDATE = "copy", "update"  # timed among the modes
WARM_UP = 3  # steps: the first traces programs and makes states, the second finds them made
SECONDS, FEWEST = 6.0, 4  # of the rounds of a table of "all", and the rounds it has at least; two warm-up steps do there
COPY_WORDS, UPDATE_WORDS = 2, 3  # numbers read or written per element by `Traffic.copy` and `Traffic.update`
BUFFER_LIMIT = 2**28  # bytes; beyond the caches the speed of memory no longer depends on how much is moved


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
    note: str
    rounds: int
    floor: Floor
    rows: list[Row]

    def fastest(self, modes: Sequence[str]) -> float | None:
        """The least median time of these modes; None if none of them was run."""
        return min([row.median_ms for row in self.rows if row.mode in modes], default=None)

    def over(self, modes: Sequence[str], others: Sequence[str]) -> float | None:
        """The median time of the fastest of these modes over that of the fastest of the others; None if they were not run."""
        ours, theirs = self.fastest(modes), self.fastest(others)
        return ours / theirs if ours and theirs else None


@dataclass(frozen=True)
class Summary:
    """The comparisons that purestep promises something about. None: a mode was not run, or the algorithm does not have it."""

    algorithm: str
    parameter_set: str
    default_to_default: float | None
    best_to_best: float | None
    wrapper_to_torch: float | None
    donated_to_torch: float | None
    pure_to_torchopt: float | None


@dataclass(frozen=True)
class Mean:
    """Geometric means over all algorithms and sets in which a mode was run."""

    mode: str
    tables: int
    to_torch: float | None
    to_floor: float


RATIOS = [field.name for field in fields(Summary) if "_to_" in field.name]


def summarize(table: Table) -> Summary:
    """The comparisons of a table that matter."""
    return Summary(
        table.algorithm,
        table.parameter_set,
        default_to_default=table.over(["wrapper"], ["torch default"]),
        best_to_best=table.over(WRAPPER, TORCH),
        wrapper_to_torch=table.over(["wrapper"], TORCH),
        donated_to_torch=table.over(["donated"], TORCH),
        pure_to_torchopt=table.over(["pure"], ["torchopt"]),
    )


def overall(summaries: list[Summary]) -> dict[str, float | None]:
    """The geometric mean of each comparison, over the tables that have it."""
    return {name: mean([getattr(summary, name) for summary in summaries]) for name in RATIOS}


def means(tables: list[Table]) -> list[Mean]:
    """The geometric mean of each mode's ratios."""
    found = []
    for mode in MODES:
        rows = [row for table in tables for row in table.rows if row.mode == mode]
        if rows:
            to_floor = geometric_mean([row.to_floor for row in rows])
            found.append(Mean(mode, len(rows), mean([row.to_torch for row in rows]), to_floor))
    return found


def mean(ratios: Iterable[float | None]) -> float | None:
    """The geometric mean of those that there are."""
    known = [x for x in ratios if x is not None]
    return geometric_mean(known) if known else None


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


def measure(steps: dict[str, Callable[[], None]], rounds: int, seconds: float | None, label: str) -> dict[str, list[float]]:
    """The milliseconds of every step in every round. A limit in seconds makes it fewer rounds where they are slow."""
    last = dict.fromkeys(steps, 0.0)
    for name, step in steps.items():
        for _ in range(WARM_UP if seconds is None else 2):
            last[name] = timed(step)
    if seconds is not None:
        rounds = min(rounds, max(FEWEST, int(1e3 * seconds / sum(last.values()))))
    milliseconds: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    shuffle = random.Random(0).shuffle
    for _ in progress(range(rounds), label):
        shuffle(order)
        for name in order:
            milliseconds[name].append(timed(steps[name]))
    return milliseconds


def timed(step: Callable[[], None]) -> float:
    """The milliseconds that one step takes."""
    begin = perf_counter()
    step()
    return 1e3 * (perf_counter() - begin)


def progress(rounds: Iterable[int], label: str) -> Iterable[int]:
    """The same rounds, with a progress bar on stderr where tqdm is installed."""
    return rounds if tqdm is None else tqdm(rounds, desc=label, unit="round", leave=False, disable=None)


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


class DisagreementError(RuntimeError):
    """Modes did not compute the same thing: there is nothing to compare."""


def check(algorithm: Algorithm, runs: dict[str, Run], begin: list[Tensor], grads: list[Tensor], given: list[Tensor]) -> None:
    """Refuse to compare modes that did not compute the same thing."""
    if not all(torch.equal(numbers(g), numbers(h)) for g, h in zip(grads, given)):
        raise DisagreementError("A mode has written to the gradients, which all modes share.")
    (first, reference), *others = [(name, run.parameters()) for name, run in runs.items()]
    moved = farthest(reference, begin)
    for name, params in others:
        difference = farthest(reference, params)
        if not difference <= algorithm.tolerance * moved:
            raise DisagreementError(
                f"After the same steps, by which they moved up to {moved:.1e}, the parameters of {name!r} and {first!r} differ "
                f"by {difference:.1e}."
            )


def farthest(xs: list[Tensor], ys: list[Tensor]) -> float:
    """The largest difference between elements; NaN if there is one."""
    return torch.stack([(x - y).abs().max() for x, y in zip(xs, ys)]).max().item()


def compare(
    algorithm: Algorithm, parameter_set: ParameterSet, modes: Sequence[str], rounds: int, seconds: float | None
) -> Table:
    """Measure these modes against each other."""
    parameter_set = parameter_set.of(algorithm)
    params, grads = parameter_set.draw(seed=0), parameter_set.draw(seed=1, gradient=algorithm.gradient)
    given = clones(grads)
    runs = {mode: MODES[mode].start(algorithm, clones(params), grads) for mode in modes}
    traffic = Traffic(algorithm.words * 4 * sum(numbers(g).numel() for g in grads))
    steps = {mode: run.step for mode, run in runs.items()} | {COPY: traffic.copy, UPDATE: traffic.update}
    milliseconds = measure(steps, rounds, seconds, f"{algorithm.name} on {parameter_set.name}")
    peaks = {mode: peak_memory(run) for mode, run in runs.items()}
    check(algorithm, runs, params, grads, given)

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
        note=algorithm.note,
        rounds=len(milliseconds[COPY]),
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
    name = f"{table.algorithm} on {table.parameter_set}" + (f" ({table.note})" if table.note else "")
    title = (
        f"{name}: {table.tensors} tensors, {table.parameters / 1e6:.2f} M parameters, "
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


def show_summary(summaries: list[Summary]) -> str:
    """The comparisons that matter, of all tables, and their geometric means."""
    header = (
        "algorithm, set", "wrapper / torch default", "wrapper's best / torch's best", "wrapper / torch's best",
        "donated / torch's best", "pure / torchopt",
    )  # fmt: skip
    lines = [(f"{s.algorithm}, {s.parameter_set}", *[ratio(getattr(s, name)) for name in RATIOS]) for s in summaries]
    lines.append(("geometric mean", *map(ratio, overall(summaries).values())))
    return f"Summary\n\n{render(header, lines)}\n"


def show_means(found: Iterable[Mean]) -> str:
    """The geometric means, of all modes."""
    lines = [(mean.mode, str(mean.tables), ratio(mean.to_torch), ratio(mean.to_floor)) for mean in found]
    table = render(("mode", "tables", "/ torch's best", "/ floor"), lines)
    return f"Geometric means of the ratios\n\n{table}\n"


def release() -> None:
    """Give memory back to the system: what a table needs is several GB, and an optimizer may hold itself in a cycle."""
    gc.collect()
    if sys.platform == "linux":  # glibc keeps what is freed in pieces, which do not fit the next table's tensors
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)


def positive(text: str) -> int:
    """A whole number above 0, from the command line."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description="Time and memory of one optimizer step.")
    choices: list[tuple[str, Iterable[str], Iterable[str], str]] = [
        ("--algorithms", [*ALGORITHMS, ALL], USUAL, f"{', '.join(map(repr, USUAL))} by default, and {ALL!r} for all of them"),
        ("--sets", SETS, SETS, "all by default"),
        ("--modes", MODES, MODES, "all that an algorithm has by default"),
    ]
    for name, known, default, text in choices:
        text = f"of {', '.join(map(repr, known))}; {text}"
        parser.add_argument(name, nargs="+", choices=list(known), default=list(default), metavar="NAME", help=text)
    usual = ", ".join(f"{s.rounds} for {s.name!r}" for s in SETS.values())
    parser.add_argument("--rounds", type=positive, metavar="N", help=f"steps that are timed of each mode; by default {usual}")
    text = (
        f"fewer rounds, but at least {FEWEST}, where a table's take longer; {SECONDS:g} by default for {ALL!r}, else no limit"
    )
    parser.add_argument("--seconds", type=float, metavar="S", help=text)
    parser.add_argument("--summary", action="store_true", help="print the summary, and not the tables")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all of it, and facts about the machine, to this file")
    options = parser.parse_args()
    if ALL in options.algorithms:
        options.algorithms = MEASURABLE
        options.seconds = options.seconds or SECONDS
    lacking = [ALGORITHMS[key].name for key in options.algorithms if key not in MEASURABLE]
    if lacking:
        parser.error(f"purestep.optim has no {' and no '.join(lacking)} yet; it has {', '.join(MEASURABLE)}.")
    if options.rounds:
        options.seconds = None
    return options


def main() -> None:
    """Measure, print, write."""
    options = arguments()
    if options.json:
        options.json.touch()  # a path that cannot be written is better known now than in a few minutes
    facts = machine()
    print(", ".join(f"{name} {value}" for name, value in facts.items()), end="\n\n")
    later = [algorithm.name for key, algorithm in ALGORITHMS.items() if key not in MEASURABLE]
    if later:
        print(f"Not measured, because purestep.optim has no such class yet: {', '.join(later)}\n")
    tables, failures = [], []
    for algorithm in [ALGORITHMS[key] for key in options.algorithms]:
        modes = [mode for mode in modes_of(algorithm) if mode in options.modes]
        if not modes:
            print(f"{algorithm.name} has none of the modes {', '.join(options.modes)}.\n")
            continue
        for mode, reason in algorithm.without.items():
            if mode in options.modes:
                print(f"{algorithm.name} without {mode}: {reason}\n")
        for name in options.sets:
            try:
                table = compare(algorithm, SETS[name], modes, options.rounds or SETS[name].rounds, options.seconds)
            except DisagreementError as error:  # the other tables are good
                failures.append(f"{algorithm.name} on {name}: {error}")
                print(failures[-1], end="\n\n", flush=True)
                continue
            finally:
                release()
            tables.append(table)
            if not options.summary:
                print(show(table), flush=True)
    summaries, averages = [summarize(table) for table in tables], means(tables)
    print(show_summary(summaries))
    if not options.summary:
        print(show_means(averages))
    if options.json:
        results = {
            "machine": facts,
            "tables": [asdict(table) for table in tables],
            "summary": [asdict(summary) for summary in summaries],
            "summary_geometric_means": overall(summaries),
            "geometric_means": [asdict(average) for average in averages],
            "failures": failures,
        }
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
