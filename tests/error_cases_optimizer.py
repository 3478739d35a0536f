"""Wrong calls, one for each message that purestep raises: those of optimizers, of checkpoints and of converters."""

from __future__ import annotations

import copy
import warnings
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import purestep as ps
from purestep import optim
from tests.error_cases import newton, polyak
from tests.problems import closure_of

SHAPES = {"a": (3, 2), "b": (3,)}


def named(*names: str) -> list[tuple[str, nn.Parameter]]:
    """New parameters with gradients, by their names."""
    found = [(name, nn.Parameter(torch.ones(SHAPES.get(name, (3,))))) for name in names]
    for _, p in found:
        p.grad = torch.ones_like(p)
    return found


def unnamed() -> list[nn.Parameter]:
    return [p for _, p in named("a", "b")]


def adamw() -> Any:
    return optim.AdamW(named("a", "b"))


def sgd() -> Any:
    return optim.SGD(unnamed(), momentum=0.9)


def lbfgs() -> Any:
    return optim.LBFGS(named("a", "b"), max_iter=2)


def of(transform: ps.Transform) -> Callable[[], Any]:
    return lambda: optim.Optimizer(named("a", "b"), transform)


def stepped(optimizer: Any) -> Any:
    """An optimizer after one step, with a closure if it wants one."""
    params = [p for g in optimizer.param_groups for p in g["params"]]
    optimizer.step(closure_of(params))
    return optimizer


def changed(change: Callable[[Any], Any], make: Callable[[], Any] = adamw) -> Any:
    """Load what an optimizer has saved, after a change."""
    saved = copy.deepcopy(stepped(make()).state_dict())
    change(saved)
    make().load_state_dict(saved)


def field(name: str, value: Any, make: Callable[[], Any] = adamw) -> Any:
    """Load another value of a field of the first parameter."""
    return changed(lambda saved: saved["state"][0].update({name: value}), make)


def option(name: str, value: Any, make: Callable[[], Any] = adamw) -> Any:
    return changed(lambda saved: saved["param_groups"][0].update({name: value}), make)


def moved(*groups: str, saved: tuple[str, ...]) -> Any:
    """Load what was saved with the parameters in other groups. Each group is the names in it."""
    first, second = (optim.AdamW([{"params": named(*names)} for names in each]) for each in (saved, groups))
    second.load_state_dict(stepped(first).state_dict())


def parts(matrices: str, others: str) -> ps.Transform:
    """A partition into matrices and others, by these labels."""
    labels = {2: matrices, 1: others}
    return ps.partition({"one": ps.sgd(0.1), "two": ps.sgd(0.2)}, lambda path, p: labels[p.ndim])


def relabelled() -> Any:
    saved = stepped(optim.Optimizer(named("a", "b"), parts("one", "two"))).state_dict()
    optim.Optimizer(named("a", "b"), parts("two", "one")).load_state_dict(saved)


def placed() -> Any:
    """A state dict as `set_optimizer_state_dict` makes it for groups that have exchanged two parameters."""
    saved = stepped(optim.AdamW([{"params": named("a")}, {"params": named("b")}])).state_dict()
    for group, name in zip(saved["param_groups"], "ba"):
        group["params"] = [name]
    optim.AdamW([{"params": named("b")}, {"params": named("a")}]).load_state_dict(saved)


def reordered() -> Any:
    saved = stepped(lbfgs()).state_dict()
    optim.LBFGS(named("b", "a"), max_iter=2).load_state_dict(saved)


def quantized() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch will do without them
        return torch.quantize_per_tensor(torch.ones(3, 2), 0.1, 0, torch.qint8)


def with_a_cycle(saved: Any) -> None:
    saved["param_groups"][0]["note"] = [saved["param_groups"]]
    saved["param_groups"][0]["note"].append(saved["param_groups"][0]["note"])


class Own(optim.Optimizer):
    """A class of a user's, which has no step yet."""


def following_from_zero() -> Any:
    optimizer = optim.SGD(unnamed(), lr=lambda step: 0.1)  # type: ignore[arg-type]
    optimizer.param_groups[0]["initial_lr"] = 0.0
    optimizer.step()


def inside_averages(call: Callable[[Any], Any]) -> Any:
    optimizer = stepped(optim.Optimizer(named("a"), ps.schedule_free_sgd(0.1)))
    with optimizer.use_eval_params():
        call(optimizer)


def twice(optimizer: Any) -> None:
    with optimizer.use_eval_params():
        pass


def scaled() -> Any:
    optimizer = optim.LBFGS(named("a"))
    optimizer.grad_scale = torch.tensor(8.0)
    optimizer.step(lambda: torch.tensor(1.0))


def in_backward() -> Any:
    """An optimizer for each parameter, whose step is a hook."""
    p = nn.Parameter(torch.ones(2))
    optimizer = optim.Optimizer([("w", p)], ps.clip_by_global_norm(1.0))
    p.register_post_accumulate_grad_hook(lambda p: optimizer.step())
    p.sum().backward()


