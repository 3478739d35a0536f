"""torch's private API: every name of torch's that begins with an underscore, or lives in a module that does.

A new release of torch may change any of these without a word, so they are imported here and nowhere else
(tests/test_house.py holds it), under plain names. Each is torch's own object, with no function of ours around it: the hot path
pays neither a Python frame nor a lookup, and `torch.compile` knows the object when it traces. They are those of torch 2.9 to
2.14; what an older release lacks or calls otherwise is switched here.

`ATTRIBUTES` lists what an alias cannot stand for: private attributes of torch's objects, which other modules read in place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import _guards
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch._C._autograd import _profiler_enabled
from torch._C._dynamo import guards
from torch._functorch import pyfunctorch
from torch._prims_common import _is_non_overlapping_and_dense_or_false
from torch._subclasses import fake_tensor, functional_tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.optim import optimizer  # pyright: ignore[reportAttributeAccessIssue]
from torch.utils import _python_dispatch, _pytree

F = TypeVar("F", bound=Callable[..., Any])

# -------------------------------------------------------------------------------------- foreach: operations on lists of tensors

FOREACH: dict[str, Callable[..., Any]] = {
    name.removeprefix("_foreach_"): getattr(torch, name) for name in dir(torch) if name.startswith("_foreach_")
}
"""All of torch's foreach operations by name; a name that ends in an underscore overwrites its first argument."""

foreach_add = torch._foreach_add
foreach_add_ = torch._foreach_add_
foreach_addcdiv = torch._foreach_addcdiv
foreach_addcdiv_ = torch._foreach_addcdiv_
foreach_addcmul = torch._foreach_addcmul
foreach_addcmul_ = torch._foreach_addcmul_
foreach_clone = FOREACH.get("clone") or (lambda tensors: [x.clone() for x in tensors])  # 2.9 has none
foreach_copy_ = torch._foreach_copy_
foreach_div = torch._foreach_div
foreach_div_ = torch._foreach_div_
foreach_lerp = torch._foreach_lerp
foreach_lerp_ = torch._foreach_lerp_
foreach_maximum = torch._foreach_maximum
foreach_maximum_ = torch._foreach_maximum_
foreach_minimum = torch._foreach_minimum
foreach_minimum_ = torch._foreach_minimum_
foreach_mul = torch._foreach_mul
foreach_mul_ = torch._foreach_mul_
foreach_neg = torch._foreach_neg
foreach_neg_ = torch._foreach_neg_
foreach_norm = torch._foreach_norm
foreach_pow = torch._foreach_pow
foreach_pow_ = torch._foreach_pow_
foreach_reciprocal = torch._foreach_reciprocal
foreach_reciprocal_ = torch._foreach_reciprocal_
foreach_sub = torch._foreach_sub
foreach_sub_ = torch._foreach_sub_
foreach_zero_ = torch._foreach_zero_

flatten_dense = _flatten_dense_tensors  # copies tensors into one vector
unflatten_dense = _unflatten_dense_tensors  # views of a vector, in the shapes of tensors
UNFLATTENS_EMPTY: bool = unflatten_dense(torch.empty(0), [torch.empty(0, 3)])[0].dim() == 2  # type: ignore[no-untyped-call]
"""In 2.9 `unflatten_dense` makes a vector of every empty tensor."""

is_non_overlapping_and_dense = _is_non_overlapping_and_dense_or_false  # of sizes and strides; False where symbols leave it open

# -------------------------------------------------------------------------------------------------- torch.optim's fused kernels

fused_adagrad_ = torch._fused_adagrad_
fused_adam_ = torch._fused_adam_
fused_adamw_ = torch._fused_adamw_
fused_sgd_ = torch._fused_sgd_

FUSED_SGD_TAKES_HALF: bool = torch.__version__ >= "2.14"
"""Up to torch 2.13, `fused_sgd_` leaves every full vector of float16 and bfloat16 numbers as it was."""

FUSED_ADAGRAD_ON_CUDA: bool = hasattr(torch.ops.aten._fused_adagrad_, "tensor_lr")
"""`fused_adagrad_` has a kernel for CUDA since it takes a learning rate in a tensor."""

