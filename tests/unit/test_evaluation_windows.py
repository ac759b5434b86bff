"""How a text is cut for evaluation: which predictions count, and which document each belongs to."""

from types import SimpleNamespace

import pytest

from conftest import prose, train_tokenizer
from sleb_cli.engine.text.windows import (
    choose_length,
    cut_for_evaluation,
    cut_running_text,
    cut_windows,
)
from sleb_cli.requests import DEFAULT_LENGTH
from sleb_cli.texts.source import Text
from sleb_plugins import UsageError


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(bos=False)


def test_the_tokenizers_bos_begins_the_text_or_each_window(tokenizer):
    other, text = train_tokenizer(bos=True), Text("t", prose(30))
    plain = tokenizer(text.content).input_ids
    assert (
        cut_windows(tokenizer, text.content, 16, bos=False).flatten().tolist()
        == plain[: len(plain) // 16 * 16]
    )
    windows = cut_for_evaluation(other, text, 16)
    assert windows.bos == "text"
    for ids in (windows.ids, cut_running_text(other, text.content, 16)):
        assert ids.flatten().tolist() == [0, *plain][: (len(plain) + 1) // 16 * 16]
    other.bos_token = "</s>"  # now the model's BOS is not what the tokenizer adds
    for ids in (
        cut_for_evaluation(other, text, 16, bos=True).ids,
        cut_windows(other, text.content, 16, bos=True),
    ):
        assert ids[:, 0].tolist() == [1] * len(ids)
        assert ids[:, 1:].flatten().tolist() == plain[: len(plain) // 15 * 15]
    assert cut_windows(other, "river", 16, bos=True).shape == (0, 16)
    other.bos_token = None
    assert cut_for_evaluation(other, text, 16).bos == "none"
    with pytest.raises(UsageError, match="needs a BOS token, but the tokenizer has none"):
        cut_for_evaluation(other, text, 16, bos=True)


def test_tokens_belong_to_the_documents_they_are_from(tokenizer):
    parts = [prose(6, seed=1), prose(9, seed=2), prose(4, seed=3)]
    starts = (0, len(parts[0]) + 2, len(parts[0]) + len(parts[1]) + 4)
    windows = cut_for_evaluation(tokenizer, Text("t", "\n\n".join(parts), documents=starts), 16)
    assert windows.clustered_by == "documents"
    places = [
        place
        for place, _ in tokenizer("\n\n".join(parts), return_offsets_mapping=True).offset_mapping
    ]
    owners = [sum(start <= place for start in starts) - 1 for place in places]
    assert windows.clusters.tolist() == [
        owners[row * 16 + 1 : row * 16 + 16] for row in range(len(windows.ids))
    ]
    for documents in ((), (0,)):
        alone = cut_for_evaluation(
            tokenizer, Text("t", "\n\n".join(parts), documents=documents), 16
        )
        assert alone.clustered_by == "windows"
        assert alone.clusters[:, 0].tolist() == list(range(len(alone.ids)))


def test_the_limit_of_a_protocol_and_of_the_user(tokenizer):
    text = Text("t", prose(60), limit=5)
    assert len(cut_for_evaluation(tokenizer, text, 16).ids) == 5
    assert len(cut_for_evaluation(tokenizer, text, 16, most=3).ids) == 3


@pytest.mark.parametrize(
    ("asked", "limit", "expected"),
    [(None, 512, 512), (None, 4096, DEFAULT_LENGTH), (None, None, DEFAULT_LENGTH), (64, 64, 64)],
)
def test_the_length_is_what_is_asked_for_or_what_the_model_has(asked, limit, expected):
    model = SimpleNamespace(longest_sequence=limit, source=SimpleNamespace(id="m"))
    assert choose_length(asked, model) == expected
