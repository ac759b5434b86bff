"""Write the completion scripts beside this file, from the program itself: `python -m completions`.

With `--check`, write nothing and exit with 1 where a script differs from what would be written.
"""

import os
import subprocess
import sys
from pathlib import Path

FILES = {"bash": "sleb.bash", "zsh": "_sleb", "fish": "sleb.fish", "powershell": "sleb.ps1"}
HERE = Path(__file__).resolve().parent


def completion_script(shell: str) -> str:
    """Ask `sleb` for its completion script, as the shell's own start-up files would."""
    return subprocess.run(
        [sys.executable, "-m", "sleb_cli"],
        env=os.environ | {"_SLEB_COMPLETE": f"source_{shell}"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout


def main() -> int:
    """Write the scripts, or compare them with `--check`."""
    stale = []
    for shell, name in FILES.items():
        path, script = HERE / name, completion_script(shell)
        if "--check" not in sys.argv[1:]:
            path.write_text(script, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != script:
            stale.append(name)
    for name in stale:
        print(f"completions/{name} is out of date: run `python -m completions`", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
