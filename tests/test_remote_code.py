"""A converted model loads with plain transformers, with this package installed and without it."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from tests.conftest import make_tiny_llama, make_tiny_tokenizer
from tests.conversions import convert_tiny, random_blocks, source_of
from tpa_convert.export.save import save_converted
from tpa_convert.modeling import TPAForCausalLM, TPAModel

CONVERSIONS = {
    "static": {"kv_floats": 14, "gauge": "applied"},
    "linear": {"form": "linear", "method": "svd", "rank_k": 2, "rank_v": 1, "rank_q": 3},
}
NEW_TOKENS = 8

LOAD_WITHOUT_THE_PACKAGE = '''
import sys

class Blocked:
    """Refuses this package, which an editable install leaves importable from anywhere."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "tpa_convert":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

try:
    import tpa_convert
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("the package is not blocked")

directory, result, new_tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
try:
    AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=False)
except ValueError as error:
    assert "trust_remote_code" in str(error), error
else:
    raise SystemExit("code of the directory was run without being trusted")

config = AutoConfig.from_pretrained(directory, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
decoder = AutoModel.from_pretrained(directory, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(directory)
tokens = torch.load(result, weights_only=True)
with torch.no_grad():
    torch.save(
        {
            "logits": model(tokens).logits,
            "hidden": decoder(tokens).last_hidden_state,
            "generated": model.generate(tokens, max_new_tokens=new_tokens, do_sample=False),
            "text": tokenizer("a b")["input_ids"],
            "modules": [type(m).__module__ for m in (config, model, decoder)],
            "cached_floats": config.cached_floats,
        },
        result,
    )
'''


@pytest.fixture(scope="module", params=list(CONVERSIONS))
def saved(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TPAForCausalLM, Path]:
    """A converted tiny model in memory and the directory it is saved in."""
    source = make_tiny_llama("gqa")
    model = convert_tiny(source, **CONVERSIONS[request.param])
    model.generation_config.eos_token_id = None
    directory = tmp_path_factory.mktemp(f"converted-{request.param}")
    record = {
        "settings": {"form": request.param},
        "plan": {"kv_bytes": 112, "source_kv_bytes": 256, "cache_dtype": "float32"},
        "versions": {},
    }
    provenance = {"source": asdict(source_of(source).reference), "convert": record}
    save_converted(model, make_tiny_tokenizer(), directory, "tiny", provenance)
    return model, directory


def greedy(model: TPAForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    return model.generate(tokens, max_new_tokens=NEW_TOKENS, do_sample=False)


@torch.no_grad()
def test_loads_with_the_package_and_trusts_no_code(saved) -> None:
    model, directory = saved
    tokens = random_blocks(count=2, length=9)
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    assert type(loaded) is TPAForCausalLM
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert torch.equal(greedy(loaded, tokens), greedy(model, tokens))
    decoder = AutoModel.from_pretrained(directory)
    assert type(decoder) is TPAModel
    hidden = decoder(tokens).last_hidden_state
    assert torch.equal(hidden, model.model(tokens).last_hidden_state)


@torch.no_grad()
def test_loads_without_the_package(saved, tmp_path) -> None:
    model, directory = saved
    tokens = random_blocks(count=2, length=9)
    result = tmp_path / "result.pt"
    torch.save(tokens, result)
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    process = subprocess.run(
        [sys.executable, "-c", LOAD_WITHOUT_THE_PACKAGE, directory, result, str(NEW_TOKENS)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert process.returncode == 0, process.stderr
    loaded = torch.load(result, weights_only=True)
    assert all(module.startswith("transformers_modules.") for module in loaded["modules"])
    assert loaded["cached_floats"] == model.config.cached_floats
    assert torch.equal(loaded["logits"], model(tokens).logits)
    assert torch.equal(loaded["hidden"], model.model(tokens).last_hidden_state)
    assert torch.equal(loaded["generated"], greedy(model, tokens))
    assert loaded["text"] == make_tiny_tokenizer()("a b")["input_ids"]


def imported_modules(path: Path) -> set[str]:
    """Top-level packages a file imports, relative ones as `.name`."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            modules.add(f".{module}" if node.level else module.partition(".")[0])
    return modules


def test_exported_code_imports_torch_transformers_and_siblings_only(saved) -> None:
    _, directory = saved
    files = sorted(directory.glob("*.py"))
    allowed = {"torch", "transformers", *sys.stdlib_module_names}
    allowed |= {f".{path.stem}" for path in files}
    assert [path.name for path in files] == ["configuration_tpa.py", "modeling_tpa.py"]
    for path in files:
        modules = imported_modules(path)
        assert modules <= allowed, path.name
        assert "transformers" in modules


def test_the_check_of_imports_sees_every_kind(tmp_path) -> None:
    path = tmp_path / "code.py"
    path.write_text(
        "import a.b as c\nfrom d.e import f\nfrom .g import h\ndef i():\n    import j\n"
    )
    assert imported_modules(path) == {"a", "d", ".g", "j"}


def test_auto_map_names_what_the_files_define(saved) -> None:
    _, directory = saved
    auto_map = json.loads((directory / "config.json").read_text())["auto_map"]
    assert set(auto_map) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    for reference in auto_map.values():
        module, name = reference.split(".")
        tree = ast.parse((directory / f"{module}.py").read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
