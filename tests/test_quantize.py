"""States in few bits: what each number becomes, and that nothing but the state knows of it."""

from __future__ import annotations

import copy
import pickle
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import purestep as ps
from purestep import optim
from purestep._executors.tiles import TILE
from purestep.transforms.quantize import BLOCK, code, decoded, dynamic_tree, encoded, rounded, scale_of
from tests.problems import difference

CPU = torch.device("cpu")


def there_and_back(x: Tensor, signed: bool) -> Tensor:
    scale = scale_of(x)
    return decoded(encoded(x, scale, signed), scale, x, signed)


def nearest(x: Tensor, signed: bool) -> Tensor:
    """The same by looking at all 256 numbers."""
    values = torch.tensor(dynamic_tree(signed), dtype=torch.float64)
    parts = []
    for block in x.reshape(-1).split(BLOCK):
        scale = block[block.abs().argmax()].double()
        relative = block.double() / scale if scale else torch.zeros_like(block).double()
        parts.append(values[(relative[:, None] - values).abs().argmin(1)] * scale)
    return torch.cat(parts).reshape(x.shape).to(x.dtype)


# ------------------------------------------------------------------------------------------------------------ eight bits


@pytest.mark.parametrize("signed", [True, False])
def test_the_code_is_a_dynamic_tree(signed: bool) -> None:
    """256 numbers: 0, 1, and in each of seven decades twice as many as in the one below it, evenly spaced."""
    values = dynamic_tree(signed)
    assert len(set(values)) == 256
    assert (0.0 in values, 1.0 in values, -1.0 in values) == (True, True, False)
    for k in range(7):
        inside = torch.tensor([v for v in values if 10.0 ** (k - 7) < v < 10.0 ** (k - 6)], dtype=torch.float64)
        assert len(inside) == 2 ** (k if signed else k + 1)
        if len(inside) > 2:
            torch.testing.assert_close(inside.diff(), inside.diff().mean().expand(len(inside) - 1))
    assert code(signed, CPU).nearest[2**15] == values.index(0.0)  # of the float16 whose bits are 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", [(2048,), (37, 19), (3, 5, 7), (1,)], ids=str)
def test_the_nearest_code(signed: bool, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """To the precision of float16, in which the nearest is looked up; the largest of each block to the last bit."""
    x = torch.randn(shape, dtype=dtype) * 10.0 ** (-4 * torch.rand(shape, dtype=dtype))
    x = x if signed else x * x
    found, wanted = there_and_back(x, signed), nearest(x, signed)
    assert found.dtype == dtype
    assert found.shape == x.shape
    assert (found - wanted).abs().gt(1e-5 * wanted.abs()).double().mean() <= 0.01  # between two codes
    assert ((found - x).abs() <= (wanted - x).abs() + 2e-3 * x.abs() + 1e-7 * x.abs().max()).all()
    for a, b in zip(x.reshape(-1).split(BLOCK), found.reshape(-1).split(BLOCK)):
        assert b[a.abs().argmax()] == a[a.abs().argmax()]
    torch.testing.assert_close(there_and_back(found, signed), found, rtol=1e-6, atol=0)  # what has been encoded once stays


def test_zeros_infinities_and_nans() -> None:
    x = torch.zeros(3 * BLOCK)
    x[BLOCK], x[2 * BLOCK], x[2 * BLOCK + 1] = float("nan"), float("inf"), 1.0
    zero, nan, inf = there_and_back(x, True).split(BLOCK)
    assert not zero.any()
    assert nan.isnan().all()
    assert not inf.isfinite().any()


def test_adamw_in_eight_bits_is_adamw_between_encodings() -> None:
    """Against the equations, with every code looked for among all 256; few differ, where two are as near."""
    lr, b1, b2, eps, decay = 0.01, 0.9, 0.99, 1e-3, 0.1
    p = q = r = torch.randn(30, 30, dtype=torch.float64)
    m = v = torch.zeros_like(p)
    plain = ps.adamw(lr, (b1, b2), eps, decay)
    opt = ps.quantize_state(plain, min_size=0)
    state, other = opt.init_state(p), plain.init_state(r)
    for t in range(1, 11):
        g = torch.randn_like(p)
        p, state = opt.step(g, state, p)
        r, other = plain.step(g, other, r)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        q = (1 - lr * decay) * q - lr * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps)
        m, v = nearest(m, True), nearest(v, False)
    assert (p - q).abs().mean() <= 0.15 * (r - q).abs().mean()
    full = ps.find(ps.dequantize_state(state), ps.AdamState)
    assert (full.exp_avg - m).abs().gt(1e-6).double().mean() <= 0.1


