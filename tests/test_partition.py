"""Routing: partition, masks and freezing, pure and under the wrapper."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import purestep as ps
from purestep import optim
from tests.problems import difference

RULE = ps.by_ndim({2: "hidden"}, default="rest")


def both(lr: float = 0.02) -> ps.Transform:
    return ps.partition({"hidden": ps.muon(lr=lr), "rest": ps.adamw(lr=3e-3)}, RULE)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def gradients(params: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) for name, p in params.items()}


def example() -> dict[str, Tensor]:
    shapes = {"a.weight": (3, 2), "a.bias": (3,), "b.weight": (2, 2)}
    return gradients({name: torch.zeros(s, dtype=torch.float64) for name, s in shapes.items()}, 9)


def set_gradients(model: nn.Module, seed: int) -> None:
    params = dict(model.named_parameters())
    for name, g in gradients(params, seed).items():
        params[name].grad = g


# -- pure


def test_each_part_is_its_transform_alone() -> None:
    params = example()
    state = (opt := both()).init_state(params)
    parts = {"hidden": ps.muon(lr=0.02), "rest": ps.adamw(lr=3e-3)}
    alone = {k: {n: p for n, p in params.items() if RULE(n, p) == k} for k in parts}
    states = {k: t.init_state(alone[k]) for k, t in parts.items()}
    for step in range(5):
        grads = gradients(params, step)
        params, state = opt.step(grads, state, params)
        for k, t in parts.items():
            alone[k], states[k] = t.step({n: grads[n] for n in alone[k]}, states[k], alone[k])
        assert difference(params, {n: (alone["hidden"] | alone["rest"])[n] for n in params}) == 0
    assert list(state) == ["hidden", "rest"]
    assert state["hidden"][0].momentum_buffer["a.bias"] is None
    assert state["rest"][0].exp_avg["a.weight"] is None


def test_labels_as_a_pytree() -> None:
    labels = {"a.weight": "hidden", "a.bias": "rest", "b.weight": "hidden"}
    by_tree = ps.partition({"hidden": ps.muon(lr=0.02), "rest": ps.adamw(lr=3e-3)}, labels)
    params, grads = example(), gradients(example(), 0)
    assert (
        difference(
            by_tree.step(grads, by_tree.init_state(params), params)[0], both().step(grads, both().init_state(params), params)[0]
        )
        == 0
    )


def test_a_partition_is_a_value() -> None:
    opt = both()
    assert opt == both()
    assert opt != both(lr=0.1)
    assert pickle.loads(pickle.dumps(opt)) == opt == copy.deepcopy(opt)
    assert eval(repr(ps.partition({"a": ps.scale(1.0)}, ps.by_path({}, default="a"))), vars(ps)) == ps.partition(
        {"a": ps.scale(1.0)}, ps.by_path({}, default="a")
    )
    assert opt.replace(**{"hidden.lr": 0.5}).hyperparams["hidden.lr"] == 0.5
    with pytest.raises(TypeError, match=r"'lr' is ambiguous here: say which one, 'hidden\.lr', 'rest\.lr'"):
        opt.replace(lr=1.0)


def test_vmap_over_the_learning_rate_of_one_part() -> None:
    rates = torch.tensor([0.01, 0.1], dtype=torch.float64)
    params, grads = example(), gradients(example(), 0)
    batched = ps.tensors(both()).replace(**{"hidden.lr": rates})

    def step(opt: ps.Transform) -> Any:
        return opt.step(grads, opt.init_state(params), params)[0]

    found = torch.func.vmap(step, in_dims=(ps.in_dims(batched),))(batched)
    for k, lr in enumerate(rates.tolist()):
        assert difference({n: x[k] for n, x in found.items()}, step(both(lr=lr))) <= 1e-12


def test_a_compiled_step() -> None:
    opt, params = ps.partition({"hidden": ps.sgd(0.1, momentum=0.9), "rest": ps.adamw(0.1)}, RULE), example()
    compiled = torch.compile(opt.step, fullgraph=True, backend="aot_eager")
    state, other, theirs = opt.init_state(params), opt.init_state(params), params
    for step in range(3):
        grads = gradients(params, step)
        params, state = opt.step(grads, state, params)
        theirs, other = compiled(grads, other, theirs)
    assert difference(params, theirs) <= 1e-12


def test_nested_partitions_ask_only_about_what_they_are_given() -> None:
    asked: list[str] = []

    def inner(path: str, p: Tensor) -> str:
        asked.append(path)
        return "first" if path.startswith("a") else "second"

    opt = ps.partition(
        {"matrices": ps.partition({"first": ps.scale(-1.0), "second": ps.scale(-2.0)}, inner), "rest": ps.scale(-3.0)},
        ps.by_ndim({2: "matrices"}, default="rest"),
    )
    params = example()
    grads = {n: torch.ones_like(p) for n, p in params.items()}
    updates, _ = opt.update(grads, opt.init_state(params), params)
    assert {n: u.unique().tolist() for n, u in updates.items()} == {"a.weight": [-1.0], "a.bias": [-3.0], "b.weight": [-2.0]}
    assert set(asked) == {"a.weight", "b.weight"}
    assert list(opt.hyperparams) == ["matrices.first.factor", "matrices.second.factor", "rest.factor"]


def test_labels_are_asked_once_a_step() -> None:
    asked: list[str] = []
    opt = ps.partition({"hidden": ps.adamw(0.1), "rest": ps.adamw(0.1)}, lambda path, p: asked.append(path) or RULE(path, p))
    params = example()
    state = opt.init_state(params)
    asked.clear()
    opt.step(gradients(params, 0), state, params)
    assert sorted(asked) == sorted(params)


def test_a_state_of_another_partition_is_refused() -> None:
    params = example()
    other = ps.partition({"x": ps.sgd(0.1)}, ps.by_path({}, default="x"))
    with pytest.raises(TypeError, match="must be a dict with the keys 'hidden', 'rest', but got one with 'x'"):
        both().step(gradients(params, 0), other.init_state(params), params)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ps.partition({}, RULE), ValueError, "at least one transform"),
        (lambda: ps.partition({"a": ps.sgd}, RULE), TypeError, "'a' is <function sgd"),
        (lambda: ps.partition({1: ps.sgd()}, RULE), TypeError, "labels of a partition are strings, but one is 1"),
        (lambda: ps.partition([ps.sgd()], RULE), ValueError, "takes a dict"),
        (lambda: ps.by_path({"(": "a"}), ValueError, "not a regular expression"),
    ],
)
def test_what_is_no_partition(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("wrapped", [False, True])
def test_misspelt_and_unused_labels(wrapped: bool) -> None:
    def begin(opt: ps.Transform) -> None:
        if wrapped:
            optim.Optimizer(network().named_parameters(), opt)
        else:
            opt.init_state(dict(network().named_parameters()))

    with pytest.raises(
        ValueError, match=r"label of '0.weight' is 'hidden', but partition has 'hiden', 'rest'\. Did you mean 'hiden'"
    ):
        begin(ps.partition({"hiden": ps.muon(), "rest": ps.adamw()}, RULE))
    with pytest.raises(ValueError, match="No parameter has the label 'heads': their labels are 'hidden', 'rest'"):
        begin(ps.partition({"hidden": ps.muon(), "rest": ps.adamw(), "heads": ps.sgd()}, RULE))
    with pytest.raises(ValueError, match=r"by_ndim\({2: 'hidden'}\) has no entry for '0.bias', of shape \(8,\)"):
        begin(ps.partition({"hidden": ps.muon(), "rest": ps.adamw()}, ps.by_ndim({2: "hidden"})))
    with pytest.raises(ValueError, match=r"label of '0\.weight' is None"):
        begin(ps.partition({"hidden": ps.muon(), "rest": ps.adamw()}, lambda path, p: None))


def test_what_a_part_refuses_names_the_parameter() -> None:
    with pytest.raises(ValueError, match=r"'0\.bias'"):
        optim.Optimizer(network().named_parameters(), ps.partition({"all": ps.muon()}, ps.by_path({}, default="all")))


# -- freezing


def test_frozen_parameters_keep_every_bit_and_have_no_state() -> None:
    opt = ps.chain(
        ps.clip_by_global_norm(1.0), ps.adamw(0.1, weight_decay=0.1), ps.freeze(ps.by_path({"^a": True}, default=False))
    )
    params = example()
    params["a.bias"] = torch.tensor([-0.0, 1.0, 2.0], dtype=torch.float64)
    state = opt.init_state(params)
    assert state[1].exp_avg["a.bias"] is None
    grads = gradients(params, 0)
    grads["a.weight"] = torch.full((3, 2), torch.nan, dtype=torch.float64)  # what is frozen does not count in the norm
    after, _ = opt.step(grads, state, params)
    assert torch.equal(torch.signbit(after["a.bias"]), torch.signbit(params["a.bias"]))
    assert difference({n: after[n] for n in ("a.weight", "a.bias")}, {n: params[n] for n in ("a.weight", "a.bias")}) == 0
    alone = ps.chain(ps.clip_by_global_norm(1.0), ps.adamw(0.1, weight_decay=0.1))
    rest = {"b.weight": params["b.weight"]}
    expected, _ = alone.step({"b.weight": grads["b.weight"]}, alone.init_state(rest), rest)
    assert difference(after["b.weight"], expected["b.weight"]) == 0


def test_freezing_a_label_under_the_wrapper() -> None:
    model = network()
    optimizer = optim.Optimizer(
        model.named_parameters(),
        ps.partition({"frozen": ps.freeze(), "free": ps.adam(0.1)}, ps.by_path({"^0": "frozen"}, default="free")),
    )
    before = copy.deepcopy(model.state_dict())
    set_gradients(model, 0)
    optimizer.step()
    after = model.state_dict()
    assert all(torch.equal(before[n], after[n]) == n.startswith("0") for n in before)
    assert not any(optimizer.state.get(p) for n, p in model.named_parameters() if n.startswith("0"))


# -- under the wrapper


@pytest.mark.parametrize("clipped", [False, True])
def test_the_wrapper_is_the_pure_function(clipped: bool) -> None:
    opt = ps.chain(ps.clip_by_global_norm(0.5), both()) if clipped else both()
    model = network()
    params = {n: p.detach().clone() for n, p in model.named_parameters()}
    state = opt.init_state(params)
    optimizer = optim.Optimizer(model.named_parameters(), opt)
    scheduler = optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
    for step in range(6):
        set_gradients(model, step)
        rates = {f"{g['label']}.lr": g["lr"] for g in optimizer.param_groups}
        params, state = opt.replace(**rates).step(gradients(params, step), state, params)
        optimizer.step()
        scheduler.step()
    assert difference(params, {n: p.detach() for n, p in model.named_parameters()}) == 0
    assert [g["lr"] for g in optimizer.param_groups] == [0.02 / 8, 3e-3 / 8]


def test_groups_are_made_from_the_labels() -> None:
    optimizer = optim.Optimizer(network().named_parameters(), both())
    first, second = optimizer.param_groups
    assert (first["label"], first["param_names"], first["lr"], first["momentum"]) == (
        "hidden",
        ["0.weight", "2.weight"],
        0.02,
        0.95,
    )
    assert (second["label"], second["param_names"], second["lr"], second["betas"]) == (
        "rest",
        ["0.bias", "2.bias"],
        3e-3,
        (0.9, 0.999),
    )
    assert "betas" not in first
    assert "momentum" not in second
    assert sorted(optimizer.state[first["params"][0]]) == ["momentum_buffer", "step"]
    assert sorted(optimizer.state[second["params"][0]]) == ["exp_avg", "exp_avg_sq", "step"]


def test_two_of_torchs_optimizers_in_one() -> None:
    """What it replaces: Muon and AdamW side by side."""
    ours, theirs = network(), network()
    optimizer = optim.Optimizer(ours.named_parameters(), both())
    named = dict(theirs.named_parameters())
    pair = [
        torch.optim.Muon([p for p in named.values() if p.ndim == 2], lr=0.02),
        torch.optim.AdamW([p for p in named.values() if p.ndim != 2], lr=3e-3),
    ]
    for step in range(4):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizer.step()
        for o in pair:
            o.step()
    for p, q in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(p, q)


def test_a_users_group_options() -> None:
    """An option of a given group holds for the labels that have it; its own options stay what they are."""
    model = network()
    optimizer = optim.Optimizer(
        [{"params": model[0].named_parameters(), "lr": 0.5, "mine": 1}, {"params": model[2].named_parameters()}], both()
    )
    assert [(g["label"], g["lr"], g.get("mine")) for g in optimizer.param_groups] == [
        ("hidden", 0.5, 1), ("rest", 0.5, 1), ("hidden", 0.02, None), ("rest", 3e-3, None),
    ]  # fmt: skip
    set_gradients(model, 0)
    optimizer.param_groups[3]["lr"] *= 0.5
    optimizer.step()


@pytest.mark.parametrize("clipped", [False, True])
def test_parameters_added_later_are_labelled(clipped: bool) -> None:
    opt = ps.chain(ps.clip_by_global_norm(1.0), both()) if clipped else both()
    optimizer = optim.Optimizer(network().named_parameters(), opt)
    later = nn.Linear(3, 3)
    optimizer.add_param_group({"params": [(f"later.{n}", p) for n, p in later.named_parameters()], "lr": 0.25})
    assert [(g["label"], g["param_names"], g["lr"]) for g in optimizer.param_groups[2:]] == [
        ("hidden", ["later.weight"], 0.25), ("rest", ["later.bias"], 0.25),
    ]  # fmt: skip
    before = copy.deepcopy(later.state_dict())
    set_gradients(later, 0)
    optimizer.step()
    assert all(not torch.equal(before[n], p) for n, p in later.named_parameters())


def test_a_group_that_is_refused_changes_nothing() -> None:
    optimizer = optim.Optimizer(network().named_parameters(), both())
    with pytest.raises(ValueError, match="lr"):
        optimizer.add_param_group(
            {"params": [("x", nn.Parameter(torch.zeros(2, 2))), ("y", nn.Parameter(torch.zeros(2)))], "lr": -1.0}
        )
    assert len(optimizer.param_groups) == 2
    with pytest.raises(ValueError, match="labelled 'rest', but some of its parameters are 'hidden'"):
        optimizer.add_param_group({"params": [("x", nn.Parameter(torch.zeros(2, 2)))], "label": "rest"})


def test_parameters_without_names() -> None:
    optimizer = optim.Optimizer(network().parameters(), both())
    assert [g["label"] for g in optimizer.param_groups] == ["hidden", "rest"]


@pytest.mark.parametrize("clipped", [False, True])
def test_one_state_dict_in_the_middle_of_training(clipped: bool) -> None:
    opt = ps.chain(ps.clip_by_global_norm(1.0), both()) if clipped else both()

    def begin() -> tuple[nn.Module, optim.Optimizer]:
        model = network()
        return model, optim.Optimizer(model.named_parameters(), opt)

    def train(model: nn.Module, optimizer: optim.Optimizer, steps: range) -> None:
        for step in steps:
            set_gradients(model, step)
            optimizer.step()

    model, optimizer = begin()
    train(model, optimizer, range(3))
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    train(model, optimizer, range(3, 6))
    other, resumed = begin()
    file.seek(0)
    weights, saved = torch.load(file, weights_only=True)
    other.load_state_dict(weights)
    resumed.load_state_dict(saved)
    train(other, resumed, range(3, 6))
    assert difference(model.state_dict(), other.state_dict()) == 0
    assert [g["label"] for g in resumed.param_groups] == ["hidden", "rest"]
    for again in (pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)):
        assert again.param_groups[1]["label"] == "rest"


@pytest.mark.parametrize("named", [False, True])
def test_a_checkpoint_with_other_labels_is_refused(named: bool) -> None:
    optimizer = optim.Optimizer(network().named_parameters() if named else network().parameters(), both())
    saved = optimizer.state_dict()
    saved["param_groups"][0]["label"], saved["param_groups"][1]["label"] = "rest", "hidden"
    what = "has the parameter '0.weight' under" if named else "Group 0 of the loaded state has"
    with pytest.raises(ValueError, match=rf"{what} the label 'rest'.*'hidden'"):
        optimizer.load_state_dict(saved)


def test_tied_parameters_are_handled_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    optimizer = optim.Optimizer(model.named_parameters(), both())
    assert [n for g in optimizer.param_groups for n in g["param_names"]] == ["0.weight", "0.bias", "1.bias"]


def test_by_module() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    rule = ps.by_module(model, {nn.Linear: RULE, (nn.Embedding): "table"}, default="rest")
    assert {n: rule(n, p) for n, p in model.named_parameters()} == {
        "0.weight": "table", "1.weight": "hidden", "1.bias": "rest", "2.weight": "rest", "2.bias": "rest",
    }  # fmt: skip
    assert pickle.loads(pickle.dumps(rule)) == rule
    assert "by_module(model, {Linear: by_ndim({2: 'hidden'}, default='rest'), Embedding: 'table'}" in repr(rule)
    with pytest.raises(ValueError, match=r"no parameter 'head.weight'; it has '0.weight', '1.weight'"):
        rule("head.weight", torch.zeros(2))


def test_an_option_outside_the_partition_is_each_groups_own() -> None:
    w, b = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    parts = ps.partition({"m": ps.scale_by_adam(), "r": ps.scale_by_adam()}, ps.by_ndim({2: "m"}, default="r"))
    optimizer = optim.Optimizer([w, b], ps.chain(ps.clip_by_global_norm(1e9), parts, ps.scale_by_learning_rate(0.1)))
    optimizer.param_groups[1]["lr"] = 0.0
    w.grad, b.grad = torch.ones(2, 2), torch.ones(2)
    optimizer.step()
    torch.testing.assert_close((w.detach(), b.detach()), (torch.full((2, 2), 0.9), torch.ones(2)))
    optimizer.param_groups[0]["max_norm"] = 0.1
    with pytest.raises(ValueError, match="max_norm must be the same in all groups"):
        optimizer.step()


def test_maximize_differs_where_all_groups_are_seen_together() -> None:
    params = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    groups = [{"params": params[:1], "maximize": True}, {"params": params[1:]}]
    optimizer = optim.Optimizer(groups, ps.chain(ps.clip_by_global_norm(1.0), ps.adam(0.1)))
    for p in params:
        p.grad = torch.ones(2)
    with pytest.raises(ValueError, match="same maximize in all groups"):
        optimizer.step()


@pytest.mark.parametrize("clipped", [False, True])
def test_parts_whose_labels_spell_the_same(clipped: bool) -> None:
    rule = ps.by_ndim({2: "m"}, default="r")
    opt = ps.chain(
        ps.masked(ps.partition({"m": ps.scale(10.0), "r": ps.scale(1.0)}, rule), lambda path, p: path != "v"),
        ps.partition({"m": ps.sgd(lr=0.1), "r": ps.sgd(lr=0.1)}, rule),
    )
    opt = ps.chain(ps.clip_by_global_norm(1e9), opt) if clipped else opt
    params = {"w": torch.ones(2, 2), "v": torch.ones(2, 2), "b": torch.ones(2)}
    grads = {name: torch.ones_like(p) for name, p in params.items()}
    expected, _ = opt.step(grads, opt.init_state(params), params)
    leaves = {name: nn.Parameter(p.clone()) for name, p in params.items()}
    for name, p in leaves.items():
        p.grad = grads[name]
    optim.Optimizer(leaves.items(), opt).step()
    torch.testing.assert_close({name: p.detach() for name, p in leaves.items()}, expected)


@pytest.mark.parametrize("part", [ps.clip_by_global_norm(1.0), ps.normalize(), ps.skip_if_nonfinite(ps.trace(0.9))], ids=repr)
def test_a_part_without_gradients(part: ps.Transform) -> None:
    opt = ps.chain(ps.masked(part, lambda path, p: path == "b"), ps.sgd(lr=0.1))
    params = {"w": torch.ones(2, 2), "b": torch.ones(2)}
    after, _ = opt.step({"w": torch.ones(2, 2), "b": None}, opt.init_state(params), params)
    torch.testing.assert_close(after, {"w": torch.full((2, 2), 0.9), "b": torch.ones(2)})


def test_inner_masks_are_asked_about_their_part_under_the_wrapper_too() -> None:
    part = ps.chain(ps.masked(ps.scale(2.0), ps.by_ndim({2: True})), ps.sgd(lr=0.1))
    model = network()
    optimizer = optim.Optimizer(model.named_parameters(), ps.partition({"hidden": part, "rest": ps.sgd(lr=0.1)}, RULE))
    set_gradients(model, 0)
    optimizer.step()


def test_what_torch_refuses_is_refused() -> None:
    p, q = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2))
    with pytest.raises(TypeError, match="ordered collections"):
        optim.Optimizer([{"params": {p, q}}], both())


def test_an_option_of_another_part_is_left_out() -> None:
    w, b = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2))
    parts = ps.partition({"m": ps.adamw(), "r": ps.sgd(momentum=0.9)}, ps.by_ndim({2: "m"}, default="r"))
    optimizer = optim.Optimizer([{"params": [w], "momentum": 0.5}, {"params": [b]}], parts)
    assert ["momentum" in g for g in optimizer.param_groups] == [False, True]


@pytest.mark.parametrize("labels", ["function", "tree"])
def test_parameters_without_names_are_known_by_their_first_places(labels: str) -> None:
    """The groups of a partition put them in another order; afterwards, too, the paths are the numbers they were given in."""
    rule: Any = (lambda path, p: "b" if path in ("1", "3") else "a") if labels == "function" else ["a", "b", "a", "b", "a"]
    opt = ps.partition({"a": ps.scale(-0.1), "b": ps.chain(ps.add_noise(0.1, 0.5, seed=1), ps.sgd(0.1, momentum=0.9))}, rule)
    params: Any = [torch.zeros(k + 1) for k in range(5)]
    state = opt.init_state(params)
    own = [torch.nn.Parameter(p.clone()) for p in params]
    optimizer = optim.Optimizer(own, opt)
    for step in range(3):
        grads = [None if k == step else torch.ones(k + 1) for k in range(5)]
        params, state = opt.step(grads, state, params)
        for p, g in zip(own, grads):
            p.grad = g
        optimizer.step()
        if step == 1:
            optimizer, own = copy.deepcopy((optimizer, own))
        torch.testing.assert_close([p.detach() for p in own], params)
