"""Classes with the signatures of `torch.optim`'s, each of which runs a factory of transforms."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from purestep._core.torch_api import disable_dynamo
from purestep.transform import Transform

F = TypeVar("F", bound=Callable[..., None])

FLAGS = ("foreach", "capturable", "differentiable", "fused", "compile")
"""Arguments of torch's optimizers that choose how a step runs."""


def untraced(function: F) -> F:
    """A function that `torch.compile` calls instead of tracing it."""
    made: Any = disable_dynamo(function)
    return made


def over(factory: Callable[..., Transform]) -> Callable[[F], F]:
    """Make an `__init__` run a factory: its arguments are the factory's, with `params` before them and torch's flags after."""
    wanted = tuple(inspect.signature(factory).parameters)

    def decorate(init: F) -> F:
        signature = mirrored(inspect.signature(init), getattr(torch.optim, init.__qualname__.partition(".")[0], None))

        @untraced
        @functools.wraps(init)
        def begin(self: Any, *args: Any, **kwargs: Any) -> None:
            bound = signature.bind(self, *args, **kwargs)
            bound.apply_defaults()
            given = bound.arguments
            flags = {name: given[name] for name in FLAGS if name in given}
            self._begin(given["params"], factory, {name: given[name] for name in wanted if name in given}, flags)

        begin.__signature__ = signature  # type: ignore[attr-defined]
        return begin  # type: ignore[return-value]

    return decorate


def mirrored(signature: inspect.Signature, theirs: Any) -> inspect.Signature:
    """The signature of a class without the options that its model in the installed torch is too old to have."""
    if theirs is None:
        return signature
    known = {"self", "compile", *inspect.signature(theirs).parameters}
    return signature.replace(parameters=[p for p in signature.parameters.values() if p.name in known])
