"""What is sent in a step, counted on two and on four processes, is what `benchmarks.plan` says; so are the tables of the page.

Messages are counted where gloo has them, by torch's profiler: whoever sends them, and however. (`CommDebugMode` is a dispatch
mode. Under one a chain computes everything in every process, so that it counts another program's messages.)
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import purestep as ps
from benchmarks import plan
from tests import processes
from tests.case import Case
from tests.cases import CASES
from tests.cases_methods import Given
from tests.test_distributed import answer

BY_NAME = {case.name: case for case in CASES}
SIZES = {"float": 4, "double": 8, "unsigned char": 1, "long int": 8, "c10::BFloat16": 2}
"""Of a number, by torch's name for it in a profile."""

FEW: dict[str, tuple[int, ...]] = {"a": (8, 4), "b": (8, 4), "wide": (4, 8), "vector": (8,)}
MORE = {**{f"a{k}": (8, 4) for k in range(5)}, "wide": (4, 8), "tall": (12, 8), "v": (8,), "w": (8,)}
STEPS = 4  # what comes every other step comes as often as it does


MASTER = Case("master_weights(muon)", lambda: ps.master_weights(ps.muon(0.1)), ({},), treats=lambda p: p.dim() == 2)
"""With bfloat16 parameters; the plan has its bytes."""


@contextmanager
def counting() -> Iterator[Counter[str]]:
    """Count the messages of this process, and their bytes, by their sort."""
    found: Counter[str] = Counter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        yield found
    for event in profile.profiler.kineto_results.events():
        if event.name().startswith("gloo:"):
            sort = event.name().removeprefix("gloo:")
            found[sort] += 1
            found[f"{sort} bytes"] += sum(
                SIZES[dtype] * torch.Size(shape).numel() for shape, dtype in zip(event.shapes(), event.dtypes())
            )


def steps(case: Case, mesh: Any, shapes: dict[str, tuple[int, ...]]) -> dict[str, float]:
    """What a process sends in a step, on average."""
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.manual_seed(0)
    dtype = torch.bfloat16 if case is MASTER else torch.float32
    whole = {k: x for k, s in shapes.items() if case.treats(x := torch.randn(s).to(dtype))}
    params, grads = ({k: distribute_tensor(f(x), mesh, [Shard(0)]) for k, x in whole.items()} for f in (torch.clone, torch.sin))
    t = case.transform()
    needs = t.children[0].plan.extras if isinstance(t, Given) else ()
    t = t.children[0] if isinstance(t, Given) else t
    known = {"value": torch.tensor(3.0), "hessian": grads, "value_and_grad": lambda q: (torch.tensor(1.0), grads)}
    extras = {k: known[k] for k in needs}
    state = t.init_state(params)
    for _ in range(2):
        params, state = t.step(grads, state, params, donate=True, **extras)
    with counting() as counted:
        for _ in range(STEPS):
            params, state = t.step(grads, state, params, donate=True, **extras)
    return {sort: n / STEPS for sort, n in counted.items()}


def counts(names: Collection[str], size: int) -> dict[Any, Any]:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (size,))
    cases = [case for case in [*CASES, MASTER] if case.name in names]
    return {(case.name, len(shapes)): answer(steps, case, mesh, shapes) for case in cases for shapes in sets(case.name)}


def everything(rank: int, size: int) -> dict[Any, Any]:
    return counts([*BY_NAME, MASTER.name], size)


ONE_OF_EACH = [*{sends: name for name, sends in plan.SENDS.items()}.values(), "adamw"]
"""One case of each that sends the same, and one that sends nothing."""


def some(rank: int, size: int) -> dict[Any, Any]:
    return counts([*ONE_OF_EACH, MASTER.name], size)


def sets(name: str) -> tuple[dict[str, tuple[int, ...]], ...]:
    """The parameters of a case: few, and more of more shapes where something is sent."""
    return (FEW, MORE) if name in plan.SENDS else (FEW,)


