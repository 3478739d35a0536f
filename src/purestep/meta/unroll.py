"""Training as a function: so many steps of an optimizer, differentiable with respect to everything."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from numbers import Integral
from typing import Any, Literal, NamedTuple, TypeGuard, TypeVar, overload

import torch
from torch import Tensor

from purestep._core import maths, tree
from purestep._core.lists import flattened, parted
from purestep._core.populations import detach
from purestep._core.torch_api import (
    SUPPORTED_NODES,
    DisableFuncTorch,
    TransformType,
    VmapInterpreter,
    add_batch_dim,
    interpreter_stack,
    node_type,
    tree_flatten,
    tree_flatten_with_path,
    tree_leaves,
    tree_map,
    tree_unflatten,
)
from purestep.compose import uncalled
from purestep.meta.attach import Rule, attach, exchanged, layers, pullback, pushforward, watched
from purestep.meta.joined import join_state, joins, part_state
from purestep.meta.loop import Loop
from purestep.meta.surroundings import Surroundings
from purestep.meta.trees import GAP, copies, differentiable, refilled, together
from purestep.transform import Transform

PyTree = Any
Loss = Callable[..., Any]
T = TypeVar("T")


class Unrolled(NamedTuple):
    """What `unroll` returns, if nothing more is asked for."""

    params: Any  # the parameters after the last step
    state: Any  # the optimizer's state
    losses: Tensor  # the loss before each step, of shape (steps,)


class Recorded(NamedTuple):
    """What `unroll` returns with `buffers`, `has_aux` or `trajectory`. What was not asked for is None."""

    params: Any
    """The parameters after the last step."""
    state: Any
    """The optimizer's state after the last step."""
    losses: Tensor
    """The loss before each step, of shape (steps,)."""
    buffers: Any
    """The buffers after the last step."""
    aux: Any
    """What the loss returned beside its value at each step: tensors of shape (steps, ...)."""
    trajectory: Any
    """The parameters before each step and after the last: tensors of shape (steps + 1, ...)."""


class Steps(NamedTuple):
    """Some steps of training, as `run` takes them."""

    number: int
    loss: Loss
    batches: Literal["none", "stacked", "listed"]
    first_order: bool
    buffers: bool
    has_aux: bool
    trajectory: bool


class Outcome(NamedTuple):
    """What a loss returns."""

    value: Tensor
    buffers: Any
    aux: Any