# ---------------------------------------------------------------------------------------------------------- sixteen bits


def test_rounding_is_right_in_the_mean() -> None:
    x = torch.randn(500) * 10.0 ** (4 * torch.rand(500) - 2)
    many = 20_000
    mean = sum(rounded(x, float(t)).double() for t in range(many)) / many
    distance = 2.0 ** (torch.frexp(x)[1].double() - 8)
    assert ((mean - x).abs() / distance).max() <= 5 * 0.5 / many**0.5  # five standard deviations
    assert ((rounded(x, 3.0).double() - x).abs() < distance).all()


def test_a_mean_that_moves_slowly_is_right_in_the_mean() -> None:
    """Each change is a small part of the distance to the next number. With digits that are too even it would come too soon."""
    base = torch.rand(4096, generator=torch.Generator().manual_seed(0)) + 0.5
    p = torch.zeros(4096)
    plain, quantized = ps.scale_by_adam(), ps.quantize_state(ps.scale_by_adam(), bits=16)
    states = [opt.init_state(p) for opt in (plain, quantized)]
    for k in range(400):
        g = base * (1.0 if k < 200 else 0.5)
        states = [opt.update(g, s, p, donate=True)[1] for opt, s in zip((plain, quantized), states)]
    exact, found = (ps.find(ps.dequantize_state(s), ps.AdamState) for s in states)
    for name in ("exp_avg", "exp_avg_sq"):
        x, y = getattr(exact, name), getattr(found, name)
        assert abs((y / x).double().mean().item() - 1) <= 2e-3


def test_rounding_differs_from_number_to_number() -> None:
    """Of many numbers between the same two, as many go up as they are above the lower one."""
    x = 1.0 + torch.rand(100_000) * 2.0**-7
    up = rounded(x, 5.0).float() - 1.0 > 0
    share = (x - 1.0) * 2.0**7
    for k in range(10):
        chosen = (share >= k / 10) & (share < (k + 1) / 10)
        assert abs(up[chosen].double().mean().item() - (k + 0.5) / 10) <= 0.02


def test_what_has_a_place_in_bfloat16_stays() -> None:
    x = torch.cat([torch.randn(100).bfloat16().float(), torch.tensor([0.0, -0.0, float("inf"), -float("inf")])])
    for t in range(50):
        assert torch.equal(rounded(x, float(t)).float(), x)
    nans = torch.tensor([0x7FFFFFFF, 0x7FC00000, -1, -(2**22)], dtype=torch.int32).view(torch.float32)  # of GPUs and of CPUs
    for t in range(50):
        assert rounded(nans, float(t)).isnan().all()


def test_a_counter_may_be_a_tensor() -> None:
    x = torch.randn(1000)
    for t in (0, 1, 7, 2**20 + 3):
        for dtype in (torch.float32, torch.float64):
            assert torch.equal(rounded(x, float(t)), rounded(x, torch.tensor(float(t), dtype=dtype)))


# ------------------------------------------------------------------------------------------------------------ everywhere


BITS = pytest.mark.parametrize("bits", [8, 16])


