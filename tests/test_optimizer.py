"""The stateful face, with torch.optim as the oracle: same numbers, same state, same behaviour, from the same calls.

Most tests do one thing twice, in the namespace `torch.optim` and in `purestep.optim`, and compare what comes out. On the CPU
torch.optim runs its loop over the parameters by default, which is the plainest statement of its mathematics.
"""

from __future__ import annotations

import copy
import functools
import inspect
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import lr_scheduler as schedulers
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import purestep as ps
from purestep import optim
from tests.cases import CASES, Case, Options
from tests.problems import difference

WITH_CLASS = [
    case for case in CASES if case.twin and case.treats(torch.zeros(2))
]  # Net has vectors; test_optim_db has the others
FLAGS: dict[str, Options] = {"default": {}, "foreach": {"foreach": True}, "loop": {"foreach": False}, "fused": {"fused": True}}
MOMENTUM = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
ADAM = {"lr": 0.1, "weight_decay": 0.1}
KINDS: dict[str, tuple[str, Options]] = {
    "sgd": ("SGD", {"lr": 0.1}),
    "momentum": ("SGD", MOMENTUM),
    "dampening": ("SGD", {**MOMENTUM, "dampening": 0.3}),
    "adam": ("Adam", ADAM),
    "amsgrad": ("Adam", {**ADAM, "amsgrad": True}),
    "adamw": ("AdamW", ADAM),
}
BOTH = (torch.optim, optim)

each_flags = pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
FLAGGED = [
    pytest.param(case, options, flags, id=f"{name}-{case}-{i}")
    for case in WITH_CLASS
    for i, options in enumerate(case.options)
    for name, flags in FLAGS.items()
    if case.twin is not None and flags.keys() <= inspect.signature(case.twin).parameters.keys()
]
each_flagged = pytest.mark.parametrize(("case", "options", "flags"), FLAGGED)
each_executor = pytest.mark.parametrize(
    "flags", [f for k, f in FLAGS.items() if k != "fused"], ids=[k for k in FLAGS if k != "fused"]
)
each_kind = pytest.mark.parametrize(("cls", "options"), KINDS.values(), ids=KINDS)
each_stateful = pytest.mark.parametrize(
    ("cls", "options"), [v for k, v in KINDS.items() if k != "sgd"], ids=[k for k in KINDS if k != "sgd"]
)


def known(reason: str) -> pytest.MarkDecorator:
    """A difference from torch that is known, and why it stays."""
    return pytest.mark.xfail(strict=True, reason=reason)


# ----------------------------------------------------------------------------------------------------------------- helpers


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Parameters of these shapes; the same at every call."""
    g = torch.Generator().manual_seed(7)
    return [torch.randn(shape, generator=g, dtype=dtype).requires_grad_() for shape in shapes]


def like(params: list[Tensor]) -> list[Tensor]:
    """The same parameters once more, in the same memory layout."""
    return [p.detach().clone(memory_format=torch.preserve_format).requires_grad_(p.requires_grad) for p in params]


def parameters(optimizer: Any) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def values(optimizer: Any) -> list[Tensor]:
    return [p.detach() for p in parameters(optimizer)]


def give_grads(optimizer: Any, k: int, skip: Callable[[int, int], bool] | None = None) -> None:
    """The k-th gradients: noise that depends on the parameters, so that an error feeds on itself. `skip(k, i)` leaves one out."""
    for i, p in enumerate(parameters(optimizer)):
        if (skip is not None and skip(k, i)) or not p.requires_grad:
            p.grad = None
            continue
        g = torch.Generator().manual_seed(100 * k + i)
        noise = torch.randn(p.shape, generator=g, dtype=torch.float64)
        p.grad = torch.zeros_like(p).copy_(torch.sin(p.detach()) + noise)  # in the parameter's layout, as backward gives it


def train(optimizer: Any, steps: range, skip: Callable[[int, int], bool] | None = None) -> None:
    for k in steps:
        give_grads(optimizer, k, skip)
        optimizer.step()


def make(namespace: Any, cls: str, params: Any, **options: Any) -> Any:
    return getattr(namespace, cls)(params, **options)


def twins(cls: str, params: list[Tensor], options: Options, flags: Options) -> tuple[Any, Any]:
    """torch's optimizer and ours on equal parameters; the flags are for ours."""
    return make(torch.optim, cls, like(params), **options), make(optim, cls, like(params), **{**options, **flags})


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach() for p in model.parameters()]


def assert_same(theirs: Any, ours: Any, tolerance: float = 1e-12) -> None:
    assert difference(values(ours), values(theirs)) <= tolerance


def saved(state_dict: Any) -> Any:
    """A state dict as it comes back from a file."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def state_of(optimizer: Any) -> list[dict[str, Tensor]]:
    """A copy of the parameters' state."""
    return [
        {k: x.clone() for k, x in optimizer.state[p].items()} if p in optimizer.state else {} for p in parameters(optimizer)
    ]


def assert_equal(a: Any, b: Any) -> None:
    """Equality of trees that hold tensors."""
    torch.testing.assert_close(a, b, rtol=0, atol=0)


