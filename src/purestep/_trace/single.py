"""The operations of a program on one tensor, under the names that `purestep._trace.foreach` has for lists.

No operation overwrites a tensor, so all can be differentiated, batched, and nested. A number is a Python float or a 0-d tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from purestep._core import maths
from purestep._core.plain import TRACED
from purestep._trace.foreach import UNARY, one_cast


def add(x: Tensor, y: Any) -> Tensor:
    return x + y


def sub(x: Tensor, y: Any) -> Tensor:
    return x - y


def mul(x: Tensor, y: Any) -> Tensor:
    return x * y


def div(x: Tensor, y: Any) -> Tensor:
    return x / y


def rsub(x: Tensor, k: Any) -> Tensor:
    """k - x."""
    return k - x


def rdiv(x: Tensor, k: Any) -> Tensor:
    """k / x."""
    return k / x


def square(x: Tensor) -> Tensor:
    return x * x


def pow(x: Tensor, k: Any) -> Tensor:
    return x**k


def axpy(x: Tensor, y: Any, k: Any) -> Tensor:
    """x + k*y."""
    if isinstance(k, Tensor):
        return x + k * y if not isinstance(y, Tensor) or y.dtype != x.dtype else torch.addcmul(x, y, k.to(x.dtype))
    if torch.compiler.is_compiling():  # Inductor (2.13) drops `alpha` where `y` is a product of matrices
        return x + k * y
    return torch.add(x, y, alpha=k) if type(y) in TRACED else x + y * k  # every tensor type has a product with a number


def axpby(x: Tensor, y: Tensor, a: Any, b: Any) -> Tensor:
    """a*x + b*y."""
    if not isinstance(b, Tensor) and b == 1:
        return axpy(y, x, a)
    return axpy(a * x, y, b)


def addcmul(x: Tensor, y: Tensor, z: Tensor, k: Any) -> Tensor:
    """x + k*(y*z)."""
    return x + k * (y * z) if isinstance(k, Tensor) else torch.addcmul(x, y, z, value=k)


def addcdiv(x: Tensor, y: Tensor, z: Tensor, k: Any) -> Tensor:
    """x + k*(y/z), as two operations: the derivative of torch.addcdiv divides by the square of `z`, which may be 0."""
    return axpy(x, y / z, k)


def clone(x: Tensor) -> Tensor:
    return x.clone()


def cast(x: Tensor, like: Tensor) -> Tensor:
    return one_cast(x, like)


def filled(k: Any, like: Tensor) -> Tensor:
    return (torch.ones_like(like) * k).to(like.dtype)


SINGLE: dict[str, Any] = {name: getattr(torch, name) for name in UNARY} | {
    f.__name__: f
    for f in (
        add, sub, mul, div, rsub, rdiv, square, pow, axpy, axpby, addcmul, addcdiv, clone, cast, filled,
        maths.untraced(maths.root), maths.untraced(maths.lerp), maths.untraced(maths.maximum), maths.untraced(maths.minimum),
    )
}  # fmt: skip
"""The operations of programs on one tensor by their names in programs."""
