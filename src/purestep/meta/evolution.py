"""Gradients without derivatives: evolution strategies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from purestep._core import tree
from purestep.transforms.noise import noise, whole_number

PyTree = Any


def es_grad(
    function: Callable[..., Any],
    *,
    sigma: float = 0.1,
    num_samples: int = 32,
    vectorize: bool = True,
    chunk_size: int | None = None,
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
        sigma: :math:`\sigma > 0`, the standard deviation of the perturbations.
        num_samples: :math:`n \ge 1`, the number of pairs; there are :math:`2 n` evaluations.
        vectorize: evaluate all at once under `torch.func.vmap`. With False, one after the other: for functions that branch on
            values, or call something that is not torch.
        chunk_size: with `vectorize`, at most so many at once, to bound the memory.

    Returns:
        ``(x, *args, seed=0) -> gradient``, a pytree like `x`.

    Raises:
        ValueError: `sigma` is not above 0, `num_samples` or `chunk_size` is below 1.
        TypeError: (when called) a leaf of `x` is not a floating-point or complex tensor; the function gives no number.

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
    of_both = es_grad_and_value(function, sigma=sigma, num_samples=num_samples, vectorize=vectorize, chunk_size=chunk_size)

    def gradient(x: PyTree, *args: Any, seed: Any = 0) -> PyTree:
        return of_both(x, *args, seed=seed)[0]

    return gradient


def es_grad_and_value(
    function: Callable[..., Any],
    *,
    sigma: float = 0.1,
    num_samples: int = 32,
    vectorize: bool = True,
    chunk_size: int | None = None,
) -> Callable[..., tuple[PyTree, Tensor]]:
    r"""As `es_grad`, with the mean of all values, an estimate of :math:`f_\sigma(x)`: ``(gradient, value)``.

    Args:
        function: as in `es_grad`.
        sigma: as in `es_grad`.
        num_samples: as in `es_grad`.
        vectorize: as in `es_grad`.
        chunk_size: as in `es_grad`.

    Returns:
        ``(x, *args, seed=0) -> (gradient, value)``, a pytree like `x` and a 0-d tensor.

    Raises:
        ValueError: as in `es_grad`.
        TypeError: as in `es_grad`.

    >>> import torch, purestep as ps
    >>> both = ps.meta.es_grad_and_value(lambda x, scale: scale * (x**2).sum(), sigma=0.01, num_samples=2000)
    >>> gradient, value = both(torch.tensor([1.0, -2.0]), 0.5)
    >>> gradient.round(decimals=1), value.round(decimals=1)
    (tensor([ 1., -2.]), tensor(2.5000))
    """
    if not sigma > 0:
        raise ValueError(f"sigma, the standard deviation of the perturbations, must be above 0, but is {sigma!r}.")
    for name, count in (("num_samples", num_samples), ("chunk_size", chunk_size)):
        if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
            raise ValueError(f"{name} must be a whole number of at least 1, but is {count!r}.")

    def both(x: PyTree, *args: Any, seed: Any = 0) -> tuple[PyTree, Tensor]:
        leaves, spec = tree.flatten(x)
        check_point(leaves, spec)
        directions = [noises(p, num_samples, seed, k) for k, p in enumerate(leaves)]

        def value(*each: Tensor) -> Tensor:
            moved = [(p + sigma * d).to(p.dtype) for p, d in zip(leaves, each)]
            return as_number(function(tree.unflatten(moved, spec), *args), leaves)

        pairs = [torch.cat([d, -d]) for d in directions]
        if vectorize:
            values = torch.func.vmap(value, chunk_size=chunk_size)(*pairs)
        else:
            values = torch.stack([value(*each) for each in zip(*pairs)])
        half = (values[:num_samples] - values[num_samples:]) / (2 * sigma * num_samples)
        grads = [torch.tensordot(half.to(d.dtype), d, 1).to(p.dtype) for p, d in zip(leaves, directions)]
        return tree.unflatten(grads, spec), values.mean()

    return both


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
