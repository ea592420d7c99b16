"""The norm against torch's own, with gradients, in every type it meets."""

import pytest
import torch
from torch.nn import functional as F

from sputnik.model.precision import RMSNorm


def norm(width: int = 24) -> RMSNorm:
    module = RMSNorm(width, 1e-6)
    torch.nn.init.normal_(module.weight, mean=1.0, std=0.3)
    return module


@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 3, 24)])
def test_norm_equals_torch_with_gradients(shape: tuple[int, ...]) -> None:
    module, x = norm(), torch.randn(shape, requires_grad=True)
    ours, theirs = module(x), F.rms_norm(x, (24,), module.weight, 1e-6)
    torch.testing.assert_close(ours, theirs)
    target = torch.randn(shape)
    by_ours = torch.autograd.grad((ours * target).sum(), [x, module.weight])
    torch.testing.assert_close(by_ours, torch.autograd.grad((theirs * target).sum(), [x, module.weight]))
    with torch.no_grad():
        torch.testing.assert_close(module(x), theirs)


def test_norm_of_bf16_activations_is_fp32_in_fp32_weights() -> None:
    module, x = norm(), torch.randn(5, 24).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(x), module(x.float())) and module(x).dtype == torch.float32


def test_a_bf16_model_keeps_bf16() -> None:
    module, x = norm().bfloat16(), torch.randn(5, 24).bfloat16()
    assert module(x).dtype == torch.bfloat16
    torch.testing.assert_close(
        module(x).float(), F.rms_norm(x.float(), (24,), module.weight.float(), 1e-6), atol=0.05, rtol=0.02
    )
