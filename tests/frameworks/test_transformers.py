"""The Trainer of transformers drives purestep's optimizers, and its schedulers change their learning rates."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import purestep as ps
from purestep import optim
from tests.frameworks import training
from tests.frameworks.training import COMPOSED, FALL, WARM, assert_close, assert_moved, assert_same, by_hand

transformers: Any = pytest.importorskip("transformers")
pytest.importorskip("accelerate")  # its Trainer needs it

pytestmark = pytest.mark.frameworks

STEPS = 8


def language_model() -> nn.Module:
    """A Llama of one layer, whose head is its embedding.

    It has no bias of keys, as GPT-2 has: what the gradient of that is depends on rounding alone, and Adam makes it large.
    """
    torch.manual_seed(0)
    small = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "vocab_size": 11}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**small, tie_word_embeddings=True))


def texts(count: int = 32) -> list[dict[str, torch.Tensor]]:
    tokens = torch.randint(11, (count, 6), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in tokens]


def collated(size: int = 4) -> list[torch.Tensor]:
    """The batches in the order of the texts."""
    rows = [row["input_ids"] for row in texts()]
    return [torch.stack(rows[i : i + size]) for i in range(0, len(rows), size)]


def loss(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return model(input_ids=tokens, labels=tokens).loss


class InOrder(transformers.Trainer):
    """A trainer that does not shuffle, so that its steps can be made by hand."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def fit(
    folder: Path,
    made: Any = None,
    *,
    by_class: Any = None,
    scheduler: Any = None,
    resume: Any = None,
    trainer: Any = InOrder,
    **options: Any,
) -> Any:
    """A finished trainer: `made` makes an optimizer of a model, `by_class` is a class with its options."""
    model = language_model()
    given: dict[str, Any] = {"optimizer_cls_and_kwargs": by_class}
    if made is not None:
        optimizer = made(model)
        given = {"optimizers": (optimizer, None if scheduler is None else scheduler(optimizer))}
    quiet: dict[str, Any] = {"report_to": [], "disable_tqdm": True, "logging_strategy": "no", "save_strategy": "no"}
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), use_cpu=True, max_steps=STEPS, per_device_train_batch_size=4, **{**quiet, **options}
    )
    begun = trainer(model=model, args=arguments, train_dataset=texts(), **given)
    begun.train(resume_from_checkpoint=None if resume is None else str(resume))
    assert_moved(begun.model, language_model())
    return begun


def falling(made: Any) -> Any:
    return torch.optim.lr_scheduler.StepLR(made, step_size=2, gamma=0.7)


