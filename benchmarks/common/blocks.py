"""Text as blocks of tokens: read, tokenised, kept in files of NumPy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tpa_convert.evaluation.texts import blocks_by_source
from tpa_convert.sources import Source
from tpa_convert.text.read import default_calibration_documents, load_documents, token_blocks
from tpa_convert.text.tokens import begin


def train_blocks(
    path: str, source: Source, length: int, count: int | None = None, *, seed: int = 0
) -> Tensor:
    """Token blocks [count, length] of the training text, shuffled; `shipped`: the package's."""
    if path == "shipped":
        documents = default_calibration_documents()
        return token_blocks(documents, source.tokenizer, length, count, seed=seed)
    if not path.endswith((".npy", ".npz")):
        given = load_documents(path)
        return token_blocks(given, source.tokenizer, length, count, seed=seed)
    parts = [part for file in path.split(",") for part in load_blocks(file, length).values()]
    blocks = torch.cat(parts)
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))
    return begin(blocks[order[:count]].long(), source.tokenizer)


def valid_blocks(path: str, source: Source, length: int, max_blocks: int) -> Mapping[str, Tensor]:
    """Token blocks [N <= max_blocks, length] of each source of the held-out text."""
    found: Mapping[str, Tensor]
    if path.endswith(".npz"):
        found = {k: part[:max_blocks].long() for k, part in load_blocks(path, length).items()}
    else:
        found = blocks_by_source(source.tokenizer, load_documents(path), length, max_blocks)
    return {name: begin(part, source.tokenizer) for name, part in found.items()}


def save_blocks(path: str, blocks: Mapping[str, Tensor]) -> None:
    """Writes token blocks, by name in an .npz or those of the only name in an .npy, in the
    smallest type that holds them."""
    arrays = {name: part.numpy() for name, part in blocks.items()}
    dtype = np.min_scalar_type(max(256, *(array.max() for array in arrays.values())))
    arrays = {name: array.astype(dtype) for name, array in arrays.items()}
    if path.endswith(".npz"):
        np.savez_compressed(path, **arrays)  # type: ignore[arg-type]
    else:
        [array] = arrays.values()
        np.save(path, array)


def load_blocks(path: str, length: int) -> dict[str, Tensor]:
    """What `save_blocks` wrote, as blocks of this length; what is left of a row is left out."""
    found = np.load(path)
    arrays = dict(found) if path.endswith(".npz") else {Path(path).stem: found}
    if any(array.shape[1] < length for array in arrays.values()):
        raise SystemExit(f"{path} has blocks of less than {length} tokens")
    return {
        name: torch.from_numpy(
            array[:, : array.shape[1] // length * length].reshape(-1, length).astype(np.int32)
        )
        for name, array in arrays.items()
    }
