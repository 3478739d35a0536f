"""The states of optimizers in torch's form: torch.optim's own, and those of packages that build on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from purestep._optimizer.checkpoint import check_form
from purestep.convert.bridge import Bridge, PyTree, number
from purestep.transform import Transform

BLOCK = 256
"""bitsandbytes quantizes so many elements with one scale."""

RENAMED: dict[str, dict[str, str]] = {
    "ema": {"exp_avg": "momentum_buffer"},
    "scale_by_adan": {"pre_grad": "previous_grad"},
    "scale_by_ademamix": {"exp_avg_fast": "exp_avg"},
    "scale_by_novograd": {"exp_avg": "moments", "exp_avg_sq": "grads_ema"},
}
"""What pytorch_optimizer calls a transform's fields, where it has other names for them."""

OTHERWISE = {"LARS": "the learning rate is no part of its momentum"}
"""Classes of pytorch_optimizer whose fields have the names of ours and hold something else."""

NEGATED = ("previous_grad",)
"""What pytorch_optimizer keeps with the other sign: its Adan adds the last gradient where others subtract it."""


def from_torch(transform: Transform, params: PyTree, optimizer: torch.optim.Optimizer | Mapping[str, Any]) -> Any:
    """The state of a transform, as an optimizer of torch's (or of this library) has it.

    Args:
        transform: the algorithm of `optimizer`, for instance `purestep.adamw` for `torch.optim.AdamW`. Its hyperparameters
            are its own: those in the groups of `optimizer` are not looked at.
        params: the parameters, a pytree; in the order in which `optimizer` has them, if these have no names or others than
            the paths in `params`.
        optimizer: an optimizer, or what its `state_dict` returns.

    Returns:
        a state like that of ``transform.init_state(params)``, in new memory. Parameters without a state in `optimizer` have
        that of the beginning.

    Raises:
        ValueError: `optimizer` has another number of parameters, another algorithm's fields, or other shapes.
        TypeError: `transform` is a partition.

    >>> import torch, purestep as ps
    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = torch.optim.Adam(model.parameters())
    >>> model(torch.ones(2)).sum().backward()
    >>> optimizer.step()
    >>> opt, params = ps.adam(), dict(model.named_parameters())
    >>> state = ps.convert.from_torch(opt, params, optimizer)
    >>> ps.find(state, ps.AdamState).exp_avg["bias"]
    tensor([0.1000])
    """
    bridge = Bridge.over(transform, params)
    saved = optimizer.state_dict() if isinstance(optimizer, torch.optim.Optimizer) else optimizer
    check_form(saved)
    states = [saved["state"].get(k, {}) for k in bridge.ids(saved["param_groups"])]
    made = bridge.state(states)
    bridge.check_fields(states)
    return made


def to_torch(transform: Transform, params: PyTree, state: Any, optimizer: torch.optim.Optimizer) -> None:
    """Give an optimizer of torch's the state of a transform; its options stay as they are.

    Args:
        transform: the algorithm of `optimizer`.
        params: the parameters of `state`; in the order in which `optimizer` has its own, if these have no names or others
            than the paths in `params`. Their values are not copied.
        state: the state, which stays as it is. What `optimizer` does not have, as the copies of `master_weights`, is put into
            its state, where it does nothing.
        optimizer: an optimizer of as many parameters of the same shapes, whose state is replaced.

    Raises:
        ValueError: `optimizer` has another number of parameters.
        TypeError: `state` is that of another transform, or `transform` is a partition.

    >>> import torch, purestep as ps
    >>> opt, params = ps.adam(), {"w": torch.zeros(2)}
    >>> params, state = opt.step({"w": torch.ones(2)}, opt.init_state(params), params)
    >>> weight = torch.nn.Parameter(params["w"])
    >>> optimizer = torch.optim.Adam([weight])
    >>> ps.convert.to_torch(opt, params, state, optimizer)
    >>> optimizer.state[weight]["exp_avg"]
    tensor([0.1000, 0.1000])
    """
    bridge = Bridge.over(transform, params)
    saved = optimizer.state_dict()
    ids = bridge.ids(saved["param_groups"])
    optimizer.load_state_dict({**saved, "state": {k: s for k, s in zip(ids, bridge.states(state)) if s}})


