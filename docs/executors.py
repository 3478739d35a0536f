"""The table of executors in `concepts.md`, made from the registry: `python docs/executors.py` writes it.

tests/test_internals.py fails while the page and the registry differ.
"""

from __future__ import annotations

from pathlib import Path

from purestep._executors import registry as registry
from purestep._executors.task import EXECUTORS

PAGE = Path(__file__).parent / "concepts.md"
BEGIN = "<!-- This table is made from the registry of executors: `python docs/executors.py` writes it. -->\n\n"
END = "\n\n<!-- The end of the table. -->"


def table() -> str:
    """One row for each executor, in the order in which they are asked."""
    rows = [f"| `{x.name}` | {x.when} | {x.how} |" for x in EXECUTORS]
    return "\n".join(["| Executor | What it takes | How it runs it |", "|---|---|---|", *rows])


def shown(page: str) -> str:
    """The table that a page has between the two comments."""
    return page.partition(BEGIN)[2].partition(END)[0]


if __name__ == "__main__":
    before = PAGE.read_text()
    head, _, rest = before.partition(BEGIN)
    PAGE.write_text(f"{head}{BEGIN}{table()}{END}{rest.partition(END)[2]}")
