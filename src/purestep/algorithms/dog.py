"""Distance over Gradients (Ivgi et al., 2023): gradient descent whose learning rate follows from where it has been."""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from purestep._core.hyper import Hyper, Interval, NonNegative
from purestep._core.maths import Scalar, counter, inner, maximum, number, operation, origin, root, where, wide
from purestep.compose import chain
from purestep.declare import leafwise, whole
from purestep.transform import Transform
from purestep.transforms.decay import add_decayed_weights
from purestep.transforms.norms import ELSEWHERE, real
from purestep.transforms.scale import direction, scale_by_learning_rate

One: TypeAlias = Annotated[Tensor, "one number, in float32 at least"]
Optional: TypeAlias = Annotated[Any, Interval(low=0.0, above=True, optional=True)]


class DogState(NamedTuple):
    """The state of `scale_by_dog`. A number is one for all parameters together, in float64."""

    step: Tensor  # t: updates so far, a number
    x0: list[Tensor]  # the parameters before the first update
    rbar: Tensor  # the largest distance from there so far, a number
    G: Tensor  # the sum of the squared norms of the gradients, a number

    @classmethod
    def init(cls, params: list[Tensor]) -> DogState:
        """Before the first update."""
        return cls(counter(params), [p.clone() for p in params], number(params), number(params))


class LDogState(NamedTuple):
    """The state of `scale_by_ldog`."""

    step: Scalar  # t: updates so far
    x0: Tensor  # the parameter before the first update
    rbar: One  # the largest distance from there so far
    G: One  # the sum of the squared norms of the gradients

    @classmethod
    def init(cls, p: Tensor, reps_rel: float) -> LDogState:
        """Before the first update."""
        size = root((p.to(wide(p)) ** 2).sum())
        return cls(counter(p), p.clone(), (reps_rel * (1 + size)).to(size.dtype), torch.zeros_like(size))


@whole(DogState, scales=True)
def scale_by_dog(
    gs: list[Tensor],
    s: DogState,
    ps: list[Tensor],
    *,
    reps_rel: NonNegative = 1e-6,
    eps: NonNegative = 1e-8,
    init_eta: Optional = None,
) -> tuple[list[Tensor], DogState]:
    r"""Multiply the gradients by the distance from where it began over the root of the sum of their squares.

    .. math::
        \bar r_t &= \max_{i \le t} \lVert p_{i-1} - p_0 \rVert_2, \qquad \bar r_1 = r_\epsilon\,(1 + \lVert p_0 \rVert_2) \\
        G_t &= \epsilon + \sum_{i \le t} \lVert g_i \rVert_2^2 \\
        u_t &= \frac{\bar r_t}{\sqrt{G_t}}\,g_t

    Norms are those of all parameters together; `scale_by_ldog` takes each parameter's own.

    Args:
        reps_rel: :math:`r_\epsilon \ge 0`, the first distance, relative to the size of the parameters.
        eps: :math:`\epsilon \ge 0`; at 0 gradients that are all 0 give 0/0.
        init_eta: the first step's factor, in the place of :math:`\bar r_1 / \sqrt{G_1}`; then `reps_rel` is not used.

    >>> import torch, purestep as ps
    >>> opt, p = ps.scale_by_dog(reps_rel=0.1), torch.tensor([3.0, 4.0])
    >>> opt.update(torch.tensor([0.0, 9.0]), opt.init_state(p), p)[0]  # 0.1 (1 + 5) long
    tensor([0.0000, 0.6000])

    Reference: Ivgi et al., `DoG is SGD's Best Friend <https://arxiv.org/abs/2302.12022>`_, 2023.
    """
    first, x0 = s.step == 0, origin(s.step, ps, s.x0)
    start = reps_rel * (1 + root(inner(ps, ps))) if init_eta is None else torch.zeros_like(s.rbar)
    moved = [p - x for p, x in zip(ps, x0)]
    rbar = maximum(where(first, start, s.rbar), root(inner(moved, moved)))
    total = where(first, eps, s.G) + inner(gs, gs)
    eta = rbar / root(total)
    if init_eta is not None:
        eta = where(first, init_eta, eta)
    return eta, DogState(s.step + 1, x0, rbar, total)


@operation
def farthest(rbar: Tensor, p: Tensor, x0: Tensor) -> Tensor:
    """The largest distance so far."""
    return maximum(rbar, root(((p - x0).to(rbar.dtype) ** 2).sum()))


@operation
def added(total: Tensor, g: Tensor) -> Tensor:
    """The sum of squares, with those of the gradient."""
    return total + (g.to(total.dtype) ** 2).sum()


@operation(single=True)
def over(rbar: Tensor, total: Tensor, eps: Any) -> Tensor:
    """The distance over the gradients."""
    return rbar / root(total + eps)


