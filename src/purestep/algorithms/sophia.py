"""Sophia (Liu et al., 2024): the gradient's running mean over that of the Hessian's diagonal, clipped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, zeros_like

from purestep._core import tree
from purestep._core.hyper import Betas, ExtraTree, Hyper, Interval, NonNegative, Period
from purestep._core.lists import imaginary, real
from purestep._core.maths import counter, lerp, maximum, minimum, precise
from purestep._core.sharded import is_sharded, kind
from purestep.algorithms.dadapt_adamw import in_reals
from purestep.compose import chain
from purestep.declare import whole
from purestep.transform import Transform
from purestep.transforms.decay import add_decayed_weights
from purestep.transforms.noise import WORD, philox, whole_number
from purestep.transforms.scale import scale_by_learning_rate

Threshold: TypeAlias = Annotated[Any, Interval(low=0.0, above=True, optional=True)]


class SophiaState(NamedTuple):
    """The state of `scale_by_sophia`."""

    step: Tensor  # t: updates so far, a number
    exp_avg: list[Tensor]  # m: running mean of the gradient
    hessian: list[Tensor]  # h: running mean of the estimates of the Hessian's diagonal

    @classmethod
    def init(cls, params: list[Tensor]) -> SophiaState:
        """Before the first update."""
        return cls(counter(params), [zeros_like(p) for p in params], [zeros_like(p) for p in params])


@whole(SophiaState)
@in_reals
def scale_by_sophia(
    gs: list[Tensor],
    s: SophiaState,
    ps: list[Tensor],
    *,
    betas: Betas = (0.965, 0.99),
    eps: NonNegative = 1e-8,
    gamma: NonNegative = 0.01,
    clip_threshold: Threshold = 1.0,
    update_interval: Period = 10,
    maximize: bool = False,
    hessian: ExtraTree,
) -> tuple[list[Tensor], SophiaState]:
    r"""Divide the gradient's running mean by that of the Hessian's diagonal, and clip what comes of it.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1)\,g_t \\
        u_t &= \operatorname{clip}\Bigl(\frac{m_t / (1 - \beta_1^t)}{\max(\gamma h_{t-1}, \epsilon)},\,-\rho,\,\rho\Bigr) \\
        h_t &= \begin{cases} \beta_2 h_{t-1} + (1 - \beta_2)\,\hat h_t & \text{if } t - 1 \text{ is a multiple of } k \\
            h_{t-1} & \text{otherwise} \end{cases}

    It asks for :math:`\hat h_t`, an estimate of the Hessian's diagonal in the form of the parameters, at each `update` and
    `step`: ``hessian=purestep.hutchinson(loss, params, seed)``. See `sophia`.

    Args:
        betas: :math:`\beta_1, \beta_2`, each in [0, 1).
        eps: :math:`\epsilon \ge 0`, the smallest curvature.
        gamma: :math:`\gamma \ge 0`; the larger, the fewer numbers are clipped.
        clip_threshold: :math:`\rho > 0`, or None for no bound.
        update_interval: :math:`k`, at least 1. The other estimates are not looked at.
        maximize: climb: gradient and estimate change their signs. (`purestep.maximize` before it would leave out the estimate.)

    Raises:
        TypeError: (from `update`) `hessian` is missing.
        ValueError: (from `update`) `hessian` has not the parameters' structure, shapes, dtypes and devices.

    >>> import torch, purestep as ps
    >>> opt, p = ps.scale_by_sophia(gamma=1.0, betas=(0.0, 0.0)), torch.tensor([1.0, 1.0])
    >>> u, state = opt.update(torch.tensor([2.0, 200.0]), opt.init_state(p), p, hessian=torch.tensor([4.0, 400.0]))
    >>> u, opt.update(torch.tensor([2.0, 200.0]), state, p, hessian=torch.zeros(2))[0]
    (tensor([1., 1.]), tensor([0.5000, 0.5000]))

    Reference: Liu et al., `Sophia: A Scalable Stochastic Second-order Optimizer for Language Model Pre-training
    <https://arxiv.org/abs/2305.14342>`_, 2024.
    """
    b1, b2 = betas
    sign = -1.0 if maximize else 1.0
    due, bias = s.step % update_interval == 0, 1 - b1 ** (s.step.to(precise(s.step.device)) + 1)
    m = [lerp(x, sign * g, 1 - b1) for x, g in zip(s.exp_avg, gs)]
    us = [x / bias.to(x.device) / maximum(gamma * h, eps) for x, h in zip(m, s.hessian)]
    if clip_threshold is not None:
        us = [minimum(maximum(u, -clip_threshold), clip_threshold) for u in us]
    new = [torch.where(due.to(h.device), sign * x, h) for h, x in zip(s.hessian, real(hessian))]
    return us, SophiaState(s.step + 1, m, [lerp(h, x, 1 - b2) for h, x in zip(s.hessian, new)])


def sophia(
    lr: Hyper = 1e-4,
    betas: Betas = (0.965, 0.99),
    eps: Hyper = 1e-8,
    weight_decay: Hyper = 1e-4,
    *,
    gamma: Hyper = 0.01,
    clip_threshold: Threshold = 1.0,
    update_interval: Period = 10,
    maximize: bool = False,
) -> Transform:
    r"""Sophia-H: steps as long as the curvature lets them be, coordinate by coordinate, and never longer than `lr`.

    .. math:: p_t = p_{t-1} - \eta\,\bigl(\mathrm{sophia}(g_t, \hat h_t) + \lambda p_{t-1}\bigr)

    with :math:`\mathrm{sophia}` as in `scale_by_sophia`. It asks for an estimate :math:`\hat h_t` of the diagonal of the
    Hessian at each `update` and `step`: a pytree like the parameters, such as `hutchinson` makes. Only every
    `update_interval`-th is looked at, the first among them; on the other steps anything of that form will do, for example the
    gradients. An optimizer of `purestep.optim` cannot give it.

    The numbers are those of ``optax.contrib.sophia``. As there, an estimate counts from the next update on, and the mean of the
    gradients is unbiased; the paper's algorithm 3 uses the estimate at once, and the mean as it is. The first update is then
    the sign of the gradient, where that is not tiny. With the Gauss-Newton-Bartlett estimate as `hessian` it is Sophia-G, but
    the defaults are for Hutchinson's.

    Args:
        lr: the learning rate :math:`\eta \ge 0`.
        betas: :math:`\beta_1, \beta_2`, each in [0, 1).
        eps: :math:`\epsilon \ge 0`, the smallest curvature.
        weight_decay: :math:`\lambda \ge 0`, decoupled. The paper has 0.2.
        gamma: :math:`\gamma \ge 0`; the larger, the fewer numbers are clipped.
        clip_threshold: :math:`\rho > 0`, or None for no bound.
        update_interval: how many steps one estimate lasts, at least 1.
        maximize: climb instead of descending; the estimate is that of the loss that is climbed.

    Raises:
        TypeError: (from `update`) `hessian` is missing.
        ValueError: (from `update`) `hessian` has not the parameters' structure, shapes, dtypes and devices.

    >>> import torch, purestep as ps
    >>> def loss(p):
    ...     return 50 * p["a"].square().sum() + 0.5 * p["b"].square().sum()
    >>> opt = ps.sophia(lr=0.1, gamma=1.0, update_interval=5, betas=(0.5, 0.5), weight_decay=0.0)
    >>> p = {"a": torch.tensor([1.0]), "b": torch.tensor([1.0])}
    >>> state = opt.init_state(p)
    >>> for t in range(60):
    ...     g = torch.func.grad(loss)(p)
    ...     estimate = ps.hutchinson(loss, p, seed=t) if t % 5 == 0 else g
    ...     p, state = opt.step(g, state, p, hessian=estimate)
    >>> bool(loss(p) < 1e-4)  # though one curvature is a hundred times the other
    True

    Reference: Liu et al., `Sophia: A Scalable Stochastic Second-order Optimizer for Language Model Pre-training
    <https://arxiv.org/abs/2305.14342>`_, 2024.
    """
    options: dict[str, Any] = {"gamma": gamma, "clip_threshold": clip_threshold, "update_interval": update_interval}
    sophia = scale_by_sophia(betas=betas, eps=eps, **options, maximize=maximize)
    return chain(sophia, add_decayed_weights(weight_decay), scale_by_learning_rate(lr))


def hutchinson(loss: Callable[[Any], Tensor], params: Any, seed: Any = 0) -> Any:
    r"""Hutchinson's estimate of the diagonal of a loss's Hessian: a pytree like the parameters.

    .. math:: \hat h = u \odot (H u), \qquad u_i = \pm 1 \text{ at random}

    It is unbiased, exact where the Hessian is diagonal, and costs about as much as two gradients: it is the derivative of the
    gradient in the direction `u`. The signs depend on the seed alone (and on a parameter's place), so it is a pure function,
    also under `torch.func.vmap`, where a batch of seeds makes independent estimates, and `torch.compile`. Take another seed at
    each step. A complex parameter is a pair of reals.

    Args:
        loss: a function from parameters to a 0-d tensor, whose gradient has a forward-mode derivative.
        params: any pytree of tensors; `None` is a leaf without a parameter.
        seed: a whole number of at least 0, or a 0-d tensor.

    Returns:
        a pytree of the structure of `params`, in its shapes and dtypes; `None` where that is.

    Raises:
        TypeError: a parameter is a `DTensor`; the error names its path.

    >>> import torch, purestep as ps
    >>> def loss(p):
    ...     return (p["w"] ** 3).sum() + p["w"].prod()
    >>> p = {"w": torch.tensor([1.0, 2.0])}
    >>> ps.hutchinson(loss, p, seed=0)  # the diagonal is 6 w
    {'w': tensor([ 5., 11.])}
    >>> seeds = torch.arange(1000)
    >>> torch.func.vmap(lambda seed: ps.hutchinson(loss, p, seed)["w"])(seeds).mean(0).round()
    tensor([ 6., 12.])

    Reference: Hutchinson, `A Stochastic Estimator of the Trace of the Influence Matrix for Laplacian Smoothing Splines
    <https://doi.org/10.1080/03610919008812866>`_, 1990.
    """
    leaves, spec = tree.flatten(params)
    places = [k for k, p in enumerate(leaves) if p is not None]

    def whole(given: Any) -> Any:
        found: list[Any] = [None] * len(leaves)
        for k, x in zip(places, given):
            found[k] = x
        return tree.unflatten(found, spec)

    def listed(*given: Tensor) -> Tensor:
        return loss(whole([torch.view_as_complex(x) if leaves[k].is_complex() else x for k, x in zip(places, given)]))

    odd = next((k for k in places if is_sharded(leaves[k])), None)
    if odd is not None:
        raise TypeError(
            f"hutchinson takes whole tensors, but {tree.quote(spec.paths()[odd])} is {kind(leaves[odd])}: give it "
            "full_tensor(), and spread what comes of it with torch.distributed.tensor.distribute_tensor."
        )
    at = tuple(real([leaves[k] for k in places]))
    u = tuple([signs(x, whole_number(seed, x.device), k) for k, x in zip(places, at)])
    hu = torch.func.jvp(torch.func.grad(listed, argnums=tuple(range(len(at)))), at, u)[1] if at else ()
    found = [x * y for x, y in zip(u, hu)]
    return whole([imaginary([x])[0] if leaves[k].is_complex() else x for k, x in zip(places, found)])


def signs(like: Tensor, seed: Tensor, place: int) -> Tensor:
    """1 or -1 for each element of a real tensor, from the bits of Philox's words; `add_noise` uses other counters."""
    n = like.numel()
    block = torch.arange((n + 127) // 128, device=like.device)
    zero = torch.zeros_like(block)
    words = torch.stack(philox((block, zero + place, zero, zero), (seed & WORD, seed >> 32)), -1)
    bits = (words.unsqueeze(-1) >> torch.arange(32, device=like.device)) & 1
    return (1 - 2 * bits.reshape(-1)[:n]).reshape(like.shape).to(like.dtype)
