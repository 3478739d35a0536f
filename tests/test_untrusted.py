"""Input that is not trusted: checkpoints that are corrupted or hostile, and names that would be code.

Loading executes nothing. What does not fit is refused by an error that names the place, before anything has changed; what is
loaded is stepped as torch steps it. No string of a user's gets into the text of a program. docs/reliability.md says what is
promised, SECURITY.md what is trusted.

`PURESTEP_SEED` draws other corruptions, `PURESTEP_EXAMPLES=k` k times as many.
"""

from __future__ import annotations

import ast
import builtins
import copy
import io
import os
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import purestep as ps
from purestep import optim
from purestep._trace import program as programs
from tests.problems import closure_of

EXAMPLES = int(os.environ.get("PURESTEP_EXAMPLES", "1"))
SEED = int(os.environ.get("PURESTEP_SEED", "0"))
SOURCE = Path(ps.__file__).parent

# ------------------------------------------------------------------------------------------------------------------ checkpoints

CYCLE: list[Any] = []
CYCLE.append(CYCLE)
CYCLIC: dict[str, Any] = {}
CYCLIC["step"] = CYCLIC

STRANGE: dict[str, Any] = {
    "nan": torch.tensor(torch.nan), "inf": torch.tensor(torch.inf), "negative": torch.tensor(-3.0), "fraction": torch.tensor(1.5),
    "minus one": -1, "a half": 0.5, "nan, a float": float("nan"), "a bool": True, "a bool tensor": torch.tensor(True),
    "an int tensor": torch.tensor(3), "too large": 10**400, "a long string": "x" * 10**6, "bytes": b"\x00" * 100, "a cycle": CYCLE,
    "a cyclic dict": CYCLIC, "None": None, "an object": object(), "a function": print, "an array": np.ones((3, 2)),
    "a list": [1.0, 2.0], "empty": torch.ones(0), "another shape": torch.ones(7, 5), "meta": torch.ones(3, 2, device="meta"),
    "sparse": torch.ones(3, 2).to_sparse(), "expanded": torch.ones(1, 1).expand(3, 2), "int": torch.ones(3, 2, dtype=torch.int64),
    "nan in it": torch.full((3, 2), torch.nan), "float64": torch.ones(3, 2, dtype=torch.float64), "a set": {1, 2},
    "history": torch.ones(3, 2, requires_grad=True) * 1, "nested": {"a": {"b": torch.ones(3, 2)}}, "a type": int,
    "transposed": torch.ones(2, 3).t(), "a generator": iter([1.0]), "deep": [[[[[[torch.ones(3, 2)]]]]]],
}  # fmt: skip
"""What stands in a checkpoint in the place of something else."""

MAKERS: dict[str, Callable[[list[Any]], Any]] = {
    "SGD": lambda params: optim.SGD(params, lr=0.1, momentum=0.9),
    "AdamW": lambda params: optim.AdamW(params, lr=0.1),
    "NAdam": lambda params: optim.NAdam(params, lr=0.1),
    "RMSprop": lambda params: optim.RMSprop(params, lr=0.1, momentum=0.9, centered=True),
    "Adagrad": lambda params: optim.Adagrad(params, lr=0.1),
    "named": lambda params: optim.AdamW(zip("ab", params), lr=0.1),
    "clip": lambda params: optim.Optimizer(params, ps.chain(ps.clip_by_global_norm(1.0), ps.adamw(0.1))),
    "skip": lambda params: optim.Optimizer(params, ps.skip_if_nonfinite(ps.adam(0.1))),
    "accumulate": lambda params: optim.Optimizer(params, ps.accumulate(ps.adam(0.1), 2)),
    "lookahead": lambda params: optim.Optimizer(params, ps.lookahead(ps.sgd(0.1, momentum=0.9), k=2)),
    "partition": lambda params: optim.Optimizer(
        params, ps.partition({"a": ps.adamw(0.1), "b": ps.sgd(0.1, momentum=0.9)}, lambda path, p: "a" if p.ndim == 2 else "b")
    ),
    "LBFGS": lambda params: optim.LBFGS(params, lr=0.1, max_iter=2),
}
TWINS = ("SGD", "AdamW", "NAdam", "RMSprop", "Adagrad")


def step(optimizer: Any, params: list[Any]) -> None:
    optimizer.step(closure_of(params))


def begun(name: str) -> tuple[list[Any], Any]:
    params = [nn.Parameter(torch.linspace(-1, 1, 6).reshape(3, 2)), nn.Parameter(torch.ones(3))]
    optimizer = MAKERS[name](params)
    for _ in range(2):
        step(optimizer, params)
    return params, optimizer


