"""torch's schedulers, read as schedules."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, Literal

from torch.optim import lr_scheduler

from purestep._core.values import Schedule
from purestep.schedules.curves import constant, cosine, exponential, linear, polynomial
from purestep.schedules.cycles import cosine_with_restarts, cyclic, one_cycle
from purestep.schedules.pieces import join, piecewise_constant, scale


def from_torch(
    scheduler: lr_scheduler.LRScheduler, hyperparameter: Literal["lr", "momentum"] = "lr", *, group: int = 0
) -> Schedule:
    """The schedule that has the values of one of torch's schedulers.

    It is read off the scheduler's arguments, and off the learning rate which its optimizer had when it was made; how many
    steps either has taken since plays no part, and neither is changed.

    >>> import torch, purestep as ps
    >>> from torch.optim import lr_scheduler
    >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    >>> ps.schedules.from_torch(lr_scheduler.StepLR(optimizer, step_size=30, gamma=0.5))
    exponential(0.1, gamma=0.5, step_size=30, staircase=True, end=None)
    >>> warmup = lr_scheduler.LinearLR(optimizer, start_factor=0.5, total_iters=5)
    >>> ps.schedules.from_torch(
    ...     lr_scheduler.SequentialLR(optimizer, [warmup, lr_scheduler.ExponentialLR(optimizer, 0.9)], milestones=[5])
    ... )
    join((linear(0.05, 0.1, total_steps=5), exponential(0.1, gamma=0.9, step_size=1, staircase=False, end=None)), (5,))

    Args:
        scheduler: one of those in the table of the documentation.
        hyperparameter: `"lr"`, or the `"momentum"` (Adam's first beta) that a `OneCycleLR` or a `CyclicLR` cycles.
        group: the index of the optimizer's parameter group whose values these are.

    Raises:
        TypeError: the scheduler's values are not a function of the step that can be read off it: `ReduceLROnPlateau` follows
            a measured value, a `MultiplicativeLR` and a function of one's own can only be run, and in a `ChainedScheduler`
            some schedulers do not multiply the learning rate, but set it.
        ValueError: the scheduler does not cycle the momentum.
    """
    if not isinstance(scheduler, lr_scheduler.LRScheduler):
        raise TypeError(f"from_torch: the scheduler must be one of torch.optim.lr_scheduler, but got {scheduler!r}.")
    if hyperparameter == "momentum":
        return _momentum(scheduler, group)
    options = scheduler.optimizer.param_groups[group]
    return _read(scheduler, options.get("initial_lr", options["lr"]), group)


def _read(scheduler: Any, base: Any, group: int) -> Schedule:
    """A scheduler's values, if `base` was the learning rate before it."""
    name = type(scheduler).__name__
    if type(scheduler) in FACTORS:
        return FACTORS[type(scheduler)](scheduler, base)
    if type(scheduler) is lr_scheduler.ChainedScheduler:
        first, *others = scheduler._schedulers
        for s in scheduler._schedulers:
            if type(s) not in FACTORS:
                raise TypeError(
                    f"from_torch: in a ChainedScheduler {type(s).__name__} does not multiply the learning rate by a "
                    "factor, so this is no product of schedules. Say what is meant with schedules.scale or schedules.join."
                )
        found = _read(first, base, group)
        for s in others:
            found = scale(found, _read(s, 1.0, group))
        return found
    if type(scheduler) is lr_scheduler.SequentialLR:
        for s in scheduler._schedulers:
            if hasattr(s, "_schedulers"):
                raise TypeError(
                    f"from_torch: a {type(s).__name__} in a SequentialLR is stepped twice at its beginning, or not at all. "
                    "Say what is meant with schedules.scale or schedules.join."
                )
        return join(tuple(_read(s, base, group) for s in scheduler._schedulers), tuple(scheduler._milestones))
    if type(scheduler) is lr_scheduler.LambdaLR:
        return scale(scheduler.lr_lambdas[group], base)
    if type(scheduler) is lr_scheduler.CosineAnnealingLR:
        return cosine(base, total_steps=scheduler.T_max, end=scheduler.eta_min, periodic=True)
    if type(scheduler) is lr_scheduler.CosineAnnealingWarmRestarts:
        return cosine_with_restarts(base, cycle_steps=scheduler.T_0, cycle_mult=scheduler.T_mult, end=scheduler.eta_min)
    if type(scheduler) is lr_scheduler.OneCycleLR:
        options = scheduler.optimizer.param_groups[group]
        return _one_cycle(scheduler, options["initial_lr"], options["max_lr"], options["min_lr"])
    if type(scheduler) is lr_scheduler.CyclicLR:
        return _cyclic(scheduler, scheduler.base_lrs[group], scheduler.max_lrs[group])
    if type(scheduler) is lr_scheduler.ReduceLROnPlateau:
        raise TypeError(
            "from_torch: ReduceLROnPlateau follows a measured value, so it is no function of the step. "
            "As a transform it is purestep.reduce_on_plateau; torch's own drives the optimizers of purestep.optim."
        )
    if type(scheduler) is lr_scheduler.MultiplicativeLR:
        raise TypeError(
            "from_torch: MultiplicativeLR multiplies factors up from step to step, so its value is found by running it. "
            "Write their product as a function of the step: any such function is a schedule."
        )
    raise TypeError(
        f"from_torch cannot read the scheduler {name}. Any function of the step is a schedule: write its values as one."
    )


def _multistep(scheduler: Any, base: Any) -> Schedule:
    """Milestones may be repeated."""
    milestones = {k: n for k, n in sorted(scheduler.milestones.items()) if k >= 0}
    passed = itertools.accumulate(milestones.values(), initial=0)
    return piecewise_constant(tuple(base * scheduler.gamma**n for n in passed), tuple(milestones))


# With `total_iters=0` torch's never leave their first value.
FACTORS: dict[type, Callable[[Any, Any], Schedule]] = {
    lr_scheduler.StepLR: lambda s, base: exponential(base, gamma=s.gamma, step_size=s.step_size, staircase=True),
    lr_scheduler.MultiStepLR: _multistep,
    lr_scheduler.ConstantLR: lambda s, base: (
        piecewise_constant((base * s.factor, base), (s.total_iters,)) if s.total_iters else constant(base * s.factor)
    ),
    lr_scheduler.LinearLR: lambda s, base: linear(
        base * s.start_factor, base * (s.end_factor if s.total_iters else s.start_factor), total_steps=s.total_iters
    ),
    lr_scheduler.ExponentialLR: lambda s, base: exponential(base, gamma=s.gamma),
    lr_scheduler.PolynomialLR: lambda s, base: polynomial(
        base, 0.0 if s.total_iters else base, total_steps=s.total_iters, power=s.power
    ),
}
"""The schedulers that multiply the learning rate by a factor of their own, and the schedule of each."""


def _momentum(scheduler: Any, group: int) -> Schedule:
    if type(scheduler) not in (lr_scheduler.OneCycleLR, lr_scheduler.CyclicLR) or not scheduler.cycle_momentum:
        raise ValueError(
            f"from_torch: this {type(scheduler).__name__} does not cycle the momentum. Of a OneCycleLR or a CyclicLR with "
            "cycle_momentum=True it can be read."
        )
    options = scheduler.optimizer.param_groups[group]
    low, high = options["base_momentum"], options["max_momentum"]
    if type(scheduler) is lr_scheduler.OneCycleLR:
        return _one_cycle(scheduler, high, low, high)
    return _cyclic(scheduler, high, low)


def _one_cycle(scheduler: Any, start: Any, peak: Any, end: Any) -> Schedule:
    total, phases = scheduler.total_steps, scheduler._schedule_phases
    return one_cycle(
        peak, total_steps=total, pct_start=(phases[0]["end_step"] + 1) / total, div_factor=peak / start,
        final_div_factor=start / end, shape="cosine" if scheduler._anneal_func_type == "cos" else "linear",
        three_phase=len(phases) == 3,
    )  # fmt: skip


def _cyclic(scheduler: Any, start: Any, peak: Any) -> Schedule:
    if scheduler._scale_fn_custom is not None:
        raise TypeError("from_torch: this CyclicLR has a scale_fn of its own. Write its values as a function of the step.")
    up = round(scheduler.step_ratio * scheduler.total_size)
    down = round(scheduler.total_size) - up
    return cyclic(start, peak, step_size_up=up, step_size_down=down, mode=scheduler.mode, gamma=scheduler.gamma)
