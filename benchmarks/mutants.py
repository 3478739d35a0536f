"""Mutation testing: does a test fail when a line of purestep is changed?

    pip install -c constraints.txt -e '.[dev,mutants]'
    python -m benchmarks.mutants_record                          # once: which tests run which lines (some minutes)
    python -m benchmarks.mutants src/purestep/_engine/run.py     # every position of a file, one mutant each
    python -m benchmarks.mutants --sample 1000 --seed 0          # positions drawn evenly from all files of `PARTS`
    python -m benchmarks.mutants --sample 1000 --seed 0 --only 17 23   # some mutants of that sample, by their numbers
    python -m benchmarks.mutants --sample 1000 --seed 0 --only 17 --tests tests/test_dealt.py     # with whole test files

The mutants are cosmic-ray's: one of its operators (`OPERATORS`), drawn for each position in the source. For each mutant the
tests that run its line (`benchmarks.mutants_record`) are run until one fails: first the quickest of each test function.

1. All test files are collected once. For each mutant the process forks; the child gives every function object of that file the
   mutated code, and runs the tests. This costs no import, but misses what happens at import.
2. A mutant that survives, or that changes no function, is tried again in a child that imports purestep anew with the mutated
   source, with more tests (`WIDE`), and with other cases of the same test functions.
3. Every test that killed a mutant is run without one, in a child as well: it must pass.

A mutant is killed if a test fails, if the import fails, or if the tests take much longer than without it (it loops). The
survivors are listed with their lines; `mutants_equivalent.txt` names those that change nothing that can be observed, and why.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import functools
import gc
import importlib.machinery
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import pytest
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

from benchmarks.mutants_record import ARGUMENTS, RECORD, ROOT, quick_hypothesis

SOURCE = ROOT / "src" / "purestep"
PARTS = ("_engine", "_executors", "_trace", "_optimizer", "transform.py", "compose.py", "algorithms")
EQUIVALENT = Path(__file__).with_name("mutants_equivalent.txt")
RESULTS = ROOT / "build" / "mutants_results.json"
QUICK, WIDE = (5.0, 60), (10.0, 250)  # at most so many seconds, and so many tests, in steps 1 and 2
PATIENCE = 20.0  # seconds beside four times what the tests take without a mutant

KINDS = (
    {"Add", "Sub", "Mul", "Div", "FloorDiv", "Mod", "Pow"},
    {"BitOr", "BitAnd", "BitXor"},
    {"Eq", "NotEq", "Lt", "LtE", "Gt", "GtE"},
    {"Is", "IsNot"},
)
"""Operators that replace one another. cosmic-ray has `x is None` -> `x == None`, too, which changes nothing, and `x + y` ->
`x << y`, which fails for every float."""


def sensible(name: str) -> bool:
    """Whether an operator of cosmic-ray's is used."""
    words = name.split("/")[1].split("_")
    if words[0] in ("ReplaceBinaryOperator", "ReplaceComparisonOperator"):
        return any([set(words[1:]) <= kind for kind in KINDS])
    return words[0] not in ("VariableReplacer", "VariableInserter")  # these need the names of variables


OPERATORS = {name: get_operator(name)() for name in operator_names() if sensible(name)}


@functools.cache
def mutated(file: str, operator: str, occurrence: int) -> str:
    made = mutate_code((ROOT / file).read_text(), OPERATORS[operator], occurrence)
    assert made is not None
    return made


class Mutant(NamedTuple):
    """One change of one file. `number` is its place in the sample."""

    number: int
    file: str
    line: int
    operator: str
    occurrence: int

    def source(self) -> str:
        return mutated(self.file, self.operator, self.occurrence)

    def diff(self) -> str:
        """The lines that differ."""
        both = [(ROOT / self.file).read_text().splitlines(), self.source().splitlines()]
        return "\n".join(
            [x for x in difflib.unified_diff(*both, n=0, lineterm="") if x[:3] not in ("---", "+++") and x[:2] != "@@"]
        )

    def key(self) -> str:
        """What names it in `mutants_equivalent.txt`: line numbers change, lines seldom."""
        return " ".join([self.file.removeprefix("src/purestep/"), *self.diff().split()])


class WithoutAnnotations(ast.NodeTransformer):
    """Annotations are not run: a mutant in one is none."""

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.returns = None
        self.generic_visit(node)
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AnnAssign:
        node.annotation = ast.Constant(0)
        self.generic_visit(node)
        return node


@functools.cache
def runs(source: str) -> str:
    return ast.dump(WithoutAnnotations().visit(ast.parse(source)))


