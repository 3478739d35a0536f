"""What is measured: algorithms, sets of parameters, and the ways of taking one step, purestep's and its peers'."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor

import purestep
from purestep import optim

try:
    import torchopt
except ImportError:
    torchopt = None  # type: ignore[assignment]

Shape: TypeAlias = tuple[int, ...]
Gradient: TypeAlias = Callable[[Tensor, torch.Generator], Tensor]


# ------------------------------------------------------------------------------------------------------------- algorithms


def every(shape: Shape) -> bool:
    """All tensors."""
    return True


def matrices(shape: Shape) -> bool:
    """All matrices."""
    return len(shape) == 2


def hidden(shape: Shape) -> bool:
    """All matrices but the token embedding."""
    return len(shape) == 2 and shape[0] != VOCABULARY


def dense(x: Tensor, generator: torch.Generator) -> Tensor:
    """A gradient with all its numbers."""
    return x


def rows(x: Tensor, generator: torch.Generator) -> Tensor:
    """A sparse gradient with a tenth of the rows, in order."""
    chosen = torch.randperm(len(x), generator=generator)[: max(1, len(x) // 10)].sort().values
    return torch.sparse_coo_tensor(chosen[None], x[chosen], x.shape, is_coalesced=True, check_invariants=False)


def numbers(gradient: Tensor) -> Tensor:
    """The numbers that a gradient has, sparse or not."""
    return gradient.values() if gradient.is_sparse else gradient


@dataclass(frozen=True)
class Algorithm:
    """An algorithm, and what it is measured with. Which modes it has is what the signatures of its factories say."""

    key: str  # in purestep and torchopt, whose factories are functions
    name: str  # in torch.optim and purestep.optim, whose factories are classes
    options: Mapping[str, Any]
    words: int  # numbers that a step has to read or write, each once, per number of the gradient
    takes: Callable[[Shape], bool] = every  # which tensors of a set
    gradient: Gradient = dense
    closure: bool = False  # whether a step evaluates loss and gradient itself
    tolerance: float = 1e-4  # between modes after all steps, relative to the farthest that a parameter has moved
    without: Mapping[str, str] = field(default_factory=dict)  # modes that are left out, and why
    note: str = ""  # for the reader of a table


HISTORY, ITERATIONS = 2, 2  # of L-BFGS

ALGORITHMS = {
    algorithm.key: algorithm
    for algorithm in [
        Algorithm("adamw", "AdamW", {"lr": 1e-3}, words=7),  # reads p, g, m, v; writes p, m, v
        Algorithm("adam", "Adam", {"lr": 1e-3}, words=7),
        Algorithm("sgd", "SGD", {"lr": 1e-3, "momentum": 0.9}, words=5),  # reads p, g, b; writes p, b
        Algorithm("adamax", "Adamax", {"lr": 1e-3, "eps": 1e-8}, words=7),  # as Adam; torchopt has another eps by default
        Algorithm("nadam", "NAdam", {"lr": 1e-3}, words=7),  # as Adam
        Algorithm("radam", "RAdam", {"lr": 1e-2, "eps": 1e-8}, words=7),  # as Adam; torchopt has another eps by default
        Algorithm("adagrad", "Adagrad", {"lr": 1e-3}, words=5),  # reads p, g, sum; writes p, sum
        Algorithm("adadelta", "Adadelta", {"lr": 1.0}, words=7),  # reads p, g, v, delta; writes p, v, delta
        Algorithm("rmsprop", "RMSprop", {"lr": 1e-3}, words=5),  # reads p, g, v; writes p, v
        # Reads p, g, prev, step size; writes p, prev, step size. The gradients stay the same, so step sizes only grow.
        Algorithm("rprop", "Rprop", {"lr": 1e-4, "step_sizes": (1e-6, 1e-3)}, words=7),
        Algorithm("asgd", "ASGD", {"lr": 1e-2}, words=4),  # reads p, g; writes p and, until t0 with the same, its average
        # Reads p, g; writes p. A row and a column of state are next to nothing. That g has to be known as a whole before
        # any of it is used, and the update before it is clipped, is not counted: small tensors stay in the cache.
        # torch.norm, with which torch's takes root mean squares, gives 0.24 % too little for the 38.6 M of the token embedding.
        Algorithm("adafactor", "Adafactor", {"lr": 1e-3}, words=3, tolerance=5e-3),
        # Reads p, g, b; writes p, b. What takes the time is the matrix products, of which the floor knows nothing.
        Algorithm("muon", "Muon", {"lr": 1e-3}, words=5, takes=hidden, note="the matrices without the token embedding"),
        Algorithm(
            "sparse_adam",
            "SparseAdam",
            {"lr": 1e-3},
            words=7,
            takes=matrices,
            gradient=rows,
            note="the matrices; the gradients have a tenth of the rows",
        ),
        # An evaluation reads p and writes g. An iteration reads p, g, the last g and d, and all pairs of the history but the
        # one that it drops; it writes p, the last g, d and a new pair.
        Algorithm(
            "lbfgs",
            "LBFGS",
            words=ITERATIONS * (2 + 4 + 2 * (HISTORY - 1) + 5),
            closure=True,
            tolerance=1e-6,  # same operations in the same order; and the history's part in these steps is small
            # A short history, for memory. Nothing may stop a step early, and a small step keeps the minimum away.
            options={"lr": 1e-3, "max_iter": ITERATIONS, "history_size": HISTORY, "tolerance_grad": 0, "tolerance_change": 0},
            note=f"{ITERATIONS} iterations a step, a history of {HISTORY}; of a bowl whose gradient is little more than a copy",
        ),
    ]
}
MEASURABLE = [key for key, algorithm in ALGORITHMS.items() if hasattr(optim, algorithm.name)]


# ---------------------------------------------------------------------------------------------------- sets of parameters


@dataclass(frozen=True)
class ParameterSet:
    """The shapes of a model's parameters, and how many rounds give a steady median in reasonable time."""

    name: str
    shapes: Sequence[Shape] = field(repr=False)
    rounds: int

    @property
    def parameters(self) -> int:
        """The number of parameters."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def bytes(self) -> int:
        """The size of the parameters, which are float32."""
        return 4 * self.parameters

    def of(self, algorithm: Algorithm) -> ParameterSet:
        """The tensors among these that the algorithm takes."""
        return replace(self, shapes=[shape for shape in self.shapes if algorithm.takes(shape)])

    def draw(self, seed: int, gradient: Gradient = dense) -> list[Tensor]:
        """Normal numbers in these shapes, the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        return [gradient(0.02 * torch.randn(shape, generator=generator), generator) for shape in self.shapes]


