"""Weights of a model that is written part by part, as transformers reads them.

A small model becomes one file, when all of its parts are there. Of a large one each part is a shard
from the start: nothing is written twice, and nothing is in memory but one part.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open
from torch import Size, Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from tpa_convert.export.save import check_finite
from tpa_convert.storage import TensorFolder

ONE_FILE = 1 << 30  # bytes of weights up to which a model is one file


class ShardedWeights:
    """The weights of a model, part by part.

    Args:
        output: directory of the model.
        work: for the parts of a small model, until they are all there.
        count: of parts.
        num_bytes: of all weights, about.
    """

    def __init__(self, output: Path, work: Path, count: int, num_bytes: int):
        self.output, self.count = output, count
        self.in_one = num_bytes <= ONE_FILE
        self._parts = TensorFolder(work if self.in_one else output)

    def _name(self, index: int) -> str:
        return f"model-{index + 1:05}-of-{self.count:05}"

    def __contains__(self, index: int) -> bool:
        return self._name(index) in self._parts

    def __setitem__(self, index: int, tensors: dict[str, Tensor]) -> None:
        """Writes a part.

        Raises:
            UserError: its type cannot hold its numbers.
        """
        for name, tensor in tensors.items():
            check_finite(name, tensor)
        self._parts[self._name(index)] = tensors

    def finish(self) -> dict[str, tuple[int, ...]]:
        """Makes of the parts what transformers reads: one file, or an index of shards.

        Returns: the shapes of all tensors.
        """
        weight_map: dict[str, str] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        size = 0
        for index in range(self.count):
            path = self._parts.path(self._name(index))
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    tensor = file.get_tensor(name)
                    weight_map[name], shapes[name] = path.name, tuple(tensor.shape)
                    size += tensor.nbytes
        if self.in_one:
            tensors: dict[str, Tensor] = {}
            for index in range(self.count):
                tensors |= self._parts[self._name(index)]
            TensorFolder(self.output)[SAFE_WEIGHTS_NAME.removesuffix(".safetensors")] = tensors
        else:
            parameters = sum(Size(shape).numel() for shape in shapes.values())
            index_file = {
                "metadata": {"total_parameters": parameters, "total_size": size},
                "weight_map": weight_map,
            }
            (self.output / SAFE_WEIGHTS_INDEX_NAME).write_text(
                json.dumps(index_file, indent=2, sort_keys=True) + "\n", encoding="utf-8"
            )
        return shapes