def positions(file: str) -> list[list[tuple[int, str, int]]]:
    """For each position that operators apply to: the line, the operator, and how many positions of the operator come before."""
    found = defaultdict(list)
    nodes = list(ast_nodes(get_ast((ROOT / file).read_text())))
    for name, operator in OPERATORS.items():
        count = 0
        for node in nodes:
            for start, stop in operator.mutation_positions(node):
                found[start, stop].append((start[0], name, count))
                count += 1
    return [found[where] for where in sorted(found)]


def is_mutant(mutant: Mutant) -> bool:
    """Whether anything that is run differs."""
    try:
        return runs(mutant.source()) != runs((ROOT / mutant.file).read_text())
    except SyntaxError:
        return False


def drawn(files: list[str], sample: int | None, seed: int) -> Iterator[Mutant]:
    """A mutant of each position, or of `sample` positions: every beginning of the sample is spread evenly over the files."""
    every = [(file, options) for file in files for options in positions(file)]
    n = len(every)
    offset = random.Random(seed).random()
    golden = [int(n * ((offset + k * 0.6180339887498949) % 1)) for k in range(20 * n)]
    number = 0
    for index in dict.fromkeys(range(n) if sample is None else golden):
        file, options = every[index]
        mutant = Mutant(number, file, *random.Random(f"{seed} {file} {index}").choice(options))
        if number == sample:
            break
        if is_mutant(mutant):
            yield mutant
            number += 1


# ---------------------------------------------------------------------------------------------------------- which tests


class Record:
    """What `benchmarks.mutants_record` wrote."""

    def __init__(self) -> None:
        read = json.loads(RECORD.read_text())
        self.tests: list[str] = read["tests"]
        self.seconds: list[float] = read["seconds"]
        self.lines: dict[str, dict[str, list[int]]] = read["lines"]

    def covering(self, file: str, first: int, last: int) -> set[int]:
        own = self.lines.get(file, {})
        return {k for line in range(first, last + 1) for k in own.get(str(line), ())}

    def chosen(self, mutant: Mutant, seconds: float, most: int) -> list[int]:
        """The tests that run the line, or the least around it that a test runs: the quickest of each function come first."""
        tree = ast.parse((ROOT / mutant.file).read_text())
        around = [
            (node.lineno, node.end_lineno or node.lineno)
            for node in ast.walk(tree)
            if isinstance(node, ast.stmt) and node.lineno <= mutant.line <= (node.end_lineno or node.lineno)
        ]
        spans = [(mutant.line, mutant.line), *sorted(around, key=lambda span: span[1] - span[0]), (1, len(ast.unparse(tree)))]
        tests: set[int] = next((found for span in spans if (found := self.covering(mutant.file, *span))), set())
        word = Path(mutant.file).stem  # programs are cached: the second test of an algorithm does not run its leaf function
        tests |= {k for k, name in enumerate(self.tests) if word in re.split(r"\W+", name)}
        functions = defaultdict(list)
        for k in sorted(tests, key=lambda k: self.seconds[k]):
            functions[self.tests[k].partition("[")[0]].append(k)
        ranked = sorted([(rank, self.seconds[k], k) for own in functions.values() for rank, k in enumerate(own)])
        taken, total = [], 0.0
        for _, cost, k in ranked:
            if len(taken) < most and total + cost <= seconds:
                taken.append(k)
                total += cost
        return taken


# -------------------------------------------------------------------------------------------------------------- children