class Everything:
    """What an optimizer holds, to be compared with what it holds later: identities and values."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.groups = [dict(g) for g in optimizer.param_groups]
        self.states = [(p, dict(s)) for p, s in optimizer.state.items()]
        self.values = [[x.clone() if isinstance(x, Tensor) else x for x in s.values()] for _, s in self.states]

    def check(self) -> None:
        now = self.optimizer
        assert all(a.keys() == b.keys() and all(a[n] is b[n] for n in a) for a, b in zip(self.groups, now.param_groups))
        assert list(now.state) == [p for p, _ in self.states]
        for (p, fields), values in zip(self.states, self.values):
            assert now.state[p].keys() == fields.keys()
            for (name, x), y in zip(fields.items(), values):
                assert now.state[p][name] is x
                assert not isinstance(x, Tensor) or torch.equal(x, y)


def places(x: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of everything in a checkpoint."""
    if path:
        yield path
    if isinstance(x, dict):
        for key, y in x.items():
            yield from places(y, (*path, key))
    elif isinstance(x, list):
        for key, y in enumerate(x):
            yield from places(y, (*path, key))


class Corruption(NamedTuple):
    """One thing that is wrong with a checkpoint."""

    kind: str
    path: tuple[Any, ...]
    value: str

    def of(self, saved: dict[str, Any]) -> dict[str, Any]:
        """A corrupted copy."""
        x = copy.deepcopy(saved)
        *way, last = self.path
        inside: Any = x
        for key in way:
            inside = inside[key]
        if self.kind == "put":
            value = STRANGE[self.value]
            inside[last] = (
                value.clone() if isinstance(value, Tensor) and self.value not in ("sparse", "expanded") else value
            )  # it is written to
        elif self.kind == "remove":
            del inside[last]
        elif isinstance(inside[last], dict):
            inside[last]["foreign" if self.kind == "foreign" else 17] = copy.deepcopy(inside[last])
        elif isinstance(inside[last], list):
            inside[last].append(inside[last][0] if self.kind == "twice" and inside[last] else "?")
        return x


def corruptions(saved: dict[str, Any], draw: random.Random, count: int) -> list[Corruption]:
    found = list(places(saved))
    every = [Corruption("put", path, name) for path in found for name in STRANGE]
    every += [Corruption(kind, path, "") for path in found for kind in ("remove", "foreign", "twice")]
    return every if count >= len(every) else draw.sample(every, count)


def refusal(call: Callable[[], Any], *errors: type[Exception]) -> str | None:
    """The text of the error by which a call refuses something; None if it does not."""
    try:
        call()
    except errors as error:
        return f"{error!r} "
    return None


REFUSED = (ValueError, TypeError, KeyError)


@pytest.mark.filterwarnings("ignore:Casting complex", "ignore:The loaded state has no parameters")
@pytest.mark.parametrize("name", MAKERS)
def test_a_corrupted_checkpoint_is_refused_or_stepped_as_torch_does(name: str) -> None:
    """Refused: by an error that is not long, and nothing has changed. Loaded: the next step is torch's, or raises."""
    draw = random.Random(f"{SEED} {name}")
    saved = copy.deepcopy(begun(name)[1].state_dict())
    params, optimizer = begun(name)
    for c in corruptions(saved, draw, 100 * EXAMPLES):
        before = Everything(optimizer)
        why = refusal(lambda: optimizer.load_state_dict(c.of(saved)), *REFUSED)  # noqa: B023
        if why is not None:
            assert len(why) < 1500, c
            before.check()
            continue
        twins = [nn.Parameter(p.detach().clone()) for p in params]
        try:
            step(optimizer, params)
            if name in TWINS:
                twin = getattr(torch.optim, name)(twins, lr=0.1, foreach=False)
                twin.load_state_dict(c.of(saved))
                step(twin, twins)
        except Exception:  # of ours, or torch takes less
            pass
        else:
            for p, q in zip(params, twins) if name in TWINS else ():
                known = ~q.isnan()  # torch's RMSprop takes roots of negative numbers where this one does not
                torch.testing.assert_close(p[known], q[known], rtol=1e-5, atol=1e-6, msg=lambda m, c=c: f"{c}: {m}")
        params, optimizer = begun(name)


# ---------------------------------------------------------------------------------------------------------- files, other loaders


class Payload:
    """What a pickle would execute."""

    executed = False

    def __reduce__(self) -> Any:
        return execute, ()


def execute() -> None:
    Payload.executed = True


