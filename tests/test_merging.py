"""Lines of a program that one of torch's kernels computes: which they are, and that nothing but the clock can tell."""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import purestep as ps
import purestep._executors.tiles
from purestep import optim
from purestep._core import threads
from purestep._trace import fused, program
from tests.problems import difference

SHAPES = [(3, 4), (5,), (), (1,), (70, 3), (0,)]


def draw(seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]


def train(t: ps.Transform, steps: int = 8, dtype: torch.dtype = torch.float64, **how: Any) -> Any:
    params = draw(0, dtype)
    state = t.init_state(params)
    for k in range(steps):
        params, state = t.step(draw(k + 1, dtype), state, params, **how)
    return params, state


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that were called."""
    made: list[str] = []
    for name in ("fused_adam_", "fused_sgd_"):
        original = getattr(fused, name)

        def spy(*args: Any, name: str = name, original: Any = original, **kwargs: Any) -> None:
            made.append(name)
            original(*args, **kwargs)

        monkeypatch.setattr(fused, name, spy)
    return made


ADAM: dict[str, ps.Transform] = {
    "rmsprop": ps.rmsprop(0.1),
    "rmsprop with momentum": ps.rmsprop(0.1, momentum=0.9),
    "rmsprop with decay": ps.rmsprop(0.1, weight_decay=0.1),
    "nadam": ps.nadam(0.1),
    "nadam with decay": ps.nadam(0.1, weight_decay=0.1),
    "radam": ps.radam(0.1),
    "radam after a sign": ps.chain(ps.scale(-1.0), ps.radam(0.1)),
    "ascent": ps.rmsprop(0.1, maximize=True),
    "the other way": ps.chain(ps.scale_by_rms(), ps.scale(0.1)),
    "after a whole transform": ps.chain(ps.clip_by_global_norm(1.0), ps.scale_by_nadam(), ps.scale_by_learning_rate(0.1)),
    "a schedule": ps.radam(ps.schedules.cosine(0.1, total_steps=10)),
}
SGD: dict[str, ps.Transform] = {
    "asgd": ps.asgd(0.1, lambd=0.1, t0=3),
    "nadam with decoupled decay": ps.nadam(0.1, weight_decay=0.1, decoupled_weight_decay=True),
}
HOWS: dict[str, dict[str, Any]] = {"pure": {}, "donated": {"donate": True}}


@pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)
@pytest.mark.parametrize("name", [*ADAM, *SGD])
@pytest.mark.parametrize("blocks", [False, True], ids=["whole", "blocks"])
def test_kernels_are_called_and_the_numbers_are_the_lines(
    name: str, how: dict[str, Any], blocks: bool, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    t = (ADAM | SGD)[name]
    expected = train(t, executor="foreach")
    assert not calls
    if blocks:
        monkeypatch.setattr(purestep._executors.tiles, "TILE", 32)
        monkeypatch.setattr(purestep._executors.tiles, "SIZE", 0)
    assert difference(train(t, **how), expected) <= 1e-13
    if name == "asgd" and not how:
        assert not calls  # three lines: to copy what the kernel overwrites costs more than it saves
        return
    kernel = "fused_sgd_" if name in SGD else "fused_adam_"
    assert len(calls) >= (3 if "radam" in name or "schedule" in name else 8)  # RAdam's first five steps are SGD
    assert set(calls) == {kernel}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["rmsprop", "nadam", "radam"])
def test_precision(name: str, dtype: torch.dtype) -> None:
    """No further from what float64 gives than line by line."""
    t = ADAM[name]
    params = [p.double() for p in draw(0, dtype)]
    state = t.init_state(params)
    for k in range(8):
        params, state = t.step([g.double() for g in draw(k + 1, dtype)], state, params, executor="leaf")

    def error(**how: Any) -> float:
        found, _ = train(t, dtype=dtype, donate=True, **how)
        assert all(x.dtype is dtype for x in found)
        return math.sqrt(sum(float((x.double() - y).square().sum()) for x, y in zip(found, params)))

    assert error() <= 1.1 * error(executor="foreach")


@pytest.mark.parametrize("name", [*ADAM, *SGD])
@pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)
def test_small_tensors_among_large_ones(name: str, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The small ones are given to a kernel by themselves, on one thread."""
    t = (ADAM | SGD)[name]
    expected = train(t, executor="foreach")
    monkeypatch.setattr(threads, "SERIAL", 10)
    monkeypatch.setattr(threads, "FEW", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert difference(train(t, **how), expected) <= 1e-13
    finally:
        torch.set_num_threads(before)


ODD: dict[str, ps.Transform] = {
    "no eps": ps.rmsprop(0.1, eps=0.0),
    "no memory": ps.rmsprop(0.1, alpha=0.0),
    "nothing but memory": ps.rmsprop(0.1, alpha=1.0),
    "a mean that forgets all": ps.nadam(0.1, betas=(0.0, 0.9)),
    "a step of nothing": ps.nadam(0.0),
    "a tensor": ps.nadam(torch.tensor(0.1, dtype=torch.float64)),
    "tensors": ps.rmsprop(0.1, alpha=torch.tensor(0.9, dtype=torch.float64), eps=torch.tensor(1e-3, dtype=torch.float64)),
    "a decay that is a tensor": ps.asgd(torch.tensor(0.1, dtype=torch.float64), lambd=torch.tensor(0.1, dtype=torch.float64)),
}


@pytest.mark.parametrize("name", ODD)
def test_hyperparameters_at_the_edge(name: str) -> None:
    t = ODD[name]
    assert difference(train(t, donate=True), train(t, executor="leaf")) <= 1e-13


@pytest.mark.parametrize("name", ["rmsprop", "nadam", "radam", "rmsprop with momentum"])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, 1e200])
def test_one_gradient_that_is_not_finite_spoils_its_own_number_only(name: str, bad: float) -> None:
    t = ADAM[name]
    results = []
    hows: list[dict[str, Any]] = [{"donate": True}, {"executor": "leaf"}]
    for how in hows:
        params, state = train(t)
        grads = draw(9)
        grads[0][1, 2] = bad
        kept = [g.clone() for g in grads]
        params, state = t.step(grads, state, params, **how)
        params, state = t.step(draw(10), state, params, **how)
        torch.testing.assert_close(grads, kept, rtol=0, atol=0, equal_nan=True)
        results.append(torch.utils._pytree.tree_leaves((params, state)))
    for x, y in zip(*results):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12, equal_nan=True)
    assert sum(int((~p.isfinite()).sum()) for p in results[0][: len(SHAPES)]) <= 1


