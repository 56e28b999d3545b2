"""The commands, with a cache that is coded in bits: a plan through all of them, and refusals."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.command_line import error_of, save_source, save_text, tpa_convert
from tpa_convert.planning.coded import BITS

SHORT = ["--calibration-blocks", 4, "--block-length", 32]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a source, a text, and a coded plan with its report."""
    folder = tmp_path_factory.mktemp("commands")
    save_source(folder / "source")
    save_text(folder / "text.txt")
    options = ["--out", folder / "plan.yaml", "--json", folder / "plan.json", "--key-blocks", 2]
    options += ["--chart", folder / "plan.svg", "--save-moments", folder / "moments"]
    result = tpa_convert(
        "plan", folder / "source", "--kv-ratio", 0.25, "--memory", 0.001, *SHORT, *options
    )
    assert result.exit_code == 0, result.output
    (folder / "plan.txt").write_text(result.stdout)
    return folder


def test_a_dry_run_says_what_is_known_of_the_codes(folder, tmp_path) -> None:
    """All of a plan's; of a budget's, what they will be chosen by, and parameters roughly."""
    results = tmp_path / "results.json"

    def dry_run(*arguments) -> tuple[dict, str]:
        command = ("convert", folder / "source", *arguments, "--dry-run")
        result = tpa_convert(*command, "--json", results, "--overwrite")
        assert result.exit_code == 0, result.output
        return json.loads(results.read_text()), result.stdout

    values = json.loads((folder / "plan.json").read_text())
    planned, shown = dry_run("--plan", folder / "plan.yaml")
    assert planned["layers"] == values["candidates"][values["chosen"]]["layers"]
    assert all(layer["key_codes"] and layer["value_codes"] for layer in planned["layers"])
    assert planned["coded"] is None
    assert not planned["parameters_approximate"]
    rough = r"parameters +[\d,]+ +at most [\d,]+ "
    assert not re.search(rough, shown)
    budget, shown = dry_run("--kv-ratio", 0.25, "--key-blocks", 2)
    assert budget["coded"]["total_bytes"] == budget["kv_bytes"] == 128 / 4
    assert budget["coded"]["key_blocks"] == 2
    assert budget["parameters_approximate"]
    assert re.search(rough, shown)


def test_no_time_of_a_step_is_promised_for_codes(folder) -> None:
    """Kernels take many times the least time; with numbers of 16 bits it is shown."""
    assert "Step:" not in (folder / "plan.txt").read_text()
    for options, promised in (
        (("--plan", folder / "plan.yaml"), False),
        (("--kv-ratio", 0.25), False),
        (("--kv-ratio", 0.5, "--cache-bits", 16), True),
    ):
        result = tpa_convert("convert", folder / "source", *options, "--dry-run")
        assert result.exit_code == 0, result.output
        assert ("Attention of a decoding step" in result.stdout) is promised


def test_a_plan_through_every_command(folder, tmp_path) -> None:
    text = folder / "text.txt"
    values = json.loads((folder / "plan.json").read_text())
    best = values["candidates"][values["chosen"]]
    assert {candidate["split"] for candidate in values["candidates"]} == {"coded"}
    assert [one["bits"] for one in values["quantised_source"]] == list(BITS)
    shown = (folder / "plan.txt").read_text()
    assert "  int4 source" in shown
    assert "context" in shown

    converted, healed = tmp_path / "converted", tmp_path / "healed"
    command = ("convert", folder / "source", "--plan", folder / "plan.yaml")
    results = tmp_path / "converted.json"
    result = tpa_convert(*command, *SHORT, "--out", converted, "--json", results)
    assert result.exit_code == 0, result.output
    assert json.loads(results.read_text())["layers"] == best["layers"]
    model = AutoModelForCausalLM.from_pretrained(converted)
    assert model.config.tpa_layers == best["layers"]
    assert sum(model.config.cached_bytes) == best["kv_bytes"] <= 128 / 4
    record = json.loads((converted / "tpa_convert.json").read_text())
    assert record["convert"]["plan"]["kv_bytes"] == best["kv_bytes"]

    result = tpa_convert(
        "heal", converted, "--text", text, "--tokens", 128, "--tokens-per-step", 64,
        "--block-length", 32, "--out", healed,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    valid = save_text(tmp_path / "valid.txt")
    result = tpa_convert(
        "eval", converted, healed, "--text", valid, "--block-length", 32, "--max-blocks", 2,
        "--no-speed", "--json", tmp_path / "report.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = {row["name"]: row for row in json.loads((tmp_path / "report.json").read_text())["rows"]}
    assert set(list(rows["bytes per token"]["values"].values())[1:]) == {best["kv_bytes"]}
    for prompt in ("Once upon", "O"):
        result = tpa_convert("generate", healed, prompt, "--max-new-tokens", 3)
        assert result.exit_code == 0, result.output


def test_kept_moments_give_the_same_conversion(folder, tmp_path) -> None:
    common = ["convert", folder / "source", "--kv-ratio", 0.25]
    first = [*common, *SHORT, "--save-moments", tmp_path / "m", "--out", tmp_path / "first"]
    assert tpa_convert(*first).exit_code == 0
    second = [*common, "--moments", tmp_path / "m", "--out", tmp_path / "second"]
    assert tpa_convert(*second).exit_code == 0
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / n) for n in ("first", "second"))
    assert one.config.tpa_layers == two.config.tpa_layers
    tokens = torch.arange(3, 20)[None]
    torch.testing.assert_close(one(tokens).logits, two(tokens).logits, atol=1e-3, rtol=0)
    third = [*common, "--moments", folder / "moments", "--out", tmp_path / "third"]
    assert tpa_convert(*third).exit_code == 0  # negative control: of other text
    three = AutoModelForCausalLM.from_pretrained(tmp_path / "third")
    assert (three(tokens).logits - one(tokens).logits).abs().max() > 1e-3


