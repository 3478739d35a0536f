"""What a case of the registry says of a transform. The registry itself is `tests.cases`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import purestep as ps
from tests.problems import PROBLEMS

Options = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """One transform, with options under which it is tested."""

    name: str
    make: Callable[..., ps.Transform]
    options: tuple[Options, ...]
    """Several sets of options; the first is the one for tests that need only one."""
    twin: Callable[..., torch.optim.Optimizer] | None = None
    """What computes the same: called with parameters and the same options."""
    step: float | None = None
    """For a transform that gives updates, not steps: what to multiply them with in a training loop."""
    smooth: bool = True
    """Whether finite differences are meaningful at random points."""
    lacks: dict[str, str] = dataclasses.field(default_factory=dict)
    """Capability -> reason."""
    covers: tuple[str, ...] = ()
    """Further public names that this case tests."""
    problems: tuple[str, ...] = ("mlp", "logistic")
    """What it is trained on, by its name in PROBLEMS; the first is the one for tests that need only one."""
    treats: Callable[[Tensor], bool] = lambda p: True
    """The parameters it can treat."""
    least: dict[str, float] = dataclasses.field(default_factory=dict)
    """The least values of hyperparameters that may not be made much smaller."""

    @property
    def problem(self) -> Callable[..., Any]:
        return PROBLEMS[self.problems[0]]

    def __str__(self) -> str:
        return self.name

    def transform(self, options: Options | None = None) -> ps.Transform:
        t = self.make(**(self.options[0] if options is None else options))
        return t if self.step is None else ps.chain(t, ps.scale(self.step))
