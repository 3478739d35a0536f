"""What the tests with a framework have in common: a marker, and peace from the warnings of others."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def make_torchvision_importable() -> None:
    """Define the two operators that its import asks for. PyPI's build needs CUDA, and has none beside a torch for CPUs.

    torchmetrics and transformers import torchvision where it is installed. No test here uses an operator of it.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            importlib.import_module("torchvision")
        except RuntimeError:
            for name in ("nms", "qnms"):
                torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            importlib.import_module("torchvision")


make_torchvision_importable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Frameworks warn of workers, of loggers, and of what will change in torch: none of it is about purestep."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.fixture(autouse=True)
def no_state_of_accelerate() -> Iterator[None]:
    """accelerate keeps its device and its precision in a singleton; each test begins without it."""
    yield
    state = sys.modules.get("accelerate.state")
    if state is not None:
        with contextlib.suppress(AttributeError):
            state.AcceleratorState._reset_state(reset_partial_state=True)
            state.GradientState._reset_state()
