"""Wrong calls, one for each message that purestep raises: see `tests/messages.py`. Here are those of transforms and schedules."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import numpy
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

import purestep as ps
from purestep import schedules

PARAMS = {"layer.weight": torch.ones(2, 3), "layer.bias": torch.ones(3)}
VECTOR = torch.ones(2)
NET = nn.Linear(3, 2)


def step(transform: Any, grads: Any = PARAMS, params: Any = PARAMS, **extras: Any) -> Any:
    """One step from the first state."""
    return transform.step(grads, transform.init_state(params), params, **extras)


def step_from(state: Any, transform: Any, params: Any = PARAMS) -> Any:
    """One step from another state."""
    return transform.step(params, state, params)


def begin(transform: Any, params: Any = PARAMS) -> Any:
    return transform.init_state(params)


def without(name: str, call: Callable[[], Any]) -> Any:
    """A call where a package is not installed."""
    with mock.patch.dict(sys.modules, dict.fromkeys([k for k in sys.modules if k.split(".")[0] == name] + [name])):
        return call()


# ----------------------------------------------------------------------------------------------------- what a user declares


class Mean(NamedTuple):
    """A state that counts nothing."""

    exp_avg: Tensor

    @classmethod
    def init(cls, p: Tensor) -> Mean:
        return cls(torch.zeros_like(p))


class Around(NamedTuple):
    """The state of a nested transform."""

    inner: Any

    @classmethod
    def init(cls, params: list[Tensor], inner: Any) -> Around:
        return cls(inner)


class Asking(NamedTuple):
    """A state whose first value is an argument."""

    first: Tensor

    @classmethod
    def init(cls, p: Tensor, start: Any) -> Asking:
        return cls(torch.full_like(p, start))


class AskingAround(NamedTuple):
    """The state of a nested transform, whose first value is an argument."""

    first: Tensor
    inner: Any

    @classmethod
    def init(cls, params: list[Tensor], inner: Any, start: Any) -> AskingAround:
        return cls(torch.tensor(start), inner)


@ps.leafwise(Mean)
def averaged(g: Tensor, s: Mean, p: Tensor, k: ps.Hyper = 1.0) -> tuple[Tensor, Mean]:
    return g * k, Mean(s.exp_avg + g)


@ps.leafwise()
def learned(g: Tensor, p: Tensor, weights: ps.Weights) -> Tensor:
    return g * weights["k"]


@ps.whole()
def polyak(gs: list[Tensor], s: Any, params: list[Tensor], *, value: ps.Extra) -> Any:
    return [-value * g for g in gs], s


@ps.whole()
def newton(gs: list[Tensor], s: Any, params: list[Tensor], *, hessian: ps.ExtraTree) -> Any:
    return [-g / h for g, h in zip(gs, hessian)], s


@ps.whole()
def second_order(gs: list[Tensor], s: Any, params: list[Tensor], *, hessian: ps.Extra) -> Any:
    return [-g / hessian for g in gs], s


@ps.whole()
def evaluating(gs: list[Tensor], s: Any, params: list[Tensor], *, value_and_grad: ps.Extra) -> Any:
    return value_and_grad(params)[1], s


@ps.nested(Around)
def forgetful(gs: list[Tensor], s: Around, params: list[Tensor], transform: ps.Inner) -> Any:
    return gs, Around(None)


def leaf(function: Any) -> Any:
    """A step of a leaf function without a state."""
    t = ps.leafwise()(function)()
    return t.update(VECTOR, ps.EmptyState(), VECTOR)


def of_the_wrong_type() -> Any:
    @ps.leafwise(Mean)
    def wrong(g: Tensor, s: Mean, p: Tensor) -> Any:
        return g, (s.exp_avg,)

    return step(wrong())


def asks_for_what_is_no_argument() -> Any:
    @ps.leafwise(Asking)
    def wrong(g: Tensor, s: Asking, p: Tensor, begin: ps.Hyper = 3.0) -> Any: ...


def asks_for_what_has_no_arguments() -> Any:
    @ps.nested(AskingAround)
    def wrong(gs: Any, s: Any, params: Any, transform: ps.Inner) -> Any: ...


def sparse_with_a_tree() -> Any:
    @ps.whole(sparse="rows")
    def wrong(gs: Any, s: Any, params: Any, *, hessian: ps.ExtraTree) -> Any: ...


def leafwise_with_an_extra_argument() -> Any:
    @ps.leafwise()
    def wrong(g: Any, p: Any, *, value: ps.Extra) -> Any: ...


def nested_without_a_transform() -> Any:
    @ps.nested(Around)
    def wrong(gs: Any, s: Any, params: Any) -> Any: ...


def calls_by_a_strange_name(g: Any, p: Tensor) -> Tensor:
    return g.add(p, **{"al pha": 2})  # type: ignore[call-overload]


W = torch.tensor(1.0)


def stacked(ndim: int) -> Any:
    """A state that was made for stacked parameters, and is mapped over. Those of so many dimensions have one."""
    t = ps.masked(ps.trace(0.9), lambda path, p: p.ndim == ndim)
    params = {"matrix": torch.ones(4, 3, 2)}
    state = t.init_state(params)
    dims = torch.utils._pytree.tree_map(lambda x: 0 if isinstance(x, Tensor) and x.dim() else None, state)
    return torch.func.vmap(lambda s, p: t.step(p, s, p)[0], in_dims=(dims, 0))(state, params)


def at_a_batch() -> Any:
    """A schedule that reads its step, where each member of a batch has one."""
    t = ps.adam(lambda t: 0.1 if t > 0 else 0.2)
    members = torch.ones(3, 2)
    states = torch.func.vmap(t.init_state)(members)
    state = tuple([s._replace(step=torch.arange(3.0)) if "step" in s._fields else s for s in states])
    return torch.func.vmap(t.step)(members, state, members)


def flat(transform: Any) -> Any:
    """A step of a parameter as FSDP1 makes it of many."""
    p = torch.ones(4)
    p._is_flat_param = True  # type: ignore[attr-defined]
    return transform.init_state({"_flat_param": p})


def sparse(layout: Any = torch.sparse_coo) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch's other layouts are in beta
        return torch.ones(2, 3).to_sparse(layout=layout)


def evaluated(value_and_grad: Callable[[Any], Any]) -> Any:
    return step(evaluating(), value_and_grad=value_and_grad)


def scheduler(make: Callable[[Any], Any], **options: Any) -> Any:
    return make(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1, momentum=0.9, **options))


def chained(optimizer: Any) -> Any:
    return lr_scheduler.ChainedScheduler([lr_scheduler.CosineAnnealingLR(optimizer, 10)])


def nested_chain(optimizer: Any) -> Any:
    inner = lr_scheduler.SequentialLR(
        optimizer, [lr_scheduler.ConstantLR(optimizer), lr_scheduler.ConstantLR(optimizer)], milestones=[1]
    )
    return lr_scheduler.SequentialLR(optimizer, [lr_scheduler.ConstantLR(optimizer), inner], milestones=[1])


class OwnScheduler(lr_scheduler.LRScheduler):
    """A scheduler of a user's."""

    def get_lr(self) -> Any:
        return [0.1]


