"""What the linter of imports cannot say of the rooms of the engine."""

import ast
from pathlib import Path

import sleb_cli

ENGINE = Path(sleb_cli.__file__).parent / "engine"


def test_no_room_behind_the_doors_sees_a_request():
    rooms = [path for path in ENGINE.rglob("*.py") if path.parent.name != "door"]
    names = {
        (path.name, alias.name)
        for path in rooms
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if node.module == "sleb_cli.requests" and alias.name.endswith("Request")
    }
    assert rooms
    assert names == set()
