"""Muon on matrices that are spread over four processes: each is computed once, by its owner, and nothing else is different.

Four processes run everything once (`answers`). A case returns how far the sharded run is from the one on whole tensors.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import purestep as ps
from purestep import optim
from purestep._core import dealt, exchange
from tests import processes
from tests.problems import difference
from tests.test_distributed import answer, apart, gathered

SIZE = 4
SHAPES = {"a": (7, 5), "b": (7, 5), "wide": (3, 9), "c": (12, 4), "row": (1, 6), "d": (7, 5), "tall": (9, 2)}
LAYOUTS: dict[str, tuple[tuple[int, ...], str]] = {
    "rows": ((4,), "0"), "columns": ((4,), "1"), "copies": ((4,), "r"), "copies of rows": ((2, 2), "r0"),
    "rows of copies": ((2, 2), "0r"), "blocks": ((2, 2), "01"), "blocks, turned": ((2, 2), "10"), "rows twice": ((2, 2), "00"),
    "columns twice": ((2, 2), "11"), "one way": ((4, 1), "01"), "copies twice": ((2, 2), "rr"),
}  # fmt: skip
"""The shape of the mesh, and for each of its dimensions that of the matrix which it cuts, or "r"."""

BY_OWNERS: dict[str, Callable[[], ps.Transform]] = {
    "shampoo": lambda: ps.shampoo(0.1, 0.9), "soap": lambda: ps.soap(0.1, precondition_frequency=2),
    "galore": lambda: ps.galore(0.1, rank=2, update_proj_gap=2), "adafactor": lambda: ps.adafactor(0.1),
    "novograd": lambda: ps.novograd(0.1), "8 bits": lambda: ps.quantize_state(ps.adamw(0.1), min_size=1),
    "scheduled": lambda: ps.chain(ps.clip_by_global_norm(0.5), ps.shampoo(ps.schedules.linear(0.1, 0.0, total_steps=10))),
}  # fmt: skip
"""What must see a whole parameter with all of its state."""

BY_NORMS: dict[str, tuple[Callable[[], ps.Transform], int]] = {
    "lamb": (lambda: ps.lamb(0.1), 1), "lars": (lambda: ps.lars(0.1), 1), "fromage": (lambda: ps.fromage(0.1), 1),
    "clip_by_norm": (lambda: ps.chain(ps.clip_by_norm(0.1), ps.sgd(0.1)), 1),
    "clip_by_rms": (lambda: ps.chain(ps.clip_by_block_rms(0.1), ps.sgd(0.1)), 1),
    "two": (lambda: ps.chain(ps.scale_by_param_block_rms(), ps.normalize_by_block()), 2),
}  # fmt: skip
"""What must see the norm of each parameter, and so many messages."""

DECOMPOSITIONS = ("eigh", "qr", "svd")

MADE_OF_MATRICES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "experts": ({}, (8, 3, 5)), "uneven experts": ({}, (5, 3, 4)), "kernels": ({"flatten": True}, (6, 3, 2, 2)),
    "fused": ({"split": 3}, (9, 4)), "side by side": ({"split": 2, "dim": 1}, (5, 8)),
}  # fmt: skip
"""The arguments of `as_matrices`, and a shape."""

PROGRAMS: dict[str, Callable[[], ps.Transform]] = {
    "muon": lambda: ps.muon(0.1),
    "scaled": lambda: ps.chain(ps.clip_by_global_norm(0.5), ps.muon(0.1, nesterov=False, adjust_lr_fn="match_rms_adamw")),
    "nested": lambda: ps.lookahead(ps.muon(0.1, weight_decay=0.0), 2),
}


def placements(text: str) -> list[Any]:
    from torch.distributed.tensor import Replicate, Shard

    return [Replicate() if x == "r" else Shard(int(x)) for x in text]


def spread(tree: dict[str, Tensor], mesh: Any, text: str) -> dict[str, Any]:
    from torch.distributed.tensor import DTensor, Replicate

    whole = [Replicate()] * mesh.ndim
    made = {k: DTensor.from_local(x.clone(), mesh, whole, run_check=False) for k, x in tree.items()}
    return {k: x.redistribute(placements=placements(text)) for k, x in made.items()}


def values(step: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(step)
    return {k: torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for k, s in SHAPES.items()}


class Counted:
    """The messages and the matrices of one process."""

    def __init__(self) -> None:
        self.messages, self.sent, self.matrices = 0, 0, 0


@contextmanager
def counting() -> Iterator[Counted]:
    """Count what `dealt` sends, and the matrices that it computes."""
    counted, send, compute = Counted(), torch.distributed.all_to_all_single, dealt.in_stacks

    def sending(out: Tensor, given: Tensor, *args: Any, **kwargs: Any) -> Any:
        counted.messages += 1
        counted.sent += given.nbytes
        return send(out, given, *args, **kwargs)

    def computing(function: Any, xs: list[Tensor], *rest: Any) -> Any:
        counted.matrices += len(xs)
        return compute(function, xs, *rest)

    torch.distributed.all_to_all_single, dealt.in_stacks = sending, computing  # type: ignore[assignment]
    try:
        yield counted
    finally:
        torch.distributed.all_to_all_single, dealt.in_stacks = send, compute


def of_layout(name: str, layout: str, mode: str, dtype: torch.dtype) -> Any:
    """Three steps; the distance of parameters and state, and what was counted."""
    from torch.distributed.device_mesh import init_device_mesh

    sizes, text = LAYOUTS[layout]
    mesh, opt = init_device_mesh("cpu", sizes), PROGRAMS[name]()
    whole = values(0, dtype)
    parts = spread(whole, mesh, text)
    if mode == "wrapper":
        return of_wrapper(opt, whole, parts, mesh, text)
    state, held = opt.init_state(whole), opt.init_state(parts)
    with counting() as counted:
        for step in range(3):
            g = values(100 + step, dtype)
            sharded, before = spread(g, mesh, text), gathered(parts)
            whole, state = opt.step(g, state, whole)
            after, held = opt.step(sharded, held, parts, donate=mode == "donate")
            assert difference(gathered(sharded), g) == 0, "a gradient was written to"
            assert mode == "donate" or difference(gathered(parts), before) == 0, "a parameter was written to"
            assert mode != "donate" or all(after[k] is parts[k] for k in parts)
            parts = after
            assert all(p.placements == tuple(placements(text)) for p in parts.values())
    worst = max(difference(gathered(parts), whole), difference(gathered(held), state))
    return worst, counted.messages, counted.sent, counted.matrices


def of_wrapper(opt: ps.Transform, whole: Any, parts: Any, mesh: Any, text: str) -> Any:
    own, theirs = ({k: nn.Parameter(p) for k, p in tree.items()} for tree in (whole, parts))
    a, b = optim.Optimizer(list(own.items()), opt), optim.Optimizer(list(theirs.items()), opt)
    with counting() as counted:
        for step in range(3):
            g = values(100 + step, next(iter(own.values())).dtype)
            for p, x, q, y in zip(own.values(), g.values(), theirs.values(), spread(g, mesh, text).values()):
                p.grad, q.grad = x, y
            a.step()
            b.step()
    return apart(list(theirs.values()), list(own.values())), counted.messages, counted.sent, counted.matrices


def of_stacks(name: str, layout: str) -> Any:
    """Parameters that are made of matrices; two of them, beside a plain matrix that has an optimizer of its own."""
    from torch.distributed.device_mesh import init_device_mesh

    sizes, text = LAYOUTS[layout]
    kwargs, shape = MADE_OF_MATRICES[name]
    mesh, opt = init_device_mesh("cpu", sizes), ps.as_matrices(ps.muon(0.1), **kwargs)
    g = torch.Generator().manual_seed(9)
    whole = {k: torch.randn(shape, generator=g, dtype=torch.float64) for k in ("a", "b")}
    parts = spread(whole, mesh, text)
    state, held = opt.init_state(whole), opt.init_state(parts)
    with counting() as counted:
        for _ in range(3):
            grads = {k: torch.randn(shape, generator=g, dtype=torch.float64) for k in whole}
            whole, state = opt.step(grads, state, whole)
            parts, held = opt.step(spread(grads, mesh, text), held, parts, donate=True)
    return max(difference(gathered(parts), whole), difference(gathered(held), state)), counted.messages


@contextmanager
def decompositions() -> Iterator[list[str]]:
    """The names of the decompositions that this process computes, while a ``with`` lasts."""
    found: list[str] = []
    originals = {name: getattr(torch.linalg, name) for name in DECOMPOSITIONS}

    def noting(name: str) -> Callable[..., Any]:
        def decompose(*args: Any, **kwargs: Any) -> Any:
            found.append(name)
            return originals[name](*args, **kwargs)

        return decompose

    for name in DECOMPOSITIONS:
        setattr(torch.linalg, name, noting(name))
    try:
        yield found
    finally:
        for name, original in originals.items():
            setattr(torch.linalg, name, original)


def of_rows(name: str, layout: str, mode: str) -> Any:
    """Four steps of what owners compute: the distance, and how many decompositions whole and sharded parameters took."""
    from torch.distributed.device_mesh import init_device_mesh

    sizes, text = LAYOUTS[layout]
    mesh, opt, whole = init_device_mesh("cpu", sizes), BY_OWNERS[name](), values(0)
    if mode == "wrapper":
        return *of_wrapper(opt, whole, spread(whole, mesh, text), mesh, text)[:1], 0, 0
    parts = spread(whole, mesh, text)
    state, held = opt.init_state(whole), opt.init_state(parts)
    first = [x for x in ps.state_dict(held).values() if x.dim() and x.numel()]
    assert "r" in text or all(x.to_local().numel() < x.numel() for x in first if x.shape[0] > 1), "a state is not spread"
    counts = [0, 0]
    for step in range(4):
        g = values(100 + step)
        sharded, before = spread(g, mesh, text), gathered(parts)
        with decompositions() as found:
            whole, state = opt.step(g, state, whole)
        counts[0] += len(found)
        tensors = [x for x in tree_leaves([parts, held]) if isinstance(x, Tensor) and x.dim()]  # a state dict has copies
        versions = [(x, x._version) for x in tensors]
        with decompositions() as found, counting() as counted:
            after, held = opt.step(sharded, held, parts, donate=mode == "donate")
        counts[1] += len(found)
        if mode == "donate":
            still = [f"{type(x).__name__} {tuple(x.shape)}" for x, v in versions if x._version <= v]
            assert not still, f"versions that were not counted: {still}"
        assert difference(gathered(sharded), g) == 0, "a gradient was written to"
        assert mode == "donate" or difference(gathered(parts), before) == 0, "a parameter was written to"
        assert mode != "donate" or all(after[k] is parts[k] for k in parts)
        assert counted.messages == 2 * len(set(SHAPES.values()))
        parts = after
    return max(difference(gathered(parts), whole), difference(gathered(held), state)), *counts


def of_norms(name: str, layout: str, mode: str, dtype: torch.dtype) -> Any:
    """Four steps of what norms are enough for, also of vectors and numbers: the distance, and the messages of a step."""
    from torch.distributed.device_mesh import init_device_mesh

    (sizes, text), (make, _) = LAYOUTS[layout], BY_NORMS[name]
    mesh, opt = init_device_mesh("cpu", sizes), make()

    def all_of(step: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        whole = {**values(step, dtype), "vector": values(step, dtype)["a"][0], "number": values(step, dtype)["a"][0, 0]}
        parts = {
            k: spread({k: x}, mesh, text if x.dim() > 1 else "0r"[: mesh.ndim] if x.dim() else "rr"[: mesh.ndim])[k]
            for k, x in whole.items()
        }
        return whole, parts

    whole, parts = all_of(0)
    state, held = opt.init_state(whole), opt.init_state(parts)
    reduce, messages = torch.distributed.all_reduce, []

    def reducing(*args: Any, **kwargs: Any) -> Any:
        messages.append(args)
        return reduce(*args, **kwargs)

    for step in range(4):
        g, sharded = all_of(100 + step)
        whole, state = opt.step(g, state, whole)
        torch.distributed.all_reduce = reducing  # type: ignore[assignment]
        try:
            with counting() as counted:
                parts, held = opt.step(sharded, held, parts, donate=mode == "donate")
        finally:
            torch.distributed.all_reduce = reduce  # type: ignore[assignment]
        assert not counted.messages, "something was sent to owners"
    return max(difference(gathered(parts), whole), difference(gathered(held), state)), len(messages) / 4


class Fails(Exception):
    pass


@ps.operation
def brittle(u: Tensor) -> Tensor:
    if u.shape == SHAPES["wide"]:
        raise Fails("it is too wide")
    return u.flip(0)


@ps.leafwise()
def brittle_flip(u: Tensor, p: Tensor) -> Tensor:
    return brittle(u)


class LongState(NamedTuple):
    history: Annotated[Tensor, "one more row at each step"]

    @classmethod
    def init(cls, p: Tensor) -> LongState:
        return cls(torch.zeros(1, 2, dtype=p.dtype))


@ps.operation
def longer(history: Tensor, g: Tensor) -> Tensor:
    return torch.cat([history, g.new_ones(1, 2)])


@ps.leafwise(LongState)
def with_history(g: Tensor, s: LongState, p: Tensor) -> tuple[Tensor, LongState]:
    return g, LongState(longer(s.history, g))


def of_failures() -> dict[str, Any]:
    """What each process says where the owner of one parameter fails; and whether the next step is right."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh, found = init_device_mesh("cpu", (4,)), {}
    for name, opt in (("fails", ps.chain(ps.trace(0.9), brittle_flip())), ("grows", with_history())):
        parts = spread(values(0), mesh, "0")
        held = opt.init_state(parts)
        before = gathered([parts, held])
        for donate in (False, True):
            try:
                opt.step(spread(values(1), mesh, "0"), held, parts, donate=donate)
            except Exception as error:
                found[f"{name} {donate}"] = f"{type(error).__name__}: {error}"
            assert difference(gathered([parts, held]), before) == 0, "something was written"
    without = {k: x for k, x in values(0).items() if k != "wide"}
    opt = ps.chain(ps.trace(0.9), brittle_flip())
    p, _ = opt.step({k: values(1)[k] for k in without}, opt.init_state(without), without)
    parts = spread(without, mesh, "0")
    q, _ = opt.step(spread({k: values(1)[k] for k in without}, mesh, "0"), opt.init_state(parts), parts)
    found["next"] = difference(gathered(q), p)
    state = with_history().init_state(parts)
    _, state = with_history().step(spread(without, mesh, "0"), state, parts, executor="leaf")
    found["leaf"] = tuple(state.history["a"].shape)
    return found


