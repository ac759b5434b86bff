"""A corpus on models that only read: how much of what the dense model finds stays."""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
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
from sleb_cli.events import Notice
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
TWENTY = 20
"""Among so many, those that are nearest to the dense model should be found."""
UNJUDGED = 20
"""How many texts, by chance, a reranker ranks besides those that are judged."""
QUERIES_AT_ONCE = 256

Measures = dict[str, list[float]]
"""The values of each query, text or pair, by the name of the measure."""


class CorpusComparison(ABC):
    """How outputs of one kind are compared with the dense model's, on a corpus.

    Attributes:
        needed: how many texts there must be at least.
        count: how many texts there are.
        items: what is read.
        queries: what is read after that, with a prompt of its own.
    """

    needed = 2

    def __init__(self, corpus: Corpus, architecture: Architecture) -> None:
        self.corpus = corpus
        self.count = len(corpus.texts)
        self.items: Sequence[Item] = corpus.texts
        self.queries: Sequence[str] = ()

    @abstractmethod
    def measures(self, outputs: Tensor, dense: Tensor) -> Measures:
        """Compare outputs, [items and queries, width]."""

    def _judge(self, measures: Measures, index: str, ranking: Sequence[int], query: int) -> None:
        """Measure a ranking of texts, if one of them is known to be relevant to the query."""
        if query < len(self.corpus.gains):
            gains = self.corpus.gains[query]
            if max(gains.values(), default=0) > 0:
                measures[f"nDCG@10{index}"].append(ndcg(ranking, gains))
                measures[f"MRR@10{index}"].append(reciprocal_rank(ranking, gains))


@dataclass(frozen=True)
class CorpusTexts:
    """What a model reads of a corpus, and what is measured.

    Attributes:
        description: the fields of a `CorpusResult` that identify the texts.
    """

    texts: PaddedTexts
    comparison: CorpusComparison
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
    comparison = COMPARISONS[str(architecture.record.output)](corpus, architecture)
    if comparison.count < comparison.needed:
        raise DataError(
            f"{name} has {plural(comparison.count, 'text')}, but needs at least "
            f"{comparison.needed}.",
            hint="Add more texts to it.",
        )
    shapes = [_shape(architecture, length, prompt)]
    if comparison.queries:
        shapes = [
            _shape(architecture, length, prompt, QUERY_PROMPTS),
            _shape(architecture, length, None, TEXT_PROMPTS),
        ]
    texts = pad_texts(tokenizer, comparison.items, shapes[-1])
    if comparison.queries:
        texts = join([texts, pad_texts(tokenizer, comparison.queries, shapes[0])])
    known = {
        "tokens": tokens_sha256(texts.ids),
        "gains": corpus.gains,
        "own": corpus.own,
        "labels": corpus.labels,
    }
    description = {
        "corpus": local_path(name).name,
        "texts": comparison.count,
        "queries": len(corpus.queries),
        "sequence_length": length,
        "prompts": tuple(shape.prompt for shape in shapes),
        "sha256": name_of(known),
    }
    return CorpusTexts(texts, comparison, description)


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
    if not all(of_size.isfinite().all() for of_size in outputs):
        raise ModelError("A model puts out NaN or infinity.", hint="Try --dtype float32.")
    before = outputs[0].shape[1]
    after = outputs[-1].shape[1]
    if before != after:
        text = f"puts out vectors of {after:,} numbers instead of {before:,}"
        name = models.short_name(sizes[-1])
        models.notify(Notice(f"{name} {text}, so it cannot use the old index."))
    measures = [corpus.comparison.measures(of_size, outputs[0]) for of_size in outputs]
    results = []
    for name in measures[-1]:  # without the old index if widths differ
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


def _cosine(queries: Tensor, texts: Tensor) -> Tensor:
    return functional.normalize(queries) @ functional.normalize(texts).T


def _dot(queries: Tensor, texts: Tensor) -> Tensor:
    return queries @ texts.T


def _euclidean(queries: Tensor, texts: Tensor) -> Tensor:
    return -torch.cdist(queries, texts)


def _manhattan(queries: Tensor, texts: Tensor) -> Tensor:
    return -torch.cdist(queries, texts, p=1)


SIMILARITIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": _cosine,
    "dot": _dot,
    "euclidean": _euclidean,
    "manhattan": _manhattan,
}
"""How near each text is to each query, [queries, texts], by the names of sentence-transformers."""


