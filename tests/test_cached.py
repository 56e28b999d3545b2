"""The cache of an output is found and passed on under the name of the installed transformers."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers.utils import logging as transformers_logging

from tests.conftest import make_tiny_llama
from tpa_convert.evaluation import SpeedSettings, cache_bytes, measure_speed
from tpa_convert.forward.cached import cache_argument, cache_of


def test_the_cache_is_found_and_passed_on() -> None:
    model, tokens = make_tiny_llama(), torch.arange(3, 15)[None]
    with torch.no_grad():
        whole = model(tokens).logits[:, -1]
        start = model(tokens[:, :-1], use_cache=True)
        assert cache_of(start).get_seq_length() == tokens.shape[1] - 1
        step = model(tokens[:, -1:], **cache_argument(start)).logits[:, -1]
        forgetful = model(tokens[:, -1:]).logits[:, -1]
    torch.testing.assert_close(step, whole)
    assert not torch.allclose(forgetful, whole)  # so the cache matters


def test_without_a_cache_there_is_none() -> None:
    output = make_tiny_llama()(torch.arange(3, 15)[None], use_cache=False)
    assert cache_of(output) is None
    assert cache_argument(output) == {}


def test_measuring_is_not_deprecated(caplog: pytest.LogCaptureFixture) -> None:
    """transformers tells of renamed names through its logger, once in a process."""
    for module in ("generic", "deprecation"):
        logger = transformers_logging.get_logger(f"transformers.utils.{module}")
        type(logger).warning_once.cache_clear()
    root = logging.getLogger("transformers")
    root.addHandler(caplog.handler)
    try:
        model = make_tiny_llama()
        cache_bytes(model)
        measure_speed({"m": model}, SpeedSettings(prompt=8, new_tokens=2, repeats=1))
    finally:
        root.removeHandler(caplog.handler)
    assert not [r.message for r in caplog.records if "deprecated" in r.message]
