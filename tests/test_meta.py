"""Training that is differentiated, optima that are, and estimates for what cannot be."""

from __future__ import annotations

import functools
import gc
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import purestep as ps
from tests.problems import difference

STEPS = 4


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


PARAMS = {"w": normal(3, seed=1), "b": normal(seed=2)}
BATCHES = {"x": normal(STEPS, 5, 3, seed=3), "y": normal(STEPS, 5, seed=4)}
HELD_OUT = {"x": normal(6, 3, seed=5), "y": normal(6, seed=6)}


def loss(p: Any, batch: Any) -> Tensor:
    """A regression with a bend, so that all its derivatives are there."""
    return ((torch.tanh(batch["x"] @ p["w"] + p["b"]) - batch["y"]) ** 2).mean()


def flat(tree: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(tree) if isinstance(x, Tensor)]


def dot(a: Any, b: Any) -> Tensor:
    return sum(((x * y).sum() for x, y in zip(flat(a), flat(b))), torch.zeros((), dtype=torch.float64))


def directions(tree: Any) -> Any:
    """Something of the same structure with other numbers."""
    return pytree.tree_map(lambda x: torch.cos(torch.arange(x.numel(), dtype=x.dtype) + 1).reshape(x.shape), tree)


def along(tree: Any, step: float, direction: Any) -> Any:
    return pytree.tree_map(lambda x, d: x + step * d, tree, direction)


def by_hand(opt: Any, loss: Any, params: Any, batches: Any, state: Any = None, first_order: bool = False) -> Any:
    """The loop that `unroll` is."""
    state = opt.init_state(params) if state is None else state
    losses = []
    for k in range(len(flat(batches)[0])):
        batch = pytree.tree_map(lambda x, k=k: x[k], batches)
        grads, value = torch.func.grad_and_value(loss)(params, batch)
        if first_order:
            grads, value = ps.detach((grads, value))
        extras = {"value": value, "value_and_grad": lambda p, b=batch: torch.func.grad_and_value(loss)(p, b)[::-1]}
        params, state = opt.step(grads, state, params, **{k: extras[k] for k in opt.plan.extras})
        losses.append(value)
    return params, state, torch.stack(losses)


OPTIMIZERS: dict[str, ps.Transform] = {
    "sgd": ps.sgd(0.1, momentum=0.9, weight_decay=0.01),
    "adamw": ps.adamw(0.1, eps=1e-3),
    "clipped": ps.chain(ps.clip_by_global_norm(0.2), ps.adam(0.1, eps=1e-3)),
    "scheduled": ps.sgd(ps.schedules.cosine(0.2, total_steps=6), momentum=ps.schedules.linear(0.5, 0.9, total_steps=3)),
    "partition": ps.partition({"v": ps.adam(0.1, eps=1e-3), "s": ps.sgd(0.1)}, lambda path, p: "v" if p.ndim else "s"),
    "accumulated": ps.accumulate(ps.sgd(0.1, momentum=0.5), 2),
    "schedule-free": ps.schedule_free_sgd(0.2, momentum=0.8),
    "asks for the loss": ps.polyak_sgd(0.5),
    "plateau": ps.chain(ps.sgd(0.5), ps.reduce_on_plateau(patience=1, factor=0.5)),
    "line search": ps.chain(ps.sgd(1.0), ps.scale_by_backtracking_linesearch(max_backtracking_steps=4)),
    "lbfgs": ps.lbfgs(1.0, max_iter=2, history_size=3),
}
each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


@each_optimizer
@pytest.mark.parametrize("first_order", [False, True])
def test_unroll_is_the_loop(name: str, first_order: bool) -> None:
    """Parameters, state and losses; and the derivatives of the last loss by the parameters and the batches."""
    opt = OPTIMIZERS[name]

    def outer(run: Any, params: Any, batches: Any) -> Any:
        result = run(opt, loss, params, batches, first_order=first_order)
        return loss(result[0], HELD_OUT), flat(tuple(result))  # torch.func hands no None back

    wanted, trained = torch.func.grad(functools.partial(outer, by_hand), (0, 1), has_aux=True)(PARAMS, BATCHES)
    found, again = torch.func.grad(functools.partial(outer, ps.meta.unroll), (0, 1), has_aux=True)(PARAMS, BATCHES)
    assert difference(again, trained) <= 1e-12
    assert difference(found, wanted) <= 1e-12


@each_optimizer
@pytest.mark.parametrize("every", [1, 3, STEPS, STEPS + 2])
def test_checkpoints_change_nothing(name: str, every: int) -> None:
    opt = OPTIMIZERS[name]

    def outer(every: Any, params: Any, batches: Any) -> Any:
        result = ps.meta.unroll(opt, loss, params, batches, checkpoint_every=every)
        return loss(result.params, HELD_OUT) + result.losses.mean(), flat(tuple(result))

    wanted, trained = torch.func.grad(functools.partial(outer, None), (0, 1), has_aux=True)(PARAMS, BATCHES)
    found, again = torch.func.grad(functools.partial(outer, every), (0, 1), has_aux=True)(PARAMS, BATCHES)
    assert difference(again, trained) <= 1e-12
    assert difference(found, wanted) <= 1e-12


class Counted(NamedTuple):
    seen: dict[str, Tensor]

    @classmethod
    def init(cls, params: list[Tensor]) -> Counted:
        return cls({"updates": torch.zeros(())})


def test_a_state_of_its_own_may_be_any_tree() -> None:
    @ps.whole(Counted)
    def counting(gs: list[Tensor], s: Counted, params: list[Tensor]) -> Any:
        return [-0.1 * g for g in gs], Counted({"updates": s.seen["updates"] + 1})

    result = ps.meta.unroll(counting(), loss, PARAMS, BATCHES)
    assert torch.equal(result.state.seen["updates"], torch.tensor(float(STEPS)))
    assert difference(result.params, ps.meta.unroll(ps.sgd(0.1), loss, PARAMS, BATCHES).params) <= 1e-12