check_fused_device_and_dtype = optimizer._device_dtype_check_for_fused  # raises what `torch.optim` raises for `fused=True`

# ------------------------------------------------------------------------ what torch.optim's optimizers share: hooks, profiling

STEP_PRE_HOOKS = optimizer._global_optimizer_pre_hooks  # the dict that `register_optimizer_step_pre_hook` fills
STEP_POST_HOOKS = optimizer._global_optimizer_post_hooks


def profiling_eagerly() -> bool:
    """Whether `torch.profiler` is recording, outside `torch.compile`."""
    return not torch.compiler.is_compiling() and bool(_profiler_enabled())


# whether `torch.profiler` is recording; 2.9 cannot trace the question
profiling = _profiler_enabled if torch.__version__ >= "2.13" else profiling_eagerly

# ------------------------------------------------------------------------------------------------ functorch: what torch.func is

is_wrapped = _functorch.is_functorch_wrapped_tensor  # by any level of `torch.func`
is_batched = _functorch.is_batchedtensor  # by `torch.func.vmap`, as the outermost of its levels
get_unwrapped = _functorch.get_unwrapped  # the tensor below the outermost level
level_of = _functorch.maybe_get_level  # the number of that level
batch_dim_of = _functorch.maybe_get_bdim  # the dimension along which `vmap` cuts it
maybe_current_level = _functorch.maybe_current_level  # the number of the level that is running, or None
interpreter_stack = _functorch.get_interpreter_stack  # an `Interpreter` for each level that is running; None if there is none
innermost_interpreter = _functorch.peek_interpreter_stack  # the last of them, or None
Interpreter = _functorch.CInterpreter
TransformType = _functorch.TransformType  # what `key()` of an `Interpreter` returns: Vmap, Grad, Jvp, ...
VmapInterpreter = _functorch.CVmapInterpreterPtr  # made of an `Interpreter` of type Vmap; knows its `batchSize`
add_batch_dim = _functorch._add_batch_dim  # wraps a tensor for `vmap`: tensor, dimension, level
wrap_for_grad = _functorch._wrap_for_grad  # wraps a tensor for `grad`: tensor, level
without_innermost_interpreter = pyfunctorch.temporarily_pop_interpreter_stack  # a context manager
DisableFuncTorch = torch._C._DisableFuncTorch  # a context manager: no level sees an operation

# ---------------------------------------------------------------------------------------- dispatch: who sees an operation first

dispatch_mode_count = torch._C._len_torch_dispatch_stack  # of the `TorchDispatchMode`s that are on: make_fx, fake tensors, ...
function_mode_count = torch._C._len_torch_function_stack  # of the `TorchFunctionMode`s that are on
current_function_mode = torch.overrides._get_current_function_mode
function_modes = torch.overrides._get_current_function_mode_stack  # a list of those that are on
disable_dispatch_modes = _python_dispatch._disable_current_modes  # a context manager
DisableTorchFunctionSubclass = torch._C.DisableTorchFunctionSubclass  # a context manager: no subclass's `__torch_function__`
BelowAutograd = torch._C._AutoDispatchBelowAutograd  # a context manager: autograd is skipped; versions are counted all the same
BelowInplaceOrView = torch._C._AutoDispatchBelowADInplaceOrView  # the same, and nothing counts versions or remembers views
set_grad_mode = torch._C._set_grad_enabled  # `torch.set_grad_enabled` without its object
graph_task = torch._C._current_graph_task_id  # pyright: ignore[reportAttributeAccessIssue] # of the backward pass that runs, or -1
sequence_number = torch._C._autograd._get_sequence_nr  # pyright: ignore[reportAttributeAccessIssue] # of autograd's next node

FakeTensor = fake_tensor.FakeTensor  # stands for a plain tensor while something is traced, without its numbers
FunctionalTensor = functional_tensor.FunctionalTensor  # stands for a plain tensor while AOTAutograd traces

# ---------------------------------------------------------------------------------------------------------------------- pytrees

