"""Training as a function: so many steps of an optimizer, differentiable with respect to everything."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states

from purestep._core import maths, tree
from purestep._core.lists import flattened, parted
from purestep._core.populations import detach
from purestep._core.torch_api import tree_flatten, tree_flatten_with_path, tree_leaves, tree_map, tree_unflatten
from purestep.meta.attach import Rule, attach, exchanged, pullback, pushforward, watched
from purestep.meta.joined import join_state, joins, part_state
from purestep.meta.loop import Loop
from purestep.transform import Transform

PyTree = Any
Loss = Callable[..., Tensor]


class Unrolled(NamedTuple):
    """What `unroll` returns."""

    params: Any  # the parameters after the last step
    state: Any  # the optimizer's state
    losses: Tensor  # the loss before each step, of shape (steps,)


class Steps(NamedTuple):
    """Some steps of training, as `run` takes them."""

    number: int
    loss: Loss
    batched: bool
    first_order: bool


def unroll(
    opt: Transform,
    loss: Loss,
    params: PyTree,
    batches: PyTree | int,
    *,
    state: Any = None,
    first_order: bool = False,
    checkpoint_every: int | None = None,
) -> Unrolled:
    r"""Train for some steps, as one function of the optimizer, the parameters, the state, and the batches.

    .. math:: p_k = p_{k-1} + u\bigl(\nabla f(p_{k-1}, b_k), s_{k-1}, p_{k-1}\bigr), \qquad k = 1, \dots, n

    Everything that comes out can be differentiated with respect to everything that went in (and whatever the loss closes over),
    by `torch.func.grad`, `torch.func.jvp` or ``backward()``; it can be vmapped over, and compiled.

    Args:
        opt: any transform. What it asks for at each update is given: `value`, and `value_and_grad`.
        loss: ``(params, batch) -> loss``, a 0-d tensor; or ``params -> loss``, if `batches` is a number.
        params: the initial parameters, a pytree.
        batches: a pytree of tensors whose first dimension is that of the steps; or a number of steps, all on the same data,
            which the loss knows.
        state: the initial state; by default ``opt.init_state(params)``.
        first_order: take gradients for constants, so that no second derivatives are computed: first-order MAML. What is left
            is the dependence through the sum of the updates, and on the hyperparameters.
        checkpoint_every: keep only what there is after so many steps, and run each segment again when its derivatives are
            wanted. The memory of :math:`n` steps is then that of :math:`n / k + k`, least with :math:`k = \sqrt n`, and
            the forward computation is done twice. Values and derivatives are the same: random numbers are drawn again, and
            autocast is what it was. (`torch.compile` decides by itself what to compute twice, and takes no notice.)

    Returns:
        ``(params, state, losses)``: the parameters and the state after the last step, and the loss before each.

    Raises:
        ValueError: the batches have different lengths, there are none, or `checkpoint_every` is not a number of steps.
        TypeError: the loss is not one number; the error says its shape.

    >>> import torch, purestep as ps
    >>> def loss(p, batch):
    ...     return ((p - batch) ** 2).sum()
    >>> def after(lr):
    ...     trained = ps.meta.unroll(ps.sgd(lr), loss, torch.zeros(2), torch.ones(3, 2))
    ...     return loss(trained.params, torch.ones(2))  # 2 (1 - 2 lr)^6
    >>> torch.func.grad(after)(torch.tensor(0.25))
    tensor(-0.7500)

    References: Maclaurin, Duvenaud & Adams, `Gradient-based Hyperparameter Optimization through Reversible Learning
    <https://arxiv.org/abs/1502.03492>`_, 2015; Finn, Abbeel & Levine, `Model-Agnostic Meta-Learning
    <https://arxiv.org/abs/1703.03400>`_, 2017; Chen et al., `Training Deep Nets with Sublinear Memory Cost
    <https://arxiv.org/abs/1604.06174>`_, 2016, for the checkpoints.
    """
    if not isinstance(opt, Transform):
        hint = f" Did you mean to call it: {opt.__name__}(...)?" if hasattr(opt, "declaration") else ""
        raise TypeError(f"unroll takes a transform, such as purestep.adam(lr=0.1), but got {opt!r}.{hint}")
    count = number_of_steps(batches)
    batched = not isinstance(batches, Integral)
    if checkpoint_every is not None and (not whole(checkpoint_every) or checkpoint_every < 1):
        raise ValueError(
            f"checkpoint_every must be a number of steps, at least 1, but is {checkpoint_every!r}; the square root of the "
            f"number of steps, here {max(1, round(count**0.5))}, needs the least memory."
        )
    state = opt.init_state(params) if state is None else state
    if checkpoint_every is None or torch.compiler.is_compiling():  # the compiler decides by itself what is computed again
        return run(Steps(count, loss, batched, first_order), opt, state, params, batches)
    losses: list[Tensor] = []
    for start in range(0, count, checkpoint_every):
        stop = min(start + checkpoint_every, count)
        part = tree_map(lambda x, a=start, b=stop: x[a:b], batches) if batched else stop - start
        steps = Steps(stop - start, loss, batched, first_order)
        params, state, some = recomputed(steps, opt, state, params, part)
        losses.append(some)
    return Unrolled(params, state, torch.cat(losses))


def run(steps: Steps, opt: Transform, state: Any, params: PyTree, batches: PyTree) -> Unrolled:
    """These steps, one after the other."""
    leaves, spec = tree.flatten(params)
    if not opt.plan.extras and joins(opt, state, leaves, spec):
        return as_vector(steps, opt, state, leaves, spec, batches)
    losses: list[Tensor] = []
    names = opt.plan.extras
    loop: Loop | None = None
    each = split(batches, steps.number) if steps.batched else [()] * steps.number
    for batch in each:
        given = (batch,) if steps.batched else ()
        grads, value = differentiate(steps.loss, params, given, record=not steps.first_order)
        losses.append(value)
        if loop is not None:
            params = loop.step(grads)
            continue
        extras: dict[str, Any] = {}
        if "value" in names:
            extras["value"] = value
        if "value_and_grad" in names:
            extras["value_and_grad"] = lambda p, given=given: differentiate(steps.loss, p, given)[::-1]
        params, state = opt.step(grads, state, params, **extras)
        loop = Loop.of(opt, grads, state, params)
    return Unrolled(params, state if loop is None else loop.state(), torch.stack(losses))


def as_vector(steps: Steps, opt: Transform, state: Any, leaves: list[Tensor], spec: tree.Spec, batches: PyTree) -> Unrolled:
    """The same, with all parameters as one vector between the steps: for small ones, where every operation costs the same."""

    def loss(vector: Tensor, *given: Any) -> Tensor:
        return steps.loss(tree.unflatten(parted(vector, leaves), spec), *given)

    made = run(steps._replace(loss=loss), opt, join_state(opt, state, spec), flattened(leaves), batches)
    params = tree.unflatten(parted(made.params, leaves), spec)
    return Unrolled(params, part_state(opt, made.state, leaves, spec), made.losses)


def differentiate(loss: Loss, params: PyTree, given: tuple[Any, ...], record: bool = True) -> tuple[PyTree, Tensor]:
    """The gradients and the loss; constants, if they are not to be recorded."""

    def checked(p: PyTree) -> Tensor:
        value = loss(p, *given)
        if not isinstance(value, Tensor) or value.dim():
            what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise TypeError(f"The loss must be one number, a 0-d tensor, but is {what}. Take its mean or sum.")
        return value

    leaves, spec = tree_flatten(params)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not all(map(maths.recording, leaves)):
        grads, value = torch.func.grad_and_value(checked)(params)
        return (grads, value) if record else detach((grads, value))
    value = checked(params)  # a further level of torch.func is one that every operation passes through
    found: Any = [None] * len(leaves)
    if value.requires_grad:
        found = torch.autograd.grad(value, leaves, create_graph=record, allow_unused=True)
    grads = tree_unflatten([torch.zeros_like(p) if g is None else g for g, p in zip(found, leaves)], spec)
    return grads, value if record else value.detach()


def split(batches: PyTree, count: int) -> list[PyTree]:
    """The batch of each step."""
    leaves, spec = tree_flatten(batches)
    return [tree_unflatten(xs, spec) for xs in zip(*[x.unbind() for x in leaves])] if count else []


def number_of_steps(batches: PyTree | int) -> int:
    """How many steps these batches are for."""
    if whole(batches):
        if batches < 1:
            raise ValueError(f"unroll makes at least one step, but batches is {batches}.")
        return int(batches)
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
                "in every step belongs to the loss."
            )
        lengths[name] = len(x)
    if len(set(lengths.values())) > 1:
        told = ", ".join([f"{name} has {n}" for name, n in lengths.items()])
        raise ValueError(f"batches must all be for the same number of steps, their first dimension, but {told}.")
    if not len(found[0][1]):
        raise ValueError("unroll makes at least one step, but the batches are for none: their first dimension is 0.")
    return len(found[0][1])


def whole(x: Any) -> bool:
    """Whether it is a whole number, and no bool."""
    return isinstance(x, Integral) and not isinstance(x, bool)


# ------------------------------------------------------------------------------------------------------------ checkpoints


class Surroundings:
    """What an operation does depends on beside its arguments: the state of the random number generators, and autocast."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        bottoms = [maths.bottom(x)[0] for x in tensors]
        self.device = next((x.device.type for x in bottoms if x.device.type not in ("cpu", "meta")), "cpu")
        self.random = torch.get_rng_state()
        self.devices, self.states = get_device_states(*bottoms)
        self.casts = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), torch.is_autocast_cache_enabled())
            for kind in {"cpu", self.device}
        ]

    @contextmanager
    def restored(self) -> Iterator[None]:
        """As it was, for as long as it takes."""
        with ExitStack() as stack:
            stack.enter_context(
                torch.random.fork_rng(self.devices, device_type=self.device)
                if self.devices
                else torch.random.fork_rng(devices=[])
            )
            torch.set_rng_state(self.random)
            set_device_states(self.devices, self.states, device_type=self.device)
            for kind, dtype, enabled, cache in self.casts:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=cache))
            yield


