"""Coded projections that learn: refit of W_O, and healing with the rounding in the loop."""

from __future__ import annotations

import copy
import itertools
import math
import time

import torch
from coded_rows import Row
from torch import Tensor, nn
from torch.nn.functional import linear

from tpa_convert.coding import LEVELS

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)


class CodedProjection(nn.Module):
    """k_proj or v_proj through codes: features, straight-through rounding, gauge, offsets.

    Components have gauges of unit norm, so that one learning rate suits features and gauges; those
    without bits are part of the offset of each class.
    """

    def __init__(self, row: Row, weight: Tensor, learned_steps: bool):
        super().__init__()
        t = row.transform
        kept = row.bits > 0
        norm = t.decode.norm(dim=0)
        self.feature = nn.Parameter(((t.encode * norm[:, None]) @ weight)[kept])
        self.gauge = nn.Parameter((t.decode / norm)[:, kept])
        self.offset = nn.Parameter(row.mean @ t.decode.mT)  # of each class, [k, n]
        self.register_buffer("mean", (row.mean * norm)[:, kept])
        self.register_buffer("reach", (2.0 ** row.bits[kept] - 1) / 2)
        self.log_step = nn.Parameter((row.step * norm)[0, kept].log(), requires_grad=learned_steps)
        self.row = row._replace(
            mean=self.mean,
            step=self.log_step.detach().exp()[None],
            bits=row.bits[kept],
            importance=norm[kept] ** -2,
            energy=(row.energy * norm**2)[:, kept],
        )

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            y = linear(x.float(), self.feature)
            row = self.row._replace(step=self.log_step.exp()[None], mean=self.mean)
            with torch.no_grad():
                _, label = row.centred(y)
                scale = row.scales(y - self.mean[label], label)
            y = y - self.mean[label]
            step = scale * row.step
            code = torch.minimum((y / step + self.reach).clamp_min(0), 2 * self.reach)
            code = code + (code.round() - code).detach() - self.reach
            return linear(code * step, self.gauge) + self.offset[label]


def coded_model(bench, rows: dict, learned_steps: bool = True):
    """A copy of the source with coded projections (latent keys only)."""
    model = copy.deepcopy(bench.model)
    for i, layer in enumerate(model.model.layers):
        for name in "kv":
            own = getattr(layer.self_attn, f"{name}_proj")
            coded = CodedProjection(rows[i, name], own.weight, learned_steps)
            setattr(layer.self_attn, f"{name}_proj", coded)
    return model


@torch.no_grad()
def refit(source, model, blocks: Tensor, batch: int) -> None:
    """W_O of every layer by least squares, as `tpa_convert.refit` does, inputs coded."""
    parts = blocks.to(source.device).split(batch)
    streams = [source.model.embed_tokens(ids) for ids in parts]
    own = list(streams)
    position = torch.arange(blocks.shape[1], device=source.device)[None]
    table = source.model.rotary_emb(streams[0], position)
    inputs: list[Tensor] = []
    for layer, coded in zip(source.model.layers, model.model.layers, strict=True):
        hook = coded.self_attn.o_proj.register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
        sums = [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]  # held out, training
        for i, (h, x) in enumerate(zip(streams, own, strict=True)):
            arguments = {"position_embeddings": table, "attention_mask": None}
            target = h + layer.self_attn(layer.input_layernorm(h), **arguments)[0]
            lacking = target - x - coded.self_attn(coded.input_layernorm(x), **arguments)[0]
            scale = target.square().sum(-1) + (x - h).square().sum(-1)
            weight = scale.rsqrt()[..., None]
            z, y = ((a * weight).flatten(0, 1).double() for a in (inputs.pop(), lacking))
            for n, value in enumerate((z.mT @ z, z.mT @ y, y.square().sum())):
                sums[i > 0][n] = sums[i > 0][n] + value
        hook.remove()
        gram, cross, _ = sums[1]
        best, change = sums[0][2], torch.zeros_like(cross)
        for ridge in RIDGES:
            damping = ridge * gram.diagonal().mean() * torch.eye(len(gram)).to(gram)
            found = torch.linalg.solve(gram + damping, cross)
            error = sums[0][2] + (found * (sums[0][0] @ found - 2 * sums[0][1])).sum()
            if error < best:
                best, change = error, found
        coded.self_attn.o_proj.weight += change.mT.float()
        for i, (h, x) in enumerate(zip(streams, own, strict=True)):
            streams[i] = layer(h, position_embeddings=table, attention_mask=None)
            own[i] = coded(x, position_embeddings=table, attention_mask=None)


