"""
A state in 16 and 8 bits
========================

Trains two networks with AdamW, whose state is kept in 32, in 16 and in 8 bits (``quantize_state``), from three seeds each:

1. a small network on scikit-learn's handwritten digits;
2. a character-level transformer on Python's own reference manual, that of ``muon_adamw.py``.

What is looked at is whether fewer bits cost anything: beside the differences between the bits stand those between seeds.

Run it with::

    python examples/quantized_state.py

It takes two to three minutes on two cores (``--short``: some seconds), prints a table, and saves a picture. It raises an error
if the mean over the seeds is worse than that of 32 bits by more than seeds differ.
"""

import argparse
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import matplotlib

matplotlib.use("Agg")  # draws into a file, so it also works where there is no screen
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from muon_adamw import Text, Transformer, batch, load_text, loss_of, validate, warmup_cosine
from quickstart import Digits, load_data, measure_accuracy
from torch import Tensor, nn
from tqdm import tqdm

import purestep as ps
from purestep import optim

SEEDS = (0, 1, 2)
BITS = (32, 16, 8)
COLORS = {32: "tab:gray", 16: "tab:blue", 8: "tab:red"}
PICTURE = Path(__file__).resolve().parent / "output" / "quantized_state.png"


def make_optimizer(model: nn.Module, lr: float, bits: int) -> optim.Optimizer:
    transform = ps.adamw(lr=lr, weight_decay=0.01)
    if bits != 32:
        transform = ps.quantize_state(transform, bits)
    return optim.Optimizer(model.named_parameters(), ps.chain(ps.clip_by_global_norm(1.0), transform))


def state_bytes(optimizer: optim.Optimizer) -> int:
    """The memory of all that is kept per parameter, but for the counters they share."""
    states = [state for key, state in optimizer.state.items() if isinstance(key, Tensor)]
    return sum(x.nbytes for state in states for x in state.values() if isinstance(x, Tensor) and x.dim())


@dataclass
class Run:
    """One network, trained once."""

    bits: int
    seed: int
    curve: list[tuple[int, float]] = field(default_factory=list)  # step, what is measured on data it has not seen
    step_ms: list[float] = field(default_factory=list)
    state: float = 0.0  # bytes per parameter

    @property
    def final(self) -> float:
        return self.curve[-1][1]


# %%
# Two problems
# ------------
# Each gives a model, a loss of the next batch, and a number to judge the model by.


class DigitsProblem:
    name, lr, measure = "digits", 3e-3, "test error (%)"

    def __init__(self, digits: Digits, seed: int) -> None:
        self.digits, self.generator = digits, torch.Generator().manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 10))

    def loss(self) -> Tensor:
        rows = torch.randint(len(self.digits.train_images), (64,), generator=self.generator)
        return F.cross_entropy(self.model(self.digits.train_images[rows]), self.digits.train_labels[rows])

    def judge(self) -> float:
        return 100 * (1 - measure_accuracy(self.model, self.digits))


class TextProblem:
    name, lr, measure = "text", 3e-3, "validation loss (nats)"

    def __init__(self, text: Text, seed: int) -> None:
        self.text, self.generator = text, torch.Generator().manual_seed(seed)
        self.model = Transformer(len(text.alphabet))

    def loss(self) -> Tensor:
        return loss_of(self.model, *batch(self.text.train, self.generator))

    def judge(self) -> float:
        return validate(self.model, self.text)


