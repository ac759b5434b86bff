"""Names that fit on a screen."""

from __future__ import annotations

import re

# A path up to its last part, wherever a sentence holds one: "Loading /home/jane/My models/". It ends before a comma and
# before another path.
_FOLDERS = re.compile(r"(?<!\S)(?:~|\.{1,2})?/(?:(?:(?!\s[~.]{0,2}/)[^,])*/)?(?=[^/\s])")


def short_name(text: str) -> str:
    """Return a name or a sentence with the last part of each local path only."""
    return _FOLDERS.sub("", text)


def elide(text: str, width: int) -> str:
    """Return a text of at most `width` characters, with an ellipsis in its middle if it has more."""
    if len(text) <= width:
        return text
    end = (width - 1) // 2
    return f"{text[: width - 1 - end]}…{text[len(text) - end :]}"
