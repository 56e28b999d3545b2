"""Packing is exact; quantising is what it says, follows tokens' numbers, and has gradients."""

import ast
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tpa_convert.modeling import tpa_codes as codes_module
from tpa_convert.modeling.tpa_codes import (
    LOWEST_OCTAVE,
    MAX_BITS,
    Quantiser,
    RowLayout,
    choose_header,
    decode,
    encode,
    highest_codes,
    pack_rows,
    scale_of,
    straight_through,
    unpack_rows,
)

layouts = st.builds(
    lambda groups, align: RowLayout(tuple(sorted(groups.items(), reverse=True)), align),
    st.dictionaries(st.integers(1, MAX_BITS), st.integers(1, 70)),
    st.sampled_from((1, 2, 4, 16)),
)


def random_codes(layout: RowLayout, *shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (*shape, layout.components), generator=generator)
    return (codes % (2 ** torch.tensor(layout.bits, dtype=torch.long))).to(torch.uint8)


def quantiser(layout: RowLayout, classes: int = 2, seed: int = 0) -> Quantiser:
    """Components of spread 1 around 0 and, class by class, around far means."""
    generator = torch.Generator().manual_seed(seed)
    mean = 20 * torch.randn(classes, layout.components, generator=generator)
    mean[0] = 0
    step = 3.0 / 2.0 ** torch.tensor(layout.bits)
    importance = torch.rand(layout.components, generator=generator) + 0.1
    spread = torch.ones(layout.components)
    return Quantiser(layout, mean, step, spread, importance, highest_codes(layout))


