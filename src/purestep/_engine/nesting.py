"""Transforms that wrap others: what the function of such a transform sees of the ones inside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from purestep._core import maths
from purestep._core.lists import overwrite, pick, put
from purestep._core.plain import plain
from purestep._core.primitives import Fields
from purestep._core.torch_api import foreach_add, foreach_add_, foreach_zero_, tree_leaves
from purestep._core.tree import described
from purestep._engine.plan import ParamSlice
from purestep._executors.task import Env


class Inner:
    """A transform inside another, as the function of that one sees it.

    It is pure, as a `Transform` is, but takes and returns lists over the parameters; its state is a value to be passed on.
    Extra arguments and masks are seen to.
    """

    def __init__(self, run: Any, groups: Sequence[ParamSlice], rows: list[int] | None, apply: bool, gives: bool) -> None:
        self._around = run  # the `purestep._engine.run.Run` of the transform that wraps this one
        self._env: Env = run.env
        self._apply = apply  # what are called updates here are new parameters, then
        self._gives = gives  # the function around it does not raise after an update
        self._rows, self._groups, self._fields = rows, groups, groups[0].plan.fields
        if rows is not None:
            below = [len([k for k in rows if k < g.rows.start]) for g in groups] + [len(rows)]
            self._groups = [ParamSlice(g.plan, range(*ends)) for g, *ends in zip(groups, below, below[1:])]

    def update(self, gs: list[Tensor], state: Any, params: list[Tensor], *, donate: bool = False) -> tuple[list[Tensor], Any]:
        """The updates and the new state.

        Args:
            gs: the gradients.
            state: what the field `inner` of the state holds, or what the last update returned.
            params: the parameters.
            donate: promises that `state` will not be looked at again, so that its memory can be reused if the user gave it
                away.

        Returns:
            the updates, a list in the shapes of `params`, and the new state, to be put in the field `inner`.
        """
        return self._run(gs, state, params, self._apply, donate)

    def step(self, gs: list[Tensor], state: Any, params: list[Tensor], *, donate: bool = False) -> tuple[list[Tensor], Any]:
        """The new parameters and the new state, for a function that `moves`: `update`, and to apply the updates.

        Args:
            gs: the gradients.
            state: as in `update`.
            params: the parameters.
            donate: promises that neither `state` nor `params` will be looked at again.

        Returns:
            the new parameters, a list in the shapes of `params`, and the new state.
        """
        return self._run(gs, state, params, True, donate and self._around.moved)

    def _run(self, gs: Any, state: Any, params: Any, apply: bool, donate: bool) -> tuple[list[Tensor], Any]:
        states = [list(s) for s in state]
        result: tuple[list[Tensor], Any] = self._around.nested(
            self, (list(gs), list(params), states), apply, donate and self._gives
        )
        return result

    def when(
        self, flag: Any, gs: list[Tensor], state: Any, params: list[Tensor], otherwise: list[Tensor] | None = None
    ) -> tuple[list[Tensor], Any]:
        """`update` where `flag` holds; elsewhere the updates are `otherwise`, and the state stays as it is.

        Where the flag can be read (on a CPU, outside `torch.func`), what is not wanted is not computed. `state` must not be
        looked at again.

        Args:
            flag: a bool, or a 0-d tensor of one, which may differ in each member of a batch.
            gs: the gradients.
            state: as in `update`.
            params: the parameters.
            otherwise: by default nothing, so that the parameters keep every bit.

        Returns:
            the updates, a list in the shapes of `params`, and the state.
        """
        env, flag = self._env, self.read(flag)
        if flag is True:
            return self.update(gs, state, params, donate=True)
        if self._apply:
            otherwise = params if otherwise is None else [(p + u).to(p.dtype) for p, u in zip(params, otherwise)]
        elif otherwise is None:
            otherwise = [torch.zeros_like(g).neg() for g in gs]  # minus zero: adding zero would make 0 of -0
        if flag is False:
            return otherwise, state
        if env.mode != "program":  # the derivative of what is not taken must be finite, too
            gs = maths.select(flag, gs, [torch.zeros_like(g) for g in gs])
        us, new = self.update(gs, state, params)
        after = maths.select(flag, new, state)
        return maths.select(flag, us, otherwise), [
            reused(env, (old, x, ()), f) for old, x, f in zip(state, after, self._fields)
        ]

    def plus(self, xs: list[Tensor], ys: list[Tensor], k: Any = 1) -> list[Tensor]:
        """Tensors of the state plus a `k`-th of others; in their own memory, if that was given away.

        Args:
            xs: the tensors of the state, which must not be used again.
            ys: the others, in the same shapes.
            k: the divisor, a number or a 0-d tensor.

        Returns:
            a list in the shapes of `xs`.
        """
        if self._env.mode == "program" and isinstance(k, Tensor) and k.is_cpu:
            k = k.item()
        if self._env.mode != "program" or isinstance(k, Tensor) or not plain(xs, ys):
            return [(x + y / k).to(x.dtype) for x, y in zip(xs, ys)]
        plan = self._groups[0].plan
        if not self._env.own.given or plan.last_call >= 0 or plan.structure.foreign:  # functions of a user's may raise after it
            return [z.to(x.dtype) for z, x in zip(foreach_add(xs, ys, alpha=1 / k), xs)]  # as in place
        foreach_add_(xs, ys, alpha=1 / k)
        return xs

    def emptied(self, xs: list[Tensor], used: Any) -> list[Tensor]:
        """Zeros in place of tensors of the state, in their own memory if it was given away and nothing else is in it.

        Args:
            xs: the tensors, which must not be used again.
            used: the updates and the state that `update` has made of them. What it does in place is in memory of its own.

        Returns:
            a list in the shapes of `xs`.
        """
        own = self._apply and not any([stage.whole for stage in self._groups[0].plan.stages])
        if self._env.mode == "program" and self._env.own.given and plain(xs) and (own or not shared(xs, used)):
            foreach_zero_(xs)
            return xs
        return [torch.zeros_like(x) for x in xs]

    def received(self, gs: list[Tensor]) -> list[Tensor]:
        """Those gradients that can reach a parameter or a state: all but those that the transform drops.

        It drops the gradient of a parameter that is frozen in it: one on which `purestep.freeze` or `purestep.set_to_zero` is
        the first to act, or comes after leafwise transforms that keep nothing.

        Args:
            gs: the gradients, in the order of the parameters.

        Returns:
            a list of some of `gs`, or `gs` itself.
        """
        if not self._groups[0].plan.structure.drops:
            return gs
        mask, rows = self._around.inputs.mask, self._rows
        chosen: list[Tensor] = []
        for plan, part in self._groups:
            reads = plan.reads(lambda masks: pick(mask(masks), rows)[part.start : part.stop], len(part))  # noqa: B023
            chosen += [gs[k] for k, yes in zip(part, reads) if yes]
        return chosen

    def read(self, flag: Any) -> Any:
        """A flag as a bool, if there is no one to wait for: on a CPU, outside `torch.func` and `torch.compile`.

        Args:
            flag: a bool, or a 0-d tensor.

        Returns:
            a bool, or a 0-d tensor of one.
        """
        if isinstance(flag, Tensor):
            return bool(flag) if self._env.mode == "program" and flag.is_cpu else flag.bool()
        return bool(flag)

    def state(self, states: Sequence[Any]) -> list[Any]:
        """The state of the transforms inside, of the parameters that take part.

        Args:
            states: for each transform, the fields of its state: lists over all parameters, or values of its own.

        Returns:
            the same, with lists over the parameters that take part.
        """
        return [[pick(c, self._rows) if leaf else c for c, leaf in zip(s, f.leaves)] for s, f in zip(states, self._fields)]

    def put(self, olds: Sequence[Any], news: Sequence[Any]) -> list[Any]:
        """The new state, with that of the other parameters as it was.

        Args:
            olds: the old state, over all parameters.
            news: the new one, over those that take part.

        Returns:
            the new state, over all parameters.
        """
        if self._rows is None:
            return [list(s) for s in news]
        return [
            [put(x, self._rows, y) if leaf else y for x, y, leaf in zip(old, new, f.leaves)]
            for old, new, f in zip(olds, news, self._fields)
        ]


def reused(env: Env, states: tuple[Sequence[Any], Sequence[Any], Any], info: Fields) -> list[Any]:
    """New fields in the memory of the old ones, if that was given away, and where neither they nor the updates are in it.

    `states` are the old state, the new one, and the updates. Counters may be someone else's, too.
    """
    olds, news, updates = states
    result = list(news[: len(info.names)])
    if not env.own.given or env.mode != "program":
        return result
    columns = [old if leaf else [old] for old, leaf in zip(olds, info.leaves)]
    held = {id(x) for column in columns for x in column}
    for f, (old, leaf) in enumerate(zip(columns, info.leaves)):
        new = result[f] if leaf else [result[f]]
        pairs = [(x, y) for x, y in zip(old, new) if isinstance(x, Tensor) and isinstance(y, Tensor)]
        mine = env.own.counters or (leaf and not info.scalars[f])
        if not pairs or not mine or any([id(y) in held for _, y in pairs]):
            continue
        if leaf and shared([x for x, _ in pairs], updates):
            continue
        overwrite(*map(list, zip(*pairs)))
        result[f] = [y if x is None else x for x, y in zip(old, new)] if leaf else old[0]
    return result


def shared(xs: list[Tensor], used: Any) -> bool:
    """Whether any of these tensors, or a view of it, is found elsewhere, or may be."""
    found = [y for y in tree_leaves(used) if isinstance(y, Tensor)]
    if not plain(xs, found):
        return True  # what is not plain need not say where its numbers are
    memory = {x.untyped_storage()._cdata for x in xs}
    return any([y.untyped_storage()._cdata in memory for y in found])


def check_nested(d: Any, after: Any, count: int) -> None:
    """Refuse what a nested transform returned in place of its state and that of so many links."""
    if not isinstance(after, d.state) or not isinstance(after.inner, list) or len(after.inner) != count:
        got = f"has {described(after.inner)} there" if isinstance(after, d.state) else f"is {described(after)}"
        raise TypeError(
            f"{d.name} must return (updates, {d.state.__name__}) with the state of the inner transform in its field 'inner', "
            f"but its second value {got}."
        )
