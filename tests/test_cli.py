"""The command line as a user meets it: exit codes, one-line messages, whole outputs or none."""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from tests.command_line import CONVERT, error_of, save_source, save_text, tpa_convert
from tpa_convert.cli import terminal
from tpa_convert.cli.commands import app


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_source(tmp_path_factory.mktemp("models") / "source")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return save_text(tmp_path / "text.txt")


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models") / "converted"
    result = tpa_convert("convert", source, "--out", out, *CONVERT)
    assert result.exit_code == 0, result.output
    return out


def contents(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# ------------------------------------------------------------------------------- convert


def test_convert_writes_a_model_for_plain_transformers(source: Path, converted: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(converted)
    assert model.config.model_type == "tpa_llama"
    assert model.dtype == torch.float32
    cache = model(torch.zeros(1, 5, dtype=torch.long), use_cache=True).past_key_values
    # Half of 2 layers x 2 heads x (8 + 8) numbers of 2 bytes, in codes.
    assert sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) == 5 * 64
    assert {layer.keys.dtype for layer in cache.layers} == {torch.uint8}

    record = json.loads((converted / "tpa_convert.json").read_text())
    assert record["source"]["id"] == str(source)
    assert record["convert"]["settings"]["kv_ratio"] == 0.5
    assert record["convert"]["plan"]["kv_bytes"] == 64
    assert record["convert"]["versions"]["torch"]
    card = (converted / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers")
    assert "license" not in card
    assert "**64 bytes per token instead of 128** (50.0 %; numbers at 16 bits)" in card


def test_dry_run_touches_no_weights(source: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(source / "config.json", bare)
    result = tpa_convert("convert", bare, "--kv-floats", 12, "--dry-run", "--json", tmp_path / "p")
    assert result.exit_code == 0, result.output
    plan = json.loads((tmp_path / "p").read_text())
    assert plan["kv_floats"] == 12
    assert plan["kv_bytes"] == 2 * 12 * 2
    assert contents(tmp_path) == ["bare", "p"]


@pytest.mark.parametrize("options", [["--form", "affine"], ["--cache-bits", "16"]])
def test_dry_run_predicts_what_convert_measures(
    source: Path, tmp_path: Path, options: list[str]
) -> None:
    for name, extra in (("plan", ["--dry-run"]), ("made", ["--out", tmp_path / "out"])):
        arguments = ["convert", source, *CONVERT, *options, *extra]
        result = tpa_convert(*arguments, "--json", tmp_path / name)
        assert result.exit_code == 0, result.output
    plan = json.loads((tmp_path / "plan").read_text())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    cache = model(torch.zeros(1, 3, dtype=torch.long), use_cache=True).past_key_values
    measured = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert measured == 3 * 2 * plan["kv_bytes"]  # bytes are promised at 16 bits a number
    assert model.num_parameters() == plan["parameters"]


@pytest.mark.parametrize(
    ("bits", "measure"), [("auto", "collect_cache_moments"), ("16", "collect_moments")]
)
def test_moments_are_kept_and_reused(
    source: Path, tmp_path: Path, monkeypatch: Any, bits: str, measure: str
) -> None:
    moments = tmp_path / "moments.safetensors"
    command = ["convert", source, *CONVERT, "--cache-bits", bits]
    first = [*command, "--save-moments", moments, "--out", tmp_path / "first"]
    assert tpa_convert(*first).exit_code == 0
    # must not be called again
    monkeypatch.setattr(f"tpa_convert.pipeline.calibration.{measure}", None)
    second = ["convert", source, "--kv-ratio", "0.5", "--cache-bits", bits, "--moments", moments]
    assert tpa_convert(*second, "--out", tmp_path / "second").exit_code == 0
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / n) for n in ("first", "second"))
    tokens = torch.arange(3, 20)[None]
    torch.testing.assert_close(one(tokens).logits, two(tokens).logits, rtol=1e-3, atol=1e-3)
    for name, tensor in one.state_dict().items() if bits == "auto" else ():
        assert torch.equal(two.state_dict()[name], tensor)  # codes leave no room for rounding


@pytest.mark.parametrize("options", [["--refit"], ["--refine", "--refine-steps", "2"]])
def test_moments_serve_a_model_that_reads_the_text_again(
    source: Path, tmp_path: Path, monkeypatch: Any, options: list[str]
) -> None:
    moments, plain, changed = (tmp_path / name for name in ("m.safetensors", "plain", "changed"))
    first = ["convert", source, *CONVERT, "--save-moments", moments, "--out", plain]
    assert tpa_convert(*first).exit_code == 0
    monkeypatch.setattr("tpa_convert.pipeline.calibration.collect_moments", None)
    text = save_text(tmp_path / "text.txt")
    more = ["--calibration", text, "--calibration-blocks", "16", "--moments", moments, *options]
    result = tpa_convert("convert", source, *CONVERT, *more, "--out", changed)
    assert result.exit_code == 0, result.output
    one, two = (AutoModelForCausalLM.from_pretrained(path) for path in (plain, changed))
    name = "model.layers.0.self_attn.o_proj.weight"
    assert not torch.equal(one.state_dict()[name], two.state_dict()[name])
    record = json.loads((changed / "tpa_convert.json").read_text())
    assert record["convert"]["settings"][options[0][2:]] is True


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_output_dtype(source: Path, tmp_path: Path, dtype: str) -> None:
    result = tpa_convert("convert", source, *CONVERT, "--dtype", dtype, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == getattr(torch, dtype)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "exactly one budget: --kv-floats, --kv-bytes, --kv-ratio"),
        (["--kv-ratio", 0.5, "--kv-floats", 16], "got --kv-floats and --kv-ratio"),
        (["--kv-ratio", 1.5], "--kv-ratio must be above 0 and at most 1, such as 0.125"),
        (["--kv-floats", 1000], "above the source's 32"),
        (["--kv-floats", 1], "at least"),
        (["--kv-ratio", 0.5, "--rank-q", 2], "--rank-q needs --form linear"),
        (["--kv-ratio", 0.5, "--no-whiten", "--save-moments", "m"], "leave out --save-moments"),
        (["--kv-ratio", 0.5, "--calibration", "nowhere.txt"], "no such file: nowhere.txt"),
        (["--kv-ratio", 0.5, "--moments", "nowhere"], "--moments: no such file: nowhere"),
        (["--kv-ratio", 0.5, "--device", "abacus"], "device abacus cannot be used here"),
    ],
)
def test_bad_options(source: Path, tmp_path: Path, arguments: list[Any], words: str) -> None:
    result = tpa_convert("convert", source, "--out", tmp_path / "out", *arguments)
    assert words in error_of(result)
    assert contents(tmp_path) == []


