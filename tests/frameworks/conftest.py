"""What the tools themselves warn of is ignored, here and nowhere else."""

from __future__ import annotations

import pytest

WARNING = ("skorch", "pyro", "gpytorch", "linear_operator", "hydra", "timm", "tensordict")
"""Warnings that name a line of these modules are not ours."""

SAYING = ("PlateauLRScheduler is deprecated",)
"""Warnings that name a line of the test, but say what a tool thinks of itself."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("frameworks"):
            for ignored in (*[f"ignore:::{tool}" for tool in WARNING], *[f"ignore:{words}" for words in SAYING]):
                item.add_marker(pytest.mark.filterwarnings(ignored))
