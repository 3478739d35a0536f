"""The few functions a leaf function needs beyond torch's.

Each works on tensors, on plain numbers (hyperparameters and counters are numbers whenever they can be), and on the
tracer's proxies, which record the call whole. `operation` gives the same to a function of your own.
"""

from __future__ import annotations

import functools
import inspect
import math
import threading
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeAlias, TypeVar, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx import Proxy
from torch.linalg import vector_norm

from purestep._core import sharded
from purestep._core.cache import DERIVED, Shared
from purestep._core.matrices import MatrixForm
from purestep._core.plain import PLAIN, bare, plain
from purestep._core.recorder import recorder
from purestep._core.torch_api import (
    DisableFuncTorch,
    Interpreter,
    TransformType,
    batch_dim_of,
    dispatch_mode_count,
    foreach_mul,
    foreach_norm,
    get_unwrapped,
    innermost_interpreter,
    interpreter_stack,
    is_batched,
    is_wrapped,
    level_of,
)
from purestep._core.tree import described

F = TypeVar("F", bound=Callable[..., Any])

Scalar: TypeAlias = Annotated[Tensor, "scalar"]
"""A state field that holds one number per parameter, in a tensor of shape ().

Its first value must not depend on the parameter: parameters share one tensor for as long as they agree.
"""

Encoded: TypeAlias = Annotated[Tensor, "encoded"]
"""A state field with a dtype of its own, which stays what it is when a state is computed with in a higher precision."""


@overload
def operation(function: F) -> F: ...
@overload
def operation(
    *, like: bool = False, single: bool = False, block: int = 0, stacks: bool = False, shapes: bool = False
) -> Callable[[F], F]: ...
def operation(
    function: Any = None,
    *,
    like: bool = False,
    single: bool = False,
    block: int = 0,
    stacks: bool = False,
    shapes: bool = False,
) -> Any:
    """Make `function` one operation of a leaf function: the tracer records the call and does not look inside.

    Whatever torch can do to one tensor can be written this way: branches on a shape, loops, a matrix decomposition. All
    arguments are positional; the program calls `function` once per parameter.

    Args:
        function: what to call.
        like: promises that the result is a new tensor of the parameter's shape and dtype, whose memory may be reused.
        single: promises that it is a number for each parameter, a new 0-d tensor or a float: what it is combined with keeps
            its shape and dtype.
        block: promises that every so many consecutive numbers are treated by themselves, whatever the shape (1 for a function
            that is elementwise), and that the result is a new tensor. Large tensors are then computed in pieces.
        stacks: promises that it treats a further first dimension of its first argument, the only one that is a tensor, as a
            batch. Tensors of one shape are then computed together, and sharded ones each by one process.
        shapes: promises that it looks at the shapes of its arguments alone, and not at their values.

    Returns:
        a function of the same positional arguments; without `function`, a decorator.

    >>> @operation
    ... def spectral_norm(x: Tensor) -> Tensor:
    ...     return torch.linalg.matrix_norm(x, 2)
    """
    if function is None:
        return functools.partial(operation, like=like, single=single, block=block, stacks=stacks, shapes=shapes)

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        if VIEWS.form is not None and (stacks or shapes) and call.form is None:  # type: ignore[attr-defined]
            return viewed(call, VIEWS.form)(*args)
        for x in args:
            if isinstance(x, Proxy):
                return x.tracer.create_proxy("call_function", call, args, {})
        recording = recorder()
        if recording is not None and any([isinstance(x, Tensor) for x in args]):  # all of them are constants
            return recording.record("call_function", call, args)
        return function(*args)

    call.like, call.single, call.block = like, single, block  # type: ignore[attr-defined]
    call.stacks, call.shapes, call.form, call.views = stacks, shapes, None, Shared(DERIVED)  # type: ignore[attr-defined]
    call.norms = False  # type: ignore[attr-defined]  # whether it looks at the norms of its arguments alone: see `Measured`
    call.fails = may_fail(function)  # type: ignore[attr-defined]
    return call


def is_ours(function: Callable[..., Any]) -> bool:
    """Whether a function is the library's own, and not a user's, which may raise what it likes."""
    return str(getattr(function, "__module__", "")).startswith("purestep.")


