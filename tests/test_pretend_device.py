"""Every transform on a device that is none (`tests.pretend_device`), where whatever waits for the device raises.

The checks run in a process of their own, because torch has one place for a device that is not its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import purestep as ps
from benchmarks import launches
from purestep import optim
from tests import pretend_device
from tests.cases import ALL, CASES, Case, Options, each, each_options
from tests.cases_methods import value_and_grad
from tests.problems import clone, difference, grads
from tests.test_long_runs import STOP, at, counters, with_counters

WARM = 2
"""Steps after which nothing may wait or move any more."""

STEPS = 6
"""The last three are captured, and replayed twice."""


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Callable[..., Any]]:
    """Runs a function of this module in the process that has the device, and gives what it returns or raises."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=started) as pool:
        yield lambda function, *args: pool.submit(function, *args).result(timeout=120)


def started() -> None:
    torch.set_num_threads(1)
    pretend_device.install()


class Problem:
    """The parameters of a case on the CPU, where every gradient is computed, and the gradients at given parameters."""

    def __init__(self, case: Case, dtype: torch.dtype = torch.float64) -> None:
        self.rest, self.loss = case.problem()
        self.dtype = dtype
        self.params = {k: p.to(dtype) for k, p in self.rest.items() if case.treats(p)}

    def grads(self, params: Any) -> Any:
        found = grads(self.loss, {**self.rest, **{k: p.detach().double() for k, p in params.items()}})
        return {k: found[k].to(self.dtype) for k in params}


def place(case: Case, options: Options) -> int:
    """What tells a case and its options in the other process: a function cannot be sent."""
    return next(k for k, (c, o) in enumerate(ALL) if c.name == case.name and o is options)


def on_the_device(tree: Any) -> bool:
    return all(x.device.type == pretend_device.NAME for x in pytree.tree_leaves(tree) if isinstance(x, Tensor))


# --------------------------------------------------------------------------------------------------------------- pure steps


def check_pure(k: int, change: Callable[[ps.Transform], ps.Transform] = lambda t: t, on_both: bool = True) -> int:
    """Donated steps, then a graph of one, of a transform with a change; the launches of a step."""
    case, options = ALL[k]
    t = change(case.transform(options))
    problem, here = Problem(case), t if on_both else case.transform(options)
    params = clone(problem.params)
    state = here.init_state(params)
    moved = pretend_device.put(params)
    theirs = t.init_state(moved)
    assert on_the_device(theirs), "state is on the CPU"
    buffers, launches, places, graph = pretend_device.put(problem.grads(params)), 0, [], pretend_device.Graph()
    for step in range(STEPS):
        g = problem.grads(params)
        params, state = here.step(g, state, params)
        pretend_device.fill(buffers, g)
        if step < WARM:
            moved, theirs = t.step(buffers, theirs, moved, donate=True)
        elif step < STEPS - 3:
            with pretend_device.watched() as found:
                moved, theirs = t.step(buffers, theirs, moved, donate=True)
            launches = sum(found.values())
        elif step == STEPS - 3:
            with graph.capture():
                moved, theirs = t.step(buffers, theirs, moved, donate=True)
        else:
            graph.replay()
        found_places = pretend_device.addresses((moved, theirs))
        assert step < WARM or places == found_places, f"step {step} moves {places} to {found_places}"
        places = found_places
        apart = difference(pretend_device.taken((moved, theirs)), (params, state))
        assert apart <= 1e-9, f"step {step} is {apart} from the CPU's"
    assert on_the_device((moved, theirs)), "something is on the CPU"
    return launches


def check_waiting(k: int) -> None:
    """Donated steps that may wait."""
    case, options = ALL[k]
    t, problem = case.transform(options), Problem(case)
    params, moved = clone(problem.params), pretend_device.put(problem.params)
    state, theirs = t.init_state(params), t.init_state(moved)
    for step in range(4):
        g = problem.grads(params)
        params, state = t.step(g, state, params)
        places = pretend_device.addresses((moved, theirs))
        with pretend_device.watched(strict=False):
            moved, theirs = t.step(pretend_device.put(g), theirs, moved, donate=True)
        assert step < WARM or places == pretend_device.addresses((moved, theirs))
        assert difference(pretend_device.taken((moved, theirs)), (params, state)) <= 1e-6
    assert on_the_device((moved, theirs))
    assert pretend_device.device.waits, "it does not wait any more: its case need not say so"


@pytest.mark.parametrize("case", [c for c in CASES if "unread" in c.lacks], ids=str)
def test_what_waits_by_design_computes_the_same(case: Case, elsewhere: Callable[..., Any]) -> None:
    """`Case.lacks` has the reason under "unread"."""
    elsewhere(check_waiting, place(case, case.options[0]))