def numbers(q: Quantiser, kept: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Components of what codes say and of the means of classes."""
    said, label = kept
    return said + q.mean[label]


@settings(deadline=None, max_examples=60)
@given(layouts, st.integers(0, 2**30))
def test_packing_is_exact(layout, seed):
    codes = random_codes(layout, 2, 3, seed=seed)
    header = torch.randint(0, 256, (2, 3), dtype=torch.uint8)
    rows = pack_rows(codes, header, layout)
    assert rows.shape == (2, 3, layout.row_bytes)
    assert rows.dtype == torch.uint8
    unpacked, unpacked_header = unpack_rows(rows, layout)
    assert torch.equal(unpacked, codes)
    assert torch.equal(unpacked_header, header)


@settings(deadline=None, max_examples=30)
@given(layouts, st.integers(0, 2**30), st.data())
def test_each_bit_of_a_row_means_something_or_is_padding(layout, seed, data):
    """A flipped bit changes one code or the header, or it is padding: nothing is stored twice."""
    codes = random_codes(layout, 1, seed=seed)
    rows = pack_rows(codes, torch.zeros(1, dtype=torch.uint8), layout)
    used = sum(layout.bits) + 8
    position = data.draw(st.integers(0, 8 * layout.row_bytes - 1))
    rows[0, position // 8] ^= 1 << position % 8
    changed, header = unpack_rows(rows, layout)
    differences = (changed != codes).sum().item() + int(header.item() != 0)
    assert differences <= 1
    if layout.row_bytes * 8 == used:
        assert differences == 1


def test_layout_by_hand():
    """What kernels read: planes of bytes, low bits first, three bits in two tiers, header last."""
    layout = RowLayout(((4, 4), (3, 8)), align=2)
    codes = torch.tensor([[1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6, 7]], dtype=torch.uint8)
    rows = pack_rows(codes, torch.tensor([9], dtype=torch.uint8), layout)
    expected = [
        0x31, 0x42,  # 4 bits: component i in the low half, i + 2 in the high half
        0b10_00_10_00, 0b11_01_11_01,  # lowest two bits of 0 2 4 6 and of 1 3 5 7
        0b0_0_0_0_1_1_0_0, 0b0_0_0_0_1_1_0_0,  # highest bits of 0 2 4 6 and of 1 3 5 7
        9, 0,
    ]  # fmt: skip
    assert rows.tolist() == [expected]


def test_tiers_are_aligned_and_apart():
    layout = RowLayout(((8, 3), (5, 7), (3, 33), (1, 1)), align=4)
    end = 0
    for tier in layout.tiers:
        assert tier.offset == end
        assert tier.size % 4 == 0
        assert 8 * tier.size >= tier.bits * tier.components
        end += tier.size
    assert layout.header == end
    assert layout.row_bytes == end + 4  # the header, and bytes to make whole words


@settings(deadline=None, max_examples=60)
@given(layouts)
def test_rows_are_whole_words(layout):
    assert layout.row_bytes % 4 == 0
    assert 0 <= layout.row_bytes - layout.header - 1 < 4  # and no word more than needed


@pytest.mark.parametrize("bits", [0, 9])
def test_impossible_bits_are_refused(bits):
    with pytest.raises(ValueError, match="bits a code"):
        _ = RowLayout(((bits, 3),)).row_bytes


def test_wrong_shapes_are_refused():
    layout = RowLayout(((2, 5),))
    with pytest.raises(ValueError, match="components"):
        pack_rows(torch.zeros(4, dtype=torch.uint8), torch.zeros((), dtype=torch.uint8), layout)
    with pytest.raises(ValueError, match="bytes in a layout"):
        unpack_rows(torch.zeros(7, dtype=torch.uint8), layout)


@settings(deadline=None, max_examples=40)
@given(layouts.filter(lambda layout: layout.groups), st.integers(0, 2**30))
def test_what_is_attended_to_is_what_is_cached(layout, seed):
    q = quantiser(layout, seed=seed % 7)
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp2(8 * torch.rand(2, 5, 1, generator=generator) - 5)
    x = spread * torch.randn(2, 5, layout.components, generator=generator)
    kept, label = decode(encode(x, q), q)
    trained, trained_label = straight_through(x, q)
    torch.testing.assert_close(trained, kept, rtol=1e-5, atol=1e-5)
    assert torch.equal(label, trained_label)
    # negative control: what is not rounded differs
    assert (x - q.mean[label] - kept).abs().max() > 1e-3


@settings(deadline=None, max_examples=40)
@given(layouts.filter(lambda layout: layout.groups), st.integers(0, 2**30))
def test_error_is_at_most_half_a_step_where_nothing_is_clipped(layout, seed):
    q = quantiser(layout, classes=1)
    x = torch.randn(4, layout.components, generator=torch.Generator().manual_seed(seed))
    rows = encode(x, q)
    scale, _ = scale_of(unpack_rows(rows, layout)[1], q)
    step = scale * q.step
    inside = x.abs() <= step * (q.reach + 0.5)
    error = (numbers(q, decode(rows, q)) - x).abs()
    assert (error <= 0.5001 * step)[inside].all()
    # negative control: a quarter of a step would be too much to ask
    if inside.sum() > 40:
        assert not (error <= 0.25 * step)[inside].all()


def test_chosen_scale_is_the_best_of_those_tried():
    layout = RowLayout(((4, 8), (2, 24)))
    q = quantiser(layout, classes=1)
    x = 3 * torch.randn(50, 32, generator=torch.Generator().manual_seed(1))
    header = choose_header(x, q)

    def error(header):
        scale = scale_of(header, q)[0] * q.step
        code = (x / scale + q.reach).round().clamp_min(0).minimum(2 * q.reach) - q.reach
        return ((x - code * scale).square() * q.importance).sum(-1)

    for shift in (-8, -4, 4, 8):  # half octaves and octaves away
        assert (error(header) <= error((header.int() + shift).to(torch.uint8)) + 1e-5).all()
    assert error(header).sum() < 0.7 * error(torch.full_like(header, -8 * LOWEST_OCTAVE)).sum()


def test_scale_follows_the_token():
    layout = RowLayout(((3, 64),))
    q = quantiser(layout, classes=1)
    x = torch.randn(64, generator=torch.Generator().manual_seed(0))
    sizes = torch.tensor([2.0**-5, 1.0, 2.0**5])
    scale, _ = scale_of(choose_header(sizes[:, None] * x, q), q)
    torch.testing.assert_close(scale[:, 0] / scale[1, 0], sizes, rtol=1e-5, atol=0)
    error = (decode(encode(sizes[:, None] * x, q), q)[0] - sizes[:, None] * x).norm(dim=-1) / sizes
    torch.testing.assert_close(error, error[1].expand(3), rtol=1e-3, atol=1e-4)


def test_tokens_of_no_size_and_of_any_size_survive():
    layout = RowLayout(((2, 16),))
    q = quantiser(layout)
    x = torch.stack((q.mean[0], q.mean[1], q.mean[1] + 1e6, torch.full((16,), 1e-30)))
    kept, label = decode(encode(x, q), q)
    kept = kept + q.mean[label]
    assert kept.isfinite().all()
    assert label[:2].tolist() == [0, 1]
    assert ((kept - x)[:2].abs() <= 2.0**LOWEST_OCTAVE * q.step.max()).all()


def test_rows_without_codes():
    q = quantiser(RowLayout(()))
    rows = encode(torch.zeros(3, 0), q)
    assert rows.shape == (3, 4)  # a header in a word
    assert decode(rows, q)[0].shape == (3, 0)


def test_sinks_are_told_by_their_numbers_not_by_their_place():
    layout = RowLayout(((2, 32),))
    q = quantiser(layout)
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randn(9, 32, generator=generator)
    tokens[4] = q.mean[1] + 0.01 * torch.randn(32, generator=generator)
    order = torch.randperm(9, generator=generator)
    rows = encode(tokens, q)
    assert torch.equal(encode(tokens[order], q), rows[order])
    kept, label = decode(rows, q)
    kept = kept + q.mean[label]
    assert label.tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0]
    assert (kept - tokens)[4].norm() < 0.02 * (kept - tokens)[0].norm()
    # negative control: without a class of its own, the sink is lost
    alone = q._replace(mean=q.mean[:1])
    assert (decode(encode(tokens, alone), alone)[0] - tokens)[4].norm() > 10


def test_gradients_pass_rounding():
    """That of the identity for all that a code can say, and none for what is clipped."""
    layout = RowLayout(((3, 6), (1, 10)))
    q = quantiser(layout)
    x = torch.randn(20, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    kept, label = straight_through(x, q)
    weight = torch.randn_like(kept)
    (kept * weight).sum().backward()
    with torch.no_grad():
        scale, _ = scale_of(choose_header(x, q), q)
        u = ((x - q.mean[label]) / (scale * q.step)).abs()
        inside, clipped = u < q.reach + 0.5 - 1e-3, u > q.reach + 0.5 + 1e-3
        torch.testing.assert_close(x.grad[inside], weight[inside])
        assert (x.grad[clipped] == 0).all()
        assert clipped.any()
        assert inside.any()
    # negative control: codes themselves pass nothing on
    assert not decode(encode(x, q), q)[0].requires_grad


def test_codes_travel_alone():
    """The module goes into exports: it imports torch, the standard library and its neighbours."""
    path = Path(codes_module.__file__)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    neighbours = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            (neighbours if node.level == 1 else imported).add(node.module)
    tops = {name.split(".")[0] for name in imported}
    assert tops == {"dataclasses", "typing", "torch"}
    assert not neighbours
    assert (path.parent / "tpa_kernels.py").exists()
