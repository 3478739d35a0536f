"""The time of an elementwise step on sharded parameters, over that of the same step on the tensors they are made of.

    python -m benchmarks.sharded
    python -m benchmarks.sharded --sets mlp --algorithms nadam --seconds 5

The parameters are `DTensor`s on a mesh of one process, whose part is all of each; the others are plain parameters of the same
numbers. `optimizer.step()` of the two takes turns, in an order that is shuffled anew in each round, and the figures are medians
over the rounds, with interquartile ranges. The ratio is what it costs that the parameters are sharded, and should be near 1:
nothing is sent. That is counted, too.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any

# The profiler announces itself on stderr.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")

import torch
import torch.distributed as dist
from torch import nn

import purestep as ps
from purestep import optim

SETS: dict[str, list[tuple[int, ...]]] = {
    "mlp": [(128, 64), (128,), (128, 128), (128,), (10, 128), (10,)],
    "many": [(32, 32), (32,)] * 400,
    "large": [(1024, 1024)] * 40,
}
ALGORITHMS: dict[str, Callable[[], ps.Transform]] = {
    "adamw": lambda: ps.adamw(1e-3),
    "sgd": lambda: ps.sgd(1e-3, momentum=0.9),
    "nadam": lambda: ps.nadam(1e-3),
}
WARM_UP, FEWEST = 5, 10


def spread(x: torch.Tensor, mesh: Any) -> Any:
    """A tensor as one that is sharded by its rows."""
    from torch.distributed.tensor import DTensor, Shard

    return DTensor.from_local(x, mesh, [Shard(0)], run_check=False)


def optimizers(name: str, shapes: list[tuple[int, ...]], mesh: Any) -> dict[str, Any]:
    """One on plain parameters, and one on sharded ones."""
    found = {}
    for kind in ("plain", "sharded"):
        g = torch.Generator().manual_seed(0)
        values = [(torch.randn(s, generator=g), torch.randn(s, generator=g)) for s in shapes]
        if kind == "sharded":
            values = [(spread(p, mesh), spread(x, mesh)) for p, x in values]
        params = [nn.Parameter(p) for p, _ in values]
        for p, (_, x) in zip(params, values):
            p.grad = x
        found[kind] = optim.Optimizer([(str(k), p) for k, p in enumerate(params)], ALGORITHMS[name]())
    return found


def measure(both: dict[str, Any], seconds: float) -> dict[str, list[float]]:
    """The milliseconds of each step, by turns."""
    for optimizer in both.values():
        for _ in range(WARM_UP):
            optimizer.step()
    times: dict[str, list[float]] = {kind: [] for kind in both}
    end, order = perf_counter() + seconds, list(both)
    while perf_counter() < end or len(times[order[0]]) < FEWEST:
        random.shuffle(order)
        for kind in order:
            begin = perf_counter()
            both[kind].step()
            times[kind].append(1e3 * (perf_counter() - begin))
    return times


def messages(optimizer: Any) -> int:
    """How many messages one step sends."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    return sum([x.count for x in profile.key_averages() if x.key.startswith("gloo:")])


def iqr(times: list[float]) -> float:
    low, _, high = quantiles(times, n=4)
    return high - low


def main() -> None:
    parser = argparse.ArgumentParser(description="The time of a step on sharded parameters, over that on plain ones.")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS))
    parser.add_argument("--seconds", type=float, default=10.0, help="for each row")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(str(Path(folder) / "store"), 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=timedelta(seconds=60))
        try:
            mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
            print(f"{'':14}{'plain ms':>18}{'sharded ms':>18}{'ratio':>8}{'messages':>10}")
            for name in options.sets:
                for algorithm in options.algorithms:
                    both = optimizers(algorithm, SETS[name], mesh)
                    times = measure(both, options.seconds)
                    plain, sharded = (median(times[kind]) for kind in ("plain", "sharded"))
                    cells = [f"{m:9.3f} ± {iqr(times[kind]):6.3f}" for m, kind in ((plain, "plain"), (sharded, "sharded"))]
                    text = f"{name + ' ' + algorithm:14}{cells[0]:>18}{cells[1]:>18}{sharded / plain:8.2f}"
                    print(f"{text}{messages(both['sharded']):10}", flush=True)
        finally:
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
