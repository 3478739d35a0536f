"""
Kill and resume
===============

Machines are taken away, processes are killed, disks fill up. This example trains a network in a process of its own, kills that
process with ``SIGKILL`` at random moments, twenty times, and starts it again each time. Once it also tears the newest
checkpoint in two. The run that went through all this ends with the weights, the optimizer's state and the losses of a run
that nobody disturbed, bit for bit.

It takes four things, each a few lines that can be copied:

- a checkpoint is *everything that the next step depends on*: the weights, the optimizer's ``state_dict``, the state of every
  random generator, and the number of the step. The learning rate's schedule belongs to the optimizer, and needs no entry;
- it is written to another file, which then *takes the name* of the checkpoint at once: whoever looks finds the old one or the
  new one, and never half of one;
- it begins with a *digest* of what follows, so that a torn file is noticed when it is read;
- the last *two* are kept, so that there is one before it.

Run it with::

    python examples/kill_and_resume.py

It takes two minutes, prints a table of the interruptions, and saves a picture of the losses. It raises an error if a single bit
differs.
"""

import argparse
import hashlib
import io
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # draws into a file, so it also works where there is no screen
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

import purestep as ps

SEED = 0
BATCH_SIZE = 64
STEPS = 4000
KILLS = 20
SAVE_EVERY = 5  # steps: a process loses as many at most
PICTURE = Path(__file__).resolve().parent / "output" / "kill_and_resume.png"

DIGEST_BYTES = hashlib.sha256().digest_size


# %%
# Checkpoints
# -----------


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint. Whenever the process dies, the file of this name is whole, or not there."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    data = buffer.getvalue()
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        file.write(hashlib.sha256(data).digest() + data)
        file.flush()
        os.fsync(file.fileno())  # the bytes are on the disk before the name is
    part.replace(path)


def load(path: Path) -> dict[str, Any] | None:
    """What was saved; None if the file is not what was written."""
    data = path.read_bytes()
    if hashlib.sha256(data[DIGEST_BYTES:]).digest() != data[:DIGEST_BYTES]:
        return None
    content: dict[str, Any] = torch.load(io.BytesIO(data[DIGEST_BYTES:]), weights_only=True)
    return content


def checkpoints(directory: Path) -> list[Path]:
    """The checkpoints that are there, the newest first."""
    return sorted(directory.glob("*.pt"), reverse=True)


def newest(directory: Path) -> dict[str, Any] | None:
    """The newest checkpoint that is whole."""
    for path in checkpoints(directory):
        content = load(path)
        if content is not None:
            return content
        print(f"torn: {path.name}", flush=True)
    return None


# %%
# Training
# --------
# Matrices are trained with Muon and everything else with AdamW, on one schedule, behind a clipped norm. Dropout and the batches
# draw random numbers from two generators.


def make() -> tuple[nn.Module, ps.optim.Optimizer]:
    torch.manual_seed(SEED)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Dropout(0.2), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 10))
    lr = ps.schedules.warmup_cosine(1e-2, warmup_steps=100, total_steps=STEPS)
    parts = {"matrices": ps.muon(lr), "others": ps.adamw(lr)}
    transform = ps.chain(
        ps.clip_by_global_norm(1.0),
        ps.partition(parts, ps.by_ndim({2: "matrices"}, default="others")),
    )
    return model, ps.optim.Optimizer(model.named_parameters(), transform)


def train(steps: int, directory: Path, tell: Callable[[int], object]) -> dict[str, Any]:
    """Train up to this step, from the newest checkpoint if there is one; what the last checkpoint holds.

    `tell` is called with the number of steps that have been made, first with that of the checkpoint.
    """
    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    images = images.float() / 16  # pixels are 0 to 16
    model, optimizer = make()
    batches = torch.Generator().manual_seed(SEED)
    losses = torch.full((steps,), torch.nan)
    begin = 0

    saved = newest(directory)
    if saved is not None:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        batches.set_state(saved["batches"])
        torch.set_rng_state(saved["torch"])
        losses[: saved["step"]] = saved["losses"]
        begin = saved["step"]

    tell(begin)
    content: dict[str, Any] = {}
    for step in range(begin, steps):
        rows = torch.randint(len(images), (BATCH_SIZE,), generator=batches)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images[rows]), labels[rows])
        loss.backward()
        optimizer.step()
        losses[step] = loss.detach()
        done = step + 1
        if done % SAVE_EVERY == 0 or done == steps:
            content = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "batches": batches.get_state(),
                "torch": torch.get_rng_state(),
                "losses": losses[:done].clone(),
                "step": done,
            }
            save(directory / f"{done:08d}.pt", content)
            for old in checkpoints(directory)[2:]:
                old.unlink()
        tell(done)
    return content


# %%
# Killing
# -------


@dataclass(frozen=True)
class Interruption:
    begun: int  # the step at which the process began
    killed: int  # the last step that it told of
    saved: int  # the step of the newest checkpoint when it was killed
    writing: bool  # whether it was killed while it wrote a checkpoint
    torn: bool  # whether the newest checkpoint was torn afterwards


