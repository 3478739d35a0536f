"""AdEMAMix (Pagliardini et al., 2024): Adam with a second running mean, of a very long memory."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, zeros_like

from purestep._core.hyper import Hyper, NonNegative
from purestep._core.maths import Scalar, counter, lerp, root
from purestep.algorithms.adan import ThreeBetas
from purestep.compose import chain
from purestep.declare import leafwise
from purestep.transform import Transform
from purestep.transforms.decay import add_decayed_weights
from purestep.transforms.scale import direction, scale_by_learning_rate


class AdEMAMixState(NamedTuple):
    """The state of `scale_by_ademamix`."""

    step: Scalar  # t: updates so far
    exp_avg_fast: Tensor  # m1: running mean of the gradient
    exp_avg_slow: Tensor  # m2: the same with a longer memory
    exp_avg_sq: Tensor  # v: running mean of its square

    @classmethod
    def init(cls, p: Tensor) -> AdEMAMixState:
        """Before the first update."""
        return cls(counter(p), zeros_like(p), zeros_like(p), zeros_like(p))


@leafwise(AdEMAMixState)
def scale_by_ademamix(
    g: Tensor,
    s: AdEMAMixState,
    p: Tensor,
    *,
    betas: ThreeBetas = (0.9, 0.999, 0.9999),
    alpha: NonNegative = 5.0,
    eps: NonNegative = 1e-8,
) -> tuple[Tensor, AdEMAMixState]:
    r"""`scale_by_adam` with a mixture of two running means: one that is recent, and one that goes far back.

    .. math::
        m^{(1)}_t &= \beta_1 m^{(1)}_{t-1} + (1 - \beta_1)\,g_t, \qquad
        m^{(2)}_t = \beta_3 m^{(2)}_{t-1} + (1 - \beta_3)\,g_t \\
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2)\,g_t^2 \\
        u_t &= \frac{m^{(1)}_t / (1 - \beta_1^t) + \alpha\,m^{(2)}_t}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}

    The bias of the slow mean is left in: it is to fill up slowly.

    Args:
        betas: :math:`\beta_1, \beta_2, \beta_3`, each in [0, 1).
        alpha: :math:`\alpha \ge 0`, the share of the slow mean; the paper has 4 to 10.
        eps: :math:`\epsilon \ge 0`, outside the root.

    >>> import torch, purestep as ps
    >>> opt, p = ps.scale_by_ademamix(betas=(0.9, 0.999, 0.5), alpha=2.0), torch.zeros(2)
    >>> opt.update(torch.tensor([100.0, -0.01]), opt.init_state(p), p)[0]  # Adam's 1, and 2 * 0.5
    tensor([ 2.0000, -2.0000])

    Reference: Pagliardini et al., `The AdEMAMix Optimizer: Better, Faster, Older <https://arxiv.org/abs/2409.03137>`_, 2024.
    """
    b1, b2, b3 = betas
    t = s.step + 1
    fast, slow = lerp(s.exp_avg_fast, g, 1 - b1), lerp(s.exp_avg_slow, g, 1 - b3)
    v = b2 * s.exp_avg_sq + (1 - b2) * (g * g)
    u = (1 / (1 - b1**t) * fast + alpha * slow) / (root(v / (1 - b2**t)) + eps)
    return u, AdEMAMixState(t, fast, slow, v)


def ademamix(
    lr: Hyper = 1e-3,
    betas: ThreeBetas = (0.9, 0.999, 0.9999),
    alpha: Hyper = 5.0,
    eps: Hyper = 1e-8,
    weight_decay: Hyper = 0.0,
    *,
    maximize: bool = False,
) -> Transform:
    r"""AdEMAMix: AdamW with a mixture of two running means, one of which remembers tens of thousands of gradients.

    .. math:: p_t = p_{t-1} - \eta\,\bigl(\mathrm{ademamix}(g_t) + \lambda p_{t-1}\bigr)

    with :math:`\mathrm{ademamix}` as in `scale_by_ademamix`.

    The paper lets :math:`\alpha` and :math:`\beta_3` grow over the first part of training: :math:`\alpha` in a straight line
    from 0, :math:`\beta_3` from :math:`\beta_1` so that its half-life, :math:`\ln 0.5 / \ln \beta_3`, grows in a straight
    line. Any hyperparameter may be a schedule, so these two are, as in the example. (The authors' schedulers count updates
    from 1, schedules here from 0: give them ``t + 1`` for the same numbers.)

    Args:
        lr: the learning rate :math:`\eta \ge 0`.
        betas: decay rates of the fast mean, of the second moment and of the slow mean, each in [0, 1).
        alpha: the share of the slow mean; at least 0.
        eps: added to the root; at least 0.
        weight_decay: :math:`\lambda \ge 0`, decoupled.
        maximize: climb instead of descending.

    Raises:
        ValueError: a value out of its range.

    >>> import math, torch, purestep as ps
    >>> half_lives = [math.log(0.5) / math.log(beta) for beta in (0.9, 0.9999)]
    >>> half_life = ps.schedules.linear(*half_lives, total_steps=10_000)
    >>> beta3 = lambda t: 0.5 ** (1 / half_life(t))
    >>> [round(beta3(t), 5) for t in (0, 1, 100, 10_000)]
    [0.9, 0.90908, 0.9909, 0.9999]
    >>> opt = ps.ademamix(lr=0.1, betas=(0.9, 0.999, beta3), alpha=ps.schedules.linear(0.0, 5.0, total_steps=10_000))
    >>> p = torch.tensor([1.0])
    >>> opt.step(2 * p, opt.init_state(p), p)[0]  # at first it is Adam
    tensor([0.9000])

    Reference: Pagliardini et al., `The AdEMAMix Optimizer: Better, Faster, Older <https://arxiv.org/abs/2409.03137>`_, 2024.
    """
    ademamix = scale_by_ademamix(betas=betas, alpha=alpha, eps=eps)
    return chain(direction(maximize), ademamix, add_decayed_weights(weight_decay), scale_by_learning_rate(lr))
