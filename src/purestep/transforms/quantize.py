"""Running means in few bits: a state that is kept encoded, and computed with decoded.

A quantized transform is another one whose leafwise links decode what they need of their state, run their own mathematics, and
encode what they return. Nothing else in the library knows of it: codes are fields of a state.
"""

from __future__ import annotations

import functools
import operator
import typing
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from purestep._core import sharded, tree
from purestep._core.cache import Shared
from purestep._core.hyper import Whole, check_steps
from purestep._core.maths import Encoded, operation
from purestep._core.primitives import LinkDeclaration, Primitive, Sparse
from purestep._core.torch_api import DisableFuncTorch, dispatch_mode_count
from purestep.compose import Relinked, uncalled
from purestep.transform import Leafwise, PyTree, Transform

Bits: TypeAlias = Literal[8, 16]
Codes: TypeAlias = Encoded | None

BLOCK = 256
"""So many consecutive numbers are encoded relative to the largest of them."""

SIGNED = {
    "exp_avg": True, "exp_avg_fast": True, "exp_avg_diff": True, "grad_avg": True, "momentum_buffer": True,
    "exp_avg_sq": False, "max_exp_avg_sq": False, "exp_avg_var": False, "exp_inf": False, "square_avg": False,
    "acc_delta": False, "sum": False,
}  # fmt: skip
"""The fields that are means of gradients (True) or of their sizes (False), by the names that torch gives them. Others hold what
an error would spoil for good: copies of parameters, last gradients, means over ten thousand steps."""

# ------------------------------------------------------------------------------------------------------------ eight bits


LARGEST = 2.0**15
"""What 1 is while codes are looked up: float16 has most of its numbers below 1, but not enough for seven decades."""


class Code(NamedTuple):
    """What 8 bits stand for."""

    values: Tensor  # of each code
    nearest: Tensor  # the code of each number in float16 divided by `LARGEST`, in the order of its bits as an int16


_codes: dict[tuple[bool, torch.device], Code] = {}


def dynamic_tree(signed: bool) -> list[float]:
    """The 256 numbers that a code can stand for, in order: seven decades, the larger the finer, and 0 and 1."""
    decades, found = 7, [0.0, 1.0]
    for k in range(decades):
        many = 2 ** (k if signed else k + 1)
        values = [10.0 ** (k - decades + 1) * (0.1 + 0.9 * (i + 0.5) / many) for i in range(many)]
        found += [*values, *[-x for x in values]] if signed else values
    return sorted(found)


def code(signed: bool, device: torch.device) -> Code:
    """The tables of a code on a device."""
    found = _codes.get((signed, device))
    if found is not None:
        return found
    if torch.compiler.is_compiling():
        return tabulated(signed, device)
    with DisableFuncTorch(), torch.inference_mode(False):  # they outlive what is running
        made = tabulated(signed, device)
    if dispatch_mode_count() == 0:
        _codes[signed, device] = made
    return made


def tabulated(signed: bool, device: torch.device) -> Code:
    """The same, made anew."""
    values = torch.tensor(dynamic_tree(signed), dtype=torch.float32, device=device)
    halves = torch.arange(-(2**15), 2**15, device=device).to(torch.int16).view(torch.float16).float()
    nearest = torch.bucketize(halves.nan_to_num(0.0) / LARGEST, (values[1:] + values[:-1]) / 2).to(torch.uint8)
    return Code(values, nearest)


def blocks(x: Tensor) -> Tensor:
    """A tensor as a matrix with a block in each row, the last filled up with zeros."""
    flat = x.reshape(-1)
    missing = -flat.shape[0] % BLOCK
    return (torch.nn.functional.pad(flat, (0, missing)) if missing else flat).view(-1, BLOCK)


@operation(block=BLOCK)
def scale_of(x: Tensor) -> Tensor:
    """The number of largest size in each block, with its sign: relative to itself it is 1, which has a code, unlike -1."""
    rows = blocks(x.detach())
    high, low = rows.amax(1), rows.amin(1)
    return torch.where(high >= -low, high, low).to(torch.promote_types(x.dtype, torch.float32))


