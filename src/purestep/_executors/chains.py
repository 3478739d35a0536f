"""Consecutive leafwise transforms that are run as one, and the fused kernels that compute some of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from purestep._core import maths
from purestep._core.primitives import SCALED, LinkDeclaration, Primitive, fields_of
from purestep._core.torch_api import FUSED_ADAGRAD_ON_CUDA, FUSED_SGD_TAKES_HALF, tree_leaves
from purestep._executors.tiles import SHORT
from purestep._trace.program import Program, program
from purestep._trace.recipe import NUMBER, OFF, LeafSpec


class Kernel(NamedTuple):
    """A fused kernel: what it can do, as the transforms it replaces, and how to call it."""

    pattern: tuple[tuple[LinkDeclaration, bool], ...]  # each with whether it may be left out
    run: Callable[..., None]
    name: str  # torch's name for it, a key of `CPU_DTYPES`
    copies: bool = True  # whether it pays to copy what was not given away, so that the kernel can write on it
    tails: bool = True  # whether it pays as the tail of a longer chain, which would be one program without it
    later: tuple[str, ...] = ()  # hyperparameters that are 0 in the first update: to know which one it is, the counter is read

    def computes(self, p: Tensor) -> bool:
        """Whether the kernel is right for tensors of this dtype on this device."""
        if p.is_cpu:
            return p.dtype in CPU_DTYPES[self.name]
        return p.is_cuda and p.dtype in FUSED_DTYPES and (self.name != "adagrad" or FUSED_ADAGRAD_ON_CUDA)


FUSED_DTYPES = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
"""The dtypes that torch's fused kernels take."""

CPU_DTYPES: dict[str, frozenset[torch.dtype]] = {
    "adam": FUSED_DTYPES,
    "adagrad": FUSED_DTYPES,
    # Up to torch 2.13, torch._fused_sgd_ leaves every full vector of float16 and bfloat16 numbers as it was.
    "sgd": FUSED_DTYPES if FUSED_SGD_TAKES_HALF else frozenset({torch.float64, torch.float32}),
}
"""For each kernel, the dtypes for which a test shows that its CPU version computes what the mathematics says."""

MERGED_DTYPES = frozenset.intersection(*CPU_DTYPES.values())
"""The dtypes of programs in which kernels take the place of several lines."""


KERNELS: list[Kernel] = []
"""Filled by `purestep.algorithms.kernels`; the first whose pattern is the tail of a chain is used."""


class ChainStructure:
    """Consecutive leafwise links that one program or kernel runs: all but their numbers, so that it serves many transforms."""

    def __init__(self, positions: Sequence[int], values: Sequence[Primitive], scaled: bool = False) -> None:
        self.positions = tuple(positions)
        self.scaled = scaled  # whether it begins with gradients times a number, which comes from a whole transform before it
        declarations = [SCALED] * scaled + [value.declaration for value in values]
        self.fields = tuple([fields_of(value) for value in values])
        self.names = " -> ".join([value.declaration.name for value in values])
        self.encoded = tuple([(j, f) for j, info in enumerate(self.fields) for f, yes in enumerate(info.encoded) if yes])
        self.arrays = any([value.declaration.arrays for value in values])  # which no program can take
        self.present = tuple([(False,) * len(info.names) for info in self.fields])  # no field is absent, as is usual
        self.hypers = tuple([hyper_specs(value) for value in values])
        self.numeric = constants(values) is not None
        self.elementwise: bool | None = None  # whether a part of a parameter can be updated alone; found out where it is asked
        self.kernel: Kernel | None = None
        self.first = 0
        self.split: tuple[ChainStructure, ChainStructure] | None = None  # before the kernel, and its own; None if it is all
        for kernel in KERNELS:
            k = tail(kernel, declarations)
            n = 0 if k is None else max(k - scaled, 0)
            if k is not None and (k == 0 or kernel.tails) and suits(values[n:]):
                self.kernel = kernel
                if k:
                    self.split = ChainStructure(positions[:n], values[:n], scaled), ChainStructure(positions[n:], values[n:])
                self.first = k
                break


