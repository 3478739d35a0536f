"""Functional, stateless optimizer transforms for PyTorch. An optimizer is a value."""

import gc as _gc

_collects = _gc.isenabled()
_gc.disable()  # a pass over all of torch's objects, which is due by now, would take as long as all that follows

try:
    from purestep import _moved, convert, meta, optim, schedules
    from purestep._core.hyper import Betas, Extra, ExtraTree, Fraction, Hyper, NonNegative, Positive, UnitInterval, Weights
    from purestep._core.masks import by_module, by_ndim, by_path
    from purestep._core.maths import (
        Scalar,
        counter,
        filled,
        finite,
        global_norm,
        lerp,
        maximum,
        minimum,
        multiply,
        operation,
        root,
        rounded,
        select,
        where,
    )
    from purestep._core.populations import detach, in_dims, out_dims, ravel, stack, take, tensors, unstack
    from purestep._core.primitives import EmptyState, ScheduleState
    from purestep._engine.explain import Explanation
    from purestep._engine.nesting import Inner
    from purestep.algorithms import kernels
    from purestep.algorithms.adabelief import AdaBeliefState, adabelief, scale_by_adabelief
    from purestep.algorithms.adadelta import AdadeltaState, adadelta, scale_by_adadelta
    from purestep.algorithms.adafactor import (
        AdafactorState,
        RelativeStepState,
        adafactor,
        scale_by_adafactor,
        scale_by_relative_step,
    )
    from purestep.algorithms.adagrad import AdagradState, adagrad, scale_by_adagrad
    from purestep.algorithms.adam import AdamState, AmsgradState, adam, adamw, scale_by_adam, scale_by_amsgrad
    from purestep.algorithms.adamax import AdamaxState, adamax, scale_by_adamax
    from purestep.algorithms.adan import AdanState, adan, scale_by_adan
    from purestep.algorithms.ademamix import AdEMAMixState, ademamix, scale_by_ademamix
    from purestep.algorithms.adopt import adopt, scale_by_adopt
    from purestep.algorithms.asgd import AsgdState, asgd, scale_by_asgd
    from purestep.algorithms.dadapt_adamw import DAdaptState, dadapt_adamw, scale_by_dadapt_adam
    from purestep.algorithms.dog import DogState, LDogState, dog, ldog, scale_by_dog, scale_by_ldog
    from purestep.algorithms.fromage import fromage, scale_by_fromage
    from purestep.algorithms.galore import GaloreState, galore, scale_by_galore
    from purestep.algorithms.lamb import lamb
    from purestep.algorithms.lars import lars
    from purestep.algorithms.lbfgs import LBFGSState, lbfgs
    from purestep.algorithms.linesearch import BacktrackingLinesearchState, scale_by_backtracking_linesearch
    from purestep.algorithms.lion import LionState, lion, scale_by_lion
    from purestep.algorithms.madgrad import MadgradState, madgrad, scale_by_madgrad
    from purestep.algorithms.muon import MuonState, muon, scale_by_muon
    from purestep.algorithms.nadam import NAdamState, nadam, scale_by_nadam
    from purestep.algorithms.novograd import NovoGradState, novograd, scale_by_novograd
    from purestep.algorithms.optimistic import (
        OptimisticState,
        optimistic_adam,
        optimistic_gradient_descent,
        scale_by_optimistic_gradient,
    )
    from purestep.algorithms.polyak_sgd import polyak_sgd, scale_by_polyak
    from purestep.algorithms.prodigy import ProdigyState, prodigy, scale_by_prodigy
    from purestep.algorithms.radam import radam, scale_by_radam
    from purestep.algorithms.rmsprop import RmsState, StddevState, rmsprop, scale_by_rms, scale_by_stddev
    from purestep.algorithms.rprop import RpropState, rprop, scale_by_rprop
    from purestep.algorithms.sam import sam
    from purestep.algorithms.schedule_free import ScheduleFreeState, schedule_free, schedule_free_adamw, schedule_free_sgd
    from purestep.algorithms.sgd import sgd
    from purestep.algorithms.shampoo import ShampooState, scale_by_shampoo, shampoo
    from purestep.algorithms.signum import sign_sgd, signum
    from purestep.algorithms.sm3 import SM3State, scale_by_sm3, sm3
    from purestep.algorithms.soap import SoapState, scale_by_soap, soap
    from purestep.algorithms.sophia import SophiaState, hutchinson, scale_by_sophia, sophia
    from purestep.algorithms.sparse_adam import SparseAdamState, scale_by_sparse_adam, sparse_adam
    from purestep.algorithms.yogi import YogiState, scale_by_yogi, yogi
    from purestep.compose import chain, named_chain
    from purestep.declare import leafwise, nested, whole
    from purestep.saving import load_state_dict, state_dict
    from purestep.state import find, find_all, get_hyperparams, map_params, step_count
    from purestep.transform import Transform, apply_updates, eval_params
    from purestep.transforms.average import AverageParamsState, EmaParamsState, average_params, ema_params
    from purestep.transforms.clip import clip, clip_by_global_norm
    from purestep.transforms.decay import add_decayed_weights
    from purestep.transforms.ema import EmaState, ema
    from purestep.transforms.gradients import ZeroNansState, centralize, sign, zero_nans
    from purestep.transforms.mask import freeze, masked, partition, set_to_zero
    from purestep.transforms.matrices import as_matrices
    from purestep.transforms.mechanic import MechanicState, mechanic
    from purestep.transforms.momentum import TraceState, nesterov, trace
    from purestep.transforms.monitor import MonitorState, monitor, plot_monitor
    from purestep.transforms.nest import (
        AccumulateState,
        ConditionallyState,
        LookaheadState,
        SkipState,
        accumulate,
        conditionally,
        lookahead,
        skip_if_nonfinite,
    )
    from purestep.transforms.noise import AddNoiseState, add_noise
    from purestep.transforms.norms import (
        adaptive_grad_clip,
        clip_by_block_rms,
        clip_by_norm,
        normalize,
        normalize_by_block,
        scale_by_param_block_norm,
        scale_by_param_block_rms,
        scale_by_trust_ratio,
    )
    from purestep.transforms.plateau import ReduceOnPlateauState, reduce_on_plateau
    from purestep.transforms.precision import (
        KahanState,
        MasterWeightsState,
        StochasticRoundingState,
        kahan,
        master_weights,
        state_dtype,
        stochastic_rounding,
    )
    from purestep.transforms.project import keep_params_nonnegative, project_box
    from purestep.transforms.quantize import dequantize_state, quantize_state
    from purestep.transforms.scale import maximize, scale, scale_by_learning_rate, scale_by_schedule
