"""SOAP (Vyas et al., 2025): Adam in the eigenbasis of Shampoo's preconditioner."""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, zeros_like

from purestep._core.hyper import Betas, Fraction, Hyper, NonNegative, Steps
from purestep._core.maths import Scalar, counter, lerp, operation, root, some, where, wide
from purestep.algorithms.shampoo import flat
from purestep.compose import chain
from purestep.declare import leafwise
from purestep.transform import Transform
from purestep.transforms.decay import add_decayed_weights
from purestep.transforms.norms import ELSEWHERE, real
from purestep.transforms.scale import direction, scale_by_learning_rate

Factor: TypeAlias = Annotated[Tensor, "a square matrix"]


class SoapState(NamedTuple):
    """The state of `scale_by_soap`. The square matrices of what is no matrix, and of a side that is too long, are empty."""

    step: Scalar  # t: updates so far; the first makes the eigenbases only
    exp_avg: Tensor  # M: running mean of the gradient
    exp_avg_sq: Tensor  # V: running mean of its square in the eigenbases
    GG_rows: Factor  # L: running mean of G G'
    GG_columns: Factor  # R: running mean of G' G
    Q_rows: Factor  # the eigenvectors of L, about
    Q_columns: Factor  # the eigenvectors of R, about

    @classmethod
    def init(cls, p: Tensor, max_precond_dim: int) -> SoapState:
        """Before the first update."""

        def square(n: int) -> Tensor:
            n = n if p.ndim > 1 and n <= max_precond_dim else 0
            return torch.zeros(n, n, dtype=wide(p), device=p.device)

        rows, columns = flat(p).shape
        return cls(counter(p), zeros_like(p), zeros_like(p), square(rows), square(columns), square(rows), square(columns))


@operation
def averaged(gg: Tensor, g: Tensor, beta: Any, left: bool) -> Tensor:
    """The running mean of the gradient's square."""
    x = flat(g).to(gg.dtype)
    if not gg.numel():
        return gg
    return lerp(gg, x @ x.mT if left else x.mT @ x, 1 - beta).to(gg.dtype)


@operation
def basis(gg: Tensor, q: Tensor, step: Any, precondition_frequency: int) -> Tensor:
    """The eigenvectors: at first all, later one step of power iteration when it is due; a constant for derivatives."""
    first, due = step == 0, turned(step, precondition_frequency)
    gg = gg.detach()
    if not gg.numel():
        return q
    if some(due):
        order = by_size(gg, q)
        q = where(due, torch.linalg.qr(gg @ torch.take_along_dim(q, order[None, :], 1))[0].contiguous(), q)
    if some(first):
        q = where(first, torch.linalg.eigh(gg)[1].flip(1).contiguous(), q)
    return q


def turned(step: Any, precondition_frequency: int) -> Any:
    """Whether the eigenbases are to follow the means."""
    return (step > 0) & (step % max(precondition_frequency, 1) == 0)


def by_size(gg: Tensor, q: Tensor) -> Tensor:
    """The order of the eigenvectors by what are about their eigenvalues, the largest first."""
    return torch.argsort(((gg @ q) * q).sum(0), descending=True, stable=True)


@operation
def sorted_with(v: Tensor, sides: Any, step: Any, precondition_frequency: int) -> Tensor:
    """The second moments in the new order of the eigenvectors, when they get one."""
    due = turned(step, precondition_frequency)
    if not some(due):
        return v
    x = flat(v)
    for dim, (gg, q) in enumerate(sides):
        if gg.numel():
            order = by_size(gg.detach(), q)
            x = torch.take_along_dim(x, order[:, None] if dim == 0 else order[None, :], dim)
    return where(due, x.reshape(v.shape), v)


@operation
def rotated(x: Tensor, left: Tensor, right: Tensor, back: bool) -> Tensor:
    """A gradient in the eigenbases, or back from there."""
    y = flat(x)
    if left.numel():
        y = (left if back else left.mT) @ y.to(left.dtype)
    if right.numel():
        y = y.to(right.dtype) @ (right.mT if back else right)
    return y.reshape(x.shape).to(x.dtype)


