"""Record the trajectories of `modern.json`: algorithms beyond torch.optim that treat each parameter on its own.

Run from the repository's root, in an environment of its own:

    pip install -c constraints.txt optax==0.2.8 madgrad==1.3
    JAX_ENABLE_X64=1 python -m tests.oracles.make_modern
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import madgrad
import numpy as np
import optax
import torch

from tests.oracles.common import Arrays, follow, record, start

RUNS: list[dict[str, Any]] = []
Step = Callable[[Arrays, Arrays, int], Mapping[str, Any]]


def run(name: str, options: Mapping[str, Any], oracle: str, step: Step, **more: Any) -> None:
    """One trajectory, under the options of purestep's factory."""
    RUNS.append({"name": name, "options": dict(options), "oracle": oracle, "trajectory": follow(step), **more})


# ------------------------------------------------------------------------------------------------------------------- optax


def by_optax(transform: Any, change: Callable[[Any], Any] = lambda state: state) -> Step:
    """`change` is what is done to the first state. A 0-d parameter is given as a vector of one element."""
    state = change(transform.init(vectors(start())))

    def step(params: Arrays, grads: Arrays, t: int) -> Arrays:
        nonlocal state
        p = vectors(params)
        updates, state = transform.update(vectors(grads), state, p)
        return {name: np.reshape(x, params[name].shape) for name, x in optax.apply_updates(p, updates).items()}

    return step


def vectors(params: Arrays) -> dict[str, jax.Array]:
    return {name: jnp.asarray(np.atleast_1d(x)) for name, x in params.items()}


def spelled(function: str, options: Mapping[str, Any], **names: str) -> str:
    """The call of an optax function with purestep's options, under optax's names."""
    arguments = {names.get(name, name): x for name, x in options.items() if name != "betas"}
    arguments |= {f"b{i + 1}": beta for i, beta in enumerate(options.get("betas", ()))}
    return f"optax.{function}({', '.join(f'{name}={x!r}' for name, x in arguments.items())})"


def same(name: str, *many: Mapping[str, Any], of: str = "", **names: str) -> None:
    """An optimizer that optax has with the same arguments, up to their names."""
    for options in many:
        call = spelled(of or name, options, lr="learning_rate", **names)
        run(name, {k: x for k, x in options.items() if k != "nesterov" or x}, call, by_optax(eval(call)))


def composed(
    name: str, *many: Mapping[str, Any], of: str, change: Any = lambda state: state, note: str = "", **more: str
) -> None:
    """An optimizer that is put together from optax's: with a decay, and with what its alias does not ask for."""
    for options in many:
        given = {k: x for k, x in options.items() if k not in ("lr", "weight_decay")}
        block = spelled(of, given | {other: options[k] for other, k in more.items()})
        decay = f"optax.add_decayed_weights({options.get('weight_decay', 0.0)})"
        first, second = (decay, block) if name == "yogi" else (block, decay)
        call = f"optax.chain({first}, {second}, optax.scale_by_learning_rate({options['lr']}))"
        run(name, options, call + note, by_optax(eval(call), change))


def from_zero(state: Any) -> Any:
    """Yogi's state with a mean that starts at 0."""
    return (state[0], state[1]._replace(mu=jax.tree.map(jnp.zeros_like, state[1].mu)), state[2])


same(
    "lion",
    {"lr": 0.01, "weight_decay": 0.1},
    {"lr": 0.003, "betas": [0.7, 0.8], "weight_decay": 0.0},
)
same(
    "lars",
    {"lr": 1.0, "trust_coefficient": 0.05, "weight_decay": 0.1, "momentum": 0.5},
    {"lr": 2.0, "trust_coefficient": 0.01, "eps": 0.1, "nesterov": True},
)
same("lamb", {"lr": 0.02, "weight_decay": 0.1}, {"lr": 0.05, "betas": [0.7, 0.9], "eps": 1e-2})
same("sign_sgd", {"lr": 0.01}, {"lr": 0.003})
same("signum", {"lr": 0.01}, {"lr": 0.003, "momentum": 0.6}, momentum="beta")
same(
    "novograd",
    {"lr": 0.05, "betas": [0.95, 0.98], "eps": 1e-8, "weight_decay": 0.1},
    {"lr": 0.1, "betas": [0.6, 0.25], "eps": 0.1},
)
same("fromage", {"lr": 0.05, "min_norm": 0.0}, {"lr": 0.2, "min_norm": 1.5}, {"lr": 0.01, "min_norm": 1e-6})
same("optimistic_gradient_descent", {"lr": 0.1}, {"lr": 0.05, "alpha": 0.8, "beta": 1.7})
same(
    "optimistic_adam",
    {"lr": 0.01, "nesterov": False},
    {"lr": 0.05, "betas": [0.6, 0.8], "eps": 1e-2, "alpha": 0.8, "beta": 0.4, "nesterov": False},
    of="optimistic_adam_v2",
)
same(
    "ademamix",
    {"lr": 0.01, "betas": [0.9, 0.999, 0.9999], "alpha": 5.0, "weight_decay": 0.1},
    {"lr": 0.02, "betas": [0.6, 0.9, 0.95], "alpha": 2.0, "eps": 1e-2},
    of="contrib.ademamix",
)
same("sm3", {"lr": 0.1}, {"lr": 0.3, "momentum": 0.5})
run(
    "scale_by_sm3",
    {"momentum": 0.3, "eps": 0.1},
    "optax.scale_by_sm3(b1=0.3, eps=0.1), times -0.1",
    by_optax(optax.chain(optax.scale_by_sm3(b1=0.3, eps=0.1), optax.scale(-0.1))),
    part=-0.1,
)

