"""Commands in a folder where anything can go wrong: what they leave there is whole, or as it was
before.
"""

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from conftest import calibration, llama_config, prose, save_model
from faults.arrangements import saving_always
from faults.program import Call, Fault, Finished, Program, Running, require
from gguf_models import convert_llama

TIMES = re.compile(rb'"(started|[a-z_]*seconds[a-z_]*)": ?("[^"]*"|[-0-9.e]+)')
PROGRESS = ("work/*.journal*", "work/.old.*.recovery")
"""What a run that fails may leave for the next one."""
SPARE = ("work/plan.results/*",)
"""What keeps a result once more."""
TEXT = calibration(Path("../text.txt"))
APPLY = ("apply", "plan.json", "-o", "small")
APPLY_GGUF = ("apply", "../tiny.gguf", "--blocks", "1,2", "-o", "small.gguf")
OVER_OLD = ("apply", "plan.json", "-o", "old", "--force", *TEXT, "--samples", 8)
HEAL = (*OVER_OLD, "--heal", "--heal-tokens", 512)


@dataclass(frozen=True)
class Command:
    """A command in a folder `work` that delivers `output`, what a second try adds, and in how many
    processes it runs.

    In the folder above lie the model, the GGUF file and the text; `before` is done in its process
    first.
    """

    words: tuple[Any, ...]
    output: str
    again: tuple[str, ...] = ("--force",)
    before: tuple[Any, ...] | None = None
    processes: int = 1


def search(
    *more: Any, model: str = "../model", remove: int = 1, output: str = "new.json"
) -> tuple[Any, ...]:
    quick = ("--batch-size", 2, "--sample-tokens", 2)
    return ("search", model, "--remove", remove, *TEXT, *quick, "-o", output, *more)


def evaluate(*more: Any, text: str = "text") -> tuple[Any, ...]:
    few = ("--sequence-length", 32, "--max-windows", 4)
    return ("eval", "plan.json", "--perplexity", f"../{text}.txt", *few, *more)


RESUMED = ("--resume", "--force")
COMMANDS = {
    "search": Command(search(remove=2), "new.json", RESUMED),
    "search gguf": Command(search("--holdout", "0.4", model="../tiny.gguf"), "new.json", RESUMED),
    "search, two processes": Command(search("--device", "cpu"), "new.json", RESUMED, processes=2),
    "apply": Command((*APPLY, "--max-shard-size", "100kB"), "small"),
    "apply gguf": Command(APPLY_GGUF, "small.gguf"),
    "apply --recover": Command((*OVER_OLD, "--recover"), "old"),
    "apply --heal": Command(HEAL, "old", before=(saving_always,)),
    "eval": Command(evaluate("-o", "scores.json"), "scores.json"),
    "export": Command(
        ("export", "plan.json", "--to", "mergekit", "-o", "merge.yaml", "--force"), "merge.yaml"
    ),
}


class Place:
    """A folder with a model, a text, and in `work` a plan, a checkpoint and a recipe, which
    commands replace.
    """

    def __init__(self, program: Program, folder: Path) -> None:
        self.program = program
        self.folder = folder
        self.work = folder / "work"
        environment = {"SLEB_CACHE": folder / "cache", "TMPDIR": folder / "tmp"}
        self.here = {"cwd": self.work, "environment": environment}
        self._undisturbed: dict[str, tuple[tuple[Call, ...], dict[str, bytes]]] = {}
        given = folder / "given"
        begin = folder / "begin"
        save_model(given / "model", llama_config(4))
        convert_llama(given / "model", given / "tiny.gguf")
        for seed, name in enumerate(("text.txt", "other.txt")):
            (given / name).write_text(prose(120, seed=seed))
        begin.mkdir()
        self.reset()
        self.run(*search(remove=2, output="plan.json"))
        self.run("apply", "plan.json", "--remove", 1, "-o", "old")
        (self.work / "merge.yaml").write_text("older\n")
        shutil.copytree(self.work, begin, dirs_exist_ok=True)
        self.start = self.files()

    def reset(self) -> None:
        """Begin again."""
        for name in ("work", "cache", "tmp", "model"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
            (self.folder / name).mkdir()
        shutil.copytree(self.folder / "given", self.folder, dirs_exist_ok=True)
        shutil.copytree(self.folder / "begin", self.work, dirs_exist_ok=True)

    def launch(self, command: Command, *more: Any, **options: Any) -> list[Running]:
        """Start a command."""
        options = {**self.here, "before": command.before, **options}
        return self.program.launch(command.processes, *command.words, *more, **options)

    def run(self, *words: Any, **options: Any) -> Finished:
        """Run any words to their end."""
        return self.program.run(*words, **self.here, **options)

    def files(self) -> dict[str, bytes]:
        """Return what lies there beside what was given, without the time that it took."""
        found = {}
        for name in ("work", "cache", "tmp"):
            for path in sorted((self.folder / name).rglob("*")):
                if path.is_file():
                    content = TIMES.sub(b"", path.read_bytes())
                    found[str(path.relative_to(self.folder))] = content
        return found

    def undisturbed(self, name: str) -> tuple[tuple[Call, ...], dict[str, bytes]]:
        """Return the calls of a run of this command that nothing disturbs, and the files that it
        leaves.
        """
        if name not in self._undisturbed:
            self.reset()
            running = self.launch(COMMANDS[name], fault=Fault(self.folder))
            ended = [require(each.wait()) for each in running]
            self._undisturbed[name] = ended[0].calls, self.files()
            assert not list(filter(is_leftover, self.files()))
        return self._undisturbed[name]

    def wrong(self, name: str, *, done: bool, may_leave: bool) -> list[str]:
        """List what is neither as after a whole run of this command nor, unless it is done, as
        before.
        """
        command = COMMANDS[name]
        whole = self.undisturbed(name)[1]
        left = self.files()
        wrong = []
        expected = (delivered(command, whole), delivered(command, self.start))
        if delivered(command, left) not in expected:
            wrong.append(f"a part of {command.output}")
        for file in sorted(self.start.keys() | whole.keys() | left.keys()):
            content = left.get(file)
            if content == whole.get(file) or (not done and content == self.start.get(file)):
                continue
            if may_leave and is_leftover(file):
                continue
            if done and content is None:
                allowed = SPARE
            elif done and not may_leave:
                allowed = ()
            else:
                allowed = PROGRESS
            if not any(fnmatch(file, each) for each in allowed):
                wrong.append(file)
        return wrong

    def again(self, name: str, case: object) -> None:
        """Run a command once more, after which all is as if nothing had disturbed it."""
        if self.files() != self.start:
            for running in self.launch(COMMANDS[name], *COMMANDS[name].again):
                require(running.wait())
            wrong = self.wrong(name, done=True, may_leave=True)
            assert not wrong, (case, wrong)


def delivered(command: Command, files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return the files that a command delivers."""
    pattern = os.path.normpath(f"work/{command.output}")
    return {name: content for name, content in files.items() if fnmatch(f"{name}/", f"{pattern}/*")}


def is_leftover(name: str) -> bool:
    """Whether a file lies where an unfinished output is written, or with temporary files."""
    return name.startswith("tmp/") or any(
        re.fullmatch(r"\..*(?<!\.recovery)", part) for part in Path(name).parts
    )
