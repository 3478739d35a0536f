"""timm's schedulers, factory of optimizers, parameter groups, scaler, averages and checkpoints."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import purestep as ps
from purestep import optim
from tests.frameworks.runs import agree, batches, by_hand, composed, loss_of, model, train
from tests.test_trainers import through_file

pytest.importorskip("timm")
timm_optim = pytest.importorskip("timm.optim")
scheduler = pytest.importorskip("timm.scheduler")
utils = pytest.importorskip("timm.utils")

pytestmark = pytest.mark.frameworks

STEPS = 10
WARM = {"warmup_t": 3, "warmup_lr_init": 0.001}
SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "cosine": lambda o: scheduler.CosineLRScheduler(o, t_initial=8, lr_min=0.001, **WARM),
    "cosine, cycles": lambda o: scheduler.CosineLRScheduler(o, t_initial=3, cycle_limit=3, cycle_decay=0.5),
    "tanh": lambda o: scheduler.TanhLRScheduler(o, t_initial=8, lr_min=0.001, **WARM),
    "step": lambda o: scheduler.StepLRScheduler(o, decay_t=2, decay_rate=0.5, **WARM),
    "multistep": lambda o: scheduler.MultiStepLRScheduler(o, decay_t=[4, 6], decay_rate=0.5, **WARM),
    "poly": lambda o: scheduler.PolyLRScheduler(o, t_initial=8, lr_min=0.001, **WARM),
    "plateau": lambda o: scheduler.PlateauLRScheduler(o, decay_rate=0.5, patience_t=1, **WARM),
    "noise": lambda o: scheduler.CosineLRScheduler(o, t_initial=8, noise_range_t=(2, 8), noise_seed=3),
}


def fit(net: nn.Module, optimizer: Any, schedule: Any, steps: int = STEPS) -> list[list[float]]:
    """The learning rates of all groups at each step."""
    shown = []
    for k, batch in enumerate(batches(steps)):
        shown.append([g["lr"] for g in optimizer.param_groups])
        train(net, optimizer, [batch])
        schedule.step(k + 1, 1.0)
    return shown


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
def test_a_scheduler_drives_a_class_as_torchs(make: Any, name: str) -> None:
    results = []
    for namespace in (optim, torch.optim):
        net = model()
        groups = [{"params": net[0].parameters()}, {"params": net[2].parameters(), "lr": 0.02, "lr_scale": 0.5}]
        optimizer = getattr(namespace, name)(groups, lr=0.1)
        results.append((fit(net, optimizer, make(optimizer)), net))
    assert results[0][0] == results[1][0]
    assert len({tuple(x) for x in results[0][0]}) > 3
    agree(results[0][1], results[1][1])


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
def test_a_scheduler_drives_all_parts_of_a_partition(make: Any) -> None:
    """Each from the learning rate that it begins with."""
    parts = {"m": ps.adamw(0.1), "rest": ps.sgd(0.02, momentum=0.9)}
    split = ps.partition(parts, ps.by_ndim({2: "m"}, default="rest"))
    transform = ps.chain(ps.clip_by_global_norm(0.5), split)
    net = model()
    optimizer = optim.Optimizer(net.named_parameters(), transform)
    shown = fit(net, optimizer, make(optimizer))
    assert len({tuple(x) for x in shown}) > 3

    params = {name: p.detach().clone() for name, p in model().named_parameters()}
    state, other = transform.init_state(params), model()
    for batch, (first, second) in zip(batches(STEPS), shown):
        other.load_state_dict(params)
        grads = dict(zip(params, torch.autograd.grad(loss_of(other, batch), list(other.parameters()))))
        params, state = transform.replace(**{"m.lr": first, "rest.lr": second}).step(grads, state, params)
    agree(net, params)


def test_a_scheduler_multiplies_a_schedule() -> None:
    lr = ps.schedules.linear(0.1, 0.02, total_steps=6)
    net = model()
    optimizer = optim.Optimizer(net.named_parameters(), ps.chain(ps.clip(0.5), ps.adamw(lr)))
    factors = [x / 0.1 for (x,) in fit(net, optimizer, SCHEDULERS["cosine"](optimizer))]
    product = ps.chain(ps.clip(0.5), ps.adamw(lambda step: lr(step) * factors[int(step)]))
    agree(net, by_hand(model(), product, batches(STEPS)))


def test_updates_within_an_epoch_are_counted() -> None:
    results = []
    for namespace in (optim, torch.optim):
        net = model()
        optimizer = namespace.AdamW(net.parameters(), lr=0.1)
        schedule = scheduler.create_scheduler_v2(
            optimizer, "cosine", num_epochs=3, warmup_epochs=1, step_on_epochs=False, updates_per_epoch=4
        )[0]
        for k, batch in enumerate(batches(STEPS)):
            train(net, optimizer, [batch])
            schedule.step_update(k + 1)
        results.append(net)
    agree(*results)


class Convolution(nn.Module):
    """A layer of each kind that timm's groups tell apart."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(1, 3, 2)
        self.norm = nn.BatchNorm2d(3)
        self.scale = nn.Parameter(torch.ones(1, 3, 1, 1))
        self.head = nn.Linear(3, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.norm(self.stem(x.reshape(-1, 1, 2, 2))) * self.scale).mean((2, 3)))

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"stem": r"^stem", "blocks": [(r"^norm|^scale", None)]}

    def no_weight_decay(self) -> set[str]:
        return {"scale"}


