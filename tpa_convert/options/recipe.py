"""A run as one validated object: the source, and how to convert, heal and evaluate it.

The sections are what `tpa_convert.pipeline` takes, what the command line fills from its options and
what a YAML recipe spells out, so that all three share names, defaults and checks.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from tpa_convert.errors import UserError
from tpa_convert.text.shares import join_shares, split_share

FloatType = Literal["float32", "bfloat16", "float16"]
HeadFactorForm = Literal["static", "affine", "linear"]
Method = Literal["gauge", "svd", "tucker", "cp"]
Tracker = Literal["tensorboard", "wandb"]
GaugePlace = Literal["auto", "absorbed", "applied"]
KeyCacheKind = Literal["rotated", "latent"]

Seed = Annotated[int, Field(ge=0, lt=2**32)]

BUDGETS = ("kv_floats", "kv_bytes", "kv_ratio")
RANKS = ("rank_k", "rank_v", "width_k", "width_v")


def _as_tuple(value: Any) -> Any:
    if value is None:
        return ()
    if isinstance(value, str | Path):
        return (str(value),)
    return tuple(str(v) for v in value) if isinstance(value, list | tuple) else value


Texts = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
"""One text file, directory, glob or dataset, or several."""

Mixture = Annotated[
    tuple[str, ...],
    BeforeValidator(lambda v: join_shares(v) if isinstance(v, Mapping) else _as_tuple(v)),
]
"""Like Texts, each perhaps with its share of the tokens: `NAME@3`, or {NAME: 3} in YAML."""


class Section(BaseModel):
    """A part of a recipe. Unknown keys are errors; a validated section never changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class SourceOptions(Section):
    model: str
    """Hub id, local directory, or .gguf file."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    trust_remote_code: bool = False
    """Run the Python code that comes with the model."""


class CacheBudget(Section):
    """How much to cache."""

    kv_floats: PositiveInt | None = None
    """Numbers cached per token and layer, mean over the layers."""
    kv_bytes: PositiveInt | None = None
    """Bytes cached per token by the whole model."""
    kv_ratio: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the source's cache that is kept: 0.25 keeps a quarter."""
    cache_dtype: FloatType | None = None
    """Type in which bytes are counted; by default the output's."""


class CalibrationOptions(Section):
    """Which text the source's activations are measured on."""

    calibration: Texts = ()
    """Calibration text; by default a short text that ships with the package."""
    text_column: str = "text"
    """Column that holds the text in jsonl, parquet and datasets."""
    calibration_blocks: PositiveInt = 64
    """Number of calibration sequences."""
    block_length: Annotated[int, Field(ge=2)] = 512
    """Tokens per calibration sequence."""
    moments: Path | None = None
    """Moments saved by an earlier calibration on the same source."""
    save_moments: Path | None = None
    """Where to save the moments, so that another budget costs seconds."""
    seed: Seed = 0
    """Chooses the calibration documents."""


class PlanOptions(CacheBudget, CalibrationOptions):
    """How to choose widths: a budget, or what may be lost."""

    max_increase: Annotated[float, Field(gt=0)] = 0.1
    """Without a budget: the smallest cache whose perplexity rises by at most this share."""
    multiple_of: Annotated[int, Field(ge=2)] = 8
    """Uneven widths are multiples of this."""
    memory: PositiveFloat | None = None
    """Memory in GB that weights and cache have to share, to know the largest context."""
    batch_size: PositiveInt = 1
    """Sequences cached at once."""
    context: PositiveInt = 4096
    """Tokens at which arithmetic is counted."""
    gauge: GaugePlace = "auto"
    """Where the gauge goes: into the query and output projections, or applied at run time."""
    key_cache: KeyCacheKind = "rotated"
    """Cache keys ready to use, or as latents from which every step rebuilds and rotates them."""
    refine: bool = False
    """Refine every candidate before it is measured, for a model that is going to be refined."""
    refine_steps: PositiveInt = 200
    """Optimiser steps of that refinement per layer."""

    @model_validator(mode="after")
    def _check(self) -> PlanOptions:
        budgets = [f"`{name}`" for name in BUDGETS if getattr(self, name) is not None]
        if len(budgets) > 1:
            raise ValueError(
                "give at most one of `kv_floats`, `kv_bytes`, `kv_ratio`; got "
                f"{' and '.join(budgets)}"
            )
        if self.calibration_blocks < 2:
            raise ValueError("a plan needs `calibration_blocks` of at least 2: one is held out")
        if self.moments is not None and self.save_moments is not None:
            raise ValueError("moments are there already: leave out `save_moments`")
        return self


