"""Muon's mathematics without its rounding, and what bfloat16 leaves of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import purestep as ps
from purestep._core import lists
from purestep.algorithms import muon
from tests.problems import PROBLEMS, clone, difference, grads

SHAPES = [(3, 5), (4, 3), (4, 4), (1, 3)]


@pytest.fixture
def unrounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The iteration in float64."""
    monkeypatch.setattr(Tensor, "bfloat16", Tensor.double)
    monkeypatch.setattr(Tensor, "float", Tensor.double)


@pytest.mark.usefixtures("unrounded")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_muon_maps_singular_values(shape: tuple[int, int]) -> None:
    """The iteration is a polynomial of the singular values: it keeps the singular vectors."""
    g = torch.randn(shape, dtype=torch.float64)
    t = ps.scale_by_muon(0.0)
    found, _ = t.update(g, t.init_state(g), g)
    u, s, v = torch.linalg.svd(g, full_matrices=False)
    s = s / s.square().sum().sqrt()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    torch.testing.assert_close(found, max(1.0, shape[0] / shape[1]) ** 0.5 * u @ s.diag() @ v, rtol=1e-11, atol=1e-11)


@pytest.mark.usefixtures("unrounded")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_muons_derivatives(shape: tuple[int, int]) -> None:
    g, b, p = (torch.randn(shape, dtype=torch.float64).requires_grad_() for _ in range(3))
    numbers = [torch.tensor(x, dtype=torch.float64).requires_grad_() for x in (0.9, 1e-7, 3.4445, -4.7750, 2.0315, 0.1, 0.1)]

    def step(g: Tensor, b: Tensor, p: Tensor, *numbers: Tensor) -> tuple[Tensor, Tensor]:
        momentum, eps, *coefficients, lr, weight_decay = numbers
        t = ps.muon(lr, weight_decay, momentum, ns_coefficients=tuple(coefficients), eps=eps)  # type: ignore[arg-type]
        (s, *rest) = t.init_state(p)
        p, (s, *_) = t.step(g, (s._replace(momentum_buffer=b), *rest), p)
        return p, s.momentum_buffer

    assert torch.autograd.gradcheck(step, [g, b, p, *numbers], check_forward_ad=True)


def test_muons_derivatives_in_bfloat16() -> None:
    """Near those of the iteration without rounding."""
    g, w = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    t = ps.scale_by_muon(0.0)

    def value(g: Tensor) -> Tensor:
        return (t.update(g, t.init_state(g), g)[0] * w).sum()

    found = torch.func.grad(value)(g)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "bfloat16", Tensor.double)
        patch.setattr(Tensor, "float", Tensor.double)
        exact = torch.func.grad(value)(g)
    assert (found - exact).norm() <= 0.1 * exact.norm()


