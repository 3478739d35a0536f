"""What an operation depends on beside its arguments, to be put back when it is called again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states

from purestep._core import maths


class Surroundings:
    """What an operation does depends on beside its arguments: the state of the random number generators, and autocast."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        bottoms = [maths.bottom(x)[0] for x in tensors]
        self.device = next((x.device.type for x in bottoms if x.device.type not in ("cpu", "meta")), "cpu")
        self.random = torch.get_rng_state()
        self.devices, self.states = get_device_states(*bottoms)
        self.casts = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), torch.is_autocast_cache_enabled())
            for kind in {"cpu", self.device}
        ]

    @contextmanager
    def restored(self) -> Iterator[None]:
        """As it was, for as long as it takes."""
        with ExitStack() as stack:
            stack.enter_context(
                torch.random.fork_rng(self.devices, device_type=self.device)
                if self.devices
                else torch.random.fork_rng(devices=[])
            )
            torch.set_rng_state(self.random)
            set_device_states(self.devices, self.states, device_type=self.device)
            for kind, dtype, enabled, cache in self.casts:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=cache))
            yield
