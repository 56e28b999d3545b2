"""Outputs appear whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tests.conftest import make_tiny_llama
from tpa_convert.errors import UserError
from tpa_convert.export.output import (
    PROVENANCE_FILE,
    atomic_directory,
    atomic_file,
    check_file,
    check_output,
    is_disk_full,
)
from tpa_convert.export.save import save_converted

DISK_FULL = OSError(errno.ENOSPC, "No space left on device")


def write_output(
    out: Path, text: str = "new", *, overwrite: bool = False, error: BaseException | None = None
) -> None:
    """Write an output; with `error`, fail in the middle of it."""
    with atomic_directory(out, overwrite) as directory:
        (directory / "weights").write_text(text)
        if error is not None:
            raise error
        (directory / PROVENANCE_FILE).write_text(text)


def write_file(path: Path, error: BaseException | None = None) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text("new")
        if error is not None:
            raise error


def write_twice(out: Path) -> None:
    """Another process makes the same output meanwhile."""
    with atomic_directory(out):
        write_output(out, "of another process")


def test_directory_appears_only_when_complete(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with atomic_directory(out) as directory:
        (directory / "weights").write_text("x")
        assert not out.exists()
    assert (out / "weights").read_text() == "x"
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_output_has_the_permissions_of_ordinary_files(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "file").touch()
    with atomic_directory(tmp_path / "out") as directory:
        (directory / "file").touch(mode=0o600)
    for name in (".", "file"):
        made, plain = tmp_path / "out" / name, tmp_path / "plain" / name
        assert made.stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt(), SystemExit(143)])
def test_error_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)):
        write_output(tmp_path / "out", error=error)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [DISK_FULL, KeyboardInterrupt()])
def test_error_leaves_the_old_output(tmp_path: Path, error: BaseException) -> None:
    out = tmp_path / "out"
    write_output(out, "old")
    with pytest.raises((UserError, KeyboardInterrupt)):
        write_output(out, overwrite=True, error=error)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {path.read_text() for path in out.iterdir()} == {"old"}


def test_full_disk_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"disk is full: .*out was not written"):
        write_output(tmp_path / "out", error=DISK_FULL)


def test_full_disk_is_recognised_inside_other_errors() -> None:
    error = RuntimeError("writing failed")
    assert not is_disk_full(error)
    error.__cause__ = DISK_FULL
    assert is_disk_full(error)
    text = 'I/O error: Os { code: 28, kind: StorageFull, message: "No space left on device" }'
    assert is_disk_full(ValueError(text))
    assert not is_disk_full(OSError(errno.EACCES, "Permission denied"))


def test_existing_directory_needs_overwrite(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_output(out, "old")
    with pytest.raises(UserError, match="--overwrite"):
        write_output(out)
    assert (out / PROVENANCE_FILE).read_text() == "old"
    write_output(out, overwrite=True)
    assert (out / PROVENANCE_FILE).read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    """The models of a link to another disk are replaced there."""
    disk, link = tmp_path / "disk", tmp_path / "link"
    write_output(disk, "old")
    link.symlink_to(disk)
    write_output(link, overwrite=True)
    assert link.is_symlink()
    assert (disk / PROVENANCE_FILE).read_text() == "new"
    file = tmp_path / "file.json"
    file.symlink_to(disk / "weights")
    with atomic_file(file) as path:
        path.write_text("written")
    assert file.is_symlink()
    assert (disk / "weights").read_text() == "written"


def test_overwrite_spares_what_is_not_ours(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="not written by tpa-convert"):
        write_output(home, overwrite=True)
    assert (home / "thesis.tex").read_text() == "precious"


def test_output_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match="exists"):
        write_twice(out)
    assert (out / PROVENANCE_FILE).read_text() == "of another process"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_file_as_output_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(UserError, match="not a directory"):
        check_output(tmp_path / "out", overwrite=True)


def test_files_as_output(tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    check_file(None)
    check_file(file)
    file.touch()
    with pytest.raises(UserError, match=r"plan\.yaml exists: choose another file"):
        check_file(file)
    check_file(file, overwrite=True)
    for overwrite in (False, True):
        with pytest.raises(UserError, match="is a directory: name a file"):
            check_file(tmp_path, overwrite)


def test_folders_of_a_file_are_made(tmp_path: Path) -> None:
    write_file(tmp_path / "deep" / "er" / "result.json")
    assert (tmp_path / "deep" / "er" / "result.json").read_text() == "new"


def test_atomic_file_replaces_or_leaves(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt):
        write_file(path, KeyboardInterrupt())
    assert path.read_text() == "old"
    write_file(path)
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_atomic_file_has_the_usual_permissions(tmp_path: Path) -> None:
    before = os.umask(0o027)
    os.umask(before)
    with atomic_file(tmp_path / "made") as temporary:
        temporary.touch()
        temporary.chmod(0o600)  # as safetensors leaves it
    assert os.umask(before) == before  # which is the process's, and only looked at
    (tmp_path / "plain").touch()
    assert (tmp_path / "made").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"cannot write .*out: File exists"):
        write_output(tmp_path / "file" / "out")
    with pytest.raises(UserError, match=r"cannot write .*: Is a directory"):
        write_file(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_numbers_that_overflow_are_not_saved(tmp_path: Path) -> None:
    model = make_tiny_llama()
    model.model.layers[1].self_attn.k_proj.weight.data[0, 0] = 1e5
    with pytest.raises(UserError, match=r"layers.1.self_attn.k_proj.weight .* in float16: convert"):
        save_converted(model.half(), None, tmp_path, "small", {})  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
