"""Clip, normalize and scale the updates by norms: of each parameter by itself, or of all together."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.linalg import vector_norm

from purestep._core.hyper import NonNegative, Positive
from purestep._core.lists import pick
from purestep._core.maths import global_norm, maximum, norms, operation, readable, recorded, root, squares, where, wide
from purestep._core.primitives import EmptyState
from purestep._core.sharded import Measured, is_sharded
from purestep.declare import leafwise, whole


def norm(x: Tensor | Measured) -> Tensor:
    """The 2-norm of all elements, with slope 0 at 0: a real 0-d tensor, in float32 at least."""
    if isinstance(x, Measured):
        return x.norm
    x = torch.view_as_real(x) if x.is_complex() else x
    if is_sharded(x):
        return norms([x])[0]
    dtype = wide(x)
    if recorded([x]):
        return root((x.to(dtype) ** 2).sum())
    return vector_norm(x) if x.dtype == dtype else vector_norm(x, dtype=dtype)


def each_norm(xs: list[Tensor]) -> list[Tensor]:
    """`norm` of each tensor; of all sharded ones of a mesh with one message."""
    if not any(map(is_sharded, xs)):
        return [norm(x) for x in xs]
    rows = [k for k, x in enumerate(xs) if is_sharded(x)]
    found = dict(zip(rows, squares(pick(xs, rows))))
    return [root(found[k]).to(wide(x)) if k in found else norm(x) for k, x in enumerate(xs)]


def size(x: Tensor | Measured) -> Any:
    """The same as a number, where it can be read."""
    found = norm(x)
    return found.item() if readable(found) else found


def rms(x: Tensor) -> Any:
    """The root mean square of all elements."""
    return size(x) / math.sqrt(max(x.numel(), 1))


def factor(k: Any, u: Tensor) -> Any:
    """A number to multiply `u` with, which would otherwise promote it if it is a 0-d tensor too."""
    return k.to(u.dtype) if isinstance(k, Tensor) and not u.dim() else k


def by_norms(function: Any) -> Any:
    """An operation that makes a number of the norms of its arguments: all that the processes must know of sharded ones."""
    call: Any = operation(single=True)(function)
    call.norms = True
    return call


ELSEWHERE = "Route it elsewhere with partition(...), or give it an optimizer of its own."


def real(name: str, remedy: str = "", *, empty: bool = True) -> Any:
    """What refuses complex parameters, whose real and imaginary part would be taken for a dimension; perhaps `empty` ones."""
    remedy = remedy or f"Leave it out with masked({name}(...), mask)."
    kinds = "complex" if empty else "complex or empty"

    def requires(path: str, p: Tensor) -> None:
        if p.is_complex() or not (empty or p.numel()):
            what = f"is {p.dtype}" if p.is_complex() else f"has shape {tuple(p.shape)}"
            raise RuntimeError(f"{name} cannot treat {kinds} parameters, but {path} {what}. {remedy}")

    return requires


# -------------------------------------------------------------------------------------------------------------------- clip


@by_norms
def to_norm(u: Tensor, most: Any) -> Any:
    """What brings a norm down to the largest allowed; 1 if it is below."""
    return factor(most / maximum(size(u), most), u)


@by_norms
def to_rms(u: Tensor, most: Any) -> Any:
    """The same for a root mean square."""
    return factor(most / maximum(rms(u), most), u)


@leafwise()
def clip_by_norm(u: Tensor, p: Tensor, max_norm: Positive) -> Tensor:
    r"""Shorten the update of every parameter whose norm is above `max_norm`, each by itself.

    .. math:: u \leftarrow u\,\min\Bigl(1, \frac{c}{\lVert u \rVert_2}\Bigr)

    `clip_by_global_norm` takes the norm of all parameters together instead.

    Args:
        max_norm: :math:`c > 0`, the largest norm of a parameter's update.

    >>> import torch, purestep as ps
    >>> opt, params = ps.clip_by_norm(1.0), [torch.zeros(2), torch.zeros(2)]
    >>> opt.update([torch.tensor([3.0, 4.0]), torch.tensor([0.3, 0.4])], opt.init_state(params), params)[0]
    [tensor([0.6000, 0.8000]), tensor([0.3000, 0.4000])]

    Reference: Pascanu et al., `On the difficulty of training recurrent neural networks
    <https://arxiv.org/abs/1211.5063>`_, 2013.
    """
    return u * to_norm(u, max_norm)


@leafwise()
def clip_by_block_rms(u: Tensor, p: Tensor, max_rms: Positive) -> Tensor:
    r"""Shorten the update of every parameter whose root mean square is above `max_rms`, each by itself.

    .. math:: u \leftarrow u\,\min\Bigl(1, \frac{c}{\operatorname{rms}(u)}\Bigr), \qquad
        \operatorname{rms}(u) = \sqrt{\operatorname{mean}(u^2)}

    optax's transform of this name, whose argument is called ``threshold``. Of a complex parameter, the mean is over the
    real and the imaginary parts.

    Args:
        max_rms: :math:`c > 0`, the largest root mean square of a parameter's update; Adafactor has 1.

    >>> import torch, purestep as ps
    >>> opt, p = ps.clip_by_block_rms(1.0), torch.zeros(4)
    >>> opt.update(torch.tensor([4.0, 0.0, 0.0, 0.0]), opt.init_state(p), p)[0]
    tensor([2., 0., 0., 0.])

    Reference: Shazeer & Stern, `Adafactor: Adaptive Learning Rates with Sublinear Memory Cost
    <https://arxiv.org/abs/1804.04235>`_, 2018, section 6.
    """
    return u * to_rms(u, max_rms)


def unit_norm(x: Tensor) -> Tensor:
    """The norm of every unit: of each index of the first dimension, or of all if there is only one."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return root((x**2).sum(tuple(range(1, x.ndim)), keepdim=True) if x.ndim > 1 else (x**2).sum())