class Net(nn.Module):
    """A small network with a 0-d parameter and one that is never used."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.hidden = nn.Linear(3, 4)
        self.out = nn.Linear(4, 2)
        self.temperature = nn.Parameter(torch.tensor(1.3))
        self.unused = nn.Parameter(torch.ones(3))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.temperature * self.out(torch.tanh(self.hidden(x)))


def data() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    return torch.randn(16, 3, generator=g, dtype=torch.float64), torch.randn(16, 2, generator=g, dtype=torch.float64)


def fit(model: nn.Module, optimizer: Any, steps: int = 20) -> list[float]:
    x, y = data()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = ((model(x) - y) ** 2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# ------------------------------------------------------------------------------------------------------------ trajectories


@each_flagged
@pytest.mark.in_turn("flags")
def test_a_module_trains_as_with_torch(case: Case, options: Options, flags: Options) -> None:
    assert case.twin is not None
    theirs, ours = Net(), Net()
    a = case.twin(theirs.parameters(), **options)
    b = getattr(optim, case.twin.__name__)(ours.parameters(), **options, **flags)
    fit(theirs, a)
    fit(ours, b)
    assert difference(weights(ours), weights(theirs)) <= 1e-12
    assert torch.equal(ours.unused, torch.ones_like(ours.unused))


@each_flagged
@pytest.mark.in_turn("flags")
def test_float32(case: Case, options: Options, flags: Options) -> None:
    assert case.twin is not None
    params = tensors((3, 2), (4,), (), dtype=torch.float32)
    theirs, ours = twins(case.twin.__name__, params, options, flags)
    train(theirs, range(10))
    train(ours, range(10))
    assert_same(theirs, ours, 5e-6)
    assert {x.dtype for x in values(ours)} == {torch.float32}


PER_GROUP: dict[str, tuple[str, Options, list[Options]]] = {
    "sgd lr, decay": ("SGD", {"lr": 0.1}, [{}, {"lr": 0.01, "weight_decay": 0.1}]),
    "sgd momentum in one group": ("SGD", {"lr": 0.1}, [{"momentum": 0.0}, {"momentum": 0.9}]),
    "sgd no momentum in one group": ("SGD", {"lr": 0.1, "momentum": 0.9}, [{}, {"momentum": 0.0}]),
    "sgd switches": ("SGD", MOMENTUM, [{"nesterov": True}, {"maximize": True, "lr": 1e-3}, {"dampening": 0.5}]),
    "adam numbers": ("Adam", {"lr": 0.1}, [{"betas": (0.5, 0.9)}, {"eps": 1e-2, "weight_decay": 0.1}, {"lr": 0.0}]),
    "adam switches": ("Adam", ADAM, [{"amsgrad": True}, {"maximize": True}, {"decoupled_weight_decay": True}]),
    "adamw numbers": ("AdamW", {"lr": 0.1}, [{"weight_decay": 0.0}, {"weight_decay": 0.5, "lr": 1e-3}]),
    "adamw switches": ("AdamW", ADAM, [{"amsgrad": True}, {"maximize": True, "betas": (0.0, 0.9)}, {}]),
}


def in_groups(params: list[Tensor], groups: list[Options]) -> list[Options]:
    """Two parameters to a group."""
    copies = like(params)
    return [{"params": copies[2 * i : 2 * i + 2], **options} for i, options in enumerate(groups)]


@each_flags
@pytest.mark.parametrize(("cls", "options", "groups"), PER_GROUP.values(), ids=PER_GROUP)
def test_groups_have_options_of_their_own(cls: str, options: Options, groups: list[Options], flags: Options) -> None:
    params = tensors((3, 2), (4,), (), (2, 2), (5,), (1,))[: 2 * len(groups)]
    theirs = make(torch.optim, cls, in_groups(params, groups), **options)
    ours = make(optim, cls, in_groups(params, groups), **options, **flags)
    train(theirs, range(15))
    train(ours, range(15))
    assert_same(theirs, ours)


def test_nesterov_is_no_error_in_a_group_without_momentum() -> None:
    groups: list[Options] = [{}, {"momentum": 0.0}]
    params = tensors((3, 2), (4,), (), (2, 2))
    options = {**MOMENTUM, "nesterov": True}
    theirs, ours = (make(namespace, "SGD", in_groups(params, groups), **options) for namespace in BOTH)
    train(theirs, range(5))
    train(ours, range(5))
    assert_same(theirs, ours)


def test_nor_in_a_group_that_climbs() -> None:
    groups: list[Options] = [{"maximize": True}, {"maximize": True, "momentum": 0.0}]
    params = tensors((3, 2), (4,), (), (2, 2))
    options = {**MOMENTUM, "lr": 1e-3, "nesterov": True}
    theirs, ours = (make(namespace, "SGD", in_groups(params, groups), **options) for namespace in BOTH)
    train(theirs, range(5))
    train(ours, range(5))
    assert_same(theirs, ours)


MISSING: dict[str, Callable[[int, int], bool]] = {
    "one at times": lambda k, i: i == 1 and k % 3 == 1,
    "each at times": lambda k, i: (k + i) % 3 == 0,
    "first late": lambda k, i: i == 0 and k < 4,
    "all at times": lambda k, i: k % 4 == 2,
    "one never": lambda k, i: i == 2,
}


@each_kind
@each_flags
@pytest.mark.parametrize("skip", MISSING.values(), ids=MISSING)
def test_missing_gradients(cls: str, options: Options, flags: Options, skip: Callable[[int, int], bool]) -> None:
    theirs, ours = twins(cls, tensors((3, 2), (4,), (), (2,)), options, flags)
    train(theirs, range(12), skip)
    train(ours, range(12), skip)
    assert_same(theirs, ours)
    for p, q in zip(parameters(theirs), parameters(ours)):
        if "step" in theirs.state[p]:
            assert ours.state[q]["step"] == theirs.state[p]["step"]


@each_stateful
@each_flags
def test_a_parameter_that_never_gets_a_gradient_is_left_alone(cls: str, options: Options, flags: Options) -> None:
    params = tensors((3, 2), (4,))
    optimizer = make(optim, cls, params, **options, **flags)
    before, state = params[1].detach().clone(), state_of(optimizer)[1]
    train(optimizer, range(5), lambda k, i: i == 1)
    assert_equal(params[1].detach(), before)
    assert_equal(state_of(optimizer)[1], state)
    assert state["step"] == 0


@each_kind
@each_flags
def test_a_frozen_parameter_that_thaws(cls: str, options: Options, flags: Options) -> None:
    params = tensors((3, 2), (4,), ())
    params[1].requires_grad_(False)
    theirs, ours = twins(cls, params, options, flags)
    assert parameters(ours)[1] not in ours.state
    for optimizer in (theirs, ours):
        train(optimizer, range(5))
        assert torch.equal(values(optimizer)[1], params[1])
        parameters(optimizer)[1].requires_grad_(True)
        train(optimizer, range(5, 10))
    assert_same(theirs, ours)


SHAPES: dict[str, Callable[[], Tensor]] = {
    "0-d": lambda: tensors(())[0],
    "empty": lambda: tensors((0, 3))[0],
    "transposed": lambda: tensors((3, 4))[0].detach().T.requires_grad_(),
    "channels_last": lambda: tensors((2, 3, 2, 2))[0].detach().contiguous(memory_format=torch.channels_last).requires_grad_(),
    "with gaps": lambda: tensors((4, 6))[0].detach()[:, ::2].requires_grad_(),
}


@each_kind
@each_flags
@pytest.mark.parametrize("alone", [True, False], ids=["alone", "among others"])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_and_layouts(cls: str, options: Options, flags: Options, shape: str, alone: bool) -> None:
    def params() -> list[Tensor]:
        return [SHAPES[shape](), *([] if alone else tensors((3,), (2, 2)))]

    theirs, ours = make(torch.optim, cls, params(), **options), make(optim, cls, params(), **options, **flags)
    strides = parameters(ours)[0].stride()
    train(theirs, range(6))
    train(ours, range(6))
    assert_same(theirs, ours)
    assert parameters(ours)[0].stride() == strides


@each_kind
@each_flags
def test_a_gradient_in_another_layout(cls: str, options: Options, flags: Options) -> None:
    params = [SHAPES["transposed"](), *tensors((3,))]
    theirs, ours = twins(cls, params, options, flags)
    for k in range(4):
        for optimizer in (theirs, ours):
            give_grads(optimizer, k)
            p = parameters(optimizer)[0]
            assert p.grad is not None
            p.grad = p.grad.contiguous()
            assert p.grad.stride() != p.stride()
            optimizer.step()
    assert_same(theirs, ours)


@each_kind
@each_executor
def test_complex_parameters(cls: str, options: Options, flags: Options) -> None:
    theirs, ours = twins(cls, [*tensors((3, 2), (), dtype=torch.complex128), *tensors((3,))], options, flags)
    train(theirs, range(8))
    train(ours, range(8))
    assert_same(theirs, ours)


@each_kind
def test_complex_parameters_have_no_kernel(cls: str, options: Options) -> None:
    for namespace in BOTH:
        optimizer = make(namespace, cls, tensors((3, 2), dtype=torch.complex128), **options, fused=True)
        before = values(optimizer)[0].clone()
        give_grads(optimizer, 0)
        with pytest.raises(RuntimeError, match="fused=True"):
            optimizer.step()
        assert_equal(values(optimizer)[0], before)


@each_kind
@each_flags
def test_mixed_dtypes_in_a_group(cls: str, options: Options, flags: Options) -> None:
    dtypes = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 5e-2}
    if not flags.get("fused"):
        dtypes[torch.complex128] = 1e-12
    params = [p for dtype in dtypes for p in tensors((3, 2), (4,), dtype=dtype)]
    theirs, ours = twins(cls, params, options, flags)
    train(theirs, range(6))
    train(ours, range(6))
    for p, q in zip(values(theirs), values(ours)):
        assert q.dtype == p.dtype
        assert difference([q], [p]) <= dtypes[p.dtype], p.dtype


@each_kind
@each_flags
def test_a_group_added_while_training(cls: str, options: Options, flags: Options) -> None:
    theirs, ours = twins(cls, tensors((3, 2), (4,)), options, flags)
    for optimizer in (theirs, ours):
        train(optimizer, range(5))
        late = torch.linspace(-1, 1, 6, dtype=torch.float64).view(2, 3).requires_grad_()
        optimizer.add_param_group({"params": late, "lr": 0.05})
        assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.05]
        assert optimizer.param_groups[1]["weight_decay"] == options.get("weight_decay", 0)
        train(optimizer, range(5, 10))
    assert_same(theirs, ours)


CHANGES: dict[str, tuple[str, Options, list[Options]]] = {
    "lr": ("SGD", MOMENTUM, [{"lr": 0.01}, {"lr": 0.0}, {"lr": 0.2}]),
    "adam lr": ("Adam", ADAM, [{"lr": 0.01}, {"lr": 0}, {"lr": 0.2}]),
    "decay from 0": ("SGD", {"lr": 0.1}, [{"weight_decay": 0.1}, {"weight_decay": 0.0}]),
    "adam decay from 0": ("Adam", {"lr": 0.1}, [{"weight_decay": 0.1}, {"weight_decay": 0}]),
    "adamw decay from 0": ("AdamW", {"lr": 0.1, "weight_decay": 0}, [{"weight_decay": 0.1}, {"weight_decay": 0.0}]),
    "momentum from 0": ("SGD", {"lr": 0.1}, [{"momentum": 0.9}]),
    "momentum from 0, dampened": ("SGD", {"lr": 0.1, "dampening": 0.5}, [{"momentum": 0.9}, {"momentum": 0.5}]),
    "momentum off and on": ("SGD", MOMENTUM, [{"momentum": 0.0}, {"momentum": 0.9}]),
    "momentum and dampening": ("SGD", MOMENTUM, [{"momentum": 0.5, "dampening": 0.2}, {"dampening": 0.0}]),
    "nesterov": ("SGD", MOMENTUM, [{"nesterov": True}, {"nesterov": False}]),
    "maximize": ("SGD", MOMENTUM, [{"maximize": True}, {"maximize": False}]),
    "adam maximize": ("Adam", ADAM, [{"maximize": True}, {"maximize": False}]),
    "betas": ("Adam", ADAM, [{"betas": (0.5, 0.9)}, {"betas": (0.95, 0.99)}]),
    "eps": ("AdamW", ADAM, [{"eps": 0.1}]),
    "amsgrad off": ("Adam", {**ADAM, "amsgrad": True}, [{"amsgrad": False}, {"amsgrad": True}]),
    "lr below 0": ("SGD", MOMENTUM, [{"lr": -0.001}, {"lr": 0.1}]),
    "adam lr below 0": ("Adam", ADAM, [{"lr": -0.001}, {"lr": 0.1}]),
    "lr to a tensor": ("Adam", ADAM, [{"lr": torch.tensor(0.05, dtype=torch.float64)}, {"lr": 0.1}]),
    "lr to an int": ("SGD", MOMENTUM, [{"lr": 1}]),
    "decay to a tensor": ("AdamW", ADAM, [{"weight_decay": torch.tensor(0.3, dtype=torch.float64)}]),
    "betas to tensors": (
        "Adam",
        ADAM,
        [{"betas": (torch.tensor(0.5, dtype=torch.float64), torch.tensor(0.9, dtype=torch.float64))}],
    ),
    "decoupled": ("Adam", ADAM, [{"decoupled_weight_decay": True}]),
}


@each_flags
@pytest.mark.parametrize(("cls", "options", "changes"), CHANGES.values(), ids=CHANGES)
def test_options_changed_while_training(cls: str, options: Options, changes: list[Options], flags: Options) -> None:
    theirs, ours = twins(cls, tensors((3, 2), (4,), ()), options, flags)
    for optimizer in (theirs, ours):
        for n, change in enumerate([{}, *changes]):
            optimizer.param_groups[0].update(change)
            train(optimizer, range(4 * n, 4 * n + 4))
    assert_same(theirs, ours)


def test_momentum_set_to_0_under_nesterov() -> None:
    theirs, ours = twins("SGD", tensors((3,)), {"lr": 0.1, "momentum": 0.9, "nesterov": True}, {})
    for optimizer in (theirs, ours):
        train(optimizer, range(3))
        optimizer.param_groups[0]["momentum"] = 0.0
        train(optimizer, range(3, 6))
    assert_same(theirs, ours)


def test_betas_in_a_list_that_is_written_to() -> None:
    results = []
    for namespace in BOTH:
        optimizer = namespace.Adam([{"params": tensors((3,)), "betas": [0.9, 0.99]}], lr=0.1)
        train(optimizer, range(3))
        optimizer.param_groups[0]["betas"][0] = 0.5
        train(optimizer, range(3, 6))
        results.append(values(optimizer))
    assert difference(results[1], results[0]) <= 1e-12


@each_flags
def test_flags_changed_while_training(flags: Options) -> None:
    """The way a step is run can change at any step; the state is the same for all."""
    theirs, ours = twins("AdamW", tensors((3, 2), (4,), ()), ADAM, flags)
    train(theirs, range(16))
    for n, other in enumerate(FLAGS.values()):
        ours.param_groups[0].update({"foreach": None, "fused": None, **other})
        train(ours, range(4 * n, 4 * n + 4))
    assert_same(theirs, ours)


@each_flags
@pytest.mark.parametrize("clear", [lambda o: o.state.clear(), lambda o: o.state.pop(parameters(o)[1])], ids=["all", "one"])
@each_stateful
def test_a_state_that_was_cleared_begins_anew(cls: str, options: Options, flags: Options, clear: Any) -> None:
    theirs, ours = twins(cls, tensors((3, 2), (4,)), options, flags)
    for optimizer in (theirs, ours):
        train(optimizer, range(4))
        clear(optimizer)
        train(optimizer, range(4, 8))
    assert_same(theirs, ours)


def test_other_things_in_the_state_are_kept() -> None:
    for namespace in BOTH:
        optimizer = namespace.Adam(tensors((3,)))
        optimizer.state["note"] = 5
        optimizer.state["more"] = {"a": [1, 2]}
        optimizer.load_state_dict(saved(optimizer.state_dict()))
        train(optimizer, range(1))
        assert optimizer.state["note"] == 5
        assert optimizer.state["more"] == {"a": [1, 2]}


@each_flags
def test_what_is_written_to_the_state_counts(flags: Options) -> None:
    theirs, ours = twins("Adam", tensors((3, 2), (4,), ()), ADAM, flags)
    for optimizer in (theirs, ours):
        train(optimizer, range(4))
        a, b, _ = parameters(optimizer)
        optimizer.state[a]["step"] = torch.tensor(1.0)
        optimizer.state[b]["exp_avg"] = torch.ones(4, dtype=torch.float64)
        optimizer.state[b]["exp_avg_sq"].fill_(0.5)
        train(optimizer, range(4, 8))
    assert_same(theirs, ours)
    assert [ours.state[p]["step"].item() for p in parameters(ours)] == [5, 8, 8]


@each_flags
def test_parameters_exchanged_in_their_group(flags: Options) -> None:
    """As pruning does it."""
    theirs, ours = twins("Adam", tensors((3, 2), (4,), ()), ADAM, flags)
    for optimizer in (theirs, ours):
        train(optimizer, range(4))
        group = optimizer.param_groups[0]
        group["params"] = [group["params"][2], *tensors((5,)), group["params"][0]]
        train(optimizer, range(4, 8))
    assert_same(theirs, ours)


def test_a_parameter_taken_out_and_put_back() -> None:
    theirs, ours = twins("Adam", tensors((3, 2), (4,)), ADAM, {})
    for optimizer in (theirs, ours):
        both = parameters(optimizer)
        for k, params in enumerate([both, both[:1], both[:1], both, both]):
            optimizer.param_groups[0]["params"] = params
            train(optimizer, range(k, k + 1))
    assert [ours.state[p]["step"].item() for p in parameters(ours)] == [5, 3]
    assert_same(theirs, ours)


@each_flags
@each_stateful
def test_a_model_that_is_cast_after_its_optimizer_was_made(cls: str, options: Options, flags: Options) -> None:
    """As is moving it to a device: `module.to` keeps the parameters, and exchanges what they hold."""
    results = []
    for namespace in BOTH:
        model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
        with torch.no_grad():
            for p, x in zip(model.parameters(), tensors((2, 3), (2,), (2, 2), (2,))):
                p.copy_(x)
        optimizer = make(namespace, cls, model.parameters(), **options, **(flags if namespace is optim else {}))
        model.double()
        train(optimizer, range(4))
        results.append(weights(model))
    assert difference(results[1], results[0]) <= 1e-12


@each_flags
def test_a_model_that_becomes_channels_last_after_its_optimizer_was_made(flags: Options) -> None:
    results = []
    for namespace in BOTH:
        torch.manual_seed(0)
        model = nn.Conv2d(3, 4, 2).double()
        optimizer = namespace.AdamW(model.parameters(), lr=0.1, **(flags if namespace is optim else {}))
        model.to(memory_format=torch.channels_last)
        train(optimizer, range(4))
        results.append(weights(model))
    assert difference(results[1], results[0]) <= 1e-12


def test_a_lazy_module() -> None:
    for namespace in BOTH:
        model = nn.LazyLinear(2)
        optimizer = namespace.Adam(model.parameters(), lr=0.1)
        model(torch.ones(1, 3)).sum().backward()
        before = model.weight.detach().clone()
        optimizer.step()
        torch.testing.assert_close(model.weight.detach(), before - 0.1)


def test_a_model_that_is_cast_after_it_was_copied_with_its_optimizer() -> None:
    for namespace in BOTH:
        model = nn.Linear(2, 2)
        model, optimizer = copy.deepcopy((model, namespace.Adam(model.parameters())))
        model.double()
        train(optimizer, range(2))
        assert {optimizer.state[p]["exp_avg"].dtype for p in model.parameters()} == {torch.float64}


def test_a_state_of_another_shape_is_refused() -> None:
    """Here the parameter is the shorter one, because the other way round the process may die."""
    for namespace in BOTH:
        optimizer = namespace.Adam(tensors((5,)), lr=0.1)
        train(optimizer, range(2))
        p = parameters(optimizer)[0]
        p.grad = None
        p.data = p.data[:2].clone()
        before = p.detach().clone()
        with pytest.raises((RuntimeError, ValueError), match=r"shape|size"):
            train(optimizer, range(2, 3))
        assert_equal(p.detach(), before)


@each_kind
@each_flags
def test_a_step_without_any_gradient_changes_nothing(cls: str, options: Options, flags: Options) -> None:
    optimizer = make(optim, cls, tensors((3, 2), (4,)), **options, **flags)
    train(optimizer, range(2))
    before, state = copy.deepcopy(values(optimizer)), state_of(optimizer)
    optimizer.zero_grad()
    assert optimizer.step() is None
    assert_equal(values(optimizer), before)
    assert_equal(state_of(optimizer), state)


# -------------------------------------------------------------------------------------------------- groups, names, closures


def test_it_is_torchs() -> None:
    optimizer = optim.AdamW(tensors((2,)))
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert isinstance(optimizer, optim.Optimizer)
    assert optim.lr_scheduler is torch.optim.lr_scheduler
    assert optim.swa_utils is torch.optim.swa_utils


@pytest.mark.parametrize("cls", ["SGD", "Adam", "AdamW"])
def test_groups_have_torchs_options_and_defaults(cls: str) -> None:
    theirs, ours = twins(cls, tensors((2,)), {}, {})
    a, b = theirs.param_groups[0], ours.param_groups[0]
    assert {k: b[k] for k in b if k != "params"} == {k: a[k] for k in a if k != "params"}
    assert ours.defaults == theirs.defaults


@pytest.mark.parametrize("cls", ["SGD", "Adam", "AdamW"])
def test_signatures_are_torchs(cls: str) -> None:
    """Also positionally."""
    arguments = {"SGD": (0.1, 0.9, 0.0, 0.1, True), "Adam": (0.1, (0.8, 0.9), 1e-3, 0.1, True)}.get(
        cls, (0.1, (0.8, 0.9), 1e-3, 0.1, True)
    )
    theirs = getattr(torch.optim, cls)(tensors((3,)), *arguments, maximize=True)
    ours = getattr(optim, cls)(tensors((3,)), *arguments, maximize=True)
    train(theirs, range(3))
    train(ours, range(3))
    assert_same(theirs, ours)
    with pytest.raises(TypeError):
        getattr(optim, cls)(tensors((3,)), learning_rate=0.1)


def test_names_are_kept_and_added() -> None:
    a, b = tensors((2,), (3,))
    optimizer = optim.SGD([("a", a)], lr=0.1)
    assert optimizer.param_groups[0]["param_names"] == ["a"]
    optimizer.add_param_group({"params": [("b", b)], "lr": 0.2})
    assert [g["param_names"] for g in optimizer.param_groups] == [["a"], ["b"]]
    assert optimizer.param_groups[1]["params"][0] is b
    assert optimizer.state_dict()["param_groups"][1]["param_names"] == ["b"]


def test_a_refused_group_changes_nothing() -> None:
    a, b = tensors((2,), (3,))
    optimizer = optim.Adam([a], lr=0.1)
    for options in ({"lr": -1.0}, {"betas": (0.9, 1.0)}, {"eps": -1.0}, {"weight_decay": -1.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            optimizer.add_param_group({"params": [b], **options})
    with pytest.raises(TypeError):
        optimizer.add_param_group([b])  # type: ignore[arg-type]
    assert len(optimizer.param_groups) == 1
    assert b not in optimizer.state
    train(optimizer, range(2))


@each_flags
def test_closure(flags: Options) -> None:
    """It is called once, with gradients enabled, before the update, and its value is returned."""
    (p,) = tensors((3,))
    optimizer = optim.SGD([p], lr=0.5, **flags)
    before = p.detach().clone()
    called = []

    def closure() -> Tensor:
        called.append(torch.is_grad_enabled())
        assert_equal(p.detach(), before)
        optimizer.zero_grad()
        loss = (p**2).sum() / 2
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
        assert not torch.is_grad_enabled()
    assert torch.is_tensor(loss)
    assert loss == (before**2).sum() / 2
    torch.testing.assert_close(p.detach(), before / 2)
    before = p.detach().clone()
    optimizer.step(closure=closure)
    assert called == [True, True]


def test_an_error_in_a_closure_leaves_gradients_enabled() -> None:
    optimizer = optim.SGD(tensors((3,)), lr=0.5)

    def closure() -> float:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        optimizer.step(closure)
    assert torch.is_grad_enabled()


@each_flags
def test_zero_grad(flags: Options) -> None:
    optimizer = optim.Adam(tensors((3,), (2, 2)), **flags)
    give_grads(optimizer, 0)
    grads = [p.grad for p in parameters(optimizer)]
    optimizer.zero_grad(set_to_none=False)
    for p, g in zip(parameters(optimizer), grads):
        assert p.grad is g
        assert torch.count_nonzero(p.grad) == 0
    optimizer.zero_grad()
    assert all(p.grad is None for p in parameters(optimizer))


# -------------------------------------------------------------------------------------------------------------------- hooks


def log_of_hooks(namespace: Any) -> list[Any]:
    """What all kinds of hooks see, in order, in one namespace."""
    (p,) = tensors((3,))
    optimizer = namespace.Adam([p], lr=0.1)
    log: list[Any] = []

    def pre(name: str) -> Any:
        def hook(opt: Any, args: Any, kwargs: Any) -> None:
            assert opt is optimizer
            log.append((name, len(args), args[0] is optimizer, sorted(kwargs), p.detach().clone()))

        return hook

    def on(name: str, *, returns: Any = None) -> Any:
        def hook(opt: Any, *args: Any) -> Any:
            assert opt is optimizer
            log.append((name, *[sorted(a) for a in args]))
            return returns

        return hook

    handles = [
        optimizer.register_step_pre_hook(pre("pre 1")),
        optimizer.register_step_pre_hook(pre("pre 2")),
        optimizer.register_step_post_hook(pre("post 1")),
        optimizer.register_step_post_hook(pre("post 2")),
        register_optimizer_step_pre_hook(pre("global pre")),
        register_optimizer_step_post_hook(pre("global post")),
        optimizer.register_state_dict_pre_hook(on("state pre")),
        optimizer.register_state_dict_pre_hook(on("state pre, first"), prepend=True),
        optimizer.register_state_dict_post_hook(on("state post")),
        optimizer.register_state_dict_post_hook(on("state post, first"), prepend=True),
        optimizer.register_load_state_dict_pre_hook(on("load pre")),
        optimizer.register_load_state_dict_pre_hook(on("load pre, first"), prepend=True),
        optimizer.register_load_state_dict_post_hook(on("load post")),
        optimizer.register_load_state_dict_post_hook(on("load post, first"), prepend=True),
    ]
    try:
        give_grads(optimizer, 0)
        optimizer.step()
        optimizer.step(lambda: 1.0)
        optimizer.step(closure=lambda: 1.0)
        optimizer.load_state_dict(optimizer.state_dict())
    finally:
        for handle in handles:
            handle.remove()
    count = len(log)
    train(optimizer, range(1))
    optimizer.load_state_dict(optimizer.state_dict())
    assert len(log) == count, "a hook that was removed has been called"
    return log


def test_hooks_are_called_as_torch_calls_them() -> None:
    theirs, ours = log_of_hooks(torch.optim), log_of_hooks(optim)
    assert len(theirs) == 3 * 6 + 4 + 4
    assert [entry[:-1] for entry in ours[:18]] == [entry[:-1] for entry in theirs[:18]]
    assert difference([entry[-1] for entry in ours[:18]], [entry[-1] for entry in theirs[:18]]) <= 1e-12
    assert ours[18:] == theirs[18:]


def test_a_pre_hook_can_change_the_arguments() -> None:
    optimizer = optim.SGD(tensors((3,)), lr=0.1)
    give_grads(optimizer, 0)
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: ((args[0], lambda: 42.0), kwargs))
    assert optimizer.step() == 42.0
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: ((args[0],), {"closure": lambda: 43.0}))
    assert optimizer.step() == 43.0


def test_a_pre_hook_that_returns_nonsense_is_told_so() -> None:
    for namespace in BOTH:
        optimizer = namespace.SGD(tensors((3,)), lr=0.1)
        optimizer.register_step_pre_hook(lambda opt, args, kwargs: 1)
        with pytest.raises(RuntimeError, match="must return None or a tuple"):
            optimizer.step()


def test_a_pre_hook_sees_the_gradients_before_the_step_uses_them() -> None:
    optimizer = optim.SGD(tensors((3,)), lr=0.1)
    before = values(optimizer)[0].clone()
    give_grads(optimizer, 0)
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: opt.zero_grad())
    optimizer.step()
    assert_equal(values(optimizer)[0], before)


def test_global_hooks_are_called_once_for_each_optimizer() -> None:
    seen = []
    every = [
        optim.SGD(tensors((2,))),
        optim.Optimizer(tensors((2,)), ps.sgd(0.1)),
        optim.Adam(tensors((2,))),
        torch.optim.SGD(tensors((2,))),
    ]
    handle = register_optimizer_step_post_hook(lambda opt, args, kwargs: seen.append(opt))
    try:
        for optimizer in every:
            optimizer.step()
    finally:
        handle.remove()
    assert [id(x) for x in seen] == [id(x) for x in every]


def test_a_state_dict_hook_can_change_it() -> None:
    for namespace in BOTH:
        optimizer = namespace.Adam(tensors((2,)))

        def add(opt: Any, state_dict: Any) -> None:
            state_dict["epoch"] = 3

        optimizer.register_state_dict_post_hook(add)
        assert optimizer.state_dict()["epoch"] == 3
        optimizer.register_state_dict_post_hook(lambda opt, state_dict: {**state_dict, "epoch": 4})
        assert optimizer.state_dict()["epoch"] == 4


def test_a_state_dict_hook_can_return_another_dict() -> None:
    for namespace in BOTH:
        optimizer = namespace.Adam(tensors((2,)))
        optimizer.register_state_dict_post_hook(lambda opt, state_dict: {"optimizer": state_dict})
        assert list(optimizer.state_dict()) == ["optimizer"]


def test_a_state_dict_hook_can_return_anything() -> None:
    for namespace in BOTH:
        optimizer = namespace.Adam(tensors((2,)))
        optimizer.register_state_dict_post_hook(lambda opt, state_dict: [state_dict])
        assert isinstance(optimizer.state_dict(), list)


def test_a_state_dict_hook_sees_a_counter_for_every_parameter() -> None:
    for namespace in BOTH:
        optimizer = namespace.Adam(tensors((2,), (3,)))
        train(optimizer, range(1))
        optimizer.register_state_dict_post_hook(lambda opt, state_dict: {"optimizer": state_dict})
        state = optimizer.state_dict()["optimizer"]["state"]
        assert state[0]["step"] is not state[1]["step"]


def test_a_load_hook_can_adapt_a_checkpoint_of_another_order() -> None:
    results = []
    for namespace in BOTH:
        a = namespace.Adam(tensors((2,), (3,)), lr=0.1)
        train(a, range(3))
        b = namespace.Adam(like(parameters(a))[::-1], lr=0.1)

        def swap(opt: Any, state_dict: Any) -> Any:
            return {**state_dict, "state": {0: state_dict["state"][1], 1: state_dict["state"][0]}}

        b.register_load_state_dict_pre_hook(swap)
        b.load_state_dict(saved(a.state_dict()))
        train(b, range(3, 5))
        results.append(values(b))
    assert difference(results[1], results[0]) <= 1e-12


def test_what_a_load_hook_returns_is_loaded() -> None:
    for namespace in BOTH:
        optimizer = namespace.SGD(tensors((2,)), lr=0.1)

        def faster(opt: Any, state_dict: Any) -> Any:
            return {**state_dict, "param_groups": [{**g, "lr": 10 * g["lr"]} for g in state_dict["param_groups"]]}

        optimizer.register_load_state_dict_pre_hook(faster)
        optimizer.load_state_dict(optimizer.state_dict())
        assert optimizer.param_groups[0]["lr"] == 1.0


def test_the_profiler_sees_steps_and_zero_grad() -> None:
    optimizer = optim.AdamW(tensors((2,)))
    give_grads(optimizer, 0)
    with torch.profiler.profile() as profile:
        optimizer.step()
        optimizer.zero_grad()
    names = {event.key for event in profile.key_averages()}
    assert {"Optimizer.step#AdamW.step", "Optimizer.zero_grad#AdamW.zero_grad"} <= names


# -------------------------------------------------------------------------------------------------------------- checkpoints


def some(k: int, i: int) -> bool:
    """A pattern of missing gradients after which parameters have made different numbers of updates."""
    return i == 1 and k % 3 == 0


ROUTES = {"ours to ours": (optim, optim), "ours to torch": (optim, torch.optim), "torch to ours": (torch.optim, optim)}


@each_kind
@each_flags
@pytest.mark.parametrize(("source", "target"), ROUTES.values(), ids=ROUTES)
@pytest.mark.parametrize("skip", [None, some, MISSING["one never"]], ids=["all", "some", "one never"])
@pytest.mark.in_turn("flags")
def test_ten_steps_and_ten_after_loading_are_twenty(
    cls: str, options: Options, flags: Options, source: Any, target: Any, skip: Any
) -> None:
    params = tensors((3, 2), (4,), (), (2,))
    straight = make(torch.optim, cls, like(params), **options)
    train(straight, range(20), skip)
    first = make(source, cls, like(params), **options, **(flags if source is optim else {}))
    train(first, range(10), skip)
    second = make(target, cls, like(parameters(first)), lr=0.5)  # every option comes from the checkpoint
    second.load_state_dict(saved(first.state_dict()))
    if target is optim:
        second.param_groups[0].update(flags)
    train(second, range(10, 20), skip)
    assert_same(straight, second)


@each_stateful
def test_state_dicts_have_torchs_layout(cls: str, options: Options) -> None:
    theirs, ours = twins(cls, tensors((3, 2), (4,), ()), options, {})
    train(theirs, range(3))
    train(ours, range(3))
    a, b = theirs.state_dict(), ours.state_dict()
    assert b.keys() == a.keys()
    assert b["state"].keys() == a["state"].keys()
    assert [g["params"] for g in b["param_groups"]] == [g["params"] for g in a["param_groups"]]
    for i, fields in a["state"].items():
        assert fields.keys() <= b["state"][i].keys()
        for name, x in fields.items():
            y = b["state"][i][name]
            assert (y.shape, y.dtype, y.device) == (x.shape, x.dtype, x.device)
            assert difference([y], [x]) <= 1e-12


@each_stateful
@each_flags
def test_every_parameter_has_a_counter_of_its_own_in_a_state_dict(cls: str, options: Options, flags: Options) -> None:
    optimizer = make(optim, cls, tensors((3,), (2, 2), ()), **options, **flags)
    for k in range(3):
        state = optimizer.state_dict()["state"]
        assert len({fields["step"].data_ptr() for fields in state.values()}) == 3
        assert [fields["step"].item() for fields in state.values()] == [k] * 3
        train(optimizer, range(k, k + 1))


@each_flags
def test_torchs_adam_continues_from_a_state_dict_as_it_is(flags: Options) -> None:
    """Without a file in between: torch writes to every counter by itself."""
    straight = torch.optim.Adam(tensors((3,), (2, 2)), **ADAM)
    train(straight, range(6))
    ours = optim.Adam(tensors((3,), (2, 2)), **ADAM, **flags)
    train(ours, range(3))
    theirs = torch.optim.Adam(like(parameters(ours)), **ADAM)
    theirs.load_state_dict(ours.state_dict())
    train(theirs, range(3, 6))
    assert [s["step"].item() for s in theirs.state.values()] == [6, 6]
    assert_same(straight, theirs)


def test_a_state_dict_stays_consistent_when_training_goes_on() -> None:
    """In torch it is a view: all of it is alive."""
    for namespace in BOTH:
        optimizer = namespace.Adam(tensors((3,), (2, 2)), lr=0.1)
        train(optimizer, range(2))
        state = optimizer.state_dict()["state"]
        train(optimizer, range(2, 5))
        assert len({fields["step"].item() for fields in state.values()}) == 1


@known(
    "state exists from construction, so a momentum buffer of zeros may be saved, which torch dampens the first gradient into"
)
@pytest.mark.parametrize("skip", [None, lambda k, i: i == 0], ids=["all", "some"])
def test_torch_dampens_no_first_gradient_after_loading(skip: Any) -> None:
    options = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}
    results = []
    for namespace in BOTH:
        a = namespace.SGD(tensors((3,), (2, 2)), **options)
        if skip is not None:
            train(a, range(3), skip)
        b = torch.optim.SGD(like(parameters(a)), **options)
        b.load_state_dict(saved(a.state_dict()))
        train(b, range(3, 6))
        results.append(values(b))
    assert difference(results[1], results[0]) <= 1e-12


FIELDS = {
    "sgd": set(),
    "momentum": {"step", "momentum_buffer"},
    "dampening": {"step", "momentum_buffer"},
    "adam": {"step", "exp_avg", "exp_avg_sq"},
    "amsgrad": {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"},
    "adamw": {"step", "exp_avg", "exp_avg_sq"},
}


@pytest.mark.parametrize("kind", FIELDS)
def test_the_state_is_there_from_the_beginning(kind: str) -> None:
    """For parameters that are trained; torch's appears at the first step."""
    cls, options = KINDS[kind]
    params = tensors((3, 2), (4,))
    params[1].requires_grad_(False)
    optimizer = make(optim, cls, params, **options)
    assert set(optimizer.state.get(params[0], {})) == FIELDS[kind]
    assert params[1] not in optimizer.state
    for x in optimizer.state.get(params[0], {}).values():
        assert not x.requires_grad
        assert torch.count_nonzero(x) == 0