def may_fail(function: Callable[..., Any]) -> bool:
    """Whether an operation may raise for some values of its tensors: a user's, or a decomposition, which refuses NaN."""
    if not is_ours(function):
        return True
    return "linalg" in getattr(getattr(inspect.unwrap(function), "__code__", None), "co_names", ())


class Views(threading.local):
    """The form in which operations on matrices see parameters in this thread, while a leaf function runs."""

    form: MatrixForm | None = None


VIEWS = Views()


def viewed(call: Any, form: MatrixForm) -> Any:
    """An operation on matrices that sees each parameter as a stack of them."""
    return call.views.get(form, lambda: view(call, form))


def view(call: Any, form: MatrixForm) -> Any:
    """The same, made anew."""
    function = untraced(call)

    @functools.wraps(function)
    def seen(x: Any, *rest: Any) -> Any:
        before = VIEWS.form
        try:
            VIEWS.form = None  # what the function calls sees the matrices that it is given
            if not call.stacks:  # which looks at shapes alone
                return function(torch.empty(form.shape(x.shape), dtype=x.dtype, device="meta"), *rest)
            return form.together(function(form.apart(x), *rest), x.shape)
        finally:
            VIEWS.form = before

    seen.plain, seen.form = function, form  # type: ignore[attr-defined]  # for those who put several stacks together
    made: Any = operation(like=call.like, single=call.single, stacks=call.stacks, shapes=call.shapes)(seen)
    made.form = form
    return made


def untraced(function: Any) -> Any:
    """The function that an `operation` calls, for where there is no tracer; any other as it is."""
    return function.__wrapped__ if hasattr(function, "single") else function


@operation
def root(x: Any) -> Any:
    r"""The square root, with slope 0 at 0.

    `torch.sqrt` has an infinite slope at 0, which turns into NaN as soon as it meets a zero: a second moment that is
    still exactly 0 would poison every gradient taken through the optimizer. Values are those of `torch.sqrt`.

    Args:
        x: a tensor, or a number of at least 0.

    Returns:
        a tensor of the shape and dtype of `x`; of a number, a float.
    """
    if not isinstance(x, Tensor):
        return math.sqrt(x)
    if not differentiating(x):
        return x.sqrt()
    zero = x == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, x).sqrt())


@operation
def where(condition: Any, x: Any, y: Any) -> Any:
    """`x` where `condition` holds, else `y`; any of the three may be a number.

    Args:
        condition: a tensor of bools, or a bool.
        x: a tensor or a number; the shapes of all three tensors can be broadcast together.
        y: a tensor or a number.

    Returns:
        a tensor; a number if all three are. A number takes the dtype of the tensor beside it; two numbers, chosen between by
        a tensor, become float64 (float32 on a device that has no float64).
    """
    if not isinstance(condition, Tensor):
        chosen, other = (x, y) if condition else (y, x)
        return torch.full_like(other, chosen) if isinstance(other, Tensor) and not isinstance(chosen, Tensor) else chosen
    if not isinstance(x, Tensor) and not isinstance(y, Tensor):
        if x == y and is_batched(condition) and not condition.dim():
            return x  # one number for all members, instead of one for each
        x = torch.full((), x, dtype=precise(condition.device), device=condition.device)  # made there: no copy to wait for
    return torch.where(condition, x, y)


