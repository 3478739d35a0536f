"""
Quickstart: one network, three ways to step
===========================================

Trains a small network on scikit-learn's handwritten digits three times, from the same weights and on the same batches:

1. with ``torch.optim.AdamW``;
2. with ``purestep.optim.AdamW``, the drop-in: the same code, another class, the same numbers;
3. purely functionally under ``torch.func``, with an optimizer composed of four transforms. It has a learning-rate schedule
   of its own, so its curve is another one.

Run it with::

    python examples/quickstart.py

It takes a few seconds on a CPU, prints a table and saves a picture of the three loss curves. It raises an error if a run
stays below 95 % test accuracy, or if the drop-in's parameters drift from torch's by more than 1e-4.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

import matplotlib

matplotlib.use("Agg")  # draws into a file, so it also works where there is no screen
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value
from torch.nn.utils import parameters_to_vector
from tqdm import tqdm

import purestep as ps

SEED = 0
BATCH_SIZE = 64
LEARNING_RATE = 2e-3
PEAK_LEARNING_RATE = 6e-3  # of the composed optimizer: warm-up and clipping make larger steps safe
WEIGHT_DECAY = 0.05

MIN_ACCURACY = 0.95
MAX_DRIFT = 1e-4
PICTURE = Path(__file__).resolve().parent / "output" / "quickstart.png"


# %%
# What the three runs share
# -------------------------
# The digits are 1797 grey images of 8 x 8 pixels that come with scikit-learn. A fifth of them is kept for the test.


@dataclass(frozen=True)
class Digits:
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @property
    def batches_per_epoch(self) -> int:
        return len(self.train_images) // BATCH_SIZE


def load_data() -> Digits:
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images, labels, test_size=0.2, random_state=SEED, stratify=labels)
    train_images, test_images, train_labels, test_labels = map(torch.tensor, split)
    return Digits(train_images.float() / 16, train_labels, test_images.float() / 16, test_labels)  # pixels are 0 to 16


def make_model() -> nn.Module:
    torch.manual_seed(SEED)  # every run starts from the same weights
    # GELU is smooth. With ReLU, a rounding error can switch a unit on or off and make two runs part for good (torch's own
    # loop and fused kernel do at some learning rates), and the comparison would say nothing about the optimizers.
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64), nn.GELU(), nn.Linear(64, 10))


def batches(digits: Digits, epochs: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(SEED)  # every run sees the same batches
    for _ in range(epochs):
        order = torch.randperm(len(digits.train_images), generator=generator)
        for i in range(digits.batches_per_epoch):
            rows = order[i * BATCH_SIZE : (i + 1) * BATCH_SIZE]
            yield digits.train_images[rows], digits.train_labels[rows]


def measure_accuracy(predict: Callable[[Tensor], Tensor], digits: Digits) -> float:
    with torch.no_grad():
        guesses = predict(digits.test_images).argmax(dim=1)
    return (guesses == digits.test_labels).float().mean().item()


@dataclass
class Run:
    """What is written down while a network trains."""

    name: str
    digits: Digits
    epochs: int
    losses: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    parameters: list[Tensor] = field(default_factory=list)  # all of them as one vector, after every epoch
    accuracy: float = 0.0

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches, behind a progress bar."""
        total = self.epochs * self.digits.batches_per_epoch
        with tqdm(batches(self.digits, self.epochs), desc=f"{self.name:<25}", total=total, unit="step") as bar:
            for batch in bar:
                yield batch
                bar.set_postfix(loss=f"{self.losses[-1]:.4f}", refresh=False)

    @contextmanager
    def stopwatch(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.step_ms.append((time.perf_counter() - start) * 1e3)

    def record(self, loss: Tensor, parameters: list[Tensor]) -> None:
        self.losses.append(loss.item())
        if len(self.losses) % self.digits.batches_per_epoch == 0:
            self.parameters.append(parameters_to_vector(parameters).detach())

    @property
    def final_loss(self) -> float:
        """The mean over the last epoch."""
        return fmean(self.losses[-self.digits.batches_per_epoch :])


# %%
# 1 and 2: a stateful optimizer
# -----------------------------
# ``purestep.optim.AdamW`` *is* a ``torch.optim.Optimizer``, so one training loop serves both.


def train_with_torch(digits: Digits, epochs: int) -> Run:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    return train(model, optimizer, Run("torch.optim.AdamW", digits, epochs))


def train_with_drop_in(digits: Digits, epochs: int) -> Run:
    model = make_model()
    optimizer = ps.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    return train(model, optimizer, Run("purestep.optim.AdamW", digits, epochs))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, run: Run) -> Run:
    for images, labels in run.batches():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        with run.stopwatch():
            optimizer.step()
        run.record(loss, list(model.parameters()))

    run.accuracy = measure_accuracy(model, run.digits)
    return run


# %%
# 3: a pure function
# ------------------
# Here the optimizer is a value made of four parts, and nothing is hidden: gradients, state and parameters go in, and new
# parameters and a new state come out.


