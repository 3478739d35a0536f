"""What purestep costs inside torch.func: unrolled inner loops, populations and vmapped steps; and whether memory grows.

    python -m benchmarks.func
    python -m benchmarks.func --only population vmapped --rounds 50 --json func.json
    python -m benchmarks.func --only unroll --compile 5 20

*unroll*: the gradient of a validation loss after some steps of training, with respect to the initial parameters, as in MAML.
The *floor* is what the network alone costs: as many forward and doubly differentiated backward passes, with an update that
is one operation per tensor, ``p - lr * g``. Of Adam it computes something else; of SGD it is the loop written by hand. *by
hand* is Adam's loop, with as few operations as it takes: all parameters as one vector, and nothing around them.

*population*: 256 networks with 256 learning rates. *member-steps* are steps of one network.

*vmapped*: an optimizer's step on given gradients, mapped over its members, beside the same arithmetic written by hand on
stacked tensors: out of place, and so that an operation's result overwrites its operand where that is a temporary.

*memory*: what the process holds after 100 and after 1,000 outer iterations of meta-training. It is looked at first.

All modes of a table are run in one process, in turns, in an order that is shuffled anew in every round; the figures are
medians and interquartile ranges. A mode that does not compute what the others do is left out, and the exit status is 1. The
first call of a compiled mode is its *compile* time, and no part of the others; the compiler's caches begin empty.

Of the unrolled loops those of 20 steps are compiled on request only, because that takes minutes (of Adam, 4 of processor time);
and those of the wide network never, whose graphs are the narrow one's in other shapes.

The *summary* sets what was measured beside what purestep is to reach.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache
from torch.func import grad, grad_and_value, vmap

import purestep as ps
from benchmarks.step import machine, measure, positive, ratio, release, render, spread, timed
from purestep import optim

try:
    import torchopt
except ImportError:
    torchopt = None
try:
    import higher
except ImportError:
    higher = None
try:
    from tqdm import tqdm
except ImportError:
    tqdm = None

Params = dict[str, Tensor]
Network = Callable[[Params, Tensor], Tensor]

TOLERANCE = 1e-3  # between modes, relative to the norm of what they compute


# ---------------------------------------------------------------------------------------------------------------- results


@dataclass(frozen=True)
class Row:
    """What was measured of one mode, and how it compares."""

    mode: str
    median_ms: float
    iqr_ms: float
    member_steps: float | None  # per second; None where there are no members
    compile_s: float | None  # None if it is not compiled
    over: dict[str, float]  # its time over that of other modes


@dataclass(frozen=True)
class Table:
    """Some modes of computing one thing."""

    part: str
    name: str
    rounds: int
    rows: list[Row]

    def fastest(self, *modes: str) -> float | None:
        """The least median time of these modes; None if none of them was run."""
        return min([row.median_ms for row in self.rows if row.mode in modes], default=None)

    def over(self, modes: Sequence[str], other: str) -> float | None:
        """The median time of the fastest of these modes over that of the other; None if they were not run."""
        ours, theirs = self.fastest(*modes), self.fastest(other)
        return ours / theirs if ours and theirs else None


@dataclass(frozen=True)
class Memory:
    """What was held early and late in one loop of meta-training."""

    mode: str
    iterations: tuple[int, int]
    resident_bytes: tuple[int, int]
    live_tensors: tuple[int, int]

    @property
    def growth(self) -> tuple[int, int]:
        """Bytes and tensors."""
        return self.resident_bytes[1] - self.resident_bytes[0], self.live_tensors[1] - self.live_tensors[0]


@dataclass(frozen=True)
class Figure:
    """One of the figures that purestep is to reach."""

    what: str
    value: float
    target: float
    at_least: bool = False
    unit: str = ""

    @property
    def reached(self) -> bool:
        """Whether it is."""
        return self.value >= self.target if self.at_least else self.value <= self.target


# ------------------------------------------------------------------------------------------------------------- comparison


class Run(Protocol):
    """A way of computing something, again and again."""

    def step(self) -> None:
        """Compute it once. This is timed."""
        ...

    def result(self) -> list[Tensor]:
        """What all ways must agree on, after the same number of steps."""
        ...


class Again:
    """The same computation each time."""

    def __init__(self, function: Callable[[], Iterable[Tensor]]) -> None:
        self.function = function
        self.found: Iterable[Tensor] = ()

    def step(self) -> None:
        self.found = self.function()

    def result(self) -> list[Tensor]:
        return list(self.found)


class Onward:
    """A computation that goes on from its own results: parameters and a state."""

    def __init__(self, function: Callable[[Params, Any], tuple[Params, Any]], params: Params, state: Any) -> None:
        self.function, self.params, self.state = function, params, state

    def step(self) -> None:
        self.params, self.state = self.function(self.params, self.state)

    def result(self) -> list[Tensor]:
        return list(self.params.values())


@dataclass(frozen=True)
class Contest:
    """Ways of computing the same thing, and how their times are compared."""

    part: str
    name: str
    runs: dict[str, Run]
    begin: list[Tensor]  # what the agreement is relative to is how far the results are from here
    references: Sequence[str]  # modes that the others are divided by
    rounds: int  # that give a steady median in reasonable time
    compiled: Sequence[str] = ()
    unlike: Sequence[str] = ()  # modes that compute something else
    members: int | None = None


def compare(contest: Contest, rounds: int | None) -> tuple[Table, list[str]]:
    """Compile, check and measure; and what the modes that are left out have done wrong."""
    label = f"{contest.part}: {contest.name}"
    first: dict[str, float] = {}
    for mode in stages(list(contest.runs), label):
        first[mode] = timed(contest.runs[mode].step)
        contest.runs[mode].step()
    wrong = disagreeing(contest)
    steps = {mode: run.step for mode, run in contest.runs.items() if mode not in wrong}
    milliseconds = measure(steps, rounds or contest.rounds, None, label)

    medians = {mode: median(times) for mode, times in milliseconds.items()}
    rows = [
        Row(
            mode,
            median_ms=medians[mode],
            iqr_ms=spread(milliseconds[mode]),
            member_steps=1e3 * contest.members / medians[mode] if contest.members else None,
            compile_s=first[mode] / 1e3 if mode in contest.compiled else None,
            over={other: medians[mode] / medians[other] for other in contest.references if other in medians},
        )
        for mode in steps
    ]
    failures = [f"{label}: {mode!r} is left out: {what}" for mode, what in wrong.items()]
    return Table(contest.part, contest.name, len(next(iter(milliseconds.values()))), rows), failures


def disagreeing(contest: Contest) -> dict[str, str]:
    """The modes that did not compute what the first one did: there is nothing to compare."""
    (first, reference), *others = [(mode, run.result()) for mode, run in contest.runs.items() if mode not in contest.unlike]
    size = distance(contest.begin, reference)
    differences = {mode: distance(found, reference) / size for mode, found in others}
    return {
        mode: f"its results differ from those of {first!r} by {x:.1e} of their norm"
        for mode, x in differences.items()
        if not x <= TOLERANCE
    }


def distance(xs: Iterable[Tensor], ys: Iterable[Tensor]) -> float:
    """The Euclidean distance between lists of tensors."""
    return torch.stack([torch.linalg.vector_norm((x - y).detach(), dtype=torch.float64) for x, y in zip(xs, ys)]).norm().item()


def stages(items: Sequence[Any], label: str, unit: str = "mode") -> Iterable[Any]:
    """The same items, with a progress bar where tqdm is installed and stderr is a terminal."""
    return items if tqdm is None else tqdm(items, desc=label, unit=unit, leave=False, disable=None)


# ----------------------------------------------------------------------------------------------------------------- unroll


class Data(NamedTuple):
    """Two batches."""

    x: Tensor
    y: Tensor
    x_validation: Tensor
    y_validation: Tensor


@dataclass(frozen=True)
class Task:
    """A perceptron, and its loss on data to train and to validate with."""

    sizes: tuple[int, ...]
    data: Data

    def module(self) -> nn.Module:
        """The network as the peers take it."""
        layers = [layer for pair in pairwise(self.sizes) for layer in (nn.Linear(*pair), nn.ReLU())]
        return nn.Sequential(*layers[:-1])

    def train(self, params: Params) -> Tensor:
        """The loss that the inner loop descends."""
        return F.mse_loss(perceptron(params, self.data.x), self.data.y)

    def validate(self, params: Params) -> Tensor:
        """The loss that the inner loop's beginning is judged by."""
        return F.mse_loss(perceptron(params, self.data.x_validation), self.data.y_validation)