@each_stateful
@each_flags
def test_saving_changes_nothing(cls: str, options: Options, flags: Options) -> None:
    quiet, busy = (make(optim, cls, tensors((3, 2), (4,)), **options, **flags) for _ in range(2))
    for k in range(6):
        train(quiet, range(k, k + 1), some)
        train(busy, range(k, k + 1), some)
        held = [(fields, name, x, x._version) for fields in busy.state.values() for name, x in fields.items()]
        before = saved(busy.state_dict())
        assert_equal(saved(busy.state_dict()), before)
        assert all(fields[name] is x and x._version == version for fields, name, x, version in held)
    assert_equal(values(busy), values(quiet))
    assert_equal(state_of(busy), state_of(quiet))


def refuse_to_load(optimizer: Any, state_dict: Any, error: Any, match: str) -> None:
    """It raises, and neither the optimizer nor what it does next is different afterwards."""
    train(optimizer, range(3))
    untouched = copy.deepcopy(optimizer)
    groups = [dict(g) for g in optimizer.param_groups]
    with pytest.raises(error, match=match):
        optimizer.load_state_dict(state_dict)
    assert_equal(state_of(optimizer), state_of(untouched))
    assert all(g == h for g, h in zip(optimizer.param_groups, groups))
    train(optimizer, range(3, 6))
    train(untouched, range(3, 6))
    assert_equal(values(optimizer), values(untouched))


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "more groups": (lambda: [{"params": [p]} for p in tensors((3, 2), (4,))], "number of parameter groups"),
    "fewer parameters": (lambda: tensors((3, 2)), "size of optimizer's group"),
    "more parameters": (lambda: tensors((3, 2), (4,), (4,)), "size of optimizer's group"),
    "other shapes": (lambda: tensors((3, 2), (5,)), r"'exp_avg' of shape \(5,\)"),
    "transposed": (lambda: tensors((2, 3), (4,)), r"'exp_avg' of shape \(2, 3\).*\(3, 2\)"),
}


