"""Which tests run which lines of purestep, and how long they take: what `benchmarks.mutants` chooses tests by.

    python -m benchmarks.mutants_record

runs tests in this process with a trace function, and writes `build/mutants.json`. Left out are the files of `LEFT_OUT`, whose
work is done in other processes or by a compiler, all but `PER_FUNCTION` cases of a test function, drawn by a seed, and tests
that take longer than `LONGEST` seconds. First comes one case of every test function,
so that `--minutes` leaves something of each.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Generator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "build" / "mutants.json"
LEFT_OUT = (
    "test_distributed.py", "test_dealt.py", "test_replicas.py", "test_sharded_checkpoints.py", "test_layouts.py",
    "test_plan.py", "test_learned.py", "test_compiled.py", "test_readme.py", "test_guide.py", "test_coming_from.py",
    "test_house.py", "test_public.py", "test_internals.py", "test_pickles.py",
)  # fmt: skip
SOURCE = str(ROOT / "src" / "purestep")
PER_FUNCTION, LONGEST, SEED = 2, 1.0, 0
ARGUMENTS = [
    "-n", "0", "-p", "no:cacheprovider", "-p", "no:randomly", "-q", "-s", "--tb=line",
    *[f"--ignore=tests/{name}" for name in LEFT_OUT], "--ignore=tests/frameworks", "tests", "src",
]  # fmt: skip


def quick_hypothesis() -> None:
    """A generated test that fails does not look for a smaller example, and does not remember it."""
    import hypothesis  # not earlier: pytest rewrites its assertions

    phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
    hypothesis.settings.register_profile("mutants", database=None, derandomize=True, deadline=None, phases=phases)
    hypothesis.settings.load_profile("mutants")


class TooLongError(Exception):
    """A test took longer than `LONGEST`."""


class Recorder:
    """The plugin that records."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes
        self.seconds: dict[str, float] = {}
        self.lines: defaultdict[str, defaultdict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        self.slow: Counter[str] = Counter()

    def pytest_configure(self) -> None:
        quick_hypothesis()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        functions = defaultdict(list)
        for item in items:
            if not item.get_closest_marker("skip") and not item.get_closest_marker("gpu"):
                functions[item.nodeid.partition("[")[0]].append(item)
        drawn = random.Random(SEED)
        own = [drawn.sample(x, min(len(x), PER_FUNCTION)) for x in functions.values()]
        items[:] = [x[rank] for rank in range(PER_FUNCTION) for x in own if rank < len(x)]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, object, object]:
        function = item.nodeid.partition("[")[0]

        def stop(number: int, frame: FrameType | None) -> None:
            self.slow[function] += 1
            raise TooLongError

        if time.monotonic() > self.end:
            item.session.shouldstop = "the minutes are over"
        if self.slow[function] > 0 or time.monotonic() > self.end:
            pytest.skip("too long")
        seen: set[tuple[str, int]] = set()

        def line(frame: FrameType, event: str, argument: object) -> Any:
            seen.add((frame.f_code.co_filename, frame.f_lineno))
            return line

        def call(frame: FrameType, event: str, argument: object) -> Any:
            return line if frame.f_code.co_filename.startswith(SOURCE) else None

        signal.signal(signal.SIGALRM, stop)
        if not hasattr(getattr(item, "obj", None), "hypothesis"):  # Hypothesis cannot be interrupted
            signal.setitimer(signal.ITIMER_REAL, LONGEST)
        start = time.perf_counter()
        sys.settrace(call)
        try:
            result = yield
        finally:
            sys.settrace(None)
            signal.setitimer(signal.ITIMER_REAL, 0)
        for file, number in seen:  # a test that fails or takes too long is not kept
            self.lines[str(Path(file).relative_to(ROOT))][number].append(len(self.seconds))
        self.seconds[item.nodeid] = round(time.perf_counter() - start, 4)
        return result

    def pytest_sessionfinish(self) -> None:
        RECORD.parent.mkdir(exist_ok=True)
        RECORD.write_text(json.dumps({"tests": [*self.seconds], "seconds": [*self.seconds.values()], "lines": self.lines}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=60.0, help="begin no test after so many minutes")
    raise SystemExit(pytest.main(ARGUMENTS, plugins=[Recorder(parser.parse_args().minutes)]))
