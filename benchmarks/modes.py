"""What is measured: algorithms, sets of parameters, and the ways of taking one step, purestep's and its peers'."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

import purestep
from purestep import optim

try:
    import torchopt
except ImportError:
    torchopt = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Algorithm:
    """An algorithm, under the names that torch, torchopt and purestep share."""

    name: str
    options: Mapping[str, float]
    words: int  # numbers per parameter that a step has to read or write, each once


ALGORITHMS = {
    "adamw": Algorithm("AdamW", {"lr": 1e-3}, words=7),  # reads p, g, m, v; writes p, m, v
    "adam": Algorithm("Adam", {"lr": 1e-3}, words=7),
    "sgd": Algorithm("SGD", {"lr": 1e-3, "momentum": 0.9}, words=5),  # reads p, g, b; writes p, b
}


@dataclass(frozen=True)
class ParameterSet:
    """The shapes of a model's parameters, and how many rounds give a steady median in reasonable time."""

    name: str
    shapes: Sequence[tuple[int, ...]] = field(repr=False)
    rounds: int

    @property
    def parameters(self) -> int:
        """The number of parameters."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def bytes(self) -> int:
        """The size of the parameters, which are float32."""
        return 4 * self.parameters

    def draw(self, seed: int) -> list[Tensor]:
        """Normal numbers in these shapes, the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        return [0.02 * torch.randn(shape, generator=generator) for shape in self.shapes]


def mlp() -> list[tuple[int, ...]]:
    """A perceptron for images of 28 x 28 pixels."""
    return [(256, 784), (256,), (256, 256), (256,), (10, 256), (10,)]


def many() -> list[tuple[int, ...]]:
    """400 narrow linear layers: the cost of a step is what each tensor costs, not each number."""
    return [(46, 46), (46,)] * 400


def gpt2() -> list[tuple[int, ...]]:
    """The 148 tensors of the smallest GPT-2, with MLPs 1472 wide instead of 3072: 94.9 M parameters instead of 124.4 M.

    The token embedding alone has 38.6 M. Linear layers are stored as (in, out), as in the original.
    """
    width, hidden, layers, vocabulary, context = 768, 1472, 12, 50257, 1024
    norm = [(width,), (width,)]
    attention = [(width, 3 * width), (3 * width,), (width, width), (width,)]
    perceptron = [(width, hidden), (hidden,), (hidden, width), (width,)]
    return [(vocabulary, width), (context, width), *[*norm, *attention, *norm, *perceptron] * layers, *norm]


SETS = {
    "mlp": ParameterSet("mlp", mlp(), rounds=1000),
    "many": ParameterSet("many", many(), rounds=200),
    "gpt2": ParameterSet("gpt2", gpt2(), rounds=30),
}


class Run(Protocol):
    """An optimizer in the middle of training; its gradients stay the same."""

    def step(self) -> None:
        """Update the parameters."""
        ...

    def parameters(self) -> list[Tensor]:
        """The parameters as they are now."""
        ...


class Stateful:
    """An optimizer with the interface of `torch.optim`."""

    def __init__(self, namespace: Any, algorithm: Algorithm, params: list[Tensor], grads: list[Tensor], **flags: Any) -> None:
        self.leaves = [torch.nn.Parameter(p) for p in params]
        for p, g in zip(self.leaves, grads):
            p.grad = g
        self.optimizer = getattr(namespace, algorithm.name)(self.leaves, **algorithm.options, **flags)

    def step(self) -> None:
        """Update the parameters in place."""
        self.optimizer.step()

    def parameters(self) -> list[Tensor]:
        """The parameters as they are now."""
        return [p.detach() for p in self.leaves]


class Functional:
    """A transform of purestep, on dicts of tensors."""

    def __init__(self, algorithm: Algorithm, params: list[Tensor], grads: list[Tensor], donate: bool) -> None:
        self.transform = getattr(purestep, algorithm.name.lower())(**algorithm.options)
        self.params, self.grads, self.donate = named(params), named(grads), donate
        self.state = self.transform.init_state(self.params)

    def step(self) -> None:
        """Replace parameters and state by the next ones, or update them in place if they are donated."""
        self.params, self.state = self.transform.step(self.grads, self.state, self.params, donate=self.donate)

    def parameters(self) -> list[Tensor]:
        """The parameters as they are now."""
        return list(self.params.values())


class TorchOpt:
    """A transformation of torchopt, on dicts of tensors, which it leaves as they are."""

    def __init__(self, algorithm: Algorithm, params: list[Tensor], grads: list[Tensor]) -> None:
        self.transform = getattr(torchopt, algorithm.name.lower())(**algorithm.options)
        self.params, self.grads = named(params), named(grads)
        self.state = self.transform.init(self.params)

    def step(self) -> None:
        """Replace parameters and state by the next ones."""
        updates, self.state = self.transform.update(self.grads, self.state, params=self.params, inplace=False)
        self.params = torchopt.apply_updates(self.params, updates, inplace=False)

    def parameters(self) -> list[Tensor]:
        """The parameters as they are now."""
        return list(self.params.values())


def named(tensors: list[Tensor]) -> dict[str, Tensor]:
    """A flat dict, as `dict(model.named_parameters())` is one. Names of one length sort in the order of the list."""
    return {f"parameter{i:04d}": x for i, x in enumerate(tensors)}


TORCH = ("torch loop", "torch foreach", "torch fused")

MODES: dict[str, Callable[[Algorithm, list[Tensor], list[Tensor]], Run]] = {
    "torch loop": partial(Stateful, torch.optim, foreach=False),
    "torch foreach": partial(Stateful, torch.optim, foreach=True),
    "torch fused": partial(Stateful, torch.optim, fused=True),
    "wrapper": partial(Stateful, optim),
    "wrapper foreach": partial(Stateful, optim, foreach=True),
    "donated": partial(Functional, donate=True),
    "pure": partial(Functional, donate=False),
}
if torchopt is not None:
    MODES["torchopt"] = TorchOpt
