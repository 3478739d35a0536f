"""Runs of many steps: counters at 2^24, where a float32 stops, formulas at ten million steps and at a billion, caches, leaks.

`benchmarks/long_runs.py` makes the million steps themselves.
"""

from __future__ import annotations

import copy
import gc
import io
import math
import struct
import sys
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.utils import _pytree as pytree

import purestep as ps
from purestep import optim
from purestep._core.cache import DeclarationCache, Shared
from purestep.saving import visit
from tests import processes
from tests.cases import CLASSES, Case, Options, each, each_options
from tests.problems import difference

STOP = 2.0**24
"""float32 has every integer up to this one, and 1 added to it is lost."""

SMALL = {"w": torch.tensor([[0.5, -1.0], [0.2, 0.3], [1.5, -0.4]], dtype=torch.float64), "b": torch.tensor([0.7, -0.2], dtype=torch.float64)}  # fmt: skip


def small(case: Case) -> dict[str, Tensor]:
    """A matrix and a vector, if the case treats both."""
    if "hidden.weight" in case.problem()[0]:
        return {f"hidden.{k}": p for k, p in (("weight", SMALL["w"]), ("bias", SMALL["b"])) if case.treats(p)}
    return {k: p for k, p in SMALL.items() if case.treats(p)}


def gradients(params: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: torch.sin(3 * p.detach()) for k, p in params.items()}