def train_functionally(digits: Digits, epochs: int) -> Run:
    model = make_model()
    total_steps = epochs * digits.batches_per_epoch
    schedule = ps.schedules.warmup_cosine(PEAK_LEARNING_RATE, warmup_steps=total_steps // 10, total_steps=total_steps)
    optimizer = ps.chain(
        ps.clip_by_global_norm(1.0),
        ps.scale_by_adam(betas=(0.9, 0.999)),
        ps.add_decayed_weights(WEIGHT_DECAY, mask=lambda path, p: p.ndim > 1),  # matrices decay, biases do not
        ps.scale_by_learning_rate(schedule),
    )

    def loss_function(params: dict[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, params, images), labels)

    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = optimizer.init_state(params)
    run = Run("purestep under torch.func", digits, epochs)
    for images, labels in run.batches():
        grads, loss = grad_and_value(loss_function)(params, images, labels)
        with run.stopwatch():
            # The old state and parameters are not needed again, so donate=True gives their memory away, to be reused in
            # place. Without it the numbers are the same, and whatever went in stays as it was.
            params, state = optimizer.step(grads, state, params, donate=True)
        run.record(loss, list(params.values()))

    run.accuracy = measure_accuracy(lambda images: functional_call(model, params, images), digits)
    return run


# %%
# The results
# -----------


def measure_drift(a: Run, b: Run) -> list[float]:
    """The largest difference between any two parameters, after every epoch."""
    return [(x - y).abs().max().item() for x, y in zip(a.parameters, b.parameters)]


def print_table(runs: list[Run], drift: list[float]) -> None:
    print(f"\n{'':<25} {'final loss':>11} {'test accuracy':>14} {'ms per step':>12} {'max |torch - purestep|':>23}")
    for run, difference in zip(runs, ["-", f"{max(drift):.1e}", "-"]):
        print(f"{run.name:<25} {run.final_loss:>11.4f} {run.accuracy:>14.1%} {median(run.step_ms):>12.3f} {difference:>23}")
    print("\nfinal loss: mean over the last epoch; ms per step: median time of the optimizer alone")


def smooth(values: list[float], width: int) -> list[float]:
    """The mean of the `width` values around each one, of fewer at the ends."""
    return [fmean(values[max(0, i - width // 2) : i + width // 2 + 1]) for i in range(len(values))]


def draw_losses(axes: Axes, runs: list[Run]) -> None:
    # The drop-in is drawn as thin dashes over torch's broad line, because both are to be seen.
    styles: list[dict[str, Any]] = [
        {"color": "#9ecae1", "linewidth": 7},
        {"color": "#08306b", "linewidth": 1.8, "linestyle": (0, (4, 2.5))},
        {"color": "#e6550d", "linewidth": 2.2},
    ]
    notes = ["", "", " (its own schedule)"]
    for run, style, note in zip(runs, styles, notes):
        per_epoch = run.digits.batches_per_epoch
        epochs = [(step + 1) / per_epoch for step in range(len(run.losses))]
        axes.plot(epochs, run.losses, color=style["color"], linewidth=0.7, alpha=0.25)
        axes.plot(epochs, smooth(run.losses, per_epoch), label=f"{run.name}{note}: {run.accuracy:.1%} test accuracy", **style)
    axes.set_title("Training loss (faint: every batch; strong: mean over an epoch)", loc="left", fontsize=11)
    axes.set(yscale="log", ylabel="cross-entropy", xlim=(0, runs[0].epochs))
    axes.legend(frameon=False, fontsize=11, handlelength=3)


def draw_drift(axes: Axes, drift: list[float]) -> None:
    axes.plot(range(1, len(drift) + 1), drift, color="#08306b", linewidth=1.5, marker="o", markersize=3.5, clip_on=False)
    axes.axhline(MAX_DRIFT, color="#a50f15", linewidth=1.2, linestyle=":")
    axes.text(len(drift), MAX_DRIFT / 1.5, "tolerance", color="#a50f15", ha="right", va="top")
    axes.set_title("The drop-in's largest difference from torch in any parameter", loc="left", fontsize=11)
    axes.set(yscale="log", xlabel="epoch", ylabel="|torch - purestep|")


def save_picture(runs: list[Run], drift: list[float]) -> None:
    figure, (top, bottom) = plt.subplots(2, sharex=True, figsize=(9, 7), height_ratios=[3, 1], layout="constrained")
    figure.suptitle("One network, three ways to step: training on handwritten digits", fontsize=15)
    draw_losses(top, runs)
    draw_drift(bottom, drift)
    for axes in (top, bottom):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)

    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=150)
    print(f"picture: {PICTURE}")


def check(runs: list[Run], drift: list[float]) -> None:
    # `not >=` rather than `<`: NaN is to fail, too.
    for run in runs:
        if not run.accuracy >= MIN_ACCURACY:
            raise RuntimeError(f"{run.name} must reach {MIN_ACCURACY:.0%} test accuracy, but reached {run.accuracy:.1%}.")
    for epoch, difference in enumerate(drift, start=1):
        if not difference <= MAX_DRIFT:
            raise RuntimeError(
                f"The parameters of purestep.optim.AdamW must stay within {MAX_DRIFT:g} of torch.optim.AdamW's, but they "
                f"differ by {difference:.1e} after epoch {epoch}."
            )


def main() -> None:
    parser = argparse.ArgumentParser(description="Train on handwritten digits in three ways, and compare.")
    parser.add_argument("--epochs", type=int, default=30, help="passes over the training images (default: 30; 10 are too few)")
    epochs = parser.parse_args().epochs
    if epochs < 1:
        parser.error(f"--epochs must be at least 1, but is {epochs}")

    torch.set_num_threads(1)  # so small a network gains nothing from more, and timings are steadier
    digits = load_data()
    reference = train_with_torch(digits, epochs)
    drop_in = train_with_drop_in(digits, epochs)
    functional = train_functionally(digits, epochs)
    runs = [reference, drop_in, functional]
    drift = measure_drift(reference, drop_in)

    print_table(runs, drift)
    save_picture(runs, drift)
    check(runs, drift)


if __name__ == "__main__":
    main()
