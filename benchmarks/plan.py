"""The tables of docs/distributed.md: state, messages and shares of work of models on many machines.

    python -m benchmarks.plan           # prints them
    python -m benchmarks.plan --write   # writes them into the page

Nothing is measured. States are made on torch's meta device, and their bytes added up; owners are dealt out by the function that
deals them out in a step. What is sent follows from formulas (`SENDS`, `bytes_sent`), which tests/test_messages.py compares
with what 2 and 4 processes send. That test fails while the page and these tables differ.
"""

from __future__ import annotations

import argparse
import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import purestep as ps
from purestep._core import dealt

PAGE = Path(__file__).parent.parent / "docs" / "distributed.md"
Shapes: TypeAlias = "Counter[tuple[int, ...]]"
"""How many parameters there are of each shape."""


# ----------------------------------------------------------------------------------------------------------------- models


def llama(width: int, keys: int, hidden: int, layers: int, vocabulary: int = 32000) -> Shapes:
    """All parameters of a Llama 2."""
    layer = Counter({(width, width): 2, (keys, width): 2}) if keys != width else Counter({(width, width): 4})
    layer += Counter({(hidden, width): 2, (width, hidden): 1})
    return Counter({k: n * layers for k, n in layer.items()} | {(vocabulary, width): 2, (width,): 2 * layers + 1})


def is_hidden(shape: tuple[int, ...]) -> bool:
    """Whether a parameter is one that Muon is for: a matrix, and no embedding. The others are AdamW's."""
    return len(shape) > 1 and max(shape) < 32000


def matrices(shapes: Shapes) -> Shapes:
    """Those that Muon is for."""
    return Counter({k: n for k, n in shapes.items() if is_hidden(k)})


SEVEN, SEVENTY = llama(4096, 4096, 11008, 32), llama(8192, 1024, 28672, 80)
MODELS: dict[str, Shapes] = {"7 B": SEVEN, "70 B": SEVENTY}
GPT2: Shapes = Counter({(768, 2304): 12, (768, 768): 12, (768, 3072): 12, (3072, 768): 12})
EXPERTS: Shapes = Counter({(2048, 2048): 4 * 27, (64, 1408, 2048): 2 * 27, (64, 2048, 1408): 27})
MATRICES: dict[str, Shapes] = {
    "GPT-2 ({} matrices)": GPT2,
    "a 7 B Llama ({})": matrices(SEVEN),
    "a 70 B Llama ({})": matrices(SEVENTY),
    "64 experts in 27 layers ({} parameters, sharded by rows)": EXPERTS,
}


def size(shapes: Shapes) -> int:
    """How many numbers the parameters have."""
    return sum(math.prod(k) * n for k, n in shapes.items())


# ------------------------------------------------------------------------------------------------------------------ state

ALGORITHMS: dict[str, Callable[[], ps.Transform]] = {
    "sgd": lambda: ps.sgd(0.1), "sgd with momentum": lambda: ps.sgd(0.1, momentum=0.9), "adamw": lambda: ps.adamw(0.1),
    "muon": lambda: ps.muon(0.1), "lion": lambda: ps.lion(0.1), "adafactor": lambda: ps.adafactor(0.1),
    "shampoo": lambda: ps.shampoo(0.1), "soap": lambda: ps.soap(0.1),
    **{
        name: getattr(ps, name)
        for name in (
            "adam", "adamax", "nadam", "radam", "adagrad", "adadelta", "rmsprop", "rprop", "asgd", "sparse_adam", "adabelief",
            "yogi", "lars", "lamb", "signum", "sign_sgd", "novograd", "adan", "adopt", "ademamix", "fromage", "sm3",
            "optimistic_gradient_descent", "optimistic_adam", "madgrad", "schedule_free_sgd", "schedule_free_adamw", "dog",
            "ldog", "dadapt_adamw", "prodigy", "polyak_sgd", "sophia", "galore",
        )
    },
    "schedule_free": lambda: ps.schedule_free(0.1), "sam": lambda: ps.chain(ps.sam(), ps.sgd(0.1)),
}  # fmt: skip
SHORT = ("sgd", "sgd with momentum", "lion", "muon", "adamw", "adafactor", "shampoo", "soap")
"""Those in the page's first table; all are in the one at its end."""

