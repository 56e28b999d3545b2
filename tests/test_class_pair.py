"""The classes of a family follow one template; classes that the package does not know get one."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer

from tests.conversions import convert_tiny, random_blocks
from tests.tiny_models import SIZES, random_model
from tpa_convert.errors import UserError
from tpa_convert.families import FAMILIES, family_of, register_family
from tpa_convert.families.class_pair import class_pair_source, main
from tpa_convert.modeling import AttentionNames

pytestmark = pytest.mark.filterwarnings("ignore:.*imports tpa_convert")
MODELING = Path(__file__).parents[1] / "tpa_convert" / "modeling"


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_the_files_of_the_package_are_what_the_template_writes(family) -> None:
    config, model, causal_lm = (
        next(base for base in cls.__mro__ if base.__module__.startswith("transformers."))
        for cls in (family.config_class, family.model_class, family.causal_lm)
    )
    path = MODELING / f"tpa_{family.model_type}.py"
    assert path.read_text() == class_pair_source(config, model, causal_lm, family.names)
    other = class_pair_source(config, model, causal_lm, AttentionNames(output="out"))
    assert path.read_text() != other


def test_the_files_are_written_by_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, model_type in (
        ("PhiForCausalLM output=dense", "phi"),
        (
            "GPTNeoXForCausalLM attention=attention fused=query_key_value fused_by_head=true "
            "output=dense",
            "gpt_neox",
        ),
    ):
        main(arguments.split())
        assert capsys.readouterr().out == (MODELING / f"tpa_{model_type}.py").read_text()


class OtherAttention(LlamaAttention):
    """Llama's attention with other names."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.to_queries, self.to_keys, self.to_values = self.q_proj, self.k_proj, self.v_proj
        self.out = self.o_proj
        del self.q_proj, self.k_proj, self.v_proj, self.o_proj

    def forward(self, hidden_states, position_embeddings, attention_mask=None, **kwargs):
        for name, module in {
            "q_proj": self.to_queries,
            "k_proj": self.to_keys,
            "v_proj": self.to_values,
            "o_proj": self.out,
        }.items():
            object.__setattr__(self, name, module)  # past nn.Module: no submodule of this name
        return super().forward(hidden_states, position_embeddings, attention_mask, **kwargs)


class OtherLayer(LlamaDecoderLayer):
    """Llama's layer with another name for its attention."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.mixer = OtherAttention(config, layer_idx)
        del self.self_attn

    def forward(self, hidden_states, **kwargs):
        mixed, _ = self.mixer(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + mixed
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class OtherConfig(LlamaConfig):
    model_type = "other_names"


class OtherModel(LlamaModel):
    config: OtherConfig

    def __init__(self, config: OtherConfig):
        super().__init__(config)
        self.layers = nn.ModuleList(
            [OtherLayer(config, i) for i in range(config.num_hidden_layers)]
        )
        self.post_init()


class OtherForCausalLM(LlamaForCausalLM):
    config: OtherConfig

    def __init__(self, config: OtherConfig):
        super().__init__(config)
        self.model = OtherModel(config)
        self.post_init()


def source() -> PreTrainedModel:
    return random_model(OtherForCausalLM, OtherConfig(**SIZES, head_dim=8))


def test_a_class_of_ones_own_is_converted_once_its_names_are_registered() -> None:
    names = AttentionNames("mixer", "to_queries", "to_keys", "to_values", output="out")
    register_family(OtherConfig, OtherModel, OtherForCausalLM, names)
    model, tokens = source(), random_blocks(count=2, length=20)
    assert family_of(model.config).names == names
    expected = model(tokens).logits
    for key_cache in ("rotated", "latent"):
        converted = convert_tiny(model, key_cache=key_cache)
        assert isinstance(converted, OtherForCausalLM)
        torch.testing.assert_close(converted(tokens).logits, expected, atol=1e-4, rtol=0)
        narrow = convert_tiny(model, key_cache=key_cache, kv_ratio=0.5)
        assert (narrow(tokens).logits - expected).abs().max() > 1e-2


def test_a_wrong_name_is_told() -> None:
    names = AttentionNames("mixer", "to_query", "to_keys", "to_value", output="out")
    with pytest.raises(UserError, match=r"OtherAttention has no to_query, to_value \(it has .*out"):
        register_family(OtherConfig, OtherModel, OtherForCausalLM, names)
    names = AttentionNames("attention")
    with pytest.raises(UserError, match=r"OtherLayer has no attention \(it has .*mixer"):
        register_family(OtherConfig, OtherModel, OtherForCausalLM, names)