def select(condition: Any, x: Any, y: Any) -> Any:
    """`where` on lists and states: `x` where `condition` holds, else `y`, which has the same structure.

    What is one tensor in several places, as counters are, is one in the result.

    Args:
        condition: a 0-d tensor of a bool, or a bool.
        x: a tensor, or a list, a tuple, a dict or a state of them.
        y: a value of the structure of `x`, with tensors of the same shapes. If `condition` is a tensor, what is no tensor
            in `y` is equal to what `x` has in its place.

    Returns:
        a value of the structure of `x`. Of a bool it is `x` or `y` itself.

    Raises:
        ValueError: the structures differ.

    >>> select(torch.tensor(False), [torch.tensor(1.0), None], [torch.tensor(2.0), None])
    [tensor(2.), None]
    """
    if not isinstance(condition, Tensor):
        return x if condition else y
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        if x.dtype != y.dtype and x.shape == y.shape:  # in a batch `torch.where` may see other numbers of dimensions
            x, y = (z.to(torch.promote_types(x.dtype, y.dtype)) for z in (x, y))
        return x if x is y else torch.where(condition.to(x.device), x, y)
    if isinstance(x, (list, tuple)) and isinstance(y, (list, tuple)) and len(x) == len(y):
        made: list[Any] = []
        for k, (a, b) in enumerate(zip(x, y)):
            same = next((j for j in range(k) if x[j] is a and y[j] is b), None) if isinstance(a, Tensor) and a is x[0] else None
            made.append(select(condition, a, b) if same is None else made[same])
        return type(x)(*made) if hasattr(x, "_fields") else type(x)(made)
    if isinstance(x, dict) and isinstance(y, dict) and x.keys() == y.keys():
        return {k: select(condition, a, y[k]) for k, a in x.items()}
    if isinstance(x, (Tensor, list, tuple, dict)) or isinstance(y, (Tensor, list, tuple, dict)):
        raise ValueError(f"select takes two values of the same structure, but got {described(x)} and {described(y)}.")
    if x != y:
        raise ValueError(f"select cannot choose between {x!r} and {y!r} by a tensor. Make them tensors.")
    return x


def finite(tensors: list[Tensor]) -> Any:
    """Whether all numbers of all tensors are finite: a bool where it can be read, else a 0-d tensor on the first one's device.

    Args:
        tensors: tensors of any shapes, real or complex. Of an empty list all numbers are finite.

    Returns:
        a bool on a CPU, outside autograd, `torch.func` and `torch.compile`; else a 0-d tensor of a bool.

    >>> finite([torch.ones(2), torch.tensor([0.0, math.inf])])
    False
    """
    xs = [torch.view_as_real(x) if x.is_complex() else x for x in tensors if x.numel()]
    if not xs:
        return True
    if not plain(xs):  # counted, because the largest of some numbers and NaN need not be NaN elsewhere
        bad = sharded.sums(xs, lambda x: x.isfinite().logical_not().sum())
        return torch.stack([x.to(bad[0].device) for x in bad]).sum() == 0
    if recorded(xs) or torch.compiler.is_compiling():
        return torch.stack([x.isfinite().all().to(xs[0].device) for x in xs]).all()
    if all(map(readable, xs)):  # the 2-norm is faster, but infinite where a square is
        return bool(norms(xs, 2).isfinite().all()) or bool(norms(xs, math.inf).isfinite().all())
    return norms(xs, math.inf).isfinite().all()


def norms(tensors: list[Tensor], order: float = 2.0) -> Tensor:
    """The norm of each tensor, on the first one's device."""
    device = tensors[0].device
    if not plain(tensors):
        found = map(root, squares(tensors)) if order == 2.0 else [sharded.whole(vector_norm(x, order)) for x in tensors]
        return torch.stack([n.to(device, wide(x)) for n, x in zip(found, tensors)])
    if order != 2.0 or max(map(Tensor.numel, tensors)) <= LONG:
        return torch.stack([x.to(device) for x in foreach_norm(tensors, order)])
    long = [x.is_cpu and x.numel() > LONG and x.dtype in DOT and x.is_contiguous() for x in tensors]
    others = iter(foreach_norm([x for x, yes in zip(tensors, long) if not yes]) if not all(long) else ())
    return torch.stack([length(x) if yes else next(others).to(device) for x, yes in zip(tensors, long)])


LONG = 2**16
"""From so many elements on, the norm of a tensor is had from inner products, which take a third of the time, and are shared out
among the threads. `torch.linalg.vector_norm` adds up all squares in one float: of 38 million it loses 0.2 percent."""

DOT = frozenset({torch.float32, torch.float64})


def length(x: Tensor) -> Tensor:
    """The 2-norm of a long tensor in one piece, by parts whose squares are added up in float64."""
    parts = torch.stack([torch.dot(part, part) for part in torch.split(x.view(-1), 4 * LONG)])
    return parts.sum(dtype=torch.float64).sqrt().to(x.dtype)


