"""Planning by measurement: sensitivities, plans, their file and the command."""

from __future__ import annotations

import copy
import json
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from tests.command_line import error_of, save_source, tpa_convert
from tests.conversions import convert_coded, random_blocks, source_of, tiny_moments
from tpa_convert.cli.tables import show_layers
from tpa_convert.conversion.model import convert_model
from tpa_convert.errors import UserError
from tpa_convert.forward.comparison import agreement
from tpa_convert.modeling import Gauge, LayerShape
from tpa_convert.planning.search import plan_measured, predicted_loss
from tpa_convert.planning.sensitivity import POSITION_STRIDE, measure_sensitivity
from tpa_convert.plans import Budget, Plan, load_plan, plan_to_yaml, plan_uniform, plan_widths
from tpa_convert.plans.cost import largest_context, plan_cost, rebuilding_per_byte, source_cost


@pytest.fixture(scope="module")
def measured(tiny_llama):
    """A tiny source, its moments, token blocks and the sensitivity on them."""
    source = source_of(tiny_llama("gqa"))
    moments = tiny_moments(source.model)
    blocks = random_blocks(count=4, length=32, seed=3)
    return source, moments, blocks, measure_sensitivity(source, moments, blocks)


@pytest.mark.parametrize("part", ["keys", "values"])
def test_a_loss_is_that_of_a_model_with_only_this_part_narrowed(measured, part) -> None:
    source, moments, blocks, sensitivity = measured
    layer, full = 1, 16
    sensitivity = getattr(sensitivity[layer], part)
    for width, loss in zip(sensitivity.widths, sensitivity.losses, strict=True):
        widths = [(full, full)] * len(moments.layers)
        widths[layer] = (width, full) if part == "keys" else (full, width)
        config = source.family.attention_sizes(source.model.config)
        model = convert_model(source, plan_widths(widths, config), moments)
        source_logits = source.model(blocks).logits[:, ::POSITION_STRIDE].log_softmax(-1)
        logits = model(blocks).logits[:, ::POSITION_STRIDE].log_softmax(-1)
        expected = (source_logits.exp() * (source_logits - logits)).sum(-1).mean().item()
        assert loss == pytest.approx(expected, rel=1e-3, abs=1e-7)
        assert sensitivity.loss(torch.tensor(width)).item() == pytest.approx(loss, rel=1e-6)


def test_the_source_is_left_as_it_was(measured) -> None:
    source, moments, blocks, _ = measured
    before = source.model(blocks).logits
    measure_sensitivity(source, moments, blocks[:1])
    assert torch.equal(source.model(blocks).logits, before)


def test_a_full_width_loses_nothing_and_narrower_ones_more(measured) -> None:
    for layer in measured[3]:
        for part in (layer.keys, layer.values):
            losses = part.loss(torch.arange(2, 17, 2))
            assert losses[-1] == 0
            assert (losses.diff() <= 0).all()


@pytest.mark.parametrize("floats", [8, 13, 20, 32])
def test_a_measured_plan_keeps_to_its_budget(measured, floats) -> None:
    source, _, _, sensitivity = measured
    config = source.family.attention_sizes(source.model.config)
    plan = plan_measured(sensitivity, config, floats, multiple_of=2)
    assert floats - 1 <= plan.kv_floats <= floats
    uniform = plan_uniform(config, Budget(kv_floats=floats))
    if all(w % 2 == 0 for s in uniform.layers for w in (s.width_k, s.width_v)):
        assert predicted_loss(plan, sensitivity) <= predicted_loss(uniform, sensitivity) + 1e-9


def test_the_most_sensitive_layer_gets_the_most(measured) -> None:
    source, _, blocks, _ = measured
    with torch.no_grad():  # a layer whose output is scaled down hardly matters
        quiet = source.model.model.layers[0].self_attn.o_proj.weight
        original = quiet.clone()
        quiet *= 1e-3
    try:
        sensitivity = measure_sensitivity(source, tiny_moments(source.model), blocks)
    finally:
        quiet.data.copy_(original)
    config = source.family.attention_sizes(source.model.config)
    first, *others = plan_measured(sensitivity, config, 16, multiple_of=2).layers
    assert first.width_k + first.width_v < min(o.width_k + o.width_v for o in others)


