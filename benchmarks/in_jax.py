"""optax on a CPU: its counterparts of the algorithms and chains of `benchmarks.modes`, their steps compiled by jax.

`benchmarks.modes` imports this module when the first run of optax begins. jax has a pool of threads of its own beside
torch's in the same process, and no thread goes to sleep at once when its work is done: each library's steps find the
processors a little busier than they would be without the other one.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import jax
import numpy
import optax
import torch
from torch import Tensor

from benchmarks.modes import (
    ACCUMULATED,
    ALGORITHMS,
    DECAY,
    EPS,
    LION,
    NESTEROV,
    PEAK,
    TOTAL_STEPS,
    WARM_UP_STEPS,
    Chain,
    Run,
    Subject,
    named,
)

jax.config.update("jax_platforms", "cpu")  # it would look for other devices, too

WEIGHT_DECAY = 1e-2  # of AdamW, by default in torch but not in optax


def learning_rate(key: str) -> float:
    """Of an algorithm."""
    return ALGORITHMS[key].options["lr"]


def ema_params(decay: float) -> optax.GradientTransformation:
    """An average of the parameters, which optax has as a function to be called after a step; the updates pass through."""

    def init(params: Any) -> Any:
        return jax.tree.map(jax.numpy.copy, params)

    def update(updates: Any, average: Any, params: Any = None) -> tuple[Any, Any]:
        return updates, optax.incremental_update(optax.apply_updates(params, updates), average, 1 - decay)

    return optax.GradientTransformation(init, update)


TRANSFORMS: dict[str, Any] = {
    "adamw": optax.adamw(learning_rate("adamw"), weight_decay=WEIGHT_DECAY),
    "adam": optax.adam(learning_rate("adam")),
    "sgd": optax.sgd(learning_rate("sgd"), momentum=ALGORITHMS["sgd"].options["momentum"]),
    "adamax": optax.adamax(learning_rate("adamax"), eps=ALGORITHMS["adamax"].options["eps"]),
    "adagrad": optax.adagrad(learning_rate("adagrad"), initial_accumulator_value=0.0, eps=0.0),
    "adadelta": optax.adadelta(learning_rate("adadelta")),
    "rmsprop": optax.rmsprop(learning_rate("rmsprop"), decay=0.99, eps_in_sqrt=False),
    "clip_adamw": optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            optax.warmup_cosine_decay_schedule(PEAK / WARM_UP_STEPS, PEAK, WARM_UP_STEPS, TOTAL_STEPS),
            eps=EPS,
            weight_decay=WEIGHT_DECAY,
        ),
    ),
    "sgd_nesterov": optax.chain(
        optax.add_decayed_weights(NESTEROV["weight_decay"]),
        optax.sgd(NESTEROV["lr"], momentum=NESTEROV["momentum"], nesterov=True),
    ),
    "lion": optax.lion(LION["lr"], weight_decay=LION["weight_decay"]),
    "lion_ema": optax.chain(optax.lion(LION["lr"], weight_decay=LION["weight_decay"]), ema_params(DECAY)),
    "accumulate": optax.MultiSteps(
        optax.adamw(PEAK, eps=EPS, weight_decay=WEIGHT_DECAY), ACCUMULATED, use_grad_mean=False
    ).gradient_transformation(),
}


class Jitted:
    """A transformation of optax: `update` and `apply_updates`, compiled as one, are given state and parameters away."""

    def __init__(self, transform: Any, times: int, params: list[Tensor], grads: list[Tensor]) -> None:
        self.transform, self.times = transform, times
        # What is given away has to be jax's own; the gradients stay in the memory that all modes share.
        self.params = {name: jax.numpy.array(p.numpy(), copy=True) for name, p in named(params).items()}
        self.grads = {name: jax.numpy.from_dlpack(g) for name, g in named(grads).items()}
        self.state = transform.init(self.params)

    @cached_property
    def compiled(self) -> Any:
        """The program of a step, which the first one has to wait for."""

        def step(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
            updates, state = self.transform.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return jax.jit(step, donate_argnums=(1, 2)).lower(self.grads, self.state, self.params).compile()

    def step(self) -> None:
        """Overwrite parameters and state with the next ones, and wait for them."""
        for _ in range(self.times):
            self.params, self.state = jax.block_until_ready(self.compiled(self.grads, self.state, self.params))

    def parameters(self) -> list[Tensor]:
        """The parameters as they are now."""
        return [torch.from_numpy(numpy.array(p)) for p in self.params.values()]

    def peak_bytes(self) -> int:
        """What XLA says that a step allocates: what it computes with, and results that do not overwrite anything."""
        memory = self.compiled.memory_analysis()
        return memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes


def start(subject: Subject, params: list[Tensor], grads: list[Tensor]) -> Run:
    """The counterpart of an algorithm or a chain before its first step."""
    times = subject.times if isinstance(subject, Chain) else 1
    return Jitted(TRANSFORMS[subject.key], times, params, grads)
