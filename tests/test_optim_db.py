"""The classes against torch's, over torch's own table of optimizers: `torch.testing._internal.common_optimizers.optim_db`.

The table says which options an optimizer is to be tested with, and what it must refuse. Every set of options trains twice, with
torch's class and with ours, and the parameters and the whole state are compared. torch's loop (`foreach=False`, or the only way
the class has) is the reference. What a class asks of its parameters and gradients is in `NEEDS`.

In float64 and float32 the numbers must be torch's, to a tolerance. In bfloat16 and complex64 every rounding shows, so the
question is another one: each of torch's ways to run the class (loop, foreach, kernel: as many as it has) ends at some distance
from where float64 ends on the same problem, and ours must not end farther away than they do.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import hypothesis
import pytest
import torch
from torch import Tensor

from purestep import optim
from tests.cases import CLASSES, Options


def torchs_table() -> dict[str, Any]:
    """The table, by class name. Importing it changes settings of the whole process, for all tests; they are put back."""
    profile = hypothesis.settings.get_current_profile_name()
    calls = torch._C.ScriptFunction.__call__, torch._C.ScriptMethod.__call__
    flags = torch.backends.disable_global_flags.__globals__
    free = flags["__allow_nonbracketed_mutation_flag"]
    try:
        from torch.testing._internal.common_optimizers import optim_db
    finally:
        hypothesis.settings.load_profile(profile)
        torch._C.ScriptFunction.__call__, torch._C.ScriptMethod.__call__ = calls
        flags["__allow_nonbracketed_mutation_flag"] = free
    return {info.name: info for info in optim_db}


TABLE = torchs_table()
STEPS = 110
"""More than the 100 after which one of the table's sets of options (ASGD's `t0`) begins to matter."""
FLAGS: dict[str, Options] = {"default": {}, "foreach": {"foreach": True}, "loop": {"foreach": False}, "fused": {"fused": True}}
TOLERANCES = {torch.float64: 1e-10, torch.complex128: 1e-10, torch.float32: 1e-5}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.complex64)
WIDE = {torch.float32: torch.float64, torch.bfloat16: torch.float64, torch.complex64: torch.complex128}
"""What the rounding of a low dtype is measured against."""
NOT_COMPARED = {
    "SGD": {"step": "ours alone: it counts updates, and the first one enters undamped"},
    "Muon": {"step": "ours alone: it counts updates"},
    "LBFGS": {"al": "torch's scratch space: it is written before it is read, in every iteration"},
}
"""Fields of the state that mean something to only one of the two, with the reason."""
PLAIN = {"t"}
"""Numbers that torch keeps as a float, or as a tensor if the learning rate is one."""


# --------------------------------------------------------------------------------------------------------------- the problems

Grads = Callable[[Tensor, int, int], Tensor]
"""The k-th gradient of a parameter p, which is the i-th one: called (p, k, i)."""


def simple(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Random numbers which bfloat16 holds exactly, so that a problem is the same in every dtype."""
    wide = torch.complex64 if dtype.is_complex else torch.float32
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=wide)
    parts = torch.view_as_real(x) if dtype.is_complex else x
    parts.copy_(parts.bfloat16())
    return x.to(dtype)


@functools.cache
def noise(shape: tuple[int, ...], dtype: torch.dtype, i: int) -> Tensor:
    """Gradients for every step, in one tensor."""
    return simple((STEPS, *shape), dtype, i)


def noisy(p: Tensor, k: int, i: int) -> Tensor:
    """Noise that depends on the parameter, so that an error feeds on itself."""
    return torch.sin(p).add_(noise(p.shape, p.dtype, i)[k])


def other_noise(p: Tensor, k: int, i: int) -> Tensor:
    """For what rounds to bfloat16 inside, as Muon does: noise by which nothing comes near a number where that goes either way.

    How it was found: one or three float32 roundings of the start, up or down, move what torch ends with by less than 1e-6, under
    every set of options. With two seeds of three it is more than that.
    """
    return noisy(p, k, i + 80)


