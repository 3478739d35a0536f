"""Adam (Kingma & Ba, 2015), AMSGrad (Reddi et al., 2018) and AdamW (Loshchilov & Hutter, 2019)."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

from torch import Tensor, zeros_like

from purestep._core.hyper import Betas, Hyper, NonNegative
from purestep._core.maths import Scalar, counter, lerp, maximum, root
from purestep._optimizer.mirror import over
from purestep._optimizer.optimizer import Optimizer, Params
from purestep.compose import chain
from purestep.declare import leafwise
from purestep.transform import Transform
from purestep.transforms.decay import add_decayed_weights
from purestep.transforms.scale import direction, scale_by_learning_rate


class AdamState(NamedTuple):
    """The state of `scale_by_adam`."""

    step: Scalar  # t: updates so far
    exp_avg: Tensor  # m: running mean of the gradient
    exp_avg_sq: Tensor  # v: running mean of its square

    @classmethod
    def init(cls, p: Tensor) -> AdamState:
        """Before the first update."""
        return cls(counter(p), zeros_like(p), zeros_like(p))


class AmsgradState(NamedTuple):
    """The state of `scale_by_amsgrad`."""

    step: Scalar  # t: updates so far
    exp_avg: Tensor  # m: running mean of the gradient
    exp_avg_sq: Tensor  # v: running mean of its square
    max_exp_avg_sq: Tensor  # the largest v so far

    @classmethod
    def init(cls, p: Tensor) -> AmsgradState:
        """Before the first update."""
        return cls(counter(p), zeros_like(p), zeros_like(p), zeros_like(p))


def moments(g: Tensor, s: Any, betas: Any) -> AdamState:
    """One step of the counter and of the running means."""
    b1, b2 = betas
    return AdamState(s.step + 1, lerp(s.exp_avg, g, 1 - b1), b2 * s.exp_avg_sq + (1 - b2) * (g * g))


def ratio(t: Tensor, m: Tensor, v: Tensor, betas: Any, eps: Any) -> Tensor:
    """The mean over the root mean square, both unbiased."""
    b1, b2 = betas
    return m / ((1 - b1**t) * (root(v / (1 - b2**t)) + eps))


@leafwise(AdamState)
def scale_by_adam(
    g: Tensor, s: AdamState, p: Tensor, *, betas: Betas = (0.9, 0.999), eps: NonNegative = 1e-8
) -> tuple[Tensor, AdamState]:
    r"""Divide the gradient's running mean by its running root mean square, both unbiased.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1)\,g_t \\
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2)\,g_t^2 \\
        u_t &= \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}

    Args:
        betas: :math:`\beta_1, \beta_2`, each in [0, 1).
        eps: :math:`\epsilon \ge 0`, outside the root.

    >>> import torch, purestep as ps
    >>> opt, p = ps.scale_by_adam(), torch.zeros(2)
    >>> opt.update(torch.tensor([100.0, -0.01]), opt.init_state(p), p)[0]
    tensor([ 1.0000, -1.0000])

    Reference: Kingma & Ba, `Adam: A Method for Stochastic Optimization <https://arxiv.org/abs/1412.6980>`_, 2015.
    """
    s = moments(g, s, betas)
    return ratio(s.step, s.exp_avg, s.exp_avg_sq, betas, eps), s


@leafwise(AmsgradState)
def scale_by_amsgrad(
    g: Tensor, s: AmsgradState, p: Tensor, *, betas: Betas = (0.9, 0.999), eps: NonNegative = 1e-8
) -> tuple[Tensor, AmsgradState]:
    r"""`scale_by_adam`, divided by the largest second moment so far, so that steps never grow again.

    .. math::
        \hat v_t &= \max(\hat v_{t-1}, v_t) \\
        u_t &= \frac{m_t / (1 - \beta_1^t)}{\sqrt{\hat v_t / (1 - \beta_2^t)} + \epsilon}

    As in torch, the maximum is taken before the bias is removed (optax removes it first).

    Args:
        betas: decay rates :math:`\beta_1, \beta_2` of the two moments, each in [0, 1).
        eps: :math:`\epsilon \ge 0`.

    Reference: Reddi et al., `On the Convergence of Adam and Beyond <https://openreview.net/forum?id=ryQu7f-RZ>`_, 2018.
    """
    t, m, v = moments(g, s, betas)
    v_max = maximum(s.max_exp_avg_sq, v)
    return ratio(t, m, v_max, betas, eps), AmsgradState(t, m, v, v_max)


def adam(
    lr: Hyper = 1e-3,
    betas: Betas = (0.9, 0.999),
    eps: Hyper = 1e-8,
    weight_decay: Hyper = 0.0,
    amsgrad: bool = False,
    *,
    maximize: bool = False,
    decoupled_weight_decay: bool = False,
) -> Transform:
    r"""Adam. `weight_decay` is an :math:`L_2` penalty: it is added to the gradient, and goes through the moments.

    .. math:: p_t = p_{t-1} - \eta\,\mathrm{adam}(g_t + \lambda p_{t-1})

    with :math:`\mathrm{adam}` as in `scale_by_adam` (`scale_by_amsgrad` if `amsgrad`). The numbers are those of
    `torch.optim.Adam`.

    Args:
        lr: the learning rate :math:`\eta \ge 0`.
        betas: decay rates of the two moments, each in [0, 1).
        eps: added to the root; at least 0.
        weight_decay: :math:`\lambda \ge 0`.
        amsgrad: divide by the largest second moment so far.
        maximize: climb instead of descending.
        decoupled_weight_decay: decay as `adamw` does.

    >>> import torch, purestep as ps
    >>> opt, p = ps.adam(lr=0.1), torch.tensor([1.0])
    >>> state = opt.init_state(p)
    >>> p, state = opt.step(2 * p, state, p)
    >>> p
    tensor([0.9000])

    Reference: Kingma & Ba, `Adam: A Method for Stochastic Optimization <https://arxiv.org/abs/1412.6980>`_, 2015.
    """
    if decoupled_weight_decay:
        return adamw(lr, betas, eps, weight_decay, amsgrad, maximize=maximize)
    adam = (scale_by_amsgrad if amsgrad else scale_by_adam)(betas=betas, eps=eps)
    return chain(direction(maximize), add_decayed_weights(weight_decay), adam, scale_by_learning_rate(lr))


def adamw(
    lr: Hyper = 1e-3,
    betas: Betas = (0.9, 0.999),
    eps: Hyper = 1e-8,
    weight_decay: Hyper = 1e-2,
    amsgrad: bool = False,
    *,
    maximize: bool = False,
) -> Transform:
    r"""Adam with decoupled weight decay: it goes straight to the parameters, past the moments.

    .. math:: p_t = p_{t-1} - \eta\,\bigl(\mathrm{adam}(g_t) + \lambda p_{t-1}\bigr)

    The numbers are those of `torch.optim.AdamW`.

    Args:
        weight_decay: :math:`\lambda \ge 0`; each step shrinks the parameters by the share :math:`\eta \lambda`. All other
            arguments are those of `adam`.

    >>> import purestep as ps
    >>> ps.adamw(3e-4)
    chain(scale_by_adam(betas=(0.9, 0.999), eps=1e-08), add_decayed_weights(0.01), scale_by_learning_rate(0.0003))

    Reference: Loshchilov & Hutter, `Decoupled Weight Decay Regularization <https://arxiv.org/abs/1711.05101>`_, 2019.
    """
    adam = (scale_by_amsgrad if amsgrad else scale_by_adam)(betas=betas, eps=eps)
    return chain(direction(maximize), adam, add_decayed_weights(weight_decay), scale_by_learning_rate(lr))


class Adam(Optimizer):
    """`torch.optim.Adam`: same signature, same numbers, same state. The mathematics is `purestep.adam`'s."""

    @over(adam)
    def __init__(
        self, params: Params, lr: Hyper = 1e-3, betas: Betas = (0.9, 0.999), eps: Hyper = 1e-8, weight_decay: Hyper = 0.0,
        amsgrad: bool = False, *, foreach: bool | None = None, maximize: bool = False, capturable: bool = False,
        differentiable: bool = False, fused: bool | None = None, decoupled_weight_decay: bool = False, compile: bool = False,
    ) -> None: ...  # fmt: skip


class AdamW(Optimizer):
    """`torch.optim.AdamW`: same signature, same numbers, same state. The mathematics is `purestep.adamw`'s."""

    _constants: ClassVar = {"decoupled_weight_decay": True}

    @over(adamw)
    def __init__(
        self, params: Params, lr: Hyper = 1e-3, betas: Betas = (0.9, 0.999), eps: Hyper = 1e-8, weight_decay: Hyper = 1e-2,
        amsgrad: bool = False, *, maximize: bool = False, foreach: bool | None = None, capturable: bool = False,
        differentiable: bool = False, fused: bool | None = None, compile: bool = False,
    ) -> None: ...  # fmt: skip
