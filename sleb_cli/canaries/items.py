"""Items and graders of the canaries, drawn by a fixed seed without data set or network."""

import json
import random
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from sleb_cli.repetition import is_loop, repetition

Item = dict[str, str]
"""A `question`, the `prefix` that begins its answer, and the rest of the `answer`."""

Draw = Callable[[random.Random, int], Item]
"""Draws an item from random numbers and how many were drawn before."""

SEED = 2402_09025
EXAMPLES = 8


def _phrases(text: str) -> list[str]:
    return [phrase.strip() for phrase in text.split(",")]


NOUNS = _phrases("""
apple, basket, bottle, bridge, button, candle, chair, cloud, drum, engine, feather, garden, glass,
hammer, jacket, kettle, ladder, lamp, lemon, letter, mirror, mountain, needle, orange, pencil,
pillow, pocket, rabbit, radio, ribbon, river, saddle, shadow, spider, spoon, stone, table, ticket,
tower, train, turtle, violin, wallet
""")

# Parts of a sentence such as "The old farmer sold the lamp near the river."
ADJECTIVES = _phrases("""
old, young, tall, quiet, happy, tired, brave, lazy, clever, hungry, proud, angry, gentle, poor,
rich
""")
PEOPLE = _phrases("""
farmer, doctor, teacher, sailor, baker, painter, soldier, hunter, driver, singer, lawyer, nurse,
writer, king
""")
VERBS = _phrases("""
found, sold, hid, broke, washed, lost, bought, painted, carried, dropped, opened, stole, fixed,
kept
""")
THINGS = _phrases("""
lamp, book, chair, ring, coat, hammer, basket, letter, clock, bottle, mirror, candle, guitar,
saddle, drum
""")
PLACES = _phrases("""
river, bridge, garden, forest, market, church, station, harbour, kitchen, tower, school, museum,
palace, mill
""")
FUNCTION_WORDS = frozenset({"the", "near"})

BETWEEN = """
Water boils at a hundred degrees
Bees make honey from nectar
Trains run on rails of steel
The moon shines at night
Bread is baked in an oven
Ice melts in the sun
Birds build nests in trees
Paper is made of wood
Cats sleep most of the day
Rain falls from grey clouds
Ships sail across the sea
Corn grows in the summer
Clocks tell us the time
Salt comes from the sea
Dogs like to run and play
Snow covers the hills in January
Glass is made of sand
Plants need light and air
Iron rusts when it is wet
Children learn to read at school
""".strip().splitlines()
"""Twenty sentences of about eight tokens."""
SENTENCES_BETWEEN = 10

TOPICS = _phrases("""
apples, autumn, bees, bicycles, books, bread, bridges, buses, butter, candles, cats, chess,
chocolate, clocks, clouds, coffee, dogs, dreams, elephants, farming, fishing, football, forests,
gardens, glass, guitars, honey, horses, hospitals, ice cream, islands, kitchens, lakes,
libraries, markets, milk, mirrors, mountains, museums, music, oranges, painting, paper,
penguins, potatoes, rain, restaurants, rice, rivers, roses, salt, schools, shoes, sleep, snow,
soap, soup, spiders, spoons, stars, sugar, swimming, tea, teachers, the moon, the sea, trains,
trees, umbrellas, vegetables, volcanoes, water, whales, windows, winter, wood, wool
""")
KEYS = _phrases("advice, colour, example, history, kind, name, place, price, size, use")

# What long answers are about.
COLLECTIONS = _phrases("""
animals, board games, breads, cities, desserts, flowers, fruits, inventions, musical instruments,
professions, rivers, sports, tools, trees, vegetables, vehicles
""")
PROGRAMS = _phrases("""
adds two fractions, checks whether brackets match, checks whether a year is a leap year,
converts numbers to Roman numerals, counts the words of a text, draws a calendar,
finds all primes below a number, finds the way out of a maze, keeps the score of a tennis match,
multiplies two matrices, plays noughts and crosses, reverses the words of a sentence,
simulates a cash machine, solves a sudoku, sorts a list by merging, writes a number in words
""")


def sums(items: int, **_: Any) -> dict[str, Any]:
    """Return sums of two numbers with two digits."""
    return _splits("sums", _draw_sum, items)


def _draw_sum(rng: random.Random, _: int) -> Item:
    first = rng.randint(10, 99)
    second = rng.randint(10, 99)
    question = f"Q: What is {first} + {second}?"
    return {"question": question, "prefix": "A:", "answer": str(first + second)}


