"""Loading a source model with transformers, after checks that give an answer before a long wait."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tpa_convert.errors import UserError
from tpa_convert.families.family import (
    ALREADY_TPA,
    CUSTOM_PAGE,
    Family,
    family_of,
    language_config,
)
from tpa_convert.sources.checkpoint import Checkpoint, find_checkpoint
from tpa_convert.sources.quiet import quiet
from tpa_convert.sources.tokenizer import tokenizer_of
from tpa_convert.sources.weights import StoredWeights

# Where multimodal checkpoints keep the language model, and the rest.
LANGUAGE_MODEL = {
    r"^language_model\.": "",
    r"^model\.(language|text)_model\.": "model.",
}
_OTHER_SENSES = (
    "vision_tower.",
    "multi_modal_projector.",
    "visual.",
    "vision_model.",
    "audio_tower.",
    "model.vision_tower.",
    "model.multi_modal_projector.",
    "model.visual.",
    "model.vision_model.",
    "model.audio_tower.",
    "connector.",
    "model.connector.",
    "image_newline",
    "model.image_newline",
)


@dataclass(frozen=True)
class SourceReference:
    """Enough to find a source again and to know that it is the same; `asdict` of it is JSON.

    Attributes:
        id: what `load_source` takes: a Hub id, or an absolute path.
        revision: commit of the Hub repository, None for local files.
        sha256: of the weight files' content in the order of their names.
        gguf_file: name of the GGUF file, None for safetensors.
    """

    id: str
    revision: str | None
    sha256: str
    gguf_file: str | None


@dataclass(frozen=True)
class Source:
    """A pretrained model to be converted, in eval mode and without gradients.

    Attributes:
        weights: where a model that is read on demand has its tensors; None of one in memory.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    family: Family
    reference: SourceReference
    weights: StoredWeights | None = None

    @property
    def num_bytes(self) -> int:
        """Of the weights, as they are stored."""
        tensors = self.model.state_dict() if self.weights is None else self.weights.shapes
        return sum(tensor.nbytes for tensor in tensors.values())

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors of the model by their names in its state dict, as they are stored."""
        if self.weights is not None:
            return self.weights.read(names)
        state = self.model.state_dict()
        return {name: state[name] for name in names}


def load_source(
    spec: str | Path,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> Source:
    """Loads a model, its tokenizer and what is known of its family.

    Args:
        spec: a Hub id, a directory, or a `.gguf` file (de-quantised while loading).
        revision: branch, tag or commit; for Hub ids only.
        dtype: of all parameters.
        device: where they end up.
        trust_remote_code: whether Python code in the checkpoint may run.

    Raises:
        UserError: the checkpoint is missing, damaged, incomplete, quantised, pickled, not finite,
            or of a kind that cannot be converted.
    """
    checkpoint = find_checkpoint(spec, revision=revision, trust_remote_code=trust_remote_code)
    config = checkpoint_config(checkpoint, trust_remote_code)
    checkpoint.check_weight_files()
    model = _load_model(checkpoint, config, dtype, trust_remote_code)
    for name, parameter in model.named_parameters():
        checkpoint.check_finite(name, parameter)
    reference = SourceReference(
        checkpoint.id, checkpoint.revision, checkpoint.sha256(), checkpoint.gguf_file
    )
    return Source(
        model=model.to(device).eval().requires_grad_(False),
        tokenizer=tokenizer_of(checkpoint, config, trust_remote_code),
        family=family_of(model.config),
        reference=reference,
    )


def read_source_config(
    spec: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """The config of a model that can be converted, without touching its weights.

    Raises:
        UserError: as `load_source`, for what the config alone can tell.
    """
    checkpoint = find_checkpoint(
        spec, revision=revision, weights=False, trust_remote_code=trust_remote_code
    )
    return checkpoint_config(checkpoint, trust_remote_code)


def checkpoint_config(checkpoint: Checkpoint, trust_remote_code: bool) -> PreTrainedConfig:
    if checkpoint.gguf_file is not None:
        checkpoint.check_weight_files()
        location: dict[str, Any] = {"gguf_file": checkpoint.gguf_file}
    else:
        raw = checkpoint.read_config()
        checkpoint.refuse_quantized(raw)
        _refuse_unreadable_type(checkpoint, raw, trust_remote_code)
        location = {}
    with quiet(), transformers_errors(checkpoint):
        config = AutoConfig.from_pretrained(
            checkpoint.directory, trust_remote_code=trust_remote_code, **location
        )
    language = language_config(config)
    _refuse_unknown_rope(checkpoint, language)
    try:
        family_of(language)
    except UserError as error:
        raise checkpoint.error(str(error)) from error
    if language.num_hidden_layers < 1:
        raise checkpoint.error("config.json says that the model has no layers")
    if language is not config:
        warnings.warn(
            f"{checkpoint.spec} is a multimodal model ({config.model_type}): its language model is "
            "converted, which reads text only; what is for images or sound is left out",
            stacklevel=1,  # one place, so that it is said once
        )
        # The head is the outer model's.
        language.tie_word_embeddings = config.tie_word_embeddings
    if language.dtype is None:
        language.dtype = config.dtype or checkpoint.stored_dtype()
    return language


def _refuse_unknown_rope(checkpoint: Checkpoint, config: PreTrainedConfig) -> None:
    """A type of rope that transformers would ask for as a missing key."""
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    each = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    for name in (one.get("rope_type") for one in each):
        if name not in (None, "default", *ROPE_INIT_FUNCTIONS):
            raise checkpoint.error(
                f"config.json has the rope type {name!r}, which this transformers does not know "
                f"(known: default, {', '.join(sorted(ROPE_INIT_FUNCTIONS))}); correct it, or use a "
                "newer transformers"
            )


def _refuse_unreadable_type(
    checkpoint: Checkpoint, raw: dict[str, Any], trust_remote_code: bool
) -> None:
    """Errors about the model type that transformers would bury in a paragraph."""
    model_type = raw.get("model_type")
    if not model_type or not isinstance(model_type, str):
        raise checkpoint.error(
            'config.json names no "model_type"; re-save the model with save_pretrained'
        )
    if model_type == "tpa":
        raise checkpoint.error(ALREADY_TPA)  # before its config class, which may not be registered
    if model_type in transformers.CONFIG_MAPPING:
        return
    if "auto_map" not in raw:
        raise checkpoint.error(
            f"model type {model_type!r} is unknown to transformers {transformers.__version__}; "
            f"upgrade transformers, or describe it in a file for --import ({CUSTOM_PAGE})"
        )
    if not trust_remote_code:
        raise checkpoint.error(
            f"model type {model_type!r} comes with its own code; if you trust it, allow it with "
            "--trust-remote-code"
        )


def _load_model(
    checkpoint: Checkpoint, config: PreTrainedConfig, dtype: torch.dtype, trust_remote_code: bool
) -> PreTrainedModel:
    location = {} if checkpoint.gguf_file is None else {"gguf_file": checkpoint.gguf_file}
    with quiet(), transformers_errors(checkpoint):
        model, info = AutoModelForCausalLM.from_pretrained(
            checkpoint.directory,
            config=config,
            dtype=dtype,
            use_safetensors=None if location else True,
            attn_implementation=family_of(config).attention_implementation,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            key_mapping=LANGUAGE_MODEL,
            **location,
        )
    check_names(checkpoint, sorted(info["missing_keys"]), sorted(info["unexpected_keys"]))
    _forget_quantization(model)
    return model


def check_names(checkpoint: Checkpoint, missing: list[str], unexpected: list[str]) -> None:
    """Refuses files that lack tensors of the model, and tells of others that they have."""
    if missing:
        raise checkpoint.error(
            f"{len(missing)} of the model's tensors are not in the weight files (the first: "
            f"{missing[0]}); download them again, or check that config.json belongs to them"
        )
    unexpected = [name for name in unexpected if not name.startswith(_OTHER_SENSES)]
    if unexpected:
        warnings.warn(
            f"{checkpoint.spec}: {len(unexpected)} tensors in the weight files have no place in "
            f"the model and are left out (the first: {unexpected[0]})",
            stacklevel=4,
        )


def _forget_quantization(model: PreTrainedModel) -> None:
    """A model read from GGUF holds plain floats, but remembers a quantiser that cannot be saved."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        if name in vars(model):
            delattr(model, name)


@contextlib.contextmanager
def transformers_errors(checkpoint: Checkpoint) -> Iterator[None]:
    """Whatever transformers raises over a bad checkpoint, as one line that names the checkpoint."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        what = "GGUF file" if checkpoint.gguf_file is not None else "checkpoint"
        reason = " ".join(str(error).split()) or type(error).__name__
        if len(reason) > 300:
            reason = reason[:300] + "..."
        raise checkpoint.error(
            f"transformers cannot load this {what} ({reason}); check that it is complete and that "
            "its config fits its weights"
        ) from error
