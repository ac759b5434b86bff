"""Documents of JSON that lie, made from one that does not."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

RAW = {
    "%deep list%": "[" * 100_000 + "]" * 100_000,
    "%deep object%": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "%many digits%": "9" * 5000,
    "%huge exponent%": "1e400",
    "%half a pair%": '"\\ud800"',
    "%NaN%": "NaN",
    "%-Infinity%": "-Infinity",
    "%comment%": "/* */ 1",
    "%cut%": '"never ends',
}
"""What no library writes, by what stands for it."""

WORDS = [
    "", "x", "1", "6", "true", "null", "../../canary/secret.txt", "/etc/passwd", "~/x", "demo", "-o", "--push", "\0",
    "a\nb", "\x1b[31mred\x1b]0;title\x07\x9b2J", "[bold red]markup[/bold red][/]", "[link=file:///x]x[/link]", "\u202e",
    "<script>alert(1)</script>", "x" * 100_000, "%s %(x)d {x}", "org/name", "$(touch canary)", "'; touch canary; '",
]  # fmt: skip
hostile = st.one_of(
    st.sampled_from([None, True, False, 0, -1, 1, 2, 7, 10**9, 2**31, 2**63, -(2**63), 2**64, 10**30]),
    st.sampled_from([0.0, -0.5, 1.5, 1e308, -1e308, 5e-324, 1e-9]),
    st.sampled_from(WORDS),
    st.sampled_from(list(RAW)),
    st.sampled_from([[], {}, [[]], [None], [0, 0], [1, "x"], {"x": 1}, {"0": 0}, list(range(1000)), [[1, 2], [3]]]),
).map(copy.deepcopy)  # documents are changed further


def places(data: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return where each value of a document is, by keys and numbers; of long lists, the first items."""
    found = [here] if here else []
    items = data.items() if isinstance(data, dict) else enumerate(data[:3]) if isinstance(data, list) else ()
    for key, value in items:
        found += places(value, (*here, key))
    return found


@st.composite
def lying(draw: st.DrawFn, whole: Any) -> str:  # noqa: C901
    """Change values of a document: of another type or size, removed, added, or swapped with one from elsewhere."""
    data = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 3))):
        *parents, last = draw(st.sampled_from(places(data)))
        holder = data
        for key in parents:
            holder = holder[key]
        match draw(st.integers(0, 7)):
            case 0 | 1 | 2 | 3:
                holder[last] = draw(hostile)
            case 4:
                del holder[last]
            case 5:
                if isinstance(holder, dict):
                    holder[draw(st.sampled_from(["surprise", "code", "output", "__class__", "schema_version"]))] = draw(
                        hostile
                    )
                else:
                    holder.insert(last, draw(hostile))
            case 6:
                other = data
                for key in draw(st.sampled_from(places(data))):
                    other = other[key]
                holder[last] = copy.deepcopy(other)
            case 7:
                value = holder[last]
                if isinstance(value, (int, float)) and not isinstance(value, bool):
                    holder[last] = value * draw(st.sampled_from([-1, 2, 1000, 0]))
        if not places(data):
            break
    return written(data)


def written(data: Any) -> str:
    """Return a document as text, with what no library writes in its place."""
    text = json.dumps(data)
    for name, raw in RAW.items():
        text = text.replace(json.dumps(name), raw, 2)
    return text


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """Change bytes of a text: overwrite, cut, insert, repeat."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, max(0, len(data) - 1)))
        match draw(st.integers(0, 4)):
            case 0:
                data[place : place + 1] = draw(st.binary(min_size=1, max_size=2))
            case 1:
                del data[place:]
            case 2:
                data[place:place] = draw(
                    st.sampled_from([b"{", b"]", b'"', b",", b"\0", b"\xff\xfe", b"\xed\xa0\x80", b"9" * 400])
                )
            case 3:
                data[place:place] = data[place : draw(st.integers(place, len(data)))]
            case 4:
                data[:] = draw(st.sampled_from([b"\xef\xbb\xbf", b"\xff\xfe", b" \n"])) + data
    return bytes(data)
