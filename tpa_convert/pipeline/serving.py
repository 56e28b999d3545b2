"""Serve a converted model with transformers' own server."""

from __future__ import annotations

import importlib
import inspect
import socket
from contextlib import closing
from math import ceil
from pathlib import Path
from typing import Any

from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.import_utils import is_serve_available

from tpa_convert.dtypes import named_dtype
from tpa_convert.errors import UserError
from tpa_convert.export.inspection import cached_bytes
from tpa_convert.export.inspection import inspect as inspect_directory
from tpa_convert.export.save import load_tokenizer
from tpa_convert.families import FAMILIES
from tpa_convert.modeling.legacy import TPAForCausalLM
from tpa_convert.options.usage import ServeOptions
from tpa_convert.pipeline.selection import usable_device
from tpa_convert.places.models import check_converted

PAGE = 256  # tokens of a block, transformers' own choice
TOKENS_ON_CPU = 32_768
BATCH_ON_CPU = 1_024


def serve(directory: str | Path, options: ServeOptions, *, device: str = "auto") -> None:
    """Answers requests of OpenAI's kind until it is stopped.

    Raises:
        UserError: no converted model in `directory`, packages missing, the port is taken, or no
            such attention.
    """
    check_converted(directory)
    if not is_serve_available():
        raise UserError("a server needs some packages: pip install 'tpa-convert[serve]'")
    _check_port(options.host, options.port)
    _check_attention(options.attention)
    server = importlib.import_module("transformers.cli.serve").Serve
    register_classes()
    place = usable_device(device)
    wanted: dict[str, Any] = {
        "force_model": str(directory),
        "host": options.host,
        "port": options.port,
        "device": place,
        "dtype": options.dtype or "auto",
        "continuous_batching": options.continuous_batching,
    }
    if options.attention is not None:
        wanted["attn_implementation"] = options.attention
    if options.continuous_batching:
        wanted |= paged_sizes(directory, options, place)
    known = inspect.signature(server.__init__).parameters
    stopping(server)(**{name: value for name, value in wanted.items() if name in known})


def stopping(server: Any) -> Any:
    """The server with an end: transformers leaves the thread of continuous batching running, and a
    process that is asked to stop would stay."""

    class Stopping(server):
        def __init__(self, **arguments: Any):
            try:
                super().__init__(**arguments)
            finally:
                state = getattr(self, "_generation_state", None)
                if state is not None:
                    state.shutdown()

    return Stopping


def register_classes() -> None:
    """Has the server find our classes, which it looks up in transformers by their names."""
    manager = importlib.import_module("transformers.cli.serving.model_manager")
    for causal_lm in (*(family.causal_lm for family in FAMILIES), TPAForCausalLM):
        setattr(manager.transformers, causal_lm.__name__, causal_lm)


def has_chat_template(directory: str | Path) -> bool:
    """Whether chats can be served, or only plain completions.

    Raises:
        UserError: no converted model in `directory`, or none with a tokenizer.
    """
    check_converted(directory)
    return getattr(load_tokenizer(directory), "chat_template", None) is not None


def paged_sizes(directory: str | Path, options: ServeOptions, device: str) -> dict[str, Any]:
    """Sizes of the paged cache. On a GPU transformers takes what is free, unless told otherwise; on
    a CPU that would be most of the main memory.

    Blocks count as the source's would, in which fewer tokens fit; both in the type to compute in,
    which codes do not follow.
    """
    tokens, batch = options.cache_tokens, options.batch_tokens
    if device == "cpu":
        tokens, batch = tokens or TOKENS_ON_CPU, batch or BATCH_ON_CPU
    sizes: dict[str, Any] = {}
    if tokens is not None:
        found = inspect_directory(directory)
        saved = named_dtype(found.dtype).itemsize
        itemsize = named_dtype(options.dtype).itemsize if options.dtype else saved
        own = sum(sum(cached_bytes(shape, found.kv_heads, itemsize)) for shape in found.shapes)
        blocks = tokens / PAGE * own / (found.source_kv_bytes * itemsize / saved)
        sizes["cb_num_blocks"] = ceil(blocks)
    if batch is not None:
        sizes["cb_max_batch_tokens"] = batch
    return sizes


def _check_attention(name: str | None) -> None:
    """Of transformers, or a kernel on the Hub (OWNER/NAME)."""
    known = {"eager", *(key for key in ALL_ATTENTION_FUNCTIONS.valid_keys() if "|" not in key)}
    if name is not None and name not in known and "/" not in name:
        raise UserError(f"`attention` must be one of {', '.join(sorted(known))}, not {name}")


def _check_port(host: str, port: int) -> None:
    """Before a model is loaded for nothing."""
    try:
        with closing(socket.create_server((host, port))):
            pass
    except OSError as error:
        raise UserError(
            f"cannot listen on {host}:{port} ({error.strerror}): choose another `port`"
        ) from error
