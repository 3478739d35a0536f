"""The executors, in the order in which they are asked whether they take a task."""

from __future__ import annotations

from purestep._executors.by_parts import ByParts
from purestep._executors.compiled import Compiled
from purestep._executors.complex_pairs import ComplexPairs
from purestep._executors.foreach import Foreach, Traced
from purestep._executors.one_by_one import OneByOne
from purestep._executors.one_tensor import Joined, SingleTensor
from purestep._executors.packed import Packed
from purestep._executors.reference import Learned, Promoted, Reference
from purestep._executors.task import register
from purestep._executors.torch_fused import TorchFused
from purestep._executors.vmapped import Vmapped

register(
    ByParts(), OneByOne(), ComplexPairs(), Learned(),
    Reference(), Vmapped(), Joined(), SingleTensor(),  # where a history is recorded, or inside torch.func
    TorchFused(), Packed(), Compiled(), Promoted(), Traced(), Foreach(),
)  # fmt: skip