def test_maml_written_out() -> None:
    """Two steps of gradient descent with second derivatives, without this library; and first-order MAML: the gradient at the end."""
    lr = torch.tensor(0.1, dtype=torch.float64)

    def outer(first_order: bool, lr: Tensor, params: Any) -> Tensor:
        return loss(ps.meta.unroll(ps.sgd(lr), loss, params, BATCHES, first_order=first_order).params, HELD_OUT)

    leaves = {k: p.clone().requires_grad_() for k, p in PARAMS.items()}
    rate = lr.clone().requires_grad_()
    p, steps = leaves, []
    for k in range(STEPS):
        value = loss(p, {name: x[k] for name, x in BATCHES.items()})
        steps.append(dict(zip(p, torch.autograd.grad(value, list(p.values()), create_graph=True))))
        p = {name: p[name] - rate * steps[-1][name] for name in p}
    wanted = torch.autograd.grad(loss(p, HELD_OUT), [rate, *leaves.values()])
    found = torch.func.grad(functools.partial(outer, False), (0, 1))(lr, PARAMS)
    assert difference(flat(found), list(wanted)) <= 1e-12

    at_the_end = torch.func.grad(loss)(ps.detach(p), HELD_OUT)
    by_lr, by_params = torch.func.grad(functools.partial(outer, True), (0, 1))(lr, PARAMS)
    assert difference(by_params, at_the_end) <= 1e-12
    assert difference(by_lr, -sum(dot(ps.detach(g), at_the_end) for g in steps)) <= 1e-12


def whole(every: int | None = None) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
    """Training as a function of all it depends on: transform, parameters, state, batches, and what the loss closes over."""
    opt = ps.tensors(ps.chain(ps.clip_by_global_norm(0.3), ps.adamw(0.1, betas=(0.8, 0.9), eps=0.1, weight_decay=0.1)))
    moments = (
        ps.adamw()
        .init_state(PARAMS)[0]
        ._replace(exp_avg=directions(PARAMS), exp_avg_sq={k: 1 + p**2 for k, p in PARAMS.items()})
    )
    state = tuple(moments if hasattr(s, "exp_avg") else s for s in opt.init_state(PARAMS))

    def outer(opt: Any, params: Any, means: Any, squares: Any, batches: Any, penalty: Tensor) -> Tensor:
        given = tuple(s._replace(exp_avg=means, exp_avg_sq=squares) if hasattr(s, "exp_avg") else s for s in state)

        def penalized(p: Any, batch: Any) -> Tensor:
            return loss(p, batch) + penalty * dot(p, p)

        found = ps.meta.unroll(opt, penalized, params, batches, state=given, checkpoint_every=every)
        return loss(found.params, HELD_OUT) + found.losses[1] + 0.1 * dot(found.state, directions(found.state))

    return outer, (opt, PARAMS, moments.exp_avg, moments.exp_avg_sq, BATCHES, torch.tensor(0.3, dtype=torch.float64))


WHOLE = ("transform", "parameters", "means", "squares", "batches", "closure")


