"""From a GGUF file to a Hugging Face folder, once, so that everything else knows one format."""

from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import transformers
from gguf import GGMLQuantizationType, GGUFReader
from transformers import AutoModelForCausalLM, AutoTokenizer

from sleb_cli.engine.files.cache import cached_folder
from sleb_cli.engine.files.fingerprint import fingerprint_files
from sleb_cli.engine.third_party import translate_transformers_errors
from sleb_cli.events import Notify, TaskAdvanced, TaskFinished, TaskStarted
from sleb_plugins import ModelError, UnsupportedModelError

_UNQUANTIZED = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}


def gguf_folder(path: Path, notify: Notify) -> Path:
    """Give the Hugging Face folder of a GGUF file, converted on first use and kept in the cache.

    Raises:
        ModelError: the file is truncated or no GGUF, or transformers cannot read its architecture.
    """
    return cached_folder(f"gguf-{fingerprint_files([path])[:16]}", lambda folder: convert_gguf(path, folder, notify))


def convert_gguf(path: Path, folder: Path, notify: Notify) -> None:
    """Write the model in `path` into `folder`: bfloat16 where it was quantized, else in its own data type."""
    task = f"Converting {path.name}"
    notify(TaskStarted(task, 4, "steps"))
    dtype = _inspect(path)
    # The whole path: a bare name is taken for a file in the working directory, where there is one of that name.
    file = str(path.absolute())
    notify(TaskAdvanced(task))
    with translate_transformers_errors(f"the tokenizer in {path}"):
        tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, gguf_file=file)
    notify(TaskAdvanced(task))
    # transformers draws a bar of its own here, whatever it is told.
    with translate_transformers_errors(f"the weights in {path}"), redirect_stderr(StringIO()):
        model: Any = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=file, dtype=dtype, **_as_plain_weights()
        )
    notify(TaskAdvanced(task))
    _forget_quantization(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    notify(TaskFinished(task))


def transformers_knows(architecture: str) -> bool:
    """Whether transformers reads GGUF files of this architecture; it writes some names its own way."""
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    return _plain(architecture) in map(_plain, GGUF_SUPPORTED_ARCHITECTURES)


def _plain(name: str) -> str:
    """Give "gpt-oss" and "gpt_oss" one spelling."""
    return name.replace("-", "").replace("_", "")


def _inspect(path: Path) -> torch.dtype:
    """Check that the file is whole and readable, and give the data type for its weights."""
    hint = "Download the file again."
    try:
        reader = GGUFReader(path)
        architecture = reader.get_field("general.architecture")
        name = str(architecture.contents()) if architecture else ""
        types = {tensor.tensor_type for tensor in reader.tensors if len(tensor.shape) > 1}
    except (ValueError, IndexError, KeyError, UnicodeDecodeError, OverflowError) as error:
        raise ModelError(f"{path} is truncated, or is no GGUF file.", hint=hint) from error
    if not transformers_knows(name):
        raise UnsupportedModelError(
            f"transformers cannot read GGUF files of the architecture {name!r}.",
            hint="Name the original checkpoint (a hub id or a folder) instead.",
        )
    return _UNQUANTIZED.get(types.pop(), torch.bfloat16) if len(types) == 1 else torch.bfloat16


def _as_plain_weights() -> dict[str, Any]:
    """Ask for unpacked weights, in versions of transformers that could leave them packed."""
    if not hasattr(transformers, "GgufConfig"):
        return {}
    return {"quantization_config": transformers.GgufConfig(dequantize=True)}


def _forget_quantization(model: Any) -> None:
    """Make transformers see that the weights are plain tensors now; some versions refuse to save them otherwise."""
    vars(model.config).pop("quantization_config", None)
    for attribute in ("hf_quantizer", "quantization_method", "is_quantized"):
        vars(model).pop(attribute, None)
