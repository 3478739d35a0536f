"""`torch.optim`, by changing one import line: `from purestep import optim`."""

from torch.optim import lr_scheduler as lr_scheduler
from torch.optim import swa_utils as swa_utils

from purestep.algorithms.adam import Adam as Adam
from purestep.algorithms.adam import AdamW as AdamW
from purestep.algorithms.sgd import SGD as SGD
from purestep.optimizer import Optimizer as Optimizer
