"""One kernel for a whole chain: the numbers of the program, for every shape, dtype and learning rate without another one."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import purestep as ps
import purestep._executors.compiled
import purestep._trace.program
from purestep import optim
from purestep._core.cache import DeclarationCache
from tests.problems import difference

OPTIMIZERS: dict[str, Any] = {
    "adamw": ps.adamw(0.1),
    "sgd": ps.sgd(0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "radam": ps.radam(0.1),
    "rprop": ps.rprop(0.1),
    "asgd": ps.asgd(0.1),
    "clipped": ps.chain(
        ps.clip_by_global_norm(1.0),
        ps.scale_by_adam(),
        ps.add_decayed_weights(0.1, mask=lambda path, p: p.ndim > 1),
        ps.scale_by_learning_rate(ps.schedules.cosine(0.1, total_steps=10)),
    ),
    "ema": ps.chain(ps.trace(0.9), ps.ema(0.9)),
}
SHAPES: dict[str, tuple[int, ...]] = {
    "matrix": (70, 90),
    "vector": (5,),
    "number": (),
    "one": (1,),
    "none": (0, 3),
    "cube": (2, 3, 4),
}
MANY: dict[str, tuple[int, ...]] = {f"{k:02d}": (k % 5 + 1, 3) for k in range(20)}
"""So many small tensors that they are packed."""


@pytest.fixture(autouse=True)
def no_second_compilation() -> Iterator[None]:
    """Whatever changes, one compilation of a kernel is enough."""
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield


def drawn(seed: int, dtype: torch.dtype = torch.float64, shapes: dict[str, tuple[int, ...]] = SHAPES) -> dict[str, Tensor]:
    """Normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("shapes", [SHAPES, MANY, SHAPES | MANY], ids=["large", "packed", "both"])
