"""
Muon and AdamW in one optimizer
===============================

Trains a small character-level transformer on English text, Python's own reference manual (the topics in ``pydoc_data``),
twice from the same weights, on the same batches and for the same number of steps:

1. with AdamW on all parameters;
2. with ``partition``: Muon on the hidden matrices, AdamW on embeddings, gains, biases and the output layer.

The second is *one* ``torch.optim.Optimizer``: its parameter groups are made from the labels, so one of torch's schedulers
drives both halves, one global norm clips both, and one state dict holds both.

Run it with::

    python examples/muon_adamw.py

It takes a minute or two on two cores, prints a table and a line of generated text, and saves a picture of the losses. It
raises an error if the partition does not beat AdamW alone.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("Agg")  # draws into a file, so it also works where there is no screen
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import purestep as ps
from purestep import optim

SEED = 0
CONTEXT = 64  # characters
BATCH_SIZE = 24
WIDTH, HEADS, LAYERS = 96, 4, 3
WARMUP = 0.1  # of all steps
EVALUATIONS = 12
PICTURE = Path(__file__).resolve().parent / "output" / "muon_adamw.png"


# %%
# The text
# --------
# Half a million characters, of which the last tenth is kept for validation. It is a little easier than the rest.


@dataclass(frozen=True)
class Text:
    train: Tensor
    validation: Tensor
    alphabet: str


def load_text() -> Text:
    text = "\n\n".join(topics[name] for name in sorted(topics))
    alphabet = "".join(sorted(set(text)))
    place = {c: i for i, c in enumerate(alphabet)}
    codes = torch.tensor([place[c] for c in text])
    cut = len(codes) * 9 // 10
    return Text(codes[:cut], codes[cut:], alphabet)


def batch(codes: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    starts = torch.randint(len(codes) - CONTEXT, (BATCH_SIZE,), generator=generator)
    windows = torch.stack([codes[s : s + CONTEXT + 1] for s in starts])
    return windows[:, :-1], windows[:, 1:]


# %%
# The model
# ---------
# A transformer as small as they come: attention and a two-layer network, each behind a norm and beside a residual path.


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
        x = self.embedding(codes) + self.position.weight[: codes.shape[1]]
        return self.head(self.norm(self.blocks(x)))


# %%
# The two optimizers
# ------------------
# A rule says which parameter goes where: matrices inside the blocks are hidden, all else is the rest.

rule = ps.by_path({r"^blocks\.": ps.by_ndim({2: "hidden"}, default="rest")}, default="rest")
matrices = ps.by_ndim({0: False, 1: False}, default=True)  # gains and biases do not decay


def adamw(lr: float) -> ps.Transform:
    decay = ps.add_decayed_weights(0.01, mask=matrices)
    return ps.chain(ps.scale_by_adam(betas=(0.9, 0.99)), decay, ps.scale_by_learning_rate(lr))


def make_optimizer(name: str, model: nn.Module) -> optim.Optimizer:
    if name == "AdamW":
        transform = adamw(lr=3e-3)  # the best of 1e-3, 3e-3, 6e-3 and 1e-2
    else:
        transform = ps.partition({"hidden": ps.muon(lr=0.02, weight_decay=0.01), "rest": adamw(lr=3e-3)}, rule)
    return optim.Optimizer(model.named_parameters(), ps.chain(ps.clip_by_global_norm(1.0), transform))


def warmup_cosine(steps: int) -> Callable[[int], float]:
    """What the learning rates of all groups are multiplied with."""
    warmup = max(1, round(WARMUP * steps))
    return lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / max(1, steps - warmup))))


# %%
# Training
# --------


@dataclass
class Run:
    """What is written down while a network trains."""

    name: str
    losses: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)  # step, loss
    step_ms: list[float] = field(default_factory=list)
    seconds: float = 0.0
    sample: str = ""
    groups: list[dict[str, Any]] = field(default_factory=list)


def validate(model: nn.Module, text: Text) -> float:
    generator = torch.Generator().manual_seed(SEED + 1)  # the same windows each time
    with torch.no_grad():
        losses = [loss_of(model, *batch(text.validation, generator)).item() for _ in range(8)]
    return sum(losses) / len(losses)


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def train(name: str, text: Text, steps: int) -> Run:
    torch.manual_seed(SEED)  # both begin with the same weights
    model = Transformer(len(text.alphabet))
    optimizer = make_optimizer(name, model)
    scheduler = optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(steps))
    generator = torch.Generator().manual_seed(SEED)  # and see the same batches
    run = Run(name, groups=[{k: x for k, x in g.items() if k != "params"} for g in optimizer.param_groups])
    begun = time.perf_counter()
    with tqdm(range(1, steps + 1), desc=f"{name:<14}", unit="step") as bar:
        for step in bar:
            optimizer.zero_grad()
            loss = loss_of(model, *batch(text.train, generator))
            loss.backward()
            before = time.perf_counter()
            optimizer.step()
            run.step_ms.append((time.perf_counter() - before) * 1e3)
            scheduler.step()
            run.losses.append(loss.item())
            if step % max(1, steps // EVALUATIONS) == 0 or step == steps:
                run.validation.append((step, validate(model, text)))
                bar.set_postfix(loss=f"{loss.item():.3f}", validation=f"{run.validation[-1][1]:.3f}", refresh=False)
    run.seconds = time.perf_counter() - begun
    run.sample = write(model, text, "The ", 90)
    return run


def write(model: nn.Module, text: Text, prompt: str, length: int) -> str:
    """Let the model go on from a prompt."""
    generator = torch.Generator().manual_seed(SEED)
    codes = torch.tensor([[text.alphabet.index(c) for c in prompt]])
    with torch.no_grad():
        for _ in range(length):
            chances = F.softmax(model(codes[:, -CONTEXT:])[:, -1] / 0.7, dim=-1)
            codes = torch.cat([codes, torch.multinomial(chances, 1, generator=generator)], dim=1)
    return " ".join("".join(text.alphabet[i] for i in codes[0].tolist()).split())


# %%
# What came of it
# ---------------


def table(runs: list[Run]) -> Iterator[str]:
    yield f"{'':<14} {'loss':>8} {'validation':>11} {'bits/char':>10} {'ms per step':>12} {'seconds':>8}"
    for run in runs:
        last = run.validation[-1][1]
        loss = sum(run.losses[-20:]) / len(run.losses[-20:])
        bits, ms = last / math.log(2), median(run.step_ms)
        yield f"{run.name:<14} {loss:>8.3f} {last:>11.3f} {bits:>10.3f} {ms:>12.2f} {run.seconds:>8.0f}"


def draw(runs: list[Run], steps: int) -> None:
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for run, color in zip(runs, ("tab:gray", "tab:red")):
        window = max(1, steps // 40)
        smooth = torch.tensor(run.losses).unfold(0, window, 1).mean(1)
        axes.plot(range(window, steps + 1), smooth, color=color, alpha=0.35, linewidth=1.5)
        label = f"{run.name}: {run.validation[-1][1]:.3f}"
        axes.plot(*zip(*run.validation), color=color, marker="o", markersize=4, linewidth=2, label=label)
    low = min(min(x for _, x in run.validation) for run in runs)
    axes.set(xlabel="step", ylabel="cross-entropy per character (nats)", xlim=(0, steps), ylim=(low - 0.15, 3.2))
    axes.set_title("The same transformer, text and budget: validation (dots) and training loss")
    axes.legend(title="validation loss at the end", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--steps", type=int, default=500, help="of each of the two runs; by default 500")
    parser.add_argument("--short", action="store_true", help="a tenth of the steps, without a picture")
    given = parser.parse_args()
    steps = given.steps // 10 if given.short else given.steps
    text = load_text()
    runs = [train(name, text, steps) for name in ("AdamW", "Muon + AdamW")]

    print(f"\n{len(text.train) + len(text.validation):,} characters, {steps} steps of {BATCH_SIZE} x {CONTEXT}\n")
    print("\n".join(table(runs)))
    print("\nThe parameter groups of Muon + AdamW, made from the labels:")
    for group in runs[1].groups:
        names = group["param_names"]
        print(f"  {group['label']:<7} lr {group['initial_lr']:<6} {len(names)} parameters, the first {names[0]}")
    print(f"\nIt writes: {runs[1].sample}")
    if not given.short:
        draw(runs, steps)
        print(f"picture: {PICTURE}")
    alone, both = (run.validation[-1][1] for run in runs)
    if both >= alone:
        raise SystemExit(f"Muon + AdamW ended at {both:.3f}, no better than AdamW alone at {alone:.3f}.")


if __name__ == "__main__":
    main()
