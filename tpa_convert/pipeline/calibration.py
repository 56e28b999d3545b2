"""Calibration text and moments, as the options of a command say."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tpa_convert.calibration.cache_moments import collect_cache_moments
from tpa_convert.calibration.moments import Moments, collect_moments
from tpa_convert.export.output import atomic_file
from tpa_convert.healing.training.sampling import can_sample, sample_blocks
from tpa_convert.options.conversion import CalibrationOptions
from tpa_convert.progress import Track, no_tracking
from tpa_convert.sources import Source, in_memory
from tpa_convert.storage import Store
from tpa_convert.text.read import default_calibration_documents, load_documents, token_blocks

# Parameters of a source that samples text unasked: smaller ones write none worth measuring on, and
# larger ones would have to be in memory meanwhile.
SAMPLED_FROM, SAMPLED_UP_TO = 50e6, 2e9
# Tokens of a sampled text; several fill a block, as in packed training text. Sampled side by side
# they take as many steps as one of them has tokens.
SAMPLED_LENGTH = 128


def sampled_blocks(options: CalibrationOptions, parameters: int) -> int:
    """How many sequences a source of so many parameters samples itself."""
    if options.sampled_blocks is not None:
        return options.sampled_blocks
    if options.calibration or not SAMPLED_FROM <= parameters <= SAMPLED_UP_TO:
        return 0
    return options.calibration_blocks // 2


def calibration_blocks(
    source: Source, options: CalibrationOptions, track: Track = no_tracking
) -> Tensor:
    """`with_sampled` of `text_blocks`."""
    return with_sampled(source, options, text_blocks(source, options), track)


def text_blocks(source: Source, options: CalibrationOptions) -> Tensor:
    """Token blocks of the calibration text, int64 [N, block_length], none if all are sampled.

    Raises:
        UserError: no such text, or too little of it.
    """
    count = options.calibration_blocks - samples(source, options)
    if count == 0:
        return torch.empty(0, options.block_length, dtype=torch.int64)
    if options.calibration:
        documents = load_documents(options.calibration, text_column=options.text_column)
    else:
        documents = default_calibration_documents()
    return token_blocks(documents, source.tokenizer, options.block_length, count, seed=options.seed)


def with_sampled(
    source: Source,
    options: CalibrationOptions,
    text: Tensor,
    track: Track,
    kept: Path | None = None,
) -> Tensor:
    """Blocks of text [N, block_length] among those that the source samples, in random order.

    Args:
        kept: a file that keeps what is sampled, for runs that go on.

    Raises:
        UserError: the source is asked to sample and has no token to start from.
    """
    count = samples(source, options)
    if count == 0:
        return text
    blocks = torch.cat((text, _sampled(source, options, count, track, kept)))
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(options.seed))
    return blocks[order]


def samples(source: Source, options: CalibrationOptions) -> int:
    """How many blocks `with_sampled` samples: `sampled_blocks`, none unasked where the source has
    nothing to start from."""
    asked = options.sampled_blocks is not None
    if not asked and not can_sample(source.tokenizer, options.block_length):
        return 0
    return sampled_blocks(options, source.model.num_parameters())


def _sampled(
    source: Source, options: CalibrationOptions, count: int, track: Track, kept: Path | None
) -> Tensor:
    if kept is not None and kept.is_file():
        return torch.from_numpy(np.load(kept))
    length = options.block_length
    texts = math.ceil(length / SAMPLED_LENGTH)  # in a block
    each = math.ceil(length / texts)
    with in_memory(source.model):
        sampled = sample_blocks(
            source.model,
            source.tokenizer,
            count * texts * each,
            each,
            seed=options.seed,
            track=track,
        )
    blocks = sampled.view(count, texts * each)[:, :length].contiguous()
    if kept is not None:
        with atomic_file(kept) as path, open(path, "wb") as file:
            np.save(file, blocks.numpy())
    return blocks


def kept_moments(source: Source, options: CalibrationOptions, *, coded: bool) -> Moments | None:
    """The moments that a user has kept of an earlier run, if there are any.

    Args:
        coded: whether they are for a cache coded in bits.

    Raises:
        UserError: the file is missing or something else, or its moments are of another source.
    """
    if options.moments is None:
        return None
    moments = Moments.load(options.moments)
    moments.check(source.reference.sha256, coded)
    return moments


def moments_of(
    source: Source,
    blocks: Tensor,
    options: CalibrationOptions,
    track: Track,
    *,
    coded: bool,
    store: Store | None = None,
) -> Moments:
    """The moments of `blocks`, which are kept if asked.

    Args:
        coded: whether they are for a cache coded in bits.
        store: gets what is measured, as `collect_moments` and `collect_cache_moments` say.
    """
    if coded:
        moments = collect_cache_moments(source, blocks, seed=options.seed, track=track, store=store)
    else:
        moments = collect_moments(source, blocks, track=track, store=store)
    if options.save_moments is not None:
        with atomic_file(options.save_moments) as path:
            moments.save(path)
    return moments
