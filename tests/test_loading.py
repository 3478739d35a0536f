"""What `load_state_dict` refuses has changed nothing, and what it takes is the optimizer's own."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

import purestep as ps
from purestep import optim

MAKERS: dict[str, Any] = {
    "SGD": lambda params: optim.SGD(params, lr=0.1, momentum=0.9),
    "AdamW": lambda params: optim.AdamW(params, lr=0.1),
    "Adagrad": lambda params: optim.Adagrad(params, lr=0.1),
    "ASGD": lambda params: optim.ASGD(params, lr=0.1),
    "chain": lambda params: optim.Optimizer(params, ps.chain(ps.clip_by_global_norm(1.0), ps.adamw(0.1))),
    "skip": lambda params: optim.Optimizer(params, ps.skip_if_nonfinite(ps.adamw(0.1))),
    "lookahead": lambda params: optim.Optimizer(params, ps.lookahead(ps.adamw(0.1), 3)),
    "partition": lambda params: optim.Optimizer(
        params, ps.partition({"a": ps.adamw(0.1), "b": ps.sgd(0.1, momentum=0.9)}, ps.by_ndim({2: "a"}, default="b"))
    ),
    "scheduled": lambda params: optim.AdamW(params, lr=ps.schedules.linear(0.1, 0.0, total_steps=9)),
}
each = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def begin(make: Any, steps: int = 2) -> tuple[list[nn.Parameter], Any]:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(3))]
    optimizer = make(params)
    for i in range(steps):
        for p in params:
            p.grad = torch.full_like(p, 1.0 + i)
        optimizer.step()
    return params, optimizer


class Everything:
    """All that an optimizer is, to be compared later: values, and which objects they are in."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.group = optimizer, optimizer.param_groups[0]
        self.states = [(p, s, dict(s)) for p, s in optimizer.state.items()]
        self.groups = [{k: list(v) if k == "params" else v for k, v in g.items()} for g in optimizer.param_groups]
        self.values = copy.deepcopy([[x for x in s.values() if isinstance(x, Tensor)] for _, s, _ in self.states])

    def check(self) -> None:
        optimizer = self.optimizer
        assert optimizer.param_groups[0] is self.group
        assert [{k: list(v) if k == "params" else v for k, v in g.items()} for g in optimizer.param_groups] == self.groups
        assert list(optimizer.state) == [p for p, _, _ in self.states]
        for (p, state, fields), values in zip(self.states, self.values):
            assert optimizer.state[p] is state
            assert state.keys() == fields.keys()
            assert all(state[name] is x for name, x in fields.items())
            for x, y in zip([x for x in fields.values() if isinstance(x, Tensor)], values):
                assert torch.equal(x, y)


NO_NUMBER: dict[str, Any] = {
    "string": "2", "list": [2.0], "vector": torch.ones(2), "one in a vector": torch.ones(1),
    "meta": torch.ones((), device="meta"), "bool": True, "complex": 2j,
}  # fmt: skip
NO_TENSOR: dict[str, Any] = {
    "string": "?", "list": [2.0], "number": 1.0, "shape": torch.ones(7), "meta": torch.ones(3, 2, device="meta"), "dict": {"a": 1},
}  # fmt: skip


def spoil(saved: dict[str, Any], x: Any, like_parameter: bool) -> bool:
    """Put `x` into every field of the last parameter that is like it (or is one number); whether there is one."""
    found = False
    for key, state in saved["state"].items():
        for name, own in state.items():
            if isinstance(own, Tensor) and key == 0 and not name.startswith("shared.") and (own.dim() == 2) is like_parameter:
                state[name], found = x, True
    for group in saved["param_groups"]:
        group["lr"] = 0.25  # would be seen
    return found


@each
@pytest.mark.parametrize("x", NO_NUMBER.values(), ids=NO_NUMBER)
def test_what_is_no_counter_is_refused_and_nothing_has_changed(make: Any, x: Any) -> None:
    _, optimizer = begin(make)
    saved = copy.deepcopy(optimizer.state_dict())
    if not spoil(saved, x, like_parameter=False):
        pytest.skip("keeps no number for a parameter")
    before = Everything(optimizer)
    with pytest.raises(ValueError, match="must be one real number"):
        optimizer.load_state_dict(saved)
    before.check()
    optimizer.step()


