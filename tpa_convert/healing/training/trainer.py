"""Distillation as a transformers Trainer with its own loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_module
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from tpa_convert.forward.divergence import (
    Divergence,
    chunked_divergence,
    forward_kl,
    hidden_distance,
)
from tpa_convert.forward.head import (
    decoder_output,
    final_hidden_states,
    logit_finish,
    with_head_input,
)
from tpa_convert.forward.walk import attention_modules
from tpa_convert.healing.loss.comparison import Comparison, chunked_comparison
from tpa_convert.healing.training.distributed import (
    from_first,
    gathered,
    outline,
    shard,
    sharding,
)

CHANNEL_BLOCKS = 8  # training sequences whose hidden states say how much each channel varies
CHANNEL_FLOOR = 1e-6  # least variance of a channel, of the mean over channels


def attention_parameters(model: PreTrainedModel) -> set[nn.Parameter]:
    """The parameters of all attention modules."""
    return {p for module in attention_modules(model) for p in module.parameters()}


def parameter_groups(
    model: PreTrainedModel,
    *,
    attention_learning_rate: float,
    learning_rate: float,
    weight_decay: float,
) -> list[dict[str, Any]]:
    """AdamW's groups: parameters of the attention and the rest, each with and without weight decay.

    Norms and biases (fewer than two dimensions) do not decay. Parameters without `requires_grad`
    are left out, as are empty groups.
    """
    inside = attention_parameters(model)
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            key = (parameter in inside, parameter.ndim >= 2)
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
    """What to compile of a model: layers and what has weights after them (a norm), or the whole
    decoder if layers differ.

    Equal layers share one compiled graph, so that compilation takes seconds and not minutes. Layers
    that differ would each need a graph of their own, and every call would search through them.
    """
    decoder = model.get_decoder()
    layers = list(decoder.layers)
    shapes = {tuple(parameter.shape for parameter in layer.parameters()) for layer in layers}
    if len(shapes) > 1:
        return [decoder]
    outside = (decoder.layers, model.get_input_embeddings())
    others = [module for module in decoder.children() if module not in outside]
    return [*layers, *(module for module in others if any(True for _ in module.parameters()))]


def offload_layers(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Move a model to `device`, all but its layers, which come there when they compute."""
    decoder = model.get_decoder()
    for layer in decoder.layers:
        cpu_offload(layer, execution_device=device)
    for module in (*decoder.children(), model.get_output_embeddings()):
        if module is not decoder.layers:
            module.to(device)
    return model


def restore_offloaded(model: PreTrainedModel) -> None:
    """Undo `offload_layers`; the layers are back in main memory."""
    for layer in model.get_decoder().layers:
        remove_hook_from_module(layer, recurse=True)
        for module in layer.modules():
            vars(module).pop("forward", None)  # accelerate leaves a bound method


class LayerOutputs:
    """The hidden states after each decoder layer in the last forward pass of a model.

    The hooks stay, because a compiled decoder holds on to those that it was compiled with.
    """

    def __init__(self, model: PreTrainedModel):
        layers = model.get_decoder().layers
        self.states: list[Tensor | None] = [None] * len(layers)
        self.hooks = [
            layer.register_forward_hook(partial(self._record, i)) for i, layer in enumerate(layers)
        ]

    def _record(self, layer: int, module: nn.Module, arguments: Any, output: Any) -> None:
        self.states[layer] = output[0] if isinstance(output, tuple) else output

    def take(self) -> list[Tensor]:
        """The states, [B, L, D] each, which are forgotten here."""
        states = [state for state in self.states if state is not None]
        self.states[:] = [None] * len(self.states)
        return states

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


