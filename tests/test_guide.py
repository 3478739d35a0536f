"""How PyTorch's documentation says to use an optimizer, with one import changed: `from purestep import optim`.

A usage is a function of the namespace. It runs in `torch.optim` and in `purestep.optim`, and what it returns must agree.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import inspect
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import mse_loss
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from purestep import optim
from tests.cases import CLASSES, Options
from tests.problems import difference

Batch = tuple[Tensor, Tensor]

# --------------------------------------------------------------------------------------------------- what a class can train


def features(g: torch.Generator) -> Tensor:
    return torch.randn(5, 3, generator=g, dtype=torch.float64)


def tokens(g: torch.Generator) -> Tensor:
    return torch.randint(0, 7, (5,), generator=g)


@dataclasses.dataclass(frozen=True)
class Subject:
    """What a class is given to train, and what it lacks."""

    layer: Callable[[], nn.Module] = lambda: nn.Linear(3, 4)
    inputs: Callable[[torch.Generator], Tensor] = features
    options: Options = dataclasses.field(default_factory=lambda: {"lr": 0.05})
    one_batch: bool = False
    """Whether its steps are all on the same data."""
    lacks: dict[str, str] = dataclasses.field(default_factory=dict)
    """Capability -> reason; in torch as here."""


SUBJECTS = {
    "Adadelta": Subject(options={"lr": 1.0}),
    "LBFGS": Subject(
        options={"lr": 0.1, "max_iter": 3},
        one_batch=True,  # its history is one function's: on other data it diverges, and with it every rounding error
        lacks={
            "groups": "L-BFGS sees all parameters as one vector, with one set of options",
            "own state": "the state is of all parameters together, so that it cannot be moved from one to another",
            "plain step": "every step evaluates the loss several times, and needs a closure",
        },
    ),
    "Muon": Subject(layer=lambda: nn.Linear(3, 4, bias=False)),
    "Rprop": Subject(options={"lr": 0.01}),
    "SGD": Subject(options={"lr": 0.05, "momentum": 0.9}),
    "SparseAdam": Subject(layer=lambda: nn.Embedding(7, 4, sparse=True), inputs=tokens),
}
"""By the class's name; the others train `Subject()`."""


def subject(cls: str) -> Subject:
    return SUBJECTS.get(cls, Subject())


def each_class(*needs: str, option: str = "lr") -> pytest.MarkDecorator:
    """Parametrize over every class with this option; those that lack a capability are skipped with their reason."""

    def mark(cls: str) -> Any:
        reasons = [f"{cls}: {subject(cls).lacks[need]}" for need in needs if need in subject(cls).lacks]
        return pytest.param(cls, marks=pytest.mark.skip(reason=reasons[0]) if reasons else ())

    having = [cls for cls in CLASSES if option in inspect.signature(getattr(torch.optim, cls)).parameters]
    return pytest.mark.parametrize("cls", [mark(cls) for cls in having])


def test_subjects_are_classes_of_torch() -> None:
    assert all(issubclass(getattr(torch.optim, name), torch.optim.Optimizer) for name in SUBJECTS)


