"""From leaf functions to a foreach program, and the cache of programs.

An algorithm is written for one tensor, out of place. A `Recipe` is a run of such leaf functions, one after the other, with
`params + updates` at its end when a step is asked for. `compile` traces it once with `torch.fx` proxies and turns the
graph into straight-line Python over *lists* of tensors (one entry per parameter) and plain numbers:

1. `classify`. A value that depends only on hyperparameters and counters is a number and stays Python arithmetic
   (`1 - b1 ** t`). A value that depends on captured tensors, but on no parameter, is computed once per run. Everything else is
   a list.
2. `lower`. Each list becomes one `torch._foreach_*` call, or a loop over the parameters where no such call exists.
3. `contract`. `x + k*y` becomes `axpy`, `a*x + b*y` `axpby`, `x + k*(y*z)` `addcmul`, `x + k*(y/z)` `addcdiv`: fewer
   passes over memory.
4. `reuse`. A list that no later line reads is overwritten if its memory is the program's (a temporary) or was given away:
   `mul` becomes `mul_`. Nothing else is ever overwritten. The new value of an input that was given away ends up in that
   input's own memory.
5. `fuse`, where a program may call torch's fused kernels: what several lines compute together becomes one line.
6. `outputs`. What a program returns is in memory of its own, or in memory that was given away; where it would not be, it is
   copied.
7. `generate` writes the source.

The source is kept, and printing a program shows it. Nothing here knows any algorithm.
"""

from __future__ import annotations

import builtins
import itertools
import linecache
import operator
import types
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from purestep._core.cache import DECLARATIONS, DeclarationCache
from purestep._core.torch_api import constant_result
from purestep._trace.closure import Guard, guards_of
from purestep._trace.codegen import Code, generate
from purestep._trace.ir import leaves_of
from purestep._trace.passes.classify import classify
from purestep._trace.passes.contract import contract
from purestep._trace.passes.fuse import fuse
from purestep._trace.passes.locality import locality
from purestep._trace.passes.lower import lower
from purestep._trace.passes.reuse import reuse
from purestep._trace.recipe import Form as Form
from purestep._trace.recipe import LeafDeclaration as LeafDeclaration
from purestep._trace.recipe import LeafSpec, Part, Recipe
from purestep._trace.trace import call as call
from purestep._trace.trace import signature, trace

# ---------------------------------------------------------------------------------------------------------------- programs


@dataclass(frozen=True)
class Program:
    """A compiled recipe: call it with the gradients, the parameters, the state's fields and the numbers, in that order.

    It keeps no declaration alive.
    """

    parts: tuple[str, ...]  # the names of its leaf functions
    apply: bool  # the program ends with params + updates
    name: str
    source: str
    run: Callable[..., tuple[Any, ...]] = field(repr=False)
    block: int = 0  # this many consecutive elements of the result depend only on those in the same places; 0: on all
    broadcasts: bool = False  # the program takes tensors that can be broadcast in the places of numbers
    reads_params: bool = True  # the leaf functions read the parameters
    length: int = 0  # how many lines there were before fusion
    matrices: bool = False  # some lines are functions of whole matrices
    merged: bool = False  # some lines call torch's fused kernels
    coefficients: Callable[..., tuple[tuple[Any, ...], tuple[Any, ...]]] | None = field(default=None, repr=False)
    """Of a split program: from all numbers to the coefficients that it takes, as one tensor, and to the numbers it returns."""
    captured: tuple[Tensor, ...] = field(default=(), repr=False)  # the tensors that its leaf functions close over
    signature: Any = field(default=None, repr=False)  # of the graph, if there are captured tensors
    guards: tuple[Guard, ...] = field(default=(), repr=False)  # the numbers that its leaf functions close over
    copies: bool = False  # the program copies some of its outputs, which would share memory otherwise
    fails: bool = False  # it calls an `operation` that may raise
    tangled: bool = False  # it copies an output that would be in the memory of the parameters or of their state
    kernels: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)  # what the compiled executor makes of it

    def __str__(self) -> str:
        return self.source

    @property
    def elementwise(self) -> bool:
        """Whether each element of the result depends only on the elements in the same place."""
        return self.block == 1


