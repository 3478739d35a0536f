"""Record the building blocks of optax on the common problem: `JAX_ENABLE_X64=1 python -m tests.oracles.make_blocks`.

Matrices are transposed where optax has the outputs last. What optax does to all parameters together only is run on each by
itself where purestep has a transform for that. Noise is no one's but the paper's: its random numbers are written out here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tests.oracles.common import Arrays, follow, record, start, value

assert jax.config.jax_enable_x64, "set JAX_ENABLE_X64=1"
PART = -0.1
Update = Callable[[Arrays, Arrays, int], Arrays]


def together(transform: Any, given: bool = False, transposed: bool = False) -> Update:
    """optax's own; with the value if it asks for that."""

    def turned(tree: Arrays) -> Arrays:
        return {k: jnp.asarray(x).T if transposed else jnp.asarray(x) for k, x in tree.items()}

    state = transform.init(turned(start()))

    def update(params: Arrays, grads: Arrays, t: int) -> Arrays:
        nonlocal state
        extra = {"value": value(params, t)} if given else {}
        updates, state = transform.update(turned(grads), state, turned(params), **extra)
        return {k: np.asarray(u) for k, u in turned(updates).items()}

    return update


def each(make: Callable[[], Any]) -> Update:
    """optax's on each parameter by itself."""
    own = {k: together_one(make(), k) for k in start()}
    return lambda params, grads, t: {k: own[k](params[k], grads[k]) for k in params}


def together_one(transform: Any, name: str) -> Callable[[Any, Any], Any]:
    state = transform.init(jnp.asarray(start()[name]))

    def update(p: Any, g: Any) -> Any:
        nonlocal state
        u, state = transform.update(jnp.asarray(g), state, jnp.asarray(p))
        return np.asarray(u)

    return update


def box(low: float, high: float) -> Update:
    """optax has the projection, but no transform of it."""
    return lambda params, grads, t: {
        k: np.asarray(optax.projections.projection_box(jnp.asarray(p + grads[k]), low, high)) - p for k, p in params.items()
    }


