"""Steps that fail: what is left of parameters and state, and whether the next step is right.

Faults are made one at a time, at every place of a step in turn: a line of the library, a place where CPython may deliver an
interrupt, an operation that allocates, a function of a user's. What is promised is in docs/reliability.md.

By default some places of each step are tried, drawn by `PURESTEP_SEED`; `PURESTEP_EXAMPLES=k` tries k times as many, and
`PURESTEP_EXAMPLES=1000` all of them.
"""

from __future__ import annotations

import contextlib
import copy
import os
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import purestep as ps
from purestep import optim
from purestep._core.maths import VIEWS
from purestep._executors.task import WATCH
from tests.injection import AtOperation, Interrupt, OutOfMemory, at_call, at_interrupt, at_line

EXAMPLES = int(os.environ.get("PURESTEP_EXAMPLES", "1"))
SEED = int(os.environ.get("PURESTEP_SEED", "0"))
MODERN = sys.version_info >= (3, 11)  # before, an interrupt may come at any instruction

Make = Callable[[], ps.Transform]


class UsersError(Exception):
    """What a function of a user's raises."""


class Trap:
    """Raises at the `at`-th call of a function of a user's from now on; None for never."""

    at: int | None = None

    def __call__(self) -> None:
        if self.at is not None:
            self.at -= 1
            if self.at < 0:
                self.at = None
                raise UsersError


TRAP = Trap()


@pytest.fixture(autouse=True)
def _nothing_is_left_over() -> Iterator[None]:
    before = surroundings()
    TRAP.at = None
    yield
    TRAP.at = None
    assert surroundings() == before


def surroundings() -> tuple[Any, ...]:
    """All that the library sets for a while, in this thread and in the process."""
    return (
        torch.is_grad_enabled(), torch.get_num_threads(), torch.get_default_dtype(), VIEWS.form, WATCH.decided, WATCH.reasons,
        torch._C._len_torch_dispatch_stack(), torch._C._len_torch_function_stack(),
        str(torch._C._dispatch_tls_local_exclude_set()), str(torch._C._dispatch_tls_local_include_set()),
        torch._C._functorch.maybe_current_level(), torch.is_inference_mode_enabled(),
    )  # fmt: skip


def some(count: int, most: int, name: str) -> list[int]:
    """Some of the places of a step."""
    most *= EXAMPLES
    return list(range(count)) if count <= most else sorted(random.Random(f"{SEED} {name}").sample(range(count), most))


# ------------------------------------------------------------------------------------------------------ functions of a user's


@ps.whole()
def users_whole(gs: list[Tensor], s: Any, params: list[Tensor]) -> tuple[list[Tensor], Any]:
    TRAP()
    return [g * 1 for g in gs], s


@ps.operation(like=True)
def users_operation(x: Tensor) -> Tensor:
    TRAP()
    return x * 1.0


class UsersState(NamedTuple):
    m: Tensor

    @classmethod
    def init(cls, p: Tensor) -> UsersState:
        return cls(torch.zeros_like(p))


@ps.leafwise(UsersState)
def users_leaf(g: Tensor, s: UsersState, p: Tensor) -> tuple[Tensor, UsersState]:
    m = s.m * 0.9 + g
    return users_operation(m), UsersState(m)


class UsersInnerState(NamedTuple):
    inner: Any

    @classmethod
    def init(cls, params: list[Tensor], inner: Any) -> UsersInnerState:
        return cls(inner)


@ps.nested(UsersInnerState)
def users_nested(gs: list[Tensor], s: UsersInnerState, params: list[Tensor], transform: ps.Inner) -> Any:
    us, inner = transform.update(gs, s.inner, params, donate=True)
    TRAP()
    return us, UsersInnerState(inner)


def users_schedule(step: Any) -> Any:
    TRAP()
    return 0.1 / (step + 1)


def users_count(step: Any) -> int:
    TRAP()
    return 2


def users_predicate(step: Any) -> Any:
    TRAP()
    return step >= 0


def by_dimensions(path: str, p: Tensor) -> str:
    return "a" if p.ndim == 2 else "b"


