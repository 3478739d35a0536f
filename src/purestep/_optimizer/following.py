"""Options of parameter groups that follow a schedule.

The tools around an optimizer expect numbers in its groups, so a group shows the number that the last step used, and the
schedule is kept beside the groups. `scheduled_lr` in the group is the number that the optimizer has shown for `lr`: where the
group's `lr` is another, somebody has written it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain as chained
from typing import Any

from torch import Tensor

from purestep._core.hyper import several
from purestep._core.maths import readable
from purestep._core.values import Schedule, as_schedule
from purestep._optimizer.selection import Contents
from purestep.schedules.pieces import scale
from purestep.transform import Transform

SHOWN = "scheduled_"
"""What the number that the optimizer has shown for an option is called in the group: this and the option's name."""

INITIAL = "initial_"
"""What a scheduler of torch's calls the number that it begins with: this and the option's name."""


class Following:
    """A schedule that an option of a group follows."""

    def __init__(self, schedule: Any) -> None:
        self.schedule = schedule  # or a tuple with schedules among its numbers
        self.steps = 0  # that were made where the counter of the state cannot be read without waiting
        self.scaled: tuple[Any, Any] = (1.0, schedule)  # a factor, and the schedule times this factor

    def option(self, group: Mapping[str, Any], name: str) -> Any:
        """What the transform is given: the schedule, the schedule times a scheduler's factor, or what replaces it.

        Raises:
            ValueError: a scheduler began at 0, which no factor can be read from.
        """
        written, initial = group[name], group.get(INITIAL + name)
        if group.get(SHOWN + name) is None:
            return written
        if initial is None or isinstance(self.schedule, tuple):
            return self.schedule if equal(written, group[SHOWN + name]) else written
        if not isinstance(initial, Tensor) and initial == 0:
            raise ValueError(
                f"A scheduler multiplies the schedule of {name!r} by group[{name!r}] / group[{INITIAL + name!r}], but the "
                f"group's {INITIAL + name!r} is 0. Set it to the number that means a factor of 1."
            )
        factor = written / initial
        if not equal(factor, self.scaled[0]):
            self.scaled = factor, self.schedule if equal(factor, 1.0) else scale(self.schedule, factor)
        return self.scaled[1]

    def replaced(self, group: Mapping[str, Any], name: str) -> bool:
        """Whether somebody has written a number that replaces the schedule."""
        shown = group.get(SHOWN + name)
        if shown is None or (INITIAL + name in group and not isinstance(self.schedule, tuple)):
            return False
        return not equal(group[name], shown)

    def at(self, steps: int) -> Any:
        """The number of the last of these steps. Before the first step it is that of the first one; if that is 0, which a
        scheduler cannot multiply, that of the second."""
        value = number(self.schedule, max(steps - 1, 0))
        return number(self.schedule, 1) if steps == 0 and value == 0 else value


def follows(x: Any) -> bool:
    """Whether an option is a schedule, or a tuple with one among its numbers."""
    if several(x):
        return any(map(follows, x))
    return isinstance(x, Schedule) or (callable(x) and not isinstance(x, (type, Tensor)))


def kept(x: Any) -> Any:
    """An option with functions of the step as schedules, and with a tuple or list for other sequences."""
    if several(x) and (type(x) not in (tuple, list) or follows(x)):
        return tuple(map(kept, x))
    made: Any = x
    return as_schedule(made) if follows(made) else made


def number(x: Any, step: int) -> Any:
    """An option at a step, a number where it can be read."""
    if isinstance(x, tuple):
        return tuple([number(y, step) for y in x])
    if isinstance(x, Schedule):
        return number(x(step), step)
    if isinstance(x, Tensor):
        return x.item() if readable(x) and x.numel() == 1 else x.detach()
    return x


def equal(a: Any, b: Any) -> bool:
    """Whether two numbers, or tuples of them, are the same; NaN is the same as NaN. A tensor is the same as itself only."""
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and bool(a == b or (a != a and b != b)))


