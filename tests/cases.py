"""The one registry: every transform and algorithm, what it is compared with, and what it lacks.

Adding a case here puts it under every test in this folder. What an algorithm lacks is data on its case, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

import purestep as ps
from tests import cases_blocks, cases_methods, cases_modern, cases_nested
from tests.case import Case, Options


def _adam_options(**more: Any) -> tuple[Options, ...]:
    return (
        {"lr": 0.01, "weight_decay": 0.1, **more},
        {"lr": 0.01, "betas": (0.7, 0.9), "eps": 1e-3, **more},
        {"lr": 0.01, "amsgrad": True, **more},
        {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1, "maximize": True, **more},
        {"lr": 0.0, **more},
        {"lr": 0.01, "betas": (0.0, 0.0), "eps": 0.1, **more},
    )


def _is_matrix(p: Tensor) -> bool:
    return p.ndim == 2


def _muon(params: Any, foreach: bool = False, **options: Any) -> torch.optim.Optimizer:
    """torch's, which has one implementation and no flag that chooses it."""
    return torch.optim.Muon(params, **options)


_muon.__name__ = "Muon"
MATRICES: Options = {
    "problems": ("matrices",),
    "treats": _is_matrix,
    "smooth": False,
    "lacks": {
        "complex": "orthogonality of complex matrices is another thing, and torch refuses them too",
        "float32": "a last bit of float32 can turn a rounding to bfloat16, and trajectories part there",
    },
}


def _decay_matrices(path: str, p: Tensor) -> bool:
    return p.ndim > 1


NO_COMPLEX = {"complex": "torch refuses complex parameters here, and so does purestep"}

