"""The token blocks of a healing run: from text, and sampled from the source."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tpa_convert.errors import UserError
from tpa_convert.export.output import atomic_file
from tpa_convert.healing.training.checks import check_step
from tpa_convert.healing.training.distributed import processes
from tpa_convert.healing.training.sampling import sample_blocks
from tpa_convert.options.healing import HealOptions
from tpa_convert.progress import Track
from tpa_convert.sources import Source
from tpa_convert.text.mixture import Mixture, mixture_blocks


def blocks_of_text(options: HealOptions) -> int:
    """How many blocks of a run come from text; the others are sampled.

    Raises:
        UserError: more is to be sampled than there is to train on, or nothing is left for the text.
    """
    check_step(options.tokens_per_step, options.block_length)
    wanted = options.steps * (options.tokens_per_step // options.block_length)
    sampled = sum(
        math.ceil(tokens / options.block_length)
        for tokens in (options.sampled_tokens, options.sampled_chat_tokens)
    )
    if sampled > wanted - bool(options.text):
        left = ", and some are for the text" if options.text else ""
        raise UserError(
            f"{sampled * options.block_length:,} tokens to sample are too many: the run trains on "
            f"{wanted * options.block_length:,}{left}"
        )
    return wanted - sampled


def training_blocks(
    options: HealOptions,
    text_blocks: int,
    teacher: Source,
    mixture: Mixture,
    directory: Path,
    track: Track,
) -> Tensor:
    """The text of a run as token blocks [N, L], of any integer type.

    Args:
        text_blocks: how many come from the mixture, if it has any text.
        directory: where sampled blocks are kept, for runs that continue or begin again.
    """
    parts = []
    if mixture:
        blocks = mixture_blocks(
            mixture, teacher.tokenizer, options.block_length, text_blocks, options.seed
        )
        parts.append(blocks.numpy())
    for tokens, chat in ((options.sampled_tokens, False), (options.sampled_chat_tokens, True)):
        if tokens:
            parts.append(_sampled_blocks(options, tokens, chat, teacher, directory, track))
    return torch.from_numpy(np.concatenate(parts) if len(parts) > 1 else parts[0])


def has_sampled_blocks(directory: Path) -> bool:
    """Whether a directory keeps any."""
    return any(directory.glob("sampled_*.npy"))


def _sampled_blocks(
    options: HealOptions, tokens: int, chat: bool, teacher: Source, directory: Path, track: Track
) -> np.ndarray:
    made_with = {
        "source": asdict(teacher.reference),
        "tokens": tokens,
        "block_length": options.block_length,
        "seed": options.seed,
    }
    digest = hashlib.sha256(json.dumps(made_with, sort_keys=True).encode()).hexdigest()[:16]
    path = directory / f"sampled_{'chat' if chat else 'text'}_{digest}.npy"
    with processes().main_process_first():
        if not path.is_file():
            sampled = sample_blocks(
                teacher.model.to("cuda" if torch.cuda.is_available() else "cpu"),
                teacher.tokenizer,
                tokens,
                options.block_length,
                chat=chat,
                seed=options.seed,
                track=track,
            )
            with atomic_file(path) as temporary, open(temporary, "wb") as file:
                np.save(file, sampled.numpy().astype(np.int32))
    return np.load(path)