GROUPS: dict[str, Callable[[nn.Module], Any]] = {
    "weight decay": lambda net: timm_optim.param_groups_weight_decay(net, 0.1, no_weight_decay_list=["scale"]),
    "layer decay": lambda net: timm_optim.param_groups_layer_decay(net, 0.1, layer_decay=0.5),
}


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
@pytest.mark.parametrize("grouped", GROUPS.values(), ids=GROUPS)
def test_parameter_groups_are_taken(name: str, grouped: Any) -> None:
    results = []
    for namespace in (optim, torch.optim):
        net = Convolution()
        optimizer = getattr(namespace, name)(grouped(net), lr=0.1)
        shown = fit(net, optimizer, SCHEDULERS["cosine"](optimizer))
        results.append((shown, [g["weight_decay"] for g in optimizer.param_groups], net))
    assert results[0][:2] == results[1][:2]
    assert len({*results[0][1]}) == 2
    assert len({*results[0][0][0]}) == (3 if grouped is GROUPS["layer decay"] else 1)  # learning rates of groups
    agree(results[0][2], results[1][2])


def test_parameter_groups_are_taken_by_a_transform() -> None:
    net = Convolution()
    transform = ps.chain(ps.clip_by_global_norm(0.5), ps.adamw(0.1))
    optimizer = optim.Optimizer(GROUPS["weight decay"](net), transform)
    train(net, optimizer, batches())
    decay = ps.add_decayed_weights(0.1, mask=lambda path, p: p.ndim > 1 and path != "scale")
    expected = ps.chain(ps.clip_by_global_norm(0.5), ps.scale_by_adam(), decay, ps.scale_by_learning_rate(0.1))
    agree(net, by_hand(Convolution(), expected, batches()))


@pytest.fixture
def registered() -> str:
    """Our AdamW under a name of timm's factory."""
    name = "purestepadamw"
    registry = pytest.importorskip("timm.optim._optim_factory").default_registry
    registry.register(timm_optim.OptimInfo(name=name, opt_class=optim.AdamW, has_betas=True))
    return name


@pytest.mark.parametrize("prefix", ["", "lookahead_"])
@pytest.mark.parametrize(
    "options", [{"weight_decay": 0.1}, {"layer_decay": 0.5, "weight_decay": 0.1}, {"betas": (0.8, 0.9), "foreach": False}]
)
def test_the_factory_makes_it(registered: str, prefix: str, options: dict[str, Any]) -> None:
    results = []
    for name in (registered, "adamw"):
        net = Convolution()
        optimizer = timm_optim.create_optimizer_v2(net, prefix + name, lr=0.1, **options)
        base = getattr(optimizer, "_base_optimizer", optimizer)
        assert type(base) is (optim.AdamW if name == registered else torch.optim.AdamW)
        train(net, optimizer, batches(STEPS))
        results.append(net)
    agree(*results)