@pytest.mark.parametrize("namespace", BOTH, ids=["torch's", "ours"])
@pytest.mark.parametrize(("params", "match"), WRONG.values(), ids=WRONG)
def test_a_checkpoint_of_another_model_is_refused(params: Callable[[], Any], match: str, namespace: Any) -> None:
    other = namespace.Adam(params(), lr=0.1)
    train(other, range(2))
    refuse_to_load(optim.Adam(tensors((3, 2), (4,)), lr=0.2), saved(other.state_dict()), ValueError, match)


def test_the_refusal_names_the_parameter() -> None:
    other = optim.Adam([("a", tensors((3,))[0]), ("b", tensors((4,))[0])])
    optimizer = optim.Adam([("a", tensors((3,))[0]), ("b", tensors((5,))[0])])
    with pytest.raises(ValueError, match="'b'"):
        optimizer.load_state_dict(other.state_dict())


def test_a_checkpoint_of_another_algorithm_is_refused() -> None:
    other = torch.optim.SGD(tensors((3, 2), (4,)), lr=0.1, momentum=0.9)
    train(other, range(2))
    refuse_to_load(
        optim.Adam(tensors((3, 2), (4,)), lr=0.2), saved(other.state_dict()), (KeyError, ValueError), r"betas|exp_avg"
    )


@pytest.mark.parametrize("cls", ["SGD", "Adam", "AdamW"])
def test_a_checkpoint_of_an_older_torch(cls: str) -> None:
    """Without the switches that came later, and (before 1.12) with steps that are numbers."""
    theirs, ours = twins(cls, tensors((3, 2), (4,)), {"lr": 0.1, "weight_decay": 0.1}, {})
    train(theirs, range(3))
    checkpoint = saved(theirs.state_dict())
    for name in ("maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"):
        checkpoint["param_groups"][0].pop(name, None)
    for fields in checkpoint["state"].values():
        if "step" in fields:
            fields["step"] = int(fields["step"])
    params = copy.deepcopy(values(theirs))
    for optimizer in (theirs, ours):
        for p, x in zip(parameters(optimizer), params):
            p.data.copy_(x)
        optimizer.load_state_dict(copy.deepcopy(checkpoint))
        train(optimizer, range(3, 6))
    assert_same(theirs, ours)


def test_numbers_as_steps_are_understood() -> None:
    theirs, ours = twins("Adam", tensors((3, 2), (4,)), ADAM, {})
    train(theirs, range(3))
    train(ours, range(3))
    for optimizer in (theirs, ours):
        checkpoint = saved(optimizer.state_dict())
        for fields in checkpoint["state"].values():
            fields["step"] = int(fields["step"])
        optimizer.load_state_dict(checkpoint)
        train(optimizer, range(3, 6))
    assert_same(theirs, ours)


@each_flags
def test_loading_casts_the_state_to_the_parameters_dtype(flags: Options) -> None:
    source = optim.Adam(tensors((3, 2), (4,)), **ADAM)
    train(source, range(3))
    theirs, ours = twins("Adam", [p.float().detach().requires_grad_() for p in parameters(source)], ADAM, flags)
    for optimizer in (theirs, ours):
        optimizer.load_state_dict(saved(source.state_dict()))
        assert {optimizer.state[p]["exp_avg"].dtype for p in parameters(optimizer)} == {torch.float32}
        assert {optimizer.state[p]["step"].dtype for p in parameters(optimizer)} == {torch.float32}
        train(optimizer, range(3, 6))
    assert_same(theirs, ours, 5e-6)


@each_kind
@each_flags
def test_a_checkpoint_of_torchs_before_its_first_step(cls: str, options: Options, flags: Options) -> None:
    """It has no state at all."""
    theirs, ours = twins(cls, tensors((3, 2), (4,)), options, {})
    ours.load_state_dict(saved(theirs.state_dict()))
    ours.param_groups[0].update(flags)
    train(theirs, range(4))
    train(ours, range(4))
    assert_same(theirs, ours)


@pytest.mark.parametrize(
    "reload", [lambda o: o.load_state_dict(saved(o.state_dict())) or o, copy.deepcopy], ids=["load", "deepcopy"]
)
def test_a_tensor_learning_rate_is_a_new_one_after_loading(reload: Any) -> None:
    results = []
    for namespace in BOTH:
        lr = torch.tensor(0.1, dtype=torch.float64)
        optimizer = namespace.Adam(tensors((3,)), lr=lr)
        train(optimizer, range(2))
        optimizer = reload(optimizer)
        lr.fill_(100.0)
        train(optimizer, range(2, 4))
        assert optimizer.param_groups[0]["lr"] is not lr
        optimizer.param_groups[0]["lr"].mul_(0.5)
        train(optimizer, range(4, 6))
        results.append(values(optimizer))
    assert difference(results[1], results[0]) <= 1e-12


def test_what_else_is_in_a_group_is_kept() -> None:
    for namespace in BOTH:
        optimizer = namespace.Adam([{"params": tensors((3,)), "name": "head", "scale": [1, 2]}])
        other = namespace.Adam(tensors((3,)))
        other.load_state_dict(saved(optimizer.state_dict()))
        assert other.param_groups[0]["name"] == "head"
        assert other.param_groups[0]["scale"] == [1, 2]
        train(other, range(1))


def test_names_of_a_checkpoint_win_as_in_torch() -> None:
    for namespace in BOTH:
        a = namespace.Adam([("a", tensors((3,))[0])])
        b = namespace.Adam([("b", tensors((3,))[0])])
        c = namespace.Adam(tensors((3,)))
        b.load_state_dict(c.state_dict())
        assert b.param_groups[0]["param_names"] == ["b"]
        b.load_state_dict(a.state_dict())
        assert b.param_groups[0]["param_names"] == ["a"]


# --------------------------------------------------------------------------------------------------- pickle, deepcopy, repr