def with_counters(state: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The state with another tensor in the place of each counter of updates that has begun; one that is shared stays so."""
    made: dict[int, tuple[Tensor, Tensor]] = {}

    def leaf(name: str, x: Any, counts: bool = False) -> Any:
        if not isinstance(x, Tensor) or not counts or "mini_step" in name or not bool((x > 0).all()):
            return x
        if id(x) not in made:
            made[id(x)] = x, change(x)
        return made[id(x)][1]

    return visit(state, "", leaf, lambda name, history, around: history)


def counters(state: Any) -> dict[str, Any]:
    """All counters of a state as numbers, by their paths."""
    found: dict[str, Any] = {}

    def leaf(name: str, x: Any, counts: bool = False) -> Any:
        if isinstance(x, Tensor) and (counts or "n_averaged" in name):
            found[name] = x.detach().double().tolist()
        return x

    visit(state, "", leaf, lambda name, history, around: history)
    return found


def at(count: float, dtype: torch.dtype | None = None) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.full_like(x, count, dtype=dtype or x.dtype)


# ------------------------------------------------------------------------------------------------------ counters: pure steps

MODES: tuple[Options, ...] = ({}, {"donate": True}, {"executor": "leaf"}, {"executor": "leaf", "donate": True}, {"executor": "foreach"}, {"executor": "foreach", "donate": True})  # fmt: skip


def run(
    t: ps.Transform, params: Any, dtype: torch.dtype | None = None, steps: int = 4, start: float = STOP - 1, **how: Any
) -> Any:
    """Two steps, then some more from a count of `start` on, with counters in this dtype."""
    params, state = {k: p.clone() for k, p in params.items()}, t.init_state(params)
    for k in range(2 + steps):
        if k == 2:
            state = with_counters(state, at(start, dtype))
        params, state = t.step(gradients(params), state, params, **how)
    return params, state


def check_modes(case: Case, options: Options, modes: tuple[Options, ...]) -> None:
    t, params = case.transform(options), small(case)
    expected, state = run(t, params, torch.float64)
    for how in modes:
        found, after = run(t, params, **how)
        assert counters(after) == counters(state), how
        assert difference(found, expected) <= 1e-13, how


@each()
def test_a_count_goes_on(case: Case) -> None:
    """A float32 counter is a float64 where it cannot count on; the numbers are those of a float64 counter."""
    check_modes(case, case.options[0], MODES)


@pytest.mark.long
@each_options()
def test_a_count_goes_on_under_all_options(case: Case, options: Options) -> None:
    check_modes(case, options, MODES)


@each()
def test_the_counters_of_batches_go_on(case: Case) -> None:
    """Under `torch.func.vmap`, of members that have made the same number of updates."""
    t, params = case.transform(), small(case)
    if None in pytree.tree_leaves(t.init_state(params), is_leaf=lambda x: x is None):
        pytest.skip("a state that has None is no result of torch.func.vmap")
    stacked = {k: torch.stack([p, -0.5 * p]) for k, p in params.items()}

    def batched(dtype: torch.dtype) -> Any:
        p, state = stacked, torch.func.vmap(t.init_state)(stacked)
        for k in range(4):
            if k == 1:
                state = with_counters(state, at(STOP - 1, dtype))
            p, state = torch.func.vmap(t.step)(gradients(p), state, p)
        return p, state

    expected, wide = batched(torch.float64)
    found, state = batched(torch.float32)
    assert counters(state) == counters(wide)
    assert difference(found, expected) <= 1e-13


@pytest.mark.parametrize(
    "make", [lambda: ps.adam(0.1), lambda: ps.nadam(0.1), lambda: ps.lamb(0.1)], ids=["adam", "nadam", "lamb"]
)
def test_the_counters_of_members_that_differ_go_on(make: Callable[[], ps.Transform]) -> None:
    """As soon as one of them cannot be held, all are float64: a batch has one dtype."""
    t = make()
    params = {k: torch.stack([p, -0.5 * p]) for k, p in SMALL.items()}
    state = torch.func.vmap(t.init_state)(params)
    params, state = torch.func.vmap(t.step)(gradients(params), state, params)
    state = with_counters(state, lambda x: torch.tensor([STOP, 5.0]))
    for k in range(1, 4):
        params, state = torch.func.vmap(t.step)(gradients(params), state, params)
        assert {tuple(x) for x in counters(state).values()} == {(STOP + k, 5.0 + k)}


def test_derivatives_through_steps_where_the_dtype_changes() -> None:
    """By `torch.func.grad` and by autograd, through three steps about 2^24."""
    t, counts = ps.adam(0.1), []

    def trained(p: Tensor, dtype: torch.dtype) -> Tensor:
        state = with_counters(t.step(torch.ones_like(p), t.init_state(p), p)[1], at(STOP - 1, dtype))
        for _ in range(3):
            p, state = t.step(2 * p, state, p)
        counts.append(max(x.item() for x in pytree.tree_leaves(state) if not x.dim()))
        return (p**2).sum()

    p = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    expected = torch.func.grad(trained)(p, torch.float64)
    torch.testing.assert_close(torch.func.grad(trained)(p, torch.float32), expected)
    q = p.clone().requires_grad_()
    trained(q, torch.float32).backward()
    torch.testing.assert_close(q.grad, expected)
    assert counts == [STOP + 2] * 3


TRACED: dict[str, Callable[[], ps.Transform]] = {
    "adamw": lambda: ps.chain(ps.clip_by_global_norm(1.0), ps.adamw(0.1)), "nadam": lambda: ps.nadam(0.1),
    "lamb": lambda: ps.lamb(0.1), "accumulate": lambda: ps.accumulate(ps.adam(ps.schedules.inverse_sqrt(0.1, warmup_steps=10)), 2),
    "noise": lambda: ps.chain(ps.add_noise(0.1), ps.sgd(0.1, momentum=0.9)), "average": lambda: ps.chain(ps.sgd(0.1), ps.average_params(every=2)),
    "state_dtype": lambda: ps.state_dtype(ps.radam(0.1), torch.float64), "8 bits": lambda: ps.quantize_state(ps.adam(0.1), min_size=0),
}  # fmt: skip


@pytest.mark.parametrize("name", TRACED)
def test_what_is_compiled_counts_on_in_float64_only(name: str) -> None:
    """No dtype can follow from a number there: a float32 counter stays at 2^24, as torch's do. One that is a float64 counts."""
    t = TRACED[name]()
    step = torch.compile(t.step, fullgraph=True, backend="eager")
    params, state = SMALL, t.init_state(SMALL)
    for _ in range(2):
        params, state = t.step(gradients(params), state, params)
    for dtype in (torch.float32, torch.float64):
        p, s, q, r = (
            params,
            with_counters(state, at(STOP - 1, dtype)),
            params,
            with_counters(state, at(STOP - 1, torch.float64)),
        )
        for _ in range(4):
            p, s = step(gradients(p), s, p)
            q, r = t.step(gradients(q), r, q)
        if dtype is torch.float64:
            assert counters(s) == counters(r)
            assert difference(p, q) <= 1e-12
        else:
            assert max(counters(s).values()) == STOP


def test_counters_that_begin_as_float64() -> None:
    """As the docs say it: the default dtype decides when a state begins, and nothing else of the state changes."""
    for make in TRACED.values():
        t, params = make(), {k: p.float() for k, p in SMALL.items()}
        plain = ps.state_dict(t.init_state(params))
        torch.set_default_dtype(torch.float64)
        try:
            wide = ps.state_dict(t.init_state(params))
        finally:
            torch.set_default_dtype(torch.float32)
        for name, x in wide.items():
            is_number = not x.dim()
            assert x.dtype == (torch.float64 if is_number else plain[name].dtype), name


def test_leaf_functions_of_users_count_on_too() -> None:
    class Own(NamedTuple):
        seen: ps.Scalar
        scale: ps.Scalar

        @classmethod
        def init(cls, p: Tensor) -> Own:
            return cls(ps.counter(p), ps.counter(p) + 2.0**30)

    globals()["Own"] = Own  # annotations are looked up in the module

    @ps.leafwise(Own)
    def own(g: Tensor, s: Own, p: Tensor) -> tuple[Tensor, Own]:
        return g * (s.seen % 2), Own(s.seen + 1, s.scale * 2)

    t, p = own(), torch.ones(2)
    state = t.init_state(p)._replace(seen=torch.tensor(STOP))
    for k in range(1, 4):
        _, state = t.update(p, state, p)
        assert state.seen.item() == STOP + k
    assert state.scale.dtype is torch.float32, "it is no count that is too large, but a number that float32 has"
    assert state.scale.item() == 2.0**33


# ---------------------------------------------------------------------------------------------------- counters: an optimizer


def trained(make: Callable[[list[Any]], Any], steps: int, dtype: torch.dtype | None = None, params: Any = SMALL) -> Any:
    """An optimizer after two steps and some more from a count of 2^24 - 1 on; and the counters that it had then."""
    own = [torch.nn.Parameter(p.clone()) for p in params.values()]
    optimizer = make([*zip(params, own)])
    held: list[tuple[Any, str, Tensor]] = []
    for k in range(2 + steps):
        if k == 2:
            for state in optimizer.state.values():
                for name, x in [*state.items()]:
                    if isinstance(x, Tensor) and name.endswith("step") and "mini_step" not in name and x > 0:
                        if dtype is not None and dtype != x.dtype:
                            state[name] = x.to(dtype)
                        state[name].fill_(STOP - 1)
                        held.append((state, name, state[name]))
        for p in own:
            p.grad = torch.sin(3 * p.detach())
        optimizer.step()
    return own, optimizer, held


def same_run(make: Callable[[list[Any]], Any], params: Any = SMALL) -> None:
    expected, _, wide = trained(make, 6, torch.float64, params)
    found, _, held = trained(make, 6, None, params)
    assert difference([p.detach() for p in found], [p.detach() for p in expected]) <= 1e-13
    for (state, name, x), (other, _, _) in zip(held, wide):
        assert state[name].item() == other[name].item()
        assert name.startswith("shared.") or state[name] is x, "a counter of a parameter is the tensor that it was"


@each()
@pytest.mark.parametrize("flags", [{}, {"foreach": False}, {"foreach": True}], ids=str)
@pytest.mark.in_turn("flags")
def test_an_optimizer_counts_on(case: Case, flags: dict[str, Any]) -> None:
    if case.transform().plan.extras:
        pytest.skip("it asks for a closure")
    same_run(lambda params: optim.Optimizer(params, case.transform(), **flags), small(case))


SOME: dict[str, dict[str, Any]] = {"SGD": {"momentum": 0.9}}
COUNTING = [name for name in CLASSES if name not in ("LBFGS", "SparseAdam")]  # which take a closure, and sparse gradients


@pytest.mark.parametrize("name", COUNTING)
def test_every_class_counts_on(name: str) -> None:
    params = {"w": SMALL["w"]} if name == "Muon" else SMALL
    same_run(lambda own: getattr(optim, name)(own, lr=0.01, **SOME.get(name, {})), params)


def test_compiled_kernels_count_on() -> None:
    same_run(lambda params: optim.NAdam(params, lr=0.01, compile=True))


def test_many_small_and_one_large_parameter_count_on() -> None:
    """What is packed, and what goes in tiles."""
    params = {f"p{k}": torch.linspace(-1, 1, 2 + k % 5, dtype=torch.float64) for k in range(40)}
    same_run(lambda own: optim.RAdam(own, lr=0.01), params)
    same_run(lambda own: optim.RAdam(own, lr=0.01), {"large": torch.linspace(-1, 1, 300_000, dtype=torch.float64)})


def test_groups_and_parameters_that_have_made_other_numbers_of_updates_count_on() -> None:
    own = [torch.nn.Parameter(torch.ones(3)) for _ in range(16)]
    optimizer = optim.Adam([{"params": own[2 * k : 2 * k + 2], "lr": 0.01 * (k + 1)} for k in range(8)])
    for k in range(6):
        if k == 2:
            for i, p in enumerate(own):
                optimizer.state[p]["step"].fill_(STOP - i % 3)
        for p in own:
            p.grad = torch.ones(3)
        optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in own] == [STOP - i % 3 + 4 for i in range(16)]


