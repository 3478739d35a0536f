"""Gradient noise, reproducible from a seed.

The noise of one number is a function of the seed, the step, the parameter's place and the number's place in it: a counter,
enciphered. There is no generator to carry along or to save, any part of the noise can be made again, and it is written in
integer arithmetic on tensors, so that `torch.func.vmap` batches it.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from purestep._core import sharded
from purestep._core.hyper import Interval, NonNegative
from purestep._core.maths import Scalar, counter, precise, root
from purestep.declare import whole

Seed: TypeAlias = Annotated[Any, Interval(low=0.0, high=2.0**53)]

WORD = 2**32 - 1
SIZE = 2**14  # counters at a time on a CPU, so that they stay in the cache
MULTIPLIERS, WEYL = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)


def philox(count: tuple[Any, Any, Any, Any], key: tuple[Any, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four words of 32 random bits for each counter of four words; a word is a number in an int64."""
    a, b, c, d = count
    k, l = key  # noqa: E741
    for _ in range(10):
        x, y = MULTIPLIERS[0] * a, MULTIPLIERS[1] * c  # modulo 2^64: what is beyond the sign bit is there all the same
        a, b, c, d = (y >> 32) & WORD ^ b ^ k, y & WORD, (x >> 32) & WORD ^ d ^ l, x & WORD
        k, l = (k + WEYL[0]) & WORD, (l + WEYL[1]) & WORD  # noqa: E741
    return a, b, c, d


def normal(like: Tensor, seed: Tensor, step: Tensor, place: Tensor) -> Tensor:
    """Standard normal numbers in the shape of a real tensor: Box & Muller's of Philox's."""
    dtype, n = torch.promote_types(like.dtype, torch.float32), like.numel()
    count = max((n + 3) // 4, 1)
    size = SIZE if like.is_cpu and not torch.compiler.is_compiling() else count
    parts: list[Tensor] = []
    for start in range(0, count, size):
        block = torch.arange(start, min(start + size, count), device=like.device)
        words = philox((block, place, step & WORD, step >> 32), (seed & WORD, seed >> 32))
        u, angle, v, other = [(w.to(dtype) + 0.5) * 2.0**-32 for w in words]  # within (0, 1)
        four = [
            f(2 * math.pi * turn) * torch.sqrt(-2 * torch.log(length))
            for length, turn in ((u, angle), (v, other))
            for f in (torch.cos, torch.sin)
        ]
        parts.append(torch.stack(four, -1).reshape(-1))
    return torch.cat(parts)[:n].reshape(like.shape)


class AddNoiseState(NamedTuple):
    """The state of `add_noise`. What else the noise depends on is the transform's own seed."""

    step: Tensor  # updates so far, of all parameters together: in a tensor of shape ()
    place: list[Scalar]  # the parameter's number among the others: in a tensor of shape ()

    @classmethod
    def init(cls, params: list[Tensor]) -> AddNoiseState:
        """Before the first update."""
        return cls(counter(params[0] if params else torch.zeros(())), [counter(p) + k for k, p in enumerate(params)])


@whole(AddNoiseState)
def add_noise(
    us: list[Tensor], s: AddNoiseState, ps: list[Tensor], eta: NonNegative, gamma: NonNegative = 0.55, *, seed: Seed = 0
) -> tuple[Any, AddNoiseState]:
    r"""Add normal noise, whose variance falls, to every number.

    .. math:: u_t \leftarrow u_t + \sigma_t\,\varepsilon_t, \qquad \varepsilon_t \sim \mathcal N(0, 1), \qquad
        \sigma_t^2 = \frac{\eta}{(1 + t)^\gamma}, \quad t = 0, 1, \dots

    The same seed gives the same noise, in every mode, after a checkpoint too. Under `torch.func.vmap` a batch of seeds makes
    independent noise; with one seed for all, members get the same. A parameter's noise does not depend on the others': it is
    the same if one of them has no gradient. Of a complex parameter the real and the imaginary part get noise of this variance
    each.

    Random numbers are Philox4x32-10's (Salmon et al.), keyed by the seed and counted by step, parameter and element. They are
    not those of ``optax.add_noise``, which splits a key of jax's; the variances are.

    Parameters are numbered as `init_state` finds them. An optimizer of `purestep.optim` numbers them in the order of its
    groups, and a `partition` makes groups, so its noise may be that of other places than under `Transform.step`.

    Args:
        eta: :math:`\eta \ge 0`, the variance of the first update's noise; the paper has 0.01, 0.3 and 1.
        gamma: :math:`\gamma \ge 0`, the power of its fall.
        seed: a whole number of at least 0, or a 0-d tensor. It is rounded to one, and has no derivative.

    >>> import torch, purestep as ps
    >>> opt, p = ps.add_noise(eta=0.01, seed=1), torch.zeros(10_000)
    >>> u, _ = opt.update(torch.zeros(10_000), opt.init_state(p), p)
    >>> again, _ = opt.update(torch.zeros(10_000), opt.init_state(p), p)
    >>> round(u.std().item(), 2), torch.equal(u, again)
    (0.1, True)
    >>> def first(opt):
    ...     return opt.update(torch.zeros(3), opt.init_state(p[:3]), p[:3])[0]
    >>> seeds = ps.add_noise(eta=0.01, seed=torch.tensor([1, 2]))
    >>> members = torch.func.vmap(first, in_dims=(ps.in_dims(seeds),))(seeds)
    >>> torch.equal(members[0], first(opt)), torch.equal(members[1], first(opt))
    (True, False)

    Reference: Neelakantan et al., `Adding Gradient Noise Improves Learning for Very Deep Networks
    <https://arxiv.org/abs/1511.06807>`_, 2015; Salmon et al., `Parallel Random Numbers: As Easy as 1, 2, 3
    <https://doi.org/10.1145/2063384.2063405>`_, 2011.
    """
    step = s.step + 1
    deviation, key = root(eta / step.to(precise(step.device)) ** gamma), whole_number(seed, step.device)
    noisy = []
    for u, place in zip(us, s.place):
        counts = [x.to(u.device, torch.int64) for x in (key, step, place)]
        noisy.append((u + deviation.to(u.device) * noise(u, *counts)).to(u.dtype))
    return noisy, AddNoiseState(step, s.place)


def whole_number(seed: Any, device: torch.device) -> Tensor:
    """A seed as 64 bits."""
    if isinstance(seed, Tensor):
        return (seed.round() if seed.is_floating_point() else seed).to(device, torch.int64)
    return torch.full((), round(seed), dtype=torch.int64, device=device)  # made there: no copy to wait for


def noise(u: Tensor, *counts: Tensor) -> Tensor:
    """Standard normal numbers in the shape of a tensor; spread as it is, if it is spread over processes."""
    if sharded.is_sharded(u):
        return sharded.spread(noise(torch.empty(u.shape, dtype=u.dtype, device=u.device), *counts), u)
    return torch.view_as_complex(normal(torch.view_as_real(u), *counts)) if u.is_complex() else normal(u, *counts)
