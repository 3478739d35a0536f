"""From leaf functions to a foreach program.

An algorithm is written for one tensor, out of place. A `Recipe` is a run of such leaf functions, one after the other, with
`params + updates` at its end when a step is asked for. `compile` traces it once with `torch.fx` proxies and turns the
graph into straight-line Python over *lists* of tensors (one entry per parameter) and plain numbers:

1. *Kinds.* A value that depends only on hyperparameters and counters is a number and stays Python arithmetic
   (`1 - b1 ** t`); everything else is a list and becomes one `torch._foreach_*` call, or a loop over the parameters where
   no such call exists.
2. *Contraction.* `x + k*y` becomes `axpy`, `a*x + b*y` `axpby`, `x + k*(y*z)` `addcmul`, `x + k*(y/z)` `addcdiv`: fewer
   passes over memory.
3. *Reuse.* A list that nobody reads again and that is ours (a temporary, or an input that was given away) is
   overwritten: `mul` becomes `mul_`. Nothing else ever is. The new value of an input that was given away ends up in that
   input's own memory.
4. *Merging*, where a program may call torch's fused kernels: what several lines compute together becomes one line.

The source is kept, and printing a program shows it. Nothing here knows any algorithm.
"""

from __future__ import annotations

import builtins
import functools
import itertools
import linecache
import math
import operator
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor, fx
from torch.fx.proxy import GraphAppendingTracer, TraceError

from purestep import maths
from purestep.foreach import KERNELS, UNARY
from purestep.merging import MERGED, Merger
from purestep.ops import Name, Op, Product, Scale, nodes_in
from purestep.single import SINGLE

# ---------------------------------------------------------------------------------------------------------------- recipes


class Part(NamedTuple):
    """One leaf function of a recipe, and everything about it that is not a number."""

    declaration: LeafDeclaration
    absent: tuple[bool, ...]  # which fields of the state these parameters do not have
    switches: tuple[Any, ...]
    tuples: tuple[int, ...]  # per hyperparameter: 0 for a number, -1 for None, else the length of a tuple of numbers


class LeafDeclaration(Protocol):
    """What a program needs to know of a declared leafwise transform."""

    name: str
    function: Callable[..., Any]
    hypers: tuple[str, ...]
    switches: tuple[str, ...]
    state: Any  # the NamedTuple of its state, or None

    @property
    def fields(self) -> StateFields: ...


class StateFields(Protocol):
    """What the fields of a state are."""

    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def scalars(self) -> tuple[bool, ...]: ...
    @property
    def like(self) -> tuple[bool, ...]: ...
    @property
    def encoded(self) -> tuple[bool, ...]: ...


Form: TypeAlias = Literal["lists", "kernels", "single", "split"]
"""What a program takes: lists of tensors; the same, and it calls torch's fused kernels for what they compute; one tensor, and
then it overwrites nothing; or one tensor and the numbers that a function of its own has computed of all others."""


class Recipe(NamedTuple):
    """What a program is made from, and its key: two calls with equal recipes differ only in tensors and numbers."""

    parts: tuple[Part, ...]
    apply: bool  # end with params + updates
    own_grads: bool  # the gradients' memory may be reused
    donate: bool  # so may the memory of the state, and of params when they are applied
    form: Form = "lists"

    @property
    def lists(self) -> bool:
        """Whether the program takes lists."""
        return self.form in ("lists", "kernels")


@dataclass(frozen=True)
class Program:
    """A compiled recipe: call it with the gradients, the parameters, the state's fields and the numbers, in that order."""

    recipe: Recipe
    name: str
    source: str
    run: Callable[..., tuple[Any, ...]] = field(repr=False)
    block: int = 0  # so many consecutive numbers of the result depend on those in their own places only; 0: on all
    broadcasts: bool = False  # takes tensors that are to be broadcast in the places of numbers
    reads_params: bool = True  # other than to add the updates to them
    length: int = 0  # how many operations, before any were merged
    merged: bool = False  # whether some of them are torch's fused kernels
    coefficients: Callable[..., tuple[tuple[Any, ...], tuple[Any, ...]]] | None = field(default=None, repr=False)
    """Of a split program: from all numbers to those that it takes in their place, as one tensor, and to those it returns."""

    def __str__(self) -> str:
        return self.source

    @property
    def elementwise(self) -> bool:
        """Whether every number of the result depends on the numbers in its own place only."""
        return self.block == 1


