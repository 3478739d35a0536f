"""GaLore (Zhao et al., 2024): Adam on the projection of a matrix's gradient to a few of its singular vectors."""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from purestep._core.hyper import Betas, Hyper, NonNegative, Steps
from purestep._core.maths import Scalar, counter, lerp, operation, some, where, wide
from purestep.algorithms.adam import ratio
from purestep.compose import chain
from purestep.declare import leafwise
from purestep.transform import Transform
from purestep.transforms.decay import add_decayed_weights
from purestep.transforms.norms import ELSEWHERE, real
from purestep.transforms.scale import direction, scale_by_learning_rate

Low: TypeAlias = Annotated[Tensor, "a matrix of low rank's coordinates"]


class GaloreState(NamedTuple):
    """The state of `scale_by_galore`. The moments of an m x n matrix are m x r or r x n, those of anything else full."""

    step: Scalar  # t: updates so far
    exp_avg: Low  # M: running mean of the projected gradient
    exp_avg_sq: Low  # V: running mean of its square
    ortho_matrix: Low  # Q: r orthonormal columns, the directions of the smaller side that are kept; of no matrix empty

    @classmethod
    def init(cls, p: Tensor, rank: int) -> GaloreState:
        """Before the first update."""
        if p.ndim != 2:
            return cls(counter(p), torch.zeros_like(p), torch.zeros_like(p), p.new_zeros(0, 0))
        rows, columns = p.shape
        r = min(rank, rows, columns)
        shape = (rows, r) if rows >= columns else (r, columns)
        return cls(counter(p), p.new_zeros(shape), p.new_zeros(shape), p.new_zeros(min(rows, columns), r))


@operation
def directions(g: Tensor, old: Tensor, step: Any, update_proj_gap: int) -> Tensor:
    """The leading singular vectors of the smaller side, if they are due; a constant for derivatives."""
    due = step % max(update_proj_gap, 1) == 0
    if g.ndim != 2 or not some(due):
        return old
    u, _, vh = torch.linalg.svd(g.detach().to(wide(g)), full_matrices=False)
    new = (vh.mT if g.shape[0] >= g.shape[1] else u)[:, : old.shape[1]].to(old.dtype)
    turned = (new * old.detach()).sum(0) < 0
    return where(due, torch.where(turned, -new, new).clone(memory_format=torch.contiguous_format), old)


@operation
def projected(g: Tensor, q: Tensor) -> Tensor:
    """A matrix's coordinates along these directions."""
    if g.ndim != 2:
        return g
    return g @ q if g.shape[0] >= g.shape[1] else q.mT @ g


@operation
def lifted(u: Tensor, q: Tensor, p: Tensor, scale: Any) -> Tensor:
    """The matrix with these coordinates."""
    if p.ndim != 2:
        return u
    return ((u @ q.mT if p.shape[0] >= p.shape[1] else q @ u) * scale).to(p.dtype)


