"""docs/optax.md: every public name of optax has a row, and every name of purestep on the page exists.

The snippets of the page run in tests/test_readme.py, with those of all others.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest

import purestep as ps

PAGE = (Path(__file__).parent.parent / "docs/optax.md").read_text()

# of optax 0.2.8, without losses, types of states and type aliases
TOP = """
    GradientTransformation GradientTransformationExtraArgs LookaheadParams MultiSteps adabelief adadelta adafactor
    adagrad adam adamax adamaxw adamw adan adaptive_grad_clip add_decayed_weights add_noise amsgrad apply_every
    apply_if_finite apply_updates bias_correction centralize chain clip clip_by_block_rms clip_by_global_norm
    conditionally_mask conditionally_transform constant_schedule cosine_decay_schedule cosine_onecycle_schedule ema
    exponential_decay flatten freeze fromage global_norm identity incremental_update init_empty_state inject_hyperparams
    inject_stateful_hyperparams join_schedules keep_params_nonnegative lamb lars lbfgs linear_onecycle_schedule
    linear_schedule lion lookahead masked matrix_inverse_pth_root measure_with_ema microbatch monitor multi_normal
    multi_transform nadam nadamw named_chain nnls noisy_sgd normalize_by_update_norm novograd optimistic_adam
    optimistic_adam_v2 optimistic_gradient_descent partition per_example_global_norm_clip per_example_layer_norm_clip
    periodic_update piecewise_constant_schedule piecewise_interpolate_schedule polyak_sgd polynomial_schedule
    power_iteration radam rmsprop rprop safe_increment safe_int32_increment safe_norm safe_root_mean_squares scale
    scale_by_adadelta scale_by_adam scale_by_adamax scale_by_adan scale_by_amsgrad scale_by_backtracking_linesearch
    scale_by_belief scale_by_distance_over_gradients scale_by_factored_rms scale_by_lbfgs scale_by_learning_rate
    scale_by_lion scale_by_novograd scale_by_optimistic_gradient scale_by_param_block_norm scale_by_param_block_rms
    scale_by_polyak scale_by_radam scale_by_rms scale_by_rprop scale_by_rss scale_by_schedule scale_by_sign scale_by_sm3
    scale_by_stddev scale_by_trust_ratio scale_by_yogi scale_by_zoom_linesearch scale_gradient selective_transform
    set_to_zero sgd sgdr_schedule sign_sgd signum skip_large_updates skip_not_finite sm3 snapshot stateless
    stateless_with_tree_map trace tree_map_params update_infinity_moment update_moment update_moment_per_elem_norm
    value_and_grad_from_state warmup_constant_schedule warmup_cosine_decay_schedule warmup_exponential_decay_schedule
    with_extra_args_support yogi zero_nans
"""
CONTRIB = """
    acprop ademamix adopt cocob dadapt_adamw differentially_private_aggregate dog dowg dpsgd galore
    hutchinson_estimator_diag_hessian madgrad mechanize momo momo_adam muon normalize prodigy reduce_on_plateau sam
    scale_by_acprop scale_by_ademamix scale_by_adopt scale_by_cocob scale_by_galore scale_by_madgrad scale_by_muon
    scale_by_simplified_ademamix schedule_free schedule_free_adamw schedule_free_eval_params schedule_free_sgd
    simplified_ademamix sophia split_real_and_imaginary
"""
MODULES = """
    optax.assignment optax.contrib optax.experimental optax.losses optax.microbatching optax.perturbations
    optax.projections optax.schedules optax.second_order optax.transforms optax.tree optax.tree_utils
"""

CODE = re.compile(r"`([^`]+)`")


def rows(text: str) -> list[tuple[list[str], str, str]]:
    """The rows of all tables that compare names: the names of optax, what it is here, and the differences."""
    found = []
    for line in text.splitlines():
        cells = [c.strip() for c in line.strip("|").split(" | ")] if line.startswith("| `") else []
        if cells:
            found.append((CODE.findall(cells[0]), cells[1], " ".join(cells[2:])))
    return found


MAIN, APART = PAGE.split("## optax.contrib")
COMPARED = MAIN[MAIN.index("## Optimizers") :]


@pytest.mark.parametrize(("text", "names"), [(COMPARED, TOP + MODULES), (APART, CONTRIB)], ids=["optax", "contrib"])
def test_every_name_of_optax_has_one_row(text: str, names: str) -> None:
    listed = [name for found, _, _ in rows(text) for name in found]
    schedules_and_parts = {"optax.contrib", "optax.schedules", "optax.transforms"}  # which have tables of their own
    assert sorted(listed) == sorted({*names.split()} - schedules_and_parts)


def test_every_row_has_an_answer() -> None:
    for names, here, different in rows(COMPARED + APART):
        assert here.startswith(("`ps.", "none, because ")), names
        assert here != "none, because", names
        assert all(x.startswith("ps.") or "ps." not in x for x in CODE.findall(here + different)), names


def test_every_name_of_purestep_exists() -> None:
    names = set(re.findall(r"\bps((?:\.\w+)+)", PAGE))
    assert len(names) > 130
    for name in names:
        functools.reduce(getattr, name[1:].split("."), ps)  # raises AttributeError


def test_what_is_spelt_out_can_be_called() -> None:
    spelt = [x for row in rows(COMPARED + APART) for x in CODE.findall(row[1] + row[2]) if x.startswith("ps.") and "(" in x]
    made: list[Any] = [eval(x, {"ps": ps}) for x in spelt if "..." not in x and "=)" not in x]
    assert len(made) >= 8
    assert all(callable(x) or isinstance(x, ps.Transform) for x in made)
