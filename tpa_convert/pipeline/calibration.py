"""Calibration text and moments, as the options of a command say."""

from __future__ import annotations

from torch import Tensor

from tpa_convert.calibration.cache_moments import collect_cache_moments
from tpa_convert.calibration.moments import Moments, collect_moments
from tpa_convert.export.output import atomic_file
from tpa_convert.options.conversion import CalibrationOptions
from tpa_convert.progress import Track
from tpa_convert.sources import Source
from tpa_convert.storage import Store
from tpa_convert.text.read import default_calibration_documents, load_documents, token_blocks


def calibration_blocks(source: Source, options: CalibrationOptions) -> Tensor:
    """Token blocks of the calibration text, int64 [N, block_length].

    Raises:
        UserError: no such text, or too little of it.
    """
    if options.calibration:
        documents = load_documents(options.calibration, text_column=options.text_column)
    else:
        documents = default_calibration_documents()
    return token_blocks(
        documents,
        source.tokenizer,
        options.block_length,
        options.calibration_blocks,
        seed=options.seed,
    )


def moments_of(
    source: Source,
    blocks: Tensor | None,
    options: CalibrationOptions,
    track: Track,
    *,
    coded: bool,
    store: Store | None = None,
) -> Moments:
    """The moments a user has kept, or else those of `blocks`, which are kept if asked.

    Args:
        coded: whether they are for a cache coded in bits.
        store: gets what is measured, as `collect_moments` and `collect_cache_moments` say.

    Raises:
        UserError: the file of kept moments is missing or something else.
    """
    if options.moments is not None:
        moments = Moments.load(options.moments)
        moments.check(source.reference.sha256, coded)
        return moments
    assert blocks is not None
    if coded:
        moments = collect_cache_moments(source, blocks, seed=options.seed, track=track, store=store)
    else:
        moments = collect_moments(source, blocks, track=track, store=store)
    if options.save_moments is not None:
        with atomic_file(options.save_moments) as path:
            moments.save(path)
    return moments
