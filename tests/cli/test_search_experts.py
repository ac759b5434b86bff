"""`sleb search --unit experts` ranks the experts of each block by how a text uses them, and
measures their cut.
"""

import json
from itertools import product

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig

from conftest import calibration, calibration_sequences, prose, save_model
from families import tiny_config
from gguf_models import write_gguf
from sleb_cli.engine.cut.experts.routing import Routing
from sleb_cli.engine.search import experts as search
from sleb_cli.engine.search.experts import rank_by_group, sum_expert_use
from sleb_cli.engine.search.journal import Journal
from sleb_cli.plan import Plan, read_plan
from sleb_plugins import PlanError

EIGHT = {"num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8}


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    return save_model(
        tmp_path_factory.mktemp("models") / "mixtral", tiny_config("mixtral", **EIGHT)
    )


@pytest.fixture
def ranked(sleb, mixtral, text_file, tmp_path):
    """Search the tiny model for experts, and return the plan."""

    def run(*options: object, model: object = mixtral, text: object = text_file) -> Plan:
        words = [
            "search",
            model,
            "--unit",
            "experts",
            *calibration(text),
            "-o",
            "found.json",
            "--force",
            *options,
        ]
        sleb(*words)
        return read_plan(tmp_path / "found.json")

    return run


def of_search(plan: Plan) -> object:
    return plan.dense, plan.experts


def plain_uses(model, sequences):
    """Return gate x norm of what each expert makes of each token, 0 if it was not chosen: [blocks,
    tokens, experts].
    """
    found = []

    def note(module, inputs, output):
        hidden, chosen, gates = inputs
        each = torch.zeros(len(hidden), module.num_experts)
        for token, place in product(range(len(hidden)), range(chosen.shape[1])):
            gate, up = (hidden[token] @ module.gate_up_proj[chosen[token, place]].T).chunk(2)
            made = (torch.nn.functional.silu(gate) * up) @ module.down_proj[chosen[token, place]].T
            each[token, chosen[token, place]] = gates[token, place] * made.norm()
        found.append(each)

    handles = [block.mlp.experts.register_forward_hook(note) for block in model.model.layers]
    with torch.no_grad():
        model(sequences, use_cache=False)
    for handle in handles:
        handle.remove()
    return torch.stack(found)


def test_scores_are_those_of_the_plain_formula(ranked, mixtral, text_file):
    plan = ranked("--remove", 2, "--holdout", 0)
    model = AutoModelForCausalLM.from_pretrained(
        mixtral, dtype=torch.float32, experts_implementation="eager"
    )
    uses = plain_uses(model, calibration_sequences(mixtral, text_file)).double()
    for order, each in zip(plan.experts.blocks, uses, strict=True):
        assert order.scores == pytest.approx(each.square().sum(0).tolist(), rel=1e-4)
        assert order.tokens == tuple((each > 0).sum(0).tolist())
        assert order.removals == tuple(sorted(range(8), key=order.scores.__getitem__)[:2])


def test_the_losses_are_those_of_the_checkpoint(ranked, sleb, text_file, tmp_path):
    plan = ranked("--ratio", 0.25, "--holdout", 0)
    sleb("apply", "found.json", "-o", "out")
    own = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = calibration_sequences(tmp_path / "out", text_file)
    with torch.no_grad():
        losses = [own(row[None], labels=row[None]).loss.item() for row in ids]
    assert plan.experts.texts[0].pruned == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert plan.experts.parameters[1] == sum(each.numel() for each in own.parameters())
    assert own.config.num_local_experts == 6


@pytest.mark.parametrize(
    "options", [["--stream"], ["--memory", "2MiB"], ["--config", "found.json"]]
)
def test_the_chosen_experts_do_not_depend_on_how_they_are_scored(ranked, options):
    assert of_search(ranked("--remove", 2)) == of_search(ranked("--remove", 2, *options))


def as_mixtral(folder, llama, copies):
    """Write a model of Llama's kind as a Mixtral whose experts are copies of each block's network."""
    dense = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    shared = {
        key: value
        for key, value in dense.config.to_dict().items()
        if key in MixtralConfig().to_dict()
    }
    config = MixtralConfig(
        **shared
        | {
            "model_type": "mixtral",
            "architectures": None,
            "num_local_experts": copies,
            "num_experts_per_tok": 1,
        }
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    state = dense.state_dict()
    for number, block in enumerate(model.model.layers):
        gate, up, down = (
            state.pop(f"model.layers.{number}.mlp.{name}_proj.weight")
            for name in ("gate", "up", "down")
        )
        block.mlp.experts.gate_up_proj.data[:] = torch.cat([gate, up])
        block.mlp.experts.down_proj.data[:] = down
    assert not model.load_state_dict(state, strict=False).unexpected_keys
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(llama).save_pretrained(folder)
    return folder


def test_any_two_of_four_copies_can_go(ranked, tiny_llama, text_file, tmp_path):
    model = as_mixtral(tmp_path / "mixtral", tiny_llama, copies=4)
    dense = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    with torch.no_grad():
        losses = [
            dense(row[None], labels=row[None]).loss
            for row in calibration_sequences(tiny_llama, text_file)
        ]
    loss = torch.stack(losses).mean().item()
    (text,) = ranked(
        "--remove", 2, "--metric", "random:3", "--holdout", 0, model=model
    ).experts.texts
    assert (text.dense, text.pruned) == pytest.approx((loss, loss), rel=1e-6)


def test_more_of_a_nested_ranking_go(ranked):
    few, more = (ranked("--remove", count).experts for count in (2, 4))
    assert more.first(2).removed == few.removed


def test_an_interrupted_search_goes_on(ranked, run_sleb, monkeypatch, mixtral, text_file, tmp_path):
    whole = ranked("--remove", 2, "--batch-size", 1)
    (tmp_path / "found.json").unlink()
    add, left = Journal.add, [4]

    def interrupted(self, *given, **named):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        add(self, *given, **named)

    monkeypatch.setattr(Journal, "add", interrupted)
    words = [
        "search",
        mixtral,
        "--unit",
        "experts",
        *calibration(text_file),
        "-o",
        "found.json",
        "--remove",
        2,
    ]
    assert run_sleb(*words, "--batch-size", 1).exit_code == 130
    monkeypatch.setattr(Journal, "add", add)
    assert of_search(ranked("--remove", 2, "--batch-size", 1, "--resume")) == of_search(whole)


def test_memory_that_runs_out_counts_nothing_twice(ranked, monkeypatch):
    whole, once = ranked("--remove", 2, "--batch-size", 4), [1]

    def short(routing: Routing, count: int) -> torch.Tensor:
        if once and not once.pop():
            raise AssertionError
        if len(routing.hidden) > 32:
            raise torch.OutOfMemoryError
        return sum_expert_use(routing, count)

    monkeypatch.setattr(search, "sum_expert_use", short)
    found = ranked("--remove", 2, "--batch-size", 4)
    for ours, theirs in zip(found.experts.blocks, whole.experts.blocks, strict=True):
        assert (ours.tokens, ours.removals) == (theirs.tokens, theirs.removals)


def test_each_text_is_told_apart(ranked, tmp_path):
    for name, seed in (("a.txt", 1), ("b.txt", 2)):
        (tmp_path / name).write_text(prose(400, seed))
    found = ranked(
        "--remove", 2, "--samples", 8, "--holdout", 0.25, text="a.txt:0.5,b.txt:0.5"
    ).experts
    assert [(text.text.rpartition("/")[2], text.held_out) for text in found.texts] == [
        ("a.txt", False), ("b.txt", False), ("a.txt", True), ("b.txt", True),
    ]  # fmt: skip
    tokens = sum(found.blocks[0].tokens)
    assert tokens == 2 * 32 * sum(text.sequences for text in found.texts if not text.held_out)


def test_as_many_of_each_group_go(ranked, tmp_path):
    model = save_model(tmp_path / "deepseek", tiny_config("deepseek_v3", **EIGHT, n_group=2))
    found = ranked("--remove", 3, model=model).experts
    assert found.fewer == 4
    assert all(sum(expert < 4 for expert in order.removals) == 2 for order in found.blocks)


@pytest.mark.parametrize(
    ("goal", "fewer"),
    [
        (["--target-params", "300k"], 2),
        (["--target-memory", "1.2MB", "--serve-length", 64], 2),
        (["--ratio", 0.3], 3),
    ],
)
def test_a_size_is_met_by_the_fewest_experts(ranked, goal, fewer, mixtral):
    found = ranked(*goal)
    assert found.experts.fewer == fewer
    target = found.search.target
    assert (
        target is None
        or target.reached <= target.limit < target.reached + (target.dense - target.reached) / fewer
    )


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--remove", 5], "at least twice as many must stay"),
        (["--target-params", "10M"], "The model is already at"),
        (["--remove", 2, "--metric", "nll"], "nll does not score experts"),
    ],
)
def test_what_makes_no_sense_is_refused(run_sleb, mixtral, text_file, options, says):
    result = run_sleb("search", mixtral, "--unit", "experts", *calibration(text_file), *options)
    assert result.exit_code == 2
    assert says in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda plan: plan["experts"].update(groups=0), "experts.groups"),
        (lambda plan: plan["experts"].update(groups=3), "8 experts cannot be in 3 groups"),
        (lambda plan: plan["experts"].update(active=7), "2 of 8 experts go, and a token uses 7"),
        (
            lambda plan: plan["experts"]["blocks"][0].update(removals=[1, 1]),
            "names an expert twice",
        ),
        (
            lambda plan: plan["experts"]["blocks"][0].update(removals=[1, 8]),
            "other experts than the 8",
        ),
        (lambda plan: plan["experts"]["blocks"][0].update(block=1), "a block is named twice"),
        (
            lambda plan: plan["experts"]["blocks"][0].update(block=9),
            "blocks that the model does not have",
        ),
        (lambda plan: plan.update(removals=[1]), "or that go"),
    ],
)
def test_an_edited_plan_is_refused(ranked, tmp_path, edit, says):
    plan = ranked("--remove", 2).to_data()
    edit(plan)
    (tmp_path / "edited.json").write_text(json.dumps(plan))
    with pytest.raises(PlanError, match=says):
        read_plan(tmp_path / "edited.json")


