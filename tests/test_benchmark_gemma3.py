"""The benchmark of Gemma 3, on a tiny one whose windows are shorter than the text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.benchmarks import benchmark, figures, record_rows, run_main
from tests.command_line import save_text
from tests.conftest import make_tiny_tokenizer
from tests.conversions import convert_tiny, random_blocks
from tests.tiny_models import GEMMA_LAYERS, MODELS, WINDOW
from tpa_convert.calibration.moments import collect_moments
from tpa_convert.conversion.model import convert_model
from tpa_convert.refinement.least_squares import refit


def test_logits_differ_by_what_they_differ() -> None:
    source, other = MODELS["gemma3"](seed=1), MODELS["gemma3"](seed=2)
    blocks = random_blocks(count=3, length=20)
    with torch.no_grad():
        one, expected = other(blocks).logits, source(blocks).logits
    found = benchmark("gemma3").logit_difference(other, source, blocks)
    assert found.largest == pytest.approx((one - expected).abs().max().item(), rel=1e-4)
    assert found.scale == pytest.approx(expected.abs().max().item(), rel=1e-4)
    log_p = expected.double().log_softmax(-1)
    kl = (log_p.exp() * (log_p - one.double().log_softmax(-1))).sum(-1).mean()
    assert found.kl == pytest.approx(kl.item(), rel=1e-4)
    same = benchmark("gemma3").logit_difference(source, source, blocks)
    assert (same.largest, same.kl) == (0, 0)


def test_windows_cap_the_cache_that_is_measured() -> None:
    source = MODELS["gemma3"]()
    model = convert_tiny(source, width_k=6, width_v=5, gauge="applied")
    for tokens in (WINDOW // 2, 50):
        held = [
            tokens if kind == "full_attention" else min(tokens, WINDOW - 1) for kind in GEMMA_LAYERS
        ]
        for one, numbers in ((source, 2 * 2 * 8), (model, 6 + 5 + 2)):
            found = benchmark("common.tables").Table.cache_kilobytes(one, tokens)
            assert found == pytest.approx(2 * numbers * sum(held) / 1000)


def test_a_whole_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = MODELS["gemma3"](seed=3)
    model.save_pretrained(tmp_path / "source")
    make_tiny_tokenizer().save_pretrained(tmp_path / "source")
    rows = record_rows(monkeypatch)
    train, valid = (save_text(tmp_path / name) for name in ("train.txt", "valid.txt"))
    blocks = tmp_path / "valid.npz"
    size = ["--length", 64]
    run_main("tokenise", monkeypatch, tmp_path / "source", valid, blocks, *size, "--blocks", 3)
    options = ["--train", train, "--valid", blocks, *size, "--valid-blocks", 2]
    options += ["--calibration-blocks", 8, "--runs", "18", "12:latent", "--refine-steps", 1]
    options += ["--heal-tokens", 16384, "--heal-runs", "12:latent"]
    options += [
        "--settings",
        "tokens_per_step=512,batch_size=8,warmup_steps=2,attention_learning_rate=3e-3",
    ]
    run_main("gemma3", monkeypatch, tmp_path / "source", *options)
    stages = ["closed form", "refit", "refined"]
    names = [row.name for row in rows]
    assert names[:-1] == ["source", *(f"{run} {s}" for run in ("18", "12:latent") for s in stages)]
    assert names[-1].startswith("12:latent tokens_per_step=512")
    models, files = benchmark("common.models"), benchmark("common.blocks")
    source = models.load(str(tmp_path / "source"))
    held_out = files.valid_blocks(str(blocks), source, 64, 2)
    assert {part.shape for part in held_out.values()} == {(2, 64)}
    training = files.train_blocks(str(train), source, 64, 8)
    moments = collect_moments(source, training)
    found = {row.name: figures(row.model, model, {"text": training}).kl for row in rows}
    assert found["source"] < 1e-6
    for run in ("18", "12:latent"):
        plan = models.plan_of(run, source.family.attention_sizes(model.config))
        converted = convert_model(source, plan, moments)
        expected = figures(converted, model, {"text": training}).kl
        assert found[f"{run} closed form"] == pytest.approx(expected, rel=1e-3)
        refit(source.model, converted, training)
        expected = figures(converted, model, {"text": training}).kl
        assert found[f"{run} refit"] == pytest.approx(expected, rel=1e-3)
        assert len({found[f"{run} {stage}"] for stage in stages}) == 3
    assert found[names[-1]] < 0.9 * found["12:latent refined"]
    assert [row.floats for row in rows[1::3]] == [18, 12, 12]
    exact = [line.split("|") for line in capsys.readouterr().out.splitlines() if "keys |" in line]
    assert [line[1].strip() for line in exact] == ["rotated keys", "latent keys"]
    for line in exact:
        assert float(line[3].split(" of ")[0]) < 1e-4
        assert abs(float(line[4])) < 1e-6
