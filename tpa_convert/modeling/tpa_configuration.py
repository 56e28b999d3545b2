"""What a layer of Tensor Product Attention (TPA, arXiv 2501.06425) caches, and configs that say it.

Everything of a converted model but its attention is described by the config of its source's
family; `tpa_layers` adds one `LayerShape` for each layer.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import transformers

from .tpa_codes import MAX_BITS, RowLayout

Form = Literal["static", "affine", "linear"]
Gauge = Literal["absorbed", "applied", "none"]
KeyCache = Literal["rotated", "latent"]

OLDEST_TRANSFORMERS, TOO_NEW_TRANSFORMERS = (5, 17), (6, 0)


def check_transformers(version: str) -> None:
    """Raises `ImportError` if these models do not run with this version of transformers."""
    release = tuple(int(part) for part in version.split(".")[:2])
    if not OLDEST_TRANSFORMERS <= release < TOO_NEW_TRANSFORMERS:
        oldest, newest = ".".join(map(str, OLDEST_TRANSFORMERS)), TOO_NEW_TRANSFORMERS[0]
        raise ImportError(
            f"this TPA model runs with transformers >= {oldest} and < {newest}, and {version} is "
            f"installed: pip install 'transformers>={oldest},<{newest}'"
        )


check_transformers(transformers.__version__)


@dataclass(frozen=True)
class LayerShape:
    """What one layer caches and how it is laid out.

    Args:
        form: how the head factors depend on the token: `static` (constant), `affine` (α + W x) or
            `linear` (W x, scaled by 1 / rank: the layer of the paper).
        key_gauge, value_gauge: where the constant per-head maps T (keys) and U (values) live:
            `absorbed` into the query or output projection, `applied` at run time, or `none` (the
            identity, as in the paper). Latent keys, and keys that are normalised, are always
            `applied`.
        rank_k, rank_v: number of head factors. For `static` the head factors are constants inside
            the gauge and the rank is informative: the largest number of key components on one
            rotary pair.
        width_k, width_v: feature numbers cached per token (Σ d_r over the components).
        key_cache: what is cached for the keys. `rotated`: components on single rotary pairs, after
            rotation, so that queries read the cache as it is. `latent`: features of all pairs
            together, before rotation, from which the keys are rebuilt and rotated at every step.
            Latent keys need `static` head factors.
        key_norm: whether the source normalises each key head (QK-norm); rotated keys then cache one
            scale for each head. "all" if it normalises all heads together: rotated keys are scaled
            before they are cached.
        rank_q: rank of factored queries (paper, eq. 3.1), None for dense ones. Only with `linear`
            head factors and keys whose gauge is not absorbed.
        key_pairs: how many components of rotated keys live on each of the source's rotary pairs, in
            the order of the pairs, separated by blanks. None puts them on all pairs in turn.
        key_codes, value_codes: how many components have how many bits in a cache of codes, as in
            "8x3 4x20 2x85": three of 8 bits, 20 of 4 and 85 of 2. None caches numbers. Both or
            neither; latent keys and an applied value gauge only. Those of the keys may stand in
            several blocks of equally many rotary pairs, "4x9 2x30 | 4x4 2x24": a component of a
            block makes keys on its pairs alone, which divides the cost of rebuilding keys.
        row_align: what the bytes of codes with equally many bits are padded to a multiple of.
        predict_values: whether values are coded as what the codes of the token's keys do not say.
    """

    form: Form
    key_gauge: Gauge
    value_gauge: Gauge
    rank_k: int
    rank_v: int
    width_k: int
    width_v: int
    key_cache: KeyCache = "rotated"
    key_norm: bool | Literal["all"] = False
    rank_q: int | None = None
    key_pairs: str | None = None
    key_codes: str | None = None
    value_codes: str | None = None
    row_align: int = 2
    predict_values: bool = False

    @property
    def coded(self) -> bool:
        """Whether codes of bits are cached instead of numbers."""
        return self.key_codes is not None

    @property
    def key_layout(self) -> RowLayout:
        """Of the rows of coded keys."""
        groups = [group for block in groups_of(self.key_codes) for group in block]
        return RowLayout(tuple(groups), self.row_align)

    @property
    def value_layout(self) -> RowLayout:
        """Of the rows of coded values."""
        groups = [group for block in groups_of(self.value_codes) for group in block]
        return RowLayout(tuple(groups), self.row_align)

    @property
    def key_block_widths(self) -> list[int]:
        """Components of coded keys in each block of rotary pairs."""
        return [sum(count for _, count in block) for block in groups_of(self.key_codes)]

    @property
    def key_blocks(self) -> int:
        """Blocks of rotary pairs that coded keys are rebuilt in."""
        return len(self.key_block_widths) if self.coded else 1

    @property
    def latent_keys(self) -> bool:
        """Whether keys are rebuilt from what is cached."""
        return self.key_cache == "latent"

    @property
    def contextual(self) -> bool:
        """Whether head factors depend on the token, hence are cached."""
        return self.form != "static"

    def key_head_factors(self, num_key_value_heads: int) -> int:
        """Numbers cached per token that belong to single key heads: factors or norms."""
        if self.contextual:
            return self.rank_k * num_key_value_heads
        return num_key_value_heads if self.key_norm is True and not self.latent_keys else 0

    def cached_floats(self, num_key_value_heads: int) -> int:
        """Numbers cached per token by this layer."""
        head_factors = self.key_head_factors(num_key_value_heads)
        head_factors += self.rank_v * num_key_value_heads if self.contextual else 0
        return self.width_k + self.width_v + head_factors

    def cached_bytes(self, num_key_value_heads: int, itemsize: int = 2) -> int:
        """Bytes cached per token by this layer; numbers have `itemsize` bytes."""
        if self.coded:
            return self.key_layout.row_bytes + self.value_layout.row_bytes
        return itemsize * self.cached_floats(num_key_value_heads)

    def rotary_pairs(self, head_dim: int) -> list[int]:
        """The source's rotary pair, 0 ... head_dim / 2 - 1, of each component of rotated keys."""
        if self.key_pairs is None:
            return [p % (head_dim // 2) for p in range(self.width_k // 2)]
        counts = [int(count) for count in self.key_pairs.split()]
        return [pair for pair, count in enumerate(counts) for _ in range(count)]

    def problem(self, head_dim: int) -> str | None:
        """Why this shape cannot be built for heads of `head_dim`, or None if it can."""
        for name, kinds in (
            ("form", Form),
            ("key_gauge", Gauge),
            ("value_gauge", Gauge),
            ("key_cache", KeyCache),
        ):
            value = getattr(self, name)
            if value not in get_args(kinds):
                return f"{name} must be one of {', '.join(get_args(kinds))}, not {value!r}"
        if self.latent_keys and self.contextual:
            return f"latent keys need form 'static', not {self.form!r}"
        if (self.latent_keys or self.key_norm) and self.key_gauge == "absorbed":
            kind = "latent" if self.latent_keys else "normalised"
            return f"{kind} keys need key_gauge 'applied', not 'absorbed'"
        if not self.contextual and "none" in (self.key_gauge, self.value_gauge):
            return "static head factors live in the gauge: use gauge 'absorbed' or 'applied'"
        for name, rank, width in (
            ("k", self.rank_k, self.width_k),
            ("v", self.rank_v, self.width_v),
        ):
            if rank < 1 or width < 1:
                return f"rank_{name} and width_{name} must be positive, not {rank} and {width}"
            if name == "k" and width % 2 and not self.latent_keys:
                return f"width_k must be even (rotary pairs), not {width}"
            components = width // 2 if name == "k" else width
            if self.contextual and components % rank:
                return f"rank_{name}={rank} must divide the components of width_{name}={width}"
            gauge = self.key_gauge if name == "k" else self.value_gauge
            if gauge == "none" and width != rank * head_dim:
                return (
                    f"without a gauge width_{name} must be rank_{name} * head_dim, not {width} "
                    f"(rank {rank}, head_dim {head_dim})"
                )
        if problem := self._problem_of_codes(head_dim):
            return problem
        if self.rank_q is not None and (self.form != "linear" or self.key_gauge == "absorbed"):
            return "rank_q needs form 'linear' and a gauge that is not absorbed"
        if not self.latent_keys:
            pairs = self.rotary_pairs(head_dim)
            if len(pairs) != self.width_k // 2 or max(pairs) >= head_dim // 2:
                return (
                    f"key_pairs must place {self.width_k // 2} components on {head_dim // 2} pairs"
                )
        return None

    def _problem_of_codes(self, head_dim: int) -> str | None:
        if (self.key_codes is None) != (self.value_codes is None):
            return "key_codes and value_codes are both given or neither"
        if not self.coded:
            return "predict_values needs coded values" if self.predict_values else None
        if self.row_align < 1:
            return f"row_align must be positive, not {self.row_align}"
        if not self.latent_keys or self.value_gauge != "applied":
            return "coded keys are latent, and coded values have value_gauge 'applied'"
        for name, codes, width in (
            ("k", self.key_codes, self.width_k),
            ("v", self.value_codes, self.width_v),
        ):
            blocks = groups_of(codes)
            if not all(1 <= bits <= MAX_BITS and n > 0 for block in blocks for bits, n in block):
                return f"codes have 1 to {MAX_BITS} bits, not {codes!r}"
            if sum(n for block in blocks for _, n in block) != width:
                return f"width_{name}={width}, but there are other codes: {codes!r}"
            if len(blocks) > 1 and (name == "v" or head_dim // 2 % len(blocks)):
                return f"{len(blocks)} blocks of codes cannot divide {head_dim // 2} rotary pairs"
        return None


def groups_of(codes: str | None) -> list[list[tuple[int, int]]]:
    """(bits, components) of every run in every block of `LayerShape.key_codes`."""
    blocks = []
    for block in (codes or "").split("|"):
        runs = [run.partition("x")[::2] for run in block.split()]
        if not all(part.isdecimal() for run in runs for part in run):
            return [[(0, 0)]]  # what `problem` rejects
        blocks.append([(int(bits), int(count)) for bits, count in runs])
    return blocks


def codes_of(blocks: list[list[tuple[int, int]]]) -> str:
    """Undoes `groups_of`."""
    return " | ".join(" ".join(f"{bits}x{count}" for bits, count in block) for block in blocks)


class TPAConfigMixin:
    """Adds the shapes of the TPA layers to the config of a model family.

    A config that inherits from it has the field `tpa_layers`: the fields of one [`LayerShape`] for
    each layer, or of one that all layers share; None caches as much as the source does.
    """

    base_model_tp_plan = None
    base_model_pp_plan = None

    # What the family's config has.
    tpa_layers: Any
    num_hidden_layers: int
    num_attention_heads: int

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)  # type: ignore[misc]
        layers = self.tpa_layers
        if layers is None:
            rank = source_key_value_heads(self)
            width = rank * source_head_dim(self)
            layers = asdict(LayerShape("static", "applied", "applied", rank, rank, width, width))
        if isinstance(layers, dict):
            layers = [dict(layers) for _ in range(self.num_hidden_layers)]
        self.tpa_layers = layers
        self.validate_tpa_layers()

    def layer_shape(self, layer_idx: int) -> LayerShape:
        """Shape of the attention of layer `layer_idx`."""
        return LayerShape(**self.tpa_layers[layer_idx])

    @property
    def layer_shapes(self) -> list[LayerShape]:
        """Shapes of all layers."""
        return [self.layer_shape(i) for i in range(self.num_hidden_layers)]

    @property
    def cached_floats(self) -> list[int]:
        """Numbers cached per token, one entry per layer."""
        heads = source_key_value_heads(self)
        return [shape.cached_floats(heads) for shape in self.layer_shapes]

    @property
    def cached_bytes(self) -> list[int]:
        """Bytes cached per token, one entry per layer; numbers have 16 bits."""
        heads = source_key_value_heads(self)
        return [shape.cached_bytes(heads) for shape in self.layer_shapes]

    def validate_tpa_layers(self) -> None:
        """Checks the shapes. Raises `ValueError` naming the first bad layer."""
        if len(self.tpa_layers) != self.num_hidden_layers:
            raise ValueError(
                f"tpa_layers has {len(self.tpa_layers)} entries for {self.num_hidden_layers} layers"
            )
        for i, shape in enumerate(self.layer_shapes):
            if problem := shape.problem(source_head_dim(self)):
                raise ValueError(f"layer {i}: {problem}")


def source_head_dim(config: Any) -> int:
    """Width of one head of the source; some configs leave it to be derived."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def source_key_value_heads(config: Any) -> int:
    """Key/value heads of the source; configs of families that share none among queries have no
    number of their own for them."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads
