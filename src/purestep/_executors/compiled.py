"""A whole chain as one kernel: its program, compiled by Inductor for vectors of any length.

A program makes one pass over memory for each of its lines; a kernel makes one for all of them. What is compiled is the
program of one tensor, on vectors, with all that it needs of hyperparameters and counters in one small vector. So one
kernel, made once for a recipe and a dtype, serves every tensor of every model in the process, and every learning rate.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from purestep._core.threads import OPENMP, SERIAL, one_thread
from purestep._core.torch_api import BelowInplaceOrView, is_non_overlapping_and_dense, standalone_compile
from purestep._executors.foreach import collected
from purestep._executors.task import Base, Mode, Result, Task
from purestep._trace.program import LeafDeclaration, Program, program

WARM = 2**16
"""A kernel is compiled on vectors of so many elements: the compiler asks them whether threads pay."""

Function: TypeAlias = Callable[..., list[Tensor]]

_lock = threading.Lock()


class Compiled(Base):
    """The whole chain as one kernel, made by Inductor."""

    modes: tuple[Mode, ...] = ("program",)
    name = "compiled"
    when = "`compile=True`, elementwise transforms"
    how = "one kernel of Inductor's for the whole chain, which takes tensors of any shape"

    def declines(self, task: Task) -> str | None:
        return None if task.env.wanted == "compiled" else "nobody asked for it"

    def run(self, task: Task) -> Result | None:
        def calculated(columns: list[Any], numbers: list[Any]) -> Any:
            given, owns = (task.grads, task.params, columns), task.env.own.given
            return run_compiled(task.recipe, task.chain.declarations, given, numbers, apply=task.applies, donate=owns)

        return collected(task, calculated)


@torch.no_grad()
def run_compiled(
    recipe: tuple[Any, ...],
    declarations: Sequence[LeafDeclaration],
    given: tuple[list[Tensor], list[Tensor], list[Any]],
    numbers: list[Any],
    *,
    apply: bool,
    donate: bool,
) -> tuple[Any, ...] | None:
    """What the program of a recipe returns, as `purestep._executors.tiles.calculate` does; None if it cannot be one kernel.

    The fields of the state may be of other dtypes than the parameters: what is computed is computed in the widest.
    """
    split = program(recipe, apply, False, False, *declarations, form="split")
    if not split.elementwise or split.coefficients is None or split.tangled:  # Inductor (2.13) leaves out copies of arguments
        return None
    grads, params, columns = given
    lists = [grads, params, *[c for c in columns if isinstance(c, list)]]
    with BelowInplaceOrView():  # the compiler would ask of a view what it is a view of
        vectors = flattened(lists)
    if vectors is None:
        return None
    found, scalars = split.coefficients(*[c for c in columns if not isinstance(c, list)], *numbers)
    dtypes = tuple([xs[0].dtype for xs in lists])
    k = vector(found, precision(widest(dtypes)), params[0].device)
    kernel = compiled(split, dtypes, k, donate)
    made = called(kernel, k, vectors)
    if split.copies:
        made = [unshared(ys, xs) for ys, xs in zip(made, vectors)]
    news = [shaped(ys, params) for ys in zip(*made)]
    updates = params if apply and donate else news.pop(0)
    tensors, floats = iter(lists[2:] if donate else news), iter(scalars)
    return updates, *[next(tensors) if isinstance(c, list) else next(floats) for c in columns]


def called(kernel: Function, k: Tensor, vectors: list[Sequence[Tensor]]) -> list[list[Tensor]]:
    """What a kernel returns for each; small ones are done on one thread."""
    few = [k.is_cpu and x[0].numel() <= SERIAL for x in vectors]
    if OPENMP is None or not any(few) or torch.get_num_threads() == 1:
        return [kernel(k, *x) for x in vectors]
    made = [[] if one else kernel(k, *x) for one, x in zip(few, vectors)]
    with one_thread(OPENMP):
        return [kernel(k, *x) if one else y for one, x, y in zip(few, vectors, made)]


def compiled(split: Program, dtypes: tuple[torch.dtype, ...], k: Tensor, donate: bool) -> Function:
    """The kernel of a program: it takes the coefficients, a gradient, a parameter and the fields of its state, all of them
    vectors, and returns the update or the new parameter and the new fields, but for what it writes in place."""
    key = (dtypes, k.device, donate)
    found = split.kernels.get(key)
    if found is not None:
        return found
    with _lock:
        if key not in split.kernels:
            given = [k, *[torch.ones(WARM, dtype=dtype, device=k.device) for dtype in dtypes]]
            graph = make_fx(function(split, widest(dtypes), donate), tracing_mode="symbolic")(*given)
            like = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
            split.kernels[key] = standalone_compile(graph, like)
        made: Function = split.kernels[key]
        return made


def function(split: Program, dtype: torch.dtype, donate: bool) -> Function:
    """What is compiled."""
    run, apply = split.run, split.apply

    def kernel(k: Tensor, *given: Tensor) -> list[Tensor]:
        found = run(*[x.to(dtype) for x in given], k)
        results: list[Tensor] = [x.to(old.dtype) for x, old in zip(found, given[1:])]
        if not apply and any([x is results[0] for x in results[1:]]):
            results[0] = results[0].clone()  # updates are handed out; the state's memory may be given away at the next step
        if not donate:
            return results
        for old, x in zip(given[2 - apply :], results[1 - apply :]):
            old.copy_(x)
        return results[: 1 - apply]

    return kernel


def unshared(results: list[Tensor], given: Sequence[Tensor]) -> list[Tensor]:
    """Results in memory of their own."""
    held = {x.data_ptr() for x in given}
    found = []
    for x in results:
        y = x.clone() if x.data_ptr() in held else x
        held.add(y.data_ptr())
        found.append(y)
    return found


def flattened(lists: list[list[Tensor]]) -> list[Sequence[Tensor]] | None:
    """For each parameter, its tensor in each list as a vector; None if their elements are not in the same order."""
    if all([x.is_contiguous() for xs in lists for x in xs]):
        return list(zip(*[[x.view(-1) for x in xs] for xs in lists]))
    found: list[Sequence[Tensor]] = [flat(xs) for xs in zip(*lists)]
    return found if all(found) else None


def flat(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """Tensors of one shape as vectors that share their memory; nothing if their elements are not in the same order."""
    if all([x.is_contiguous() for x in tensors]):
        return [x.view(-1) for x in tensors]
    strides = tensors[0].stride()
    if any([x.stride() != strides for x in tensors]) or not is_non_overlapping_and_dense(tensors[0].shape, strides):
        return []
    return [x.as_strided((x.numel(),), (1,)) for x in tensors]


def shaped(xs: Sequence[Tensor], like: list[Tensor]) -> list[Tensor]:
    """Vectors as tensors again."""
    return [x.view(p.shape) if p.is_contiguous() else x.as_strided(p.shape, p.stride()) for x, p in zip(xs, like)]


def vector(numbers: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers, some of which may live on a device, as one tensor there."""
    if not any([isinstance(x, Tensor) for x in numbers]):
        return torch.tensor(numbers, dtype=dtype, device=device)
    return torch.stack(
        [x.to(device, dtype) if isinstance(x, Tensor) else torch.full((), x, dtype=dtype, device=device) for x in numbers]
    )


def widest(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """The dtype that all of these promote to."""
    return functools.reduce(torch.promote_types, dtypes)


def precision(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the numbers that go with tensors of this one."""
    return torch.promote_types(dtype, torch.float32)
