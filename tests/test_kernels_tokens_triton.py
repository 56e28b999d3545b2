"""The kernels that take in single tokens and that project what attention gives, against products in
fp64, on a GPU or under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.kernel_device import DEVICE, GPU
from tpa_convert.kernels import (
    OutputMap,
    attend_on_kernel,
    take_in,
    token_tables,
)
from tpa_convert.kernels.encode import rows_on_kernel
from tpa_convert.kernels.encode_reference import CodeTables, row_codes, row_tables
from tpa_convert.kernels.launch_latent import launch_latent
from tpa_convert.kernels.rows import whole_words

from .encode_cases import random_tables
from .kernel_cases import error, random_layout
from .latent_cases import random_case

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
DTYPES = [torch.float16, torch.bfloat16] if GPU else [torch.float32, torch.float16]
OF_TOKENS = [torch.float32, *DTYPES] if GPU else DTYPES  # attention in 32 bits has no kernel there
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
CODES = [(4, 10), (3, 7), (2, 20)], [(8, 3), (2, 30), (1, 9)]
some = settings(
    max_examples=50 if GPU else 8,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # the interpreter is too slow to shrink
    suppress_health_check=[HealthCheck.too_slow],
)


class Token:
    """A layer and a token of each of a few sequences."""

    def __init__(self, tokens, heads, head_dim, size, biased, predicted, shared, dtype, seed):
        self.generator = generator = torch.Generator().manual_seed(seed)
        self.head_dim, self.dtype = head_dim, dtype
        coders, widths = [], []
        for runs in CODES:
            layout, row_bytes = random_layout(runs, 2, generator)
            widths.append(sum(count for _, count in runs))
            tables = random_tables(widths[-1], 2, generator)
            coders.append((tables, row_tables(layout.tiers, layout.header, row_bytes)))
        self.coders, self.widths = coders, widths
        self.states = self.random(tokens, 1, size)
        sizes = heads * head_dim, *widths
        self.weights = [self.random(n, size) / size**0.5 for n in sizes]
        self.biases = [
            self.random(n) if used else None for n, used in zip(sizes, biased, strict=True)
        ]
        self.prediction = self.random(widths[1], whole_words(widths[0] + 1)) if predicted else None
        angle = 3 * torch.randn(1 if shared else tokens, 1, 1, head_dim, generator=generator)
        self.table = angle.cos().to(DEVICE, dtype), angle.sin().to(DEVICE, dtype)

    def random(self, *shape):
        return torch.randn(*shape, generator=self.generator).to(DEVICE, self.dtype)

    def codes(self):
        return [
            row_codes(
                CodeTables(*(x.to(DEVICE) for x in tables[:5])),
                type(rows)(*(x.to(DEVICE) for x in rows[:3]), rows.header),
            )
            for tables, rows in self.coders
        ]

    def found(self):
        tables = token_tables(*self.codes(), self.prediction)
        given = self.states, self.weights, self.biases, tables, *self.table
        first = take_in(*given, self.head_dim)
        again = take_in(*given, self.head_dim)  # with what was worked out for the first
        assert all(map(torch.equal, first, again))
        return first

    def truth(self):
        """Queries, and rows by the kernel that is tested by itself."""
        x = self.states[:, 0].double()
        query, key, value = (
            x @ weight.double().T + (0 if bias is None else bias.double())
            for weight, bias in zip(self.weights, self.biases, strict=True)
        )
        query = query.view(len(x), -1, 1, self.head_dim)
        cos, sin = (part.double() for part in self.table)
        query = query * cos + query.roll(self.head_dim // 2, -1) * sin
        codes_k, codes_v = self.codes()
        key_rows, features = rows_on_kernel(key.to(self.dtype), codes_k)
        if self.prediction is not None:
            value = value.to(self.dtype).double() - features.double() @ self.prediction.double().T
        value_rows, _ = rows_on_kernel(value.to(self.dtype), codes_v)
        return query, key_rows[:, None, None], value_rows[:, None, None]


def differing(a, b):
    return (a != b).float().mean().item()


@some
@given(
    tokens=st.sampled_from([1, 1, 2, 5, 16, 40]),
    heads=st.sampled_from([1, 3, 8]),
    head_dim=st.sampled_from([8, 16, 96]),
    size=st.sampled_from([8, 40, 64, 264]),
    biased=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    predicted=st.booleans(),
    shared=st.booleans(),
    dtype=st.sampled_from(OF_TOKENS),
    seed=st.integers(0, 2**31),
)
def test_tokens(**case) -> None:
    token = Token(**case)
    found, truth = token.found(), token.truth()
    assert all(a.shape == b.shape for a, b in zip(found, truth, strict=True))
    assert error(found[0], truth[0]) < TOLERANCE[token.dtype]
    # A component between two codes may fall to either side, and, in 16 bits now and then, a token
    # between two scales.
    exact, several = token.dtype == torch.float32, len(token.states) >= 5
    for rows, right in zip(found[1:], truth[1:], strict=True):
        assert differing(rows, right) <= (0.02 if exact else 0.3 if several else 1)


@pytest.fixture
def token():
    case = {"tokens": 3, "heads": 2, "head_dim": 16, "size": 64, "predicted": True, "shared": False}
    return Token(**case, biased=(True, True, True), dtype=OF_TOKENS[0], seed=0)


@pytest.mark.parametrize("part", range(3))
def test_every_projection_matters(token, part) -> None:
    """Control: another weight or bias shows in its part, and a key's in what values take off."""
    truth = token.truth()
    for parts in (token.weights, token.biases):
        right = parts[part]
        parts[part] = right.roll(1, 0)
        wrong = token.found()
        parts[part] = right
        if part == 0:
            assert error(wrong[0], truth[0]) > 0.1
        else:
            assert error(wrong[0], truth[0]) < TOLERANCE[token.dtype]
        assert (differing(wrong[1], truth[1]) > 0.1) == (part == 1)
        assert (differing(wrong[2], truth[2]) > 0.1) == (part > 0)


