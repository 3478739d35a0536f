"""Checkpoints of sharded optimizers: saved by four processes, loaded by two and by one, and back by four.

Each number of processes runs everything once (`stages`), trains on, and returns how far it is from one process that has never
been interrupted. Gradients are given, so that they are the same on any number of processes.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils import _pytree as pytree

import purestep as ps
from purestep import optim
from tests import processes
from tests.problems import difference
from tests.test_distributed import gathered

STEPS = 3
"""What each number of processes trains for."""


def split(first: str = "matrices", rest: str = "rest", **rules: Any) -> ps.Transform:
    """Muon and AdamW."""
    rule = ps.by_path(rules["paths"], default=rest) if rules else ps.by_ndim({2: first}, default=rest)
    return ps.partition({first: ps.muon(0.1), rest: ps.adamw(0.05)}, rule)


def chain() -> ps.Transform:
    lr = ps.schedules.linear(0.1, 0.0, total_steps=20)
    return ps.chain(ps.clip_by_global_norm(0.5), ps.accumulate(ps.adamw(lr), 2), ps.ema_params(0.9))


def of(transform: ps.Transform) -> Callable[[nn.Module], Any]:
    return lambda model: optim.Optimizer(model.named_parameters(), transform)


SUBJECTS: dict[str, Callable[[nn.Module], Any]] = {
    "class": lambda model: optim.AdamW(model.parameters(), lr=0.05, amsgrad=True),
    "partition": of(ps.chain(ps.clip_by_global_norm(0.5), split())),
    "chain": of(chain()),
    "quantized": of(ps.quantize_state(ps.adamw(0.05), min_size=0)),
    "master weights": of(ps.master_weights(ps.adamw(0.05))),
    "kahan": of(ps.kahan(ps.chain(ps.skip_if_nonfinite(ps.adamw(0.05))))),
}
HALF = ("master weights", "kahan")
"""Those that train bfloat16."""

EXACT, NEAR = 1e-12, 1e-6


def most(name: str) -> float:
    """How far a run may be off: copies in float32 are rounded in the order in which an executor computes."""
    return NEAR if name.startswith("master weights") else EXACT


SWAPPED = ("class", "partition", "chain")
"""Those whose parameters are also exchanged for sharded ones before the first step, as accelerate does."""


def dtype_of(name: str) -> torch.dtype:
    return torch.bfloat16 if name in HALF else torch.float64


def network(dtype: torch.dtype) -> nn.Sequential:
    """On four processes no parameter is cut evenly, and one process has nothing of the last layer, of which the bias is frozen."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)
    net[2].bias.requires_grad_(False)
    return net


def sharded(net: nn.Sequential, mesh: Any) -> nn.Sequential:
    from torch.distributed.fsdp import fully_shard

    fully_shard(net[0], mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net


def begin(name: str, mesh: Any, swapped: bool = False) -> tuple[nn.Sequential, Any]:
    """A model and its optimizer; on no mesh, in one piece."""
    net, make = network(dtype_of(name)), SUBJECTS[name]
    if mesh is None:
        return net, make(net)
    if not swapped:
        return sharded(net, mesh), make(net)
    optimizer = make(net)
    places = {p.data_ptr(): path for path, p in net.named_parameters()}
    for group in optimizer.param_groups:  # from here on as accelerate's `_prepare_fsdp2`
        for i, p in enumerate(group["params"]):
            group["params"][i] = torch.empty(1, dtype=p.dtype)
            group["params"][i].data_ptr = p.data_ptr()
    new = dict(sharded(net, mesh).named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [new[places[p.data_ptr]] for p in group["params"]]
    return net, optimizer


def train(net: nn.Sequential, optimizer: Any, steps: range) -> None:
    from torch.distributed.tensor import distribute_tensor

    for step in steps:
        g = torch.Generator().manual_seed(step)
        for p in net.parameters():
            x = torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype)
            if p.requires_grad:
                whole = not hasattr(p, "placements")
                p.grad = x if whole else distribute_tensor(x, p.device_mesh, p.placements, src_data_rank=None)
        optimizer.step()


def contents(net: nn.Sequential, optimizer: Any) -> Any:
    """Parameters and their states, in one piece."""
    states = {name: dict(sorted(optimizer.state.get(p, {}).items())) for name, p in net.named_parameters()}
    return gathered([states, {name: p.detach() for name, p in net.named_parameters()}])


def part_of(net: nn.Sequential, optimizer: Any) -> Any:
    """The same, of what this process has."""
    states = {name: dict(sorted(optimizer.state.get(p, {}).items())) for name, p in net.named_parameters()}
    return in_parts([states, {name: p.detach() for name, p in net.named_parameters()}])


def in_parts(tree: Any) -> Any:
    return copy.deepcopy(pytree.tree_map(lambda x: x.to_local() if hasattr(x, "to_local") else x, tree))


def uninterrupted(name: str, steps: int) -> Any:
    net, optimizer = begin(name, None)
    train(net, optimizer, range(steps))
    return contents(net, optimizer)


# ---------------------------------------------------------------------------------------------- from four to two to one to four


def folder() -> Path:
    """What all numbers of processes share."""
    return Path(sys.argv[3]).parent


def save(net: nn.Sequential, optimizer: Any, where: str) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    weights, state = get_state_dict(net, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder() / where)


def load(net: nn.Sequential, optimizer: Any, where: str) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    weights, state = get_state_dict(net, optimizer)
    saved = {"model": weights, "optimizer": state}
    dcp.load(saved, checkpoint_id=folder() / where)
    set_state_dict(net, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])