@overload
def unroll(  # pyright: ignore[reportOverlappingOverload]  # a bool that is known to be False is the first's
    opt: Transform,
    loss: Loss,
    params: PyTree,
    batches: PyTree | int,
    *,
    args: tuple[PyTree, ...] = (),
    buffers: None = None,
    has_aux: Literal[False] = False,
    trajectory: Literal[False] = False,
    state: Any = None,
    first_order: bool = False,
    checkpoint_every: int | None = None,
) -> Unrolled: ...
@overload
def unroll(
    opt: Transform,
    loss: Loss,
    params: PyTree,
    batches: PyTree | int,
    *,
    args: tuple[PyTree, ...] = (),
    buffers: PyTree = None,
    has_aux: bool = False,
    trajectory: bool = False,
    state: Any = None,
    first_order: bool = False,
    checkpoint_every: int | None = None,
) -> Recorded: ...
def unroll(
    opt: Transform,
    loss: Loss,
    params: PyTree,
    batches: PyTree | int,
    *,
    args: tuple[PyTree, ...] = (),
    buffers: PyTree = None,
    has_aux: bool = False,
    trajectory: bool = False,
    state: Any = None,
    first_order: bool = False,
    checkpoint_every: int | None = None,
) -> Unrolled | Recorded:
    r"""Train for some steps, as one function of the optimizer, the parameters, the state, and the batches.

    .. math:: p_k = p_{k-1} + u\bigl(\nabla f(p_{k-1}, b_k), s_{k-1}, p_{k-1}\bigr), \qquad k = 1, \dots, n

    Everything that comes out can be differentiated with respect to everything that went in (and whatever the loss closes over),
    by `torch.func.grad`, `torch.func.jvp` or ``backward()``; it can be vmapped over, and compiled.

    Args:
        opt: any transform. What it asks for at each update is given: `value`, and `value_and_grad`.
        loss: ``(params, batch, *args) -> loss``, a 0-d tensor. With `buffers` it is
            ``(params, buffers, batch, *args) -> (loss, buffers)``. With `has_aux` it returns one more at the end:
            ``(loss, aux)``, or ``(loss, buffers, aux)``. If `batches` is a number, there is no ``batch``.
        params: the initial parameters, a pytree.
        batches: one of three.

            - A list: the batch of each step, any pytree. Batches may differ in shape, as the last one of an epoch does. An
              iterable, such as a `torch.utils.data.DataLoader`, is read to its end into a list.
            - A tensor, tuple, dict or other pytree of tensors whose first dimension is that of the steps.
            - A number of steps, all on the same data, which the loss knows.
        args: further arguments of the loss, a tuple of pytrees, the same at every step.
        buffers: what the loss changes from step to step and nobody trains, a pytree: running statistics, for one. The loss is
            given copies, which it may write to; the caller's are never written to. Each step gets the buffers that the step
            before returned; where a transform evaluates the loss several times in one step, those of the evaluation at the
            step's start count. Under `torch.func.vmap` every member has buffers of its own, also if it began with the same
            ones as all others; only a counter (an integer of shape ()) stays one for all, unless it is stacked.
        has_aux: the loss returns something more, a pytree of tensors and numbers, of the same shapes at every step.
        trajectory: also return the parameters before each step and after the last.
        state: the initial state; by default ``opt.init_state(params)``.
        first_order: take gradients for constants, so that no second derivatives are computed: first-order MAML. What is left
            is the dependence through the sum of the updates, and on the hyperparameters. Losses, new buffers and aux are
            constants, too.
        checkpoint_every: keep only what there is after so many steps, and run each segment again when its derivatives are
            wanted. The memory of :math:`n` steps is then that of :math:`n / k + k`, least with :math:`k = \sqrt n`, and
            the forward computation is done twice. Values and derivatives are the same: random numbers are drawn again, and
            autocast is what it was. (`torch.compile` decides by itself what to compute twice, and takes no notice.)

    Returns:
        ``(params, state, losses)``: the parameters and the state after the last step, and the loss before each. With `buffers`,
        `has_aux` or `trajectory` a `Recorded`, which has `buffers`, `aux` and `trajectory` beside; what was not asked for is
        None. Floating-point buffers and aux are differentiable as the losses are, by whatever torch differentiates. It has no
        derivatives of the running statistics of its batch normalization, which are constants to it, and refuses to
        differentiate by their initial values in reverse.

    Raises:
        ValueError: the batches have different lengths, there are none, `checkpoint_every` is not a number of steps, or the
            structure of the buffers, or a structure or shape in aux, changes from step to step.
        TypeError: the loss is not one number (the error says its shape), or the loss does not return what it should.

    >>> import torch, purestep as ps
    >>> def loss(p, batch):
    ...     return ((p - batch) ** 2).sum()
    >>> def after(lr):
    ...     trained = ps.meta.unroll(ps.sgd(lr), loss, torch.zeros(2), torch.ones(3, 2))
    ...     return loss(trained.params, torch.ones(2))  # 2 (1 - 2 lr)^6
    >>> torch.func.grad(after)(torch.tensor(0.25))
    tensor(-0.7500)

    Batch normalization, in training mode, on batches of a loader:

    >>> from torch import nn
    >>> net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    >>> params = {name: p.detach() for name, p in net.named_parameters()}
    >>> data = torch.utils.data.TensorDataset(torch.randn(10, 2), torch.randn(10, 1))
    >>> def loss(params, buffers, batch):
    ...     x, y = batch
    ...     predicted = torch.func.functional_call(net, {**params, **buffers}, (x,))  # writes into the copies
    ...     return nn.functional.mse_loss(predicted, y), buffers, {"largest": predicted.abs().max()}
    >>> loader = torch.utils.data.DataLoader(data, batch_size=4)  # of 4, 4 and 2 rows
    >>> found = ps.meta.unroll(ps.adam(), loss, params, loader, buffers=dict(net.named_buffers()), has_aux=True)
    >>> found.buffers["1.num_batches_tracked"], found.aux["largest"].shape
    (tensor(3), torch.Size([3]))

    References: Maclaurin, Duvenaud & Adams, `Gradient-based Hyperparameter Optimization through Reversible Learning
    <https://arxiv.org/abs/1502.03492>`_, 2015; Finn, Abbeel & Levine, `Model-Agnostic Meta-Learning
    <https://arxiv.org/abs/1703.03400>`_, 2017; Chen et al., `Training Deep Nets with Sublinear Memory Cost
    <https://arxiv.org/abs/1604.06174>`_, 2016, for the checkpoints.
    """
    if not isinstance(opt, Transform):
        raise TypeError(f"unroll takes a transform, such as purestep.adam(lr=0.1), but got {opt!r}.{uncalled(opt)}")
    if not isinstance(args, tuple):
        raise TypeError(
            f"args must be a tuple of further arguments of the loss, but is {tree.described(args)}. One argument x is "
            "args=(x,)."
        )
    batches = list(batches) if is_listed(batches) else batches
    count = number_of_steps(batches)
    if checkpoint_every is not None and (not whole(checkpoint_every) or checkpoint_every < 1):
        raise ValueError(
            f"checkpoint_every must be a number of steps, at least 1, but is {checkpoint_every!r}; the square root of the "
            f"number of steps, here {max(1, round(count**0.5))}, needs the least memory."
        )
    form: Literal["none", "stacked", "listed"]
    form = "none" if whole(batches) else "listed" if type(batches) is list else "stacked"
    steps = Steps(count, loss, form, first_order, buffers is not None, has_aux, trajectory)
    state = opt.init_state(params) if state is None else state
    buffers = of_each_member(buffers, (opt, state, params, batches, args)) if steps.buffers else None
    if checkpoint_every is None or torch.compiler.is_compiling():  # the compiler decides by itself what is computed again
        return finished(steps, [run(steps, opt, state, params, batches, args, buffers)])
    segments: list[Recorded] = []
    for start in range(0, count, checkpoint_every):
        stop = min(start + checkpoint_every, count)
        part = segment(form, batches, start, stop)
        made = recomputed(steps._replace(number=stop - start), opt, state, params, part, args, buffers)
        params, state, buffers = made.params, made.state, made.buffers
        segments.append(made)
    return finished(steps, segments)


