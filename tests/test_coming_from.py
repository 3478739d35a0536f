"""docs/coming-from: every public name of a peer has one row, and every name of purestep on its page exists.

The names of torch are those of the torch that is installed. Those of the other peers are recorded, with their version. The
snippets of the pages run in tests/test_readme.py, with those of all others.
"""

from __future__ import annotations

import functools
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import purestep as ps

FOLDER = Path(__file__).parent.parent / "docs/coming-from"
CODE = re.compile(r"`([^`]+)`")
ANSWERS = ("`ps.", "none, because ", "not here", "torch's own")


class Row(NamedTuple):
    """A row of a table of names."""

    names: list[str]  # of the peer
    here: str
    differences: str


def rows(page: str, peer: str) -> list[Row]:
    """The rows of the tables whose three columns are the peer, purestep, and the differences."""
    found, inside = [], False
    for line in (FOLDER / page).read_text().splitlines():
        cells = [c.strip() for c in line.strip().removeprefix("|").removesuffix("|").split(" | ")]
        if not line.startswith("|"):
            inside = False
        elif cells == [peer, "purestep", "differences"]:
            inside = True
        elif inside and not line.startswith("|---"):
            found.append(Row(CODE.findall(cells[0]), cells[1], " ".join(cells[2:])))
    return found


def of_torch() -> str:
    """The public names of torch.optim, and of what belongs to it elsewhere."""
    optimizer: Any = sys.modules["torch.optim.optimizer"]
    found = [*torch.optim.__all__]
    found += [f"lr_scheduler.{name}" for name in torch.optim.lr_scheduler.__all__]
    found += [f"swa_utils.{name}" for name in torch.optim.swa_utils.__all__]
    found += [f"Optimizer.{name}" for name in dir(torch.optim.Optimizer) if not name.startswith("_")]
    found += [f"optimizer.{name}" for name in optimizer.__all__ if name != "Optimizer"]
    found += [f"nn.utils.{name}" for name in torch.nn.utils.__all__ if name.startswith(("clip_grad", "get_total_norm"))]
    found += ["amp.GradScaler", *[f"amp.GradScaler.{x}" for x in dir(torch.amp.GradScaler) if not x.startswith("_")]]
    return " ".join(found)


