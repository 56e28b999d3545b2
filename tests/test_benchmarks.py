"""What the benchmark scripts share, and the figures of whole runs against independent ones."""

from __future__ import annotations

import json
import warnings
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.benchmarks import MeasuredRow, benchmark, figures, record_rows, run_main, save_texts
from tests.command_line import save_source
from tests.conftest import make_tiny_llama
from tests.conversions import source_of
from tpa_convert.calibration.moments import collect_moments
from tpa_convert.conversion.model import convert_model
from tpa_convert.decomposition import METHODS
from tpa_convert.evaluation import blocks_by_source
from tpa_convert.healing.training.sampling import sample_blocks
from tpa_convert.planning.search import plan_between, plan_measured
from tpa_convert.planning.sensitivity import measure_sensitivity
from tpa_convert.plans import Budget, plan_to_yaml, plan_uniform, plan_widths
from tpa_convert.sources import Source
from tpa_convert.text.read import load_documents


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_source(tmp_path_factory.mktemp("benchmarks") / "source")


@pytest.fixture(scope="module")
def source(model: Path) -> Source:
    return benchmark("common.models").load(str(model))


@pytest.fixture(scope="module")
def config(source: Source) -> dict[str, Any]:
    return source.family.attention_sizes(source.model.config)


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    return save_texts(tmp_path)


def check_row(row: MeasuredRow, source: Source, valid: str) -> float:
    """Compares ratio and floats of a row with the model that it is about; returns its KL."""
    blocks = blocks_by_source(source.tokenizer, load_documents(valid), 1024, 1)
    found, reference = (figures(m, source.model, blocks) for m in (row.model, source.model))
    ratios = [found.perplexities[name] / reference.perplexities[name] for name in blocks]
    assert row.ratio == pytest.approx(prod(ratios) ** (1 / len(ratios)), rel=1e-4)
    cached = getattr(row.model.config, "cached_floats", [2 * 2 * 8] * 2)
    assert row.floats == sum(cached) / len(cached)
    return found.kl


# ------------------------------------------------------------------------------- what is shared


def test_settings_are_keyword_arguments() -> None:
    given = benchmark("common.arguments").given_settings
    assert given("") == {}
    assert given('steps=300,learning_rate=1e-4,bf16=false,trainable="lora"') == {
        "steps": 300,
        "learning_rate": 1e-4,
        "bf16": False,
        "trainable": "lora",
    }


def test_a_row_has_the_figures_of_whole_logits(random_tokens, capsys) -> None:
    """Texts of different sizes: perplexities count by text, KL and agreement by token."""
    model, other = make_tiny_llama(seed=1), make_tiny_llama(seed=2)
    blocks = {"one": random_tokens(2, 16, seed=1), "two": random_tokens(5, 16, seed=2)}
    table = benchmark("common.tables").Table(source_of(model), blocks)
    assert table.row("source", model, 32, 0.0) == pytest.approx(1)
    ratio = table.row("other", other, 12.4, 3.14)
    found, reference = (figures(m, model, blocks) for m in (other, model))
    ratios = [found.perplexities[name] / reference.perplexities[name] for name in blocks]
    assert ratio == pytest.approx((ratios[0] * ratios[1]) ** 0.5, rel=1e-4)
    numbers = [f"{p:.2f}" for p in found.perplexities.values()]
    numbers += [f"{ratio:.3f}", f"{found.kl:.3f}", f"{100 * found.top1:.1f}", "3.1"]
    assert capsys.readouterr().out.splitlines()[1] == f"| other | 12 | {' | '.join(numbers)} |"