@pytest.mark.parametrize("every", [None, 3])
@pytest.mark.parametrize("mode", ["torch.func.grad", "backward", "torch.func.jvp"])
def test_derivatives_with_respect_to_everything(mode: str, every: int | None) -> None:
    """Along a line through each argument in turn, against finite differences."""
    outer, given = whole(every)
    flats = [pytree.tree_flatten(x) for x in given]
    slopes: list[Any] = []
    if mode == "torch.func.grad":
        slopes = list(torch.func.grad(outer, tuple(range(len(given))))(*given))
    if mode == "backward":
        leaves = [[x.detach().clone().requires_grad_() for x in xs] for xs, _ in flats]
        outer(*[pytree.tree_unflatten(xs, spec) for xs, (_, spec) in zip(leaves, flats)]).backward()
        slopes = [[x.grad for x in xs] for xs in leaves]
    for k, (name, x) in enumerate(zip(WHOLE, given)):
        way = directions(x)
        ends = [outer(*given[:k], along(x, h, way), *given[k + 1 :]) for h in (1e-5, -1e-5)]
        numeric = (ends[0] - ends[1]) / 2e-5
        if mode == "torch.func.jvp":
            _, slope = torch.func.jvp(lambda y, k=k: outer(*given[:k], y, *given[k + 1 :]), (x,), (way,))
        else:
            slope = dot(slopes[k], way)
        torch.testing.assert_close(slope, numeric, rtol=1e-6, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


def test_second_derivatives_through_checkpoints() -> None:
    """Reverse over reverse, and forward over reverse, against the loop without checkpoints; forward over forward is refused."""
    x = torch.tensor([0.1, 0.2], dtype=torch.float64)

    def outer(every: int | None, x: Tensor) -> Tensor:
        opt = ps.chain(ps.trace(x[1]), ps.scale_by_learning_rate(x[0]))
        return loss(ps.meta.unroll(opt, loss, PARAMS, BATCHES, checkpoint_every=every).params, HELD_OUT)

    wanted = torch.func.hessian(functools.partial(outer, None))(x)
    checked = functools.partial(outer, 2)
    assert difference(torch.func.jacfwd(torch.func.jacrev(checked))(x), wanted) <= 1e-10
    assert difference(torch.func.jacrev(torch.func.jacrev(checked))(x), wanted) <= 1e-10
    assert difference(torch.func.jacrev(torch.func.jacfwd(checked))(x), wanted) <= 1e-10
    with pytest.raises(
        RuntimeError, match=r"Forward-mode differentiation of forward-mode .*Take one of the two derivatives in reverse"
    ):
        torch.func.jacfwd(torch.func.jacfwd(checked))(x)


@pytest.mark.parametrize("every", [None, 1, 3])
def test_hypergradients_of_a_population(every: int | None) -> None:
    """vmap of grad over optimizers and tasks, whose labels are captured whole numbers, is a loop of grads."""
    opt = ps.stack([ps.adam(0.1, eps=1e-3), ps.adam(0.2, eps=1e-3)])
    labels = torch.tensor([[0, 1, 1, 0, 2, 1], [2, 2, 0, 1, 0, 0]])
    params = {"w": torch.stack([normal(3, 3, seed=7), normal(3, 3, seed=8)])}
    x = HELD_OUT["x"]

    def outer(lr: Tensor, params: Any, labels: Tensor) -> Tensor:
        def entropy(p: Any) -> Tensor:
            return torch.nn.functional.cross_entropy(x @ p["w"], labels)

        return entropy(ps.meta.unroll(ps.adam(lr, eps=1e-3), entropy, params, STEPS, checkpoint_every=every).params)

    lrs = opt.hyperparams["lr"]
    slope = torch.func.grad(outer, (0, 1))
    together = torch.func.vmap(slope)(lrs, params, labels)
    for i in range(2):
        alone = slope(lrs[i], {k: p[i] for k, p in params.items()}, labels[i])
        assert difference(pytree.tree_map(lambda x, i=i: x[i], together), alone) <= 1e-12
    # labels that only the closure knows, inside a map over something else
    mapped = torch.func.vmap(lambda i: slope(lrs[0], {"w": params["w"][0]}, labels[i]))(torch.arange(2))
    for i in range(2):
        assert (
            difference(pytree.tree_map(lambda x, i=i: x[i], mapped), slope(lrs[0], {"w": params["w"][0]}, labels[i])) <= 1e-12
        )


@pytest.mark.parametrize("every", [None, 2])
def test_what_a_loss_closes_over(every: int | None) -> None:
    """A network of its own, by autograd; a tensor that torch.func follows; one computed from that; and nothing else changes."""
    net = torch.nn.Linear(3, 1, dtype=torch.float64)

    def outer(scale: Tensor) -> Tensor:
        twice = 2 * scale

        def learned(p: Any, batch: Any) -> Tensor:
            return loss(p, batch) + (net(p["w"]) * twice).sum()

        return loss(ps.meta.unroll(ps.sgd(0.1), learned, PARAMS, BATCHES, checkpoint_every=every).params, HELD_OUT)

    scale = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    found = torch.autograd.grad(outer(scale), [scale, net.weight])
    assert difference(torch.func.grad(outer)(scale.detach()).detach(), found[0]) <= 1e-12
    with torch.no_grad():
        numeric = (outer(scale + 1e-5) - outer(scale - 1e-5)) / 2e-5
        torch.testing.assert_close(found[0], numeric, rtol=1e-6, atol=1e-10)
        values = []
        for h in (1e-5, -1e-5):
            net.weight += h * directions(net.weight)
            values.append(outer(scale))
            net.weight -= h * directions(net.weight)
    torch.testing.assert_close(dot(found[1], directions(net.weight)), (values[0] - values[1]) / 2e-5, rtol=1e-6, atol=1e-10)
    assert net.weight.grad is None


def test_randomness_is_repeated_in_checkpoints() -> None:
    """A segment that is run again draws what it drew before, or its derivatives were those of another one."""

    def dropped(p: Any, batch: Any) -> Tensor:
        return torch.nn.functional.dropout((p - batch) ** 2, 0.5).sum()

    def slope(every: int | None) -> Tensor:
        torch.manual_seed(0)
        x = torch.arange(1.0, 7.0, dtype=torch.float64)
        return torch.func.grad(
            lambda p: ps.meta.unroll(ps.sgd(0.1), dropped, p, torch.zeros(4, 6), checkpoint_every=every).params.sum()
        )(x)

    assert difference(slope(2), slope(None)) <= 1e-12


def test_one_long_run_in_two_parts() -> None:
    opt = OPTIMIZERS["scheduled"]
    first, second = ({k: x[part] for k, x in BATCHES.items()} for part in (slice(0, 1), slice(1, None)))
    begun = ps.meta.unroll(opt, loss, PARAMS, first)
    ended = ps.meta.unroll(opt, loss, begun.params, second, state=begun.state)
    whole = ps.meta.unroll(opt, loss, PARAMS, BATCHES)
    assert difference([ended.params, flat(ended.state)], [whole.params, flat(whole.state)]) == 0
    assert difference(torch.cat([begun.losses, ended.losses]), whole.losses) == 0


def test_a_number_of_steps_on_the_same_data() -> None:
    batch = {k: x[0] for k, x in BATCHES.items()}
    same = {k: x[:1].expand(3, *x.shape[1:]) for k, x in BATCHES.items()}
    found = ps.meta.unroll(OPTIMIZERS["lbfgs"], lambda p: loss(p, batch), PARAMS, 3)
    assert difference(tuple(found), tuple(ps.meta.unroll(OPTIMIZERS["lbfgs"], loss, PARAMS, same))) == 0


@pytest.mark.parametrize("every", [None, 2])
def test_without_anything_to_differentiate_nothing_is_recorded(every: int | None) -> None:
    found = ps.meta.unroll(OPTIMIZERS["adamw"], loss, PARAMS, BATCHES, checkpoint_every=every)
    assert not any(x.requires_grad or x.grad_fn for x in flat(tuple(found)))
    params = {k: p.clone().requires_grad_() for k, p in PARAMS.items()}
    with torch.no_grad():
        found = ps.meta.unroll(OPTIMIZERS["adamw"], loss, params, BATCHES, checkpoint_every=every)
    assert not any(x.requires_grad for x in flat(tuple(found)))


@pytest.mark.parametrize("every", [None, 2])
def test_the_first_order_keeps_no_second_derivatives(every: int | None) -> None:
    """It is the loss at the end that is differentiated, and the loop is not: twice is nothing by the parameters in it."""
    params = {k: p.clone().requires_grad_() for k, p in PARAMS.items()}
    found = ps.meta.unroll(ps.sgd(0.1), loss, params, BATCHES, first_order=True, checkpoint_every=every)
    assert found.params["w"].requires_grad
    assert difference(torch.autograd.grad(found.params["w"].sum(), params["w"])[0], torch.ones(3, dtype=torch.float64)) == 0
    if every is None:
        assert not found.losses.requires_grad


# -------------------------------------------------------------------------------------------------------------------- memory


class Alive(TorchDispatchMode):
    """How many bytes of the tensors that operations have made are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.calls, self.most = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        for x in flat(result):
            storage = x.untyped_storage()
            self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.calls += 1
        if self.calls % 20 == 0:
            self.most = max(self.most, self.bytes())
        return result

    def bytes(self) -> int:
        self.made = {k: (ref, n) for k, (ref, n) in self.made.items() if not ref.expired()}
        return sum(n for _, n in self.made.values())


@pytest.fixture
def no_collector() -> Iterator[None]:
    """What is freed is freed because nobody refers to it any more, and not because a cycle was found."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def memory(steps: int, every: int | None) -> tuple[int, int]:
    """The bytes that are kept until backward, and the most there are at any time, in units of the parameters."""
    p = torch.ones(256, requires_grad=True)
    with Alive() as alive:
        found = ps.meta.unroll(
            ps.sgd(0.01, momentum=0.9), lambda p: torch.cos(torch.sin(p).exp()).sum(), p, steps, checkpoint_every=every
        )
        kept = alive.bytes()
        found.params.sum().backward()
    return kept // 1024, alive.most // 1024


def test_memory_grows_with_the_root_of_the_steps(no_collector: None) -> None:
    kept, most = memory(64, 8)
    assert kept <= 0.2 * memory(64, None)[0]
    longer = memory(256, 16)
    assert longer[0] <= 2.5 * kept  # 2, if what does not depend on the steps is left out
    assert longer[1] <= 2.5 * most
    assert memory(256, None)[1] >= 3.5 * memory(64, None)[1]  # so this would have been seen


@pytest.mark.parametrize("every", [None, 2])
def test_nothing_is_left_of_an_outer_step(every: int | None, no_collector: None) -> None:
    lr = torch.tensor(0.1, dtype=torch.float64)

    def outer(lr: Tensor) -> Tensor:
        return loss(ps.meta.unroll(ps.adam(lr), loss, PARAMS, BATCHES, checkpoint_every=every).params, HELD_OUT)

    left = []
    with Alive() as alive:
        for _ in range(4):
            torch.func.grad(outer)(lr)
            left.append(alive.bytes())
    assert left[1] == left[2] == left[3]


# ----------------------------------------------------------------------------------------------------------------- compiled


@pytest.mark.parametrize("name", ["sgd", "clipped", "scheduled"])
def test_an_unrolled_loop_is_compiled(name: str) -> None:
    """`torch.func.grad` of an inner loop as one graph, once for all learning rates."""
    two = {k: x[:2] for k, x in BATCHES.items()}

    def outer(opt: ps.Transform, params: Any) -> Tensor:
        return loss(ps.meta.unroll(opt, loss, params, two).params, HELD_OUT)

    slope = torch.func.grad(outer, (0, 1))
    compiled = torch.compile(slope, fullgraph=True, backend="eager")
    for k in range(3):
        opt = pytree.tree_map(lambda x, k=k: x * (1 - 0.1 * k), ps.tensors(OPTIMIZERS[name]))
        assert difference(compiled(opt, PARAMS), slope(opt, PARAMS)) <= 1e-12
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


# ------------------------------------------------------------------------------------------------------------------ mistakes


X = torch.ones(2)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"batches": {"x": torch.ones(3, 2), "y": torch.ones(4, 2)}}, ValueError, "same number of steps, their first dimension, but 'x' has 3, 'y' has 4"),
        ({"batches": 0}, ValueError, "at least one step, but batches is 0"),
        ({"batches": -1}, ValueError, "at least one step, but batches is -1"),
        ({"batches": torch.ones(0, 2)}, ValueError, "at least one step, but the batches are for none"),
        ({"batches": {}}, ValueError, "they hold no tensor. For steps on the same data give their number"),
        ({"batches": (1.0, 2.0)}, TypeError, "tensors whose first dimension is that of the steps, but '0' is 1.0.*One batch per step, of any kind, is a list"),
        ({"batches": []}, ValueError, "at least one step, but the list of batches is empty"),
        ({"batches": "text"}, TypeError, "tensors whose first dimension is that of the steps, but the root .* is 'text'"),
        ({"args": X}, TypeError, r"args must be a tuple of further arguments of the loss, but is a tensor of shape \(2,\)\. One argument x is args=\(x,\)"),
        ({"loss": lambda p, b: ((p - b).sum(), b)}, TypeError, r"must be one number, a 0-d tensor, but is a tuple of 2. A loss that returns \(loss, aux\) takes has_aux=True"),
        ({"has_aux": True}, TypeError, r"With has_aux=True the loss must return \(loss, aux\), a tuple, but it returned a tensor of shape \(\)"),
        ({"has_aux": True, "buffers": X, "loss": lambda p, s, b: (p.sum(), s)}, TypeError, r"With buffers and has_aux=True the loss must return \(loss, buffers, aux\), a tuple, but it returned a tuple of 2"),
        ({"buffers": X, "loss": lambda p, s, b: [p.sum(), s]}, TypeError, r"With buffers the loss must return \(loss, buffers\), a tuple, but it returned a list of 2"),
        ({"buffers": {"m": X}, "loss": lambda p, s, b: (p.sum(), {})}, ValueError, "The buffers that a loss returns must have the structure of those that it is given, but there is no leaf at 'm'"),
        ({"has_aux": True, "loss": lambda p, b: (p.sum(), {"k": "text"})}, TypeError, "aux must be tensors or numbers, but 'k' is 'text'"),
        ({"has_aux": True, "loss": lambda p, b: (p.sum(), {"k": b}), "batches": [X, X[:1]]}, ValueError, r"aux must have the same shape every time, but 'k' has \(2,\) and \(1,\). Return its mean or sum"),
        ({"has_aux": True, "loss": lambda p, b: (p.sum(), {"k": b}), "batches": [X, X[:1]], "checkpoint_every": 1}, ValueError, r"aux must have the same shape every time, but 'k' has \(2,\) and \(1,\)"),
        ({"has_aux": True, "loss": lambda p, b: (p.sum(), {b: 1}), "batches": ["a", "b"]}, ValueError, "aux must have the structure of those of the first time, but there is no leaf at 'a'"),
        ({"batches": {"x": torch.ones(3, 2), "k": torch.tensor(1.0)}}, TypeError, "'k' is a tensor without dimensions. What is the same in every step belongs to the loss"),
        ({"checkpoint_every": 0}, ValueError, "checkpoint_every must be a number of steps, at least 1, but is 0; the square root .* here 2"),
        ({"checkpoint_every": 2.5}, ValueError, "checkpoint_every must be a number of steps, at least 1, but is 2.5"),
        ({"loss": lambda p, b: (p - b) ** 2}, TypeError, r"must be one number, a 0-d tensor, but is a tensor of shape \(2,\). Take its mean or sum"),
        ({"loss": lambda p, b: 1.0}, TypeError, "must be one number, a 0-d tensor, but is 1.0"),
        ({"params": torch.ones(2, dtype=torch.long)}, TypeError, "Only floating-point and complex parameters can be optimized"),
        ({"opt": ps.scale_by_sophia()}, TypeError, "scale_by_sophia needs hessian"),
    ],
    ids=["lengths", "0 steps", "-1 steps", "empty", "no tensors", "floats", "no batches", "text", "args", "a tuple", "no aux", "no aux beside buffers", "a list", "buffers", "text in aux", "shapes of aux", "shapes of aux in segments", "structures of aux", "0-d", "every 0", "every 2.5", "vector", "float", "whole numbers", "unknown extra"],
)  # fmt: skip
def test_mistakes_in_unroll(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    given = {"opt": ps.sgd(0.1), "loss": lambda p, b: ((p - b) ** 2).sum(), "params": X, "batches": torch.ones(3, 2), **options}
    with pytest.raises(kind, match=message):
        ps.meta.unroll(**given)


@pytest.mark.parametrize("every", [None, 2])
def test_randomness_under_vmap_says_what_to_set(every: int | None) -> None:
    def train(p: Tensor) -> Tensor:
        dropped = lambda p: torch.nn.functional.dropout(p**2, 0.5).sum()  # noqa: E731
        return ps.meta.unroll(ps.sgd(0.1), dropped, p, 3, checkpoint_every=every).params

    with pytest.raises(RuntimeError, match="use the 'same' or 'different' randomness flags on vmap"):
        torch.func.vmap(train)(torch.ones(3, 2))
    assert torch.func.vmap(train, randomness="different")(torch.ones(3, 64)).unique(dim=0).shape == (3, 64)


# ------------------------------------------------------------------------------------------------------------ implicit: ridge

A, Y = normal(12, 4, seed=11), normal(12, seed=12)
PENALTIES = torch.tensor([0.3, -0.2, 0.1, 0.5], dtype=torch.float64)


def ridge(x: Tensor, theta: Tensor, a: Tensor = A, y: Tensor = Y) -> Tensor:
    """Ridge regression with a penalty for each coefficient."""
    return 0.5 * ((a @ x - y) ** 2).sum() + 0.5 * (theta.exp() * x**2).sum()


def closed(theta: Tensor, a: Tensor = A, y: Tensor = Y) -> Tensor:
    return torch.linalg.solve(a.T @ a + torch.diag(theta.exp()), a.T @ y)


def exact(init: Tensor, theta: Tensor, *data: Tensor) -> Tensor:
    return closed(theta, *data)


def by_lbfgs(init: Tensor, theta: Tensor, *data: Tensor) -> Tensor:
    opt = ps.lbfgs(1.0, max_iter=40, line_search_fn="strong_wolfe", tolerance_grad=1e-12, tolerance_change=1e-15)
    return ps.meta.unroll(opt, lambda x: ridge(x, theta, *data), init, 1).params


def by_descent(init: Tensor, theta: Tensor, *data: Tensor) -> Tensor:
    return ps.meta.unroll(ps.sgd(0.035, momentum=0.6), lambda x: ridge(x, theta, *data), init, 250).params


START = torch.zeros(4, dtype=torch.float64)


@pytest.mark.parametrize(
    ("solver", "accuracy"),
    [(exact, 1e-9), (by_lbfgs, 1e-6), (by_descent, 1e-8)],  # as near as the solver comes: the derivatives are not nearer
    ids=["exact", "lbfgs", "descent"],
)
def test_ridge_regression(solver: Any, accuracy: float) -> None:
    """First derivatives in both directions against the closed form, by the penalties and by the data."""
    minimum = ps.meta.implicit(solver, torch.func.grad(ridge))
    torch.testing.assert_close(minimum(START, PENALTIES), closed(PENALTIES), rtol=accuracy, atol=accuracy)
    wanted = torch.func.jacrev(closed, (0, 1, 2))(PENALTIES, A, Y)
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        found = jacobian(minimum, (1, 2, 3))(START, PENALTIES, A, Y)
        torch.testing.assert_close(found, wanted, rtol=accuracy, atol=accuracy)
    theta = PENALTIES.clone().requires_grad_()
    (found,) = torch.autograd.grad((minimum(START, theta) * Y[:4]).sum(), theta)
    torch.testing.assert_close(found, wanted[0].T @ Y[:4], rtol=accuracy, atol=accuracy)


@pytest.mark.parametrize("solve", ["solve_cg", "solve_normal_cg", "solve_neumann"])
def test_second_derivatives_of_ridge_regression(solve: str) -> None:
    """Of a validation loss, in the three mixed ways that torch has."""
    options = {"solve_neumann": {"alpha": 0.06, "maxiter": 400}}
    using = functools.partial(getattr(ps.meta, solve), **options.get(solve, {}))
    minimum = ps.meta.implicit(exact, torch.func.grad(ridge), solve=using)
    weights = torch.cos(torch.arange(4.0, dtype=torch.float64))

    def outer(find: Any, theta: Tensor) -> Tensor:
        return (weights * find(theta) ** 3).sum()

    of_theta = functools.partial(outer, lambda theta: minimum(START, theta))
    wanted = torch.func.hessian(functools.partial(outer, closed))(PENALTIES)
    for first, second in (
        (torch.func.jacrev, torch.func.jacrev),
        (torch.func.jacfwd, torch.func.jacrev),
        (torch.func.jacrev, torch.func.jacfwd),
    ):
        torch.testing.assert_close(first(second(of_theta))(PENALTIES), wanted, rtol=1e-7, atol=1e-8)
    with pytest.raises(RuntimeError, match="Take one of the two derivatives in reverse"):
        torch.func.jacfwd(torch.func.jacfwd(of_theta))(PENALTIES)


def test_a_batch_of_regressions() -> None:
    """vmap of grad, the members of which need different numbers of iterations."""
    thetas = torch.stack([PENALTIES, PENALTIES - 8, PENALTIES + 8])
    minimum = ps.meta.implicit(by_lbfgs, torch.func.grad(ridge))

    def outer(find: Any, theta: Tensor) -> Tensor:
        return (find(theta) ** 2).sum()

    found = torch.func.vmap(torch.func.grad(functools.partial(outer, lambda theta: minimum(START, theta))))(thetas)
    wanted = torch.stack([torch.func.grad(functools.partial(outer, closed))(theta) for theta in thetas])
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)
    both = torch.func.jacrev(torch.func.vmap(lambda theta: minimum(START, theta)))(thetas)
    torch.testing.assert_close(both[1, :, 1], torch.func.jacrev(closed)(thetas[1]), rtol=1e-6, atol=1e-8)
    assert difference(both[1, :, 0], torch.zeros(4, 4, dtype=torch.float64)) == 0


