"""Damaged checkpoints and odd configs: a conversion ends in an error of one line, or well."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import make_tiny_llama, make_tiny_tokenizer
from tpa_convert import pipeline
from tpa_convert.errors import UserError
from tpa_convert.recipe import ConvertOptions
from tpa_convert.sources import open_source

OPTIONS = {"kv_ratio": 0.5, "cache_bits": "16", "whiten": False}
FUZZ = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,  # what a run finds, every run finds; look further with more examples
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source")
    make_tiny_llama("gqa").bfloat16().save_pretrained(directory)
    make_tiny_tokenizer().save_pretrained(directory)
    return directory


def converts_or_says_why(directory: Path) -> bool:
    """Whether a checkpoint is converted. Raises whatever is no `UserError`."""
    message = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            pipeline.convert(str(directory), directory / "out", ConvertOptions(**OPTIONS))
    except UserError as error:
        message = str(error)
    finally:
        shutil.rmtree(directory / "out", ignore_errors=True)
    assert "\n" not in message
    assert list(directory.glob(".*")) == []
    return not message


@FUZZ
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), min_size=1, max_size=4))
def test_flipped_bytes(source: Path, tmp_path: Path, flips: list[tuple[float, int]]) -> None:
    directory = tmp_path / "damaged"
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(source, directory)
    path = directory / "model.safetensors"
    content = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    for place, change in flips:  # as many in the header as in the numbers
        at = int(2 * place * header) if place < 0.5 else int((2 * place - 1) * (len(content) - 1))
        content[min(at, len(content) - 1)] ^= change
    path.write_bytes(content)
    converts_or_says_why(directory)


@FUZZ
@given(st.floats(0, 1))
def test_truncated_files(source: Path, tmp_path: Path, kept: float) -> None:
    directory = tmp_path / "damaged"
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(source, directory)
    path = directory / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    assert converts_or_says_why(directory) == (int(kept * len(content)) == len(content))


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 70),
    st.floats(-1e6, 1e6),
    st.sampled_from(["", "x", "llama", "silu"]),
    st.lists(st.integers(-1, 3), max_size=3),
    st.dictionaries(st.sampled_from(["rope_type", "rope_theta", "x"]), st.integers(-1, 4)),
)


@settings(FUZZ, max_examples=150)
@given(st.data())
def test_odd_configs(source: Path, tmp_path: Path, data: st.DataObject) -> None:
    directory = tmp_path / "damaged"
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(source, directory)
    path = directory / "config.json"
    config: dict[str, Any] = json.loads(path.read_text())
    names = st.sampled_from(sorted({*config, "head_dim", "layer_types", "rope_scaling"}))
    config |= data.draw(st.dictionaries(names, VALUES, min_size=1, max_size=2))
    path.write_text(json.dumps(config))
    converts_or_says_why(directory)


def test_files_of_the_hub_have_the_hash_that_names_them(source: Path, tmp_path: Path) -> None:
    """The Hub's cache keeps weights under their sha256, and links to them."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    shutil.copytree(source, snapshot)
    path = snapshot / "model.safetensors"
    content = bytearray(path.read_bytes())
    blob = blobs / sha256(content).hexdigest()
    path.unlink()
    os.symlink(blob, path)
    blob.write_bytes(content)
    open_source(snapshot)
    content[-1] ^= 1  # a number that is as good as any other
    blob.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors is damaged: its sha256 is not"):
        open_source(snapshot)