@each
@pytest.mark.parametrize("x", NO_TENSOR.values(), ids=NO_TENSOR)
def test_what_is_no_moment_is_refused_and_nothing_has_changed(make: Any, x: Any) -> None:
    _, optimizer = begin(make)
    saved = copy.deepcopy(optimizer.state_dict())
    assert spoil(saved, x, like_parameter=True)
    before = Everything(optimizer)
    with pytest.raises(ValueError, match=r"needs a tensor|of shape|no values"):
        optimizer.load_state_dict(saved)
    before.check()
    optimizer.step()


@pytest.mark.parametrize("x", NO_NUMBER.values(), ids=NO_NUMBER)
def test_what_is_no_number_for_all_parameters_is_refused(x: Any) -> None:
    _, optimizer = begin(MAKERS["skip"])
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["shared.skipped"] = x
    before = Everything(optimizer)
    with pytest.raises(ValueError, match="'skipped' must be one real number"):
        optimizer.load_state_dict(saved)
    before.check()


@each
def test_a_state_that_is_no_dict_and_other_groups_are_refused(make: Any) -> None:
    _, optimizer = begin(make)
    saved = copy.deepcopy(optimizer.state_dict())
    before = Everything(optimizer)
    saved["state"][0] = torch.ones(3)
    with pytest.raises(ValueError, match="must be a dict"):
        optimizer.load_state_dict(saved)
    before.check()
    saved = copy.deepcopy(optimizer.state_dict())
    before = Everything(optimizer)
    saved["param_groups"][0]["params"] = [0, 1, 2]
    with pytest.raises(ValueError, match="match the size"):
        optimizer.load_state_dict(saved)
    before.check()


@each
def test_an_error_while_loading_changes_nothing(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it is: here something that cannot be moved to the parameter's device."""
    _, optimizer = begin(make)
    saved = copy.deepcopy(optimizer.state_dict())
    before = Everything(optimizer)
    monkeypatch.setattr("purestep._optimizer.optimizer.keep_precision", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        optimizer.load_state_dict(saved)
    before.check()
    monkeypatch.undo()
    optimizer.step()


LBFGS_FAULTS: dict[str, tuple[str, Any]] = {
    "H_diag, a string": ("H_diag", "?"),
    "H_diag, a list": ("H_diag", [1.0]),
    "prev_flat_grad, a dict": ("prev_flat_grad", {}),
    "prev_flat_grad, a string": ("prev_flat_grad", "?"),
    "d, a matrix": ("d", torch.ones(3, 3)),
    "d, shorter": ("d", torch.ones(4)),
    "old_dirs, a tensor": ("old_dirs", torch.ones(9)),
    "old_dirs, shorter": ("old_dirs", [torch.ones(4)]),
    "old_stps, no tensors": ("old_stps", ["?"]),
    "ro, no numbers": ("ro", [None]),
    "n_iter, a vector": ("n_iter", torch.ones(2)),
    "t, a string": ("t", "1"),
}


def bowl(params: list[nn.Parameter], optimizer: Any) -> Any:
    def closure() -> Any:
        optimizer.zero_grad()
        loss: Any = sum((p.square() * torch.arange(1.0, 1 + p.numel()).view(p.shape)).sum() for p in params)
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize(("name", "x"), LBFGS_FAULTS.values(), ids=LBFGS_FAULTS)
def test_lbfgs_refuses_what_it_cannot_go_on_with(name: str, x: Any) -> None:
    params, _ = begin(MAKERS["SGD"])
    optimizer = optim.LBFGS(params, lr=0.1, max_iter=2)
    closure = bowl(params, optimizer)
    optimizer.step(closure)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0][name] = x
    before = Everything(optimizer)
    with pytest.raises(ValueError, match=f"'{name}'"):
        optimizer.load_state_dict(saved)
    before.check()
    optimizer.step(closure)


# ------------------------------------------------------------------------------------------------------------- whose memory


def memory(x: Any) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in torch.utils._pytree.tree_leaves(x) if isinstance(t, Tensor)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["SGD", "AdamW", "Adagrad"])
def test_what_torch_clones_is_cloned(name: str, dtype: torch.dtype) -> None:
    """A state of float32 for parameters of another dtype: torch casts it, so it is new memory there."""
    params = [nn.Parameter(torch.ones(3, 2, dtype=dtype)), nn.Parameter(torch.ones(3, dtype=dtype))]
    options = {"momentum": 0.9} if name == "SGD" else {}
    theirs = getattr(torch.optim, name)(params, lr=0.1, **options)
    ours = getattr(optim, name)(params, lr=0.1, **options)
    for p in params:
        p.grad = torch.ones_like(p)
    theirs.step()
    saved = copy.deepcopy(theirs.state_dict())
    for state in saved["state"].values():
        for key in state:
            if key != "step":
                state[key] = state[key].float()
    theirs.load_state_dict(saved)
    ours.load_state_dict(saved)
    borrowed = memory(dict(theirs.state)) & memory(saved["state"])
    assert memory(dict(ours.state)) & memory(saved["state"]) <= borrowed
    before = copy.deepcopy(saved)
    counters = [state.pop("step", None) for state in (*saved["state"].values(), *before["state"].values())]
    ours.step()
    assert len({float(x) for x in counters if x is not None}) <= 1  # the saved counters are not ours to write to
    if dtype != torch.float32:
        torch.testing.assert_close(saved["state"], before["state"], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["skip", "lookahead"])
