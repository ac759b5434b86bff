"""Download models of the Hugging Face Hub."""

from __future__ import annotations

from contextlib import suppress
from io import StringIO
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from tqdm.auto import tqdm

from sleb_cli.engine.files import other_formats
from sleb_cli.engine.files.weights import find_weights
from sleb_cli.engine.third_party import quiet_libraries
from sleb_cli.events import Advance, Notify, task
from sleb_cli.names import closest_model
from sleb_cli.units import format_bytes
from sleb_plugins import ModelError
from sleb_plugins.errors import first_line

# A download that breaks off, of the Hub's HTTP library or of its faster transfers (hf_xet), and a
# full disk.
_FAILURES: tuple[type[BaseException], ...] = (
    *HfHubHTTPError.__bases__,
    OSError,
    RuntimeError,
    ValueError,
)

# "runs" holds TensorBoard logs.
_NOT_DOWNLOADED = [
    *(f"*.{suffix}" for suffix in other_formats.SUFFIXES),
    *(f"{folder}/*" for folder in (*other_formats.FOLDERS, "runs")),
]


def download(model: str, revision: str | None, notify: Notify) -> Path:
    """Download a model with its safetensors, or with its pickles if it has none."""
    quiet_libraries()
    try:
        validate_repo_id(model)  # before anything is asked of the network
        with task(notify, f"Looking for {model} on the Hub") as advance:
            options: dict[str, Any] = {"revision": revision, "tqdm_class": _silent_bar(advance)}
            folder = Path(
                snapshot_download(model, ignore_patterns=[*_NOT_DOWNLOADED, "*.bin"], **options)
            )
            with suppress(ModelError):  # it has no safetensors, or not all of them
                find_weights(folder)
                return folder
            return Path(snapshot_download(model, ignore_patterns=_NOT_DOWNLOADED, **options))
    except GatedRepoError as error:
        raise ModelError(
            f"{model} is gated: its owner grants access on request.",
            hint=f"Request access at https://huggingface.co/{model}, then log in with `hf auth "
            f"login`.",
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(
            f"{model} has no revision {revision!r}.", hint="Check --revision."
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelError(
            f"{model} is neither a local folder nor a model on the Hub.",
            hint=closest_model(
                model, "Check the name. For a private model, log in with `hf auth login`."
            ),
        ) from error
    except HfHubHTTPError as error:
        raise ModelError(
            f"The Hub refused {model}: {first_line(error)}.", hint="Try again later."
        ) from error
    except (LocalEntryNotFoundError, ConnectionError) as error:
        raise ModelError(
            f"{model} is neither a local folder nor in the cache, and the Hub cannot be reached: "
            f"{first_line(error.__cause__ or error)}.",
            hint=closest_model(model, "Check the name and the network, or name a local folder."),
        ) from error
    except _FAILURES as error:
        raise ModelError(
            f"{model} could not be downloaded: {first_line(error)}.",
            hint="Check the network and the disk, then run the command again.",
        ) from error


def _silent_bar(advance: Advance) -> type[tqdm]:
    """Return a tqdm class that draws nothing and reports the bytes downloaded so far."""

    class SilentBar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **(options | {"file": StringIO()}))

        def update(self, n: float | None = 1) -> bool | None:
            shown: bool | None = super().update(n)
            if self.unit == "B":
                advance(0, f"{format_bytes(self.n)} of {format_bytes(self.total or self.n)}")
            return shown

    return SilentBar
