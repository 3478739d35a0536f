"""Parameters that are made of matrices, for transforms that treat matrices."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import purestep as ps
from purestep import optim
from purestep.algorithms import muon

FORMS: dict[str, tuple[dict[str, Any], tuple[int, ...], Callable[[Tensor], list[Tensor]]]] = {
    "a matrix": ({}, (3, 5), lambda x: [x]),
    "experts": ({}, (4, 3, 5), lambda x: list(x)),
    "experts of layers": ({}, (2, 3, 4, 5), lambda x: list(x.reshape(6, 4, 5))),
    "a kernel": ({"flatten": True}, (6, 3, 2, 2), lambda x: [x.reshape(6, 12)]),
    "a flat matrix": ({"flatten": True}, (4, 3), lambda x: [x]),
    "fused": ({"split": 3}, (9, 4), lambda x: list(x.chunk(3))),
    "side by side": ({"split": 2, "dim": 1}, (4, 10), lambda x: list(x.chunk(2, 1))),
    "fused experts": ({"split": 2}, (3, 4, 5), lambda x: [m for e in x for m in e.chunk(2)]),
    "experts side by side": ({"split": 2, "dim": 1}, (3, 5, 4), lambda x: [m for e in x for m in e.chunk(2, 1)]),
}
"""The arguments of `as_matrices`, a shape, and the matrices of a parameter of this shape."""

each = pytest.mark.parametrize("name", FORMS)


def of(name: str, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {k: torch.randn(FORMS[name][1], generator=g, dtype=torch.float64) for k in ("a", "b")}


def run(opt: Any, params: dict[str, Tensor], name: str, steps: int = 3, **how: Any) -> tuple[Any, Any]:
    params = {k: p.clone() for k, p in params.items()}
    state = opt.init_state(params)
    for step in range(steps):
        params, state = opt.step(of(name, step + 1), state, params, **how)
    return params, state


def matrices(tree: dict[str, Tensor], name: str) -> list[Tensor]:
    return [m for p in tree.values() for m in FORMS[name][2](p)]


def near(a: Any, b: Any, most: float = 0.0) -> None:
    torch.testing.assert_close(tree_leaves(a), tree_leaves(b), rtol=most, atol=most)


@each
@pytest.mark.parametrize("options", [{}, {"nesterov": False, "adjust_lr_fn": "match_rms_adamw"}], ids=["default", "other"])
def test_each_matrix_is_one_parameter_of_muon(name: str, options: Any) -> None:
    """In every mode: as if each had been given by itself."""
    inner, (kwargs, _, apart) = ps.muon(0.1, **options), FORMS[name]
    opt, params = ps.as_matrices(inner, **kwargs), of(name)
    alone = {str(k): m.contiguous() for k, m in enumerate(matrices(params, name))}
    state = inner.init_state(alone)
    for step in range(3):
        grads = {str(k): m.contiguous() for k, m in enumerate(matrices(of(name, step + 1), name))}
        alone, state = inner.step(grads, state, alone)
    expected = list(alone.values())
    for how in ({}, {"donate": True}, {"executor": "leaf"}, {"executor": "foreach"}):
        found, after = run(opt, params, name, **how)
        near([m.contiguous() for m in matrices(found, name)], expected, 1e-12)
        momenta = after[0].momentum_buffer
        near([m.contiguous() for m in matrices(momenta, name)], list(state[0].momentum_buffer.values()), 1e-12)
        assert after[0].step["a"] == 3
    own = {k: nn.Parameter(p.clone()) for k, p in params.items()}
    optimizer = optim.Optimizer(list(own.items()), opt)
    for step in range(3):
        for p, g in zip(own.values(), of(name, step + 1).values()):
            p.grad = g
        optimizer.step()
    near([m.detach().contiguous() for m in matrices(own, name)], expected, 1e-12)
    assert len(apart(params["a"])) * 2 == len(expected)


@each
def test_members_and_derivatives(name: str) -> None:
    opt, params = ps.as_matrices(ps.muon(0.1), **FORMS[name][0]), of(name)
    grads = of(name, 1)

    def step(p: Any, scale: Any) -> Any:
        return opt.step({k: g * scale for k, g in grads.items()}, opt.init_state(p), p)[0]

    members = {k: torch.stack([p, 2 * p]) for k, p in params.items()}
    scales = torch.tensor([1.0, 3.0], dtype=torch.float64)
    found = torch.func.vmap(step)(members, scales)
    for i in range(2):
        near({k: x[i] for k, x in found.items()}, step({k: x[i] for k, x in members.items()}, scales[i]), 2e-2)

    def total(lr: Tensor) -> Any:
        changed = opt.replace(lr=lr)
        return sum(p.sum() for p in changed.step(grads, changed.init_state(params), params)[0].values())

    lr = torch.tensor(0.1, dtype=torch.float64)
    slope = torch.func.grad(total)(lr)
    near(slope, (total(lr + 1e-3) - total(lr - 1e-3)) / 2e-3, 1e-6)


@pytest.mark.parametrize("name", ["experts", "a kernel", "side by side"])
def test_a_compiled_step(name: str) -> None:
    opt, params = ps.as_matrices(ps.muon(0.1), **FORMS[name][0]), of(name)
    step = torch.compile(opt.step, fullgraph=True)
    found, _ = step(of(name, 1), opt.init_state(params), params)
    near(found, run(opt, params, name, 1)[0], 1e-2)  # bfloat16, which Inductor rounds in its own way


def test_transforms_compiled_one_after_the_other() -> None:
    """Each is a graph of its own, though all of them run the same code."""
    params = of("a matrix")
    quantized = [ps.quantize_state(ps.adamw(0.1), bits, min_size=0) for bits in (8, 16)]
    muons = [ps.muon(0.1, ns_steps=steps) for steps in (5, 1, 2)]
    for opt in (ps.adamw(0.1), ps.adam(0.1), ps.sgd(0.1, momentum=0.9), *quantized, *muons):
        step = torch.compile(opt.step, fullgraph=True)
        found, _ = step(params, opt.init_state(params), params)
        near(found, opt.step(params, opt.init_state(params), params)[0], 1e-2 if opt in muons else 1e-6)


def test_matrices_of_one_shape_are_computed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of all parameters, as one stack."""
    sizes: list[Any] = []
    iterate = muon.addmm
    monkeypatch.setattr(muon, "addmm", lambda a, x, *rest: sizes.append(tuple(x.shape)) or iterate(a, x, *rest))
    opt = ps.as_matrices(ps.muon(0.1, ns_steps=1))
    params = {"a": torch.randn(4, 3, 5), "b": torch.randn(2, 3, 5), "c": torch.randn(5, 5)}
    opt.step(params, opt.init_state(params), params)
    assert set(sizes) == {(6, 3, 3), (6, 3, 5), (1, 5, 5)}


