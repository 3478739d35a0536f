"""Schedules that rise and fall."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, TypeAlias

from torch import Tensor

from purestep._core.hyper import Hyper, NonNegative, Period, Positive, UnitInterval, Whole
from purestep._core.maths import minimum
from purestep.schedules.common import Shape, along, power, schedule, through

OptionalPeriod: TypeAlias = Annotated[int | None, Whole(low=1, optional=True)]


@schedule
def one_cycle(
    step: Any,
    peak: Hyper,
    *,
    total_steps: Period,
    pct_start: UnitInterval = 0.3,
    div_factor: Positive = 25.0,
    final_div_factor: Positive = 1e4,
    shape: Shape = "cosine",
    three_phase: bool = False,
) -> Any:
    r"""One cycle: from `peak / div_factor` up to `peak`, and down to almost nothing at the last of `total_steps` updates.

    It passes through the points

    .. math:: (0,\, \eta_0), \quad (pT - 1,\, \eta_p), \quad (T - 1,\, \eta_0 / F), \qquad \eta_0 = \eta_p / D

    along half cosines or straight lines, and is constant after the last. With `three_phase`, as in the paper, it is back at
    :math:`(2pT - 2,\, \eta_0)` before it goes on to the last. The values of `torch.optim.lr_scheduler.OneCycleLR` up to
    step :math:`T - 1`; torch's overshoots at step :math:`T`, and then refuses to go on. optax's `cosine_onecycle_schedule`
    and `linear_onecycle_schedule` have other points, and are a `piecewise_interpolate` of them.

    Args:
        peak: :math:`\eta_p`.
        total_steps: :math:`T \ge 1`.
        pct_start: :math:`p`, the part of the steps spent rising, in [0, 1].
        div_factor: :math:`D > 0`: how far below the peak it begins.
        final_div_factor: :math:`F > 0`: how far below the beginning it ends.
        shape: of each phase, `"cosine"` or `"linear"`.
        three_phase: fall as long as it rose, and then to the end.

    Momentum that cycles the other way, from 0.95 to 0.85 and back, is a second schedule:
    `one_cycle(0.85, total_steps=T, div_factor=0.85 / 0.95, final_div_factor=1.0)`.

    >>> lr = one_cycle(1.0, total_steps=11, pct_start=3 / 11, div_factor=10.0, final_div_factor=10.0, shape="linear")
    >>> [round(lr(t), 3) for t in (0, 1, 2, 6, 10)]
    [0.1, 0.55, 1.0, 0.505, 0.01]

    Reference: Smith & Topin, `Super-Convergence: Very Fast Training of Neural Networks Using Large Learning Rates
    <https://arxiv.org/abs/1708.07120>`_, 2018.
    """
    start, top, last = peak / div_factor, pct_start * total_steps - 1, total_steps - 1
    if three_phase:
        return through(shape, (0, top, 2 * top, last), (start, peak, start, start / final_div_factor), step)
    return through(shape, (0, top, last), (start, peak, start / final_div_factor), step)


@schedule
def cyclic(
    step: Any,
    start: Hyper,
    peak: Hyper,
    *,
    step_size_up: Period,
    step_size_down: OptionalPeriod = None,
    mode: Literal["triangular", "triangular2", "exp_range"] = "triangular",
    gamma: NonNegative = 1.0,
) -> Any:
    r"""Triangles between `start` and `peak`: up in `step_size_up` updates, down in `step_size_down`, and again.

    With the cycle's number :math:`c = \lfloor t / (U + D) \rfloor` and the place in it, :math:`r = t - c\,(U + D)`,

    .. math::
        \eta_t = \eta_0 + a_t\,(\eta_p - \eta_0) \min\Bigl(\frac rU, \frac{U + D - r}D\Bigr), \qquad
        a_t = \begin{cases}
            1 & \text{triangular} \\
            2^{-c} & \text{triangular2} \\
            \gamma^t & \text{exp\_range}
        \end{cases}

    The values of `torch.optim.lr_scheduler.CyclicLR`. Momentum that cycles the other way is
    `cyclic(max_momentum, base_momentum, ...)`.

    Args:
        start: :math:`\eta_0`, the value at the beginning and the end of each cycle.
        peak: :math:`\eta_p`, the value at the top of the first.
        step_size_up: :math:`U \ge 1`.
        step_size_down: :math:`D \ge 1`; the default is :math:`U`.
        mode: how the triangles' height changes: not, by half after each cycle, or by :math:`\gamma` after each update.
        gamma: :math:`\gamma \ge 0`; for `"exp_range"` only.

    >>> [cyclic(0.0, 1.0, step_size_up=2, mode="triangular2")(t) for t in range(9)]
    [0.0, 0.5, 1.0, 0.5, 0.0, 0.25, 0.5, 0.25, 0.0]

    Reference: Smith, `Cyclical Learning Rates for Training Neural Networks <https://arxiv.org/abs/1506.01186>`_, 2017.
    """
    down = step_size_up if step_size_down is None else step_size_down
    cycle = step // (step_size_up + down)
    place = step - cycle * (step_size_up + down)
    height = minimum(place / step_size_up, (step_size_up + down - place) / down)
    if mode == "triangular2":
        height = height * power(0.5, cycle)
    if mode == "exp_range":
        height = height * power(gamma, step)
    return start + (peak - start) * height


@schedule
def cosine_with_restarts(step: Any, peak: Hyper, *, cycle_steps: Period, cycle_mult: Period = 1, end: Hyper = 0.0) -> Any:
    r"""SGDR: from `peak` towards `end` along half a cosine, again and again; each cycle `cycle_mult` times as long.

    .. math:: \eta_t = \eta_e + \tfrac12 (\eta_p - \eta_e)\,\bigl(1 + \cos(\pi\, r / (T_0 m^c))\bigr)

    in cycle :math:`c = 0, 1, \dots`, :math:`r` updates after its beginning. At the end of each it is at the peak again; `end`
    itself is never reached. The values of `torch.optim.lr_scheduler.CosineAnnealingWarmRestarts`.

    Args:
        peak: :math:`\eta_p`.
        cycle_steps: :math:`T_0 \ge 1`, the length of the first cycle.
        cycle_mult: :math:`m \ge 1`, a whole number.
        end: :math:`\eta_e`.

    >>> sgdr = cosine_with_restarts(1.0, cycle_steps=2, cycle_mult=2)
    >>> [round(sgdr(t), 3) for t in range(7)]
    [1.0, 0.5, 1.0, 0.854, 0.5, 0.146, 1.0]

    Reference: Loshchilov & Hutter, `SGDR: Stochastic Gradient Descent with Warm Restarts
    <https://arxiv.org/abs/1608.03983>`_, 2017.
    """
    if cycle_mult == 1:
        return along("cosine", peak, end, step / cycle_steps - step // cycle_steps)
    # Half a step more, which no cycle begins with: the logarithm is never rounded across its end.
    cycle = _log(1 + (step // 1 + 0.5) * (cycle_mult - 1) / cycle_steps) / math.log(cycle_mult) // 1
    stretch = power(float(cycle_mult), cycle)
    begun = cycle_steps * (stretch - 1) / (cycle_mult - 1)
    return along("cosine", peak, end, (step - begun) / (cycle_steps * stretch))


def _log(x: Any) -> Any:
    return x.log() if isinstance(x, Tensor) else math.log(x)
