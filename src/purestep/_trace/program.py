"""From leaf functions to a foreach program.

An algorithm is written for one tensor, out of place. A `Recipe` is a run of such leaf functions, one after the other, with
`params + updates` at its end when a step is asked for. `compile` traces it once with `torch.fx` proxies and turns the
graph into straight-line Python over *lists* of tensors (one entry per parameter) and plain numbers:

1. *Kinds.* A value that depends only on hyperparameters and counters is a number and stays Python arithmetic
   (`1 - b1 ** t`). One that depends on tensors which the leaf function closes over, but on no parameter, is computed once per
   run. Everything else is a list and becomes one `torch._foreach_*` call, or a loop over the parameters where no such call
   exists.
2. *Contraction.* `x + k*y` becomes `axpy`, `a*x + b*y` `axpby`, `x + k*(y*z)` `addcmul`, `x + k*(y/z)` `addcdiv`: fewer
   passes over memory.
3. *Reuse.* A list that nobody reads again and that is ours (a temporary, or an input that was given away) is
   overwritten: `mul` becomes `mul_`. Nothing else ever is. The new value of an input that was given away ends up in that
   input's own memory.
   What a program returns is in no memory but its own, or in what was given away.
4. *Merging*, where a program may call torch's fused kernels: what several lines compute together becomes one line.

The source is kept, and printing a program shows it. Nothing here knows any algorithm.
"""

from __future__ import annotations

import builtins
import functools
import itertools
import keyword
import linecache
import math
import operator
import threading
import types
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor, fx
from torch.fx.proxy import TraceError

from purestep._core import maths
from purestep._core.recorder import Recorder, RefusedError, Tracer
from purestep._core.torch_api import constant_result
from purestep._trace.foreach import KERNELS, UNARY
from purestep._trace.fusion import MERGED, Merger
from purestep._trace.ops import MINUS, Name, Op, Product, Scale, nodes_in
from purestep._trace.single import SINGLE

# ---------------------------------------------------------------------------------------------------------------- recipes


class Part(NamedTuple):
    """One leaf function of a recipe, and everything about it that is not a number."""

    declaration: LeafDeclaration
    absent: tuple[bool, ...]  # which fields of the state these parameters do not have
    switches: tuple[Any, ...]
    tuples: tuple[int, ...]  # per hyperparameter: 0 for a number, -1 for None, else the length of a tuple of numbers


class LeafDeclaration(Protocol):
    """What a program needs to know of a declared leafwise transform."""

    key: int  # stands for it where it must not be kept alive
    watched: bool  # whether its programs are dropped with it
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
    """A compiled recipe: call it with the gradients, the parameters, the state's fields and the numbers, in that order.

    It keeps no declaration alive.
    """

    parts: tuple[str, ...]  # the names of its leaf functions
    apply: bool  # whether it ends with params + updates
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
    captured: tuple[Tensor, ...] = field(default=(), repr=False)  # what its leaf functions close over
    signature: Any = field(default=None, repr=False)  # of the graph, if there are such
    guards: tuple[Guard, ...] = field(default=(), repr=False)  # numbers that it was made with
    copies: bool = False  # some of what it returns is copied, or it would be in the same memory as something else
    tangled: bool = False  # and that is the memory of the parameters or their state
    kernels: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)  # what the compiled executor makes of it

    def __str__(self) -> str:
        return self.source

    @property
    def elementwise(self) -> bool:
        """Whether every number of the result depends on the numbers in its own place only."""
        return self.block == 1


PROGRAMS = 1024
"""So many programs are kept; then the oldest go."""

_programs: dict[Any, Program] = {}
_lock = threading.Lock()
_serial = itertools.count()
_key = operator.attrgetter("key")
_functions = types.ModuleType("purestep.programs", "Every program's function, under its name.")


def runner(
    details: tuple[Any, ...], apply: bool, own_grads: bool, donate: bool, *declarations: LeafDeclaration, form: Form = "lists"
) -> Any:
    """The function of the program for a recipe, in a form that `torch.compile` can trace through."""
    if torch.compiler.is_compiling():
        return getattr(_functions, name_of(form, details, apply, own_grads, donate, *declarations))
    return program(details, apply, own_grads, donate, *declarations, form=form).run


