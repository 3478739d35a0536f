"""How many kernels a step launches on a device, and how often it waits for one: the table of docs/reliability.md.

    python -m benchmarks.launches           # prints it
    python -m benchmarks.launches --write   # writes it into the page

Nothing is measured: operations are counted on a device that is none (`tests.pretend_device`), for each transform of the tests'
registry under its first options. The parameters are ten layers of a matrix and a vector, or ten matrices for what takes
nothing else.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import plan
from purestep import optim
from tests import pretend_device
from tests.cases import CASES, Case

PAGE = Path(__file__).parent.parent / "docs" / "reliability.md"
NAME, COMMAND = "launches", "benchmarks.launches --write"
LAYERS, WIDTH, STEPS = 10, 32, 4


class Count(NamedTuple):
    """What a step does on a device."""

    launches: int
    waits: int
    memory: float  # the most that it needs beyond what was there before, over the size of the parameters


def tensors(case: Case) -> list[Tensor]:
    """The parameters of a case, or gradients for them."""
    found = [torch.randn(shape) for _ in range(LAYERS) for shape in ((WIDTH, WIDTH), (WIDTH,))]
    return [pretend_device.put(p) for p in found if case.treats(p)]


def last(step: Callable[[], None], params: list[Tensor]) -> Count:
    """Count the last one of some steps."""
    for _ in range(STEPS - 1):
        step()
    before = pretend_device.device.live
    with pretend_device.watched(strict=False) as found:
        step()
    taken, size = pretend_device.device.peak - before, sum(p.nbytes for p in params)
    return Count(sum(found.values()), len(pretend_device.device.waits), taken / size)


def of_pure_steps(case: Case) -> Count:
    """Donated steps."""
    torch.manual_seed(0)
    transform, params, grads = case.transform(), tensors(case), tensors(case)
    params, grads = ({str(k): x for k, x in enumerate(xs)} for xs in (params, grads))
    state = transform.init_state(params)

    def step() -> None:
        nonlocal params, state
        params, state = transform.step(grads, state, params, donate=True)

    return last(step, list(params.values()))


def of_optimizer(case: Case, make: Callable[..., torch.optim.Optimizer]) -> Count:
    """Steps of an optimizer."""
    torch.manual_seed(0)
    params = [nn.Parameter(p) for p in tensors(case)]
    for p, g in zip(params, tensors(case)):
        p.grad = g
    optimizer = make(params)
    return last(lambda: optimizer.step() and None, params)


def row(case: Case) -> list[str]:
    """A transform's row."""
    found: list[Count | None] = [of_pure_steps(case), None, None, None]
    transform = case.transform()
    if hasattr(transform, "plan") and not transform.plan.extras and type(transform).__name__ != "Given":
        found[1] = of_optimizer(case, lambda params: optim.Optimizer(params, transform))
    cls = None if case.twin is None else getattr(torch.optim, case.twin.__name__)
    if cls is not None:
        accepted, options = inspect.signature(cls).parameters, dict(case.options[0])
        for k, flag in ((2, "foreach"), (3, "fused")):
            if flag in accepted:
                flags = {flag: True, **({"capturable": True} if "capturable" in accepted and flag == "foreach" else {})}
                found[k] = of_optimizer(case, lambda params, flags=flags: cls(params, **options, **flags))
    cells = ["" if x is None else str(x.launches) for x in found]
    pure = found[0]
    assert pure is not None
    return [f"`{case.name}`", *cells, str(pure.waits or ""), f"{pure.memory:.2f}"]


def table() -> str:
    """The table, with the device made if it is not there yet."""
    pretend_device.install()
    head = ["", "a donated step", "an optimizer", "torch, foreach", "torch, fused", "waits", "new memory"]
    return plan.markdown(head, [row(case) for case in CASES])


def main() -> None:
    parser = argparse.ArgumentParser(description="The table of docs/reliability.md.")
    parser.add_argument("--write", action="store_true", help="write it into the page")
    if not parser.parse_args().write:
        print(table())
        return
    PAGE.write_text(plan.put(PAGE.read_text(), NAME, table(), COMMAND))


if __name__ == "__main__":
    main()
