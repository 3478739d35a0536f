"""
Long unrolls: full, truncated and checkpointed
==============================================

To differentiate through training, every step of it is kept in memory. There are two ways out, and this example measures what
they cost, with the derivative of a validation loss with respect to the learning rate of AdamW, on handwritten digits:

- **checkpointed**, ``ps.meta.unroll(..., checkpoint_every=k)``: only every ``k``-th state is kept, and the steps between are
  run again when their derivatives are wanted. The derivative is the same, and memory grows as the square root of the
  number of steps, but it takes two to three times as long;
- **truncated**, ``ps.detach((params, state))`` every ``k`` steps: what was before is forgotten. Memory does not grow at all,
  but the derivative is another one, that of the last steps alone, and may not even have the right sign.

Run it with::

    python examples/truncated_unroll.py

It takes a minute or two, prints the measurements, and saves a picture of them. It raises an error if memory grows otherwise, if
the full derivative is not that of finite differences, or if the checkpointed one differs from it.
"""

import argparse
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path

# The profiler announces itself on stderr, and complains about every tensor that is older than it.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import matplotlib

matplotlib.use("Agg")  # draws into a file, so it also works where there is no screen
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call
from torch.profiler import ProfilerActivity, profile, record_function
from tqdm import tqdm

import purestep as ps

SEED = 0
BATCH_SIZE = 32
TRUNCATION = 10  # steps, where time and memory are measured
LEARNING_RATE = 1e-2  # there, too
NUDGE = 1e-5  # of the logarithm of the learning rate, for finite differences
PICTURE = Path(__file__).resolve().parent / "output" / "truncated_unroll.png"

Params = dict[str, Tensor]
Method = Callable[[ps.Transform, Tensor], Params]


# %%
# The problem
# -----------
# 600 digits to train on, in batches of 32, and 200 to validate on. A batch is given by the numbers of its rows.

images, labels = map(torch.tensor, load_digits(return_X_y=True))
images = images / 16  # pixels are 0 to 16
shuffled = torch.randperm(len(images), generator=torch.Generator().manual_seed(SEED))
train_rows, validation_rows = shuffled[:600], shuffled[600:800]

torch.manual_seed(SEED)
network = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 10)).double()  # so that derivatives agree to many digits
initial: Params = {name: p.detach() for name, p in network.named_parameters()}


def loss(params: Params, rows: Tensor) -> Tensor:
    return F.cross_entropy(functional_call(network, params, (images[rows],)), labels[rows])


@cache
def draw_batches(steps: int) -> Tensor:
    generator = torch.Generator().manual_seed(SEED)
    return train_rows[torch.randint(len(train_rows), (steps, BATCH_SIZE), generator=generator)]


# %%
# Three ways through training
# ---------------------------


def full(opt: ps.Transform, batches: Tensor) -> Params:
    return ps.meta.unroll(opt, loss, initial, batches).params


def checkpointed(opt: ps.Transform, batches: Tensor) -> Params:
    return ps.meta.unroll(opt, loss, initial, batches, checkpoint_every=round(math.sqrt(len(batches)))).params


def truncated(every: int) -> Method:
    def train(opt: ps.Transform, batches: Tensor) -> Params:
        params, state = initial, opt.init_state(initial)
        for some in batches.split(every):
            params, state = ps.detach((params, state))
            params, state, _ = ps.meta.unroll(opt, loss, params, some, state=state)
        return params

    return train


METHODS: dict[str, Method] = {"full": full, "checkpointed": checkpointed, "truncated": truncated(TRUNCATION)}


def logarithm(lr: float) -> Tensor:
    return torch.tensor(lr, dtype=torch.float64).log()


def validation_loss(train: Method, log_lr: Tensor, steps: int) -> Tensor:
    return loss(train(ps.adamw(lr=log_lr.exp()), draw_batches(steps)), validation_rows)


def hypergradient(train: Method, lr: float, steps: int) -> float:
    """The derivative of the final validation loss with respect to the logarithm of the learning rate."""
    log_lr = logarithm(lr).requires_grad_()
    return torch.autograd.grad(validation_loss(train, log_lr, steps), log_lr)[0].item()


