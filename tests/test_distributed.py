"""Parameters that are spread over processes: every transform does to them what it does to whole ones.

Everything is run by two processes, once (`answers`); the tests look at what they have found. A case returns how far the
sharded run is from the one on whole tensors, which each process makes for itself, relative to the largest value of each tensor.
"""

from __future__ import annotations

import copy
import math
import re
import traceback
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import purestep as ps
from purestep import optim
from tests import processes
from tests.case import Case
from tests.cases import CASES
from tests.cases_methods import Given
from tests.problems import clone, difference, grads, through_a_file

Found = dict[str, Any]
FOUND: dict[str, Callable[..., Any]] = {}
"""What the processes run, by name."""

EXACT, NEAR = 1e-12, 1e-6


def case(function: Callable[..., Any]) -> Callable[..., Any]:
    FOUND[function.__name__] = function
    return function


# ------------------------------------------------------------------------------------------------------ spread and gathered


def spread(x: Tensor, mesh: Any, dim: int | None = 0) -> Any:
    """A tensor over two processes: along a dimension, or whole in both."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    replicated = DTensor.from_local(x.clone(), mesh, [Replicate()], run_check=False)
    return replicated if dim is None else replicated.redistribute(placements=[Shard(dim)])


def layout(kind: str, k: int, x: Tensor) -> int | None:
    """How the k-th parameter of a tree is spread; -1 for not at all."""
    if not x.dim():
        return None if kind != "mixed" else -1
    if kind == "rows":
        return 0
    return (x.dim() - 1, -1, 0)[k % 3]


def spread_tree(tree: Any, mesh: Any, kind: str) -> Any:
    leaves, spec = pytree.tree_flatten(tree)
    placed = [x if (dim := layout(kind, k, x)) == -1 else spread(x, mesh, dim) for k, x in enumerate(leaves)]
    return pytree.tree_unflatten(placed, spec)


def gathered(tree: Any) -> Any:
    """Every tensor in one piece, and of its own: the whole run must not have seen the others' memory."""
    return pytree.tree_map(
        lambda x: (x.full_tensor() if hasattr(x, "full_tensor") else x).clone() if isinstance(x, Tensor) else x, tree
    )


def types(tree: Any) -> list[type]:
    return [type(x) for x in pytree.tree_leaves(tree)]


# ------------------------------------------------------------------------------------------------------------ the registry


def of_case(
    case: Case, options: Any, kind: str, mode: str, mesh: Any, problem: Any, dtype: torch.dtype = torch.float64
) -> float:
    """Four steps of a transform, on whole parameters and on spread ones."""
    params, loss = problem(dtype)
    params = {k: p for k, p in params.items() if case.treats(p)}
    fixed = problem(dtype)[0]
    t = case.transform(options)

    def gradients(p: Any) -> Any:
        return grads(lambda q: loss({**fixed, **q}), p)

    if mode == "wrapper":
        return of_wrapper(t, params, gradients, kind, mesh)
    donate = mode == "donate"
    whole, state = clone(params), t.init_state(params)
    parts = spread_tree(params, mesh, kind)
    held = t.init_state(parts)
    homes = list(map(id, pytree.tree_leaves(parts)))
    for _ in range(4):
        g = gradients(whole)
        sharded, before = spread_tree(g, mesh, kind), gathered(parts)
        given = clone(gathered(sharded))
        whole, state = t.step(g, state, whole)
        after, held = t.step(sharded, held, parts, donate=donate)
        assert difference(gathered(sharded), given) == 0.0, "a gradient was written to"
        assert donate or difference(gathered(parts), before) == 0.0, "a parameter was written to"
        parts = after
        assert types(parts) == types(spread_tree(params, mesh, kind))
    assert not donate or list(map(id, pytree.tree_leaves(parts))) == homes
    return max(difference(gathered(parts), whole), difference(gathered(held), state))


def of_wrapper(t: ps.Transform, params: Any, gradients: Any, kind: str, mesh: Any) -> float:
    def begin(tree: Any) -> tuple[Any, Any]:
        named = {k: nn.Parameter(p) for k, p in tree.items()}
        return named, optim.Optimizer(list(named.items()), t)

    whole, opt = begin(clone(params))
    parts, other = begin(spread_tree(params, mesh, kind))
    for _ in range(4):
        g = gradients({k: p.detach() for k, p in whole.items()})
        for p, x, q, y in zip(whole.values(), g.values(), parts.values(), spread_tree(g, mesh, kind).values()):
            p.grad, q.grad = x.clone(), y
        opt.step()
        other.step()
    worst = difference(gathered({k: p.detach() for k, p in parts.items()}), {k: p.detach() for k, p in whole.items()})
    states = [[o.state.get(p, {}) for p in [*ps.values(), "shared"]] for o, ps in ((other, parts), (opt, whole))]
    return max(worst, difference(*map(gathered, states)))


WAYS = (("rows", "pure"), ("mixed", "donate"), ("mixed", "wrapper"))


