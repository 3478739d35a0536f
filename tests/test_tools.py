"""torch's own tools around an optimizer, where test_guide, test_schedulers, test_protocol and test_distributed do not ask already:
several processes, hooks in the backward pass, parametrizations, contexts, exchanged parameters, sharded states."""

from __future__ import annotations

import contextlib
import copy
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, get_total_norm, parametrizations, parametrize, prune
from torch.optim import swa_utils
from torch.utils.flop_counter import FlopCounterMode

import purestep as ps
from purestep import optim
from tests import processes
from tests.cases import CLASSES
from tests.frameworks.runs import agree, batches, by_hand, composed, loss_of, model, put, train
from tests.test_trainers import through_file

BOTH = (optim, torch.optim)
Make = Callable[[Any, nn.Module], Any]
MAKERS: dict[str, Make] = {
    "AdamW": lambda namespace, net: namespace.AdamW(net.parameters(), lr=0.05),
    "SGD, fused": lambda namespace, net: namespace.SGD(  # torch's fused SGD is wrong about new parameters beside old ones
        net.parameters(), lr=0.05, momentum=0.9, fused=namespace is optim
    ),
    "RMSprop, loop": lambda namespace, net: namespace.RMSprop(net.parameters(), lr=0.01, foreach=False),
}
each_maker = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def deep(seed: int = 0) -> nn.Sequential:
    """So many small parameters that they are packed."""
    torch.manual_seed(seed)
    return nn.Sequential(*[nn.Linear(4, 4) for _ in range(9)], nn.Linear(4, 2)).double()


each_model = pytest.mark.parametrize("begin", [model, deep], ids=["few", "many"])


# ------------------------------------------------------------------------------------------------------ parameters of tools


PARAMETRIZATIONS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}


def parametrized(how: str) -> nn.Sequential:
    net = model()
    for layer in (net[0], net[2]):
        PARAMETRIZATIONS[how](layer)
    torch.manual_seed(1)  # spectral_norm iterates from what it draws
    return net


@each_maker
@pytest.mark.parametrize("how", PARAMETRIZATIONS)
def test_parametrized_layers_train_as_with_torch(make: Make, how: str) -> None:
    results = []
    for namespace in BOTH:
        net = parametrized(how)
        optimizer = make(namespace, net)
        train(net, optimizer, batches(5))
        parametrize.remove_parametrizations(net[2], "weight", leave_parametrized=True)
        optimizer.param_groups[0]["params"] = list(net.parameters())
        train(net, optimizer, batches(5))
        results.append(net)
    agree(*results)


def test_rules_by_path_see_the_names_of_parametrizations() -> None:
    rule = ps.by_path({r"parametrizations\.weight\.original0": True}, default=False)
    frozen = ps.chain(ps.freeze(rule), composed())
    net, start = parametrized("weight_norm"), parametrized("weight_norm")
    train(net, optim.Optimizer(net.named_parameters(), frozen), batches())
    agree(net, by_hand(parametrized("weight_norm"), frozen, batches()))
    changed = {name for (name, p), q in zip(net.named_parameters(), start.parameters()) if not torch.equal(p, q)}
    assert changed == {name for name, _ in net.named_parameters() if not name.endswith("original0")}


@each_maker
def test_pruned_weights_train_as_with_torch(make: Make) -> None:
    results = []
    for namespace in BOTH:
        net = model()
        optimizer = make(namespace, net)
        train(net, optimizer, batches(3))
        prune.l1_unstructured(net[0], "weight", 0.4)  # the same parameter, under another name
        train(net, optimizer, batches(3))
        assert int((net[0].weight == 0).sum()) == 8
        results.append(net)
    agree(*results)


@each_maker
@each_model
def test_parameters_that_become_parts_of_a_vector(make: Make, begin: Any) -> None:
    """`vector_to_parameters` exchanges the memory of all of them."""
    results = []
    for namespace in BOTH:
        net = begin()
        optimizer = make(namespace, net)
        train(net, optimizer, batches(3))
        vector = nn.utils.parameters_to_vector(net.parameters()).detach() / 2
        nn.utils.vector_to_parameters(vector, net.parameters())
        train(net, optimizer, batches(3))
        torch.testing.assert_close(nn.utils.parameters_to_vector(net.parameters()), vector, rtol=0, atol=0)  # in place
        results.append(net)
    agree(*results)


@each_maker
@each_model
def test_parameters_whose_contents_are_swapped(make: Make, begin: Any) -> None:
    """Nothing may hold a weak reference to them."""
    results = []
    for namespace in BOTH:
        net = begin()
        optimizer = make(namespace, net)
        train(net, optimizer, batches(3))
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            net.load_state_dict(begin(1).state_dict())
            net.double()
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)
        train(net, optimizer, batches(3))
        results.append(net)
    agree(*results)


