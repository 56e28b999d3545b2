"""The files of a checkpoint: find them on disk or on the Hub, check and hash them. No model."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import is_gguf_available

from tpa_convert.dtypes import is_finite
from tpa_convert.errors import UserError
from tpa_convert.places.models import model_path, snapshot

LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
"""Files with the terms of a model."""

_HUB_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "model*.safetensors", *LICENCES)
# Patterns match across slashes: all but templates are wanted from the top alone, where others keep
# copies of the weights in other formats.
_HUB_NOT = ("*/*.json", "*/*.txt", "*/*.model", "*/*.safetensors", "*/*.py")
_PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# A GGUF file begins with its names. Llama 3's RoPE scaling is a tensor, linear's and YaRN's a key.
_GGUF_HEADER_BYTES = 32 << 20
_GGUF_BEGINS = re.compile(rb"tokenizer\.ggml\.add_bos_token\x07\0\0\0(.)", re.DOTALL)  # 7: bool
_GGUF_ROPE_SCALING = (b"rope_freqs.weight", b".rope.scaling.factor")
_GGUF_PARTS = re.compile(rb"split\.(no|count)\x02\0\0\0(..)", re.DOTALL)  # 2: a 16-bit number
# What quantisers keep beside weights or instead of them: GPTQ and AWQ, bitsandbytes,
# compressed-tensors and fp8.
_PACKED = (
    ".qweight",
    ".qzeros",
    ".SCB",
    ".absmax",
    ".weight_packed",
    ".weight_scale",
    ".weight_scale_inv",
)
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on this disk: a directory, or a `.gguf` file in it.

    Attributes:
        spec: what the user wrote, for messages.
        id: Hub id, or absolute path of the directory or file.
        revision: commit of the Hub repository, None for local files.
    """

    spec: str
    id: str
    directory: Path
    revision: str | None = None
    gguf_file: str | None = None

    def error(self, message: str) -> UserError:
        """An error about this checkpoint, on one line."""
        return UserError(f"{self.spec}: {_one_line(message)}")

    def check_finite(self, name: str, tensor: torch.Tensor) -> None:
        """Refuses a tensor of the files that holds NaN or infinity."""
        if not is_finite(tensor):
            raise self.error(
                f"{name} contains NaN or infinity; the checkpoint is damaged or was trained to "
                "divergence: download it again or use another one"
            )

    def read_config(self) -> dict[str, Any]:
        """`config.json` as it is.

        Raises:
            UserError: it is missing or not JSON.
        """
        path = self.directory / "config.json"
        if not path.is_file():
            if (self.directory / "adapter_config.json").is_file():
                raise self.error("this is an adapter; merge it into its base model and save that")
            ggufs = sorted(self.directory.glob("*.gguf"))
            if ggufs:
                raise self.error(f"no config.json here; to use the GGUF file, name it: {ggufs[0]}")
            raise self.error(
                "no config.json here; give the directory of a transformers checkpoint, "
                "a Hub id or a .gguf file"
            )
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise self.error(f"config.json cannot be read ({error}); download it again") from error
        if not isinstance(config, dict):
            raise self.error("config.json does not hold a JSON object; download it again")
        return config

    def weight_files(self) -> list[Path]:
        """The files with weights, sorted by name.

        Raises:
            UserError: there are none, a shard is missing, or there are only pickled ones.
        """
        if self.gguf_file is not None:
            return [self.directory / self.gguf_file]
        single = self.directory / "model.safetensors"
        if single.is_file():
            return [single]
        index = self.directory / "model.safetensors.index.json"
        if index.is_file():
            return self._shards(index)
        if any(next(self.directory.glob(pattern), None) for pattern in _PICKLE_PATTERNS):
            raise self.error(
                "only pickled weights here, and reading those can run code; if you trust them, "
                "load and re-save them with transformers (save_pretrained writes safetensors)"
            )
        raise self.error(
            "no model.safetensors (or model.safetensors.index.json) here; download the safetensors "
            "weights, or re-save the model with save_pretrained"
        )

    def _shards(self, index: Path) -> list[Path]:
        try:
            names = sorted(
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            )
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise self.error(f"{index.name} cannot be read; download it again") from error
        for name in names:
            if not (self.directory / name).is_file():
                raise self.error(
                    f"{name} is missing, though {index.name} lists it; download it again"
                )
        return [self.directory / name for name in names]

    def check_weight_files(self) -> None:
        """Reads the header of every weight file, which also tells whether a file is complete.

        Raises:
            UserError: a file is truncated or damaged, or holds 8-bit floats.
        """
        if self.gguf_file is not None:
            self._check_gguf(self.directory / self.gguf_file)
            return
        for path in self.weight_files():
            try:
                with safe_open(path, framework="pt") as file:
                    names = list(file.keys())
                    dtypes = {file.get_slice(name).get_dtype() for name in names}
            except (SafetensorError, OSError) as error:
                with path.open("rb") as file:
                    pointer = file.read(24).startswith(b"version https://git-lfs")
                if pointer:
                    raise self.error(
                        f"{path.name} is a Git LFS pointer, not weights; run `git lfs pull` in it"
                    ) from error
                raise self.error(
                    f"{path.name} is truncated or damaged ({error}); download it again"
                ) from error
            if any(dtype.startswith("F8") for dtype in dtypes):
                raise self.error(_quantized_message("fp8"))
            packed = next((name for name in names if name.endswith(_PACKED)), None)
            if packed is not None:
                raise self.error(_quantized_message(f"as {packed} tells"))

    def stored_dtype(self) -> torch.dtype | None:
        """Type of the first weight of a safetensors checkpoint; None if it has no files here.

        Raises:
            UserError: as `check_weight_files`.
        """
        if self.gguf_file is not None or not any(self.directory.glob("*.safetensors")):
            return None
        self.check_weight_files()
        with safe_open(self.weight_files()[0], framework="pt") as file:
            name = next(iter(file.keys()))
            return file.get_slice(name)[:0].dtype

    def begins_texts(self) -> bool | None:
        """Whether a GGUF file says that texts begin with the begin-of-text token; None if it says
        nothing."""
        if self.gguf_file is None:
            return None
        found = _GGUF_BEGINS.search(_gguf_header(self.directory / self.gguf_file))
        return None if found is None else found[1] != b"\0"

    def _check_gguf(self, path: Path) -> None:
        if not is_gguf_available():
            raise self.error("reading GGUF needs the gguf package: pip install 'tpa-convert[gguf]'")
        header = _gguf_header(path)
        if not header.startswith(b"GGUF"):
            raise self.error("this is not a GGUF file; give a .gguf file or a directory")
        found = {name: int.from_bytes(two, "little") for name, two in _GGUF_PARTS.findall(header)}
        if found.get(b"count", 1) > 1:
            part = f"part {found.get(b'no', 0) + 1} of {found[b'count']}"
            raise self.error(
                f"this is {part} of a GGUF file; merge them (`llama-gguf-split --merge FIRST-PART "
                "MERGED.gguf`) and give the result"
            )
        if any(mark in header for mark in _GGUF_ROPE_SCALING):
            warnings.warn(
                f"{self.spec}: transformers does not read the RoPE scaling of a GGUF file, so long "
                "contexts suffer; prefer the safetensors checkpoint",
                stacklevel=4,
            )

    def refuse_quantized(self, config: dict[str, Any]) -> None:
        """Raises UserError if the config, or a file beside it, says that the weights are
        quantised."""
        for part in (config, config.get("text_config") or {}):
            for key in ("quantization_config", "compression_config", "quantization"):
                if part.get(key):
                    method = part[key]
                    if isinstance(method, dict):
                        method = method.get("quant_method") or f"{method.get('bits', 'some')} bits"
                    raise self.error(_quantized_message(method))
        if (self.directory / "hf_quant_config.json").is_file():
            raise self.error(_quantized_message("modelopt"))

    def sha256(self) -> str:
        """Of the bytes of all weight files in the order of their names; names do not count.

        Raises:
            UserError: a file cannot be read, or is in the Hub's cache under another sha256.
        """
        digest = hashlib.sha256()
        for path in self.weight_files():
            own, named = hashlib.sha256(), _sha256_of_blob(path)
            try:
                with path.open("rb") as file:
                    while chunk := file.read(1 << 22):
                        digest.update(chunk)
                        if named is not None:
                            own.update(chunk)
            except OSError as error:
                raise self.error(
                    f"{path.name} cannot be read ({error.strerror}); see that the disk is well"
                ) from error
            if named not in (None, own.hexdigest()):
                raise self.error(
                    f"{path.name} is damaged: its sha256 is not the one that the Hub knows it by; "
                    f"delete {path.resolve()} and download it again"
                )
        return digest.hexdigest()