NETWORKS = {"narrow": (16, 40, 40, 4), "wide": (64, 256, 256, 10)}  # the narrow one's hidden layers are MAML's
STEPS = {5: 80, 20: 30}  # of the inner loop, and the rounds
BATCH = 32
ADAM_LR, SGD_LR = 1e-3, 1e-2
# With an eps of 1e-8 the derivative of Adam's first step is so large where a gradient is small that it is mostly rounding. And
# where a gradient is 0, as with ReLU some are, that of torchopt's Adam is NaN unless there is something below the root, too.
EPS, EPS_ROOT = 1e-4, 1e-16
UNROLL_SEED = 1  # with some others a ReLU is so near its kink that it matters that torchopt's Adam is only good to 1e-5
FLOOR, HAND = "floor", "by hand"
AUTOGRAD, FUNC, COMPILED = "purestep autograd", "purestep torch.func", "purestep compiled"
METAADAM, METASGD, HIGHER = "torchopt MetaAdam", "torchopt MetaSGD", "higher SGD"
PEERS = {"Adam": METAADAM, "SGD": HIGHER}  # that the targets are about


def perceptron(params: Params, x: Tensor) -> Tensor:
    """A network as a pure function, with the names that `nn.Sequential` gives its parameters."""
    for k in range(0, len(params), 2):
        x = F.linear(F.relu(x) if k else x, params[f"{k}.weight"], params[f"{k}.bias"])
    return x


