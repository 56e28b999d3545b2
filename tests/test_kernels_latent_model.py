"""Models with coded latent keys give on the kernels what they give without them.

On a GPU, or under Triton's interpreter, by way of `test_kernels_interpreter.py`.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from transformers import DynamicCache, StaticCache

from tests.conversions import convert_coded, convert_tiny
from tests.kernel_device import DEVICE, GPU
from tests.test_kernels_model import PROMPT, logits, prompts
from tests.tiny_models import MODELS, WINDOW
from tpa_convert.forward.walk import attention_modules
from tpa_convert.kernels import ops
from tpa_convert.modeling import tpa_coded
from tpa_convert.modeling.tpa_coded import CodedLayer
from tpa_convert.modeling.tpa_kernels import Sources
from tpa_convert.modeling.tpa_rotary import rotate

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
# On a GPU kernels for latent keys are for 16 bits; the interpreter takes fp32, which is sharper.
NEW = 1  # token: the interpreter is slow
STEPS = 1 if GPU else 2  # what a step has left matters, but rows of 16 bits are others then
DTYPE, TOLERANCE = (torch.float16, 1e-2) if GPU else (torch.float32, 2e-5)
CODED = {
    "one block": ("llama", {"key_blocks": 1}),
    "two blocks": ("llama", {"key_blocks": 2}),
    "an eighth": ("qwen2", {"kv_ratio": 0.125}),
    "normalised keys": ("qwen3", {}),
    "normalised together": ("olmo2", {}),
    "windows": ("gemma3", {}),
    "soft cap": ("gemma2", {}),
    "partial rotation": ("gpt_neox", {}),
}


def make(case: str):
    family, settings = CODED[case]
    model = convert_coded(MODELS[family](), **settings)
    if case == "soft cap":  # transformers before 5.20 leaves the cap out of its default attention
        model.set_attn_implementation("eager")
    return model.to(DEVICE, DTYPE)


@pytest.fixture(scope="module")
def made():
    return {}


@pytest.fixture
def models(made, monkeypatch):
    """A model of each case, made once: on a CPU, which cannot be told to use kernels."""

    def of(case):
        if case not in made:
            with monkeypatch.context() as without:
                without.delenv("TPA_CONVERT_BACKEND", raising=False)
                made[case] = make(case)
        return made[case]

    return of


@pytest.fixture
def coded(models):
    return copy.deepcopy(models("two blocks"))


@pytest.fixture
def calls(monkeypatch):
    """How often the kernel ran: control that it did, and that it did not."""
    found = []
    real = ops.run_latent
    monkeypatch.setattr(ops, "run_latent", lambda *a: found.append(1) or real(*a))
    return found


def both(monkeypatch, model, inputs, new, static=False):
    """What the attention of each layer gives for `new` tokens by the kernels and without them, on
    the same rows of the prompt and the same states entering each layer.

    Otherwise a code on an edge may fall to either side, in the prompt or in a later layer, which
    shows in 16 bits. Therefore new rows are made, and queries rotated, without kernels too.
    """
    config = model.config
    for attention in attention_modules(model):
        if attention.coded is not None:
            monkeypatch.setattr(attention.coded, "pack", packing_without(attention))
            monkeypatch.setattr(attention.coded, "take_in", lambda *given: None)
    cache = StaticCache(config, max_cache_len=32) if static else DynamicCache(config=config)
    ids, mask = inputs["input_ids"][:, :-1], inputs["attention_mask"][:, :-1]
    monkeypatch.setenv("TPA_CONVERT_BACKEND", "reference")
    with torch.no_grad():
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
    states, given = [], {"reference": [], "triton": []}
    for backend, outputs in given.items():
        monkeypatch.setenv("TPA_CONVERT_BACKEND", backend)
        settings = {"past_key_values": copy.deepcopy(cache), "disable_compile": True}
        with attention_tapped(model, states, outputs):
            logits(model, inputs, new=new, **settings)
    return given["triton"], given["reference"]


def packing_without(attention):
    """`CodedLayer.pack` in PyTorch."""

    def pack(tables, hidden_states, query, table, *others):
        query = rotate(query.transpose(1, 2), table)
        key, value, _ = attention.pack(hidden_states, table, cached=True)
        return query, key, value, None, None

    return pack


@contextmanager
def attention_tapped(model, states, outputs):
    """Adds what enters each attention to `states`, or lets what is there already enter in its
    place; adds what its output projection gives to `outputs`."""
    recorded = iter(list(states)) if states else None

    def enter(module, arguments, keywords):
        name = "hidden_states"
        if recorded is None:
            states.append(arguments[0] if arguments else keywords[name])
            return None
        state = next(recorded)
        return ((state, *arguments[1:]), keywords) if arguments else ((), {**keywords, name: state})

    def leave(module, arguments, output):
        outputs.append(output)

    hooks = []
    for attention in attention_modules(model):
        hooks.append(attention.register_forward_pre_hook(enter, with_kwargs=True))
        # Not on the attention: who hooks into that may want its weights.
        hooks.append(attention.o_proj.register_forward_hook(leave))
    yield
    for hook in hooks:
        hook.remove()


def all_close(found, truth):
    return all(close(a, b) for a, b in zip(found, truth, strict=True))


def close(found, truth):
    return torch.allclose(found, truth, atol=TOLERANCE * truth.abs().max())


@pytest.mark.parametrize("case", CODED)
def test_generation(monkeypatch, models, calls, case) -> None:
    """With padding; every other case with a static cache, whose free slots hold anything."""
    static = list(CODED).index(case) % 2 == 1
    found, truth = both(monkeypatch, models(case), prompts(5), NEW, static)
    assert len(calls) == 3 * NEW
    assert all_close(found, truth)


def test_without_padding_and_longer_than_a_window(monkeypatch, models, calls) -> None:
    assert PROMPT > WINDOW
    for case in ("two blocks", "windows"):
        found, truth = both(monkeypatch, models(case), prompts(), STEPS)
        assert all_close(found, truth)
    assert len(calls) == 2 * 3 * STEPS


@pytest.mark.skipif(GPU, reason="in 16 bits a code on an edge falls to either side")
def test_beside_the_kernels_that_code_and_rotate(monkeypatch, coded, calls) -> None:
    found = {}
    for backend in ("triton", "reference"):
        monkeypatch.setenv("TPA_CONVERT_BACKEND", backend)
        found[backend] = logits(coded, prompts(), new=2)
    assert close(found["triton"], found["reference"])
    assert len(calls) == 3


@pytest.mark.parametrize("case", ["one block", "two blocks", "normalised keys"])
def test_keys_and_values_of_a_prompt(monkeypatch, models, case) -> None:
    """In few steps they are what the layouts make of the same features; on a CPU, blocks of pairs
    are left to those, and normalised keys everywhere."""
    monkeypatch.setenv("TPA_CONVERT_BACKEND", "triton")
    model, found = models(case), []
    real = CodedLayer.expand

    def expand(self, tables, features, table, keys, values, heads):
        given = features, table, keys, values, heads
        found.append(tables.heads is None)
        made = real(self, tables, *given)
        monkeypatch.setattr(keys, "rotation", None)
        truth = real(self, tables._replace(heads=None), *given)
        assert all_close(made, truth)
        assert not close(made[0], truth[0].roll(1, 2))  # control: other positions
        return made

    monkeypatch.setattr(CodedLayer, "expand", expand)
    with torch.no_grad():
        model(**prompts(3), use_cache=True)
    assert len(found) == len(attention_modules(model))
    left = case == "normalised keys" or (case == "two blocks" and not GPU)
    assert all(by_layouts == left for by_layouts in found)


def test_another_table_would_be_seen(monkeypatch, coded, calls) -> None:
    """Control: with the gauge of another head, what comes out is other."""
    assert all_close(*both(monkeypatch, coded, prompts(), NEW))
    layer = coded.model.layers[1].self_attn.coded
    other = layer.tables.decoding._replace(weight=layer.tables.decoding.weight.flip(-1))
    layer.tables = layer.tables._replace(decoding=other)
    assert not all_close(*both(monkeypatch, coded, prompts(), NEW))


def test_tables_follow_parameters(monkeypatch, coded, calls) -> None:
    """Changed in place, as training and loading do it."""
    before, _ = both(monkeypatch, coded, prompts(), NEW)
    with torch.no_grad():
        coded.model.layers[0].self_attn.keys.gauge.weight.mul_(-2.0)
        coded.model.layers[1].self_attn.values.coder.step.mul_(3.0)
    found, truth = both(monkeypatch, coded, prompts(), NEW)
    assert all_close(found, truth)
    assert not all_close(found, before)
    assert len(calls) == 2 * 3 * NEW


def test_tables_are_looked_at_when_a_cache_begins(monkeypatch, coded) -> None:
    """Not at every token more: what is changed shows in another cache, and after several tokens or
    training in the same."""
    monkeypatch.setenv("TPA_CONVERT_BACKEND", "triton")
    layer, looks = coded.model.layers[0].self_attn.coded, []
    real = tpa_coded.parameters_of
    monkeypatch.setattr(tpa_coded, "parameters_of", lambda *given: looks.append(1) or real(*given))
    token = torch.full((2, 1), 7, device=DEVICE)

    def looked(ids, cache) -> int:
        looks.clear()
        with torch.no_grad():
            coded(ids, past_key_values=cache)
        return len(looks) // len(attention_modules(coded))

    cache = DynamicCache(config=coded.config)
    assert looked(prompts()["input_ids"], cache) == 1
    assert [looked(token, cache) for _ in range(2)] == [0, 0]
    first = layer.tables
    other = copy.deepcopy(cache)
    with torch.no_grad():
        coded.model.layers[0].self_attn.keys.gauge.weight.mul_(2.0)
    assert looked(token, other) == 1
    assert layer.tables is not first
    assert looked(token, cache) == 1  # not that of before
    assert looked(token.expand(-1, 2), cache) == 1
    Sources.trained()
    assert looked(token, cache) == 1
    assert looked(token, cache) == 0


def test_compiled_in_one_graph(monkeypatch, coded) -> None:
    """One step on a static cache, without a graph break."""
    monkeypatch.setenv("TPA_CONVERT_BACKEND", "triton")
    launched = []
    real = ops.run_latent
    monkeypatch.setattr(ops, "run_latent", lambda *a: launched.append(1) or real(*a))
    steps = []
    with torch.no_grad():
        for compiled in (False, True):
            cache = StaticCache(config=coded.config, max_cache_len=32)
            coded(**prompts(), past_key_values=cache)
            backend = "inductor" if GPU else "aot_eager"
            step = torch.compile(coded, fullgraph=True, backend=backend) if compiled else coded
            token = torch.full((2, 1), 7, device=DEVICE)
            position = torch.full((2, 1), PROMPT, device=DEVICE)
            output = step(input_ids=token, past_key_values=cache, position_ids=position)
            steps.append(output.logits)
    assert len(launched) == 2 * 3  # in the compiled graph too
    assert close(*steps)


def test_a_compiled_prompt_does_without_tables(monkeypatch, coded) -> None:
    """A compiler would keep to those of before, whatever they follow from has become."""
    monkeypatch.setenv("TPA_CONVERT_BACKEND", "triton")
    compiled = torch.compile(coded, backend="aot_eager")
    found = []
    with torch.no_grad():
        before = coded(**prompts(), use_cache=True).logits
        coded.model.layers[1].self_attn.values.coder.step.mul_(3.0)
        for model in (compiled, coded):
            found.append(model(**prompts(), use_cache=True).logits)
            # Kernels round otherwise, and codes at an edge fall to its other side.
            monkeypatch.setenv("TPA_CONVERT_BACKEND", "reference")
    assert close(*found)
    assert not close(before, found[1])


def test_compiled_training_after_generation(monkeypatch, coded) -> None:
    """Tables are there, but kernels that code rows have no gradients."""
    monkeypatch.setenv("TPA_CONVERT_BACKEND", "triton")
    coded.requires_grad_(True)
    with torch.no_grad():
        coded(**prompts(), use_cache=True)
    assert coded.model.layers[0].self_attn.coded.tables is not None
    found = []
    for model in (torch.compile(coded, backend="aot_eager"), coded):
        coded.zero_grad()
        model(**prompts(), use_cache=True, labels=prompts()["input_ids"]).loss.backward()
        attention = coded.model.layers[0].self_attn
        parts = attention.keys.gauge, attention.values.gauge, attention.o_proj
        found.append([part.weight.grad for part in parts])
    assert all_close(*found)
    assert all(x.count_nonzero() for x in found[0])


def test_autocast_with_normalised_queries(monkeypatch, models) -> None:
    """They stay in 32 bits, while components come in 16. Seen in the first layer: behind it codes
    on an edge fall to either side."""
    model, found = copy.deepcopy(models("normalised keys")).float(), []
    first = attention_modules(model)[0]
    first.register_forward_hook(lambda module, given, output: found.append(output[0]))
    for backend in ("triton", "reference"):
        monkeypatch.setenv("TPA_CONVERT_BACKEND", "auto" if GPU and not found else backend)
        with torch.no_grad(), torch.autocast(DEVICE.type, torch.float16):
            model(**prompts(), use_cache=True)
    tolerance = 1e-2 * found[1].abs().max()
    assert torch.allclose(*found, atol=tolerance)
    assert not torch.allclose(found[0], found[1].roll(1, 1), atol=tolerance)  # control


def test_another_thread_may_begin_a_cache_between_two_looks(monkeypatch, coded) -> None:
    """At which of the caches a layer's tables are in use for."""

    class Interrupted(CodedLayer):
        @property
        def cache(self):
            seen, self.seen = self.seen, None
            return seen

        @cache.setter
        def cache(self, reference):
            self.seen = reference

    monkeypatch.setenv("TPA_CONVERT_BACKEND", "triton")
    coded.model.layers[0].self_attn.coded = layer = Interrupted()
    cache = DynamicCache(config=coded.config)
    with torch.no_grad():
        for ids in (prompts()["input_ids"], torch.full((2, 1), 7, device=DEVICE)):
            coded(ids, past_key_values=cache)
            assert layer.tables is not None


