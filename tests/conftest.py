"""What every test starts from."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch._dynamo.utils

collect_ignore_glob = ["oracles/make_*.py"]  # they import what is installed only where oracles are recorded


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """The same seed, one thread (two workers share two cores), no compiled code left over."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` need one."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
