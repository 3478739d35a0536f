"""Optimizers as pytrees: their numbers as tensors, populations of them, and pytrees cut from their past."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from purestep._core import maths, tree
from purestep._core.torch_api import tree_flatten, tree_flatten_with_path, tree_map, tree_unflatten
from purestep._core.tree import described
from purestep._core.values import Value

T = TypeVar("T")


def tensors(transform: T, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> T:
    """The same transform with every hyperparameter as a 0-d tensor, ready to be differentiated with respect to.

    Tensors are float64 by default: numbers are double precision in Python, and a 0-d tensor never promotes the dtype of
    what it meets. Hyperparameters that are tensors already stay what they are.

    Args:
        transform: any pytree of hyperparameters: a transform, or a schedule.
        dtype: of the new tensors; by default float64, or float32 on a device that has no float64.
        device: of the new tensors; by default the CPU.

    Returns:
        a value of the type of `transform`, with the same switches.

    >>> import torch, purestep as ps
    >>> def loss(opt):
    ...     p = torch.tensor([1.0])
    ...     p, _ = opt.step(2 * p, opt.init_state(p), p)
    ...     return (p**2).sum()
    >>> torch.func.grad(loss)(ps.tensors(ps.chain(ps.scale(-0.1))))
    chain(scale(tensor(3.2000, dtype=torch.float64)))
    """

    def convert(x: Any) -> Any:
        if isinstance(x, (int, float)) and not isinstance(x, bool):
            return torch.tensor(x, dtype=dtype or maths.precise(torch.device(device or "cpu")), device=device)
        return x

    return tree_map(convert, transform)


def in_dims(transform: Any, *, weights: int | None = None) -> Any:
    """The ``in_dims`` for `torch.func.vmap` over a transform: 0 where a hyperparameter is a batch, else None.

    Args:
        transform: a transform whose hyperparameters may be tensors with a batch in their first dimension.
        weights: the same for arguments annotated `Weights`, whose tensors have dimensions anyway: 0 if each member has
            weights of its own, as those that `stack` has put together have.

    Returns:
        a value of the structure of `transform`, with 0 in the place of each tensor that has a dimension, and None in that of
        every other hyperparameter.

    >>> import torch, purestep as ps
    >>> ps.in_dims(ps.chain(ps.scale(torch.tensor([0.1, 0.2])), ps.trace(0.9)))
    chain(scale(0), trace(None, dampening=None, nesterov=False))
    """

    def dims(x: Any) -> Any:
        if not isinstance(x, Value):
            return 0 if isinstance(x, Tensor) and x.dim() > 0 else None
        d = x.declaration
        found = dict(x.arguments)
        for name in d.hypers:
            found[name] = tree_map((lambda _: weights) if name in d.arrays else dims, found[name], is_leaf=learns)
        return type(x)(d, found)

    return tree_map(dims, transform, is_leaf=learns)


def learns(x: Any) -> bool:
    """Whether this is a transform or a schedule with an argument annotated `Weights`."""
    return isinstance(x, Value) and bool(x.declaration.arrays)


def out_dims(tree: Any, members: Any = None, *, weights: int | None = None) -> Any:
    """The ``out_dims`` for `torch.func.vmap` of a function that returns such a pytree: 0 where there is a tensor.

    A state holds None where a parameter needs none (without momentum, frozen, masked), and `vmap` has to be told. The same
    tree is the ``in_dims`` of what came out.

    The state of a population is made by ``vmap(opt.init_state, ...)``, not by `init_state` of stacked parameters: these have
    one dimension more than a member's. So `by_ndim` would take stacked vectors for a matrix, and so would `adafactor`; `muon`
    would refuse stacked matrices.

    Args:
        tree: a transform, of whose state the dims are returned; or any pytree, such as the state of one member.
        members: the parameters of all members, stacked in their first dimension; of a transform only.
        weights: as for `in_dims`.

    Returns:
        a pytree of the structure of `tree`, or of a member's state, with 0 in the place of each tensor, and None in that of all
        else.

    Raises:
        TypeError: `members` is missing beside a transform, or given beside anything else.
        ValueError: the tensors of `members` do not have one size in their first dimension; the error names a path.

    >>> import torch, purestep as ps
    >>> opt, members = ps.sgd(lr=0.1), torch.zeros(5, 2)
    >>> dims = ps.out_dims(opt, members)
    >>> state = torch.func.vmap(opt.init_state, out_dims=dims)(members)
    >>> step = torch.func.vmap(opt.step, in_dims=(0, dims, 0), out_dims=(0, dims))
    >>> members, state = step(torch.ones(5, 2), state, members)
    """
    if hasattr(type(tree), "init_state"):
        if members is None:
            raise TypeError(
                "out_dims of a transform needs the parameters of all members, too: out_dims(opt, members). Of a state it needs "
                "nothing else: out_dims(state)."
            )
        leaves, spec = tree_flatten(tree)
        batched = [d == 0 for d in tree_flatten(in_dims(tree, weights=weights))[0]]
        firsts, params = take((tree_unflatten([x if b else None for x, b in zip(leaves, batched)], spec), members), 0)
        found = [y if b else x for x, y, b in zip(leaves, tree_flatten(firsts)[0], batched)]
        tree = tree_unflatten(found, spec).init_state(params)
    elif members is not None:
        raise TypeError(
            f"out_dims takes members beside a transform only, but got them beside {described(tree)}. Leave them out."
        )
    return tree_map(lambda x: 0 if isinstance(x, Tensor) else None, tree)


def stack(members: Sequence[T]) -> T:
    """A population as one pytree, for `torch.func.vmap`: transforms, parameters or states of one structure.

    Tensors are stacked along a new first dimension. Numbers become a 1-d tensor where the members differ, and stay one
    number where all agree, so that ``in_dims=(purestep.in_dims(population), 0)`` maps over what differs. If all agree on
    everything, every number is stacked: a population is a batch always.

    Args:
        members: at least one pytree; all of them of one structure, with tensors of one shape in each place.

    Returns:
        a pytree of the structure of a member. A tensor in it has the shape ``(len(members), ...)``.

    Raises:
        ValueError: there are no members, their structures (other algorithms, other switches) differ, or shapes do.

    >>> import purestep as ps
    >>> ps.stack([ps.adamw(lr=1e-3), ps.adamw(lr=1e-2)]).hyperparams["lr"]
    tensor([0.0010, 0.0100], dtype=torch.float64)
    >>> ps.stack([ps.trace(momentum=0.5), ps.trace(momentum=0.9)])
    trace(tensor([0.5000, 0.9000], dtype=torch.float64), dampening=0.0, nesterov=False)
    """
    members = list(members)
    if not members:
        raise ValueError("stack needs at least one member, but got none.")
    first, spec = tree_flatten(members[0])
    columns: list[list[Any]] = [[x] for x in first]
    for k, member in enumerate(members[1:], start=1):
        leaves, other = tree_flatten(member)
        if other != spec:
            raise ValueError(
                f"The members of a population must have one structure, but number {k} is {member!r}, and number 0 is "
                f"{members[0]!r}. Different algorithms or switches cannot be mapped over at once."
            )
        for column, x in zip(columns, leaves):
            column.append(x)
    differ = [any([isinstance(x, Tensor) for x in c]) or any([x != c[0] for x in c]) for c in columns]
    if not any(differ):
        differ = [isinstance(c[0], numbers.Real) for c in columns]
    paths = [tree.dotted(path) for path, _ in tree_flatten_with_path(members[0])[0]]
    made = [together(c, path) if yes else c[0] for c, yes, path in zip(columns, differ, paths)]
    return tree_unflatten(made, spec)


def together(column: list[Any], path: str) -> Tensor:
    """One leaf of each member, as one tensor."""
    tensor = next((x for x in column if isinstance(x, Tensor)), None)
    if not all([isinstance(x, (Tensor, numbers.Real)) for x in column]):
        odd = next(x for x in column if not isinstance(x, (Tensor, numbers.Real)))
        raise ValueError(f"Members that differ in {tree.quote(path)} must have numbers or tensors there, but one has {odd!r}.")
    device = torch.device("cpu") if tensor is None else tensor.device
    dtype = maths.precise(device) if tensor is None else tensor.dtype
    each = [x if isinstance(x, Tensor) else torch.tensor(x, dtype=dtype, device=device) for x in column]
    shapes = {tuple(x.shape) for x in each}
    if len(shapes) > 1:
        raise ValueError(f"The members of a population must have one shape in {tree.quote(path)}, but have {sorted(shapes)}.")
    return torch.stack(each)


def take(population: T, index: Any) -> T:
    """Some members of a population: of transforms, parameters and states alike, their own fields among them.

    A member copies another, as in population based training, with an index that names it twice:
    ``opt, params, state = ps.take((opt, params, state), parents)``. What has no members, a number or a tensor without a
    dimension, stays.

    Args:
        population: any pytree whose tensors have one entry for each member in their first dimension.
        index: which members: an int for one of them; a list, a slice, a 1-d tensor of ints or of bools for a population.

    Returns:
        a pytree of the structure of `population`. With an int its tensors have one dimension less. What is one tensor in
        several places stays one; of an int or a slice the tensors are views.

    Raises:
        ValueError: the tensors do not have one number of members, or nothing in `population` has any; the error names a path.
        IndexError: there is no such member.

    >>> import torch, purestep as ps
    >>> opt = ps.sgd(lr=torch.tensor([0.1, 0.2, 0.3]))
    >>> params = {"w": torch.tensor([[1.0], [2.0], [3.0]])}
    >>> best = [2, 1, 2]
    >>> opt, params = ps.take((opt, params), best)
    >>> opt.hyperparams["lr"], params["w"].flatten()
    (tensor([0.3000, 0.2000, 0.3000]), tensor([3., 2., 3.]))
    >>> ps.take(opt, 1).hyperparams["lr"]
    tensor(0.2000)
    """
    members(population)
    if isinstance(index, (list, tuple)):
        index = torch.tensor(index)
    made: dict[int, Tensor] = {}

    def chosen(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.dim():
            return x
        if id(x) not in made:
            made[id(x)] = x[index.to(x.device) if isinstance(index, Tensor) else index]
        return made[id(x)]

    return tree_map(chosen, population)


def unstack(population: T) -> list[T]:
    """The members of a population, one by one: `stack` undone.

    Args:
        population: any pytree whose tensors have one entry for each member in their first dimension.

    Returns:
        a list of pytrees of the structure of `population`, whose tensors are views of its.

    Raises:
        ValueError: as in `take`.

    >>> import torch, purestep as ps
    >>> [opt.hyperparams["lr"] for opt in ps.unstack(ps.sgd(lr=torch.tensor([0.1, 0.2])))]
    [tensor(0.1000), tensor(0.2000)]
    """
    return [take(population, k) for k in range(members(population))]


def members(population: Any) -> int:
    """How many members there are: the first dimension of all tensors that have one.

    Raises:
        ValueError: they disagree, or there is none.
    """
    sizes: dict[int, str] = {}
    for path, x in tree_flatten_with_path(population)[0]:
        if isinstance(x, Tensor) and x.dim():
            sizes.setdefault(len(x), tree.quote(tree.dotted(path)))
    if len(sizes) > 1:
        told = ", ".join([f"{path} has {size}" for size, path in sizes.items()])
        raise ValueError(f"The tensors of a population must agree in the number of members, their first dimension, but {told}.")
    if not sizes:
        raise ValueError(
            "A population must have a tensor with a first dimension for its members, but here no tensor has a dimension."
        )
    return next(iter(sizes))


def ravel(params: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """All tensors of a pytree as one vector, and a function that undoes it.

    Args:
        params: any pytree of tensors of one dtype and device. `None` is a leaf without a tensor.

    Returns:
        ``(flat, unravel)``: a new vector of all elements, in the order of the leaves, and a function from vectors of its size
        to pytrees of the structure of `params`, in its shapes. Both can be differentiated, batched and compiled.

    Raises:
        ValueError: there is no tensor, dtypes or devices differ, or `unravel` is called with another size.

    >>> import torch, purestep as ps
    >>> flat, unravel = ps.ravel({"w": torch.ones(2, 2), "b": torch.zeros(1)})
    >>> flat
    tensor([1., 1., 1., 1., 0.])
    >>> unravel(2 * flat)
    {'w': tensor([[2., 2.],
            [2., 2.]]), 'b': tensor([0.])}
    """
    leaves, spec = tree.flatten(params)
    given = [x for x in leaves if x is not None]
    kinds = list(dict.fromkeys([(x.dtype, x.device) for x in given]))
    if len(kinds) != 1:
        found = ", ".join([f"{dtype} on {device}" for dtype, device in kinds]) or "none"
        raise ValueError(f"ravel takes tensors of one dtype on one device, but got {found}.")
    shapes = [None if x is None else x.shape for x in leaves]
    sizes = [x.numel() for x in given]

    def unravel(flat: Tensor) -> Any:
        if flat.shape != (sum(sizes),):
            raise ValueError(f"unravel takes a vector of {sum(sizes)} elements, but got a tensor of shape {tuple(flat.shape)}.")
        parts = iter(torch.split(flat, sizes))
        return tree.unflatten([None if shape is None else next(parts).reshape(shape) for shape in shapes], spec)

    return torch.cat([x.reshape(-1) for x in given]), unravel


def detach(tree: T) -> T:
    """A pytree cut from its past: the same values, through which no derivative passes, of any level of `torch.func`.

    Between the segments of a training run it makes truncated backpropagation: ``params, state = ps.detach((params, state))``.
    What is one tensor in several places, as counters are, stays one.

    Args:
        tree: any pytree. What is not a tensor stays as it is.

    Returns:
        a pytree of the structure of `tree`, whose tensors share the memory of its.

    >>> import torch, purestep as ps
    >>> x = torch.ones(2, requires_grad=True)
    >>> ps.detach({"w": 2 * x})["w"].requires_grad
    False
    """
    made: dict[int, Tensor] = {}

    def cut(x: Any) -> Any:
        return made.setdefault(id(x), x.detach()) if isinstance(x, Tensor) else x

    return tree_map(cut, tree)
