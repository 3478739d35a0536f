"""Time and memory of one optimizer step: purestep beside torch.optim, torchopt, pytorch_optimizer and optax.

    python -m benchmarks.step
    python -m benchmarks.step --algorithms all --summary
    python -m benchmarks.step --algorithms everything --record
    python -m benchmarks.step --algorithms lion adamw --modes usual optax
    python -m benchmarks.step --sets mlp many --algorithms adamw --modes "torch fused" wrapper --rounds 50 --json step.json
    python -m benchmarks.step --device cuda --sets billion --modes "torch fused" wrapper "wrapper compiled"

Without arguments AdamW, Adam and SGD are measured, for as many rounds as give steady medians. "all" are all the algorithms of
torch.optim that purestep has, each on what it takes and in the modes that its classes have flags for; "chains" are six
composed transforms beside the same pieces of torch, put together by hand; "everything" is both. With these words a table is
given some seconds, and what is slow gets fewer rounds.

A table's *torch's best* is the fastest of torch's modes, but for "torch compiled", which is `torch.compile(optimizer.step)`.
That compiles for minutes on many tensors, and is measured only where `--modes` asks for it; what torch cannot compile runs
in it as it would without. Where torch has no counterpart the column is empty.

"torchopt" and "pytorch_optimizer" are measured where they are installed. "optax" is, too, but only where `--modes` asks for
it: its step is compiled by jax, whose pool of threads shares the processors with torch's for as long as the process lives.
Its gradients are the same memory as everyone's, its state and parameters are given away and overwritten, and a step has ended
when the results are there. `--modes usual` are those that are measured without asking.

All modes of a table are measured in one process. In each round every mode takes one step, in an order that is shuffled
anew, so that whatever else happens on the machine happens to all of them. The figures are medians and interquartile
ranges over the rounds.

*compile s* is what the first steps of a compiled mode take beyond what as many of the timed ones do, with nothing in
Inductor's cache on disk when the process begins. What an earlier mode or table has compiled is used again where that is
possible, as it would be in a process that trains two models. Loading the compiler is measured by itself, before all else.

The *floor* is the time it takes to move the bytes that a step has to read and write, at the speed of the faster of a plain
copy and a plain addition in place; both take their turns in every round. The copy alone would put the floor too high:
where it does not bypass the cache it also reads the memory that it is about to overwrite, and no one counts that. It is
an estimate still: a fused kernel on a large set can come out some percent below 1.

*Memory* is the peak, during one step more, of what was allocated beyond what was there when it began. A pure step counts
its results, three times the parameters with Adam, because the old ones live until it has returned. Of optax it is what the
compiler says that the program needs.

The *summary* compares defaults, the classes without any flags, which is what changing the import changes; the fastest of
purestep's wrapper modes with the fastest of torch's; and single modes with their closest relatives. Below 1 is faster.

`--record` writes all of it to benchmarks/history, where `python -m benchmarks.history` compares the newest two.

`--device cuda` measures the same on a GPU, all but optax: the time is that between two events of the GPU around a step that
begins when the GPU has nothing left to do, so it includes what Python takes to launch the kernels; the memory is what torch's
allocator counts; and *of copy bandwidth* is the floor over the median, the share of the copy's (or the update's) bandwidth
that a step achieves. The set "billion" is for such machines alone. All modes of a table have parameters and a state of their
own at the same time: of AdamW 12 GB each there. No GPU was at hand when this was written: it has not been run on one yet.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import random
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from statistics import geometric_mean, median, quantiles
from time import perf_counter
from typing import Any, TypeAlias

# The profiler announces itself on stderr, and complains about every tensor that is older than it.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.modes import (
    ALGORITHMS,
    CHAINS,
    COMPILED,
    CPU_ONLY,
    INDUCTOR,
    LARGE,
    MEASURABLE,
    MODES,
    ON_REQUEST,
    OPTAX,
    PYTORCH_OPTIMIZER,
    SETS,
    SUBJECTS,
    TORCH,
    WRAPPER,
    Accounted,
    ParameterSet,
    Run,
    Subject,
    numbers,
    starts,
)

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None

USUAL = ("adamw", "adam", "sgd")
WORDS = {"all": MEASURABLE, "chains": list(CHAINS), "everything": [*MEASURABLE, *CHAINS]}
USUAL_MODES = [mode for mode in MODES if mode not in ON_REQUEST]
PACKAGES = {"torchopt": ["torchopt"], PYTORCH_OPTIMIZER: ["pytorch_optimizer"], OPTAX: ["optax", "jax"]}  # by mode
HISTORY = Path(__file__).parent / "history"
COPY, UPDATE = "copy", "update"  # timed among the modes
WARM_UP = 3  # steps: the first traces programs and makes states, the second finds them made
SECONDS, FEWEST = 6.0, 4  # of the rounds of a table of a word, and the rounds it has at least; two warm-up steps do there
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
    compile_s: float | None  # that the first steps took longer; None if nothing is compiled


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
    device: str
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
    wrapper_to_pytorch_optimizer: float | None
    donated_compiled_to_optax: float | None
    compiled_to_floor: float | None
    compiled_to_torch: float | None


@dataclass(frozen=True)
class Mean:
    """Geometric means over all algorithms and sets in which a mode was run."""

    mode: str
    tables: int
    to_torch: float | None
    to_floor: float


COMPARISONS = {
    "default_to_default": "wrapper / torch default",
    "best_to_best": "wrapper's best / torch's best",
    "wrapper_to_torch": "wrapper / torch's best",
    "donated_to_torch": "donated / torch's best",
    "pure_to_torchopt": "pure / torchopt",
    "wrapper_to_pytorch_optimizer": "wrapper / pytorch_optimizer",
    "donated_compiled_to_optax": "donated compiled / optax",
    "compiled_to_floor": "wrapper compiled / floor",
    "compiled_to_torch": "wrapper compiled / torch's best",
}


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
        wrapper_to_pytorch_optimizer=table.over(["wrapper"], [PYTORCH_OPTIMIZER]),
        donated_compiled_to_optax=table.over(["donated compiled"], [OPTAX]),
        compiled_to_floor=next((row.to_floor for row in table.rows if row.mode == "wrapper compiled"), None),
        compiled_to_torch=table.over(["wrapper compiled"], TORCH),
    )


def overall(summaries: list[Summary]) -> dict[str, float | None]:
    """The geometric mean of each comparison, over the tables that have it."""
    return {name: mean([getattr(summary, name) for summary in summaries]) for name in COMPARISONS}


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

    def __init__(self, size: int, device: str = "cpu") -> None:
        self.size = size
        self.buffer = 4 * (min(size // UPDATE_WORDS, BUFFER_LIMIT) // 4)  # bytes
        # Filled, because fresh zeros share one page of memory.
        self.source = torch.full((self.buffer // 4,), 1.0, device=device)
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


Clock: TypeAlias = Callable[[Callable[[], None]], float]
"""What tells the milliseconds that a step takes."""


def nothing() -> None:
    """What comes before a step that needs no preparation."""


def timed(step: Callable[[], None]) -> float:
    """The milliseconds that one step takes."""
    begin = perf_counter()
    step()
    return 1e3 * (perf_counter() - begin)


def timed_on_gpu(step: Callable[[], None]) -> float:
    """The milliseconds that one step takes on a GPU, from when it has nothing left to do until it has nothing left to do."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def warm_up(
    steps: Mapping[str, Callable[[], None]],
    seconds: float | None = None,
    before: Callable[[], None] = nothing,
    clock: Clock = timed,
    least: int = 0,
) -> dict[str, list[float]]:
    """The milliseconds of the first steps, which compile programs and make states; of so many at least."""
    milliseconds: dict[str, list[float]] = {name: [] for name in steps}
    for name, step in steps.items():
        for _ in range(max(least, WARM_UP if seconds is None else 2)):
            before()
            milliseconds[name].append(clock(step))
    return milliseconds


