"""Fail if the code becomes denser: more tokens a line, or more statements that hold two ideas.

    python .ci/density.py

A ceiling is what the code has reached. Lower it when the code gets plainer; never raise it to let a
change in. Comments, docstrings and blank lines do not count.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from dataclasses import dataclass, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass
class Density:
    """What a reader must take in; shapes are counted per 100 statements."""

    tokens_a_line: float
    comprehensions: float
    conditional_expressions: float
    tuple_assignments: float
    generators: float
    nested_functions: float


CEILINGS = {
    ("sleb_cli", "sleb_plugins"): Density(8.2, 3.0, 1.6, 0.1, 66, 40),
    ("tests",): Density(9.6, 6.2, 1.2, 1.1, 24, 129),
}


def measure(files: list[Path]) -> Density:
    """Measure some files together."""
    tokens = 0
    lines = 0
    nodes: list[ast.AST] = []
    generators = 0
    nested = 0
    for file in files:
        text = file.read_text(encoding="utf-8")
        tree = ast.parse(text)
        rows = code_rows(text, docstring_rows(tree))
        tokens += len(rows)
        lines += len(set(rows))
        nodes += ast.walk(tree)
    for function in nodes:
        if isinstance(function, FUNCTIONS):
            inner = list(ast.walk(function))[1:]
            generators += any(isinstance(node, ast.Yield | ast.YieldFrom) for node in inner)
            nested += sum(isinstance(node, FUNCTIONS) for node in inner)
    hundred = sum(isinstance(node, ast.stmt) for node in nodes) / 100
    return Density(
        tokens_a_line=tokens / lines,
        comprehensions=sum(isinstance(node, COMPREHENSIONS) for node in nodes) / hundred,
        conditional_expressions=sum(isinstance(node, ast.IfExp) for node in nodes) / hundred,
        tuple_assignments=sum(is_tuple_assignment(node) for node in nodes) / hundred,
        generators=generators,
        nested_functions=nested,
    )


def code_rows(text: str, left_out: set[int]) -> list[int]:
    """Return the row of each token of code."""
    rows = []
    open_f_strings = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        # From Python 3.12 on, an f-string is many tokens. As before, it counts as one.
        name = tokenize.tok_name[token.type]
        open_f_strings -= name == "FSTRING_END"
        is_inside = open_f_strings > 0 or name == "FSTRING_END"
        open_f_strings += name == "FSTRING_START"
        if not is_inside and token.type not in LAYOUT and token.start[0] not in left_out:
            rows.append(token.start[0])
    return rows


def docstring_rows(tree: ast.Module) -> set[int]:
    """Return the rows of docstrings, and of the strings behind fields."""
    rows: set[int] = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Constant):
            continue
        if isinstance(node.value.value, str):
            rows.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return rows


def is_tuple_assignment(node: ast.AST) -> bool:
    """Whether a statement assigns several values at once: `a, b = 1, 2`."""
    if not isinstance(node, ast.Assign):
        return False
    return isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple)


def main() -> int:
    """Print each density beside its ceiling; return 1 if one is above it."""
    exceeded = False
    for folders, ceiling in CEILINGS.items():
        files = []
        for folder in folders:
            files += sorted((ROOT / folder).rglob("*.py"))
        density = measure(files)
        print(" and ".join(folders))
        for field in fields(Density):
            value = getattr(density, field.name)
            limit = getattr(ceiling, field.name)
            is_above = round(value, 1) > limit
            exceeded = exceeded or is_above
            print(f"  {field.name:26}{value:8.1f} of {limit:<6}{' TOO DENSE' if is_above else ''}")
    return int(exceeded)


if __name__ == "__main__":
    sys.exit(main())