def test_the_step_cache_hits_before_and_after() -> None:
    _, optimizer, _ = trained(lambda params: optim.NAdam(params, lr=0.01), 1)
    hits, dtypes = [], []
    for _ in range(5):
        hits.append(optimizer.explain().cached)
        dtypes.append(optimizer.state[optimizer.param_groups[0]["params"][0]]["step"].dtype)
        optimizer.step()
    assert dtypes == [torch.float32, *[torch.float64] * 4]
    assert all(hits)


def test_a_count_that_many_hold_is_one_for_each_after_it(tmp_path: Path) -> None:
    """No two parameters share a counter; what copies hold is their own."""
    _, optimizer, held = trained(lambda params: optim.AdamW(params, lr=0.01), 4)
    other = copy.deepcopy(optimizer)
    optimizer.step()
    assert [x.item() for _, _, x in held] == [STOP + 4] * 2
    assert [state["step"].item() for state in other.state.values()] == [STOP + 3] * 2
    assert len({x.data_ptr() for _, _, x in held}) == 2
    held[0][2].fill_(7.0)
    assert held[1][2].item() == STOP + 4


def on_parts(rank: int, size: int) -> list[Any]:
    """Sharded parameters, donated and under an optimizer: what they count to."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh, found = init_device_mesh("cpu", (size,)), []
    for name in ("NAdam", "AdamW"):
        p = torch.nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)]))
        optimizer = getattr(optim, name)([p], lr=0.1)
        for k in range(7):
            if k == 3:
                optimizer.state[p]["step"].fill_(STOP - 1)
            p.grad = distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)])
            optimizer.step()
        found.append(optimizer.state[p]["step"].item())
        t = getattr(ps, name.lower())(0.1)
        params = {"p": distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)])}
        state = t.init_state(params)
        for k in range(7):
            if k == 3:
                state = with_counters(state, at(STOP - 1))
            params, state = t.step(params, state, params, donate=True)
        found += [max(counters(state).values())]
    return found


def test_sharded_parameters_count_on(tmp_path: Path) -> None:
    assert processes.run(1, "tests.test_long_runs:on_parts", tmp_path, seconds=120) == [[STOP + 3] * 4]


# ------------------------------------------------------------------------------------------------------ counters: checkpoints


@pytest.mark.parametrize("name", ["AdamW", "NAdam", "RAdam", "ASGD", "Adagrad", "Adamax", "RMSprop"])
def test_a_checkpoint_with_a_float64_counter_is_torchs_too(name: str) -> None:
    own, optimizer, _ = trained(lambda params: getattr(optim, name)(params, lr=0.01), 4)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file)
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in own]
    other = getattr(torch.optim, name)(theirs, lr=0.01)
    other.load_state_dict(saved)
    for _ in range(3):
        for p, q in zip(own, theirs):
            p.grad = torch.sin(3 * p.detach())
            q.grad = p.grad.clone()
        optimizer.step()
        other.step()
    assert difference([p.detach() for p in own], [p.detach() for p in theirs]) <= 1e-7
    assert [state["step"].item() for state in other.state.values()] == [STOP + 6] * 2
    again = getattr(optim, name)([torch.nn.Parameter(p.detach().clone()) for p in own], lr=0.01)
    again.load_state_dict(other.state_dict())
    assert [state["step"].item() for state in again.state.values()] == [STOP + 6] * 2


def test_a_flat_state_with_a_float64_counter_is_loaded() -> None:
    t = ps.chain(ps.adam(0.1), ps.average_params(), ps.accumulate(ps.sgd(0.1, momentum=0.9), 1))
    _, state = run(t, SMALL, steps=6)
    flat = ps.state_dict(state)
    assert torch.float64 in {x.dtype for name, x in flat.items() if "step" in name}
    again = ps.load_state_dict(t.init_state(SMALL), flat)
    assert counters(again) == counters(state)
    wide = with_counters(state, lambda x: x.double())
    assert counters(ps.load_state_dict(wide, ps.state_dict(t.init_state(SMALL)))) == counters(t.init_state(SMALL))
    other = ps.state_dict(t.init_state(SMALL))
    name = next(name for name in other if "exp_avg.w" in name)
    other[name] = other[name].float()
    with pytest.raises(ValueError, match="another dtype: "):
        ps.load_state_dict(t.init_state(SMALL), other)


def test_counts_of_other_libraries_and_of_old_files_are_exact() -> None:
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = optim.Adam([p], lr=0.1)
    p.grad = torch.ones(2)
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"][0]["step"] = int(STOP) + 1  # as torch saved them before 1.12
    optimizer.load_state_dict(saved)
    assert optimizer.state[p]["step"].item() == STOP + 1


def test_torchs_distributed_checkpoints_round_a_count_into_a_float32(tmp_path: Path) -> None:
    """They copy into what is there. Where that is an optimizer that has not come so far, the count may be 1 off."""
    here = {"step": torch.zeros(())}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process only
        dcp.save({"step": torch.tensor(STOP + 1, dtype=torch.float64)}, checkpoint_id=tmp_path, no_dist=True)
        dcp.load(here, checkpoint_id=tmp_path, no_dist=True)
    assert here["step"].item() == STOP


# ------------------------------------------------------------------------------------------- formulas that depend on the step

COUNTS = (1e7, 1e9, 1e9 + 1)
"""How many updates were made before."""

Formula = Callable[[float, dict[str, float], float, float], float]
"""The update by a gradient, the state before, the number of this update, and the parameter."""


class Formulated(NamedTuple):
    """A transform, and its update in Python's floats."""

    t: ps.Transform
    u: Formula
    start: dict[str, float] = {}  # noqa: RUF012  (a NamedTuple makes no class attribute of it)
    """What numbers of the state are; its tensors are random."""


def lerp(m: float, g: float, share: float) -> float:
    return m + share * (g - m)


def single(x: float) -> float:
    """A number as a float32 has it."""
    return float(struct.unpack("f", struct.pack("f", x))[0])


