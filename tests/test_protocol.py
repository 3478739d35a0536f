"""What is done with an optimizer beside taking steps: making it, extending it, and the parameters it is given."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

import purestep as ps
from purestep import optim

# --------------------------------------------------------------------------------------------- parameters without a shape

MUON = {"a": ps.muon(0.1), "b": ps.adamw(0.1)}


def lazy(seed: int = 0, materialized: bool = False, only: bool = False) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.LazyLinear(3), *([] if only else [nn.Linear(3, 2)]))
    if materialized:
        torch.manual_seed(seed + 1)
        net(torch.ones(4, 5))
    return net


def train(net: nn.Module, optimizer: Any, steps: int = 3, scheduler: Any = None, seed: int = 1) -> None:
    torch.manual_seed(seed)
    for i in range(steps):
        x = torch.linspace(-1, 1, 20).view(4, 5) + i
        optimizer.zero_grad()
        net(x).square().sum().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


@pytest.mark.parametrize("only", [False, True])
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("clipped", [False, True])
def test_lazy_parameters_get_their_label_when_they_have_a_shape(only: bool, named: bool, clipped: bool) -> None:
    transform: Any = ps.partition(MUON, ps.by_ndim({2: "a"}, default="b"))
    if clipped:
        transform = ps.chain(ps.clip_by_global_norm(1.0), transform)
    results = []
    for materialized in (False, True):
        net = lazy(materialized=materialized, only=only)
        optimizer = optim.Optimizer(net.named_parameters() if named else net.parameters(), transform)
        scheduler = lr_scheduler.StepLR(optimizer, 1, 0.5)
        train(net, optimizer, 3, scheduler)
        results.append((net, optimizer))
    (net, optimizer), (other, expected) = results
    for p, q in zip(net.parameters(), other.parameters()):
        torch.testing.assert_close(p, q)
    assert [g["label"] for g in optimizer.param_groups] == [g["label"] for g in expected.param_groups]
    if named:
        assert [g["param_names"] for g in optimizer.param_groups] == [g["param_names"] for g in expected.param_groups]
    assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in expected.param_groups]
    resumed = optim.Optimizer(other.named_parameters() if named else other.parameters(), transform)
    resumed.load_state_dict(optimizer.state_dict())


def test_groups_of_lazy_parameters_keep_their_options() -> None:
    net = nn.Sequential(nn.LazyLinear(3), nn.LazyLinear(2))
    groups: Any = [{"params": net[0].named_parameters("0"), "lr": 0.5}, {"params": list(net[1].named_parameters("1"))}]
    groups[0]["params"] = [(f"0.{n}", p) for n, p in net[0].named_parameters()]
    groups[1]["params"] = [(f"1.{n}", p) for n, p in net[1].named_parameters()]
    optimizer = optim.Optimizer(groups, ps.partition(MUON, ps.by_ndim({2: "a"}, default="b")))
    train(net, optimizer, 1)
    assert [(g["label"], g["lr"], g["param_names"]) for g in optimizer.param_groups] == [
        ("a", 0.5, ["0.weight"]), ("b", 0.5, ["0.bias"]), ("a", 0.1, ["1.weight"]), ("b", 0.1, ["1.bias"]),
    ]  # fmt: skip


def test_labels_are_not_asked_of_what_has_no_shape() -> None:
    def label(path: str, p: Tensor) -> str:
        return "a" if len(p.shape) == 2 else "b"  # an uninitialized parameter has no shape

    net = lazy()
    optimizer = optim.Optimizer(net.named_parameters(), ps.partition(MUON, label))
    copied = copy.deepcopy((net, optimizer))
    for m, o in ((net, optimizer), copied):
        train(m, o, 1)
        assert [g["param_names"] for g in o.param_groups] == [["0.weight", "1.weight"], ["0.bias", "1.bias"]]


def test_masks_are_asked_of_lazy_parameters_when_they_have_a_shape() -> None:
    decay = ps.add_decayed_weights(0.5, mask=lambda path, p: len(p.shape) > 1)
    results = []
    for materialized in (False, True):
        net = lazy(materialized=materialized)
        train(net, optim.Optimizer(net.named_parameters(), ps.chain(decay, ps.sgd(0.01))))
        results.append([p.detach() for p in net.parameters()])
    torch.testing.assert_close(*results)


def test_a_label_that_no_lazy_parameter_gets_is_refused_at_the_first_step() -> None:
    net = lazy()
    optimizer = optim.Optimizer(
        net.named_parameters(), ps.partition({**MUON, "c": ps.sgd(0.1)}, ps.by_ndim({2: "a"}, default="b"))
    )
    with pytest.raises(ValueError, match="No parameter has the label 'c'"):
        train(net, optimizer, 1)


def test_lazy_parameters_that_a_part_cannot_treat_are_refused() -> None:
    net = nn.Sequential(nn.LazyConv1d(2, 2))
    optimizer = optim.Optimizer(net.named_parameters(), ps.partition(MUON, ps.by_path({"weight": "a"}, default="b")))
    net(torch.ones(1, 2, 4)).sum().backward()
    with pytest.raises(ValueError, match="'0.weight' has shape"):
        optimizer.step()


def test_lbfgs_takes_lazy_parameters() -> None:
    results = []
    for namespace in (torch.optim, optim):
        net = lazy(materialized=namespace is torch.optim)
        optimizer: Any = namespace.LBFGS(net.parameters(), max_iter=3)

        def closure(net: Any = net, optimizer: Any = optimizer) -> Any:
            optimizer.zero_grad()
            loss = net(torch.linspace(-1, 1, 20).view(4, 5)).square().sum()
            loss.backward()
            return loss

        torch.manual_seed(1)
        for _ in range(2):
            optimizer.step(closure)
        results.append([p.detach() for p in net.parameters()])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- rules by path


def test_patterns_that_match_nothing_are_refused() -> None:
    params = {"embed.weight": torch.ones(5, 2), "hidden.weight": torch.ones(2, 2)}
    rule = ps.by_path({"embedding": "rest"}, default=ps.by_ndim({2: "hidden"}, default="rest"))
    for transform in (
        ps.partition({"hidden": ps.muon(0.1), "rest": ps.adamw(0.1)}, ps.by_path({"^embed": "rest", "haed": "rest"}, default="hidden")),
        ps.masked(ps.adamw(0.1), ps.by_path({"embedding": True}, default=False)),
        ps.chain(ps.adamw(0.1), ps.freeze(ps.by_path({"embedding": True}, default=False))),
        ps.masked(ps.sgd(0.1), ps.by_ndim({2: ps.by_path({"embedding": True}, default=False)}, default=True)),
        ps.chain(ps.partition({"hidden": ps.sgd(0.1)}, lambda path, p: "hidden"), ps.masked(ps.sgd(0.1), ps.by_path({"a b": True}, default=False))),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="is found in no path of a parameter; there are 'embed.weight', 'hidden.weight'"):
            transform.init_state(params)
        with pytest.raises(ValueError, match="is found in no path of a parameter; there are '"):
            optim.Optimizer([(name, nn.Parameter(p)) for name, p in params.items()], transform)
    with pytest.raises(ValueError, match="empty"):
        ps.masked(ps.sgd(0.1), ps.by_path({"a": True}, default=False)).init_state(torch.ones(2))
    assert rule("head.weight", torch.ones(2)) == "rest"  # a rule itself may be asked anything


def test_patterns_are_compared_with_all_paths() -> None:
    """A rule that is asked about some parameters may have patterns for others; and what comes later is only asked."""
    inner = ps.masked(ps.trace(0.9), ps.by_path({"bias": True}, default=False))  # only asked about weights
    transform = ps.partition({"w": ps.chain(inner, ps.sgd(0.1)), "b": ps.sgd(0.1)}, ps.by_path({"weight": "w", "bias": "b"}))
    net = nn.Linear(2, 2)
    transform.init_state(dict(net.named_parameters()))
    optimizer = optim.Optimizer(net.named_parameters(), transform)
    optimizer.add_param_group({"params": [("more.weight", nn.Parameter(torch.ones(2)))]})


@pytest.mark.parametrize("grouped", [False, True])
def test_rules_by_name_ask_for_names(grouped: bool) -> None:
    net = nn.Linear(2, 2)
    for rule in (
        ps.by_path({"weight": "a"}, default="b"),
        ps.by_ndim({1: "b"}, default=ps.by_path({"weight": "a"}, default="b")),
        ps.by_module(net, {nn.Linear: ps.by_ndim({2: "a"}, default="b")}),
    ):
        for transform in (
            ps.partition({"a": ps.sgd(0.1), "b": ps.adamw(0.1)}, rule),
            ps.chain(ps.partition({"a": ps.sgd(0.1), "b": ps.adamw(0.1)}, rule), ps.clip_by_global_norm(1.0)),
        ):
            params: Any = [{"params": net.parameters()}] if grouped else net.parameters()
            with pytest.raises(ValueError, match="model.named_parameters()"):
                optim.Optimizer(params, transform)
            params = [{"params": net.named_parameters()}] if grouped else net.named_parameters()
            optim.Optimizer(params, transform)
    with pytest.raises(ValueError, match="model.named_parameters()"):
        optim.Optimizer(net.parameters(), ps.masked(ps.sgd(0.1), ps.by_path({"weight": True}, default=False)))


# ---------------------------------------------------------------------------------------------------------- gradient scalers

SCALED: dict[str, Any] = {
    "SGD": lambda params: optim.SGD(params, lr=0.1, momentum=0.9),
    "SGD, fused": lambda params: optim.SGD(params, lr=0.1, momentum=0.9, fused=True),
    "Adam, fused": lambda params: optim.Adam(params, lr=0.1, fused=True),
    "AdamW, foreach": lambda params: optim.AdamW(params, lr=0.1, foreach=True),
    "Adagrad, loop": lambda params: optim.Adagrad(params, lr=0.1, foreach=False),
    "clipped": lambda params: optim.Optimizer(params, ps.chain(ps.clip_by_global_norm(1.0), ps.adamw(0.1))),
    "scheduled": lambda params: optim.Optimizer(params, ps.adamw(ps.schedules.linear(0.1, 0.0, total_steps=9))),
    "partition": lambda params: optim.Optimizer(
        params, ps.partition({"a": ps.adamw(0.1), "b": ps.accumulate(ps.sgd(0.1), 2)}, ps.by_ndim({2: "a"}, default="b"))
    ),
}


@pytest.mark.parametrize("make", SCALED.values(), ids=SCALED)
@pytest.mark.parametrize("waits", [False, True], ids=["on a device", "readable"])
def test_grad_scale_and_found_inf_are_honoured(make: Any, waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    results: list[Any] = []
    for scaled in (False, True):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(3))]
        optimizer = make(params)
        for i in range(5):
            spoiled = i in (0, 2)  # before there is a state, and after
            if spoiled and not scaled:
                continue
            for p in params:
                p.grad = torch.full_like(p, 1.0 + i) * (64.0 if scaled else 1.0)
                if spoiled:
                    p.grad[0] = float("nan")
            if scaled:
                optimizer.grad_scale = torch.tensor(64.0)
                optimizer.found_inf = torch.tensor(float(spoiled))
            with monkeypatch.context() as patch:
                if not waits:  # as if it were on a device: the steps are made, and taken back
                    found = getattr(optimizer, "found_inf", None)
                    patch.setattr("purestep.optimizer.readable", lambda x, found=found: x is not found)
                optimizer.step()
            if scaled:
                del optimizer.grad_scale, optimizer.found_inf
        counters = [s.get("step") for s in optimizer.state.values()]
        results.append([*[p.detach() for p in params], [None if x is None else float(x) for x in counters]])
    torch.testing.assert_close(results[0][:2], results[1][:2])
    assert results[0][2] == results[1][2]


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad"])
def test_a_gradient_scaler_leaves_it_to_a_fused_step(name: str) -> None:
    results = []
    for namespace in (torch.optim, optim):
        p = nn.Parameter(torch.ones(3))
        optimizer = getattr(namespace, name)([p], lr=0.1, fused=True)
        assert optimizer._step_supports_amp_scaling
        assert not hasattr(getattr(namespace, name)([p], lr=0.1), "_step_supports_amp_scaling")
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
        for i in range(6):
            optimizer.zero_grad()
            factor = float("inf") if i == 3 else 1.0 + i
            scaler.scale((p * torch.tensor([1.0, 2.0, factor])).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        results.append(
            (p.detach(), torch.tensor(scaler.get_scale()), torch.as_tensor(float(optimizer.state[p].get("step", 5))))
        )
    torch.testing.assert_close(results[0], results[1])


def test_only_unscaling_or_only_skipping_is_asked_for() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = optim.SGD([p], lr=0.1)
    p.grad = torch.full((2,), 8.0)
    optimizer.grad_scale = torch.tensor([8.0])
    optimizer.step()
    assert p.tolist() == pytest.approx([0.9, 0.9])
    assert p.grad.tolist() == [1.0, 1.0]
    del optimizer.grad_scale
    optimizer.found_inf = torch.ones(1)
    optimizer.step()
    assert p.tolist() == pytest.approx([0.9, 0.9])


def test_lbfgs_cannot_be_unscaled() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = optim.LBFGS([p])
    optimizer.grad_scale = torch.tensor(8.0)

    def closure() -> Tensor:
        p.grad = torch.ones(2)
        return p.sum()

    with pytest.raises(RuntimeError, match="evaluates its closure more than once"):
        optimizer.step(closure)


# -------------------------------------------------------------------------------------------------------------- L-BFGS


def valley(p: Tensor) -> Tensor:
    return (1 - p[0]) ** 2 + 100 * (p[1] - p[0] ** 2) ** 2


class Stop(Exception):
    """Raised by a closure."""


class Closure:
    """Evaluates `valley`; may stop at one evaluation, and clamp the parameters first."""

    def __init__(self, p: Tensor, optimizer: Any, clamp: bool = False, stop: int = 0, error: Any = Stop) -> None:
        self.p, self.optimizer, self.clamp, self.stop, self.error, self.calls = p, optimizer, clamp, stop, error, 0

    def __call__(self) -> Tensor:
        self.calls += 1
        if self.calls == self.stop:
            raise self.error
        if self.clamp:
            self.p.data.clamp_(-1.1, 0.4)  # which no version counter shows
        self.optimizer.zero_grad()
        loss = valley(self.p)
        loss.backward()
        return loss


def start(namespace: Any, wolfe: bool, **options: Any) -> tuple[nn.Parameter, Any]:
    p = nn.Parameter(torch.tensor([-1.2, 1.0], dtype=torch.float64))
    search = "strong_wolfe" if wolfe else None
    return p, namespace.LBFGS([p], lr=1.0 if wolfe else 0.1, line_search_fn=search, **{"max_iter": 9, **options})


@pytest.mark.parametrize("wolfe", [False, True])
def test_a_closure_may_change_the_parameters(wolfe: bool) -> None:
    results = []
    for namespace in (torch.optim, optim):
        p, optimizer = start(namespace, wolfe)
        closure = Closure(p, optimizer, clamp=True)
        results.append([])
        for _ in range(4):
            optimizer.step(closure)
            results[-1].append((p.tolist(), closure.calls, int(optimizer.state[p]["n_iter"])))
    assert results[0] == results[1]


@pytest.mark.parametrize("wolfe", [False, True])
@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
def test_an_exception_in_the_closure_keeps_the_progress(wolfe: bool, error: Any) -> None:
    results = []
    for namespace in (torch.optim, optim):
        p, optimizer = start(namespace, wolfe)
        closure = Closure(p, optimizer, stop=14, error=error)
        optimizer.step(closure)
        before = p.tolist()
        with pytest.raises(error):
            optimizer.step(closure)
        assert p.tolist() != before
        results.append((p.tolist(), closure.calls, int(optimizer.state[p]["n_iter"])))
    assert results[0] == results[1]


def test_an_interrupted_run_goes_on_as_if_nothing_had_been() -> None:
    p, optimizer = start(optim, wolfe=False)
    closure = Closure(p, optimizer, stop=14)
    optimizer.step(closure)
    with pytest.raises(Stop):
        optimizer.step(closure)
    optimizer.step(closure)
    q, other = start(optim, wolfe=False)
    closure = Closure(q, other)
    for steps in (9, 4, 9):
        other.param_groups[0]["max_iter"] = steps
        other.step(closure)
    assert p.tolist() == q.tolist()
    assert int(optimizer.state[p]["n_iter"]) == int(other.state[q]["n_iter"]) == 22


def test_an_exception_in_the_first_evaluation_changes_nothing() -> None:
    p, optimizer = start(optim, wolfe=True)
    with pytest.raises(Stop):
        optimizer.step(Closure(p, optimizer, stop=1))
    assert p.tolist() == [-1.2, 1.0]


def test_an_exception_in_another_line_search_changes_nothing() -> None:
    p = nn.Parameter(torch.tensor([-1.2, 1.0], dtype=torch.float64))
    optimizer = optim.Optimizer([p], ps.chain(ps.sgd(1.0), ps.scale_by_backtracking_linesearch()))
    closure = Closure(p, optimizer, stop=3)
    with pytest.raises(Stop):
        optimizer.step(closure)
    assert p.tolist() == [-1.2, 1.0]


def test_the_state_of_lbfgs_is_where_torchs_is() -> None:
    results = []
    for namespace in (torch.optim, optim):
        p, optimizer = start(namespace, wolfe=False)
        assert not optimizer.state[p]
        optimizer.step(Closure(p, optimizer))
        own = optimizer.state[p]
        results.append((int(own["n_iter"]), int(own["func_evals"]), float(own["t"]), own["d"].tolist(), len(own["old_dirs"])))
        minimum = nn.Parameter(torch.zeros(2))
        optimizer = namespace.LBFGS([minimum])

        def closure(p: Any = minimum, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = p.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)  # it converges at once
        results[-1] += (int(optimizer.state[minimum]["func_evals"]), int(optimizer.state[minimum]["n_iter"]))
    assert results[0] == results[1]