def test_pytrees_aux_and_closures() -> None:
    """A solution of two parts, arguments in a pytree, what is computed beside it, and a tensor that nobody passes."""

    def fit(x: Any, data: Any, scale: Tensor) -> Tensor:
        return (
            ridge(torch.cat([x["front"], x["back"]]), data["theta"], *data["rest"]) * scale.exp() + (scale * x["front"]).sum()
        )

    def outer(theta: Tensor, y: Tensor, scale: Tensor) -> tuple[Tensor, Any]:
        def solver(init: Any, data: Any) -> Any:
            a, target = data["rest"]
            shift = torch.cat([scale.expand(2), torch.zeros(2, dtype=torch.float64)]) * (-scale).exp()
            x = torch.linalg.solve(a.T @ a + torch.diag(data["theta"].exp()), a.T @ target - shift)
            return {"front": x[:2], "back": x[2:]}, {"note": "found", "norm": x.norm()}

        minimum = ps.meta.implicit(solver, torch.func.grad(lambda x, data: fit(x, data, scale)), has_aux=True)
        start = {"front": START[:2], "back": START[2:]}
        x, aux = minimum(start, {"theta": theta, "rest": (A, y)})
        assert aux["note"] == "found"
        return (torch.cat([x["front"], x["back"]]) ** 3).sum(), aux["norm"]

    def known(theta: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        shift = torch.cat([scale.expand(2), torch.zeros(2, dtype=torch.float64)]) * (-scale).exp()
        return (torch.linalg.solve(A.T @ A + torch.diag(theta.exp()), A.T @ y - shift) ** 3).sum()

    scale = torch.tensor(0.4, dtype=torch.float64)
    wanted = torch.func.grad(known, (0, 1, 2))(PENALTIES, Y, scale)
    found, norm = torch.func.grad(outer, (0, 1, 2), has_aux=True)(PENALTIES, Y, scale)
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-9)
    assert norm > 0
    leaves = [x.clone().requires_grad_() for x in (PENALTIES, Y, scale)]
    value, norm = outer(*leaves)
    assert not norm.requires_grad
    torch.testing.assert_close(torch.autograd.grad(value, leaves), wanted, rtol=1e-8, atol=1e-9)


