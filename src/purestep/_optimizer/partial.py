"""A transform as a class of optimizers, for tools that ask for one."""

from __future__ import annotations

import copyreg
import inspect
from typing import Any

from purestep._optimizer.mirror import FLAGS
from purestep._optimizer.optimizer import Optimizer
from purestep.compose import uncalled
from purestep.transform import Transform


class OptimizerClass(type):
    """The type of the classes that `partial` makes. They have no place in a module, and pickle as the call that makes them."""

    made_of: tuple[Transform, str, dict[str, Any]]


def partial(transform: Transform, /, *, name: str = "", **flags: Any) -> type[Optimizer]:
    """A class of optimizers that run one transform, for tools that ask for a class and make the optimizer themselves.

    The class is called with parameters, and with hyperparameters or switches of the transform that are to be others. Its
    signature lists them.

    Args:
        transform: what to run.
        name: what the class is called, also in a profiler; by default ``Optimizer``.
        **flags: further arguments of `Optimizer`, such as ``compile=True``, for all optimizers of the class.

    Returns:
        a subclass of `Optimizer`. It can be pickled wherever its transform can, and so can its optimizers.

    Raises:
        TypeError: `transform` is not one, or there is no such flag.

    >>> import torch, purestep as ps
    >>> from purestep import optim
    >>> Clipped = optim.partial(ps.chain(ps.clip_by_global_norm(1.0), ps.adamw(lr=1e-3)), name="Clipped")
    >>> optimizer = Clipped(torch.nn.Linear(2, 1).parameters(), lr=0.1)
    >>> optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["max_norm"]
    (0.1, 1.0)
    """
    if not isinstance(transform, Transform):
        raise TypeError(
            f"partial takes a transform, such as purestep.adamw(lr=3e-4), but got {transform!r}.{uncalled(transform)}"
        )
    known = {*FLAGS, "maximize"}
    unknown = sorted(flags.keys() - known)
    if unknown:
        raise TypeError(f"partial takes the flags {', '.join(sorted(known))}, but got {', '.join(unknown)}.")

    def init(self: Any, params: Any, **options: Any) -> None:
        Optimizer.__init__(self, params, transform, **{**flags, **options})

    keyword = inspect.Parameter.KEYWORD_ONLY
    shown = {
        **transform.hyperparams,
        **transform.switches,
        **dict.fromkeys(FLAGS),
        "maximize": False,
        "compile": False,
        **flags,
    }
    init.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # where inspect looks
        [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in ("self", "params")]
        + [inspect.Parameter(n, keyword, default=x) for n, x in shown.items() if n.isidentifier()]
    )
    text = f"`purestep.optim.Optimizer` of {transform!r}."
    made: Any = OptimizerClass(name or "Optimizer", (Optimizer,), {"__init__": init, "__doc__": text, "__module__": __name__})
    made.made_of = transform, name, flags
    return made


def again(transform: Transform, name: str, flags: dict[str, Any]) -> Any:
    """A pickled class."""
    return partial(transform, name=name, **flags)


copyreg.pickle(OptimizerClass, lambda made: (again, made.made_of))
