"""L-BFGS: quasi-Newton steps from the last few changes of the gradient (Liu & Nocedal, 1989).

Each update makes up to `max_iter` iterations, and evaluates the function as often as they need. They are written as a
machine that goes on by one evaluation at a time, `advance`: whoever still searches along its direction is given the next
trial point by `search`, and whoever has found a point goes there and is given its next direction by `begin`. So each member
of a batch is where it is alone, and those that have finished stand still.

What decides is a *number* or a *flag*: Python's own where values can be read, which makes the ordinary call fast, and
0-dimensional tensors where they cannot: inside `torch.func`, or when anything is to be differentiated. The text is one: a
choice is a `where`, and `some` leaves out what nobody needs.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from purestep._core import sharded
from purestep._core.hyper import Extra, Hyper, NonNegative, Steps
from purestep._core.maths import counter, maximum, minimum, precise, root, some, transforming, where
from purestep._core.plain import plain
from purestep._core.primitives import unrolls
from purestep._engine.run import choose
from purestep._executors.flat_buffer import joined, offset
from purestep._optimizer.checkpoint import check_number, shown
from purestep._optimizer.mirror import over
from purestep._optimizer.optimizer import Optimizer, Params
from purestep._optimizer.shared import NOTHING, Place
from purestep.declare import whole

Number: TypeAlias = Any  # a float, or a 0-d tensor
Flag: TypeAlias = Any  # a bool, or a 0-d tensor of one
Vector: TypeAlias = Annotated[Tensor, "vector"]  # all parameters, one after the other; complex ones as pairs of reals
Stored: TypeAlias = Annotated[Tensor, "number"]  # a 0-d tensor


class LBFGSState(NamedTuple):
    """The state of `lbfgs`. A vector is all parameters, one after the other; complex ones as pairs of reals."""

    func_evals: Stored  # evaluations so far
    n_iter: Stored  # iterations so far
    d: Vector  # the last direction
    t: Stored  # how far it was followed
    old_dirs: tuple[Vector, ...]  # y: changes of the gradient, the newest last; at most history_size
    old_stps: tuple[Vector, ...]  # s: the steps that made them
    ro: tuple[Stored, ...]  # 1 / y's; 0 for an entry that a member of a batch does not have
    H_diag: Stored  # the inverse Hessian that the history corrects, as a number
    prev_flat_grad: Vector  # the gradient where the last iteration began; NaN where it was None
    prev_loss: Stored  # the loss there

    @classmethod
    def init(cls, params: list[Tensor]) -> LBFGSState:
        """Before the first update."""
        whole = [torch.empty(p.shape, dtype=p.dtype, device=p.device) if sharded.is_sharded(p) else p for p in params]
        count, none = counter(params[0]), torch.zeros_like(flat(whole))
        zero = torch.zeros((), dtype=precise(none.device), device=none.device)
        return cls(count, count, none, zero, (), (), (), torch.ones_like(zero, dtype=none.dtype), none, zero)


Layout: TypeAlias = list[tuple[int, bool]]
"""For each part of a vector of the state, how many numbers it has, and whether their gradient is not None."""


class Point(NamedTuple):
    """A point on the line along the direction."""

    t: Number  # how far along
    f: Number  # the loss
    slope: Number  # g'd


class History(NamedTuple):
    """The inverse Hessian: what the state keeps under longer names."""

    y: tuple[Vector, ...]
    s: tuple[Vector, ...]
    ro: tuple[Number, ...]
    scale: Number


UNROLLED = 8
"""Up to this many evaluations are written out in the graph of `torch.compile`."""

NO_HISTORY = History((), (), (), 1.0)


class Machine(NamedTuple):
    """Where an update stands between two evaluations."""

    going: Flag
    x: list[Tensor]  # the iterate
    g: Vector  # the gradient there
    d: Vector  # the direction
    reach: Number  # its largest element, in absolute value
    t: Number  # the trial is x + t d
    start: Point  # the iterate
    low: Point  # the last trial, until there is a bracket; then its better end
    low_g: Vector  # the gradient there
    high: Point  # the other end
    swapped: Flag  # whether the better end came into the bracket after the other
    zooming: Flag  # whether there is a bracket
    stuck: Flag  # whether the last trial was close to an end
    tries: Number  # trials before this one, along this direction
    history: History
    total: Number  # iterations since the state began
    iterations: Number  # of this update
    evaluations: Number  # of this update


class Rules(NamedTuple):
    """The arguments of `lbfgs`, and how a number is made of a tensor."""

    lr: Number
    max_iter: int
    max_eval: int
    tolerance_grad: Number
    tolerance_change: Number
    history_size: int
    wolfe: bool
    number: Callable[[Any], Number]


def is_long(arguments: Mapping[str, Any]) -> bool:
    """Whether an update may take so many evaluations that `torch.compile` should not write them out."""
    a = arguments
    most = max(1, a["max_iter"] * 5 // 4 if a["max_eval"] is None else a["max_eval"])
    return (most + 1 if a["line_search_fn"] else min(a["max_iter"], max(most, 2))) > UNROLLED


@unrolls(is_long)
@whole(LBFGSState, moves=True)
def lbfgs(
    gs: list[Tensor],
    s: LBFGSState,
    ps: list[Tensor],
    lr: NonNegative = 1.0,
    max_iter: Steps = 20,
    max_eval: int | None = None,
    tolerance_grad: Hyper = 1e-7,
    tolerance_change: Hyper = 1e-9,
    history_size: Steps = 100,
    line_search_fn: str | None = None,
    *,
    maximize: bool = False,
    value_and_grad: Extra,
) -> tuple[list[Tensor], LBFGSState]:
    r"""Limited-memory BFGS: quasi-Newton steps, for a loss without noise. Each update makes many of them.

    .. math::
        d_k &= -H_k\,g_k, \qquad x_{k+1} = x_k + t_k d_k \\
        H_{k+1} &= (I - \rho_k s_k y_k^\top)\,H_k\,(I - \rho_k y_k s_k^\top) + \rho_k s_k s_k^\top \\
        s_k &= x_{k+1} - x_k, \qquad y_k = g_{k+1} - g_k, \qquad \rho_k = \frac{1}{y_k^\top s_k}

    of which only the last `history_size` pairs :math:`s, y` are kept, on top of :math:`\frac{s^\top y}{y^\top y} I` with the
    newest pair. A pair with :math:`y^\top s \le 10^{-10}` is left out, so that :math:`H` stays positive definite.
    All parameters are one vector, complex ones as pairs of reals, and their dtypes are promoted to one.

    The step :math:`t_k` is `lr`, but for the very first, :math:`t_0 = \min(1, 1/\lVert g_0 \rVert_1)` times `lr`. With
    ``line_search_fn="strong_wolfe"`` that is only where the search for a step begins that satisfies

    .. math::
        f(x + t d) \le f(x) + 10^{-4}\,t\,g^\top d, \qquad \lvert g(x + t d)^\top d \rvert \le 0.9\,\lvert g^\top d \rvert.

    An update is over when it has made `max_iter` iterations or `max_eval` evaluations, when no element of the gradient is
    larger than `tolerance_grad`, or when a step changes no parameter by more than `tolerance_change`, or the loss by less;
    the next one goes on from there, with the history it finds. Under `torch.func.vmap` each member of the batch does so on
    its own, and stands still until the last one is done.

    It asks for `value_and_grad` at each `update` and `step`: a function from parameters to the loss and the gradients
    (of an optimizer of `purestep.optim` it is the closure). The first evaluation is at `params` itself, so of `grads` it only
    matters where they are None.

    A parameter whose gradient is None keeps every bit, and the update is that of the others alone: in the vectors of the state
    there are zeros in its place. Where other gradients are None than in the last update that moved, the history is forgotten
    and the update begins as the very first, because the changes of the gradient that were kept are not those of one function.
    Under an optimizer of `purestep.optim` a gradient that is None is 0, as in torch, and the history may move its parameter.

    `torch.compile` leaves a step of more than 8 evaluations out of its graph, and refuses it where there must be one graph: it
    would write every iteration out (20 with a line search are 14,000 operations, and 25,000 in the second step, because the
    history has grown). Compile the loss instead, ``value_and_grad=torch.compile(value_and_grad)``.

    The numbers are those of `torch.optim.LBFGS`, and so are the evaluations. The line search computes in float64, where torch
    does so in the dtype of the parameters. An update may go one evaluation beyond `max_eval`, as in torch.

    Args:
        lr: the step, or the first trial of the line search.
        max_iter: iterations per update.
        max_eval: evaluations per update; by default 5/4 of `max_iter`.
        tolerance_grad: for the largest element of the gradient. A negative one is never met.
        tolerance_change: for changes of the parameters and the loss. A negative one is never met.
        history_size: how many pairs are kept; the state grows up to twice as many vectors. With 0 the steps are those of
            Barzilai & Borwein.
        line_search_fn: ``"strong_wolfe"``, or None for no line search.
        maximize: climb instead of descending: what is minimized is minus the loss, in the state as well.

    Raises:
        RuntimeError: an unknown `line_search_fn`.
        ValueError: the parameters are not those that the state was made for, or `value_and_grad` gives no gradient where
            `grads` have one.

    >>> import torch, purestep as ps
    >>> def rosenbrock(p):
    ...     return (1 - p[0]) ** 2 + 100 * (p[1] - p[0] ** 2) ** 2
    >>> def value_and_grad(p):
    ...     grad, value = torch.func.grad_and_value(rosenbrock)(p)
    ...     return value, grad
    >>> opt, p = ps.lbfgs(line_search_fn="strong_wolfe"), torch.tensor([-1.2, 1.0])
    >>> state = opt.init_state(p)
    >>> for _ in range(2):
    ...     p, state = opt.step(torch.func.grad(rosenbrock)(p), state, p, value_and_grad=value_and_grad)
    >>> p, int(state.n_iter)
    (tensor([1.0000, 1.0000]), 35)

    References: Liu & Nocedal, `On the limited memory BFGS method for large scale optimization
    <https://doi.org/10.1007/BF01589116>`_, 1989; Nocedal & Wright, *Numerical Optimization*, 2nd ed., 2006, algorithms 3.5, 3.6
    and 7.4; the safeguards of the line search are those of `minFunc <https://www.cs.ubc.ca/~schmidtm/Software/minFunc.html>`_.
    """
    check_line_search(line_search_fn)
    most = max(1, max_iter * 5 // 4 if max_eval is None else max_eval)

    def evaluate(x: list[Tensor]) -> tuple[Tensor, Tensor]:
        loss, grads = value_and_grad(x)
        return (-loss, -flat(grads)) if maximize else (loss, flat(grads))

    loss, g = evaluate(ps)
    layout = value_and_grad.layout or [(g.numel(), True)]
    if sum([n for n, _ in layout]) != s.d.numel():
        raise ValueError(
            f"lbfgs keeps one history of all parameters together: its state is for {s.d.numel()} numbers, but the "
            f"parameters have {sum([n for n, _ in layout])}. Make a new state with init_state."
        )
    hypers = [x for x in (lr, tolerance_grad, tolerance_change) if isinstance(x, Tensor)]
    readable = choose(None, ps, [g, s.d, s.prev_flat_grad, *s.old_dirs, *s.old_stps, *s.ro], hypers) == "program"

    def number(x: Any) -> Number:
        if readable:
            return x.item() if isinstance(x, Tensor) else x
        return x.to(precise(x.device)) if isinstance(x, Tensor) else x

    rules = Rules(
        number(lr), max_iter, most, number(tolerance_grad), number(tolerance_change),
        min(history_size, len(s.ro) + max_iter), line_search_fn is not None, number,
    )  # fmt: skip
    here = Point(0.0, number(s.prev_loss), 0.0)
    changed = differs(s.prev_flat_grad, layout)
    changed = bool(changed) if readable else changed
    before, d = (shortened(x, layout) for x in (s.prev_flat_grad, s.d))
    history = History(
        tuple([shortened(y, layout) for y in s.old_dirs]),
        tuple([shortened(x, layout) for x in s.old_stps]),
        tuple(map(number, s.ro)),
        number(s.H_diag),
    )
    total = number(s.n_iter)
    if some(changed):  # nothing is left out, so that there is no pair of what has changed since the last update
        d, before, total = where(changed, 0.0, d), where(changed, 0.0, before), where(changed, 0, total)
        ro = tuple([where(changed, 0.0, x) for x in history.ro])
        history = NO_HISTORY if changed is True else history._replace(ro=ro, scale=where(changed, 1.0, history.scale))
    m = Machine(
        going=no(largest(g, number) <= rules.tolerance_grad) & (max_iter > 0),
        x=ps,
        g=before,
        d=d,
        reach=0.0,
        t=number(s.t),
        start=here,
        low=here,
        low_g=g,
        high=here,
        swapped=False,
        zooming=False,
        stuck=False,
        tries=0,
        history=history,
        total=total,
        iterations=0,
        evaluations=1,
    )

    def stored(x: Number, like: Tensor) -> Tensor:
        return x.to(like.dtype) if isinstance(x, Tensor) else torch.full((), x, dtype=like.dtype, device=like.device)

    def state(m: Machine) -> LBFGSState:
        y, steps, ro, scale = m.history
        if ro and readable:
            ro = torch.tensor(ro, dtype=g.dtype, device=g.device).unbind()  # at once: there may be a hundred
        return LBFGSState(
            stored(s.func_evals + m.evaluations, s.func_evals), stored(s.n_iter + m.iterations, s.n_iter),
            lengthened(m.d, layout), stored(m.t, s.t),
            tuple([lengthened(x, layout) for x in y]), tuple([lengthened(x, layout) for x in steps]),
            tuple([stored(x, g) for x in ro]), stored(scale, g),
            where(m.iterations > 0, lengthened(m.g, layout, math.nan), s.prev_flat_grad), stored(m.start.f, s.prev_loss),
        )  # fmt: skip

    if some(m.going):
        m = begin(m, number(loss), g, m.going, rules)
    for _ in range(most if rules.wolfe else min(max_iter, max(most, 2)) - 1):  # more there cannot be
        if not some(m.going):
            break
        trial = move(m.x, where(m.going, m.t, 0.0), m.d)
        if readable:
            try:
                loss, g = evaluate(trial)
            except BaseException as error:
                error.progress = state(m)  # type: ignore[attr-defined]  # with this an optimizer can go on from the trial
                raise
        else:
            loss, g = evaluate(trial)
        m = advance(m, trial, number(loss), g, rules)
    return list(m.x), state(m)


def check_line_search(name: str | None) -> None:
    """Refuse a line search that there is not."""
    if name not in (None, "strong_wolfe"):
        raise RuntimeError(f"only 'strong_wolfe' is supported as line_search_fn, or None, but got {name!r}.")


def begin(m: Machine, f: Number, g: Tensor, now: Flag, rules: Rules) -> Machine:
    """`now` an iteration begins at `m.x`, where the loss is `f` and the gradient `g`: a direction, and a first trial."""
    number = rules.number
    y, s = g - m.g, m.d * narrow(m.t, m.d)  # what the last step changed; nothing, before the first
    ys = number(y.dot(s))
    h = m.history
    keep = now & (ys > 1e-10)
    if some(keep):
        ys = where(keep, ys, 1.0)
        h = History(
            push(h.y, y, keep, rules.history_size),
            push(h.s, s, keep, rules.history_size),
            push(h.ro, trimmed(1.0 / ys, g), keep, rules.history_size),
            where(keep, trimmed(ys / where(keep, number(y.dot(y)), 1.0), g), h.scale),
        )
    d = where(now, newton(g, h, number), m.d)
    start = pick(now, Point(0.0, f, number(g.dot(d))), m.start)
    t = rules.lr
    first = now & (m.total == 0)
    if some(first):
        t = where(first, number(1.0 / g.abs().sum().clamp_min(1.0) * narrow(t, g)), t)
    m = m._replace(
        going=m.going & no(now & (start.slope > -rules.tolerance_change)),
        g=where(now, g, m.g),
        d=d,
        reach=where(now, largest(d, number), m.reach),
        t=where(now, t, m.t),
        start=start,
        low=pick(now, start, m.low),
        low_g=where(now, g, m.low_g),
        swapped=m.swapped & no(now),
        zooming=m.zooming & no(now),
        stuck=m.stuck & no(now),
        tries=where(now, 0, m.tries),
        history=h,
        total=where(now, m.total + 1, m.total),
        iterations=where(now, m.iterations + 1, m.iterations),
    )
    last = m.going & now & (m.iterations >= rules.max_iter)
    if not rules.wolfe and some(last):  # it goes there, and does not look
        m = m._replace(x=select(last, move(m.x, m.t, m.d), m.x), going=m.going & no(last))
    return m


def newton(g: Tensor, h: History, number: Callable[[Any], Number]) -> Tensor:
    """Minus the inverse Hessian times the gradient, by the two loops of Nocedal & Wright's algorithm 7.4."""
    q = -g
    a: list[Number] = []
    for y, s, ro in zip(reversed(h.y), reversed(h.s), reversed(h.ro)):
        a.append(trimmed(number(s.dot(q)) * ro, q))
        q = plus(q, -a[-1], y)
    q = q * narrow(h.scale, q) if isinstance(h.scale, Tensor) else q.mul_(h.scale)
    for y, s, ro in zip(h.y, h.s, h.ro):
        q = plus(q, a.pop() - trimmed(number(y.dot(q)) * ro, q), s)
    return q