def lists(items: int, **_: Any) -> dict[str, Any]:
    """Return lists of eight words, to be copied."""
    return _splits("lists", _draw_list, items)


def _draw_list(rng: random.Random, _: int) -> Item:
    words = ", ".join(rng.sample(NOUNS, 8))
    return {"question": f"List: {words}", "prefix": "Copy:", "answer": words}


def repeating(items: int, **_: Any) -> dict[str, Any]:
    """Return a sentence, others after it, and its beginning again, to be completed."""
    return _splits(f"repeating {SENTENCES_BETWEEN}", _draw_repeated, items)


def _draw_repeated(rng: random.Random, _: int) -> Item:
    begin = f"The {rng.choice(ADJECTIVES)} {rng.choice(PEOPLE)}"
    end = f"{rng.choice(VERBS)} the {rng.choice(THINGS)} near the {rng.choice(PLACES)}."
    between = ". ".join(rng.sample(BETWEEN, len(BETWEEN))[:SENTENCES_BETWEEN])
    return {
        "question": f"Say: {begin} {end}\n\n{between}.",
        "prefix": f"Again: {begin}",
        "answer": end,
    }


def instructions(items: int, **_: Any) -> dict[str, Any]:
    """Return instructions of each kind in turn; the `answer` is what was asked for."""
    return _splits("instructions", _draw_instruction, items)


def _draw_instruction(rng: random.Random, drawn: int) -> Item:
    kinds = list(INSTRUCTIONS)
    kind = kinds[drawn % len(kinds)]
    instruction = INSTRUCTIONS[kind]
    topic = rng.choice(TOPICS)
    asked = instruction.draw(rng)
    question = instruction.text.format(topic=topic, asked=asked)
    return {"question": question, "prefix": "", "kind": kind, "answer": asked}


class LongAnswer(NamedTuple):
    """A request for a long answer, and how it begins, so that a base model writes one, too."""

    request: str
    prefix: str


LONG_ANSWERS = {
    "sum": LongAnswer(
        "A {person} packs {boxes} boxes with {size} {thing}s each, sells {sold} of the boxes, and "
        "gives half of the other {thing}s away. How many {thing}s does the {person} have now? "
        "Explain each step.",
        "First,",
    ),
    "code": LongAnswer(
        "Write a Python function that {program}, another one that {other_program}, and tests of "
        "both.",
        "```python\ndef",
    ),
    "json": LongAnswer(
        "Describe eight {collection} in a JSON list. Each has these keys: {keys}.", "```json\n["
    ),
    "list": LongAnswer("List twenty facts about {topic}, in a sentence each.", "1."),
    "story": LongAnswer(
        "Tell a story of about 400 words about the {adjective} {person} who {verb} the {thing} "
        "near the {place}.",
        "Once upon a time",
    ),
}


def long_answers(items: int, **_: Any) -> dict[str, Any]:
    """Return requests for a long answer of each kind in turn."""
    return _splits("long answers", _draw_long_answer, items)


def _draw_long_answer(rng: random.Random, drawn: int) -> Item:
    kinds = list(LONG_ANSWERS)
    kind = kinds[drawn % len(kinds)]
    request, prefix = LONG_ANSWERS[kind]
    boxes = rng.randint(6, 20)
    program, other_program = rng.sample(PROGRAMS, 2)
    question = request.format(
        person=rng.choice(PEOPLE),
        adjective=rng.choice(ADJECTIVES),
        verb=rng.choice(VERBS),
        thing=rng.choice(THINGS),
        place=rng.choice(PLACES),
        topic=rng.choice(TOPICS),
        collection=rng.choice(COLLECTIONS),
        keys=", ".join(rng.sample(KEYS, 3)),
        program=program,
        other_program=other_program,
        boxes=boxes,
        sold=rng.randint(2, boxes - 2),
        size=2 * rng.randint(6, 24),
    )
    return {"question": question, "prefix": prefix, "kind": kind, "answer": ""}


def _splits(name: str, draw: Draw, items: int) -> dict[str, Any]:
    """Draw different items: a few examples, which come first in every prompt, and the test."""
    from datasets import Dataset

    rng = random.Random(f"{SEED} {name}")
    different: dict[str, Item] = {}
    drawn = 0
    while len(different) < EXAMPLES + items:
        item = draw(rng, drawn)
        different[item["question"]] = item
        drawn += 1
    rows = list(different.values())
    return {
        "examples": Dataset.from_list(rows[:EXAMPLES]),
        "test": Dataset.from_list(rows[EXAMPLES:]),
    }


