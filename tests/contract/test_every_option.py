"""Every option of every command has help, and is in the reference."""

import re
from pathlib import Path

import pytest
from typer.main import get_command

from sleb_cli.app import app

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = get_command(app).commands


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_help_and_is_in_the_reference(command):
    page = (ROOT / "docs" / "reference" / "commands.md").read_text()
    for option in COMMANDS[command].params:
        if not option.opts[0].startswith("-"):
            continue
        assert option.help, option.opts
        for name in (*option.opts, *option.secondary_opts):
            assert re.search(rf"(?<!\S){name}\b", page), name
