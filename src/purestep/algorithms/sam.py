"""Sharpness-Aware Minimization (Foret et al., 2021): the gradient where the loss is about the worst nearby."""

from __future__ import annotations

from torch import Tensor

from purestep._core.hyper import Extra, NonNegative
from purestep._core.lists import imaginary, real
from purestep._core.maths import global_norm, multiply
from purestep._core.primitives import EmptyState
from purestep.declare import whole


@whole()
def sam(
    gs: list[Tensor], s: EmptyState, ps: list[Tensor], rho: NonNegative = 0.05, *, adaptive: bool = False, value_and_grad: Extra
) -> tuple[list[Tensor], EmptyState]:
    r"""Replace the gradient by that a step uphill, of length `rho`: so flat minima are preferred to sharp ones.

    .. math::
        \epsilon_t &= \rho\,\frac{w_t^2\,g_t}{\lVert w_t\,g_t \rVert_2}, \qquad
            w_t = \begin{cases} |p_{t-1}| & \text{adaptive} \\ 1 & \text{else} \end{cases} \\
        u_t &= \nabla f(p_{t-1} + \epsilon_t)

    The norm is that of all parameters together. It stands before the optimizer: ``chain(sam(), sgd(lr=0.1))``.

    It asks for `value_and_grad` at each `update` and `step`: a function from parameters to the loss and the gradients (of an
    optimizer of `purestep.optim` it is the closure), which is evaluated once more per update. A parameter without a gradient
    is held fixed.

    Args:
        rho: :math:`\rho \ge 0`; adaptive SAM takes it about ten times as large.
        adaptive: measure the distance relative to the size of each parameter (ASAM), so that it does not depend on how
            layers are scaled against each other.

    Raises:
        TypeError: (from `update`) `value_and_grad` is missing, or is not such a function.

    >>> import torch, purestep as ps
    >>> def value_and_grad(p):
    ...     return (p**2).sum(), 2 * p
    >>> opt, p = ps.chain(ps.sam(rho=0.5), ps.sgd(lr=0.1)), torch.tensor([3.0, 4.0])
    >>> p, _ = opt.step(2 * p, opt.init_state(p), p, value_and_grad=value_and_grad)
    >>> p  # 0.1 times the gradient at [3.3, 4.4]
    tensor([2.3400, 3.1200])

    References: Foret et al., `Sharpness-Aware Minimization for Efficiently Improving Generalization
    <https://arxiv.org/abs/2010.01412>`_, 2021; Kwon et al., `ASAM <https://arxiv.org/abs/2102.11600>`_, 2021.
    """
    weighed = list(map(weigh, gs, ps)) if adaptive else gs
    ascent = list(map(weigh, weighed, ps)) if adaptive else gs
    steps = multiply(ascent, rho / (global_norm(weighed) + 1e-12))
    _, there = value_and_grad([p + e for p, e in zip(ps, steps)])
    return there, s


def weigh(x: Tensor, p: Tensor) -> Tensor:
    """A tensor times the sizes of the elements of a parameter, of which a complex one has two."""
    if not p.is_complex():
        return x * p.abs()
    (x,), (p,) = real([x]), real([p])
    return imaginary([x * p.abs()])[0]
