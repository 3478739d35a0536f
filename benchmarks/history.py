"""What has become faster or slower since the last recorded run of `benchmarks.step`.

    python -m benchmarks.history
    python -m benchmarks.history before.json after.json

Without arguments the two newest files in benchmarks/history are compared, which `python -m benchmarks.step --record` writes.
It is a report, for a person to read, and no test: it always ends well.

What is compared is each of purestep's modes with torch's best in the same table, not milliseconds: the machines may differ,
or be busy with other things, and both were measured in turns. A ratio is known no better than its two times. Each is taken
to lie between its median less and more half of its interquartile range, so the ratio lies between the least and the
greatest quotient of such times; it has *changed* where these two ranges, of before and after, have nothing in common.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks.modes import PURESTEP, TORCH
from benchmarks.step import HISTORY, render

Place: TypeAlias = tuple[str, str, str]  # an algorithm or a chain, a set, a mode


@dataclass(frozen=True)
class Ratio:
    """A mode's time over that of torch's best, and the range in which it is known."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, row: Mapping[str, Any], best: Mapping[str, Any]) -> Ratio:
        """From a row and the fastest of torch's in the same table."""
        (low, middle, high), (least, usual, most) = times(row), times(best)
        return cls(middle / usual, low / most, high / least if least else float("inf"))


@dataclass(frozen=True)
class Change:
    """The same place in two runs."""

    place: Place
    before: Ratio
    after: Ratio

    @property
    def factor(self) -> float:
        """How many times slower it has become, measured by torch's best."""
        return self.after.value / self.before.value

    @property
    def certain(self) -> bool:
        """Whether this is more than what the times vary by."""
        return self.after.low > self.before.high or self.after.high < self.before.low


def times(row: Mapping[str, Any]) -> tuple[float, float, float]:
    """The milliseconds that a step takes: at least, in the median, at most."""
    middle, half = row["median_ms"], row["iqr_ms"] / 2
    return max(0.0, middle - half), middle, middle + half


def rows(run: Mapping[str, Any]) -> dict[Place, Mapping[str, Any]]:
    """All that was measured in one run."""
    return {(table["algorithm"], table["parameter_set"], row["mode"]): row for table in run["tables"] for row in table["rows"]}


def ratios(found: Mapping[Place, Mapping[str, Any]]) -> dict[Place, Ratio]:
    """Those of purestep's modes that have a counterpart in torch."""
    best: dict[tuple[str, str], Mapping[str, Any]] = {}
    for (name, parameter_set, mode), row in found.items():
        old = best.get((name, parameter_set))
        if mode in TORCH and (old is None or row["median_ms"] < old["median_ms"]):
            best[name, parameter_set] = row
    return {place: Ratio.of(row, best[place[:2]]) for place, row in found.items() if place[2] in PURESTEP and place[:2] in best}


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """The places that both runs have, the worst change first; torch's best, too, is of the modes that both have."""
    old, new = rows(before), rows(after)
    shared = [place for place in new if place in old]
    olds, news = ratios({place: old[place] for place in shared}), ratios({place: new[place] for place in shared})
    changes = [Change(place, olds[place], news[place]) for place in news]
    return sorted(changes, key=lambda change: (-change.factor, change.place))


def newest(runs: list[Path]) -> list[Path]:
    """The last one and the one before it on the same kind of device, by the dates that they carry, the older one first."""
    facts = {path: json.loads(path.read_text())["machine"] for path in runs}
    dated = sorted(runs, key=lambda path: facts[path]["date"])
    return [path for path in dated if facts[path].get("gpu") == facts[dated[-1]].get("gpu")][-2:]


def describe(path: Path, run: Mapping[str, Any]) -> str:
    """One line about a run."""
    facts = run["machine"]
    return f"{path}: {facts['date']}, {facts['cpu']}, {facts['threads']} threads, torch {facts['torch']}"


def show(changes: list[Change]) -> str:
    """A table of changes."""
    lines = [
        (
            ", ".join(change.place),
            f"{change.before.value:.2f}",
            f"{change.before.low:.2f} to {change.before.high:.2f}",
            f"{change.after.value:.2f}",
            f"{change.after.low:.2f} to {change.after.high:.2f}",
            f"{change.factor:.2f}",
        )
        for change in changes
    ]
    return render(("/ torch's best", "before", "range", "after", "range", "after / before"), lines)


def report(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """What has changed, and how much was compared."""
    changes = compare(before, after)
    changed = [change for change in changes if change.certain]
    slower = sum(change.factor > 1 for change in changed)
    alone = sum(place[2] in PURESTEP for place in rows(before).keys() ^ rows(after).keys())
    counts = (
        f"{len(changes)} modes compared: {slower} slower, {len(changed) - slower} faster, "
        f"{len(changes) - len(changed)} within their spread."
    )
    if alone:
        counts += f" {alone} more are in one of the runs only."
    return counts if not changed else f"{counts}\n\n{show(changed)}"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.history", description="What has become faster or slower beside torch's best."
    )
    text = f"two files that benchmarks.step has written, the older one first; by default the newest two in {HISTORY}"
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help=text)
    options = parser.parse_args()
    if len(options.files) not in (0, 2):
        parser.error(f"two files are compared, but got {len(options.files)}.")
    return options


def main() -> None:
    """Read, compare, print."""
    files = arguments().files or newest(list(HISTORY.glob("*.json")))
    if len(files) < 2:
        print(f"{HISTORY} has {len(files)} runs, and a comparison needs two; benchmarks.step --record writes them.")
        return
    before, after = [json.loads(path.read_text()) for path in files]
    print(f"before: {describe(files[0], before)}\nafter:  {describe(files[1], after)}\n")
    print(report(before, after))


if __name__ == "__main__":
    main()
