"""`torch.optim.optimizer`, with purestep's `Optimizer`."""

from torch.optim.optimizer import ParamsT as ParamsT
from torch.optim.optimizer import register_optimizer_step_post_hook as register_optimizer_step_post_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook as register_optimizer_step_pre_hook
from torch.optim.optimizer import required as required

from purestep._optimizer.optimizer import Optimizer as Optimizer
