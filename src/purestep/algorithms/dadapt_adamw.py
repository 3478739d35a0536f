"""D-Adaptation (Defazio & Mishchenko, 2023) of AdamW: the learning rate follows from the gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, zeros_like

from purestep._core.hyper import Betas, Hyper, Interval, NonNegative, Positive
from purestep._core.lists import real
from purestep._core.maths import counter, inner, maximum, minimum, multiply, number, root, where
from purestep.compose import chain
from purestep.declare import whole
from purestep.transform import Transform
from purestep.transforms.scale import direction

Growth: TypeAlias = Annotated[Any, Interval(low=1.0, optional=True)]


class DAdaptState(NamedTuple):
    """The state of `scale_by_dadapt_adam`. A number is one for all parameters together, in float64."""

    step: Tensor  # t: updates so far, a number
    exp_avg: list[Tensor]  # m: running mean of the gradients times their learning rates
    exp_avg_sq: list[Tensor]  # v: running mean of the squared gradients
    s: list[Tensor]  # a slower running mean of the gradients times their learning rates
    d: Tensor  # the distance to the solution as far as it is known, a number
    numerator: Tensor  # of the bound that d is, a number

    @classmethod
    def init(cls, params: list[Tensor]) -> DAdaptState:
        """Before the first update."""
        m, v, s = ([zeros_like(p) for p in params] for _ in range(3))
        return cls(counter(params), m, v, s, number(params), number(params))


def in_reals(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a whole transform see complex tensors as pairs of reals, and give what it returns the dtypes it was given."""

    @functools.wraps(function)
    def call(gs: list[Tensor], s: Any, ps: list[Tensor], **arguments: Any) -> Any:
        given = type(s)(*[real(x) if isinstance(x, list) else x for x in s])
        us, new = function(real(gs), given, real(ps), **arguments)
        return back(us, ps), type(s)(*[back(x, old) if isinstance(x, list) else x for x, old in zip(new, s)])

    return call


def back(xs: list[Tensor], like: list[Tensor]) -> list[Tensor]:
    """Pairs of reals as complex tensors, and all in these dtypes."""
    return [(torch.view_as_complex(x.contiguous()) if y.is_complex() else x).to(y.dtype) for x, y in zip(xs, like)]


def debiased(betas: Any, t: Tensor) -> Tensor:
    """What Adam's learning rate is multiplied by where its moments are not unbiased."""
    return root(1 - betas[1] ** t) / (1 - betas[0] ** t)


def ratio(x: Tensor, y: Tensor, otherwise: Tensor) -> Tensor:
    """x / y, unless that is 0 / 0."""
    return torch.where(y == 0, otherwise, x / torch.where(y == 0, 1.0, y))


def size(xs: list[Tensor]) -> Tensor:
    """The sum of the absolute values of all elements."""
    return inner(xs, [x.sign() for x in xs])