def group_refit(bench) -> None:
    """Keys in blocks (1: latent keys), with and without a refit."""
    for blocks, share in itertools.product((1, 4, 8), (0.1875, 0.125, 0.0625)):
        name = f"{blocks} blocks, {100 * share} %"
        model = coded_model(bench, bench.rows(share=share, blocks=blocks, levels=LEVELS))
        print(f"| {name}, coded | {bench.judge.score(model)} |", flush=True)
        start = time.perf_counter()
        refit(bench.model, model, bench.blocks, bench.judge.batch)
        seconds = time.perf_counter() - start
        print(f"| {name}, W_O refit ({seconds:.0f} s) | {bench.judge.score(model)} |", flush=True)


def heal(
    bench,
    model,
    train: Tensor,
    seconds: float,
    most_steps: int,
    micro: int = 8,
    attention_rate: float = 6e-4,
    rate: float = 1e-4,
    skew: float = 0.1,
    hidden_weight: float = 10.0,
) -> None:
    """Distils the source into `model` for so long, 16 blocks of 1024 tokens a step: skewed KL and
    the fading distance of hidden states, as `tpa_convert.healing` does."""
    device = bench.device
    teacher = copy.deepcopy(bench.model).to(torch.bfloat16 if device.type == "cuda" else None)
    model.requires_grad_(True)
    groups = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if not name.endswith("log_step") or parameter.requires_grad:
            groups["self_attn" in name].append(parameter)
    optimiser = torch.optim.AdamW(
        [{"params": groups[True], "lr": attention_rate}, {"params": groups[False], "lr": rate}],
        weight_decay=0.0,
        betas=(0.9, 0.95),
    )
    peaks = [group["lr"] for group in optimiser.param_groups]
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    variance = None
    begin, steps, step = time.perf_counter(), most_steps, 0
    while step < steps:
        warm = min(1.0, (step + 1) / 40)
        fall = 0.5 * (1 + math.cos(math.pi * step / steps))
        for group, peak in zip(optimiser.param_groups, peaks, strict=True):
            group["lr"] = peak * warm * fall
        ids = train[order[(16 * step + torch.arange(16)) % len(train)]].to(device)
        shown = 0.0
        for part in ids.split(micro):
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                with torch.no_grad():
                    expected = teacher(part, output_hidden_states=True, use_cache=False)
                found = model(part, output_hidden_states=True, use_cache=False)
            if variance is None:
                variance = [h.float().var((0, 1)) for h in expected.hidden_states[1:]]
            distance = sum(
                ((a.float() - b.float()).square() / v).mean()
                for a, b, v in zip(
                    found.hidden_states[1:], expected.hidden_states[1:], variance, strict=True
                )
            ) / len(variance)
            t = expected.logits.flatten(0, 1).float().log_softmax(-1)
            s = found.logits.flatten(0, 1).float().log_softmax(-1)
            mixed = torch.logaddexp(t + math.log(skew), s + math.log(1 - skew))
            loss = (t.exp() * (t - mixed)).sum(-1).mean()
            shown += loss.item() * len(part) / len(ids)
            loss = loss + hidden_weight * (1 - step / steps) * distance
            (loss * len(part) / len(ids)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        step += 1
        if step == 10:
            warmed = time.perf_counter()
        if step == 20:
            each = (time.perf_counter() - warmed) / 10
            steps = min(most_steps, 20 + int((begin + seconds - time.perf_counter()) / each))
            print(f"{each:.2f} s a step, {steps} steps", flush=True)
        if step % 50 == 0:
            print(f"step {step}: loss {shown:.4f}", flush=True)
    model.requires_grad_(False)
    print(f"{step} steps in {time.perf_counter() - begin:.0f} s")


def group_heal(bench) -> None:
    rows = bench.rows(share=0.125, levels=LEVELS)
    model = coded_model(bench, rows)
    refit(bench.model, model, bench.blocks, bench.judge.batch)
    heal(bench, model, bench.train, bench.seconds, bench.steps)
    print(f"| 12.5 %, healed | {bench.judge.score(model)} |", flush=True)
    moved = torch.cat(
        [
            (m.log_step - m.row.step[0].log()).abs()
            for m in model.modules()
            if isinstance(m, CodedProjection)
        ]
    )
    print(f"steps moved by {moved.mean().exp().item():.3f} on average")