def run(
    steps: Steps, opt: Transform, state: Any, params: PyTree, batches: PyTree, args: tuple[PyTree, ...], buffers: PyTree
) -> Recorded:
    """These steps, one after the other. The trajectory is without its end."""
    leaves, spec = tree.flatten(params)
    if not opt.plan.extras and joins(opt, state, leaves, spec):
        return as_vector(steps, opt, state, leaves, spec, batches, args, buffers)
    losses: list[Tensor] = []
    auxes: list[PyTree] = []
    path: list[PyTree] = []
    names = opt.plan.extras
    loop: Loop | None = None
    for batch in each_batch(steps, batches):
        given = (buffers, (*batch, *args))
        if steps.trajectory:
            path.append(params)
        grads, (value, buffers, aux) = differentiate(steps, params, given, record=not steps.first_order)
        losses.append(value)
        if steps.has_aux:
            auxes.append(aux)
        if loop is not None:
            params = loop.step(grads)
            continue
        extras: dict[str, Any] = {}
        if "value" in names:
            extras["value"] = value
        if "value_and_grad" in names:
            extras["value_and_grad"] = lambda p, given=given: value_and_grad(steps, p, given)
        params, state = opt.step(grads, state, params, **extras)
        loop = Loop.of(opt, grads, state, params)
    return Recorded(
        params,
        state if loop is None else loop.state(),
        torch.stack(losses),
        buffers,
        together(auxes, torch.stack, "aux") if steps.has_aux else None,
        together(path, torch.stack, "the parameters") if steps.trajectory else None,
    )


def as_vector(
    steps: Steps,
    opt: Transform,
    state: Any,
    leaves: list[Tensor],
    spec: tree.Spec,
    batches: PyTree,
    args: tuple[PyTree, ...],
    buffers: PyTree,
) -> Recorded:
    """The same, with all parameters as one vector between the steps: for small ones, where every operation costs the same."""

    def loss(vector: Tensor, *given: Any) -> Any:
        return steps.loss(tree.unflatten(parted(vector, leaves), spec), *given)

    vector_state = join_state(opt, state, spec)
    made = run(steps._replace(loss=loss), opt, vector_state, flattened(leaves), batches, args, buffers)
    trajectory = made.trajectory
    if steps.trajectory:
        columns = torch.split(trajectory, [p.numel() for p in leaves], dim=1)
        trajectory = tree.unflatten([x.reshape(len(x), *p.shape) for x, p in zip(columns, leaves)], spec)
    params = tree.unflatten(parted(made.params, leaves), spec)
    return made._replace(params=params, state=part_state(opt, made.state, leaves, spec), trajectory=trajectory)


