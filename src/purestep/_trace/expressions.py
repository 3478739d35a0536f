"""Values as source text: the names that a program uses, and the expressions of its numbers and arguments."""

from __future__ import annotations

import functools
import keyword
import math
import operator
from collections.abc import Callable, Mapping
from types import NoneType
from typing import Any

import torch
from torch import Tensor, fx

from purestep._core import maths
from purestep._trace.ir import BOOLEAN, INFIX, MINUS, Scale, Values

ITEM = "x"
"""The name of one entry of a list, in a loop; with a number after it where a loop is over several lists."""

RESERVED = frozenset({"program", "coefficients", "zip", "slice", ITEM, *[f"{ITEM}{i}" for i in range(100)]})
"""Names with a meaning in every program."""


class Namespace:
    """The names of a program: of the objects that its source refers to, and of its variables."""

    def __init__(self, operations: Mapping[str, Any], reserved: tuple[str, ...] = ()) -> None:
        self.objects = dict(operations)
        self.taken = {*self.objects, *RESERVED, *reserved}

    def argument(self, name: str) -> str:
        """The name of an argument: this one, with a number after it if it is taken."""
        found, k = name, 1
        while found in self.taken:
            found, k = f"{name}_{k}", k + 1
        self.taken.add(found)
        return found

    def variable(self, prefix: str) -> str:
        """The name of a new variable."""
        k = 0
        while f"{prefix}{k}" in self.taken:
            k += 1
        self.taken.add(f"{prefix}{k}")
        return f"{prefix}{k}"

    def constant(self, x: Any) -> str:
        """The name of an object: its own if it has one."""
        name = getattr(x, "__name__", "") if callable(x) else ""
        if not (name.isascii() and name.isidentifier()) or keyword.iskeyword(name):  # Python takes "ﬁ" for "fi"
            name = "constant"
        base, k = name, 1
        while (name in self.objects and self.objects[name] is not x) or name in self.taken - set(self.objects):
            name, k = f"{base}_{k}", k + 1
        self.objects[name] = x
        self.taken.add(name)
        return name


class Expressions:
    """Writes values as expressions; `texts` has what is already written."""

    def __init__(self, values: Values, names: Namespace) -> None:
        self.values, self.names = values, names
        self.texts: dict[fx.Node, str] = {}

    def text(self, x: Any, bare: bool = False) -> str:
        """An argument. It may need parentheses as an operand unless it is `bare`, which arguments of calls are."""
        if isinstance(x, fx.Node):
            text = self.texts[x]
            return text[1:-1] if bare and text.startswith("(") and text.count("(") == 1 else text
        if isinstance(x, Scale):
            return self.scale(x)
        if type(x) in (bool, int, NoneType) or (type(x) is float and math.isfinite(x)):
            text = repr(x)
            return f"({text})" if text.startswith("-") and not bare else text
        if isinstance(x, (tuple, list)):
            inner = "".join(f"{self.text(y)}, " for y in x)
            return f"({inner})" if isinstance(x, tuple) else f"[{inner}]"
        if isinstance(x, slice):
            return f"slice({self.text(x.start)}, {self.text(x.stop)}, {self.text(x.step)})"
        return self.names.constant(x)

    def scale(self, x: Scale) -> str:
        """The number in front of a contracted product."""
        factors = [self.factor(k, len(x.numbers) == 1) for k in x.numbers if k is not MINUS]
        negative = x.negative ^ bool(len([k for k in x.numbers if k is MINUS]) % 2)
        text = " * ".join(factors) or "1"
        if not negative:
            return text
        return f"-{text}" if len(factors) < 2 and is_atomic(text) else f"-({text})"

    def factor(self, x: Any, bare: bool) -> str:
        """A number as a factor, in which place torch takes no bool."""
        if isinstance(x, bool):
            return str(int(x))
        return f"(1 * {self.text(x)})" if isinstance(x, fx.Node) and x.target in BOOLEAN else self.text(x, bare)

    def arguments(self, args: Any, kwargs: Mapping[str, Any]) -> str:
        return ", ".join([*[self.text(a, True) for a in args], *[f"{k}={self.text(v, True)}" for k, v in kwargs.items()]])

    def operation(self, node: fx.Node) -> str:
        """An operation on tensors as torch has it."""
        if node.target in INFIX:
            return f"{self.text(node.args[0])} {INFIX[node.target]} {self.text(node.args[1])}"
        if node.target is operator.neg:
            return f"-{self.text(node.args[0])}"
        if node.op == "call_method":
            receiver, *rest = node.args
            return f"{self.text(receiver)}.{node.target}({self.arguments(rest, node.kwargs)})"
        return f"{self.names.constant(maths.untraced(node.target))}({self.arguments(node.args, node.kwargs)})"

    def number(self, node: fx.Node) -> str:
        """An operation on numbers, in parentheses if it is an operator."""
        if node.target in INFIX:
            return f"({self.text(node.args[0])} {INFIX[node.target]} {self.text(node.args[1])})"
        if node.target is operator.neg:
            return f"(-{self.text(node.args[0])})"
        function: Any = getattr(Tensor, str(node.target)) if node.op == "call_method" else maths.untraced(node.target)
        if getattr(function, "__module__", None) != maths.__name__:
            function = on_numbers(function)
        return f"{self.names.constant(function)}({self.arguments(node.args, node.kwargs)})"


class Coefficients(Expressions):
    """The expressions in the half of a split program that computes with tensors: each number is a coefficient by name."""

    def __init__(self, numbers: Expressions) -> None:
        super().__init__(numbers.values, numbers.names)
        self.numbers, self.texts = numbers, numbers.texts
        self.found: dict[str, str] = {}  # from the expression of a number to the name of its coefficient

    def text(self, x: Any, bare: bool = False) -> str:
        if not isinstance(x, Scale) and not (isinstance(x, fx.Node) and self.values.is_number(x)):
            return super().text(x, bare)
        text = self.numbers.text(x, True)
        if text.lstrip("-").replace(".", "").isdigit():
            return text
        name = self.found[text] if text in self.found else self.found.setdefault(text, self.names.variable("k"))
        return f"({name} != 0)" if isinstance(x, fx.Node) and x.target in BOOLEAN else name


def is_atomic(text: str) -> bool:
    """Whether an expression is one name, or one number without a sign."""
    return text.isidentifier() or text.replace(".", "").isdigit()


def on_numbers(function: Callable[..., Any]) -> Callable[..., Any]:
    """A torch function for numbers: it computes in float64 on the CPU and returns a number, unless an argument is a tensor."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if any(isinstance(a, Tensor) for a in args):
            return function(*args, **kwargs)
        made = [torch.tensor(a, dtype=torch.float64) if isinstance(a, float) else a for a in args]
        result = function(*made, **kwargs)
        return result.item() if isinstance(result, Tensor) else result

    return call
