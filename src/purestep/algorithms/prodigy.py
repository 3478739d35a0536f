"""Prodigy (Mishchenko & Defazio, 2024): D-Adaptation that finds the distance to the solution faster."""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple, TypeAlias

from torch import Tensor, zeros_like

from purestep._core.hyper import Betas, Hyper, Interval, NonNegative, Positive
from purestep._core.maths import counter, inner, maximum, minimum, multiply, number, origin, root, where
from purestep.algorithms.dadapt_adamw import Growth, debiased, in_reals, ratio, size
from purestep.compose import chain
from purestep.declare import whole
from purestep.transform import Transform
from purestep.transforms.scale import direction

Beta3: TypeAlias = Annotated[Any, Interval(low=0.0, high=1.0, below=True, optional=True)]


class ProdigyState(NamedTuple):
    """The state of `scale_by_prodigy`. A number is one for all parameters together, in float64."""

    step: Tensor  # t: updates so far, a number
    exp_avg: list[Tensor]  # m: running mean of the gradients times the distances
    exp_avg_sq: list[Tensor]  # v: running mean of their squares
    s: list[Tensor]  # the weighted sum of the gradients
    p0: list[Tensor]  # the parameters before the first update
    d: Tensor  # the distance to the solution as far as it is known, a number
    d_max: Tensor  # the largest estimate so far, a number
    d_numerator: Tensor  # of the estimate, a number

    @classmethod
    def init(cls, params: list[Tensor]) -> ProdigyState:
        """Before the first update."""
        m, v, s = ([zeros_like(p) for p in params] for _ in range(3))
        return cls(counter(params), m, v, s, [p.clone() for p in params], number(params), number(params), number(params))


@whole(ProdigyState)
@in_reals
def scale_by_prodigy(
    gs: list[Tensor],
    state: ProdigyState,
    ps: list[Tensor],
    lr: NonNegative = 1.0,
    *,
    betas: Betas = (0.9, 0.999),
    beta3: Beta3 = None,
    eps: Positive = 1e-8,
    weight_decay: NonNegative = 0.0,
    d0: Positive = 1e-6,
    d_coef: Positive = 1.0,
    growth_rate: Growth = None,
    use_bias_correction: bool = False,
    safeguard_warmup: bool = False,
) -> tuple[list[Tensor], ProdigyState]:
    r"""An AdamW step whose learning rate is an estimate of the distance from the first parameters to the solution.

    .. math::
        \eta_t &= \eta\,d_t \\
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1)\,d_t g_t, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2)\,d_t^2 g_t^2 \\
        r_t &= \beta_3 r_{t-1} + \tfrac{d_t}{d_1} \eta_t\,\langle g_t, p_0 - p_{t-1} \rangle, \qquad
            s_t = \beta_3 s_{t-1} + \tfrac{d_t}{d_1} \eta_t\,g_t \\
        d_{t+1} &= \max\Bigl(d_t, c\,\frac{r_t}{\lVert s_t \rVert_1}\Bigr) \\
        u_t &= -\eta_t \Bigl(\frac{m_t}{\sqrt{v_t} + d_{t+1} \epsilon} + \lambda p_{t-1}\Bigr)

    Inner product and norm are those of all parameters together. It stands at the end of a chain.

    Args:
        lr: :math:`\eta \ge 0`, relative to the estimate.
        betas: :math:`\beta_1, \beta_2`, each in [0, 1).
        beta3: :math:`\beta_3` in [0, 1); by default :math:`\sqrt{\beta_2}`.
        eps: :math:`\epsilon > 0`.
        weight_decay: :math:`\lambda \ge 0`, decoupled.
        d0: :math:`d_1 > 0`, small.
        d_coef: :math:`c > 0`.
        growth_rate: after its first growth the estimate grows by no more than this factor per update; at least 1, or None
            for no bound.
        use_bias_correction: multiply :math:`\eta_t` by :math:`\sqrt{1 - \beta_2^t} / (1 - \beta_1^t)`, as Adam does.
        safeguard_warmup: leave :math:`\eta` out of :math:`s_t`, for schedules that begin with a small learning rate.

    >>> import torch, purestep as ps
    >>> opt, p = ps.scale_by_prodigy(d0=0.01), torch.tensor([1.0])
    >>> state = opt.init_state(p)
    >>> for _ in range(5):
    ...     p, state = opt.step(2 * p, state, p)
    >>> bool(state.d > 0.01)  # it was too small
    True

    Reference: Mishchenko & Defazio, `Prodigy: An Expeditiously Adaptive Parameter-Free Learner
    <https://arxiv.org/abs/2306.06101>`_, 2024, algorithm 4.
    """
    (b1, b2), b3 = betas, root(betas[1]) if beta3 is None else beta3
    t = state.step.to(state.d.dtype) + 1
    d, largest = where(state.step == 0, d0, state.d), where(state.step == 0, d0, state.d_max)
    rate = d * lr * (debiased(betas, t) if use_bias_correction else 1.0)
    p0 = origin(state.step, ps, state.p0)
    way = inner(gs, [a - b for a, b in zip(p0, ps)])
    numerator = b3 * state.d_numerator + d / d0 * rate * way
    steps = multiply(gs, d)
    m = [b1 * m + (1 - b1) * x for m, x in zip(state.exp_avg, steps)]
    v = [b2 * v + (1 - b2) * x * x for v, x in zip(state.exp_avg_sq, steps)]
    s = [b3 * s + x for s, x in zip(state.s, multiply(gs, d / d0 * (d if safeguard_warmup else rate)))]
    estimate = ratio(d_coef * numerator, size(s), d)
    largest = maximum(largest, estimate)
    new = largest.clone()
    if growth_rate is not None:
        new = minimum(largest, growth_rate * where(d <= d0, maximum(d, estimate), d))
    floor = new * eps
    ratios = [x / (root(y) + floor.to(y.device, y.dtype)) for x, y in zip(m, v)]
    us = multiply([-x - weight_decay * p for x, p in zip(ratios, ps)], rate)
    return us, ProdigyState(state.step + 1, m, v, s, p0, new, largest, numerator)


