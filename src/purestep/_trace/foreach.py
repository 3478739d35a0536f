"""The operations of a program on lists: torch's foreach operations, and the variants that torch does not have.

Every operation takes lists of tensors, one entry per parameter, and numbers. A number is a Python float, or a 0-d tensor if it
is on a device, is traced or was given as a tensor; torch's foreach operations take tensors in only some of the places where
they take floats. A number may also be a column of numbers, one for each row of every tensor. An operation whose name ends in an
underscore overwrites its first argument, as in torch.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from purestep._core.dealt import dealt, measured
from purestep._core.lists import in_stacks
from purestep._core.torch_api import (
    FOREACH,
    foreach_add,
    foreach_add_,
    foreach_addcdiv,
    foreach_addcdiv_,
    foreach_addcmul,
    foreach_addcmul_,
    foreach_copy_,
    foreach_div,
    foreach_div_,
    foreach_lerp,
    foreach_lerp_,
    foreach_maximum,
    foreach_maximum_,
    foreach_minimum,
    foreach_minimum_,
    foreach_mul,
    foreach_mul_,
    foreach_neg,
    foreach_neg_,
    foreach_pow,
    foreach_pow_,
    foreach_reciprocal,
    foreach_reciprocal_,
    foreach_sub,
    foreach_sub_,
)

Lists: TypeAlias = list[Tensor] | tuple[Tensor, ...]

UNARY = (
    "neg", "abs", "sqrt", "rsqrt", "exp", "expm1", "log", "log1p", "log2", "sign", "reciprocal", "tanh", "sigmoid", "floor",
    "ceil", "round", "erf", "sin", "cos",
)  # fmt: skip
"""The operations on one list that torch has under the same names."""


def each(x: Lists, k: Tensor) -> list[Tensor]:
    """A number as a list with one entry per tensor. A column is cast, so that it does not promote the tensors."""
    return [k.to(x[0].dtype) if k.dim() else k] * len(x)


def add(x: Lists, y: Any) -> Lists:
    return foreach_add(x, each(x, y) if isinstance(y, Tensor) else y)


def add_(x: Lists, y: Any) -> None:
    if isinstance(y, Tensor):  # as a list, because torch reads the value of a single tensor, which no tracer permits
        y = each(x, y)
    foreach_add_(x, y)


def mul(x: Lists, y: Any) -> Lists:
    return foreach_mul(x, each(x, y) if isinstance(y, Tensor) and y.dim() else y)


def mul_(x: Lists, y: Any) -> None:
    foreach_mul_(x, each(x, y) if isinstance(y, Tensor) and y.dim() else y)


def div(x: Lists, y: Any) -> Lists:
    return foreach_div(x, each(x, y) if isinstance(y, Tensor) and y.dim() else y)


def div_(x: Lists, y: Any) -> None:
    foreach_div_(x, each(x, y) if isinstance(y, Tensor) and y.dim() else y)


def sub(x: Lists, y: Any) -> Lists:
    return add(x, -y) if isinstance(y, Tensor) else foreach_sub(x, y)


def sub_(x: Lists, y: Any) -> None:
    add_(x, -y) if isinstance(y, Tensor) else foreach_sub_(x, y)


def rsub(x: Lists, k: Any) -> Lists:
    y = foreach_neg(x)
    add_(y, k)
    return y


def rsub_(x: Lists, k: Any) -> None:
    foreach_neg_(x)
    add_(x, k)


def rdiv(x: Lists, k: Any) -> Lists:
    y = foreach_reciprocal(x)
    mul_(y, k)
    return y


def rdiv_(x: Lists, k: Any) -> None:
    """x becomes k / x, in x's memory."""
    if isinstance(k, (list, tuple)) and x[0].is_cpu and not torch.compiler.is_compiling():
        for a, b in zip(x, k):
            torch.div(b, a, out=a)
    else:
        foreach_reciprocal_(x)
        mul_(x, k)


def square(x: Lists) -> Lists:
    return foreach_mul(x, x)


def square_(x: Lists) -> None:
    foreach_mul_(x, x)


def pow(x: Lists, k: Any) -> Lists:
    return [t**i for t, i in zip(x, each(x, k))] if isinstance(k, Tensor) else foreach_pow(x, k)


def pow_(x: Lists, k: Any) -> None:
    foreach_copy_(x, pow(x, k)) if isinstance(k, Tensor) else foreach_pow_(x, k)