class FusedChain:
    """A chain's structure, and the transforms that have its numbers."""

    __slots__ = (
        "_hypers", "_split", "arrays", "decision", "declarations", "details", "encoded", "first", "items", "kernel", "names",
        "numbers", "positions", "scaled", "structure", "values",
    )  # fmt: skip

    def __init__(self, structure: ChainStructure, values: Sequence[Primitive]) -> None:
        self.structure, self.values = structure, values
        self.positions, self.scaled, self.names = structure.positions, structure.scaled, structure.names
        self.arrays = structure.arrays
        self.kernel, self.first, self.encoded = structure.kernel, structure.first, structure.encoded
        self.items = list(zip(structure.positions, values, structure.fields))
        self.declarations = [SCALED] * structure.scaled + [value.declaration for value in values]
        # the hyperparameters in order, if all are plain numbers
        self.numbers = constants(values) if structure.numeric else None
        self.details: dict[tuple[Any, ...], tuple[LeafSpec, ...]] = {}
        self.decision: Any = None  # which executor took it last: see `purestep._executors.task.Decision`
        self._hypers: dict[str, Any] | None = None
        self._split: tuple[FusedChain, FusedChain] | None = None

    @property
    def hypers(self) -> dict[str, Any]:
        """The arguments of all these transforms by name, and the names of the transforms themselves, as a kernel takes them."""
        if self._hypers is None:
            self._hypers = arguments_of(self.values)
        return self._hypers

    def parts(self) -> tuple[FusedChain, FusedChain]:
        """What runs before the kernel, and what the kernel computes."""
        if self.structure.split is None:
            return self, self
        if self._split is None:
            head, tail = self.structure.split
            n = len(head.positions)
            self._split = FusedChain(head, self.values[:n]), FusedChain(tail, self.values[n:])
        return self._split

    @property
    def head(self) -> FusedChain:
        """What runs before the kernel."""
        return self.parts()[0]

    @property
    def tail(self) -> FusedChain:
        """What the kernel computes."""
        return self.parts()[1]

    def joins(self, params: list[Tensor]) -> bool:
        """Whether these may as well be one vector: of a state that has all its fields."""
        if self.arrays:
            return False
        recipe = details(self, self.structure.present)
        return joinable(params, program(recipe, True, False, False, *self.declarations, form="single"))


def constants(values: Sequence[Primitive]) -> list[Any] | None:
    """All hyperparameters in order as the arguments of a program, or None if one is a tensor or a schedule."""
    found: list[Any] = []
    for value in values:
        for name in value.declaration.hypers:
            x = value.arguments[name]
            for y in x if isinstance(x, tuple) else (x,):
                if isinstance(y, float):
                    found.append(y)
                elif y is None:
                    if isinstance(x, tuple):
                        found.append(y)
                else:
                    return None
    return found


def arguments_of(values: Sequence[Primitive]) -> dict[str, Any]:
    """The arguments of all these transforms by name, and the names of the transforms themselves."""
    merged: dict[str, Any] = {}
    for value in values:
        merged[value.declaration.name] = True
        merged.update(value.arguments)
    return merged


def suits(values: Sequence[Primitive]) -> bool:
    """Whether a kernel can take these hyperparameters: numbers that the CPU holds, but for the learning rate."""
    return not any(
        [
            isinstance(y, Tensor) and not y.is_cpu and name != "lr"
            for value in values
            for name in value.declaration.hypers
            for y in tree_leaves(value.arguments[name])
        ]
    )


def tail(kernel: Kernel, declarations: Sequence[LinkDeclaration]) -> int | None:
    """Where the tail that a kernel computes begins in a chain, or None."""
    i = len(declarations)
    for declaration, optional in reversed(kernel.pattern):
        if i and declarations[i - 1].original is declaration:
            i -= 1
        elif not optional:
            return None
    return i


def absent(fields: Any) -> tuple[tuple[bool, ...], ...]:
    """Which fields of their states these parameters do not have."""
    found: list[tuple[bool, ...]] = []
    for own in fields:
        found.append(tuple([c[0] is None for c in own]) if own else ())  # noqa: PERF401  (a comprehension is a call)
    return tuple(found)


def encodes(chain: FusedChain, fields: Any) -> bool:
    """Whether any of these parameters' state is kept in another dtype than it is computed with in."""
    return any([fields[j][f][0] is not None for j, f in chain.encoded])


def details(chain: FusedChain, absent: tuple[tuple[bool, ...], ...]) -> tuple[LeafSpec, ...]:
    """What a recipe says of these transforms when their states lack these fields, except for their declarations."""
    found = chain.details.get(absent)
    if found is None:
        specs = [LeafSpec((), (), (NUMBER,))] * chain.scaled
        for value, missing, hypers in zip(chain.values, absent, chain.structure.hypers):
            d, a = value.declaration, value.arguments
            specs.append(LeafSpec(missing if d.state else (), tuple(map(a.__getitem__, d.switches)), hypers))
        found = chain.details[absent] = tuple(specs)
    return found


def detail(value: Primitive, absent: tuple[bool, ...]) -> LeafSpec:
    """What a recipe says of one transform, except for its declaration."""
    d, a = value.declaration, value.arguments
    return LeafSpec(absent if d.state else (), tuple(map(a.__getitem__, d.switches)), hyper_specs(value))


def hyper_specs(value: Primitive) -> tuple[int, ...]:
    """What a recipe says of the hyperparameters of one transform."""
    a = value.arguments
    return tuple(
        [len(x) if isinstance(x, tuple) else OFF if x is None else NUMBER for x in map(a.__getitem__, value.declaration.hypers)]
    )


JOINED = 2**13
"""Parameters of so many elements on average are treated as one vector where their derivatives are recorded; four times as
many where there are more operations than a `SHORT` program has, which then run once."""

BRIEF = 2
"""To put tensors together and take the result apart costs as much as so many operations on each of them."""


def joinable(params: list[Tensor], single: Program) -> bool:
    """Whether it costs less to put tensors together, compute once, and take the result apart, than to compute often."""
    if len(params) < 2 or single.length <= BRIEF or not single.elementwise:
        return False
    limit = JOINED if single.length <= SHORT else 4 * JOINED
    return sum([maths.bottom(p)[0].numel() for p in params]) <= limit * len(params)
