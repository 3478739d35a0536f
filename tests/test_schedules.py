"""Schedules against torch's schedulers and optax's, on ints and on tensors, compiled, vmapped and differentiated."""

from __future__ import annotations

import copy
import json
import math
import pickle
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import lr_scheduler
from torch.utils import _pytree as pytree

import purestep as ps
from purestep import optim, schedules
from purestep._core.values import Declaration
from purestep.schedules import Schedule
from tests.oracles import common

STEPS = 12


def torch_values(scheduler: Any, **options: Any) -> list[float]:
    return driven(lambda o: scheduler(o, **options), STEPS, lr=0.5)[1]


def driven(make: Callable[[Any], Any], steps: int, lr: float = 0.1) -> tuple[Any, list[float], list[float]]:
    """One of torch's schedulers, and the learning rates and momenta it leads through."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr, momentum=0.9)
    driver = make(optimizer)
    values, momenta = [], []
    for _ in range(steps):
        values.append(optimizer.param_groups[0]["lr"])
        momenta.append(optimizer.param_groups[0]["momentum"])
        optimizer.step()
        driver.step()
    return driver, values[:steps], momenta[:steps]


def transformers_wsd(warmup: int, decay: int, total: int, ratio: float, fall: Callable[[float], float]) -> list[float]:
    """transformers.get_wsd_schedule on a learning rate of 0.5, written out."""

    def factor(t: int) -> float:
        if t < warmup:
            return t / max(1, warmup)
        if t < total - decay:
            return 1.0
        return fall((t - (total - decay)) / decay) * (1 - ratio) + ratio if t < total else ratio

    return [0.5 * factor(t) for t in range(STEPS)]


CASES: dict[str, tuple[Schedule, list[float]]] = {
    "constant": (schedules.constant(0.5), [0.5] * STEPS),
    "linear": (
        schedules.linear(0.5, 0.05, total_steps=8),
        torch_values(torch.optim.lr_scheduler.LinearLR, start_factor=1.0, end_factor=0.1, total_iters=8),
    ),
    "cosine": (
        schedules.cosine(0.5, total_steps=STEPS, end=0.1),
        torch_values(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=STEPS, eta_min=0.1),
    ),
    "warmup_cosine": (  # optax.warmup_cosine_decay_schedule(0.1, 0.5, warmup_steps=4, decay_steps=10, end_value=0.2), written out
        schedules.warmup_cosine(0.5, warmup_steps=4, total_steps=10, end=0.2, start=0.1),
        [0.1 + 0.4 * t / 4 if t < 4 else 0.2 + 0.15 * (1 + math.cos(math.pi * min((t - 4) / 6, 1))) for t in range(STEPS)],
    ),
    "no warm-up": (schedules.warmup_cosine(0.5, warmup_steps=0, total_steps=4), [0.25 * (1 + math.cos(math.pi * min(t / 4, 1))) for t in range(STEPS)]),
    "only warm-up": (schedules.warmup_cosine(0.5, warmup_steps=4, total_steps=4), [0.125 * min(t, 4) if t < 4 else 0.0 for t in range(STEPS)]),
    "no steps": (schedules.linear(0.5, 0.1, total_steps=0), [0.1] * STEPS),
    "warmup_stable_decay": (
        schedules.warmup_stable_decay(0.5, warmup_steps=3, decay_steps=4, total_steps=10, end=0.1, shape="1-sqrt"),
        transformers_wsd(3, 4, 10, 0.2, lambda d: 1 - math.sqrt(d)),
    ),
    "warmup_stable_decay, linear": (
        schedules.warmup_stable_decay(0.5, warmup_steps=0, decay_steps=12, total_steps=12),
        transformers_wsd(0, 12, 12, 0.0, lambda d: 1 - d),
    ),
    "warmup_stable_decay, cosine": (
        schedules.warmup_stable_decay(0.5, warmup_steps=5, decay_steps=5, total_steps=11, end=0.05, shape="cosine"),
        transformers_wsd(5, 5, 11, 0.1, lambda d: 0.5 * (1 + math.cos(math.pi * d))),
    ),
    "inverse_sqrt": (  # fairseq's
        schedules.inverse_sqrt(0.5, warmup_steps=4, start=0.1),
        [0.1 + 0.4 * t / 4 if t < 4 else 0.5 * 4**0.5 * t**-0.5 for t in range(STEPS)],
    ),
    "inverse_sqrt, timescale": (  # transformers.get_inverse_sqrt_schedule(num_warmup_steps=4, timescale=10)
        schedules.inverse_sqrt(0.5, warmup_steps=4, timescale=10.0),
        [0.5 * t / 4 if t < 4 else 0.5 / math.sqrt((t + 10 - 4) / 10) for t in range(STEPS)],
    ),
    "inverse_sqrt, no warm-up": (schedules.inverse_sqrt(0.5), [0.5 / math.sqrt(t + 1) for t in range(STEPS)]),
    "scale": (
        schedules.scale(schedules.linear(1.0, 0.0, total_steps=8), schedules.exponential(0.5, gamma=0.9)),
        [max(1 - t / 8, 0) * 0.5 * 0.9**t for t in range(STEPS)],
    ),
    "a schedule of schedules": (
        schedules.linear(schedules.exponential(1.0, gamma=0.9), 0.1, total_steps=8),
        [0.9**t + (0.1 - 0.9**t) * min(t / 8, 1) for t in range(STEPS)],
    ),
    "pieces with one count": (
        schedules.piecewise_constant((schedules.exponential(1.0, gamma=0.9), lambda t: 0.5 / (t + 1), 0.1), (3, 8)),
        [0.9**t if t < 3 else 0.5 / (t + 1) if t < 8 else 0.1 for t in range(STEPS)],
    ),
    "a join of functions": (
        schedules.join([lambda t: 0.5 / (t + 1), schedules.linear(1.0, 0.0, total_steps=4), 0.1], [3, 8]),
        [0.5 / (t + 1) if t < 3 else max(1 - (t - 3) / 4, 0.0) if t < 8 else 0.1 for t in range(STEPS)],
    ),
    "a function": (ps.sgd(lr=lambda step: 0.5 / (step + 1)).hyperparams["lr"], [0.5 / (t + 1) for t in range(STEPS)]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_values(name: str) -> None:
    schedule, expected = CASES[name]
    assert [schedule(t) for t in range(STEPS)] == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert all(isinstance(schedule(t), float) for t in range(STEPS))


# ------------------------------------------------------------------------------------------------------------ other libraries

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 7, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [5, 20, 5], 0.3),
    "MultiStepLR from 0": lambda o: lr_scheduler.MultiStepLR(o, [0, 20], 0.3),
    "MultiStepLR without": lambda o: lr_scheduler.MultiStepLR(o, [], 0.3),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.3, 9),
    "ConstantLR for 0": lambda o: lr_scheduler.ConstantLR(o, 0.3, 0),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.3, 0.9, 9),
    "LinearLR for 0": lambda o: lr_scheduler.LinearLR(o, 0.3, 0.9, 0),
    "LinearLR to 0": lambda o: lr_scheduler.LinearLR(o, 1.0, 0.0, 33),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.93),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 33, 2.5),
    "PolynomialLR for 0": lambda o: lr_scheduler.PolynomialLR(o, 0, 2.5),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 17, 0.01),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5, 1, 0.01),
    "CosineAnnealingWarmRestarts, 2": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, 2, 0.01),
    "CosineAnnealingWarmRestarts, 3": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 1, 3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.5, total_steps=61),
    "OneCycleLR, three phases": lambda o: lr_scheduler.OneCycleLR(
        o, 0.5, total_steps=61, three_phase=True, pct_start=0.37, anneal_strategy="linear", div_factor=7.0, final_div_factor=3.0
    ),
    "OneCycleLR, no rise": lambda o: lr_scheduler.OneCycleLR(o, 0.5, total_steps=61, pct_start=0.0),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.3, 5, 9),
    "CyclicLR, triangular2": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.3, 5, 9, mode="triangular2"),
    "CyclicLR, exp_range": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.3, 6, mode="exp_range", gamma=0.97),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda k: 1 / (k + 1)),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o,
        [
            lr_scheduler.LinearLR(o, 0.1, 1.0, 4),
            lr_scheduler.CosineAnnealingLR(o, 8),
            lr_scheduler.CosineAnnealingWarmRestarts(o, 3, 2),
            lr_scheduler.StepLR(o, 3),
        ],
        milestones=[4, 12, 30],
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [
            lr_scheduler.LinearLR(o, 0.1, 1.0, 4),
            lr_scheduler.ExponentialLR(o, 0.9),
            lr_scheduler.PolynomialLR(o, 30, 2.0),
            lr_scheduler.MultiStepLR(o, [9, 12]),
        ]
    ),
}


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")  # SequentialLR uses it itself
@pytest.mark.parametrize("name", SCHEDULERS)
def test_from_torch(name: str) -> None:
    driver, values, momenta = driven(SCHEDULERS[name], 60)
    schedule = schedules.from_torch(driver)
    assert [schedule(t) for t in range(60)] == pytest.approx(values, rel=1e-12, abs=1e-15)
    torch.testing.assert_close(
        torch.as_tensor(torch.stack([torch.as_tensor(schedule(torch.tensor(t)), dtype=torch.float64) for t in range(60)])),
        torch.tensor(values, dtype=torch.float64),
        rtol=1e-12,
        atol=1e-15,
    )
    if name.startswith(("OneCycleLR", "CyclicLR")):
        momentum = schedules.from_torch(driver, "momentum")
        assert [momentum(t) for t in range(60)] == pytest.approx(momenta, rel=1e-12)
        assert max(momenta) - min(momenta) > 0.08


def test_from_torch_reads_a_parameter_group() -> None:
    groups = [{"params": [torch.zeros(1)], "lr": 0.1}, {"params": [torch.zeros(1)], "lr": 0.2}]
    optimizer = torch.optim.Adam(groups)
    driver = lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.step()
    driver.step()
    assert schedules.from_torch(driver) == schedules.exponential(0.1, gamma=0.5)
    assert schedules.from_torch(driver, group=1) == schedules.exponential(0.2, gamma=0.5)
    driver = lr_scheduler.LambdaLR(optimizer, [lambda t: 1.0, lambda t: 2.0])
    assert schedules.from_torch(driver, group=1)(0) == 0.4
    driver = lr_scheduler.OneCycleLR(optimizer, [0.5, 0.7], total_steps=10, pct_start=0.5, max_momentum=[0.9, 0.8])
    assert schedules.from_torch(driver, group=1)(4) == 0.7
    assert schedules.from_torch(driver, "momentum", group=1)(0) == pytest.approx(0.8, rel=1e-15)


FIRST = (lambda o: lr_scheduler.LinearLR(o), lambda o: lr_scheduler.ExponentialLR(o, 0.9))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda o: lr_scheduler.ReduceLROnPlateau(o), TypeError, "ReduceLROnPlateau follows a measured value, so it is no function of the step"),
        (lambda o: lr_scheduler.MultiplicativeLR(o, lambda k: 0.9), TypeError, "MultiplicativeLR multiplies factors up"),
        (lambda o: lr_scheduler.CyclicLR(o, 0.1, 0.2, scale_fn=lambda x: 1.0), TypeError, "scale_fn of its own"),
        (lambda o: lr_scheduler.ChainedScheduler([FIRST[0](o), lr_scheduler.CosineAnnealingLR(o, 5)]), TypeError, "CosineAnnealingLR does not multiply"),
        (lambda o: lr_scheduler.SequentialLR(o, [lr_scheduler.SequentialLR(o, [f(o) for f in FIRST], [3]), FIRST[0](o)], [5]), TypeError, "SequentialLR in a SequentialLR"),
        (lambda o: torch.optim.swa_utils.SWALR(o, 0.1), TypeError, "from_torch cannot read the scheduler SWALR"),
        (lambda o: o, TypeError, "must be one of torch.optim.lr_scheduler"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # nested ones, by torch itself
def test_what_from_torch_cannot_read(make: Any, error: type[Exception], message: str) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1, momentum=0.9)
    with pytest.raises(error, match=message):
        schedules.from_torch(make(optimizer))


def test_from_torch_without_a_momentum() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    for driver in (lr_scheduler.StepLR(optimizer, 5), lr_scheduler.OneCycleLR(optimizer, 0.5, 10, cycle_momentum=False)):
        with pytest.raises(ValueError, match="does not cycle the momentum"):
            schedules.from_torch(driver, "momentum")


OPTAX = json.loads((common.FOLDER / "schedules" / "optax.json").read_text())["schedules"]


@pytest.mark.parametrize("record", OPTAX, ids=lambda r: r["schedule"])
def test_optax(record: dict[str, Any]) -> None:
    schedule = eval(record["schedule"], vars(schedules))
    assert [schedule(t) for t in range(len(record["values"]))] == pytest.approx(record["values"], rel=1e-12, abs=1e-15)


def test_beyond_the_ends() -> None:
    """A number too large for Python is one that a tensor has no room for, and a bound is a bound."""
    grow = schedules.exponential(1.0, gamma=1.5, end=10.0)
    assert grow(100_000) == grow(torch.tensor(100_000)).item() == 10.0
    assert schedules.exponential(1.0, gamma=1.5)(100_000) == math.inf
    last = schedules.one_cycle(1.0, total_steps=20)(19)
    assert schedules.one_cycle(1.0, total_steps=20)(1000) == last == pytest.approx(1 / 25 / 1e4, rel=1e-12)
    assert schedules.one_cycle(1.0, total_steps=1)(0) > 0


@pytest.mark.parametrize("mult", [2, 3, 10])
def test_restarts_are_at_their_steps(mult: int) -> None:
    """Far out the cycle is still found without an error of rounding."""
    schedule = schedules.cosine_with_restarts(1.0, cycle_steps=7, cycle_mult=mult)
    begin, length = 0, 7
    while begin < 10**9:
        for t in (begin, torch.tensor(begin)):
            assert schedule(t) == pytest.approx(1.0, abs=1e-12)
        if begin:
            assert schedule(begin - 1) < 0.06
        begin, length = begin + length, length * mult


def test_a_joined_schedule_sees_its_own_steps() -> None:
    """So one that is singular outside of them spoils neither the others' values nor a derivative."""
    schedule = schedules.join((lambda t: 1 / (3 - t), schedules.scale(lambda t: 1 / (4 - t), 0.5), 0.1), (3, 7))
    expected = [1 / (3 - t) if t < 3 else 0.5 / (7 - t) if t < 7 else 0.1 for t in range(9)]
    assert [schedule(t) for t in range(9)] == pytest.approx(expected, rel=1e-12)
    for t in range(9):
        slope = torch.func.grad(lambda s, t=t: torch.as_tensor(s(torch.tensor(t))))(ps.tensors(schedule))
        assert all(math.isfinite(x) for x in pytree.tree_leaves(slope))
    assert schedules.join((0.5, 0.1), (0,))(0) == 0.1


