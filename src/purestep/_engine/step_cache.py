"""The step cache: a step like the last one.

Training takes the same step again and again: the same tensors, with new gradients and numbers. A guard (`GuardCache`) knows
the tensors of the last step by their types, dtypes, devices, shapes and strides; what executors found out about them (`facts`,
and which executor took them) holds as long as the guard matches. A plan that is one fused chain with plain numbers is a
`RepeatedStep`: it knows where in the state each field is.

What it assumes, and where that is checked:

* the tensors look as in the last step: `Guard.matches`, which also fails in another grad mode, inside `torch.func`, or
  where one tensor is there twice;
* all parameters have made the same number of updates: the counters are read at every step;
* a counter is where it was: its address is compared at every step (`GuardCache.span`);
* a counter can count on in its dtype: it is below `STOP`, or no float32;
* the chain is the one that was decided about: `FusedChain.structure` and the recipe are part of the key;
* nothing records or traces: `choose`.

Of sharded tensors it takes the parts that are here, which are plain tensors. What that assumes beside:

* gradients and states are spread as their parameters are, and no parameter is a sum of terms: `GuardCache.parts`, which
  compares all of them again as soon as the description of one is another object;
* the chain is elementwise: `RepeatedStep.elementwise`.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from itertools import chain as flat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from purestep._core.plain import PLAIN, plain
from purestep._core.threads import Sizes
from purestep._core.torch_api import BelowAutograd, foreach_copy_
from purestep._engine.counters import stopped
from purestep._engine.guards import GuardCache
from purestep._engine.numbers import Numbers
from purestep._engine.plan import Plan
from purestep._engine.run import choose, one
from purestep._executors.chains import FusedChain, Kernel, details
from purestep._executors.leaf_function import STOP
from purestep._executors.task import Env, ExecutorName, Ownership, Task, decided, execute
from purestep._trace.program import program

PRIVATE = Ownership(given=True, private=True)
"""An optimizer's own step: the state is its own, and it writes the counters itself."""

ZERO = torch.zeros(())
"""The counter of what does not count."""


