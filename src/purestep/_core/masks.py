"""Which parameters a transform acts on: masks, and labels, which give each parameter to one of several transforms."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from purestep._core.tree import Spec, flatten_like, quote


class Not(NamedTuple):
    """A mask: where another is False."""

    mask: Any


class Labels:
    """A function `(path, param) -> label` or a pytree of labels, and the labels there may be."""

    __slots__ = ("known", "labels")

    def __init__(self, labels: Any, known: tuple[str, ...]) -> None:
        self.labels, self.known = labels, known

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Labels) and (self.labels, self.known) == (other.labels, other.known)

    def __hash__(self) -> int:
        return hash(self.known)

    def of(self, params: Sequence[Any], spec: Spec) -> list[Any]:
        """The label of each parameter; None where there is None instead of one.

        Raises:
            ValueError: there is no such label; the error names the first path that has it, and the labels there are.
        """
        if callable(self.labels):
            found = [None if p is None else self.labels(path, p) for path, p in zip(spec.paths(), params)]
        else:
            found = [None if p is None else x for x, p in zip(flatten_like(self.labels, spec, "labels"), params)]
        for path, x, p in zip(spec.paths(), found, params):
            if p is not None and x not in self.known:
                close = difflib.get_close_matches(str(x), self.known, 1)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                raise ValueError(
                    f"The label of {quote(path)} is {x!r}, but partition has {', '.join(map(repr, self.known))}.{hint}"
                )
        return found


class Label(NamedTuple):
    """A mask: where the label is this one."""

    labels: Labels
    label: str


def route(masks: Sequence[Any]) -> str:
    """The labels among some masks as one, the outermost first: `'hidden'`, `'encoder.hidden'`; empty if there are none."""
    return ".".join([str(m.label) for m in reversed(masks) if isinstance(m, Label)])


MaskCache = dict[Any, list[Any]]


def select(masks: Sequence[Any], params: Sequence[Any], spec: Spec, memo: MaskCache | None = None) -> list[bool]:
    """Whether each parameter is under all of these masks. An inner one, first in the list, is asked only about what is left.

    `memo` keeps labels that several masks ask for.
    """
    on = [p is not None for p in params]
    for mask in reversed(masks):
        on = evaluate(mask, [p if yes else None for p, yes in zip(params, on)], spec, {} if memo is None else memo)
    return on


def evaluate(mask: Any, params: Sequence[Any], spec: Spec, memo: MaskCache) -> list[bool]:
    """A mask as one bool per parameter; False where there is None instead of one.

    Raises:
        TypeError: if it answers with anything but a bool, with the path it did so for.
    """
    if isinstance(mask, bool):
        return [mask and p is not None for p in params]
    if isinstance(mask, Not):
        return [not yes and p is not None for yes, p in zip(evaluate(mask.mask, params, spec, memo), params)]
    if isinstance(mask, Label):
        key = (id(mask.labels), *[p is None for p in params])
        if key not in memo:
            memo[key] = mask.labels.of(params, spec)
        return [x == mask.label for x in memo[key]]
    if callable(mask):
        values: list[Any] = [p is not None and mask(path, p) for path, p in zip(spec.paths(), params)]
    else:
        values = [p is not None and x for x, p in zip(flatten_like(mask, spec, "mask"), params)]
    if set(map(type, values)) <= {bool}:
        return values
    for path, x in zip(spec.paths(), values):
        if not isinstance(x, bool):
            raise TypeError(
                f"A mask must be True or False for every parameter, but for {quote(path)} it is {x!r} "
                f"({type(x).__name__}). Give (path, param) -> bool, or a pytree of bools shaped like params."
            )
    return values


def refuse_unused(masks: Iterable[Any], memo: MaskCache) -> None:
    """Refuse labels that no parameter has, when `memo` knows the labels of all parameters: they are likely misspelt.

    Raises:
        ValueError: the error names them, and the labels there are.
    """
    for labels in {id(m.labels): m.labels for m in masks if isinstance(m, Label)}.values():
        found = {x for key, xs in memo.items() if key[0] == id(labels) for x in xs} - {None}
        unused = [x for x in labels.known if x not in found]
        if found and unused:
            raise ValueError(
                f"No parameter has the label {' or '.join(map(repr, unused))}: their labels are "
                f"{', '.join(map(repr, sorted(found)))}. Correct the labels, or leave the transforms that have no parameters "
                "out of partition."
            )


def refuse_unmatched(masks: Iterable[Any], paths: Sequence[str]) -> None:
    """Refuse patterns that are found in no path at all: they are likely misspelt, and another rule decides in their place.

    A rule that is only asked about some of the parameters, because it is another's default or under another mask, is compared
    with the paths of all of them.

    Raises:
        ValueError: the error names the pattern, and some of the paths.
    """
    for rule in rules_in(masks):
        for pattern in rule.table if isinstance(rule, by_path) and paths else ():
            if not any([re.search(pattern, path) for path in paths]):
                there = "the path of a bare tensor is empty" if list(paths) == [""] else f"the paths are {listed(paths)}"
                raise ValueError(
                    f"by_path: the pattern {pattern!r} is found in no path of a parameter; {there}. Correct it, or leave "
                    "it out."
                )


def refuse_unnamed(masks: Iterable[Any]) -> None:
    """Refuse rules that ask for paths, for parameters that have no names.

    Raises:
        ValueError: there is one.
    """
    for rule in rules_in(masks):
        if not isinstance(rule, by_ndim):
            raise ValueError(
                f"{type(rule).__name__} goes by the names of parameters, but the optimizer was given none. Give it "
                "model.named_parameters(), not model.parameters()."
            )


def rules_in(masks: Iterable[Any]) -> list[Rule]:
    """The rules among some masks and labels, and those that other rules ask."""
    found: dict[int, Rule] = {}

    def look(x: Any) -> None:
        if isinstance(x, Not):
            look(x.mask)
        elif isinstance(x, Label):
            look(x.labels.labels)
        elif isinstance(x, Rule) and id(x) not in found:
            found[id(x)] = x
            for other in (*x.table.values(), x.default):
                look(other)

    for mask in masks:
        look(mask)
    return list(found.values())


# ------------------------------------------------------------------------------------------------------ rules, for the user


class Missing:
    """What stands for a default that is not given."""

    def __repr__(self) -> str:
        return "required"

    def __reduce__(self) -> str:
        return "REQUIRED"  # there is one


REQUIRED: Any = Missing()


class Rule:
    """A function `(path, param) -> label or bool` made of a table; it prints as the call that makes it, and pickles."""

    __slots__ = ("default", "table")

    def __init__(self, table: dict[Any, Any], default: Any) -> None:
        self.table, self.default = table, default

    def found(self, path: str, p: Tensor) -> Any:
        """What the table says, or the default."""
        raise NotImplementedError

    def __call__(self, path: str, p: Tensor) -> Any:
        """The label, or the bool, of a parameter."""
        found = self.found(path, p)
        if found is REQUIRED:
            found = self.default
        if found is REQUIRED:
            raise ValueError(f"{self!r} has no entry for {quote(path)}, of shape {tuple(p.shape)}. Give it a default=.")
        return found(path, p) if callable(found) else found

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and (self.table, self.default) == (other.table, other.default)

    def __hash__(self) -> int:
        return hash((type(self), *self.table))

    def __repr__(self) -> str:
        default = "" if self.default is REQUIRED else f", default={self.default!r}"
        return f"{type(self).__name__}({{{', '.join([f'{name(k)}: {x!r}' for k, x in self.table.items()])}}}{default})"


def name(key: Any) -> str:
    return key.__name__ if isinstance(key, type) else repr(key)


class by_path(Rule):  # noqa: N801
    r"""A label or a mask by regular expressions on the path.

    The first pattern that is found anywhere in the path decides (`re.search`); without one, `default` does.

    Args:
        table: pattern -> label (for `partition`) or bool (for `masked`, `freeze`, `add_decayed_weights`), or another rule.
        default: for all others: a label or a bool, or another rule or function `(path, param)`.

    Raises:
        ValueError: (when used) no pattern is found and there is no default, a pattern is found in none of the paths, or an
            optimizer was given no names; or a pattern is not a regular expression.

    >>> import torch, purestep as ps
    >>> rule = ps.by_path({r"^embed|^head": "rest", r"norm": "rest"}, default=ps.by_ndim({2: "hidden"}, default="rest"))
    >>> rule("layers.0.weight", torch.zeros(2, 2)), rule("head.weight", torch.zeros(2, 2))
    ('hidden', 'rest')
    """

    __slots__ = ()

    def __init__(self, table: Mapping[str, Any], default: Any = REQUIRED) -> None:
        super().__init__(dict(table), default)
        for pattern in self.table:
            check_pattern(pattern)

    def found(self, path: str, p: Tensor) -> Any:
        """What the first pattern in the path says.

        Args:
            path: the path of the parameter.
            p: the parameter.

        Returns:
            what the table has for the first pattern that is found in the path; a marker if it has nothing,
            in whose place a call of the rule puts `default`.
        """
        return next((x for pattern, x in self.table.items() if re.search(pattern, path)), REQUIRED)


class by_ndim(Rule):  # noqa: N801
    """A label or a mask by the number of a parameter's dimensions.

    Args:
        table: number of dimensions -> label (for `partition`) or bool (for `masked`, `freeze`, `add_decayed_weights`).
        default: for all others: a label or a bool, or another rule or function `(path, param)`.

    Raises:
        ValueError: (when used) the number is not there and there is no default.

    >>> import torch, purestep as ps
    >>> decay = ps.add_decayed_weights(0.1, mask=ps.by_ndim({0: False, 1: False}, default=True))
    """

    __slots__ = ()

    def __init__(self, table: Mapping[int, Any], default: Any = REQUIRED) -> None:
        super().__init__(dict(table), default)

    def found(self, path: str, p: Tensor) -> Any:
        """What is said of this number of dimensions.

        Args:
            path: the path of the parameter.
            p: the parameter.

        Returns:
            what the table has for the number of its dimensions; a marker if it has nothing,
            in whose place a call of the rule puts `default`.
        """
        return self.table.get(p.ndim, REQUIRED)


class by_module(Rule):  # noqa: N801
    """A label or a mask by the type of the module that a parameter belongs to.

    A parameter belongs to the module it is an attribute of; one that is tied, to the first of them. The first type in the
    table that the module is an instance of decides; without one, `default` does.

    Args:
        model: the module whose `named_parameters` are optimized. Only the names of its parameters are kept.
        table: type of module -> label (for `partition`) or bool (for `masked`, `freeze`, `add_decayed_weights`).
        default: for all others: a label or a bool, or another rule or function `(path, param)`.

    Raises:
        ValueError: (when used) the path is not that of a parameter of the model, or there is no default.

    >>> import torch, purestep as ps
    >>> model = torch.nn.Sequential(torch.nn.Embedding(5, 3), torch.nn.Linear(3, 2))
    >>> rule = ps.by_module(model, {torch.nn.Linear: ps.by_ndim({2: "hidden"}, default="rest")}, default="rest")
    >>> {name: rule(name, p) for name, p in model.named_parameters()}
    {'0.weight': 'rest', '1.weight': 'hidden', '1.bias': 'rest'}
    """

    __slots__ = ("known",)

    def __init__(self, model: torch.nn.Module, table: Mapping[type, Any], default: Any = REQUIRED) -> None:
        super().__init__(dict(table), default)
        self.known: dict[str, Any] = {}
        for prefix, module in model.named_modules():
            said = next((x for kind, x in self.table.items() if isinstance(module, kind)), REQUIRED)
            for own, _ in module.named_parameters(prefix, recurse=False):
                self.known[own] = said

    def found(self, path: str, p: Tensor) -> Any:
        """What is said of the module with this parameter.

        Args:
            path: the path of the parameter.
            p: the parameter.

        Returns:
            what the table has for the module that it belongs to; a marker if it has nothing,
            in whose place a call of the rule puts `default`.

        Raises:
            ValueError: the model has no parameter at this path.
        """
        if path not in self.known:
            raise ValueError(
                f"by_module was made of a model that has no parameter {quote(path)}; it has {listed(self.known)}. Make it of "
                "the model whose parameters are optimized."
            )
        return self.known[path]

    def __eq__(self, other: object) -> bool:
        return super().__eq__(other) and self.known == other.known  # type: ignore[attr-defined]

    def __hash__(self) -> int:
        return super().__hash__()

    def __repr__(self) -> str:
        return super().__repr__().replace("(", "(model, ", 1)


def check_pattern(pattern: str) -> None:
    """Refuse what is not a regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}.") from None


def listed(names: Iterable[str], most: int = 5) -> str:
    """A few names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more
