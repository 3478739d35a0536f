"""torch's fused kernels, and the tails of chains they compute.

A kernel changes the clock and nothing else: without this module every chain runs as its program.
"""

from __future__ import annotations

from typing import Any

from purestep._core.threads import divided
from purestep._core.torch_api import foreach_maximum_, fused_adagrad_, fused_adam_, fused_adamw_, fused_sgd_
from purestep._executors.chains import KERNELS, Kernel
from purestep.algorithms.adagrad import scale_by_adagrad
from purestep.algorithms.adam import scale_by_adam, scale_by_amsgrad
from purestep.transforms.decay import decay
from purestep.transforms.momentum import trace
from purestep.transforms.scale import maximize, scale_by_learning_rate


def _adam(kernel: Any, amsgrad: bool) -> Any:
    @divided
    def run(p: Any, g: Any, s: dict[str, Any], h: dict[str, Any], first: Any) -> None:
        kernel(
            p, g, s["exp_avg"], s["exp_avg_sq"], s["max_exp_avg_sq"] if amsgrad else [], [s["step"]()] * len(p),
            lr=h["lr"], beta1=h["betas"][0], beta2=h["betas"][1], weight_decay=h.get("weight_decay", 0.0), eps=h["eps"],
            amsgrad=amsgrad, maximize="maximize" in h,
        )  # fmt: skip
        if amsgrad and p[0].is_cpu:  # behind the last full vector the kernel's maximum loses a NaN (2.13)
            foreach_maximum_(s["max_exp_avg_sq"], s["exp_avg_sq"])

    return run


@divided
def _sgd(p: Any, g: Any, s: dict[str, Any], h: dict[str, Any], before: Any) -> None:
    dampening = h.get("dampening", 0.0)
    fused_sgd_(  # is_first_step=True would overwrite a momentum buffer that was given before the first step
        p, g, s.get("momentum_buffer", []), lr=h["lr"], weight_decay=h.get("weight_decay", 0.0),
        momentum=h.get("momentum", 0.0), dampening=dampening if dampening and before else 0.0,
        nesterov=h.get("nesterov", False), maximize="maximize" in h, is_first_step=False,
    )  # fmt: skip


@divided
def _adagrad(p: Any, g: Any, s: dict[str, Any], h: dict[str, Any], before: Any) -> None:
    fused_adagrad_(
        p, g, s["sum"], [s["step"]()] * len(p), lr=h["lr"], lr_decay=h["lr_decay"],
        weight_decay=h.get("weight_decay", 0.0), eps=h["eps"], maximize="maximize" in h,
    )  # fmt: skip


def _pattern(*factories: Any) -> Any:
    """Transforms in order; one in a list may be left out."""
    return tuple((f[0].declaration, True) if isinstance(f, list) else (f.declaration, False) for f in factories)


def register() -> None:
    """Let the engine use these kernels."""
    for scale, amsgrad in ((scale_by_adam, False), (scale_by_amsgrad, True)):
        adam, adamw = _adam(fused_adam_, amsgrad), _adam(fused_adamw_, amsgrad)
        KERNELS.append(Kernel(_pattern([maximize], [decay], scale, scale_by_learning_rate), adam, "adam"))
        KERNELS.append(Kernel(_pattern([maximize], scale, decay, scale_by_learning_rate), adamw, "adam"))
    KERNELS.append(Kernel(_pattern([maximize], [decay], scale_by_adagrad, scale_by_learning_rate), _adagrad, "adagrad"))
    momentum = _pattern([maximize], [decay], trace, scale_by_learning_rate)
    KERNELS.append(Kernel(momentum, _sgd, "sgd", copies=False, tails=False, later=("dampening",)))
    KERNELS.append(Kernel(_pattern([maximize], [decay], scale_by_learning_rate), _sgd, "sgd", copies=False, tails=False))