def grouped(transform: ps.Transform, **options: Any) -> Any:
    """A step of two groups, the second of which has other options."""
    a, b = named("a", "b")
    return optim.Optimizer([{"params": [a]}, {"params": [b], **options}], transform).step()


def labelled() -> Any:
    optimizer = optim.Optimizer(named("a", "b"), parts("one", "two"))
    optimizer.add_param_group({"params": named("c"), "label": "one"})


def embedding() -> Any:
    return optim.SparseAdam(named("a")).step()


# ------------------------------------------------------------------------------------------------------------- converters

TREE = {"a": torch.ones(3, 2), "b": torch.ones(3)}
Theirs = namedtuple("Theirs", "count mu nu")


def torchs(cls: Any = torch.optim.Adam, **options: Any) -> Any:
    """One of torch's optimizers after a step."""
    optimizer = cls([p.clone().requires_grad_() for p in TREE.values()], **options)
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer


def with_state(name: str, value: Any) -> Any:
    """A state dict of torch's with another field."""
    saved = torchs().state_dict()
    saved["state"][0][name] = value
    return saved


def bitsandbytes(**state: Any) -> Any:
    """The state of one parameter of 512 elements, as bitsandbytes has it."""
    p = nn.Parameter(torch.ones(512))
    optimizer = torch.optim.SGD([p])
    optimizer.state[p] = {"step": 3, "state1": torch.zeros(512, dtype=torch.uint8), "qmap1": torch.zeros(256), **state}
    return ps.convert.from_bitsandbytes(ps.adam(), [p], optimizer)


class LARS(torch.optim.SGD):
    """Named as one of pytorch_optimizer is."""


