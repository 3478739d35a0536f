"""States from other libraries, and for torch.optim.

A training run that began elsewhere goes on here with the moments and counters that it has: a conversion takes a transform, the
parameters and what the other library keeps, and returns the transform's state. It checks shapes as loading a checkpoint does.
"""

from purestep.convert.optimizers import from_bitsandbytes as from_bitsandbytes
from purestep.convert.optimizers import from_pytorch_optimizer as from_pytorch_optimizer
from purestep.convert.optimizers import from_torch as from_torch
from purestep.convert.optimizers import to_torch as to_torch
from purestep.convert.trees import from_optax as from_optax
from purestep.convert.trees import from_torchopt as from_torchopt