@pytest.mark.parametrize(("multiple", "floats"), [(3, 16), (6, 16), (8, 8)])
def test_multiples_that_do_not_fit(measured, multiple, floats) -> None:
    source, _, _, sensitivity = measured
    config = source.family.attention_sizes(source.model.config)
    with pytest.raises(UserError, match="multiples of"):
        plan_measured(sensitivity, config, floats, multiple_of=multiple)


# ------------------------------------------------------------------------------- cost


@pytest.mark.parametrize(
    ("form", "key_cache"),
    [("static", "rotated"), ("static", "latent"), ("affine", "rotated"), ("linear", "rotated")],
)
@pytest.mark.parametrize("gauge", ["absorbed", "applied"])
def test_parameters_and_cache_are_those_of_the_model(measured, form, key_cache, gauge) -> None:
    source, moments, blocks, _ = measured
    config = source.family.attention_sizes(source.model.config)
    budget = Budget(kv_floats=24)
    plan = plan_uniform(config, budget, form=form, gauge=gauge, key_cache=key_cache)
    model = convert_model(source, plan, moments)
    matrices = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if "self_attn" in name and not name.endswith(("bias", "offset"))
    )
    cost = plan_cost(plan, config, context=100)
    assert cost.parameters == matrices
    cache = model(blocks[:1], use_cache=True).past_key_values
    cached = sum(layer.keys.shape[-1] + layer.values.shape[-1] for layer in cache.layers)
    assert cost.cached_floats == cached


@pytest.mark.parametrize("key_blocks", [1, 2])
def test_parameters_are_those_of_a_coded_model(measured, key_blocks) -> None:
    source = measured[0]
    config = source.family.attention_sizes(source.model.config)
    model = convert_coded(source.model, key_blocks=key_blocks, kv_ratio=0.5)
    matrices = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if "self_attn" in name and not name.endswith(("bias", "offset"))
    )
    plan = Plan(model.config.layer_shapes, 2, 8)
    assert plan_cost(plan, config, context=100).parameters == matrices
    per_token = [plan_cost(plan, config, context=n).decode_flops for n in (100, 101)]
    rebuilding = sum(2 * 2 * 8 * shape.width_k // key_blocks for shape in plan.layers)
    mixed = sum(shape.width_v + 1 + shape.width_k + 1 for shape in plan.layers)
    heads = config["num_attention_heads"]
    expected = rebuilding + 2 * heads * (8 * len(plan.layers) + mixed)
    assert per_token[1] - per_token[0] == expected


def test_source_parameters(measured) -> None:
    source = measured[0]
    config = source.family.attention_sizes(source.model.config)
    matrices = sum(p.numel() for n, p in source.model.named_parameters() if "self_attn" in n)
    assert source_cost(config, context=10).parameters == matrices


def test_arithmetic_of_decoding_grows_by_the_widths_that_a_token_reads(measured) -> None:
    source = measured[0]
    config = source.family.attention_sizes(source.model.config)
    plan = plan_widths([(6, 4)] * config["num_hidden_layers"], config)
    per_token = [plan_cost(plan, config, context=n).decode_flops for n in (100, 101)]
    expected = config["num_hidden_layers"] * 2 * config["num_attention_heads"] * (6 + 4)
    assert per_token[1] - per_token[0] == expected


def test_latent_keys_are_rebuilt_for_every_cached_token(measured) -> None:
    source = measured[0]
    config = source.family.attention_sizes(source.model.config)
    groups, head_dim = config["num_key_value_heads"], config["head_dim"]
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    plan = plan_widths([(6, 4)] * layers, config, key_cache="latent")
    per_token = [plan_cost(plan, config, context=n).decode_flops for n in (100, 101)]
    expected = 2 * layers * (heads * (head_dim + 4) + groups * head_dim * 6)
    assert per_token[1] - per_token[0] == expected
    source_bytes = layers * 2 * groups * head_dim * 2
    rebuilding = 2 * layers * groups * head_dim * 6
    assert rebuilding_per_byte(plan) == rebuilding / source_bytes
    assert rebuilding_per_byte(plan_widths([(6, 4)] * layers, config)) == 0


def test_largest_context() -> None:
    assert largest_context(memory=1000, weight_bytes=400, kv_bytes=3, batch=2) == 100
    assert largest_context(memory=100, weight_bytes=400, kv_bytes=3, batch=2) == 0


# ------------------------------------------------------------------------------- file


def sizes(layers: int = 3) -> dict[str, int]:
    return {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_hidden_layers": layers,
        "key_norm": False,
    }


@pytest.mark.parametrize("key_cache", ["rotated", "latent"])
def test_a_plan_survives_its_file(tmp_path, key_cache) -> None:
    plan = plan_widths([(4, 16), (16, 3), (8, 8)], sizes(), key_cache=key_cache)
    path = tmp_path / "plan.yaml"
    path.write_text(plan_to_yaml(plan, {"id": "tiny"}))
    assert load_plan(path, sizes()) == plan
    assert yaml.safe_load(path.read_text())["form"] == "static"  # one value for all layers


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 4}, "is for a model with head_dim 4, not 8"),
        ({"width_k": [4, 4]}, "width_k has 2 entries for 3 layers; is the plan for another"),
        ({"width_v": "wide"}, "width_v holds something that is no int"),
        ({"width_k": 5}, "layer 0: width_k must be even"),
        ({"width_v": [8, 8, 17]}, "layer 2: widths above the source's 16"),
        ({"form": "round"}, "layer 0: form must be one of"),
    ],
)
def test_bad_plans_are_told_apart(tmp_path, change, message) -> None:
    values = yaml.safe_load(plan_to_yaml(plan_widths([(8, 8)] * 3, sizes()), {}))
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(values | change))
    with pytest.raises(UserError, match=message):
        load_plan(path, sizes())


