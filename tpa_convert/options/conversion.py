"""How to convert a model: how much to cache, by which method, measured on which text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, model_validator

from tpa_convert.options.declaration import (
    BUDGET,
    CALIBRATION,
    METHOD,
    OUTPUT,
    SOURCE,
    FloatType,
    Section,
    Seed,
    Texts,
    option,
)
from tpa_convert.options.numbers import Share

HeadFactorForm = Literal["static", "affine", "linear"]
Method = Literal["gauge", "svd", "tucker", "cp"]
GaugePlace = Literal["auto", "absorbed", "applied"]
KeyCacheKind = Literal["auto", "rotated", "latent"]
CacheBits = Annotated[
    Literal["auto", "16", "8", "4", "3", "2", "1"],
    BeforeValidator(lambda value: str(value) if isinstance(value, int) else value),
]

BUDGETS = ("kv_floats", "kv_bytes", "kv_ratio")
RANKS = ("rank_k", "rank_v", "width_k", "width_v")


class CacheBudget(Section):
    """How much to cache."""

    kv_floats: int | None = option(
        None,
        "Numbers of 16 bits cached per token and layer, as a mean over the layers.",
        BUDGET,
        ge=1,
    )
    kv_bytes: int | None = option(None, "Bytes cached per token by the whole model.", BUDGET, ge=1)
    kv_ratio: Share | None = option(
        None,
        "Share of the source's cache to keep, at 16 bits a number: 0.125 or 12.5% keeps an eighth.",
        BUDGET,
        gt=0,
        le=1,
    )
    cache_bits: CacheBits = option(
        "auto",
        "How many bits a cached number has. auto codes every number in the bits that it is worth, "
        "0 to 8; 1 to 8 are the mean over the numbers that are kept, so that fewer or more of them "
        "are; 16 caches plain numbers, fewer of them. Where all of them fit (a ratio of 1), or "
        "ranks, widths or anything else is asked for that only plain numbers have, auto is 16.",
        BUDGET,
    )

    @property
    def budgets(self) -> list[str]:
        """Which of the budgets are given."""
        return [f"`{name}`" for name in BUDGETS if getattr(self, name) is not None]


class KeyOptions(CacheBudget):
    """How much to cache, and how keys are cached."""

    gauge: GaugePlace = option(
        "auto",
        "Of a cache in 16 bits: fold the constant maps per head into the projections (absorbed) or "
        "apply them at run time (applied); auto absorbs them while the projections do not grow.",
        METHOD,
    )
    key_cache: KeyCacheKind = option(
        "auto",
        "Cache rotated keys, ready to use; or latent ones, which are better at the same bytes, but "
        "every step has to rebuild and rotate the keys of the whole context. auto is latent where "
        "the cache is coded in bits, and else rotated.",
        METHOD,
    )
    key_blocks: int | None = option(
        None,
        "Of a cache coded in bits: keys are rebuilt in so many blocks of rotary pairs. More blocks "
        "decode faster, fewer are better at the same bytes.",
        METHOD,
        shown_default="as few as a GPU rebuilds while it would read the source's cache",
        ge=1,
    )
    target: Literal["llama"] | None = option(
        None,
        "For a model that `export --to llama` (or gguf) writes without loss: static rotated keys "
        "in 16 bits, with one table of rotary pairs for all layers.",
        METHOD,
    )

    @property
    def coded(self) -> bool:
        """Whether the cache is to be coded in bits. A plan in a file says that by itself."""
        if self.cache_bits == "auto":
            return not self.plain_only() and self.kv_ratio != 1
        return self.cache_bits != "16"

    @property
    def code_bits(self) -> int | None:
        """Mean of the bits of the components that are kept; None keeps as many as is best."""
        return None if self.cache_bits == "auto" else int(self.cache_bits)

    def plain_only(self) -> list[str]:
        """Options given that only a cache of plain numbers has."""
        found = ["`gauge`"] if self.gauge != "auto" else []
        found += ["rotated `key_cache`"] if self.key_cache == "rotated" else []
        return found + (["`target`"] if self.target is not None else [])

    def refuse_codes_elsewhere(self) -> None:
        """Refuses bits for a cache of plain numbers.

        Raises:
            ValueError: bits are asked for as well, or blocks of keys that are not coded.
        """
        plain = self.plain_only()
        if self.cache_bits not in ("auto", "16") and plain:
            raise ValueError(
                f"`cache_bits` {self.cache_bits} does not go with {' and '.join(plain)}: leave out "
                "one"
            )
        if self.key_blocks is not None and not self.coded:
            raise ValueError("`key_blocks` is for a cache coded in bits: leave it out")

    @property
    def plain_key_cache(self) -> Literal["rotated", "latent"]:
        """Of a cache of plain numbers."""
        return "latent" if self.key_cache == "latent" else "rotated"

    @model_validator(mode="after")
    def _check_target(self) -> KeyOptions:
        if self.target == "llama" and (self.plain_key_cache != "rotated" or self.coded):
            raise ValueError("`target` llama needs rotated keys of 16 bits")
        return self


class CalibrationOptions(Section):
    """Which text the source's activations are measured on."""

    calibration: Texts = option(
        (),
        "Text file (txt, jsonl, parquet, also .gz .xz .zst), directory, glob or Hub dataset. May "
        "be repeated.",
        CALIBRATION,
        metavar="PATH|DATASET",
        reads="text",
        shown_default="a short text in this package",
    )
    text_column: str = option(
        "text", "Column of the text in jsonl, parquet and datasets.", CALIBRATION
    )
    calibration_blocks: int = option(16, "Sequences of calibration text.", CALIBRATION, ge=1)
    block_length: int = option(512, "Tokens of each of these sequences.", CALIBRATION, ge=2)
    sampled_blocks: int | None = option(
        None,
        "How many of these sequences the source writes itself: such text is of all the kinds that "
        "it knows.",
        CALIBRATION,
        ge=0,
        shown_default="half for sources of 50 million to 2 billion parameters without "
        "--calibration, else 0",
    )
    save_moments: Path | None = option(
        None,
        "Keep what the calibration measured, so that another budget or method costs seconds.",
        CALIBRATION,
    )
    moments: Path | None = option(
        None,
        "Use moments saved before from the same source instead of calibrating.",
        CALIBRATION,
        reads="file",
    )
    seed: Seed = option(
        0, "Chooses the calibration documents; the same seed gives the same result.", SOURCE
    )

    @model_validator(mode="after")
    def _check_text(self) -> CalibrationOptions:
        sampled, count = self.sampled_blocks or 0, self.calibration_blocks
        if sampled > count - bool(self.calibration):
            beside = ", and some are for the `calibration` text" if self.calibration else ""
            raise ValueError(
                f"`sampled_blocks` {sampled} of {count} sequences are too many{beside}"
            )
        if self.moments is not None and self.save_moments is not None:
            raise ValueError("moments are there already: leave out `save_moments`")
        return self


