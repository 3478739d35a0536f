"""Which tests run which lines of purestep, and how long they take: what `benchmarks.mutants` chooses tests by.

    python -m benchmarks.mutants_record

runs tests in this process, with coverage's dynamic contexts, and writes `build/mutants.json`. Left out are the files of
`LEFT_OUT`, whose work is done in other processes or by a compiler, all but `PER_FILE` tests of a file, and tests that take
longer than `LONGEST` seconds (after two of them the rest of their test function). The order of the files is
drawn by a seed, for `--minutes`.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Generator
from pathlib import Path
from types import FrameType

import coverage
import pytest

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "build" / "mutants.json"
LEFT_OUT = (
    "test_distributed.py", "test_dealt.py", "test_replicas.py", "test_sharded_checkpoints.py", "test_layouts.py",
    "test_plan.py", "test_learned.py", "test_compiled.py", "test_readme.py", "test_guide.py", "test_optax_page.py",
    "test_house.py", "test_public.py", "test_internals.py", "test_pickles.py",
)  # fmt: skip
PER_FILE, LONGEST, SEED = 60, 1.0, 0
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
        self.coverage = coverage.Coverage(data_file=None, source=[str(ROOT / "src" / "purestep")], config_file=False)
        self.coverage.start()  # before purestep is imported: lines that run at import have the empty context
        self.seconds: dict[str, float] = {}
        self.slow: Counter[str] = Counter()

    def pytest_configure(self) -> None:
        quick_hypothesis()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        files = defaultdict(list)
        for item in items:
            if not item.get_closest_marker("skip") and not item.get_closest_marker("gpu"):
                files[item.path].append(item)
        drawn = random.Random(SEED)
        own = [x if len(x) <= PER_FILE else drawn.sample(x, PER_FILE) for x in files.values()]
        items[:] = [x for tests in drawn.sample(own, len(own)) for x in tests]  # file by file: fixtures belong to modules

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, object, object]:
        function = item.nodeid.partition("[")[0]

        def stop(number: int, frame: FrameType | None) -> None:
            self.slow[function] += 1
            raise TooLongError

        if time.monotonic() > self.end:
            item.session.shouldstop = "the minutes are over"
        if self.slow[function] > 1 or time.monotonic() > self.end:
            pytest.skip("too long")
        self.coverage.switch_context(item.nodeid)
        signal.signal(signal.SIGALRM, stop)
        if not hasattr(getattr(item, "obj", None), "hypothesis"):  # Hypothesis cannot be interrupted
            signal.setitimer(signal.ITIMER_REAL, LONGEST)
        start = time.perf_counter()
        try:
            result = yield
            self.seconds[item.nodeid] = round(time.perf_counter() - start, 4)  # a test that fails or takes too long is not kept
            return result
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            self.coverage.switch_context("")

    def pytest_sessionfinish(self) -> None:
        self.coverage.stop()
        data = self.coverage.get_data()
        tests = sorted(self.seconds)
        index = {name: k for k, name in enumerate(tests)}
        lines = {
            str(Path(file).relative_to(ROOT)): {
                line: [index[x] for x in names if x in index] for line, names in data.contexts_by_lineno(file).items()
            }
            for file in data.measured_files()
        }
        RECORD.parent.mkdir(exist_ok=True)
        RECORD.write_text(json.dumps({"tests": tests, "seconds": [self.seconds[x] for x in tests], "lines": lines}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=60.0, help="begin no test after so many minutes")
    raise SystemExit(pytest.main(ARGUMENTS, plugins=[Recorder(parser.parse_args().minutes)]))
