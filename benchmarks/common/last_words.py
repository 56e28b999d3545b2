"""Last words of sentences: how often a model, reading greedily, says the word that ends one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from random import Random
from statistics import fmean
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tpa_convert.evaluation import Accuracy
from tpa_convert.forward.logits import split_head

ENDING = re.compile(r"(?<=[a-z,] )[a-z]{4,}(?=[.!?](?:\s|$))")
CONTEXT = 1000  # characters before the word


class LastWord(NamedTuple):
    """Token ids of a text that ends in a word, and how many of them are the word's."""

    ids: list[int]
    size: int


def last_words(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], count: int, seed: int = 0
) -> list[LastWord]:
    """At most `count` words that end sentences of the texts, drawn at random, after `CONTEXT`
    characters each; sentences nearer to the beginning of their text are left out."""
    found = [
        (text, match)
        for text in texts
        for match in ENDING.finditer(text)
        if match.start() >= CONTEXT
    ]
    words = []
    for text, match in Random(seed).sample(found, min(count, len(found))):
        before = text[match.start() - CONTEXT : match.start() - 1]
        start = len(tokenizer(before, verbose=False)["input_ids"])
        ids = tokenizer(f"{before} {match[0]}", verbose=False)["input_ids"]
        if start < len(ids):
            words.append(LastWord(ids, len(ids) - start))
    return words


@torch.inference_mode()
def last_word_accuracy(
    model: PreTrainedModel, words: Sequence[LastWord], batch_size: int = 32
) -> Accuracy:
    """Shares of words all of whose tokens are the likeliest ones, given those before."""
    body, head = split_head(model.eval())
    right: list[bool] = []
    for first in range(0, len(words), batch_size):
        batch = words[first : first + batch_size]
        # Padded on the right: under a causal mask the padding is seen by no real token.
        rows = pad_sequence([torch.tensor(word.ids) for word in batch], batch_first=True)
        features = body(rows.to(model.device))
        for word, states in zip(batch, features, strict=True):
            end = len(word.ids)
            likeliest = head(states[end - word.size - 1 : end - 1]).argmax(-1)
            right.append(likeliest.tolist() == word.ids[-word.size :])
    share = fmean(right)
    return Accuracy(share, share, tuple(right))
