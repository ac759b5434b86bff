"""Find the folder with a config, weights and a tokenizer that MODEL names."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from sleb_cli.engine.files.config_files import read_json, read_json_list
from sleb_cli.engine.files.copying import links_outside, reading
from sleb_cli.engine.files.fingerprint import (
    Watch,
    fingerprint_samples,
    hash_files,
    join_fingerprints,
    stamp_of,
)
from sleb_cli.engine.files.weights import WeightFiles, find_weights, fingerprint_weights
from sleb_cli.events import Notice, Notify, ignore
from sleb_cli.names import local_path, require_path
from sleb_cli.plan import CHECKPOINT_PLAN, Plan
from sleb_cli.requests import DEMO, require_text
from sleb_cli.units import plural
from sleb_plugins import ModelError, UsageError

MODULES = "modules.json"
"""The file of a sentence-transformers model that lists what its texts go through."""

TRANSFORMER_SETTINGS = (
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
    "sentence_distilbert_config.json",
    "sentence_camembert_config.json",
    "sentence_albert_config.json",
    "sentence_xlm-roberta_config.json",
    "sentence_xlnet_config.json",
)
"""Where sentence-transformers looks for how texts are read; the first that is not empty counts."""

_COUNTS = re.compile(r"((moe_)?num_|n_|encoder_|decoder_)(\w+_)?(layers?|experts)")
"""Settings that count blocks or experts."""

_CHAT_TEMPLATES = "additional_chat_templates"

# The files that sleb reads, and transformers, whose tokenizers have files of any of these kinds.
_READ = re.compile(r".*\.(json|jinja|txt|model|tiktoken|py|bin|safetensors)|" + _CHAT_TEMPLATES)
# The files, besides config, weights and code, on which the numbers of a model or the tokens of a
# text depend. Results, logs and plans, which may lie in the same folder, have other names.
_DECIDES = re.compile(
    r"(generation_config|adapter_config|special_tokens_map|added_tokens|emoji|normalizer|byte_maps|word_\w+)\.json"
    r"|.*(tokenizer|vocab|merges|chat_template|processor|tekken).*|dict\.txt|.*\.(jinja|model|tiktoken|codes)"
)


@dataclass(frozen=True)
class ModelSource:
    """A model in a local folder; `id` is a Hub id, "demo", or an absolute path."""

    id: str
    folder: Path
    revision: str | None = None
    trust_remote_code: bool = False
    watch: Watch = field(default_factory=Watch, compare=False, repr=False)
    """The files that were read so far, which must not change meanwhile."""

    @property
    def name(self) -> str:
        """A short name for a folder."""
        return Path(self.id).name.removesuffix(".gguf")

    @cached_property
    def raw_config(self) -> dict[str, Any]:
        """The contents of `config.json`."""
        self.watch.add(self.folder / "config.json")
        return read_json(self.folder / "config.json")

    @cached_property
    def weights(self) -> WeightFiles:
        """The weight files that transformers would load."""
        weights = find_weights(self.folder)
        self.watch.add(*weights.paths)
        return weights

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the config and the weights, independent of the folder."""
        samples = fingerprint_samples(self.weights.paths, self.raw_config)
        return join_fingerprints(samples, map(fingerprint_weights, self.weights.headers))

    @cached_property
    def code(self) -> str | None:
        """A SHA-256 over the trusted Python files that come with the model; None without any."""
        if not self.trust_remote_code:
            return None
        files = list(self.folder.rglob("*.py"))
        self.watch.add(*files)
        return hash_files(self.folder, files) if files else None

    @cached_property
    def content_hash(self) -> str:
        """A SHA-256 over all that decides a number: weights, config, trusted code, tokenizer.

        Numbers are kept under this hash. The fingerprint names the model, which is still the same
        one when its chat template changes.
        """
        templates = self.folder / _CHAT_TEMPLATES
        files = [
            path
            for path in self.folder.iterdir()
            if _DECIDES.fullmatch(path.name) and path.suffix != ".py"
        ]
        files += templates.glob("*.jinja")
        files += self._module_files()
        files = [path for path in files if path.is_file()]
        self.watch.add(*files)
        # A fingerprint reads samples of large tensors. The time of change tells the rest.
        stamps = [stamp_of(path) for path in self.weights.paths]
        parts = (self.fingerprint, str(stamps), str(self.code), hash_files(self.folder, files))
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    @cached_property
    def modules(self) -> tuple[tuple[str, str], ...]:
        """The class and the folder of each module of a sentence-transformers model, in order.

        Raises:
            ModelError: the list of modules is broken, or leads out of the model's folder.
        """
        listing = self.folder / MODULES
        if not listing.is_file():
            return ()
        modules = []
        for entry in read_json_list(listing):
            try:
                kind = str(entry["type"])
                if kind.startswith("sentence_transformers."):
                    kind = kind.rpartition(".")[2]
                path = str(entry["path"])
                leads_out = "\0" in path or links_outside(self.folder / path, self.folder)
            except (TypeError, KeyError):
                leads_out = True
            if leads_out:
                raise ModelError(
                    f"{listing} does not name the class and the folder of each module.",
                    hint="Copy or download the model again.",
                )
            modules.append((kind, path))
        return tuple(modules)

    @property
    def module_paths(self) -> list[str]:
        """The folders of the modules of a sentence-transformers model, but the transformer's."""
        return [path for _, path in self.modules if path]

    def _module_files(self) -> list[Path]:
        """List the settings and weights of the modules of a sentence-transformers model."""
        if not self.modules:
            return []
        names = (MODULES, *TRANSFORMER_SETTINGS, "config_sentence_transformers.json")
        files = [self.folder / name for name in names]
        for path in self.module_paths:
            files += (self.folder / path).glob("*")
        return files

    def require_own_code(self) -> None:
        """Refuse trusted code of another repository, which cannot be pinned."""
        for name in ("config.json", "tokenizer_config.json"):
            path = self.folder / name
            named = json.dumps(read_json(path).get("auto_map")) if path.is_file() else ""
            if elsewhere := re.search(r'"([^"]*?)--', named):
                raise ModelError(
                    f"{self.id} names Python code of another repository, {elsewhere[1]}, which may "
                    f"change at any time.",
                    hint=f"Copy that code into a local copy of the model, and remove "
                    f"'{elsewhere[1]}--' from "
                    f"`auto_map` in {name}.",
                )