def test_a_run_names_a_plan(source, config, random_tokens, tmp_path, monkeypatch) -> None:
    models = benchmark("common.models")
    plan_of, tokens = models.plan_of, random_tokens(4, 32, vocab_size=99)
    assert plan_of("16", config) == plan_uniform(config, Budget(kv_floats=16))
    widths = Budget(width_k=8, width_v=6)
    latent = {"gauge": "applied", "key_cache": "latent"}
    assert plan_of("8+6", config) == plan_uniform(config, widths)
    assert plan_of("8+6:latent:applied", config) == plan_uniform(config, widths, **latent)
    affine = plan_uniform(config, Budget(kv_floats=24), form="affine")
    assert plan_of("24:affine", config) == affine

    monkeypatch.setattr(models, "MULTIPLE_OF", 2)
    sensitivity = measure_sensitivity(source, collect_moments(source, tokens), tokens)
    measured = plan_measured(sensitivity, config, 16, 2)
    uniform = plan_uniform(config, Budget(kv_floats=16))
    assert measured != uniform
    assert plan_of("16:measured:applied", config, sensitivity) == measured.with_gauge("applied")
    halfway = plan_between(uniform, measured, config)
    assert plan_of("16:halfway", config, sensitivity) == halfway.with_gauge("auto")

    path = tmp_path / "plan.yaml"
    uneven = plan_widths([(8, 12), (12, 8)], config, key_cache="latent")
    path.write_text(plan_to_yaml(uneven, {}))
    assert plan_of(str(path), config) == uneven
    assert plan_of(f"{path}:applied", config) == uneven.with_gauge("applied")


def test_token_files_are_joined_and_shuffled(source, tmp_path) -> None:
    numbers = np.arange(60, dtype=np.uint16)
    paths = [tmp_path / "a.npy", tmp_path / "b.npy"]
    np.save(paths[0], numbers[:20].reshape(2, 10))
    np.save(paths[1], numbers[20:].reshape(4, 10))
    train_blocks, both = benchmark("common.blocks").train_blocks, ",".join(map(str, paths))
    blocks = train_blocks(both, source, 5)
    assert blocks.dtype == torch.int64
    assert sorted(blocks.tolist()) == numbers.reshape(-1, 5).tolist()
    assert blocks.tolist() != numbers.reshape(-1, 5).tolist()
    assert torch.equal(train_blocks(both, source, 5, 7), blocks[:7])


def test_tokenising_keeps_what_a_pattern_leaves(model, tmp_path, monkeypatch, capsys) -> None:
    text = tmp_path / "text.jsonl"
    documents = ["p" * 9, "q" * 9, "p" * 4 + "r" * 5, "r" * 9]
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    tokenizer = benchmark("common.models").load(str(model)).tokenizer
    for options, kept in (
        ([], {"p", "q", "r"}),
        (["--only", "q|r"], {"p", "q", "r"}),
        (["--without", "p"], {"q", "r"}),
        (["--only", "r", "--without", "p"], {"r"}),
    ):
        run_main(
            "tokenise", monkeypatch, model, text, tmp_path / "out.npy", "--length", 10, *options
        )
        blocks = np.load(tmp_path / "out.npy")
        assert set(tokenizer.decode(blocks.flatten(), skip_special_tokens=True)) == kept
        assert f"{len(blocks)} of 4 documents, {blocks.size} tokens" in capsys.readouterr().out


def test_rows_of_the_one_shot_table_fit_the_model() -> None:
    """SmolLM2's shape; every row caches what its budget says."""
    config = make_tiny_llama(
        hidden_size=576, num_attention_heads=9, num_key_value_heads=3, head_dim=64
    ).config
    fields = source_of(make_tiny_llama()).family.attention_sizes(config)
    rows = benchmark("one_shot_smollm2").ROWS
    assert {budget.get("kv_floats") for _, budget, _ in rows} == {256, 192, 128, None}
    for _, budget, settings in rows:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            plan = plan_uniform(
                fields,
                Budget(**budget),
                form=settings.get("form", "static"),
                whole_heads=METHODS[settings.get("method", "gauge")].whole_heads,
            )
        # at full rank, with a head factor for each of 3 heads and 3 ranks
        assert plan.kv_floats == budget.get("kv_floats", 2 * 3 * (64 + 3))


