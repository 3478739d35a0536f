"""Record the trajectories of `methods.json`: algorithms that see all parameters, average them, or ask for more than gradients.

Run from the repository's root, in an environment of its own:

    pip install -c constraints.txt torch optax==0.2.8 schedulefree==1.4.1 dog-optimizer==1.0.3 prodigyopt==1.1.2 dadaptation==3.2
    JAX_ENABLE_X64=1 python -m tests.oracles.make_methods
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

import dadaptation
import dog
import jax
import jax.numpy as jnp
import numpy as np
import optax
import prodigyopt
import schedulefree
import torch
from optax import contrib

from tests.oracles.common import Arrays, curvature, follow, gradient, record, start, value

RUNS: list[dict[str, Any]] = []
Step = Callable[[Arrays, Arrays, int], Mapping[str, Any]]


def run(name: str, options: Mapping[str, Any], oracle: str, step: Step, **more: Any) -> None:
    """One trajectory, under the options of purestep's factory."""
    RUNS.append({"name": name, "options": dict(options), "oracle": oracle, "trajectory": follow(step), **more})


# ----------------------------------------------------------------------------------------------------- the authors' packages


def by_torch(cls: Any, options: Mapping[str, Any], before: Callable[[Any], None] = lambda optimizer: None) -> Step:
    """A `torch.optim.Optimizer`."""
    leaves = {name: torch.tensor(p, dtype=torch.float64).requires_grad_() for name, p in start().items()}
    optimizer = cls(list(leaves.values()), **options)
    before(optimizer)

    def step(params: Arrays, grads: Arrays, t: int) -> Arrays:
        for name, p in leaves.items():
            p.grad = torch.tensor(grads[name], dtype=torch.float64)
        optimizer.step()
        return {name: p.detach().numpy().copy() for name, p in leaves.items()}

    return step


def authors(name: str, cls: Any, *many: Mapping[str, Any], always: Mapping[str, Any] = {}, **more: Any) -> None:
    """An authors' optimizer that has the same arguments."""
    for options in many:
        given = {**options, **always}
        arguments = ", ".join(f"{k}={x!r}" for k, x in given.items())
        run(name, options, f"{cls.__module__}.{cls.__name__}({arguments})", by_torch(cls, given, **more))


# ------------------------------------------------------------------------------------------------------------------- optax


def by_optax(transform: Any, extras: Callable[[Arrays, Arrays, int], dict[str, Any]] = lambda *_: {}) -> Step:
    """A gradient transformation; `extras` makes its extra arguments."""
    state = transform.init(arrays(start()))

    def step(params: Arrays, grads: Arrays, t: int) -> Arrays:
        nonlocal state
        with jax.disable_jit():  # a line search calls numpy
            updates, state = transform.update(arrays(grads), state, arrays(params), **extras(params, grads, t))
        return {name: np.asarray(x) for name, x in optax.apply_updates(arrays(params), updates).items()}

    return step


def arrays(params: Arrays) -> dict[str, jax.Array]:
    return {name: jnp.asarray(x) for name, x in params.items()}


def at(t: int) -> Callable[[Any], Any]:
    """The loss as a function of the parameters."""
    return lambda params: jnp.asarray(value(params, t))


# ------------------------------------------------------------------------------------------------------------------- runs

authors(
    "schedule_free_sgd",
    schedulefree.SGDScheduleFree,
    {"lr": 0.2, "weight_decay": 0.1},
    {"lr": 0.3, "momentum": 0.7, "warmup_steps": 5, "weight_lr_power": 1.0, "r": 0.5},
    always={"foreach": False},
    before=lambda optimizer: optimizer.train(),
)
authors(
    "schedule_free_adamw",
    schedulefree.AdamWScheduleFree,
    {"lr": 0.05, "weight_decay": 0.1},
    {"lr": 0.05, "betas": (0.7, 0.9), "eps": 1e-3, "warmup_steps": 5, "weight_lr_power": 1.0, "r": 0.5},
    always={"foreach": False},
    before=lambda optimizer: optimizer.train(),
)
for lr, b1, decay in ((0.2, 0.9, 0.1), (0.1, 0.6, 0.0)):
    run(
        "schedule_free_sgd",
        {"lr": lr, "momentum": b1, "weight_decay": decay},
        f"optax.contrib.schedule_free_sgd({lr}, b1={b1}, weight_decay={decay})",
        by_optax(contrib.schedule_free_sgd(lr, b1=b1, weight_decay=decay)),
    )