def signed(p: Tensor, k: int, i: int) -> Tensor:
    """Gradients whose size, between 1 and 2, depends on the parameter, and whose signs do not.

    All signs are equal for 40 steps, by which step sizes grow up to their bound, and then every other step is a turn, by which
    they shrink down to theirs. Half of the elements have the other sign.
    """
    if p.is_complex():
        return torch.view_as_complex(signed(torch.view_as_real(p), k, i))
    sign = 1 if k < 40 or (k + i) // 2 % 2 else -1
    ones = torch.ones(p.numel(), dtype=p.dtype)
    ones[1::2] = -1
    return sign * ones.view(p.shape) * (1.5 + torch.sin(p) / 2)


def sparse(p: Tensor, k: int, i: int) -> Tensor:
    """Gradients of some rows, as an embedding gives them: in any order, one of them twice, at some steps of none."""
    g = torch.Generator().manual_seed(100 * k + i)
    rows = torch.randint(max(len(p), 1), (3 if k % 10 < 9 and len(p) else 0,), generator=g)
    rows = torch.cat([rows, rows[:1]])
    return torch.sparse_coo_tensor(rows[None], noisy(p, k, i)[rows], p.shape, check_invariants=True)


def backward(optimizer: Any, k: int, grads: Grads) -> None:
    """Give each parameter its k-th gradient, and update them."""
    for i, p in enumerate(parameters(optimizer)):
        p.grad = grads(p.detach(), k, i) if p.requires_grad else None
    optimizer.step()


def minimize(optimizer: Any, k: int, grads: Grads) -> None:
    """One step on a convex function, the same at all steps.

    It is conditioned so that 20 iterations do not end at the minimum, where nothing but rounding is left to compare, and that a
    rounding of the start moves what torch ends with by 1e-12 of it at most.
    """

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.zeros((), dtype=torch.float64)
        for p in parameters(optimizer):
            x = (torch.view_as_real(p) if p.is_complex() else p).flatten()
            weight = torch.logspace(-1, 1, x.numel(), dtype=x.dtype)
            loss = loss + (weight * (x - 1).square() + 0.1 * x**4).sum()
        loss = -loss if optimizer.param_groups[0].get("maximize") else loss  # from torch 2.14 on
        loss.backward()
        return loss

    optimizer.step(closure)


@dataclasses.dataclass(frozen=True)
class Needs:
    """What a class asks of its parameters and gradients."""

    options: Options
    """For the tests of structure: as many parts of the algorithm at once as there are."""
    groups: tuple[Options, ...] = ()
    """Options of parameter groups."""
    shapes: tuple[tuple[int, ...], ...] = ((3, 2), (4,), ())
    grads: Grads = noisy
    step: Callable[[Any, int, Grads], None] = backward
    steps: int = STEPS
    """How many steps are compared."""
    window: int = 24
    """How many in the tests of structure."""
    exact: tuple[torch.dtype, ...] = (torch.float64, torch.float32)
    """The dtypes in which the numbers can be compared; in the others, how precise they are."""
    precise: tuple[str, ...] | None = None
    """The fields of which the latter means something, "" being the parameters; by default all."""
    lacks: dict[str, str] = dataclasses.field(default_factory=dict)
    """Structure -> why torch's class does not have it, or why it means nothing."""