def in_child(work: Callable[[Callable[[str], None]], None], limit: float) -> str:
    """What a forked child says of its work: "survived", or what killed the mutant."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.setsid()
        os.close(reading)
        memory = 8 * 2**30
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)

        def say(text: str) -> None:
            os.write(writing, text.encode()[:4000])
            os._exit(0)

        try:
            work(say)
        except BaseException:  # a mutant may raise anything, at any time
            say("error: " + traceback.format_exc(limit=-1).replace("\n", " ")[-300:])
        say("survived")
    os.close(writing)
    ready, _, _ = select.select([reading], [], [], limit)
    said = os.read(reading, 4000).decode(errors="replace") if ready else "too long"
    os.close(reading)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return said or "died"


def codes(code: CodeType) -> Iterator[CodeType]:
    """Every code object in one, in the order of the source."""
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield inner
            yield from codes(inner)


class Swapper:
    """Step 1: a plugin that collects once, and forks for each mutant."""

    def __init__(self, record: Record, mutants: Iterable[Mutant], report: Callable[[Mutant, str], bool]) -> None:
        self.record, self.mutants, self.report = record, mutants, report

    def pytest_configure(self) -> None:
        quick_hypothesis()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        wanted = set(self.record.tests)
        items[:] = [x for x in items if x.nodeid in wanted]

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.items = {x.nodeid: x for x in session.items}
        self.functions = defaultdict(list)
        for x in gc.get_objects():
            if type(x) is FunctionType and x.__code__.co_filename.startswith(str(SOURCE)):
                self.functions[x.__code__.co_filename].append(x)
        gc.collect()
        gc.freeze()
        killers = set()
        for mutant in self.mutants:
            said = self.outcome(mutant)
            killers |= {said} & set(self.items)
            if not self.report(mutant, said):
                break
        for name in sorted(killers):  # step 3
            said = in_child(self.running([self.items[name]]), PATIENCE)
            if said != "survived":
                print(f"{name} fails without a mutant: {said}")
        return True

    def outcome(self, mutant: Mutant) -> str:
        chosen = self.record.chosen(mutant, *QUICK)
        items = [self.items[self.record.tests[k]] for k in chosen if self.record.tests[k] in self.items]
        path = str(ROOT / mutant.file)
        old, new = (list(codes(compile(x, path, "exec", dont_inherit=True))) for x in (Path(path).read_text(), mutant.source()))
        changed = (
            {x: y for x, y in zip(old, new) if x != y and len(x.co_freevars) == len(y.co_freevars)}
            if len(old) == len(new)
            else {}
        )
        swaps = [(x, changed[x.__code__]) for x in self.functions[path] if x.__code__ in changed]
        if not swaps or not items:
            return "survived: no function changed" if items else "survived: no test runs it"
        limit = PATIENCE + 4 * sum([self.record.seconds[k] for k in chosen])
        return in_child(self.running(items, swaps), limit)

    def running(self, items: list[pytest.Item], swaps: list[tuple[FunctionType, CodeType]] = []) -> Callable[..., None]:  # noqa: B006
        def work(say: Callable[[str], None]) -> None:
            for function, code in swaps:
                function.__code__ = code
            run(items, say)

        return work


def run(items: list[pytest.Item], say: Callable[[str], None]) -> None:
    """Run tests until one fails."""
    from _pytest.runner import runtestprotocol

    for item, after in zip(items, [*items[1:], None]):
        if any([report.failed for report in runtestprotocol(item, log=False, nextitem=after)]):
            say(item.nodeid)


class Importer:
    """Step 2: a plugin of a child that imports purestep anew, and takes only the chosen tests."""

    def __init__(self, names: list[str], word: str, say: Callable[[str], None]) -> None:
        self.names, self.word, self.say = names, word, say
        self.functions = {x.partition("[")[0].rpartition("::")[2] for x in names}

    def pytest_configure(self) -> None:
        quick_hypothesis()

    def pytest_pycollect_makeitem(self, collector: object, name: str, obj: object) -> list[Any] | None:
        """Do not make the thousands of cases of other test functions."""
        return [] if name.startswith("test_") and name not in self.functions else None

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.say(f"{report.nodeid} is not imported: {str(report.longrepr)[-200:]}")

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = {x.nodeid: x for x in session.items}
        run([items[x] for x in self.names if x in items], self.say)
        rest = [x for x in session.items if x.nodeid not in self.names]  # other cases of the same test functions
        random.Random(0).shuffle(rest)
        rest.sort(key=lambda x: self.word not in x.nodeid)  # first those of the algorithm that the file is named after
        end = time.monotonic() + WIDE[0]
        for item in rest:
            if time.monotonic() < end:
                run([item], self.say)
        return True


def imported_anew(record: Record, mutant: Mutant) -> str:
    chosen = record.chosen(mutant, *WIDE)
    names = [record.tests[k] for k in chosen]
    original = importlib.machinery.SourceFileLoader.get_code

    def get_code(self: Any, name: str) -> Any:
        path = str(ROOT / mutant.file)
        return compile(mutant.source(), path, "exec", dont_inherit=True) if self.path == path else original(self, name)

    def work(say: Callable[[str], None]) -> None:
        importlib.machinery.SourceFileLoader.get_code = get_code  # type: ignore[assignment]
        files = list(dict.fromkeys([x.partition("::")[0] for x in names]))
        options = ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
        code = pytest.main(
            [*options, *ARGUMENTS[: ARGUMENTS.index("tests")], *files], plugins=[Importer(names, Path(mutant.file).stem, say)]
        )
        if code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            say(f"pytest ends with {code!r}")

    return (
        in_child(work, 2 * PATIENCE + 2 * WIDE[0] + 4 * sum([record.seconds[k] for k in chosen]))
        if names
        else "survived: no test runs it"
    )


def with_files(mutant: Mutant, tests: list[str]) -> str:
    """The outcome of whole test files, in processes that import a copy of the source: for lines that run in other processes."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "src", folder, dirs_exist_ok=True)
        (Path(folder) / mutant.file.removeprefix("src/")).write_text(mutant.source())
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", *tests]
        try:
            done = subprocess.run(
                command, cwd=ROOT, env={**os.environ, "PYTHONPATH": folder}, capture_output=True, text=True, timeout=900
            )
        except subprocess.TimeoutExpired:
            return "too long"
    failed = [x for x in done.stdout.splitlines() if x.startswith(("FAILED", "ERROR"))]
    return "survived" if done.returncode == 0 else (failed or [f"pytest ends with {done.returncode}"])[0]


