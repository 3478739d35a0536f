"""What flows into an executor and out of it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from purestep._core import maths
from purestep._core.lists import same_layout
from purestep._core.plain import plain
from purestep._executors.chains import FusedChain, absent, details, encodes
from purestep._executors.flat_buffer import small
from purestep._executors.vmap_level import VmapLevel
from purestep._trace.program import Form, Program, program

ExecutorName: TypeAlias = Literal["leaf", "foreach", "fused", "compiled"]
EXECUTOR_NAMES: tuple[ExecutorName, ...] = ("leaf", "foreach", "fused", "compiled")
"""What a user may ask for."""

LEAF_BY_LEAF: frozenset[ExecutorName | None] = frozenset({"leaf"})
"""Those of them that put a call into the mode ``leaf``: the leaf functions themselves run, one parameter at a time."""

Mode: TypeAlias = Literal["leaf", "program", "traced"]


class Ownership(NamedTuple):
    """What a call may overwrite."""

    given: bool = False  # the state, and the parameters if updates are applied: they were given away
    counters: bool = False  # the counters too: no one else holds them
    private: bool = False  # the state belongs to an optimizer, so its version counters need not advance
    copies: bool = False  # the parameters are copies of the caller's, so the new ones may be other tensors


class Env:
    """What surrounds a call, asked once, where it begins.

    The mode is ``leaf`` inside `torch.func`, where autograd records, and where a user asks for it; ``traced`` while
    `torch.compile`, `make_fx` or `torch.export` looks on; and ``program`` otherwise.
    """

    __slots__ = ("level", "mode", "own", "wanted", "writes")

    def __init__(self, mode: Mode, wanted: ExecutorName | None, own: Ownership, tensors: Sequence[Any] = ()) -> None:
        """`tensors` are the gradients and parameters."""
        self.mode: Mode = mode
        self.wanted: ExecutorName | None = wanted
        self.own = own
        self.level = VmapLevel.now() if mode == "leaf" and wanted is None else None  # of vmap, if it can be stepped out of
        self.writes = own.given and wanted in LEAF_BY_LEAF and not maths.recorded(tensors)  # leaf by leaf, in place

    @property
    def overwrites(self) -> bool:
        """Whether what was given away is overwritten: nothing is recorded."""
        return self.writes if self.mode == "leaf" else self.own.given

    @property
    def watched(self) -> bool:
        """Whether something may still turn up that requires grad."""
        return self.mode != "leaf" and torch.is_grad_enabled()

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """For as long as a ``with`` lasts, nothing is overwritten."""
        own, writes = self.own, self.writes
        try:
            self.own, self.writes = own._replace(given=False), False
            yield
        finally:
            self.own, self.writes = own, writes

    def record(self) -> None:
        """From here on everything is recorded by autograd, so nothing is overwritten."""
        self.mode, self.own = "leaf", self.own._replace(given=False)


class Numbers(Protocol):
    """Counters, schedules and hyperparameters as numbers: see `purestep._engine.numbers.Numbers`."""

    def number(self, x: Tensor) -> Any: ...
    def of_chain(self, chain: FusedChain, fields: Any) -> list[Any]: ...
    def equal(self, counters: list[Any]) -> bool: ...
    def counted(self, old: Tensor, x: Any) -> Tensor: ...
    def lower(self, x: Any, count: Tensor | None) -> Any: ...


class Result(NamedTuple):
    """What an executor returns."""

    updates: list[Any]  # or the new parameters, if the task applies the updates
    fields: list[list[Any]]
    """Per transform and field: a list over the parameters, or None where they have no such field. A counter is a list in the
    mode ``leaf``, and in the other modes the number of all of them."""


class Task:
    """A fused chain, and the tensors of the parameters that it is run on.

    `grads` and `params` are lists; `fields` holds, for each transform of the chain, a list of its state's fields, and a field
    is a list over the parameters.
    """

    __slots__ = (
        "_recipe",
        "applies",
        "chain",
        "env",
        "equal",
        "factor",
        "facts",
        "fields",
        "grads",
        "nested",
        "numbers",
        "odd",
        "owns_grads",
        "params",
    )  # fmt: skip

    def __init__(
        self,
        chain: FusedChain,
        lists: tuple[list[Any], list[Any], list[Any]],
        applies: bool,
        env: Env,
        numbers: Numbers,
        recipe: Any = None,
    ) -> None:
        self.chain, self.applies, self.env, self.numbers = chain, applies, env, numbers
        self.grads, self.params, self.fields = lists
        self.factor: Any = None  # what the gradients are still to be multiplied by
        self.odd = False  # some tensors are not plain
        self.owns_grads = False  # the gradients may be overwritten: they are copies in a buffer
        self.nested = False  # another executor runs this task on memory of its own
        self.facts: dict[Any, Any] | None = None  # what is known of these tensors, which look as in an earlier call
        self._recipe = recipe
        self.equal: bool | None = None  # whether all parameters have made the same number of updates, if that is known

    def on(self, grads: list[Any], params: list[Any], fields: list[Any], applies: bool | None = None) -> Task:
        """The same chain on other tensors."""
        made = Task(self.chain, (grads, params, fields), self.applies if applies is None else applies, self.env, self.numbers)
        made.factor, made.nested = self.factor, True
        return made

    @property
    def recipe(self) -> Any:
        """What a program is looked up by."""
        if self._recipe is None:
            self._recipe = details(self.chain, absent(self.fields))
        return self._recipe

    def program(self, applies: bool, owns: bool, given: bool, form: Form = "lists") -> Program:
        """The program of this chain."""
        return program(self.recipe, applies, owns, given, *self.chain.declarations, form=form)

    @property
    def like(self) -> list[list[Tensor]]:
        """The fields that are of the parameters' shapes."""
        found = [own[f] for (_, _, info), own in zip(self.chain.items, self.fields) for f in info.tensors]
        return [c for c in found if c[0] is not None]

    @property
    def columns(self) -> list[list[Any]]:
        """The fields that are more than a number for each parameter."""
        return [own[f] for (_, _, info), own in zip(self.chain.items, self.fields) for f in info.columns]

    @property
    def counters_equal(self) -> bool:
        """Whether all parameters have made the same number of updates, as far as can be seen without reading a tensor."""
        if self.equal is None:
            self.equal = self._have_equal_counters()
        return self.equal

    def _have_equal_counters(self) -> bool:
        columns = [c for (_, _, info), own in zip(self.chain.items, self.fields) for c, s in zip(own, info.scalars) if s]
        return all([same_number(c) or self.numbers.equal(c) for c in columns])

    def fact(self, name: str) -> Any:
        """One of `FACTS`; looked for once, if the guard of an earlier call has found the same tensors."""
        if self.facts is None:
            return FACTS[name](self)
        key = (name, self.chain.structure, self.applies)
        if key not in self.facts:
            self.facts[key] = FACTS[name](self)
        return self.facts[key]

    def arranged(self) -> Arranged:
        """The fields as a program takes and returns them."""
        number, columns, places = self.numbers.number, [], []
        news: list[list[Any]] = []
        for own in self.fields:
            news.append([None] * len(own))  # noqa: PERF401  (a comprehension is a call)
        for j, ((_, value, info), own) in enumerate(zip(self.chain.items, self.fields)):
            for f, (c, scalar) in enumerate(zip(own, info.scalars)):
                if c[0] is None:
                    continue
                if scalar and value.declaration.state is None:
                    news[j][f] = number(c[0]) + 1
                    continue
                columns.append(number(c[0]) if scalar else c)
                places.append((j, f))
        return Arranged(columns, places, news)

    def all_numbers(self) -> list[Any]:
        """The numbers that a program takes, except counters."""
        chain = self.chain
        numbers = self.numbers.of_chain(chain, self.fields) if chain.numbers is None else chain.numbers
        return [self.factor, *numbers] if chain.scaled else numbers