def adam(b1: float, b2: float, eps: float = 1e-8) -> Formula:
    def u(g: float, s: dict[str, float], t: float, p: float) -> float:
        m, v = lerp(s["exp_avg"], g, 1 - b1), b2 * s["exp_avg_sq"] + (1 - b2) * g * g
        return m / (1 - b1**t) / (math.sqrt(v / (1 - b2**t)) + eps)

    return u


def times(u: Formula, decay: float = 0.0, lr: float = 1e-2) -> Formula:
    return lambda g, s, t, p: -lr * (u(g, s, t, p) + decay * p)


def amsgrad(b1: float, b2: float) -> Formula:
    def u(g: float, s: dict[str, float], t: float, p: float) -> float:
        m, v = lerp(s["exp_avg"], g, 1 - b1), b2 * s["exp_avg_sq"] + (1 - b2) * g * g
        return m / (1 - b1**t) / (math.sqrt(max(v, s["max_exp_avg_sq"]) / (1 - b2**t)) + 1e-8)

    return u


def adamax(b1: float, b2: float) -> Formula:
    return lambda g, s, t, p: lerp(s["exp_avg"], g, 1 - b1) / (1 - b1**t) / max(b2 * s["exp_inf"], abs(g) + 1e-8)


def nadam(b1: float, b2: float, decay: float) -> Formula:
    def u(g: float, s: dict[str, float], t: float, p: float) -> float:
        mu, after = (b1 * (1 - 0.5 * 0.96 ** (k * decay)) for k in (t, t + 1))
        product = single(s["mu_product"] * single(mu))  # which torch keeps in float32
        m, v = lerp(s["exp_avg"], g, 1 - b1), b2 * s["exp_avg_sq"] + (1 - b2) * g * g
        ahead = (1 - mu) / (1 - product) * g + after / (1 - product * after) * m
        return ahead / (math.sqrt(v / (1 - b2**t)) + 1e-8)

    return u


def radam(b1: float, b2: float) -> Formula:
    def u(g: float, s: dict[str, float], t: float, p: float) -> float:
        m, v = lerp(s["exp_avg"], g, 1 - b1), b2 * s["exp_avg_sq"] + (1 - b2) * g * g
        limit = 2 / (1 - b2) - 1
        rho = limit - 2 * t * b2**t / (1 - b2**t)
        r = 1.0
        if rho > 5:
            r = math.sqrt((rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho) * (1 - b2**t)) / (
                math.sqrt(v) + 1e-8
            )
        return m / (1 - b1**t) * r

    return u


def adabelief(b1: float, b2: float) -> Formula:
    def u(g: float, s: dict[str, float], t: float, p: float) -> float:
        m = lerp(s["exp_avg"], g, 1 - b1)
        v = b2 * s["exp_avg_var"] + (1 - b2) * (g - m) ** 2 + 1e-16
        return m / (1 - b1**t) / (math.sqrt(v / (1 - b2**t)) + 1e-16)

    return u


def yogi(b1: float, b2: float) -> Formula:
    def u(g: float, s: dict[str, float], t: float, p: float) -> float:
        m, v = lerp(s["exp_avg"], g, 1 - b1), s["exp_avg_sq"]
        v = v - (1 - b2) * math.copysign(1.0, v - g * g) * g * g
        return m / (1 - b1**t) / (math.sqrt(v / (1 - b2**t)) + 1e-3)

    return u


def adan(b1: float, b2: float, b3: float) -> Formula:
    def u(g: float, s: dict[str, float], t: float, p: float) -> float:
        change = g - s["pre_grad"]
        m, d = lerp(s["exp_avg"], g, 1 - b1), lerp(s["exp_avg_diff"], change, 1 - b2)
        n = b3 * s["exp_avg_sq"] + (1 - b3) * (g + b2 * change) ** 2
        return (m / (1 - b1**t) + b2 * d / (1 - b2**t)) / (math.sqrt(n / (1 - b3**t)) + 1e-8)

    return u


def ademamix(b1: float, b2: float, b3: float) -> Formula:
    def u(g: float, s: dict[str, float], t: float, p: float) -> float:
        m, slow = lerp(s["exp_avg_fast"], g, 1 - b1), lerp(s["exp_avg_slow"], g, 1 - b3)
        v = b2 * s["exp_avg_sq"] + (1 - b2) * g * g
        return (m / (1 - b1**t) + 5.0 * slow) / (math.sqrt(v / (1 - b2**t)) + 1e-8)

    return u


def rms(alpha: float) -> Formula:
    return lambda g, s, t, p: g / (math.sqrt((alpha * s["square_avg"] + (1 - alpha) * g * g) / (1 - alpha**t)) + 1e-8)


def asgd(g: float, s: dict[str, float], t: float, p: float) -> float:
    return -s["eta"] * (g + 1e-4 * p)


def madgrad(g: float, s: dict[str, float], t: float, p: float) -> float:
    weight = (1e-2 + 1e-6) * math.sqrt(t)
    z = s["x0"] - (s["s"] + weight * g) / ((s["grad_sum_sq"] + weight * g * g) ** (1 / 3) + 1e-6)
    return 0.1 * (z - p)


def adopt(g: float, s: dict[str, float], t: float, p: float) -> float:
    most = (t - 1) ** 0.25
    return lerp(s["exp_avg"], min(max(g / max(math.sqrt(s["exp_avg_sq"]), 1e-6), -most), most), 0.1)


def schedule_free(r: float) -> Formula:
    def u(g: float, s: dict[str, float], t: float, p: float) -> float:
        lr = 0.1 * min(1.0, t / 2e9)
        weight = t**r * max(s["lr_max"], lr) ** 2
        c = weight / (s["weight_sum"] + weight)
        return c * (s["z"] - p) - lr * (1 - s["momentum"] * (1 - c)) * g

    return u


BETAS = ((0.9, 0.999), (0.9, 0.9999), (0.99, 0.99999999))
SLOW = 0.99999999
"""At ten million updates its bias is still 0.9, at a billion 4.5e-5."""

