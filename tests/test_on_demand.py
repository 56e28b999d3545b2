"""Sources whose weights stay in their files: the same model as one that is loaded whole."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import make_tiny_llama, make_tiny_tokenizer
from tests.tiny_models import MODELS
from tpa_convert.errors import UserError
from tpa_convert.sources import device_of, held, load_source, open_source


def save(model, directory: Path, **settings) -> Path:
    model.save_pretrained(directory, **settings)
    make_tiny_tokenizer().save_pretrained(directory)
    return directory


def change_tensors(directory: Path, change) -> None:
    """Applies a function to the tensors of a single weight file."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def error_of(directory: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_source(directory)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_model_that_transformers_loads(name: str, tmp_path: Path) -> None:
    model = MODELS[name]().bfloat16()
    model.generation_config.max_length = 77
    save(model, tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        whole, opened = load_source(tmp_path), open_source(tmp_path)
    assert opened.reference == whole.reference
    assert opened.model.config.to_dict() == whole.model.config.to_dict()
    assert opened.model.generation_config.to_dict() == whole.model.generation_config.to_dict()
    tokens = torch.arange(3, 37).view(2, 17)
    with torch.no_grad():
        expected = whole.model(tokens).logits
        assert torch.equal(opened.model(tokens).logits, expected)
    state = whole.model.state_dict()
    stored = opened.tensors(state)
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    assert all(torch.equal(stored[name].float(), tensor) for name, tensor in state.items())
    assert all(parameter.is_meta for parameter in opened.model.parameters())


def test_a_part_is_there_while_somebody_holds_it(tmp_path: Path) -> None:
    model = make_tiny_llama("gqa")
    source = open_source(save(model, tmp_path))
    layer = source.model.model.layers[1]
    weight = model.model.layers[1].mlp.up_proj.weight
    with held(layer):
        with held(layer):
            assert torch.equal(layer.mlp.up_proj.weight, weight)
        assert torch.equal(layer.mlp.up_proj.weight, weight)
        assert source.model.model.layers[0].mlp.up_proj.weight.is_meta
    assert layer.mlp.up_proj.weight.is_meta
    assert device_of(source.model) == torch.device("cpu") == device_of(model)
    with held(model.model.layers[0]):  # of a model in memory nothing changes
        assert not model.model.layers[0].mlp.up_proj.weight.is_meta
    assert not model.model.layers[0].mlp.up_proj.weight.is_meta


def test_a_part_is_let_go_of_when_it_fails(tmp_path: Path) -> None:
    source = open_source(save(make_tiny_llama("gqa"), tmp_path))
    layer = source.model.model.layers[0]
    with pytest.raises(RuntimeError):
        layer(torch.zeros(1, 2, 31), position_embeddings=(torch.zeros(1, 2, 8),) * 2)
    assert layer.mlp.up_proj.weight.is_meta


def test_tied_heads(tmp_path: Path) -> None:
    def is_tied(source) -> bool:
        model = source.model
        return model.get_output_embeddings().weight is model.get_input_embeddings().weight

    directory = save(make_tiny_llama("gqa", tie_word_embeddings=True), tmp_path)
    assert is_tied(open_source(directory))
    embedding = load_file(directory / "model.safetensors")["model.embed_tokens.weight"]
    change_tensors(directory, lambda t: t.update({"lm_head.weight": embedding.clone()}))
    assert is_tied(open_source(directory))
    change_tensors(directory, lambda t: t.update({"lm_head.weight": embedding + 1}))
    source = open_source(directory)
    assert not is_tied(source)
    assert torch.equal(source.tensors(["lm_head.weight"])["lm_head.weight"], embedding + 1)
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        expected = load_source(directory).model(tokens).logits
        assert torch.equal(source.model(tokens).logits, expected)


def test_what_is_wrong_with_the_files_is_told(tmp_path: Path) -> None:
    directory = save(make_tiny_llama("gqa"), tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    good = load_file(directory / "model.safetensors")
    change_tensors(directory, lambda tensors: tensors.pop(name))
    assert f"1 of the model's tensors are not in the weight files (the first: {name})" in error_of(
        directory
    )
    change_tensors(directory, lambda tensors: tensors.update({name: good[name][1:]}))
    assert f"{name} is [63, 32] in the weight files and [64, 32] by config.json" in error_of(
        directory
    )
    good[name][3, 4] = torch.nan
    change_tensors(directory, lambda tensors: tensors.update(good))
    layer = open_source(directory).model.model.layers[1]
    with pytest.raises(UserError, match=f"{name} contains NaN or infinity"), held(layer):
        pass
    change_tensors(directory, lambda tensors: tensors.update({"more": torch.ones(1)}))
    with pytest.warns(UserWarning, match=r"1 tensors .* left out \(the first: more\)"):
        open_source(directory)


def test_pieces_that_do_not_go_together(tmp_path: Path) -> None:
    directory = save(MODELS["mixtral"](), tmp_path)
    tensors = load_file(directory / "model.safetensors")
    name = next(name for name in tensors if ".experts.1." in name)
    change_tensors(directory, lambda tensors: tensors.update({name: tensors[name][1:]}))
    assert "cannot be made of its" in error_of(directory)


def test_shards_are_read_from_where_the_index_says(tmp_path: Path) -> None:
    directory = save(make_tiny_llama("gqa"), tmp_path, max_shard_size="20KB")
    index = directory / "model.safetensors.index.json"
    first = sorted(set(json.loads(index.read_text())["weight_map"].values()))[0]
    (directory / first).unlink()
    assert f"{first} is missing" in error_of(directory)
