"""A source's chat template as a script for sampling: whole chats, the user's turn too."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import FloatTensor, LongTensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from tpa_convert.errors import UserError
from tpa_convert.text.chat import apply_template

USER, ANSWER = "USERCONTENT", "ANSWERCONTENT"  # stand in for what the template is filled with
SPEAKS = -1  # in place of a token: here the model chooses


@dataclass(frozen=True)
class ChatScript:
    """A chat of one question and one answer, as token ids.

    Attributes:
        prefix: what comes before the question.
        question_end, answer_end: the token by which the model ends its turn.
        between: from there to the answer.
        after: from there to the end of the chat.
    """

    prefix: list[int]
    question_end: int
    between: list[int]
    answer_end: int
    after: list[int]


def chat_script(tokenizer: PreTrainedTokenizerBase) -> ChatScript:
    """Read the script off a tokenizer's chat template.

    Raises:
        UserError: the tokenizer has no chat template, or one that fails or does not mark the turns.
    """
    messages = [{"role": "user", "content": USER}, {"role": "assistant", "content": ANSWER}]
    try:
        text = apply_template(tokenizer, messages)
    except UserError as error:
        raise UserError(f"{error}; or leave out sampled_chat_tokens") from error
    before, _, rest = text.partition(USER)
    between, _, after = rest.partition(ANSWER)
    after = after or tokenizer.eos_token or ""
    if not (before and between and after):
        raise UserError(
            "the source's chat template does not mark where a turn begins and ends, so no chats "
            "can be sampled: leave out sampled_chat_tokens"
        )
    question_end, between_ids = _end_and_rest(tokenizer, between)
    answer_end, after_ids = _end_and_rest(tokenizer, after)
    return ChatScript(_ids(tokenizer, before), question_end, between_ids, answer_end, after_ids)


class ChatTurns(LogitsProcessor):
    """Lets the model write both turns of a chat and fills in the template; then the next chat.

    For one call of `generate()` on prompts that end with the script's prefix.

    Args:
        batch_size: sequences of that call.
    """

    def __init__(self, script: ChatScript, batch_size: int, device: torch.device):
        between, rest = script.between, [*script.after, *script.prefix]
        self.script = torch.tensor([SPEAKS, *between, SPEAKS, *rest], device=device)
        self.ends = torch.full_like(self.script, SPEAKS)
        self.ends[0] = script.question_end
        self.ends[1 + len(between)] = script.answer_end
        # where each sequence's last token was written: at first at the end of the prefix
        self.place = torch.full((batch_size,), len(self.script) - 1, device=device)

    def __call__(self, input_ids: LongTensor, scores: FloatTensor) -> FloatTensor:
        """`scores` [B, V], with one token left where the script has one. Waits for no device."""
        written = self.script[self.place] != SPEAKS
        moves = written | (input_ids[:, -1] == self.ends[self.place])
        self.place = (self.place + moves) % len(self.script)
        token = self.script[self.place, None]
        fixed = token != SPEAKS
        index = token.clamp(min=0)
        kept = torch.where(fixed, 0.0, scores.gather(1, index))
        return scores.masked_fill(fixed, -torch.inf).scatter(1, index, kept)  # type: ignore[return-value]


def _end_and_rest(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, list[int]]:
    """The token that ends a turn, special if there is such a one, and the tokens after it."""
    ids = _ids(tokenizer, text)
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    at = next((i for i, token in enumerate(ids) if token in special), 0)
    return ids[at], ids[at + 1 :]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]