@whole(DAdaptState)
@in_reals
def scale_by_dadapt_adam(
    gs: list[Tensor],
    state: DAdaptState,
    ps: list[Tensor],
    lr: NonNegative = 1.0,
    *,
    betas: Betas = (0.9, 0.999),
    eps: Positive = 1e-8,
    weight_decay: NonNegative = 0.0,
    d0: Positive = 1e-6,
    growth_rate: Growth = None,
    use_bias_correction: bool = False,
) -> tuple[list[Tensor], DAdaptState]:
    r"""An AdamW step whose learning rate is the distance to the solution, as far as the gradients have shown it.

    .. math::
        \eta_t &= \eta\,d_t \\
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1)\,\eta_t g_t, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2)\,g_t^2 \\
        s_t &= \sqrt{\beta_2} s_{t-1} + \bigl(1 - \sqrt{\beta_2}\bigr)\,\eta_t g_t \\
        r_t &= \sqrt{\beta_2} r_{t-1} + \bigl(1 - \sqrt{\beta_2}\bigr)\,\eta_t
            \Bigl\langle g_t, \frac{s_{t-1}}{\sqrt{v_{t-1}} + \epsilon} \Bigr\rangle \\
        d_{t+1} &= \max\Bigl(d_t, \frac{r_t}{(1 - \sqrt{\beta_2})\,\lVert s_t \rVert_1}\Bigr) \\
        u_t &= -\frac{m_t}{\sqrt{v_t} + \epsilon} - \eta_t \lambda p_{t-1}

    Inner product and norm are those of all parameters together. It stands at the end of a chain.

    Args:
        lr: :math:`\eta \ge 0`, relative to the estimate.
        betas: :math:`\beta_1, \beta_2`, each in [0, 1).
        eps: :math:`\epsilon > 0`.
        weight_decay: :math:`\lambda \ge 0`, decoupled.
        d0: :math:`d_1 > 0`, small.
        growth_rate: the estimate grows by no more than this factor per update; at least 1, or None for no bound.
        use_bias_correction: multiply :math:`\eta_t` by :math:`\sqrt{1 - \beta_2^t} / (1 - \beta_1^t)`, as Adam does.

    >>> import torch, purestep as ps
    >>> opt, p = ps.scale_by_dadapt_adam(d0=0.01), torch.tensor([1.0])
    >>> state = opt.init_state(p)
    >>> for _ in range(5):
    ...     p, state = opt.step(2 * p, state, p)
    >>> bool(state.d > 0.01)  # it was too small
    True

    Reference: Defazio & Mishchenko, `Learning-Rate-Free Learning by D-Adaptation <https://arxiv.org/abs/2301.07733>`_, 2023,
    algorithm 5.
    """
    (b1, b2), slow = betas, root(betas[1])
    t = state.step.to(state.d.dtype) + 1
    d = where(state.step == 0, d0, state.d)
    rate = d * lr * (debiased(betas, t) if use_bias_correction else 1.0)
    steps = multiply(gs, rate)
    scaled = [s / (root(v) + eps) for s, v in zip(state.s, state.exp_avg_sq)]
    numerator = slow * state.numerator + (1 - slow) * rate * inner(gs, scaled)
    m = [b1 * m + (1 - b1) * x for m, x in zip(state.exp_avg, steps)]
    v = [b2 * v + (1 - b2) * g * g for v, g in zip(state.exp_avg_sq, gs)]
    s = [slow * s + (1 - slow) * x for s, x in zip(state.s, steps)]
    bound = ratio(numerator, (1 - slow) * size(s), d)
    new = maximum(d, bound if growth_rate is None else minimum(bound, d * growth_rate))
    decay = multiply(ps, rate * weight_decay)
    us = [-x / (root(y) + eps) - z for x, y, z in zip(m, v, decay)]
    return us, DAdaptState(state.step + 1, m, v, s, new, numerator)


def dadapt_adamw(
    lr: Hyper = 1.0,
    betas: Betas = (0.9, 0.999),
    eps: Hyper = 1e-8,
    weight_decay: Hyper = 0.0,
    *,
    d0: Hyper = 1e-6,
    growth_rate: Growth = None,
    use_bias_correction: bool = False,
    maximize: bool = False,
) -> Transform:
    r"""D-Adapted AdamW: AdamW without a learning rate to tune.

    .. math:: p_t = p_{t-1} + \mathrm{dadapt}(g_t)

    with :math:`\mathrm{dadapt}` as in `scale_by_dadapt_adam`, the decay included. It works best with a schedule for `lr` that
    begins with 1.

    The numbers are those of the authors' package `dadaptation`, with ``decouple=True``; with `use_bias_correction` they are
    those of optax too.

    Args:
        lr: relative to the estimate; at least 0. A schedule with the maximum 1, or 1.
        betas: decay rates of the two moments, each in [0, 1).
        eps: added to the root; above 0.
        weight_decay: :math:`\lambda \ge 0`, decoupled.
        d0: the first estimate of the distance, which should be too small; above 0.
        growth_rate: the estimate grows by no more than this factor per update; at least 1, or None for no bound.
        use_bias_correction: unbiased moments, as Adam has them.
        maximize: climb instead of descending.

    Raises:
        ValueError: a value out of its range.

    >>> import torch, purestep as ps
    >>> opt, p = ps.dadapt_adamw(), torch.tensor([1.0])
    >>> state = opt.init_state(p)
    >>> for _ in range(200):
    ...     p, state = opt.step(2 * p, state, p)
    >>> bool(p.abs() < 0.1)
    True

    Reference: Defazio & Mishchenko, `Learning-Rate-Free Learning by D-Adaptation <https://arxiv.org/abs/2301.07733>`_, 2023.
    """
    dadapt = scale_by_dadapt_adam(
        lr, betas=betas, eps=eps, weight_decay=weight_decay, d0=d0, growth_rate=growth_rate,
        use_bias_correction=use_bias_correction,
    )  # fmt: skip
    return chain(direction(maximize), dadapt)
