"""A converted model loads with plain transformers, with this package installed and without it."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from tests.conftest import make_tiny_llama, make_tiny_tokenizer
from tests.conversions import convert_tiny, random_blocks, source_of
from tests.generated import generated, telling
from tpa_convert.export.save import save_converted

CONVERSIONS = {
    "static": {"kv_floats": 14, "gauge": "applied"},
    "linear": {"form": "linear", "method": "svd", "rank_k": 2, "rank_v": 1, "rank_q": 3},
}
SAVED_AGAIN = "saved again"
NEW_TOKENS = 8

SCRIPT = '''
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


def results(directory, tokens, new_tokens):
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
    return {
        "logits": model(tokens).logits,
        "hidden": decoder(tokens).last_hidden_state,
        "generated": model.generate(tokens, max_new_tokens=new_tokens, do_sample=False),
        "text": tokenizer("a b")["input_ids"],
        "modules": [type(made).__module__ for made in (config, model, decoder)],
        "cached_floats": config.cached_floats,
    }


inputs, outputs, new_tokens, needy, *directories = sys.argv[1:]
try:
    AutoModelForCausalLM.from_pretrained(needy, trust_remote_code=True)
except ImportError as error:
    assert "tpa_convert" in str(error), error
else:
    raise SystemExit("code that needs the package was loaded without it")
tokens = torch.load(inputs, weights_only=True)
with torch.no_grad():
    torch.save([results(d, tokens, int(new_tokens)) for d in directories], outputs)
'''


class Saved(NamedTuple):
    """A converted tiny model in memory and the directory it is saved in."""

    model: PreTrainedModel
    directory: Path


@pytest.fixture(scope="module")
def all_saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Saved]:
    source = make_tiny_llama("gqa")
    saved = {}
    for name, conversion in CONVERSIONS.items():
        model = convert_tiny(source, **conversion)
        model.generation_config.eos_token_id = None
        directory = tmp_path_factory.mktemp(f"converted-{name}")
        record = {
            "settings": {},
            "plan": {"kv_bytes": 112, "source_kv_bytes": 256},
            "versions": {},
        }
        provenance = {"source": asdict(source_of(source).reference), "convert": record}
        save_converted(model, make_tiny_tokenizer(), directory, "tiny", provenance)
        saved[name] = Saved(model, directory)
    # what fine-tuning leaves: loaded and saved by plain transformers
    directory = tmp_path_factory.mktemp("saved-again")
    loaded = AutoModelForCausalLM.from_pretrained(saved["static"].directory)
    loaded.save_pretrained(directory)
    make_tiny_tokenizer().save_pretrained(directory)
    saved[SAVED_AGAIN] = Saved(saved["static"].model, directory)
    return saved


@pytest.fixture(params=[*CONVERSIONS, SAVED_AGAIN])
def saved(request: pytest.FixtureRequest, all_saved: dict[str, Saved]) -> Saved:
    return all_saved[request.param]


@pytest.fixture(scope="module")
def without_the_package(
    all_saved: dict[str, Saved], tmp_path_factory: pytest.TempPathFactory
) -> dict[Path, dict[str, Any]]:
    """What every saved model gives on `tokens()` in one process that cannot import the package."""
    directory = tmp_path_factory.mktemp("without")
    inputs, outputs = directory / "tokens.pt", directory / "results.pt"
    torch.save(tokens(), inputs)
    directories = [saved.directory for saved in all_saved.values()]
    needy = shutil.copytree(directories[0], directory / "needy")
    for code in needy.glob("*.py"):
        code.write_text(code.read_text() + "\nimport tpa_convert.modeling\n")
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, inputs, outputs, str(NEW_TOKENS), needy, *directories],
        cwd=directory,
        env=os.environ | {"HF_MODULES_CACHE": str(directory / "modules")},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert process.returncode == 0, process.stderr
    return dict(zip(directories, torch.load(outputs, weights_only=True), strict=True))


def tokens() -> torch.Tensor:
    return random_blocks(count=2, length=9)


@torch.no_grad()
def test_loads_with_the_package_and_trusts_no_code(saved) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(saved.directory)
    assert type(loaded) is type(saved.model)
    assert torch.equal(loaded(tokens()).logits, saved.model(tokens()).logits)
    expected = telling(saved.model, tokens(), NEW_TOKENS)
    assert torch.equal(generated(loaded, tokens(), NEW_TOKENS), expected)
    decoder = AutoModel.from_pretrained(saved.directory)
    assert type(decoder) is type(saved.model.model)
    hidden = saved.model.model(tokens()).last_hidden_state
    assert torch.equal(decoder(tokens()).last_hidden_state, hidden)


@torch.no_grad()
def test_loads_without_the_package(saved, without_the_package) -> None:
    loaded = without_the_package[saved.directory]
    assert all(module.startswith("transformers_modules.") for module in loaded["modules"])
    assert loaded["cached_floats"] == saved.model.config.cached_floats
    assert torch.equal(loaded["logits"], saved.model(tokens()).logits)
    assert torch.equal(loaded["hidden"], saved.model.model(tokens()).last_hidden_state)
    expected = telling(saved.model, tokens(), NEW_TOKENS)
    assert torch.equal(loaded["generated"], torch.cat((tokens(), expected), dim=1))
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
    files = sorted(saved.directory.glob("*.py"))
    allowed = {"torch", "transformers", *sys.stdlib_module_names}
    allowed |= {f".{path.stem}" for path in files}
    assert "tpa_llama.py" in {path.name for path in files}
    for path in files:
        assert imported_modules(path) <= allowed, path.name


def test_the_check_of_imports_sees_every_kind(tmp_path) -> None:
    path = tmp_path / "code.py"
    path.write_text(
        "import a.b as c\nfrom d.e import f\nfrom .g import h\ndef i():\n    import j\n"
    )
    assert imported_modules(path) == {"a", "d", ".g", "j"}


def test_auto_map_names_what_the_files_define(saved) -> None:
    auto_map = json.loads((saved.directory / "config.json").read_text())["auto_map"]
    assert set(auto_map) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    for reference in auto_map.values():
        module, name = reference.split(".")
        tree = ast.parse((saved.directory / f"{module}.py").read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
