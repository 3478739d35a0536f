"""`explain` says what runs; it changes nothing, and what it says is what happens."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor

import purestep as ps
from purestep import optim
from purestep._executors.task import EXECUTOR_NAMES, EXECUTORS, ExecutorName
from tests.problems import clone

MANY = {f"p{k}": (3, 4) for k in range(20)}
FEW = {"w": (3, 4), "b": (4,)}


def draw(shapes: dict[str, tuple[int, ...]], seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def explained(opt: ps.Transform, shapes: dict[str, tuple[int, ...]], **how: Any) -> Any:
    params = draw(shapes)
    return opt.explain(draw(shapes, 1), opt.init_state(params), params, **how)


def executors(explanation: Any) -> list[str]:
    return [part.executor for part in explanation.parts]


CASES: dict[str, tuple[Any, Any, dict[str, Any], list[str]]] = {
    "kernel": (ps.adamw(0.1), FEW, {}, ["fused"]),
    "kernel, donated": (ps.adamw(0.1), MANY, {"donate": True}, ["fused"]),
    "kernel that does not pay": (ps.sgd(0.1, momentum=0.9), FEW, {}, ["foreach"]),
    "kernel that may write": (ps.sgd(0.1, momentum=0.9), FEW, {"donate": True}, ["fused"]),
    "few": (ps.nadam(0.1), FEW, {}, ["foreach"]),
    "many": (ps.nadam(0.1), MANY, {}, ["packed", "foreach"]),
    "many, foreach": (ps.nadam(0.1), MANY, {"executor": "foreach"}, ["foreach"]),
    "leaf": (ps.adamw(0.1), FEW, {"executor": "leaf"}, ["leaf"]),
    "whole": (ps.chain(ps.clip_by_global_norm(1.0), ps.adamw(0.1)), FEW, {}, ["whole", "fused"]),
    "compiled": (ps.nadam(0.1), FEW, {"compile": True}, ["compiled"]),
    "compiled, kernel": (ps.adamw(0.1), FEW, {"compile": True, "donate": True}, ["fused"]),
    "wrapped": (ps.skip_if_nonfinite(ps.nadam(0.1)), FEW, {}, ["whole", "foreach"]),
}


@pytest.mark.parametrize("name", CASES)
def test_which_executor(name: str) -> None:
    opt, shapes, how, expected = CASES[name]
    assert executors(explained(opt, shapes, **how)) == expected


def test_nothing_changes() -> None:
    opt, params, grads = ps.chain(ps.clip(1.0), ps.nadam(0.1)), draw(MANY), draw(MANY, 1)
    state = opt.init_state(params)
    params, state = opt.step(grads, state, params)
    given = (grads, state, params)
    before = clone(given)
    for donate in (False, True):
        opt.explain(*given, donate=donate)
    torch.testing.assert_close(given, before, rtol=0, atol=0)


def test_a_history() -> None:
    opt, params = ps.nadam(0.1), {name: x.requires_grad_() for name, x in draw(FEW).items()}
    found = opt.explain(draw(FEW, 1), opt.init_state(params), params)
    assert (found.mode, executors(found)) == ("leaf", ["joined"])
    large = {"a": torch.ones(300, 400, requires_grad=True), "b": torch.ones(300, 400)}
    assert executors(opt.explain(large, opt.init_state(large), large)) == ["single"]


def test_dtypes_and_complex_numbers() -> None:
    opt = ps.nadam(0.1)
    params = {**draw({"a": (3,)}), **draw({"b": (3,)}, dtype=torch.float64), "c": torch.ones(3, dtype=torch.complex64)}
    found = opt.explain(params, opt.init_state(params), params)
    assert [(part.dtype, part.executor) for part in found.parts] == [
        (torch.float32, "foreach"), (torch.float64, "foreach"), (torch.complex64, "complex"), (torch.float32, "foreach"),
    ]  # fmt: skip
    half = draw(FEW, dtype=torch.bfloat16)
    state = opt.init_state(draw(FEW))
    assert executors(opt.explain(half, state, half)) == ["promoted"]


def test_a_subclass() -> None:
    class Mine(Tensor):
        pass

    params = {"a": torch.ones(3).as_subclass(Mine), "b": torch.ones(3)}
    opt = ps.adamw(0.1)
    assert sorted(executors(opt.explain(params, opt.init_state(params), params))) == ["fused", "one by one"]


def test_the_reason_counts_the_tensors() -> None:
    opt, params, grads = ps.adamw(0.1), draw(MANY), draw(MANY, 1)
    for name in ("p3", "p7"):
        grads[name] = grads[name].t().contiguous().t()
    found = opt.explain(grads, opt.init_state(params), params)
    assert found.parts[0].declined["fused"] == "2 of 80 tensors are not contiguous"
    assert "foreach, not fused: 2 of 80 tensors are not contiguous" in str(found)
    few = explained(ps.nadam(0.1), FEW)
    assert few.parts[0].declined["packed"] == "2 tensors, fewer than 16"
    large = explained(ps.nadam(0.1), {f"p{k}": (100, 100) for k in range(16)})
    assert large.parts[0].declined["packed"] == "10,000 elements on average, more than 4,096"


def test_what_is_asked_for_is_said() -> None:
    assert explained(ps.adamw(0.1), FEW, executor="foreach").parts[0].declined["fused"] == "foreach was asked for"
    with pytest.raises(ValueError, match="executor must be None or one of"):
        explained(ps.adamw(0.1), FEW, executor="Foreach")


def test_the_step_cache() -> None:
    opt, params = ps.adamw(0.1), draw(FEW)
    state = opt.init_state(params)
    assert not opt.explain(params, state, params).cached
    for _ in range(3):
        params, state = opt.step(draw(FEW, 1), state, params)
    assert opt.explain(draw(FEW, 2), state, params).cached
    strided = {name: torch.stack([x, x], -1)[..., 0] for name, x in params.items()}
    assert not opt.explain(strided, state, params).cached


def test_memory() -> None:
    size = sum(x.numel() * 4 for x in draw(MANY).values())
    assert explained(ps.adamw(0.1), MANY, donate=True).memory == 0
    pure = explained(ps.adamw(0.1), MANY).memory
    assert 3 * size <= pure <= 3 * size + 100  # parameters and two moments, and a counter
    assert explained(ps.rmsprop(0.1), MANY, donate=True).memory >= 2 * size  # the buffers of the packed executor


def test_an_optimizer() -> None:
    params = [torch.nn.Parameter(x) for x in draw(MANY).values()]
    optimizer = optim.NAdam(params, lr=0.1)
    for p in params:
        p.grad = torch.ones_like(p)
    before = [p.detach().clone() for p in params]
    first = optimizer.explain()
    assert executors(first) == ["packed", "foreach"]
    assert not first.cached
    assert all(map(torch.equal, params, before))
    assert all(s["step"] == 0 for s in optimizer.state.values())
    for _ in range(3):
        optimizer.step()
    assert optimizer.explain().cached
    params[0].grad = torch.ones(4, 3).t()
    assert not optimizer.explain().cached
    calls: list[int] = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    optimizer.explain()
    assert not calls


def test_parts_of_a_partition() -> None:
    params = [("w", torch.nn.Parameter(torch.ones(4, 3))), ("b", torch.nn.Parameter(torch.ones(3)))]
    two = ps.partition({"m": ps.muon(0.1), "a": ps.adamw(0.1)}, ps.by_ndim({2: "m"}, default="a"))
    optimizer = optim.Optimizer(params, two)
    for _, p in params:
        p.grad = torch.ones_like(p)
    assert sorted(part.executor for part in optimizer.explain().parts) == ["foreach", "fused"]


def test_a_closure_is_missing() -> None:
    optimizer = optim.LBFGS([torch.nn.Parameter(torch.ones(3))])
    with pytest.raises(TypeError, match="needs a closure"):
        optimizer.explain()


def test_every_executor_is_met_here() -> None:
    """But for those that need several processes, or a tracer."""
    met = {name for _, _, _, names in CASES.values() for name in names}
    elsewhere = {"by parts", "traced", "vmapped", "joined", "single", "complex", "promoted", "one by one", "learned"}
    known = {executor.name for executor in EXECUTORS}
    assert not known - met - elsewhere, "no case of CASES meets these executors: add one"
    assert not (met - {"whole"}) | elsewhere > known, "these names belong to no executor"


@pytest.mark.parametrize("wanted", EXECUTOR_NAMES)
def test_every_name_is_some_executors(wanted: ExecutorName) -> None:
    """What a user may ask for changes what some executor says of a task: a name that nobody looks at would be ignored."""
    opt, answers = ps.chain(ps.scale(2.0), ps.nadam(0.1)), []
    for executor in (None, wanted):
        with contextlib.suppress(RuntimeError):  # "fused" is refused where there is no kernel
            answers.append([(part.executor, part.declined) for part in explained(opt, MANY, executor=executor).parts])
    assert len(answers) == 1 or answers[0] != answers[1]


def test_inside_a_vmap() -> None:
    opt, params = ps.nadam(0.1), {"w": torch.ones(2, 3)}
    state = torch.func.vmap(opt.init_state, out_dims=ps.out_dims(opt.init_state({"w": torch.ones(3)})))(params)
    dims = ps.out_dims(opt.init_state({"w": torch.ones(3)}))
    seen: list[Any] = []

    def look(p: Any, s: Any) -> Any:
        seen.append(opt.explain(p, s, p))
        return p

    torch.func.vmap(look, in_dims=(0, dims))(params, state)
    assert executors(seen[0]) == ["vmapped"]
    assert seen[0].mode == "leaf"
