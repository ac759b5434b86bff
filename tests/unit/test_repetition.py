"""Whether a text is a loop."""

import json

import pytest

from conftest import prose
from sleb_cli.repetition import is_loop

PARAGRAPH = (
    "The next day she went to the market, where the baker gave her a lamp. She carried it to the "
    "river, and it shone on the water until the sun came up. The people of the village saw the "
    "light and said that it was a star. She said that it was only a lamp, and went back home.\n\n"
)
STORY = prose(40)[:1500]
VERSES = [f"{STORY[at : at + 150]}\n\nRow on, the river is long,\n\n" for at in range(0, 750, 150)]
TEST = "def test_{0}():\n    stock = Stock()\n    stock.{0}(4)\n    assert stock.count == 3\n\n"
NAMES = ("rye", "oat", "pita", "naan", "corn", "soda", "flat", "sour")
LOOPS = {
    "word": "no " * 100,
    "mark": "!" * 300,
    "line ends": "\n" * 300,
    "Chinese": "我不知道。" * 60,
    "sentence": STORY + "She had never seen anything like it before. " * 6,
    "paragraph": PARAGRAPH * 3,
    "late": STORY + PARAGRAPH * 3 + PARAGRAPH[:150],
    "broken at times": ("4, " * 30 + "44, ") * 4,
    "list": "".join(f"{number}. Butter is made from milk.\n" for number in range(8, 21)),
    "list, and a line": "1. Rice is a food that people eat.\n" * 20 + "\nThese are facts.",
    "JSON": json.dumps([{"kind": "board", "use": "board"}] * 9, indent=4)[:-20],
}
NO_LOOPS = {
    "empty": "",
    "short": "no " * 60,
    "left again": PARAGRAPH * 3 + STORY,
    "twice": STORY + PARAGRAPH * 2,
    "table": "| name | size |\n" + "".join(f"| {name} | brown |\n" for name in NAMES * 2),
    "list": "".join(f"- Bread is a food that we eat with {name}.\n" for name in NAMES),
    "JSON": json.dumps([{"id": at, "name": name} for at, name in enumerate(NAMES)], indent=4),
    "JSON of numbers": json.dumps([{"id": at, "done": True} for at in range(40)]),
    "code": "".join(map(TEST.format, NAMES)),
    "poem": "".join(VERSES),
    "numbers": ", ".join(map(str, range(300))),
}


@pytest.mark.parametrize("text", LOOPS.values(), ids=LOOPS)
def test_a_text_that_ends_in_the_same_passage_is_a_loop(text):
    assert is_loop(text)


@pytest.mark.parametrize("text", NO_LOOPS.values(), ids=NO_LOOPS)
def test_a_text_in_which_something_is_new_is_no_loop(text):
    assert not is_loop(text)