def registry(mesh: Any, every: bool) -> Found:
    """Pure, with memory given away, and under the wrapper: each case in one of these ways, in turn, or in every one.

    The second set of options once.
    """
    found: Found = {}
    for number, c in enumerate(CASES):
        for kind, mode in WAYS if every else WAYS[number % len(WAYS) :][:1]:
            if mode != "wrapper" or not isinstance(c.transform(), Given):
                found[f"{c.name} {kind} {mode}"] = answer(of_case, c, c.options[0], kind, mode, mesh, c.problem)
        if len(c.options) > 1:
            found[f"{c.name} again"] = answer(of_case, c, c.options[1], "rows", "donate", mesh, c.problem)
    return found


# ------------------------------------------------------------------------------------------------------------ torch's classes

SHAPES = {"uneven": (5, 3), "one row": (1, 4), "vector": (7,), "number": (), "wide": (2, 6), "plain": (3, 2)}
"""A second process has fewer rows of the first, and none of the second."""

CLASSES: dict[str, dict[str, Any]] = {
    "Adadelta": {"lr": 0.5}, "Adafactor": {"lr": 0.1}, "Adagrad": {"lr": 0.1, "initial_accumulator_value": 0.1}, "Adam": {"lr": 0.1},
    "AdamW": {"lr": 0.1, "amsgrad": True}, "Adamax": {"lr": 0.1}, "ASGD": {"lr": 0.1, "lambd": 0.1, "t0": 1}, "Muon": {"lr": 0.1},
    "NAdam": {"lr": 0.1}, "RAdam": {"lr": 0.1}, "RMSprop": {"lr": 0.1, "momentum": 0.9, "centered": True}, "Rprop": {"lr": 0.1},
    "SGD": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "LBFGS": {"lr": 0.5, "max_iter": 4, "line_search_fn": "strong_wolfe"},
}  # fmt: skip
"""All but SparseAdam, whose gradients are not."""


def bowl(p: Tensor) -> Tensor:
    """A gradient that depends on the parameter."""
    return p + 0.3 * torch.sin(3 * p) - 0.1


def loss_of(p: Tensor) -> Tensor:
    return (0.5 * p**2 - 0.1 * torch.cos(3 * p) - 0.1 * p).sum()


def pair(mesh: Any, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float64) -> tuple[list[Any], list[Any]]:
    """Parameters, whole and spread over the rows, but for what is called plain."""
    g = torch.Generator().manual_seed(1)
    values = {k: torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for k, s in shapes.items()}
    whole = [nn.Parameter(x.clone()) for x in values.values()]
    parts = [nn.Parameter(x.clone() if k == "plain" else spread(x, mesh, 0 if x.dim() else None)) for k, x in values.items()]
    return whole, parts


def train(optimizer: torch.optim.Optimizer, params: list[Any], steps: int = 4) -> None:
    def closure() -> Tensor:
        total: Any = 0.0
        for p in params:
            p.grad = bowl(p.detach())
            loss = loss_of(p.detach())
            total = total + (loss.full_tensor() if hasattr(loss, "full_tensor") else loss)
        return total

    for _ in range(steps):
        optimizer.step(closure) if type(optimizer).__name__ == "LBFGS" else (closure(), optimizer.step())


def apart(parts: list[Any], whole: list[Any]) -> float:
    return difference([gathered(p.detach()) for p in parts], [p.detach() for p in whole])


def of_class(name: str, mesh: Any, **flags: Any) -> float:
    """torch's class on whole parameters, and the one of the same name here on spread ones."""
    shapes = {k: s for k, s in SHAPES.items() if name != "Muon" or len(s) == 2}
    whole, parts = pair(mesh, shapes)
    a, b = getattr(torch.optim, name)(whole, **CLASSES[name]), getattr(optim, name)(parts, **CLASSES[name], **flags)
    homes = [p.to_local().data_ptr() for p in parts if hasattr(p, "to_local")]
    train(a, whole)
    train(b, parts)
    assert homes == [p.to_local().data_ptr() for p in parts if hasattr(p, "to_local")], "the parameters have moved"
    found = apart(parts, whole)
    if name != "LBFGS":
        for p, q in zip(whole, parts):
            theirs, ours = a.state[p], b.state[q]
            assert all(
                type(ours[k]) is type(q) or type(q) is nn.Parameter for k in theirs if theirs[k].shape == p.shape and p.dim()
            )
            found = max(found, difference({k: gathered(ours[k]) for k in theirs}, {k: theirs[k].clone() for k in theirs}))
    again = copy.deepcopy(parts)  # a checkpoint, and on from there
    c = getattr(optim, name)(again, **CLASSES[name], **flags)
    c.load_state_dict(copy.deepcopy(b.state_dict()))
    train(a, whole, 2)
    train(b, parts, 2)
    train(c, again, 2)
    return max(found, apart(parts, whole), apart(again, whole))


for _name in CLASSES:
    FOUND[_name] = partial(of_class, _name)