def runs() -> list[tuple[str, bool]]:
    return [(name, False) for name in SUBJECTS] + [(name, True) for name in SWAPPED]


def stage(rank: int, size: int, before: str | None, after: str | None) -> dict[str, float]:
    """Load what was saved `before`, train, save it for those `after`; how far each run is from an uninterrupted one."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh, found = init_device_mesh("cpu", (size,)), {}
    begun = 0 if before is None else STEPS if before == "four" else 2 * STEPS
    for name, swapped in runs():
        title = f"{name}, swapped" if swapped else name
        net, optimizer = begin(name, mesh, swapped)
        if before is not None:
            load(net, optimizer, f"{before} {title}")
        train(net, optimizer, range(begun, begun + STEPS))
        found[title] = difference(contents(net, optimizer), uninterrupted(name, begun + STEPS))
        if after is not None:
            save(net, optimizer, f"{after} {title}")
    return found


def on_four(rank: int, size: int) -> Any:
    return {"first": stage(rank, size, None, "four")}


def on_two(rank: int, size: int) -> Any:
    return {"then": stage(rank, size, "four", "two"), "options": in_turn(rank, size), "refused": refusals(rank, size)}


def on_one(rank: int, size: int) -> Any:
    return {"then": stage(rank, size, "four", "one")}


def back_on_four(rank: int, size: int) -> Any:
    return {"of two": stage(rank, size, "two", None), "of one": stage(rank, size, "one", None)}


# ------------------------------------------------------------------------------------------------------------ every option

FIELDS = ("full_state_dict", "cpu_offload", "broadcast_from_rank0", "flatten_optimizer_state_dict")
"""The options of a `StateDictOptions` on which it depends what torch's own AdamW does."""

FAILS = {
    ("broadcast_from_rank0",): "refused: full_state_dict must be True",
    ("cpu_offload", "broadcast_from_rank0"): "refused: full_state_dict must be True",
    ("broadcast_from_rank0", "flatten_optimizer_state_dict"): "refused: full_state_dict must be True",
    ("cpu_offload", "broadcast_from_rank0", "flatten_optimizer_state_dict"): "refused: full_state_dict must be True",
    ("full_state_dict", "flatten_optimizer_state_dict"): "KeyError in torch: what is local is flat, what is loaded is not",
    ("full_state_dict", "cpu_offload", "flatten_optimizer_state_dict"): "KeyError in torch: as before",
    ("full_state_dict", "broadcast_from_rank0", "flatten_optimizer_state_dict"): "KeyError: there is no 'state'",
    ("full_state_dict", "cpu_offload", "broadcast_from_rank0", "flatten_optimizer_state_dict"): "KeyError, as before",
}
"""What torch.optim.AdamW fails at, by the options that are on among `FIELDS`: another class does, too."""


Options: TypeAlias = "dict[str, dict[tuple[str, ...], list[Any]]]"
Chosen: TypeAlias = "Callable[[int, Any], bool]"


def every_combination() -> list[Any]:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    names = [field.name for field in dataclasses.fields(StateDictOptions) if isinstance(field.default, bool)]
    return [
        StateDictOptions(**dict(zip(names, values)))
        for values in itertools.product((False, True), repeat=len(names))
    ]  # fmt: skip