def of_disagreements() -> dict[str, str]:
    """Processes with different parameters, and parameters of different processes: what each says."""
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

    mesh, rank, found = init_device_mesh("cpu", (4,)), torch.distributed.get_rank(), {}

    def attempt(name: str, function: Callable[[], Any]) -> None:
        try:
            function()
            found[name] = "nothing"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"

    def steps(names: list[str], t: ps.Transform, change: Callable[[dict[str, Any]], Any] = lambda parts: None) -> None:
        whole, grads = ({**x, "vector": x["a"][0]} for x in (values(0), values(1)))
        parts = {k: nn.Parameter(x) for k, x in spread({k: whole[k] for k in names}, mesh, "0").items()}
        optimizer = optim.Optimizer(list(parts.items()), t)
        for k, p in parts.items():
            p.grad = spread({k: grads[k]}, mesh, "0")[k]
        change(parts)
        before = [p.to_local().detach().clone() for p in parts.values()]
        try:
            optimizer.step()
        except ValueError:
            assert difference([p.to_local().detach() for p in parts.values()], before) == 0.0
            raise

    def forget(parts: dict[str, Any]) -> None:
        if rank == 1:
            parts["b"].grad = None

    fewer = ["a", "wide", "c"][: 2 if rank == 2 else 3]
    for name, t in (("muon", ps.muon(0.1)), ("norm", ps.clip_by_global_norm(1.0)), ("lamb", ps.lamb(0.1))):
        attempt(f"fewer parameters, {name}", lambda t=t: steps(fewer, t))  # type: ignore[misc]
    attempt("fewer parameters, sm3", lambda: steps(["vector", *fewer], ps.sm3(0.1)))  # of a vector elementwise
    attempt("fewer gradients", lambda: steps(["a", "b"], ps.muon(0.1), forget))
    attempt("another order", lambda: steps(["a", "b"] if rank else ["b", "a"], ps.muon(0.1)))
    attempt("another shape", lambda: steps(["a", "wide"], ps.muon(0.1)))
    attempt("elementwise", lambda: steps(["a", "b"][: 1 + (rank == 0)], ps.lion(0.1)))
    other = DeviceMesh("cpu", [0, 1])
    mixed = {**spread({"a": values(0)["a"]}, mesh, "0"), **spread({"c": values(0)["c"]}, other, "0")}
    t = ps.chain(ps.clip_by_global_norm(1.0), ps.sgd(0.1))
    found["two meshes"] = ""
    if rank > 1:  # the others would wait for these
        attempt("two meshes", lambda: t.step(mixed, t.init_state(mixed), mixed))
    held = {k: nn.Parameter(x) for k, x in mixed.items()}
    optimizer = optim.Optimizer(list(held.items()), t)
    for p in held.values():
        p.grad = p.detach()
    attempt("two meshes, wrapped", optimizer.step)
    attempt("two meshes, elementwise", lambda: ps.sgd(0.1).step(mixed, ps.sgd(0.1).init_state(mixed), mixed))
    return found