@operation(block=BLOCK)
def encoded(x: Tensor, scale: Tensor, signed: bool) -> Tensor:
    """The nearest codes of numbers relative to the scale of their block; in a block of zeros that of 0."""
    relative = (blocks(x.detach()) / scale[:, None]).mul_(LARGEST).half().view(torch.int16).int() + 2**15
    return code(signed, x.device).nearest.index_select(0, relative.view(-1))[: x.numel()].view(x.shape)


@operation(like=True, block=BLOCK)
def decoded(codes: Tensor, scale: Tensor, p: Tensor, signed: bool) -> Tensor:
    """What codes stand for, in the precision of the parameter."""
    relative = code(signed, p.device).values.index_select(0, blocks(codes).view(-1).int())
    return (relative.view(-1, BLOCK) * scale[:, None]).view(-1)[: p.numel()].view(p.shape).to(p.dtype)


# ---------------------------------------------------------------------------------------------------------- sixteen bits


GOLDEN = 0x9E3779B1  # the golden ratio, of 2**32
MIX = -0x7A143589  # odd numbers with no pattern in their bits
STIR = -0x7A143595


def chance(bits: Tensor, step: Any) -> Tensor:
    """16 random bits, as an int32, for the bits of each number and a step: a hash of both.

    The bits of consecutive steps must look independent. If they were evenly spread, as a Weyl sequence's are, a number that
    waits for its step to the next would wait for half as long as it should, on average, and drift at twice its rate.
    """
    if isinstance(step, Tensor):
        mixed = bits * MIX + (step.to(torch.int64) * GOLDEN % 2**32 - 2**31).to(torch.int32)
    else:
        mixed = (bits * MIX).add_(int(step) * GOLDEN % 2**32 - 2**31)
    for shift in (15, 13):
        mixed = mixed.bitwise_xor_(mixed >> shift).mul_(STIR)
    return mixed.bitwise_right_shift_(16).bitwise_and_(0xFFFF)


@operation(block=1)
def rounded(x: Tensor, step: Any) -> Tensor:
    r"""To bfloat16, up or down at random, so that the mean is right: a change by :math:`(1 - \beta_2) g^2` is smaller than the
    distance between two numbers, and would always be lost.
    """
    bits = x.detach().float().contiguous().view(torch.int32)
    return up_or_down(bits, chance(bits, step))


def up_or_down(bits: Tensor, digits: Tensor) -> Tensor:
    """Float32 numbers, given by their bits, in bfloat16: away from 0 where 16 random bits and theirs overflow."""
    size = digits + (bits & 0x7FFFFFFF).clamp_max_(0x7FFF0000)  # clamped, so that no NaN overflows into a number
    return size.bitwise_and_(0x7FFF0000).bitwise_or_(bits & -(2**31)).view(torch.float32).to(torch.bfloat16)


@operation(like=True, block=1)
def widened(codes: Tensor, p: Tensor) -> Tensor:
    """A number in bfloat16, in the precision of the parameter."""
    return codes.to(p.dtype)


# ------------------------------------------------------------------------------------------------------------- the state


@functools.lru_cache(maxsize=256)
def means_of(plain: Any) -> list[str]:
    """The fields of a state that are running means."""
    hints: dict[str, Any] = typing.get_type_hints(plain, include_extras=True)
    return [name for name in plain._fields if name in SIGNED and hints[name] in (Tensor, Tensor | None)]