def test_a_gguf_file_that_was_cut_before_is_another_model(ranked, sleb, tmp_path):
    ranked("--remove", 2)
    more = {"ffn_up_exps.weight": (6, 3), "ffn_gate_inp.weight": (6, 3)}
    write_gguf(
        tmp_path / "cut.gguf", "llama", 6, {"expert_count": 6, "expert_used_count": 2}, more=more
    )
    assert (
        "has 8 experts in each block, but"
        in sleb("apply", "found.json", "--source", "cut.gguf", code=3).stderr
    )


def test_a_loss_without_a_finite_perplexity_is_an_error(run_sleb, mixtral, text_file, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(mixtral, dtype=torch.float32)
    model.lm_head.weight.data *= 1e6
    model.save_pretrained(tmp_path / "wild")
    AutoTokenizer.from_pretrained(mixtral).save_pretrained(tmp_path / "wild")
    words = [
        "search",
        tmp_path / "wild",
        "--unit",
        "experts",
        *calibration(text_file),
        "--remove",
        2,
    ]
    result = run_sleb(*words)
    assert result.exit_code == 4
    assert "a perplexity that is not finite" in " ".join(result.stderr.split())


def test_the_lowest_of_each_group_go_first():
    assert rank_by_group([3, 1, 2, 1, 0, 9, 9, 5], 2) == (1, 4, 3, 7, 2, 5, 0, 6)
    assert rank_by_group([1, 1, 0], 1) == (2, 0, 1)
