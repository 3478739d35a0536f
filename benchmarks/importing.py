"""How long it takes to import purestep, beyond torch: the best of ten processes, and the modules that take longest.

    python -m benchmarks.importing
    python -m benchmarks.importing --processes 3

Python's own `-X importtime` measures it, with the bytecode of all modules cached. torch is imported before. The garbage
collector looks through all of torch's objects (for some 70 ms) when enough others have come that it is due, which purestep's
are. It is measured with that pass, and without, where torch's objects have been set aside (`gc.freeze`).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from typing import NamedTuple

CODE = {
    "in all, beyond torch": "import torch; import purestep",
    "without a pass of the garbage collector over torch": "import torch, gc; gc.freeze(); import purestep",
}


class Module(NamedTuple):
    """A module, and the milliseconds that it took by itself and with all that it imported."""

    name: str
    own: float
    all: float


def measure(folder: str, code: str) -> list[Module]:
    """The modules that purestep imports, in one new process that runs this code."""
    environment = {k: x for k, x in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | {"PYTHONPYCACHEPREFIX": folder}
    command = [sys.executable, "-X", "importtime", "-c", code]
    lines = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stderr.splitlines()
    rows = [line.removeprefix("import time:").split("|") for line in lines if line.startswith("import time:")]
    found = [Module(name.strip(), int(own) / 1e3, int(everything) / 1e3) for own, everything, name in rows[1:]]
    names = [module.name for module in found]
    return found[names.index("torch") + 1 : names.index("purestep") + 1]


def best(processes: int, code: str) -> list[Module]:
    """The modules in the fastest of some processes, behind one that writes their bytecode."""
    with tempfile.TemporaryDirectory() as folder:
        measure(folder, code)
        return min([measure(folder, code) for _ in range(processes)], key=lambda modules: modules[-1].all)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how long it takes to import purestep, beyond torch.")
    parser.add_argument("--processes", type=int, default=10)
    processes = parser.parse_args().processes
    for name, code in CODE.items():
        modules = best(processes, code)
        print(f"{modules[-1].all:8.1f} ms  {name}")
    own = [m for m in modules if m.name.split(".")[0] == "purestep"]
    others = [m for m in modules if m not in own]
    print(f"{sum(m.own for m in own):8.1f} ms  {len(own)} modules of purestep's")
    print(f"{sum(m.own for m in others):8.1f} ms  {len(others)} others")
    for module in sorted(modules, key=lambda m: -m.own)[:12]:
        print(f"{module.own:8.1f} ms  {module.name}")


if __name__ == "__main__":
    main()
