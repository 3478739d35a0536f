"""
A transformer whose weights have 16 bits
========================================

Trains the small transformer of ``muon_adamw.py`` with weights in bfloat16, which halves what they, their gradients and their
copies on other machines take, and compares what becomes of it:

- **bfloat16**, plain AdamW: most updates are smaller than half the distance to the next number, and are lost;
- **stochastic rounding**: they are right in the mean. The moments are kept in 16 bits and rounded at random, too;
- **Kahan**: what rounding took is added to the next update; the moments are in float32;
- **master weights**: a float32 copy is updated; the moments are in float32;
- **float32**, all of it, for comparison.

Where ``torchao`` and ``pytorch_optimizer`` are installed, their AdamW with stochastic rounding and with Kahan's summation take
part. All runs begin with the same weights, rounded, and see the same batches; the network itself computes in float32, from the
weights as they are, so that nothing else differs.

Run it with::

    python examples/bfloat16_text.py

It takes five minutes on two cores, prints a table of losses, bytes per parameter and time per step, and saves a picture. It
raises an error if one of the three ends more than 1 % above float32, or plain bfloat16 does not.
"""

import argparse
import importlib.util
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("Agg")  # draws into a file, so it also works where there is no screen
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from muon_adamw import BATCH_SIZE, CONTEXT, SEED, Text, Transformer, batch, load_text
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value
from tqdm import tqdm

import purestep as ps

LEARNING_RATE, DECAY, BETAS = 1e-3, 0.01, (0.9, 0.99)
EVALUATIONS = 10
NEAR = 0.01  # how much higher than float32's a loss may be
PICTURE = Path(__file__).resolve().parent / "output" / "bfloat16_text.png"

Params = dict[str, Tensor]
Step = Callable[[Params, Params], Params]


# %%
# The contenders
# --------------
# A transform says how the update is made, and what is put around it how it is rounded.