def attempt(source: Any, target: Any, options: Any, expected: Any) -> Any:
    """Hand a state over, two steps old, to an optimizer that makes two more; the distance, or the error in any process."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    (net, optimizer), (other, second), error = source, target, ""
    with torch.no_grad():
        for p, q in zip(net.parameters(), other.parameters()):
            q.copy_(p)
    second.zero_grad()
    try:
        saved = copy.deepcopy(get_optimizer_state_dict(net, optimizer, options=options))
        if options.full_state_dict and options.cpu_offload and not options.broadcast_from_rank0:
            box = [saved]  # the first process has it, and would write it to a file that all read
            dist.broadcast_object_list(box, src=0)
            (saved,) = box
        set_optimizer_state_dict(other, second, saved, options=options)
    except Exception as e:
        error = f"{type(e).__name__}: {e}"
    errors: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    if any(errors):
        return "; ".join(sorted(set(errors)))
    train(other, second, range(2, 4))
    return difference(part_of(other, second), expected)


def started(name: str, make: Any, mesh: Any) -> tuple[nn.Sequential, Any]:
    net = sharded(network(dtype_of(name)), mesh)
    return net, make(net)


def every_option(rank: int, size: int, chosen: Chosen = lambda subject, options: True) -> Options:
    """By subject and by the options of `FIELDS` that are on: what comes of each combination of the others that is chosen.

    torch's class runs first. What it fails at is tried once more with one of ours.
    """
    from torch.distributed.device_mesh import init_device_mesh

    mesh, found = init_device_mesh("cpu", (size,)), {}
    theirs = {"torch": lambda model: torch.optim.AdamW(model.named_parameters(), lr=0.05)}
    for subject, (name, make) in enumerate({**theirs, **SUBJECTS}.items()):
        straight = started(name, make, mesh)
        train(*straight, range(4))
        expected = part_of(*straight)
        source = started(name, make, mesh)
        train(*source, range(2))
        found[name] = results = {}
        targets: dict[tuple[str, ...], Any] = {}
        for options in every_combination():
            if not chosen(subject, options):
                continue
            on = tuple(field for field in FIELDS if getattr(options, field))
            if on in FAILS and (name not in ("torch", "class") or (name == "class" and on in results)):
                continue
            if on not in targets or on in FAILS:  # the first is new; the others have been trained
                targets[on] = started(name, make, mesh)
            results.setdefault(on, []).append(attempt(source, targets[on], options, expected))
    return found


def in_turn(rank: int, size: int) -> Options:
    """What is run at every change: each combination of `FIELDS` with one of the combinations of the others, in turn."""
    names = [field.name for field in dataclasses.fields(every_combination()[0]) if isinstance(field.default, bool)]
    others = [name for name in names if name not in FIELDS]

    def chosen(subject: int, options: Any) -> bool:
        turn = subject + number(options, FIELDS)
        return number(options, others) == turn % 2 ** len(others)

    return every_option(rank, size, chosen)


def number(options: Any, names: Sequence[str]) -> int:
    """The number of a combination of these options."""
    return sum(2**k for k, name in enumerate(names) if getattr(options, name))


# ------------------------------------------------------------------------------------------------------- wrong checkpoints

WRONG: dict[str, tuple[Any, Any, str]] = {
    "another chain": (
        of(ps.adamw(0.05)), of(ps.chain(ps.adamw(0.05), ps.ema_params(0.9))),
        r"no option 'decay', which Optimizer needs for group 0 of '0\.weight'",
    ),
    "another algorithm": (
        of(ps.sgd(0.05, momentum=0.9)), of(ps.adamw(0.05)), r"no option 'betas', which Optimizer needs for group 0 of '0\.weight'",
    ),
    "not quantized": (
        of(ps.adamw(0.05)), of(ps.quantize_state(ps.adamw(0.05), min_size=0)), r"has 'exp_avg' of shape \(6, 5\) for '0\.weight'",
    ),
    "quantized": (
        of(ps.quantize_state(ps.adamw(0.05), min_size=0)), of(ps.adamw(0.05)), r"no 'exp_avg' for '0\.weight', which scale_by_adam",
    ),
    "other labels": (of(split()), of(split("hidden")), r"Group 0 of the loaded state has the label 'matrices', but here .*'hidden'"),
    "other rules": (
        of(split(paths={r"^0\.weight": "matrices"})), of(split()),
        r"has the parameter '2\.weight' under the label 'rest', but here its label is 'matrices'",
    ),
}  # fmt: skip
"""What is saved, what it is loaded into, and what is said in every process."""


def local(optimizer: Any) -> Any:
    """What this process has of a state, and the groups."""
    return in_parts(optimizer.state_dict())


def refusals(rank: int, size: int) -> dict[str, tuple[str, bool]]:
    """What is said of a checkpoint of something else, and whether nothing has changed, also where it is read from files."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
    from torch.distributed.device_mesh import init_device_mesh

    mesh, found = init_device_mesh("cpu", (size,)), {}
    for name, (source, target, _) in WRONG.items():
        net, other = (sharded(network(torch.float64), mesh) for _ in range(2))
        first, second = source(net), target(other)
        train(net, first, range(2))
        train(other, second, range(1))
        saved = get_optimizer_state_dict(net, first)
        dcp.save({"optimizer": saved}, checkpoint_id=folder() / f"wrong {name}")
        for how in ("set", "files"):
            before, said = local(second), "nothing"
            try:
                if how == "files":
                    saved = copy.deepcopy(get_optimizer_state_dict(other, second))
                    dcp.load({"optimizer": saved}, checkpoint_id=folder() / f"wrong {name}")
                set_optimizer_state_dict(other, second, saved)
            except (ValueError, dcp.api.CheckpointException) as error:
                said = f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"
            found[f"{name}, {how}"] = said, difference(local(second), before) == 0
            dist.barrier()
    return found