@constant_result
def name_of(form: Form, *recipe: Any) -> str:
    """The name of the program for a recipe: a constant, while `torch.compile` traces."""
    return program(*recipe, form=form).name


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
    key = (details, apply, own_grads, donate, form, *map(_key, declarations))
    found = _programs.get(key)
    if found is None or ((found.guards or found.captured) and not current(found, details, declarations)):
        # tracing patches nothing global: two threads may do it at once, and agree
        parts = tuple([Part(d, *rest) for d, rest in zip(declarations, details)])
        made = compile(Recipe(parts, apply, own_grads, donate, form))
        keep(key, made, declarations)
        return made
    return found


def compile(recipe: Recipe) -> Program:
    """Trace a recipe and write its program."""
    return Writer(recipe, trace(recipe)).program()


def keep(key: Any, made: Program, declarations: Sequence[LeafDeclaration]) -> None:
    """Keep a program for the next call, for as long as all of its declarations are there."""
    setattr(_functions, made.name, made.run)
    weakref.finalize(made, vars(_functions).pop, made.name, None).atexit = False
    with _lock:
        _programs.pop(key, None)
        while len(_programs) >= PROGRAMS:
            del _programs[next(iter(_programs))]
        _programs[key] = made
    for d in declarations:
        if not d.watched:
            d.watched = True
            weakref.finalize(d, forget, d.key).atexit = False


def forget(declared: int) -> None:
    """Drop the programs of a declaration that is no longer there."""
    for key in [k for k in list(_programs) if declared in k[FIXED:]]:
        _programs.pop(key, None)


FIXED = 5
"""So much of a key comes before the keys of the declarations."""


# ----------------------------------------------------------------------------------------------------------- what may change


class Guard(NamedTuple):
    """A number, or nothing, that a leaf function reads from a variable outside of it, and its value when it was traced."""

    read: Callable[[], Any]
    value: Any

    def holds(self) -> bool:
        """Whether it is still there."""
        try:
            found = self.read()
        except (KeyError, ValueError):
            return False
        return found is self.value or (type(found) is type(self.value) and repr(found) == repr(self.value))


def guards_of(function: Callable[..., Any]) -> list[Guard]:
    """Those of one leaf function."""
    code = getattr(function, "__code__", None)
    if code is None:
        return []
    known = function.__globals__
    reads = [functools.partial(operator.attrgetter("cell_contents"), cell) for cell in function.__closure__ or ()]
    reads += [functools.partial(known.__getitem__, name) for name in code.co_names if name in known]
    found = []
    for read in reads:
        try:
            value = read()
        except ValueError:  # a variable that has no value yet
            continue
        if value is None or isinstance(value, (bool, int, float, complex, str)):
            found.append(Guard(read, value))
    return found


def current(found: Program, details: tuple[Any, ...], declarations: Sequence[LeafDeclaration]) -> bool:
    """Whether the leaf functions of a program still close over the same numbers and tensors.

    Where a tensor comes from, only running them can tell.
    """
    if not all([guard.holds() for guard in found.guards]):
        return False
    if not found.captured:
        return True
    parts = tuple([Part(d, *rest) for d, rest in zip(declarations, details)])
    again = trace(Recipe(parts, found.apply, False, False))
    same = len(again.captured) == len(found.captured) and all(map(operator.is_, again.captured, found.captured))
    return same and signature(again.graph) == found.signature


def signature(graph: fx.Graph) -> Any:
    """What a graph computes: equal for graphs that do the same with the same."""
    return [(n.op, n.target, n.name, identity((n.args, n.kwargs))) for n in graph.nodes]


# ---------------------------------------------------------------------------------------------------------------- tracing


class Input(NamedTuple):
    """One argument of a program."""

    node: fx.Node
    number: bool
    like_params: bool  # same shape and dtype as the parameter
    encoded: bool  # neither, but a part of it belongs to a part of the parameter
    output: int | None  # the output that is this input's new value


class Trace(NamedTuple):
    """What a recipe does with one parameter."""

    graph: fx.Graph
    inputs: list[Input]
    outputs: list[Any]  # the updates or parameters, then the state
    captured: tuple[Tensor, ...]  # what the leaf functions close over


