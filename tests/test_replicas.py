"""Training on several processes without sharded tensors: replicas, torch's own wrappers, and steps within the backward pass.

Two processes run everything once (`answers`), each with its own half of every batch; the oracle is one process with all of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import purestep as ps
from purestep import optim
from tests import processes
from tests.problems import difference, through_a_file

TRANSFORMS: dict[str, Callable[[], ps.Transform]] = {
    "adamw": lambda: ps.adamw(0.05),
    "clipped": lambda: ps.chain(ps.clip_by_global_norm(0.1), ps.adamw(ps.schedules.linear(0.1, 0.0, total_steps=9))),
    "muon and adamw": lambda: ps.partition(
        {"matrices": ps.muon(0.1), "rest": ps.adamw(0.05)}, ps.by_ndim({2: "matrices"}, default="rest")
    ),
    "noise": lambda: ps.chain(ps.add_noise(0.01, seed=3), ps.sgd(0.1, momentum=0.9)),
}


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(step)
    return torch.randn(8, 3, generator=g, dtype=torch.float64), torch.randn(8, 2, generator=g, dtype=torch.float64)


def part(step: int, rank: int, size: int) -> tuple[Tensor, Tensor]:
    """What one process sees of a batch."""
    x, y = batch(step)
    return x.chunk(size)[rank], y.chunk(size)[rank]


def fit(net: nn.Module, optimizer: Any, steps: range, rank: int = 0, size: int = 1) -> dict[str, Tensor]:
    """Train, with all of each batch or with a part; the weights."""
    for step in steps:
        x, y = part(step, rank, size)
        optimizer.zero_grad()
        mse_loss(net(x), y).backward()
        optimizer.step()
    return weights(net)


def weights(net: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("module."): p.detach().clone() for name, p in net.named_parameters()}


def alone(transform: ps.Transform, steps: int = 6) -> dict[str, Tensor]:
    """One process with all of each batch."""
    net = network()
    return fit(net, optim.Optimizer(net.named_parameters(), transform), range(steps))


# --------------------------------------------------------------------------------------------------------------- replicas


def replicas(rank: int, size: int) -> dict[str, float]:
    """`DistributedDataParallel` and `replicate` average the gradients; every process then makes the same step."""
    from torch.distributed._composable.replicate import replicate

    found = {}
    for name, make in TRANSFORMS.items():
        expected = alone(make())
        for wrap in (nn.parallel.DistributedDataParallel, replicate):
            net = wrap(network())
            optimizer = optim.Optimizer(net.named_parameters(), make())
            found[f"{name} {wrap.__name__}"] = difference(fit(net, optimizer, range(6), rank, size), expected)
    return found


# ---------------------------------------------------------------------------------------------- ZeroRedundancyOptimizer

ZERO: dict[str, tuple[Any, dict[str, Any], Callable[[], ps.Transform]]] = {
    "class": (optim.AdamW, {"lr": 0.05}, lambda: ps.adamw(0.05)),
    "chain": (
        optim.partial(ps.chain(ps.clip_by_norm(0.1), ps.adamw(0.05))), {"lr": 0.1},
        lambda: ps.chain(ps.clip_by_norm(0.1), ps.adamw(0.1)),
    ),
}  # fmt: skip
"""The class that it is given and its arguments, and the transform that this is."""


def zero(rank: int, size: int) -> dict[str, float]:
    """Each process has the state of some parameters. Brought together, it resumes the same, and an optimizer of one process."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    found = {}
    for name, (cls, options, make) in ZERO.items():

        def begin(cls: Any = cls, options: Any = options) -> tuple[Any, Any]:
            net = nn.parallel.DistributedDataParallel(network())
            return net, ZeroRedundancyOptimizer(net.parameters(), optimizer_class=cls, **options)

        net, optimizer = begin()
        fit(net, optimizer, range(3), rank, size)
        optimizer.consolidate_state_dict(to=0)
        box = [(optimizer.state_dict(), net.module.state_dict()) if rank == 0 else None]
        dist.broadcast_object_list(box, src=0)  # as a file that every process reads
        state, parameters = through_a_file(box[0])
        expected = alone(make())
        again, other = begin()
        again.module.load_state_dict(parameters)
        other.load_state_dict(through_a_file(state))  # it writes on what it is given
        single = network()
        single.load_state_dict(parameters)
        third = cls(single.parameters(), **options)
        third.load_state_dict(through_a_file(state))
        found[f"{name} goes on"] = difference(fit(net, optimizer, range(3, 6), rank, size), expected)
        found[f"{name} is resumed"] = difference(fit(again, other, range(3, 6), rank, size), expected)
        found[f"{name} is resumed by one"] = difference(fit(single, third, range(3, 6)), expected)
    return found