@pytest.mark.parametrize("text", ["", "just text", "form: static", "a: [", "\x00"])
def test_files_that_are_no_plan(tmp_path, text) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"plan\.yaml is not a plan.*: make one with"):
        load_plan(path, sizes())


def test_no_file_at_all(tmp_path) -> None:
    with pytest.raises(UserError, match=r"no plan at .*nowhere\.yaml: make one"):
        load_plan(tmp_path / "nowhere.yaml", sizes())
    with pytest.raises(UserError, match=r"cannot read the plan .*: Is a directory"):
        load_plan(tmp_path, sizes())


# ------------------------------------------------------------------------------- command


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("a plan needs some text to measure on\n" * 200)
    return path


def planned(source: Path, text: Path, *options: object):
    """A plan of plain numbers; for those of codes see `test_coded_commands`."""
    short = ("--calibration", text, "--calibration-blocks", 8, "--block-length", 32)
    return tpa_convert("plan", source, *short, "--cache-bits", 16, "--multiple-of", 2, *options)


def test_the_command_writes_a_plan_that_convert_takes(tmp_path, text) -> None:
    source = save_source(tmp_path / "source")
    plan, chart, report = (tmp_path / name for name in ("p.yaml", "p.svg", "p.json"))
    options = ("--out", plan, "--chart", chart, "--json", report, "--memory", 0.001)
    result = planned(source, text, "--kv-ratio", 0.5, *options)
    assert result.exit_code == 0, result.output
    assert "context" in result.stdout
    assert chart.read_text().lstrip().startswith("<?xml")
    values = json.loads(report.read_text())
    best = values["candidates"][values["chosen"]]
    rivals = [c for c in values["candidates"] if c["budget"] == best["budget"]]
    assert {(c["form"], c["split"]) for c in rivals} == {
        ("static", "uniform"),
        ("static", "halfway"),
        ("static", "measured"),
        ("affine", "uniform"),
        ("linear", "uniform"),
    }
    assert best["kl"] == min(c["kl"] for c in rivals)

    out = tmp_path / "out"
    short = ("--calibration", text, "--block-length", 32)
    converted = tpa_convert("convert", source, "--plan", plan, *short, "--out", out)
    assert converted.exit_code == 0, converted.output
    config = json.loads((out / "config.json").read_text())
    for name in ("width_k", "width_v"):
        assert [layer[name] for layer in config["tpa_layers"]] == [
            layer[name] for layer in best["layers"]
        ]