def test_two_optimizers_share_nothing_of_what_they_loaded_for_all_parameters(name: str) -> None:
    _, optimizer = begin(MAKERS[name])
    saved = optimizer.state_dict()
    (_, one), (_, two) = begin(MAKERS[name], 0), begin(MAKERS[name], 0)
    one.load_state_dict(saved)
    two.load_state_dict(saved)
    assert not memory(dict(one.shared)) & (memory(dict(two.shared)) | memory(dict(optimizer.shared)))


@pytest.mark.parametrize("name", ["Adadelta", "RMSprop", "Adam", "Adagrad", "Rprop", "NAdam"])
def test_a_state_whose_counter_is_zero_is_kept(name: str) -> None:
    """Somebody has set the counter back; the rest of the state counts, also in another memory order (found by the machine)."""
    results = []
    for side in (torch.optim, optim):
        p = torch.nn.Parameter(torch.arange(6.0, dtype=torch.float64).reshape(3, 2))
        optimizer = getattr(side, name)([p], lr=0.1)
        p.grad = torch.ones(3, 2, dtype=torch.float64)
        optimizer.step()
        optimizer.state[p]["step"].fill_(0.0)
        optimizer.load_state_dict(optimizer.state_dict())
        p.data = p.data.t().contiguous().t()
        p.grad = torch.full((3, 2), 0.5, dtype=torch.float64)
        optimizer.step()
        results.append(p.detach())
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-8)


# ------------------------------------------------------------------------------------------------------------------- by name


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> dict[str, Tensor]:
    for k in steps:
        optimizer.zero_grad()
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(k))
        model(x).square().sum().backward()
        optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def renamed(named: list[tuple[str, Any]], prefix: str = "", other: str = "") -> list[tuple[str, Any]]:
    """With another name for the first bias, or with a prefix before all."""
    return [(prefix + (other if other and name == "0.bias" else name), p) for name, p in named]


def names_of(x: Any) -> list[str]:
    """The names in an optimizer or a state dict, in the order of the groups."""
    groups = x["param_groups"] if isinstance(x, dict) else x.param_groups
    return [name for g in groups for name in g["param_names"]]


