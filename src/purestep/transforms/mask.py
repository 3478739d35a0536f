"""Give parameters to transforms: some of them, each to one of several, or none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from purestep._core.masks import Label, Labels
from purestep._core.maths import operation
from purestep._core.primitives import Link, drops
from purestep._core.values import show
from purestep.compose import Composite, uncalled, within
from purestep.declare import leafwise
from purestep.transform import Transform


class Masked(Composite):
    """A transform under a mask; made with `masked`."""

    __slots__ = ()

    def _linked(self) -> tuple[Link, ...]:
        (inner,), (mask,) = self.children, self.context
        return tuple([link._replace(masks=(*link.masks, mask)) for link in inner.links])

    def _split(self, state: Any) -> list[Any]:
        return self.children[0]._split(state)

    def _join(self, states: Sequence[Any]) -> Any:
        return self.children[0]._join(states)


def masked(transform: Transform, mask: Callable[[str, Tensor], bool] | Any) -> Transform:
    """Apply a transform where the mask is True; everywhere else the updates pass through unchanged.

    Args:
        transform: any transform; where the mask is False its state is None.
        mask: a function `(path, param) -> bool`, or a pytree of bools shaped like the parameters. A path is dotted, as the
            names of `model.named_parameters()` are. The function must depend on nothing that a step changes. `by_path`,
            `by_ndim` and `by_module` make such functions.

    Raises:
        TypeError: (when used) the mask is not a bool for some parameter; the error names its path.

    >>> import torch, purestep as ps
    >>> opt = ps.masked(ps.scale(-1.0), lambda path, p: path.endswith("weight"))
    >>> params = {"weight": torch.zeros(1), "bias": torch.zeros(1)}
    >>> grads = {"weight": torch.ones(1), "bias": torch.ones(1)}
    >>> opt.update(grads, opt.init_state(params), params)[0]
    {'weight': tensor([-1.]), 'bias': tensor([1.])}
    """
    if not isinstance(transform, Transform):
        raise TypeError(f"masked takes a transform and a mask, but the first argument is {transform!r}.{uncalled(transform)}")
    return Masked((transform,), (mask,))


class Partition(Composite):
    """Transforms that each have parameters of their own; made with `partition`."""

    __slots__ = ()

    def _places(self) -> list[str]:
        return within(self.context[0].known, self.children)

    def _linked(self) -> tuple[Link, ...]:
        (labels,) = self.context
        return tuple(
            [
                link._replace(masks=(*link.masks, Label(labels, label)))
                for label, child in zip(labels.known, self.children)
                for link in child.links
            ]
        )

    def _split(self, state: Any) -> list[Any]:
        (labels,) = self.context
        if not isinstance(state, dict) or state.keys() != set(labels.known):
            found = f"one with {', '.join(map(repr, state))}" if isinstance(state, dict) else type(state).__name__
            raise TypeError(
                f"The state of a partition must be a dict with the keys {', '.join(map(repr, labels.known))}, but got {found}. "
                "A state belongs to the transform whose init_state made it."
            )
        return [s for label, child in zip(labels.known, self.children) for s in child._split(state[label])]

    def _join(self, states: Sequence[Any]) -> Any:
        (labels,) = self.context
        parts, start = {}, 0
        for label, child in zip(labels.known, self.children):
            parts[label] = child._join(states[start : start + len(child.links)])
            start += len(child.links)
        return parts

    def __repr__(self) -> str:
        (labels,) = self.context
        parts = ", ".join([f"{label!r}: {child!r}" for label, child in zip(labels.known, self.children)])
        return f"partition({{{parts}}}, {show(labels.labels)})"


def partition(transforms: Mapping[str, Transform], labels: Callable[[str, Tensor], str] | Any) -> Transform:
    """Give each parameter to one of several transforms: Muon for the hidden matrices, AdamW for the rest.

    Its state is a dict with the state of each transform, in which the others' parameters are None. A partition may stand in
    a chain, under a mask, or in another partition, whose labels are then asked only for the parameters it is given.

    Under `purestep.optim.Optimizer` the parameter groups are made from the labels: one for each, with its transform's
    learning rate and all other hyperparameters as options, and the label as ``group["label"]``; so schedulers drive every
    part, and there is one state dict. Parameters that are added later are labelled too. (`OneCycleLR` and `CyclicLR` cycle the
    momentum where all parts call it by one name, ``momentum`` or ``betas``; else they need ``cycle_momentum=False``.)

    Args:
        transforms: label -> transform.
        labels: a function `(path, param) -> label`, or a pytree of labels shaped like the parameters. A path is dotted, as
            the names of `model.named_parameters()` are. The function must depend on nothing that a step changes. `by_path`,
            `by_ndim` and `by_module` make such functions.

    Raises:
        TypeError: a value of `transforms` is not a transform, or a label not a string.
        ValueError: there are no transforms; (when used) a parameter has a label that there is no transform for, or a
            transform gets no parameter. The error lists the labels there are.

    >>> import torch, purestep as ps
    >>> opt = ps.partition({"matrices": ps.sgd(lr=0.1), "rest": ps.sgd(lr=0.5)}, ps.by_ndim({2: "matrices"}, default="rest"))
    >>> params = {"weight": torch.ones(1, 1), "bias": torch.ones(1)}
    >>> grads = {"weight": torch.ones(1, 1), "bias": torch.ones(1)}
    >>> opt.step(grads, opt.init_state(params), params)[0]
    {'weight': tensor([[0.9000]]), 'bias': tensor([0.5000])}
    >>> sorted(opt.replace(**{"rest.lr": 0.2}).hyperparams)[-1]
    'rest.weight_decay'
    """
    if not isinstance(transforms, Mapping) or not transforms:
        raise ValueError(f"partition takes a dict of at least one transform by label, but got {transforms!r}.")
    for label, t in transforms.items():
        if not isinstance(label, str):
            raise TypeError(f"The labels of a partition are strings, but one is {label!r}.")
        if not isinstance(t, Transform):
            raise TypeError(f"partition takes transforms by label, but {label!r} is {t!r}.{uncalled(t)}")
    return Partition(transforms.values(), (Labels(labels, tuple(transforms)),))


@operation(like=True, block=1)
def nothing(u: Tensor) -> Tensor:
    """Minus zero, which leaves every number as it is when it is added: plus zero would make 0 of -0."""
    return torch.full_like(u, -0.0)


@drops
@leafwise(sparse="rows")
def set_to_zero(u: Tensor, p: Tensor) -> Tensor:
    r"""No update, whatever comes in: :math:`u \leftarrow 0`. The parameters keep every bit.

    >>> import torch, purestep as ps
    >>> opt, p = ps.chain(ps.sgd(lr=0.1), ps.set_to_zero()), torch.tensor([1.0, 2.0])
    >>> opt.step(torch.tensor([3.0, float("nan")]), opt.init_state(p), p)[0]
    tensor([1., 2.])
    """
    return nothing(u)


class Freeze(Masked):
    """No update under a mask, and no other transform of the chain there; made with `freeze`."""

    __slots__ = ()

    @property
    def freezes(self) -> Any:
        return self.context[0]

    def __repr__(self) -> str:
        return f"freeze({show(self.context[0])})"


def freeze(mask: Callable[[str, Tensor], bool] | Any = True) -> Transform:
    """Leave the parameters where the mask is True exactly as they are.

    Nothing else in the same chain acts on them: they have no state, and their gradients do not count in a global norm.

    Args:
        mask: a function `(path, param) -> bool`, or a pytree of bools shaped like the parameters, as for `masked`.

    >>> import torch, purestep as ps
    >>> opt = ps.chain(ps.adam(lr=0.1), ps.freeze(lambda path, p: path.startswith("encoder.")))
    >>> params = {"encoder.weight": torch.zeros(2), "head.weight": torch.zeros(2)}
    >>> state = opt.init_state(params)
    >>> ps.find(state, ps.AdamState).exp_avg
    {'encoder.weight': None, 'head.weight': tensor([0., 0.])}
    >>> opt.step({"encoder.weight": torch.ones(2), "head.weight": torch.ones(2)}, state, params)[0]
    {'encoder.weight': tensor([0., 0.]), 'head.weight': tensor([-0.1000, -0.1000])}
    """
    return Freeze((set_to_zero(),), (mask,))