class Model(nn.Module):
    """Layers side by side, so that any of them can be left out, frozen or be a group."""

    def __init__(self, cls: str, *names: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name in names or ("base", "classifier"):
            self.add_module(name, subject(cls).layer())
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return sum((k + 1) * torch.tanh(layer(x)) for k, layer in enumerate(self.children()))  # type: ignore[return-value]


def dataset(cls: str, start: int = 0, stop: int = 6) -> list[Batch]:
    """Batches number `start` to `stop`."""
    batches = []
    for k in range(start, stop):
        g = torch.Generator().manual_seed(0 if subject(cls).one_batch else k)
        batches.append((subject(cls).inputs(g), torch.randn(5, 4, generator=g, dtype=torch.float64) / 2))
    return batches


def closure_of(model: nn.Module, optimizer: Any, batch: Batch) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = mse_loss(model(batch[0]), batch[1])
        loss.backward()
        return loss

    return closure


def fit(model: nn.Module, optimizer: Any, batches: list[Batch]) -> list[Tensor]:
    """Train, in the one way that every class can; the losses."""
    return [optimizer.step(closure_of(model, optimizer, batch)).detach() for batch in batches]


def make(namespace: Any, cls: str, params: Any, **options: Any) -> Any:
    return getattr(namespace, cls)(params, **{**subject(cls).options, **options})


def weights(*models: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for model in models for p in model.parameters()]


CONSTANTS = {"AdamW": ("decoupled_weight_decay",)}
"""What is in torch's groups but not in its signature: its AdamW is its Adam with this option, which must stay True."""


def options_of(optimizer: Any) -> list[Options]:
    return [by_name(optimizer, group) for group in optimizer.param_groups]


def by_name(optimizer: Any, options: Options) -> Options:
    without = ("params", *CONSTANTS.get(type(optimizer).__name__, ()))
    return {name: x for name, x in sorted(options.items()) if name not in without}


def agree(usage: Callable[..., Any], *args: Any) -> None:
    """One usage in both namespaces."""
    assert difference(usage(optim, *args), usage(torch.optim, *args)) <= 1e-10


def test_the_namespace_has_torchs_names() -> None:
    """All but the classes, which `CLASSES` lists."""
    names = {name for name in torch.optim.__all__ if not inspect.isclass(getattr(torch.optim, name))}
    assert names <= set(dir(optim))


# ------------------------------------------------------------------------------------------------------------- constructing


CONSTRUCTIONS: dict[str, Callable[[Model], Any]] = {
    "parameters()": lambda m: m.parameters(),
    "list": lambda m: list(m.parameters()),
    "generator": lambda m: (p for p in m.parameters()),
    "named_parameters()": lambda m: m.named_parameters(),
    "pairs": lambda m: [(f"layer{i}", p) for i, p in enumerate(m.parameters())],
    "group": lambda m: [{"params": m.parameters()}],
    "named group": lambda m: [{"params": m.named_parameters()}],
    "group of one tensor": lambda m: [{"params": m.get_parameter("base.weight")}],
}


@each_class()
@pytest.mark.parametrize("params", CONSTRUCTIONS.values(), ids=CONSTRUCTIONS)
def test_constructing(cls: str, params: Callable[[Model], Any]) -> None:
    def usage(namespace: Any) -> Any:
        model = Model(cls)
        optimizer = make(namespace, cls, params(model))
        return (
            options_of(optimizer),
            by_name(optimizer, optimizer.defaults),
            fit(model, optimizer, dataset(cls)),
            weights(model),
        )

    agree(usage)


def by_layer(model: Model, named: bool) -> list[Any]:
    layers = [model.get_submodule("base"), model.get_submodule("classifier")]
    return [layer.named_parameters() if named else layer.parameters() for layer in layers]


@each_class("groups")
@pytest.mark.parametrize("named", [False, True], ids=["", "named"])
def test_a_learning_rate_for_each_layer(cls: str, named: bool) -> None:
    def usage(namespace: Any) -> Any:
        model = Model(cls)
        base, classifier = by_layer(model, named)
        optimizer = make(namespace, cls, [{"params": base, "lr": 1e-2}, {"params": classifier}], lr=1e-3)
        assert [g["lr"] for g in optimizer.param_groups] == [1e-2, 1e-3]
        return options_of(optimizer), fit(model, optimizer, dataset(cls)), weights(model)

    agree(usage)


@each_class("groups", option="weight_decay")
@pytest.mark.parametrize("spared", ["bias", "classifier"])
def test_no_weight_decay_for_some_names(cls: str, spared: str) -> None:
    """Among matrices alone no name has a bias in it: that group is empty."""

    def usage(namespace: Any) -> Any:
        model = Model(cls)
        spared_params = [p for name, p in model.named_parameters() if spared in name]
        others = [p for name, p in model.named_parameters() if spared not in name]
        groups = [{"params": others}, {"params": spared_params, "weight_decay": 0}]
        optimizer = make(namespace, cls, groups, weight_decay=0.1)
        return options_of(optimizer), fit(model, optimizer, dataset(cls)), weights(model)

    agree(usage)


@each_class("groups")
def test_options_can_be_changed_at_any_time(cls: str) -> None:
    def usage(namespace: Any) -> Any:
        model = Model(cls)
        optimizer = make(namespace, cls, [{"params": params} for params in by_layer(model, False)])
        losses = fit(model, optimizer, dataset(cls))
        optimizer.param_groups[1]["lr"] *= 0.1
        return losses, fit(model, optimizer, dataset(cls, 6, 10)), weights(model)

    agree(usage)


@each_class("groups")
@pytest.mark.parametrize("named", [False, True], ids=["", "named"])
def test_layers_that_thaw_are_added(cls: str, named: bool) -> None:
    def usage(namespace: Any) -> Any:
        model = Model(cls)
        base, classifier = by_layer(model, named)
        model.get_submodule("base").requires_grad_(False)
        optimizer = make(namespace, cls, classifier)
        losses = fit(model, optimizer, dataset(cls))
        model.get_submodule("base").requires_grad_(True)
        optimizer.add_param_group({"params": base, "lr": 0.01})
        return options_of(optimizer), losses, fit(model, optimizer, dataset(cls, 6, 10)), weights(model)

    agree(usage)


@pytest.mark.parametrize("cls", [cls for cls in CLASSES if "groups" in subject(cls).lacks])
def test_a_class_without_groups_says_so(cls: str) -> None:
    def usage(namespace: Any) -> Any:
        with pytest.raises(ValueError, match=r"parameter groups|per-parameter options"):
            make(namespace, cls, [{"params": params} for params in by_layer(Model(cls), False)])

    agree(usage)


# ----------------------------------------------------------------------------------------------------------- taking a step


@each_class("plain step")
def test_step(cls: str) -> None:
    def usage(namespace: Any) -> Any:
        model = Model(cls)
        optimizer = make(namespace, cls, model.parameters())
        losses = []
        for x, target in dataset(cls):
            optimizer.zero_grad()
            loss = mse_loss(model(x), target)
            loss.backward()
            assert optimizer.step() is None
            losses.append(loss.detach())
        return losses, weights(model)

    agree(usage)


@each_class()
@pytest.mark.parametrize("how", [lambda o, c: o.step(c), lambda o, c: o.step(closure=c)], ids=["positional", "keyword"])
def test_step_with_a_closure(cls: str, how: Callable[[Any, Any], Any]) -> None:
    """It returns the first loss, the closure's own tensor; the closure runs with gradients, whatever surrounds the step."""

    def usage(namespace: Any) -> Any:
        model = Model(cls)
        optimizer = make(namespace, cls, model.parameters())
        seen = []
        for batch in dataset(cls):
            evaluate, results = closure_of(model, optimizer, batch), []

            def closure(evaluate: Any = evaluate, results: Any = results) -> Tensor:
                results.append(evaluate())
                return results[-1]

            with torch.no_grad():
                assert how(optimizer, closure) is results[0]
            seen.append([loss.detach() for loss in results])
        return seen, weights(model)

    agree(usage)


@pytest.mark.parametrize("cls", [cls for cls in CLASSES if "plain step" in subject(cls).lacks])
def test_a_class_that_needs_a_closure_says_so(cls: str) -> None:
    for namespace in (torch.optim, optim):
        with pytest.raises(TypeError, match="closure"):
            make(namespace, cls, Model(cls).parameters()).step()


LINE_SEARCHES = [cls for cls in CLASSES if "line_search_fn" in inspect.signature(getattr(torch.optim, cls)).parameters]


@pytest.mark.parametrize("cls", LINE_SEARCHES)
@pytest.mark.parametrize("line_search_fn", [None, "strong_wolfe"], ids=str)
def test_a_closure_evaluated_many_times(cls: str, line_search_fn: str | None) -> None:
    """With the default numbers of iterations and evaluations."""

    def usage(namespace: Any) -> Any:
        model = Model(cls)
        optimizer = getattr(namespace, cls)(model.parameters(), line_search_fn=line_search_fn)
        calls = []
        (batch,) = dataset(cls, 0, 1)
        evaluate = closure_of(model, optimizer, batch)

        def closure() -> Tensor:
            calls.append(1)
            return evaluate()

        losses = [optimizer.step(closure).detach() for _ in range(2)]
        return len(calls), losses, weights(model)

    agree(usage)


PAIRS = [("Muon", "AdamW"), ("Adam", "SGD")]


@pytest.mark.parametrize(("first", "second"), [pair for pair in PAIRS if set(pair) <= set(CLASSES)])
def test_one_optimizer_for_the_matrices_and_one_for_the_rest(first: str, second: str) -> None:
    def usage(namespace: Any) -> Any:
        model = Model(second)
        matrices = make(namespace, first, [p for p in model.parameters() if p.ndim == 2])
        rest = make(namespace, second, [p for p in model.parameters() if p.ndim != 2])
        losses = []
        for x, target in dataset(second):
            matrices.zero_grad()
            rest.zero_grad()
            loss = mse_loss(model(x), target)
            loss.backward()
            matrices.step()
            rest.step()
            losses.append(loss.detach())
        return losses, weights(model)

    agree(usage)


# --------------------------------------------------------------------------------------------------------------- zero_grad


@each_class("plain step")
@pytest.mark.parametrize("kwargs", [{}, {"set_to_none": True}, {"set_to_none": False}], ids=["", "to None", "to zero"])
def test_zero_grad(cls: str, kwargs: dict[str, bool]) -> None:
    """A parameter that gets no gradient is skipped if it was None, and makes a step with a gradient of 0 if it was set to 0."""

    def usage(namespace: Any) -> Any:
        model = Model(cls)
        optimizer = make(namespace, cls, model.parameters())
        gradients = []
        for k, (x, target) in enumerate(dataset(cls)):
            optimizer.zero_grad(**kwargs)
            gradients += [p.grad if p.grad is None else p.grad.to_dense().clone() for p in model.parameters()]
            output = model(x) if k % 2 == 0 else torch.tanh(model.get_submodule("base")(x))
            mse_loss(output, target).backward()
            optimizer.step()
        return gradients, weights(model)

    agree(usage)


@each_class("plain step")
def test_gradients_accumulate(cls: str) -> None:
    def usage(namespace: Any) -> Any:
        model = Model(cls)
        optimizer = make(namespace, cls, model.parameters())
        for k, (x, target) in enumerate(dataset(cls, 0, 8)):
            (mse_loss(model(x), target) / 2).backward()
            if k % 2:
                optimizer.step()
                optimizer.zero_grad()
        return weights(model)

    agree(usage)


# ------------------------------------------------------------------------------------------------------------------- hooks


def logger(log: list[Any], name: str) -> Callable[..., None]:
    """A hook that notes what it was called with: the optimizer, then anything."""

    def hook(optimizer: Any, *args: Any) -> None:
        assert isinstance(optimizer, torch.optim.Optimizer)
        log.append((name, [describe(optimizer, x) for x in args]))

    return hook


def describe(optimizer: Any, x: Any) -> Any:
    if isinstance(x, tuple):
        return [describe(optimizer, y) for y in x]
    if isinstance(x, dict):
        return sorted(x)
    return "self" if x is optimizer else callable(x)


@each_class()
def test_step_hooks(cls: str) -> None:
    def usage(namespace: Any) -> Any:
        log: list[Any] = []
        model = Model(cls)
        optimizer = make(namespace, cls, model.parameters())
        handles = [
            optimizer.register_step_post_hook(logger(log, "post")),
            optimizer.register_step_pre_hook(logger(log, "pre 1")),
            optimizer.register_step_pre_hook(logger(log, "pre 2")),
        ]
        closure = closure_of(model, optimizer, dataset(cls)[0])
        optimizer.step(closure)
        optimizer.step(closure=closure)
        handles[1].remove()
        optimizer.step(closure)
        for handle in handles:
            handle.remove()
        optimizer.step(closure)
        assert [name for name, _ in log] == 2 * ["pre 1", "pre 2", "post"] + ["pre 2", "post"]
        return log, weights(model)

    agree(usage)


@each_class()
def test_a_step_hook_changes_the_arguments(cls: str) -> None:
    """The next hooks, and the step, get what it returns."""

    def usage(namespace: Any) -> Any:
        log: list[Any] = []
        model = Model(cls)
        optimizer = make(namespace, cls, model.parameters())

        def change(optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            assert args[0] is optimizer

            def doubled() -> Tensor:
                loss = args[1]()
                with torch.no_grad():
                    for p in model.parameters():
                        p.grad = None if p.grad is None else p.grad * 2
                return 2 * loss

            return (optimizer,), {**kwargs, "closure": doubled}

        optimizer.register_step_pre_hook(change)
        optimizer.register_step_pre_hook(logger(log, "pre"))
        optimizer.register_step_post_hook(logger(log, "post"))
        losses = fit(model, optimizer, dataset(cls))
        plain = Model(cls)
        assert losses[0] == 2 * fit(plain, make(namespace, cls, plain.parameters()), dataset(cls, 0, 1))[0]
        return log, losses, weights(model)

    agree(usage)


@each_class()
def test_global_step_hooks(cls: str) -> None:
    """They surround the hooks of each optimizer, of every class."""

    def usage(namespace: Any) -> Any:
        log: list[Any] = []
        models = [Model(cls), Model(cls)]
        optimizers = [make(namespace, cls, model.parameters()) for model in models]
        optimizers[0].register_step_pre_hook(logger(log, "own pre"))
        optimizers[0].register_step_post_hook(logger(log, "own post"))
        handles = [
            register_optimizer_step_pre_hook(logger(log, "global pre")),
            register_optimizer_step_post_hook(logger(log, "global post")),
        ]
        try:
            for model, optimizer in zip(models, optimizers):
                fit(model, optimizer, dataset(cls, 0, 2))
        finally:
            for handle in handles:
                handle.remove()
        fit(models[1], optimizers[1], dataset(cls, 2, 3))
        own = ["global pre", "own pre", "own post", "global post"]
        assert [name for name, _ in log] == own + own + 2 * ["global pre", "global post"]
        return log

    agree(usage)


@each_class()
def test_state_dict_hooks(cls: str) -> None:
    """In the order in which they were registered, or before all the others."""

    def usage(namespace: Any) -> Any:
        log: list[Any] = []
        model = Model(cls)
        optimizer = make(namespace, cls, model.parameters())
        fit(model, optimizer, dataset(cls))

        def annotate(optimizer: Any, state_dict: dict[str, Any]) -> None:
            state_dict["note"] = "in place"

        def replace(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
            return {**state_dict, "more": 1}

        def prepare(optimizer: Any) -> None:
            optimizer.param_groups[0]["prepared"] = True

        optimizer.register_state_dict_pre_hook(logger(log, "pre"))
        optimizer.register_state_dict_pre_hook(prepare)
        optimizer.register_state_dict_pre_hook(logger(log, "pre first"), prepend=True)
        optimizer.register_state_dict_post_hook(replace)
        optimizer.register_state_dict_post_hook(logger(log, "post"))
        optimizer.register_state_dict_post_hook(annotate, prepend=True)
        optimizer.register_state_dict_post_hook(logger(log, "post first"), prepend=True)
        state_dict = optimizer.state_dict()
        assert sorted(state_dict) == ["more", "note", "param_groups", "state"]
        assert state_dict["param_groups"][0]["prepared"]
        saved = [by_name(optimizer, group) for group in state_dict["param_groups"]]
        return log, {**state_dict, "state": None, "param_groups": saved}

    agree(usage)


@each_class()
def test_load_state_dict_hooks(cls: str) -> None:
    """A hook before loading may return another state dict; a hook after it sees what was loaded. The argument stays as it was."""

    def usage(namespace: Any) -> Any:
        log: list[Any] = []
        models = [Model(cls), Model(cls)]
        first, second = (make(namespace, cls, model.parameters()) for model in models)
        fit(models[0], first, dataset(cls))
        models[1].load_state_dict(models[0].state_dict())

        def halve(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
            groups = [{**group, "lr": group["lr"] / 2} for group in state_dict["param_groups"]]
            return {**state_dict, "param_groups": groups}

        def annotate(optimizer: Any, state_dict: dict[str, Any]) -> None:
            state_dict["note"] = "in a shallow copy"

        def after(optimizer: Any) -> None:
            log.append(("lr", optimizer.param_groups[0]["lr"]))
            optimizer.param_groups[0]["lr"] *= 0.8

        second.register_load_state_dict_pre_hook(halve)
        second.register_load_state_dict_pre_hook(logger(log, "pre"))
        second.register_load_state_dict_pre_hook(annotate, prepend=True)
        second.register_load_state_dict_pre_hook(logger(log, "pre first"), prepend=True)
        second.register_load_state_dict_post_hook(after)
        second.register_load_state_dict_post_hook(logger(log, "post first"), prepend=True)
        state_dict = first.state_dict()
        second.load_state_dict(state_dict)
        assert "note" not in state_dict
        assert [name for name, _ in log] == ["pre first", "pre", "post first", "lr"]
        return log, fit(models[1], second, dataset(cls, 6, 10)), weights(models[1])

    agree(usage)


# ------------------------------------------------------------------------------- loading by name, for a model that has changed


Hook = Callable[[Any, dict[str, Any]], dict[str, Any]]


def adapt_state_dict_ids(lookup: Callable[[str], str | None]) -> Hook:
    """The documentation's hook: its own state dict, with the loaded options, and the loaded state of the names looked up."""

    def hook(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        adapted = copy.deepcopy(optimizer.state_dict())
        for group, loaded in zip(adapted["param_groups"], state_dict["param_groups"]):
            group.update({k: v for k, v in loaded.items() if k not in ("params", "param_names")})
            ids = dict(zip(loaded["param_names"], loaded["params"]))
            for param_id, name in zip(group["params"], group["param_names"]):
                source = ids.get(lookup(name))
                if source in state_dict["state"]:
                    adapted["state"][param_id] = copy.deepcopy(state_dict["state"][source])
        return adapted

    return hook


CHANGED: dict[str, tuple[tuple[str, ...], tuple[str, ...], Callable[[str], str | None]]] = {
    "duplicated": (("fc",), ("fc1", "fc2"), lambda name: name.replace("fc1", "fc").replace("fc2", "fc")),
    "added": (("fc",), ("fc", "bypass"), lambda name: None if "bypass" in name else name),
    "left out": (("fc", "skipped"), ("fc",), lambda name: name),
    "another order": (("one", "two", "three"), ("three", "one", "two"), lambda name: name),
    "renamed": (("one", "two"), ("encoder", "two"), lambda name: name.replace("encoder", "one")),
}


@each_class("own state")
@pytest.mark.parametrize(("old", "new", "lookup"), CHANGED.values(), ids=CHANGED)
def test_a_changed_model_resumes_by_names(cls: str, old: Any, new: Any, lookup: Any) -> None:
    """The options are the loaded ones too, for parameters that begin anew as well."""

    def usage(namespace: Any) -> Any:
        model = Model(cls, *old)
        optimizer = make(namespace, cls, model.named_parameters())
        optimizer.param_groups[0]["lr"] *= 0.4
        fit(model, optimizer, dataset(cls))
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)

        model2 = Model(cls, *new)
        optimizer2 = make(namespace, cls, model2.named_parameters())
        optimizer2.register_load_state_dict_pre_hook(adapt_state_dict_ids(lookup))
        optimizer2.load_state_dict(torch.load(file, weights_only=True))
        return options_of(optimizer2), fit(model2, optimizer2, dataset(cls, 6, 12)), weights(model2)

    agree(usage)


# ------------------------------------------------------------------------------------------------ the tutorials' other patterns


@each_class("plain step")
@pytest.mark.parametrize("foreach", [None, False], ids=str)
def test_a_step_in_the_backward_pass(cls: str, foreach: bool | None) -> None:
    """An optimizer for each parameter, run by a hook as soon as its gradient is there."""

    def usage(namespace: Any) -> Any:
        model = Model(cls)
        flags = {"foreach": foreach} if foreach is not None and accepts(cls, "foreach") else {}
        optimizers = {p: make(namespace, cls, [p], **flags) for p in model.parameters()}

        def hook(p: Tensor) -> None:
            optimizers[p].step()
            optimizers[p].zero_grad()

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(hook)
        losses = []
        for x, target in dataset(cls):
            loss = mse_loss(model(x), target)
            loss.backward()
            losses.append(loss.detach())
        assert all(p.grad is None for p in model.parameters())
        return losses, weights(model)

    agree(usage)


def accepts(cls: str, option: str) -> bool:
    return option in inspect.signature(getattr(torch.optim, cls)).parameters


@each_class("plain step")
@pytest.mark.parametrize("unscale", [False, True], ids=["", "unscaled"])
def test_gradient_scaling(cls: str, unscale: bool) -> None:
    """Steps with an overflow are left out. Scales are powers of 2, so that nothing is rounded."""

    def usage(namespace: Any) -> Any:
        model = Model(cls)
        optimizer = make(namespace, cls, model.parameters())
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=3)
        scales = []
        for k, (x, target) in enumerate(dataset(cls, 0, 10)):
            optimizer.zero_grad()
            loss = mse_loss(model(x), target) * (float("inf") if k == 4 else 1.0)
            scaler.scale(loss).backward()
            if unscale:
                scaler.unscale_(optimizer)
                with torch.no_grad():
                    for p in model.parameters():
                        p.grad = None if p.grad is None else p.grad * 0.5
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        assert scales[3:5] == [2.0**9, 2.0**8]
        return scales, weights(model)

    agree(usage)


@each_class("plain step")
def test_autocast_with_gradient_scaling(cls: str) -> None:
    """Weights in float32, the forward pass in bfloat16. Both models get torch's weights after each step, so that a difference
    in the last place is not rounded to one in bfloat16's.
    """
    models = [Model(cls).float(), Model(cls).float()]
    optimizers = [make(namespace, cls, model.parameters()) for namespace, model in zip((torch.optim, optim), models)]
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=3) for _ in models]
    for x, target in dataset(cls):
        for model, optimizer, scaler in zip(models, optimizers, scalers):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = mse_loss(model(x.float() if x.is_floating_point() else x).float(), target.float())
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        theirs, ours = (weights(model) for model in models)
        assert difference(ours, theirs) <= 2e-6
        models[1].load_state_dict(models[0].state_dict())


def swapped(namespace: Any, cls: str) -> tuple[Model, Any, list[Tensor], list[dict[str, Any]]]:
    """A model and its optimizer after three steps, and other parameters and state, swapped in for three steps more."""
    model = Model(cls)
    optimizer = make(namespace, cls, model.parameters())
    fit(model, optimizer, dataset(cls, 0, 3))
    before = weights(model)
    others = {name: (p.detach() + 0.1).requires_grad_() for name, p in model.named_parameters()}
    state_dict = copy.deepcopy(optimizer.state_dict())
    with torch.optim.swap_in_optimizer_params_and_state(optimizer, others, state_dict):
        for x, target in dataset(cls, 3, 6):
            loss = mse_loss(functional_call(model, others, (x,)), target)
            for p, g in zip(others.values(), torch.autograd.grad(loss, list(others.values()))):
                p.grad = g
            optimizer.step()
    assert difference(weights(model), before) == 0
    return model, optimizer, [p.detach() for p in others.values()], list(state_dict["state"].values())


@each_class("own state", "plain step")
def test_other_parameters_and_state_for_a_while(cls: str) -> None:
    """They are written to in place, and the optimizer's own are not touched."""

    def usage(namespace: Any) -> Any:
        model, optimizer, others, states = swapped(namespace, cls)
        moments = [{name: x for name, x in sorted(own.items()) if torch.is_tensor(x) and x.dim()} for own in states]
        return others, moments, fit(model, optimizer, dataset(cls, 3, 6)), weights(model)

    agree(usage)


@each_class("own state", "plain step")
def test_counters_of_another_state_are_written_to(cls: str) -> None:
    def usage(namespace: Any) -> Any:
        return [own["step"] for own in swapped(namespace, cls)[3]]

    if torch.is_tensor(swapped(torch.optim, cls)[3][0].get("step")):  # SparseAdam has ints there, SGD and Muon nothing
        agree(usage)
    else:
        assert all(x is None or x == 6 for x in [own.get("step") for own in swapped(optim, cls)[3]])


@pytest.mark.parametrize("cls", ["AdamW", "NAdam", "RMSprop"])
def test_a_recorded_step_runs_again_and_again(cls: str) -> None:
    """make_fx of a step on other parameters and state: the graph counts, as torch's does, in the state that it is given."""

    def usage(namespace: Any) -> Any:
        model = Model(cls)
        optimizer = make(namespace, cls, model.parameters(), foreach=False)
        fit(model, optimizer, dataset(cls, 0, 3))
        params = {name: p.detach().clone() for name, p in model.named_parameters()}
        grads = {name: torch.ones_like(p) for name, p in params.items()}
        state_dict = copy.deepcopy(optimizer.state_dict())

        def step(params: dict[str, Tensor], grads: dict[str, Tensor], state_dict: Any) -> Any:
            with torch.optim.swap_in_optimizer_params_and_state(optimizer, params, state_dict):
                for name, p in params.items():
                    p.grad = grads[name]
                optimizer.step()
            return list(params.values())

        def recorded(params: dict[str, Tensor], grads: dict[str, Tensor], state: Any) -> Any:
            return step(params, grads, {"state": state, "param_groups": state_dict["param_groups"]})

        if namespace is optim:
            recorded = make_fx(recorded)(copy.deepcopy(params), grads, copy.deepcopy(state_dict["state"]))
        for _ in range(5):
            recorded(params, grads, state_dict["state"])
        return params, [dict(sorted(own.items())) for own in state_dict["state"].values()]

    agree(usage)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
}


