"""How a text is cut for evaluation: which predictions count, and which document each belongs to."""

from types import SimpleNamespace

import pytest
import torch

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
    words = prose(30)
    text = Text("t", words)
    plain = torch.tensor(tokenizer(words).input_ids)
    count = len(plain)
    without = cut_windows(tokenizer, words, 16, bos=False)
    assert torch.equal(without.flatten(), plain[: count // 16 * 16])
    other = train_tokenizer(bos=True)
    windows = cut_for_evaluation(other, text, 16)
    assert windows.bos == "text"
    assert torch.equal(windows.ids, cut_running_text(other, words, 16))
    assert torch.equal(windows.ids.flatten()[1:], plain[: (count + 1) // 16 * 16 - 1])
    assert windows.ids[0, 0] == 0
    other.bos_token = "</s>"  # now the model's BOS is not what the tokenizer adds
    ids = cut_windows(other, words, 16, bos=True)
    assert torch.equal(ids, cut_for_evaluation(other, text, 16, bos=True).ids)
    assert set(ids[:, 0].tolist()) == {1}
    assert torch.equal(ids[:, 1:].flatten(), plain[: count // 15 * 15])
    assert cut_windows(other, "river", 16, bos=True).shape == (0, 16)
    other.bos_token = None
    assert cut_for_evaluation(other, text, 16).bos == "none"
    with pytest.raises(UsageError, match="needs a BOS token, but the tokenizer has none"):
        cut_for_evaluation(other, text, 16, bos=True)


def test_tokens_belong_to_the_documents_they_are_from(tokenizer):
    text = prose(19)
    starts = (0, text.index(".") + 2, text.rindex("\n") + 1)
    windows = cut_for_evaluation(tokenizer, Text("t", text, documents=starts), 16)
    assert windows.clustered_by == "documents"
    owners = []
    for place, _ in tokenizer(text, return_offsets_mapping=True).offset_mapping:
        owners.append(sum(start <= place for start in starts) - 1)
    rows = torch.tensor(owners[: windows.ids.numel()]).view_as(windows.ids)
    assert torch.equal(windows.clusters, rows[:, 1:])
    for documents in ((), (0,)):
        alone = cut_for_evaluation(tokenizer, Text("t", text, documents=documents), 16)
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
