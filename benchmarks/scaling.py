"""How the time of a step grows with the number of tensors and with the number of elements: a table and a picture of each.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --rounds 20 --json scaling.json --out scaling.png

*tensors*: from 10 to 10,000 tensors of 64 elements, so few that what is measured is what each tensor costs by itself.

*elements*: one perceptron of 6 tensors, the one of `benchmarks.step` narrower and wider, of ten thousand to 32 million
elements. More would not fit into 4 GB, because all modes have parameters and a state of their own at the same time.

AdamW is the algorithm that torch has a fused kernel for, and NAdam the one that it has none for. As in `benchmarks.step`, the
modes take their steps in turns, in an order that is shuffled anew in every round; the figures are medians; modes that do
not compute the same thing are an error; and the *floor* is the time that it takes to move the bytes of a step.

A table has the time of a step divided by the number of tensors or of elements: along a row it stays the same where the cost
is linear. The *slope* is that of the logarithm of a step's time over the logarithm of the number, fitted over the upper two
decades: 1 is linear, below 1 there is a cost per step left that is being shared out, and above 1 the cost of each
grows, as it does for the floor itself where the tensors outgrow the caches.

The *first step* of a compiled mode, which includes the compilation, is taken in a process of its own whose compiler's caches
are empty. A kernel serves every tensor, so it must take as long for 10 tensors as for 3000.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import linear_regression, median
from typing import Any

from benchmarks.modes import ALGORITHMS, MODES, SETS, Algorithm, ParameterSet, Shape
from benchmarks.step import COPY, UPDATE, Traffic, check, clones, machine, measure, positive, release, render, spread, timed

try:
    import matplotlib
except ImportError:  # the tables need no picture
    matplotlib = None  # type: ignore[assignment]

WRAPPER_COMPILED, FLOOR = "wrapper compiled", "floor"
MODES_SHOWN = ("torch default", "torch fused", "wrapper", "donated", WRAPPER_COMPILED)
ALGORITHMS_SHOWN = ("adamw", "nadam")
ROUNDS, SECONDS = 1000, 2.5  # of one size of one algorithm, whichever is less
DECADES = 2  # at the upper end, that a slope is fitted over
FIRST_STEPS = (10, 3000)  # tensors
PICTURE = Path("docs/_static/scaling.png")


# ------------------------------------------------------------------------------------------------------------------ sizes


@dataclass(frozen=True)
class Sweep:
    """Sets of parameters of growing size."""

    counted: str
    sets: Sequence[ParameterSet]
    size: Callable[[ParameterSet], int]

    @property
    def sizes(self) -> list[int]:
        """How many there are of what is counted, per set."""
        return [self.size(s) for s in self.sets]


def si(x: float) -> str:
    """A number to two places, with a prefix where it is long."""
    for factor, prefix in ((1e6, " M"), (1e3, " k")):
        if x >= 0.999 * factor:
            return f"{float(f'{x / factor:.2g}'):g}{prefix}"
    return f"{x:g}"


def small_tensors(count: int) -> ParameterSet:
    """Tensors whose elements cost next to nothing."""
    return ParameterSet(si(count), [(64,)] * count, ROUNDS)


def perceptron(elements: float) -> ParameterSet:
    """The perceptron of `benchmarks.step`, all of its layers made wider by one factor: as nearly so many elements as it can."""
    shapes = SETS["mlp"].shapes
    matrices, biases = (sum([math.prod(s) for s in shapes if len(s) == d]) for d in (2, 1))
    factor = (math.sqrt(biases**2 + 4 * matrices * elements) - biases) / (2 * matrices)  # matrices f² + biases f = elements

    def wider(shape: Shape) -> Shape:
        return tuple([max(1, round(factor * n)) for n in shape])

    return ParameterSet(si(elements), [wider(shape) for shape in shapes], ROUNDS)


COUNTS = (10, 30, 100, 300, 1000, 3000, 10000)
SWEEPS = {
    "tensors": Sweep("tensor", [small_tensors(n) for n in COUNTS], size=lambda s: len(s.shapes)),
    "elements": Sweep("element", [perceptron(10 ** (n / 2)) for n in range(8, 16)], size=lambda s: s.parameters),
}


# ------------------------------------------------------------------------------------------------------------ measurement


@dataclass(frozen=True)
class Curve:
    """One mode of an algorithm at all sizes of a sweep; or the floor under all modes."""

    sweep: str
    algorithm: str
    mode: str
    sizes: list[int]
    rounds: list[int]
    median_ms: list[float]
    iqr_ms: list[float]

    @property
    def each_ns(self) -> list[float]:
        """The time of a step divided by the size."""
        return [1e6 * ms / size for size, ms in zip(self.sizes, self.median_ms)]

    @property
    def slope(self) -> float:
        """By how many decades the time grows per decade of size, over the upper ones."""
        least = max(self.sizes) / 10 ** (DECADES + 0.1)  # a little less: sizes are rounded
        points = [(math.log(size), math.log(ms)) for size, ms in zip(self.sizes, self.median_ms) if size >= least]
        return linear_regression(*zip(*points)).slope


def curves(name: str, algorithm: Algorithm, rounds: int | None) -> list[Curve]:
    """Measure the modes of an algorithm in a sweep."""
    sweep = SWEEPS[name]
    modes = [mode for mode in MODES_SHOWN if MODES[mode].factory(algorithm)]
    found = [Curve(name, algorithm.name, mode, sweep.sizes, [], [], []) for mode in [*modes, FLOOR]]
    for parameter_set in sweep.sets:
        label = f"{algorithm.name}, {parameter_set.name} {name}"
        milliseconds, floor = compare(algorithm, parameter_set, modes, rounds, label)
        release()
        for curve in found:
            times = milliseconds.get(curve.mode)
            curve.rounds.append(len(milliseconds[COPY]))
            curve.median_ms.append(floor[0] if times is None else median(times))
            curve.iqr_ms.append(floor[1] if times is None else spread(times))
    return found


def compare(
    algorithm: Algorithm, parameter_set: ParameterSet, modes: Sequence[str], rounds: int | None, label: str
) -> tuple[dict[str, list[float]], tuple[float, float]]:
    """The milliseconds of every mode and of the traffic in every round; median and interquartile range of the floor."""
    params, grads = parameter_set.draw(seed=0), parameter_set.draw(seed=1)
    given = clones(grads)
    runs = {mode: MODES[mode].start(algorithm, clones(params), grads) for mode in modes}
    traffic = Traffic(algorithm.traffic(grads))
    steps = {mode: run.step for mode, run in runs.items()} | {COPY: traffic.copy, UPDATE: traffic.update}
    milliseconds = measure(steps, rounds or parameter_set.rounds, None if rounds else SECONDS, label)
    check(algorithm, runs, params, grads, given)
    floor = traffic.floor(milliseconds[COPY], milliseconds[UPDATE])
    return milliseconds, (floor.median_ms, floor.iqr_ms)


@dataclass(frozen=True)
class FirstStep:
    """How long a new process waits for its first step."""

    algorithm: str
    mode: str
    tensors: int
    seconds: float


def first_step(key: str, tensors: int) -> FirstStep:
    """Take it in a new process, because this one may have loaded and compiled something already."""
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache,
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process,
    ):
        return process.submit(first_step_here, key, tensors, cache).result()


def first_step_here(key: str, tensors: int, cache: str) -> FirstStep:
    """Take it in this process, with this folder for what the compiler keeps."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
    algorithm, parameter_set = ALGORITHMS[key], small_tensors(tensors)
    run = MODES[WRAPPER_COMPILED].start(algorithm, parameter_set.draw(seed=0), parameter_set.draw(seed=1))
    return FirstStep(algorithm.name, WRAPPER_COMPILED, tensors, timed(run.step) / 1e3)


