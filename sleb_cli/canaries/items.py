"""Items and graders of the canaries; they are drawn by a fixed seed and need neither data set nor
network.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from sleb_cli.repetition import repetition

Item = dict[str, str]
"""A `question`, the `prefix` that begins its answer, and the rest of the `answer`."""

SEED = 2402_09025
EXAMPLES = 8

NOUNS = (
    "apple, basket, bottle, bridge, button, candle, chair, cloud, drum, engine, feather, garden, "
    "glass, hammer, "
    "jacket, kettle, ladder, lamp, lemon, letter, mirror, mountain, needle, orange, pencil, "
    "pillow, pocket, rabbit, "
    "radio, ribbon, river, saddle, shadow, spider, spoon, stone, table, ticket, tower, train, "
    "turtle, violin, wallet"
)

# Parts of a sentence such as "The old farmer sold the lamp near the river."
ADJECTIVES = "old, young, tall, quiet, happy, tired, brave, lazy, clever, hungry, proud, angry, gentle, poor, rich"
PEOPLE = "farmer, doctor, teacher, sailor, baker, painter, soldier, hunter, driver, singer, lawyer, nurse, writer, king"
VERBS = "found, sold, hid, broke, washed, lost, bought, painted, carried, dropped, opened, stole, fixed, kept"
THINGS = "lamp, book, chair, ring, coat, hammer, basket, letter, clock, bottle, mirror, candle, guitar, saddle, drum"
PLACES = "river, bridge, garden, forest, market, church, station, harbour, kitchen, tower, school, museum, palace, mill"
FUNCTION_WORDS = frozenset({"the", "near"})

BETWEEN = (
    "Water boils at a hundred degrees. Bees make honey from nectar. Trains run on rails of steel. "
    "The moon shines at "
    "night. Bread is baked in an oven. Ice melts in the sun. Birds build nests in trees. Paper is "
    "made of wood. Cats "
    "sleep most of the day. Rain falls from grey clouds. Ships sail across the sea. Corn grows in "
    "the summer. Clocks "
    "tell us the time. Salt comes from the sea. Dogs like to run and play. Snow covers the hills "
    "in January. Glass is "
    "made of sand. Plants need light and air. Iron rusts when it is wet. Children learn to read at "
    "school."
)
"""Twenty sentences of about eight tokens."""
SENTENCES_BETWEEN = 10

TOPICS = (
    "apples, autumn, bees, bicycles, books, bread, bridges, buses, butter, candles, cats, chess, "
    "chocolate, clocks, "
    "clouds, coffee, dogs, dreams, elephants, farming, fishing, football, forests, gardens, glass, "
    "guitars, honey, "
    "horses, hospitals, ice cream, islands, kitchens, lakes, libraries, markets, milk, mirrors, "
    "mountains, museums, "
    "music, oranges, painting, paper, penguins, potatoes, rain, restaurants, rice, rivers, roses, "
    "salt, schools, "
    "shoes, sleep, snow, soap, soup, spiders, spoons, stars, sugar, swimming, tea, teachers, the "
    "moon, the sea, "
    "trains, trees, umbrellas, vegetables, volcanoes, water, whales, windows, winter, wood, wool"
)
KEYS = "advice, colour, example, history, kind, name, place, price, size, use"


def sums(items: int, **_: Any) -> dict[str, Any]:
    """Return sums of two numbers with two digits."""

    def draw(rng: random.Random) -> Item:
        first, second = rng.randint(10, 99), rng.randint(10, 99)
        return {
            "question": f"Q: What is {first} + {second}?",
            "prefix": "A:",
            "answer": str(first + second),
        }

    return _splits("sums", draw, items)


def lists(items: int, **_: Any) -> dict[str, Any]:
    """Return lists of eight words, to be copied."""

    def draw(rng: random.Random) -> Item:
        words = ", ".join(rng.sample(NOUNS.split(", "), 8))
        return {"question": f"List: {words}", "prefix": "Copy:", "answer": words}

    return _splits("lists", draw, items)


def repeating(items: int, **_: Any) -> dict[str, Any]:
    """Return a sentence, others after it, and its beginning again, to be completed."""
    others = BETWEEN.rstrip(".").split(". ")

    def draw(rng: random.Random) -> Item:
        words = [
            rng.choice(part.split(", ")) for part in (ADJECTIVES, PEOPLE, VERBS, THINGS, PLACES)
        ]
        begin, end = "The {} {}".format(*words), "{2} the {3} near the {4}.".format(*words)
        text = ". ".join(rng.sample(others, len(others))[:SENTENCES_BETWEEN]) + "."
        return {
            "question": f"Say: {begin} {end}\n\n{text}",
            "prefix": f"Again: {begin}",
            "answer": end,
        }

    return _splits(f"repeating {SENTENCES_BETWEEN}", draw, items)


def instructions(items: int, **_: Any) -> dict[str, Any]:
    """Return instructions of each kind in turn; the `answer` is what was asked for."""
    kinds = itertools.cycle(INSTRUCTIONS)

    def draw(rng: random.Random) -> Item:
        kind, topic = next(kinds), rng.choice(TOPICS.split(", "))
        text, asked = INSTRUCTIONS[kind].text, INSTRUCTIONS[kind].draw(rng)
        return {
            "question": text.format(topic=topic, asked=asked),
            "prefix": "",
            "kind": kind,
            "answer": asked,
        }

    return _splits("instructions", draw, items)


def _splits(name: str, draw: Callable[[random.Random], Item], items: int) -> dict[str, Any]:
    """Draw different items: a few examples, which come first in every prompt, and the test."""
    from datasets import Dataset

    rng = random.Random(f"{SEED} {name}")
    drawn: dict[str, Item] = {}
    while len(drawn) < EXAMPLES + items:
        item = draw(rng)
        drawn[item["question"]] = item
    rows = [*drawn.values()]
    return {
        "examples": Dataset.from_list(rows[:EXAMPLES]),
        "test": Dataset.from_list(rows[EXAMPLES:]),
    }


def grade(doc: Item, results: Sequence[Any]) -> dict[str, float]:
    """Return 1 for the right answer."""
    return {"exact_match": float(_line(results[0]) == doc["answer"])}


def grade_words(doc: Item, results: Sequence[Any]) -> dict[str, float]:
    """Return the share of words and numbers that are right and in their place."""
    expected, found = (re.findall(r"\w+", text) for text in (doc["answer"], _line(results[0])))
    places = [place for place, word in enumerate(expected) if word not in FUNCTION_WORDS]
    return {
        "right_words": sum(found[place : place + 1] == [expected[place]] for place in places)
        / len(places)
    }


def grade_instructions(doc: Item, results: Sequence[Any]) -> dict[str, float]:
    """Return 1 if the answer is as asked; and how it is written, and whether it ended by itself if
    the model tells.
    """
    answer = results[0]
    followed = INSTRUCTIONS[doc["kind"]].is_followed(doc["answer"], answer.strip())
    ended = {"ended": float(answer.ended)} if hasattr(answer, "ended") else {}
    signs = re.findall(r"\w+|[^\w\s]|\n", answer)
    repeated = (
        repetition(signs) if signs else 1.0
    )  # no text is no better than one that repeats itself
    return {
        "followed": float(followed),
        **ended,
        "repetition": repeated,
        "words": len(answer.split()),
    }


def _is_list(asked: str, answer: str) -> bool:
    # Indented lines belong to the entry above.
    return len(re.findall(r"^(?:[-*] +|• *|\*{0,2}\d+[.)] +)\S", answer, re.MULTILINE)) == int(
        asked
    )


def _is_json(asked: str, answer: str) -> bool:
    fenced = re.search(
        r"^```(?:json)? *\n(.*?)^```", answer, re.DOTALL | re.MULTILINE | re.IGNORECASE
    )
    try:
        found = json.loads(fenced[1] if fenced else answer)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.keys() == json.loads(asked).keys()


class Instruction(NamedTuple):
    """What is asked about a `topic`, how the part `asked` is drawn, and whether an answer is as
    asked.
    """

    text: str
    draw: Callable[[random.Random], str]
    is_followed: Callable[[str, str], bool]


INSTRUCTIONS = {
    "lines": Instruction(
        "Write exactly {asked} sentences about {topic}, each on a line of its own.",
        lambda rng: str(rng.randint(2, 4)),
        lambda asked, answer: sum(bool(line.strip()) for line in answer.splitlines()) == int(asked),
    ),
    "lower case": Instruction(
        "Tell me about {topic}. Use only lower case letters.",
        lambda _: "",
        lambda _, answer: answer.islower(),
    ),
    "last word": Instruction(
        'Write a sentence about {topic} that ends with the word "{asked}".',
        lambda rng: rng.choice(NOUNS.split(", ")),
        lambda asked, answer: re.findall(r"\w+", answer.lower())[-1:] == [asked],
    ),
    "list": Instruction("List {asked} facts about {topic}.", lambda _: "5", _is_list),
    "json": Instruction(
        "Describe {topic} in JSON like this: {asked}",
        lambda rng: json.dumps(dict.fromkeys(rng.sample(KEYS.split(", "), 2), "...")),
        _is_json,
    ),
}


def _line(answer: str) -> str:
    """Return the first line that is not empty."""
    return answer.strip().partition("\n")[0].strip()
