"""Layouts of the values of Tensor Product Attention; see `tpa_keys` for letters and conventions.

v_j(x) = s Σ_r a_{r,j}(x) U_{r,j} b_r(x)        (arXiv 2501.06425, eq. 3.1, with a gauge U)
"""

import torch
from torch import nn

from .tpa_coder import RowCoder
from .tpa_codes import CLASSES
from .tpa_configuration import LayerShape
from .tpa_gauges import HeadGauge, Heads, in_whole_words, of_heads
from .tpa_kernels import Kept


class KeyPrediction(nn.Module):
    """What features of keys, in whole words, say of the components of values: weight [width, key
    width].

    No `nn.Linear`: what quantises or replaces these expects features of just their width.
    """

    def __init__(self, key_width: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, key_width))
        self.kept = Kept()

    def forward(self, key_features: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(key_features, self.matrix())

    def matrix(self) -> torch.Tensor:
        """The weight with zeros for those behind the features, [width, in whole words]."""
        return self.kept.of((self.weight,), self._in_whole_words)

    def _in_whole_words(self) -> torch.Tensor:
        return in_whole_words(self.weight, [self.weight.shape[-1]])


class StaticValues(nn.Module):
    """Components of all heads together, with constant head factors.

    The output projection reads them as they are (`absorbed`), or U is applied to what attention has
    mixed.
    """

    def __init__(self, shape: LayerShape, hidden_size: int, heads: int, head_dim: int, bias: bool):
        super().__init__()
        self.shape, self.heads, self.head_dim = shape, heads, head_dim
        self.absorbed = shape.value_gauge == "absorbed"
        self.output_width = shape.width_v if self.absorbed else head_dim
        self.rank = shape.rank_v if shape.contextual else 1
        self.expanded_heads = 1 if self.absorbed and not shape.contextual else heads
        self.feature_factor = nn.Linear(hidden_size, shape.width_v, bias=bias or shape.coded)
        self.coder = RowCoder(shape.value_layout) if shape.coded else None
        widths, self.key_prediction = [shape.width_v], None
        if shape.coded:
            widths = [shape.width_v + CLASSES - 1]
        if shape.predict_values:
            widths.append(shape.width_k + CLASSES - 1)
            self.key_prediction = KeyPrediction(widths[-1], shape.width_v)
        self.gauge: HeadGauge | None = None
        if shape.value_gauge == "applied":
            self.gauge = HeadGauge(heads, head_dim, widths, offset=shape.coded)

    def pack(
        self, hidden_states: torch.Tensor, key_features: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Components of new tokens, [b, 1, s, width], of [b, s, D].

        Args:
            key_features: of the same tokens' coded keys, [b, 1, s, key width]; where values are
                predicted, what they say is taken off.
        """
        components = self.feature_factor(hidden_states).unsqueeze(1)
        if self.key_prediction is None:
            return components
        return components - self.key_prediction(key_features)

    def expand(self, packed: torch.Tensor, heads: Heads = None) -> torch.Tensor:
        """Values for attention functions, from what is cached, [b, 1, t, ...].

        Args:
            heads: which of the values, where each head has its own.

        Returns: [b, 1, t, width] shared by all heads if U is absorbed, else [b, j, t, d].
        """
        return packed if self.gauge is None else self.gauge(packed, heads=heads)

    def mix(self, weights: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
        """Components that attention weights [b, h, s, t] mix: [b, h, s, width]."""
        return weights @ packed

    def output(self, mixed: torch.Tensor) -> torch.Tensor:
        """What the output projection reads, [b, h, s, width or d], of mixed components."""
        if self.gauge is None:
            return mixed
        return self.gauge(mixed)


class ContextualValues(StaticValues):
    """Values whose head factors depend on the token (`affine`, `linear`) and are cached too."""

    def __init__(self, shape: LayerShape, hidden_size: int, heads: int, head_dim: int, bias: bool):
        super().__init__(shape, hidden_size, heads, head_dim, bias)
        self.head_factor = nn.Linear(hidden_size, shape.rank_v * heads, bias=shape.form == "affine")

    def pack(
        self, hidden_states: torch.Tensor, key_features: torch.Tensor | None = None
    ) -> torch.Tensor:
        feature = self.feature_factor(hidden_states)
        return torch.cat((self.head_factor(hidden_states), feature), dim=-1).unsqueeze(1)

    def unpack(self, packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Head factors [b, t, r, j], scaled, and feature factors [b, t, r, e]."""
        head, feature = packed[:, 0].split((self.rank * self.heads, self.shape.width_v), dim=-1)
        head = head.unflatten(-1, (self.rank, self.heads))
        head = head / self.rank if self.shape.form == "linear" else head
        return head, feature.unflatten(-1, (self.rank, -1))

    def expand(self, packed: torch.Tensor, heads: Heads = None) -> torch.Tensor:
        head, feature = self.unpack(packed)
        head = of_heads(head, heads, 3)
        if self.shape.value_gauge == "none":
            return torch.einsum("btrj,btrd->bjtd", head, feature)
        if self.gauge is not None and self.rank == 1:
            return self.gauge(feature.transpose(1, 2), heads=heads) * head[:, :, 0].mT[..., None]
        values = torch.einsum("btrj,btre->bjtre", head, feature).flatten(-2)
        return values if self.gauge is None else self.gauge(values, heads=heads)

    def mix(self, weights: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
        head, feature = self.unpack(packed)
        weights = weights.unflatten(1, (self.heads, -1))
        by_rank = torch.einsum("bjnst,btrj->bjnsrt", weights, head)
        return torch.einsum("bjnsrt,btre->bjnsre", by_rank, feature).flatten(-2).flatten(1, 2)

    def output(self, mixed: torch.Tensor) -> torch.Tensor:
        if self.shape.value_gauge == "none":
            return mixed.unflatten(-1, (self.rank, self.head_dim)).sum(-2)
        return super().output(mixed)