for _name, _flags in (
    ("AdamW", {"foreach": False}),
    ("RMSprop", {"foreach": True}),
    ("AdamW", {"compile": True}),
    ("SGD", {"fused": True}),
):
    FOUND[f"{_name}-{next(iter(_flags))}"] = partial(of_class, _name, **_flags)


@case
def many_small(mesh: Any) -> float:
    """Twenty, which are packed where they are; of some a second process has nothing, or of all."""
    worst = 0.0
    for name in ("RMSprop", "AdamW"):
        for rows in ((5,), (1,), (5, 1)):
            whole, parts = pair(mesh, {str(k): (rows[k % len(rows)], 3) for k in range(20)})
            a, b = getattr(torch.optim, name)(whole, **CLASSES[name]), getattr(optim, name)(parts, **CLASSES[name])
            before = [dict(b.state[p]) for p in parts]
            if name == "RMSprop":  # whose state is packed: the parts lie one after the other
                here = [x for p in parts if (x := b.state[p]["square_avg"].to_local()).numel()]
                assert [x.data_ptr() for x in here[1:]] == [x.data_ptr() + x.nbytes for x in here[:-1]], "it is not packed"
            train(a, whole)
            train(b, parts)
            assert all(b.state[p][k] is x for p, old in zip(parts, before) for k, x in old.items()), "a state has moved"
            worst = max(worst, apart(parts, whole))
    return worst


# ----------------------------------------------------------------------------------------------------- the step cache

REMEMBERED: dict[str, Callable[..., Any]] = {
    "AdamW": lambda ps_: optim.AdamW(ps_, lr=0.1), "SGD": lambda ps_: optim.SGD(ps_, lr=0.1, momentum=0.9),
    "NAdam": lambda ps_: optim.NAdam(ps_, lr=0.1),
    "chain": lambda ps_: optim.Optimizer(ps_, ps.chain(ps.trace(0.9), ps.lion(0.1))),
}  # fmt: skip


def finite(x: Tensor) -> Tensor:
    return x.nan_to_num(12345.0)


