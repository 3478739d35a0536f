"""Keep the parameters in a set: updates that would leave it end on its border."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from purestep._core.hyper import Hyper
from purestep._core.maths import maximum, minimum
from purestep._core.primitives import EmptyState
from purestep.declare import leafwise, whole


@leafwise()
def keep_params_nonnegative(u: Tensor, p: Tensor) -> Tensor:
    r"""Change the updates so that the updated parameters are at least 0: :math:`u \leftarrow \max(u, -p)`.

    It stands at the end of a chain. What would become negative becomes exactly 0, and what is negative already does so at
    its next update. Of a complex parameter both parts are kept.

    >>> import torch, purestep as ps
    >>> opt = ps.chain(ps.sgd(lr=1.0), ps.keep_params_nonnegative())
    >>> p = torch.tensor([1.0, 1.0])
    >>> opt.step(torch.tensor([3.0, 0.5]), opt.init_state(p), p)[0]
    tensor([0.0000, 0.5000])
    """
    return maximum(u, -p)


@whole(moves=True, elementwise=True)
def project_box(
    us: list[Tensor], s: EmptyState, ps: list[Tensor], low: Hyper = -math.inf, high: Hyper = math.inf
) -> tuple[Any, EmptyState]:
    r"""Project the updated parameters on a box: every element between `low` and `high`.

    .. math:: u \leftarrow \min(\max(p + u,\, a),\, b) - p

    It stands at the end of a chain, and `step` then gives parameters within the box to the last bit; with `update`, adding
    the updates may leave it by a rounding error. For other bounds on other parameters there is `masked`. Of a complex
    parameter both parts are kept within the bounds. It is a projected gradient step only behind `sgd`: an adaptive
    algorithm measures distances otherwise.

    Args:
        low: :math:`a`; by default there is no lower bound.
        high: :math:`b`; by default there is no upper bound. Where it is below `low`, it is what parameters become.

    >>> import torch, purestep as ps
    >>> opt = ps.chain(ps.sgd(lr=1.0), ps.project_box(-1.0, 1.0))
    >>> p = torch.tensor([0.0, 0.0, 0.0])
    >>> opt.step(torch.tensor([3.0, 0.5, -3.0]), opt.init_state(p), p)[0]
    tensor([-1.0000, -0.5000,  1.0000])

    Reference: Bertsekas, `On the Goldstein-Levitin-Polyak gradient projection method
    <https://doi.org/10.1109/TAC.1976.1101194>`_, 1976.
    """
    return [within(p + u, low, high).to(p.dtype) for p, u in zip(ps, us)], s


def within(x: Tensor, low: Any, high: Any) -> Tensor:
    """Every element between two bounds."""
    if x.is_complex():
        return torch.view_as_complex(within(torch.view_as_real(x), low, high))
    bounded: Tensor = minimum(maximum(x, low), high)
    return bounded
