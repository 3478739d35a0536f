"""Smaller updates when the loss stops falling."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from purestep._core.hyper import Extra, Fraction, NonNegative, Steps, UnitInterval
from purestep._core.maths import maximum, precise, where
from purestep.declare import whole


class ReduceOnPlateauState(NamedTuple):
    """The state of `reduce_on_plateau`: numbers for all parameters together, in tensors of shape ()."""

    scale: Tensor  # what updates are multiplied by
    best_value: Tensor  # the least mean so far; before the first the largest number there is
    avg_value: Tensor  # the mean of the values since the last comparison
    avg_count: Tensor  # how many these are
    plateau_count: Tensor  # comparisons since the last better mean
    cooldown_count: Tensor  # comparisons to come that do not count

    @classmethod
    def init(cls, params: list[Tensor]) -> ReduceOnPlateauState:
        """Before the first update."""
        device = params[0].device if params else torch.device("cpu")
        dtype = precise(device)
        first = (1.0, torch.finfo(dtype).max, 0.0, 0.0, 0.0, 0.0)
        return cls(*[torch.full((), x, dtype=dtype, device=device) for x in first])


@whole(ReduceOnPlateauState, scales=True, sparse="rows", elementwise=True)
def reduce_on_plateau(
    us: list[Tensor],
    s: ReduceOnPlateauState,
    ps: list[Tensor],
    value: Extra,
    factor: UnitInterval = 0.1,
    patience: Steps = 10,
    *,
    rtol: Fraction = 1e-4,
    atol: NonNegative = 0.0,
    cooldown: Steps = 0,
    accumulation_size: Steps = 1,
    min_scale: NonNegative = 0.0,
) -> tuple[Any, ReduceOnPlateauState]:
    r"""Multiply the updates by a scale that falls by a factor whenever the loss has not improved for a while.

    The scale begins at 1. The loss is averaged over `accumulation_size` updates, and the mean :math:`v` is compared with the
    best so far: it is better if :math:`v < (1 - r)\,v_{\text{best}} - a`. When it was not better `patience` times in a row,

    .. math:: c \leftarrow \max(\gamma\,c,\, c_{\min})

    and the next `cooldown` comparisons do not count. Updates are multiplied by :math:`c` at once.

    It asks for `value`, the loss, at each `update` and `step`; an optimizer of `purestep.optim` takes it from the closure. No
    value is read, so a device never waits, and under `torch.func.vmap` every member has a scale of its own. No derivative goes
    through the loss.

    The numbers are those of ``optax.contrib.reduce_on_plateau``. `torch.optim.lr_scheduler.ReduceLROnPlateau`, which is
    given one loss per epoch, waits for one bad epoch more: its ``patience`` is 1 less, and its ``threshold`` is `rtol`.

    Args:
        value: the loss, a 0-d tensor or a number; smaller is better.
        factor: :math:`\gamma`, in [0, 1].
        patience: how many comparisons without improvement make a plateau; 0 is as 1.
        rtol: :math:`r`, in [0, 1).
        atol: :math:`a \ge 0`.
        cooldown: how many comparisons after a reduction do not count.
        accumulation_size: how many updates' losses are averaged for a comparison, such as the number of batches in an epoch;
            0 is as 1.
        min_scale: :math:`c_{\min} \ge 0`.

    >>> import torch, purestep as ps
    >>> opt = ps.chain(ps.sgd(lr=1.0), ps.reduce_on_plateau(0.5, patience=2))
    >>> p = torch.zeros(())
    >>> state = opt.init_state(p)
    >>> scales = []
    >>> for loss in (4.0, 3.0, 3.0, 3.0, 2.0, 2.0, 2.0):
    ...     p, state = opt.step(torch.ones(()), state, p, value=loss)
    ...     scales.append(state[-1].scale.item())
    >>> scales
    [1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.25]
    """
    count = s.avg_count + 1
    average = (s.avg_count * s.avg_value + torch.as_tensor(value).detach().to(s.avg_value)) / count
    full, cooling = count >= accumulation_size, s.cooldown_count > 0
    better = average < (1 - rtol) * s.best_value - atol
    bad = where(better, 0.0, s.plateau_count + 1)
    reduce = full & ~cooling & ~better & (bad >= patience)
    scale = where(reduce, maximum(factor * s.scale, min_scale), s.scale)
    new = ReduceOnPlateauState(
        scale=scale,
        best_value=where(full & better, average, s.best_value),
        avg_value=where(full, 0.0, average),
        avg_count=where(full, 0.0, count),
        plateau_count=where(full, where(cooling | reduce, 0.0, bad), s.plateau_count),
        cooldown_count=where(reduce, float(cooldown), where(full & cooling, s.cooldown_count - 1, s.cooldown_count)),
    )
    return scale, new