def trace(recipe: Recipe) -> Trace:
    """Run the leaf functions of a recipe on proxies."""
    graph = fx.Graph()
    tracer = Tracer(graph)
    inputs: list[Input] = []

    def proxy(
        name: str, number: bool = False, like: bool = False, encoded: bool = False, output: int | None = None
    ) -> fx.Proxy:
        node = graph.placeholder(name)
        inputs.append(Input(node, number, like, encoded, output))
        return tracer.proxy(node)

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
            with Recorder(tracer, d.name):
                result = call(
                    d, update, d.state(*fields) if d.state else None, p, hypers | dict(zip(d.switches, part.switches))
                )
        except RefusedError as error:
            raise TypeError(str(error)) from error
        except TraceError as error:
            raise TypeError(
                f"{d.name} asks for the value of a tensor or a hyperparameter ('if', 'while', bool(), float(), len()), "
                "but it is traced once for all values. Use purestep.where for a choice, a switch (a bool, str or int "
                "argument) for structure, or wrap the part that must see real tensors in @purestep.operation."
            ) from error
        update, new = result
        outputs += [x for x, absent in zip(new, part.absent) if not absent]
        for node in graph.nodes:  # also what nobody reads: run by itself, the function would write
            refuse_writing(d.name, node)
    outputs.insert(0, p + update if recipe.apply else update)
    nodes = [tracer.create_arg(x) for x in outputs]
    same = repeated(graph)
    nodes = [same.get(x, x) if isinstance(x, fx.Node) else x for x in nodes]
    graph.output(tuple(nodes))
    graph.eliminate_dead_code()
    return Trace(graph, inputs, nodes, tuple(tracer.captured.values()))


def refuse_writing(name: str, node: fx.Node) -> None:
    """Say that a leaf function changes nothing in place."""
    target = str(node.target if node.op == "call_method" else getattr(node.target, "__name__", ""))
    if (node.op == "call_method" or (node.op == "call_function" and node.target not in INFIX)) and (
        (target.endswith("_") and not target.endswith("__")) or node.kwargs.get("inplace") or "out" in node.kwargs
    ):
        other = f"use {target[:-1]}()" if target.endswith("_") else "leave out inplace and out"
        raise TypeError(f"A leaf function changes nothing in place, but {name} calls {target}(); {other}.")


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
    if isinstance(x, (tuple, list)):
        return type(x), tuple(map(identity, x))
    if isinstance(x, dict):
        return tuple([(k, identity(y)) for k, y in x.items()])
    if isinstance(x, slice):
        return slice, identity((x.start, x.stop, x.step))
    if isinstance(x, fx.Node):
        return fx.Node, x.name
    return (type(x), repr(x)) if x is None or isinstance(x, (bool, int, float, complex, str)) else (type(x), id(x))


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
CLOSED_OVER = "what a leaf function closes over"
NUMBERS, ITEM = "k", "x"
"""Names in every program: of its numbers as one tensor, and of one entry of a list."""
RESERVED = frozenset({"program", "coefficients", "zip", "slice", ITEM, *[f"{ITEM}{i}" for i in range(100)]})
BINARY = frozenset({"add", "sub", "mul", "div", "maximum", "minimum"})
COMMUTATIVE = frozenset({"add", "mul", "maximum", "minimum"})


class Returned(NamedTuple):
    """What an output of a program is to the caller."""

    like: fx.Node  # has its dtype and its shape
    home: fx.Node | None  # the input that it is the new value of
    number: bool


def leaves_of(args: Any) -> list[Any]:
    """Whatever is in the arguments of an operation."""
    if isinstance(args, (tuple, list)):
        return [y for x in args for y in leaves_of(x)]
    if isinstance(args, dict):
        return [y for x in args.values() for y in leaves_of(x)]
    return [args]