PRECISIONS: dict[str, tuple[torch.dtype, Callable[[ps.Transform], ps.Transform]]] = {
    "float32 parameters": (torch.float32, lambda t: t),
    "bfloat16": (torch.bfloat16, lambda t: t),
    "and a float32 state": (torch.bfloat16, lambda t: ps.state_dtype(t, torch.float32)),
    "and master weights": (torch.bfloat16, ps.master_weights),
    "and Kahan": (torch.bfloat16, ps.kahan),
    "and 8 bits": (torch.bfloat16, lambda t: ps.quantize_state(t, bits=8)),
}


def made(name: str) -> ps.Transform:
    """An algorithm; some have no learning rate to give."""
    t: ps.Transform = ALGORITHMS[name]()
    return t


def state_bytes(name: str, precision: str, shapes: Shapes) -> float | None:
    """How many bytes of state all parameters have, without what is one number for each; None where they are refused."""
    dtype, around = PRECISIONS[precision]
    total = 0
    for shape, n in shapes.items():
        t = made("adamw" if name == "muon" and not is_hidden(shape) else name)
        try:
            state = around(t).init_state({"p": torch.zeros(shape, dtype=dtype, device="meta")})
        except (ValueError, TypeError, NotImplementedError):
            return None
        total += n * sum([x.nbytes for x in pytree.tree_leaves(state) if isinstance(x, Tensor) and x.dim()])
    return total


def state_rows(names: Any) -> list[list[str]]:
    """Bytes of state for each parameter of a matrix of 512 x 512, in every precision."""
    shapes = Counter({(512, 512): 1})
    return [[f"`{name}`", *[number(state_bytes(name, p, shapes), size(shapes)) for p in PRECISIONS]] for name in names]


def number(bytes_: float | None, of: float) -> str:
    """A quotient with at most two digits behind the point."""
    return "" if bytes_ is None else f"{bytes_ / of:.2f}".rstrip("0").rstrip(".")


def model_rows() -> list[list[str]]:
    """GB of state of both models."""
    some = ("bfloat16", "and master weights", "and Kahan", "and 8 bits")
    return [[f"`{name}`", *[gigabytes(state_bytes(name, p, s)) for s in MODELS.values() for p in some]] for name in ALGORITHMS]


def gigabytes(bytes_: float | None) -> str:
    """A number of bytes with three digits."""
    return "" if bytes_ is None else f"{bytes_ / 1e9:.3g}" if bytes_ < 1e12 else f"{bytes_ / 1e9:,.0f}"


# ---------------------------------------------------------------------------------------------------------------- messages


class Sends(NamedTuple):
    """What a transform sends in a step: for each mesh, and beside its neighbours in a chain."""

    reduces: int = 0
    """All-reduces, of a float64 for each parameter."""
    stacks: bool = False
    """Two all-to-alls for each shape of matrices, of a matrix each."""
    numbers: int = 1
    """Instead of a float64 for each parameter, so many."""
    rows: bool = False
    """Two all-to-alls for each shape of parameters: with their gradients and states there, and without the gradients back."""


