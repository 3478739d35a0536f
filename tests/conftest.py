"""What every test starts from."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Generator, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.utils

collect_ignore_glob = ["oracles/make_*.py"]  # they import what is installed only where oracles are recorded


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """The same seed, one thread (two workers share two cores), no compiled code left over."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()


OLDER = {
    "test_checkpoints.py::test_a_parameter_that_is_frozen_at_first[Adagrad-default-ours to torch-thawed": "2.9's Adagrad is not lazy",
    "test_checkpoints.py::test_it_goes_through_torchs_distributed_checkpoints[Muon-default-torch to": "2.9 flattens no empty state",
    "test_checkpoints.py::test_it_goes_through_torchs_distributed_checkpoints[SGD-dampening-torch to": "2.9 flattens no empty state",
    "test_lbfgs.py::test_each_update_is_torchs": "in 2.9 torch's line search takes more evaluations than max_eval permits",
    "test_lbfgs.py::test_a_first_trial_that_is_much_too_far": "in 2.9 torch's line search goes on for 25 evaluations",
    "test_lbfgs.py::test_moved_before_the_first_step": "in 2.9 torch's line search goes on for 25 evaluations",
    "test_guide.py::test_other_parameters_and_state_for_a_while": "2.9 has no swap_in_optimizer_params_and_state",
    "test_guide.py::test_counters_of_another_state_are_written_to": "2.9 has no swap_in_optimizer_params_and_state",
    "test_guide.py::test_a_recorded_step_runs_again_and_again": "2.9 has no swap_in_optimizer_params_and_state",
    "test_guide.py::test_layers_that_thaw_are_added[-Adagrad": "2.9's Adagrad has no state for parameters that are added",
    "test_guide.py::test_layers_that_thaw_are_added[named-Adagrad": "2.9's Adagrad has no state for parameters that are added",
    "test_machine.py::test_every_class_does_what_torchs_does": "2.9's Adagrad has no state for parameters that are added",
    "test_modes.py::test_no_recompilation_while_lr_changes[population": "in 2.9 vmap over a transform cannot be compiled again",
    "test_plan.py::test_a_compiled_optimizer_that_has_made_no_step": "2.9 makes a graph of the first step, too",
    "test_protocol.py::test_a_closure_may_change_the_parameters[True]": "in 2.9 torch's line search exceeds max_eval",
    "test_protocol.py::test_a_gradient_scaler_leaves_it_to_a_fused_step[Adagrad]": "2.9's Adagrad does not scale in its step",
    "test_meta.py::test_hypergradients_of_a_population": "in 2.9 a member's own number is no index under vmap",
    "test_repeat.py::test_whatever_changed_the_numbers_are_torchs[new group-Adagrad": "2.9's Adagrad has no state for new parameters",
    "test_schedulers.py::test_resuming[SWALR": "2.9's SWALR saves what weights_only does not load",
    "test_schedulers.py::test_tensor_learning_rates[ReduceLROnPlateau": "2.9's ReduceLROnPlateau replaces a tensor",
    "test_trainers.py::test_state_dict_shows_what_a_compiled_step_did": "2.9 cannot compile the id of a group that follows a schedule",
    "test_trainers.py::test_parameters_and_state_are_swapped_in": "2.9 has no swap_in_optimizer_params_and_state",
}
"""Tests that are skipped before torch 2.13, by the beginning of their names, and why."""

LACKING = {
    "Batching rule not implemented for aten::view.dtype": "2.9 has no rule for another view of a tensor's bits under vmap",
    "forward AD with aten::aminmax": "2.9 has no forward derivative of aminmax",
}
"""Errors that torch before 2.13 raises for what it has not learned yet; a test that ends with one is skipped."""

RECENT = torch.__version__ >= "2.13"


def in_turn(items: list[pytest.Item]) -> None:
    """Mark as `long` what the marks `in_turn` leave out: all but one of the values that the parameters they name have.

    Where a test has other parameters as well, one value is left for each combination of those, the next in turn. Each test
    begins with another one, so that all values have their turn in some test, and the tests of all files try most pairs.
    """
    groups: dict[Any, dict[Any, list[pytest.Item]]] = defaultdict(lambda: defaultdict(list))
    for item in items:
        names = {name for mark in item.iter_markers("in_turn") for name in mark.args}
        if names and item.nodeid not in item.config.args:  # what is named on the command line is run
            test, params = item.nodeid.split("[")[0], item.callspec.params  # type: ignore[attr-defined]
            groups[test][tuple([id(x) for name, x in params.items() if name not in names])].append(item)
    for test, combinations in groups.items():
        for turn, group in enumerate(combinations.values(), zlib.crc32(test.encode())):
            for item in group:
                if item is not group[turn % len(group)]:
                    item.add_marker(pytest.mark.long)


def pytest_report_header(config: pytest.Config) -> str | None:
    """Say what is left out, and what it takes to run it."""
    if "long" in config.option.markexpr:
        return None
    return "left out: what is marked `long` or not in turn; `python -m pytest -m long` runs it, half an hour on two cores"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `gpu` need one, and some tests a recent torch; those marked `long` are run where they are asked for."""
    in_turn(items)
    if "long" not in config.option.markexpr:
        left_out = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("long")]
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        for name, reason in OLDER.items() if not RECENT else ():
            if name in item.nodeid:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """A test that meets what an older torch lacks is skipped."""
    try:
        return (yield)
    except (RuntimeError, NotImplementedError) as error:
        reason = next((reason for text, reason in LACKING.items() if text in str(error)), None)
        if RECENT or reason is None:
            raise
        pytest.skip(reason)
