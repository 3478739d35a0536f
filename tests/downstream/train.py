"""A project that uses purestep as a user does: it trains in the three ways, and type checkers know what it gets.

`.ci/smoke` runs it where nothing but the distribution is installed, and checks its types there.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import purestep as ps
from purestep import optim


@ps.leafwise()
def signed(g: Tensor, p: Tensor, lr: ps.Hyper = 0.1) -> Tensor:
    """An algorithm of one's own."""
    update: Tensor = -lr * g.sign()
    return update


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    loss: Tensor = nn.functional.mse_loss(model(x), y)
    return loss


def wrapped(model: nn.Module, x: Tensor, y: Tensor) -> float:
    optimizer = optim.AdamW(model.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)
    for _ in range(50):
        loss = loss_of(model, x, y)
        loss.backward()  # type: ignore[no-untyped-call]  # torch has not typed it
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    optimizer.load_state_dict(optimizer.state_dict())
    return loss_of(model, x, y).item()


def functional(params: dict[str, Tensor], x: Tensor, y: Tensor) -> float:
    clip, adamw = ps.clip_by_global_norm(1.0), ps.adamw(lr=ps.schedules.cosine(0.1, total_steps=50))
    assert_type(clip, ps.Transform)  # and not Any: the installed package has types
    opt: ps.Transform = ps.chain(clip, adamw)
    state = opt.init_state(params)

    def loss_of(p: dict[str, Tensor]) -> Tensor:
        return ((x @ p["w"] + p["b"] - y) ** 2).mean()

    for _ in range(50):
        grads = torch.func.grad(loss_of)(params)
        params, state = opt.step(grads, state, params)
    return loss_of(params).item()


def population(x: Tensor, y: Tensor) -> Tensor:
    """One model for each of three learning rates."""

    def trained(lr: Tensor) -> Tensor:
        opt, p = signed(lr=lr), torch.zeros(x.shape[1], 1)
        state = opt.init_state(p)
        for _ in range(20):
            g = torch.func.grad(lambda q: ((x @ q - y) ** 2).mean())(p)
            p, state = opt.step(g, state, p)
        return ((x @ p - y) ** 2).mean()

    return torch.func.vmap(trained)(torch.tensor([0.01, 0.03, 0.1]))


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 3)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5]]) + 0.3
    before = float((y**2).mean())
    losses = {
        "wrapped": wrapped(nn.Linear(3, 1), x, y),
        "functional": functional({"w": torch.zeros(3, 1), "b": torch.zeros(1)}, x, y),
        "population": float(population(x, y).min()),
    }
    for name, loss in losses.items():
        print(f"{name}: {loss:.4f} (at first {before:.2f})")
        assert loss < 0.2 * before, name


if __name__ == "__main__":
    main()
