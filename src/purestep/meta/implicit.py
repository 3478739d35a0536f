r"""Implicit differentiation: the derivatives of a solution, from the equation that it solves.

Where :math:`F(x^*, \theta) = 0` determines :math:`x^*(\theta)`, the implicit function theorem gives

.. math:: \frac{\partial x^*}{\partial \theta} =
    -\Bigl(\frac{\partial F}{\partial x}\Bigr)^{-1} \frac{\partial F}{\partial \theta}

at the solution, however it was found: a training loop of a thousand steps, L-BFGS, another library. Nothing of the way there
is kept. One linear equation is solved for a gradient, however many hyperparameters there are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from purestep._core import tree
from purestep._core.populations import detach
from purestep._core.torch_api import tree_flatten, tree_unflatten
from purestep.meta.attach import Rule, attach, exchanged, pullback, pushforward, watched
from purestep.meta.linear import solve_cg, solve_normal_cg
from purestep.meta.outside import constants_of

PyTree = Any
Solver: TypeAlias = Callable[..., Any]
LinearSolver: TypeAlias = Callable[[Callable[[PyTree], PyTree], PyTree], PyTree]
Residual: TypeAlias = Callable[[list[Tensor], list[Tensor]], list[Tensor]]
"""F(x, theta), in flat lists."""


def implicit(
    solver: Solver, stationarity: Callable[..., PyTree], *, solve: LinearSolver = solve_cg, has_aux: bool = False
) -> Solver:
    r"""`solver`, with the derivatives of the minimum that it finds.

    .. math:: x^* = \arg\min_x f(x, \theta), \qquad \nabla_x f(x^*, \theta) = 0, \qquad
        \frac{\partial x^*}{\partial \theta} = -(\nabla^2_{xx} f)^{-1}\,\nabla^2_{x\theta} f

    The result is called as the solver is, ``solver(init, *args, **kwargs)``, and can be differentiated in either direction and
    any number of times, batched, and nested. Its derivatives are with respect to `args` and `kwargs`, pytrees, and to whatever
    `stationarity` closes over; with respect to `init` they are 0. They are as exact as the solution is: the solver is to be run
    until it has converged.

    Args:
        solver: ``(init, *args, **kwargs) -> x``, a pytree of the structure of `init`. Nothing in it is differentiated. It may
            train a `torch.nn.Parameter` with ``loss.backward()`` and any optimizer of torch.optim: `torch.func` refuses that
            where it is called, and so the solver is called once more, outside of all `torch.func.grad` and the like, with plain
            tensors. A `torch.func.vmap` cannot be left: to be batched it is to be made of `torch.func.grad` and
            `Transform.step`. What a solver depends on is best handed over as an argument: ``backward()`` adds to the ``grad``
            of a leaf that it closes over, as in any loop.
        stationarity: ``(x, *args, **kwargs) ->`` what is 0 at the solution, a pytree like `x`. For a loss it is
            ``torch.func.grad(loss)``. It takes what the solver takes; an option of the solver's alone is given to it by
            `functools.partial`.
        solve: how to solve :math:`A u = v` given :math:`u \mapsto A u`; see `solve_cg`, `solve_normal_cg`, `solve_neumann`.
            The default is for minima. For saddle points and other roots see `custom_root`.
        has_aux: the solver returns ``(x, aux)``; `aux` is handed on as it is, without derivatives.

    Returns:
        a function that is called as `solver` is, and returns what it returns.

    Raises:
        ValueError: what `stationarity` returns has another structure than the solution, or other shapes.
        RuntimeError: a solver that calls ``backward()`` is batched by `torch.func.vmap`.

    >>> import torch, purestep as ps
    >>> def loss(x, theta):
    ...     return ((x - theta) ** 2).sum() + (x**2).sum()
    >>> def gradient_descent(x, theta):
    ...     for _ in range(50):
    ...         x = x - 0.1 * torch.func.grad(loss)(x, theta)
    ...     return x
    >>> minimum = ps.meta.implicit(gradient_descent, torch.func.grad(loss))
    >>> torch.func.jacrev(minimum, 1)(torch.zeros(2), torch.tensor([1.0, 2.0]))  # the minimum is theta / 2
    tensor([[0.5000, 0.0000],
            [0.0000, 0.5000]])

    A solver that is written as training loops are:

    >>> def by_lbfgs(init, theta):
    ...     x = torch.nn.Parameter(init.clone())
    ...     optimizer = torch.optim.LBFGS([x], line_search_fn="strong_wolfe")
    ...     def closure():
    ...         optimizer.zero_grad()
    ...         value = loss(x, theta)
    ...         value.backward()
    ...         return value
    ...     optimizer.step(closure)
    ...     return x
    >>> minimum = ps.meta.implicit(by_lbfgs, torch.func.grad(loss))
    >>> torch.func.jacrev(lambda theta: minimum(torch.zeros(2), theta=theta))(torch.tensor([1.0, 2.0]))
    tensor([[0.5000, 0.0000],
            [0.0000, 0.5000]])

    Reference: Blondel et al., `Efficient and Modular Implicit Differentiation <https://arxiv.org/abs/2105.15183>`_, 2022.
    """

    @functools.wraps(solver)
    def solved(init: PyTree, /, *args: PyTree, **kwargs: PyTree) -> Any:
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "torch.compile cannot trace implicit differentiation. Compile the solver and the optimality function instead, "
                "and leave the derivative outside."
            )
        result = constants_of(solver, (init, *args), kwargs)
        aux = None
        if has_aux:
            if not isinstance(result, tuple) or len(result) != 2:
                raise TypeError(f"With has_aux=True the solver must return (x, aux), but it returned {tree.described(result)}.")
            result, aux = result
        x = rooted(detach(result), args, kwargs, stationarity, solve)
        return (x, detach(aux)) if has_aux else x

    return solved


def custom_root(
    optimality: Callable[..., PyTree], *, solve: LinearSolver = solve_normal_cg, has_aux: bool = False
) -> Callable[[Solver], Solver]:
    r"""Decorate a solver of :math:`F(x, \theta) = 0` with the derivatives of the root that it finds.

    As `implicit`, but :math:`\partial F / \partial x` need not be symmetric.

    Args:
        optimality: :math:`F`, ``(x, *args, **kwargs) ->`` a pytree like `x` that is 0 at the root.
        solve: as in `implicit`.
        has_aux: as in `implicit`.

    Returns:
        a decorator for a solver ``(init, *args, **kwargs) -> x``, as in `implicit`, which is called as before.

    >>> import torch, purestep as ps
    >>> @ps.meta.custom_root(lambda x, a: x**2 - a)
    ... def square_root(x, a):
    ...     for _ in range(10):
    ...         x = (x + a / x) / 2
    ...     return x
    >>> torch.func.grad(square_root, 1)(torch.tensor(1.0), torch.tensor(4.0))
    tensor(0.2500)
    """
    return lambda solver: implicit(solver, optimality, solve=solve, has_aux=has_aux)


def custom_fixed_point(
    fixed_point: Callable[..., PyTree], *, solve: LinearSolver = solve_normal_cg, has_aux: bool = False
) -> Callable[[Solver], Solver]:
    r"""Decorate a solver of :math:`x = T(x, \theta)` with the derivatives of the fixed point that it finds.

    Args:
        fixed_point: :math:`T`, ``(x, *args, **kwargs) -> x``.
        solve: as in `implicit`. Where :math:`T` is a contraction, `solve_neumann` sums its powers.
        has_aux: as in `implicit`.

    Returns:
        a decorator for a solver ``(init, *args, **kwargs) -> x``, as in `implicit`, which is called as before.

    >>> import torch, purestep as ps
    >>> @ps.meta.custom_fixed_point(lambda x, a: torch.cos(a * x), solve=ps.meta.solve_neumann)
    ... def iterate(x, a):
    ...     for _ in range(100):
    ...         x = torch.cos(a * x)
    ...     return x
    >>> torch.func.grad(iterate, 1)(torch.tensor(1.0), torch.tensor(1.0))  # -x sin(x) / (1 + sin(x))
    tensor(-0.2975)
    """

    def difference(x: PyTree, /, *args: PyTree, **kwargs: PyTree) -> PyTree:
        leaves, spec = tree.flatten(x)
        moved = tree.flatten_like(fixed_point(x, *args, **kwargs), spec, "the values of T", "its arguments")
        return tree.unflatten([p - q for p, q in zip(leaves, moved)], spec)

    return custom_root(difference, solve=solve, has_aux=has_aux)


# ----------------------------------------------------------------------------------------------------------- the theorem


class Equation(NamedTuple):
    """F(x, theta) = 0, and how its linear equations are solved, which are made of lists put together by `spec`."""

    residual: Residual
    solve: LinearSolver
    spec: tree.Spec


def rooted(
    x: PyTree,
    args: tuple[PyTree, ...],
    kwargs: dict[str, PyTree],
    optimality: Callable[..., PyTree],
    solve: LinearSolver,
) -> PyTree:
    """A solution, as a function of everything that `optimality` depends on but for itself."""
    leaves, spec = tree.flatten(x)
    for path, p in zip(spec.paths(), leaves):
        if not isinstance(p, Tensor) or not (p.is_floating_point() or p.is_complex()):
            got = p.dtype if isinstance(p, Tensor) else repr(p)
            raise TypeError(f"A solution must be floating-point tensors, but {tree.quote(path)} is {got}.")
    flat, arguments = tree_flatten((args, kwargs))
    places = [k for k, y in enumerate(flat) if isinstance(y, Tensor)]
    given = detach([y for y in flat if isinstance(y, Tensor)])

    def residual(x: list[Tensor], theta: Sequence[Tensor]) -> list[Tensor]:
        filled = list(flat)
        for k, y in zip(places, theta):
            filled[k] = y
        positional, named = tree_unflatten(filled, arguments)
        found = optimality(tree.unflatten(x, spec), *positional, **named)
        return like_solution(found, x, spec)

    with watched((leaves, given)) as watch:
        result = residual(leaves, given)
    watch.refuse_unseen(result, "The optimality function")
    del result  # and with it what was recorded on the way
    inside = watch.found(leaves)
    count = len(places)

    def full(x: list[Tensor], theta: list[Tensor]) -> list[Tensor]:
        if not inside:
            return residual(x, theta)
        with exchanged(inside, theta[count:]):
            return residual(x, theta[:count])

    sources = [flat[k] for k in places] + inside
    return tree.unflatten(attach(leaves, sources, theorem(Equation(full, solve, spec))), spec)


def like_solution(found: PyTree, x: list[Tensor], spec: tree.Spec) -> list[Tensor]:
    """What an optimality function returned, if it has the form of the solution."""
    if isinstance(found, Tensor) and not found.dim() and (spec.size != 1 or x[0].dim()):
        raise ValueError(
            "The optimality function must return what is 0 at the solution, in the structure of the solution, but it returned "
            "one number. For a loss give its gradient, torch.func.grad(loss)."
        )
    leaves = tree.flatten_like(found, spec, "the values of the optimality function", "the solutions")
    for path, y, p in zip(spec.paths(), leaves, x):
        if y.shape != p.shape:
            raise ValueError(
                f"What the optimality function returns must have the solution's shapes, but at {tree.quote(path)} it has "
                f"{tuple(y.shape)} instead of {tuple(p.shape)}."
            )
    return leaves


def theorem(equation: Equation) -> Rule:
    """The derivatives of a root."""

    def pull(x: list[Tensor], theta: list[Tensor], cotangents: list[Tensor]) -> list[Tensor | None]:
        u = solution(equation, x, theta, cotangents, transposed=True)
        found = pullback(lambda theta: equation.residual(x, theta), theta, u)
        return [y if y is None else -y for y in found]

    def push(x: list[Tensor], theta: list[Tensor], tangents: list[Tensor]) -> list[Tensor]:
        moved = pushforward(lambda theta: equation.residual(x, theta), theta, tangents)
        return [-y for y in solution(equation, x, theta, moved, transposed=False)]

    return Rule(pull, push)


def solution(equation: Equation, x: list[Tensor], theta: list[Tensor], v: list[Tensor], transposed: bool) -> list[Tensor]:
    r"""u with :math:`A u = v` (or :math:`A^\top u = v`), where :math:`A = \partial F / \partial x`.

    It is a root too, of a linear function, and has derivatives as any other: so there are second ones, and all the others.
    """
    residual, solve, spec = equation
    n = len(x)

    def product(u: list[Tensor], x: list[Tensor], theta: list[Tensor]) -> list[Tensor]:
        if transposed:
            return pullback(lambda x: residual(x, theta), x, u)
        return pushforward(lambda x: residual(x, theta), x, u)

    def linear(u: list[Tensor], given: list[Tensor]) -> list[Tensor]:
        image = product(u, given[:n], given[n : len(given) - n])
        return [y - z for y, z in zip(image, given[len(given) - n :])]

    fixed_x, fixed_theta, fixed_v = detach((x, theta, v))
    if transposed:
        _, back = torch.func.vjp(lambda *x: tuple(residual(list(x), fixed_theta)), *fixed_x)  # type: ignore[misc]

        def matvec(u: PyTree) -> PyTree:
            return tree.unflatten(list(back(tuple(tree.flatten_like(u, spec, "u")))), spec)
    else:

        def matvec(u: PyTree) -> PyTree:
            return tree.unflatten(product(tree.flatten_like(u, spec, "u"), fixed_x, fixed_theta), spec)

    u = detach(
        tree.flatten_like(
            solve(matvec, tree.unflatten(fixed_v, spec)), spec, "the solutions of the linear equation", "its sides"
        )
    )
    return attach(u, [*x, *theta, *v], theorem(Equation(linear, solve, spec)))