_programs: dict[Any, Program] = {}
_serial = itertools.count()
_functions = types.ModuleType("purestep.programs", "Every program's function, under its name.")


def runner(
    details: tuple[Any, ...], apply: bool, own_grads: bool, donate: bool, *declarations: LeafDeclaration, form: Form = "lists"
) -> Any:
    """The function of the program for a recipe, in a form that `torch.compile` can trace through."""
    if torch.compiler.is_compiling():
        return getattr(_functions, name_of(form, details, apply, own_grads, donate, *declarations))
    return program(details, apply, own_grads, donate, *declarations, form=form).run


def name_of(form: Form, *recipe: Any) -> str:
    """The name of the program for a recipe: a constant, while `torch.compile` traces."""
    return program(*recipe, form=form).name


# What torch.compiler.assume_constant_result sets; calling it would import all of torch._dynamo, which takes a second.
name_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


def program(
    details: tuple[Any, ...],
    apply: bool,
    own_grads: bool,
    donate: bool,
    *declarations: LeafDeclaration,
    form: Form = "lists",
) -> Program:
    """The program for a recipe; traced at the first call, looked up at every other.

    The recipe is given as `torch.compile` can read it: plain constants, and apart from them the declarations.
    """
    key = (details, apply, own_grads, donate, form, declarations)
    found = _programs.get(key)
    if found is None:  # tracing patches nothing global: two threads may do it at once, and agree
        parts = tuple([Part(d, *rest) for d, rest in zip(declarations, details)])
        found = _programs[key] = compile(Recipe(parts, apply, own_grads, donate, form))
        setattr(_functions, found.name, found.run)
    return found


def compile(recipe: Recipe) -> Program:
    """Trace a recipe and write its program."""
    return Writer(recipe, *trace(recipe)).program()


# ---------------------------------------------------------------------------------------------------------------- tracing


class Input(NamedTuple):
    """One argument of a program."""

    node: fx.Node
    number: bool
    like_params: bool  # same shape and dtype as the parameter
    encoded: bool  # neither, but a part of it belongs to a part of the parameter
    output: int | None  # the output that is this input's new value


def trace(recipe: Recipe) -> tuple[fx.Graph, list[Input], list[fx.Node]]:
    """The graph of a recipe on one parameter, its inputs, and its outputs (the updates or parameters, then the state)."""
    graph = fx.Graph()
    tracer = GraphAppendingTracer(graph)
    inputs: list[Input] = []

    def proxy(
        name: str, number: bool = False, like: bool = False, encoded: bool = False, output: int | None = None
    ) -> fx.Proxy:
        node = graph.placeholder(name)
        inputs.append(Input(node, number, like, encoded, output))
        return fx.Proxy(node, tracer)

    update: Any = proxy("g", like=True)
    p = proxy("p", like=True, output=0 if recipe.apply else None)
    states: list[list[Any]] = []
    count = 0
    for part in recipe.parts:
        fields: list[Any] = []
        info = part.declaration.fields
        for name, scalar, like, encoded, absent in zip(info.names, info.scalars, info.like, info.encoded, part.absent):
            count += not absent
            fields.append(None if absent else proxy(name, scalar, like, encoded, count))
        states.append(fields)
    outputs: list[Any] = []
    for part, fields in zip(recipe.parts, states):
        d = part.declaration
        hypers: dict[str, Any] = {}
        for name, length in zip(d.hypers, part.tuples):
            if length < 0:
                hypers[name] = None
            elif length:
                hypers[name] = tuple(proxy(f"{name}_{i}", number=True) for i in range(length))
            else:
                hypers[name] = proxy(name, number=True)
        try:
            result = call(d, update, d.state(*fields) if d.state else None, p, hypers | dict(zip(d.switches, part.switches)))
        except TraceError as error:
            raise TypeError(
                f"{d.name} asks for the value of a tensor or a hyperparameter ('if', 'while', bool(), float(), len()), "
                "but it is traced once for all values. Use purestep.where for a choice, a switch (a bool, str or int "
                "argument) for structure, or wrap the part that must see real tensors in @purestep.operation."
            ) from error
        update, new = result
        outputs += [x for x, absent in zip(new, part.absent) if not absent]
    outputs.insert(0, p + update if recipe.apply else update)
    same = repeated(graph)
    nodes = [same.get(x.node, x.node) if isinstance(x, fx.Proxy) else x for x in outputs]
    graph.output(tuple(nodes))
    graph.eliminate_dead_code()
    return graph, inputs, nodes