def advance(m: Machine, trial: list[Tensor], f: Number, g: Tensor, rules: Rules) -> Machine:
    """Go on, with the loss and gradient at the trial point."""
    m = m._replace(evaluations=where(m.going, m.evaluations + 1, m.evaluations))
    if rules.wolfe:
        m, found = search(m, Point(m.t, f, rules.number(g.dot(m.d))), g, rules)
        found, t, f, g = m.going & found, m.low.t, m.low.f, m.low_g
    else:
        found, t = m.going, m.t
    if not some(found):
        return m
    stop = (
        (m.iterations >= rules.max_iter)
        | (m.evaluations >= rules.max_eval)
        | (largest(g, rules.number) <= rules.tolerance_grad)
        | (m.reach * abs(t) <= rules.tolerance_change)
        | (abs(f - m.start.f) < rules.tolerance_change)
    )
    if rules.wolfe:
        trial = move(m.x, t, m.d)  # the best may not be the last; and what the function did to its argument does not count here
    m = m._replace(x=select(found, trial, m.x), t=where(found, t, m.t), going=m.going & no(found & stop))
    again = found & m.going
    return begin(m, f, g, again, rules) if some(again) else m


def search(m: Machine, new: Point, g: Tensor, rules: Rules) -> tuple[Machine, Flag]:
    """The strong Wolfe line search, after one trial: there is another to be made, or `low` is found.

    Nocedal & Wright's algorithm 3.5 until there is a bracket, then 3.6, with the safeguards of minFunc and torch.
    """
    c1, c2 = 1e-4, 0.9
    start, before = m.start, m.low
    last = m.evaluations > rules.max_eval
    late = last & no(m.zooming)  # for a bracket: this trial, or back to the start
    low, low_g = pick(late, start, before), where(late, m.g, m.low_g)
    worse = new.f > trimmed(start.f + c1 * new.t * start.slope, g)
    worse = worse | ((m.zooming | (m.tries > 1)) & (new.f >= before.f))
    flatter = abs(new.slope) <= -c2 * start.slope
    satisfied = flatter & no(worse) & no(late)
    bracketed = late | (no(m.zooming) & (worse | (no(flatter) & (new.slope >= 0))))
    zooming = m.zooming | bracketed

    # the trial becomes an end of the bracket; of two ends with the same loss, the one that came first is the better
    contest = bracketed | (m.zooming & worse)
    better = where(m.swapped, new.f <= low.f, no(low.f <= new.f))
    rises = better | no(contest)  # the trial is the better end now; if it has passed it, what was is the other end
    falls = rises & (contest | (new.slope * (m.high.t - low.t) >= 0))
    low, low_g, high = pick(rises, new, low), where(rises, g, low_g), pick(falls, low, pick(rises, m.high, new))
    found = satisfied | last | (zooming & (abs(high.t - low.t) * m.reach < rules.tolerance_change))

    t, stuck = m.t, m.stuck
    if some(m.going & no(found)):
        a, b = pick(zooming, low, before), pick(zooming, high, new)
        shortest = where(zooming, minimum(a.t, b.t), new.t + 0.01 * (new.t - a.t))
        longest = where(zooming, maximum(a.t, b.t), 10 * new.t)
        t = minimum_of_cubic(a, b, shortest, longest)
        # two trials close to an end, or one at it: a tenth of the bracket away from the end
        tenth = 0.1 * (longest - shortest)
        close = zooming & (minimum(longest - t, t - shortest) < tenth)
        away = close & (stuck | (t >= longest) | (t <= shortest))
        t = where(away, where(abs(t - longest) < abs(t - shortest), longest - tenth, shortest + tenth), t)
        stuck = close & no(away)
    m = m._replace(
        t=where(m.going, t, m.t),
        low=low,
        low_g=low_g,
        high=high,
        swapped=m.swapped ^ (contest & better),
        zooming=zooming,
        stuck=stuck,
        tries=m.tries + 1,
    )
    return m, found


