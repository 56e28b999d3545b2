"""What the coded-cache benchmarks share: samples of keys and values, transforms, rows, measuring.

The source's own k_proj and v_proj are hooked: what they give goes through the full-width transform,
the codes and back, so that what is attended to is what would be cached. Letters: n = g d numbers of
one part (keys or values) of a token, c components, N tokens.

Components have unit importance: the transform maps into coordinates in which half the squared
error, summed over all parts, is the divergence expected of it in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from tpa_convert.coding.allocation import GAUSSIAN_STEP

Part = tuple[int, str]  # layer, "k" or "v"
SCALES = 2.0 ** (torch.arange(-12, 7) / 2)
STEP = torch.tensor(GAUSSIAN_STEP)


class Samples(NamedTuple):
    """One part on calibration text, before rotation.

    Attributes:
        value: [N, n].
        gradient: of −log p(y) summed over positions, y drawn from the model itself, [N, n].
        position: [N].
    """

    value: Tensor
    gradient: Tensor
    position: Tensor


def projections(model) -> Iterator[tuple[Part, torch.nn.Module]]:
    for i, layer in enumerate(model.model.layers):
        yield (i, "k"), layer.self_attn.k_proj
        yield (i, "v"), layer.self_attn.v_proj


def collect(model, blocks: Tensor, batch: int, seed: int = 0, coders=None) -> dict[Part, Samples]:
    """Keys, values and their gradients of −log p on labels drawn from the model (Fisher), with
    `coders` (see `replaced`) behind them or not."""
    device = next(model.parameters()).device
    found: dict[Part, list[tuple[Tensor, Tensor]]] = {part: [] for part, _ in projections(model)}
    current: dict[Part, Tensor] = {}

    def keep(part):
        def hook(_, __, output):
            output.retain_grad()
            current[part] = output

        return hook

    hooks = [module.register_forward_hook(keep(part)) for part, module in projections(model)]
    generator = torch.Generator(device).manual_seed(seed)
    for ids in blocks.split(batch):
        embedded = model.model.embed_tokens(ids.to(device)).requires_grad_()
        with replaced(model, coders or {}):
            logits = model(inputs_embeds=embedded, use_cache=False).logits.flatten(0, 1)
        with torch.no_grad():
            labels = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
        torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
        for part, output in current.items():
            found[part].append((output.detach().flatten(0, 1), output.grad.flatten(0, 1)))
        current.clear()
    for hook in hooks:
        hook.remove()
    position = torch.arange(blocks.shape[1], device=device).repeat(len(blocks))
    return {
        part: Samples(*(torch.cat(x) for x in zip(*pairs, strict=True)), position)
        for part, pairs in found.items()
    }


# ------------------------------------------------------------------------------- transforms


def rotary(model, position: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [..., d] of positions [...]."""
    angle = position[..., None].float() * model.model.rotary_emb.inv_freq
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor], back: bool = False) -> Tensor:
    """Rotates [..., n] head by head by the angles of `table` [..., d]."""
    cos, sin = (t[..., None, :] for t in table)
    heads = x.unflatten(-1, (-1, cos.shape[-1]))
    first, second = heads.chunk(2, -1)
    turned = torch.cat((-second, first), dim=-1)
    return (heads * cos + (-turned if back else turned) * sin).flatten(-2)