# ----------------------------------------------------------------------------------------------------------------- output


def duration(ns: float) -> str:
    """Nanoseconds, in a unit that fits them."""
    for factor, unit in ((1e9, "s"), (1e6, "ms"), (1e3, "µs"), (1.0, "ns")):
        if ns >= 0.995 * factor:
            return f"{float(f'{ns / factor:.2g}'):g} {unit}"
    return f"{float(f'{1e3 * ns:.2g}'):g} ps"


def show(name: str, found: Sequence[Curve], firsts: Sequence[FirstStep]) -> str:
    """The table of a sweep under a line that says what it is of."""
    sweep = SWEEPS[name]
    counts = sorted({first.tensors for first in firsts}) if name == "tensors" else []
    header = ["algorithm, mode", *[s.name for s in sweep.sets], "slope", *[f"first step of {n}, s" for n in counts]]
    lines = []
    for c in found:
        seconds = {f.tensors: f.seconds for f in firsts if (f.algorithm, f.mode) == (c.algorithm, c.mode)}
        each = [f"{ns:.0f}" if ns >= 100 else f"{ns:.3g}" for ns in c.each_ns]
        first = [f"{seconds[n]:.1f}" if n in seconds else "" for n in counts]
        lines.append([f"{c.algorithm}, {c.mode}", *each, f"{c.slope:.2f}", *first])
    shapes = "of 64 elements" if name == "tensors" else "in the 6 tensors of a perceptron"
    rounds = " to ".join(map(str, sorted({extreme(n for c in found for n in c.rounds) for extreme in (min, max)})))
    title = f"Nanoseconds per {sweep.counted}, by the number of {name} {shapes}; {rounds} rounds"
    return f"{title}\n\n{render(header, lines)}\n"


