"""peft's configs without target modules know what to adapt in a converted model."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tests.conversions import convert_tiny, random_blocks
from tests.tiny_models import MODELS

peft = pytest.importorskip("peft")
TABLE = peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
KINDS = {
    "absorbed": {"kv_ratio": 0.5},
    "latent": {"kv_ratio": 0.5, "key_cache": "latent"},
    "factored queries": {"width_k": 16, "width_v": 16, "form": "linear", "rank_q": 2},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["LoraConfig", "AdaLoraConfig", "LoHaConfig"])
def test_the_default_targets_are_the_layers_of_the_attention(kind: str, method: str) -> None:
    settings = {"total_step": 10} if method == "AdaLoraConfig" else {}
    converted, tokens = convert_tiny(MODELS["llama"](), **KINDS[kind]), random_blocks(count=2)
    expected = converted(tokens).logits
    model = peft.get_peft_model(converted, getattr(peft, method)(**settings))
    adapted = {name for name, p in model.named_parameters() if p.requires_grad}
    for part in ("keys.feature_factor", "values.feature_factor", "o_proj"):
        assert any(f"self_attn.{part}." in name for name in adapted)
    assert all(".self_attn." in name for name in adapted)
    torch.testing.assert_close(model(tokens).logits, expected, atol=1e-4, rtol=0)
    model(tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["gpt_neox", "phi3", "mixtral"])
def test_every_family_is_known(name: str) -> None:
    model = peft.get_peft_model(convert_tiny(MODELS[name](), kv_ratio=0.5), peft.LoraConfig())
    assert model.get_nb_trainable_parameters()[0] > 0


def test_without_the_table_peft_asks_for_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    converted = convert_tiny(MODELS["llama"](), kv_ratio=0.5)
    monkeypatch.delitem(TABLE, "tpa_llama")
    with pytest.raises(ValueError, match="target_modules"):
        peft.get_peft_model(converted, peft.LoraConfig())


def test_peft_is_not_imported_for_it() -> None:
    script = (
        "import sys, tpa_convert.modeling as m; "
        "c = m.CAUSAL_LMS['llama']; k = c.config_class; "
        "c(k(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, "
        "num_key_value_heads=1, vocab_size=8, pad_token_id=0, bos_token_id=1, eos_token_id=2)); "
        "sys.exit('peft' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=200).returncode == 0
