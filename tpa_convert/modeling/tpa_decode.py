"""Attention of one query position on a packed cache; see `tpa_keys` for letters.

On the kernels of tpa-convert where they are found and can run a case, in PyTorch otherwise.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .tpa_coder import RowCoder
from .tpa_codes import LOWEST_OCTAVE
from .tpa_gauges import BlockGauge
from .tpa_kernels import LatentKernels, Sources, decode_components, find_latent, mask_of_slots
from .tpa_keys import LatentKeys, RotatedKeys
from .tpa_rotary import Table
from .tpa_values import StaticValues


class LatentDecoder:
    """Decodes over the coded latent keys of one layer on a kernel; keeps the tables that it needs.

    Tables follow from parameters. They are made anew when those are others or have changed.
    """

    def __init__(self) -> None:
        self.kernels = find_latent()
        self.tables: Any = None
        self.made_of = Sources()
        self.dtype: torch.dtype | None = None

    def __reduce__(self) -> Any:
        """A copy makes its own tables."""
        return LatentDecoder, ()

    def prepare(self, query: Tensor, keys: LatentKeys, values: StaticValues) -> Any:
        """Tables for queries of this type and place; None where no kernel would run."""
        if torch.compiler.is_compiling():  # a compiler cannot tell whether tables are still right
            return self.tables
        if self.kernels is None or keys.coder is None or not self.kernels.wanted(query.device):
            return None
        parts = parameters_of(keys, values)
        if self.dtype == query.dtype and self.made_of.are(parts):
            return self.tables
        if any(x.device != query.device for x in parts):  # offloaded
            return None
        with torch.inference_mode(False), torch.no_grad():
            self.tables = tables_of(self.kernels, keys, values, query.dtype)
        for table in self.tables:
            if isinstance(table, Tensor) and table.is_cuda:  # graphs need not copy it
                torch._dynamo.mark_static_address(table)
        self.made_of, self.dtype = Sources(parts), query.dtype
        return self.tables

    def decode(
        self,
        query: Tensor,
        packed_key: Tensor,
        packed_value: Tensor,
        attention_mask: Tensor | None,
        table: Table,
        constants: Any,
        scaling: float,
        softcap: float | None = None,
    ) -> Tensor | None:
        """What attention mixes of all features that values are made of, [b, h, 1, width], or None.

        Args:
            query: rotated, [b, h, 1, d].
            packed_key, packed_value: the cache of this layer, [b, 1, t, ...].
            attention_mask: as the attention function takes it.
            table: of the features at the cached positions, [b or 1, 1, t, d].
            constants: what `prepare` gave.
        """
        known, mask = mask_of_slots(attention_mask, added=True)
        if not known or self.kernels is None:
            return None
        pairs = table[0].shape[-1] // 2
        cosine, sine = (x[:, 0, :, pairs:] for x in table)
        return self.kernels.decode(
            query,
            packed_key,
            packed_value,
            cosine,
            sine,
            constants,
            scale=scaling,
            softcap=softcap,
            mask=mask,
        )


def parameters_of(keys: LatentKeys, values: StaticValues) -> list[Tensor]:
    """What the tables of a layer follow from."""
    gauge = keys.gauge
    whole = gauge.shared if isinstance(gauge, BlockGauge) else gauge
    parts: list[Tensor | None] = [gauge.weight, whole.weight, whole.offset]
    if keys.norm is not None:
        parts.append(keys.norm.weight)
    parts += [coder.step for coder in (keys.coder, values.coder) if coder is not None]
    return [x for x in parts if x is not None]


def tables_of(
    kernels: LatentKernels, keys: LatentKeys, values: StaticValues, dtype: torch.dtype
) -> Any:
    """The kernels' tables of a layer whose queries are in `dtype`."""
    gauge, shape = keys.gauge, keys.shape

    def rows(coder: RowCoder | None) -> Any:
        assert coder is not None
        return kernels.rows(coder.layout.tiers, coder.layout.header, coder.step, LOWEST_OCTAVE)

    unscale = gain = None
    if keys.norm is not None:
        weight, divisor = keys.norm.weights(torch.float32)
        unscale, gain = divisor.reciprocal(), weight / divisor
    if isinstance(gauge, BlockGauge):
        of_class, offset = gauge.shared.weight[..., 0], gauge.shared.offset
        widths = gauge.widths
    else:
        of_class, offset, widths = None, gauge.offset, [shape.width_k]
    key_map = kernels.key_map(
        gauge.weight,
        widths,
        offset,
        of_class,
        unscale,
        gain,
        0.0 if keys.norm is None else keys.norm.eps,
        keys.norm is not None and keys.norm.all_heads,
    )
    parts = rows(keys.coder), rows(values.coder)
    return kernels.tables(*parts, key_map, dtype, shape.predict_values)