def test_sampled_text_is_saved(model, source, tmp_path, monkeypatch, capsys) -> None:
    out = tmp_path / "sampled.npy"
    options = ["--tokens", 40, "--length", 16, "--seed", 3]
    run_main("sample_smollm2", monkeypatch, model, out, *options)
    same = make_tiny_llama().to(torch.bfloat16)
    expected = sample_blocks(same, source.tokenizer, 40, 16, seed=3)
    assert np.load(out).tolist() == expected.tolist()
    assert len(expected.unique()) > 10
    assert f"48 tokens in {out}" in capsys.readouterr().out


# ------------------------------------------------------------------------------- the ablation


def test_verdicts() -> None:
    verdict = benchmark("ablation_smollm2").verdict
    assert verdict([1.1, 1.3], [1.2, 1.4]) == "keep"
    assert verdict([1.3, 1.5], [1.2, 1.4]) == "drop"
    assert verdict([1.2, 1.4], [1.2, 1.4]) == "drop"  # no gain is no reason
    assert verdict([1.1, 1.5], [1.2, 1.4]) == "mixed"


def test_the_summary_shows_gains_on_the_reference(capsys) -> None:
    summary = {"plain": [(1.25, 3.0), (2.0, 1.0)], "+ trick": [(1.0, 7.4), (1.9, 0.2)]}
    benchmark("ablation_smollm2").show(summary, "plain", [24, 16])
    assert capsys.readouterr().out.splitlines() == [
        "",
        "| | 24 | 16 | gain % | seconds | verdict |",
        "|---|---|---|---|---|---|",
        "| plain | 1.250 | 2.000 | +0.0 / +0.0 | 3 |  |",
        "| + trick | 1.000 | 1.900 | +20.0 / +5.0 | 7 | keep |",
        "",
    ]


def test_every_row_is_made_at_every_budget() -> None:
    ablation, made = benchmark("ablation_smollm2"), []

    class Table:
        def row(self, name: str, model: Any, floats: float, seconds: float) -> float:
            made.append((name, model, floats))
            return 10 * floats + len(made)

    bench = SimpleNamespace()
    rows = {name: ((lambda b, n, name=name: (name, n)), None) for name in ("first", "second")}
    summary = ablation.run(Table(), bench, rows, [24, 16])
    assert made == [
        ("first", ("first", 24), 24),
        ("second", ("second", 24), 24),
        ("first", ("first", 16), 16),
        ("second", ("second", 16), 16),
    ]
    assert {name: [ratio for ratio, _ in cells] for name, cells in summary.items()} == {
        "first": [241, 163],
        "second": [242, 164],
    }


def test_a_share_of_the_budget_goes_to_the_keys() -> None:
    ablation = benchmark("ablation_smollm2")
    shape = {"hidden_size": 64, "num_key_value_heads": 4, "head_dim": 8}
    tiny = make_tiny_llama("mha", **shape | {"num_attention_heads": 4})
    bench = ablation.Bench(
        None, source_of(tiny).family.attention_sizes(tiny.config), None, None, [], []
    )
    plan = bench.split(40, 5 / 8)
    assert [(layer.width_k, layer.width_v) for layer in plan.layers] == [(24, 16)] * 2
    assert bench.uniform(40).kv_floats == 40


# ------------------------------------------------------------------------------- whole runs


def logits(model: Any, blocks: Tensor) -> Tensor:
    with torch.no_grad():
        return model(blocks).logits