def test_the_fastest_is_taken_where_speed_is_asked_for(tmp_path, text) -> None:
    source = save_source(tmp_path / "source")
    report = tmp_path / "p.json"
    context = ("--context", 1_000_000, "--batch-size", 8)
    options = ("--kv-ratio", 0.25, *context, "--json", report)
    result = planned(source, text, *options, "--objective", "speed")
    assert result.exit_code == 0, result.output
    assert "plans that decode fastest" in result.stdout
    values = json.loads(report.read_text())
    assert values["rates"]["name"] == "an H100"
    best = values["candidates"][values["chosen"]]
    rivals = [c for c in values["candidates"] if c["budget"] == best["budget"]]
    least = min(c["decode_seconds"] for c in rivals)
    assert best["decode_seconds"] <= 1.01 * least <= 0.3 * values["source_decode_seconds"]
    assert "coded" not in {c["split"] for c in values["candidates"]}
    refused = planned(source, text, "--kv-ratio", 0.25, "--cache-bits", 2, "--objective", "speed")
    assert refused.exit_code == 1
    assert "speed" in refused.stderr


def test_candidates_are_refined_if_the_model_will_be(tmp_path, text) -> None:
    source = save_source(tmp_path / "source")
    reports = [tmp_path / "plain.json", tmp_path / "refined.json"]
    options = ("--kv-ratio", 0.5, "--json")
    assert planned(source, text, *options, reports[0]).exit_code == 0
    result = planned(source, text, *options, reports[1], "--refine", "--refine-steps", 8)
    assert result.exit_code == 0, result.output
    assert "after refinement" in result.stdout
    plain, refined = (json.loads(path.read_text())["candidates"] for path in reports)
    better = [r["kl"] < p["kl"] for p, r in zip(plain, refined, strict=True)]
    assert sum(better) > 0.8 * len(better)
    assert [c["predicted_kl"] for c in plain] == [c["predicted_kl"] for c in refined]


def test_latent_keys_are_planned_and_converted(tmp_path, text) -> None:
    source = save_source(tmp_path / "source")
    plan, report = tmp_path / "plan.yaml", tmp_path / "plan.json"
    options = ("--kv-ratio", 0.5, "--key-cache", "latent", "--out", plan, "--json", report)
    result = planned(source, text, *options)
    assert result.exit_code == 0, result.output
    for candidate in json.loads(report.read_text())["candidates"]:
        assert {layer["key_cache"] for layer in candidate["layers"]} == {"latent"}
        assert {layer["form"] for layer in candidate["layers"]} == {"static"}
    short = ("--calibration", text, "--calibration-blocks", 2, "--block-length", 32)
    converted = tpa_convert("convert", source, "--plan", plan, *short, "--out", tmp_path / "small")
    assert converted.exit_code == 0, converted.output
    assert "latent key width" in converted.stdout
    assert "Every step rebuilds the keys" in converted.stdout
    assert "Every step rebuilds the keys" in result.stdout


def test_the_same_command_makes_the_same_plan(tmp_path, text) -> None:
    source = save_source(tmp_path / "source")
    paths = [tmp_path / "a.yaml", tmp_path / "b.yaml"]
    for path in paths:
        assert planned(source, text, "--kv-ratio", 0.5, "--out", path).exit_code == 0
    assert paths[0].read_text() == paths[1].read_text()


def test_without_a_budget_the_smallest_cache_within_the_accepted_loss(tmp_path, text) -> None:
    source = save_source(tmp_path / "source")
    report = tmp_path / "p.json"
    result = planned(source, text, "--max-increase", 10, "--json", report)
    assert result.exit_code == 0, result.output
    values = json.loads(report.read_text())
    chosen = values["candidates"][values["chosen"]]
    assert chosen["kv_floats"] == min(c["kv_floats"] for c in values["candidates"])
    refused = planned(source, text, "--max-increase", 1e-9)
    assert "allow more with --max-increase" in last_line(refused)


def last_line(result) -> str:
    assert result.exit_code == 1, result.output
    return result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--kv-floats", 8, "--kv-ratio", 0.5), "at most one of --kv-floats"),
        (("--kv-floats", 1), "too small"),
        (("--kv-floats", 15), "multiples of 8 need a budget of at least 16"),
        (("--multiple-of", 16), "multiples of 16 need a budget of at least 32"),
        (("--multiple-of", 6), "widths cannot be multiples of 6"),
        (("--chart", "plan.gif"), "--chart: a picture ends in .png, .svg, .pdf"),
        (("--calibration-blocks", 1), "--calibration-blocks of at least 2"),
        (("--moments", "missing.st", "--save-moments", "other.st"), "leave out --save-moments"),
    ],
)
def test_bad_options(tmp_path, options, message) -> None:
    source = save_source(tmp_path / "source")
    assert message in error_of(tpa_convert("plan", source, "--cache-bits", 16, *options))