SENDS: dict[str, Sends] = {
    **dict.fromkeys(
        ("clip_by_global_norm", "normalize", "skip_if_nonfinite", "zero_nans", "polyak_sgd", "scale_by_polyak",
         "sam", "reduce_on_plateau", "scale_by_backtracking_linesearch", "chain", "named_chain", "freeze"), Sends(reduces=1),
    ),
    **dict.fromkeys(
        ("clip_by_norm", "clip_by_block_rms", "normalize_by_block", "scale_by_param_block_norm", "scale_by_param_block_rms"),
        Sends(reduces=1),
    ),
    **dict.fromkeys(("scale_by_trust_ratio", "lars", "lamb", "fromage"), Sends(reduces=1, numbers=2)),
    **dict.fromkeys(("prodigy", "scale_by_prodigy", "dadapt_adamw", "scale_by_dadapt_adam"), Sends(reduces=2)),
    **dict.fromkeys(("dog", "scale_by_dog"), Sends(reduces=3)),
    "mechanic": Sends(reduces=4),
    "monitor": Sends(reduces=1, numbers=2),
    **dict.fromkeys(("muon", "scale_by_muon", "as_matrices"), Sends(stacks=True)),
    **dict.fromkeys(
        ("adaptive_grad_clip", "centralize", "novograd", "scale_by_novograd", "ldog", "scale_by_ldog", "adafactor",
         "scale_by_adafactor", "sm3", "scale_by_sm3", "galore", "scale_by_galore", "shampoo", "scale_by_shampoo", "soap",
         "scale_by_soap", "quantize_state"), Sends(rows=True),
    ),
}  # fmt: skip
"""By the name of a case of the tests' registry, with the options of that case. What is not here sends nothing.

`chain` clips, `freeze` too; of `reduce_on_plateau` the message is that of the norm which the tests give it. `sam` and the line
search need a closure, which may send messages of its own."""

ALONE = ("sm3", "scale_by_sm3")
"""Those that see whole matrices, and vectors part by part."""


def messages(name: str, kinds: int) -> dict[str, int]:
    """How many messages of each sort a step takes, for parameters of so many shapes."""
    sends = SENDS.get(name, Sends())
    found = {"all_reduce": sends.reduces, "all_to_all": 2 * kinds * (sends.stacks or sends.rows)}
    return {sort: n for sort, n in found.items() if n}


def bytes_sent(name: str, shapes: Shapes, processes: int, copies: int = 1, each: int = 4, state: Any = None) -> float:
    """How many bytes all processes together put into the messages of a step, without what says how long they are.

    An all-reduce is counted as what goes into it. `state` is that of one transform for each shape, in the order of the shapes;
    `each` is the size of a number.
    """
    sends = SENDS.get(name, Sends())
    if sends.reduces:
        return float(8 * sends.reduces * sends.numbers * sum(shapes.values()) * processes)
    if sends.stacks:
        return float(size(shapes) * each * (1 + copies))
    total = 0.0
    for (shape, n), fields in zip(shapes.items(), state or [None] * len(shapes)):
        kept = sum([x.nbytes for x in pytree.tree_leaves(fields) if isinstance(x, Tensor) and x.dim()])
        total += n * sends.rows * (math.prod(shape) * each + (1 + copies) * (math.prod(shape) * each + kept))
    return total


def message_rows() -> list[list[str]]:
    """What is sent, in words, by the transforms that send it."""
    said: dict[Sends, list[str]] = {}
    for name, sends in SENDS.items():
        said.setdefault(sends, []).append(f"`{name}`")
    return [[", ".join(names), *in_words(sends)] for sends, names in said.items()]


def in_words(sends: Sends) -> tuple[str, str]:
    """The messages of a step, and their bytes."""
    if sends.reduces:
        return (
            f"{sends.reduces} all-reduce{'s' * (sends.reduces > 1)} for each mesh",
            f"${8 * sends.reduces * sends.numbers} P$",
        )
    return "2 all-to-alls for each shape", "$(1 + c) B / n$" if sends.stacks else "$(B + (1 + c) (B + S)) / n$"


# ------------------------------------------------------------------------------------------------------------------ owners

PROCESSES = (4, 8, 64, 512, 1024)


def loads(shapes: Shapes, processes: int, cost: Callable[[tuple[int, ...]], float] = dealt.cost) -> list[float]:
    """What each process has to compute."""
    parameters = list(shapes.elements())
    found = [0.0] * processes
    for shape, owner in zip(parameters, dealt.owners(list(map(dealt.cost, parameters)), processes)):
        found[owner] += cost(shape)
    return found


def flops(shape: tuple[int, ...], steps: int = 5) -> float:
    """Of the Newton-Schulz iteration: three products of matrices in each step."""
    short, long = sorted(shape[-2:])
    return math.prod(shape[:-2]) * steps * (4.0 * short * short * long + 2.0 * short**3)