MOMENTUM = {"lr": 0.1, "momentum": 0.9}
USERS: dict[str, Make] = {
    "schedule": lambda: ps.adamw(users_schedule),
    "schedule after a norm": lambda: ps.chain(
        ps.scale_by_adam(), ps.clip_by_global_norm(1.0), ps.scale_by_learning_rate(users_schedule)
    ),
    "schedule in a schedule": lambda: ps.chain(ps.trace(0.9), ps.normalize(), ps.sgd(ps.schedules.scale(users_schedule, 0.5))),
    "schedule in a part": lambda: ps.partition({"a": ps.adamw(0.1), "b": ps.sgd(users_schedule, momentum=0.9)}, by_dimensions),
    "schedule in accumulate": lambda: ps.accumulate(ps.sgd(users_schedule, momentum=0.9), 2),
    "schedule in lookahead": lambda: ps.lookahead(ps.sgd(users_schedule, momentum=0.9), k=2),
    "whole": lambda: ps.chain(users_whole(), ps.adamw(0.1)),
    "whole after moments": lambda: ps.chain(ps.scale_by_adam(), users_whole(), ps.scale_by_learning_rate(0.1)),
    "whole at last": lambda: ps.chain(ps.sgd(**MOMENTUM), users_whole()),
    "whole in a part": lambda: ps.partition(
        {"a": ps.adamw(0.1), "b": ps.chain(users_whole(), ps.sgd(**MOMENTUM))}, by_dimensions
    ),
    "whole in accumulate": lambda: ps.accumulate(ps.chain(users_whole(), ps.sgd(**MOMENTUM)), 2),
    "whole in skip": lambda: ps.skip_if_nonfinite(ps.chain(ps.scale_by_adam(), users_whole(), ps.scale(-0.1))),
    "count of accumulate": lambda: ps.chain(ps.scale_by_adam(), ps.accumulate(ps.sgd(**MOMENTUM), users_count)),
    "predicate": lambda: ps.chain(
        ps.trace(0.9), ps.conditionally(users_predicate, ps.clip_by_global_norm(1.0)), ps.scale(-0.1)
    ),
    "nested": lambda: users_nested(ps.adamw(0.1)),
    "nested after moments": lambda: ps.chain(ps.scale_by_rms(), users_nested(ps.trace(0.9)), ps.scale(-0.1)),
    "operation": lambda: ps.chain(users_leaf(), ps.scale_by_learning_rate(0.1)),
    "operation after moments": lambda: ps.chain(ps.scale_by_adam(), users_leaf(), ps.scale_by_learning_rate(0.1)),
    "operation after a norm": lambda: ps.chain(ps.scale_by_adam(), ps.clip_by_global_norm(1.0), users_leaf(), ps.scale(-0.1)),
    "operation in accumulate": lambda: ps.accumulate(ps.chain(users_leaf(), ps.scale(-0.1)), 2),
}

SHAPES = [(3, 2), (4,), (2, 3)]


def values(count: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPES[k % 3], generator=generator) for k in range(count)]


def parameters(count: int) -> list[Any]:
    return [nn.Parameter(x) for x in values(count, 0)]


def give(params: list[Any], seed: int) -> None:
    for p, g in zip(params, values(len(params), 100 + seed)):
        p.grad = g


def everything(optimizer: Any) -> list[tuple[Tensor, dict[str, Any]]]:
    """Copies of each parameter and its state, by its names in order."""
    params = [p for g in optimizer.param_groups for p in g["params"]]
    return [(p.detach().clone(), copied(dict(sorted(optimizer.state.get(p, {}).items())))) for p in params]


def equal(a: Any, b: Any) -> bool:
    """Whether two values are the same bits, in the same structure."""
    xs, ys = [pytree.tree_flatten(x) for x in (a, b)]
    return xs[1] == ys[1] and all(
        torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x == y for x, y in zip(xs[0], ys[0])
    )