def minimum_of_cubic(a: Point, b: Point, shortest: Number, longest: Number) -> Number:
    """Where the cubic through two points, with their slopes, is least; the middle if it has no minimum."""
    forward = a.t <= b.t
    near, far = pick(forward, a, b), pick(forward, b, a)
    width = far.t - near.t
    # divided as torch divides by a tensor, so that the last bit is torch's
    d1 = near.slope + far.slope - 3 * (near.f - far.f) * (1.0 / where(width == 0, -1.0, near.t - far.t))
    square = d1 * d1 - near.slope * far.slope
    real = square >= 0
    d2 = root(where(real, square, 1.0))
    t = far.t - width * divide(far.slope + d2 - d1, far.slope - near.slope + 2 * d2)
    return where(real, minimum(maximum(t, shortest), longest), (shortest + longest) / 2.0)


# ----------------------------------------------------------------------------------------------------- numbers and flags


def no(flag: Flag) -> Flag:
    return flag ^ True


def divide(x: Number, y: Number) -> Number:
    """x / y as floating-point numbers are divided by zero, which Python refuses; with slope 0 there."""
    zero = y == 0
    limit = where(x > 0, math.inf, where(x < 0, -math.inf, math.nan))
    return where(zero, limit, x / where(zero, 1.0, y))