@operation
def lerp(x: Any, y: Any, weight: Any) -> Any:
    r"""Linear interpolation :math:`x + w (y - x)`: a running mean takes one step towards `y`.

    Args:
        x: a tensor.
        y: a tensor of the shape of `x`.
        weight: :math:`w`, a number or a 0-d tensor.

    Returns:
        a new tensor of the shape and dtype of `x`.
    """
    if isinstance(weight, Tensor):
        return x + weight * (y - x)  # torch.lerp wants a weight of its tensors' own dtype; a number here is more precise
    return torch.lerp(x, y.to(x.dtype), weight)  # numbers may have promoted a 0-d y, and torch.lerp insists on one dtype


@operation
def minimum(x: Any, y: Any) -> Any:
    """The smaller of two tensors or numbers; NaN where either is.

    Args:
        x: a tensor or a number.
        y: a tensor or a number.

    Returns:
        a tensor, in the shape that `x` and `y` are broadcast to; a number if both are.
    """
    return _pick(x, y, torch.minimum, torch.clamp_max, min)


@operation
def maximum(x: Any, y: Any) -> Any:
    """The larger of two tensors or numbers; NaN where either is.

    Args:
        x: a tensor or a number.
        y: a tensor or a number.

    Returns:
        a tensor, in the shape that `x` and `y` are broadcast to; a number if both are.
    """
    return _pick(x, y, torch.maximum, torch.clamp_min, max)


def _pick(x: Any, y: Any, both: Any, one: Any, plain: Any) -> Any:
    if isinstance(x, Tensor):
        return both(x, y) if isinstance(y, Tensor) else one(x, y)
    return one(y, x) if isinstance(y, Tensor) else plain(x, y)


@operation
def cos(x: Any) -> Any:
    """The cosine of a tensor or a number, in radians."""
    return x.cos() if isinstance(x, Tensor) else math.cos(x)


def counter(p: Tensor | list[Tensor]) -> Scalar:
    """Zero, to count this parameter's updates (or those of all): float32, or float64 where that is torch's default dtype.

    Args:
        p: a parameter, or a list of them, which may be empty.

    Returns:
        a new 0-d tensor, on the device of the first parameter.
    """
    dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    first = p if isinstance(p, Tensor) else p[0] if p else None
    return torch.zeros((), dtype=dtype, device=None if first is None else first.device)


@operation
def rounded(x: Any) -> Any:
    """A number as a counter stores it, which is in float32 (float64 where that is torch's default dtype).

    Args:
        x: a number, or a tensor.

    Returns:
        a float; of a tensor, a tensor of its shape and dtype.
    """
    if torch.get_default_dtype() == torch.float64:
        return x
    return x.to(torch.float32).to(x.dtype) if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float32).item()


def filled(p: Tensor, value: Any) -> Tensor:
    """A tensor like `p` with every number in it equal to `value`: of a complex tensor, both parts.

    Args:
        p: a tensor of any shape and dtype.
        value: a number, or a 0-d tensor.

    Returns:
        a new tensor of the shape, dtype and device of `p`.
    """
    x = torch.zeros_like(p)
    return torch.view_as_complex(torch.view_as_real(x) + value) if p.is_complex() else (x + value).to(p.dtype)


def precise(device: torch.device) -> torch.dtype:
    """The dtype numbers are computed in: float64, where the device has it.

    :math:`1 - \\beta_2^t` loses five digits in float32. A 0-dimensional float64 tensor never promotes a float32 tensor.
    """
    return torch.float32 if device.type == "mps" else torch.float64


def number(params: list[Tensor]) -> Tensor:
    """Zero, in the precision that numbers are computed in."""
    device = params[0].device if params else torch.device("cpu")
    return torch.zeros((), dtype=precise(device), device=device)


def origin(step: Tensor, ps: list[Tensor], x0: list[Tensor]) -> list[Tensor]:
    """The parameters before the first update, which are these if this is the first: they may have changed since `init`."""
    return [torch.where(step.to(p.device) == 0, p, x) for p, x in zip(ps, x0)]


def transforming() -> bool:
    """Whether a `torch.func` transform, or forward-mode differentiation, is running."""
    level = innermost_interpreter()
    return isinstance(level, Interpreter) or forward_ad._current_level >= 0


