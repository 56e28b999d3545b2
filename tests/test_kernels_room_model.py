"""Rows of new tokens are written behind those that a dynamic cache holds, and nobody else sees it.

On a GPU, or under Triton's interpreter, by way of `test_kernels_interpreter.py`.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache, StaticCache

from tests.conftest import make_tiny_llama
from tests.conversions import convert_coded
from tests.kernel_device import DEVICE, GPU
from tests.test_kernels_model import PROMPT, prompts
from tpa_convert.kernels import tokens as kernel_tokens
from tpa_convert.modeling import tpa_coded
from tpa_convert.modeling.tpa_cache import Room, room_in

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
DTYPE, TOLERANCE = (torch.float16, 5e-2) if GPU else (torch.float32, 2e-5)


@pytest.fixture(scope="module")
def converted():
    """Made on a CPU that is not told to use kernels."""
    return convert_coded(make_tiny_llama(num_hidden_layers=1)).to(DEVICE, DTYPE)


@pytest.fixture(scope="module")
def prompt(converted):
    with torch.no_grad():
        return converted(**prompts(), use_cache=True).past_key_values


@pytest.fixture
def model(converted, monkeypatch):
    monkeypatch.setenv("TPA_CONVERT_BACKEND", "triton")
    return converted


@pytest.fixture
def cache(prompt):
    return copy.deepcopy(prompt)


@torch.no_grad()
def step(model, cache, token):
    ids = torch.full((2, 1), token, device=DEVICE)
    return model(ids, past_key_values=cache).logits


def steps(model, cache, tokens):
    return torch.stack([step(model, cache, token) for token in tokens])


@pytest.fixture
def right(model, prompt, monkeypatch):
    """What tokens give without any room."""

    def of(*tokens):
        with monkeypatch.context() as without:
            without.setattr(tpa_coded, "room_in", lambda *given: None)
            return steps(model, copy.deepcopy(prompt), tokens)

    return of


def close(found, truth):
    return torch.allclose(found, truth, atol=TOLERANCE * truth.abs().max())


def layer_of(cache):
    return cache.layers[0]


def new_rows(model, count):
    """What `room_in` is asked for, behind a cache of two sequences."""
    attention = model.model.layers[0].self_attn
    coders = attention.keys.coder, attention.values.coder
    widths = tuple(coder.layout.row_bytes for coder in coders)
    return 0, torch.zeros(2, count, device=DEVICE), count, widths


def begun(model):
    """The cache of a prompt that went by kernels."""
    with torch.no_grad():
        return model(**prompts(), use_cache=True).past_key_values


def test_a_prompt_goes_where_there_is_room_behind_it(monkeypatch, model) -> None:
    """The first tokens after it need no other."""
    cache = begun(model)
    room, (keys, values) = layer_of(cache).room, layer_of(cache).room.whole
    assert room.slots == PROMPT
    assert keys.shape[2] > PROMPT
    with monkeypatch.context() as without:
        without.setattr(tpa_coded, "room_in", lambda *given: None)
        other = begun(model)
    assert not hasattr(layer_of(other), "room")
    for name in ("keys", "values"):
        assert torch.equal(getattr(layer_of(cache), name), getattr(layer_of(other), name))
    logits = steps(model, cache, (5, 6))
    assert layer_of(cache).room is room
    assert layer_of(cache).keys.data_ptr() == keys.data_ptr()
    assert layer_of(cache).values.data_ptr() == values.data_ptr()
    assert close(logits, steps(model, other, (5, 6)))


def test_two_caches_of_one_prompt(model) -> None:
    one, other = begun(model), begun(model)
    assert layer_of(one).keys.data_ptr() != layer_of(other).keys.data_ptr()
    first = steps(model, one, (5, 6))
    second = steps(model, other, (7, 6))
    assert close(first, steps(model, begun(model), (5, 6)))
    assert not close(first, second)  # control


def test_one_room_is_filled_and_then_a_larger_one(monkeypatch, model, cache, right) -> None:
    monkeypatch.setattr(Room, "least", 1)
    rooms = []
    for token, truth in zip((5, 6, 7, 8), right(5, 6, 7, 8), strict=True):
        assert close(step(model, cache, token), truth)
        rooms.append(layer_of(cache).room)
    assert rooms[0] is rooms[1]
    assert rooms[2] is rooms[3]
    assert rooms[1] is not rooms[2]
    assert cache.get_seq_length() == PROMPT + 4
    layer = layer_of(cache)
    assert layer.keys.data_ptr() == rooms[3].whole[0].data_ptr()
    assert layer.keys.shape[2] == layer.values.shape[2] == PROMPT + 4


@pytest.mark.parametrize("whole", [False, True])
def test_copies_go_their_own_way(model, cache, right, whole) -> None:
    """From one and the same text: of the cache, or of what holds the same tensors."""
    step(model, cache, 5)
    if whole:
        other = copy.deepcopy(cache)
    else:
        other = copy.copy(cache)
        other.layers = [copy.copy(layer) for layer in cache.layers]
        assert layer_of(other).keys is layer_of(cache).keys
    found = [], []
    for tokens in ((6, 8), (7, 9)):
        for one, to, token in zip((cache, other), found, tokens, strict=True):
            to.append(step(model, one, token))
    assert close(torch.stack(found[0]), right(5, 6, 7)[1:])
    assert close(torch.stack(found[1]), right(5, 8, 9)[1:])


def test_what_was_taken_out_stays_as_it_is(model, cache, right) -> None:
    step(model, cache, 5)
    layer = layer_of(cache)
    taken = layer.keys, layer.values
    before = [x.clone() for x in taken]
    steps(model, cache, (6, 7))
    assert all(map(torch.equal, taken, before))
    layer.keys, layer.values = taken  # and can be put back
    assert close(steps(model, cache, (8, 9)), right(5, 8, 9)[1:])


def test_a_cropped_cache(model, cache, right) -> None:
    steps(model, cache, (5, 6, 7))
    longer = layer_of(cache).keys
    before = longer.clone()
    cache.crop(-2)
    assert close(steps(model, cache, (8, 9)), right(5, 8, 9)[1:])
    assert torch.equal(longer, before)


def test_sequences_in_another_order(model, cache, right) -> None:
    step(model, cache, 5)
    cache.reorder_cache(torch.tensor([1, 0], device=DEVICE))
    assert close(steps(model, cache, (6, 7)), right(5, 6, 7)[1:].flip(1))


def test_several_tokens_between(model, cache, right) -> None:
    step(model, cache, 5)
    ids = torch.tensor([[6, 7]] * 2, device=DEVICE)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    assert close(step(model, cache, 8), right(5, 6, 7, 8)[3])


def test_a_cache_on_disk_has_no_room(model, cache, right) -> None:
    step(model, cache, 5)
    again = pickle.loads(pickle.dumps(cache))
    assert layer_of(again).room is None
    assert close(step(model, again, 6), right(5, 6)[1])


def test_two_threads_write_rows_of_their_own(model) -> None:
    """When both have looked for room before either has taken it."""
    cache, given = begun(model), new_rows(model, 1)
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    one, two = room_in(cache, *given), room_in(other, *given)
    assert one is not two
    assert one.slots == two.slots == PROMPT
    assert torch.equal(two.whole[0][:, :, :PROMPT], one.whole[0][:, :, :PROMPT])
    one.take(layer_of(cache), 1)
    two.take(layer_of(other), 1)
    assert room_in(cache, *given) is one
    assert room_in(other, *given) is two


class Own(DynamicCache):
    """Whoever updates in another way is to be asked."""


@pytest.mark.parametrize("kind", ["own", "offloaded", "static", "sliding", "numbers", "empty"])
def test_other_caches_are_updated_as_ever(converted, prompt, kind) -> None:
    given = new_rows(converted, 5)
    assert room_in(copy.deepcopy(prompt), *given) is not None  # controls
    assert room_in(DynamicCache(config=converted.config), *given) is not None
    cache = copy.deepcopy(prompt)
    if kind == "own":
        cache.__class__ = Own
    elif kind == "offloaded":
        cache.offloading = True
    elif kind == "static":
        cache = StaticCache(converted.config, max_cache_len=8)
    elif kind == "sliding":
        cache.layers[0].__class__ = type("Sliding", (type(cache.layers[0]),), {})
    elif kind == "numbers":
        layer_of(cache).keys = layer_of(cache).keys.float()
    else:
        cache = DynamicCache()
    assert room_in(cache, *given) is None


def test_a_cache_of_other_sequences_is_refused(model, cache) -> None:
    """By the cache itself: no row is written where none is."""
    token = torch.full((3, 1), 5, device=DEVICE)
    with pytest.raises(RuntimeError, match=r"[Ss]izes of tensors must match"), torch.no_grad():
        model(token, past_key_values=cache)


@pytest.mark.parametrize("tokens", [1, 2])
def test_many_sequences_and_several_tokens_need_no_copies(monkeypatch, model, tokens) -> None:
    """Where modules project, rows still go where there is room."""
    monkeypatch.setattr(kernel_tokens, "MOST_TOKENS", 1)
    cache = begun(model)
    room, ids = layer_of(cache).room, torch.tensor([[5, 6]] * 2, device=DEVICE)[:, :tokens]
    with torch.no_grad():
        found = model(ids, past_key_values=cache).logits
    assert layer_of(cache).room is room
    assert room.slots == PROMPT + tokens
    assert layer_of(cache).keys.data_ptr() == room.whole[0].data_ptr()
    with monkeypatch.context() as without:
        without.setattr(tpa_coded, "room_in", lambda *given: None)
        other = begun(model)
        with torch.no_grad():
            assert close(found, model(ids, past_key_values=other).logits)
    assert torch.equal(layer_of(cache).keys, layer_of(other).keys)
