"""Distillation as a transformers Trainer with its own loss."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel, Trainer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tpa_convert.healing.comparison import Comparison, chunked_comparison
from tpa_convert.healing.objective import (
    Divergence,
    chunked_divergence,
    forward_kl,
)

# Full blocks need no mask but causality. Under its own name, SDPA is called with `is_causal` and
# transformers builds no mask for it: building one costs a device synchronisation in every forward
# pass and, under torch.compile, a [batch, 1, length, length] mask that rules flash kernels out.
CAUSAL_SDPA = "tpa_convert_causal_sdpa"
AttentionInterface.register(CAUSAL_SDPA, sdpa_attention_forward)


def in_attention(name: str) -> bool:
    """Whether a parameter of this name belongs to an attention layer."""
    return "self_attn" in name.split(".")


def parameter_groups(
    model: nn.Module,
    *,
    attention_learning_rate: float,
    learning_rate: float,
    weight_decay: float,
) -> list[dict[str, Any]]:
    """AdamW's groups: `self_attn` parameters and the rest, each with and without weight decay.

    Norms and biases (fewer than two dimensions) do not decay. Parameters without `requires_grad`
    are left out, as are empty groups.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (in_attention(name), parameter.ndim >= 2)
            groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": attention_learning_rate if attention else learning_rate,
            "weight_decay": weight_decay if decays else 0.0,
        }
        for (attention, decays), parameters in sorted(groups.items(), reverse=True)
    ]


def modules_to_compile(model: PreTrainedModel) -> list[nn.Module]:
    """What to compile of a model: its layers, or the whole decoder if they differ in shape.

    Equal layers share one compiled graph, so that compilation takes seconds and not minutes. Layers
    that differ would each need a graph of their own, and every call would search through them.
    """
    decoder = model.get_decoder()
    layers = list(decoder.layers)
    shapes = {tuple(parameter.shape for parameter in layer.parameters()) for layer in layers}
    return layers if len(shapes) == 1 else [decoder]


@contextmanager
def block_forward(
    model: PreTrainedModel, compiled_modules: Iterable[nn.Module] = ()
) -> Iterator[None]:
    """Make forward passes over full, unpadded blocks fast; undone on leaving."""
    compiled_modules = list(compiled_modules)
    swap_attention = model.config._attn_implementation == "sdpa"
    if swap_attention:
        model.set_attn_implementation(CAUSAL_SDPA)
    for module in compiled_modules:
        module.forward = torch.compile(module.forward, dynamic=False)
    try:
        yield
    finally:
        for module in compiled_modules:
            del module.forward
        if swap_attention:
            model.set_attn_implementation("sdpa")


def final_hidden_states(model: nn.Module, causal_lm: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """What the output head would see: [B, L] token ids -> [B, L, D].

    Args:
        model: `causal_lm` as wrapped for training (DDP, ...) or itself. Its own forward is called,
            because wrappers synchronise gradients and gather shards there, but with an output head
            that lets hidden states through.
    """
    head = causal_lm.get_output_embeddings()
    head.forward = lambda hidden_states: hidden_states
    try:
        return model(input_ids=input_ids, use_cache=False).logits
    finally:
        del head.forward


class DistillationTrainer(Trainer):
    """Trains `model` towards the next-token distributions of `teacher`.

    Inputs are `{"input_ids": [B, L]}`; every token counts. The loss is the mean divergence per
    token in nats.

    Args:
        teacher: causal language model of the same vocabulary, of any floating dtype. It is moved to
            the training device.
        divergence: of a chunk's logits, see `objective.Divergence`.
        chunk_tokens: see `objective.chunked_divergence`.
        **kwargs: the Trainer's.
    """

    loss_is_scaled_for_ga = False

    def __init__(
        self,
        *,
        teacher: PreTrainedModel,
        divergence: Divergence = forward_kl,
        chunk_tokens: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        # Batches are of equal size, so a mean over batches is a mean over tokens.
        self.model_accepts_loss_kwargs = False
        self.teacher = teacher.to(self.args.device).eval()
        self.divergence = divergence
        self.chunk_tokens = chunk_tokens

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        input_ids = inputs["input_ids"]
        dtype = torch.bfloat16 if self.args.bf16 else torch.float32
        with self.accelerator.autocast():
            # Not inference_mode: its tensors cannot pass through compiled or sharded modules.
            with torch.no_grad():
                teacher_hidden = final_hidden_states(self.teacher, self.teacher, input_ids)
            student_hidden = final_hidden_states(model, self.model, input_ids)
        loss = chunked_divergence(
            student_hidden.to(dtype),
            self.model.get_output_embeddings().weight,
            teacher_hidden.to(dtype),
            self.teacher.get_output_embeddings().weight,
            divergence=self.divergence,
            chunk_tokens=self.chunk_tokens,
        )
        return (loss, {"loss": loss}) if return_outputs else loss

    @torch.no_grad()
    def compare(self, blocks: Tensor) -> Comparison:
        """Student beside teacher on held-out `blocks` [N, L], L >= 2.

        Whatever is minimised, the divergence here is the KL at temperature 1.
        """
        model = self.model_wrapped
        training = model.training
        model.eval()
        dtype = torch.bfloat16 if self.args.bf16 else torch.float32
        sums = torch.zeros(4, device=self.args.device)
        # Other shapes and modes than in training: not worth compiling for.
        with torch.compiler.set_stance("force_eager"):
            for batch in blocks.split(self.args.per_device_train_batch_size):
                input_ids = batch.to(self.args.device)
                with self.accelerator.autocast():
                    teacher_hidden = final_hidden_states(self.teacher, self.teacher, input_ids)
                    student_hidden = final_hidden_states(model, self.model, input_ids)
                sums += chunked_comparison(
                    student_hidden[:, :-1].flatten(0, 1).to(dtype),
                    self.model.get_output_embeddings().weight,
                    teacher_hidden[:, :-1].flatten(0, 1).to(dtype),
                    self.teacher.get_output_embeddings().weight,
                    input_ids[:, 1:].flatten(),
                )
        model.train(training)
        return Comparison.from_sums(sums, blocks[:, 1:].numel())
