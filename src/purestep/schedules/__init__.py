"""Schedules: hyperparameters that change with the step.

A schedule is a function of the 0-based number of the update. It takes a Python int or a tensor and answers in kind, without
waiting for a device, so it can be traced, compiled, vmapped over, and differentiated with respect to its own
hyperparameters. Those made here are values: they print as the call that makes them, compare, pickle, and are pytrees of
their hyperparameters. Any function of the step is accepted wherever a schedule is, and any hyperparameter of a schedule
may be a schedule itself.

>>> import purestep as ps
>>> warmup = ps.schedules.warmup_cosine(1.0, warmup_steps=2, total_steps=10)
>>> [round(warmup(step), 3) for step in (0, 1, 2, 6, 10)]
[0.0, 0.5, 1.0, 0.5, 0.0]
>>> ps.sgd(lr=warmup).hyperparams["lr"]
warmup_cosine(1.0, warmup_steps=2, total_steps=10, end=0.0, start=0.0)
"""

from purestep._core.values import Schedule as Schedule
from purestep.schedules.common import schedule as schedule
from purestep.schedules.curves import constant as constant
from purestep.schedules.curves import cosine as cosine
from purestep.schedules.curves import exponential as exponential
from purestep.schedules.curves import inverse_sqrt as inverse_sqrt
from purestep.schedules.curves import linear as linear
from purestep.schedules.curves import polynomial as polynomial
from purestep.schedules.curves import warmup_cosine as warmup_cosine
from purestep.schedules.curves import warmup_stable_decay as warmup_stable_decay
from purestep.schedules.cycles import cosine_with_restarts as cosine_with_restarts
from purestep.schedules.cycles import cyclic as cyclic
from purestep.schedules.cycles import one_cycle as one_cycle
from purestep.schedules.drawing import plot as plot
from purestep.schedules.pieces import join as join
from purestep.schedules.pieces import piecewise_constant as piecewise_constant
from purestep.schedules.pieces import piecewise_interpolate as piecewise_interpolate
from purestep.schedules.pieces import scale as scale
from purestep.schedules.schedulers import from_torch as from_torch