def philox(count: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 of one counter, as Salmon et al. have it, in whole numbers without bounds."""
    word = 2**32
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * count[0], word)
        high1, low1 = divmod(0xCD9E8D57 * count[2], word)
        count = [high1 ^ count[1] ^ key[0], low1, high0 ^ count[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) % word, (key[1] + 0xBB67AE85) % word]
    return count


def noise(eta: float, gamma: float, seed: int) -> Update:
    """Neelakantan et al.; normal numbers by Box and Muller."""

    def normal(shape: tuple[int, ...], t: int, place: int) -> Any:
        found: list[float] = []
        for block in range(int(np.prod(shape)) // 4 + 1):
            words = [(w + 0.5) / 2**32 for w in philox([block, place, t + 1, 0], [seed % 2**32, seed // 2**32])]
            for size, turn in (words[:2], words[2:]):
                found += [np.sqrt(-2 * np.log(size)) * f(2 * np.pi * turn) for f in (np.cos, np.sin)]
        return np.array(found[: int(np.prod(shape))]).reshape(shape)

    def update(params: Arrays, grads: Arrays, t: int) -> Arrays:
        deviation = np.sqrt(eta / (1 + t) ** gamma)
        return {k: g + deviation * normal(np.shape(g), t, i) for i, (k, g) in enumerate(grads.items())}

    return update


def run(name: str, oracle: str, make: Callable[..., Update], *options: dict[str, Any], **more: Any) -> list[dict[str, Any]]:
    found = []
    for own in options:
        update = make(**own)

        def step(params: Arrays, grads: Arrays, t: int, update: Update = update) -> Arrays:
            return {k: params[k] + PART * u for k, u in update(params, grads, t).items()}

        found.append({"name": name, "options": own, "oracle": oracle, "part": PART, "trajectory": follow(step), **more})
    return found


def renamed(f: Callable[..., Any], **names: str) -> Callable[..., Update]:
    """An optax factory, with purestep's names of its arguments."""
    return lambda **options: together(f(**{names.get(k, k): x for k, x in options.items()}))


RUNS = [
    *run("clip", "optax.clip", renamed(optax.clip, max_value="max_delta"), {"max_value": 0.3}, {"max_value": 0.05}),
    *run(
        "clip_by_norm", "optax.clip_by_global_norm of each parameter by itself",
        lambda max_norm: each(lambda: optax.clip_by_global_norm(max_norm)), {"max_norm": 0.5}, {"max_norm": 2.0},
    ),
    *run("clip_by_block_rms", "optax.clip_by_block_rms", renamed(optax.clip_by_block_rms, max_rms="threshold"), {"max_rms": 0.3}, {"max_rms": 1.0}),
    *run(
        "adaptive_grad_clip", "optax.adaptive_grad_clip, with matrices transposed",
        lambda **options: together(optax.adaptive_grad_clip(**options), transposed=True),
        {"clipping": 0.3}, {"clipping": 1.0, "eps": 0.5}, {"clipping": 0.05, "eps": 0.01},
    ),
    *run("normalize", "optax.normalize_by_update_norm", renamed(optax.normalize_by_update_norm), {}, {"eps": 0.5}, {"eps": 0.1}),
    *run(
        "normalize_by_block", "optax.normalize_by_update_norm of each parameter by itself",
        lambda **options: each(lambda: optax.normalize_by_update_norm(**options)), {}, {"eps": 0.5}, {"eps": 0.1},
    ),
    *run("centralize", "optax.centralize", renamed(optax.centralize), {}),
    *run("sign", "optax.scale_by_sign", renamed(optax.scale_by_sign), {}),
    *run("zero_nans", "optax.zero_nans", renamed(optax.zero_nans), {}),
    *run("trace", "optax.trace", renamed(optax.trace, momentum="decay"), {"momentum": 0.8}, {"momentum": 0.8, "nesterov": True}, {"momentum": 0.5, "nesterov": True}),
    *run("ema", "optax.ema", renamed(optax.ema), {"decay": 0.8}, {"decay": 0.5}, {"decay": 0.9, "debias": False}, {"decay": 0.7, "debias": False}),
    *run("add_decayed_weights", "optax.add_decayed_weights", renamed(optax.add_decayed_weights), {"weight_decay": 0.1}, {"weight_decay": 0.7}),
    *run("add_noise", "numpy, from the papers", noise, {"eta": 0.1, "gamma": 0.55, "seed": 0}, {"eta": 1.0, "gamma": 0.8, "seed": 2**40 + 7}, {"eta": 0.3, "gamma": 0.0, "seed": 3}),
    *run(
        "scale_by_trust_ratio", "optax.scale_by_trust_ratio", renamed(optax.scale_by_trust_ratio),
        {}, {"trust_coefficient": 0.5, "eps": 0.1}, {"min_norm": 0.5, "trust_coefficient": 2.0},
    ),
    *run("scale_by_param_block_norm", "optax.scale_by_param_block_norm", renamed(optax.scale_by_param_block_norm), {}, {"min_scale": 0.5}, {"min_scale": 2.0}),
    *run("scale_by_param_block_rms", "optax.scale_by_param_block_rms", renamed(optax.scale_by_param_block_rms), {}, {"min_scale": 0.5}, {"min_scale": 2.0}),
    *run("keep_params_nonnegative", "optax.keep_params_nonnegative", renamed(optax.keep_params_nonnegative), {}),
    *run("project_box", "optax.projections.projection_box", box, {"low": -0.4, "high": 0.6}, {"low": 0.1, "high": 1.0}),
    *run(
        "reduce_on_plateau", "optax.contrib.reduce_on_plateau",
        lambda **options: together(optax.contrib.reduce_on_plateau(**options), given=True),
        {"factor": 0.5, "patience": 2}, {"factor": 0.7, "patience": 1, "rtol": 0.1, "cooldown": 2},
        {"factor": 0.5, "patience": 2, "rtol": 0.05, "atol": 0.1, "accumulation_size": 3, "min_scale": 0.2},
        value=True,
    ),
]  # fmt: skip

if __name__ == "__main__":
    record("blocks", {"optax": optax.__version__, "jax": jax.__version__, "numpy": np.__version__}, RUNS)
