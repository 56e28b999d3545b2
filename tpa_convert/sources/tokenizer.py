"""The tokenizer of a checkpoint."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from tpa_convert.sources.checkpoint import Checkpoint
from tpa_convert.sources.quiet import quiet


def puts_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer puts the begin-of-text token before a text."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]


def tokenizer_of(
    checkpoint: Checkpoint, config: PreTrainedConfig, trust_remote_code: bool
) -> PreTrainedTokenizerBase:
    location = {} if checkpoint.gguf_file is None else {"gguf_file": checkpoint.gguf_file}
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(
                checkpoint.directory, trust_remote_code=trust_remote_code, **location
            )
    except Exception as error:
        packages = _missing_packages(checkpoint.directory)
        if packages:
            raise checkpoint.error(
                f"reading tokenizer.model needs {' and '.join(packages)}: pip install "
                f"{' '.join(packages)}; or put a tokenizer.json beside it"
            ) from error
        raise checkpoint.error(
            "the tokenizer cannot be loaded; put the tokenizer's files (tokenizer.json, "
            f"tokenizer_config.json) beside the weights ({type(error).__name__})"
        ) from error
    if location:
        # Some releases of transformers (5.17) take the first special token of a GGUF for the last.
        for name in ("bos", "eos", "pad"):
            index = getattr(config, f"{name}_token_id", None)
            if isinstance(index, int):
                setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(index))
        # Nor do they say that texts begin with a token, without which some models are worse by far.
        begins = checkpoint.begins_texts()
        if begins is not None and begins != puts_bos(tokenizer):
            tokenizer.add_bos_token = begins
    return tokenizer


def _missing_packages(directory: Path) -> list[str]:
    """Packages that a directory's only tokenizer file needs to be read, and that are not here."""
    path = directory / "tokenizer.model"
    if not path.is_file() or (directory / "tokenizer.json").is_file():
        return []
    with path.open("rb") as file:
        is_protobuf = file.read(1) == b"\n"  # the tag of the first piece; tiktoken's is base64
    needed = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}
    if not is_protobuf:
        needed = {"tiktoken": "tiktoken"}
    return [package for package, module in needed.items() if not _is_installed(module)]


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of a package around it
        return False
