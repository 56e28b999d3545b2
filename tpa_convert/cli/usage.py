"""Commands that look at a converted model and put it to use."""

from __future__ import annotations

from tpa_convert.cli.commands import command
from tpa_convert.cli.files import write_json
from tpa_convert.cli.terminal import console, show_next
from tpa_convert.export.output import check_file
from tpa_convert.options.source import DeviceOptions
from tpa_convert.options.usage import (
    ChatFiles,
    ChatOptions,
    ExportFiles,
    ExportOptions,
    InspectFiles,
    ReportFiles,
    ServeFiles,
    ServeOptions,
)

ROOM = 1.1  # how much larger an exported cache may be without a word on what helps


@command("inspect small")
def inspect(files: InspectFiles) -> None:
    """Say what a converted model is: layers, cache, how it was made and healed.

    Reads its files only, no weights, so it takes no time. Works for every converted model, also
    those of version 0.1 and those that something else has saved again.
    """
    check_file(files.json_file, overwrite=True)
    from tpa_convert.cli.inspection import show_inspection
    from tpa_convert.export.inspection import inspect as inspect_directory

    found = inspect_directory(files.directory)
    write_json(files.json_file, found)
    show_inspection(found)


@command("export small --to llama --out small-llama")
def export(files: ExportFiles, options: ExportOptions) -> None:
    """Write a converted model in a form that other software runs.

    What the form cannot hold is refused, with the option of convert that makes a model which it
    can. The output is checked to give the same logits before it is written.
    """
    check_file(files.json_file, files.overwrite)
    from tpa_convert.pipeline.export import export as export_model

    result = export_model(files.directory, files.out, options, overwrite=files.overwrite)
    write_json(files.json_file, result)
    kept = result.floats / result.converted_floats
    console.print(
        f"{result.architecture} with the same logits; it caches {result.floats:,} numbers per "
        f"token, the converted model {result.converted_floats:,} (×{kept:.2f}).",
        soft_wrap=True,
    )
    if options.to != "dense" and kept > ROOM:
        console.print(
            "Its layers put their keys on different rotary pairs, and a Llama has one table for "
            "all: convert with --target llama to share one.",
            soft_wrap=True,
        )
    show_next(f"Wrote {result.out}.")


@command("chat small --temperature 0.7")
def chat(files: ChatFiles, options: ChatOptions, where: DeviceOptions) -> None:
    """Talk to a converted model in the terminal.

    Answers come token by token; below stand the speed and the bytes of the cache, beside what the
    source would take. Without a chat template the model continues the text. Where no terminal is,
    lines come from standard input.
    """
    from tpa_convert.cli.conversation import converse
    from tpa_convert.pipeline.chat import chat as begin

    converse(begin(files.directory, options, device=where.device))


@command("serve small --continuous-batching")
def serve(files: ServeFiles, options: ServeOptions, where: DeviceOptions) -> None:
    """Serve a converted model to clients of the OpenAI API.

    Starts transformers' own server: /v1/chat/completions with the model's chat template,
    /v1/completions, /v1/models, streaming too. The model is called as DIR is written here.
    """
    from tpa_convert.pipeline import serving

    url = f"http://{options.host}:{options.port}/v1"
    chats = serving.has_chat_template(files.directory)
    console.print(f"Loading {files.directory} for {url}; Ctrl-C stops the server.", soft_wrap=True)
    if not chats:
        console.print("The model has no chat template: /v1/chat/completions will not answer.")
    try:
        serving.serve(files.directory, options, device=where.device)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the server has stopped") from None


@command("report small --out small.html")
def report(files: ReportFiles) -> None:
    """Write a page that shows a converted model: cache, quality, healing, results, samples.

    One file that needs no network, for light and dark screens of any width, from whatever is known
    of the model.
    """
    check_file(files.out, files.overwrite)
    from tpa_convert.pipeline.report import report as write_report

    write_report(files.directory, files.out, files.results)
    show_next(f"Wrote {files.out}.")