def compile(recipe: Recipe) -> Program:
    """Trace a recipe and write its program."""
    traced = trace(recipe)
    graph = traced.graph
    computes = signature(graph) if traced.captured else None  # before a pass adds nodes
    if recipe.form == "split" and not splittable(graph):
        recipe = recipe._replace(form="single")
    values = classify(traced)
    lines = contract(graph, values, lower(graph, values))
    if recipe.lists:
        lines = reuse(lines, traced, values, recipe)
    ops = fuse(lines, graph, values) if recipe.form == "kernels" else lines
    code = generate(ops, traced, values, recipe)
    local = locality(ops, traced, values, recipe.form == "sharded")
    declarations = [part.declaration for part in recipe.parts]
    parts = tuple([d.name for d in declarations])
    name = f"program_{next(_serial)}"
    file = f"<purestep {name}: {'+'.join([''.join(filter(str.isprintable, part)) for part in parts])}>"
    load(code, file)
    made = Program(
        parts=parts,
        apply=recipe.apply,
        name=name,
        source=code.source,
        run=code.objects["program"],
        block=local.block,
        broadcasts=local.broadcasts,
        reads_params=values.uses[traced.param] > 0,
        length=len(lines),
        matrices=any([values.stacks(op.out) for op in ops]),
        merged=len(ops) < len(lines),
        coefficients=code.objects.get("coefficients"),
        captured=traced.captured,
        signature=computes,
        guards=tuple([x for d in declarations for x in guards_of(d.function)]),
        copies=code.copies,
        fails=any([getattr(node.target, "fails", False) for node in graph.nodes]),
        tangled=code.tangled,
    )
    weakref.finalize(made, linecache.cache.pop, file, None).atexit = False
    return made


def splittable(graph: fx.Graph) -> bool:
    """Whether everything that is no list can be computed apart: it can, if no operation takes a captured tensor."""
    return not any([isinstance(x, Tensor) for node in graph.nodes for x in leaves_of((node.args, node.kwargs))])


def load(code: Code, file: str) -> None:
    """Define the functions of a program among its objects; tracebacks and debuggers show their source under this file name."""
    linecache.cache[file] = (len(code.source), None, code.source.splitlines(True), file)
    exec(builtins.compile(code.source, file, "exec"), code.objects)


# ------------------------------------------------------------------------------------------------------------------- cache

PROGRAMS = 1024
"""The cache keeps this many programs; then it drops the oldest."""


_programs: DeclarationCache[Program] = DeclarationCache(PROGRAMS)
"""Programs by their recipes, with the keys of the declarations in place of the declarations."""

_serial = itertools.count()
_key = operator.attrgetter("key")
_functions = types.ModuleType("purestep.programs", "Every program's function, under its name.")


def program(
    details: tuple[Any, ...],
    apply: bool,
    own_grads: bool,
    donate: bool,
    *declarations: LeafDeclaration,
    form: Form = "lists",
) -> Program:
    """The program for a recipe; it is made at the first call, and looked up at every other.

    `details` has a `LeafSpec` for each declaration. They are apart from the declarations because `torch.compile` can only read
    a recipe of plain constants.
    """
    key = (details, apply, own_grads, donate, form, tuple(map(_key, declarations)))
    found = _programs.entries.get(key)
    if found is None or ((found.guards or found.captured) and not is_current(found, details, declarations)):
        # Tracing changes nothing global: if two threads trace at once, they make equal programs.
        made = compile(Recipe(parts_of(details, declarations), apply, own_grads, donate, form))
        setattr(_functions, made.name, made.run)
        weakref.finalize(made, vars(_functions).pop, made.name, None).atexit = False
        _programs.keep(key, made, declarations)
        return made
    return found


def runner(
    details: tuple[Any, ...], apply: bool, own_grads: bool, donate: bool, *declarations: LeafDeclaration, form: Form = "lists"
) -> Any:
    """The function of the program for a recipe, in a form that `torch.compile` can trace through."""
    if torch.compiler.is_compiling():
        details = tuple([LeafSpec(spec[0], *[tuple(map(constant, xs)) for xs in spec[1:]]) for spec in details])
        return getattr(_functions, name_of(form, details, apply, own_grads, donate, *[d.key for d in declarations]))
    return program(details, apply, own_grads, donate, *declarations, form=form).run


def constant(x: Any) -> Any:
    """`x`, for `torch.compile` as a constant: a whole number that was another one in an earlier graph is a symbol to it."""
    if type(x) is not int:
        return x
    return len(range(x)) if x >= 0 else -len(range(-x))


@constant_result
def name_of(form: Form, details: tuple[Any, ...], apply: bool, own_grads: bool, donate: bool, *keys: str) -> str:
    """The name of the program for a recipe: a constant, while `torch.compile` traces. It is given the declarations' keys."""
    return program(details, apply, own_grads, donate, *[DECLARATIONS[key] for key in keys], form=form).name


def parts_of(details: Sequence[Any], declarations: Sequence[LeafDeclaration]) -> tuple[Part, ...]:
    """The leaf functions of a recipe."""
    return tuple([Part(d, LeafSpec(*spec)) for d, spec in zip(declarations, details)])


def is_current(found: Program, details: tuple[Any, ...], declarations: Sequence[LeafDeclaration]) -> bool:
    """Whether the leaf functions of a program still close over the same numbers and tensors.

    Only running the leaf functions can tell which tensors they close over.
    """
    if not all([guard.holds() for guard in found.guards]):
        return False
    if not found.captured:
        return True
    again = trace(Recipe(parts_of(details, declarations), found.apply, False, False))
    same = len(again.captured) == len(found.captured) and all(map(operator.is_, again.captured, found.captured))
    return same and signature(again.graph) == found.signature