class RepeatedStep(NamedTuple):
    """A plan that is one fused chain with plain numbers, and where the fields of its state are."""

    chain: FusedChain
    kernel: Kernel | None
    names: tuple[str, ...]  # of the fields that are more than a number per parameter, as a kernel knows them
    keys: tuple[str, ...]  # the same, as the chain's state calls them
    places: tuple[tuple[int, int], ...]  # the item of the chain and the number of each of these fields
    counters: tuple[tuple[str, int, int], ...]  # the key, the item and the number of those that are one number
    recipe: Any  # of the program
    hypers: dict[str, Any]  # as a kernel takes them

    @classmethod
    def of(cls, plan: Plan) -> RepeatedStep | None:
        """None if there is more to a plan."""
        stage = plan.stages[0]
        chain = plan.fused_chain(stage.positions) if len(plan.stages) == 1 and stage.positions and not stage.masked else None
        if chain is None or chain.numbers is None or chain.first or len(plan.tensors) > len(plan.hypers):
            return None
        places = tuple([(j, f) for j, (_, _, info) in enumerate(chain.items) for f in info.columns])
        names, keys = [], []
        for j, f in places:
            i, _, info = chain.items[j]
            names.append(info.names[f])
            keys.append(plan.keys[i][f])
        counters = tuple(
            [(plan.keys[i][f], j, f) for j, (i, _, info) in enumerate(chain.items) for f, s in enumerate(info.scalars) if s]
        )
        recipe = details(chain, chain.structure.present)
        return cls(chain, chain.kernel, tuple(names), tuple(keys), places, counters, recipe, chain.hypers)

    def again(
        self,
        guards: GuardCache,
        grads: list[Any],
        params: list[Tensor],
        states: Sequence[Mapping[str, Any]],
        executor: ExecutorName | None = None,
    ) -> bool:
        """Make the last step again, with new gradients and numbers.

        Args:
            guards: what is known of the tensors of the last step.
            grads: the gradients.
            params: the parameters, which are overwritten.
            states: the state of each parameter by the names of its fields; it is overwritten.
            executor: which executor a user wants.

        Returns:
            whether the step was made. If not, nothing has changed: something else than gradients and numbers is new.
        """
        columns: list[list[Any]] = []
        counters: list[list[Any]] = []
        try:
            for key in self.keys:
                columns.append([s[key] for s in states])  # noqa: PERF401  (a comprehension around it is one call more)
            for key, _, _ in self.counters:
                counters.append([s[key] for s in states])
        except KeyError:
            return False
        homes = params
        if hasattr(params[0], "full_tensor"):
            parts = guards.parts([params, grads, *columns]) if self.elementwise() else None
            if parts is None:
                return False
            params, grads, *columns = parts
            executor = None if executor == "compiled" else executor  # a part that is empty here may not be so elsewhere
        everything = [*params, *grads, *flat.from_iterable(columns)]
        guard = guards.check(everything)
        if guard is None:
            if not (plain(everything) and self.takes(params, grads, columns)):
                return False
            guard = guards.install(everything)
        facts = None if guard is None else guard.facts
        vectors: list[Tensor] = []
        counts: list[Any] = []
        for k, column in enumerate(counters):
            vector = guards.span(k, column)
            if vector is None:
                return False
            values = vector.tolist()
            if values.count(values[0]) != len(values) or (values[0] >= STOP and vector.dtype is torch.float32):
                return False
            vectors.append(vector)
            counts.append(values[0])
        self.make((params, grads, columns), counters, vectors, counts, (facts, executor))
        if homes is not params:
            torch.autograd.graph.increment_version(homes)
        return True

    def make(
        self,
        lists: tuple[list[Tensor], list[Tensor], list[list[Tensor]]],
        counters: list[list[Tensor]],
        vectors: list[Tensor],
        counts: list[Any],
        how: tuple[dict[Any, Any] | None, ExecutorName | None],
    ) -> None:
        """The step, in place, with what is known of the tensors and the executor that a user wants.

        `lists` are the parameters, the gradients and the fields; `vectors` are the memory of the counters, and `counts` what
        they say.
        """
        facts, executor = how
        if not self.bound(facts, executor):
            params, grads, columns = lists
            self.repeat((grads, params), columns, counters, vectors, self.numbers(executor, counters, counts), facts)
            return
        for vector, count in zip(vectors, counts):  # several fields may be one counter
            vector.fill_(count + 1)
        self.run(lists, counts[0] if counts else 0, counters[0][0] if counters else ZERO, facts)

    def elementwise(self) -> bool:
        """Whether each element of a parameter is updated by itself, so that a part of a parameter can be updated alone."""
        chain = self.chain
        if chain.structure.elementwise is None:
            recipe = (self.recipe, False, False, False, *chain.declarations)
            chain.structure.elementwise = not chain.arrays and program(*recipe, form="single").elementwise
        return chain.structure.elementwise

    def hits(self, guards: GuardCache, grads: list[Any], params: list[Tensor], states: Sequence[Mapping[str, Any]]) -> bool:
        """Whether `again` would find the tensors of the last step."""
        if not all([key in s for s in states for key in self.keys]):
            return False
        lists: list[list[Any]] = [params, grads, *[[s[key] for s in states] for key in self.keys]]
        if hasattr(params[0], "full_tensor"):
            lists = guards.parts(lists) or []
        return guards.last is not None and guards.last.matches([*flat.from_iterable(lists)])

    def numbers(self, executor: ExecutorName | None, counters: list[list[Tensor]], counts: list[Any]) -> Numbers:
        """What numbers the step takes: the counters have been read."""
        numbers = Numbers(Env("program", executor, PRIVATE))
        for column, count in zip(counters, counts):
            numbers.read[id(column[0])] = count
        return numbers

    def repeat(
        self,
        lists: tuple[list[Any], list[Tensor]],
        columns: list[list[Tensor]],
        counters: list[list[Tensor]],
        vectors: list[Tensor],
        numbers: Numbers,
        facts: dict[Any, Any] | None,
    ) -> None:
        """The program of the plan, in place."""
        fields: list[list[Any]] = []
        for _, _, info in self.chain.items:
            fields.append([None] * len(info.names))
        for (j, f), column in zip(self.places, columns):
            fields[j][f] = column
        for (_, j, f), column in zip(self.counters, counters):
            fields[j][f] = column
        task = Task(self.chain, (*lists, fields), True, numbers.env, numbers, self.recipe)
        task.facts, task.equal = facts, True
        _, news = execute(task)
        for column, (j, f) in zip(columns, self.places):
            if news[j][f] is not column and not all(map(operator.is_, column, news[j][f])):
                foreach_copy_(column, news[j][f])
        for vector, (_, j, f) in zip(vectors, self.counters):
            vector.fill_(news[j][f])
        torch.autograd.graph.increment_version(lists[1])

    def bound(self, facts: dict[Any, Any] | None, executor: ExecutorName | None) -> bool:
        """Whether a kernel has run the last step like this one, so that it can be called at once."""
        if self.kernel is None or facts is None:
            return False
        taken = decided(self.chain, self.recipe, facts, (True, executor, True))
        return taken is not None and taken.name == "fused"

    def at_once(
        self, lists: tuple[list[Any], list[Any]], states: list[Any], facts: dict[Any, Any] | None, executor: ExecutorName | None
    ) -> bool:
        """The update of parameters and states that were given away, all in place, by a kernel that has run the last one.

        Nothing has changed if it is False.
        """
        if not self.bound(facts, executor) or choose(None) != "program":
            return False
        grads, params = lists
        links = [i for i, _, _ in self.chain.items]
        columns = [states[links[j]][f] for j, f in self.places]
        counters = [states[links[j]][f] for _, j, f in self.counters]
        if not all([one(c, "program") and type(c[0]) is Tensor and c[0].is_cpu for c in counters]):
            return False
        counts = [c[0].item() for c in counters]  # they are on the CPU: there is nothing to wait for
        if counts and max(counts) >= STOP and stopped(counters, counts):
            return False
        after = [c[0].fill_(count + 1) for c, count in zip(counters, counts)]  # of which several may be one
        self.run((params, grads, columns), counts[0] if counts else 0, after[0] if after else ZERO, facts)
        torch.autograd.graph.increment_version(flat.from_iterable(columns))
        return True

    def takes(self, params: list[Any], grads: list[Any], columns: list[Any]) -> bool:
        """Whether the kernel may be trusted with these tensors, and nobody asks for derivatives."""
        dtype, shapes, n = params[0].dtype, [p.shape if type(p) in PLAIN else None for p in params], len(params)
        for xs in (params, grads, *columns):
            if not (
                plain(xs)
                and [x.dtype for x in xs].count(dtype) == n
                and [x.shape for x in xs] == shapes
                and all([x.is_cpu and x.layout is torch.strided and x.is_contiguous() for x in xs])
            ):
                return False
        if torch.is_grad_enabled() and any([any([x.requires_grad for x in xs]) for xs in (params, grads, *columns)]):
            return False
        return dtype.is_floating_point

    def run(
        self,
        lists: tuple[list[Tensor], list[Tensor], list[list[Tensor]]],
        before: float,
        after: Tensor,
        facts: dict[Any, Any] | None,
    ) -> None:
        """Call the kernel for parameters, gradients and the fields of the state, in place."""
        params, grads, columns = lists
        given = {**dict(zip(self.names, columns)), "step": lambda: after}
        sizes = None if facts is None else facts.get("sizes")
        if sizes is None and facts is not None:
            sizes = facts["sizes"] = Sizes.of(params)
        with BelowAutograd():
            self.kernel.run(params, grads, given, self.hypers, before, sizes=sizes)  # type: ignore[union-attr]  # `bound` asked
        torch.autograd.graph.increment_version(params)


def repeatable(plan: Plan) -> RepeatedStep | None:
    """A plan as a repeated step, if it can be one; found out once."""
    if plan.repeated is ...:
        plan.repeated = RepeatedStep.of(plan)
    found: RepeatedStep | None = plan.repeated
    return found