def close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("flags", [{}, {"foreach": True}, {"foreach": False}], ids=["default", "foreach", "leaf"])
@pytest.mark.parametrize("name", USERS)
@pytest.mark.in_turn("flags")
def test_an_optimizer_is_as_before_a_function_of_a_users_raised(name: str, flags: dict[str, bool]) -> None:
    """At the first step and later, at each call of the function; the step that is made again is the right one."""
    for count, warm in ((3, 0), (3, 3), (20, 2)):
        params, twins = parameters(count), parameters(count)
        optimizer, twin = (optim.Optimizer(x, USERS[name](), **flags) for x in (params, twins))
        for k in range(warm + 4):
            for x, each in ((params, optimizer), (twins, twin)):
                give(x, k)
                if k < warm or each is twin:
                    each.step()
            if k < warm:
                continue
            before = everything(optimizer)
            for at in range(1 if "schedule" in name else 50):  # a schedule that has been called is not expected to raise then
                TRAP.at = at
                try:
                    optimizer.step()
                    break
                except UsersError:
                    assert equal(everything(optimizer), before), at
            else:
                TRAP.at = None
                optimizer.step()
            TRAP.at = None
            close(everything(optimizer), everything(twin))


@pytest.mark.parametrize("executor", [None, "foreach", "leaf"])
@pytest.mark.parametrize("name", USERS)
def test_nothing_that_was_given_has_changed_where_a_function_of_a_users_raised(name: str, executor: Any) -> None:
    """Pure, and donated: what was given away is what it was, and may be given again."""
    for donate in (False, True):
        opt = USERS[name]()
        params: Any = values(3, 0)
        state = opt.init_state(params)
        for k in range(4):
            grads = values(3, 100 + k)
            for at in range(1 if "schedule" in name else 4):
                before = pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, (grads, state, params))
                TRAP.at = at
                try:
                    opt.step(*copied((grads, state, params)), donate=donate, executor=executor)
                    break
                except UsersError:
                    pass
                TRAP.at = at
                with pytest.raises(UsersError):
                    opt.step(grads, state, params, donate=donate, executor=executor)
                assert equal((grads, state, params), before)
            TRAP.at = None
            expected = USERS[name]().step(*copied((grads, state, params)), executor=executor)
            params, state = opt.step(grads, state, params, donate=donate, executor=executor)
            close((params, state), expected)


def copied(x: Any) -> Any:
    """Copies; what is one tensor in several places is one copy."""
    made: dict[int, Any] = {}
    return pytree.tree_map(lambda y: made.setdefault(id(y), y.clone()) if isinstance(y, Tensor) else y, x)


def test_a_mask_that_raises_is_asked_before_anything_changes() -> None:
    def mask(path: str, p: Tensor) -> bool:
        TRAP()
        return p.ndim == 2

    opt = ps.chain(ps.scale_by_adam(), ps.clip_by_global_norm(1.0), ps.add_decayed_weights(0.1, mask=mask), ps.scale(-0.1))
    params = values(3, 0)
    state = opt.init_state(params)
    for donate in (False, True):
        before = copied((state, params))
        for at in range(3):
            TRAP.at = at
            with pytest.raises(UsersError):
                opt.step(values(3, 1), state, params, donate=donate)
            assert equal((state, params), before)


def test_a_leaf_function_that_cannot_be_traced_changes_nothing() -> None:
    """It stands after a transform that sees all parameters, so what comes before has run."""

    @ps.leafwise()
    def broken(g: Tensor, p: Tensor) -> Tensor:
        raise UsersError

    @ps.leafwise()
    def branching(g: Tensor, p: Tensor) -> Tensor:
        return g if g.sum() > 0 else -g

    for part, error in ((broken, UsersError), (branching, TypeError)):
        opt = ps.chain(ps.scale_by_adam(), ps.clip_by_global_norm(1.0), part(), ps.scale(-0.1))
        params, leaves = values(3, 0), parameters(3)
        state = opt.init_state(params)
        before = copied((state, params))
        with pytest.raises(error):
            opt.step(values(3, 1), state, params, donate=True)
        assert equal((state, params), before)
        optimizer = optim.Optimizer(leaves, opt)
        give(leaves, 1)
        old = everything(optimizer)
        with pytest.raises(error):
            optimizer.step()
        assert equal(everything(optimizer), old)