def remembered(name: str, count: int, mesh: Any) -> dict[str, Any]:
    """Steps like the last one, and each time one thing that the step cache takes for granted is no longer so."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    whole, parts = pair(mesh, {str(k): (5, 3) for k in range(count)})
    parts[-1] = nn.Parameter(spread(whole[-1].detach(), mesh, None))  # whole in both processes
    a, b = REMEMBERED[name](whole), REMEMBERED[name](parts)
    found: dict[str, Any] = {}

    def step(what: str, change: Callable[[], Any] = lambda: None, places: list[Any] | None = None, grad: Any = None) -> None:
        for k, (p, q) in enumerate(zip(whole, parts)):
            g = bowl(p.detach()) if grad is None or k else grad(p)
            p.grad, q.grad = g, None if g is None else spread(g, mesh, None if q is parts[-1] else 0)
            if places is not None and g is not None:
                q.grad = q.grad.redistribute(placements=places)
        change()
        a.step()
        b.step()
        states = [[x for x in o.state[p].values() if isinstance(x, Tensor)] for o, ps_ in ((b, parts), (a, whole)) for p in ps_]
        pairs = [(list(map(finite, gathered(x))), list(map(finite, y))) for x, y in zip(states[:count], states[count:])]
        pairs += [([finite(gathered(q.detach()))], [finite(p.detach())]) for q, p in zip(parts, whole)]
        found[what] = max(difference(x, y) for x, y in pairs)

    def terms(k: int) -> None:
        x = parts[k].grad.full_tensor()
        parts[k].grad = DTensor.from_local(x / 2, mesh, [Partial()], run_check=False)

    def other_state() -> None:
        state = b.state[parts[0]]
        for key, x in state.items():
            state[key] = x.clone() if isinstance(x, Tensor) else x

    def other_memory() -> None:
        parts[1]._local_tensor = parts[1]._local_tensor.clone()

    def rate() -> None:
        for o in (a, b):
            o.param_groups[0]["lr"] = 0.05

    for k in range(4):
        step(f"like the last, {k}")
    found["cached"] = b.explain().cached
    versions = [p._version for p in parts]
    step("again")
    assert all(p._version > v for p, v in zip(parts, versions)), "a version was not counted"
    step("replicated gradients", places=[Replicate()])
    step("gradients by columns", places=[Shard(1)])
    step("terms of a gradient", lambda: terms(0))
    step("terms where nothing else is different", lambda: terms(-1))
    step("another state", other_state)
    step("other memory", other_memory)
    step("another rate", rate)
    step("a missing gradient", grad=lambda p: None)
    step("all gradients again")
    step("not a number", grad=lambda p: torch.full_like(p, float("nan")))
    whole[0].data.fill_(1.0), parts[0].data.fill_(1.0)
    for optimizer, p in ((a, whole[0]), (b, parts[0])):
        for x in optimizer.state[p].values():
            if x.dim():
                x.zero_()
    step("numbers again")
    for key, made in (
        ("a plain gradient", lambda q: q.grad.full_tensor()),
        ("a plain state", lambda q: q.grad),
    ):
        step("before " + key)
        for p, q in zip(whole, parts):
            q.grad = spread(bowl(p.detach()), mesh, None if q is parts[-1] else 0)
        parts[0].grad = made(parts[0])
        if key == "a plain state":
            state = b.state[parts[0]]
            name_ = next(n for n, x in state.items() if x.dim())
            state[name_] = state[name_].full_tensor()
        before = gathered([p.detach() for p in parts])
        found[key] = refusal(b.step)
        assert difference(gathered([p.detach() for p in parts]), before) == 0.0
    return found


for _name in REMEMBERED:
    for _count in (3, 20):
        FOUND[f"remembered {_name}, {_count}"] = partial(remembered, _name, _count)


def remembered_steps(name: str, count: int, mesh: Any) -> dict[str, Any]:
    """The same for `step` with ``donate=True``: of functions, not of an optimizer."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    t = {"adamw": ps.adamw(0.1), "lion": ps.lion(0.1), "nadam": ps.nadam(0.1)}[name]
    whole_, parts_ = pair(mesh, {str(k): (5, 3) for k in range(count)})
    whole, parts = [p.detach() for p in whole_], [p.detach() for p in parts_]
    state, held = t.init_state(whole), t.init_state(parts)
    found: dict[str, Any] = {}

    def step(what: str, change: Callable[[list[Any]], Any] = lambda grads: None, **kwargs: Any) -> None:
        nonlocal whole, parts, state, held
        g = [bowl(p) for p in whole]
        sharded = [spread(x, mesh) for x in g]
        change(sharded)
        whole, state = t.step(g, state, whole)
        parts, held = t.step(sharded, held, parts, **{"donate": True, **kwargs})
        found[what] = max(difference(gathered(parts), whole), difference(gathered(held), state))

    def terms(grads: list[Any]) -> None:
        grads[0] = DTensor.from_local(grads[0].full_tensor() / 2, mesh, [Partial()], run_check=False)

    def replicated(grads: list[Any]) -> None:
        grads[1] = grads[1].redistribute(placements=[Replicate()])

    for k in range(4):
        step(f"like the last, {k}")
    found["cached"] = t.explain([spread(bowl(p), mesh) for p in whole], held, parts, donate=True).cached
    before = [(x, x._version) for x in pytree.tree_leaves([parts, held]) if isinstance(x, Tensor) and x.dim()]
    step("again")
    assert all(x._version > version for x, version in before), "a version was not counted"
    step("terms of a gradient", terms)
    step("a replicated gradient", replicated)
    step("leaf by leaf", executor="leaf")
    step("again once more")
    held = pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, held)
    step("another state")
    step("pure", donate=False)
    for copied in (copy.deepcopy([parts, held]), through_a_file([parts, held], weights_only=False)):
        assert difference(gathered(copied), gathered([parts, held])) == 0.0, "a copy is not right"
    step("after it")
    rest = [spread(bowl(p), mesh) for p in whole]
    for key, first in (
        ("a plain gradient", rest[0].full_tensor()),
        ("another shape", spread(torch.zeros(6, 3, dtype=torch.float64), mesh)),
    ):
        values = gathered([parts, held])
        found[key] = refusal(lambda first=first: t.step([first, *rest[1:]], held, parts, donate=True))  # type: ignore[misc]
        assert difference(gathered([parts, held]), values) == 0.0
    return found


for _name in ("adamw", "lion", "nadam"):
    for _count in (3, 20):
        FOUND[f"remembered steps {_name}, {_count}"] = partial(remembered_steps, _name, _count)


CALLS: list[int] = []


@ps.leafwise()
def noted(g: Tensor, p: Tensor) -> Tensor:
    CALLS.append(1)
    return -0.1 * g


@case
def leaf_by_leaf_after_all(mesh: Any) -> int:
    """How often the leaf function itself is called where that is asked for, after steps that were remembered."""
    t, parts, grads = noted(), *([spread(torch.ones(4, 2), mesh) for _ in range(3)] for _ in range(2))
    state = t.init_state(parts)
    for _ in range(4):
        parts, state = t.step(grads, state, parts, donate=True)
    assert t.explain(grads, state, parts, donate=True).cached
    CALLS.clear()
    t.step(grads, state, parts, donate=True)
    assert not CALLS
    t.step(grads, state, parts, donate=True, executor="leaf")
    return len(CALLS)


class Swapped(NamedTuple):
    last: Tensor
    before: Tensor

    @classmethod
    def init(cls, p: Tensor) -> Swapped:
        return cls(torch.zeros_like(p), torch.ones_like(p))


@ps.leafwise(Swapped)
def swap_fields(g: Tensor, s: Swapped, p: Tensor) -> tuple[Tensor, Swapped]:
    return g + s.before, Swapped(s.before, s.last)