@pytest.mark.parametrize("name", ["SGD", "Adagrad", "SparseAdam"])
def test_a_bag_of_sparse_embeddings_trains_as_with_torch(name: str) -> None:
    results = []
    for namespace in BOTH:
        torch.manual_seed(0)
        bag = nn.EmbeddingBag(9, 3, mode="sum", sparse=True).double()
        optimizer = getattr(namespace, name)(bag.parameters(), lr=0.1)
        for k in range(5):
            optimizer.zero_grad()
            rows = torch.tensor([0, k, k, 8 - k])
            loss = bag(rows, torch.tensor([0, 2])).square().sum()
            loss.backward()
            with torch.sparse.check_sparse_tensor_invariants():
                optimizer.step()
        results.append(bag)
    agree(*results)


# --------------------------------------------------------------------------------------------------- before and after a step


@each_maker
@pytest.mark.parametrize("how", ["norm", "value", "norm of a part"])
def test_clipped_gradients_are_those_of_a_chain(make: Make, how: str) -> None:
    results = []
    for namespace in BOTH:
        net = model()
        optimizer = make(namespace, net)
        for batch in batches():
            optimizer.zero_grad()
            loss_of(net, batch).backward()
            if how == "value":
                clip_grad_value_(net.parameters(), 0.05)
            else:
                clip_grad_norm_(net.parameters() if how == "norm" else net[0].parameters(), 0.1)
            optimizer.step()
        results.append(net)
    agree(*results)
    if make is not MAKERS["AdamW"]:
        return
    part = ps.masked(ps.clip_by_global_norm(0.1), ps.by_path({r"^0\.": True}, default=False))
    clip = {"norm": ps.clip_by_global_norm(0.1), "value": ps.clip(0.05), "norm of a part": part}[how]
    net = model()
    train(net, optim.Optimizer(net.named_parameters(), ps.chain(clip, ps.adamw(0.05))), batches())
    agree(net, results[1])


def test_the_norm_of_gradients_is_that_of_torch() -> None:
    grads = [torch.randn(3, 2), torch.randn(4)]
    torch.testing.assert_close(ps.global_norm(grads), get_total_norm(grads))


