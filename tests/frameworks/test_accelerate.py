"""accelerate prepares purestep's optimizers, steps them and saves them as it does torch's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import purestep as ps
from purestep import optim
from tests.frameworks import training
from tests.frameworks.training import BOTH, COMPOSED, FALL, WARM, assert_close, assert_moved, assert_same, batches, by_hand

accelerate: Any = pytest.importorskip("accelerate")

pytestmark = pytest.mark.frameworks

SCHEDULERS: dict[str, Any] = {
    "StepLR": lambda made: torch.optim.lr_scheduler.StepLR(made, step_size=2, gamma=0.7),
    "OneCycleLR": lambda made: torch.optim.lr_scheduler.OneCycleLR(made, 0.05, total_steps=24),
    "OneCycleLR, the rates alone": lambda made: torch.optim.lr_scheduler.OneCycleLR(
        made, 0.05, total_steps=24, cycle_momentum=False
    ),
}


def factor(step: int) -> float:
    """What the first of them multiplies with."""
    return 0.7 ** (step // 2)


class Run:
    """A script with accelerate, which may be interrupted between epochs."""

    def __init__(
        self,
        configure: Any,
        *,
        scheduler: str | None = None,
        clip: float | None = None,
        clip_values: float | None = None,
        every: int = 1,
        **options: Any,
    ) -> None:
        self.accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=every, **options)
        self.net, self.clip, self.clip_values = training.network(), clip, clip_values
        made = configure(self.net)
        loader = DataLoader(TensorDataset(*training.data()), batch_size=4)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(self.net, made, loader)
        self.scheduler = self.accelerator.prepare(SCHEDULERS[scheduler](made)) if scheduler else None
        self.shown: list[float] = []

    def train(self, epochs: int) -> Run:
        for _ in range(epochs):
            for x, y in self.loader:
                with self.accelerator.accumulate(self.model):
                    self.accelerator.backward(training.loss(self.model, (x, y)))
                    if self.clip and self.accelerator.sync_gradients:
                        self.accelerator.clip_grad_norm_(self.model.parameters(), self.clip)
                    if self.clip_values and self.accelerator.sync_gradients:
                        self.accelerator.clip_grad_value_(self.model.parameters(), self.clip_values)
                    self.optimizer.step()
                    if self.scheduler is not None:
                        self.scheduler.step()
                    self.optimizer.zero_grad()
                self.shown.append(self.optimizer.param_groups[0]["lr"])
        assert_moved(self.net, training.network())
        return self


def both(build: Any) -> tuple[Run, Run]:
    return build(optim), build(torch.optim)


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("scheduler", ["StepLR", "OneCycleLR"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"every": 3},
        {"clip": 0.3},
        {"clip_values": 0.05},
        {"mixed_precision": "bf16"},
        {"every": 2, "clip": 0.3, "mixed_precision": "bf16"},
    ],
    ids=["alone", "accumulated", "clipped norm", "clipped values", "bf16", "all"],
)
def test_a_script_is_that_of_torchs_optimizer(name: str, scheduler: str, options: Any) -> None:
    found, expected = both(
        lambda namespace: Run(lambda net: training.optimizer(namespace, name, net), scheduler=scheduler, **options).train(2)
    )
    assert_close(found.net, expected.net)
    assert found.shown == pytest.approx(expected.shown, rel=1e-12)
    assert len(set(found.shown)) >= 3


@pytest.mark.parametrize("name", BOTH)
def test_a_step_that_overflows_is_skipped_as_for_torch(name: str) -> None:
    """accelerate makes no gradient scaler on a CPU, so it is given one as on a GPU."""

    def run(namespace: Any) -> Run:
        begun = Run(lambda net: training.optimizer(namespace, name, net), scheduler="StepLR")
        x, y = training.data()
        y[8] = float("inf")  # in the third batch
        begun.loader = begun.accelerator.prepare(DataLoader(TensorDataset(x, y), batch_size=4))
        begun.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        made = begun.optimizer.optimizer
        begun.optimizer = accelerate.optimizer.AcceleratedOptimizer(made, scaler=begun.accelerator.scaler)
        begun.scheduler.optimizers = [begun.optimizer]
        begun.train(2)
        assert begun.accelerator.scaler.get_scale() == 2.0**8  # halved once in each epoch
        return begun

    found, expected = both(run)
    assert found.shown == expected.shown
    assert found.shown[1] == found.shown[2]
    assert_close(found.net, expected.net)


@pytest.mark.parametrize("name", COMPOSED)
@pytest.mark.parametrize(("clip", "every"), [(None, 1), (0.3, 2)], ids=["alone", "clipped and accumulated"])
def test_a_composed_transform_is_run_as_by_hand(name: str, clip: Any, every: int) -> None:
    found = Run(lambda net: training.composed(name, net), clip=clip, every=every).train(2)
    assert_close(found.net, by_hand(COMPOSED[name](), batches(2), clip=clip, every=every))


@pytest.mark.parametrize("name", ["parts", "skipping, averaged"])
def test_a_scheduler_multiplies_the_schedules_of_a_composed_transform(name: str) -> None:
    found = Run(lambda net: training.composed(name, net), scheduler="StepLR").train(2)
    assert_close(found.net, by_hand(COMPOSED[name](factor), batches(2)))


def test_the_group_of_a_prepared_optimizer_shows_the_schedule() -> None:
    found = Run(lambda net: training.composed("parts", net)).train(2)
    assert found.shown == pytest.approx([WARM(k) for k in range(12)], rel=1e-6)
    assert [group["lr"] for group in found.optimizer.param_groups] == pytest.approx([WARM(11), FALL(11)], rel=1e-6)


@pytest.mark.parametrize("name", COMPOSED)
def test_weights_are_loaded_after_preparation(name: str) -> None:
    """`prepare` loads the optimizer's own state dict, before there was a step."""
    run = Run(lambda net: training.composed(name, net))
    start = training.network()
    with torch.no_grad():
        for p in start.parameters():
            p.mul_(1.5)
    run.net.load_state_dict(start.state_dict())
    run.train(2)
    assert_close(run.net, by_hand(COMPOSED[name](), batches(2), net=start))
    if "averaged" in name:
        expected = training.averages(COMPOSED[name](), batches(2), net=start)
        torch.testing.assert_close(dict(run.optimizer.optimizer.eval_params()), expected, rtol=1e-5, atol=1e-6)


