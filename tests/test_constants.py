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
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

import purestep as ps
import purestep._trace.program
from purestep._core.cache import DeclarationCache
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
        slopes = [torch.func.grad(functools.partial(total, executor), argnums=argnums)(*given) for executor in (None, "leaf")]
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
    "g * 0 + {c}", "({c}) ** g", "torch.where((g > {c}) & (p < 1) | (s.a == {c}), g, p)",
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
    for c in CONSTANTS if EXAMPLES > 1 else CONSTANTS[POSITIONS.index(position) % 3 :: 3]:
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
    assert checked >= 3


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


@profile(25)
@given(expressions(), FIELDS, FIELDS, st.sampled_from([-1.0, 0.0, 0.75]), st.integers(0, 9))
def test_generated_leaf_functions(update: str, a: str, b: str, k: float, which: int) -> None:
    t = leaf_function(update, a, b)(k)
    assume(runs(t))
    check(t, ("few",) if which else ("few", "many", "large"), transformed=which % 3 == 0)


@profile(12)
@given(FIELDS, FIELDS, FIELDS, expressions(), st.integers(0, 5))
def test_generated_chains_of_leaf_functions(update: str, a: str, b: str, last: str, which: int) -> None:
    """What one hands on is the gradient of the next, and memory that the next may overwrite."""
    t = ps.chain(leaf_function(update, a, b)(0.5), leaf_function("g", "g", "s.a")(-1.0), leaf_function(last)(-1.0))
    assume(runs(t))
    check(t, ("few", "many") if which == 0 else ("few",), transformed=False)


@pytest.mark.parametrize("donate", [False, True])
def test_compiled_leaf_functions(donate: bool) -> None:
    """As one kernel of Inductor's: some that are elementwise, and some that cannot be one kernel."""
    sources = [
        ("(-1) * g - (-0.5) ** (s.step + 1) * s.a", "g", "s.a * 2"),  # one kernel
        ("MINUS * g + VECTOR", "s.b", "s.b"),
        ("s.a", "g * -1", "s.b"),
        ("(-1) * g", "s.b", "s.a"),
        ("s.a", "-s.b", "g"),
        ("g", "g", "g"),
    ]
    for update, a, b in sources if EXAMPLES > 1 else sources[:2] if donate else sources[1:2]:
        t = leaf_function(update, a, b)(-1.0)
        given = drawn("few", 1), t.init_state(drawn("few", 2)), drawn("few", 2)
        for run in (t.update, t.step):
            expected = run(*clone(given), executor="leaf")
            g, state, params = clone(given)
            found = run(g, state, params, compile=True, donate=donate)
            check_same(found, expected, update)
            check_apart(found, g)


# ------------------------------------------------------------------------------------------------------------ what was found


@pytest.mark.parametrize("minus", [-1, -1.0, MINUS, numpy.float32(-1), numpy.int64(-1)], ids=repr)
def test_a_sign_is_kept(minus: Any) -> None:
    @ps.leafwise()
    def signed(g: Tensor, p: Tensor, maximize: bool = False) -> Tensor:
        return (minus if maximize else 1) * g

    for maximize, sign in ((False, 1), (True, -1)):
        t = signed(maximize)
        p, g = torch.ones(3, dtype=torch.float64), torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
        state = t.init_state(p)
        assert torch.equal(t.update(g, state, p)[0], sign * g)
        assert torch.equal(t.step(g, state, p)[0], p + sign * g)
        assert torch.equal(t.step(g, state, p.clone(), donate=True)[0], p + sign * g)
        assert torch.equal(torch.func.vmap(lambda g, p, t=t, s=state: t.step(g, s, p)[0])(g, p), p + sign * g)
        slope = torch.func.grad(lambda g, p, t=t, s=state: t.step(g, s, p)[0].sum())(g, p)
        assert torch.equal(slope, sign * torch.ones_like(g))


def test_signs_that_alternate() -> None:
    """A negative number to the power of another is no negative power."""
    check(leaf_function("(-1) ** s.step * g", "(-0.5) ** g", "s.b")(1.0))


def test_any_name() -> None:
    """Of a hyperparameter, of a field or of an operation: also the names that a program uses itself."""

    class Fields(NamedTuple):
        k: Tensor
        t0: Tensor
        x0: Tensor

        @classmethod
        def init(cls, p: Tensor) -> Fields:
            return cls(torch.ones_like(p), torch.full_like(p, 2.0), torch.full_like(p, 3.0))

    @ps.operation
    def x(y: Tensor) -> Tensor:
        return y.flip(0)

    @ps.operation
    def program(y: Tensor) -> Tensor:
        return 2 * y

    @ps.operation
    def mul(y: Tensor, z: float) -> Tensor:
        return y - z

    def names(g: Tensor, s: Fields, p: Tensor, x1: float, c0: float, zip: float) -> tuple[Tensor, Fields]:
        return x(g) * x1 + program(s.k) * zip + mul(p, c0), Fields(
            s.t0.clamp(0, x1), s.x0, s.k.clamp(zip, c0) + torch.where(g > x1, p, g)
        )

    for function in (x, program, mul):
        function.__module__ = "torch_but_not_torch"
    globals()["Fields"] = Fields  # annotations are looked up in the module
    check(ps.leafwise(Fields)(names)(0.5, 1.5, -2.0))  # pyright: ignore[reportArgumentType]