def test_one_scaler_for_two_optimizers() -> None:
    """As in torch's examples: what overflows in one of them is skipped in this one only."""
    results = []
    for namespace in BOTH:
        nets = [model(0), model(1)]
        optimizers = [
            namespace.AdamW(nets[0].parameters(), lr=0.05),
            namespace.SGD(nets[1].parameters(), lr=0.05, momentum=0.9),
        ]
        scaler, scales = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=2), []
        for k, batch in enumerate(batches()):
            for optimizer in optimizers:
                optimizer.zero_grad()
            losses = [loss_of(net, batch) for net in nets]
            if k in (0, 4):
                losses[k // 4] = losses[k // 4] * float("inf")
            scaler.scale(losses[0]).backward()
            scaler.scale(losses[1]).backward()
            scaler.unscale_(optimizers[0])
            clip_grad_norm_(nets[0].parameters(), 0.1)
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        results.append((nets, scales, float(optimizers[0].state[nets[0][0].weight]["step"])))
    for mine, theirs in zip(results[0][0], results[1][0]):
        agree(mine, theirs)
    assert results[0][1:] == results[1][1:]
    assert results[0][2] == 7


@pytest.mark.parametrize("unscale", [False, True], ids=["", "unscaled"])
def test_a_scaler_skips_steps_of_a_composed_transform(unscale: bool) -> None:
    """They count for no schedule and no accumulation."""
    net = model()
    optimizer, scaler = optim.Optimizer(net.named_parameters(), composed()), torch.amp.GradScaler("cpu", init_scale=64.0)
    for k, batch in enumerate(batches()):
        optimizer.zero_grad()
        scaler.scale(loss_of(net, batch) * (float("inf") if k in (0, 3) else 1.0)).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    agree(net, by_hand(model(), composed(), [batch for k, batch in enumerate(batches()) if k not in (0, 3)]))


def test_averages_of_a_composed_run_are_means_of_what_was_seen() -> None:
    net = nn.Sequential(model(), nn.BatchNorm1d(2).double())
    optimizer = optim.Optimizer(net.named_parameters(), composed())
    averaged, seen = swa_utils.AveragedModel(net), []
    for batch in batches():
        train(net, optimizer, [batch])
        averaged.update_parameters(net)
        seen.append({name: p.detach().clone() for name, p in net.named_parameters()})
    swa_utils.update_bn(batches(), averaged)
    agree(averaged.module, {name: torch.stack([x[name] for x in seen]).mean(0) for name in seen[0]})
    other = copy.deepcopy(net)
    put(other, dict(averaged.module.named_parameters()))
    swa_utils.update_bn(batches(), other)
    torch.testing.assert_close(other[1].running_mean, averaged.module[1].running_mean)


# --------------------------------------------------------------------------------------------- a step in the backward pass

LEAFWISE: dict[str, Callable[[], ps.Transform]] = {
    "adamw": lambda: ps.adamw(0.05),
    "scheduled": lambda: ps.chain(ps.clip(0.05), ps.nadam(ps.schedules.linear(0.1, 0.0, total_steps=6))),
    "accumulated": lambda: ps.accumulate(ps.sgd(0.1, momentum=0.9), 2),
    "decayed": lambda: ps.chain(ps.add_decayed_weights(0.1, mask=ps.by_ndim({2: True}, default=False)), ps.rmsprop(0.01)),
}


@each_model
@pytest.mark.parametrize("make", LEAFWISE.values(), ids=LEAFWISE)
def test_an_optimizer_for_each_parameter_in_the_backward_pass(make: Any, begin: Any) -> None:
    """A transform that treats each parameter on its own does not see the difference, and gradients are freed at once."""
    net = begin()
    for p in net.parameters():
        p.register_post_accumulate_grad_hook(stepping(optim.Optimizer([p], make())))
    for batch in batches():
        loss_of(net, batch).backward()
        assert all(p.grad is None for p in net.parameters())
    agree(net, by_hand(begin(), make(), batches()))


def stepping(optimizer: torch.optim.Optimizer) -> Callable[[Tensor], None]:
    def hook(p: Tensor) -> None:
        optimizer.step()
        optimizer.zero_grad()

    return hook


# ------------------------------------------------------------------------------------------------------------------ contexts


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """New memory is filled with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def anomaly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it is slow
        with torch.autograd.detect_anomaly():
            yield


CONTEXTS: dict[str, Callable[[], Any]] = {
    "device": lambda: torch.device("cpu"),
    "another device": lambda: torch.device("meta"),
    "flop counter": lambda: FlopCounterMode(display=False),
    "anomaly": anomaly,
    "deterministic": deterministic,
    "inference": torch.inference_mode,
    "profiler": torch.profiler.profile,
    "grad": torch.enable_grad,
}


@each_maker
@each_model
@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
def test_steps_within_a_context_are_torchs(make: Make, begin: Any, context: Any) -> None:
    """Those before, within and after it."""
    results = []
    for namespace in BOTH:
        net = begin()
        optimizer = make(namespace, net)
        for k, batch in enumerate(batches()):
            optimizer.zero_grad()
            loss_of(net, batch).backward()
            with context() if 1 < k < 5 else contextlib.nullcontext():
                optimizer.step()
        results.append(net)
    agree(*results)


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
def test_so_are_those_of_a_composed_transform(context: Any) -> None:
    net = model()
    optimizer = optim.Optimizer(net.named_parameters(), composed())
    for k, batch in enumerate(batches()):
        optimizer.zero_grad()
        loss_of(net, batch).backward()
        with context() if 1 < k < 5 else contextlib.nullcontext():
            optimizer.step()
    agree(net, by_hand(model(), composed(), batches()))


@pytest.mark.parametrize("name", [*CLASSES, "Optimizer", "Named"])
def test_the_profiler_shows_torchs_names(name: str) -> None:
    p = nn.Parameter(torch.ones(2, 2))
    partials = {"Optimizer": optim.partial(ps.lion(0.1)), "Named": optim.partial(ps.lion(0.1), name="Named")}
    optimizer: Any = (partials.get(name) or getattr(optim, name))([p], lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    closure()
    if name == "SparseAdam":
        p.grad = torch.ones(2, 2).to_sparse(1)
    with torch.profiler.profile() as profile:
        optimizer.step(*([closure] if name == "LBFGS" else []))
        optimizer.zero_grad()
    names = [event.key for event in profile.key_averages() if event.key.startswith("Optimizer.")]
    assert sorted(names) == [f"Optimizer.step#{name}.step", f"Optimizer.zero_grad#{name}.zero_grad"]


# ----------------------------------------------------------------------------------------------------------------- processes


def several() -> list[ps.Transform]:
    return [ps.chain(ps.clip(0.05), ps.adamw(ps.schedules.linear(0.1, 0.0, total_steps=9))), composed()]


def work(nets: Any, optimizers: Any, lock: Any, answers: Any) -> None:
    """What another process does: the steps of all, one process at a time."""
    torch.set_num_threads(1)
    with lock:
        for net, optimizer in zip(nets, optimizers):
            train(net, optimizer, batches(3))
    answers.put([p.detach().numpy() for net in nets for p in net.parameters()])


def shared_runs(start: str, share: bool, count: int) -> tuple[list[Any], list[Any]]:
    """Nets after three steps here and three in each of so many processes, and what the processes said."""
    context = torch.multiprocessing.get_context(start)
    nets = [model() for _ in several()]
    optimizers = [optim.Optimizer(net.named_parameters(), transform) for net, transform in zip(nets, several())]
    for net, optimizer in zip(nets, optimizers):
        train(net, optimizer, batches(3))
        net.zero_grad()
        if share:
            net.share_memory()
            for own in optimizer.state.values():
                for x in own.values():
                    x.share_memory_()
    lock, answers = context.Lock(), context.SimpleQueue()
    started = [context.Process(target=work, args=(nets, optimizers, lock, answers)) for _ in range(count)]
    for process in started:
        process.start()
    said = [answers.get() for _ in started]
    for process in started:
        process.join(120)
        assert process.exitcode == 0
    return nets, said


def check_sharing(start: str) -> None:
    nets, _ = shared_runs(start, share=True, count=2)
    for net, transform in zip(nets, several()):
        agree(net, by_hand(model(), transform, batches(3) * 3))


def check_copying(start: str) -> None:
    nets, (said,) = shared_runs(start, share=False, count=1)
    expected = [by_hand(model(), transform, batches(3) * 2) for transform in several()]
    for found, x in zip(said, [x for params in expected for x in params.values()]):
        torch.testing.assert_close(torch.from_numpy(found), x)
    for net, transform in zip(nets, several()):
        agree(net, by_hand(model(), transform, batches(3)))  # nothing has happened here


@pytest.mark.parametrize(("check", "start"), [(check_sharing, "spawn"), (check_sharing, "fork"), (check_copying, "fork")])
def test_other_processes_train_what_is_shared_and_what_is_copied(check: Any, start: str) -> None:
    """Hogwild and A3C, with a lock: each goes on where the other has stopped, also in schedules and accumulation. What is not
    shared is copied. A new interpreter forks, since here others, as JAX, may have begun threads."""
    if start == "spawn":
        check(start)
        return
    code = f"import torch; torch.set_num_threads(1); from tests.test_tools import {check.__name__} as f; f({start!r})"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=processes.ROOT, env=env, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr


def sharded(rank: int, size: int) -> dict[str, Any]:
    """Runs of a data-parallel model whose optimizer state is sharded, ours and torch's, in one of several processes."""
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager  # they warn when imported
    from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer

    found: dict[str, Any] = {}
    clipped = ps.chain(ps.clip(0.05), ps.adamw(ps.schedules.linear(0.1, 0.0, total_steps=9)))
    for name, make in {
        "torch": torch.optim.AdamW,
        "class": optim.AdamW,
        "transform": optim.partial(clipped),
    }.items():
        net = nn.parallel.DistributedDataParallel(model())
        optimizer = ZeroRedundancyOptimizer(
            net.parameters(), optimizer_class=make, **({} if name == "transform" else {"lr": 0.05})
        )
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 1.0 if name == "transform" else 0.8)
        train(net, optimizer, batches(8)[rank::size], scheduler.step)
        optimizer.consolidate_state_dict(to=0)
        found[name] = {k: p.detach() for k, p in net.module.named_parameters()}
        if rank == 0:
            found[f"state of {name}"] = through_file(optimizer.state_dict())
    for namespace in BOTH:
        net, averager = model(rank), PeriodicModelAverager(period=2)
        train(net, PostLocalSGDOptimizer(namespace.SGD(net.parameters(), lr=0.1, momentum=0.9), averager), batches(4))
        found[f"local SGD of {namespace.__name__}"] = {k: p.detach() for k, p in net.named_parameters()}
    return found


def mean_gradients(net: Any, batch: tuple[Any, Any]) -> Tensor:
    return (loss_of(net, batch[0]) + loss_of(net, batch[1])) / 2


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
def test_states_are_sharded_and_models_averaged_as_with_torch(tmp_path: Path) -> None:
    answers = processes.run(2, "tests.test_tools:sharded", tmp_path)
    pairs = list(zip(batches(8)[0::2], batches(8)[1::2]))
    clipped = ps.chain(ps.clip(0.05), ps.adamw(ps.schedules.linear(0.1, 0.0, total_steps=9)))
    for answer in answers:
        agree(answer["class"], answer["torch"])
        agree(answer["transform"], by_hand(model(), clipped, pairs, mean_gradients))
        agree(answer["local SGD of purestep.optim"], answer["local SGD of torch.optim"])
    agree(answers[0]["transform"], answers[1]["transform"], rtol=0, atol=0)
    mine, theirs = (answers[0][f"state of {name}"]["state"] for name in ("class", "torch"))
    torch.testing.assert_close(mine, theirs)
