"""The part of the registry for building blocks: clipping, normalizing, averaging, noise, projections."""

from __future__ import annotations

from tests.case import Case

CASES: list[Case] = []