@pytest.mark.parametrize(
    ("options", "budgets", "forms"),
    [
        # the affine and the linear form need 14 numbers here
        (("--kv-floats", 13), [8, 32 / 3, 13, 16, 64 / 3, 24], {"static"}),
        (("--kv-floats", 14), [8, 32 / 3, 14, 16, 64 / 3, 24], {"static", "affine", "linear"}),
        # two multiples of 8 do not fit the lower budgets of the curve
        (
            ("--kv-floats", 20, "--multiple-of", 8),
            [16, 20, 64 / 3, 24],
            {"static", "affine", "linear"},
        ),
        (("--max-increase", 1000, "--multiple-of", 8), [16, 64 / 3, 24], {"static"}),
    ],
)
def test_what_nobody_asked_for_is_left_out_where_it_does_not_fit(
    tmp_path, text, options, budgets, forms
) -> None:
    report = tmp_path / "p.json"
    result = planned(save_source(tmp_path / "source"), text, *options, "--json", report)
    assert result.exit_code == 0, result.output
    candidates = json.loads(report.read_text())["candidates"]
    assert sorted({c["budget"] for c in candidates}) == pytest.approx(budgets)
    assert {c["form"] for c in candidates} == forms


def test_the_context_counts_the_weights_of_the_converted_model(tmp_path, text) -> None:
    """An absorbed gauge makes the projections grow, by more than the narrower factors save."""
    source, report = save_source(tmp_path / "source"), tmp_path / "p.json"
    memory = 1_000_000
    options = ("--gauge", "absorbed", "--memory", memory / 1e9, "--json", report)
    result = planned(source, text, "--kv-ratio", 0.75, *options)
    assert result.exit_code == 0, result.output
    values = json.loads(report.read_text())
    best = values["candidates"][values["chosen"]]
    assert best["cost"]["parameters"] > values["source_cost"]["parameters"]

    plan, out = tmp_path / "plan.yaml", tmp_path / "out"
    layers = [LayerShape(**layer) for layer in best["layers"]]
    plan.write_text(plan_to_yaml(Plan(layers, 2, 8), {}))
    short = ("--calibration", text, "--block-length", 32)
    assert tpa_convert("convert", source, "--plan", plan, *short, "--out", out).exit_code == 0
    model = AutoModelForCausalLM.from_pretrained(out)
    biases = sum(p.numel() for n, p in model.named_parameters() if n.endswith("bias"))
    weight_bytes = 4 * (model.num_parameters() - biases)
    assert best["context"] == (memory - weight_bytes) // best["kv_bytes"]


def test_moments_of_another_source_are_refused_before_anything_is_measured(
    tmp_path, text, monkeypatch
) -> None:
    moments = tmp_path / "moments.safetensors"
    first = planned(save_source(tmp_path / "first"), text, "--save-moments", moments)
    assert moments.is_file(), first.output
    monkeypatch.setattr(
        "tpa_convert.planning.search.measure_sensitivity", None
    )  # must not be called
    other = save_source(tmp_path / "other", seed=1)
    message = error_of(planned(other, text, "--moments", moments))
    assert message == (
        "error: the moments file was made from another source: calibrate again with --save-moments"
    )


def test_results_are_saved_before_they_are_shown(tmp_path, text, monkeypatch) -> None:
    source = save_source(tmp_path / "source")
    plan, chart, report = files = [tmp_path / name for name in ("p.yaml", "p.svg", "p.json")]
    options = ("--kv-ratio", 0.5, "--out", plan, "--chart", chart, "--json", report)

    def fail(*_: object, **__: object) -> None:
        raise BrokenPipeError

    with monkeypatch.context() as patch:
        patch.setattr("tpa_convert.cli.commands.show_planning", fail)
        assert planned(source, text, *options).exit_code == 1
    assert all(path.is_file() for path in files)
    for path in files:
        path.unlink()
    monkeypatch.setattr("tpa_convert.reporting.charts.planning_chart", fail)
    assert planned(source, text, *options).exit_code == 1
    assert [path.is_file() for path in files] == [True, False, True]


