"""What is done with an optimizer beside taking steps: making it, extending it, and the parameters it is given."""

from __future__ import annotations

import copy
import gc
import importlib
import inspect
import pickle
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensorMode
from torch.optim import lr_scheduler

import purestep as ps
from purestep import optim
from purestep._optimizer.mirror import mirrored

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
    with pytest.raises(ValueError, match=r"'0\.weight' has shape"):
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
        with pytest.raises(
            ValueError, match=r"is found in no path of a parameter; the paths are 'embed.weight', 'hidden.weight'"
        ):
            transform.init_state(params)
        with pytest.raises(ValueError, match=r"is found in no path of a parameter; the paths are '"):
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
            with pytest.raises(ValueError, match=r"model\.named_parameters\(\)"):
                optim.Optimizer(params, transform)
            params = [{"params": net.named_parameters()}] if grouped else net.named_parameters()
            optim.Optimizer(params, transform)
    with pytest.raises(ValueError, match=r"model\.named_parameters\(\)"):
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
                    patch.setattr("purestep._optimizer.optimizer.readable", lambda x, found=found: x is not found)
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


# --------------------------------------------------------------------------------------------------------------- imports


def test_imports_are_torchs() -> None:
    from_torch: Any = importlib.import_module("purestep.optim.lr_scheduler")
    assert from_torch is torch.optim.lr_scheduler is optim.lr_scheduler
    assert importlib.import_module("purestep.optim.swa_utils") is torch.optim.swa_utils is optim.swa_utils
    base = importlib.import_module("purestep.optim.optimizer")
    assert base.Optimizer is optim.Optimizer
    assert base.required is importlib.import_module("torch.optim.optimizer").required
    namespace: dict[str, Any] = {}
    code = "from purestep.optim.lr_scheduler import StepLR\nfrom purestep.optim.swa_utils import AveragedModel, SWALR\n"
    code += "import purestep.optim.lr_scheduler as s\nfrom purestep.optim import Adam, lr_scheduler\n"
    exec(code, namespace)
    assert namespace["StepLR"] is namespace["s"].StepLR is torch.optim.lr_scheduler.StepLR


# ---------------------------------------------------------------------------------------------------------------- classes


@pytest.mark.parametrize("keyword", [False, True])
def test_a_class_with_its_own_step_and_options(keyword: bool) -> None:
    results = []
    for namespace in (torch.optim, optim):

        class Own(namespace.Optimizer):  # type: ignore[misc, name-defined]
            def __init__(self, params: Any, lr: float = 0.1, momentum: float = 0.5) -> None:
                defaults = {"lr": lr, "momentum": momentum}
                super().__init__(params, defaults=defaults) if keyword else super().__init__(params, defaults)

            @torch.no_grad()
            def step(self, closure: Any = None) -> None:
                for group in self.param_groups:
                    for p in group["params"]:
                        state = self.state[p]
                        if len(state) == 0:
                            state["buffer"] = torch.zeros_like(p)
                            state["steps"] = 0
                        state["steps"] += 1
                        state["buffer"].mul_(group["momentum"]).add_(p.grad)
                        p.add_(state["buffer"], alpha=-group["lr"])

        params = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]
        optimizer: Any = Own([{"params": params[:1], "lr": 0.2}, {"params": params[1:]}])
        scheduler = lr_scheduler.StepLR(optimizer, 1, 0.5)
        seen: list[int] = []
        optimizer.register_step_post_hook(lambda *_, seen=seen: seen.append(1))
        for i in range(4):
            for p in optimizer.param_groups[0]["params"] + optimizer.param_groups[1]["params"]:
                p.grad = torch.full_like(p, 1.0 + i)
            optimizer.step()
            scheduler.step()
            if i == 1:
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer = copy.deepcopy(optimizer) if keyword else optimizer
                optimizer.load_state_dict(saved)
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
        results.append(([p.detach() for g in optimizer.param_groups for p in g["params"]], optimizer.state_dict(), len(seen)))
        assert repr(optimizer).startswith("Own")
    torch.testing.assert_close(results[0][0], results[1][0])
    assert results[0][1]["param_groups"] == results[1][1]["param_groups"]
    torch.testing.assert_close(results[0][1]["state"], results[1][1]["state"])
    assert results[0][2] == results[1][2]


