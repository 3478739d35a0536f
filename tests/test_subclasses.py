"""Tensors of other types: whatever a type does with operations, the numbers are those of plain tensors, and a type is asked for
nothing that it need not know."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import return_and_correct_aliasing

import purestep as ps
from purestep import optim
from purestep._core.plain import plain
from tests.case import Case
from tests.cases import CASES
from tests.problems import clone, difference, grads

CALLED: list[str] = []
"""What was called on tensors of the types below."""

FORBIDDEN = ("_foreach", "_fused", "as_strided", "set_", "data_ptr", "untyped_storage", "_flatten_dense")
"""What a tensor that is not plain is never asked for."""


class Wrapper(Tensor):
    """A tensor around another, as sharded and quantized ones are: operations see it, and memory it has none."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __repr__(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"Wrapper({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # pyright: ignore
        CALLED.append(func.__name__)
        inside = [pytree.tree_map(lambda x: x.inner if isinstance(x, Wrapper) else x, x) for x in (args, kwargs or {})]
        out = pytree.tree_map(lambda x: Wrapper(x) if isinstance(x, Tensor) else x, func(*inside[0], **inside[1]))
        return return_and_correct_aliasing(func, args, kwargs or {}, out)


class Watched(Tensor):
    """A tensor whose calls are seen in Python."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        CALLED.append(getattr(func, "__name__", ""))
        return super().__torch_function__(func, types, args, kwargs or {})


class Labelled(nn.Parameter):
    """A parameter with more to it than a parameter, as many libraries have: its results are plain tensors."""


class EightBits(Tensor):
    """A weight in eight bits and a scale per row, as torchao trains with: of operations it knows a handful, and what it is
    written with is rounded."""

    codes: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype, device=codes.device)  # type: ignore[attr-defined]

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.codes, self.scale = codes, scale

    def __repr__(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"EightBits({self.floats()})"

    @classmethod
    def of(cls, x: Tensor) -> EightBits:
        scale = x.abs().amax(1) / 127
        return cls((x / scale[:, None]).round().to(torch.int8), scale)

    def floats(self) -> Tensor:
        return self.codes * self.scale[:, None]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # pyright: ignore
        CALLED.append(func.__name__)
        aten, kwargs = torch.ops.aten, kwargs or {}
        if func in (aten.detach.default, aten.clone.default):
            out = EightBits(func(args[0].codes), func(args[0].scale))
            return return_and_correct_aliasing(func, args, kwargs, out)
        if func is aten.zeros_like.default:
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device=args[0].device)
        plain = pytree.tree_map(lambda x: x.floats() if isinstance(x, EightBits) else x, args)
        if func in (aten.mul.Tensor, aten.sub.Tensor):
            return func(*plain, **kwargs)
        if func is aten.copy_.default or func in (aten.add_.Tensor, aten.addcdiv_.default):
            new = EightBits.of(plain[1] if func is aten.copy_.default else func(*plain, **kwargs))
            args[0].codes.copy_(new.codes)
            args[0].scale.copy_(new.scale)
            return args[0]
        raise NotImplementedError(f"{func} of eight bits")


KINDS: dict[str, Any] = {
    "wrapper": lambda x: Wrapper(x.clone()),
    "watched": lambda x: x.clone().as_subclass(Watched),
    "labelled": lambda x: Labelled(x.clone(), requires_grad=False),
}


def opened(tree: Any) -> Any:
    """What is inside, as plain tensors of their own."""

    def open(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        while isinstance(x, Wrapper):
            x = x.inner
        return x.detach().as_subclass(Tensor).clone()

    return pytree.tree_map(open, tree)


def dressed(tree: Any, kind: str, mixed: bool) -> Any:
    """A tree of tensors of this type; with `mixed` every other."""
    leaves, spec = pytree.tree_flatten(tree)
    return pytree.tree_unflatten([x.clone() if mixed and k % 2 else KINDS[kind](x) for k, x in enumerate(leaves)], spec)


def asked() -> set[str]:
    """The forbidden that was called."""
    return {name for name in CALLED if any(word in name for word in FORBIDDEN)}


def setting(case: Case, dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    params, loss = case.problem(dtype)
    chosen = {k: p for k, p in params.items() if case.treats(p)}
    return chosen, lambda p: grads(lambda q: loss({**params, **q}), p)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.in_turn("kind")
def test_every_transform_is_right_on_every_type(case: Case, kind: str) -> None:
    """Pure, and nothing that was given is written to; and with memory given away, which then stays what it is."""
    params, gradients = setting(case)
    t = case.transform()
    for donate in (False, True):
        whole, odd = clone(params), dressed(params, kind, mixed=donate)
        state, held = t.init_state(whole), t.init_state(odd)
        homes = list(map(id, odd.values()))
        for _ in range(3):
            g = gradients(whole)
            given, before = dressed(g, kind, mixed=donate), opened(odd)
            whole, state = t.step(g, state, whole)
            CALLED.clear()
            after, held = t.step(given, held, odd, donate=donate)
            assert not asked()
            assert difference(opened(given), g) == 0.0
            assert donate or difference(opened(odd), before) == 0.0
            odd = after
        assert not donate or list(map(id, odd.values())) == homes
        assert difference(opened(odd), whole) < 1e-11
        assert difference(opened(held), opened(state)) < 1e-11


def optimizers(t: ps.Transform, params: Any, kind: str, **flags: Any) -> tuple[Any, ...]:
    whole = {k: nn.Parameter(p.clone()) for k, p in params.items()}
    odd = {k: p if isinstance(p, nn.Parameter) else nn.Parameter(p) for k, p in dressed(params, kind, mixed=True).items()}
    for p in odd.values():
        p.requires_grad_()
    return whole, optim.Optimizer(list(whole.items()), t), odd, optim.Optimizer(list(odd.items()), t, **flags)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("flags", [{}, {"foreach": True}, {"foreach": False}, {"compile": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("name", ["adamw", "sgd", "rmsprop", "adagrad", "lion", "clipped"])
def test_every_executor_steps_aside(name: str, flags: dict[str, Any], kind: str) -> None:
    """Twenty small ones and a large one, which would be packed, cut, fused and compiled if they were plain."""
    if name not in ("adamw", "sgd", "adagrad") and "fused" in flags:
        return
    t = (
        ps.chain(ps.clip_by_global_norm(0.1), ps.rmsprop(0.1))
        if name == "clipped"
        else getattr(ps, name)(0.01, weight_decay=0.1)
    )
    params = {str(k): torch.randn(5, 3, dtype=torch.float64) for k in range(20)} | {
        "large": torch.randn(300, 900, dtype=torch.float64)
    }
    whole, a, odd, b = optimizers(t, params, kind, **flags)
    homes = {k: id(x) for k, x in odd.items()}
    for _ in range(4):
        CALLED.clear()
        for k, p in whole.items():
            g = p.detach() * 0.3 + 0.1
            p.grad, odd[k].grad = g, (KINDS[kind](g) if type(odd[k]) not in (nn.Parameter, Labelled) else g.clone())
        CALLED.clear()
        a.step()
        b.step()
        assert not asked()
    assert homes == {k: id(x) for k, x in odd.items()}
    assert difference(opened(odd), opened(whole)) < 1e-11
    for k, p in odd.items():
        ours, theirs = opened(b.state[p]), opened(a.state[whole[k]])
        assert difference(ours, theirs) < 1e-11
    b.load_state_dict(b.state_dict())


@pytest.mark.parametrize("flags", [{}, {"foreach": True}, {"foreach": False}], ids=str)
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "NAdam", "Adadelta"])
def test_weights_in_eight_bits_beside_plain_ones(name: str, flags: dict[str, Any]) -> None:
    """They are updated as their floats would be, and rounded."""
    options = {"lr": 0.1, **({"momentum": 0.9} if name in ("SGD", "RMSprop") else {})}
    weight, bias = torch.randn(20, 30), torch.randn(20)
    quantized = EightBits.of(weight)
    floats = quantized.floats().clone().requires_grad_()
    params = [nn.Parameter(quantized), nn.Parameter(bias.clone())]
    twins = [floats, bias.clone().requires_grad_()]
    b, a = getattr(optim, name)(params, **options, **flags), getattr(torch.optim, name)(twins, **options)
    for _ in range(3):
        for p, q in zip(params, twins):
            p.grad = torch.sin(3 * q.detach())
            q.grad = p.grad.clone()
        CALLED.clear()
        a.step()
        b.step()
        assert not asked()
        with torch.no_grad():
            floats.copy_(EightBits.of(floats).floats())
    codes = params[0].detach().codes  # type: ignore[attr-defined]
    assert ((codes - EightBits.of(floats.detach()).codes).abs() <= 1).all()  # a last bit decides which way a number is rounded
    torch.testing.assert_close(params[1].detach(), twins[1].detach())
    for p, q in zip(params, twins):
        for key, x in a.state[q].items():
            assert type(b.state[p][key]) is Tensor
            torch.testing.assert_close(b.state[p][key], x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["wrapper", "watched"])
def test_complex_ones(kind: str) -> None:
    p = {"z": torch.randn(4, dtype=torch.complex128), "w": torch.randn(3, 2, dtype=torch.complex128)}
    for t in (ps.adamw(0.1), ps.chain(ps.clip_by_global_norm(0.1), ps.rmsprop(0.1)), ps.prodigy(1.0)):
        for donate in (False, True):
            whole, odd = clone(p), dressed(p, kind, mixed=True)
            state, held = t.init_state(whole), t.init_state(odd)
            for _ in range(3):
                g = {k: x * (0.3 + 0.1j) for k, x in whole.items()}
                given = dressed(g, kind, mixed=True)
                whole, state = t.step(g, state, whole)
                odd, held = t.step(given, held, odd, donate=donate)
            assert difference(opened(odd), whole) < 1e-11


@pytest.mark.parametrize("kind", ["plain", "wrapper"])
def test_half_precision_with_a_state_in_float32(kind: str) -> None:
    """Of different dtypes they are computed in the widest, and what comes before is not left out: here a clip to a tenth."""
    start, g = torch.randn(5, 3).bfloat16(), torch.ones(5, 3).bfloat16()
    p = nn.Parameter(start.clone() if kind == "plain" else Wrapper(start.clone()))
    o = optim.Optimizer([p], ps.chain(ps.clip_by_global_norm(0.1), ps.sgd(1.0, momentum=0.5)))
    o.state[p]["momentum_buffer"] = torch.zeros(5, 3) if kind == "plain" else Wrapper(torch.zeros(5, 3))
    for _ in range(2):
        p.grad = g.clone() if kind == "plain" else Wrapper(g.clone())
        o.step()
    step = 0.1 / 15**0.5
    torch.testing.assert_close(opened(p), (start - step).bfloat16() - torch.tensor(1.5 * step).bfloat16(), atol=0.02, rtol=0)
    torch.testing.assert_close(opened(o.state[p]["momentum_buffer"]), torch.full((5, 3), 1.5 * step), rtol=5e-3, atol=0)


def test_derivatives_are_followed_through_them() -> None:
    def slope(kind: str) -> Tensor:
        lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        p = {str(k): torch.linspace(0, 1, 6, dtype=torch.float64).reshape(2, 3) + k for k in range(3)}
        x = p if kind == "plain" else dressed(p, kind, mixed=False)
        t = ps.chain(ps.clip_by_global_norm(1.0), ps.adamw(lr))
        state = t.init_state(x)
        for _ in range(2):
            x, state = t.step({k: y.sin() for k, y in x.items()}, state, x)
        return torch.autograd.grad(sum((y**2).sum() for y in x.values()), lr)[0]

    assert difference(opened(slope("watched")), slope("plain")) < 1e-12


def test_lbfgs_on_every_type() -> None:
    for kind in KINDS:
        found = []
        for x in (torch.linspace(-1, 1, 6).double(), KINDS[kind](torch.linspace(-1, 1, 6).double())):
            t = ps.lbfgs(max_iter=5)
            p, state = [x], t.init_state([x])
            for _ in range(2):
                p, state = t.step([bowl(p[0])], state, p, value_and_grad=lambda q: ((q[0] - 0.3).pow(4).sum(), [bowl(q[0])]))
            found.append(opened(p))
        assert difference(found[1], found[0]) < 1e-12


def bowl(p: Tensor) -> Tensor:
    return 4 * (p - 0.3) ** 3


def test_what_is_empty_complex_or_alone_is_plain() -> None:
    """The rule asks for types, and for nothing else."""
    assert plain([torch.zeros(0), torch.zeros(2, dtype=torch.complex64), nn.Parameter(torch.ones(2).t())])
    assert plain([torch.ones(1), None], optional=True)
    assert not plain([torch.ones(1), None])
    assert not any(plain([make(torch.ones(1))]) for make in KINDS.values())
