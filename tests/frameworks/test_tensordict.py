"""TensorDicts as parameters: of the pure functions, of functional training, and of the wrapper."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, vmap

import purestep as ps
from purestep import optim
from tests.frameworks.runs import agree, batches, by_hand, composed, loss_of, model, train

tensordict = pytest.importorskip("tensordict")
TensorDict = tensordict.TensorDict
TensorDictModule = pytest.importorskip("tensordict.nn").TensorDictModule

pytestmark = pytest.mark.frameworks

TRANSFORMS: dict[str, Callable[[], ps.Transform]] = {
    "adamw": lambda: ps.adamw(0.1),
    "sgd": lambda: ps.sgd(0.1),
    "muon": lambda: ps.partition({"m": ps.muon(0.1), "r": ps.adam(0.1)}, ps.by_ndim({2: "m"}, default="r")),
    "named": lambda: ps.chain(ps.freeze(ps.by_path({"^0": True}, default=False)), ps.adamw(0.1)),
    "composed": composed,
}
each_transform = pytest.mark.parametrize("make", TRANSFORMS.values(), ids=TRANSFORMS)


def weights(seed: int = 0) -> Any:
    return TensorDict.from_module(model(seed)).detach().clone()


def named(params: Any, net: nn.Module) -> dict[str, Tensor]:
    """The leaves, in the order of the module."""
    flat = params.flatten_keys(".")
    return {name: flat[name] for name, _ in net.named_parameters()}


def loss_with(net: nn.Module, params: Any, batch: Any) -> Tensor:
    with params.to_module(net):
        return loss_of(net, batch)


@each_transform
@pytest.mark.parametrize("how", [{}, {"donate": True}, {"executor": "leaf"}], ids=["pure", "donated", "leaf"])
def test_steps_on_a_tensordict_are_those_on_a_dict(make: Any, how: dict[str, Any]) -> None:
    net, params, transform = model(), weights(), make()
    state = transform.init_state(params)
    for batch in batches():
        grads = grad(lambda p, batch=batch: loss_with(net, p, batch))(params)
        params, state = transform.step(grads, state, params, **how)
        assert type(params) is TensorDict
    agree(named(params, net), by_hand(model(), make(), batches()))


@each_transform
def test_updates_are_a_tensordict_that_can_be_added(make: Any) -> None:
    params, transform = weights(), make()
    for grads in (params, params * 0.5):
        updates, _ = transform.update(grads, transform.init_state(params), params)
        new, _ = transform.step(grads, transform.init_state(params), params)
        torch.testing.assert_close((params + updates).to_dict(), new.to_dict())
        torch.testing.assert_close(ps.apply_updates(params, updates).to_dict(), new.to_dict())


@each_transform
def test_a_state_of_tensordicts_is_saved_and_loaded(make: Any) -> None:
    params, transform = weights(), make()
    state = transform.init_state(params)
    params, state = transform.step(params, state, params)
    file = io.BytesIO()
    torch.save(ps.state_dict(state), file)
    file.seek(0)
    loaded = ps.load_state_dict(transform.init_state(params), torch.load(file))
    for _ in range(2):
        params_, state = transform.step(params, state, params)
        others, loaded = transform.step(params, loaded, params)
        torch.testing.assert_close(params_.to_dict(), others.to_dict(), rtol=0, atol=0)


@each_transform
def test_a_stack_of_tensordicts_trains_as_its_members(make: Any) -> None:
    """To the vmap of tensordict a TensorDict is one thing; it has to be told only of fields that nobody has a state in."""
    transform, members = make(), [weights(seed) for seed in range(3)]
    stack = torch.stack(members)
    states = [transform.init_state(p) for p in members]
    dims: Any = ps.out_dims(states[0]) if make is TRANSFORMS["sgd"] else 0
    state = vmap(transform.init_state, out_dims=dims)(stack)
    step = vmap(transform.step, in_dims=(0, dims, 0), out_dims=(0, dims))
    for _ in range(3):
        stack, state = step(stack.sin(), state, stack)
        for k, p in enumerate(members):
            members[k], states[k] = transform.step(p.sin(), states[k], p)
    assert stack.batch_size == torch.Size([3])
    for found, p in zip(stack.unbind(0), members):
        torch.testing.assert_close(found.to_dict(), p.to_dict())


def test_a_gradient_that_a_tensordict_leaves_out_is_none() -> None:
    """As `params.grad` does with a parameter that was not used."""
    params = TensorDict.from_module(model())
    params["0", "weight"].sum().backward()
    assert params.grad.flatten_keys(".").keys() == {"0.weight"}
    new, _ = ps.adamw(0.1).step(params.grad, ps.adamw(0.1).init_state(params.data), params.data)
    for path, p in params.flatten_keys(".").items():
        assert torch.equal(new.flatten_keys(".")[path], p) is (path != "0.weight")


def test_a_tensorclass_holds_parameters() -> None:
    @tensordict.tensorclass
    class Line:
        weight: Tensor
        bias: Tensor

    transform = ps.partition({"m": ps.adam(0.1), "v": ps.sgd(0.1)}, ps.by_ndim({2: "m"}, default="v"))
    line: Any = Line(weight=torch.ones(3, 2), bias=torch.ones(3), batch_size=[])  # type: ignore[call-arg]
    flat = {"weight": torch.ones(3, 2), "bias": torch.ones(3)}
    state, other = transform.init_state(line), transform.init_state(flat)
    for _ in range(3):
        line, state = transform.step(line, state, line)
        flat, other = transform.step(flat, other, flat)
    assert type(line) is Line
    agree({"weight": line.weight, "bias": line.bias}, flat, rtol=0, atol=0)


def test_a_compiled_step_takes_a_tensordict() -> None:
    params, transform = TensorDict({"weight": torch.ones(2, 3), "bias": torch.ones(2)}), TRANSFORMS["muon"]()
    state = transform.init_state(params)
    found, _ = torch.compile(transform.step, backend="eager", fullgraph=True)(params, state, params)
    torch.testing.assert_close(found.to_dict(), transform.step(params, state, params)[0].to_dict())


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_the_leaves_of_a_tensordict_train_as_with_torch(name: str) -> None:
    results = []
    for namespace in (torch.optim, optim):
        net = model()
        params = TensorDict.from_module(net, as_module=True)
        optimizer = getattr(namespace, name)(params.parameters(), lr=0.1)
        for batch in batches():
            optimizer.zero_grad()
            loss_with(net, params, batch).backward()
            optimizer.step()
        results.append(named(params.data, net))
    agree(*reversed(results))


def test_the_leaves_of_a_tensordict_have_names_for_masks() -> None:
    net = model()
    params = TensorDict.from_module(net, as_module=True)
    frozen = ps.chain(ps.freeze(ps.by_path({r"^0\.bias$": True}, default=False)), composed())
    optimizer = optim.Optimizer(params.named_parameters(), frozen)
    for batch in batches():
        optimizer.zero_grad()
        loss_with(net, params, batch).backward()
        optimizer.step()
    agree(named(params.data, net), by_hand(model(), frozen, batches()))


def test_a_module_of_tensordicts_trains_as_with_a_loop_by_hand() -> None:
    net = model()
    module = TensorDictModule(net, in_keys=["x"], out_keys=["y"])
    optimizer = optim.Optimizer(module.named_parameters(), composed())
    train(lambda x: module(TensorDict({"x": x}, batch_size=[len(x)]))["y"], optimizer, batches())
    agree(net, by_hand(model(), composed(), batches()))


def test_a_state_dict_of_the_wrapper_is_a_tensordict_and_back() -> None:
    """A checkpoint may be kept in memory-mapped tensors."""
    net, other = model(), model()
    optimizer, resumed = (optim.Optimizer(m.named_parameters(), composed()) for m in (net, other))
    train(net, optimizer, batches(3))
    saved = optimizer.state_dict()
    kept = TensorDict({str(k): TensorDict(own) for k, own in saved["state"].items()}).clone()
    saved["state"] = {int(k): dict(own.items()) for k, own in kept.items()}
    other.load_state_dict(net.state_dict())
    resumed.load_state_dict(saved)
    for m, o in ((net, optimizer), (other, resumed)):
        train(m, o, batches(6)[3:])
    agree(other, net, rtol=0, atol=0)