@operation(like=True)
def to_units(g: Tensor, p: Tensor, clipping: Any, eps: Any) -> Tensor:
    """The gradient with the norm of every unit brought down to the largest allowed."""
    most = clipping * maximum(unit_norm(p), eps)
    return (g * (most / maximum(unit_norm(g), most))).to(g.dtype)


@leafwise(requires=real("adaptive_grad_clip"))
def adaptive_grad_clip(g: Tensor, p: Tensor, clipping: Positive = 0.01, *, eps: Positive = 1e-3) -> Tensor:
    r"""Shorten the gradient of every unit that is too long for the unit's weights.

    .. math:: g_i \leftarrow g_i\,\min\Bigl(1, \lambda\,\frac{\max(\lVert p_i \rVert_2, \epsilon)}{\lVert g_i \rVert_2}\Bigr)

    A unit :math:`i` is one index of the first dimension: a row of a matrix, an output channel of a convolution, with
    torch's layout of both, which has the outputs first. A vector or a 0-d parameter is one unit. This is the paper's choice;
    optax has the outputs last, as jax has, and so takes the norm over all other dimensions there, but over the first only of
    parameters of three dimensions. The paper leaves the last layer out: see `masked`.

    Args:
        clipping: :math:`\lambda > 0`, the largest norm of a unit's gradient relative to its weights.
        eps: :math:`\epsilon > 0`, the least norm that weights are taken to have: they may begin at 0.

    Raises:
        ValueError: a value out of its range.
        RuntimeError: (from `init_state`) a parameter is complex; the error names its path.

    >>> import torch, purestep as ps
    >>> opt, p = ps.adaptive_grad_clip(0.1), torch.tensor([[3.0, 4.0], [0.6, 0.8]])
    >>> opt.update(torch.tensor([[0.3, 0.4], [3.0, 4.0]]), opt.init_state(p), p)[0]
    tensor([[0.3000, 0.4000],
            [0.0600, 0.0800]])

    Reference: Brock et al., `High-Performance Large-Scale Image Recognition Without Normalization
    <https://arxiv.org/abs/2102.06171>`_, 2021.
    """
    return to_units(g, p, clipping, eps)


# --------------------------------------------------------------------------------------------------------------- normalize


@whole(scales=True, sparse="rows")
def normalize(us: list[Tensor], s: EmptyState, ps: list[Tensor], *, eps: NonNegative = 1e-6) -> tuple[Any, EmptyState]:
    r"""Divide all updates together by their norm, as one vector: what is left is a direction.

    .. math:: u \leftarrow \frac{u}{\lVert u \rVert_2 + \epsilon}

    optax calls it ``normalize_by_update_norm``. Under `purestep.optim.Optimizer` the norm is that of all parameter groups
    together.

    Args:
        eps: :math:`\epsilon \ge 0`; at 0 updates that are all 0 give 0/0.

    >>> import torch, purestep as ps
    >>> opt, params = ps.normalize(), [torch.zeros(1), torch.zeros(1)]
    >>> opt.update([torch.tensor([3.0]), torch.tensor([4.0])], opt.init_state(params), params)[0]
    [tensor([0.6000]), tensor([0.8000])]

    Reference: Hazan et al., `Beyond Convexity: Stochastic Quasi-Convex Optimization <https://arxiv.org/abs/1507.02030>`_,
    2015.
    """
    return 1 / (global_norm(us) + eps), s


@by_norms
def to_unit(u: Tensor, eps: Any) -> Any:
    """What gives a norm of 1."""
    k = size(u) + eps
    return factor(1 / k if isinstance(k, Tensor) or k else math.nan, u)


