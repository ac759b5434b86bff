"""Every option of every command has help, is in the reference, and is typed by a test of what it
does.
"""

import re
import shutil
from pathlib import Path

import pytest
from typer.main import get_command

from conftest import write_task
from sleb_cli.app import app

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = get_command(app).commands


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_help_is_in_the_reference_and_is_run_somewhere(command):
    page = (ROOT / "docs" / "reference" / "commands.md").read_text()
    options = [each for each in COMMANDS[command].params if each.opts[0].startswith("-")]
    names = [name for each in options for name in (*each.opts, *each.secondary_opts)]
    assert [each.opts for each in options if not each.help] == []
    assert [name for name in names if not re.search(rf"(?<!\S){name}\b", page)] == []
    tests = [
        path for path in (ROOT / "tests").rglob("test_*.py") if path.name != "test_refusals.py"
    ]
    typed = {word for path in tests for word in re.findall(r"--?[\w-]+", path.read_text())}
    assert [each.opts for each in options if not {*each.opts} & typed] == []


@pytest.mark.usefixtures("without_memory")
def test_options_without_a_test_of_their_own_are_accepted(sleb, tiny_llama, text_file, tmp_path):
    rows = [
        {"q": f"item {number}", "choices": ["yes", "no"], "gold": number % 2} for number in range(6)
    ]
    write_task(tmp_path / "tasks", "mine", rows, fewshot_split="test")
    chat = shutil.copytree(tiny_llama, tmp_path / "chat")
    template = (
        "{% for message in messages %}<{{ message.role }}>{{ message.content }}</s>{% endfor %}"
    )
    (chat / "chat_template.jinja").write_text(template)
    tasks = [
        "--tasks",
        "mine",
        "--include-path",
        "tasks",
        "--limit",
        4,
        "--num-fewshot",
        1,
        "--apply-chat-template",
    ]
    sleb(
        "eval",
        chat,
        *tasks,
        "--perplexity",
        text_file,
        "--bos",
        "--sequence-length",
        16,
        "--max-windows",
        2,
    )
    shape = ["--prompt-length", 4, "--iterations", 1, "--warmup", 0]
    sleb("bench", tiny_llama, "--blocks", 1, "--sweep", "new=2,3", *shape)
