"""`sleb apply --push`: the checkpoint, proven and whole on disk, goes to the hub as well."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils._validators import validate_repo_id
from huggingface_hub.utils.tqdm import disable_progress_bars

from sleb_cli.engine.third_party import first_line
from sleb_cli.events import Notify, TaskFinished, TaskStarted
from sleb_plugins import OutputError, UsageError

# What the hub's client raises for answers and for no answer. Its HTTP library, whose name depends on the version, has
# one base for both; the class for answers has it as its own base.
_FAILURES: tuple[type[BaseException], ...] = (*HfHubHTTPError.__bases__, ConnectionError)
# What an upload may raise beside; the faster transfers have only this for what went wrong.
_UPLOAD_FAILURES: tuple[type[BaseException], ...] = (*_FAILURES, RuntimeError)
_LOGIN = "Log in with `hf auth login` and a token that may write, then try again."


@dataclass(frozen=True)
class PushRequest:
    """Where the checkpoint goes on the hub: "ORG/NAME"."""

    repo: str
    private: bool = True

    @property
    def by_hand(self) -> str:
        """The command that uploads a folder there."""
        return f"hf upload {self.repo} FOLDER" + (" --private" if self.private else "")


def require_pushable(request: PushRequest, *, force: bool) -> None:
    """Make sure, before hours of work, that the user may make this repository, and overwrites none unasked.

    Raises:
        UsageError: it is no name of a repository.
        OutputError: the user is not logged in, or may not write there, or it exists, or the hub is out of reach.
    """
    owner, name = _parts(request.repo)
    api = _api()
    try:
        user: dict[str, Any] = api.whoami()
    except LocalTokenNotFoundError as error:
        raise OutputError(
            f"You are not logged in to the hub, so {request.repo} cannot be made.", hint=_LOGIN
        ) from error
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise OutputError("The hub does not accept your token.", hint=_LOGIN) from error
        raise _unreachable(request, error) from error
    except _FAILURES as error:
        raise _unreachable(request, error) from error
    token = (user.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise OutputError("Your token for the hub may only read.", hint=_LOGIN)
    organizations = {str(part.get("name")): part.get("roleInOrg") for part in user.get("orgs") or []}
    if owner != user.get("name") and organizations.get(owner, "read") == "read":
        raise OutputError(
            f"You are {user.get('name')} on the hub, and may not write to {owner}.",
            hint=f"Push to {user.get('name')}/{name}, or ask {owner} for the right to write.",
        )
    try:
        exists = api.repo_exists(request.repo)
    except _FAILURES as error:
        raise _unreachable(request, error) from error
    if exists and not force:
        raise OutputError(
            f"{request.repo} exists on the hub.", hint="Choose another name, or upload into it with --force."
        )


def push(folder: Path, request: PushRequest, notify: Notify, *, force: bool) -> str:
    """Upload a checkpoint and give its address.

    Raises:
        OutputError: the hub does not take it; the sentence says that nothing is lost, and how to go on by hand.
    """
    task = f"Uploading to {request.repo}"
    notify(TaskStarted(task))
    disable_progress_bars()
    api = _api()
    try:
        url = api.create_repo(request.repo, private=request.private, exist_ok=force)
        api.upload_folder(repo_id=request.repo, folder_path=folder, commit_message="Pruned with sleb")
    except _UPLOAD_FAILURES as error:
        raise OutputError(
            f"{folder} is whole, but was not uploaded to {request.repo}: {first_line(error)}.",
            hint=f"Upload it by hand: `{request.by_hand.replace('FOLDER', str(folder))}`.",
        ) from error
    notify(TaskFinished(task))
    return str(url)


def _parts(repo: str) -> tuple[str, str]:
    hint = "Write it like ORG/NAME, of letters, digits, '-', '_' and '.'."
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError(f"--push {repo} is no name of a repository.", hint=hint) from error
    parts = re.fullmatch(r"([^/]+)/([^/]+)", repo)
    if parts is None:
        raise UsageError(f"--push {repo} does not say whose repository it is.", hint=hint)
    return parts[1], parts[2]


def _api() -> HfApi:
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, library_name="sleb")


def _unreachable(request: PushRequest, error: BaseException) -> OutputError:
    return OutputError(
        f"The hub is out of reach, so nothing can be pushed to {request.repo}: {first_line(error)}.",
        hint=f"Check the network (is HF_HUB_OFFLINE set?), or leave out --push and later run `{request.by_hand}`.",
    )