def train(kind: Any, data: Any, bits: int, seed: int, steps: int) -> Run:
    torch.manual_seed(seed)  # all bits begin with the same weights, and see the same batches
    problem, run = kind(data, seed), Run(bits, seed)
    optimizer = make_optimizer(problem.model, kind.lr, bits)
    scheduler = optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(steps))
    with tqdm(range(1, steps + 1), desc=f"{kind.name}, {bits:>2} bits, seed {seed}", unit="step") as bar:
        for step in bar:
            optimizer.zero_grad()
            problem.loss().backward()
            before = time.perf_counter()
            optimizer.step()
            run.step_ms.append((time.perf_counter() - before) * 1e3)
            scheduler.step()
            if step % max(1, steps // 10) == 0 or step == steps:
                run.curve.append((step, problem.judge()))
                bar.set_postfix({kind.measure: f"{run.final:.3f}"}, refresh=False)
    run.state = state_bytes(optimizer) / sum(p.numel() for p in problem.model.parameters())
    return run


# %%
# What came of it
# ---------------


def table(kind: Any, runs: list[Run]) -> list[str]:
    lines = [
        f"{kind.name + ', ' + kind.measure:<32} {'mean':>8} {'seeds':>8} {'state, bytes/parameter':>24} {'ms per step':>12}"
    ]
    for bits in BITS:
        mine = [run for run in runs if run.bits == bits]
        ends = [run.final for run in mine]
        ms = median(x for run in mine for x in run.step_ms)
        lines.append(f"{f'  {bits} bits':<32} {fmean(ends):>8.3f} {spread(ends):>8.3f} {mine[0].state:>24.2f} {ms:>12.2f}")
    return lines


def spread(values: list[float]) -> float:
    return stdev(values) if len(values) > 1 else math.nan


def draw_curves(axes: Axes, kind: Any, runs: list[Run]) -> None:
    for bits in BITS:
        mine = [run for run in runs if run.bits == bits]
        for run in mine:
            axes.plot(*zip(*run.curve), color=COLORS[bits], alpha=0.25, linewidth=1)
        steps = [step for step, _ in mine[0].curve]
        means = [fmean(run.curve[k][1] for run in mine) for k in range(len(steps))]
        style = {32: "-", 16: "--", 8: ":"}[bits]
        axes.plot(steps, means, style, color=COLORS[bits], linewidth=2.2, label=f"{bits} bits: {means[-1]:.3f}")
    ends = [run.final for run in runs]
    low, high = min(ends), max(run.curve[1][1] for run in runs)
    axes.set(title=kind.name, xlabel="step", ylabel=kind.measure, ylim=(max(0, low - 0.1 * (high - low)), high))
    axes.legend(title="at the end, mean", frameon=False)


def draw(results: dict[Any, list[Run]]) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(12, 4), layout="constrained", width_ratios=(3, 3, 2))
    for place, (kind, runs) in zip(axes, results.items()):
        draw_curves(place, kind, runs)
    text = next(runs for kind, runs in results.items() if kind is TextProblem)
    sizes = {bits: next(run.state for run in text if run.bits == bits) for bits in BITS}
    bars = axes[2].bar([f"{bits} bits" for bits in BITS], list(sizes.values()), color=[COLORS[b] for b in BITS], width=0.6)
    axes[2].bar_label(bars, fmt="%.2f", padding=3)
    axes[2].set(title="memory of the state (text)", ylabel="bytes per parameter", ylim=(0, 9))
    for place in axes:
        place.spines[["top", "right"]].set_visible(False)
        place.grid(alpha=0.25, axis="y")
    figure.suptitle("AdamW with its state in fewer bits: thick lines are means over seeds, thin lines the seeds")
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=150)
    plt.close(figure)


def check(kind: Any, runs: list[Run]) -> None:
    """The mean of fewer bits is no worse than that of 32, by three standard errors of a difference (and a hundredth)."""
    ends = {bits: [run.final for run in runs if run.bits == bits] for bits in BITS}
    wide = spread(ends[32])
    for bits in BITS[1:]:
        worse = fmean(ends[bits]) - fmean(ends[32])
        if worse > 3 * wide * math.sqrt(2 / len(SEEDS)) + 0.01 * fmean(ends[32]):
            raise SystemExit(f"{kind.name}: {bits} bits are worse than 32 by {worse:.3f}; seeds differ by {wide:.3f}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--short", action="store_true", help="a tenth of the steps, and one seed")
    short = parser.parse_args().short
    steps, seeds = (
        ({DigitsProblem: 60, TextProblem: 20}, SEEDS[:1]) if short else ({DigitsProblem: 600, TextProblem: 300}, SEEDS)
    )
    data: dict[Any, Any] = {DigitsProblem: load_data(), TextProblem: load_text()}
    results: dict[Any, list[Run]] = {
        kind: [train(kind, data[kind], bits, seed, steps[kind]) for seed in seeds for bits in BITS] for kind in data
    }
    for kind, runs in results.items():
        print("\n" + "\n".join(table(kind, runs)))
    draw(results)
    print(f"\npicture: {PICTURE}")
    if not short:
        for kind, runs in results.items():
            check(kind, runs)


if __name__ == "__main__":
    main()