# optax 0.2.8: what `optax/__init__.py` and `optax/contrib/__init__.py` import and define
OPTAX = """
    AdaptiveGradClipState AddDecayedWeightsState AddNoiseState ApplyEvery ApplyIfFiniteState ClipByGlobalNormState
    ClipState ConditionallyMaskState ConditionallyTransformState DifferentiallyPrivateAggregateState EmaState EmptyState
    FactoredState GradientTransformation GradientTransformationExtraArgs InjectHyperparamsState
    InjectStatefulHyperparamsState LookaheadParams LookaheadState MaskOrFn MaskedNode MaskedState MonitorState MultiSteps
    MultiStepsState MultiTransformState NonNegativeParamsState OptState Params PartitionState ScalarOrSchedule
    ScaleByAdaDeltaState ScaleByAdamState ScaleByAdanState ScaleByAmsgradState ScaleByBacktrackingLinesearchState
    ScaleByBeliefState ScaleByLBFGSState ScaleByLionState ScaleByNovogradState ScaleByRStdDevState ScaleByRmsState
    ScaleByRpropState ScaleByRssState ScaleBySM3State ScaleByScheduleState ScaleByTrustRatioState
    ScaleByZoomLinesearchState ScaleState Schedule ShouldSkipUpdateFunction SnapshotState TraceState TransformInitFn
    TransformUpdateExtraArgsFn TransformUpdateFn Updates WrappedSchedule ZeroNansState ZoomLinesearchInfo
    adabelief adadelta adafactor adagrad adam adamax adamaxw adamw adan adaptive_grad_clip add_decayed_weights add_noise
    amsgrad apply_every apply_if_finite apply_updates bias_correction centralize chain clip clip_by_block_rms
    clip_by_global_norm conditionally_mask conditionally_transform constant_schedule convex_kl_divergence
    cosine_decay_schedule cosine_distance cosine_onecycle_schedule cosine_similarity ctc_loss ctc_loss_with_forward_probs
    differentially_private_aggregate dpsgd ema exponential_decay flatten freeze fromage generalized_kl_divergence
    global_norm hinge_loss huber_loss identity incremental_update init_empty_state inject_hyperparams
    inject_stateful_hyperparams join_schedules keep_params_nonnegative kl_divergence l2_loss lamb lars lbfgs
    linear_onecycle_schedule linear_schedule lion log_cosh lookahead masked matrix_inverse_pth_root measure_with_ema
    microbatch monitor multi_normal multi_transform nadam nadamw named_chain nnls noisy_sgd normalize_by_update_norm
    novograd ntxent optimistic_adam optimistic_adam_v2 optimistic_gradient_descent partition per_example_global_norm_clip
    per_example_layer_norm_clip periodic_update piecewise_constant_schedule piecewise_interpolate_schedule polyak_sgd
    polynomial_schedule power_iteration radam rmsprop rprop safe_increment safe_int32_increment safe_norm
    safe_root_mean_squares safe_softmax_cross_entropy scale scale_by_adadelta scale_by_adam scale_by_adamax scale_by_adan
    scale_by_amsgrad scale_by_backtracking_linesearch scale_by_belief scale_by_distance_over_gradients
    scale_by_factored_rms scale_by_lbfgs scale_by_learning_rate scale_by_lion scale_by_novograd
    scale_by_optimistic_gradient scale_by_param_block_norm scale_by_param_block_rms scale_by_polyak scale_by_radam
    scale_by_rms scale_by_rprop scale_by_rss scale_by_schedule scale_by_sign scale_by_sm3 scale_by_stddev
    scale_by_trust_ratio scale_by_yogi scale_by_zoom_linesearch scale_gradient selective_transform set_to_zero sgd
    sgdr_schedule sigmoid_binary_cross_entropy sigmoid_focal_loss sign_sgd signum skip_large_updates skip_not_finite sm3
    smooth_labels snapshot softmax_cross_entropy softmax_cross_entropy_with_integer_labels squared_error stateless
    stateless_with_tree_map trace tree_map_params update_infinity_moment update_moment update_moment_per_elem_norm
    value_and_grad_from_state warmup_constant_schedule warmup_cosine_decay_schedule warmup_exponential_decay_schedule
    with_extra_args_support yogi zero_nans
    optax.assignment optax.experimental optax.losses optax.microbatching optax.perturbations optax.projections
    optax.second_order optax.tree optax.tree_utils

    COCOBState DAdaptAdamWState DoGState DoWGState GaLoreDimensionNumbers GaLoreState HutchinsonState MadgradState
    MechanicState MomoAdamState MomoState MuonDimensionNumbers MuonState NormalizeState ProdigyState
    ReduceLROnPlateauState SAMState ScaleByAdemamixState ScaleBySimplifiedAdEMAMixState ScheduleFreeState SophiaState
    SplitRealAndImaginaryState acprop ademamix adopt cocob dadapt_adamw dog dowg galore hutchinson_estimator_diag_hessian
    madgrad mechanize momo momo_adam muon normalize prodigy reduce_on_plateau sam scale_by_acprop scale_by_ademamix
    scale_by_adopt scale_by_cocob scale_by_galore scale_by_madgrad scale_by_muon scale_by_simplified_ademamix
    schedule_free schedule_free_adamw schedule_free_eval_params schedule_free_sgd simplified_ademamix sophia
    split_real_and_imaginary
"""

