"""
MAML: learning to learn
=======================

Model-agnostic meta-learning (`Finn, Abbeel & Levine, 2017 <https://arxiv.org/abs/1703.03400>`_) looks for parameters from
which one gradient step on a few examples of a new task goes far. Its gradient is one through an optimizer's step:

1. sinusoids, as in the paper's first experiment: a network sees 5 or 10 points of a sine wave it has never met;
2. digits, five classes, one image of each: meta-trained on the digits 0 to 4, tested on 5 to 9.

In both the inner optimizer is a transform, and the tasks are vmapped over. Beside it stand a network pretrained on all tasks
without looking ahead and, for the digits, one that has learned nothing before. All are given the best of several step sizes.

Run it with::

    python examples/maml.py

It takes about three minutes on two cores, prints three tables and saves a picture. It raises an error if one step from the
meta-learned parameters does not clearly beat one step from the pretrained ones, or if first-order MAML, which leaves the
second derivatives out, falls far behind.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")  # draws into a file, so it also works where there is no screen
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from tqdm import tqdm

import purestep as ps

SEED = 0
META_LR = 1e-3
STEPS = 10  # of gradient descent on a new task; MAML is trained for the first of them
SECOND, FIRST, PRETRAINED, SCRATCH, NEAREST = "MAML", "first-order MAML", "pretrained", "from scratch", "nearest image"
COLORS = {SECOND: "#08519c", FIRST: "#e6550d", PRETRAINED: "#636363", SCRATCH: "#31a354", NEAREST: "#756bb1"}
PICTURE = Path(__file__).resolve().parent / "output" / "maml.png"

Params = dict[str, Tensor]


# %%
# Learning to learn
# -----------------
# A task is a few examples to learn from and others to be judged by. A problem is a network, what it is to do, and the
# optimizer that adapts it to a task.


class Tasks(NamedTuple):
    """One task or, with a first dimension more, a batch of tasks."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


@dataclass(frozen=True)
class Problem:
    model: nn.Module
    inner: ps.Transform
    step_sizes: list[float]  # to choose from when it is used
    criterion: Callable[[Tensor, Tensor], Tensor]  # what is minimized
    mistake: Callable[[Tensor, Tensor], Tensor]  # what is reported; less is better, too

    def output(self, params: Params, x: Tensor) -> Tensor:
        return functional_call(self.model, params, (x,))

    def loss(self, params: Params, x: Tensor, y: Tensor) -> Tensor:
        return self.criterion(self.output(params, x), y)

    def initial(self) -> Params:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}


Objective = Callable[[Params, Tasks], Tensor]
Sampler = Callable[[torch.Generator], Tasks]


def maml(problem: Problem, first_order: bool = False) -> Objective:
    """The loss after one step on each task, as a function of where the step starts."""

    def look_ahead(params: Params, task: Tasks) -> Tensor:
        def loss(p: Params) -> Tensor:
            return problem.loss(p, task.x, task.y)

        adapted = ps.meta.unroll(problem.inner, loss, params, 1, first_order=first_order).params
        return problem.loss(adapted, task.test_x, task.test_y)

    return lambda params, tasks: vmap(look_ahead, in_dims=(None, 0))(params, tasks).mean()


def pretraining(problem: Problem) -> Objective:
    """The baseline: the loss on all examples of all tasks at once."""

    def loss(params: Params, tasks: Tasks) -> Tensor:
        x, y = torch.cat([tasks.x, tasks.test_x], dim=1), torch.cat([tasks.y, tasks.test_y], dim=1)
        return problem.loss(params, x.flatten(0, 1), y.flatten(0, 1))

    return loss


def train(name: str, objective: Objective, params: Params, sample: Sampler, iterations: int) -> Params:
    generator = torch.Generator().manual_seed(SEED)  # all methods see the same tasks
    optimizer = ps.adam(lr=META_LR)
    state = optimizer.init_state(params)
    with tqdm(range(iterations), desc=f"{name:<28}", unit="step") as bar:
        for i in bar:
            grads, loss = grad_and_value(objective)(params, sample(generator))
            params, state = optimizer.step(grads, state, params)
            if i % 50 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return params


