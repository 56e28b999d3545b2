"""Coded layers take in a token, and project what attention gives, by kernels of their own only
where projections are nothing but products.

On a GPU, or under Triton's interpreter, by way of `test_kernels_interpreter.py`.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import DynamicCache

from tests.conftest import make_tiny_llama
from tests.conversions import convert_coded
from tests.kernel_device import DEVICE, GPU
from tests.test_kernels_model import PROMPT, prompts
from tests.tiny_models import MODELS
from tpa_convert.forward.walk import attention_modules
from tpa_convert.kernels import tokens

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
DTYPE, TOLERANCE = (torch.float16, 5e-2) if GPU else (torch.float32, 2e-5)


@pytest.fixture(scope="module")
def converted():
    """Made on a CPU that is not told to use kernels."""
    sources = {"llama": make_tiny_llama(num_hidden_layers=1)}
    sources |= {name: MODELS[name]() for name in ("qwen2", "qwen3", "olmo2")}
    return {name: convert_coded(source).to(DEVICE, DTYPE) for name, source in sources.items()}


@pytest.fixture
def llama(converted, monkeypatch):
    monkeypatch.setenv("TPA_CONVERT_BACKEND", "triton")
    return copy.deepcopy(converted["llama"])


@pytest.fixture(scope="module")
def cache(converted):
    """Of a prompt, that steps take copies of."""
    with torch.no_grad():
        return converted["llama"](**prompts(), use_cache=True).past_key_values


@pytest.fixture(scope="module")
def before(converted, cache):
    """What is right as long as nobody changes anything."""
    return step(converted["llama"], cache)


class Counted:
    """How often layers of a model took in tokens and projected by kernels; `stopped` for those
    that never do."""

    def __init__(self, model, stopped=False):
        self.taken_in = self.attended = 0
        for attention in attention_modules(model):
            layer = attention.coded
            take_in, attend = layer.kernels.take_in, layer.kernels.attend
            layer.kernels = layer.kernels._replace(
                take_in=lambda *a, real=take_in: self.took(real, a),
                attend=lambda *a, real=attend: self.attends(real, a),
                takes_in=(lambda *a: False) if stopped else layer.kernels.takes_in,
            )

    def took(self, real, given):
        self.taken_in += 1
        return real(*given)

    def attends(self, real, given):
        self.attended += 1
        return real(*given)


TOKEN = torch.full((2, 1), 7, device=DEVICE)


@torch.no_grad()
def step(model, cache, token=TOKEN, **settings):
    return model(token, past_key_values=copy.deepcopy(cache), **settings).logits


def close(found, truth):
    return torch.allclose(found, truth, atol=TOLERANCE * truth.abs().max())


@pytest.mark.parametrize(
    ("family", "padded"),
    [("llama", 5), ("qwen2", 0), ("qwen3", 5), ("olmo2", 0)],  # biases, norms, norms of all heads
)
def test_what_they_give_is_what_modules_give(monkeypatch, converted, family, padded) -> None:
    monkeypatch.setenv("TPA_CONVERT_BACKEND", "triton")
    inputs, found = prompts(padded), []
    for stopped in (False, True):
        one = copy.deepcopy(converted[family])
        counted = Counted(one, stopped)
        output = one.generate(
            **inputs,
            max_new_tokens=2,
            min_new_tokens=2,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        found.append(torch.stack(output.logits))
        count = 0 if stopped else len(attention_modules(one))
        assert (counted.taken_in, counted.attended) == (count, count)
    assert close(*found)
    assert not close(found[0], found[1].roll(1, 0))  # control: another token's


def test_one_sequence_and_too_many(monkeypatch, llama) -> None:
    """One token has a kernel of its own; for many, modules are as fast."""
    monkeypatch.setattr(tokens, "MOST_TOKENS", 3)
    counted = Counted(llama)
    other = copy.deepcopy(llama)
    Counted(other, stopped=True)
    for batch, times in ((1, 1), (3, 1), (4, 0)):
        ids = torch.randint(3, 128, (batch, 5), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            cache = llama(ids.to(DEVICE), use_cache=True).past_key_values
        counted.taken_in = counted.attended = 0
        token = TOKEN[:1].expand(batch, -1)
        assert close(step(llama, cache, token), step(other, cache, token))
        assert (counted.taken_in, counted.attended) == (times, times)


PARTS = {
    "query": ("q_proj", lambda attention: attention),
    "key": ("feature_factor", lambda attention: attention.keys),
    "value": ("feature_factor", lambda attention: attention.values),
    "output": ("o_proj", lambda attention: attention),
}


def doubled(module, arguments, output):
    return 2 * output


class Doubled(nn.Linear):
    """Stands for what quantises or adapts."""

    def forward(self, x):
        return 2 * super().forward(x)


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


class Weight(torch.Tensor):
    """Stands for weights that are quantised or on several devices."""


def doubled_class(owner, name):
    linear = getattr(owner, name)
    other = Doubled(linear.in_features, linear.out_features, linear.bias is not None)
    setattr(owner, name, other.to(DEVICE, DTYPE))
    getattr(owner, name).load_state_dict(linear.state_dict())


def doubled_forward(owner, name):
    """As offloading does it."""
    linear = getattr(owner, name)
    plain = linear.forward
    linear.forward = lambda x: 2 * plain(x)


def doubled_weight(owner, name):
    linear = getattr(owner, name)
    weight = linear.weight.detach().as_subclass(Weight)
    linear.weight = nn.Parameter(2 * weight, requires_grad=False)
    if linear.bias is not None:
        linear.bias.data.mul_(2)


WAYS = {
    "hook": lambda owner, name: getattr(owner, name).register_forward_hook(doubled),
    "hook before": lambda owner, name: getattr(owner, name).register_forward_pre_hook(
        lambda module, x: (2 * x[0],)
    ),
    "class": doubled_class,
    "forward": doubled_forward,
    "parametrisation": lambda owner, name: parametrize.register_parametrization(
        getattr(owner, name), "weight", Double()
    ),
    "weight": doubled_weight,
}


@pytest.mark.parametrize(
    ("part", "way"),
    [*(("key", way) for way in WAYS), *((part, "hook") for part in PARTS if part != "key")],
)
def test_who_changes_a_projection_is_heard(llama, cache, before, part, way) -> None:
    """In the middle of a cache too: the same as a model whose projection has twice the weight."""
    name, owner_of = PARTS[part]
    counted, other = Counted(llama), copy.deepcopy(llama)
    step(llama, cache)
    attention = attention_modules(llama)[0]
    WAYS[way](owner_of(attention), name)
    counted.taken_in = counted.attended = 0
    found = step(llama, cache)
    times = (1, 0) if part == "output" else (0, 1)
    assert (counted.taken_in, counted.attended) == times
    linear = getattr(owner_of(attention_modules(other)[0]), name)
    linear.weight.data.mul_(2)
    if linear.bias is not None and way in ("hook", "class", "forward", "weight"):
        linear.bias.data.mul_(2)
    Counted(other, stopped=True)
    assert close(found, step(other, cache))
    assert not close(found, before)


def test_a_hook_on_all_modules_is_heard(llama, cache) -> None:
    counted, seen = Counted(llama), []
    step(llama, cache)
    counted.taken_in = counted.attended = 0
    handle = nn.modules.module.register_module_forward_hook(lambda *given: seen.append(given[0]))
    step(llama, cache)
    handle.remove()
    assert counted.taken_in == counted.attended == 0
    assert attention_modules(llama)[0].q_proj in seen


@pytest.mark.parametrize(
    ("part", "how"),
    [*((part, "in place") for part in PARTS), ("query", "data"), ("key", "another")],
)
def test_changed_parameters_show_at_the_next_token(llama, cache, before, part, how) -> None:
    name, owner_of = PARTS[part]
    counted = Counted(llama)
    step(llama, cache)
    linear = getattr(owner_of(attention_modules(llama)[0]), name)
    with torch.no_grad():
        if how == "in place":
            linear.weight.mul_(2)
        elif how == "data":
            linear.weight.data = 2 * linear.weight.data
        else:
            linear.weight = nn.Parameter(2 * linear.weight)
    found = step(llama, cache)
    assert counted.taken_in == counted.attended == 2
    other = copy.deepcopy(llama)
    Counted(other, stopped=True)
    assert close(found, step(other, cache))
    assert not close(found, before)


def test_adapters_are_heard(llama, cache, before) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(copy.deepcopy(llama), config).eval()
    counted = Counted(adapted.base_model.model)
    found = step(adapted, cache)
    assert counted.taken_in == counted.attended == 0
    assert not close(found, before)
    merged = adapted.merge_and_unload()
    counted.taken_in = counted.attended = 0
    assert close(step(merged, cache), found)
    assert counted.taken_in == counted.attended == 1


@contextmanager
def autocast():
    with torch.autocast(DEVICE.type, torch.bfloat16):
        yield


@contextmanager
def gradients():
    with torch.enable_grad():
        yield


@pytest.mark.parametrize("context", [autocast, gradients])
def test_other_types_and_gradients_take_the_other_path(llama, cache, context) -> None:
    llama = llama.float()
    counted = Counted(llama)
    with torch.no_grad(), context():
        output = llama(TOKEN, past_key_values=copy.deepcopy(cache))
    assert counted.taken_in == counted.attended == 0
    assert (output.logits.grad_fn is not None) == (context is gradients)


def test_compiled(llama, cache) -> None:
    """A compiler is given operators that it knows."""
    counted = Counted(llama)
    compiled = torch.compile(llama, backend="aot_eager")
    found = step(compiled, cache)
    assert counted.taken_in == counted.attended == 0
    assert close(found, step(llama, cache))
    assert counted.taken_in == counted.attended == 1


def test_several_tokens_take_the_other_path(llama, cache) -> None:
    counted = Counted(llama)
    step(llama, cache, TOKEN.expand(-1, 3))
    assert counted.taken_in == counted.attended == 0
    assert DynamicCache is type(cache)
    assert cache.get_seq_length() == PROMPT