def decode_rotated(
    query: Tensor,
    packed_key: Tensor,
    packed_value: Tensor,
    attention_mask: Tensor | None,
    keys: RotatedKeys,
    values: StaticValues,
    kernel: Any,
    scaling: float,
) -> Tensor:
    """Attention on rotated keys, which are used as they are cached.

    Args:
        query: rotated queries [b, h, 1, width_k] (absorbed gauge) or [b, h, 1, d].
        packed_key, packed_value: the cache of this layer, [b, 1, t, ...].
        attention_mask: boolean or additive, [b, 1, 1, t], or None to attend to everything.
        kernel: see `tpa_kernels.find_kernel`.

    Returns: what the output projection reads, [b, h, 1, width_v or d].
    """
    shape, groups = keys.shape, keys.heads
    linear = shape.form == "linear"
    query = keys.component_queries(query)
    mixed = decode_components(
        kernel,
        query,
        packed_key,
        packed_value,
        attention_mask,
        key_factors=shape.key_head_factors(groups),
        value_factors=shape.rank_v * groups if shape.contextual else 0,
        scale=scaling / shape.rank_k if linear else scaling,
        groups=groups,
    )
    if mixed is not None:
        return values.output(mixed / shape.rank_v if linear else mixed)
    if shape.key_head_factors(groups):
        weights = masked_softmax(keys.scores(query, packed_key) * scaling, attention_mask)
        return values.output(values.mix(weights, packed_value))
    return values.output(mix_shared(query, packed_key, packed_value, attention_mask, scaling))


def decode_rebuilt(
    query: Tensor,
    key: Tensor,
    parts: tuple[Tensor, ...],
    attention_mask: Tensor | None,
    values: StaticValues,
    scaling: float,
) -> Tensor:
    """Attention on keys that have been rebuilt, [b, j, t, d], with values made of `parts` of
    features side by side, [b, 1, t, ...] each; the rest is that of `decode_rotated`."""
    if not key.is_cuda:
        return values.output(mix_parts(query, key, parts, attention_mask, scaling))
    packed_value = torch.cat(parts, -1) if len(parts) > 1 else parts[0]
    return values.output(mix_shared(query, key, packed_value, attention_mask, scaling))


def mix_shared(
    query: Tensor, key: Tensor, packed_value: Tensor, mask: Tensor | None, scaling: float
) -> Tensor:
    """PyTorch's attention of queries [b, h, 1, d] on keys [b, j, t, d] and features [b, 1, t, w]:
    [b, h, 1, w]."""
    # The query heads that share keys take the place of query positions.
    mixed = nn.functional.scaled_dot_product_attention(
        query.reshape(len(query), key.shape[1], -1, query.shape[-1]),
        key,
        packed_value.expand(-1, key.shape[1], -1, -1),
        attn_mask=mask,
        scale=scaling,
    )
    return mixed.flatten(1, 2).unsqueeze(2)


def mix_parts(
    query: Tensor, key: Tensor, parts: tuple[Tensor, ...], mask: Tensor | None, scaling: float
) -> Tensor:
    """The same of features that all heads share: PyTorch's own attention would copy them for every
    head on a CPU."""
    exact = torch.promote_types(query.dtype, torch.float32)
    grouped = query.reshape(*key.shape[:2], -1, key.shape[-1]) * scaling
    weights = masked_softmax(grouped.to(exact) @ key.to(exact).mT, mask)
    weights = weights.flatten(1, 2).unsqueeze(1).to(query.dtype)  # [b, 1, h, t]
    mixed = [weights @ part for part in parts]
    return (torch.cat(mixed, -1) if len(mixed) > 1 else mixed[0]).transpose(1, 2)


def masked_softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax over [b, h, s, t] in fp32 at least, with a boolean or additive mask that broadcasts
    to it."""
    if mask is not None:
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + mask
    exact = torch.promote_types(scores.dtype, torch.float32)
    return scores.softmax(-1, dtype=exact).to(scores.dtype)