class ConvertOptions(CalibrationOptions, KeyOptions):
    """How to convert: exactly one budget, what a cached number is, the method, the text."""

    plan: Path | None = option(
        None,
        "Widths and bits of every layer, from a file that `tpa-convert plan` wrote.",
        BUDGET,
        reads="file",
    )
    rank_k: int | None = option(
        None, "Components of the keys that share one head factor each.", BUDGET, ge=1
    )
    rank_v: int | None = option(
        None, "Components of the values that share one head factor each.", BUDGET, ge=1
    )
    width_k: int | None = option(
        None, "Numbers cached for the keys per token and layer.", BUDGET, ge=1
    )
    width_v: int | None = option(
        None, "Numbers cached for the values per token and layer.", BUDGET, ge=1
    )

    form: HeadFactorForm = option(
        "static",
        "Head factors of a cache in 16 bits: static (constant, cost nothing at run time), affine "
        "(constant + linear in the token), linear (the layer of the TPA paper).",
        METHOD,
    )
    method: Method = option(
        "gauge",
        "gauge is the calibrated decomposition of this package; svd, tucker and cp are baselines, "
        "for caches in 16 bits.",
        METHOD,
    )
    whiten: bool = option(
        True,
        "Weigh errors by what the calibration text activates, or by the weights alone.",
        METHOD,
    )
    refit: bool = option(
        False,
        "After the decomposition, refit the output projections by least squares on the calibration "
        "text. A few minutes without a GPU; it pays where an eighth of the cache or less is kept.",
        METHOD,
    )
    refine: bool = option(
        False,
        "After the decomposition, regress each layer's attention output on the calibration text. "
        "A minute on a GPU; wants more text (256 sequences of 1024 tokens).",
        METHOD,
    )
    refine_steps: int = option(600, "Steps of the refinement per layer.", METHOD, ge=1)
    rank_q: int | None = option(
        None,
        "Factor the queries as well (only with the form linear; saves parameters, no cache).",
        METHOD,
        ge=1,
    )
    dtype: FloatType | None = option(
        None,
        "Type of the output's weights.",
        OUTPUT,
        shown_default="the source's; float32 for GGUF",
    )

    def plain_only(self) -> list[str]:
        given = super().plain_only()
        given += [f"`{name}`" for name in RANKS if getattr(self, name) is not None]
        for name, default in (
            ("plan", None),
            ("form", "static"),
            ("method", "gauge"),
        ):
            if getattr(self, name) != default:
                given.append(f"`{name}`")
        if not self.whiten:
            given.append("`whiten` off")
        return given

    @model_validator(mode="after")
    def _check_shared_table(self) -> ConvertOptions:
        if self.target == "llama":
            for name, wanted in (("form", "static"), ("method", "gauge")):
                if getattr(self, name) != wanted:
                    raise ValueError(f"`target` llama needs `{name}` {wanted}")
            if not self.whiten:
                raise ValueError("`target` llama needs `whiten`")
        return self

    @model_validator(mode="after")
    def _check_budget(self) -> ConvertOptions:
        budgets = self.budgets
        if any(getattr(self, name) is not None for name in RANKS):
            budgets.append("ranks and widths")
        if self.plan is not None:
            budgets.append("`plan`")
        if len(budgets) != 1:
            found = f"got {' and '.join(budgets)}" if budgets else "got none"
            raise ValueError(
                "give exactly one budget: `kv_floats`, `kv_bytes`, `kv_ratio`, `plan`, or ranks "
                f"and widths (`rank_k`, `rank_v`, `width_k`, `width_v`); {found}"
            )
        return self

    @model_validator(mode="after")
    def _check_method(self) -> ConvertOptions:
        if self.plan is not None and self.form != "static":
            raise ValueError("the plan says the form of every layer: leave out `form`")
        self.refuse_codes_elsewhere()
        if self.key_cache == "latent":
            if self.plan is not None:
                raise ValueError("the plan says what every layer caches: leave out `key_cache`")
            if self.form != "static" or self.method != "gauge":
                raise ValueError(
                    "latent keys go with no other form or method: leave out `form` and `method`"
                )
            if self.rank_k is not None:
                raise ValueError("latent keys have no `rank_k`: give `width_k`")
        if self.rank_q is not None and self.form != "linear":
            raise ValueError(f"`rank_q` needs `form` linear, not {self.form}")
        if self.refit and self.refine:
            raise ValueError("`refine` does more than `refit`: leave out `refit`")
        return self

    @model_validator(mode="after")
    def _check_moments(self) -> ConvertOptions:
        if self.save_moments is not None and not self.whiten and self.form != "linear":
            raise ValueError("without `whiten` no moments are measured: leave out `save_moments`")
        if self.moments is not None and self.calibration and not (self.refit or self.refine):
            raise ValueError("`moments` replaces the calibration: leave out `calibration`")
        return self
