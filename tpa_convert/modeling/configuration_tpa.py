"""Configuration of a Tensor Product Attention (TPA, arXiv 2501.06425) causal language model."""

from dataclasses import dataclass, fields
from typing import Literal, get_args

from transformers.models.llama.configuration_llama import LlamaConfig

Form = Literal["static", "affine", "linear"]
Gauge = Literal["absorbed", "applied", "none"]
KeyCache = Literal["rotated", "latent"]


@dataclass(frozen=True)
class LayerShape:
    """What one layer caches and how it is laid out.

    Args:
        form: how the head factors depend on the token: `static` (constant), `affine` (α + W x) or
            `linear` (W x, scaled by 1 / rank: the layer of the paper).
        gauge: where the constant per-head maps T (keys) and U (values) live: `absorbed` into the
            query and output projections, `applied` at run time, or `none` (T = U = 1, the layer of
            the paper).
        rank_k, rank_v: number of head factors. For `static` the head factors are constants inside
            the gauge and the rank is informative: the largest number of key components on one
            rotary pair.
        width_k, width_v: feature numbers cached per token (Σ d_r over the components).
        key_cache: what is cached for the keys. `rotated`: components on single rotary pairs, after
            rotation, so that queries read the cache as it is. `latent`: features of all pairs
            together, before rotation, from which the keys are rebuilt and rotated at every step.
            Latent keys need `static` head factors; their gauge is always applied, and `gauge` says
            where that of the values lives.
    """

    form: Form
    gauge: Gauge
    rank_k: int
    rank_v: int
    width_k: int
    width_v: int
    key_cache: KeyCache = "rotated"

    @property
    def latent_keys(self) -> bool:
        """Whether keys are rebuilt from what is cached."""
        return self.key_cache == "latent"

    @property
    def contextual(self) -> bool:
        """Whether head factors depend on the token, hence are cached."""
        return self.form != "static"

    def cached_floats(self, num_key_value_heads: int) -> int:
        """Numbers cached per token by this layer."""
        head_factors = (self.rank_k + self.rank_v) * num_key_value_heads if self.contextual else 0
        return self.width_k + self.width_v + head_factors

    def problem(self, head_dim: int) -> str | None:
        """Why this shape cannot be built for heads of `head_dim`, or None if it can."""
        if self.form not in get_args(Form):
            return f"form must be one of {', '.join(get_args(Form))}, not {self.form!r}"
        if self.gauge not in get_args(Gauge):
            return f"gauge must be one of {', '.join(get_args(Gauge))}, not {self.gauge!r}"
        if self.key_cache not in get_args(KeyCache):
            return (
                f"key_cache must be one of {', '.join(get_args(KeyCache))}, not {self.key_cache!r}"
            )
        if self.latent_keys and self.contextual:
            return f"latent keys need form 'static', not {self.form!r}"
        if self.gauge == "none" and not self.contextual:
            return "static head factors live in the gauge: use gauge 'absorbed' or 'applied'"
        for name, rank, width in (
            ("k", self.rank_k, self.width_k),
            ("v", self.rank_v, self.width_v),
        ):
            pairs = width // 2 if name == "k" else width
            if rank < 1 or width < 1:
                return f"rank_{name} and width_{name} must be positive, not {rank} and {width}"
            if name == "k" and width % 2 and not self.latent_keys:
                return f"width_k must be even (rotary pairs), not {width}"
            if self.contextual and pairs % rank:
                return f"rank_{name}={rank} must divide the components of width_{name}={width}"
            if self.gauge == "none" and width != rank * head_dim:
                return (
                    f"without a gauge width_{name} must be rank_{name} * head_dim, not {width} "
                    f"(rank {rank}, head_dim {head_dim})"
                )
        return None


LAYER_FIELDS = tuple(field.name for field in fields(LayerShape))


class TPAConfig(LlamaConfig):
    r"""
    A LLaMA-style decoder whose attention is Tensor Product Attention. Everything but the attention
    layers is described by the fields of [`LlamaConfig`]; the fields of [`LayerShape`] are given
    here as one value for all layers or as a list with one value per layer, and become lists.

    Args:
        form, gauge, rank_k, rank_v, width_k, width_v, key_cache: see [`LayerShape`].
        rank_q: rank of factored queries (paper, eq. 3.1), or None for dense queries. Only with
            `linear` layers whose gauge is not absorbed.
        attention_scale: factor on the scores before softmax; `head_dim ** -0.5` when None. It is
            always the scale of the source model, whatever the width of the cached keys.
        attention_bias: whether queries and feature factors have a bias.
        attention_output_bias: whether the output projection has a bias.
    """

    model_type = "tpa"
    base_model_tp_plan = None

    form: str | list[str] = "static"
    gauge: str | list[str] = "absorbed"
    rank_k: int | list[int] = 1
    rank_v: int | list[int] = 1
    width_k: int | list[int] | None = None
    width_v: int | list[int] | None = None
    key_cache: str | list[str] = "rotated"
    rank_q: int | None = None
    attention_scale: float | None = None
    attention_output_bias: bool = False

    def __post_init__(self, **kwargs):
        head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.width_k = head_dim if self.width_k is None else self.width_k
        self.width_v = head_dim if self.width_v is None else self.width_v
        for name in LAYER_FIELDS:
            value = getattr(self, name)
            if not isinstance(value, list):
                setattr(self, name, [value] * self.num_hidden_layers)
        super().__post_init__(**kwargs)
        if self.attention_scale is None:
            self.attention_scale = head_dim**-0.5
        self.validate_factors()

    def layer_shape(self, layer_idx: int) -> LayerShape:
        """Shape of the attention of layer `layer_idx`."""
        return LayerShape(**{name: getattr(self, name)[layer_idx] for name in LAYER_FIELDS})

    @property
    def cached_floats(self) -> list[int]:
        """Numbers cached per token, one entry per layer."""
        return [
            self.layer_shape(i).cached_floats(self.num_key_value_heads)
            for i in range(self.num_hidden_layers)
        ]

    def validate_architecture(self):
        """Nothing: LlamaConfig wants hidden_size to be a multiple of the heads; with head_dim it
        need not be."""

    def validate_factors(self):
        """Checks the per-layer shapes. Raises `ValueError` naming the first bad layer."""
        for name in LAYER_FIELDS:
            entries = len(getattr(self, name))
            if entries != self.num_hidden_layers:
                raise ValueError(
                    f"{name} has {entries} entries for {self.num_hidden_layers} layers"
                )
        for layer_idx in range(self.num_hidden_layers):
            shape = self.layer_shape(layer_idx)
            problem = shape.problem(self.head_dim)
            factored = shape.form == "linear" and shape.gauge != "absorbed"
            if problem is None and self.rank_q is not None and not factored:
                problem = "rank_q needs form 'linear' and a gauge that is not absorbed"
            if problem:
                raise ValueError(f"layer {layer_idx}: {problem}")


__all__ = ["Form", "Gauge", "KeyCache", "LayerShape", "TPAConfig"]