def test_a_class_with_options_and_without_a_step_says_so() -> None:
    class Half(optim.Optimizer):
        pass

    p = nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    with pytest.raises(NotImplementedError, match="must have its own step"):
        Half([p], {"lr": 0.1}).step()
    for wrong in ({"lr": 0.1}, None, 0.1):
        with pytest.raises(TypeError, match="takes a transform"):
            optim.Optimizer([p], wrong)  # type: ignore[arg-type]


def test_subclasses_may_extend_a_class() -> None:
    class Logged(optim.Adam):
        def __init__(self, params: Any, lr: float = 0.1) -> None:
            super().__init__(params, lr=lr, betas=(0.5, 0.9))
            self.log: list[float] = []

        def step(self, closure: Any = None) -> Any:
            self.log.append(self.param_groups[0]["lr"])
            return super().step(closure)

    p = nn.Parameter(torch.ones(2))
    optimizer = Logged([p])
    p.grad = torch.ones(2)
    optimizer.step()
    assert optimizer.log == [0.1]
    assert p.tolist() == pytest.approx([0.9, 0.9])


class Beginning:
    """Makes the state of a parameter where it is empty, as torch's tests for states of another dtype do."""

    def __init__(self, optimizer: Any) -> None:
        optimizer.register_step_pre_hook(self)

    def __call__(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if len(optimizer.state[p]) == 0:
                    zeros = torch.zeros_like(p)
                    optimizer.state[p].update(step=torch.tensor(0.0), exp_avg=zeros, exp_avg_sq=torch.full_like(p, 4.0))


def test_state_that_is_made_where_it_is_empty_counts() -> None:
    results = []
    for namespace in (torch.optim, optim):
        p = nn.Parameter(torch.ones(2))
        optimizer = namespace.Adam([p], lr=0.1)
        Beginning(optimizer)
        p.grad = torch.ones(2)
        optimizer.step()
        results.append(p.detach())
    torch.testing.assert_close(*results)


def test_adagrad_shares_its_memory() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = optim.Adagrad([p], lr=0.1)
    optimizer.share_memory()
    assert optimizer.state[p]["sum"].is_shared()
    p.grad = torch.ones(3)
    optimizer.step()
    assert p.tolist() == pytest.approx([0.9] * 3)


@pytest.mark.parametrize(
    "make", [lambda p: optim.Adam([p], lr=0.1), lambda p: optim.Optimizer([p], ps.chain(ps.clip(1.0), ps.adam(0.1)))]
)
def test_an_optimizer_may_be_made_inside_a_compiled_function(make: Any) -> None:
    def train(p: nn.Parameter) -> Any:
        optimizer = make(p)
        p.grad = torch.ones_like(p)
        optimizer.step()
        return optimizer

    p = nn.Parameter(torch.ones(2))
    optimizer = torch.compile(train, backend="eager")(p)
    assert p.tolist() == pytest.approx([0.9, 0.9])
    optimizer.step()


@pytest.mark.parametrize("make", [lambda: ps.trace(0.9), lambda: ps.adamw(0.1), lambda: ps.skip_if_nonfinite(ps.sgd(0.1))])
def test_a_transform_is_freed_at_once(make: Any) -> None:
    gc.collect()
    gc.disable()
    try:
        transform, p = make(), torch.ones(3)
        parts = [weakref.ref(transform), *[weakref.ref(link.transform) for link in transform.links]]
        transform.step(torch.ones(3), transform.init_state(p), p)
        transform.step(torch.ones(3), transform.init_state(p), p, donate=True)
        del transform
        assert [part() for part in parts] == [None] * len(parts)
    finally:
        gc.enable()


def test_a_transform_is_pickled_copied_and_compared_by_its_call() -> None:
    transform = ps.trace(0.9)
    assert transform.links[0].transform == transform
    for made in (pickle.loads(pickle.dumps(transform)), copy.deepcopy(transform), copy.copy(transform)):
        assert made == transform
        assert made.replace(momentum=0.5).hyperparams["momentum"] == 0.5


def test_a_fake_state_dict_leaves_a_real_optimizer() -> None:
    params = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]
    optimizer = optim.Adam(params, lr=0.1)
    for fake in (True, False):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        if fake:
            with FakeTensorMode(allow_non_fake_inputs=True):
                optimizer.state_dict()
    assert params[0].tolist() == pytest.approx([0.8, 0.8])


