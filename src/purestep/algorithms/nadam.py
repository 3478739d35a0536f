"""NAdam (Dozat, 2016): Adam with Nesterov's momentum."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, zeros_like

from purestep._core.hyper import Betas, Hyper, NonNegative
from purestep._core.maths import Scalar, counter, lerp, root, rounded
from purestep._optimizer.mirror import over
from purestep._optimizer.optimizer import Optimizer, Params
from purestep.compose import chain
from purestep.declare import leafwise
from purestep.transform import Transform
from purestep.transforms.decay import add_decayed_weights
from purestep.transforms.scale import direction, scale_by_learning_rate


class NAdamState(NamedTuple):
    """The state of `scale_by_nadam`."""

    step: Scalar  # t: updates so far
    mu_product: Scalar  # the product of all momenta so far
    exp_avg: Tensor  # m: running mean of the gradient
    exp_avg_sq: Tensor  # v: running mean of its square

    @classmethod
    def init(cls, p: Tensor) -> NAdamState:
        """Before the first update."""
        return cls(counter(p), counter(p) + 1, zeros_like(p), zeros_like(p))


def momentum(t: Any, b1: Any, decay: Any) -> Any:
    """The momentum of update t: it grows from about b1/2 to b1."""
    return b1 * (1 - 0.5 * 0.96 ** (t * decay))


@leafwise(NAdamState)
def scale_by_nadam(
    g: Tensor,
    s: NAdamState,
    p: Tensor,
    *,
    betas: Betas = (0.9, 0.999),
    eps: NonNegative = 1e-8,
    momentum_decay: NonNegative = 4e-3,
) -> tuple[Tensor, NAdamState]:
    r"""`scale_by_adam` that looks ahead: the mean is that of the next update, under a momentum that grows.

    .. math::
        \mu_t &= \beta_1 \bigl(1 - \tfrac12\,0.96^{t \psi}\bigr) \\
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1)\,g_t, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2)\,g_t^2 \\
        \hat m_t &= \frac{1 - \mu_t}{1 - \prod_{i=1}^t \mu_i}\,g_t + \frac{\mu_{t+1}}{1 - \prod_{i=1}^{t+1} \mu_i}\,m_t \\
        u_t &= \frac{\hat m_t}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}

    Args:
        betas: :math:`\beta_1, \beta_2`, each in [0, 1).
        eps: :math:`\epsilon \ge 0`, outside the root.
        momentum_decay: :math:`\psi \ge 0`, how fast the momentum grows.

    >>> import torch, purestep as ps
    >>> opt, p = ps.scale_by_nadam(), torch.zeros(2)
    >>> u, state = opt.update(torch.tensor([1.0, -1.0]), opt.init_state(p), p)
    >>> state.mu_product  # 0.9 (1 - 0.96^0.004 / 2)
    tensor(0.4501)

    Reference: Dozat, `Incorporating Nesterov Momentum into Adam <https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ>`_,
    2016.
    """
    b1, b2 = betas
    t = s.step + 1
    now, following = momentum(t, b1, momentum_decay), momentum(t + 1, b1, momentum_decay)
    product = rounded(s.mu_product * rounded(now))  # as torch multiplies it
    m = lerp(s.exp_avg, g, 1 - b1)
    v = b2 * s.exp_avg_sq + (1 - b2) * (g * g)
    ahead = (1 - now) / (1 - product) * g + following / (1 - product * following) * m
    return ahead / (root(v / (1 - b2**t)) + eps), NAdamState(t, product, m, v)


def nadam(
    lr: Hyper = 2e-3,
    betas: Betas = (0.9, 0.999),
    eps: Hyper = 1e-8,
    weight_decay: Hyper = 0.0,
    momentum_decay: Hyper = 4e-3,
    decoupled_weight_decay: bool = False,
    *,
    maximize: bool = False,
) -> Transform:
    r"""NAdam: Adam with Nesterov's momentum.

    .. math::
        p_t = p_{t-1} - \eta\,\mathrm{nadam}(g_t + \lambda p_{t-1}) \qquad\text{or, decoupled,}\qquad
        p_t = p_{t-1} - \eta\,\bigl(\mathrm{nadam}(g_t) + \lambda p_{t-1}\bigr)

    with :math:`\mathrm{nadam}` as in `scale_by_nadam`. The numbers are those of `torch.optim.NAdam`.

    Args:
        lr: the learning rate :math:`\eta \ge 0`.
        betas: decay rates of the two moments, each in [0, 1).
        eps: added to the root; at least 0.
        weight_decay: :math:`\lambda \ge 0`.
        momentum_decay: how fast the momentum grows to :math:`\beta_1`; at least 0.
        decoupled_weight_decay: decay past the moments, as `adamw` does.
        maximize: climb instead of descending.

    >>> import torch, purestep as ps
    >>> opt, p = ps.nadam(lr=0.1), torch.tensor([1.0])
    >>> state = opt.init_state(p)
    >>> for _ in range(100):
    ...     p, state = opt.step(2 * p, state, p)
    >>> bool(p.abs() < 0.02)
    True

    Reference: Dozat, `Incorporating Nesterov Momentum into Adam <https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ>`_,
    2016.
    """
    decay = add_decayed_weights(weight_decay)
    nadam = scale_by_nadam(betas=betas, eps=eps, momentum_decay=momentum_decay)
    parts = (nadam, decay) if decoupled_weight_decay else (decay, nadam)
    return chain(direction(maximize), *parts, scale_by_learning_rate(lr))


class NAdam(Optimizer):
    """`torch.optim.NAdam`: same signature, same numbers, same state. The mathematics is `purestep.nadam`'s."""

    @over(nadam)
    def __init__(
        self, params: Params, lr: Hyper = 2e-3, betas: Betas = (0.9, 0.999), eps: Hyper = 1e-8, weight_decay: Hyper = 0.0,
        momentum_decay: Hyper = 4e-3, decoupled_weight_decay: bool = False, *, foreach: bool | None = None,
        maximize: bool = False, capturable: bool = False, differentiable: bool = False, compile: bool = False,
    ) -> None: ...  # fmt: skip
