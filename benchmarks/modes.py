"""What is measured: algorithms and chains, sets of parameters, and the ways of taking one step, purestep's and its peers'.

The modes of an *algorithm* are found: a library has it under its name, with these options and flags, or it has not. A
*chain* is composed, and so its counterparts are written out here, as a training loop has them: torch's pieces one after
another, all of them timed.

The *peers* are compared where they are installed. torchopt has torch's names and options. pytorch_optimizer has optimizers
with torch's interface; those of torch's names it mostly hands on, which is no other mode, and of its own those are measured
that compute what torch's do. optax has a counterpart of whatever is not said to be without one; it lives in
`benchmarks.in_jax`, which is imported when the first of its runs begins, and not where nobody asked for it.

Some modes spoil what they are given: `torch.nn.utils.clip_grad_norm_` scales the gradients in place, where
`clip_by_global_norm` leaves them alone, and pytorch_optimizer computes in them with Nesterov's momentum and with decay that
is part of the gradient. In training the backward pass has just written them, and writes them again for the next step, so
neither is to be charged for a copy. Therefore all modes of such an algorithm or chain share one set of gradients that may
be written to, and before each step of each mode, outside of what is timed, it is filled anew: every mode finds the same
numbers, in caches that are in the same state.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

import purestep
from purestep import optim

try:
    import torchopt
except ImportError:
    torchopt = None  # type: ignore[assignment]
try:
    import pytorch_optimizer
except ImportError:
    pytorch_optimizer = None  # type: ignore[assignment]

Shape: TypeAlias = tuple[int, ...]
Gradient: TypeAlias = Callable[[Tensor, torch.Generator], Tensor]
Leaves: TypeAlias = list[torch.nn.Parameter]


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
    chosen = torch.randperm(len(x), generator=generator, device=x.device)[: max(1, len(x) // 10)].sort().values
    return torch.sparse_coo_tensor(chosen[None], x[chosen], x.shape, is_coalesced=True, check_invariants=False)


def numbers(gradient: Tensor) -> Tensor:
    """The numbers that a gradient has, sparse or not."""
    return gradient.values() if gradient.is_sparse else gradient


@dataclass(frozen=True)
class Subject:
    """An algorithm or a chain, and what it is measured with."""

    key: str
    name: str  # in tables
    _: KW_ONLY
    words: int | Callable[[Shape], int]  # numbers that a step has to read or write, each once, per number of the gradient
    takes: Callable[[Shape], bool] = every  # which tensors of a set
    gradient: Gradient = dense
    closure: bool = False  # whether a step evaluates loss and gradient itself
    begins: int = 0  # so many steps at the start are other ones, and not timed
    spends: bool = False  # whether some mode writes to the gradients, which are then filled anew before each step
    tolerance: float = 1e-4  # between modes after all steps, relative to the farthest that a parameter has moved
    looser: Mapping[str, float] = field(default_factory=dict)  # the tolerances of modes that need other ones
    without: Mapping[str, str] = field(default_factory=dict)  # modes that are left out, and why
    note: str = ""  # for the reader of a table

    def traffic(self, grads: list[Tensor]) -> int:
        """The bytes that a step has to move."""
        words = self.words if callable(self.words) else lambda shape, words=self.words: words
        return sum(words(tuple(g.shape)) * 4 * numbers(g).numel() for g in grads)


@dataclass(frozen=True)
class Algorithm(Subject):
    """An algorithm. Which modes it has is what the signatures of its factories say.

    The key is its name in purestep and torchopt, whose factories are functions; the name is that in torch.optim and
    purestep.optim, whose factories are classes.
    """

    options: Mapping[str, Any]


PYTORCH_OPTIMIZER, OPTAX = "pytorch_optimizer", "optax"
HISTORY, ITERATIONS = 2, 2  # of L-BFGS
# Muon computes in bfloat16; compiled code does not round what stays within a kernel, and products of batches round elsewhere.
ROUNDED = dict.fromkeys(["torch compiled", PYTORCH_OPTIMIZER], 5e-2)

ALGORITHMS = {
    algorithm.key: algorithm
    for algorithm in [
        Algorithm("adamw", "AdamW", {"lr": 1e-3}, words=7),  # reads p, g, m, v; writes p, m, v
        Algorithm("adam", "Adam", {"lr": 1e-3}, words=7),
        Algorithm("sgd", "SGD", {"lr": 1e-3, "momentum": 0.9}, words=5),  # reads p, g, b; writes p, b
        Algorithm("adamax", "Adamax", {"lr": 1e-3, "eps": 1e-8}, words=7),  # as Adam; torchopt has another eps by default
        Algorithm("nadam", "NAdam", {"lr": 1e-3}, words=7, without={OPTAX: "its momentum has no schedule."}),  # as Adam
        # As Adam; torchopt has another eps by default. Compiled, torch's rectification is in float32, where it cancels.
        Algorithm(
            "radam",
            "RAdam",
            {"lr": 1e-2, "eps": 1e-8},
            words=7,
            begins=5,  # SGD with momentum, until there is a variance
            looser={"torch compiled": 5e-3},
            without={OPTAX: "its rectification is in float32, where it cancels: the steps are other ones."},
        ),
        # Reads p, g, sum; writes p, sum. optax adds eps below the root: none of them must matter.
        Algorithm("adagrad", "Adagrad", {"lr": 1e-3, "eps": 1e-30}, words=5),
        Algorithm("adadelta", "Adadelta", {"lr": 1.0}, words=7),  # reads p, g, v, delta; writes p, v, delta
        Algorithm("rmsprop", "RMSprop", {"lr": 1e-3}, words=5),  # reads p, g, v; writes p, v
        # Reads p, g, prev, step size; writes p, prev, step size. The gradients stay the same, so step sizes only grow.
        Algorithm(
            "rprop",
            "Rprop",
            {"lr": 1e-4, "step_sizes": (1e-6, 1e-3)},
            words=7,
            without={OPTAX: "it takes every step one step later."},
        ),
        # Reads p, g; writes p and, until t0 with the same, its average.
        Algorithm("asgd", "ASGD", {"lr": 1e-2}, words=4, without={OPTAX: "it has no such algorithm."}),
        # Reads p, g; writes p. A row and a column of state are next to nothing. That g has to be known as a whole before
        # any of it is used, and the update before it is clipped, is not counted: small tensors stay in the cache.
        # torch.norm, with which torch's takes root mean squares, gives 0.24 % too little for the 38.6 M of the token embedding.
        # The first eps bounds squares from below in torch, and is added to them in pytorch_optimizer: it must not matter.
        Algorithm(
            "adafactor",
            "Adafactor",
            {"lr": 1e-3, "eps": (1e-20, 1e-3)},
            words=3,
            tolerance=5e-3,
            without={OPTAX: "it factors a convolution's two largest dimensions, where torch factors the last two."},
        ),
        # Reads p, g, b; writes p, b. What takes the time is the matrix products, of which the floor knows nothing.
        Algorithm(
            "muon",
            "Muon",
            {"lr": 1e-3},
            words=5,
            takes=hidden,
            spends=True,
            looser=ROUNDED,
            without={OPTAX: "it corrects the bias of the momentum, and iterates in float32."},
            note="the matrices without the token embedding",
        ),
        Algorithm(
            "sparse_adam",
            "SparseAdam",
            {"lr": 1e-3},
            words=7,
            takes=matrices,
            gradient=rows,
            without={OPTAX: "it has no sparse gradients."},
            note="the matrices; the gradients have a tenth of the rows",
        ),
        # An evaluation reads p and writes g. An iteration reads p, g, the last g and d, and all pairs of the history but the
        # one that it drops; it writes p, the last g, d and a new pair.
        Algorithm(
            "lbfgs",
            "LBFGS",
            words=ITERATIONS * (2 + 4 + 2 * (HISTORY - 1) + 5),
            closure=True,
            without={OPTAX: "it scales the first direction in another way, and evaluates nothing in a step."},
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

    def of(self, subject: Subject) -> ParameterSet:
        """The tensors among these that an algorithm or a chain takes."""
        return replace(self, shapes=[shape for shape in self.shapes if subject.takes(shape)])

    def draw(self, seed: int, gradient: Gradient = dense, device: str = "cpu") -> list[Tensor]:
        """Normal numbers in these shapes, the same for the same seed and device."""
        generator = torch.Generator(device).manual_seed(seed)
        normal = partial(torch.randn, generator=generator, device=device)
        return [gradient(0.02 * normal(shape), generator) for shape in self.shapes]


VOCABULARY = 50257


def mlp() -> list[Shape]:
    """A perceptron for images of 28 x 28 pixels."""
    return [(256, 784), (256,), (256, 256), (256,), (10, 256), (10,)]


def many() -> list[Shape]:
    """400 narrow linear layers: the cost of a step is what each tensor costs, not each number."""
    return [(46, 46), (46,)] * 400


def resnet() -> list[Shape]:
    """The 161 tensors of ResNet-50, 25.6 M parameters: a few large convolutions among many small vectors.

    53 convolutions without bias, each under a batch norm with weight and bias, and one linear layer.
    """
    expansion, classes = 4, 1000

    def convolution(inputs: int, outputs: int, size: int) -> list[Shape]:
        return [(outputs, inputs, size, size), (outputs,), (outputs,)]

    shapes, inputs = convolution(3, 64, 7), 64
    for width, blocks in zip((64, 128, 256, 512), (3, 4, 6, 3)):
        for block in range(blocks):
            outputs = expansion * width
            shapes += [*convolution(inputs, width, 1), *convolution(width, width, 3), *convolution(width, outputs, 1)]
            if block == 0:  # the shortcut past it has to change the width too
                shapes += convolution(inputs, outputs, 1)
            inputs = outputs
    return [*shapes, (classes, inputs), (classes,)]


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


def billion() -> list[Shape]:
    """The 165 tensors of a decoder-only transformer in Llama's manner: 1.0 B parameters, and 12 GB with a state of Adam's.

    Keys and values have an eighth of the queries' heads; the perceptrons are gated; embedding and head are not tied.
    """
    width, keys, hidden, layers = 2048, 256, 5632, 18
    attention = [(width, width), (keys, width), (keys, width), (width, width)]
    perceptron = [(hidden, width), (hidden, width), (width, hidden)]
    layer = [(width,), *attention, (width,), *perceptron]
    return [(VOCABULARY, width), *layer * layers, (width,), (VOCABULARY, width)]


SETS = {
    "mlp": ParameterSet("mlp", mlp(), rounds=1000),
    "many": ParameterSet("many", many(), rounds=200),
    "resnet": ParameterSet("resnet", resnet(), rounds=60),
    "gpt2": ParameterSet("gpt2", gpt2(), rounds=30),
    "billion": ParameterSet("billion", billion(), rounds=30),
}
LARGE = ("billion",)  # for accelerators alone


# ------------------------------------------------------------------------------------------------------------------ modes


class Run(Protocol):
    """An optimizer in the middle of training; its gradients stay the same, or it evaluates them itself."""

    def step(self) -> None:
        """Update the parameters."""
        ...

    def parameters(self) -> list[Tensor]:
        """The parameters as they are now."""
        ...


Start: TypeAlias = Callable[[list[Tensor], list[Tensor]], Run]
"""What makes a run from parameters, which it takes over, and gradients."""


@runtime_checkable
class Accounted(Protocol):
    """A run that says what it allocates during a step, because torch's profiler cannot see it."""

    def peak_bytes(self) -> int:
        """The most bytes that are allocated at once, above those at its start."""
        ...


