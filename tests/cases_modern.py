"""The part of the registry for algorithms beyond torch.optim that treat each parameter on its own."""

from __future__ import annotations

from tests.case import Case

CASES: list[Case] = []
