"""Whether a family's record is right: a random model of one layer beside its conversion.

At full width a conversion has the logits of its source. Where it has not, the record is wrong, and
the probe looks for the field that would have made it right.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from tpa_convert.conversion.model import convert_model
from tpa_convert.errors import UserError
from tpa_convert.families.family import CUSTOM_PAGE, Family
from tpa_convert.families.parts import key_norm_of
from tpa_convert.forward.cached import cache_argument
from tpa_convert.modeling import AttentionNames
from tpa_convert.plans import Budget, plan_uniform
from tpa_convert.sources import Source, SourceReference

VOCABULARY = 64
TOKENS = 12
TOLERANCE = 1e-3  # of the spread of the logits


@torch.no_grad()
def probe(family: Family, config: PreTrainedConfig) -> None:
    """Converts a random model of one layer at full width and compares the two.

    Args:
        config: of the source; everything but the number of layers and the vocabulary counts.

    Raises:
        UserError: they differ, with the field of the record that is wrong where one is.
    """
    model = random_model(family, one_layer(config))
    family.check_names(model)
    failure: UserError | None = None
    try:
        if _difference(family, model) < TOLERANCE:
            return
    except UserError as error:
        failure = error
    wrong = _wrong_field(family, model)
    if wrong is None and failure is not None:
        raise failure
    if wrong is None:
        raise UserError(
            f"the conversion of {type(model).__name__} at full width is another model, and no "
            f"single field of its record would change that: its attention does something that "
            f"the record cannot say ({CUSTOM_PAGE})"
        )
    raise UserError(
        f"the conversion of {type(model).__name__} at full width is another model; with {wrong} in "
        f"its record it is the same: correct that ({CUSTOM_PAGE})"
    )


def one_layer(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of a model of one layer and few tokens, which is small enough to be made."""
    values = config.to_dict()
    layers = config.num_hidden_layers
    for name, value in values.items():
        if isinstance(value, list) and len(value) == layers:  # one entry for each layer
            values[name] = value[:1]
        elif name.endswith("_token_id") and value is not None:
            values[name] = 0
    values |= {"num_hidden_layers": 1, "vocab_size": VOCABULARY}
    return type(config)(**values)


@torch.no_grad()
def random_model(family: Family, config: PreTrainedConfig) -> Any:
    """In fp32 and eval mode, with attention that is far from even and norms that are none of 1."""
    config._attn_implementation = family.attention_implementation
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = family.source_class(config).float()
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += torch.empty_like(parameter).uniform_(-0.5, 0.5)
            else:
                parameter.normal_(std=2 * parameter.shape[-1] ** -0.5)
    return model.eval().requires_grad_(False)


def _difference(family: Family, model: PreTrainedModel) -> float:
    """Largest difference of the logits, relative to their spread, in one pass and with a cache.

    Raises:
        UserError: the conversion cannot be made, or not run in the model's layers.
    """
    reference = SourceReference("probe", None, "", None)
    source = Source(model, None, family, reference)  # type: ignore[arg-type]
    sizes = family.attention_sizes(model.config)
    width = sizes["num_key_value_heads"] * sizes["head_dim"]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (2, TOKENS), generator=generator)
    expected = model(input_ids=tokens, use_cache=False).logits
    worst = 0.0
    for key_cache in ("rotated", "latent"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that nothing is saved
            plan = plan_uniform(sizes, Budget(width_k=width, width_v=width), key_cache=key_cache)
        converted: Any = convert_model(source, plan, None, whiten=False)
        try:
            whole = converted(input_ids=tokens, use_cache=False).logits
            steps = _in_two_steps(converted, tokens)
        except Exception as error:  # whatever the model's code does with what is in its layers now
            reason = " ".join(str(error).split())
            raise UserError(
                f"the layers of {type(model).__name__} cannot run with a converted attention "
                f"({type(error).__name__}: {reason}); they have to call it with hidden_states, "
                f"position_embeddings and all else by name ({CUSTOM_PAGE})"
            ) from error
        for found in (whole, steps):
            worst = max(worst, ((found - expected).abs().max() / expected.std()).item())
    return worst


def _in_two_steps(model: Any, tokens: Tensor) -> Tensor:
    first = model(input_ids=tokens[:, :-1], use_cache=True)
    last = model(input_ids=tokens[:, -1:], use_cache=True, **cache_argument(first))
    return torch.cat((first.logits, last.logits), dim=1)


def _wrong_field(family: Family, model: PreTrainedModel) -> str | None:
    """The change of the record that makes the conversion the source, as one would write it."""
    decoder: Any = model.get_decoder()
    attention = getattr(decoder.layers[0], family.names.attention)
    for changes in _candidates(family.names, attention):
        with _changed(family, replace(family.names, **changes)), suppress(UserError):
            if _difference(_with_norm(family, model), model) >= TOLERANCE:
                continue
            return ", ".join(f"{name}={value!r}" for name, value in changes.items())
    return None


def _with_norm(family: Family, model: PreTrainedModel) -> Family:
    """The family with the norm of keys that its names of the moment find."""
    return replace(family, key_norm=key_norm_of(model, family.names))


def _candidates(names: AttentionNames, attention: nn.Module) -> Iterator[dict[str, Any]]:
    """Changes of a record that leave names and shapes right."""
    other = {"halves": "neighbours", "neighbours": "halves"}
    pairs, table = other[names.pairs], other[names.table]
    yield {"pairs": pairs}
    yield {"table": table}
    yield {"pairs": pairs, "table": table}
    if names.fused is not None:
        yield {"fused_by_head": not names.fused_by_head}
    else:
        for one, two in (("key", "value"), ("query", "key"), ("query", "value")):
            yield {one: getattr(names, two), two: getattr(names, one)}
        yield {"query": names.output, "output": names.query}
    children = [name for name, child in attention.named_children() if _is_norm(child)]
    for query in children:
        for key in children:
            if query != key:
                yield {"query_norm": query, "key_norm": key}


def _is_norm(module: nn.Module) -> bool:
    return [parameter.ndim for parameter in module.parameters()] == [1]


@contextmanager
def _changed(family: Family, names: AttentionNames) -> Iterator[None]:
    """The family with other names for a while."""
    decoder = family.model_class
    before = copy.copy(decoder.attention_names)
    decoder.attention_names = names
    try:
        yield
    finally:
        decoder.attention_names = before