def trimmed(x: Number, like: Tensor) -> Number:
    """A number in the precision of a vector's elements, in which torch computes it: no finer decrease of a loss is seen."""
    if isinstance(x, Tensor):
        return x.to(like.dtype).to(x.dtype)
    if like.dtype == torch.float64:
        return x
    return ctypes.c_float(x).value if like.dtype == torch.float32 else torch.tensor(x, dtype=like.dtype).item()


def pick(flag: Flag, a: Point, b: Point) -> Point:
    """`where` for points."""
    return Point(where(flag, a.t, b.t), where(flag, a.f, b.f), where(flag, a.slope, b.slope))


# --------------------------------------------------------------------------------------------------------------- vectors


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """All of them as one new vector."""
    dense = list(tensors)
    if not all([x.layout is torch.strided for x in dense]):
        dense = [x if x.layout is torch.strided else x.to_dense() for x in dense]
    if any([dtype.is_complex for dtype in {x.dtype for x in dense}]):
        dense = [torch.view_as_real(x.resolve_conj()) if x.is_complex() else x for x in dense]
    if not plain(dense):
        dense = [sharded.whole(x) for x in dense]
    return torch.cat([x.reshape(-1) for x in dense]) if transforming() or not plain(dense) else joined(dense)


def move(x: list[Tensor], t: Number, d: Tensor) -> list[Tensor]:
    """x + t d."""
    if not isinstance(t, Tensor) and plain(x) and all([p.dtype is d.dtype and p.is_contiguous() for p in x]):
        return offset(x, d, t)
    moved = []
    start = 0
    for p in x:
        r = torch.view_as_real(p) if p.is_complex() else p
        step = sharded.spread(d[start : start + r.numel()].view(r.shape), r)
        start += r.numel()
        r = (r + narrow(t, d) * step if isinstance(t, Tensor) else torch.add(r, step, alpha=t)).to(r.dtype)
        moved.append(torch.view_as_complex(r) if p.is_complex() else r)
    return moved


