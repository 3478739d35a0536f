"""Transforms that are put around another, and decide when it acts and what becomes of its updates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple, TypeAlias

from torch import Tensor, zeros_like

from purestep._core.hyper import Period, UnitInterval, Whole, check_steps
from purestep._core.maths import Scalar, counter, finite, lerp, select, where
from purestep._core.primitives import forwards
from purestep._engine.nesting import Inner
from purestep.declare import nested
from purestep.transform import Transform

Limit: TypeAlias = Annotated[int | None, Whole(optional=True)]


class SkipState(NamedTuple):
    """The state of `skip_if_nonfinite`."""

    skipped: Scalar  # updates that were skipped so far, of all parameters together
    in_a_row: Scalar  # those with a number that is not finite since the last without, skipped or not
    inner: Any  # the state of the transform

    @classmethod
    def init(cls, params: list[Tensor], inner: Any) -> SkipState:
        """Before the first update."""
        return cls(counter(params), counter(params), inner)


@forwards(lambda arguments: True)
@nested(SkipState, passes=True, sparse="rows")
def skip_if_nonfinite(
    gs: list[Tensor],
    s: SkipState,
    ps: list[Tensor],
    transform: Inner,
    *,
    max_consecutive: Annotated[int | None, Whole(optional=True)] = None,
) -> tuple[list[Tensor], SkipState]:
    r"""Skip an update if any number of any gradient is infinite or NaN: no parameter moves, and no state changes.

    .. math::
        u_t, s_t = \begin{cases} \mathrm{transform}(g_t, s_{t-1}, p_{t-1}) & \text{if all } g_t \text{ are finite} \\
            0,\; s_{t-1} & \text{else} \end{cases}

    All parameters are skipped together; under `torch.func.vmap` each member of the batch on its own. An accelerator is not
    waited for. `SkipState.skipped` counts what was skipped, and `SkipState.in_a_row` how many gradients in a row were not
    finite: a loop may look at them from time to time (with the stateful optimizer they are ``optimizer.shared["skipped"]`` and
    ``["in_a_row"]``).

    Gradients that are None do not count, nor do those that can reach neither a parameter nor a state, because the parameter is
    frozen: with `freeze`, with a part of a `partition` that is `set_to_zero`, or with `set_to_zero` under a mask after
    transforms that keep no state. A transform with a state before `set_to_zero` would keep the NaN, and a gradient that
    `masked` leaves out passes through to its parameter: both count.

    Around `accumulate` each of the gradients that it adds up is looked at, within it only their sum.

    Args:
        transform: any transform.
        max_consecutive: when more gradients than this in a row are not finite they are let through, so that the parameters
            show what is wrong; None to skip however many there are.

    >>> import torch, purestep as ps
    >>> opt, p = ps.skip_if_nonfinite(ps.sgd(lr=0.1, momentum=0.9)), torch.tensor([1.0, 2.0])
    >>> state = opt.init_state(p)
    >>> for g in ([1.0, 1.0], [float("nan"), 1.0], [1.0, 1.0]):
    ...     p, state = opt.step(torch.tensor(g), state, p)
    ...     print(p, int(state.skipped))
    tensor([0.9000, 1.9000]) 0
    tensor([0.9000, 1.9000]) 1
    tensor([0.7100, 1.7100]) 1

    Reference: the rule is that of optax's `apply_if_finite
    <https://optax.readthedocs.io/en/latest/api/transformations.html#optax.apply_if_finite>`_, whose
    ``total_notfinite`` also counts what was let through.
    """
    good = finite(transform.received(gs))
    row = where(good, 0.0, s.in_a_row + 1)
    taken = good if max_consecutive is None else good | (row > max_consecutive)
    us, inner = transform.when(taken, gs, s.inner, ps)
    return us, SkipState(where(taken, s.skipped, s.skipped + 1), row, inner)


class AccumulateState(NamedTuple):
    """The state of `accumulate`."""

    step: Scalar  # updates of the transform so far
    mini_step: Scalar  # gradients since the last of them
    acc: list[Tensor]  # their mean so far (each a k-th), or their sum
    inner: Any  # the state of the transform

    @classmethod
    def init(cls, params: list[Tensor], inner: Any) -> AccumulateState:
        """Before the first update."""
        return cls(counter(params), counter(params), [zeros_like(p) for p in params], inner)


@forwards(lambda arguments: True)
@nested(AccumulateState, passes=True, sparse="dense", elementwise=True, name="accumulate")
def _accumulate(
    gs: list[Tensor], s: AccumulateState, ps: list[Tensor], transform: Inner, k: Any, *, average: bool
) -> tuple[list[Tensor], AccumulateState]:
    """`accumulate`, without the check of its arguments."""
    steps: Any = k(s.step) if callable(k) else k
    t = s.mini_step + 1
    full = transform.read(t >= steps)
    acc = transform.plus(s.acc, gs, steps if average else 1)
    us, inner = transform.when(full, acc, s.inner, ps)
    if full is True:
        acc = transform.emptied(acc, (us, inner))
    elif full is not False:
        acc = select(full, [zeros_like(a) for a in acc], acc)
    return us, AccumulateState(where(full, s.step + 1, s.step), where(full, 0.0, t), acc, inner)


def accumulate(transform: Transform, k: int | Callable[[Any], Any], *, average: bool = True) -> Transform:
    r"""Add up `k` gradients, and make one update with them: a large batch in small parts.

    .. math::
        a_j &= a_{j-1} + \frac{g_j}{k}, \qquad a_0 = 0, \qquad j = 1 \dots k \\
        u_j, s_j &= \begin{cases} \mathrm{transform}(a_k, s_{j-1}, p_{j-1}) & j = k \\ 0,\; s_{j-1} & j < k \end{cases}

    Between two real updates the parameters keep every bit, and so does the inner state; schedules inside count real updates
    only. What stands before or after it in a chain acts at every call. State and parameters can be saved anywhere in
    between: the gradients that were added up are part of the state.

    All parameters are updated together. One whose gradient is None when the others are updated waits for the next time with
    what it has; and `average` divides by `k` however many of its gradients were None, as one backward pass of the sum would.

    Args:
        transform: any transform.
        k: how many gradients; at least 1. Or a function of the number of real updates so far, a 0-d tensor.
        average: take the mean of the gradients, else their sum.

    Raises:
        ValueError: `k` is less than 1.
        TypeError: `k` is neither a whole number nor a function.

    >>> import torch, purestep as ps
    >>> opt, p = ps.accumulate(ps.sgd(lr=0.1), 2), torch.tensor([1.0])
    >>> state = opt.init_state(p)
    >>> for g in (1.0, 3.0, 5.0, 7.0):
    ...     p, state = opt.step(torch.tensor([g]), state, p)
    ...     print(p, int(state.step))
    tensor([1.]) 0
    tensor([0.8000]) 1
    tensor([0.8000]) 1
    tensor([0.2000]) 2

    The numbers are those of optax's `MultiSteps
    <https://optax.readthedocs.io/en/latest/api/transformations.html#optax.MultiSteps>`_, but for rounding: it keeps a running
    mean. Reference: Goyal et al., `Accurate, Large Minibatch SGD <https://arxiv.org/abs/1706.02677>`_, 2017.
    """
    if not callable(k):
        check_steps(k, "accumulate: k", Whole(low=1))
    return _accumulate(transform, k, average=average)


class LookaheadState(NamedTuple):
    """The state of `lookahead`."""

    steps_since_sync: Scalar  # updates of the fast weights since the slow ones moved
    slow: list[Tensor]  # the slow weights
    inner: Any  # the state of the transform

    @classmethod
    def init(cls, params: list[Tensor], inner: Any) -> LookaheadState:
        """Before the first update."""
        return cls(counter(params), [p.clone() for p in params], inner)

    def averaged(self) -> Any:
        """The slow weights; see `purestep.eval_params`."""
        return self.slow


@forwards(lambda arguments: True)
@nested(LookaheadState, moves=True, elementwise=True)
def lookahead(
    gs: list[Tensor], s: LookaheadState, ps: list[Tensor], transform: Inner, k: Period = 5, alpha: UnitInterval = 0.5
) -> tuple[list[Tensor], LookaheadState]:
    r"""`k` steps forward, one step back: the parameters explore, and slow weights follow every `k`-th update.

    .. math::
        \theta_j &= \theta_{j-1} + \mathrm{transform}(g_j), \qquad j = 1 \dots k \\
        \phi &\leftarrow \phi + \alpha\,(\theta_k - \phi), \qquad \theta_0 \leftarrow \phi

    `params` are the fast weights :math:`\theta`, the slow ones :math:`\phi` are in the state. Evaluate the slow ones: read them
    with `purestep.eval_params` (with the stateful optimizer with its method `eval_params`, or as
    ``optimizer.state[p]["slow"]``). The state of the inner transform is kept when the weights meet, as in the paper's
    algorithm. It stands at the end of a chain, around all of it that moves parameters.

    Args:
        transform: a whole optimizer, with its learning rate.
        k: how many updates the fast weights make alone; at least 1.
        alpha: :math:`\alpha`, the step of the slow weights, in [0, 1].

    >>> import torch, purestep as ps
    >>> opt, p = ps.lookahead(ps.sgd(lr=0.1), k=2), torch.tensor([1.0])
    >>> state = opt.init_state(p)
    >>> for _ in range(3):
    ...     p, state = opt.step(torch.tensor([1.0]), state, p)
    ...     print(p, ps.eval_params(state, p))
    tensor([0.9000]) tensor([1.])
    tensor([0.9000]) tensor([0.9000])
    tensor([0.8000]) tensor([0.9000])

    Reference: Zhang et al., `Lookahead Optimizer: k steps forward, 1 step back <https://arxiv.org/abs/1907.08610>`_, 2019.
    """
    fast, inner = transform.step(gs, s.inner, ps, donate=True)
    t = s.steps_since_sync + 1
    sync = transform.read(t >= k)
    if sync is False:
        return fast, LookaheadState(t, s.slow, inner)
    slow = [lerp(x, p, alpha).to(p.dtype) for x, p in zip(s.slow, fast)]
    new = LookaheadState(where(sync, 0.0, t), select(sync, slow, s.slow), inner)
    return select(sync, [x.clone() for x in slow], fast), new


class ConditionallyState(NamedTuple):
    """The state of `conditionally`."""

    step: Scalar  # updates so far, of the transform or not
    inner: Any  # the state of the transform

    @classmethod
    def init(cls, params: list[Tensor], inner: Any) -> ConditionallyState:
        """Before the first update."""
        return cls(counter(params), inner)


@forwards(lambda arguments: arguments["otherwise"] == "zero")
@nested(ConditionallyState, passes=True, sparse="rows", elementwise=True, name="conditionally")
def _conditionally(
    us: list[Tensor], s: ConditionallyState, ps: list[Tensor], predicate: Any, transform: Inner, *, otherwise: str
) -> tuple[list[Tensor], ConditionallyState]:
    """`conditionally`, without the check of its arguments."""
    new, inner = transform.when(predicate(s.step), us, s.inner, ps, us if otherwise == "pass" else None)
    return new, ConditionallyState(s.step + 1, inner)


def conditionally(predicate: Callable[[Any], Any], transform: Transform, *, otherwise: str = "pass") -> Transform:
    r"""Apply a transform at some of the steps.

    .. math::
        u_t, s_t = \begin{cases} \mathrm{transform}(u_t, s_{t-1}, p_{t-1}) & \text{if } \mathrm{predicate}(t - 1) \\
            u_t \text{ or } 0,\; s_{t-1} & \text{else} \end{cases}

    At the other steps the updates pass through as they came (optax's ``conditionally_transform``), which is meant for a part
    of a chain; or, with ``otherwise="zero"``, nothing moves (optax's ``conditionally_mask``), which is meant for a whole
    optimizer. The state of the transform is left as it is, and schedules inside count only the steps at which it acts.
    For a choice by gradients or parameters write a transform of your own, with `nested`.

    Args:
        predicate: a function of the 0-based number of the update, a 0-d tensor, that returns a bool or a 0-d tensor of one.
        transform: any transform.
        otherwise: what becomes of the updates at the other steps: ``"pass"`` or ``"zero"``.

    Raises:
        TypeError: `predicate` is not a function.
        ValueError: `otherwise` is something else.

    >>> import torch, purestep as ps
    >>> warm = ps.conditionally(lambda step: step < 1, ps.clip_by_global_norm(1.0))
    >>> opt, p = ps.chain(warm, ps.sgd(lr=0.1)), torch.tensor([0.0, 0.0])
    >>> state = opt.init_state(p)
    >>> for _ in range(2):
    ...     u, state = opt.update(torch.tensor([3.0, 4.0]), state, p)
    ...     print(u)
    tensor([-0.0600, -0.0800])
    tensor([-0.3000, -0.4000])
    """
    if not callable(predicate) or isinstance(predicate, Transform):
        raise TypeError(f"conditionally takes a function of the step and a transform, but its predicate is {predicate!r}.")
    if otherwise not in ("pass", "zero"):
        raise ValueError(f"conditionally: otherwise must be 'pass' or 'zero', but got {otherwise!r}.")
    return _conditionally(predicate, transform, otherwise=otherwise)
