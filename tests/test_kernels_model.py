"""Models that decode on the kernels give what they give without them.

On a GPU, or under Triton's interpreter, by way of `test_kernels_interpreter.py`.
"""

from __future__ import annotations

import pytest
import torch
from transformers import StaticCache

from tests.conversions import convert_tiny
from tests.kernel_device import DEVICE, GPU
from tests.tiny_models import MODELS, WINDOW
from tpa_convert.kernels import ops

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
PROMPT, NEW = 12, 3
CASES = {
    "absorbed": ("llama", {"kv_floats": 16, "gauge": "absorbed"}),
    "applied": ("llama", {"width_k": 16, "width_v": 8, "gauge": "applied"}),
    "biases": ("qwen2", {"width_k": 8, "width_v": 16}),
    "normalised keys": ("qwen3", {"width_k": 16, "width_v": 8}),
    "windows": ("gemma3", {"width_k": 16, "width_v": 16}),
    "affine": ("llama", {"form": "affine", "rank_k": 1, "rank_v": 1}),
    "linear": ("llama", {"form": "linear", "method": "svd", "rank_k": 1, "rank_v": 1}),
}


@pytest.fixture(params=CASES, scope="module")
def model(request):
    family, settings = CASES[request.param]
    return convert_tiny(MODELS[family](), **settings).to(DEVICE)


@pytest.fixture
def calls(monkeypatch):
    """How often the kernel ran: control that it did, and that it did not."""
    found = []
    real = ops.run_rotated
    monkeypatch.setattr(ops, "run_rotated", lambda *a: found.append(1) or real(*a))
    return found


def prompts(padded: int = 0):
    ids = torch.randint(3, 128, (2, PROMPT), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    mask = torch.ones_like(ids)
    ids[0, :padded], mask[0, :padded] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def logits(model, inputs, new=NEW, **settings):
    output = model.generate(
        **inputs,
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **settings,
    )
    return torch.stack(output.logits)


def both(monkeypatch, model, inputs, **settings):
    results = []
    for backend in ("triton", "reference"):
        monkeypatch.setenv("TPA_CONVERT_BACKEND", backend)
        results.append(logits(model, inputs, **settings))
    return results


@pytest.mark.parametrize(("cache", "padded"), [("dynamic", 0), ("static", 5)])
def test_generation(monkeypatch, model, calls, cache, padded) -> None:
    settings = {} if cache == "dynamic" else {"cache_implementation": "static"}
    if cache == "static":
        settings["disable_compile"] = True
    found, truth = both(monkeypatch, model, prompts(padded), **settings)
    assert len(calls) == 3 * (NEW - 1)
    assert torch.allclose(found, truth, atol=2e-5 * truth.abs().max())


def test_padding_in_a_dynamic_cache(monkeypatch, calls) -> None:
    family, settings = CASES["applied"]
    model = convert_tiny(MODELS[family](), **settings).to(DEVICE)
    found, truth = both(monkeypatch, model, prompts(5))
    assert torch.allclose(found, truth, atol=2e-5 * truth.abs().max())
    assert calls


def test_text_longer_than_a_window(monkeypatch, calls) -> None:
    family, settings = CASES["windows"]
    model = convert_tiny(MODELS[family](), **settings).to(DEVICE)
    assert PROMPT > WINDOW
    found, truth = both(monkeypatch, model, prompts())
    assert torch.allclose(found, truth, atol=2e-5 * truth.abs().max())
    assert calls


def test_compiled_in_one_graph(monkeypatch) -> None:
    """One step on a static cache, without a graph break."""
    monkeypatch.setenv("TPA_CONVERT_BACKEND", "triton")
    family, settings = CASES["applied"]
    model = convert_tiny(MODELS[family](), **settings).to(DEVICE)
    steps = []
    with torch.no_grad():
        for compiled in (False, True):
            cache = StaticCache(config=model.config, max_cache_len=32)
            model(**prompts(), past_key_values=cache)
            backend = "inductor" if GPU else "aot_eager"
            step = torch.compile(model, fullgraph=True, backend=backend) if compiled else model
            token = torch.full((2, 1), 7, device=DEVICE)
            position = torch.full((2, 1), PROMPT, device=DEVICE)
            output = step(input_ids=token, past_key_values=cache, position_ids=position)
            steps.append(output.logits)
    assert torch.allclose(*steps, atol=2e-5 * steps[0].abs().max())


def test_gradients_take_the_other_path(monkeypatch, calls) -> None:
    monkeypatch.setenv("TPA_CONVERT_BACKEND", "triton")
    family, settings = CASES["applied"]
    model = convert_tiny(MODELS[family](), **settings).to(DEVICE).requires_grad_(True)
    output = model(**prompts(), use_cache=True)
    token = torch.full((2, 1), 7, device=DEVICE)
    step = model(input_ids=token, past_key_values=output.past_key_values)
    step.logits.sum().backward()
    assert not calls
    assert model.model.layers[0].self_attn.values.feature_factor.weight.grad.count_nonzero()


def test_the_kernel_is_found_when_a_model_is_made(monkeypatch) -> None:
    from tpa_convert.modeling import tpa_kernels

    def no_package(name):
        raise ModuleNotFoundError(name)

    assert tpa_kernels.find_kernel() is not None
    monkeypatch.setattr(tpa_kernels, "import_module", no_package)
    assert tpa_kernels.find_kernel() is None
