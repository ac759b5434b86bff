"""A corpus on models that only read: how much of what the dense model finds stays."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.model.padded import PaddedTexts, join
from sleb_cli.engine.quality.models import Models
from sleb_cli.engine.quality.tasks import compare_scores
from sleb_cli.engine.quality.texts import Scorer
from sleb_cli.engine.quality.token_scores import Scores
from sleb_cli.engine.statistics import paired_difference
from sleb_cli.engine.text.passages import Item, TextShape, pad_texts, shape_of
from sleb_cli.engine.text.windows import tokens_sha256
from sleb_cli.keys import name_of
from sleb_cli.names import local_path
from sleb_cli.order import SizeKey
from sleb_cli.results import CorpusResult, TaskScores
from sleb_cli.texts.corpus_files import Corpus
from sleb_cli.texts.messages import Label
from sleb_cli.units import plural
from sleb_plugins import DataError, ModelError

QUERY_PROMPTS = ("query",)
TEXT_PROMPTS = ("document", "passage", "corpus")
"""What sentence-transformers begins queries and texts with, where a model has such a prompt."""

NEAREST = 10
UNJUDGED = 20
"""How many texts, by chance, a reranker ranks besides those that are judged."""
QUERIES_AT_ONCE = 256

Measures = dict[str, list[float]]
"""The values of each query, text or pair, by the name of the measure."""


@dataclass(frozen=True)
class CorpusTexts:
    """What a model reads of a corpus.

    Attributes:
        texts: texts, and then queries, for vectors; each query with its candidates for scores.
        gains: how relevant each judged text is to each query, by its number.
        candidates: the numbers of the texts that are scored for each query.
        labels: the class of each text or pair; None where it is not known.
        description: the fields of a `CorpusResult` that identify the texts.
    """

    texts: PaddedTexts
    gains: Sequence[Mapping[int, float]]
    candidates: Sequence[Sequence[int]]
    labels: Sequence[int | None]
    description: dict[str, Any]


def tokenize_corpus(
    name: str,
    corpus: Corpus,
    architecture: Architecture,
    tokenizer: Any,
    length: int,
    prompt: str | None,
) -> CorpusTexts:
    """Tokenize what this kind of model reads of a corpus, cut to `length` tokens.

    `prompt` names what queries begin with, or texts that ask each other.

    Raises:
        DataError: there are too few texts, or a label is no class of the model.
        UsageError: the model has no prompt of this name.
    """
    shapes = [_shape(architecture, length, prompt)]
    candidates: list[list[int]] = []
    labels: list[int | None] = []
    items: Sequence[Item] = corpus.texts
    output = architecture.record.output
    if output == "classes":
        items = corpus.items
        labels = [_class_of(label, architecture.config) for label in corpus.labels]
    elif output == "scores":
        candidates, items = _pair(corpus)
    elif corpus.queries:
        shapes = [
            _shape(architecture, length, prompt, QUERY_PROMPTS),
            _shape(architecture, length, None, TEXT_PROMPTS),
        ]
    needed = NEAREST + 2 if output == "vectors" else 2
    if len(items) < needed:
        raise DataError(
            f"{name} has {plural(len(items), 'text')}, but needs at least {needed}.",
            hint="Add more texts to it.",
        )
    texts = pad_texts(tokenizer, items, shapes[-1])
    if len(shapes) > 1:
        texts = join([texts, pad_texts(tokenizer, corpus.queries, shapes[0])])
    known = {"tokens": tokens_sha256(texts.ids), "gains": corpus.gains, "labels": labels}
    description = {
        "corpus": local_path(name).name,
        "texts": len(corpus.texts if output == "scores" else items),
        "queries": len(corpus.queries),
        "sequence_length": length,
        "prompts": tuple(shape.prompt for shape in shapes),
        "sha256": name_of(known),
    }
    return CorpusTexts(texts, corpus.gains, candidates, labels, description)


def _shape(
    architecture: Architecture, length: int, prompt: str | None, usual: Sequence[str] = ()
) -> TextShape:
    """Choose how texts become sequences: with this prompt, or else a usual one that there is."""
    reading = architecture.reading
    assert reading is not None
    for name in usual:
        if prompt is None and name in reading.prompts:
            prompt = name
    shape = shape_of(architecture, length, prompt)
    assert shape is not None
    return shape


def _pair(corpus: Corpus) -> tuple[list[list[int]], list[Item]]:
    """Choose the texts that are scored for each query, and pair them with it."""
    numbers = range(len(corpus.texts))
    if not corpus.queries:
        return [list(numbers)], list(corpus.texts)
    drawn = random.Random(0)
    candidates = []
    pairs: list[Item] = []
    for query, gains in zip(corpus.queries, corpus.gains, strict=True):
        others = drawn.sample(numbers, min(UNJUDGED, len(numbers)))
        candidates.append(list(dict.fromkeys([*gains, *others])))
        pairs += [(query, corpus.texts[number]) for number in candidates[-1]]
    return candidates, pairs


def _class_of(label: Label | None, config: Any) -> int | None:
    """Return the number of a class, which is given by its number or its name."""
    number: Any = config.label2id.get(label, label)
    if number is not None and number not in range(config.num_labels):
        raise DataError(
            f"The model has no class {label!r}.",
            hint=f"Its classes are {', '.join(config.label2id)}.",
        )
    return None if number is None else int(number)


def measure_corpus(
    corpus: CorpusTexts, models: Models, sizes: Sequence[SizeKey], batch_size: int | None
) -> tuple[CorpusResult, ...]:
    """Measure the dense model and some sizes on a corpus, whose texts processes share out.

    Raises:
        ModelError: an output is not finite.
    """
    # The longest first: if memory is short, it shows at once.
    order = corpus.texts.mask.sum(1).argsort(descending=True, stable=True)
    with ExitStack() as opened:
        scorer = Scorer(
            models, [(), *sizes], corpus.texts[order], batch_size, opened, _hold_outputs
        )
        scored = scorer.score_all(f"Reading {corpus.description['corpus']}", "texts")
    outputs = [scores["output"][order.argsort()] for scores in scored]
    if not all(bool(output.isfinite().all()) for output in outputs):
        raise ModelError("A model puts out NaN or infinity.", hint="Try --dtype float32.")
    output = models.architecture.record.output
    measure = {"vectors": _of_vectors, "scores": _of_scores, "classes": _of_classes}[str(output)]
    measures = [measure(corpus, of_size, outputs[0]) for of_size in outputs]
    results = []
    for name in measures[0]:
        dense, *pruned = [_scores(of_size[name]) for of_size in measures]
        compared = []
        for size, scores in zip(sizes, pruned, strict=True):
            change = paired_difference(dense.items, scores.items)
            compared.append(compare_scores(dense, scores, change, size))
        results.append(
            CorpusResult(**corpus.description, measure=name, dense=dense, pruned=tuple(compared))
        )
    return tuple(results)


def _hold_outputs(_: PaddedTexts, outputs: Sequence[Tensor], __: int) -> list[Scores]:
    return [{"output": output.cpu()} for output in outputs]


def _scores(items: Sequence[float]) -> TaskScores:
    return TaskScores(value=fmean(items), stderr=None, interval=None, items=tuple(items))


def _of_vectors(corpus: CorpusTexts, vectors: Tensor, dense: Tensor) -> Measures:
    """Have each query, or each text, find the nearest texts in two indices."""
    vectors = functional.normalize(vectors)
    dense = functional.normalize(dense)
    count = corpus.description["texts"]
    first = count if corpus.gains else 0
    measures: Measures = defaultdict(list)
    for start in range(first, len(vectors), QUERIES_AT_ONCE):
        rows = slice(start, start + QUERIES_AT_ONCE)
        wanted = dense[rows] @ dense[:count].T
        indices = {
            "old index": vectors[rows] @ dense[:count].T,
            "own index": vectors[rows] @ vectors[:count].T,
        }
        if not corpus.gains:  # no text finds itself
            for similarities in (wanted, *indices.values()):
                similarities.diagonal(start).fill_(-torch.inf)
        nearest = wanted.topk(NEAREST).indices
        for index, similarities in indices.items():
            ranked = similarities.topk(NEAREST).indices
            same = ranked.unsqueeze(1) == nearest.unsqueeze(2)
            measures[f"neighbours, {index}"] += (same.sum((1, 2)).double() / NEAREST).tolist()
            for query, ranking in enumerate(ranked.tolist(), start=start - first):
                _judge(measures, f", {index}", ranking, corpus.gains[query : query + 1])
        measures["rank correlation"] += rank_correlation(
            of_others(indices["own index"]), of_others(wanted)
        )
    return measures


def of_others(similarities: Tensor) -> Tensor:
    """Leave out each text's similarity to itself, which is -inf."""
    others = similarities.masked_select(similarities > -torch.inf)
    return others.view(len(similarities), -1)