class VectorComparison(CorpusComparison):
    """Each query, or each text, finds the nearest texts in two indices."""

    needed = NEAREST + 2

    def __init__(self, corpus: Corpus, architecture: Architecture) -> None:
        super().__init__(corpus, architecture)
        self.queries = corpus.queries
        assert architecture.reading is not None
        self._similarity = SIMILARITIES[architecture.reading.similarity]

    def measures(self, outputs: Tensor, dense: Tensor) -> Measures:
        """Say how many of the nearest texts stay, and how good the first are."""
        own = self.corpus.own or range(self.count)  # no text finds itself
        first = len(outputs) - len(own)
        texts = dense[: self.count]
        measures: Measures = defaultdict(list)
        for start in range(0, len(own), QUERIES_AT_ONCE):
            rows = slice(first + start, first + start + QUERIES_AT_ONCE)
            wanted = self._similarity(dense[rows], texts)
            indices = {}
            if outputs.shape == dense.shape:
                indices["old index"] = self._similarity(outputs[rows], texts)
            indices["own index"] = self._similarity(outputs[rows], outputs[: self.count])
            for row, text in enumerate(own[start : start + QUERIES_AT_ONCE]):
                if text is not None:
                    for similarities in (wanted, *indices.values()):
                        similarities[row, text] = -torch.inf
            nearest = wanted.topk(NEAREST).indices
            for index, similarities in indices.items():
                ranked = similarities.topk(min(TWENTY, self.count)).indices
                stays = (ranked.unsqueeze(1) == nearest.unsqueeze(2)).any(1).double()
                in_ten = stays[:, :NEAREST].sum(1) / NEAREST
                in_twenty = stays.sum(1) / NEAREST
                measures[f"neighbours, {index}"] += in_ten.tolist()
                measures[f"neighbours in 20, {index}"] += in_twenty.tolist()
                for query, ranking in enumerate(ranked[:, :NEAREST].tolist(), start=start):
                    self._judge(measures, f", {index}", ranking, query)
            measures["rank correlation"] += rank_correlation(indices["own index"], wanted)
        return measures


class ScoreComparison(CorpusComparison):
    """A reranker sorts the judged texts of each query, and some others."""

    def __init__(self, corpus: Corpus, architecture: Architecture) -> None:
        super().__init__(corpus, architecture)
        numbers = range(self.count)
        self._candidates: list[Sequence[int]] = []
        if not corpus.queries:
            self._candidates.append(numbers)
            return
        drawn = random.Random(0)
        pairs: list[Item] = []
        for query, gains, own in zip(corpus.queries, corpus.gains, corpus.own, strict=True):
            others = drawn.sample(numbers, min(UNJUDGED, self.count))
            chosen = [number for number in dict.fromkeys([*gains, *others]) if number != own]
            drawn.shuffle(chosen)  # equal scores are sorted by chance, not by being judged
            self._candidates.append(chosen)
            pairs += [(query, corpus.texts[number]) for number in chosen]
        self.items = pairs

    def measures(self, outputs: Tensor, dense: Tensor) -> Measures:
        """Compare the order of the candidates of each query."""
        measures: Measures = defaultdict(list)
        start = 0
        for query, texts in enumerate(self._candidates):
            rows = slice(start, start + len(texts))
            start = rows.stop
            row = outputs[rows].T
            if len(texts) > 1:
                measures["rank correlation"] += rank_correlation(row, dense[rows].T)
            places = row[0].argsort(descending=True, stable=True)
            self._judge(measures, "", [texts[place] for place in places], query)
        return measures


class ClassComparison(CorpusComparison):
    """A classifier chooses a class for each text or pair."""

    def __init__(self, corpus: Corpus, architecture: Architecture) -> None:
        super().__init__(corpus, architecture)
        self.items = corpus.items
        self.count = len(corpus.items)
        self._labels = [_class_of(label, architecture.config) for label in corpus.labels]

    def measures(self, outputs: Tensor, dense: Tensor) -> Measures:
        """Compare the classes with the dense model's, and with labels."""
        classes = outputs.argmax(-1)
        measures = {"same class": (classes == dense.argmax(-1)).double().tolist()}
        right = []
        for chosen, label in zip(classes.tolist(), self._labels, strict=False):
            if label is not None:
                right.append(float(chosen == label))
        if right:
            measures["accuracy"] = right
        return measures


COMPARISONS: dict[str, type[CorpusComparison]] = {
    "vectors": VectorComparison,
    "scores": ScoreComparison,
    "classes": ClassComparison,
}
"""By what the model puts out."""


def _class_of(label: Label | None, config: Any) -> int | None:
    """Return the number of a class, which is given by its number or its name."""
    number: Any = config.label2id.get(label, label)
    if number is not None and number not in range(config.num_labels):
        raise DataError(
            f"The model has no class {label!r}.",
            hint=f"Its classes are {', '.join(config.label2id)}.",
        )
    return None if number is None else int(number)


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
    """Return Spearman's correlation of each row, [rows, values]; -inf in both is no value.

    It is 0 where all values of a row are equal, and so say nothing of an order.
    """
    correlations: list[float] = (_centered_ranks(one) * _centered_ranks(other)).sum(1).tolist()
    return correlations


def _centered_ranks(values: Tensor) -> Tensor:
    """Return ranks around 0, of length 1, [rows, values]; equal values share their mean rank."""
    from scipy.stats import rankdata  # slow to import

    is_value = values > -torch.inf
    ranks = torch.from_numpy(rankdata(values.double().numpy(), axis=1)) * is_value
    means = ranks.sum(1, keepdim=True) / is_value.sum(1, keepdim=True)
    return functional.normalize((ranks - means) * is_value)
