"""Every scheduler of torch's with every class: the same learning rates, momenta and parameters as torch's class under it."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim import lr_scheduler, swa_utils

from purestep import optim
from tests.cases import CLASSES
from tests.problems import difference
from tests.test_guide import Model, by_layer, closure_of, dataset, each_class, fit, make, subject, weights

STEPS = 12
BOTH = (optim, torch.optim)

pytestmark = pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")  # SequentialLR uses it itself


def warm_up_and_anneal(o: Any) -> Any:
    return lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 4), lr_scheduler.CosineAnnealingLR(o, 8)], milestones=[4]
    )


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How a scheduler is made of an optimizer, and of whether the optimizer has a momentum to cycle."""

    cls: type
    make: Callable[[Any, bool], Any]


SCHEDULES = {
    "LambdaLR": Schedule(lr_scheduler.LambdaLR, lambda o, cycle: lr_scheduler.LambdaLR(o, lambda k: 1 / (k + 1))),
    "LambdaLR per group": Schedule(
        lr_scheduler.LambdaLR,
        lambda o, cycle: lr_scheduler.LambdaLR(o, [lambda k: 0.9**k, lambda k: 0.8**k][: len(o.param_groups)]),
    ),
    "MultiplicativeLR": Schedule(
        lr_scheduler.MultiplicativeLR, lambda o, cycle: lr_scheduler.MultiplicativeLR(o, lambda k: 1 - 0.2 / k)
    ),
    "StepLR": Schedule(lr_scheduler.StepLR, lambda o, cycle: lr_scheduler.StepLR(o, 3, gamma=0.5)),
    "MultiStepLR": Schedule(lr_scheduler.MultiStepLR, lambda o, cycle: lr_scheduler.MultiStepLR(o, [2, 5, 9], gamma=0.3)),
    "ConstantLR": Schedule(lr_scheduler.ConstantLR, lambda o, cycle: lr_scheduler.ConstantLR(o, 0.3, total_iters=7)),
    "LinearLR": Schedule(lr_scheduler.LinearLR, lambda o, cycle: lr_scheduler.LinearLR(o, 0.1, 1.0, total_iters=7)),
    "LinearLR to 0": Schedule(lr_scheduler.LinearLR, lambda o, cycle: lr_scheduler.LinearLR(o, 1.0, 0.0, total_iters=7)),
    "ExponentialLR": Schedule(lr_scheduler.ExponentialLR, lambda o, cycle: lr_scheduler.ExponentialLR(o, 0.8)),
    "SequentialLR": Schedule(lr_scheduler.SequentialLR, lambda o, cycle: warm_up_and_anneal(o)),
    "CosineAnnealingLR": Schedule(
        lr_scheduler.CosineAnnealingLR, lambda o, cycle: lr_scheduler.CosineAnnealingLR(o, 8, eta_min=1e-3)
    ),
    "ChainedScheduler": Schedule(
        lr_scheduler.ChainedScheduler,
        lambda o, cycle: lr_scheduler.ChainedScheduler(
            [lr_scheduler.ConstantLR(o, 0.1, total_iters=7), lr_scheduler.ExponentialLR(o, 0.9)], optimizer=o
        ),
    ),
    "ReduceLROnPlateau": Schedule(
        lr_scheduler.ReduceLROnPlateau, lambda o, cycle: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=1, cooldown=1)
    ),
    "CyclicLR": Schedule(
        lr_scheduler.CyclicLR,
        lambda o, cycle: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3, mode="triangular2", cycle_momentum=cycle),
    ),
    "CyclicLR, exp_range": Schedule(
        lr_scheduler.CyclicLR,
        lambda o, cycle: lr_scheduler.CyclicLR(
            o, 0.01, 0.1, step_size_up=2, step_size_down=4, mode="exp_range", gamma=0.9, cycle_momentum=cycle
        ),
    ),
    "CosineAnnealingWarmRestarts": Schedule(
        lr_scheduler.CosineAnnealingWarmRestarts, lambda o, cycle: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, T_mult=2)
    ),
    "OneCycleLR": Schedule(
        lr_scheduler.OneCycleLR, lambda o, cycle: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=16, cycle_momentum=cycle)
    ),
    "OneCycleLR, three phases": Schedule(
        lr_scheduler.OneCycleLR,
        lambda o, cycle: lr_scheduler.OneCycleLR(
            o,
            max_lr=[0.1, 0.05][: len(o.param_groups)],
            epochs=4,
            steps_per_epoch=4,
            three_phase=True,
            anneal_strategy="linear",
            cycle_momentum=cycle,
        ),
    ),
    "PolynomialLR": Schedule(lr_scheduler.PolynomialLR, lambda o, cycle: lr_scheduler.PolynomialLR(o, 10, power=2.0)),
    "SWALR": Schedule(swa_utils.SWALR, lambda o, cycle: swa_utils.SWALR(o, swa_lr=0.02, anneal_epochs=5)),
}

