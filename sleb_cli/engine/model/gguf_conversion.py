"""Convert a GGUF file to a Hugging Face folder, as transformers reads it."""

import math
from collections import Counter
from contextlib import AbstractContextManager, nullcontext, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from gguf import GGMLQuantizationType
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sleb_cli.engine.device import CPU
from sleb_cli.engine.gguf.block_rules import plain_name
from sleb_cli.engine.gguf.blocks import require_blocks
from sleb_cli.engine.gguf.file import GgufFile, read_gguf
from sleb_cli.engine.gguf.quick import quick_gguf
from sleb_cli.engine.memory import memory_shortage
from sleb_cli.engine.third_party import (
    error_saying,
    quiet_libraries,
    translate_errors,
    translate_transformers_errors,
)
from sleb_cli.events import Notify, task
from sleb_plugins import MachineError, OutputError, UnsupportedModelError

_UNQUANTIZED: dict[int, torch.dtype] = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}


def convert_gguf(path: Path, folder: Path, notify: Notify) -> None:
    """Write the model in `path` to `folder`, in its data type, or bfloat16 if it is quantized."""
    quiet_libraries()
    with task(notify, f"Converting {path.name}", 2, "steps") as advance:
        file = read_gguf(path)
        convert_weights(file, folder)
        advance()
        convert_tokenizer(path, folder)
        _write_card(file, folder)


def convert_weights(file: GgufFile, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write the model without its tokenizer; the default data type is as in `convert_gguf`."""
    default = _require_convertible(file)
    dtype = dtype or default
    if lacking := memory_shortage(file.parameters * dtype.itemsize, CPU, whole=True):
        raise MachineError(
            f"Unpacking {file.path} takes {lacking}.",
            hint="Name the original checkpoint (a Hub id or a folder) instead: its blocks can be "
            "streamed.",
        )
    model = _load(file, dtype)
    # Some versions of transformers refuse to save a model that was quantized.
    vars(model.config).pop("quantization_config", None)
    for attribute in ("hf_quantizer", "quantization_method", "is_quantized"):
        vars(model).pop(attribute, None)
    with _writing(folder):
        model.save_pretrained(folder)


def convert_tokenizer(path: Path, folder: Path) -> None:
    """Write the tokenizer of a file to `folder`."""
    from sleb_cli.engine.transformers_internals import get_gguf_tokenizer

    quick: AbstractContextManager[Any] = quick_gguf() if get_gguf_tokenizer else nullcontext()
    with translate_transformers_errors(f"the tokenizer in {path}"), quick:
        # The absolute path, because a file of the same name in the working directory would take
        # precedence.
        options = {"trust_remote_code": False, "gguf_file": str(path.absolute())}
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **options)
    with _writing(folder):
        tokenizer.save_pretrained(folder)


def _writing(folder: Path) -> AbstractContextManager[None]:
    return translate_errors(
        error_saying(OutputError, f"Cannot write {folder}", "Free some space on this disk.")
    )


def _load(file: GgufFile, dtype: torch.dtype) -> Any:
    options: dict[str, Any] = {"gguf_file": str(file.path.absolute()), "trust_remote_code": False}
    with quick_gguf():
        with translate_transformers_errors(f"the config in {file.path}"):
            config: Any = AutoConfig.from_pretrained(file.path.parent, **options)
        if not config.vocab_size:
            config.vocab_size = len(file.get("tokenizer.ggml.tokens") or ())
        if hasattr(transformers, "GgufConfig"):  # versions with it may leave the weights packed
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        # transformers draws a progress bar here that no setting turns off.
        with (
            translate_transformers_errors(f"the weights in {file.path}"),
            redirect_stderr(StringIO()),
        ):
            options |= {"config": config, "dtype": dtype, "output_loading_info": True}
            options["use_kernels"] = False
            model, info = AutoModelForCausalLM.from_pretrained(file.path.parent, **options)
    if missing := sorted(info["missing_keys"]):  # it makes them up, such as the experts of gpt-oss
        raise _unreadable(f"transformers does not find {missing[0]} in {file.path}.")
    return model


def _write_card(file: GgufFile, folder: Path) -> None:
    """Write a model card from which a pruned model inherits the file's licence and languages."""
    metadata = {"language": file.get("general.languages")}
    for key in ("license", "license.name", "license.link", "tags"):
        metadata[key.replace(".", "_")] = file.get(f"general.{key}")
    data = yaml.safe_dump(
        {name: value for name, value in metadata.items() if value}, allow_unicode=True
    )
    (folder / "README.md").write_text(f"---\n{data}---\n", encoding="utf-8")


def transformers_knows(architecture: str) -> bool:
    """Whether transformers reads GGUF files of this architecture, however it is spelled."""
    from sleb_cli.engine.transformers_internals import GGUF_SUPPORTED_ARCHITECTURES

    return plain_name(architecture) in map(plain_name, GGUF_SUPPORTED_ARCHITECTURES)


def _unreadable(why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        why, hint="Name the original checkpoint (a Hub id or a folder) instead."
    )


def _require_convertible(file: GgufFile) -> torch.dtype:
    """Check that the file is complete and of a known architecture; return its data type."""
    if not transformers_knows(file.architecture):
        raise _unreadable(
            f"transformers cannot read GGUF files of the architecture {file.architecture!r}."
        )
    require_blocks(file)  # transformers trusts the file's number of blocks
    sizes = Counter[int]()
    for tensor in file.tensors:
        sizes[tensor.type] += math.prod(tensor.shape) if len(tensor.shape) > 1 else 0
    types = +sizes  # without types of vectors alone, such as norms, which are often kept in float32
    # Few matrices of an unquantized file may be of another type, such as the routers of experts.
    return (
        _UNQUANTIZED[types.most_common(1)[0][0]]
        if types and types.keys() <= _UNQUANTIZED.keys()
        else torch.bfloat16
    )