def pair_blocks(n: int, head_dim: int, blocks: int) -> list[Tensor]:
    """Indices of the features of each of `blocks` ranges of rotary pairs, all heads together."""
    index = torch.arange(n).view(-1, 2, head_dim // 2)
    return [index[..., part].flatten() for part in torch.arange(head_dim // 2).chunk(blocks)]


def power(matrix: Tensor, exponent: float, floor: float = 1e-6) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp_min(floor * values.mean())
    return (vectors * values**exponent) @ vectors.mT


class Transform(NamedTuple):
    """y = encode · (ρ) k and back; rotated keys are transformed after rotation."""

    encode: Tensor  # [c, n]
    decode: Tensor  # [n, c]
    rotated: bool


def transform(
    covariance: Tensor, metric: Tensor, blocks: Sequence[Tensor], rotated: bool
) -> Transform:
    """Karhunen–Loève in the metric, inside each block. `rotated`: of complex components, so that it
    commutes with the rotation (each block is one pair)."""
    n = len(covariance)
    encode = torch.zeros(n, n, dtype=torch.float64, device=covariance.device)
    decode = encode.clone()
    for index in blocks:
        index = index.to(covariance.device)
        c, g = covariance[index][:, index], metric[index][:, index]
        if rotated:
            half = len(index) // 2
            turn = torch.kron(
                torch.eye(half, dtype=c.dtype, device=c.device),
                torch.tensor([[0, -1], [1, 0]], dtype=c.dtype, device=c.device),
            )
            c, g = ((x + turn @ x @ turn.mT) / 2 for x in (c, g))
        root, inverse = power(g, 0.5), power(g, -0.5)
        vectors = torch.linalg.eigh(root @ c @ root)[1].flip(-1)
        encode[index[:, None], index] = vectors.mT @ root
        decode[index[:, None], index] = inverse @ vectors
    # rows of `encode` are components; those of a block stand where its features stood
    return Transform(encode.float(), decode.float(), rotated)


# ------------------------------------------------------------------------------- quantiser


class Row(NamedTuple):
    """How one part of one layer is coded.

    Attributes:
        mean: of each class, [k, c].
        step: of each class or of all, [k or 1, c].
        bits: [c].
        scale: of a token: "none" (1), "rms" or "rms up" (never below 1), the best of half
            octaves ("search"; "search up" not below 1), of "octaves", of quarters ("fine") or of
            half octaves around the first ("rms search").
        energy: variance of components around their class's mean, [k or 1, c].
        importance: of a squared error, [c]; 1 in the transform's own coordinates.
    """

    transform: Transform
    mean: Tensor
    step: Tensor
    bits: Tensor
    scale: str
    energy: Tensor
    importance: Tensor

    def centred(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """y − the nearest class mean, and the class: [..., c], [...]."""
        if len(self.mean) == 1:
            return y - self.mean[0], y.new_zeros(y.shape[:-1], dtype=torch.long)
        weighted = self.mean * self.importance
        label = ((self.mean * weighted).sum(-1) - 2 * y @ weighted.mT).argmin(-1)
        return y - self.mean[label], label

    def of_class(self, table: Tensor, label: Tensor) -> Tensor:
        return table[0] if len(table) == 1 else table[label]

    def codes(self, y: Tensor, step: Tensor) -> Tensor:
        """Codes around 0 (…, −½, ½, …) of centred y for steps scaled by the tokens'."""
        half = (2.0**self.bits - 1) / 2
        code = (y / step + half).round().clamp_min(0).minimum(2 * half) - half
        return torch.where(self.bits > 0, code, 0.0)

    @torch.no_grad()
    def scales(self, y: Tensor, label: Tensor) -> Tensor:
        """Scale of each token, [..., 1]."""
        coded = self.bits > 0
        best = torch.full_like(y[..., :1], torch.inf)
        result = torch.ones_like(best)
        if self.scale == "none" or not coded.any():
            return result
        if self.scale.startswith("rms"):
            energy = self.of_class(self.energy, label)[..., coded]
            ratio = (y[..., coded].square() / energy).mean(-1, keepdim=True).sqrt()
            ratio = ratio.clamp_min(1 if self.scale == "rms up" else 2**-8)
            if self.scale != "rms search":
                return ratio
        step = self.of_class(self.step, label)
        candidates = {
            "search": SCALES,
            "search up": SCALES[SCALES >= 1],
            "octaves": SCALES[::2],
            "fine": 2.0 ** (torch.arange(-24, 14) / 4),
            "rms search": 2.0 ** (torch.arange(-2, 5) / 2),
        }[self.scale]
        for s in candidates.tolist():
            s = s * ratio if self.scale == "rms search" else s
            error = (y - self.codes(y, s * step) * (s * step)).square()
            error = (error * self.importance).sum(-1, keepdim=True)
            better = error < best
            best, result = torch.where(better, error, best), torch.where(better, s, result)
        return result

    def quantise(self, y: Tensor) -> Tensor:
        centred, label = self.centred(y)
        step = self.scales(centred, label) * self.of_class(self.step, label)
        return self.mean[label] + self.codes(centred, step) * step


def classes(y: Tensor, position: Tensor, count: int, rounds: int = 10) -> Tensor:
    """Means of `count` classes of tokens y [N, c]: the second starts from tokens at position 0, the
    first from all others, more anywhere; then `rounds` of k-means."""
    first = position == 0
    means = torch.stack([y[~first].mean(0), y[first].mean(0)])[:count]
    if count > 2:
        more = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))[: count - 2]
        means = torch.cat((means, y[more.to(y.device)]))
    for _ in range(rounds if count > 1 else 0):
        label = (-2 * y @ means.mT + means.square().sum(-1)).argmin(-1)
        size = torch.bincount(label, minlength=len(means)).clamp_min(1)
        total = torch.zeros_like(means).index_add_(0, label, y)
        means = torch.where((size > 1)[:, None], total / size[:, None], means)
    return means


def design(
    t: Transform,
    y: Tensor,
    mean: Tensor,
    bits: Tensor,
    scale: str,
    rounds: int,
    tables: bool = False,
) -> Row:
    """Steps of a Gaussian of the components' variance, then `rounds` of Lloyd's algorithm: codes
    and scales for steps, steps for codes and scales. `tables`: one table for each class."""
    row = Row(
        t, mean, torch.ones_like(y[:1]), bits, scale, torch.ones_like(y[:1]), torch.ones_like(y[0])
    )
    centred, label = row.centred(y)
    if tables:
        energy = torch.stack([centred[label == k].square().mean(0) for k in range(len(mean))])
    else:
        energy = centred.square().mean(0, keepdim=True)
    row = row._replace(energy=energy, step=STEP.to(y)[bits] * energy.sqrt())
    for _ in range(rounds):
        s = row.scales(centred, label)
        q = row.codes(centred, s * row.of_class(row.step, label)) * s
        fitted = (q * centred).sum(0) / q.square().sum(0).clamp_min(1e-20)
        row = row._replace(step=torch.where(bits > 0, fitted, row.step))
    return row


# ------------------------------------------------------------------------------- measuring


@contextmanager
def replaced(model, coders: Mapping[Part, Callable[[Tensor, Tensor], Tensor]], position=None):
    """Runs `model` with parts replaced: coder(x [b, t, n], position [b, t]) gives what is attended
    to."""

    def hooked(coder):
        def hook(_, __, output):
            at = torch.arange(output.shape[1], device=output.device).expand(output.shape[:2])
            return coder(output, at if position is None else position)

        return hook

    hooks = [
        module.register_forward_hook(hooked(coders[part]))
        for part, module in projections(model)
        if part in coders
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def coder(row: Row, model) -> Callable[[Tensor, Tensor], Tensor]:
    t = row.transform

    def code(x: Tensor, position: Tensor) -> Tensor:
        table = rotary(model, position) if t.rotated else None
        y = rotate(x, table) if table else x
        y = row.quantise(y @ t.encode.mT) @ t.decode.mT
        y = rotate(y, table, back=True) if table else y
        return x + (y - x).detach()  # straight through

    return code


class Score(NamedTuple):
    ratio: float
    kl: float
    top1: float

    def __str__(self) -> str:
        return f"{self.ratio:.4f} | {self.kl:.4f} | {100 * self.top1:.1f}"


class Judge:
    """Compares changed models with the source on blocks of several texts."""

    def __init__(self, model, texts: Mapping[str, Tensor], batch: int):
        self.model, self.batch = model, batch
        device = next(model.parameters()).device
        self.texts = {name: ids.to(device).split(batch) for name, ids in texts.items()}
        with torch.no_grad():
            self.states = {
                name: [model.model(ids, use_cache=False)[0] for ids in parts]
                for name, parts in self.texts.items()
            }

    @torch.no_grad()
    def score(self, model=None) -> Score:
        model = model or self.model
        ratios, kl, top1, tokens = [], 0.0, 0.0, 0
        for name, parts in self.texts.items():
            added, count = 0.0, 0
            for ids, states in zip(parts, self.states[name], strict=True):
                own = model.model(ids, use_cache=False)[0]
                for row, (a, b) in enumerate(zip(states, own, strict=True)):
                    p = self.model.lm_head(a[:-1].float()).log_softmax(-1)
                    q = model.lm_head(b[:-1].float()).log_softmax(-1)
                    target = ids[row, 1:, None]
                    added += (p.gather(-1, target) - q.gather(-1, target)).sum().item()
                    kl += (p.exp() * (p - q)).sum().item()
                    top1 += (p.argmax(-1) == q.argmax(-1)).sum().item()
                    count += len(target)
            ratios.append(added / count)
            tokens += count
        return Score(math.exp(sum(ratios) / len(ratios)), kl / tokens, top1 / tokens)
