"""Generated chains on generated parameters: what must hold of every transform, in every mode.

* Pure: no input is written to (values and version counters), and results share no memory with gradients, state or parameters.
* All executors agree, pure and donated, NaN for NaN, within the rounding of the dtype.
* `step` is `update` and `apply_updates`.
* `torch.func.vmap` is a loop over the members.
* A pickled transform with a pickled state continues as the original.

`PURESTEP_EXAMPLES=k` tries k times as many chains as the test command does; `PURESTEP_SEED=n` makes them from another seed.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import os
import pickle
import re
from collections.abc import Callable
from typing import Any

import hypothesis
import hypothesis.strategies as st
import torch
from hypothesis import HealthCheck, Phase, given, settings
from torch import Tensor
from torch.utils import _pytree as pytree

import purestep as ps
from purestep import optim

EXAMPLES = int(os.environ.get("PURESTEP_EXAMPLES", "1"))

Make = Callable[[], ps.Transform]

LINKS: dict[str, Make] = {
    "trace": lambda: ps.trace(0.9),
    "nesterov": lambda: ps.nesterov(0.5),
    "trace, off": lambda: ps.trace(0.0),
    "adam": lambda: ps.scale_by_adam(eps=1e-3),
    "amsgrad": lambda: ps.scale_by_amsgrad(eps=1e-3),
    "rms": lambda: ps.scale_by_rms(eps=1e-3),
    "decay": lambda: ps.add_decayed_weights(0.1),
    "decay, off": lambda: ps.add_decayed_weights(0.0),
    "decay, matrices": lambda: ps.add_decayed_weights(0.1, mask=ps.by_ndim({2: True}, default=False)),
    "scale": lambda: ps.scale(0.5),
    "schedule": lambda: ps.scale_by_learning_rate(lambda step: 0.5 / (step + 1)),
    "clip": lambda: ps.clip(0.5),
    "clip by norm": lambda: ps.clip_by_norm(0.5),
    "ema": lambda: ps.ema(0.9),
    "maximize": lambda: ps.maximize(),
    "zero nans": lambda: ps.zero_nans(),
    "noise": lambda: ps.add_noise(0.1, 0.5, seed=1),
    "average": lambda: ps.ema_params(0.9),
    "mean": lambda: ps.average_params(start=1),
    "identity": lambda: ps.chain(),
    "zero": lambda: ps.set_to_zero(),
    "trust": lambda: ps.scale_by_trust_ratio(eps=1e-3),
    "global norm": lambda: ps.clip_by_global_norm(0.5),
    "normalize": lambda: ps.normalize(),
}
OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda: ps.sgd(0.1),
    "sgd, momentum": lambda: ps.sgd(0.1, momentum=0.9, dampening=0.1, weight_decay=0.1),
    "sgd, nesterov": lambda: ps.sgd(0.1, momentum=0.9, nesterov=True, maximize=True),
    "adamw": lambda: ps.adamw(0.01, eps=1e-3),
    "adam": lambda: ps.adam(0.01, eps=1e-3, weight_decay=0.1, amsgrad=True),
    "nadam": lambda: ps.nadam(0.01, eps=1e-3),
    "radam": lambda: ps.radam(0.01, eps=1e-3),
    "rmsprop": lambda: ps.rmsprop(0.01, eps=1e-3, centered=True, momentum=0.5),
    "adagrad": lambda: ps.adagrad(0.1, eps=1e-3),
    "adamax": lambda: ps.adamax(0.01, eps=1e-3),
    "asgd": lambda: ps.asgd(0.1, t0=1.0),
    "adadelta": lambda: ps.adadelta(1.0, eps=1e-3),
    "lion": lambda: ps.lion(0.01),
    "adan": lambda: ps.adan(0.01, eps=1e-3),
    "madgrad": lambda: ps.madgrad(0.01, eps=1e-3),
    "dog": lambda: ps.dog(),
    "prodigy": lambda: ps.prodigy(),
    "schedule free": lambda: ps.schedule_free_adamw(0.01, eps=1e-3),
    "quantized": lambda: ps.quantize_state(ps.adam(0.01, eps=1e-3), bits=16),
    "frozen": lambda: ps.freeze(),
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A transform, and how it was made."""

    text: str
    make: Make

    def __repr__(self) -> str:
        return self.text


def picked(table: dict[str, Make]) -> st.SearchStrategy[Recipe]:
    return st.sampled_from(sorted(table)).map(lambda name: Recipe(name, table[name]))


def chained(parts: list[Recipe]) -> Recipe:
    return Recipe(f"chain({', '.join(map(repr, parts))})", lambda: ps.chain(*[p.make() for p in parts]))


MASKS: dict[str, Any] = {
    "all": True,
    "none": False,
    "some": lambda path, p: path.endswith(("0", "3", "6")),
    "matrices": lambda path, p: p.ndim == 2,
}