TreeSpec = _pytree.TreeSpec
spec_children: Callable[[Any], list[Any]] = getattr(TreeSpec, "children", lambda spec: spec.children_specs)  # 2.9 has no method
GetAttrKey = _pytree.GetAttrKey
SequenceKey = _pytree.SequenceKey
SUPPORTED_NODES = _pytree.SUPPORTED_NODES  # how each registered type is taken apart
node_type = _pytree._get_node_type  # the key of a container in `SUPPORTED_NODES`
register_pytree_node = _pytree.register_pytree_node
tree_flatten = _pytree.tree_flatten
tree_flatten_with_path = _pytree.tree_flatten_with_path
tree_leaves = _pytree.tree_leaves
tree_map = _pytree.tree_map
tree_map_only = _pytree.tree_map_only
tree_structure = _pytree.tree_structure
tree_unflatten = _pytree.tree_unflatten

# ---------------------------------------------------------------------------------------------------------------- torch.compile

TensorGuards = guards.TensorGuards  # checks in C++ that tensors have the types, shapes, strides, ... of those it was made of
disable_dynamo = torch._disable_dynamo  # type: ignore[attr-defined] # decorator: called by compiled code, not traced


def constant_result(function: F) -> F:
    """A decorator: while `torch.compile` traces, what the function returns is a constant.

    This is `torch.compiler.assume_constant_result`, which imports all of `torch._dynamo`: that takes a second.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def left_out_of_graphs(function: Callable[..., Any], reason: str) -> Callable[..., Any]:
    """`torch.compiler.disable`, but that would import torch._dynamo now: `torch.compile` breaks its graph for a call."""

    @functools.wraps(function)
    def eager(*args: Any) -> Any:
        disable: Any = torch.compiler.disable
        return disable(function, reason=reason)(*args)

    eager._torchdynamo_disable = True  # type: ignore[attr-defined]
    eager._torchdynamo_disable_msg = reason  # type: ignore[attr-defined]
    return eager


def standalone_compile(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
    """Inductor's kernel for a graph, with the dynamic shapes of its inputs. Imports Inductor, which takes a second."""
    mode = next(x.fake_mode for x in inputs if isinstance(x, FakeTensor))  # 2.9 does not find it in the graph by itself
    with _guards.tracing(_guards.TracingContext(mode)):
        return torch._inductor.standalone_compile(graph, inputs, dynamic_shapes="from_tracing_context")


# ---------------------------------------------------------------------------------------------------- attributes, read in place

ATTRIBUTES = {
    "_version": "Tensor: how often its memory has been written to",
    "_cdata": "UntypedStorage: the address of the storage, which views of one memory share",
    "_current_level": "torch.autograd.forward_ad, where it changes: the level of forward-mode differentiation, -1 for none",
    "_spec": "DTensor: its mesh and placements, in one object",
    "_local_tensor": "DTensor: the part of it that this process has, perhaps still on its way",
    "_sequence_nr": "a node of autograd's graph: its number in the order in which they were made",
    "_optimizer_step_pre_hooks": "torch.optim.Optimizer: a dict of its own",
    "_optimizer_step_post_hooks": "torch.optim.Optimizer: a dict of its own",
    "_optimizer_load_state_dict_pre_hooks": "torch.optim.Optimizer: a dict of its own",
    "_optimizer_load_state_dict_post_hooks": "torch.optim.Optimizer: a dict of its own",
    "_optimizer_state_dict_post_hooks": "torch.optim.Optimizer: a dict of its own",
    "_optimizer_step_code": "torch.optim.Optimizer: called at every step, where the profiler looks for it",
    "_is_flat_param": "FSDP1's flat parameter: True",
    "_fsdp_flattened": "FSDP1's part of a flat parameter: True",
    "_schedulers": "lr_scheduler.ChainedScheduler and SequentialLR",
    "_milestones": "lr_scheduler.SequentialLR",
    "_schedule_phases": "lr_scheduler.OneCycleLR",
    "_anneal_func_type": "lr_scheduler.OneCycleLR",
    "_scale_fn_custom": "lr_scheduler.CyclicLR",
}
"""Private attributes of torch's objects that other modules of purestep read, each with its owner and what it says."""