VOCABULARY = 50257


def mlp() -> list[Shape]:
    """A perceptron for images of 28 x 28 pixels."""
    return [(256, 784), (256,), (256, 256), (256,), (10, 256), (10,)]


def many() -> list[Shape]:
    """400 narrow linear layers: the cost of a step is what each tensor costs, not each number."""
    return [(46, 46), (46,)] * 400


def gpt2() -> list[Shape]:
    """The 148 tensors of the smallest GPT-2, with MLPs 1472 wide instead of 3072: 94.9 M parameters instead of 124.4 M.

    The token embedding alone has 38.6 M; Muon, which is not meant for embeddings and would spend its time on this one, goes
    without it. Linear layers are stored as (in, out), as in the original.
    """
    width, hidden, layers, context = 768, 1472, 12, 1024
    norm = [(width,), (width,)]
    attention = [(width, 3 * width), (3 * width,), (width, width), (width,)]
    perceptron = [(width, hidden), (hidden,), (hidden, width), (width,)]
    return [(VOCABULARY, width), (context, width), *[*norm, *attention, *norm, *perceptron] * layers, *norm]


SETS = {
    "mlp": ParameterSet("mlp", mlp(), rounds=1000),
    "many": ParameterSet("many", many(), rounds=200),
    "gpt2": ParameterSet("gpt2", gpt2(), rounds=30),
}


# ------------------------------------------------------------------------------------------------------------------ modes


class Run(Protocol):
    """An optimizer in the middle of training; its gradients stay the same, or it evaluates them itself."""

    def step(self) -> None:
        """Update the parameters."""
        ...

    def parameters(self) -> list[Tensor]:
        """The parameters as they are now."""
        ...


class Stateful:
    """An optimizer with the interface of `torch.optim`."""

    def __init__(self, factory: Callable[..., Any], algorithm: Algorithm, params: list[Tensor], grads: list[Tensor]) -> None:
        self.leaves = [torch.nn.Parameter(p) for p in params]
        for p, g in zip(self.leaves, grads):
            p.grad = torch.empty_like(p) if algorithm.closure else g
        self.closure = bowl(self.leaves) if algorithm.closure else None
        self.optimizer = factory(self.leaves)

    def step(self) -> None:
        """Update the parameters in place."""
        self.optimizer.step(self.closure)

    def parameters(self) -> list[Tensor]:
        """The parameters as they are now."""
        return [p.detach() for p in self.leaves]