@pytest.mark.parametrize("kept", [True, False])
def test_the_next_command_makes_what_was_planned(tmp_path, text, monkeypatch, kept: bool) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    source, plan = save_source(tmp_path / "a source"), tmp_path / "p.yaml"
    moments = tmp_path / "m.safetensors"
    options = ("--out", plan, "--gauge", "applied", "--seed", 3)
    result = planned(source, text, *options, *(("--save-moments", moments) if kept else ()))
    last = result.stdout.splitlines()[-1].strip()
    measured = ["--calibration", text, "--calibration-blocks", 8, "--block-length", 32, "--seed", 3]
    expected = [
        *("tpa-convert", "convert", source, *(("--moments", moments) if kept else measured)),
        *("--gauge", "applied", "--plan", plan, "--out", "small"),
    ]
    assert shlex.split(last) == [str(word) for word in expected]
    monkeypatch.chdir(tmp_path)
    if kept:  # nothing is measured again
        monkeypatch.setattr("tpa_convert.pipeline.calibration.collect_moments", None)
    made = tpa_convert(*shlex.split(last)[1:])
    assert made.exit_code == 0, made.output


def test_a_plan_is_not_overwritten(tmp_path, text) -> None:
    source = save_source(tmp_path / "source")
    plan = tmp_path / "plan.yaml"
    plan.write_text("mine")
    assert "exists" in error_of(planned(source, text, "--out", plan))
    assert plan.read_text() == "mine"


def test_a_plan_and_another_budget_exclude_each_other(tmp_path) -> None:
    source = save_source(tmp_path / "source")
    command = ("convert", source, "--plan", "plan.yaml", "--dry-run")
    assert "exactly one budget" in error_of(tpa_convert(*command, "--kv-floats", 8))
    assert "leave out --form" in error_of(tpa_convert(*command, "--form", "affine"))
    assert "leave out --key-cache" in error_of(tpa_convert(*command, "--key-cache", "latent"))
    latent = ("convert", source, "--kv-floats", 8, "--dry-run", "--key-cache", "latent")
    for wrong in (("--form", "affine"), ("--method", "svd")):
        assert "leave out --form and --method" in error_of(tpa_convert(*latent, *wrong))
    assert "--plan: no such file: plan.yaml" in error_of(tpa_convert(*command))


def test_agreement_of_the_exact_plan(measured) -> None:
    """Full widths: nothing lost, in the prediction as in the model."""
    source, moments, blocks, sensitivity = measured
    config = source.family.attention_sizes(source.model.config)
    plan = plan_measured(sensitivity, config, 32, multiple_of=2)
    assert predicted_loss(plan, sensitivity) == 0
    model = convert_model(source, plan, moments)
    # In fp64: rounding in fp32 alone amounts to more on some processors.
    exact, converted = copy.deepcopy(source.model).double(), model.double()
    assert agreement(exact, converted, blocks).kl < 1e-9


def test_an_uneven_plan_is_shown_as_a_table(capsys) -> None:
    def layer(width_k: int, width_v: int, gauge: Gauge = "absorbed") -> LayerShape:
        return LayerShape("static", "applied", gauge, 1, 1, width_k, width_v, "latent")

    show_layers([layer(8, 16)] * 12)
    assert " ".join(capsys.readouterr().out.split()) == (
        "layers 0-11: static head factors, gauge absorbed; latent key width 8, value width 16"
    )
    show_layers([layer(8, 16), *[layer(24, 16, "applied")] * 2, layer(8, 16), *[layer(4, 4)] * 7])
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[:3] == [
        ["layer", *map(str, range(10))],
        ["latent", "key", "width", "8", "24", "24", "8", *"444444"],
        ["value", "width", "16", "16", "16", "16", *"444444"],
    ]
    assert lines[3] == ["layer", "10"]
    assert " ".join(lines[-2]) == "layers 0, 3-10: static head factors, gauge absorbed"
    assert " ".join(lines[-1]) == "layers 1-2: static head factors, gauge applied"


def test_a_plan_of_two_forms_shows_the_ranks_it_knows(capsys) -> None:
    show_layers(
        [
            LayerShape("static", "applied", "absorbed", 1, 1, 8, 16, "latent"),
            LayerShape("affine", "absorbed", "absorbed", 2, 4, 24, 16),
        ]
    )
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[:5] == [
        "layer 0 1",
        "key width 8 24",
        "value width 16 16",
        "key rank – 2",
        "value rank – 4",
    ]
    assert lines[-2:] == [
        "layer 0: static head factors, gauge absorbed, latent keys",
        "layer 1: affine head factors, gauge absorbed, rotated keys",
    ]
