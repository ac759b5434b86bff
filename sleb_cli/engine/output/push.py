"""`sleb apply --push`: upload the proven checkpoint to the Hub."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils._validators import validate_repo_id
from huggingface_hub.utils.tqdm import disable_progress_bars

from sleb_cli.engine.files import other_formats
from sleb_cli.engine.files.fingerprint import Watch
from sleb_cli.engine.third_party import first_line
from sleb_cli.events import Notice, Notify, task
from sleb_plugins import ModelError, OutputError, UsageError

# What the Hub's client raises. Its HTTP library, which depends on the version, has one base class for bad responses and
# for missing ones; HfHubHTTPError derives from it. A rejected card and an answer that is not JSON are ValueErrors.
_FAILURES: tuple[type[BaseException], ...] = (*HfHubHTTPError.__bases__, ConnectionError, ValueError)
# The faster transfers (hf_xet) raise RuntimeError.
_UPLOAD_FAILURES: tuple[type[BaseException], ...] = (*_FAILURES, RuntimeError)
# Files of a training run that are named like weights, but are none.
_TRAINING = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state(_\d+)?)\.(bin|pt|pth)")
_LOGIN = "Log in with `hf auth login` and a token with write access, then try again."


@dataclass(frozen=True)
class PushRequest:
    """Where the checkpoint goes on the Hub: "ORG/NAME"; with `force`, into a repository that exists."""

    repo: str
    private: bool = True
    force: bool = False

    @property
    def by_hand(self) -> str:
        """The command that uploads a folder there."""
        return f"hf upload {self.repo} FOLDER" + (" --private" if self.private else "")


def require_pushable(request: PushRequest) -> None:
    """Check, before hours of work, that the user may create this repository, or asked to overwrite it.

    Raises:
        UsageError: the name is not that of a repository.
        OutputError: the user is not logged in or may not write there, it exists, is not as private or public as asked,
            which an upload does not change, or the Hub is out of reach.
    """
    repo = request.repo
    is_private: bool | None = None
    try:
        validate_repo_id(repo)
        owner, name = repo.split("/")
    except ValueError as error:  # or HFValidationError, which is one
        raise UsageError(
            f"--push {repo} is not a valid repository name.",
            hint="Write it like ORG/NAME, with letters, digits, '-', '_' and '.'.",
        ) from error
    api = _api()
    with _reaching(request):
        user: dict[str, Any] = api.whoami()
        with suppress(RepositoryNotFoundError):
            is_private = bool(api.model_info(repo).private)
    token = (user.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise OutputError("Your token for the Hub is read-only.", hint=_LOGIN)
    organizations = {str(part.get("name")): part.get("roleInOrg") for part in user.get("orgs") or []}
    if owner != user.get("name") and organizations.get(owner, "read") == "read":
        raise OutputError(
            f"You are {user.get('name')} on the Hub, but may not write to {owner}.",
            hint=f"Push to {user.get('name')}/{name}, or ask {owner} for write access.",
        )
    if is_private is not None and not request.force:
        raise OutputError(f"{repo} already exists on the Hub.", hint="Choose another name, or upload with --force.")
    if is_private is not None and is_private is not request.private:
        visibility, way = ("private", "Leave out") if is_private else ("public", "Add")
        raise OutputError(
            f"{repo} is {visibility} on the Hub, and an upload does not change that.",
            hint=f"{way} --public, choose another name, or change the repository in its settings.",
        )


def push(folder: Path, names: Collection[str], request: PushRequest, notify: Notify) -> str:
    """Upload these files of a checkpoint, and nothing that came into its folder later, in one commit; return its URL.

    The commit also deletes the weights of another model.

    Raises:
        OutputError: the upload failed; the message says that the folder is complete, and the hint how to upload it.
    """
    disable_progress_bars()
    api, proven = _api(), Watch()
    proven.add(*(folder / name for name in names))
    try:
        with task(notify, f"Uploading to {request.repo}"):
            added = [CommitOperationAdd(name, folder / name) for name in names]
            url = api.create_repo(request.repo, private=request.private, exist_ok=request.force)
            stale = [name for name in api.list_repo_files(request.repo) if name not in names and _holds_a_model(name)]
            proven.require_unchanged()
            operations: list[CommitOperationAdd | CommitOperationDelete]
            operations = [*(CommitOperationDelete(name) for name in stale), *added]
            api.create_commit(request.repo, operations, commit_message="Pruned with sleb")
    except ModelError as error:
        raise OutputError(
            f"Not uploaded to {request.repo}: {error.message}", hint="Write the checkpoint again."
        ) from error
    except _UPLOAD_FAILURES as error:
        also = ", and delete the weights of another model there" if request.force else ""
        raise OutputError(
            f"{folder} is complete, but was not uploaded to {request.repo}: {first_line(error)}.",
            hint=f"Upload it by hand: `{request.by_hand.replace('FOLDER', str(folder))}`{also}.",
        ) from error
    if stale:
        notify(Notice(f"Deleted files of another model from {request.repo}: {', '.join(sorted(stale))}."))
    return str(url)


def _holds_a_model(name: str) -> bool:
    """Whether a program that loads a model could take this file of a repository for the model or a part of it.

    At the top, where programs look, these are weights, their indices, and a PEFT adapter, which transformers would load
    instead; below it, GGUF files and folders with the model in another format.
    """
    if "/" in name:
        return name.partition("/")[0] in other_formats.FOLDERS or name.lower().endswith(".gguf")
    return name == "adapter_config.json" or (other_formats.is_weights(name) and not _TRAINING.fullmatch(name))


def _api() -> HfApi:
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, library_name="sleb")


@contextmanager
def _reaching(request: PushRequest) -> Iterator[None]:
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise OutputError(
            f"You are not logged in to the Hub, so {request.repo} cannot be created.", hint=_LOGIN
        ) from error
    except _FAILURES as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
            raise OutputError("The Hub does not accept your token.", hint=_LOGIN) from error
        raise OutputError(
            f"The Hub cannot be reached, so nothing can be pushed to {request.repo}: {first_line(error)}.",
            hint=f"Check the network (is HF_HUB_OFFLINE set?), or leave out --push and run `{request.by_hand}` later.",
        ) from error