def masked(inner: Recipe, mask: str) -> Recipe:
    return Recipe(f"masked({inner}, {mask})", lambda: ps.masked(inner.make(), MASKS[mask]))


def partitioned(a: Recipe, b: Recipe) -> Recipe:
    labels = lambda path, p: "a" if path.endswith(("0", "2", "4")) else "b"  # noqa: E731
    return Recipe(f"partition({a}, {b})", lambda: ps.partition({"a": a.make(), "b": b.make()}, Labels(labels)))


class Labels:
    """A function that pickles."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, path: str, p: Tensor) -> str:
        return "a" if path.endswith(("0", "2", "4")) else "b"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Labels)

    def __hash__(self) -> int:
        return 0

    def __reduce__(self) -> Any:
        return Labels, (None,)


AROUND: dict[str, Callable[[ps.Transform], ps.Transform]] = {
    "skip": ps.skip_if_nonfinite,
    "accumulate": lambda t: ps.accumulate(t, 2),
    "sum": lambda t: ps.accumulate(t, 1, average=False),
    "every other": lambda t: ps.conditionally(every_other, t),
    "or zero": lambda t: ps.conditionally(every_other, t, otherwise="zero"),
}


def every_other(step: Any) -> Any:
    return step % 2 == 0


def around(inner: Recipe, name: str) -> Recipe:
    return Recipe(f"{name}({inner})", lambda: AROUND[name](inner.make()))


def deeper(inner: st.SearchStrategy[Recipe]) -> st.SearchStrategy[Recipe]:
    return st.one_of(
        st.lists(inner, min_size=1, max_size=4).map(chained),
        st.builds(masked, inner, st.sampled_from(sorted(MASKS))),
        st.builds(partitioned, inner, inner),
        st.builds(around, inner, st.sampled_from(sorted(AROUND))),
    )


TRANSFORMS = st.recursive(st.one_of(picked(LINKS), picked(OPTIMIZERS), picked(LINKS)), deeper, max_leaves=6)

SHAPES: dict[str, list[tuple[int, ...]]] = {
    "one": [(3, 2)],
    "few": [(3, 2), (4,), (), (2, 2, 2), (0, 3)],
    "many": [(3, 2), (4,), (), (2, 2)] * 5,
    "large": [(700, 800), (3,), (30, 40)],
}
SPECIAL = [torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 1e-310, HUGE := 1e150]
"""With 1e150 squares are finite. Of 1e300 they are not, and inf - (1e300)^2 is NaN, or inf where it is one fused operation."""


@functools.lru_cache(maxsize=16)
def drawn(shapes: str, dtype: torch.dtype, seed: int) -> list[Tensor]:
    """Random tensors, to be copied: an example asks for the same ones some twenty times."""
    g = torch.Generator().manual_seed(seed)
    made_as = torch.complex128 if dtype.is_complex else torch.float64
    return [torch.randn(shape, generator=g, dtype=made_as).to(dtype) for shape in SHAPES[shapes]]


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a transform is run on."""

    shapes: str
    dtype: torch.dtype
    tree: str
    seed: int
    missing: int
    layout: str
    special: float | None

    def tensors(self, seed: int) -> list[Tensor]:
        made = []
        for x in drawn(self.shapes, self.dtype, self.seed + seed):
            x = x.clone()
            x = x.transpose(0, -1).contiguous().transpose(0, -1) if self.layout == "transposed" and x.dim() > 1 else x
            x = torch.stack([x, x], -1)[..., 0] if self.layout == "strided" else x
            made.append(x)
        return made

    def put(self, xs: list[Any]) -> Any:
        """As a pytree."""
        if self.tree == "list":
            return list(xs)
        if self.tree == "nested":
            return {"a": {f"p{k}": x for k, x in enumerate(xs[::2])}, "b": [*xs[1::2]]}
        return {f"p{k}": x for k, x in enumerate(xs)}

    def params(self) -> Any:
        return self.put(self.tensors(0))

    def grads(self, step: int) -> Any:
        found: list[Any] = self.tensors(step + 1)
        if self.special is not None and step == 1 and found[0].numel():
            found[0][tuple([-1] * found[0].dim())] = torch.tensor(self.special, dtype=torch.float64).to(self.dtype)
        if self.missing >= 0 and len(found) > 1:
            found[self.missing % len(found)] = None
        return self.put(found)


SETTINGS = st.builds(
    Setting,
    shapes=st.sampled_from(["one", "few", "few", "many", "many", "large"]),
    dtype=st.sampled_from([torch.float64] * 3 + [torch.float32, torch.bfloat16, torch.float16, torch.complex128]),
    tree=st.sampled_from(["dict", "list", "nested"]),
    seed=st.integers(0, 2**16),
    missing=st.integers(-3, 7),
    layout=st.sampled_from(["contiguous", "contiguous", "transposed", "strided"]),
    special=st.sampled_from([None, None, *SPECIAL]),
)


