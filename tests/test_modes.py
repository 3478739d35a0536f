"""One text, many ways to run it: every mode gives the same numbers, changes nothing it was not given, and traces once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch._dynamo.utils
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

import purestep as ps
import purestep._trace.program
from tests.cases import CASES, Case, Options, each, each_options
from tests.problems import clone, difference, grads, matrices, mlp

STEPS = 4


def run(t: ps.Transform, step: Any = None, dtype: torch.dtype = torch.float64, problem: Any = mlp, **how: Any) -> Any:
    """A few steps; `step` replaces the transform's own."""
    params, loss = problem(dtype)
    params, state = clone(params), t.init_state(params)
    for _ in range(STEPS):
        params, state = (step or t.step)(grads(loss, params), state, params, **how)
    return params, state


@each_options()
@pytest.mark.parametrize(
    "how",
    [{"donate": True}, {"executor": "leaf"}, {"executor": "foreach"}, {"executor": "foreach", "donate": True}, {"executor": "leaf", "donate": True}],
    ids=str,
)  # fmt: skip
def test_every_mode_agrees(case: Case, options: Options, how: dict[str, Any]) -> None:
    t = case.transform(options)
    assert difference(run(t, problem=case.problem, **how), run(t, problem=case.problem)) <= 1e-13


@each_options()
def test_update_and_apply_is_step(case: Case, options: Options) -> None:
    t = case.transform(options)

    def step(g: Any, state: Any, params: Any) -> Any:
        updates, state = t.update(g, state, params)
        return ps.apply_updates(params, updates), state

    assert difference(run(t, step, problem=case.problem), run(t, problem=case.problem)) <= 1e-13