NAMED: dict[str, Any] = {
    "class": lambda named: optim.AdamW(named, lr=0.01),
    "groups": lambda named: optim.AdamW([{"params": named[:2], "lr": 0.02}, {"params": named[2:]}], lr=0.01),
    "partition": lambda named: optim.Optimizer(
        named, ps.partition({"m": ps.sgd(0.01, momentum=0.9), "v": ps.adamw(0.01)}, ps.by_ndim({2: "m"}, default="v"))
    ),
    "whole": lambda named: optim.Optimizer(named, ps.chain(ps.accumulate(ps.adam(0.01), 2), ps.clip_by_global_norm(1.0))),
    "prodigy": lambda named: optim.Optimizer(named, ps.prodigy()),
}


@pytest.mark.parametrize("make", NAMED.values(), ids=NAMED)
@pytest.mark.parametrize("change", ["order", "order and a name", "all names"])
def test_parameters_find_their_state_by_name(make: Any, change: str) -> None:
    model = net()
    first = make(list(model.named_parameters()))
    trained(model, first, range(3))
    saved, weights = copy.deepcopy(first.state_dict()), copy.deepcopy(model.state_dict())
    expected = trained(model, first, range(3, 6))

    model = net()
    model.load_state_dict(weights)
    named = list(model.named_parameters())
    # all other names, as a wrapped model has them, come in the same order; else pairs stay together: groups keep their sizes
    named = renamed(named, prefix="module.") if change == "all names" else [named[1], named[0], named[3], named[2]]
    named = renamed(named, other="0.shift") if change == "order and a name" else named
    second = make(named)
    with pytest.warns(UserWarning, match="no parameters '0.shift'") if change == "order and a name" else nullcontext():
        second.load_state_dict(saved)
    found = trained(model, second, range(3, 6))
    assert all(torch.equal(found[name], x) for name, x in expected.items())
    if change != "all names":  # they stay those of this optimizer
        assert names_of(second) == names_of(make(named))


def test_groups_of_a_partition_are_found_by_their_labels() -> None:
    model = net()
    named = list(model.named_parameters())
    first = NAMED["partition"](named)
    trained(model, first, range(2))
    saved = copy.deepcopy(first.state_dict())
    second = NAMED["partition"](named[::-1])  # the first parameter is a vector now, so its group comes first
    second.load_state_dict(saved)
    again = second.state_dict()
    names = [dict(zip(names_of(d), [k for g in d["param_groups"] for k in g["params"]])) for d in (saved, again)]
    for name in dict(named):
        x, y = (d["state"][ids[name]] for d, ids in zip((saved, again), names))
        assert x.keys() == y.keys()
        assert all(torch.equal(x[field], y[field]) for field in x)


def test_groups_are_found_by_their_parameters() -> None:
    """Each parameter keeps the options of its group, in whatever order the groups are."""
    model = net()
    named = list(model.named_parameters())
    decayed, free = [x for x in named if "weight" in x[0]], [x for x in named if "bias" in x[0]]
    groups: list[Any] = [{"params": decayed, "weight_decay": 0.1, "lr": 0.2}, {"params": free, "weight_decay": 0.0}]
    first = optim.AdamW(groups, lr=0.01)
    trained(model, first, range(2))
    saved = copy.deepcopy(first.state_dict())
    second = optim.AdamW(list(map(dict, groups[::-1])), lr=0.01)
    second.load_state_dict(saved)
    assert [g["weight_decay"] for g in second.param_groups] == [0.0, 0.1]
    assert [g["lr"] for g in second.param_groups] == [0.01, 0.2]
    for name, p in named:
        assert torch.equal(second.state[p]["exp_avg"], first.state[p]["exp_avg"]), name


@pytest.mark.parametrize("how", ["one here", "several here"])
def test_parameters_of_other_groups_are_refused(how: str) -> None:
    """Their options would be those of the wrong ones."""
    a, b, c, d = (nn.Parameter(torch.ones(2)) for _ in range(4))
    first = optim.AdamW([{"params": [("a", a), ("b", b)], "lr": 0.2}, {"params": [("c", c), ("d", d)]}], lr=0.01)
    moved = {
        "one here": [[("a", a), ("c", c)], [("b", b), ("d", d)]],
        "several here": [[("a", a), ("new", c)], [("b", b), ("newer", d)]],
    }[how]
    second = optim.AdamW([{"params": x} for x in moved], lr=0.01)
    with pytest.raises(ValueError, match="in one, 0" if how == "one here" else "in one group, 0, that are in several here"):
        second.load_state_dict(first.state_dict())
    assert all(g["lr"] == 0.01 for g in second.param_groups)