def test_the_way_there_does_not_matter() -> None:
    """The solver is not differentiated: not by its start, and it may read values."""

    def reading(init: Tensor, theta: Tensor) -> Tensor:
        assert not theta.requires_grad
        return init * 0 + math.sqrt(theta.item())

    root = ps.meta.custom_root(lambda x, theta: x**2 - theta)(reading)
    start, theta = torch.tensor(3.0, requires_grad=True), torch.tensor(4.0, requires_grad=True)
    by_start, by_theta = torch.autograd.grad(root(start, theta), [start, theta], allow_unused=True)
    assert by_start is None or by_start == 0
    assert by_theta.item() == pytest.approx(0.25)
    assert torch.func.grad(root, (0, 1))(torch.tensor(3.0), torch.tensor(4.0))[0] == 0


def test_roots_that_are_no_minima() -> None:
    """A linear equation whose matrix is not symmetric, and a fixed point of a contraction, in both directions."""
    matrix = normal(4, 4, seed=13) + 3 * torch.eye(4, dtype=torch.float64)
    b = normal(4, seed=14)
    solve = ps.meta.custom_root(lambda x, a, b: a @ x - b)(lambda init, a, b: torch.linalg.solve(a, b))
    wanted = torch.func.jacrev(torch.linalg.solve, (0, 1))(matrix, b)
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(jacobian(solve, (1, 2))(START, matrix, b), wanted, rtol=1e-7, atol=1e-9)

    def contraction(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.tanh(0.1 * a @ x + b)

    def iterate(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        for _ in range(60):
            x = contraction(x, a, b)
        return x

    wanted = torch.func.jacrev(iterate, (1, 2))(START, matrix, b)
    for how in (ps.meta.solve_normal_cg, ps.meta.solve_neumann):
        fixed = ps.meta.custom_fixed_point(contraction, solve=how)(iterate)
        for jacobian in (torch.func.jacrev, torch.func.jacfwd):
            torch.testing.assert_close(jacobian(fixed, (1, 2))(START, matrix, b), wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("solver", "optimality", "kind", "message"),
    [
        (exact, ridge, ValueError, r"returned one number. For a loss give its gradient, torch.func.grad\(loss\)"),
        (exact, lambda x, theta: {"a": x}, ValueError, r"the values of the optimality function must have the structure of the solutions"),
        (exact, lambda x, theta: x[:1], ValueError, r"must have the solution's shapes, but at .* \(1,\) instead of \(4,\)"),
        (lambda x, theta: 1.0, torch.func.grad(ridge), TypeError, "solution must be floating-point tensors, but .* is 1.0"),
        (lambda x, theta: torch.ones(4, dtype=torch.long), torch.func.grad(ridge), TypeError, "solution must be floating-point tensors"),
    ],
    ids=["a loss", "structure", "shape", "a number", "whole numbers"],
)  # fmt: skip
def test_mistakes_in_implicit(solver: Any, optimality: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        ps.meta.implicit(solver, optimality)(START, PENALTIES)


def test_an_aux_that_is_missing() -> None:
    with pytest.raises(
        TypeError, match=r"With has_aux=True the solver must return \(x, aux\), but it returned a tensor of shape"
    ):
        ps.meta.implicit(exact, torch.func.grad(ridge), has_aux=True)(START, PENALTIES)


# --------------------------------------------------------------------------------------------------------- linear equations


def test_conjugate_gradients_on_a_batch() -> None:
    """Members that converge at different times, one whose right-hand side is 0, and one that is badly conditioned."""
    rotation = torch.linalg.qr(normal(6, 6, seed=15))[0]
    spectra = torch.stack([torch.ones(6), torch.linspace(1, 3, 6), torch.logspace(-3, 3, 6), torch.ones(6)]).double()
    matrices = rotation @ torch.diag_embed(spectra) @ rotation.T
    b = torch.stack([normal(6, seed=k) for k in range(3)] + [torch.zeros(6, dtype=torch.float64)])
    found = torch.func.vmap(lambda a, b: ps.meta.solve_cg(lambda x: a @ x, b))(matrices, b)
    wanted = torch.linalg.solve(matrices, b)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)
    for i in range(4):
        alone = ps.meta.solve_cg(lambda x, a=matrices[i]: a @ x, b[i])
        torch.testing.assert_close(found[i], alone, rtol=1e-6, atol=1e-12)


def test_options_of_the_linear_solvers() -> None:
    matrix = torch.diag(torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64))
    b = {"a": torch.tensor([1.0, 1.0], dtype=torch.float64), "b": torch.tensor([3.0], dtype=torch.float64)}

    def product(x: Any) -> Any:
        y = matrix @ torch.cat([x["a"], x["b"]])
        return {"a": y[:2], "b": y[2:]}

    vector = torch.cat([b["a"], b["b"]])
    identity = torch.eye(3, dtype=torch.float64)
    ridged = {"solve_cg": matrix + 0.5 * identity, "solve_normal_cg": matrix @ matrix + 0.5 * identity}
    for name, full in ridged.items():
        found = getattr(ps.meta, name)(product, b, ridge=0.5)
        right = vector if name == "solve_cg" else matrix @ vector
        torch.testing.assert_close(torch.cat([found["a"], found["b"]]), torch.linalg.solve(full, right))
    for terms in (0, 1, 5):  # a finite number of terms is the sum of so many
        found = ps.meta.solve_neumann(product, b, alpha=0.2, maxiter=terms, tol=0.0)
        power = identity - 0.2 * matrix
        wanted = 0.2 * sum(torch.linalg.matrix_power(power, k) @ vector for k in range(terms + 1))
        torch.testing.assert_close(torch.cat([found["a"], found["b"]]), wanted)
    one = ps.meta.solve_cg(product, b, maxiter=1, tol=0.0)  # steepest descent
    step = vector @ vector / (vector @ matrix @ vector)
    torch.testing.assert_close(torch.cat([one["a"], one["b"]]), step * vector)
    loose = ps.meta.solve_cg(product, b, tol=2.0)
    assert all((x == 0).all() for x in loose.values())


@pytest.mark.parametrize("name", ["solve_cg", "solve_neumann"])
def test_mistakes_in_linear_equations(name: str) -> None:
    solve = getattr(ps.meta, name)
    with pytest.raises(TypeError, match=r"right-hand side of a linear equation must be tensors, but .* is 1\.0"):
        solve(lambda x: x, 1.0)
    with pytest.raises(ValueError, match="the products with A must have the structure of the right-hand sides"):
        solve(lambda x: {"a": x}, X)


# ------------------------------------------------------------------------------------------------------- evolution strategies


def quadratic(x: Any, shift: Tensor) -> Tensor:
    z = torch.cat([x["a"].reshape(-1), x["b"].reshape(-1)]) - shift
    return 0.5 * z @ CURVATURE @ z + 3


CURVATURE = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64)) + 0.5
SHIFT = normal(5, seed=21)
POINT = {"a": normal(2, 2, seed=22), "b": normal(seed=23)}