def memory(tree: Any) -> set[int]:
    return {x.untyped_storage().data_ptr() for x in pytree.tree_leaves(tree) if isinstance(x, Tensor) and x.numel()}


def snapshot(tree: Any) -> list[tuple[Tensor, Tensor, int]]:
    return [(x, x.clone(), x._version) for x in pytree.tree_leaves(tree) if isinstance(x, Tensor)]


def same_bits(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | ((a != a) & (b != b))).all())


TOLERANCE = {torch.float64: 1e-8, torch.complex128: 1e-8, torch.float32: 2e-3, torch.bfloat16: 0.25, torch.float16: 0.1}
"""By how much executors may differ, of the largest number. In 16 bits a rounding can turn a sign or a threshold."""


WEIGHED = {"asgd", "average", "mean", "lookahead", "schedule free"}
"""Their means have weights from 0.5 to 1, and these are numbers for one executor and tensors for another: torch.lerp(x, inf, w)
is NaN for such a number, and x + w (inf - x) is inf."""

NORMALIZING = {*OPTIMIZERS, "adam", "amsgrad", "rms", "trust"} - {"sgd", "sgd, momentum", "sgd, nesterov", "frozen"}
"""They divide by what they have seen. In 16 bits the squares of small updates vanish in one order of rounding and not in
another, and a parameter that is moved by its own size becomes 0 or almost, where the trust ratio of 0 is 1. So of two in a row
nothing but shapes and dtypes is compared."""


SIGNS = {"lion"}
"""Rounding decides the sign of a few of many numbers."""


def close(found: Any, expected: Any, on: Setting, what: str, recipe: Recipe) -> None:
    names = re.split(r"[()]|, (?![a-z ]*\b(?:off|momentum|nesterov|matrices)\b)", recipe.text)
    dtype = on.dtype
    ill = torch.finfo(dtype).bits <= 16 and sum(name in NORMALIZING for name in names) > 1
    infinite = not WEIGHED.isdisjoint(names)
    xs, spec = pytree.tree_flatten(found)
    ys, other = pytree.tree_flatten(expected)
    assert spec == other, what
    for x, y in zip(xs, ys):
        if not isinstance(x, Tensor):
            assert x == y, what
            continue
        assert (x.shape, x.dtype) == (y.shape, y.dtype), what
        if ill or not x.numel() or torch.equal(x, y):
            continue
        a, b = (z.to(torch.complex128 if z.is_complex() else torch.float64) for z in (x, y))
        if not b.is_complex() and torch.finfo(dtype).bits > 16:
            same = torch.equal(a.isfinite(), b.isfinite()) if infinite else torch.equal(a.isnan(), b.isnan())
            assert same, f"{what}: NaN for NaN\n{x}\n{y}"
        if b.is_complex() and on.special is not None and not math.isfinite(on.special):
            continue  # (inf + 0j) / 2 has a NaN in it, or not, as the division is written
        if on.special == HUGE:  # beside it, and in differences of two that are huge, all other numbers are rounding
            continue
        finite = a.abs().isfinite() & b.abs().isfinite()
        size = b[finite].abs().max().clamp(min=1.0) if finite.any() else 1.0
        error = (a - b)[finite].abs()
        worst = error.max() if error.numel() else 0.0
        if not SIGNS.isdisjoint(names) and (error > TOLERANCE[dtype] * size).sum() <= 1e-3 * error.numel():
            continue
        assert worst <= TOLERANCE[dtype] * size, f"{what}: differs by {worst}\n{x}\n{y}"


def run(opt: ps.Transform, on: Setting, steps: int, **options: Any) -> Any:
    params = on.params()
    state = opt.init_state(params)
    for k in range(steps):
        params, state = opt.step(on.grads(k), state, params, **options)
    return params, state


STEPS = 3


def tried(recipe: Recipe, on: Setting) -> ps.Transform | None:
    """The transform, if it can be made and run on these parameters at all; what refuses them says so by a clean error."""
    try:
        opt = recipe.make()
        run(opt, on, 1, executor="leaf")
    except (ValueError, TypeError, RuntimeError) as error:
        if not any(word in str(error) for word in ("complex", "label", "No parameter")):
            raise
        return None
    return opt


GENERATED = settings(
    max_examples=60 * EXAMPLES, deadline=None, derandomize="PURESTEP_SEED" not in os.environ, database=None,
    suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate, Phase.shrink], print_blob=True,
)  # fmt: skip