def test_a_vector_over_all_parameters_is_refused_in_another_order() -> None:
    p, q = (nn.Parameter(torch.randn(3, dtype=torch.float64)) for _ in range(2))

    def closure() -> Tensor:
        loss = (p**4).sum() + (q**2).sum()
        for x, g in zip((p, q), torch.autograd.grad(loss, (p, q))):
            x.grad = g
        return loss

    first = optim.LBFGS([("p", p), ("q", q)], max_iter=2)
    first.step(closure)
    second = optim.LBFGS([("q", q), ("p", p)], max_iter=2)
    before = copy.deepcopy(second.state_dict())
    with pytest.raises(ValueError, match="is a vector over all parameters in their order, which is another one here"):
        second.load_state_dict(first.state_dict())
    assert second.state_dict() == before
    optim.LBFGS([("p", p), ("q", q)], max_iter=2).load_state_dict(first.state_dict())


# ------------------------------------------------------------------------------------------ torch's distributed checkpoints


class Layers(nn.Module):
    """Parameters of one shape, so that nothing but their names tells them apart."""

    def __init__(self) -> None:
        super().__init__()
        for k in range(4):
            self.register_parameter("abcd"[k], nn.Parameter(torch.full((2, 3), 1.0 + k)))


def stepped(model: nn.Module, optimizer: Any, steps: int = 2) -> Any:
    for _ in range(steps):
        for k, p in enumerate(model.parameters()):
            p.grad = torch.full_like(p, 0.1 * (k + 1))
        optimizer.step()
    return optimizer


def split(first: str) -> Any:
    return ps.partition({"first": ps.adamw(0.1), "rest": ps.adamw(0.2)}, ps.by_path({f"[{first}]": "first"}, default="rest"))


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("transform", [ps.adamw(0.1), split("ab")], ids=["adamw", "partition"])
def test_each_parameter_has_its_own_state_in_another_order(transform: Any, flat: bool) -> None:
    """`set_optimizer_state_dict` puts the parameters in their places, but leaves their names in the order of the checkpoint."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, other = Layers(), Layers()
    optimizer = stepped(model, optim.Optimizer(model.named_parameters(), transform))
    turned = optim.Optimizer(list(other.named_parameters())[::-1], transform)
    set_optimizer_state_dict(other, turned, get_optimizer_state_dict(model, optimizer, options=options), options=options)
    for name, p in model.named_parameters():
        assert torch.equal(turned.state[other.get_parameter(name)]["exp_avg"], optimizer.state[p]["exp_avg"])
    names = [name for group in turned.param_groups for name in group["param_names"]]
    assert [other.get_parameter(name) for name in names] == [p for group in turned.param_groups for p in group["params"]]


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize(("saved", "here"), [("ab", "a"), ("a", "ab"), ("ab", "ac"), ("abc", "d"), ("ab", "cd")])
def test_parameters_in_other_groups_are_refused(saved: str, here: str, flat: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, other = Layers(), Layers()
    first = stepped(model, optim.Optimizer(model.named_parameters(), split(saved)))
    second = stepped(other, optim.Optimizer(other.named_parameters(), split(here)))
    checkpoint, everything = get_optimizer_state_dict(model, first, options=options), Everything(second)
    with pytest.raises(
        ValueError, match=r"in another group|under the label|for group \d of '[abcd]'|Group \d of .* has the label"
    ):
        set_optimizer_state_dict(other, second, checkpoint, options=options)
    everything.check()


@pytest.mark.parametrize("name", ["state", "param_groups"])
def test_half_a_state_dict_is_refused(name: str) -> None:
    _, optimizer = begin(MAKERS["AdamW"])
    everything = Everything(optimizer)
    half = {k: x for k, x in optimizer.state_dict().items() if k != name}
    with pytest.raises(KeyError, match=f"has no '{name}'"):
        optimizer.load_state_dict(half)
    everything.check()