def measure(
    steps: Mapping[str, Callable[[], None]],
    rounds: int,
    seconds: float | None,
    label: str,
    before: Callable[[], None] = nothing,
    first: dict[str, list[float]] | None = None,
    clock: Clock = timed,
) -> dict[str, list[float]]:
    """The milliseconds of every step in every round. A limit in seconds makes it fewer rounds where they are slow.

    `before` is called before every step, and not timed. `first` is what `warm_up` returned, if the caller has done that.
    """
    first = first or warm_up(steps, seconds, before, clock)
    if seconds is not None:
        rounds = min(rounds, max(FEWEST, int(1e3 * seconds / sum(times[-1] for times in first.values()))))
    milliseconds: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    shuffle = random.Random(0).shuffle
    for _ in progress(range(rounds), label):
        shuffle(order)
        for name in order:
            before()
            milliseconds[name].append(clock(steps[name]))
    return milliseconds


def progress(rounds: Iterable[int], label: str) -> Iterable[int]:
    """The same rounds, with a progress bar on stderr where tqdm is installed."""
    return rounds if tqdm is None else tqdm(rounds, desc=label, unit="round", leave=False, disable=None)


def spread(values: list[float]) -> float:
    """The interquartile range."""
    if len(values) < 2:
        return 0.0
    first, _, third = quantiles(values, n=4, method="inclusive")
    return third - first


