"""How much arithmetic a token of healing costs."""

from __future__ import annotations

from transformers import PreTrainedConfig, PreTrainedModel

from tpa_convert.modeling import TPAConfig


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
        numbers = 0
        for shape in shapes:
            absorbed = shape.gauge == "absorbed"
            numbers += shape.width_k if absorbed and not shape.latent_keys else head_dim
            numbers += shape.width_v if absorbed else head_dim
    return config.num_attention_heads * numbers
