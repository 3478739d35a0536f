"""NovoGrad (Ginsburg et al., 2019): gradients divided by one running norm for each layer, then momentum."""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, zeros_like
from torch.linalg import vector_norm

from purestep._core.hyper import Betas, Hyper, NonNegative
from purestep._core.maths import Scalar, counter, operation, root, where
from purestep.compose import chain
from purestep.declare import leafwise
from purestep.transform import Transform
from purestep.transforms.norms import real
from purestep.transforms.scale import direction, scale_by_learning_rate

One: TypeAlias = Annotated[Tensor, "one number, in float32 at least"]


class NovoGradState(NamedTuple):
    """The state of `scale_by_novograd`."""

    step: Scalar  # updates so far
    exp_avg: Tensor  # m: running sum of the normalized gradient
    exp_avg_sq: One  # v: running mean of the gradient's squared norm: one number, in float32 at least

    @classmethod
    def init(cls, p: Tensor) -> NovoGradState:
        """Before the first update."""
        return cls(counter(p), zeros_like(p), p.new_zeros((), dtype=wide(p)))


def wide(x: Tensor) -> torch.dtype:
    """The dtype of a norm: in float16 the square of 256 is infinite."""
    return torch.promote_types(x.dtype, torch.float32)


@operation
def squared_norm(g: Tensor) -> Tensor:
    """The sum of the squares of all elements."""
    return vector_norm(g, dtype=wide(g)) ** 2


@operation(like=True)
def normalized(g: Tensor, v: Tensor, eps: Any) -> Tensor:
    """The gradient over its running norm."""
    return g / (root(v) + eps).to(g.dtype)


@leafwise(NovoGradState, requires=real("novograd"))
def scale_by_novograd(
    g: Tensor,
    s: NovoGradState,
    p: Tensor,
    *,
    betas: Betas = (0.95, 0.98),
    eps: NonNegative = 1e-8,
    weight_decay: NonNegative = 0.0,
) -> tuple[Tensor, NovoGradState]:
    r"""Divide each parameter's gradient by its running norm, add the decay, and accumulate.

    .. math::
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2)\,\lVert g_t \rVert_2^2, \qquad v_1 = \lVert g_1 \rVert_2^2 \\
        m_t &= \beta_1 m_{t-1} + \frac{g_t}{\sqrt{v_t} + \epsilon} + \lambda p_{t-1} \\
        u_t &= m_t

    :math:`v` is one number for each parameter, so the state is half of Adam's.

    Args:
        betas: :math:`\beta_1, \beta_2`, each in [0, 1).
        eps: :math:`\epsilon \ge 0`, outside the root; at 0 a gradient that is always 0 gives 0/0.
        weight_decay: :math:`\lambda \ge 0`; it goes past the norm, but through the momentum.

    Raises:
        ValueError: a value out of its range.
        RuntimeError: (from `init_state`) a parameter is complex; the error names its path.

    >>> import torch, purestep as ps
    >>> opt, p = ps.scale_by_novograd(), torch.zeros(2)
    >>> state = opt.init_state(p)
    >>> u, state = opt.update(torch.tensor([30.0, 40.0]), state, p)
    >>> u, state.exp_avg_sq
    (tensor([0.6000, 0.8000]), tensor(2500.))

    Reference: Ginsburg et al., `Stochastic Gradient Methods with Layer-wise Adaptive Moments for Training of Deep Networks
    <https://arxiv.org/abs/1905.11286>`_, 2019.
    """
    b1, b2 = betas
    share = where(s.step == 0, 1.0, 1 - b2)
    v = b2 * s.exp_avg_sq + share * squared_norm(g)
    m = b1 * s.exp_avg + normalized(g, v, eps) + weight_decay * p
    return m, NovoGradState(s.step + 1, m, v)


def novograd(
    lr: Hyper = 1e-2,
    betas: Betas = (0.95, 0.98),
    eps: Hyper = 1e-8,
    weight_decay: Hyper = 0.0,
    *,
    maximize: bool = False,
) -> Transform:
    r"""NovoGrad: momentum of gradients that are normalized layer by layer.

    .. math:: p_t = p_{t-1} - \eta\,\mathrm{novograd}(g_t)

    with :math:`\mathrm{novograd}` as in `scale_by_novograd`, of which the decay is a part. The numbers are the paper's and
    those of optax, whose defaults are others: ``b1=0.9, b2=0.25, eps=1e-6``.

    Args:
        lr: the learning rate :math:`\eta \ge 0`.
        betas: decay rates of the momentum and of the squared norm, each in [0, 1).
        eps: added to the root; at least 0.
        weight_decay: :math:`\lambda \ge 0`.
        maximize: climb instead of descending.

    Raises:
        ValueError: a value out of its range.
        RuntimeError: (from `init_state`) a parameter is complex; the error names its path.

    >>> import torch, purestep as ps
    >>> opt, p = ps.novograd(lr=0.1), torch.tensor([3.0, 4.0])
    >>> opt.step(2 * p, opt.init_state(p), p)[0]
    tensor([2.9400, 3.9200])

    Reference: Ginsburg et al., `Stochastic Gradient Methods with Layer-wise Adaptive Moments for Training of Deep Networks
    <https://arxiv.org/abs/1905.11286>`_, 2019.
    """
    novograd = scale_by_novograd(betas=betas, eps=eps, weight_decay=weight_decay)
    return chain(direction(maximize), novograd, scale_by_learning_rate(lr))