LABELS = {
    "torch default": "torch.optim",
    "torch fused": "torch.optim, fused",
    "wrapper": "purestep.optim",
    "donated": "Transform.step, donated",
    WRAPPER_COMPILED: "purestep.optim, compiled",
    FLOOR: "floor",
}
STYLES: dict[str, dict[str, Any]] = {
    "torch default": {"color": "#8c8c8c", "marker": "o"},
    "torch fused": {"color": "#333333", "marker": "s"},
    "wrapper": {"color": "#d62728", "marker": "o"},
    "donated": {"color": "#f28e2b", "marker": "D", "linestyle": (0, (4, 1.5))},  # often hides the wrapper
    WRAPPER_COMPILED: {"color": "#1f77b4", "marker": "^"},
    FLOOR: {"color": "#333333", "linestyle": (0, (1, 1.2)), "linewidth": 1.3},
}
LABEL_HEIGHT, HIGHEST_LABEL = 0.055, 0.92  # in heights of a panel
TEXT_LENGTH, CLEARANCE = 5.8, 12  # of a letter on a guide, and around the text there, in pixels


def draw(found: Sequence[Curve], path: Path) -> None:
    """A panel for each sweep and algorithm; those of a sweep have the same scales."""
    matplotlib.use("Agg")  # draws into a file, so it also works where there is no screen
    import matplotlib.pyplot as plt

    algorithms = list(dict.fromkeys([c.algorithm for c in found]))
    size = (13, 4.6 * len(algorithms))
    figure, grid = plt.subplots(len(algorithms), len(SWEEPS), figsize=size, sharex="col", sharey="col", layout="constrained")
    panels: list[tuple[Any, Sweep, list[float]]] = []
    for column, (name, sweep) in zip(grid.T, SWEEPS.items()):
        shown = [c for c in found if c.sweep == name and (name, c.mode) != ("tensors", FLOOR)]  # there it is next to nothing
        times = [ns for c in shown for ns in step_ns(c)]
        column[0].set(xscale="log", yscale="log", xlim=(sweep.sizes[0] / 1.4, sweep.sizes[-1] * 1.4))
        column[0].set_ylim(min(times) / 1.5, max(times) * 1.5)
        column[0].xaxis.set_major_formatter(lambda x, _: si(x))
        column[0].yaxis.set_major_formatter(lambda x, _: duration(x))
        column[-1].set_xlabel("tensors of 64 elements" if name == "tensors" else "elements in the 6 tensors of a perceptron")
        for axes, algorithm in zip(column, algorithms):
            axes.set_title(f"{algorithm}: time of a step by the number of {name}", loc="left", fontsize=11)
            panel(axes, sweep, [c for c in shown if c.algorithm == algorithm])
        panels += [(axes, sweep, [ns for c in shown for ns in c.each_ns]) for axes in column]
    figure.draw_without_rendering()  # from here on it is known how steep a line is in the picture
    for axes, sweep, costs in panels:
        guides(axes, sweep, min(costs), max(costs))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def step_ns(curve: Curve) -> list[float]:
    """The time of a step, in the picture's unit."""
    return [1e6 * ms for ms in curve.median_ms]


def panel(axes: Any, sweep: Sweep, found: Sequence[Curve]) -> None:
    """The curves of one algorithm, with labels at their ends, which also say what one tensor or element costs there."""
    for c in found:
        axes.plot(c.sizes, step_ns(c), **{"markersize": 4, "linewidth": 1.7, **STYLES[c.mode]})
    low, high = map(math.log, axes.get_ylim())
    heights = apart([(math.log(step_ns(c)[-1]) - low) / (high - low) for c in found])
    for c, height in zip(found, heights):
        axes.annotate(
            f"{LABELS[c.mode]}: {duration(c.each_ns[-1])}",
            xy=(sweep.sizes[-1], step_ns(c)[-1]),
            xytext=(1.06, height),
            textcoords="axes fraction",
            va="center",
            fontsize=9,
            color=STYLES[c.mode]["color"],
            arrowprops={
                "arrowstyle": "-",
                "color": STYLES[c.mode]["color"],
                "linewidth": 0.6,
                "relpos": (0, 0.5),
                "shrinkA": 0,
                "shrinkB": 4,
            },
        )
    text = f"per {sweep.counted}, at {sweep.sets[-1].name}"
    axes.text(1.06, max(heights) + 1.1 * LABEL_HEIGHT, text, transform=axes.transAxes, va="center", fontsize=9, style="italic")
    axes.spines[["top", "right"]].set_visible(False)
    axes.minorticks_off()
    axes.tick_params(labelbottom=True)


