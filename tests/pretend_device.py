"""A device that is none: its memory is the CPU's, and its kernels are the CPU's, but everything else is that of a device.

`install` makes torch's free place for a backend (PrivateUse1) the device ``"pretend"``. Its tensors are true tensors of the type
`torch.Tensor` with a storage and an address, so that the library takes the same ways with them as with those of a GPU; for what
asks ``x.is_cuda`` they say yes. A boxed kernel in Python takes every operation that reaches the backend. It counts a launch, runs
the operation on the CPU in the same memory, and raises `Synchronized` inside of `watched` where a GPU would be waited for.
`Graph` records these operations with their addresses and host numbers, and runs them again, as a CUDA graph does.

What it does not show: streams and races, numbers of kernels that round otherwise, memory that CUDA's allocator takes, kernels of
Inductor and Triton, and whether a real kernel waits without saying so; `WAITS` lists those that are known to.

The place is taken for the whole process, so tests use it in a process of their own.
"""

from __future__ import annotations

import contextlib
import ctypes
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"
CPU, EXTENSION = 1, 12  # kDLCPU and kDLExtDev of DLPack: torch reads the second one as PrivateUse1

VIEWS = {
    "aten::as_strided", "aten::view", "aten::_reshape_alias", "aten::unfold", "aten::view_as_real", "aten::view_as_complex",
    "aten::set_.source_Tensor", "aten::set_.source_Storage_storage_offset", "aten::view.dtype",
}  # fmt: skip
"""Operations that make another view of the same storage, for which torch's own kernels ask for no device."""

MAKES = {"aten::empty.memory_format", "aten::empty_strided"}
"""Operations that take memory and launch nothing."""

WAITS = {
    "aten::_local_scalar_dense": "a value is read",
    "aten::equal": "whether they are equal is a bool",
    "aten::is_nonzero": "a value is read",
    "aten::nonzero": "the size of the result depends on values",
    "aten::masked_select": "the size of the result depends on values",
    "aten::_unique2": "the size of the result depends on values",
    "aten::unique_dim": "the size of the result depends on values",
    "aten::unique_consecutive": "the size of the result depends on values",
    "aten::bincount": "the size of the result depends on values",
    "aten::repeat_interleave.Tensor": "the size of the result depends on values",
    "aten::_coalesce": "the size of the result depends on values",
    "aten::_linalg_eigh": "the kernel reads whether it has converged",
    "aten::_linalg_svd": "the kernel reads whether it has converged",
    "aten::linalg_eig": "the kernel reads whether it has converged",
    "aten::linalg_lstsq": "the kernel reads whether it has converged",
}
"""Operations for which the host waits, without or with an ``.out`` behind their names."""

HOST_NUMBERS = {
    "aten::_foreach_addcmul.Tensor", "aten::_foreach_addcmul_.Tensor", "aten::_foreach_addcdiv.Tensor", "aten::_foreach_addcdiv_.Tensor",
}  # fmt: skip
"""Operations that take a vector of numbers from the CPU."""


class Synchronized(RuntimeError):
    """The host would wait for the device."""


