"""Adafactor (Shazeer & Stern, 2018): Adam without momentum, whose second moment of a matrix is a column times a row."""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.linalg import vector_norm

from purestep._core.hyper import Hyper, Interval, NonNegative
from purestep._core.maths import Scalar, counter, lerp, maximum, minimum, operation, readable, root, transforming
from purestep._optimizer.mirror import over
from purestep._optimizer.optimizer import Optimizer, Params
from purestep.compose import chain
from purestep.declare import leafwise
from purestep.transform import Transform
from purestep.transforms.norms import ELSEWHERE, real
from purestep.transforms.scale import direction

Floors: TypeAlias = tuple[Annotated[Any, Interval(low=0.0, optional=True)], NonNegative]
NonPositive: TypeAlias = Annotated[Any, Interval(high=0.0)]
Factor: TypeAlias = Annotated[Tensor, "a row or a column"]
AtLeastOne: TypeAlias = Annotated[Any, Interval(low=1.0)]


class AdafactorState(NamedTuple):
    """The state of `scale_by_adafactor`. What a parameter does not have is None."""

    step: Scalar  # t: updates so far
    row_var: Factor | None  # R: running mean of the squared gradient over the last dimension, which it has with size 1
    col_var: Factor | None  # C: the same over the last dimension but one
    variance: Tensor | None  # V: running mean of the squared gradient, of parameters with less than two dimensions

    @classmethod
    def init(cls, p: Tensor) -> AdafactorState:
        """Before the first update."""
        if p.ndim < 2:
            return cls(counter(p), None, None, torch.zeros_like(p))
        *stack, rows, columns = p.shape
        return cls(counter(p), p.new_zeros(*stack, rows, 1), p.new_zeros(*stack, 1, columns), None)


class RelativeStepState(NamedTuple):
    """The state of `scale_by_relative_step`."""

    step: Scalar  # t: updates so far

    @classmethod
    def init(cls, p: Tensor) -> RelativeStepState:
        """Before the first update."""
        return cls(counter(p))


WIDE = (torch.float32, torch.float64)


def floor(eps1: Any, x: Tensor) -> Any:
    """The smallest root mean square that is divided by."""
    return torch.finfo(x.dtype).eps if eps1 is None else eps1


def rms(x: Tensor, read: bool) -> Any:
    """The root mean square of all elements, in float32 at least: in float16 the square of 256 is infinite."""
    norm = vector_norm(x) if x.dtype in WIDE else vector_norm(x, dtype=torch.float32)
    return (norm.item() if read else norm) / max(x.numel(), 1) ** 0.5


@operation
def mean_square(g: Tensor, dim: int) -> Tensor:
    """The mean of the squares along one dimension."""
    if dim == -2 and g.dtype in WIDE:  # down the columns a norm takes four to ten times as long as a sum
        return (g * g).sum(dim, keepdim=True).div_(max(g.shape[dim], 1))
    norm = vector_norm(g, dim=dim, keepdim=True)
    return (norm * norm).div_(max(g.shape[dim], 1))


@operation(like=True)
def product(r: Tensor, c: Tensor, eps1: Any) -> Tensor:
    """The second moment of a matrix, bounded from below."""
    v, least = r / maximum(r.mean(-2, keepdim=True), floor(eps1, r)) @ c, floor(eps1, r) ** 2
    return v.clamp_min_(least) if isinstance(least, float) and not transforming() else maximum(v, least)


@operation(like=True)
def bounded(v: Tensor, eps1: Any) -> Tensor:
    """The second moment of a vector, bounded from below."""
    return maximum(v, floor(eps1, v) ** 2)


@operation(single=True)
def size(u: Tensor, p: Tensor, eps2: Any, d: Any) -> Tensor:
    """How long an update is to be: of the size of its parameter, and clipped."""
    read = readable(u) and readable(p)
    return maximum(rms(p, read), eps2) / maximum(rms(u, read) / d, 1.0)