def from_pytorch_optimizer(transform: Transform, params: PyTree, optimizer: torch.optim.Optimizer) -> Any:
    """The state of a transform, as an optimizer of the package pytorch_optimizer has it, which counts steps in its groups.

    Args:
        transform: the algorithm of `optimizer`: `lion`, `adabelief`, `yogi`, `adan`, `ademamix`, `novograd`, `radam`,
            `signum` (its SignSGD), `adamw`, or another whose fields have the same names and meaning there.
        params: as for `from_torch`.
        optimizer: the optimizer.

    Returns:
        the state, as `from_torch` returns it.

    Raises:
        ValueError: as for `from_torch`; the optimizer keeps its counter elsewhere, as its MADGRAD does, or something else
            under the same names, as its LARS does.
    """
    name = type(optimizer).__name__
    if name in OTHERWISE:
        raise ValueError(f"{name} of pytorch_optimizer cannot be converted: {OTHERWISE[name]}. Begin anew.")
    bridge = Bridge.over(transform, params)
    renamed = {
        theirs: ours for link in transform.links for ours, theirs in RENAMED.get(link.transform.declaration.name, {}).items()
    }
    saved = optimizer.state_dict()
    groups = {k: g for g in saved["param_groups"] for k in g["params"]}
    keys = {name for names in transform.plan.keys for name in names}
    states = []
    for k in bridge.ids(saved["param_groups"]):
        own = {renamed.get(n, n): -x if n in NEGATED else x for n, x in saved["state"].get(k, {}).items()}
        counted = {n: number(x) for n, x in groups[k].items() if n in keys}  # what it counts for all of a group
        if own and "step" in keys and not {**counted, **own}.get("step"):
            raise ValueError(
                f"The groups of {name} must have the number of steps under 'step', but have "
                f"{groups[k].get('step')!r} for parameters with a state. Begin anew."
            )
        states.append({**counted, **own} if own else own)
    made = bridge.state(states)
    bridge.check_fields(states)
    return made


def from_bitsandbytes(transform: Transform, params: PyTree, optimizer: torch.optim.Optimizer) -> Any:
    """The state of `adam` or `adamw`, as an 8-bit Adam of the package bitsandbytes has it, with its moments as numbers again.

    Args:
        transform: `adam` or `adamw`.
        params: as for `from_torch`.
        optimizer: the optimizer, such as ``bitsandbytes.optim.AdamW8bit``, or one with a state of 32 bits.

    Returns:
        the state, as `from_torch` returns it; moments in the parameters' dtypes. Put `quantize_state` around a transform to
        keep them in 8 bits here.

    Raises:
        ValueError: as for `from_torch`; or the optimizer has other moments than Adam's two, or quantizes them otherwise than
            in blocks of 256.
    """
    bridge = Bridge.over(transform, params)
    saved = optimizer.state_dict()
    states = []
    for k in bridge.ids(saved["param_groups"]):
        own = {**saved["state"].get(k, {})}
        own |= own.pop("__bnb_optimizer_quant_state__", {})  # where its state_dict puts what is not a parameter's size
        moments = {"exp_avg": dequantized(own, 1), "exp_avg_sq": dequantized(own, 2)} if own else {}
        states.append({"step": torch.tensor(float(own["step"])), **moments} if own else {})
    return bridge.state(states)


def dequantized(state: Mapping[str, Any], k: int) -> Tensor:
    """The `k`-th moment in a state of bitsandbytes': a table of 256 values, and a scale for each block of elements."""
    codes: Any = state.get(f"state{k}")
    if not isinstance(codes, Tensor):
        raise ValueError(
            f"The optimizer has no state{k}: of bitsandbytes only Adam and AdamW, with two moments, are converted."
        )
    table = state.get(f"qmap{k}")
    if table is None and codes.is_floating_point():
        return codes
    scales = state.get(f"absmax{k}")
    blocks = -(-codes.numel() // BLOCK)
    if table is None or scales is None or scales.numel() != blocks:
        found = "none" if scales is None else scales.numel()
        raise ValueError(
            f"state{k} of {codes.numel()} elements must have {blocks} scales, one for each block of {BLOCK}, but has {found}. "
            "Only the optimizers of bitsandbytes that quantize in blocks of this size are converted."
        )
    scales = scales.reshape(-1).repeat_interleave(BLOCK)[: codes.numel()]
    return (table[codes.reshape(-1).long()] * scales).reshape(codes.shape)