def graphs() -> int:
    """How many graphs torch.compile has made in this test."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


SMALL = {"w": torch.tensor([[0.5, -1.0], [0.2, 0.3], [1.5, -0.4]], dtype=torch.float64), "b": torch.tensor([0.7, -0.2], dtype=torch.float64)}  # fmt: skip


def small(case: Case) -> Any:
    """A matrix and a vector, for what is slow with many parameters: those that the case treats."""
    return {k: p for k, p in SMALL.items() if case.treats(p)}


def check_compiled(case: Case, options: Options) -> None:
    """What AOTAutograd makes of the graph is looked at for one set of options; for the others test_make_fx looks."""
    t = case.transform(options)
    step = torch.compile(t.step, fullgraph=True, backend="aot_eager" if options is case.options[0] else "eager")
    assert difference(run(t, step, problem=case.problem), run(t, problem=case.problem)) <= 1e-12


def check_compiled_population(case: Case, options: Options) -> None:
    """`torch.compile` of a step for a population, state and all."""
    t = case.transform(options)
    params = {k: torch.stack([p, -0.5 * p]) for k, p in small(case).items()}

    def train(params: Any) -> Any:
        return t.step({k: torch.sin(3 * p) for k, p in params.items()}, t.init_state(params), params)[0]

    population = torch.func.vmap(train, randomness="error")
    compiled = torch.compile(population, fullgraph=True, backend="eager")
    assert difference(compiled(params), population(params)) <= 1e-12


@each_options()
@pytest.mark.parametrize("check", [check_compiled, check_compiled_population], ids=["alone", "population"])
@pytest.mark.in_turn("check")
def test_compiled(case: Case, options: Options, check: Callable[[Case, Options], None]) -> None:
    """As one graph."""
    check(case, options)
    assert graphs() == 1


@pytest.mark.parametrize("batched", [False, True])
def test_compiled_before_it_ever_ran(batched: bool) -> None:
    """Nothing that the engine finds out on the first step may need what torch.compile cannot trace, such as a lock."""

    class Own(NamedTuple):
        step: ps.Scalar
        mean: Tensor

        @classmethod
        def init(cls, p: Tensor) -> Own:
            return cls(ps.counter(p), torch.zeros_like(p))

    globals()["Own"] = Own  # annotations are looked up in the module

    def never_seen(g: Tensor, s: Own, p: Tensor) -> tuple[Tensor, Own]:
        mean = s.mean.lerp(g, 0.5)
        return mean / (1 - 0.5 ** (s.step + 1)), Own(s.step + 1, mean)

    t = ps.chain(ps.leafwise(Own)(never_seen)(), ps.scale(-0.1))

    def train(params: Any) -> Any:
        return t.step(params, t.init_state(params), params)[0]

    params = {k: torch.stack([p, -p]) for k, p in SMALL.items()}
    step = torch.func.vmap(train) if batched else train
    compiled = torch.compile(step, fullgraph=True, backend="eager")(params)
    assert difference(compiled, {k: 0.9 * p for k, p in params.items()}) <= 1e-12


@each()
def test_export(case: Case) -> None:
    t = case.transform()
    params = small(case)
    given = ({k: torch.sin(3 * p) for k, p in params.items()}, t.init_state(params), params)

    class Step(torch.nn.Module):
        def forward(self, g: Any, state: Any, params: Any) -> Any:
            return t.step(g, state, params)

    exported = torch.export.export(Step(), given, strict=False).module()
    assert difference(exported(*given), t.step(*given)) <= 1e-12


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("name", ["adamw", "chain"])
def test_compiled_with_inductor(name: str, donate: bool) -> None:
    t = next(c for c in CASES if c.name == name).transform()
    step = torch.compile(lambda g, s, p: t.step(g, s, p, donate=donate), fullgraph=True)
    assert difference(run(t, step, torch.float32), run(t, None, torch.float32)) <= 1e-5


def test_inductor_inside_torch_func() -> None:
    """Gradients that are products of matrices, in an unrolled loop: Inductor (2.13) computes torch.add(x, a @ b, alpha=k) wrongly."""
    x = torch.randn(8, 4)

    def after(w: Tensor) -> Tensor:
        opt = ps.sgd(lr=0.1, weight_decay=0.3, momentum=0.5)
        return ps.meta.unroll(opt, lambda w: ((x @ w) ** 2).mean(), w, 2).losses.sum()

    w = torch.randn(4, 3)
    compiled = torch.compile(torch.func.grad(after), fullgraph=True)
    assert difference(compiled(w), torch.func.grad(after)(w)) <= 1e-5


@each("unread")
@pytest.mark.parametrize("how", ["step", "vmap of grad"])
@pytest.mark.in_turn("how")
def test_nothing_waits_for_the_device(case: Case, how: str) -> None:
    """On the `meta` device, whose tensors have no values that could be read, copied to the host or branched on."""
    t = ps.tensors(case.transform(), device="meta")
    params = {k: torch.stack([p, p]).to("meta") if how != "step" else p.to("meta") for k, p in case.problem()[0].items()}

    def train(params: Any) -> Any:
        state = t.init_state(params)
        for _ in range(2):
            params, state = t.step({k: torch.sin(3 * p) for k, p in params.items()}, state, params)
        return params

    def outer(params: Any) -> Tensor:
        return sum((p.abs().sum() for p in train(params).values()), torch.zeros((), device="meta"))

    made = train(params) if how == "step" else torch.func.vmap(torch.func.grad(outer))(params)
    assert {k: (p.device.type, p.shape) for k, p in made.items()} == {k: ("meta", p.shape) for k, p in params.items()}


def _clipped(lr: Any) -> ps.Transform:
    return ps.chain(ps.clip_by_global_norm(0.5), ps.lion(lr))


@pytest.mark.parametrize("make", [ps.adamw, ps.lamb, _clipped], ids=["adamw", "lamb", "a chain"])
@pytest.mark.parametrize("kind", ["tensor", "schedule", "population"])
def test_no_recompilation_while_lr_changes(make: Any, kind: str) -> None:
    params, loss = matrices()

    def alone(t: ps.Transform, state: Any, params: Any) -> Any:
        return t.step(torch.func.grad(loss)(params), state, params)

    def rate(i: int) -> Any:
        if kind == "schedule":
            return ps.schedules.cosine(0.1, total_steps=50)
        return torch.tensor([0.1, 0.05]) / (i + 1) if kind == "population" else torch.tensor(0.1 / (i + 1))

    several = kind == "population"
    step = torch.func.vmap(alone, in_dims=(ps.in_dims(make(rate(0))), 0, 0)) if several else alone
    mine = {k: torch.stack([p, 2 * p]) for k, p in params.items()} if several else params
    # vmap returns a counter that is the same for all as an expanded tensor: its stride would be a guard of the first graph
    state = ps.stack([make(0.1).init_state(params)] * 2) if several else make(rate(0)).init_state(mine)
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    for i in range(50):
        given = (make(rate(i)), state, mine)
        mine, state = compiled(*given)
        if i in (0, 1, 49):
            assert difference(mine, step(*given)[0]) <= 1e-12
    assert graphs() == 1


@each_options()
def test_make_fx(case: Case, options: Options) -> None:
    t = case.transform(options)
    params, loss = case.problem()
    state, g = t.init_state(params), grads(loss, params)
    graph = make_fx(lambda *a: t.step(*a))(g, state, params)
    assert difference(graph(g, state, params), t.step(g, state, params)) <= 1e-13


@each_options()
def test_one_program_while_numbers_change(case: Case, options: Options) -> None:
    """Steps, learning rates and betas are inputs of a program: no change of a number traces again."""
    t = case.transform(options)
    run(t, problem=case.problem, executor="foreach")
    before = len(purestep._trace.program._programs.entries)
    for k in range(2, 5):
        changed = {
            name: pytree.tree_map(lambda x, k=k: x and x * (1 - 0.01 * k), value)
            for name, value in t.hyperparams.items()
            if isinstance(value, (float, tuple)) and value != 0.0
        }
        changed = {name: max(value, case.least[name]) if name in case.least else value for name, value in changed.items()}
        run(t.replace(**changed), problem=case.problem, executor="foreach")
    assert len(purestep._trace.program._programs.entries) == before


# ------------------------------------------------------------------------------------------------------------------ purity


@each_options()
@pytest.mark.parametrize("executor", [None, "leaf", "foreach"])
@pytest.mark.parametrize("method", ["update", "step"])
@pytest.mark.in_turn("executor")
def test_nothing_given_is_changed(case: Case, options: Options, executor: Any, method: str) -> None:
    """Bit for bit, and the version counters too: not even written with the same value."""
    t = case.transform(options)
    params, loss = case.problem()
    _, state = t.step(grads(loss, params), t.init_state(params), params)
    given = (grads(loss, params), state, params)
    copy = clone(given)
    tensors = [x for x in pytree.tree_leaves(given) if isinstance(x, Tensor)]
    versions = [x._version for x in tensors]
    hyper = [(x, x.clone()) for x in pytree.tree_leaves(t) if isinstance(x, Tensor)]
    getattr(t, method)(*given, executor=executor)
    assert [x._version for x in tensors] == versions
    for a, b in zip(pytree.tree_leaves(given), pytree.tree_leaves(copy)):
        assert a is b or torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in hyper)


@each_options()
def test_updates_share_no_memory_with_the_state(case: Case, options: Options) -> None:
    """So that the state's memory can be given away while the updates are still in use."""
    t = case.transform(options)
    params, loss = case.problem()
    g = grads(loss, params)
    for executor in (None, "leaf", "foreach"):
        updates, state = t.update(g, t.init_state(params), params, executor=executor)
        held = {x.data_ptr() for x in pytree.tree_leaves(state) if isinstance(x, Tensor)}
        assert not held & {u.data_ptr() for u in updates.values()}