class Stateful:
    """An optimizer with the interface of `torch.optim`."""

    def __init__(
        self,
        factory: Callable[..., Any],
        subject: Subject,
        params: list[Tensor],
        grads: list[Tensor],
        compiled: bool = False,
    ) -> None:
        self.leaves = leaves_of(params, None if subject.closure else grads)
        self.closure = bowl(self.leaves) if subject.closure else None
        step = factory(self.leaves).step
        self.advance = torch.compile(step) if compiled else step

    def step(self) -> None:
        """Update the parameters in place."""
        self.advance(self.closure)

    def parameters(self) -> list[Tensor]:
        """The parameters as they are now."""
        return [p.detach() for p in self.leaves]


class Functional:
    """A transform of purestep, on dicts of tensors."""

    def __init__(
        self,
        factory: Callable[..., Any],
        subject: Subject,
        params: list[Tensor],
        grads: list[Tensor],
        donate: bool,
        compiled: bool = False,
    ) -> None:
        self.transform = factory()
        self.params, self.grads = named(params), named(grads)
        self.options: dict[str, Any] = {"donate": donate}
        if compiled:
            self.options["compile"] = True
        if subject.closure:
            self.options["value_and_grad"] = functional_bowl
        self.state = self.transform.init_state(self.params)

    def step(self) -> None:
        """Replace parameters and state by the next ones, or update them in place if they are donated."""
        self.params, self.state = self.transform.step(self.grads, self.state, self.params, **self.options)

    def parameters(self) -> list[Tensor]:
        """The parameters as they are now."""
        return list(self.params.values())