@each_class()
@pytest.mark.parametrize("twin", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("begun", [0, 4], ids=["at the beginning", "while training"])
def test_a_model_and_its_optimizer_copied_together(cls: str, twin: Callable[[Any], Any], begun: int) -> None:
    """Both then train as torch's do without having been copied (torch's L-BFGS cannot be)."""

    def straight(then: list[Batch]) -> Any:
        model = Model(cls)
        optimizer = make(torch.optim, cls, model.named_parameters())
        return fit(model, optimizer, dataset(cls, 0, begun) + then)[begun:], weights(model)

    model = Model(cls)
    optimizer = make(optim, cls, model.named_parameters())
    fit(model, optimizer, dataset(cls, 0, begun))
    before = options_of(optimizer)
    model2, optimizer2 = twin((model, optimizer))
    assert all(p is q for p, q in zip(optimizer2.param_groups[0]["params"], model2.parameters()))
    for m, o, then in [(model2, optimizer2, dataset(cls, 10, 14)), (model, optimizer, dataset(cls, 20, 24))]:
        assert difference((fit(m, o, then), weights(m)), straight(then)) <= 1e-10
        assert options_of(o) == before


ROUTES = {"from torch": (torch.optim, optim), "to torch": (optim, torch.optim), "here": (optim, optim)}


@each_class()
@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
def test_a_checkpoint(cls: str, route: tuple[Any, Any]) -> None:
    """Saved, and resumed in the same namespace or in the other one, as if nothing had happened.

    (torch makes counters other than `step` float64 when it loads them, so that its own run is not quite the uninterrupted one.)
    """

    def run(first: Any, second: Any) -> Any:
        model = Model(cls)
        optimizer = make(first, cls, model.parameters())
        fit(model, optimizer, dataset(cls, 0, 5))
        if second is None:
            return fit(model, optimizer, dataset(cls, 5, 10)), weights(model)
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.seek(0)

        model2 = Model(cls)
        optimizer2 = make(second, cls, model2.parameters(), lr=0.123)
        checkpoint = torch.load(file, weights_only=True)
        model2.load_state_dict(checkpoint["model"])
        optimizer2.load_state_dict(checkpoint["optimizer"])
        return fit(model2, optimizer2, dataset(cls, 5, 10)), weights(model2)

    expected = run(torch.optim, torch.optim if route[1] is torch.optim else None)
    assert difference(run(*route), expected) <= 1e-10


@each_class()
def test_repr(cls: str) -> None:
    """A line for each option, in the order of their names."""

    def usage(namespace: Any) -> Any:
        optimizer = make(namespace, cls, Model(cls).named_parameters())
        first, second, *lines, last = repr(optimizer).splitlines()
        shown = {name.strip(): ast.literal_eval(x) for name, x in (line.split(": ", 1) for line in lines)}
        assert list(shown) == sorted(shown)
        return first, second, by_name(optimizer, shown), last

    agree(usage)


@each_class()
def test_it_is_a_torch_optimizer(cls: str) -> None:
    """Libraries ask for one with isinstance."""
    optimizer = make(optim, cls, Model(cls).parameters())
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert isinstance(optimizer, optim.Optimizer)
    assert type(optimizer).__name__ == cls
    assert not isinstance(optimizer, getattr(torch.optim, cls))


def subclasses(cls: str) -> Iterator[Any]:
    """A user's subclass of each namespace's class, with a step that does something more."""
    for namespace in (torch.optim, optim):
        base: Any = getattr(namespace, cls)

        class Counting(base):  # type: ignore[misc]
            steps = 0

            def step(self, closure: Any = None) -> Any:
                self.steps += 1
                return super().step(closure)

        yield Counting


@each_class()
def test_a_subclass(cls: str) -> None:
    """Hooks run around its own step, once."""
    results = []
    for counting in subclasses(cls):
        log: list[Any] = []
        model = Model(cls)
        optimizer = counting(model.parameters(), **subject(cls).options)
        optimizer.register_step_pre_hook(lambda o, args, kwargs, log=log: log.append(o.steps))
        optimizer.register_step_post_hook(lambda o, args, kwargs, log=log: log.append(o.steps))
        fit(model, optimizer, dataset(cls, 0, 3))
        results.append((log, optimizer.steps, weights(model)))
    assert difference(results[1], results[0]) <= 1e-10
