"""Record optax's transforms around transforms on the common problem: `JAX_ENABLE_X64=1 python -m tests.oracles.make_nested`.

Averages of parameters are optax's `incremental_update`, called after every step, or after those that count.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from tests.oracles.common import Arrays, follow, record, start

assert jax.config.jax_enable_x64, "set JAX_ENABLE_X64=1"
Step = Callable[[Arrays, Arrays, int], Arrays]

ADAM = {"name": "adam", "options": {"lr": 0.05, "betas": [0.7, 0.9], "eps": 1e-3}}
ADAMW = {"name": "adamw", "options": {"lr": 0.05, "weight_decay": 0.3}}
MOMENTUM = {"name": "sgd", "options": {"lr": 0.1, "momentum": 0.8}}
FALLING = {"name": "sgd", "options": {"lr": {"of_step": "0.2 / (1 + step)"}, "momentum": 0.8}}
TRACE = {"name": "trace", "options": {"momentum": 0.8}}
OPTAX: dict[int, Any] = {
    id(ADAM): lambda: optax.adam(0.05, b1=0.7, b2=0.9, eps=1e-3),
    id(ADAMW): lambda: optax.adamw(0.05, weight_decay=0.3),
    id(MOMENTUM): lambda: optax.sgd(0.1, momentum=0.8),
    id(FALLING): lambda: optax.sgd(lambda step: 0.2 / (1 + step), momentum=0.8),
    id(TRACE): lambda: optax.trace(0.8),
}
SPOILED = (1, 4, 5, 6, 7, 20)


def jnp_tree(tree: Arrays) -> Arrays:
    return {k: jnp.asarray(x) for k, x in tree.items()}


def updating(transform: Any, factor: float = 1.0, spoiled: tuple[int, ...] = ()) -> Step:
    """Steps of an optax transform; at some of them the first number of the first gradient is NaN."""
    state = transform.init(jnp_tree(start()))

    def step(params: Arrays, grads: Arrays, t: int) -> Arrays:
        nonlocal state
        if t in spoiled:
            grads = {k: np.array(g) for k, g in grads.items()}
            next(iter(grads.values())).flat[0] = np.nan
        updates, state = transform.update(jnp_tree(grads), state, jnp_tree(params))
        return {k: np.asarray(params[k] + factor * updates[k]) for k in params}

    return step


def looking_ahead(inner: Any, k: int, alpha: float, slow: bool) -> list[Arrays]:
    """The fast weights at each checkpoint, or the slow ones."""
    transform = optax.lookahead(inner, k, alpha)
    both = optax.LookaheadParams.init_synced(jnp_tree(start()))
    state = transform.init(both)
    kept: list[Arrays] = []

    def step(params: Arrays, grads: Arrays, t: int) -> Arrays:
        nonlocal both, state
        updates, state = transform.update(jnp_tree(grads), state, both)
        both = optax.apply_updates(both, updates)
        kept.append({k: np.asarray(x) for k, x in both.slow.items()})
        return {k: np.asarray(x) for k, x in both.fast.items()}

    fast = follow(step)
    return [kept[t - 1] for t in (1, 2, 3, 10, 30)] if slow else fast


def averaging(inner: Any, share: Callable[[int], float | None]) -> list[Arrays]:
    """The average, into which the parameters after the t-th step come with a share; None for the parameters themselves."""
    walk = updating(inner)
    average: Any = None
    kept: list[Arrays] = []

    def step(params: Arrays, grads: Arrays, t: int) -> Arrays:
        nonlocal average
        new = walk(params, grads, t)
        now = share(t + 1)
        average = jnp_tree(new) if now is None else optax.incremental_update(jnp_tree(new), average, now)
        kept.append({k: np.asarray(x) for k, x in average.items()})
        return new

    follow(step)
    return [kept[t - 1] for t in (1, 2, 3, 10, 30)]


def joined(t: int, first: int, every: int) -> float | None:
    n = max(0, (t - first) // every)
    if n < 2:
        return None if n == 0 or (t - first) % every == 0 else 0.0
    return 1 / n if (t - first) % every == 0 else 0.0


def run(name: str, options: dict[str, Any], oracle: str, trajectory: list[Arrays], **more: Any) -> dict[str, Any]:
    return {"name": name, "options": options, "oracle": oracle, **more, "trajectory": trajectory}


def main() -> None:
    """Write the file."""
    runs = []
    for inner, most in ((ADAM, 4), (MOMENTUM, 9)):
        transform = optax.apply_if_finite(OPTAX[id(inner)](), most)
        runs.append(
            run(
                "skip_if_nonfinite",
                {"transform": inner, "max_consecutive": most},
                "optax.apply_if_finite",
                follow(updating(transform, spoiled=SPOILED)),
                spoiled=SPOILED,
            )
        )
    for inner, k, mean in ((ADAM, 2, True), (FALLING, 3, False), (ADAMW, None, True)):
        every: Any = k if k else lambda step: 1 + step
        transform = optax.MultiSteps(OPTAX[id(inner)](), every, use_grad_mean=mean, accumulator_dtype=jnp.float64)
        options = {"transform": inner, "k": k or {"of_step": "1 + step"}, "average": mean}
        runs.append(run("accumulate", options, "optax.MultiSteps", follow(updating(transform))))
    for inner, k, alpha in ((ADAM, 2, 0.3), (MOMENTUM, 5, 0.8)):
        for slow in (False, True):
            options = {"transform": inner, "k": k, "alpha": alpha}
            found = looking_ahead(OPTAX[id(inner)](), k, alpha, slow)
            runs.append(run("lookahead", options, "optax.lookahead", found, **({"eval": True} if slow else {})))
    for inner, options in (
        (MOMENTUM, {"s_init": 1.0, "weight_decay": 0.3, "eps": 1e-4, "num_betas": 4}),
        (FALLING, {"s_init": 0.5, "weight_decay": 0.05, "eps": 1e-4, "num_betas": 4}),
        (ADAM, {"s_init": 0.5, "weight_decay": 0.3, "eps": 1e-4, "num_betas": 3}),
        (ADAM, {"s_init": 1.0, "weight_decay": 0.05, "eps": 1e-4, "num_betas": 8}),
        (ADAM, {"s_init": 1e-3}),
    ):
        found = follow(updating(optax.contrib.mechanize(OPTAX[id(inner)](), **options)))
        small = {"float32": "the first updates are 1e-4 of the parameters, whose rounding is multiplied"}
        more = small if options["s_init"] < 0.1 else {}
        runs.append(run("mechanic", {"transform": inner, **options}, "optax.contrib.mechanize", found, **more))
    for inner, text, otherwise, part in ((TRACE, "step % 3 != 1", "pass", -0.05), (ADAM, "step < 12", "zero", 1.0)):
        around = optax.conditionally_transform if otherwise == "pass" else optax.conditionally_mask
        transform = around(OPTAX[id(inner)](), eval(f"lambda step: {text}"))
        options = {"predicate": {"of_step": text}, "transform": inner, "otherwise": otherwise}
        runs.append(run("conditionally", options, f"optax.{around.__name__}", follow(updating(transform, part)), part=part))
    for decay in (0.5, 0.9):
        options = {"transforms": [MOMENTUM, {"name": "ema_params", "options": {"decay": decay}}]}
        found = averaging(OPTAX[id(MOMENTUM)](), lambda t, decay=decay: None if t == 1 else 1 - decay)
        runs.append(run("chain", options, "optax.incremental_update", found, eval=True))
    for first, every in ((0, 1), (2, 3)):
        options = {"transforms": [ADAM, {"name": "average_params", "options": {"start": first, "every": every}}]}
        found = averaging(OPTAX[id(ADAM)](), lambda t, a=first, c=every: joined(t, a, c))
        runs.append(run("chain", options, "optax.incremental_update", found, eval=True))
    record("nested", {"optax": optax.__version__, "jax": jax.__version__}, runs)


if __name__ == "__main__":
    main()