def test_evolution_strategies_on_a_quadratic() -> None:
    """The estimate has the gradient for its mean, whatever sigma is: within 4 standard errors in each coordinate."""
    wanted = torch.func.grad(quadratic)(POINT, SHIFT)
    for sigma in (0.01, 3.0):
        estimate = ps.meta.es_grad(quadratic, sigma=sigma, num_samples=4)
        each = torch.func.vmap(lambda seed, f=estimate: f(POINT, SHIFT, seed=seed))(torch.arange(2000))
        for name, x in each.items():
            error = (x.mean(0) - wanted[name]).abs() / (x.std(0) / 2000**0.5)
            assert error.max() < 4


def test_antithetic_pairs_cancel_what_is_even() -> None:
    """No noise comes from a constant or from curvature: at the minimum of a quadratic the estimate is 0."""
    bowl = ps.meta.es_grad(lambda x: 100 + (x**2).sum(), num_samples=3)
    assert bowl(torch.zeros(4, dtype=torch.float64), seed=5).abs().max() < 1e-10


def test_evolution_strategies_are_a_projection_of_a_linear_function() -> None:
    """Then an estimate is the gradient times the mean of the directions' outer products: whatever sigma, and along the gradient positive."""
    slope = normal(4, seed=24)
    found = [
        ps.meta.es_grad(lambda x: x @ slope, sigma=s, num_samples=1)(torch.zeros(4, dtype=torch.float64), seed=3)
        for s in (0.1, 2.0)
    ]
    torch.testing.assert_close(found[0], found[1])
    direction = found[0] / found[0].norm()
    matrix = torch.stack(
        [ps.meta.es_grad(lambda x, k=k: x[k], num_samples=1)(torch.zeros(4, dtype=torch.float64), seed=3) for k in range(4)]
    )
    torch.testing.assert_close(matrix, matrix.T)  # d d^T, of rank 1
    torch.testing.assert_close(matrix, matrix.trace() * torch.outer(direction, direction))
    torch.testing.assert_close(matrix @ slope, found[0])


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_evolution_strategies_depend_on_the_seed_alone(chunk_size: int | None) -> None:
    one = ps.meta.es_grad(quadratic, num_samples=5, chunk_size=chunk_size)
    torch.manual_seed(1)
    first = one(POINT, SHIFT, seed=7)
    torch.manual_seed(2)
    assert difference(one(POINT, SHIFT, seed=7), first) == 0
    assert difference(one(POINT, SHIFT, seed=8), first) > 1e-3
    looped = ps.meta.es_grad(quadratic, num_samples=5, vectorize=False)
    assert difference(looped(POINT, SHIFT, seed=7), first) <= 1e-12
    gradient, value = ps.meta.es_grad_and_value(quadratic, num_samples=5)(POINT, SHIFT, seed=7)
    assert difference(gradient, first) <= 1e-12
    assert abs(value - quadratic(POINT, SHIFT)) < 1