SCALE = ps.scale(2.0)
ADAM_STATE = begin(ps.adam())
OTHER = {"layer.weight": torch.ones(3, 2), "layer.bias": torch.ones(3)}

CASES: dict[str, Callable[[], Any]] = {
    # _core/hyper.py
    "boundaries that are no tuple": lambda: schedules.piecewise_constant((1.0, 0.5), 3),  # type: ignore[arg-type]
    "boundaries that fall": lambda: schedules.piecewise_constant((1.0, 0.5, 0.1), (6, 3)),
    "half a step": lambda: schedules.cosine(1.0, total_steps=2.5),  # type: ignore[arg-type]
    "fewer than no steps": lambda: schedules.cosine(1.0, total_steps=-1),
    "weights without a tensor": lambda: learned({}),
    "weights with a number": lambda: learned({"k": 1.0}),
    "one beta": lambda: ps.adam(betas=0.9),
    "values that are no tuple": lambda: schedules.piecewise_constant(1.0, ()),  # type: ignore[arg-type]
    "a learning rate of bools": lambda: ps.sgd(torch.tensor(True)),
    "a negative learning rate": lambda: ps.sgd(-1.0),
    "a beta of one": lambda: ps.adam(betas=(1.0, 0.9)),
    "an eps of zero": lambda: ps.prodigy(eps=0.0),
    "a fraction above one": lambda: schedules.one_cycle(1.0, total_steps=9, pct_start=1.5),
    "not a number": lambda: ps.scale(float("nan")),
    "a learning rate in words": lambda: ps.sgd("fast"),  # type: ignore[arg-type]
    # _core/masks.py
    "a label like another": lambda: begin(ps.partition({"hiden": ps.sgd(), "rest": ps.sgd()}, lambda path, p: "hidden")),
    "a label like no other": lambda: begin(ps.partition({"a": ps.sgd(), "b": ps.sgd()}, lambda path, p: None)),
    "a mask that answers in words": lambda: begin(ps.masked(ps.trace(0.9), lambda path, p: "yes")),
    "a label that no parameter has": lambda: begin(ps.partition({"a": ps.sgd(), "b": ps.sgd()}, lambda path, p: "a")),
    "a pattern in no path": lambda: begin(ps.masked(ps.trace(0.9), ps.by_path({"embed": True}, default=False))),
    "a pattern for a bare tensor": lambda: begin(ps.masked(ps.trace(0.9), ps.by_path({"w": True}, default=False)), VECTOR),
    "rules for names that are not there": lambda: ps.optim.Optimizer(
        NET.parameters(), ps.masked(ps.sgd(), ps.by_path({"weight": True}, default=False))
    ),
    "a rule without a default": lambda: begin(ps.masked(ps.trace(0.9), ps.by_ndim({2: True}))),
    "the rule of another model": lambda: begin(ps.masked(ps.trace(0.9), ps.by_module(NET, {}, default=True))),
    "a pattern that is none": lambda: ps.by_path({"(": True}),
    # _core/maths.py
    "select of other structures": lambda: ps.select(torch.tensor(True), [VECTOR], [VECTOR, VECTOR]),
    "select of other types": lambda: ps.select(torch.tensor(True), [VECTOR], VECTOR),
    "select of other keys": lambda: ps.select(torch.tensor(True), {"a": VECTOR}, {"b": VECTOR}),
    "select of numbers": lambda: ps.select(torch.tensor(True), 1, 2),
    # _core/populations.py
    "out_dims of a transform alone": lambda: ps.out_dims(ps.adam()),
    "out_dims of a state with members": lambda: ps.out_dims(PARAMS, PARAMS),
    "a stack of nothing": lambda: ps.stack([]),
    "a stack of different algorithms": lambda: ps.stack([ps.sgd(), ps.adam()]),
    "a stack with words": lambda: ps.stack([{"a": 1.0}, {"a": "b"}]),
    "a stack of other shapes": lambda: ps.stack([{"a": torch.ones(2)}, {"a": torch.ones(3)}]),
    "a population of other sizes": lambda: ps.unstack({"a": torch.ones(2), "b": torch.ones(3)}),
    "a population without members": lambda: ps.unstack(ps.sgd(0.1)),
    "ravel of two dtypes": lambda: ps.ravel([torch.ones(1), torch.ones(1, dtype=torch.float64)]),
    "ravel of nothing": lambda: ps.ravel([None]),
    "unravel of another size": lambda: ps.ravel(VECTOR)[1](torch.ones(3)),
    # _core/primitives.py
    "sparse rows and a tree": sparse_with_a_tree,
    "an init that asks for another argument": asks_for_what_is_no_argument,
    "an init that asks where there are no arguments": asks_for_what_has_no_arguments,
    "a schedule without a counter": lambda: averaged(lambda step: 1.0),
    "a batch without vmap": lambda: step(ps.sgd(lr=torch.tensor([0.1, 0.2]))),
    # _core/recorder.py
    "an array in a leaf function": lambda: leaf(lambda g, p: g * numpy.ones(2)),
    "a leaf function that writes to what it closes over": lambda: leaf(lambda g, p: g * W.add_(1.0)),
    # _core/tree.py
    "a gradient too few": lambda: step(ps.sgd(), {"layer.weight": torch.ones(2, 3)}),
    "a gradient too many": lambda: step(ps.sgd(), {**PARAMS, "other": VECTOR}),
    "gradients in another container": lambda: step(ps.sgd(), (VECTOR,), [VECTOR]),
    "gradients with another container inside": lambda: step(ps.sgd(), {"a": (VECTOR,)}, {"a": [VECTOR]}),
    # _core/values.py
    "an argument that is not there": lambda: ps.trace(0.9, nestrov=True),  # type: ignore[call-arg]
    "an attribute of a transform": lambda: setattr(SCALE, "factor", 1.0),
    "an attribute that is deleted": lambda: delattr(SCALE, "factor"),
    "another argument of a schedule": lambda: schedules.constant(0.1).replace(peak=1.0),
    "a schedule that reads a batch": at_a_batch,
    # _engine/boundary.py
    "the state of another transform": lambda: step_from(begin(ps.trace(0.9)), ps.scale_by_adam()),
    "an extra tree with a hole": lambda: step(newton(), hessian={**PARAMS, "layer.bias": None}),
    "value_and_grad the other way around": lambda: evaluated(lambda p: (p, torch.tensor(1.0))),
    "value_and_grad that returns a number": lambda: evaluated(lambda p: 1.0),
    "value_and_grad without a gradient": lambda: evaluated(lambda p: (torch.tensor(1.0), dict.fromkeys(p))),
    "value_and_grad of another structure": lambda: evaluated(lambda p: (torch.tensor(1.0), list(p.values()))),
    # _engine/checks.py
    "an unknown executor": lambda: step(ps.sgd(), executor="Foreach"),
    "two ways to run": lambda: step(ps.sgd(), compile=True, executor="leaf"),
    "a parameter that is no tensor": lambda: begin(ps.sgd(), {"w": 1.0}),
    "a parameter of integers": lambda: begin(ps.sgd(), {"w": torch.ones(2, dtype=torch.long)}),
    "a gradient where there is no parameter": lambda: step(ps.sgd(), PARAMS, {**PARAMS, "layer.bias": None}),
    "a gradient that is no tensor": lambda: step(ps.sgd(), {**PARAMS, "layer.bias": 1.0}),
    "a gradient of another shape": lambda: step(ps.sgd(), OTHER),
    "a gradient of another dtype": lambda: step(ps.sgd(), {k: p.double() for k, p in PARAMS.items()}),
    "a gradient on another device": lambda: step(ps.sgd(), {k: p.to("meta") for k, p in PARAMS.items()}),
    "a state for other shapes": lambda: step_from(begin(ps.trace(0.9), OTHER), ps.trace(0.9)),
    "a state of stacked parameters": lambda: stacked(3),
    "no state of stacked parameters": lambda: stacked(2),
    "all parameters, of which FSDP1 has made one": lambda: flat(ps.clip_by_global_norm(1.0)),
    "whole parameters, of which FSDP1 has made one": lambda: flat(ps.lamb()),
    "no value": lambda: step(polyak()),
    "no hessian, but another": lambda: step(newton(), hesian=PARAMS),
    "a tree and a number of one name": lambda: step(ps.chain(newton(), second_order()), hessian=PARAMS),
    "value_and_grad that is no function": lambda: step(evaluating(), value_and_grad=3),
    "an extra argument that nobody asks for": lambda: step(ps.sgd(), value=1.0),
    "an extra argument beside another": lambda: step(polyak(), value=1.0, val=1.0),
    "a loss with dimensions": lambda: step(polyak(), value=VECTOR),
    "a loss that is no number": lambda: step(polyak(), value="low"),
    # _engine/nesting.py
    "an inner state that is lost": lambda: step(forgetful(ps.sgd())),
    # _engine/run.py
    "a kernel that is not there": lambda: step(ps.scale(2.0), executor="fused"),
    "a kernel for complex numbers": lambda: step(
        ps.adamw(), torch.ones(2, dtype=torch.complex64), torch.ones(2, dtype=torch.complex64), executor="fused"
    ),
    "a kernel for no chain": lambda: step(ps.chain(), executor="fused"),
    # _engine/sparse.py
    "a sparse gradient": lambda: step(ps.adamw(), sparse(), torch.ones(2, 3)),
    "a gradient of another layout": lambda: step(ps.sgd(), sparse(torch.sparse_csr), torch.ones(2, 3)),
    # _trace/trace.py
    "a leaf function that asks for a value": lambda: leaf(lambda g, p: g * float(W)),
    "a leaf function that asks for the value of a gradient": lambda: leaf(lambda g, p: g if g.sum() > 0 else p),
    "a leaf function that returns another state": of_the_wrong_type,
    "a leaf function that writes": lambda: leaf(lambda g, p: g.mul_(2)),
    "a leaf function that writes by an argument": lambda: leaf(lambda g, p: nn.functional.relu(g, inplace=True)),
    "a leaf function with a strange name": lambda: leaf(calls_by_a_strange_name),
    # algorithms
    "lbfgs from the state of fewer parameters": lambda: ps.lbfgs().step(
        PARAMS, begin(ps.lbfgs(), {"layer.bias": torch.ones(3)}), PARAMS, value_and_grad=lambda p: (torch.tensor(1.0), p)
    ),
    "another line search": lambda: step(
        ps.lbfgs(line_search_fn="armijo"),
        value_and_grad=lambda p: (torch.tensor(1.0), p),  # type: ignore[arg-type]
    ),
    "muon for complex parameters": lambda: begin(ps.muon(), {"w": torch.ones(2, 2, dtype=torch.complex64)}),
    "muon for a vector": lambda: begin(ps.muon()),
    "muon for a stack": lambda: begin(ps.muon(), {"w": torch.ones(2, 2, 2)}),
    "another adjustment of muon's": lambda: ps.muon(adjust_lr_fn="spectral"),  # type: ignore[arg-type]
    "too many steps of muon's": lambda: ps.muon(ns_steps=100),
    "nesterov without momentum": lambda: ps.sgd(nesterov=True),
    "sparse parameters": lambda: begin(ps.sparse_adam(), {"w": sparse()}),
    "sparse_adam for complex parameters": lambda: begin(ps.sparse_adam(), {"w": torch.ones(2, dtype=torch.complex64)}),
    # compose.py
    "an attribute of a chain": lambda: setattr(ps.adam(), "lr", 1.0),
    "as_matrices of a number": lambda: ps.as_matrices(3),  # type: ignore[arg-type]
    "as_matrices of a factory": lambda: ps.as_matrices(ps.muon),  # type: ignore[arg-type]
    "a state with too few parts": lambda: step_from(begin(ps.adam())[:1], ps.adam()),
    "a state of one transform for a chain": lambda: step_from(begin(ps.trace(0.9)), ps.adam()),
    "a chain of a number": lambda: ps.chain(0.1),  # type: ignore[arg-type]
    "a chain of a schedule": lambda: ps.chain(schedules.constant(0.1)),  # type: ignore[arg-type]
    "a chain of a factory": lambda: ps.chain(ps.scale),  # type: ignore[arg-type]
    "the state of another named chain": lambda: step_from({"x": ()}, ps.named_chain(("a", ps.scale(1.0)))),
    "a tuple for a named chain": lambda: step_from((), ps.named_chain(("a", ps.scale(1.0)))),
    "a named chain without names": lambda: ps.named_chain(ps.scale(1.0)),  # type: ignore[arg-type]
    "a name twice": lambda: ps.named_chain(("a", ps.scale(1.0)), ("a", ps.scale(1.0))),
    # declare.py
    "leafwise without brackets": lambda: ps.leafwise(leaf),
    "a leafwise transform with an extra argument": leafwise_with_an_extra_argument,
    "whole with a number": lambda: ps.whole(3),  # type: ignore[call-overload]
    "nested with a state without inner": lambda: ps.nested(ps.TraceState),  # type: ignore[arg-type]
    "nested without a transform": nested_without_a_transform,
    "a number inside": lambda: ps.accumulate(3, 2),  # type: ignore[arg-type]
    "a factory inside": lambda: ps.accumulate(ps.scale, 2),  # type: ignore[arg-type]
    # saving.py
    "a flat state of an optimizer": lambda: ps.state_dict({"a": 1.0}),
    "two parameters of one path": lambda: ps.state_dict(begin(ps.trace(0.9), {"a": {"b": VECTOR}, "a.b": VECTOR})),
    "a flat state of another transform": lambda: ps.load_state_dict(
        begin(ps.trace(0.9)), ps.state_dict(begin(ps.scale_by_adam()))
    ),
    "a flat state that is wrong in all ways": lambda: ps.load_state_dict(
        begin(ps.scale_by_adam(), {k: torch.ones(2) for k in "abcd"}),
        {
            "step.a": torch.tensor(-1.0),
            **{f"step.{k}": torch.tensor(1.0) for k in "bcd"},
            "exp_avg.a": 1.0,
            "exp_avg.b": torch.ones(3),
            "exp_avg.c": VECTOR.double(),
            "exp_avg.d": VECTOR.to_sparse(),
            "exp_avg.e": VECTOR,
            **{f"other.{k}": VECTOR for k in range(30)},
        },
    ),
    # schedules
    "a shape that is not known": lambda: schedules.cyclic(0.1, 1.0, step_size_up=1, mode="square"),  # type: ignore[arg-type]
    "a warm-up that is too long": lambda: schedules.warmup_cosine(1.0, warmup_steps=3, total_steps=2),
    "a period of no steps": lambda: schedules.cosine(1.0, total_steps=0, periodic=True),
    "values that do not fit boundaries": lambda: schedules.piecewise_constant((1.0, 0.5), (3, 6)),
    "too few labels": lambda: schedules.plot(schedules.constant(1.0), steps=2, labels=["a", "b"]),
    "schedules drawn without matplotlib": lambda: without(
        "matplotlib", lambda: schedules.plot(schedules.constant(1.0), steps=2)
    ),
    "a scheduler that is a number": lambda: schedules.from_torch(3),  # type: ignore[arg-type]
    "a chain of a scheduler that sets": lambda: schedules.from_torch(scheduler(chained)),
    "a sequence in a sequence": lambda: schedules.from_torch(scheduler(nested_chain)),
    "a scheduler that follows a loss": lambda: schedules.from_torch(scheduler(lr_scheduler.ReduceLROnPlateau)),
    "a scheduler that must be run": lambda: schedules.from_torch(
        scheduler(lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9))
    ),
    "a scheduler of one's own": lambda: schedules.from_torch(scheduler(OwnScheduler)),
    "momentum that is not cycled": lambda: schedules.from_torch(
        scheduler(lambda o: lr_scheduler.StepLR(o, 3)), hyperparameter="momentum"
    ),
    "a cycle of one's own": lambda: schedules.from_torch(
        scheduler(lambda o: lr_scheduler.CyclicLR(o, 0.1, 1.0, scale_fn=lambda x: 1.0))
    ),
    # state.py
    "two states of one kind": lambda: ps.find(begin(ps.chain(ps.trace(0.9), ps.trace(0.9))), ps.TraceState),
    "no state of a kind": lambda: ps.find(begin(ps.adam()), ps.TraceState),
    "no state at all": lambda: ps.find(begin(ps.scale(1.0)), ps.TraceState),
    "a state that counts nothing": lambda: ps.step_count(begin(ps.clip(1.0))),
    "a state of nothing": lambda: ps.step_count(()),
    "the hyperparameters of another transform": lambda: ps.get_hyperparams(ps.trace(0.9), begin(ps.scale_by_adam())),
    "states of two transforms": lambda: ps.map_params(
        lambda x, y: x,
        begin(ps.chain(ps.trace(0.9), ps.scale_by_adam())),
        begin(ps.chain(ps.scale_by_adam(), ps.trace(0.9))),
    ),
    "what is no state": lambda: ps.find(PARAMS["layer.bias"], ps.TraceState),
    "what is no type of states": lambda: ps.find(begin(ps.adam()), Tensor),
    # transform.py
    "an update by a fused kernel": lambda: ps.sgd().update(PARAMS, begin(ps.sgd()), PARAMS, executor="fused"),
    "a name that two transforms have": lambda: ps.chain(ps.scale(1.0), ps.scale(1.0)).replace(factor=2.0),
    "a name that no transform has": lambda: ps.adamw().replace(learning_rate=0.1),
    "a name where there is none": lambda: ps.sign().replace(learning_rate=0.1),
    "averages of a bare tensor": lambda: ps.eval_params(VECTOR, VECTOR),
    # transforms
    "a mask without a transform": lambda: ps.masked(0.1, {}),  # type: ignore[arg-type]
    "the state of another partition": lambda: step_from({"x": ()}, ps.partition({"a": ps.scale(1.0)}, lambda path, p: "a")),
    "a tuple for a partition": lambda: step_from((), ps.partition({"a": ps.scale(1.0)}, lambda path, p: "a")),
    "a partition of nothing": lambda: ps.partition({}, lambda path, p: "a"),
    "a label that is a number": lambda: ps.partition({1: ps.sgd()}, lambda path, p: 1),  # type: ignore[dict-item]
    "a partition of a number": lambda: ps.partition({"a": 0.1}, lambda path, p: "a"),  # type: ignore[dict-item]
    "a vector as matrices": lambda: begin(ps.as_matrices(ps.muon())),
    "matrices that cannot be split": lambda: begin(ps.as_matrices(ps.muon(), split=3), {"w": torch.ones(10, 2)}),
    "columns that cannot be split": lambda: begin(ps.as_matrices(ps.muon(), split=2, dim=1), {"w": torch.ones(10, 7)}),
    "matrices in no parts": lambda: ps.as_matrices(ps.muon(), split=0),
    "matrices of shampoo's": lambda: ps.as_matrices(ps.shampoo()),
    "a dimension beyond two": lambda: ps.as_matrices(ps.muon(), dim=2),
    "too many rates of mechanic's": lambda: ps.mechanic(ps.sgd(), num_betas=100),
    "a plot of nothing": lambda: ps.plot_monitor([]),
    "a plot without matplotlib": lambda: without("matplotlib", lambda: ps.plot_monitor([begin(ps.monitor())])),
    "a predicate that is a transform": lambda: ps.conditionally(ps.sgd(), ps.sgd()),  # type: ignore[arg-type]
    "neither passed nor zero": lambda: ps.conditionally(lambda t: True, ps.sgd(), otherwise="skip"),  # type: ignore[arg-type]
    "complex parameters": lambda: begin(ps.sm3(), {"w": torch.ones(2, dtype=torch.complex64)}),
    "empty parameters": lambda: begin(ps.shampoo(), {"w": torch.ones(0, 2)}),
    "a state of integers": lambda: ps.state_dtype(ps.adam(), torch.int32),
    "a number that is to be quantized": lambda: ps.quantize_state(3),  # type: ignore[arg-type]
    "a factory that is to be quantized": lambda: ps.quantize_state(ps.adam),  # type: ignore[arg-type]
    "four bits": lambda: ps.quantize_state(ps.adam(), bits=4),  # type: ignore[arg-type]
    "a negative size": lambda: ps.quantize_state(ps.adam(), min_size=-1),
    "nothing to quantize": lambda: ps.quantize_state(ps.scale(2.0)),
    "16 bits without a counter": lambda: ps.quantize_state(averaged(), 16),
    "a schedule that is a number": lambda: ps.scale_by_schedule(0.1),  # type: ignore[arg-type]
}