class TorchOpt:
    """A transformation of torchopt, on dicts of tensors, which it leaves as they are."""

    def __init__(self, factory: Callable[..., Any], subject: Subject, params: list[Tensor], grads: list[Tensor]) -> None:
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


class Loop:
    """Pieces of torch put together by hand, as the loop around a model has them."""

    def __init__(self, leaves: Leaves, step: Callable[[], None]) -> None:
        self.leaves, self.advance = leaves, step

    def step(self) -> None:
        """Update the parameters in place."""
        self.advance()

    def parameters(self) -> list[Tensor]:
        """The parameters as they are now."""
        return [p.detach() for p in self.leaves]


class Repeated:
    """Several steps of another run as one: what acts at every fourth step has no other step that means anything."""

    def __init__(self, run: Run, times: int) -> None:
        self.run, self.times = run, times
        self.parameters = run.parameters

    def step(self) -> None:
        """Take all of them."""
        for _ in range(self.times):
            self.run.step()


def leaves_of(params: list[Tensor], grads: list[Tensor] | None) -> Leaves:
    """Parameters that have these gradients, or gradients that are still to be computed."""
    leaves = [torch.nn.Parameter(p) for p in params]
    for i, p in enumerate(leaves):
        p.grad = torch.empty_like(p) if grads is None else grads[i]
    return leaves


