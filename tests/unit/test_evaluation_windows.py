"""How a text is cut for evaluation: which predictions count, and which document each belongs to."""

from itertools import accumulate, pairwise
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from conftest import prose, train_tokenizer
from sleb_cli.engine.text.sources import Text
from sleb_cli.engine.text.windows import choose_length, cut_for_evaluation, cut_running_text, cut_windows
from sleb_cli.requests import DEFAULT_LENGTH
from sleb_plugins import UsageError


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(bos=False)


def test_the_tokenizers_bos_begins_the_text_or_each_window(tokenizer):
    other, text = train_tokenizer(bos=True), Text("t", prose(30))
    plain = tokenizer(text.content).input_ids
    assert cut_windows(tokenizer, text.content, 16, bos=False).flatten().tolist() == plain[: len(plain) // 16 * 16]
    windows = cut_for_evaluation(other, text, 16)
    assert windows.bos == "text"
    for ids in (windows.ids, cut_running_text(other, text.content, 16)):
        assert ids.flatten().tolist() == [0, *plain][: (len(plain) + 1) // 16 * 16]
    other.bos_token = "</s>"  # now the model's BOS is not what the tokenizer adds
    for ids in (cut_for_evaluation(other, text, 16, bos=True).ids, cut_windows(other, text.content, 16, bos=True)):
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
    places = [place for place, _ in tokenizer("\n\n".join(parts), return_offsets_mapping=True).offset_mapping]
    owners = [sum(start <= place for start in starts) - 1 for place in places]
    assert windows.clusters.tolist() == [owners[row * 16 + 1 : row * 16 + 16] for row in range(len(windows.ids))]
    for documents in ((), (0,)):
        alone = cut_for_evaluation(tokenizer, Text("t", "\n\n".join(parts), documents=documents), 16)
        assert alone.clustered_by == "windows"
        assert alone.clusters[:, 0].tolist() == list(range(len(alone.ids)))


def byte_level():
    """Tokens that may be parts of a character, which belongs to the first of them, after a BOS."""
    return train_tokenizer(bos=True), 0


def dropping_spaces():
    """Words, and what is unknown, without the spaces around them."""
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "[UNK]": 1, "river": 2, ".": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="[UNK]"), 0


def without_offsets():
    """Bytes, by a tokenizer that does not say where they lie; a character belongs to the last of them."""
    return ByT5Tokenizer(extra_ids=0, bos_token="<pad>"), -1


def owners(tokenizer, text, ids, which):
    """Return which token each character of a text belongs to, by what each token stands for."""
    if isinstance(tokenizer, ByT5Tokenizer):
        sizes = [0 if token < 3 else 1 for token in ids]
    elif tokenizer.unk_token is None:
        special = set(tokenizer.all_special_tokens)
        sizes = [0 if token in special else len(token) for token in tokenizer.convert_ids_to_tokens(ids)]
    else:
        ends = [end for _, end in tokenizer(text, return_offsets_mapping=True).offset_mapping]
        sizes = [len(text[a:b].encode()) for a, b in pairwise([0, *ends])]
    of_bytes = [token for token, size in enumerate(sizes) for _ in range(size)]
    first = list(accumulate((len(character.encode()) for character in text), initial=0))
    return [of_bytes[end - 1 if which else start] for start, end in pairwise(first) if end <= len(of_bytes)]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("stride", [None, 1, 5, 8, 12, 16])
@pytest.mark.parametrize("make", [byte_level, dropping_spaces, without_offsets])
def test_each_token_word_and_byte_counts_once(make, stride, bos):
    tokenizer, which = make()
    text = "  " + prose(8).replace("e", "é").replace(" ", " 🌊", 3).replace(".", ".\n ") + " \u3000漢字\u2028end "
    ids, own = tokenizer(text, add_special_tokens=not bos).input_ids, 16 - bos
    step = min(stride or own, own)
    windows = cut_for_evaluation(tokenizer, Text("t", text), 16, bos=bos, stride=stride and step)
    predicted = []
    for start, row, counted in zip(range(0, len(ids), step), windows.ids, windows.counted, strict=False):
        assert row[bos:].tolist() == ids[start : start + own]
        places = [start + place + 1 - bos for place in counted.nonzero()[:, 0].tolist()]
        assert start == 0 or min(places) >= start + own - step  # with enough context
        predicted += places
    end = (len(windows.ids) - 1) * step + own
    # Windows that do not overlap have no token before their first.
    unseen = [] if bos else range(0, end, step) if step == own else [0]
    assert predicted == [place for place in range(end) if place not in unseen]
    counted = [token in predicted for token in owners(tokenizer, text, ids, which)]
    assert windows.bytes == sum(len(c.encode()) for c, is_read in zip(text, counted, strict=False) if is_read)
    begins = [not c.isspace() and (n == 0 or text[n - 1].isspace()) for n, c in enumerate(text)]
    assert windows.words == sum(is_read for is_read, begun in zip(counted, begins, strict=False) if begun)


def test_the_limit_of_a_protocol_and_of_the_user(tokenizer):
    text = Text("t", prose(60), limit=5)
    assert len(cut_for_evaluation(tokenizer, text, 16).ids) == 5
    assert len(cut_for_evaluation(tokenizer, text, 16, most=3).ids) == 3
    # The protocol limits the tokens, so overlapping windows are more.
    assert len(cut_for_evaluation(tokenizer, text, 16, stride=8).ids) == 9


@pytest.mark.parametrize(
    ("asked", "limit", "expected"),
    [(None, 512, 512), (None, 4096, DEFAULT_LENGTH), (None, None, DEFAULT_LENGTH), (64, 64, 64)],
)
def test_the_length_is_what_is_asked_for_or_what_the_model_has(asked, limit, expected):
    model = SimpleNamespace(longest_sequence=limit, source=SimpleNamespace(id="m"))
    assert choose_length(asked, model) == expected