def test_a_number_in_the_place_of_a_tensor() -> None:
    """Whatever can be broadcast stands for the update or a field of the state."""
    check(leaf_function("0.5", "MINUS", "k")(-1.0), transformed=False)
    check(leaf_function("-MINUS", "VECTOR", "s.a")(-1.0), transformed=False)


# --------------------------------------------------------------------------------------------------------------- whose memory


def delayed_function(g: Tensor, s: Alone, p: Tensor) -> tuple[Tensor, Alone]:
    return s.last, Alone(g)


delayed = ps.leafwise(Alone)(delayed_function)


@pytest.mark.parametrize("count", [1, 20])
@pytest.mark.parametrize("way", ["update", "step", "wrapper"])
@pytest.mark.parametrize("executor", [None, "foreach", "leaf"])
def test_a_field_is_the_update(way: str, executor: Any, count: int) -> None:
    """The last gradient is the step, and this gradient is kept: in memory that is about to be overwritten."""
    t = delayed()
    params = [torch.ones(3) for _ in range(count)]
    g = [torch.full((3,), 2.0) for _ in range(count)]
    if way == "wrapper":
        leaves = [torch.nn.Parameter(p.clone()) for p in params]
        optimizer = ps.optim.Optimizer(leaves, t, foreach=executor == "foreach" or None)
        for p, x in zip(leaves, g):
            p.grad = x
        optimizer.step()
        optimizer.step()
        found, kept = [p.detach() for p in leaves], [optimizer.state[p]["last"] for p in leaves]
    else:
        run = t.step if way == "step" else t.update
        state, found = t.init_state(params), [p.clone() for p in params]
        for _ in range(2):
            made, state = run(g, state, found, executor=executor, donate=True)
            found = made if way == "step" else [p + u for p, u in zip(found, made)]
        kept = state.last
    assert all(p.tolist() == [10.0] * 3 for p in found)  # 1 + 7 + 2
    assert all(x.tolist() == [2.0] * 3 for x in kept)
    assert all(x.tolist() == [2.0] * 3 for x in g)
    assert not {x.data_ptr() for x in kept} & {x.data_ptr() for x in g}


STATES = {
    "swapped": ("g", "s.b", "s.a"),
    "the same twice": ("g", "s.a", "s.a"),
    "unchanged": ("g", "s.a", "s.b"),
    "the gradient": ("s.a", "g", "g"),
    "the parameter": ("s.b", "p", "s.a"),
    "a view of the other": ("s.a.view_as(g)", "s.b.view_as(g)", "s.a.view_as(g)"),
    "a view of itself": ("s.b", "s.a.flip(0).flip(0)", "s.b.view_as(g)"),
    "new, twice": ("g * 2", "g * 2", "g * 2"),
    "a choice": ("ps.where(s.step < 5, s.a, s.b)", "ps.where(s.step < 5, s.b, s.a)", "ps.where(s.step < 5, g, s.a)"),
    "closed over": ("VECTOR.expand_as(g)", "VECTOR.expand_as(g)", "VECTOR.expand_as(g)"),
}


@pytest.mark.parametrize("case", STATES)
def test_fields_in_each_others_memory(case: str) -> None:
    """Nothing that comes out shares memory with what went in, or with anything else; what was given away is written last."""
    before = VECTOR.clone()
    check(leaf_function(*STATES[case])(0.5), ("few", "many", "large"), transformed=False)
    check(ps.chain(leaf_function(*STATES[case])(0.5), leaf_function("g * 2", "g")(0.5)), transformed=False)
    assert torch.equal(VECTOR, before)


def test_a_state_that_was_not_given_away_stays() -> None:
    """A pure step hands on no tensor of the old state: the new one may be given away, and the old one is still wanted."""
    t, p = leaf_function("g", "s.a", "s.b")(0.5), torch.ones(2, dtype=torch.float64)
    old = t.init_state(p)
    kept = clone(old)
    for executor in (None, "foreach", "leaf"):
        _, state = t.step(p, old, p, executor=executor)
        assert state.a is not old.a
        ps.chain(leaf_function("g", "s.a + 1", "s.b + 1")(0.5)).step(p, (state,), p.clone(), donate=True, executor=executor)
        check_same(old, kept)