def eager() -> bool:
    """Whether operations run as they are called, because no `torch.func` transform, no compiler and no dispatch mode is there.

    A function of its own: called from a frame that `torch.compile` has given up on, it is compiled by itself, and says no.
    """
    if torch.compiler.is_compiling() or dispatch_mode_count() > 0:
        return False
    return not isinstance(innermost_interpreter(), Interpreter) and forward_ad._current_level < 0


def differentiating(x: Tensor) -> bool:
    """Whether a derivative may be taken of what is done to `x`: under `torch.func.vmap` alone, none is."""
    if torch.compiler.is_compiling() or dispatch_mode_count() > 0:  # what is traced may be differentiated later
        return transforming() or torch.is_grad_enabled()
    if forward_ad._current_level >= 0:
        return True
    if transforming():
        if any([level.key() != TransformType.Vmap for level in interpreter_stack() or ()]):
            return True
        x = bottom(x)[0]
    return torch.is_grad_enabled() and x.requires_grad


def readable(x: Tensor) -> bool:
    """Whether the values of `x` can be had as Python's numbers: nothing records what is done to it, or has to be waited for."""
    return x.is_cpu and not (
        transforming()
        or (torch.is_grad_enabled() and x.requires_grad)
        or torch.compiler.is_compiling()
        or dispatch_mode_count() > 0
    )


def followed(x: Tensor, batches: bool = True) -> bool:
    """Whether autograd or a `torch.func` transform knows a tensor: it may have derivatives, or, with `batches`, be a batch."""
    forward = forward_ad._current_level >= 0
    while is_wrapped(x):
        if x.requires_grad or forward or (batches and is_batched(x)):  # below another level tangents are not to be seen
            return True
        x = get_unwrapped(x)
    if not forward:
        return x.requires_grad
    with DisableFuncTorch():
        return x.requires_grad or forward_ad.unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]


def recording(x: Any) -> bool:
    """Whether autograd, or the innermost level of `torch.func`, records what is done to `x`: so that `torch.autograd.grad` with
    respect to it needs no further level."""
    if not isinstance(x, Tensor) or not x.requires_grad:
        return False
    level = innermost_interpreter()
    if not isinstance(level, Interpreter):
        return not forward_ad._current_level >= 0
    return bool(level.key() == TransformType.Grad and level_of(x) == level.level())