class Arranged(NamedTuple):
    """The fields of a state as a program takes them."""

    columns: list[Any]  # lists, and numbers
    places: list[tuple[int, int]]  # the transform and the field of each
    news: list[list[Any]]  # the new fields: None, except the counters of transforms without a state, which no program sees


def same_number(counters: list[Any]) -> bool:
    """Whether all counters are the same number, as far as can be seen without reading any."""
    first = counters[0]
    if all([x is first for x in counters]):
        return True
    if torch.compiler.is_compiling() or any([x is None or x.requires_grad for x in counters]):
        return False
    places = maths.places(counters)
    return places.count(places[0]) == len(places)


# ----------------------------------------------------------------------------------------------------------------- facts


def in_order(task: Task) -> bool:
    """Whether a kernel may be given these tensors: it reads memory in order, whatever sizes and strides say."""
    params, chain = task.params, task.chain.tail
    n = len(task.chain.items) - len(chain.items)
    dtype, shapes = params[0].dtype, [p.shape for p in params]
    lists = [task.grads, params, *[own[f] for (_, _, info), own in zip(chain.items, task.fields[n:]) for f in info.tensors]]
    for x in lists:
        if not plain(x) or [t.dtype for t in x].count(dtype) != len(x) or [t.shape for t in x] != shapes:
            return False
    return all([all(map(Tensor.is_contiguous, x)) for x in lists]) or all([same_layout(ts) for ts in zip(*lists)])