FORMULAS: dict[str, Formulated] = {
    "adagrad": Formulated(ps.scale_by_adagrad(lr_decay=1e-6), lambda g, s, t, p: g / (math.sqrt(s["sum"] + g * g) + 1e-10) / (1 + (t - 1) * 1e-6)),
    "asgd": Formulated(ps.scale_by_asgd(0.01), asgd, {"eta": 0.003, "mu": 1e-4}),
    "madgrad": Formulated(ps.scale_by_madgrad(0.01), madgrad), "adopt": Formulated(ps.scale_by_adopt(), adopt),
    "schedule_free": Formulated(ps.schedule_free(0.1, warmup_steps=2 * 10**9), schedule_free(0.0), {"weight_sum": 1e3, "lr_max": 0.05, "momentum": 0.9}),
    "schedule_free r": Formulated(ps.schedule_free(0.1, warmup_steps=2 * 10**9, r=0.5), schedule_free(0.5), {"weight_sum": 1e9, "lr_max": 0.05, "momentum": 0.9}),
    "ema": Formulated(ps.ema(SLOW), lambda g, s, t, p: lerp(s["exp_avg"], g, 1 - SLOW) / (1 - SLOW**t)),
    "rms": Formulated(ps.scale_by_rms(alpha=SLOW, bias_correction=True), rms(SLOW)),
    "adan": Formulated(ps.scale_by_adan(betas=(0.98, SLOW, 0.9999)), adan(0.98, SLOW, 0.9999)),
    "ademamix": Formulated(ps.scale_by_ademamix(betas=(0.9, SLOW, 0.9999)), ademamix(0.9, SLOW, 0.9999)),
    "scheduled": Formulated(ps.scale_by_learning_rate(lambda step: 1 / (1 + step)), lambda g, s, t, p: -g / t),
    "relative step": Formulated(ps.scale_by_relative_step(1.0), lambda g, s, t, p: -min(1 / math.sqrt(t), 1.0) * g),
}  # fmt: skip
for k, (b1, b2) in enumerate(BETAS):
    FORMULAS |= {
        f"adam {k}": Formulated(ps.scale_by_adam(betas=(b1, b2)), adam(b1, b2)),
        f"amsgrad {k}": Formulated(ps.scale_by_amsgrad(betas=(b1, b2)), amsgrad(b1, b2)),
        f"adamax {k}": Formulated(ps.scale_by_adamax(betas=(b1, b2)), adamax(b1, b2)),
        f"nadam {k}": Formulated(ps.scale_by_nadam(betas=(b1, b2)), nadam(b1, b2, 4e-3), {"mu_product": 0.3}),
        f"nadam, slow, {k}": Formulated(ps.scale_by_nadam(betas=(b1, b2), momentum_decay=1e-9), nadam(b1, b2, 1e-9), {"mu_product": 0.3}),
        f"radam {k}": Formulated(ps.scale_by_radam(betas=(b1, b2)), radam(b1, b2)),
        f"sparse_adam {k}": Formulated(ps.scale_by_sparse_adam(betas=(b1, b2)), None),  # type: ignore[arg-type]  # below
        f"adabelief {k}": Formulated(ps.scale_by_adabelief(betas=(b1, b2)), adabelief(b1, b2)),
        f"yogi {k}": Formulated(ps.scale_by_yogi(betas=(b1, b2)), yogi(b1, b2)),
        f"adam, fused, {k}": Formulated(ps.adam(1e-2, betas=(b1, b2)), times(adam(b1, b2))),
        f"adamw, fused, {k}": Formulated(ps.adamw(1e-2, betas=(b1, b2)), times(adam(b1, b2), 1e-2)),
        f"lamb {k}": Formulated(ps.scale_by_adam(betas=(b1, b2), eps=1e-6), adam(b1, b2, 1e-6)),
    }  # fmt: skip


def sparse_adam(b1: float, b2: float) -> Formula:
    """Where the epsilon is not divided by the root of the bias."""

    def u(g: float, s: dict[str, float], t: float, p: float) -> float:
        m, v = lerp(s["exp_avg"], g, 1 - b1), b2 * s["exp_avg_sq"] + (1 - b2) * g * g
        return math.sqrt(1 - b2**t) / (1 - b1**t) * m / (math.sqrt(v) + 1e-8)

    return u