def test_gradients_take_the_other_path(monkeypatch, coded, calls) -> None:
    monkeypatch.setenv("TPA_CONVERT_BACKEND", "triton")
    coded.requires_grad_(True)
    output = coded(**prompts(), use_cache=True)
    token = torch.full((2, 1), 7, device=DEVICE)
    step = coded(input_ids=token, past_key_values=output.past_key_values)
    step.logits.sum().backward()
    assert not calls
    assert coded.model.layers[0].self_attn.keys.gauge.weight.grad.count_nonzero()


def test_whoever_hooks_into_soft_capped_attention_gets_weights(monkeypatch, models, calls) -> None:
    monkeypatch.setenv("TPA_CONVERT_BACKEND", "triton")
    model = copy.deepcopy(models("soft cap"))
    output = model.generate(
        **prompts(), max_new_tokens=2, output_attentions=True, return_dict_in_generate=True
    )
    assert not calls
    assert [x.shape[-1] for x in output.attentions[1]] == [WINDOW, PROMPT + 1, WINDOW]


def test_without_the_package_nothing_is_looked_for(monkeypatch, coded) -> None:
    from tpa_convert.modeling import tpa_kernels

    def no_package(name):
        raise ModuleNotFoundError(name)

    assert tpa_kernels.find_coded() is not None
    monkeypatch.setattr(tpa_kernels, "import_module", no_package)
    assert tpa_kernels.find_coded() is None


def test_numbers_are_left_to_pytorch(monkeypatch, calls) -> None:
    """Latent keys that are cached in 16 bits: one large product rebuilds them."""
    model = convert_tiny(MODELS["llama"](), key_cache="latent", width_k=16, width_v=8)
    both(monkeypatch, model.to(DEVICE, DTYPE), prompts(), NEW)
    assert not calls