def test_evolution_strategies_for_a_population() -> None:
    shifts = torch.stack([SHIFT, -SHIFT])
    estimate = ps.meta.es_grad(quadratic, num_samples=3)
    together = torch.func.vmap(lambda shift: estimate(POINT, shift, seed=1))(shifts)
    for i in range(2):
        assert difference({k: x[i] for k, x in together.items()}, estimate(POINT, shifts[i], seed=1)) <= 1e-12


def test_evolution_strategies_tune_an_inner_loop() -> None:
    """Of the hyperparameters of an optimizer: near the derivative by unrolling, where there is one."""

    def trained(opt: ps.Transform) -> Tensor:
        return loss(ps.meta.unroll(opt, loss, PARAMS, BATCHES).params, HELD_OUT)

    opt = ps.tensors(ps.chain(ps.trace(0.5), ps.scale(-0.1)))
    found = ps.meta.es_grad(trained, sigma=1e-3, num_samples=400)(opt, seed=0)
    wanted = torch.func.grad(trained)(opt)
    assert type(found) is type(opt)
    assert dot(found, wanted) / (dot(found, found) * dot(wanted, wanted)).sqrt() > 0.98
    # dampening is of no use where it is 0, but it has a slope
    assert len(flat(found)) == len(flat(wanted))


def cubic(x: Any, shift: Tensor) -> Tensor:
    z = torch.cat([x["a"].reshape(-1), x["b"].reshape(-1)]) - shift
    return (z**3).sum() + 0.5 * z @ CURVATURE @ z


def test_sigma_may_be_a_tensor() -> None:
    """As the number, batched by vmap as one by one, and differentiated as finite differences say."""
    sigmas = torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64)

    def both(sigma: Any) -> Any:
        return ps.meta.es_grad_and_value(cubic, sigma=sigma, num_samples=3)(POINT, SHIFT, seed=1)

    together = torch.func.vmap(both)(sigmas)
    for i, sigma in enumerate(sigmas):
        alone = both(sigma.item())
        assert difference(both(sigma), alone) <= 1e-12
        assert difference(pytree.tree_map(lambda x, i=i: x[i], together), alone) <= 1e-11

    def number(sigma: Any) -> Tensor:
        return dot(both(sigma), directions(POINT))

    numeric = (number(0.5 + 1e-5) - number(0.5 - 1e-5)) / 2e-5
    torch.testing.assert_close(torch.func.grad(number)(sigmas[1]), numeric, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(
        torch.func.jvp(number, (sigmas[1],), (torch.ones_like(numeric),))[1], numeric, rtol=1e-7, atol=1e-7
    )
    leaf = sigmas[1].clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(number(leaf), leaf)[0], numeric, rtol=1e-7, atol=1e-7)
    assert torch.func.vmap(torch.func.grad(number))(sigmas)[1] == pytest.approx(numeric.item())


