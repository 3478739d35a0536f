"""Watch the norms of gradients, updates and parameters while training, and draw them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from purestep._core import tree
from purestep._core.maths import Scalar, counter, root, where
from purestep.declare import whole
from purestep.transforms.norms import each_norm, norm


class MonitorState(NamedTuple):
    """The state of `monitor`: norms, in real tensors of shape (), in float32 at least."""

    step: Tensor  # updates so far, of all parameters together
    norm: list[Scalar]  # of every parameter's update
    param_norm: list[Scalar]  # of every parameter, before it is updated
    ratio: list[Scalar]  # the first relative to the second
    global_norm: Tensor  # of all updates as one vector
    global_param_norm: Tensor  # of all parameters as one vector
    global_ratio: Tensor  # the first relative to the second

    @classmethod
    def init(cls, params: list[Tensor]) -> MonitorState:
        """Before the first update."""
        a, b, c = ([torch.zeros_like(norm(p)) for p in params] for _ in range(3))
        first = params[0] if params else torch.zeros(())
        return cls(counter(first), a, b, c, together(a, first), together(b, first), together(c, first))


def together(norms: list[Tensor], first: Tensor) -> Tensor:
    """The norm of all parameters as one vector, from that of each."""
    if not norms:
        return torch.zeros_like(norm(first))
    kind = torch.stack([torch.zeros((), dtype=x.dtype) for x in norms]).dtype
    return root(torch.stack([x.to(norms[0].device, kind) ** 2 for x in norms]).sum())


def relative(x: Tensor, y: Tensor) -> Tensor:
    """`x / y`; infinite where `y` is 0 and `x` is not."""
    zero = y == 0
    return where(zero, where(x == 0, 0.0, torch.inf).to(x.dtype), x / where(zero, 1.0, y))


@whole(MonitorState, sparse="rows")
def monitor(us: list[Tensor], s: MonitorState, ps: list[Tensor]) -> tuple[Any, MonitorState]:
    r"""Let the updates through as they are, and keep their norms in the state.

    For every parameter, and for all together: the norm of what passes, the norm of the parameter, and their ratio

    .. math:: r = \frac{\lVert u \rVert_2}{\lVert p \rVert_2}

    It sees what there is at its place in the chain: at the beginning the gradients, at the end the updates. The ratio at the
    end is how much of a parameter one step changes; about :math:`10^{-3}` is usual. It is infinite for a parameter that is 0.
    The norms are those of the last update: a state that is kept is a record, and `plot_monitor` draws a list of them.
    Parameters without a gradient keep their old norms, and are not in the global ones.

    >>> import torch, purestep as ps
    >>> opt = ps.chain(ps.monitor(), ps.sgd(lr=0.1), ps.monitor())
    >>> params = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([12.0])}
    >>> state = opt.init_state(params)
    >>> params, state = opt.step({"a": torch.tensor([0.0, 3.0]), "b": torch.tensor([4.0])}, state, params)
    >>> gradients, updates = state[0], state[-1]
    >>> gradients.norm, gradients.global_norm
    ({'a': tensor(3.), 'b': tensor(4.)}, tensor(5.))
    >>> updates.ratio, updates.global_param_norm
    ({'a': tensor(0.0600), 'b': tensor(0.0333)}, tensor(13.))
    """
    found = each_norm([*us, *ps])
    norms, sizes = found[: len(us)], found[len(us) :]
    all_norms, all_sizes = together(norms, s.global_norm), together(sizes, s.global_norm)
    ratios = [relative(x, y) for x, y in zip(norms, sizes)]
    return us, MonitorState(s.step + 1, norms, sizes, ratios, all_norms, all_sizes, relative(all_norms, all_sizes))


PANELS = {"norm": "norm of what passed", "param_norm": "norm of the parameters", "ratio": "ratio of the two"}


def plot_monitor(records: Sequence[MonitorState] | Mapping[str, Sequence[MonitorState]]) -> Any:
    """Draw what monitors have recorded: three panels per monitor, with a line per parameter and a thick one for all together.

    Args:
        records: states of one `monitor`, in order; or a dict of them, one row of panels for each of its names.

    Returns:
        a `matplotlib.figure.Figure`: ``figure.savefig("norms.png")``.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is nothing to draw.

    >>> import torch, purestep as ps
    >>> opt, params = ps.chain(ps.sgd(lr=0.1), ps.monitor()), {"w": torch.ones(2)}
    >>> state, records = opt.init_state(params), []
    >>> for _ in range(3):
    ...     params, state = opt.step(params, state, params)
    ...     records.append(state[-1])
    >>> [round(record.global_norm.item(), 4) for record in records]
    [0.1414, 0.1273, 0.1146]
    >>> figure = ps.plot_monitor({"updates": records})  # doctest: +SKIP
    """
    rows = dict(records) if isinstance(records, Mapping) else {"": records}
    if not rows or not all([len(states) for states in rows.values()]):
        raise ValueError("plot_monitor draws recorded states of monitor, but there are none.")
    try:
        figures = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise ImportError("plot_monitor draws with matplotlib, which is not installed: pip install matplotlib") from error
    figure = figures.Figure(figsize=(4 * len(PANELS), 3 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(PANELS), squeeze=False)
    for row, (name, states) in zip(axes, rows.items()):
        steps = [float(s.step) for s in states]
        for panel, (field, label) in zip(row, PANELS.items()):
            columns = [tree.flatten(getattr(s, field)) for s in states]
            for i, path in enumerate(columns[0][1].paths()):
                if columns[0][0][i] is not None:  # masked
                    panel.plot(steps, [float(leaves[i]) for leaves, _ in columns], linewidth=1, label=path or None)
            panel.plot(steps, [float(getattr(s, f"global_{field}")) for s in states], "k", linewidth=2, label="all together")
            panel.set(title=f"{name}: {label}" if name else label, xlabel="update", yscale="log")
    axes[0][-1].legend(fontsize="x-small")
    return figure
