"""How the house is built: what may be imported where, and what a public name says of itself."""

from __future__ import annotations

import ast
import graphlib
import inspect
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, FunctionType, ModuleType
from typing import Any, NamedTuple

import pytest
import torch

import purestep as ps
from purestep import optim
from purestep._core import torch_api
from tests.conftest import in_turn

ROOT = Path(ps.__file__).parent
SOURCES = {
    path.relative_to(ROOT).with_suffix("").as_posix(): ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))
}
"""The syntax tree of every module, by its path without the ending."""

# ------------------------------------------------------------------------------------------------------ torch's private API

NAMEDTUPLES = {"_asdict", "_field_defaults", "_fields", "_make", "_replace"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def of_torch(module: str) -> bool:
    return module == "torch" or module.startswith("torch.")


def dotted(node: ast.AST) -> list[str]:
    """`torch._C.f` as its names; empty if it is anything else than names in a row."""
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return [*before, node.attr] if before else []
    return []


def beginning(node: ast.AST) -> str:
    """What a string, or an f-string, begins with."""
    if isinstance(node, ast.JoinedStr) and node.values:
        node = node.values[0]
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def looked_up(call: ast.AST) -> str:
    """`name` of `getattr(x, "name")`, and of its relatives."""
    found = isinstance(call, ast.Call) and dotted(call.func)[-1:] in (["getattr"], ["hasattr"], ["setattr"], ["attrgetter"])
    return next((beginning(x) for x in call.args if is_private(beginning(x))), "") if found else ""  # type: ignore[attr-defined]


def private_imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Every private name of torch's that is imported, or reached from a name that was imported from torch."""
    roots = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for x in node.names:
                if of_torch(x.name):
                    roots.add(x.asname or x.name.split(".")[0])
                    if any(map(is_private, x.name.split("."))):
                        yield node.lineno, x.name
        elif isinstance(node, ast.ImportFrom) and node.module and of_torch(node.module):
            for x in node.names:
                roots.add(x.asname or x.name)
                if any(map(is_private, [*node.module.split("."), x.name])):
                    yield node.lineno, f"{node.module}.{x.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            names = dotted(node)
            if names and names[0] in roots and node.attr not in torch_api.ATTRIBUTES:
                yield node.lineno, ".".join(names)
        elif isinstance(node, ast.Call) and looked_up(node) and (dotted(node.args[0]) or [""])[0] in roots:
            yield node.lineno, f"{dotted(node.args[0])[0]}.{looked_up(node)}"


def own_names() -> set[str]:
    """The private names that purestep defines, and does not inherit: of functions, methods, classes, fields and attributes."""
    found = set()
    for tree in SOURCES.values():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add(node.name)
            elif (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and dotted(node.value) in (["self"], ["cls"])
            ):
                found.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Tuple):  # __slots__, and lists of attributes
                found.update(x.value for x in node.elts if isinstance(x, ast.Constant) and isinstance(x.value, str))
    inherited = dir(torch.optim.SGD([torch.zeros(1)]))
    return found - set(inherited)


def foreign_attributes(tree: ast.Module, own: set[str]) -> set[str]:
    """The private attributes that are read of anything and are none of ours: they are torch's."""
    found = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)} | {looked_up(x) for x in ast.walk(tree)}
    return {name for name in found if is_private(name)} - own - NAMEDTUPLES


def test_private_names_of_torch_are_imported_in_one_file() -> None:
    found = [
        f"{module}.py:{line}: {name}"
        for module, tree in SOURCES.items()
        if module != "_core/torch_api"
        for line, name in private_imports(tree)
    ]
    assert not found, "import these from purestep._core.torch_api:\n" + "\n".join(found)


def test_private_attributes_of_torch_are_listed_in_that_file() -> None:
    own = own_names()
    used = {name for module, tree in SOURCES.items() if module != "_core/torch_api" for name in foreign_attributes(tree, own)}
    assert used == set(torch_api.ATTRIBUTES), "torch_api.ATTRIBUTES lists what is read of torch's objects in place"


