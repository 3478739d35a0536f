"""Lightning's Trainer and Fabric drive purestep's optimizers as they drive torch's."""

from __future__ import annotations

import csv
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

lightning: Any = pytest.importorskip("lightning")
callbacks: Any = pytest.importorskip("lightning.pytorch.callbacks")

pytestmark = pytest.mark.frameworks

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "logger": False,
}


def loader() -> Any:
    return DataLoader(TensorDataset(*training.data()), batch_size=4)


def both(build: Any) -> tuple[nn.Module, nn.Module]:
    """What a function of the namespace of optimizers builds for purestep, and for torch."""
    return build(optim), build(torch.optim)


class Net(lightning.LightningModule):
    """The network, with what its optimizers are made by."""

    def __init__(self, configure: Any) -> None:
        super().__init__()
        self.net = training.network()
        self.configure = configure

    def configure_optimizers(self) -> Any:
        return self.configure(self.net)

    def training_step(self, batch: Any, index: int) -> Any:
        value = training.loss(self.net, batch)
        self.log("loss", value, on_epoch=True)
        return value


def fit(configure: Any, epochs: int = 2, *, given: Any = None, resume: Any = None, **options: Any) -> nn.Module:
    net = Net(configure)
    trainer = lightning.Trainer(max_epochs=epochs, **{**QUIET, **options})
    trainer.fit(net, given or loader(), ckpt_path=resume)
    assert_moved(net.net, training.network())
    return net.net


def with_scheduler(made: Any, interval: str = "step") -> dict[str, Any]:
    scheduler = torch.optim.lr_scheduler.StepLR(made, step_size=2, gamma=0.7)
    return {"optimizer": made, "lr_scheduler": {"scheduler": scheduler, "interval": interval}}


