"""Groups of tensors by name, in files: what a long run has done, and what memory cannot hold.

What takes a store takes a plain dictionary as well. A group in files is there as a whole or not at
all, also after a kill, so that whatever is in a store need not be done again.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

Store = MutableMapping[str, dict[str, Tensor]]

MEMORY = 1 << 30  # bytes that a computation may keep in memory rather than in files


class TensorFolder(MutableMapping[str, dict[str, Tensor]]):
    """A store whose groups are safetensors files of a folder, each named as its group.

    Tensors that are read are mapped from the file.
    """

    def __init__(self, folder: Path):
        """
        Args:
            folder: is made if it is not there.
        """
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob("*.unfinished"):
            left.unlink()

    def path(self, name: str) -> Path:
        """The file of a group."""
        return self.folder / f"{name}.safetensors"

    def __setitem__(self, name: str, tensors: dict[str, Tensor]) -> None:
        unfinished = self.folder / f"{name}.unfinished"
        save_file(tensors, unfinished, metadata={"format": "pt"})
        os.replace(unfinished, self.path(name))

    def __getitem__(self, name: str) -> dict[str, Tensor]:
        if name not in self:
            raise KeyError(name)
        return load_file(self.path(name))

    def __delitem__(self, name: str) -> None:
        if name not in self:
            raise KeyError(name)
        self.path(name).unlink()

    def __contains__(self, name: object) -> bool:
        return self.path(str(name)).is_file()

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(path.stem for path in self.folder.glob("*.safetensors")))

    def __len__(self) -> int:
        return len(list(iter(self)))


@contextmanager
def scratch(num_bytes: int) -> Iterator[Store]:
    """A store for about so many bytes that nobody needs later: in memory, or in temporary files."""
    if num_bytes <= MEMORY:
        yield {}
        return
    with tempfile.TemporaryDirectory(prefix="tpa-convert-") as folder:
        yield TensorFolder(Path(folder))