def packable(task: Task) -> bool:
    """Whether these are many small tensors of one dtype, on the CPU, each list of which may as well be one vector."""
    params = task.params
    if not (small(params) and small(task.grads)):
        return False
    dtype, shapes = params[0].dtype, [p.shape for p in params]
    lists = [task.grads, *task.like]
    return all([x.dtype for x in xs].count(dtype) == len(shapes) and [x.shape for x in xs] == shapes for xs in lists)


def ordinary(task: Task) -> bool:
    """Whether all tensors are plain, of one dtype, and contiguous."""
    return all_ordinary([task.grads, task.params, *task.columns], task.params[0].dtype)


def all_ordinary(lists: list[list[Tensor]], dtype: torch.dtype) -> bool:
    """Whether all tensors in these lists are plain, of this dtype, and contiguous. None is no tensor."""
    lists = [xs for xs in lists if xs and xs[0] is not None]
    return plain(*lists) and all([all([x.dtype is dtype and x.is_contiguous() for x in xs]) for xs in lists])


def mixed(task: Task) -> bool:
    """Whether the state has another dtype than the parameters, or numbers of few bits are computed with in many."""
    dtype, n = task.params[0].dtype, len(task.params)
    encoded = set(task.chain.encoded)
    for j, ((_, _, info), own) in enumerate(zip(task.chain.items, task.fields)):
        for f in info.columns:
            c = own[f]
            if c[0] is not None and (j, f) not in encoded and [x.dtype for x in c].count(dtype) != n:
                return True
    return dtype.itemsize < 4 and encodes(task.chain, task.fields)


FACTS: dict[str, Callable[[Task], Any]] = {
    "in order": in_order, "packable": packable, "mixed": mixed, "ordinary": ordinary,
}  # fmt: skip
"""What executors ask of tensors; it depends on their types, dtypes, devices, shapes and strides alone, which guards look at."""


# -------------------------------------------------------------------------------------------------------------- registry


class Executor(Protocol):
    """A way to run a task."""

    modes: tuple[Mode, ...]
    name: str
    when: str  # the sentence of the table in docs/concepts.md: which tasks it takes
    how: str  # and how it runs them

    def declines(self, task: Task) -> str | None:
        """Why it does not take a task, or None if it does. Nothing is written before."""
        ...

    def run(self, task: Task) -> Result | None:
        """The updates and the new state; None if it turns out on the way, before anything is written, that it cannot."""
        ...

    def workspace(self, task: Task) -> int:
        """How many bytes of buffers it keeps for the next step."""
        ...