def test_a_file_executes_nothing(tmp_path: Path) -> None:
    """`torch.load` by default: states and state dicts come out, and code does not."""
    params, optimizer = begun("skip")
    opt = ps.adamw(0.1)
    state = opt.init_state({"a": torch.ones(2)})
    torch.save({"optimizer": optimizer.state_dict(), "state": state}, tmp_path / "good.pt")
    loaded = torch.load(tmp_path / "good.pt", weights_only=True)
    optimizer.load_state_dict(loaded["optimizer"])
    assert type(loaded["state"]) is type(state)
    for bad in (Payload(), {"state": Payload()}, [Payload()]):
        torch.save(bad, tmp_path / "bad.pt")
        with pytest.raises(Exception, match=r"[Ww]eights"):
            torch.load(tmp_path / "bad.pt", weights_only=True)
    assert not Payload.executed
    step(optimizer, params)


def test_a_file_that_is_cut_off_or_changed_is_refused_or_loaded(tmp_path: Path) -> None:
    """By torch, or by the optimizer; whatever comes out executes nothing, and the optimizer still steps."""
    params, optimizer = begun("AdamW")
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    whole, draw = file.getvalue(), random.Random(SEED)
    for k in range(60 * EXAMPLES):
        data = bytearray(whole[: draw.randrange(len(whole))] if k % 2 else whole)
        for _ in range(0 if k % 2 else 4):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        before = Everything(optimizer)
        try:
            loaded = torch.load(io.BytesIO(bytes(data)), weights_only=True)
        except Exception:
            continue
        try:
            optimizer.load_state_dict(loaded)
        except REFUSED:
            before.check()
        else:
            params, optimizer = begun("AdamW")
    step(optimizer, params)


def test_only_examples_and_tests_read_files() -> None:
    """The library itself loads no file and no pickle, and makes code in one place."""
    calls: dict[str, set[str]] = {}
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                if (
                    name in ("exec", "eval", "compile", "builtins.compile", "open", "__import__", "torch.load")
                    or "pickle.load" in name
                ):
                    calls.setdefault(str(path.relative_to(SOURCE)), set()).add(name)
    calls["_trace/program.py"].discard("compile")  # its own function, from a recipe to a program
    assert calls == {"_trace/program.py": {"exec", "builtins.compile"}}


@pytest.mark.parametrize("name", ["adamw", "skip", "lbfgs", "partition"])
def test_a_flat_state_that_is_corrupted_is_refused_by_name(name: str) -> None:
    opt: Any = {
        "adamw": lambda: ps.adamw(0.1),
        "skip": lambda: ps.skip_if_nonfinite(ps.accumulate(ps.adam(0.1), 2)),
        "lbfgs": lambda: ps.lbfgs(),
        "partition": lambda: ps.partition(
            {"a": ps.adamw(0.1), "b": ps.sgd(0.1, momentum=0.9)}, lambda path, p: "ab"[p.ndim % 2]
        ),
    }[name]()
    params = {"w": torch.ones(3, 2), "b": torch.ones(3)}
    template = opt.init_state(params)
    flat = ps.state_dict(template)
    kept = pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, template)
    for key in flat:
        for what, value in STRANGE.items():
            why = refusal(lambda: ps.load_state_dict(template, {**flat, key: value}), ValueError)  # noqa: B023
            if why is None:
                assert isinstance(value, Tensor)
                assert value.shape == flat[key].shape, what
            else:
                assert key in why, what
                assert len(why) < 1500
        for wrong in ({k: x for k, x in flat.items() if k != key}, {**flat, f"{key}.more": flat[key]}):
            with pytest.raises(ValueError, match=re.escape(key)):
                ps.load_state_dict(template, wrong)
    for x, y in zip(pytree.tree_leaves(template), pytree.tree_leaves(kept)):
        assert x is y or torch.equal(x, y)


@pytest.mark.filterwarnings("ignore:Casting complex")
def test_a_converter_refuses_what_is_corrupted() -> None:
    """And what it takes it takes as the optimizer does."""
    params = {"a": torch.linspace(-1, 1, 6).reshape(3, 2), "b": torch.ones(3)}
    opt = ps.adamw(0.1)
    saved = copy.deepcopy(begun("AdamW")[1].state_dict())
    draw = random.Random(f"{SEED} convert")
    for c in corruptions(saved, draw, 80 * EXAMPLES):
        found: list[Any] = []
        why = refusal(lambda: found.append(ps.convert.from_torch(opt, params, c.of(saved))), *REFUSED)  # noqa: B023
        if why is None:
            assert pytree.tree_structure(found[0]) == pytree.tree_structure(opt.init_state(params)), c
        else:
            assert len(why) < 1500, c
    moments = [{k: np.ones(tuple(x.shape), np.float32) for k, x in params.items()} for _ in range(2)]
    good = ScaleByAdamState(np.int32(3), *moments)
    assert ps.step_count(ps.convert.from_optax(opt, params, good)) == 3
    for field in good._fields:
        for what, value in STRANGE.items():
            bad = good._replace(**{field: value if field == "count" else {"a": value, "b": np.ones(3, np.float32)}})
            found = []
            why = refusal(lambda: found.append(ps.convert.from_optax(opt, params, bad)), *REFUSED)  # noqa: B023
            if why is None:
                assert pytree.tree_structure(found[0]) == pytree.tree_structure(opt.init_state(params)), (field, what)