@ps.leafwise(Swapped)
def move_fields(g: Tensor, s: Swapped, p: Tensor) -> tuple[Tensor, Swapped]:
    return g + s.before, Swapped(2 * s.before + g, s.last)


@case
def fields_that_change_places(mesh: Any) -> float:
    """A new field is the memory of another old one, which was given away, too."""
    worst = 0.0
    for t in (swap_fields(), move_fields(), ps.chain(move_fields(), swap_fields(), ps.trace(0.5))):
        generator = torch.Generator().manual_seed(2)
        whole: Any = {str(k): torch.randn(5, 3, generator=generator, dtype=torch.float64) for k in range(2)}
        parts = spread_tree(whole, mesh, "rows")
        state, held = t.init_state(whole), t.init_state(parts)
        for k in range(5):
            g = {name: torch.full_like(x, 0.1 * k) for name, x in whole.items()}
            whole, state = t.step(g, state, whole)
            parts, held = t.step(spread_tree(g, mesh, "rows"), held, parts, donate=True)
            worst = max(worst, difference(gathered(parts), whole), difference(gathered(held), state))
    return worst


# ------------------------------------------------------------------------------------------------------------------- FSDP


def network(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(900, 700), nn.Tanh(), nn.Linear(700, 3)).to(dtype)


def fsdp2(mesh: Any, make: Any, torchs: Any, dtype: torch.dtype, clip: float = 0.0) -> float:
    """Three steps under `fully_shard`, each process with its own half of the batch, and on one process with all of it."""
    from torch.distributed.fsdp import fully_shard

    single, model = network(dtype), network(dtype)
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    a, b = torchs(single.parameters()), make(model)
    rank, size = mesh.get_local_rank(), mesh.size()
    g = torch.Generator().manual_seed(4)
    for _ in range(3):
        x = torch.randn(8, 900, generator=g, dtype=torch.float64).to(dtype)
        for net, inputs, optimizer in ((single, x, a), (model, x.chunk(size)[rank], b)):
            optimizer.zero_grad()
            (net(inputs) ** 2).mean().backward()
            if clip and net is single:
                nn.utils.clip_grad_norm_(net.parameters(), clip)
            optimizer.step()
    return apart(list(model.parameters()), list(single.parameters()))


@case
def fsdp2_adamw(mesh: Any) -> float:
    return fsdp2(mesh, lambda m: optim.AdamW(m.parameters(), lr=1e-3), lambda p: torch.optim.AdamW(p, lr=1e-3), torch.float64)


@case
def fsdp2_rmsprop(mesh: Any) -> float:
    return fsdp2(
        mesh,
        lambda m: optim.RMSprop(m.parameters(), lr=1e-4, eps=1e-6),
        lambda p: torch.optim.RMSprop(p, lr=1e-4, eps=1e-6),
        torch.float64,
    )


@case
def fsdp2_clipped(mesh: Any) -> float:
    t = ps.chain(ps.clip_by_global_norm(0.01), ps.sgd(0.1, momentum=0.9))
    return fsdp2(
        mesh,
        lambda m: optim.Optimizer(m.named_parameters(), t),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        torch.float64,
        0.01,
    )


@case
def fsdp2_float32(mesh: Any) -> float:
    """SGD, because Adam's first steps are signs: of a gradient that is nearly 0, a rounding error can be all."""
    return fsdp2(
        mesh,
        lambda m: optim.SGD(m.parameters(), lr=1e-2, momentum=0.9),
        lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
        torch.float32,
    )


@case
def two_dimensions(mesh: Any) -> float:
    """Tensor parallelism under `fully_shard`, with matrices for Muon, and one norm of all."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    worst, parts = 0.0, {"matrices": ps.muon(0.1), "rest": ps.adamw(0.01)}
    t = ps.chain(ps.clip_by_global_norm(0.01), ps.partition(parts, ps.by_ndim({2: "matrices"}, default="rest")))
    for shape in ((mesh.size(), 1), (1, mesh.size())):
        both = init_device_mesh("cpu", shape, mesh_dim_names=("data", "tensor"))
        torch.manual_seed(6)
        single = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double()
        model = copy.deepcopy(single)
        parallelize_module(model, both["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        fully_shard(model, mesh=both["data"])
        x = torch.randn(4, 5, dtype=torch.float64)
        batches = ((single, x), (model, x.chunk(shape[0])[both["data"].get_local_rank()]))
        optimizers = [optim.Optimizer(net.named_parameters(), t) for net, _ in batches]
        for _ in range(3):
            for (net, inputs), optimizer in zip(batches, optimizers):
                optimizer.zero_grad()
                (net(inputs) ** 2).mean().backward()
                optimizer.step()
        worst = max(worst, apart(list(model.parameters()), list(single.parameters())))
    return worst


@case
def checkpoints(mesh: Any) -> float:
    """torch's own tools put a whole state where it belongs, as an error says."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
    from torch.distributed.fsdp import fully_shard

    def begin() -> tuple[Any, Any]:
        torch.manual_seed(7)
        net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        fully_shard(net, mesh=mesh)
        return net, optim.AdamW(net.parameters(), lr=0.1)

    def step(net: Any, optimizer: Any) -> None:
        optimizer.zero_grad()
        (net(torch.ones(4, 5, dtype=torch.float64)) ** 2).mean().backward()
        optimizer.step()

    whole = StateDictOptions(full_state_dict=True)
    (net, optimizer), (again, other) = begin(), begin()
    for _ in range(2):
        step(net, optimizer)
    with torch.no_grad():
        for p, q in zip(net.parameters(), again.parameters()):
            q.copy_(p)
    set_optimizer_state_dict(again, other, get_optimizer_state_dict(net, optimizer, options=whole), options=whole)
    step(net, optimizer)
    step(again, other)
    return difference(*[[gathered(p.detach()) for p in n.parameters()] for n in (again, net)])


