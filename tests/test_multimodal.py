"""Of a multimodal checkpoint the language model is converted, and the rest left out with a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    Idefics3Config,
    InternVLConfig,
    LlavaConfig,
    LlavaNextConfig,
    Mistral3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen3VLConfig,
)

from tests.command_line import error_of, tpa_convert
from tests.conftest import make_tiny_tokenizer
from tests.conversions import convert_tiny, random_blocks
from tests.tiny_models import CONFIGS, SIZES
from tpa_convert.errors import UserError
from tpa_convert.sources import load_source, open_source, read_source_config

VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
MULTIMODAL = {
    "gemma3": lambda: Gemma3Config(
        text_config=CONFIGS["gemma3"]().to_dict() | {"final_logit_softcapping": None},
        vision_config=VISION,
        mm_tokens_per_image=4,
    ),
    "llava": lambda: LlavaConfig(
        text_config={"model_type": "llama", **SIZES},
        vision_config={"model_type": "clip_vision_model", **VISION},
        image_token_index=5,
    ),
    "llava_next": lambda: LlavaNextConfig(
        text_config={"model_type": "llama", **SIZES},
        vision_config={"model_type": "clip_vision_model", **VISION},
        image_token_index=5,
    ),
    "idefics3": lambda: Idefics3Config(
        text_config={"model_type": "llama", **SIZES}, vision_config=VISION, image_token_id=5
    ),
    "internvl": lambda: InternVLConfig(
        text_config={"model_type": "qwen2", **SIZES},
        vision_config=VISION | {"image_size": [28, 28], "patch_size": [14, 14]},
        image_token_id=5,
    ),
    "mistral3": lambda: Mistral3Config(
        text_config=CONFIGS["mistral"](),
        vision_config={"model_type": "pixtral", **VISION},
        image_token_index=5,
    ),
}


@pytest.fixture(params=list(MULTIMODAL))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForImageTextToText.from_config(MULTIMODAL[request.param]()).eval()


def test_the_language_model_is_converted(model: PreTrainedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    make_tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.warns(
        UserWarning, match="is a multimodal model .*: its language model is converted"
    ):
        source = load_source(tmp_path)
    with pytest.warns(
        UserWarning, match="is a multimodal model"
    ) as said:  # and nothing of tensors without a place
        open_source(tmp_path)
    assert len(said) == 1
    kind = model.config.text_config.model_type
    assert source.family.model_type == kind == read_source_config(tmp_path).model_type
    tokens = random_blocks(count=2, length=20) + 0
    tokens[tokens == 5] = 6  # the image's
    with_types = model.config.model_type == "gemma3"
    more = {"token_type_ids": torch.zeros_like(tokens)} if with_types else {}
    expected = model(input_ids=tokens, **more).logits
    converted = convert_tiny(source.model)
    torch.testing.assert_close(converted(tokens).logits, expected, atol=1e-4, rtol=0)
    with torch.no_grad():
        model.get_input_embeddings().weight[10:] = 0
    other = model(input_ids=tokens, **more).logits
    assert (converted(tokens).logits - other).abs().max() > 1e-2


def test_a_checkpoint_without_its_language_model_is_refused(model, tmp_path: Path) -> None:
    state = {k: v for k, v in model.state_dict().items() if "layers.1" not in k}
    model.save_pretrained(tmp_path, state_dict=state)
    make_tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="not in the weight files"):
        load_source(tmp_path)


@pytest.mark.parametrize("config", [Qwen2_5_VLConfig(), Qwen3VLConfig()])
def test_a_language_model_of_no_known_family_is_refused(
    config: PreTrainedConfig, tmp_path: Path
) -> None:
    config.save_pretrained(tmp_path)
    kind = config.model_type
    assert error_of(tpa_convert("convert", tmp_path, "--kv-ratio", 0.5, "--dry-run")) == (
        f"error: {tmp_path}: {kind} is a multimodal model whose language model ({kind}_text) is of "
        "no known family, so it cannot be converted"
    )
