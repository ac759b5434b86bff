"""From what a user types as MODEL to a folder with a config, weights and a tokenizer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
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
from tqdm.auto import tqdm

from sleb_cli.engine.files.fingerprint import fingerprint_files
from sleb_cli.engine.files.weights import WeightFiles, find_weights, read_json
from sleb_cli.events import Notify, TaskAdvanced, TaskFinished, TaskStarted
from sleb_plugins import ModelError, UsageError

DEMO = "demo"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_OTHER_FORMATS = ["*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.ot", "*.tflite"]
_OTHER_FOLDERS = ["original/*", "onnx/*", "openvino/*", "coreml/*", "runs/*"]


@dataclass(frozen=True)
class ModelSource:
    """A model in a local folder. `id` finds it again: a hub id, "demo", or an absolute path."""

    id: str
    folder: Path
    revision: str | None = None
    trust_remote_code: bool = False

    @property
    def name(self) -> str:
        """A short name, fit for a folder."""
        return Path(self.id).name.removesuffix(".gguf")

    @cached_property
    def raw_config(self) -> dict[str, Any]:
        """`config.json` as it stands on disk."""
        return read_json(self.folder / "config.json")

    @cached_property
    def weights(self) -> WeightFiles:
        """The weight files that transformers would load."""
        return find_weights(self.folder)

    @cached_property
    def fingerprint(self) -> str:
        """A SHA-256 over config and weights (sampled): the same wherever the model lies."""
        return fingerprint_files(self.weights.paths, self.raw_config)


def locate_model(
    model: str, notify: Notify, *, revision: str | None = None, trust_remote_code: bool = False
) -> ModelSource:
    """Find the model and bring it to this machine where it is not here yet.

    Raises:
        ModelError: there is no such model, or it is gated, offline or incomplete.
        MachineError: the demo model cannot be fetched.
    """
    path = Path(model).expanduser()
    is_local = model == DEMO or path.exists() or model.endswith(".gguf") or not _HUB_ID.fullmatch(model)
    if revision and is_local:
        raise UsageError(
            f"--revision does not apply to {model}: only models of the hub have revisions.", hint="Leave it out."
        )
    if model == DEMO:
        from sleb_cli.engine.model.demo import demo_folder

        source = ModelSource(DEMO, demo_folder(notify))
    elif model.endswith(".gguf") and not path.is_dir():
        source = ModelSource(str(path.absolute()), _gguf(path, notify))
    elif path.is_dir():
        source = ModelSource(str(path.resolve()), path.resolve(), trust_remote_code=trust_remote_code)
    elif path.exists():
        raise ModelError(f"{model} is a file, not a model.", hint="Name a folder, a .gguf file or a hub id.")
    elif is_local:
        raise ModelError(f"There is no folder {model}.", hint="Name a folder, a .gguf file, a hub id, or demo.")
    else:
        folder = _download(model, revision, notify)
        source = ModelSource(model, folder, folder.name, trust_remote_code)
    _require_whole_model(source)
    # Read both now: what is missing should be said before anything long begins.
    _ = source.raw_config, source.weights
    return source


def _require_whole_model(source: ModelSource) -> None:
    adapter = source.folder / "adapter_config.json"
    if adapter.is_file() and not (source.folder / "config.json").is_file():
        base = read_json(adapter).get("base_model_name_or_path")
        raise ModelError(
            f"{source.id} is a PEFT adapter{f' for {base}' if base else ''}, not a whole model.",
            hint="Merge it first: load both with peft, call merge_and_unload(), save, and name that folder.",
        )


def _gguf(path: Path, notify: Notify) -> Path:
    from sleb_cli.engine.model.gguf import gguf_folder

    if not path.is_file():
        raise ModelError(f"There is no file {path}.", hint="Check the path.")
    return gguf_folder(path, notify)


def _download(model: str, revision: str | None, notify: Notify) -> Path:
    """Bring a snapshot of a hub model here, and say plainly what stands in the way."""
    task = f"Looking for {model} on the hub"
    notify(TaskStarted(task))
    try:
        folder = _snapshot(model, revision, _silent_bar(task, notify))
    except GatedRepoError as error:
        raise ModelError(
            f"{model} is gated: its owner grants access by request.",
            hint=f"Ask at https://huggingface.co/{model}, then log in with `hf auth login`.",
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{model} has no revision {revision!r}.", hint="Check --revision.") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelError(
            f"There is no folder {model} here, and no such model on the hub.",
            hint="Check the name; for a private model, log in with `hf auth login`.",
        ) from error
    except HfHubHTTPError as error:
        raise ModelError(f"The hub refused {model}: {error}.", hint="Try again later.") from error
    except (LocalEntryNotFoundError, ConnectionError) as error:
        raise ModelError(
            f"There is no folder {model} here, and the hub is out of reach while its cache lacks the model.",
            hint="Check the name and the network (is HF_HUB_OFFLINE set?), or name a local folder.",
        ) from error
    notify(TaskFinished(task))
    return folder


def _snapshot(model: str, revision: str | None, bar: type[tqdm]) -> Path:
    """Give the folder of the model's safetensors, or of its pickles where it has none."""
    ignored = [*_OTHER_FORMATS, *_OTHER_FOLDERS]
    safe = [*ignored, "*.bin"]
    folder = Path(snapshot_download(model, revision=revision, ignore_patterns=safe, tqdm_class=bar))
    if any(folder.glob("*.safetensors")):
        return folder
    return Path(snapshot_download(model, revision=revision, ignore_patterns=ignored, tqdm_class=bar))


def _silent_bar(task: str, notify: Notify) -> type[tqdm]:
    """Give a tqdm class that draws nothing, and tells us how many bytes have come."""

    class SilentBar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **(options | {"file": StringIO()}))

        def update(self, n: float | None = 1) -> bool | None:
            shown: bool | None = super().update(n)
            if self.unit == "B":
                notify(TaskAdvanced(task, 0, f"{self.n / 1e6:,.0f} of {(self.total or self.n) / 1e6:,.0f} MB"))
            return shown

    return SilentBar
