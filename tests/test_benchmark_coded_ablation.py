"""The ablation of the coded cache changes what it says, and nothing else."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.benchmarks import benchmark, record_rows, run_main, save_texts
from tests.command_line import save_source
from tests.conftest import make_tiny_llama
from tests.conversions import random_blocks, source_of
from tpa_convert.conversion.coded import choose_codes
from tpa_convert.errors import UserError
from tpa_convert.forward.comparison import agreement
from tpa_convert.modeling.tpa_coder import RowCoder
from tpa_convert.modeling.tpa_codes import scale_of
from tpa_convert.plans import Budget, plan_coded


@pytest.fixture(scope="module")
def bench() -> Any:
    source = source_of(make_tiny_llama("gqa", num_key_value_heads=4, seed=6))
    return benchmark("coded_ablation").Bench(source, random_blocks(count=16), 0.25)


def test_the_first_row_is_what_the_package_does(bench) -> None:
    _, plan = bench.coded()
    moments = bench.cache_moments
    coded = plan_coded(bench.sizes, Budget(kv_ratio=0.25))
    assert plan == choose_codes(coded, moments.layers, moments.num_tokens).plan


def test_every_row_keeps_no_more_bytes_and_is_another_model(bench) -> None:
    ablation = benchmark("coded_ablation")
    blocks = random_blocks(seed=3)
    same = (ablation.DEFAULT, "keys in 1 block")
    first, _ = bench.coded()
    for name, make in ablation.ROWS.items():
        if name.endswith(("affine", "form)")):  # they need more numbers than a quarter
            with pytest.raises(UserError, match="too small"):
                make(bench)
            continue
        model, plan = make(bench)
        assert plan.kv_floats <= 0.25 * 64, name
        if name.startswith("levels"):  # so small a model may have no use for what is left out
            continue
        different = agreement(first, model, blocks).kl > 1e-7
        assert different == (name not in same), name


def test_levels_are_those_that_are_given(bench) -> None:
    ablation = benchmark("coded_ablation")
    for given, share in (
        ({2, 4, 8}, partial(ablation.by_nats, levels=(0, 2, 4, 8))),
        ({2}, partial(ablation.all_alike, bits=2)),
    ):
        _, plan = bench.coded(share)
        found = {
            bits for shape in plan.layers for bits in (*shape.key_layout.bits,
                                                       *shape.value_layout.bits)
        }  # fmt: skip
        assert found <= given
    _, plan = bench.coded(ablation.layers_alike)
    assert len({shape.cached_bytes(4) for shape in plan.layers}) == 1


def test_without_scales_every_code_has_one_step(bench) -> None:
    model, _ = bench.coded(scaled=False)
    coder = next(module for module in model.modules() if isinstance(module, RowCoder))
    x = 3 * torch.randn(5, coder.layout.components) * coder.spread + coder.mean[0]
    plain = coder.forward(x)
    numbers = coder(x)[:, : coder.layout.components]
    quantiser = coder.quantiser()
    codes = numbers / quantiser.step + quantiser.reach
    torch.testing.assert_close(codes, codes.round(), atol=1e-4, rtol=0)
    assert (codes > -1e-4).all()
    assert (codes < quantiser.highest + 1e-4).all()
    assert not torch.allclose(
        plain[:, : coder.layout.components] / quantiser.step + quantiser.reach, codes
    )
    scale, _ = scale_of(torch.arange(256, dtype=torch.uint8), quantiser)
    assert len(scale.unique()) > 1  # the coder's own table is as it was


def test_a_whole_run(tmp_path: Path, monkeypatch) -> None:
    rows = record_rows(monkeypatch)
    out = tmp_path / "ablation.json"
    options = ["--calibration-blocks", 2, "--refit-blocks", 2, "--share", 50, "--refit"]
    options += ["--only", "sinks|linear", "--json", out]
    path = save_source(tmp_path / "source")
    run_main("coded_ablation", monkeypatch, path, *save_texts(tmp_path), *options)
    names = ["default", "no class of sinks", "16 bits, linear (the paper's form)"]
    both = [name for each in names for name in (each, f"{each}; refit")]
    assert [row.name for row in rows] == ["source", *both]
    results = benchmark("common.results")
    assert [row[0] for row in results.load(out).rows] == ["source", *both]
    paired = results.load(results.beside(out)).rows
    assert [row[0] for row in paired] == both[2:]
    kl = {row[0]: row[-3] for row in results.load(out).rows}
    for name, _, above in paired:
        stage = "; refit" if "refit" in name else ""
        assert float(above.split()[0]) == pytest.approx(
            kl[name] - kl[f"default{stage}"], rel=0.6, abs=1e-6
        )
