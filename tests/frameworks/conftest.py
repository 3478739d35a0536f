"""What the tools themselves warn of is ignored, here and nowhere else."""

from __future__ import annotations

import pytest

WARNING = ("skorch", "pyro", "gpytorch", "linear_operator", "hydra", "timm", "tensordict")
"""Warnings that name a line of these modules are not ours."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("frameworks"):
            for tool in WARNING:
                item.add_marker(pytest.mark.filterwarnings(f"ignore:::{tool}"))
