"""
A learned optimizer: a network that trains a network
====================================================

Instead of a formula, a small network computes each update: it sees, for every single weight that is to be trained, the gradient
and a few running means of it, and says which way to go and how far. Its own weights are a hyperparameter of the transform
(``weights: ps.Weights``), so it can be trained in two ways, and this example does both, on handwritten digits:

- **by unrolling**: 40 steps of training are one function of the weights, ``ps.meta.unroll``, which is differentiated;
- **by evolution**: the weights are nudged in random directions, and what trains better shows the way, ``ps.meta.es_grad``.
  Nothing is differentiated but the classifier, so any code would do as the optimizer.

The result is compared with Adam, at the learning rate and the betas that are best for the very problems it is tested on: other
digits and other initial weights than those that the learned optimizers have seen.

Run it with::

    python examples/learned_optimizer.py

It takes a minute or two, prints a table, and saves a picture. It raises an error if a learned optimizer does not beat Adam.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")  # draws into a file, so it also works where there is no screen
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from tqdm import tqdm

import purestep as ps

STEPS = 40  # that an optimizer is trained to make
BATCH_SIZE = 64
TEST_PROBLEMS = 16
HIDDEN = 16  # of the network that computes updates
NUDGE = 0.03  # the standard deviation of what evolution adds to the weights
PICTURE = Path(__file__).resolve().parent / "output" / "learned_optimizer.png"

Weights = dict[str, Tensor]


# %%
# The problem
# -----------
# To train a small classifier: 1,000 digits and fresh initial weights for the optimizers to be trained on, and the other digits
# and other weights to test them on. The parameters are one vector, so that the network sees all of them at once.

images, labels = map(torch.tensor, load_digits(return_X_y=True))
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
images, labels = images[order].float() / 16, labels[order]  # pixels are 0 to 16
train_rows, test_rows = torch.arange(1000), torch.arange(1000, len(images))

classifier = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).requires_grad_(False)
template, as_parameters = ps.ravel(dict(classifier.named_parameters()))


def loss(params: Tensor, rows: Tensor) -> Tensor:
    return F.cross_entropy(functional_call(classifier, as_parameters(params), (images[rows],)), labels[rows])


class Problems(NamedTuple):
    """Classifiers to be trained, and the digits to train them on."""

    initial: Tensor  # (problems, parameters)
    batches: Tensor  # (problems, steps, batch), numbers of rows


def draw_problems(count: int, rows: Tensor, steps: int, generator: torch.Generator) -> Problems:
    initial = torch.empty(count, len(template)).uniform_(-1, 1, generator=generator)
    inputs = {"0.weight": 64, "0.bias": 64, "2.weight": 32, "2.bias": 32}
    width = {name: torch.full_like(p, inputs[name] ** -0.5) for name, p in as_parameters(template).items()}
    batches = rows[torch.randint(len(rows), (count, steps, BATCH_SIZE), generator=generator)]
    return Problems(initial * ps.ravel(width)[0], batches)


def losses(opt: ps.Transform, problems: Problems) -> Tensor:
    """The loss before each step, for each problem."""
    return vmap(lambda p, batches: ps.meta.unroll(opt, loss, p, batches).losses)(*problems)


# %%
# The optimizer
# -------------
# Means of the gradient over about 2, 10 and 33 steps are divided by its recent size, as Adam divides. These and what else the
# network sees are eight numbers for each parameter; what it says are two, a direction and the logarithm of a length.

DECAYS = (0.5, 0.9, 0.97)


class LearnedState(NamedTuple):
    step: ps.Scalar
    short: Tensor
    middle: Tensor
    long: Tensor
    square: Tensor

    @classmethod
    def init(cls, p: Tensor) -> "LearnedState":
        return cls(ps.counter(p), *[torch.zeros_like(p) for _ in range(4)])


@ps.leafwise(LearnedState)
def learned(g: Tensor, s: LearnedState, p: Tensor, weights: ps.Weights, lr: ps.Hyper = 0.01) -> tuple[Tensor, LearnedState]:
    t = s.step + 1
    means = [ps.lerp(g, mean, decay) for mean, decay in zip(s[1:4], DECAYS)]
    square = ps.lerp(g * g, s.square, 0.95)
    size = ps.root(square / (1 - 0.95**t)) + 1e-6
    relative = [x / size for x in (g, *[mean / (1 - decay**t) for mean, decay in zip(means, DECAYS)])]
    others = [size.log() / 5 + 1, 8 * p, torch.ones_like(p) * ps.minimum(t / STEPS, 1.0), torch.ones_like(p)]
    features = torch.stack([*[x.clamp(-5, 5) for x in relative], *others], dim=-1)
    hidden = torch.tanh(features @ weights["in"] + weights["bias"])
    direction, length = (hidden @ weights["out"]).unbind(-1)
    return -lr * direction * length.exp(), LearnedState(t, *means, square)


def initial_weights() -> Weights:
    generator = torch.Generator().manual_seed(1)
    return {
        "in": torch.randn(8, HIDDEN, generator=generator) / 8**0.5,
        "bias": torch.zeros(HIDDEN),
        "out": torch.randn(HIDDEN, 2, generator=generator) / 10 / HIDDEN**0.5,
    }


# %%
# How it is trained
# -----------------
# What is made small is the mean loss of a training run, by Adam with a warmup and a cosine.


def mean_loss(weights: Weights, problems: Problems) -> Tensor:
    return losses(learned(weights), problems).mean()


def by_unrolling(weights: Weights, problems: Problems, iteration: int) -> tuple[Weights, Tensor]:
    return grad_and_value(mean_loss)(weights, problems)


evolve = ps.meta.es_grad_and_value(mean_loss, sigma=NUDGE, num_samples=8)


def by_evolution(weights: Weights, problems: Problems, iteration: int) -> tuple[Weights, Tensor]:
    return evolve(weights, problems, seed=iteration)


@dataclass(frozen=True)
class Way:
    """A way to train the optimizer."""

    name: str
    color: str
    gradient: Callable[[Weights, Problems, int], tuple[Weights, Tensor]]
    iterations: int
    problems: int  # in each iteration
    lr: float


WAYS = [
    Way("by unrolling", "#08519c", by_unrolling, 100, 4, 2e-2),
    Way("by evolution", "#e6550d", by_evolution, 200, 2, 2e-2),
]


def train(way: Way, iterations: int) -> tuple[Weights, list[float]]:
    """The weights after so many iterations, and the mean loss in each."""
    generator = torch.Generator().manual_seed(2)
    schedule = ps.schedules.warmup_cosine(way.lr, warmup_steps=max(iterations // 6, 1), total_steps=iterations + 1)
    opt, weights = ps.chain(ps.clip_by_global_norm(1.0), ps.adam(schedule)), initial_weights()
    state, history = opt.init_state(weights), []
    with tqdm(range(iterations), desc=f"{way.name:<13}", unit="run") as bar:
        for iteration in bar:
            problems = draw_problems(way.problems, train_rows, STEPS, generator)
            gradient, value = way.gradient(weights, problems, iteration)
            weights, state = opt.step(gradient, state, weights)
            history.append(value.item())
            bar.set_postfix(loss=f"{history[-1]:.3f}")
    return weights, history


# %%
# The best Adam
# -------------
# For the problems of the test themselves, among 25 learning rates and three pairs of betas: one population each.

RATES = torch.logspace(-3, -0.5, 25)
BETAS = [(0.9, 0.999), (0.9, 0.95), (0.8, 0.9)]


@dataclass(frozen=True)
class Curve:
    """The mean loss of the test problems before each step."""

    name: str
    color: str
    values: Tensor

    @property
    def mean(self) -> float:
        return self.values[:STEPS].mean().item()

    @property
    def last(self) -> float:
        return self.values[STEPS - 5 : STEPS].mean().item()


def best_adam(problems: Problems, rates: Tensor) -> Curve:
    found = []
    for betas in tqdm(BETAS, desc="Adam         ", unit="sweep"):
        sweep = ps.adam(lr=rates, betas=betas)
        curves = vmap(losses, in_dims=(ps.in_dims(sweep), None))(sweep, problems).mean(1)
        k = int(curves[:, :STEPS].mean(1).argmin())
        found.append(Curve(f"the best Adam: lr {rates[k]:.3f}, betas {betas}", "#636363", curves[k]))
    return min(found, key=lambda curve: curve.mean)


# %%
# What came of it
# ---------------


def print_table(curves: list[Curve]) -> None:
    print(f"\n{'on problems that are new':<48} {'mean loss':>10} {'last loss':>10}")
    for curve in curves:
        print(f"{curve.name:<48} {curve.mean:>10.4f} {curve.last:>10.4f}")


def check(curves: list[Curve]) -> None:
    adam = curves[0]
    for curve in curves[1:]:
        if not curve.mean < adam.mean:  # so that NaN fails, too
            raise RuntimeError(f"{curve.name}: the mean loss must be below {adam.mean:.4f}, Adam's, but is {curve.mean:.4f}.")


def save_picture(curves: list[Curve], histories: list[list[float]]) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    size = sum(w.numel() for w in initial_weights().values())
    figure.suptitle(f"A network of {size} weights that trains a classifier of digits", fontsize=15)
    for curve in curves:
        left.plot(curve.values, color=curve.color, linewidth=2.2, label=curve.name)
    left.axvline(STEPS, color="black", linewidth=1)
    left.text(STEPS + 1, curves[0].values[0], "more steps than it\nwas trained to make", va="top")
    left.set(yscale="log", xlabel="step", ylabel="loss, mean of 16 new problems")
    left.set_title("What it does", loc="left")
    for curve, history in zip(curves[1:], histories):
        share = [(k + 0.5) / len(history) for k in range(len(history))]
        right.plot(share, history, color=curve.color, linewidth=1.8, label=f"{curve.name}, {len(history)} iterations")
    right.axhline(curves[0].mean, color=curves[0].color, linewidth=1.8, label="the best Adam on the test problems")
    right.set(xlabel="share of all iterations", ylabel="mean loss of a training run", ylim=(0, min(3.0, right.get_ylim()[1])))
    right.set_title("How it was trained", loc="left")
    for axes in (left, right):
        axes.legend(frameon=False, loc="lower left" if axes is left else "upper right")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=150)
    plt.close(figure)
    print(f"picture: {PICTURE}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a learned optimizer, and compare it with Adam.")
    parser.add_argument("--short", action="store_true", help="three iterations of each way, which are too few to beat Adam")
    short = parser.parse_args().short

    test = draw_problems(TEST_PROBLEMS, test_rows, 2 * STEPS, torch.Generator().manual_seed(3))
    curves, histories = [best_adam(test, RATES[::6] if short else RATES)], []
    for way in WAYS:
        weights, history = train(way, 3 if short else way.iterations)
        curves.append(Curve(f"learned {way.name}", way.color, losses(learned(weights), test).mean(0)))
        histories.append(history)
    print_table(curves)
    save_picture(curves, histories)
    if not short:
        check(curves)


if __name__ == "__main__":
    main()
