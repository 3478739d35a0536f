"""Whatever a leaf function meets, in every position: its program computes what the function itself does.

The leaf functions are generated as source, so that what was found stands here as an example to be read. PURESTEP_EXAMPLES
multiplies their number.
"""

from __future__ import annotations

import functools
import gc
import linecache
import math
import os
import random
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

import purestep as ps
import purestep.program
from tests.problems import clone

EXAMPLES = int(os.environ.get("PURESTEP_EXAMPLES", "1"))


class Pair(NamedTuple):
    step: ps.Scalar
    a: Tensor
    b: Tensor

    @classmethod
    def init(cls, p: Tensor) -> Pair:
        return cls(ps.counter(p), dyadic(p.shape, 3), dyadic(p.shape, 4))


class Alone(NamedTuple):
    last: Tensor

    @classmethod
    def init(cls, p: Tensor) -> Alone:
        return cls(torch.full_like(p, 7.0))


def dyadic(shape: Any, seed: int) -> Tensor:
    """Numbers whose sums and products are exact, so that what should be 0 is."""
    count = math.prod(shape)
    return ((torch.arange(count, dtype=torch.float64) * 7 + seed * 11) % 25 - 12).view(tuple(shape)) / 8


SHAPES = {
    "few": [(3, 2), (2,), (1, 2)],
    "many": [(1 + k % 3, 2) for k in range(20)],
    "large": [(2**18 + 5, 2), (2,)],
}


def drawn(kind: str, seed: int) -> list[Tensor]:
    return [dyadic(shape, seed + 10 * k) for k, shape in enumerate(SHAPES[kind])]


def tensors(tree: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(tree) if isinstance(x, Tensor)]


def check_same(found: Any, expected: Any, where: str = "", finite: bool = False) -> None:
    """Equal to rounding, NaN for NaN; where what is expected is finite, at least."""
    for x, y in zip(tensors(found), tensors(expected), strict=True):
        assert x.shape == y.shape, where
        if finite:
            x, y = x[y.isfinite()], y[y.isfinite()]
        assert torch.allclose(x, y, rtol=1e-9, atol=1e-9, equal_nan=True), f"{where}: {x.flatten()[:6]} for {y.flatten()[:6]}"


def check_apart(result: Any, given: Any) -> None:
    """Whether all that has come out is in memory of its own. Counters of state are one tensor, so they do not count."""
    held = [x.untyped_storage().data_ptr() for x in tensors(given)]
    for x in tensors(result):
        if x.dim():
            assert x.untyped_storage().data_ptr() not in held
            held.append(x.untyped_storage().data_ptr())


def check(t: ps.Transform, kinds: tuple[str, ...] = ("few", "many"), transformed: bool = True) -> None:
    """A transform in every mode, against its leaf functions."""
    for kind in kinds:
        given = drawn(kind, 1), t.init_state(drawn(kind, 2)), drawn(kind, 2)
        for name in ("update", "step"):
            run = getattr(t, name)
            expected = run(*clone(given), executor="leaf")
            for executor in (None, "foreach"):
                before = clone(given)
                found = run(*given, executor=executor)
                check_same(found, expected, f"{kind} {name} {executor}")
                assert all(torch.equal(x, y) for x, y in zip(tensors(given), tensors(before)))
                if kind == "few":
                    check_apart(found, given)
            for executor in (None, "foreach", "leaf"):
                g, state, params = clone(given)
                found = run(g, state, params, executor=executor, donate=True)
                check_same(found, expected, f"{kind} {name} {executor} donated")
                check_same(g, given[0], "gradients")
                if kind == "few":
                    check_apart(found, g)
    if transformed:
        check_transformed(t)


def check_transformed(t: ps.Transform) -> None:
    """The same under `torch.func.vmap`, and the derivative of it."""
    stacked = [torch.stack([x, x / 2 + 1 / 8]) for x in drawn("few", 1)], [torch.stack([x, x * 2]) for x in drawn("few", 2)]

    def population(executor: Any) -> Any:
        def one(g: Any, p: Any) -> Any:
            return t.update(g, t.init_state([torch.zeros_like(x) for x in p]), p, executor=executor)

        return torch.func.vmap(one, randomness="error")(*stacked)

    check_same(population(None), population("leaf"), "vmap")

    def total(executor: Any, g: Any, p: Any) -> Tensor:
        new, state = t.step(g, t.init_state([x.detach() for x in p]), p, executor=executor)
        return sum((x.sum() for x in tensors((new, state)) if x.dim()), torch.zeros((), dtype=torch.float64))

    given = drawn("few", 1), drawn("few", 2)
    for argnums in (0, 1):
        slopes = [
            torch.func.grad(functools.partial(total, executor), argnums=argnums)(*given) for executor in (None, "leaf")
        ]
        check_same(*slopes, f"slope {argnums}", finite=True)  # type: ignore[misc]


