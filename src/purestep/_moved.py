"""Where modules were in earlier versions: what was pickled by these is found by the old paths."""

from __future__ import annotations

import sys

import torch

from purestep import compose, transform
from purestep._core import masks, primitives, values
from purestep._optimizer import begun, optimizer

MODULES = {
    "purestep.begun": begun,
    "purestep.links": primitives,
    "purestep.masks": masks,
    "purestep.optimizer": optimizer,
    "purestep.value": values,
}
"""The old paths of modules with classes and functions that a pickle names."""


def install() -> None:
    """Let `pickle.load`, and `torch.load` in its default mode, find these under their old paths."""
    for path, module in MODULES.items():
        sys.modules.setdefault(path, module)
    for kind in (compose.Chain, compose.Nested):  # they were in the module of `Transform`
        setattr(transform, kind.__name__, kind)
    for state in (primitives.EmptyState, primitives.ScheduleState):
        torch.serialization.add_safe_globals([(state, f"purestep.links.{state.__name__}")])
