"""`sleb search` on models that only read, through `main()`."""

import json
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from conftest import prose
from encoders import add_modules, bert_config, save_reader, word_pieces
from sleb_cli.engine.forward import ending, placement
from sleb_cli.plan import read_plan

TEXTS = [line for line in prose(120, seed=3).splitlines() if line]
TOLERANCE = 2e-5
NO_SAMPLE = ["--sample-tokens", 0]  # in place of the default of tests


@pytest.fixture
def texts(tmp_path):
    """A file with a text in each line, of several lengths, each with a query."""
    path = tmp_path / "texts.jsonl"
    rows = []
    for number, text in enumerate(TEXTS):
        short = " ".join(text.split()[: 4 + 5 * (number % 7)])
        rows.append({"text": short, "query": text.split()[-1]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def search_reader(run_sleb, texts, tmp_path):
    """Search a reader on these texts, require an exit code, and return the result and the plan."""
    return partial(searched, run_sleb, texts, tmp_path / "plan.json")


def searched(run_sleb, texts, plan, model, *options, remove=2, samples=16, code=0):
    words = [
        "--calibration",
        texts,
        "--samples",
        samples,
        "--remove",
        remove,
        "--force",
    ]
    result = run_sleb("search", model, *words, *NO_SAMPLE, *options)
    assert result.exit_code == code, result.stderr
    return result, (None if code else read_plan(plan))


def of_each(folder, texts, removed, *, prompt="", auto=AutoModel, longest=64):
    """Run transformers' model on one text at a time, without padding; return what it puts out."""
    model = auto.from_pretrained(folder, dtype=torch.float32).eval()
    blocks = (model if auto is AutoModel else model.bert).encoder
    blocks.layer = nn.ModuleList(b for n, b in enumerate(blocks.layer) if n not in removed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = []
    for row in map(json.loads, texts.read_text().splitlines()):
        pair = prompt + row["query"], row["text"]
        inputs = tokenizer(
            *pair,
            return_tensors="pt",
            truncation=True,
            max_length=longest,
        )
        with torch.no_grad():
            output = model(**inputs)
        if auto is AutoModel:
            rows.append(functional.normalize(output.last_hidden_state[0].mean(0), dim=-1))
        else:
            rows.append(output.logits[0])
    return torch.stack(rows)


def cosine(outputs, dense):
    return 1 - (outputs * dense).sum(-1)


def divergence(outputs, dense):
    return functional.kl_div(
        outputs.log_softmax(-1),
        dense.softmax(-1),
        reduction="none",
    ).sum(-1)


@pytest.mark.parametrize(
    ("kind", "auto", "distance"),
    [
        ("tiny_encoder", AutoModel, cosine),
        ("tiny_classifier", AutoModelForSequenceClassification, divergence),
        ("tiny_reranker", AutoModelForSequenceClassification, lambda a, b: (a - b).square()[:, 0]),
    ],
)
@pytest.mark.parametrize(
    "how",
    [
        [],
        ["--stream"],
        ["--batch-size", 3],
        ["--strategy", "refine"],
    ],
)
def test_scores_are_those_of_single_texts(request, search_reader, texts, kind, auto, distance, how):
    folder = request.getfixturevalue(kind)
    _, plan = search_reader(folder, *how, samples=len(TEXTS), remove=1)
    longest = 48 if kind == "tiny_encoder" else 64
    dense = of_each(folder, texts, (), auto=auto, longest=longest)
    expected = {}
    for block in range(1, 5):
        outputs = of_each(folder, texts, {block}, auto=auto, longest=longest)
        expected[block] = float(distance(outputs, dense).mean())
    (step,) = plan.steps
    assert step.scores == pytest.approx(expected, abs=TOLERANCE)
    assert step.block == min(expected, key=expected.get)
    assert step.distance == step.score
    assert (step.perplexity, plan.dense.loss) == (None, pytest.approx(0, abs=1e-6))
    assert plan.search.engine == "fork"


def test_a_race_finds_the_same_blocks_and_a_search_is_extended(search_reader, sleb, tiny_encoder):
    result, whole = search_reader(tiny_encoder, samples=20, remove=3)
    assert "distance" in result.stdout
    assert "perplexity" not in result.stdout
    _, raced = search_reader(
        tiny_encoder,
        "--fast",
        "--batch-size",
        4,
        samples=20,
        remove=3,
    )
    assert raced.removals == whole.removals
    _, first = search_reader(tiny_encoder, samples=20, remove=1)
    sleb(
        "search",
        tiny_encoder,
        "--extend",
        "plan.json",
        "--remove",
        3,
        *NO_SAMPLE,
    )
    assert read_plan(first._location.file).steps == whole.steps


def test_texts_begin_with_the_prompt_that_is_asked_for(search_reader, texts, tiny_encoder):
    _, plan = search_reader(
        tiny_encoder,
        "--prompt",
        "query",
        samples=len(TEXTS),
        remove=1,
    )
    dense = of_each(tiny_encoder, texts, (), prompt="question: ", longest=48)
    without = of_each(
        tiny_encoder,
        texts,
        plan.removals,
        prompt="question: ",
        longest=48,
    )
    assert plan.steps[0].distance == pytest.approx(float(cosine(without, dense).mean()), abs=2e-5)
    assert plan.request["prompt"] == "query"


@pytest.mark.parametrize("metric", ["cosine", "angular", "magnitude"])
def test_scores_of_blocks_ignore_padding(search_reader, tiny_encoder, metric):
    plans = [
        search_reader(
            tiny_encoder,
            "--metric",
            metric,
            "--batch-size",
            size,
        )[1]
        for size in (1, 16)
    ]
    assert plans[0].steps[0].scores == pytest.approx(plans[1].steps[0].scores, rel=1e-4)


def test_held_out_texts_tell_of_overfitting(search_reader, tiny_encoder):
    result, plan = search_reader(tiny_encoder, "--holdout", 0.25)
    assert plan.steps[-1].held_out.loss > 0
    assert "held-out distance" in " ".join(result.stdout.split())


class FirstTwo(ending.Classes):
    """A fourth ending: two of the numbers that a model puts out, as of a reranker that says yes."""

    def outputs(self, output, texts):
        return output.logits[:, :2].float()


def test_another_ending_needs_no_more_than_its_outputs(
    search_reader, monkeypatch, texts, tiny_classifier
):
    monkeypatch.setattr(
        placement,
        "ending_of",
        lambda architecture, device: FirstTwo(),
    )
    _, plan = search_reader(tiny_classifier, samples=len(TEXTS), remove=1)
    of_block = partial(
        of_each,
        tiny_classifier,
        texts,
        auto=AutoModelForSequenceClassification,
    )
    dense = of_block(())[:, :2]
    expected = {n: float(divergence(of_block({n})[:, :2], dense).mean()) for n in range(1, 5)}
    assert plan.steps[0].scores == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize(
    ("options", "said", "hint"),
    [
        (["--metric", "nll"], "needs a language head", "Leave out --metric"),
        (["--sample-tokens", 8], "--sample-tokens needs a language head", ""),
        (["--chat", "all"], "--chat is for language models", "Leave out"),
        (["--calibration", "self"], "self is no text", ".jsonl"),
        (["--prompt", "quary"], "There is no prompt 'quary'", "query"),
    ],
)
def test_what_needs_a_language_head_is_refused(run_sleb, texts, tiny_encoder, options, said, hint):
    words = [
        "search",
        tiny_encoder,
        "--remove",
        1,
        "--calibration",
        texts,
        *NO_SAMPLE,
        *options,
    ]
    result = run_sleb(*words)
    assert result.exit_code == 2, result.stderr
    assert said in " ".join(result.stderr.split())
    assert hint in result.stderr


def test_a_file_may_have_too_few_texts(search_reader, tiny_encoder):
    result, _ = search_reader(tiny_encoder, samples=999, code=5)
    assert "has 20 texts, not 999" in result.stderr


def test_a_language_model_has_no_output_to_keep(search, tiny_llama):
    refused = search("--remove", 1, "--metric", "output", code=2)
    assert "Use --metric kl" in refused.stderr
    refused = search("--remove", 1, "--prompt", "query", code=2)
    assert "--prompt is for" in refused.stderr


MODULES = "modules.json"
POOLING = "1_Pooling/config.json"
WHOLE = "config_sentence_transformers.json"
LENGTH = "sentence_bert_config.json"
POOLED = '48, "modality_config": {"text": {"method_output_name": "pooler_output"}}'


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        (MODULES, "[", "[1, ", "does not name the class and the folder of each module"),
        (MODULES, '"1_Pooling"', '"../other"', "does not name the class and the folder"),
        (MODULES, '"path": ""', '"path": "1_Pooling"', "keeps its transformer in 1_Pooling"),
        (MODULES, ".Normalize", ".LSTM", "a module LSTM"),
        (POOLING, "mean", "middle", "with middle"),
        (POOLING, '"mean"', "3", "pooling_mode is 3"),
        (MODULES, "sentence_transformers.models.Norm", "own_code.Norm", "module own_code.Norm"),
        (
            POOLING,
            "{",
            '{"include_prompt": false,',
            "of Pooling that sleb does not follow: include",
        ),
        (POOLING, "{", '{"new": 3,', "of Pooling that sleb does not follow: new is 3"),
        (WHOLE, '"prompts": {}', '"prompts": [1]', "prompts is [1]"),
        (WHOLE, '"prompts": {}', '"prompts": {"query": 3}', "query is 3"),
        (WHOLE, "{", '{"similarity_fn_name": "maxsim",', "similarity_fn_name is 'maxsim'"),
        (WHOLE, "{", '{"truncate_dim": 0,', "truncate_dim is 0"),
        (LENGTH, "48", '"48"', "max_seq_length is '48'"),
        (LENGTH, "48", "-3", "max_seq_length is -3"),
        (LENGTH, "48", '48, "modality_config": {"message": {}}', "in a chat template"),
        (LENGTH, "48", '48, "query_length": 8', "query_length is 8"),
        (LENGTH, "48", '48, "model_args": {"output_hidden_states": true}', "states is True"),
        (LENGTH, "48", POOLED, "method_output_name is 'pooler_output'"),
    ],
)
def test_models_that_cannot_be_read_are_refused(run_sleb, texts, tmp_path, file, old, new, said):
    folder = add_modules(save_reader(tmp_path / "model", word_pieces(prose(200)), bert_config()))
    edit(folder / file, old, new)
    require_refusal(run_sleb, folder, texts, said)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"bias": False}, "in_features"),
        ({"in_features": 32, "out_features": 9, "bias": False}, "size mismatch"),
        ({"in_features": 32, "out_features": 8}, "bias"),
        ({"in_features": 30, "out_features": 8, "bias": False}, "mismatch"),
        (
            {
                "in_features": 32,
                "out_features": 8,
                "bias": False,
                "activation_function": "os.system",
            },
            "torch does not have: os.system",
        ),
        (
            {"in_features": 32, "out_features": 8, "module_input_name": "token_embeddings"},
            "of Dense that sleb does not follow: module_input_name is 'token_embeddings'",
        ),
    ],
)
def test_a_dense_module_that_does_not_fit_is_refused(run_sleb, texts, tmp_path, settings, said):
    folder = save_reader(tmp_path / "model", word_pieces(prose(200)), bert_config())
    add_modules(folder, modules=("Transformer", "Pooling", "Dense"))
    (folder / "2_Dense/config.json").write_text(json.dumps(settings))
    save_file({"linear.weight": torch.zeros(8, 32)}, folder / "2_Dense/model.safetensors")
    require_refusal(run_sleb, folder, texts, said)


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_a_classifier_with_several_answers_is_refused(run_sleb, texts, tmp_path, problem):
    config = bert_config(num_labels=3, problem_type=problem)
    kind = AutoModelForSequenceClassification
    folder = save_reader(tmp_path / "model", word_pieces(prose(200)), config, kind)
    require_refusal(run_sleb, folder, texts, f"several answers ({problem})")


def test_a_head_for_masked_tokens_is_refused(run_sleb, texts, tmp_path):
    folder = save_reader(tmp_path / "model", word_pieces(prose(200)), bert_config())
    edit(folder / "config.json", "BertModel", "BertForMaskedLM")
    require_refusal(run_sleb, folder, texts, "predicts masked tokens")


def require_refusal(run_sleb, folder, texts, said):
    words = ["search", folder, "--remove", 1, "--calibration", texts, *NO_SAMPLE]
    result = run_sleb(*words)
    assert result.exit_code == 4, result.stderr
    assert said in " ".join(result.stderr.split())


def edit(path, old, new):
    before = path.read_text()
    assert old in before
    path.write_text(before.replace(old, new, 1))
