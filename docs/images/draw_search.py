"""Draw docs/images/search.svg: what the README's first command shows of its plan, search.json.

sleb search demo --ratio 0.2 -o docs/images/search.json --force    # measures anew
python docs/images/draw_search.py [FILE]
"""

from __future__ import annotations

import io
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path

from rich.console import Console
from rich.text import Text

from sleb_cli.plan import Plan, read_plan
from sleb_cli.ui.plans import show_plan

COLUMNS = 80
COMMAND = "sleb search demo --ratio 0.2"
PICTURE = Path(__file__).with_name("search.svg")


def draw(plan: Plan) -> str:
    """Draw a terminal in which the command has just ended."""
    os.environ.pop("NO_COLOR", None)
    os.environ |= {"FORCE_COLOR": "1", "COLORTERM": "truecolor", "COLUMNS": str(COLUMNS)}
    with redirect_stdout(io.StringIO()) as shown:
        show_plan(plan, Path("plan.json"))
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    console.print(f"[green]$[/] [bold]{COMMAND}[/]", highlight=False)
    console.print(Text.from_ansi(shown.getvalue().rstrip()))
    return console.export_svg(title="sleb search")


def main() -> None:
    """Write the picture."""
    file = Path(sys.argv[1]) if sys.argv[1:] else PICTURE
    file.write_text(draw(read_plan(PICTURE.with_suffix(".json"))), encoding="utf-8")


if __name__ == "__main__":
    main()