# %%
# Adapting to new tasks
# ---------------------
# Gradient descent on each task, again as a pure function, so that it is vmapped over tasks, and over step sizes as well: an
# optimizer is a pytree, and a population of them is one whose learning rate is a 1-d tensor.


def adapt(problem: Problem, optimizer: ps.Transform, params: Params, task: Tasks) -> list[Params]:
    """The parameters after 0, 1, ... steps on one task."""

    def loss(p: Params) -> Tensor:
        return problem.loss(p, task.x, task.y)

    path, state = [params], optimizer.init_state(params)
    for _ in range(STEPS):
        params, state, _ = ps.meta.unroll(optimizer, loss, params, 1, state=state)
        path.append(params)
    return path


def mistakes(problem: Problem, params: Params, tasks: Tasks) -> Tensor:
    """What goes wrong in each task after 0, 1, ... steps, of the size that is best for so many: of shape (tasks, steps + 1)."""

    def one(optimizer: ps.Transform, task: Tasks) -> Tensor:
        path = adapt(problem, optimizer, params, task)
        return torch.stack([problem.mistake(problem.output(p, task.test_x), task.test_y) for p in path])

    population = problem.inner.replace(lr=torch.tensor(problem.step_sizes))
    each_task = vmap(one, in_dims=(None, 0), chunk_size=100)
    tried = vmap(each_task, in_dims=(ps.in_dims(population), None))(population, tasks)
    best = tried.mean(1).nan_to_num(nan=math.inf).argmin(0)  # the larger ones diverge on some tasks
    return torch.stack([tried[k, :, step] for step, k in enumerate(best.tolist())], dim=1)


def measure(title: str, problem: Problem, learned: dict[str, Params], tasks: Tasks) -> dict[str, Tensor]:
    bar = tqdm(learned.items(), desc=f"{title:<28}", unit="method")
    return {name: mistakes(problem, params, tasks) for name, params in bar}


# %%
# Sinusoids
# ---------
# Amplitudes are between 0.1 and 5, phases between 0 and pi, inputs between -5 and 5, all uniform. The network has two hidden
# layers of 40 units. MAML is trained with 10 points, for 10 others, after one step of size 0.01, and then tested with 5 points
# and with 10. The paper trains for 70,000 steps; this example makes do with fewer.

META_BATCH, SHOTS = 25, 10


def make_sinusoids() -> Problem:
    torch.manual_seed(SEED)
    model = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
    return Problem(model, ps.sgd(lr=0.01), [0.001, 0.002, 0.005, 0.01, 0.02], criterion=F.mse_loss, mistake=F.mse_loss)


def sample_sinusoids(count: int, generator: torch.Generator, test_x: Tensor | None = None) -> Tasks:
    def uniform(low: float, high: float, points: int = 1) -> Tensor:
        return low + (high - low) * torch.rand(count, points, 1, generator=generator)

    amplitude, phase = uniform(0.1, 5), uniform(0, math.pi)
    x, new_x = uniform(-5, 5, SHOTS), uniform(-5, 5, SHOTS) if test_x is None else test_x.expand(count, -1, 1)
    return Tasks(x, amplitude * torch.sin(x - phase), new_x, amplitude * torch.sin(new_x - phase))


@dataclass(frozen=True)
class Sinusoids:
    """What came of the first problem."""

    errors: dict[int, dict[str, Tensor]]  # by shots and by method: of shape (tasks, steps + 1)
    task: Tasks  # one of them, with 10 shots
    fits: dict[str, list[Tensor]]  # by method: the network's curve on it after 0, 1, ... steps


def run_sinusoids(iterations: int, test_tasks: int) -> Sinusoids:
    problem = make_sinusoids()
    initial = problem.initial()

    def learn(name: str, objective: Objective) -> Params:
        return train(f"sinusoids: {name}", objective, initial, lambda g: sample_sinusoids(META_BATCH, g), iterations)

    second = learn(SECOND, maml(problem))
    first = learn(FIRST, maml(problem, first_order=True))
    pretrained = learn(PRETRAINED, pretraining(problem))

    generator = torch.Generator().manual_seed(SEED + 1)
    tasks = sample_sinusoids(test_tasks, generator, test_x=torch.linspace(-5, 5, 100)[:, None])
    learned = {SECOND: second, FIRST: first, PRETRAINED: pretrained}
    errors = {}
    for shots in (5, 10):
        few = tasks._replace(x=tasks.x[:, :shots], y=tasks.y[:, :shots])
        errors[shots] = measure(f"sinusoids: test on {shots} points", problem, learned, few)

    wide = (tasks.test_y.amax((1, 2)) - 4).abs().argmin()  # the amplitude nearest to 4 makes a picture to see something on
    task = Tasks(*[x[wide] for x in tasks])
    fits = {
        name: [problem.output(p, task.test_x) for p in adapt(problem, problem.inner, learned[name], task)]
        for name in (SECOND, PRETRAINED)
    }
    return Sinusoids(errors, task, fits)