def draw_task(sizes: tuple[int, ...]) -> Task:
    """Normal numbers: what they are makes no difference to the time."""
    return Task(sizes, Data(*[torch.randn(BATCH, n) for n in (sizes[0], sizes[-1]) * 2]))


def unrolls(compiled: Sequence[int]) -> Iterator[Contest]:
    """Each network, number of steps and algorithm."""
    for name, sizes in NETWORKS.items():
        for steps in STEPS:
            for algorithm, opt in {"Adam": ps.adam(ADAM_LR, eps=EPS), "SGD": ps.sgd(SGD_LR)}.items():
                yield unrolled(algorithm, opt, sizes, steps, name == "narrow" and steps in compiled)


def unrolled(algorithm: str, opt: Any, sizes: tuple[int, ...], steps: int, compiled: bool) -> Contest:
    """An inner loop and its derivative, in all modes."""
    torch.manual_seed(UNROLL_SEED)
    task = draw_task(sizes)
    module = task.module()
    params = {k: p.detach().clone() for k, p in module.named_parameters()}
    leaves = {k: p.clone().requires_grad_() for k, p in params.items()}

    def trained(p: Params) -> Tensor:
        return task.validate(ps.meta.unroll(opt, task.train, p, steps).params)

    runs: dict[str, Run] = {
        FLOOR: Again(lambda: floor(task, leaves, steps)),
        AUTOGRAD: Again(lambda: torch.autograd.grad(trained(leaves), list(leaves.values()))),
        FUNC: Again(lambda: grad(trained)(params).values()),
    }
    if algorithm == "Adam":
        runs[HAND] = Again(lambda: adam_by_hand(task, leaves, steps))
    if compiled:
        gradient = torch.compile(grad(trained), fullgraph=True)
        runs[COMPILED] = Again(lambda: gradient(params).values())
    if torchopt is not None:
        if algorithm == "Adam":
            runs[METAADAM] = Again(
                torchopt_loop(task, module, steps, torchopt.MetaAdam, lr=ADAM_LR, eps=EPS, eps_root=EPS_ROOT)
            )
        else:
            runs[METASGD] = Again(torchopt_loop(task, module, steps, torchopt.MetaSGD, lr=SGD_LR))
    if higher is not None and algorithm == "SGD":
        runs[HIGHER] = Again(higher_loop(task, module, steps))
    return Contest(
        "unroll",
        f"{steps} steps of {algorithm}, {'-'.join(map(str, sizes))}, a batch of {BATCH}",
        runs,
        begin=[torch.zeros_like(p) for p in params.values()],
        references=[FLOOR, *[peer for peer in (METAADAM, HIGHER, METASGD) if peer in runs]],
        rounds=STEPS[steps],
        compiled=[COMPILED],
        unlike=[FLOOR] if algorithm == "Adam" else [],
    )