def finished(steps: Steps, segments: list[Recorded]) -> Unrolled | Recorded:
    """One result of the results of consecutive segments."""
    last = segments[-1]
    if len(segments) > 1:
        last = last._replace(losses=torch.cat([x.losses for x in segments]))
        if steps.has_aux:
            last = last._replace(aux=together([x.aux for x in segments], torch.cat, "aux"))
    if steps.trajectory:
        end = tree_map(lambda x: x[None] if isinstance(x, Tensor) else x, last.params)
        last = last._replace(trajectory=together([*[x.trajectory for x in segments], end], torch.cat, "the parameters"))
    return last if steps.buffers or steps.has_aux or steps.trajectory else Unrolled(*last[:3])


def differentiate(
    steps: Steps, params: PyTree, given: tuple[PyTree, tuple[PyTree, ...]], record: bool = True
) -> tuple[PyTree, Outcome]:
    """The gradients, and what the loss returns; constants, if they are not to be recorded."""
    buffers, arguments = given

    def returned(p: PyTree) -> Outcome:
        found = steps.loss(p, copies(buffers), *arguments) if steps.buffers else steps.loss(p, *arguments)
        return outcome(steps, found, buffers)

    leaves, spec = tree_flatten(params)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not all(map(maths.recording, leaves)):
        form: list[Any] = []

        def checked(p: PyTree) -> tuple[Tensor, list[Tensor]]:
            value, *beside = returned(p)
            found, spec = tree_flatten(beside)
            form[:] = [GAP if isinstance(x, Tensor) else x for x in found], spec
            return value, [x for x in found if isinstance(x, Tensor)]  # torch.func takes nothing else

        grads, (value, tensors) = torch.func.grad_and_value(checked, has_aux=True)(params)
        others, spec_beside = form
        made = Outcome(value, *refilled(others, tensors, spec_beside))
        return (grads, made) if record else detach((grads, made))
    made = returned(params)  # a further level of torch.func is one that every operation passes through
    found: Any = [None] * len(leaves)
    if made.value.requires_grad:
        found = torch.autograd.grad(made.value, leaves, create_graph=record, allow_unused=True)
    grads = tree_unflatten([torch.zeros_like(p) if g is None else g for g, p in zip(found, leaves)], spec)
    return grads, made if record else detach(made)


def value_and_grad(steps: Steps, params: PyTree, given: tuple[PyTree, tuple[PyTree, ...]]) -> tuple[Tensor, PyTree]:
    """The loss of a step and its gradients at other parameters. What else the loss returns there is dropped."""
    grads, made = differentiate(steps, params, given)
    return made.value, grads


def outcome(steps: Steps, found: Any, buffers: PyTree) -> Outcome:
    """What a loss has returned, if it is what was asked for.

    Raises:
        TypeError: it is something else.
        ValueError: the buffers have another structure than before.
    """
    parts = ["loss", *["buffers"] * steps.buffers, *["aux"] * steps.has_aux]
    if len(parts) == 1:
        return Outcome(number(found), None, None)
    if type(found) is not tuple or len(found) != len(parts):
        asked = " and ".join([*["buffers"] * steps.buffers, *["has_aux=True"] * steps.has_aux])
        raise TypeError(
            f"With {asked} the loss must return ({', '.join(parts)}), a tuple, but it returned {tree.described(found)}."
        )
    new = None
    if steps.buffers:
        _, spec = tree.flatten(buffers)
        leaves = tree.flatten_like(found[1], spec, "The buffers that a loss returns", "those that it is given")
        new = tree.unflatten(leaves, spec)
    return Outcome(number(found[0]), new, found[-1] if steps.has_aux else None)


