"""Gradients without derivatives: evolution strategies."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from purestep._core import maths, tree
from purestep._core.populations import detach
from purestep._core.torch_api import DisableFuncTorch, dispatch_mode_count, tree_flatten
from purestep.meta.surroundings import Surroundings
from purestep.meta.trees import GAP, refilled, together
from purestep.transforms.noise import noise, whole_number

PyTree = Any
Randomness: TypeAlias = Literal["error", "different", "same"]


def es_grad(
    function: Callable[..., Any],
    *,
    sigma: float | Tensor = 0.1,
    num_samples: int = 32,
    has_aux: bool = False,
    vectorize: bool = True,
    chunk_size: int | None = None,
    randomness: Randomness = "error",
) -> Callable[..., PyTree]:
    r"""The gradient of a smoothed function, estimated from its values: for what cannot be differentiated.

    .. math:: \nabla f_\sigma(x) \approx \frac{1}{2 n \sigma} \sum_{i=1}^n
        \bigl(f(x + \sigma \varepsilon_i) - f(x - \sigma \varepsilon_i)\bigr)\,\varepsilon_i, \qquad
        f_\sigma(x) = \operatorname{E}\,f(x + \sigma \varepsilon), \qquad \varepsilon \sim \mathcal N(0, I)

    The estimate is unbiased for :math:`f_\sigma`, whose gradient is that of :math:`f` where :math:`f` is a quadratic. Each
    direction is taken with both signs (antithetic pairs), so that constants and curvature add no noise. It does not matter what
    happens inside: a long inner loop, whose derivatives explode or take too much memory, a loss with steps, Python.

    As with `torch.func.grad`, what is returned is called as the function is, and differentiates with respect to the first
    argument; it takes a `seed` beside. The noise depends on the seed alone: give another one at each outer step.

    Args:
        function: ``(x, *args) -> value``, a number or a 0-d tensor; `x` is a pytree of floating-point tensors.
        sigma: :math:`\sigma > 0`, the standard deviation of the perturbations, a number or a 0-d tensor. A tensor may be a
            batch of `torch.func.vmap`, and has derivatives where `function` has. It is checked unless it is on another device
            than the CPU, or traced by `torch.compile`.
        num_samples: :math:`n \ge 1`, the number of pairs; there are :math:`2 n` evaluations.
        has_aux: `function` returns ``(value, aux)``, a pytree of tensors and numbers. Those of all evaluations are stacked in a
            new first dimension of :math:`2 n`: first :math:`x + \sigma \varepsilon_1, \dots, x + \sigma \varepsilon_n`, then
            :math:`x - \sigma \varepsilon_1, \dots, x - \sigma \varepsilon_n`.
        vectorize: evaluate all at once under `torch.func.vmap`. With False, one after the other: for functions that branch on
            values, or call something that is not torch.
        chunk_size: with `vectorize`, at most so many at once, to bound the memory.
        randomness: of a function that draws random numbers, as for `torch.func.vmap`: ``"error"`` refuses it, with
            ``"different"`` every evaluation draws its own, with ``"same"`` all draw the same, so that what is by chance is
            the same on both sides of a difference. With ``vectorize=False`` nothing is refused: ``"error"`` is
            ``"different"``, one evaluation draws after the other, and with ``"same"`` each begins with torch's generators as
            they were before the first. The perturbations depend on the seed alone.

    Returns:
        ``(x, *args, seed=0) -> gradient``, a pytree like `x`; with `has_aux`, ``(gradient, aux)``.

    Raises:
        ValueError: `sigma` is not above 0, `num_samples` or `chunk_size` is below 1, or there is no such `randomness`.
        TypeError: (when called) a leaf of `x` is not a floating-point or complex tensor; the function gives no number, or no
            ``(value, aux)`` with `has_aux`.

    >>> import torch, purestep as ps
    >>> def steps_needed(lr):  # a whole number: it has no useful derivative
    ...     x, n = 1.0, 0
    ...     while abs(x) > 1e-3 and n < 100:
    ...         x, n = x - float(lr) * x, n + 1
    ...     return float(n)
    >>> gradient = ps.meta.es_grad(steps_needed, sigma=0.05, num_samples=20, vectorize=False)
    >>> bool(gradient(torch.tensor(0.3), seed=1) < 0)  # with a higher rate there are fewer
    True

    References: Salimans et al., `Evolution Strategies as a Scalable Alternative to Reinforcement Learning
    <https://arxiv.org/abs/1703.03864>`_, 2017; Metz et al., `Understanding and correcting pathologies in the training of
    learned optimizers <https://arxiv.org/abs/1810.10180>`_, 2019.
    """
    of_both = es_grad_and_value(
        function,
        sigma=sigma,
        num_samples=num_samples,
        has_aux=has_aux,
        vectorize=vectorize,
        chunk_size=chunk_size,
        randomness=randomness,
    )

    def gradient(x: PyTree, *args: Any, seed: Any = 0) -> PyTree:
        found, value = of_both(x, *args, seed=seed)
        return (found, value[1]) if has_aux else found

    return gradient


def es_grad_and_value(
    function: Callable[..., Any],
    *,
    sigma: float | Tensor = 0.1,
    num_samples: int = 32,
    has_aux: bool = False,
    vectorize: bool = True,
    chunk_size: int | None = None,
    randomness: Randomness = "error",
) -> Callable[..., tuple[PyTree, Any]]:
    r"""As `es_grad`, with the mean of all values, an estimate of :math:`f_\sigma(x)`: ``(gradient, value)``.

    Args:
        function: as in `es_grad`.
        sigma: as in `es_grad`.
        num_samples: as in `es_grad`.
        has_aux: as in `es_grad`.
        vectorize: as in `es_grad`.
        chunk_size: as in `es_grad`.
        randomness: as in `es_grad`.

    Returns:
        ``(x, *args, seed=0) -> (gradient, value)``, a pytree like `x` and a 0-d tensor; with `has_aux`,
        ``(gradient, (value, aux))``.

    Raises:
        ValueError: as in `es_grad`.
        TypeError: as in `es_grad`.

    >>> import torch, purestep as ps
    >>> both = ps.meta.es_grad_and_value(lambda x, scale: scale * (x**2).sum(), sigma=0.01, num_samples=2000)
    >>> gradient, value = both(torch.tensor([1.0, -2.0]), 0.5)
    >>> gradient.round(decimals=1), value.round(decimals=1)
    (tensor([ 1., -2.]), tensor(2.5000))
    """
    check_sigma(sigma)
    for name, count in (("num_samples", num_samples), ("chunk_size", chunk_size)):
        if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
            raise ValueError(f"{name} must be an integer of at least 1, but is {count!r}.")
    if randomness not in get_args(Randomness):
        raise ValueError(f"randomness must be one of {', '.join(map(repr, get_args(Randomness)))}, but is {randomness!r}.")

    def both(x: PyTree, *args: Any, seed: Any = 0) -> tuple[PyTree, Any]:
        leaves, spec = tree.flatten(x)
        check_point(leaves, spec)
        directions = [noises(p, num_samples, seed, k) for k, p in enumerate(leaves)]
        scale = sigma.to(leaves[0].device) if isinstance(sigma, Tensor) else sigma

        def evaluation(*each: Tensor) -> tuple[Tensor, PyTree]:
            moved = [(p + scale * d).to(p.dtype) for p, d in zip(leaves, each)]
            return parts(function(tree.unflatten(moved, spec), *args), leaves, has_aux)

        pairs = [torch.cat([d, -d]) for d in directions]
        evaluate = at_once if vectorize else in_turn
        values, aux = evaluate(evaluation, pairs, randomness, chunk_size)
        half = (values[:num_samples] - values[num_samples:]) / (2 * scale * num_samples)
        grads = [torch.tensordot(half.to(d.dtype), d, 1).to(p.dtype) for p, d in zip(leaves, directions)]
        return tree.unflatten(grads, spec), (values.mean(), aux) if has_aux else values.mean()

    return both


Evaluation: TypeAlias = Callable[..., tuple[Tensor, PyTree]]
"""One perturbation of each leaf -> the value there, and aux."""


def at_once(f: Evaluation, pairs: list[Tensor], randomness: Randomness, chunk_size: int | None) -> tuple[Tensor, PyTree]:
    """All evaluations, as one batch."""
    form: list[Any] = []

    def of_tensors(*each: Tensor) -> tuple[Tensor, list[Tensor]]:
        value, aux = f(*each)
        one = together([aux], torch.stack, "aux")  # numbers are tensors
        found, spec = tree_flatten(one)
        form[:] = [GAP if isinstance(y, Tensor) else y for y in found], spec
        return value, [y[0] for y in found if isinstance(y, Tensor)]

    values, tensors = torch.func.vmap(of_tensors, chunk_size=chunk_size, randomness=randomness)(*pairs)
    others, spec = form
    return values, refilled(others, tensors, spec)


def in_turn(f: Evaluation, pairs: list[Tensor], randomness: Randomness, chunk_size: int | None) -> tuple[Tensor, PyTree]:
    """One evaluation after the other."""
    before = Surroundings(detach(pairs)) if randomness == "same" else None
    found: list[tuple[Tensor, PyTree]] = []
    for each in zip(*pairs):
        with before.restored() if before is not None and found else nullcontext():  # the first moves the generators on
            found.append(f(*each))
    return torch.stack([value for value, _ in found]), together([aux for _, aux in found], torch.stack, "aux")


def check_sigma(sigma: Any) -> None:
    """Refuse a standard deviation that is none, as far as it can be read without waiting for it."""
    smallest = sigma
    if isinstance(sigma, Tensor):
        if sigma.dim() or sigma.is_complex():
            raise ValueError(
                f"sigma must be one real number, a float or a 0-d tensor, but is {tree.described(sigma)} of {sigma.dtype}. For "
                "several at once use torch.func.vmap."
            )
        if torch.compiler.is_compiling() or dispatch_mode_count() or not sigma.is_cpu:
            return
        with DisableFuncTorch():
            smallest = maths.bottom(sigma)[0].detach().min().item()
    if not smallest > 0:
        raise ValueError(f"sigma, the standard deviation of the perturbations, must be above 0, but is {smallest!r}.")


def parts(found: Any, leaves: list[Tensor], has_aux: bool) -> tuple[Tensor, PyTree]:
    """What the function returned: its value as a 0-d tensor, and aux, which is None without `has_aux`."""
    if not has_aux:
        return as_number(found, leaves), None
    if type(found) is not tuple or len(found) != 2:
        what = tree.described(found)
        raise TypeError(f"With has_aux=True the function of es_grad must return (value, aux), a tuple, but it returned {what}.")
    return as_number(found[0], leaves), found[1]


def noises(p: Tensor, count: int, seed: Any, place: int) -> Tensor:
    """So many standard normal tensors like `p`, one below the other; of a complex one, both parts are."""
    like = p.new_empty((count, *p.shape))
    zero = torch.zeros((), dtype=torch.int64, device=p.device)
    return noise(like, whole_number(seed, p.device), zero, zero + place)


def as_number(value: Any, leaves: list[Tensor]) -> Tensor:
    """What the function returned, as a 0-d tensor."""
    if isinstance(value, Tensor) and not value.dim() and not value.is_complex():
        return value if value.is_floating_point() else value.to(torch.get_default_dtype())
    if isinstance(value, (int, float)):
        return torch.tensor(float(value), device=leaves[0].device)
    what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
    raise TypeError(f"es_grad takes a function whose value is one real number, but it returned {what}. Take its mean or sum.")


def check_point(leaves: list[Any], spec: tree.Spec) -> None:
    """Refuse what cannot be perturbed."""
    for path, p in zip(spec.paths(), leaves):
        if not isinstance(p, Tensor) or not (p.is_floating_point() or p.is_complex()):
            told = p.dtype if isinstance(p, Tensor) else f"a {type(p).__name__}"
            raise TypeError(f"es_grad perturbs floating-point tensors, but {tree.quote(path)} is {told}.")
    if not leaves:
        raise TypeError("es_grad has nothing to perturb: its first argument holds no tensor.")
