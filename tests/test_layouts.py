"""Every transform of the registry on real models that are spread over four processes, against one process with whole tensors.

Each of the four runs everything once (`answers`): twenty steps with the same gradients, in every layout and both dtypes, under
`optim.Optimizer`. What a process has is compared with its part of what the single process has. Which part that is, the model
itself says: it is made with the numbers of its elements as parameters, and these are what is found after it has been spread.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import purestep as ps
from benchmarks import layouts as table
from benchmarks import plan
from purestep import optim
from tests import processes
from tests.case import Case
from tests.cases import CASES
from tests.cases_methods import Given
from tests.test_distributed import answer

SIZE, STEPS = 4, 20
MOST = {torch.float64: 1e-12, torch.float32: 1e-6}
"""How far parameters and state may be from the single process's, relative to the largest value of each tensor."""

WIDTHS = {"even": (3, 8, 4), "uneven": (3, 5, 2)}
"""Of uneven ones the last process has nothing, of any parameter."""

LAYOUTS = {"FSDP2": "even", "FSDP2, uneven": "uneven", "FSDP2 and tensor parallel": "even", "HSDP": "uneven"}
"""The widths of the model in each layout."""


def chosen(number: int, layout: str, dtype: torch.dtype) -> bool:
    """Whether the case of this number is compared in a layout at every change: each case in one for each dtype, in turn.

    With ``-m long`` all are compared in all, as by `python -m benchmarks.layouts`.
    """
    return (number + (dtype == torch.float32)) % len(LAYOUTS) == list(LAYOUTS).index(layout)


LACKS: dict[tuple[str, torch.dtype], str] = {}
"""A case that is not compared in a dtype, and why it cannot be."""

LBFGS = Case("lbfgs", lambda: Given([ps.lbfgs(max_iter=3, line_search_fn="strong_wolfe")]), ({},))
ALL = [*CASES, LBFGS]


class Network(nn.Module):
    """Two linear layers, and between processes of tensor parallelism a parameter that is not cut by them."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(inputs, hidden), nn.Linear(hidden, outputs, bias=False)
        self.factor = nn.Parameter(torch.ones(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x))) * self.factor


class Spread:
    """A model in a layout: its parameters, and the numbers of the elements that this process has of each."""

    def __init__(self, layout: str, dtype: torch.dtype) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        self.model = Network(*WIDTHS[LAYOUTS[layout]]).to(dtype)
        with torch.no_grad():
            for p in self.model.parameters():
                p.copy_(torch.arange(p.numel()).view_as(p))
        if layout.startswith("FSDP2") and "tensor" not in layout:
            mesh = init_device_mesh("cpu", (SIZE,))
        else:
            mesh = init_device_mesh("cpu", (2, SIZE // 2), mesh_dim_names=("outer", "inner"))
        if "tensor" in layout:
            parallelize_module(self.model, mesh["inner"], {"first": ColwiseParallel(), "second": RowwiseParallel()})
            mesh = mesh["outer"]
        fully_shard(self.model, mesh=mesh)
        self.params: dict[str, Any] = dict(self.model.named_parameters())
        self.elements = {k: p.to_local().detach().long() for k, p in self.params.items()}

    def part(self, name: str, x: Tensor) -> Tensor:
        """What this process has of a whole tensor."""
        return x.reshape(-1)[self.elements[name]]

    def like(self, name: str, x: Tensor) -> Any:
        """A whole tensor, spread as a parameter."""
        p = self.params[name]
        return type(p.data).from_local(
            self.part(name, x), p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
        )  # fmt: skip

    def reset(self, values: dict[str, Tensor]) -> None:
        for name, p in self.params.items():
            p.data.to_local().copy_(self.part(name, values[name]))


class Alone:
    """The same model on one process."""

    def __init__(self, widths: str, dtype: torch.dtype) -> None:
        self.model = Network(*WIDTHS[widths]).to(dtype)
        self.params = dict(self.model.named_parameters())
        g = torch.Generator().manual_seed(11)
        self.values = {k: torch.randn(p.shape, generator=g, dtype=torch.float64).to(dtype) for k, p in self.params.items()}
        self.grads = [
            {k: torch.randn(p.shape, generator=g, dtype=torch.float64).to(dtype) for k, p in self.params.items()}
            for _ in range(STEPS)
        ]

    def reset(self, values: dict[str, Tensor]) -> None:
        for name, p in self.params.items():
            p.data.copy_(values[name])


def train(case: Case, params: dict[str, Any], grads: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parameters and the state, by name, after twenty steps."""
    t = case.transform()
    params = {k: p for k, p in params.items() if case.treats(p)}
    extras = t.children[0].plan.extras if isinstance(t, Given) else ()
    t = t.children[0] if isinstance(t, Given) else t
    if "hessian" in extras:
        return without_wrapper(t, params, grads)
    optimizer = optim.Optimizer(list(params.items()), t)

    def closure() -> Tensor:
        total: Any = 0.0
        for k, p in params.items():
            total = total + ps.global_norm([p.detach() - now[k]]) ** 2 / 2
            p.grad = p.detach() - now[k]
        return total

    for now in grads:
        if extras:
            optimizer.step(closure)
            continue
        for k, p in params.items():
            p.grad = now[k]
        optimizer.step()
    optimizer.zero_grad()
    state = {k: dict(optimizer.state[p]) for k, p in params.items()}
    return params, state | {"shared": dict(optimizer.state.get("shared", {}))}