def number(value: Any) -> Tensor:
    """A loss, if it is a 0-d tensor."""
    if isinstance(value, Tensor) and not value.dim():
        return value
    remedy = "Take its mean or sum."
    if isinstance(value, tuple):
        remedy = "A loss that returns (loss, aux) takes has_aux=True; one that returns (loss, buffers) takes buffers=..."
    raise TypeError(f"The loss must be one number, a 0-d tensor, but is {tree.described(value)}. {remedy}")


def of_each_member(buffers: PyTree, inputs: PyTree) -> PyTree:
    """The same buffers, of which each member of a `torch.func.vmap` has its own.

    What is the same for all members cannot be written to in place with what differs between them, as batch normalization does.
    Counters are left out: that of batch normalization may be read as a number, which is refused of a batch.
    """
    if torch.compiler.is_compiling():  # which does not tell its levels: what is a batch is found in the inputs
        batched = [x.new_ones((), dtype=torch.bool) for x in tree_leaves(inputs) if isinstance(x, Tensor)]
    else:
        batched = []
        levels = [level for level in interpreter_stack() or () if level.key() == TransformType.Vmap]
        for level in levels:
            with DisableFuncTorch():
                yes = torch.ones(VmapInterpreter(level).batchSize(), dtype=torch.bool)
            batched.append(add_batch_dim(yes, 0, level.level()))

    def spread(x: Any) -> Any:
        if not isinstance(x, Tensor) or not (x.dim() or differentiable(x)):
            return x
        for yes in batched:
            x = torch.where(yes.to(x.device), x, x)
        return x

    return tree_map(spread, buffers)


# ---------------------------------------------------------------------------------------------------------------- batches


def is_listed(batches: Any) -> TypeGuard[Iterable[Any]]:
    """Whether these are the batches of the steps one by one: in a list, or in what is neither a number nor a pytree."""
    if isinstance(batches, (Tensor, tuple, Mapping, str, bytes)) or not isinstance(batches, Iterable):
        return False
    return isinstance(batches, (list, deque)) or node_type(batches) not in SUPPORTED_NODES


def each_batch(steps: Steps, batches: PyTree) -> Iterable[tuple[PyTree, ...]]:
    """The batch of each step, if there is one, as the arguments of the loss that it is."""
    if steps.batches == "none":
        return [()] * steps.number
    if steps.batches == "listed":
        return [(batch,) for batch in batches]
    leaves, spec = tree_flatten(batches)
    return [(tree_unflatten(xs, spec),) for xs in zip(*[x.unbind() for x in leaves])]


def segment(form: str, batches: PyTree, start: int, stop: int) -> PyTree:
    """The batches of consecutive steps."""
    if form == "none":
        return stop - start
    return batches[start:stop] if form == "listed" else tree_map(lambda x: x[start:stop], batches)


def number_of_steps(batches: PyTree | int) -> int:
    """How many steps these batches are for."""
    if whole(batches):
        if batches < 1:
            raise ValueError(f"unroll makes at least one step, but batches is {batches}.")
        return int(batches)
    if type(batches) is list:
        if not batches:
            raise ValueError("unroll makes at least one step, but the list of batches is empty.")
        return len(batches)
    found = tree_flatten_with_path(batches)[0]
    if not found:
        raise ValueError(
            "unroll needs batches to step on, but they hold no tensor. For steps on the same data give their number."
        )
    lengths: dict[str, int] = {}
    for path, x in found:
        name = tree.quote(tree.dotted(path))
        if not isinstance(x, Tensor) or not x.dim():
            what = "a tensor without dimensions" if isinstance(x, Tensor) else repr(x)
            raise TypeError(
                f"batches must be tensors whose first dimension is that of the steps, but {name} is {what}. What is the same "
                "in every step belongs to the loss or into args. One batch per step, of any kind, is a list."
            )
        lengths[name] = len(x)
    if len(set(lengths.values())) > 1:
        told = ", ".join([f"{name} has {n}" for name, n in lengths.items()])
        raise ValueError(
            f"batches must all be for the same number of steps, their first dimension, but {told}. One batch per step, of any "
            "kind, is a list."
        )
    if not len(found[0][1]):
        raise ValueError("unroll makes at least one step, but the batches are for none: their first dimension is 0.")
    return len(found[0][1])


def whole(x: Any) -> bool:
    """Whether it is a whole number, and no bool."""
    return isinstance(x, Integral) and not isinstance(x, bool)


# ------------------------------------------------------------------------------------------------------------ checkpoints


