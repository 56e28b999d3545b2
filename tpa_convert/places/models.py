"""Where a model is that a user names: a path on this disk, or a snapshot from the Hub."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tpa_convert.errors import UserError

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)


def model_path(spec: str, revision: str | None = None) -> Path | None:
    """The directory or .gguf file that a user names, or None if it can only be a Hub id.

    Args:
        revision: branch, tag or commit; for Hub ids only.

    Raises:
        UserError: no such path, one that cannot be a model, or a revision of a path.
    """
    path = Path(spec).expanduser()
    if not path.exists():
        if _looks_like_path(spec, path):
            raise UserError(f"{spec}: no such file or directory; give an existing path or a Hub id")
        return None
    if revision is not None:
        raise UserError(f"{spec}: a revision goes with a Hub id, not with a path; leave it out")
    if not path.is_dir() and path.suffix.lower() != ".gguf":
        raise UserError(
            f"{spec}: this is a file; give the directory of a checkpoint, a .gguf file or a Hub id"
        )
    return path.resolve()


def check_model(spec: str, revision: str | None = None) -> None:
    """Refuses what is neither a path nor on the Hub, which is asked for the config alone.

    Raises:
        UserError: as `model_path` and `snapshot`.
    """
    if model_path(spec, revision) is None:
        snapshot(spec, revision, ["config.json"])


def _looks_like_path(spec: str, path: Path) -> bool:
    return (
        _HUB_ID.fullmatch(spec) is None
        or spec.startswith((".", "~"))
        or path.suffix.lower() in {".gguf", ".safetensors"}
        # "models/llama" beside an existing directory "models" is a slip in a path
        or ("/" in spec and path.parent.is_dir())
    )


def snapshot(
    spec: str, revision: str | None, patterns: Sequence[str], without: Sequence[str] = ()
) -> tuple[Path, str]:
    """Files of a model on the Hub, downloaded if need be: their directory and the commit.

    Args:
        patterns, without: names of files that are wanted, and of those among them that are not.

    Raises:
        UserError: no such model or revision, no access, or no connection to the Hub.
    """
    named = f"{spec} at revision {revision}" if revision else spec
    try:
        directory = snapshot_download(
            spec, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(without)
        )
    except GatedRepoError as error:
        raise UserError(
            f"{named}: the Hub grants access on request only; ask for it on the model's page, "
            "then run `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"{named}: the Hub has the model but no such revision") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"{spec}: no such path here and no such model on the Hub; check the name, and for a "
            "private model run `hf auth login`"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        # Without the Hub, what is on disk is taken even if not all of the snapshot is: whatever
        # is missing and needed will be told by name.
        cached = getattr(error, "snapshot_path", None)
        if cached and (Path(cached) / "config.json").is_file():
            return Path(cached), Path(cached).name
        number = getattr(error, "errno", None)
        if number in _UNWRITABLE:
            raise UserError(
                f"{named}: cannot be written to the Hub's cache ({os.strerror(number)}); make "
                "room there, or set HF_HOME to another place"
            ) from error
        raise UserError(
            f"{named}: no such path here, not in the Hub's cache on this disk, and the Hub cannot "
            "be reached; check the name and the connection (HF_HUB_OFFLINE must not be set), or "
            "give a local directory"
        ) from error
    return Path(directory), Path(directory).name


def is_converted(directory: str | Path) -> bool:
    """Whether a directory holds a converted model, saved by whomever: its config says so."""
    try:
        config = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    # As `families.is_tpa`, without the code that such a config may want to run.
    return isinstance(config, dict) and (
        config.get("model_type") == "tpa" or config.get("tpa_layers") is not None
    )


def check_converted(directory: str | Path) -> None:
    """Refuses what is no converted model.

    Raises:
        UserError: no such directory, or another model.
    """
    if not Path(directory).is_dir():
        raise UserError(f"no such directory: {directory}")
    if not is_converted(directory):
        raise UserError(
            f"{directory} is not a converted model (its config.json describes no TPA layers): make "
            "one with `tpa-convert convert`"
        )
