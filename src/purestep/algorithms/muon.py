"""Muon (Jordan et al., 2024; Liu et al., 2025): momentum, orthogonalized. For the matrices of hidden layers."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, zeros_like
from torch.linalg import vector_norm

from purestep._core.hyper import Hyper, NonNegative, Steps
from purestep._core.maths import Scalar, counter, lerp, maximum, operation, transforming
from purestep._optimizer.mirror import over
from purestep._optimizer.optimizer import Optimizer, Params
from purestep.compose import chain
from purestep.declare import leafwise
from purestep.transform import Transform
from purestep.transforms.decay import add_decayed_weights
from purestep.transforms.scale import scale_by_learning_rate

Coefficients: TypeAlias = tuple[Hyper, Hyper, Hyper]
REMEDY = "Route it elsewhere with masked(...), or give it an optimizer of its own."
STACKS = "Say with as_matrices(...) which matrices it is made of, route it elsewhere, or give it an optimizer of its own."


class MuonState(NamedTuple):
    """The state of `scale_by_muon`."""

    step: Scalar  # updates so far
    momentum_buffer: Tensor  # B: running mean of the gradient

    @classmethod
    def init(cls, p: Tensor) -> MuonState:
        """Before the first update."""
        return cls(counter(p), zeros_like(p))


def matrix(path: str, p: Tensor) -> None:
    """Refuse what is not a real matrix."""
    if p.is_complex():
        raise RuntimeError(f"muon cannot treat complex parameters, but {path} is {p.dtype}. {REMEDY}")
    if p.ndim != 2:
        remedy = STACKS if p.ndim > 2 else REMEDY
        raise ValueError(f"muon orthogonalizes matrices, but {path} has shape {tuple(p.shape)}. {remedy}")


@operation(like=True, stacks=True)
def orthogonalized(x: Tensor, coefficients: Any, eps: Any, ns_steps: int) -> Tensor:
    """The Newton–Schulz iteration on the wider side of a matrix, or of each of a stack of them, in bfloat16."""
    a, b, c = coefficients
    tall = x.shape[-2] > x.shape[-1]
    y = x.bfloat16().mT if tall else x.bfloat16()
    y = y / maximum(vector_norm(y, dim=(-2, -1), keepdim=True), eps)
    for _ in range(ns_steps):
        gram = y @ y.mT
        y = addmm(a, y, 1.0, addmm(b, gram, c, gram, gram), y)
    return (y.mT if tall else y).to(x.dtype, memory_format=torch.contiguous_format).contiguous()


def addmm(a: Any, x: Tensor, b: Any, y: Tensor, z: Tensor) -> Tensor:
    """`a*x + b*(y @ z)` in bfloat16, rounded once."""
    if transforming() or isinstance(a, Tensor) or isinstance(b, Tensor):  # torch.addmm takes only numbers, and in a batch
        return (a * x.float() + b * (y.float() @ z.float())).bfloat16()  # it would round the product and the sum
    multiply = torch.addmm if x.ndim == 2 else torch.baddbmm
    return multiply(x, y, z, beta=a, alpha=b)


@operation(single=True, shapes=True)
def gain(p: Tensor, adjust_lr_fn: str | None) -> float:
    """What an orthogonal matrix is multiplied by, for its shape."""
    rows, columns = p.shape[-2:]
    return adjustment(rows, columns, adjust_lr_fn)


def adjustment(rows: int, columns: int, adjust_lr_fn: str | None) -> float:
    """What the learning rate of a matrix of this shape is multiplied by."""
    if adjust_lr_fn in (None, "original"):
        return math.sqrt(max(1.0, rows / columns))
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    if adjust_lr_fn == "spectral_unclamped":
        return math.sqrt(rows / columns)
    known = "None, 'original', 'match_rms_adamw' or 'spectral_unclamped'"
    raise ValueError(f"muon: adjust_lr_fn must be {known}, but got {adjust_lr_fn!r}.")


@leafwise(MuonState, requires=matrix, name="scale_by_muon")
def orthogonal_momentum(
    g: Tensor, s: MuonState, p: Tensor, momentum: NonNegative, *, nesterov: bool, ns_coefficients: Coefficients,
    eps: NonNegative, ns_steps: Steps, adjust_lr_fn: str | None,
) -> tuple[Tensor, MuonState]:  # fmt: skip
    """`scale_by_muon`, without the check of its switches."""
    b = lerp(s.momentum_buffer, g, 1 - momentum)
    u = orthogonalized(lerp(g, b, momentum) if nesterov else b, ns_coefficients, eps, ns_steps)
    return u * gain(p, adjust_lr_fn), MuonState(s.step + 1, b)


def scale_by_muon(
    momentum: Hyper = 0.95,
    *,
    nesterov: bool = True,
    ns_coefficients: Coefficients = (3.4445, -4.7750, 2.0315),
    eps: Hyper = 1e-7,
    ns_steps: int = 5,
    adjust_lr_fn: str | None = None,
) -> Transform:
    r"""Accumulate the gradients of a matrix, and make all singular values of the result about 1.

    .. math::
        B_t &= \mu\,B_{t-1} + (1 - \mu)\,G_t \\
        X_0 &= \frac{M_t}{\max(\lVert M_t \rVert_F, \epsilon)}, \qquad
            M_t = \begin{cases} \mu\,B_t + (1 - \mu)\,G_t & \text{nesterov} \\ B_t & \text{else} \end{cases} \\
        X_k &= a X_{k-1} + \bigl(b A_k + c A_k^2\bigr) X_{k-1}, \qquad A_k = X_{k-1} X_{k-1}^\top \\
        u_t &= \gamma\,X_K, \qquad
            \gamma = \begin{cases} \sqrt{\max(1, m/n)} & \text{original} \\
            0.2 \sqrt{\max(m, n)} & \text{match\_rms\_adamw} \\
            \sqrt{m/n} & \text{spectral\_unclamped} \end{cases}

    for an :math:`m \times n` matrix (the transpose is iterated if :math:`m > n`). The iteration pushes every singular value
    into about [0.7, 1.2], and no further: its coefficients are chosen for speed at 0, not for convergence.

    :math:`X` is computed in bfloat16, as in torch, so the updates are good to two or three digits. Their derivative is that
    of the iteration in bfloat16, with slope 1 for the rounding.

    Args:
        momentum: :math:`\mu \ge 0`.
        nesterov: look ahead along the new buffer.
        ns_coefficients: :math:`a, b, c`.
        eps: :math:`\epsilon \ge 0`, the smallest norm that is divided by.
        ns_steps: :math:`K`, less than 100.
        adjust_lr_fn: the scale :math:`\gamma`: ``"original"`` (or None) keeps the effect of a step on a layer's output the
            same for all shapes; ``"match_rms_adamw"`` gives updates the size of AdamW's, so that its `lr` and `weight_decay`
            can be used; ``"spectral_unclamped"`` gives them the spectral norm of Bernstein's condition, less than 1 where
            there are more columns than rows.

    Raises:
        ValueError: a value out of its range, an unknown `adjust_lr_fn`, or (from `init_state`) a parameter that is not a
            matrix; the error names its path.
        RuntimeError: (from `init_state`) a parameter is complex.

    >>> import torch, purestep as ps
    >>> opt, p = ps.scale_by_muon(), torch.zeros(2, 3)
    >>> g = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 0.1]])
    >>> u, _ = opt.update(g, opt.init_state(p), p)
    >>> torch.linalg.svdvals(g), ((torch.linalg.svdvals(u) - 1).abs() < 0.35).tolist()
    (tensor([5.0000, 0.1000]), [True, True])

    Reference: Jordan et al., `Muon: An optimizer for hidden layers in neural networks
    <https://kellerjordan.github.io/posts/muon/>`_, 2024.
    """
    if ns_steps >= 100:
        raise ValueError(f"muon: ns_steps must be less than 100, but got {ns_steps}. 5 are usual.")
    adjustment(1, 1, adjust_lr_fn)
    return orthogonal_momentum(
        momentum, nesterov=nesterov, ns_coefficients=ns_coefficients, eps=eps, ns_steps=ns_steps, adjust_lr_fn=adjust_lr_fn
    )


def muon(
    lr: Hyper = 1e-3,
    weight_decay: Hyper = 0.1,
    momentum: Hyper = 0.95,
    nesterov: bool = True,
    ns_coefficients: Coefficients = (3.4445, -4.7750, 2.0315),
    eps: Hyper = 1e-7,
    ns_steps: int = 5,
    adjust_lr_fn: str | None = None,
) -> Transform:
    r"""Muon: every step is an orthogonal matrix along the momentum, with decoupled weight decay.

    .. math:: p_t = p_{t-1} - \eta\,\bigl(\mathrm{muon}(g_t) + \lambda p_{t-1}\bigr)

    with :math:`\mathrm{muon}` as in `scale_by_muon`. It is meant for the matrices of hidden layers. Vectors and 0-d
    parameters it cannot treat, and embeddings and the last layer are better left to another optimizer: mask them, or give
    them an optimizer of their own.

    The numbers are those of `torch.optim.Muon`, but for bfloat16 parameters without `nesterov`: there torch overwrites
    the momentum buffer with its normalized self at every step.

    Args:
        lr: the learning rate :math:`\eta \ge 0`.
        weight_decay: :math:`\lambda \ge 0`; not multiplied by what `adjust_lr_fn` multiplies the update by.
        momentum: of the running mean of the gradient; at least 0.
        nesterov: look ahead along the new buffer.
        ns_coefficients: of the Newton–Schulz iteration.
        eps: the smallest norm that is divided by; at least 0.
        ns_steps: how many steps of the iteration; less than 100.
        adjust_lr_fn: how the update depends on the shape: ``"original"`` (or None), ``"match_rms_adamw"`` or
            ``"spectral_unclamped"``.

    Raises:
        ValueError: a value out of its range, an unknown `adjust_lr_fn`, or (from `init_state`) a parameter that is not a
            matrix; the error names its path.
        RuntimeError: (from `init_state`) a parameter is complex.

    >>> import torch, purestep as ps
    >>> hidden = lambda path, p: p.ndim == 2
    >>> rest = lambda path, p: not hidden(path, p)
    >>> opt = ps.chain(ps.masked(ps.muon(lr=0.02), hidden), ps.masked(ps.adamw(lr=3e-4), rest))
    >>> params = {"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}
    >>> state = opt.init_state(params)
    >>> params, state = opt.step({"weight": torch.eye(2), "bias": torch.ones(2)}, state, params)
    >>> params["bias"]
    tensor([-0.0003, -0.0003])

    Reference: Jordan et al., `Muon: An optimizer for hidden layers in neural networks
    <https://kellerjordan.github.io/posts/muon/>`_, 2024; Liu et al., `Muon is Scalable for LLM Training
    <https://arxiv.org/abs/2502.16982>`_, 2025.
    """
    muon = scale_by_muon(
        momentum, nesterov=nesterov, ns_coefficients=ns_coefficients, eps=eps, ns_steps=ns_steps, adjust_lr_fn=adjust_lr_fn
    )
    return chain(muon, add_decayed_weights(weight_decay), scale_by_learning_rate(lr))


class Muon(Optimizer):
    """`torch.optim.Muon`: same signature, same numbers, same state. The mathematics is `purestep.muon`'s."""

    @over(muon)
    def __init__(
        self, params: Params, lr: Hyper = 1e-3, weight_decay: Hyper = 0.1, momentum: Hyper = 0.95, nesterov: bool = True,
        ns_coefficients: Coefficients = (3.4445, -4.7750, 2.0315), eps: Hyper = 1e-7, ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
    ) -> None: ...  # fmt: skip
