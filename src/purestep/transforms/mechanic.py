"""Mechanic (Cutkosky et al., 2023): a transform around another that learns how large its updates should be."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from purestep._core.hyper import Hyper, NonNegative, Period, Positive
from purestep._core.maths import Scalar, counter, inner, maximum, minimum, multiply, number, origin, root, where
from purestep._engine.nesting import Inner
from purestep.declare import nested
from purestep.transform import Transform

MOST = 16  # of the betas 1 - 0.1, 1 - 0.01, … the last that is not 1 in float64


class MechanicState(NamedTuple):
    """The state of `mechanic`. A vector has a number for each of 16 betas, in float64."""

    step: Scalar  # updates so far
    x0: list[Tensor]  # the parameters before the first update
    r: Tensor  # what was won so far, a vector
    m: Tensor  # the largest stake so far, a vector
    v: Tensor  # the sum of the squares of the stakes, a vector
    s: Tensor  # the factors, a vector; 0 for a beta that is not used. Their sum multiplies the updates
    inner: Any  # the state of the transform

    @classmethod
    def init(cls, params: list[Tensor], inner: Any) -> MechanicState:
        """Before the first update."""
        r, m, v, s = (number(params).new_zeros(MOST) for _ in range(4))
        return cls(counter(params), [p.clone() for p in params], r, m, v, s, inner)


@nested(MechanicState, moves=True, name="mechanic")
def _mechanic(
    gs: list[Tensor],
    state: MechanicState,
    ps: list[Tensor],
    transform: Inner,
    *,
    weight_decay: NonNegative,
    eps: Positive,
    s_init: Positive,
    num_betas: Period,
) -> tuple[list[Tensor], MechanicState]:
    """`mechanic`, without the check of its arguments."""
    k = torch.arange(1, MOST + 1, dtype=state.s.dtype, device=state.s.device)
    betas, used = 1 - 0.1**k, k <= num_betas
    x0 = origin(state.step, ps, state.x0)
    s = where(used & (state.step == 0), s_init, state.s)
    scale = s.sum() + eps
    moved = [p - x for p, x in zip(ps, x0)]  # the sum of all updates so far, times the scale
    decay = weight_decay * s.sum() * root(inner(gs, gs)) / (root(inner(ps, ps)) + eps)
    h = -(inner(gs, moved) + decay * inner(ps, moved)) / scale
    m = maximum(betas * state.m, h.abs() + eps)
    v = betas**2 * state.v + h**2
    r = betas * state.r + minimum(maximum(h, -state.m), state.m) * s
    wealth = s_init / num_betas * m + maximum(r, 0.0)
    s = where(used, wealth / (root(v) + eps), 0.0)
    us, after = transform.update(gs, state.inner, ps, donate=True)
    ways = zip(x0, multiply(moved, s.sum() / scale), multiply(us, s.sum()))
    return [x + y + u for x, y, u in ways], MechanicState(state.step + 1, x0, r, m, v, s, after)


def mechanic(
    transform: Transform,
    *,
    weight_decay: Hyper = 1e-2,
    eps: Hyper = 1e-8,
    s_init: Hyper = 1e-6,
    num_betas: int = 6,
) -> Transform:
    r"""Learn the factor that the updates of an optimizer should have, so that its learning rate need not be tuned.

    .. math::
        u_t &= \mathrm{transform}(g_t), \qquad \Delta_t = \sum_{i < t} u_i, \qquad \sigma_t = \sum_k s_{t,k} \\
        h_t &= -\Bigl\langle \Delta_t,\;
            g_t + \lambda \sigma_t \frac{\lVert g_t \rVert_2}{\lVert p_{t-1} \rVert_2 + \epsilon}\, p_{t-1} \Bigr\rangle \\
        m_{t,k} &= \max(\beta_k m_{t-1,k},\; \lvert h_t \rvert + \epsilon), \qquad
            v_{t,k} = \beta_k^2 v_{t-1,k} + h_t^2 \\
        r_{t,k} &= \beta_k r_{t-1,k} + s_{t,k} \min(\max(h_t, -m_{t-1,k}), m_{t-1,k}) \\
        s_{t+1,k} &= \frac{s_\mathrm{init}\, m_{t,k} / n + \max(r_{t,k}, 0)}{\sqrt{v_{t,k}} + \epsilon}, \qquad
            s_{1,k} = s_\mathrm{init} \\
        p_t &= p_0 + \sigma_{t+1} \Delta_{t+1}

    with :math:`\beta_k = 1 - 0.1^k` for :math:`k = 1 \dots n`. Norms and the inner product are those of all parameters
    together. A schedule inside is kept, and should have the maximum 1. The factor that was found is ``state.s.sum()``
    (``optimizer.shared["s"].sum()`` with the stateful optimizer).

    It stands at the end of a chain, around all of it that moves parameters. Nothing else may move them: :math:`\Delta_t` is
    :math:`(p_{t-1} - p_0) / (\sigma_t + \epsilon)`, which needs no memory but for :math:`p_0`. With parameters in float32 or
    less its first digits are those of a very small difference; a larger `s_init` helps.

    Args:
        transform: a whole optimizer, with a learning rate (or its schedule's maximum) of 1.
        weight_decay: :math:`\lambda \ge 0`, a part of the learning of the factor only; it decays nothing.
        eps: :math:`\epsilon > 0`.
        s_init: :math:`s_\mathrm{init} > 0`, the first factor, which should be too small.
        num_betas: :math:`n`, from 1 to 16.

    Raises:
        ValueError: a value out of its range.

    >>> import torch, purestep as ps
    >>> opt, p = ps.mechanic(ps.sgd(lr=1.0), s_init=1e-3), torch.tensor([1.0])
    >>> state = opt.init_state(p)
    >>> for _ in range(200):
    ...     p, state = opt.step(0.01 * p, state, p)
    >>> bool(state.s.sum() > 1)  # a thousand times the first factor
    True

    The numbers are those of optax's `mechanize
    <https://optax.readthedocs.io/en/latest/api/contrib.html#optax.contrib.mechanize>`_, which one of the authors wrote. In the
    paper's algorithm :math:`r_t` takes :math:`h_t` without bounds, and is itself kept at 0 or above.

    Reference: Cutkosky et al., `Mechanic: A Learning Rate Tuner <https://arxiv.org/abs/2306.00144>`_, 2023.
    """
    made: Transform = _mechanic(transform, weight_decay=weight_decay, eps=eps, s_init=s_init, num_betas=num_betas)
    if num_betas > MOST:
        raise ValueError(f"mechanic: num_betas must be an integer of at most {MOST}, but got {num_betas}.")
    return made