# ---------------------------------------------------------------------------------------------------------------- report


def equivalents() -> dict[str, str]:
    """The mutants that change nothing, by their keys, and the reasons: each paragraph of the file ends with the reason."""
    found = {}
    for block in EQUIVALENT.read_text().split("\n\n") if EQUIVALENT.exists() else ():
        lines = [x for x in block.strip().splitlines() if not x.startswith("#")]
        if lines:
            found[" ".join(" ".join(lines[:-1]).split())] = lines[-1].strip()
    return found


def part(file: str) -> str:
    return file.removeprefix("src/purestep/").partition("/")[0]


def table(outcomes: list[tuple[Mutant, str]], rows: Callable[[str], str]) -> str:
    known = equivalents()
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for mutant, said in outcomes:
        kind = "killed" if not said.startswith("survived") else "equivalent" if mutant.key() in known else "survived"
        for row in (rows(mutant.file), "all"):
            counts[row][kind] += 1
            counts[row]["mutants"] += 1
    columns = ("mutants", "killed", "equivalent", "survived")
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    order = [*sorted([x for x in counts if x != "all"]), "all"]
    lines += [f"| {row} | " + " | ".join([str(counts[row][x]) for x in columns]) + " |" for row in order]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*")
    parser.add_argument("--sample", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of mutants in the sample")
    parser.add_argument("--skip", type=int, default=0, help="leave out the first mutants of the sample")
    parser.add_argument("--fresh", action="store_true", help="leave out step 1")
    parser.add_argument("--tests", nargs="*", help="instead of the steps, run these test files for each mutant")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no mutant after so many minutes")
    arguments = parser.parse_args()
    end = time.monotonic() + 60 * arguments.minutes
    files = arguments.files or [
        str(path.relative_to(ROOT))
        for name in PARTS
        for path in sorted([SOURCE / name, *(SOURCE / name).rglob("*.py")])
        if path.is_file()
    ]
    chosen = (
        x
        for x in drawn(files, arguments.sample, arguments.seed)
        if x.number >= arguments.skip and (not arguments.only or x.number in arguments.only)
    )
    if arguments.tests:
        for mutant in chosen:
            text = with_files(mutant, arguments.tests)
            print(f"\n{mutant.number}: {mutant.file}:{mutant.line} {mutant.operator} ({text})\n{mutant.diff()}", flush=True)
        return
    record = Record()
    results = RESULTS.with_suffix(".tmp")
    if arguments.fresh:
        found = [(x, "survived") for x in chosen]
    else:
        child = os.fork()  # which imports purestep; this process does not
        if child == 0:
            with results.open("w") as written:

                def report(mutant: Mutant, text: str) -> bool:
                    print(json.dumps([*mutant, text]), file=written, flush=True)
                    return time.monotonic() < end

                options = ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
                pytest.main([*options, *ARGUMENTS], plugins=[Swapper(record, chosen, report)])
            sys.stdout.flush()
            os._exit(0)
        os.waitpid(child, 0)
        found = [(Mutant(*rest), text) for *rest, text in map(json.loads, results.read_text().splitlines())]

    import torch
    import torch._dynamo  # noqa: F401

    known, outcomes = equivalents(), []
    for mutant, text in found:
        if text.startswith("survived") and mutant.key() not in known:
            text = imported_anew(record, mutant)
            if text.startswith("survived"):
                print(f"\n{mutant.number}: {mutant.file}:{mutant.line} {mutant.operator} ({text})\n{mutant.diff()}", flush=True)
        outcomes.append((mutant, text))
    RESULTS.write_text(json.dumps([[*mutant, text] for mutant, text in outcomes], indent=0))
    print("\n" + table(outcomes, str if len(files) < 10 else part))


if __name__ == "__main__":
    main()