def _of_scores(corpus: CorpusTexts, scores: Tensor, dense: Tensor) -> Measures:
    """Rank the candidates of each query."""
    measures: Measures = defaultdict(list)
    start = 0
    for query, texts in enumerate(corpus.candidates):
        row = scores[start : start + len(texts)].T
        measures["rank correlation"] += rank_correlation(row, dense[start : start + len(texts)].T)
        ranking = [texts[place] for place in row[0].argsort(descending=True, stable=True).tolist()]
        _judge(measures, "", ranking, corpus.gains[query : query + 1])
        start += len(texts)
    return measures


def _of_classes(corpus: CorpusTexts, outputs: Tensor, dense: Tensor) -> Measures:
    """Compare the classes with the dense model's, and with labels."""
    classes = outputs.argmax(-1)
    measures = {"same class": (classes == dense.argmax(-1)).double().tolist()}
    right = []
    for chosen, label in zip(classes.tolist(), corpus.labels, strict=False):
        if label is not None:
            right.append(float(chosen == label))
    if right:
        measures["accuracy"] = right
    return measures


def _judge(
    measures: Measures, index: str, ranking: Sequence[int], judged: Sequence[Mapping[int, float]]
) -> None:
    for gains in judged:
        if max(gains.values(), default=0) > 0:
            measures[f"nDCG@10{index}"].append(ndcg(ranking, gains))
            measures[f"MRR@10{index}"].append(reciprocal_rank(ranking, gains))


def ndcg(ranking: Sequence[int], gains: Mapping[int, float]) -> float:
    """Return nDCG@10 with linear gains, as trec_eval computes it."""
    gained = [gains.get(text, 0.0) for text in ranking]
    return _discounted(gained) / _discounted(sorted(gains.values(), reverse=True))


def _discounted(gains: Sequence[float]) -> float:
    total = 0.0
    for place, gain in enumerate(gains[:NEAREST]):
        total += max(0.0, gain) / math.log2(place + 2)
    return total


def reciprocal_rank(ranking: Sequence[int], gains: Mapping[int, float]) -> float:
    """Return 1 / the place of the first relevant text; 0 if it is not among the first ten."""
    for place, text in enumerate(ranking[:NEAREST], start=1):
        if gains.get(text, 0) > 0:
            return 1 / place
    return 0.0


def rank_correlation(one: Tensor, other: Tensor) -> list[float]:
    """Return Spearman's correlation of each row, [rows, values]."""
    count = one.shape[1]
    distances = one.argsort(1).argsort(1) - other.argsort(1).argsort(1)
    squares = distances.double().square().sum(1)
    correlations: list[float] = (1 - 6 * squares / (count * (count**2 - 1))).tolist()
    return correlations