@pytest.mark.parametrize(
    "text",
    [
        "from torch._C import _functorch",
        "from torch.utils import _pytree as pytree",
        "from torch._utils import _flatten_dense_tensors",
        "import torch._dynamo",
        "import torch.utils._pytree as pytree",
        "import torch\ntorch._foreach_add(x, y)",
        "import torch\nwith torch._C._DisableFuncTorch():\n    pass",
        "import torch\ngetattr(torch, f'_foreach_{name}')",
        "import torch\ngetattr(torch, '_fused_adam_')",
        "from torch.optim import optimizer\noptimizer._global_optimizer_pre_hooks",
    ],
)
def test_a_private_name_of_torch_is_found(text: str) -> None:
    assert list(private_imports(ast.parse(text)))


@pytest.mark.parametrize("text", ["x.untyped_storage()._weak_ref()", "getattr(x, '_backward_hooks', None)", "x._is_view()"])
def test_a_private_attribute_of_torch_is_found(text: str) -> None:
    assert foreign_attributes(ast.parse(text), own_names())


# --------------------------------------------------------------------------------------------------------------- the floors

FLOORS = [
    ["_core"],
    ["_trace"],
    ["_executors"],
    ["_engine"],
    ["schedules"],
    ["transform"],
    ["compose"],
    ["declare"],
    ["transforms"],
    ["_optimizer"],
    ["algorithms"],
    ["state", "meta"],
    ["saving", "convert"],
    ["optim"],
    ["_moved"],
    ["__init__"],
]
"""The packages and modules directly below purestep, the lowest first. A module imports from lower floors and its own package."""

UPWARD: dict[tuple[str, str], str] = {}
"""What is imported from a higher floor all the same: the module, what it imports, and the reason. There is nothing today."""


def name_of(module: str) -> str:
    """A module as an import writes it, below `purestep`; purestep itself is `__init__`."""
    return module.removesuffix("/__init__").replace("/", ".")


MODULES = {name_of(module): tree for module, tree in SOURCES.items()}