def differs(previous: Tensor, layout: Layout) -> Any:
    """Whether other gradients are None than in the gradient where the last iteration began, as a 0-d tensor."""
    if all([there for _, there in layout]):
        return previous.isnan().any()
    parts = zip(torch.split(previous.isnan(), [n for n, _ in layout]), layout)
    return torch.stack([part.any() if there else ~part.all() for part, (_, there) in parts]).any()


def shortened(x: Tensor, layout: Layout) -> Tensor:
    """A vector of the state without the numbers whose gradient is None."""
    if all([there for _, there in layout]):
        return x
    return torch.cat([part for part, (_, there) in zip(torch.split(x, [n for n, _ in layout]), layout) if there])


def lengthened(x: Tensor, layout: Layout, value: float = 0.0) -> Tensor:
    """`shortened` undone, with a value in the place of the numbers whose gradient is None."""
    if all([there for _, there in layout]):
        return x
    parts = iter(torch.split(x, [n for n, there in layout if there]))
    return torch.cat([next(parts) if there else x.new_full((n,), value) for n, there in layout])


def select(flag: Flag, xs: list[Tensor], ys: list[Tensor]) -> list[Tensor]:
    """`where` for lists."""
    if isinstance(flag, bool):
        return xs if flag else ys
    return [where(flag, x, y) for x, y in zip(xs, ys)]