class ScaleByAdamState(NamedTuple):
    """As optax has it."""

    count: Any
    mu: Any
    nu: Any


# ------------------------------------------------------------------------------------------------------------ text of programs

HOSTILE = (
    "a'; raise SystemExit #", 'a"""; import os', "a\nraise SystemExit", "{__import__('os')}", "%s%n", "a b", "\n    raise SystemExit",
    "lambda: 0", "__class__", "x):\n    raise SystemExit\ndef f(", "\\", "'", '"', "\0", "Ω€", "exec", "class",
)  # fmt: skip
NAMES = re.compile(r"[A-Za-z_][A-Za-z_0-9]*")


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Every text that is given to `exec` or `compile` by the library, with the name of its file."""
    found: list[tuple[str, str]] = []
    original = builtins.compile

    def seen(source: Any, file: Any, *args: Any, **kwargs: Any) -> Any:
        if str(file).startswith("<purestep"):
            found.append((source, file))
        return original(source, file, *args, **kwargs)

    monkeypatch.setattr(programs.builtins, "compile", seen)
    return found


def test_no_string_of_a_users_is_in_the_text_of_a_program(texts: list[tuple[str, str]]) -> None:
    """Paths, labels, names of groups and of transforms, switches, docstrings, names of functions."""
    for k, text in enumerate(HOSTILE):

        def function(g: Tensor, p: Tensor, factor: ps.Hyper = 0.5, *, mode: str = "a") -> Tensor:
            return g * factor + len(mode)

        function.__name__ = function.__qualname__ = text
        function.__doc__ = text
        mine = ps.leafwise(name=text)(function) if k % 2 else ps.leafwise()(function)

        @ps.operation
        def inside(x: Tensor) -> Tensor:
            return x * 2

        inside.__name__ = inside.__wrapped__.__name__ = text  # type: ignore[attr-defined]

        @ps.leafwise()
        def around(g: Tensor, p: Tensor) -> Tensor:
            return inside(g)

        opt = ps.partition(
            {text: ps.chain(mine(mode=text), around(), ps.adamw(0.1)), "rest": ps.sgd(0.1)},
            lambda path, p, text=text: text if path == text else "rest",
        )
        params = {text: torch.ones(2, 2), f"{text}.": torch.ones(3)}
        state = opt.init_state(params)
        for executor in (None, "foreach", "leaf"):
            opt.step(params, state, params, executor=executor)
        opt.program(donate=True)
        optimizer = optim.Optimizer(
            [{"params": [(text, nn.Parameter(torch.ones(2))), ("other", nn.Parameter(torch.ones(2)))], text: text}],
            ps.named_chain((text.replace(".", "_"), opt)),
        )
        for p in (p for g in optimizer.param_groups for p in g["params"]):
            p.grad = torch.ones(2)
        optimizer.step()
    assert texts
    for source, file in texts:
        check_text(source)
        assert file.isprintable()
        assert not any(text in source for text in HOSTILE if not NAMES.fullmatch(text) and len(text) > 1)


@pytest.mark.parametrize("text", [x for x in HOSTILE if not NAMES.fullmatch(x)])
def test_a_name_that_is_no_name_is_refused(text: str, texts: list[tuple[str, str]]) -> None:
    """Methods and keyword arguments are written into a program by their names."""

    @ps.leafwise()
    def method(g: Tensor, p: Tensor) -> Tensor:
        return getattr(g, text)()

    @ps.leafwise()
    def keyword(g: Tensor, p: Tensor) -> Tensor:
        return g.add(g, **{text: 1})

    params = [torch.ones(2)]
    for opt in (method(), keyword()):
        with pytest.raises(TypeError, match="which is no identifier in ASCII"):
            opt.step(params, opt.init_state(params), params, executor="foreach")
    assert not texts


def check_text(source: str) -> None:
    """A program is functions of assignments, calls and returns; it has no text, no import, and no names but plain ones."""
    for node in ast.walk(ast.parse(source)):
        assert not isinstance(
            node, (ast.Import, ast.ImportFrom, ast.Raise, ast.Lambda, ast.JoinedStr, ast.While, ast.With, ast.Delete)
        )
        if isinstance(node, ast.Constant):
            assert not isinstance(node.value, (str, bytes)), source
        if isinstance(node, ast.Name):
            assert NAMES.fullmatch(node.id), source