@case
def fsdp1(mesh: Any) -> list[str]:
    """Flat parameters do not know how they are spread: what must see whole ones is refused; what is elementwise is right."""
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    said = []
    for original in (False, True):
        torch.manual_seed(5)
        single = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        model = FSDP(copy.deepcopy(single), device_id=torch.device("cpu"), use_orig_params=original)
        wholes = (
            ps.chain(ps.clip_by_global_norm(1.0), ps.sgd(0.1)), ps.skip_if_nonfinite(ps.sgd(0.1)), ps.lamb(0.1),
            ps.quantize_state(ps.adamw(0.1), min_size=0),
        )  # fmt: skip
        said += [refusal(partial(optim.Optimizer, list(model.named_parameters()), t)) for t in wholes]
        a, b = (
            torch.optim.AdamW(single.parameters(), lr=0.1),
            optim.Optimizer(model.named_parameters(), ps.accumulate(ps.adamw(0.1), 1)),
        )
        x = torch.randn(4, 5, dtype=torch.float64)
        for _ in range(3):
            for net, optimizer in ((single, a), (model, b)):
                optimizer.zero_grad()
                (net(x) ** 2).mean().backward()
                optimizer.step()
        said.append(float((single(x) - model(x)).abs().max() / single(x).abs().max()))
    return said


# ------------------------------------------------------------------------------------------------------------- collectives


@case
def a_nan_on_another_process(mesh: Any) -> list[Any]:
    """All skip, whichever process has it."""
    x = torch.ones(4, 2)
    said = []
    for row in (0, 3):
        t = ps.skip_if_nonfinite(ps.sgd(0.1))
        p, g = spread(x, mesh), x.clone()
        g[row, 1] = math.nan
        p, state = t.step(spread(g, mesh), t.init_state(p), p)
        said += [bool(ps.finite([spread(g, mesh)])), float(state.skipped), difference(gathered(p), x)]
    return said


@case
def terms_of_a_sum(mesh: Any) -> float:
    """A gradient whose terms are spread is added up."""
    from torch.distributed.tensor import DTensor, Partial

    p = torch.randn(5, 3, dtype=torch.float64)
    g = DTensor.from_local(bowl(p) / mesh.size(), mesh, [Partial()], run_check=False)
    t = ps.chain(ps.clip_by_global_norm(0.1), ps.adamw(0.1))
    found = t.step(g, t.init_state(spread(p, mesh)), spread(p, mesh))[0]
    return difference(gathered(found), t.step(bowl(p), t.init_state(p), p)[0])


@case
def one_message_for_a_norm(mesh: Any) -> float:
    from torch.distributed.tensor.debug import CommDebugMode

    grads = [spread(torch.randn(5, 3), mesh) for _ in range(7)]
    with CommDebugMode() as counted:
        ps.global_norm(grads)
    return float(counted.get_total_counts() > 1)


@case
def derivatives(mesh: Any) -> float:
    """Where derivatives are recorded, they are those of the whole."""
    p = torch.randn(5, 3, dtype=torch.float64)

    def slope(place: Callable[[Tensor], Any]) -> Tensor:
        lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        x = place(p)
        for t in (ps.chain(ps.clip_by_global_norm(1.0), ps.adamw(lr)), ps.chain(ps.clip_by_norm(1.0), ps.sgd(lr))):
            state = t.init_state(x)
            for _ in range(2):
                x, state = t.step(bowl(x), state, x)
        loss = loss_of(x)
        return torch.autograd.grad(loss.full_tensor() if hasattr(loss, "full_tensor") else loss, lr)[0]

    return difference(slope(lambda x: spread(x, mesh)), slope(torch.clone))


@case
def lbfgs_and_hutchinson(mesh: Any) -> float:
    p = {"a": torch.randn(5, 3, dtype=torch.float64), "b": torch.randn(3, dtype=torch.float64)}

    def value_and_grad(q: Any) -> Any:
        values = [loss_of(x) for x in q.values()]
        return sum(x.full_tensor() if hasattr(x, "full_tensor") else x for x in values), {k: bowl(x) for k, x in q.items()}

    t = ps.lbfgs(max_iter=5)
    found = []
    for q in (p, spread_tree(p, mesh, "rows")):
        state = t.init_state(q)
        for _ in range(2):
            q, state = t.step({k: bowl(x) for k, x in q.items()}, state, q, value_and_grad=value_and_grad)
        found.append(gathered(q))
    return difference(found[1], found[0])