def maximum(x: Lists, y: Any) -> Lists:
    return [torch.clamp_min(t, k) for t, k in zip(x, each(x, y))] if isinstance(y, Tensor) else foreach_maximum(x, y)


def maximum_(x: Lists, y: Any) -> None:
    foreach_copy_(x, maximum(x, y)) if isinstance(y, Tensor) else foreach_maximum_(x, y)


def minimum(x: Lists, y: Any) -> Lists:
    return [torch.clamp_max(t, k) for t, k in zip(x, each(x, y))] if isinstance(y, Tensor) else foreach_minimum(x, y)


def minimum_(x: Lists, y: Any) -> None:
    foreach_copy_(x, minimum(x, y)) if isinstance(y, Tensor) else foreach_minimum_(x, y)


def lerp(x: Lists, y: Lists, k: Any) -> Lists:
    return axpy(x, foreach_sub(y, x), k) if isinstance(k, Tensor) else foreach_lerp(x, y, k)


def lerp_(x: Lists, y: Lists, k: Any) -> None:
    if isinstance(k, Tensor):
        axpy_(x, foreach_sub(y, x), k)
    else:
        foreach_lerp_(x, y, k)


def axpy(x: Lists, y: Any, k: Any) -> Lists:
    """x + k*y."""
    if isinstance(k, Tensor):
        return foreach_addcmul(x, y, each(x, k)) if k.dim() else foreach_add(x, mul(y, k))
    return foreach_add(x, y, alpha=k)


def axpy_(x: Lists, y: Any, k: Any) -> None:
    if isinstance(k, Tensor):
        foreach_addcmul_(x, y, each(x, k)) if k.dim() else foreach_add_(x, mul(y, k))
    else:
        foreach_add_(x, y, alpha=k)


def axpby(x: Lists, y: Lists, a: Any, b: Any) -> Lists:
    """a*x + b*y."""
    if not isinstance(a, Tensor) and not isinstance(b, Tensor) and b == 1:
        return foreach_add(y, x, alpha=a)
    z = mul(x, a)
    axpy_(z, y, b)
    return z


def axpby_(x: Lists, y: Lists, a: Any, b: Any) -> None:
    mul_(x, a)
    axpy_(x, y, b)


def addcmul(x: Lists, y: Lists, z: Lists, k: Any) -> Lists:
    """x + k*(y*z)."""
    return axpy(x, foreach_mul(y, z), k) if isinstance(k, Tensor) else foreach_addcmul(x, y, z, k)


def addcmul_(x: Lists, y: Lists, z: Lists, k: Any) -> None:
    axpy_(x, foreach_mul(y, z), k) if isinstance(k, Tensor) else foreach_addcmul_(x, y, z, k)


def addcdiv(x: Lists, y: Lists, z: Lists, k: Any) -> Lists:
    """x + k*(y/z)."""
    return axpy(x, foreach_div(y, z), k) if isinstance(k, Tensor) else foreach_addcdiv(x, y, z, k)


def addcdiv_(x: Lists, y: Lists, z: Lists, k: Any) -> None:
    axpy_(x, foreach_div(y, z), k) if isinstance(k, Tensor) else foreach_addcdiv_(x, y, z, k)


def clone(x: Lists) -> Lists:
    return [t.clone() for t in x]


def cast(x: Lists, like: Lists) -> Lists:
    return [one_cast(t, y) for t, y in zip(x, like)]


def one_cast(x: Tensor, like: Tensor) -> Tensor:
    """A tensor in the dtype of another; expanded to its shape if the tensor has fewer dimensions."""
    return x.to(like.dtype) if x.dim() >= like.dim() else x.to(like.dtype).expand(like.shape).clone()


def filled(k: Any, like: Lists) -> Lists:
    """A number, or a tensor that can be broadcast, as a new list of tensors like these."""
    return [(torch.ones_like(y) * k).to(y.dtype) for y in like]


KERNELS: dict[str, Any] = {
    name: FOREACH[name]
    for base in UNARY
    for name in (base, f"{base}_")
} | {
    f.__name__: f
    for f in (
        add, add_, sub, sub_, mul, mul_, div, div_, rsub, rsub_, rdiv, rdiv_, square, square_, pow, pow_,
        maximum, maximum_, minimum, minimum_, lerp, lerp_, axpy, axpy_, axpby, axpby_, addcmul, addcmul_,
        addcdiv, addcdiv_, clone, cast, filled,
    )
} | {"copy_": foreach_copy_, "stacked": in_stacks, "dealt": dealt, "measured": measured}  # fmt: skip
"""The operations of programs on lists by their names in programs."""