@BITS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("apply", [True, False])
def test_in_blocks_as_in_one_piece(bits: Any, dtype: torch.dtype, apply: bool) -> None:
    """Large tensors, of sizes that no block divides, give the same bits donated, pure, and one by one."""
    params = {
        "a": torch.randn(TILE + 1000, 3, dtype=dtype),
        "b": torch.randn(777, dtype=dtype),
        "c": torch.randn(5000, dtype=dtype),
    }
    opt = ps.quantize_state(ps.adamw(0.01), bits)
    found = []
    for options in ({}, {"donate": True}, {"executor": "leaf"}):
        torch.manual_seed(0)
        p, state = copy.deepcopy(params), opt.init_state(params)
        for _ in range(3):
            g = {k: torch.randn_like(x) for k, x in p.items()}
            u, state = (opt.step if apply else opt.update)(g, state, p, **options)
            p = u if apply else ps.apply_updates(p, u)
        found.append((p, state))
    tolerance = 1e-6 if dtype == torch.float32 else 1e-13
    assert difference(found[1], found[0]) == 0
    assert difference(found[2][0], found[0][0]) <= 100 * tolerance
    assert type(found[0][1][0]).__name__ == "QuantizedAdamState"


@BITS
def test_memory(bits: Any) -> None:
    """A donated step of a large tensor allocates no more than some blocks."""
    p = torch.randn(16 * TILE)
    opt = ps.quantize_state(ps.adamw(0.01), bits)
    state, g = opt.init_state(p), torch.randn_like(p)
    kept = sum(x.nbytes for x in torch.utils._pytree.tree_leaves(state) if isinstance(x, Tensor))
    assert kept <= 2 * p.nbytes * (bits / 32) * 1.02
    p, state = opt.step(g, state, p, donate=True)
    with torch.profiler.profile(profile_memory=True) as profile:
        opt.step(g, state, p, donate=True)
    live = peak = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    assert peak <= 10 * 4 * TILE


@BITS
def test_half_precision_parameters_are_computed_in_float32(bits: Any) -> None:
    wide = torch.randn(100, 100).bfloat16().float()
    opt = ps.quantize_state(ps.adamw(1e-2), bits)
    p, q = wide.bfloat16(), wide
    s, r = opt.init_state(p), opt.init_state(q)
    for _ in range(5):
        g = torch.randn_like(wide).bfloat16()
        p, s = opt.step(g, s, p)
        q, r = opt.step(g.float(), r, q, executor="leaf")
        q = q.bfloat16().float()
        assert p.dtype == torch.bfloat16
        assert torch.equal(p.float(), q)
        assert difference(s, r) == 0


@BITS
def test_the_optimizer_and_its_checkpoints(bits: Any) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(70, 70), torch.nn.Linear(70, 3))
    other = copy.deepcopy(model)

    def made(m: torch.nn.Module) -> Any:
        return optim.Optimizer(m.named_parameters(), ps.quantize_state(ps.adamw(1e-2), bits))

    def train(m: torch.nn.Module, optimizer: Any, steps: int) -> None:
        torch.manual_seed(1)
        for _ in range(steps):
            optimizer.zero_grad()
            m(torch.randn(8, 70)).square().mean().backward()
            optimizer.step()

    first = made(model)
    train(model, first, 3)
    state = first.state[model[0].weight]
    kind = torch.uint8 if bits == 8 else torch.bfloat16
    assert state[f"exp_avg_{bits}bit"].dtype == kind
    assert "exp_avg" not in state
    assert "exp_avg" in first.state[model[0].bias]
    second = made(other)
    train(other, second, 1)
    second.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
    other.load_state_dict(model.state_dict())
    assert second.state[other[0].weight][f"exp_avg_{bits}bit"].dtype == kind
    for m, optimizer in ((model, first), (other, second)):
        train(m, optimizer, 2)
    assert difference(dict(other.state_dict()), dict(model.state_dict())) == 0