# ---------------------------------------------------------------------------------------------------------- one of each kind

MINUS, TWO, VECTOR = (torch.tensor(x, dtype=torch.float64) for x in (-1.0, 2.5, [0.5, -1.0]))
CONSTANTS = [
    "-1", "-1.0", "1", "1.0", "0", "0.0", "-0.0", "2", "0.5", "True", "False", "k", "s.step", "-k", "k * s.step", "(k < s.step)",
    "(-2) ** (s.step + 1)", "math.inf", "math.nan", "-math.inf",
    "numpy.float32(-1)", "numpy.float64(-0.5)", "numpy.int64(-1)", "numpy.bool_(True)",
    "MINUS", "TWO", "VECTOR", "-MINUS", "MINUS * 2", "TWO.exp()", "torch.exp(-TWO)", "VECTOR[0]", "VECTOR.sum() * k", "k - MINUS",
    "ps.root(TWO)", "torch.tensor(-1.0)", "torch.tensor(-0.5, dtype=torch.float64)", "torch.ones(2) * 3", "VECTOR.data",
]  # fmt: skip
"""What stands next to a list."""

POSITIONS = [
    "{c} * g", "g * {c}", "g / {c}", "{c} / g", "g + {c}", "{c} - g", "g - {c}", "g + {c} * p", "g - {c} * p", "g - (-p) * {c}",
    "g + {c} * (p * s.a)", "s.a - {c} * (p / s.b)", "{c} * g + {c} * p", "-({c} * g)", "p - -(g * {c})", "ps.where(g > {c}, g, p)",
    "ps.where(g > 0, {c}, p)", "ps.minimum(g, {c})", "ps.maximum({c}, p)", "g < {c}", "(g < {c}) * {c}", "(g > p) + {c} * (g < p)",
    "g + {c} * (p > 0)", "ps.lerp(g, p, {c})", "abs(g) ** {c}", "torch.mul(g, {c})", "g.add({c})", "torch.where(g > 0, g, {c})",
    "g * 0 + {c}", "({c}) ** g",
]  # fmt: skip


@functools.cache
def leaf_function(update: str, a: str = "s.a", b: str = "s.b") -> Callable[..., ps.Transform]:
    """A transform from the source of its update and of its state."""
    source = f"def generated(g, s, p, k: float):\n    return {update}, Pair(s.step + 1, {a}, {b})\n"
    space = {**globals()}
    name = f"<{update}; {a}; {b}>"
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    exec(compile(source, name, "exec"), space)
    return ps.leafwise(Pair)(space["generated"])  # type: ignore[no-any-return]


def runs(t: ps.Transform) -> bool:
    """Whether torch does what the leaf function asks for."""
    given = drawn("few", 1), t.init_state(drawn("few", 2)), drawn("few", 2)
    try:
        t.update(*given, executor="leaf")
    except (RuntimeError, TypeError, ZeroDivisionError, OverflowError, NotImplementedError, AttributeError):
        return False
    return True


@pytest.mark.parametrize("position", POSITIONS)
def test_every_constant_in_every_position(position: str) -> None:
    checked, wrong = 0, []
    for c in CONSTANTS:
        t = leaf_function(position.format(c=f"({c})"))(-1.0)
        if not runs(t):
            continue
        checked += 1
        given = drawn("few", 1), t.init_state(drawn("few", 2)), drawn("few", 2)
        for run, donate in ((t.update, False), (t.step, True)):
            expected = run(*clone(given), executor="leaf")
            try:
                check_same(run(*clone(given), donate=donate), expected)
            except Exception as error:
                wrong.append(f"{c}, {run.__name__}: {type(error).__name__} {error}")
    assert not wrong, "\n".join(wrong)
    assert checked >= 10


