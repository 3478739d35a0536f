"""SM3 (Anil et al., 2019): Adagrad in the memory of a matrix's rows and columns."""

from __future__ import annotations

import functools
from typing import Annotated, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, zeros_like

from purestep._core.hyper import Fraction, Hyper, Positive
from purestep._core.maths import Scalar, counter, lerp, operation, root
from purestep.compose import chain
from purestep.declare import leafwise
from purestep.transform import Transform
from purestep.transforms.norms import real
from purestep.transforms.scale import direction, scale_by_learning_rate

Slices: TypeAlias = Annotated[Tensor, "one number for each index of each dimension"]


class SM3State(NamedTuple):
    """The state of `scale_by_sm3`. What a parameter does not have is None."""

    step: Scalar  # updates so far
    exp_avg: Tensor  # m: running mean of the scaled gradient
    accumulator: Slices | None  # mu: one number for each index of each dimension, one dimension after the other
    sum: Tensor | None  # the sum of the squared gradient, of parameters with less than two dimensions

    @classmethod
    def init(cls, p: Tensor) -> SM3State:
        """Before the first update."""
        if p.ndim < 2:
            return cls(counter(p), zeros_like(p), None, zeros_like(p))
        return cls(counter(p), zeros_like(p), p.new_zeros(sum(p.shape)), None)


@operation(like=True)
def bound(mu: Any, g: Tensor) -> Tensor:
    """The least number of the slices that an element is in, plus the element's square."""
    n = g.ndim
    slices = [x.view([-1 if i == k else 1 for i in range(n)]) for k, x in enumerate(mu.split(g.shape))]
    return functools.reduce(torch.minimum, slices) + g * g


@operation
def largest(v: Tensor) -> Tensor:
    """The largest number in each slice."""
    if not v.numel():
        return v.new_zeros(sum(v.shape))
    return torch.cat([v.amax([i for i in range(v.ndim) if i != k]) for k in range(v.ndim)])


@leafwise(SM3State, requires=real("sm3"))
def scale_by_sm3(
    g: Tensor, s: SM3State, p: Tensor, *, momentum: Fraction = 0.9, eps: Positive = 1e-8
) -> tuple[Tensor, SM3State]:
    r"""Divide by the root of a bound on the sum of the squared gradients, which is kept for slices, not for elements.

    .. math::
        v_t[i, j, \dots] &= \min\bigl(\mu^1_{t-1}[i],\, \mu^2_{t-1}[j],\, \dots\bigr) + g_t[i, j, \dots]^2 \\
        \mu^1_t[i] &= \max_{j, \dots} v_t[i, j, \dots], \qquad \mu^2_t[j] = \max_{i, \dots} v_t[i, j, \dots], \qquad \dots \\
        m_t &= \beta\,m_{t-1} + (1 - \beta)\,\frac{g_t}{\sqrt{v_t + \epsilon}} \\
        u_t &= m_t

    A slice is all elements with one index of one dimension: a row, a column. Any number of dimensions will do; of a vector
    every element is a slice, and this is `scale_by_adagrad` with a mean after it. It is the paper's algorithm SM3-II.

    Args:
        momentum: :math:`\beta`, in [0, 1).
        eps: :math:`\epsilon > 0`, inside the root, as in optax. The paper has none, and takes 0/0 for 0.

    Raises:
        ValueError: a value out of its range.
        RuntimeError: (from `init_state`) a parameter is complex; the error names its path.

    >>> import torch, purestep as ps
    >>> opt, p = ps.scale_by_sm3(momentum=0.0), torch.zeros(2, 3)
    >>> state = opt.init_state(p)
    >>> for _ in range(2):
    ...     u, state = opt.update(torch.tensor([[3.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), state, p)
    >>> u  # over the root of 2 * 9 and of 2 * 1
    tensor([[0.7071, 0.0000, 0.0000],
            [0.0000, 0.7071, 0.0000]])
    >>> state.accumulator  # of two rows and three columns
    tensor([18.,  2., 18.,  2.,  0.])

    Reference: Anil et al., `Memory-Efficient Adaptive Optimization <https://arxiv.org/abs/1901.11150>`_, 2019.
    """
    v = bound(s.accumulator, g) if s.sum is None else s.sum + g * g
    m = lerp(s.exp_avg, g / root(v + eps), 1 - momentum)
    return m, SM3State(s.step + 1, m, *((largest(v), None) if s.sum is None else (None, v)))


def sm3(lr: Hyper = 0.1, momentum: Hyper = 0.9, eps: Hyper = 1e-8, *, maximize: bool = False) -> Transform:
    r"""SM3: Adagrad with momentum, whose second moments take next to no memory.

    .. math:: p_t = p_{t-1} - \eta\,\mathrm{sm3}(g_t)

    with :math:`\mathrm{sm3}` as in `scale_by_sm3`. As with Adagrad the steps get shorter by themselves; the paper warms the
    learning rate up and then leaves it constant.

    Args:
        lr: the learning rate :math:`\eta \ge 0`.
        momentum: of the running mean of the steps, in [0, 1).
        eps: inside the root; above 0.
        maximize: climb instead of descending.

    Raises:
        ValueError: a value out of its range.
        RuntimeError: (from `init_state`) a parameter is complex; the error names its path.

    >>> import torch, purestep as ps
    >>> opt, p = ps.sm3(lr=0.1, momentum=0.0), torch.ones(2, 2)
    >>> opt.step(torch.tensor([[5.0, -5.0], [0.1, 0.0]]), opt.init_state(p), p)[0]
    tensor([[0.9000, 1.1000],
            [0.9000, 1.0000]])

    Reference: Anil et al., `Memory-Efficient Adaptive Optimization <https://arxiv.org/abs/1901.11150>`_, 2019.
    """
    return chain(direction(maximize), scale_by_sm3(momentum=momentum, eps=eps), scale_by_learning_rate(lr))