# --------------------------------------------------------------------------------------------------------------- checkpoints


CONFIGURED: dict[str, Any] = {
    **{name: lambda net, name=name: training.optimizer(optim, name, net) for name in BOTH},
    **{name: lambda net, name=name: training.composed(name, net) for name in COMPOSED},
    "quantized": lambda net: optim.Optimizer(net.named_parameters(), ps.quantize_state(ps.adamw(lr=WARM), 8, min_size=1)),
}


@pytest.mark.parametrize("configure", CONFIGURED.values(), ids=CONFIGURED)
@pytest.mark.parametrize("scheduler", [None, "StepLR", "OneCycleLR, the rates alone"])
def test_a_script_that_loads_its_state_goes_on_as_the_uninterrupted_one(
    tmp_path: Path, configure: Any, scheduler: str | None
) -> None:
    begun = Run(configure, scheduler=scheduler).train(2)
    begun.accelerator.save_state(str(tmp_path))
    whole = begun.train(2)
    other = Run(configure, scheduler=scheduler)
    other.accelerator.load_state(str(tmp_path))
    other.train(2)
    assert_same(other.net, whole.net)
    assert other.shown == whole.shown[12:]


def test_a_state_that_torchs_optimizer_saved_is_loaded(tmp_path: Path) -> None:
    begun = Run(lambda net: training.plain(torch.optim, "AdamW", net), scheduler="StepLR").train(2)
    begun.accelerator.save_state(str(tmp_path))
    other = Run(lambda net: training.plain(optim, "AdamW", net), scheduler="StepLR")
    other.accelerator.load_state(str(tmp_path))
    assert_close(other.train(2).net, begun.train(2).net)


def test_a_scheduler_is_made_after_preparation() -> None:
    """A schedule that begins at 0 still shows what can be multiplied then."""
    run = Run(lambda net: optim.Optimizer(net.named_parameters(), ps.adamw(lr=WARM)))
    run.scheduler = run.accelerator.prepare(SCHEDULERS["StepLR"](run.optimizer.optimizer))
    run.train(2)
    assert_close(run.net, by_hand(ps.adamw(lr=training.scheduled(WARM, factor)), batches(2)))


def test_two_models_have_an_optimizer_each() -> None:
    def run(namespace: Any) -> nn.Module:
        accelerator = accelerate.Accelerator(cpu=True)
        nets = [training.network(), nn.Linear(2, 2)]
        with torch.no_grad():
            nets[1].weight.copy_(torch.eye(2))
            nets[1].bias.zero_()
        made = [training.optimizer(namespace, "AdamW", nets[0]), training.optimizer(namespace, "SGD", nets[1])]
        first, second, *made = accelerator.prepare(*nets, *made)
        for batch in batches(2):
            accelerator.backward(training.loss(nn.Sequential(first, second), batch))
            for x in made:
                x.step()
                x.zero_grad()
        return nn.Sequential(*nets)

    assert_close(run(optim), run(torch.optim))