def named(tensors: list[Tensor]) -> dict[str, Tensor]:
    """A flat dict, as `dict(model.named_parameters())` is one. Names of one length sort in the order of the list."""
    return {f"parameter{i:04d}": x for i, x in enumerate(tensors)}


def bowl(leaves: Leaves) -> Callable[[], Tensor]:
    """A closure that costs little: a sum of squares, whose gradient is the parameters, or twice them in every other tensor.

    Gradients that stayed the same would never enter the history of L-BFGS: its cost would not be measured. The loss is not
    computed, but constant; without a line search it is only compared with the last one, to stop, which no tolerance allows.
    """
    values, grads = [p.detach() for p in leaves], [p.grad for p in leaves if p.grad is not None]
    loss = values[0].new_zeros(())

    def closure() -> Tensor:
        torch._foreach_copy_(grads, values)
        torch._foreach_mul_(grads[::2], 2.0)
        return loss

    return closure


def functional_bowl(params: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The same loss and gradient as a function."""
    grads = {name: p.clone() for name, p in params.items()}
    torch._foreach_mul_(list(grads.values())[::2], 2.0)
    return next(iter(grads.values())).new_zeros(()), grads


@dataclass(frozen=True)
class Mode:
    """A way of running an algorithm: a library's factory, with flags."""

    run: Callable[[Callable[..., Any], Algorithm, list[Tensor], list[Tensor]], Run]
    library: Any
    case: Literal["key", "name"]  # under which of its names the library has an algorithm
    flags: Mapping[str, Any] = field(default_factory=dict)
    classed: str | None = None  # a flag that the class in purestep.optim has to have, where the factory has none

    def factory(self, algorithm: Algorithm) -> Callable[..., Any] | None:
        """What makes the optimizer; None if the library does not have it, or not with these options and flags."""
        found = getattr(self.library, algorithm.key if self.case == "key" else algorithm.name, None)
        wanted = {**algorithm.options, **self.flags}
        if found is None or not wanted.keys() <= inspect.signature(found).parameters.keys():
            return None
        if self.classed and self.classed not in inspect.signature(getattr(optim, algorithm.name)).parameters:
            return None
        return partial(found, **wanted)

    def start(self, algorithm: Algorithm, params: list[Tensor], grads: list[Tensor]) -> Run:
        """An optimizer before its first step. It takes the parameters over; the gradients it must leave as they are."""
        factory = self.factory(algorithm)
        if factory is None:
            raise ValueError(f"{algorithm.name} has no such mode.")
        return self.run(factory, algorithm, params, grads)


class InJax:
    """optax, compiled by jax, on a CPU. What it has no counterpart of is said to be without it."""

    def factory(self, subject: Subject) -> Start:
        """What begins a run."""
        return partial(self.start, subject)

    def start(self, subject: Subject, params: list[Tensor], grads: list[Tensor]) -> Run:
        """A transformation of optax before its first step. It copies the parameters; the gradients it leaves as they are."""
        # The one import inside a function: jax takes long to load, and brings threads that would disturb other runs.
        return import_module("benchmarks.in_jax").start(subject, params, grads)


def adafactor_bigvision(params: Leaves, lr: float, eps: tuple[float, float]) -> Any:
    """pytorch_optimizer's Adafactor, without what it has beyond torch's."""
    return pytorch_optimizer.AdaFactor(params, lr, betas=(None, 0.999), relative_step=False, eps2=eps[1])


def muon_matrices(params: Leaves, lr: float) -> Any:
    """pytorch_optimizer's Muon, of matrices alone."""
    return pytorch_optimizer.Muon([{"params": params, "use_muon": True}], lr=lr, weight_decay=0.1)


TORCH = ("torch default", "torch loop", "torch foreach", "torch fused")
WRAPPER = ("wrapper", "wrapper foreach", "wrapper compiled")
PURESTEP = (*WRAPPER, "donated", "donated compiled", "pure")
INDUCTOR = ("torch compiled", "wrapper compiled", "donated compiled")
COMPILED = (*INDUCTOR, OPTAX)
# The first compiles for minutes on many tensors, and is not among those that "torch's best" is of; see `InJax` for the other.
ON_REQUEST = ("torch compiled", OPTAX)
CPU_ONLY = (OPTAX,)

MODES: dict[str, Mode | InJax] = {
    "torch default": Mode(Stateful, torch.optim, "name"),
    "torch loop": Mode(Stateful, torch.optim, "name", {"foreach": False}),
    "torch foreach": Mode(Stateful, torch.optim, "name", {"foreach": True}),
    "torch fused": Mode(Stateful, torch.optim, "name", {"fused": True}),  # every class that has this flag has it for CPUs
    "torch compiled": Mode(partial(Stateful, compiled=True), torch.optim, "name"),
    "wrapper": Mode(Stateful, optim, "name"),
    "wrapper foreach": Mode(Stateful, optim, "name", {"foreach": True}),
    "wrapper compiled": Mode(Stateful, optim, "name", {"compile": True}),
    "donated": Mode(partial(Functional, donate=True), purestep, "key"),
    "donated compiled": Mode(partial(Functional, donate=True, compiled=True), purestep, "key", classed="compile"),
    "pure": Mode(partial(Functional, donate=False), purestep, "key"),
}
if torchopt is not None:
    MODES["torchopt"] = Mode(TorchOpt, torchopt, "key")
if pytorch_optimizer is not None:
    # AdamW, Adam, SGD, NAdam, RMSprop and LBFGS are torch's own there, and ASGD is another algorithm.
    counterparts = SimpleNamespace(
        sgd=pytorch_optimizer.SGDW,
        adamax=pytorch_optimizer.AdaMax,
        radam=partial(pytorch_optimizer.RAdam, degenerated_to_sgd=True),
        adadelta=pytorch_optimizer.AdaDelta,
        adafactor=adafactor_bigvision,
        muon=muon_matrices,
    )
    MODES[PYTORCH_OPTIMIZER] = Mode(Stateful, counterparts, "key")
if find_spec("jax") and find_spec("optax"):
    MODES[OPTAX] = InJax()


# ----------------------------------------------------------------------------------------------------------------- chains


@dataclass(frozen=True)
class Chain(Subject):
    """A composed transform, and what others do instead."""

    transform: Callable[[], purestep.Transform]
    others: Mapping[str, Start]  # by mode
    _: KW_ONLY
    times: int = 1  # how many gradients make one step

    def starts(self) -> dict[str, Start]:
        """What begins each of its modes."""

        def wrapper(**flags: Any) -> Start:
            return lambda params, grads: self.repeated(
                Stateful(lambda leaves: optim.Optimizer(leaves, self.transform(), **flags), self, params, grads)
            )

        def functional(**flags: Any) -> Start:
            return lambda params, grads: self.repeated(Functional(self.transform, self, params, grads, **flags))

        return {
            **self.others,
            "wrapper": wrapper(),
            "wrapper compiled": wrapper(compile=True),
            "donated": functional(donate=True),
            "donated compiled": functional(donate=True, compiled=True),
            "pure": functional(donate=False),
            **{name: mode.factory(self) for name, mode in MODES.items() if isinstance(mode, InJax)},
        }

    def repeated(self, run: Run) -> Run:
        """The same run, with all the gradients of a step in one."""
        return run if self.times == 1 else Repeated(run, self.times)


# The learning rate starts above zero: without a first step modes would differ in nothing. Adam undoes what scales all
# gradients alike, but for eps: with this one, a gradient that was not clipped takes the parameters elsewhere.
PEAK, WARM_UP_STEPS, TOTAL_STEPS, EPS = 1e-3, 10, 2000, 1e-4
NESTEROV: Mapping[str, Any] = {"lr": 1e-3, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}
LION: Mapping[str, Any] = {"lr": 1e-4, "weight_decay": 0.1}
DECAY = 0.999  # of the average of parameters
LR = {"hidden": 1e-3, "rest": 1e-3}
ACCUMULATED = 4


def installed(library: Any, **start: Start) -> dict[str, Start]:
    """These modes, or none where the library is missing."""
    return {} if library is None else start


def warmed_up(step: int) -> float:
    """The share of the peak that `purestep.schedules.warmup_cosine` has at this step, as one writes it for torch."""
    if step < WARM_UP_STEPS:
        return (1 + step * (WARM_UP_STEPS - 1) / WARM_UP_STEPS) / WARM_UP_STEPS
    return 0.5 * (1 + math.cos(math.pi * min((step - WARM_UP_STEPS) / (TOTAL_STEPS - WARM_UP_STEPS), 1.0)))


def scheduled() -> purestep.schedules.Schedule:
    """The same as a schedule of purestep."""
    return purestep.schedules.warmup_cosine(
        PEAK, warmup_steps=WARM_UP_STEPS, total_steps=TOTAL_STEPS, start=PEAK / WARM_UP_STEPS
    )


def clip_adamw(
    params: list[Tensor], grads: list[Tensor], clip: bool | None = None, compiled: bool = False, **flags: Any
) -> Run:
    """Clipping, AdamW and its scheduler, one after another. `LambdaLR` is the cheapest of torch's schedulers that do this."""
    leaves = leaves_of(params, grads)
    # Compiled code takes a number for a constant, and would be compiled again for the next learning rate.
    optimizer = torch.optim.AdamW(leaves, lr=torch.tensor(PEAK) if compiled else PEAK, eps=EPS, **flags)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, warmed_up)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(leaves, 1.0, foreach=clip)
        optimizer.step()

    run = torch.compile(update) if compiled else update

    def step() -> None:
        run()
        scheduler.step()

    return Loop(leaves, step)