# ---------------------------------------------------------------------------------------------------------------- options


class ListConfig(Sequence[Any]):
    """A sequence, as configuration libraries have them."""

    def __init__(self, *items: Any) -> None:
        self.items = items

    def __getitem__(self, i: Any) -> Any:
        return self.items[i]

    def __len__(self) -> int:
        return len(self.items)


@pytest.mark.parametrize("betas", [(0.5, 0.9), [0.5, 0.9], ListConfig(0.5, 0.9)])
def test_betas_may_be_any_sequence(betas: Any) -> None:
    p = nn.Parameter(torch.ones(2))
    optimizers = [optim.Adam([p], betas=betas), optim.Adam([{"params": [p], "betas": betas}])]
    optimizers += [optim.Optimizer([p], ps.adam(betas=betas)), optim.Adam([p])]
    optimizers[-1].param_groups[0]["betas"] = betas
    for optimizer in optimizers:
        p.grad = torch.ones(2)
        optimizer.step()
        assert tuple(optimizer.param_groups[0]["betas"]) == (0.5, 0.9)
        assert optimizer.state[p]["exp_avg"].tolist() == [0.5, 0.5]
    assert ps.schedules.join((0.1, 0.2), boundaries=ListConfig(3))(4) == 0.2  # type: ignore[arg-type]


def test_what_is_no_sequence_of_two_numbers_is_refused_with_its_reason() -> None:
    p = nn.Parameter(torch.ones(2))
    for betas, reason in (
        (ListConfig(0.5), "2 numbers, but got"),
        ("ab", "2 numbers, but got 'ab'"),
        (0.9, "2 numbers, but got 0.9"),
        (ListConfig(0.5, 2.0), r"betas\[1\] must be a number in \[0, 1\)"),
        (ListConfig(0.5, "x"), r"betas\[1\] must be a number"),
    ):
        with pytest.raises((ValueError, TypeError), match=reason):
            optim.Adam([p], betas=betas)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name", ["SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "Adamax", "NAdam", "RAdam", "Adadelta", "ASGD", "Rprop"]
)
def test_a_learning_rate_of_several_elements_is_refused_in_torchs_words(name: str) -> None:
    p = nn.Parameter(torch.ones(2))
    for namespace in (torch.optim, optim):
        with pytest.raises(ValueError, match="Tensor lr must be 1-element"):
            getattr(namespace, name)([p], lr=torch.ones(2))


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad"])
def test_fused_is_refused_on_meta_parameters(name: str) -> None:
    for namespace in (torch.optim, optim):
        p = nn.Parameter(torch.ones(2, device="meta"))
        optimizer = getattr(namespace, name)([p], lr=0.1, fused=True)
        p.grad = torch.ones(2, device="meta")
        with pytest.raises(
            RuntimeError, match="`fused=True` requires all the params to be floating point Tensors of supported"
        ):
            optimizer.step()


# ------------------------------------------------------------------------------------------------------ options of torch 2.14


