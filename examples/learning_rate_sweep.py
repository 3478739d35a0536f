"""
A learning-rate sweep: 256 networks in one step
===============================================

An optimizer is a pytree, so its hyperparameters can be a batch: ``ps.adamw(lr=lrs, weight_decay=decays)`` is 256 optimizers, a
grid of 16 learning rates by 16 weight decays. ``torch.func.vmap`` over the training step of *one* network then trains 256 on
scikit-learn's handwritten digits. All have the same initial parameters and see the same batches, so what they become is due to
the two numbers alone.

The same sweep is also run in the usual way, one ``torch.optim.AdamW(fused=True)`` after the other, and the two are compared:
their parameters, and their time.

Run it with::

    python examples/learning_rate_sweep.py

It takes a minute or two, prints the best members and the times, and saves a heat map of test accuracy. It raises an error if
a member's parameters are not those of its counterpart in the loop, or if the sweep is not faster than the loop.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")  # draws into a file, so it also works where there is no screen
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from tqdm import tqdm

import purestep as ps

SEED = 0
SIDE = 16  # of the grid
TRAIN_SIZE = 512  # few enough for weight decay to matter
BATCH_SIZE = 32
CALM = 0.03  # with larger learning rates rounding errors grow, until two runs of anything have nothing in common
MAX_DRIFT = 1e-3  # between trained parameters of the sweep and of the loop, relative to their norm
PICTURE = Path(__file__).resolve().parent / "output" / "learning_rate_sweep.png"

Params = dict[str, Tensor]


# %%
# The data and the network
# ------------------------
# 1797 images of 8 x 8 pixels: 512 to train on, the rest for the test.


@dataclass(frozen=True)
class Digits:
    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def batches(self, epochs: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(SEED)  # the same batches for everyone
        for _ in range(epochs):
            for rows in torch.randperm(TRAIN_SIZE, generator=generator).split(BATCH_SIZE):
                yield self.images[rows], self.labels[rows]


def load_data() -> Digits:
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images, labels, train_size=TRAIN_SIZE, random_state=SEED, stratify=labels)
    train_images, test_images, train_labels, test_labels = map(torch.tensor, split)
    return Digits(train_images.float() / 16, train_labels, test_images.float() / 16, test_labels)  # pixels are 0 to 16


def make_network() -> nn.Module:
    torch.manual_seed(SEED)
    return nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 10))


network = make_network()
initial: Params = {name: p.detach() for name, p in network.named_parameters()}


# %%
# 256 optimizers
# --------------
# A batch of optimizers is made as one is, from tensors. It is for ``vmap``, to which ``ps.in_dims`` tells which of its numbers
# are batches.

rates, decays = torch.logspace(-4, 0, SIDE), torch.logspace(-2, 1, SIDE)
members = torch.cartesian_prod(rates, decays)
population = ps.adamw(lr=members[:, 0], weight_decay=members[:, 1])


# %%
# One training step, 256 times at once
# ------------------------------------
# ``step`` is written for one network. ``vmap`` maps it over optimizers, parameters and states, while the images are shared: 256
# small matrix products become one that is large.


def step(opt: ps.Transform, params: Params, state: Any, images: Tensor, labels: Tensor) -> tuple[Params, Any, Tensor]:
    grads, loss = grad_and_value(cross_entropy)(params, images, labels)
    params, state = opt.step(grads, state, params)
    return params, state, loss


def cross_entropy(params: Params, images: Tensor, labels: Tensor) -> Tensor:
    logits = functional_call(network, params, (images,))
    # F.cross_entropy is the same, but not written for vmap: the gradients would take half as long again.
    return (logits.logsumexp(dim=1) - logits.gather(1, labels[:, None]).squeeze(1)).mean()


step_all = vmap(step, in_dims=(ps.in_dims(population), 0, 0, None, None))


@dataclass
class Sweep:
    """All members, trained together. Parameters have the members as their first dimension."""

    name: str
    losses: list[Tensor]
    params: Params
    first_seconds: float  # of the first step, which compiles where something is compiled
    seconds: float  # of a step, by member

    def accuracies(self, digits: Digits) -> Tensor:
        logits = vmap(functional_call, in_dims=(None, 0, None))(network, self.params, (digits.test_images,))
        return (logits.argmax(dim=2) == digits.test_labels).float().mean(dim=1)


def run_sweep(name: str, step_all: Callable[..., Any], digits: Digits, epochs: int) -> Sweep:
    params = {name: p.expand(len(members), *p.shape).clone() for name, p in initial.items()}
    state = vmap(population.init_state)(params)
    losses, times = [], [time.perf_counter()]
    for images, labels in tqdm(list(digits.batches(epochs)), desc=f"{name:<26}", unit="step"):
        params, state, loss = step_all(population, params, state, images, labels)
        losses.append(loss)
        times.append(time.perf_counter())
    seconds = [end - begin for begin, end in pairwise(times)]
    return Sweep(name, losses, params, seconds[0], median(seconds) / len(members))


# %%
# The same as a loop
# ------------------


class Member(NamedTuple):
    """One network, trained on its own."""

    number: int
    params: Params
    seconds: float  # of a step


def run_loop(digits: Digits, epochs: int, numbers: list[int]) -> list[Member]:
    return [
        run_member(digits, epochs, number) for number in tqdm(numbers, desc=f"{'torch.optim in a loop':<26}", unit="network")
    ]


def run_member(digits: Digits, epochs: int, number: int) -> Member:
    lr, decay = members[number].tolist()
    network = make_network()
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=decay, fused=True)
    batches = list(digits.batches(epochs))
    begun = time.perf_counter()
    for images, labels in batches:
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()
    seconds = (time.perf_counter() - begun) / len(batches)
    return Member(number, {name: p.detach() for name, p in network.named_parameters()}, seconds)


def measure_drift(sweep: Sweep, loop: list[Member]) -> float:
    """How far parameters of the sweep are from the loop's at most, where rounding errors do not grow."""
    return max(difference(sweep.params, m.params, m.number) for m in loop if members[m.number, 0] <= CALM)


