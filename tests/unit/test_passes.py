"""Passes over batches: what they cost in memory, and what happens when the device runs out of it."""

import pytest
import torch
from transformers import LlamaForCausalLM

from conftest import llama_config, random_model
from families import tiny_config
from reference import plain_loss
from sleb_cli.engine.forward.engines import choose_engine
from sleb_cli.engine.forward.memory_budget import MemoryBudget
from sleb_cli.engine.forward.passes import Passes, prepare_passes
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.forward.states import BASE
from sleb_cli.events import Notice, SearchAdvanced
from sleb_plugins import MachineError
from sleb_plugins.errors import OutOfMemory
from sleb_plugins.metrics.kl import KlDivergence
from sleb_plugins.metrics.nll import NegativeLogLikelihood

PLENTY = MemoryBudget(sequences=4, positions=1000, branches=6, kept=100)
CANDIDATES = [1, 2, 3, 4]


@pytest.fixture
def skippable():
    model = random_model(llama_config(6, vocab_size=3000))
    with torch.inference_mode(), SkippableModel(model, model.model.layers) as skippable:
        yield skippable


@pytest.fixture
def sequences():
    return torch.randint(2, 300, (8, 24), generator=torch.Generator().manual_seed(1))


def passes_of(skippable, sequences, budget=PLENTY, engine="fork"):
    events = []
    return Passes(skippable, torch.split(sequences, budget.sequences), budget, events.append, engine), events


def score(passes, removed=(), candidates=CANDIDATES, metric=None):
    found = {block: [] for block in candidates or [BASE]}
    for batch in range(len(passes.batches)):
        for block, scores in passes.scores(metric or NegativeLogLikelihood(), batch, removed, candidates):
            found[block] += scores
    return found


def test_both_engines_give_the_same_numbers(skippable, sequences):
    by_fork, plain = (
        score(passes_of(skippable, sequences, engine=engine)[0], removed=(2,), candidates=[1, 3, 4])
        for engine in ("fork", "plain")
    )
    for block in (1, 3, 4):
        assert by_fork[block] == pytest.approx(plain[block], abs=1e-5)


@pytest.mark.parametrize("engine", ["fork", "plain"])
def test_without_candidates_it_scores_the_model_as_it_stands(skippable, sequences, engine):
    passes, events = passes_of(skippable, sequences, engine=engine)
    logits = skippable.logits(sequences, {3})[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), sequences[:, 1:], reduction="none").mean(1)
    assert score(passes, removed=(3,), candidates=())[BASE] == pytest.approx(expected.tolist(), abs=1e-5)
    assert sum(event.evaluations for event in events if isinstance(event, SearchAdvanced)) == 0


@pytest.mark.parametrize("engine", ["fork", "plain"])
def test_tokens_that_do_not_count_have_no_part_in_a_score(skippable, sequences, engine):
    loss_mask = torch.rand(sequences.shape, generator=torch.Generator().manual_seed(2)) < 0.3
    for candidates, removed in (((), (3,)), ((2,), (3,))):
        passes, _ = passes_of(skippable, sequences, engine=engine)
        passes.loss_mask = torch.split(loss_mask, 4)
        found = score(passes, removed, candidates)[candidates[0] if candidates else BASE]
        logits = skippable.logits(sequences, {*removed, *candidates})
        for branch, ids in enumerate(sequences.tolist()):
            losses = [
                -logits[branch, position].log_softmax(-1)[ids[position + 1]].item()
                for position in range(len(ids) - 1)
                if loss_mask[branch, position + 1]
            ]
            assert found[branch] == pytest.approx(sum(losses) / len(losses), abs=1e-5)


def test_where_all_tokens_count_no_digit_changes(skippable, sequences):
    passes, _ = passes_of(skippable, sequences)
    plain = score(passes)
    masked, _ = passes_of(skippable, sequences)
    masked.loss_mask = torch.split(torch.ones_like(sequences, dtype=torch.bool), 4)
    assert score(masked) == plain


@pytest.mark.parametrize("engine", ["fork", "plain"])
def test_progress_adds_up_to_candidates_times_sequences(skippable, sequences, engine):
    passes, events = passes_of(skippable, sequences, engine=engine)
    score(passes)
    assert sum(event.evaluations for event in events) == pytest.approx(len(CANDIDATES) * len(sequences))


@pytest.mark.parametrize("metric", [NegativeLogLikelihood(), KlDivergence()], ids=["nll", "kl"])
@torch.inference_mode()
def test_no_more_logits_exist_than_a_chunk(sequences, metric):
    model = Counting(llama_config(6)).eval()
    with SkippableModel(model, model.model.layers) as skippable:
        passes, _ = prepare_passes(skippable, sequences, lambda event: None, batch_size=4)
        passes.budget = MemoryBudget(sequences=4, positions=12, branches=6, kept=100)
        model.counts.clear()
        score(passes, metric=metric)
    assert max(model.counts) == 12


