"""skorch makes the optimizer itself, from a class and from arguments with the prefix ``optimizer__``."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler

import purestep as ps
from purestep import optim
from tests.frameworks.runs import agree, batches, by_hand, composed, model, train

skorch = pytest.importorskip("skorch")
callbacks = pytest.importorskip("skorch.callbacks")

pytestmark = pytest.mark.frameworks

X, Y = (torch.cat(x).numpy() for x in zip(*batches(4)))
EPOCHS = 3


def net(optimizer: Any, *with_callbacks: Any, **options: Any) -> Any:
    """A regressor that sees the four batches in order, in each epoch."""
    options = {"max_epochs": EPOCHS, "batch_size": 6, "train_split": None, "verbose": 0, **options}
    return skorch.NeuralNetRegressor(model(), optimizer=optimizer, callbacks=list(with_callbacks), **options)


def alike(name: str, *with_callbacks: Any, **options: Any) -> tuple[Any, Any]:
    """The same net fitted with our class and with torch's, which end at the same parameters."""
    fitted = [
        net(getattr(namespace, name), *copy.deepcopy(with_callbacks), **options).fit(X, Y) for namespace in (optim, torch.optim)
    ]
    agree(fitted[0].module_, fitted[1].module_)
    return fitted[0], fitted[1]


SEEN = batches(4) * EPOCHS
Clipped = optim.partial(ps.chain(ps.clip_by_global_norm(0.5), ps.adamw(0.1)), name="Clipped")


def made(params: Any, lr: float) -> optim.Optimizer:
    """skorch passes `lr` always, which is ambiguous where the parts of a partition have one each."""
    return optim.Optimizer(params, composed())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("AdamW", {"optimizer__lr": 0.05}),
        ("Adam", {"lr": 0.05, "optimizer__betas": (0.8, 0.99), "optimizer__amsgrad": True}),
        ("SGD", {"lr": 0.05, "optimizer__momentum": 0.9, "optimizer__nesterov": True}),
        ("NAdam", {"lr": 0.05}),
        ("LBFGS", {"lr": 0.5, "optimizer__line_search_fn": "strong_wolfe", "optimizer__max_iter": 3}),
    ],
)
def test_a_class_fits_as_torchs(name: str, options: dict[str, Any]) -> None:
    mine, theirs = alike(name, **options)
    assert mine.history[:, "train_loss"] == pytest.approx(theirs.history[:, "train_loss"])
    assert mine.history[-1, "train_loss"] != mine.history[0, "train_loss"]


def test_groups_by_pattern_are_torchs() -> None:
    groups = [("*.bias", {"weight_decay": 0.0}), ("2.*", {"lr": 0.01, "weight_decay": 0.3})]
    mine, theirs = alike("AdamW", lr=0.05, optimizer__param_groups=groups)
    for group, other in zip(mine.optimizer_.param_groups, theirs.optimizer_.param_groups):
        assert (group["lr"], group["weight_decay"]) == (other["lr"], other["weight_decay"])
    assert [len(g["params"]) for g in mine.optimizer_.param_groups] == [2, 1, 1]


@pytest.mark.parametrize("every", ["epoch", "batch"])
@pytest.mark.parametrize(
    ("policy", "options"),
    [
        ("StepLR", {"step_size": 2}),
        ("WarmRestartLR", {"max_lr": 0.2, "base_period": 2}),
        (lr_scheduler.OneCycleLR, {"max_lr": 0.2, "total_steps": 13}),
        (lr_scheduler.CyclicLR, {"base_lr": 0.01, "max_lr": 0.2, "step_size_up": 2}),
        ("ReduceLROnPlateau", {"patience": 0, "threshold": 0.5}),
    ],
    ids=["StepLR", "WarmRestartLR", "OneCycleLR", "CyclicLR", "ReduceLROnPlateau"],
)
def test_schedules_of_callbacks_are_followed(policy: Any, options: Any, every: str) -> None:
    schedule = callbacks.LRScheduler(policy, step_every=every, **options)
    mine, theirs = alike("SGD", schedule, lr=0.1, optimizer__momentum=0.9)
    assert mine.optimizer_.param_groups[0]["lr"] == pytest.approx(theirs.optimizer_.param_groups[0]["lr"])
    assert mine.optimizer_.param_groups[0]["momentum"] == pytest.approx(theirs.optimizer_.param_groups[0]["momentum"])
    shown = [(n.history[:, "event_lr"] if every == "epoch" else n.history[:, "batches", :, "event_lr"]) for n in (mine, theirs)]
    assert np.ravel(shown[0]) == pytest.approx(np.ravel(shown[1]))
    assert len({*np.ravel(shown[0])}) > 1


