"""Records what a leaf function does as a graph of `torch.fx`.

The gradient, the parameter, the state and the hyperparameters are proxies, which record the operations on them. A leaf function
may also operate on:

* Python's numbers, and numpy's, which become Python's. They are constants of the graph.
* Constant tensors, which the function makes of numbers, such as ``torch.tensor(2.0)``. Operations on constant tensors alone run
  once, while the function is traced.
* Captured tensors, which the function closes over: a global, a variable of the function around it, an attribute. A captured
  tensor is an input of the program like any other, so the operations on it are recorded and run again at every run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.proxy import Attribute, GraphAppendingTracer, TraceError
from torch.overrides import TorchFunctionMode

from purestep._core.torch_api import (
    DisableFuncTorch,
    current_function_mode,
    disable_dispatch_modes,
    function_mode_count,
    tree_leaves,
)

# ------------------------------------------------------------------------------------------------------------------ proxies


class RefusedError(Exception):
    """A leaf function does what no program can do.

    It becomes a TypeError only after the leaf function has ended: an operator of a tensor catches a TypeError and tries the
    reflected operator.
    """


class Traced(fx.Proxy):
    """A value of a program."""

    __array_ufunc__ = None  # numpy's scalars leave arithmetic to the reflected operators of this class, as they do for tensors

    def __getattr__(self, name: str) -> Any:
        return TracedAttribute(self, name)


class TracedAttribute(Attribute):
    """An attribute of a traced value, or one of its methods before the call."""

    __array_ufunc__ = None

    def __getattr__(self, name: str) -> Any:
        return TracedAttribute(self, name)


class Tracer(GraphAppendingTracer):
    """Records the operations of a leaf function, and the tensors that the function closes over."""

    def __init__(self, graph: fx.Graph) -> None:
        super().__init__(graph)
        self.captured: dict[int, Tensor] = {}
        self.made: dict[int, Tensor] = {}  # constant tensors

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return Traced(node, self)

    def create_arg(self, a: Any) -> Any:
        """An argument of an operation, as the graph keeps it."""
        if isinstance(a, Tensor):
            if id(a) in self.made:
                return self.constant(a)
            self.captured[id(a)] = a
            return a
        if type(a).__module__ == "numpy":
            if type(a).__name__ == "ndarray":
                raise RefusedError(
                    f"A numpy array of shape {a.shape} cannot be an argument of an operation on tensors in a leaf function. "
                    "Make it a tensor with torch.from_numpy."
                )
            if hasattr(a, "item"):
                return int(a) if isinstance(a.item(), bool) else a.item()  # as torch takes it
        return super().create_arg(a)

    def constant(self, a: Tensor) -> Any:
        """A constant tensor as an argument; a small one as an operation that makes it at every run, where tracers see it."""
        with apart():
            if a.numel() > SMALL or a.is_sparse or a.is_quantized or a.device.type not in ("cpu", "cuda"):
                return self.keep(a.detach().clone())
            numbers = a.tolist()
        return self.create_node("call_function", torch.tensor, (numbers,), {"dtype": a.dtype, "device": a.device})

    def keep(self, x: Any) -> Any:
        """Remember all tensors in `x` as constant tensors."""
        for y in tree_leaves(x):
            if isinstance(y, Tensor):
                self.made[id(y)] = y
        return x


# ---------------------------------------------------------------------------------------------- operations on other tensors

METADATA = frozenset({
    "__len__", "__hash__", "__repr__", "__str__", "__format__", "__dir__", "dim", "size", "numel", "nelement", "ndimension",
    "stride", "storage_offset", "element_size", "is_complex", "is_floating_point", "is_signed", "is_contiguous", "is_conj",
    "is_neg", "is_inference", "is_same_size", "get_device", "type", "dense_dim", "sparse_dim", "result_type", "can_cast",
    "is_tensor",
})  # fmt: skip
"""The functions of a tensor that do not depend on its elements."""

READS = frozenset(
    {"__bool__", "__float__", "__int__", "__index__", "__complex__", "__array__", "__contains__", "numpy", "tolist"}
)
"""The functions that convert a tensor's elements to something else; of a captured tensor that could only be done once."""

WRITES = frozenset({
    "__set__", "__delete__", "__setitem__", "__iadd__", "__isub__", "__imul__", "__imatmul__", "__idiv__", "__itruediv__",
    "__ifloordiv__", "__imod__", "__ipow__", "__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__",
})  # fmt: skip
"""The functions that write to a tensor, besides those whose names end in an underscore."""

SMALL = 64
"""A constant tensor of at most this many elements is written out in the program."""

RANDOM = frozenset({"rand", "randn", "randint", "randperm", "normal", "bernoulli", "poisson"})
"""The functions that make a different tensor at every call."""


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Disable `torch.func`, tracers and inference mode: a constant tensor outlives them."""
    with DisableFuncTorch(), disable_dispatch_modes(), torch.inference_mode(False):
        yield


class Recorder(TorchFunctionMode):
    """Records the operations on captured tensors while a leaf function is traced."""

    def __init__(self, tracer: Tracer, name: str) -> None:
        super().__init__()
        self.tracer, self.name = tracer, name

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        leaves = tree_leaves((args, kwargs))
        if any([isinstance(x, fx.Proxy) for x in leaves]):
            return func(*args, **kwargs)  # the proxy records it
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        name = str(getattr(func, "__name__", ""))
        if all([id(x) in self.tracer.made for x in tensors]) and (tensors or name not in RANDOM):
            with apart():
                return self.tracer.keep(func(*args, **kwargs))
        self.check(name, kwargs, next((x for x in tensors if id(x) not in self.tracer.made), None))
        if name in METADATA:
            return func(*args, **kwargs)
        if name == "__get__":
            attribute = getattr(func, "__self__", None)
            attribute = getattr(attribute, "__name__", None) or attribute.fget.__name__  # type: ignore[union-attr]
            found = func(*args, **kwargs)
            return self.record("call_function", getattr, (args[0], attribute)) if isinstance(found, Tensor) else found
        if name == "unbind" and not kwargs:
            x, dim = args[0], args[1] if len(args) > 1 else 0
            return tuple([self.record("call_method", "select", (x, dim, i)) for i in range(x.shape[dim])])
        kind = "call_method" if torch.overrides.is_tensor_method_or_property(func) else "call_function"
        return self.record(kind, name if kind == "call_method" else func, args, kwargs)

    def record(self, kind: str, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> fx.Proxy:
        """Add an operation to the graph."""
        return self.tracer.create_proxy(kind, target, args, dict(kwargs or {}))

    def check(self, name: str, kwargs: Mapping[str, Any], x: Tensor | None) -> None:
        """Refuse a function that reads the elements of a captured tensor or writes to a tensor."""
        if name in READS:
            raise TraceError(name)
        if name in WRITES or kwargs.get("out") is not None or (name.endswith("_") and not name.endswith("__")):
            shape = "" if x is None else f" of shape {tuple(x.shape)}"
            raise RefusedError(
                f"A leaf function changes nothing in place, but {self.name} writes to a tensor{shape} that it closes over "
                f"({name}). Keep what changes from step to step in the state."
            )


def recorder() -> Recorder | None:
    """The recorder that is active in this thread; None if there is none."""
    if torch.compiler.is_compiling() or not function_mode_count():
        return None
    mode = current_function_mode()  # type: ignore[no-untyped-call]
    return mode if isinstance(mode, Recorder) else None