def test_a_network_of_all_kinds() -> None:
    """Said by path; what is no matrix goes elsewhere, and elementwise transforms and norms see parameters as they are."""
    params = {
        "conv.weight": torch.randn(4, 3, 2, 2), "attention.in_proj": torch.randn(12, 4), "experts.up": torch.randn(2, 4, 6),
        "experts.norm": torch.randn(4), "head": torch.randn(4, 3),
    }  # fmt: skip
    kinds = {"conv": "conv", "attention": "fused", "experts.up": "stack"}

    def label(path: str, p: Tensor) -> str:
        return next((kind for name, kind in kinds.items() if path.startswith(name)), "rest")

    opt = ps.chain(
        ps.clip_by_global_norm(1.0),
        ps.partition(
            {
                "conv": ps.as_matrices(ps.muon(0.1), flatten=True),
                "fused": ps.as_matrices(ps.chain(ps.muon(0.1), ps.scale(0.5)), split=3),
                "stack": ps.as_matrices(ps.muon(0.1)),
                "rest": ps.adamw(0.1),
            },
            label,
        ),
    )
    state = opt.init_state(params)
    found, _ = opt.step(params, state, params)
    whole = ps.chain(ps.clip_by_global_norm(1.0))
    grads, _ = whole.update(params, whole.init_state(params), params)
    kernel = {"w": params["conv.weight"].reshape(4, 12)}
    alone = ps.muon(0.1)
    expected, _ = alone.step({"w": grads["conv.weight"].reshape(4, 12)}, alone.init_state(kernel), kernel)
    near(found["conv.weight"].reshape(4, 12), expected["w"], 1e-6)
    adamw = ps.adamw(0.1)
    rest = {"head": params["head"]}
    near(found["head"], adamw.step({"head": grads["head"]}, adamw.init_state(rest), rest)[0]["head"], 1e-6)


