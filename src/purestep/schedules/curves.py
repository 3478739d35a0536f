"""Schedules that go from one value to another, with a warm-up or without."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from purestep._core.hyper import Hyper, Interval, NonNegative, Period, Positive, Steps
from purestep._core.maths import maximum, minimum, root, where
from purestep.schedules.common import along, declared, elapsed, power, schedule

Bound: TypeAlias = Annotated[Any, Interval(optional=True)]
Timescale: TypeAlias = Annotated[Any, Interval(low=0.0, above=True, optional=True)]


@schedule
def constant(step: Any, value: Hyper) -> Any:
    r"""Always the same: :math:`\eta_t = \eta`.

    Args:
        value: :math:`\eta`.

    >>> constant(0.1)(1000)
    0.1
    """
    return value


@schedule
def linear(step: Any, start: Hyper, end: Hyper, *, total_steps: Steps) -> Any:
    r"""From `start` to `end` in a straight line over `total_steps` updates, then constant.

    .. math:: \eta_t = \eta_0 + (\eta_T - \eta_0) \min(t / T, 1)

    Args:
        start: :math:`\eta_0`.
        end: :math:`\eta_T`.
        total_steps: :math:`T`, a number of updates. With 0 it is `end` from the beginning.

    >>> [linear(1.0, 0.0, total_steps=4)(t) for t in (0, 1, 4, 9)]
    [1.0, 0.75, 0.0, 0.0]
    """
    return along("linear", start, end, elapsed(step, total_steps))


@schedule
def polynomial(step: Any, start: Hyper, end: Hyper, *, total_steps: Steps, power: Positive = 1.0) -> Any:
    r"""From `start` to `end` over `total_steps` updates, as a power of the fraction that remains, then constant.

    .. math:: \eta_t = \eta_T + (\eta_0 - \eta_T) \bigl(1 - \min(t / T, 1)\bigr)^k

    The values of optax's `polynomial_schedule`, and with `end=0` of `torch.optim.lr_scheduler.PolynomialLR`.

    Args:
        start: :math:`\eta_0`.
        end: :math:`\eta_T`.
        total_steps: :math:`T`.
        power: :math:`k > 0`. At 1 it is a straight line; the larger it is, the steeper the beginning and the flatter the end.

    >>> [polynomial(1.0, 0.0, total_steps=4, power=2.0)(t) for t in range(5)]
    [1.0, 0.5625, 0.25, 0.0625, 0.0]
    """
    return end + (start - end) * (1 - elapsed(step, total_steps)) ** power


@schedule
def exponential(
    step: Any, start: Hyper, *, gamma: NonNegative, step_size: Period = 1, staircase: bool = False, end: Bound = None
) -> Any:
    r"""Times `gamma` with every `step_size` updates: a little at each of them, or all at once.

    .. math:: \eta_t = \eta_0\, \gamma^{t / k}, \qquad \text{or with a staircase} \quad \eta_0\, \gamma^{\lfloor t / k \rfloor}

    The values of optax's `exponential_decay`, of `torch.optim.lr_scheduler.ExponentialLR`, and with a staircase of
    `torch.optim.lr_scheduler.StepLR`.

    Args:
        start: :math:`\eta_0`.
        gamma: :math:`\gamma \ge 0`; above 1 the values grow.
        step_size: :math:`k \ge 1`.
        staircase: change at multiples of `step_size` only.
        end: if given, the value stays there once it is reached: a lower bound for :math:`\gamma < 1`, else an upper one.

    >>> [exponential(1.0, gamma=0.5, step_size=2, staircase=True)(t) for t in range(5)]
    [1.0, 1.0, 0.5, 0.5, 0.25]
    >>> [exponential(1.0, gamma=0.5, end=0.2)(t) for t in range(5)]
    [1.0, 0.5, 0.25, 0.2, 0.2]
    """
    value = start * power(gamma, step // step_size if staircase else step / step_size)
    return value if end is None else where(gamma < 1, maximum(value, end), minimum(value, end))


def _no_period(total_steps: int, periodic: bool, **others: Any) -> str | None:
    return "total_steps must be at least 1 if periodic, but got 0" if periodic and total_steps == 0 else None


@declared(_no_period)
def cosine(step: Any, peak: Hyper, *, total_steps: Steps, end: Hyper = 0.0, periodic: bool = False) -> Any:
    r"""From `peak` to `end` along half a cosine over `total_steps` updates, then constant.

    .. math:: \eta_t = \eta_T + \tfrac12 (\eta_0 - \eta_T)\,(1 + \cos(\pi \min(t / T, 1)))

    The values of `torch.optim.lr_scheduler.CosineAnnealingLR` up to :math:`t = T`. After it torch's rise again along the
    cosine, and fall, and so on; so do these if `periodic`.

    Args:
        peak: :math:`\eta_0`.
        end: :math:`\eta_T`.
        total_steps: :math:`T`, a number of updates.
        periodic: rise again after :math:`T`, back to `peak` at :math:`2T`, and so on.

    Reference: Loshchilov & Hutter, `SGDR: Stochastic Gradient Descent with Warm Restarts
    <https://arxiv.org/abs/1608.03983>`_, 2017.

    >>> [round(cosine(1.0, total_steps=4)(t), 3) for t in (0, 1, 2, 4, 6)]
    [1.0, 0.854, 0.5, 0.0, 0.0]
    >>> [round(cosine(1.0, total_steps=4, periodic=True)(t), 3) for t in (0, 1, 2, 4, 6)]
    [1.0, 0.854, 0.5, 0.0, 0.5]
    """
    return along("cosine", peak, end, step / total_steps if periodic else elapsed(step, total_steps))


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

    Args:
        peak: :math:`\eta_p`.
        end: :math:`\eta_e`.
        start: :math:`\eta_s`.
        warmup_steps: :math:`W`, a number of updates, at most `total_steps`.
        total_steps: :math:`T`, with the warm-up.

    >>> [round(warmup_cosine(1.0, warmup_steps=2, total_steps=4)(t), 3) for t in range(5)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    rise = along("linear", start, peak, elapsed(step, warmup_steps))
    fall = along("cosine", peak, end, elapsed(maximum(step - warmup_steps, 0), total_steps - warmup_steps))
    return where(step < warmup_steps, rise, fall)


def _too_long(warmup_steps: int, decay_steps: int, total_steps: int, **others: Any) -> str | None:
    if warmup_steps + decay_steps <= total_steps:
        return None
    return (
        "warmup_steps and decay_steps must be at most total_steps together, which counts both, but got "
        f"{warmup_steps} + {decay_steps} > {total_steps}"
    )


@declared(_too_long)
def warmup_stable_decay(
    step: Any,
    peak: Hyper,
    *,
    warmup_steps: Steps,
    decay_steps: Period,
    total_steps: Period,
    end: Hyper = 0.0,
    start: Hyper = 0.0,
    shape: Literal["linear", "cosine", "1-sqrt"] = "linear",
) -> Any:
    r"""WSD: from `start` up to `peak`, there for most of the time, and down to `end` within the last `decay_steps`.

    With :math:`d = \operatorname{clip}\bigl((t - (T - D)) / D,\, 0,\, 1\bigr)`, the fraction of the decay that is done,

    .. math::
        \eta_t = \begin{cases}
            \eta_s + (\eta_p - \eta_s)\, t / W & t < W \\
            \eta_e + (\eta_p - \eta_e)\, f(d) & t \ge W
        \end{cases}
        \qquad
        f(d) = \begin{cases}
            1 - d & \text{linear} \\
            \tfrac12 (1 + \cos \pi d) & \text{cosine} \\
            1 - \sqrt d & \text{1-sqrt}
        \end{cases}

    Until the decay begins, nothing depends on the length of the training. The values are those of transformers'
    `get_wsd_schedule`. MiniCPM's own decay is :math:`\tfrac12^{(t - (T - D)) / k}`: `join` a constant and an `exponential`.

    Args:
        peak: :math:`\eta_p`.
        warmup_steps: :math:`W`.
        decay_steps: :math:`D \ge 1`.
        total_steps: :math:`T \ge W + D`, which counts warm-up and decay.
        end: :math:`\eta_e`.
        start: :math:`\eta_s`.
        shape: of the decay: `"linear"`, `"cosine"`, or `"1-sqrt"`, which falls fast and then flattens, and which Hägele et
            al. found the best of the three.

    >>> wsd = warmup_stable_decay(1.0, warmup_steps=2, decay_steps=4, total_steps=10, shape="1-sqrt")
    >>> [round(wsd(t), 3) for t in (0, 1, 2, 6, 7, 10)]
    [0.0, 0.5, 1.0, 1.0, 0.5, 0.0]

    References: Hu et al., `MiniCPM: Unveiling the Potential of Small Language Models with Scalable Training Strategies
    <https://arxiv.org/abs/2404.06395>`_, 2024; Hägele et al., `Scaling Laws and Compute-Optimal Training Beyond Fixed
    Training Durations <https://arxiv.org/abs/2405.18392>`_, 2024.
    """
    rise = along("linear", start, peak, elapsed(step, warmup_steps))
    fall = along(shape, peak, end, elapsed(maximum(step - (total_steps - decay_steps), 0), decay_steps))
    return where(step < warmup_steps, rise, fall)


@schedule
def inverse_sqrt(step: Any, peak: Hyper, *, warmup_steps: Steps = 0, start: Hyper = 0.0, timescale: Timescale = None) -> Any:
    r"""From `start` to `peak` in a straight line over `warmup_steps`, then falling as one over the root of the step.

    .. math::
        \eta_t = \begin{cases}
            \eta_s + (\eta_p - \eta_s)\, t / W & t < W \\
            \eta_p \sqrt{\tau / (\tau + t - W)} & t \ge W
        \end{cases}

    By default :math:`\tau = W`, so that after the warm-up :math:`\eta_t = \eta_p \sqrt{W / t}`, as in fairseq and, with
    :math:`\eta_p = (d W)^{-1/2}`, in the Transformer's paper (which counts steps from 1). Any other :math:`\tau` is the
    `timescale` of transformers' `get_inverse_sqrt_schedule`. It never ends.

    Args:
        peak: :math:`\eta_p`.
        warmup_steps: :math:`W`.
        start: :math:`\eta_s`.
        timescale: :math:`\tau > 0`; the default is :math:`W`, or 1 without a warm-up.

    >>> [inverse_sqrt(1.0, warmup_steps=4)(t) for t in (0, 2, 4, 16, 64)]
    [0.0, 0.5, 1.0, 0.5, 0.25]

    Reference: Vaswani et al., `Attention Is All You Need <https://arxiv.org/abs/1706.03762>`_, 2017.
    """
    scale = max(warmup_steps, 1) if timescale is None else timescale
    rise = along("linear", start, peak, elapsed(step, warmup_steps))
    fall = peak * root(scale / (scale + maximum(step - warmup_steps, 0)))
    return where(step < warmup_steps, rise, fall)