def test_refinement(model, source, config, texts, monkeypatch) -> None:
    """The closed form is the package's; refining it brings its predictions nearer."""
    rows, tables = record_rows(monkeypatch), {}
    script, plan_of = benchmark("refine_smollm2"), benchmark("common.models").plan_of
    monkeypatch.setattr(script, "task_table", lambda *arguments: tables.update(tasks=arguments))
    monkeypatch.setattr(script, "position_table", lambda *arguments: tables.update(at=arguments))
    options = ["--runs", "16:applied", "12:latent", "--settings", "steps=8", "steps=1"]
    options += ["--refine-blocks", "2", "--tasks", "quiz.jsonl", "--positions"]
    run_main("refine_smollm2", monkeypatch, model, *texts, *options)
    kinds = ("closed form", "refined steps=8", "refined steps=1")
    runs = ("16:applied", "12:latent")
    assert [row.name for row in rows] == ["source", *(f"{r} {k}" for r in runs for k in kinds)]
    kl = {row.name: check_row(row, source, texts[3]) for row in rows}
    assert kl["source"] < 1e-6

    blocks = benchmark("common.blocks").train_blocks(texts[1], source, 1024, 2)
    moments = collect_moments(source, blocks)
    expected = logits(source.model, blocks)
    models = {row.name: row.model for row in rows}
    for run in runs:
        closed, long, short = (logits(models[f"{run} {kind}"], blocks) for kind in kinds)
        converted = convert_model(source, plan_of(run, config), moments)
        torch.testing.assert_close(closed, logits(converted, blocks), atol=1e-4, rtol=1e-4)
        errors = [(found - expected).square().mean() for found in (long, short, closed)]
        assert errors[0] < errors[1] <= errors[2]

    # What the other tables compare is the model of the last setting.
    compared, tokenizer, files = tables["tasks"]
    assert list(compared) == ["source", *(f"{run} refined" for run in runs)]
    for run in runs:
        last = logits(models[f"{run} refined steps=1"], blocks)
        assert torch.equal(logits(compared[f"{run} refined"], blocks), last)
    assert files == ["quiz.jsonl"]
    assert tokenizer.get_vocab() == source.tokenizer.get_vocab()
    assert tables["at"][0] is compared
    assert {name: part.shape for name, part in tables["at"][1].items()} == {
        "titles": (1, 8192),
        "long": (1, 8192),
    }


def test_a_shortened_source() -> None:
    source = source_of(make_tiny_llama(num_hidden_layers=3))
    tokens = torch.arange(3, 40)[None]
    states = source.model(tokens, output_hidden_states=True).hidden_states
    benchmark("refine_smollm2").shorten(source, 2)
    shortened = source.model(tokens).logits
    expected = source.model.lm_head(source.model.model.norm(states[2]))
    torch.testing.assert_close(shortened, expected, atol=1e-5, rtol=1e-5)


def test_healing(model, source, texts, monkeypatch, tmp_path) -> None:
    """Healed models are nearer than the refined ones, which another run takes from their folder."""
    rows, kept = record_rows(monkeypatch), tmp_path / "refined"
    script = benchmark("heal_smollm2")
    changes = "tokens_per_step=512,batch_size=8,warmup_steps=2,attention_learning_rate=1e-2"
    settings = [f"seed={seed},{changes}" for seed in (0, 1)]
    options = ["--runs", "12:latent", "--refine-blocks", "4", "--refine-steps", "2"]
    options += ["--length", "64", "--heal-tokens", "10240", "--refined", str(kept)]
    arguments = [model, *texts, *options, "--settings"]
    run_main("heal_smollm2", monkeypatch, *arguments, *settings)
    healed = [f"12:latent {setting} healed on 0.01024 M" for setting in settings]
    assert [row.name for row in rows] == ["source", "12:latent refined", *healed]
    kl = [check_row(row, source, texts[3]) for row in rows]
    assert kl[0] < 1e-6
    assert max(kl[2:]) < kl[1]
    assert kl[2] != kl[3]  # another seed, another order of the text
    training = {"training": benchmark("common.blocks").train_blocks(texts[1], source, 64)}
    start, *ends = (figures(row.model, source.model, training).kl for row in rows[1:])
    assert max(ends) < 0.8 * start

    first = dict(rows[-1].model.named_parameters())
    rows.clear()
    monkeypatch.setattr(script, "Conversions", lambda *_: None)  # must not be called
    run_main("heal_smollm2", monkeypatch, *arguments, settings[1])
    assert [row.name for row in rows] == ["source", healed[1]]
    for name, parameter in rows[-1].model.named_parameters():
        torch.testing.assert_close(parameter, first[name], rtol=1e-4, atol=1e-6)
    assert [path.name for path in kept.iterdir()] == ["12-latent-2"]
