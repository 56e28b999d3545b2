"""The command line: parse, call the library, show progress and results.

Commands hold no logic of their own. What they take is what their sections declare (`options`).
Heavy imports happen inside the commands, so that `--help` is immediate.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tpa_convert import __version__
from tpa_convert.cli.files import write_json, write_text
from tpa_convert.cli.help import Command, example
from tpa_convert.cli.signature import of_sections, spelled
from tpa_convert.cli.tables import (
    show_expected_loss,
    show_healing,
    show_healing_needs,
    show_plan,
    show_planning,
    show_stages,
)
from tpa_convert.cli.terminal import (
    Commands,
    console,
    duration,
    quiet_libraries,
    show_next,
    track,
)
from tpa_convert.errors import UserError
from tpa_convert.export.output import check_file, check_output
from tpa_convert.options.bench import BenchOptions
from tpa_convert.options.command_line import (
    BenchFiles,
    ConvertFiles,
    EvalFiles,
    GenerateFiles,
    HealFiles,
    OwnCode,
    PlanFiles,
    Reference,
    RunFiles,
    Teacher,
)
from tpa_convert.options.conversion import CalibrationOptions, ConvertOptions
from tpa_convert.options.evaluation import EvaluateOptions, GenerateOptions
from tpa_convert.options.healing import HealOptions
from tpa_convert.options.planning import PlanOptions
from tpa_convert.options.recipe import load_recipe
from tpa_convert.options.source import DeviceOptions, SourceAccess, SourceOptions

if TYPE_CHECKING:
    from tpa_convert.export.hub import Repository

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="\b\nTry first:\n  tpa-convert convert MODEL --kv-ratio 0.125 --dry-run",
)


def command(*words: str, name: str | None = None) -> Callable[[Callable], Callable]:
    """Makes a command of a function of sections; `words` are an example of its use."""

    def register(function: Callable) -> Callable:
        @wraps(function)
        def started(own: OwnCode, **sections: Any) -> None:
            from tpa_convert.options.named import check_named

            for section in (own, *sections.values()):
                check_named(section)
            quiet_libraries()  # only now, since it imports them
            if own.own_code:
                from tpa_convert.families.own_code import import_file

                for path in own.own_code:
                    import_file(path)
            function(**sections)

        epilog = example(" ".join(("tpa-convert", *words)))
        app.command(name, cls=Command, epilog=epilog)(of_sections(started, own=OwnCode))
        return function

    return register


def show_version(wanted: bool) -> None:
    if wanted:
        console.print(f"tpa-convert {__version__}")
        raise typer.Exit


@app.callback()
def top(
    ctx: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and stop.", is_eager=True, callback=show_version
        ),
    ] = False,
) -> None:
    """Convert a language model to Tensor Product Attention: the same model, a smaller KV cache.

    Plan a cache budget, convert a pretrained model, heal what that lost by distillation from the
    original, evaluate both side by side, generate text; or run all of it from a recipe.

    Every command explains itself: tpa-convert COMMAND --help.
    """
    if ctx.invoked_subcommand != "heal" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("only `tpa-convert heal` shares its work between processes")


@command("plan HuggingFaceTB/SmolLM2-135M --memory 24 --out plan.yaml")
def plan(
    source: SourceOptions, files: PlanFiles, options: PlanOptions, where: DeviceOptions
) -> None:
    """Choose how much to cache, by measuring several budgets.

    Spreads bits over layers, keys and values by what an error of them costs, and measures what that
    does to the model at several budgets, beside the source's own cache in 8, 4, 3 and 2 bits. The
    chosen plan goes to a file for convert --plan. Give a budget, or what may be lost. With
    --cache-bits 16 it measures what narrower keys and values cost and spreads widths instead. With
    --target llama all layers are as wide, since a Llama has one size of heads.
    """
    for path in (files.out, files.chart, options.save_moments, files.json_file):
        check_file(path, files.overwrite)
    from tpa_convert import pipeline
    from tpa_convert.reporting.charts import planning_chart

    result = pipeline.plan(source, options, device=where.device, track=track)
    # Files come before what is printed, since a closed pipe ends the command.
    if files.out is not None:
        write_text(files.out, result.to_yaml())
    write_json(files.json_file, result)
    if files.chart is not None:
        planning_chart(result.report, files.chart, refined=result.refined)
    show_planning(result)
    if files.out is not None:
        words = ["tpa-convert", "convert", source.model, *_as_planned(source, options, where)]
        show_next(
            f"Wrote {files.out} in {duration(result.seconds)}. Next:",
            shlex.join([*words, "--plan", str(files.out), "--out", "small"]),
        )


@command("convert HuggingFaceTB/SmolLM2-135M --kv-ratio 0.125 --refit --out small")
def convert(
    source: SourceOptions, files: ConvertFiles, options: ConvertOptions, where: DeviceOptions
) -> None:
    """Convert a pretrained model, so that it caches less per token.

    Say how much to cache in one way: a ratio, bytes, floats, a plan, or ranks and widths. The model
    runs over a calibration text once, which shows what an error of every cached number costs. What
    matters is then cached in more bits, what matters little in fewer or none. The result is an
    ordinary transformers model; heal it to get back what was lost.
    """
    _check_outputs(files)
    from tpa_convert import pipeline

    if files.dry_run:
        prediction = pipeline.preview(source, options, with_needs=True)
        write_json(files.json_file, prediction)
        show_plan(prediction)
        return
    assert files.out is not None
    repository = _repository(files)
    result = pipeline.convert(
        source, files.out, options, device=where.device, overwrite=files.overwrite, track=track
    )
    write_json(files.json_file, result)
    show_plan(result.prediction)
    if result.nats is not None:
        show_expected_loss(result.nats)
    if files.profile:
        show_stages(result)
    show_next(
        f"Wrote {result.out} in {duration(result.seconds)}. Next:",
        f"tpa-convert heal {result.out} --text YOUR_TEXT --out {result.out}-healed",
        f"tpa-convert eval {result.out} --text HELD_OUT_TEXT",
    )
    _upload(result.out, repository)


@command("heal small --text HuggingFaceFW/fineweb-edu --out healed")
def heal(files: HealFiles, options: HealOptions, teacher: Teacher) -> None:
    """Train a converted model to predict what its source predicts, on plain text.

    The model learns with its cache as it is, so that it makes up for rounded numbers too. Takes a
    GPU if there is one; for several, put `accelerate launch -m tpa_convert.cli` in front
    of `heal`. Ctrl-C stops it at a checkpoint beside the output directory, and the same command
    continues from there.
    """
    _check_outputs(files)
    from accelerate import PartialState

    from tpa_convert import pipeline

    if files.dry_run:
        preview = pipeline.preview_healing(files.directory, options, source=teacher.model)
        write_json(files.json_file, preview)
        show_healing_needs(preview)
        return
    assert files.out is not None
    repository = _repository(files)
    with _continued_without("--no-resume", not files.resume):
        result = pipeline.heal(
            files.directory,
            files.out,
            options,
            source=teacher.model,
            overwrite=files.overwrite,
            resume=files.resume,
            track=track,
        )
    write_json(files.json_file, result)
    show_healing(result)
    show_next(
        f"Wrote {result.out}. Next:",
        f"tpa-convert eval {files.directory} {files.out} --text HELD_OUT_TEXT",
    )
    if PartialState().is_main_process:
        _upload(result.out, repository)
    PartialState().destroy_process_group()


@command("eval small healed --text Salesforce/wikitext:wikitext-2-raw-v1", name="eval")
def evaluate(
    files: EvalFiles, options: EvaluateOptions, reference: Reference, where: DeviceOptions
) -> None:
    """Measure models side by side, in one table: a source and the models made from it.

    With --text: perplexity, and how far each model's predictions are from its source's. With
    --choices and --task: accuracy. Always: bytes of the live cache, speed and a sample, unless
    --no-speed and --prompt "" turn these two off.
    """
    check_file(files.json_file, overwrite=True)
    from tpa_convert import pipeline

    report = pipeline.evaluate(
        files.models,
        options,
        against=reference.model,
        device=where.device,
        write_card=files.write_card,
        track=track,
    )
    write_json(files.json_file, report)
    console.print(report)


@command("bench small --batch 1 --batch 16 --context 8192 --chart speed.png")
def bench(
    files: BenchFiles, options: BenchOptions, reference: Reference, where: DeviceOptions
) -> None:
    """Time models side by side, against batch and context: a source and the models made from it.

    Prefill and decoding, and how near a decoding step comes to the time that the device takes to
    read weights and cache.
    """
    for path in (files.chart, files.json_file):
        check_file(path, files.overwrite)
    from tpa_convert import pipeline
    from tpa_convert.reporting.speed import speed_chart

    report = pipeline.bench(
        files.models, options, against=reference.model, device=where.device, track=track
    )
    write_json(files.json_file, report)
    if files.chart is not None:
        speed_chart(report, files.chart)
    console.print(report)


@command('generate small "Once upon a time" --temperature 0.8')
def generate(files: GenerateFiles, options: GenerateOptions, where: DeviceOptions) -> None:
    """Continue a text with a converted model."""
    check_file(files.json_file, overwrite=True)
    from tpa_convert import pipeline

    text = pipeline.generate(
        files.directory, files.prompt, options, device=where.device, stream=True
    )
    write_json(files.json_file, {"prompt": files.prompt, "continuation": text})


@command("run recipes/smollm2-135m.yaml --dry-run")
def run(files: RunFiles) -> None:
    """Convert, heal and evaluate as a recipe says.

    Finished steps are kept: after Ctrl-C, the same command continues where it was.
    """
    steps = load_recipe(files.recipe)
    from tpa_convert.options.named import check_named

    check_named(steps)
    check_file(files.json_file, overwrite=True)
    out = files.out if files.dry_run else steps.results(files.out)
    from tpa_convert import pipeline
    from tpa_convert.pipeline.run import run as run_recipe

    if files.dry_run:
        prediction = pipeline.preview(steps.source, steps.convert)
        write_json(files.json_file, prediction)
        show_plan(prediction)
        return
    with _continued_without("--overwrite", files.overwrite):
        result = run_recipe(steps, out, overwrite=files.overwrite, track=track)
    write_json(files.json_file, result)
    if result.conversion is not None:
        show_plan(result.conversion.prediction)
    if result.healing is not None:
        show_healing(result.healing)
    if result.evaluation is not None:
        console.print(result.evaluation)
    kept = " and ".join(str(d) for d in (result.converted, result.healed) if d is not None)
    further = ["", *steps.next_steps.rstrip().splitlines()] if steps.next_steps else []
    show_next(f"The models are in {kept}, and {result.page} shows the last.", *further)


def main() -> None:
    """Entry point. A polite kill cleans up like Ctrl-C does."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    app()


