"""Checkpoints, with torch.optim as the oracle: what either side saves, the other continues from, as if nothing had happened.

Everything here runs for every class that purestep.optim shares with torch.optim. What is particular to a class (its options, how
it is trained, what torch fills in for an older checkpoint, what cannot be asked of it and why) is data in `SUBJECTS`.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import itertools
import math
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.utils._pytree import tree_map

from purestep import optim
from tests.cases import CLASSES, Options
from tests.problems import clone, difference
from tests.test_optimizer import BOTH, ROUTES, like, make, parameters, saved, tensors, train, values

Skip: TypeAlias = Callable[[int, int], bool]
Train: TypeAlias = Callable[..., None]

TOLERANCE = {torch.float64: 1e-10, torch.complex128: 1e-10, torch.float32: 1e-5}
SIDES = {"torch's": torch.optim, "ours": optim}
FLAGS: dict[str, Options] = {
    "loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "fused off": {"foreach": None, "fused": False},
}


# ------------------------------------------------------------------------------------------------------------ how to train


def train_sparsely(optimizer: Any, steps: range, skip: Skip | None = None) -> None:
    """With gradients that are sparse: two of the rows, one of them given twice."""
    for k in steps:
        for i, p in enumerate(parameters(optimizer)):
            if (skip is not None and skip(k, i)) or not p.requires_grad:
                p.grad = None
                continue
            g = torch.Generator().manual_seed(100 * k + i)
            rows = torch.randint(len(p), (2,), generator=g)[[0, 1, 0]]
            noise = torch.randn((3, *p.shape[1:]), generator=g, dtype=torch.float64)
            grad = torch.sin(p.detach()[rows]) + noise.to(p.dtype)
            p.grad = torch.sparse_coo_tensor(rows[None], grad, p.shape, check_invariants=True)
        optimizer.step()


def train_with_a_closure(optimizer: Any, steps: range, skip: Skip | None = None) -> None:
    """On the k-th of a sequence of convex functions, each with another minimum, so that there is always something left to do."""
    params = parameters(optimizer)
    for k in steps:
        noise = []
        for i, p in enumerate(params):
            g = torch.Generator().manual_seed(100 * k + i)
            noise.append(torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype))

        def closure(k: int = k, noise: list[Tensor] = noise) -> Tensor:
            loss = torch.zeros((), dtype=torch.float64)
            for i, p in enumerate(params):
                p.grad = None
                if (skip is None or not skip(k, i)) and p.requires_grad:
                    x, c = p.detach(), torch.linspace(0.5, 2.0, p.numel(), dtype=torch.float64).view(p.shape)
                    loss += (c * x.abs() ** 2 / 2 + x.abs() ** 4 / 40 + (noise[i].conj() * x).real).sum()
                    p.grad = (c * x + x.abs() ** 2 * x / 10 + noise[i]).to(p.dtype)
            return loss

        optimizer.step(closure)


# ------------------------------------------------------------------------------------------------------------ the subjects

OFF = {"foreach": None, "maximize": False, "differentiable": False}
ON_ACCELERATORS = {**OFF, "capturable": False}


@dataclasses.dataclass(frozen=True)
class Subject:
    """What the tests need to know about a class of torch.optim."""

    options: dict[str, Options]
    """Sets of options by name."""
    other: Options
    """Options that differ from all of those, with every switch on: for an optimizer that is about to load a checkpoint."""
    fills: Options
    """The options that torch fills in where a checkpoint is too old to know them, with the values it gives them."""
    main: str = "default"
    """The set of options with the most state; what is asked of one only, is asked of it."""
    numbers: tuple[str, ...] = ("step",)
    """What is a tensor in the state today and was a number once."""
    adds: dict[str, str] = dataclasses.field(default_factory=dict)
    """What purestep has in the state and torch has not -> reason."""
    scratch: dict[str, str] = dataclasses.field(default_factory=dict)
    """What both have in the state, but nobody reads -> reason."""
    begins: str = ""
    """Why a state dict is empty before the first step, if it is."""
    copies: str = ""
    """Why a state dict stays what it was when training goes on, where torch's goes on with it."""
    reads: tuple[str, ...] = ()
    """Other classes whose checkpoints torch accepts, because these cannot be told from its own."""
    shapes: tuple[tuple[int, ...], ...] = ((3, 2), (4,), (), (2, 2, 2))
    train: Train = train
    lacks: dict[str, str] = dataclasses.field(default_factory=dict)
    """What a test asks for (or a set of options: what a test asks for) -> why it cannot be had, in torch as here."""
    differs: dict[str, str] = dataclasses.field(default_factory=dict)
    """The same -> why purestep differs from torch in it."""


def _adam(fills: Options, **more: Options) -> dict[str, Any]:
    """What Adam and its relatives have in common."""
    options = {
        "default": {"lr": 0.1},
        "decay": {"lr": 0.1, "weight_decay": 0.1},
        "betas, eps": {"lr": 0.1, "betas": (0.5, 0.8), "eps": 1e-3},
        "maximize": {"lr": 0.05, "weight_decay": 0.1, "maximize": True},
        **more,
    }
    return {"options": options, "other": {"lr": 0.7, "betas": (0.1, 0.2), "maximize": True}, "fills": fills}


NO_COMPLEX = {"complex": "torch refuses complex parameters"}