@each_kind
@each_flags
@pytest.mark.parametrize("twin", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies(cls: str, options: Options, flags: Options, twin: Any) -> None:
    """A copy goes on as the original would have, and neither notices the other."""
    groups = [{"params": tensors((3, 2), (4,))}, {"params": tensors((2,)), "lr": 0.01}]
    original = make(optim, cls, groups, **options, **flags)
    train(original, range(4), some)
    other = twin(original)
    assert type(other) is type(original)
    assert not {x.data_ptr() for x in values(original)} & {x.data_ptr() for x in values(other)}
    before, state = copy.deepcopy(values(original)), state_of(original)
    train(other, range(4, 8), some)
    assert_equal(values(original), before)
    assert_equal(state_of(original), state)
    train(original, range(4, 8), some)
    assert_equal(values(other), values(original))
    assert_equal(state_of(other), state_of(original))
    other.zero_grad()
    other.add_param_group({"params": [torch.ones(2, requires_grad=True)]})
    assert len(original.param_groups) == 2


def test_a_model_and_its_optimizer_are_copied_together() -> None:
    model = Net()
    optimizer = optim.AdamW(model.parameters(), lr=0.1)
    fit(model, optimizer, 3)
    model2, optimizer2 = copy.deepcopy((model, optimizer))
    assert all(p is q for p, q in zip(model2.parameters(), parameters(optimizer2)))
    assert fit(model2, optimizer2, 3) == fit(model, optimizer, 3)


def test_repr() -> None:
    theirs, ours = twins("SGD", tensors((2,)), MOMENTUM, {})
    assert repr(ours) == repr(theirs).replace("dampening: 0\n", "dampening: 0.0\n")
    composed = optim.Optimizer(tensors((2,)), ps.chain(ps.clip_by_global_norm(1.0), ps.sgd(0.1, momentum=0.9)))
    text = repr(composed)
    assert text.startswith("Optimizer (\nParameter Group 0\n")
    assert "    max_norm: 1.0\n" in text
    assert "    lr: 0.1\n" in text


# --------------------------------------------------------------------------------------------------------------- schedulers


SCHEDULERS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "StepLR": ("Adam", lambda o: schedulers.StepLR(o, 3, gamma=0.5)),
    "MultiStepLR": ("Adam", lambda o: schedulers.MultiStepLR(o, [2, 5, 9])),
    "ExponentialLR": ("SGD", lambda o: schedulers.ExponentialLR(o, 0.8)),
    "CosineAnnealingLR": ("AdamW", lambda o: schedulers.CosineAnnealingLR(o, 6, eta_min=1e-3)),
    "LinearLR": ("SGD", lambda o: schedulers.LinearLR(o, 0.1, 1.0, 7)),
    "LinearLR to 0": ("SGD", lambda o: schedulers.LinearLR(o, 1.0, 0.0, 7)),
    "ConstantLR": ("SGD", lambda o: schedulers.ConstantLR(o, 0.3, 4)),
    "PolynomialLR": ("Adam", lambda o: schedulers.PolynomialLR(o, 8, power=2.0)),
    "OneCycleLR, momentum": ("SGD", lambda o: schedulers.OneCycleLR(o, max_lr=0.3, total_steps=16)),
    "OneCycleLR, betas": ("AdamW", lambda o: schedulers.OneCycleLR(o, max_lr=0.3, total_steps=16, three_phase=True)),
    "OneCycleLR per group": (
        "Adam",
        lambda o: schedulers.OneCycleLR(o, max_lr=[0.3, 0.1], total_steps=16, cycle_momentum=False),
    ),
    "CyclicLR": ("SGD", lambda o: schedulers.CyclicLR(o, 0.01, 0.2, step_size_up=3, mode="triangular2")),
    "CyclicLR, betas": ("Adam", lambda o: schedulers.CyclicLR(o, 0.01, 0.2, step_size_up=3)),
    "CosineAnnealingWarmRestarts": ("AdamW", lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3, 2)),
    "LambdaLR": ("Adam", lambda o: schedulers.LambdaLR(o, [lambda k: 0.9**k, lambda k: 1 / (k + 1)])),
    "MultiplicativeLR": ("Adam", lambda o: schedulers.MultiplicativeLR(o, lambda k: 0.9)),
    "SequentialLR": (
        "SGD",
        lambda o: schedulers.SequentialLR(o, [schedulers.LinearLR(o, 0.1, 1.0, 4), schedulers.CosineAnnealingLR(o, 8)], [4]),
    ),
    "ChainedScheduler": (
        "SGD",
        lambda o: schedulers.ChainedScheduler([schedulers.ConstantLR(o, 0.1, 4), schedulers.ExponentialLR(o, 0.9)]),
    ),
    "ReduceLROnPlateau": ("AdamW", lambda o: schedulers.ReduceLROnPlateau(o, factor=0.5, patience=1)),
}


def scheduled(namespace: Any, cls: str, schedule: Any, flags: Options, steps: int = 15) -> tuple[Any, list[Any]]:
    """An optimizer after training under a scheduler, and the options at every step."""
    options = {"lr": 0.1, "momentum": 0.9} if cls == "SGD" else {"lr": 0.1}
    groups = [{"params": tensors((3, 2), (4,))}, {"params": tensors((2,)), "lr": 0.05}]
    optimizer = make(namespace, cls, groups, **options, **flags)
    scheduler = schedule(optimizer)
    seen = []
    for k in range(steps):
        train(optimizer, range(k, k + 1))
        scheduler.step(*[1.0 / (k + 1) if k < 5 else 1.0] if isinstance(scheduler, schedulers.ReduceLROnPlateau) else [])
        seen.append([(g["lr"], g.get("momentum"), g.get("betas")) for g in optimizer.param_groups])
    return optimizer, seen


@pytest.mark.parametrize("flags", [FLAGS["default"], FLAGS["foreach"]], ids=["default", "foreach"])
@pytest.mark.parametrize(("cls", "schedule"), SCHEDULERS.values(), ids=SCHEDULERS)
@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")  # SequentialLR uses it itself
def test_torchs_schedulers(cls: str, schedule: Any, flags: Options) -> None:
    theirs, expected = scheduled(torch.optim, cls, schedule, {})
    ours, seen = scheduled(optim, cls, schedule, flags)
    assert seen == expected
    assert len({group[0] for group in (step[0] for step in seen)}) > 1, "the learning rate never changed"
    assert_same(theirs, ours)


def test_every_scheduler_of_torch_is_tested() -> None:
    names = {n for n in schedulers.__all__ if n not in ("LRScheduler", "_LRScheduler")}
    assert names <= {name.split()[0].rstrip(",") for name in SCHEDULERS}


def test_a_learning_rate_that_is_negative_by_rounding() -> None:
    def schedule(o: Any) -> Any:
        return schedulers.LinearLR(o, 0.3, 0.0, 6)

    theirs, expected = scheduled(torch.optim, "Adam", schedule, {})
    assert -1e-16 < expected[-1][0][0] < 0
    ours, seen = scheduled(optim, "Adam", schedule, {})
    assert seen == expected
    assert_same(theirs, ours)


STRUCTURAL: dict[str, Options] = {"maximize": {"maximize": True}, "amsgrad": {"amsgrad": True}}


@pytest.mark.parametrize("switch", STRUCTURAL.values(), ids=STRUCTURAL)
def test_such_a_learning_rate_in_a_group_with_a_switch(switch: Options) -> None:
    results = []
    for namespace in BOTH:
        optimizer = namespace.Adam([{"params": tensors((3, 2)), **switch}], lr=0.1)
        train(optimizer, range(2))
        optimizer.param_groups[0]["lr"] = -2e-18
        train(optimizer, range(2, 4))
        results.append(values(optimizer))
    assert difference(results[1], results[0]) <= 1e-12


def test_a_scheduler_notices_a_missing_step() -> None:
    optimizer = optim.SGD(tensors((2,)), lr=0.1)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        schedulers.StepLR(optimizer, 1).step()
    optimizer = optim.SGD(tensors((2,)), lr=0.1)
    scheduler = schedulers.StepLR(optimizer, 1)
    optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.step()


def test_optimizer_and_scheduler_resume_together() -> None:
    def fresh(params: list[Tensor]) -> Any:
        optimizer = optim.AdamW(params, lr=0.1)
        return optimizer, schedulers.OneCycleLR(optimizer, max_lr=0.3, total_steps=16)

    def run(optimizer: Any, scheduler: Any, steps: range) -> None:
        for k in steps:
            train(optimizer, range(k, k + 1))
            scheduler.step()

    straight = fresh(tensors((3,)))
    run(*straight, range(12))
    first = fresh(tensors((3,)))
    run(*first, range(6))
    second = fresh(like(parameters(first[0])))
    second[0].load_state_dict(saved(first[0].state_dict()))
    second[1].load_state_dict(first[1].state_dict())
    run(*second, range(6, 12))
    assert_equal(values(second[0]), values(straight[0]))


@pytest.mark.parametrize("use_buffers", [False, True])
def test_averaged_models_and_swalr(use_buffers: bool) -> None:
    results = []
    for namespace in BOTH:
        model = Net()
        optimizer = namespace.SGD(model.parameters(), lr=0.1, momentum=0.9)
        averaged = optim.swa_utils.AveragedModel(model, use_buffers=use_buffers)
        scheduler = optim.swa_utils.SWALR(optimizer, swa_lr=0.05, anneal_epochs=4)
        for _ in range(8):
            fit(model, optimizer, 1)
            averaged.update_parameters(model)
            scheduler.step()
        assert optimizer.param_groups[0]["lr"] == 0.05
        results.append(weights(averaged) + weights(model))
    assert difference(results[1], results[0]) <= 1e-12


@each_flags
@pytest.mark.parametrize("clip", [False, True], ids=["", "unscaled and clipped"])
def test_gradient_scaling(flags: Options, clip: bool) -> None:
    """Steps whose gradients overflow are skipped, and the scale is halved."""
    results = []
    for namespace in BOTH:
        params = [p.float().detach().requires_grad_() for p in tensors((3, 2), (4,))]
        optimizer = namespace.AdamW(params, lr=0.1, **(flags if namespace is optim else {}))
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=3)
        scales = []
        for k in range(8):
            optimizer.zero_grad()
            loss = sum(((p - k) ** 2).sum() for p in params)
            if k == 3:
                loss = loss * float("inf")
            scaler.scale(loss).backward()
            if clip:
                scaler.unscale_(optimizer)
                clip_grad_norm_(params, 1.0)
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        results.append(([p.detach() for p in params], scales, [optimizer.state[p]["step"].item() for p in params]))
    assert results[1][1:] == results[0][1:]
    assert results[1][2] == [7, 7]
    assert difference(results[1][0], results[0][0]) <= 1e-5


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@pytest.mark.parametrize("flags", [FLAGS["default"], FLAGS["loop"], FLAGS["fused"]], ids=["default", "loop", "fused"])
@each_kind
def test_a_tensor_as_learning_rate(cls: str, options: Options, flags: Options, shape: tuple[int, ...]) -> None:
    """Writing to it takes effect; it is never replaced."""
    results = []
    for namespace in BOTH:
        lr = torch.full(shape, 0.1, dtype=torch.float64)
        optimizer = make(
            namespace, cls, tensors((3, 2), (4,), ()), **{**options, "lr": lr}, **(flags if namespace is optim else {})
        )
        for k in range(6):
            train(optimizer, range(k, k + 1))
            lr.mul_(0.7)
        assert optimizer.param_groups[0]["lr"] is lr
        results.append(values(optimizer))
    assert difference(results[1], results[0]) <= 1e-12


def test_a_scheduler_writes_to_a_tensor_learning_rate() -> None:
    results = []
    for namespace in BOTH:
        lr = torch.tensor(0.1, dtype=torch.float64)
        optimizer = namespace.Adam(tensors((3, 2)), lr=lr)
        scheduler = schedulers.ExponentialLR(optimizer, 0.5)
        for k in range(5):
            train(optimizer, range(k, k + 1))
            scheduler.step()
        assert optimizer.param_groups[0]["lr"] is lr
        assert lr == pytest.approx(0.1 / 32)
        results.append(values(optimizer))
    assert difference(results[1], results[0]) <= 1e-12


# ---------------------------------------------------------------------------------------------------- composed transforms


def decay_mask(path: str, p: Tensor) -> bool:
    return path.endswith("weight")


def is_matrix(path: str, p: Tensor) -> bool:
    return p.ndim > 1


class SeenState(NamedTuple):
    """Something per parameter, and something for all of them together."""

    total: list[Tensor]
    seen: Tensor

    @classmethod
    def init(cls, params: list[Tensor]) -> SeenState:
        return cls([torch.zeros_like(p) for p in params], torch.zeros(()))


@ps.whole(SeenState)
def running_mean(gs: list[Tensor], s: SeenState, params: list[Tensor], decay: float) -> tuple[list[Tensor], SeenState]:
    """The decayed sum of all gradients, by their number; the updates and the state share memory."""
    total = [decay * t + g / (1 + s.seen) for t, g in zip(s.total, gs)]
    return total, SeenState(total, s.seen + 1)