@ps.operation(like=True, stacks=True)
def unit(x: Tensor, k: Any = 1.0) -> Tensor:
    return k * x / torch.linalg.vector_norm(x, dim=(-2, -1) if x.ndim > 1 else -1, keepdim=True)


@ps.operation(single=True, shapes=True)
def rows(p: Tensor) -> float:
    return float(p.shape[0])


@ps.leafwise()
def united(u: Tensor, p: Tensor) -> Tensor:
    return unit(u)


@ps.leafwise()
def united_by_rows(u: Tensor, p: Tensor) -> Tensor:
    return unit(u, rows(p))


def of_operations() -> dict[str, float]:
    """What cannot be dealt out is computed in full: complex parameters, vectors, numbers for each of them."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh, found = init_device_mesh("cpu", (4,)), {}
    real, complex_ = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 3, dtype=torch.complex128)
    for name, opt, tree in (
        ("complex", ps.chain(ps.scale_by_adam(), united()), {"w": complex_}),
        ("vectors", united(), {"w": real, "b": real[:, 0].contiguous()}),
        ("numbers", united_by_rows(), {"w": real}),
    ):
        parts = spread(tree, mesh, "0")
        u, state = opt.update(tree, opt.init_state(tree), tree)
        v, held = opt.update(parts, opt.init_state(parts), parts)
        found[name] = max(difference(gathered(v), u), difference(gathered(held), state))
    return found


def network() -> nn.Sequential:
    torch.manual_seed(6)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def under_fsdp2(kind: str) -> float:
    """Muon and AdamW in one optimizer: rows, copies of rows, and beside tensor parallelism."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    parts = {"matrices": ps.muon(0.1), "rest": ps.adamw(0.01)}
    t = ps.chain(ps.clip_by_global_norm(0.01), ps.partition(parts, ps.by_ndim({2: "matrices"}, default="rest")))
    single, model = network(), network()
    if kind == "rows":
        mesh = data = init_device_mesh("cpu", (4,))
    else:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
        data = mesh["outer"] if kind == "tensor" else mesh
    if kind == "tensor":
        parallelize_module(model, mesh["inner"], {"0": ColwiseParallel(), "2": RowwiseParallel(), "4": ColwiseParallel()})
    fully_shard(model, mesh=data)
    optimizers = [optim.Optimizer(net.named_parameters(), t) for net in (single, model)]
    g = torch.Generator().manual_seed(8)
    with counting() as counted:
        for _ in range(3):
            for p, q in zip(single.parameters(), model.parameters()):
                p.grad = torch.randn(p.shape, generator=g, dtype=p.dtype)
                q.grad = dealt_like(p.grad, q)
            for optimizer in optimizers:
                optimizer.step()
    assert counted.messages > 0, "no matrix was dealt out"
    # part by part: to gather parameters that are uneven and strided is a fault of torch's in 2.9
    parts = [
        exchange.part(p.detach(), exchange.layout_of(q).blocks[dealt_place(q)])
        for p, q in zip(single.parameters(), model.parameters())
    ]
    return difference([q.to_local().detach() for q in model.parameters()], parts)