class ConvertOptions(CacheBudget, CalibrationOptions):
    """How to convert: exactly one budget, the form of the head factors, the method, the text."""

    plan: Path | None = None
    """Ranks and widths of every layer from a file that `tpa-convert plan` wrote."""
    rank_k: PositiveInt | None = None
    """Components of the keys that share one head factor each."""
    rank_v: PositiveInt | None = None
    """Components of the values that share one head factor each."""
    width_k: PositiveInt | None = None
    """Numbers cached for the keys, summed over the components."""
    width_v: PositiveInt | None = None
    """Numbers cached for the values, summed over the components."""
    rank_q: PositiveInt | None = None
    """Factor the queries too (form `linear` only; it saves parameters, no cache)."""

    form: HeadFactorForm = "static"
    """Head factors: constant, affine in the token, or linear in the token (the paper's own)."""
    method: Method = "gauge"
    """How the factors are found."""
    whiten: bool = True
    """Weigh errors by the calibration moments; without it, by the weights alone."""

    gauge: GaugePlace = "auto"
    """Where the gauge goes: into the query and output projections, or applied at run time."""
    key_cache: KeyCacheKind = "rotated"
    """Cache keys ready to use, or as latents from which every step rebuilds and rotates them."""
    refit: bool = False
    """Refit the output projections by least squares after the decomposition; no GPU needed."""
    refine: bool = False
    """Regress each layer's attention output on the calibration text after the decomposition."""
    refine_steps: PositiveInt = 600
    """Optimiser steps of the refinement per layer."""

    dtype: FloatType | None = None
    """Type of the output's weights; by default the source's, float32 for GGUF."""

    @model_validator(mode="after")
    def _check(self) -> ConvertOptions:
        budgets = [f"`{name}`" for name in BUDGETS if getattr(self, name) is not None]
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
        if self.plan is not None and self.form != "static":
            raise ValueError("the plan says the form of every layer: leave out `form`")
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
        if self.moments is not None and self.save_moments is not None:
            raise ValueError("moments are there already: leave out `save_moments`")
        if self.save_moments is not None and not self.whiten and self.form != "linear":
            raise ValueError("without `whiten` no moments are measured: leave out `save_moments`")
        if self.moments is not None and self.calibration and not (self.refit or self.refine):
            raise ValueError("`moments` replaces the calibration: leave out `calibration`")
        if self.refit and self.refine:
            raise ValueError("`refine` does more than `refit`: leave out `refit`")
        return self