DOG = ({"reps_rel": 0.1, "weight_decay": 0.1}, {"lr": 0.5, "reps_rel": 0.01, "eps": 0.1})
authors("dog", dog.DoG, *DOG, {"reps_rel": 1e-6, "init_eta": 0.05})
authors("ldog", dog.LDoG, *DOG)

ADAPTIVE = (
    {"lr": 0.3, "d0": 0.01, "weight_decay": 0.1},
    {"lr": 0.5, "betas": (0.7, 0.9), "eps": 1e-3, "d0": 1e-3, "growth_rate": 1.2, "use_bias_correction": True},
)
authors("dadapt_adamw", dadaptation.DAdaptAdam, *ADAPTIVE, always={"decouple": True})
authors(
    "prodigy",
    prodigyopt.Prodigy,
    *ADAPTIVE,
    {"lr": 0.5, "beta3": 0.8, "d0": 0.01, "d_coef": 0.5, "safeguard_warmup": True, "use_bias_correction": True},
)
for name, function in (("dadapt_adamw", contrib.dadapt_adamw), ("prodigy", contrib.prodigy)):
    run(
        name,
        {"lr": 0.7, "betas": [0.8, 0.95], "eps": 1e-4, "d0": 0.01, "weight_decay": 0.1, "use_bias_correction": True},
        f"optax.contrib.{name}(0.7, betas=(0.8, 0.95), eps=1e-4, estim_lr0=0.01, weight_decay=0.1)",
        by_optax(function(0.7, betas=(0.8, 0.95), eps=1e-4, estim_lr0=0.01, weight_decay=0.1)),
    )

for longest, least, eps, positive in ((0.3, -1.0, 0.0, False), (1.0, -0.5, 0.1, False), (0.5, 0.5, 0.0, True)):
    given = {"max_learning_rate": longest, "f_min": least, "eps": eps}
    variant = "sps+" if positive else "sps"
    run(
        "polyak_sgd",
        {**given, "positive": positive},
        f"optax.polyak_sgd({', '.join(f'{k}={x}' for k, x in given.items())}, variant={variant!r})",
        by_optax(optax.polyak_sgd(**given, variant=variant), lambda params, grads, t: {"value": value(params, t)}),
        value=True,
    )

for options in (
    {"max_backtracking_steps": 10, "increase_factor": 1.2},
    {
        "max_backtracking_steps": 3,
        "slope_rtol": 0.3,
        "decrease_factor": 0.5,
        "max_learning_rate": 2.0,
        "atol": 1e-3,
        "rtol": 1e-3,
    },
):
    search = optax.scale_by_backtracking_linesearch(**options)
    run(
        "scale_by_backtracking_linesearch",
        options,
        f"optax.chain(optax.scale(-2.0), optax.scale_by_backtracking_linesearch({options}))",
        by_optax(
            optax.chain(optax.scale(-2.0), search),
            lambda params, grads, t: {"value": value(params, t), "grad": arrays(grads), "value_fn": at(t)},
        ),
        value_and_grad=True,
        before=-2.0,
    )


def sharpness_aware(rho: float, adaptive: bool) -> Step:
    """SAM's first and second step as in github.com/davda54/sam, around gradient descent, in numpy."""

    def step(params: Arrays, grads: Arrays, t: int) -> Arrays:
        norm = np.sqrt(sum(np.sum((np.abs(p) * g if adaptive else g) ** 2) for p, g in zip(params.values(), grads.values())))
        there = {n: p + (p**2 if adaptive else 1.0) * grads[n] * rho / (norm + 1e-12) for n, p in params.items()}
        g = gradient(there, t)
        return {n: p - 0.1 * g[n] for n, p in params.items()}

    return step


for rho in (0.2, 0.05):
    sam = contrib.sam(optax.sgd(0.1), optax.chain(contrib.normalize(), optax.sgd(rho)), sync_period=2, opaque_mode=True)
    run(
        "sam",
        {"rho": rho},
        f"optax.contrib.sam(optax.sgd(0.1), optax.chain(optax.contrib.normalize(), optax.sgd({rho})), opaque_mode=True)",
        by_optax(sam, lambda params, grads, t: {"grad_fn": lambda p, i: arrays(gradient(p, t))}),
        value_and_grad=True,
        part=-0.1,
    )