def difference(all_params: Params, params: Params, number: int) -> float:
    one = torch.cat([p[number].flatten() for p in all_params.values()])
    other = torch.cat([p.flatten() for p in params.values()])
    return ((one - other).norm() / other.norm()).item()


# %%
# What came of it
# ---------------


def print_tables(accuracies: Tensor, sweeps: list[Sweep], loop: list[Member], loop_seconds: float) -> None:
    print(
        f"\n{'the five best':<16} {'learning rate':>13} {'weight decay':>13} {'test accuracy':>14} {'final training loss':>20}"
    )
    for place, number in enumerate(accuracies.argsort(descending=True, stable=True)[:5].tolist(), start=1):
        lr, decay = members[number].tolist()
        print(f"{place:<16} {lr:>13.2g} {decay:>13.2g} {accuracies[number]:>14.1%} {sweeps[0].losses[-1][number]:>20.4f}")

    note = "" if len(loop) == len(members) else f" (of {len(loop)} of them)"
    steps = len(sweeps[0].losses)
    print(f"\n{f'{len(members)} networks':<40} {'µs per step and network':>24} {'s in all':>9} {'times faster':>13}")
    rows = [(f"torch.optim in a loop{note}", loop_seconds), *[(s.name, s.seconds) for s in sweeps]]
    for name, seconds in rows:
        print(f"{name:<40} {seconds * 1e6:>24.1f} {seconds * steps * len(members):>9.1f} {loop_seconds / seconds:>13.1f}")
    print("times are medians, and their multiples")
    if note:
        print(f"the loop's time is extrapolated: it trained {len(loop)} networks, spread over the grid")
    for sweep in sweeps[1:]:
        print(f"{sweep.name}: without its first step, which compiles and took {sweep.first_seconds:.0f} s")

    calm = sum(bool(members[m.number, 0] <= CALM) for m in loop)
    print(f"\nlargest relative difference from the loop in the parameters of a trained network ({calm} with lr <= {CALM:g}):")
    for sweep in sweeps:
        print(f"{sweep.name:<40} {measure_drift(sweep, loop):>24.1e}")


def check(accuracies: Tensor, sweeps: list[Sweep], loop: list[Member], loop_seconds: float) -> None:
    # `not <=` rather than `>`: NaN is to fail, too.
    for sweep in sweeps:
        drift = measure_drift(sweep, loop)
        if not drift <= MAX_DRIFT:
            raise RuntimeError(f"{sweep.name}: parameters differ from torch.optim's by {drift:.1e}, more than {MAX_DRIFT:g}.")
        if not sweep.seconds < loop_seconds:
            ratio = sweep.seconds / loop_seconds
            raise RuntimeError(f"{sweep.name}: it must be faster than the loop, but takes {ratio:.2f} times as long.")
    if not accuracies.max() >= 0.9:
        raise RuntimeError(f"The best of the members must reach 90 % test accuracy, but reached {accuracies.max():.1%}.")


def edges(values: Tensor) -> Tensor:
    """The borders of cells around values that are evenly spaced on a logarithmic scale."""
    half = (values[1] / values[0]).sqrt()
    return torch.cat([values[:1] / half, values * half])