def test_out_is_needed(source: Path) -> None:
    assert "--out DIR" in error_of(tpa_convert("convert", source, "--kv-ratio", 0.5))


def test_missing_source(tmp_path: Path) -> None:
    result = tpa_convert("convert", "./nowhere", "--kv-ratio", 0.5, "--out", tmp_path / "out")
    assert error_of(result).startswith("error: ./nowhere: no such file or directory")


def test_converted_model_is_refused_as_source(converted: Path, tmp_path: Path) -> None:
    result = tpa_convert("convert", converted, "--kv-ratio", 0.5, "--out", tmp_path / "out")
    assert "TPA model already" in error_of(result)


def test_empty_calibration_text(source: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    result = tpa_convert(
        "convert", source, *CONVERT, "--calibration", tmp_path / "empty.txt", "-o", tmp_path / "out"
    )
    assert "no text in" in error_of(result)
    assert contents(tmp_path) == ["empty.txt"]


def test_ranks_given_outright_only_warn(source: Path, tmp_path: Path) -> None:
    result = tpa_convert(
        "convert", source, "--rank-k", 2, "--rank-v", 2, *CONVERT[2:], "--out", tmp_path / "out"
    )
    assert result.exit_code == 0, result.output
    assert "warning: these ranks and widths cache 32 numbers" in result.stderr


def test_existing_output_is_kept(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert tpa_convert("convert", source, *CONVERT, "--out", out).exit_code == 0
    before = (out / "tpa_convert.json").read_text()
    again = ["convert", source, "--kv-floats", 12, *CONVERT[2:], "--out", out]
    assert "--overwrite" in error_of(tpa_convert(*again))
    assert (out / "tpa_convert.json").read_text() == before
    assert tpa_convert(*again, "--overwrite").exit_code == 0
    assert json.loads((out / "tpa_convert.json").read_text())["convert"]["plan"]["kv_floats"] == 12
    assert contents(tmp_path) == ["out"]


# ------------------------------------------------------------------------------- interruptions


def failing(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def test_ctrl_c_leaves_nothing_where_nothing_is_done(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = "tpa_convert.pipeline.calibration.collect_cache_moments"
    monkeypatch.setattr(step, failing(KeyboardInterrupt()))
    result = tpa_convert("convert", source, *CONVERT, "--out", tmp_path / "out")
    assert error_of(result, code=130).startswith("interrupted")
    assert contents(tmp_path) == []


@pytest.mark.parametrize("step", ["Conversion", "save_around_weights"])
def test_after_ctrl_c_the_same_command_goes_on(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    arguments = ["convert", source, *CONVERT, "--out", tmp_path / "out"]
    with monkeypatch.context() as patched:
        patched.setattr(f"tpa_convert.pipeline.conversion.{step}", failing(KeyboardInterrupt()))
        message = error_of(tpa_convert(*arguments), code=130)
    assert message == "interrupted: run the same command again to go on from here"
    assert contents(tmp_path) == [".out.unfinished"]
    # What is measured is not measured again.
    monkeypatch.setattr("tpa_convert.calibration.cache_moments.DecoderWalk", None)
    assert tpa_convert(*arguments).exit_code == 0
    assert contents(tmp_path) == ["out"]


def test_full_disk_while_weights_are_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tpa_convert import storage

    arguments = ["convert", source, *CONVERT, "--out", tmp_path / "out"]
    save_file, groups = storage.save_file, []

    def full(tensors: Any, path: Path, **settings: Any) -> None:
        groups.append(path)
        if len(groups) == 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path, **settings)

    with monkeypatch.context() as patched:
        patched.setattr(storage, "save_file", full)
        message = error_of(tpa_convert(*arguments))
    assert message == (
        f"error: the disk is full: {tmp_path / 'out'} was not written; free some space or write "
        "elsewhere. What is done is kept: the same command goes on from there"
    )
    assert contents(tmp_path) == [".out.unfinished"]
    assert tpa_convert(*arguments).exit_code == 0
    assert contents(tmp_path) == ["out"]


def test_unexpected_error_is_one_line_and_a_traceback_on_demand(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "tpa_convert.pipeline.conversion.Conversion", failing(ZeroDivisionError("a bug"))
    )
    arguments = ["convert", source, *CONVERT, "--out", tmp_path / "out"]
    assert "unexpected ZeroDivisionError: a bug" in error_of(tpa_convert(*arguments))
    monkeypatch.setenv("TPA_CONVERT_TRACEBACK", "1")
    result = tpa_convert(*arguments)
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert contents(tmp_path) == []


# ------------------------------------------------------------------------------- heal and generate

HEAL = ["--tokens", 256, "--tokens-per-step", 64, "--block-length", 32, "--warmup-steps", 1]


def test_heal_records_both_steps(converted: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "healed"
    result = tpa_convert("heal", converted, "--text", text, "--out", out, *HEAL)
    assert result.exit_code == 0, result.output
    assert contents(tmp_path) == ["healed", "text.txt"]  # no checkpoints left
    before = json.loads((converted / "tpa_convert.json").read_text())
    record = json.loads((out / "tpa_convert.json").read_text())
    assert record["source"] == before["source"]
    assert record["convert"] == before["convert"]
    assert record["heal"]["settings"]["tokens"] == 256
    assert record["heal"]["report"]["steps"] == 4
    assert "healed by distillation from its source on 256 tokens" in (out / "README.md").read_text()
    tokens = torch.arange(3, 20)[None]
    models = (AutoModelForCausalLM.from_pretrained(d) for d in (converted, out))
    one, two = (model(tokens).logits for model in models)
    assert not torch.equal(one, two)

    further = tmp_path / "further"
    result = tpa_convert("heal", out, "--text", text, "--out", further, *HEAL, "--tokens", 64)
    assert result.exit_code == 0, result.output
    assert (
        json.loads((further / "tpa_convert.json").read_text())["heal"]["earlier"] == record["heal"]
    )
    assert "from its source on 320 tokens" in (further / "README.md").read_text()


@pytest.fixture(scope="module")
def lossy(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of plain numbers, which at these bytes leaves more to be healed than codes do."""
    out = tmp_path_factory.mktemp("models") / "lossy"
    result = tpa_convert("convert", source, "--out", out, *CONVERT, "--cache-bits", 16)
    assert result.exit_code == 0, result.output
    return out


def test_heal_ends_with_a_summary(lossy: Path, text: Path, tmp_path: Path) -> None:
    out, valid = tmp_path / "healed", tmp_path / "valid.txt"
    valid.write_text("Held-out text, word by word. " * 100)
    files = ["--text", text, "--valid-text", valid, "--out", out]
    result = tpa_convert("heal", lossy, *files, *HEAL)
    assert result.exit_code == 0, result.output
    assert "led away" not in result.stderr
    report = json.loads((out / "tpa_convert.json").read_text())["heal"]["report"]
    before, after = (report["valid_perplexities"][end][1] for end in (0, -1))
    source = report["source_perplexity"]
    assert re.search(rf"source {source:.2f}\) +{before:.2f} +{after:.2f}", result.stdout)
    assert f"×{after / source:.3f}" in result.stdout
    assert f"Picture: {out / 'loss.png'}" in result.stdout
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    card = (out / "README.md").read_text()
    assert "(loss.png)" in card
    assert f"from {before:.2f} to {after:.2f}; the source's is {source:.2f}." in card


def test_heal_warns_where_it_harms(lossy: Path, text: Path, tmp_path: Path) -> None:
    valid = tmp_path / "valid.txt"
    valid.write_text("Held-out text, word by word. " * 100)
    options = ["--text", text, "--valid-text", valid, "--out", tmp_path / "healed"]
    rates = ["--learning-rate", "0.02", "--attention-learning-rate", "0.02"]
    result = tpa_convert("heal", lossy, *options, *HEAL, *rates)
    assert result.exit_code == 0, result.output
    assert re.search(
        r"^warning: healing led away from the source \(held-out KL \S+ -> \S+\): .*as it was$",
        result.stderr,
        re.MULTILINE,
    )


def test_logs_of_a_healing_lie_in_its_output(converted: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    out = tmp_path / "healed"
    options = ["--text", text, "--out", out, "--log-to", "tensorboard"]
    result = tpa_convert("heal", converted, *options, *HEAL)
    assert result.exit_code == 0, result.output
    assert contents(out / "runs")[0].startswith("events.out.tfevents.")
    record = json.loads((out / "tpa_convert.json").read_text())
    assert record["heal"]["settings"]["log_to"] == ["tensorboard"]
    options[-1] = "paper"
    message = error_of(tpa_convert("heal", converted, *options, "--overwrite", *HEAL))
    assert "--log-to must be tensorboard or wandb, not paper" in message


def test_heal_refuses_a_changed_source(source: Path, text: Path, tmp_path: Path) -> None:
    other = tmp_path / "source"
    shutil.copytree(source, other)
    assert tpa_convert("convert", other, *CONVERT, "--out", tmp_path / "small").exit_code == 0
    save_source(other, seed=1)
    heal = ["heal", tmp_path / "small", "--text", text, "--out", tmp_path / "healed", *HEAL]
    assert "has changed since" in error_of(tpa_convert(*heal))
    shutil.rmtree(other)
    assert "name it yourself" in error_of(tpa_convert(*heal))
    assert not (tmp_path / "healed").exists()
    assert tpa_convert(*heal, "--source", source).exit_code == 0


def test_heal_of_something_else(source: Path, text: Path, tmp_path: Path) -> None:
    result = tpa_convert("heal", source, "--text", text, "--out", tmp_path / "out")
    assert "is not a converted model" in error_of(result)


def test_only_option_names_are_spelt_as_options(tmp_path: Path) -> None:
    text = save_text(tmp_path / "my-text.txt")
    options = ["--text", text, "--valid-text", text, "--out", tmp_path / "healed"]
    assert error_of(tpa_convert("heal", tmp_path, *options)) == (
        f"error: {text} is training text and cannot measure what training did: take it out of the "
        "training text, or name other text in --valid-text"
    )


def test_interrupted_healing_says_how_to_go_on(
    converted: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tpa_convert.healing import HealingInterrupted

    monkeypatch.setattr(
        "tpa_convert.pipeline.healing.heal_model", failing(HealingInterrupted(2, 4))
    )
    result = tpa_convert("heal", converted, "--text", text, "--out", tmp_path / "healed", *HEAL)
    assert error_of(result, code=130).endswith("the same command continues from there")
    assert not (tmp_path / "healed").exists()
    options = ["--text", text, "--out", tmp_path / "healed", "--no-resume"]
    result = tpa_convert("heal", converted, *options, *HEAL)
    assert error_of(result, code=130).endswith("continues from there, without --no-resume")
    assert not (tmp_path / "healed").exists()


def test_generate_continues_the_prompt(converted: Path, tmp_path: Path) -> None:
    arguments = ["generate", converted, "Once", "--max-new-tokens", 5, "--json", tmp_path / "j"]
    result = tpa_convert(*arguments)
    assert result.exit_code == 0, result.output
    continuation = json.loads((tmp_path / "j").read_text())["continuation"]
    assert f"Once{continuation}" in result.stdout
    sampled = {tpa_convert(*arguments, "--temperature", 1, "--seed", 7).stdout for _ in range(2)}
    assert len(sampled) == 1


def test_generate_with_an_empty_prompt(converted: Path) -> None:
    assert "the prompt is empty" in error_of(tpa_convert("generate", converted, ""))


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--max-new-tokens", 0, "at least 1"),
        ("--temperature", -1.0, "zero or more"),
        ("--top-p", 0.0, "above 0 and at most 1, such as 0.125 or 12.5%"),
        ("--top-p", 1.5, "above 0 and at most 1, such as 0.125 or 12.5%"),
        ("--seed", -1, "zero or more and below 4294967296"),
        ("--seed", 2**32, "zero or more and below 4294967296"),
    ],
)
def test_sampling_out_of_range(converted: Path, option: str, value: float, expected: str) -> None:
    message = error_of(tpa_convert("generate", converted, "Once", option, value))
    assert message == f"error: {option} must be {expected}, not {value}"


# ------------------------------------------------------------------------------- results


def test_a_closed_pipe_loses_no_file(
    source: Path, converted: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal.console, "print", failing(BrokenPipeError()))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"source: {source}\nconvert: {{kv_ratio: 0.5, calibration_blocks: 2}}\n")
    for name, *arguments in (
        ("dry", "convert", source, "--kv-ratio", 0.5, "--dry-run"),
        ("made", "convert", source, *CONVERT, "--out", tmp_path / "small"),
        ("healed", "heal", converted, "--text", text, "--out", tmp_path / "healed", *HEAL),
        ("measured", "eval", converted, "--no-speed"),
        ("previewed", "run", recipe, "--dry-run"),
        ("run", "run", recipe, "--out", tmp_path / "run"),
    ):
        file = tmp_path / f"{name}.json"
        assert tpa_convert(*arguments, "--json", file).exit_code == 1
        assert json.loads(file.read_text())


def test_a_file_for_results_is_checked_before_any_work(
    source: Path, converted: Path, text: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"source: {source}\nconvert: {{kv_ratio: 0.5}}\n")
    out, earlier = tmp_path / "out", tmp_path / "earlier.json"
    earlier.write_text("{}")
    protecting = [
        ("plan", source),
        ("convert", source, *CONVERT, "--out", out),
        ("heal", converted, "--text", text, "--out", out, *HEAL),
    ]
    replacing = [
        ("run", recipe, "--out", out),
        ("eval", converted),
        ("generate", converted, "Once"),
    ]
    for command in protecting:
        assert error_of(tpa_convert(*command, "--json", earlier)) == (
            f"error: {earlier} exists: choose another file, or pass --overwrite"
        )
    for command in (*protecting, *replacing):
        result = tpa_convert(*command, "--json", tmp_path)
        assert error_of(result) == f"error: {tmp_path} is a directory: name a file"
        assert result.stdout == ""
    assert not out.exists()
    assert tpa_convert("eval", converted, "--no-speed", "--json", earlier).exit_code == 0
    assert json.loads(earlier.read_text())["models"] == ["source", "converted"]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to ..."),
    ],
)
def test_out_of_memory(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr("tpa_convert.pipeline.conversion.Conversion", failing(error))
    result = tpa_convert("convert", source, *CONVERT, "--out", tmp_path / "out")
    assert error_of(result) == "error: out of memory: try a smaller batch or another device"


@pytest.mark.parametrize(("no_color", "colored"), [("", True), ("1", False)])
def test_no_color(monkeypatch: pytest.MonkeyPatch, no_color: str, colored: bool) -> None:
    monkeypatch.setenv("NO_COLOR", no_color)
    result = CliRunner().invoke(app, ["convert", "./nowhere", "--kv-ratio", "1"], color=True)
    assert ("\x1b[" in result.stderr) == colored
    assert "error:" in result.stderr


def test_next_steps_judge_on_other_text_than_they_train_on(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    result = tpa_convert("convert", source, *CONVERT, "--out", out)
    assert f"heal {out} --text YOUR_TEXT" in result.stdout
    assert f"eval {out} --text HELD_OUT_TEXT" in result.stdout
    text = save_text(tmp_path / "text.txt")
    result = tpa_convert("heal", out, "--text", text, "--out", tmp_path / "healed", *HEAL)
    assert "--text HELD_OUT_TEXT" in result.stdout