def test_lookahead_goes_around_a_composed_transform_and_is_resumed() -> None:
    nets, optimizers = [], []
    for _ in range(2):
        nets.append(model())
        optimizers.append(timm_optim.Lookahead(optim.Optimizer(nets[-1].named_parameters(), composed()), k=3))
    train(nets[0], optimizers[0], batches(5))
    nets[1].load_state_dict(nets[0].state_dict())
    optimizers[1].load_state_dict(through_file(optimizers[0].state_dict()))
    for net, optimizer in zip(nets, optimizers):
        train(net, optimizer, batches(5))
    agree(*nets, rtol=0, atol=0)
    plain = model()
    train(plain, optim.Optimizer(plain.named_parameters(), composed()), batches(5) * 2)
    with pytest.raises(AssertionError):
        agree(*nets[:1], plain)


MAKERS: dict[str, Any] = {
    "AdamW": (lambda net: optim.AdamW(net.parameters(), lr=0.1), lambda net: torch.optim.AdamW(net.parameters(), lr=0.1)),
    "SGD, fused": (
        lambda net: optim.SGD(net.parameters(), lr=0.1, momentum=0.9, fused=True),
        lambda net: torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, fused=True),
    ),
}


@pytest.mark.parametrize(
    "clip", [{}, {"clip_grad": 0.1}, {"clip_grad": 0.05, "clip_mode": "value"}, {"clip_grad": 0.1, "clip_mode": "agc"}]
)
@pytest.mark.parametrize("makers", MAKERS.values(), ids=MAKERS)
def test_the_native_scaler_unscales_clips_and_skips(makers: Any, clip: dict[str, Any]) -> None:
    results = []
    for make in makers:
        net = model()
        optimizer, scaler = make(net), utils.NativeScaler(device="cpu")
        for k, batch in enumerate(batches()):
            optimizer.zero_grad()
            loss = loss_of(net, batch) * (float("inf") if k == 3 else 1.0)
            scaler(loss, optimizer, parameters=net.parameters(), **clip)
        counters = (
            [float(s["step"]) for s in optimizer.state.values()] if "AdamW" in repr(optimizer) else []
        )  # SGD of torch has none
        results.append((net, counters, scaler.state_dict()))
    agree(results[0][0], results[1][0])
    assert results[0][1:] == results[1][1:]


def test_the_native_scaler_skips_a_composed_transform() -> None:
    """A skipped step counts for no schedule and no accumulation."""
    net = model()
    optimizer, scaler = optim.Optimizer(net.named_parameters(), composed()), utils.NativeScaler(device="cpu")
    for k, batch in enumerate(batches()):
        optimizer.zero_grad()
        scaler(loss_of(net, batch) * (float("inf") if k in (0, 3) else 1.0), optimizer)
    kept = [batch for k, batch in enumerate(batches()) if k not in (0, 3)]
    agree(net, by_hand(model(), composed(), kept))


@pytest.mark.parametrize("average", [utils.ModelEma, utils.ModelEmaV2, functools.partial(utils.ModelEmaV3, use_warmup=True)])
def test_averages_of_models_follow_the_parameters(average: Any) -> None:
    results = []
    for make in MAKERS["AdamW"]:
        net = model()
        ema = average(net, decay=0.8)
        train(net, make(net), batches(), lambda ema=ema, net=net: ema.update(net))
        results.append(getattr(ema, "ema", None) or ema.module)
        with pytest.raises(AssertionError):
            agree(results[-1], net)
    agree(*results)


@pytest.mark.parametrize(
    "make",
    [MAKERS["AdamW"][0], lambda net: optim.Optimizer(net.named_parameters(), composed())],
    ids=["AdamW", "composed"],
)
def test_a_run_goes_on_from_a_saved_checkpoint(make: Any, tmp_path: Path) -> None:
    resume = pytest.importorskip("timm.models").resume_checkpoint
    net, other = model(), model(1)
    optimizer, resumed = make(net), make(other)
    train(net, optimizer, batches(3))
    saver = utils.CheckpointSaver(net, optimizer, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path))
    saver.save_checkpoint(0, metric=1.0)
    resume(other, str(tmp_path / "last.pth.tar"), resumed, log_info=False)
    for m, o in ((net, optimizer), (other, resumed)):
        train(m, o, batches(STEPS)[3:])
    agree(other, net, rtol=0, atol=0)