METRICS = [1.0, 0.9, 0.9, 0.9, 0.9, 0.9, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8]
"""What ReduceLROnPlateau is told: it stalls twice."""

each_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


def schedulers_of(module: ModuleType) -> Iterator[type]:
    for x in vars(module).values():
        if isinstance(x, type) and issubclass(x, lr_scheduler.LRScheduler) and not x.__name__.endswith("LRScheduler"):
            yield x


def test_every_scheduler_is_in_the_table() -> None:
    assert {schedule.cls for schedule in SCHEDULES.values()} == {*schedulers_of(lr_scheduler), *schedulers_of(swa_utils)}
    assert {x.__name__ for x in schedulers_of(lr_scheduler)} | {"LRScheduler"} == set(lr_scheduler.__all__)


def test_the_namespaces_are_torchs_own() -> None:
    assert optim.lr_scheduler is torch.optim.lr_scheduler
    assert optim.swa_utils is torch.optim.swa_utils


def has_momentum(cls: str) -> bool:
    """Whether torch lets a scheduler cycle it."""
    return bool({"momentum", "betas"} & make(torch.optim, cls, Model(cls).parameters()).defaults.keys())


class Run:
    """A model, an optimizer with a group for each layer where it may have groups, and a scheduler."""

    def __init__(self, namespace: Any, cls: str, schedule: Schedule, lr: Callable[[float], Any] = float) -> None:
        self.cls = cls
        self.model = Model(cls)
        base = subject(cls).options["lr"]
        self.lrs = [lr(base)] if "groups" in subject(cls).lacks else [lr(base), lr(0.3 * base)]
        params = [self.model.parameters()] if len(self.lrs) == 1 else by_layer(self.model, named=False)
        groups = [{"params": p, "lr": x} for p, x in zip(params, self.lrs)]
        self.optimizer = make(namespace, cls, groups)
        self.scheduler = schedule.make(self.optimizer, has_momentum(cls))
        self.seen: list[Any] = []

    def advance(self, start: int, stop: int) -> Run:
        for k in range(start, stop):
            (loss,) = fit(self.model, self.optimizer, dataset(self.cls, k, k + 1))
            plateau = isinstance(self.scheduler, lr_scheduler.ReduceLROnPlateau)
            self.scheduler.step(*[METRICS[k]] if plateau else [])
            last = [exactly(x) for x in self.scheduler.get_last_lr()]
            self.seen.append([*map(snapshot, self.optimizer.param_groups), last])
            assert loss.isfinite()
        return self


def snapshot(group: dict[str, Any]) -> list[Any]:
    return [exactly(group["lr"]), group.get("momentum"), group.get("betas")]


def exactly(x: Any) -> Any:
    """A value that == compares, and that keeps a tensor's dtype and shape."""
    return (x.dtype, x.tolist()) if isinstance(x, Tensor) else x


def assert_agree(ours: Run, theirs: Run) -> None:
    """Learning rates and momenta exactly, parameters up to rounding."""
    assert ours.seen == theirs.seen
    assert difference(weights(ours.model), weights(theirs.model)) <= 1e-10


@each_class()
@each_schedule
@pytest.mark.in_turn("cls")
def test_trajectories(cls: str, schedule: Schedule) -> None:
    ours, theirs = (Run(namespace, cls, schedule).advance(0, STEPS) for namespace in BOTH)
    assert_agree(ours, theirs)
    assert len({lrs[0] for *_, lrs in ours.seen}) > 1, "the learning rate never changed"