def test_a_batch_of_sigmas_is_checked() -> None:
    """Also inside of vmap and grad, where the values are there to be read."""

    def estimate(sigma: Tensor) -> Tensor:
        return ps.meta.es_grad(cubic, sigma=sigma, num_samples=2)(POINT, SHIFT)["b"]

    for transformed in (
        torch.func.vmap(estimate),
        torch.func.vmap(torch.func.grad(estimate)),
        torch.func.grad(lambda s: torch.func.vmap(estimate)(s).sum()),
    ):
        with pytest.raises(
            ValueError, match=r"sigma, the standard deviation of the perturbations, must be above 0, but is -0.5"
        ):
            transformed(torch.tensor([0.1, -0.5]))
        transformed(torch.tensor([0.1, 0.5]))


@pytest.mark.parametrize("how", [{}, {"chunk_size": 3}, {"vectorize": False}], ids=["at once", "in chunks", "in turn"])
def test_what_an_evaluation_returns_beside_its_value(how: dict[str, Any]) -> None:
    """Of the points with the perturbations added first, then of those with them subtracted."""

    def noted(x: Any, shift: Tensor) -> Any:
        return quadratic(x, shift), {"point": x, "two": 2, "none": None}

    options: dict[str, Any] = {"sigma": 0.3, "num_samples": 4, **how}
    gradient, aux = ps.meta.es_grad(noted, has_aux=True, **options)(POINT, SHIFT, seed=3)
    assert difference(gradient, ps.meta.es_grad(quadratic, **options)(POINT, SHIFT, seed=3)) == 0
    again, (value, same) = ps.meta.es_grad_and_value(noted, has_aux=True, **options)(POINT, SHIFT, seed=3)
    assert difference(flat((again, same)), flat((gradient, aux))) == 0
    assert difference(value, ps.meta.es_grad_and_value(quadratic, **options)(POINT, SHIFT, seed=3)[1]) <= 1e-12
    assert aux["none"] is None
    assert torch.equal(aux["two"], torch.full((8,), 2))
    values = torch.stack([quadratic({k: x[i] for k, x in aux["point"].items()}, SHIFT) for i in range(8)])
    for name, points in aux["point"].items():
        moved = points - POINT[name]
        assert difference(moved[:4], -moved[4:]) <= 1e-12
        weights = (values[:4] - values[4:]) / (2 * 4 * 0.3)  # the estimate, from what was noted
        assert difference(torch.tensordot(weights, moved[:4] / 0.3, 1), gradient[name]) <= 1e-10

    def of(shift: Tensor) -> Any:
        gradient, aux = ps.meta.es_grad(noted, has_aux=True, **options)(POINT, shift, seed=3)
        return gradient, aux["point"]

    together = torch.func.vmap(of)(torch.stack([-SHIFT, SHIFT]))
    assert difference(pytree.tree_map(lambda x: x[1], together), (gradient, aux["point"])) <= 1e-12


@pytest.mark.parametrize("how", [{}, {"chunk_size": 3}, {"vectorize": False}], ids=["at once", "in chunks", "in turn"])
def test_functions_that_draw_random_numbers(how: dict[str, Any]) -> None:
    """Drawn for all the same, they leave the difference of both sides; else each evaluation has its own."""

    def noisy(x: Tensor) -> Any:
        drawn = torch.randn((), dtype=torch.float64)
        return drawn + 0 * x.sum(), drawn

    def drawn(randomness: str) -> tuple[Tensor, Tensor]:
        return ps.meta.es_grad(noisy, num_samples=4, has_aux=True, randomness=randomness, **how)(
            torch.zeros(2, dtype=torch.float64)
        )

    torch.manual_seed(0)
    gradient, same = drawn("same")
    assert len(same.unique()) == 1
    assert difference(gradient, torch.zeros_like(gradient)) == 0
    assert drawn("same")[1][0] != same[0]  # the generator has moved on
    gradient, different = drawn("different")
    assert len(different.unique()) == 8
    assert gradient.abs().min() > 0
    if "vectorize" in how:
        assert len(drawn("error")[1].unique()) == 8
    else:
        with pytest.raises(RuntimeError, match="called random operation while in randomness error mode"):
            drawn("error")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"sigma": 0.0}, "sigma, the standard deviation .* must be above 0, but is 0.0"), ({"sigma": torch.tensor(-1.0)}, "must be above 0, but is -1.0"), ({"sigma": torch.ones(2)}, r"sigma must be one real number, a float or a 0-d tensor, but is a tensor of shape \(2,\) of torch.float32. For several at once use torch.func.vmap"), ({"sigma": torch.tensor(1j)}, "sigma must be one real number"), ({"randomness": "none"}, "randomness must be one of 'error', 'different', 'same', but is 'none'"), ({"num_samples": 0}, "num_samples must be an integer of at least 1"), ({"chunk_size": 0}, "chunk_size must be an integer of at least 1")],
    ids=["sigma", "a tensor", "several", "complex", "randomness", "samples", "chunks"],
)  # fmt: skip
def test_mistakes_in_evolution_strategies(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ps.meta.es_grad(quadratic, **options)


def test_what_evolution_strategies_cannot_perturb() -> None:
    with pytest.raises(TypeError, match=r"perturbs floating-point tensors, but '0' is torch\.int64"):
        ps.meta.es_grad(lambda x: x[0].sum())([torch.ones(2, dtype=torch.long)])
    with pytest.raises(TypeError, match=r"whose value is one real number, but it returned a tensor of shape \(2,\)"):
        ps.meta.es_grad(lambda x: x)(X)
    for vectorize in (True, False):
        with pytest.raises(
            TypeError,
            match=r"With has_aux=True the function of es_grad must return \(value, aux\), a tuple, but it returned a tensor of shape \(\)",
        ):
            ps.meta.es_grad(lambda x: x.sum(), has_aux=True, vectorize=vectorize)(X)
        with pytest.raises(TypeError, match="aux must be tensors or numbers, but 'k' is 'text'"):
            ps.meta.es_grad(lambda x: (x.sum(), {"k": "text"}), has_aux=True, vectorize=vectorize)(X)
