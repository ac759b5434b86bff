"""A chat model through `main()`: it writes conversations to search and recover on, and is judged by
its answers.
"""

import json
import re
import shutil
from unittest.mock import Mock

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import WORDS, llama_config, prose, save_model
from recovering import plain_losses
from sleb_cli.engine.text import calibration
from sleb_cli.engine.text.chat import cut_conversations, render
from sleb_cli.plan import RecoveryRecord, read_plan
from texts import talk, write_lines

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
TEXT = ["--samples 10 --sequence-length 64"]


@pytest.fixture
def chatty(tmp_path):
    """A random model with a chat template that ends its messages soon: a tenth of all tokens end
    them.
    """
    folder = save_model(tmp_path / "chatty", llama_config())
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    settings = json.loads((folder / "generation_config.json").read_text()) | {
        "eos_token_id": [1, *range(40, 72)]
    }
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


def test_a_search_reads_what_the_model_wrote_and_finds_it_again(sleb, chatty, tmp_path):
    (tmp_path / "asked.txt").write_text("\n".join(prose(30).split(". ")))
    for source in ("self-chat", "answers:asked.txt"):
        search = ["search", chatty, "--remove 1 --calibration", source, *TEXT, "--force"]
        first = sleb(*search)
        assert re.search(rf"{source}: the model wrote \d+ conversations", first.stderr)
        assert f"{source}: 10 x 64 tokens" in first.stdout
        plan = read_plan(tmp_path / "plan.json")
        assert (
            "conversations that the model wrote before, from the cache"
            in sleb(*search, "--chat answers").stderr
        )
        assert (
            read_plan(tmp_path / "plan.json").steps == plan.steps
        )  # the model never writes what the template does
        sleb(*search, "--chat all")
        assert read_plan(tmp_path / "plan.json").dense.loss != plan.dense.loss


def recovered(result):
    return RecoveryRecord.model_validate_json(json.dumps(result.data["recovery"]))


def test_a_recovery_is_reported_on_answers_too(sleb, chatty, text_file, tmp_path):
    recover = ["apply", chatty, "--blocks 2 --recover --no-heal", *TEXT, "-o out"]
    mixture = f"{text_file}:0.75,self:0.25"
    shown = sleb(*recover, "--calibration", mixture)
    assert "KL, answers" in shown.stdout
    record = recovered(sleb(*recover, "--calibration", mixture, "--force --json"))
    like_it, on_answers = record.summaries(None)
    assert like_it.startswith(f"on held-out text like that of the fit ({record.test_text}), ")
    assert on_answers.startswith("on answers in its own conversations, ")
    assert like_it in shown.stdout
    assert on_answers in shown.stdout
    assert (record.train_text.chat, record.conversations.text.source) == (None, "self-chat")
    # What decides and what is reported count only the answers, if they are asked for.
    record = recovered(sleb(*recover, "--calibration self-chat --chat answers --force --json"))
    assert (record.train_text.chat, record.test_text.chat) == ("answers", "answers")
    assert record.closed_form_losses.divergence > 0


def test_a_chat_model_writes_nothing_for_a_recovery_on_a_file(sleb, chatty, text_file):
    recover = ["apply", chatty, "--blocks 2 --recover --no-heal -o out --json", *TEXT]
    result = sleb(*recover, "--calibration", text_file)
    assert recovered(result).conversations is None
    assert "wrote" not in result.stderr