class HealOptions(Section):
    """How to heal: distil the source into the converted model on plain text."""

    text: Mixture = ()
    """Text to heal on: files, directories, globs or Hub datasets. Shares of the tokens go behind an
    @ (`essays.jsonl@3`), or after a colon in YAML (`{essays.jsonl: 3, owner/corpus: 1}`); what is
    too short for its share is read again. Without shares, files count by their size, and beside a
    Hub dataset all count the same."""
    sampled_tokens: Annotated[int, Field(ge=0)] = 0
    """Tokens of text to sample from the source itself, beside the text or instead of it."""
    sampled_chat_tokens: Annotated[int, Field(ge=0)] = 0
    """Tokens of chats to sample from an instruct source, in its own chat template."""
    valid_text: Texts = ()
    """Held-out text for the perplexity and divergence shown during healing."""
    text_column: str = "text"
    """Column that holds the text in jsonl, parquet and datasets."""
    tokens: PositiveInt = 10_000_000
    """Tokens to train on."""
    block_length: Annotated[int, Field(ge=2)] = 1024
    """Tokens per training sequence."""
    tokens_per_step: PositiveInt = 32 * 1024
    """Tokens per optimiser step."""
    batch_size: PositiveInt | None = None
    """Sequences per forward pass; by default chosen for the device."""
    attention_learning_rate: PositiveFloat = 6e-4
    """Peak learning rate of the attention layers, which were converted."""
    learning_rate: PositiveFloat = 1e-4
    """Peak learning rate of everything else."""
    warmup_steps: Annotated[int, Field(ge=0)] = 40
    """Optimiser steps over which the learning rates rise to their peaks."""
    trainable: Literal["all", "attention", "lora"] = "all"
    """Train all parameters, those of the attention layers only, or `lora`: these, and low-rank
    adapters on the MLPs, merged at the end."""
    lora_rank: PositiveInt = 16
    """Rank of the adapters."""
    skew: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the source mixed into the student before they are compared; 0 is the forward KL."""
    temperature: PositiveFloat = 1.0
    """Softens both distributions of the distillation loss."""
    hidden_weight: Annotated[float, Field(ge=0)] | None = None
    """Weight of the distance between both models' hidden states after each layer in the first step;
    it falls to zero along the run. By default 10, or 0 where the source has another depth or
    width."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's, on matrices."""
    seed: Seed = 0
    """Order of the text."""
    bf16: bool | None = None
    """Compute in bfloat16 over float32 weights; by default where the GPU can."""
    torch_compile: bool | None = None
    """Compile both models; by default on a GPU only."""
    gradient_checkpointing: bool = False
    """Save memory, for a quarter more time."""
    offload_teacher: bool = False
    """Keep the source's layers in main memory, for a source that does not fit beside the rest."""
    save_steps: PositiveInt = 500
    """Optimiser steps between checkpoints."""
    valid_steps: PositiveInt = 100
    """Optimiser steps between measurements on the held-out text."""
    stop_at: PositiveFloat | None = None
    """Stop early once the model has recovered to within this share of the source's perplexity, as
    judged by the held-out divergence, exp(KL) − 1."""
    log_to: Annotated[tuple[Tracker, ...], BeforeValidator(_as_tuple)] = ()
    """Also log the run to `tensorboard` (in runs/ of the healed model) or `wandb`."""

    @model_validator(mode="after")
    def _check(self) -> HealOptions:
        if not (self.text or self.sampled_tokens or self.sampled_chat_tokens):
            raise ValueError(
                "there is no text to heal on: give `text`, `sampled_tokens` or "
                "`sampled_chat_tokens`"
            )
        if self.stop_at is not None and not self.valid_text:
            raise ValueError("`stop_at` needs held-out text to judge by: give `valid_text`")
        refuse_overlap((name for name, _ in self.text_shares), self.valid_text, "valid_text")
        return self

    @property
    def text_shares(self) -> tuple[tuple[str, float | None], ...]:
        """The names in `text`, each with its share or None."""
        return tuple(split_share(spec) for spec in self.text)


def refuse_overlap(train: Iterable[str], test: Iterable[str], name: str) -> None:
    """Refuses text for measuring that the model is trained or calibrated on.

    Raises:
        ValueError: the same file, or the same dataset, in both.
    """

    def resolved(spec: str) -> str:
        path = Path(spec).expanduser()
        return str(path.resolve()) if path.exists() else spec

    seen = {resolved(spec) for spec in train}
    for spec in test:
        if resolved(spec) in seen:
            raise ValueError(
                f"{spec} is training text and cannot measure what training did: take it out of "
                f"the training text, or name other text in `{name}`"
            )