def draw_map(axes: Axes, accuracies: Tensor) -> None:
    # Colours are logarithmic in the error, because 97 and 95 % are farther apart than 57 and 55 %.
    errors = 1 - accuracies.view(SIDE, SIDE).T.numpy()
    norm = LogNorm(errors.min().item(), 0.9)
    mesh = axes.pcolormesh(edges(rates).numpy(), edges(decays).numpy(), errors, cmap="magma_r", norm=norm)
    best = int(accuracies.argmax())
    lr, decay = members[best].tolist()
    axes.plot(lr, decay, marker="*", markersize=18, color="white", markeredgecolor="black")
    axes.annotate(
        f"{accuracies[best]:.1%}", (lr, decay), (0, 12), textcoords="offset points", ha="center", fontsize=12, weight="bold"
    )
    axes.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="weight decay")
    axes.set_title("Test accuracy of 256 networks", loc="left")
    bar = axes.figure.colorbar(mesh, ax=axes, pad=0.02)
    ticks = [x for x in (0.03, 0.05, 0.1, 0.2, 0.5, 0.9) if x >= norm.vmin]
    bar.set_ticks(ticks, labels=[f"{1 - x:.0%}" for x in ticks])
    bar.minorticks_off()
    bar.ax.invert_yaxis()


def draw_losses(axes: Axes, losses: Tensor) -> None:
    norm = LogNorm(rates[0].item(), rates[-1].item())
    per_epoch = TRAIN_SIZE // BATCH_SIZE
    means = losses.view(-1, per_epoch, len(members)).mean(dim=1)
    for number, curve in enumerate(means.T.tolist()):
        axes.plot(
            range(1, len(means) + 1), curve, color=plt.get_cmap("viridis")(norm(members[number, 0].item())), linewidth=0.7
        )
    axes.set(
        yscale="log",
        ylim=(means.nan_to_num(nan=1.0).min().item() / 2, 10),
        xlim=(1, len(means)),
        xlabel="epoch",
        ylabel="cross-entropy",
    )
    axes.set_title("Their training losses", loc="left")
    axes.figure.colorbar(ScalarMappable(norm, "viridis"), ax=axes, label="learning rate", pad=0.02)


def draw_times(axes: Axes, sweeps: list[Sweep], loop_seconds: float) -> None:
    names = ["torch.optim,\none by one", "vmapped", "vmapped,\ncompiled"][: 1 + len(sweeps)]
    seconds = [loop_seconds, *[s.seconds for s in sweeps]]
    bars = axes.barh(names, [1e6 * s for s in seconds], color=["#9a9a9a", "#e6550d", "#a63603"][: len(names)], height=0.6)
    ratios = ["", *[f"   {loop_seconds / s:.1f} x" for s in seconds[1:]]]
    axes.bar_label(bars, [f"{1e6 * s:.0f} µs{ratio}" for s, ratio in zip(seconds, ratios)], padding=5, fontsize=11)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.25e6 * max(seconds)), xticks=[])
    axes.tick_params(left=False)
    axes.set_title("Time per training step and network", loc="left")


def save_picture(accuracies: Tensor, sweeps: list[Sweep], loop_seconds: float) -> None:
    figure, axes = plt.subplot_mosaic(
        [["map", "losses"], ["map", "times"]],
        figsize=(13, 6.2), width_ratios=[1.25, 1], height_ratios=[1.7, 1], layout="constrained",
    )  # fmt: skip
    figure.suptitle("One vmapped training step, 256 learning rates and weight decays", fontsize=15)
    draw_map(axes["map"], accuracies)
    draw_losses(axes["losses"], torch.stack(sweeps[0].losses))
    draw_times(axes["times"], sweeps, loop_seconds)
    for each in axes.values():
        each.spines[["top", "right"]].set_visible(False)
    axes["times"].spines["bottom"].set_visible(False)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=150)
    plt.close(figure)
    print(f"picture: {PICTURE}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train 256 networks at once, and the same ones in a loop.")
    parser.add_argument("--epochs", type=int, default=30, help="passes over the training images (default: 30)")
    parser.add_argument("--loop", type=int, default=256, help="how many of the networks the loop trains (default: all)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="also with torch.compile")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument("--short", action="store_true", help="10 epochs, 16 networks in the loop, nothing compiled")
    options = parser.parse_args()
    if options.short:
        options.epochs, options.loop, options.compile = 10, 16, False
    if not 1 <= options.loop <= len(members) or options.epochs < 1:
        parser.error(f"--epochs must be at least 1, and --loop from 1 to {len(members)}")

    torch.set_num_threads(options.threads)  # a core each: a loop could also be spread over processes, a sweep over threads
    digits = load_data()
    sweeps = [run_sweep("vmapped", step_all, digits, options.epochs)]
    if options.compile:
        sweeps.append(run_sweep("vmapped and compiled", torch.compile(step_all, fullgraph=True), digits, options.epochs))
    spread = torch.linspace(0, len(members) - 1, options.loop).round().int().tolist()
    loop = run_loop(digits, options.epochs, spread)
    loop_seconds = median(m.seconds for m in loop)
    accuracies = sweeps[0].accuracies(digits)

    print_tables(accuracies, sweeps, loop, loop_seconds)
    save_picture(accuracies, sweeps, loop_seconds)
    check(accuracies, sweeps, loop, loop_seconds)


if __name__ == "__main__":
    main()
