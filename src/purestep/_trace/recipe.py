"""What identifies a program: its leaf functions, and everything about a call that is neither a tensor nor a number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

Form: TypeAlias = Literal["lists", "kernels", "sharded", "single", "split"]
"""What a program takes.

* ``lists``: lists of tensors, one entry per parameter.
* ``kernels``: lists, and the program calls torch's fused kernels where they compute several of its lines.
* ``sharded``: lists of the parts that this process has of sharded tensors; a further argument, `HOMES`, has these tensors.
  What must see whole matrices is computed by their owners (`purestep._core.dealt`).
* ``single``: one tensor in the place of each list. Such a program overwrites nothing.
* ``split``: as ``single``, but a second function, `Program.coefficients`, computes everything that depends on numbers alone.
"""


HOMES = "homes"
"""The argument of a sharded program that has the sharded parameters."""


class StateFields(Protocol):
    """What the fields of a state are; all tuples have one entry per field."""

    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def scalars(self) -> tuple[bool, ...]: ...
    @property
    def like(self) -> tuple[bool, ...]: ...
    @property
    def encoded(self) -> tuple[bool, ...]: ...


class LeafDeclaration(Protocol):
    """What a program needs to know of a declared leafwise transform."""

    key: str  # identifies the declaration in the cache of programs, which must not keep the declaration alive
    watched: bool  # a finalizer drops the programs of this declaration when it is freed
    name: str
    function: Callable[..., Any]
    hypers: tuple[str, ...]
    switches: tuple[str, ...]
    state: Any  # the NamedTuple of the transform's state, or None

    @property
    def fields(self) -> StateFields: ...


class LeafSpec(NamedTuple):
    """What a program is specialized to, of one leaf function; only constants, so that `torch.compile` can guard them."""

    absent: tuple[bool, ...]  # for each field of the state, whether these parameters lack it
    switches: tuple[Any, ...]  # the values of the declaration's switches
    hypers: tuple[int, ...]  # for each hyperparameter: `NUMBER`, `OFF`, or the length of a tuple of numbers


NUMBER = 0
"""In `LeafSpec.hypers`: the hyperparameter is one number."""

OFF = -1
"""In `LeafSpec.hypers`: the hyperparameter is None."""


class Part(NamedTuple):
    """One leaf function of a recipe."""

    declaration: LeafDeclaration
    spec: LeafSpec


class Recipe(NamedTuple):
    """What a program is made from. Two calls with equal recipes differ only in tensors and numbers."""

    parts: tuple[Part, ...]
    apply: bool  # the program ends with params + updates
    own_grads: bool  # the program may overwrite the gradients
    donate: bool  # the program may overwrite the state, and the parameters if it applies the updates
    form: Form = "lists"

    @property
    def lists(self) -> bool:
        """Whether the program takes lists of tensors."""
        return self.form in ("lists", "kernels", "sharded")
