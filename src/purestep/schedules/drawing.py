"""A picture of schedules."""

from __future__ import annotations

import importlib
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from purestep._core.values import show


def plot(*schedules: Callable[[Any], Any], steps: int, labels: Sequence[str] | None = None, axes: Any = None) -> Any:
    """Draw schedules over the first `steps` updates, with matplotlib.

    >>> from purestep.schedules import cosine, linear
    >>> axes = plot(cosine(1.0, total_steps=80), linear(1.0, 0.1, total_steps=80), steps=100)
    >>> [text.get_text() for text in axes.get_legend().get_texts()]
    ['cosine(1.0, total_steps=80, end=0.0, periodic=False)', 'linear(1.0, 0.1, total_steps=80)']

    Args:
        schedules: schedules, or any functions of the step.
        steps: how many updates.
        labels: one for each; by default what it prints as.
        axes: the `matplotlib.axes.Axes` to draw on; by default new ones.

    Returns:
        The axes, to go on with: `axes.set_yscale("log")`, `axes.figure.savefig("schedules.png")`.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there are not as many labels as schedules.
    """
    names = [textwrap.fill(show(s), 110) for s in schedules] if labels is None else labels
    if len(names) != len(schedules):
        raise ValueError(f"plot: there must be one label for each schedule, but got {len(names)} for {len(schedules)}.")
    if axes is None:
        try:
            pyplot = importlib.import_module("matplotlib.pyplot")
        except ImportError as error:
            raise ImportError("schedules.plot draws with matplotlib, which is not installed: pip install matplotlib") from error
        axes = pyplot.subplots(figsize=(9, 4 + 0.2 * "\n".join(names).count("\n")), layout="constrained")[1]
    for s, name in zip(schedules, names):
        values = [x.detach().tolist() if isinstance(x, Tensor) else x for x in map(s, range(steps))]
        axes.plot(range(steps), values, label=name)
    axes.set_xlabel("step")
    axes.set_ylabel("value")
    axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False)
    return axes
