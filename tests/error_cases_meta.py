"""Wrong calls, one for each message that purestep raises: those of `purestep.meta`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import purestep as ps
from purestep import meta

X = torch.ones(2)


def squares(p: Tensor, b: Tensor) -> Tensor:
    return ((p - b) ** 2).sum()


def unroll(**options: Any) -> Any:
    """Three steps, if nothing is wrong."""
    return meta.unroll(**{"opt": ps.sgd(0.1), "loss": squares, "params": X, "batches": torch.ones(3, 2), **options})


def es(function: Any = torch.sum, point: Any = X, **options: Any) -> Any:
    return meta.es_grad(function, **options)(point)


def implicit(solver: Any = lambda x, a: a.clone(), optimality: Any = lambda x, a: x - a, **options: Any) -> Any:
    return meta.implicit(solver, optimality, **options)(torch.zeros(2), X)


def trained(t: Tensor) -> Tensor:
    """What training leads to, on a loss that closes over a tensor."""
    return meta.unroll(ps.sgd(0.1), lambda p: (p**2 * t).sum(), X, 2, checkpoint_every=1).params.sum()


def inner_gradient(t: Tensor) -> Tensor:
    """The same, on a loss that takes a derivative by what it closes over."""
    return meta.unroll(
        ps.sgd(0.1), lambda p: torch.func.grad(lambda y: (p**2 * y**3).sum())(t).sum(), X, 2, checkpoint_every=1
    ).params.sum()


def unseen(*, leaf: bool) -> Any:
    """A loss that closes over a tensor in a way that nothing of torch's is told of."""
    t = torch.ones(2, requires_grad=True)
    t = t if leaf else t * 2

    def loss(p: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            u = t * 2
        return (p * u).sum()

    return meta.unroll(ps.sgd(0.1), loss, X, 2, checkpoint_every=1)


def backward(x: Tensor, a: Tensor) -> Tensor:
    """A solver of torch's kind."""
    p = x.detach().clone().requires_grad_()
    ((p - a) ** 2).sum().backward()
    return p.detach()


def while_compiling(call: Callable[[], Any]) -> Any:
    with mock.patch("torch.compiler.is_compiling", return_value=True):
        return call()


CASES: dict[str, Callable[[], Any]] = {
    "forward over forward": lambda: torch.func.jacfwd(torch.func.jacfwd(trained))(X),
    "a tensor that nobody sees": lambda: unseen(leaf=True),
    "a computed tensor that nobody sees": lambda: unseen(leaf=False),
    "reverse over reverse": lambda: torch.func.jacrev(torch.func.jacrev(inner_gradient))(X),
    "no samples": lambda: es(num_samples=0),
    "no randomness": lambda: es(randomness="none"),
    "several deviations": lambda: es(sigma=X),
    "a deviation of zero": lambda: es(sigma=0.0),
    "a function of es_grad without aux": lambda: es(has_aux=True),
    "a function of es_grad with several values": lambda: es(lambda x: x),
    "a function of es_grad in words": lambda: es(lambda x: "low"),
    "integers that are to be perturbed": lambda: es(point=[torch.ones(2, dtype=torch.long)]),
    "a number that is to be perturbed": lambda: es(point=[1.0]),
    "nothing to perturb": lambda: es(point=[]),
    "implicit, compiled": lambda: while_compiling(implicit),
    "a solver without aux": lambda: implicit(has_aux=True),
    "a solution that is a number": lambda: implicit(lambda x, a: 1.0),
    "a loss in place of its gradient": lambda: implicit(optimality=lambda x, a: x.sum()),
    "an optimality function of another structure": lambda: implicit(optimality=lambda x, a: {"a": x}),
    "an optimality function of another shape": lambda: implicit(optimality=lambda x, a: x[:1]),
    "a fixed point of another structure": lambda: meta.custom_fixed_point(lambda x: {"a": x})(lambda x: x)(X),
    "a product of another structure": lambda: meta.solve_cg(lambda x: {"a": x}, X),
    "an equation without a solution": lambda: meta.solve_cg(lambda x: 0 * x, X),
    "a matrix that is not square": lambda: meta.solve_cg(lambda x: x[:1], X),
    "a right-hand side that is a number": lambda: meta.solve_cg(lambda x: x, 1.0),
    "a solver of torch's in a batch": lambda: torch.func.vmap(
        lambda a: meta.implicit(backward, lambda x, a: x - a)(torch.zeros(2), a)
    )(torch.ones(3, 2)),
    "aux in words": lambda: unroll(loss=lambda p, b: (squares(p, b), {"k": "text"}), has_aux=True),
    "aux of other shapes": lambda: unroll(loss=lambda p, b: (p.sum(), {"k": b}), batches=[X, X[:1]], has_aux=True),
    "aux of other structures": lambda: unroll(loss=lambda p, b: (p.sum(), {b: 1}), batches=["a", "b"], has_aux=True),
    "buffers of another structure": lambda: unroll(loss=lambda p, s, b: (p.sum(), {}), buffers={"mean": X}),
    "unroll of a number": lambda: unroll(opt=3),
    "unroll of a factory": lambda: unroll(opt=ps.scale),
    "args that are a tensor": lambda: unroll(args=X),
    "half a step between checkpoints": lambda: unroll(checkpoint_every=2.5),
    "a loss without aux": lambda: unroll(has_aux=True),
    "a loss without buffers and aux": lambda: unroll(has_aux=True, buffers=X, loss=lambda p, s, b: (p.sum(), s)),
    "a loss of several values": lambda: unroll(loss=lambda p, b: p - b),
    "a loss with more than was asked for": lambda: unroll(loss=lambda p, b: (squares(p, b), b)),
    "no steps": lambda: unroll(batches=0),
    "an empty list of batches": lambda: unroll(batches=[]),
    "batches without a tensor": lambda: unroll(batches={}),
    "a batch without dimensions": lambda: unroll(batches={"x": torch.ones(3, 2), "k": torch.tensor(1.0)}),
    "batches in words": lambda: unroll(batches="text"),
    "batches for other numbers of steps": lambda: unroll(batches={"x": torch.ones(3, 2), "y": torch.ones(4, 2)}),
    "batches for no steps": lambda: unroll(batches=torch.ones(0, 2)),
}
