"""Backtracking line search (Armijo, 1966): shorten a step until the loss falls as it should."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from purestep._core.hyper import Extra, NonNegative, Positive, Steps, UnitInterval
from purestep._core.maths import counter, inner, minimum, multiply, number, some
from purestep.declare import whole


class BacktrackingLinesearchState(NamedTuple):
    """The state of `scale_by_backtracking_linesearch`: numbers for all parameters together, in tensors of shape ()."""

    step: Tensor  # updates so far
    learning_rate: Tensor  # the length of the last step
    evaluations: Tensor  # how often the last search evaluated the loss

    @classmethod
    def init(cls, params: list[Tensor]) -> BacktrackingLinesearchState:
        """Before the first update."""
        return cls(counter(params), number(params) + 1, counter(params))


@whole(BacktrackingLinesearchState, scales=True)
def scale_by_backtracking_linesearch(
    us: list[Tensor],
    s: BacktrackingLinesearchState,
    ps: list[Tensor],
    max_backtracking_steps: Steps = 15,
    *,
    slope_rtol: NonNegative = 1e-4,
    decrease_factor: UnitInterval = 0.8,
    increase_factor: Positive = 1.5,
    max_learning_rate: Positive = 1.0,
    atol: NonNegative = 0.0,
    rtol: NonNegative = 0.0,
    value_and_grad: Extra,
) -> tuple[Any, BacktrackingLinesearchState]:
    r"""Multiply the updates by a learning rate at which the loss falls as much as its slope promises.

    .. math:: f(p + \eta\,u) \le (1 + r)\,f(p) + c\,\eta\,\langle \nabla f(p), u \rangle + a

    The first :math:`\eta` that is tried is the last one times `increase_factor`, and each further one is
    `decrease_factor` times the one before, at most `max_backtracking_steps` times; if none will do the last is taken, unless
    the loss is not finite there: then there is no step.

    It stands at the end of a chain whose updates go down: ``chain(sgd(lr=1.0), scale_by_backtracking_linesearch())``, and asks
    for `value_and_grad` at each `update` and `step`: a function from parameters to the loss and the gradients (of an
    optimizer of `purestep.optim` it is the closure). Where values can be read the search ends when it is over. Under
    `torch.func.vmap` it goes on until it is over for all members of the batch, each of which has a learning rate of its own.

    The numbers are those of optax. There a search that found only losses that are not finite leaves a learning rate of 0,
    from which none recovers; here the next one begins where this one ended.

    Args:
        max_backtracking_steps: how often the learning rate is lowered in a search.
        slope_rtol: :math:`c \ge 0`, the part of the promised decrease that will do.
        decrease_factor: in [0, 1].
        increase_factor: above 0; 1 for learning rates that only fall.
        max_learning_rate: above 0.
        atol: :math:`a \ge 0`, how much the loss may rise.
        rtol: :math:`r \ge 0`, the same relative to the loss.

    Raises:
        TypeError: (from `update`) `value_and_grad` is missing, or is not such a function.

    >>> import torch, purestep as ps
    >>> def value_and_grad(p):
    ...     return 5 * (p**2).sum(), 10 * p
    >>> opt, p = ps.chain(ps.sgd(lr=1.0), ps.scale_by_backtracking_linesearch(decrease_factor=0.5)), torch.tensor([1.0])
    >>> p, state = opt.step(value_and_grad(p)[1], opt.init_state(p), p, value_and_grad=value_and_grad)
    >>> p, state[-1].learning_rate
    (tensor([-0.2500]), tensor(0.1250, dtype=torch.float64))

    Reference: Nocedal & Wright, *Numerical Optimization*, 2nd ed., 2006, algorithm 3.1.
    """
    f, g = value_and_grad(ps)
    f, slope = f.to(s.learning_rate), inner(us, g)
    going = torch.ones_like(f, dtype=torch.bool)
    finite = ~going
    rate, count = minimum(increase_factor * s.learning_rate, max_learning_rate), torch.zeros_like(s.evaluations)
    for k in range(max_backtracking_steps + 1):
        if not some(going):
            break
        rate = torch.where(going, decrease_factor * rate, rate) if k else rate
        there = value_and_grad([p + u for p, u in zip(ps, multiply(us, rate))])[0].to(f)
        excess = there - (1 + rtol) * f - rate * slope_rtol * slope
        count = count + going
        finite = torch.where(going, excess < torch.inf, finite)
        going = going & ~(excess <= atol)
    return torch.where(finite, rate, 0.0), BacktrackingLinesearchState(s.step + 1, rate, count)
