"""Parameters of 16 bits: what each step would round away is kept, or is right in the mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from purestep._core import sharded
from purestep._core.cache import DERIVED, Shared
from purestep._core.hyper import Interval
from purestep._core.maths import Scalar, counter, where
from purestep._core.primitives import LinkDeclaration, Primitive, forwards
from purestep._engine.nesting import Inner
from purestep.compose import Relinked, check_transform
from purestep.declare import nested
from purestep.transform import Transform
from purestep.transforms.noise import whole_number
from purestep.transforms.quantize import chance, up_or_down

Seed: TypeAlias = Annotated[Any, Interval(low=0.0, high=2.0**31)]

HALF = (torch.bfloat16, torch.float16)

# ------------------------------------------------------------------------------------------------------ the dtype of a state


class StateDtypeDeclaration(LinkDeclaration):
    """A declared transform whose state begins as that of parameters of another dtype."""

    def __init__(self, plain: LinkDeclaration, dtype: torch.dtype) -> None:
        self.__dict__.update(plain.__dict__)
        self.plain, self.state_dtype, self.derived = plain, dtype, Shared(DERIVED)

    def __reduce__(self) -> tuple[Any, ...]:
        return declared, (self.plain, self.state_dtype)


def declared(plain: LinkDeclaration, dtype: torch.dtype) -> StateDtypeDeclaration:
    """The declaration of a transform with a state in this dtype: there is one of each."""
    found: StateDtypeDeclaration = plain.derived.get(dtype, lambda: StateDtypeDeclaration(plain, dtype))
    return found


def with_dtype(value: Primitive, dtype: torch.dtype) -> Primitive:
    """The transform of one link with a state in this dtype, if it has a state that does not have its dtype already.

    What treats parameters of 16 bits in a way of its own must see that they have 16 bits: it computes in float32 anyway.
    """
    d = value.declaration
    if d.state is None or d.state_dtype is not None or d.state in (MasterWeightsState, StochasticRoundingState, KahanState):
        return value
    return type(value)(declared(d, dtype), value.arguments)


def without_dtype(value: Primitive) -> Primitive:
    """`with_dtype` undone."""
    d = value.declaration
    return type(value)(d.plain, value.arguments) if isinstance(d, StateDtypeDeclaration) else value


class StateDtype(Relinked):
    """A transform with a state in another dtype; made with `state_dtype`."""

    __slots__ = ()
    _plain = staticmethod(without_dtype)

    def _made(self, value: Primitive) -> Primitive:
        return with_dtype(value, *self.context)

    def __repr__(self) -> str:
        return f"state_dtype({self.children[0]!r}, {self.context[0]})"


def state_dtype(transform: Transform, dtype: torch.dtype) -> Transform:
    """Keep the state of any transform in a dtype that is wider than that of the parameters.

    The usual one is float32, for parameters of 16 bits: an update is then computed in float32, from gradients and parameters
    that are widened for it, and rounded once, to the parameter's dtype. In bfloat16 a mean of squares that decays by 0.999
    stands still, because its changes are smaller than the distance between two numbers.

    All that a state keeps for each parameter is in this dtype, also what `accumulate` adds up. Where a parameter's own is
    wider, or complex, it is the parameter's. Transforms without a state, as `sgd` without momentum is, compute as they do
    without this; put `kahan`, `stochastic_rounding` or `master_weights` around a chain to have all of it in float32. For a
    state in fewer bits see `quantize_state`.

    Args:
        transform: any transform.
        dtype: a floating-point dtype.

    Returns:
        the transform, with the same hyperparameters and a state of the same type.

    Raises:
        TypeError: `transform` is not one, or `dtype` is no floating-point dtype.

    >>> import torch, purestep as ps
    >>> opt, p = ps.state_dtype(ps.adamw(lr=0.1), torch.float32), torch.ones(3, dtype=torch.bfloat16)
    >>> state = opt.init_state(p)
    >>> p, state = opt.step(torch.ones(3, dtype=torch.bfloat16), state, p)
    >>> p.dtype, ps.find(state, ps.AdamState).exp_avg.dtype
    (torch.bfloat16, torch.float32)
    """
    check_transform(transform, "state_dtype")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"state_dtype takes a floating-point dtype, such as torch.float32, but got {dtype!r}.")
    return StateDtype((transform,), (dtype,))


# ----------------------------------------------------------------------------------------------------------- master weights


def wide(p: Tensor) -> Tensor:
    """A parameter of 16 bits in float32, another one as it is."""
    return p.float() if p.dtype in HALF else p


def widened(xs: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """Tensors in the dtypes of others."""
    return [x if x.dtype == y.dtype else x.to(y.dtype) for x, y in zip(xs, like)]


class MasterWeightsState(NamedTuple):
    """The state of `master_weights`."""

    master: list[Tensor | None]  # w: the parameters of 16 bits in float32; None for others
    inner: Any  # the state of the transform, which sees these

    @classmethod
    def init(cls, params: list[Tensor], inner: Any) -> MasterWeightsState:
        """Before the first update."""
        return cls([p.float() if p.dtype in HALF else None for p in params], inner)


@forwards(lambda arguments: True)
@nested(MasterWeightsState, moves=True, elementwise=True, name="master_weights")
def _master_weights(
    gs: list[Tensor], s: MasterWeightsState, ps: list[Tensor], transform: Inner
) -> tuple[list[Tensor], MasterWeightsState]:
    """`master_weights`, around a transform whose state is in float32 already."""
    # a parameter that is not the rounded copy was written to
    full = [p if w is None else where(w.to(p.dtype) == p, w, p.float()) for w, p in zip(s.master, ps)]
    new, inner = transform.step(widened(gs, full), s.inner, full, donate=True)
    return widened(new, ps), MasterWeightsState([None if w is None else x for w, x in zip(s.master, new)], inner)


def master_weights(transform: Transform) -> Transform:
    r"""Train parameters of 16 bits as if they had 32: keep a copy in float32, update it, and round it to the parameter.

    .. math:: w_t, s_t = \mathrm{transform}(g_t, s_{t-1}, w_{t-1}), \qquad p_t = \mathrm{round}(w_t)

    This is the usual recipe of mixed precision. Gradients are widened, and the state of the transform is in float32. Without it
    an update by less than half the distance to the next number is lost: 1 and the next number in bfloat16 differ by 0.8 %.

    A parameter that is written to between two updates, because weights are loaded or clamped, takes its new value into the
    copy. Parameters of 32 or 64 bits are updated as without it, and have no copy. It stands around all that moves the
    parameters: what is around it (`lookahead`, for instance) sees them rounded.

    Args:
        transform: any transform.

    Returns:
        the transform, with the same hyperparameters. Its state has ``master``, the copies in float32, and ``inner``.

    Raises:
        TypeError: it is not a transform.

    >>> import torch, purestep as ps
    >>> opt, p = ps.master_weights(ps.sgd(lr=0.001)), torch.ones(1, dtype=torch.bfloat16)
    >>> state = opt.init_state(p)
    >>> for _ in range(4):
    ...     p, state = opt.step(torch.ones(1, dtype=torch.bfloat16), state, p)
    >>> p, state.master
    (tensor([0.9961], dtype=torch.bfloat16), tensor([0.9960]))

    Reference: Micikevicius et al., `Mixed Precision Training <https://arxiv.org/abs/1710.03740>`_, ICLR 2018.
    """
    check_transform(transform, "master_weights")
    full = isinstance(transform, StateDtype) and transform.context == (torch.float32,)
    made: Transform = _master_weights(transform if full else StateDtype((transform,), (torch.float32,)))
    return made


# ------------------------------------------------------------------------------------------------------- stochastic rounding

PLACES = 0x85EBCA6B  # odd, and with no pattern in its bits
SEEDS = 0xC2B2AE35
SPREAD = 0x27D4EB2F


class StochasticRoundingState(NamedTuple):
    """The state of `stochastic_rounding`."""

    step: Tensor  # updates so far, of all parameters together: in a tensor of shape ()
    place: list[Scalar]  # the parameter's number among the others: in a tensor of shape ()
    inner: Any  # the state of the transform

    @classmethod
    def init(cls, params: list[Tensor], inner: Any) -> StochasticRoundingState:
        """Before the first update."""
        first = params[0] if params else torch.zeros(())
        return cls(counter(first), [counter(p) + k for k, p in enumerate(params)], inner)


@forwards(lambda arguments: True)
@nested(StochasticRoundingState, moves=True, elementwise=True, name="stochastic_rounding")
def _stochastic_rounding(
    gs: list[Tensor], s: StochasticRoundingState, ps: list[Tensor], transform: Inner, *, seed: Seed = 0
) -> tuple[list[Tensor], StochasticRoundingState]:
    """`stochastic_rounding`, of a transform."""
    step = s.step + 1
    full = list(map(wide, ps))
    new, inner = transform.step(widened(gs, full), s.inner, full, donate=True)
    found = []
    for x, p, place in zip(new, ps, s.place):
        if p.dtype == x.dtype:
            found.append(x)
            continue
        number, home = sharded.whole(x), x
        t, k = (c.to(p.device, torch.int64) for c in (step, place))
        count = t + k * PLACES + whole_number(seed, p.device) * SEEDS
        found.append(sharded.spread(at_random(number, p.dtype, count), home))
    return found, StochasticRoundingState(step, s.place, inner)


def at_random(x: Tensor, dtype: torch.dtype, count: Tensor) -> Tensor:
    """Float32 numbers in a narrower dtype: each as one of the two numbers next to it, so that the mean is right."""
    x = x.detach()
    bits = x.view(torch.int32)
    places = (torch.arange(x.numel(), dtype=torch.int32, device=x.device) * SPREAD).view(x.shape)
    digits = chance(bits ^ places, count)  # equal numbers are rounded each in its own way
    if dtype == torch.bfloat16:
        return up_or_down(bits, digits)
    near = x.to(dtype)
    rest = x - near.to(x.dtype)
    outward = (rest > 0) == (near.to(x.dtype) > 0)  # the other number is further from 0 than the near one
    zero = near == 0  # whose neighbours are the smallest numbers of either sign
    code = near.view(torch.int16)
    other = where(zero, torch.ones_like(code), where(outward, code + 1, code - 1)).view(dtype)
    other = where(zero & (rest < 0), -other, other)
    distance = (other.to(x.dtype) - near.to(x.dtype)).abs()
    moves = (rest != 0) & near.isfinite() & other.isfinite() & (digits * (2.0**-16 * distance) < rest.abs())
    return where(moves, other, near)


def stochastic_rounding(transform: Transform, *, seed: Seed = 0) -> Transform:
    r"""Round parameters of 16 bits up or down at random, so that they are right in the mean: no copy in float32 is kept.

    .. math:: w_t, s_t = \mathrm{transform}(g_t, s_{t-1}, p_{t-1}), \qquad p_t = \begin{cases}
        \lceil w_t \rceil & \text{with probability } (w_t - \lfloor w_t \rfloor) / (\lceil w_t \rceil - \lfloor w_t \rfloor) \\
        \lfloor w_t \rfloor & \text{otherwise} \end{cases}

    where the update is computed in float32, and the floor and the ceiling are the next numbers of the parameter's dtype. The
    state of the transform is in the dtype that it has without this; put `state_dtype` or `quantize_state` around the
    transform to have it otherwise.

    Chance is a hash of the number :math:`w_t` and its place, the step and the seed: there is no generator, a run can be
    repeated, and every mode rounds alike.

    Parameters of 32 or 64 bits are updated as without it. No derivative passes through the rounding.

    Args:
        transform: any transform.
        seed: a whole number of at least 0, or a 0-d tensor; under `torch.func.vmap` members may have different ones.

    Returns:
        the transform, with the same hyperparameters and the ``seed``.

    Raises:
        TypeError: it is not a transform.

    >>> import torch, purestep as ps
    >>> opt, p = ps.stochastic_rounding(ps.sgd(lr=0.001)), torch.ones(10_000, dtype=torch.bfloat16)
    >>> q, _ = opt.step(torch.ones_like(p), opt.init_state(p), p)
    >>> q.unique(), round((p.float() - q.float()).mean().item(), 3)
    (tensor([0.9961, 1.0000], dtype=torch.bfloat16), 0.001)

    Reference: Gupta et al., `Deep Learning with Limited Numerical Precision <https://arxiv.org/abs/1502.02551>`_, ICML 2015;
    Zamirai et al., `Revisiting BFloat16 Training <https://arxiv.org/abs/2010.06192>`_, 2020.
    """
    check_transform(transform, "stochastic_rounding")
    made: Transform = _stochastic_rounding(transform, seed=seed)
    return made


# ---------------------------------------------------------------------------------------------------------------------- Kahan


class KahanState(NamedTuple):
    """The state of `kahan`."""

    compensation: list[Tensor | None]  # c: what rounding has taken from a parameter of 16 bits, in its dtype; None for others
    inner: Any  # the state of the transform

    @classmethod
    def init(cls, params: list[Tensor], inner: Any) -> KahanState:
        """Before the first update."""
        return cls([torch.zeros_like(p) if p.dtype in HALF else None for p in params], inner)


@forwards(lambda arguments: True)
@nested(KahanState, moves=True, elementwise=True, name="kahan")
def _kahan(gs: list[Tensor], s: KahanState, ps: list[Tensor], transform: Inner) -> tuple[list[Tensor], KahanState]:
    """`kahan`, of a transform."""
    full = [p if c is None else compensated(p, c) for p, c in zip(ps, s.compensation)]
    new, inner = transform.step(widened(gs, full), s.inner, full, donate=True)
    low = widened(new, ps)
    lost = [
        None if c is None else where(y.isfinite(), x - y.float(), 0.0).to(y.dtype) for c, x, y in zip(s.compensation, new, low)
    ]
    return low, KahanState(lost, inner)


def compensated(p: Tensor, c: Tensor) -> Tensor:
    """A parameter of 16 bits with what rounding took from it, or alone if it was written to since.

    The sum is what was rounded to the parameter, so it is not further from it than half the distance to the next number. (It
    may be just that far, where it would be rounded to the next one: hence a little less of the compensation.)
    """
    full = p.float()
    return where((full + c.float() * (1 - 2.0**-6)).to(p.dtype) == p, full + c.float(), full)


def kahan(transform: Transform) -> Transform:
    r"""Remember what rounding takes from parameters of 16 bits, and add it to the next update: Kahan's summation.

    .. math:: w_t, s_t = \mathrm{transform}(g_t, s_{t-1}, p_{t-1} + c_{t-1}), \qquad p_t = \mathrm{round}(w_t), \qquad
        c_t = \mathrm{round}(w_t - p_t)

    where the update is computed in float32. The compensation :math:`c` has 16 bits, so parameter and compensation together take
    the memory of `master_weights`'s copy alone, and are as good as 16 bits of mantissa. The state of the transform is in the
    dtype that it has without this; put `state_dtype` around the transform to have it in float32.

    Parameters of 32 or 64 bits are updated as without it. One that is written to between two updates, because weights are
    loaded or clamped, forgets what rounding took from its old value. It stands around all that moves the parameters: what
    is around it (`lookahead`, for instance) sees them rounded.

    Args:
        transform: any transform.

    Returns:
        the transform, with the same hyperparameters. Its state has ``compensation`` and ``inner``.

    Raises:
        TypeError: it is not a transform.

    >>> import torch, purestep as ps
    >>> opt, p = ps.kahan(ps.sgd(lr=0.001)), torch.ones(1, dtype=torch.bfloat16)
    >>> state = opt.init_state(p)
    >>> for _ in range(4):
    ...     p, state = opt.step(torch.ones(1, dtype=torch.bfloat16), state, p)
    >>> (p.float() + state.compensation.float()).item()
    0.99600...

    Reference: Kahan, `Further remarks on reducing truncation errors <https://doi.org/10.1145/363707.363723>`_, 1965; Zamirai et
    al., `Revisiting BFloat16 Training <https://arxiv.org/abs/2010.06192>`_, 2020.
    """
    check_transform(transform, "kahan")
    made: Transform = _kahan(transform)
    return made