# -------------------------------------------------------------------------------------------------------------------- kinds

EACH: dict[str, Schedule] = {
    **{name: schedule for name, (schedule, _) in CASES.items()},
    "polynomial": schedules.polynomial(0.5, 0.1, total_steps=9, power=2.5),
    "exponential": schedules.exponential(0.5, gamma=0.7, step_size=4, end=0.2),
    "staircase": schedules.exponential(0.5, gamma=0.7, step_size=4, staircase=True),
    "growing": schedules.exponential(0.1, gamma=1.2, end=0.5),
    "cosine, periodic": schedules.cosine(0.5, total_steps=5, end=0.1, periodic=True),
    "one_cycle": schedules.one_cycle(0.5, total_steps=11, pct_start=0.4),
    "one_cycle, three phases": schedules.one_cycle(
        0.5, total_steps=11, pct_start=0.37, shape="linear", three_phase=True, div_factor=5.0, final_div_factor=3.0
    ),
    "cyclic": schedules.cyclic(0.1, 0.5, step_size_up=2, step_size_down=3),
    "cyclic, triangular2": schedules.cyclic(0.1, 0.5, step_size_up=3, mode="triangular2"),
    "cyclic, exp_range": schedules.cyclic(0.1, 0.5, step_size_up=3, mode="exp_range", gamma=0.9),
    "cosine_with_restarts": schedules.cosine_with_restarts(0.5, cycle_steps=5, end=0.1),
    "cosine_with_restarts, 2": schedules.cosine_with_restarts(0.5, cycle_steps=2, cycle_mult=2),
    "piecewise_constant": schedules.piecewise_constant((0.5, 0.2, 0.1), (3, 8)),
    "piecewise_interpolate": schedules.piecewise_interpolate((0.5, 0.2, 0.3), (3, 8)),
    "piecewise_interpolate, cosine": schedules.piecewise_interpolate((0.5, 0.2, 0.3), (3, 8), shape="cosine"),
    "join": schedules.join((schedules.linear(0.0, 0.5, total_steps=3), 0.5, schedules.cosine(0.5, total_steps=4)), (3, 6)),
    "scale a schedule": schedules.scale(schedules.cosine(0.5, total_steps=9), 0.5),
    "scale a join": schedules.scale(
        schedules.join((schedules.linear(0.0, 0.5, total_steps=3), schedules.exponential(0.5, gamma=0.9)), (3,)),
        schedules.one_cycle(1.0, total_steps=9),
    ),
}
FUNCTIONS = {"a function", "a join of functions", "pieces with one count"}  # neither printed nor pickled, as lambdas are not
each = pytest.mark.parametrize("name", EACH)