@pytest.mark.parametrize("most", [2**22, 50, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_matrices_of_one_shape_are_orthogonalized_together(
    dtype: torch.dtype, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as fit, wide and tall ones apart, and each as if it were alone, but for what bfloat16 rounds."""
    sizes: list[torch.Size] = []
    iterate = muon.addmm
    monkeypatch.setattr(muon, "addmm", lambda a, x, *rest: sizes.append(x.shape) or iterate(a, x, *rest))
    monkeypatch.setattr(lists, "STACK", most)
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 6), (6, 4), (4, 6), (4, 6), (3, 3), (6, 4)]
    params = [torch.randn(s, generator=generator).to(dtype) for s in shapes]
    grads = [torch.randn(s, generator=generator).to(dtype) for s in shapes]
    t = ps.scale_by_muon()
    expected, _ = t.update(grads, t.init_state(params), params, executor="leaf")
    sizes.clear()
    found, _ = t.update(grads, t.init_state(params), params)
    assert all((a - b).abs().max() <= 2**-7 * b.abs().max() for a, b in zip(found, expected))
    stacks = {2**22: [3, 2, 1], 50: [2, 1, 2, 1], 1: [1] * 6}[most]
    assert [s[0] if len(s) == 3 else 1 for s in sizes[:: 2 * 5]] == stacks


def test_muon_keeps_its_momentum_in_bfloat16() -> None:
    """torch's normalizes it in place (bfloat16, no Nesterov)."""
    p = torch.randn(2, 3).bfloat16()
    g = 8 * torch.ones_like(p)
    t = ps.muon(momentum=0.5, nesterov=False)
    _, (state, *_) = t.step(g, t.init_state(p), p)
    assert torch.equal(state.momentum_buffer, g / 2)


def test_muons_momentum_follows_a_schedule() -> None:
    params, loss = PROBLEMS["matrices"]()
    warm, first = ps.muon(momentum=ps.schedules.linear(0.5, 0.9, total_steps=3)), ps.muon(momentum=0.5)
    a, b = (clone(params) for _ in range(2))
    a, state = warm.step(grads(loss, a), warm.init_state(a), a)
    b, expected = first.step(grads(loss, b), first.init_state(b), b)
    assert difference((a, state[0]), (b, expected[0])) == 0
    a, state = warm.step(grads(loss, a), state, a)
    then = first.replace(momentum=0.5 + 0.4 / 3)
    b, expected = then.step(grads(loss, b), expected, b)
    assert difference((a, state[0]), (b, expected[0])) <= 1e-12


ERRORS: list[tuple[Any, Any, str]] = [
    (lambda: ps.muon().init_state({"layer1.bias": torch.zeros(4)}), ValueError, r"muon orthogonalizes matrices, but 'layer1.bias' has shape \(4,\)\. Route it elsewhere"),
    (lambda: ps.muon().init_state({"w": torch.zeros(2, 2, dtype=torch.complex64)}), RuntimeError, r"muon cannot treat complex parameters, but 'w' is torch.complex64"),
    (lambda: ps.optim.Muon([torch.zeros(3)]), ValueError, r"'0' has shape \(3,\)"),
    (lambda: ps.muon(ns_steps=100), ValueError, "ns_steps must be less than 100, but got 100"),
    (lambda: ps.muon(ns_steps=-1), ValueError, "ns_steps must be an integer of at least 0"),
    (lambda: ps.muon(ns_coefficients=(1.0, 2.0)), ValueError, "ns_coefficients must be 3 numbers"),  # type: ignore[arg-type]
    (lambda: ps.muon(adjust_lr_fn="rms"), ValueError, "adjust_lr_fn must be None, 'original', 'match_rms_adamw' or 'spectral_unclamped', but got 'rms'"),
    (lambda: ps.adafactor().init_state({"w": torch.zeros(2, dtype=torch.complex64)}), RuntimeError, r"adafactor cannot treat complex parameters, but 'w' is torch.complex64"),
    (lambda: ps.optim.Adafactor([torch.zeros(2, dtype=torch.complex64)]), RuntimeError, "'0' is torch.complex64"),
    (lambda: ps.adafactor(beta2_decay=0.1), ValueError, "beta2_decay must be"),
    (lambda: ps.adafactor(d=0.5), ValueError, "d must be a number of at least 1"),
    (lambda: ps.adafactor(eps=(-1.0, 1e-3)), ValueError, r"eps\[0\] must be a number of at least 0"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "kind", "message"), ERRORS, ids=range(len(ERRORS)))
def test_what_is_refused(make: Any, kind: Any, message: str) -> None:
    with pytest.raises(kind, match=message):
        make()


def test_adafactor_keeps_a_row_and_a_column() -> None:
    t, p = ps.adafactor(), torch.randn(5, 4, 3)
    _, (state, _) = t.step(torch.randn(5, 4, 3), t.init_state(p), p)
    assert (state.row_var.shape, state.col_var.shape, state.variance) == ((5, 4, 1), (5, 1, 3), None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_adafactors_eps_is_the_dtypes_precision(dtype: torch.dtype) -> None:
    p, g = torch.ones(3, dtype=dtype), torch.full((3,), 0.5, dtype=dtype) * torch.finfo(dtype).eps
    t = ps.scale_by_adafactor()
    u, _ = t.update(g, t.init_state(p), p)
    assert difference(u, torch.full_like(u, 0.5)) <= 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("executor", ["leaf", "foreach"])
def test_adafactors_sizes_are_taken_in_float32(executor: Any) -> None:
    """In float16 the square of 256 is infinite."""
    p, g = torch.full((2, 2), 500.0, dtype=torch.float16), torch.ones(2, 2, dtype=torch.float16)
    t = ps.scale_by_adafactor()
    u, _ = t.update(g, t.init_state(p), p, executor=executor)
    assert torch.equal(u, p)