def pytorch_optimizers(cls: type[torch.optim.SGD] = torch.optim.SGD) -> Any:
    """An optimizer with a state whose group counts no steps."""
    p = nn.Parameter(torch.ones(2))
    optimizer = cls([p])
    optimizer.param_groups[0]["step"] = 0
    optimizer.state[p] = {"exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2)}
    return ps.convert.from_pytorch_optimizer(ps.adam(), [p], optimizer)


def nested(depth: int) -> Any:
    x: Any = ()
    for _ in range(depth):
        x = (x,)
    return x


CASES: dict[str, Callable[[], Any]] = {
    # _optimizer/checkpoint.py
    "a state dict that is a number": lambda: adamw().load_state_dict(3),
    "a state dict without a state": lambda: adamw().load_state_dict({"param_groups": []}),
    "a state that is a number": lambda: changed(lambda saved: saved.update(state=3)),
    "groups that are a number": lambda: changed(lambda saved: saved.update(param_groups=3)),
    "a group that is a number": lambda: changed(lambda saved: saved.update(param_groups=[3])),
    "parameters that are a number": lambda: option("params", 3),
    "names that are numbers": lambda: option("param_names", [1, 2]),
    "a name too few": lambda: option("param_names", ["a"]),
    "a flag in words": lambda: option("foreach", "yes"),
    "a long string": lambda: option("note", "x" * 2000),
    "an option with a history": lambda: option("lr", torch.ones((), requires_grad=True) * 1),
    "an option that is sparse": lambda: option("lr", torch.ones(1).to_sparse()),
    "an integer that is too large": lambda: option("lr", 10**400),
    "a state on the meta device": lambda: field("note", torch.ones(2, device="meta")),
    "a list that contains itself": lambda: changed(with_a_cycle),
    "a list that is too deep": lambda: option("note", nested(60)),
    "parameters with new names": lambda: moved("ac", saved=("ab",)),
    "a parameter under another label": relabelled,
    "a parameter that torch has placed": placed,
    "two groups that are one": lambda: moved("ac", "bd", saved=("ab", "cd")),
    "a group that is two": lambda: moved("ax", "by", saved=("ab", "cd")),
    "a switch in words": lambda: option("nesterov", "yes", sgd),
    "a group under another label": lambda: option("label", "two", lambda: optim.Optimizer(unnamed(), parts("one", "two"))),
    "a group without an option": lambda: changed(lambda saved: saved["param_groups"][0].pop("lr")),
    "an unnamed group without an option": lambda: changed(lambda saved: saved["param_groups"][0].pop("lr"), sgd),
    "a state of one parameter that is a number": lambda: changed(lambda saved: saved["state"].update({0: 3})),
    "a state without a field": lambda: changed(lambda saved: saved["state"][0].pop("exp_avg")),
    "a history that is a number": lambda: field("shared.old_dirs", 3, of(ps.lbfgs())),
    "a number of all parameters in words": lambda: field("shared.skipped", "three", of(ps.skip_if_nonfinite(ps.adam()))),
    "a vector of all parameters of another size": lambda: field("shared.d", torch.ones(7), of(ps.lbfgs())),
    "a vector in another order": reordered,
    "a count of several numbers": lambda: field("step", torch.ones(2)),
    "a count in words": lambda: field("step", "three"),
    "a count below zero": lambda: field("step", torch.tensor(-3.0)),
    "a moment that is a number": lambda: field("exp_avg", 3.0),
    "a moment of another shape": lambda: field("exp_avg", torch.ones(7)),
    "a moment that has none": lambda: changed(
        lambda saved: saved["state"][1].update(row_var=torch.ones(3)), lambda: optim.Adafactor(named("a", "b"))
    ),
    "a sparse moment": lambda: field("exp_avg", torch.ones(3, 2).to_sparse()),
    "an expanded moment": lambda: field("exp_avg", torch.ones(1, 1).expand(3, 2)),
    "a quantized moment": lambda: field("exp_avg", quantized()),
    "a moment on the meta device": lambda: field("exp_avg", torch.ones(3, 2, device="meta")),
    # _optimizer/closures.py
    "a hessian of an optimizer's": lambda: of(newton())().step(),
    "no closure": lambda: of(polyak())().step(),
    "a closure that returns words": lambda: of(polyak())().step(lambda: "low"),
    "a closure that returns several values": lambda: of(polyak())().step(lambda: torch.ones(2)),
    # _optimizer/following.py
    "a schedule under a scheduler that begins at 0": following_from_zero,
    # _optimizer/optimizer.py
    "options twice": lambda: Own(unnamed(), {"lr": 0.1}, rate=0.1),  # type: ignore[call-arg]
    "an optimizer without a transform": lambda: optim.Optimizer(unnamed(), 3),  # type: ignore[arg-type]
    "maximize of what evaluates the closure": lambda: optim.Optimizer(unnamed(), ps.lbfgs(), maximize=True),
    "averages in averages": lambda: inside_averages(twice),
    "a step in averages": lambda: inside_averages(lambda optimizer: optimizer.step()),
    "scaled gradients of a closure": scaled,
    "one parameter alone": in_backward,
    "a class without a step": lambda: Own(unnamed(), {"lr": 0.1}).step(),
    # _optimizer/options.py
    "two learning rates": lambda: optim.AdamW(unnamed(), lr=torch.ones(2)),
    "fused and foreach": lambda: optim.AdamW(unnamed(), fused=True, foreach=True),
    "fused and differentiable": lambda: optim.AdamW(unnamed(), fused=True, differentiable=True),
    "compile and foreach": lambda: optim.AdamW(unnamed(), compile=True, foreach=True),
    "maximize in one group": lambda: grouped(ps.lookahead(ps.sgd(0.1)), maximize=True),
    "another number in one group": lambda: grouped(ps.lookahead(ps.sgd(0.1)), alpha=0.3),
    # _optimizer/partial.py
    "partial of a class": lambda: optim.partial(torch.optim.Adam),  # type: ignore[arg-type]
    "a flag that is misspelt": lambda: optim.partial(ps.adamw(), forech=True),
    # _optimizer/routing.py
    "a group that is labelled otherwise": labelled,
    # algorithms
    "two groups of lbfgs": lambda: optim.LBFGS([{"params": named("a")}, {"params": named("b")}]),
    "a state of lbfgs without a field": lambda: changed(lambda saved: saved["state"][0].pop("d"), lbfgs),
    "a history of lbfgs that is a number": lambda: field("old_dirs", 3, lbfgs),
    "a direction of lbfgs of another size": lambda: field("d", torch.ones(7), lbfgs),
    "a direction of lbfgs that is a number": lambda: field("d", 3.0, lbfgs),
    "a dense gradient": embedding,
    # convert
    "a partition's state of torch": lambda: ps.convert.from_torch(parts("one", "two"), TREE, torchs()),
    "another number of parameters": lambda: ps.convert.from_torch(ps.adam(), {"a": TREE["a"]}, torchs()),
    "a state of torch that is a number": lambda: ps.convert.from_torch(
        ps.adam(), TREE, {**torchs().state_dict(), "state": {0: 3}}
    ),
    "a state of another algorithm": lambda: ps.convert.from_torch(ps.sgd(), TREE, torchs(torch.optim.RMSprop)),
    "several counts of optax's": lambda: ps.convert.from_optax(ps.adam(), TREE, Theirs(torch.ones(2), TREE, TREE)),
    "a count of optax's in words": lambda: ps.convert.from_optax(ps.adam(), TREE, Theirs("three", TREE, TREE)),
    "a pytorch_optimizer that counts elsewhere": pytorch_optimizers,
    "a pytorch_optimizer with another momentum": lambda: pytorch_optimizers(LARS),
    "one moment of bitsandbytes'": lambda: bitsandbytes(absmax1=torch.zeros(2)),
    "other blocks of bitsandbytes'": lambda: bitsandbytes(absmax1=torch.zeros(8)),
    "no blocks of bitsandbytes'": lambda: bitsandbytes(),
    "a moment of TorchOpt's too few": lambda: ps.convert.from_torchopt(
        ps.adam(), TREE, Theirs([1, 1], [TREE["a"]], [TREE["a"]])
    ),
    "no Adam of optax's": lambda: ps.convert.from_optax(ps.adam(), TREE, ((), ())),
    "a state of optax's that is too deep": lambda: ps.convert.from_optax(ps.adam(), TREE, nested(60)),
}
