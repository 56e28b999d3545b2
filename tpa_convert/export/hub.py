"""A finished output directory on the Hub, by huggingface_hub's own means.

What can be wrong is asked before hours of work, and nothing is lost if the upload fails after them.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of the HTTP client that it uses, which differs between its versions
    LocalTokenNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from tpa_convert.errors import UserError
from tpa_convert.export.output import PROVENANCE_FILE


@dataclass(frozen=True)
class Repository:
    """Where a model goes on the Hub.

    Attributes:
        id: OWNER/NAME.
        private: whether it is private if it has to be made.
        replaces: whether files of an earlier model are there, which go.
    """

    id: str
    private: bool
    replaces: bool


def check_repository(name: str, *, private: bool = False, overwrite: bool = False) -> Repository:
    """Asks the Hub whether a model could be uploaded there; changes nothing.

    Args:
        name: NAME, of this user, or OWNER/NAME.
        private: whether it is to be private if it has to be made.
        overwrite: whether an earlier output of this package may be replaced.

    Raises:
        UserError: a malformed name, no token, one that cannot write there, a repository that must
            not be written, or no way to the Hub.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(
            f"{name!r} cannot be the name of a repository on the Hub: give NAME or OWNER/NAME, of "
            "letters, digits, '-', '_' and '.'"
        ) from error
    api = HfApi()
    with _answers():
        user = api.whoami()
    _check_owner(name, user)
    full = name if "/" in name else f"{user['name']}/{name}"
    with _answers():
        exists = api.repo_exists(full) and api.file_exists(full, "config.json")
        earlier = exists and api.file_exists(full, PROVENANCE_FILE)
    if exists and not overwrite:
        raise UserError(f"{full} has a model on the Hub: choose another, or pass --overwrite")
    if exists and not earlier:
        raise UserError(
            f"{full} was not written by tpa-convert (no {PROVENANCE_FILE} in it), so --overwrite "
            "does not replace it: choose another repository"
        )
    return Repository(full, private, earlier)


def upload(directory: Path, repository: Repository) -> str:
    """Uploads a directory, and makes the repository if it is not there. Returns its address.

    Raises:
        UserError: it was not uploaded, and what command tries again.
    """
    again = ["hf", "upload", repository.id, str(directory), "."]
    again += ["--private"] * repository.private + ["--delete", "*"] * repository.replaces
    api = HfApi()
    try:
        url = api.create_repo(repository.id, private=repository.private or None, exist_ok=True)
        api.upload_folder(
            repo_id=repository.id,
            folder_path=directory,
            commit_message=f"Upload {directory.name}",
            delete_patterns="*" if repository.replaces else None,
        )
    except (HfHubHTTPError, HTTPError, OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{directory} is complete, but was not uploaded to {repository.id} ({reason}); try "
            f"again with: {shlex.join(again)}"
        ) from error
    return str(url)


def _check_owner(name: str, user: dict[str, Any]) -> None:
    """Refuses repositories that this user's token cannot write."""
    role = user.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise UserError(
            "the token for the Hub can only read: make one that can write, and run `hf auth login`"
        )
    members = [user["name"], *(organisation["name"] for organisation in user.get("orgs", []))]
    owner, slash, _ = name.partition("/")
    if slash and role == "write" and owner not in members:  # finer tokens do not tell all
        raise UserError(
            f"{name} is not yours: this token is of {user['name']}, who is no member of {owner}"
        )


@contextmanager
def _answers() -> Iterator[None]:
    """Says in a line why the Hub does not answer."""
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise UserError("uploading needs a token for the Hub: run `hf auth login`") from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise UserError(
                "the Hub refuses the token that is here: run `hf auth login` with another"
            ) from error
        raise UserError(f"the Hub answers with an error ({status}): try again later") from error
    except (HTTPError, OSError) as error:
        raise UserError(
            "the Hub cannot be reached, and the model is to be uploaded there: check the "
            "connection (HF_HUB_OFFLINE must not be set), or leave out --push-to"
        ) from error