@pytest.mark.parametrize("how", ["pure", "donated", "update"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.in_turn("shapes")
def test_the_numbers_are_the_programs(name: str, how: str, shapes: dict[str, tuple[int, ...]]) -> None:
    opt = OPTIMIZERS[name]
    ours, theirs = drawn(0, shapes=shapes), drawn(0, shapes=shapes)
    state, expected = opt.init_state(ours), opt.init_state(theirs)
    for k in range(3):
        grads = drawn(k + 1, shapes=shapes)
        given = (grads, state, ours)
        before = copy.deepcopy(given)
        if how == "update":
            found, state = opt.update(grads, state, ours, compile=True)
            wanted, expected = opt.update(grads, expected, theirs)
        else:
            found, state = opt.step(grads, state, ours, donate=how == "donated", compile=True)
            wanted, expected = opt.step(grads, expected, theirs)
            ours, theirs = found, wanted
        assert difference(found, wanted) <= 1e-12
        assert difference(state, expected) <= 1e-12
        if how == "donated":
            assert all(x is y for x, y in zip(found.values(), given[2].values()))
            assert difference(grads, before[0]) == 0
        else:
            assert difference(given, before) == 0


def test_one_kernel_serves_every_model_and_learning_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    original = purestep._executors.compiled.function
    monkeypatch.setattr(
        purestep._executors.compiled, "function", lambda split, *rest: made.append(split.name) or original(split, *rest)
    )
    monkeypatch.setattr(purestep._trace.program, "_programs", DeclarationCache(100))  # which keep their kernels
    for shapes in (SHAPES, {"w": (8,)}, {"w": (3, 3), "b": (100_000,)}):
        for lr in (0.1, 0.2, torch.tensor(0.3), ps.schedules.linear(0.1, 0.0, total_steps=5)):
            opt = ps.nadam(lr)
            params, state = drawn(0, shapes=shapes), opt.init_state(drawn(0, shapes=shapes))
            for k in range(3):
                params, state = opt.step(drawn(k + 1, shapes=shapes), state, params, donate=True, compile=True)
    assert len(made) == 1


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad"])
def test_where_torch_has_the_kernel_nothing_is_compiled(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A donated step and an optimizer are the fused kernel then, to the last bit, for tensors of all sizes at once."""
    monkeypatch.delattr(purestep._executors.compiled, "compiled")
    opt = getattr(ps, name.lower())(0.1, weight_decay=0.1)
    results = []
    for options in ({"compile": True}, {"executor": "fused"}):
        params, state = drawn(0, shapes=SHAPES | MANY), opt.init_state(drawn(0, shapes=SHAPES | MANY))
        for k in range(3):
            params, state = opt.step(drawn(k + 1, shapes=SHAPES | MANY), state, params, donate=True, **options)
        results.append((params, state))
    assert difference(*results) == 0
    trained = []
    for flag in ("compile", "fused"):
        leaves = [torch.nn.Parameter(p) for p in drawn(0, shapes=SHAPES | MANY).values()]
        optimizer = getattr(optim, name)(leaves, lr=0.1, weight_decay=0.1, **{flag: True})
        for k in range(3):
            for p, g in zip(leaves, drawn(k + 1, shapes=SHAPES | MANY).values()):
                p.grad = None if k == 1 and p.ndim == 3 else g
            optimizer.step()
        trained.append([p.detach() for p in leaves])
    assert difference(*trained) == 0


@pytest.mark.parametrize("donate", [False, True])
def test_a_longer_chain_is_compiled(donate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is more to it than torch's kernel computes, all of it is one kernel of Inductor's."""
    made: list[int] = []
    original = purestep._executors.compiled.compiled

    def counted(split: Any, *rest: Any) -> Any:
        made.append(len(split.parts))
        return original(split, *rest)

    monkeypatch.setattr(purestep._executors.compiled, "compiled", counted)
    opt = ps.chain(ps.clip(1.0), ps.adamw(0.1))
    params = drawn(0)
    opt.step(drawn(1), opt.init_state(params), params, donate=donate, compile=True)
    assert made == [len(opt.links)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_precision(dtype: torch.dtype) -> None:
    """At least as near to the float64 trajectory as op by op."""
    opt = ps.adamw(0.01)
    errors = []
    wide = torch.complex128 if dtype.is_complex else torch.float64
    exact = drawn(0, dtype)
    exact = {name: p.to(wide) for name, p in exact.items()}
    state = opt.init_state(exact)
    for k in range(5):
        exact, state = opt.step({n: g.to(wide) for n, g in drawn(k + 1, dtype).items()}, state, exact)
    for options in ({"compile": True}, {"executor": "foreach"}):
        params, state = drawn(0, dtype), opt.init_state(drawn(0, dtype))
        for k in range(5):
            params, state = opt.step(drawn(k + 1, dtype), state, params, **options)  # type: ignore[arg-type]
        assert all(p.dtype == dtype for p in params.values())
        errors.append(torch.stack([(params[n].to(wide) - p).abs().pow(2).sum() for n, p in exact.items()]).sum().sqrt().item())
    assert errors[0] <= 1.1 * errors[1]


def test_a_state_of_higher_precision() -> None:
    """Half-precision parameters with a float32 state are one kernel too, and nothing changes its dtype."""
    opt = ps.adamw(0.01)
    params = drawn(0, torch.bfloat16)
    state = opt.init_state({name: p.float() for name, p in params.items()})
    expected, wanted = opt.step(drawn(1, torch.bfloat16), state, params)
    for donate in (False, True):
        found, after = opt.step(
            drawn(1, torch.bfloat16), copy.deepcopy(state), copy.deepcopy(params), compile=True, donate=donate
        )
        assert difference(found, expected) <= torch.finfo(torch.bfloat16).eps
        assert difference(after, wanted) <= 1e-6


@pytest.mark.parametrize("donate", [False, True])
def test_memory_layouts(donate: bool) -> None:
    """In any order, as long as it is the same one; otherwise it is the program that runs."""
    opt = ps.adamw(0.1)
    images = {"image": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), "flat": torch.randn(6, 5).t()}
    grads = {"image": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), "flat": torch.randn(5, 6)}
    state = opt.init_state(images)
    expected = opt.step(grads, state, images)
    found = opt.step(grads, copy.deepcopy(state), copy.deepcopy(images), compile=True, donate=donate)
    assert difference(found, expected) <= 1e-6
    assert [p.stride() for p in found[0].values()] == [p.stride() for p in images.values()]


def test_what_is_not_elementwise_runs_as_it_does_without() -> None:
    opt = ps.partition({"hidden": ps.muon(0.02), "rest": ps.adamw(0.1)}, lambda path, p: "hidden" if p.ndim == 2 else "rest")
    shapes: dict[str, tuple[int, ...]] = {"matrix": (6, 4), "vector": (5,)}
    params = drawn(0, shapes=shapes)
    state = opt.init_state(params)
    expected = opt.step(drawn(1, shapes=shapes), state, params)
    assert difference(opt.step(drawn(1, shapes=shapes), state, params, compile=True), expected) <= 1e-12


def test_inside_transforms_it_changes_nothing() -> None:
    opt = ps.adamw(torch.tensor([0.1, 0.2], dtype=torch.float64))
    params = {"w": torch.randn(2, 3, dtype=torch.float64)}
    dims = ps.in_dims(opt)
    state = torch.func.vmap(lambda o, p: o.init_state(p), in_dims=(dims, 0))(opt, params)
    results = [
        torch.func.vmap(lambda o, p, s: o.step(p, s, p, compile=compile), in_dims=(dims, 0, 0))(opt, params, state)  # noqa: B023
        for compile in (False, True)
    ]
    assert difference(*results) == 0


@pytest.mark.parametrize("name", ["RMSprop", "SGD", "AdamW"])
@pytest.mark.parametrize("shapes", [SHAPES, MANY], ids=["large", "packed"])
def test_the_optimizer(name: str, shapes: dict[str, tuple[int, ...]]) -> None:
    """As torch's, with a scheduler, a missing gradient and a pickle on the way."""
    results = []
    for library, options in ((torch.optim, {}), (optim, {"compile": True})):
        params = [torch.nn.Parameter(p) for p in drawn(0, shapes=shapes).values()]
        optimizer = getattr(library, name)(params, lr=0.01, weight_decay=0.1, **options)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        for k in range(6):
            for p, g in zip(params, drawn(k + 1, shapes=shapes).values()):
                p.grad = g
            if k == 4:
                params[0].grad = None
            if k == 5:
                optimizer.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
            optimizer.step()
            scheduler.step()
        results.append([p.detach() for p in params])
    assert difference(*results) <= 1e-12
    assert "compile" not in optimizer.param_groups[0]
    assert pickle.loads(pickle.dumps(optimizer))._compile


@pytest.mark.skipif(
    purestep._executors.compiled.OPENMP is None or torch.get_num_threads() == 1,
    reason="needs torch with OpenMP, and more than one thread",
)
def test_small_tensors_are_done_on_one_thread() -> None:
    """The others on all, and all are there afterwards."""
    seen: list[tuple[int, int]] = []
    threads = torch.get_num_threads()

    def kernel(k: Tensor, x: Tensor) -> list[Tensor]:
        seen.append((x.numel(), torch.get_num_threads()))
        return [x]

    vectors = [[torch.ones(n)] for n in (10_000, 3, 20_000, 5)]
    found = purestep._executors.compiled.called(kernel, torch.ones(1), vectors)
    assert [y.numel() for (y,) in found] == [10_000, 3, 20_000, 5]
    assert sorted(seen) == [(3, 1), (5, 1), (10_000, threads), (20_000, threads)]
    assert torch.get_num_threads() == threads


def test_contradictions() -> None:
    p = torch.nn.Parameter(torch.ones(2))
    for flag in ("fused", "foreach", "differentiable"):
        with pytest.raises(RuntimeError, match=rf"`compile` and `{flag}` cannot be `True` together"):
            optim.AdamW([p], compile=True, **{flag: True})
    opt = ps.sgd(0.1)
    with pytest.raises(ValueError, match=r"compile=True asks for one way to run, and executor='leaf' for another"):
        opt.step(p.detach(), opt.init_state(p.detach()), p.detach(), compile=True, executor="leaf")


def test_a_choice_by_a_number() -> None:
    """A counter decides, for whole tensors."""

    @ps.leafwise(ps.TraceState)
    def delayed(g: Tensor, s: Any, p: Tensor, after: ps.NonNegative) -> Any:
        return ps.where((s.step > after) & (s.step < 5), g, s.momentum_buffer), s._replace(step=s.step + 1, momentum_buffer=g)

    results = []
    for compile in (False, True):
        opt = ps.chain(delayed(1.0), ps.scale(-0.1))
        params, state = drawn(0), opt.init_state(drawn(0))
        for k in range(4):
            params, state = opt.step(drawn(k + 1), state, params, compile=compile)
        results.append(params)
    assert difference(*results) <= 1e-12