class Schedules:
    """The schedules that the options of an optimizer's groups follow."""

    def __init__(self) -> None:
        self.found: dict[int, tuple[dict[str, Any], dict[str, Following]]] = {}  # by the group's id

    def of(self, group: Mapping[str, Any]) -> dict[str, Following]:
        """Those of one group, by the names of the options."""
        if not self.found:  # a dict's id cannot be compiled (2.9)
            return {}
        found = self.found.get(id(group))
        return found[1] if found is not None and found[0] is group else {}

    def take(self, group: dict[str, Any], names: Iterable[str]) -> None:
        """Keep the schedules that these options are, and show numbers in their place."""
        for name in names:
            if follows(group[name]):
                self.put(group, name, Following(kept(group[name])), 0)

    def put(self, group: dict[str, Any], name: str, following: Following, steps: int | None) -> None:
        """Let an option follow a schedule; the group shows its number after these steps, or goes on showing what it does."""
        found = self.found.get(id(group))
        if found is None or found[0] is not group:
            found = self.found[id(group)] = (group, {})
        found[1][name] = following
        if steps is not None:
            group[name] = group[SHOWN + name] = following.at(steps)

    def options(self, group: Mapping[str, Any]) -> Mapping[str, Any]:
        """A group with schedules in the place of the numbers that it shows."""
        found = self.of(group)
        return {**group, **{name: x.option(group, name) for name, x in found.items() if name in group}} if found else group

    def settle(self, groups: Iterable[dict[str, Any]]) -> None:
        """Note in the groups which schedules have been replaced by a number."""
        for group in groups:
            for name, x in self.of(group).items():
                if name in group and x.replaced(group, name):
                    group[SHOWN + name] = None

    def show(self, contents: Contents, transforms: list[Transform], exactly: bool = False) -> None:
        """Show in the groups the numbers that schedules had at the last step.

        A counter on a device is waited for only if the numbers are to be shown `exactly`; else the steps are counted here.
        """
        if len(self.found) > len(contents.groups):  # some groups have been taken away: their parameters are not kept alive
            there = set(map(id, contents.groups))
            self.found = {key: entry for key, entry in self.found.items() if key in there}
        for group, transform in zip(contents.groups, transforms):
            for name, x in self.of(group).items():
                if group.get(SHOWN + name) is None or INITIAL + name in group:
                    continue
                count = updates(contents, group, transform, x.option(group, name))
                if count is not None and (not isinstance(count, Tensor) or readable(count) or (exactly and not count.is_meta)):
                    x.steps = int(count)
                group[name] = group[SHOWN + name] = x.at(x.steps)

    def by_place(self, groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """The schedules of these groups, to be given to others."""
        return [{name: x.schedule for name, x in self.of(group).items()} for group in groups]

    @classmethod
    def resumed(cls, groups: list[dict[str, Any]], places: list[dict[str, Any]]) -> Schedules:
        """The schedules of groups that were loaded. What they show was shown before they were saved."""
        made = cls()
        for group, own in zip(groups, places):
            for name, schedule in own.items():
                if name in group and not follows(group[name]):
                    group.setdefault(SHOWN + name, group[name])
                    made.put(group, name, Following(schedule), None)
        return made


def updates(contents: Contents, group: dict[str, Any], transform: Transform, schedule: Any) -> Any:
    """How many updates the part of a transform that follows this schedule has made, of the first parameter that moved."""
    wanted = {id(x) for x in (schedule if isinstance(schedule, tuple) else (schedule,)) if follows(x)}
    for link, names, info in zip(transform.links, transform.plan.keys, transform.plan.fields):
        given = link.transform.arguments.values()
        if info.step < 0 or not wanted & {id(y) for x in given for y in (x if isinstance(x, tuple) else (x,))}:
            continue
        key = names[info.step]
        if not info.leaves[info.step]:
            return contents.shared.get(key)
        states = [(p, s) for p in group["params"] if (s := contents.of(p)) and key in s]
        return next(chained([s[key] for p, s in states if p.grad is not None], [s[key] for _, s in states]), None)
    return None