class Base:
    """What most executors have in common."""

    modes: tuple[Mode, ...] = ("leaf", "program", "traced")
    """The modes in which it is asked."""

    def workspace(self, task: Task) -> int:
        """How many bytes of buffers it keeps for the next step."""
        return 0


EXECUTORS: list[Executor] = []
"""In the order in which they are asked; filled by `register`."""

ASKED: dict[Mode, list[Executor]] = {"leaf": [], "program": [], "traced": []}
"""The same for each mode."""


def register(*executors: Executor) -> None:
    """Ask these executors, in this order, whether they take a task, in the modes that they are for.

    The last of each mode takes every task.
    """
    EXECUTORS[:] = executors
    for mode, asked in ASKED.items():
        asked[:] = [executor for executor in executors if mode in executor.modes]


class Decision(NamedTuple):
    """Which executor took the last task of a chain, and what this followed from."""

    facts: dict[Any, Any]
    asked: Asked
    executor: Executor


Asked: TypeAlias = tuple[bool, "ExecutorName | None", bool]
"""Whether the updates are applied, which executor a user wants, and whether the memory was given away."""


def decided(chain: FusedChain, recipe: Any, facts: dict[Any, Any], asked: Asked) -> Executor | None:
    """The executor that took such a task on tensors of which these facts are known; None if there was none."""
    last: Decision | None = chain.decision
    if last is not None and last.facts is facts and last.asked == asked:
        return last.executor
    found: Executor | None = facts.get((chain.structure, recipe, asked))
    if found is not None:
        chain.decision = Decision(facts, asked, found)
    return found


class Decided(NamedTuple):
    """What `explain` is told of a task, or of a whole transform."""

    names: str
    executor: str
    params: list[Any]
    mode: str
    nested: bool
    declined: dict[str, str]
    workspace: int = 0  # bytes of buffers


class Watch(threading.local):
    """What `explain` listens to: what is decided in this thread, while it lasts."""

    decided: list[Decided] | None = None
    reasons: Callable[[Task, str], dict[str, str]] | None = None


WATCH = Watch()


def execute(task: Task) -> Result:
    """Run a task with the first executor that takes it.

    Where a guard has found the tensors of an earlier call, it is the executor that took them then.
    """
    env, facts = task.env, task.facts
    if facts is None or env.mode != "program" or task.nested or WATCH.decided is not None:
        return decide(task)[1]
    asked = (task.applies, env.wanted, env.own.given)
    last: Decision | None = task.chain.decision
    same = last is not None and last.facts is facts and last.asked == asked
    executor = last.executor if same and last is not None else decided(task.chain, task.recipe, facts, asked)
    found = None if executor is None else executor.run(task)
    if found is None:
        executor, found = decide(task)
        facts[task.chain.structure, task.recipe, asked] = executor
    return found


def decide(task: Task) -> tuple[Executor, Result]:
    """The executor that takes a task, and what it returns."""
    for executor in ASKED[task.env.mode]:
        if executor.declines(task) is None:
            place = None if WATCH.decided is None else len(WATCH.decided)
            found = executor.run(task)
            if found is not None:
                if place is not None:
                    tell(task, executor, place)
                return executor, found
    raise AssertionError("The last executor takes every task.")


def tell(task: Task, executor: Executor, place: int) -> None:
    """Tell `explain` which executor ran a task; those that it ran inside, from `place` on, come after it."""
    decided, why = WATCH.decided, WATCH.reasons
    if decided is not None:
        declined = {} if why is None else why(task, executor.name)
        names, env = task.chain.names, task.env
        decided.insert(
            place, Decided(names, executor.name, task.params, env.mode, task.nested, declined, executor.workspace(task))
        )


def run_plain(task: Task) -> Result:
    """Run a task on plain tensors, and advance the versions of what was overwritten below autograd's sight."""
    found = execute(task)
    env = task.env
    if env.mode == "program" and env.own.given:
        overwritten = list(task.params) if task.applies else []
        if not env.own.private:
            overwritten += [x for column in task.columns for x in column if x is not None]
        torch.autograd.graph.increment_version(overwritten)
    return found
