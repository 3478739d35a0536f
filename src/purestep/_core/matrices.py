"""Parameters as stacks of matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple


class MatrixForm(NamedTuple):
    """How a parameter is a stack of matrices: see `purestep.as_matrices`."""

    flatten: bool = False
    split: int = 1
    dim: int = 0

    def shape(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """The number of matrices, their rows and their columns, of a parameter of this shape."""
        if self.flatten:
            count, rows, columns = 1, shape[0], math.prod(shape[1:])
        else:
            count, rows, columns = math.prod(shape[:-2]), shape[-2], shape[-1]
        if self.dim == 0:
            return count * self.split, rows // self.split, columns
        return count * self.split, rows, columns // self.split

    def misfit(self, shape: Sequence[int]) -> str | None:
        """What is in the way of a parameter of this shape, if anything is."""
        if len(shape) < 2:
            return "a matrix has at least two dimensions"
        _, *sizes = self._replace(split=1).shape(shape)
        if sizes[self.dim] % self.split:
            return f"{sizes[self.dim]} {('rows', 'columns')[self.dim]} cannot be split into {self.split} equal parts"
        return None

    def apart(self, x: Any) -> Any:
        """A parameter as a stack of matrices, with three dimensions."""
        count, rows, columns = self.shape(x.shape)
        if self.dim == 0 or self.split == 1:
            return x.reshape(count, rows, columns)
        return x.reshape(count // self.split, rows, self.split, columns).transpose(1, 2).reshape(count, rows, columns)

    def together(self, matrices: Any, shape: Sequence[int]) -> Any:
        """`apart` undone: a tensor of the parameter's shape."""
        if self.dim == 0 or self.split == 1:
            return matrices.reshape(shape)
        count, rows, columns = matrices.shape
        return matrices.reshape(count // self.split, self.split, rows, columns).transpose(1, 2).reshape(shape)

    def cuts(self, dim: int, shape: Sequence[int]) -> bool:
        """Whether a parameter that is cut along a dimension may be cut through a matrix."""
        return self.flatten or self.split > 1 or dim >= len(shape) - 2