def peak_memory(run: Run, before: Callable[[], None] = nothing) -> int:
    """The most bytes that were allocated at once during a step, above those at its start."""
    before()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run.step()  # the profiler sees only what it saw allocated being freed: here a pure step's state is allocated
        before()
        with record_function("measured"):
            run.step()
    if isinstance(run, Accounted):
        return run.peak_bytes()
    # The profiler's tables add up what each operator allocates; only the raw events tell what was alive at one time.
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    names = [e.name() for e in events]
    sizes: list[int] = [e.nbytes() for e in events[names.index("measured") :] if e.name() == "[memory]"]
    return max(accumulate(sizes, initial=0))


def peak_memory_on_gpu(run: Run, before: Callable[[], None] = nothing) -> int:
    """The same on a GPU, as torch's allocator counts it."""
    before()
    torch.cuda.reset_peak_memory_stats()
    begin = torch.cuda.memory_allocated()
    run.step()
    return torch.cuda.max_memory_allocated() - begin


@dataclass(frozen=True)
class Device:
    """Where steps are taken, and how they are measured there."""

    name: str
    clock: Clock
    peak_memory: Callable[[Run, Callable[[], None]], int]
    without: Sequence[str]  # sets and modes
    present: Callable[[], bool] = lambda: True


DEVICES = {
    device.name: device
    for device in [
        Device("cpu", timed, peak_memory, without=LARGE),
        Device("cuda", timed_on_gpu, peak_memory_on_gpu, without=CPU_ONLY, present=torch.cuda.is_available),
    ]
}


def clones(tensors: list[Tensor]) -> list[Tensor]:
    """The same numbers in memory of their own."""
    return [x.clone() for x in tensors]


class DisagreementError(RuntimeError):
    """Modes did not compute the same thing: there is nothing to compare."""


def check(subject: Subject, runs: dict[str, Run], begin: list[Tensor], grads: list[Tensor], given: list[Tensor]) -> None:
    """Refuse to compare modes that did not compute the same thing."""
    if not subject.spends and not all(torch.equal(numbers(g), numbers(h)) for g, h in zip(grads, given)):
        raise DisagreementError("A mode has written to the gradients, which all modes share.")
    (first, reference), *others = [(name, run.parameters()) for name, run in runs.items()]
    moved = farthest(reference, begin)
    for name, params in others:
        difference = farthest(reference, params)
        if not difference <= max(subject.looser.get(mode, subject.tolerance) for mode in (first, name)) * moved:
            raise DisagreementError(
                f"After the same steps, by which they moved up to {moved:.1e}, the parameters of {name!r} and {first!r} differ "
                f"by {difference:.1e}."
            )


