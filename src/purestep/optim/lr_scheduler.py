"""`torch.optim.lr_scheduler`. (At run time this module is that one; see `purestep.optim`.)"""

from torch.optim.lr_scheduler import *  # noqa: F403