@pytest.mark.parametrize("shape", [(4, 3), (3, 4), (3, 3)])
def test_the_spectral_norm_of_muon_may_fall_below_1(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    p, g = torch.zeros(shape), torch.randn(shape)
    plain, found = (ps.muon(0.1, adjust_lr_fn=name) for name in ("original", "spectral_unclamped"))
    (u, _), (v, _) = (opt.update(g, opt.init_state(p), p) for opt in (plain, found))
    torch.testing.assert_close(v, u * (shape[0] / shape[1]) ** 0.5 / max(1.0, shape[0] / shape[1]) ** 0.5)
    with pytest.raises(ValueError, match="'spectral_unclamped', but got 'x'"):
        ps.muon(adjust_lr_fn="x")
    q = nn.Parameter(torch.zeros(shape))
    q.grad = g
    optim.Muon([q], lr=0.1, weight_decay=0.0, adjust_lr_fn="spectral_unclamped").step()
    torch.testing.assert_close(q.detach(), v)


@pytest.mark.parametrize("wolfe", [False, True])
def test_lbfgs_climbs(wolfe: bool) -> None:
    search = "strong_wolfe" if wolfe else None
    p = nn.Parameter(torch.tensor([-1.2, 1.0], dtype=torch.float64))
    transform = ps.lbfgs(1.0 if wolfe else 0.1, 9, line_search_fn=search, maximize=True)
    optimizer = optim.Optimizer([p], transform)
    q, down = start(optim, wolfe)
    minimized = Closure(q, down)

    def closure() -> Tensor:
        optimizer.zero_grad()
        height = -valley(p)
        height.backward()
        return height

    for _ in range(4):
        assert optimizer.step(closure).item() == -down.step(minimized).item()  # type: ignore[attr-defined]
        assert p.tolist() == q.tolist()
    assert float(optimizer.shared["prev_loss"]) == float(down.state[q]["prev_loss"])  # what is minimized
    with pytest.raises(ValueError, match="Give maximize=True to the transform"):
        optim.Optimizer([p], ps.lbfgs(), maximize=True)


def test_signatures_are_those_of_the_installed_torch() -> None:
    def ours(self: Any, params: Any, lr: float = 1, *, maximize: bool = False, compile: bool = False) -> None: ...
    def old(params: Any, lr: float = 1) -> None: ...
    def new(params: Any, lr: float = 1, *, maximize: bool = False) -> None: ...

    signature = inspect.signature(ours)
    assert list(mirrored(signature, old).parameters) == ["self", "params", "lr", "compile"]
    assert mirrored(signature, new) == mirrored(signature, None) == signature
    theirs = inspect.signature(torch.optim.LBFGS)
    assert list(inspect.signature(optim.LBFGS).parameters) == list(theirs.parameters)
    if "maximize" not in theirs.parameters:
        with pytest.raises(TypeError, match="maximize"):
            optim.LBFGS([nn.Parameter(torch.ones(2))], maximize=True)
        assert "maximize" not in optim.LBFGS([nn.Parameter(torch.ones(2))]).param_groups[0]


# ----------------------------------------------------------------------------------------------------------------- compiled


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop"])
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.in_turn("as_tensor")
def test_a_compiled_step_under_a_scheduler_makes_as_many_graphs_as_torchs(name: str, as_tensor: bool) -> None:
    """Two: one for the number that it first sees, one for all others. From the second step on: the first one makes state."""
    counts, values = [], []
    for namespace in (torch.optim, optim):
        torch._dynamo.reset()
        counter = CompileCounter()
        params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]
        flags: Any = {"capturable": True} if as_tensor and name != "SGD" and namespace is torch.optim else {}
        if flags:
            pytest.skip("torch takes such a tensor on accelerators only")
        lr = torch.tensor(0.1) if as_tensor else 0.1
        optimizer = getattr(namespace, name)(params, lr=lr, foreach=True, **({"momentum": 0.9} if name == "SGD" else {}))
        scheduler = lr_scheduler.ExponentialLR(optimizer, 0.9)
        step = torch.compile(optimizer.step, backend=counter)
        for i in range(6):
            for p in params:
                p.grad = torch.full_like(p, 1.0 + i)
            step() if i else optimizer.step()
            scheduler.step()
        counts.append(counter.frame_count)
        values.append([p.detach() for p in params])
    torch.testing.assert_close(*values)
    assert counts[1] <= counts[0] <= 2