def _check_outputs(files: ConvertFiles | HealFiles) -> None:
    """Whether all that is to be written can be: asked before anything slow is imported."""
    check_file(files.json_file, files.overwrite)
    if files.dry_run:
        return
    if files.out is None:
        raise UserError("say where to write the model with --out DIR (or look first: --dry-run)")
    check_output(files.out, files.overwrite)


def _as_planned(source: SourceOptions, options: PlanOptions, where: DeviceOptions) -> list[str]:
    """What `convert` needs beside a plan to make the model that was planned."""
    moments = options.moments or options.save_moments
    measured = ["moments"]
    if moments is None or options.refine:  # a refinement reads the text again
        measured += [name for name in CalibrationOptions.model_fields if name != "moments"]
    beside = options.model_copy(update={"moments": moments, "save_moments": None})
    return [
        *spelled(source, SourceAccess.model_fields),
        *spelled(beside, [*measured, "gauge", "target", "refine"]),
        *spelled(where, DeviceOptions.model_fields),
    ]


def _repository(files: ConvertFiles | HealFiles) -> Repository | None:
    """Where a model is to be uploaded, if anywhere: asked before hours of work."""
    if files.push_to is None:
        if files.private:
            raise UserError("--private is for the repository that --push-to makes: name one")
        return None
    from tpa_convert.export.hub import check_repository

    return check_repository(files.push_to, private=files.private, overwrite=files.overwrite)


def _upload(directory: Path, repository: Repository | None) -> None:
    """Uploads a finished model and says where it is."""
    if repository is not None:
        from tpa_convert.export.hub import upload

        console.print(f"Uploaded to {upload(directory, repository)}")


@contextmanager
def _continued_without(flag: str, given: bool) -> Iterator[None]:
    """Where a run that was stopped would begin again with the same command, says so."""
    try:
        yield
    except KeyboardInterrupt as stop:
        if given and str(stop):
            raise KeyboardInterrupt(f"{stop}, without {flag}") from None
        raise
