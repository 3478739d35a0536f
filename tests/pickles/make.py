"""Make the files of this folder: `python -m tests.pickles.make`. They were made by version 0.1.0, before its modules moved.

What is here must load in every later version, so a file is made once and not again; a new kind gets a new file.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

import purestep as ps
from purestep import optim, schedules

HERE = Path(__file__).parent


def params() -> dict[str, torch.Tensor]:
    return {"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3)}


def transforms() -> dict[str, Any]:
    """One of each kind."""
    return {
        "leafwise": ps.trace(0.9),
        "whole": ps.clip_by_global_norm(1.0),
        "chain": ps.chain(ps.clip_by_global_norm(1.0), ps.adamw(1e-3)),
        "schedule": ps.sgd(schedules.cosine(0.1, total_steps=100), momentum=0.9),
        "partition": ps.partition({"m": ps.muon(0.1), "a": ps.adamw(1e-3)}, ps.by_ndim({2: "m"}, default="a")),
        "paths": ps.partition({"m": ps.lion(0.1), "a": ps.adam(1e-3)}, ps.by_path({"^w": "m"}, default="a")),
        "masked": ps.masked(ps.add_decayed_weights(0.1), ps.by_ndim({2: True}, default=False)),
        "mask": ps.masked(ps.sgd(0.1), {"w": True, "b": False}),
        "freeze": ps.partition({"m": ps.freeze(), "a": ps.adam(1e-3)}, ps.by_path({"^w": "m"}, default="a")),
        "accumulate": ps.accumulate(ps.sgd(0.1, momentum=0.9), 2),
        "skip": ps.skip_if_nonfinite(ps.adamw(1e-3)),
        "lookahead": ps.lookahead(ps.adam(1e-3)),
        "quantized": ps.quantize_state(ps.adam(1e-3), bits=8),
        "average": ps.chain(ps.nadam(1e-3), ps.ema_params(0.9)),
        "prodigy": ps.prodigy(),
        "lbfgs": ps.lbfgs(),
    }


def value_and_grad(p: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return sum((x.square().sum() for x in p.values()), torch.zeros(())), {n: 2 * x for n, x in p.items()}


def steps(transform: Any, k: int = 2) -> tuple[Any, Any]:
    """Parameters and state after some steps."""
    at = params()
    state = transform.init_state(at)
    extras = {"value_and_grad": value_and_grad} if transform.plan.extras else {}
    for _ in range(k):
        at, state = transform.step({n: 0.1 * x + 0.1 for n, x in at.items()}, state, at, **extras)
    return at, state


def optimizer() -> tuple[list[torch.Tensor], optim.Optimizer]:
    """Parameters, and their optimizer after some steps."""
    own = [torch.nn.Parameter(x) for x in params().values()]
    made = optim.AdamW(own, lr=0.1)
    for _ in range(2):
        for p in own:
            p.grad = torch.ones_like(p)
        made.step()
    return own, made


def fresh() -> optim.Optimizer:
    """An optimizer of a partition before its first step."""
    own = [(n, torch.nn.Parameter(x)) for n, x in params().items()]
    return optim.Optimizer(own, transforms()["partition"])


def schedule() -> Any:
    return schedules.join([schedules.linear(0.0, 1.0, total_steps=10), schedules.cosine(1.0, total_steps=100)], [10])


def main() -> None:
    for name, transform in transforms().items():
        (HERE / f"{name}.pkl").write_bytes(pickle.dumps((transform, *steps(transform)), protocol=4))
    (HERE / "optimizer.pkl").write_bytes(pickle.dumps(optimizer(), protocol=4))
    (HERE / "fresh.pkl").write_bytes(pickle.dumps(fresh(), protocol=4))
    (HERE / "schedules.pkl").write_bytes(pickle.dumps(schedule(), protocol=4))


if __name__ == "__main__":
    main()
