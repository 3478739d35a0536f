"""Steps in several threads and processes at once."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import purestep as ps
from purestep import optim
from tests.cases import CASES, CLASSES, Case, each
from tests.problems import clone, grads

THREADS = 8
SECONDS = 100.0


def at_once(work: Callable[[int], Any], count: int = THREADS) -> list[Any]:
    """What `work` returns in several threads, which begin together."""
    barrier = threading.Barrier(count)

    def begin(i: int) -> Any:
        torch.set_num_threads(1)
        barrier.wait(SECONDS)
        return work(i)

    with ThreadPoolExecutor(count) as pool:
        return [future.result(timeout=SECONDS) for future in [pool.submit(begin, i) for i in range(count)]]


def same(a: Any, b: Any) -> bool:
    """Whether two trees have the same bits."""
    xs, ys = pytree.tree_leaves(a), pytree.tree_leaves(b)
    return len(xs) == len(ys) and all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(xs, ys))


@each()
def test_pure_steps_on_shared_inputs(case: Case) -> None:
    """The threads share a transform that has made no step, the parameters, the gradients and the first state."""
    params, loss = case.problem()
    params = {k: p for k, p in params.items() if case.treats(p)}
    g = {k: x for k, x in grads(loss, case.problem()[0]).items() if k in params}
    copies = clone((params, g))

    def steps(t: ps.Transform, state: Any) -> Any:
        p = params
        for _ in range(3):
            p, state = t.step(g, state, p)
        return p, state

    fresh = case.transform()
    state = fresh.init_state(params)
    found = at_once(lambda i: steps(fresh, state))
    serial = case.transform()
    expected = steps(serial, serial.init_state(params))
    assert all(same(x, expected) for x in found)
    assert same(copies, (params, g))


@pytest.mark.parametrize("whole", [False, True], ids=["kernels", "torch.compile"])
def test_compiled_steps(whole: bool) -> None:
    """Each thread meets a chain that nobody has compiled; all take turns with the compiler, and get the same bits."""
    params = {"w": torch.linspace(-1, 1, 4000).view(40, 100), "b": torch.linspace(0, 1, 7)}
    g = {k: torch.cos(3 * p) for k, p in params.items()}
    t = ps.chain(ps.clip_by_global_norm(1.0), ps.scale_by_lion(), ps.scale(-0.01))
    step = torch.compile(t.step) if whole else lambda *given: t.step(*given, compile=True)

    def steps(i: int) -> Any:
        p, state = params, t.init_state(params)
        for _ in range(3):
            p, state = step(g, state, p)
        return p, state

    found = at_once(steps)
    expected = steps(0)
    assert all(same(x, expected) for x in found)


@pytest.mark.parametrize("name", [x for x in CLASSES if x not in ("SparseAdam", "LBFGS")])
def test_optimizers_in_two_threads(name: str) -> None:
    """Each thread has an optimizer of its own."""

    def trained(i: int) -> Any:
        params = [nn.Parameter(torch.linspace(-1, 1 + i, n * n).view(n, n)) for n in (2, 3, 4)]
        optimizer = getattr(optim, name)(params, lr=0.01)
        for k in range(20):
            for p in params:
                p.grad = torch.cos(p.detach() + k)
            optimizer.step()
        return [p.detach() for p in params], [dict(optimizer.state[p]) for p in params]

    assert same(at_once(trained, 2), [trained(0), trained(1)])


def stepped() -> Any:
    """A few steps, of which programs, guards and kernels are kept."""
    params = {"w": torch.linspace(-1, 1, 12).view(3, 4), "b": torch.linspace(0, 1, 3)}
    found = []
    for case in CASES[:12]:
        t = case.transform()
        p, state = clone(params), t.init_state(params)
        for _ in range(4):
            p, state = t.step({k: torch.cos(x) for k, x in p.items()}, state, p, donate=True)
        found.append((case.name, p))
    weights = [nn.Parameter(x.clone()) for x in params.values()]
    optimizer = optim.AdamW(weights, lr=0.1)
    for _ in range(5):
        for x in weights:
            x.grad = torch.cos(x.detach())
        optimizer.step()
    return found, [x.detach() for x in weights]


def send(queue: Any) -> None:
    torch.set_num_threads(1)
    queue.put([x.tolist() for x in pytree.tree_leaves(stepped()) if isinstance(x, torch.Tensor)])


def check_process(start: str) -> None:
    """Another process, which begins after this one has made steps, makes the same."""
    expected = [x.tolist() for x in pytree.tree_leaves(stepped()) if isinstance(x, torch.Tensor)]
    context = torch.multiprocessing.get_context(start)
    queue = context.SimpleQueue()
    process = context.Process(target=send, args=(queue,))
    process.start()
    found = queue.get()
    process.join(SECONDS)
    assert process.exitcode == 0
    assert found == expected


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_another_process_after_steps(start: str) -> None:
    """A new interpreter forks, because threads may run in this one."""
    code = f"import torch; torch.set_num_threads(1); from tests.test_threads import check_process as f; f({start!r})"
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=root, timeout=SECONDS, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