def recomputed(steps: Steps, opt: Transform, state: Any, params: PyTree, batches: PyTree) -> Unrolled:
    """The same as `run`, which is called again when derivatives are wanted: until then nothing is kept but what comes out."""
    flat, spec = tree_flatten((opt, state, params, batches))
    given = Distinct([x for x in flat if isinstance(x, Tensor)])
    before = [x if isinstance(x, Tensor) else None for x in flat]

    def again(sources: Sequence[Tensor]) -> Unrolled:
        found = iter(given.spread(sources))
        filled = [x if y is None else next(found) for x, y in zip(flat, before)]
        return run(steps, *tree_unflatten(filled, spec))

    fixed = detach(given.each)
    surroundings = Surroundings(fixed)
    with watched(fixed) as watch:
        result = again(fixed)
    watch.refuse_unseen(result, "The loss, or the transform,")
    ends, end_spec = tree_flatten(detach(result))
    del result  # and with it what was recorded on the way
    inside = watch.found(ends)
    places = [k for k, x in enumerate(ends) if isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())]
    values = Distinct([ends[k] for k in places])
    count = len(given.each)

    def function(sources: list[Tensor]) -> list[Tensor]:
        with surroundings.restored(), exchanged(inside, sources[count:]) if inside else nullcontext():
            made = again(sources[:count])
        found = tree_leaves(made)
        return values.pick([found[k] for k in places])

    rule = Rule(
        lambda _, sources, cotangents: pullback(function, sources, cotangents),
        lambda _, sources, tangents: pushforward(function, sources, tangents),
    )
    for k, x in zip(places, values.spread(attach(values.each, [*given.each, *inside], rule))):
        ends[k] = x
    return Unrolled(*tree_unflatten(ends, end_spec))


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
