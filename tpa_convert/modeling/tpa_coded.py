"""A coded layer on the kernels of tpa-convert: rows of new tokens, and attention of one of them on
all rows. See `tpa_keys` for letters."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from .tpa_cache import Room, room_in
from .tpa_coder import CODED_BY, RowCoder
from .tpa_codes import LOWEST_OCTAVE
from .tpa_gauges import BlockGauge, Heads
from .tpa_kernels import (
    CodedKernels,
    Sources,
    find_coded,
    mask_of_slots,
    part_of,
    plain_inference,
    plain_product,
    wants_gradients,
)
from .tpa_keys import KeyLayout, LatentKeys, RotatedKeys
from .tpa_rotary import Table
from .tpa_values import StaticValues


class CodedTables(NamedTuple):
    """What kernels need of a layer beside its projections.

    Attributes:
        tokens: of the kernels that code new tokens.
        row_bytes: of a row of keys and of one of values.
        decoding: of the kernels that decode; None where they do not run.
        heads, offsets: keys and behind them values of all heads, of features of values and behind
            them of keys: [2 · j · d, features] and [2 · j · d]; None where keys are normalised, or
            made block by block of rotary pairs, and where U is absorbed.
        gauge, offset: of the values, [j, d, features] and [j, 1, d]; None where U is absorbed.
    """

    tokens: Any
    row_bytes: tuple[int, int]
    decoding: Any
    heads: Tensor | None
    offsets: Tensor | None
    gauge: Tensor | None
    offset: Tensor | None

    def tensors(self) -> list[Tensor]:
        tokens = self.tokens
        parts: list[Any] = [tokens, tokens.keys, tokens.values, self.decoding or (), self]
        return [x for part in parts for x in part if isinstance(x, Tensor)]


class CodedLayer:
    """Codes new tokens of one layer and decodes over its rows, on kernels, with tables that follow
    from parameters and buffers.

    Whether they still do is seen whenever a cache begins or takes several tokens, and after
    training. One token more is decoded with the tables that those before were: to look at each
    tensor takes the host a tenth of a layer's time.
    """

    def __init__(self) -> None:
        self.kernels = find_coded()
        self.tables: CodedTables | None = None
        self.made_of = Sources()
        self.made_for: tuple[torch.dtype, torch.device] | None = None
        self.cache: weakref.ref[Cache] | None = None  # that these tables are in use for

    def __reduce__(self) -> Any:
        """A copy makes its own tables."""
        return CodedLayer, ()

    def prepare(
        self, query: Tensor, keys: KeyLayout, values: StaticValues, cache: Any, held: Any
    ) -> CodedTables | None:
        """Tables for queries of this type and place; None where no kernel is to run.

        Args:
            query: [b, s, ...].
            cache: that rows go to, and how many tokens it is known to hold; None if it is not.
        """
        made_for, several = (query.dtype, query.device), query.shape[1] > 1
        if torch.compiler.is_compiling():
            # Which cannot tell whether tables are still right: they are those of the prompt before.
            if several or self.made_for != made_for or torch.is_grad_enabled():
                return None
            return self.tables
        known = self.cache  # another thread may begin a cache meanwhile
        if (
            held
            and not several
            and known is not None
            and known() is cache
            and self.made_for == made_for
            and self.made_of.round == Sources.rounds
            and not torch.is_grad_enabled()
        ):
            return self.tables
        self.cache = None
        kernels = self.kernels
        if kernels is None or not kernels.wanted(query.device):
            return None
        learned = (*keys.parameters(), *values.parameters()) if torch.is_grad_enabled() else ()
        if wants_gradients(query, *learned):
            return None
        parts = parameters_of(keys, values)
        if self.made_for != made_for or not self.made_of.are(parts):
            if any(x.device != query.device for x in parts):  # offloaded
                return None
            if not kernels.encodes(keys.shape.width_k, *made_for):
                return None
            with torch.inference_mode(False), torch.no_grad():
                self.tables = tables_of(kernels, keys, values, query.dtype)
            for table in self.tables.tensors():
                if table.is_cuda:  # graphs need not copy it
                    torch._dynamo.mark_static_address(table)
            self.made_of, self.made_for = Sources(parts), made_for
        self.cache = None if held is None else weakref.ref(cache)
        return self.tables

    def take_in(
        self,
        hidden_states: Tensor,
        projections: Sequence[nn.Module],
        table: Table,
        keys: KeyLayout,
        values: StaticValues,
        cache: Any,
        held: Any,
        layer_idx: int,
        normalise: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[CodedTables, Tensor, Tensor, Tensor, Room | None] | None:
        """Tables, rotated queries [b, h, 1, d], and rows of the keys and values of one new token of
        each sequence, [b, 1, 1, bytes], or the room where they are in the cache; None where
        `prepare` and `pack` have to find them.

        Args:
            hidden_states: [b, 1, D].
            projections: to queries, and to components of keys and of values.
            table: that queries are rotated by, see `rotate`.
            cache, held, layer_idx: see `prepare`, and which layer of it.
            normalise: queries, [b, 1, h · d] in any shape.
        """
        kernels = self.kernels
        if kernels is None or not plain_inference(hidden_states):
            return None
        weights, biases = [], []
        for projection in projections:
            found = plain_product(projection, hidden_states)
            if found is None:
                return None
            weights.append(found[0])
            biases.append(found[1])
        tables = self.prepare(hidden_states, keys, values, cache, held)
        if tables is None or not kernels.takes_in(len(hidden_states), hidden_states.shape[-1]):
            return None
        room = room_in(cache, layer_idx, hidden_states, 1, tables.row_bytes)
        place = None if room is None else (*room.whole, room.slots)
        given = hidden_states, weights, biases, tables.tokens, *table, keys.head_dim, normalise
        return tables, *kernels.take_in(*given, place), room

    def pack(
        self,
        tables: CodedTables,
        hidden_states: Tensor,
        query: Tensor,
        table: Table,
        keys: KeyLayout,
        values: StaticValues,
        cache: Any,
        layer_idx: int,
    ) -> tuple[Tensor, Tensor, Tensor, Room | None, Tensor | None]:
        """Rotated queries, [b, h, s, d], rows of keys and of values of new tokens, [b, 1, s,
        bytes], the room where they are in the cache, and what `expand` takes of several, [b, 1, s,
        features].

        Args:
            hidden_states: [b, s, D].
            query: [b, s, h, d].
            table: that queries are rotated by, see `rotate`.
            cache, layer_idx: see `take_in`.
        """
        assert self.kernels is not None
        batch, length, _ = hidden_states.shape
        key, value = (part_of(part, "feature_factor")(hidden_states) for part in (keys, values))
        key, value = key.view(-1, key.shape[-1]), value.view(-1, value.shape[-1])
        room = None  # for compilers there is none
        if not torch.compiler.is_compiling():
            room = room_in(cache, layer_idx, hidden_states, length, tables.row_bytes)
        place = None if room is None else (*room.whole, room.slots)
        coded = self.kernels.code_prompt(key, value, query, tables.tokens, *table, place)
        features = coded.features.view(batch, 1, length, -1) if length > 1 else None
        return coded.query.transpose(1, 2), coded.keys, coded.values, room, features

    def decode(
        self,
        tables: CodedTables,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        table: Table,
        projection: nn.Module,
        scaling: float,
        softcap: float | None = None,
    ) -> Tensor | None:
        """Output [b, 1, D] of the attention of one query position on rows, as they are cached;
        None where no kernel runs it.

        Args:
            query: rotated, [b, h, 1, d].
            key, value: the cache of this layer, [b, 1, t, bytes].
            attention_mask: as the attention function takes it.
            table: cosines and sines of the pairs at the cached positions, [b or 1, t, d / 2].
            projection: of the output.
        """
        known, mask = mask_of_slots(attention_mask, added=True)
        if tables.decoding is None or not known:
            return None
        assert self.kernels is not None
        kernels, cached = self.kernels, (query, key, value, *table, tables.decoding)
        gauge, offset, batch = tables.gauge, tables.offset, len(query)
        plain = None
        if gauge is not None and plain_inference(query):
            plain = plain_product(projection, query)
        if plain is not None and kernels.takes_in(batch, plain[0].shape[1]):
            output_map = kernels.output_map(gauge, offset, *plain)
            return kernels.attend(*cached, scaling, softcap, mask, output_map)
        bounds = None, None, None  # start, end and window: the mask says all
        call = scaling, *bounds, softcap, mask, None
        if gauge is None:
            return projection(kernels.decode(*cached, *call, False).view(batch, 1, -1))
        mixed, gauge = kernels.decode(*cached, *call, True), gauge.mT  # [j, b · h / j, width]
        found = torch.bmm(mixed, gauge) if offset is None else torch.baddbmm(offset, mixed, gauge)
        if batch > 1:
            found = found.view(len(gauge), batch, -1).transpose(0, 1)
        return projection(found.reshape(batch, 1, -1))

    def expand(
        self,
        tables: CodedTables,
        features: Tensor,
        table: Table,
        keys: RotatedKeys | LatentKeys,
        values: StaticValues,
        heads: Heads,
    ) -> tuple[Tensor, Tensor]:
        """Rotated keys and values of a prompt, [b, j, s, d] each.

        Args:
            features: of values and behind them of keys, [b, 1, s, features].
            table: that keys are rotated by.
            heads: which of them.
        """
        if heads is None and tables.heads is not None:
            assert self.kernels is not None
            batch, _, length, _ = features.shape
            made = nn.functional.linear(features, tables.heads, tables.offsets)
            key, value = made.view(batch, length, 2, keys.heads, keys.head_dim).unbind(2)
            return self.kernels.rotate(key, *table).transpose(1, 2), value.transpose(1, 2)
        assert keys.coder is not None
        of_keys = keys.coder.width
        value, key = features.split((features.shape[-1] - of_keys, of_keys), -1)
        value = features if keys.shape.predict_values else value
        return keys.expand(key, table, heads), values.expand(value, heads)


def parameters_of(keys: KeyLayout, values: StaticValues) -> list[Tensor]:
    """What the tables of a layer follow from."""
    found: list[Any] = []
    for part in (keys._modules, values._modules):  # past their own look-up, which takes longer
        coder, gauge = part["coder"], part.get("gauge")
        assert coder is not None
        found += map(coder._buffers.get, CODED_BY)
        shared = None if gauge is None else gauge._modules.get("shared")
        for module in (gauge, shared, part.get("norm"), part.get("key_prediction")):
            if module is not None:
                found += module._parameters.values()
    return [x for x in found if x is not None]


def tables_of(
    kernels: CodedKernels, keys: KeyLayout, values: StaticValues, dtype: torch.dtype
) -> CodedTables:
    """The tables of a layer whose queries are in `dtype`."""
    key_coder, value_coder, gauge = keys.coder, values.coder, values.gauge
    assert key_coder is not None
    assert value_coder is not None
    decoding = kernels.tables(
        rows_of(kernels, key_coder),
        rows_of(kernels, value_coder),
        key_map_of(kernels, keys),
        dtype,
        keys.shape.predict_values,
    )
    prediction = None
    if values.key_prediction is not None:
        prediction = values.key_prediction.matrix().to(dtype)
    codes = codes_of(kernels, key_coder), codes_of(kernels, value_coder)
    of_values = None if gauge is None else gauge.matrix().to(dtype).contiguous()
    offset = None if gauge is None or gauge.offset is None else gauge.offset.to(dtype)
    of_keys = None if keys.norm is not None else keys.gauge.whole()
    heads = offsets = None
    if of_keys is not None and of_values is not None:
        features = key_coder.width + value_coder.width
        before = nn.functional.pad(of_keys[0].to(dtype), (value_coder.width, 0))
        behind = nn.functional.pad(of_values, (0, features - of_values.shape[-1]))
        heads = torch.cat((before, behind)).flatten(0, 1)
        if keys.shape.predict_values:  # in the same place
            of_values = heads.view(2, *of_values.shape)[1]
        parts = of_keys[1], offset
        made = [behind.new_zeros(behind.shape[:2]) if x is None else x.to(dtype) for x in parts]
        offsets = torch.cat(made).flatten()
    return CodedTables(
        kernels.token_tables(*codes, prediction),
        (key_coder.layout.row_bytes, value_coder.layout.row_bytes),
        decoding if kernels.decodes(decoding, dtype, key_coder.mean.device) else None,
        heads,
        offsets,
        of_values,
        None if offset is None else offset[:, None],
    )


def rows_of(kernels: CodedKernels, coder: RowCoder) -> Any:
    return kernels.rows(coder.layout.tiers, coder.layout.header, coder.step, LOWEST_OCTAVE)


def codes_of(kernels: CodedKernels, coder: RowCoder) -> Any:
    """Of components, and of where they lie in rows."""
    layout, codes = coder.layout, kernels.code_tables(*coder.quantiser().codes)
    places = kernels.row_tables(layout.tiers, layout.header, layout.row_bytes)
    *on_device, header = places
    places = type(places)(*(x.to(coder.mean.device) for x in on_device), header)
    return kernels.row_codes(codes, places)


def key_map_of(kernels: CodedKernels, keys: KeyLayout) -> Any:
    """How keys come out of components."""
    gauge, norm = keys.gauge, keys.norm
    unscale = gain = None
    if norm is not None:
        weight, divisor = norm.weights(torch.float32)
        unscale, gain = divisor.reciprocal(), weight / divisor
    if isinstance(gauge, BlockGauge):
        of_class, offset = gauge.shared.weight[..., 0], gauge.shared.offset
        widths = gauge.widths
    else:
        of_class, offset, widths = None, gauge.offset, [keys.shape.width_k]
    return kernels.key_map(
        gauge.weight,
        widths,
        offset,
        of_class,
        unscale,
        gain,
        0.0 if norm is None else norm.eps,
        norm is not None and norm.all_heads,
    )
