"""Passes over batches: their scores, what they cost in memory, and what happens when memory runs
out.
"""

from collections import defaultdict
from itertools import count

import pytest
import torch

from conftest import llama_config, random_model
from families import tiny_config
from reference import plain_loss
from sleb_cli.engine.forward.memory_budget import MemoryBudget
from sleb_cli.engine.forward.passes import Passes
from sleb_cli.engine.forward.prepare import prepare_passes
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.forward.states import BASE
from sleb_cli.events import Notice, no_progress
from sleb_plugins.metrics.kl import KlDivergence
from sleb_plugins.metrics.nll import NegativeLogLikelihood

PLENTY = MemoryBudget(sequences=4, positions=1000, branches=6, kept_branches=100)
CANDIDATES = [1, 2, 3, 4]


@pytest.fixture
def skippable():
    model = random_model(llama_config(6, vocab_size=3000))
    with torch.inference_mode(), SkippableModel(model, model.model.layers) as skippable:
        yield skippable


@pytest.fixture
def sequences():
    return torch.randint(2, 300, (8, 24), generator=torch.Generator().manual_seed(1))


def passes_of(skippable, sequences, *budget, **options):
    events = []
    budget = MemoryBudget(*budget) if budget else PLENTY
    batches = torch.split(sequences, budget.sequences)
    return Passes(skippable, batches, budget, events.append, **options), events


def score(passes, removed=(), candidates=CANDIDATES, metric=None, ranking=(), advance=no_progress):
    found = defaultdict(list)
    jobs = [(batch, candidates) for batch in range(len(passes.batches))]
    for _, block, scores in passes.score(
        metric or NegativeLogLikelihood(), removed, jobs, ranking, advance
    ):
        found[block] += scores
    return dict(found)


def losses(skippable, sequences, removed, loss_mask):
    """Return the loss of each sequence over the tokens that count, from whole logits."""
    logits = skippable.logits(sequences, removed)[:, :-1].transpose(1, 2)
    every = torch.nn.functional.cross_entropy(logits, sequences[:, 1:], reduction="none")
    counted = loss_mask[:, 1:]
    return ((every * counted).sum(1) / counted.sum(1)).tolist()


@pytest.mark.parametrize("forks", [True, False], ids=["fork", "whole passes"])
@pytest.mark.parametrize("share", [1.0, 0.3], ids=["all tokens count", "some tokens count"])
@pytest.mark.parametrize("candidates", [(), (1, 3, 4)], ids=["as it stands", "candidates"])
def test_scores_are_those_of_whole_logits(skippable, sequences, candidates, forks, share):
    loss_mask = torch.rand(sequences.shape, generator=torch.Generator().manual_seed(2)) < share
    passes, _ = passes_of(skippable, sequences, forks=forks, loss_mask=torch.split(loss_mask, 4))
    advanced = []
    found = score(passes, (2,), candidates, advance=advanced.append)
    assert list(found) == list(candidates or [BASE])
    for block, scores in found.items():
        expected = losses(skippable, sequences, {2, block}, loss_mask)
        assert scores == pytest.approx(expected, abs=1e-5)
    assert sum(advanced) == pytest.approx(max(1, len(candidates)) * len(sequences))


def norms(entering, leaving, mask):
    return (leaving - entering).norm(dim=-1).mean(-1).tolist()


def score_norms(passes):
    return passes.score_states([1], (2,), [3, 5], norms, longest=3)[1]


def score_sizes(passes, metric=None, advance=no_progress):
    found = defaultdict(list)
    sizes = {batch: [(2,), (2, 4), (3, 1)] for batch in range(len(passes.batches))}
    metric = metric or NegativeLogLikelihood()
    for _, removed, scores in passes.score_sizes(metric, sizes, advance):
        found[removed] += scores
    return dict(found)


@pytest.mark.parametrize("metric", [NegativeLogLikelihood(), KlDivergence()], ids=["nll", "kl"])
def test_sizes_that_share_a_walk_score_as_each_alone(skippable, sequences, metric):
    passes, _ = passes_of(skippable, sequences, 4, 16, 2, 0)
    advanced = []
    found = score_sizes(passes, metric, advanced.append)
    assert sum(advanced) == 3 * len(sequences)
    for removed, scores in found.items():
        assert scores == score(passes, removed, (), metric)[BASE]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
@pytest.mark.parametrize(
    ("how", "first"), [(score, 3), (score_norms, 1), (score_sizes, 3)]
)  # before the third, some have their scores
def test_batches_are_halved_and_scores_stay_the_same(
    skippable, sequences, monkeypatch, how, first, error
):
    expected = how(passes_of(skippable, sequences)[0])
    passes, events = passes_of(skippable, sequences, 4, 16, 1, 0)
    calls, forward = count(1), skippable.switches[5].forward

    def failing(*args, **kwargs):
        if next(calls) in (first, first + 1):
            raise error("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return forward(*args, **kwargs)

    monkeypatch.setattr(skippable.switches[5], "forward", failing)
    found = how(passes)
    assert passes.budget == MemoryBudget(sequences=1, positions=16, branches=1, kept_branches=0)
    assert len([event for event in events if isinstance(event, Notice)]) == 2
    assert found == {block: pytest.approx(scores, rel=1e-5) for block, scores in expected.items()}


def test_states_of_unrelated_removals_are_not_reused(skippable, sequences):
    used, _ = passes_of(skippable, sequences)
    fresh, _ = passes_of(skippable, sequences)
    score(used, (1,), [2, 3, 4], ranking=[3])
    assert score(used, (4,), [1, 2, 3]) == score(fresh, (4,), [1, 2, 3])


@torch.inference_mode()
def test_a_family_whose_fork_has_other_logits_runs_whole(sequences):
    """XLM works between its blocks."""
    model = random_model(tiny_config("xlm"))
    blocks = model.transformer.ffns
    with SkippableModel(model, blocks) as skippable:
        passes, why = prepare_passes(skippable, sequences, print, batch_size=2)
        found = score(passes, (1,), [2, 4])
    assert not passes.forks
    assert "the fork's results differ from those of the whole model" in why
    for block, scores in found.items():
        expected = plain_loss(model, blocks, sequences, {1, block})
        assert sum(scores) / len(scores) == pytest.approx(expected, abs=1e-5)
