"""ADOPT (Taniguchi et al., 2024): Adam whose second moment does not know the gradient that it divides."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from purestep._core.hyper import Betas, Hyper, Positive
from purestep._core.maths import lerp, maximum, minimum, root, where
from purestep.algorithms.adam import AdamState
from purestep.compose import chain
from purestep.declare import leafwise
from purestep.transform import Transform
from purestep.transforms.decay import add_decayed_weights
from purestep.transforms.scale import direction, scale_by_learning_rate


def clipped(n: Tensor, k: Tensor, use_clipping: bool) -> Any:
    """The normalized gradient after `k` updates."""
    return minimum(maximum(n, -(k**0.25)), k**0.25) if use_clipping else n


@leafwise(AdamState)
def scale_by_adopt(
    g: Tensor,
    s: AdamState,
    p: Tensor,
    *,
    betas: Betas = (0.9, 0.9999),
    eps: Positive = 1e-6,
    use_clipping: bool = True,
) -> tuple[Tensor, AdamState]:
    r"""Divide the gradient by the root mean square of those before it, clip that, and take its running mean.

    .. math::
        n_t &= \mathrm{clip}\Bigl(\frac{g_t}{\max(\sqrt{v_{t-1}}, \epsilon)}, \pm (t - 1)^{1/4}\Bigr) \\
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1)\,n_t, \qquad m_1 = 0 \\
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2)\,g_t^2, \qquad v_1 = g_1^2 \\
        u_t &= m_t

    There is nothing to divide the first gradient by, so the first update is 0. The clipping is that of the paper's later
    version and of the authors' code.

    Args:
        betas: :math:`\beta_1, \beta_2`, each in [0, 1).
        eps: :math:`\epsilon > 0`, the least root mean square.
        use_clipping: clip. Without it, coordinates whose first gradient was tiny take very large steps.

    >>> import torch, purestep as ps
    >>> opt, p = ps.scale_by_adopt(betas=(0.0, 0.99)), torch.zeros(2)
    >>> state = opt.init_state(p)
    >>> for g in ([4.0, 1e-3], [2.0, 1.0]):
    ...     u, state = opt.update(torch.tensor(g), state, p)
    ...     print(u)
    tensor([0., 0.])
    tensor([0.5000, 1.0000])

    Reference: Taniguchi et al., `ADOPT: Modified Adam Can Converge with Any β2 with the Optimal Rate
    <https://arxiv.org/abs/2411.02853>`_, 2024.
    """
    b1, b2 = betas
    first = s.step == 0
    n = clipped(g / maximum(root(s.exp_avg_sq), eps), s.step, use_clipping)
    m = lerp(s.exp_avg, n, where(first, 0.0, 1 - b1))
    v = b2 * s.exp_avg_sq + where(first, 1.0, 1 - b2) * (g * g)
    return m, AdamState(s.step + 1, m, v)


def adopt(
    lr: Hyper = 1e-3,
    betas: Betas = (0.9, 0.9999),
    eps: Hyper = 1e-6,
    weight_decay: Hyper = 0.0,
    use_clipping: bool = True,
    *,
    maximize: bool = False,
) -> Transform:
    r"""ADOPT: Adam that converges whatever its second beta is; with decoupled weight decay.

    .. math:: p_t = p_{t-1} - \eta\,\bigl(\mathrm{adopt}(g_t) + \lambda p_{t-1}\bigr)

    with :math:`\mathrm{adopt}` as in `scale_by_adopt`. The decay is the authors' ``decouple=True``, but that here the first
    update decays too, where theirs does nothing at all.

    Args:
        lr: the learning rate :math:`\eta \ge 0`.
        betas: decay rates of the two moments, each in [0, 1).
        eps: the least root mean square that is divided by; above 0.
        weight_decay: :math:`\lambda \ge 0`, decoupled.
        use_clipping: clip what enters the mean.
        maximize: climb instead of descending.

    Raises:
        ValueError: a value out of its range.

    >>> import torch, purestep as ps
    >>> opt, p = ps.adopt(lr=0.1, betas=(0.5, 0.99)), torch.tensor([1.0])
    >>> state = opt.init_state(p)
    >>> for _ in range(3):
    ...     p, state = opt.step(torch.tensor([2.0]), state, p)
    >>> p  # 1 - 0.1 * (0 + 1/2 + 3/4)
    tensor([0.8750])

    Reference: Taniguchi et al., `ADOPT: Modified Adam Can Converge with Any β2 with the Optimal Rate
    <https://arxiv.org/abs/2411.02853>`_, 2024.
    """
    adopt = scale_by_adopt(betas=betas, eps=eps, use_clipping=use_clipping)
    return chain(direction(maximize), adopt, add_decayed_weights(weight_decay), scale_by_learning_rate(lr))