def floor(task: Task, leaves: Params, steps: int) -> Sequence[Tensor]:
    """Gradient descent by hand."""
    params = leaves
    for _ in range(steps):
        grads = torch.autograd.grad(task.train(params), list(params.values()), create_graph=True)
        params = {k: torch.sub(p, g, alpha=SGD_LR) for (k, p), g in zip(params.items(), grads)}
    return torch.autograd.grad(task.validate(params), list(leaves.values()))


def adam_by_hand(task: Task, leaves: Params, steps: int) -> Sequence[Tensor]:
    """Adam with as few operations as it takes."""
    shapes, sizes = [p.shape for p in leaves.values()], [p.numel() for p in leaves.values()]
    b1, b2 = 0.9, 0.999

    def tree(vector: Tensor) -> Params:
        return {k: x.view(shape) for k, x, shape in zip(leaves, vector.split(sizes), shapes)}

    vector = torch.cat([p.reshape(-1) for p in leaves.values()])
    mean, square = torch.zeros_like(vector), torch.zeros_like(vector)
    for step in range(1, steps + 1):
        (g,) = torch.autograd.grad(task.train(tree(vector)), vector, create_graph=True)
        mean, square = torch.lerp(mean, g, 1 - b1), torch.addcmul(b2 * square, g, g, value=1 - b2)
        root = (square + EPS_ROOT).sqrt() * (1 - b2**step) ** -0.5  # EPS_ROOT, or its derivative would be NaN at 0
        vector = torch.addcdiv(vector, mean, root + EPS, value=-ADAM_LR / (1 - b1**step))
    return torch.autograd.grad(task.validate(tree(vector)), list(leaves.values()))


def torchopt_loop(task: Task, module: nn.Module, steps: int, factory: Any, **options: float) -> Callable[[], Sequence[Tensor]]:
    """As in torchopt's guide to explicit gradients: module and optimizer are put back after the outer step."""
    data, optimizer = task.data, factory(module, **options)
    params = list(module.parameters())
    states = [torchopt.extract_state_dict(x, by="reference") for x in (module, optimizer)]

    def run() -> Sequence[Tensor]:
        for _ in range(steps):
            optimizer.step(F.mse_loss(module(data.x), data.y))
        grads = torch.autograd.grad(F.mse_loss(module(data.x_validation), data.y_validation), params)
        for x, state in zip((module, optimizer), states):
            torchopt.recover_state_dict(x, state)
        return grads

    return run


def higher_loop(task: Task, module: nn.Module, steps: int) -> Callable[[], Sequence[Tensor]]:
    """As in higher's README for MAML: derivatives reach the module's own parameters."""
    data = task.data
    own = task.module()
    own.load_state_dict(module.state_dict())
    optimizer, params = torch.optim.SGD(own.parameters(), lr=SGD_LR), list(own.parameters())

    def run() -> Sequence[Tensor]:
        with higher.innerloop_ctx(own, optimizer, copy_initial_weights=False) as (patched, inner):
            for _ in range(steps):
                inner.step(F.mse_loss(patched(data.x), data.y))
            return torch.autograd.grad(F.mse_loss(patched(data.x_validation), data.y_validation), params)

    return run


# ------------------------------------------------------------------------------------------------- populations and members

MEMBERS, IMAGES = 256, 64  # networks, and the images of a batch, which all of them see
DIGITS = {"0.weight": (32, 64), "0.bias": (32,), "2.weight": (10, 32), "2.bias": (10,)}  # 8 x 8 pixels
MILLION = {"0.weight": (1024, 512), "0.bias": (1024,), "2.weight": (512, 1024), "2.bias": (512,)}
TORCH, VMAPPED, VMAPPED_COMPILED = "torch fused, a loop", "purestep vmapped", "purestep vmapped, compiled"
DECAY, MOMENTUM = 1e-2, 0.9