@BITS
def test_the_derivative_of_one_update(bits: Any) -> None:
    """It is that of the transform on the state in full: with respect to gradients, parameters and every hyperparameter."""
    plain = ps.adamw(torch.tensor(0.1), (torch.tensor(0.8), torch.tensor(0.9)), torch.tensor(0.1), torch.tensor(0.2))
    opt = ps.quantize_state(plain, bits, min_size=0)
    p, g = torch.randn(20, 20, dtype=torch.float64), torch.randn(20, 20, dtype=torch.float64)
    _, state = opt.step(torch.randn_like(p), opt.init_state(p), p)

    def moved(t: ps.Transform, s: Any) -> Any:
        return torch.func.grad(lambda t, g, p: (t.step(g, s, p)[0] ** 2).sum(), argnums=(0, 1, 2))(t, g, p)

    (a, *x), (b, *y) = moved(opt, state), moved(plain, ps.dequantize_state(state))
    assert difference(x, y) <= 1e-5  # of codes in float32
    for one, two in zip(torch.utils._pytree.tree_leaves(a), torch.utils._pytree.tree_leaves(b)):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------------------------- the value


def test_it_is_a_value() -> None:
    opt = ps.quantize_state(ps.adamw(lr=0.1), 8)
    assert repr(opt).startswith("quantize_state(chain(scale_by_adam(")
    assert repr(opt).endswith("bits=8)")
    assert "min_size=1" in repr(ps.quantize_state(ps.adamw(), min_size=1))
    assert opt == ps.quantize_state(ps.adamw(lr=0.1)) != ps.quantize_state(ps.adamw(lr=0.1), 16)
    assert opt.replace(lr=0.2) == ps.quantize_state(ps.adamw(lr=0.2))
    assert pickle.loads(pickle.dumps(opt)) == copy.deepcopy(opt) == opt
    p = torch.randn(64, 64)
    _, state = opt.step(p, opt.init_state(p), p)
    same = pickle.loads(pickle.dumps(state))
    assert type(same[0]) is type(state[0])
    assert difference(same, state) == 0
    assert ps.step_count(state) == 1
    assert ps.get_hyperparams(opt, state)["lr"] == 0.1


def test_only_running_means_of_large_parameters() -> None:
    params = {"large": torch.ones(64, 64), "small": torch.ones(64), "complex": torch.ones(64, 64, dtype=torch.complex64)}
    opt = ps.chain(ps.quantize_state(ps.chain(ps.clip_by_global_norm(1.0), ps.scale_by_adan())), ps.ema_params(0.9))
    (_, s), average = opt.init_state(params)
    assert s.exp_avg["large"] is None
    assert s.exp_avg_8bit["large"].dtype == torch.uint8
    assert s.pre_grad["large"].dtype == torch.float32  # the last gradient
    assert average.ema["large"].dtype == torch.float32
    for name in ("small", "complex"):
        assert s.exp_avg[name].dtype == params[name].dtype
        assert s.exp_avg_8bit[name] is None
    full = ps.dequantize_state(((ps.EmptyState(), s), average))
    assert type(full[0][1]) is ps.AdanState
    assert full[1].ema is average.ema


def test_a_matrix_that_keeps_fewer_means_than_a_vector() -> None:
    params = {"matrix": torch.randn(8, 8), "vector": torch.randn(8)}
    opt = ps.quantize_state(ps.sm3(lr=0.1), min_size=0)
    state = opt.init_state(params)
    for _ in range(3):
        params, state = opt.step(params, state, params)
    (s,) = ps.find_all(state, type(state[0]))
    assert (s.sum_8bit["matrix"], s.sum_8bit["vector"].dtype) == (None, torch.uint8)


@BITS
def test_momentum_that_is_switched_on_later(bits: Any) -> None:
    """The state of large and of small parameters is made at the same step, with other fields."""
    params = [
        torch.nn.Parameter(torch.randn(100, 50)),
        torch.nn.Parameter(torch.randn(50)),
        torch.nn.Parameter(torch.randn(70, 60)),
    ]
    optimizer = optim.Optimizer(params, ps.quantize_state(ps.sgd(lr=0.1), bits))
    begun = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.param_groups[0]["momentum"] = 0.5
    for _ in range(2):
        optimizer.step()
    for p, old in zip(params, begun):
        torch.testing.assert_close(p.detach(), old - 0.1 * (1 + 1 + 1.5))
    assert [f"momentum_buffer_{bits}bit" in optimizer.state[p] for p in params] == [True, False, True]


