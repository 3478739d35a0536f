"""Shampoo (Gupta et al., 2018): a matrix's gradient divided from both sides by roots of what it has been."""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from purestep._core.hyper import Hyper, NonNegative, Positive, Steps
from purestep._core.maths import Scalar, counter, operation, some, where, wide
from purestep.compose import chain
from purestep.declare import leafwise
from purestep.transform import Transform
from purestep.transforms.decay import add_decayed_weights
from purestep.transforms.momentum import trace
from purestep.transforms.norms import ELSEWHERE, real
from purestep.transforms.scale import direction, scale_by_learning_rate

Factor: TypeAlias = Annotated[Tensor, "a square matrix"]


class ShampooState(NamedTuple):
    """The state of `scale_by_shampoo`: square matrices of the rows and of the columns, empty for what is no matrix."""

    step: Scalar  # t: updates so far
    row_precond: Factor  # L: the sum of G G'
    col_precond: Factor  # R: the sum of G' G
    inv_row_precond: Factor  # the root that L was last divided by
    inv_col_precond: Factor  # the same of R

    @classmethod
    def init(cls, p: Tensor, eps: float) -> ShampooState:
        """Before the first update."""
        rows, columns = flat(p).shape

        def square(n: int) -> Tensor:
            return torch.eye(n, dtype=wide(p), device=p.device)

        columns = columns if p.ndim > 1 else 0
        return cls(counter(p), eps * square(rows), eps * square(columns), square(rows), square(columns))


def flat(x: Tensor) -> Tensor:
    """A parameter as a matrix: a vector is one column, and all dimensions but the first are one."""
    return x.reshape(x.shape[0] if x.ndim else 1, -1)


@operation
def grown(precond: Tensor, g: Tensor, left: bool) -> Tensor:
    """The sum, with the gradient's own square."""
    x = flat(g).to(precond.dtype)
    if not precond.numel():
        return precond
    return precond + (x @ x.mT if left else x.mT @ x)


@operation
def inverse_root(precond: Tensor, old: Tensor, p: Tensor, step: Any, update_freq: int) -> Tensor:
    """To the power of -1/4, or -1/2 if it is the only factor, when that is due; a constant for derivatives."""
    due = step % max(update_freq, 1) == 0
    if not precond.numel() or not some(due):
        return old
    values, vectors = torch.linalg.eigh(precond.detach())
    least = torch.finfo(values.dtype).eps * values[-1:]  # what rounding has made smaller
    roots = torch.maximum(values, least) ** (-0.25 if p.ndim > 1 else -0.5)
    return where(due, (vectors * roots) @ vectors.mT, old)


@operation
def preconditioned(g: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The gradient between the roots."""
    x = left @ flat(g).to(left.dtype)
    return (x @ right if g.ndim > 1 else x).reshape(g.shape).to(g.dtype)


@leafwise(ShampooState, requires=real("shampoo", ELSEWHERE, empty=False))
def scale_by_shampoo(
    g: Tensor, s: ShampooState, p: Tensor, *, eps: Positive = 1e-4, update_freq: Steps = 1
) -> tuple[Tensor, ShampooState]:
    r"""Divide the gradient of a matrix by roots of the sums of its squares: on the left the rows', on the right the columns'.

    .. math::
        L_t &= L_{t-1} + G_t G_t^\top, \qquad R_t = R_{t-1} + G_t^\top G_t, \qquad L_0 = \epsilon I, \quad R_0 = \epsilon I \\
        u_t &= L_t^{-1/4}\,G_t\,R_t^{-1/4}

    A parameter of more dimensions is taken as the matrix of its first dimension and all others. A vector has one factor,
    with the power :math:`-1/2`, of the size of its square: leave long ones to another optimizer.

    The roots are computed by `torch.linalg.eigh`, in float32 at least. No derivative goes through them. Under
    `torch.compile` they are computed at every update, and used when due.

    Args:
        eps: :math:`\epsilon > 0`.
        update_freq: how many updates make use of the same roots.

    Raises:
        RuntimeError: (from `init_state`) a parameter is complex or empty; the error names its path.

    >>> import torch, purestep as ps
    >>> opt, p = ps.scale_by_shampoo(), torch.zeros(2, 2)
    >>> g = torch.tensor([[3.0, 1.0], [-1.0, 2.0]])
    >>> u, state = opt.update(g, opt.init_state(p), p)
    >>> torch.allclose(u @ u.T, torch.eye(2), atol=1e-3)  # at first it is orthogonal
    True

    Reference: Gupta et al., `Shampoo: Preconditioned Stochastic Tensor Optimization <https://arxiv.org/abs/1802.09568>`_,
    2018, algorithm 1.
    """
    left, right = grown(s.row_precond, g, True), grown(s.col_precond, g, False)
    a = inverse_root(left, s.inv_row_precond, p, s.step, update_freq)
    b = inverse_root(right, s.inv_col_precond, p, s.step, update_freq)
    return preconditioned(g, a, b), ShampooState(s.step + 1, left, right, a, b)


def shampoo(
    lr: Hyper = 0.1,
    momentum: NonNegative = 0.0,
    weight_decay: Hyper = 0.0,
    eps: Hyper = 1e-4,
    *,
    update_freq: int = 1,
    maximize: bool = False,
) -> Transform:
    r"""Shampoo: full-matrix AdaGrad, with one factor for the rows and one for the columns of a matrix.

    .. math:: p_t = p_{t-1} - \eta\,\mathrm{trace}\bigl(\mathrm{shampoo}(g_t + \lambda p_{t-1})\bigr)

    with :math:`\mathrm{shampoo}` as in `scale_by_shampoo` and :math:`\mathrm{trace}` as in `trace`. This is the paper's
    algorithm 1, with sums, not running means, and without the grafted learning rates of later versions. The package
    `torch_optimizer` divides by the roots :math:`L^{1/2}` and :math:`R^{1/2}`.

    Args:
        lr: the learning rate :math:`\eta \ge 0`.
        momentum: of the preconditioned gradients; at least 0.
        weight_decay: :math:`\lambda \ge 0`, an :math:`L_2` penalty.
        eps: what the sums begin with; above 0.
        update_freq: how many updates make use of the same roots.
        maximize: climb instead of descending.

    Raises:
        ValueError: a value out of its range.
        RuntimeError: (from `init_state`) a parameter is complex or empty; the error names its path.

    >>> import torch, purestep as ps
    >>> opt, p = ps.shampoo(lr=0.1), torch.ones(2, 2)
    >>> opt.step(torch.tensor([[5.0, 0.0], [0.0, -0.1]]), opt.init_state(p), p)[0]
    tensor([[0.9000, 1.0000],
            [1.0000, 1.0995]])

    Reference: Gupta et al., `Shampoo: Preconditioned Stochastic Tensor Optimization <https://arxiv.org/abs/1802.09568>`_,
    2018.
    """
    shampoo = scale_by_shampoo(eps=eps, update_freq=update_freq)
    return chain(direction(maximize), add_decayed_weights(weight_decay), shampoo, trace(momentum), scale_by_learning_rate(lr))
