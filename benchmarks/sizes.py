"""What conversion needs, and what fits afterwards, by the size of the model; as Markdown.

    python benchmarks/sizes.py

Nothing is downloaded and no weights are made: `tpa-convert convert --dry-run` needs a config only.
Times are predictions for the processor that this runs on.
"""

from __future__ import annotations

import tempfile
from typing import Any

from transformers import LlamaConfig, MixtralConfig, PreTrainedConfig

from common.machine import device_name, versions
from tpa_convert import pipeline
from tpa_convert.recipe import ConvertOptions, SourceOptions

NUMBER = 2  # bytes of a number in the weights and in the source's cache


def llama(
    hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int, tied: bool = False
) -> Any:
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        max_position_embeddings=131_072,
        tie_word_embeddings=tied,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )


MODELS: dict[str, PreTrainedConfig] = {
    "Llama 3.2 1B": llama(2048, 8192, 16, 32, 8, 128_256, tied=True),
    "Llama 2 7B": llama(4096, 11_008, 32, 32, 32, 32_000),
    "Llama 3 8B": llama(4096, 14_336, 32, 32, 8, 128_256),
    "Llama 3 70B": llama(8192, 28_672, 80, 64, 8, 128_256),
    "Mixtral 8x7B": MixtralConfig(architectures=["MixtralForCausalLM"], dtype="bfloat16"),
}
MEMORIES = (24, 80)  # GB of a GPU


def fitting(memory: float, weights: float, bytes_per_token: float) -> str:
    """Tokens of cache beside the weights, in thousands."""
    left = memory * 1e9 - weights
    return f"{left / bytes_per_token / 1000:,.0f}" if left > 0 else "–"


def row(name: str, config: PreTrainedConfig, ratio: float) -> str:
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        found = pipeline.preview(
            SourceOptions(model=folder),
            ConvertOptions(kv_ratio=ratio, calibration_blocks=32),
            with_needs=True,
        )
    assert found.needs is not None
    before, after = NUMBER * found.source_parameters, NUMBER * found.parameters
    cells = [
        name,
        f"{before / 1e9:,.1f}",
        f"{100 * (after / before - 1):+.1f} %",
        f"{found.source_kv_bytes:,}",
        f"{found.kv_bytes:,}",
        *(
            f"{fitting(memory, before, found.source_kv_bytes)} → "
            f"{fitting(memory, after, found.kv_bytes)}"
            for memory in MEMORIES
        ),
        f"{found.needs.memory / 1e9:.1f}",
        f"{found.needs.disk / 1e9:.0f}",
        f"{found.needs.seconds / 3600:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    print(f"{device_name()}, {versions()}\n")
    columns = [
        "model",
        "weights, GB",
        "grow by",
        "source, bytes a token",
        "converted",
        *(f"thousand tokens in {memory} GB" for memory in MEMORIES),
        "memory to convert, GB",
        "disk, GB",
        "hours without a GPU",
    ]
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|")
    for name, config in MODELS.items():
        print(row(name, config, 0.125), flush=True)


if __name__ == "__main__":
    main()