def farthest(xs: list[Tensor], ys: list[Tensor]) -> float:
    """The largest difference between elements; NaN if there is one."""
    return torch.stack([(x - y).abs().max() for x, y in zip(xs, ys)]).max().item()


def compare(
    subject: Subject, parameter_set: ParameterSet, modes: Sequence[str], rounds: int, seconds: float | None, device: Device
) -> Table:
    """Measure these modes against each other."""
    parameter_set = parameter_set.of(subject)
    params = parameter_set.draw(seed=0, device=device.name)
    grads = parameter_set.draw(seed=1, gradient=subject.gradient, device=device.name)
    given = clones(grads)
    possible = starts(subject)
    runs = {mode: possible[mode](clones(params), grads) for mode in modes}
    traffic = Traffic(subject.traffic(grads), device.name)
    before = partial(torch._foreach_copy_, grads, given) if subject.spends else nothing
    steps = {mode: run.step for mode, run in runs.items()} | {COPY: traffic.copy, UPDATE: traffic.update}
    first = warm_up(steps, seconds, before, device.clock, subject.begins)
    milliseconds = measure(steps, rounds, seconds, f"{subject.name} on {parameter_set.name}", before, first, device.clock)
    peaks = {mode: device.peak_memory(run, before) for mode, run in runs.items()}
    check(subject, runs, params, grads, given)

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
            compile_s=compile_time(first[mode], medians[mode]) if mode in COMPILED else None,
        )
        for mode in modes
    ]
    return Table(
        subject.name,
        parameter_set.name,
        device=device.name,
        tensors=len(parameter_set.shapes),
        parameters=parameter_set.parameters,
        note=subject.note,
        rounds=len(milliseconds[COPY]),
        floor=floor,
        rows=rows,
    )


def load_compiler() -> float:
    """The seconds from nothing to the first and least of compiled functions, which the first mode would have to pay."""
    return timed(lambda: torch.compile(lambda x: x + 1)(torch.ones(2))) / 1e3


def compile_time(first: list[float], usual: float) -> float:
    """The seconds that these first steps took longer than usual ones, all in milliseconds."""
    return max(0.0, sum(first) - usual * len(first)) / 1e3


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
        **{name: version(name) if mode in MODES else None for mode, names in PACKAGES.items() for name in names},
    }


def gpu() -> dict[str, Any]:
    """And what they depend on beyond that on a GPU."""
    return {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}


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
    compiled, achieved = any(row.compile_s is not None for row in table.rows), table.device != "cpu"
    header = ["mode", "median ms", "IQR ms", "/ torch's best", "/ floor", *["of copy bandwidth"] * achieved, "peak MB"]
    header += ["/ parameters", *["compile s"] * compiled]
    lines = [
        [
            row.mode,
            f"{row.median_ms:.3f}",
            f"{row.iqr_ms:.3f}",
            ratio(row.to_torch),
            ratio(row.to_floor),
            *[f"{1 / row.to_floor:.0%}"] * achieved,
            f"{row.peak_bytes / 1e6:.2f}",
            ratio(row.peak_multiple),
            *["" if row.compile_s is None else f"{row.compile_s:.1f}"] * compiled,
        ]
        for row in table.rows
    ]
    times = [f"{floor.median_ms:.3f}", f"{floor.iqr_ms:.3f}"]
    lines.append(["floor", *times, "", "1.00", *["100%"] * achieved, "", "", *[""] * compiled])
    return f"{title}\n\n{render(header, lines)}\n"