@case
def refused(mesh: Any) -> dict[str, str]:
    """What cannot be right, by name, and before anyone has sent anything: no process waits for another."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Partial, Shard

    other = DeviceMesh("cpu", [[k] for k in range(mesh.size())])
    x = torch.ones(4, 2)
    p = {"layer": {"w": spread(x, mesh)}}
    t = ps.chain(ps.clip_by_global_norm(1.0), ps.adamw(0.1))
    state = t.init_state(p)
    terms = DTensor.from_local(x, mesh, [Partial()], run_check=False)
    model = nn.Parameter(spread(x, mesh))
    saved = optim.AdamW([nn.Parameter(x.clone())])
    saved.param_groups[0]["params"][0].grad = x
    saved.step()
    loaded = optim.AdamW([("w", model)])
    loaded.load_state_dict(saved.state_dict())
    model.grad = spread(x, mesh)
    summands = nn.Parameter(terms)
    summands.grad, termed = terms, optim.AdamW([("w", summands)])
    tries: dict[str, Callable[[], Any]] = {
        "plain gradient": lambda: t.step({"layer": {"w": x}}, state, p),
        "sharded gradient": lambda: t.step(
            {"layer": {"w": spread(x, mesh)}}, t.init_state({"layer": {"w": x}}), {"layer": {"w": x}}
        ),
        "terms": lambda: t.step({"layer": {"w": terms}}, t.init_state({"layer": {"w": terms}}), {"layer": {"w": terms}}),
        "mesh": lambda: t.step(
            {"layer": {"w": DTensor.from_local(x[:2], other, [Shard(0), Shard(0)], run_check=False)}}, state, p
        ),
        "state": lambda: t.step({"layer": {"w": spread(x, mesh, 1)}}, t.init_state({"layer": {"w": spread(x, mesh, 1)}}), p),
        "loaded": loaded.step,
        "terms of an optimizer": termed.step,
        "hutchinson": lambda: ps.hutchinson(lambda q: loss_of(q["layer"]["w"]).full_tensor(), p),
    }
    return {name: refusal(attempt) for name, attempt in tries.items()}


def refusal(attempt: Callable[[], Any]) -> str:
    """What it is refused with."""
    try:
        attempt()
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


# ---------------------------------------------------------------------------------------------------------- all of the rest


def answer(function: Callable[..., Any], *args: Any) -> Any:
    """What a case returns, or the error it raises, as text."""
    try:
        return function(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}\n{traceback.format_exc()[-1500:]}"


def everything(rank: int, size: int, every: bool = True) -> Found:
    """What each process runs with ``-m long``."""
    from torch.distributed.device_mesh import init_device_mesh

    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (size,))
    return {**registry(mesh, every), **{name: answer(function, mesh) for name, function in FOUND.items()}}


def some(rank: int, size: int) -> Found:
    """What each process runs at every change."""
    return everything(rank, size, every=False)


def alone(rank: int, size: int) -> Found:
    """What a process runs that is by itself."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (size,))
    return {name: answer(function, mesh) for name, function in FOUND.items() if name in ALONE}


ALONE = (*CLASSES, "many_small", "fields_that_change_places", "fsdp2_adamw", "fsdp2_rmsprop", "fsdp2_clipped", "refused")


@pytest.fixture(scope="module", params=["some", pytest.param("everything", marks=pytest.mark.long)])
def answers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    return processes.run(2, f"tests.test_distributed:{request.param}", tmp_path_factory.mktemp("two"))


def near(found: Found, names: Iterable[str], most: float) -> None:
    assert not {name: x for name in names if not isinstance(x := found[name], float) or not x <= most}


def test_every_transform_is_right(answers: list[Found]) -> None:
    """On the rows of two processes, which are uneven, and mixed with columns and with plain tensors."""
    near(answers[0], [name for name in answers[0] if " " in name and not name.startswith("remembered")], 1e-11)


def test_every_class_is_torchs(answers: list[Found]) -> None:
    """Its numbers are those of torch's class on whole tensors: parameters and state, before and after a checkpoint."""
    near(answers[0], [name for name in answers[0] if name.split("-")[0] in CLASSES], EXACT)
    assert len(CLASSES) == 14


def test_many_small_ones(answers: list[Found]) -> None:
    near(answers[0], ["many_small"], EXACT)