@leafwise()
def normalize_by_block(u: Tensor, p: Tensor, *, eps: NonNegative = 1e-6) -> Tensor:
    r"""Divide the update of every parameter by its norm, each by itself.

    .. math:: u \leftarrow \frac{u}{\lVert u \rVert_2 + \epsilon}

    `normalize` takes the norm of all parameters together instead.

    Args:
        eps: :math:`\epsilon \ge 0`; at 0 an update that is all 0 gives 0/0.

    >>> import torch, purestep as ps
    >>> opt, params = ps.normalize_by_block(), [torch.zeros(1), torch.zeros(2)]
    >>> opt.update([torch.tensor([-3.0]), torch.tensor([30.0, 40.0])], opt.init_state(params), params)[0]
    [tensor([-1.0000]), tensor([0.6000, 0.8000])]

    Reference: Yu et al., `Block-Normalized Gradient Method: An Empirical Study for Training Deep Neural Network
    <https://arxiv.org/abs/1707.04822>`_, 2017.
    """
    return u * to_unit(u, eps)


# ------------------------------------------------------------------------------------------------------------------- scale


@by_norms
def trust_ratio(u: Tensor, p: Tensor, min_norm: Any, trust_coefficient: Any, eps: Any) -> Any:
    """The norm of the parameter relative to that of its update; 1 where either is 0."""
    of_p, of_u = maximum(size(p), min_norm), maximum(size(u), min_norm)
    zero = (of_p == 0) | (of_u == 0)
    return factor(where(zero, 1.0, trust_coefficient * of_p / where(zero, 1.0, of_u + eps)), u)


@leafwise()
def scale_by_trust_ratio(
    u: Tensor, p: Tensor, *, min_norm: NonNegative = 0.0, trust_coefficient: NonNegative = 1.0, eps: NonNegative = 0.0
) -> Tensor:
    r"""Make the update of every parameter as long as the parameter itself: the layer-wise step of LARS and LAMB.

    .. math:: u \leftarrow u\,\frac{c \max(\lVert p \rVert_2, m)}{\max(\lVert u \rVert_2, m) + \epsilon}

    Where either norm is exactly 0 the factor is 1, so that a parameter that begins at 0 can leave it.

    Args:
        min_norm: :math:`m \ge 0`, the least norm that a parameter or an update is taken to have.
        trust_coefficient: :math:`c \ge 0`; LARS has 0.001, LAMB 1.
        eps: :math:`\epsilon \ge 0`.

    >>> import torch, purestep as ps
    >>> opt, p = ps.scale_by_trust_ratio(), torch.tensor([30.0, 40.0])
    >>> opt.update(torch.tensor([0.0, 2.0]), opt.init_state(p), p)[0]
    tensor([ 0., 50.])

    Reference: You et al., `Large Batch Training of Convolutional Networks <https://arxiv.org/abs/1708.03888>`_, 2017, and
    `Large Batch Optimization for Deep Learning <https://arxiv.org/abs/1904.00962>`_, 2020.
    """
    return u * trust_ratio(u, p, min_norm, trust_coefficient, eps)


@by_norms
def param_norm(p: Tensor, least: Any) -> Any:
    """The norm of a parameter, bounded from below."""
    return factor(maximum(size(p), least), p)


@by_norms
def param_rms(p: Tensor, least: Any) -> Any:
    """The root mean square of a parameter, bounded from below."""
    return factor(maximum(rms(p), least), p)


@leafwise()
def scale_by_param_block_norm(u: Tensor, p: Tensor, min_scale: NonNegative = 1e-3) -> Tensor:
    r"""Multiply the update of every parameter by the norm of the parameter.

    .. math:: u \leftarrow u \max(\lVert p \rVert_2, c)

    Args:
        min_scale: :math:`c \ge 0`, the least factor: a parameter that begins at 0 would stay there.

    >>> import torch, purestep as ps
    >>> opt, p = ps.scale_by_param_block_norm(), torch.tensor([3.0, 4.0])
    >>> opt.update(torch.tensor([1.0, -1.0]), opt.init_state(p), p)[0]
    tensor([ 5., -5.])

    Reference: You et al., `Large Batch Optimization for Deep Learning <https://arxiv.org/abs/1904.00962>`_, 2020.
    """
    return u * param_norm(p, min_scale)


@leafwise()
def scale_by_param_block_rms(u: Tensor, p: Tensor, min_scale: NonNegative = 1e-3) -> Tensor:
    r"""Multiply the update of every parameter by the root mean square of the parameter: steps relative to its size.

    .. math:: u \leftarrow u \max(\operatorname{rms}(p), c), \qquad \operatorname{rms}(p) = \sqrt{\operatorname{mean}(p^2)}

    Of a complex parameter, the mean is over the real and the imaginary parts.

    Args:
        min_scale: :math:`c \ge 0`, the least factor: a parameter that begins at 0 would stay there.

    >>> import torch, purestep as ps
    >>> opt, p = ps.scale_by_param_block_rms(), torch.tensor([2.0, 2.0, 2.0, 2.0])
    >>> opt.update(torch.tensor([1.0, -1.0, 0.0, 3.0]), opt.init_state(p), p)[0]
    tensor([ 2., -2.,  0.,  6.])

    Reference: Shazeer & Stern, `Adafactor: Adaptive Learning Rates with Sublinear Memory Cost
    <https://arxiv.org/abs/1804.04235>`_, 2018, section 8.
    """
    return u * param_rms(p, min_scale)
