"""`sleb search --unit experts` ranks the experts of each block by how a text uses them, and
measures their cut.
"""

import json
import shutil
from itertools import product
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig

from checkpoint_files import change_weights
from conftest import as_typed, calibration, calibration_sequences, prose, save_model
from families import experts_config
from gguf_models import write_gguf
from sleb_cli.__main__ import main
from sleb_cli.engine.search import experts as search
from sleb_cli.engine.search.experts import rank_by_group, sum_expert_use
from sleb_cli.engine.search.journal import Journal
from sleb_cli.plan import read_plan
from sleb_plugins import PlanError


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "mixtral", experts_config("mixtral"))


@pytest.fixture
def ranked(sleb, mixtral, text_file, tmp_path):
    """Search the tiny model for experts, and return the plan."""

    def run(*options, model=mixtral, text=text_file, code=0):
        command = ["search", model, "--unit experts", *calibration(text), "-o found.json --force"]
        result = sleb(*command, *options, code=code)
        return result if code else read_plan(tmp_path / "found.json")

    return run


def of_search(plan):
    return plan.dense, plan.experts


def mean_loss(folder, sequences):
    """Return a model in float32, and its mean loss in the slow way."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        losses = [model(row[None], labels=row[None]).loss.item() for row in sequences]
    return model, sum(losses) / len(losses)


def plain_uses(model, sequences):
    """Return gate x norm of what each expert makes of each token, 0 if it was not chosen: [blocks,
    tokens, experts].
    """
    found = []

    def note(module, inputs, output):
        hidden, chosen, gates = inputs
        uses = torch.zeros(len(hidden), module.num_experts)
        for token, place in product(range(len(hidden)), range(chosen.shape[1])):
            expert = chosen[token, place]
            gate, up = (module.gate_up_proj[expert] @ hidden[token]).chunk(2)
            made = module.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
            uses[token, expert] = gates[token, place] * made.norm()
        found.append(uses)

    for block in model.model.layers:
        block.mlp.experts.register_forward_hook(note)
    with torch.no_grad():
        model(sequences, use_cache=False)
    return torch.stack(found)


def test_scores_are_those_of_the_plain_formula(ranked, mixtral, text_file):
    plan = ranked("--remove 2 --holdout 0")
    model = AutoModelForCausalLM.from_pretrained(
        mixtral, dtype=torch.float32, experts_implementation="eager"
    )
    uses = plain_uses(model, calibration_sequences(mixtral, text_file)).double()
    for order, each in zip(plan.experts.blocks, uses, strict=True):
        assert order.scores == pytest.approx(each.square().sum(0).tolist(), rel=1e-4)
        assert order.tokens == tuple((each > 0).sum(0).tolist())
        assert order.removals == tuple(sorted(range(8), key=order.scores.__getitem__)[:2])


def test_the_losses_are_those_of_the_checkpoint(ranked, sleb, text_file, tmp_path):
    experts = ranked("--ratio 0.25 --holdout 0").experts
    sleb("apply found.json -o out")
    out = tmp_path / "out"
    own, loss = mean_loss(out, calibration_sequences(out, text_file))
    assert experts.texts[0].pruned == pytest.approx(loss, rel=1e-6)
    assert experts.parameters[1] == own.num_parameters()
    assert own.config.num_local_experts == 6


@pytest.mark.parametrize("options", ["--stream", "--memory 2MiB", "--config found.json"])
def test_the_chosen_experts_do_not_depend_on_how_they_are_scored(ranked, options):
    assert of_search(ranked("--remove 2")) == of_search(ranked("--remove 2", options))


def as_mixtral(folder, llama, copies):
    """Write a Llama as a Mixtral whose experts are copies of each block's network."""
    dense = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    settings = {"num_local_experts": copies, "num_experts_per_tok": 1}
    for key in ("model_type", "architectures"):
        settings[key] = MixtralConfig().to_dict()[key]
    shared = MixtralConfig().to_dict().keys() & dense.config.to_dict().keys()
    config = MixtralConfig(**{key: getattr(dense.config, key) for key in shared} | settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(dense.state_dict(), strict=False)
    for ours, theirs in zip(model.model.layers, dense.model.layers, strict=True):
        gate_and_up = theirs.mlp.gate_proj.weight, theirs.mlp.up_proj.weight
        ours.mlp.experts.gate_up_proj.data[:] = torch.cat(gate_and_up)
        ours.mlp.experts.down_proj.data[:] = theirs.mlp.down_proj.weight
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(llama).save_pretrained(folder)
    return folder


def test_any_two_of_four_copies_can_go(ranked, tiny_llama, text_file, tmp_path):
    model = as_mixtral(tmp_path / "mixtral", tiny_llama, copies=4)
    _, loss = mean_loss(tiny_llama, calibration_sequences(tiny_llama, text_file))
    (text,) = ranked("--remove 2 --metric random:3 --holdout 0", model=model).experts.texts
    assert (text.dense, text.pruned) == pytest.approx((loss, loss), rel=1e-6)


def test_more_of_a_nested_ranking_go(ranked):
    few, more = (ranked("--remove", count).experts for count in (2, 4))
    assert more.first(2).removed == few.removed


def test_an_interrupted_search_goes_on(ranked, monkeypatch):
    whole = ranked("--remove 2 --batch-size 1")
    add = Journal.add
    added = []

    def interrupted(*given, **named):
        if len(added) == 4:
            raise KeyboardInterrupt
        added.append(given)
        add(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", interrupted)
        ranked("--remove 2 --batch-size 1", code=130)
    assert of_search(ranked("--remove 2 --batch-size 1 --resume")) == of_search(whole)


def test_memory_that_runs_out_counts_nothing_twice(ranked, monkeypatch):
    whole = ranked("--remove 2 --batch-size 4").experts
    short = []

    def of_one(routing, count):
        if len(routing.hidden) > 32:
            short.append(routing)
            raise torch.OutOfMemoryError
        return sum_expert_use(routing, count)

    monkeypatch.setattr(search, "sum_expert_use", of_one)
    found = ranked("--remove 2 --batch-size 4").experts
    assert short
    for ours, theirs in zip(found.blocks, whole.blocks, strict=True):
        assert (ours.tokens, ours.removals) == (theirs.tokens, theirs.removals)


def test_each_text_is_told_apart(ranked):
    for seed, name in enumerate(("a.txt", "b.txt")):
        Path(name).write_text(prose(400, seed))
    options = "--remove 2 --samples 8 --holdout 0.25"
    found = ranked(options, text="a.txt:0.5,b.txt:0.5").experts
    texts = [(Path(text.text).name, text.held_out) for text in found.texts]
    assert texts == [("a.txt", False), ("b.txt", False), ("a.txt", True), ("b.txt", True)]
    sequences = sum(text.sequences for text in found.texts if not text.held_out)
    assert sum(found.blocks[0].tokens) == 2 * 32 * sequences


def test_as_many_of_each_group_go(ranked, tmp_path):
    model = save_model(tmp_path / "deepseek", experts_config("deepseek_v3", n_group=2))
    found = ranked("--remove 3", model=model).experts
    assert found.fewer == 4
    assert all(sum(expert < 4 for expert in order.removals) == 2 for order in found.blocks)


@pytest.mark.parametrize(
    ("goal", "fewer"),
    [
        ("--target-params 300k", 2),
        ("--target-memory 1.2MB --serve-length 64", 2),
        ("--ratio 0.3", 3),
    ],
)
def test_a_size_is_met_by_the_fewest_experts(ranked, goal, fewer):
    found = ranked(goal)
    assert found.experts.fewer == fewer
    target = found.search.target
    if target is not None:
        of_one = (target.dense - target.reached) / fewer
        assert target.reached <= target.limit < target.reached + of_one


@pytest.fixture(scope="module")
def found_experts(mixtral, text_file, tmp_path_factory):
    """The text of a plan that removes two experts of each block."""
    plan = tmp_path_factory.mktemp("plans") / "plan.json"
    options = "--unit experts --remove 2 --sample-tokens 6 -q -o"
    assert main(as_typed(["search", mixtral, *calibration(text_file), options, plan])) == 0
    return plan.read_text()


@pytest.mark.parametrize(
    ("place", "values", "says"),
    [
        ("experts", {"groups": 0}, "experts.groups"),
        ("experts", {"groups": 3}, "8 experts cannot be in 3 groups"),
        ("experts", {"active": 7}, "2 of 8 experts go, and a token uses 7"),
        ("block", {"removals": [1, 1]}, "names an expert twice"),
        ("block", {"removals": [1, 8]}, "other experts than the 8"),
        ("block", {"block": 1}, "a block is named twice"),
        ("block", {"block": 9}, "blocks that the model does not have"),
        ("plan", {"removals": [1]}, "or that go"),
    ],
)
def test_an_edited_plan_is_refused(found_experts, tmp_path, place, values, says):
    plan = json.loads(found_experts)
    experts = plan["experts"]
    places = {"plan": plan, "experts": experts, "block": experts["blocks"][0]}
    places[place].update(values)
    (tmp_path / "edited.json").write_text(json.dumps(plan))
    with pytest.raises(PlanError, match=says):
        read_plan(tmp_path / "edited.json")


def test_a_gguf_file_that_was_cut_before_is_another_model(found_experts, sleb):
    Path("found.json").write_text(found_experts)
    more = {"ffn_up_exps.weight": (6, 3), "ffn_gate_inp.weight": (6, 3)}
    settings = {"expert_count": 6, "expert_used_count": 2}
    write_gguf(Path("cut.gguf"), "llama", 6, settings, more=more)
    refused = sleb("apply found.json --source cut.gguf", code=3).stderr
    assert "has 8 experts in each block, but" in refused


def test_a_loss_without_a_finite_perplexity_is_an_error(ranked, mixtral, tmp_path):
    folder = shutil.copytree(mixtral, tmp_path / "wild")
    head = "lm_head.weight"
    change_weights(folder, lambda tensors: tensors | {head: tensors[head] * 1e6})
    refused = ranked("--remove 2", model=folder, code=4)
    assert "a perplexity that is not finite" in refused.said


def test_the_lowest_of_each_group_go_first():
    assert rank_by_group([3, 1, 2, 1, 0, 9, 9, 5], 2) == (1, 4, 3, 7, 2, 5, 0, 6)
    assert rank_by_group([1, 1, 0], 1) == (2, 0, 1)
