"""A function run outside of all levels of `torch.func`: on plain tensors, as if nobody differentiated around it.

A solver is not differentiated, so it may be written as any training loop is: with `torch.nn.Parameter`, ``loss.backward()`` and
an optimizer. torch refuses these inside `torch.func.grad`, `jvp` and `vmap`. So a solver that is refused runs again, with all
levels left for as long as it runs. What is made of `torch.func` never gets there: it runs where it is called, batched too.

Members of a `torch.func.vmap` cannot be told apart outside of it: a batch is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from purestep._core.populations import detach
from purestep._core.torch_api import (
    function_modes,
    get_unwrapped,
    interpreter_stack,
    is_batched,
    is_wrapped,
    level_of,
    tree_map,
    without_innermost_interpreter,
)
from purestep.meta.attach import current_level, exchanged, watched

REFUSED = "functorch transform"
"""What torch says of ``backward()`` and ``requires_grad_()`` inside `torch.func`."""


def constants_of(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a function returns that is not differentiated: where `torch.func` refuses what it does, outside of that.

    Raises:
        RuntimeError: it is refused, and meets a batch of `torch.func.vmap`.
    """
    args, kwargs = detach((args, kwargs))
    with torch.enable_grad():
        try:
            return function(*args, **kwargs)
        except RuntimeError as error:
            if REFUSED not in str(error):
                raise
    with ExitStack() as stack:
        for _ in interpreter_stack() or ():
            stack.enter_context(without_innermost_interpreter())
        stack.enter_context(lowered())
        stack.enter_context(torch.enable_grad())
        args, kwargs = tree_map(plain, (args, kwargs))
        return function(*args, **kwargs)


def plain(x: Any) -> Any:
    """A tensor without the levels that have been left, and without its past there; anything else as it is.

    Raises:
        RuntimeError: it is a batch.
    """
    if not isinstance(x, Tensor) or not is_wrapped(x):
        return x
    base = current_level()  # of transforms that the function itself has begun, whose numbers start from 1 again
    left = False
    while is_wrapped(x) and level_of(x) > base:
        if is_batched(x):
            raise RuntimeError(
                "A solver that calls backward() or requires_grad_(), as a torch.optim optimizer needs, cannot be batched by "
                "torch.func.vmap. Write it with torch.func.grad and Transform.step, or call it for each member in turn."
            )
        x, left = get_unwrapped(x), True
    return x.detach() if left else x


class lowered(TorchFunctionMode):  # noqa: N801
    """Operations are given `plain` tensors, also those that a function closes over.

    What is recorded around a function that is not differentiated has nothing to see or to exchange: it waits.
    """

    def __enter__(self) -> lowered:
        modes: list[Any] = function_modes()  # type: ignore[no-untyped-call]
        self.waiting = [m for m in modes if isinstance(m, (watched, exchanged)) and not m.waits]
        for mode in self.waiting:
            mode.waits = True
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for mode in self.waiting:
            mode.waits = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not torch.compiler.is_compiling():
            args, kwargs = below(args), below(kwargs)
        return func(*args, **kwargs)


def below(x: Any) -> Any:
    """The arguments of an operation, with `plain` tensors."""
    if isinstance(x, Tensor):
        return plain(x)
    if type(x) in (tuple, list):
        return type(x)([below(y) for y in x])
    return {k: below(y) for k, y in x.items()} if type(x) is dict else x
