"""The part of the registry for algorithms beyond torch.optim that see all parameters, or ask for more than gradients."""

from __future__ import annotations

from tests.case import Case

CASES: list[Case] = []