def imports(tree: ast.Module) -> Iterator[str]:
    """The modules of purestep that a module imports, as `MODULES` names them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [x.name for x in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "an import that begins with a dot"
            found = [f"{node.module}.{x.name}" for x in node.names]
        else:
            continue
        for name in found:
            root, _, below = name.partition(".")
            if root == "purestep":
                while below and below not in MODULES:  # it ends in a name of that module
                    below = below.rpartition(".")[0]
                yield below or "__init__"


def package(module: str) -> str:
    return module.partition(".")[0]


def floor(module: str) -> int:
    found = [k for k, names in enumerate(FLOORS) if package(module) in names]
    assert found, f"purestep.{package(module)} has no floor: say in FLOORS where it belongs"
    return found[0]


def climbs(module: str, target: str) -> bool:
    return package(module) != package(target) and floor(target) >= floor(module)


def test_imports_go_down() -> None:
    found = {(module, target) for module, tree in MODULES.items() for target in imports(tree) if climbs(module, target)}
    assert found == set(UPWARD), "each of these imports from its own floor or a higher one"


def test_no_circle() -> None:
    edges = {module: set(imports(tree)) - {module} for module, tree in MODULES.items()}
    list(graphlib.TopologicalSorter(edges).static_order())  # raises CycleError, and says which modules


def test_no_import_inside_a_function() -> None:
    found = [
        f"{module}.py:{inner.lineno}"
        for module, tree in SOURCES.items()
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        for inner in ast.walk(node)
        if isinstance(inner, (ast.Import, ast.ImportFrom))
    ]
    assert not found


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("_core.maths", "from purestep._trace import foreach"),
        ("_engine.plan", "from purestep.transform import Transform"),
        ("transforms.mask", "import purestep.algorithms.sgd"),
        ("state", "from purestep.meta.loop import Loop"),
        ("meta.loop", "import purestep as ps"),
    ],
)
def test_an_import_that_goes_up_is_found(module: str, text: str) -> None:
    assert any([climbs(module, target) for target in imports(ast.parse(text))])


# ------------------------------------------------------------------------------------------------------------- public names


def test_purestep_shows_public_names_only() -> None:
    names = [name for name in dir(ps) if not name.startswith("__")]
    assert sorted(names) == sorted(ps.__all__) == sorted(set(ps.__all__))
    assert not any([name.startswith("_") for name in names])
    assert not any(
        [isinstance(getattr(ps, name), ModuleType) for name in set(names) - {"convert", "meta", "optim", "schedules"}]
    )


def test_a_star_import_gives_public_names_only() -> None:
    given: dict[str, object] = {}
    exec("from purestep import *", given)
    assert sorted(set(given) - {"__builtins__"}) == sorted(ps.__all__)


# --------------------------------------------------------------------------------------------------------------- docstrings


class Function(NamedTuple):
    """A public function or method, or a class that is called to make an object."""

    doc: str
    arguments: list[str]
    extras: set[str]  # what else the function of a declared transform takes: the extra arguments of an update
    returns: str  # its annotation; empty if it returns nothing
    raises: set[str]  # the errors that its own lines raise


FACTORIES = {"Transform", "Chain", "Schedule", "Self"}
"""What a factory returns is the thing that its first sentence describes; its arguments are hyperparameters and switches, of which
only those are described that need a sentence."""

NOT_YET: dict[str, str] = {}
"""Whose docstrings are still to be written, and why. It may only get shorter."""


def public_values() -> Iterator[tuple[str, Any]]:
    yield from [(name, getattr(ps, name)) for name in ps.__all__]
    for module in ("convert", "schedules", "meta", "optim"):
        for name, value in sorted(vars(getattr(ps, module)).items()):
            if not name.startswith("_") and str(getattr(value, "__module__", "")).startswith("purestep"):
                yield f"{module}.{name}", value


def own_raises(function: Any) -> set[str]:
    """The errors that the lines of a function raise, without those of functions within it."""
    module = name_of(function.__module__.removeprefix("purestep.").replace(".", "/"))
    nodes: list[ast.AST] = [MODULES[module]]
    for name in function.__qualname__.split("."):
        nodes = [x for node in nodes for x in ast.iter_child_nodes(node) if getattr(x, "name", None) == name]
    found, rest = set(), [x for node in nodes for x in ast.iter_child_nodes(node)]
    while rest:
        node = rest.pop()
        if isinstance(node, (ast.FunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            found.add(dotted(node.exc.func)[-1])
        rest += ast.iter_child_nodes(node)
    return found


def described(function: Any, doc: str | None = None) -> Function:
    signature = inspect.signature(function)
    returns = signature.return_annotation
    inner = inspect.signature(function.declaration.function) if hasattr(function, "declaration") else signature
    extras = set(inner.parameters) - set(signature.parameters)
    return Function(
        inspect.getdoc(function) or "" if doc is None else doc,
        [name for name in signature.parameters if name not in ("self", "cls")],
        extras,
        "" if returns in (inspect.Signature.empty, None, "None") else str(returns),
        own_raises(function),
    )


def public_functions() -> Iterator[tuple[str, Function]]:
    """All of them, but for what torch describes: the arguments of the classes of `torch.optim`; and states, which users read."""
    for name, value in public_values():
        if isinstance(value, FunctionType):
            yield name, described(value)
        alias = typing.get_origin(value) is not None  # a class to Python 3.10
        if alias or not inspect.isclass(value) or issubclass(value, (tuple, Warning)):
            continue
        mirror = name.startswith("optim.") and hasattr(torch.optim, value.__name__)
        if not (mirror and value is not ps.optim.Optimizer) and value not in (
            ps.Transform,
            ps.schedules.Schedule,
            ps.Inner,
            ps.Explanation,
        ):
            yield name, described(value.__init__, inspect.getdoc(value) or "")
        for attribute, method in vars(value).items():
            if isinstance(method, staticmethod):
                method = method.__func__
            if isinstance(method, FunctionType) and not attribute.startswith("_"):
                yield f"{name}.{attribute}", described(method)


FUNCTIONS = dict(public_functions())


def section(doc: str, title: str) -> str | None:
    found = re.search(rf"^{title}:\n((?:[ ]{{4,}}.*\n|\n(?=[ ]{{4}}))+)", doc + "\n", re.MULTILINE)
    return found.group(1) if found else None


def entries(text: str | None) -> list[str]:
    """The names that a section describes, each at the beginning of a line."""
    return re.findall(r"^ {4}\*{0,2}(\w+):", text or "", re.MULTILINE)


def gaps(f: Function) -> list[str]:
    """What a docstring does not say."""
    found = [] if f.doc else ["it has no docstring"]
    said = entries(section(f.doc, "Args"))
    if f.arguments and not said:
        found.append("it has arguments, but no Args")
    found += [f"Args: there is no argument {name!r}" for name in said if name not in {*f.arguments, *f.extras}]
    if f.returns not in FACTORIES:
        found += [f"Args: nothing is said of {name!r}" for name in f.arguments if said and name not in said]
        if f.returns and not section(f.doc, "Returns"):
            found.append("it returns something, but has no Returns")
    missing = f.raises - set(entries(section(f.doc, "Raises")))
    return [*found, *[f"Raises: it raises {error}" for error in sorted(missing)]]


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name not in NOT_YET])
def test_a_docstring_says_what_goes_in_and_what_comes_out(name: str) -> None:
    assert not gaps(FUNCTIONS[name])


def test_the_list_of_missing_docstrings_gets_shorter() -> None:
    assert [name for name in NOT_YET if name not in FUNCTIONS or not gaps(FUNCTIONS[name])] == []


@pytest.mark.parametrize(
    ("doc", "found"),
    [
        ("", ["no docstring", "no Args", "no Returns", "raises ValueError"]),
        (
            "One.\n\nArgs:\n    x: a.\n    z: b.\n\nReturns:\n    c.\n\nRaises:\n    ValueError: d.",
            ["argument 'z'", "said of 'y'"],
        ),
        ("One.\n\nArgs:\n    x: a.\n    y: a.\n\nReturns:\n    c.\n\nRaises:\n    TypeError: d.", ["raises ValueError"]),
        ("One.\n\nArgs:\n    x: a.\n    y: a.\n\nReturns:\n    c.\n\nRaises:\n    ValueError: d.", []),
    ],
)
def test_a_gap_in_a_docstring_is_found(doc: str, found: list[str]) -> None:
    said = gaps(Function(doc, ["x", "y"], set(), "Tensor", {"ValueError"}))
    assert len(said) == len(found)
    assert all([part in text for part, text in zip(found, said)])


# ------------------------------------------------------------------------------------------------------------- structure

ENGINE = [ROOT / name for name in ("_engine", "_executors", "_trace")]
METHODS, ARGUMENTS, LINES = 12, 6, 50


def definitions() -> Iterator[tuple[str, ast.AST, str]]:
    """Every class and function of the engine, the executors and the tracer: its name, its node, the source of its file."""
    for folder in ENGINE:
        for path in sorted(folder.rglob("*.py")):
            source = path.read_text()
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                    yield f"{folder.name}/{path.name}:{node.name}", node, source


def arguments_of(node: ast.FunctionDef) -> int:
    """How many arguments a function has, `self` aside."""
    named = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return len(named) - bool(named and named[0].arg in ("self", "cls"))


def code_lines_of(node: ast.FunctionDef, source: str) -> int:
    """How many lines of code a function has: no docstring, no comment, no empty line."""
    first = node.body[1] if ast.get_docstring(node) is not None and len(node.body) > 1 else node.body[0]
    lines = source.splitlines()[first.lineno - 1 : node.end_lineno]
    return len([line for line in lines if line.strip() and not line.strip().startswith("#")])


def test_no_class_does_too_much() -> None:
    methods = {
        name: len([x for x in node.body if isinstance(x, ast.FunctionDef)])
        for name, node, _ in definitions() if isinstance(node, ast.ClassDef)
    }  # fmt: skip
    assert {name: n for name, n in methods.items() if n > METHODS} == {}


def test_no_function_takes_too_much() -> None:
    counts = {name: arguments_of(node) for name, node, _ in definitions() if isinstance(node, ast.FunctionDef)}
    assert {name: n for name, n in counts.items() if n > ARGUMENTS} == {}


def test_no_function_is_too_long() -> None:
    lengths = {name: code_lines_of(node, s) for name, node, s in definitions() if isinstance(node, ast.FunctionDef)}
    assert {name: n for name, n in lengths.items() if n > LINES} == {}


# ----------------------------------------------------------------------------------------------------------------- frames


def frames_of(call: Callable[[], object]) -> int:
    """How many frames of purestep's own a call enters."""
    counted = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal counted
        counted += event == "call" and "purestep" in frame.f_code.co_filename and "tests" not in frame.f_code.co_filename

    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(None)
    return counted