@leafwise(AdafactorState, requires=real("adafactor", ELSEWHERE))
def scale_by_adafactor(
    g: Tensor,
    s: AdafactorState,
    p: Tensor,
    *,
    beta2_decay: NonPositive = -0.8,
    eps: Floors = (None, 1e-3),
    d: AtLeastOne = 1.0,
) -> tuple[Tensor, AdafactorState]:
    r"""Divide the gradient by its running root mean square, clip that, and multiply it by the parameter's size.

    .. math::
        R_t &= R_{t-1} + t^\tau\,\bigl(\operatorname{mean}_{-1}(g_t^2) - R_{t-1}\bigr), \qquad
        C_t = C_{t-1} + t^\tau\,\bigl(\operatorname{mean}_{-2}(g_t^2) - C_{t-1}\bigr) \\
        V_t &= \frac{R_t\,C_t}{\max(\operatorname{mean}_{-2}(R_t),\, \epsilon_1)} \\
        \hat u_t &= \frac{g_t}{\max(\sqrt{V_t},\, \epsilon_1)} \\
        u_t &= \max\bigl(\epsilon_2, \operatorname{rms}(p)\bigr)\,\frac{\hat u_t}{\max(1, \operatorname{rms}(\hat u_t) / d)}

    with :math:`\operatorname{rms}(x) = \sqrt{\operatorname{mean}(x^2)}`. The state of an :math:`m \times n` matrix is
    :math:`m + n` numbers, the mean squares of its rows and of its columns; a parameter of more dimensions is a stack of
    matrices. For vectors and 0-d parameters :math:`V_t` is the running mean of :math:`g_t^2`.

    As in torch, :math:`\epsilon_1` bounds the second moment from below; in the paper it is added to :math:`g_t^2`.

    Args:
        beta2_decay: :math:`\tau \le 0`: the running means forget with :math:`\beta_2 = 1 - t^\tau`.
        eps: :math:`\epsilon_1, \epsilon_2 \ge 0`, the least root mean square of the gradient and of the parameter. For None
            :math:`\epsilon_1` is the relative precision of the parameter's dtype (`torch.finfo(dtype).eps`).
        d: :math:`d \ge 1`, the largest root mean square of an update before it is multiplied by the parameter's.

    Raises:
        ValueError: a value out of its range.
        RuntimeError: (from `init_state`) a parameter is complex; the error names its path.

    >>> import torch, purestep as ps
    >>> opt, p = ps.scale_by_adafactor(), torch.full((2, 3), 0.5)
    >>> state = opt.init_state(p)
    >>> u, state = opt.update(torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0]]), state, p)
    >>> u  # of a matrix of rank 1 nothing but the signs is left
    tensor([[0.5000, 0.5000, 0.5000],
            [0.5000, 0.5000, 0.5000]])
    >>> state.row_var.shape, state.col_var.shape
    (torch.Size([2, 1]), torch.Size([1, 3]))

    Reference: Shazeer & Stern, `Adafactor: Adaptive Learning Rates with Sublinear Memory Cost
    <https://arxiv.org/abs/1804.04235>`_, 2018.
    """
    t = s.step + 1
    rate = t**beta2_decay
    if s.variance is None:
        r = lerp(s.row_var, mean_square(g, -1), rate)
        c = lerp(s.col_var, mean_square(g, -2), rate)
        s, v = AdafactorState(t, r, c, None), product(r, c, eps[0])
    else:
        variance = lerp(s.variance, g * g, rate)
        s, v = AdafactorState(t, None, None, variance), bounded(variance, eps[0])
    u = g * v.rsqrt()
    return u * size(u, p, eps[1], d), s