def plus(x: Tensor, k: Number, y: Tensor) -> Tensor:
    """x + k y; in the memory of x, which must be the caller's own, where nothing looks on."""
    return x + narrow(k, x) * y if isinstance(k, Tensor) else x.add_(y, alpha=k)


def largest(x: Tensor, number: Callable[[Any], Number]) -> Number:
    """The largest absolute value: one pass, where x.abs().max() is three."""
    low, high = torch.aminmax(x)
    return maximum(number(high), -number(low))


def narrow(k: Number, x: Tensor) -> Number:
    """A number that does not promote `x`."""
    return k.to(x.dtype) if isinstance(k, Tensor) else k


def push(window: tuple[Any, ...], x: Any, keep: Flag, size: int) -> tuple[Any, ...]:
    """The window with `x` at its end, and at most `size` long.

    A member of a batch that does not `keep` it has its entries where they were, with a zero in front if the window has grown.
    """
    longer = (*window, x)
    if isinstance(keep, Tensor):
        longer = tuple([where(keep, a, b) for a, b in zip(longer, (torch.zeros_like(x), *window))])
    return longer[len(longer) - min(size, len(longer)) :]


class LBFGS(Optimizer):
    """`torch.optim.LBFGS`: same signature, same numbers, same checkpoints. The mathematics is `purestep.lbfgs`'s.

    All parameters are in one group, and `step` needs a closure.
    """

    @over(lbfgs)
    def __init__(
        self, params: Params, lr: Hyper = 1, max_iter: int = 20, max_eval: int | None = None, tolerance_grad: float = 1e-7,
        tolerance_change: float = 1e-9, history_size: int = 100, line_search_fn: str | None = None, *, maximize: bool = False,
    ) -> None: ...  # fmt: skip

    def _begin(
        self,
        params: Params,
        recipe: Any,
        options: Mapping[str, Any],
        flags: dict[str, Any],
        defaults: Mapping[str, Any] = NOTHING,
    ) -> None:
        check_line_search(options["line_search_fn"])
        if options["max_eval"] is None:
            options = {**options, "max_eval": options["max_iter"] * 5 // 4}  # a number, as in torch's groups
        super()._begin(params, recipe, options, flags)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """The first group is the only one.

        Args:
            param_group: a dict with all parameters, under ``"params"``.

        Raises:
            ValueError: there is one already.
        """
        if self.param_groups:
            raise ValueError("LBFGS doesn't support per-parameter options (parameter groups)")
        super().add_param_group(param_group)

    # torch keeps the state of all parameters under the first one, and begins it with the first evaluation

    def _begin_state(self, groups: list[dict[str, Any]]) -> None:
        for group in groups:
            self.state[group["params"][0]]  # an entry: torch's distributed checkpoints would take a step to have one

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._begin_state(self.param_groups)

    def _finish(self, saved: dict[str, Any]) -> None:
        saved["state"] = {k: x for k, x in saved["state"].items() if not (isinstance(x, dict) and not x)}
        first = saved["param_groups"][0]["params"][0]
        state = saved["state"].get(first, {})
        if "func_evals" not in state:
            return
        own = {name: x for name, x in state.items() if name not in LBFGSState._fields}
        began: dict[str, Any] = {}
        if not state["func_evals"]:
            pass
        elif not state["n_iter"]:
            began = {name: int(state[name]) for name in ("func_evals", "n_iter")}
        else:
            began = {n: list(x) if isinstance(x, tuple) else x for n, x in state.items() if n in LBFGSState._fields}
            began |= {name: int(state[name]) for name in ("func_evals", "n_iter")}
            began |= {name: state[name].item() for name in ("t", "prev_loss")}
            began["prev_flat_grad"] = state["prev_flat_grad"].clone()  # torch will overwrite it
            began["al"] = [None] * self.param_groups[0]["history_size"]  # torch's scratch space
        saved["state"][first] = {**began, **own}
        if not saved["state"][first]:
            del saved["state"][first]

    def _new_place(self) -> Place:
        return Place("", frozenset(LBFGSState._fields))

    def _check_shared(self, shared: Mapping[str, Any]) -> None:
        if not shared:
            return
        params = self.param_groups[0]["params"]
        lost = [name for name in LBFGSState._fields if name not in shared]
        if lost and (shared.get("n_iter") or "n_iter" not in shared):
            raise ValueError(f"The loaded state has no {lost[0]!r}, which lbfgs needs: it is another algorithm's.")
        sizes = [(p.numel() * (1 + p.is_complex()), p.requires_grad) for p in params]
        needed = {sum([n for n, _ in sizes]), sum([n for n, learned in sizes if learned])}
        for name in [name for name in LBFGSState._fields if name in shared]:
            several, whose = name in ("old_dirs", "old_stps", "ro"), f"The loaded state's {name!r}"
            if several and not isinstance(shared[name], (list, tuple)):
                raise ValueError(f"{whose} must be a list, as lbfgs needs it, but is {shown(shared[name])}.")
            for x in shared[name] if several else (shared[name],):
                if name not in ("d", "prev_flat_grad", "old_dirs", "old_stps"):
                    check_number(x.reshape(()) if isinstance(x, Tensor) and x.numel() == 1 else x, whose, "lbfgs", params[0])
                elif not isinstance(x, Tensor) or x.dim() != 1 or x.numel() not in needed:
                    found = f"of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"that is no tensor but {shown(x)}"
                    raise ValueError(
                        f"The loaded state has {name!r} {found}, but lbfgs needs shape {(max(needed),)}, that of all "
                        "parameters as one vector. Load a checkpoint of the same model."
                    )

    def _restored(self, shared: Mapping[str, Any]) -> dict[str, Any]:
        params = self.param_groups[0]["params"]
        self.state[params[0]].pop("al", None)
        fresh = LBFGSState.init(params)._asdict()
        likes = {"old_dirs": fresh["d"], "old_stps": fresh["d"], "ro": fresh["H_diag"]}

        def like(x: Any, y: Tensor) -> Tensor:
            return torch.as_tensor(x, dtype=y.dtype, device=y.device).reshape(y.shape).clone()  # torch will overwrite its own

        for name, x in shared.items():
            if name in fresh:
                fresh[name] = tuple([like(y, likes[name]) for y in x]) if name in likes else like(x, fresh[name])
        return fresh