def test_a_checkpoint_of_other_bits_is_refused() -> None:
    params = [torch.nn.Parameter(torch.randn(100, 50))]
    params[0].grad = torch.ones(100, 50)
    kinds = {bits: optim.Optimizer(params, ps.quantize_state(ps.adamw(0.1), bits)) for bits in (8, 16)}
    kinds |= {32: optim.Optimizer(params, ps.adamw(0.1))}
    for optimizer in kinds.values():
        optimizer.step()
    for a, first in kinds.items():
        for b, second in kinds.items():
            if a != b:
                with pytest.raises(ValueError, match="The loaded state has"):
                    second.load_state_dict(first.state_dict())


def test_tables_do_not_depend_on_who_asks_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a transform of torch.func, in inference mode, or with another default dtype: the same plain tensors."""
    wanted = code(True, CPU)
    x = torch.randn(600)

    def ask(p: Tensor) -> Tensor:
        return there_and_back(p, True).sum() + p.sum()

    def other_default() -> None:
        torch.set_default_dtype(torch.float64)
        ask(x)

    before = torch.get_default_dtype()
    for first in (
        lambda: torch.func.grad(ask)(x),
        lambda: torch.func.vmap(ask)(x[None]),
        torch.inference_mode()(lambda: ask(x)),
        other_default,
    ):
        monkeypatch.setattr("purestep.transforms.quantize._codes", {})
        try:
            first()
        finally:
            torch.set_default_dtype(before)
        found = code(True, CPU)
        assert not found.values.is_inference()
        assert pickle.loads(pickle.dumps(found.values)).dtype == torch.float32
        assert torch.equal(found.values, wanted.values)
        assert torch.equal(found.nearest, wanted.nearest)


def test_map_params_sees_the_means() -> None:
    opt, p = ps.quantize_state(ps.adam(), min_size=4), torch.randn(6, 4)
    _, state = opt.step(p, opt.init_state(p), p)
    keep = torch.tensor([0, 2, 3])
    less = ps.map_params(lambda m: m[keep], state)
    p = p[keep]
    p, less = opt.step(p, less, p)
    assert [s.exp_avg_8bit.shape for s in less if hasattr(s, "exp_avg_8bit")] == [(3, 4)]
    twice = ps.dequantize_state(ps.map_params(lambda m, n: m + n, state, state))
    found, wanted = (ps.find(s, ps.AdamState).exp_avg for s in (twice, ps.dequantize_state(state)))
    torch.testing.assert_close(found, 2 * wanted)


class Uncounted(NamedTuple):
    exp_avg: Tensor

    @classmethod
    def init(cls, p: Tensor) -> Uncounted:
        return cls(torch.zeros_like(p))


@ps.leafwise(Uncounted)
def uncounted(g: Tensor, s: Uncounted, p: Tensor) -> tuple[Tensor, Uncounted]:
    m = (s.exp_avg + g) / 2
    return m, Uncounted(m)


def test_wrong_calls() -> None:
    with pytest.raises(ValueError, match="bits must be 8 or 16, but got 4"):
        ps.quantize_state(ps.adamw(), bits=4)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"finds no running mean in the state of scale\(2.0\), so there is nothing to quantize"
    ):
        ps.quantize_state(ps.scale(2.0))
    with pytest.raises(ValueError, match="nothing to quantize"):
        ps.quantize_state(ps.quantize_state(ps.adamw()), 16)
    with pytest.raises(TypeError, match=r"but got <function trace.*Did you mean to call it: trace\(\.\.\.\)"):
        ps.quantize_state(ps.trace)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="which Uncounted does not count; add the field 'step: Scalar'"):
        ps.quantize_state(uncounted(), 16)
    ps.quantize_state(uncounted(), 8)
    with pytest.raises(TypeError, match="min_size"):
        ps.quantize_state(ps.adamw(), min_size=1.5)  # type: ignore[arg-type]
    p = torch.zeros(64, 64)
    with pytest.raises(TypeError, match="needs its own state, QuantizedAdamState, but got AdamState"):
        ps.quantize_state(ps.adam()).update(p, ps.adam().init_state(p), p)