def apart(heights: Sequence[float]) -> list[float]:
    """Heights near these at which labels do not overlap."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    found = [heights[i] for i in order]
    for _ in range(200):
        for i, (a, b) in enumerate(pairwise(found)):
            push = max(0.0, LABEL_HEIGHT - (b - a)) / 2
            found[i : i + 2] = a - push, b + push
    down = max(0.0, found[-1] - HIGHEST_LABEL)
    return [height - down for _, height in sorted(zip(order, found))]


def guides(axes: Any, sweep: Sweep, cheapest: float, dearest: float) -> None:
    """Lines of constant time per tensor or element: where a curve runs along one of them, its cost is linear."""
    drawn = [axes.transData.transform(line.get_xydata()) for line in axes.get_lines()]
    points = [p + t * (q - p) for curve in drawn for p, q in pairwise(curve) for t in (0.0, 0.25, 0.5, 0.75, 1.0)]
    corners = axes.transData.transform(list(zip(axes.get_xlim(), axes.get_ylim())))
    for exponent in range(math.floor(math.log10(cheapest)), math.ceil(math.log10(dearest)) + 1):
        ns = 10.0**exponent
        line = [(x, ns * x) for x in axes.get_xlim()]
        p, q = axes.transData.transform(line)
        axes.plot(*zip(*line), color="#d9d9d9", linewidth=0.8, zorder=0, scalex=False, scaley=False)
        text = f"{duration(ns)} per {sweep.counted}"
        half = 0.5 * TEXT_LENGTH * len(text) * (q - p) / math.dist(p, q)

        def room(middle: Any, half: Any = half) -> float:
            """How far a text here stays away from the curves and from the edges."""
            begin, end = middle - half, middle + half
            edges = min([*(begin - corners[0]), *(corners[1] - end)])
            return min(edges, *[math.dist(x, point) for x in (begin, middle, end) for point in points])

        middle = max([p + k / 100 * (q - p) for k in range(101)], key=room)
        if room(middle) > CLEARANCE:
            axes.annotate(
                text,
                xy=axes.transData.inverted().transform(middle),
                rotation=math.degrees(math.atan2(*(q - p)[::-1])),
                rotation_mode="anchor",
                ha="center",
                va="bottom",
                fontsize=7.5,
                color="#a0a0a0",
                zorder=0,
            )


def arguments() -> argparse.Namespace:
    """The command line."""
    text = "How the time of a step grows with the number of tensors and of elements."
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=text)
    text = f"steps that are timed of each mode; by default {ROUNDS}, or as many as all modes take in {SECONDS:g} seconds"
    parser.add_argument("--rounds", type=positive, metavar="N", help=text)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all of it, and facts about the machine, to this file")
    parser.add_argument("--out", type=Path, default=PICTURE, metavar="FILE", help=f"the picture, {PICTURE} by default")
    options = parser.parse_args()
    if matplotlib is not None and not options.out.parent.is_dir():
        parser.error(f"There is no folder {options.out.parent} for the picture.")
    return options


def main() -> None:
    """Measure, print, draw, write."""
    options = arguments()
    if options.json:
        options.json.touch()  # a path that cannot be written is better known now than in a few minutes
    facts = machine()
    print(", ".join(f"{name} {value}" for name, value in facts.items()), end="\n\n")
    if matplotlib is None:
        print("matplotlib is not installed, and there will be no picture.\n")
    firsts = [first_step(key, tensors) for key in ALGORITHMS_SHOWN for tensors in FIRST_STEPS]
    found: list[Curve] = []
    for name in SWEEPS:
        of_sweep = [curve for key in ALGORITHMS_SHOWN for curve in curves(name, ALGORITHMS[key], options.rounds)]
        print(show(name, of_sweep, firsts), flush=True)
        found += of_sweep
    if options.json:
        results = {
            "machine": facts,
            "curves": [asdict(curve) | {"each_ns": curve.each_ns, "slope": curve.slope} for curve in found],
            "first_steps": [asdict(first) for first in firsts],
        }
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    if matplotlib is not None:
        draw(found, options.out)


if __name__ == "__main__":
    main()