LR: tuple[Options, ...] = ({}, {"lr": 0.01}, {"lr": 0.0})
LR_AND_DECAY: tuple[Options, ...] = (*LR, {"weight_decay": 0.0}, {"weight_decay": 0.5, "lr": 0.02})
DENSE = "an embedding's gradient has a dimension of rows, and a layout of its own"
FLAT = "all parameters together are one vector, of one dtype"
NEEDS = {
    "SGD": Needs(
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
        (*LR_AND_DECAY, {"momentum": 0.0}, {"dampening": 0.0, "nesterov": True}, {"maximize": True, "lr": 1e-3}),
    ),
    "Adam": Needs(
        {"lr": 0.1, "weight_decay": 0.1},
        (
            *LR_AND_DECAY,
            {"betas": (0.5, 0.9)},
            {"eps": 0.1},
            {"amsgrad": True},
            {"maximize": True},
            {"decoupled_weight_decay": True},
        ),
    ),
    "AdamW": Needs(
        {"lr": 0.1, "weight_decay": 0.1, "amsgrad": True},
        (*LR_AND_DECAY, {"betas": (0.5, 0.9)}, {"eps": 0.1}, {"amsgrad": False}, {"maximize": True}),
    ),
    "Adamax": Needs({"lr": 0.1, "weight_decay": 0.1}, (*LR_AND_DECAY, {"betas": (0.5, 0.9)}, {"eps": 0.1}, {"maximize": True})),
    "NAdam": Needs(
        {"lr": 0.1, "weight_decay": 0.1, "momentum_decay": 0.01},
        (*LR_AND_DECAY, {"betas": (0.5, 0.9)}, {"momentum_decay": 0.1}, {"maximize": True}, {"decoupled_weight_decay": True}),
    ),
    "RAdam": Needs(
        {"lr": 0.1, "betas": (0.8, 0.9), "weight_decay": 0.1},
        (*LR_AND_DECAY, {"betas": (0.5, 0.99)}, {"eps": 0.1}, {"maximize": True}, {"decoupled_weight_decay": True}),
    ),
    "Adagrad": Needs(
        {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.1},
        (*LR_AND_DECAY, {"lr_decay": 0.5}, {"eps": 0.1}, {"maximize": True}),
    ),
    "Adadelta": Needs({"lr": 0.5, "weight_decay": 0.1}, (*LR_AND_DECAY, {"rho": 0.5}, {"eps": 0.1}, {"maximize": True})),
    "RMSprop": Needs(
        {"lr": 0.05, "alpha": 0.9, "weight_decay": 0.1, "momentum": 0.5, "centered": True},
        (*LR_AND_DECAY, {"alpha": 0.5}, {"eps": 0.1}, {"momentum": 0.0}, {"centered": False}, {"maximize": True}),
    ),
    "Rprop": Needs({"lr": 0.1}, (*LR, {"etas": (0.3, 1.5)}, {"step_sizes": (0.01, 0.2)}, {"maximize": True}), grads=signed),
    "ASGD": Needs(
        {"lr": 0.1, "t0": 3, "lambd": 0.01, "weight_decay": 0.1},
        (*LR_AND_DECAY, {"lambd": 0.1}, {"alpha": 0.5}, {"t0": 5}, {"maximize": True}),
    ),
    "Adafactor": Needs(
        {"lr": 0.1, "weight_decay": 0.1},
        (*LR_AND_DECAY, {"beta2_decay": -0.5}, {"eps": (1e-10, 0.1)}, {"d": 2.0}, {"maximize": True}),
        shapes=((3, 2), (4,), (), (2, 3, 2)),
        lacks={
            "empty": "torch divides by the root of the number of elements",
            "empty, alone": "torch divides by the root of the number of elements",
        },
    ),
    "Muon": Needs(
        {"lr": 0.1, "weight_decay": 0.1},
        (*LR_AND_DECAY, {"momentum": 0.5}, {"nesterov": False}, {"ns_steps": 3}, {"adjust_lr_fn": "match_rms_adamw"}),
        shapes=((3, 2), (2, 4), (1, 3)),
        grads=other_noise,
        lacks={"0-d": "it orthogonalizes matrices", "0-d, alone": "it orthogonalizes matrices"},
    ),
    "SparseAdam": Needs(
        {"lr": 0.1},
        (*LR[:2], {"betas": (0.5, 0.9)}, {"eps": 0.1}, {"maximize": True}),
        shapes=((5, 2), (4,), (3, 2, 2)),
        grads=sparse,
        lacks={"0-d": DENSE, "0-d, alone": DENSE, "gradients expanded": DENSE, "gradients with gaps": DENSE},
    ),
    "LBFGS": Needs(
        {"lr": 0.02, "history_size": 3, "max_iter": 6, "line_search_fn": "strong_wolfe"},
        step=minimize,
        steps=1,  # of 20 iterations
        window=4,
        exact=(torch.float64,),  # the memory is of differences: in float32, a rounding of the start moves torch's by 4e-4
        precise=("",),  # for the same reason
        lacks={
            "gradients at times": "its memory is of all gradients together, at all steps",
            "frozen at first": "its memory is of all gradients together, at all steps",
            "gradients expanded": "its closure is what gives gradients",
            "gradients with gaps": "its closure is what gives gradients",
            "empty, alone": "torch asks for the largest of no gradients",
            "transposed": "torch flattens gradients with view, which needs them contiguous",
            "groups": "torch refuses more than one group",
            "mixed dtypes": FLAT,
        },
    ),
}