def recomputed(
    steps: Steps, opt: Transform, state: Any, params: PyTree, batches: PyTree, args: tuple[PyTree, ...], buffers: PyTree
) -> Recorded:
    """The same as `run`, which is called again when derivatives are wanted: until then nothing is kept but what comes out."""
    flat, spec = tree_flatten((opt, state, params, batches, args, buffers))
    given = Distinct([x for x in flat if isinstance(x, Tensor)])
    before = [x if isinstance(x, Tensor) else None for x in flat]

    def again(sources: Sequence[Tensor]) -> Recorded:
        found = iter(given.spread(sources))
        filled = [x if y is None else next(found) for x, y in zip(flat, before)]
        return run(steps, *tree_unflatten(filled, spec))

    fixed = detach(given.each)
    surroundings = Surroundings(fixed)
    wanted = [maths.followed(x, batches=False) for x in given.each]
    sought = [differentiable(x) and any([y.requires_grad for y in layers(x)]) for x in given.each]
    with watched(fixed) as watch:
        result, constant = known_constants(again, fixed, sought) if steps.buffers else (again(fixed), set())
    watch.refuse_unseen(result, "The loss, or the transform,")
    ends, end_spec = tree_flatten(detach(result))
    del result  # and with it what was recorded on the way
    inside = watch.found(ends)
    wanted += [maths.followed(x, batches=False) for x in inside]
    places = [k for k, x in enumerate(ends) if differentiable(x) and k not in constant]
    values = Distinct([ends[k] for k in places])
    count = len(given.each)

    def function(sources: list[Tensor]) -> list[Tensor]:
        with surroundings.restored(), exchanged(inside, sources[count:]) if inside else nullcontext():
            made = again(sources[:count])
        found = tree_leaves(made)
        return values.pick([found[k] for k in places])

    rule = Rule(
        lambda _, sources, cotangents: pullback(function, sources, cotangents, wanted),
        lambda _, sources, tangents: pushforward(function, sources, tangents, wanted),
    )
    for k, x in zip(places, values.spread(attach(values.each, [*given.each, *inside], rule))):
        ends[k] = x
    return Recorded(*tree_unflatten(ends, end_spec))


def known_constants(
    function: Callable[[Sequence[Tensor]], Recorded], given: list[Tensor], sought: list[bool]
) -> tuple[Recorded, set[int]]:
    """What a function of tensors returns, and which leaves of it are buffers that have no derivatives.

    torch's batch normalization refuses running statistics that require grad, so those that depend on nothing must not. It takes
    a recording to know, by what is `sought` in reverse, which is dropped. Tangents cannot be seen: where there are any, every
    buffer may have some.
    """
    places = [k for k, yes in enumerate(sought) if yes]
    form: list[Any] = []

    def noted(*xs: Tensor) -> tuple[Tensor, list[Tensor]]:
        filled = list(given)
        for k, x in zip(places, xs):
            filled[k] = x
        found = function(filled)
        leaves, spec = tree_flatten(found)
        first = len(tree_leaves(found[:3]))
        those = range(first, first + len(tree_leaves(found.buffers)))
        constant = {k for k in those if differentiable(leaves[k]) and not maths.followed(leaves[k], batches=False)}
        form[:] = [GAP if isinstance(x, Tensor) else x for x in leaves], spec, constant
        return torch.zeros(()), [x for x in leaves if isinstance(x, Tensor)]

    if places:
        _, _, tensors = torch.func.vjp(noted, *[given[k] for k in places], has_aux=True)  # type: ignore[misc]
    else:
        _, tensors = noted()
    others, spec, constant = form
    return refilled(others, tensors, spec), constant


class Distinct:
    """A list of tensors of which some are the same one, as counters are, and the list without repetitions."""

    def __init__(self, xs: Sequence[Tensor]) -> None:
        numbers: dict[int, int] = {}
        self.places = [numbers.setdefault(id(x), len(numbers)) for x in xs]
        self.firsts = [self.places.index(n) for n in range(len(numbers))]
        self.each = self.pick(xs)

    def pick(self, xs: Sequence[Tensor]) -> list[Tensor]:
        """The first of those that are the same."""
        return [xs[k] for k in self.firsts]

    def spread(self, each: Sequence[Tensor]) -> list[Tensor]:
        """As many again."""
        return [each[n] for n in self.places]