@leafwise(SoapState, requires=real("soap", ELSEWHERE, empty=False))
def scale_by_soap(
    g: Tensor,
    s: SoapState,
    p: Tensor,
    *,
    betas: Betas = (0.95, 0.95),
    shampoo_beta: Fraction = 0.95,
    eps: NonNegative = 1e-8,
    precondition_frequency: Steps = 10,
    max_precond_dim: Steps = 10000,
) -> tuple[Tensor, SoapState]:
    r"""Adam in slowly turning bases: the eigenvectors of the running means of the gradient's squares.

    .. math::
        M_t &= \beta_1 M_{t-1} + (1 - \beta_1)\,G_t \\
        V_t &= \beta_2 V_{t-1} + (1 - \beta_2)\,(Q_L^\top G_t Q_R)^2 \\
        u_t &= Q_L \frac{Q_L^\top M_t Q_R / (1 - \beta_1^t)}{\sqrt{V_t / (1 - \beta_2^t)} + \epsilon'} Q_R^\top, \qquad
            \epsilon' = \frac{\epsilon}{\sqrt{1 - \beta_2^t}} \\
        L_t &= \beta L_{t-1} + (1 - \beta)\,G_t G_t^\top, \qquad R_t = \beta R_{t-1} + (1 - \beta)\,G_t^\top G_t

    where :math:`t` counts from 0: the first update is 0, and makes :math:`Q_L, Q_R` the eigenvectors of :math:`L_0, R_0`. At
    every `precondition_frequency`-th one they make a step of power iteration, :math:`Q_L \leftarrow \mathrm{qr}(L_t Q_L)`, and
    are sorted by their eigenvalues, :math:`V` with them.

    A parameter of more dimensions is taken as the matrix of its first dimension and all others (the authors have a factor for
    each). A vector, and a side longer than `max_precond_dim`, is not rotated.

    The bases are computed by `torch.linalg.eigh` and `torch.linalg.qr`, in float32 at least. No derivative goes through them.
    Under `torch.compile` they are computed at every update, and used when due.

    Args:
        betas: :math:`\beta_1, \beta_2`, each in [0, 1).
        shampoo_beta: :math:`\beta`, in [0, 1).
        eps: :math:`\epsilon \ge 0`.
        precondition_frequency: how many updates make use of the same bases.
        max_precond_dim: the longest side that is rotated.

    Raises:
        RuntimeError: (from `init_state`) a parameter is complex or empty; the error names its path.

    >>> import torch, purestep as ps
    >>> opt, p = ps.scale_by_soap(eps=1e-4), torch.zeros(2, 2)
    >>> state, g = opt.init_state(p), torch.tensor([[3.0, 1.0], [-1.0, 2.0]])
    >>> for _ in range(2):
    ...     u, state = opt.update(g, state, p)
    >>> torch.allclose(u @ u.T, torch.eye(2), atol=0.01)  # of one gradient alone it is orthogonal
    True

    Reference: Vyas et al., `SOAP: Improving and Stabilizing Shampoo using Adam <https://arxiv.org/abs/2409.11321>`_, 2025.
    """
    b1, b2 = betas
    t, late = s.step, where(s.step == 0, 0.0, 1.0)
    shown = rotated(g, s.Q_rows, s.Q_columns, False)
    m = lerp(s.exp_avg, g, late * (1 - b1))
    v = lerp(s.exp_avg_sq, shown * shown, late * (1 - b2))
    size = late * root(1 - b2**t) / where(t == 0, 1.0, 1 - b1**t)
    u = rotated(rotated(m, s.Q_rows, s.Q_columns, False) / (root(v) + eps), s.Q_rows, s.Q_columns, True) * size
    left, right = averaged(s.GG_rows, g, shampoo_beta, True), averaged(s.GG_columns, g, shampoo_beta, False)
    v = sorted_with(v, ((left, s.Q_rows), (right, s.Q_columns)), t, precondition_frequency)
    bases = [basis(gg, q, t, precondition_frequency) for gg, q in ((left, s.Q_rows), (right, s.Q_columns))]
    return u, SoapState(t + 1, m, v, left, right, *bases)


def soap(
    lr: Hyper = 3e-3,
    betas: Betas = (0.95, 0.95),
    shampoo_beta: Hyper = 0.95,
    eps: Hyper = 1e-8,
    weight_decay: Hyper = 1e-2,
    *,
    precondition_frequency: int = 10,
    max_precond_dim: int = 10000,
    maximize: bool = False,
) -> Transform:
    r"""SOAP: AdamW in the eigenbasis of Shampoo's preconditioner.

    .. math:: p_t = p_{t-1} - \eta\,\bigl(\mathrm{soap}(g_t) + \lambda p_{t-1}\bigr)

    with :math:`\mathrm{soap}` as in `scale_by_soap`. The numbers are those of the authors' reference implementation, but for
    the decay, which there acts on the new parameters, and not in the first update.

    Args:
        lr: the learning rate :math:`\eta \ge 0`.
        betas: decay rates of the two moments, each in [0, 1).
        shampoo_beta: decay rate of the means whose eigenvectors are the basis, in [0, 1).
        eps: added to the root; at least 0.
        weight_decay: :math:`\lambda \ge 0`, decoupled.
        precondition_frequency: how many updates make use of the same bases.
        max_precond_dim: the longest side of a matrix that is rotated.
        maximize: climb instead of descending.

    Raises:
        ValueError: a value out of its range.
        RuntimeError: (from `init_state`) a parameter is complex or empty; the error names its path.

    >>> import torch, purestep as ps
    >>> opt, p = ps.soap(lr=0.1, weight_decay=0.0), torch.ones(2, 2)
    >>> state, g = opt.init_state(p), torch.tensor([[5.0, 0.0], [0.0, -0.1]])
    >>> for _ in range(2):
    ...     p, state = opt.step(g, state, p)
    >>> p
    tensor([[0.9000, 1.0000],
            [1.0000, 1.1000]])

    Reference: Vyas et al., `SOAP: Improving and Stabilizing Shampoo using Adam <https://arxiv.org/abs/2409.11321>`_, 2025.
    """
    soap = scale_by_soap(
        betas=betas, shampoo_beta=shampoo_beta, eps=eps, precondition_frequency=precondition_frequency,
        max_precond_dim=max_precond_dim,
    )  # fmt: skip
    return chain(direction(maximize), soap, add_decayed_weights(weight_decay), scale_by_learning_rate(lr))
