"""Schedules made of values and of other schedules."""

from __future__ import annotations

import math
from typing import Annotated, Any, TypeAlias

from purestep._core.hyper import Boundaries, Hyper, Whole
from purestep._core.maths import maximum, minimum, where
from purestep._core.values import at
from purestep.schedules.common import Shape, declared, through

LaterBoundaries: TypeAlias = Annotated[tuple[int, ...], Whole(low=1, rising=True)]


def _too_few(boundaries: tuple[int, ...], **parts: Any) -> str | None:
    name = "schedules" if "schedules" in parts else "values"
    count = len(parts[name])
    if count == len(boundaries) + 1:
        return None
    return f"there must be one more of {name} than of boundaries, but got {count} and {len(boundaries)}"


@declared(_too_few)
def piecewise_constant(step: Any, values: tuple[Hyper, ...], boundaries: Boundaries) -> Any:
    r"""One value until the first boundary, another from it on, and so on.

    .. math:: \eta_t = \eta_i \quad \text{where} \quad b_i \le t < b_{i+1}, \qquad b_0 = 0

    The values of `torch.optim.lr_scheduler.MultiStepLR` and of optax's `piecewise_constant_schedule`, which both are given
    the factors from each to the next.

    Args:
        values: :math:`\eta_0, \eta_1, \dots, \eta_n`.
        boundaries: :math:`b_1 < \dots < b_n`, the steps at which the value changes.

    >>> [piecewise_constant((1.0, 0.1, 0.01), boundaries=(2, 4))(t) for t in range(6)]
    [1.0, 1.0, 0.1, 0.1, 0.01, 0.01]
    """
    found = at(values[0], step)
    for boundary, value in zip(boundaries, values[1:]):
        found = where(step < boundary, found, at(value, step))
    return found


@declared(_too_few)
def piecewise_interpolate(step: Any, values: tuple[Hyper, ...], boundaries: LaterBoundaries, *, shape: Shape = "linear") -> Any:
    r"""From each value to the next, which is reached at its boundary, along straight lines or half cosines; then constant.

    .. math::
        \eta_t = \eta_i + (\eta_{i+1} - \eta_i)\, f\Bigl(\frac{t - b_i}{b_{i+1} - b_i}\Bigr)
        \quad \text{where} \quad b_i \le t < b_{i+1}, \qquad b_0 = 0

    with :math:`f(x) = x` or :math:`f(x) = \tfrac12 (1 - \cos \pi x)`. The values of optax's
    `piecewise_interpolate_schedule`, which is given the factors from each to the next.

    Args:
        values: :math:`\eta_0, \eta_1, \dots, \eta_n`.
        boundaries: :math:`0 < b_1 < \dots < b_n`, the steps at which :math:`\eta_1, \dots, \eta_n` are reached.
        shape: `"linear"` or `"cosine"`.

    >>> [piecewise_interpolate((0.0, 1.0, 0.5), boundaries=(2, 6))(t) for t in (0, 1, 2, 4, 6, 8)]
    [0.0, 0.5, 1.0, 0.75, 0.5, 0.5]
    """
    return through(shape, (0, *boundaries), [at(value, step) for value in values], step)


@declared(_too_few)
def join(step: Any, schedules: tuple[Hyper, ...], boundaries: Boundaries) -> Any:
    r"""One schedule after the other; each begins at its boundary, and is given the number of steps since.

    .. math:: \eta_t = s_i(t - b_i) \quad \text{where} \quad b_i \le t < b_{i+1}, \qquad b_0 = 0

    The values of optax's `join_schedules` and of `torch.optim.lr_scheduler.SequentialLR`. Each schedule is only called with
    steps of its own time. (`piecewise_constant` takes schedules that share one count.)

    Args:
        schedules: :math:`s_0, s_1, \dots, s_n`: schedules, functions of the step, or numbers.
        boundaries: :math:`b_1 < \dots < b_n`, the steps at which the next one begins.

    >>> from purestep.schedules import exponential, linear
    >>> both = join((linear(0.0, 1.0, total_steps=2), exponential(1.0, gamma=0.5)), boundaries=(2,))
    >>> [both(t) for t in range(6)]
    [0.0, 0.5, 1.0, 0.5, 0.25, 0.125]
    """
    found: Any = None
    for part, begin, end in zip(schedules, (0, *boundaries), (*boundaries, math.inf)):
        value = at(part, minimum(maximum(step - begin, 0), max(end - begin - 1, 0)))
        found = value if begin == 0 else where(step < begin, found, value)
    return found


@declared()
def scale(step: Any, schedule: Hyper, factor: Hyper) -> Any:
    r"""A schedule times a number, or times another schedule: :math:`\eta_t = s_t f_t`.

    Args:
        schedule: :math:`s`, a schedule, any function of the step, or a number.
        factor: :math:`f`, a number or another schedule.

    >>> from purestep.schedules import cosine, exponential
    >>> half = scale(exponential(1.0, gamma=0.5), 0.5)
    >>> [half(t) for t in range(3)]
    [0.5, 0.25, 0.125]
    >>> half
    scale(exponential(1.0, gamma=0.5, step_size=1, staircase=False, end=None), 0.5)
    >>> half.replace(factor=cosine(1.0, total_steps=2))(1)
    0.25
    """
    return schedule * factor
