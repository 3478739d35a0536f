"""The stateful interface: a real `torch.optim.Optimizer` that runs any transform.

`param_groups` and `state[p]` are kept exactly as torch keeps them and are the only truth: a step gathers lists from them,
hands them to the engine, and gives their memory away. A transform's state is spread over the parameters' state dicts under
its field names, so that checkpoints are torch's.

Each of the optimizer's parts is in a file of its own. `options` makes transforms from the options of groups, `routing` splits
groups where the transform is a partition, `selection` asks masks, `first_steps` has the state before a parameter's first step,
and `checkpoint` checks what is loaded. A part keeps no reference to the optimizer: it is called with the optimizer's
`Contents`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from itertools import chain as chained
from typing import Any, ClassVar, TypeAlias, overload

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from purestep._core import maths, sharded
from purestep._core.lists import clones, overwrite
from purestep._core.masks import refuse_unmatched
from purestep._core.maths import eager, readable
from purestep._core.plain import plain
from purestep._core.primitives import is_off
from purestep._core.torch_api import (
    STEP_POST_HOOKS,
    STEP_PRE_HOOKS,
    DisableTorchFunctionSubclass,
    check_fused_device_and_dtype,
    graph_task,
    profiling,
    set_grad_mode,
    tree_leaves,
    tree_map_only,
)
from purestep._core.tree import quote
from purestep._engine.counters import Counters, traced
from purestep._engine.explain import Explanation, watched
from purestep._engine.guards import GuardCache
from purestep._engine.plan import ParamSlice, Plan
from purestep._engine.processes import check_agreement, must_see_whole
from purestep._engine.run import Inputs, choose, run_chain
from purestep._engine.sparse import SparseRows
from purestep._engine.step_cache import repeatable
from purestep._executors.task import LEAF_BY_LEAF, Env, ExecutorName, Ownership
from purestep._optimizer.averages import averages_in, in_place_of_params
from purestep._optimizer.checkpoint import (
    by_name,
    check_form,
    check_loaded,
    check_order,
    check_shared,
    cleaned,
    keep_precision,
    lay_out,
    refuse_strange,
    with_labels,
)
from purestep._optimizer.closures import closure_inputs, keep_progress, value_and_grad
from purestep._optimizer.fill import fill
from purestep._optimizer.first_steps import FirstSteps
from purestep._optimizer.following import follows, kept
from purestep._optimizer.mirror import untraced
from purestep._optimizer.options import Options, refuse_disagreement, refuse_flags
from purestep._optimizer.rehearsal import Rehearsal
from purestep._optimizer.routing import Route as Route  # pickles name it here
from purestep._optimizer.routing import Routing, routed, with_lists
from purestep._optimizer.scaled import Snapshot, unscale
from purestep._optimizer.selection import Contents, Selection
from purestep._optimizer.shared import NOTHING, Place, Shared
from purestep.compose import uncalled
from purestep.declare import whole
from purestep.transform import Transform

Params: TypeAlias = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]

OF_PARTS = (
    "_recipe", "_first", "_flags", "_options", "_routes", "_lazy", "_lazy_paths", "_numbers", "_schedules", "_untouched",
    "_begun_shared",
)  # fmt: skip
"""What a pickle has for the parts of an optimizer; the parts are made of it."""


class Optimizer(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` that runs any transform.

    Everything that works on torch's optimizers works on it: parameter groups, closures, hooks, state dicts, learning rate
    schedulers, gradient scalers. A group's options are the transform's hyperparameters, under the names that
    `transform.hyperparams` gives them. A transform that sees all parameters together sees those of all groups, and keeps what
    belongs to all of them in `shared`.

    An option that follows a schedule is shown as a number, that of the last step, and the schedule stays out of the state
    dict. A number that is written there replaces the schedule from then on (as `ReduceLROnPlateau` does), and a schedule that
    is written there is followed. A scheduler of `torch.optim.lr_scheduler`, which leaves ``initial_lr`` in the group,
    multiplies instead: the step takes the schedule times ``group["lr"] / group["initial_lr"]``, and the group shows the
    scheduler's number. So that there is something to multiply, a schedule that begins at 0 shows its second number before the
    first step.

    Parameters may be spread over processes as torch's `DTensor` spreads them: by `torch.distributed.fsdp.fully_shard`, by
    tensor parallelism, beside plain ones. The numbers are those of whole parameters, also of norms, and all processes take the
    same decisions, as long as a loss that a transform asks for is the same in all of them.

    `FullyShardedDataParallel` and `torch.distributed.optim.ZeroRedundancyOptimizer` give each process an optimizer for a part
    of the parameters that is all it knows of. Transforms that treat every element by itself (and under the second, every
    parameter) are right there; those that see all parameters together (`clip_by_global_norm`, `skip_if_nonfinite`, …) would
    take the part for the whole. With the first they are refused. The second leaves nothing by which it could be known: clip
    with `torch.nn.utils.clip_grad_norm_` before the step instead, and use `fully_shard` for the others.

    Args:
        params: an iterable of tensors, of `(name, tensor)` pairs, or of dicts, each a parameter group with options of its
            own. Names are the paths that masks are asked with; without names a path is the parameter's number.
        transform: what to run. A subclass that makes its own `step` gives a dict of options instead, as to
            `torch.optim.Optimizer`; it may also be called `defaults`.
        maximize: climb instead of descending.
        foreach: run all parameters at once (True) or one by one, with less memory (False). By default the fastest.
        capturable: keep the learning rates of the groups in tensors on the parameters' device, where a CUDA graph that has
            captured a step finds them; see `refresh`. All else is on the device anyway.
        differentiable: let autograd run through the step.
        fused: insist on a fused kernel (True), or do without (False). By default one is used where it fits.
        compile: make one kernel of every run of elementwise transforms, with Inductor, at the first step; see
            `Transform.update`. It is not part of a checkpoint.
        defaults: the same as `transform`, by the name that torch has for it.
        **hyperparameters: hyperparameters or switches of the transform that are to be others, by the names that
            `Transform.replace` takes: tools that call an optimizer class give some, such as ``lr=0.1``.

    Raises:
        TypeError: `transform` is not one and has no such hyperparameter, or a parameter is not a tensor.
        ValueError: an option of a group, or a hyperparameter, is out of its range.

    >>> import torch, purestep as ps
    >>> from purestep import optim
    >>> model = torch.nn.Linear(2, 1)
    >>> opt = optim.Optimizer(model.named_parameters(), ps.chain(ps.clip_by_global_norm(1.0), ps.adamw(lr=3e-4)))
    >>> model(torch.ones(1, 2)).sum().backward()
    >>> opt.step()
    >>> opt.param_groups[0]["lr"], sorted(opt.state[model.weight])
    (0.0003, ['exp_avg', 'exp_avg_sq', 'step'])
    """

    _constants: ClassVar[Mapping[str, Any]] = {}
    """What torch keeps in the groups, though it never changes."""
    _before: ClassVar[Mapping[str, Any]] = {}
    """Options that a checkpoint may be too old to have, with the values they had before they existed."""

    _uncounted: ClassVar[frozenset[str]] = frozenset()
    """Fields of a state that torch keeps without counting updates. Where one was given, the next update is not the first; where
    one was taken away, it is."""

    _compile = False
    _own_step = False  # whether the class makes its steps itself
    _evaluating = False
    _check_fused = False

    @untraced
    def __init__(
        self,
        params: Params,
        transform: Transform | dict[str, Any] | None = None,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        compile: bool = False,
        defaults: dict[str, Any] | None = None,
        **hyperparameters: Any,
    ) -> None:
        options = transform if isinstance(transform, dict) else defaults
        if options is not None and not isinstance(transform, Transform) and type(self) is not Optimizer:
            if hyperparameters:
                raise TypeError(
                    "Options must be given in a dict or by name, not both, but got a dict, and by name "
                    f"{', '.join(hyperparameters)}."
                )
            self._own_step = True
            self._begin(params, without_step(), {}, {}, dict(options))
            return
        if not isinstance(transform, Transform):
            raise TypeError(
                f"Optimizer takes a transform, such as purestep.adamw(lr=3e-4), but got {transform!r}.{uncalled(transform)}"
            )
        transform = transform.replace(**hyperparameters) if hyperparameters else transform
        flags: dict[str, Any] = {"maximize": maximize, "foreach": foreach, "capturable": capturable, "compile": compile}
        flags |= {"differentiable": differentiable, "fused": fused}
        if maximize and "value_and_grad" in transform.plan.extras:
            raise ValueError(
                f"maximize=True turns gradients around, but {transform!r} evaluates the closure by itself. Give maximize=True "
                "to the transform, if it takes it, or return minus the loss from the closure."
            )
        self._begin(params, transform, {} if routed(transform) else transform.hyperparams, flags)

    def _begin(
        self,
        params: Params,
        recipe: Any,
        options: Mapping[str, Any],
        flags: dict[str, Any],
        defaults: Mapping[str, Any] = NOTHING,
    ) -> None:
        """`recipe` is the transform, or the factory that makes it from a group's options; `defaults` are a subclass's own."""
        refuse_flags(flags)
        self._compile = bool(flags.pop("compile", False))
        self._check_fused = bool(flags.get("fused"))
        if self._check_fused:
            self._step_supports_amp_scaling = True  # gradient scalers of torch's then leave unscaling and skipping to `step`
        partitioned = isinstance(recipe, Transform) and routed(recipe)
        first = {name: kept(x) for name, x in options.items()}
        self._options = Options(recipe, first, flags, Routing(recipe))
        self._selection, self._place = Selection(partitioned), self._new_place()
        self._first_steps, self._rehearsal = FirstSteps(self._uncounted, {}), Rehearsal()
        self._ready = False
        self._guards: dict[int, GuardCache] = {}  # of the tensors of the last step, per group
        self._counters = Counters()
        masks = [m for link in recipe.links for m in link.masks] if isinstance(recipe, Transform) else []
        if masks and not isinstance(params, Tensor):
            params = with_lists(params, masks)
        if partitioned:
            params = self._options.routing.split(list(params), self._selection, None)
        else:
            self._options.check({**first, **flags}, [])
        super().__init__(params, {**first, **flags, **self._constants, **defaults})
        self._ready = True
        self._options.take_schedules(self.param_groups)
        self.defaults = self._options.set_defaults(self.defaults, self._constants)
        refuse_unmatched(masks, list(self._selection.paths(self.param_groups).values()))
        self._options.refuse(self._contents, self.param_groups)
        self._begin_state(self.param_groups)

    @property
    def _contents(self) -> Contents:
        """What the parts of the optimizer are called with."""
        restarts = Optimizer._uncounted if self._options.schedules.found else self._uncounted  # schedules count on
        return Contents(self.param_groups, self.state, self._selection, self._place, restarts)

    # -- for classes with other ways

    def _new_place(self) -> Place:
        """Where in the state the fields are that are kept for all parameters together."""
        return Place()

    def _begin_state(self, groups: list[dict[str, Any]]) -> None:
        """Make the state of parameters before their first step."""
        for group in groups:
            self._first_steps.begin(self._contents, group["params"], self._options.transform(group, self.param_groups))

    def _accept(self, grads: list[Tensor], params: list[Tensor]) -> None:
        """For a class to refuse gradients, before anything has changed."""

    # -- groups

    def refresh(self) -> None:
        """Tell a CUDA graph that has captured a step what the learning rates of the groups are now.

        A graph runs again what the step did on the device, and nothing of what it did in Python. With ``capturable=True``
        it reads the learning rates from tensors, into which every step copies the groups', and so does this, before
        `replay`::

            with torch.cuda.graph(graph):
                optimizer.step()
            for batch in batches:
                ...
                scheduler.step()
                optimizer.refresh()
                graph.replay()
        """
        self._options.transforms(self.param_groups)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with options of its own; see `torch.optim.Optimizer.add_param_group`.

        Where the transform is a partition it becomes one group for each label.

        Args:
            param_group: the parameters under ``"params"``, and options, which are the optimizer's where they are not given.

        Raises:
            TypeError, ValueError: as `torch.optim.Optimizer.add_param_group` does, and where an option is out of its range.
        """
        if not self._ready:
            super().add_param_group(param_group)
            return
        options, present = self._options, len(self.param_groups)
        groups = [param_group]
        if self._selection.partitioned and isinstance(param_group, dict):
            groups = options.routing.split(groups, self._selection, self.param_groups)
        try:
            self.defaults = options.set_defaults(self.defaults, self._constants)  # with those of the labels that are new
            for group in groups:
                if isinstance(group, dict):
                    for name in [name for name, x in options.first.items() if follows(x)]:
                        group.setdefault(name, options.first[name])
                    options.check({**self.defaults, **group}, self.param_groups)
                super().add_param_group(group)
            options.refuse(self._contents, self.param_groups[present:])
        except Exception:
            del self.param_groups[present:]
            raise
        options.take_schedules(self.param_groups[present:])
        self._selection.agreed.clear()
        self._begin_state(self.param_groups[present:])

    def _decide(self) -> None:
        """Give the parameters that have got a shape to the part of a partition that their label says, before the first step.

        Raises:
            ValueError: a label that no parameter has, a parameter that a transform cannot treat. Nothing has changed then.
        """
        routing = self._options.routing

        def add(old: dict[str, Any], label: str) -> None:
            first = routing.routes[label].first
            options = {n: x for n, x in old.items() if n in first or n in self.defaults}
            names: dict[str, Any] = {"param_names": []} if "param_names" in old else {}
            new = {**first, **options, "label": label, "params": [], **names}
            super(Optimizer, self).add_param_group(new)
            self._options.schedules.take(new, first)

        ready = routing.decide(self.param_groups, add)
        if ready:
            self._options.forget()
            self._guards = {}
            groups = [{**g, "params": [p for p in g["params"] if p in ready]} for g in self.param_groups]
            self._options.refuse(self._contents, groups)

    @property
    def shared(self) -> Shared:
        """What transforms that see all parameters together keep beside the state of each parameter, by its names.

        It can be written to. In `state` and in a state dict it is under the first parameter that is trained, each name with
        ``shared.`` before it.

        >>> import torch, purestep as ps
        >>> from purestep import optim
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> opt = optim.Optimizer([p], ps.skip_if_nonfinite(ps.sgd(lr=0.1)))
        >>> p.grad = torch.full((2,), float("nan"))
        >>> opt.step()
        >>> opt.shared["skipped"], opt.state[p]["shared.skipped"]
        (tensor(1.), tensor(1.))
        """
        return self._place.of(self.state, self.param_groups)

    # -- averages

    def eval_params(self) -> dict[str, Tensor]:
        """The parameters to evaluate a model with: what an algorithm's state says their average is, else the parameters.

        A parameter that was never updated has no average, and is what it is. The tensors are not copies: they may change with
        the next step.

        Returns:
            one tensor for each parameter, by its name, or by its number where the optimizer was not given names; in the order
            of the groups.

        >>> import torch, purestep as ps
        >>> from purestep import optim
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> opt = optim.Optimizer(model.named_parameters(), ps.chain(ps.sgd(lr=1.0), ps.ema_params(0.5)))
        >>> for _ in range(3):
        ...     model.weight.grad = torch.ones(1, 1)
        ...     opt.step()
        >>> averages = opt.eval_params()
        >>> (averages["weight"] - model.weight).item()
        0.75
        >>> y = torch.func.functional_call(model, averages, torch.ones(1))

        See also `use_eval_params`, which puts them into the parameters for a while.
        """
        averages = averages_in(self._contents, self._options.transforms(self.param_groups))
        paths = self._selection.paths(self.param_groups).items()
        return {path: averages[p] if p in averages else p if is_lazy(p) else p.detach() for p, path in paths}

    @contextlib.contextmanager
    def use_eval_params(self) -> Iterator[None]:
        """For as long as a ``with`` lasts, the parameters have the values of `eval_params`; then they have their own again.

        The tensors stay the same, and so does every bit of what they held, even after an exception. No step can be made inside.
        What else a model keeps, such as the statistics of batch normalization, is not touched.

        Returns:
            a context manager, which gives nothing.

        Raises:
            RuntimeError: it is inside another one.

        >>> import torch, purestep as ps
        >>> from purestep import optim
        >>> p = torch.nn.Parameter(torch.zeros(1))
        >>> opt = optim.ASGD([p], lr=1.0, lambd=0.0, t0=0)
        >>> for _ in range(3):
        ...     p.grad = torch.ones(1)
        ...     opt.step()
        >>> with opt.use_eval_params():
        ...     print(p.item())
        -2.5
        >>> p.item()
        -3.0
        """
        if self._evaluating:
            raise RuntimeError("use_eval_params cannot be inside another one: the parameters are the averages already.")
        averages = averages_in(self._contents, self._options.transforms(self.param_groups))
        try:
            self._evaluating = True
            with in_place_of_params(averages):
                yield
        finally:
            self._evaluating = False

    # -- the step

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """What torch wraps every `step` in: hooks, and a range in the profile. It costs nothing where there are neither.

        Args:
            func: a method `step`.

        Returns:
            the same with hooks around it.
        """
        watched = torch.optim.Optimizer.profile_hook_step(func)

        @functools.wraps(func)
        def step(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
            if (
                self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks
                or STEP_PRE_HOOKS or STEP_POST_HOOKS or profiling()
            ):  # fmt: skip
                return watched(self, *args, **kwargs)
            out = func(self, *args, **kwargs)
            self._optimizer_step_code()
            return out

        @functools.wraps(func)
        def begin(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
            if not self._first_steps.untouched or self._first_steps.aside or torch.compiler.is_compiling():
                return step(self, *args, **kwargs)
            try:
                self._first_steps.set_aside(self._contents, self._options, bool(args or kwargs))
                return step(self, *args, **kwargs)
            finally:
                self._first_steps.put_back(self._contents)

        return begin

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update the parameters from their gradients; parameters without one stay as they are.

        Args:
            closure: clears the gradients, evaluates the model, calls `backward` and returns the loss.

        Returns:
            the closure's loss, if there is a closure.

        Raises:
            RuntimeError: it is called inside `use_eval_params`.
        """
        if self._options.routing.lazy:
            self._decide()
        if self._evaluating:
            raise RuntimeError("No step can be made inside use_eval_params: the parameters are averages. Leave it first.")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if "found_inf" in self.__dict__ or "grad_scale" in self.__dict__:
            self._step_scaled(closure, loss)
        else:
            self._step(closure, loss)
        return loss

    def _step(self, closure: Any, loss: Any) -> None:
        """One update from the gradients that are there."""
        if self._check_fused:
            for group in self.param_groups:
                for p in group["params"] if group.get("fused") else ():
                    if p.grad is not None:
                        check_fused_device_and_dtype(p)
            self._check_fused = False
        grad = torch.is_grad_enabled()
        try:
            set_grad_mode(bool(self.defaults.get("differentiable")))
            groups = list(zip(self.param_groups, self._options.transforms(self.param_groups)))
            if groups[0][1].plan.whole:
                if not torch.compiler.is_compiling() and graph_task() != -1:
                    refuse_alone(self._contents, groups[0][1])
                self._advance(groups, closure_inputs(groups[0][1].plan, closure, loss), loss)
            else:
                if len(groups) > 1:
                    self._rehearsal.run(self._contents, [t for _, t in groups], self._options.schedules, self._executor)
                elif self._rehearsal.done:
                    self._rehearsal.done.clear()
                for pair in groups:
                    if not self._again(*pair):
                        self._advance([pair])
        finally:
            set_grad_mode(grad)
        if self._options.schedules.found and not torch.compiler.is_compiling():
            self._options.schedules.show(self._contents, [t for _, t in groups])

    def _step_scaled(self, closure: Any, loss: Any) -> None:
        """A step as a gradient scaler asks for it, as torch's fused kernels do it; on a device nothing is waited for.

        Gradients are divided by `grad_scale`, and where `found_inf` is not 0 nothing is changed.
        """
        found: Any = getattr(self, "found_inf", None)
        scale: Any = getattr(self, "grad_scale", None)
        make = self._options.transforms
        if closure is not None and any([t.plan.extras & {"value_and_grad"} for t in make(self.param_groups)]):
            raise RuntimeError(
                f"{type(self).__name__} evaluates its closure more than once, so its gradients cannot be unscaled for it. Let "
                "the closure return an unscaled loss and gradients, and do without a gradient scaler."
            )
        read = found is None or readable(found)
        if found is not None and read and found.item():
            return
        if scale is not None:
            unscale(self._contents.params, scale)
        if read:
            self._step(closure, loss)
            return
        flag = torch.as_tensor(found).reshape(()) != 0
        with torch.no_grad():
            for group, transform in zip(self.param_groups, make(self.param_groups)):  # what there is to go back to
                params = [p for p in group["params"] if p.grad is not None]
                self._first_steps.touch(self._contents, params, transform)
                fill(self._contents, params, transform)
        before, counters = Snapshot(self._contents), self._counters.known()
        self._step(closure, loss)
        counted = self._counters.known()
        before.restore(flag)
        self._counters.restored(counters, counted)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, or set them to zero; see `torch.optim.Optimizer.zero_grad`.

        Args:
            set_to_none: forget them; otherwise they are filled with zeros.
        """
        if not set_to_none or profiling():
            super().zero_grad(set_to_none)
            return
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    def explain(self) -> Explanation:
        """How `step` would run on the gradients that there are: which executor takes which parameters, and why others declined.

        A step is made on a copy of this optimizer, so nothing changes, and hooks are not called. A transform that needs a
        closure cannot be explained here: use its own `Transform.explain`.

        Returns:
            a value that prints as a table: for each run of transforms the executor, how many parameters and elements, their
            dtype and device; then reasons, whether the step cache hits, and the memory that the step takes.

        Raises:
            TypeError: a transform needs a closure.

        >>> import torch
        >>> from purestep import optim
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = optim.AdamW(model.parameters())
        >>> model(torch.ones(3)).sum().backward()
        >>> [part.executor for part in optimizer.explain().parts]
        ['fused']
        """
        grad = torch.is_grad_enabled()
        with torch.no_grad():
            cached = all(map(self._is_known, self.param_groups, self._options.transforms(self.param_groups)))
        other = copy.deepcopy(self)
        for own, its in zip(self.param_groups, other.param_groups):
            for p, q in zip(own["params"], its["params"]):
                q.grad = None if p.grad is None else p.grad.detach().clone()
        with torch.set_grad_enabled(grad):
            return watched(lambda: other._step(None, None), (), cached)

    def _again(self, group: dict[str, Any], transform: Transform) -> bool:
        """What `_advance` did last, without what has to be asked only once; False, and nothing done, if more is new."""
        params, executor = group["params"], self._executor(group)
        if (
            not params
            or executor in LEAF_BY_LEAF
            or (self._first_steps.untouched and any([p in self._first_steps.untouched for p in params]))
        ):
            return False
        if torch.is_grad_enabled() or not eager():
            return False
        plan = transform._plan or transform.plan
        repeated = repeatable(plan) if plan.repeated is ... else plan.repeated
        if repeated is None:
            return False
        guards = self._guards.get(id(group))
        if guards is None or len(self._guards) > len(self.param_groups):  # groups may have been replaced or taken away
            there = set(map(id, self.param_groups))
            self._guards = {key: known for key, known in self._guards.items() if key in there}
            guards = self._guards.setdefault(id(group), GuardCache())
        if hasattr(params[0], "full_tensor"):  # torch asks a subclass at each attribute whether it has a way of its own
            with DisableTorchFunctionSubclass():
                grads = [p.grad for p in params]
        else:
            grads = [p.grad for p in params]
        return repeated.again(guards, grads, params, self._states(params), executor)

    def _is_known(self, group: dict[str, Any], transform: Transform) -> bool:
        """Whether the step cache would hit for this group."""
        repeated, guards, params = repeatable(transform.plan), self._guards.get(id(group)), group["params"]
        if repeated is None or guards is None:
            return False
        return repeated.hits(guards, [p.grad for p in params], params, self._states(params))

    def _states(self, params: list[Tensor]) -> list[Mapping[str, Any]]:
        """The state of each of these parameters. One group's are found in order, without a look at each parameter's hash."""
        if len(self.state) == len(params) and all(map(operator.is_, self.state, params)):
            return list(self.state.values())
        return [self.state.get(p, NOTHING) for p in params]

    def _advance(
        self, groups: list[tuple[dict[str, Any], Transform]], extras: Mapping[str, Any] = NOTHING, loss: Any = None
    ) -> None:
        """One update of the parameters of these groups, which the transforms see together; `loss` is the closure's."""
        has_closure = "value_and_grad" in extras
        params, grads, slices = with_gradients(groups, has_closure)
        if not params:
            return
        self._accept(grads, params)
        states, columns = self._columns(params, slices, groups)
        plan = slices[0].plan

        def path(k: int) -> str:
            return self._selection.paths(self.param_groups)[params[k]]

        if not plain(grads, params):
            grads = sharded.alike(grads, params, plan.alike(columns), lambda k: quote(path(k)))
            members = tuple([id(group) for group, _ in groups])
            if members not in self._selection.agreed and not traced():
                kinds = {p.dim(): p for p in params}.values()  # some transforms see vectors as what matrices are not to them
                if any([must_see_whole(link.transform, p) for link in plan.links for p in kinds]):
                    check_agreement(plan, params, path)
                if len(self._selection.agreed) > len(self.param_groups):  # some of them have been replaced
                    self._selection.agreed.clear()
                self._selection.agreed.add(members)
        executor = self._executor(groups[0][0])
        if len(groups) > 1:
            refuse_disagreement(slices)
        before = list(map(list, columns))
        columns = self._represented(columns, plan)
        represented = list(map(list, columns))
        records = torch.is_grad_enabled()
        seen: tuple[Any, ...] = ()
        if records:
            fields = [c if isinstance(c, list) else [c] for c in chained.from_iterable(before)]
            seen = (params, grads, *fields, *[g.plan.tensors for g in slices])
        # where autograd looks on, the graph keeps the old values while the parameters are overwritten
        given = [p.clone() for p in params] if records else clones(params) if has_closure else params
        if has_closure:
            extras = {**extras, "value_and_grad": value_and_grad(given, params, grads, loss, extras["value_and_grad"])}
        inputs = Inputs(grads, given, columns, lambda masks: self._selection.of(masks, params, self.param_groups), extras)
        rows = None
        if not all([g.layout is torch.strided for g in grads]):
            rows = SparseRows(grads, given, columns, slices, inputs.mask, path)
            inputs.grads, inputs.params, inputs.states = rows.grads, rows.params, rows.states
        own = Ownership(given=not records, private=True, copies=rows is None and has_closure)
        env = Env(choose(executor, *seen), executor, own, inputs.grads + inputs.params)
        try:
            out, after = run_chain(slices, inputs, env, apply=True)
        except BaseException as error:
            if has_closure and not keep_progress(error, plan, self.shared):
                overwrite(params, given)
            raise
        if rows is not None:
            out, after = rows.scatter(out, after, True, env.own.given)
        write_params(params, out)
        self._store(plan, states, before, represented, after)

    def _columns(
        self, params: list[Tensor], slices: list[ParamSlice], groups: list[tuple[dict[str, Any], Transform]]
    ) -> tuple[list[dict[str, Any]], list[Any]]:
        """The state of each of these parameters, and its fields as the engine takes them: made, where there is none yet."""
        if self._first_steps.untouched:
            for part, (_, transform) in zip(slices, groups):
                self._first_steps.touch(self._contents, params[part.rows.start : part.rows.stop], transform)
        stateless = all([part.plan.stateless for part in slices])
        states: list[dict[str, Any]] = [{}] * len(params) if stateless else list(map(self.state.__getitem__, params))
        keys = slices[0].plan.keys
        try:
            return states, self._gather(params, states, slices, keys)
        except KeyError:
            for part, (_, transform) in zip(slices, groups):
                fill(self._contents, params[part.rows.start : part.rows.stop], transform)
            return states, self._gather(params, states, slices, keys)

    def _represented(self, columns: list[Any], plan: Plan) -> list[Any]:
        """The state as the engine takes it, where counters that are equal are one tensor."""
        return [
            [
                self._counters.represented(c) if leaf and scalar and c else c
                for c, leaf, scalar in zip(own, info.leaves, info.scalars)
            ]
            for own, info in zip(columns, plan.fields)
        ]

    def _store(self, plan: Plan, states: list[dict[str, Any]], before: list[Any], given: list[Any], after: list[Any]) -> None:
        """Write the new state into the tensors of the old one; only what does not fit there takes its place."""
        pairs: list[tuple[Tensor, Tensor]] = []
        for names, info, olds, used, news in zip(plan.keys, plan.fields, before, given, after):
            for name, leaf, scalar, like, old, known, new in zip(names, info.leaves, info.scalars, info.like, olds, used, news):
                if not leaf:  # a tensor that shares no memory with other fields, old or new, stays the tensor that it is
                    if new is not old:
                        around = [x for x in (*tree_leaves(olds), *tree_leaves(news)) if x is not old and x is not new]
                        alone = (scalar or like) and maths.memory(old) not in set(map(maths.memory, around))
                        self._settle(self.shared, name, old if alone else None, new, pairs)
                elif scalar and not any([(x is None and y is not None) or recorded(y) for x, y in zip(old, new)]):
                    self._counters.write(old, known, new)
                elif not all(map(operator.is_, known, new)):
                    for state, x, y in zip(states, old, new):
                        if x is not y:  # not where a mask is in the way: the name may be another link's too
                            self._settle(state, name, x, y, pairs)
        overwrite_all(pairs)

    def _settle(
        self, state: MutableMapping[str, Any], name: str, old: Any, new: Any, pairs: list[tuple[Tensor, Tensor]]
    ) -> None:
        """Keep a new value: in the old tensor, if it fits there and nothing is recorded; such pairs are collected."""
        if fits_in(old, new):
            pairs.append((old, new))
        else:
            state[name] = new

    def _executor(self, group: Mapping[str, Any]) -> ExecutorName | None:
        """What the flags ask of the engine."""
        if group.get("fused"):
            return "fused"
        if group.get("foreach") is False and group.get("fused") is None:
            return "leaf"
        if self._compile:
            return "compiled"
        return "foreach" if group.get("foreach") or group.get("fused") is False else None

    def _gather(
        self, params: list[Tensor], states: list[dict[str, Any]], groups: list[ParamSlice], keys: list[tuple[str, ...]]
    ) -> list[Any]:
        """The state of these parameters as the engine takes it: per link, per field, a list."""
        columns: list[Any] = []
        for k, names in enumerate(keys):
            link = groups[0].plan.links[k]
            if not names:
                columns.append([])
            elif link.transform.declaration.whole:
                own, leaves = self.shared, groups[0].plan.fields[k].leaves
                on = list(zip(states, self._selection.of(link.masks, params, self.param_groups)))
                columns.append([[s[n] if yes else None for s, yes in on] if leaf else own[n] for n, leaf in zip(names, leaves)])
            elif any([g.plan.optional[k] for g in groups]):
                columns.append([[s.get(n) for s in states] for n in names])
            else:
                found = [[s[n] for s in states] for n in names]
                if any([type(None) in set(map(type, column)) for column in found]):  # as good as missing
                    for s in states:
                        for name in [n for n in names if s[n] is None]:
                            del s[name]
                    raise KeyError
                columns.append(found)
        return columns

    # -- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The state as `torch.optim.Optimizer.state_dict` gives it: of every parameter, from construction on.

        Returns:
            a dict with ``"state"``, by the numbers of the parameters, and ``"param_groups"``.
        """
        self._first_steps.forget(self._contents, self._options)
        if self._options.routing.lazy:
            self._decide()
        if self._first_steps.untouched and not traced():
            self._first_steps.renew(self._contents, self._options.transforms(self.param_groups))
        if self._options.schedules.found:
            transforms = self._options.transforms(self.param_groups)
            self._options.schedules.show(self._contents, transforms, exactly=True)
        self._place.move(self.state, self.param_groups)
        hooks = self._optimizer_state_dict_post_hooks
        first: Any = type(self)._finish  # before the hooks of others
        try:
            self._optimizer_state_dict_post_hooks = OrderedDict([(-1, first), *hooks.items()])
            return super().state_dict()
        finally:
            self._optimizer_state_dict_post_hooks = hooks

    def _finish(self, saved: dict[str, Any]) -> None:
        """What is to be done to a state dict before its hooks see it."""
        if saved["state"] and not self._own_step:
            # torch's distributed checkpoints expect that all trained parameters have some state, or none has
            numbers = [k for group in saved["param_groups"] for k in group["params"]]
            for k in [k for k, p in zip(numbers, self._contents.params) if p.requires_grad]:
                saved["state"].setdefault(k, {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, purestep's or torch's; see `torch.optim.Optimizer.load_state_dict`.

        As in torch, the state is cast to the dtypes of the parameters, except that bfloat16 and float16 parameters keep a
        float32 state. Where the parameters have names, here and in the state dict, each gets the state of its name, in
        whatever order they were saved; names that only one side knows are matched in order, as torch matches all of them.

        Args:
            state_dict: what `state_dict` has returned, or that of torch's class of the same name.

        Raises:
            ValueError: the groups or the shapes in it are not this optimizer's; nothing is changed then.
            KeyError: it has no ``"state"`` or no ``"param_groups"``.
        """
        if self._options.routing.lazy:
            self._decide()
        before, after = self._optimizer_load_state_dict_pre_hooks, self._optimizer_load_state_dict_post_hooks
        state_dict = state_dict.copy() if isinstance(state_dict, dict) else state_dict
        for hook in before.values():
            state_dict = hook(self, state_dict) or state_dict
        check_form(state_dict)
        state_dict["state"] = cleaned(state_dict["state"])
        shared = self._place.take(state_dict["state"])
        saved = with_labels(state_dict["param_groups"], self._contents)
        state_dict["param_groups"] = by_name(saved, self._contents)
        check_order(saved, state_dict["param_groups"], shared, self._contents.params)
        check_loaded(state_dict, self._contents, self._options, type(self).__name__, self._options.fallback(self._before))
        self._check_shared(shared)
        refuse_strange({"state": state_dict["state"], "shared": shared}, meta=any([p.is_meta for p in self._contents.params]))
        everything = dict(self.__dict__)  # what is loaded replaces it, and writes on none of it
        try:
            self._optimizer_load_state_dict_pre_hooks = OrderedDict()  # they have run
            self._optimizer_load_state_dict_post_hooks = OrderedDict()  # they will
            begun = self._first_steps.began(self._contents)
            super().load_state_dict(state_dict)
            transforms = self._options.transforms(self.param_groups)
            keep_precision(state_dict, self._contents, transforms)
            if shared:
                self.shared.update(self._restored(shared))
            for old, group, transform in zip(state_dict["param_groups"], self.param_groups, transforms):
                lay_out(self._contents, group, transform, anew=True)
                entries = [(p, state_dict["state"].get(key, {})) for key, p in zip(old["params"], group["params"])]
                self._first_steps.resume(self._contents, entries, transform, begun)
        except BaseException:
            self.__dict__.clear()
            self.__dict__.update(everything)
            raise
        finally:
            self._optimizer_load_state_dict_pre_hooks, self._optimizer_load_state_dict_post_hooks = before, after
        for report in after.values():
            report(self)

    def _check_shared(self, shared: Mapping[str, Any]) -> None:
        """Refuse what is loaded for all parameters together if it is not what is there."""
        check_shared(shared, self.shared, self._place.first(self.param_groups))

    def _restored(self, shared: Mapping[str, Any]) -> dict[str, Any]:
        """What a loaded state has for all parameters together, as it was saved, in memory of its own."""
        device = self._place.first(self.param_groups).device
        return {name: tree_map_only(Tensor, lambda x: x.to(device, copy=True), x) for name, x in shared.items()}

    def __getstate__(self) -> dict[str, Any]:
        options, routing = self._options, self._options.routing
        return {
            **super().__getstate__(),
            "_recipe": options.recipe,
            "_first": options.first,
            "_flags": options.flags,
            "_routes": routing.routes,
            "_lazy": routing.lazy,
            "_lazy_paths": routing.paths,
            "_numbers": self._selection.numbers,
            "_schedules": options.schedules.by_place(self.param_groups),
            "_ready": self._ready,
            "_compile": self._compile,
            "_own_step": self._own_step,
            **self._first_steps.saved(self._contents),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        before = state.get("_schedules")
        if before is None:
            before = self._options.schedules.by_place(self.param_groups) if "_options" in self.__dict__ else []
        if "_recipe" in state:  # a pickle; else what is loaded by `load_state_dict`
            routing = Routing(state["_recipe"], state["_routes"], state.get("_lazy"), state.get("_lazy_paths"))
            self._options = Options(routing.recipe, state["_first"], state["_flags"], routing)
            self._selection = Selection(bool(routing.routes), state.get("_numbers"))
        super().__setstate__({name: x for name, x in state.items() if name not in OF_PARTS})
        self._options = self._options.resumed(self.param_groups, before)
        self._selection = Selection(self._selection.partitioned, self._selection.numbers)
        self._first_steps, self._rehearsal, self._place = FirstSteps(self._uncounted, state), Rehearsal(), self._new_place()
        self._guards, self._counters = {}, Counters()
        for group in self.param_groups:
            for name, default in self._options.fallback(self._before).items():
                group.setdefault(name, default)
            group.update(self._constants)
        for group, transform in zip(self.param_groups, self._options.transforms(self.param_groups)):
            lay_out(self._contents, group, transform, anew=False)


def with_gradients(
    groups: list[tuple[dict[str, Any], Transform]], zeros: bool
) -> tuple[list[Tensor], list[Any], list[ParamSlice]]:
    """The parameters of these groups that have a gradient, their gradients, and which of them each group's transform is for.

    With `zeros`, parameters without a gradient have a gradient of zeros: a function of all parameters has one for each.
    """
    params: list[Tensor] = []
    grads: list[Any] = []
    slices: list[ParamSlice] = []
    for group, transform in groups:
        own = group["params"]
        given = [p.grad for p in own]
        if zeros:
            given = [torch.zeros_like(p) if g is None else g for p, g in zip(own, given)]
        if type(None) in set(map(type, given)):
            own = [p for p, g in zip(own, given) if g is not None]
            given = [g for g in given if g is not None]
        slices.append(ParamSlice(transform.plan, range(len(params), len(params) + len(own))))
        params += own
        grads += given
    return params, grads, slices


def write_params(params: list[Tensor], new: list[Tensor]) -> None:
    """Write new parameters into the old ones, recorded by autograd if it looks on."""
    if torch.is_grad_enabled():
        for p, x in zip(params, new):
            if x is not p:
                p.copy_(x)
    elif not all(map(operator.is_, new, params)):
        overwrite(params, new)


def refuse_alone(contents: Contents, transform: Transform) -> None:
    """Refuse a step of one parameter within a backward pass if the transform must see all: the others have no gradients yet."""
    if len(contents.params) > 1:
        return
    for link in transform.links:
        d = link.transform.declaration
        if d.whole and not d.elementwise and not is_off(link.transform):
            (path,) = contents.selection.paths(contents.groups).values()
            raise RuntimeError(
                f"{d.name} must see all parameters, but this optimizer has one, {quote(path)}, and makes a step within "
                "backward(), before all gradients are there. Give one optimizer all parameters and call step() after "
                "backward(), or use a transform that treats each parameter by itself, such as clip_by_norm."
            )


@whole()
def without_step(gs: list[Tensor], s: Any, params: list[Tensor]) -> tuple[list[Tensor], Any]:
    """What an optimizer runs whose class is to have its own `step`."""
    raise NotImplementedError(
        "This optimizer was made of a dict of options, so its class must have its own step. To run a transform, give it one: "
        "Optimizer(params, purestep.adamw(lr=3e-4))."
    )


def fits_in(old: Any, new: Any) -> bool:
    """Whether a new value of a state can be written into the tensor that holds the old one."""
    if not isinstance(old, Tensor) or not isinstance(new, Tensor) or torch.is_grad_enabled():
        return False
    return old.shape == new.shape and old.dtype == new.dtype and old.device == new.device and type(old) is type(new)


def recorded(x: Any) -> bool:
    """Whether autograd follows this value."""
    return isinstance(x, Tensor) and x.requires_grad


def overwrite_all(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Write the second of each pair into the first; a source that may lie in memory which is written to is copied before."""
    if not pairs:
        return
    if len(pairs) > 1:
        written = {maths.memory(x) for x, _ in pairs}
        pairs = [(x, y.clone() if not plain([y]) or maths.memory(y) in written else y) for x, y in pairs]
    for x, y in pairs:
        x.copy_(y)