def warm(opt: ps.Transform, **how: bool) -> Callable[[], object]:
    params, grads = {f"p{k}": torch.randn(64) for k in range(6)}, {f"p{k}": torch.randn(64) for k in range(6)}
    state = opt.init_state(params)
    for _ in range(6):
        params, state = opt.step(grads, state, params, **how)  # type: ignore[arg-type]
    return lambda: opt.step(grads, state, params, **how)  # type: ignore[arg-type]


def warm_vmapped(make: Callable[..., ps.Transform]) -> Callable[[], object]:
    """A step of four members with learning rates of their own: `vmap` makes the transform anew at every call."""
    opt = make(torch.linspace(1e-3, 1e-2, 4))
    params, grads = ({f"p{k}": torch.randn(4, 64) for k in range(6)} for _ in range(2))
    state = torch.func.vmap(make(1e-3).init_state)(params)
    mapped = torch.func.vmap(lambda opt, g, s, p: opt.step(g, s, p), in_dims=(ps.in_dims(opt), 0, 0, 0))
    for _ in range(6):
        params, state = mapped(opt, grads, state, params)
    return lambda: mapped(opt, grads, state, params)


def warm_optimizer(kind: type[torch.optim.Optimizer]) -> Callable[[], object]:
    params = [torch.nn.Parameter(torch.randn(64)) for _ in range(6)]
    optimizer = kind(params, lr=1e-3)  # type: ignore[call-arg]
    for p in params:
        p.grad = torch.randn(64)
    for _ in range(6):
        optimizer.step()
    return optimizer.step