SUBJECTS: dict[str, Subject] = {
    "SGD": Subject(
        {
            "plain": {"lr": 0.1},
            "decay": {"lr": 0.1, "weight_decay": 0.1},
            "momentum": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1},
            "dampening": {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
            "nesterov": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
            "maximize": {"lr": 0.01, "momentum": 0.5, "maximize": True},
        },
        other={"lr": 0.7, "momentum": 0.1, "nesterov": True, "maximize": True},
        fills={**OFF, "nesterov": False, "fused": False},
        main="dampening",
        numbers=(),
        adds={"step": "it tells the first gradient, which is not dampened, from the others"},
        lacks={
            "plain: state": "without momentum there is none",
            "decay: state": "without momentum there is none",
        },
        differs=dict.fromkeys(
            ("ours to torch, one late", "fresh, ours to torch"),
            "a buffer of zeros is saved, and torch dampens the first gradient that enters it",
        ),
    ),
    "Adam": Subject(
        **_adam(
            {**ON_ACCELERATORS, "amsgrad": False, "decoupled_weight_decay": False, "fused": None},
            amsgrad={"lr": 0.1, "weight_decay": 0.1, "amsgrad": True},
            decoupled={"lr": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True},
        ),
        main="amsgrad",
        reads=("AdamW", "NAdam", "RAdam"),
    ),
    "AdamW": Subject(
        **_adam(
            {**ON_ACCELERATORS, "amsgrad": False, "decoupled_weight_decay": True, "fused": None},
            amsgrad={"lr": 0.1, "weight_decay": 0.1, "amsgrad": True},
        ),
        main="amsgrad",
        reads=("Adam", "NAdam", "RAdam"),
    ),
    "Adamax": Subject(**_adam(ON_ACCELERATORS)),
    "NAdam": Subject(
        **_adam(
            {**ON_ACCELERATORS, "decoupled_weight_decay": False},
            decoupled={"lr": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True},
            momentum={"lr": 0.1, "momentum_decay": 0.1},
        ),
        numbers=("step", "mu_product"),
        differs=dict.fromkeys(
            ("ours to torch, one late", "fresh, ours to torch"),
            "torch keeps mu_product in single precision, but gives it the parameter's when it loads: 1e-9 from its first step on",
        ),
    ),
    "RAdam": Subject(
        **_adam(
            {**ON_ACCELERATORS, "decoupled_weight_decay": False},
            decoupled={"lr": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True},
            late={"lr": 0.1, "betas": (0.9, 0.95)},
        ),
        reads=("Adam", "AdamW", "NAdam"),
    ),
    "Adagrad": Subject(
        {
            "default": {"lr": 0.1},
            "decay": {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1},
            "initial": {"lr": 0.1, "initial_accumulator_value": 0.5},
            "eps": {"lr": 0.1, "eps": 0.1},
            "maximize": {"lr": 0.1, "maximize": True},
        },
        other={"lr": 0.7, "lr_decay": 0.5, "maximize": True},
        fills={**OFF, "fused": None},
        differs=dict.fromkeys(
            ("decay: groups, ours to torch", "initial: groups, ours to torch"),
            "torch begins all groups with the first value, purestep each group with its own",
        ),
    ),
    "Adadelta": Subject(
        {
            "default": {},
            "decay": {"lr": 0.5, "weight_decay": 0.1},
            "rho, eps": {"rho": 0.7, "eps": 1e-2},
            "maximize": {"maximize": True},
        },
        other={"lr": 0.7, "rho": 0.2, "maximize": True},
        fills=ON_ACCELERATORS,
    ),
    "RMSprop": Subject(
        {
            "default": {"lr": 0.1},
            "decay": {"lr": 0.1, "weight_decay": 0.1, "alpha": 0.9},
            "momentum": {"lr": 0.05, "momentum": 0.9},
            "centered": {"lr": 0.1, "centered": True, "eps": 1e-2},
            "both": {"lr": 0.05, "centered": True, "momentum": 0.9, "weight_decay": 0.1, "eps": 1e-2},
            "maximize": {"lr": 0.1, "maximize": True},
        },
        other={"lr": 0.7, "momentum": 0.5, "centered": True, "maximize": True},
        main="both",
        fills={**ON_ACCELERATORS, "momentum": 0, "centered": False},
    ),
    "Rprop": Subject(
        {
            "default": {"lr": 0.1},
            "etas": {"lr": 0.1, "etas": (0.3, 1.5)},
            "step_sizes": {"lr": 0.1, "step_sizes": (0.01, 0.2)},
            "maximize": {"lr": 0.01, "maximize": True},
        },
        other={"lr": 0.7, "etas": (0.9, 1.1), "maximize": True},
        fills=ON_ACCELERATORS,
    ),
    "ASGD": Subject(
        {
            "default": {"lr": 0.1},
            "decay": {"lr": 0.1, "weight_decay": 0.1},
            "averaging": {"lr": 0.1, "t0": 4.0, "lambd": 0.1, "alpha": 0.5},
            "maximize": {"lr": 0.01, "maximize": True},
        },
        other={"lr": 0.7, "t0": 1.0, "maximize": True},
        fills=ON_ACCELERATORS,
        numbers=("step", "eta", "mu"),
        differs=dict.fromkeys(
            ("flags, ours to torch, foreach", "flags, torch to ours, foreach"),
            "torch's foreach rounds eta to single precision, its loop does not: they are 4e-7 apart",
        ),
    ),
    "Adafactor": Subject(
        {
            "default": {"lr": 0.1},
            "decay": {"lr": 0.1, "weight_decay": 0.1},
            "d, eps": {"lr": 0.1, "d": 2.0, "eps": (1e-4, 1e-2)},
            "beta2_decay": {"lr": 0.1, "beta2_decay": -0.5},
            "maximize": {"lr": 0.1, "maximize": True},
        },
        other={"lr": 0.7, "d": 5.0, "beta2_decay": -0.1, "maximize": True},
        fills={"foreach": None},
        lacks=NO_COMPLEX,
    ),
    "Muon": Subject(
        {
            "default": {"lr": 0.02},
            "no nesterov": {"lr": 0.02, "nesterov": False, "momentum": 0.8},
            "as AdamW": {"lr": 0.02, "adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.5},
            "three": {"lr": 0.02, "ns_steps": 3, "weight_decay": 0.0},
        },
        other={"lr": 0.7, "momentum": 0.1, "ns_steps": 1, "weight_decay": 0.9},
        fills={},
        numbers=(),
        adds={"step": "every state of purestep that needs a first step counts"},
        shapes=((3, 2), (2, 5), (4, 4), (6, 1)),
        lacks={**NO_COMPLEX, "flat shape": "it takes matrices only"},
    ),
    "SparseAdam": Subject(
        {
            "default": {"lr": 0.1},
            "betas, eps": {"lr": 0.1, "betas": (0.5, 0.8), "eps": 1e-3},
            "maximize": {"lr": 0.1, "maximize": True},
        },
        other={"lr": 0.7, "betas": (0.1, 0.2), "maximize": True},
        fills={},
        numbers=(),
        reads=("Adam", "AdamW", "NAdam", "RAdam"),
        differs=dict.fromkeys(
            ("reads, torch's", "reads, ours"),
            "torch counts on with their tensor, and corrects the bias in its single precision",
        ),
        shapes=((6, 3), (5,), (4, 2), (7, 2, 2)),
        train=train_sparsely,
        lacks={
            **NO_COMPLEX,
            "distributed, ours to torch, nested": "torch makes a state by a step with gradients that are dense",
            "distributed, ours to torch, flat": "torch makes a state by a step with gradients that are dense",
        },
    ),
    "LBFGS": Subject(
        {
            "default": {"lr": 0.5, "max_iter": 3},
            "short": {"lr": 0.5, "max_iter": 2, "history_size": 3},
            "one": {"lr": 0.1, "max_iter": 1},
            "line search": {"lr": 1.0, "max_iter": 3, "line_search_fn": "strong_wolfe", "history_size": 5},
        },
        other={"lr": 0.01, "max_iter": 7, "history_size": 2},
        fills={},
        numbers=(),
        train=train_with_a_closure,
        scratch={"al": "within a step it is written before it is read"},
        begins="as torch's, it begins with the first evaluation",
        copies="it is made of a state that is laid out otherwise",
        lacks={
            "groups": "it has one group",
            "distributed": "torch asks for a state of every parameter, and there is one of all together, under the first",
            "half": "it has no state of single precision for parameters of half",
            "transposed": "its state is one vector of all parameters, whatever their shapes",
            "flat shape": "its state is one vector of all parameters, whatever their shapes",
        },
    ),
}


@dataclasses.dataclass(frozen=True)
class Kind:
    """A class under one set of its options."""

    cls: str
    name: str

    def __str__(self) -> str:
        return f"{self.cls}-{self.name}"

    @property
    def subject(self) -> Subject:
        return SUBJECTS[self.cls]

    @property
    def options(self) -> Options:
        return self.subject.options[self.name]

    @property
    def next_options(self) -> Options:
        """The set of options that comes after this one."""
        names = list(self.subject.options)
        return self.subject.options[names[(names.index(self.name) + 1) % len(names)]]

    @property
    def lacks(self) -> dict[str, str]:
        signature = inspect.signature(getattr(torch.optim, self.cls)).parameters
        flags = {name: "torch has no such flag there" for name, flags in FLAGS.items() if not flags.keys() <= signature.keys()}
        return {**flags, **self.subject.lacks}

    def params(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        return tensors(*self.subject.shapes, dtype=dtype)

    def make(self, namespace: Any, params: Any, **more: Any) -> Any:
        return make(namespace, self.cls, params, **{**self.options, **more})

    def other(self, namespace: Any, params: Any, **more: Any) -> Any:
        """An optimizer of these parameters with other options and a past of its own, all of which a checkpoint replaces."""
        optimizer = make(namespace, self.cls, like(params), **self.subject.other, **more)
        self.train(optimizer, range(70, 72))
        with torch.no_grad():
            for p, x in zip(parameters(optimizer), params):
                p.copy_(x)
        return optimizer

    def train(self, optimizer: Any, steps: range, skip: Skip | None = None) -> None:
        self.subject.train(optimizer, steps, skip)


KINDS = [Kind(cls, name) for cls in CLASSES for name in SUBJECTS[cls].options]
MAIN = [Kind(cls, SUBJECTS[cls].main) for cls in CLASSES]


def marks(kind: Kind, *what: str) -> list[pytest.MarkDecorator]:
    """A class that lacks something is skipped, one that differs from torch in it fails, each with its reason."""
    asked = {*what, ", ".join(what)}
    asked |= {f"{kind.name}: {x}" for x in asked}
    lacks, differs = kind.lacks, kind.subject.differs
    skips = [pytest.mark.skip(reason=f"{kind.cls}: {lacks[x]}") for x in sorted(asked & lacks.keys())]
    fails = [pytest.mark.xfail(strict=True, reason=f"{kind.cls}: {differs[x]}") for x in sorted(asked & differs.keys())]
    return skips[:1] or fails[:1]


def each(*what: str, routes: bool = False, kinds: list[Kind] = KINDS, **arguments: Mapping[str, Any]) -> pytest.MarkDecorator:
    """Every kind, with the first value of every argument, and if asked for to and from torch; the main ones with all there is.

    `what` names what the test asks for, and so do the route and the names of the values: see `Subject.lacks` and `differs`.
    """
    chosen = []
    for kind in kinds:
        for route, sides in ROUTES.items() if routes else [("", ())]:
            for i, names in enumerate(itertools.product(*arguments.values())):
                if kind in MAIN or (i == 0 and route != "ours to ours"):
                    parts = [*([route] if routes else []), *names]
                    values = [x[name] for x, name in zip(arguments.values(), names)]
                    id = "-".join([str(kind), *parts])
                    chosen.append(pytest.param(kind, *sides, *values, id=id, marks=marks(kind, *what, *parts)))
    return pytest.mark.parametrize(("kind", *(("source", "target") if routes else ()), *arguments), chosen)


# ----------------------------------------------------------------------------------------------------------------- helpers

SKIPS: dict[str, Skip | None] = {
    "all": None,
    "some": lambda k, i: i == 1 and k % 3 == 0,
    "one late": lambda k, i: i == 1 and k < 13,
    "one never": lambda k, i: i == 2,
}


@functools.cache
def straight(kind: Kind, steps: int = 20, skip: str = "all", dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Where torch arrives without interruption."""
    optimizer = kind.make(torch.optim, kind.params(dtype))
    kind.train(optimizer, range(steps), SKIPS[skip])
    return values(optimizer)


def snapshot(optimizer: Any) -> Any:
    """All of an optimizer's state and options and its parameters, copied."""
    numbers = {p: i for i, p in enumerate(parameters(optimizer))}
    state = {str(numbers.get(key, key)): clone(own) for key, own in optimizer.state.items() if own != {}}
    groups = [{k: clone(x) for k, x in group.items() if k != "params"} for group in optimizer.param_groups]
    return dict(sorted(state.items())), groups, clone(values(optimizer))


@contextmanager
def untouched(optimizer: Any) -> Iterator[None]:
    """Whatever happens inside changes nothing."""
    before = snapshot(optimizer)
    yield
    assert difference(snapshot(optimizer), before) == 0


def hand_over(first: Any, second: Any) -> None:
    second.load_state_dict(saved(first.state_dict()))


# --------------------------------------------------------------------------------------------------------------- both ways


@each(routes=True, skip={name: name for name in SKIPS})
@pytest.mark.in_turn("skip")
def test_ten_steps_and_ten_after_loading_are_twenty(kind: Kind, source: Any, target: Any, skip: str) -> None:
    first = kind.make(source, kind.params())
    kind.train(first, range(10), SKIPS[skip])
    second = kind.other(target, parameters(first))
    hand_over(first, second)
    kind.train(second, range(10, 20), SKIPS[skip])
    assert difference(values(second), straight(kind, 20, skip)) <= TOLERANCE[torch.float64]


@each(kinds=MAIN, routes=True, dtype={"float32": torch.float32, "complex": torch.complex128})
@pytest.mark.in_turn("dtype")
def test_so_they_are_in_other_dtypes(kind: Kind, source: Any, target: Any, dtype: torch.dtype) -> None:
    first = kind.make(source, kind.params(dtype))
    kind.train(first, range(10))
    second = kind.other(target, parameters(first))
    hand_over(first, second)
    kind.train(second, range(10, 20))
    assert difference(values(second), straight(kind, 20, dtype=dtype)) <= TOLERANCE[dtype]


@each(kinds=MAIN, routes=True, skip={"some": "some"})
def test_so_they_are_with_many_small_parameters(kind: Kind, source: Any, target: Any, skip: str) -> None:
    """Whose state may lie in one piece of memory."""
    whole, first = (kind.make(side, tensors(*kind.subject.shapes * 5)) for side in (torch.optim, source))
    kind.train(whole, range(12), SKIPS[skip])
    kind.train(first, range(6), SKIPS[skip])
    second = kind.other(target, parameters(first))
    with untouched(first):
        hand_over(first, second)
        kind.train(second, range(6, 12), SKIPS[skip])
    kind.train(first, range(6, 12), SKIPS[skip])
    for optimizer in (first, second):
        assert difference(values(optimizer), values(whole)) <= TOLERANCE[torch.float64]


@each("flags", kinds=MAIN, routes=True, flags=FLAGS)
@pytest.mark.in_turn("flags")
def test_flags_come_with_the_checkpoint(kind: Kind, flags: Options, source: Any, target: Any) -> None:
    first = kind.make(source, kind.params(), **flags)
    kind.train(first, range(10))
    second = kind.other(target, parameters(first))
    hand_over(first, second)
    assert {name: second.param_groups[0][name] for name in flags} == flags
    kind.train(second, range(10, 20))
    assert difference(values(second), straight(kind)) <= TOLERANCE[torch.float64]


CAPTURABLE = [kind for kind in MAIN if "capturable" in inspect.signature(getattr(torch.optim, kind.cls)).parameters]


@each(kinds=CAPTURABLE)
def test_capturable_comes_with_the_checkpoint(kind: Kind) -> None:
    """torch refuses to step with it on a CPU, but not to load it."""
    first = kind.make(optim, kind.params(), capturable=True)
    kind.train(first, range(10))
    ours, theirs = (kind.other(namespace, parameters(first)) for namespace in (optim, torch.optim))
    for second in (ours, theirs):
        hand_over(first, second)
        assert second.param_groups[0]["capturable"] is True
    theirs.param_groups[0]["capturable"] = False
    for second in (ours, theirs):
        kind.train(second, range(10, 20))
        assert difference(values(second), straight(kind)) <= TOLERANCE[torch.float64]


def in_two_groups(kind: Kind, namespace: Any, params: list[Tensor], a: Options, b: Options) -> Any:
    """With default options for the class, so that each group's are its own."""
    half = len(params) // 2
    copies = like(params)
    return getattr(namespace, kind.cls)([{"params": copies[:half], **a}, {"params": copies[half:], **b}])


@each("groups", routes=True)
def test_groups_with_options_of_their_own(kind: Kind, source: Any, target: Any) -> None:
    """Every set of options beside the next one of its class; the loading optimizer has them the other way round."""
    a, b = kind.options, kind.next_options
    whole, first = (in_two_groups(kind, namespace, kind.params(), a, b) for namespace in (torch.optim, source))
    kind.train(whole, range(20))
    kind.train(first, range(10))
    second = in_two_groups(kind, target, parameters(first), b, a)
    hand_over(first, second)
    for group, options in zip(second.param_groups, (a, b)):
        assert {name: group[name] for name in options} == options
    kind.train(second, range(10, 20))
    assert difference(values(second), values(whole)) <= TOLERANCE[torch.float64]


# -------------------------------------------------------------------------------------------------------------- the layout


def kinds_of_state(state: Any) -> Any:
    """What is in it, without the numbers: a dtype and a shape. A Python number (torch's SparseAdam counts in int) is float64."""
    return tree_map(lambda x: (x.dtype, x.shape), tensors_of(state))


def tensors_of(state: Any) -> Any:
    """With tensors for the numbers in it, so that they are compared as tensors are."""
    return tree_map(lambda x: x if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64), state)


@each(dtype={"float64": torch.float64, "float32": torch.float32})
def test_the_layout_is_torchs(kind: Kind, dtype: torch.dtype) -> None:
    theirs, ours = (kind.make(namespace, kind.params(dtype)) for namespace in BOTH)
    for optimizer in (theirs, ours):
        kind.train(optimizer, range(6))
    a, b = theirs.state_dict(), ours.state_dict()
    assert b.keys() == a.keys()
    assert b["state"].keys() == a["state"].keys()
    for i, own in a["state"].items():
        assert b["state"][i].keys() - kind.subject.adds.keys() == own.keys()
        for name in own.keys() - kind.subject.scratch.keys():
            x, y = own[name], b["state"][i][name]
            assert kinds_of_state(y) == kinds_of_state(x), name
            assert difference(tensors_of(y), tensors_of(x)) <= TOLERANCE[dtype], name
    for g, h in zip(a["param_groups"], b["param_groups"], strict=True):
        assert h.keys() == g.keys()
        assert h == {name: x for name, x in g.items() if name in h}


# ----------------------------------------------------------------------------------------------------------- older layouts

MISSING = object()


@each(kinds=MAIN)
def test_the_table_of_what_torch_fills_in_is_right(kind: Kind) -> None:
    group = kind.make(torch.optim, kind.params()).param_groups[0]
    for name in group.keys() - {"params"}:
        optimizer = kind.make(torch.optim, kind.params())
        checkpoint = optimizer.state_dict()
        del checkpoint["param_groups"][0][name]
        optimizer.load_state_dict(checkpoint)
        assert optimizer.param_groups[0].get(name, MISSING) == kind.subject.fills.get(name, MISSING), name


OLDER = {
    f"{kind}-{name}": (kind, names)
    for kind in KINDS
    for name, names in [("all", tuple(kind.subject.fills)), *[(n, (n,)) for n in kind.subject.fills if kind in MAIN]]
    if names
}


@pytest.mark.parametrize(("kind", "names"), OLDER.values(), ids=OLDER)
def test_options_that_a_checkpoint_is_too_old_to_know(kind: Kind, names: tuple[str, ...]) -> None:
    """Whatever those of the loading optimizer were."""
    source = kind.make(torch.optim, kind.params())
    kind.train(source, range(10))
    checkpoint = saved(source.state_dict())
    for name in names:
        del checkpoint["param_groups"][0][name]
    on = {"foreach": True} if "foreach" in names else {}
    both = [kind.other(namespace, parameters(source), **on) for namespace in BOTH]
    for optimizer in both:
        optimizer.load_state_dict(copy.deepcopy(checkpoint))
        kind.train(optimizer, range(10, 15))
    theirs, ours = (optimizer.param_groups[0] for optimizer in both)
    assert {name: bool(ours[name]) for name in names} == {name: bool(theirs[name]) for name in names}
    assert difference(values(both[1]), values(both[0])) <= TOLERANCE[torch.float64]


def with_numbers(checkpoint: Any, names: tuple[str, ...], number: Any) -> Any:
    for own in checkpoint["state"].values():
        for name in names:
            own[name] = number(own[name].item())
    return checkpoint


NUMBERS = {
    f"{kind}-{name}": (kind, names, number)
    for kind in MAIN
    for name, names, number in [
        ("all", kind.subject.numbers, float),
        *[(n, (n,), float) for n in kind.subject.numbers],
        *[("step, int", ("step",), int) for n in kind.subject.numbers if n == "step"],
    ]
    if names
}


@pytest.mark.parametrize(("kind", "names", "number"), NUMBERS.values(), ids=NUMBERS)
def test_what_was_saved_as_a_number(kind: Kind, names: tuple[str, ...], number: Any) -> None:
    source = kind.make(torch.optim, kind.params())
    kind.train(source, range(10))
    checkpoint = with_numbers(saved(source.state_dict()), names, number)
    both = [kind.other(namespace, parameters(source)) for namespace in BOTH]
    for optimizer in both:
        optimizer.load_state_dict(copy.deepcopy(checkpoint))
        for p in parameters(optimizer):
            assert all(isinstance(optimizer.state[p][name], Tensor) for name in names)
        kind.train(optimizer, range(10, 15))
    assert difference(values(both[1]), values(both[0])) <= TOLERANCE[torch.float64]


# -------------------------------------------------------------------------------------------------------- half a checkpoint


@each("fresh", kinds=MAIN, routes=True)
def test_a_checkpoint_from_before_the_first_step(kind: Kind, source: Any, target: Any) -> None:
    """torch's is mostly empty: whatever state was there is gone, and training begins anew."""
    first = kind.make(source, kind.params())
    second = kind.other(target, parameters(first))
    hand_over(first, second)
    kind.train(second, range(20))
    assert difference(values(second), straight(kind)) <= TOLERANCE[torch.float64]


@each(kinds=MAIN, routes=True, thaw={"thawed while training": 5, "thawed after loading": 15})
def test_a_parameter_that_is_frozen_at_first(kind: Kind, source: Any, target: Any, thaw: int) -> None:
    def train(optimizer: Any, steps: range) -> None:
        for k in steps:
            parameters(optimizer)[1].requires_grad_(k >= thaw)
            kind.train(optimizer, range(k, k + 1))

    def params() -> list[Tensor]:
        found = kind.params()
        found[1].requires_grad_(False)
        return found

    whole, first = (kind.make(namespace, params()) for namespace in (torch.optim, source))
    train(whole, range(20))
    train(first, range(10))
    second = kind.other(target, parameters(first))
    hand_over(first, second)
    train(second, range(10, 20))
    assert difference(values(second), values(whole)) <= TOLERANCE[torch.float64]


# ------------------------------------------------------------------------------------------------------------------ dtypes


def widen(optimizer: Any) -> set[tuple[int, str]]:
    """Give half-precision state single precision; where it was done."""
    done = set()
    for i, p in enumerate(parameters(optimizer)):
        for name, x in optimizer.state[p].items():
            if isinstance(x, Tensor) and x.dtype == p.dtype:
                optimizer.state[p][name] = x.float() * (1 + 2**-12)  # which the parameters' dtype cannot hold
                done.add((i, name))
    return done


@each("state", "half", dtype={"bfloat16": torch.bfloat16, "float16": torch.float16})
@pytest.mark.in_turn("dtype")
def test_a_state_keeps_its_own_dtype(kind: Kind, dtype: torch.dtype) -> None:
    """torch casts it to the parameter's when it loads."""
    first = kind.make(optim, kind.params(dtype))
    kind.train(first, range(2))
    widened = widen(first)
    assert widened
    second = kind.other(optim, parameters(first))
    hand_over(first, second)
    assert difference(snapshot(second), snapshot(first)) == 0
    for optimizer in (first, second):
        kind.train(optimizer, range(2, 5))
        params = parameters(optimizer)
        assert {optimizer.state[params[i]][name].dtype for i, name in widened} == {torch.float32}
        assert {p.dtype for p in params} == {dtype}
    assert difference(snapshot(second), snapshot(first)) == 0


@each(kinds=MAIN, source=SIDES)
def test_a_model_that_is_cast_before_it_loads(kind: Kind, source: Any) -> None:
    first = kind.make(source, kind.params())
    kind.train(first, range(10))
    model = Bag(kind.params(torch.float32))
    second = make(optim, kind.cls, model.parameters(), **kind.subject.other)
    model.double()
    with torch.no_grad():
        for p, x in zip(model.parameters(), values(first)):
            p.copy_(x)
    hand_over(first, second)
    kind.train(second, range(10, 20))
    assert difference(values(second), straight(kind)) <= TOLERANCE[torch.float64]


@each(kinds=MAIN, routes=True)
def test_names_come_with_the_checkpoint(kind: Kind, source: Any, target: Any) -> None:
    def named(params: list[Tensor], name: str) -> list[tuple[str, Tensor]]:
        return [(f"{name} {i}", p) for i, p in enumerate(params)]

    first = kind.make(source, named(kind.params(), "saved"))
    kind.train(first, range(10))
    anonymous = kind.make(target, like(parameters(first)))
    second = make(target, kind.cls, named(like(parameters(first)), "own"), **kind.subject.other)
    hand_over(kind.make(source, kind.params()), second)
    assert second.param_groups[0]["param_names"] == [name for name, _ in named(kind.params(), "own")]
    for optimizer in (second, anonymous):
        hand_over(first, optimizer)
        assert optimizer.param_groups[0]["param_names"] == [name for name, _ in named(kind.params(), "saved")]
        kind.train(optimizer, range(10, 20))
        assert difference(values(optimizer), straight(kind)) <= TOLERANCE[torch.float64]


# ------------------------------------------------------------------------------------------------------ saving changes nothing


@each(skip={"all": "all", "some": "some"})
@pytest.mark.in_turn("skip")
def test_saving_at_every_step_changes_nothing(kind: Kind, skip: str) -> None:
    quiet, busy = (kind.make(optim, kind.params()) for _ in range(2))
    for k in range(8):
        with untouched(busy):
            before = clone(busy.state_dict())
            assert difference(busy.state_dict(), before) == 0
        for optimizer in (quiet, busy):
            kind.train(optimizer, range(k, k + 1), SKIPS[skip])
    assert difference(snapshot(busy), snapshot(quiet)) == 0


@each("state", kinds=MAIN)
def test_a_state_dict_is_alive_as_torchs_is(kind: Kind) -> None:
    """Training goes on in it, or all of it stays what it was; a file and a deep copy do."""
    for namespace, stays in ((torch.optim, False), (optim, bool(kind.subject.copies))):
        optimizer = kind.make(namespace, kind.params())
        kind.train(optimizer, range(4))
        state_dict = optimizer.state_dict()
        file, copied = saved(state_dict), copy.deepcopy(state_dict)
        at_first = clone(state_dict["state"])
        kind.train(optimizer, range(4, 8))
        assert difference(state_dict["state"], at_first if stays else optimizer.state_dict()["state"]) == 0
        assert difference(file["state"], at_first) == 0
        assert difference(copied["state"], at_first) == 0
        assert difference(values(optimizer), straight(kind, 8)) <= TOLERANCE[torch.float64]


@each(kinds=MAIN)
def test_what_a_state_dict_hook_returns_is_the_state_dict(kind: Kind) -> None:
    for namespace in BOTH:
        optimizer = trained(kind, namespace, kind.params())
        without = optimizer.state_dict()["state"].keys()
        optimizer.register_state_dict_post_hook(lambda optimizer, state_dict: [state_dict["state"].keys()])
        assert [set(keys) for keys in optimizer.state_dict()] == [set(without)]


@each(kinds=MAIN)
def test_what_else_is_in_the_state_is_saved(kind: Kind) -> None:
    """Of the user's own, for the optimizer, or for a parameter; and if what was there has been cleared."""
    for namespace in BOTH:
        optimizer = trained(kind, namespace, kind.params())
        last = parameters(optimizer)[-1]
        optimizer.state["note"] = 5
        optimizer.state["more"] = {"a": [1, 2]}
        optimizer.state[last]["own"] = torch.ones(2)
        checkpoint = saved(optimizer.state_dict())
        assert checkpoint["state"]["note"] == 5
        optimizer.load_state_dict(checkpoint)
        kind.train(optimizer, range(3, 5))
        assert optimizer.state["note"] == 5
        assert optimizer.state["more"] == {"a": [1, 2]}
        assert optimizer.state[last]["own"].tolist() == [1, 1]
        optimizer.state[last].clear()
        assert not saved(optimizer.state_dict())["state"].get(len(parameters(optimizer)) - 1)


# --------------------------------------------------------------------------------------- torch.distributed.checkpoint's way


class Bag(nn.Module):
    """A module of these parameters."""

    def __init__(self, params: list[Tensor]) -> None:
        super().__init__()
        for i, p in enumerate(params):
            self.register_parameter(f"p{i}", nn.Parameter(p.detach()))


@each("state", kinds=MAIN, frozen={"": False, "one frozen": True})
def test_a_fresh_optimizer_has_a_state_and_takes_no_step_for_it(kind: Kind, frozen: bool) -> None:
    model = Bag(kind.params())
    model.p1.requires_grad_(not frozen)
    optimizer = kind.make(optim, model.parameters())
    steps: list[int] = []
    optimizer.register_step_pre_hook(lambda *_: steps.append(1))
    for grads in ([None] * len(parameters(optimizer)), clone(values(optimizer))):
        for p, g in zip(model.parameters(), grads):
            p.grad = g
        with untouched(optimizer):
            found = get_optimizer_state_dict(model, optimizer)["state"]
        assert [p.grad for p in model.parameters()] == grads
        state = {name: optimizer.state[p] for name, p in model.named_parameters() if optimizer.state.get(p)}
        assert bool(state) is not bool(kind.subject.begins)
        assert difference(dict(found), state) == 0
    assert not steps


WITHOUT_STATE = [kind for kind in KINDS if "without" in kind.lacks.get(f"{kind.name}: state", "")]


@each("distributed", kinds=[*MAIN, *WITHOUT_STATE], routes=True, flat={"nested": False, "flat": True})
def test_it_goes_through_torchs_distributed_checkpoints(kind: Kind, source: Any, target: Any, flat: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    models = [Bag(kind.params()) for _ in range(2)]
    first, second = (kind.make(side, model.named_parameters()) for side, model in zip((source, target), models))
    kind.train(first, range(10))
    models[1].load_state_dict(models[0].state_dict())
    with untouched(first):
        found = saved(get_optimizer_state_dict(models[0], first, options=options))
    set_optimizer_state_dict(models[1], second, found, options=options)
    assert difference(values(second), values(first)) == 0
    kind.train(second, range(10, 20))
    assert difference(values(second), straight(kind)) <= TOLERANCE[torch.float64]


# -------------------------------------------------------------------------------------------------------- hooks and copies


@each(kinds=MAIN, routes=True)
def test_load_hooks(kind: Kind, source: Any, target: Any) -> None:
    first = kind.make(source, kind.params())
    kind.train(first, range(10))
    second = kind.other(target, parameters(first))
    seen: list[Any] = []

    def unpack(optimizer: Any, state_dict: Any) -> Any:
        seen.append((optimizer is second, sorted(state_dict)))
        return state_dict["optimizer"]

    second.register_load_state_dict_pre_hook(unpack)
    second.register_load_state_dict_post_hook(
        lambda optimizer: seen.append((optimizer is second, optimizer.param_groups[0]["lr"]))
    )
    second.load_state_dict(saved({"optimizer": first.state_dict(), "epoch": 3}))
    assert seen == [(True, ["epoch", "optimizer"]), (True, first.param_groups[0]["lr"])]
    kind.train(second, range(10, 20))
    assert difference(values(second), straight(kind)) <= TOLERANCE[torch.float64]


@each("half", kinds=MAIN)
def test_a_load_hook_has_the_last_word(kind: Kind) -> None:
    """It sees the state that will be trained with, and what it does to it stays."""
    first = kind.make(optim, kind.params(torch.bfloat16))
    kind.train(first, range(2))
    widen(first)
    second = kind.other(optim, parameters(first))
    seen = []

    def reset(optimizer: Any) -> None:
        seen.append(snapshot(optimizer))
        for own in optimizer.state.values():
            own.clear()

    second.register_load_state_dict_post_hook(reset)
    hand_over(first, second)
    assert difference(seen, [snapshot(first)]) == 0
    assert not any(second.state.values())


def loaded(optimizer: Any, state_dict: Any) -> Any:
    optimizer.load_state_dict(state_dict)
    return optimizer


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "copy of a loaded one": lambda x: copy.deepcopy(loaded(x, saved(x.state_dict()))),
    "loaded into a copy": lambda x: loaded(copy.deepcopy(x), saved(x.state_dict())),
}


@each(kinds=MAIN, twin=COPIES, skip={"all": "all", "one late": "one late"})
@pytest.mark.in_turn("skip")
def test_copies_go_on_as_the_original(kind: Kind, twin: Any, skip: str) -> None:
    first = kind.make(optim, kind.params())
    kind.train(first, range(10), SKIPS[skip])
    before = snapshot(first)
    second = twin(first)
    assert type(second) is type(first)
    assert difference(snapshot(second), before) == 0
    for optimizer in (first, second):
        kind.train(optimizer, range(10, 20), SKIPS[skip])
        assert difference(values(optimizer), straight(kind, 20, skip)) <= TOLERANCE[torch.float64]
        hand_over(optimizer, kind.make(torch.optim, kind.params()))


# -------------------------------------------------------------------------------------------------------- wrong checkpoints


def refuses(optimizer: Any, checkpoint: Any, match: str | None = None) -> None:
    """It raises, and nothing is different afterwards."""
    with untouched(optimizer), pytest.raises((KeyError, ValueError), match=match):
        optimizer.load_state_dict(checkpoint)


def trained(kind: Kind, namespace: Any, params: Any, steps: int = 3) -> Any:
    optimizer = kind.make(namespace, params)
    kind.train(optimizer, range(steps))
    return optimizer


OTHER_GROUPS: dict[str, tuple[Callable[[Options], list[Options]], str]] = {
    "one more group": (lambda g: [g, {**g, "params": []}], "different number of parameter groups"),
    "split": (lambda g: [{**g, "params": [i]} for i in g["params"]], "different number of parameter groups"),
    "fewer": (lambda g: [{**g, "params": g["params"][:-1]}], "match the size of optimizer's group"),
    "more": (lambda g: [{**g, "params": [*g["params"], 99]}], "match the size of optimizer's group"),
}


@each(kinds=MAIN, other=OTHER_GROUPS)
def test_a_checkpoint_with_other_groups_is_refused(kind: Kind, other: Any) -> None:
    """With torch's error."""
    change, match = other
    for source in BOTH:
        checkpoint = saved(trained(kind, source, kind.params()).state_dict())
        checkpoint["param_groups"] = change(checkpoint["param_groups"][0])
        with pytest.raises(ValueError, match=match):
            trained(kind, torch.optim, kind.params()).load_state_dict(checkpoint)
        refuses(trained(kind, optim, kind.params()), checkpoint, match)


OTHER_SHAPES: dict[str, Callable[[tuple[int, ...]], tuple[int, ...]]] = {
    "longer": lambda shape: (shape[0] + 2, *shape[1:]),
    "shorter": lambda shape: (shape[0] - 1, *shape[1:]),
    "of one row": lambda shape: (1, *shape[1:]),
    "transposed": lambda shape: shape[::-1],
    "flat shape": lambda shape: (math.prod(shape),),
}


@each("state", kinds=MAIN, change=OTHER_SHAPES)
def test_a_checkpoint_with_other_shapes_is_refused(kind: Kind, change: Any) -> None:
    """torch loads it, and a later step fails, or does not."""
    shape, *shapes = kind.subject.shapes
    for source in BOTH:
        checkpoint = saved(trained(kind, source, tensors(change(shape), *shapes)).state_dict())
        refuses(trained(kind, optim, kind.params()), checkpoint, "shape")


MATRICES = ((5, 2), (3, 3))
"""Parameters that every class takes."""


def load_and_go_on(kind: Kind, optimizer: Any, checkpoint: Any) -> None:
    optimizer.load_state_dict(checkpoint)
    kind.train(optimizer, range(3, 4))


@functools.cache
def checkpoint_of(kind: Kind, namespace: Any) -> Any:
    return saved(trained(kind, namespace, tensors(*MATRICES)).state_dict())


@each("reads", kinds=MAIN, namespace=SIDES)
def test_a_checkpoint_that_cannot_be_told_from_its_own_is_read_as_torch_reads_it(kind: Kind, namespace: Any) -> None:
    for source in [source for source in KINDS if source.cls in kind.subject.reads]:
        both = [trained(kind, side, tensors(*MATRICES)) for side in BOTH]
        for optimizer in both:
            optimizer.load_state_dict(copy.deepcopy(checkpoint_of(source, namespace)))
            kind.train(optimizer, range(3, 8))
        theirs, ours = ({k: x for k, x in optimizer.param_groups[0].items() if k != "params"} for optimizer in both)
        assert ours == theirs, source
        assert difference(values(both[1]), values(both[0])) <= TOLERANCE[torch.float64], source


@each(kinds=MAIN)
def test_a_checkpoint_of_another_algorithm_is_refused(kind: Kind) -> None:
    """torch's fails, at the next step if not at once."""
    theirs, ours = (trained(kind, namespace, tensors(*MATRICES)) for namespace in BOTH)
    for source in [source for source in KINDS if source.cls not in (kind.cls, *kind.subject.reads)]:
        checkpoint = checkpoint_of(source, torch.optim)
        with pytest.raises((KeyError, ValueError, TypeError, AttributeError)):  # 2.14's copy of an LBFGS lacks its parameters
            load_and_go_on(kind, copy.deepcopy(theirs), copy.deepcopy(checkpoint))
        refuses(ours, copy.deepcopy(checkpoint))


# --------------------------------------------------------------------------------------------------------------- the table


def test_every_class_of_torch_has_its_data() -> None:
    classes = {
        name
        for name, x in vars(torch.optim).items()
        if isinstance(x, type) and issubclass(x, torch.optim.Optimizer) and x is not torch.optim.Optimizer
    }
    assert SUBJECTS.keys() == classes
    assert set(CLASSES) <= classes