@each_class()
@pytest.mark.parametrize("name", ["CyclicLR", "OneCycleLR"])
def test_momenta_are_cycled(cls: str, name: str) -> None:
    """Where torch's class has one; where it has none, ours is refused as torch's is."""
    run = Run(optim, cls, SCHEDULES[name]).advance(0, 4)
    momenta = {(momentum, betas) for (_, momentum, betas), *_ in run.seen}
    assert (len(momenta) > 1) == has_momentum(cls)
    refused = [outcome(SCHEDULES[name].make, make(namespace, cls, Model(cls).parameters())) for namespace in BOTH]
    assert refused[0] == refused[1] == (None if has_momentum(cls) else ValueError)


def outcome(scheduler: Callable[[Any, bool], Any], optimizer: Any) -> type[Exception] | None:
    """What cycling the momentum raises."""
    try:
        scheduler(optimizer, True)
    except ValueError as error:
        return type(error)
    return None


TENSORS = {
    "0-d": lambda x: torch.tensor(x, dtype=torch.float64),
    "one element": lambda x: torch.tensor([x], dtype=torch.float64),
}


@each_class()
@pytest.mark.parametrize("lr", TENSORS.values(), ids=TENSORS)
@pytest.mark.parametrize(
    "name", ["LambdaLR", "ExponentialLR", "CosineAnnealingLR", "ReduceLROnPlateau", "CyclicLR", "OneCycleLR", "SWALR"]
)
@pytest.mark.in_turn("cls")
def test_tensor_learning_rates(cls: str, name: str, lr: Callable[[float], Tensor]) -> None:
    """A scheduler writes to them; they are never replaced. The parameters are those of the same learning rates as numbers.

    (The state of torch's L-BFGS holds the tensor itself, so that a scheduler rewrites the past there.)
    """
    schedule = SCHEDULES[name]
    ours, theirs = (Run(namespace, cls, schedule, lr).advance(0, 8) for namespace in BOTH)
    assert ours.seen == theirs.seen
    assert all(group["lr"] is x for group, x in zip(ours.optimizer.param_groups, ours.lrs))
    numbers = Run(torch.optim, cls, schedule).advance(0, 8)
    assert difference(weights(ours.model), weights(numbers.model)) <= 1e-10


def resumed(first: Any, second: Any, cls: str, schedule: Schedule) -> Run:
    """Half of the steps in one namespace, saved, and half of them in the other one."""
    half = STEPS // 2
    run = Run(first, cls, schedule).advance(0, half)
    file = io.BytesIO()
    states = {name: getattr(run, name).state_dict() for name in ("model", "scheduler", "optimizer")}
    torch.save(states, file)
    file.seek(0)
    other = Run(second, cls, schedule)
    for name, state in torch.load(file, weights_only=True).items():
        getattr(other, name).load_state_dict(state)
    return other.advance(half, STEPS)


@each_class()
@each_schedule
@pytest.mark.in_turn("cls")
def test_resuming(cls: str, schedule: Schedule) -> None:
    """Optimizer and scheduler are saved together, by torch's class or by ours, and continue as if nothing had happened."""
    straight = Run(torch.optim, cls, schedule).advance(0, STEPS)
    del straight.seen[: STEPS // 2]
    for first in BOTH:
        assert_agree(resumed(first, optim, cls, schedule), straight)


# ------------------------------------------------------------------------------------------------- the documentation's usages


@each_class()
def test_schedulers_called_back_to_back(cls: str) -> None:
    results = []
    for namespace in BOTH:
        model = Model(cls)
        optimizer = make(namespace, cls, model.parameters())
        scheduler1 = optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)
        scheduler2 = optim.lr_scheduler.MultiStepLR(optimizer, milestones=[3, 8], gamma=0.1)
        lrs = []
        for k in range(10):
            fit(model, optimizer, dataset(cls, k, k + 1))
            scheduler1.step()
            scheduler2.step()
            lrs.append(optimizer.param_groups[0]["lr"])
        results.append((lrs, weights(model)))
    assert results[0][0] == results[1][0]
    assert results[0][0][-1] == pytest.approx(subject(cls).options["lr"] * 0.9**10 * 0.01)
    assert difference(results[0], results[1]) <= 1e-10


