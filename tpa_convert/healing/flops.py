"""How much arithmetic a token of healing costs, and how much a GPU can do."""

from __future__ import annotations

import re

from transformers import PreTrainedConfig, PreTrainedModel

from tpa_convert.modeling import TPAConfig

# Dense bfloat16 operations per second that the makers state, by a word of the device's name. The
# first that fits counts.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "A40": 150e12,
    "A10": 125e12,
    "A10G": 70e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def peak_flops(device_name: str) -> float | None:
    """Dense bfloat16 operations per second of a GPU of this name; None if it is not known."""
    return next(
        (peak for name, peak in PEAK_FLOPS.items() if re.search(rf"\b{name}\b", device_name)), None
    )


def flops_per_token(student: PreTrainedModel, teacher: PreTrainedModel, block_length: int) -> float:
    """Floating-point operations of one training token: 6 N_student + 2 N_teacher + attention.

    N counts what a token is multiplied with, so an embedding table only where it is tied to the
    output head. Attention is causal, hence half of a full square. Recomputation for gradient
    checkpointing does not count, and neither does it matter which parameters are trained.

    Args:
        student: forward and backward.
        teacher: forward only.
        block_length: tokens that attend to each other.
    """
    return 3 * _forward(student, block_length) + _forward(teacher, block_length)


def _forward(model: PreTrainedModel, block_length: int) -> float:
    parameters = model.num_parameters()
    if not model.config.get_text_config().tie_word_embeddings:
        parameters -= model.get_input_embeddings().weight.numel()
    # Scores and weighted sums: two operations for each number of a key and of a value, and each
    # token attends to half the block.
    return 2 * parameters + block_length * _attended_numbers(model.config.get_text_config())


def _attended_numbers(config: PreTrainedConfig) -> int:
    """Numbers of keys and values that a query position meets, over all query heads and layers."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    numbers = 2 * head_dim * config.num_hidden_layers
    if isinstance(config, TPAConfig):
        shapes = [config.layer_shape(i) for i in range(config.num_hidden_layers)]
        numbers = sum(
            shape.width_k + shape.width_v if shape.gauge == "absorbed" else 2 * head_dim
            for shape in shapes
        )
    return config.num_attention_heads * numbers