class Form:
    """How the states of a transform are kept in few bits: their type, and the way there and back.

    In `kind` the means of a large parameter are None, and what stands for them is in further fields.
    """

    def __init__(self, plain: Any, bits: Bits, min_size: int) -> None:
        self.plain, self.bits, self.min_size = plain, bits, min_size
        hints: dict[str, Any] = typing.get_type_hints(plain, include_extras=True)
        self.means = means_of(plain)
        hints |= dict.fromkeys(self.means, Tensor | None)
        hints |= {f"{name}_{bits}bit": Codes for name in self.means}
        if bits == 8:
            hints |= {f"{name}_scale": Codes for name in self.means}
        make: Any = NamedTuple
        kind = make(f"Quantized{plain.__name__}", list(hints.items()))
        kind.__doc__ = f"The state of a quantized transform, which without that would be `{plain.__name__}`."
        kind.form, kind.init = self, classmethod(lambda cls, p, **hypers: self.kept(plain.init(p, **hypers)))
        kind.__reduce__ = lambda state: (remade, (plain, bits, min_size, tuple(state)))
        self.kind = kind

    def own(self, state: Any) -> tuple[Any, ...]:
        """The fields that the transform knows, and without those that stand for means."""
        found: tuple[Any, ...] = state[: len(self.plain._fields)]
        return found

    def codes(self, state: Any) -> tuple[Any, ...]:
        """The fields that stand for means."""
        found: tuple[Any, ...] = state[len(self.plain._fields) :]
        return found

    def kept(self, state: Any) -> Any:
        """The state of one parameter, its means encoded if they are large."""
        x = next((x for name in self.means if (x := getattr(state, name)) is not None), None)
        if x is None or x.is_complex() or x.numel() < self.min_size:
            return self.untouched(state)
        return self.encode(state)

    def untouched(self, state: Any) -> Any:
        """The state of one parameter as it is."""
        return self.kind(*state, *[None] * (len(self.kind._fields) - len(state)))

    def encode(self, state: Any) -> Any:
        """The state of one parameter, its means encoded."""
        found: dict[str, Any] = self.untouched(state)._asdict()
        for name in self.means:
            x, found[name] = found[name], None
            if x is None:
                continue
            x, like = sharded.whole(x), x
            if self.bits == 16:
                codes = rounded(x, state.step)
            else:
                found[f"{name}_scale"] = scale = scale_of(x)
                codes = encoded(x, scale, SIGNED[name])
            found[f"{name}_{self.bits}bit"] = sharded.spread(codes, like)
        return self.kind(**found)

    def decode(self, state: Any, p: Tensor | None) -> Any:
        """The state of one parameter as the transform knows it, in the parameter's precision, or in that of its codes."""
        if all([x is None for x in self.codes(state)]):
            return self.plain(*self.own(state))
        found: dict[str, Any] = state._asdict()
        for name in self.means:
            scale, codes = sharded.whole(found.get(f"{name}_scale")), found[f"{name}_{self.bits}bit"]
            if codes is None:
                continue
            codes, home = sharded.whole(codes), codes
            like = torch.empty_like(codes, dtype=torch.float32 if scale is None else scale.dtype) if p is None else p
            mean = widened(codes, like) if scale is None else decoded(codes, scale, like, SIGNED[name])
            found[name] = sharded.spread(mean, home)
        return self.plain(*[found[name] for name in self.plain._fields])

    def around(self, function: Any) -> Any:
        """A leaf function for states of this form."""

        @functools.wraps(function)
        def around(g: Tensor, s: Any, p: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
            u, new = function(g, self.decode(s, p), p, *args, **kwargs)
            return u, self.untouched(new) if all([x is None for x in self.codes(s)]) else self.encode(new)

        return around

    def full(self, state: Any) -> Any:
        """The state of all parameters as the transform knows it."""
        return by_leaf(lambda row: self.decode(row, None), state, self.plain)

    def again(self, state: Any) -> Any:
        """`full` undone."""
        return by_leaf(self.kept, state, self.kind)


def by_leaf(function: Callable[[Any], Any], state: Any, kind: Any) -> Any:
    """A state of one kind from another, made parameter by parameter."""
    columns, specs = zip(*[tree.flatten(x) for x in state])
    rows = [function(type(state)(*row)) for row in zip(*columns)]
    return kind(*[tree.unflatten([row[f] for row in rows], specs[0]) for f in range(len(kind._fields))])


_forms: Shared[tuple[Any, Bits, int], Form] = Shared(0)  # declarations and states hold theirs


def form_of(plain: Any, bits: Bits, min_size: int) -> Form:
    """The form of a state: there is one of each."""
    return _forms.get((plain, bits, min_size), lambda: Form(plain, bits, min_size))


def remade(plain: Any, bits: Bits, min_size: int, values: tuple[Any, ...]) -> Any:
    """A pickled state."""
    return form_of(plain, bits, min_size).kind(*values)


torch.serialization.add_safe_globals([remade])


# ------------------------------------------------------------------------------------------------------------- the links


class QuantizedDeclaration(LinkDeclaration):
    """A declared leafwise transform that keeps its running means in few bits."""

    def __init__(self, plain: LinkDeclaration, bits: Bits, min_size: int) -> None:
        self.plain, self.options = plain, (bits, min_size)
        form = form_of(plain.state, bits, min_size)
        sparse: Sparse = "dense" if plain.sparse == "dense" else None
        function = form.around(plain.function)
        super().__init__(function, form.kind, off=plain.off, requires=plain.requires, sparse=sparse, name=plain.name)
        self.init_names, self.state_dtype = plain.init_names, plain.state_dtype

    def __reduce__(self) -> tuple[Any, ...]:
        return declared, (self.plain, *self.options)


def declared(plain: LinkDeclaration, bits: Bits, min_size: int) -> QuantizedDeclaration:
    """The declaration of a quantized transform: there is one of each."""
    found: QuantizedDeclaration = plain.derived.get((bits, min_size), lambda: QuantizedDeclaration(plain, bits, min_size))
    return found


def quantized(value: Primitive, bits: Bits, min_size: int) -> Primitive:
    """The transform of one link, quantized if there is something in its state to quantize."""
    d = value.declaration
    if d.whole or d.state is None or isinstance(d, QuantizedDeclaration) or not means_of(d.state):
        return value
    return Leafwise(declared(d, bits, min_size), value.arguments)


def plain_of(value: Primitive) -> Primitive:
    """`quantized` undone."""
    d = value.declaration
    return Leafwise(d.plain, value.arguments) if isinstance(d, QuantizedDeclaration) else value


class Quantized(Relinked):
    """A transform whose running means are kept in few bits; made with `quantize_state`."""

    __slots__ = ()
    _plain = staticmethod(plain_of)

    def _made(self, value: Primitive) -> Primitive:
        return quantized(value, *self.context)

    def __repr__(self) -> str:
        bits, min_size = self.context
        return f"quantize_state({self.children[0]!r}, bits={bits}{'' if min_size == 4096 else f', min_size={min_size}'})"


# ----------------------------------------------------------------------------------------------------------------- public


def quantize_state(transform: Transform, bits: Bits = 8, *, min_size: int = 4096) -> Transform:
    r"""Keep the running means of any transform in 8 or 16 bits instead of 32: Adam's state in a quarter or half of the memory.

    Each update decodes the means, is computed as ever, in float32 at least, and encodes what it leaves.

    With 8 bits every 256 consecutive numbers are kept relative to :math:`s`, that of largest size among them,
    :math:`x_i \approx s\,Q[c_i]`, where :math:`Q` are 256 numbers in :math:`[-1, 1]` (:math:`[0, 1]` for means of squares),
    spaced evenly within each of seven decades, and most densely in the uppermost: the dynamic tree quantization of the
    paper. Codes are rounded to the nearest. So a mean as slow as :math:`\beta_2 = 0.999` follows the largest number of its
    block, and what is large in its own place, rather than every small change. Unlike in the authors' package :math:`s` has
    a sign, because :math:`-1` is not in :math:`Q`: a mean whose number of largest size is negative would fade.

    With 16 bits they are in bfloat16, rounded up or down at random, so that changes that are too small for it are right
    in the mean, too. Chance is a hash of the numbers and the step: there is no generator, and a run can be repeated.

    What is quantized are means of gradients and of their sizes, by the names of the fields (`exp_avg`, `exp_avg_sq`,
    `momentum_buffer`, `square_avg`, …), in leafwise transforms, however deep. Copies of parameters, last gradients, and
    what a `whole` transform keeps, stay as they are. In the state ``exp_avg`` is then None, and ``exp_avg_8bit`` (uint8, of the
    parameter's shape) with ``exp_avg_scale`` (float32, one for each block), or ``exp_avg_16bit``, take its place.

    No derivative passes through an encoded state; those of one update with respect to everything else are what they were. A
    fused kernel cannot be used, and with 8 bits the transform is not elementwise: it is not compiled to one kernel.

    Args:
        transform: any transform.
        bits: 8 or 16.
        min_size: parameters of fewer elements keep their means as they are, and so do complex ones: small tensors, such as
            biases and norms, are where an error would cost most and memory least. To choose otherwise, use `partition`.

    Raises:
        ValueError: there is nothing to quantize in the transform, other numbers of bits are asked for, or 16 of a state that
            does not count its updates.
        TypeError: it is not a transform, or `min_size` not a whole number.

    >>> import torch, purestep as ps
    >>> opt, p = ps.quantize_state(ps.adamw(lr=0.1), bits=8), torch.ones(64, 64)
    >>> state = opt.init_state(p)
    >>> p, state = opt.step(torch.ones(64, 64), state, p)
    >>> state[0].exp_avg_8bit.dtype, state[0].exp_avg_scale.shape
    (torch.uint8, torch.Size([16]))
    >>> ps.find(ps.dequantize_state(state), ps.AdamState).exp_avg[0, :3]
    tensor([0.1000, 0.1000, 0.1000])

    Reference: Dettmers, Lewis, Shleifer & Zettlemoyer, `8-bit Optimizers via Block-wise Quantization
    <https://arxiv.org/abs/2110.02861>`_, ICLR 2022.
    """
    if not isinstance(transform, Transform):
        raise TypeError(f"quantize_state takes a transform, but got {transform!r}.{uncalled(transform)}")
    if bits not in (8, 16) or isinstance(bits, bool):
        raise ValueError(f"quantize_state: bits must be 8 or 16, but got {bits!r}.")
    check_steps(min_size, "quantize_state: min_size", Whole())
    if not any([quantized(link.transform, bits, min_size) is not link.transform for link in transform.links]):
        raise ValueError(
            f"quantize_state finds no running mean in the state of {transform!r}, so there is nothing to quantize. Those it "
            f"knows are the fields called {', '.join(SIGNED)}."
        )
    for state in {link.transform.declaration.state for link in transform.links if not link.transform.declaration.whole}:
        if bits == 16 and state is not None and "step" not in state._fields and means_of(state):
            raise ValueError(
                f"quantize_state rounds by the number of the update, which {state.__name__} does not count; add the field "
                "'step: Scalar' to it, begun with counter(p), or keep it in 8 bits."
            )
    return Quantized((transform,), (bits, min_size))


def dequantize_state(state: PyTree) -> Any:
    """The state that a transform would have without `quantize_state`: its running means in full, to look at or to go on with.

    A state that is not quantized is returned as it is, and so is every part of it that is not.

    Args:
        state: the state of any transform, or any part of it.

    Returns:
        the state of the transforms as it is without `quantize_state`; its tensors have the shapes of the parameters.

    >>> import torch, purestep as ps
    >>> small = ps.quantize_state(ps.trace(0.9), bits=16).init_state(torch.zeros(4096))
    >>> small.momentum_buffer_16bit.dtype, ps.dequantize_state(small).momentum_buffer.dtype
    (torch.bfloat16, torch.float32)
    """
    if isinstance(state, dict):
        found = {key: dequantize_state(x) for key, x in state.items()}
        return state if all(map(operator.is_, found.values(), state.values())) else found
    if not isinstance(state, (tuple, list)):
        return state
    form = getattr(type(state), "form", None)
    if form is not None:
        return form.full(state)
    made = [dequantize_state(x) for x in state]
    if all(map(operator.is_, made, state)):
        return state
    return type(state)(*made) if hasattr(state, "_fields") else type(state)(made)