def start(steps: int, directory: Path) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--worker", str(directory), "--steps", str(steps)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def listen(process: subprocess.Popen[str]) -> Iterator[int]:
    """The steps that a process tells of, the first of which is the one at which it begins."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step "):
            yield int(line.removeprefix("step "))


def interrupt(steps: int, kills: int, directory: Path) -> list[Interruption]:
    """Train in processes that are killed, and in a last one that is not."""
    chance = random.Random(SEED)
    found: list[Interruption] = []
    torn = False
    with tqdm(total=steps, desc="interrupted", unit="step") as bar:
        while len(found) < kills:
            process = start(steps, directory)
            said = listen(process)
            begun = next(said)
            if found and (begun >= found[-1].saved if found[-1].torn else begun != found[-1].saved):
                raise RuntimeError(f"A process began at step {begun}, which is not that of the newest whole checkpoint.")
            many = chance.randrange(2 * (steps - begun) // (kills - len(found) + 1))  # on average, all make as many steps
            killed = next((step for step in said if step >= begun + many), begun)
            time.sleep(chance.uniform(0.0, 0.01))  # anywhere within a step
            process.kill()
            if process.wait() == 0:
                raise RuntimeError(f"The run was over after {len(found)} interruptions of {kills}: give it more steps.")
            there = checkpoints(directory)
            tears = not torn and len(there) == 2 and len(found) >= kills // 2
            if tears:
                data = there[0].read_bytes()
                there[0].write_bytes(data[: chance.randrange(len(data))])
                torn = True
            saved = int(there[0].stem) if there else 0
            found.append(Interruption(begun, killed, saved, any(directory.glob("*.part")), tears))
            bar.set_postfix(kills=len(found))
            bar.update(saved - bar.n)
        process = start(steps, directory)
        for step in listen(process):
            bar.update(step - bar.n)
        if process.wait() != 0:
            raise RuntimeError("The last process failed.")
    return found


# %%
# Comparing
# ---------


def leaves(x: Any, path: str = "") -> dict[str, Any]:
    """Everything in nested dicts, lists and tuples, by its path."""
    if isinstance(x, dict):
        return {name: y for key, value in x.items() for name, y in leaves(value, f"{path}/{key}").items()}
    if isinstance(x, (list, tuple)):
        return {name: y for k, value in enumerate(x) for name, y in leaves(value, f"{path}/{k}").items()}
    return {path: x}


def differences(a: Any, b: Any) -> list[str]:
    """The paths of what is not the same, bit for bit."""
    first, second = leaves(a), leaves(b)

    def same(x: Any, y: Any) -> bool:
        return torch.equal(x, y) and x.dtype == y.dtype if isinstance(x, Tensor) and isinstance(y, Tensor) else x == y

    return [p for p in {**first, **second} if p not in first or p not in second or not same(first[p], second[p])]


def table(found: list[Interruption]) -> str:
    lines = ["process   begins at   killed at   newest checkpoint"]
    for k, x in enumerate(found, start=1):
        notes = ", ".join(["killed while writing"] * x.writing + ["then torn in two"] * x.torn)
        lines.append(f"{k:7}   {x.begun:9}   {x.killed:9}   {x.saved:17}   {notes}".rstrip())
    return "\n".join(lines)


def draw(losses: Tensor, found: list[Interruption]) -> None:
    """The smoothed losses, in another shade for each process that made the steps."""
    plain = losses.view(1, 1, -1)
    width = max(1, len(losses) // 100)
    smooth = F.avg_pool1d(plain, width, stride=1).flatten()
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    begin = 0
    for k, end in enumerate([*[x.saved for x in found], len(losses)]):
        at = torch.arange(max(begin, width - 1), end)
        if len(at):
            axes.plot(at, smooth[at - width + 1], color=("tab:blue", "tab:orange")[k % 2], linewidth=1.5)
            axes.axvline(end, color="0.85", linewidth=0.8, zorder=0)
        begin = max(begin, end)
    axes.set(xlabel="step", ylabel="loss (running mean)", yscale="log")
    axes.set_title(f"{len(found)} times killed and resumed: the loss of each process in turn")
    axes.spines[["top", "right"]].set_visible(False)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill a training process at random moments, and resume it.")
    parser.add_argument("--short", action="store_true", help="three interruptions of a shorter run, without a picture")
    parser.add_argument("--steps", type=int, default=None, help=f"how long to train (default {STEPS})")
    parser.add_argument("--kills", type=int, default=None, help=f"how many interruptions (default {KILLS})")
    parser.add_argument("--worker", type=Path, default=None, help=argparse.SUPPRESS)
    given = parser.parse_args()
    steps = given.steps or (800 if given.short else STEPS)
    kills = given.kills or (3 if given.short else KILLS)
    if given.worker is not None:
        train(steps, given.worker, lambda step: print(f"step {step}", flush=True))
        return
    with tempfile.TemporaryDirectory() as disturbed, tempfile.TemporaryDirectory() as quiet:
        found = interrupt(steps, kills, Path(disturbed))
        with tqdm(total=steps, desc="undisturbed", unit="step") as bar:
            expected = train(steps, Path(quiet), lambda step: bar.update(step - bar.n))
        resumed = newest(Path(disturbed))
    print(table(found))
    wrong = differences(expected, resumed)
    if wrong:
        raise RuntimeError(f"The resumed run is another one, in {len(wrong)} places: {', '.join(wrong[:5])}")
    same = len(leaves(expected))
    print(f"\nThe last loss is {expected['losses'][-1]:.4f}. All {same} entries of the last checkpoint agree, bit for bit.")
    if not given.short:
        draw(expected["losses"], found)
        print(f"Picture: {PICTURE}")


if __name__ == "__main__":
    main()
