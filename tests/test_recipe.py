"""Recipes: what is accepted, and one line for what is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tpa_convert.errors import UserError
from tpa_convert.options.conversion import ConvertOptions
from tpa_convert.options.declaration import validated
from tpa_convert.options.healing import HealOptions
from tpa_convert.options.recipe import Recipe, load_recipe

MINIMAL = "source: some/model\nconvert: {kv_ratio: 0.5}\n"


def test_a_directory_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^cannot read the recipe {tmp_path}: Is a directory$"):
        load_recipe(tmp_path)


def recipe_error(tmp_path: Path, text: str) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_recipe(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(path))
    return message.removeprefix(f"{path}")


def test_minimal_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(MINIMAL)
    recipe = load_recipe(path)
    assert recipe.source.model == "some/model"
    assert recipe.convert == ConvertOptions(kv_ratio=0.5)
    assert recipe.heal is None
    assert recipe.evaluate is None


def test_one_text_or_several() -> None:
    assert validated(HealOptions, {"text": "a.txt"}).text == ("a.txt",)
    assert validated(HealOptions, {"text": ["a.txt", "b.txt"]}).text == ("a.txt", "b.txt")
    with pytest.raises(UserError, match="text"):
        validated(HealOptions, {"text": []})


def test_shares_of_training_text() -> None:
    """Behind an @, which no Hub name holds, so that `name:config` and drive letters stay whole."""
    mapping = validated(HealOptions, {"text": {"a.txt": 3, "owner/corpus:small": 0.5}})
    assert mapping.text == ("a.txt@3", "owner/corpus:small@0.5")
    assert mapping.text_shares == (("a.txt", 3.0), ("owner/corpus:small", 0.5))
    assert validated(HealOptions, mapping.model_dump(mode="json")) == mapping
    names = ("C:\\text\\a.txt", "owner/corpus:v2", "me@home.txt", "a@b/c@2.txt", "data@3@1e-2")
    *plain, named = validated(HealOptions, {"text": names}).text_shares
    assert plain == [(name, None) for name in names[:-1]]
    assert named == ("data@3", 0.01)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.txt@0", "the share of a.txt must be a positive number, not 0"),
        (["b.txt", "a.txt@-2"], "the share of a.txt must be a positive number, not -2"),
        ({"a.txt": "much"}, "text: the share of a.txt must be a number, not 'much'"),
        ({"a.txt": float("inf")}, "the share of a.txt must be a positive number, not inf"),
    ],
)
def test_shares_that_are_none(text, message) -> None:
    with pytest.raises(UserError, match=message):
        validated(HealOptions, {"text": text})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (MINIMAL + "haal: {}\n", ": unknown key haal; did you mean heal?"),
        (
            "source: m\nconvert: {kv_flotas: 128}\n",
            ": unknown key convert.kv_flotas; did you mean kv_floats?",
        ),
        (
            MINIMAL + "heal: {text: a.txt, tokns: 5}\n",
            ": unknown key heal.tokns; did you mean tokens?",
        ),
        (
            "source: {modell: m}\nconvert: {kv_ratio: 0.5}\n",
            ": unknown key source.modell; did you mean model?",
        ),
        ("source: m\n", ": convert is missing"),
        ("- a\n- b\n", ": a recipe is a mapping with the keys source, convert, heal, ..."),
    ],
)
def test_wrong_keys(tmp_path: Path, text: str, expected: str) -> None:
    assert recipe_error(tmp_path, text) == expected


def test_unknown_key_unlike_any_lists_the_valid_ones(tmp_path: Path) -> None:
    message = recipe_error(tmp_path, MINIMAL + "xyzzy: 1\n")
    assert "unknown key xyzzy; valid keys: source, convert, heal" in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "source: m\nconvert: {kv_ratio: 1.5}\n",
            "convert.kv_ratio must be above 0 and at most 1, such as 0.125 or 12.5%, not 1.5",
        ),
        (
            "source: m\nconvert: {kv_ratio: half}\n",
            "convert.kv_ratio must be a share, such as",
        ),
        (
            "source: m\nconvert: {form: quadratic, kv_ratio: 0.5}\n",
            "convert.form must be static, affine or linear, not quadratic",
        ),
        ("source: m\nconvert: {}\n", "exactly one budget"),
        ("source: m\nconvert: {kv_ratio: 0.5, rank_k: 1}\n", "got `kv_ratio` and ranks and widths"),
        ("source: m\nconvert: {kv_ratio: 0.5, rank_q: 2}\n", "`rank_q` needs `form` linear"),
        (
            "source: m\nconvert: {kv_ratio: 0.5, whiten: false, save_moments: m.st}\n",
            "without `whiten` no moments are measured: leave out `save_moments`",
        ),
        (MINIMAL + "heal: {text: a.txt, seed: -1}\n", "heal.seed must be zero or more"),
        ("source: [m\n", "line 2: not valid YAML"),
    ],
)
def test_wrong_values(tmp_path: Path, text: str, words: str) -> None:
    assert words in recipe_error(tmp_path, text)


def test_missing_recipe() -> None:
    with pytest.raises(UserError, match=r"no such recipe: nowhere\.yaml"):
        load_recipe("nowhere.yaml")


def test_rank_q_goes_with_any_budget() -> None:
    assert ConvertOptions(kv_ratio=0.5, rank_q=2, form="linear").rank_q == 2


def test_moments_of_the_linear_form_are_kept_without_whitening() -> None:
    ConvertOptions(kv_ratio=0.5, whiten=False, form="linear", save_moments=Path("m.st"))


def test_recipe_survives_yaml_round_trip() -> None:
    values = {"source": {"model": "m"}, "convert": {"kv_ratio": 0.5}, "heal": {"text": ["a"]}}
    recipe = validated(Recipe, values)
    assert validated(Recipe, recipe.model_dump(mode="json")) == recipe


@pytest.mark.parametrize(
    ("section", "text"),
    [("heal", "a.txt"), ("heal", "b.txt"), ("convert", "c.txt")],
)
def test_text_for_training_does_not_measure(tmp_path, section, text) -> None:
    """Named by another path, or for calibration only: it is the same text all the same."""
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text("text")
    values = {
        "source": "m",
        "convert": {"kv_ratio": 0.5, "calibration": [str(tmp_path / "c.txt")]},
        "heal": {"text": [str(tmp_path / "a.txt"), f"{tmp_path / 'b.txt'}@2"]},
        "evaluate": {"text": str(tmp_path / "." / section / ".." / text)},
    }
    (tmp_path / section).mkdir()
    with pytest.raises(UserError, match=rf"{text} is training text .* `evaluate\.text`"):
        validated(Recipe, values)
    values["evaluate"]["text"] = str(tmp_path / "d.txt")
    validated(Recipe, values)


def test_another_split_of_a_dataset_may_measure() -> None:
    values = {
        "source": "m",
        "convert": {"kv_ratio": 0.5},
        "heal": {"text": "owner/corpus"},
        "evaluate": {"text": "owner/corpus", "split": "test"},
    }
    validated(Recipe, values)
    values["evaluate"]["split"] = "train"
    with pytest.raises(UserError, match="owner/corpus is training text"):
        validated(Recipe, values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": "a.txt", "valid_text": "a.txt"}, "a.txt is training text"),
        ({"text": {"a.txt": 2}, "valid_text": "a.txt"}, "a.txt is training text"),
        ({}, "no text to heal on"),
        ({"text": "a.txt", "stop_at": 0.1}, "`stop_at` needs held-out text"),
        (
            {"text": "a.txt", "stop_at": 0},
            "stop_at must be a positive number, such as 0.125",
        ),
    ],
)
def test_held_out_text_of_healing(options, message) -> None:
    with pytest.raises(UserError, match=message):
        validated(HealOptions, options)