def test_other_kinds_of_tensors() -> None:
    """Channels last, a transposed one, and a wider state."""
    p = {"w": torch.randn(6, 4, 3, 3).to(memory_format=torch.channels_last)}
    opt = ps.as_matrices(ps.muon(0.1), flatten=True)
    plain = tree_map(torch.Tensor.contiguous, p)
    near(opt.step(p, opt.init_state(p), p)[0], opt.step(plain, opt.init_state(plain), plain)[0], 1e-6)
    given = {"w": p["w"].clone(memory_format=torch.preserve_format)}
    found, _ = opt.step(p, opt.init_state(given), given, donate=True)
    assert found["w"] is given["w"]
    near(found, opt.step(plain, opt.init_state(plain), plain)[0], 1e-6)
    half = {"w": torch.randn(2, 4, 6).bfloat16()}
    for wide in (
        ps.as_matrices(ps.state_dtype(ps.muon(0.1), torch.float32)),
        ps.state_dtype(ps.as_matrices(ps.muon(0.1)), torch.float32),
        ps.master_weights(ps.as_matrices(ps.muon(0.1))),
    ):
        found, state = wide.step(half, wide.init_state(half), half)
        assert found["w"].dtype == torch.bfloat16
        assert ps.find(state, ps.MuonState).momentum_buffer["w"].dtype == torch.float32


@ps.operation(like=True, stacks=True)
def unit(x: Tensor) -> Tensor:
    return x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)


@ps.operation(like=True, stacks=True)
def twice_unit(x: Tensor) -> Tensor:
    return 2 * unit(x)


@ps.leafwise()
def united(u: Tensor, p: Tensor) -> Tensor:
    return unit(u)


@ps.leafwise()
def united_twice(u: Tensor, p: Tensor) -> Tensor:
    return twice_unit(u)


@ps.leafwise()
def perhaps_united(u: Tensor, p: Tensor, *, on: bool = False) -> Tensor:
    return unit(u) if on else u * 2


def update(opt: Any, u: Any, **how: Any) -> Any:
    return opt.update(u, opt.init_state(u), u, **how)[0]


def norms(x: Tensor, parts: int = 2) -> Tensor:
    return torch.stack([h.float().norm() for h in x.chunk(parts)])


def test_a_switch_says_whether_there_are_matrices() -> None:
    g = torch.randn(4, 3)
    ps.as_matrices(perhaps_united(on=False), split=2)
    for opt in (
        ps.as_matrices(perhaps_united(on=True), split=2),
        ps.as_matrices(perhaps_united(on=False), split=2).replace(on=True),
    ):
        near(norms(update(opt, g)), torch.ones(2), 1e-6)
    near(update(ps.as_matrices(perhaps_united(on=True), split=2).replace(on=False), g), 2 * g)


@pytest.mark.parametrize("executor", [None, "leaf"])
def test_an_operation_that_calls_another_splits_once(executor: Any) -> None:
    g = torch.randn(4, 3)
    opt = ps.as_matrices(united_twice(), split=2)
    near(norms(update(opt, g, executor=executor)), torch.full((2,), 2.0), 1e-6)
    wide = ps.state_dtype(ps.chain(ps.trace(0.9), opt), torch.float32)
    near(norms(update(wide, g.bfloat16(), executor=executor)), torch.full((2,), 2.0), 1e-2)


