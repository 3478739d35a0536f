"""Change what the gradients are: their mean, their size, their NaNs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from purestep._core.maths import Scalar, counter, operation, summed
from purestep.declare import leafwise, whole
from purestep.transforms.norms import real


@operation(like=True)
def centered(g: Tensor) -> Tensor:
    """A gradient without its mean over all dimensions but the first."""
    return g - g.mean(tuple(range(1, g.ndim)), keepdim=True) if g.ndim > 1 else g.clone()


@leafwise(requires=real("centralize"))
def centralize(g: Tensor, p: Tensor) -> Tensor:
    r"""Subtract from every unit's gradient its mean, so that the unit's weights keep theirs.

    .. math:: g_i \leftarrow g_i - \operatorname{mean}(g_i)

    A unit :math:`i` is one index of the first dimension: a row of a matrix, an output channel of a convolution, with torch's
    layout of both. Vectors and 0-d parameters stay as they are.

    Raises:
        RuntimeError: (from `init_state`) a parameter is complex; the error names its path.

    >>> import torch, purestep as ps
    >>> opt, p = ps.centralize(), torch.zeros(2, 2)
    >>> opt.update(torch.tensor([[1.0, 3.0], [5.0, 5.0]]), opt.init_state(p), p)[0]
    tensor([[-1.,  1.],
            [ 0.,  0.]])

    Reference: Yong et al., `Gradient Centralization: A New Optimization Technique for Deep Neural Networks
    <https://arxiv.org/abs/2004.01461>`_, 2020.
    """
    return centered(g)


@leafwise(sparse="rows")
def sign(u: Tensor, p: Tensor) -> Tensor:
    r"""Keep nothing but the sign of every element: :math:`u \leftarrow \operatorname{sign}(u)`, which is 0 at 0.

    Of a complex parameter, the real and the imaginary part have each a sign of their own; optax divides by the modulus.

    >>> import torch, purestep as ps
    >>> opt, p = ps.chain(ps.sign(), ps.scale_by_learning_rate(0.1)), torch.zeros(3)
    >>> opt.step(torch.tensor([-300.0, 0.0, 0.2]), opt.init_state(p), p)[0]
    tensor([ 0.1000,  0.0000, -0.1000])

    Reference: Bernstein et al., `signSGD: Compressed Optimisation for Non-Convex Problems
    <https://arxiv.org/abs/1802.04434>`_, 2018.
    """
    return torch.sign(u)


class ZeroNansState(NamedTuple):
    """The state of `zero_nans`: for each parameter two numbers, in tensors of shape ()."""

    found_nan: list[Scalar]  # 1 if there was a NaN in its last update, else 0
    nan_count: list[Scalar]  # its updates so far in which there was one

    @classmethod
    def init(cls, params: list[Tensor]) -> ZeroNansState:
        """Before the first update."""
        return cls([counter(p) for p in params], [counter(p) for p in params])


@whole(ZeroNansState, sparse="rows")
def zero_nans(us: list[Tensor], s: ZeroNansState, ps: list[Tensor]) -> tuple[Any, ZeroNansState]:
    r"""Put 0 where an update is NaN, and count the updates of every parameter that had one.

    .. math:: u \leftarrow \begin{cases} 0 & u \text{ is NaN} \\ u & \text{else} \end{cases}

    The other elements of the parameter are still updated, and infinite ones are left as they are. It belongs in front of
    whatever remembers gradients. optax's transform of this name reports ``found_nan`` alone.

    >>> import torch, purestep as ps
    >>> opt = ps.chain(ps.zero_nans(), ps.sgd(lr=0.1))
    >>> params = {"a": torch.zeros(2), "b": torch.zeros(1)}
    >>> state = opt.init_state(params)
    >>> params, state = opt.step({"a": torch.tensor([float("nan"), 1.0]), "b": torch.ones(1)}, state, params)
    >>> params
    {'a': tensor([ 0.0000, -0.1000]), 'b': tensor([-0.1000])}
    >>> state[0].found_nan
    {'a': tensor(1.), 'b': tensor(0.)}
    """
    nans = [torch.isnan(u) for u in us]
    found = [(n > 0).to(old.dtype) for n, old in zip(summed(nans), s.found_nan)]
    cleared = [torch.where(x, torch.zeros_like(u), u) for x, u in zip(nans, us)]
    return cleared, ZeroNansState(found, [n + x for n, x in zip(s.nan_count, found)])