@leafwise(LDogState, requires=real("ldog", f"Use dog. {ELSEWHERE}"))
def scale_by_ldog(
    g: Tensor,
    s: LDogState,
    p: Tensor,
    *,
    reps_rel: NonNegative = 1e-6,
    eps: NonNegative = 1e-8,
) -> tuple[Tensor, LDogState]:
    r"""`scale_by_dog` for each parameter on its own.

    .. math::
        \bar r_t &= \max_{i \le t} \lVert p_{i-1} - p_0 \rVert_2, \qquad \bar r_1 = r_\epsilon\,(1 + \lVert p_0 \rVert_2) \\
        u_t &= \frac{\bar r_t}{\sqrt{\epsilon + \sum_{i \le t} \lVert g_i \rVert_2^2}}\,g_t

    Args:
        reps_rel: :math:`r_\epsilon \ge 0`, the first distance, relative to the size of the parameter.
        eps: :math:`\epsilon \ge 0`; at 0 a gradient that is always 0 gives 0/0.

    Raises:
        RuntimeError: (from `init_state`) a parameter is complex; the error names its path.

    >>> import torch, purestep as ps
    >>> opt, params = ps.scale_by_ldog(reps_rel=0.1), [torch.tensor([3.0, 4.0]), torch.tensor([0.0])]
    >>> grads = [torch.tensor([0.0, 9.0]), torch.tensor([0.1])]
    >>> opt.update(grads, opt.init_state(params), params)[0]
    [tensor([0.0000, 0.6000]), tensor([0.1000])]

    Reference: Ivgi et al., `DoG is SGD's Best Friend <https://arxiv.org/abs/2302.12022>`_, 2023, section 3.3.
    """
    rbar, total = farthest(s.rbar, p, s.x0), added(s.G, g)
    return g * over(rbar, total, eps), LDogState(s.step + 1, s.x0, rbar, total)


def dog(
    lr: Hyper = 1.0,
    reps_rel: Hyper = 1e-6,
    eps: Hyper = 1e-8,
    weight_decay: Hyper = 0.0,
    *,
    init_eta: Optional = None,
    maximize: bool = False,
) -> Transform:
    r"""DoG: gradient descent without a learning rate to tune.

    .. math:: p_t = p_{t-1} - c\,\mathrm{dog}(g_t + \lambda p_{t-1})

    with :math:`\mathrm{dog}` as in `scale_by_dog`. The authors evaluate an average of the parameters, and recommend it.

    The numbers are those of the authors' package `dog-optimizer`, and of optax, but for `init_eta`, which the package does not
    multiply by `lr`.

    Args:
        lr: :math:`c \ge 0`; it need not be changed.
        reps_rel: the first distance, relative to the size of the parameters; at least 0. With batch normalization 1e-4.
        eps: added to the sum of squares; at least 0.
        weight_decay: :math:`\lambda \ge 0`, an :math:`L_2` penalty.
        init_eta: the first learning rate, in the place of what follows from `reps_rel`; above 0.
        maximize: climb instead of descending.

    Raises:
        ValueError: a value out of its range.

    >>> import torch, purestep as ps
    >>> opt, p = ps.dog(), torch.tensor([1.0])
    >>> state = opt.init_state(p)
    >>> for _ in range(200):
    ...     p, state = opt.step(2 * p, state, p)
    >>> bool(p.abs() < 1e-2)
    True

    Reference: Ivgi et al., `DoG is SGD's Best Friend: A Parameter-Free Dynamic Step Size Schedule
    <https://arxiv.org/abs/2302.12022>`_, 2023.
    """
    dog = scale_by_dog(reps_rel=reps_rel, eps=eps, init_eta=init_eta)
    return chain(direction(maximize), add_decayed_weights(weight_decay), dog, scale_by_learning_rate(lr))


def ldog(
    lr: Hyper = 1.0,
    reps_rel: Hyper = 1e-6,
    eps: Hyper = 1e-8,
    weight_decay: Hyper = 0.0,
    *,
    maximize: bool = False,
) -> Transform:
    r"""Layer-wise DoG: every parameter has a learning rate of its own.

    .. math:: p_t = p_{t-1} - c\,\mathrm{ldog}(g_t + \lambda p_{t-1})

    with :math:`\mathrm{ldog}` as in `scale_by_ldog`. The numbers are those of the authors' package `dog-optimizer`.

    Args:
        lr: :math:`c \ge 0`; it need not be changed.
        reps_rel: the first distance of a parameter, relative to its size; at least 0.
        eps: added to the sum of squares; at least 0.
        weight_decay: :math:`\lambda \ge 0`, an :math:`L_2` penalty.
        maximize: climb instead of descending.

    Raises:
        ValueError: a value out of its range.
        RuntimeError: (from `init_state`) a parameter is complex; the error names its path.

    >>> import torch, purestep as ps
    >>> opt, p = ps.ldog(), torch.tensor([1.0])
    >>> state = opt.init_state(p)
    >>> for _ in range(200):
    ...     p, state = opt.step(2 * p, state, p)
    >>> bool(p.abs() < 1e-2)
    True

    Reference: Ivgi et al., `DoG is SGD's Best Friend: A Parameter-Free Dynamic Step Size Schedule
    <https://arxiv.org/abs/2302.12022>`_, 2023.
    """
    ldog = scale_by_ldog(reps_rel=reps_rel, eps=eps)
    return chain(direction(maximize), add_decayed_weights(weight_decay), ldog, scale_by_learning_rate(lr))
