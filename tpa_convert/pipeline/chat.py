"""Talk to a converted model, with its cache in view."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.generation.streamers import TextStreamer

from tpa_convert.errors import UserError
from tpa_convert.export.inspection import inspect
from tpa_convert.export.save import load_converted
from tpa_convert.forward.cached import cache_name
from tpa_convert.options.usage import ChatOptions
from tpa_convert.pipeline.selection import usable_device


@dataclass(frozen=True)
class Progress:
    """An answer as far as it has come.

    Attributes:
        text: all of it so far.
        tokens: of it.
        speed: of decoding, tokens a second; None before the second token.
        cached_tokens: of the whole chat that the cache holds.
        cache_bytes: that it takes, measured.
        source_bytes: that the source's would take.
    """

    text: str
    tokens: int
    speed: float | None
    cached_tokens: int
    cache_bytes: int
    source_bytes: int


Watch = Callable[[Progress], None]


class Chat:
    """A conversation. What was said stays in the cache from one turn to the next.

    Models without a chat template continue the text of the conversation as it is.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        options: ChatOptions,
        source_bytes_per_token: int,
    ):
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.source_bytes_per_token = source_bytes_per_token
        self.clear()
        set_seed(options.seed)

    def clear(self) -> None:
        """Forgets what was said."""
        system = self.options.system
        self.messages = [{"role": "system", "content": system}] if system else []
        self._forget_cache()

    def _forget_cache(self) -> None:
        self.cache = DynamicCache(config=self.model.config)
        self.cached: list[int] = []  # tokens

    def say(self, text: str, watch: Watch) -> Progress:
        """The answer to `text`; `watch` sees it come.

        Ctrl-C ends the answer where it is, and is raised on.

        Raises:
            UserError: the conversation does not fit into the model's context.
        """
        self.messages.append({"role": "user", "content": text})
        tokens = self._tokens()
        self._check_room(len(tokens))
        if self.cached != tokens[: len(self.cached)]:
            self._forget_cache()  # the template writes the past in another way than it was said
        follower = _Follower(self, watch)
        ended = False
        try:
            output = self.model.generate(
                torch.tensor([tokens], device=self.model.device),
                **{cache_name(self.model): self.cache},
                streamer=follower,
                max_new_tokens=self.options.max_new_tokens,
                pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
                **self._sampling(),
            )
            self.cached = output[0, : self.cache.get_seq_length()].tolist()
            ended = True
        finally:
            answer = {"role": "assistant", "content": follower.text}
            self.messages.append(answer)
            if not ended:
                self._forget_cache()
        return follower.progress()

    def _tokens(self) -> list[int]:
        """Of the whole conversation, up to where the answer begins."""
        if self.tokenizer.chat_template is not None:
            encoded: Any = self.tokenizer.apply_chat_template(
                self.messages, add_generation_prompt=True, return_dict=True
            )
            return list(encoded["input_ids"])
        text = "".join(message["content"] for message in self.messages)
        return list(self.tokenizer(text)["input_ids"])  # type: ignore[arg-type]

    def _check_room(self, tokens: int) -> None:
        context = getattr(self.model.config, "max_position_embeddings", None)
        if context is not None and tokens >= context:
            self.messages.pop()
            raise UserError(
                f"the chat has {tokens} tokens and the model's context {context}: begin another "
                "with /clear"
            )

    def _sampling(self) -> dict[str, Any]:
        options = self.options
        if options.temperature == 0:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p}


class _Follower(TextStreamer):
    """Follows an answer token by token."""

    def __init__(self, chat: Chat, watch: Watch):
        super().__init__(
            chat.tokenizer,  # type: ignore[arg-type]
            skip_prompt=True,
            skip_special_tokens=True,
        )
        self.chat, self.watch = chat, watch
        self.text, self.count, self.begun, self.seconds = "", 0, 0.0, 0.0

    def put(self, value: Any) -> None:
        if not self.next_tokens_are_prompt:
            now = time.perf_counter()
            self.begun = self.begun or now
            self.count += 1
            self.seconds = now - self.begun
        super().put(value)
        if self.count:
            self.watch(self.progress())

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text

    def progress(self) -> Progress:
        cache = self.chat.cache
        held = [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None]
        tokens = cache.get_seq_length()
        return Progress(
            text=self.text,
            tokens=self.count,
            speed=(self.count - 1) / self.seconds if self.seconds else None,
            cached_tokens=tokens,
            cache_bytes=sum(tensor.nbytes for tensor in held),
            source_bytes=tokens * self.chat.source_bytes_per_token,
        )


def chat(directory: str | Path, options: ChatOptions, *, device: str = "auto") -> Chat:
    """Begin a chat with the converted model in `directory`.

    Raises:
        UserError: there is none, or no such device.
    """
    place = usable_device(device)
    model, tokenizer = load_converted(directory, device=place)
    return Chat(model, tokenizer, options, inspect(directory).source_kv_bytes)