def draw(shapes: dict[str, tuple[int, ...]], members: int, scale: float) -> Params:
    """Normal numbers, stacked."""
    return {k: scale * torch.randn(members, *shape) for k, shape in shapes.items()}


def rates(members: int) -> Tensor:
    """As many learning rates."""
    return torch.logspace(-5, -2, members, dtype=torch.float64)


class Loop:
    """Networks of their own with optimizers of their own, one after the other."""

    def __init__(self, params: Params, lr: Tensor, batch: tuple[Tensor, Tensor] | None, grads: Params | None = None) -> None:
        self.batch = batch
        self.networks: list[tuple[nn.Module, torch.optim.Optimizer]] = []
        for k, rate in enumerate(lr.tolist()):
            module = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
            module.load_state_dict({name: p[k] for name, p in params.items()})
            for name, p in module.named_parameters():
                p.grad = grads[name][k].clone() if grads else None
            self.networks.append((module, torch.optim.AdamW(module.parameters(), lr=rate, weight_decay=DECAY, fused=True)))

    def step(self) -> None:
        if self.batch is None:
            for _, optimizer in self.networks:
                optimizer.step()
            return
        images, labels = self.batch
        for module, optimizer in self.networks:
            optimizer.zero_grad()
            F.cross_entropy(module(images), labels).backward()
            optimizer.step()

    def result(self) -> list[Tensor]:
        each = zip(*[module.parameters() for module, _ in self.networks])
        return [torch.stack(column).detach() for column in each]


def vmapped(opt: Any, params: Params, step: Callable[..., tuple[Params, Any]], *data: Any, compiled: bool) -> Onward:
    """``step(opt, params, state, ...)`` mapped over members. `data` are pairs: a pytree, and the dimension that is mapped."""
    dims = ps.in_dims(opt)
    values, places = [x for x, _ in data], [dim for _, dim in data]
    state = vmap(lambda opt, p: opt.init_state(p), in_dims=(dims, 0))(opt, params)
    mapped = vmap(step, in_dims=(dims, 0, 0, *places))
    function = torch.compile(mapped, fullgraph=True) if compiled else mapped
    return Onward(lambda p, s: function(opt, p, s, *values), params, state)


def train(opt: Any, params: Params, state: Any, images: Tensor, labels: Tensor) -> tuple[Params, Any]:
    """One training step of one member."""
    grads, _ = grad_and_value(lambda p: F.cross_entropy(perceptron(p, images), labels))(params)
    return opt.step(grads, state, params)


def step(opt: Any, params: Params, state: Any, grads: Params) -> tuple[Params, Any]:
    """One optimizer step of one member."""
    return opt.step(grads, state, params)


def populations() -> Iterator[Contest]:
    """A sweep of learning rates: whole training steps, and the optimizer's part."""
    torch.manual_seed(0)
    params, grads, lr = draw(DIGITS, MEMBERS, 0.2), draw(DIGITS, MEMBERS, 0.02), rates(MEMBERS)
    images, labels = torch.randn(IMAGES, 64), torch.randint(10, (IMAGES,))
    opt = ps.adamw(lr, weight_decay=DECAY)
    size = f"{MEMBERS} networks 64-32-10, AdamW"
    for name, loop, function, data in [
        (
            f"training step, {size}, a batch of {IMAGES}",
            Loop(params, lr, (images, labels)),
            train,
            [(images, None), (labels, None)],
        ),
        (f"optimizer step, {size}", Loop(params, lr, None, grads), step, [(grads, 0)]),
    ]:
        runs: dict[str, Run] = {
            TORCH: loop,
            VMAPPED: vmapped(opt, params, function, *data, compiled=False),
            VMAPPED_COMPILED: vmapped(opt, params, function, *data, compiled=True),
        }
        yield Contest(
            "population",
            name,
            runs,
            begin=list(params.values()),
            references=[TORCH],
            rounds=40,
            compiled=[VMAPPED_COMPILED],
            members=MEMBERS,
        )


