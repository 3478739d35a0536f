"""Adagrad (Duchi et al., 2011): steps that shrink with all the gradients so far."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from purestep._core.hyper import Hyper, NonNegative
from purestep._core.maths import Scalar, counter, filled, root
from purestep._optimizer.mirror import over
from purestep._optimizer.optimizer import Optimizer, Params
from purestep.compose import chain
from purestep.declare import leafwise
from purestep.transform import Transform
from purestep.transforms.decay import add_decayed_weights
from purestep.transforms.scale import direction, scale_by_learning_rate


class AdagradState(NamedTuple):
    """The state of `scale_by_adagrad`."""

    step: Scalar  # t: updates so far
    sum: Tensor  # v: the sum of the squared gradients

    @classmethod
    def init(cls, p: Tensor, initial_accumulator_value: float) -> AdagradState:
        """Before the first update."""
        return cls(counter(p), filled(p, initial_accumulator_value))


@leafwise(AdagradState, sparse="rows")
def scale_by_adagrad(
    g: Tensor,
    s: AdagradState,
    p: Tensor,
    *,
    lr_decay: NonNegative = 0.0,
    initial_accumulator_value: NonNegative = 0.0,
    eps: NonNegative = 1e-10,
) -> tuple[Tensor, AdagradState]:
    r"""Divide by the root of the sum of all squared gradients so far.

    .. math::
        v_t &= v_{t-1} + g_t^2 \\
        u_t &= \frac{g_t}{\bigl(\sqrt{v_t} + \epsilon\bigr)\,\bigl(1 + (t - 1)\,\gamma\bigr)}

    A sparse gradient changes only the rows that it has.

    Args:
        lr_decay: :math:`\gamma \ge 0`.
        initial_accumulator_value: :math:`v_0 \ge 0`.
        eps: :math:`\epsilon \ge 0`, outside the root.

    >>> import torch, purestep as ps
    >>> opt, p = ps.scale_by_adagrad(), torch.zeros(1)
    >>> state = opt.init_state(p)
    >>> for _ in range(4):
    ...     u, state = opt.update(torch.ones(1), state, p)
    >>> u  # 1/sqrt(4)
    tensor([0.5000])

    Reference: Duchi et al., `Adaptive Subgradient Methods for Online Learning and Stochastic Optimization
    <https://jmlr.org/papers/v12/duchi11a.html>`_, 2011.
    """
    v = s.sum + g * g
    return g / (root(v) + eps) / (1 + s.step * lr_decay), AdagradState(s.step + 1, v)


def adagrad(
    lr: Hyper = 1e-2,
    lr_decay: Hyper = 0.0,
    weight_decay: Hyper = 0.0,
    initial_accumulator_value: Hyper = 0.0,
    eps: Hyper = 1e-10,
    *,
    maximize: bool = False,
) -> Transform:
    r"""Adagrad: every coordinate has a step size of its own, which shrinks as its gradients add up.

    .. math:: p_t = p_{t-1} - \eta\,\mathrm{adagrad}(g_t + \lambda p_{t-1})

    with :math:`\mathrm{adagrad}` as in `scale_by_adagrad`. The numbers are those of `torch.optim.Adagrad`, on sparse
    gradients too.

    Args:
        lr: the learning rate :math:`\eta \ge 0`.
        lr_decay: the learning rate is divided by 1 + `lr_decay` times the number of earlier updates; at least 0.
        weight_decay: :math:`\lambda \ge 0`, an :math:`L_2` penalty; must be 0 for sparse gradients.
        initial_accumulator_value: what the sum of squares begins with; at least 0.
        eps: added to the root; at least 0.
        maximize: climb instead of descending.

    >>> import torch, purestep as ps
    >>> opt, p = ps.adagrad(lr=0.1), torch.tensor([1.0])
    >>> opt.step(2 * p, opt.init_state(p), p)[0]
    tensor([0.9000])

    Reference: Duchi et al., `Adaptive Subgradient Methods for Online Learning and Stochastic Optimization
    <https://jmlr.org/papers/v12/duchi11a.html>`_, 2011.
    """
    adagrad = scale_by_adagrad(lr_decay=lr_decay, initial_accumulator_value=initial_accumulator_value, eps=eps)
    return chain(direction(maximize), add_decayed_weights(weight_decay), adagrad, scale_by_learning_rate(lr))


class Adagrad(Optimizer):
    """`torch.optim.Adagrad`: same signature, same numbers, same state. The mathematics is `purestep.adagrad`'s."""

    @over(adagrad)
    def __init__(
        self, params: Params, lr: Hyper = 1e-2, lr_decay: Hyper = 0.0, weight_decay: Hyper = 0.0,
        initial_accumulator_value: Hyper = 0.0, eps: Hyper = 1e-10, foreach: bool | None = None, *, maximize: bool = False,
        differentiable: bool = False, fused: bool | None = None, compile: bool = False,
    ) -> None: ...  # fmt: skip

    def share_memory(self) -> None:
        """Move the state into shared memory, for training by several processes."""
        for p in [p for group in self.param_groups for p in group["params"]]:
            for x in self.state[p].values():
                if isinstance(x, Tensor):
                    x.share_memory_()  # type: ignore[no-untyped-call]
