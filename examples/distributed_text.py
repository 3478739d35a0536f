"""
Muon and AdamW on sharded parameters
====================================

Trains a small character-level transformer on several processes, its parameters sharded by torch's ``fully_shard`` (FSDP2), with
one optimizer of three parts: Muon on the hidden matrices, Muon on the fused projections of attention, which are three matrices
each, and AdamW on all else. Nothing about the optimizer says that there is more than one process: each matrix is
orthogonalized by one of them, its owner, and everything else happens where the parts are.

Run it with::

    torchrun --nproc-per-node 2 examples/distributed_text.py
    torchrun --nproc-per-node 4 examples/distributed_text.py --resume

The first trains for 200 steps and leaves a checkpoint in the middle; the second goes on from there, on another number of
processes. Run with ``python``, it does both by itself, the second on one process. It takes a minute or two on two cores. At the
end it trains once more without sharding, in one process, and prints a table. It raises an error if the losses differ.
"""

import argparse
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from pydoc_data.topics import topics
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from tqdm import tqdm

import purestep as ps
from purestep import optim

SEED = 0
CONTEXT, BATCH_SIZE = 64, 24  # characters, and windows of them in all processes together
WIDTH, HEADS, LAYERS = 96, 4, 3
CHECKPOINT = Path(__file__).resolve().parent / "output" / "distributed_text"
AGREE = 2e-2  # how far losses may be apart, relative: Muon rounds to bfloat16, and rounding errors grow from step to step


# %%
# The text and the model
# ----------------------
# Python's reference manual, and a transformer as small as they come, as in ``muon_adamw.py``.


def load_text() -> tuple[Tensor, int]:
    text = "\n\n".join(topics[name] for name in sorted(topics))
    place = {c: i for i, c in enumerate(sorted(set(text)))}
    return torch.tensor([place[c] for c in text]), len(place)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
        x = x + self.out(seen)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(size, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*[Block() for _ in range(LAYERS)])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, size)
        for table in (self.embedding, self.position):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, codes: Tensor) -> Tensor:
        x = self.embedding(codes) + self.position(torch.arange(codes.shape[1], device=codes.device))
        return self.head(self.norm(self.blocks(x)))


# %%
# The optimizer
# -------------
# A rule says what each parameter is. ``as_matrices`` says what the fused projections are made of.

RULE = ps.by_path(
    {r"^blocks\.\d+\.qkv\.": ps.by_ndim({2: "fused"}, default="rest"), r"^blocks\.": ps.by_ndim({2: "hidden"}, default="rest")},
    default="rest",
)


def make_optimizer(model: nn.Module) -> optim.Optimizer:
    muon = ps.muon(lr=0.02, weight_decay=0.01)
    parts = {"hidden": muon, "fused": ps.as_matrices(muon, split=3), "rest": ps.adamw(lr=3e-3, betas=(0.9, 0.99))}
    return optim.Optimizer(model.named_parameters(), ps.chain(ps.clip_by_global_norm(1.0), ps.partition(parts, RULE)))


# %%
# What is sent
# ------------
# While the optimizer steps, the messages between processes are counted.


@dataclass
class Traffic:
    """The messages of one process."""

    messages: dict[str, int] = field(default_factory=dict)
    bytes: int = 0


@contextmanager
def counted() -> Iterator[Traffic]:
    traffic = Traffic()

    def counting(name: str, send: Callable[..., Any], place: int) -> Callable[..., Any]:
        def sending(*args: Any, **kwargs: Any) -> Any:
            traffic.messages[name] = traffic.messages.get(name, 0) + 1
            traffic.bytes += args[place].nbytes
            return send(*args, **kwargs)

        return sending

    places = {"all_to_all_single": 1, "all_reduce": 0}  # which argument is what is sent
    before = {name: getattr(dist, name) for name in places}
    for name, place in places.items():
        setattr(dist, name, counting(name, before[name], place))
    try:
        yield traffic
    finally:
        for name, send in before.items():
            setattr(dist, name, send)


# %%
# Training
# --------


@dataclass
class Run:
    """What is written down while a network trains."""

    losses: list[float] = field(default_factory=list)
    forward_ms: list[float] = field(default_factory=list)  # and backward
    step_ms: list[float] = field(default_factory=list)
    traffic: Traffic = field(default_factory=Traffic)


def batch(codes: Tensor, step: int) -> Tensor:
    """The windows of a step, the same in every process."""
    starts = torch.randint(len(codes) - CONTEXT, (BATCH_SIZE,), generator=torch.Generator().manual_seed(SEED + step))
    return torch.stack([codes[s : s + CONTEXT + 1] for s in starts])


