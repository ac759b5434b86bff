"""How a text is cut for evaluation: which predictions count, and which document each belongs to."""

import pytest
import torch

from conftest import prose, train_tokenizer
from sleb_cli.engine.text.sources import Text, evaluation_text
from sleb_cli.engine.text.windows import cut_for_evaluation, cut_running_text, cut_windows
from sleb_plugins import DataError, UsageError


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(bos=False)


@pytest.mark.parametrize("bos", [False, True])
def test_windows_without_a_stride_are_those_of_the_literature(tokenizer, bos):
    text = prose(30)
    windows = cut_for_evaluation(tokenizer, Text("t", text), 16, bos=bos)
    plain = cut_windows(tokenizer, text, 16, bos=True) if bos else cut_running_text(tokenizer, text, 16)
    assert torch.equal(windows.ids, plain)
    assert windows.counted.all()
    assert windows.counted.shape == (len(plain), 15)
    assert windows.bos == ("windows" if bos else "none")


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("stride", [1, 5, 12, 15])
def test_with_a_stride_each_token_counts_once_with_enough_context(tokenizer, bos, stride):
    text = prose(20)
    ids = tokenizer(text).input_ids
    windows = cut_for_evaluation(tokenizer, Text("t", text), 16, bos=bos, stride=stride)
    own, counted = 16 - bos, []
    for number, (row, which) in enumerate(zip(windows.ids, windows.counted, strict=True)):
        assert row[bos:].tolist() == ids[number * stride : number * stride + own]
        places = [number * stride + place + 1 - bos for place in which.nonzero()[:, 0].tolist()]
        if number:
            assert all(place - number * stride >= own - stride for place in places)
        counted += places
    assert counted == list(range(1 - bos, counted[-1] + 1))
    assert counted[-1] == (len(windows.ids) - 1) * stride + own - 1


def test_tokens_belong_to_the_documents_they_are_from(tokenizer):
    parts = [prose(6, seed=1), prose(9, seed=2), prose(4, seed=3)]
    starts = (0, len(parts[0]) + 2, len(parts[0]) + len(parts[1]) + 4)
    windows = cut_for_evaluation(tokenizer, Text("t", "\n\n".join(parts), documents=starts), 16)
    assert windows.by_document
    assert windows.clusters.shape == windows.counted.shape
    for document in range(3):
        rows = windows.ids[:, 1:][windows.clusters == document]
        shown = tokenizer.decode(rows.tolist())
        # Tokens at the start of a window are not predicted, so words are missing, but none comes from elsewhere.
        assert set(shown.split()) & set(parts[document].split())
    assert windows.clusters.flatten().tolist() == sorted(windows.clusters.flatten().tolist())
    alone = cut_for_evaluation(tokenizer, Text("t", "\n\n".join(parts)), 16)
    assert not alone.by_document
    assert alone.clusters[:, 0].tolist() == list(range(len(alone.ids)))


def test_documents_of_a_file_are_its_lines(tokenizer, tmp_path):
    import json

    documents = [prose(5, seed=seed) for seed in range(4)]
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in documents))
    text = evaluation_text(str(tmp_path / "d.jsonl"))
    assert [text.content[start:].startswith(part) for start, part in zip(text.documents, documents, strict=True)] == [
        True
    ] * 4
    assert len(cut_for_evaluation(tokenizer, text, 8).clusters.unique()) == 4


def test_words_and_bytes_are_those_of_the_counted_tokens(tokenizer):
    text = prose(40)
    windows = cut_for_evaluation(tokenizer, Text("t", text), 64, bos=True)
    words, size = windows.count_words(tokenizer)
    used = tokenizer.decode(windows.ids[:, 1:].flatten().tolist())
    assert size == len(used.encode())
    # A word that a window's edge cuts counts on both sides.
    assert len(used.split()) <= words <= len(used.split()) + len(windows.ids)


def test_the_limit_of_a_protocol_and_of_the_user(tokenizer):
    text = Text("t", prose(60), limit=5)
    assert len(cut_for_evaluation(tokenizer, text, 16).ids) == 5
    assert len(cut_for_evaluation(tokenizer, text, 16, most=3).ids) == 3
    # The protocol limits the tokens, so overlapping windows are more.
    assert len(cut_for_evaluation(tokenizer, text, 16, stride=8).ids) == 9


def test_what_does_not_fit_is_refused(tokenizer):
    for stride in (0, 17):
        with pytest.raises(UsageError, match=f"--stride {stride} does not fit windows of 16"):
            cut_for_evaluation(tokenizer, Text("t", prose(9)), 16, stride=stride)
    with pytest.raises(DataError, match="less than one sequence"):
        cut_for_evaluation(tokenizer, Text("t", "river"), 16)