@each_options(capability="unread")
def test_donated_steps_wait_for_nothing(case: Case, options: Options, elsewhere: Callable[..., Any]) -> None:
    """Nor do they move anything, and a graph of one goes on as the steps would have."""
    assert elsewhere(check_pure, place(case, options)) > 0


def check_hypers_there(k: int) -> None:
    check_pure(k, lambda t: ps.tensors(t, device=pretend_device.NAME), False)


def check_schedules_there(k: int) -> None:
    """Every number as a schedule, which is called with a counter on the device."""

    def scheduled(t: ps.Transform) -> ps.Transform:
        for name, x in t.hyperparams.items():
            if type(x) is float:
                with contextlib.suppress(TypeError):  # some numbers follow no schedule, which is said there or here
                    made = t.replace(**{name: follow(x)})
                    made.init_state(ALL[k][0].problem()[0])
                    t = made
        return t

    check_pure(k, scheduled)


def follow(x: float) -> Callable[[Any], Any]:
    return lambda step: x * (1 + 0.0 * step)


@each("unread")
@pytest.mark.parametrize("check", [check_hypers_there, check_schedules_there])
@pytest.mark.in_turn("check")
def test_numbers_on_the_device_are_not_read(case: Case, check: Callable[[int], None], elsewhere: Callable[..., Any]) -> None:
    elsewhere(check, place(case, case.options[0]))


# -------------------------------------------------------------------------------------------------------------- the optimizer


def state_of(optimizer: torch.optim.Optimizer) -> list[Any]:
    """The tensors of the state, parameter by parameter."""
    return [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]


def closure_of(optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    """The loss of `tests.cases_methods`, whose gradient is a formula."""
    params = optimizer.in_order

    def closure() -> Any:
        with torch.no_grad():
            value, found = value_and_grad([p.detach() for p in params])
            for p, g in zip(params, found):
                if p.grad is None:
                    p.grad = g
                else:
                    p.grad.copy_(g)
        return value

    return closure


def trained(pairs: list[torch.optim.Optimizer], problem: Problem, run: Callable[[Any, Any], Any]) -> None:
    """Put the gradients at the CPU's parameters into both optimizers, step on the CPU, and run `run` for the device."""
    here, there = pairs
    mine, theirs = [o.in_order for o in pairs]
    found = problem.grads(dict(zip(problem.params, mine)))
    for g, p, q in zip(found.values(), mine, theirs):
        p.grad = g
        if q.grad is None:
            q.grad = pretend_device.put(g)
        else:
            pretend_device.fill(q.grad, g)
    closures = [closure_of(o) if getattr(o, "asks", False) else None for o in pairs]
    here.step(closures[0])
    run(there, closures[1])


def check_optimizer(make: Callable[[Any], Any], problem: Problem, tolerance: float, rates: tuple[float, ...] = ()) -> int:
    """Steps on the device, then a graph of one whose replays follow the learning rates; the launches of a step."""
    mine = [nn.Parameter(p.clone()) for p in problem.params.values()]
    theirs = [nn.Parameter(pretend_device.put(p)) for p in problem.params.values()]
    pair = [make(mine), make(theirs)]
    for optimizer, params in zip(pair, (mine, theirs)):
        optimizer.in_order = params
    there, graph, places, launches = pair[1], pretend_device.Graph(), [], 0

    def captured(optimizer: Any, closure: Any) -> None:
        if rates:
            optimizer.refresh()  # a step that is captured writes no learning rate
        with graph.capture():
            optimizer.step(closure)

    def replayed(optimizer: Any, closure: Any) -> None:
        with pretend_device.watched():
            if rates:
                optimizer.refresh()
        graph.replay()

    def watched(optimizer: Any, closure: Any) -> None:
        nonlocal launches
        with pretend_device.watched() as found:
            optimizer.step(closure)
        launches = sum(found.values())

    def usual(optimizer: Any, closure: Any) -> None:
        optimizer.step(closure)

    runs = [usual] * WARM + [watched] * (STEPS - WARM - 3) + [captured] + [replayed] * 2
    for step, run in enumerate(runs):
        if rates and step > 1:
            for optimizer in pair:
                optimizer.param_groups[0]["lr"] = rates[step % len(rates)]
        trained(pair, problem, run)
        found = pretend_device.addresses((theirs, state_of(there)))
        assert step < WARM or found == places, f"step {step} moves {places} to {found}"
        places = found
        apart = max(
            difference(pretend_device.taken(theirs), [p.detach() for p in mine]),
            difference(pretend_device.taken(state_of(there)), pretend_device.taken(state_of(pair[0]))),
        )
        assert apart <= tolerance, f"step {step} is {apart} from the CPU's"
    assert on_the_device(state_of(there)), "state is on the CPU"
    return launches


def check_wrapped(k: int) -> int | None:
    case, options = ALL[k]
    t = case.transform(options)
    inner = t.children[0] if type(t).__name__ == "Given" else t
    if "hessian" in inner.plan.extras:
        return None

    def make(params: Any) -> Any:
        optimizer = optim.Optimizer(params, inner)
        optimizer.asks = bool(inner.plan.extras)
        return optimizer

    return check_optimizer(make, Problem(case), 1e-9)


@each_options([dataclasses.replace(c, options=c.options[:2]) for c in CASES], "unread")  # all of them take a minute
def test_an_optimizers_steps_wait_for_nothing(case: Case, options: Options, elsewhere: Callable[..., Any]) -> None:
    if elsewhere(check_wrapped, place(case, options)) is None:
        pytest.skip("a closure gives no Hessian")


CAPTURABLE = [c for c in CASES if c.twin is not None and hasattr(optim, c.twin.__name__) and "unread" not in c.lacks]


def check_refresh(name: str, i: int, dtype: torch.dtype) -> None:
    """In float64 the kernels cannot take a float32 learning rate without an error; in float32 they are called."""
    case = next(c for c in CASES if c.name == name)
    options = {k: x for k, x in case.options[i].items() if k != "lr"}
    cls = getattr(optim, case.twin.__name__)
    named = "capturable" in inspect.signature(cls).parameters  # torch's Muon and SGD have no such flag, but the groups may

    def make(params: Any) -> Any:
        optimizer = cls(params, lr=0.5, **options, **({"capturable": True} if named else {}))
        optimizer.param_groups[0].setdefault("capturable", True)
        return optimizer

    check_optimizer(make, Problem(case, dtype), 1e-6 if dtype == torch.float64 else 1e-4, rates=(0.5, 0.25, 0.125))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CAPTURABLE, ids=str)
