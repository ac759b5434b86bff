"""The kinds of text, and the one place where a name becomes a text."""

from pathlib import Path

from sleb_cli.texts.data_set import C4, WIKITEXT2, DataSet, ReferenceText, WebPages, WikiText2
from sleb_cli.texts.local_file import SUFFIXES, LocalFile
from sleb_cli.texts.source import PARAGRAPHS, TextSource
from sleb_cli.texts.written import ANSWERS, SELF, SELF_CHAT, Answers, OwnChat, OwnText

NAMED = {
    source.name: source
    for source in (
        WikiText2("wikitext2"),
        WebPages("c4"),
        ReferenceText("wikitext2-sleb", WIKITEXT2, PARAGRAPHS),
        ReferenceText("c4-sleb", C4, " "),
        OwnText(SELF),
        OwnChat(SELF_CHAT),
    )
}
"""The texts of one name."""


def text_source(name: str) -> TextSource:
    """Return the source of this name; what is of no other kind is taken for a data set."""
    if name in NAMED:
        return NAMED[name]
    if name.startswith(ANSWERS):
        return Answers(name)
    path = Path(name)
    if path.exists() or path.suffix in SUFFIXES or name.startswith((".", "/", "~")):
        return LocalFile(name)
    return DataSet(name)


def is_written(name: str) -> bool:
    """Whether the model writes the text of this name."""
    return text_source(name).is_written


def writes_conversations(name: str) -> bool:
    """Whether the model writes conversations for the text of this name."""
    source = text_source(name)
    return source.is_written and source.holds_conversations


def is_reference(name: str) -> bool:
    """Whether the text of this name is drawn as in the reference implementation."""
    return text_source(name).is_reference