@each_class()
def test_a_scheduler_of_the_users(cls: str) -> None:
    class Decay(optim.lr_scheduler.LRScheduler):
        def get_lr(self) -> list[float | Tensor]:
            return [base / math.sqrt(1 + self.last_epoch) for base in self.base_lrs]

    schedule = Schedule(Decay, lambda o, cycle: Decay(o))
    ours, theirs = (Run(namespace, cls, schedule).advance(0, STEPS) for namespace in BOTH)
    assert_agree(ours, theirs)


@each_class()
def test_the_first_learning_rate_is_the_schedulers(cls: str) -> None:
    """Making a scheduler sets it, before the first step, whose state may depend on it."""
    results = []
    for namespace in BOTH:
        model = Model(cls)
        optimizer = make(namespace, cls, model.parameters())
        optim.lr_scheduler.ConstantLR(optimizer, 0.25, total_iters=100)
        assert optimizer.param_groups[0]["lr"] == 0.25 * subject(cls).options["lr"]
        results.append((fit(model, optimizer, dataset(cls)), weights(model)))
    assert difference(results[0], results[1]) <= 1e-10


# --------------------------------------------------------------------------------------------------------- averages of weights


class Normalized(nn.Module):
    """A model with the statistics of its batches, and no parameters but those that its class can train."""

    def __init__(self, cls: str) -> None:
        super().__init__()
        self.model = Model(cls)
        self.norm = nn.BatchNorm1d(4, affine=False).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.model(x))


def ema(averaged: Tensor, current: Tensor, n: Any) -> Tensor:
    return 0.9 * averaged + 0.1 * current


AVERAGES: dict[str, dict[str, Any]] = {
    "SWA": {},
    "SWA of buffers too": {"use_buffers": True},
    "EMA": {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.9)},
    "EMA of buffers too": {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.9), "use_buffers": True},
    "EMA of one's own": {"avg_fn": ema},
}


@each_class()
@pytest.mark.parametrize("how", AVERAGES.values(), ids=AVERAGES)
def test_averaged_models(cls: str, how: dict[str, Any]) -> None:
    """As in the documentation: a schedule, then SWALR and averages, and the statistics of the averaged model at the end."""
    results = []
    for namespace in BOTH:
        model = Normalized(cls)
        averaged = optim.swa_utils.AveragedModel(model, **how)
        optimizer = make(namespace, cls, model.parameters())
        scheduler = optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=12)
        swa_scheduler = optim.swa_utils.SWALR(optimizer, swa_lr=0.02, anneal_epochs=3)
        for k in range(12):
            fit(model, optimizer, dataset(cls, k, k + 1))
            if k > 5:
                averaged.update_parameters(model)
                swa_scheduler.step()
            else:
                scheduler.step()
        optim.swa_utils.update_bn(dataset(cls), averaged)
        losses = [mse_loss(averaged(x), target).detach() for x, target in dataset(cls, 20, 23)]
        results.append((losses, weights(model, averaged), list(averaged.buffers()), optimizer.param_groups[0]["lr"]))
    assert difference(results[0], results[1]) <= 1e-10
    assert results[0][3] == 0.02
    assert difference(results[0][1][: len(weights(model))], results[0][1][len(weights(model)) :]) > 1e-4  # an average


def test_a_mean_of_the_weights_that_were_seen() -> None:
    """The average is of our weights, step by step."""
    model = Model("SGD")
    averaged, seen = optim.swa_utils.AveragedModel(model), []
    optimizer = make(optim, "SGD", model.parameters())
    for k in range(5):
        optimizer.step(closure_of(model, optimizer, dataset("SGD", k, k + 1)[0]))
        averaged.update_parameters(model)
        seen.append(weights(model))
    assert difference(weights(averaged), [torch.stack(ps).mean(0) for ps in zip(*seen)]) <= 1e-12


def test_there_are_classes() -> None:
    assert {"SGD", "Adam", "AdamW"} <= set(CLASSES)