CHAINS: dict[str, Callable[[], ps.Transform]] = {
    "clip, adamw": lambda: ps.chain(ps.clip_by_global_norm(0.5), ps.adamw(0.1, weight_decay=0.1)),
    "masked decay": lambda: ps.chain(
        ps.scale_by_adam(), ps.add_decayed_weights(0.1, is_matrix), ps.scale_by_learning_rate(0.1)
    ),
    "masked trace first": lambda: ps.chain(ps.masked(ps.trace(0.9), is_matrix), ps.scale_by_adam(), ps.scale(-0.1)),
    "two traces": lambda: ps.chain(ps.trace(0.5), ps.trace(0.9, dampening=0.1, nesterov=True), ps.scale_by_learning_rate(0.1)),
    "schedule": lambda: ps.adamw(ps.schedules.warmup_cosine(0.1, warmup_steps=3, total_steps=12)),
    "scheduled clip": lambda: ps.chain(ps.clip_by_global_norm(ps.schedules.linear(0.1, 2.0, total_steps=5)), ps.sgd(0.1)),
    "whole with state": lambda: ps.chain(running_mean(0.9), ps.scale_by_adam(), ps.scale_by_learning_rate(0.1)),
    "whole at the end": lambda: ps.chain(ps.sgd(0.1, momentum=0.9), ps.clip_by_global_norm(0.05)),
    "nothing but a whole": lambda: ps.chain(ps.scale(-0.1), running_mean(0.5)),
    "masked clip": lambda: ps.chain(ps.masked(ps.clip_by_global_norm(0.1), is_matrix), ps.sgd(0.1)),
    "masked whole with state": lambda: ps.chain(ps.masked(running_mean(0.5), is_matrix), ps.adamw(0.1)),
    "masked chain": lambda: ps.chain(ps.masked(ps.chain(ps.trace(0.9), ps.scale(0.5)), is_matrix), ps.scale(-0.1)),
    "ends in sgd": lambda: ps.chain(ps.clip(0.3), ps.sgd(0.1, momentum=0.9, nesterov=True)),
}
each_chain = pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)


def composed_params() -> dict[str, Tensor]:
    names = ["hidden.weight", "hidden.bias", "temperature", "out.weight"]
    return dict(zip(names, tensors((3, 2), (4,), (), (2, 2))))


def pure(transform: ps.Transform, params: dict[str, Tensor], steps: range, skip: Any = None) -> tuple[dict[str, Tensor], Any]:
    """The same training without an object."""

    class Holder:  # what give_grads needs of an optimizer
        param_groups: Any

    params = {k: p.detach().clone() for k, p in params.items()}
    state = transform.init_state(params)
    for k in steps:
        holder = Holder()
        leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
        holder.param_groups = [{"params": list(leaves.values())}]
        give_grads(holder, k, skip)
        params, state = transform.step({n: p.grad for n, p in leaves.items()}, state, params)
    return params, state


@each_chain
@each_executor
@pytest.mark.parametrize("skip", [None, some], ids=["all", "some"])
@pytest.mark.parametrize("split", [False, True], ids=["one group", "two groups"])
def test_a_composed_transform_is_the_pure_one(chain: Any, flags: Options, skip: Any, split: bool) -> None:
    params = composed_params()
    expected, _ = pure(chain(), params, range(8), skip)
    named = list(params.items())
    groups = [{"params": named[:2]}, {"params": named[2:]}] if split else named
    optimizer = optim.Optimizer(groups, chain(), **flags)
    train(optimizer, range(8), skip)
    assert difference(values(optimizer), list(expected.values())) <= 1e-12


@each_executor
def test_a_masked_transform_with_state_behind_another(flags: Options) -> None:
    chain = ps.chain(ps.scale_by_adam(), ps.masked(ps.trace(0.9), is_matrix), ps.scale(-0.1))
    params = composed_params()
    expected, _ = pure(chain, params, range(5))
    optimizer = optim.Optimizer(list(params.items()), chain, **flags)
    train(optimizer, range(5))
    assert [optimizer.state[p]["step"].item() for p in parameters(optimizer)] == [5, 5, 5, 5]
    assert difference(values(optimizer), list(expected.values())) <= 1e-12


@each_flags
@pytest.mark.parametrize("skip", [None, some], ids=["all", "some"])
def test_clipping_is_over_all_groups_together(flags: Options, skip: Any) -> None:
    params = tensors((3, 2), (4,), (), (2, 2))
    theirs = torch.optim.AdamW(in_groups(params, [{}, {"lr": 0.01}]), lr=0.1)
    ours = optim.Optimizer(
        in_groups(params, [{}, {"lr": 0.01}]), ps.chain(ps.clip_by_global_norm(0.5), ps.adamw(lr=0.1)), **flags
    )
    for k in range(10):
        give_grads(theirs, k, skip)
        clip_grad_norm_(parameters(theirs), 0.5)
        theirs.step()
        train(ours, range(k, k + 1), skip)
    assert_same(theirs, ours)


CLIPPED: dict[str, tuple[str, list[Options], dict[int, Options]]] = {
    "momentum in one": ("SGD", [{}, {"momentum": 0.9}], {}),
    "momentum on and off": ("SGD", [{}, {"momentum": 0.9}], {4: {"momentum": 0.9}, 8: {"momentum": 0.0}}),
    "decay in one": ("AdamW", [{"weight_decay": 0.0}, {"weight_decay": 0.1}], {4: {"weight_decay": 0.1}}),
    "numbers": ("AdamW", [{"betas": (0.5, 0.9), "eps": 1e-3}, {"lr": 0.01}], {4: {"lr": 0.05, "betas": (0.8, 0.9)}}),
}


@each_flags
@pytest.mark.parametrize(("cls", "groups", "changes"), CLIPPED.values(), ids=CLIPPED)
def test_groups_that_are_clipped_together_keep_their_options(
    cls: str, groups: list[Options], changes: dict[int, Options], flags: Options
) -> None:
    params = tensors((3, 2), (4,), (), (2, 2))
    theirs = getattr(torch.optim, cls)(in_groups(params, groups), lr=0.1)
    transform = {"SGD": ps.sgd, "AdamW": ps.adamw}[cls](lr=0.1)
    ours = optim.Optimizer(in_groups(params, groups), ps.chain(ps.clip_by_global_norm(0.5), transform), **flags)
    for k in range(12):
        for optimizer in (theirs, ours):
            optimizer.param_groups[0 if k < 8 else 1].update(changes.get(k, {}))
        give_grads(theirs, k)
        clip_grad_norm_(parameters(theirs), 0.5)
        theirs.step()
        train(ours, range(k, k + 1))
    assert_same(theirs, ours)


def test_groups_that_disagree_about_what_concerns_all_are_refused() -> None:
    a, b = tensors((3,), (4,))
    chain = ps.chain(ps.clip_by_global_norm(1.0), ps.sgd(0.1))
    with pytest.raises(ValueError, match="max_norm"):
        train(optim.Optimizer([{"params": [a]}, {"params": [b], "max_norm": 2.0}], chain), range(1))


@each_executor
def test_clipping_with_a_parameter_that_thaws(flags: Options) -> None:
    params = tensors((3, 2), (4,), (), (2, 2))
    params[3].requires_grad_(False)
    theirs = torch.optim.AdamW(in_groups(params, [{}, {}]), lr=0.1)
    ours = optim.Optimizer(
        in_groups(params, [{}, {}]), ps.chain(ps.clip_by_global_norm(0.5), running_mean(0.0), ps.adamw(lr=0.1)), **flags
    )
    for k in range(10):
        if k == 5:
            for optimizer in (theirs, ours):
                parameters(optimizer)[3].requires_grad_(True)
        give_grads(theirs, k)
        clip_grad_norm_(parameters(theirs), 0.5)
        for p in parameters(theirs):  # what running_mean(0.0) does
            if p.grad is not None:
                p.grad /= k + 1
        theirs.step()
        train(ours, range(k, k + 1))
    assert_same(theirs, ours)


@each_flags
def test_a_mask_is_asked_with_the_names(flags: Options) -> None:
    """Decay by name is two parameter groups in torch."""
    paths = []

    def mask(path: str, p: Tensor) -> bool:
        paths.append(path)
        return path.endswith("weight")

    theirs, ours = Net(), Net()
    named = dict(theirs.named_parameters())
    a = torch.optim.AdamW(
        [
            {"params": [p for n, p in named.items() if n.endswith("weight")], "weight_decay": 0.1},
            {"params": [p for n, p in named.items() if not n.endswith("weight")], "weight_decay": 0.0},
        ],
        lr=0.1,
    )
    chain = ps.chain(ps.scale_by_adam(), ps.add_decayed_weights(0.1, mask), ps.scale_by_learning_rate(0.1))
    b = optim.Optimizer(ours.named_parameters(), chain, **flags)
    fit(theirs, a)
    fit(ours, b)
    assert set(paths) == set(named)
    assert difference(weights(ours), weights(theirs)) <= 1e-12


@pytest.mark.parametrize("mask", [lambda path, p: path == "1", [False, True, False]], ids=["function", "list"])
def test_without_names_a_path_is_a_number(mask: Any) -> None:
    params = [torch.ones(2, requires_grad=True) for _ in range(3)]
    optimizer = optim.Optimizer(params, ps.chain(ps.add_decayed_weights(0.5, mask), ps.scale(-1.0)))
    for p in params:
        p.grad = torch.zeros(2)
    optimizer.step()
    assert [p[0].item() for p in params] == [1.0, 0.5, 1.0]


def test_a_mask_by_name() -> None:
    params = {"a": torch.ones(2, requires_grad=True), "b": torch.ones(2, requires_grad=True)}
    optimizer = optim.Optimizer(params.items(), ps.chain(ps.add_decayed_weights(0.5, {"a": False, "b": True}), ps.scale(-1.0)))
    for p in params.values():
        p.grad = torch.zeros(2)
    optimizer.step()
    assert [p[0].item() for p in params.values()] == [1.0, 0.5]


@pytest.mark.parametrize("mask", [{"a": True, "b": False}, {"b": True, "a": False}], ids=str)
def test_a_mask_by_name_over_two_groups(mask: Any) -> None:
    params = dict(zip("ab", tensors((2,), (3,))))
    chain = ps.chain(ps.masked(ps.trace(0.9), mask), ps.scale(-0.1))
    expected, _ = pure(chain, params, range(3))
    optimizer = optim.Optimizer([{"params": [item]} for item in params.items()], chain)
    train(optimizer, range(3))
    assert difference(values(optimizer), list(expected.values())) <= 1e-12


def test_a_mask_that_answers_nonsense_is_told_so() -> None:
    with pytest.raises(TypeError, match="'a'"):
        optim.Optimizer([("a", tensors((2,))[0])], ps.chain(ps.masked(ps.trace(0.9), lambda path, p: 1), ps.scale(-0.1)))


def test_ambiguous_names_are_qualified() -> None:
    chain = ps.chain(ps.scale(2.0), ps.trace(0.9), ps.scale(-0.1))
    optimizer = optim.Optimizer([{"params": tensors((2,))}, {"params": tensors((3,)), "2.factor": -0.2}], chain)
    assert [g["0.factor"] for g in optimizer.param_groups] == [2.0, 2.0]
    assert [g["2.factor"] for g in optimizer.param_groups] == [-0.1, -0.2]
    assert optimizer.param_groups[0]["momentum"] == 0.9
    assert "factor" not in optimizer.param_groups[0]
    optimizer.param_groups[0]["0.factor"] = 4.0
    give_grads(optimizer, 0)
    before = copy.deepcopy(values(optimizer))
    optimizer.step()
    for p, x, factor in zip(parameters(optimizer), before, (-0.4, -0.4)):
        assert p.grad is not None
        torch.testing.assert_close(p.detach(), x + factor * p.grad)


def test_maximize_renames_nothing() -> None:
    chain = ps.chain(ps.scale(-2.0), ps.scale(0.1))
    optimizer = optim.Optimizer([{"params": tensors((2,)), "1.factor": 0.2}], chain, maximize=True)
    before = values(optimizer)[0].clone()
    give_grads(optimizer, 0)
    optimizer.step()
    torch.testing.assert_close(values(optimizer)[0], before + 0.4 * parameters(optimizer)[0].grad)


@each_flags
def test_maximize_climbs(flags: Options) -> None:
    theirs = torch.optim.AdamW(tensors((3, 2)), maximize=True, **ADAM)
    ours = optim.Optimizer(tensors((3, 2)), ps.adamw(**ADAM), maximize=True, **flags)
    train(theirs, range(5))
    train(ours, range(5))
    assert_same(theirs, ours)


@pytest.mark.parametrize("lr", [1, np.float32(0.1), np.float64(0.1), np.int64(1)], ids=lambda x: type(x).__name__)
def test_numbers_of_all_kinds(lr: Any) -> None:
    theirs, ours = twins("SGD", tensors((3, 2)), {"lr": lr, "momentum": 0.5}, {})
    train(theirs, range(3))
    train(ours, range(3))
    assert_same(theirs, ours)