def dealt_like(x: Tensor, like: Any) -> Any:
    """A tensor, spread as another: the part of it that the layout says, which is what torch has in its own."""
    block = exchange.layout_of(like).blocks[dealt_place(like)]
    part = exchange.part(x, block).clone()
    assert part.shape == like.to_local().shape, f"{like.placements} of {tuple(like.shape)}: {block}"
    return type(like).from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )  # fmt: skip


def dealt_place(x: Any) -> int:
    return int(x.device_mesh.mesh.flatten().tolist().index(torch.distributed.get_rank()))


def layouts_are_torchs() -> str:
    """The part of every tensor that the layout says each process has is the one that it has."""
    from torch.distributed.device_mesh import init_device_mesh

    for sizes, text in LAYOUTS.values():
        mesh = init_device_mesh("cpu", sizes)
        for rows, columns in itertools.product((1, 2, 3, 5, 8, 9), repeat=2):
            x = torch.arange(rows * columns, dtype=torch.float64).view(rows, columns)
            y = spread({"x": x}, mesh, text)["x"]
            mine = exchange.part(x, exchange.layout_of(y).blocks[dealt_place(y)])
            assert torch.equal(mine, y.to_local()), (text, rows, columns)
    return "right"


def on_some_processes() -> Any:
    """A mesh of two of them: the others have no part in it, and do not wait."""
    from torch.distributed.device_mesh import DeviceMesh

    mesh = DeviceMesh("cpu", [1, 3])
    if mesh.get_coordinate() is None:
        return None
    whole, opt = values(0), ps.muon(0.1)
    parts = spread(whole, mesh, "0")
    p, _ = opt.step(values(1), opt.init_state(whole), whole)
    q, _ = opt.step(spread(values(1), mesh, "0"), opt.init_state(parts), parts)
    return difference(gathered(q), p)


