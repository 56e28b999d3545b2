"""Results as the command line shows them: small tables and a few sentences."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table

from tpa_convert.cli.terminal import console, duration

if TYPE_CHECKING:
    from tpa_convert.modeling import LayerShape
    from tpa_convert.pipeline import HealingPreview, HealingResult, PlanningResult
    from tpa_convert.pipeline.conversion import ConversionResult
    from tpa_convert.pipeline.prediction import Prediction
    from tpa_convert.planning.search import PlanReport
    from tpa_convert.plans import Plan
    from tpa_convert.plans.speed import DecodeTime

NOTABLE_GROWTH = 0.02  # of the source's parameters
WINDOW_CONTEXTS = 2048, 32_768  # tokens that a model with windows is shown at
LAYERS_ACROSS = 10  # in the table of an uneven plan


def show_plan(prediction: Prediction) -> None:
    """What is cached before and after, and the shapes of the layers."""
    from tpa_convert.pipeline.prediction import DECODE_CONTEXT

    plan, layers = prediction.plan, len(prediction.plan.layers)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for column in ("source", "converted", "kept"):
        table.add_column(column, justify="right")
    windowed = WINDOW_CONTEXTS if any(prediction.windows) else ()
    for name, before, after in (
        ("cache bytes per token", prediction.source_kv_bytes, prediction.kv_bytes),
        ("  of them per layer", plan.source_kv_bytes / layers, plan.kv_bytes / layers),
        *((f"cache bytes of {n:,} tokens", *prediction.cached_at(n)) for n in windowed),
        ("parameters", prediction.source_parameters, prediction.parameters),
    ):
        bound = "at most " if name == "parameters" and prediction.approximate else ""
        table.add_row(
            name,
            f"{before:,.0f}",
            bound + (f"{after:,.6g}" if after < 1e6 else f"{after:,.0f}"),
            f"{after / before:.1%}",
        )
    console.print(table)
    growth = prediction.parameters - prediction.source_parameters
    if growth > NOTABLE_GROWTH * prediction.source_parameters:
        absorbed = any("absorbed" in (x.key_gauge, x.value_gauge) for x in plan.layers)
        remedy = "; --gauge applied avoids that, and takes time in every step" if absorbed else ""
        grow = "may grow by up to" if prediction.approximate else "grow by"
        console.print(f"The weights {grow} {growth:,} parameters{remedy}.")
    if prediction.needs is not None:
        needs = prediction.needs
        console.print(
            f"Converting takes about {needs.memory / 1e9:.2g} GB of memory, {needs.disk / 1e9:.2g} "
            f"GB of disk beside the source, and {duration(needs.seconds)} on this processor if it "
            "has nothing else to do."
        )
    if plan.coded is None:
        show_layers(plan.layers)
    else:
        blocks = plan.coded.key_blocks
        console.print(
            "Which number gets how many bits is decided on the calibration text; keys are rebuilt "
            f"in {blocks} block{'s' if blocks > 1 else ''} of rotary pairs."
        )
    _show_rebuilding(plan)
    if plan.is_coded:  # kernels of coded caches are far from the least time
        return
    ratio = prediction.decode_seconds / prediction.source_decode_seconds
    console.print(
        f"Attention of a decoding step on an H100, {DECODE_CONTEXT:,} tokens cached: at least "
        f"{_times(ratio)} the source's {1e3 * prediction.source_decode_seconds:.3g} ms."
    )


def show_stages(result: ConversionResult) -> None:
    """Where the time of a conversion went, and how fast weights were turned over."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column(justify="right")
    rest = result.seconds - sum(result.stages.values())
    for name, seconds in (*result.stages.items(), ("everything else", rest)):
        table.add_row(name, f"{seconds:.1f} s", f"{seconds / result.seconds:.0%}")
    console.print(table)
    rate = result.source_bytes / result.seconds / 1e9
    console.print(f"{result.source_bytes / 1e9:.3g} GB of weights, {rate:.3g} GB a second")


