"""Every option of every command has help, is in the reference, and is typed by a test of what it
does.
"""

import ast
import re
import shutil
from pathlib import Path

import pytest
from typer.main import get_command

from conftest import write_task
from sleb_cli.app import app

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = get_command(app).commands


def options_of(command):
    return [each for each in COMMANDS[command].params if each.opts[0].startswith("-")]


def typed_words():
    """Return the words of command lines in tests: of texts that are an option or begin with a
    command, in code and not in comments.
    """
    words = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        if path.name == "test_refusals.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = node.value.split()
                is_sentence = {"does", "requires", "is", "and", "cannot"} & {*text}
                if text and not is_sentence and (text[0] in COMMANDS or text[0].startswith("-")):
                    words.update(text)
    return words


def test_every_option_is_typed_by_a_test_of_what_it_does():
    words = typed_words()
    untyped = []
    for command in COMMANDS:
        for option in options_of(command):
            if not words & {*option.opts}:
                untyped.append((command, option.opts))
    assert untyped == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_help_and_is_in_the_reference(command):
    page = (ROOT / "docs" / "reference" / "commands.md").read_text()
    for option in options_of(command):
        assert option.help, option.opts
        for name in (*option.opts, *option.secondary_opts):
            assert re.search(rf"(?<!\S){name}\b", page), name


@pytest.mark.usefixtures("without_memory")
def test_options_without_a_test_of_their_own_are_accepted(sleb, tiny_llama, text_file, tmp_path):
    rows = [{"q": f"item {number}", "choices": ["yes", "no"], "gold": 0} for number in range(6)]
    write_task(tmp_path / "tasks", "mine", rows, fewshot_split="test")
    chat = shutil.copytree(tiny_llama, tmp_path / "chat")
    template = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    (chat / "chat_template.jinja").write_text(template)
    tasks = "--tasks mine --include-path tasks --limit 4 --num-fewshot 1 --apply-chat-template"
    text = "--bos --sequence-length 16 --max-windows 2"
    sleb("eval", chat, *tasks.split(), "--perplexity", text_file, *text.split())
    shape = "--sweep new=2,3 --prompt-length 4 --iterations 1 --warmup 0"
    sleb("bench", tiny_llama, "--blocks", 1, *shape.split())
