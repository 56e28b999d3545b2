"""What a coder keeps follows its buffers."""

from __future__ import annotations

import copy

import pytest
import torch

from tpa_convert.modeling.tpa_coder import RowCoder
from tpa_convert.modeling.tpa_codes import RowLayout

FACTOR = torch.linspace(0.1, 9.0, 10)


def random_coder() -> RowCoder:
    generator = torch.Generator().manual_seed(0)
    coder = RowCoder(RowLayout(((2, 6), (3, 4))))
    coder.mean.normal_(generator=generator)
    for scale in (coder.step, coder.spread, coder.importance):
        scale.uniform_(0.2, 1.0, generator=generator)
    return coder


def in_place(coder: RowCoder, name: str) -> None:
    getattr(coder, name).mul_(FACTOR)


def as_another(coder: RowCoder, name: str) -> None:
    setattr(coder, name, getattr(coder, name) * FACTOR)


def as_data(coder: RowCoder, name: str) -> None:
    getattr(coder, name).data = getattr(coder, name) * FACTOR


@pytest.mark.parametrize("name", ["mean", "step", "spread", "importance"])
@pytest.mark.parametrize("change", [in_place, as_another, as_data])
@pytest.mark.parametrize("inference", [False, True])
def test_changed_buffers_are_seen(name, change, inference) -> None:
    x = torch.randn(50, 10, generator=torch.Generator().manual_seed(1))
    coder = random_coder()
    with torch.inference_mode(inference):
        before = coder(x), coder(x, rows=True)[0]
    change(coder, name)
    fresh = RowCoder(coder.layout)
    fresh.load_state_dict(coder.state_dict())
    rows, _ = coder(x, rows=True)
    assert torch.equal(coder(x), fresh(x))
    assert torch.equal(rows, fresh(x, rows=True)[0])
    assert not torch.equal(coder(x), before[0])  # control
    assert not torch.equal(rows, before[1])


def test_a_copy_has_its_own() -> None:
    x = torch.randn(50, 10, generator=torch.Generator().manual_seed(1))
    coder = random_coder()
    before = coder(x)
    other = copy.deepcopy(coder)
    other.step.mul_(3.0)
    assert not torch.equal(other(x), before)
    assert torch.equal(coder(x), before)


def test_what_is_kept_in_inference_mode_serves_training() -> None:
    coder = random_coder()
    x = torch.randn(50, 10, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        coder(x)
    x.requires_grad_()
    coder(x).sum().backward()
    assert x.grad.count_nonzero()