REUSE, HAND_COMPILED = "by hand, reusing temporaries", "by hand, compiled"
B1, B2, ADAM_EPS = 0.9, 0.999, 1e-8


class Moments(NamedTuple):
    """The state of an AdamW for all members."""

    step: Tensor
    exp_avg: Params
    exp_avg_sq: Params


def adamw_by_hand(lr: Tensor, grads: Params, params: Params, s: Moments, reuse: bool) -> tuple[Params, Moments]:
    """All members advance together, so they share the counter. What can be computed once per member is."""
    t = s.step + 1
    correction = (1 - B2**t).sqrt()
    size, kept, eps = (-lr * correction / (1 - B1**t)).float(), (1 - lr * DECAY).float(), ADAM_EPS * correction
    new, exp_avg, exp_avg_sq = {}, {}, {}
    for name, p in params.items():
        g, shape = grads[name], (-1, *[1] * (p.dim() - 1))
        m = torch.lerp(s.exp_avg[name], g, 1 - B1)
        if reuse:
            v = (s.exp_avg_sq[name] * B2).addcmul_(g, g, value=1 - B2)
            new[name] = (p * kept.view(shape)).addcdiv_(m * size.view(shape), v.sqrt().add_(eps))
        else:
            v = torch.addcmul(s.exp_avg_sq[name] * B2, g, g, value=1 - B2)
            new[name] = torch.addcdiv(p * kept.view(shape), m * size.view(shape), v.sqrt() + eps)
        exp_avg[name], exp_avg_sq[name] = m, v
    return new, Moments(t, exp_avg, exp_avg_sq)


def sgd_by_hand(lr: Tensor, grads: Params, params: Params, buffers: Params) -> tuple[Params, Params]:
    """Two operations per tensor, and no temporaries."""
    size, new = -lr.float(), {}
    buffers = {name: torch.add(grads[name], b, alpha=MOMENTUM) for name, b in buffers.items()}
    for name, p in params.items():
        new[name] = torch.addcmul(p, buffers[name], size.view(-1, *[1] * (p.dim() - 1)))
    return new, buffers


def vmapped_steps() -> Iterator[Contest]:
    """Two algorithms, on small members and on large ones."""
    for shapes, members, rounds in ((DIGITS, MEMBERS, 100), (MILLION, 16, 10)):
        torch.manual_seed(0)
        params, grads, lr = draw(shapes, members, 0.2), draw(shapes, members, 0.02), rates(members)
        zeros = {name: torch.zeros_like(p) for name, p in params.items()}
        adamw = functools.partial(adamw_by_hand, lr, grads)
        for algorithm, opt, state, hands in [
            (
                "AdamW",
                ps.adamw(lr, weight_decay=DECAY),
                Moments(torch.zeros(()), zeros, zeros),
                {HAND: functools.partial(adamw, reuse=False), REUSE: functools.partial(adamw, reuse=True)},
            ),
            (
                "SGD with momentum",
                ps.sgd(lr, momentum=MOMENTUM),
                zeros,
                {HAND: functools.partial(sgd_by_hand, lr, grads)},
            ),
        ]:
            hands[HAND_COMPILED] = torch.compile(hands[HAND], fullgraph=True)
            runs: dict[str, Run] = {mode: Onward(function, params, state) for mode, function in hands.items()}
            runs[VMAPPED] = vmapped(opt, params, step, (grads, 0), compiled=False)
            runs[VMAPPED_COMPILED] = vmapped(opt, params, step, (grads, 0), compiled=True)
            yield Contest(
                "vmapped",
                f"{algorithm}, {members} members of {sum([p[0].numel() for p in params.values()]):,} parameters",
                runs,
                begin=list(params.values()),
                references=list(hands),
                rounds=rounds,
                compiled=[HAND_COMPILED, VMAPPED_COMPILED],
                members=members,
            )


# ----------------------------------------------------------------------------------------------------------------- memory

