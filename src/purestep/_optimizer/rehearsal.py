"""A rehearsal before groups step one after the other: what may raise does so before any group has changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from purestep._core.maths import readable
from purestep._core.primitives import fresh_state
from purestep._core.torch_api import tree_structure
from purestep._executors.task import LEAF_BY_LEAF
from purestep._optimizer.following import Schedules, follows, number, updates
from purestep._optimizer.selection import Contents
from purestep.transform import Transform


class Rehearsal:
    """Calls what a step calls of a user's: schedules at each step, the functions of a transform once."""

    def __init__(self) -> None:
        self.done: dict[int, tuple[Transform, Any]] = {}  # by group, the transform whose functions were called; its structure

    def run(
        self, contents: Contents, transforms: list[Transform], schedules: Schedules, executor: Callable[[Any], str | None]
    ) -> None:
        """Rehearse a step of all groups; `executor` says how a group is run."""
        if torch.compiler.is_compiling():
            return
        while len(self.done) > len(transforms):  # groups have been taken away
            self.done.popitem()
        for k, (group, transform) in enumerate(zip(contents.groups, transforms)):
            for name, x in schedules.of(group).items():
                count = updates(contents, group, transform, option := x.option(group, name))
                if follows(option):
                    number(option, int(count) if count is not None and readable(torch.as_tensor(count)) else x.steps)
            if (k in self.done and self.done[k][0] is transform) or executor(group) in LEAF_BY_LEAF:
                continue
            recipe = tuple([tree_structure(link.transform) for link in transform.links])
            if not any([recipe == known for _, known in self.done.values()]) and can_begin(transform):
                transform.program(donate=True)
            self.done[k] = transform, recipe


def can_begin(transform: Transform) -> bool:
    """Whether the states of a transform can be made for a matrix that has no values."""
    try:
        for link in transform.links:
            fresh_state(link.transform, torch.empty(64, 64, device="meta"))
    except Exception:  # of a function of a user's, which may look at values
        return False
    return True
