"""How much arithmetic a token of healing costs."""

from __future__ import annotations

from transformers import PreTrainedConfig, PreTrainedModel

from tpa_convert.modeling import TPAConfigMixin, source_head_dim


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
    if not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        parameters -= model.get_input_embeddings().weight.numel()
    # Scores and weighted sums: two operations for each number of a key and of a value, and each
    # token attends to half the block.
    return 2 * parameters + block_length * _attended_numbers(model.config.get_text_config())


def _attended_numbers(config: PreTrainedConfig) -> int:
    """Numbers of keys and values that a query position meets, over all query heads and layers."""
    head_dim = source_head_dim(config)
    if not isinstance(config, TPAConfigMixin):
        return config.num_attention_heads * 2 * head_dim * config.num_hidden_layers
    numbers = 0
    for shape in config.layer_shapes:
        numbers += shape.width_k if shape.key_gauge == "absorbed" else head_dim
        numbers += shape.width_v if shape.value_gauge == "absorbed" else head_dim
    return config.num_attention_heads * numbers
