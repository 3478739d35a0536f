"""How far every transform is from one process in every layout: the table of docs/distributed.md.

    python -m benchmarks.layouts

Four processes on this machine run what tests/test_layouts.py runs, in all layouts and both dtypes: that takes some minutes.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import plan

COMMAND = "benchmarks.layouts"
NAME = "layouts"


def rows(found: dict[Any, float], names: list[str], layouts: list[str]) -> list[list[str]]:
    """A row for each transform: in each layout its distance in float64, and in float32."""

    def said(name: str, layout: str) -> str:
        return " / ".join([f"{found[name, layout, dtype]:.0e}" for dtype in (torch.float64, torch.float32)])

    return [[f"`{name}`", *[said(name, layout) for layout in layouts]] for name in names]


def main() -> None:
    from tests import processes, test_layouts

    with tempfile.TemporaryDirectory() as folder:
        found = processes.run(test_layouts.SIZE, "tests.test_layouts:all_of_it", Path(folder), seconds=1800.0)
    if wrong := {k: x for each in found for k, x in each.items() if isinstance(x, str)}:
        raise SystemExit(f"These have failed: {wrong}")
    worst = {k: max([x[k] for x in found]) for k in found[0]}
    names = [case.name for case in test_layouts.ALL]
    made = plan.markdown(["", *test_layouts.LAYOUTS], rows(worst, names, list(test_layouts.LAYOUTS)))
    plan.PAGE.write_text(plan.put(plan.PAGE.read_text(), NAME, made, COMMAND))


if __name__ == "__main__":
    main()
