"""Which executor runs which parameters, and why: what `Transform.explain` and `Optimizer.explain` return."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from purestep._core import maths
from purestep._core.plain import PLAIN
from purestep._core.torch_api import tree_leaves, tree_map
from purestep._executors.flat_buffer import COUNT, SIZE
from purestep._executors.task import ASKED, WATCH, Decided, Task


@dataclass(frozen=True)
class Part:
    """Some of the parameters, and how some consecutive transforms are run on them."""

    transforms: str
    """The names of the transforms, in order."""
    executor: str
    """The name of the executor; ``"whole"`` is the function of a whole transform."""
    count: int
    """How many parameters."""
    numel: int
    """How many elements they have together."""
    dtype: torch.dtype
    device: torch.device
    nested: bool = False
    """Whether the executor of the part before runs this one, in memory of its own."""
    declined: dict[str, str] = field(default_factory=dict)
    """The executors that were asked before, and why each declined."""


@dataclass(frozen=True)
class Explanation:
    """How a step is run. It prints as a table, with the reasons below.

    >>> import torch, purestep as ps
    >>> opt = ps.chain(ps.clip_by_global_norm(1.0), ps.nadam(1e-3))
    >>> params = {"w": torch.ones(30, 20), "b": torch.ones(20)}
    >>> explanation = opt.explain(params, opt.init_state(params), params)
    >>> [part.executor for part in explanation.parts]
    ['whole', 'foreach']
    >>> explanation.parts[1].declined["packed"]
    '2 tensors, fewer than 16'
    """

    parts: tuple[Part, ...]
    """In the order in which they run."""
    mode: str
    """``"program"``, ``"leaf"`` where a history is recorded or inside `torch.func`, or ``"traced"``."""
    cached: bool
    """Whether the step cache hits: the tensors look as in an earlier call, so that nothing is checked again."""
    memory: int
    """The bytes of what the step returns in new memory, and of the buffers of the packed executor, which are kept for the next
    step. The temporaries of one line of a program, or of a whole transform, come on top."""

    def __str__(self) -> str:
        head = ("transforms", "executor", "parameters", "elements", "dtype", "device")
        rows = [
            (
                part.transforms, ("  " if part.nested else "") + part.executor, str(part.count), f"{part.numel:,}",
                str(part.dtype).removeprefix("torch."), str(part.device),
            )
            for part in self.parts
        ]  # fmt: skip
        widths = [max(map(len, column)) for column in zip(head, *rows)]
        lines = ["  ".join(x.ljust(w) for x, w in zip(row, widths)).rstrip() for row in (head, *rows)]
        lines.insert(1, "  ".join("-" * w for w in widths))
        for part in self.parts:
            lines += [
                f"{part.executor}, not {name}: {why}" for name, why in part.declined.items() if name in NOTEWORTHY[self.mode]
            ]
        lines.append(f"The step cache {'hits' if self.cached else 'misses'}; the mode is {self.mode!r}.")
        lines.append(f"Beside temporaries it takes {size(self.memory)} of new memory.")
        return "\n".join(lines)

    __repr__ = __str__


NOTEWORTHY = {"program": {"fused", "packed"}, "leaf": {"vmapped", "joined"}, "traced": set[str]()}
"""The executors that a user may have hoped for, in each mode."""


def size(n: int) -> str:
    """A number of bytes, for a reader."""
    return f"{n} bytes" if n < 1000 else f"{n / 1000:.1f} kB" if n < 1e6 else f"{n / 1e6:.1f} MB"


def watched(step: Callable[..., Any], given: Any, cached: bool) -> Explanation:
    """What happens in a call of `step` with copies of what is `given`, its arguments."""
    copies = copied(given)
    try:
        WATCH.decided, WATCH.reasons = [], reasons
        results = step(*copies)
        decided = WATCH.decided
    finally:
        WATCH.decided = WATCH.reasons = None
    memory = taken(copies, results) + sum([x.workspace for x in decided])
    modes = [x.mode for x in decided if isinstance(x, Decided)]
    return Explanation(tuple(map(part, decided)), modes[0] if modes else "program", cached, memory)


def part(x: Decided) -> Part:
    """What was decided, for a reader."""
    p = x.params[0]
    numel = sum([q.numel() for q in x.params])
    return Part(x.names, x.executor, len(x.params), numel, p.dtype, p.device, x.nested, x.declined)


def taken(given: Any, results: Any) -> int:
    """The bytes of new memory in the results of a call, which was given these."""
    old = {x.untyped_storage()._cdata for x in tree_leaves(given) if visible(x)}
    new = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tree_leaves(results) if visible(x)}
    return sum([n for storage, n in new.items() if storage not in old])


def visible(x: Any) -> bool:
    """Whether the memory of a tensor can be seen: it is plain, and not of a level of `torch.func`."""
    return type(x) in PLAIN and not maths.transforming()


def reasons(task: Task, executor: str) -> dict[str, str]:
    """Why the executors that were asked before this one declined, with what is special about the tensors."""
    found: dict[str, str] = {}
    for other in ASKED[task.env.mode]:
        if other.name == executor:
            return found
        why = other.declines(task)
        if why is None:
            why = "it turned out on the way that it cannot run this chain on these tensors"
        elif other.name in ("fused", "packed") and why.endswith("differ"):
            why = "; ".join(special(task, other.name == "packed"))
        found[other.name] = why
    return found


def special(task: Task, packed: bool) -> list[str]:
    """What is special about the tensors of a task."""
    lists = [task.grads, task.params, *task.like]
    tensors: list[Tensor] = [x for xs in lists for x in xs]
    n, p = len(tensors), task.params[0]
    counts = {
        "are not plain tensors": sum(type(x) not in PLAIN for x in tensors),
        f"are not {p.dtype}": sum(x.dtype != p.dtype for x in tensors),
        "are not contiguous": sum(not x.is_contiguous() for x in tensors if type(x) in PLAIN),
        "have another shape than their parameter": sum(x.shape != q.shape for xs in lists for x, q in zip(xs, task.params)),
    }
    found = [f"{k} of {n} tensors {what}" for what, k in counts.items() if k]
    if packed and len(task.params) < COUNT:
        found.append(f"{len(task.params)} tensor{'s' * (len(task.params) != 1)}, fewer than {COUNT}")
    mean = sum([q.numel() for q in task.params]) / len(task.params)
    if packed and mean > SIZE:
        found.append(f"{mean:,.0f} elements on average, more than {SIZE:,}")
    return found or ["their memory layouts differ"]


def copied(tree: Any) -> Any:
    """A tree with copies of its tensors; what is one tensor in several places is one copy."""
    memo: dict[int, Tensor] = {}

    def copy(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if id(x) not in memo:
            memo[id(x)] = x.clone() if x.requires_grad and torch.is_grad_enabled() else x.detach().clone()
        return memo[id(x)]

    return tree_map(copy, tree)