def bottom(x: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
    """What is below all levels of `torch.func`, and how it is wrapped: tensors that agree in both are the same."""
    levels = []
    while is_wrapped(x):
        levels.append((level_of(x), batch_dim_of(x)))
        x = get_unwrapped(x)
    return x, tuple(levels)


def places(xs: Sequence[Tensor]) -> list[Any]:
    """For each tensor what tells where it is, and how it is wrapped: two that agree in it hold the same, and have one past.

    A tensor that may have a derivative at any level is told by its identity: another one in its memory has another past.
    """
    found: list[Any] = []
    forward = forward_ad._current_level >= 0
    for x in xs:
        wraps: list[Any] = []
        follows = forward or x.requires_grad
        while is_wrapped(x):
            wraps += (level_of(x), batch_dim_of(x))
            x = get_unwrapped(x)
            follows = follows or x.requires_grad
        known = not follows and type(x) in PLAIN and (x.is_cpu or x.is_cuda) and x.layout is torch.strided
        found.append((wraps, x.data_ptr(), x.dtype, x.shape, x.stride()) if known else (wraps, id(x)))
    return found


def memory(x: Any) -> int:
    """What is the same for tensors in the same memory; of what is not plain, or traced by `torch.compile`, the object."""
    if not isinstance(x, Tensor):
        return id(x)
    x = bottom(x)[0]
    known = not torch.compiler.is_compiling() and plain([x]) and x.layout is torch.strided
    return x.untyped_storage()._cdata if known else id(x)


def some(flag: Any) -> bool:
    """Whether a flag holds for any member of the batch, or that may be: what a loop over many steps asks before the next.

    This waits for the device, and reads through `torch.func.vmap`. Where operations are only recorded it is always True.
    """
    if not isinstance(flag, Tensor):
        return bool(flag)
    if torch.compiler.is_compiling() or dispatch_mode_count() > 0:
        return True
    while is_wrapped(flag):
        flag = get_unwrapped(flag)
    with DisableFuncTorch():
        return bool(flag.any())


def recorded(tensors: Sequence[Tensor]) -> bool:
    """Whether autograd or a `torch.func` transform follows these tensors, so that foreach operations are out of place."""
    return transforming() or (torch.is_grad_enabled() and any([x.requires_grad for x in tensors]))


def global_norm(tensors: list[Tensor]) -> Tensor:
    r"""The 2-norm of all tensors as one vector, :math:`\sqrt{\sum_i \|x_i\|_2^2}`; a 0-d tensor on the first one's device.

    Args:
        tensors: a list of tensors of any shapes, real or complex.

    Returns:
        a 0-d real tensor; 0 for an empty list.
    """
    if not tensors:
        return torch.zeros(())
    device = tensors[0].device
    if not plain(tensors):
        kind = functools.reduce(torch.promote_types, map(wide, tensors))
        return root(torch.stack([x.to(device) for x in squares(tensors)]).sum()).to(kind)
    if recorded(tensors):
        return root(torch.stack([(x.abs() ** 2).sum().to(device) for x in tensors]).sum())
    return torch.linalg.vector_norm(norms(tensors))


def multiply(tensors: list[Tensor], k: Tensor) -> list[Tensor]:
    """Every tensor times one 0-d tensor.

    Args:
        tensors: a list of at least one tensor, of any shapes and dtypes.
        k: a 0-d tensor.

    Returns:
        a list of new tensors, in the shapes and dtypes of `tensors`.
    """
    if not plain(tensors):
        return [(x * sharded.everywhere(k.to(x.device), x)).to(x.dtype) for x in tensors]
    if recorded([*tensors, k]) or not all([x.device == k.device for x in tensors]):
        return [(x * k.to(x.device)).to(x.dtype) for x in tensors]
    return [y.to(x.dtype) for x, y in zip(tensors, foreach_mul(tensors, k))]  # a 0-d tensor is promoted by `k`


def inner(xs: list[Tensor], ys: list[Tensor]) -> Tensor:
    r"""The inner product of two lists, each as one vector; a 0-d tensor in the precision that numbers are computed in.

    Of complex tensors it is the real part, which is the inner product of the pairs of reals they are.
    """
    device = xs[0].device
    products = [(x * y.conj()).real if x.is_complex() else x.to(wide(x)) * y for x, y in zip(xs, ys)]
    return torch.stack([x.to(device) for x in summed(products, precise(device))]).sum()


def summed(tensors: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """The sum of all elements of each tensor: plain 0-d tensors, also of those that are spread over processes."""
    if plain(tensors):
        return [x.sum(dtype=dtype) for x in tensors]
    if recorded(tensors):
        return [bare(sharded.whole(x.sum(dtype=dtype))) for x in tensors]
    return sharded.sums(tensors, lambda x: x.sum(dtype=dtype))


def squares(tensors: list[Tensor]) -> list[Tensor]:
    """The squared 2-norm of each tensor, in the precision that numbers are computed in."""
    if recorded(tensors):
        return summed([x.abs() ** 2 for x in tensors], precise(tensors[0].device))
    return sharded.sums(tensors, square)


def square(x: Tensor) -> Tensor:
    """The squared 2-norm of a plain tensor, in the precision that numbers are computed in."""
    return vector_norm(x, dtype=wider(x)).to(precise(x.device)) ** 2


REAL = {torch.complex32: torch.float16, torch.complex64: torch.float32, torch.complex128: torch.float64}
"""The dtypes of the parts of complex numbers; `torch.dtype.to_real` says the same, but torch.compile cannot trace it."""


def wide(x: Tensor) -> torch.dtype:
    """The real dtype of a norm or a sum: in float16 the square of 256 is infinite."""
    return torch.promote_types(REAL.get(x.dtype, x.dtype), torch.float32)


def wider(x: Tensor) -> torch.dtype:
    """The dtype of a norm of this tensor's numbers, in float32 at least: complex where they are."""
    return torch.promote_types(x.dtype, torch.float32)
