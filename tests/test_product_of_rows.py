"""Products whose rows begin at multiples of 16 bytes."""

import pytest
import torch
from torch import nn

from tpa_convert.modeling.tpa_kernels import product_of_rows


@pytest.mark.parametrize("width", [21, 24])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_what_the_module_makes(width, bias, dtype) -> None:
    module, x = nn.Linear(16, width, bias=bias, dtype=dtype), torch.randn(2, 3, 16, dtype=dtype)
    with torch.no_grad():
        found = product_of_rows(module, x)
        torch.testing.assert_close(found, module(x).view(6, width))
        assert found.stride(0) * found.element_size() % 16 == 0
        found += 1  # in place, as predictions are taken off
        torch.testing.assert_close(found, module(x).view(6, width) + 1)


def test_leaves_to_a_module_what_only_that_does() -> None:
    module, x = nn.Linear(16, 21), torch.randn(2, 3, 16)
    assert product_of_rows(module, x).grad_fn is not None
    module.register_forward_hook(lambda *_: torch.zeros(2, 3, 21))
    with torch.no_grad():
        found = product_of_rows(module, x)
    assert found.shape == (6, 21)
    assert not found.any()
