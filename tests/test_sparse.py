"""Sparse gradients: torch's numbers where torch takes them, the dense numbers on the rows they have, a refusal elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import purestep as ps
from purestep import optim
from tests.problems import clone, difference

Options = dict[str, Any]
TAKES: dict[str, tuple[str, Options]] = {
    "sgd": ("SGD", {"lr": 0.1}),
    "sgd, climbing": ("SGD", {"lr": 0.1, "maximize": True}),
    "momentum": ("SGD", {"lr": 0.1, "momentum": 0.9}),
    "dampening": ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
    "nesterov": ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "adagrad": ("Adagrad", {"lr": 0.1}),
    "adagrad, all": ("Adagrad", {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.2, "eps": 1e-3}),
    "adagrad, climbing": ("Adagrad", {"lr": 0.1, "maximize": True}),
    "sparse adam": ("SparseAdam", {"lr": 0.1}),
    "sparse adam, all": ("SparseAdam", {"lr": 0.1, "betas": (0.7, 0.9), "eps": 1e-3, "maximize": True}),
}
each = pytest.mark.parametrize(("cls", "options"), TAKES.values(), ids=list(TAKES))
ROWS, STEPS = 12, 8


@pytest.fixture(autouse=True)
def checked() -> Iterator[None]:
    """torch warns unless it is told whether to check what sparse tensors are made of."""
    with torch.sparse.check_sparse_tensor_invariants():
        yield


def sparse(rows: list[int], values: Tensor, size: int = ROWS, coalesced: bool = False) -> Tensor:
    shape = (size, *values.shape[1:])
    g = torch.sparse_coo_tensor(torch.tensor([rows], dtype=torch.long), values, shape, check_invariants=True)
    return g.coalesce() if coalesced else g


def gradients(step: int) -> list[Tensor]:
    """A table of rows, the same row twice; a table of matrices; at times a gradient without rows."""
    g = torch.Generator().manual_seed(step)
    rows = torch.randint(ROWS, (4,), generator=g).tolist() if step % 4 else []
    table = sparse(rows, torch.randn(len(rows), 3, generator=g, dtype=torch.float64))
    stack = sparse([1, 1, 5], torch.randn(3, 2, 2, generator=g, dtype=torch.float64))
    return [table, stack]


def parameters() -> list[Tensor]:
    g = torch.Generator().manual_seed(99)
    return [torch.randn(ROWS, 3, generator=g, dtype=torch.float64), torch.randn(ROWS, 2, 2, generator=g, dtype=torch.float64)]


def stateful(namespace: Any, cls: str, options: Options) -> tuple[list[Tensor], Any]:
    leaves = [torch.nn.Parameter(p) for p in parameters()]
    optimizer = getattr(namespace, cls)(leaves, **options)
    for k in range(STEPS):
        for p, g in zip(leaves, gradients(k)):
            p.grad = g
        optimizer.step()
    return [p.detach() for p in leaves], optimizer


@each
def test_the_numbers_are_torchs(cls: str, options: Options) -> None:
    theirs, _ = stateful(torch.optim, cls, options)
    ours, _ = stateful(optim, cls, options)
    assert difference(ours, theirs) <= 1e-12


@each
@pytest.mark.parametrize("how", [{}, {"donate": True}, {"executor": "leaf"}, {"executor": "foreach"}], ids=["pure", "donated", "leaf", "foreach"])  # fmt: skip
def test_every_mode_agrees(cls: str, options: Options, how: dict[str, Any]) -> None:
    expected, _ = stateful(optim, cls, options)
    t = getattr(ps, {"SparseAdam": "sparse_adam"}.get(cls, cls.lower()))(**options)
    params = parameters()
    state = t.init_state(params)
    for k in range(STEPS):
        given, copied = (state, params), clone((state, params))
        params, state = t.step(gradients(k), state, params, **how)
        if "donate" not in how:
            assert difference(given, copied) == 0
    assert difference(params, expected) <= 1e-12


@pytest.mark.parametrize("cls", ["SGD", "Adagrad"])
def test_as_if_it_were_dense(cls: str) -> None:
    """Rows without a gradient stay, and that is what a gradient of zero does, too."""
    t = getattr(ps, cls.lower())(lr=0.1)
    a, b = parameters(), parameters()
    s, r = t.init_state(a), t.init_state(b)
    for k in range(STEPS):
        a, s = t.step(gradients(k), s, a)
        b, r = t.step([g.to_dense() for g in gradients(k)], r, b)
    assert difference(a, b) <= 1e-12


def test_updates_are_sparse() -> None:
    t = ps.adagrad(lr=0.1)
    params = parameters()
    state, g = t.init_state(params), gradients(1)
    updates, after = t.update(g, state, params)
    assert all(u.is_sparse and u.shape == p.shape for u, p in zip(updates, params))
    assert torch.equal(updates[0].indices(), g[0].coalesce().indices())
    moved, expected = ps.apply_updates(params, updates), t.step(g, state, params)
    assert difference((moved, after), expected) <= 1e-15


def test_only_the_rows_are_touched() -> None:
    p = torch.nn.Parameter(torch.zeros(1000, 2))
    optimizer = optim.SparseAdam([p], lr=0.1)
    p.grad = sparse([7, 7, 300], torch.ones(3, 2), 1000)
    optimizer.step()
    assert p.detach().abs().sum(1).nonzero().flatten().tolist() == [7, 300]
    assert optimizer.state[p]["exp_avg"].abs().sum(1).nonzero().flatten().tolist() == [7, 300]


def test_beside_dense_gradients_and_in_a_chain() -> None:
    """A norm over all parameters counts a row that is there twice as torch does, once it is one."""
    t = ps.chain(ps.clip_by_global_norm(0.1), ps.sgd(lr=1.0))
    params = {"table": torch.zeros(4, 1), "bias": torch.zeros(1)}
    grads = {"table": sparse([2, 2], torch.tensor([[1.0], [2.0]]), 4), "bias": torch.tensor([4.0])}
    new, _ = t.step(grads, t.init_state(params), params)
    torch.testing.assert_close(new["table"].flatten(), torch.tensor([0.0, 0.0, -0.06, 0.0]))
    torch.testing.assert_close(new["bias"], torch.tensor([-0.08]))


def test_elements_instead_of_rows() -> None:
    """A gradient that is sparse in both dimensions."""
    p = torch.zeros(3, 4)
    g = torch.sparse_coo_tensor(torch.tensor([[0, 2], [1, 3]]), torch.tensor([1.0, -1.0]), (3, 4), check_invariants=True)
    t = ps.sparse_adam(lr=0.5)
    new, _ = t.step(g, t.init_state(p), p)
    torch.testing.assert_close(new, -0.5 * g.to_dense())


def test_an_embedding_trains_as_with_torch() -> None:
    def train(namespace: Any) -> Tensor:
        torch.manual_seed(0)
        embedding = torch.nn.Embedding(20, 4, sparse=True)
        optimizer = namespace.SparseAdam(embedding.parameters(), lr=0.05)
        for k in range(10):
            optimizer.zero_grad()
            (embedding(torch.arange(k, k + 5)) ** 2).sum().backward()
            optimizer.step()
        return embedding.weight.detach()

    torch.testing.assert_close(train(optim), train(torch.optim), rtol=1e-6, atol=1e-7)


REFUSED = ["Adam", "AdamW", "Adamax", "NAdam", "RAdam", "Adadelta", "RMSprop", "Rprop", "ASGD", "Adafactor", "Muon"]


@pytest.mark.parametrize("cls", REFUSED)
def test_elsewhere_they_are_refused(cls: str) -> None:
    p = torch.nn.Parameter(torch.ones(4, 2))
    optimizer = getattr(optim, cls)([("embedding.weight", p)])
    p.grad = sparse([1], torch.ones(1, 2), 4)
    before = clone(dict(optimizer.state[p]))
    with pytest.raises(
        RuntimeError, match=r"The gradient of 'embedding.weight' is sparse, and \w+ is not compatible.*to_dense"
    ):
        optimizer.step()
    assert torch.equal(p, torch.ones(4, 2))
    assert difference(dict(optimizer.state[p]), before) == 0


@pytest.mark.parametrize("cls", ["SGD", "Adagrad"])
def test_weight_decay_needs_dense_gradients(cls: str) -> None:
    p = torch.nn.Parameter(torch.ones(4, 2))
    for namespace in (torch.optim, optim):
        optimizer = getattr(namespace, cls)([p], lr=0.1, weight_decay=0.1)
        p.grad = sparse([1], torch.ones(1, 2), 4)
        with pytest.raises(RuntimeError):
            optimizer.step()
    with pytest.raises(RuntimeError, match="add_decayed_weights is not compatible with sparse gradients"):
        optimizer.step()


def test_sparse_adam_refuses_dense_gradients_and_odd_parameters() -> None:
    p = torch.nn.Parameter(torch.ones(4, 2))
    optimizer = optim.SparseAdam([("embedding.weight", p)])
    p.grad = torch.ones(4, 2)
    with pytest.raises(RuntimeError, match=r"SparseAdam needs sparse gradients, but that of 'embedding.weight' is dense"):
        optimizer.step()
    with pytest.raises(ValueError, match="cannot treat complex parameters, but '0'"):
        optim.SparseAdam([torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))])
    with pytest.raises(ValueError, match=r"dense parameters .* but '0' is sparse"):
        optim.SparseAdam([torch.ones(2, 2).to_sparse()])


@pytest.mark.filterwarnings("ignore:Sparse CSC tensor support is in beta")
def test_other_layouts_are_refused() -> None:
    t, p = ps.sgd(lr=0.1), torch.ones(2, 2)
    with pytest.raises(RuntimeError, match=r"layout torch.sparse_csc, but only torch.sparse_coo"):
        t.step(torch.eye(2).to_sparse_csc(), t.init_state(p), p)


PARTS = {
    "momentum": lambda: ps.sgd(0.1, momentum=0.9),
    "adamw": lambda: ps.adamw(0.1),
    "clipped": lambda: ps.chain(ps.clip(0.5), ps.nadam(0.1)),
    "frozen": lambda: ps.freeze(),
}
TABLES = {"sparse adam": lambda: ps.sparse_adam(0.1), "adagrad": lambda: ps.adagrad(0.1), "sgd": lambda: ps.sgd(0.1)}


@pytest.mark.parametrize("how", ["pure", "donated", "leaf", "wrapped"])
@pytest.mark.parametrize("rest", PARTS)
@pytest.mark.parametrize("table", TABLES)
def test_parts_of_a_partition_are_asked_about_their_own_gradients(table: str, rest: str, how: str) -> None:
    """What a dense part would do with sparse gradients is nobody's concern: it gets none."""
    opt = ps.partition({"s": TABLES[table](), "r": PARTS[rest]()}, ps.by_path({"^e": "s"}, default="r"))
    params = {"e": parameters()[0], "w": torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)}
    alone = {"e": params["e"].clone()}
    beside = {"w": params["w"].clone()}
    part, others = TABLES[table](), PARTS[rest]()
    part_state, others_state = part.init_state(alone), others.init_state(beside)
    wrapped = {k: torch.nn.Parameter(p.clone()) for k, p in params.items()}
    optimizer = optim.Optimizer(wrapped.items(), opt)
    state = opt.init_state(params)
    options: dict[str, Any] = {"pure": {}, "donated": {"donate": True}, "leaf": {"executor": "leaf"}}.get(how, {})
    for step in range(STEPS):
        grads = {"e": gradients(step)[0], "w": torch.full((4, 3), 0.1 * step, dtype=torch.float64)}
        alone, part_state = part.step({"e": grads["e"]}, part_state, alone)
        beside, others_state = others.step({"w": grads["w"]}, others_state, beside)
        if how == "wrapped":
            for k, p in wrapped.items():
                p.grad = grads[k].clone()
            optimizer.step()
            params = {k: p.detach() for k, p in wrapped.items()}
        else:
            params, state = opt.step(grads, state, params, **options)
        assert difference(params, alone | beside) <= 1e-12
    if rest in ("adamw", "clipped"):
        with pytest.raises(RuntimeError, match=r"The gradient of 'w' is sparse"):
            opt.step({"e": gradients(1)[0], "w": grads["w"].to_sparse(1)}, opt.init_state(params), params)