PLAIN = "does not go with"
REFUSED = [
    (["--kv-ratio", 0.25, "--cache-bits", 4, "--key-cache", "rotated"], PLAIN),
    (["--kv-ratio", 0.25, "--cache-bits", 4, "--gauge", "absorbed"], PLAIN),
    (["--kv-ratio", 0.25, "--cache-bits", 16, "--key-blocks", 2], "--key-blocks is for a cache"),
    (["--kv-ratio", 1, "--key-blocks", 2], "--key-blocks is for a cache"),
    (["--kv-ratio", 0.25, "--key-cache", "rotated", "--key-blocks", 2], "--key-blocks is for"),
    (["--kv-ratio", 0.25, "--key-blocks", 0], "--key-blocks must be at least 1"),
    (["--kv-ratio", 0.25, "--key-blocks", 3], "--key-blocks must divide the 4 rotary pairs"),
    (["--kv-bytes", 15, "--cache-bits", 3], "too small: 2 layers need at least 16 bytes"),
    (["--kv-bytes", 15], "too small: 2 layers need at least 16 bytes"),
    (["--kv-floats", 1], "too small: 2 layers need at least 16 bytes"),
    (["--kv-floats", 33], "above the source's 32"),
]
CONVERT_ONLY = [
    (["--kv-ratio", 0.25, "--cache-bits", 4, "--form", "affine"], PLAIN),
    (["--kv-ratio", 0.25, "--cache-bits", 4, "--method", "svd"], PLAIN),
    (["--kv-ratio", 0.25, "--cache-bits", 4, "--no-whiten"], PLAIN),
    (["--width-k", 8, "--width-v", 8, "--cache-bits", 2], PLAIN),
    (["--width-k", 8, "--width-v", 8, "--key-blocks", 2], "--key-blocks is for"),
    (["--plan", "PLAN", "--cache-bits", 2], PLAIN),
    (["--plan", "PLAN", "--key-blocks", 2], "--key-blocks is for"),
    (["--kv-ratio", 0.25, "--cache-bits", 16, "--moments", "MOMENTS"], "for a cache coded in bits"),
]


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        *(("convert", *row) for row in REFUSED + CONVERT_ONLY),
        *(("plan", *row) for row in REFUSED),
        ("plan", ["--kv-ratio", 0.25, "--cache-bits", 4, "--refine"], PLAIN),
    ],
)
def test_bad_options_are_one_clear_line(folder, tmp_path, command, options, message) -> None:
    words = {"PLAN": folder / "plan.yaml", "MOMENTS": folder / "moments"}
    arguments = [words.get(option, option) for option in options]
    result = tpa_convert(command, folder / "source", "--out", tmp_path / "out", *arguments)
    assert message in error_of(result)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bits", ["5", "0", "-1", "many", "2.0", ""])
@pytest.mark.parametrize("command", ["convert", "plan"])
def test_bits_that_are_none(folder, command, bits) -> None:
    result = tpa_convert(command, folder / "source", "--kv-ratio", 0.25, f"--cache-bits={bits}")
    expected = f"error: --cache-bits must be auto, 16, 8, 4, 3, 2 or 1, not {bits or repr(bits)}"
    assert error_of(result) == expected


def test_moments_of_another_source_are_one_clear_line(folder, tmp_path) -> None:
    other = save_source(tmp_path / "other", seed=1)
    for command in ("convert", "plan"):
        arguments = [command, other, "--kv-ratio", 0.25, "--moments", folder / "moments", *SHORT]
        result = tpa_convert(*arguments, "--out", tmp_path / "out")
        assert "made from another source" in error_of(result)


def test_a_conversion_says_what_its_codes_will_cost(folder, tmp_path) -> None:
    """More bytes, less loss; of plain numbers nothing is known."""
    expected = []
    for i, options in enumerate((["--kv-ratio", 0.5], ["--kv-ratio", 0.125])):
        out, results = tmp_path / f"out{i}", tmp_path / f"{i}.json"
        result = tpa_convert(
            "convert", folder / "source", *options, "--out", out, "--json", results,
            "--moments", folder / "moments",
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        nats = json.loads(results.read_text())["expected_nats"]
        said = re.search(r"about (\S+) nats a token", result.stdout)
        assert said is not None
        assert float(said[1]) == pytest.approx(nats, rel=0.06)
        expected.append(nats)
    assert 0 < expected[0] < 0.5 * expected[1]
    result = tpa_convert(
        "convert", folder / "source", "--kv-ratio", 1, *SHORT, "--out", tmp_path / "all"
    )
    assert result.exit_code == 0, result.output
    assert "nats" not in result.stdout