def show_layers(layers: Sequence[LayerShape]) -> None:
    """One line on layers that are all alike; else their numbers in a table, ten layers across."""
    kept_as = {layer.key_cache for layer in layers}
    key = "latent key" if kept_as == {"latent"} else "key"
    rows: dict[str, list[int | None]] = {
        f"{key} width": [layer.width_k for layer in layers],
        "value width": [layer.width_v for layer in layers],
    }
    if any(layer.coded for layer in layers):
        rows["key bytes"] = [layer.key_layout.row_bytes for layer in layers]
        rows["value bytes"] = [layer.value_layout.row_bytes for layer in layers]
    if any(layer.contextual for layer in layers):
        # the rank of a static layer follows from its decomposition, so a plan cannot know it
        rows["key rank"] = [layer.rank_k if layer.contextual else None for layer in layers]
        rows["value rank"] = [layer.rank_v if layer.contextual else None for layer in layers]
    if len(set(zip(*rows.values(), strict=True))) > 1:
        table = Table(box=None, pad_edge=False, show_header=False)
        table.add_column()
        for _ in range(LAYERS_ACROSS):
            table.add_column(justify="right", no_wrap=True)
        for start in range(0, len(layers), LAYERS_ACROSS):
            across = range(start, min(start + LAYERS_ACROSS, len(layers)))
            table.add_row("layer", *map(str, across), style="dim")
            for name, numbers in rows.items():
                table.add_row(name, *(str(numbers[i] or "–") for i in across))
            table.add_row()
        console.print(table)
        widths = ""
    else:
        widths = "; " + ", ".join(f"{name} {numbers[0]}" for name, numbers in rows.items())
    kinds: dict[str, list[int]] = {}
    for i, layer in enumerate(layers):
        kind = f"{layer.form} head factors, gauge {layer.value_gauge}"
        if layer.coded:
            blocks = f" in {layer.key_blocks} blocks" if layer.key_blocks > 1 else ""
            kind = f"coded in bits, keys rebuilt from codes{blocks}"
        if len(kept_as) > 1:
            kind += f", {layer.key_cache} keys"
        kinds.setdefault(kind, []).append(i)
    for kind, where in kinds.items():
        console.print(f"{'layers' if len(where) > 1 else 'layer'} {ranges(where)}: {kind}{widths}")