def factor(step: int) -> float:
    return 0.7 ** (step // 2)


OPTIONS: dict[str, dict[str, Any]] = {
    "alone": {"max_grad_norm": 0.0},
    "clipped": {"max_grad_norm": 0.3},
    "accumulated": {"gradient_accumulation_steps": 2},
    "bf16": {"bf16": True},
}

# ------------------------------------------------------------------------------------------------------------------- Trainer


@pytest.mark.parametrize("name", training.BOTH)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_an_optimizer_and_a_scheduler_are_those_of_torch(tmp_path: Path, name: str, options: Any) -> None:
    found, expected = (
        fit(tmp_path, lambda net, n=n: training.optimizer(n, name, net), scheduler=falling, **options)
        for n in (optim, torch.optim)
    )
    assert_close(found.model, expected.model)
    assert found.lr_scheduler.get_last_lr() == expected.lr_scheduler.get_last_lr()


@pytest.mark.parametrize("name", training.PLAIN)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_class_with_options_is_torchs(tmp_path: Path, name: str, options: Any) -> None:
    """The trainer makes two groups, of what decays and what does not, and a scheduler by its name."""
    found, expected = (
        fit(
            tmp_path,
            by_class=(getattr(n, name), dict(training.PLAIN[name])),
            weight_decay=0.1,
            lr_scheduler_type="cosine",
            warmup_steps=2,
            **options,
        )
        for n in (optim, torch.optim)
    )
    assert [group["weight_decay"] for group in found.optimizer.param_groups] == [0.1, 0.0]
    assert_close(found.model, expected.model)


def test_a_partial_of_a_transform_is_the_class(tmp_path: Path) -> None:
    """A chain that torch can say too: its clipping is the trainer's own."""
    made = optim.partial(ps.chain(ps.clip_by_global_norm(0.3), ps.adamw(betas=(0.8, 0.99))))
    options: dict[str, Any] = {"weight_decay": 0.1, "lr_scheduler_type": "linear", "warmup_steps": 2}
    found = fit(tmp_path, by_class=(made, {"lr": 0.02}), max_grad_norm=0.0, **options)
    torchs = (torch.optim.AdamW, {"lr": 0.02, "betas": (0.8, 0.99)})
    assert_close(found.model, fit(tmp_path, by_class=torchs, max_grad_norm=0.3, **options).model)


@pytest.mark.parametrize("name", COMPOSED)
def test_a_composed_transform_is_run_as_by_hand(tmp_path: Path, name: str) -> None:
    """With "constant" the trainer makes a scheduler whose factor is 1."""
    found = fit(tmp_path, lambda net: training.composed(name, net), max_grad_norm=0.0, lr_scheduler_type="constant")
    assert_close(found.model, by_hand(COMPOSED[name](), collated(), net=language_model(), loss=loss))


@pytest.mark.parametrize("name", ["parts", "skipping, averaged"])
def test_a_scheduler_multiplies_the_schedules_of_a_composed_transform(tmp_path: Path, name: str) -> None:
    found = fit(tmp_path, lambda net: training.composed(name, net), scheduler=falling, max_grad_norm=0.3)
    assert_close(found.model, by_hand(COMPOSED[name](factor), collated(), net=language_model(), loss=loss, clip=0.3))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_partial_of_a_composed_transform_takes_the_decay_of_the_arguments(tmp_path: Path, weight_decay: float) -> None:
    """The trainer makes groups with it, as for torch's classes. It gives no names, and the rule is by dimensions."""
    made = optim.partial(COMPOSED["parts"]())
    found = fit(tmp_path, by_class=(made, {}), max_grad_norm=0.0, lr_scheduler_type="constant", weight_decay=weight_decay)
    transform = COMPOSED["parts"]().replace(**{"matrix.weight_decay": weight_decay})
    assert_close(found.model, by_hand(transform, collated(), net=language_model(), loss=loss))


LOGGED: dict[str, Any] = {"max_grad_norm": 0.0, "logging_strategy": "steps", "logging_steps": 1}


def logged(trainer: Any) -> list[float]:
    return [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]


def test_a_schedule_in_a_scheduler_is_logged(tmp_path: Path) -> None:
    """The trainer logs the number that its scheduler has shown for the step."""
    found = fit(
        tmp_path,
        lambda net: optim.Optimizer(net.named_parameters(), ps.adamw(lr=0.02)),
        scheduler=lambda made: torch.optim.lr_scheduler.LambdaLR(made, lambda step: float(FALL(step)) / 0.02),
        **LOGGED,
    )
    assert logged(found) == pytest.approx([FALL(k) for k in range(STEPS)])
    assert_close(found.model, by_hand(ps.adamw(lr=FALL), collated(), net=language_model(), loss=loss))


def test_a_schedule_in_the_transform_is_followed_and_not_logged(tmp_path: Path) -> None:
    """With "constant" the scheduler shows a constant, and a factor of 1 is multiplied with."""
    made = lambda net: optim.Optimizer(net.named_parameters(), ps.adamw(lr=FALL))  # noqa: E731
    found = fit(tmp_path, made, lr_scheduler_type="constant", **LOGGED)
    assert logged(found) == [FALL(0)] * STEPS
    assert_close(found.model, by_hand(ps.adamw(lr=FALL), collated(), net=language_model(), loss=loss))


# --------------------------------------------------------------------------------------------------------------- checkpoints

RESUMED: dict[str, dict[str, Any]] = {
    "AdamW": {"made": lambda net: training.plain(optim, "AdamW", net), "scheduler": falling},
    "SGD": {"made": lambda net: training.plain(optim, "SGD", net), "lr_scheduler_type": "cosine"},
    "class": {"by_class": (optim.AdamW, {"lr": 0.02}), "weight_decay": 0.1, "warmup_steps": 2},
    "partial": {"by_class": (optim.partial(ps.chain(ps.clip_by_global_norm(0.3), ps.lion(lr=WARM))), {}), "warmup_steps": 2},
    "two groups": {"made": lambda net: training.two_groups(optim, net), "scheduler": falling},
    "parts": {"made": lambda net: training.composed("parts", net), "lr_scheduler_type": "constant"},
    "parts, a scheduler": {"made": lambda net: training.composed("parts", net), "scheduler": falling},
    "accumulated": {"made": lambda net: training.composed("accumulated", net), "lr_scheduler_type": "constant"},
    "skipping, averaged": {"made": lambda net: training.composed("skipping, averaged", net), "lr_scheduler_type": "linear"},
}


@pytest.mark.parametrize("options", RESUMED.values(), ids=RESUMED)
def test_a_resumed_training_is_the_uninterrupted_one(tmp_path: Path, options: Any) -> None:
    """As a user would run it: with shuffled data, saved in the middle of an epoch."""
    run: dict[str, Any] = {"trainer": transformers.Trainer, "save_strategy": "steps", "save_steps": 3, **options}
    whole = fit(tmp_path / "whole", **copy.copy(run))
    other = fit(tmp_path / "other", resume=tmp_path / "whole" / "checkpoint-3", **copy.copy(run))
    assert other.state.global_step == STEPS
    assert_same(other.model, whole.model)


# ---------------------------------------------------------------------------------------------------------------- schedulers

NAMES = [kind.value for kind in transformers.SchedulerType]
OWN: dict[str, dict[str, Any]] = {
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 3},
    "reduce_lr_on_plateau": {"patience": 1, "factor": 0.5},
    "greedy": {"patience": 1, "factor": 0.5, "min_lr": 1e-5},
    "cosine_with_restarts": {"num_cycles": 2},
}
"""What some of them need to know, or to change within a few steps."""