composed(
    "adabelief",
    {"lr": 0.01, "eps": 1e-16, "weight_decay": 0.1},
    {"lr": 0.02, "betas": [0.7, 0.9], "eps": 1e-4},
    of="scale_by_belief",
    eps_root="eps",
)
composed(
    "yogi",
    {"lr": 0.05, "weight_decay": 0.1},
    {"lr": 0.02, "betas": [0.7, 0.9], "eps": 1e-2, "initial_accumulator_value": 0.3},
    of="scale_by_yogi",
    change=from_zero,
    note=", its mean started at 0 as in the paper",
)
composed(
    "adopt",
    {"lr": 0.01, "weight_decay": 0.1},
    {"lr": 0.05, "betas": [0.6, 0.8], "eps": 0.2},
    {"lr": 0.02, "betas": [0.8, 0.99], "use_clipping": False},
    of="contrib.scale_by_adopt",
)


# ----------------------------------------------------------------------------------------------------- the authors' package


def by_torch(make: Callable[[list[torch.Tensor]], torch.optim.Optimizer]) -> Step:
    leaves = {name: torch.tensor(p, dtype=torch.float64, requires_grad=True) for name, p in start().items()}
    optimizer = make(list(leaves.values()))

    def step(params: Arrays, grads: Arrays, t: int) -> Arrays:
        for name, p in leaves.items():
            p.grad = torch.tensor(grads[name], dtype=torch.float64)
        optimizer.step()
        return {name: p.detach().numpy().copy() for name, p in leaves.items()}

    return step


for options in ({"lr": 0.01, "weight_decay": 0.1}, {"lr": 0.05, "momentum": 0.5, "eps": 1e-3}, {"lr": 0.02, "momentum": 0.0}):
    arguments = ", ".join(f"{k}={x!r}" for k, x in options.items())
    run(
        "madgrad",
        options,
        f"madgrad.MADGRAD(params, {arguments})",
        by_torch(lambda p, options=options: madgrad.MADGRAD(p, **options)),
    )


# --------------------------------------------------------------------------------------------------------- transcriptions


def adan(lr: float, betas: Any = (0.98, 0.92, 0.99), eps: float = 1e-8, weight_decay: float = 0.0) -> Step:
    """The authors' `_single_tensor_adan` with no_prox=True (github.com/sail-sg/Adan, adan.py), which no package has."""
    b1, b2, b3 = betas
    memory: dict[str, Arrays] = {}

    def step(params: Arrays, grads: Arrays, t: int) -> Arrays:
        new = {}
        for name, p in params.items():
            g, zero = grads[name], np.zeros_like(p)
            s = memory.setdefault(name, {"m": zero, "diff": zero, "n": zero, "last": g})
            diff = g - s["last"]
            s["m"] = b1 * s["m"] + (1 - b1) * g
            s["diff"] = b2 * s["diff"] + (1 - b2) * diff
            s["n"] = b3 * s["n"] + (1 - b3) * (g + b2 * diff) ** 2
            s["last"] = g
            denom = np.sqrt(s["n"]) / np.sqrt(1 - b3 ** (t + 1)) + eps
            p = p * (1 - lr * weight_decay)
            p = p - lr / (1 - b1 ** (t + 1)) * s["m"] / denom
            new[name] = p - lr * b2 / (1 - b2 ** (t + 1)) * s["diff"] / denom
        return new

    return step


for options in ({"lr": 0.01, "weight_decay": 0.1}, {"lr": 0.05, "betas": [0.7, 0.6, 0.8], "eps": 1e-2}):
    run("adan", options, "a transcription of the authors' _single_tensor_adan(no_prox=True)", adan(**options))


packages = ("optax", "jax", "madgrad", "torch", "numpy")
record("modern", {name: version(name) for name in packages}, RUNS)
