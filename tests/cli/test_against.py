"""`sleb eval --against`: any two models, against plain code."""

import json
import math
import shutil
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from conftest import (
    evaluation,
    gpt2_config,
    llama_config,
    opt_config,
    prose,
    save_model,
    write_task,
)
from families import tiny_config
from sleb_cli.engine.quality import models as quality_models
from sleb_cli.engine.quality.stages import judge
from sleb_cli.results import EvalResult

LENGTH = 32
WINDOWS = 4


@pytest.fixture
def parent(tmp_path):
    """A model of six blocks."""
    return save_model(tmp_path / "parent", llama_config())


def changed(parent, name, change):
    """Copy a model, and change its tensors."""
    folder = shutil.copytree(parent, parent.with_name(name))
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(
        {key: tensor.contiguous() for key, tensor in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return folder


def set_config(folder, **settings):
    """Change a model's config."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def logits_of(folder, ids):
    """Return the log-probabilities of transformers' model, float64 [windows, positions, tokens]."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(ids).logits.double().log_softmax(-1)


def windows_of(folder, text):
    """Return the windows that are read of a text."""
    ids = AutoTokenizer.from_pretrained(folder)(text.read_text()).input_ids
    return torch.tensor(ids[: LENGTH * WINDOWS]).view(WINDOWS, LENGTH)


def losses(log_p, ids):
    """Return the loss of each token but the first."""
    return -log_p[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]


def placed(folder, text):
    """Return the windows of a text, and where each token begins."""
    tokens = AutoTokenizer.from_pretrained(folder)(text, return_offsets_mapping=True)
    count = len(tokens.input_ids) // LENGTH * LENGTH
    starts = [start for start, _ in tokens.offset_mapping]
    return torch.tensor(tokens.input_ids[:count]).view(-1, LENGTH), torch.tensor(
        starts[:count]
    ).view(-1, LENGTH)


def covered(folder, text):
    """Return where the last window begins its last token."""
    _, starts = placed(folder, text)
    return int(starts.max())


def compare(sleb, other, parent, text, *more):
    """Compare two models on a text, and return the result."""
    result = sleb("eval", other, "--against", parent, *evaluation(text), *more, "--json")
    return result.data


@pytest.mark.parametrize("options", [[], ["--stream"]], ids=["resident", "streamed"])
@pytest.mark.parametrize(
    "config", [llama_config(4), opt_config()], ids=["shallower", "other class"]
)
def test_losses_and_divergence_are_those_of_plain_code(
    sleb, parent, text_file, tmp_path, config, options
):
    other = save_model(tmp_path / "other", config, seed=1)
    data = compare(sleb, other, parent, text_file, *options)
    (text,) = data["texts"]
    (scores,) = text["pruned"]
    ids = windows_of(parent, text_file)
    p, q = logits_of(parent, ids), logits_of(other, ids)
    assert math.log(text["dense"]["perplexity"]) == pytest.approx(
        float(losses(p, ids).mean()), rel=1e-4
    )
    assert math.log(scores["perplexity"]) == pytest.approx(float(losses(q, ids).mean()), rel=1e-4)
    divergence = (p.exp() * (p - q)).sum(-1)[:, :-1].mean()
    assert scores["divergence"]["mean"] == pytest.approx(float(divergence), rel=1e-4)
    assert data["compared"]["stages"] == []
    assert data["compared"]["shared_tokens"] == 320


def test_windows_are_as_short_as_the_shorter_model_needs(sleb, parent, text_file, tmp_path):
    short = save_model(tmp_path / "short", gpt2_config(n_positions=64))
    text = ["--perplexity", text_file, "--max-windows", 2]
    for pair in ([short, "--against", parent], [parent, "--against", short]):
        (compared,) = sleb("eval", *pair, *text, "--json").data["texts"]
        assert compared["sequence_length"] == 64
        refused = sleb("eval", *pair, *text, "--sequence-length", 65, code=2)
        assert "65 exceeds the 64 positions of" in refused.said


ORDER = torch.randperm(320, generator=torch.Generator().manual_seed(0))


def renumber(tensors):
    """Give tokens other numbers, and pad the tables."""
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = tensors[name][ORDER]
        tensors[name] = torch.cat([rows, torch.full((16, rows.shape[1]), 9.0)])


def test_a_model_with_other_numbers_for_its_tokens_is_the_same(sleb, parent, text_file):
    new_number = ORDER.argsort().tolist()
    other = changed(parent, "renumbered", renumber)
    set_config(other, vocab_size=336)
    file = other / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {token: new_number[old] for token, old in vocabulary.items()}
    for token in tokenizer["added_tokens"]:
        token["id"] = new_number[token["id"]]
    file.write_text(json.dumps(tokenizer))
    data = compare(sleb, other, parent, text_file)
    (scores,) = data["texts"][0]["pruned"]
    assert scores["divergence"]["mean"] < 1e-9
    assert scores["log_ratio"] == pytest.approx(0, abs=1e-6)
    assert not any(stage["stands_out"] for stage in data["compared"]["stages"])


@pytest.fixture
def with_letters(tmp_path):
    """A model whose tokens are single letters."""
    other = save_model(tmp_path / "other", llama_config(5), seed=3)
    letters = Tokenizer(models.BPE())
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    letters.train_from_iterator(["zzzz"], trainers.BpeTrainer(initial_alphabet=alphabet))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, bos_token="a", eos_token="z")
    tokenizer.save_pretrained(other)
    return other


def test_models_with_other_tokenizers_are_compared_by_bytes(sleb, parent, with_letters, tmp_path):
    other = with_letters
    text = tmp_path / "text.txt"
    text.write_text(prose(900).replace(".", ". ü"))
    length = ["--perplexity", text, "--sequence-length", LENGTH]
    result = sleb("eval", other, "--against", parent, *length, "--json")
    (compared,) = result.data["compared"]["bytes"]
    assert result.data["texts"] == []
    assert "bits per byte" in result.said
    end = min(covered(folder, text.read_text()) for folder in (parent, other))
    for folder, bits in zip((parent, other), compared["bits"], strict=True):
        ids, starts = placed(folder, text.read_text())
        counted = (starts < end)[:, 1:]
        ends = torch.cat([starts.flatten(), torch.tensor([end])])[1:].view_as(starts)
        size = (ends - starts)[:, 1:][counted].sum() + text.read_text()[:end].count("ü")
        expected = losses(logits_of(folder, ids), ids)[counted].sum() / math.log(2) / size
        assert bits == pytest.approx(float(expected), rel=0.01)
    assert compared["interval"]["low"] < compared["difference"] < compared["interval"]["high"]


def test_with_bos_tokenizers_predict_every_byte(sleb, parent, with_letters, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(prose(900))
    options = ["--perplexity", text, "--sequence-length", LENGTH, "--bos", "--json"]
    result = sleb("eval", with_letters, "--against", parent, *options)
    (compared,) = result.data["compared"]["bytes"]
    ends = []
    for folder in (parent, with_letters):
        tokens = AutoTokenizer.from_pretrained(folder)(
            text.read_text(), return_offsets_mapping=True
        )
        count = len(tokens.input_ids) // (LENGTH - 1) * (LENGTH - 1)
        ends.append(tokens.offset_mapping[count - 1][1])
    assert compared["bytes"] == min(ends)


def append_eos(folder):
    """Have a model's tokenizer end each text with its EOS token."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    eos = (tokenizer.eos_token, tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {tokenizer.eos_token}", special_tokens=[eos]
    )
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("behind", [0, 1], ids=["in the last window", "behind it"])
def test_an_eos_that_the_tokenizer_appends_has_no_bytes(
    sleb, parent, with_letters, tmp_path, behind
):
    append_eos(with_letters)
    text = tmp_path / "text.txt"
    text.write_text(prose(200)[: 40 * LENGTH - 1 + behind])
    options = ["--perplexity", text, "--sequence-length", LENGTH, "--json"]
    (compared,) = sleb("eval", with_letters, "--against", parent, *options).data["compared"][
        "bytes"
    ]
    ids, _ = placed(with_letters, text.read_text())
    tokens = AutoTokenizer.from_pretrained(parent)(text.read_text(), return_offsets_mapping=True)
    end, _ = tokens.offset_mapping[len(tokens.input_ids) // LENGTH * LENGTH]
    counted = torch.arange(ids.numel()).view_as(ids)[:, 1:] < end  # a letter is a token and a byte
    expected = losses(logits_of(with_letters, ids), ids)[counted].mean() / math.log(2)
    assert compared["bits"][1] == pytest.approx(float(expected), rel=1e-4)


def test_an_eos_that_the_tokenizers_append_is_read_alike(sleb, parent, tmp_path):
    append_eos(parent)
    other = changed(parent, "other", dict)
    tokenizer = AutoTokenizer.from_pretrained(parent)
    text = tmp_path / "text.txt"
    text.write_text(tokenizer.decode(tokenizer(prose(200)).input_ids[: 4 * LENGTH - 1]))
    (windows,) = compare(sleb, other, parent, text)["texts"]
    assert windows["windows"] == 4
    assert windows["pruned"][0]["divergence"]["mean"] < 1e-9


def test_windows_with_a_token_that_the_other_lacks_are_left_out(sleb, parent, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(prose(60) + "\n" + "~" * 100)
    other = shutil.copytree(parent, tmp_path / "other")
    file = other / "tokenizer.json"
    file.write_text(file.read_text().replace('"~":', '"tilde":'))
    options = ["--perplexity", text, "--sequence-length", LENGTH, "--json"]
    result = sleb("eval", other, "--against", parent, *options)
    (compared,) = result.data["texts"]
    whole = sleb("eval", parent, *options).data["texts"][0]["windows"]
    assert whole - 5 < compared["windows"] < whole
    assert f"{compared['windows']:,} of {whole:,} windows" in result.said
    assert "Compared on the 319 tokens" in result.said
    assert compared["pruned"][0]["divergence"]["mean"] < 1e-9


FAULTS = {
    "block 3": lambda tensors: tensors.update(
        {
            "model.layers.3.self_attn.q_proj.weight": tensors[
                "model.layers.3.self_attn.q_proj.weight"
            ].T
        }
    ),
    "block 0": lambda tensors: tensors["model.layers.0.mlp.down_proj.weight"].neg_(),
    "block 5": lambda tensors: tensors["model.layers.5.input_layernorm.weight"].fill_(8),
    "embeddings": lambda tensors: tensors["model.embed_tokens.weight"].mul_(3),
    "head": lambda tensors: tensors["lm_head.weight"][70].zero_(),
}


def swap_rows(tensors):
    """Swap the rows of two tokens in the head."""
    head = tensors["lm_head.weight"]
    head[[70, 200]] = head[[200, 70]]


def round_all(tensors):
    """Round all matrices to four bits."""
    for name, tensor in tensors.items():
        if tensor.dim() > 1:
            step = tensor.abs().amax(1, keepdim=True) / 7
            tensors[name] = (tensor / step).round() * step


def test_rows_of_the_head_are_judged_against_the_others(sleb, parent, text_file):
    rounded = changed(parent, "rounded", round_all)
    stages = compare(sleb, rounded, parent, text_file)["compared"]["stages"]
    assert not any(found["stands_out"] for found in stages)
    swapped = changed(rounded, "swapped", swap_rows)
    result = sleb("eval", swapped, "--against", parent, *evaluation(text_file))
    assert "Its head stands out in 2 rows" in " ".join(result.stdout.split())


def test_the_head_differs_by_all_its_logits(sleb, parent, text_file):
    head = compare(sleb, changed(parent, "swapped", swap_rows), parent, text_file)["compared"][
        "stages"
    ][-1]
    assert sorted(head["rows"]) == [70, 200]
    assert head["stands_out"]
    assert 0 < head["difference"] < 0.2


@pytest.mark.parametrize("stage", FAULTS)
def test_a_fault_is_found_where_it_is(sleb, parent, text_file, stage):
    other = changed(parent, "faulty", FAULTS[stage])
    stages = compare(sleb, other, parent, text_file)["compared"]["stages"]
    assert [found["stage"] for found in stages if found["stands_out"]] == [stage]


def swap_tensors(one, other, tensors):
    """Swap two tensors."""
    tensors[one], tensors[other] = tensors[other], tensors[one]


def test_a_swapped_expert_is_found(sleb, tmp_path, text_file):
    parent = save_model(tmp_path / "parent", tiny_config("mixtral", num_hidden_layers=4))
    experts = [f"model.layers.2.block_sparse_moe.experts.{number}.w2.weight" for number in (0, 1)]

    swap = partial(swap_tensors, *experts)
    stages = compare(sleb, changed(parent, "swapped", swap), parent, text_file)["compared"][
        "stages"
    ]
    assert [found["stage"] for found in stages if found["stands_out"]] == ["block 2"]


def test_stages_that_differ_alike_do_not_stand_out():
    alike = {f"block {number}": 0.1 + 0.01 * number for number in range(9)}
    assert not any(stage.stands_out for stage in judge(alike))
    assert [stage.stage for stage in judge(alike | {"head": 0.9}) if stage.stands_out] == ["head"]


@pytest.mark.parametrize("fits", [True, False], ids=["together", "one at a time"])
def test_tasks_are_paired(sleb, parent, tmp_path, monkeypatch, fits):
    other = save_model(tmp_path / "other", opt_config(), seed=1)
    rows = [
        {"q": f"{number}", "choices": [" the", " old"], "gold": number % 2} for number in range(24)
    ]
    write_task(tmp_path / "tasks", "words", rows)
    if not fits:
        monkeypatch.setattr(quality_models, "memory_shortage", lambda *_: "1 GB")
    options = ["--tasks", "words", "--include-path", tmp_path / "tasks", "--json"]
    (task,) = sleb("eval", other, "--against", parent, *options).data["tasks"]
    for folder, scores in ((parent, task["dense"]), (other, task["pruned"][0])):
        (alone,) = sleb("eval", folder, *options).data["tasks"]
        assert alone["dense"]["items"] == scores["items"]
    lost = sum(
        a > b for a, b in zip(task["dense"]["items"], task["pruned"][0]["items"], strict=True)
    )
    assert task["pruned"][0]["lost"] == lost


def test_each_model_is_asked_in_its_own_chat_template(sleb, parent, tmp_path):
    other = shutil.copytree(parent, tmp_path / "other")
    for folder, mark in ((parent, "Q"), (other, "Ask")):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = mark + ": {{ messages[0]['content'] }}"
        tokenizer.save_pretrained(folder)
    rows = [{"q": f"{number}", "choices": [" the", " old"], "gold": 0} for number in range(8)]
    write_task(tmp_path / "tasks", "words", rows)
    options = ["--tasks", "words", "--include-path", tmp_path / "tasks", "--apply-chat-template"]
    result = sleb("eval", other, "--against", parent, *options, "--json")
    assert "different chat templates" in result.said
    (alone,) = sleb("eval", other, *options, "--json").data["tasks"]
    assert result.data["tasks"][0]["pruned"][0]["items"] == alone["dense"]["items"]


def test_a_checkpoint_against_its_parent_is_what_its_plan_says(sleb, parent, tmp_path, text_file):
    pruned = tmp_path / "pruned"
    sleb("apply", parent, "--blocks", "4,1", "-o", pruned)
    result = sleb("eval", pruned, "--against", parent, *evaluation(text_file), "--json")
    assert "pruned has 4 blocks of width 32, parent 6 blocks of width 32" in result.said
    (text,) = result.data["texts"]
    (planned,) = sleb("eval", parent, "--blocks", "4,1", *evaluation(text_file), "--json").data[
        "texts"
    ]
    for name in ("perplexity", "log_ratio", "divergence"):
        assert text["pruned"][0][name] == pytest.approx(planned["pruned"][0][name], rel=1e-4)


def test_a_result_is_shown_and_exported(sleb, parent, text_file, tmp_path):
    other = changed(parent, "faulty", FAULTS["block 3"])
    file = tmp_path / "result.json"
    shown = sleb("eval", other, "--against", parent, *evaluation(text_file), "-o", file)
    legend = "In tables, parent is dense, and faulty other."
    for words in (
        "faulty against parent",
        legend,
        "Its block 3 stands out",
        "perplexity changed by",
    ):
        assert words in " ".join(shown.stdout.split())
    assert EvalResult.read(file, "the result").compared.name == "faulty"
    card = sleb("export", file, "--to", "table").stdout
    assert "block 3 stands out" in card
    assert legend in card
    assert "original model" not in card
    assert "sleb eval" in card
    assert str(tmp_path) not in card
    page = tmp_path / "result.report.html"
    sleb("export", file, "--to", "report")
    assert "faulty <span>against parent" in page.read_text()
    assert "is shown alone" in sleb("export", file, file, "--to", "table", code=2).said


def test_mistakes_are_answered_in_a_sentence(
    sleb, parent, with_letters, tiny_encoder, llama_plan, tmp_path
):
    # The parent's second token begins behind the second letter.
    text = tmp_path / "words.txt"
    text.write_text(" river" * 9)
    few = ["--perplexity", text, "--sequence-length", 2, "--max-windows", 1]
    bare = shutil.copytree(parent, tmp_path / "bare")
    for file in bare.glob("tokenizer*"):
        file.unlink()
    cases = [
        ([parent, "--against", parent], 2, "are the same model"),
        ([tmp_path / "nothing", "--against", parent], 4, "There is no folder or file"),
        ([parent, "--against", tmp_path / "nothing"], 4, "There is no folder or file"),
        ([bare, "--against", parent], 4, "has no tokenizer"),
        ([llama_plan, "--against", parent], 2, "is a plan"),
        ([parent, "--against", llama_plan], 2, "is a plan"),
        (["--against", parent], 2, "needs the model to compare"),
        ([parent, "--against", tiny_encoder], 2, "is a language model"),
        ([parent, "--against", bare, "--blocks", "1"], 2, "cannot be combined"),
        ([parent, "--against", bare, "--device-map", "auto"], 2, "cannot be combined"),
        ([with_letters, "--against", parent, *few], 5, "parent predicts nothing"),
        ([parent, "--against", with_letters, *few], 5, "parent predicts nothing"),
    ]
    for words, code, says in cases:
        assert says in sleb("eval", *words, code=code).said, words