class Managed(ctypes.Structure):
    """The beginning of a DLManagedTensor: where the numbers are, and on which device."""

    _fields_ = [("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32)]


_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def _on(x: Tensor, kind: int) -> Tensor:
    """A tensor on the other device in the same memory."""
    capsule = torch._C._to_dlpack(x)
    managed = Managed.from_address(_pointer(capsule, b"dltensor"))
    managed.device_type, managed.device_id = kind, 0
    return torch._C._from_dlpack(capsule)


def twin(x: Tensor) -> Tensor:
    """A CPU tensor in the memory of a tensor on the device."""
    return _on(x.detach(), CPU)


class Device:
    """What happened on the device."""

    def __init__(self) -> None:
        self.launches: Counter[str] = Counter()
        self.waits: list[str] = []
        self.live = self.peak = 0  # bytes
        self.strict = False
        self.recorded: list[Any] | None = None  # operations, while a graph captures them

    def wait(self, name: str, reason: str) -> None:
        self.waits.append(f"{name}: {reason}")
        if self.strict:
            raise Synchronized(f"{name} waits for the device: {reason}.")

    def run(self, op: Any, *args: Any, **kwargs: Any) -> Any:
        """The kernel of every operation."""
        name = op._schema.name + ("." + op._schema.overload_name if op._schema.overload_name else "")
        if name in VIEWS:
            return op.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        if name in MAKES:
            kwargs.pop("pin_memory", None)
            return self.wrapped(op(*args, **{**kwargs, "device": "cpu"}))
        if name == "aten::resize_":
            made = torch.empty(args[1], dtype=args[0].dtype)
            count = min(made.numel(), args[0].numel())
            made.view(-1)[:count] = twin(args[0]).reshape(-1)[:count]
            return args[0].set_(self.wrapped(made))
        tensors = tensors_in([*args, *kwargs.values()])
        self.account(name, tensors, args, kwargs)
        own = {id(x): x for x in tensors if x.device.type == NAME}
        twins = {k: twin(x) if x.numel() else torch.empty_like(x, device="cpu") for k, x in own.items()}
        cpu_args, cpu_kwargs = on_cpu(args, twins), {k: on_cpu(x, twins) for k, x in kwargs.items()}
        kernel = op
        if name == "aten::_copy_from":
            kernel, cpu_args = torch.ops.aten.copy_.default, (cpu_args[1], cpu_args[0])
        elif any(
            type(x) in (int, float, bool) and isinstance(a.type, torch.TensorType) for x, a in zip(args, op._schema.arguments)
        ):
            kernel = op.overloadpacket  # a number that was a tensor: the variant for numbers takes it
        found = kernel(*cpu_args, **cpu_kwargs)
        if self.recorded is not None:
            self.recorded.append((kernel, cpu_args, cpu_kwargs, found))
        for k, x in own.items():
            if twins[k].shape != x.shape:  # an empty one, which was to be made larger
                x.set_(self.wrapped(twins[k]))
        return self.returned(op, found, args, kwargs)

    def account(self, name: str, tensors: list[Tensor], args: Any, kwargs: Any) -> None:
        """Count what is launched, and see what is waited for."""
        hosts = [x for x in tensors if x.device.type != NAME]
        base = name.split(".")[0]
        if name == "aten::_copy_from":
            if hosts:
                self.wait(name, "the numbers go from one device to the other")
        elif base == "aten::where" and hosts:
            self.wait(name, "a number of the CPU is copied to the device")
        elif reason := WAITS.get(name) or WAITS.get(base) or WAITS.get(name.removesuffix("out").rstrip("_.")):
            self.wait(name, reason)
        elif base in ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"):
            if any(isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in args[1]):
                self.wait(name, "a mask is an index, so the size of the result depends on values")
            if any(isinstance(x, Tensor) and x.device.type != NAME for x in args[1]):
                self.wait(name, "an index of the CPU is copied to the device")
        if base.startswith("aten::_fused_"):
            numbers = [x for x in tensors if not x.dim() and x.device.type == NAME]
            steps = args[-1] if base != "aten::_fused_sgd_" else []
            if any(x.dtype != torch.float32 for x in numbers if x is kwargs.get("lr") or any(x is y for y in steps)):
                raise RuntimeError(f"{name} reads learning rates and counters as float32")
        if any(x.dim() for x in hosts) and name != "aten::_copy_from" and name not in HOST_NUMBERS:
            raise RuntimeError(f"{name}: tensors are expected on one device, but some are on the CPU")
        lists = [x for x in args if isinstance(x, (list, tuple)) and x and isinstance(x[0], Tensor)]
        self.launches[name] += len(lists[0]) if base.startswith("aten::_foreach") and not at_once(lists) else 1

    def returned(self, op: Any, found: Any, args: Any, kwargs: Any) -> Any:
        """Results on the device; an argument that was written to is returned itself."""
        many = len(op._schema.returns) != 1
        results = list(found) if many and found is not None else [found]
        made = []
        for x, returns in zip(results, op._schema.returns):
            alias = returns.alias_info
            if alias is not None:
                made.append(next(
                    args[k] if k < len(args) else kwargs[a.name]
                    for k, a in enumerate(op._schema.arguments)
                    if a.alias_info is not None and a.alias_info.before_set == alias.before_set
                ))  # fmt: skip
                continue
            if isinstance(x, (list, tuple)):
                made.append([*map(self.wrapped, x)])
            else:
                made.append(self.wrapped(x) if isinstance(x, Tensor) else x)
        return (tuple(made) if many else made[0]) if op._schema.returns else None

    def wrapped(self, x: Tensor) -> Tensor:
        """A tensor on the device in memory that is new, and is counted for as long as something is in it."""
        made = _on(x, EXTENSION)
        storage = made.untyped_storage()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.freed, storage.nbytes())
        return made

    def freed(self, count: int) -> None:
        self.live -= count


def at_once(lists: list[list[Tensor]]) -> bool:
    """Whether a foreach kernel of CUDA takes these lists at once: one dtype and device, and each row in one layout."""
    same = {(x.dtype, x.device) for xs in lists for x in xs}
    return len(same) == 1 and all(len({(x.shape, x.stride()) for x in row}) < 2 for row in zip(*lists))


def tensors_in(x: Any) -> list[Tensor]:
    """The tensors in arguments: an argument is one, or a list of some."""
    if isinstance(x, (list, tuple)):
        return [z for y in x for z in tensors_in(y)]
    return [x] if isinstance(x, Tensor) else []


def on_cpu(x: Any, twins: dict[int, Tensor]) -> Any:
    """An argument for the kernel of the CPU."""
    if isinstance(x, (list, tuple)):
        return type(x)([on_cpu(y, twins) for y in x])
    if isinstance(x, Tensor):
        return twins.get(id(x), x)
    return "cpu" if isinstance(x, torch.device) else x


device = Device()
_library: list[torch.library.Library] = []


class Backend:
    """The module ``torch.pretend``."""

    @staticmethod
    def is_available() -> bool:
        return True

    is_initialized = is_available

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        """The generator is the CPU's."""


def install() -> None:
    """Make the device, for the rest of this process."""
    if _library:
        return
    _setup_privateuseone_for_python_backend(NAME, backend_module=Backend())
    everything = torch.library.Library("_", "IMPL")
    everything.fallback(device.run, "PrivateUse1")
    aten = torch.library.Library("aten", "IMPL")
    _library.extend([everything, aten])
    for name in torch._C._dispatch_get_all_op_names():
        space, _, rest = name.partition("::")
        base, _, overload = rest.partition(".")
        if space == "aten" and (base.startswith("_foreach_") or name in VIEWS | MAKES):
            op = getattr(getattr(torch.ops.aten, base), overload or "default")
            aten.impl(rest, lambda *args, _op=op, **kwargs: device.run(_op, *args, **kwargs), "PrivateUse1")
    is_cuda = Tensor.is_cuda
    Tensor.is_cuda = property(lambda x: x.device.type == NAME or is_cuda.__get__(x))  # type: ignore[assignment, misc]


def put(tree: Any) -> Any:
    """The same tree with copies of its tensors on the device."""
    return pytree.tree_map_only(Tensor, lambda x: device.wrapped(x.detach().clone()), tree)


def taken(tree: Any) -> Any:
    """The same tree with copies of its tensors on the CPU, without a wait."""
    return pytree.tree_map_only(Tensor, lambda x: (twin(x) if x.device.type == NAME else x.detach()).clone(), tree)


def fill(tree: Any, values: Any) -> None:
    """Write other values into tensors of the device, as a backward pass does, where they are."""
    for x, y in zip(pytree.tree_leaves(tree), pytree.tree_leaves(values)):
        twin(x).copy_(y)


def addresses(tree: Any) -> list[int]:
    """Where the tensors of a tree are."""
    return [x.data_ptr() for x in pytree.tree_leaves(tree) if isinstance(x, Tensor)]


@contextlib.contextmanager
def watched(strict: bool = True) -> Iterator[Counter[str]]:
    """In this block what waits for the device raises, if this is `strict`. Gives what is launched meanwhile."""
    before, device.launches, device.strict, device.waits = device.launches, Counter(), strict, []
    device.peak = device.live
    try:
        yield device.launches
    finally:
        device.launches, device.strict = before, False


class Graph:
    """What `torch.cuda.CUDAGraph` is: the operations of a block, which run again with the same numbers in the same memory."""

    def __init__(self) -> None:
        self.operations: list[Any] = []

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        """Record this block. It is run, too, which a CUDA graph would not do."""
        flags = {"is_available": lambda: True, "is_current_stream_capturing": lambda: True}
        with watched(), mock.patch.multiple(torch.cuda, **flags):
            device.recorded = self.operations
            try:
                yield
            finally:
                device.recorded = None

    def replay(self) -> None:
        """Run again what was recorded, and nothing of what Python did."""
        for kernel, args, kwargs, before in self.operations:
            now = kernel(*args, **kwargs)
            for x, y in zip(pytree.tree_leaves(before), pytree.tree_leaves(now)):
                if isinstance(x, Tensor) and x.data_ptr() != y.data_ptr():
                    x.copy_(y)
