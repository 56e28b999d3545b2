"""A stock Llama of ours as a GGUF file, for llama.cpp and what is built on it.

llama.cpp's own converter drops tables of frequencies without a word. Here they are written as the
tensor `rope_freqs.weight`, with no scaling type beside them. The pairs that llama.cpp turns are
neighbours, so the rows of queries and keys are permuted.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import is_gguf_available

from tpa_convert.errors import UserError
from tpa_convert.export.save import Provenance
from tpa_convert.sources.tokenizer import puts_bos

ROPE_FREQS = "rope_freqs.weight"
BYTE_LEVEL = "ByteLevel"
PRE_BY_PATTERN = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
}
"""llama.cpp's names of how text is split before it is tokenised, by the pattern that does it."""


def write_gguf(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    provenance: Provenance | None,
    tokenizer_pre: str | None,
    name: str,
) -> None:
    """Writes a `LlamaForCausalLM` that `to_llama` made, in its type.

    Args:
        provenance: of the converted model; a source that is a GGUF file has its tokenizer copied.
        tokenizer_pre: llama.cpp's name of how the tokenizer splits text; by default recognised.
        name: of the model, inside the file.

    Raises:
        UserError: the package gguf is missing, or see `check_tokenizer`.
    """
    gguf = _package()
    config: Any = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    for add, value in (
        (writer.add_vocab_size, config.vocab_size),
        (writer.add_context_length, config.max_position_embeddings),
        (writer.add_embedding_length, config.hidden_size),
        (writer.add_block_count, config.num_hidden_layers),
        (writer.add_feed_forward_length, config.intermediate_size),
        (writer.add_head_count, config.num_attention_heads),
        (writer.add_head_count_kv, config.num_key_value_heads),
        (writer.add_key_length, config.head_dim),
        (writer.add_value_length, config.head_dim),
        (writer.add_rope_dimension_count, config.head_dim),
        (writer.add_rope_freq_base, config.rope_parameters["rope_theta"]),
        (writer.add_layer_norm_rms_eps, config.rms_norm_eps),
        (writer.add_file_type, _file_type(gguf, model.dtype)),
    ):
        add(value)
    source = _gguf_source(provenance)
    if source is not None:
        _copy_tokenizer(gguf, source, writer)
    else:
        _add_tokenizer(gguf, tokenizer, writer, config.vocab_size, tokenizer_pre)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    factors = torch.tensor(config.rope_parameters["short_factor"])
    writer.add_tensor(ROPE_FREQS, factors.float().numpy())
    tied = config.tie_word_embeddings
    for tensor_name, tensor in model.state_dict().items():
        if tied and tensor_name == "lm_head.weight":
            continue
        tensor = _as_neighbours(tensor_name, tensor, config)
        mapped = names.get_name(tensor_name, try_suffixes=(".weight", ".bias"))
        _add(gguf, writer, mapped, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check_tokenizer(
    tokenizer: PreTrainedTokenizerBase, provenance: Provenance | None, tokenizer_pre: str | None
) -> None:
    """Refuses tokenizers that cannot be written, before any work is done.

    Raises:
        UserError: the package gguf is missing, or a GGUF's tokenizer cannot be made of this one.
    """
    _package()
    if _gguf_source(provenance) is None:
        _vocabulary(tokenizer)
        if tokenizer_pre is None:
            _pre_tokenizer(tokenizer)


def _package() -> Any:
    if not is_gguf_available():
        raise UserError("GGUF files need the package gguf: pip install 'tpa-convert[gguf]'")
    import gguf

    return gguf


def _file_type(gguf: Any, dtype: torch.dtype) -> Any:
    types = gguf.LlamaFileType
    return {
        torch.float32: types.ALL_F32,
        torch.float16: types.MOSTLY_F16,
        torch.bfloat16: types.MOSTLY_BF16,
    }[dtype]


def _add(gguf: Any, writer: Any, name: str, tensor: Tensor) -> None:
    """Matrices in their type, vectors in fp32, as llama.cpp wants them."""
    kind = gguf.GGMLQuantizationType
    data = tensor.float().numpy()
    if tensor.ndim == 1 or tensor.dtype == torch.float32:
        writer.add_tensor(name, data)
        return
    quantised = kind.BF16 if tensor.dtype == torch.bfloat16 else kind.F16
    writer.add_tensor(name, gguf.quants.quantize(data, quantised), raw_dtype=quantised)


def _as_neighbours(name: str, tensor: Tensor, config: Any) -> Tensor:
    """Rows of queries and keys with the two halves of each pair beside each other."""
    for projection, heads in (
        (".q_proj.", config.num_attention_heads),
        (".k_proj.", config.num_key_value_heads),
    ):
        if projection in name:
            pairs = tensor.unflatten(0, (heads, 2, config.head_dim // 2))
            return pairs.transpose(1, 2).flatten(0, 2).contiguous()
    return tensor


def _gguf_source(provenance: Provenance | None) -> Path | None:
    """The GGUF file that a model was converted from, if it is still there."""
    record = (provenance or {}).get("source", {})
    if not record.get("gguf_file"):
        return None
    path = Path(record["id"])
    path = path / record["gguf_file"] if path.is_dir() else path
    return path if path.is_file() else None


def _copy_tokenizer(gguf: Any, source: Path, writer: Any) -> None:
    for field in gguf.GGUFReader(source).fields.values():
        if field.name.startswith("tokenizer."):
            kind = field.types[0]
            inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kind, inner)


def _add_tokenizer(
    gguf: Any,
    tokenizer: PreTrainedTokenizerBase,
    writer: Any,
    vocab_size: int,
    tokenizer_pre: str | None,
) -> None:
    description = _vocabulary(tokenizer)
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    kinds = [gguf.TokenType.UNUSED] * vocab_size
    for token, i in description["model"]["vocab"].items():
        tokens[i], kinds[i] = token, gguf.TokenType.NORMAL
    for added in description["added_tokens"]:
        special = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]], kinds[added["id"]] = added["content"], special
    merges = description["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(tokenizer_pre or _pre_tokenizer(tokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    for add, special_id in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if special_id is not None:
            add(special_id)
    writer.add_add_bos_token(puts_bos(tokenizer))
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What tokenizer.json says of a byte-level BPE.

    Raises:
        UserError: it is of another kind.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    description = json.loads(backend.to_str()) if backend is not None else {}
    parts = _parts(description)
    byte_level = any(part["type"] == BYTE_LEVEL for part in parts)
    if description.get("model", {}).get("type") != "BPE" or not byte_level:
        raise UserError(
            "only byte-level BPE tokenizers can be written to a GGUF; convert from a .gguf file of "
            "this model, whose tokenizer is copied"
        )
    return description


def _pre_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """llama.cpp's name of how the tokenizer splits text.

    Raises:
        UserError: it is none that is recognised.
    """
    *before, last = _parts(_vocabulary(tokenizer))
    if last["type"] == BYTE_LEVEL and last.get("use_regex", True):
        if not before:
            return "gpt-2"
        if [(p["type"], p.get("individual_digits")) for p in before] == [("Digits", True)]:
            return "smollm"
    if len(before) == 1 and before[0]["type"] == "Split":
        pattern = before[0]["pattern"].get("Regex", "")
        if pattern in PRE_BY_PATTERN:
            return PRE_BY_PATTERN[pattern]
    raise UserError(
        "the way in which this tokenizer splits text is not recognised: give llama.cpp's name of "
        "it, `tokenizer_pre`"
    )


def _parts(description: dict[str, Any]) -> list[dict[str, Any]]:
    """The steps of a pre-tokenizer."""
    pre = description.get("pre_tokenizer") or {}
    return pre.get("pretokenizers", [pre] if pre else [])