# ------------------------------------------------------------------------------------------- local steps, then an average


def average(params: Any) -> Any:
    """The mean of what the processes have."""
    means = {name: p.clone() for name, p in params.items()}
    for mean in means.values():
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
    return means


def train_in_rounds(
    inner: ps.Transform, outer: ps.Transform, gradients: Callable[[Any, int], Any], params: Any, rounds: int, local_steps: int
) -> Any:
    """DiLoCo (Douillard et al., 2023): steps of each process by itself, then one of all, along the mean of how far they went.

    With the outer step ``sgd(1.0)`` it is LocalSGD, the mean of the parameters.
    """
    inner_state, outer_state = inner.init_state(params), outer.init_state(params)
    for k in range(rounds):
        local = params
        for step in range(k * local_steps, (k + 1) * local_steps):
            local, inner_state = inner.step(gradients(local, step), inner_state, local)
        went = average({name: params[name] - local[name] for name in params})
        params, outer_state = outer.step(went, outer_state, params)
    return params


def gradients_of(net: nn.Module, rank: int, size: int) -> Callable[[Any, int], Any]:
    def loss(params: Any, step: int) -> Tensor:
        x, y = part(step, rank, size)
        return mse_loss(torch.func.functional_call(net, params, x), y)

    return torch.func.grad(loss)


def by_hand(rank: int, size: int, local_steps: int) -> dict[str, Tensor]:
    """DiLoCo with torch's optimizers: the outer one has the averaged difference as its gradient."""
    net, shared = network(), network()
    inner = torch.optim.AdamW(net.parameters(), lr=0.05)
    outer = torch.optim.SGD(shared.parameters(), lr=0.7, momentum=0.9, nesterov=True)
    for k in range(3):
        net.load_state_dict(shared.state_dict())
        fit(net, inner, range(k * local_steps, (k + 1) * local_steps), rank, size)
        for p, q in zip(shared.parameters(), net.parameters()):
            p.grad = p.detach() - q.detach()
            dist.all_reduce(p.grad)
            p.grad /= size
        outer.step()
    return weights(shared)


def rounds(rank: int, size: int) -> dict[str, float]:
    net, found = network(), {}
    gradients, params = gradients_of(net, rank, size), weights(net)
    nesterov, plain = ps.sgd(0.7, momentum=0.9, nesterov=True), ps.sgd(1.0)
    for local_steps in (1, 4):
        after = train_in_rounds(ps.adamw(0.05), nesterov, gradients, params, 3, local_steps)
        found[f"diloco, {local_steps} local steps"] = difference(after, by_hand(rank, size, local_steps))
        after = train_in_rounds(ps.sgd(0.1), plain, gradients, params, 3, local_steps)
        net = network()
        for k in range(3):
            fit(net, torch.optim.SGD(net.parameters(), lr=0.1), range(k * local_steps, (k + 1) * local_steps), rank, size)
            net.load_state_dict(average(net.state_dict()))
        found[f"local sgd, {local_steps} local steps"] = difference(after, weights(net))
    one = train_in_rounds(ps.sgd(0.1), plain, gradients, params, 6, 1)  # the mean of gradients
    found["local sgd, every step"] = difference(one, alone(ps.sgd(0.1)))
    return found


# ------------------------------------------------------------------------------------------------------------------ tests