class DistillationTrainer(Trainer):
    """Trains `model` towards the next-token distributions of `teacher`.

    Inputs are `{"input_ids": [B, L]}`; every token counts. The loss is the mean divergence per
    token in nats. Its gradient, not its value, has a second term: how far the hidden states after
    each layer are apart, times a weight that falls to zero along the run.

    Args:
        model: causal language model. Under FSDP, `self.model` is a copy of the first process's that
            all share, and an outline is left of this one.
        teacher: another of the same vocabulary, of any floating dtype. It is moved to the training
            device; under FSDP, it becomes an outline as `model` does.
        offload_teacher: keep the teacher's layers in main memory; each goes to the training device
            for as long as it computes. `restore_offloaded` ends that.
        divergence: of a chunk's logits, see `forward.divergence.Divergence`.
        chunk_tokens: see `forward.divergence.chunked_divergence`.
        hidden_weight: of the mean of `distance` over the layers in the first step; both models need
            equally many, of one width. 0 leaves it out; otherwise call `measure_channels` before
            training, whose sequences `train_dataset` has to give as a tensor for a slice.
        distance: see `forward.divergence.hidden_distance`.
        **kwargs: the Trainer's.
    """

    loss_is_scaled_for_ga = False

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        teacher: PreTrainedModel,
        offload_teacher: bool = False,
        divergence: Divergence = forward_kl,
        chunk_tokens: int | None = None,
        hidden_weight: float = 0.0,
        distance: Callable[[Tensor, Tensor, Tensor], Tensor] = hidden_distance,
        **kwargs: Any,
    ):
        shared = sharding()
        super().__init__(model=outline(model) if shared else model, **kwargs)
        whole, teacher = teacher, outline(teacher) if shared else teacher
        # Found out before either model is sharded; what they do to products is in no matrix.
        self.finishes = {
            "student_finish": logit_finish(self.model, from_first(partial(decoder_output, model))),
            "teacher_finish": logit_finish(teacher, from_first(partial(decoder_output, whole))),
        }
        # Batches are of equal size, so a mean over batches is a mean over tokens.
        self.model_accepts_loss_kwargs = False
        if shared:
            self.teacher = shard(self.accelerator, teacher.eval(), whole, self.args.bf16)
            shard(self.accelerator, self.model, model, self.args.bf16)
        elif offload_teacher:
            self.teacher = offload_layers(teacher.eval(), self.args.device)
        else:
            self.teacher = teacher.to(self.args.device).eval()
        self.divergence = divergence
        self.chunk_tokens = chunk_tokens
        self.hidden_weight = hidden_weight
        self.distance = distance
        models = (self.model, self.teacher) if hidden_weight else ()
        self.layer_outputs = [LayerOutputs(model) for model in models]
        self.channel_variances: list[Tensor] = []  # [D] after each layer

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        self.optimized = [group["params"].copy() for group in optimizer.param_groups]
        return optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> Any:
        # Comes after accelerate, which under FSDP has put shards for the optimiser's parameters. It
        # tells them apart by their addresses; they are shards already, and those that have no row
        # in this process have none.
        for group, parameters in zip(self.optimizer.param_groups, self.optimized, strict=True):
            group["params"] = parameters
        return super().create_scheduler(num_training_steps, optimizer)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        loss = self.beside_teacher(model, inputs["input_ids"], self.hidden_loss)
        return (loss, {"loss": loss}) if return_outputs else loss

    def beside_teacher(
        self,
        model: nn.Module,
        input_ids: Tensor,
        compare: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> Tensor:
        """Runs both models on [B, L] token ids.

        Args:
            model: the student as wrapped for training.
            compare: called with the final hidden states of both, [B, L, D] and [B, L, E], and with
                the teacher's head [V, E], inside the student's forward pass and without autocast.

        Returns: what `compare` returns.
        """
        # Not inference_mode: its tensors cannot pass through compiled or sharded modules.
        with torch.no_grad(), self.accelerator.autocast():
            teacher_hidden = final_hidden_states(self.teacher, input_ids)
            teacher_weight = gathered(self.teacher.get_output_embeddings().weight)

        def compared(student_hidden: Tensor) -> Tensor:
            with torch.autocast(input_ids.device.type, enabled=False):
                return compare(student_hidden, teacher_hidden, teacher_weight)

        with self.accelerator.autocast():
            return with_head_input(model, self.model, input_ids, compared)

    def hidden_loss(
        self, student_hidden: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor
    ) -> Tensor:
        """Loss from final hidden states [B, L, D] and [B, L, E]: fp32 scalar; see
        `beside_teacher`."""
        dtype = torch.bfloat16 if self.args.bf16 else torch.float32
        loss = chunked_divergence(
            student_hidden.to(dtype),
            self.model.get_output_embeddings().weight,
            teacher_hidden.to(dtype),
            teacher_weight,
            divergence=self.divergence,
            chunk_tokens=self.chunk_tokens,
            **self.finishes,
        )
        if self.hidden_weight:
            states = (outputs.take() for outputs in self.layer_outputs)
            layers = zip(*states, self.channel_variances, strict=True)
            distances = torch.stack([self.distance(*layer) for layer in layers])
            # Fading: once the states are near, predictions alone decide where the rest goes.
            left = 1 - self.state.global_step / self.state.max_steps
            term = self.hidden_weight * left * distances.mean()
            loss = loss + (term - term.detach())  # only its gradient: the loss stays in nats
        return loss

    @torch.no_grad()
    def measure_channels(self) -> None:
        """Sets what distances of hidden states are relative to, on the first training sequences:
        the same for all batches, so that no loss depends on how they are cut."""
        if not self.hidden_weight:
            return
        blocks = self.train_dataset[: min(CHANNEL_BLOCKS, len(self.train_dataset))]
        parts = []  # [layers, 2, B, D]: variances within sequences, and means
        for batch in blocks.long().split(self.args.per_device_train_batch_size):
            with self.accelerator.autocast():
                final_hidden_states(self.teacher, batch.to(self.args.device))
            states = self.layer_outputs[1].take()
            found = [torch.var_mean(state.float(), dim=1, correction=0) for state in states]
            parts.append(torch.stack([torch.stack(layer) for layer in found]))
        within, means = torch.cat(parts, dim=2).unbind(1)
        variances = within.mean(1) + means.var(1, correction=0)
        # Channels that hardly vary would decide every step.
        floor = CHANNEL_FLOOR * variances.mean(-1, keepdim=True)
        self.channel_variances = list(variances.maximum(floor))

    def _save(self, output_dir: Any = None, state_dict: dict[str, Any] | None = None) -> None:
        """Leaves frozen weights out of checkpoints: a resumed run has them from its student."""
        if not self.is_fsdp_enabled:
            frozen = {
                name
                for name, parameter in self.model.named_parameters(remove_duplicate=False)
                if not parameter.requires_grad
            }
            whole = self.model.state_dict() if state_dict is None else state_dict
            state_dict = {name: x for name, x in whole.items() if name not in frozen}
        super()._save(output_dir, state_dict)

    def remove_hooks(self) -> None:
        """Leave the models as they were."""
        for outputs in self.layer_outputs:
            outputs.remove()

    @torch.no_grad()
    def compare(self, blocks: Tensor) -> Comparison:
        """Student beside teacher on held-out `blocks` [N, L], L >= 2, the same on all processes.

        Whatever is minimised, the divergence here is the KL at temperature 1.
        """
        tokens = blocks[:, 1:].numel()
        processes = self.args.world_size
        shared = len(blocks) % processes == 0  # else all do all, because shards want equal work
        if shared:
            blocks = blocks[self.args.process_index :: processes]
        dtype = torch.bfloat16 if self.args.bf16 else torch.float32
        sums = torch.zeros(4, device=self.args.device)
        model = self.model_wrapped
        training = model.training
        model.eval()
        # Other shapes and modes than in training: not worth compiling for.
        with torch.compiler.set_stance("force_eager"):
            for batch in blocks.split(self.args.per_device_train_batch_size):
                input_ids = batch.to(self.args.device)

                def compare(student: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
                    return chunked_comparison(
                        student[:, :-1].flatten(0, 1).to(dtype),
                        self.model.get_output_embeddings().weight,
                        teacher[:, :-1].flatten(0, 1).to(dtype),
                        teacher_weight,
                        input_ids[:, 1:].flatten(),  # noqa: B023 (called at once)
                        **self.finishes,
                    )

                sums += self.beside_teacher(model, input_ids, compare)
        model.train(training)
        for outputs in self.layer_outputs:
            outputs.take()
        if shared:
            sums = self.accelerator.reduce(sums, "sum")
        return Comparison.from_sums(sums, tokens)