def test_a_captured_step_reads_the_learning_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU there are no graphs: what one would capture is a step that finds its learning rate in a tensor."""
    monkeypatch.setattr("purestep._optimizer.options.captures", lambda p: True)
    for make in (
        lambda p: optim.AdamW(p, lr=0.5, capturable=True),
        lambda p: optim.Optimizer(p, ps.chain(ps.clip_by_global_norm(9.0), ps.sgd(lr=0.5, momentum=0.9)), capturable=True),
    ):
        p = nn.Parameter(torch.ones(3))
        optimizer = make([p])
        p.grad = torch.ones(3)
        optimizer.step()
        (transform,) = optimizer._options.transforms(optimizer.param_groups)
        rate = transform.hyperparams["lr"]
        assert isinstance(rate, Tensor)
        assert optimizer.param_groups[0]["lr"] == 0.5  # as torch has it
        optimizer.param_groups[0]["lr"] = 0.25
        with monkeypatch.context() as patch:
            patch.setattr("purestep._optimizer.options.capturing", lambda: True)
            optimizer.step()
            assert rate == 0.5
        optimizer.param_groups[0]["lr"] = 0.125
        optimizer.refresh()
        assert rate == 0.125
        assert optimizer._options.transforms(optimizer.param_groups)[0].hyperparams["lr"] is rate
        copy = pickle.loads(pickle.dumps(optimizer))
        copy.step()
        assert copy._options.transforms(copy.param_groups)[0].hyperparams["lr"] == 0.125


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"fused": False}, {"compile": True}], ids=str)
@pytest.mark.parametrize("cls", ["AdamW", "SGD", "NAdam"])
def test_a_cuda_graph_follows_the_learning_rate(cls: str, options: Options) -> None:
    """What is replayed is what would have been computed: the counters go on, and so does the learning rate."""
    if cls == "NAdam":
        options = {k: x for k, x in options.items() if k != "fused"}
    capturable = {} if cls == "SGD" else {"capturable": True}
    replayed, usual = (nn.Parameter(torch.linspace(-1, 1, 1000, device="cuda")) for _ in range(2))
    a = optim.Optimizer([replayed], ps.sgd(lr=0.1), capturable=True) if cls == "SGD" else None
    first = a or getattr(optim, cls)([replayed], lr=0.1, **capturable, **options)
    second = optim.Optimizer([usual], ps.sgd(lr=0.1)) if cls == "SGD" else getattr(optim, cls)([usual], lr=0.1, **options)
    for p in (replayed, usual):
        p.grad = torch.cos(p.detach())
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            first.step()
            second.step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first.step()
    for lr in (0.1, 0.05, 0.01):
        for optimizer in (first, second):
            optimizer.param_groups[0]["lr"] = lr
        first.refresh()
        graph.replay()
        second.step()
    torch.testing.assert_close(replayed, usual, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cls", ["Adam", "AdamW"])
def test_capturable_changes_nothing_on_a_cpu(cls: str) -> None:
    theirs, ours = twins(cls, tensors((3, 2), (4,)), ADAM, {"capturable": True})
    assert ours.param_groups[0]["capturable"] is True
    train(theirs, range(4))
    train(ours, range(4))
    assert_same(theirs, ours)


def test_hyperparameters_are_options_of_the_groups() -> None:
    """They can be scheduled and changed as torch's can."""
    theirs = torch.optim.AdamW(tensors((3, 2)), **ADAM)
    ours = optim.Optimizer(tensors((3, 2)), ps.adamw(**ADAM))
    for optimizer in (theirs, ours):
        scheduler = schedulers.OneCycleLR(optimizer, max_lr=0.3, total_steps=12)
        for k in range(10):
            train(optimizer, range(k, k + 1))
            scheduler.step()
            optimizer.param_groups[0]["weight_decay"] = 0.1 * (k % 2)
    assert_same(theirs, ours)


@each_executor
@pytest.mark.parametrize("cls", ["SGD", "Adam", "AdamW"])
def test_a_schedule_as_learning_rate_of_a_class(cls: str, flags: Options) -> None:
    schedule = ps.schedules.cosine(0.1, total_steps=8)
    theirs = getattr(torch.optim, cls)(tensors((3, 2), (4,)), lr=0.1)
    ours = getattr(optim, cls)(tensors((3, 2), (4,)), lr=schedule, **flags)
    for k in range(8):
        theirs.param_groups[0]["lr"] = schedule(k)
        train(theirs, range(k, k + 1))
        train(ours, range(k, k + 1))
    assert_same(theirs, ours)


def test_a_schedule_counts_each_parameters_own_updates() -> None:
    params = tensors((3,), (3,))
    optimizer = optim.Optimizer(params, ps.sgd(ps.schedules.linear(1.0, 0.0, total_steps=4)))
    for skip in (None, lambda k, i: i == 1, None):
        before = copy.deepcopy(values(optimizer))
        give_grads(optimizer, 0, skip)
        optimizer.step()
    for p, x, lr in zip(params, before, (0.5, 0.75)):
        assert p.grad is not None
        torch.testing.assert_close(p.detach(), x - lr * p.grad)


@each_chain
@each_executor
def test_the_state_of_a_chain_survives_its_state_dict(chain: Any, flags: Options) -> None:
    params = composed_params()
    expected, _ = pure(chain(), params, range(10), some)
    first = optim.Optimizer(params.items(), chain(), **flags)
    train(first, range(5), some)
    second = optim.Optimizer(zip(params, like(parameters(first))), chain(), **flags)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=False))  # a schedule in a group is not a weight
    train(second, range(5, 10), some)
    assert difference(values(second), list(expected.values())) <= 1e-12


@pytest.mark.parametrize(
    "chain", [v for k, v in CHAINS.items() if "schedule" not in k], ids=[k for k in CHAINS if "schedule" not in k]
)
def test_without_schedules_a_state_dict_is_weights_only(chain: Any) -> None:
    optimizer = optim.Optimizer(composed_params().items(), chain())
    train(optimizer, range(2))
    state_dict = optimizer.state_dict()
    assert_equal(saved(state_dict)["state"], state_dict["state"])