def clip_adamw_torchopt(params: list[Tensor], grads: list[Tensor]) -> Run:
    """The same chain in torchopt."""

    def factory() -> Any:
        return torchopt.chain(
            torchopt.clip.clip_grad_norm(1.0), torchopt.adamw(lr=lambda step: PEAK * warmed_up(int(step)), eps=EPS)
        )

    return TorchOpt(factory, CHAINS["clip_adamw"], params, grads)


def sgd_nesterov(params: list[Tensor], grads: list[Tensor], compiled: bool = False, **flags: Any) -> Run:
    """SGD as torch has it, all in one."""
    factory = partial(torch.optim.SGD, **NESTEROV, **flags)
    return Stateful(factory, CHAINS["sgd_nesterov"], params, grads, compiled)


def sgd_nesterov_torchopt(params: list[Tensor], grads: list[Tensor]) -> Run:
    """The same in torchopt."""
    return TorchOpt(partial(torchopt.sgd, **NESTEROV), CHAINS["sgd_nesterov"], params, grads)


def lion_pytorch_optimizer(params: list[Tensor], grads: list[Tensor]) -> Run:
    """Lion alone."""
    return Stateful(partial(pytorch_optimizer.Lion, **LION), CHAINS["lion"], params, grads)


def lion_ema_pytorch_optimizer(params: list[Tensor], grads: list[Tensor]) -> Run:
    """Lion, and torch's average of the parameters."""
    leaves, averages = leaves_of(params, grads), [p.clone() for p in params]
    optimizer = pytorch_optimizer.Lion(leaves, **LION)
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(DECAY)

    def step() -> None:
        optimizer.step()
        average(averages, leaves, None)

    return Loop(leaves, step)


