import math

import pytest
import torch
from torch import Tensor, nn

from sputnik.errors import CheckpointError
from sputnik.train.optim import (
    Ema,
    adamw,
    clip_gradients,
    load_optimizer_tensors,
    optimizer_tensors,
    set_lr,
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.ones(4, 4))
        self.experts = nn.Parameter(torch.ones(2, 3, 3))
        self.gain = nn.Parameter(torch.ones(4))

    def loss(self, x: Tensor) -> Tensor:
        return (x @ self.matrix * self.gain).square().mean() + self.experts.square().mean()


def train(net: Net, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        net.loss(x).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def test_decay_shrinks_matrices_and_leaves_gains() -> None:
    net = Net()
    optimizer = adamw(net, lr=0.1, weight_decay=0.5)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert net.matrix.equal(torch.full((4, 4), 0.95)) and net.experts.equal(torch.full((2, 3, 3), 0.95))
    assert net.gain.equal(torch.ones(4))


def test_betas_are_the_published_ones() -> None:
    assert all(group["betas"] == (0.9, 0.95) for group in adamw(Net(), lr=0.1).param_groups)


def test_optimizer_state_by_name_goes_on_to_the_bit() -> None:
    straight, broken, resumed = Net(), Net(), Net()
    optimizer = adamw(straight, lr=0.01)
    train(straight, optimizer, range(10))
    first = adamw(broken, lr=0.01)
    train(broken, first, range(5))
    saved = {name: value.clone() for name, value in optimizer_tensors(first, broken).items()}
    assert {"matrix|exp_avg", "matrix|exp_avg_sq", "matrix|step"} <= saved.keys()
    resumed.load_state_dict(broken.state_dict())
    second = adamw(resumed, lr=0.01)
    load_optimizer_tensors(second, resumed, saved)
    train(resumed, second, range(5, 10))
    assert all(a.equal(b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))


def test_optimizer_state_of_another_model_is_refused() -> None:
    with pytest.raises(CheckpointError, match="'tensor'"):
        load_optimizer_tensors(adamw(Net(), lr=0.1), Net(), {"tensor|exp_avg": torch.zeros(1)})


def test_set_lr_reaches_every_group() -> None:
    optimizer = adamw(Net(), lr=0.1)
    set_lr(optimizer, 0.03)
    assert [group["lr"] for group in optimizer.param_groups] == [0.03, 0.03]


def test_clipping_bounds_the_joint_norm() -> None:
    net = Net()
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, 2.0)
    count = sum(parameter.numel() for parameter in net.parameters())
    assert clip_gradients(net) == pytest.approx(2 * math.sqrt(count))
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in net.parameters() if p.grad is not None))
    assert norm == pytest.approx(1.0, abs=1e-5)
    assert clip_gradients(net, limit=10.0) == pytest.approx(1.0, abs=1e-5)


def test_clipping_leaves_gradients_alone_that_are_not_finite() -> None:
    """A NaN norm would turn every gradient into NaN, and nobody could say where it began."""
    net = Net()
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    assert net.gain.grad is not None and net.matrix.grad is not None
    net.gain.grad[0] = float("nan")
    assert math.isnan(clip_gradients(net))
    assert net.matrix.grad.equal(torch.ones(4, 4))


def test_ema_follows_its_definition() -> None:
    net = Net()
    ema = Ema(net, decay=0.9)
    with torch.no_grad():
        net.gain.fill_(2.0)
    ema.update(net, step=1000)
    assert ema.weights["gain"].allclose(torch.full((4,), 0.9 * 1 + 0.1 * 2))
    assert ema.weights["gain"].data_ptr() != net.gain.data_ptr()


def test_ema_forgets_the_initial_weights_within_a_short_run() -> None:
    net = Net()
    ema = Ema(net, decay=0.999)
    with torch.no_grad():
        net.gain.fill_(2.0)
    for step in range(1, 31):
        ema.update(net, step)
    assert float(ema.weights["gain"].min()) > 1.99
    ema.copy_to(net)
    assert net.gain.equal(ema.weights["gain"])