run(
    "sam",
    {"rho": 0.5, "adaptive": True},
    sharpness_aware.__doc__ or "",
    sharpness_aware(0.5, True),
    value_and_grad=True,
    part=-0.1,
)

for options in (
    {"betas": (0.9, 0.8), "eps": 1e-3, "gamma": 0.3, "update_interval": 4},
    {"betas": (0.7, 0.9), "eps": 0.1, "gamma": 0.2, "clip_threshold": None, "update_interval": 1},
    {"eps": 1e-12, "gamma": 1.0, "clip_threshold": 0.5, "update_interval": 10},
):
    arguments = {**options, **dict(zip(("b1", "b2"), options.get("betas", ())))}
    arguments.pop("betas", None)
    estimate = optax.GradientTransformationExtraArgs(lambda p: (), lambda g, s, params=None, *, estimate: (estimate, s))
    run(
        "sophia",
        {"lr": 0.05, "weight_decay": 0.1, **options},
        f"optax.contrib.sophia(0.05, weight_decay=0.1, {', '.join(f'{k}={x}' for k, x in arguments.items())}) with a given estimate",
        by_optax(
            contrib.sophia(0.05, weight_decay=0.1, hessian_diagonal_fn=estimate, **arguments),
            lambda params, grads, t: {"estimate": arrays(curvature(params, t))},
        ),
        hessian=True,
    )

# ----------------------------------------------------------------------------- algorithms of matrices, in numpy, as their papers

PLAIN = {"v": np.zeros(()), "m": np.zeros(())}


def adam(s: Any, g: Any, t: int, betas: Any, eps: float) -> Any:
    s["m"] = betas[0] * s["m"] + (1 - betas[0]) * g
    s["v"] = betas[1] * s["v"] + (1 - betas[1]) * g**2
    return s["m"] / (1 - betas[0] ** t) / (np.sqrt(s["v"] / (1 - betas[1] ** t)) + eps)


def galore(lr: float, rank: int, update_proj_gap: int, scale: float, betas: Any, eps: float, weight_decay: float) -> Step:
    """github.com/jiaweizzhao/GaLore, GaLoreProjector("std") around the paper's Adam, in numpy; singular vectors keep their signs."""
    states: Any = {name: dict(PLAIN) for name in start()}

    def update(s: Any, g: Any, t: int) -> Any:
        if g.ndim != 2:
            return adam(s, g, t + 1, betas, eps)
        if t % update_proj_gap == 0:
            u, _, vh = np.linalg.svd(g, full_matrices=False)
            if "svd" in s:  # each with the sign of the one that it replaces
                u = u * np.where(np.sum(u * s["svd"][0], 0) < 0, -1.0, 1.0)
                vh = vh * np.where(np.sum(vh * s["svd"][2], 1, keepdims=True) < 0, -1.0, 1.0)
            s["svd"] = u, None, vh
        u, _, vh = s["svd"]
        if g.shape[0] >= g.shape[1]:
            return scale * adam(s, g @ vh[:rank].T, t + 1, betas, eps) @ vh[:rank]
        return scale * u[:, :rank] @ adam(s, u[:, :rank].T @ g, t + 1, betas, eps)

    return lambda params, grads, t: {n: p - lr * (update(states[n], grads[n], t) + weight_decay * p) for n, p in params.items()}


def shampoo(lr: float, momentum: float, weight_decay: float, eps: float, update_freq: int) -> Step:
    """Algorithm 1 of Gupta et al., 2018, with heavy-ball momentum, in numpy."""
    states: Any = {}

    def power(x: Any, exponent: float) -> Any:
        values, vectors = np.linalg.eigh(x)
        return vectors @ np.diag(values**exponent) @ vectors.T

    def update(name: str, g: Any, t: int) -> Any:
        x = g if g.ndim == 2 else g.reshape(-1, 1)
        s = states.setdefault(name, {"L": eps * np.eye(x.shape[0]), "R": eps * np.eye(x.shape[1]), "b": 0.0})
        s["L"], s["R"] = s["L"] + x @ x.T, s["R"] + x.T @ x
        if t % update_freq == 0:
            s["roots"] = power(s["L"], -0.25 if g.ndim == 2 else -0.5), power(s["R"], -0.25) if g.ndim == 2 else np.eye(1)
        s["b"] = momentum * s["b"] + (s["roots"][0] @ x @ s["roots"][1]).reshape(g.shape)
        return s["b"]

    return lambda params, grads, t: {
        n: p - lr * update(n, np.asarray(grads[n] + weight_decay * p), t) for n, p in params.items()
    }


