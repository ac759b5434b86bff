"""Results that stay beside a plan: merged by what was measured, and never a reason to lose a result."""

import pytest

from sleb_cli.kept_results import beside_plan, keep_result, read_kept
from sleb_cli.records import ModelRecord
from sleb_cli.results import DivergenceRecord, EvalResult, PrunedTextScores, TextResult, TextScores

MODEL = ModelRecord(id="/m", revision=None, fingerprint="f" * 64, model_type="llama", family="llama", blocks=6)
SCORES = {
    "word_perplexity": None, "byte_perplexity": None, "bits_per_byte": None, "calibration_error": 0.1, "losses": (1.0,),
}  # fmt: skip
APART = DivergenceRecord(
    mean=0.1, standard_error=None, median=0.1, p90=0.2, p99=0.3, maximum=1, probability_change_rms=0.1, same_top=0.9
)


def text(name, sizes, perplexity=10.0):
    pruned = [
        PrunedTextScores(
            **SCORES, perplexity=perplexity + len(size), removals=size, log_ratio=0.1, standard_error=None,
            interval=None, divergence=APART,
        )
        for size in sizes
    ]  # fmt: skip
    return TextResult(
        text=name, windows=1, sequence_length=8, stride=None, bos="none", tokens=7, words=3, bytes=9, clusters=1,
        clustered_by="windows", tokens_sha256=name, dense=TextScores(**SCORES, perplexity=perplexity),
        pruned=tuple(pruned),
    )  # fmt: skip


def result(*texts, sizes=((1,),), **changes):
    given = {
        "schema_version": 1, "sleb_version": "0", "kind": "eval", "model": MODEL, "dtype": "float32", "device": "cpu",
        "sizes": sizes, "torch": "2", "transformers": "5", "processor": "p", "texts": texts, "tasks": (),
    }  # fmt: skip
    return EvalResult(**(given | changes))


def test_texts_and_sizes_of_two_runs_are_both_kept(tmp_path):
    file, heard = beside_plan(tmp_path / "plan.json", "eval"), []
    assert file.name == "plan.eval.json"
    keep_result(result(text("a", [(1,), (1, 3)]), sizes=((1,), (1, 3))), file, heard.append)
    both = keep_result(result(text("a", [(1, 3), (1, 3, 2)], 20.0), text("b", [(1,)])), file, heard.append)
    assert read_kept(EvalResult, file, heard.append) == both
    assert heard == []
    assert [found.text for found in both.texts] == ["a", "b"]
    assert [(size.removals, size.perplexity) for size in both.texts[0].pruned] == [
        ((1,), 11.0), ((1, 3), 22.0), ((1, 3, 2), 23.0),
    ]  # fmt: skip
    assert both.texts[0].dense.perplexity == 20
    assert both.sizes == ((1,), (1, 3))


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "bfloat16"}, {"device": "cuda"}, {"processor": "q"}, {"behavior": "other"}, {"sleb_version": "1"},
        {"torch": "3"}, {"transformers": "6"}, {"model": MODEL.model_copy(update={"fingerprint": "0"})},
        {"model": MODEL.model_copy(update={"code": "0"})},
    ],
)  # fmt: skip
def test_what_one_header_cannot_describe_is_moved_aside(tmp_path, changes):
    file = tmp_path / "plan.eval.json"
    keep_result(result(text("a", [(1,)])), file, [].append)
    heard = []
    kept = keep_result(result(text("b", [(1,)]), **changes), file, heard.append)
    assert [found.text for found in kept.texts] == ["b"]
    assert "plan.eval.json holds results of another model or in another setting" in heard[0].text
    assert "plan.eval.json is now plan.eval.json.old" in heard[1].text
    old = read_kept(EvalResult, tmp_path / "plan.eval.json.old", heard.append)
    assert [found.text for found in old.texts] == ["a"]


def test_the_same_name_for_another_text_is_another_text(tmp_path):
    file, other = tmp_path / "plan.eval.json", text("a", [(1,)]).model_copy(update={"tokens_sha256": "other"})
    keep_result(result(text("a", [(1,)])), file, [].append)
    assert len(keep_result(result(other), file, [].append).texts) == 2


def test_a_file_that_is_no_result_is_replaced_with_a_notice(tmp_path):
    file, heard = tmp_path / "plan.eval.json", []
    file.write_text('{"kind": "eval"}')
    keep_result(result(text("a", [(1,)])), file, heard.append)
    assert "plan.eval.json holds no result" in heard[0].text
    assert read_kept(EvalResult, file, heard.append) is not None


def test_a_place_that_cannot_be_written_is_said_and_loses_nothing(tmp_path):
    heard, given = [], result(text("a", [(1,)]))
    assert keep_result(given, tmp_path / "none" / "plan.eval.json", heard.append) == given
    assert "not kept for reports" in heard[0].text