def test_a_graph_follows_the_learning_rate(case: Case, dtype: torch.dtype, elsewhere: Callable[..., Any]) -> None:
    elsewhere(check_refresh, case.name, 0, dtype)


def check_variations(name: str, scaled: bool, empty: bool) -> None:
    """Two groups; a gradient scaler's tensors; a parameter that is sometimes without a gradient."""
    options = {"momentum": 0.9} if name == "SGD" else {}
    values = [torch.linspace(-1, 1, n) for n in (3, 4, 5)]
    mine, theirs = [nn.Parameter(x.clone()) for x in values], [nn.Parameter(pretend_device.put(x)) for x in values]
    pair = [getattr(optim, name)([{"params": p[:2], "lr": 0.1}, {"params": p[2:]}], lr=0.2, **options) for p in (mine, theirs)]
    for step in range(5):
        for k, (p, q) in enumerate(zip(mine, theirs)):
            p.grad = torch.cos(p.detach() + k + step)
            q.grad = pretend_device.put(p.grad)
            if empty and k == 1 and step % 2:
                p.grad = q.grad = None
        for k, optimizer in enumerate(pair):
            if scaled:
                numbers = torch.tensor(4.0), torch.tensor(float(step == 3))
                optimizer.grad_scale, optimizer.found_inf = pretend_device.put(numbers) if k else numbers
            with pretend_device.watched(strict=step > 2 * WARM - 2):
                optimizer.step()
    apart = difference(pretend_device.taken(theirs), [p.detach() for p in mine])
    assert apart <= 1e-5, f"{apart} from the CPU's"


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("name", ["SGD", "AdamW", "NAdam", "Adagrad"])
def test_groups_scalers_and_missing_gradients(name: str, scaled: bool, empty: bool, elsewhere: Callable[..., Any]) -> None:
    elsewhere(check_variations, name, scaled, empty)


