"""Variants of a model measured side by side, layer by layer: none of them has to be in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from tpa_convert.forward.comparison import Tally
from tpa_convert.forward.logits import chunk_positions, split_head
from tpa_convert.forward.walk import DecoderWalk
from tpa_convert.progress import Track, no_tracking
from tpa_convert.sources import Source, held

BATCH_SIZE = 8  # blocks that go through a layer at once

Variant = Callable[[int], AbstractContextManager[Any]]
"""Makes the source's decoder layer of an index that of the variant, until its context is left."""


@torch.no_grad()
def compare_variants(
    source: Source,
    blocks: Tensor,
    variants: Sequence[Variant],
    *,
    track: Track = no_tracking,
) -> list[tuple[float, float]]:
    """Perplexity, and KL(source ‖ model) in nats a token, of the source and then of all variants.

    Args:
        blocks: token ids [N, L], L >= 2; the first token of each is not predicted.
        track: shows progress over the layers.
    """
    model = source.model
    walk = DecoderWalk(model, blocks, BATCH_SIZE, source.family.names.attention)
    states = [walk.states, *(walk.states.clone() for _ in variants)]
    unchanged: Variant = lambda _: nullcontext()  # noqa: E731
    for index in track(range(len(walk.layers)), "measuring plans"):
        with held(walk.layers[index]):
            for variant, hidden in zip((unchanged, *variants), states, strict=True):
                with variant(index):
                    for batch in walk.batches:
                        hidden[batch] = walk.run(index, hidden[batch])
    _, head = split_head(model)
    step = chunk_positions(model)
    names = [str(i) for i in range(len(states))]
    tally = Tally(names, walk.states.device)
    with held(model.get_output_embeddings()):
        for block, tokens in enumerate(blocks.to(walk.states.device)):
            features = [walk.final(hidden[block : block + 1])[0, :-1] for hidden in states]
            for start in range(0, len(tokens) - 1, step):
                part = slice(start, min(start + step, len(tokens) - 1))
                logits = (head(feature[part]) for feature in features)
                tally.add(logits, tokens[1:][part])
    texts, agreements = tally.results()
    return [
        (texts[name].perplexity, agreements[name].kl if name in agreements else 0.0)
        for name in names
    ]