def _sha256_of_blob(path: Path) -> str | None:
    """What the Hub's cache says of a large file: it is a link to a file named by its sha256."""
    name = path.resolve().name
    return name if path.is_symlink() and _SHA256.fullmatch(name) else None


def find_checkpoint(
    spec: str | Path,
    *,
    revision: str | None = None,
    weights: bool = True,
    trust_remote_code: bool = False,
) -> Checkpoint:
    """Resolves what a user wrote to files on this disk, downloading from the Hub if need be.

    Args:
        spec: a directory, a `.gguf` file, or a Hub id.
        revision: branch, tag or commit; for Hub ids only.
        weights: whether the weights are wanted, or the config alone.
        trust_remote_code: whether Python files are downloaded too.

    Raises:
        UserError: there is no such path, model or revision, or no connection to the Hub.
    """
    spec = str(spec)
    path = model_path(spec, revision)
    if path is not None:
        if path.is_dir():
            return Checkpoint(spec, str(path), path)
        return Checkpoint(spec, str(path), path.parent, gguf_file=path.name)
    patterns = _HUB_FILES if weights else ("config.json",)
    code = ("*.py",) if trust_remote_code else ()
    return Checkpoint(spec, spec, *snapshot(spec, revision, [*patterns, *code], _HUB_NOT))


def _gguf_header(path: Path) -> bytes:
    """The beginning of a GGUF file, with what it says of the model."""
    with path.open("rb") as file:
        return file.read(_GGUF_HEADER_BYTES)


def _quantized_message(method: Any) -> str:
    name = getattr(method, "value", method)
    return (
        f"the weights are quantised ({name}); convert the original 16-bit checkpoint, or "
        "de-quantise this one first (model.dequantize() in transformers, then save_pretrained)"
    )


def _one_line(message: object) -> str:
    return " ".join(str(message).split())