def locate_model(
    model: str, notify: Notify, *, revision: str | None = None, trust_remote_code: bool = False
) -> ModelSource:
    """Find the model, and download it if it is not on this machine.

    Raises:
        UsageError: `revision` is set for a model that is not from the Hub.
        ModelError: there is no such model, or it is gated, out of reach or incomplete.
        MachineError: the demo model cannot be downloaded.
    """
    name, folder, revision = _find_folder(model, revision, notify)
    source = ModelSource(name, folder, revision, trust_remote_code)
    _require_own_files(folder)
    adapter = folder / "adapter_config.json"
    if adapter.is_file() and not (folder / "config.json").is_file():
        base = read_json(adapter).get("base_model_name_or_path")
        raise ModelError(
            f"{name} is a PEFT adapter{f' for {base}' if base else ''}, not a whole model.",
            hint="Merge it first: load both with peft, call merge_and_unload(), save the result, "
            "and name its folder.",
        )
    if trust_remote_code:
        source.require_own_code()
    # Read both now, to report missing files before any long work.
    _ = source.raw_config, source.weights
    _require_possible_counts(source, source.raw_config)
    if pickles := [path for path in source.weights.paths if path.suffix != ".safetensors"]:
        others = f" and {len(pickles) - 1} more" if len(pickles) > 1 else ""
        stored = f"{name} is stored as pickles ({pickles[0].relative_to(folder)}{others})"
        notify(Notice(f"{stored}; sleb reads only tensors from them, and runs no code in them."))
    return source


def _require_possible_counts(source: ModelSource, settings: dict[str, Any]) -> None:
    """Refuse a config with more blocks or experts than its weights can hold: all would be built."""
    for key, value in settings.items():
        if isinstance(value, dict):
            _require_possible_counts(source, value)
        if not _COUNTS.fullmatch(key) or not isinstance(value, int):
            continue
        stored = source.weights.stored
        most = len(stored)
        if key.endswith("experts"):  # which may lie in one tensor
            most = max([most, *(size for tensor in stored for size in tensor.shape)])
        if value > most:
            raise ModelError(
                f"The config of {source.id} says {key} {value:,}, which its weight files cannot "
                f"hold: they have {plural(len(stored), 'tensor')}.",
                hint="Copy or download the model again.",
            )


def locate_checkpoint(file: Path, plan: Plan) -> ModelSource | None:
    """Find the checkpoint that holds a plan; None if the plan is in another file."""
    folder = file.absolute().parent
    if file.name != CHECKPOINT_PLAN or not (folder / "config.json").is_file():
        return None
    has_code = plan.made_for.code is not None
    return locate_model(str(folder), ignore, trust_remote_code=has_code)


def _find_folder(model: str, revision: str | None, notify: Notify) -> tuple[str, Path, str | None]:
    """Return the model's id, folder and revision."""
    require_path(model)
    path = local_path(model)
    is_gguf = model.endswith(".gguf") and not path.is_dir()
    if revision and (model == DEMO or is_gguf or path.exists()):
        raise UsageError(
            f"--revision does not apply to {model}: only Hub models have revisions.",
            hint="Leave out --revision.",
        )
    if model == DEMO:
        from sleb_cli.engine.model.demo import demo_folder

        return DEMO, demo_folder(notify), None
    if is_gguf:
        from sleb_cli.engine.model.gguf import gguf_folder

        return str(path.absolute()), gguf_folder(path, notify), None
    if path.is_dir():
        folder = path.resolve()
        return require_text(str(folder)), folder, None
    if path.exists():
        raise ModelError(
            f"{model} is a file, not a model.", hint="Name a folder, a .gguf file or a Hub id."
        )
    from sleb_cli.engine.model.hub import download  # which takes a quarter of a second to import

    folder = download(model, revision, notify)
    return model, folder, folder.name


def _require_own_files(folder: Path) -> None:
    """Refuse links out of the model's folder, pipes and devices among the files that are read."""
    # A file elsewhere would become part of a checkpoint that may be published.
    with reading(folder):
        entries = [*folder.iterdir(), *(folder / _CHAT_TEMPLATES).glob("*")]
    for path in sorted(entries):
        if not _READ.fullmatch(path.name):
            continue
        if links_outside(path, folder):
            raise ModelError(
                f"{path} links to a file outside the model's folder.",
                hint="Copy that file into the folder, or name the folder that holds all of the "
                "model's files.",
            )
        with reading(path):
            if path.exists() and not path.is_file() and not path.is_dir():
                raise ModelError(
                    f"{path} is a pipe or a device, not a file.", hint="Replace it with the file."
                )