class EvaluateOptions(Section):
    """What to measure, of the source and of the converted model."""

    text: Texts = ()
    """Texts for perplexity: files, directories, globs or Hub datasets."""
    text_column: str = "text"
    """Column that holds the text in jsonl, parquet and datasets."""
    split: str = "train"
    """Split of a Hub dataset; local files have only one."""
    choices: Texts = ()
    """Multiple-choice files, one JSON object {query, choices, gold} a line."""
    tasks: Texts = ()
    """Tasks of lm-evaluation-harness, by name (needs the extra `eval`)."""
    block_length: Annotated[int, Field(ge=2)] = 1024
    """Tokens per sequence of the perplexity text."""
    max_blocks: PositiveInt = 64
    """Sequences per text source."""
    limit: PositiveInt | None = None
    """Questions per task; by default all."""
    batch_size: PositiveInt = 8
    """Sequences per forward pass."""
    speed: bool = True
    """Measure prefill and decode speed."""
    prompt: str | None = None
    """Continue this prompt with each model, as a sample."""


class Recipe(Section):
    """Everything `tpa-convert run` does, in order. Paths are relative to the current directory."""

    source: Annotated[
        SourceOptions, BeforeValidator(lambda v: {"model": v} if isinstance(v, str) else v)
    ]
    """The model to convert; a plain string is short for `{model: string}`."""
    convert: ConvertOptions
    heal: HealOptions | None = None
    """Leave out to stop after the conversion."""
    evaluate: EvaluateOptions | None = None
    """Leave out to skip the table."""
    out: Path | None = None
    """Directory for the results; `tpa-convert run --out` takes precedence."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ..., or auto. Healing takes a GPU wherever there is one."""
    next_steps: str | None = None
    """Shown when the run is finished."""

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        if self.evaluate is not None:
            healed_on = [name for name, _ in self.heal.text_shares] if self.heal else []
            train = [*self.convert.calibration, *healed_on]
            # training reads the split `train` of a Hub dataset; local files have only one
            test = [
                spec
                for spec in self.evaluate.text
                if self.evaluate.split == "train" or Path(spec).expanduser().exists()
            ]
            refuse_overlap(train, test, "evaluate.text")
        return self


S = TypeVar("S", bound=Section)


def validated(section: type[S], values: Mapping[str, Any], origin: str | None = None) -> S:
    """Build a section from plain values.

    Args:
        origin: where the values come from (a file name), put in front of the message.

    Raises:
        UserError: one line that names the first thing wrong; for an unknown key also the nearest
            valid one.
    """
    try:
        return section.model_validate(values)
    except ValidationError as error:
        prefix = f"{origin}: " if origin else ""
        raise UserError(prefix + _one_line(section, error)) from None


def load_recipe(path: str | Path) -> Recipe:
    """Read and check a YAML recipe.

    Raises:
        UserError: no such file, not YAML, an unknown key, a missing or wrong value.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no such recipe: {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the recipe {path}: {error}") from None
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        problem = getattr(error, "problem", None) or "unreadable"
        raise UserError(f"{path}{line}: not valid YAML: {problem}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: a recipe is a mapping with the keys source, convert, heal, ...")
    return validated(Recipe, values, origin=str(path))


def _one_line(section: type[Section], error: ValidationError) -> str:
    # An unknown key often explains the other complaints (a misspelt budget is a missing budget).
    problems = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    problem = problems[0]
    path = [part for part in problem["loc"] if isinstance(part, str)]  # not places in a list
    name = ".".join(path)
    if problem["type"] == "extra_forbidden":
        valid = list(_section_at(section, path[:-1]).model_fields)
        near = difflib.get_close_matches(path[-1], valid, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"valid keys: {', '.join(valid)}"
        return f"unknown key {name}; {hint}"
    if problem["type"] == "missing":
        return f"{name} is missing"
    if problem["type"] == "value_error":
        message = str(problem["ctx"]["error"])
        return f"{name}: {message}" if name else message
    message = problem["msg"][0].lower() + problem["msg"][1:]
    return f"{name}: {message}, not {problem['input']!r}"


def _section_at(section: type[Section], path: list[str]) -> type[Section]:
    for key in path:
        annotation = section.model_fields[key].annotation
        kinds = (annotation, *get_args(annotation))  # `HealOptions | None` has two
        section = next(k for k in kinds if isinstance(k, type) and issubclass(k, Section))
    return section