def sgd_nesterov_pytorch_optimizer(params: list[Tensor], grads: list[Tensor]) -> Run:
    """The same in pytorch_optimizer, where decay is not part of the gradient by default."""
    factory = partial(pytorch_optimizer.SGDW, **NESTEROV, weight_decouple=False)
    return Stateful(factory, CHAINS["sgd_nesterov"], params, grads)


def muon_adamw_pytorch_optimizer(params: list[Tensor], grads: list[Tensor]) -> Run:
    """One optimizer, which has an AdamW in it. torch's defaults are spelled out."""

    def factory(leaves: Leaves) -> Any:
        groups = {True: {"lr": LR["hidden"], "weight_decay": 0.1}, False: {"lr": LR["rest"], "weight_decay": 0.01}}
        return pytorch_optimizer.Muon(
            [
                {"params": [p for p in leaves if hidden(tuple(p.shape)) == use_muon], "use_muon": use_muon, **options}
                for use_muon, options in groups.items()
            ],
            adamw_betas=(0.9, 0.999),
            adamw_eps=1e-8,
        )

    return Stateful(factory, CHAINS["muon_adamw"], params, grads)


def muon_adamw(params: list[Tensor], grads: list[Tensor], compiled: bool = False, **flags: Any) -> Run:
    """Two optimizers, each for its part."""
    leaves = leaves_of(params, grads)
    muon = torch.optim.Muon([p for p in leaves if hidden(tuple(p.shape))], lr=LR["hidden"])
    adamw = torch.optim.AdamW([p for p in leaves if not hidden(tuple(p.shape))], lr=LR["rest"], **flags)

    def step() -> None:
        muon.step()
        adamw.step()

    return Loop(leaves, torch.compile(step) if compiled else step)