@pytest.mark.parametrize("name", ["shampoo", "soap", "galore"])
def test_a_decomposition_that_refuses_nan_changes_nothing(name: str) -> None:
    """`torch.linalg.eigh` raises where a gradient is NaN."""
    make: Any = {"shampoo": lambda: ps.shampoo(0.1), "soap": lambda: ps.soap(0.1), "galore": lambda: ps.galore(0.1, rank=1)}[
        name
    ]
    for warm in (0, 3):
        params = [nn.Parameter(x) for x in (torch.randn(4, 3), torch.randn(3, 3))]
        optimizer = optim.Optimizer(params, make())
        for k in range(warm + 2):
            for j, p in enumerate(params):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * k + j))
            if k >= warm:
                good, before = params[1].grad, everything(optimizer)
                params[1].grad = torch.full((3, 3), torch.nan)
                try:
                    optimizer.step()
                except RuntimeError:
                    assert equal(everything(optimizer), before)
                    params[1].grad = good
                else:
                    return  # this one is not due
            optimizer.step()
            assert all(p.isfinite().all() for p in params)


# ---------------------------------------------------------------------------------------------------------- hooks and closures


def quadratic(params: list[Any], optimizer: Any) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        TRAP()
        optimizer.zero_grad()
        loss = torch.stack([((p - 1) ** 2).sum() for p in params]).sum()
        loss.backward()
        return loss

    return closure


CLOSURES: dict[str, Callable[[list[Any]], Any]] = {
    "AdamW": lambda params: optim.AdamW(params, lr=0.1),
    "sam": lambda params: optim.Optimizer(params, ps.chain(ps.sam(0.05), ps.adamw(0.1))),
    "sam after moments": lambda params: optim.Optimizer(params, ps.chain(ps.trace(0.9), ps.sam(0.05), ps.scale(-0.1))),
    "line search": lambda params: optim.Optimizer(params, ps.chain(ps.sgd(0.1), ps.scale_by_backtracking_linesearch())),
}


@pytest.mark.parametrize("name", CLOSURES)
def test_an_optimizer_is_as_before_a_closure_raised(name: str) -> None:
    """At each of its calls: those that a transform makes, too, at other parameters."""
    params = parameters(3)
    optimizer = CLOSURES[name](params)
    closure = quadratic(params, optimizer)
    for _ in range(3):
        before = everything(optimizer)
        for at in range(20):
            TRAP.at = at
            try:
                optimizer.step(closure)
            except UsersError:
                assert equal(everything(optimizer), before)
            else:
                assert at > 0
                break
        TRAP.at = None


def test_lbfgs_keeps_its_progress_where_a_closure_raised() -> None:
    """Parameters and state go together: they are those where the closure was evaluated last, or those of before."""
    params = parameters(2)
    optimizer = optim.LBFGS(params, lr=0.1, max_iter=5)
    closure = quadratic(params, optimizer)
    start = closure().item()
    for at in (3, 0, 1, 6, 2):
        TRAP.at = at
        try:
            optimizer.step(closure)
        except UsersError:
            TRAP.at = None
    TRAP.at = None
    optimizer.step(closure)
    assert closure().item() < 0.1 * start
    assert all(p.isfinite().all() for p in params)


def test_a_hook_before_the_step_changes_nothing_and_one_after_it_comes_after_it() -> None:
    params, twins = parameters(3), parameters(3)
    optimizer, twin = optim.AdamW(params, lr=0.1), optim.AdamW(twins, lr=0.1)

    def hook(*_: Any) -> None:
        TRAP()

    handles = [optimizer.register_step_pre_hook(hook), optimizer.register_step_post_hook(hook)]
    for k in range(4):
        for x in (params, twins):
            give(x, k)
        before = everything(optimizer)
        TRAP.at = 0
        with pytest.raises(UsersError):
            optimizer.step()
        assert equal(everything(optimizer), before)
        TRAP.at = 1
        with pytest.raises(UsersError):
            optimizer.step()
        TRAP.at = None
        twin.step()
        assert equal(everything(optimizer), everything(twin))
    for handle in handles:
        handle.remove()


# ------------------------------------------------------------------------------------------------------------------ pure steps

