"""FP8 products: which numbers are rounded with which scale, forward and backward, and which are left alone."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sputnik.model.fp8 import dequantise, quantise
from sputnik.model.fp8_products import TILE, emulate, product, rounded
from sputnik.model.precision import Linear
from sputnik.model.transformer import Transformer

Build = Callable[..., Transformer]


def noise(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).exp()


def by_tiles(x: Tensor, size: int = 128) -> Tensor:
    """Rows cut into tiles of `size`, each rounded by torch's own type: the definition, one tile at a time."""
    out = torch.empty_like(x)
    for row in range(x.shape[0]):
        for start in range(0, x.shape[1], size):
            tile = x[row, start : start + size]
            scale = tile.abs().max() / 448
            out[row, start : start + size] = (tile / scale).to(torch.float8_e4m3fn).float() * scale
    return out


@pytest.mark.parametrize("shape", [(1, 1), (5, 128), (3, 300)])
def test_activations_are_rounded_tile_by_tile(shape: tuple[int, int]) -> None:
    x = noise(*shape)
    assert torch.equal(rounded(x, TILE), by_tiles(x))


@pytest.mark.parametrize("shape", [(128, 128), (130, 257), (7, 600)])
def test_weights_are_rounded_as_the_published_checkpoints_are(shape: tuple[int, int]) -> None:
    weight = noise(*shape)
    assert torch.equal(rounded(weight, (128, 128)), dequantise(*quantise(weight)))


def test_an_outlier_spoils_its_own_tile_alone() -> None:
    x = torch.full((2, 256), 1e-4)
    x[0, 0] = 100.0
    found = rounded(x, TILE)
    assert bool((found[0, 1:128] == 0).all())
    assert torch.allclose(found[0, 128:], x[0, 128:]) and torch.allclose(found[1], x[1])


def test_all_three_products_take_rounded_factors() -> None:
    x, weight, grad = noise(200, 150), noise(140, 150, seed=1), noise(200, 140, seed=2)
    x.requires_grad_()
    weight.requires_grad_()
    out = product(x, weight)
    out.backward(grad)
    with torch.no_grad():
        x_kept, weight_kept = by_tiles(x), dequantise(*quantise(weight))
        assert torch.allclose(out, x_kept @ weight_kept.t(), rtol=1e-5, atol=1e-3)
        assert x.grad is not None and torch.allclose(x.grad, by_tiles(grad) @ weight_kept, rtol=1e-5, atol=1e-3)
        expected = by_tiles(grad.t().contiguous()) @ by_tiles(x_kept.t().contiguous()).t()
        assert weight.grad is not None and torch.allclose(weight.grad, expected, rtol=1e-5, atol=1e-3)


def test_numbers_that_fit_are_multiplied_exactly() -> None:
    """Small whole numbers survive the rounding, so product and gradients are those of a plain linear layer."""
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (
        torch.tensor([-2.0, -1.0, 1.0, 2.0])[torch.randint(4, shape, generator=generator)]
        for shape in ((2, 70, 130), (40, 130), (2, 70, 40))
    )
    one, other = ((x.clone().requires_grad_(), weight.clone().requires_grad_()) for _ in range(2))
    product(*one).backward(grad)
    nn.functional.linear(*other).backward(grad)
    assert torch.allclose(product(*one), nn.functional.linear(*other), rtol=1e-5)
    for mine, plain in zip(one, other, strict=True):
        assert mine.grad is not None and plain.grad is not None
        assert torch.allclose(mine.grad, plain.grad, rtol=1e-5, atol=1e-4)


def loss_and_gradients(model: Transformer) -> tuple[float, Tensor]:
    """Of some random ids, prediction modules included; all gradients in one vector."""
    ids = torch.randint(101, (2, 40), generator=torch.Generator().manual_seed(1))
    trunk = model.train().trunk(ids)
    ahead = model.mtp_hidden(trunk.residual, ids).hidden
    heads = [(trunk.hidden[:, :-1], ids[:, 1:]), *((hidden[:, :-1], ids[:, 2:]) for hidden in ahead)]
    losses = [nn.functional.cross_entropy(model.head(hidden).flatten(0, 1), ids.flatten()) for hidden, ids in heads]
    torch.stack(losses).sum().backward()
    gradients = [weight.grad for weight in model.parameters()]
    assert all(gradient is not None for gradient in gradients)
    return float(torch.stack(losses).detach().sum()), torch.cat(
        [each.flatten() for each in gradients if each is not None]
    )


@pytest.mark.parametrize("family", ["deepseek", "dense"])
def test_without_rounding_it_is_the_plain_model(build: Build, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"num_nextn_predict_layers": 1} if family == "deepseek" else {}
    plain, other = build(family, **changes), emulate(build(family, **changes))
    assert plain.state_dict().keys() == other.state_dict().keys()
    monkeypatch.setattr("sputnik.model.fp8_products.rounded", lambda x, tile: x)
    (loss, gradients), (same, as_well) = loss_and_gradients(plain), loss_and_gradients(other)
    assert same == pytest.approx(loss, rel=1e-6) and torch.allclose(as_well, gradients, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("family", ["deepseek", "dense"])
def test_rounding_changes_loss_and_gradients_a_little(build: Build, family: str) -> None:
    plain, other = build(family, initializer_range=0.05), emulate(build(family, initializer_range=0.05))
    (loss, gradients), (near, alike) = loss_and_gradients(plain), loss_and_gradients(other)
    assert 0 < abs(near - loss) < 0.005 * loss
    assert 0.95 < float(nn.functional.cosine_similarity(gradients, alike, dim=0)) < 0.9999


def test_what_the_report_keeps_in_higher_precision_is_untouched(build: Build) -> None:
    model = emulate(build("deepseek", num_nextn_predict_layers=1))
    kept = {name for name, module in model.named_modules() if type(module) in (nn.Linear, Linear)}
    assert kept == {"lm_head", "mtp.0.eh_proj"}
    plain = build("deepseek", num_nextn_predict_layers=1)
    hidden = torch.randn(6, 48)
    assert torch.equal(model.head(hidden), plain.head(hidden))
    gate, other = (next(iter(m.gates().values())) for m in (model, plain))
    assert torch.equal(gate(hidden)[0], other(hidden)[0])


def test_what_is_not_finite_stays_so() -> None:
    x = torch.ones(2, 130)
    x[0, 3], x[1, 129] = float("nan"), float("inf")
    out = product(x, torch.ones(4, 130))
    assert not bool(torch.isfinite(out).any())
