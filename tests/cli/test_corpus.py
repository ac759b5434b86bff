"""`sleb eval --corpus`: what models that only read lose, against plain arithmetic."""

import csv
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SimilarityFunction
from torch.nn.functional import normalize
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from conftest import WORDS, prose
from encoders import add_modules, bert_config, save_reader, word_pieces
from sleb_cli.engine.quality.corpus import ndcg, rank_correlation
from sleb_cli.texts.corpus_files import read_folder

TEXTS = prose(240).splitlines()
NEIGHBOURS = ("neighbours", "neighbours in 20")
QUERIES = [" ".join(WORDS[start : start + 3]) for start in range(0, 30, 3)]


def write_lines(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def beir(tmp_path):
    """Forty documents and ten queries, of which two have no judgement."""
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    texts = [{"_id": f"d{n}", "title": WORDS[n % 9], "text": text} for n, text in enumerate(TEXTS)]
    write_lines(folder / "corpus.jsonl", texts)
    queries = [{"_id": f"q{n}", "text": text} for n, text in enumerate(QUERIES)]
    write_lines(folder / "queries.jsonl", queries)
    rows = [f"q{n}\td{4 * n + gain}\t{gain}" for n in range(8) for gain in (0, 1, 2)]
    (folder / "qrels" / "test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *rows]))
    return folder


def reading(folder, items, removed=(), kind=AutoModel, length=48):
    """Return what transformers' model puts out without blocks: vectors, or logits."""
    model = kind.from_pretrained(folder).eval()
    layers = (model if kind is AutoModel else model.bert).encoder.layer
    for block in sorted(removed, reverse=True):
        del layers[block]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = []
    for item in items:
        parts = (item,) if isinstance(item, str) else item
        inputs = tokenizer(
            *parts,
            truncation=True,
            max_length=length,
            return_tensors="pt",
        )
        with torch.no_grad():
            output = model(**inputs)
        rows.append(output.last_hidden_state[0].mean(0) if kind is AutoModel else output.logits[0])
    return torch.stack(rows)


def top_ten(scores, count=10):
    return scores.topk(count).indices.tolist()


def measures(result):
    return {corpus["measure"]: corpus for corpus in result.data["corpora"]}


def test_an_index_of_each_size_ranks_as_plain_code_does(sleb, tiny_encoder, beir):
    words = [
        "eval",
        tiny_encoder,
        "--blocks",
        "1,3",
        "--every",
        1,
        "--corpus",
        beir,
        "--json",
    ]
    found = measures(sleb(*words))
    texts = [f"passage: {WORDS[n % 9]} {text}" for n, text in enumerate(TEXTS)]
    queries = [f"question: {text}" for text in QUERIES[:8]]
    read = {}
    for size in [(), (1,), (1, 3)]:
        vectors = normalize(reading(tiny_encoder, texts + queries, size))
        read[size] = vectors[len(texts) :], vectors[: len(texts)]
    dense_queries, dense_texts = read[()]
    wanted = top_ten(dense_queries @ dense_texts.T)
    for number, size in enumerate([(1,), (1, 3)]):
        pruned_queries, pruned_texts = read[size]
        for index, documents in (("old index", dense_texts), ("own index", pruned_texts)):
            values = {"neighbours": [], "nDCG@10": [], "MRR@10": []}
            twenty = top_ten(pruned_queries @ documents.T, 20)
            pairs = zip(twenty, wanted, strict=True)
            values["neighbours in 20"] = [len({*one} & {*two}) / 10 for one, two in pairs]
            for query, ranking in enumerate(top_ten(pruned_queries @ documents.T)):
                gained = [{4 * query + 1: 1, 4 * query + 2: 2}.get(text, 0) for text in ranking]
                discounted = sum(gain / math.log2(at + 2) for at, gain in enumerate(gained))
                first = next((at for at, gain in enumerate(gained, 1) if gain), math.inf)
                values["neighbours"].append(len({*ranking} & {*wanted[query]}) / 10)
                values["nDCG@10"].append(discounted / (2 + 1 / math.log2(3)))
                values["MRR@10"].append(1 / first)
            for name, items in values.items():
                pruned = found[f"{name}, {index}"]["pruned"][number]
                assert pruned["items"] == pytest.approx(items, abs=1e-5), (name, index, size)
        assert 0 < found["rank correlation"]["pruned"][number]["value"] < 1
    of_index = found["nDCG@10, old index"]
    change = of_index["pruned"][1]["value"] - of_index["dense"]["value"]
    assert of_index["pruned"][1]["difference"] == pytest.approx(change)


def test_texts_ask_each_other_and_never_find_themselves(sleb, run_sleb, tiny_encoder, tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text(prose(240))
    words = ["eval", tiny_encoder, "--corpus", file, "--sequence-length", 24]
    alone = measures(sleb(*words, "--json"))
    names = {f"{name}, {index} index" for name in NEIGHBOURS for index in ("old", "own")}
    assert set(alone) == {*names, "rank correlation"}
    assert all(corpus["dense"]["value"] == 1 for corpus in alone.values())
    assert alone["rank correlation"]["texts"] == 40
    shown = run_sleb(*words, "--blocks", 2, "--prompt", "query")
    assert "which begin with 'question: '" in " ".join(shown.stdout.split())
    texts = [f"question: {text}" for text in TEXTS]
    dense = normalize(reading(tiny_encoder, texts, length=24))
    pruned = normalize(reading(tiny_encoder, texts, {2}, length=24))
    before = top_ten((dense @ dense.T).fill_diagonal_(-2))
    after = top_ten((pruned @ dense.T).fill_diagonal_(-2))
    share = (
        sum(
            len({*one} & {*other})
            for one, other in zip(
                before,
                after,
                strict=True,
            )
        )
        / 400
    )
    assert f"{share:.4f}" in shown.stdout


def test_a_classifier_is_held_against_its_dense_self_and_labels(sleb, tiny_classifier, tmp_path):
    rows = [{"text": text, "label": n % 3} for n, text in enumerate(TEXTS)]
    rows[0]["label"] = "LABEL_0"
    rows[1]["label"] = None
    file = write_lines(tmp_path / "labels.jsonl", rows)
    found = measures(
        sleb(
            "eval",
            tiny_classifier,
            "--blocks",
            2,
            "--corpus",
            file,
            "--json",
        )
    )
    kind = AutoModelForSequenceClassification
    dense, pruned = (
        reading(
            tiny_classifier,
            TEXTS,
            removed,
            kind,
            64,
        ).argmax(-1)
        for removed in ((), {2})
    )
    same = found["same class"]["pruned"][0]
    assert same["items"] == (dense == pruned).float().tolist()
    assert same["lost"] == int((dense != pruned).sum())
    right = [n % 3 == chosen for n, chosen in enumerate(pruned.tolist()) if n != 1]
    assert found["accuracy"]["pruned"][0]["value"] == pytest.approx(sum(right) / 39)


def test_a_reranker_ranks_the_candidates_of_each_query(sleb, tiny_reranker, tmp_path):
    rows = [{"query": QUERIES[n % 10], "text": text} for n, text in enumerate(TEXTS)]
    file = write_lines(tmp_path / "pairs.jsonl", rows)
    found = measures(
        sleb(
            "eval",
            tiny_reranker,
            "--blocks",
            2,
            "--corpus",
            file,
            "--json",
        )
    )
    assert set(found) == {"rank correlation", "nDCG@10", "MRR@10"}
    assert found["nDCG@10"]["queries"] == len(found["nDCG@10"]["dense"]["items"]) == 10
    assert 0 < found["rank correlation"]["pruned"][0]["value"] < 1


def test_what_is_kept_is_measured_once(sleb, run_sleb, tiny_encoder, beir, text_file):
    few = ["--samples", 12, "--sequence-length", 16, "--sample-tokens", 0]
    sleb(
        "search",
        tiny_encoder,
        "--remove",
        2,
        "--calibration",
        text_file,
        *few,
    )
    sleb("eval plan.json --remove 1 --corpus", beir)
    more = run_sleb("eval plan.json --every 1 --corpus", beir)
    assert "Measured before" not in more.said
    assert "2 of 10 queries of" in more.said
    rows = more.stdout.partition("Verdict by measure")[2]
    assert re.search(r"neighbours, old index +│ without 1 .+% lost +│", rows)
    again = run_sleb("eval plan.json --every 1 --corpus", beir)
    assert "Measured before: beir." in again.said
    assert again.stdout == more.stdout
    name, score = re.search(
        r"(nDCG@10, old index).+?without 2 +│ (0\.\d+)", again.stdout, re.DOTALL
    ).groups()
    sleb("export plan.json --to report -o report.html")
    assert f">{score}<" in Path("report.html").read_text()
    sleb("export plan.json --to table -o table.csv")
    sizes = list(csv.DictReader(Path("table.csv").read_text().splitlines()))
    assert [row["removed"] for row in sizes] == ["0", "1", "2"]
    assert sizes[2]["items"] == "beir 8"
    assert f"{float(sizes[2][f'{name}, beir']):.4f}" == score
    assert float(sizes[2][f"{name}, beir low"]) < float(score)
    sleb("apply plan.json -o out --no-verify")
    assert "| nDCG@10, old index, beir | 0." in Path("out/README.md").read_text()


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        ("tiny_encoder", "", "only reads, so it has no perplexity"),
        ("tiny_encoder", "--tasks sleb_recall", "--tasks needs a language head"),
        ("tiny_encoder", "--perplexity wikitext2", "--perplexity needs a language head"),
        ("tiny_llama", "--corpus few.jsonl", "--corpus is for models that only read"),
        ("tiny_encoder", "--corpus few.jsonl", "has 1 text, but needs at least 12"),
        ("tiny_encoder", "--corpus none.jsonl", "There is no file or folder none.jsonl"),
        ("tiny_encoder", "--corpus .", "has no corpus.jsonl"),
        ("tiny_classifier", "--corpus labels.jsonl", "The model has no class 'other'"),
        ("tiny_encoder", "--corpus labels.jsonl --prompt none", "There is no prompt 'none'"),
    ],
)
def test_what_cannot_be_measured_is_refused(run_sleb, request, tmp_path, model, options, said):
    write_lines(tmp_path / "few.jsonl", [{"text": "river"}])
    rows = [{"text": text, "label": "other"} for text in TEXTS]
    write_lines(tmp_path / "labels.jsonl", rows)
    result = run_sleb(
        "eval",
        request.getfixturevalue(model),
        *options.split(),
    )
    assert result.exit_code != 0
    assert said in result.said


@pytest.mark.parametrize(("own", "is_found"), [("q0", False), ("d0", True)])
@pytest.mark.parametrize(("model", "count"), [("tiny_encoder", 40), ("tiny_reranker", 1)])
def test_the_text_of_its_own_id_answers_no_query(sleb, request, beir, model, count, own, is_found):
    texts = [{"_id": f"d{n}", "text": "river"} for n in range(count + 1)]
    texts[0] = {"_id": own, "text": QUERIES[0]}
    write_lines(beir / "corpus.jsonl", texts)
    judgements = f"query-id\tcorpus-id\tscore\nq0\t{own}\t1\nq1\td1\t1"
    (beir / "qrels" / "test.tsv").write_text(judgements)
    measured = measures(sleb("eval", request.getfixturevalue(model), "--corpus", beir, "--json"))
    for name in ("MRR@10", "MRR@10, own index"):
        if name in measured:
            assert (measured[name]["dense"]["items"][0] > 0) == is_found


@pytest.mark.parametrize(
    "lines",
    [
        ["query-id\tcorpus-id\tscore", "q0\td1\t1", "q1\td2\t2"],
        ["q0\td1\t1", "q1\td2\t2"],
        ["q0 0 d1 1", "q1 0 d2 2"],
        ["q0\t0\td1\t1", "", "q1\tQ0\td2\t2"],
        ["query-id\tcorpus-id\tscore", "q0\td1\t1.0", "q1\td2\t2.0", ""],
    ],
)
def test_judgements_are_read_in_the_forms_that_are_common(beir, lines):
    (beir / "qrels" / "test.tsv").write_text("\n".join([*lines, ""]))
    corpus = read_folder(str(beir))
    assert corpus.gains == [{1: 1}, {2: 2}]
    assert corpus.left_out == 8


def test_ids_may_be_numbers(beir):
    write_lines(beir / "corpus.jsonl", [{"_id": n, "text": text} for n, text in enumerate(TEXTS)])
    (beir / "qrels" / "test.tsv").write_text("q3\t7\t1\n")
    assert read_folder(str(beir)).gains == [{7: 1}]


@pytest.mark.parametrize(
    ("judgements", "said"),
    [
        ("q0\td1", "Line 1 of beir/qrels/test.tsv is not a query, a text and a number"),
        ("q0\td1\t1\nq0\td2\tnan", "Line 2 of beir/qrels/test.tsv is not a query"),
        ("query\ttext\tscore\nquery\ttext\tscore", "Line 2 of beir/qrels/test.tsv is not"),
        ("q0\tnone\t1", "No query of beir has a judged text"),
    ],
)
def test_judgements_that_judge_nothing_are_refused(run_sleb, tiny_encoder, beir, judgements, said):
    (beir / "qrels" / "test.tsv").write_text(judgements)
    result = run_sleb("eval", tiny_encoder, "--corpus", beir.name)
    assert result.exit_code == 5
    assert said in result.said


@pytest.mark.parametrize("name", ["dot", "euclidean", "manhattan"])
def test_vectors_are_ranked_by_the_similarity_of_their_model(sleb, tmp_path, name):
    folder = save_reader(tmp_path / "model", word_pieces(prose(200)))
    add_modules(folder, modules=("Transformer", "Pooling"), similarity_fn_name=name)
    (tmp_path / "texts.txt").write_text(prose(240))
    words = ["eval", folder, "--blocks", 2, "--corpus", "texts.txt", "--json"]
    measured = measures(sleb(*words, "--sequence-length", 24))
    dense = reading(folder, TEXTS, length=24)
    pruned = reading(folder, TEXTS, {2}, length=24)
    similarity = SimilarityFunction.to_similarity_fn(name)
    before = top_ten(similarity(dense, dense).fill_diagonal_(-math.inf))
    after = top_ten(similarity(pruned, dense).fill_diagonal_(-math.inf))
    shares = []
    for one, other in zip(before, after, strict=True):
        shares.append(len({*one} & {*other}) / 10)
    assert measured["neighbours, old index"]["pruned"][0]["items"] == shares


CONFIG = "config.json"
WHOLE = "config_sentence_transformers.json"
LENGTH = "sentence_bert_config.json"
SWAPPED = {"id2label": {"0": "LABEL_1", "1": "LABEL_0", "2": "LABEL_2"}}


@pytest.mark.parametrize(
    ("model", "file", "changed", "said"),
    [
        ("tiny_encoder", WHOLE, {"prompts": {"query": "ask: "}}, "'ask: '"),
        (
            "tiny_encoder",
            WHOLE,
            {"default_prompt_name": "query"},
            "The default prompt is 'ques",
        ),
        ("tiny_encoder", WHOLE, {"similarity_fn_name": "dot"}, "similarity_fn_name is 'dot'"),
        ("tiny_encoder", LENGTH, {"do_lower_case": True}, "do_lower_case is True"),
        ("tiny_classifier", CONFIG, SWAPPED, "The name of class 0 is 'LABEL_1' in"),
    ],
)
def test_models_that_read_or_answer_otherwise_are_not_compared(
    run_sleb, request, tmp_path, model, file, changed, said
):
    dense = request.getfixturevalue(model)
    other = shutil.copytree(dense, tmp_path / "other")
    (tmp_path / "texts.txt").write_text(prose(240))
    words = ["eval", other, "--against", dense, "--corpus", "texts.txt"]
    assert run_sleb(*words).exit_code == 0
    settings = json.loads((other / file).read_text())
    (other / file).write_text(json.dumps(settings | changed))
    result = run_sleb(*words, "--force")
    assert result.exit_code == 2
    assert said in result.said


def test_vectors_of_another_width_are_measured_in_their_own_index(sleb, tmp_path):
    pieces = word_pieces(prose(200))
    wide = save_reader(tmp_path / "wide", pieces)
    narrow = save_reader(tmp_path / "narrow", pieces, bert_config(2, hidden_size=16))
    (tmp_path / "texts.txt").write_text(prose(240))
    words = ["eval", narrow, "--against", wide, "--corpus", "texts.txt", "--json"]
    result = sleb(*words, "--sequence-length", 24)
    assert "narrow puts out vectors of 16 numbers instead of 32, so" in result.said
    measured = measures(result)
    assert "neighbours, old index" not in measured
    one, other = (normalize(reading(folder, TEXTS, length=24)) for folder in (wide, narrow))
    before = top_ten((one @ one.T).fill_diagonal_(-2))
    after = top_ten((other @ other.T).fill_diagonal_(-2))
    shares = [len({*old} & {*new}) / 10 for old, new in zip(before, after, strict=True)]
    assert measured["neighbours, own index"]["pruned"][0]["items"] == shares


def test_classes_of_another_number_are_refused(sleb, tiny_classifier, tmp_path):
    config = bert_config(num_labels=4)
    kind = AutoModelForSequenceClassification
    four = save_reader(tmp_path / "four", word_pieces(prose(200)), config, kind)
    (tmp_path / "texts.txt").write_text(prose(240))
    words = ["eval", four, "--against", tiny_classifier, "--corpus", "texts.txt"]
    said = sleb(*words, code=2).said
    assert f"{four} puts out 4 classes, but {tiny_classifier} puts out 3 classes" in said


def test_measures_on_paper():
    assert ndcg([3, 1], {1: 1.0, 2: 3.0}) == pytest.approx(0.6309 / (3 + 0.6309), abs=1e-4)
    own = -math.inf
    one = torch.tensor([[1.0, 2.0, 3.0, own], [3.0, own, 2.0, 1.0]])
    other = torch.tensor([[1.0, 3.0, 2.0, own], [7.0, own, 5.0, 4.0]])
    assert rank_correlation(one, other) == pytest.approx([0.5, 1.0])


@pytest.mark.parametrize(
    ("scores", "correlation"),
    [([5, 5, 5, 5], 0), ([1, 1, 2, 3], 0.9487), ([4, 4, 1, 1], -0.8944)],
)
def test_equal_scores_have_equal_ranks(scores, correlation):
    one = torch.tensor([[*scores, -math.inf]])
    other = torch.tensor([[1, 2, 3, 4, -math.inf]])
    assert rank_correlation(one, other) == pytest.approx([correlation], abs=1e-4)


def test_a_reranker_without_an_order_finds_nothing(sleb, tiny_reranker, beir, tmp_path):
    equal = shutil.copytree(tiny_reranker, tmp_path / "equal")
    weights = load_file(equal / "model.safetensors")
    weights["classifier.weight"].zero_()
    save_file(weights, equal / "model.safetensors", {"format": "pt"})
    found = measures(sleb("eval", equal, "--against", tiny_reranker, "--corpus", beir, "--json"))
    assert found["rank correlation"]["pruned"][0]["value"] == 0
    assert found["MRR@10"]["pruned"][0]["value"] < 0.4  # 0.5 if what is judged stood first