@pytest.mark.parametrize("count", [3, 20])
@pytest.mark.parametrize("name", REMEMBERED)
def test_remembered_steps(answers: list[Found], name: str, count: int) -> None:
    """What the step cache takes for granted about sharded tensors is looked at in every step."""
    for each in answers:
        found = each[f"remembered {name}, {count}"]
        assert isinstance(found, dict), found
        assert found["cached"]
        assert re.match("TypeError: The gradient of '0' is a Tensor, but the parameter is a DTensor", found["a plain gradient"])
        assert re.match("TypeError: The state of '0' is a Tensor, but the parameter is a DTensor", found["a plain state"])
        numbers = {what: x for what, x in found.items() if what not in ("cached", "a plain gradient", "a plain state")}
        assert len(numbers) == 18
        near(numbers, numbers, EXACT)


@pytest.mark.parametrize("count", [3, 20])
@pytest.mark.parametrize("name", ["adamw", "lion", "nadam"])
def test_remembered_steps_of_functions(answers: list[Found], name: str, count: int) -> None:
    for each in answers:
        found = each[f"remembered steps {name}, {count}"]
        assert isinstance(found, dict), found
        assert found["cached"]
        assert re.match("TypeError: The gradient of '0' is a Tensor, but the parameter is", found["a plain gradient"])
        assert re.match(
            r"ValueError: The gradient of '0' has shape \(6, 3\), but the parameter has shape \(5, 3\)", found["another shape"]
        ), found["another shape"]
        numbers = {what: x for what, x in found.items() if isinstance(x, float)}
        assert len(numbers) == 12
        near(numbers, numbers, EXACT)


def test_leaf_by_leaf_after_remembered_steps(answers: list[Found]) -> None:
    assert [x["leaf_by_leaf_after_all"] for x in answers] == [3, 3]


def test_fields_that_change_places(answers: list[Found]) -> None:
    near(answers[0], ["fields_that_change_places"], EXACT)


def test_fsdp2(answers: list[Found]) -> None:
    """A layer of 700 x 900, each process with its own half of the batch, as one process with all of it."""
    near(answers[0], ["fsdp2_adamw", "fsdp2_rmsprop", "fsdp2_clipped", "two_dimensions", "checkpoints"], EXACT)
    near(answers[0], ["fsdp2_float32"], NEAR)


def test_fsdp1(answers: list[Found]) -> None:
    for original in range(2):
        *refused, right = answers[0]["fsdp1"][5 * original : 5 * original + 5]
        for name, text in zip(("clip_by_global_norm", "skip_if_nonfinite", "scale_by_trust_ratio", "scale_by_adam"), refused):
            assert re.match(
                rf"TypeError: {name} must see (all|whole) parameters, but '\S+' is a flat parameter .*fully_shard", text
            )
        assert right < EXACT


def test_all_processes_skip(answers: list[Found]) -> None:
    assert [x["a_nan_on_another_process"] for x in answers] == [[False, 1.0, 0.0] * 2] * 2


def test_numbers_of_all_parts(answers: list[Found]) -> None:
    near(answers[0], ["terms_of_a_sum", "one_message_for_a_norm", "derivatives", "lbfgs_and_hutchinson"], EXACT)


def test_processes_agree_to_the_last_bit(answers: list[Found]) -> None:
    one, other = ({name: x for name, x in found.items() if name != "refused"} for found in answers)
    assert one == other


def test_refusals(answers: list[Found]) -> None:
    """They name the parameter, what it is and what would do, and come before anything is sent: in each process."""
    for said in [x["refused"] for x in answers]:
        for name, text in {
            "plain gradient": r"TypeError: The gradient of 'layer.w' is a Tensor, but the parameter is a DTensor .*distribute_tensor",
            "sharded gradient": r"TypeError: The gradient of 'layer.w' is a DTensor .*, but the parameter is a Tensor. .*full_tensor",
            "terms": r"TypeError: The parameter 'layer.w' is a DTensor \(Partial.* redistribute",
            "mesh": r"ValueError: The gradient of 'layer.w' is spread over .* one mesh",
            "state": r"TypeError: The state of 'layer.w' is a DTensor \(Shard\(dim=1\)\), but .* Make a new state, or load",
            "terms of an optimizer": r"TypeError: The parameter 'w' is a DTensor \(Partial.* redistribute",
            "loaded": r"TypeError: The state of 'w' is a Tensor, but the parameter is a DTensor .*set_optimizer_state_dict",
            "hutchinson": r"TypeError: hutchinson takes whole tensors, but 'layer.w' is a DTensor .*full_tensor",
        }.items():
            assert re.match(text, said[name]), said[name]


def test_a_mesh_of_one_process(tmp_path: Path) -> None:
    (found,) = processes.run(1, "tests.test_distributed:alone", tmp_path)
    near(found, [name for name in ALONE if name != "refused"], EXACT)
    assert all(": The " in text or "hutchinson" in text for text in found["refused"].values()), found["refused"]


def test_a_process_that_fails_ends_the_others(tmp_path: Path) -> None:
    """The helper itself: no process is left, and what is said is what the one has said."""
    with pytest.raises(AssertionError, match="only the second"):
        processes.run(2, "tests.test_distributed:failing", tmp_path, seconds=60)


def failing(rank: int, size: int) -> None:
    if rank:
        raise RuntimeError("only the second")
    torch.distributed.barrier()
