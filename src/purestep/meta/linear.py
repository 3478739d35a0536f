"""Linear equations :math:`A x = b` on pytrees, given the function :math:`x \\mapsto A x`.

What `implicit` solves for its derivatives. Each member of a batch under `torch.func.vmap` converges on its own, and stands
still then. Options are given with `functools.partial`: ``solve=partial(purestep.meta.solve_cg, maxiter=20)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from purestep import maths, tree

PyTree = Any
MatVec = Callable[[PyTree], PyTree]


def solve_cg(matvec: MatVec, b: PyTree, *, ridge: float = 0.0, maxiter: int = 100, tol: float = 1e-10) -> PyTree:
    r"""Conjugate gradients, for a symmetric positive definite :math:`A`, such as the Hessian at a minimum.

    .. math::
        \alpha_k &= \frac{r_k^\top r_k}{d_k^\top A d_k}, \qquad x_{k+1} = x_k + \alpha_k d_k, \qquad
        r_{k+1} = r_k - \alpha_k A d_k \\
        d_{k+1} &= r_{k+1} + \frac{r_{k+1}^\top r_{k+1}}{r_k^\top r_k}\,d_k, \qquad x_0 = 0, \quad d_0 = r_0 = b

    Args:
        matvec: :math:`x \mapsto A x`.
        b: the right-hand side, any pytree of tensors.
        ridge: adds so much of the identity to :math:`A`.
        maxiter: at most so many products with :math:`A`; in exact arithmetic as many as there are numbers suffice.
        tol: it is solved when :math:`\lVert r \rVert \le` `tol` :math:`\lVert b \rVert`.

    >>> import torch, purestep as ps
    >>> ps.meta.solve_cg(lambda x: 2 * x, torch.tensor([1.0, 3.0]))
    tensor([0.5000, 1.5000])

    Reference: Hestenes & Stiefel, `Methods of conjugate gradients for solving linear systems
    <https://doi.org/10.6028/jres.049.044>`_, 1952.
    """
    r, spec = tree.flatten(b)
    check_numbers(r, spec)

    def product(d: list[Tensor]) -> list[Tensor]:
        found = image_of(matvec, d, spec)
        return [y + ridge * x for x, y in zip(d, found)] if ridge else found

    x, d = [torch.zeros_like(y) for y in r], r
    square = maths.inner(r, r)
    goal = tol**2 * square
    for _ in range(maxiter):
        going = square > goal
        if not maths.some(going):
            break
        image = product(d)
        curvature = maths.inner(d, image)
        alpha = torch.where(going, square / torch.where(curvature == 0, 1.0, curvature), 0.0)
        x = [along(y, alpha, z) for y, z in zip(x, d)]
        r = [along(y, -alpha, z) for y, z in zip(r, image)]
        new = maths.inner(r, r)
        beta = torch.where(going, new / torch.where(square == 0, 1.0, square), 0.0)
        d, square = [along(y, beta, z) for y, z in zip(r, d)], new
    return tree.unflatten(x, spec)


def solve_normal_cg(matvec: MatVec, b: PyTree, *, ridge: float = 0.0, maxiter: int = 100, tol: float = 1e-10) -> PyTree:
    r"""Conjugate gradients on :math:`(A^\top A + \rho I)\,x = A^\top b`, for any :math:`A`.

    It needs no symmetry, but twice the products, and the condition number is squared.

    >>> import torch, purestep as ps
    >>> ps.meta.solve_normal_cg(lambda x: torch.stack([x[1], -2 * x[0]]), torch.tensor([1.0, 4.0]))
    tensor([-2.0000,  1.0000])
    """
    leaves, spec = tree.flatten(b)
    check_numbers(leaves, spec)
    _, transposed = torch.func.vjp(matvec, b)  # type: ignore[misc]  # of a linear function, wherever it is taken
    return solve_cg(lambda x: transposed(matvec(x))[0], transposed(b)[0], ridge=ridge, maxiter=maxiter, tol=tol)


def solve_neumann(matvec: MatVec, b: PyTree, *, alpha: float = 1.0, maxiter: int = 100, tol: float = 1e-10) -> PyTree:
    r"""The Neumann series :math:`x = \alpha \sum_k (I - \alpha A)^k\,b`, for :math:`\lVert I - \alpha A \rVert < 1`.

    With few terms it is the derivative through the last steps of gradient descent with the learning rate :math:`\alpha`;
    for a fixed point of a contraction :math:`T` it is :math:`\sum_k (\partial T)^k\,b`.

    Args:
        matvec: :math:`x \mapsto A x`.
        b: the right-hand side, any pytree of tensors.
        alpha: :math:`\alpha`.
        maxiter: the number of terms beyond the first.
        tol: it is solved when a term is at most `tol` :math:`\lVert b \rVert` long.

    >>> import torch, purestep as ps
    >>> ps.meta.solve_neumann(lambda x: 2 * x, torch.tensor([1.0, 3.0]), alpha=0.25)
    tensor([0.5000, 1.5000])

    Reference: Lorraine, Vicol & Duvenaud, `Optimizing Millions of Hyperparameters by Implicit Differentiation
    <https://arxiv.org/abs/1911.02590>`_, 2020.
    """
    term, spec = tree.flatten(b)
    check_numbers(term, spec)
    x = term
    goal = tol**2 * maths.inner(term, term)
    for _ in range(maxiter):
        going = maths.inner(term, term) > goal
        if not maths.some(going):
            break
        image = image_of(matvec, term, spec)
        term = [torch.where(going, t - alpha * y, 0.0) for t, y in zip(term, image)]
        x = [y + t for y, t in zip(x, term)]
    return tree.unflatten([alpha * y for y in x], spec)


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