def soap(lr: float, betas: Any, shampoo_beta: float, eps: float, precondition_frequency: int, max_precond_dim: int) -> Step:
    """github.com/nikhilvyas/SOAP, soap.py, for matrices and vectors, in numpy; without its decay."""
    states: Any = {}

    def turn(x: Any, qs: Any, back: bool) -> Any:
        left, right = (q if q is not None else np.eye(n) for q, n in zip(qs, x.shape))
        return left @ x @ right.T if back else left.T @ x @ right

    def update(name: str, g: Any, t: int) -> Any:
        x = g.reshape(-1, 1) if g.ndim < 2 else g
        sides = [g.ndim == 2 and n <= max_precond_dim for n in x.shape]
        squares = [x @ x.T, x.T @ x]
        if t == 0:
            gg = [(1 - shampoo_beta) * y if yes else None for y, yes in zip(squares, sides)]
            qs = [None if y is None else np.linalg.eigh(y)[1][:, ::-1] for y in gg]
            states[name] = {"m": np.zeros_like(x), "v": np.zeros_like(x), "gg": gg, "q": qs}
            return np.zeros_like(g)
        s = states[name]
        s["m"] = betas[0] * s["m"] + (1 - betas[0]) * x
        s["v"] = betas[1] * s["v"] + (1 - betas[1]) * turn(x, s["q"], False) ** 2
        rate = np.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t)
        u = rate * turn(turn(s["m"], s["q"], False) / (np.sqrt(s["v"]) + eps), s["q"], True)
        for k, yes in enumerate(sides):
            if not yes:
                continue
            s["gg"][k] = shampoo_beta * s["gg"][k] + (1 - shampoo_beta) * squares[k]
            if t % precondition_frequency == 0:
                q = s["q"][k]
                order = np.argsort(-np.diag(q.T @ s["gg"][k] @ q))
                s["v"] = np.take(s["v"], order, axis=k)
                s["q"][k] = np.linalg.qr(s["gg"][k] @ q[:, order])[0]
        return u.reshape(g.shape)

    return lambda params, grads, t: {n: p - lr * update(n, np.asarray(grads[n]), t) for n, p in params.items()}


for name, function, many in (
    (
        "galore",
        galore,
        (
            {"lr": 0.05, "rank": 2, "update_proj_gap": 4, "scale": 0.5, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1},
            {"lr": 0.1, "rank": 1, "update_proj_gap": 50, "scale": 1.0, "betas": (0.7, 0.9), "eps": 1e-3, "weight_decay": 0.0},
        ),
    ),
    (
        "shampoo",
        shampoo,
        (
            {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.1, "eps": 1e-2, "update_freq": 1},
            {"lr": 0.2, "momentum": 0.0, "weight_decay": 0.0, "eps": 0.1, "update_freq": 4},
        ),
    ),
    (
        "soap",
        soap,
        (
            {
                "lr": 0.02,
                "betas": (0.9, 0.95),
                "shampoo_beta": 0.9,
                "eps": 1e-8,
                "precondition_frequency": 3,
                "max_precond_dim": 9,
            },
            {
                "lr": 0.05,
                "betas": (0.7, 0.9),
                "shampoo_beta": 0.8,
                "eps": 1e-3,
                "precondition_frequency": 1,
                "max_precond_dim": 3,
            },
        ),
    ),
):
    for options in many:
        more = {"weight_decay": 0.0} if name == "soap" else {}
        singular = (
            "the inverse fourth root of a nearly singular matrix: what rounding does to it depends on the processor's LAPACK"
        )
        skips = {"float32": singular} if name == "shampoo" and options["update_freq"] == 1 else {}
        run(name, {**options, **more}, function.__doc__ or "", function(**options), **skips)

PACKAGES = ("torch", "optax", "jax", "schedulefree", "dog-optimizer", "prodigyopt", "dadaptation")

if __name__ == "__main__":
    assert jax.config.jax_enable_x64, "set JAX_ENABLE_X64=1"
    record("methods", {name: version(name) for name in PACKAGES}, RUNS)