# -------------------------------------------------------------------------------------------------------------- generated

LITERALS = [
    "-1", "-1.0", "0", "0.0", "-0.0", "1", "1.0", "2", "3", "0.5", "-0.25", "True", "False",
    "numpy.float32(-1)", "numpy.float64(0.5)", "numpy.int64(2)", "torch.tensor(-1.0)", "torch.tensor(0.5, dtype=torch.float64)",
]  # fmt: skip
UNARY = ["-({})", "abs({})", "torch.sign({})", "torch.exp(-abs({}))", "({}).square()", "ps.root(abs({}))", "torch.log1p(abs({}))",
         "({}).neg()", "({}).clamp(-0.5, 1)", "torch.tanh({})", "({}).detach()", "({}).view_as(g)", "({}) ** 2", "({}) ** 3.0"]  # fmt: skip
BINARY = ["({}) + ({})", "({}) - ({})", "({}) * ({})", "({}) / ({})", "ps.minimum({}, {})", "ps.maximum({}, {})",
          "(({}) < ({})) * 1.0", "torch.add({}, {})", "({}).mul({})", "({}).sub({})"]  # fmt: skip
TERNARY = ["ps.where(({}) > ({}), {}, p)", "ps.where(({}) >= ({}), {}, 0.5)", "({}) + ({}) * ({})", "({}) - ({}) * ({})",
           "({}) * ({}) + ({}) * s.a", "ps.lerp({}, g, 0.25) + ({}) * ({})"]  # fmt: skip


def expressions() -> st.SearchStrategy[str]:
    """Source of a value that is, nearly always, like the parameter."""
    numbers = st.recursive(
        st.sampled_from([*LITERALS, "k", "s.step"]),
        lambda x: st.one_of(
            st.builds("({} {} {})".format, x, st.sampled_from("+-*"), x), st.builds("(-{})".format, x),
            st.builds("ps.minimum({}, {})".format, x, x), st.builds("({} < {})".format, x, x),
        ),
        max_leaves=3,
    )  # fmt: skip
    closed_over = st.sampled_from(["MINUS", "TWO", "VECTOR", "(-MINUS)", "(VECTOR * k)", "TWO.exp()", "(VECTOR[1] - s.step)"])
    lists = st.sampled_from(["g", "p", "s.a", "s.b"])
    other = st.one_of(numbers, numbers, closed_over)

    def more(x: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        either = st.one_of(x, x, other)
        return st.one_of(
            st.builds(lambda f, y: f.format(y), st.sampled_from(UNARY), x),
            st.builds(lambda f, y, z: f.format(y, z), st.sampled_from(BINARY), x, either),
            st.builds(lambda f, y, z: f.format(z, y), st.sampled_from(BINARY[:-2]), x, either),
            st.builds(lambda f, a, b, c: f.format(a, b, c), st.sampled_from(TERNARY), x, either, either),
            st.builds(lambda f, a, b, c: f.format(a, b, c), st.sampled_from(TERNARY), x, other, x),
        )

    return st.recursive(lists, more, max_leaves=6)


FIELDS = st.one_of(st.sampled_from(["s.a", "s.b", "g", "p", "s.b.view_as(g)"]), expressions())


def profile(examples: int) -> Any:
    return settings(
        max_examples=examples * EXAMPLES, deadline=None, derandomize=EXAMPLES == 1, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


@profile(40)
@given(expressions(), FIELDS, FIELDS, st.sampled_from([-1.0, 0.0, 0.75]), st.integers(0, 9))
def test_generated_leaf_functions(update: str, a: str, b: str, k: float, which: int) -> None:
    t = leaf_function(update, a, b)(k)
    assume(runs(t))
    check(t, ("few",) if which else ("few", "many", "large"), transformed=which % 3 == 0)


@profile(20)
@given(FIELDS, FIELDS, FIELDS, expressions(), st.integers(0, 5))
def test_generated_chains_of_leaf_functions(update: str, a: str, b: str, last: str, which: int) -> None:
    """What one hands on is the gradient of the next, and memory that the next may overwrite."""
    t = ps.chain(leaf_function(update, a, b)(0.5), leaf_function("g", "g", "s.a")(-1.0), leaf_function(last)(-1.0))
    assume(runs(t))
    check(t, ("few", "many") if which == 0 else ("few",), transformed=False)