finally:
    if _collects:
        _gc.enable()

__all__ = [
    "AccumulateState",
    "AdEMAMixState",
    "AdaBeliefState",
    "AdadeltaState",
    "AdafactorState",
    "AdagradState",
    "AdamState",
    "AdamaxState",
    "AdanState",
    "AddNoiseState",
    "AmsgradState",
    "AsgdState",
    "AverageParamsState",
    "BacktrackingLinesearchState",
    "Betas",
    "ConditionallyState",
    "DAdaptState",
    "DogState",
    "EmaParamsState",
    "EmaState",
    "EmptyState",
    "Explanation",
    "Extra",
    "ExtraTree",
    "Fraction",
    "GaloreState",
    "Hyper",
    "Inner",
    "KahanState",
    "LBFGSState",
    "LDogState",
    "LionState",
    "LookaheadState",
    "MadgradState",
    "MasterWeightsState",
    "MechanicState",
    "MonitorState",
    "MuonState",
    "NAdamState",
    "NonNegative",
    "NovoGradState",
    "OptimisticState",
    "Positive",
    "ProdigyState",
    "ReduceOnPlateauState",
    "RelativeStepState",
    "RmsState",
    "RpropState",
    "SM3State",
    "Scalar",
    "ScheduleFreeState",
    "ScheduleState",
    "ShampooState",
    "SkipState",
    "SoapState",
    "SophiaState",
    "SparseAdamState",
    "StddevState",
    "StochasticRoundingState",
    "TraceState",
    "Transform",
    "UnitInterval",
    "Weights",
    "YogiState",
    "ZeroNansState",
    "accumulate",
    "adabelief",
    "adadelta",
    "adafactor",
    "adagrad",
    "adam",
    "adamax",
    "adamw",
    "adan",
    "adaptive_grad_clip",
    "add_decayed_weights",
    "add_noise",
    "ademamix",
    "adopt",
    "apply_updates",
    "as_matrices",
    "asgd",
    "average_params",
    "by_module",
    "by_ndim",
    "by_path",
    "centralize",
    "chain",
    "clip",
    "clip_by_block_rms",
    "clip_by_global_norm",
    "clip_by_norm",
    "conditionally",
    "convert",
    "counter",
    "dadapt_adamw",
    "dequantize_state",
    "detach",
    "dog",
    "ema",
    "ema_params",
    "eval_params",
    "filled",
    "find",
    "find_all",
    "finite",
    "freeze",
    "fromage",
    "galore",
    "get_hyperparams",
    "global_norm",
    "hutchinson",
    "in_dims",
    "kahan",
    "keep_params_nonnegative",
    "lamb",
    "lars",
    "lbfgs",
    "ldog",
    "leafwise",
    "lerp",
    "lion",
    "load_state_dict",
    "lookahead",
    "madgrad",
    "map_params",
    "masked",
    "master_weights",
    "maximize",
    "maximum",
    "mechanic",
    "meta",
    "minimum",
    "monitor",
    "multiply",
    "muon",
    "nadam",
    "named_chain",
    "nested",
    "nesterov",
    "normalize",
    "normalize_by_block",
    "novograd",
    "operation",
    "optim",
    "optimistic_adam",
    "optimistic_gradient_descent",
    "out_dims",
    "partition",
    "plot_monitor",
    "polyak_sgd",
    "prodigy",
    "project_box",
    "quantize_state",
    "radam",
    "ravel",
    "reduce_on_plateau",
    "rmsprop",
    "root",
    "rounded",
    "rprop",
    "sam",
    "scale",
    "scale_by_adabelief",
    "scale_by_adadelta",
    "scale_by_adafactor",
    "scale_by_adagrad",
    "scale_by_adam",
    "scale_by_adamax",
    "scale_by_adan",
    "scale_by_ademamix",
    "scale_by_adopt",
    "scale_by_amsgrad",
    "scale_by_asgd",
    "scale_by_backtracking_linesearch",
    "scale_by_dadapt_adam",
    "scale_by_dog",
    "scale_by_fromage",
    "scale_by_galore",
    "scale_by_ldog",
    "scale_by_learning_rate",
    "scale_by_lion",
    "scale_by_madgrad",
    "scale_by_muon",
    "scale_by_nadam",
    "scale_by_novograd",
    "scale_by_optimistic_gradient",
    "scale_by_param_block_norm",
    "scale_by_param_block_rms",
    "scale_by_polyak",
    "scale_by_prodigy",
    "scale_by_radam",
    "scale_by_relative_step",
    "scale_by_rms",
    "scale_by_rprop",
    "scale_by_schedule",
    "scale_by_shampoo",
    "scale_by_sm3",
    "scale_by_soap",
    "scale_by_sophia",
    "scale_by_sparse_adam",
    "scale_by_stddev",
    "scale_by_trust_ratio",
    "scale_by_yogi",
    "schedule_free",
    "schedule_free_adamw",
    "schedule_free_sgd",
    "schedules",
    "select",
    "set_to_zero",
    "sgd",
    "shampoo",
    "sign",
    "sign_sgd",
    "signum",
    "skip_if_nonfinite",
    "sm3",
    "soap",
    "sophia",
    "sparse_adam",
    "stack",
    "state_dict",
    "state_dtype",
    "step_count",
    "stochastic_rounding",
    "take",
    "tensors",
    "trace",
    "unstack",
    "where",
    "whole",
    "yogi",
    "zero_nans",
]

_moved.install()
kernels.register()


def __dir__() -> list[str]:
    return sorted([*__all__, *[name for name in globals() if name.startswith("__")]])