for k, (b1, b2) in enumerate(BETAS):
    FORMULAS[f"sparse_adam {k}"] = FORMULAS[f"sparse_adam {k}"]._replace(u=sparse_adam(b1, b2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.in_turn("dtype")
def test_the_formula_holds_after_many_steps(name: str, dtype: torch.dtype) -> None:
    """Bias corrections, and all else that depends on the number of the update, against Python's floats."""
    t, u, start = FORMULAS[name]
    draw = torch.Generator().manual_seed(0)
    p, g = (torch.rand(5, generator=draw, dtype=torch.float64).add(0.1).to(dtype) for _ in range(2))
    tolerance = 1e-12 if dtype is torch.float64 else 3e-6
    for before in COUNTS:
        for how in ({}, {"executor": "leaf"}, {"executor": "foreach", "donate": True}, {"donate": True}):
            state = t.init_state(p)
            fields: list[dict[str, float]] = [{} for _ in p]

            def filled(name: str, x: Any, counts: bool = False, before: float = before, fields: Any = fields) -> Any:
                field = name.split(".")[-1]
                if x.dim():
                    x = torch.rand(x.shape, generator=draw, dtype=torch.float64).add(0.05).to(dtype)
                elif counts:
                    return torch.tensor(before, dtype=torch.float64)
                else:
                    x = torch.full_like(x, start[field])
                for own, value in zip(fields, x.expand(len(fields)).tolist()):
                    own[field] = value
                return x

            state = visit(state, "", filled, lambda name, history, around: history)
            expected = torch.tensor(
                [u(a, s, before + 1, b) for a, s, b in zip(g.tolist(), fields, p.tolist())], dtype=torch.float64
            )
            new, after = t.step(g, state, p.clone(), **how)
            step = (new - p).double()
            slack = float(torch.finfo(dtype).eps * 4)  # of the parameter, from which the update is taken away again
            assert (step - expected).abs().max() <= tolerance * expected.abs().max() + slack, (how, before)
            assert set(counters(after).values()) in ({before + 1}, set()), how


def test_shapes_of_schedules_after_many_steps() -> None:
    """Schedules whose turning points are as late."""
    s = ps.schedules
    total = 2 * 10**9
    formulas: list[tuple[Any, Callable[[float], float]]] = [
        (s.linear(0.1, 0.01, total_steps=total), lambda t: 0.1 - 0.09 * min(t / total, 1)),
        (s.polynomial(0.1, 0.01, total_steps=total, power=2.0), lambda t: 0.01 + 0.09 * (1 - min(t / total, 1)) ** 2),
        (s.cosine(0.1, total_steps=total), lambda t: 0.05 * (1 + math.cos(math.pi * min(t / total, 1)))),
        (s.cosine(0.1, total_steps=1000, periodic=True), lambda t: 0.05 * (1 + math.cos(math.pi * math.fmod(t / 1000, 2)))),
        (s.exponential(0.1, gamma=0.5, step_size=10**8), lambda t: 0.1 * 0.5 ** (t / 10**8)),
        (s.warmup_cosine(0.1, warmup_steps=10**8, total_steps=total),
         lambda t: 0.1 * t / 10**8 if t < 10**8 else 0.05 * (1 + math.cos(math.pi * min((t - 10**8) / (total - 10**8), 1)))),
        (s.warmup_stable_decay(0.1, warmup_steps=10**6, decay_steps=10**9, total_steps=total),
         lambda t: 0.1 * (1 - min(max((t - (total - 10**9)) / 10**9, 0), 1))),
        (s.inverse_sqrt(0.1, warmup_steps=10_000), lambda t: 0.1 * math.sqrt(10_000 / t)),
        (s.cyclic(0.01, 0.1, step_size_up=3, step_size_down=4), lambda t: 0.01 + 0.09 * min(math.fmod(t, 7) / 3, (7 - math.fmod(t, 7)) / 4)),
        (s.cosine_with_restarts(0.1, cycle_steps=1000), lambda t: 0.05 * (1 + math.cos(math.pi * math.fmod(t, 1000) / 1000))),
        (s.piecewise_constant((0.1, 0.05, 0.025), (10**8, 10**9)), lambda t: 0.1 * 0.5 ** ((t >= 10**8) + (t >= 10**9))),
    ]  # fmt: skip
    for schedule, formula in formulas:
        for t in (10**7, STOP - 1, STOP, STOP + 1, 10**9 - 1, 10**9, 10**9 + 1, total - 1, total):
            for step in (int(t), torch.tensor(t, dtype=torch.float64)):
                assert float(schedule(step)) == pytest.approx(formula(float(t)), rel=1e-7, abs=1e-12), (schedule, t)


def test_the_average_and_the_noise_after_many_steps() -> None:
    """What is done every k-th time is done, the mean is a mean, and noise is new at every step."""
    t, p = ps.average_params(every=3), torch.zeros(2, dtype=torch.float64)
    state = t.init_state(p)._replace(step=torch.tensor(STOP - 2), n_averaged=torch.tensor(STOP))
    seen = []
    for _ in range(6):
        _, state = t.update(torch.ones_like(p), state, p)
        seen.append(state.n_averaged.item() - STOP)
    assert seen == [1, 1, 1, 2, 2, 2]  # at 2^24 - 1, a multiple of 3, and 3 updates later
    assert state.average[0].item() == pytest.approx(2 / STOP)
    noise = ps.add_noise(1.0, gamma=0.0)
    state = noise.init_state(p)._replace(step=torch.tensor(STOP - 1))
    drawn = []
    for _ in range(4):
        u, state = noise.update(torch.zeros(2, dtype=torch.float64), state, p)
        drawn.append(tuple(u.tolist()))
    assert len(set(drawn)) == 4


# -------------------------------------------------------------------------------------------------------------------- caches


class OwnState(NamedTuple):
    step: ps.Scalar
    mean: Tensor

    @classmethod
    def init(cls, p: Tensor) -> OwnState:
        return cls(ps.counter(p), torch.zeros_like(p))


PARAMS = {"a": torch.ones(3), "b": torch.ones(2, 2)}


def stepped(t: ps.Transform, params: Any = PARAMS, steps: int = 1, **how: Any) -> None:
    params = pytree.tree_map(torch.clone, params)
    state = t.init_state(params)
    for _ in range(steps):
        params, state = t.step(params, state, params, **how)


def declarations(n: int) -> None:
    @ps.leafwise(OwnState)
    def own(g: Tensor, s: OwnState, p: Tensor, k: ps.NonNegative = 1.0) -> tuple[Tensor, OwnState]:
        mean = s.mean.lerp(g, 0.5)
        return k * mean, OwnState(s.step + 1, mean)

    stepped(ps.chain(own(), ps.scale(-0.1)), steps=3)


def states(n: int) -> None:
    kind: Any = NamedTuple("kind", [("step", ps.Scalar), ("exp_avg", Tensor)])
    kind.init = classmethod(lambda cls, p: cls(ps.counter(p), torch.zeros_like(p)))

    @ps.leafwise(kind)
    def own(g: Tensor, s: Any, p: Tensor) -> tuple[Tensor, Any]:
        mean = s.exp_avg.lerp(g, 0.5)
        return mean, kind(s.step + 1, mean)

    t = own()
    state = t.init_state(PARAMS)
    ps.state_dict(ps.map_params(torch.clone, t.step(PARAMS, state, PARAMS)[1]))
    ps.quantize_state(t, min_size=n).init_state(PARAMS)


def closures(n: int) -> None:
    here = torch.tensor(float(n))

    @ps.operation
    def op(x: Any) -> Any:
        return x * n

    @ps.leafwise()
    def own(g: Tensor, p: Tensor) -> Tensor:
        return op(g) + here

    @ps.whole()
    def together(gs: list[Tensor], s: Any, params: list[Tensor]) -> tuple[list[Tensor], Any]:
        return [g * n for g in gs], s

    stepped(ps.chain(own(), together(), ps.sgd(0.1)))


def hyperparameters(n: int) -> None:
    stepped(ps.adamw(0.1 + n * 1e-6, betas=(0.9, 0.99 + 1e-6 * n)), steps=3)
    stepped(ps.tensors(ps.adamw(0.1 + n * 1e-6)))
    stepped(ps.adamw(lambda step: 0.1 / (step + n + 1)))
    stepped(ps.adamw(ps.schedules.cosine(0.1, total_steps=10 + n)))


def masks(n: int) -> None:
    stepped(
        ps.chain(
            ps.clip_by_global_norm(1.0),
            ps.add_decayed_weights(0.1, mask=lambda path, p: hash((path, n)) % 2 == 0),
            ps.adam(0.1),
        )
    )
    stepped(ps.masked(ps.sgd(0.1, momentum=0.9), {"a": n % 2 == 0, "b": n % 3 == 0}))
    stepped(ps.partition({"x": ps.sgd(0.1), "y": ps.adam(0.1)}, lambda path, p: "x" if path == "a" else "y"))


NOW = [0]
MASKED = ps.chain(*[ps.masked(ps.scale(0.9), lambda path, p, k=k: (NOW[0] >> k) & 1 == 1) for k in range(10)])


def masks_that_change(n: int) -> None:
    NOW[0] = n
    stepped(MASKED)


HELD = ps.adamw(0.1)


def shapes(n: int) -> None:
    params = {f"p{k}": torch.ones(1 + (7 * n + k) % 50, 1 + n % 13) for k in range(1 + n % 17)}
    stepped(HELD, params, 3)
    stepped(HELD, params, 3, donate=True)
    stepped(HELD, [torch.ones(2) for _ in range(1 + n % 300)], 2)
    stepped(ps.nadam(0.1), [torch.ones(1 + (n + k) % 9) for k in range(20 + n % 7)], 2)


def names(n: int) -> None:
    stepped(ps.named_chain((f"x{n}", ps.sgd(0.1)), (f"y{n}", ps.adam(0.1))), {f"n{n}": torch.ones(3)})


def switches(n: int) -> None:
    stepped(ps.quantize_state(ps.adamw(0.1), min_size=n))
    stepped(ps.add_noise(0.1, seed=n))
    stepped(ps.accumulate(ps.adam(0.1), 2 + n))
    stepped(ps.as_matrices(ps.scale_by_muon(ns_coefficients=(3.4, -4.7 + n * 1e-5, 2.0)), flatten=True), [torch.ones(4, 4)])
    stepped(ps.as_matrices(ps.scale_by_muon(), split=1 + n), [torch.ones(1 + n, 1)])
    stepped(ps.chain(*[ps.scale(1.001)] * (1 + n % 40)))


def batches(n: int) -> None:
    t = ps.adam(lr=torch.rand(2 + n % 5))
    torch.func.vmap(lambda t, p: t.step(p, t.init_state(p), p)[0], in_dims=(ps.in_dims(t), None))(t, PARAMS)
    HELD.explain(PARAMS, HELD.init_state(PARAMS), PARAMS)
    stepped(HELD, executor="leaf")


def optimizers(n: int) -> None:
    own = [torch.nn.Parameter(torch.ones(1 + n % 9)) for _ in range(3)]
    optimizer = optim.AdamW(own, lr=0.1 + n * 1e-6)
    for _ in range(4):
        for p in own:
            p.grad = torch.ones_like(p)
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())


class Kept:
    """Optimizers that live on, and whose groups are replaced."""

    def __init__(self) -> None:
        self.own = [torch.nn.Parameter(torch.ones(3)) for _ in range(3)]
        self.plain = optim.AdamW(self.own, lr=0.1)
        self.scheduled = optim.Optimizer(self.own, ps.adamw(lambda step: 0.1 / (step + 1)))

    def __call__(self, n: int) -> None:
        added = torch.nn.Parameter(torch.ones(2))
        for p in (*self.own, added):
            p.grad = torch.ones_like(p)
        self.plain.param_groups[0] = {**self.plain.param_groups[0], "lr": 0.1 + n * 1e-6}
        self.scheduled.param_groups[0] = {**self.scheduled.param_groups[0], "lr": lambda step: 0.1 / (step + n + 1)}
        for optimizer, lr in ((self.plain, 0.2), (self.scheduled, lambda step: 0.1)):
            optimizer.add_param_group({"params": [added], "lr": lr})
            optimizer.step()
            del optimizer.param_groups[1], optimizer.state[added]
            optimizer.step()


CHANGES: dict[str, Callable[[], Callable[[int], None]]] = {
    f.__name__: lambda f=f: f  # type: ignore[misc]
    for f in (
        declarations,
        states,
        closures,
        hyperparameters,
        masks,
        masks_that_change,
        shapes,
        names,
        switches,
        batches,
        optimizers,
    )
} | {"groups": Kept}


def ours(x: Any) -> bool:
    return str(getattr(x, "__module__", None)).split(".")[0] == "purestep"


def containers(*roots: Any) -> dict[str, int]:
    """The length of each container that the modules of the library, or these objects, lead to: of several at one path the
    longest. What has a bound of its own is held to it here."""
    found: dict[str, int] = {}
    seen: set[int] = set()
    stack: list[tuple[str, Any]] = [
        (name, vars(m)) for name, m in list(sys.modules.items()) if name.split(".")[0] == "purestep"
    ]
    stack += [(f"<{type(x).__name__}>", x) for x in roots]
    while stack:
        path, x = stack.pop()
        if id(x) in seen or isinstance(x, (Tensor, types.ModuleType)):
            continue
        seen.add(id(x))
        inside: list[tuple[str, Any]] = []
        if isinstance(x, (dict, types.MappingProxyType, weakref.WeakValueDictionary, weakref.WeakKeyDictionary)):
            found[path] = max(found.get(path, 0), len(x))
            inside = [(f"{path}.{k}" if isinstance(k, str) and "*" not in path else f"{path}.*", v) for k, v in list(x.items())]
            inside += [(f"{path}.key", k) for k in list(x) if not isinstance(k, str)]
        elif isinstance(x, (list, set, frozenset, tuple, weakref.WeakSet)):
            found[path] = max(found.get(path, 0), len(x))
            inside = [(f"{path}.*", v) for v in list(x)]
        elif hasattr(x, "cache_info"):
            info = x.cache_info()
            assert info.maxsize is not None, f"{path} is a cache without a bound"
        elif isinstance(x, (DeclarationCache, Shared)):
            entries = x.entries if isinstance(x, DeclarationCache) else x.recent
            assert len(entries) <= x.size, f"{path} has {len(entries)} entries, more than {x.size}"
            inside = [(f"{path}.*", v) for v in list(entries.values())]
        elif isinstance(x, types.FunctionType):
            inside = (
                [(path, vars(x)), *[(f"{path}.cell", c.cell_contents) for c in x.__closure__ or () if held(c)]]
                if ours(x)
                else []
            )
        elif isinstance(x, threading.local) or (isinstance(x, type) and ours(x)):
            inside = [(path, vars(x))]
        elif ours(type(x)) and not isinstance(x, type):
            slots = [s for kind in type(x).__mro__ for s in getattr(kind, "__slots__", ()) if hasattr(x, s)]
            inside = [(f"{path}.{s}", getattr(x, s)) for s in slots if not s.startswith("__")]
            inside += [(path, vars(x))] if hasattr(x, "__dict__") else []
        stack += inside
    return found


def held(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


LIVING = ("DECLARATIONS", "CACHES")
"""Weak ones, which have what lives: as much as bounded caches hold."""


@pytest.mark.parametrize("name", CHANGES)
def test_no_cache_grows(name: str) -> None:
    """Whatever is new at every step. A cache that is added is found here by itself."""
    change = CHANGES[name]()
    for n in range(70):
        change(n)
    gc.collect()
    before = containers(change)
    for n in range(70, 140):
        change(n)
    gc.collect()
    after = containers(change)
    grown = {path: (before.get(path, 0), n) for path, n in after.items() if n > max(before.get(path, 0) * 1.2, 64)}
    assert not {path: n for path, n in grown.items() if path.split(".")[-1] not in LIVING}


def everything(steps: int) -> list[int]:
    """How many objects there are at each fifth of so many steps, at which one thing after the other changes."""
    gc.collect()
    changes = [make() for make in CHANGES.values()]
    for n in range(300):
        states(n)  # which fill what keeps types
    found = []
    for n in range(steps):
        changes[n % len(changes)](n)
        if (n + 1) % (steps // 5) == 0:
            gc.collect()
            found.append(len(gc.get_objects()))
    return found


@pytest.mark.parametrize("steps", [600, pytest.param(3000, marks=pytest.mark.long)])
def test_no_object_is_left(steps: int) -> None:
    """After the first two fifths, in which bounded caches are filled, there are no more objects than there were."""
    found = everything(steps)
    assert max(found[2:]) <= found[1] + 600, found


# ---------------------------------------------------------------------------------------------------------------------- leaks


@pytest.fixture(scope="module")
def imported() -> None:
    """torch's first optimizer in a process stays until a garbage collection: making it imports the compiler."""
    torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])


@pytest.fixture
def by_counts_alone(imported: None) -> Iterator[None]:
    """No garbage collection: what is in a cycle stays."""
    gc.disable()
    yield
    gc.enable()


def references(*trees: Any) -> list[Any]:
    return [weakref.ref(x) for x in pytree.tree_leaves(trees) if isinstance(x, Tensor)]


def living(found: list[Any]) -> int:
    return sum(r() is not None for r in found)


@each()
@pytest.mark.usefixtures("by_counts_alone")
def test_nothing_is_left_of_pure_steps(case: Case) -> None:
    """Every gradient, parameter and tensor of a state is gone with its last name, without a garbage collection."""
    for how in MODES:
        t, params = case.transform(), {k: p.clone() for k, p in small(case).items()}
        state, found = t.init_state(params), []
        for _ in range(4):
            g = gradients(params)
            found += references(g, state, params)
            params, state = t.step(g, state, params, **how)
        found += references(params, state)
        del g, params, state, t
        assert living(found) == 0, how


def left_of(optimizer: Any, own: list[Any], found: list[Any]) -> None:
    found += [weakref.ref(optimizer), *references(own, [p.grad for p in own])]
    found += [weakref.ref(x) for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]


@each()
@pytest.mark.parametrize("flags", [{}, {"foreach": False}], ids=str)
@pytest.mark.usefixtures("by_counts_alone")
@pytest.mark.in_turn("flags")
def test_nothing_is_left_of_an_optimizer(case: Case, flags: dict[str, Any]) -> None:
    if case.transform().plan.extras:
        pytest.skip("it asks for a closure")
    own = [torch.nn.Parameter(p.clone()) for p in small(case).values()]
    optimizer, found = optim.Optimizer(own, case.transform(), **flags), []
    for _ in range(4):
        for p in own:
            p.grad = torch.sin(3 * p.detach())
        optimizer.step()
        left_of(optimizer, own, found)
    del own, p, optimizer
    assert living(found) == 0


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.usefixtures("by_counts_alone")
def test_nothing_is_left_of_any_class(name: str) -> None:
    """With closures, hooks, a scheduler, and checkpoints."""
    own = [torch.nn.Parameter(torch.ones(3, 2)) for _ in range(2)]
    optimizer, found = getattr(optim, name)(own, lr=0.01), []
    scheduler = optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

    def closure(own: Any = tuple(own)) -> Any:
        for p in own:
            g = torch.sin(3 * p.detach())
            p.grad = g.to_sparse() if name == "SparseAdam" else g
        return sum((p.detach() ** 2).sum() for p in own)

    for _ in range(4):
        optimizer.step(closure)
        scheduler.step()
        left_of(optimizer, own, found)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step(closure)
    optimizer.zero_grad()
    left_of(optimizer, own, found)
    del own, closure, optimizer, scheduler
    gc.collect()  # torch's schedulers wrap the optimizer's step, and so are in a cycle with it
    assert living(found) == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: ps.nadam(0.1),
        lambda: ps.adamw(lambda step: 0.1 / (step + 1)),
        lambda: ps.chain(ps.adam(0.1), ps.add_decayed_weights(0.1, mask=lambda path, p: p.ndim > 0)),
        lambda: ps.chain(ps.clip_by_global_norm(1.0), ps.add_noise(0.1), ps.sgd(0.1, momentum=0.9)),
        lambda: ps.accumulate(ps.adam(0.1), 2),
    ],
    ids=["plain", "scheduled", "masked", "whole", "nested"],
)
@pytest.mark.usefixtures("by_counts_alone")
def test_nothing_is_left_of_a_group_that_was_taken_away(make: Callable[[], ps.Transform]) -> None:
    """From the next step on nothing of the optimizer holds its parameters, its options, or their state."""
    own, added = ([torch.nn.Parameter(torch.ones(n)) for n in sizes] for sizes in ((3, 4), (2, 5)))
    optimizer, found = optim.Optimizer(own, make()), []

    def step() -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        optimizer.step()

    optimizer.add_param_group({"params": added})
    for _ in range(4):
        step()
    left_of(optimizer, added, found)
    for p in added:
        del optimizer.state[p]
    del added, p, optimizer.param_groups[1]
    step()
    gc.collect()  # the closures of this test are in a cycle
    taken = [r for r in found if r() is not None and r() is not optimizer and not any(r() is x for x in tensors_of(optimizer))]
    assert not taken


def tensors_of(optimizer: Any) -> list[Any]:
    own = [p for group in optimizer.param_groups for p in group["params"]]
    return [*own, *[p.grad for p in own], *[x for state in optimizer.state.values() for x in state.values()]]


@pytest.mark.usefixtures("by_counts_alone")
def test_nothing_is_left_of_what_is_differentiated_batched_and_unrolled() -> None:
    t, found = ps.adam(0.1), []

    def trained(p: Tensor) -> Tensor:
        state = t.init_state(p)
        for _ in range(3):
            p, state = t.step(2 * p, state, p)
        return (p**2).sum()

    p = torch.ones(3, dtype=torch.float64)
    q = p.clone().requires_grad_()
    out = (
        torch.func.grad(trained)(p),
        torch.func.vmap(torch.func.grad(trained))(torch.stack([p, p])),
        torch.autograd.grad(trained(q), q),
    )
    found += references(p, q, out)
    del p, q, out
    assert living(found) == 0
