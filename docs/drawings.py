"""The drawing of a step in `internals.md`: `python docs/drawings.py` writes `_static/step.svg`.

It is read on white and on black pages. So the background is transparent, text stands in filled boxes, and what is drawn between
the boxes has a grey that is as far from white as from black. tests/test_internals.py asks for every name in it.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

FILE = Path(__file__).parent / "_static" / "step.svg"
LINE, CACHED, TEXT = "#808890", "#c07818", "#ffffff"
PUBLIC, ENGINE, EXECUTOR, TORCH = "#1f5f8b", "#4a5560", "#2f6f4f", "#7a4a6e"


class Box(NamedTuple):
    """One stage of a step: what there is, and where it is written."""

    x: float
    y: float
    width: float
    title: str
    text: str
    colour: str
    name: str = ""
    """What is shown, as an import would name it below `purestep`."""

    def draw(self, axes: Axes) -> None:
        patch = mpl.patches.FancyBboxPatch(
            (self.x - self.width / 2, self.y - HEIGHT / 2), self.width, HEIGHT,
            boxstyle="round,pad=0,rounding_size=0.09", facecolor=self.colour, edgecolor="none",
        )  # fmt: skip
        axes.add_patch(patch)
        axes.text(self.x, self.y + 0.14, self.title, color=TEXT, ha="center", va="center", fontsize=10.5, family="monospace")
        axes.text(self.x, self.y - 0.18, self.text, color=TEXT, ha="center", va="center", fontsize=9)


HEIGHT = 0.74
BOXES = {
    "step": Box(2.2, 9.0, 3.7, "opt.step(...)", "pytrees", PUBLIC, "transform.Transform.step"),
    "optimizer": Box(7.8, 9.0, 3.7, "optimizer.step()", "param_groups and state[p]", PUBLIC,
        "_optimizer.optimizer.Optimizer.step"),
    "flatten": Box(2.2, 7.75, 3.7, "Transform._advance", "lists over the parameters", PUBLIC, "transform.Transform._advance"),
    "repeated": Box(7.8, 7.75, 3.7, "RepeatedStep", "the step cache", ENGINE, "_engine.step_cache.RepeatedStep"),
    "gather": Box(7.8, 6.5, 3.7, "Optimizer._advance", "lists over the parameters", PUBLIC,
        "_optimizer.optimizer.Optimizer._advance"),
    "inputs": Box(2.9, 6.5, 5.1, "Inputs, Env, Ownership", "the lists; the mode; what may be overwritten", ENGINE,
        "_engine.run.Inputs"),
    "run": Box(2.9, 5.25, 5.1, "Run", "stage by stage: a whole function, or leafwise transforms", ENGINE, "_engine.run.Run"),
    "task": Box(2.9, 4.0, 5.1, "Task", "a FusedChain on parameters that go together", EXECUTOR, "_executors.task.Task"),
    "execute": Box(2.9, 2.75, 5.1, "execute", "the first of EXECUTORS that takes the task", EXECUTOR,
        "_executors.task.execute"),
    "foreach": Box(1.55, 1.35, 2.4, "Program.run", "torch._foreach_*", TORCH, "_trace.program.Program"),
    "kernel": Box(4.25, 1.35, 2.4, "Kernel.run", "torch._fused_adamw_", TORCH, "_executors.chains.Kernel"),
    "result": Box(2.9, 0.1, 5.1, "Result", "counters committed; lists become trees again", EXECUTOR, "_executors.task.Result"),
}  # fmt: skip
"""The stages, by a name for the arrows between them."""


def arrow(
    axes: Axes, points: list[tuple[float, float]], label: str = "", colour: str = LINE, at: tuple[float, float] = (0, 0)
) -> None:
    """An arrow through these points, with its label beside a place."""
    axes.plot(*zip(*points[:-1]), color=colour, lw=1.6)
    style = {"arrowstyle": "-|>,head_width=0.28,head_length=0.5", "color": colour, "lw": 1.6, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", points[-1], points[-2], arrowprops=style)
    if label:
        axes.text(*at, label, color=colour, fontsize=9, va="center", ha="left", weight="bold")


def down(axes: Axes, upper: str, lower: str, label: str = "", x: float | None = None) -> None:
    """A straight arrow from one stage to the one below it."""
    a, b = BOXES[upper], BOXES[lower]
    x = (b.x if b.width <= a.width else a.x) if x is None else x
    top, bottom = a.y - HEIGHT / 2, b.y + HEIGHT / 2
    arrow(axes, [(x, top), (x, bottom)], label, at=(x + 0.12, (top + bottom) / 2))


def draw() -> None:
    """The way of a step, once as a pure function and once as an optimizer."""
    plt.rcParams |= {"svg.hashsalt": "purestep", "svg.fonttype": "path", "font.family": "DejaVu Sans"}
    figure, axes = plt.subplots(figsize=(9.6, 9.3))
    for box in BOXES.values():
        box.draw(axes)
    down(axes, "step", "flatten", "flatten")
    down(axes, "flatten", "inputs", "otherwise", x=2.2)
    down(axes, "optimizer", "repeated", "a transform for each group")
    down(axes, "repeated", "gather", "miss")
    arrow(axes, [(4.05, 7.75), (5.95, 7.75)], "guard matches,", CACHED, at=(4.15, 7.95))
    axes.text(4.15, 7.54, "donate=True", color=CACHED, fontsize=9, va="center", weight="bold")
    arrow(axes, [(5.95, 6.5), (5.45, 6.5)])
    down(axes, "inputs", "run", "run_chain")
    down(axes, "run", "task", "Sorting: one bucket, almost always")
    down(axes, "task", "execute", "run_plain")
    down(axes, "execute", "foreach", "foreach")
    down(axes, "execute", "kernel", "fused")
    down(axes, "foreach", "result", x=1.55)
    down(axes, "kernel", "result", x=4.25)
    arrow(
        axes,
        [(9.65, 7.75), (9.9, 7.75), (9.9, 2.75), (5.45, 2.75)],
        "hit: the executor of the last step",
        CACHED,
        at=(5.75, 2.95),
    )
    arrow(axes, [(9.9, 2.75), (9.9, 1.35), (5.45, 1.35)], "hit: the kernel that ran the last step", CACHED, at=(5.75, 1.55))
    axes.set(xlim=(0.3, 10.0), ylim=(-0.35, 9.45))
    axes.set_aspect("equal")
    axes.axis("off")
    figure.savefig(FILE, transparent=True, bbox_inches="tight", pad_inches=0.05, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    draw()
