"""SparseAdam: Adam whose moments move only where a sparse gradient has rows."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, zeros_like

from purestep._core.hyper import Betas, Hyper, Positive
from purestep._core.maths import Scalar, counter, precise, root
from purestep._optimizer.mirror import over
from purestep._optimizer.optimizer import Optimizer, Params
from purestep.algorithms.adam import moments
from purestep.compose import chain
from purestep.declare import leafwise
from purestep.transform import Transform
from purestep.transforms.scale import direction, scale_by_learning_rate


def dense_and_real(path: str, p: Tensor) -> None:
    """Refuse parameters that are themselves sparse, or complex."""
    if p.is_sparse:
        raise ValueError(f"sparse_adam needs dense parameters (it is their gradients that are sparse), but {path} is sparse.")
    if p.is_complex():
        raise ValueError(f"sparse_adam cannot treat complex parameters, but {path} is {p.dtype}. Use sgd or adagrad there.")


class SparseAdamState(NamedTuple):
    """The state of `scale_by_sparse_adam`."""

    step: Scalar  # t: updates so far, in float64: torch, which counts in int, goes on with it exactly
    exp_avg: Tensor  # m: running mean of the gradient
    exp_avg_sq: Tensor  # v: running mean of its square

    @classmethod
    def init(cls, p: Tensor) -> SparseAdamState:
        """Before the first update."""
        return cls(counter(p).to(precise(p.device)), zeros_like(p), zeros_like(p))


@leafwise(SparseAdamState, sparse="rows", requires=dense_and_real)
def scale_by_sparse_adam(
    g: Tensor, s: SparseAdamState, p: Tensor, *, betas: Betas = (0.9, 0.999), eps: Positive = 1e-8
) -> tuple[Tensor, SparseAdamState]:
    r"""`scale_by_adam`, lazily: rows that a sparse gradient does not have keep their moments.

    .. math::
        u_t = \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t} \cdot \frac{m_t}{\sqrt{v_t} + \epsilon}

    with the moments :math:`m_t, v_t` of `scale_by_adam`, on the rows of the gradient. :math:`t` counts the updates of the
    whole parameter, not of a row, and :math:`\epsilon` meets the root before the bias is removed, both as in torch. A dense
    gradient has all rows.

    Args:
        betas: :math:`\beta_1, \beta_2`, each in [0, 1).
        eps: :math:`\epsilon > 0`, outside the root.

    >>> import torch, purestep as ps
    >>> opt, p = ps.scale_by_sparse_adam(), torch.zeros(3, 1)
    >>> g = torch.tensor([[0.0], [2.0], [0.0]]).to_sparse(1)
    >>> u, state = opt.update(g, opt.init_state(p), p)
    >>> u.indices(), u.values()
    (tensor([[1]]), tensor([[1.0000]]))

    Reference: Kingma & Ba, `Adam: A Method for Stochastic Optimization <https://arxiv.org/abs/1412.6980>`_, 2015.
    """
    b1, b2 = betas
    s = SparseAdamState(*moments(g, s, betas))
    return root(1 - b2**s.step) / (1 - b1**s.step) * s.exp_avg / (root(s.exp_avg_sq) + eps), s


def sparse_adam(lr: Positive = 1e-3, betas: Betas = (0.9, 0.999), eps: Positive = 1e-8, maximize: bool = False) -> Transform:
    r"""Adam for sparse gradients, such as those of an embedding: only the rows that were looked up are touched.

    .. math:: p_t = p_{t-1} - \eta\,\mathrm{sparse\_adam}(g_t)

    with :math:`\mathrm{sparse\_adam}` as in `scale_by_sparse_adam`. The numbers are those of `torch.optim.SparseAdam`. The
    cost of a step is that of the rows, whatever the size of the parameter.

    Args:
        lr: the learning rate :math:`\eta`.
        betas: decay rates of the two moments, each in [0, 1).
        eps: added to the root.
        maximize: climb instead of descending.

    Raises:
        ValueError: a parameter is complex, or itself sparse.

    >>> import torch, purestep as ps
    >>> opt, p = ps.sparse_adam(lr=0.1), torch.zeros(3, 1)
    >>> g = torch.tensor([[0.0], [2.0], [0.0]]).to_sparse(1)
    >>> opt.step(g, opt.init_state(p), p)[0].flatten()
    tensor([ 0.0000, -0.1000,  0.0000])

    Reference: Kingma & Ba, `Adam: A Method for Stochastic Optimization <https://arxiv.org/abs/1412.6980>`_, 2015.
    """
    return chain(direction(maximize), scale_by_sparse_adam(betas=betas, eps=eps), scale_by_learning_rate(lr))


class SparseAdam(Optimizer):
    """`torch.optim.SparseAdam`: same signature, same numbers, same state. The mathematics is `purestep.sparse_adam`'s.

    As torch's, it refuses dense gradients; `purestep.sparse_adam` does not.
    """

    @over(sparse_adam)
    def __init__(
        self, params: Params, lr: Hyper = 1e-3, betas: Betas = (0.9, 0.999), eps: Hyper = 1e-8, maximize: bool = False
    ) -> None: ...

    def _accept(self, grads: list[Tensor], params: list[Tensor]) -> None:
        for g, p in zip(grads, params):
            if not g.is_sparse:
                path = self._selection.paths(self.param_groups)[p]
                raise RuntimeError(
                    f"SparseAdam needs sparse gradients, but that of {path!r} is dense. Use Adam for it, or create "
                    "the embedding with sparse=True."
                )