def test_the_losses_on_answers_are_those_of_a_plain_computation(
    sleb, chatty, text_file, tmp_path, monkeypatch
):
    cut = Mock(side_effect=cut_conversations)
    monkeypatch.setattr(calibration, "cut_conversations", cut)
    recover = ["apply", chatty, "--blocks 2 --recover --no-heal", *TEXT, "-o out --json"]
    found = recovered(sleb(*recover, "--calibration self")).conversations
    rendered, _, length = cut.mock_calls[0].args
    ids, mask = cut_conversations(rendered, "", length, answers=True, required=None)
    ids, mask = ids[: found.text.sequences], mask[: found.text.sequences]
    assert not mask.all()
    dense, ours = (
        AutoModelForCausalLM.from_pretrained(folder) for folder in (chatty, tmp_path / "out")
    )
    with torch.no_grad():
        p, q = (model(ids).logits[:, :-1].log_softmax(-1)[mask[:, 1:]] for model in (dense, ours))
    assert found.closed_form.divergence == pytest.approx(
        (p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4
    )
    targets = ids[:, 1:][mask[:, 1:]]
    assert found.closed_form.loss == pytest.approx(
        -q.gather(-1, targets[:, None]).mean().item(), rel=1e-5
    )
    assert plain_losses(dense, ours, ids)[1] != pytest.approx(
        found.closed_form.divergence, rel=1e-3
    )


def test_a_quarter_of_the_default_text_is_conversations(sleb, chatty, text_file):
    sleb("search", chatty, "--remove 1 --calibration", text_file, *TEXT)
    record = recovered(sleb("apply plan.json --recover --no-heal", *TEXT, "-o out --json"))
    assert record.train_text.title == f"{text_file.name}:0.75,self-chat:0.25"
    record = recovered(
        sleb("apply", chatty, "--blocks 2 --recover --no-heal", *TEXT, "-o out --force --json")
    )
    assert record.train_text.title == "self:0.5,self-chat:0.5"


def test_a_short_healing_has_little_text_written(sleb, chatty, monkeypatch):
    monkeypatch.setattr("sleb_cli.engine.door.recovery.RECOVERY_SELF_TOKENS", 1280)
    heal = ["apply", chatty, "--blocks 2 --heal --calibration self --sequence-length 32"]
    heal += ["-o out --force --json"]
    for budget, written in [("--heal-minutes 0.001", 10), ("--heal-tokens 64", 40)]:
        record = recovered(sleb(*heal, budget))
        assert record.train_text.sequences == 0.7 * written


def test_ten_chats_are_too_few_to_recover_on(sleb, chatty, tmp_path):
    write_lines("talks.jsonl", messages=[talk("river", "snow water stone")] * 10)
    told = sleb(
        "apply", chatty, "--blocks 2 --recover --no-heal --calibration talks.jsonl", code=5
    ).stderr
    assert "too short to be divided into training, validation and test sequences" in told
    assert "leave out --calibration" in told


def test_a_healing_on_answers_comes_nearer_on_answers(sleb, chatty, tmp_path, monkeypatch):
    (tmp_path / "asked.txt").write_text("".join(f"{word}\n" for word in WORDS))
    (tmp_path / "text.txt").write_text(prose(400))
    command = ["apply", chatty, "--blocks 2 --heal --heal-tokens 4096", *TEXT]
    command += ["--calibration answers:asked.txt:0.25,text.txt:0.75 --chat answers"]
    command += ["-o out"]
    record = recovered(sleb(*command, "--json"))
    assert record.conversations.healed.divergence < record.conversations.pruned.divergence


def test_perplexity_of_conversations_is_that_of_their_answers(sleb, chatty, tmp_path):
    talks = [talk(f"river {number}", "snow water stone " * (number + 2)) for number in range(12)]
    write_lines("talks.jsonl", messages=talks)
    evaluate = ["eval", chatty, "--blocks 2 --sequence-length 64 --perplexity"]
    evaluate += ["talks.jsonl"]
    assert "talks.jsonl (answers)" in sleb(*evaluate, "--max-windows 3").stdout
    (text,) = sleb(*evaluate, "--json").data["texts"]
    tokenizer = AutoTokenizer.from_pretrained(chatty)
    rendered = [render(tokenizer, each, "", answers=True) for each in talks]
    ids, mask = cut_conversations(rendered, "", 64, answers=True, required=None)
    model = AutoModelForCausalLM.from_pretrained(chatty)
    with torch.no_grad():
        losses = -model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    assert text["dense"]["perplexity"] == pytest.approx(
        losses[mask[:, 1:]].mean().exp().item(), rel=1e-4
    )
    assert (text["tokens"], text["clustered_by"]) == (int(mask[:, 1:].sum()), "conversations")
    assert "--bos does not apply to conversations" in sleb(*evaluate, "--bos", code=2).stderr
    data_set = tmp_path / "org" / "talks"
    data_set.mkdir(parents=True)
    shutil.copy("talks.jsonl", data_set / "test.jsonl")
    write_lines(data_set / "train.jsonl", messages=talks[:1])
    evaluate[-1] = "talks.jsonl,org/talks:,org/talks:::messages"
    shown = sleb(*evaluate, "--json")
    assert "measuring perplexity on org/talks::test." in shown.stderr
    _, *of_data_set = shown.data["texts"]
    assert [{**found, "text": "talks.jsonl"} for found in of_data_set] == [text, text]
    write_lines("talks.jsonl", messages=talks[:1])
    assert "too few for a sequence of 64 with an answer" in sleb(*evaluate, code=5).stderr


def test_short_conversations_need_no_option(sleb, chatty, tmp_path):
    config = json.loads((chatty / "config.json").read_text()) | {"max_position_embeddings": 2048}
    (chatty / "config.json").write_text(json.dumps(config))
    talks = [talk(f"river {number}", "snow water stone " * 3) for number in range(12)]
    write_lines("talks.jsonl", messages=talks)
    data_set = tmp_path / "org" / "talks"
    data_set.mkdir(parents=True)
    shutil.copy("talks.jsonl", data_set / "train.jsonl")
    search = ["search", chatty, "--remove 1 --force --calibration"]
    shown = sleb(*search, "talks.jsonl")
    assert "Reading the answers in talks.jsonl" in shown.stderr
    plan = read_plan(tmp_path / "plan.json")
    text = plan.calibration
    assert text.chat == "answers"
    assert text.sequences >= 4
    assert f"tokens, so sequences have {text.sequence_length}, not 2048." in shown.stderr
    assert "tokens of answers in talks.jsonl count, so the choice is partly" in shown.stderr
    # The same as if it was asked for.
    sleb(*search, "talks.jsonl", f"--chat answers --sequence-length {text.sequence_length}")
    steps = read_plan(tmp_path / "plan.json").steps
    assert [step.score for step in steps] == [step.score for step in plan.steps]
    sleb(*search, "org/talks:")
    assert read_plan(tmp_path / "plan.json").calibration.chat == "answers"
    (measured,) = sleb("eval plan.json --perplexity talks.jsonl --json").data["texts"]
    assert measured["sequence_length"] == text.sequence_length
    record = recovered(sleb("apply plan.json --recover --calibration talks.jsonl -o out --json"))
    assert record.train_text.chat == "answers"


def test_text_that_is_too_short_all_the_same_is_refused_with_the_length_that_fits(sleb, chatty):
    write_lines("talks.jsonl", messages=[talk("river", "snow water")])
    hint = sleb("search", chatty, "--remove 1 --calibration talks.jsonl", code=5).stderr
    length = re.search(r"--sequence-length (\d+) or less", hint)[1]
    sleb("search", chatty, "--remove 1 --calibration talks.jsonl --sequence-length", length)