def without_wrapper(t: ps.Transform, params: dict[str, Any], grads: list[dict[str, Any]]) -> tuple[Any, Any]:
    """A Hessian is given to the transform itself."""
    at = {k: p.detach() for k, p in params.items()}
    state = t.init_state(at)
    for now in grads:
        given = {k: now[k] for k in at}
        at, state = t.step(given, state, at, hessian={k: g * g for k, g in given.items()})
    return at, {"state": state}


def apart(found: Any, expected: Any, whose: str, spread: Spread) -> float:
    """The largest distance between two trees, relative to the largest value of each tensor; of sharded ones, of the part here."""
    if isinstance(expected, dict):
        assert list(found) == list(expected), (list(found), list(expected))
        return max([apart(found[k], expected[k], k if k in spread.params else whose, spread) for k in expected], default=0.0)
    if isinstance(expected, (tuple, list)):
        assert len(found) == len(expected)
        return max([apart(x, y, whose, spread) for x, y in zip(found, expected)], default=0.0)
    if not isinstance(expected, Tensor):
        assert found == expected
        return 0.0
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    found, expected = found.detach(), expected.detach()
    size = expected.abs().max().double().clamp_min(1e-3) if expected.numel() else 1.0
    if hasattr(found, "full_tensor"):
        if found.shape == spread.params[whose].shape and found.placements == spread.params[whose].placements:
            found, expected = found.to_local(), spread.part(whose, expected)
        else:
            found = found.full_tensor()
    assert found.shape == expected.shape
    assert found.isfinite().all()
    return float((found.double() - expected.double()).abs().max() / size) if found.numel() else 0.0


def of_case(case: Case, alone: Alone, spreads: dict[str, Spread], grads: dict[str, list[Any]]) -> dict[str, Any]:
    """How far each layout is from the single process."""
    alone.reset(alone.values)
    expected = train(case, alone.params, alone.grads)
    found = {}
    for layout, spread in spreads.items():
        spread.reset(alone.values)
        found[layout] = answer(distance, case, spread, grads[layout], expected)
    return found


def distance(case: Case, spread: Spread, grads: list[Any], expected: Any) -> float:
    return apart(train(case, spread.params, grads), expected, "", spread)


def compared(wanted: Callable[[int, str, torch.dtype], bool]) -> dict[Any, Any]:
    """How far cases are from the single process, in the layouts that are wanted of each."""
    found: dict[Any, Any] = {}
    for dtype, widths in itertools.product(MOST, WIDTHS):
        alone = Alone(widths, dtype)
        spreads = {layout: Spread(layout, dtype) for layout, of in LAYOUTS.items() if of == widths}
        grads = {k: [{name: s.like(name, g) for name, g in now.items()} for now in alone.grads] for k, s in spreads.items()}
        for number, case in enumerate(ALL):
            own = {layout: s for layout, s in spreads.items() if wanted(number, layout, dtype)}
            if own and (case.name, dtype) not in LACKS:
                for layout, x in of_case(case, alone, own, grads).items():
                    found[case.name, layout, dtype] = x
        for layout, s in spreads.items():  # all cases have had the same, and none has written to them
            for now, then in zip(grads[layout], alone.grads):
                assert all(torch.equal(g.to_local(), s.part(k, then[k])) for k, g in now.items())
    return found


def some(rank: int, size: int) -> dict[Any, Any]:
    """What is compared at every change."""
    return compared(chosen)


def all_of_it(rank: int, size: int) -> dict[Any, Any]:
    """What `python -m benchmarks.layouts` makes the table of."""
    return compared(lambda number, layout, dtype: True)


@pytest.fixture(scope="module", params=["some", pytest.param("all_of_it", marks=pytest.mark.long)])
def answers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    return processes.run(SIZE, f"tests.test_layouts:{request.param}", tmp_path_factory.mktemp("layouts"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_process_has_its_part_of_what_one_has(
    answers: list[dict[Any, Any]], layout: str, request: pytest.FixtureRequest
) -> None:
    every = request.node.callspec.params["answers"] == "all_of_it"
    for dtype in MOST:
        names = [c.name for k, c in enumerate(ALL) if (c.name, dtype) not in LACKS and (every or chosen(k, layout, dtype))]
        assert len(names) > len(ALL) // 5
        wrong = {
            (name, rank): x
            for name in names
            for rank, each in enumerate(answers)
            if isinstance(x := each[name, layout, dtype], str) or not x <= MOST[dtype]
        }
        assert not wrong, dtype


def test_the_layouts_are_what_they_are_called(answers: list[dict[Any, Any]]) -> None:
    """And the processes have run the same."""
    assert len({tuple(x) for x in answers}) == 1
    assert {layout for _, layout, _ in answers[0]} == set(LAYOUTS)


def test_the_page_has_every_case_in_every_layout() -> None:
    shown = plan.shown(plan.PAGE.read_text(), table.NAME, table.COMMAND)
    head, _, *rows = [[x.strip() for x in line.strip("|").split("|")] for line in shown.splitlines()]
    assert head == ["", *LAYOUTS]
    assert [name.strip("`") for name, *_ in rows] == [case.name for case in ALL], "run `python -m benchmarks.layouts`"
    for name, *cells in rows:
        for cell in cells:
            for x, (dtype, most) in zip(cell.split(" / "), MOST.items()):
                assert (name.strip("`"), dtype) in LACKS or float(x) <= most, (name, cell)