def everything(rank: int, size: int) -> dict[str, dict[str, float]]:
    return {function.__name__: function(rank, size) for function in (replicas, zero, rounds)}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return processes.run(2, "tests.test_replicas:everything", tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize(("name", "count"), [("replicas", 2 * len(TRANSFORMS)), ("zero", 3 * len(ZERO)), ("rounds", 5)])
def test_two_processes_do_what_one_does(answers: list[Any], name: str, count: int) -> None:
    for found in answers:
        assert len(found[name]) == count
        assert not {run: x for run, x in found[name].items() if not x <= 1e-12}


# ------------------------------------------------------------------------------------------------ within the backward pass


def by_hooks(net: nn.Module, make: Callable[[], ps.Transform], **options: Any) -> None:
    """A step of each parameter as soon as its gradient is there."""
    for name, p in net.named_parameters():
        optimizer = optim.Optimizer([(name, p)], make(), **options)

        def hook(p: Tensor, optimizer: Any = optimizer) -> None:
            optimizer.step()
            optimizer.zero_grad()

        p.register_post_accumulate_grad_hook(hook)


def by_torch(net: nn.Module, make: Callable[[], ps.Transform], **options: Any) -> None:
    with warnings.catch_warnings(action="ignore"):  # it warns when it is imported
        from torch.distributed.optim import _apply_optimizer_in_backward

    _apply_optimizer_in_backward(optim.Optimizer, net.parameters(), {"transform": make(), **options})


HOOKS = {"hooks": by_hooks, "torch's own": by_torch}
LEAFWISE: dict[str, Callable[[], ps.Transform]] = {
    "adamw": lambda: ps.adamw(0.05),
    "scheduled": lambda: ps.chain(ps.clip_by_norm(0.1), ps.nadam(ps.schedules.linear(0.1, 0.0, total_steps=9))),
    "accumulated": lambda: ps.accumulate(ps.sgd(0.1, momentum=0.9), 2),
    "averaged": lambda: ps.chain(ps.lookahead(ps.adamw(0.05), 2), ps.ema_params(0.9)),
}


@pytest.mark.parametrize("attach", HOOKS.values(), ids=HOOKS)
@pytest.mark.parametrize("make", LEAFWISE.values(), ids=LEAFWISE)
def test_an_optimizer_for_each_parameter(make: Any, attach: Any) -> None:
    net = network()
    attach(net, make)
    for step in range(6):
        x, y = batch(step)
        mse_loss(net(x), y).backward()
        assert all(p.grad is None for p in net.parameters())
    assert difference(weights(net), alone(make())) == 0


WHOLE: dict[str, Callable[[], ps.Transform]] = {
    "clip_by_global_norm": lambda: ps.chain(ps.clip_by_global_norm(1.0), ps.adamw(0.05)),
    "skip_if_nonfinite": lambda: ps.skip_if_nonfinite(ps.adamw(0.05)),
    "scale_by_prodigy": ps.prodigy,
}


@pytest.mark.parametrize("attach", HOOKS.values(), ids=HOOKS)
@pytest.mark.parametrize("name", WHOLE)
def test_what_must_see_all_parameters_is_refused(name: str, attach: Any) -> None:
    net = network()
    attach(net, WHOLE[name])
    before = weights(net)
    with pytest.raises(
        RuntimeError, match=rf"{name} must see all parameters, but .* has one, '\S+', and .* within backward\(\)"
    ):
        mse_loss(net(batch(0)[0]), batch(0)[1]).backward()
    assert difference(weights(net), before) == 0


def test_all_parameters_in_the_last_hook() -> None:
    """One optimizer of all parameters may step within the backward pass: when it does, all gradients are there."""
    net, make = network(), WHOLE["clip_by_global_norm"]
    optimizer, left = optim.Optimizer(net.named_parameters(), make()), []

    def hook(p: Tensor) -> None:
        left.append(p)
        if len(left) == 4:
            optimizer.step()
            optimizer.zero_grad()
            left.clear()

    for p in net.parameters():
        p.register_post_accumulate_grad_hook(hook)
    for step in range(6):
        mse_loss(net(batch(step)[0]), batch(step)[1]).backward()
    assert difference(weights(net), alone(make())) == 0


def test_one_parameter_after_the_backward_pass() -> None:
    """A model of one parameter is not refused: nothing is missing."""
    p = nn.Parameter(torch.ones(3))
    optimizer = optim.Optimizer([p], WHOLE["clip_by_global_norm"]())
    p.sum().backward()
    optimizer.step()
    assert optimizer.state[p]["step"] == 1