# TorchOpt 0.7.3: `__all__` of the package, and of its modules by their names; those of three modules go by the module's
TORCHOPT = """
    AdaDelta AdaGrad AdaMax Adadelta Adagrad Adam AdamW Adamax FuncOptimizer MetaAdaDelta MetaAdaGrad MetaAdaMax
    MetaAdadelta MetaAdagrad MetaAdam MetaAdamW MetaAdamax MetaOptimizer MetaRAdam MetaRMSProp MetaRMSprop MetaSGD
    Optimizer RAdam RMSProp RMSprop SGD accelerated_op_available adadelta adagrad adam adamax adamw apply_updates chain
    clip_grad_norm extract_state_dict module_clone module_detach_ nan_to_num radam recover_state_dict register_hook rmsprop
    sgd stop_gradient
    accelerated_op distributed pytree typing
    base.ChainedGradientTransformation base.EmptyState base.GradientTransformation base.UninitializedState base.identity
    combine.chain_flat diff.implicit.ImplicitMetaGradientModule diff.implicit.custom_root
    diff.zero_order.ZeroOrderGradientModule diff.zero_order.zero_order hook.nan_to_num_hook hook.zero_nan_hook linalg.cg
    linalg.ns linalg.ns_inv linear_solve.solve_cg linear_solve.solve_inv linear_solve.solve_normal_cg
    nn.ImplicitMetaGradientModule nn.MetaGradientModule nn.ZeroOrderGradientModule nn.reparameterize nn.reparametrize
    nn.swap_state schedule.exponential_decay schedule.linear_schedule schedule.polynomial_schedule
    transform.add_decayed_weights transform.masked transform.scale transform.scale_by_accelerated_adam
    transform.scale_by_adadelta transform.scale_by_adam transform.scale_by_adamax transform.scale_by_radam
    transform.scale_by_rms transform.scale_by_rss transform.scale_by_schedule transform.scale_by_stddev transform.trace
    utils.ModuleState visual.make_dot visual.resize_graph
"""

# higher 0.2.1: the public names of the package and of its modules
HIGHER = """
    create_diff_optim get_diff_optim innerloop_ctx monkeypatch optim.DifferentiableASGD optim.DifferentiableAdadelta
    optim.DifferentiableAdagrad optim.DifferentiableAdam optim.DifferentiableAdamax optim.DifferentiableOptimizer
    optim.DifferentiableRMSprop optim.DifferentiableRprop optim.DifferentiableSGD optim.apply_trainable_opt_params
    optim.get_trainable_opt_params patch.buffer_sync patch.make_functional register_optim utils.flatten
    utils.get_func_params
"""

# pytorch_optimizer 4.1.0: the subclasses of torch.optim.Optimizer, and what else the package exports
CLASSES = """
    A2Grad ADOPT APOLLO ASGD AccSGD AdEMAMix AdaBelief AdaBound AdaDelta AdaFactor AdaGC AdaGO AdaHessian AdaLOMO AdaMax
    AdaMod AdaMuon AdaNorm AdaPNM AdaShift AdaSmooth AdaTAM Adai Adalite Adam AdamC AdamG AdamMini AdamP AdamS AdamW
    AdamWSN Adan AggMo Aida AliG Alice Amos Ano ApolloDQN AvaGrad BCOS BSAM CAME Conda DASH DAdaptAdaGrad DAdaptAdam
    DAdaptAdan DAdaptLion DAdaptSGD DeMo DiffGrad DistributedMuon DualAdam EXAdam EmoFact EmoLynx EmoNavi FAdam FOCUS
    FTRL Fira FlashAdamW FriendlySAM Fromage GSAM GaLore Grams Gravity GrokFastAdamW Kate Kron LARS LBFGS LOMO LaProp
    Lamb Lion LoRARite LookSAM Lookahead MADGRAD MARS MSVAG Magma Muon MuonClip NAdam Nero NorMuon NovoGrad OrthoGrad
    PAdam PCGrad PID PNM Prodigy QHAdam QHM RACS RAdam RMSprop ROSE Ranger Ranger21 SAM SCION SCIONLight SGD SGDP SGDSaI
    SGDW SM3 SOAP SPAM SPlus SRMM SWATS SaRA SafeFP16Optimizer ScalableShampoo ScheduleFreeAdamW ScheduleFreeRAdam
    ScheduleFreeSGD ScheduleFreeWrapper Shampoo SignSGD SimplifiedAdEMAMix SophiaH SpectralSphere StableAdamW StableSPAM
    TAM TRAC Tiger VSGD WSAM Yogi
"""
OTHERS = """
    BCEFocalLoss BCELoss BiTemperedLogisticLoss BinaryBiTemperedLogisticLoss CPUOffloadOptimizer ConstantLR
    CosineAnnealingLR CosineAnnealingWarmRestarts CosineAnnealingWarmupRestarts CosineScheduler CyclicLR DiceLoss
    DynamicLossScaler FocalCosineLoss FocalLoss FocalTverskyLoss JaccardLoss LDAMLoss LinearScheduler LovaszHingeLoss
    MultiStepLR MultiplicativeLR OneCycleLR PolyScheduler ProportionScheduler REXScheduler RotoGrad SoftF1Loss StepLR
    TverskyLoss agc bi_tempered_logistic_loss centralize_gradient clip_grad_norm copy_stochastic create_optimizer
    deberta_v3_large_lr_scheduler disable_running_stats enable_running_stats get_chebyshev_perm_steps
    get_chebyshev_schedule get_global_gradient_norm get_optimizer_parameters get_supported_loss_functions
    get_supported_lr_schedulers get_supported_optimizers get_wsd_schedule load_ao_optimizer load_bnb_optimizer
    load_lr_scheduler load_optimizer load_q_galore_optimizer normalize_gradient soft_dice_score soft_jaccard_score
    unit_norm
"""