# ---------------------------------------------------------------------------------------------------- what is closed over


def closing_over(w: Any, scale: Any = 3.0) -> tuple[Any, Callable[[Any], None], Callable[[Any], None]]:
    """A transform that closes over a tensor and a number, and what changes them."""

    @ps.leafwise()
    def close(g: Tensor, p: Tensor) -> Tensor:
        return -w.exp() * g * scale

    def change_tensor(x: Any) -> None:
        nonlocal w
        w = x

    def change_number(x: Any) -> None:
        nonlocal scale
        scale = x

    return close(), change_tensor, change_number


@pytest.mark.parametrize("executor", [None, "foreach", "leaf"])
@pytest.mark.parametrize("kind", ["few", "many"])
def test_a_closed_over_tensor_is_read_at_every_step(kind: str, executor: Any) -> None:
    w = torch.tensor(0.0, dtype=torch.float64)
    t, change_tensor, change_number = closing_over(w)
    params = drawn(kind, 1)

    def factor() -> float:
        u, _ = t.update(params, t.init_state(params), params, executor=executor)
        new, _ = t.step(params, t.init_state(params), clone(params), executor=executor, donate=True)
        check_same([x - p for x, p in zip(new, params)], u)
        return float((u[0] / params[0]).nanmedian())

    assert factor() == pytest.approx(-3.0)
    w.fill_(1.0)  # written in place
    assert factor() == pytest.approx(-3.0 * math.e)
    change_tensor(torch.tensor(2.0, dtype=torch.float64))  # the variable is another tensor
    assert factor() == pytest.approx(-3.0 * math.e**2)
    change_number(5.0)
    assert factor() == pytest.approx(-5.0 * math.e**2)
    change_number(MINUS)
    assert factor() == pytest.approx(math.e**2)


@pytest.mark.parametrize("kind", ["few", "many"])
@pytest.mark.parametrize("way", ["update", "step", "donated", "foreach", "leaf", "a chain", "grad", "compiled"])
def test_the_derivative_of_a_closed_over_tensor(way: str, kind: str) -> None:
    """Where nothing but it requires grad."""
    w = torch.nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
    t: ps.Transform = closing_over(w)[0]
    params = drawn(kind, 1)
    expected = -3.0 * w.detach().exp() * sum(x.sum() for x in params)
    if way == "grad":

        def outer(w: Tensor) -> Any:
            t = closing_over(w)[0]
            return sum(x.sum() for x in t.step(params, t.init_state(params), params)[0])

        found = torch.func.grad(outer)(w.detach())
    else:
        if way == "a chain":
            t, expected = ps.chain(ps.trace(0.9), t, ps.scale(2.0)), 2 * expected
        step = t.step
        if way == "compiled":
            step = torch.compile(t.step, fullgraph=True, backend="aot_eager")
        how: Any = {"donate": True} if way == "donated" else {"executor": way} if way in ("foreach", "leaf") else {}
        run = t.update if way == "update" else step
        out, _ = run(params, t.init_state(params), clone(params), **how)
        (found,) = torch.autograd.grad(sum(x.sum() for x in out), w)
    assert found == pytest.approx(float(expected))
    with torch.no_grad():
        assert not any(x.requires_grad for x in t.step(params, t.init_state(params), params)[0])


def test_what_is_closed_over_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A declaration made inside a function is gone with its last transform, and so are its programs and all that they hold."""
    monkeypatch.setattr(purestep._trace.program, "_programs", DeclarationCache(100))
    gc.collect()
    functions, sources = len(vars(purestep._trace.program._functions)), len(linecache.cache)
    for _ in range(3):
        w = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
        t = ps.chain(ps.trace(0.5), closing_over(w)[0])
        params = drawn("few", 1)
        with torch.no_grad():
            t.step(params, t.init_state(params), params)
        last = weakref.ref(w)
        del t, w
    gc.collect()  # the declaration, and then its programs
    gc.collect()
    assert last() is None
    assert all(x.parts == ("trace",) for x in purestep._trace.program._programs.entries.values())
    assert len(vars(purestep._trace.program._functions)) == functions
    assert len(linecache.cache) == sources


def test_programs_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A switch that is another number at every step."""
    monkeypatch.setattr(purestep._trace.program, "_programs", DeclarationCache(20))

    @ps.leafwise()
    def shifted(g: Tensor, p: Tensor, by: int) -> Tensor:
        return g + by

    p = torch.ones(2)
    for k in range(50):
        assert shifted(k).update(p, ps.EmptyState(), p)[0].tolist() == [1.0 + k] * 2
    gc.collect()
    assert len(purestep._trace.program._programs.entries) <= 20
    assert len([name for name in linecache.cache if name.endswith(": shifted>")]) <= 20


