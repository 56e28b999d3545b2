"""What all converted models share, whatever their family."""

from inspect import signature
from typing import Any, ClassVar

from torch import nn
from transformers import initialization as init

from .tpa_adapters import tell_peft
from .tpa_attention import TPAAttention
from .tpa_coder import RowCoder
from .tpa_gauges import BlockGauge, HeadGauge, PairGauge
from .tpa_keys import KeyNorm, RotatedKeys
from .tpa_paged import pack_paged_cache
from .tpa_rotary import LayerRotary
from .tpa_source import AttentionNames
from .tpa_values import KeyPrediction


class TPAModelMixin:
    """A decoder, or a model with a decoder inside, whose attention is Tensor Product Attention."""

    attention_names: ClassVar[AttentionNames] = AttentionNames()
    _can_record_outputs: ClassVar[dict[str, Any] | None]

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        recorded = getattr(cls, "_can_record_outputs", None) or {}
        cls._can_record_outputs = {**recorded, "attentions": TPAAttention}

    def replace_attention(self) -> None:
        """Puts TPA into every layer; to be called once the source's modules are there."""
        replace_attention(self, self.attention_names)
        tell_peft(self.config)  # type: ignore[attr-defined]

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        pack_paged_cache(self)
        return super().init_continuous_batching(*args, **kwargs)  # type: ignore[misc]

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        if isinstance(module, PairGauge):
            init.normal_(module.weight, std=1.0)
        elif isinstance(module, HeadGauge | BlockGauge | KeyPrediction):
            init.normal_(module.weight, std=module.weight.shape[-1] ** -0.5)
            if isinstance(module, HeadGauge) and module.offset is not None:
                init.zeros_(module.offset)
        elif isinstance(module, KeyNorm):
            init.ones_(module.weight)
        elif isinstance(module, RotatedKeys):
            module.reset_rotary_pair()
        elif isinstance(module, RowCoder):
            init.zeros_(module.mean)
            for scale in (module.step, module.spread, module.importance):
                init.ones_(scale)
            module.reset_constants()

    def _get_static_cache_init_shape(self) -> None:
        # The cache is packed: its shapes follow from the first update, not from the config's heads.
        return None


def replace_attention(decoder: Any, names: AttentionNames) -> None:
    """Puts Tensor Product Attention in every layer of a decoder of transformers, in place.

    The layers know the decoder's rotary embedding, since latent keys are rotated where they are
    used; it stays the decoder's own module.
    """
    rotary = getattr(decoder, names.rotary)
    by_type = "layer_type" in signature(type(rotary).forward).parameters
    layers = getattr(decoder, names.layers)
    kept: dict[Any, Any] = {}
    for i, layer in enumerate(layers):
        attention = TPAAttention(decoder.config, i, getattr(layer, names.attention), names)
        kind = {"layer_type": decoder.config.layer_types[i]} if by_type else {}
        # Past nn.Module's own setter, which would make it a submodule of every layer.
        object.__setattr__(
            attention, "rotary_emb", LayerRotary(rotary, kind, kept, i + 1 == len(layers))
        )
        setattr(layer, names.attention, attention)
