"""Checkpoints of version 0.1, whose `model_type` is `tpa`: loaded as models of today.

They described every source as a Llama with one config for all, had one gauge for keys and values,
and kept the rotary pairs of rotated keys among the weights. They stay as they are on disk.
"""

from dataclasses import asdict
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.utils import cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from .tpa_configuration import LayerShape
from .tpa_llama import TPALlamaForCausalLM
from .tpa_qwen2 import TPAQwen2ForCausalLM

RENAMED = {
    "k_feature_factor": "keys.feature_factor",
    "k_head_factor": "keys.head_factor",
    "key_gauge": "keys.gauge.weight",
    "key_offset": "keys.gauge.offset",
    "v_feature_factor": "values.feature_factor",
    "v_head_factor": "values.head_factor",
    "value_gauge": "values.gauge.weight",
}
SHAPE_FIELDS = ("form", "gauge", "rank_k", "rank_v", "width_k", "width_v", "key_cache")


class TPAConfig(LlamaConfig):
    """Config of version 0.1: a Llama's, and the fields of each layer as lists over the layers."""

    model_type = "tpa"

    form: str | list[str] = "static"
    gauge: str | list[str] = "absorbed"
    rank_k: int | list[int] = 1
    rank_v: int | list[int] = 1
    width_k: int | list[int] | None = None
    width_v: int | list[int] | None = None
    key_cache: str | list[str] = "rotated"
    rank_q: int | None = None
    attention_scale: float | None = None
    attention_output_bias: bool = False

    def validate_architecture(self):
        """Nothing: with a head_dim, hidden_size need not be a multiple of the heads."""

    def shapes(self, rotary_pairs: dict[int, torch.Tensor]) -> list[dict[str, Any]]:
        """Fields of today's `LayerShape` for each layer.

        Args:
            rotary_pairs: of the key components of each layer that has rotated keys.
        """
        layers = []
        for i in range(self.num_hidden_layers):
            values = {name: getattr(self, name) for name in SHAPE_FIELDS}
            values = {n: v[i] if isinstance(v, list) else v for n, v in values.items()}
            gauge: Any = values.pop("gauge")
            key_gauge: Any = "applied" if values["key_cache"] == "latent" else gauge
            pairs = None
            if i in rotary_pairs and gauge != "none":
                counts = rotary_pairs[i].bincount(minlength=self.head_dim // 2)
                pairs = " ".join(map(str, counts.tolist()))
            layers.append(
                asdict(
                    LayerShape(
                        **values,
                        key_gauge=key_gauge,
                        value_gauge=gauge,
                        rank_q=self.rank_q,
                        key_pairs=pairs,
                    )
                )
            )
        return layers


class TPAForCausalLM(LlamaForCausalLM):
    """What `AutoModelForCausalLM` finds for version 0.1; it makes a Llama or Qwen2 with TPA."""

    config_class = TPAConfig
    config: TPAConfig

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """As that of any model; what it returns is a model of today with the same logits.

        Raises:
            OSError: no weights there, or not in safetensors files.
            ValueError: weights that do not belong to the config.
        """
        config = config or TPAConfig.from_pretrained(path)
        state, pairs = _renamed(_read(path, kwargs))
        for i, found in pairs.items():
            if bool((found.diff() < 0).any()) and config.shapes({})[i]["key_gauge"] != "none":
                raise ValueError(f"{path}: layer {i} has its key components in an unknown order")
        return _model_class(config).from_pretrained(
            None, *args, config=_upgraded(config, pairs), state_dict=state, **kwargs
        )


def _model_class(config: TPAConfig) -> Any:
    """Biases on queries, keys and values alone are what Qwen2 has."""
    qwen = config.attention_bias and not config.attention_output_bias
    return TPAQwen2ForCausalLM if qwen else TPALlamaForCausalLM


def _upgraded(config: TPAConfig, pairs: dict[int, torch.Tensor]) -> Any:
    values = config.to_dict()
    for name in (*SHAPE_FIELDS, "rank_q", "attention_scale", "attention_output_bias"):
        values.pop(name, None)
    for name in ("model_type", "auto_map", "architectures"):
        values.pop(name, None)
    return _model_class(config).config_class(**values, tpa_layers=config.shapes(pairs))


def _read(path: Any, kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
    where = {k: kwargs[k] for k in ("revision", "token", "cache_dir", "subfolder") if k in kwargs}
    files = [
        cached_file(path, "model.safetensors", **where, _raise_exceptions_for_missing_entries=False)
    ]
    if files[0] is None:
        index = cached_file(path, "model.safetensors.index.json", **where)
        files, _ = get_checkpoint_shard_files(path, index, **where)
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def _renamed(
    state: dict[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[int, torch.Tensor]]:
    """Parameters under today's names, and the rotary pairs by layer."""
    renamed, pairs = {}, {}
    for name, tensor in state.items():
        prefix, attention, rest = name.partition(".self_attn.")
        if rest == "rotary_pair":
            pairs[int(prefix.rpartition(".")[2])] = tensor
            continue
        head, dot, tail = rest.partition(".")
        renamed[f"{prefix}{attention}{RENAMED.get(head, head)}{dot}{tail}"] = tensor
    return renamed, pairs
