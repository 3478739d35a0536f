"""Schedules: hyperparameters that change with the step.

A schedule is a function of the 0-based number of the update. It takes a Python int or a tensor and answers in kind, without
waiting for a device, so it can be traced, compiled, vmapped over, and differentiated with respect to its own
hyperparameters. Those made here are values: they print as the call that makes them, compare, pickle, and are pytrees of
their hyperparameters. Any function of the step is accepted wherever a schedule is.

>>> import purestep as ps
>>> warmup = ps.schedules.warmup_cosine(1.0, warmup_steps=2, total_steps=10)
>>> [round(warmup(step), 3) for step in (0, 1, 2, 6, 10)]
[0.0, 0.5, 1.0, 0.5, 0.0]
>>> ps.sgd(lr=warmup).hyperparams["lr"]
warmup_cosine(1.0, warmup_steps=2, total_steps=10, end=0.0, start=0.0)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, cast

from purestep.hyper import Hyper, Steps
from purestep.maths import cos, maximum, minimum, where
from purestep.value import Declaration, Schedule, factory_of

P = ParamSpec("P")


def schedule(function: Callable[Concatenate[Any, P], Any]) -> Callable[P, Schedule]:
    """Turn `function(step, ...)` into a factory of schedules.

    Parameters annotated `Hyper` are its hyperparameters, which can be differentiated and vmapped over; the others are
    structure.

    >>> @schedule
    ... def inverse_sqrt(step, peak: Hyper):
    ...     return peak * (step + 1) ** -0.5
    >>> inverse_sqrt(1.0)(3)
    0.5
    """
    return cast("Callable[P, Schedule]", factory_of(Declaration(function, given=1), _made, "Schedule"))


def _made(declaration: Declaration, arguments: dict[str, Any]) -> Schedule:
    """A schedule, if its numbers of steps go together."""
    if arguments.get("warmup_steps", 0) > arguments.get("total_steps", math.inf):
        raise ValueError(
            f"{declaration.name}: warmup_steps must be at most total_steps, which counts the warm-up, but got "
            f"{arguments['warmup_steps']} > {arguments['total_steps']}."
        )
    return Schedule(declaration, arguments)


@schedule
def constant(step: Any, value: Hyper) -> Any:
    r"""Always the same: :math:`\eta_t = \eta`.

    >>> constant(0.1)(1000)
    0.1
    """
    return value


@schedule
def linear(step: Any, start: Hyper, end: Hyper, *, total_steps: Steps) -> Any:
    r"""From `start` to `end` in a straight line over `total_steps` updates, then constant.

    .. math:: \eta_t = \eta_0 + (\eta_T - \eta_0) \min(t / T, 1)

    >>> [linear(1.0, 0.0, total_steps=4)(t) for t in (0, 1, 4, 9)]
    [1.0, 0.75, 0.0, 0.0]
    """
    return start + (end - start) * _elapsed(step, total_steps)


@schedule
def cosine(step: Any, peak: Hyper, *, total_steps: Steps, end: Hyper = 0.0) -> Any:
    r"""From `peak` to `end` along half a cosine over `total_steps` updates, then constant.

    .. math:: \eta_t = \eta_T + \tfrac12 (\eta_0 - \eta_T)\,(1 + \cos(\pi \min(t / T, 1)))

    The values of `torch.optim.lr_scheduler.CosineAnnealingLR` up to :math:`t = T`; after it, torch's rise again.

    Reference: Loshchilov & Hutter, `SGDR: Stochastic Gradient Descent with Warm Restarts
    <https://arxiv.org/abs/1608.03983>`_, 2017.

    >>> [round(cosine(1.0, total_steps=4)(t), 3) for t in (0, 1, 2, 4, 9)]
    [1.0, 0.854, 0.5, 0.0, 0.0]
    """
    return end + 0.5 * (peak - end) * (1 + cos(math.pi * _elapsed(step, total_steps)))


@schedule
def warmup_cosine(
    step: Any, peak: Hyper, *, warmup_steps: Steps, total_steps: Steps, end: Hyper = 0.0, start: Hyper = 0.0
) -> Any:
    r"""From `start` to `peak` in a straight line over `warmup_steps`, then along half a cosine to `end` at `total_steps`.

    .. math::
        \eta_t = \begin{cases}
            \eta_s + (\eta_p - \eta_s)\, t / W & t < W \\
            \eta_e + \tfrac12 (\eta_p - \eta_e)\,\bigl(1 + \cos(\pi \min(\tfrac{t - W}{T - W}, 1))\bigr) & t \ge W
        \end{cases}

    `total_steps` counts the warm-up. With the default `start` the first update has a learning rate of exactly 0; give
    `start=peak / warmup_steps` to begin one step up. The values of optax's `warmup_cosine_decay_schedule`.

    >>> [round(warmup_cosine(1.0, warmup_steps=2, total_steps=4)(t), 3) for t in range(5)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    rise = start + (peak - start) * _elapsed(step, warmup_steps)
    fallen = _elapsed(maximum(step - warmup_steps, 0), total_steps - warmup_steps)
    fall = end + 0.5 * (peak - end) * (1 + cos(math.pi * fallen))
    return where(step < warmup_steps, rise, fall)


def _elapsed(step: Any, steps: int) -> Any:
    """The fraction of `steps` that has passed, at most 1; all of it when there are none."""
    return minimum(step / steps, 1.0) if steps > 0 else 1.0