def test_a_step_of_nothing_along_a_gradient_that_is_not_finite() -> None:
    """Line by line and as torch: 0 times infinity is NaN, also where a learning rate of 0 leaves all else what it is."""
    p = [torch.ones(2)]
    for executor in (None, "foreach"):
        t = ps.asgd(0.0, lambd=0.1)
        found, _ = t.step([torch.tensor([math.inf, 1.0])], t.init_state(p), [p[0].clone()], donate=True, executor=executor)
        assert found[0][0].isnan()
        assert found[0][1] == 1.0


def test_nothing_given_is_changed() -> None:
    for t in [*ADAM.values(), *SGD.values()]:
        params, state = train(t)
        given = (draw(9), state, params)
        before = copy.deepcopy(given)
        t.step(*given)
        t.update(*given)
        assert difference(given, before) == 0
        t.step(*given, donate=True)
        assert difference(given[0], before[0]) == 0


@pytest.mark.parametrize("in_one_piece", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_tensors_that_a_kernel_may_not_be_given(in_one_piece: bool, dtype: torch.dtype, calls: list[str]) -> None:
    x = torch.randn(3, 4, dtype=dtype)
    params = [x if in_one_piece else x.T]
    grads = [p * 0.5 for p in params]
    t = ps.nadam(0.1)
    found, expected = [t.step(grads, t.init_state(params), params, executor=how)[0][0] for how in (None, "leaf")]
    assert (found - expected).abs().max() <= 1e-14
    assert bool(calls) == in_one_piece  # complex ones as pairs of reals


def test_an_optimizer_and_a_subclass(calls: list[str]) -> None:
    class Odd(Tensor):
        pass

    for make in (lambda x: torch.nn.Parameter(x), lambda x: x.as_subclass(Odd)):
        ours, theirs = [make(x) for x in draw(0)], [torch.nn.Parameter(x) for x in draw(0)]
        pair = optim.RAdam(ours, 0.1), torch.optim.RAdam(theirs, 0.1)
        for k in range(8):
            for optimizer, params in zip(pair, (ours, theirs)):
                for p, g in zip(params, draw(k + 1)):
                    p.grad = g
                optimizer.step()
        assert difference([p.detach().as_subclass(Tensor) for p in ours], [p.detach() for p in theirs]) <= 1e-12
    assert len(calls) == 3


# ------------------------------------------------------------------------------------------- lines that must stay where they are


class Two(NamedTuple):
    m: Tensor
    v: Tensor

    @classmethod
    def init(cls, p: Tensor) -> Two:
        return cls(torch.zeros_like(p), torch.ones_like(p))


def usual(g: Tensor, s: Two, p: Tensor, b: float) -> tuple[Tensor, Two]:
    m = ps.lerp(s.m, g, 1 - b)
    v = s.v * b + g * g * (1 - b)
    return -0.1 * (m / (ps.root(v) + 1e-3)), Two(m, v)


def gradient_of_our_own(g: Tensor, s: Two, p: Tensor, b: float) -> tuple[Tensor, Two]:
    """The last line that reads the gradient could overwrite it, but the kernel still needs it."""
    g = g + 0.1 * p
    v = s.v * b + g * g * (1 - b)
    return -0.1 * ((g * 2 + s.m) / (ps.root(v) + 1e-3)), Two(s.m * b, v)


def squares_read_elsewhere(g: Tensor, s: Two, p: Tensor, b: float) -> tuple[Tensor, Two]:
    v = s.v * b + g * g * (1 - b)
    return -0.1 * (s.m / (ps.root(v) + 1e-3)), Two(s.m + v, v)


def old_squares_read_late(g: Tensor, s: Two, p: Tensor, b: float) -> tuple[Tensor, Two]:
    v = s.v * b + g * g * (1 - b)
    return -0.1 * ((g + s.v) / (ps.root(v) + 1e-3)), Two(s.m + s.v, v)


def a_state_as_direction(g: Tensor, s: Two, p: Tensor, b: float) -> tuple[Tensor, Two]:
    """The kernel would write on the direction, if only the same numbers."""
    m = s.m + g * 2
    v = s.v * b + g * g * (1 - b)
    return -0.1 * (m / (ps.root(v) + 1e-3)), Two(m, v)


def mean_read_elsewhere(g: Tensor, s: Two, p: Tensor, b: float) -> tuple[Tensor, Two]:
    m = ps.lerp(s.m, g, 1 - b)
    v = s.v * b + g * g * (1 - b)
    return -0.1 * (m / (ps.root(v) + 1e-3)) + m * 0.01, Two(m, v)


def other_weights(g: Tensor, s: Two, p: Tensor, b: float) -> tuple[Tensor, Two]:
    """1 - b/2 does not go with b."""
    m = ps.lerp(s.m, g, 1 - b)
    v = s.v * b + g * g * (1 - 0.5 * b)
    return -0.1 * (m / (ps.root(v) + 1e-3)), Two(m, v)


def other_gradients(g: Tensor, s: Two, p: Tensor, b: float) -> tuple[Tensor, Two]:
    m = ps.lerp(s.m, g * 3, 1 - b)
    h = g - m
    v = s.v * b + h * h * (1 - b)
    return -0.1 * (m / (ps.root(v) + 1e-3)), Two(m, v)


def scaled_inside_and_out(g: Tensor, s: Two, p: Tensor, b: float) -> tuple[Tensor, Two]:
    m = ps.lerp(s.m, g, 1 - b)
    v = s.v * b + g * g * (1 - b)
    return -0.1 * (m / (ps.root(v * 2.0) / 3.0 + 1e-3)), Two(m, v)


def squares_changed_afterwards(g: Tensor, s: Two, p: Tensor, b: float) -> tuple[Tensor, Two]:
    """What is kept is made of the squares before the step is."""
    v = s.v * b + g * g * (1 - b)
    d = ps.root(v) + 1e-3
    return -0.1 * ((g + s.m) / d), Two(s.m * b, v * 0.5)


def mean_changed_afterwards(g: Tensor, s: Two, p: Tensor, b: float) -> tuple[Tensor, Two]:
    m = ps.lerp(s.m, g, 1 - b)
    v = s.v * b + g * g * (1 - b)
    kept = m * 0.5
    return -0.1 * (m / (ps.root(v) + 1e-3)), Two(kept, v)


def mean_from_a_temporary(g: Tensor, s: Two, p: Tensor, b: float) -> tuple[Tensor, Two]:
    """Read by two lines, and nothing that is kept."""
    m = ps.lerp(s.m * 0.9 + 0.1, g, 1 - b)
    v = s.v * b + g * g * (1 - b)
    other = torch.sign(m)
    return -0.1 * (m / (ps.root(v) + 1e-3)), Two(other, v)


def a_buffer_as_gradient(g: Tensor, s: Two, p: Tensor, b: float) -> tuple[Tensor, Two]:
    """What is squared is kept, and changed after it."""
    m = s.m * b + g
    v = s.v * b + m * m * (1 - b)
    return -0.1 * ((m + g) / (ps.root(v) + 1e-3)), Two(m * 0.5, v)


def two_at_once(g: Tensor, s: Two, p: Tensor, b: float) -> tuple[Tensor, Two]:
    """Two steps, the second along the first's squares."""
    v = s.v * b + g * g * (1 - b)
    m = s.m - 0.1 * (g / (ps.root(v) + 1e-3))
    return -0.1 * (g + 0.5 * p) + 0.0 * m, Two(m, v)


def kernel_after_kernel(g: Tensor, s: Two, p: Tensor, b: float) -> tuple[Tensor, Two]:
    """The second kernel's gradient is what the first kernel has made."""
    v = s.v * b + g * g * (1 - b)
    u = p * 2.0 + 0.1 * (g / (ps.root(v) + 1e-3))
    m = s.m * b + u * u * (1 - b)
    return -0.1 * (u / (ps.root(m) + 1e-3)), Two(m, v)


def two_roots_of_the_same_squares(g: Tensor, s: Two, p: Tensor, b: float) -> tuple[Tensor, Two]:
    """One kernel updates the squares; the second step finds them updated."""
    v = s.v * b + g * g * (1 - b)
    u = p * 2.0 + 0.1 * (g / (ps.root(v) + 1e-3))
    return u - 0.1 * (g / (ps.root(v * 3.0) + 1e-3)), Two(s.m, v)


LEAVES: dict[Any, bool] = {
    usual: True,
    gradient_of_our_own: True,
    squares_read_elsewhere: False,
    old_squares_read_late: False,
    a_state_as_direction: False,
    mean_read_elsewhere: False,
    other_weights: False,
    other_gradients: False,
    scaled_inside_and_out: True,
    squares_changed_afterwards: False,
    mean_changed_afterwards: False,
    mean_from_a_temporary: False,
    a_buffer_as_gradient: True,
    two_at_once: True,
    kernel_after_kernel: True,
    two_roots_of_the_same_squares: True,
}


@pytest.mark.parametrize("leaf", LEAVES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("own", [False, True], ids=["the caller's gradients", "our own"])
def test_what_may_be_merged(leaf: Any, own: bool, calls: list[str]) -> None:
    t: ps.Transform = ps.leafwise(Two)(leaf)(0.9)
    if own:
        t = ps.chain(ps.clip_by_global_norm(0.5), t)
    for how in HOWS.values():
        assert difference(train(t, **how), train(t, executor="leaf")) <= 1e-13
    assert bool(calls) == LEAVES[leaf]


def test_the_program() -> None:
    """What the kernel is asked for stands in the source."""
    t = ps.radam(0.1)
    train(t, donate=True)
    found = [p for p in program._programs.entries.values() if p.merged and p.parts[0] == "scale_by_radam"]
    lines = [line.strip() for line in found[0].source.splitlines()]
    assert [x for x in lines if x.startswith("adam_(p, g, exp_avg, exp_avg_sq, betas_0, betas_1, ")]
    assert not [x for x in lines if x.startswith(("lerp_", "mul_", "addcmul_", "addcdiv_"))]


def test_a_mean_that_nearly_stays() -> None:
    """The weight of `NEARLY` changes no number, and corrects no bias."""
    assert fused.NEARLY < 1
    assert 1 - fused.NEARLY ** float(fused.MANY) == 1  # exactly: exp(-128) is lost next to it
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(x + (1 - fused.NEARLY) * (x.flip(0) - x), x)
