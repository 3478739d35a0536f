"""Wrong calls, one for each message that purestep raises: those about sharded parameters.

They are made in one process that takes itself for the first of two. The other is pretended: torch's "fake" processes answer
nothing, and two functions here answer for one. `tests/test_dealt.py` has the same errors from true processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import purestep as ps
from tests.error_cases import Mean

X = torch.ones(4, 2)


@contextmanager
def first_of_two() -> Iterator[Any]:
    """A mesh of two processes, of which this is the first."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        yield init_device_mesh("cpu", (2,))
    finally:
        torch.distributed.destroy_process_group()


def spread(x: Tensor, mesh: Any, dim: int = 0) -> Any:
    """A tensor of which this process has the first half."""
    from torch.distributed.tensor import DTensor, Shard

    return DTensor.from_local(x.chunk(2, dim)[0].clone(), mesh, [Shard(dim)], run_check=False)


def terms(x: Tensor, mesh: Any) -> Any:
    from torch.distributed.tensor import DTensor, Partial

    return DTensor.from_local(x, mesh, [Partial()], run_check=False)


def of_the_second(x: Tensor) -> Any:
    """A tensor of which this process has no part."""
    from torch.distributed.device_mesh import DeviceMesh

    return spread(x, DeviceMesh("cpu", [1]))


def on_two_dimensions(x: Tensor) -> Any:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    return DTensor.from_local(x[:2], DeviceMesh("cpu", [[0], [1]]), [Shard(0), Shard(0)], run_check=False)


def step(g: Any, p: Any, of: Any = None, t: ps.Transform | None = None) -> Any:
    """A step of one parameter, from the first state or from that of another."""
    t = t or ps.adamw(0.1)
    return t.step({"w": g}, t.init_state({"w": p if of is None else of}), {"w": p})


def mesh(call: Callable[[Any], Any]) -> Callable[[], Any]:
    """A case with a mesh."""

    def case() -> Any:
        with first_of_two() as found:
            return call(found)

    return case


@ps.operation
def twice(x: Tensor) -> Tensor:
    return torch.cat([x, x])


@ps.leafwise(Mean)
def growing(g: Tensor, s: Mean, p: Tensor) -> tuple[Tensor, Mean]:
    return g, Mean(twice(s.exp_avg))


def optimizer_step(t: ps.Transform, *params: Any) -> Any:
    named = [(name, torch.nn.Parameter(p)) for name, p in zip("ab", params)]
    optimizer = ps.optim.Optimizer(named, t)
    for _, p in named:
        p.grad = p.detach().clone()
    return optimizer.step()


def failing(m: Any) -> Any:
    """A step in which the second process says that it has failed: the first of the numbers that it sends is not 0."""
    send = torch.distributed.all_to_all_single

    def answered(received: Tensor, sent: Tensor, counts: list[int], *rest: Any, **options: Any) -> Any:
        work = send(received, sent, counts, *rest, **options)
        received[sum(counts[:1]) :] = 1
        return work

    with mock.patch("torch.distributed.all_to_all_single", answered):
        return step(spread(X, m), spread(X, m), t=ps.muon())


def disagreeing(m: Any, change: Callable[[dict[str, str]], dict[str, str]]) -> Any:
    """A step of two parameters in which the second process has others."""

    def gather(found: list[Any], mine: list[Any], **options: Any) -> None:
        found[:] = [mine, [(1, change(mine[0][1]), None)]]

    with (
        mock.patch("torch.distributed.all_reduce", lambda x, *rest, **options: x[:1].add_(1)),
        mock.patch("torch.distributed.all_gather_object", gather),
    ):
        return optimizer_step(ps.muon(), spread(X, m), spread(X, m))


CASES: dict[str, Callable[[], Any]] = {
    "another process that fails": mesh(failing),
    "another process with fewer parameters": mesh(lambda m: disagreeing(m, lambda names: {"a": names["a"]})),
    "another process with more parameters": mesh(lambda m: disagreeing(m, lambda names: {**names, "c": names["a"]})),
    "another process with another order": mesh(lambda m: disagreeing(m, lambda names: dict(reversed(names.items())))),
    "another process with another shape": mesh(
        lambda m: disagreeing(m, lambda names: {**names, "b": "(9, 9) (Shard(dim=0),)"})
    ),
    "a state that grows": mesh(lambda m: step(spread(X, m), spread(X, m), t=growing())),
    "a parameter of terms": mesh(lambda m: step(terms(X, m), terms(X, m))),
    "a plain gradient of a sharded parameter": mesh(lambda m: step(X, spread(X, m))),
    "a sharded gradient of a plain parameter": mesh(lambda m: step(spread(X, m), X)),
    "a gradient on another mesh": mesh(lambda m: step(on_two_dimensions(X), spread(X, m))),
    "a state that is spread otherwise": mesh(lambda m: step(spread(X, m), spread(X, m), spread(X, m, 1))),
    "a plain state of a sharded parameter": mesh(lambda m: step(spread(X, m), spread(X, m), X)),
    "all parameters, of which one is another process's": mesh(
        lambda m: step(of_the_second(X), of_the_second(X), t=ps.clip_by_global_norm(1.0))
    ),
    "all parameters of an optimizer, of which one is another process's": mesh(
        lambda m: optimizer_step(ps.clip_by_global_norm(1.0), of_the_second(X))
    ),
    "hutchinson of sharded parameters": mesh(lambda m: ps.hutchinson(lambda q: q["w"].sum(), {"w": spread(X, m)})),
}