CASES = [
    Case(
        "sgd",
        ps.sgd,
        (
            {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1},
            {"lr": 0.1},
            {"lr": 0.001, "weight_decay": 0.1, "maximize": True},
            {"lr": 0.1, "momentum": 0.8, "dampening": 0.3},
            {"lr": 0.1, "momentum": 0.8, "nesterov": True},
            {"lr": 0.001, "momentum": 0.8, "nesterov": True, "weight_decay": 0.01, "maximize": True},
            {"lr": 0.0, "momentum": 0.8},
        ),
        twin=torch.optim.SGD,
    ),
    Case("adam", ps.adam, (*_adam_options(), {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True}), twin=torch.optim.Adam),
    Case("adamw", ps.adamw, _adam_options(), twin=torch.optim.AdamW),
    Case(
        "adamax",
        ps.adamax,
        ({"lr": 0.01, "weight_decay": 0.1}, {"lr": 0.01, "betas": (0.7, 0.9), "eps": 1e-2}, {"lr": 0.01, "weight_decay": 0.1, "maximize": True}),
        twin=torch.optim.Adamax,
    ),
    Case(
        "nadam",
        ps.nadam,
        (
            {"lr": 0.01, "weight_decay": 0.1},
            {"lr": 0.01, "betas": (0.7, 0.9), "eps": 1e-3, "momentum_decay": 6e-3},
            {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True},
            {"lr": 0.01, "momentum_decay": 0.0},
        ),
        twin=torch.optim.NAdam,
    ),
    Case(
        "radam",
        ps.radam,
        (
            {"lr": 0.01, "betas": (0.8, 0.9), "weight_decay": 0.1},
            {"lr": 0.01},
            {"lr": 0.01, "betas": (0.7, 0.95), "eps": 1e-3},
            {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True},
            {"lr": 0.01, "betas": (0.5, 0.6)},
        ),
        twin=torch.optim.RAdam,
    ),
    Case(
        "adagrad",
        ps.adagrad,
        (
            {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.1},
            {"lr": 0.1},
            {"lr": 0.1, "initial_accumulator_value": 0.2, "eps": 1e-3, "maximize": True},
        ),
        twin=torch.optim.Adagrad,
    ),
    Case(
        "adadelta",
        ps.adadelta,
        ({"lr": 0.5, "rho": 0.8, "eps": 1e-2, "weight_decay": 0.1}, {}, {"weight_decay": 0.1, "maximize": True}),
        twin=torch.optim.Adadelta,
    ),
    Case(
        "rmsprop",
        ps.rmsprop,
        (
            {"lr": 0.01, "alpha": 0.9, "momentum": 0.8, "weight_decay": 0.1},
            {"lr": 0.01},
            {"lr": 0.01, "alpha": 0.9, "centered": True, "eps": 1e-2},
            {"lr": 0.01, "alpha": 0.9, "centered": True, "eps": 1e-3, "momentum": 0.5, "maximize": True},
        ),
        twin=torch.optim.RMSprop,
    ),
    Case(
        "rprop",
        ps.rprop,
        ({"lr": 0.01}, {"lr": 0.01, "etas": (0.4, 1.3), "step_sizes": (1e-3, 0.05)}, {"lr": 0.001, "maximize": True}),
        twin=torch.optim.Rprop,
        smooth=False,
    ),
    Case(
        "asgd",
        ps.asgd,
        (
            {"lr": 0.1, "lambd": 0.01, "t0": 5.0, "weight_decay": 0.1},
            {"lr": 0.1},
            {"lr": 0.001, "lambd": 0.1, "alpha": 0.5, "t0": 20.0, "maximize": True},
        ),
        twin=torch.optim.ASGD,
    ),
    Case("sparse_adam", ps.sparse_adam, ({"lr": 0.01}, {"lr": 0.01, "betas": (0.7, 0.9), "eps": 1e-3, "maximize": True}), lacks=NO_COMPLEX),
    Case("scale_by_adamax", ps.scale_by_adamax, ({}, {"betas": (0.5, 0.8), "eps": 0.1}), step=-0.01, covers=("AdamaxState",)),
    Case("scale_by_nadam", ps.scale_by_nadam, ({}, {"betas": (0.5, 0.8), "eps": 0.1}), step=-0.01, covers=("NAdamState",)),
    Case("scale_by_radam", ps.scale_by_radam, ({}, {"betas": (0.5, 0.9), "eps": 0.1}), step=-0.01),
    Case("scale_by_adagrad", ps.scale_by_adagrad, ({"initial_accumulator_value": 0.1}, {"lr_decay": 0.5}), step=-0.1, covers=("AdagradState",)),
    Case("scale_by_adadelta", ps.scale_by_adadelta, ({"eps": 1e-2},), step=-1.0, covers=("AdadeltaState",)),
    Case("scale_by_rms", ps.scale_by_rms, ({"alpha": 0.9}, {"eps": 0.1}), step=-0.01, covers=("RmsState",)),
    Case("scale_by_stddev", ps.scale_by_stddev, ({"alpha": 0.9, "eps": 0.1},), step=-0.01, covers=("StddevState",)),
    Case("scale_by_rprop", ps.scale_by_rprop, ({"lr": 0.01},), step=-1.0, smooth=False, covers=("RpropState",)),
    Case("scale_by_asgd", ps.scale_by_asgd, ({"lr": 0.1, "t0": 1.5},), covers=("AsgdState",)),
    Case("scale_by_sparse_adam", ps.scale_by_sparse_adam, ({},), step=-0.01, lacks=NO_COMPLEX, covers=("SparseAdamState",)),
    Case(
        "adafactor",
        ps.adafactor,
        (
            {"lr": 0.01, "eps": (0.1, 1e-3), "d": 1.2, "weight_decay": 0.1},
            {"lr": 0.01},
            {"lr": 0.5, "beta2_decay": -0.5, "eps": (1.0, 0.1), "d": 2.0},
            {"lr": 0.01, "weight_decay": 0.1, "maximize": True},
            {"lr": 0.0},
        ),
        twin=torch.optim.Adafactor,
        lacks={"complex": "torch refuses complex parameters too"},
        least={"d": 1.0},
    ),
    Case("scale_by_adafactor", ps.scale_by_adafactor, ({"eps": (0.1, 1e-3), "d": 1.2}, {}, {"beta2_decay": -0.5, "d": 2.0}), step=-0.01, lacks={"complex": "torch refuses complex parameters too"}, least={"d": 1.0}, covers=("AdafactorState",)),
    Case("scale_by_relative_step", ps.scale_by_relative_step, ({"lr": 0.1}, {"lr": 0.7, "weight_decay": 0.1}), covers=("RelativeStepState",)),
    Case(
        "muon",
        ps.muon,
        (
            {"lr": 0.1},
            {"lr": 0.1, "nesterov": False, "momentum": 0.8, "weight_decay": 0.0},
            {"lr": 0.05, "adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.5},
            {"lr": 0.1, "ns_steps": 3, "ns_coefficients": (2.0, -1.5, 0.5), "adjust_lr_fn": "original"},
            {"lr": 0.0, "momentum": 0.0},
        ),
        twin=_muon,
        **MATRICES,
    ),
    Case("scale_by_muon", ps.scale_by_muon, ({}, {"momentum": 0.5, "nesterov": False, "eps": 1e-3, "ns_steps": 2}), step=-0.1, covers=("MuonState",), **MATRICES),
    Case("as_matrices", ps.as_matrices, ({"transform": ps.muon(0.1)}, {"transform": ps.chain(ps.clip_by_global_norm(0.5), ps.muon(0.1)), "flatten": True}), **MATRICES),
    Case("trace", ps.trace, ({"momentum": 0.9}, {"momentum": 0.5, "dampening": 0.2}, {"momentum": 0.5, "nesterov": True}), step=-0.1, covers=("TraceState",)),
    Case("nesterov", ps.nesterov, ({"momentum": 0.9}, {"momentum": 0.5}), step=-0.1),
    Case("scale_by_adam", ps.scale_by_adam, ({}, {"betas": (0.5, 0.8), "eps": 0.1}), step=-0.01, covers=("AdamState",)),
    Case("scale_by_amsgrad", ps.scale_by_amsgrad, ({}, {"betas": (0.5, 0.8), "eps": 0.1}), step=-0.01, covers=("AmsgradState",)),
    Case("add_decayed_weights", ps.add_decayed_weights, ({"weight_decay": 0.1}, {"weight_decay": 0.1, "mask": _decay_matrices}), step=-0.1),
    Case("scale", ps.scale, ({"factor": -0.1},)),
    Case("scale_by_learning_rate", ps.scale_by_learning_rate, ({"lr": 0.1},)),
    Case("maximize", ps.maximize, ({},), step=0.1),
    Case("clip", ps.clip, ({"max_value": 0.05},), step=-0.1, smooth=False),
    Case("clip_by_global_norm", ps.clip_by_global_norm, ({"max_norm": 0.1}, {"max_norm": 100.0}), step=-0.1),
    Case(
        "masked",
        lambda transform, mask: ps.masked(transform, mask),
        ({"transform": ps.trace(0.9), "mask": _decay_matrices},),
        step=-0.1,
    ),
    Case(
        "partition",
        lambda matrices, rest: ps.partition({"matrices": matrices, "rest": rest}, ps.by_ndim({2: "matrices"}, default="rest")),
        (
            {"matrices": ps.sgd(0.1, momentum=0.9), "rest": ps.adamw(0.01)},
            {"matrices": ps.chain(ps.clip_by_global_norm(0.1), ps.sgd(0.1)), "rest": ps.sgd(0.05, momentum=0.5)},
        ),
        problems=("mlp",),
        lacks={
            "containers": "a bare tensor has one label, and an unused one is refused; tests/test_partition.py has other trees",
            "complex": "the complex problem has no matrices, and an unused label is refused",
            "alone": "with one parameter a label is unused, which is refused",
        },
        covers=("by_ndim", "by_path", "by_module"),
    ),
    Case(
        "freeze",
        lambda transform, mask: ps.chain(transform, ps.freeze(mask)),
        ({"transform": ps.chain(ps.clip_by_global_norm(0.1), ps.adamw(0.01)), "mask": ps.by_ndim({0: True}, default=False)},),
        lacks={"alone": "the norm that is clipped is that of all parameters"},
    ),
    Case("set_to_zero", ps.set_to_zero, ({},), lacks={"moving": "it moves nothing"}),
    Case(
        "chain",
        lambda **options: ps.chain(ps.clip_by_global_norm(options.pop("max_norm")), ps.adamw(**options)),
        ({"max_norm": 0.1, "lr": 0.01}, {"max_norm": 0.1, "lr": ps.schedules.warmup_cosine(0.1, warmup_steps=3, total_steps=40)}),
    ),
    Case(
        "named_chain",
        lambda **options: ps.named_chain(("clip", ps.clip_by_global_norm(options.pop("max_norm"))), ("adam", ps.adam(**options))),
        ({"max_norm": 0.1, "lr": 0.01},),
        lacks={"alone": "its state is a dict of names, in which that test looks for the name of a parameter"},
    ),
    Case(
        "scheduled",
        lambda **options: ps.sgd(**options),
        (
            {"lr": ps.schedules.cosine(0.1, total_steps=40), "momentum": ps.schedules.linear(0.5, 0.9, total_steps=20)},
            {"lr": ps.schedules.constant(0.1), "weight_decay": lambda t: 0.1 / (t + 1)},
        ),
    ),
]  # fmt: skip

CLASSES = tuple(
    name
    for name, x in sorted(vars(torch.optim).items())
    if isinstance(x, type)
    and issubclass(x, torch.optim.Optimizer)
    and x is not torch.optim.Optimizer
    and hasattr(ps.optim, name)
)
"""The classes of torch.optim that purestep.optim has under the same name."""

CASES += [*cases_blocks.CASES, *cases_modern.CASES, *cases_methods.CASES, *cases_nested.CASES]

Test = TypeVar("Test", bound=Callable[..., None])

ALL = [(case, options) for case in CASES for options in case.options]


def each(capability: str = "", *, smooth: bool = False) -> pytest.MarkDecorator:
    """Parametrize over every case that has this capability; the others are skipped with their reason."""
    marks = []
    for case in CASES:
        if smooth and not case.smooth:
            marks.append(pytest.param(case, marks=pytest.mark.skip(reason=f"{case} has kinks: finite differences cross them")))
        elif capability in case.lacks:
            marks.append(
                pytest.param(case, marks=pytest.mark.skip(reason=f"{case} lacks {capability}: {case.lacks[capability]}"))
            )
        else:
            marks.append(pytest.param(case))
    return pytest.mark.parametrize("case", marks, ids=str)


def each_options(cases: list[Case] | None = None, capability: str = "") -> Callable[[Test], Test]:
    """Parametrize over every case that has this capability under every set of its options, one of them in turn."""
    chosen = CASES if cases is None else cases
    pairs = [
        pytest.param(case, options, id=f"{case}-{i}", marks=skipped(case, capability))
        for case in chosen
        for i, options in enumerate(case.options)
    ]
    return in_turn("options", pytest.mark.parametrize(("case", "options"), pairs))


def each_problem(cases: list[Case], capability: str = "") -> Callable[[Test], Test]:
    """Parametrize over every case that has this capability under every set of its options, on every one of its problems."""
    triples = [
        pytest.param(c, o, p, id=f"{p}-{c}-{i}", marks=skipped(c, capability))
        for c in cases
        for i, o in enumerate(c.options)
        for p in c.problems
    ]
    return in_turn("problem", pytest.mark.parametrize(("case", "options", "problem"), triples))


def in_turn(name: str, parametrized: pytest.MarkDecorator) -> Callable[[Test], Test]:
    """With the mark `in_turn` for one of the parameters."""
    return lambda test: pytest.mark.in_turn(name)(parametrized(test))


def skipped(case: Case, capability: str) -> Any:
    """The mark that skips what a case lacks, with its reason."""
    lacks = case.lacks.get(capability)
    return pytest.mark.skip(reason=f"{case} lacks {capability}: {lacks}") if lacks else ()


def tensor(x: Any) -> Any:
    """A number as a tensor that can be differentiated with respect to."""
    return torch.tensor(x, dtype=torch.float64) if isinstance(x, float) else x