def a_derivative() -> float:
    """Recorded by autograd, in full."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (4,))
    found = []
    for tree in (values(0), spread(values(0), mesh, "0")):
        lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        opt = ps.muon(lr)
        p, _ = opt.step(
            values(1) if tree["a"].__class__ is Tensor else spread(values(1), mesh, "0"), opt.init_state(tree), tree
        )
        total = sum((x.full_tensor() if hasattr(x, "full_tensor") else x).pow(2).sum() for x in p.values())
        found.append(torch.autograd.grad(total, lr)[0])
    return difference(found[1], found[0])


MODES = ("pure", "donate", "wrapper")


def some(rank: int, size: int) -> dict[str, Any]:
    """What is run at every change: each program in each layout, in one mode, in turn."""
    places = itertools.product(enumerate(LAYOUTS), enumerate(PROGRAMS))
    return all_of([(layout, name, MODES[(i + j) % len(MODES)]) for (i, layout), (j, name) in places])


def everything(rank: int, size: int) -> dict[str, Any]:
    """With ``-m long``: in every mode."""
    return all_of(list(itertools.product(LAYOUTS, PROGRAMS, MODES)))


def all_of(programs: list[tuple[str, str, str]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for layout, name, mode in programs:
        found[f"{layout}: {name} {mode}"] = answer(of_layout, name, layout, mode, torch.float64)
    for dtype in (torch.float32, torch.bfloat16):
        found[f"{dtype}"] = answer(of_layout, "muon", "blocks", "donate", dtype)
    for kind in ("rows", "copies", "tensor"):
        found[f"fsdp2 {kind}"] = answer(under_fsdp2, kind)
    for name, layout in itertools.product(MADE_OF_MATRICES, ("rows", "columns", "copies of rows", "blocks")):
        found[f"{name}, {layout}"] = answer(of_stacks, name, layout)
    modes = itertools.cycle(MODES)  # each of them with each of the names, and with each of the layouts
    for name, layout in itertools.product(BY_OWNERS, ("rows", "columns", "copies of rows", "blocks")):
        mode = next(modes)
        found[f"owners of {layout}, {name}, {mode}"] = answer(of_rows, name, layout, mode)
    kinds = itertools.cycle(itertools.product(("pure", "donate"), (torch.float64, torch.float32)))
    for layout, name in itertools.product(("rows", "columns", "copies", "blocks"), BY_NORMS):
        mode, dtype = next(kinds)
        found[f"norms, {layout}, {name}, {mode}, {dtype}"] = answer(of_norms, name, layout, mode, dtype)
    for function in (of_failures, of_disagreements, layouts_are_torchs, on_some_processes, a_derivative, of_operations):
        found[function.__name__] = answer(function)
    return found


@pytest.fixture(scope="module", params=["some", pytest.param("everything", marks=pytest.mark.long)])
def answers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return processes.run(SIZE, f"tests.test_dealt:{request.param}", tmp_path_factory.mktemp("four"))


def runs(answers: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [x[name] for x in answers] for name in answers[0] if ": " in name}


def test_numbers_are_those_of_whole_matrices(answers: list[dict[str, Any]]) -> None:
    wrong = {name: x for name, each in runs(answers).items() for x in each if isinstance(x, str) or x[0] > 1e-12}
    assert not wrong
    for dtype, most in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        assert all(not isinstance(x := found[f"{dtype}"], str) and x[0] <= most for found in answers), answers[0][f"{dtype}"]


def test_each_matrix_is_computed_once(answers: list[dict[str, Any]]) -> None:
    for name, each in runs(answers).items():
        assert sum(x[3] for x in each) == 3 * len(SHAPES), name


def test_two_messages_for_each_shape(answers: list[dict[str, Any]]) -> None:
    kinds = len(set(SHAPES.values()))
    for name, each in runs(answers).items():
        assert {x[1] for x in each} == {3 * 2 * kinds}, name


def test_bytes_that_are_sent(answers: list[dict[str, Any]]) -> None:
    """A step brings each matrix to its owner, and from there to each copy: twice its bytes where there is one copy.

    And each owner tells each process, once for each shape, that it has not failed.
    """
    matrices = 8 * sum(map(math.prod, SHAPES.values()))
    answers_of_owners = 8 * SIZE**2 * len(set(SHAPES.values()))
    for name, each in runs(answers).items():
        layout = name.split(":")[0]
        sizes, text = LAYOUTS[layout]
        copies = math.prod(n for n, kind in zip(sizes, text) if kind == "r")
        assert sum(x[2] for x in each) == 3 * (matrices * (1 + copies) + answers_of_owners), name


@pytest.mark.parametrize("kind", ["rows", "copies", "tensor"])
def test_fsdp2(answers: list[dict[str, Any]], kind: str) -> None:
    for found in answers:
        x = found[f"fsdp2 {kind}"]
        assert not isinstance(x, str), x
        assert x < 1e-12


@pytest.mark.parametrize("name", MADE_OF_MATRICES)
def test_stacks_of_matrices(answers: list[dict[str, Any]], name: str) -> None:
    for found in answers:
        for layout in ("rows", "columns", "copies of rows", "blocks"):
            x = found[f"{name}, {layout}"]
            assert not isinstance(x, str), x
            assert x[0] < 1e-12, layout
            if "experts" in name:  # those that are sharded by expert are computed where they are
                assert (x[1] == 0) is (layout == "rows"), layout


@pytest.mark.parametrize("name", BY_OWNERS)
def test_each_parameter_is_computed_by_its_owner(answers: list[dict[str, Any]], name: str) -> None:
    for key in [k for k in answers[0] if k.startswith("owners of ") and k.split(", ")[1] == name]:
        each = [found[key] for found in answers]
        assert not any(isinstance(x, str) for x in each), each
        assert max(x[0] for x in each) <= 1e-12, key
        assert sum(x[2] for x in each) == each[0][1], key  # decompositions, over all processes: as many as in one
        if name in ("shampoo", "soap", "galore") and "wrapper" not in key:
            assert max(x[2] for x in each) < each[0][1]


@pytest.mark.parametrize("name", BY_NORMS)
def test_norms_of_each_parameter(answers: list[dict[str, Any]], name: str) -> None:
    """One message for those of all parameters of a mesh that are spread alike."""
    for key in [k for k in answers[0] if k.startswith("norms, ") and k.split(", ")[2] == name]:
        for found in answers:
            x = found[key]
            assert not isinstance(x, str), x
            assert x[0] <= (1e-12 if "float64" in key else 1e-6), key
            kinds = {"rows": 1, "columns": 1, "blocks": 2, "copies": 1}[key.split(", ")[1]]  # the vector is copied along one
            assert x[1] == kinds * BY_NORMS[name][1], key


def test_a_failure_of_one_owner_ends_all(answers: list[dict[str, Any]]) -> None:
    found = [x["of_failures"] for x in answers]
    assert all(isinstance(x, dict) for x in found), found
    for donate in (False, True):
        said = [x[f"fails {donate}"] for x in found]
        (owner,) = [k for k, text in enumerate(said) if text == "Fails: it is too wide"]
        assert all(f"RuntimeError: Process {owner} could not compute" in text for k, text in enumerate(said) if k != owner), (
            said
        )
        grown = [x[f"grows {donate}"] for x in found]
        assert all(re.search("Error: .*(keep shapes and dtypes|could not compute|shape)", text) for text in grown), grown
    assert [x["next"] for x in found] == [0.0] * SIZE
    assert {x["leaf"] for x in found} == {(2, 2)}


def test_processes_that_do_not_agree(answers: list[dict[str, Any]]) -> None:
    """Each process says the same, before anything is sent that another does not wait for."""
    found = [x["of_disagreements"] for x in answers]
    assert all(isinstance(x, dict) for x in found), found
    said = found[0]  # of functions, only those processes say so that lack something: the others have what they need
    assert all({**x, "two meshes": ""} == {**said, "two meshes": ""} for x in found), found
    for name in ("muon", "norm", "lamb", "sm3"):
        assert re.match(
            "ValueError: All processes must make the same step, or they wait for each other, but process 0 makes it with "
            "'c', and process 2 without. Every process needs the same parameters",
            said[f"fewer parameters, {name}"],
        ), said
    assert "but process 0 makes it with 'b', and process 1 without" in said["fewer gradients"]
    assert "but their order differs" in said["another order"]
    meshes = "clip_by_global_norm must see all parameters, but 'c' is spread over the processes [0, 1], and process {} is none"
    assert meshes.format(2) in said["two meshes, wrapped"]
    assert [meshes.format(rank) in x["two meshes"] for rank, x in enumerate(found)] == [False, False, True, True], found
    assert {said[k] for k in ("another shape", "elementwise", "two meshes, elementwise")} == {"nothing"}


def test_layouts(answers: list[dict[str, Any]]) -> None:
    assert {x["layouts_are_torchs"] for x in answers} == {"right"}


def test_other_cases(answers: list[dict[str, Any]]) -> None:
    assert [x["on_some_processes"] for x in answers] == [None, 0.0, None, 0.0]
    assert all(isinstance(x["a_derivative"], float) and x["a_derivative"] < 1e-9 for x in answers), answers[0]["a_derivative"]
    assert all(max(x["of_operations"].values()) < 1e-12 for x in answers), answers[0]["of_operations"]


def the_page(rank: int, size: int) -> list[str]:
    """What docs/distributed.md shows, from the first line to the last."""
    blocks = re.findall(r"^```py\n(.*?)^```", (processes.ROOT / "docs/distributed.md").read_text(), re.MULTILINE | re.DOTALL)
    space: dict[str, Any] = {"__name__": "distributed"}
    for text in blocks:
        exec(compile(text, "distributed.md", "exec", dont_inherit=True), space)
    return [type(p).__name__ for p in space["model"].parameters()]


def test_the_page_runs(tmp_path: Path) -> None:
    assert processes.run(1, "tests.test_dealt:the_page", tmp_path) == [["DTensor"] * 4]


GPT2 = [(768, 2304), (768, 768), (768, 3072), (3072, 768)] * 12
LLAMA = [(4096, 4096)] * 4 * 32 + [(4096, 11008)] * 3 * 32
MIXTURE = [(8, 1024, 2816)] * 2 * 16 + [(8, 2816, 1024)] * 16 + [(1024, 1024)] * 4 * 16


@pytest.mark.parametrize("processes", [2, 4, 8])
@pytest.mark.parametrize("shapes", [GPT2, LLAMA, MIXTURE], ids=["gpt2", "llama", "mixture"])
def test_owners_have_about_as_much_to_do(shapes: list[tuple[int, ...]], processes: int) -> None:
    costs = list(map(dealt.cost, shapes))
    owner = dealt.owners(costs, processes)
    loads = [sum(c for c, o in zip(costs, owner) if o == k) for k in range(processes)]
    assert max(loads) <= 1.2 * sum(loads) / processes
