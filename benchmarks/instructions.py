"""How many instructions a step takes: what it costs beside its numbers, on a machine that need not be quiet.

    python -m benchmarks.instructions
    python -m benchmarks.instructions --sets mlp --algorithms adamw --modes "torch fused" wrapper donated --json count.json

Of the sets `mlp` and `many`, whose numbers are few, a step's time is what Python, the dispatcher and the launch of each kernel
cost. On a busy machine that time varies by much more than what one wants to see; the number of instructions hardly varies at
all, whatever else is running, and tells changes of a percent. It is no time: an instruction that waits for memory counts as
one that does not, and so does a kernel's that adds eight numbers at once. So it says little of large sets.

valgrind counts them, through `torch.utils.benchmark`, in a process of its own that runs on an emulated processor, some fifty
times as slowly: loading all that a step needs takes four minutes, and therefore one process serves all modes. All is on one
thread, because threads that wait for each other count how long they wait. A figure is the median of a few counts, each of
some steps in a row, and its *spread* the range of these counts in percent of it. *In Python* is the share of the interpreter
itself, `libpython` or the executable, without what it calls.

Where there is no valgrind there is nothing to count with: it says so, and that is no error.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, groupby, repeat
from pathlib import Path
from statistics import median
from typing import TypeAlias

import torch
from torch.utils.benchmark import CallgrindStats, Timer

from benchmarks.modes import COMPILED, LARGE, MODES, SETS, SUBJECTS, TORCH, starts
from benchmarks.step import clones, dumps, machine, nothing, positive, ratio, render

ROOT = Path(__file__).parents[1]
TOOLS = ("valgrind", "callgrind_control", "callgrind_annotate")
ALGORITHMS_SHOWN = ("adamw", "sgd", "nadam")
SETS_SHOWN = ("mlp", "many")
MODES_SHOWN = ("torch default", "torch foreach", "torch fused", "wrapper", "donated", "pure", "torchopt")
STEPS, COUNTS = 5, 3  # in a row that are counted together, and how often
WARM_UP = 5  # steps: after the first ones programs are traced, states made, and what was checked is not checked again

Place: TypeAlias = tuple[str, str, str]  # an algorithm or a chain, a set, a mode


# ---------------------------------------------------------------------------------------------------------------- results


@dataclass(frozen=True)
class Row:
    """The instructions of one mode, per step."""

    mode: str
    instructions: float
    spread: float  # of the counts, relative to the median
    in_python: float  # a share
    to_torch: float | None  # over the fewest of torch's modes; None if none was run


@dataclass(frozen=True)
class Table:
    """One algorithm on one set of parameters."""

    algorithm: str
    parameter_set: str
    tensors: int
    parameters: int
    rows: list[Row]


# ------------------------------------------------------------------------------------------------------------ measurement


def turns(places: Sequence[Place], steps: int, counts: int) -> Iterator[Callable[[], None]]:
    """What valgrind's process takes its steps from: of every place so many for each count, after a few that do nothing.

    Those few are what `Timer` warms up with; here every optimizer has taken its own first steps before the first count.
    """
    found = []
    for (key, name), here in groupby(places, key=lambda place: place[:2]):
        subject = SUBJECTS[key]
        parameter_set = SETS[name].of(subject)
        params, grads = parameter_set.draw(seed=0), parameter_set.draw(seed=1, gradient=subject.gradient)
        for _, _, mode in here:
            run = starts(subject)[mode](clones(params), grads)
            for _ in range(WARM_UP):
                run.step()
            found.append(run.step)
    return chain(repeat(nothing, min(steps, 10)), *[repeat(step, steps * counts) for step in found])


def count(places: Sequence[Place], steps: int, counts: int) -> dict[Place, list[CallgrindStats]]:
    """Let valgrind count each of them several times."""
    setup = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from benchmarks.instructions import turns\n"
        f"turn = turns({list(places)!r}, {steps}, {counts})"
    )
    timer = Timer("next(turn)()", setup=setup, num_threads=1)
    stats = timer.collect_callgrind(steps, repeats=counts * len(places), collect_baseline=False, retain_out_file=False)
    return {place: list(stats[i * counts : (i + 1) * counts]) for i, place in enumerate(places)}


def instructions(stats: CallgrindStats) -> float:
    """Per step."""
    return stats.counts() / stats.number_per_run


def share_in_python(stats: CallgrindStats) -> float:
    """Which part of the instructions is in the interpreter: an entry ends with the file that has the function, in brackets."""
    interpreters = ("libpython", Path(sys.executable).resolve().name)
    entries = [(entry.count, Path(entry.function.rpartition("[")[2]).name) for entry in stats.stmt_exclusive_stats]
    return sum(n for n, file in entries if file.startswith(interpreters)) / stats.counts()


def tables(found: dict[Place, list[CallgrindStats]]) -> list[Table]:
    """The figures, by algorithm and set."""
    medians = {place: median(map(instructions, stats)) for place, stats in found.items()}
    results = []
    for (key, name), places in groupby(found, key=lambda place: place[:2]):
        here = list(places)
        fewest = min([medians[place] for place in here if place[2] in TORCH], default=None)
        rows = []
        for place in here:
            counted = [instructions(stats) for stats in found[place]]
            rows.append(
                Row(
                    place[2],
                    instructions=medians[place],
                    spread=(max(counted) - min(counted)) / medians[place],
                    in_python=median(map(share_in_python, found[place])),
                    to_torch=medians[place] / fewest if fewest else None,
                )
            )
        subject = SUBJECTS[key]
        parameter_set = SETS[name].of(subject)
        results.append(Table(subject.name, name, len(parameter_set.shapes), parameter_set.parameters, rows))
    return results


# ----------------------------------------------------------------------------------------------------------------- output


def show(table: Table) -> str:
    """A table, under a line that says what it is of."""
    lines = [
        (row.mode, f"{row.instructions / 1e3:.1f}", f"{row.spread:.1%}", f"{row.in_python:.0%}", ratio(row.to_torch))
        for row in table.rows
    ]
    title = f"{table.algorithm} on {table.parameter_set}: {table.tensors} tensors, {table.parameters / 1e6:.2f} M parameters"
    header = ("mode", "thousand instructions", "spread", "in Python", "/ torch's fewest")
    return f"{title}\n\n{render(header, lines)}\n"


def arguments() -> argparse.Namespace:
    """The command line."""
    text = "How many instructions one optimizer step takes, as valgrind counts them."
    parser = argparse.ArgumentParser(prog="python -m benchmarks.instructions", description=text)
    choices = {
        "--algorithms": (list(SUBJECTS), ALGORITHMS_SHOWN),
        "--sets": ([name for name in SETS if name not in LARGE], SETS_SHOWN),
        "--modes": ([mode for mode in MODES if mode not in COMPILED], MODES_SHOWN),  # to compile takes too long there
    }
    for name, (known, usual) in choices.items():
        default = [x for x in usual if x in known]
        text = f"of {', '.join(map(repr, known))}; by default {', '.join(map(repr, default))}"
        parser.add_argument(name, nargs="+", choices=known, default=default, metavar="NAME", help=text)
    text = f"steps in a row that are counted together; {STEPS} by default"
    parser.add_argument("--steps", type=positive, default=STEPS, metavar="N", help=text)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all of it, and facts about the machine, to this file")
    return parser.parse_args()


def main() -> None:
    """Count, print, write."""
    options = arguments()
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        print(f"Nothing was counted, because this is missing here: {', '.join(missing)}.")
        return
    if options.json:
        options.json.touch()  # a path that cannot be written is better known now than in a few minutes
    torch.set_num_threads(1)
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # `Timer` runs "python"
    facts = machine()
    print(", ".join(f"{name} {value}" for name, value in facts.items()), end="\n\n", flush=True)
    places = [
        (key, name, mode)
        for key in options.algorithms
        for name in options.sets
        for mode in starts(SUBJECTS[key])
        if mode in options.modes and SETS[name].of(SUBJECTS[key]).shapes
    ]
    if not places:
        print("None of these algorithms has one of these modes on one of these sets.")
        return
    found = tables(count(places, options.steps, COUNTS))
    for table in found:
        print(show(table))
    if options.json:
        options.json.write_text(dumps({"machine": facts, "tables": [asdict(table) for table in found]}) + "\n")
        print(f"Written to {options.json}\n")


if __name__ == "__main__":
    main()