# %%
# Digits
# ------
# scikit-learn's digits are 8 x 8 pixels. A task shows one image of each of five classes, in an order of its own, and asks for
# five others of each. Five digits are few to learn to learn from, so every task makes other characters of them: each is
# rotated, mirrored and stretched, all its images alike. The paper turns its characters, too, and its networks, like this
# one, are convolutional with batch norm that always takes the statistics of the batch at hand.
#
# What there is to gain is speed. One step from MAML's parameters does what takes four from random ones; after ten both are a
# little better than the nearest image in pixels, and more than that five digits do not teach about five others.

WAYS, QUERIES = 5, 5
DIGITS_META_BATCH = 8
TRAIN_CLASSES, TEST_CLASSES = range(5), range(5, 10)


class BatchNorm(nn.Module):
    """Written out, because second derivatives of torch's own are wrong inside ``vmap``, as of 2.13."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels, 1, 1)), nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0, keepdim=True)
        return (x - mean) * torch.rsqrt(variance + 1e-5) * self.weight + self.bias


def make_digits() -> Problem:
    def block(channels: int) -> list[nn.Module]:
        return [nn.Conv2d(channels, 16, 3, padding=1), BatchNorm(16), nn.ReLU()]

    torch.manual_seed(SEED)
    model = nn.Sequential(
        *block(1), *block(16), nn.MaxPool2d(2), *block(16), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, WAYS)
    )
    return Problem(model, ps.sgd(lr=0.1), [0.03, 0.1, 0.3], criterion=F.cross_entropy, mistake=error_rate)


def error_rate(outputs: Tensor, labels: Tensor) -> Tensor:
    return (outputs.argmax(-1) != labels).float().mean()


def load_images() -> list[Tensor]:
    """The images of each class, each of mean 0 and variance 1."""
    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    images = images.float().view(-1, 1, 8, 8)
    images = (images - images.mean((2, 3), keepdim=True)) / images.std((2, 3), keepdim=True)
    return [images[labels == k] for k in range(10)]


def sample_digits(images: list[Tensor], count: int, generator: torch.Generator, shuffle: bool = True) -> Tasks:
    """Tasks on these classes; without `shuffle` a class has the same label in all of them."""
    rows = [torch.rand(count, len(pool), generator=generator).argsort(1)[:, : 1 + QUERIES] for pool in images]
    x = torch.stack([pool[chosen] for pool, chosen in zip(images, rows)], dim=1)
    if shuffle:
        order = torch.rand(count, WAYS, generator=generator).argsort(1)
        x = x[torch.arange(count)[:, None], order]
    labels = torch.arange(WAYS).expand(count, WAYS)
    return Tasks(x[:, :, 0], labels, x[:, :, 1:].flatten(1, 2), labels.repeat_interleave(QUERIES, dim=1))


def make_characters(tasks: Tasks, generator: torch.Generator) -> Tasks:
    """Each class of each task under a linear map of its own, with singular values between 0.8 and 1.25."""
    count = len(tasks.x)
    left, _, right = torch.linalg.svd(torch.randn(count, WAYS, 2, 2, generator=generator))
    stretch = 1.25 ** (2 * torch.rand(count, WAYS, 2, 1, generator=generator) - 1)
    maps = F.pad(left @ (stretch * right), (0, 1))  # no shift

    def warp(x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        grid = F.affine_grid(maps.repeat_interleave(x.shape[1] // WAYS, dim=1).flatten(0, 1), flat.shape, align_corners=False)
        return F.grid_sample(flat, grid, padding_mode="border", align_corners=False).view_as(x)

    return tasks._replace(x=warp(tasks.x), test_x=warp(tasks.test_x))


def run_digits(iterations: int, test_tasks: int) -> dict[str, Tensor]:
    """By method: the error rate in each task after 0, 1, ... steps."""
    problem, images = make_digits(), load_images()
    initial = problem.initial()

    def learn(name: str, objective: Objective, shuffle: bool) -> Params:
        def sample(generator: torch.Generator) -> Tasks:
            tasks = sample_digits([images[k] for k in TRAIN_CLASSES], DIGITS_META_BATCH, generator, shuffle)
            return make_characters(tasks, generator)

        return train(f"digits: {name}", objective, initial, sample, iterations)

    second = learn(SECOND, maml(problem), shuffle=True)
    pretrained = learn(PRETRAINED, pretraining(problem), shuffle=False)  # fixed labels, or there is nothing to learn

    generator = torch.Generator().manual_seed(SEED + 1)
    tasks = sample_digits([images[k] for k in TEST_CLASSES], test_tasks, generator)
    errors = measure("digits: test", problem, {SECOND: second, PRETRAINED: pretrained, SCRATCH: initial}, tasks)
    nearest = torch.cdist(tasks.test_x.flatten(2), tasks.x.flatten(2)).argmin(-1) != tasks.test_y
    return errors | {NEAREST: nearest.float().mean(1, keepdim=True).expand(-1, STEPS + 1)}  # in pixels; it takes no steps


# %%
# What came of it
# ---------------


@dataclass(frozen=True)
class Average:
    """Over all tasks, after 0, 1, ... steps: the mean, and half the width of its 95 % confidence interval."""

    mean: Tensor
    half_width: Tensor


def average(values: Tensor) -> Average:
    return Average(values.mean(0), 1.96 * values.std(0) / len(values) ** 0.5)


def print_table(title: str, results: dict[str, Tensor], number: str) -> None:
    print(f"\n{title}\n{'':<18}" + "".join(f"{when:>18}" for when in ("0 steps", "1 step", f"{STEPS} steps")))
    for name, values in results.items():
        found = average(values)
        cells = [f"{found.mean[k]:{number}} ± {found.half_width[k]:{number}}" for k in (0, 1, STEPS)]
        print(f"{name:<18}" + "".join(f"{cell:>18}" for cell in cells))


def print_tables(sinusoids: Sinusoids, digits: dict[str, Tensor]) -> None:
    for shots, results in sinusoids.errors.items():
        print_table(f"sinusoids: mean squared error from {shots} points, {len(results[SECOND])} tasks", results, ".3f")
    accuracies = {name: 1 - values for name, values in digits.items()}
    print_table(f"digits: accuracy from one image of each class, {len(digits[SECOND])} tasks", accuracies, ".1%")
    print("\n±: 95 % confidence; each number with the best of several step sizes")


def draw_fits(axes: Axes, name: str, task: Tasks, curves: list[Tensor]) -> None:
    x = task.test_x.squeeze()
    axes.plot(x, task.test_y.squeeze(), color="#bdbdbd", linewidth=5, label="truth")
    for steps, style in ((0, ":"), (1, "--"), (STEPS, "-")):
        label = "before" if steps == 0 else f"after {steps} step" + "s" * (steps > 1)
        axes.plot(x, curves[steps].squeeze(), color=COLORS[name], linestyle=style, linewidth=1.8, label=label)
    axes.plot(task.x.squeeze(), task.y.squeeze(), "o", color="black", markersize=5, label=f"the {len(task.x)} points seen")
    axes.set_title(f"One new sinusoid: {name}", loc="left")
    axes.set(xlabel="x", xlim=(-5, 5), ylim=(-7.5, 5.5))
    axes.legend(frameon=False, fontsize=8.5, ncols=2, loc="lower left")


def draw_curves(axes: Axes, results: dict[str, Tensor], title: str) -> None:
    for name, values in results.items():
        found = average(values)
        mean, half = found.mean, found.half_width
        style = {"linestyle": ":"} if name == NEAREST else {"marker": "o", "markersize": 3.5}
        axes.plot(range(STEPS + 1), mean, color=COLORS[name], linewidth=1.8, label=name, **style)
        axes.fill_between(range(STEPS + 1), mean - half, mean + half, color=COLORS[name], alpha=0.2, linewidth=0)
    axes.set_title(title, loc="left")
    axes.set(xlabel="gradient steps on the new task", xlim=(0, STEPS))


def save_picture(sinusoids: Sinusoids, digits: dict[str, Tensor]) -> None:
    figure = plt.figure(figsize=(13, 8), layout="constrained")
    axes = figure.subplot_mosaic([["maml"] * 3 + ["pretrained"] * 3, ["5"] * 2 + ["10"] * 2 + ["digits"] * 2])
    figure.suptitle("MAML: parameters from which a gradient step goes far (bands: 95 % confidence)", fontsize=15)
    draw_fits(axes["maml"], SECOND, sinusoids.task, sinusoids.fits[SECOND])
    draw_fits(axes["pretrained"], PRETRAINED, sinusoids.task, sinusoids.fits[PRETRAINED])
    for shots, results in sinusoids.errors.items():
        draw_curves(axes[str(shots)], results, f"Sinusoids from {shots} points: mean squared error")
        axes[str(shots)].set(yscale="log", ylim=(0.08, 6))
        axes[str(shots)].set_yticks(ticks := [0.1, 0.2, 0.5, 1, 2, 5], labels=[f"{x:g}" for x in ticks])
        axes[str(shots)].minorticks_off()
    accuracies = {name: 1 - values for name, values in digits.items()}
    draw_curves(axes["digits"], accuracies, "New digits from one image each: accuracy")
    axes["digits"].axhline(1 / WAYS, color="black", linewidth=1, linestyle=":")
    axes["digits"].text(STEPS, 1 / WAYS + 0.01, "chance", ha="right", va="bottom", fontsize=9)
    axes["digits"].set(ylim=(0.15, 0.85))
    axes["10"].legend(frameon=False, loc="center right", bbox_to_anchor=(1, 0.52))
    axes["digits"].legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 0.12))
    for each in axes.values():
        each.grid(alpha=0.25)
        each.spines[["top", "right"]].set_visible(False)

    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=150)
    print(f"picture: {PICTURE}")


def require(holds: bool, claim: str) -> None:
    if not holds:
        raise RuntimeError(f"This must hold, but does not: {claim}.")


def check(sinusoids: Sinusoids, digits: dict[str, Tensor], short: bool) -> None:
    # Every comparison is false for NaN, and so fails.
    for shots, results in sinusoids.errors.items():
        second, first, pretrained = (average(results[name]).mean[1].item() for name in (SECOND, FIRST, PRETRAINED))
        factor, part = (1.15, 0.3) if short else (2.5, 0.65)
        told = f"one step on {shots} points leaves {pretrained:.3f} to the pretrained network, at least {factor} times"
        require(pretrained >= factor * second, f"{told} what it leaves to MAML, {second:.3f}")
        share = (pretrained - first) / (pretrained - second)
        require(share >= part, f"first-order MAML has {part:.0%} of MAML's lead over pretraining, and not {share:.0%}")
    ours = average(1 - digits[SECOND])
    low, told = (ours.mean - ours.half_width)[1].item(), f"after one step MAML's accuracy, {ours.mean[1]:.1%}, is above"
    require(low > 1.5 / WAYS, f"{told} 1.5 times that of chance")
    if not short:
        for name in (PRETRAINED, SCRATCH):
            other = (1 - digits[name]).mean(0)[1].item()
            require(low > other + 0.1, f"{told} that of {name}, {other:.1%}, by 10 points")


def main() -> None:
    parser = argparse.ArgumentParser(description="Meta-learn sinusoids and digits, and compare with pretraining.")
    parser.add_argument("--short", action="store_true", help="a small part of the training, to see that everything runs")
    short = parser.parse_args().short

    torch.set_num_threads(1)  # so small a network gains nothing from more
    sinusoid_steps, digit_steps = (500, 20) if short else (10_000, 400)
    sinusoids = run_sinusoids(sinusoid_steps, test_tasks=100 if short else 600)
    digits = run_digits(digit_steps, test_tasks=40 if short else 400)

    print(f"\nmeta-training: {sinusoid_steps:,} steps on sinusoids (the paper: 70,000), {digit_steps} on digits")
    print_tables(sinusoids, digits)
    save_picture(sinusoids, digits)
    check(sinusoids, digits, short)


if __name__ == "__main__":
    main()