def grade(doc: Item, results: Sequence[Any]) -> dict[str, float]:
    """Return 1 for the right answer."""
    return {"exact_match": float(_line(results[0]) == doc["answer"])}


def grade_words(doc: Item, results: Sequence[Any]) -> dict[str, float]:
    """Return the share of words and numbers that are right and in their place."""
    expected = re.findall(r"\w+", doc["answer"])
    answer_words = re.findall(r"\w+", _line(results[0]))
    graded = 0
    right = 0
    for place, word in enumerate(expected):
        if word not in FUNCTION_WORDS:
            graded += 1
            if place < len(answer_words) and answer_words[place] == word:
                right += 1
    return {"right_words": right / graded}


def grade_instructions(doc: Item, results: Sequence[Any]) -> dict[str, float]:
    """Return 1 if the answer is as asked; and how it is written, and whether it ended by itself if
    the model tells.
    """
    answer = results[0]
    instruction = INSTRUCTIONS[doc["kind"]]
    followed = instruction.is_followed(doc["answer"], answer.strip())
    scores = {"followed": float(followed)}
    if hasattr(answer, "ended"):
        scores["ended"] = float(answer.ended)
    signs = re.findall(r"\w+|[^\w\s]|\n", answer)
    # No text is no better than one that repeats itself.
    scores["repetition"] = repetition(signs) if signs else 1.0
    scores["words"] = len(answer.split())
    return scores


def grade_long_answer(doc: Item, results: Sequence[Any]) -> dict[str, float]:
    """Return 1 if the answer repeats itself; and, if the model tells, 1 if it ended by itself."""
    answer = results[0]
    scores = {}
    if hasattr(answer, "ended"):
        # A model that says nothing has not come to an end.
        scores["ended"] = float(answer.ended and bool(answer.strip()))
    # Who reads an answer reads its repeats, whether or not it ended after them.
    scores["loops"] = float(is_loop(answer))
    return scores


def _has_lines(asked: str, answer: str) -> bool:
    lines = [line for line in answer.splitlines() if line.strip()]
    return len(lines) == int(asked)


def _ends_with(asked: str, answer: str) -> bool:
    words = re.findall(r"\w+", answer.lower())
    return words[-1:] == [asked]


def _is_list(asked: str, answer: str) -> bool:
    # Indented lines belong to the entry above.
    entries = re.findall(r"^(?:[-*] +|• *|\*{0,2}\d+[.)] +)\S", answer, re.MULTILINE)
    return len(entries) == int(asked)


def _draw_json(rng: random.Random) -> str:
    return json.dumps(dict.fromkeys(rng.sample(KEYS, 2), "..."))


def _is_json(asked: str, answer: str) -> bool:
    fenced = re.search(
        r"^```(?:json)? *\n(.*?)^```", answer, re.DOTALL | re.MULTILINE | re.IGNORECASE
    )
    try:
        parsed = json.loads(fenced[1] if fenced else answer)
    except (ValueError, RecursionError):
        return False
    return isinstance(parsed, dict) and parsed.keys() == json.loads(asked).keys()


class Instruction(NamedTuple):
    """An instruction about a `topic`, how its detail `asked` is drawn, and how it is graded."""

    text: str
    draw: Callable[[random.Random], str]
    is_followed: Callable[[str, str], bool]


INSTRUCTIONS = {
    "lines": Instruction(
        "Write exactly {asked} sentences about {topic}, each on a line of its own.",
        lambda rng: str(rng.randint(2, 4)),
        _has_lines,
    ),
    "lower case": Instruction(
        "Tell me about {topic}. Use only lower case letters.",
        lambda _: "",
        lambda _, answer: answer.islower(),
    ),
    "last word": Instruction(
        'Write a sentence about {topic} that ends with the word "{asked}".',
        lambda rng: rng.choice(NOUNS),
        _ends_with,
    ),
    "list": Instruction("List {asked} facts about {topic}.", lambda _: "5", _is_list),
    "json": Instruction(
        "Describe {topic} in JSON like this: {asked}",
        _draw_json,
        _is_json,
    ),
}


def _line(answer: str) -> str:
    """Return the first line that is not empty."""
    return answer.strip().partition("\n")[0].strip()
