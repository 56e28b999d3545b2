"""What a conversion needs of the machine: memory, disk and time, before any weight is read.

Sizes are counted; time follows from two small measurements, of a matrix product in fp32 and of an
eigenproblem in fp64. It is about right for a machine that has nothing else to do.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from tpa_convert.calibration.cache_moments import MOST_LOGITS
from tpa_convert.conversion.coded import ROUNDS
from tpa_convert.families import experts_of
from tpa_convert.options.conversion import ConvertOptions
from tpa_convert.pipeline.calibration import SAMPLED_LENGTH, sampled_blocks
from tpa_convert.plans import Plan
from tpa_convert.refinement.least_squares import BATCH_SIZE
from tpa_convert.refinement.regression import RefinementSettings

PROCESS = 650_000_000  # bytes of Python, torch and transformers before they do anything
BATCH = 4  # of the calibration, blocks
DISK_RATE = 1e9  # bytes a second
MEMORY_RATE = 1e10  # bytes a second that a processor reads
PASSES = 4  # over what enters the layers: forward, and on the way back again with gradients
EIGEN, PRODUCT = 512, 1024  # rows of what is timed


@dataclass(frozen=True)
class Needs:
    """Of one conversion.

    Attributes:
        memory: bytes, at most at once.
        disk: bytes, of the output and of what is kept until it is complete.
        seconds: on this machine's processor.
    """

    memory: int
    disk: int
    seconds: float


@dataclass(frozen=True)
class Sizes:
    """Of a model, in numbers.

    Attributes:
        layer: of its largest decoder layer.
        attention: of the attention in it.
        embedding: of the largest tensor outside of the layers.
        used: parameters that a token passes: of experts, only as many as it is sent to.
    """

    layer: int
    attention: int
    embedding: int
    used: int


def sizes_of(model: PreTrainedModel, attention: str) -> Sizes:
    """Counts a model, which may be without weights."""
    layers: Any = model.get_decoder().layers
    inside = {id(p) for p in layers.parameters()}
    others = [p.numel() for p in model.parameters() if id(p) not in inside]
    config = model.config
    experts = experts_of(config)
    share = 1.0 if not experts else config.num_experts_per_tok / experts
    used = sum(
        p.numel() * (share if ".experts." in name else 1.0) for name, p in model.named_parameters()
    )
    return Sizes(
        max(_count(layer) for layer in layers),
        max(_count(getattr(layer, attention)) for layer in layers),
        max(others, default=0),
        int(used),
    )


def needs_of(
    model: PreTrainedModel,
    attention: str,
    plan: Plan,
    converted_parameters: int,
    options: ConvertOptions,
    dtype: torch.dtype,
) -> Needs:
    """What converting such a model needs.

    Args:
        model: the source, without weights.
        attention: the attribute of its layers that holds the attention.
        plan: of the conversion.
        converted_parameters: of the result, whose weights are of `dtype`.
    """
    sizes, config = sizes_of(model, attention), model.config
    n = plan.num_key_value_heads * plan.head_dim
    layers, hidden, itemsize = len(plan.layers), config.hidden_size, dtype.itemsize
    output = converted_parameters * itemsize
    if options.whiten or plan.is_coded:
        # The layer as stored and in fp32, and its attention in fp64 beside what is made of it.
        converting = sizes.layer * (2 * itemsize + 4) + 3 * 8 * sizes.attention + 3 * 8 * n * n
    else:  # only the attention is held in fp32, and made factors of in fp64
        converting = itemsize * sizes.layer + 12 * sizes.attention + 3 * 8 * n * n
    memory, disk = max(converting, 2 * itemsize * sizes.embedding), output
    product, eigen = _seconds_of_product(), _seconds_of_eigenproblem()
    solved = n**3 / EIGEN**3 * eigen
    seconds = layers * 4 * solved + (2 * output) / DISK_RATE
    tokens = options.calibration_blocks * options.block_length
    states = 4 * tokens * hidden
    flops = 2 * sizes.used * tokens
    if options.refit or options.refine:
        features = config.num_attention_heads * plan.head_dim
        batch = min(BATCH_SIZE, options.calibration_blocks) * options.block_length
        # A layer and another attention for it; what enters, and what is wanted, of both models.
        layer = (itemsize + 4) * sizes.layer + 3 * 8 * sizes.attention
        passing = 4 * batch * (sizes.layer // hidden + 8 * hidden)
        products = 4 * 8 * features * (features + hidden)
        memory = max(memory, layer + 5 * states + max(passing, products))
        disk += 4 * states
        seconds += 3 * flops / (2 * PRODUCT**3) * product
        if options.refine:
            step = min(RefinementSettings.batch_size, options.calibration_blocks)
            trained = step * options.block_length * options.refine_steps * layers
            seconds += 3 * 2 * sizes.attention * trained / (2 * PRODUCT**3) * product
    if options.moments is None and (options.whiten or plan.is_coded):
        logits = min(MOST_LOGITS, BATCH * options.block_length * config.vocab_size)
        batch = min(BATCH, options.calibration_blocks) * options.block_length
        kept = 4 * batch * (sizes.layer // hidden + 8 * hidden)  # for the gradients of a layer
        # Sums, and that of the largest which a batch adds.
        covariances = 8 * (10 * n * n if plan.is_coded else 4 * n * n + hidden * hidden)
        # In fp32, beside the pages of the file that it was read from.
        layer = (itemsize + 4) * sizes.layer + 4 * (2 * sizes.attention + n * n)
        head = (itemsize + 4) * sizes.embedding + 4 * 4 * logits
        memory = max(memory, 3 * states + max(layer + kept + covariances, head))
        flops *= 3 if plan.is_coded else 1
        seconds += flops / (2 * PRODUCT**3) * product + PASSES * layers * states / DISK_RATE
        parameters = sum(p.numel() for p in model.parameters())
        if count := sampled_blocks(options, parameters):
            memory = max(memory, 4 * parameters)
            # A step reads all weights, and computes with them for every text.
            steps = min(options.block_length, SAMPLED_LENGTH)
            flops_of_all = 2 * sizes.used * count * options.block_length
            seconds += 4 * parameters / MEMORY_RATE * steps
            seconds += flops_of_all / (2 * PRODUCT**3) * product
        moments = 8 * (6 * n * n if plan.is_coded else 3 * n * n)
        disk += layers * moments + (layers + 1 if plan.is_coded else 1) * states
    if plan.coded is not None:
        rounds = 2 + ROUNDS * plan.coded.predict_values
        blocks = plan.coded.key_blocks
        seconds += layers * 2 * rounds * solved * (1 + 1 / blocks**2)
    return Needs(int(PROCESS + memory), int(disk), seconds)


def _count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _seconds(run: Callable[[], Any]) -> float:
    """Of the quickest of three runs."""
    found = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return min(found)


def _seconds_of_product() -> float:
    matrix = torch.ones(PRODUCT, PRODUCT)
    return _seconds(lambda: matrix @ matrix)


def _seconds_of_eigenproblem() -> float:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(EIGEN, EIGEN, dtype=torch.float64, generator=generator)
    symmetric = matrix @ matrix.mT
    return _seconds(lambda: torch.linalg.eigh(symmetric))
