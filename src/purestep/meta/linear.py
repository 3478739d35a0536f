"""Linear equations :math:`A x = b` on pytrees, given the function :math:`x \\mapsto A x`.

What `implicit` solves for its derivatives. Each member of a batch under `torch.func.vmap` converges on its own, and stands
still then. Options are given with `functools.partial`: ``solve=partial(purestep.meta.solve_cg, maxiter=20)``.

Where `maxiter` was not enough there is a `ConvergenceWarning`, also inside of `torch.func`, for as long as values can be read;
what is traced by `torch.compile` or ``make_fx`` can only tell by the `SolveInfo` that ``return_info=True`` asks for.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from purestep._core import maths, tree
from purestep._core.torch_api import DisableFuncTorch, dispatch_mode_count, get_unwrapped, is_wrapped

PyTree = Any
MatVec = Callable[[PyTree], PyTree]


class ConvergenceWarning(UserWarning):
    """A linear equation was not solved to the precision that was asked for."""


class SolveInfo(NamedTuple):
    """How well a linear equation was solved."""

    residual: Tensor
    r"""The relative residual :math:`\lVert b - A x \rVert / \lVert b \rVert`, a 0-d tensor; 0 where :math:`b = 0`. Of
    `solve_normal_cg` it is that of the normal equations, of `solve_neumann` that without the last term."""
    converged: Tensor
    """Whether that is at most `tol`, a 0-d tensor of a bool."""


@overload
def solve_cg(
    matvec: MatVec,
    b: PyTree,
    *,
    ridge: float = 0.0,
    maxiter: int = 100,
    tol: float = 1e-10,
    return_info: Literal[False] = False,
) -> PyTree: ...
@overload
def solve_cg(
    matvec: MatVec, b: PyTree, *, ridge: float = 0.0, maxiter: int = 100, tol: float = 1e-10, return_info: Literal[True]
) -> tuple[PyTree, SolveInfo]: ...
def solve_cg(
    matvec: MatVec, b: PyTree, *, ridge: float = 0.0, maxiter: int = 100, tol: float = 1e-10, return_info: bool = False
) -> Any:
    r"""Conjugate gradients, for a symmetric positive definite :math:`A`, such as the Hessian at a minimum.

    .. math::
        \alpha_k &= \frac{r_k^\top r_k}{d_k^\top A d_k}, \qquad x_{k+1} = x_k + \alpha_k d_k, \qquad
        r_{k+1} = r_k - \alpha_k A d_k \\
        d_{k+1} &= r_{k+1} + \frac{r_{k+1}^\top r_{k+1}}{r_k^\top r_k}\,d_k, \qquad x_0 = 0, \quad d_0 = r_0 = b

    Where :math:`d_k^\top A d_k = 0` there is no next step, and it ends.

    Args:
        matvec: :math:`x \mapsto A x`.
        b: the right-hand side, any pytree of tensors.
        ridge: adds so much of the identity to :math:`A`.
        maxiter: at most so many products with :math:`A`; in exact arithmetic as many as there are numbers suffice.
        tol: it is solved when :math:`\lVert r \rVert \le` `tol` :math:`\lVert b \rVert`. With 0, `maxiter` products are all
            that is asked for, and nothing is warned of.
        return_info: return ``(x, SolveInfo)``, and do not warn.

    Returns:
        the solution, a pytree of the structure of `b`; with `return_info`, ``(x, SolveInfo)``.

    Raises:
        TypeError: a leaf of `b` is not a tensor.
        ValueError: a product with :math:`A` has another structure than `b`, or another shape.

    Warns:
        ConvergenceWarning: it was not solved after `maxiter` products.

    >>> import torch, purestep as ps
    >>> ps.meta.solve_cg(lambda x: 2 * x, torch.tensor([1.0, 3.0]))
    tensor([0.5000, 1.5000])
    >>> x, info = ps.meta.solve_cg(lambda x: 0 * x, torch.tensor([1.0, 3.0]), return_info=True)
    >>> x, info.residual, info.converged
    (tensor([0., 0.]), tensor(1., dtype=torch.float64), tensor(False))

    Reference: Hestenes & Stiefel, `Methods of conjugate gradients for solving linear systems
    <https://doi.org/10.6028/jres.049.044>`_, 1952.
    """
    return conjugate_gradients(matvec, b, ridge, maxiter, tol, "solve_cg" if not return_info else None)


def conjugate_gradients(matvec: MatVec, b: PyTree, ridge: float, maxiter: int, tol: float, name: str | None) -> Any:
    """What `solve_cg` computes; under a name for warnings, or with its information."""
    r, spec = tree.flatten(b)
    check_numbers(r, spec)

    def product(d: list[Tensor]) -> list[Tensor]:
        found = image_of(matvec, d, spec)
        return [y + ridge * x for x, y in zip(d, found)] if ridge else found

    x, d = [torch.zeros_like(y) for y in r], r
    square = first = maths.inner(r, r)
    goal = tol**2 * square
    going = square > goal
    for _ in range(maxiter):
        if not maths.some(going):
            break
        image = product(d)
        curvature = maths.inner(d, image)
        going = going & (curvature != 0)
        alpha = torch.where(going, square / torch.where(curvature == 0, 1.0, curvature), 0.0)
        x = [along(y, alpha, z) for y, z in zip(x, d)]
        r = [along(y, -alpha, z) for y, z in zip(r, image)]
        new = maths.inner(r, r)
        beta = torch.where(going, new / torch.where(square == 0, 1.0, square), 0.0)
        d, square = [along(y, beta, z) for y, z in zip(r, d)], new
        going = going & (square > goal)
    return solved(tree.unflatten(x, spec), square, first, tol, maxiter, name)


@overload
def solve_normal_cg(
    matvec: MatVec,
    b: PyTree,
    *,
    ridge: float = 0.0,
    maxiter: int = 100,
    tol: float = 1e-10,
    return_info: Literal[False] = False,
) -> PyTree: ...
@overload
def solve_normal_cg(
    matvec: MatVec, b: PyTree, *, ridge: float = 0.0, maxiter: int = 100, tol: float = 1e-10, return_info: Literal[True]
) -> tuple[PyTree, SolveInfo]: ...
def solve_normal_cg(
    matvec: MatVec, b: PyTree, *, ridge: float = 0.0, maxiter: int = 100, tol: float = 1e-10, return_info: bool = False
) -> Any:
    r"""Conjugate gradients on :math:`(A^\top A + \rho I)\,x = A^\top b`, for any :math:`A`.

    It needs no symmetry, but twice the products, and the condition number is squared. All else is as in `solve_cg`.

    Args:
        matvec: :math:`x \mapsto A x`. It is differentiated, for the products with :math:`A^\top`.
        b: the right-hand side, any pytree of tensors.
        ridge: :math:`\rho`, added to the diagonal of :math:`A^\top A`.
        maxiter: as in `solve_cg`, of the equation above.
        tol: as in `solve_cg`, of the equation above.
        return_info: as in `solve_cg`.

    Returns:
        the solution, a pytree of the structure of `b`; with `return_info`, ``(x, SolveInfo)``.

    Raises:
        TypeError: a leaf of `b` is not a tensor.

    >>> import torch, purestep as ps
    >>> ps.meta.solve_normal_cg(lambda x: torch.stack([x[1], -2 * x[0]]), torch.tensor([1.0, 4.0]))
    tensor([-2.0000,  1.0000])
    """
    leaves, spec = tree.flatten(b)
    check_numbers(leaves, spec)
    _, transposed = torch.func.vjp(matvec, b)  # type: ignore[misc]  # of a linear function, wherever it is taken
    name = "solve_normal_cg" if not return_info else None
    return conjugate_gradients(lambda x: transposed(matvec(x))[0], transposed(b)[0], ridge, maxiter, tol, name)


@overload
def solve_neumann(
    matvec: MatVec,
    b: PyTree,
    *,
    alpha: float = 1.0,
    maxiter: int = 100,
    tol: float = 1e-10,
    return_info: Literal[False] = False,
) -> PyTree: ...
@overload
def solve_neumann(
    matvec: MatVec, b: PyTree, *, alpha: float = 1.0, maxiter: int = 100, tol: float = 1e-10, return_info: Literal[True]
) -> tuple[PyTree, SolveInfo]: ...
def solve_neumann(
    matvec: MatVec, b: PyTree, *, alpha: float = 1.0, maxiter: int = 100, tol: float = 1e-10, return_info: bool = False
) -> Any:
    r"""The Neumann series :math:`x = \alpha \sum_k (I - \alpha A)^k\,b`, for :math:`\lVert I - \alpha A \rVert < 1`.

    With few terms it is the derivative through the last steps of gradient descent with the learning rate :math:`\alpha`;
    for a fixed point of a contraction :math:`T` it is :math:`\sum_k (\partial T)^k\,b`.

    Args:
        matvec: :math:`x \mapsto A x`.
        b: the right-hand side, any pytree of tensors.
        alpha: :math:`\alpha`.
        maxiter: the number of terms beyond the first.
        tol: it is solved when a term is at most `tol` :math:`\lVert b \rVert` long. With 0, these terms are all that is asked
            for, and nothing is warned of.
        return_info: return ``(x, SolveInfo)``, and do not warn.

    Returns:
        the solution, a pytree of the structure of `b`; with `return_info`, ``(x, SolveInfo)``.

    Raises:
        TypeError: a leaf of `b` is not a tensor.
        ValueError: a product with :math:`A` has another structure than `b`, or another shape.

    Warns:
        ConvergenceWarning: it was not solved with `maxiter` terms.

    >>> import torch, purestep as ps
    >>> ps.meta.solve_neumann(lambda x: 2 * x, torch.tensor([1.0, 3.0]), alpha=0.25)
    tensor([0.5000, 1.5000])

    Reference: Lorraine, Vicol & Duvenaud, `Optimizing Millions of Hyperparameters by Implicit Differentiation
    <https://arxiv.org/abs/1911.02590>`_, 2020.
    """
    term, spec = tree.flatten(b)
    check_numbers(term, spec)
    x = term
    square = first = maths.inner(term, term)
    goal = tol**2 * first
    for _ in range(maxiter):
        going = square > goal
        if not maths.some(going):
            break
        image = image_of(matvec, term, spec)
        after = [t - alpha * y for t, y in zip(term, image)]
        x = [torch.where(going, y + t, y) for y, t in zip(x, after)]
        term = [torch.where(going, t, y) for t, y in zip(after, term)]
        square = maths.inner(term, term)  # a term is what is left of the right-hand side after those before it
    x = [alpha * y for y in x]
    return solved(tree.unflatten(x, spec), square, first, tol, maxiter, "solve_neumann" if not return_info else None)


def solved(x: PyTree, square: Tensor, first: Tensor, tol: float, maxiter: int, name: str | None) -> Any:
    """A solution: with its information, or, under a name, with a warning if it is none."""
    zero = first == 0
    residual = torch.where(zero, square, square / torch.where(zero, 1.0, first)).sqrt()
    converged = square <= tol**2 * first
    if name is None:
        return x, SolveInfo(residual, converged)
    if tol > 0 and not torch.compiler.is_compiling() and not dispatch_mode_count() and maths.some(~converged):
        warnings.warn(
            f"{name} did not converge in maxiter={maxiter}: the residual is {largest(residual):.2g} of the right-hand side, "
            f"which is above tol={tol:g}, so the solution is not to be trusted. Check that the matrix is regular, and of the "
            "kind that this solver is for; else give it more iterations, or a ridge. return_info=True returns the residual in "
            "place of this warning; tol=0 asks for no more than maxiter iterations.",
            ConvergenceWarning,
            stacklevel=3,
        )
    return x


def largest(x: Tensor) -> float:
    """The largest number of all members of a batch."""
    while is_wrapped(x):
        x = get_unwrapped(x)
    with DisableFuncTorch():
        return float(x.detach().max())


def image_of(matvec: MatVec, x: list[Tensor], spec: tree.Spec) -> list[Tensor]:
    """A x, which must be of the form of `x`."""
    found = tree.flatten_like(matvec(tree.unflatten(x, spec)), spec, "the products with A", "the right-hand sides")
    for path, y, z in zip(spec.paths(), found, x):
        if y.shape != z.shape:
            raise ValueError(
                f"A must be square, but a right-hand side of shape {tuple(z.shape)} at {tree.quote(path)} has a product "
                f"with it of shape {tuple(y.shape)}."
            )
    return found


def along(x: Tensor, t: Tensor, d: Tensor) -> Tensor:
    """x + t d, in the dtype of `x`."""
    return (x + t * d).to(x.dtype)


def check_numbers(leaves: list[Any], spec: tree.Spec) -> None:
    """Refuse a right-hand side that is not all tensors."""
    for path, x in zip(spec.paths(), leaves):
        if not isinstance(x, Tensor):
            raise TypeError(f"The right-hand side of a linear equation must be tensors, but {tree.quote(path)} is {x!r}.")