def test_stacks_of_different_numbers_of_matrices() -> None:
    """Without a form an operation sees each parameter as it is."""
    params = [torch.ones(2, 3, 3), torch.ones(5, 3, 3), torch.ones(2, 3, 3)]
    for x in update(united(), params):
        near(x, torch.full_like(x, 1 / 3), 1e-6)


def test_forms_and_other_ways_to_keep_a_state() -> None:
    """The innermost form counts; what is elementwise, or encodes a state, is let be."""
    g = torch.randn(6, 4)
    expected = update(ps.as_matrices(ps.muon(0.1), split=3), g)
    for opt in (
        ps.as_matrices(ps.as_matrices(ps.muon(0.1), split=3), flatten=True),
        ps.as_matrices(ps.state_dtype(ps.as_matrices(ps.muon(0.1), split=3), torch.float64), split=5),
    ):
        near(update(opt, g), expected, 1e-6)
    parts = {"a": ps.muon(0.1), "b": ps.set_to_zero()}
    split = ps.as_matrices(ps.partition(parts, lambda path, p: path), split=3)
    found = update(split, {"a": g, "b": g})
    near(found["a"], expected, 1e-6)
    assert not found["b"].any()
    for bits in (8, 16):
        for opt in (
            ps.quantize_state(ps.as_matrices(ps.muon(0.1), split=3), bits, min_size=1),
            ps.as_matrices(ps.quantize_state(ps.muon(0.1), bits, min_size=1), split=3),
        ):
            near(update(opt, g), expected, 2e-2)


def test_a_value() -> None:
    opt = ps.as_matrices(ps.muon(0.1), split=3)
    assert pickle.loads(pickle.dumps(opt)) == opt == copy.deepcopy(opt)
    assert opt != ps.as_matrices(ps.muon(0.1))
    assert opt.replace(lr=0.2).hyperparams["lr"] == 0.2
    assert repr(opt).startswith("as_matrices(chain(scale_by_muon(")
    assert repr(opt).endswith("), split=3)")
    assert opt.hyperparams == ps.muon(0.1).hyperparams
    adam = ps.as_matrices(ps.adamw(0.1))
    assert [link.transform for link in adam.links] == [link.transform for link in ps.adamw(0.1).links]
    params = of("fused")
    saved = ps.muon(0.1).init_state(params)  # the state is the same
    opt.step(params, saved, params)


def test_wrong_calls() -> None:
    with pytest.raises(ValueError, match=r"as_matrices: 'b' has shape \(3,\), but a matrix has at least two dimensions. Route"):
        ps.as_matrices(ps.muon()).init_state({"b": torch.zeros(3)})
    with pytest.raises(
        ValueError, match=r"'w' has shape \(10, 2\), but 10 rows cannot be split into 3 equal .*\(with split=3\)"
    ):
        ps.as_matrices(ps.muon(), split=3).init_state({"w": torch.zeros(10, 2)})
    with pytest.raises(ValueError, match=r"7 columns cannot be split into 2 equal parts \(with split=2, dim=1\)"):
        ps.as_matrices(ps.muon(), split=2, dim=1).init_state({"w": torch.zeros(10, 7)})
    with pytest.raises(RuntimeError, match="muon cannot treat complex parameters"):
        ps.as_matrices(ps.muon()).init_state({"w": torch.zeros(2, 3, 4, dtype=torch.complex64)})
    with pytest.raises(TypeError, match="as_matrices cannot tell scale_by_shampoo what the matrices are"):
        ps.as_matrices(ps.shampoo(0.1))
    with pytest.raises(TypeError, match=r"as_matrices takes a transform, but got .* Did you mean to call it: muon\(...\)"):
        ps.as_matrices(ps.muon)
    with pytest.raises(ValueError, match="dim must be 0, for the rows, or 1, for the columns, but got 2"):
        ps.as_matrices(ps.muon(), dim=2)
    with pytest.raises(ValueError, match="as_matrices: split must be an integer of at least 1, but got 0"):
        ps.as_matrices(ps.muon(), split=0)
    with pytest.raises(ValueError, match=r"'w' has shape \(2, 3, 4\). Say with as_matrices"):
        ps.muon().init_state({"w": torch.zeros(2, 3, 4)})