def test_normalised_queries(token) -> None:
    """Rounded on the way."""
    tables = token_tables(*token.codes(), token.prediction)
    given = token.states, token.weights, token.biases, tables, *token.table, token.head_dim
    plain = take_in(*given)
    for _ in range(2):
        other = take_in(*given, lambda query: (2 * query.float()).view(3, 1, -1, 16).mT.mT)
        assert error(other[0], 2 * plain[0].double()) < TOLERANCE[token.dtype]
        assert all(map(torch.equal, plain[1:], other[1:]))


def test_prediction_and_tables_matter(token) -> None:
    truth = token.truth()
    token.prediction = token.prediction.roll(1, 0)
    assert differing(token.found()[2], truth[2]) > 0.1
    token.table = token.table[::-1]
    assert error(token.found()[0], truth[0]) > 0.1


@some
@given(
    shape=st.sampled_from([(4, 2, 16), (9, 3, 32), (6, 6, 24), (5, 1, 8), (16, 2, 64)]),
    batch=st.sampled_from([1, 2, 5, 20]),
    size=st.sampled_from([8, 40, 264]),
    biased=st.tuples(st.booleans(), st.booleans()),
    softcap=st.sampled_from([None, 3.0]),
    masked=st.booleans(),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(DTYPES),
)
def test_output(shape, batch, size, biased, softcap, masked, seed, dtype) -> None:
    found, truth, _ = outputs(shape, batch, size, biased, softcap, masked, seed, dtype)
    assert found.shape == (batch, 1, size)
    assert error(found, truth) < TOLERANCE[dtype]


def outputs(shape, batch, size, biased, softcap, masked, seed, dtype, wrong=None):
    """What the kernels give, what products in fp64 make of the features, and the map."""
    codes = ([[(4, 8), (2, 8)]], [(8, 3), (4, 5), (2, 8)])
    case = random_case(
        shape=shape, codes=codes, slots=50, batch=batch, dtype=dtype, device=DEVICE, seed=seed
    )
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    heads, groups, head_dim = shape
    features = case.tables.place_of.shape[1]
    output_map = OutputMap(
        random(groups, head_dim, features) / features**0.5,
        random(groups, head_dim) if biased[0] else None,
        random(size, heads * head_dim) / (heads * head_dim) ** 0.5,
        random(size) if biased[1] else None,
    )
    mask = None
    if masked:
        mask = torch.rand(batch, 50, generator=generator).to(DEVICE) > 0.3
    bounds = None, None, None
    mixed = launch_latent(*case.call(), 0.3, *bounds, softcap, mask, None)
    gauge, offset, projection, bias = (None if x is None else x.double() for x in output_map)
    mixed = mixed.double().view(batch, groups, -1, features)
    made = torch.einsum("bjnw,jdw->bjnd", mixed, gauge)
    made = made if offset is None else made + offset[:, None]
    truth = made.reshape(batch, 1, -1) @ projection.T + (0 if bias is None else bias)
    if wrong is not None:
        right = getattr(output_map, wrong)
        output_map = output_map._replace(**{wrong: right.roll(1, 0)})
    found = attend_on_kernel(*case.call(), 0.3, softcap, mask, output_map)
    again = attend_on_kernel(*case.call(), 0.3, softcap, mask, output_map)
    assert torch.equal(found, again)
    return found, truth, output_map


@pytest.mark.parametrize("part", OutputMap._fields)
def test_every_part_of_the_map_matters(part) -> None:
    given = (4, 2, 16), 2, 40, (True, True), None, False, 0, DTYPES[0]
    found, truth, _ = outputs(*given, wrong=part)
    assert error(found, truth) > 0.05


def test_what_was_worked_out_for_other_tables_is_not_taken(token) -> None:
    """Tables that are replaced keep the same store."""
    codes = ([[(4, 8), (2, 8)]], [(8, 3), (4, 5), (2, 8)])
    case = random_case(codes=codes, slots=50, dtype=DTYPES[0], device=DEVICE)
    first = launch_latent(*case.call(), 0.3, None, None, None, None)
    tables = case.tables._replace(step=case.tables.step * 2)
    assert tables.launches is case.tables.launches
    other = launch_latent(*case.call()[:5], tables, 0.3, None, None, None, None)
    assert error(other, first.double()) > 0.1
    tables = token_tables(*token.codes(), token.prediction)
    given = token.states, token.weights, token.biases
    _, _, rows = take_in(*given, tables, *token.table, token.head_dim)
    tables = tables._replace(prediction=tables.prediction * 2)
    _, _, others = take_in(*given, tables, *token.table, token.head_dim)
    assert differing(rows, others) > 0.1


def test_rows_go_where_there_is_room(token) -> None:
    """In the slot that is named, and nowhere else."""
    tables = token_tables(*token.codes(), token.prediction)
    given = token.states, token.weights, token.biases, tables, *token.table, token.head_dim
    query, *rows = take_in(*given)
    for slots, slot in ((5, 3), (5, 0), (9, 8)):
        room = [torch.full((3, 1, slots, x.shape[-1]), 7, dtype=torch.uint8) for x in rows]
        room = [x.to(DEVICE) for x in room]
        expected = [x.clone() for x in room]
        for x, row in zip(expected, rows, strict=True):
            x[:, :, slot] = row[:, :, 0]
        found, *written = take_in(*given, None, (*room, slot))
        assert torch.equal(found, query)
        assert all(map(torch.equal, written, expected))