@each_options(capability="donation")
def test_donated_memory_is_reused(case: Case, options: Options) -> None:
    """With donate=True the new parameters and state are the old tensors; the gradients are untouched."""
    t = case.transform(options)
    params, loss = case.problem()
    state, g = t.init_state(params), grads(loss, params)
    copy = clone(g)
    new, after = t.step(g, state, params, donate=True)
    assert all(new[k] is params[k] for k in params)
    for a, b in zip(pytree.tree_leaves(after), pytree.tree_leaves(state)):
        assert a is b or b.dim() == 0  # where masks split the parameters, a counter is replaced
    assert difference(g, copy) == 0


@each()
def test_without_fused_kernels_only_the_clock_changes(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(case.transform(), problem=case.problem)
    monkeypatch.setattr("purestep._executors.chains.KERNELS", [])
    assert difference(run(case.transform(), problem=case.problem), expected) <= 1e-13


# ------------------------------------------------------------------------------------------------------ the program itself


def test_the_program_of_adamw() -> None:
    """Contraction and reuse, as the design has it."""
    source = ps.adamw().program(donate=True)
    lines = [line.strip() for line in source.splitlines()[1:-1]]
    assert lines == [
        "n0 = step + 1",
        "lerp_(exp_avg, g, 1 - betas_0)",
        "mul_(exp_avg_sq, betas_1)",
        "addcmul_(exp_avg_sq, g, g, 1 - betas_1)",
        "t0 = div(exp_avg_sq, (1 - (betas_1 ** n0)))",
        "sqrt_(t0)",
        "add_(t0, eps)",
        "mul_(t0, (1 - (betas_0 ** n0)))",
        "rdiv_(t0, exp_avg)",
        "axpy_(t0, p, weight_decay)",
        "axpy_(p, t0, -lr)",
    ]


def check(function: Any, state: Any, *arguments: Any, tolerance: float = 0.0) -> str:
    """A leaf function of our own as a program, donated or not, against itself; returns the source."""
    t = ps.leafwise(state)(function)(*arguments)
    for donate in (False, True):
        params = [torch.randn(3, 2, dtype=torch.float64), torch.randn(4, dtype=torch.float64)]
        g = [torch.randn_like(p) for p in params]
        s = t.init_state(params)
        for _ in range(3):
            expected = t.step(g, clone(s), clone(params), executor="leaf")
            params, s = t.step(g, s, params, executor="foreach", donate=donate)
            assert difference((params, s), expected) <= tolerance
        updates, s2 = t.update(g, clone(s), params, executor="foreach", donate=donate)
        assert difference((updates, s2), t.update(g, s, params, executor="leaf")) <= tolerance
    return t.program(donate=True)


class Pair(NamedTuple):
    a: Tensor
    b: Tensor

    @classmethod
    def init(cls, p: Tensor) -> Pair:
        return cls(torch.ones_like(p), torch.full_like(p, 2.0))


def test_states_that_swap() -> None:
    """Each new value is another field's old one: neither may be overwritten before the other is read."""

    def swap(g: Tensor, s: Pair, p: Tensor) -> tuple[Tensor, Pair]:
        return g * s.a, Pair(s.b, s.a)

    assert "clone(" in check(swap, Pair)


def test_an_old_value_read_after_the_new() -> None:
    def late(g: Tensor, s: Pair, p: Tensor) -> tuple[Tensor, Pair]:
        a = s.a + g
        return a * s.a - s.b, Pair(a, s.b * s.a)

    check(late, Pair)


def test_one_value_in_two_fields() -> None:
    def both(g: Tensor, s: Pair, p: Tensor) -> tuple[Tensor, Pair]:
        a = s.a * 0.5 + g
        return a, Pair(a, a)

    check(both, Pair)


def test_operations_without_a_foreach_twin_loop_over_the_parameters() -> None:
    @ps.operation
    def center(x: Tensor, keep: float) -> Tensor:
        return x - (1 - keep) * x.mean() if x.ndim > 1 else x  # a branch on a shape: the tracer does not look inside

    def odd(g: Tensor, s: Pair, p: Tensor, k: float) -> tuple[Tensor, Pair]:
        clipped = g.clamp(-0.5, 0.5)
        a = torch.where(clipped > 0, s.a, s.b)
        b = ps.where(s.b > 1, 1.0, s.b)
        return center(torch.softmax(a, dim=0), k) + clipped.cumsum(0), Pair(a, b)

    source = check(odd, Pair, 0.25)
    assert "for x" in source


def test_results_that_alias_their_arguments_are_not_overwritten() -> None:
    @ps.operation
    def itself(x: Tensor) -> Tensor:
        return x

    def alias(g: Tensor, s: Pair, p: Tensor) -> tuple[Tensor, Pair]:
        same = itself(s.a)
        view = s.b.view_as(g)
        new = Pair(s.a * 3, s.b + 1)  # would overwrite what `same` and `view` still show
        return (same + g) * 2 + view, new

    check(alias, Pair)


def test_all_arithmetic() -> None:
    """Every operator, with a number on either side, contracted or not."""

    def everything(g: Tensor, s: Pair, p: Tensor, k: float) -> tuple[Tensor, Pair]:
        x = 2 - g
        x = x - k * g + g * g * k - g / (p * p + 1) + k * (s.a / s.b) - (g * s.b)
        x = -x + (k / (g * g + 1)) - (x + k) + (x - k) + (1 - k) * x / 2
        y = ps.maximum(x, k) + ps.minimum(k, x) + abs(x) + x**2 + (x * x) ** 0.5 + torch.sign(x) * k**2
        z = ps.lerp(y, g, k) - k * -g + torch.exp(-(g * g)) + torch.reciprocal(1 + g * g) + torch.square(g)
        return z, Pair(s.a - k * s.a * g, torch.maximum(s.b, z))

    source = check(everything, Pair, 0.3, tolerance=1e-14)
    assert "addcdiv" in source
    assert "addcmul" in source


def test_numbers_stay_numbers() -> None:
    class Counted(NamedTuple):
        step: ps.Scalar
        product: ps.Scalar

        @classmethod
        def init(cls, p: Tensor) -> Counted:
            return cls(ps.counter(p), ps.counter(p) + 1)

    globals()["Counted"] = Counted  # annotations are looked up in the module

    def number(g: Tensor, s: Counted, p: Tensor, k: float) -> tuple[Tensor, Counted]:
        t = s.step + 1
        product = s.product * (1 - k / t)
        warm = ps.where(t < 2, 0.5, ps.minimum(1.0, ps.root(k)))
        return g * (warm / (1 + product)) * torch.exp(-t), Counted(t, product)

    check(number, Counted, 0.25, tolerance=1e-7)  # `product` is stored as float32


def test_a_leaf_function_that_branches_is_told_so() -> None:
    @ps.leafwise()
    def branch(g: Tensor, p: Tensor, k: float) -> Tensor:
        return g * k if k > 0 else g

    with pytest.raises(TypeError, match=r"branch asks for the value of a tensor or a hyperparameter.*purestep\.where"):
        branch(0.5).step(torch.ones(2), ps.EmptyState(), torch.ones(2), executor="foreach")
    # the leaf function itself can be run, which is how its author debugs it
    assert branch(0.5).step(torch.ones(2), ps.EmptyState(), torch.ones(2), executor="leaf")[0].tolist() == [1.5, 1.5]


def test_a_leaf_function_that_writes_is_told_so() -> None:
    @ps.leafwise()
    def write(g: Tensor, p: Tensor) -> Tensor:
        return g.mul_(2)

    with pytest.raises(TypeError, match=r"changes nothing in place, but write calls mul_\(\)"):
        write().step(torch.ones(2), ps.EmptyState(), torch.ones(2))


def test_a_leaf_function_with_the_wrong_state_is_told_so() -> None:
    @ps.leafwise(Pair)
    def wrong(g: Tensor, s: Pair, p: Tensor) -> Any:
        return g, (s.a, s.b)

    p = torch.ones(2)
    for executor in ("leaf", "foreach"):
        with pytest.raises(TypeError, match=r"wrong must return \(update, Pair\)"):
            wrong().step(p, wrong().init_state(p), p, executor=executor)