def prodigy(
    lr: Hyper = 1.0,
    betas: Betas = (0.9, 0.999),
    beta3: Beta3 = None,
    eps: Hyper = 1e-8,
    weight_decay: Hyper = 0.0,
    *,
    d0: Hyper = 1e-6,
    d_coef: Hyper = 1.0,
    growth_rate: Growth = None,
    use_bias_correction: bool = False,
    safeguard_warmup: bool = False,
    maximize: bool = False,
) -> Transform:
    r"""Prodigy: AdamW without a learning rate to tune.

    .. math:: p_t = p_{t-1} + \mathrm{prodigy}(g_t)

    with :math:`\mathrm{prodigy}` as in `scale_by_prodigy`, the decay included. It works best with a schedule for `lr` that
    begins with 1.

    The numbers are those of the authors' package `prodigyopt`; with `use_bias_correction` they are those of optax too. The
    state holds the first parameters (the package can keep a part of them only, ``slice_p``).

    Args:
        lr: relative to the estimate; at least 0. A schedule with the maximum 1, or 1.
        betas: decay rates of the two moments, each in [0, 1).
        beta3: decay rate of the estimate, in [0, 1); by default the root of the second of `betas`.
        eps: added to the root, relative to the estimate; above 0.
        weight_decay: :math:`\lambda \ge 0`, decoupled.
        d0: the first estimate of the distance, which should be too small; above 0.
        d_coef: what estimates are multiplied by; above 0.
        growth_rate: the estimate grows by no more than this factor per update; at least 1, or None for no bound.
        use_bias_correction: unbiased moments, as Adam has them.
        safeguard_warmup: for schedules that begin with a small learning rate.
        maximize: climb instead of descending.

    Raises:
        ValueError: a value out of its range.

    >>> import torch, purestep as ps
    >>> opt, p = ps.prodigy(), torch.tensor([1.0])
    >>> state = opt.init_state(p)
    >>> for _ in range(200):
    ...     p, state = opt.step(2 * p, state, p)
    >>> bool(p.abs() < 0.1)
    True

    Reference: Mishchenko & Defazio, `Prodigy: An Expeditiously Adaptive Parameter-Free Learner
    <https://arxiv.org/abs/2306.06101>`_, 2024.
    """
    prodigy = scale_by_prodigy(
        lr, betas=betas, beta3=beta3, eps=eps, weight_decay=weight_decay, d0=d0, d_coef=d_coef, growth_rate=growth_rate,
        use_bias_correction=use_bias_correction, safeguard_warmup=safeguard_warmup,
    )  # fmt: skip
    return chain(direction(maximize), prodigy)