STATUS = Path("/proc/self/status")  # Linux's
EARLY, LATE = 100, 1000  # outer iterations
INNER, OUTER_LR = 5, 1e-3  # steps of the inner loop, and the learning rate around it
GROWTH_LIMIT = 2**20  # bytes: one matrix kept per iteration would be six times this, and malloc makes some of it by itself


def meta_training() -> Iterator[tuple[str, Callable[[], None]]]:
    """Outer iterations, each on data of its own, with plain autograd and with torch.func."""
    sizes = NETWORKS["narrow"]
    opt = ps.adam(ADAM_LR, eps=EPS)
    torch.manual_seed(0)
    params = {k: p.detach() for k, p in draw_task(sizes).module().named_parameters()}

    def trained(p: Params) -> Tensor:
        task = draw_task(sizes)
        return task.validate(ps.meta.unroll(opt, task.train, p, INNER).params)

    leaves = {k: p.clone().requires_grad_() for k, p in params.items()}
    optimizer = optim.AdamW(leaves.values(), lr=OUTER_LR)

    def stateful() -> None:
        optimizer.zero_grad()
        trained(leaves).backward()
        optimizer.step()

    yield "autograd, purestep.optim.AdamW outside", stateful

    outer = ps.adamw(OUTER_LR)
    now = params, outer.init_state(params)

    def functional() -> None:
        nonlocal now
        now = outer.step(grad(trained)(now[0]), now[1], now[0])

    yield "torch.func, Transform.step outside", functional


def watch(mode: str, iterate: Callable[[], None]) -> Memory:
    """Iterate, and look twice at what is held."""
    resident, live = [], []
    live_tensors()  # for nothing: to look needs memory, too, which is not to be found later
    for k in stages(range(1, LATE + 1), f"memory: {mode}", "iteration"):
        iterate()
        if k in (EARLY, LATE):
            resident.append(resident_bytes())  # with the cycles that are yet to be collected
            live.append(live_tensors())
    return Memory(mode, (EARLY, LATE), (resident[0], resident[1]), (live[0], live[1]))


def live_tensors() -> int:
    """How many tensors Python knows of, cycles aside."""
    gc.collect()
    return sum([issubclass(type(x), Tensor) for x in gc.get_objects()])