@leafwise(RelativeStepState)
def scale_by_relative_step(
    u: Tensor, s: RelativeStepState, p: Tensor, lr: NonNegative, weight_decay: NonNegative = 0.0
) -> tuple[Tensor, RelativeStepState]:
    r"""Adafactor's learning rate, which falls with the square root of the step, and the weight decay, which does not.

    .. math:: u_t \leftarrow -\min\bigl(\eta, 1 / \sqrt t\bigr)\,u_t - \eta \lambda p_{t-1}

    It stands at the end of a chain.

    Args:
        lr: :math:`\eta \ge 0`, the largest learning rate.
        weight_decay: :math:`\lambda \ge 0`.

    >>> import torch, purestep as ps
    >>> opt, p = ps.scale_by_relative_step(0.8), torch.zeros(1)
    >>> state = opt.init_state(p)
    >>> for _ in range(4):
    ...     u, state = opt.update(torch.ones(1), state, p)
    ...     print(round(u.item(), 4))
    -0.8
    -0.7071
    -0.5774
    -0.5

    Reference: Shazeer & Stern, `Adafactor: Adaptive Learning Rates with Sublinear Memory Cost
    <https://arxiv.org/abs/1804.04235>`_, 2018.
    """
    t = s.step + 1
    return -minimum(1 / root(t), lr) * u - lr * weight_decay * p, RelativeStepState(t)


def adafactor(
    lr: Hyper = 1e-2,
    beta2_decay: Hyper = -0.8,
    eps: Floors = (None, 1e-3),
    d: Hyper = 1.0,
    weight_decay: Hyper = 0.0,
    *,
    maximize: bool = False,
) -> Transform:
    r"""Adafactor: second moments in the memory of a row and a column, and steps relative to the parameter's size.

    .. math:: p_t = p_{t-1} - \min\bigl(\eta, 1 / \sqrt t\bigr)\,\mathrm{adafactor}(g_t) - \eta \lambda p_{t-1}

    with :math:`\mathrm{adafactor}` as in `scale_by_adafactor`, and the learning rate as in `scale_by_relative_step`. The
    numbers are those of `torch.optim.Adafactor`, but where a group mixes dtypes and :math:`\epsilon_1` is None: torch takes
    the precision of the group's first parameter for all.

    Args:
        lr: :math:`\eta \ge 0`, the largest step relative to the parameter's size; the paper has 0.01.
        beta2_decay: :math:`\tau \le 0`: the second moments forget with :math:`\beta_2 = 1 - t^\tau`.
        eps: :math:`\epsilon_1, \epsilon_2`: the least root mean square of the gradient that is divided by (None: the
            precision of the parameter's dtype), and the least size of a parameter; both at least 0.
        d: clip updates that are, relative to the parameter's size, larger than this; at least 1.
        weight_decay: :math:`\lambda \ge 0`, decoupled.
        maximize: climb instead of descending.

    Raises:
        ValueError: a value out of its range.
        RuntimeError: (from `init_state`) a parameter is complex; the error names its path.

    >>> import torch, purestep as ps
    >>> opt, p = ps.adafactor(lr=0.1), torch.full((2, 2), 3.0)
    >>> state = opt.init_state(p)
    >>> p, state = opt.step(torch.ones(2, 2), state, p)
    >>> p  # a tenth of the parameter's size
    tensor([[2.7000, 2.7000],
            [2.7000, 2.7000]])

    Reference: Shazeer & Stern, `Adafactor: Adaptive Learning Rates with Sublinear Memory Cost
    <https://arxiv.org/abs/1804.04235>`_, 2018.
    """
    adafactor = scale_by_adafactor(beta2_decay=beta2_decay, eps=eps, d=d)
    return chain(direction(maximize), adafactor, scale_by_relative_step(lr, weight_decay))


class Adafactor(Optimizer):
    """`torch.optim.Adafactor`: same signature, same numbers, same state. The mathematics is `purestep.adafactor`'s."""

    @over(adafactor)
    def __init__(
        self, params: Params, lr: Hyper = 1e-2, beta2_decay: Hyper = -0.8, eps: Floors = (None, 1e-3), d: Hyper = 1.0,
        weight_decay: Hyper = 0.0, *, foreach: bool | None = None, maximize: bool = False,
    ) -> None: ...  # fmt: skip