def test_each_schedule_is_tested() -> None:
    made = {name for name, x in vars(schedules).items() if isinstance(getattr(x, "declaration", None), Declaration)}
    assert {schedule.declaration.name for schedule in EACH.values()} - {"schedule"} == made


@each
def test_tensors_vmap_and_compile(name: str) -> None:
    schedule = EACH[name]
    steps = torch.arange(STEPS, dtype=torch.float64)
    wanted = torch.tensor([schedule(t) for t in range(STEPS)], dtype=torch.float64)
    close = {"rtol": 1e-12, "atol": 1e-12}
    for t in (torch.tensor(5), torch.tensor(5.0, dtype=torch.float64)):
        torch.testing.assert_close(torch.as_tensor(schedule(t), dtype=torch.float64), wanted[5], **close)
    torch.testing.assert_close(torch.as_tensor(schedule(torch.tensor(5.0))).double(), wanted[5], rtol=1e-5, atol=1e-6)
    if isinstance(schedule(steps[0]), torch.Tensor):
        torch.testing.assert_close(schedule(steps), wanted, **close)
        torch.testing.assert_close(torch.func.vmap(schedule)(steps), wanted, **close)
        torch.testing.assert_close(torch.func.vmap(schedule)(steps.long()), wanted, **close)
        compiled = torch.compile(schedule, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(torch.stack([compiled(t) for t in steps]), wanted, **close)


def test_a_compiled_step_follows_each_schedule() -> None:
    """The sum of all of them, in one graph for all steps."""
    opt = ps.chain(*[ps.add_decayed_weights(schedule) for schedule in EACH.values()], ps.scale(-0.1))
    p, graphs = torch.ones(3, dtype=torch.float64), 0

    def count(graph: torch.fx.GraphModule, example: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    compiled = torch.compile(opt.step, fullgraph=True, backend=count)
    state = opt.init_state(p)
    for t in range(6):
        new, state = compiled(torch.zeros_like(p), state, p)
        expected = p * (1 - 0.1 * sum(schedule(t) for schedule in EACH.values()))
        torch.testing.assert_close(new, expected, rtol=1e-12, atol=1e-14)
        p = new
    assert graphs == 1


@each
def test_derivatives_in_its_numbers(name: str) -> None:
    """Of the values at all steps, by each of its numbers, against finite differences; `torch.func.grad` agrees."""
    leaves, spec = pytree.tree_flatten(ps.tensors(EACH[name]))
    numbers = tuple(x for x in leaves if x is not None)
    if not numbers:
        return

    def weighted(*numbers: Tensor) -> Tensor:
        given = iter(numbers)
        schedule = pytree.tree_unflatten([x if x is None else next(given) for x in leaves], spec)
        values = [torch.as_tensor(schedule(torch.tensor(t)), dtype=torch.float64) for t in range(STEPS)]
        return torch.stack([x * (1 + 0.1 * t) for t, x in enumerate(values)]).sum() + 0 * sum(numbers)

    inputs = tuple(x.clone().requires_grad_() for x in numbers)
    assert torch.autograd.gradcheck(weighted, inputs, check_forward_ad=True, atol=1e-6, rtol=1e-5)
    mapped = torch.func.grad(weighted, argnums=tuple(range(len(numbers))))(*numbers)
    for x, y in zip(mapped, torch.autograd.grad(weighted(*inputs), inputs)):
        torch.testing.assert_close(x, y)


@each
def test_a_value_and_a_pytree(name: str) -> None:
    schedule = EACH[name]
    numbers, spec = pytree.tree_flatten(schedule)
    assert pytree.tree_unflatten(numbers, spec) == schedule == copy.deepcopy(schedule)
    assert pytree.tree_structure(ps.tensors(schedule)) == spec
    assert pytree.tree_structure(ps.in_dims(schedule)) == spec
    assert (pytree.tree_map(lambda x: x and x + 1, schedule) != schedule) == bool(numbers)
    assert len({str(path) for path, _ in pytree.tree_flatten_with_path(schedule)[0]}) == len(numbers)
    assert schedule.replace() == schedule
    if name not in FUNCTIONS:
        assert eval(repr(schedule), vars(schedules)) == schedule
        assert pickle.loads(pickle.dumps(schedule)) == schedule


def halve(step: Any) -> Any:
    return 0.5 ** (step + 1)


def test_a_function_of_the_step_is_pickled_by_its_name() -> None:
    schedule = schedules.scale(halve, 0.5)
    assert pickle.loads(pickle.dumps(schedule)) == schedule == schedules.scale(halve, 0.5)
    assert repr(schedule) == "scale(schedule(halve), 0.5)"


def test_replace_and_hyperparams() -> None:
    schedule = schedules.join((schedules.linear(0.0, 0.5, total_steps=3), 0.5), (3,))
    warmup, stable = schedule.hyperparams["schedules"]
    assert schedule.replace(schedules=(warmup.replace(end=1.0), stable)) == schedules.join(
        (schedules.linear(0.0, 1.0, total_steps=3), 0.5), (3,)
    )
    assert warmup.hyperparams == {"start": 0.0, "end": 0.5}
    assert schedules.exponential(0.5, gamma=0.9).replace(staircase=True, step_size=5)(4) == 0.5
    with pytest.raises(
        TypeError, match=r"There is no 'peak' to replace in linear\(.*its names are 'start', 'end', 'total_steps'"
    ):
        warmup.replace(peak=1.0)
    with pytest.raises(ValueError, match="join: there must be one more of schedules than of boundaries, but got 2 and 0"):
        schedule.replace(boundaries=())
    with pytest.raises(ValueError, match="warmup_steps must be at most total_steps"):
        schedules.warmup_cosine(1.0, warmup_steps=3, total_steps=5).replace(warmup_steps=6)


def test_a_batch_of_schedules() -> None:
    """vmap over optimizers whose schedules differ in their numbers, those of an inner schedule among them."""

    def train(opt: Any) -> Tensor:
        p = torch.tensor(1.0, dtype=torch.float64)
        state = opt.init_state(p)
        for _ in range(5):
            p, state = opt.step(p, state, p)
        return p

    def made(peak: Any) -> Any:
        warmup = schedules.linear(0.0, peak, total_steps=2)
        return ps.sgd(lr=schedules.join((warmup, schedules.cosine(peak, total_steps=4)), (2,)))

    peaks = torch.tensor([0.1, 0.3, 0.5], dtype=torch.float64)
    batch = made(peaks)
    found = torch.func.vmap(train, in_dims=(ps.in_dims(batch),))(batch)
    torch.testing.assert_close(found, torch.stack([train(made(float(x))) for x in peaks]), rtol=1e-12, atol=0)
    slope = torch.func.grad(train)(ps.tensors(made(0.3))).hyperparams["lr"]
    h = 1e-6
    total = (
        sum(pytree.tree_leaves(slope))
        - slope.hyperparams["schedules"][0].hyperparams["start"]
        - slope.hyperparams["schedules"][1].hyperparams["end"]
    )
    assert total == pytest.approx((train(made(0.3 + h)) - train(made(0.3 - h))).item() / (2 * h), rel=1e-6)


# ------------------------------------------------------------------------------------------------------------- in optimizers


@pytest.mark.parametrize("executor", [None, "leaf", "foreach"])
def test_called_with_the_number_of_the_update(executor: Any) -> None:
    """0 at the first update, one more at each; per parameter, so a parameter that waits does not run ahead."""
    seen: list[float] = []

    def record(step: Any) -> float:
        seen.append(float(step))
        return 1.0

    t = ps.chain(ps.scale(record), ps.scale(-1.0))
    p = {"a": torch.zeros(1), "b": torch.zeros(1)}
    state = t.init_state(p)
    for g in ({"a": torch.ones(1), "b": None}, {"a": torch.ones(1), "b": torch.ones(1)}):
        p, state = t.step(g, state, p, executor=executor)
    assert sorted(seen) == [0.0, 0.0, 1.0]
    assert state[0].step == {"a": torch.tensor(2.0), "b": torch.tensor(1.0)}


def test_every_hyperparameter_can_follow_a_schedule() -> None:
    half = schedules.linear(1.0, 0.0, total_steps=2)
    t = ps.adam(lr=half, betas=(schedules.constant(0.9), 0.999), eps=schedules.constant(1e-8), weight_decay=half)
    p = torch.ones(3, dtype=torch.float64)
    mine, state = p, t.init_state(p)
    theirs = p.clone().requires_grad_()
    reference = torch.optim.Adam([theirs])
    for k in range(4):
        g = torch.full((3,), 0.1 * (k + 1), dtype=torch.float64)
        value = max(1.0 - k / 2, 0.0)
        reference.param_groups[0].update(lr=value, weight_decay=value)
        theirs.grad = g.clone()
        reference.step()
        mine, state = t.step(g, state, mine)
    torch.testing.assert_close(mine, theirs.detach(), rtol=1e-12, atol=1e-14)


CHANGING = {
    "sgd": (ps.sgd, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1}),
    "adam": (ps.adam, torch.optim.Adam, {"lr": 0.1, "betas": (0.8, 0.9), "eps": 0.1, "weight_decay": 0.1}),
    "adamw": (ps.adamw, torch.optim.AdamW, {"lr": 0.1, "betas": (0.8, 0.9), "eps": 0.1, "weight_decay": 0.1}),
}


@pytest.mark.parametrize("executor", [None, "leaf", "foreach", "donate", "wrapper", "compiled"])
@pytest.mark.parametrize("name", CHANGING)
def test_each_number_follows_a_schedule_of_its_own(name: str, executor: Any) -> None:
    """As torch's optimizer with the numbers of the step written into its parameter group."""
    ours, theirs, numbers = CHANGING[name]
    cycles = iter([schedules.cyclic(0.5, 1.0, step_size_up=k + 1) for k in range(9)])
    changing = pytree.tree_map(lambda x: schedules.scale(next(cycles), x), numbers)
    opt, p = ours(**changing), torch.linspace(-1, 2, 5, dtype=torch.float64)
    q = p.clone().requires_grad_()
    reference = theirs([q])
    mine = p.clone().requires_grad_()
    wrapper = optim.Optimizer([mine], opt) if executor == "wrapper" else None
    step = torch.compile(opt.step, fullgraph=True, backend="aot_eager") if executor == "compiled" else opt.step
    options = {"donate": True} if executor == "donate" else {"executor": executor} if executor in ("leaf", "foreach") else {}
    state = opt.init_state(p)
    p = p.clone()
    for t in range(7):
        g = torch.cos(t + torch.arange(5, dtype=torch.float64))
        reference.param_groups[0].update(
            {k: tuple(s(t) for s in x) if isinstance(x, tuple) else x(t) for k, x in changing.items()}
        )
        q.grad = mine.grad = g
        reference.step()
        if wrapper:
            wrapper.step()
        else:
            p, state = step(g.clone(), state, p, **options)
    torch.testing.assert_close(mine.detach() if wrapper else p, q.detach(), rtol=1e-12, atol=1e-13)


def test_a_whole_transform_follows_a_schedule() -> None:
    t = ps.chain(ps.clip_by_global_norm(schedules.linear(1.0, 0.0, total_steps=2)), ps.scale(-1.0))
    p = {"w": torch.zeros(1)}
    state = t.init_state(p)
    moves = []
    for _ in range(3):
        new, state = t.step({"w": torch.full((1,), 8.0)}, state, p)
        moves.append(-new["w"].item())
    assert moves == pytest.approx([1.0, 0.5, 0.0], rel=1e-6)


# ------------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: schedules.polynomial(1.0, 0.0, total_steps=5, power=0.0), ValueError, "polynomial: power must be a number above 0"),
        (lambda: schedules.polynomial(1.0, 0.0, total_steps=-5), ValueError, "polynomial: total_steps must be an integer of at least 0, but got -5"),
        (lambda: schedules.exponential(1.0), TypeError, "missing a required argument: 'gamma'"),
        (lambda: schedules.exponential(1.0, gamma=-0.5), ValueError, "exponential: gamma must be a number of at least 0"),
        (lambda: schedules.exponential(1.0, gamma=0.5, step_size=0), ValueError, "exponential: step_size must be an integer of at least 1, but got 0"),
        (lambda: schedules.exponential(1.0, gamma=0.5, step_size=1.5), TypeError, "step_size must be an integer"),
        (lambda: schedules.exponential(1.0, gamma=None), TypeError, "exponential: gamma must be"),
        (lambda: schedules.cosine(1.0, total_steps=0, periodic=True), ValueError, "cosine: total_steps must be at least 1 if periodic"),
        (lambda: schedules.warmup_stable_decay(1.0, warmup_steps=5, decay_steps=6, total_steps=10), ValueError, r"warmup_steps and decay_steps must be at most total_steps together, which counts both, but got 5 \+ 6 > 10"),
        (lambda: schedules.warmup_stable_decay(1.0, warmup_steps=5, decay_steps=0, total_steps=10), ValueError, "decay_steps must be an integer of at least 1"),
        (lambda: schedules.warmup_stable_decay(1.0, warmup_steps=5, decay_steps=5, total_steps=10, shape="sqrt"), ValueError, "warmup_stable_decay: shape must be 'linear' or 'cosine' or '1-sqrt', but got 'sqrt'"),
        (lambda: schedules.inverse_sqrt(1.0, timescale=0.0), ValueError, "inverse_sqrt: timescale must be a number above 0"),
        (lambda: schedules.inverse_sqrt(1.0, warmup_steps=-1), ValueError, "inverse_sqrt: warmup_steps must be an integer of at least 0"),
        (lambda: schedules.one_cycle(1.0, total_steps=0), ValueError, "one_cycle: total_steps must be an integer of at least 1"),
        (lambda: schedules.one_cycle(1.0, total_steps=5, pct_start=1.5), ValueError, r"one_cycle: pct_start must be a number in \[0, 1\]"),
        (lambda: schedules.one_cycle(1.0, total_steps=5, shape="cos"), ValueError, "one_cycle: shape must be 'linear' or 'cosine', but got 'cos'"),
        (lambda: schedules.one_cycle(1.0, total_steps=5, div_factor=0.0), ValueError, "one_cycle: div_factor must be a number above 0"),
        (lambda: schedules.cyclic(0.1, 1.0, step_size_up=0), ValueError, "cyclic: step_size_up must be"),
        (lambda: schedules.cyclic(0.1, 1.0, step_size_up=1, step_size_down=0), ValueError, "cyclic: step_size_down must be"),
        (lambda: schedules.cyclic(0.1, 1.0, step_size_up=1, mode="square"), ValueError, "cyclic: mode must be 'triangular' or"),
        (lambda: schedules.cosine_with_restarts(1.0, cycle_steps=0), ValueError, "cosine_with_restarts: cycle_steps must be"),
        (lambda: schedules.cosine_with_restarts(1.0, cycle_steps=2, cycle_mult=1.5), TypeError, "cycle_mult must be an integer of at least 1, but got 1.5"),
        (lambda: schedules.piecewise_constant((1.0, 0.5), (3, 6)), ValueError, "piecewise_constant: there must be one more of values than of boundaries, but got 2 and 2"),
        (lambda: schedules.piecewise_constant((1.0, 0.5, 0.1), (6, 3)), ValueError, r"piecewise_constant: boundaries must rise from each to the next, but got \(6, 3\)"),
        (lambda: schedules.piecewise_constant((1.0, 0.5, 0.1), (3, 3)), ValueError, "must rise"),
        (lambda: schedules.piecewise_constant((1.0, 0.5), (-1,)), ValueError, r"boundaries\[0\] must be an integer of at least 0, but got -1"),
        (lambda: schedules.piecewise_constant((1.0, 0.5), (1.5,)), TypeError, r"boundaries\[0\] must be an integer"),
        (lambda: schedules.piecewise_constant((1.0, 0.5), 3), TypeError, "piecewise_constant: boundaries must be a tuple of integers, but got 3"),
        (lambda: schedules.piecewise_constant(1.0, ()), TypeError, "piecewise_constant: values must be a tuple, but got 1.0"),
        (lambda: schedules.piecewise_constant((1.0, "x"), (3,)), TypeError, r"piecewise_constant: values\[1\] must be a number, a 0-d tensor or a schedule"),
        (lambda: schedules.piecewise_interpolate((1.0, 0.5), (0,)), ValueError, r"piecewise_interpolate: boundaries\[0\] must be an integer of at least 1, but got 0"),
        (lambda: schedules.piecewise_interpolate((1.0, 0.5), (3,), shape="cubic"), ValueError, "piecewise_interpolate: shape must be"),
        (lambda: schedules.join((), ()), ValueError, "join: there must be one more of schedules than of boundaries, but got 0 and 0"),
        (lambda: schedules.join((halve, None), (3,)), TypeError, r"join: schedules\[1\] must be"),
        (lambda: schedules.join((halve, halve, halve), (5, 2)), ValueError, "join: boundaries must rise"),
        (lambda: schedules.scale("cosine", 0.5), TypeError, "scale: schedule must be a number, a 0-d tensor or a schedule"),
    ],
)  # fmt: skip
def test_what_is_given_is_checked(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


# --------------------------------------------------------------------------------------------------------------------- plots


def test_plot() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    pyplot = pytest.importorskip("matplotlib.pyplot")
    swept = schedules.linear(torch.tensor([1.0, 2.0], requires_grad=True), 0.0, total_steps=4)
    axes = schedules.plot(schedules.cosine(1.0, total_steps=10), halve, swept, steps=12, labels=["cosine", "halve", "swept"])
    lines = axes.get_lines()
    assert [line.get_label() for line in lines] == ["cosine", "halve", "swept", "swept"]
    assert lines[0].get_ydata().tolist() == [schedules.cosine(1.0, total_steps=10)(t) for t in range(12)]
    assert lines[3].get_ydata().tolist()[:5] == [2.0, 1.5, 1.0, 0.5, 0.0]
    assert schedules.plot(schedules.constant(0.1), steps=3, axes=axes) is axes
    assert axes.get_lines()[-1].get_label() == "constant(0.1)"
    with pytest.raises(ValueError, match="one label for each schedule, but got 1 for 2"):
        schedules.plot(halve, halve, steps=3, labels=["one"])
    pyplot.close(axes.figure)


def test_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        schedules.plot(halve, steps=3)
