"""Token ids that a model has no embedding for: told before a pass runs, not from inside of it."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from tpa_convert.errors import UserError

CHUNK = 1 << 12  # rows that are made another type at once


def check_ids(model: PreTrainedModel, largest: int | Tensor) -> None:
    """Refuse ids beyond the rows of a model's embedding, as added tokens have where a tokenizer
    was changed and its model was not.

    Args:
        largest: the largest id, or all ids.

    Raises:
        UserError: names the largest id and the rows.
    """
    if isinstance(largest, Tensor):
        # Some types of token ids (uint16) have no largest number to torch.
        parts = largest.split(CHUNK) if largest.numel() else ()
        largest = max((int(part.int().max()) for part in parts), default=0)
    rows = len(model.get_input_embeddings().weight)
    if largest >= rows:
        raise UserError(
            f"the text has token id {largest}, and the embedding of {type(model).__name__} only "
            f"{rows} rows: its tokenizer has tokens added that the model does not know; take the "
            "tokenizer that belongs to the model, or text without these tokens"
        )
