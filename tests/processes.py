"""Functions run by several processes that talk to each other: on this machine, over gloo, and never for longer than they may.

`run` starts them, waits, and leaves none behind. In each, `main` is what a new interpreter begins with.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).parent.parent
EACH = 60
"""A collective that takes so many seconds is stuck."""


def run(size: int, function: str, folder: Path, *, seconds: float = 480.0) -> list[Any]:
    """What a function, ``module:name``, returns in each of so many processes. It is given the rank and the number of them.

    Raises:
        AssertionError: one of them failed, or took too long; with what it had to say.
    """
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "ignore", "-m", "tests.processes", function, str(size), str(folder)]
    logs = [(folder / f"log{rank}").open("w+") for rank in range(size)]
    started = [
        subprocess.Popen([*command, str(rank)], cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)
        for rank, log in enumerate(logs)
    ]
    try:
        deadline = time.monotonic() + seconds
        while any(p.poll() is None for p in started):
            failed = [rank for rank, p in enumerate(started) if p.poll()]
            assert not failed, said(logs, failed)
            assert time.monotonic() < deadline, f"stuck after {seconds} s.\n{said(logs, range(size))}"
            time.sleep(0.05)
        failed = [rank for rank, p in enumerate(started) if p.poll()]
        assert not failed, said(logs, failed)
    finally:
        for p in started:
            if p.poll() is None:
                p.kill()
            p.wait()
        for log in logs:
            log.close()
    return [torch.load(folder / f"result{rank}", weights_only=False) for rank in range(size)]


def said(logs: Sequence[Any], ranks: Sequence[int] | range) -> str:
    """The last lines that processes have printed."""
    texts = []
    for rank in ranks:
        logs[rank].seek(0)
        texts.append(f"process {rank}:\n{logs[rank].read()[-4000:]}")
    return "\n".join(texts)


def main(function: str, size: str, folder: str, rank: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", int(size))
    dist.init_process_group(
        "gloo", store=store, rank=int(rank), world_size=int(size), timeout=timedelta(seconds=EACH)
    )  # fmt: skip
    module, name = function.split(":")
    try:
        result = getattr(importlib.import_module(module), name)(int(rank), int(size))
    except BaseException:
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # the others would wait for it
    torch.save(result, f"{folder}/result{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