PURE: dict[str, Make] = {
    "sgd": lambda: ps.sgd(0.1, momentum=0.9),
    "adamw": lambda: ps.adamw(0.1),
    "nadam": lambda: ps.nadam(0.1),
    "adafactor": lambda: ps.adafactor(0.1),
    "clip": lambda: ps.chain(ps.clip_by_global_norm(1.0), ps.adamw(0.1)),
    "moments, then a norm": lambda: ps.chain(ps.scale_by_adam(), ps.normalize(), ps.scale(-0.1)),
    "partition": lambda: ps.partition({"a": ps.muon(0.1), "b": ps.adamw(0.1)}, by_dimensions),
    "accumulate": lambda: ps.accumulate(ps.nadam(0.1), 2),
    "skip": lambda: ps.skip_if_nonfinite(ps.adam(0.1)),
    "lookahead": lambda: ps.lookahead(ps.sgd(0.1, momentum=0.9), k=2),
    "schedule": lambda: ps.adamw(lambda step: 0.1 / (step + 1)),
    "masked": lambda: ps.chain(ps.scale_by_adam(), ps.add_decayed_weights(0.1, mask=ps.by_ndim({2: True}, default=False)), ps.scale(-0.1)),
    "average": lambda: ps.chain(ps.adam(0.1), ps.ema_params(0.9)),
    "quantized": lambda: ps.quantize_state(ps.adam(0.1)),
    "soap": lambda: ps.soap(0.1),
}  # fmt: skip

FAULTS: dict[str, Any] = {
    "line": at_line,
    "call": at_call,
    "operation": AtOperation,
    **({"interrupt": at_interrupt} if MODERN else {}),
}


def places_of(made: Any) -> Any:
    return made.places if isinstance(made, AtOperation) else made


class Odd(Tensor):
    """A subclass that knows nothing."""


def odd(xs: list[Tensor]) -> list[Any]:
    return [x.as_subclass(Odd) for x in xs]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", ["few", "many", "odd", "complex"])
@pytest.mark.parametrize("name", PURE)
@pytest.mark.in_turn("kind")
def test_a_pure_step_that_fails_has_changed_nothing(name: str, kind: str, fault: str) -> None:
    """Wherever it fails, its arguments are what they were, and the step that is made again is the right one."""
    if kind == "complex" and name in ("partition", "soap", "adafactor", "quantized"):
        pytest.skip("refuses complex parameters")
    opt, count = PURE[name](), 20 if kind == "many" else 3
    changed: Any = {"odd": odd, "complex": lambda xs: [torch.complex(x, x.flip(0)) for x in xs]}.get(kind, lambda xs: xs)
    params: Any = changed(values(count, 0))
    state = opt.init_state(params)
    for k in range(3):
        params, state = opt.step(changed(values(count, k)), state, params)
    given = (changed(values(count, 9)), state, params)
    expected = opt.step(*given)
    with FAULTS[fault]() as made:
        opt.step(*given)
    before, versions = copied(given), [x._version for x in pytree.tree_leaves(given) if isinstance(x, Tensor)]
    for at in some(places_of(made).count, 2, f"{name} {kind} {fault}"):
        with contextlib.suppress(Interrupt, OutOfMemory), FAULTS[fault](at):  # a later step may have fewer places
            opt.step(*given)
        assert equal(given, before)
        assert versions == [x._version for x in pytree.tree_leaves(given) if isinstance(x, Tensor)]
    close(opt.step(*given), expected)


# ------------------------------------------------------------------------------------------------- optimizers, donated steps

OPTIMIZERS: dict[str, Callable[[list[Any]], Any]] = {
    "SGD": lambda params: optim.SGD(params, lr=0.1),
    "SGD, momentum": lambda params: optim.SGD(params, lr=0.1, momentum=0.9),
    "AdamW": lambda params: optim.AdamW(params, lr=0.1),
    "AdamW, leaf": lambda params: optim.AdamW(params, lr=0.1, foreach=False),
    "two groups": lambda params: optim.AdamW([{"params": params[:1]}, {"params": params[1:], "lr": 0.01}], lr=0.1),
    "NAdam": lambda params: optim.NAdam(params, lr=0.1),
    "RMSprop": lambda params: optim.RMSprop(params, lr=0.1, momentum=0.9),
    "Adagrad": lambda params: optim.Adagrad(params, lr=0.1),
    "Adafactor": lambda params: optim.Adafactor(params, lr=0.1),
    **{name: lambda params, make=make: optim.Optimizer(params, make()) for name, make in PURE.items() if name not in ("sgd", "adamw", "nadam")},
}  # fmt: skip