RUNS = {"all, 2": (2, "everything"), "some, 4": (4, "some"), "all, 4": (4, "everything")}
"""How many processes count the messages of which cases. On four, all of them with ``-m long``."""


@pytest.fixture(scope="module", params=[pytest.param(k, marks=pytest.mark.long if k == "all, 4" else ()) for k in RUNS])
def counted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    size, function = RUNS[request.param]
    return processes.run(size, f"tests.test_messages:{function}", tmp_path_factory.mktemp("counted"))


def names_in(counted: list[dict[Any, Any]]) -> list[str]:
    return [name for name in BY_NAME if (name, len(FEW)) in counted[0]]


def owned(name: str) -> bool:
    return plan.SENDS.get(name, plan.Sends()).rows


def expected(name: str, shapes: dict[str, tuple[int, ...]]) -> plan.Shapes:
    """The parameters of a case for which something is sent."""
    case = BY_NAME[name]
    return Counter([s for s in shapes.values() if case.treats(torch.empty(s)) and (len(s) > 1 or name not in plan.ALONE)])


def wrong(counted: list[dict[Any, Any]], names: list[str]) -> list[Any]:
    """Where messages or bytes are not what the formulas say."""
    found: list[Any] = []
    for name, shapes in [(k, shapes) for k in names for shapes in sets(k)]:
        each = [x[name, len(shapes)] for x in counted]
        if any(isinstance(x, str) for x in each):
            found.append((name, each))
            continue
        treated = expected(name, shapes)
        messages = plan.messages(name, len(treated))
        if any({k: n for k, n in x.items() if "bytes" not in k} != messages for x in each):
            found.append((name, each, messages))
        t, n = BY_NAME[name].transform(), len(each)
        states = [t.init_state({"p": torch.zeros(s)}) for s in treated] if owned(name) else None
        sent = sum(sum(k for sort, k in x.items() if "bytes" in sort) for x in each)
        formula = plan.bytes_sent(name, treated, n, state=states)
        lengths = messages.get("all_to_all", 0) / 2 * n * n * 8 * 4  # of each message some numbers more
        if not formula <= sent <= formula + lengths:
            found.append((name, sent, formula, lengths))
    return found


def test_messages_and_bytes(counted: list[dict[Any, Any]]) -> None:
    names = [name for name in names_in(counted) if not owned(name)]
    assert names
    assert not wrong(counted, names)


def test_master_weights_are_sent_in_float32(counted: list[dict[Any, Any]]) -> None:
    matrices = Counter([s for s in FEW.values() if len(s) == 2])
    sent = sum(x[MASTER.name, len(FEW)]["all_to_all bytes"] for x in counted)
    headers = 2 * len(counted) ** 2 * 8 * 4  # as in `wrong`
    assert 0 <= sent - plan.bytes_sent("muon", matrices, len(counted), each=4) <= headers


def test_messages_and_bytes_of_whole_tensors(counted: list[dict[Any, Any]]) -> None:
    names = [name for name in names_in(counted) if owned(name)]
    assert names
    assert not wrong(counted, names)


def test_every_name_is_one_of_the_registry() -> None:
    assert plan.SENDS.keys() <= BY_NAME.keys()


def test_every_algorithm_has_its_bytes() -> None:
    whole = {name for name in BY_NAME if inspect.getmodule(getattr(ps, name, None)) and not name.startswith("scale_by")}
    algorithms = {name for name in whole if getattr(ps, name).__module__.startswith("purestep.algorithms")}
    assert algorithms <= plan.ALGORITHMS.keys()


@pytest.mark.parametrize("name", plan.TABLES)
def test_the_page_has_these_numbers(name: str) -> None:
    assert plan.shown(plan.PAGE.read_text(), name) == plan.table(name), "run `python -m benchmarks.plan --write`"


def test_a_table_is_put_where_it_belongs(tmp_path: Path) -> None:
    page = f"text\n\n{plan.begin('owners')}old{plan.END}\n\nmore\n"
    assert plan.shown(plan.put(page, "owners", "new"), "owners") == "new"
    assert plan.put(page, "owners", "old") == page