def show_summary(summaries: list[Summary]) -> str:
    """The comparisons that matter, of all tables, and their geometric means; none that no table has."""
    averages = overall(summaries)
    known = {name: title for name, title in COMPARISONS.items() if averages[name] is not None}
    lines = [(f"{s.algorithm}, {s.parameter_set}", *[ratio(getattr(s, name)) for name in known]) for s in summaries]
    lines.append(("geometric mean", *[ratio(averages[name]) for name in known]))
    return f"Summary\n\n{render(('algorithm, set', *known.values()), lines)}\n"


def show_means(found: Iterable[Mean]) -> str:
    """The geometric means, of all modes."""
    lines = [(mean.mode, str(mean.tables), ratio(mean.to_torch), ratio(mean.to_floor)) for mean in found]
    table = render(("mode", "tables", "/ torch's best", "/ floor"), lines)
    return f"Geometric means of the ratios\n\n{table}\n"


def release() -> None:
    """Give memory back to the system: what a table needs is several GB, and an optimizer may hold itself in a cycle."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # its limit on how often one function is compiled is meant for one model
    gc.collect()
    torch.cuda.empty_cache()  # does nothing where there is no GPU
    if sys.platform == "linux":  # glibc keeps what is freed in pieces, which do not fit the next table's tensors
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)


def dumps(value: Any, indent: int = 0) -> str:
    """JSON with a line for each thing that is made of numbers and texts alone, such as a row; five digits are enough."""
    if isinstance(value, float):
        return json.dumps(float(f"{value:.5g}"))
    if not isinstance(value, (dict, list)):
        return json.dumps(value)
    items = value.items() if isinstance(value, dict) else [(None, x) for x in value]
    flat = not any(isinstance(x, (dict, list)) for _, x in items)
    parts = [("" if key is None else f"{json.dumps(key)}: ") + dumps(x, indent + 1) for key, x in items]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    if flat:
        return opening + ", ".join(parts) + closing
    margin = " " * (indent + 1)
    return f"{opening}\n{margin}" + f",\n{margin}".join(parts) + f"\n{' ' * indent}{closing}"


def record_path(facts: Mapping[str, Any]) -> Path:
    """Where the history keeps a run: one for a day and a processor, the last."""
    name = re.sub(r"\(\w+\)|\b(cpu|processor)\b|@.*", " ", f"{facts.get('gpu', facts['cpu'])}".lower())  # (R), (TM), the clock
    return HISTORY / f"{facts['date'][:10]}-{re.sub('[^a-z0-9]+', '-', name).strip('-') or 'unknown'}.json"


def positive(text: str) -> int:
    """A whole number above 0, from the command line."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description="Time and memory of one optimizer step.")
    choices: list[tuple[str, Iterable[str], Iterable[str], str]] = [
        (
            "--algorithms",
            [*SUBJECTS, *WORDS],
            USUAL,
            f"{', '.join(map(repr, USUAL))} by default; 'all' are all algorithms, 'chains' the chains, 'everything' both",
        ),
        ("--sets", SETS, [], f"all by default, but {', '.join(map(repr, LARGE))} only on a GPU"),
        (
            "--modes",
            [*MODES, "usual"],
            ["usual"],
            f"by default 'usual', all that an algorithm has but {', '.join(map(repr, ON_REQUEST))}",
        ),
    ]
    for name, known, default, text in choices:
        text = f"of {', '.join(map(repr, known))}; {text}"
        parser.add_argument(name, nargs="+", choices=list(known), default=list(default), metavar="NAME", help=text)
    usual = ", ".join(f"{s.rounds} for {s.name!r}" for s in SETS.values())
    parser.add_argument("--rounds", type=positive, metavar="N", help=f"steps that are timed of each mode; by default {usual}")
    text = (
        f"fewer rounds, but at least {FEWEST}, where a table's take longer; {SECONDS:g} by default for "
        f"{', '.join(map(repr, WORDS))}, else no limit"
    )
    parser.add_argument("--seconds", type=float, metavar="S", help=text)
    parser.add_argument("--device", choices=list(DEVICES), default="cpu", help="where; 'cpu' by default")
    parser.add_argument("--summary", action="store_true", help="print the summary, and not the tables")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all of it, and facts about the machine, to this file")
    parser.add_argument(
        "--record", action="store_true", help=f"write the same to {HISTORY.parent.name}/{HISTORY.name}/DATE-CPU.json"
    )
    options = parser.parse_args()
    if not WORDS.keys().isdisjoint(options.algorithms):
        options.seconds = options.seconds or SECONDS
    named = [key for word in options.algorithms for key in WORDS.get(word, [word])]
    options.algorithms = list(dict.fromkeys(named))
    options.device = DEVICES[options.device]
    options.sets = options.sets or [name for name in SETS if name not in options.device.without]
    if too_large := [name for name in options.sets if name in options.device.without]:
        parser.error(f"{' and '.join(too_large)} would take too long on a processor; --device cuda measures it.")
    wanted = {name for mode in options.modes for name in (USUAL_MODES if mode == "usual" else [mode])}
    options.modes = [mode for mode in MODES if mode in wanted and mode not in options.device.without]
    lacking = [ALGORITHMS[key].name for key in options.algorithms if key in ALGORITHMS and key not in MEASURABLE]
    if lacking:
        parser.error(f"purestep.optim has no {' and no '.join(lacking)} yet; it has {', '.join(MEASURABLE)}.")
    if options.rounds:
        options.seconds = None
    return options


