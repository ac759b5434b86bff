"""The config and the weights of a checkpoint in one file, read and changed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from conftest import weights_of

Tensors = dict[str, Tensor]


def config_of(folder: Path) -> dict[str, Any]:
    """Return the contents of `config.json`."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def write_config(folder: Path, **changes: Any) -> None:
    """Change values of a config, or leave them out with None."""
    config = config_of(folder) | changes
    kept = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))


def change_weights(folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """Replace the tensors of a checkpoint by what is made of them."""
    tensors = {name: tensor.contiguous() for name, tensor in change(weights_of(folder)).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