def adamw(steps: int) -> ps.Transform:
    lr = ps.schedules.warmup_cosine(LEARNING_RATE, warmup_steps=max(1, steps // 10), total_steps=steps)
    return ps.adamw(lr, betas=BETAS, weight_decay=DECAY)


OURS: dict[str, Callable[[ps.Transform], ps.Transform]] = {
    "float32": lambda t: t,
    "bfloat16": lambda t: t,
    "stochastic rounding": lambda t: ps.stochastic_rounding(ps.quantize_state(t, bits=16, min_size=0)),
    "Kahan": lambda t: ps.kahan(ps.state_dtype(t, torch.float32)),
    "master weights": ps.master_weights,
}
MUST = ("stochastic rounding", "Kahan", "master weights")
PEERS = {"torchao, stochastic": "torchao", "pytorch_optimizer, Kahan": "pytorch_optimizer"}


@dataclass
class Run:
    """What is written down while a network trains."""

    name: str
    losses: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)  # step, loss
    step_ms: list[float] = field(default_factory=list)
    bytes_per_parameter: float = 0.0


def size(x: Any) -> int:
    """The bytes of all tensors in a pytree, scalars aside."""
    return sum(t.nbytes for t in torch.utils._pytree.tree_leaves(x) if isinstance(t, Tensor) and t.dim())


def ours(name: str, params: Params, steps: int) -> tuple[Step, Callable[[], Any]]:
    """A step of one of our contenders, and what reads its state."""
    opt = OURS[name](adamw(steps))
    state = opt.init_state(params)

    def step(grads: Params, now: Params) -> Params:
        nonlocal state
        now, state = opt.step(grads, state, now, donate=True)
        return now

    return step, lambda: state


def peer(name: str, params: Params, steps: int) -> tuple[Step, Callable[[], Any]]:
    """The same of another package's optimizer, which has the schedule from torch."""
    own = [nn.Parameter(p) for p in params.values()]
    options = {"lr": LEARNING_RATE, "betas": BETAS, "weight_decay": DECAY, "eps": 1e-8}
    if PEERS[name] == "torchao":
        from torchao.optim import _AdamW

        optimizer = _AdamW(own, bf16_stochastic_round=True, **options)
    else:
        from pytorch_optimizer import StableAdamW

        optimizer = StableAdamW(own, kahan_sum=True, **options)
    lr = ps.schedules.warmup_cosine(LEARNING_RATE, warmup_steps=max(1, steps // 10), total_steps=steps)
    count = 0

    def step(grads: Params, now: Params) -> Params:
        nonlocal count
        for group in optimizer.param_groups:
            rate = float(lr(count))
            group["lr"] = group["lr"].fill_(rate) if isinstance(group["lr"], Tensor) else rate
        for p, g in zip(own, grads.values()):
            p.grad = g
        optimizer.step()
        count += 1
        return {k: p.detach() for k, p in zip(now, own)}

    return step, lambda: [dict(optimizer.state[p]) for p in own]


# %%
# Training
# --------


def train(name: str, text: Text, steps: int) -> Run:
    torch.manual_seed(SEED)  # all begin with the same weights
    model = Transformer(len(text.alphabet))
    dtype = torch.float32 if name == "float32" else torch.bfloat16
    params = {k: p.detach().bfloat16().to(dtype) for k, p in model.named_parameters()}
    step, state = (peer if name in PEERS else ours)(name, params, steps)

    def loss(p: Params, inputs: Tensor, targets: Tensor) -> Tensor:
        logits = functional_call(model, {k: x.float() for k, x in p.items()}, (inputs,))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def validate() -> float:
        generator = torch.Generator().manual_seed(SEED + 1)  # the same windows each time
        with torch.no_grad():
            found = [loss(params, *batch(text.validation, generator)).item() for _ in range(16)]
        return sum(found) / len(found)

    generator = torch.Generator().manual_seed(SEED)  # and see the same batches
    run = Run(name)
    with tqdm(range(1, steps + 1), desc=f"{name:<24}", unit="step") as bar:
        for k in bar:
            grads, value = grad_and_value(loss)(params, *batch(text.train, generator))
            before = time.perf_counter()
            params = step(grads, params)
            run.step_ms.append((time.perf_counter() - before) * 1e3)
            run.losses.append(value.item())
            if k % max(1, steps // EVALUATIONS) == 0 or k == steps:
                run.validation.append((k, validate()))
                bar.set_postfix(validation=f"{run.validation[-1][1]:.3f}", refresh=False)
    run.bytes_per_parameter = (size(params) + size(state())) / sum(p.numel() for p in params.values())
    return run


# %%
# What came of it
# ---------------


def table(runs: list[Run]) -> Iterator[str]:
    base = runs[0].validation[-1][1]
    yield f"{'':<26} {'validation':>10} {'to float32':>11} {'bytes/param':>12} {'ms per step':>12}"
    for run in runs:
        last = run.validation[-1][1]
        share = f"{100 * (last / base - 1):+.2f} %"
        yield f"{run.name:<26} {last:>10.4f} {share:>11} {run.bytes_per_parameter:>12.1f} {median(run.step_ms):>12.2f}"


def draw(runs: list[Run], steps: int) -> None:
    styles = {"float32": ("black", "-"), "bfloat16": ("tab:gray", "--")}
    colors = iter(["tab:blue", "tab:orange", "tab:green", "tab:purple", "tab:brown"])
    base = dict(runs[0].validation)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for run in sorted(runs, key=lambda r: -r.validation[-1][1]):
        color, line = styles.get(run.name) or (next(colors), "-")
        style: dict[str, Any] = {"color": color, "linestyle": line, "marker": "o", "markersize": 3, "linewidth": 1.8}
        left.plot(*zip(*run.validation), label=f"{run.name}: {run.bytes_per_parameter:.0f} bytes", **style)
        right.plot(*zip(*[(k, 100 * (x / base[k] - 1)) for k, x in run.validation]), **style)
    left.set(xlabel="step", ylabel="validation loss (nats per character)", title="The same transformer, weights of 16 bits")
    left.legend(title="bytes per parameter, with its state", frameon=False)
    right.set(xlabel="step", ylabel="validation loss above float32's (%)", title="What the rounding costs")
    right.axhspan(-100 * NEAR, 100 * NEAR, color="0.93", zorder=0)
    for axes in (left, right):
        axes.set_xlim(0, steps * 1.02)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a transformer with weights in bfloat16.")
    parser.add_argument("--steps", type=int, default=None, help="of each run; by default 600")
    parser.add_argument("--short", action="store_true", help="a few steps of each, without a picture")
    given = parser.parse_args()
    steps = given.steps or (20 if given.short else 600)
    text = load_text()
    names = [*OURS, *[name for name, package in PEERS.items() if importlib.util.find_spec(package)]]
    runs = [train(name, text, steps) for name in names]
    print(f"\n{steps} steps of {BATCH_SIZE} x {CONTEXT} characters\n")
    print("\n".join(table(runs)))
    if given.short:
        return
    draw(runs, steps)
    print(f"picture: {PICTURE}")
    last = {run.name: run.validation[-1][1] for run in runs}
    far = [name for name in MUST if last[name] > (1 + NEAR) * last["float32"]]
    if far:
        raise SystemExit(f"These end more than 1 % above float32: {', '.join(far)}.")
    if last["bfloat16"] <= (1 + NEAR) * last["float32"]:
        raise SystemExit("Plain bfloat16 is as good as float32 here: the comparison shows nothing.")


if __name__ == "__main__":
    main()
