"""Every command-line option, declared once and reused by the commands of `tpa_convert.cli`.

An option that belongs to a recipe section has the name and the default of the section's field.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from tpa_convert.options.recipe import FloatType, GaugePlace, HeadFactorForm, KeyCacheKind, Method

BUDGET = "Budget (one of: floats, bytes, ratio, a plan, ranks and widths)"
PLANNING = "Planning"
METHOD = "Method"
CALIBRATION = "Calibration"
TEXT = "Text"
TRAINING = "Training"
MEASURE = "What to measure"
SAMPLING = "Sampling"
SOURCE = "Model and device"
OUTPUT = "Output"


def option(flags: str, text: str, panel: str, **settings: Any) -> Any:
    """A Typer option in a help panel; `flags` separated by blanks."""
    return typer.Option(*flags.split(), help=text, rich_help_panel=panel, **settings)


def flag(flags: str, text: str, panel: str) -> Any:
    """A switch, shown without a type."""
    return option(flags, text, panel, metavar="")


# ------------------------------------------------------------------------------- model and device

SourceArgument = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE", help="Hub id, local directory or .gguf file.", show_default=False
    ),
]
DirectoryArgument = Annotated[
    Path,
    typer.Argument(
        metavar="DIR", help="A converted model (output of convert or heal).", show_default=False
    ),
]
Revision = Annotated[
    str | None,
    option("--revision", "Branch, tag or commit of the source on the Hub.", SOURCE, metavar="REV"),
]
TrustRemoteCode = Annotated[
    bool, flag("--trust-remote-code", "Run the Python code that comes with the source.", SOURCE)
]
Device = Annotated[
    str,
    option(
        "--device",
        "cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.",
        SOURCE,
        metavar="NAME",
    ),
]
Seed = Annotated[
    int,
    option(
        "--seed",
        "The same seed gives the same result.",
        SOURCE,
        metavar="N",
        min=0,
        max=2**32 - 1,
    ),
]
DType = Annotated[
    FloatType | None,
    option(
        "--dtype",
        "Type of the output's weights. [dim]\\[default: the source's; float32 for GGUF][/]",
        OUTPUT,
    ),
]

# ------------------------------------------------------------------------------- output

Out = Annotated[
    Path,
    option(
        "--out -o",
        "Directory to write. It appears only when it is complete.",
        OUTPUT,
        metavar="DIR",
        show_default=False,
    ),
]
ConvertOut = Annotated[
    Path | None,
    option(
        "--out -o",
        "Directory to write; needed unless --dry-run. It appears only when it is complete.",
        OUTPUT,
        metavar="DIR",
    ),
]
RecipeOut = Annotated[
    Path | None,
    option(
        "--out -o", "Directory for the results, instead of the recipe's.", OUTPUT, metavar="DIR"
    ),
]
StartOver = Annotated[bool, flag("--overwrite", "Start over and replace earlier results.", OUTPUT)]
Overwrite = Annotated[
    bool, flag("--overwrite", "Replace an earlier output of tpa-convert.", OUTPUT)
]


def _json_file(existing: str = "") -> Any:
    return option(
        "--json", f"Also write the results to this file{existing}.", OUTPUT, metavar="FILE"
    )


JsonFile = Annotated[Path | None, _json_file()]
ReplacedJsonFile = Annotated[Path | None, _json_file("; one that exists is replaced")]
DryRun = Annotated[
    bool,
    flag(
        "--dry-run",
        "Print the plan and the predicted cache, then stop; reads no weights, writes no model.",
        OUTPUT,
    ),
]

# ------------------------------------------------------------------------------- budget

KvFloats = Annotated[
    int | None,
    option(
        "--kv-floats", "Numbers cached per token and layer, mean over layers.", BUDGET, metavar="N"
    ),
]
KvBytes = Annotated[
    int | None,
    option("--kv-bytes", "Bytes cached per token by the whole model.", BUDGET, metavar="N"),
]
KvRatio = Annotated[
    float | None,
    option(
        "--kv-ratio",
        "Share of the source's cache to keep: 0.25 keeps a quarter.",
        BUDGET,
        metavar="X",
    ),
]
RankK = Annotated[int | None, option("--rank-k", "Head factors of the keys.", BUDGET, metavar="R")]
RankV = Annotated[
    int | None, option("--rank-v", "Head factors of the values.", BUDGET, metavar="R")
]
WidthK = Annotated[
    int | None,
    option("--width-k", "Numbers cached for the keys per token and layer.", BUDGET, metavar="D"),
]
WidthV = Annotated[
    int | None,
    option("--width-v", "Numbers cached for the values per token and layer.", BUDGET, metavar="D"),
]
CacheDType = Annotated[
    FloatType | None,
    option(
        "--cache-dtype",
        "Type in which cache bytes are counted. [dim]\\[default: the weights' type][/]",
        BUDGET,
    ),
]

PlanInput = Annotated[
    Path | None,
    option("--plan", "Widths of every layer, from tpa-convert plan.", BUDGET, metavar="FILE"),
]
MaxIncrease = Annotated[
    float,
    option(
        "--max-increase",
        "Without a budget: take the smallest cache whose perplexity, before refinement and "
        "healing, rises by at most this share.",
        PLANNING,
        metavar="X",
    ),
]
MultipleOf = Annotated[
    int,
    option("--multiple-of", "Measured widths are multiples of this.", PLANNING, metavar="N"),
]
Memory = Annotated[
    float | None,
    option(
        "--memory",
        "GB that weights and cache have to share: shows the largest context of every plan.",
        PLANNING,
        metavar="GB",
    ),
]
CachedBatch = Annotated[
    int, option("--batch-size", "Sequences cached at once, for --memory.", PLANNING, metavar="N")
]
Context = Annotated[
    int, option("--context", "Tokens at which arithmetic is counted.", PLANNING, metavar="N")
]
PlanOutput = Annotated[
    Path | None,
    option("--out -o", "Plan to write, for convert --plan.", OUTPUT, metavar="FILE"),
]
Chart = Annotated[
    Path | None,
    option("--chart", "Picture to draw (.png, .svg, .pdf).", OUTPUT, metavar="FILE"),
]

# ------------------------------------------------------------------------------- method

Form = Annotated[
    HeadFactorForm,
    option(
        "--form",
        "Head factors: static (constant, cost nothing at run time), affine (constant + linear in "
        "the token), linear (the layer of the TPA paper).",
        METHOD,
    ),
]
MethodChoice = Annotated[
    Method,
    option(
        "--method",
        "gauge is the calibrated decomposition of this package; svd, tucker and cp are baselines.",
        METHOD,
    ),
]
Whiten = Annotated[
    bool,
    flag(
        "--whiten/--no-whiten",
        "Weigh errors by what the calibration text activates, or by the weights alone.",
        METHOD,
    ),
]
GaugeChoice = Annotated[
    GaugePlace,
    option(
        "--gauge",
        "Fold the constant maps per head into the projections (absorbed) or apply them at run "
        "time; auto absorbs while the projections do not grow.",
        METHOD,
    ),
]
KeyCache = Annotated[
    KeyCacheKind,
    option(
        "--key-cache",
        "Cache keys rotated, ready to use; or latent: better at the same bytes, but every step has "
        "to rebuild and rotate the keys of the whole context.",
        METHOD,
    ),
]
Refine = Annotated[
    bool,
    flag(
        "--refine",
        "After the decomposition, regress each layer's attention output on the calibration text. "
        "A minute on a GPU; wants more text (256 sequences of 1024 tokens).",
        METHOD,
    ),
]
Refit = Annotated[
    bool,
    flag(
        "--refit",
        "After the decomposition, refit the output projections by least squares on the calibration "
        "text. A few minutes without a GPU.",
        METHOD,
    ),
]
PlanRefine = Annotated[
    bool,
    flag(
        "--refine",
        "Refine every candidate before it is measured: for a model that is going to be refined.",
        METHOD,
    ),
]
RefineSteps = Annotated[
    int, option("--refine-steps", "Steps of the refinement per layer.", METHOD, metavar="N")
]
RankQ = Annotated[
    int | None,
    option(
        "--rank-q",
        "Factor the queries as well (only --form linear; saves parameters, no cache).",
        METHOD,
        metavar="R",
    ),
]

# ------------------------------------------------------------------------------- calibration

Calibration = Annotated[
    list[str] | None,
    option(
        "--calibration",
        "Text file (txt, jsonl, parquet, also .gz .xz .zst), directory, glob or Hub dataset; may "
        "be repeated. [dim]\\[default: a short text in this package][/]",
        CALIBRATION,
        metavar="PATH|DATASET",
    ),
]
CalibrationBlocks = Annotated[
    int, option("--calibration-blocks", "Number of sequences.", CALIBRATION, metavar="N")
]
CalibrationLength = Annotated[
    int, option("--block-length", "Tokens per sequence.", CALIBRATION, metavar="N")
]
SaveMoments = Annotated[
    Path | None,
    option(
        "--save-moments",
        "Keep what the calibration measured, for another budget or method.",
        CALIBRATION,
        metavar="FILE",
    ),
]
MomentsFile = Annotated[
    Path | None,
    option(
        "--moments",
        "Use moments saved before from the same source instead of calibrating.",
        CALIBRATION,
        metavar="FILE",
    ),
]


def _text_column(panel: str) -> Any:
    return option(
        "--text-column", "Column of the text in jsonl, parquet and datasets.", panel, metavar="NAME"
    )


CalibrationColumn = Annotated[str, _text_column(CALIBRATION)]
TextColumn = Annotated[str, _text_column(TEXT)]
EvalColumn = Annotated[str, _text_column(MEASURE)]
Split = Annotated[str, option("--split", "Split of a Hub dataset.", MEASURE, metavar="NAME")]

# ------------------------------------------------------------------------------- healing

HealSource = Annotated[
    str | None,
    option(
        "--source",
        "The model to learn from. [dim]\\[default: the one DIR was converted from][/]",
        SOURCE,
        metavar="SOURCE",
    ),
]
HealText = Annotated[
    list[str] | None,
    option(
        "--text",
        "Text file, directory, glob or Hub dataset to heal on; may be repeated. @3 behind a name "
        "gives its share of the tokens; what is too short for it is read again. Without shares, "
        "files count by their size, and beside a Hub dataset all count the same.",
        TEXT,
        metavar="PATH|DATASET",
    ),
]
SampledTokens = Annotated[
    int,
    option(
        "--sampled-tokens",
        "Tokens of text to sample from the source itself, beside --text or instead of it.",
        TEXT,
        metavar="N",
    ),
]
SampledChatTokens = Annotated[
    int,
    option(
        "--sampled-chat-tokens",
        "Tokens of chats to sample from an instruct source, in its own chat template.",
        TEXT,
        metavar="N",
    ),
]
ValidText = Annotated[
    list[str] | None,
    option(
        "--valid-text",
        "Held-out text, for the perplexity shown beside the source's.",
        TEXT,
        metavar="PATH|DATASET",
    ),
]
Tokens = Annotated[
    int, option("--tokens", "Tokens to train on, rounded up to whole steps.", TRAINING, metavar="N")
]
TrainingLength = Annotated[
    int, option("--block-length", "Tokens per sequence.", TRAINING, metavar="N")
]
TokensPerStep = Annotated[
    int, option("--tokens-per-step", "Tokens per optimiser step.", TRAINING, metavar="N")
]
TrainingBatch = Annotated[
    int | None,
    option(
        "--batch-size",
        "Sequences per forward pass. [dim]\\[default: chosen for the device][/]",
        TRAINING,
        metavar="N",
    ),
]
AttentionLearningRate = Annotated[
    float,
    option(
        "--attention-learning-rate", "Peak rate of the attention layers.", TRAINING, metavar="X"
    ),
]
LearningRate = Annotated[
    float, option("--learning-rate", "Peak rate of everything else.", TRAINING, metavar="X")
]
WarmupSteps = Annotated[
    int,
    option(
        "--warmup-steps",
        "Steps in which the rates rise, at most a quarter of all.",
        TRAINING,
        metavar="N",
    ),
]
Trainable = Annotated[
    Literal["all", "attention", "lora"],
    option(
        "--trainable",
        "Train all parameters, the attention layers only, or these and LoRA adapters on the MLPs.",
        TRAINING,
    ),
]
LoraRank = Annotated[int, option("--lora-rank", "Rank of the adapters.", TRAINING, metavar="N")]
Skew = Annotated[
    float,
    option(
        "--skew",
        "Share of the source's distribution mixed into the model's before they are compared; 0 is "
        "the plain divergence.",
        TRAINING,
        metavar="X",
    ),
]
Temperature = Annotated[
    float, option("--temperature", "Softens both distributions of the loss.", TRAINING, metavar="X")
]
HiddenWeight = Annotated[
    float | None,
    option(
        "--hidden-weight",
        "Weight of the distance between both models' hidden states at first; it falls to zero "
        "along the run. [dim]\\[default: 10, or 0 for a source of another depth or width][/]",
        TRAINING,
        metavar="X",
    ),
]

GradientCheckpointing = Annotated[
    bool, flag("--gradient-checkpointing", "Need less memory, take longer.", TRAINING)
]
OffloadTeacher = Annotated[
    bool, flag("--offload-teacher", "Keep the source's layers in main memory.", TRAINING)
]
SaveSteps = Annotated[
    int, option("--save-steps", "Steps between checkpoints.", TRAINING, metavar="N")
]
ValidSteps = Annotated[
    int, option("--valid-steps", "Steps between measurements on --valid-text.", TEXT, metavar="N")
]
StopAt = Annotated[
    float | None,
    option(
        "--stop-at",
        "Stop early once the divergence on --valid-text stands for at most this rise of "
        "perplexity, exp(KL) − 1: 0.02 is two percent.",
        TRAINING,
        metavar="X",
    ),
]
LogTo = Annotated[
    list[str] | None,
    option(
        "--log-to",
        "Also log the run there, tensorboard in runs/ of the output; may be repeated.",
        OUTPUT,
        metavar="tensorboard|wandb",
    ),
]
Resume = Annotated[
    bool,
    flag("--resume/--no-resume", "Continue an interrupted run, or start it anew.", TRAINING),
]

# ------------------------------------------------------------------------------- evaluation

DirectoriesArgument = Annotated[
    list[Path],
    typer.Argument(
        metavar="DIR...",
        help="One or more converted models; each becomes a column.",
        show_default=False,
    ),
]
Against = Annotated[
    str | None,
    option(
        "--against",
        "The source to compare with. [dim]\\[default: the one DIR was converted from][/]",
        SOURCE,
        metavar="SOURCE",
    ),
]
EvalText = Annotated[
    list[str] | None,
    option(
        "--text",
        "Text file, directory, glob or Hub dataset for perplexity; may be repeated.",
        MEASURE,
        metavar="PATH|DATASET",
    ),
]
Choices = Annotated[
    list[str] | None,
    option(
        "--choices",
        "Multiple choice, one JSON object {query, choices, gold} a line; may be repeated.",
        MEASURE,
        metavar="FILE",
    ),
]
Tasks = Annotated[
    list[str] | None,
    option(
        "--task",
        "Task of lm-evaluation-harness by name; may be repeated. Needs the extra eval.",
        MEASURE,
        metavar="NAME",
    ),
]
EvalLength = Annotated[
    int, option("--block-length", "Tokens per sequence of the text.", MEASURE, metavar="N")
]
MaxBlocks = Annotated[
    int, option("--max-blocks", "Sequences per text source.", MEASURE, metavar="N")
]
Limit = Annotated[
    int | None,
    option("--limit", "Questions per task. [dim]\\[default: all][/]", MEASURE, metavar="N"),
]
EvalBatch = Annotated[
    int, option("--batch-size", "Sequences per forward pass.", MEASURE, metavar="N")
]
Speed = Annotated[bool, flag("--speed/--no-speed", "Measure prefill and decode speed.", MEASURE)]
SamplePrompt = Annotated[
    str | None,
    option("--prompt", "Continue this prompt with each model.", MEASURE, metavar="TEXT"),
]
WriteCard = Annotated[
    bool,
    flag("--write-card", "Put the table into the README.md (model card) of each DIR.", OUTPUT),
]

# ------------------------------------------------------------------------------- generation

MaxNewTokens = Annotated[
    int, option("--max-new-tokens", "Length of the continuation.", SAMPLING, metavar="N", min=1)
]
SamplingTemperature = Annotated[
    float,
    option(
        "--temperature",
        "0 always takes the likeliest token; 1 samples.",
        SAMPLING,
        metavar="X",
        min=0,
    ),
]
TopP = Annotated[
    float,
    option(
        "--top-p",
        "Sample from the likeliest tokens of this total share.",
        SAMPLING,
        metavar="X",
        min=0.001,  # a share of zero holds no token, and Typer has no open bounds
        max=1,
    ),
]