def resident_bytes() -> int:
    """What the process holds."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmRSS"))
    return 1024 * int(line.split()[1])


# ----------------------------------------------------------------------------------------------------------------- output


def show(table: Table) -> str:
    """A table under a line that says what it is of."""
    references = list(table.rows[0].over)
    header = ["mode", "median ms", "IQR ms", *[f"/ {mode}" for mode in references]]
    lines = [[r.mode, f"{r.median_ms:.3f}", f"{r.iqr_ms:.3f}", *map(ratio, r.over.values())] for r in table.rows]
    for title, column in {
        "member-steps / s": ["" if r.member_steps is None else f"{r.member_steps:,.0f}" for r in table.rows],
        "compile s": ["" if r.compile_s is None else f"{r.compile_s:.1f}" for r in table.rows],
    }.items():
        if any(column):
            header.append(title)
            lines = [[*line, x] for line, x in zip(lines, column)]
    return f"{table.part}: {table.name}, {table.rounds} rounds\n\n{render(header, lines)}\n"


def show_memory(memories: Sequence[Memory]) -> str:
    """What was held, and by how much it grew."""
    header = ["meta-training", *[f"MB at {k}" for k in (EARLY, LATE)], "growth MB", *[f"tensors at {k}" for k in (EARLY, LATE)]]
    lines = [
        [m.mode, *[f"{x / 1e6:.1f}" for x in m.resident_bytes], f"{m.growth[0] / 1e6:+.2f}", *map(str, m.live_tensors)]
        for m in memories
    ]
    return f"memory: {LATE} outer iterations, {INNER} steps of Adam inside\n\n{render(header, lines)}\n"


def summarize(tables: Sequence[Table], memories: Sequence[Memory]) -> list[Figure]:
    """What was measured of what is to be reached."""
    found: list[Figure] = []

    def add(table: Table, modes: Sequence[str], other: str, target: float, *, inverse: bool = False) -> None:
        value = table.over(modes, other)
        if value is not None:
            found.append(
                Figure(
                    f"{table.name}: {' or '.join(modes)} / {other}" + (", throughput" if inverse else ""),
                    1 / value if inverse else value,
                    target,
                    at_least=inverse,
                )
            )

    for table in tables:
        if table.part == "unroll":
            peer = next((p for p in PEERS.values() if table.fastest(p)), "")
            add(table, [AUTOGRAD, FUNC], peer, 0.5)
            add(table, [COMPILED], peer, 0.3)
        elif table.part == "population":
            add(table, [VMAPPED], TORCH, 6.0, inverse=True)
            add(table, [VMAPPED_COMPILED], TORCH, 10.0, inverse=True)
        else:
            add(table, [VMAPPED], HAND, 1.3)
            add(table, [VMAPPED], REUSE, 1.3)
            add(table, [VMAPPED_COMPILED], HAND_COMPILED, 1.3)
    for m in memories:
        size, count = m.growth
        span = f"from {EARLY} to {LATE} iterations"
        found.append(Figure(f"growth {span}, {m.mode}: resident", size / 1e6, GROWTH_LIMIT / 1e6, unit=" MB"))
        found.append(Figure(f"growth {span}, {m.mode}: live tensors", count, 0))
    return found


def show_summary(figures: Iterable[Figure]) -> str:
    """The figures beside their targets."""
    lines = [
        (
            f.what,
            f"{f.value:.2f}{f.unit}",
            f"{'>=' if f.at_least else '<='} {f.target:.3g}{f.unit}",
            "yes" if f.reached else "NO",
        )
        for f in figures
    ]
    return f"Summary\n\n{render(('figure', 'measured', 'target', 'reached'), lines)}\n"


PARTS = ("unroll", "population", "vmapped", "memory")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.func", description="What purestep costs inside torch.func.")
    text = f"of {', '.join(map(repr, PARTS))}; all by default"
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=text)
    text = f"numbers of inner steps, of {', '.join(map(str, STEPS))}, whose unrolled loops are compiled too; 5 by default"
    parser.add_argument("--compile", nargs="*", type=int, choices=list(STEPS), default=[5], metavar="STEPS", help=text)
    text = "how often each mode is timed; by default, by table, what gives steady medians"
    parser.add_argument("--rounds", type=positive, metavar="N", help=text)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all of it, and facts about the machine, to this file")
    return parser.parse_args()


def main() -> None:
    """Measure, print, write."""
    options = arguments()
    if options.json:
        options.json.touch()  # a path that cannot be written is better known now than in a few minutes
    facts = machine() | {"higher": version("higher") if higher is not None else None}
    print(", ".join(f"{name} {value}" for name, value in facts.items()), end="\n\n")
    for name, module in {"torchopt": torchopt, "higher": higher}.items():
        if module is None and "unroll" in options.only:
            print(f"{name} is not installed, and is left out.\n")

    contests = {"unroll": lambda: unrolls(options.compile), "population": populations, "vmapped": vmapped_steps}
    tables: list[Table] = []
    memories: list[Memory] = []
    failures: list[str] = []
    if "memory" in options.only and not STATUS.exists():
        print(f"There is no {STATUS}, which says what a process holds: memory is left out.\n")
    elif "memory" in options.only:
        # First, because a heap that others have been in grows by what it had given back to the system.
        memories = [watch(mode, iterate) for mode, iterate in meta_training()]
        print(show_memory(memories), flush=True)
    with fresh_cache():
        for part in [part for part in PARTS if part in options.only and part in contests]:
            for contest in contests[part]():
                table, wrong = compare(contest, options.rounds)
                tables.append(table)
                failures += wrong
                print("\n\n".join([*wrong, show(table)]), flush=True)
                torch.compiler.reset()
                release()
    figures = summarize(tables, memories)
    print(show_summary(figures))
    if options.json:
        results = {
            "machine": facts,
            "tables": [asdict(table) for table in tables],
            "memory": [asdict(memory) for memory in memories],
            "summary": [asdict(figure) | {"reached": figure.reached} for figure in figures],
            "failures": failures,
        }
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
