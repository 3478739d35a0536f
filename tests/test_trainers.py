"""Schedules in parameter groups, and the tools around an optimizer that read and write there."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import lr_scheduler, swa_utils

import purestep as ps
from purestep import optim

WARM = ps.schedules.warmup_cosine(0.1, warmup_steps=3, total_steps=12)
FALL = ps.schedules.linear(0.1, 0.0, total_steps=20)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int, scheduler: Any = None, seed: int = 0) -> list[Any]:
    """The learning rates that the groups show after each step."""
    generator = torch.Generator().manual_seed(seed)
    shown = []
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(5, 4, generator=generator)).square().sum().backward()
        optimizer.step()
        shown.append(optimizer.param_groups[0]["lr"])
        if scheduler is not None:
            scheduler.step()
    return shown


def by_hand(transform: ps.Transform, lrs: list[float], seed: int = 0) -> dict[str, Tensor]:
    """The parameters after steps with these learning rates."""
    net = model()
    params = {k: p.detach() for k, p in net.named_parameters()}
    state = transform.init_state(params)
    generator = torch.Generator().manual_seed(seed)
    for lr in lrs:
        x = torch.randn(5, 4, generator=generator)
        grads = torch.func.grad(lambda p, x=x: torch.func.functional_call(net, p, (x,)).square().sum())(params)
        params, state = transform.replace(lr=lr).step(grads, state, params)
    return params


def check(net: nn.Module, params: dict[str, Tensor]) -> None:
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.detach(), params[name], rtol=1e-5, atol=1e-7)


def through_file(x: Any) -> Any:
    """What `torch.load` makes of it by default."""
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file)


# ---------------------------------------------------------------------------------------------------- what a group shows


@pytest.mark.parametrize("schedule", [FALL, lambda step: 0.1 / (step + 1)], ids=["value", "lambda"])
def test_a_group_shows_the_number_of_the_last_step(schedule: Any) -> None:
    net = model()
    optimizer = optim.Optimizer(net.named_parameters(), ps.adamw(lr=schedule))
    assert optimizer.param_groups[0]["lr"] == optimizer.defaults["lr"] == 0.1
    assert train(net, optimizer, 4) == [schedule(k) for k in range(4)]
    check(net, by_hand(ps.adamw(), [schedule(k) for k in range(4)]))


def test_a_schedule_that_begins_at_0_shows_what_can_be_multiplied() -> None:
    net = model()
    optimizer = optim.AdamW(net.parameters(), lr=WARM)
    assert optimizer.param_groups[0]["lr"] == WARM(1) > 0
    assert train(net, optimizer, 3) == [WARM(0), WARM(1), WARM(2)]


def test_schedules_of_other_options_and_within_tuples() -> None:
    net = model()
    optimizer = optim.Adam(net.parameters(), betas=(ps.schedules.linear(0.0, 0.8, total_steps=4), 0.99), weight_decay=FALL)
    assert optimizer.param_groups[0]["betas"] == (0.0, 0.99)
    train(net, optimizer, 3)
    assert optimizer.param_groups[0]["betas"] == pytest.approx((0.4, 0.99))
    assert optimizer.param_groups[0]["weight_decay"] == FALL(2)


def test_groups_follow_schedules_of_their_own() -> None:
    net = model()
    groups: Any = [{"params": net[0].parameters(), "lr": WARM}, {"params": net[2].parameters()}]
    optimizer = optim.Optimizer(groups, ps.sgd(lr=FALL, momentum=0.9))
    train(net, optimizer, 3)
    assert [g["lr"] for g in optimizer.param_groups] == [WARM(2), FALL(2)]
    late = nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [late]})
    late.grad = torch.ones(2)
    optimizer.step()
    assert [g["lr"] for g in optimizer.param_groups] == [WARM(3), FALL(3), FALL(0)]  # each as far as it has come
    assert late.tolist() == pytest.approx([0.9, 0.9])


def test_parts_of_a_partition_follow_schedules_of_their_own() -> None:
    net = model()
    transform = ps.partition({"a": ps.sgd(lr=FALL), "b": ps.adamw(lr=WARM)}, ps.by_ndim({2: "a"}, default="b"))
    for together in (transform, ps.chain(ps.clip_by_global_norm(1e9), transform)):
        optimizer = optim.Optimizer(net.named_parameters(), together)
        train(net, optimizer, 3)
        assert [g["lr"] for g in optimizer.param_groups] == [FALL(2), WARM(2)]


def test_a_schedule_of_a_whole_transform() -> None:
    net = model()
    schedule = ps.schedules.linear(2.0, 1.0, total_steps=10)
    optimizer = optim.Optimizer(net.parameters(), ps.chain(ps.clip_by_global_norm(schedule), ps.sgd(lr=0.1)))
    train(net, optimizer, 3)
    assert optimizer.param_groups[0]["max_norm"] == schedule(2)


def test_a_skipped_step_does_not_move_what_is_shown() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = optim.Optimizer([p], ps.skip_if_nonfinite(ps.sgd(lr=FALL)))
    for grad in (1.0, float("nan"), 1.0):
        p.grad = torch.full((2,), grad)
        optimizer.step()
    assert optimizer.param_groups[0]["lr"] == FALL(1)


# --------------------------------------------------------------------------------------------------------- what is written


def test_a_number_that_is_written_replaces_the_schedule() -> None:
    net = model()
    optimizer = optim.Optimizer(net.parameters(), ps.adamw(lr=FALL))
    train(net, optimizer, 2)
    optimizer.param_groups[0]["lr"] = 0.01
    assert train(net, optimizer, 2) == [0.01, 0.01]
    optimizer.param_groups[0]["lr"] *= 0.5
    assert train(net, optimizer, 1) == [0.005]
    optimizer.param_groups[0]["lr"] = FALL  # and a schedule is followed again
    assert train(net, optimizer, 1) == [FALL(5)]


def test_what_replaced_a_schedule_is_resumed() -> None:
    net = model()
    optimizer = optim.Optimizer(net.parameters(), ps.sgd(lr=FALL))
    train(net, optimizer, 2)
    optimizer.param_groups[0]["lr"] = 0.01
    saved = through_file(optimizer.state_dict())  # no step in between
    other = optim.Optimizer(net.parameters(), ps.sgd(lr=FALL))
    other.load_state_dict(saved)
    assert train(net, other, 2) == [0.01, 0.01]


FACTORS = {
    "LambdaLR, constant": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1.0),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.5),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.25, 1.0, 4),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.05, anneal_epochs=3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.4, total_steps=8, cycle_momentum=False),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.1, 0.4, 2, cycle_momentum=False),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
}


@pytest.mark.parametrize("make", FACTORS.values(), ids=FACTORS)
@pytest.mark.parametrize("schedule", [WARM, FALL], ids=["warm", "fall"])
def test_a_scheduler_of_torchs_multiplies_the_schedule(make: Any, schedule: ps.schedules.Schedule) -> None:
    net = model()
    optimizer = optim.Optimizer(net.named_parameters(), ps.adam(lr=schedule))
    scheduler = make(optimizer)
    plain = model()
    alone = torch.optim.Adam(plain.parameters(), lr=optimizer.param_groups[0]["initial_lr"])  # torch's alone: its factors
    others = make(alone)
    base = alone.param_groups[0]["initial_lr"]
    factors = [x / base for x in train(plain, alone, 6, others)]
    train(net, optimizer, 6, scheduler)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(alone.param_groups[0]["lr"])  # the scheduler's own number
    check(net, by_hand(ps.adam(), [schedule(k) * f for k, f in enumerate(factors)]))


def test_a_scheduler_that_begins_at_0_is_refused() -> None:
    net = model()
    optimizer = optim.Optimizer(net.parameters(), ps.sgd(lr=ps.schedules.join((0.0, 0.1), boundaries=(5,))))
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    with pytest.raises(ValueError, match=r"'initial_lr' is 0.*factor of 1"):
        train(net, optimizer, 1, scheduler)
    optimizer.param_groups[0]["initial_lr"] = 1.0
    optimizer.param_groups[0]["lr"] = 0.5
    train(net, optimizer, 1)


def test_reduce_lr_on_plateau_goes_on_from_the_number_of_the_last_step() -> None:
    net = model()
    optimizer = optim.Optimizer(net.parameters(), ps.sgd(lr=FALL))
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=1)
    assert train(net, optimizer, 3) == [FALL(0), FALL(1), FALL(2)]
    for _ in range(3):
        scheduler.step(1.0)
    assert train(net, optimizer, 2) == [FALL(2) / 2] * 2


# ------------------------------------------------------------------------------------------------------------- checkpoints


TRANSFORMS: dict[str, Any] = {
    "value": lambda: ps.adamw(lr=WARM),
    "lambda": lambda: ps.adamw(lr=lambda step: 0.1 / (step + 1)),
    "clipped": lambda: ps.chain(ps.clip_by_global_norm(lambda step: 1.0 + step), ps.sgd(lr=WARM, momentum=0.9)),
    "partition": lambda: ps.partition(
        {"a": ps.sgd(lr=lambda step: 0.1 / (step + 1)), "b": ps.adamw(lr=WARM)}, ps.by_ndim({2: "a"}, default="b")
    ),
    "skip": lambda: ps.skip_if_nonfinite(ps.adam(lr=WARM)),
}


@pytest.mark.parametrize("make", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("scheduled", [None, *list(FACTORS)[:3]])
def test_a_resumed_run_is_the_uninterrupted_one(make: Any, scheduled: str | None) -> None:
    def begin() -> tuple[Any, Any, Any]:
        net = model()
        optimizer = optim.Optimizer(net.named_parameters(), make())
        return net, optimizer, None if scheduled is None else FACTORS[scheduled](optimizer)

    net, optimizer, scheduler = begin()
    train(net, optimizer, 3, scheduler)
    saved: Any = {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
    if scheduler is not None:
        saved["scheduler"] = {k: v for k, v in scheduler.state_dict().items() if k != "lr_lambdas"} | {"lr_lambdas": [None] * 3}
    saved = through_file(saved)
    shown = train(net, optimizer, 4, scheduler, seed=1)

    other, resumed, again = begin()
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    if again is not None:
        again.load_state_dict(saved["scheduler"])
    assert train(other, resumed, 4, again, seed=1) == shown
    for p, q in zip(net.parameters(), other.parameters()):
        assert torch.equal(p, q)


def test_copies_follow_the_schedule_too() -> None:
    net = model()
    optimizer = optim.Optimizer(net.parameters(), ps.sgd(lr=FALL))
    train(net, optimizer, 2)
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        for p in copied.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        copied.step()
        assert copied.param_groups[0]["lr"] == FALL(2)
    assert optimizer.param_groups[0]["lr"] == FALL(1)


def test_a_checkpoint_that_holds_a_schedule_is_followed() -> None:
    net = model()
    optimizer = optim.Optimizer(net.parameters(), ps.sgd(lr=FALL))
    train(net, optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["lr"] = WARM  # as they were until the groups showed numbers
    del saved["param_groups"][0]["scheduled_lr"]
    optimizer.load_state_dict(saved)
    assert train(net, optimizer, 1) == [WARM(2)]


def test_state_dict_shows_what_a_compiled_step_did() -> None:
    net = model()
    optimizer = optim.Optimizer(net.parameters(), ps.sgd(lr=FALL))
    train(net, optimizer, 1)

    @torch.compile(backend="eager")
    def step() -> None:
        optimizer.step()

    for _ in range(2):
        step()
    assert optimizer.state_dict()["param_groups"][0]["lr"] == FALL(2)


# ------------------------------------------------------------------------------------------------- defaults of a partition


@pytest.mark.parametrize("name", ["OneCycleLR", "CyclicLR"])
@pytest.mark.parametrize(
    ("parts", "option"),
    [
        ((ps.sgd(0.1, momentum=0.9), ps.muon(0.1, momentum=0.8)), "momentum"),
        ((ps.adamw(0.1), ps.lion(0.1)), "betas"),
    ],
)
def test_momentum_is_cycled_where_every_part_has_it(name: str, parts: Any, option: str) -> None:
    net = model()
    optimizer = optim.Optimizer(net.named_parameters(), ps.partition(dict(zip("ba", parts)), ps.by_ndim({2: "a"}, default="b")))
    assert option in optimizer.defaults
    if name == "OneCycleLR":
        scheduler: Any = lr_scheduler.OneCycleLR(optimizer, 0.4, total_steps=8)
    else:
        scheduler = lr_scheduler.CyclicLR(optimizer, 0.1, 0.4, 2)
    before = [g[option] for g in optimizer.param_groups]
    train(net, optimizer, 3, scheduler)
    assert all(a != g[option] for a, g in zip(before, optimizer.param_groups))


def test_momentum_that_not_every_part_has_is_not_cycled() -> None:
    transform = ps.partition({"a": ps.sgd(0.1, momentum=0.9), "b": ps.adamw(0.2)}, ps.by_ndim({2: "a"}, default="b"))
    optimizer = optim.Optimizer(model().named_parameters(), transform)
    assert optimizer.defaults["lr"] == 0.1  # transformers' schedulers look here
    assert "momentum" not in optimizer.defaults
    assert "betas" not in optimizer.defaults
    with pytest.raises(ValueError, match="must support momentum or beta1"):
        lr_scheduler.OneCycleLR(optimizer, 0.4, total_steps=8)


def test_parts_that_come_later_are_asked_too() -> None:
    both = ps.partition(
        {"a": ps.sgd(0.1, momentum=0.9), "b": ps.adamw(0.2), "c": ps.sgd(0.3, momentum=0.5)},
        lambda path, p: "abc"[min(p.ndim, 2)],
    )
    params = {name: nn.Parameter(torch.ones(shape)) for name, shape in {"x": (), "y": (2,), "z": (2, 2)}.items()}
    optimizer = optim.Optimizer(params.items(), both)
    assert "momentum" not in optimizer.defaults
    fewer = ps.partition({"a": ps.sgd(0.1, momentum=0.9), "c": ps.sgd(0.3, momentum=0.5)}, {"x": "a", "z": "c"})
    optimizer = optim.Optimizer([(name, params[name]) for name in "xz"], fewer)
    assert optimizer.defaults["momentum"] == 0.9


# ------------------------------------------------------------------------------------------------- state that tools can read


SHARING: dict[str, Any] = {
    "skip": lambda: ps.skip_if_nonfinite(ps.adamw(lr=0.1)),
    "accumulate": lambda: ps.accumulate(ps.adamw(lr=0.1), 2),
    "lookahead": lambda: ps.lookahead(ps.sgd(lr=0.1, momentum=0.9), k=2),
    "prodigy": lambda: ps.prodigy(),
    "stateless part": lambda: ps.partition({"a": ps.sgd(0.1), "b": ps.adamw(0.1)}, ps.by_ndim({2: "a"}, default="b")),
    "whole part": lambda: ps.partition(
        {"a": ps.sgd(0.1), "b": ps.accumulate(ps.adamw(0.1), 2)}, ps.by_ndim({2: "a"}, default="b")
    ),
    "scheduled": lambda: ps.skip_if_nonfinite(ps.adamw(lr=WARM)),
    "scheduled clip": lambda: ps.chain(ps.clip_by_global_norm(ps.schedules.linear(1.0, 2.0, total_steps=9)), ps.adamw(0.1)),
}
each_sharing = pytest.mark.parametrize("make", SHARING.values(), ids=SHARING)


@each_sharing
def test_state_is_that_of_parameters(make: Any) -> None:
    net = model()
    optimizer = optim.Optimizer(net.named_parameters(), make())
    for _ in range(2):
        assert all(isinstance(p, nn.Parameter) for p in optimizer.state)
        assert all(isinstance(k, int) for k in optimizer.state_dict()["state"])
        train(net, optimizer, 3)


@each_sharing
@pytest.mark.parametrize("flat", [False, True])
def test_distributed_checkpoints(make: Any, flat: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    net, other = model(), model()
    optimizer, resumed = (optim.Optimizer(m.named_parameters(), make()) for m in (net, other))
    train(net, optimizer, 3)
    saved = through_file(get_optimizer_state_dict(net, optimizer, options=options))
    other.load_state_dict(net.state_dict())
    set_optimizer_state_dict(other, resumed, saved, options=options)
    for m, o in ((net, optimizer), (other, resumed)):
        train(m, o, 4, seed=1)
    for p, q in zip(net.parameters(), other.parameters()):
        assert torch.equal(p, q)


@each_sharing
def test_a_shared_state_is_resumed_bit_for_bit(make: Any) -> None:
    net, other = model(), model()
    optimizer, resumed = (optim.Optimizer(m.named_parameters(), make()) for m in (net, other))
    train(net, optimizer, 3)
    saved = through_file(optimizer.state_dict())
    other.load_state_dict(net.state_dict())
    resumed.load_state_dict(saved)
    copied = {name: x.clone() if isinstance(x, Tensor) else x for name, x in optimizer.shared.items()}
    assert list(resumed.shared) == list(copied)
    for m, o in ((net, optimizer), (other, resumed)):
        train(m, o, 4, seed=1)
    for p, q in zip(net.parameters(), other.parameters()):
        assert torch.equal(p, q)


@each_sharing
def test_parameters_and_state_are_swapped_in(make: Any) -> None:
    net = model()
    optimizer = optim.Optimizer(net.named_parameters(), make())
    train(net, optimizer, 3)
    others = {  # in the order of the groups
        name: nn.Parameter(net.get_parameter(name).detach().clone())
        for g in optimizer.param_groups
        for name in g["param_names"]
    }
    before = copy.deepcopy(optimizer.state_dict())
    with optim.swap_in_optimizer_params_and_state(optimizer, others, copy.deepcopy(before)):
        for p in others.values():
            p.grad = torch.ones_like(p)
        optimizer.step()
    after = optimizer.state_dict()
    assert before["param_groups"] == after["param_groups"]
    torch.testing.assert_close(before["state"], after["state"], rtol=0, atol=0)
    train(net, optimizer, 1)
    assert "scheduled_lr" not in optimizer.param_groups[0] or optimizer.param_groups[0]["scheduled_lr"] == WARM(3)


def test_checkpoints_with_the_former_place_are_read() -> None:
    net, other = model(), model()
    optimizer, resumed = (optim.Optimizer(m.named_parameters(), ps.accumulate(ps.adam(), 4)) for m in (net, other))
    train(net, optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    first = saved["state"][0]
    saved["state"]["shared"] = {k.removeprefix("shared."): first.pop(k) for k in list(first) if k.startswith("shared.")}
    assert saved["state"]["shared"]
    resumed.load_state_dict(saved)
    assert dict(resumed.shared) == dict(optimizer.shared)


def test_the_shared_state_moves_on_when_its_parameter_is_frozen_or_dropped() -> None:
    net = model()
    optimizer = optim.Optimizer(net.named_parameters(), ps.accumulate(ps.adam(), 4))
    train(net, optimizer, 2)
    found = dict(optimizer.shared)
    net[0].weight.requires_grad_(False)
    net[0].weight.grad = None
    state = optimizer.state_dict()["state"]
    assert [k for k, own in state.items() if any(name.startswith("shared.") for name in own)] == [1]
    assert dict(optimizer.shared) == found
    train(net, optimizer, 2)
    assert float(optimizer.state[net[0].bias]["step"]) == 1.0


# ------------------------------------------------------------------------------------------------------- parts of partitions


UNLIKE: dict[str, Any] = {
    "galore": lambda: ps.galore(0.1, rank=2),
    "novograd": lambda: ps.novograd(0.1),
    "quantized": lambda: ps.quantize_state(ps.adam(0.1)),
    "sm3": lambda: ps.sm3(0.1),
    "adafactor": lambda: ps.adafactor(0.1),
    "sgd": lambda: ps.sgd(0.1),
    "muon": lambda: ps.muon(0.1),
}


@pytest.mark.parametrize("make", UNLIKE.values(), ids=UNLIKE)
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_an_optimizer_takes_its_own_checkpoint(make: Any, together: bool, first: bool) -> None:
    labels = ps.by_path({"weight": "a" if first else "b"}, default="b" if first else "a")
    if make is UNLIKE["muon"]:
        labels = ps.by_ndim({2: "a"}, default="b")
    parts = {"a": make(), "b": ps.adamw(0.1)}
    transform = ps.chain(ps.clip_by_global_norm(1.0), ps.partition(parts, labels)) if together else ps.partition(parts, labels)

    def begin() -> tuple[Any, Any]:
        net = nn.Sequential(nn.Linear(70, 64), nn.Linear(64, 3))
        return net, optim.Optimizer(net.named_parameters(), transform)

    (net, optimizer), (other, resumed) = begin(), begin()
    for i in range(4):
        for p in net.parameters():
            p.grad = torch.full_like(p, float(i))
        optimizer.step()
        if i == 1:
            other.load_state_dict(net.state_dict())
            resumed.load_state_dict(through_file(optimizer.state_dict()))
        if i > 1:
            for p in other.parameters():
                p.grad = torch.full_like(p, float(i))
            resumed.step()
    for p, q in zip(net.parameters(), other.parameters()):
        torch.testing.assert_close(p, q, rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"dampening": 0.5}, {"nesterov": True}], ids=["plain", "dampened", "nesterov"])
@pytest.mark.parametrize("how", ["deleted", "None", "cleared"])
@pytest.mark.parametrize("flags", [{}, {"foreach": True}, {"foreach": False}], ids=["default", "foreach", "loop"])
def test_momentum_that_is_taken_away_begins_anew(options: Any, how: str, flags: Any) -> None:
    results = []
    for namespace in (torch.optim, optim):
        params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]
        optimizer = namespace.SGD(params, lr=0.1, momentum=0.9, **options, **flags)
        for i in range(5):
            for p in params:
                p.grad = torch.full_like(p, 1.0 + i)
            if i == 2 and how == "deleted":
                del optimizer.state[params[0]]["momentum_buffer"]
            elif i == 2 and how == "None":
                optimizer.state[params[0]]["momentum_buffer"] = None
            elif i == 2:
                optimizer.state.clear()
            optimizer.step()
        results.append([p.detach() for p in params])
    torch.testing.assert_close(results[0], results[1])


def test_switches_and_numbers_that_only_go_together_are_changed_together() -> None:
    results = []
    for namespace in (torch.optim, optim):
        p = nn.Parameter(torch.ones(3))
        optimizer: Any = namespace.SGD([p], lr=0.1, momentum=0.9, dampening=0.1)
        for i in range(4):
            p.grad = torch.full_like(p, 1.0 + i)
            if i == 2:
                optimizer.param_groups[0].update(nesterov=True, dampening=0, maximize=True)
            optimizer.step()
        results.append(p.detach())
    torch.testing.assert_close(results[0], results[1])


def late(step: Any) -> Any:
    if int(step) == 2:
        raise ZeroDivisionError
    return 0.1


@ps.leafwise()
def broken(g: Tensor, p: Tensor) -> Tensor:
    raise ZeroDivisionError


@pytest.mark.parametrize("part", [ps.sgd(lr=late), ps.adamw(betas=(late, 0.9)), ps.chain(broken(), ps.scale(-0.1))])
@pytest.mark.parametrize("flags", [{}, {"foreach": True}])
def test_an_exception_in_a_part_leaves_all_parts_where_they_were(part: Any, flags: Any) -> None:
    net = model()
    transform = ps.partition({"a": ps.adamw(0.1), "b": part}, ps.by_ndim({2: "a"}, default="b"))
    optimizer = optim.Optimizer(net.named_parameters(), transform, **flags)
    before: Any = None
    with pytest.raises(ZeroDivisionError):  # noqa: PT012
        for _ in range(3):
            before = copy.deepcopy((net.state_dict(), optimizer.state_dict()["state"]))
            train(net, optimizer, 1)
    torch.testing.assert_close((net.state_dict(), optimizer.state_dict()["state"]), before, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------------------------ averages

AVERAGING: dict[str, Any] = {
    "asgd": (lambda: ps.asgd(lr=0.1, lambd=0.0, t0=0), "ax"),
    "ema": (lambda: ps.chain(ps.sgd(lr=0.1), ps.ema_params(0.5)), "ema"),
    "average": (lambda: ps.chain(ps.adamw(lr=0.1), ps.average_params()), "average"),
    "lookahead": (lambda: ps.lookahead(ps.sgd(lr=0.1), 2, 0.5), "slow"),
    "schedule-free": (lambda: ps.schedule_free_adamw(lr=0.1), "z"),
    "inside": (lambda: ps.skip_if_nonfinite(ps.chain(ps.sgd(lr=0.1), ps.ema_params(0.5))), "ema"),
}
each_average = pytest.mark.parametrize(("make", "field"), AVERAGING.values(), ids=AVERAGING)


@each_average
def test_averages_are_those_of_the_pure_function(make: Any, field: str) -> None:
    net = model()
    optimizer = optim.Optimizer(net.named_parameters(), make())
    transform = make()
    params = {k: p.detach().clone() for k, p in net.named_parameters()}
    state = transform.init_state(params)
    for i in range(3):
        grads = {k: torch.full_like(p, 1.0 + i) for k, p in params.items()}
        params, state = transform.step(grads, state, params)
        for k, p in net.named_parameters():
            p.grad = grads[k]
        optimizer.step()
    torch.testing.assert_close(optimizer.eval_params(), ps.eval_params(state, params))
    assert all(not x.requires_grad for x in optimizer.eval_params().values())


@each_average
def test_what_was_never_updated_is_its_own_average(make: Any, field: str) -> None:
    net = model()
    optimizer = optim.Optimizer(net.named_parameters(), make())
    torch.testing.assert_close(dict(optimizer.eval_params()), {k: p.detach() for k, p in net.named_parameters()})
    for _ in range(3):
        net[0].weight.grad = torch.ones_like(net[0].weight)
        optimizer.step()
    found = optimizer.eval_params()
    assert list(found) == [name for name, _ in net.named_parameters()]
    for name, p in net.named_parameters():
        shown = optimizer.state[p][field]
        assert bool((shown != 0).all())  # no average is zero
        assert torch.equal(found[name], p) is (name != "0.weight")
        if name != "0.weight":
            assert torch.equal(shown, p)


@pytest.mark.parametrize("cls", [optim.ASGD])
def test_averages_of_a_class_without_names(cls: Any) -> None:
    params = [nn.Parameter(torch.full((2,), 3.0)), nn.Parameter(torch.ones(3))]
    optimizer = cls(params)
    params[1].grad = torch.ones(3)
    optimizer.step()
    assert list(optimizer.eval_params()) == ["0", "1"]
    assert torch.equal(optimizer.state[params[0]]["ax"], params[0])


def test_parameters_are_averages_for_a_while() -> None:
    net = model()
    optimizer = optim.Optimizer(net.named_parameters(), ps.schedule_free_adamw(lr=0.1))
    train(net, optimizer, 3)
    before, averages = copy.deepcopy(net.state_dict()), {k: x.clone() for k, x in optimizer.eval_params().items()}
    tensors = list(net.parameters())
    with pytest.raises(ZeroDivisionError), optimizer.use_eval_params():  # noqa: PT012
        torch.testing.assert_close(dict(net.state_dict()), averages, rtol=0, atol=0)
        with pytest.raises(RuntimeError, match="inside another"), optimizer.use_eval_params():
            pass
        with pytest.raises(RuntimeError, match="No step can be made inside"):
            optimizer.step()
        raise ZeroDivisionError
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert all(p is q for p, q in zip(net.parameters(), tensors))
    train(net, optimizer, 1)


def test_parts_of_a_partition_have_averages_of_their_own() -> None:
    net = model()
    parts = {"a": ps.asgd(lr=0.1, lambd=0.0, t0=0), "b": ps.sgd(lr=0.1)}
    for together in (False, True):
        transform = ps.partition(parts, ps.by_ndim({2: "a"}, default="b"))
        optimizer = optim.Optimizer(
            net.named_parameters(), ps.chain(ps.clip_by_global_norm(1.0), transform) if together else transform
        )
        train(net, optimizer, 3)
        found = optimizer.eval_params()
        assert {k for k, p in net.named_parameters() if not torch.equal(found[k], p)} == {"0.weight", "2.weight"}


def test_the_free_function_refuses_what_is_no_state() -> None:
    net = model()
    optimizer = optim.Optimizer(net.named_parameters(), ps.chain(ps.sgd(lr=0.1), ps.ema_params(0.5)))
    train(net, optimizer, 1)
    params = dict(net.named_parameters())
    for no_state in (optimizer, optimizer.state, optimizer.state_dict(), optimizer.state[net[0].weight], None, params):
        with pytest.raises(TypeError, match=r"optimizer\.eval_params\(\)"):
            ps.eval_params(no_state, params)