def owner_rows() -> list[list[str]]:
    """The largest share of the work over the mean share."""
    rows = []
    for text, shapes in MATRICES.items():
        ratios = [max(x) / (sum(x) / len(x)) for x in (loads(shapes, n) for n in PROCESSES)]
        rows.append([text.format(sum(shapes.values())), *[f"{x:.2f}" if x < 10 else f"{x:.1f}" for x in ratios]])
    return rows


PLANS = (("7 B", 8, 1), ("7 B", 64, 1), ("7 B", 64, 8), ("70 B", 64, 1), ("70 B", 512, 1), ("70 B", 1024, 1), ("70 B", 1024, 8))
"""A model, GPUs, and copies of shards."""


def plan_rows() -> list[list[str]]:
    """State on each GPU, and what Muon sends and computes."""
    rows = []
    for model, gpus, copies in PLANS:
        shapes, shards = MODELS[model], gpus // copies
        states = [state_bytes(t, p, shapes) for t, p in PLANNED]
        sent = bytes_sent("muon", matrices(shapes), gpus, copies, each=4) / gpus  # a momentum beside master weights is float32
        busiest = max(loads(matrices(shapes), gpus, flops))
        rows.append(
            [model, str(gpus), f"{shards} x {copies}", *[f"{(x or 0) / shards / 1e9:.2f}" for x in states],
             f"{sent / 1e6:,.0f} ({sent / LINK * 1e3:.0f})", f"{busiest / 1e12:.1f} ({busiest / SPEED * 1e3:.0f})"]
        )  # fmt: skip
    return rows


LINK, SPEED = 50e9, 400e12
"""Bytes that a GPU sends in a second, and what it computes in bfloat16: about those of an H100 with a 400 Gb/s card."""

PLANNED = (("adamw", "and master weights"), ("adamw", "and Kahan"), ("adamw", "and 8 bits"), ("muon", "and master weights"))

# ------------------------------------------------------------------------------------------------------------------ tables

TABLES: dict[str, tuple[list[str], Callable[[], list[list[str]]]]] = {
    "owners": (["matrices of", "4 processes", *map(str, PROCESSES[1:])], owner_rows),
    "state": (["", *PRECISIONS], lambda: state_rows(SHORT)),
    "plan": (
        ["model", "GPUs", "shards x copies", "GB: `adamw`, master weights", "`adamw`, Kahan", "`adamw`, 8 bits",
         "`muon`, master weights", "MB that it sends (ms)", "TFLOP of its busiest owner (ms)"], plan_rows,
    ),
    "messages": (["transforms", "messages in a step", "bytes that each process sends"], message_rows),
    "all states": (["", *PRECISIONS], lambda: state_rows(ALGORITHMS)),
    "models": (
        ["", *[f"{model}, {p}" for model in MODELS for p in ("bfloat16", "master weights", "Kahan", "8 bits")]], model_rows,
    ),
}  # fmt: skip


def table(name: str) -> str:
    """One of the tables."""
    head, rows = TABLES[name]
    return markdown(head, rows())


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def begin(name: str, command: str = "benchmarks.plan --write") -> str:
    return f"<!-- {name}: `python -m {command}` writes this table. -->\n\n"


END = "\n\n<!-- The end of the table. -->"


def shown(page: str, name: str, command: str = "benchmarks.plan --write") -> str:
    """The table of this name that a page has."""
    return page.partition(begin(name, command))[2].partition(END)[0]


def put(page: str, name: str, text: str, command: str = "benchmarks.plan --write") -> str:
    """The page with another table of this name."""
    start = begin(name, command)
    assert page.count(start) == 1, f"{PAGE} must have one line: {start}"
    return re.sub(re.escape(start) + ".*?" + re.escape(END), lambda _: start + text + END, page, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description="The tables of docs/distributed.md.")
    parser.add_argument("--write", action="store_true", help="write them into the page")
    if not parser.parse_args().write:
        for name in TABLES:
            print(f"{name}\n\n{table(name)}\n")
        return
    page = PAGE.read_text()
    for name in TABLES:
        page = put(page, name, table(name))
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
