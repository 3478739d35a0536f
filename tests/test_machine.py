"""Generated runs of the classes of `purestep.optim`, with torch's classes as the model.

A run is a sequence of what people do to an optimizer: steps, closures, checkpoints in every direction, copies, schedulers, options
that change, memory that is laid out anew, state that is edited, parameters that come and go. After every step the parameters
and what both keep in their state must be torch's.

`PURESTEP_EXAMPLES=k` makes k times as many runs as the test command does; `PURESTEP_SEED` begins elsewhere.
"""

from __future__ import annotations

import copy
import inspect
import io
import os
import pickle
from typing import Any

import hypothesis
import hypothesis.strategies as st
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from torch import Tensor, nn

from purestep import optim

EXAMPLES = int(os.environ.get("PURESTEP_EXAMPLES", "1"))
SIDES = (torch.optim, optim)
TOLERANCE = 1e-8

CLASSES: dict[str, list[dict[str, Any]]] = {
    "SGD": [{"lr": 0.1}, {"lr": 0.1, "momentum": 0.9}, {"lr": 0.1, "momentum": 0.5, "dampening": 0.3, "weight_decay": 0.1}],
    "Adam": [{"lr": 0.01}, {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1}],
    "AdamW": [{"lr": 0.01}, {"lr": 0.01, "amsgrad": True, "maximize": True}],
    "NAdam": [{"lr": 0.01}, {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True}],
    "RAdam": [{"lr": 0.01}, {"lr": 0.01, "weight_decay": 0.1}],
    "Adamax": [{"lr": 0.01}, {"lr": 0.01, "weight_decay": 0.1}],
    "Adagrad": [{"lr": 0.1}, {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.2}],
    "Adadelta": [{"lr": 1.0}, {"lr": 1.0, "weight_decay": 0.1}],
    "RMSprop": [{"lr": 0.01}, {"lr": 0.01, "centered": True, "momentum": 0.9, "weight_decay": 0.1}],
    "Rprop": [{"lr": 0.01}],
    "ASGD": [{"lr": 0.1}, {"lr": 0.1, "t0": 3.0, "weight_decay": 0.1}],
    "Adafactor": [{"lr": 0.01}],
}
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "few": [(3, 2), (4,), ()],
    "many": [(3, 2), (4,), (2, 2, 2), (1,)] * 5,
    "mixed": [(300, 250), (3,), (70, 60)],
}
FLAGS: list[dict[str, Any]] = [{}, {}, {}, {"foreach": True}, {"foreach": False}]
seeds = st.integers(0, 2**16)