def test_a_composed_transform_fits_as_the_loop_by_hand() -> None:
    agree(net(made).fit(X, Y).module_, by_hand(model(), composed(), SEEN))


def test_a_learning_rate_of_skorch_may_be_a_schedule() -> None:
    """Without one, skorch's default of 0.01 would take the place of the transform's."""
    lr = ps.schedules.linear(0.1, 0.0, total_steps=12)
    fitted = net(Clipped, lr=lr).fit(X, Y)
    agree(fitted.module_, by_hand(model(), ps.chain(ps.clip_by_global_norm(0.5), ps.adamw(lr)), SEEN))
    assert fitted.optimizer_.param_groups[0]["lr"] == lr(11)
    agree(net(Clipped).fit(X, Y).module_, by_hand(model(), ps.chain(ps.clip_by_global_norm(0.5), ps.adamw(0.01)), SEEN))


def test_hyperparameters_of_a_chain_are_set_by_name_and_later() -> None:
    fitted = net(Clipped, optimizer__lr=0.05, optimizer__max_norm=0.2, optimizer__weight_decay=0.3).fit(X, Y)
    transform = ps.chain(ps.clip_by_global_norm(0.2), ps.adamw(0.05, weight_decay=0.3))
    agree(fitted.module_, by_hand(model(), transform, SEEN))
    fitted.set_params(optimizer__max_norm=0.1, lr=0.01)
    assert fitted.optimizer_.param_groups[0]["max_norm"] == 0.1
    fitted.partial_fit(X, Y)
    expected = model()
    optimizer = Clipped(expected.parameters(), lr=0.05, max_norm=0.2, weight_decay=0.3)
    train(expected, optimizer, SEEN)
    optimizer.param_groups[0].update(max_norm=0.1, lr=0.01)
    train(expected, optimizer, SEEN)
    agree(fitted.module_, expected)


@pytest.mark.parametrize("optimizer", [optim.AdamW, Clipped, made], ids=["class", "partial", "function"])
def test_a_run_goes_on_from_saved_files(optimizer: Any) -> None:
    whole, first, second = (net(optimizer) for _ in range(3))
    whole.fit(X, Y)
    files = {name: io.BytesIO() for name in ("f_params", "f_optimizer")}
    first.set_params(max_epochs=1).fit(X, Y).save_params(**files)
    for file in files.values():
        file.seek(0)
    second.initialize().load_params(**files)
    second.set_params(max_epochs=EPOCHS - 1).partial_fit(X, Y)
    agree(second.module_, whole.module_, rtol=0, atol=0)


def test_checkpoints_of_callbacks_are_loaded(tmp_path: Any) -> None:
    def saving() -> Any:
        return callbacks.Checkpoint(monitor=None, dirname=str(tmp_path))

    whole = net(optim.AdamW).fit(X, Y)
    net(optim.AdamW, saving(), max_epochs=2).fit(X, Y)
    resumed = net(optim.AdamW, callbacks.LoadInitState(saving()), saving(), max_epochs=1).fit(X, Y)
    agree(resumed.module_, whole.module_, rtol=0, atol=0)


@pytest.mark.parametrize("optimizer", [optim.AdamW, Clipped, made], ids=["class", "partial", "function"])
@pytest.mark.parametrize("again", [lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy], ids=["pickled", "copied"])
def test_a_fitted_net_is_pickled_and_goes_on(optimizer: Any, again: Any) -> None:
    whole = net(optimizer).fit(X, Y)
    other = again(whole)
    for fitted in (whole, other):
        fitted.partial_fit(X, Y)
    assert other.optimizer_ is not whole.optimizer_
    agree(other.module_, whole.module_, rtol=0, atol=0)


def test_a_grid_search_finds_the_same_numbers() -> None:
    search = pytest.importorskip("sklearn.model_selection").GridSearchCV
    results = []
    for cls in (optim.AdamW, torch.optim.AdamW):
        grid = {"optimizer__lr": [0.001, 0.05], "optimizer__weight_decay": [0.0, 0.5]}
        found = search(net(cls), grid, cv=2, scoring="neg_mean_squared_error").fit(X, Y)
        results.append((found.best_params_, found.cv_results_["mean_test_score"]))
    assert results[0][0] == results[1][0]
    np.testing.assert_allclose(results[0][1], results[1][1], rtol=1e-5)
    assert len({*results[0][1]}) == 4


def test_gradient_clipping_of_a_callback_comes_before_the_step() -> None:
    fitted = net(optim.AdamW, callbacks.GradientNormClipping(0.5), lr=0.1).fit(X, Y)
    agree(fitted.module_, by_hand(model(), ps.chain(ps.clip_by_global_norm(0.5), ps.adamw(0.1)), SEEN))