class Holder:
    """Whose attribute a leaf function reads."""

    w = torch.tensor(2.0, dtype=torch.float64)


def test_an_attribute_that_is_exchanged() -> None:
    holder = Holder()

    @ps.leafwise()
    def attribute(g: Tensor, p: Tensor) -> Tensor:
        return holder.w * g

    t, p = attribute(), torch.ones(2, dtype=torch.float64)
    assert t.update(p, t.init_state(p), p)[0].tolist() == [2.0, 2.0]
    holder.w = torch.tensor(3.0, dtype=torch.float64)
    assert t.update(p, t.init_state(p), p)[0].tolist() == [3.0, 3.0]


def test_tensors_that_a_leaf_function_makes() -> None:
    """Of numbers: with operations on them, writing to them, and branches on them. Random ones are others at every run."""

    @ps.leafwise()
    def making(g: Tensor, p: Tensor) -> Tensor:
        m = torch.zeros(2, dtype=torch.float64)
        x = g + m
        m[0] = 2.0
        m.add_(torch.tensor(0.5))
        return x * m * (3.0 if m[0] > 1 else 0.0) * float(m[1])

    @ps.leafwise()
    def noisy(g: Tensor, p: Tensor) -> Tensor:
        return torch.rand(2, dtype=torch.float64)

    check(making(), transformed=False)
    p = torch.ones(2, dtype=torch.float64)
    first, second = (noisy().update(p, ps.EmptyState(), p)[0] for _ in range(2))
    assert not torch.equal(first, second)


def test_constants_outlive_what_looks_on() -> None:
    """A program that is made under a tracer, or inside `torch.func`, runs outside of it."""

    def fresh() -> ps.Transform:
        @ps.leafwise()
        def constant(g: Tensor, p: Tensor) -> Tensor:
            return g * torch.tensor([2.0, 3.0]) + torch.tensor(1.0)

        return constant()

    p = torch.ones(2)
    for how in ("fake", "make_fx", "vmap", "grad", "inference"):
        t = fresh()
        update = functools.partial(updated, t)
        if how == "fake":
            with FakeTensorMode():
                update(torch.ones(2))
        elif how == "make_fx":
            make_fx(update)(p)
        elif how == "inference":
            with torch.inference_mode():
                update(p)
        elif how == "vmap":
            torch.func.vmap(update)(torch.ones(3, 2))
        else:
            torch.func.grad(lambda g, update=update: update(g).sum())(p)
        for g in (p, p.clone().requires_grad_()):
            assert update(g).tolist() == [3.0, 4.0]


def updated(t: ps.Transform, g: Tensor) -> Tensor:
    return t.update(g, t.init_state(g), g)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("g * (2.0 if W > 0 else 1.0)", r"refused asks for the value of a tensor .*purestep\.where"),
        ("g * float(W)", "refused asks for the value"),
        ("g * int(W.numpy())", "refused asks for the value"),
        ("g * W.add_(1.0)", r"refused writes to a tensor of shape \(\) that it closes over \(add_\)"),
        ("g * W.__iadd__(1.0)", "refused writes to a tensor"),
        ("(W.data.add_(1.0), g)[1]", "refused calls add_"),
        ("torch.add(W, 1.0, out=W) * g", "refused writes to a tensor"),
        ("torch.nn.functional.relu(g, inplace=True)", "refused calls relu"),
        ("g.mul_(2)", r"refused calls mul_\(\); use mul\(\)"),
        ("g * numpy.ones(2)", "numpy array"),
    ],
)  # fmt: skip
def test_what_cannot_be_recorded_is_refused(source: str, message: str) -> None:
    space: dict[str, Any] = {**globals(), "W": torch.tensor(1.0)}
    exec(f"def refused(g, p):\n    return {source}\n", space)
    t, p = ps.leafwise()(space["refused"])(), torch.ones(2)
    with pytest.raises(TypeError, match=message):
        t.update(p, ps.EmptyState(), p)
    assert space["W"] == 1.0


def test_what_is_asked_of_a_closed_over_tensor() -> None:
    """Its shape and dtype are known; its numbers, as one of Python's, are read at every run."""
    w = torch.tensor([2.0, 4.0], dtype=torch.float64)

    @ps.leafwise()
    def asking(g: Tensor, p: Tensor) -> Tensor:
        first, second = w
        return g * (w.shape[0] + w.dim() + len(w)) * first.item() + second * (0.5 if w.dtype == torch.float64 else 1.0)

    check(asking())
    p = torch.ones(2, dtype=torch.float64)
    w.mul_(2)
    assert asking().update(p, ps.EmptyState(), p)[0].tolist() == [5 * 4.0 + 4.0] * 2