def random(shape: Any, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LAYOUTS = ["contiguous", "transposed", "strided", "expanded"]


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers (of the first column, where they are expanded) in another layout."""
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1) if x.dim() > 1 else x.clone()
    if layout == "strided":
        return torch.stack([x, x], -1)[..., 0]
    if layout == "expanded":
        return x[..., :1].expand(x.shape) if x.dim() else x.clone()
    return x.clone()


class Machine(RuleBasedStateMachine):
    """Two optimizers, torch's and ours, to which the same is done."""

    @initialize(
        name=st.sampled_from(sorted(CLASSES)), which=st.integers(0, 2), shapes=st.sampled_from(["few", "few", "many", "many", "mixed"]),
        flags=st.sampled_from(FLAGS), seed=seeds, late=st.booleans(),
    )  # fmt: skip
    def begin(self, name: str, which: int, shapes: str, flags: dict[str, Any], seed: int, late: bool) -> None:
        torch.manual_seed(0)
        self.name, self.shapes, self.flags = name, shapes, flags
        self.options = CLASSES[name][which % len(CLASSES[name])]
        self.params = [[nn.Parameter(random(s, seed + k)) for k, s in enumerate(SHAPES[shapes])] for _ in SIDES]
        self.optimizers = [self.made(side, own) for side, own in zip(SIDES, self.params)]
        self.schedulers: list[Any] = []
        self.stepped = False

    def made(self, side: Any, params: list[Tensor]) -> Any:
        flags = self.flags if side is optim else {"foreach": False}
        return getattr(side, self.name)(params, **self.options, **flags)

    def both(self) -> zip[tuple[Any, list[Tensor]]]:
        return zip(self.optimizers, self.params)

    # -- gradients and steps

    def give(self, seed: int, missing: int = -1, layout: str = "contiguous") -> None:
        for _, own in self.both():
            for k, p in enumerate(own):
                p.grad = None if k == missing % len(own) and missing >= 0 else laid_out(random(p.shape, seed + k), layout)
                if not p.requires_grad:
                    p.grad = None

    @property
    def tolerance(self) -> float:
        """torch's ASGD rounds eta to float32, until it has loaded a state, which makes it a float64."""
        return 1e-6 if self.name == "ASGD" else TOLERANCE

    def check(self) -> None:
        (theirs, first), (ours, second) = self.both()
        for k, (p, q) in enumerate(zip(first, second)):
            torch.testing.assert_close(
                q, p, rtol=self.tolerance, atol=self.tolerance, equal_nan=True, msg=lambda m, k=k: f"parameter {k}: {m}"
            )
            mine = ours.state.get(q, {})
            for name, x in theirs.state.get(p, {}).items():
                if isinstance(x, Tensor) and isinstance(mine.get(name), Tensor):
                    torch.testing.assert_close(
                        mine[name].reshape(x.shape).to(x.dtype), x, rtol=self.tolerance, atol=self.tolerance, equal_nan=True,
                        msg=lambda m, k=k, name=name: f"{name} of parameter {k}: {m}",
                    )  # fmt: skip
        counters = [s["step"] for s in ours.state.values() if isinstance(s, dict) and isinstance(s.get("step"), Tensor)]
        assert len({x.data_ptr() for x in counters}) == len(counters)

    @rule(seed=seeds, times=st.integers(1, 4))
    def step(self, seed: int, times: int) -> None:
        for k in range(times):
            self.give(seed + 100 * k)
            for optimizer in self.optimizers:
                optimizer.step()
            self.check()
        self.stepped = True

    @rule(seed=seeds, missing=st.integers(0, 20))
    def step_without_a_gradient(self, seed: int, missing: int) -> None:
        self.give(seed, missing)
        for optimizer in self.optimizers:
            optimizer.step()
        self.check()
        self.stepped = True

    @rule(seed=seeds, layout=st.sampled_from(LAYOUTS))
    def step_with_a_layout(self, seed: int, layout: str) -> None:
        self.give(seed, layout=layout)
        for optimizer in self.optimizers:
            optimizer.step()
        self.check()
        self.stepped = True

    @rule(seed=seeds)
    def step_with_a_closure(self, seed: int) -> None:
        def closure(optimizer: Any, own: list[Tensor]) -> Any:
            def evaluate() -> Tensor:
                optimizer.zero_grad()
                loss = torch.stack([((p - random(p.shape, seed + k)) ** 2).sum() for k, p in enumerate(own)]).sum()
                loss.backward()
                return loss

            return evaluate

        if not any(p.requires_grad for p in self.params[0]):
            return
        losses = [optimizer.step(closure(optimizer, own)) for optimizer, own in self.both()]
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=1e-6)
        self.check()
        self.stepped = True

    @rule(to_none=st.booleans())
    def zero_grad(self, to_none: bool) -> None:
        for optimizer, own in self.both():
            optimizer.zero_grad(set_to_none=to_none)
            assert all(p.grad is None or not p.grad.any() for p in own)

    # -- options

    @rule(lr=st.sampled_from([0.0, 1e-3, 0.05]))
    def change_the_learning_rate(self, lr: float) -> None:
        if self.name in ("Rprop", "ASGD") and not self.stepped:  # torch reads it once
            return
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr

    @rule(lr=st.sampled_from([1e-3, 0.05]), edit=st.booleans())
    def a_tensor_as_learning_rate(self, lr: float, edit: bool) -> None:
        if self.flags.get("foreach") or self.name in ("Rprop", "ASGD", "Adafactor"):
            return
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                if edit and isinstance(group["lr"], Tensor):
                    group["lr"].fill_(lr)
                else:
                    group["lr"] = torch.tensor(lr, dtype=torch.float64)

    @rule(decay=st.sampled_from([0.0, 0.1]))
    def change_the_decay(self, decay: float) -> None:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                if "weight_decay" in group:
                    group["weight_decay"] = decay

    @rule(momentum=st.sampled_from([0.0, 0.5, 0.9]))
    def change_the_momentum(self, momentum: float) -> None:
        if self.name != "SGD" and not (self.options.get("momentum") and self.stepped):
            return  # torch's RMSprop makes its buffer at the first step or never
        states = [s for optimizer in self.optimizers for s in optimizer.state.values()]
        if self.name == "RMSprop" and momentum and any("momentum_buffer" not in s for s in states):
            return  # and fails later where it has none
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                if momentum or not group.get("nesterov"):
                    group["momentum"] = momentum

    @rule(maximize=st.booleans())
    def change_maximize(self, maximize: bool) -> None:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                if "maximize" in group:
                    group["maximize"] = maximize

    @rule(nesterov=st.booleans())
    def change_nesterov(self, nesterov: bool) -> None:
        if self.name != "SGD":
            return
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                if group["momentum"] and not group["dampening"]:
                    group["nesterov"] = nesterov

    @precondition(lambda self: not self.schedulers)
    @rule()
    def schedule(self) -> None:
        self.schedulers = [torch.optim.lr_scheduler.StepLR(o, step_size=2, gamma=0.7) for o in self.optimizers]

    @precondition(lambda self: bool(self.schedulers))
    @rule(seed=seeds)
    def step_and_scheduler(self, seed: int) -> None:
        self.step(seed, 1)
        for scheduler in self.schedulers:
            scheduler.step()

    # -- memory

    @rule(which=st.integers(0, 20), layout=st.sampled_from(LAYOUTS[:3]))
    def lay_a_parameter_out(self, which: int, layout: str) -> None:
        for _, own in self.both():
            p = own[which % len(own)]
            p.data = laid_out(p.data, layout)
            p.grad = None

    @rule(seed=seeds)
    def load_weights(self, seed: int) -> None:
        with torch.no_grad():
            for _, own in self.both():
                for k, p in enumerate(own):
                    p.copy_(random(p.shape, seed + k))

    @rule(which=st.integers(0, 20))
    def freeze(self, which: int) -> None:
        for _, own in self.both():
            p = own[which % len(own)]
            p.requires_grad_(not p.requires_grad)
            p.grad = None

    # -- state

    def states(self, which: int) -> list[dict[str, Any]]:
        """The states of one parameter, if both have one with the same tensors."""
        found = [optimizer.state.get(own[which % len(own)], {}) for optimizer, own in self.both()]
        names = [{n for n, x in s.items() if isinstance(x, Tensor) and x.dim()} for s in found]
        return found if all(found) and names[0] == names[1] else []

    @rule(which=st.integers(0, 20), how=st.sampled_from(["fill", "data", "exchange", "transposed"]), seed=seeds)
    def edit_a_state(self, which: int, how: str, seed: int) -> None:
        if not self.stepped:
            return
        for state in self.states(which):
            for k, (name, x) in enumerate(sorted(state.items(), key=lambda item: item[0])):
                if not isinstance(x, Tensor) or not x.dim() or name in ("prev", "grad_avg"):  # torch's variance may be negative
                    continue
                new = random(x.shape, seed + k).abs().to(x.dtype) + 0.1
                if how == "fill":
                    x.copy_(new)
                elif how == "data":
                    x.data.copy_(new)
                elif how == "exchange":
                    state[name] = new
                else:
                    x.data = laid_out(new, "transposed")

    @rule(which=st.integers(0, 20), count=st.sampled_from([0.0, 3.0, 40.0]))
    def edit_a_counter(self, which: int, count: float) -> None:
        if (
            self.name in ("SGD", "NAdam", "ASGD") or not self.stepped
        ):  # torch's NAdam and ASGD keep products of the past beside it
            return
        states = [optimizer.state.get(own[which % len(own)], {}) for optimizer, own in self.both()]
        if all(isinstance(s.get("step"), Tensor) for s in states):
            for s in states:
                s["step"].fill_(count)

    @rule(which=st.integers(0, 20))
    def forget_a_state(self, which: int) -> None:
        if self.name == "Adagrad":  # torch's makes its state in the constructor alone
            return
        for optimizer, own in self.both():
            optimizer.state.pop(own[which % len(own)], None)

    # -- parameters

    @rule(which=st.integers(0, 20), seed=seeds)
    def replace_a_parameter(self, which: int, seed: int) -> None:
        if self.name == "Adagrad":
            return
        for optimizer, own in self.both():
            k = which % len(own)
            old, new = own[k], nn.Parameter(random(own[k].shape, seed))
            self.exchange(optimizer, old, new)
            own[k] = new
            optimizer.state.pop(old, None)

    @rule(which=st.integers(0, 20), grow=st.booleans())
    def change_the_rows(self, which: int, grow: bool) -> None:
        if not self.stepped or self.name == "Adafactor" or not self.states(which):
            return
        for optimizer, own in self.both():
            k = which % len(own)
            old = own[k]
            if not old.dim() or (len(old) < 2 and not grow):
                return
            rows = torch.cat([torch.arange(len(old)), torch.tensor([0])]) if grow else torch.arange(len(old) - 1)
            new = nn.Parameter(old.detach()[rows].clone())
            state = optimizer.state.pop(old)
            shape = old.shape
            optimizer.state[new] = {n: x[rows] if isinstance(x, Tensor) and x.shape == shape else x for n, x in state.items()}
            self.exchange(optimizer, old, new)
            own[k] = new

    @staticmethod
    def exchange(optimizer: Any, old: Tensor, new: Tensor) -> None:
        for group in optimizer.param_groups:
            group["params"] = [new if p is old else p for p in group["params"]]

    @precondition(lambda self: len(self.params[0]) < 24)
    @rule(seed=seeds, lr=st.sampled_from([1e-3, 0.05]))
    def add_a_group(self, seed: int, lr: float) -> None:
        for optimizer, own in self.both():
            new = [nn.Parameter(random((2, 3), seed)), nn.Parameter(random((5,), seed + 1))]
            optimizer.add_param_group({"params": new, "lr": lr})
            own += new

    # -- checkpoints and copies

    @rule(file=st.booleans())
    def load_into_itself(self, file: bool) -> None:
        for k in range(2):
            state_dict = copy.deepcopy(self.optimizers[k].state_dict())
            self.load(k, through_a_file(state_dict) if file else state_dict)

    @rule(source=st.sampled_from(["itself", "the other"]))
    def load_into_a_fresh_one(self, source: str) -> None:
        if self.schedulers or (source == "the other" and not self.stepped):
            return
        dicts = [copy.deepcopy(o.state_dict()) for o in self.optimizers]
        if source == "the other":
            if self.name == "SGD" and any("momentum_buffer" not in s for s in dicts[0]["state"].values()):
                return
            dicts[1]["state"] = copy.deepcopy(dicts[0]["state"])
        for k, side in enumerate(SIDES):
            groups = [{"params": g["params"]} for g in self.optimizers[k].param_groups]
            self.optimizers[k] = self.made(side, groups)
            self.load(k, dicts[k])

    def load(self, k: int, state_dict: Any) -> None:
        self.optimizers[k].load_state_dict(state_dict)

    @rule(how=st.sampled_from(["deepcopy", "pickle"]))
    def go_on_with_a_copy(self, how: str) -> None:
        if self.schedulers:
            return
        for k in range(2):
            both = (self.optimizers[k], self.params[k])
            self.optimizers[k], self.params[k] = copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))


def through_a_file(state_dict: Any) -> Any:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_every_class_does_what_torchs_does() -> None:
    assert all(set(o) <= set(inspect.signature(getattr(torch.optim, n)).parameters) for n, own in CLASSES.items() for o in own)
    if "PURESTEP_SEED" in os.environ:
        hypothesis.seed(int(os.environ["PURESTEP_SEED"]))(Machine)
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=40 * EXAMPLES, stateful_step_count=25, deadline=None, derandomize="PURESTEP_SEED" not in os.environ,
            suppress_health_check=list(HealthCheck), database=None, phases=[Phase.generate, Phase.shrink],
            print_blob=True,
        ),
    )  # fmt: skip


def test_a_momentum_that_is_switched_on_before_the_first_step() -> None:
    """The state that is saved then has no buffer; it is loaded all the same, and the buffer begins with the first step."""
    results = []
    for side in SIDES:
        params = [nn.Parameter(random((3, 2), 0))]
        first, second = (side.RMSprop(params, lr=0.1) for _ in range(2))
        first.param_groups[0]["momentum"] = 0.5
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        for step in range(3):
            params[0].grad = random((3, 2), step)
            second.step()
        results.append(params[0].detach())
    torch.testing.assert_close(*results)