class Writer:
    """Turns one graph into the source of a program."""

    def __init__(self, recipe: Recipe, traced: Trace) -> None:
        self.recipe, self.graph, self.inputs = recipe, traced.graph, traced.inputs
        self.outputs, self.captured = traced.outputs, traced.captured
        self.signature = signature(self.graph) if self.captured else None
        self.form = "single" if recipe.form == "split" and not self.splits() else recipe.form
        self.space: dict[str, Any] = KERNELS | MERGED if recipe.lists else dict(SINGLE)
        self.placeholders = {i.node: i for i in self.inputs}
        self.kinds: dict[fx.Node, str] = {}  # list, number or, of what depends on closed-over tensors alone, tensor
        self.like: dict[fx.Node, bool] = {}  # the parameter's shape and dtype
        self.shaped: dict[fx.Node, bool] = {}  # the parameter's shape
        self.single: set[fx.Node] = set()  # one number per parameter
        self.coefficients: dict[str, str] | None = (
            None  # in a line of a split program: the number that stands for an expression
        )
        self.uses: dict[fx.Node, int] = {}
        self.copies = self.tangled = False

    def splits(self) -> bool:
        """Whether the numbers can be computed apart: all that is no list is a number."""
        return not any([isinstance(x, Tensor) for node in self.graph.nodes for x in leaves_of((node.args, node.kwargs))])

    def program(self) -> Program:
        self.classify()
        ops = self.contract()
        if self.recipe.lists:
            self.reuse(ops)
        lines = ops
        if self.form == "kernels":
            ops = Merger(lines, self.graph, self.kinds, self.uses).merged()
        source = self.write(ops)
        name = f"program_{next(_serial)}"
        file = f"<purestep {name}: {'+'.join(p.declaration.name for p in self.recipe.parts)}>"
        linecache.cache[file] = (len(source), None, source.splitlines(True), file)  # tracebacks and debuggers show it
        exec(builtins.compile(source, file, "exec"), self.space)
        sizes = [self.block(op) for op in ops]
        local = all(self.shaped[i.node] or i.encoded for i in self.inputs if not i.number) and all(sizes)
        local = local and not any(map(self.is_tensor, self.outputs))
        block = math.lcm(*sizes) if local else 0
        loops = [op.out for op in ops if op.name in ("loop", "where", "compare")]  # a number would change the dtype in these
        broadcasts = block == 1 and all(self.is_list(x) for node in loops for x in nodes_in((node.args, node.kwargs)))
        reads = self.uses.get(self.inputs[1].node, 0) > 0
        run, numbers = self.space["program"], self.space.get("coefficients")
        parts = [part.declaration for part in self.recipe.parts]
        guards = tuple([x for d in parts for x in guards_of(d.function)])
        made = Program(
            tuple([d.name for d in parts]), self.recipe.apply, name, source, run, block, broadcasts, reads, len(lines),
            len(ops) < len(lines), numbers, self.captured, self.signature, guards, self.copies, self.tangled,
        )  # fmt: skip
        weakref.finalize(made, linecache.cache.pop, file, None).atexit = False
        return made

    def block(self, op: Op) -> int:
        """How many consecutive numbers one operation treats by themselves; 0 if it must see all of a tensor."""
        if op.name == "loop" and not op.elementwise:
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
            kinds = {self.kinds[a] for a in args}
            constants = not args or any(isinstance(x, Tensor) for x in leaves_of((node.args, node.kwargs)))
            self.kinds[node] = "list" if "list" in kinds else "tensor" if constants or "tensor" in kinds else "number"
            if self.kinds[node] == "list" and getattr(node.target, "single", False):
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
            return {"divide": "div", "multiply": "mul", "true_divide": "div", "subtract": "sub"}.get(target, target)
        if node.op == "call_function":
            if node.target in NAMES:
                return NAMES[node.target]
            if node.target in TORCH:
                return str(getattr(node.target, "__name__", ""))
        return ""

    def is_number(self, x: Any) -> bool:
        """Whether an argument is a real number: one of Python's, or one that the program computes."""
        return self.kinds[x] == "number" if isinstance(x, fx.Node) else isinstance(x, (bool, int, float))

    def is_real(self, x: Any) -> bool:
        """Whether an argument is a list of tensors of the parameters' shapes and dtypes."""
        return self.like.get(x, False) if isinstance(x, fx.Node) else False

    # -- 2. contraction

    def contract(self) -> list[Op]:
        for node in self.graph.nodes:
            if node.op not in ("output", "placeholder") and self.kinds[node] == "list":
                self.describe(self.op(node))
        ops: list[Op] = []
        absorbed: set[fx.Node] = set()
        for node in reversed(list(self.graph.nodes)):
            if node.op in ("output", "placeholder") or self.kinds[node] != "list" or node in absorbed:
                continue
            op = self.fused(node, absorbed) or self.op(node)
            op.fresh |= node in self.single or getattr(node.target, "block", 0) > 0 or getattr(node.target, "like", False)
            ops.append(op)
        ops.reverse()
        return ops

    def describe(self, op: Op) -> None:
        """Note what the result of an operation is like, by what its arguments are like."""
        if getattr(op.out.target, "like", False):
            self.shaped[op.out] = self.like[op.out] = True
            return
        lists = [x for x in nodes_in((op.args, op.out.kwargs)) if self.is_list(x) and x not in self.single]
        known = bool(op.targets) or op.name in ("where", "compare") or (op.name == "loop" and op.elementwise)
        self.shaped[op.out] = known and bool(lists) and all([self.shaped[x] for x in lists])
        values = [x for x in op.args[1:] if x in lists] if op.name == "where" else lists
        keeps = bool(op.targets) or (op.name == "where" and not any([isinstance(x, complex) for x in op.args]))
        self.like[op.out] = self.shaped[op.out] and keeps and bool(values) and all(map(self.is_real, values))

    def op(self, node: fx.Node) -> Op:
        """One operation as a line."""
        name, args = self.name(node), list(node.args)
        loop = Op(node, "loop", args, fresh=False, elementwise=False)
        if node.kwargs or (node.op == "call_method" and not args):
            return loop
        if not all([self.is_list(a) or self.is_number(a) or isinstance(a, complex) for a in args]):
            return loop  # a tensor that is closed over may be of any shape
        lists = [self.is_list(a) for a in args]
        if self.single.intersection(x for x in args if self.is_list(x)):
            if name in COMMUTATIVE and args[0] in self.single:
                args.reverse()
            known = name in BINARY and len(args) == 2 and self.is_list(args[0]) and args[0] not in self.single
            return Op(node, name, args, (0,)) if known and self.is_real(args[0]) else loop
        found = self.kernel(node, name, args, lists)
        if found is None:
            return loop
        if found.targets and not all([self.is_real(a) if self.is_list(a) else not isinstance(a, complex) for a in args]):
            return Op(node, "loop", args)  # torch knows what dtype it is
        return found

    def kernel(self, node: fx.Node, name: str, args: list[Any], lists: list[bool]) -> Op | None:
        """One operation as a line, if it treats every number by itself."""
        if name in UNARY and len(args) == 1:
            return Op(node, name, args, (0,))
        if name in BINARY and len(args) == 2:
            if all(lists):
                return Op(node, name, args, (0, 1) if name in COMMUTATIVE or name == "div" else (0,))
            if lists[0]:
                return Op(node, name, args, (0,))
            if name in COMMUTATIVE:
                return Op(node, name, args[::-1], (0,))
            return Op(node, {"sub": "rsub", "div": "rdiv"}[name], args[::-1], (0,))
        if name == "pow" and lists == [True, False]:
            two = isinstance(args[1], (int, float)) and args[1] == 2
            return Op(node, "square" if two else "pow", args[:1] if two else args, (0,))
        if name == "square" and len(args) == 1:
            return Op(node, "square", args, (0,))
        if name == "lerp" and lists == [True, True, False]:
            return Op(node, name, args, (0,))
        if node.target in COMPARISONS:
            return Op(node, "compare", args)
        if name == "where" and len(args) == 3 and node.op == "call_function":
            return Op(node, "where", args, fresh=lists[0])
        return None

    def fused(self, node: fx.Node, absorbed: set[fx.Node]) -> Op | None:
        """`x ± k*y`, `x ± k*(y*z)` or `x ± k*(y/z)` as one operation, if the product is used nowhere else."""
        name, args = self.name(node), node.args
        if name not in ("add", "sub") or node.kwargs or len(args) != 2 or not self.is_real(node):
            return None
        if self.single.intersection(node.all_input_nodes):
            return None
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
        if self.uses[node] > 1 or node.kwargs or node in self.placeholders or not self.is_real(node):
            return None
        if self.single.intersection(node.all_input_nodes) or not all(
            [self.is_real(x) if self.is_list(x) else self.is_number(x) for x in node.args]
        ):
            return None
        name, args = self.name(node), node.args
        if name == "neg":
            inner = self.product(args[0]) or Product([], [args[0]], "mul", set())
            return Product([*inner.numbers, MINUS], inner.lists, inner.name, inner.absorbed | {node})
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
        taken: set[str] = {*self.space, *RESERVED, *([NUMBERS] if self.form == "split" else [])}
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
        split = self.form == "split"
        for node in self.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            if self.kinds[node] == "number":
                self.number(node)
            elif self.kinds[node] == "tensor":
                self.lines.append(f"{self.fresh('c')} = {self.expression(node)}")
                self.var[node] = self.lines[-1].split(" ", 1)[0]
            elif node in by_node:
                if split:
                    numbers, self.lines, self.coefficients = self.lines, numbers, coefficients
                self.statement(by_node[node])
                if split:
                    numbers, self.lines, self.coefficients = self.lines, numbers, None
        if split:
            numbers, self.lines, self.coefficients = self.lines, numbers, coefficients
        results = self.results(self.memory(ops))
        if split:
            numbers, self.lines, self.coefficients = self.lines, numbers, None
            return self.halves(coefficients, numbers, results)
        return function("program", [self.var[i.node] for i in self.inputs], self.lines, results)

    def halves(self, coefficients: dict[str, str], lines: list[str], outputs: list[str]) -> str:
        """A split program: what is done with numbers, and what is done with tensors."""
        scalars = [x for x, k in zip(self.outputs, self.returned()) if k.number]
        arguments = [self.var[i.node] for i in self.inputs if i.number]
        results = [
            f"({', '.join(coefficients)}{',' * bool(coefficients)})",
            f"({''.join(f'{self.text(x)}, ' for x in scalars)})",
        ]
        first = function("coefficients", arguments, self.lines, results)
        unpacked = [f"{', '.join(coefficients.values())}, = {NUMBERS}.unbind()"] if coefficients else []
        arguments = [*[self.var[i.node] for i in self.inputs if not i.number], NUMBERS]
        outputs = [x for x, k in zip(outputs, self.returned()) if not k.number]
        return first + "\n\n" + function("program", arguments, unpacked + lines, outputs)

    def number(self, node: fx.Node) -> None:
        """A number: its expression, bound to a name only if it is used more than once."""
        if node.target in INFIX:
            text = f"({self.text(node.args[0])} {INFIX[node.target]} {self.text(node.args[1])})"
        elif node.target is operator.neg:
            text = f"(-{self.text(node.args[0])})"
        else:
            function: Any = getattr(Tensor, str(node.target)) if node.op == "call_method" else maths.untraced(node.target)
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
        items = {x: f"{ITEM}{i}" if len(lists) > 1 else ITEM for i, x in enumerate(lists)}
        saved = {x: self.var[x] for x in lists}
        self.var.update(saved if not self.recipe.lists else items)
        text = self.expression(node)
        if not self.recipe.lists:
            return text
        self.var.update(saved)
        names = ", ".join(items.values())
        over = self.var[lists[0]] if len(lists) == 1 else f"zip({', '.join(self.var[x] for x in lists)})"
        return f"[{text} for {names} in {over}]"

    def expression(self, node: fx.Node) -> str:
        """One operation as torch has it."""
        if node.target in INFIX:
            return f"{self.text(node.args[0])} {INFIX[node.target]} {self.text(node.args[1])}"
        if node.target is operator.neg:
            return f"-{self.text(node.args[0])}"
        if node.op == "call_method":
            receiver, *rest = node.args
            return f"{self.text(receiver)}.{node.target}({self.arguments(rest, node.kwargs)})"
        return f"{self.constant(maths.untraced(node.target))}({self.arguments(node)})"

    # -- 6. results

    def memory(self, ops: list[Op]) -> dict[fx.Node, set[Any]]:
        """For each list, the lists that it may share memory with, itself among them if it has made its own."""
        found: dict[fx.Node, set[Any]] = {i.node: {i.node} for i in self.inputs if not i.number}
        for op in ops:
            for node, i in (*op.further.items(), *([] if op.inplace is None else [(op.out, op.inplace)])):
                found[node] = found[op.args[i]]
            if op.inplace is None:
                given = leaves_of((op.out.args, op.out.kwargs))
                of = [] if op.fresh else [x for x in given if self.is_list(x)]
                found[op.out] = {op.out}.union(*[found[x] for x in of])
                if not op.fresh and (self.opaque(op.out) or any(map(self.is_tensor, given))):
                    found[op.out].add(CLOSED_OVER)
        return found

    def is_tensor(self, x: Any) -> bool:
        """Whether an argument is a tensor that is closed over, or comes from such alone."""
        return isinstance(x, Tensor) or (isinstance(x, fx.Node) and self.kinds[x] == "tensor")

    @staticmethod
    def opaque(node: fx.Node) -> bool:
        """Whether an operation may return anything."""
        return hasattr(node.target, "single") and getattr(node.target, "__module__", None) != maths.__name__

    def returned(self) -> list[Returned]:
        """What every output is to the caller."""
        first = [Returned(self.inputs[1].node, self.inputs[1].node if self.recipe.apply else None, False)]
        return first + [Returned(i.node, i.node, i.number) for i in self.inputs[2:] if i.output is not None]

    def results(self, memory: dict[fx.Node, set[Any]]) -> list[str]:
        """The outputs, each in memory of its own.

        What was given away takes the new values: whatever has been computed elsewhere is copied there. Whatever would still be
        in the memory of something else is copied before that.
        """
        outputs, returned = self.outputs, self.returned()
        texts = [self.result(x, r) for x, r in zip(outputs, returned)]
        donated = [bool(self.recipe.donate and r.home is not None and not r.number) for r in returned]
        moves = [k for k, yes in enumerate(donated) if yes and texts[k] != self.var[returned[k].like]]
        written = {returned[k].home for k in moves}
        taken: set[Any] = {CLOSED_OVER, *self.placeholders} - ({self.inputs[0].node} if self.recipe.own_grads else set())
        for k in sorted(range(len(outputs)), key=lambda k: k == 0):  # the updates are copied rather than the state
            if returned[k].number or not self.is_list(outputs[k]) or (donated[k] and k not in moves):
                continue
            shares = memory[outputs[k]]
            if shares & (written if donated[k] else taken):
                self.copies = True
                self.tangled |= bool(shares & set(self.placeholders) - {self.inputs[0].node})
                name = self.fresh("t")
                self.lines.append(f"{name} = clone({texts[k]})")
                texts[k] = name
            elif not donated[k]:
                taken |= shares
        for k in moves:
            home = self.var[returned[k].like]
            self.lines.append(f"copy_({home}, {texts[k]})")
            texts[k] = home
        return texts

    def result(self, x: Any, returned: Returned) -> str:
        """An output; one whose dtype the program cannot vouch for is brought back to its input's."""
        if returned.number:
            return self.text(x, True)
        if not self.is_list(x):
            return f"filled({self.text(x, True)}, {self.var[returned.like]})"
        if self.like.get(x, False) or x is returned.home:
            return self.text(x)
        return f"cast({self.text(x)}, {self.var[returned.like]})"

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
            factors = [self.factor(k, len(x.numbers) == 1) for k in x.numbers if k is not MINUS]
            negative = x.negative ^ bool(len([k for k in x.numbers if k is MINUS]) % 2)
            text = " * ".join(factors) or "1"
            return f"-{text if len(factors) < 2 and self.atomic(text) else f'({text})'}" if negative else text
        if type(x) in (bool, int, NoneType) or (type(x) is float and math.isfinite(x)):
            text = repr(x)
            return f"({text})" if text.startswith("-") and not bare else text
        if isinstance(x, (tuple, list)):
            inner = "".join(f"{self.text(y)}, " for y in x)
            return f"({inner})" if isinstance(x, tuple) else f"[{inner}]"
        if isinstance(x, slice):
            return f"slice({self.text(x.start)}, {self.text(x.stop)}, {self.text(x.step)})"
        return self.constant(x)

    def factor(self, x: Any, bare: bool) -> str:
        """A number as a factor of others: torch takes no bool there."""
        if isinstance(x, bool):
            return str(int(x))
        return f"(1 * {self.text(x)})" if isinstance(x, fx.Node) and x.target in CHOICES else self.text(x, bare)

    @staticmethod
    def atomic(text: str) -> bool:
        return text.isidentifier() or text.replace(".", "").isdigit()

    def arguments(self, node: Any, kwargs: dict[str, Any] | None = None) -> str:
        args, kwargs = (node.args, node.kwargs) if isinstance(node, fx.Node) else (node, kwargs or {})
        return ", ".join([*[self.text(a, True) for a in args], *[f"{k}={self.text(v, True)}" for k, v in kwargs.items()]])

    def constant(self, x: Any) -> str:
        """The name of an object in the program's namespace."""
        name = getattr(x, "__name__", "") if callable(x) else ""
        if not name.isidentifier() or keyword.iskeyword(name):
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
