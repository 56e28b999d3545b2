"""The command line: parse, call the library, show progress and results.

Commands hold no logic of their own. Their options come from `cli_options` and fill the sections of
`recipe` by name. Heavy imports happen inside the commands, so that `--help` is immediate.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from tpa_convert import __version__
from tpa_convert.cli import options as o
from tpa_convert.cli.terminal import (
    FIRST_PROCESS,
    Commands,
    console,
    duration,
    quiet_libraries,
    show_healing,
    show_plan,
    show_planning,
    track,
)
from tpa_convert.errors import UserError
from tpa_convert.export.output import atomic_file, check_file
from tpa_convert.options.recipe import (
    ConvertOptions,
    EvaluateOptions,
    HealOptions,
    PlanOptions,
    S,
    SourceOptions,
    load_recipe,
    validated,
)

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Try first: [bold]tpa-convert convert MODEL --kv-ratio 0.5 --dry-run[/]",
)


@app.callback()
def top(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", is_eager=True)
    ] = False,
) -> None:
    """Convert a language model to Tensor Product Attention: the same model, a smaller KV cache.

    [bold]plan[/] a cache budget, [bold]convert[/] a pretrained model, [bold]heal[/] what that lost
    by distillation from the original, [bold]eval[/] both side by side, [bold]generate[/] text; or
    [bold]run[/] all of it from a recipe. Every command explains itself: tpa-convert COMMAND --help.
    """
    if version:
        console.print(f"tpa-convert {__version__}")
        raise typer.Exit
    if ctx.invoked_subcommand != "heal" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("only `tpa-convert heal` shares its work between processes")
    quiet_libraries()


@app.command(epilog="Example: tpa-convert plan HuggingFaceTB/SmolLM2-135M --memory 24 -o plan.yaml")
def plan(
    ctx: typer.Context,
    source: o.SourceArgument,
    out: o.PlanOutput = None,
    kv_floats: o.KvFloats = None,
    kv_bytes: o.KvBytes = None,
    kv_ratio: o.KvRatio = None,
    cache_dtype: o.CacheDType = None,
    max_increase: o.MaxIncrease = 0.1,
    memory: o.Memory = None,
    batch_size: o.CachedBatch = 1,
    context: o.Context = 4096,
    multiple_of: o.MultipleOf = 8,
    gauge: o.GaugeChoice = "auto",
    key_cache: o.KeyCache = "rotated",
    refine: o.PlanRefine = False,
    refine_steps: o.RefineSteps = 200,
    calibration: o.Calibration = None,
    text_column: o.CalibrationColumn = "text",
    calibration_blocks: o.CalibrationBlocks = 64,
    block_length: o.CalibrationLength = 512,
    save_moments: o.SaveMoments = None,
    moments: o.MomentsFile = None,
    revision: o.Revision = None,
    trust_remote_code: o.TrustRemoteCode = False,
    device: o.Device = "auto",
    seed: o.Seed = 0,
    chart: o.Chart = None,
    overwrite: o.Overwrite = False,
    json_file: o.JsonFile = None,
) -> None:
    """Choose the widths of every layer by what the model minds.

    Measures, layer by layer, how much narrower keys and narrower values cost, shares the budget out
    accordingly, and measures the result beside uniform widths at several budgets. The best plan
    goes to a file for convert --plan. Give a budget, or what may be lost.
    """
    options = _section(PlanOptions, ctx)
    model = _section(SourceOptions, ctx, model=source)
    from tpa_convert import pipeline
    from tpa_convert.reporting.charts import check_chart, planning_chart

    if chart is not None:
        check_chart(chart)
    for path in (out, chart, save_moments, json_file):
        check_file(path, overwrite)
    result = pipeline.plan(model, options, device=device, track=track)
    # Files come before what is printed, since a closed pipe ends the command.
    if out is not None:
        _write_text(out, result.to_yaml())
    _write_json(json_file, result)
    if chart is not None:
        planning_chart(result.report, chart, cache_dtype=result.cache_dtype, refined=result.refined)
    show_planning(result)
    if out is not None:
        console.print(f"\nWrote {out} in {duration(result.seconds)}. Next:", soft_wrap=True)
        console.print(f"  tpa-convert convert {source} --plan {out} --out small", soft_wrap=True)


@app.command(
    epilog="Example: tpa-convert convert HuggingFaceTB/SmolLM2-135M --kv-ratio 0.5 -o small"
)
def convert(
    ctx: typer.Context,
    source: o.SourceArgument,
    out: o.ConvertOut = None,
    kv_floats: o.KvFloats = None,
    kv_bytes: o.KvBytes = None,
    kv_ratio: o.KvRatio = None,
    rank_k: o.RankK = None,
    rank_v: o.RankV = None,
    width_k: o.WidthK = None,
    width_v: o.WidthV = None,
    plan: o.PlanInput = None,
    cache_dtype: o.CacheDType = None,
    form: o.Form = "static",
    method: o.MethodChoice = "gauge",
    whiten: o.Whiten = True,
    gauge: o.GaugeChoice = "auto",
    key_cache: o.KeyCache = "rotated",
    refit: o.Refit = False,
    refine: o.Refine = False,
    refine_steps: o.RefineSteps = 600,
    rank_q: o.RankQ = None,
    calibration: o.Calibration = None,
    text_column: o.CalibrationColumn = "text",
    calibration_blocks: o.CalibrationBlocks = 64,
    block_length: o.CalibrationLength = 512,
    save_moments: o.SaveMoments = None,
    moments: o.MomentsFile = None,
    revision: o.Revision = None,
    trust_remote_code: o.TrustRemoteCode = False,
    device: o.Device = "auto",
    seed: o.Seed = 0,
    dtype: o.DType = None,
    overwrite: o.Overwrite = False,
    dry_run: o.DryRun = False,
    json_file: o.JsonFile = None,
) -> None:
    """Convert a pretrained model, so that it caches less per token.

    Say how much with one budget. The model runs over a calibration text once, and every attention
    layer is factored so that what it does on that text changes least. The result is an ordinary
    transformers model; heal it to get back what was lost.
    """
    options = _section(ConvertOptions, ctx)
    model = _section(SourceOptions, ctx, model=source)
    if out is None and not dry_run:
        raise UserError("say where to write the model with --out DIR (or look first: --dry-run)")
    check_file(json_file, overwrite)
    from tpa_convert import pipeline

    if dry_run:
        prediction = pipeline.preview(model, options)
        _write_json(json_file, prediction)
        show_plan(prediction)
        return
    assert out is not None
    result = pipeline.convert(model, out, options, device=device, overwrite=overwrite, track=track)
    _write_json(json_file, result)
    show_plan(result.prediction)
    console.print(f"\nWrote {result.out} in {duration(result.seconds)}. Next:", soft_wrap=True)
    console.print(
        f"  tpa-convert heal {result.out} --text YOUR_TEXT --out {result.out}-healed",
        soft_wrap=True,
    )
    console.print(f"  tpa-convert eval {result.out} --text HELD_OUT_TEXT", soft_wrap=True)


@app.command(epilog="Example: tpa-convert heal small --text HuggingFaceFW/fineweb-edu -o healed")
def heal(
    ctx: typer.Context,
    directory: o.DirectoryArgument,
    out: o.Out,
    text: o.HealText = None,
    sampled_tokens: o.SampledTokens = 0,
    sampled_chat_tokens: o.SampledChatTokens = 0,
    valid_text: o.ValidText = None,
    text_column: o.TextColumn = "text",
    tokens: o.Tokens = 10_000_000,
    block_length: o.TrainingLength = 1024,
    tokens_per_step: o.TokensPerStep = 32 * 1024,
    batch_size: o.TrainingBatch = None,
    attention_learning_rate: o.AttentionLearningRate = 6e-4,
    learning_rate: o.LearningRate = 1e-4,
    warmup_steps: o.WarmupSteps = 40,
    trainable: o.Trainable = "all",
    lora_rank: o.LoraRank = 16,
    skew: o.Skew = 0.1,
    temperature: o.Temperature = 1.0,
    hidden_weight: o.HiddenWeight = None,
    gradient_checkpointing: o.GradientCheckpointing = False,
    offload_teacher: o.OffloadTeacher = False,
    save_steps: o.SaveSteps = 500,
    valid_steps: o.ValidSteps = 100,
    stop_at: o.StopAt = None,
    log_to: o.LogTo = None,
    source: o.HealSource = None,
    revision: o.Revision = None,
    trust_remote_code: o.TrustRemoteCode = False,
    seed: o.Seed = 0,
    resume: o.Resume = True,
    overwrite: o.Overwrite = False,
    json_file: o.JsonFile = None,
) -> None:
    """Train a converted model to predict what its source predicts, on plain text.

    Takes a GPU if there is one; for several, put `accelerate launch -m tpa_convert.cli` in front
    of `heal`. Ctrl-C stops it at a checkpoint beside the output directory, and the same command
    continues from there.
    """
    options = _section(HealOptions, ctx)
    teacher = _section(SourceOptions, ctx, model=source) if source else None
    check_file(json_file, overwrite)
    from accelerate import PartialState

    from tpa_convert import pipeline

    with _continued_without("--no-resume", not resume):
        result = pipeline.heal(
            directory,
            out,
            options,
            source=teacher,
            overwrite=overwrite,
            resume=resume,
            track=track,
        )
    _write_json(json_file, result)
    show_healing(result)
    console.print(f"Wrote {result.out}. Next:", soft_wrap=True)
    console.print(f"  tpa-convert eval {directory} {out} --text HELD_OUT_TEXT", soft_wrap=True)
    PartialState().destroy_process_group()


@app.command(
    "eval",
    epilog="Example: tpa-convert eval small healed --text Salesforce/wikitext:wikitext-2-raw-v1",
)
def evaluate(
    ctx: typer.Context,
    directories: o.DirectoriesArgument,
    against: o.Against = None,
    text: o.EvalText = None,
    text_column: o.EvalColumn = "text",
    split: o.Split = "train",
    choices: o.Choices = None,
    tasks: o.Tasks = None,
    block_length: o.EvalLength = 1024,
    max_blocks: o.MaxBlocks = 64,
    limit: o.Limit = None,
    batch_size: o.EvalBatch = 8,
    speed: o.Speed = True,
    prompt: o.SamplePrompt = None,
    revision: o.Revision = None,
    trust_remote_code: o.TrustRemoteCode = False,
    device: o.Device = "auto",
    write_card: o.WriteCard = False,
    json_file: o.ReplacedJsonFile = None,
) -> None:
    """Measure converted models beside their source, in one table.

    Cache bytes (measured on the live cache) and speed always; perplexity with --text, accuracy with
    --choices and --task.
    """
    options = _section(EvaluateOptions, ctx)
    source = _section(SourceOptions, ctx, model=against) if against else None
    check_file(json_file, overwrite=True)
    from tpa_convert import pipeline

    report = pipeline.evaluate(
        directories, options, against=source, device=device, write_card=write_card, track=track
    )
    _write_json(json_file, report)
    console.print(report)


@app.command(epilog='Example: tpa-convert generate small "Once upon a time" --temperature 0.8')
def generate(
    directory: o.DirectoryArgument,
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="Text to continue.", show_default=False)
    ],
    max_new_tokens: o.MaxNewTokens = 100,
    temperature: o.SamplingTemperature = 0.0,
    top_p: o.TopP = 1.0,
    seed: o.Seed = 0,
    device: o.Device = "auto",
    json_file: o.ReplacedJsonFile = None,
) -> None:
    """Continue a text with a converted model."""
    check_file(json_file, overwrite=True)
    from tpa_convert import pipeline

    text = pipeline.generate(
        directory,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        device=device,
        stream=True,
    )
    _write_json(json_file, {"prompt": prompt, "continuation": text})


@app.command(epilog="Example: tpa-convert run recipes/smollm2-135m.yaml --dry-run")
def run(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="YAML file; see recipes/.", show_default=False)
    ],
    out: o.RecipeOut = None,
    overwrite: o.StartOver = False,
    dry_run: o.DryRun = False,
    json_file: o.ReplacedJsonFile = None,
) -> None:
    """Convert, heal and evaluate as a recipe says.

    Finished steps are kept: after Ctrl-C, the same command continues where it was.
    """
    steps = load_recipe(recipe)
    check_file(json_file, overwrite=True)
    from tpa_convert import pipeline
    from tpa_convert.pipeline.run import run as run_recipe

    if dry_run:
        prediction = pipeline.preview(steps.source, steps.convert)
        _write_json(json_file, prediction)
        show_plan(prediction)
        return
    with _continued_without("--overwrite", overwrite):
        result = run_recipe(steps, out, overwrite=overwrite, track=track)
    _write_json(json_file, result)
    if result.conversion is not None:
        show_plan(result.conversion.prediction)
    if result.healing is not None:
        show_healing(result.healing)
    if result.evaluation is not None:
        console.print(result.evaluation)
    kept = " and ".join(str(d) for d in (result.converted, result.healed) if d is not None)
    console.print(f"\nThe models are in {kept}.", soft_wrap=True)
    if steps.next_steps:
        console.print(f"\n{steps.next_steps.rstrip()}", markup=False, soft_wrap=True)


def main() -> None:
    """Entry point. A polite kill cleans up like Ctrl-C does."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    app()


def _section(section: type[S], ctx: typer.Context, **values: Any) -> S:
    """Fill a recipe section from the options of the same names."""
    options = {name: value for name, value in ctx.params.items() if name in section.model_fields}
    return validated(section, {**options, **values})


@contextmanager
def _continued_without(flag: str, given: bool) -> Iterator[None]:
    """Where a run that was stopped would begin again with the same command, says so."""
    try:
        yield
    except KeyboardInterrupt as stop:
        if given and str(stop):
            raise KeyboardInterrupt(f"{stop}, without {flag}") from None
        raise


def _write_json(path: Path | None, result: Any) -> None:
    if path is None or not FIRST_PROCESS:
        return
    values = result if isinstance(result, dict) else result.to_json()
    _write_text(path, json.dumps(values, indent=2) + "\n")


def _write_text(path: Path, text: str) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
