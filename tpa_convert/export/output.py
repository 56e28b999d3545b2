"""Outputs that appear whole or not at all.

Everything the toolkit writes goes to a temporary sibling first and is renamed when it is complete,
so that an error, a full disk or Ctrl-C never leaves a directory that looks finished and is not.
What takes long keeps what it has done there, and goes on from that when it is run again.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpa_convert.errors import UserError

PROVENANCE_FILE = "tpa_convert.json"
"""Marks a directory as an output of this package, and says how it was made."""


def check_output(out: str | Path, overwrite: bool = False) -> Path:
    """Refuse an output directory that must not be written, before any work is done for it.

    Raises:
        UserError: `out` exists and `overwrite` is off, or it exists and is not an output of this
            package (so that a mistyped `--out ~ --overwrite` deletes nothing).
    """
    out = Path(out)
    if not out.exists() and not out.is_symlink():
        return out
    if not out.is_dir():
        raise UserError(f"{out} exists and is not a directory: choose another output directory")
    if not overwrite:
        raise UserError(f"{out} exists: choose another output directory, or pass --overwrite")
    if any(out.iterdir()) and not (out / PROVENANCE_FILE).is_file():
        raise UserError(
            f"{out} was not written by tpa-convert (no {PROVENANCE_FILE} in it), so --overwrite "
            "does not replace it: choose another output directory"
        )
    return out


def check_file(path: Path | None, overwrite: bool = False) -> None:
    """As `check_output`, for a file.

    Raises:
        UserError: `path` exists and `overwrite` is off, or it is a directory.
    """
    if path is None or not path.exists():
        return
    if path.is_dir():
        raise UserError(f"{path} is a directory: name a file")
    if not overwrite:
        raise UserError(f"{path} exists: choose another file, or pass --overwrite")


@contextmanager
def atomic_directory(out: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty temporary directory that becomes `out` when the block ends without an error.

    With `overwrite`, the old directory stays in place until the new one is complete. On any error,
    Ctrl-C included, the temporary directory is removed and `out` is as it was.

    Raises:
        UserError: as `check_output`, or the disk is full or `out` cannot be written.
    """
    out = check_output(out, overwrite)
    target = Path(os.path.realpath(out))  # what a link points to is replaced, not the link
    with _writable(out):
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        yield partial
        _usual_permissions(partial, *partial.rglob("*"))
        _replace(partial, target, overwrite)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if is_disk_full(error):
            raise UserError(disk_full_message(out)) from error
        raise


@dataclass(frozen=True)
class Unfinished:
    """An output on its way.

    Attributes:
        output: becomes the output directory.
        work: what is needed until then.
    """

    output: Path
    work: Path


@contextmanager
def resumable_directory(
    out: str | Path, overwrite: bool, identity: dict[str, Any]
) -> Iterator[Unfinished]:
    """As `atomic_directory`, but what a run has done that was cut short is there again.

    A run is cut short by a kill, by Ctrl-C, a full disk or one that cannot be read or written.
    After any other error, nothing is left.

    Args:
        identity: all that the result follows from, JSON-able; what another run has left is removed.

    Raises:
        UserError: as `atomic_directory`, or another process is writing `out`.
    """
    out = check_output(out, overwrite)
    target = Path(os.path.realpath(out))
    partial = target.with_name(f".{target.name}.unfinished")
    made = Unfinished(partial / "output", partial / "work")
    with _writable(out):
        partial.mkdir(parents=True, exist_ok=True)
    with _locked(partial, out):
        try:
            with _writable(out):
                _prepare(partial, made, json.dumps(identity, sort_keys=True))
            yield made
            _usual_permissions(made.output, *made.output.rglob("*"))
            _replace(made.output, target, overwrite)
        except (KeyboardInterrupt, OSError, UserError, RuntimeError) as error:
            if not _cut_short(error) or not _holds_files(made.output, made.work):
                shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, KeyboardInterrupt) and partial.is_dir():
                raise KeyboardInterrupt("run the same command again to go on from here") from error
            if is_disk_full(error):
                raise UserError(
                    f"{disk_full_message(out)}. What is done is kept: the same command goes on "
                    "from there"
                ) from error
            raise
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        shutil.rmtree(partial, ignore_errors=True)


def _cut_short(error: BaseException | None) -> bool:
    """Whether the same run could go on later."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt | OSError) or is_disk_full(error):
            return True
        error = error.__cause__
    return False


def _holds_files(*folders: Path) -> bool:
    return any(path.is_file() for folder in folders for path in folder.rglob("*"))


def _prepare(partial: Path, made: Unfinished, identity: str) -> None:
    """Makes the folders of an output, empty unless they are of the same run."""
    record = partial / "identity.json"
    if not record.is_file() or record.read_text(encoding="utf-8") != identity:
        for folder in (made.output, made.work):
            shutil.rmtree(folder, ignore_errors=True)
        record.write_text(identity, encoding="utf-8")
    made.output.mkdir(exist_ok=True)
    made.work.mkdir(exist_ok=True)


@contextmanager
def _locked(folder: Path, out: Path) -> Iterator[None]:
    """Holds a folder for this process; the system lets go of it when the process ends."""
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another process is writing {out}: wait until it has ended") from error
        yield


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that replaces `path` if the block ends without error.

    Raises:
        UserError: the disk is full, or the file's directory cannot be written.
    """
    target = Path(os.path.realpath(path))
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}{target.suffix}")
    with _writable(path):
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
    try:
        yield partial
        with _writable(path):
            _usual_permissions(partial)
            os.replace(partial, target)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if is_disk_full(error):
            raise UserError(disk_full_message(path)) from error
        raise


def is_disk_full(error: BaseException | None) -> bool:
    """Whether `error`, or an error it was raised from, says that the disk is full.

    safetensors and torch report it as their own exceptions, with the system's message in the text.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        text = str(error)
        if "No space left on device" in text or "StorageFull" in text:
            return True
        error = error.__cause__ or error.__context__
    return False


def disk_full_message(path: str | Path) -> str:
    return f"the disk is full: {path} was not written; free some space or write elsewhere"


@contextmanager
def _writable(path: str | Path) -> Iterator[None]:
    """Say which output cannot be written, and why."""
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise UserError(disk_full_message(path)) from error
        raise UserError(f"cannot write {path}: {error.strerror}; choose another place") from error


def _replace(partial: Path, target: Path, overwrite: bool) -> None:
    """Rename `partial` to `target`; an existing `target` is moved aside first and then removed."""
    check_output(target, overwrite)  # somebody may have made it while we worked
    if not target.exists():
        os.rename(partial, target)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
    old = aside / target.name
    os.rename(target, old)
    try:
        os.rename(partial, target)
    except BaseException:
        os.rename(old, target)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _usual_permissions(*paths: Path) -> None:
    """Give the usual permissions; mkdtemp and safetensors make private directories and files."""
    mask = os.umask(0)
    os.umask(mask)
    for path in paths:
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