# ------------------------------------------------------------------------------------------------------------------ tests


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    root, found = tmp_path_factory.mktemp("checkpoints"), {}
    for size, name in ((4, "on_four"), (2, "on_two"), (1, "on_one"), (4, "back_on_four")):
        (root / name).mkdir()
        found[name] = processes.run(size, f"tests.test_sharded_checkpoints:{name}", root / name)
    return found


def test_training_goes_on_as_if_it_had_not_been_interrupted(stages: dict[str, list[Any]]) -> None:
    names = {f"{name}, swapped" if swapped else name for name, swapped in runs()}
    for name, keys in {
        "on_four": ["first"],
        "on_two": ["then"],
        "on_one": ["then"],
        "back_on_four": ["of two", "of one"],
    }.items():
        for found, key in itertools.product(stages[name], keys):
            assert found[key].keys() == names
            assert not {run: x for run, x in found[key].items() if not x <= most(run)}, (name, key)


@pytest.fixture(scope="module", params=["in turn", pytest.param("every_option", marks=pytest.mark.long)])
def options(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Options]:
    """What comes of the options in each of two processes."""
    if request.param == "every_option":
        return processes.run(2, f"tests.test_sharded_checkpoints:{request.param}", tmp_path_factory.mktemp("options"))
    stages = request.getfixturevalue("stages")
    return [found["options"] for found in stages["on_two"]]


def test_every_option_that_torchs_class_takes(options: list[Options], request: pytest.FixtureRequest) -> None:
    """All combinations of the other options give the same, and nothing else fails than what is listed."""
    others = len(every_combination()) // 2 ** len(FIELDS) if request.node.callspec.params["options"] == "every_option" else 1
    for each_subject in options:
        for name, results in each_subject.items():
            assert len(results) == 2 ** len(FIELDS) - (0 if name in ("torch", "class") else len(FAILS))
            failed = {on for on, each in results.items() if any(isinstance(x, str) for x in each)}
            assert failed == (set(FAILS) if name in ("torch", "class") else set()), name
            for on, each in results.items():
                assert len(each) == (1 if name == "class" and on in FAILS else others)
                assert on in FAILS or max(each) <= most(name), (name, on)
                assert on not in FAILS or all(isinstance(x, str) for x in each), (name, on)


@pytest.mark.parametrize("name", WRONG)
def test_a_checkpoint_of_something_else_is_refused(stages: dict[str, list[Any]], name: str) -> None:
    """In every process, before anything has changed. A name that files lack is missed by torch."""
    for said, same in [found["refused"][f"{name}, set"] for found in stages["on_two"]]:
        assert re.search(WRONG[name][2], said), said
        assert same
    for said, same in [found["refused"][f"{name}, files"] for found in stages["on_two"]]:
        assert re.search(r"Missing key in checkpoint state_dict: optimizer\.state\.\d\.weight", said) or re.search(
            WRONG[name][2], said
        ), said
        assert same