def accumulate_adamw(params: list[Tensor], grads: list[Tensor], compiled: bool = False, **flags: Any) -> Run:
    """The first gradient is copied, which spares filling the sum with zeros, and the others are added to it."""
    leaves = leaves_of(params, [torch.zeros_like(p) for p in params])
    sums = [p.grad for p in leaves if p.grad is not None]
    optimizer = torch.optim.AdamW(leaves, lr=PEAK, eps=EPS, **flags)

    def step() -> None:
        torch._foreach_copy_(sums, grads)
        for _ in range(ACCUMULATED - 1):
            torch._foreach_add_(sums, grads)
        optimizer.step()

    return Loop(leaves, torch.compile(step) if compiled else step)


CHAINS: dict[str, Chain] = {
    chain.key: chain
    for chain in [
        # Reads g for its norm; then it is AdamW. A small g is still in the cache the second time, a large one is not.
        Chain(
            "clip_adamw",
            "clip + AdamW + schedule",
            lambda: purestep.chain(purestep.clip_by_global_norm(1.0), purestep.adamw(scheduled(), eps=EPS)),
            {
                "torch default": clip_adamw,
                "torch loop": partial(clip_adamw, clip=False, foreach=False),
                "torch foreach": partial(clip_adamw, clip=True, foreach=True),
                "torch fused": partial(clip_adamw, clip=True, fused=True),
                "torch compiled": partial(clip_adamw, compiled=True),
                **installed(torchopt, torchopt=clip_adamw_torchopt),
            },
            words=8,
            tolerance=5e-3,  # torch's norm is too small by 0.1 % on gpt2: it adds up all squares in one float
            spends=True,
        ),
        Chain(
            "sgd_nesterov",
            "SGD + Nesterov + decay",
            lambda: purestep.sgd(**NESTEROV),
            {
                "torch default": sgd_nesterov,
                "torch loop": partial(sgd_nesterov, foreach=False),
                "torch foreach": partial(sgd_nesterov, foreach=True),
                "torch fused": partial(sgd_nesterov, fused=True),
                "torch compiled": partial(sgd_nesterov, compiled=True),
                **installed(torchopt, torchopt=sgd_nesterov_torchopt),
                **installed(pytorch_optimizer, pytorch_optimizer=sgd_nesterov_pytorch_optimizer),
            },
            words=5,  # reads p, g, b; writes p, b
            spends=True,
        ),
        Chain(  # neither torch nor torchopt has Lion
            "lion",
            "Lion",
            lambda: purestep.lion(**LION),
            installed(pytorch_optimizer, pytorch_optimizer=lion_pytorch_optimizer),
            words=5,  # reads p, g, m; writes p, m
        ),
        Chain(
            "lion_ema",
            "Lion + EMA",
            lambda: purestep.chain(purestep.lion(**LION), purestep.ema_params(DECAY)),
            installed(pytorch_optimizer, pytorch_optimizer=lion_ema_pytorch_optimizer),
            words=7,  # reads p, g, m, average; writes p, m, average
        ),
        Chain(
            "muon_adamw",
            "Muon and AdamW",
            lambda: purestep.partition(
                {"hidden": purestep.muon(LR["hidden"]), "rest": purestep.adamw(LR["rest"])},
                lambda path, p: "hidden" if hidden(tuple(p.shape)) else "rest",
            ),
            {
                "torch fused": partial(muon_adamw, fused=True),
                "torch compiled": partial(muon_adamw, compiled=True),
                **installed(pytorch_optimizer, pytorch_optimizer=muon_adamw_pytorch_optimizer),
            },
            words=lambda shape: 5 if hidden(shape) else 7,  # as Muon's and AdamW's
            spends=True,
            looser=ROUNDED,
            without={OPTAX: ALGORITHMS["muon"].without[OPTAX]},
            note="Muon for the matrices without the token embedding",
        ),
        # The first gradient is read, and the sum written; the second and third are read, and the sum both; the fourth is read
        # with the sum and p, m, v, and p, m, v are written. Nothing has to write the last sum, or zeros.
        Chain(
            "accumulate",
            "accumulate AdamW",
            lambda: purestep.accumulate(purestep.adamw(PEAK, eps=EPS), ACCUMULATED, average=False),
            {
                "torch fused": partial(accumulate_adamw, fused=True),
                "torch compiled": partial(accumulate_adamw, compiled=True),
            },
            words=2 + 3 * (ACCUMULATED - 2) + 8,
            times=ACCUMULATED,
            note=f"a step is {ACCUMULATED} gradients and one update",
        ),
    ]
}


SUBJECTS: dict[str, Subject] = {**ALGORITHMS, **CHAINS}


def starts(subject: Subject) -> dict[str, Start]:
    """What begins each of the modes that an algorithm or a chain can be measured in."""
    if isinstance(subject, Chain):
        found = subject.starts()
        return {name: found[name] for name in MODES if name in found and name not in subject.without}
    assert isinstance(subject, Algorithm)
    possible = [name for name, mode in MODES.items() if name not in subject.without and mode.factory(subject)]
    return {name: partial(MODES[name].start, subject) for name in possible}