def finite_difference(lr: float, steps: int) -> float:
    above, below = (validation_loss(full, logarithm(lr) + h, steps).item() for h in (NUDGE, -NUDGE))
    return (above - below) / (2 * NUDGE)


# %%
# Memory and time
# ---------------
# Memory is the most that was allocated at one time, above what there was before: the profiler sees each allocation and release.
# Time is taken in another run, because it sees them slowly.


@dataclass(frozen=True)
class Measurement:
    method: str
    steps: int
    slope: float  # the hypergradient
    bytes: int
    seconds: float


def peak_memory(run: Callable[[], object]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, record_function("measured"):
        run()
    # The profiler's tables add up what each operator allocates; only the raw events tell what was alive at one time.
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    return max(accumulate((e.nbytes() for e in events if e.name() == "[memory]"), initial=0))


def measure(lengths: list[int]) -> list[Measurement]:
    hypergradient(checkpointed, LEARNING_RATE, 4)  # the first time takes longer
    found = []
    todo = [(name, steps) for steps in lengths for name in METHODS]
    with tqdm(todo, desc="memory and time", unit="run") as bar:
        for name, steps in bar:
            bar.set_postfix(method=name, steps=steps)
            seconds = math.inf
            for _ in range(2):  # the faster one: other processes only ever slow it down
                begun = time.perf_counter()
                slope = hypergradient(METHODS[name], LEARNING_RATE, steps)
                seconds = min(seconds, time.perf_counter() - begun)
            memory = peak_memory(lambda name=name, steps=steps: hypergradient(METHODS[name], LEARNING_RATE, steps))
            found.append(Measurement(name, steps, slope, memory, seconds))
    return found


def exponent(found: list[Measurement], method: str) -> float:
    """How memory grows: the slope of the straight line through the measurements on logarithmic scales, but the first."""
    points = torch.tensor([(math.log(m.steps), math.log(m.bytes)) for m in found if m.method == method])[1:]
    x, y = (points - points.mean(dim=0)).unbind(dim=1)
    return (x @ y / (x @ x)).item()


# %%
# Bias
# ----
# The truncated derivative, for more and more of the last steps, at three learning rates. With all steps it is the full one.


@dataclass(frozen=True)
class Bias:
    lr: float
    full: float
    numeric: float
    lengths: list[int]
    truncated: list[float]


def measure_bias(steps: int) -> list[Bias]:
    lengths = [k for k in (1, 2, 5, 10, 20, 50, 100, 200) if steps % k == 0]
    found = []
    with tqdm([1e-3, 3e-3, 1e-2], desc="bias           ", unit="rate") as bar:
        for lr in bar:
            slopes = [hypergradient(truncated(k), lr, steps) for k in lengths]
            found.append(Bias(lr, hypergradient(full, lr, steps), finite_difference(lr, steps), lengths, slopes))
    return found


# %%
# What came of it
# ---------------


def print_tables(found: list[Measurement], biases: list[Bias], steps: int) -> None:
    print(f"\n{'method':<14} {'steps':>6} {'peak memory':>14} {'seconds':>9} {'d loss / d log lr':>20}")
    for m in found:
        print(f"{m.method:<14} {m.steps:>6} {m.bytes / 1e6:>11.2f} MB {m.seconds:>9.3f} {m.slope:>20.12f}")
    print("\nmemory grows as steps to the power of: " + ", ".join(f"{exponent(found, name):.2f} {name}" for name in METHODS))

    print(f"\nd loss / d log lr after {steps} steps, by the number of last steps that it is taken through")
    print(f"{'':<20} " + " ".join(f"{f'lr = {b.lr:g}':>12}" for b in biases))
    for i, k in enumerate(biases[0].lengths):
        print(f"{f'truncated, {k}':<20} " + " ".join(f"{b.truncated[i]:>12.6f}" for b in biases))
    print(f"{'full':<20} " + " ".join(f"{b.full:>12.6f}" for b in biases))
    print(f"{'finite difference':<20} " + " ".join(f"{b.numeric:>12.6f}" for b in biases))


def check(found: list[Measurement], biases: list[Bias]) -> None:
    for name, low, high in (("full", 0.9, 1.1), ("checkpointed", 0.4, 0.6), ("truncated", -0.1, 0.1)):
        power = exponent(found, name)
        if not low <= power <= high:  # so that NaN fails, too
            raise RuntimeError(f"{name}: memory must grow as steps to the power of {low} to {high}, but it is {power:.2f}.")
    slopes = {(m.method, m.steps): m.slope for m in found}
    for steps in sorted({m.steps for m in found}):
        compare(f"checkpointed, {steps} steps", slopes["checkpointed", steps], slopes["full", steps], 1e-8)
    for bias in biases:
        compare(f"full, lr = {bias.lr:g}", bias.full, bias.numeric, 1e-4)
        compare(f"truncated nowhere, lr = {bias.lr:g}", bias.truncated[-1], bias.full, 1e-8)


def compare(name: str, found: float, expected: float, tolerance: float) -> None:
    if not abs(found - expected) <= tolerance * abs(expected):
        raise RuntimeError(f"{name}: the derivative must be {expected:.12g} to within {tolerance:g}, but is {found:.12g}.")


COLORS = {"full": "#08306b", "checkpointed": "#e6550d", "truncated": "#31a354"}
NOTES = {
    "full": "full",
    "checkpointed": "checkpointed every √n steps",
    "truncated": f"truncated after {TRUNCATION} steps",
}


def draw_growth(axes: Axes, found: list[Measurement], memory: bool) -> None:
    for name, color in COLORS.items():
        mine = [m for m in found if m.method == name]
        label = f"{NOTES[name]}: $n^{{{exponent(found, name):.2f}}}$" if memory else NOTES[name]
        values = [m.bytes / 1e6 if memory else m.seconds for m in mine]
        axes.plot([m.steps for m in mine], values, color=color, marker="o", linewidth=2.2, label=label)
    axes.set(xscale="log", yscale="log", xlabel="steps $n$", ylabel="MB" if memory else "s")
    axes.set_title("Peak memory" if memory else "Time, forward and backward", loc="left")
    axes.legend(frameon=False)


def draw_bias(axes: Axes, biases: list[Bias], steps: int) -> None:
    for bias, color in zip(biases, ("#9e9ac8", "#756bb1", "#3f007d")):
        shares = [x / bias.full for x in bias.truncated]
        axes.plot(bias.lengths, shares, color=color, marker="o", linewidth=2.2, label=f"learning rate {bias.lr:g}")
    axes.axhline(1, color="black", linewidth=1)
    axes.text(1, 1.02, "the full derivative")
    low, high = min(-0.25, axes.get_ylim()[0]), axes.get_ylim()[1]
    axes.axhspan(low, 0, color="#a50f15", alpha=0.08, linewidth=0)
    axes.text(1, low + 0.03, "the wrong sign", color="#a50f15")
    axes.set(xscale="log", xlabel=f"truncated after so many of {steps} steps", ylabel="truncated / full derivative")
    axes.set(ylim=(low, high + 0.05))
    axes.set_xticks(biases[0].lengths, labels=map(str, biases[0].lengths))
    axes.minorticks_off()
    axes.set_title("Bias", loc="left")
    axes.legend(frameon=False, loc="center left")


def save_picture(found: list[Measurement], biases: list[Bias], steps: int) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.8), layout="constrained")
    figure.suptitle("The derivative of a validation loss with respect to a learning rate, through training", fontsize=15)
    draw_growth(axes[0], found, memory=True)
    draw_growth(axes[1], found, memory=False)
    draw_bias(axes[2], biases, steps)
    for each in axes:
        each.grid(alpha=0.25)
        each.spines[["top", "right"]].set_visible(False)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=150)
    plt.close(figure)
    print(f"picture: {PICTURE}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure memory, time and bias of long unrolls.")
    parser.add_argument("--short", action="store_true", help="up to 160 steps instead of 1,000")
    short = parser.parse_args().short
    lengths, steps = ([20, 40, 80, 160], 50) if short else ([10, 30, 100, 300, 1000], 200)

    torch.set_num_threads(1)  # so small a network gains nothing from more
    found = measure(lengths)
    biases = measure_bias(steps)
    print_tables(found, biases, steps)
    save_picture(found, biases, steps)
    check(found, biases)


if __name__ == "__main__":
    main()