@pytest.mark.parametrize("fault", ["line", "call", *(["interrupt"] if MODERN else [])])
@pytest.mark.parametrize("count", [3, 20])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.in_turn("count")
def test_an_optimizer_goes_on_after_a_fault(name: str, count: int, fault: str) -> None:
    """Where nothing had been overwritten, the step can be made again; else a checkpoint brings everything back."""
    for warm in (0, 4):

        def begun(warm: int = warm) -> tuple[list[Any], Any]:
            params = parameters(count)
            optimizer = OPTIMIZERS[name](params)
            for k in range(warm):
                give(params, k)
                optimizer.step()
            give(params, warm)
            return params, optimizer

        begun()[1].step()  # programs are made
        _, optimizer = begun()
        before = everything(optimizer)
        saved = copy.deepcopy(optimizer.state_dict())
        with FAULTS[fault]() as made:
            optimizer.step()
        after = everything(optimizer)
        for at in some(made.count, 2, f"{name} {count} {fault} {warm}"):
            _, optimizer = begun()
            with pytest.raises((Interrupt, OutOfMemory)), FAULTS[fault](at) as made:
                optimizer.step()
            assert torch.is_grad_enabled(), made.raised
            now = everything(optimizer)
            assert all(x.isfinite().all() for x in pytree.tree_leaves(now) if isinstance(x, Tensor) and x.is_floating_point())
            begins = warm == 0 and equal([p for p, _ in now], [p for p, _ in before])  # what is missing begins anew
            if equal(now, before) or (
                begins and all(equal({n: b[1][n] for n in a[1] if n in b[1]}, a[1]) for a, b in zip(now, before))
            ):
                optimizer.step()
                close(everything(optimizer), after)
                continue
            if equal(now, after):
                continue
            with torch.no_grad():
                for p, (x, _) in zip([p for g in optimizer.param_groups for p in g["params"]], before):
                    p.copy_(x)
            optimizer.load_state_dict(copy.deepcopy(saved))
            optimizer.step()
            close(everything(optimizer), after)


KERNELS: dict[str, Callable[[list[Any]], Any]] = {
    "AdamW": lambda params: optim.AdamW(params, lr=0.1),
    "Adagrad": lambda params: optim.Adagrad(params, lr=0.1),
    "SGD": lambda params: optim.SGD(params, lr=0.1, momentum=0.9),
    "clip": lambda params: optim.Optimizer(params, ps.chain(ps.clip_by_global_norm(1.0), ps.adamw(0.1))),
}


@pytest.mark.skipif(not MODERN, reason="an interrupt may come at any instruction")
@pytest.mark.parametrize("name", KERNELS)
def test_under_a_kernel_parameters_and_moments_move_together(name: str) -> None:
    """Wherever the interrupt comes, also between the call for large tensors and that for small ones; counters are apart."""
    shapes = [(80, 80), (3,), (70, 70), (2, 2), (5,), (6,), (7,)]

    def begun(warm: int) -> Any:
        generator = torch.Generator().manual_seed(0)
        params: list[Any] = [nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
        optimizer = KERNELS[name](params)
        for _ in range(warm + 1):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator)
            if _ < warm:
                optimizer.step()
        return optimizer

    def moments(optimizer: Any) -> list[Any]:
        return [(p, {n: x for n, x in s.items() if x.dim()}) for p, s in everything(optimizer)]

    for warm in (1, 5):
        before = moments(begun(warm))
        optimizer = begun(warm)
        with at_interrupt() as made:
            optimizer.step()
        after = moments(optimizer)
        for at in some(made.count, 25, f"{name} kernel {warm}"):
            optimizer = begun(warm)
            with contextlib.suppress(Interrupt), at_interrupt(at) as made:
                optimizer.step()
            assert all(equal(x, a) or equal(x, b) for x, a, b in zip(moments(optimizer), before, after)), made.raised