def main() -> None:
    """Measure, print, write."""
    options = arguments()
    if not options.device.present():
        print("There is no GPU that torch could use here, so nothing was measured.")
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as empty:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", empty)
        report(options)


def report(options: argparse.Namespace) -> None:
    """What the command line asks for."""
    facts = machine() | (gpu() if options.device.name == "cuda" else {})
    if options.record:
        HISTORY.mkdir(exist_ok=True)
    paths = [path for path in (options.json, record_path(facts) if options.record else None) if path]
    if options.json:
        options.json.touch()  # a path that cannot be written is better known now than in a few minutes
    if any(mode in starts(SUBJECTS[key]) for key in options.algorithms for mode in INDUCTOR if mode in options.modes):
        facts["compiler_load_s"] = round(load_compiler(), 1)
    print(", ".join(f"{name} {value}" for name, value in facts.items()), end="\n\n")
    later = [algorithm.name for key, algorithm in ALGORITHMS.items() if key not in MEASURABLE]
    if later:
        print(f"Not measured, because purestep.optim has no such class yet: {', '.join(later)}\n")
    tables, failures = [], []
    for subject in [SUBJECTS[key] for key in options.algorithms]:
        modes = [mode for mode in starts(subject) if mode in options.modes]
        if not modes:
            print(f"{subject.name} has none of the modes {', '.join(options.modes)}.\n")
            continue
        for mode, reason in subject.without.items():
            if mode in options.modes:
                print(f"{subject.name} without {mode}: {reason}\n")
        for name in options.sets:
            parameter_set = SETS[name]
            if not parameter_set.of(subject).shapes:
                print(f"{subject.name} takes none of the tensors of {name}.\n")
                continue
            rounds = options.rounds or parameter_set.rounds
            try:
                table = compare(subject, parameter_set, modes, rounds, options.seconds, options.device)
            except (DisagreementError, torch.OutOfMemoryError) as error:  # the other tables are good
                failures.append(f"{subject.name} on {name}: {error}")
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
    if paths:
        results = {
            "machine": facts,
            "tables": [asdict(table) for table in tables],
            "summary": [asdict(summary) for summary in summaries],
            "summary_geometric_means": overall(summaries),
            "geometric_means": [asdict(average) for average in averages],
            "failures": failures,
        }
        for path in paths:
            path.write_text(dumps(results) + "\n")
            print(f"Written to {path}\n")
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
