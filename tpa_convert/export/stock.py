"""Converted models as models that other software knows: what every such export shares.

Each is checked before it is written: it must give the logits of the converted model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

from tpa_convert.errors import UserError
from tpa_convert.export.card import is_local
from tpa_convert.export.output import PROVENANCE_FILE
from tpa_convert.export.save import Provenance, write_record
from tpa_convert.modeling import TPAAttention, TPAModelMixin

CHECKED_TOKENS = 32
TOLERANCE = 1e-3  # of logits in fp32, relative to the largest

CARD = """# {name}

{source} with Tensor Product Attention, written as a plain `{architecture}` that needs no code of
its own. It computes what the converted model computes, and caches {floats:,} numbers per token.

Made by `tpa-convert export --to {form}`; `{record}` says how the model was converted. The licence
is that of the source.
"""


def source_class(model: PreTrainedModel) -> Any:
    """The class of transformers whose attention was replaced."""
    return stock_class(type(model))


def stock_class(converted: type) -> Any:
    """The class of transformers that a converted one is made of."""
    return next(
        cls
        for cls in converted.__mro__
        if issubclass(cls, PreTrainedModel) and not issubclass(cls, TPAModelMixin)
    )


def attention_layers(model: PreTrainedModel) -> list[TPAAttention]:
    """The attention of every layer, in order."""
    return [module for module in model.modules() if isinstance(module, TPAAttention)]


def other_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Everything but the attention, by name; tied weights are there under every name."""
    inside = tuple(
        f"{name}." for name, module in model.named_modules() if isinstance(module, TPAAttention)
    )
    return {
        name: tensor for name, tensor in model.state_dict().items() if not name.startswith(inside)
    }


def attention_prefixes(model: PreTrainedModel) -> list[str]:
    """What the names of the weights of each attention begin with, in order."""
    return [
        f"{name}." for name, module in model.named_modules() if isinstance(module, TPAAttention)
    ]


def built(model_class: Any, config: Any, state: Mapping[str, Tensor]) -> PreTrainedModel:
    """A model with these weights, in eval mode; every weight of it must be there."""
    with no_init_weights():
        model = model_class(config)
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    return model.eval()


@torch.no_grad()
def check_same_logits(converted: PreTrainedModel, exported: PreTrainedModel) -> None:
    """Compares both on random tokens.

    Raises:
        UserError: they differ by more than rounding.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = converted.config.vocab_size
    tokens = torch.randint(vocabulary, (1, CHECKED_TOKENS), generator=generator)
    expected, found = (m(tokens, use_cache=False).logits for m in (converted, exported))
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    if not difference <= TOLERANCE:
        raise UserError(
            f"a {type(exported).__name__} cannot hold what this model computes (logits differ by "
            f"{difference:.1e} of the largest); please report it"
        )


def save_stock(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    name: str,
    form: str,
    cached_floats: int,
    provenance: Provenance | None,
) -> None:
    """Fills a directory with a model that needs no code of ours, its record and a card.

    Args:
        form: what the export is called.
        cached_floats: numbers that it caches per token.
        provenance: of the converted model, if it says how it was made.
    """
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    write_record(directory, {**(provenance or {}), "export": {"to": form}})
    source = provenance["source"]["id"] if provenance else "A model"
    local = is_local(source)
    data = ModelCardData(
        base_model=None if local or not provenance else source,
        library_name="transformers",
        pipeline_tag="text-generation",
    )
    text = CARD.format(
        name=name,
        source=Path(source).name if local else source,
        architecture=type(model).__name__,
        floats=cached_floats,
        form=form,
        record=PROVENANCE_FILE,
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(directory / "README.md")


def weight_and_bias(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Of a projection."""
    bias = getattr(linear, "bias", None)
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return weight, bias
