"""torch's fused kernels, and the tails of chains they compute.

A kernel changes the clock and nothing else: without this module every chain runs as its program.

On a CPU these kernels share out every tensor among the threads, however small it is, which costs about as much as to update
`SERIAL` elements: three quarters of the time on many small tensors. Those are done on one thread here.
"""

from __future__ import annotations

from itertools import compress
from typing import Any

import torch
from torch import Tensor

from purestep.algorithms.adagrad import scale_by_adagrad
from purestep.algorithms.adam import scale_by_adam, scale_by_amsgrad
from purestep.plan import KERNELS, Kernel
from purestep.threads import OPENMP, SERIAL, one_thread
from purestep.transforms.decay import decay
from purestep.transforms.momentum import trace
from purestep.transforms.scale import maximize, scale_by_learning_rate

FEW = 4
"""So many small tensors at most, among larger ones, are not worth a call of their own."""


def _threads(run: Any) -> Any:
    """A kernel whose small tensors are done on one thread."""

    def divided(p: list[Tensor], g: list[Tensor], s: dict[str, Any], h: dict[str, Any], before: Any) -> None:
        put, threads = OPENMP, torch.get_num_threads()
        few = [x.numel() <= SERIAL for x in p] if threads > 1 and p[0].is_cpu else []
        if put is None or sum(few) <= min(FEW, len(p) - 1):
            run(p, g, s, h, before)
            return
        if not all(few):
            large = [not x for x in few]
            run(*[_where(x, large) for x in (p, g, s)], h, before)
            p, g, s = (_where(x, few) for x in (p, g, s))
        with one_thread(put):
            run(p, g, s, h, before)

    return divided


def _where(x: Any, chosen: list[bool]) -> Any:
    """Some of a list, or of the lists in a dictionary."""
    if isinstance(x, dict):
        return {name: _where(y, chosen) for name, y in x.items()}
    return list(compress(x, chosen)) if isinstance(x, list) else x


def _adam(kernel: Any, amsgrad: bool) -> Any:
    @_threads
    def run(p: Any, g: Any, s: dict[str, Any], h: dict[str, Any], first: Any) -> None:
        kernel(
            p, g, s["exp_avg"], s["exp_avg_sq"], s["max_exp_avg_sq"] if amsgrad else [], [s["step"]()] * len(p),
            lr=h["lr"], beta1=h["betas"][0], beta2=h["betas"][1], weight_decay=h.get("weight_decay", 0.0), eps=h["eps"],
            amsgrad=amsgrad, maximize="maximize" in h,
        )  # fmt: skip

    return run


@_threads
def _sgd(p: Any, g: Any, s: dict[str, Any], h: dict[str, Any], before: Any) -> None:
    torch._fused_sgd_(
        p, g, s.get("momentum_buffer", []), lr=h["lr"], weight_decay=h.get("weight_decay", 0.0),
        momentum=h.get("momentum", 0.0), dampening=h.get("dampening", 0.0), nesterov=h.get("nesterov", False),
        maximize="maximize" in h, is_first_step="trace" in h and before == 0,
    )  # fmt: skip


@_threads
def _adagrad(p: Any, g: Any, s: dict[str, Any], h: dict[str, Any], before: Any) -> None:
    torch._fused_adagrad_(
        p, g, s["sum"], [s["step"]()] * len(p), lr=h["lr"], lr_decay=h["lr_decay"],
        weight_decay=h.get("weight_decay", 0.0), eps=h["eps"], maximize="maximize" in h,
    )  # fmt: skip


def _pattern(*factories: Any) -> Any:
    """Transforms in order; one in a list may be left out."""
    return tuple((f[0].declaration, True) if isinstance(f, list) else (f.declaration, False) for f in factories)


for scale, amsgrad in ((scale_by_adam, False), (scale_by_amsgrad, True)):
    KERNELS.append(Kernel(_pattern([maximize], [decay], scale, scale_by_learning_rate), _adam(torch._fused_adam_, amsgrad)))
    KERNELS.append(Kernel(_pattern([maximize], scale, decay, scale_by_learning_rate), _adam(torch._fused_adamw_, amsgrad)))
KERNELS.append(Kernel(_pattern([maximize], [decay], scale_by_adagrad, scale_by_learning_rate), _adagrad))
KERNELS.append(Kernel(_pattern([maximize], [decay], trace, scale_by_learning_rate), _sgd, copies=False, tails=False))
KERNELS.append(Kernel(_pattern([maximize], [decay], scale_by_learning_rate), _sgd, copies=False, tails=False))