def check_lbfgs(search: str | None) -> tuple[int, int]:
    """How often our L-BFGS and torch's wait in a step; ours goes where it goes on the CPU."""
    start, waits, ends = torch.linspace(-1, 1, 5), [], []
    for cls, there in ((optim.LBFGS, False), (optim.LBFGS, True), (torch.optim.LBFGS, True)):
        p = nn.Parameter(pretend_device.put(start) if there else start.clone())
        optimizer = cls([p], lr=0.1, line_search_fn=search, max_iter=4)

        def closure(p: Any = p, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = ((p - 0.3) ** 2).sum() + (p**4).sum()
            loss.backward()
            return loss

        for _ in range(3):
            with pretend_device.watched(strict=False):
                optimizer.step(closure)
        waits.append(len(pretend_device.device.waits))
        ends.append(pretend_device.taken(p.detach()))
    torch.testing.assert_close(ends[1], ends[0])
    return waits[1], waits[2]


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs_on_the_device(search: str | None, elsewhere: Callable[..., Any]) -> None:
    """It waits by design: whether it goes on, and how far, depends on values. torch's waits as well, and a little less often."""
    ours, theirs = elsewhere(check_lbfgs, search)
    assert 0 < ours <= 1.5 * theirs


# ------------------------------------------------------------------------------------------------------------------- launches


def rows(names: list[str]) -> list[str]:
    return [" | ".join(launches.row(next(c for c in CASES if c.name == name))) for name in names]


def test_the_table_of_launches(elsewhere: Callable[..., Any]) -> None:
    """Some rows of it: `python -m benchmarks.launches --write` has been run since a step has changed."""
    page = launches.PAGE.read_text()
    for found in elsewhere(rows, ["sgd", "adamw", "nadam", "adagrad", "muon", "clip_by_global_norm", "scheduled"]):
        assert f"| {found} |" in page


def check_counters() -> int:
    params = [nn.Parameter(pretend_device.put(torch.ones(3))) for _ in range(50)]
    for p in params:
        p.grad = pretend_device.put(torch.ones(3))
    optimizer = optim.AdamW(params)
    for _ in range(3):
        optimizer.step()
    with pretend_device.watched() as found:
        optimizer.step()
    return sum(found.values())


def test_counters_are_written_by_one_launch(elsewhere: Callable[..., Any]) -> None:
    assert elsewhere(check_counters) < 10


# ------------------------------------------------------------------------------------------------------- the device itself


def check_waits() -> list[str]:
    """What waits for the device raises."""
    x = pretend_device.put(torch.arange(6.0).view(2, 3))
    missed = []
    for name, wait in {
        "item": lambda: x.sum().item(),
        "float": lambda: float(x.sum()),
        "bool": lambda: bool(x.sum() > 0),
        "tolist": x.tolist,
        "cpu": x.cpu,
        "a mask as index": lambda: x[x > 0],
        "nonzero": x.nonzero,
        "equal": lambda: torch.equal(x, x),
        "a number from the CPU": lambda: torch.tensor(1.0, device=x.device),
        "a list of the CPU as index": lambda: x[[0, 1]],
        "eigh": lambda: torch.linalg.eigh(x[:, :2]),
    }.items():
        with contextlib.suppress(pretend_device.Synchronized), pretend_device.watched():
            wait()
            missed.append(name)
    return missed


def test_every_wait_raises(elsewhere: Callable[..., Any]) -> None:
    assert elsewhere(check_waits) == []


def check_tensors() -> None:
    """They are true tensors, and views share their storage."""
    x = pretend_device.put(torch.arange(6.0).view(2, 3))
    with pretend_device.watched() as found:
        y = (x * 2).t()[1:]
        z = y.detach().reshape(2, 2)
        y.mul_(10.0)
        torch._foreach_add_([x, x], 1.0)
    assert type(y) is Tensor
    assert y.is_cuda
    assert not y.is_cpu
    assert y.untyped_storage()._cdata != x.untyped_storage()._cdata
    assert y._base is not None
    assert pretend_device.taken(y).tolist() == [[20.0, 80.0], [40.0, 100.0]]
    assert pretend_device.taken(x).tolist() == [[2.0, 3.0, 4.0], [5.0, 6.0, 7.0]]
    assert pretend_device.taken(z).shape == (2, 2)
    assert found["aten::_foreach_add_.Scalar"] == 1
    live = pretend_device.device.live
    del y, z
    assert pretend_device.device.live < live


def test_its_tensors_are_tensors(elsewhere: Callable[..., Any]) -> None:
    elsewhere(check_tensors)


def check_long_run(k: int, dtype: torch.dtype) -> None:
    """Donated steps on the device about 2^24: a float32 counter stays there, as torch's do, and a float64 one goes on."""
    case, options = ALL[k]
    t, problem = case.transform(options), Problem(case, dtype)
    for wide in (False, True):
        moved = pretend_device.put(problem.params)
        state = t.init_state(moved)
        g = pretend_device.put(problem.grads(problem.params))
        moved, state = t.step(g, state, moved)
        state = with_counters(state, at(STOP - 1, torch.float64 if wide else None))
        for _ in range(5):
            with pretend_device.watched():
                moved, state = t.step(g, state, moved, donate=True)
        found = set(counters(pretend_device.taken(state)).values())
        assert found == {STOP + 4 if wide else STOP}, found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["adam", "adamw", "adagrad", "sgd", "radam", "ema"])
def test_a_counter_on_the_device_counts_on_in_float64(name: str, dtype: torch.dtype, elsewhere: Callable[..., Any]) -> None:
    """Also where a kernel takes it, which reads a float32."""
    case = next(case for case in CASES if case.name == name)
    elsewhere(check_long_run, place(case, case.options[0]), dtype)