class Functional:
    """A transform of purestep, on dicts of tensors."""

    def __init__(
        self, factory: Callable[..., Any], algorithm: Algorithm, params: list[Tensor], grads: list[Tensor], donate: bool
    ) -> None:
        self.transform = factory()
        self.params, self.grads, self.donate = named(params), named(grads), donate
        self.extras: dict[str, Any] = {"value_and_grad": functional_bowl} if algorithm.closure else {}
        self.state = self.transform.init_state(self.params)

    def step(self) -> None:
        """Replace parameters and state by the next ones, or update them in place if they are donated."""
        self.params, self.state = self.transform.step(self.grads, self.state, self.params, donate=self.donate, **self.extras)

    def parameters(self) -> list[Tensor]:
        """The parameters as they are now."""
        return list(self.params.values())


class TorchOpt:
    """A transformation of torchopt, on dicts of tensors, which it leaves as they are."""

    def __init__(self, factory: Callable[..., Any], algorithm: Algorithm, params: list[Tensor], grads: list[Tensor]) -> None:
        self.transform = factory()
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


def bowl(leaves: list[torch.nn.Parameter]) -> Callable[[], Tensor]:
    """A closure that costs little: a sum of squares, whose gradient is the parameters, or twice them in every other tensor.

    Gradients that stayed the same would never enter the history of L-BFGS: its cost would not be measured. The loss is not
    computed, but constant; without a line search it is only compared with the last one, to stop, which no tolerance allows.
    """
    values, grads, loss = [p.detach() for p in leaves], [p.grad for p in leaves if p.grad is not None], torch.zeros(())

    def closure() -> Tensor:
        torch._foreach_copy_(grads, values)
        torch._foreach_mul_(grads[::2], 2.0)
        return loss

    return closure


def functional_bowl(params: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The same loss and gradient as a function."""
    grads = {name: p.clone() for name, p in params.items()}
    torch._foreach_mul_(list(grads.values())[::2], 2.0)
    return torch.zeros(()), grads


@dataclass(frozen=True)
class Mode:
    """A way of running an algorithm: a library's factory, with flags."""

    run: Callable[[Callable[..., Any], Algorithm, list[Tensor], list[Tensor]], Run]
    library: Any
    case: Literal["key", "name"]  # under which of its names the library has an algorithm
    flags: Mapping[str, Any] = field(default_factory=dict)

    def factory(self, algorithm: Algorithm) -> Callable[..., Any] | None:
        """What makes the optimizer; None if the library does not have it, or not with these options and flags."""
        found = getattr(self.library, algorithm.key if self.case == "key" else algorithm.name, None)
        wanted = {**algorithm.options, **self.flags}
        if found is None or not wanted.keys() <= inspect.signature(found).parameters.keys():
            return None
        return partial(found, **wanted)

    def start(self, algorithm: Algorithm, params: list[Tensor], grads: list[Tensor]) -> Run:
        """An optimizer before its first step. It takes the parameters over; the gradients it must leave as they are."""
        factory = self.factory(algorithm)
        if factory is None:
            raise ValueError(f"{algorithm.name} has no such mode.")
        return self.run(factory, algorithm, params, grads)


TORCH = ("torch default", "torch loop", "torch foreach", "torch fused")
WRAPPER = ("wrapper", "wrapper foreach", "wrapper compiled")

MODES = {
    "torch default": Mode(Stateful, torch.optim, "name"),
    "torch loop": Mode(Stateful, torch.optim, "name", {"foreach": False}),
    "torch foreach": Mode(Stateful, torch.optim, "name", {"foreach": True}),
    "torch fused": Mode(Stateful, torch.optim, "name", {"fused": True}),  # every class that has this flag has it for CPUs
    "wrapper": Mode(Stateful, optim, "name"),
    "wrapper foreach": Mode(Stateful, optim, "name", {"foreach": True}),
    "wrapper compiled": Mode(Stateful, optim, "name", {"compile": True}),
    "donated": Mode(partial(Functional, donate=True), purestep, "key"),
    "pure": Mode(partial(Functional, donate=False), purestep, "key"),
}
if torchopt is not None:
    MODES["torchopt"] = Mode(TorchOpt, torchopt, "key")


def modes_of(algorithm: Algorithm) -> list[str]:
    """The modes that an algorithm can be measured in."""
    return [name for name, mode in MODES.items() if name not in algorithm.without and mode.factory(algorithm)]
