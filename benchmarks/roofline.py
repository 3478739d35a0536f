"""How near to the speed of memory a step comes: a picture of what `benchmarks.step` has measured.

    python -m benchmarks.step --algorithms everything --json step.json
    python -m benchmarks.roofline step.json
    python -m benchmarks.roofline step.json --out roofline.png --modes "torch fused" "wrapper compiled"

The *achieved bandwidth* of a step is the bytes that it has to move, each once, over the median of its time. The *roof* is
the speed of a plain copy, or of a plain addition in place where that is faster, measured in turns with the steps: what the
tables call the floor of the time. Tensors that fit into the caches have a higher roof than those that do not.

Every point is an algorithm or a chain on one set of parameters; a bar is their median. A panel has those that its mode
exists for: torch has fused kernels for four algorithms, so means of different panels are not of the same things. A point
under the roof moves bytes more often than it has to, or spends its time on something else: on many small tensors on what
each of them costs. Muon is left out: its time goes into matrix products, and memory is not its limit.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean, median, quantiles
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.modes import CHAINS, MODES, PURESTEP, SETS

PICTURE = Path(__file__).parents[1] / "docs" / "_static" / "roofline.png"
USUAL = (
    "torch default",
    "torch foreach",
    "torch fused",
    "torchopt",
    "wrapper",
    "wrapper compiled",
    "donated compiled",
    "pure",
)
COLUMNS = 4
OURS, THEIRS, INK, FAINT = "#0b6e99", "#c2622d", "#222222", "#8a8a8a"
ABOVE, BELOW = 1.0, 0.9  # inches around the panels
SPREAD = 0.56  # of a set's width, over which its points are spread out
COMPUTING = {"Muon", "Muon and AdamW"}  # whose time goes into matrix products


@dataclass(frozen=True)
class Point:
    """One mode of one table."""

    subject: str
    parameter_set: str
    mode: str
    speed: float  # GB/s that had to be moved
    share: float  # of the roof


def points(run: Mapping[str, Any]) -> list[Point]:
    """All that a run has measured, but for what computes more than it moves."""
    return [
        Point(
            table["algorithm"],
            table["parameter_set"],
            row["mode"],
            speed=table["floor"]["bytes"] / row["median_ms"] / 1e6,
            share=table["floor"]["median_ms"] / row["median_ms"],
        )
        for table in run["tables"]
        if table["algorithm"] not in COMPUTING
        for row in table["rows"]
    ]


def roofs(run: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
    """The roof over each set in GB/s: the quartiles of its tables, the median between them."""
    speeds: dict[str, list[float]] = {}
    for table in run["tables"]:
        floor = table["floor"]
        speeds.setdefault(table["parameter_set"], []).append(max(floor["copy_speed"], floor["update_speed"]))
    found = {name: speeds[name] * 2 if len(speeds[name]) == 1 else speeds[name] for name in SETS if name in speeds}
    return {name: tuple(quantiles(each, n=4, method="inclusive")) for name, each in found.items()}


def draw(run: Mapping[str, Any], modes: Sequence[str]) -> Figure:
    """A panel for each mode, with the sets of parameters from left to right."""
    found, roof = points(run), roofs(run)
    sets = [name for name in SETS if name in roof]
    modes = [mode for mode in modes if any(point.mode == mode for point in found)]
    if not modes:
        raise SystemExit("The file has none of these modes.")
    columns = min(COLUMNS, len(modes))
    lines = -(-len(modes) // columns)
    width, height = max(8.4, 0.9 + columns * (0.3 + 0.5 * len(sets))), ABOVE + BELOW + 2.5 * lines
    figure, axes = plt.subplots(lines, columns, figsize=(width, height), sharex=True, sharey=True, squeeze=False)
    figure.subplots_adjust(
        left=0.75 / width, right=1 - 0.1 / width, top=1 - ABOVE / height, bottom=BELOW / height, wspace=0.06, hspace=0.2
    )
    for panel, mode in zip(axes.flat, modes):
        draw_mode(panel, mode, [point for point in found if point.mode == mode], roof, sets)
    for panel in axes.flat[len(modes) :]:
        panel.set_visible(False)
    first = axes[0, 0]
    speeds = [point.speed for point in found if point.mode in modes]
    first.set_yscale("log")
    first.set_ylim(min(speeds) / 1.5, 2.4 * max(*speeds, *[most for _, _, most in roof.values()]))
    first.yaxis.set_major_formatter(lambda value, position: f"{value:g}")
    for panel in axes[:, 0]:
        panel.set_ylabel("achieved bandwidth, GB/s", color=INK)
    facts = run["machine"]
    title = "The bandwidth that an optimizer step achieves, and the roof that memory sets"
    machine = f"{facts.get('gpu', facts['cpu'])}, threads: {facts['threads']}, torch {facts['torch']}, {facts['date'][:10]}"
    percentages = "Percentages: of the roof, geometric mean."
    note = f"{machine}\n{percentages} Each panel has what its mode exists for. Without Muon (matrix products)."
    margin = 0.12 / width
    figure.text(margin, 1 - 0.34 / height, title, fontsize=13, fontweight="bold", color=INK)
    figure.text(margin, 0.1 / height, note, fontsize=8, color=FAINT)
    handles = [
        Line2D(
            [],
            [],
            color=INK,
            linewidth=2,
            label="the roof: copying, or adding in place where that is faster (shaded: quartiles)",
        ),
        Line2D([], [], color=FAINT, marker="o", linestyle="", markersize=4, label="an algorithm"),
        Line2D([], [], color=FAINT, marker="D", linestyle="", markersize=3.6, label="a chain"),
        Line2D([], [], color=FAINT, linewidth=2.5, label="median"),
    ]
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(margin, 1 - 0.4 / height),
        borderaxespad=0,
        borderpad=0.2,
        ncols=len(handles),
        frameon=False,
        fontsize=8.5,
    )
    return figure


def draw_mode(
    panel: Axes, mode: str, found: Sequence[Point], roof: Mapping[str, tuple[float, ...]], sets: Sequence[str]
) -> None:
    """The points of one mode under the roof."""
    color = OURS if mode in PURESTEP else THEIRS
    names = sorted({point.subject for point in found})
    top = panel.get_xaxis_transform()
    chains = {chain.name for chain in CHAINS.values()}
    for i, name in enumerate(sets):
        least, usual, most = roof[name]
        panel.fill_between([i - 0.42, i + 0.42], least, most, color=INK, alpha=0.13, linewidth=0)
        panel.hlines(usual, i - 0.42, i + 0.42, color=INK, linewidth=2)
        here = [point for point in found if point.parameter_set == name]
        for point in here:
            place = i + SPREAD * ((names.index(point.subject) + 0.5) / len(names) - 0.5)
            panel.plot(
                place,
                point.speed,
                marker="D" if point.subject in chains else "o",
                markersize=3.6 if point.subject in chains else 4.2,
                color=color,
                alpha=0.75,
                markeredgewidth=0,
                linestyle="",
            )
        if here:
            panel.hlines(median([point.speed for point in here]), i - 0.34, i + 0.34, color=color, linewidth=2.5)
            share = geometric_mean([point.share for point in here])
            panel.text(i, 0.98, f"{100 * share:.0f} %", transform=top, ha="center", va="top", fontsize=8.5, color=color)
    panel.set_title(mode, loc="left", fontsize=10.5, color=color, fontweight="bold")
    panel.set_xticks(range(len(sets)), [f"{name}\n{SETS[name].parameters / 1e6:.2g} M" for name in sets])
    panel.set_xlim(-0.55, len(sets) - 0.45)
    panel.tick_params(which="both", length=0, labelsize=8.5, colors=INK)
    panel.grid(axis="y", color="#e4e4e4", linewidth=0.7)
    panel.set_axisbelow(True)
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.spines["bottom"].set_color(FAINT)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.roofline", description="A picture of how near to the speed of memory a step comes."
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="what benchmarks.step has written")
    parser.add_argument("--out", type=Path, default=PICTURE, metavar="PNG", help=f"the picture; by default {PICTURE}")
    text = f"the panels, of {', '.join(map(repr, MODES))}; by default {', '.join(map(repr, USUAL))}"
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(USUAL), metavar="NAME", help=text)
    return parser.parse_args()


def main() -> None:
    """Read, draw, write."""
    options = arguments()
    draw(json.loads(options.file.read_text()), options.modes).savefig(options.out, dpi=160)
    print(f"Written to {options.out}")


if __name__ == "__main__":
    main()