def factor(step: int) -> float:
    """What that scheduler multiplies with, where it is stepped with the optimizer."""
    return 0.7 ** (step // 2)


OPTIONS: dict[str, dict[str, Any]] = {
    "alone": {},
    "clipped norm": {"gradient_clip_val": 0.3, "gradient_clip_algorithm": "norm"},
    "clipped values": {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"},
    "accumulated": {"accumulate_grad_batches": 3},
    "bf16": {"precision": "bf16-mixed"},
    "all": {"gradient_clip_val": 0.3, "accumulate_grad_batches": 2, "precision": "bf16-mixed"},
}


# ------------------------------------------------------------------------------------------------------------------- Trainer


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_of_the_trainer_mean_what_they_mean_for_torch(name: str, options: Any) -> None:
    found, expected = both(
        lambda namespace: fit(lambda net: with_scheduler(training.optimizer(namespace, name, net)), **options)
    )
    assert_close(found, expected)


@pytest.mark.parametrize("name", BOTH)
def test_a_scheduler_steps_once_in_an_epoch(name: str) -> None:
    found, expected = both(
        lambda namespace: fit(lambda net: with_scheduler(training.optimizer(namespace, name, net), "epoch"), epochs=5)
    )
    assert_close(found, expected)


@pytest.mark.parametrize("name", BOTH)
def test_a_scheduler_of_plateaus_is_given_the_metric(name: str) -> None:
    def configure(namespace: Any, net: nn.Module) -> Any:
        made = training.optimizer(namespace, name, net)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(made, factor=0.1, patience=0, threshold=0.5)
        return {"optimizer": made, "lr_scheduler": {"scheduler": scheduler, "monitor": "loss_epoch"}}

    found, expected = both(lambda namespace: fit(lambda net: configure(namespace, net), epochs=4))
    assert_close(found, expected)


@pytest.mark.parametrize("name", BOTH)
def test_half_precision_with_a_gradient_scaler(name: str) -> None:
    """Lightning itself takes bfloat16 for "16-mixed" on a CPU, so the scaler is given."""
    from lightning.pytorch.plugins import MixedPrecision

    def run(namespace: Any) -> nn.Module:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=2)  # the first steps overflow
        plugin = MixedPrecision("16-mixed", "cpu", scaler)
        trained = fit(lambda net: training.optimizer(namespace, name, net), plugins=[plugin], gradient_clip_val=0.3)
        scales.append(scaler.get_scale())
        return trained

    scales: list[float] = []
    found, expected = both(run)
    assert scales[0] == scales[1] < 2.0**20
    assert_close(found, expected)


@pytest.mark.parametrize("name", COMPOSED)
def test_a_composed_transform_is_run_as_by_hand(name: str) -> None:
    found = fit(lambda net: training.composed(name, net))
    assert_close(found, by_hand(COMPOSED[name](), batches(2)))


@pytest.mark.parametrize("name", ["parts", "skipping, averaged"])
def test_a_scheduler_multiplies_the_schedules_of_a_composed_transform(name: str) -> None:
    found = fit(lambda net: with_scheduler(training.composed(name, net)))
    assert_close(found, by_hand(COMPOSED[name](factor), batches(2)))


@pytest.mark.parametrize("name", COMPOSED)
def test_a_composed_transform_is_given_clipped_means_of_batches(name: str) -> None:
    found = fit(lambda net: training.composed(name, net), gradient_clip_val=0.3, accumulate_grad_batches=2)
    assert_close(found, by_hand(COMPOSED[name](), batches(2), every=2, clip=0.3))


@pytest.mark.parametrize("transform", [ps.chain(ps.sam(0.1), ps.sgd(lr=0.05)), ps.lbfgs(lr=0.5)], ids=["sam", "lbfgs"])
def test_a_transform_that_evaluates_the_loss_is_given_the_closure(transform: Any) -> None:
    found = fit(lambda net: optim.Optimizer(net.named_parameters(), transform))
    net, x = training.network(), batches(2)
    by_closure = optim.Optimizer(net.named_parameters(), transform)
    for batch in x:

        def closure(batch: Any = batch) -> Any:
            by_closure.zero_grad()
            value = training.loss(net, batch)
            value.backward()
            return value

        by_closure.step(closure)
    assert_close(found, net)


def test_lbfgs_is_torchs() -> None:
    found, expected = both(lambda namespace: fit(lambda net: namespace.LBFGS(net.parameters(), lr=0.3, max_iter=3)))
    assert_close(found, expected)


class Two(lightning.LightningModule):
    """Two networks, one after the other, and an optimizer for each, which are stepped by hand."""

    def __init__(self, configure: Any) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.first, self.second = training.network(), nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
        self.configure = configure

    def configure_optimizers(self) -> Any:
        made = [self.configure(net) for net in (self.first, self.second)]
        return made, [torch.optim.lr_scheduler.StepLR(x, step_size=2, gamma=0.7) for x in made]

    def training_step(self, batch: Any, index: int) -> None:
        for k, (made, scheduler) in enumerate(zip(self.optimizers(), self.lr_schedulers())):
            self.toggle_optimizer(made)
            self.manual_backward(training.loss(nn.Sequential(self.first, self.second), batch))
            if k:
                self.clip_gradients(made, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
            made.step()
            made.zero_grad()
            self.untoggle_optimizer(made)
            scheduler.step()


@pytest.mark.parametrize("name", BOTH)
def test_two_optimizers_are_stepped_by_hand(name: str) -> None:
    def run(namespace: Any) -> nn.Module:
        torch.manual_seed(0)
        net = Two(lambda part: training.optimizer(namespace, name, part))
        lightning.Trainer(max_epochs=2, **QUIET).fit(net, loader())
        return net

    found, expected = both(run)
    assert_close(found, expected)
    torch.manual_seed(0)
    assert_moved(found, Two(None))


# --------------------------------------------------------------------------------------------------------------- checkpoints


CONFIGURED: dict[str, Any] = {
    **{name: lambda net, name=name: with_scheduler(training.optimizer(optim, name, net)) for name in BOTH},
    **{name: lambda net, name=name: training.composed(name, net) for name in COMPOSED},
    "parts, a scheduler": lambda net: with_scheduler(training.composed("parts", net)),
    "quantized": lambda net: optim.Optimizer(net.named_parameters(), ps.quantize_state(ps.adamw(lr=WARM), 8, min_size=1)),
}


@pytest.mark.parametrize("configure", CONFIGURED.values(), ids=CONFIGURED)
def test_a_resumed_fit_is_the_uninterrupted_one(tmp_path: Path, configure: Any) -> None:
    whole = fit(configure, epochs=4)
    saving = callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(configure, epochs=2, enable_checkpointing=True, callbacks=[saving])
    assert_same(fit(configure, epochs=4, resume=tmp_path / "epoch=1.ckpt"), whole)


@pytest.mark.parametrize("configure", CONFIGURED.values(), ids=CONFIGURED)
def test_a_fit_is_resumed_within_an_epoch(tmp_path: Path, configure: Any) -> None:
    """All batches are the same here, since Lightning does not save how far a loader has come."""
    x, y = training.data(4)
    given = DataLoader(TensorDataset(x.repeat(6, 1), y.repeat(6, 1)), batch_size=4)
    whole = fit(configure, epochs=3, given=given)
    saving = callbacks.ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=9)
    fit(configure, given=given, enable_checkpointing=True, callbacks=[saving])
    assert_same(fit(configure, epochs=3, resume=tmp_path / "step=9.ckpt", given=given), whole)


def test_a_checkpoint_of_torchs_optimizer_is_resumed_by_puresteps_class(tmp_path: Path) -> None:
    def configure(namespace: Any) -> Any:
        return lambda net: with_scheduler(training.plain(namespace, "AdamW", net))

    saving = callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole = fit(configure(torch.optim), epochs=4, enable_checkpointing=True, callbacks=[saving])
    assert_close(fit(configure(optim), epochs=4, resume=tmp_path / "epoch=1.ckpt"), whole)


# ----------------------------------------------------------------------------------------------------------------- callbacks


def test_the_monitor_shows_schedules_as_numbers(tmp_path: Path) -> None:
    """It asks before each step, so it sees the number of the step before, and of the first step twice."""
    shown = monitored(tmp_path, lambda net: training.composed("parts", net))
    assert shown["lr-Optimizer/pg1"] == pytest.approx([WARM(1), *map(WARM, range(11))], rel=1e-6)  # WARM(0) is 0
    assert shown["lr-Optimizer/pg2"] == pytest.approx([FALL(0), *map(FALL, range(11))], rel=1e-6)


@pytest.mark.parametrize("name", BOTH)
def test_the_monitor_shows_what_it_shows_for_torch(tmp_path: Path, name: str) -> None:
    found, expected = (
        monitored(tmp_path / folder, lambda net, namespace=namespace: with_scheduler(training.optimizer(namespace, name, net)))
        for folder, namespace in (("purestep", optim), ("torch", torch.optim))
    )
    assert list(found.values()) == list(expected.values())
    if name != "two groups":  # whose class is called Optimizer
        assert list(found) == list(expected)


def monitored(folder: Path, configure: Any) -> dict[str, list[float]]:
    """What `LearningRateMonitor` logs in two epochs."""
    from lightning.pytorch.loggers import CSVLogger

    monitor = callbacks.LearningRateMonitor("step", log_momentum=True, log_weight_decay=True)
    fit(configure, logger=CSVLogger(folder, version="log"), log_every_n_steps=1, callbacks=[monitor])
    rows = csv.DictReader((folder / "lightning_logs/log/metrics.csv").read_text().splitlines())
    found: dict[str, list[float]] = {}
    for row in rows:
        for key, x in row.items():
            if key.startswith("lr-") and x:
                found.setdefault(key, []).append(float(x))
    return found


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("strategy", ["cos", "linear"])
def test_stochastic_weight_averaging_is_that_of_torchs_optimizer(name: str, strategy: str) -> None:
    def run(namespace: Any) -> nn.Module:
        averaging = callbacks.StochasticWeightAveraging(
            swa_lrs=0.01, swa_epoch_start=2, annealing_epochs=2, annealing_strategy=strategy
        )
        configure = lambda net: with_scheduler(training.optimizer(namespace, name, net), "epoch")  # noqa: E731
        return fit(configure, epochs=5, callbacks=[averaging])

    found, expected = both(run)
    assert_close(found, expected)


@pytest.mark.parametrize("name", BOTH)
def test_the_search_for_a_rate_finds_the_losses_that_it_finds_for_torch(tmp_path: Path, name: str) -> None:
    from lightning.pytorch.tuner import Tuner

    def search(namespace: Any) -> Any:
        net = Net(lambda part: training.optimizer(namespace, name, part))
        net.lr = None  # which is searched
        trainer = lightning.Trainer(max_epochs=3, default_root_dir=tmp_path, **{**QUIET, "enable_checkpointing": True})
        return Tuner(trainer).lr_find(net, loader(), num_training=12, min_lr=1e-4, max_lr=0.1).results

    found, expected = search(optim), search(torch.optim)
    assert found["lr"] == expected["lr"]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_lightning_averages_what_the_transform_averages() -> None:
    """`EMAWeightAveraging` leaves its averages in the model; `ps.ema_params` has the same."""
    transform = ps.chain(ps.sgd(lr=FALL, momentum=0.9), ps.ema_params(0.8))
    averaging = callbacks.EMAWeightAveraging(decay=0.8, update_starting_at_step=0)
    found = fit(lambda net: optim.Optimizer(net.named_parameters(), transform), callbacks=[averaging])
    assert_close(found, training.averages(transform, batches(2)))


# -------------------------------------------------------------------------------------------------------------------- Fabric


def fabric_run(
    configure: Any, given: list[Any], *, precision: Any = "32-true", clip: Any = None, scheduled: bool = False, file: Any = None
) -> nn.Module:
    """A loop with Fabric. With a file it begins with what is in it, if it is there, and is saved there at the end."""
    fabric = lightning.Fabric(accelerator="cpu", devices=1, precision=precision)
    net = training.network()
    scheduler: Any = None
    made = configure(net)
    if scheduled:
        scheduler = torch.optim.lr_scheduler.StepLR(made, step_size=2, gamma=0.7)
    model, made = fabric.setup(net, made)
    state: dict[str, Any] = {"model": model, "optimizer": made} | ({"scheduler": scheduler} if scheduled else {})
    if file is not None and file.exists():
        fabric.load(file, state)
    for batch in given:
        fabric.backward(training.loss(model, batch))
        if clip is not None:
            fabric.clip_gradients(model, made, **clip)
        made.step()
        made.zero_grad()
        if scheduled:
            scheduler.step()
    if file is not None:
        fabric.save(file, state)
    return net


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("clip", [None, {"max_norm": 0.3}, {"clip_val": 0.05}], ids=["not clipped", "norm", "values"])
def test_a_loop_of_fabrics_is_that_of_torchs_optimizer(name: str, precision: Any, clip: Any) -> None:
    found, expected = both(
        lambda namespace: fabric_run(
            lambda net: training.optimizer(namespace, name, net), batches(2), precision=precision, clip=clip, scheduled=True
        )
    )
    assert_close(found, expected)


@pytest.mark.parametrize(("name", "flag"), [("AdamW", "fused"), ("SGD", "foreach")])
def test_bfloat16_parameters_are_those_of_one_implementation_of_torchs(name: str, flag: str) -> None:
    """Each rounds other intermediate results to three digits. The kernel of SGD is wrong in bfloat16 on a CPU."""
    found, expected = both(
        lambda namespace: fabric_run(
            lambda net: training.plain(namespace, name, net, **{flag: True}), batches(2), precision="bf16-true", scheduled=True
        )
    )
    assert {p.dtype for p in found.parameters()} == {torch.bfloat16}
    assert_close(found, expected)


@pytest.mark.parametrize("name", COMPOSED)
def test_a_composed_transform_in_fabric_is_run_as_by_hand(name: str) -> None:
    found = fabric_run(lambda net: training.composed(name, net), batches(2), clip={"max_norm": 0.3})
    assert_close(found, by_hand(COMPOSED[name](), batches(2), clip=0.3))


@pytest.mark.parametrize("name", [*BOTH, *COMPOSED])
def test_fabric_saves_and_loads_what_a_loop_needs(tmp_path: Path, name: str) -> None:
    def configure(net: nn.Module) -> Any:
        return training.composed(name, net) if name in COMPOSED else training.optimizer(optim, name, net)

    options: dict[str, Any] = {"scheduled": name != "accumulated"}
    given, file = batches(2), tmp_path / "saved.ckpt"
    whole = fabric_run(configure, given, **options)
    fabric_run(configure, given[:7], file=file, **options)
    assert_same(fabric_run(configure, given[7:], file=file, **options), whole)


def test_what_is_puresteps_own_is_at_the_optimizer_in_fabrics() -> None:
    transform = ps.chain(ps.sgd(lr=FALL, momentum=0.9), ps.ema_params(0.8))
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    net = training.network()
    model, made = fabric.setup(net, optim.Optimizer(net.named_parameters(), transform))
    params = by_hand(transform, batches(1))
    assert isinstance(made, optim.Optimizer)
    for batch in batches(1):
        fabric.backward(training.loss(model, batch))
        made.step()
        made.zero_grad()
    with made.optimizer.use_eval_params():
        assert_close(net, training.averages(transform, batches(1)))
        with pytest.raises(RuntimeError, match="No step can be made inside"):
            made.step()
    assert_close(net, params)
