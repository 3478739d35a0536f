"""Sparse gradients: the leaf functions run on the rows that a gradient has, and on nothing else.

A transform says what a sparse gradient means to it. ``"rows"``: it changes these rows only, as if the others were not
there. ``"dense"``: the other rows change too, so the gradient is made dense first. Without a word, it is refused. Only the
transforms that act on a parameter are asked about its gradient. Around an update, `SparseRows` puts the rows of the parameter
and of its state in the place of the whole, and afterwards puts what came of them back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from purestep._core.primitives import LinkDeclaration
from purestep._core.tree import quote
from purestep._engine.plan import ParamSlice


class Row(NamedTuple):
    """One parameter with a sparse gradient."""

    at: tuple[Tensor, ...]  # of the rows, as tensors are indexed
    param: Tensor
    states: list[list[Any]]  # per link, per field


class SparseRows:
    """The lists of one update, with the rows of sparse gradients in place of the parameters they belong to."""

    def __init__(
        self,
        grads: list[Any],
        params: list[Any],
        states: list[Any],
        groups: Sequence[ParamSlice],
        mask: Callable[[tuple[Any, ...]], list[bool]],
        path: Callable[[int], str],
    ) -> None:
        self.plan = groups[0].plan
        self.grads, self.params = list(grads), list(params)
        self.states = [[list(c) if isinstance(c, list) else c for c in s] for s in states]
        self.rows: dict[int, Row] = {}
        for group in groups:
            active = [(link.transform.declaration, mask(link.masks) if link.masks else None) for link in on(group)]
            for k in group.rows:
                if grads[k].layout is torch.strided:
                    continue
                acting = [d for d, selected in active if selected is None or selected[k]]
                meaning(acting, grads[k], functools.partial(path, k))
                if any([d.sparse == "dense" for d in acting]):
                    self.grads[k] = grads[k].to_dense()
                else:
                    self.gather(k)

    def gather(self, k: int) -> None:
        g, p = self.grads[k].coalesce(), self.params[k]
        index = tuple(g.indices())
        own = [[c[k] if leaf else None for c, leaf in zip(s, f.leaves)] for s, f in zip(self.states, self.plan.fields)]
        self.rows[k] = Row(index, p, own)
        self.grads[k], self.params[k] = g.values(), p[index]
        for columns, fields in zip(self.states, self.plan.fields):
            for f in fields.tensors:
                if columns[f][k] is not None:
                    columns[f][k] = columns[f][k][index]

    def scatter(self, out: list[Any], states: list[Any], apply: bool, donate: bool) -> tuple[list[Any], list[Any]]:
        """The new parameters (or updates) and states, whole again; in their old memory with `donate`."""
        put = torch.Tensor.index_put_ if donate else torch.Tensor.index_put
        out, states = list(out), [list(s) for s in states]
        for k, row in self.rows.items():
            if apply:
                out[k] = put(row.param, row.at, out[k])
            else:
                out[k] = torch.sparse_coo_tensor(
                    torch.stack(row.at), out[k], row.param.shape, check_invariants=False, is_coalesced=True
                )
            for columns, fields, old in zip(states, self.plan.fields, row.states):
                for f in fields.tensors:
                    if columns[f][k] is not None:
                        columns[f] = list(columns[f])
                        whole = old[f] if old[f] is not None else torch.zeros_like(row.param)
                        columns[f][k] = put(whole, row.at, columns[f][k])
        return out, states


def on(group: ParamSlice) -> list[Any]:
    """The links of a group that are not switched off."""
    return [link for link, off in zip(group.plan.links, group.plan.off) if not off]


def meaning(acting: Sequence[LinkDeclaration], g: Tensor, path: Callable[[], str]) -> None:
    """Refuse a sparse gradient that has no meaning to one of the transforms that act on its parameter.

    Raises:
        RuntimeError: a transform needs dense gradients, or the layout is not ``torch.sparse_coo``.
    """
    for d in acting:
        if not d.sparse:
            where = quote(path())
            raise RuntimeError(
                f"The gradient of {where} is sparse, and {d.name} is not compatible with sparse gradients: it needs dense "
                "ones. Make it dense with .to_dense() or create the embedding with sparse=False, or use an algorithm for "
                "sparse gradients: sgd, adagrad and sparse_adam, without weight decay."
            )
    if g.layout is not torch.sparse_coo:
        where = quote(path())
        raise RuntimeError(
            f"The gradient of {where} has layout {g.layout}, but only torch.sparse_coo is supported. Use .to_sparse_coo()."
        )