class Counting(LlamaForCausalLM):
    """Counts the positions whose logits each pass returns."""

    def __init__(self, config):
        super().__init__(config)
        self.counts = []

    def forward(self, *args, logits_to_keep=0, **kwargs):
        output = super().forward(*args, logits_to_keep=logits_to_keep, **kwargs)
        self.counts.append(output.logits.shape[:2].numel())
        return output


class WithoutLogitsToKeep(LlamaForCausalLM):
    """Returns the logits of all positions, whatever is asked."""

    def forward(self, input_ids, use_cache=None):
        return super().forward(input_ids, use_cache=use_cache)


@torch.inference_mode()
def test_a_model_without_logits_to_keep_has_the_same_scores(skippable, sequences):
    expected = score(passes_of(skippable, sequences)[0])
    model = WithoutLogitsToKeep(skippable.model.config).eval()
    model.load_state_dict(skippable.model.state_dict())
    with SkippableModel(model, model.model.layers) as whole:
        assert score(passes_of(whole, sequences)[0]) == expected


def fail_at(skippable, monkeypatch, *numbers, error=torch.OutOfMemoryError):
    """Run out of memory at these calls of a block, or at all of them."""
    calls = []
    switch = skippable.switches[5]
    forward = switch._forward

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) in numbers or not numbers:
            raise error("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return forward(*args, **kwargs)

    monkeypatch.setattr(switch, "_forward", failing)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_out_of_memory_it_continues_with_less_and_scores_nothing_twice(skippable, sequences, monkeypatch, error):
    expected = score(passes_of(skippable, sequences)[0])
    passes, events = passes_of(skippable, sequences, MemoryBudget(sequences=4, positions=1000, branches=2, kept=100))
    # The second walk of the first batch: two candidates have their scores.
    fail_at(skippable, monkeypatch, 3, error=error)
    assert score(passes) == expected
    notices = [event.text for event in events if isinstance(event, Notice)]
    assert notices == ["Out of memory on cpu; continuing with 1 candidates, 4 sequences and 1000 positions at once."]


def test_in_the_end_it_halves_batches_and_the_scores_are_the_same_sequences(skippable, sequences, monkeypatch):
    expected = score(passes_of(skippable, sequences)[0])
    passes, _ = passes_of(skippable, sequences, MemoryBudget(sequences=4, positions=16, branches=1, kept=0))
    fail_at(skippable, monkeypatch, 1, 2)
    found = score(passes)
    assert passes.budget == MemoryBudget(sequences=1, positions=16, branches=1, kept=0)
    for block in CANDIDATES:
        assert found[block] == pytest.approx(expected[block], abs=1e-5)


def test_where_nothing_smaller_is_left_the_error_says_so(skippable, sequences, monkeypatch):
    passes, _ = passes_of(skippable, sequences)
    fail_at(skippable, monkeypatch)
    with pytest.raises(MachineError, match="1 sequences of 24 tokens do not fit into the memory of cpu"):
        score(passes)


def test_another_error_is_not_taken_for_one_of_memory(skippable, sequences, monkeypatch):
    passes, _ = passes_of(skippable, sequences)
    monkeypatch.setattr("sleb_cli.engine.forward.passes.score_hidden_states", _broken)
    with pytest.raises(RuntimeError, match="shapes"):
        score(passes)


def _broken(*args, **kwargs):
    raise RuntimeError("shapes cannot be multiplied")


def test_steps_begin_where_the_last_one_left_what_they_need(skippable, sequences, monkeypatch):
    branches = []
    run = skippable.run_block
    monkeypatch.setattr(skippable, "run_block", lambda call, hidden: branches.append(call.block) or run(call, hidden))
    passes, _ = passes_of(skippable, sequences)
    passes.ranking = [3, 2, 1, 4]
    score(passes)
    branches.clear()
    remembered = score(passes, removed=(3,), candidates=[1, 2, 4])
    # Up to block 3 all is known, for 2 batches: then come branches 1 and 2, and the base for 4 to fork off from.
    assert branches == [4, 4, 5, 5, 5] * 2
    fresh, _ = passes_of(skippable, sequences, MemoryBudget(sequences=4, positions=1000, branches=6, kept=0))
    assert score(fresh, removed=(3,), candidates=[1, 2, 4]) == remembered


def test_later_steps_are_forecast_from_the_leader(skippable, sequences):
    passes, _ = passes_of(skippable, sequences)
    block = sum(weight.numel() for weight in skippable.switches[3].block.parameters())
    head = skippable.model.lm_head.weight.numel() / block
    passes.ranking = [3, 1]
    # Branches from their block on: 5 + 4 + 3 + 2 of 6 blocks, and 6 for the base; up to block 3, 2 + 1 + 3 are spared.
    assert passes.share_of_later_steps(CANDIDATES) == pytest.approx(1 - 6 / (20 + 4 * head))
    passes.budget = MemoryBudget(sequences=4, positions=1000, branches=6, kept=0)
    assert passes.share_of_later_steps(CANDIDATES) == 1


def test_what_enters_and_leaves_blocks_comes_out_of_less_than_one_pass(skippable, sequences, monkeypatch):
    calls = []
    run = skippable.run_block
    monkeypatch.setattr(skippable, "run_block", lambda call, hidden: calls.append(call.block) or run(call, hidden))
    seen = {}
    for engine in ("fork", "plain"):
        passes, _ = passes_of(skippable, sequences, engine=engine)
        seen[engine] = {}
        passes.watch(1, (2,), [1, 3, 4], lambda here=seen[engine]: lambda block, *states: keep(here, block, states))
    assert calls == [0, 1, 3, 4]  # and the last block not at all
    assert list(seen["fork"]) == list(seen["plain"]) == [1, 3, 4]
    for block in (1, 3, 4):
        for ours, theirs in zip(seen["fork"][block], seen["plain"][block], strict=True):
            assert torch.equal(ours, theirs)


def keep(seen, block, states):
    seen[block] = states
    return [(block, [0.0])]


def test_out_of_memory_states_are_seen_in_smaller_parts_and_give_the_same_scores(skippable, sequences, monkeypatch):
    def size(block, entering, leaving):
        yield block, (leaving - entering).norm(dim=-1).mean(-1).tolist()

    expected = passes_of(skippable, sequences)[0].watch(1, (2,), [3, 5], lambda: size)
    passes, events = passes_of(skippable, sequences, MemoryBudget(sequences=4, positions=16, branches=1, kept=0))
    fail_at(skippable, monkeypatch, 1, 3)
    found = passes.watch(1, (2,), [3, 5], lambda: size)
    assert passes.budget.sequences == 1
    assert len([event for event in events if isinstance(event, Notice)]) == 2
    for block in (3, 5):
        assert found[block] == pytest.approx(expected[block], rel=1e-5)


def test_removals_that_do_not_follow_each_other_are_not_mixed_up(skippable, sequences):
    passes, _ = passes_of(skippable, sequences)
    passes.ranking = [3]
    score(passes, removed=(1,), candidates=[2, 3, 4])
    fresh = score(passes_of(skippable, sequences)[0], removed=(4,), candidates=[1, 2, 3])
    assert score(passes, removed=(4,), candidates=[1, 2, 3]) == fresh


def test_the_self_check_gives_the_reason_in_words(skippable, sequences, monkeypatch):
    assert choose_engine(skippable, sequences[:2]) == ("fork", None)
    run = skippable.run_block
    monkeypatch.setattr(skippable, "run_block", lambda call, hidden: run(call, hidden) * 1.001)
    engine, reason = choose_engine(skippable, sequences[:2])
    assert engine == "plain"
    assert reason == "without block 0, the fork's logits differ from those of the whole model"


def test_the_self_check_survives_a_fork_that_raises(skippable, sequences, monkeypatch):
    def broken(hidden, call):
        raise ValueError("the mask has another size")

    monkeypatch.setattr(skippable.switches[2], "run", broken)
    engine, reason = choose_engine(skippable, sequences[:2])
    assert engine == "plain"
    assert reason == "llama does not run block 2 alone: the mask has another size"


def test_out_of_memory_in_the_self_check_does_not_choose_an_engine(skippable, sequences, monkeypatch):
    fail_at(skippable, monkeypatch)
    with pytest.raises(OutOfMemory):
        choose_engine(skippable, sequences[:2])


@pytest.mark.parametrize(
    ("model_type", "path", "reason"),
    [
        ("prophetnet", "prophetnet.decoder.layers", "[2, 24] tokens become [2, 72] states"),
        ("xlm", "transformer.ffns", "the fork's logits differ from those of the whole model"),
        ("xlnet", "transformer.layer", "[2, 24] tokens become [24, 2] states"),
    ],
)
@torch.inference_mode()
def test_families_whose_blocks_cannot_be_forked_are_run_whole(sequences, model_type, path, reason):
    """ProphetNet carries several streams of predictions, XLM works between its blocks, XLNet swaps two dimensions."""
    model = random_model(tiny_config(model_type))
    blocks = model.get_submodule(path)
    with SkippableModel(model, blocks) as skippable:
        passes, why = prepare_passes(skippable, sequences, print, batch_size=2)
        found = score(passes, removed=(1,), candidates=[2, 4])
    assert (passes.engine, reason in why) == ("plain", True)
    for block, scores in found.items():
        assert sum(scores) / len(scores) == pytest.approx(plain_loss(model, blocks, sequences, {1, block}), abs=1e-5)
