"""The tensors of a model, by the names they have in it, read from safetensors files one by one.

The files may call them otherwise, or keep in pieces what the model has as one (experts): how, is
known to transformers, and its own transforms are applied.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from tpa_convert.sources.checkpoint import Checkpoint

Pieces = list[tuple[str, str]]
"""Tensors of the files that make one of the model: their names, and the pattern that each fits."""


class StoredWeights:
    """What a checkpoint's files hold of a model.

    Attributes:
        shapes: every tensor of the model that is there, on the meta device, in its stored type.
        unexpected: tensors of the files that have no place in the model.
        same_as: tensors of the model that are another one, by which they are read.
    """

    def __init__(self, checkpoint: Checkpoint, model: PreTrainedModel, renamed: dict[str, str]):
        """
        Args:
            model: its tensors may be anywhere.
            renamed: patterns of names in the files, and what to write for them.

        Raises:
            UserError: pieces that do not go together, or tensors of other shapes than the model's.
        """
        self.checkpoint = checkpoint
        self._files: dict[str, Path] = {}
        stored: dict[str, Tensor] = {}
        for path in checkpoint.weight_files():
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    self._files[key] = path
                    stored[key] = file.get_tensor(key).to("meta")  # mapped: no number is read
        self._transforms: dict[str, WeightConverter | WeightRenaming] = {}
        self._pieces: dict[str, Pieces] = defaultdict(list)
        self.unexpected: list[str] = []
        expected = model.state_dict()
        self._sort(model, expected, renamed)
        self._config = model.config
        self.same_as: dict[str, str] = {}
        self.shapes: dict[str, Tensor] = {}
        self._groups: dict[str, str] = {}  # name in the model -> the first name made with it
        for first in self._pieces:
            for name, tensor in self._make(first, stored).items():
                self.shapes[name], self._groups[name] = tensor, first
        for name, tensor in self.shapes.items():
            if name in expected and tensor.shape != expected[name].shape:
                raise checkpoint.error(
                    f"{name} is {list(tensor.shape)} in the weight files and "
                    f"{list(expected[name].shape)} by config.json; check that its config fits its "
                    "weights"
                )

    def _sort(
        self, model: PreTrainedModel, expected: dict[str, Tensor], renamed: dict[str, str]
    ) -> None:
        """Finds which tensors of the files make which of the model, as transformers does it."""
        mapping = get_model_conversion_mapping(model, renamed)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        by_pattern = {p: converter for converter in converters for p in converter.source_patterns}
        prefix = model.base_model_prefix
        for key in sorted(self._files, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, expected)
            if name not in expected and key in expected:
                name, pattern = rename_source_key(key, [], [], prefix, expected)
            if name not in expected:
                self.unexpected.append(key)
            else:
                converter = by_pattern[pattern] if pattern else WeightRenaming(key, name)
                self._transforms.setdefault(name, converter)
                self._pieces[name].append((key, pattern or key))

    def _make(self, first: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of the model that are made of the same pieces as `first`."""
        transform = copy.deepcopy(self._transforms[first])
        for key, pattern in self._pieces[first]:
            transform.add_tensor(first, key, pattern, tensors[key])
        try:
            made = transform.convert(first, config=self._config)
        except Exception as error:  # whatever the operations have against it
            raise self.checkpoint.error(
                f"{first} cannot be made of its {len(self._pieces[first])} pieces in the weight "
                f"files ({error}); download them again"
            ) from error
        return {name: t[0] if isinstance(t, list) else t for name, t in made.items()}

    def read(self, names: Iterable[str], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Tensors of the model, in their stored type. On the CPU they may be mapped from the files:
        memory that the system takes back when they are let go of.

        Args:
            device: where they are wanted, and where all that is done to them is done.

        Raises:
            UserError: the files cannot be read, or hold numbers that are not finite.
        """
        origins = {name: self.same_as.get(name, name) for name in names}
        groups = {self._groups[name] for name in origins.values()}
        keys = [key for first in groups for key, _ in self._pieces[first]]
        pieces: dict[str, Tensor] = {}
        try:
            for path in sorted({self._files[key] for key in keys}):
                with safe_open(path, framework="pt") as file:
                    for key in keys:
                        if self._files[key] == path:
                            pieces[key] = file.get_tensor(key).to(device)
        except (SafetensorError, OSError) as error:
            raise self.checkpoint.error(
                f"{path.name} cannot be read ({error}); see that the disk is well, or download it "
                "again"
            ) from error
        for key, tensor in pieces.items():
            self.checkpoint.check_finite(key, tensor)
        made: dict[str, Tensor] = {}
        for first in groups:
            made |= self._make(first, pieces)
        return {name: made[origin] for name, origin in origins.items()}
