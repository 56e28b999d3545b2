"""What codes the components of a layer's keys or values where attention runs: `RowCoder`."""

from typing import Any

import torch
from torch import Tensor, nn

from .tpa_codes import (
    CLASSES,
    NO_ROWS,
    Quantiser,
    RowLayout,
    RowTables,
    decode,
    highest_codes,
    numbers_of,
    pack_rows,
    quantise,
    round_up,
    row_tables,
    straight_through,
)
from .tpa_kernels import Sources, find_coding

CODED_BY = "mean", "step", "spread", "importance", "highest"
AT_ONCE = 1 << 24  # numbers that rows are unpacked to side by side
FEATURES = 8  # come in multiples of so many: a GPU wants rows of whole words of 16 bytes


class RowCoder(nn.Module):
    """Components of the keys or the values of one layer to rows of bytes, and rows to *features*.

    The features of a token are what its codes add to the mean of its class, and after them, for
    each class but the first, 1 if the token is of it and 0 if not. What maps features to keys or
    values thus knows the class as one column more. Behind them are zeros, up to whole words.
    """

    mean: Tensor
    step: Tensor
    spread: Tensor
    importance: Tensor
    highest: Tensor
    scales: Tensor
    tried: Tensor
    shifts: Tensor
    row_places: Tensor
    row_fields: Tensor

    def __init__(self, layout: RowLayout):
        super().__init__()
        self.layout, count = layout, layout.components
        self.register_buffer("mean", torch.zeros(CLASSES, count))
        for name in ("step", "spread", "importance"):
            self.register_buffer(name, torch.ones(count))
        self.coding = find_coding()
        self.made_of = Sources()
        self.kept: dict[str, Quantiser] = {}
        # Follows from the config: what loading leaves out, `init_weights` makes again.
        for name, table in self._constants().items():
            self.register_buffer(name, table, persistent=False)

    def _constants(self) -> dict[str, Tensor]:
        """The highest codes, and `RowTables`."""
        tables: tuple[Any, ...] = row_tables(self.layout, CLASSES)
        names = ("scales", "tried", "shifts", "row_places", "row_fields")
        named = {name: t for name, t in zip(names, tables, strict=True) if t is not None}
        return {"highest": highest_codes(self.layout)} | named

    @property
    def width(self) -> int:
        """Features of a token, with the zeros behind them."""
        return round_up(self.layout.components + CLASSES - 1, FEATURES)

    def reset_constants(self) -> None:
        """Fills what follows from the config again."""
        for name, table in self._constants().items():
            getattr(self, name).copy_(table)

    def quantiser(self, layout: RowLayout = NO_ROWS) -> Quantiser:
        """The tables; with the layout, if there are rows to be made or read."""
        if torch.compiler.is_compiling():
            return self._quantiser(layout)
        # Kept until one of these is another or has changed: every token and layer asks.
        given: list[Any] = [self._buffers[source] for source in CODED_BY]
        if not self.made_of.are(given):
            self.made_of, self.kept = Sources(given), {}
        name = "rows" if layout is not NO_ROWS else "no rows"
        if name not in self.kept:
            with torch.inference_mode(False), torch.no_grad():
                made = self._quantiser(layout)
                self.kept[name] = made._replace(followed=made.header_tables)
        return self.kept[name]

    def _quantiser(self, layout: RowLayout) -> Quantiser:
        rows = () if layout is NO_ROWS else (self.row_places, self.row_fields)
        return Quantiser(
            layout,
            self.mean.float(),
            self.step.float(),
            self.spread.float(),
            self.importance.float(),
            self.highest,
            RowTables(self.scales, self.tried, self.shifts, *rows),
        )

    def forward(
        self,
        x: Tensor,
        rows: bool = False,
        dtype: torch.dtype | None = None,
        features: bool = False,
    ) -> Any:
        """Components or rows to rows or features.

        Args:
            x: components [..., c], or rows, uint8 [..., row_bytes].
            rows: make rows of components; otherwise features, with gradients as if nothing were
                rounded, and the same that rows of these components give.
            dtype: of features that are made of rows.
            features: make them too where rows are made.

        Returns: features [..., width]; or rows, uint8 [..., row_bytes], and features in the type of
            x or None.
        """
        if dtype is not None:
            return self._features(x, dtype)
        if rows:
            quantiser = self.quantiser(self.layout)
            coded = quantise(x.float(), quantiser)
            row = pack_rows(*coded, quantiser.layout, quantiser.tables)
            return row, features_of(*numbers_of(*coded, quantiser), x.dtype) if features else None
        quantiser, coding = self.quantiser(), self.coding
        if coding is not None and coding.wanted(x.device):
            numbers, label = coding.straight_through(x, coding.code_tables(*quantiser.codes))
        else:
            numbers, label = straight_through(x.float(), quantiser)
        return features_of(numbers, label, x.dtype)

    def _features(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """What rows say, in `dtype`; some tokens at a time, since there are several fp32 numbers
        for each code on the way."""
        quantiser, slots = self.quantiser(self.layout), rows.shape[-2]
        tokens = max(1, rows.numel() // rows.shape[-1])
        at_once = max(1, AT_ONCE * slots // (tokens * self.width))
        if slots <= at_once or torch.compiler.is_compiling():
            return features_of(*decode(rows, quantiser), dtype)
        made = rows.new_empty((*rows.shape[:-1], self.width), dtype=dtype)
        parts = rows.split(at_once, -2), made.split(at_once, -2)
        for part, features in zip(*parts, strict=True):
            features.copy_(features_of(*decode(part, quantiser), dtype))
        return made


def features_of(numbers: Tensor, label: Tensor, dtype: torch.dtype) -> Tensor:
    """What a token's codes say [..., c], its class [...], and zeros, side by side."""
    # Of two classes, the label is what tells the second one from the first.
    said = torch.cat((numbers.to(dtype), label[..., None].to(dtype)), dim=-1)
    return nn.functional.pad(said, (0, -said.shape[-1] % FEATURES))