def driven(made: Any, name: str, steps: int = 12) -> list[list[float]]:
    """The learning rates of all groups at each step, under a scheduler of transformers'."""
    scheduler = transformers.get_scheduler(name, made, 3, steps, scheduler_specific_kwargs=OWN.get(name))
    asks = "metrics" in inspect.signature(scheduler.step).parameters
    shown = []
    for k in range(steps):
        shown.append([group["lr"] for group in made.param_groups])
        for group in made.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        made.step()
        scheduler.step(*([1.0 / (k + 1) if k < 4 else 1.0] if asks else []))
    return shown


@pytest.mark.parametrize("made", training.BOTH)
@pytest.mark.parametrize("name", NAMES)
def test_every_scheduler_sets_the_rates_that_it_sets_for_torch(made: str, name: str) -> None:
    nets = training.network(), training.network()
    found, expected = (driven(training.optimizer(n, made, net), name) for n, net in zip((optim, torch.optim), nets))
    assert found == expected
    assert name == "constant" or len({rates[0] for rates in found}) > 1
    assert_close(*nets)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("reduce_lr_on_plateau", "greedy")])
def test_every_scheduler_multiplies_a_schedule(name: str) -> None:
    p, q = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))
    factors = [rates[0] for rates in driven(torch.optim.SGD([q], lr=1.0), name)]
    driven(optim.Optimizer([p], ps.sgd(lr=FALL)), name)
    assert float(p.detach()) == pytest.approx(-sum(FALL(k) * x for k, x in enumerate(factors)), rel=1e-5)


@pytest.mark.parametrize(("name", "before", "first"), [("reduce_lr_on_plateau", 6, 0.5), ("greedy", 2, 2.0)])
def test_a_scheduler_of_metrics_replaces_a_schedule_by_numbers(name: str, before: int, first: float) -> None:
    """It multiplies the number of the last step, where it first has a reason to; from then on there are its numbers alone."""
    p = nn.Parameter(torch.zeros(()))
    made = optim.Optimizer([p], ps.sgd(lr=FALL))
    taken: list[float] = []
    made.register_step_post_hook(lambda *_: taken.append(made.param_groups[0]["lr"]))
    driven(made, name)
    assert taken[:before] == [FALL(k) for k in range(before)]
    assert taken[before] == first * FALL(before - 1)
    assert all(x / taken[before] in (1.0, 0.5, 0.25, 0.125, 2.0) for x in taken[before:])
    assert float(p.detach()) == pytest.approx(-sum(taken), rel=1e-5)
