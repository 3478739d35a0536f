"""What `unroll` is given beside parameters and batches, and what it returns beside parameters: against the loop written out."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, TensorDataset

import purestep as ps
from tests.problems import difference
from tests.test_meta import directions, dot, flat, normal

STEPS = 4
PARAMS = {"w": normal(3, seed=1), "b": normal(seed=2)}
BUFFERS = {"mean": normal(seed=3), "spread": normal(2, seed=4).abs(), "count": torch.tensor(7)}
ARGS = (torch.tensor(0.8, dtype=torch.float64), {"weights": normal(3, seed=5)})
STACKED = {"x": normal(STEPS, 5, 3, seed=6), "y": normal(STEPS, 5, seed=7)}
UNEVEN = [(normal(n, 3, seed=10 + n), normal(n, seed=20 + n)) for n in (5, 5, 4, 2)]
ONE = (normal(6, 3, seed=8), normal(6, seed=9))


class Noted(NamedTuple):
    largest: Tensor
    rows: int
    nothing: None


def loss(p: Any, buffers: Any, batch: Any, scale: Any, more: Any) -> tuple[Tensor, Any, Any]:
    """A regression whose residuals are normalized by running means of what it has seen, in place and out of place."""
    x, y = batch.values() if isinstance(batch, dict) else batch
    z = torch.tanh(x @ p["w"] + p["b"]) * scale
    value = ((z - y - buffers["mean"]) ** 2).mean() / (1 + buffers["spread"].sum()) + (more["weights"] * p["w"] ** 2).sum()
    buffers["count"].add_(1)
    buffers["mean"].mul_(0.8).add_(0.2 * z.mean())
    spread = 0.7 * buffers["spread"] + 0.3 * (z - buffers["mean"]).square().mean()
    return value, {"mean": buffers["mean"], "spread": spread, "count": buffers["count"]}, Noted(z.abs().max(), len(x), None)


def simpler(p: Any, buffers: Any, scale: Any, more: Any) -> tuple[Tensor, Any, Any]:
    """The same on data that it knows."""
    return loss(p, buffers, ONE, scale, more)


def by_hand(
    opt: ps.Transform, function: Any, params: Any, batches: Any, *, args: Any, buffers: Any, first_order: bool = False
) -> ps.meta.Recorded:
    """The loop that `unroll` is."""
    state = opt.init_state(params)
    losses, auxes, path = [], [], [params]
    for k in range(STEPS):
        batch: tuple[Any, ...] = ()
        if isinstance(batches, list):
            batch = (batches[k],)
        elif not isinstance(batches, int):
            batch = ({name: x[k] for name, x in batches.items()},)

        def value(p: Any, buffers: Any = buffers, batch: Any = batch) -> tuple[Tensor, Any]:
            found, new, aux = function(p, {name: x.clone() for name, x in buffers.items()}, *batch, *args)
            return found, (new, (aux.largest, torch.tensor(aux.rows)))

        grads, (v, (buffers, aux)) = torch.func.grad_and_value(value, has_aux=True)(params)
        if first_order:
            grads, v, buffers, aux = ps.detach((grads, v, buffers, aux))
        extras = {"value": v, "value_and_grad": lambda p, f=value: swapped(torch.func.grad_and_value(f, has_aux=True)(p))}
        params, state = opt.step(grads, state, params, **{k: extras[k] for k in opt.plan.extras})
        losses.append(v)
        auxes.append(aux)
        path.append(params)
    trajectory = {name: torch.stack([p[name] for p in path]) for name in params}
    aux = Noted(torch.stack([x[0] for x in auxes]), torch.stack([x[1] for x in auxes]), None)
    return ps.meta.Recorded(params, state, torch.stack(losses), buffers, aux, trajectory)


def swapped(found: Any) -> Any:
    grads, (value, _) = found
    return value, grads


BATCHES: dict[str, Any] = {"stacked": STACKED, "listed": UNEVEN, "number": STEPS}
OPTIMIZERS: dict[str, ps.Transform] = {
    "adamw": ps.adamw(0.1, eps=1e-3),  # as one vector
    "clipped": ps.chain(ps.clip_by_global_norm(0.2), ps.sgd(0.3, momentum=0.9)),
    "asks for the loss": ps.polyak_sgd(0.5),
    "line search": ps.chain(ps.sgd(1.0), ps.scale_by_backtracking_linesearch(max_backtracking_steps=4)),
    "lbfgs": ps.lbfgs(1.0, max_iter=2, history_size=3),
}


def outer(run: Callable[..., Any], name: str, kind: str, given: Any, first_order: bool, every: int | None) -> Any:
    """A number that all that comes out leads to, and what comes out, as tensors alone."""
    params, buffers, batches, args = given
    options: dict[str, Any] = {} if run is by_hand else {"has_aux": True, "trajectory": True, "checkpoint_every": every}
    made = run(
        OPTIMIZERS[name],
        simpler if kind == "number" else loss,
        params,
        STEPS if kind == "number" else batches,
        args=args,
        buffers={**buffers, "count": BUFFERS["count"]},
        first_order=first_order,
        **options,
    )
    assert type(made) is ps.meta.Recorded
    assert type(made.aux) is Noted
    assert made.aux.nothing is None
    floats = [x for x in flat(tuple(made)) if x.is_floating_point()]
    return sum(dot(x, directions(x)) for x in floats), flat(tuple(made))


def everything(kind: str) -> Any:
    """All that `outer` is a function of, in floating-point numbers."""
    buffers = {name: BUFFERS[name] for name in ("mean", "spread")}
    return PARAMS, buffers, None if kind == "number" else BATCHES[kind], ARGS


def derivatives(mode: str, function: Callable[[Any], Any], given: Any) -> tuple[list[Tensor], list[Tensor]]:
    """What comes out, and its derivatives by all that goes in."""
    leaves, spec = pytree.tree_flatten(given)
    places = [k for k, x in enumerate(leaves) if isinstance(x, Tensor)]

    def of_tensors(*xs: Tensor) -> Any:
        filled = list(leaves)
        for k, x in zip(places, xs):
            filled[k] = x
        return function(pytree.tree_unflatten(filled, spec))

    xs = [leaves[k] for k in places]
    if mode == "grad":
        grads, made = torch.func.grad(of_tensors, tuple(range(len(xs))), has_aux=True)(*xs)
        return made, list(grads)
    if mode == "backward":
        xs = [x.clone().requires_grad_() for x in xs]
        value, made = of_tensors(*xs)
        found = torch.autograd.grad(value, xs, allow_unused=True)  # first order: data are no hyperparameters
        return ps.detach(made), [torch.zeros_like(x) if g is None else g for g, x in zip(found, xs)]
    if mode == "jvp":
        ways = tuple([directions(x) for x in xs])
        value, slope, made = torch.func.jvp(of_tensors, tuple(xs), ways, has_aux=True)
        return [value, *made], [slope]
    assert mode == "vmap"  # of grad, over two members of everything
    pairs = [torch.stack([x, x + 0.1 * directions(x)]) for x in xs]
    grads, made = torch.func.vmap(torch.func.grad(of_tensors, tuple(range(len(xs))), has_aux=True))(*pairs)
    return made, list(grads)


def agree(mode: str, name: str, kind: str, first_order: bool, every: int | None) -> None:
    given = everything(kind)
    hand = functools.partial(outer, by_hand, name, kind, first_order=first_order, every=None)
    ours = functools.partial(outer, ps.meta.unroll, name, kind, first_order=first_order, every=every)
    wanted, slopes = derivatives(mode, hand, given)
    found, again = derivatives(mode, ours, given)
    assert difference(found, wanted) <= 1e-12
    assert difference(again, slopes) <= 1e-11
    assert sum([x.abs().sum() for x in again]) > 0


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("every", [None, 1, 3])
def test_all_that_comes_out_by_all_that_goes_in(name: str, kind: str, every: int | None) -> None:
    """Buffers, args, aux and trajectory, with `torch.func.grad`."""
    agree("grad", name, kind, False, every)


@pytest.mark.parametrize("mode", ["backward", "jvp", "vmap"])
@pytest.mark.parametrize("name", ["adamw", "line search"])
@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("every", [None, 3])
def test_in_other_modes(mode: str, name: str, kind: str, every: int | None) -> None:
    agree(mode, name, kind, False, every)


@pytest.mark.parametrize("mode", ["grad", "backward", "jvp", "vmap"])
@pytest.mark.parametrize("name", ["adamw", "clipped"])
@pytest.mark.parametrize("every", [None, 3])
def test_the_first_order(mode: str, name: str, every: int | None) -> None:
    agree(mode, name, "listed", True, every)


@pytest.mark.parametrize("name", ["adamw", "clipped"])
@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.in_turn("name")
def test_as_one_graph(name: str, kind: str) -> None:
    """`torch.compile` of the derivatives, and of the plain run."""
    function = functools.partial(outer, ps.meta.unroll, name, kind, first_order=False, every=None)
    given = everything(kind)

    def slope(params: Any, buffers: Any, args: Any) -> Any:
        return torch.func.grad(lambda *each: function((*each[:2], given[2], each[2])), (0, 1, 2), has_aux=True)(
            params, buffers, args
        )

    parts = given[0], given[1], given[3]
    compiled = torch.compile(slope, fullgraph=True, backend="eager")
    assert difference(flat(compiled(*parts)), flat(slope(*parts))) <= 1e-12
    plain = torch.compile(lambda *each: function((*each[:2], given[2], each[2]))[1], fullgraph=True, backend="eager")
    assert difference(plain(*parts), function(given)[1]) <= 1e-12


def test_each_part_by_itself() -> None:
    """What is not asked for is None, and the loss takes and returns what was asked for alone."""
    opt = ps.sgd(0.1)

    def value(p: Any, *more: Any) -> tuple[Tensor, Any, Any]:
        return loss(p, {name: x.clone() for name, x in BUFFERS.items()}, *more)

    plain = ps.meta.unroll(opt, lambda *xs: value(*xs)[0], PARAMS, UNEVEN, args=ARGS)
    assert type(plain) is ps.meta.Unrolled
    assert len(plain) == 3
    aux = ps.meta.unroll(opt, lambda *xs: value(*xs)[::2], PARAMS, UNEVEN, args=ARGS, has_aux=True)
    assert (aux.buffers, aux.trajectory) == (None, None)
    assert torch.equal(aux.aux.rows, torch.tensor([5, 5, 4, 2]))
    path = ps.meta.unroll(opt, lambda *xs: value(*xs)[0], PARAMS, UNEVEN, args=ARGS, trajectory=True)
    assert (path.buffers, path.aux) == (None, None)
    assert path.trajectory["w"].shape == (STEPS + 1, 3)
    buffers = ps.meta.unroll(opt, lambda p, b, *xs: loss(p, b, *xs)[:2], PARAMS, UNEVEN, args=ARGS, buffers=BUFFERS)
    assert (buffers.aux, buffers.trajectory) == (None, None)
    assert buffers.buffers["count"] == 7 + STEPS
    assert BUFFERS["count"] == 7
    for made in (aux, path):
        assert difference(made.losses, plain.losses) == 0
        assert difference(made.params, plain.params) == 0
    assert difference(path.trajectory["w"][[0, -1]], torch.stack([PARAMS["w"], plain.params["w"]])) == 0


class Batch(NamedTuple):
    x: Tensor
    y: Tensor


@pytest.mark.parametrize("every", [None, 2])
def test_how_batches_may_be_given(every: int | None) -> None:
    """A list, a loader, a generator and a deque hold one batch per step; a tuple, a named tuple and a dict hold all steps."""

    def fit(p: Any, batch: Any) -> Tensor:
        x, y = batch.values() if isinstance(batch, dict) else batch
        return ((x @ p["w"] + p["b"] - y) ** 2).mean()

    x, y = STACKED["x"], STACKED["y"]
    run = functools.partial(ps.meta.unroll, ps.adam(0.1), fit, PARAMS, checkpoint_every=every)
    wanted = run(STACKED)
    rows = list(zip(x, y))
    loader = DataLoader(TensorDataset(x.flatten(0, 1), y.flatten()), batch_size=5)
    for batches in (rows, iter(rows), deque(rows), loader, (x, y), Batch(x, y), [Batch(*row) for row in rows]):
        assert difference(tuple(run(batches)), tuple(wanted)) <= 1e-14
    uneven = DataLoader(TensorDataset(x.flatten(0, 1), y.flatten()), batch_size=8)
    assert len(run(uneven).losses) == 3


def test_a_list_of_two_is_two_steps() -> None:
    """Not one pair of stacked tensors, which is a tuple."""
    seen = []

    def fit(p: Tensor, batch: Any) -> Tensor:
        seen.append(batch)
        return ((p - batch) ** 2).mean()

    ps.meta.unroll(ps.sgd(0.1), fit, torch.zeros(2), [torch.ones(5, 2), torch.zeros(3, 2)])
    assert [tuple(x.shape) for x in seen] == [(5, 2), (3, 2)]


# ------------------------------------------------------------------------------------------------------ batch normalization


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)).double()


def parts(net: nn.Module) -> tuple[Any, Any]:
    return {k: p.detach().clone() for k, p in net.named_parameters()}, {k: b.clone() for k, b in net.named_buffers()}


def normalized(net: nn.Module) -> Callable[..., Any]:
    def loss(params: Any, buffers: Any, batch: Any) -> tuple[Tensor, Any]:
        x, y = batch
        return (functional_call(net, {**params, **buffers}, (x,)).squeeze(1) - y).square().mean(), buffers

    return loss


@pytest.mark.parametrize("every", [None, 1, 3])
@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_a_network_with_batch_normalization(optimizer: str, every: int | None) -> None:
    """Parameters, losses and buffers are those of torch's own loop."""
    net = network()
    params, buffers = parts(net)
    kept = {k: b.clone() for k, b in buffers.items()}
    opt = {"SGD": ps.sgd(0.1), "Adam": ps.adam(0.1)}[optimizer]
    found = ps.meta.unroll(opt, normalized(net), params, UNEVEN, buffers=buffers, checkpoint_every=every)
    assert all([torch.equal(b, kept[k]) for k, b in buffers.items()])
    assert all([torch.equal(b, kept[k]) for k, b in net.named_buffers()])
    theirs = getattr(torch.optim, optimizer)(net.parameters(), lr=0.1)
    losses = []
    for x, y in UNEVEN:
        theirs.zero_grad()
        value = nn.functional.mse_loss(net(x).squeeze(1), y)
        value.backward()
        theirs.step()
        losses.append(value.detach())
    assert difference(found.params, {k: p.detach() for k, p in net.named_parameters()}) <= 1e-12
    assert difference(found.losses, torch.stack(losses)) <= 1e-12
    for name, b in net.named_buffers():
        assert found.buffers[name].dtype == b.dtype
        torch.testing.assert_close(found.buffers[name], b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("every", [None, 1, 3])
@pytest.mark.parametrize("mode", ["grad", "backward", "jvp", "vmap", "compiled"])
@pytest.mark.in_turn("every")
def test_a_learning_rate_for_batch_normalization(mode: str, every: int | None) -> None:
    """Against finite differences."""
    net = network()
    params, buffers = parts(net)
    given = normalized(net)

    def trained(lr: Tensor) -> tuple[Tensor, Any]:
        found = ps.meta.unroll(ps.sgd(lr), given, params, [*UNEVEN, ONE], buffers=buffers, checkpoint_every=every)
        return found.losses.sum(), found.buffers

    lr = torch.tensor(0.1, dtype=torch.float64)
    numeric = (trained(lr + 1e-6)[0] - trained(lr - 1e-6)[0]) / 2e-6
    if mode == "grad":
        slope, after = torch.func.grad(trained, has_aux=True)(lr)
    elif mode == "backward":
        leaf = lr.clone().requires_grad_()
        value, after = trained(leaf)
        (slope,) = torch.autograd.grad(value, leaf)
        assert not any([b.requires_grad for b in after.values()])  # which torch's batch normalization would refuse
    elif mode == "jvp":
        _, slope, after = torch.func.jvp(trained, (lr,), (torch.ones_like(lr),), has_aux=True)
    elif mode == "compiled":
        slope, after = torch.compile(torch.func.grad(trained, has_aux=True), fullgraph=True, backend="eager")(lr)
    else:
        slopes, both = torch.func.vmap(torch.func.grad(trained, has_aux=True), out_dims=(0, dims(buffers)))(
            torch.stack([lr, lr / 2])
        )
        slope, after = slopes[0], {k: b[0] if b.dim() > buffers[k].dim() else b for k, b in both.items()}
        other, later = torch.func.grad(trained, has_aux=True)(lr / 2)
        assert difference(slopes[1], other) <= 1e-11
        for k, b in later.items():
            torch.testing.assert_close(both[k][1] if both[k].dim() > b.dim() else both[k], b, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(slope, numeric, rtol=1e-5, atol=1e-8)
    wanted = trained(lr)[1]
    for k, b in wanted.items():
        torch.testing.assert_close(after[k], b, rtol=1e-11, atol=1e-12)


def dims(buffers: Any) -> Any:
    return {k: 0 if b.is_floating_point() else None for k, b in buffers.items()}


@pytest.mark.parametrize("every", [None, 2])
def test_networks_on_data_of_their_own(every: int | None) -> None:
    """vmap over data: buffers that are the same for all members at the start, or stacked, and a counter that is stacked, too."""
    net = network()
    params, buffers = parts(net)
    data = [(torch.stack([x, 2 * x + 1]), torch.stack([y, -y])) for x, y in UNEVEN]

    def train(batches: Any, buffers: Any) -> Any:
        return tuple(
            ps.meta.unroll(ps.sgd(0.1), normalized(net), params, batches, buffers=buffers, checkpoint_every=every)[:4:3]
        )

    same = torch.func.vmap(train, in_dims=(0, None), out_dims=(0, dims(buffers)))(data, buffers)
    stacked = torch.func.vmap(train)(data, {k: torch.stack([b, b]) for k, b in buffers.items()})
    for i in range(2):
        alone, after = train([(x[i], y[i]) for x, y in data], buffers)
        for made, counts in ((same, False), (stacked, True)):
            assert difference({k: p[i] for k, p in made[0].items()}, alone) <= 1e-12
            for k, b in after.items():
                torch.testing.assert_close(made[1][k][i] if b.dim() or counts else made[1][k], b, rtol=1e-12, atol=1e-12)


def test_a_cumulative_average_reads_its_counter_under_vmap() -> None:
    """Batch normalization with momentum=None makes a number of its counter, which is refused of a batch."""
    net = nn.BatchNorm1d(3, momentum=None).double()
    params, buffers = parts(net)

    def loss(params: Any, buffers: Any, x: Tensor) -> tuple[Tensor, Any]:
        return functional_call(net, {**params, **buffers}, (x,)).sin().sum(), buffers

    def train(x: Tensor) -> Tensor:
        return ps.meta.unroll(ps.sgd(0.1), loss, params, x, buffers=buffers).buffers["running_mean"]

    x = normal(2, STEPS, 5, 3, seed=30)
    assert difference(torch.func.vmap(train)(x), x.mean((1, 2))) <= 1e-12


@pytest.mark.parametrize("every", [None, 2])
def test_a_line_search_leaves_the_buffers_of_its_trials_out(every: int | None) -> None:
    """However often the loss is evaluated within a step, batches are counted once, and every trial has the same buffers."""
    seen: list[float] = []

    def loss(p: Tensor, buffers: Any) -> tuple[Tensor, Any]:
        seen.append(buffers["n"].item())
        buffers["n"].add_(1)
        return (p**4).sum(), buffers

    opt = ps.chain(ps.sgd(1.0), ps.scale_by_backtracking_linesearch(max_backtracking_steps=8))
    found = ps.meta.unroll(
        opt, loss, torch.full((2,), 2.0), 3, buffers={"n": torch.zeros((), dtype=torch.long)}, checkpoint_every=every
    )
    assert found.buffers["n"] == 3
    assert len(seen) > 6
    assert sorted(seen) == seen


@pytest.mark.parametrize("every", [None, 2])
def test_randomness_in_aux_is_that_of_the_values(every: int | None) -> None:
    """What a checkpointed segment attaches its derivatives to is what was drawn the first time."""
    x = torch.arange(1.0, 7.0, dtype=torch.float64)

    def dropped(p: Tensor) -> tuple[Tensor, Any]:
        kept = nn.functional.dropout(p**2, 0.5)
        return kept.sum(), kept

    def kept(p: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        found = ps.meta.unroll(ps.sgd(0.01), dropped, p, 4, has_aux=True, checkpoint_every=every)
        return found.aux.sum() - found.losses.sum(), found.aux

    slope, aux = torch.func.grad(kept, has_aux=True)(x)
    assert slope.abs().max() <= 1e-12
    assert (aux == 0).any()