PEERS = {
    "torch-optim.md": ("torch", of_torch()),
    "optax.md": ("optax", OPTAX),
    "torchopt.md": ("TorchOpt", TORCHOPT),
    "higher.md": ("higher", HIGHER),
    "pytorch-optimizer.md": ("pytorch_optimizer", CLASSES + OTHERS),
}
each_page = pytest.mark.parametrize("page", PEERS)


@each_page
def test_every_name_of_a_peer_has_one_row(page: str) -> None:
    peer, names = PEERS[page]
    listed = Counter(name for row in rows(page, peer) for name in row.names)
    expected = {*names.split()}
    assert sorted(expected - {*listed}) == [], "no row"
    assert [name for name, times in listed.items() if times > 1] == []
    if page != "torch-optim.md" or torch.__version__.startswith("2.13."):  # another release may lack some names
        assert sorted({*listed} - expected) == [], "no such name"


@each_page
def test_every_row_has_an_answer(page: str) -> None:
    for row in rows(page, PEERS[page][0]):
        assert row.names, row
        assert row.here.startswith(ANSWERS), row
        assert row.here != "none, because", row
        assert all(x.startswith("ps.") or "ps." not in x for x in CODE.findall(row.here + row.differences)), row


@each_page
def test_every_name_of_purestep_exists(page: str) -> None:
    text = (FOLDER / page).read_text()
    names = {x[1:] for x in re.findall(r"\bps((?:\.[A-Za-z_]\w*)+)", text)}
    names |= {
        f"optim.{x}" for x in re.findall(r"(?<![\w.])optim\.([A-Z]\w+|partial)(?=[`(])", text) if "Differentiable" not in x
    }
    names |= {*re.findall(r"\}`~?purestep\.([\w.]+)`", text)}
    assert len(names) > 15
    for name in names:
        functools.reduce(getattr, name.split("."), ps)  # raises AttributeError


@each_page
def test_what_is_spelt_out_can_be_called(page: str) -> None:
    table = rows(page, PEERS[page][0])
    spelt = [x for row in table for x in CODE.findall(row.here + row.differences) if x.startswith("ps.") and "(" in x]
    made: list[Any] = [eval(x, {"ps": ps}) for x in spelt if "..." not in x and "=)" not in x]
    assert all(callable(x) or isinstance(x, ps.Transform) for x in made)


def test_the_classes_of_pytorch_optimizer_are_counted() -> None:
    """The page says how many are here, and how many are not."""
    listed = {name: row for row in rows("pytorch-optimizer.md", "pytorch_optimizer") for name in row.names}
    found = Counter(listed[name].here.startswith("`ps.") for name in CLASSES.split())
    text = (FOLDER / "pytorch-optimizer.md").read_text()
    assert f"{found.total()} classes of optimizers" in text
    assert f"{{ref}}`{found[True]} are here <po-here>`" in text
    assert f"{{ref}}`{found[False]} are not <po-missing>`" in text
