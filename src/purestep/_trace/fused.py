"""What the fused lines of a program call: torch's fused kernels for the CPU, as operations on lists.

* `adam_`: a running mean of squares, and a step along a direction divided by the root of that mean. It calls
  `fused_adam_` with all bias corrections equal to 1; the bias corrections of the program are in its numbers.
* `sgd_`: a step along a gradient with decay. It calls `fused_sgd_` without momentum.

The compiler of a kernel chose how the kernel rounds, so its results differ from those of the separate lines in the last digits.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from purestep._core.threads import divided
from purestep._core.torch_api import fused_adam_, fused_sgd_
from purestep._trace import foreach

MANY = torch.tensor(2.0**60)
"""After this many steps no bias is left to correct."""

NEARLY = 1 - 2.0**-53
"""A running mean with this weight changes at most in its last bit in float64, and has no bias after `MANY` steps."""


def adam_(p: Any, g: Any, m: Any, v: Any, *numbers: Any) -> None:
    """v becomes b2*v + (1 - b2)*g*g, m becomes b1*m + (1 - b1)*g, and p becomes p + k*m/(c*sqrt(v) + e).

    The numbers are b1, b2, c, e and k. If b1 is 1, m is any direction, and its memory may be overwritten. If m is None, the
    direction is g.
    """
    b1, b2, c, e, k = numbers
    if any([isinstance(x, Tensor) for x in numbers]) or not (0 <= b1 <= 1 and 0 <= b2 < 1 and 0 < c < math.inf and e >= 0):
        foreach.mul_(v, b2)
        foreach.addcmul_(v, g, g, 1 - b2)
        if m is not None and not (isinstance(b1, float) and b1 == 1):
            foreach.lerp_(m, g, 1 - b1)
        root = foreach.mul(foreach.KERNELS["sqrt"](v), c)
        foreach.add_(root, e)
        foreach.addcdiv_(p, g if m is None else m, root, k)
        return
    m = [torch.zeros_like(x) for x in g] if m is None else m
    _adam(list(p), list(g), list(m), list(v), min(b1, NEARLY), b2, e / c, -k / c)


@divided
def _adam(p: list[Tensor], g: list[Tensor], m: list[Tensor], v: list[Tensor], *numbers: float) -> None:
    beta1, beta2, eps, lr = numbers
    fused_adam_(
        p, g, m, v, [], [MANY] * len(p),
        lr=lr, beta1=beta1, beta2=beta2, weight_decay=0.0, eps=eps, amsgrad=False, maximize=False,
    )  # fmt: skip


def sgd_(p: Any, g: Any, decay: Any, k: Any) -> None:
    """p becomes p + k*(g + decay*p)."""
    if isinstance(decay, Tensor) or isinstance(k, Tensor) or decay == 0:  # the kernel would leave out 0 times infinity
        foreach.axpy_(p, foreach.axpy(g, p, decay), k)
    else:
        _sgd(list(p), list(g), decay, -k)


@divided
def _sgd(p: Any, g: Any, decay: float, lr: float) -> None:
    fused_sgd_(
        p, g, [], lr=lr, weight_decay=decay,
        momentum=0.0, dampening=0.0, nesterov=False, maximize=False, is_first_step=False,
    )  # fmt: skip


FUSED: dict[str, Any] = {"adam_": adam_, "sgd_": sgd_}
"""The operations of fused lines by their names in programs."""