def generated(test: Any) -> Any:
    """With the settings of this file, from the seed in PURESTEP_SEED where there is one."""
    test = GENERATED(test)
    return hypothesis.seed(int(os.environ["PURESTEP_SEED"]))(test) if "PURESTEP_SEED" in os.environ else test


@generated
@given(recipe=TRANSFORMS, on=SETTINGS)
def test_a_pure_step_writes_nothing_and_hands_out_nothing(recipe: Recipe, on: Setting) -> None:
    opt = tried(recipe, on)
    if opt is None:
        return
    for executor in (None, "foreach", "leaf"):
        params = on.params()
        state = opt.init_state(params)
        for k in range(STEPS):
            grads = on.grads(k)
            before = snapshot((grads, state, params))
            updates, after = opt.update(grads, state, params, executor=executor)
            new, newer = opt.step(grads, state, params, executor=executor)
            for x, value, version in before:
                assert x._version == version
                assert same_bits(x, value)
            assert memory((new, newer)).isdisjoint(memory((grads, state, params)))
            assert memory((updates, after)).isdisjoint(memory((grads, state, params)))
            assert memory(updates).isdisjoint(memory(after))
            applied = ps.apply_updates(params, updates)
            close(applied, new, on, f"{executor}: update and apply_updates", recipe)
            params, state = new, newer


@generated
@given(recipe=TRANSFORMS, on=SETTINGS)
def test_all_executors_agree(recipe: Recipe, on: Setting) -> None:
    opt = tried(recipe, on)
    if opt is None:
        return
    expected = run(opt, on, STEPS, executor="leaf")
    for executor in (None, "foreach", "leaf"):
        for donate in (False, True):
            close(run(opt, on, STEPS, executor=executor, donate=donate), expected, on, f"{executor}, {donate=}", recipe)


@generated
@given(recipe=TRANSFORMS, on=SETTINGS)
def test_an_optimizer_takes_the_same_steps(recipe: Recipe, on: Setting) -> None:
    opt = tried(recipe, on)
    if opt is None or on.tree == "nested":
        return
    if "noise" in recipe.text and "partition" in recipe.text:
        return  # the optimizer numbers parameters group by group: `test_an_optimizer_numbers_parameters_group_by_group`
    expected, _ = run(opt, on, STEPS, executor="leaf")
    for flags in ({}, {"foreach": True}, {"foreach": False}):
        params = [torch.nn.Parameter(p) for p in on.tensors(0)]
        named = [(f"p{k}", p) for k, p in enumerate(params)]
        try:
            optimizer = optim.Optimizer(named if on.tree == "dict" else params, recipe.make(), **flags)
        except ValueError as error:  # a partition in which a label is not used
            if "label" not in str(error):
                raise
            return
        for k in range(STEPS):
            if k == 2:
                optimizer, params = copy.deepcopy((optimizer, params))
            for p, g in zip(params, pytree.tree_leaves(on.grads(k))):
                p.grad = g
            optimizer.step()
        close([p.detach() for p in params], pytree.tree_leaves(expected), on, f"{flags}", recipe)


@generated
@given(recipe=TRANSFORMS, on=SETTINGS)
def test_pickled_it_continues(recipe: Recipe, on: Setting) -> None:
    opt = tried(recipe, on)
    if opt is None:
        return
    params, state = run(opt, on, 2)
    try:
        other, again = pickle.loads(pickle.dumps((opt, state)))
    except (pickle.PicklingError, AttributeError):  # a lambda in it
        other, again = opt, pickle.loads(pickle.dumps(state))
    close(other.step(on.grads(2), again, params), opt.step(on.grads(2), state, params), on, "pickled", recipe)


@generated
@given(recipe=TRANSFORMS, on=SETTINGS.filter(lambda s: s.shapes in ("one", "few") and torch.finfo(s.dtype).bits > 16))
def test_a_batch_is_a_loop(recipe: Recipe, on: Setting) -> None:
    on = dataclasses.replace(on, missing=-1)
    opt = tried(recipe, on)
    if opt is None or "noise" in recipe.text:
        return
    members = [dataclasses.replace(on, seed=on.seed + 1000 * m) for m in range(2)]
    stack = lambda trees: pytree.tree_map(lambda *xs: torch.stack(xs), *trees)  # noqa: E731
    params = stack([m.params() for m in members])
    one = opt.init_state(members[0].params())
    dims = ps.out_dims(one)
    state = torch.func.vmap(opt.init_state, out_dims=dims)(params)
    for k in range(2):
        grads = stack([m.grads(k) for m in members])
        params, state = torch.func.vmap(opt.step, in_dims=(0, dims, 0), out_dims=(0, dims))(grads, state, params)
    for m, member in enumerate(members):
        expected, _ = run(opt, member, 2)
        close(pytree.tree_map(lambda x, m=m: x[m], params), expected, on, f"member {m}", recipe)
