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
from .tpa_gauges import BlockGauge
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
from .tpa_keys import KeyLayout
from .tpa_rotary import Table
from .tpa_values import StaticValues


class CodedTables(NamedTuple):
    """What kernels need of a layer beside its projections.

    Attributes:
        keys, values: of the kernel that codes components.
        prediction: what values take off for features of keys in whole words, [key features,
            width]; None where they are not predicted.
        tokens: of the kernels that take in single tokens.
        decoding: of the kernels that decode; None where they do not run.
        key_gauge, key_offset: of all heads together, [j · d, features] and [j · d]; None where keys
            are normalised, or made block by block of rotary pairs.
        gauge, offset: of the values, [j, d, features] and [j, 1, d]; None where U is absorbed.
    """

    keys: Any
    values: Any
    prediction: Tensor | None
    tokens: Any
    decoding: Any
    key_gauge: Tensor | None
    key_offset: Tensor | None
    gauge: Tensor | None
    offset: Tensor | None

    def tensors(self) -> list[Tensor]:
        parts: list[Any] = [self.keys, self.values, self.decoding or (), self]
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
        room = room_in(cache, layer_idx)
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
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """Rotated queries, [b, h, s, d], rows of keys and of values of new tokens, [b, 1, s,
        bytes], and the features of several, [b, 1, s, width].

        Args:
            hidden_states: [b, s, D].
            query: [b, s, h, d].
            table: that queries are rotated by, see `rotate`.
        """
        assert self.kernels is not None
        batch, length, _ = hidden_states.shape
        component = part_of(keys, "feature_factor")(hidden_states)
        component = component.view(-1, component.shape[-1])
        rotation = query.contiguous(), *table
        key, key_features, rotated = self.kernels.encode(component, tables.keys, rotation)
        component = part_of(values, "feature_factor")(hidden_states)
        component = component.view(-1, component.shape[-1])
        if tables.prediction is not None:
            # Under autocast normalised queries, whose type tables have, are in another one. What is
            # not in place would copy first.
            prediction = tables.prediction.to(component.dtype)
            component.addmm_(key_features, prediction, alpha=-1)
        value, value_features, _ = self.kernels.encode(component, tables.values)
        shape = batch, 1, length, -1
        features = None
        if length > 1:
            features = key_features.view(shape), value_features.view(shape)
        return rotated.transpose(1, 2), key.view(shape), value.view(shape), features

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
        self, tables: CodedTables, key: Tensor, value: Tensor, table: Table
    ) -> tuple[Tensor, Tensor] | None:
        """Rotated keys and values of a prompt, [b, j, s, d] each, in few steps; None where only the
        layouts of keys and values know how.

        Args:
            key, value: features, [b, 1, s, width] each; of values with all that they follow from.
            table: that keys are rotated by.
        """
        if tables.key_gauge is None or tables.gauge is None or torch.compiler.is_compiling():
            return None
        assert self.kernels is not None
        groups, head_dim, width = tables.gauge.shape
        batch, _, length, _ = key.shape
        shape = batch, length, groups, head_dim
        key = nn.functional.linear(key, tables.key_gauge, tables.key_offset).view(shape)
        key = self.kernels.rotate(key, *table)
        offset = None if tables.offset is None else tables.offset.view(-1)
        gauge = tables.gauge.view(-1, width)
        value = nn.functional.linear(value, gauge, offset).view(shape)
        return key.transpose(1, 2), value.transpose(1, 2)


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
    key_codes, value_codes = codes_of(kernels, key_coder), codes_of(kernels, value_coder)
    whole = None if keys.norm is not None else keys.gauge.whole()
    return CodedTables(
        key_codes,
        value_codes,
        None if prediction is None else prediction.mT,
        kernels.token_tables(key_codes, value_codes, prediction),
        decoding if kernels.decodes(decoding, dtype, key_coder.mean.device) else None,
        None if whole is None else whole[0].to(dtype).flatten(0, 1),
        None if whole is None else whole[1].to(dtype).flatten(),
        None if gauge is None else gauge.matrix().to(dtype).contiguous(),
        None if gauge is None or gauge.offset is None else gauge.offset.to(dtype)[:, None],
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