@each_chain
@each_executor
@pytest.mark.parametrize("twin", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_of_composed_optimizers(chain: Any, flags: Options, twin: Any) -> None:
    original = optim.Optimizer(composed_params().items(), chain(), **flags)
    train(original, range(4), some)
    other = twin(original)
    before = copy.deepcopy(values(original))
    train(other, range(4, 8), some)
    assert_equal(values(original), before)
    train(original, range(4, 8), some)
    assert_equal(values(other), values(original))


def test_the_state_of_a_whole_transform() -> None:
    params = tensors((3,), (2, 2))
    optimizer = optim.Optimizer(params, ps.chain(running_mean(0.9), ps.scale(-0.1)))
    train(optimizer, range(3))
    assert [set(optimizer.state[p]) for p in params] == [{"total", "shared.seen"}, {"total"}]
    assert optimizer.state.keys() == set(params)  # as torch's tools expect it
    assert_equal(dict(optimizer.shared), {"seen": torch.tensor(3.0)})
    state = optimizer.state_dict()["state"]
    assert set(state[0]) == {"total", "shared.seen"}


class CountState(NamedTuple):
    """How many parameters there are."""

    number: Tensor

    @classmethod
    def init(cls, params: list[Tensor]) -> CountState:
        return cls(torch.tensor(float(len(params))))


@ps.whole(CountState)
def divide_by_number(gs: list[Tensor], s: CountState, params: list[Tensor]) -> tuple[list[Tensor], CountState]:
    return [g / s.number for g in gs], s


def test_a_whole_transform_begins_with_all_parameters() -> None:
    optimizer = optim.Optimizer([{"params": [p]} for p in tensors((2,), (3,))], ps.chain(divide_by_number(), ps.scale(-1.0)))
    before = copy.deepcopy(values(optimizer))
    give_grads(optimizer, 0)
    optimizer.step()
    for p, x in zip(parameters(optimizer), before):
        assert p.grad is not None
        torch.testing.assert_close(p.detach(), x - p.grad / 2)


def test_two_links_of_one_kind_have_states_of_their_own() -> None:
    (p,) = tensors((3,))
    optimizer = optim.Optimizer([p], CHAINS["two traces"]())
    train(optimizer, range(3))
    state = optimizer.state[p]
    assert set(state) == {"step", "0.momentum_buffer", "1.momentum_buffer"}
    assert not torch.equal(state["0.momentum_buffer"], state["1.momentum_buffer"])
    assert optimizer.param_groups[0]["0.momentum"] == 0.5
    assert optimizer.param_groups[0]["1.momentum"] == 0.9


@pytest.mark.parametrize(
    "transform", [None, "adamw", ps.adamw, torch.optim.AdamW, 0.1], ids=["None", "name", "factory", "class", "number"]
)
def test_only_transforms_are_transforms(transform: Any) -> None:
    with pytest.raises(TypeError, match="transform"):
        optim.Optimizer(tensors((2,)), transform)


def test_fused_is_refused_where_no_kernel_fits() -> None:
    optimizer = optim.Optimizer(tensors((2,)), ps.chain(ps.scale_by_adam(), ps.scale(-0.1)), fused=True)
    before = values(optimizer)[0].clone()
    give_grads(optimizer, 0)
    with pytest.raises(RuntimeError, match=r"A fused step .* needs a chain"):
        optimizer.step()
    assert_equal(values(optimizer)[0], before)


# ---------------------------------------------------------------------------------------------------------------- bad input


def one() -> list[Tensor]:
    return tensors((2,))


BAD: dict[str, tuple[Callable[[Any], Any], str]] = {
    "no parameters": (lambda o: o.SGD([]), "empty parameter list"),
    "an empty generator": (lambda o: o.Adam(p for p in ()), "empty parameter list"),
    "a set": (lambda o: o.SGD([{"params": set(one())}]), "sets"),
    "a bare tensor": (lambda o: o.Adam(one()[0]), "iterable"),
    "None": (lambda o: o.Adam(None), ""),
    "a number": (lambda o: o.SGD([1.0]), "Tensors"),
    "names only": (lambda o: o.SGD(["weight"]), "Tensors"),
    "some names": (lambda o: o.SGD([("a", one()[0]), *one()]), "names"),
    "a group without params": (lambda o: o.SGD([{"lr": 0.1}]), "params"),
    "a number as a group": (lambda o: o.SGD([{"params": one()}, 1.0]), ""),
    "not a leaf": (lambda o: o.SGD([one()[0] * 2]), "non-leaf"),
    "two groups with one parameter": (lambda o: o.SGD([{"params": x} for x in [one()] * 2]), "more than one parameter group"),
    "a negative lr": (lambda o: o.SGD(one(), lr=-0.1), "lr|learning rate"),
    "adam: a negative lr": (lambda o: o.Adam(one(), lr=-0.1), "lr|learning rate"),
    "adam: NaN lr": (lambda o: o.Adam(one(), lr=float("nan")), "lr|learning rate"),
    "adamw: NaN lr": (lambda o: o.AdamW(one(), lr=float("nan")), "lr|learning rate"),
    "lr: a word": (lambda o: o.SGD(one(), lr="fast"), ""),
    "lr: None": (lambda o: o.AdamW(one(), lr=None), ""),
    "beta 1 of 1": (lambda o: o.Adam(one(), betas=(1.0, 0.9)), "beta"),
    "beta 2 of 1": (lambda o: o.AdamW(one(), betas=(0.9, 1.0)), "beta"),
    "a negative beta": (lambda o: o.Adam(one(), betas=(-0.1, 0.9)), "beta"),
    "a NaN beta": (lambda o: o.Adam(one(), betas=(0.9, float("nan"))), "beta"),
    "a negative eps": (lambda o: o.Adam(one(), eps=-1e-8), "eps"),
    "a NaN eps": (lambda o: o.AdamW(one(), eps=float("nan")), "eps"),
    "sgd: a negative decay": (lambda o: o.SGD(one(), weight_decay=-0.1), "weight_decay"),
    "adam: a negative decay": (lambda o: o.Adam(one(), weight_decay=-0.1), "weight_decay"),
    "adamw: a negative decay": (lambda o: o.AdamW(one(), weight_decay=-0.1), "weight_decay"),
    "a negative momentum": (lambda o: o.SGD(one(), momentum=-0.1), "momentum"),
    "nesterov alone": (lambda o: o.SGD(one(), nesterov=True), "Nesterov momentum requires"),
    "nesterov and dampening": (
        lambda o: o.SGD(one(), momentum=0.9, dampening=0.1, nesterov=True),
        "Nesterov momentum requires",
    ),
    "adam: fused and foreach": (lambda o: o.Adam(one(), fused=True, foreach=True), "fused.*foreach"),
    "sgd: fused and foreach": (lambda o: o.SGD(one(), fused=True, foreach=True), "fused.*foreach"),
    "adamw: fused and differentiable": (lambda o: o.AdamW(one(), fused=True, differentiable=True), "fused.*differentiable"),
    "an unknown argument": (lambda o: o.SGD(one(), nesterow=True), "nesterow"),
    "added: a parameter there already": (lambda o: add_twice(o), "more than one parameter group"),
    "added: without names": (lambda o: add_unnamed(o), "names"),
    "added: a set": (lambda o: o.SGD(one()).add_param_group({"params": set(one())}), "sets"),
    "added: not a dict": (lambda o: o.SGD(one()).add_param_group(one()), "dict"),
    "loaded: an empty dict": (lambda o: o.SGD(one()).load_state_dict({}), "param_groups"),
}


def add_twice(namespace: Any) -> None:
    params = one()
    namespace.SGD(params).add_param_group({"params": params})


def add_unnamed(namespace: Any) -> None:
    namespace.SGD([("a", one()[0])]).add_param_group({"params": one()})


@pytest.mark.parametrize(("call", "match"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_with_torchs_types(call: Any, match: str) -> None:
    with pytest.raises(Exception) as theirs:  # whatever it is
        call(torch.optim)
    with pytest.raises(Exception, match=f"(?i){match}") as ours:
        call(optim)
    assert ours.type is theirs.type


def test_a_learning_rate_of_two_numbers() -> None:
    for namespace in BOTH:
        with pytest.raises(ValueError, match=r"1-element|one number"):
            namespace.SGD(one(), lr=torch.tensor([0.1, 0.2]))


@pytest.mark.parametrize("name", ["lr", "momentum", "weight_decay"])
def test_nan_is_refused_even_where_torch_takes_it(name: str) -> None:
    torch.optim.SGD(one(), **{name: float("nan")})
    with pytest.raises(ValueError, match=name):
        optim.SGD(one(), **{name: float("nan")})


def test_duplicates_in_a_group_are_warned_of() -> None:
    params = one() * 2
    for namespace in BOTH:
        with pytest.warns(UserWarning, match="duplicate parameters"):
            namespace.SGD(params[:1] * 2, lr=0.1)


def test_duplicates_in_a_group_are_updated_twice() -> None:
    results = []
    for namespace in BOTH:
        with pytest.warns(UserWarning, match="duplicate parameters"):
            optimizer = namespace.SGD(one() * 2, lr=0.1, foreach=False)
        train(optimizer, range(3))
        results.append(values(optimizer))
    assert difference(results[1], results[0]) <= 1e-12


@pytest.mark.parametrize("namespace", BOTH, ids=["torch", "purestep"])
def test_sparse_gradients_are_refused(namespace: Any) -> None:
    embedding = nn.Embedding(4, 2, sparse=True)
    optimizer = namespace.Adam(embedding.named_parameters(), lr=0.1)
    embedding(torch.tensor([1])).sum().backward()
    before = embedding.weight.detach().clone()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert_equal(embedding.weight.detach(), before)


def test_the_refusal_of_a_sparse_gradient_names_it() -> None:
    embedding = nn.Embedding(4, 2, sparse=True)
    optimizer = optim.AdamW(embedding.named_parameters(), lr=0.1)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"'weight' is sparse.*sparse=False"):
        optimizer.step()


def test_an_option_of_the_wrong_type_is_refused_at_the_next_step() -> None:
    optimizer = optim.Adam(tensors((3,)), lr=0.1)
    train(optimizer, range(2))
    before, state = copy.deepcopy(values(optimizer)), state_of(optimizer)
    for name, wrong in (("lr", "fast"), ("betas", (0.9, "0.99")), ("eps", None)):
        right = optimizer.param_groups[0][name]
        optimizer.param_groups[0][name] = wrong
        with pytest.raises(TypeError, match=name):
            train(optimizer, range(2, 3))
        optimizer.param_groups[0][name] = right
    assert_equal(values(optimizer), before)
    assert_equal(state_of(optimizer), state)


# ------------------------------------------------------------------------------------------------------ memory and autograd


@each_kind
@each_flags
def test_memory_is_reused(cls: str, options: Options, flags: Options) -> None:
    """Parameters and their state stay where they are; only the counters, one number each, may be new."""
    optimizer = make(optim, cls, tensors((3, 2), (4,), (), (0,)), **options, **flags)

    def held() -> list[Tensor]:
        state = [x for p in parameters(optimizer) for name, x in optimizer.state.get(p, {}).items() if name != "step"]
        return parameters(optimizer) + state

    train(optimizer, range(1))
    before = [(x, x.data_ptr()) for x in held()]
    train(optimizer, range(1, 5))
    after = held()
    assert len(after) == len(before)
    for x, (y, pointer) in zip(after, before):
        assert x is y
        assert x.data_ptr() == pointer


@each_kind
@each_flags
@pytest.mark.parametrize("create_graph", [False, True])
def test_no_graph_is_recorded(cls: str, options: Options, flags: Options, create_graph: bool) -> None:
    params = tensors((3, 2), (4,))
    optimizer = make(optim, cls, params, **options, **flags)
    for _ in range(3):
        loss = sum((p**3).sum() for p in params)
        for p, g in zip(params, torch.autograd.grad(loss, params, create_graph=create_graph)):
            p.grad = g
        optimizer.step()
    for p in params:
        assert p.is_leaf
        assert p.requires_grad
        assert p.grad_fn is None
        assert not any(x.requires_grad for x in optimizer.state.get(p, {}).values())


@each_kind
@each_flags
def test_no_grad_makes_no_difference(cls: str, options: Options, flags: Options) -> None:
    inside, outside = (make(optim, cls, tensors((3, 2), (4,)), **options, **flags) for _ in range(2))
    with torch.no_grad():
        train(inside, range(4))
        assert not torch.is_grad_enabled()
    train(outside, range(4))
    assert torch.is_grad_enabled()
    assert_equal(values(inside), values(outside))


@each_kind
@each_flags
def test_gradients_are_not_changed(cls: str, options: Options, flags: Options) -> None:
    optimizer = make(optim, cls, tensors((3, 2), (4,), ()), **options, maximize=True, **flags)
    for k in range(3):
        give_grads(optimizer, k)
        held = [(p, p.grad, p.grad._version, p.grad.clone()) for p in parameters(optimizer) if p.grad is not None]
        optimizer.step()
        for p, g, version, value in held:
            assert p.grad is g
            assert g._version == version
            assert torch.equal(g, value)


VERSIONS: dict[str, Any] = {k: functools.partial(getattr(optim, cls), **options) for k, (cls, options) in KINDS.items()}
VERSIONS |= {name: functools.partial(optim.Optimizer, transform=chain()) for name, chain in CHAINS.items()}


@each_executor
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("build", VERSIONS.values(), ids=VERSIONS)
def test_autograd_notices_a_step_between_forward_and_backward(build: Any, flags: Options, dtype: torch.dtype) -> None:
    params = tensors((3, 2), (4,), dtype=dtype)
    optimizer = build(params, **flags)
    for k in range(2):
        versions = [p._version for p in params]
        losses = [(p * p.conj()).sum().abs() for p in params]
        give_grads(optimizer, k)
        optimizer.step()
        assert all(p._version > version for p, version in zip(params, versions))
        for loss in losses:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()


def test_autograd_notices_a_fused_step() -> None:
    optimizer = optim.AdamW(tensors((3, 2), (4,)), fused=True)
    losses = [(p**2).sum() for p in parameters(optimizer)]
    train(optimizer, range(1))
    for loss in losses:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_parameter_without_gradient_is_not_touched() -> None:
    params = tensors((3, 2), (4,))
    optimizer = optim.AdamW(params)
    loss = (params[1] ** 2).sum()
    train(optimizer, range(2), lambda k, i: i == 1)
    loss.backward()
    assert_equal(params[1].grad, 2 * params[1].detach())


# ----------------------------------------------------------------------------------------------------------- differentiable


def number(x: float) -> Tensor:
    return torch.tensor(x, dtype=torch.float64, requires_grad=True)


def hypergradients(namespace: Any, cls: str, steps: int, **options: Any) -> list[Tensor]:
    """The derivatives of a loss after some steps with respect to the tensors in `options`, the gradients and the parameters."""
    leaves = tensors((3, 2), (4,))
    params = [leaf.clone() for leaf in leaves]
    optimizer = make(namespace, cls, params, **options, differentiable=True)
    hypers = [x for x in options.values() if isinstance(x, Tensor)]
    inputs = [*hypers, *leaves]
    for k in range(steps):
        for i, p in enumerate(params):
            g = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * k + i), dtype=p.dtype).requires_grad_()
            p.grad = g.clone()
            inputs.append(g)
        optimizer.step()
    assert all(p is q for p, q in zip(params, parameters(optimizer)))
    assert all(p.grad_fn is not None for p in params)
    loss = sum((p**2).sum() for p in params)
    return [
        torch.zeros_like(x) if g is None else g for x, g in zip(inputs, torch.autograd.grad(loss, inputs, allow_unused=True))
    ]


DIFFERENTIABLE: dict[str, tuple[str, Options]] = {
    "sgd": ("SGD", {}),
    "momentum": ("SGD", {"momentum": 0.9}),
    "nesterov": ("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "adam": ("Adam", {"eps": 1e-3, "weight_decay": 0.1}),
    "amsgrad": ("Adam", {"eps": 1e-3, "amsgrad": True}),
    "maximize": ("Adam", {"eps": 1e-3, "maximize": True}),
    "adamw": ("AdamW", {"eps": 1e-3, "weight_decay": 0.1}),
}


@pytest.mark.parametrize(("cls", "options"), DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)
def test_differentiable(cls: str, options: Options) -> None:
    """torch cuts the graph at a new momentum buffer, and its Adam takes powers of the betas in float32 here."""
    theirs = hypergradients(torch.optim, cls, 1, lr=number(0.1), **options)
    ours = hypergradients(optim, cls, 1, lr=number(0.1), **options)
    compared = 1 if "nesterov" in options else 3 if "momentum" in options else len(ours)
    assert all(torch.count_nonzero(x) for x in ours)
    assert difference(ours[:compared], theirs[:compared]) <= (1e-12 if cls == "SGD" else 1e-4)


@pytest.mark.parametrize(("cls", "options"), DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)
def test_the_derivative_is_that_of_torchs_plain_step(cls: str, options: Options) -> None:
    """By central differences of its learning rate."""

    def loss(lr: float) -> float:
        optimizer = make(torch.optim, cls, tensors((3, 2), (4,)), lr=lr, **options)
        for i, p in enumerate(parameters(optimizer)):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i), dtype=p.dtype)
        optimizer.step()
        return float(sum((x**2).sum() for x in values(optimizer)))

    (slope, *_) = hypergradients(optim, cls, 1, lr=number(0.1), **options)
    assert slope == pytest.approx((loss(0.1 + 1e-6) - loss(0.1 - 1e-6)) / 2e-6, rel=1e-8)


@pytest.mark.parametrize(("cls", "options"), DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)
def test_differentiable_over_several_steps(cls: str, options: Options) -> None:
    """Against the pure interface, which is tested with finite differences."""
    ours = hypergradients(optim, cls, 3, lr=number(0.1), **options)
    lr = number(0.1)
    transform = {"SGD": ps.sgd, "Adam": ps.adam, "AdamW": ps.adamw}[cls](lr=lr, **options)
    leaves = tensors((3, 2), (4,))
    inputs = [lr, *leaves]
    params, state = leaves, transform.init_state(leaves)
    for k in range(3):
        grads = [
            torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * k + i), dtype=p.dtype).requires_grad_()
            for i, p in enumerate(params)
        ]
        inputs += grads
        params, state = transform.step(grads, state, params)
    assert difference(ours, list(torch.autograd.grad(sum((p**2).sum() for p in params), inputs))) <= 1e-12


@pytest.mark.parametrize(("cls", "lr"), [("SGD", 0.1), ("Adam", 0.1), ("AdamW", 0.1), ("SGD", number(0.1))], ids=str)
def test_differentiable_with_respect_to_weight_decay(cls: str, lr: Any) -> None:
    results = [hypergradients(namespace, cls, 1, lr=lr, weight_decay=number(0.1)) for namespace in BOTH]
    assert difference(results[1], results[0]) <= (1e-12 if cls == "SGD" else 1e-4)


def test_differentiable_composed() -> None:
    """Clipping over all groups, and every hyperparameter a tensor."""
    lr, max_norm = number(0.1), number(0.5)
    leaves = tensors((3,), (2, 2))
    params = [leaf.clone() for leaf in leaves]
    grads = [torch.full_like(p, 0.3) for p in params]
    chain = ps.chain(ps.clip_by_global_norm(max_norm), ps.sgd(lr))
    optimizer = optim.Optimizer([{"params": [p]} for p in params], chain, differentiable=True)
    for p, g in zip(params, grads):
        p.grad = g
    optimizer.step()
    results = torch.autograd.grad(sum((p**2).sum() for p in params), [lr, max_norm, *leaves])
    new, _ = chain.step(grads, chain.init_state(leaves), leaves)
    assert_equal(results, torch.autograd.grad(sum((p**2).sum() for p in new), [lr, max_norm, *leaves]))


def test_gradients_stay_enabled_after_a_differentiable_step() -> None:
    p = tensors((3,))[0].clone()
    optimizer = optim.SGD([p], lr=0.1, differentiable=True)
    p.grad = torch.ones_like(p)
    with torch.no_grad():
        optimizer.step()
        assert not torch.is_grad_enabled()
    assert p.grad_fn is not None