def parameters(optimizer: Any) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def tensors(shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Parameters of these shapes; the same at every call."""
    return [simple(shape, dtype, 100 + i).requires_grad_() for i, shape in enumerate(shapes)]


def make(namespace: Any, cls: str, params: Any, options: Options) -> Any:
    return getattr(namespace, cls)(params, **copy.deepcopy(options))


# --------------------------------------------------------------------------------------------------------------- comparison

Result = dict[str, Any]
"""What an optimizer has made: parameters by their number, and their states' fields as `number.field`."""


def result(optimizer: Any) -> Result:
    made: Result = {str(i): p.detach().clone() for i, p in enumerate(parameters(optimizer))}
    for i, state in optimizer.state_dict()["state"].items():
        made |= {f"{i}.{name}": float(x) if name in PLAIN else copy.deepcopy(x) for name, x in state.items()}
    return made


def numbers(x: Any) -> list[Tensor]:
    """The numbers in a field of a state, which may be a tensor, a number, or a list of them."""
    if isinstance(x, (list, tuple)):
        return [t for y in x for t in numbers(y)]
    return [] if x is None else [torch.as_tensor(x, dtype=None if isinstance(x, Tensor) else torch.float64)]


def distance(ours: Any, theirs: Any) -> float:
    """The largest difference, relative to the largest value; of tensors, also the shape and the dtype must agree."""
    if isinstance(theirs, Tensor):
        assert isinstance(ours, Tensor)
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
    xs, ys = numbers(ours), numbers(theirs)
    assert len(xs) == len(ys)
    worst = 0.0
    for x, y in zip(xs, ys):
        assert x.isfinite().all()
        assert y.isfinite().all()
        off = (x.to(torch.promote_types(x.dtype, torch.float64)) - y).abs()
        if torch.count_nonzero(off):
            worst = max(worst, float(off.max() / y.abs().max()))
    return worst


def fields(cls: str, made: Result) -> set[str]:
    """The names, without those that mean something to only one of the two."""
    return {name for name in made if name.partition(".")[2] not in NOT_COMPARED.get(cls, {})}


def assert_near(cls: str, ours: Result, theirs: Result) -> None:
    """The same names, and values as near as their dtype's tolerance says; a plain number counts as float64."""
    names = fields(cls, theirs)
    assert fields(cls, ours) == names
    off = {name: distance(ours[name], theirs[name]) for name in names}
    far = {name: d for name, d in off.items() if not d <= TOLERANCES[getattr(theirs[name], "dtype", torch.float64)]}
    assert not far


def errors(cls: str, made: Result, exact: Result) -> dict[str, float]:
    """By field of the state ("" is the parameters): the root mean square of what it is off, relative to each one's largest."""
    off: dict[str, list[Tensor]] = {}
    for name in sorted(fields(cls, exact)):
        for y, z in zip(numbers(made[name]), numbers(exact[name])):
            relative = (y.to(z.dtype) - z).abs().double() / z.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
            off.setdefault(name.partition(".")[2], []).append(relative.flatten())
    return {field: float(torch.cat(every).square().mean().sqrt()) for field, every in off.items()}


def assert_as_precise(cls: str, ours: Result, theirs: list[Result], exact: Result, dtype: torch.dtype) -> None:
    """Half as far again as the worst of torch's ways is allowed, because two ways to round are never equally lucky."""
    assert fields(cls, ours) == fields(cls, exact)
    mine, every = errors(cls, ours, exact), [errors(cls, made, exact) for made in theirs]
    asked = mine if NEEDS[cls].precise is None else NEEDS[cls].precise
    allowed = {field: 1.5 * max(e[field] for e in every) + torch.finfo(dtype).eps for field in asked}
    assert not {field: (d, allowed[field]) for field in allowed if not (d := mine[field]) <= allowed[field]}


# ------------------------------------------------------------------------------------------------------------ sets of options


def replaced(options: Options, change: Callable[[Tensor], Any]) -> Options:
    """The same options with other things instead of tensors."""

    def walk(x: Any) -> Any:
        return tuple(map(walk, x)) if isinstance(x, tuple) else change(x) if isinstance(x, Tensor) else x

    return {name: walk(x) for name, x in options.items()}


def as_floats(options: Options) -> Options:
    return replaced(options, Tensor.item)


class Entry(NamedTuple):
    """One set of options of torch's table."""

    cls: str
    number: int
    desc: str
    options: Options

    def reference(self, dtype: torch.dtype) -> Options:
        """As torch takes it on the CPU, where it lets nothing be capturable."""
        return {k: v for k, v in self.ours(dtype).items() if k != "capturable"}

    def ours(self, dtype: torch.dtype) -> Options:
        """Tensors are of float64 where the parameters are: torch computes with them in their own dtype, 1 - lr * decay too."""
        wide = torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32

        return replaced(self.options, lambda x: x.to(wide))

    def __str__(self) -> str:
        return f"{self.cls} {self.number} {self.desc}"


def entries(cls: str) -> list[Entry]:
    """The sets for an accelerator are those for the CPU and more, of which some differ in nothing but `capturable`."""
    inputs = TABLE[cls].optim_inputs_func(device="cuda")
    every = [Entry(cls, n, x.desc, x.kwargs) for n, x in enumerate(inputs)]
    assert all(x.params is None for x in inputs), "torch's table has begun to give parameters"
    return [e for e in every if repr(e.reference(torch.float32)) not in {repr(x.options) for x in every[: e.number]}]


ENTRIES = {cls: entries(cls) for cls in CLASSES}


def modes(cls: str) -> dict[str, Options]:
    """The flags that torch's class has, on the CPU."""
    known = inspect.signature(getattr(torch.optim, cls)).parameters
    kernel = "cpu" in TABLE[cls].supports_fused_on
    return {name: flags for name, flags in FLAGS.items() if flags.keys() <= known.keys() and (kernel or name != "fused")}


def modes_for(cls: str, dtype: torch.dtype) -> list[str]:
    """Kernels are for real numbers, and so are some algorithms; that those are refused is asked of the table of errors."""
    if dtype.is_complex:
        return [mode for mode in modes(cls) if mode != "fused"] if TABLE[cls].supports_complex else []
    return list(modes(cls))


def each_entry(*, exact: bool) -> pytest.MarkDecorator:
    """Parametrize over every set of options, in every dtype in which the class's numbers are (not) compared, in every mode."""
    chosen = [
        pytest.param(entry, mode, dtype, id=f"{entry}-{mode}-{str(dtype)[6:]}")
        for cls in CLASSES
        for entry in ENTRIES[cls]
        for dtype in DTYPES
        if (dtype in NEEDS[cls].exact) == exact
        for mode in modes_for(cls, dtype)
    ]
    return pytest.mark.parametrize(("entry", "mode", "dtype"), chosen)


def trained(namespace: Any, cls: str, options: Options, dtype: torch.dtype) -> Result:
    needs = NEEDS[cls]
    optimizer = make(namespace, cls, tensors(needs.shapes, dtype), options)
    for k in range(needs.steps):
        needs.step(optimizer, k, needs.grads)
    return result(optimizer)


@functools.cache
def torchs(cls: str, number: int, dtype: torch.dtype, mode: str) -> Result:
    """What torch makes of an entry of the table."""
    entry = next(e for e in ENTRIES[cls] if e.number == number)
    options = {**entry.reference(dtype), **modes(cls)[mode]}
    try:
        make(torch.optim, cls, tensors(NEEDS[cls].shapes, dtype), options)
    except ValueError:  # some of its foreach modes take no tensors for numbers
        options = as_floats(options)
    return trained(torch.optim, cls, options, dtype)


def reference(entry: Entry, dtype: torch.dtype) -> Result:
    return torchs(entry.cls, entry.number, dtype, "loop" if "loop" in modes(entry.cls) else "default")


def ours(entry: Entry, mode: str, dtype: torch.dtype) -> Result:
    return trained(optim, entry.cls, {**entry.ours(dtype), **modes(entry.cls)[mode]}, dtype)


def test_every_class_is_in_the_table() -> None:
    assert set(CLASSES) <= TABLE.keys()
    assert TABLE.keys() == NEEDS.keys()


@each_entry(exact=True)
@pytest.mark.in_turn("mode", "dtype")
def test_it_trains_as_torchs(entry: Entry, mode: str, dtype: torch.dtype) -> None:
    assert_near(entry.cls, ours(entry, mode, dtype), reference(entry, dtype))


@each_entry(exact=False)
@pytest.mark.in_turn("mode", "dtype")
def test_it_trains_as_precisely_as_torchs(entry: Entry, mode: str, dtype: torch.dtype) -> None:
    made, exact = ours(entry, mode, dtype), reference(entry, WIDE[dtype])
    theirs = [torchs(entry.cls, entry.number, dtype, other) for other in modes_for(entry.cls, dtype)]
    assert_as_precise(entry.cls, made, theirs, exact, dtype)


# ------------------------------------------------------------------------------------------------------------------ structure

WINDOW = range(30, 54)
"""The steps of these tests; Rprop's gradients begin to turn in the middle of them."""

Skip = Callable[[int, int], bool]


def never(k: int, i: int) -> bool:
    return False


def expanded(p: Tensor, g: Tensor) -> Tensor:
    """The same number everywhere, as a sum's gradient is."""
    return g.flatten()[0].expand(p.shape)


def with_gaps(p: Tensor, g: Tensor) -> Tensor:
    return torch.stack([g, g], -1)[..., 0]


def transposed(shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype) -> list[Tensor]:
    """Dimensions in the other order in memory."""
    reverse = tensors(tuple(shape[::-1] for shape in shapes), dtype)
    return [p.detach().permute(tuple(reversed(range(p.dim())))).requires_grad_() for p in reverse]


def gaps(shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype) -> list[Tensor]:
    return [p.detach()[..., 0].requires_grad_() for p in tensors(tuple((*shape, 2) for shape in shapes), dtype)]


class Structure(NamedTuple):
    """Something about the parameters or their gradients."""

    before: tuple[tuple[int, ...], ...] = ()
    """Shapes of more parameters, before those that the class needs."""
    alone: bool = False
    """Without the latter."""
    make: Callable[[tuple[tuple[int, ...], ...], torch.dtype], list[Tensor]] = tensors
    dtype: torch.dtype = torch.float64
    grad: Callable[[Tensor, Tensor], Tensor] | None = None
    """What becomes of a gradient."""
    skip: Skip = never
    """Whether the i-th parameter has no gradient at step k."""
    frozen: Skip = never
    """Whether it does not ask for one."""


STRUCTURES = {
    "plain": Structure(),
    "gradients at times": Structure(skip=lambda k, i: (k + i) % 3 == 0),
    "frozen at first": Structure(frozen=lambda k, i: i == 1 and k < WINDOW[4]),
    "0-d": Structure(before=((), ())),
    "0-d, alone": Structure(before=((),), alone=True),
    "empty": Structure(before=((0, 3),)),
    "empty, alone": Structure(before=((0, 3),), alone=True),
    "transposed": Structure(make=transposed),
    "with gaps": Structure(make=gaps),
    "gradients expanded": Structure(grad=expanded),
    "gradients with gaps": Structure(grad=with_gaps),
    "complex": Structure(dtype=torch.complex128),
}


def each_structure() -> pytest.MarkDecorator:
    """Parametrize over every class, in every mode, under every structure; those that mean nothing are skipped with the reason."""
    chosen = []
    for cls in CLASSES:
        for name, structure in STRUCTURES.items():
            lacks = dict(NEEDS[cls].lacks)
            if not TABLE[cls].supports_complex:
                lacks["complex"] = "torch's class refuses complex parameters"
            marks = [pytest.mark.skip(reason=f"{cls}, {name}: {lacks[name]}")] if name in lacks else []
            available = modes_for(cls, structure.dtype) or ["default"]
            chosen += [pytest.param(cls, structure, mode, marks=marks, id=f"{cls}-{name}-{mode}") for mode in available]
    return pytest.mark.parametrize(("cls", "structure", "mode"), chosen)


def structured(namespace: Any, cls: str, structure: Structure, options: Options) -> Result:
    needs = NEEDS[cls]
    params = structure.make((*structure.before, *(() if structure.alone else needs.shapes)), structure.dtype)
    strides = [p.stride() for p in params]
    for i, p in enumerate(params):
        p.requires_grad_(not structure.frozen(WINDOW[0], i))
    optimizer = make(namespace, cls, params, options)

    def grads(p: Tensor, k: int, i: int) -> Any:
        g = needs.grads(p, k, i)
        return None if structure.skip(k, i) else structure.grad(p, g) if structure.grad else g

    for k in WINDOW[: needs.window]:
        for i, p in enumerate(params):
            p.requires_grad_(not structure.frozen(k, i))
        needs.step(optimizer, k, grads)
    assert [p.stride() for p in params] == strides
    return result(optimizer)


def loop(cls: str) -> Options:
    """The flags for torch's reference."""
    return modes(cls).get("loop", {})


@each_structure()
@pytest.mark.in_turn("mode")
def test_structure(cls: str, structure: Structure, mode: str) -> None:
    options = NEEDS[cls].options
    theirs = structured(torch.optim, cls, structure, {**options, **loop(cls)})
    assert_near(cls, structured(optim, cls, structure, {**options, **modes(cls)[mode]}), theirs)


def each_mode(lack: str, needs_option: str | None = None) -> pytest.MarkDecorator:
    """Parametrize over every class that has this option, in every mode."""
    chosen = []
    for cls in CLASSES:
        reason = NEEDS[cls].lacks.get(lack)
        if needs_option is not None and needs_option not in inspect.signature(getattr(torch.optim, cls)).parameters:
            reason = f"torch's class has no {needs_option}"
        marks = [pytest.mark.skip(reason=f"{cls}: {reason}")] if reason else []
        chosen += [pytest.param(cls, mode, marks=marks, id=f"{cls}-{mode}") for mode in modes(cls)]
    return pytest.mark.parametrize(("cls", "mode"), chosen)


@each_mode("weight decay", "weight_decay")
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.in_turn("mode")
def test_weight_decay(cls: str, mode: str, weight_decay: float) -> None:
    options = {**NEEDS[cls].options, "weight_decay": weight_decay}
    theirs = structured(torch.optim, cls, STRUCTURES["plain"], {**options, **loop(cls)})
    assert_near(cls, structured(optim, cls, STRUCTURES["plain"], {**options, **modes(cls)[mode]}), theirs)


def grouped(namespace: Any, cls: str, flags: Options) -> Result:
    needs = NEEDS[cls]
    groups = [{"params": tensors(needs.shapes), **copy.deepcopy(group)} for group in needs.groups]
    optimizer = make(namespace, cls, groups, {**needs.options, **flags})
    for k in WINDOW:
        needs.step(optimizer, k, needs.grads)
    return result(optimizer)


@each_mode("groups")
@pytest.mark.in_turn("mode")
def test_every_group_has_options_of_its_own(cls: str, mode: str) -> None:
    assert_near(cls, grouped(optim, cls, modes(cls)[mode]), grouped(torch.optim, cls, loop(cls)))


MIXED = (torch.float64, torch.float32, torch.bfloat16)


def mixed(namespace: Any, cls: str, flags: Options) -> dict[torch.dtype, Result]:
    """What the parameters of each dtype come to, in one group: they all have the same problem."""
    needs = NEEDS[cls]
    count = len(needs.shapes)
    optimizer = make(namespace, cls, [p for dtype in MIXED for p in tensors(needs.shapes, dtype)], {**needs.options, **flags})
    for k in WINDOW:
        needs.step(optimizer, k, lambda p, k, i: needs.grads(p, k, i % count))
    made: dict[torch.dtype, Result] = {dtype: {} for dtype in MIXED}
    for name, x in result(optimizer).items():
        number, dot, field = name.partition(".")
        made[MIXED[int(number) // count]][f"{int(number) % count}{dot}{field}"] = x
    return made


@each_mode("mixed dtypes")
@pytest.mark.in_turn("mode")
def test_mixed_dtypes_in_a_group(cls: str, mode: str) -> None:
    theirs, made = mixed(torch.optim, cls, loop(cls)), mixed(optim, cls, modes(cls)[mode])
    assert_near(cls, made[torch.float64], theirs[torch.float64])
    assert_near(cls, made[torch.float32], theirs[torch.float32])
    others = [mixed(torch.optim, cls, modes(cls)[other])[torch.bfloat16] for other in modes(cls)]
    assert_as_precise(cls, made[torch.bfloat16], others, theirs[torch.float64], torch.bfloat16)


# --------------------------------------------------------------------------------------------------------------------- errors

Error = Any
"""One of torch's `ErrorOptimizerInput`s."""


TAKEN = {
    "lr as Tensor doesn't work with foreach & not capturable",
    "betas must be either both floats or both Tensors",
    r"betas\[0\] as a Tensor is not supported for capturable=False and foreach=True",
}
"""What torch refuses for want of an implementation: a number of ours may be a tensor, in every mode."""


def torchs_errors(cls: str, *, taken: bool) -> list[Error]:
    every = TABLE[cls].optim_error_inputs_func(device="cpu", dtype=torch.float32)
    return [error for error in every if (error.optimizer_error_input.desc in TAKEN) == taken]


def each_error(*, taken: bool) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("cls", "number"),
        [
            pytest.param(cls, n, id=f"{cls} {n} {error.optimizer_error_input.desc}")
            for cls in CLASSES
            for n, error in enumerate(torchs_errors(cls, taken=taken))
        ],
    )


def provoke(namespace: Any, cls: str, error: Error, params: Any, options: Options) -> None:
    optimizer = getattr(namespace, cls)(params, **options)
    if error.error_on.name == "STEP_ERROR":
        optimizer.step()


def culprits(cls: str, error: Error, params: Any) -> list[str]:
    """The options without any one of which torch would not have complained."""
    found = []
    options = error.optimizer_error_input.kwargs
    for name in options:
        try:
            provoke(torch.optim, cls, error, params, {k: v for k, v in options.items() if k != name})
        except error.error_type:
            continue
        found.append(name)
    return found


@each_error(taken=False)
def test_what_torch_refuses(cls: str, number: int) -> None:
    """The type is torch's, and the message is torch's or names the options, or else the parameter, that it is about."""
    error = torchs_errors(cls, taken=False)[number]
    given = error.optimizer_error_input
    params = tensors(NEEDS[cls].shapes, torch.float32) if given.params is None else given.params
    with pytest.raises(error.error_type, match=error.error_regex):
        provoke(torch.optim, cls, error, params, given.kwargs)
    with pytest.raises(error.error_type) as caught:
        provoke(optim, cls, error, params, given.kwargs)
    assert caught.type is error.error_type
    message = str(caught.value)
    named = [rf"\b{name}\b" for name in culprits(cls, error, params)] or ["'0'|param"]
    assert re.search(error.error_regex, message) or all(re.search(name, message) for name in named), message


@each_error(taken=True)
def test_what_only_torch_refuses(cls: str, number: int) -> None:
    """The tensors count as the numbers in them."""
    options = torchs_errors(cls, taken=True)[number].optimizer_error_input.kwargs
    theirs = trained(torch.optim, cls, {**as_floats(options), **loop(cls)}, torch.float32)
    assert_near(cls, trained(optim, cls, options, torch.float32), theirs)


# ----------------------------------------------------------------------------------------------------------------- signatures


def shape_of(signature: inspect.Signature) -> list[tuple[Any, ...]]:
    return [(p.name, p.kind, p.default) for p in signature.parameters.values()]


OWN = [("compile", inspect.Parameter.KEYWORD_ONLY, False)]
"""What our classes have beyond torch's arguments: at the end, and by name only."""

NOT_ELEMENTWISE = ("Adafactor", "LBFGS", "Muon", "SparseAdam")
"""There is nothing to compile in these."""


@pytest.mark.parametrize("cls", CLASSES)
def test_signatures_are_torchs(cls: str) -> None:
    theirs, ours = inspect.signature(getattr(torch.optim, cls)), inspect.signature(getattr(optim, cls))
    assert shape_of(ours) == shape_of(theirs) + (OWN if cls not in NOT_ELEMENTWISE else [])


def test_every_class_of_torch_is_here() -> None:
    assert set(CLASSES) == TABLE.keys()