BUDGET: dict[str, tuple[Callable[[], Callable[[], object]], int]] = {
    "adamw pure": (lambda: warm(ps.adamw(1e-3)), 90),
    "adamw donated": (lambda: warm(ps.adamw(1e-3), donate=True), 45),
    "adamw compiled": (lambda: warm(ps.adamw(1e-3), compile=True), 120),
    "nadam pure": (lambda: warm(ps.nadam(1e-3)), 140),
    "adamw vmapped": (lambda: warm_vmapped(ps.adamw), 240),
    "AdamW": (lambda: warm_optimizer(optim.AdamW), 28),
    "NAdam": (lambda: warm_optimizer(optim.NAdam), 60),
}
"""How many frames a step of six tensors may enter, once it is warm (Python 3.11, where a comprehension is a frame, too)."""


@pytest.mark.parametrize("name", BUDGET)
def test_a_warm_step_calls_little(name: str) -> None:
    make, most = BUDGET[name]
    assert frames_of(make()) <= most


class Item:
    """What `in_turn` looks at of a test."""

    def __init__(self, kind: str, donate: str, args: tuple[str, ...] = ()) -> None:
        self.nodeid, self.long = f"tests/test_some.py::test_it[{kind}-{donate}]", False
        self.config = types.SimpleNamespace(args=args)
        self.callspec = types.SimpleNamespace(params={"kind": kind, "donate": donate})

    def iter_markers(self, name: str) -> list[Any]:
        return [pytest.mark.in_turn("donate").mark]

    def add_marker(self, mark: Any) -> None:
        assert mark.name == "long"
        self.long = True


def test_one_value_in_turn_is_left_for_each_combination_of_the_others() -> None:
    items: list[Any] = [Item(kind, donate) for kind in "abcdef" for donate in "xyz"]
    in_turn(items)
    left = [item.callspec.params for item in items if not item.long]
    assert [x["kind"] for x in left] == list("abcdef")
    assert sorted(x["donate"] for x in left) == list("xxyyzz")
    named: list[Any] = [Item("a", donate, args=("tests/test_some.py::test_it[a-y]",)) for donate in "xyz"]
    in_turn(named)
    assert not named[1].long
