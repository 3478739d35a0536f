"""`torch.optim.swa_utils`. (At run time this module is that one; see `purestep.optim`.)"""

from torch.optim.swa_utils import *  # noqa: F403
