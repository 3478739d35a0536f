"""Many small tensors run as one long one, large ones in blocks: the same numbers, and no one can tell but by the clock."""

from __future__ import annotations

import copy
import io
import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import purestep as ps
import purestep._executors.packed
import purestep._executors.tiles
from purestep import optim
from purestep._core import threads
from purestep.algorithms import kernels as fused
from tests.cases import Case, Options, each_options
from tests.problems import clone, difference

SHAPES = [(3, 4), (5,), (4, 2), (2, 2, 2), (1,), ()] * 8
STEPS = 4


def draw(seed: int, case: Case | None = None) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    return [x for x in drawn if case is None or case.treats(x)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each bucket that was run as one tensor."""
    counted: list[int] = []
    original = purestep._executors.packed.in_buffer

    def in_buffer(*args: Any) -> Any:
        counted.append(len(args[0].params))
        return original(*args)

    monkeypatch.setattr("purestep._executors.packed.in_buffer", in_buffer)
    return counted


def train(t: ps.Transform, case: Case | None = None, steps: int = STEPS, **how: Any) -> Any:
    params = draw(0, case)
    state = t.init_state(params)
    for k in range(steps):
        params, state = t.step(draw(k + 1, case), state, params, **how)
    return params, state


@each_options()
@pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])
@pytest.mark.in_turn("donate")
def test_the_numbers_are_those_of_a_loop(case: Case, options: Options, donate: bool) -> None:
    t = case.transform(options)
    assert difference(train(t, case, donate=donate), train(t, case, executor="leaf")) <= 1e-12


@each_options()
def test_updates(case: Case, options: Options) -> None:
    t = case.transform(options)
    params, state = train(t, case)
    expected = t.update(draw(9, case), state, params, executor="leaf")
    updates, after = t.update(draw(9, case), state, params)
    assert difference((updates, after), expected) <= 1e-12
    t.update(draw(10, case), state, params)  # must not write on what the first has returned
    assert difference((updates, after), expected) <= 1e-12


@each_options()
def test_nothing_given_is_changed(case: Case, options: Options) -> None:
    t = case.transform(options)
    params, state = train(t, case)
    given = (draw(9, case), state, params)
    copied = clone(given)
    tensors = [x for x in pytree.tree_leaves(given) if isinstance(x, Tensor)]
    versions = [x._version for x in tensors]
    t.step(*given)
    t.update(*given)
    assert [x._version for x in tensors] == versions
    assert all(a is b or torch.equal(a, b) for a, b in zip(pytree.tree_leaves(given), pytree.tree_leaves(copied)))


@pytest.mark.parametrize("make", [ps.nadam, ps.rmsprop], ids=["parameters read", "updates added"])
def test_this_is_what_runs(make: Any, calls: list[int]) -> None:
    t = make(0.1, weight_decay=0.1) if make is ps.nadam else make(0.1)
    train(t)
    train(t, donate=True)
    assert calls == [len(SHAPES)] * 2 * STEPS


@pytest.mark.parametrize("make", [ps.adamw, ps.sgd, ps.adagrad], ids=["adamw", "sgd", "adagrad"])
def test_a_kernel_costs_less(make: Any, calls: list[int]) -> None:
    train(make(0.1), donate=True)
    assert not calls


@pytest.mark.parametrize(
    ("reason", "params"),
    [
        ("too few", draw(0)[:15]),
        ("too large", [torch.zeros(5000) for _ in range(20)]),
        ("not in one piece", [torch.zeros(3, 2).T for _ in range(20)]),
    ],
    ids=["too few", "too large", "not in one piece"],
)
def test_this_is_when_it_does_not(reason: str, params: list[Tensor], calls: list[int]) -> None:
    t = ps.nadam(0.1)
    t.step([torch.ones_like(p) for p in params], t.init_state(params), params)
    assert not calls, reason


def test_what_is_not_elementwise_is_run_parameter_by_parameter(calls: list[int]) -> None:
    @ps.operation
    def norm(x: Tensor) -> Tensor:
        return x.norm()

    @ps.leafwise()
    def normalize(g: Tensor, p: Tensor) -> Tensor:
        return g / norm(g)

    t = normalize()
    params = draw(0)
    updates, _ = t.update(draw(1), t.init_state(params), params)
    assert all(abs(u.norm() - 1) < 1e-12 for u in updates)
    assert not calls


def test_mixed_dtypes_and_missing_gradients(calls: list[int]) -> None:
    t = ps.nadam(0.1, weight_decay=0.1)
    params = [p.to(torch.float32) if k % 2 else p for k, p in enumerate(draw(0))]
    results = []
    for executor in (None, "leaf"):
        p, state = clone(params), t.init_state(params)
        for k in range(6):
            g = [x.to(q.dtype) for x, q in zip(draw(k + 1), p)]
            if k in (1, 4):
                g = [None if j in (3, 17) else x for j, x in enumerate(g)]
            p, state = t.step(g, state, p, executor=executor, donate=executor is None)
        results.append((p, state))
    assert difference(*results) <= 1e-6
    assert calls


def test_the_state_moves_into_one_piece_of_memory_once() -> None:
    params = [torch.nn.Parameter(p) for p in draw(0)]
    optimizer = optim.NAdam(params)
    places = []
    for k in range(3):
        for p, g in zip(params, draw(k)):
            p.grad = g
        optimizer.step()
        places.append([optimizer.state[p]["exp_avg"].data_ptr() for p in params])
    assert places[0] == places[1] == places[2]
    assert len({optimizer.state[p]["exp_avg"].untyped_storage().data_ptr() for p in params}) == 1


@pytest.mark.parametrize("cls", ["AdamW", "NAdam", "RMSprop"])
@pytest.mark.parametrize("how", ["deepcopy", "checkpoint", "torch's checkpoint", "replaced by hand"])
def test_a_state_from_elsewhere(cls: str, how: str) -> None:
    """The same trajectory as torch's, wherever the state lies in memory."""
    options: Options = {"lr": 0.1, "weight_decay": 0.1, **({"momentum": 0.9} if cls == "RMSprop" else {})}

    def begin(namespace: Any) -> Any:
        return getattr(namespace, cls)([torch.nn.Parameter(p) for p in draw(0)], **options)

    def go_on(optimizer: Any, steps: range) -> None:
        for k in steps:
            for p, g in zip(optimizer.param_groups[0]["params"], draw(k + 1)):
                p.grad = g
            optimizer.step()

    theirs, ours = begin(torch.optim), begin(optim)
    go_on(theirs, range(3))
    go_on(ours, range(3))
    if how == "deepcopy":
        ours = copy.deepcopy(ours)
    elif how == "replaced by hand":
        for state in ours.state.values():
            for name, x in state.items():
                state[name] = x.clone()
    else:
        file = io.BytesIO()
        torch.save((theirs if how == "torch's checkpoint" else ours).state_dict(), file)
        file.seek(0)
        fresh = begin(optim)
        fresh.load_state_dict(torch.load(file, weights_only=True))
        for p, q in zip(fresh.param_groups[0]["params"], ours.param_groups[0]["params"]):
            p.data.copy_(q)
        ours = fresh
    go_on(theirs, range(3, 6))
    go_on(ours, range(3, 6))
    a, b = ([p.detach() for p in o.param_groups[0]["params"]] for o in (ours, theirs))
    assert difference(a, b) <= 1e-8  # NAdam's products are rounded to float32 on the way


def test_two_threads_may_step_one_transform() -> None:
    t = ps.nadam(0.1)
    expected, _ = train(t, steps=50)
    results: list[Any] = [None] * 4

    def work(i: int) -> None:
        results[i], _ = train(t, steps=50)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in workers:
        thread.start()
    for thread in workers:
        thread.join()
    assert all(difference(r, expected) == 0 for r in results)


@each_options()
@pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])
@pytest.mark.in_turn("donate")
def test_blocks(case: Case, options: Options, donate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of 12, 30 and 1 elements in blocks of 7; nothing given is changed unless it was given away."""
    monkeypatch.setattr(purestep._executors.tiles, "TILE", 7)
    monkeypatch.setattr(purestep._executors.tiles, "SIZE", 0)
    shapes = [s for s in ((3, 4), (30,), (5, 3), ()) if case.treats(torch.zeros(s))]

    def drawn(seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]

    t = case.transform(options)
    results = []
    for how in ({"donate": donate}, {"executor": "leaf"}):
        params, state = drawn(0), t.init_state(drawn(0))
        for k in range(STEPS):
            given = (drawn(k + 1), state, params)
            copied = clone(given)
            params, state = t.step(*given, **how)  # type: ignore[arg-type]
            assert difference(given[0], copied[0]) == 0
            if not donate:
                assert difference(given, copied) == 0
            elif "donate" in how:
                assert all(a is b for a, b in zip(params, given[2]))
        updates, after = t.update(drawn(9), state, params)
        results.append((params, state, updates, after))
    assert difference(*results) <= 1e-12


def test_blocks_are_what_runs_on_large_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    original = purestep._executors.tiles.blocks
    monkeypatch.setattr(purestep._executors.tiles, "TILE", 8)
    monkeypatch.setattr(purestep._executors.tiles, "SIZE", 0)
    monkeypatch.setattr(purestep._executors.tiles, "blocks", lambda given: sizes.append(max(given)) or original(given))
    t, p = ps.nadam(0.1), torch.zeros(100)
    t.step(torch.ones(100), t.init_state(p), p)
    assert sizes[-1] == 8


def test_small_tensors_on_one_thread_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel is called for small tensors with one thread, and the number of threads is what it was afterwards."""
    count = torch.get_num_threads()
    seen: list[tuple[int, int]] = []
    original = torch._fused_adamw_

    def spy(params: Any, *args: Any, **kwargs: Any) -> None:
        seen.append((len(params), torch.get_num_threads()))
        original(params, *args, **kwargs)

    adamw = fused._adam(spy, amsgrad=False)
    sizes = [3] * 10 + [5000] * 2
    lists = [[torch.randn(n, generator=torch.Generator().manual_seed(k)) for n in sizes] for k in range(4)]
    results = []
    for serial in (threads.SERIAL, 0):
        monkeypatch.setattr(threads, "SERIAL", serial)
        p, g, m, v = [[x.clone() for x in xs] for xs in lists]
        state = {"exp_avg": m, "exp_avg_sq": [x.abs() for x in v], "step": lambda: torch.tensor(3.0)}
        adamw(p, g, state, {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8}, 2)
        results.append([*p, *m])
    assert difference(*results) == 0
    assert torch.get_num_threads() == count
    if count > 1 and threads.OPENMP is not None:
        assert seen == [(2, count), (10, 1), (12, count)]


@pytest.mark.skipif(
    threads.OPENMP is None or torch.get_num_threads() == 1, reason="needs torch with OpenMP, and more than one thread"
)
def test_threads_that_begin_meanwhile_have_all_their_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of threads is set for the calling thread alone."""
    found: list[int] = []

    def kernel(*args: Any, **kwargs: Any) -> None:
        found.append(torch.get_num_threads())
        other = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        other.start()
        other.join()

    p = [torch.zeros(3) for _ in range(10)]
    state = {"exp_avg": p, "exp_avg_sq": p, "step": lambda: torch.tensor(1.0)}
    fused._adam(kernel, amsgrad=False)(p, p, state, {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8}, 2)
    assert found == [1, torch.get_num_threads()]
