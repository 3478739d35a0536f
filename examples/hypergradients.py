"""
Hypergradients: an optimizer tuned by gradient descent
======================================================

Training is a function of the optimizer, and ``ps.meta.unroll`` is that function: 60 steps of AdamW on a hundred handwritten
digits, differentiable with respect to the learning rate, both betas, epsilon and the weight decay. So the loss on a validation
set can be minimized over these numbers, by another of purestep's optimizers. Three sets of them are learned:

1. AdamW's five;
2. the five and a learning-rate schedule, seven knots that are joined by lines;
3. the five and a learning rate for every parameter, as in Meta-SGD (Li et al., 2017).

Run it with::

    python examples/hypergradients.py

It takes a minute or two, prints every hypergradient beside a finite difference, then what the tuning has done to the test
accuracy, and saves a picture. It raises an error if the relative error of a hypergradient exceeds 1e-4, or if the tuning does
not lower the validation loss.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")  # draws into a file, so it also works where there is no screen
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value
from torch.utils._pytree import tree_leaves, tree_map
from tqdm import tqdm

import purestep as ps

SEED = 0
STEPS = 60  # of the inner training
BOUNDARIES = (10, 20, 30, 40, 50, 60)  # steps, where the schedule's knots are after the first
NUDGE = 1e-4  # what finite differences move a number by
MAX_ERROR = 1e-4  # of a hypergradient, relative to the finite difference
PICTURE = Path(__file__).resolve().parent / "output" / "hypergradients.png"


# %%
# The inner problem
# -----------------
# A hundred digits to train on, four hundred to validate on, and the rest for the test.

Data = tuple[Tensor, Tensor]
Params = dict[str, Tensor]


def load_data() -> tuple[Data, ...]:
    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    train, others = train_test_split(range(len(labels)), train_size=100, random_state=SEED, stratify=labels)
    validation, test = train_test_split(others, train_size=400, random_state=SEED, stratify=labels[others])
    return tuple((images[rows] / 16, labels[rows]) for rows in (train, validation, test))  # pixels are 0 to 16


train_set, validation_set, test_set = load_data()
torch.manual_seed(SEED)
network = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 10)).double()  # finite differences need it
initial: Params = {name: p.detach() for name, p in network.named_parameters()}


def loss(params: Params, data: Data = train_set) -> Tensor:
    images, labels = data
    return F.cross_entropy(functional_call(network, params, (images,)), labels)


def accuracy(params: Params) -> float:
    images, labels = test_set
    return (functional_call(network, params, (images,)).argmax(dim=1) == labels).double().mean().item()


# %%
# What is learned
# ---------------
# Gradient descent knows no bounds, but a learning rate is positive, and a beta between 0 and 1. So what is learned is a pytree
# of logarithms and logits, and the optimizer is made of it.

Free = dict[str, Any]
BEGIN = {
    "lr": 1e-3,  # torch's defaults, but for the weight decay:
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-8,
    "weight_decay": 0.3,  # torch's 0.01 has no effect in so few steps, and the logarithm of what has no effect no slope
}


def begin() -> Free:
    values = {name: torch.tensor(x, dtype=torch.float64) for name, x in BEGIN.items()}
    return {name: x.logit() if "beta" in name else x.log() for name, x in values.items()}


def numbers(free: Free) -> dict[str, Tensor]:
    return {name: free[name].sigmoid() if "beta" in name else free[name].exp() for name in BEGIN}


def adamw(free: Free) -> ps.Transform:
    n = numbers(free)
    return ps.adamw(n["lr"], (n["beta1"], n["beta2"]), n["eps"], n["weight_decay"])


def train(free: Free, data: Data = train_set) -> Params:
    return ps.meta.unroll(adamw(free), lambda params: loss(params, data), initial, STEPS).params


# %%
# **A learned schedule** is a schedule whose values are learned; ``replace`` puts it where the number was.


def rates(free: Free) -> tuple[Tensor, ...]:
    return tuple((free["lr"] + free["knots"]).exp())


def train_scheduled(free: Free) -> Params:
    schedule = ps.schedules.piecewise_interpolate(rates(free), BOUNDARIES)
    return ps.meta.unroll(adamw(free).replace(lr=schedule), loss, initial, STEPS).params


# %%
# **A learning rate for every parameter** has the shape of the parameters, so it belongs in a state. ``unroll`` takes one.


class Factor(NamedTuple):
    log: Tensor

    @classmethod
    def init(cls, p: Tensor) -> "Factor":
        return cls(torch.zeros_like(p))


@ps.leafwise(Factor)
def scale_each(u: Tensor, s: Factor, p: Tensor) -> tuple[Tensor, Factor]:
    return u * s.log.exp(), s


def train_each(free: Free) -> Params:
    opt = ps.chain(adamw(free), scale_each())
    *state, _ = opt.init_state(initial)
    return ps.meta.unroll(opt, loss, initial, STEPS, state=(*state, Factor(free["factors"]))).params


@dataclass
class Study:
    """One set of numbers, how a network is trained with them, and their history."""

    name: str
    begin: Free
    train: Callable[[Free], Params]
    history: list[Free] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    test: list[float] = field(default_factory=list)

    def objective(self, free: Free) -> tuple[Tensor, Params]:
        """The validation loss of the network that is trained with these numbers, and the network."""
        params = self.train(free)
        return loss(params, validation_set), params


def make_studies() -> list[Study]:
    return [
        Study("five numbers", begin(), train),
        Study("five and a schedule", begin() | {"knots": torch.zeros(1 + len(BOUNDARIES)).double()}, train_scheduled),
        Study("five and a rate for each", begin() | {"factors": tree_map(torch.zeros_like, initial)}, train_each),
    ]


# %%
# Are the hypergradients right?
# -----------------------------
# Each number is moved a little to both sides, and the network trained anew. For the factors of all parameters one direction, a
# random one, has to do.


def check_hypergradients(study: Study) -> None:
    print(f"\n{study.name:<32} {'hypergradient':>16} {'finite difference':>18} {'relative error':>15}")
    slopes, _ = grad(study.objective, has_aux=True)(study.begin)
    for name, direction in directions(study.begin):
        exact = sum((s * d).sum() for s, d in zip(tree_leaves(slopes), tree_leaves(direction))).item()
        above, below = (study.objective(moved(study.begin, direction, h))[0].item() for h in (NUDGE, -NUDGE))
        numeric = (above - below) / (2 * NUDGE)
        error = abs(exact - numeric) / abs(numeric)
        print(f"{name:<32} {exact:>16.8e} {numeric:>18.8e} {error:>15.1e}")
        if not error <= MAX_ERROR:  # rather than `>`: NaN is to fail, too
            raise RuntimeError(f"{study.name}: the hypergradient of {name} is off by {error:.1e}, more than {MAX_ERROR:g}.")


def directions(free: Free) -> Iterator[tuple[str, Free]]:
    nothing = tree_map(torch.zeros_like, free)
    for name in BEGIN if free.keys() == BEGIN.keys() else ():  # they begin alike in all studies
        yield f"{'logit' if 'beta' in name else 'log'} {name}", nothing | {name: torch.ones_like(free[name])}
    for k, knot in enumerate(torch.eye(len(free.get("knots", ()))).double()):
        yield f"log factor of knot {k}", nothing | {"knots": knot}
    if "factors" in free:
        generator = torch.Generator().manual_seed(SEED)
        random = tree_map(lambda x: torch.randn(x.shape, dtype=x.dtype, generator=generator), free["factors"])
        yield "log factors of all parameters", nothing | {"factors": random}


def moved(free: Free, direction: Free, distance: float) -> Free:
    return tree_map(lambda x, d: x + distance * d, free, direction)


# %%
# Tuning
# ------
# The outer optimizer is a Transform like the inner one. What it steps on is a pytree, as a network's parameters are.


def tune(study: Study, iterations: int) -> None:
    opt = ps.adam(ps.schedules.cosine(0.2, total_steps=iterations), betas=(0.8, 0.9))
    free, state = study.begin, opt.init_state(study.begin)
    with tqdm(range(iterations + 1), desc=f"{study.name:<24}", unit="iteration") as bar:
        for _ in bar:
            slopes, (value, params) = grad_and_value(study.objective, has_aux=True)(free)
            study.history.append(free)
            study.validation.append(value.item())
            study.test.append(loss(params, test_set).item())
            bar.set_postfix(validation=f"{value.item():.4f}", refresh=False)
            free, state = opt.step(slopes, state, free)


# %%
# What came of it
# ---------------


def print_table(studies: list[Study]) -> None:
    both = tuple(torch.cat(parts) for parts in zip(train_set, validation_set))
    rows = [("before", studies[0].train(studies[0].begin))]
    rows += [(study.name, study.train(study.history[-1])) for study in studies]
    rows += [("five, trained on both sets", train(studies[0].history[-1], both))]
    print(f"\n{'':<28} {'training':>9} {'validation':>11} {'test loss':>10} {'test accuracy':>14}")
    for name, params in rows:
        losses = [loss(params, data).item() for data in (train_set, validation_set, test_set)]
        print(f"{name:<28} {losses[0]:>9.3f} {losses[1]:>11.3f} {losses[2]:>10.3f} {accuracy(params):>14.1%}")
    count = sum(p.numel() for p in initial.values())
    print(f"\nWith {count:,} rates the network learns from the validation set, too. The last row is what to compare them with.")
    print("AdamW: " + ", ".join(f"{k} {BEGIN[k]:g} -> {x.item():.4g}" for k, x in numbers(studies[0].history[-1]).items()))


COLORS = ("#08519c", "#e6550d", "#31a354")


def draw_losses(axes: Axes, studies: list[Study]) -> None:
    for study, color in zip(studies, COLORS):
        axes.plot(study.validation, color=color, linewidth=2.2, label=study.name)
        axes.plot(study.test, color=color, linewidth=1.3, linestyle="--")
    axes.set(yscale="log", xlabel="outer iteration", ylabel="cross-entropy", xlim=(0, len(studies[0].test) - 1), ylim=(0.1, 2))
    axes.set_yticks([0.1, 0.2, 0.5, 1, 2], labels=["0.1", "0.2", "0.5", "1", "2"])
    axes.minorticks_off()
    axes.set_title("Loss on the validation set (dashed: on the test set)", loc="left")
    axes.legend(frameon=False)


def draw_numbers(axes: Axes, study: Study) -> None:
    curves = [numbers(free) for free in study.history]
    for name, label, color in [
        ("weight_decay", "weight decay", "#31a354"),
        ("beta1", "1 - beta1", "#9e9ac8"),
        ("lr", "learning rate", "#08519c"),
        ("beta2", "1 - beta2", "#54278f"),
        ("eps", "eps", "#636363"),
    ]:
        values = [(1 - n[name] if "beta" in name else n[name]).item() for n in curves]
        axes.plot(values, color=color, linewidth=2.2)
        axes.annotate(label, (len(values) - 1, values[-1]), (5, 0), textcoords="offset points", color=color, va="center")
    axes.set(yscale="log", xlabel="outer iteration", xlim=(0, len(curves) - 1))
    axes.set_title("The five numbers of AdamW", loc="left")


def draw_schedules(axes: Axes, study: Study) -> None:
    colors = plt.get_cmap("Oranges")
    knots = (0, *BOUNDARIES)
    for i, free in enumerate(study.history):
        last = i == len(study.history) - 1
        color = colors(0.15 + 0.6 * i / len(study.history))
        axes.plot(knots, [r.item() for r in rates(free)], color=COLORS[1] if last else color, linewidth=3 if last else 0.8)
    for i, note, shift in ((0, "before", 6), (-1, "learned", -26)):
        height = rates(study.history[i])[-1].item()
        axes.annotate(note, (STEPS, height), (-4, shift), textcoords="offset points", ha="right", weight="bold")
    axes.set(yscale="log", xlabel="step of the inner training", ylabel="learning rate", xlim=(0, STEPS))
    axes.set_title("The schedule, in each outer iteration", loc="left")


def draw_rates(axes: Axes, study: Study) -> None:
    factors = study.history[-1]["factors"]["0.weight"]  # (hidden, pixels)
    image = factors.mean(dim=0).exp().view(8, 8)
    shown = axes.imshow(image.numpy(), cmap="RdBu_r", norm=LogNorm(1 / 8, 8))
    axes.set(xticks=[], yticks=[], anchor="W")
    axes.set_title("A rate for each parameter: the first layer's, by pixel", loc="left")
    bar = axes.figure.colorbar(shown, ax=axes, label="factor (geometric mean)", extend="both", pad=0.03)
    bar.set_ticks([1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8], labels=["1/8", "1/4", "1/2", "1", "2", "4", "8"])
    bar.minorticks_off()


def save_picture(studies: list[Study]) -> None:
    figure, axes = plt.subplots(2, 2, figsize=(12, 8.5), layout="constrained")
    figure.suptitle("Optimizers tuned by gradient descent, through 60 steps of training", fontsize=15)
    draw_losses(axes[0, 0], studies)
    draw_numbers(axes[0, 1], studies[0])
    draw_schedules(axes[1, 0], studies[1])
    draw_rates(axes[1, 1], studies[2])
    for each in axes.flat[:3]:
        each.spines[["top", "right"]].set_visible(False)
        each.grid(alpha=0.25)
    axes[1, 1].spines[:].set_visible(False)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=150)
    plt.close(figure)
    print(f"picture: {PICTURE}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Tune AdamW by gradient descent on a validation loss.")
    parser.add_argument("--iterations", type=int, default=60, help="of the outer optimizer (default: 60)")
    parser.add_argument("--short", action="store_true", help="8 iterations")
    options = parser.parse_args()
    iterations = 8 if options.short else options.iterations
    if iterations < 1:
        parser.error(f"--iterations must be at least 1, but is {iterations}")

    torch.set_num_threads(1)  # so small a network gains nothing from more
    studies = make_studies()
    for study in studies:
        check_hypergradients(study)
    for study in studies:
        tune(study, iterations)
    print_table(studies)
    save_picture(studies)
    for study in studies:
        if not study.validation[-1] < 0.9 * study.validation[0]:
            raise RuntimeError(
                f"{study.name}: the tuning must lower the validation loss by a tenth at least, but it went from "
                f"{study.validation[0]:.3f} to {study.validation[-1]:.3f}."
            )


if __name__ == "__main__":
    main()