@leafwise(GaloreState, requires=real("galore", ELSEWHERE))
def scale_by_galore(
    g: Tensor,
    s: GaloreState,
    p: Tensor,
    rank: Steps = 128,
    *,
    update_proj_gap: Steps = 200,
    scale: NonNegative = 0.25,
    betas: Betas = (0.9, 0.999),
    eps: NonNegative = 1e-8,
) -> tuple[Tensor, GaloreState]:
    r"""Project a matrix's gradient to a few directions, apply Adam there, and return to the matrix.

    .. math::
        U \Sigma V^\top &= G_t, \qquad Q_t = V_{:,1:r} \quad \text{if } (t - 1) \bmod T = 0, \quad
            \text{else } Q_t = Q_{t-1} \\
        u_t &= \alpha\,\mathrm{adam}(G_t Q_t)\,Q_t^\top

    for an :math:`m \times n` matrix with :math:`m \ge n`; else it is the left side that is projected, with :math:`U`.
    :math:`\mathrm{adam}` is as in `scale_by_adam`, and so is the update of a parameter that is no matrix. The state of a matrix
    is :math:`2 r \max(m, n) + r \min(m, n)` numbers instead of :math:`2 m n`.

    The directions are computed by `torch.linalg.svd`, in float32 at least. No derivative goes through them. Under
    `torch.compile` and `torch.func.vmap` over steps that differ they are computed at every update, and used when due.

    As in the authors' package, the projection is of the smaller side (optax projects the larger one), and the moments stay what
    they were when the directions change. The sign of a singular vector is arbitrary: here it is that of the one whose moments
    it inherits (their inner product is not negative); there it is whatever the decomposition returns.

    Args:
        rank: :math:`r`, of the projected gradient.
        update_proj_gap: :math:`T`, how many updates make use of the same directions.
        scale: :math:`\alpha \ge 0`, for matrices.
        betas: :math:`\beta_1, \beta_2`, each in [0, 1).
        eps: :math:`\epsilon \ge 0`, outside the root.

    Raises:
        RuntimeError: (from `init_state`) a parameter is complex; the error names its path.

    >>> import torch, purestep as ps
    >>> opt, p = ps.scale_by_galore(rank=1, scale=1.0), torch.zeros(3, 2)
    >>> state = opt.init_state(p)
    >>> u, state = opt.update(torch.tensor([[3.0, 0.0], [-2.0, 0.0], [0.0, 1.0]]), state, p)
    >>> u[:, 0].round(decimals=4), u[:, 1].norm() < 1e-6, state.exp_avg.shape  # the second column is not among the directions
    (tensor([ 1., -1., -0.]), tensor(True), torch.Size([3, 1]))

    Reference: Zhao et al., `GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection
    <https://arxiv.org/abs/2403.03507>`_, 2024.
    """
    b1, b2 = betas
    t = s.step + 1
    q = directions(g, s.ortho_matrix, s.step, update_proj_gap)
    low = projected(g, q)
    m, v = lerp(s.exp_avg, low, 1 - b1), b2 * s.exp_avg_sq + (1 - b2) * (low * low)
    return lifted(ratio(t, m, v, betas, eps), q, p, scale), GaloreState(t, m, v, q)


def galore(
    lr: Hyper = 1e-2,
    rank: int = 128,
    update_proj_gap: int = 200,
    scale: Hyper = 0.25,
    betas: Betas = (0.9, 0.999),
    eps: Hyper = 1e-8,
    weight_decay: Hyper = 0.0,
    *,
    maximize: bool = False,
) -> Transform:
    r"""GaLore: AdamW with the moments of matrices in a few directions of their gradients.

    .. math:: p_t = p_{t-1} - \eta\,\bigl(\mathrm{galore}(g_t) + \lambda p_{t-1}\bigr)

    with :math:`\mathrm{galore}` as in `scale_by_galore`.

    The directions are those of the authors' package `galore-torch`, whose AdamW adds :math:`\epsilon` before the moments are
    made unbiased.

    Args:
        lr: the learning rate :math:`\eta \ge 0`.
        rank: of the projected gradient.
        update_proj_gap: how many updates make use of the same directions.
        scale: for the updates of matrices; at least 0.
        betas: decay rates of the two moments, each in [0, 1).
        eps: added to the root; at least 0.
        weight_decay: :math:`\lambda \ge 0`, decoupled.
        maximize: climb instead of descending.

    Raises:
        ValueError: a value out of its range.
        RuntimeError: (from `init_state`) a parameter is complex; the error names its path.

    >>> import torch, purestep as ps
    >>> opt, p = ps.galore(lr=0.1, rank=1, scale=1.0), torch.ones(2, 2)
    >>> opt.step(torch.ones(2, 2), opt.init_state(p), p)[0]
    tensor([[0.9293, 0.9293],
            [0.9293, 0.9293]])

    Reference: Zhao et al., `GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection
    <https://arxiv.org/abs/2403.03507>`_, 2024.
    """
    galore = scale_by_galore(rank, update_proj_gap=update_proj_gap, scale=scale, betas=betas, eps=eps)
    return chain(direction(maximize), galore, add_decayed_weights(weight_decay), scale_by_learning_rate(lr))