def ranges(numbers: Sequence[int]) -> str:
    """1, 3-5 for 1, 3, 4, 5."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    pairs = zip(starts, ends, strict=True)
    return ", ".join(str(start) if start == end else f"{start}-{end}" for start, end in pairs)


def _show_rebuilding(plan: Plan) -> None:
    from tpa_convert.plans.cost import rebuilding_per_byte

    operations = rebuilding_per_byte(plan)
    if operations:
        console.print(
            "Every step rebuilds the keys of the context: beside attention itself, "
            f"{operations:.0f} additions and multiplications for each byte that the source caches."
        )


# Of the log loss that codes cost SmolLM2-135M at an eighth of its bytes, healed on 8 M and on 24 M
# tokens (benchmarks/notes/2026-11-26-coded-cache.md).
HEALED_SHARES = (0.76, 0.91)


def show_expected_loss(nats: float) -> None:
    """What the codes of a cache are expected to cost, and what healing brought back elsewhere."""
    few, many = (f"{share:.0%}" for share in HEALED_SHARES)
    console.print(
        f"Expected loss without training: about {nats:.2g} nats a token, a perplexity of "
        f"{_times(math.exp(min(nats, 700.0)))} the source's. Healing brought {few} of such a loss "
        f"back with 8 million tokens, {many} with 24 million (measured on SmolLM2-135M)."
    )


def show_planning(result: PlanningResult) -> None:
    """All candidates, the chosen one marked, and what they cost."""
    report = result.report
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
    table.add_column("")
    timed = not report.plan.is_coded  # kernels of coded caches are far from the least time
    columns = ["bytes", "kept", "predicted", "perplexity", "KL", *(["step"] if timed else [])]
    columns += ["context"] if result.memory is not None else []
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    previous = report.candidates[0].budget
    for i, candidate in enumerate(report.candidates):
        if candidate.budget != previous:
            table.add_section()
            previous = candidate.budget
        plan, chosen = candidate.plan, i == report.chosen
        name = candidate.form if candidate.form != "static" else candidate.split
        predicted = candidate.predicted_kl
        cells = [
            f"{'→' if chosen else ' '} {name}",
            f"{plan.kv_bytes:,.0f}",
            f"{plan.kv_floats / plan.source_kv_floats:.1%}",
            "" if predicted is None else _times(math.exp(min(predicted, 700.0))),
            _times(candidate.perplexity_ratio),
            f"{candidate.kl:.3f}",
            *([_times(candidate.decode_seconds / report.times.of_source)] if timed else []),
        ]
        context = result.context(candidate)
        table.add_row(
            *cells,
            *([f"{context:,}"] if context is not None else []),
            style="bold green" if chosen else None,
        )
    if report.quantised:
        table.add_section()
    source_bytes = report.plan.source_kv_bytes
    for other in report.quantised:
        table.add_row(
            f"  int{other.bits} source",
            f"{other.share * source_bytes:,.0f}",
            f"{other.share:.1%}",
            "",
            _times(other.perplexity_ratio),
            f"{other.kl:.3f}",
            *([""] if result.memory is not None else []),
        )
    console.print(table)
    for line in (
        f"Perplexity {'after refinement, before' if result.refined else 'before refinement and'} "
        f"healing, relative to the source's {report.source_perplexity:.2f} on held-out "
        f"calibration text; bytes are those of a token, numbers have 16 bits.",
        *_explanation(report),
        *([f"Step: {_about_steps(report.times)}"] if timed else []),
        f"→: {_what_was_chosen(result)}",
        *(
            [
                f"Context: tokens in {result.memory / 1e9:g} GB beside the weights, "
                f"batch {result.batch_size}."
            ]
            if result.memory is not None
            else []
        ),
    ):
        console.print(line, style="dim")
    cost, source = report.candidates[report.chosen].cost, report.source_cost
    console.print(
        f"\nAttention layers of the chosen plan (→) against the source's, at {report.context:,} "
        f"tokens: weights {_times(cost.parameters / source.parameters)}, arithmetic of decoding "
        f"{_times(cost.decode_flops / source.decode_flops)}, of prefill "
        f"{_times(cost.prefill_flops / source.prefill_flops)}."
    )
    _show_rebuilding(report.plan)


def _about_steps(times: DecodeTime) -> str:
    """What predicted times of decoding steps are of."""
    rates = times.rates
    return (
        f"the least time that the attention layers of {rates.name} need for a token, relative to "
        f"the source's {1e3 * times.of_source:.3g} ms, from bytes at {rates.bandwidth / 1e12:.2f} "
        f"TB/s and operations at {rates.operations / 1e12:.0f} TFLOP/s; "
        f"{times.context:,} tokens cached, batch {times.batch}. Kernels take longer."
    )


def _what_was_chosen(result: PlanningResult) -> str:
    if result.objective == "speed":
        return (
            "the least KL of the plans that decode fastest, at the budget or within the accepted "
            "loss."
        )
    return "the least KL at the budget, or the smallest cache within the accepted loss."


def _explanation(report: PlanReport) -> list[str]:
    """What the names of the candidates mean, and whether a conversion is worth it."""
    if not any(candidate.split == "coded" for candidate in report.candidates):
        return [
            "uniform: the same widths everywhere; measured: widths by sensitivity; halfway: their "
            "mean. Predicted from the sensitivities, without refinement."
        ]
    lines = [
        "coded: every number in the bits that it is worth; predicted from how the loss curves. "
        "int8 to int2: the source's own cache, keys by channel and values by token, in groups of "
        "32 (KIVI)."
    ]
    chosen = report.candidates[report.chosen]
    share = chosen.plan.kv_bytes / chosen.plan.source_kv_bytes
    if any(other.share <= share and other.kl <= chosen.kl for other in report.quantised):
        lines.append("Quantising the source's own cache does as well here, without a conversion.")
    return lines


def _times(ratio: float) -> str:
    return f"×{ratio:.3f}" if ratio < 10 else f"×{ratio:.1f}" if ratio < 100 else f"×{ratio:.0f}"


def show_healing(result: HealingResult) -> None:
    """How far from the source the model was and is, and what that took."""
    report = result.report
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for column in ("before", "after"):
        table.add_column(column, justify="right", no_wrap=True)

    def row(name: str, points: Sequence[tuple[int, float]], shown: Callable[[float], str]) -> None:
        if points:
            table.add_row(name, *(shown(points[end][1]) for end in (0, -1)))

    row("loss on training text, first and last steps", report.losses, "{:.4f}".format)
    row("KL from the source, held-out text", report.valid_losses, "{:.4f}".format)
    source = report.source_perplexity
    if source is not None:
        points = report.valid_perplexities
        row(f"perplexity, held-out text (source {source:.2f})", points, "{:.2f}".format)
        row("  against the source", points, lambda value: _times(value / source))
        row("  same likeliest token", report.valid_agreements, "{:.1%}".format)
    console.print(table)
    if report.recovered:
        console.print(f"Stopped early, after {report.steps} steps: recovered as far as asked.")
    resumed = f" (this time from step {report.resumed_from} on)" if report.resumed_from else ""
    speed = f", {report.tokens_per_second:,.0f} tokens/s" if report.tokens_per_second else ""
    console.print(
        f"Healed on {report.tokens:,} tokens{resumed} in {duration(report.seconds)}{speed}.",
        soft_wrap=True,
    )
    console.print(f"Picture: {result.chart}", soft_wrap=True)


def show_healing_needs(preview: HealingPreview) -> None:
    """What each way of healing needs, and which fits."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    columns = ["GB of a GPU", "each more sequence", "main memory"]
    for column in [*columns, *(["fits"] if preview.capacity else [])]:
        table.add_column(column, justify="right", no_wrap=True)
    for name, needs in preview.ways.items():
        cells = [f"{n / 1e9:.3g}" for n in (needs.gpu, needs.sequence, needs.memory)]
        if preview.capacity:
            cells.append("yes" if needs.gpu < preview.capacity else "no")
        table.add_row(name, *cells)
    console.print(table)
    asked = next(iter(preview.ways.values()))
    options = preview.options
    time = "" if preview.seconds is None else f" take about {duration(preview.seconds)} and"
    console.print(
        f"{options.steps:,} steps of {options.tokens_per_step:,} tokens{time} need up to "
        f"{asked.disk / 1e9:.3g} GB of disk for checkpoints. GPU memory is for one sequence of "
        f"{options.block_length:,} tokens a forward pass, computed in bfloat16 and compiled."
    )
    if preview.capacity is None:
        console.print("There is no GPU here.")
    else:
        console.print(f"{preview.device} has {preview.capacity / 1e9:.3g} GB.")
