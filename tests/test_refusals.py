"""What is misspelt, does not go together, or did not converge, is said."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch

import purestep as ps

PARAMS = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[3.0]])}

# ---------------------------------------------------------------------------------------------------------- executors


@pytest.mark.parametrize("name", ["Foreach", "for-each", "", "fuse", True, 1])
@pytest.mark.parametrize("method", ["step", "update"])
def test_there_is_no_such_executor(method: str, name: Any) -> None:
    """The error lists those there are, before anything has changed."""
    opt = ps.sgd(lr=0.1, momentum=0.9)
    state = opt.init_state(PARAMS)
    with pytest.raises(ValueError, match=r"executor must be None or one of 'leaf', 'foreach', 'fused', 'compiled', but is "):
        getattr(opt, method)(PARAMS, state, PARAMS, executor=name)


def test_update_has_no_fused_kernel() -> None:
    """They write parameters."""
    opt = ps.adamw(lr=0.1)
    with pytest.raises(ValueError, match=r"executor='fused'.*update makes updates alone. Use step"):
        opt.update(PARAMS, opt.init_state(PARAMS), PARAMS, executor="fused")
    new, _ = opt.step(PARAMS, opt.init_state(PARAMS), PARAMS, executor="fused")
    torch.testing.assert_close(new, opt.step(PARAMS, opt.init_state(PARAMS), PARAMS)[0])


def test_a_transform_that_moves_parameters_has_no_fused_kernel() -> None:
    """Nor is it ignored where the last transform returns parameters, unless it is put around one that has a kernel."""

    @ps.whole(moves=True)
    def moved(gs: Any, s: Any, params: Any) -> Any:
        return [p - g for p, g in zip(params, gs)], s

    opt = moved()
    with pytest.raises(RuntimeError, match=r"fused=True needs a chain that ends in what a torch._fused_\* kernel computes"):
        opt.step(PARAMS, opt.init_state(PARAMS), PARAMS, executor="fused")
    around = ps.lookahead(ps.adamw(0.1), k=2)
    new, _ = around.step(PARAMS, around.init_state(PARAMS), PARAMS, executor="fused")
    torch.testing.assert_close(new, around.step(PARAMS, around.init_state(PARAMS), PARAMS)[0])
