"""Optimizers, transforms and schedules out of hydra's configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import purestep as ps
from purestep import optim
from tests.frameworks.runs import agree, batches, by_hand, composed, model, train, wide
from tests.test_trainers import through_file

hydra = pytest.importorskip("hydra")
OmegaConf = pytest.importorskip("omegaconf").OmegaConf
instantiate = pytest.importorskip("hydra.utils").instantiate

pytestmark = pytest.mark.frameworks

FALL = "{_target_: purestep.schedules.linear, start: 0.1, end: 0.02, total_steps: 6}"
COMPOSED = f"""
_target_: purestep.accumulate
k: 2
transform:
  _target_: purestep.chain
  _args_:
  - {{_target_: purestep.clip_by_global_norm, max_norm: 0.5}}
  - _target_: purestep.partition
    transforms:
      matrices:
        _target_: purestep.chain
        _args_:
        - {{_target_: purestep.scale_by_adam, betas: [0.9, 0.999]}}
        - _target_: purestep.masked
          transform: {{_target_: purestep.add_decayed_weights, weight_decay: 0.1}}
          mask: {{_target_: hydra.utils.get_method, path: {wide.__module__}.wide}}
        - {{_target_: purestep.scale_by_learning_rate, lr: {FALL}}}
      rest: {{_target_: purestep.sgd, lr: {FALL}, momentum: 0.9}}
    labels: {{_target_: purestep.by_ndim, table: {{2: matrices}}, default: rest}}
"""
CLASSES = {
    "AdamW": "{_target_: %s.AdamW, lr: 0.05, betas: [0.8, 0.99], weight_decay: 0.1}",
    "SGD": "{_target_: %s.SGD, lr: 0.05, momentum: 0.9, nesterov: true}",
    "Adafactor": "{_target_: %s.Adafactor, lr: 0.05, eps: [null, 0.001]}",
    "Muon": "{_target_: %s.Muon, lr: 0.05, ns_coefficients: [3.4445, -4.775, 2.0315]}",
}


def parameters(net: torch.nn.Module) -> Any:
    return (p for p in net.parameters() if p.ndim == 2)  # Muon takes no others


@pytest.mark.parametrize("convert", ["none", "partial", "all"])
@pytest.mark.parametrize("partial", [False, True], ids=["called", "partial"])
@pytest.mark.parametrize("text", CLASSES.values(), ids=CLASSES)
def test_a_class_is_instantiated_and_trains_as_torchs(text: str, partial: bool, convert: str) -> None:
    """`betas` arrive as a list of OmegaConf's, and are saved as a tuple."""
    results = []
    for namespace in ("purestep.optim", "torch.optim"):
        net, config = model(), OmegaConf.create(text % namespace)
        config["_convert_"] = convert if namespace == "purestep.optim" else "all"  # torch's multiplies what it is given
        if partial:
            config["_partial_"] = True
            optimizer = instantiate(config)(parameters(net))
        else:
            optimizer = instantiate(config, params=parameters(net))
        train(net, optimizer, batches())
        through_file(optimizer.state_dict())  # nothing of OmegaConf's is in it
        results.append(net)
    agree(*results)


@pytest.mark.parametrize("convert", ["none", "partial", "all", "object"])
def test_a_transform_is_instantiated(convert: str) -> None:
    config = OmegaConf.create(COMPOSED)
    config["_convert_"] = convert
    made = instantiate(config)
    assert made == composed()
    net = model()
    train(net, optim.Optimizer(net.named_parameters(), made), batches())
    agree(net, by_hand(model(), composed(), batches()))
    params = {name: p.detach() for name, p in net.named_parameters()}
    torch.testing.assert_close(
        made.step(params, made.init_state(params), params), made.step(params, made.init_state(params), params)
    )


@pytest.mark.parametrize("partial", [False, True], ids=["called", "partial"])
def test_the_wrapper_is_instantiated_with_its_transform(partial: bool) -> None:
    net = model()
    config = OmegaConf.create({"_target_": "purestep.optim.Optimizer", "transform": OmegaConf.create(COMPOSED)})
    if partial:
        config["_partial_"] = True
        optimizer = instantiate(config)(net.named_parameters())
    else:
        optimizer = instantiate(config, net.named_parameters())
    train(net, optimizer, batches())
    through_file(optimizer.state_dict())
    agree(net, by_hand(model(), composed(), batches()))


def test_a_class_of_a_transform_is_instantiated() -> None:
    net = model()
    text = "{_target_: purestep.optim.partial, _args_: [{_target_: purestep.lion, lr: 0.01, betas: [0.8, 0.9]}], name: Lion}"
    optimizer = instantiate(OmegaConf.create(text))(net.parameters(), lr=0.02)
    train(net, optimizer, batches())
    agree(net, by_hand(model(), ps.lion(0.02, betas=(0.8, 0.9)), batches()))
    assert type(optimizer).__name__ == "Lion"


def test_a_composed_configuration_takes_overrides(tmp_path: Path) -> None:
    (tmp_path / "optimizer").mkdir()
    (tmp_path / "config.yaml").write_text("defaults:\n- _self_\n- optimizer: adamw\nsteps: 6\n")
    (tmp_path / "optimizer" / "adamw.yaml").write_text(
        "_target_: purestep.optim.AdamW\n_partial_: true\nbetas: [0.9, 0.99]\n"
        "lr: {_target_: purestep.schedules.warmup_cosine, peak: 0.1, warmup_steps: 2, total_steps: '${steps}'}\n"
    )
    (tmp_path / "optimizer" / "sgd.yaml").write_text("{_target_: purestep.optim.SGD, _partial_: true, lr: 0.1}")
    with hydra.initialize_config_dir(str(tmp_path), version_base=None):
        first = hydra.compose("config", overrides=["optimizer.betas=[0.7,0.9]", "optimizer.lr.peak=0.05", "steps=8"])
        second = hydra.compose("config", overrides=["optimizer=sgd", "optimizer.lr=0.02"])
    lr = ps.schedules.warmup_cosine(0.05, warmup_steps=2, total_steps=8)
    for config, transform in ((first, ps.adamw(lr, betas=(0.7, 0.9))), (second, ps.sgd(0.02))):
        net = model()
        train(net, instantiate(config.optimizer)(net.parameters()), batches())
        agree(net, by_hand(model(), transform, batches()))


def test_what_is_wrong_in_a_configuration_is_told() -> None:
    with pytest.raises(Exception, match=r"lr must be a number of at least 0.*but got -1"):
        instantiate(OmegaConf.create("{_target_: purestep.adamw, lr: -1}"))
    with pytest.raises(Exception, match=r"got an unexpected keyword argument 'beta'"):
        instantiate(OmegaConf.create("{_target_: purestep.adamw, beta: 0.9}"))
