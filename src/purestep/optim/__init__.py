"""`torch.optim`, by changing one import line: `from purestep import optim`."""

import sys
from contextlib import suppress

from torch.optim import lr_scheduler as lr_scheduler
from torch.optim import swa_utils as swa_utils

from purestep._optimizer.optimizer import Optimizer as Optimizer
from purestep._optimizer.partial import partial as partial
from purestep.algorithms.adadelta import Adadelta as Adadelta
from purestep.algorithms.adafactor import Adafactor as Adafactor
from purestep.algorithms.adagrad import Adagrad as Adagrad
from purestep.algorithms.adam import Adam as Adam
from purestep.algorithms.adam import AdamW as AdamW
from purestep.algorithms.adamax import Adamax as Adamax
from purestep.algorithms.asgd import ASGD as ASGD
from purestep.algorithms.lbfgs import LBFGS as LBFGS
from purestep.algorithms.muon import Muon as Muon
from purestep.algorithms.nadam import NAdam as NAdam
from purestep.algorithms.radam import RAdam as RAdam
from purestep.algorithms.rmsprop import RMSprop as RMSprop
from purestep.algorithms.rprop import Rprop as Rprop
from purestep.algorithms.sgd import SGD as SGD
from purestep.algorithms.sparse_adam import SparseAdam as SparseAdam

with suppress(ImportError):  # torch 2.9 has none
    from torch.optim import swap_in_optimizer_params_and_state as swap_in_optimizer_params_and_state

# torch's own modules, also for `from purestep.optim.lr_scheduler import ...`; the files of these names are for type checkers
sys.modules[f"{__name__}.lr_scheduler"] = lr_scheduler
sys.modules[f"{__name__}.swa_utils"] = swa_utils