def train(model: nn.Module, optimizer: optim.Optimizer, steps: range, save_at: int | None, show: bool) -> Run:
    codes, _ = load_text()
    rank, size = (dist.get_rank(), dist.get_world_size()) if save_at is not None else (0, 1)
    run = Run()
    with tqdm(steps, desc="sharded" if save_at is not None else "in one piece", unit="step", disable=not show) as bar:
        for step in bar:
            begun = time.perf_counter()
            optimizer.zero_grad()
            windows = batch(codes, step).chunk(size)[rank]
            loss = F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
            loss.backward()
            between = time.perf_counter()
            with counted() as traffic:
                optimizer.step()
            run.step_ms.append((time.perf_counter() - between) * 1e3)
            run.forward_ms.append((between - begun) * 1e3)
            run.traffic = traffic
            mean = loss.detach()
            if size > 1:
                dist.all_reduce(mean, dist.ReduceOp.AVG if dist.get_backend() == "nccl" else dist.ReduceOp.SUM)
                mean = mean if dist.get_backend() == "nccl" else mean / size
            run.losses.append(mean.item())
            bar.set_postfix(loss=f"{run.losses[-1]:.3f}", refresh=False)
            if step + 1 == save_at:
                save(model, optimizer, step + 1)
    return run


def save(model: nn.Module, optimizer: optim.Optimizer, step: int) -> None:
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state, "step": step}, checkpoint_id=CHECKPOINT)


def load(model: nn.Module, optimizer: optim.Optimizer) -> int:
    """The step that the checkpoint was made after; each process reads its parts of what others may have written."""
    weights, state = get_state_dict(model, optimizer)
    saved = {"model": weights, "optimizer": state, "step": 0}
    dcp.load(saved, checkpoint_id=CHECKPOINT)
    set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
    return int(saved["step"])


def new_model() -> Transformer:
    torch.manual_seed(SEED)
    return Transformer(load_text()[1])


# %%
# What came of it
# ---------------


def print_table(run: Run, single: Run, first: int, size: int) -> None:
    apart = max(abs(a - b) / b for a, b in zip(run.losses, single.losses[first:]))
    messages = ", ".join(f"{count} {name}" for name, count in sorted(run.traffic.messages.items())) or "none"
    print(f"\n{'':<22} {'sharded over ' + str(size):>16} {'in one process':>16}")
    print(f"{'loss of the last step':<22} {run.losses[-1]:>16.4f} {single.losses[-1]:>16.4f}")
    print(f"{'forward, backward':<22} {median(run.forward_ms):>13.1f} ms {median(single.forward_ms):>13.1f} ms")
    print(f"{'optimizer.step()':<22} {median(run.step_ms):>13.1f} ms {median(single.step_ms):>13.1f} ms")
    print(f"{'bytes sent in it':<22} {run.traffic.bytes:>16,} {0:>16}")
    print(f"\nmessages of each process in a step of the optimizer: {messages}")
    print(f"losses of {len(run.losses)} steps, from {first} on, differ by at most {apart:.1e} of their value")
    if not apart <= AGREE:  # so that NaN fails, too
        raise RuntimeError(f"Losses must agree to within {AGREE:g}, but differ by {apart:.2g}.")


def process(steps: int, resume: bool) -> None:
    """What each process does."""
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # nothing is done to the logits in place
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    torch.set_num_threads(1)
    try:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        model = new_model()
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer = make_optimizer(model)
        first = load(model, optimizer) if resume else 0
        leader = dist.get_rank() == 0
        if leader and resume:
            print(f"on from step {first}, on {dist.get_world_size()} process(es)")
        run = train(model, optimizer, range(first, steps), 0 if resume else steps // 2, leader)
        if leader:
            whole = new_model()
            single = train(whole, make_optimizer(whole), range(steps), None, True)
            print_table(run, single, first, dist.get_world_size())
        dist.barrier()
    finally:
        dist.destroy_process_group()


def launch(processes: int, arguments: list[str]) -> None:
    """What ``torchrun`` does, on this machine alone."""
    environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **os.environ}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-addr", "127.0.0.1"]
    command += ["--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", __file__, *arguments]
    subprocess.run(command, env=environment, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a sharded transformer with Muon and AdamW in one optimizer.")
    parser.add_argument("--short", action="store_true", help="16 steps instead of 200")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    options = parser.parse_args()
    if dist.is_torchelastic_launched():
        process(16 if options.short else 200, options.resume)
        return
    given = ["--short"] * options.short
    launch(2, given)
    print("\nand on from the middle, on one process:")
    launch(1, [*given, "--resume"])


if __name__ == "__main__":
    main()
