"""Parameters that are made of matrices: experts, fused projections, convolution kernels."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from purestep._core.cache import DeclarationCache
from purestep._core.hyper import Period, check_steps
from purestep._core.hyper import Whole as WholeNumber
from purestep._core.maths import VIEWS
from purestep._core.matrices import MatrixForm
from purestep._core.primitives import LinkDeclaration, Primitive, fields_of
from purestep._executors.chains import detail
from purestep._trace.program import program
from purestep.compose import Relinked, check_transform
from purestep.transform import Leafwise, Transform


class MatricesDeclaration(LinkDeclaration):
    """A declared leafwise transform whose operations on matrices see each parameter as a stack of them."""

    def __init__(self, plain: LinkDeclaration, form: MatrixForm) -> None:
        self.plain, self.form = plain, form
        function = plain.function

        @functools.wraps(function)
        def in_form(*args: Any, **kwargs: Any) -> Any:
            before = VIEWS.form
            try:
                VIEWS.form = form
                return function(*args, **kwargs)
            finally:
                VIEWS.form = before

        sparse: Any = plain.sparse
        super().__init__(in_form, plain.state, off=plain.off, requires=self.fits, sparse=sparse, name=plain.name)
        self.init_names, self.state_dtype = plain.init_names, plain.state_dtype

    def fits(self, path: str, p: Tensor) -> None:
        """Refuse a parameter that is no stack of matrices, or whose matrices the transform refuses."""
        why = self.form.misfit(p.shape)
        if why is not None:
            raise ValueError(
                f"as_matrices: {path} has shape {tuple(p.shape)}, but {why}{self.said()}. Route it elsewhere with "
                "partition(...) or masked(...)."
            )
        if self.plain.requires is not None:
            self.plain.requires(path, torch.empty(self.form.shape(p.shape)[1:], dtype=p.dtype, device="meta"))

    def said(self) -> str:
        """The form, for an error."""
        return f" (with {arguments_of(self.form)})" if self.form != MatrixForm() else ""

    def __reduce__(self) -> tuple[Any, ...]:
        return declared, (self.plain, self.form)


def declared(plain: LinkDeclaration, form: MatrixForm) -> MatricesDeclaration:
    """The declaration of a transform that sees matrices in this form: there is one of each."""
    found: MatricesDeclaration = plain.derived.get(form, lambda: MatricesDeclaration(plain, form))
    return found


_treats: DeclarationCache[bool] = DeclarationCache(256)
"""What `treats_matrices` has found."""


def in_form(value: Primitive, form: MatrixForm) -> Primitive:
    """The transform of one link, in this form if it has anything to do with matrices."""
    d = value.declaration
    if d.whole or has_form(d):
        return value
    key = (d.key, *map(value.arguments.__getitem__, d.switches))  # what stands for a number tells nothing
    treats = _treats.entries.get(key)
    if treats is None:
        treats = treats_matrices(value)
        _treats.keep(key, treats, [d])
    return Leafwise(declared(d, form), value.arguments) if treats else value


def treats_matrices(value: Primitive) -> bool:
    """Whether a leafwise transform has operations on matrices.

    Raises:
        TypeError: it has others that are not elementwise.
    """
    d = value.declaration
    recipe = (detail(value, (False,) * len(fields_of(value).names)),)
    if not d.arrays and program(recipe, False, False, False, d, form="single").block:
        return False
    if d.arrays or not program(recipe, False, False, False, d, form="sharded").block:
        raise TypeError(
            f"as_matrices cannot tell {d.name} what the matrices are, because it treats whole parameters in its own way. "
            "What an operation does to matrices must be declared with operation(like=True, stacks=True)."
        )
    return True


def has_form(d: Any) -> bool:
    """Whether a declaration, or one that it is derived from, sees matrices in a form of its own: the innermost counts."""
    while d is not None:
        if isinstance(d, MatricesDeclaration):
            return True
        d = getattr(d, "plain", None)
    return False


def out_of_form(value: Primitive) -> Primitive:
    """`in_form` undone."""
    d = value.declaration
    return Leafwise(d.plain, value.arguments) if isinstance(d, MatricesDeclaration) else value


class AsMatrices(Relinked):
    """A transform that sees each parameter as a stack of matrices; made with `as_matrices`."""

    __slots__ = ()
    _plain = staticmethod(out_of_form)

    def _made(self, value: Primitive) -> Primitive:
        return in_form(value, *self.context)

    def __repr__(self) -> str:
        (form,) = self.context
        return f"as_matrices({self.children[0]!r}{', ' if form != MatrixForm() else ''}{arguments_of(form)})"


def arguments_of(form: MatrixForm) -> str:
    """The arguments that differ from the defaults."""
    return ", ".join([f"{name}={x}" for name, x in form._asdict().items() if x != MatrixForm._field_defaults[name]])


def as_matrices(transform: Transform, *, flatten: bool = False, split: Period = 1, dim: int = 0) -> Transform:
    """See each parameter as a stack of matrices, for a transform that treats matrices: `muon` and what is made like it.

    By default the last two dimensions are those of the matrices, and the ones before count them: the experts of a mixture,
    of shape (experts, in, out), are each a matrix of its own. For others say what they are, by their paths with `partition`
    or `masked`:

    - the kernel of a convolution, (out, in, height, width), is one matrix with ``flatten=True``: (out, in * height * width);
    - projections that are fused into one parameter, as the query, key and value of attention, (3 * d, d), are three
      matrices with ``split=3``, and a matrix for each head with ``split=3 * heads``. Where they are side by side, (d, 3 * d),
      say ``dim=1``.

    State and updates have the shape of the parameter. What a transform does element by element stays as it is, and so does
    what it does to all parameters together, such as a norm. The matrices of all parameters that have one shape are computed as
    one stack; those of sharded parameters each by one process, without any communication where a process has whole ones, as it
    has of experts that are sharded by expert.

    Args:
        transform: any transform. Those in it that treat parameters as matrices must do so by an `operation` that is declared
            with ``stacks=True``.
        flatten: the first dimension is that of the rows, and all others together are the columns.
        split: how many matrices the rows (or columns) of each are to be split into.
        dim: what is split: 0 for the rows, 1 for the columns.

    Returns:
        the transform, with the same hyperparameters and the same state.

    Raises:
        TypeError: `transform` is not one, or treats whole parameters in a way of its own.
        ValueError: `split` or `dim` is out of its range; or (from ``init_state``) a parameter is no stack of such matrices.

    >>> import torch, purestep as ps
    >>> opt, experts = ps.as_matrices(ps.muon(lr=0.1)), torch.zeros(4, 2, 3)
    >>> p, state = opt.step(torch.randn(4, 2, 3), opt.init_state(experts), experts)
    >>> torch.linalg.svdvals(p).shape, ((torch.linalg.svdvals(p) / 0.1 - 1).abs() < 0.4).all()
    (torch.Size([4, 2]), tensor(True))

    Reference: Jordan et al., `Muon <https://kellerjordan.github.io/posts/muon/>`_, 2024, which flattens convolutions and splits
    fused projections.
    """
    check_transform(transform, "as_matrices")
    check_steps(split, "as_matrices: split", WholeNumber(low=1))
    if isinstance(dim, bool) or dim not in (0, 1):
        raise ValueError(f"as_matrices: dim must be 0, for the rows, or 1, for the columns, but got {dim!r}.")
    return AsMatrices((transform,), (MatrixForm(bool(flatten), int(split), dim),))