def repeated(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Nodes that compute what an earlier one has computed, each with the earlier one, which takes its place."""
    first: dict[Any, fx.Node] = {}
    same: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "call_function" and (node.target in NAMES or node.target in INFIX) and not node.kwargs:
            found = first.setdefault((node.target, *map(identity, node.args)), node)
            if found is not node:
                node.replace_all_uses_with(found)
                same[node] = found
    return same


def identity(x: Any) -> Any:
    """What makes two arguments the same: numbers of equal value may differ, as 1 and True or 0.0 and -0.0 do."""
    return x if isinstance(x, fx.Node) else (type(x), repr(x))


def call(d: LeafDeclaration, g: Any, s: Any, p: Any, arguments: dict[str, Any]) -> tuple[Any, Sequence[Any]]:
    """Run a leaf function: the update and the new state, which is empty for a function without one."""
    if s is None:
        return d.function(g, p, **arguments), ()
    update, new = d.function(g, s, p, **arguments)
    if type(new) is not type(s):
        raise TypeError(f"{d.name} must return (update, {type(s).__name__}), but its second value is a {type(new).__name__}.")
    return update, new


# ---------------------------------------------------------------------------------------------------------------- writing

INFIX = {
    operator.add: "+", operator.sub: "-", operator.mul: "*", operator.truediv: "/", operator.pow: "**", operator.floordiv: "//",
    operator.mod: "%", operator.eq: "==", operator.ne: "!=", operator.lt: "<", operator.le: "<=", operator.gt: ">",
    operator.ge: ">=", operator.and_: "&", operator.or_: "|",
}  # fmt: skip
NAMES = {
    operator.add: "add", operator.sub: "sub", operator.mul: "mul", operator.truediv: "div", operator.pow: "pow",
    operator.neg: "neg", operator.abs: "abs", maths.root: "sqrt", maths.lerp: "lerp", maths.minimum: "minimum",
    maths.maximum: "maximum", maths.where: "where",
}  # fmt: skip
COMPARISONS = {operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge}
CHOICES = COMPARISONS | {operator.and_, operator.or_}
BINARY = frozenset({"add", "sub", "mul", "div", "maximum", "minimum"})
COMMUTATIVE = frozenset({"add", "mul", "maximum", "minimum"})


class Writer:
    """Turns one graph into the source of a program."""

    def __init__(self, recipe: Recipe, graph: fx.Graph, inputs: list[Input], outputs: list[Any]) -> None:
        self.recipe, self.graph, self.inputs, self.outputs = recipe, graph, inputs, outputs
        self.space: dict[str, Any] = KERNELS | MERGED if recipe.lists else dict(SINGLE)
        self.placeholders = {i.node: i for i in inputs}
        self.kinds: dict[fx.Node, str] = {}
        self.like: dict[fx.Node, bool] = {}  # the parameter's shape and dtype
        self.shaped: dict[fx.Node, bool] = {}  # the parameter's shape
        self.single: set[fx.Node] = set()  # one number per parameter
        self.coefficients: dict[str, str] | None = (
            None  # in a line of a split program: the number that stands for an expression
        )
        self.uses: dict[fx.Node, int] = {}

    def program(self) -> Program:
        self.classify()
        ops = self.contract()
        if self.recipe.lists:
            self.reuse(ops)
        lines = ops
        if self.recipe.form == "kernels":
            ops = Merger(lines, self.graph, self.kinds, self.uses).merged()
        source = self.write(ops)
        name = f"program_{next(_serial)}"
        file = f"<purestep {name}: {'+'.join(p.declaration.name for p in self.recipe.parts)}>"
        linecache.cache[file] = (len(source), None, source.splitlines(True), file)  # tracebacks and debuggers show it
        exec(builtins.compile(source, file, "exec"), self.space)
        sizes = [self.block(op) for op in ops]
        local = all(self.shaped[i.node] or i.encoded for i in self.inputs if not i.number) and all(sizes)
        block = math.lcm(*sizes) if local else 0
        loops = [op.out for op in ops if op.name in ("loop", "where", "compare")]  # a number would change the dtype in these
        broadcasts = block == 1 and all(self.is_list(x) for node in loops for x in nodes_in((node.args, node.kwargs)))
        reads = self.uses.get(self.inputs[1].node, 0) > 0
        run, numbers = self.space["program"], self.space.get("coefficients")
        return Program(self.recipe, name, source, run, block, broadcasts, reads, len(lines), len(ops) < len(lines), numbers)

    def block(self, op: Op) -> int:
        """How many consecutive numbers one operation treats by themselves; 0 if it must see all of a tensor."""
        if op.name == "loop":
            return getattr(op.out.target, "block", 0)
        return int(self.shaped[op.out])

    # -- 1. kinds

    def classify(self) -> None:
        for node in self.graph.nodes:
            if node.op == "output":
                continue
            given = self.placeholders.get(node)
            if given is not None:
                self.kinds[node] = "number" if given.number else "list"
                self.like[node] = self.shaped[node] = given.like_params
                continue
            args = nodes_in((node.args, node.kwargs))
            self.kinds[node] = "list" if any(self.kinds[a] == "list" for a in args) else "number"
            if getattr(node.target, "single", False):
                self.single.add(node)
            for a in args:
                self.uses[a] = self.uses.get(a, 0) + 1
        for x in self.outputs:
            if isinstance(x, fx.Node):
                self.uses[x] = self.uses.get(x, 0) + 1

    def is_list(self, x: Any) -> bool:
        return isinstance(x, fx.Node) and self.kinds[x] == "list"

    def name(self, node: fx.Node) -> str:
        """The operation's canonical name, `""` if it has none."""
        if node.op == "call_method":
            target = str(node.target)
            if target.endswith("_") and not target.endswith("__"):
                raise TypeError(
                    f"A leaf function changes nothing in place, but this one calls {target}(); use {target[:-1]}()."
                )
            return {"divide": "div", "multiply": "mul", "true_divide": "div", "subtract": "sub"}.get(target, target)
        if node.op == "call_function":
            if node.target in NAMES:
                return NAMES[node.target]
            if getattr(node.target, "__module__", "").startswith("torch") or node.target in TORCH:
                return str(getattr(node.target, "__name__", ""))
        return ""

    # -- 2. contraction

    def contract(self) -> list[Op]:
        ops: list[Op] = []
        absorbed: set[fx.Node] = set()
        for node in reversed(list(self.graph.nodes)):
            if node.op in ("output", "placeholder") or self.kinds[node] == "number" or node in absorbed:
                continue
            ops.append(self.op(node, absorbed))
        ops.reverse()
        for op in ops:
            op.fresh |= op.out in self.single or getattr(op.out.target, "block", 0) > 0
            lists = [x for x in op.lists(self.kinds) if x not in self.single]
            self.shaped[op.out] = bool(op.targets or op.name in ("where", "compare")) and bool(lists)
            self.shaped[op.out] &= all(self.shaped[x] for x in lists)
            values = lists if op.name != "where" else [x for x in op.args[1:] if x in lists]
            if getattr(op.out.target, "like", False):
                op.fresh = self.shaped[op.out] = self.like[op.out] = True
                continue
            self.like[op.out] = (
                self.shaped[op.out] and op.name != "compare" and bool(values) and all(self.like[x] for x in values)
            )
        return ops

    def op(self, node: fx.Node, absorbed: set[fx.Node]) -> Op:
        name, args = self.name(node), list(node.args)
        if node.kwargs or (node.op == "call_method" and not args):
            return Op(node, "loop", args, fresh=False)
        lists = [self.is_list(a) for a in args]
        if self.single.intersection(x for x in args if self.is_list(x)):
            if name in COMMUTATIVE and args[0] in self.single:
                args.reverse()
            known = name in BINARY and len(args) == 2 and self.is_list(args[0]) and args[0] not in self.single
            return Op(node, name, args, (0,)) if known else Op(node, "loop", args, fresh=False)
        if name in UNARY and len(args) == 1:
            return Op(node, name, args, (0,))
        if name in BINARY and len(args) == 2:
            if name in ("add", "sub"):
                found = self.fused(node, name, args, absorbed)
                if found is not None:
                    return found
            if all(lists):
                return Op(node, name, args, (0, 1) if name in COMMUTATIVE or name == "div" else (0,))
            if lists[0]:
                return Op(node, name, args, (0,))
            if name in COMMUTATIVE:
                return Op(node, name, args[::-1], (0,))
            return Op(node, {"sub": "rsub", "div": "rdiv"}[name], args[::-1], (0,))
        if name == "pow" and lists == [True, False]:
            return Op(node, "square" if args[1] == 2 else "pow", args[:1] if args[1] == 2 else args, (0,))
        if name == "square" and len(args) == 1:
            return Op(node, "square", args, (0,))
        if name == "lerp" and lists == [True, True, False]:
            return Op(node, name, args, (0,))
        if node.target in COMPARISONS:
            return Op(node, "compare", args)
        if name == "where" and len(args) == 3:
            return Op(node, "where", args, fresh=lists[0])
        return Op(node, "loop", args, fresh=False)

    def fused(self, node: fx.Node, name: str, args: list[Any], absorbed: set[fx.Node]) -> Op | None:
        """`x ± k*y`, `x ± k*(y*z)` or `x ± k*(y/z)` as one operation, if the product is used nowhere else."""
        tries = [(args[0], args[1])] + ([(args[1], args[0])] if name == "add" else [])
        for x, y in tries:
            if not (self.is_list(x) and self.is_list(y)):
                continue
            product = self.product(y)
            if product is None or not (product.numbers or product.name == "div" or len(product.lists) == 2):
                continue
            absorbed |= product.absorbed
            scale: list[Any] = [Scale(name == "sub", product.numbers)]
            other = self.product(x) if len(product.lists) == 1 else None
            if other is not None and other.numbers and len(other.lists) == 1 and other.lists[0] not in product.lists:
                absorbed |= other.absorbed
                return Op(node, "axpby", [*other.lists, *product.lists, Scale(False, other.numbers), *scale], (0,))
            kernel = "axpy" if len(product.lists) == 1 else "addcdiv" if product.name == "div" else "addcmul"
            return Op(node, kernel, [x, *product.lists, *scale], (0,))
        return None

    def product(self, node: Any) -> Product | None:
        """`node` as numbers times one list, or the product or quotient of two; None if it is anything else."""
        if self.uses[node] > 1 or node.kwargs or node in self.placeholders or self.single.intersection(node.all_input_nodes):
            return None
        name, args = self.name(node), node.args
        if name == "neg":
            inner = self.product(args[0]) or Product([], [args[0]], "mul", set())
            return Product([*inner.numbers, -1.0], inner.lists, inner.name, inner.absorbed | {node})
        if name == "div" and all(map(self.is_list, args)):
            top = self.product(args[0])
            if top is not None and top.numbers and len(top.lists) == 1 and top.lists[0] is not args[1]:
                return Product(top.numbers, [*top.lists, args[1]], "div", top.absorbed | {node})
            return Product([], list(args), "div", {node})
        if name == "div" and self.is_list(args[0]):
            return None  # (y * z) / k stays a division: multiplying by 1/k would round differently
        if name == "mul" and len(args) == 2:
            if all(map(self.is_list, args)):
                for a, b in (args, args[::-1]):
                    scaled = self.product(a) if a is not b else None
                    if scaled is not None and scaled.numbers and len(scaled.lists) == 1:
                        return Product(scaled.numbers, [*scaled.lists, b], "mul", scaled.absorbed | {node})
                return Product([], list(args), "mul", {node})
            listed, number = args if self.is_list(args[0]) else args[::-1]
            inner = self.product(listed) or Product([], [listed], "mul", set())
            return Product([*inner.numbers, number], inner.lists, inner.name, inner.absorbed | {node})
        return None

    # -- 3. reuse

    def reuse(self, ops: list[Op]) -> None:
        """Choose what each operation overwrites."""
        last: dict[fx.Node, int] = {}
        for i, op in enumerate(ops):
            for x in op.lists(self.kinds):
                # what a result may share memory with must never be overwritten, however often it is used afterwards
                last[x] = max(last.get(x, 0), i if op.fresh else len(ops))
        for x in self.outputs:
            if isinstance(x, fx.Node):
                last[x] = len(ops)
        producer = {op.out: (i, op) for i, op in enumerate(ops)}

        def candidates(i: int, op: Op) -> list[int]:
            """The arguments that this operation may overwrite, if they are ours."""
            if not self.like.get(op.out, False):
                return []
            return [
                t
                for t in op.targets
                if self.is_list(x := op.args[t]) and last[x] == i and op.args.count(x) == 1 and x not in self.single
            ]

        def spine(node: fx.Node, home: fx.Node) -> list[tuple[Op, int]] | None:
            """The operations, and their targets, that turn `home` into `node` within its own memory."""
            if node is home:
                return []
            if node not in producer:
                return None
            i, op = producer[node]
            for t in candidates(i, op) if op.inplace is None else []:
                before = spine(op.args[t], home)
                if before is not None:
                    return [*before, (op, t)]
            return None

        donated = [i for i in self.inputs if i.output is not None and not i.number] if self.recipe.donate else []
        homes = set()
        for given in donated:
            for op, t in spine(self.outputs[given.output or 0], given.node) or []:
                op.inplace = t
                homes.add(op.out)
        ours = {op.out for op in ops if op.fresh} - homes
        if self.recipe.own_grads:
            ours.add(self.inputs[0].node)
        for i, op in enumerate(ops):
            if op.inplace is None:
                op.inplace = next((t for t in candidates(i, op) if op.args[t] in ours), None)

    # -- 5. source

    def write(self, ops: list[Op]) -> str:
        self.var: dict[fx.Node, str] = {}
        self.lines: list[str] = []
        taken: set[str] = set(self.space)
        for given in self.inputs:
            name, k = given.node.name, 1
            while name in taken:
                name, k = f"{given.node.name}_{k}", k + 1
            taken.add(name)
            self.var[given.node] = name
        self.taken = taken
        by_node = {op.out: op for op in ops}
        coefficients: dict[str, str] = {}
        numbers: list[str] = []
        for node in self.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            if self.kinds[node] == "number":
                self.number(node)
            elif node in by_node:
                if self.recipe.form == "split":
                    numbers, self.lines, self.coefficients = self.lines, numbers, coefficients
                self.statement(by_node[node])
                if self.recipe.form == "split":
                    numbers, self.lines, self.coefficients = self.lines, numbers, None
        if self.recipe.form == "split":
            return self.halves(coefficients, numbers)
        self.homecoming()
        return function("program", [self.var[i.node] for i in self.inputs], self.lines, map(self.result, self.outputs))

    def halves(self, coefficients: dict[str, str], lines: list[str]) -> str:
        """A split program: what is done with numbers, and what is done with tensors."""
        scalars = [x for x in self.outputs if not self.is_list(x)]
        arguments = [self.var[i.node] for i in self.inputs if i.number]
        results = [
            f"({', '.join(coefficients)}{',' * bool(coefficients)})",
            f"({''.join(f'{self.text(x)}, ' for x in scalars)})",
        ]
        first = function("coefficients", arguments, self.lines, results)
        unpacked = [f"{', '.join(coefficients.values())}, = k.unbind()"] if coefficients else []
        arguments = [*[self.var[i.node] for i in self.inputs if not i.number], "k"]
        outputs = [self.result(x) for x in self.outputs if self.is_list(x)]
        return first + "\n\n" + function("program", arguments, unpacked + lines, outputs)

    def number(self, node: fx.Node) -> None:
        """A number: its expression, bound to a name only if it is used more than once."""
        if node.target in INFIX:
            text = f"({self.text(node.args[0])} {INFIX[node.target]} {self.text(node.args[1])})"
        elif node.target is operator.neg:
            text = f"(-{self.text(node.args[0])})"
        else:
            function: Any = getattr(Tensor, str(node.target)) if node.op == "call_method" else node.target
            if getattr(function, "__module__", None) != maths.__name__:
                function = on_numbers(function)
            text = f"{self.constant(function)}({self.arguments(node)})"
        if self.uses.get(node, 0) > 1:
            name = self.fresh("n")
            self.lines.append(f"{name} = {text[1:-1] if text.startswith('(') else text}")
            text = name
        self.var[node] = text

    def statement(self, op: Op) -> None:
        """One operation on lists."""
        if op.name in ("loop", "where", "compare"):
            out = self.var[op.out] = self.fresh("t")
            self.lines.append(f"{out} = {self.loop(op.out)}")
            return
        if op.inplace is None:
            out = self.var[op.out] = self.fresh("t")
            name = "root" if not self.recipe.lists and op.out.target is maths.root else op.name
            self.lines.append(f"{out} = {name}({', '.join(self.text(a, True) for a in op.args)})")
            return
        args = list(op.args)
        args.insert(0, args.pop(op.inplace))
        name = "rdiv" if op.name == "div" and op.inplace else op.name  # the other operations with two targets commute
        self.var[op.out] = self.text(args[0])
        self.var.update({node: self.text(op.args[i]) for node, i in op.further.items()})
        self.lines.append(f"{name}_({', '.join(self.text(a, True) for a in args)})")

    def loop(self, node: fx.Node) -> str:
        """A list comprehension over the parameters, for what torch has no foreach operation for."""
        lists = list(dict.fromkeys(x for x in nodes_in((node.args, node.kwargs)) if self.kinds[x] == "list"))
        if self.recipe.lists and getattr(node.target, "stacks", False) and lists == [node.args[0]]:
            return f"stacked({self.constant(maths.untraced(node.target))}, {self.arguments(node)})"
        items = {x: f"x{i}" if len(lists) > 1 else "x" for i, x in enumerate(lists)}
        saved = {x: self.var[x] for x in lists}
        self.var.update(saved if not self.recipe.lists else items)
        if node.target in INFIX:
            text = f"{self.text(node.args[0])} {INFIX[node.target]} {self.text(node.args[1])}"
        elif node.op == "call_method":
            receiver, *rest = node.args
            text = f"{self.text(receiver)}.{node.target}({self.arguments(rest, node.kwargs)})"
        else:
            text = f"{self.constant(maths.untraced(node.target))}({self.arguments(node)})"
        if not self.recipe.lists:
            return text
        self.var.update(saved)
        names = ", ".join(items.values())
        over = self.var[lists[0]] if len(lists) == 1 else f"zip({', '.join(self.var[x] for x in lists)})"
        return f"[{text} for {names} in {over}]"

    def homecoming(self) -> None:
        """Whatever ended up outside the memory it belongs to is copied there."""
        donated = [i for i in self.inputs if i.output is not None and not i.number] if self.recipe.donate else []
        moves = []
        for given in donated:
            out = self.outputs[given.output or 0]
            home = self.var[given.node]
            if self.text(out) != home:
                moves.append((given, out, home))
        moving = {home for _, _, home in moves}
        for i, (given, out, home) in enumerate(moves):
            if self.text(out) in moving:  # its source is itself about to be overwritten
                name = self.fresh("t")
                self.lines.append(f"{name} = clone({self.text(out)})")
                moves[i] = (given, Name(name), home)
        for _, out, home in moves:
            self.lines.append(f"copy_({home}, {self.text(out)})")
        for given, _, _ in moves:
            self.outputs[given.output or 0] = given.node
        first = self.outputs[0]
        if not self.recipe.apply and any(self.text(first) == self.text(x) for x in self.outputs[1:] if isinstance(x, fx.Node)):
            name = self.fresh("t")  # the updates are handed out; the state's memory may be given away at the next step
            self.lines.append(f"{name} = clone({self.text(first)})")
            self.outputs[0] = Name(name)

    def result(self, x: Any) -> str:
        """An output; one whose dtype the program cannot vouch for is brought back to its input's."""
        homes = {
            self.outputs[i.output]: i.node
            for i in self.inputs
            if i.output is not None and isinstance(self.outputs[i.output], fx.Node)
        }
        if not self.is_list(x) or self.like.get(x, False) or x in self.placeholders:
            return self.text(x)
        return f"cast({self.text(x)}, {self.var[homes.get(x, self.inputs[1].node)]})"

    def text(self, x: Any, bare: bool = False) -> str:
        """An argument as source."""
        if self.coefficients is not None and (isinstance(x, Scale) or (isinstance(x, fx.Node) and self.kinds[x] == "number")):
            held, self.coefficients = self.coefficients, None
            text, self.coefficients = self.text(x, True), held
            if text.lstrip("-").replace(".", "").isdigit():
                return text
            name = held[text] if text in held else held.setdefault(text, self.fresh("k"))
            return f"({name} != 0)" if isinstance(x, fx.Node) and x.target in CHOICES else name
        if isinstance(x, fx.Node):
            text = self.var[x]
            return text[1:-1] if bare and text.startswith("(") and text.count("(") == 1 else text
        if isinstance(x, str) and isinstance(x, Name):
            return x
        if isinstance(x, Scale):
            factors = [self.text(k, len(x.numbers) == 1) for k in x.numbers if k != -1.0]
            negative = x.negative ^ bool(sum(isinstance(k, float) and k == -1.0 for k in x.numbers) % 2)
            text = " * ".join(factors) or "1"
            return f"-{text if len(factors) < 2 and self.atomic(text) else f'({text})'}" if negative else text
        if isinstance(x, (bool, int, type(None))) or (isinstance(x, float) and x - x == 0):
            return repr(x)
        if isinstance(x, (tuple, list)):
            inner = "".join(f"{self.text(y)}, " for y in x)
            return f"({inner})" if isinstance(x, tuple) else f"[{inner}]"
        if isinstance(x, slice):
            return f"slice({self.text(x.start)}, {self.text(x.stop)}, {self.text(x.step)})"
        return self.constant(x)

    @staticmethod
    def atomic(text: str) -> bool:
        return text.isidentifier() or text.replace(".", "").isdigit()

    def arguments(self, node: Any, kwargs: dict[str, Any] | None = None) -> str:
        args, kwargs = (node.args, node.kwargs) if isinstance(node, fx.Node) else (node, kwargs or {})
        return ", ".join([*[self.text(a, True) for a in args], *[f"{k}={self.text(v, True)}" for k, v in kwargs.items()]])

    def constant(self, x: Any) -> str:
        """The name of an object in the program's namespace."""
        name = getattr(x, "__name__", "") if callable(x) else ""
        if not name.isidentifier():
            name = "constant"
        base, k = name, 1
        while (name in self.space and self.space[name] is not x) or name in self.taken - set(self.space):
            name, k = f"{base}_{k}", k + 1
        self.space[name] = x
        self.taken.add(name)
        return name

    def fresh(self, prefix: str) -> str:
        k = 0
        while f"{prefix}{k}" in self.taken:
            k += 1
        self.taken.add(f"{prefix}{k}")
        return f"{prefix}{k}"


def function(name: str, arguments: Sequence[str], lines: Sequence[str], results: Iterable[str]) -> str:
    """The source of a function that returns a tuple."""
    body = "".join(f"    {line}\n" for line in [*lines, f"return {', '.join(results)},"])
    return f"def {name}({', '.join(arguments)}):\n{body}"


TORCH = frozenset(filter(callable, (getattr(torch, n, None) for n in (*UNARY, *BINARY, "pow", "square", "lerp", "where"))))


def on_numbers(function: Callable[..., Any]) -> Callable[..., Any]:
    """A torch function on plain numbers: computed in float64 on the CPU, and a number again, unless a tensor is given."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if any(isinstance(a, Tensor) for a in args):
            return function(*args, **kwargs)
        made = [torch.tensor(a, dtype=torch.float64) if isinstance(a, float) else a for a in args]
        result = function(*made, **kwargs)
        return result.item() if isinstance(result, Tensor) else result

    return call
