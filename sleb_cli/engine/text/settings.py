"""Which text to calibrate on, and how much of it?"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from sleb_cli.checks.mixture import divide, parse_mixture
from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.text.passages import TextShape, shape_of
from sleb_cli.engine.text.windows import choose_length
from sleb_cli.requests import (
    DEFAULT_CALIBRATION,
    DEFAULT_LENGTH,
    DEFAULT_SAMPLES,
    DEFAULT_TEXTS,
    DEMO,
    DEMO_CALIBRATION,
    DEMO_LENGTH,
    DEMO_SAMPLES,
    Chat,
)
from sleb_cli.texts.data_set import REFERENCE_ROWS
from sleb_cli.texts.named import is_reference, is_written, text_source
from sleb_cli.texts.source import WHOLE, TextSource, TextSplit
from sleb_plugins import UsageError


@dataclass(frozen=True)
class CalibrationSettings:
    """A request for calibration text with every option set.

    `shares` are by source. `samples` counts the sequences of all sources together; for a reference
    preset, it counts rows of text. Sequences are drawn from the part `split` of each source.
    Without `length_given`, sequences are shorter if the text has none of `sequence_length` tokens.
    `writer` identifies the model in the cache of the text that it writes (None: no cache). With
    `own_answers` and no `chat`, only its answers count in conversations that it writes. `shape` is
    how texts become sequences of a model that reads, each of its own length.
    """

    source: str
    shares: Mapping[str, Fraction]
    samples: int
    sequence_length: int
    seed: int
    chat: Chat | None
    samples_given: bool
    length_given: bool
    split: TextSplit = WHOLE
    writer: str | None = None
    own_answers: bool = False
    shape: TextShape | None = None

    @property
    def counts(self) -> dict[str, int]:
        """Samples by source."""
        return dict(zip(self.shares, divide(self.samples, list(self.shares.values())), strict=True))

    @property
    def given_counts(self) -> dict[str, int]:
        """Samples by source, without sources that have none or that the model writes."""
        counts = {}
        for source, count in self.counts.items():
            if count and not is_written(source):
                counts[source] = count
        return counts

    @property
    def is_reference(self) -> bool:
        """Whether the text is drawn as the reference implementation does."""
        return any(map(is_reference, self.shares))


def resolve_calibration(
    architecture: Architecture,
    source: str | None = None,
    samples: int | None = None,
    sequence_length: int | None = None,
    seed: int | None = None,
    chat: Chat | None = None,
    prompt: str | None = None,
) -> CalibrationSettings:
    """Resolve the settings; None stands for a default.

    Of texts that are conversations, the answers count unless `chat` says otherwise.

    Raises:
        DataError: prompts that the model is to answer are missing.
        UsageError: the samples, their length or the mixture are invalid, or no source holds the
            conversations.
    """
    usual, default, length = DEFAULT_CALIBRATION, DEFAULT_SAMPLES, DEFAULT_LENGTH
    if architecture.source.id == DEMO:
        usual, default, length = DEMO_CALIBRATION, DEMO_SAMPLES, DEMO_LENGTH
    if architecture.reading:
        default = DEFAULT_TEXTS
    source = source or usual
    shares = parse_mixture(source)
    sources = [text_source(name) for name in shares]
    if chat is not None and not any(text.holds_conversations for text in sources):
        raise UsageError(
            f"{source} is plain text, but --chat needs conversations.",
            hint="Leave out --chat, or name self-chat, or a .jsonl file or data set with "
            '"messages": lists of role and content.',
        )
    if chat is None and not architecture.reading:
        chat = _chat_of(sources)
    for text in sources:
        text.prompts()  # missing prompts are found before a model is loaded
    if any(text.is_reference for text in sources):
        default = REFERENCE_ROWS
    length = choose_length(sequence_length, architecture, length)
    shape = shape_of(architecture, length, prompt)
    if shape is not None:
        _require_readable(sources, chat)
    settings = CalibrationSettings(
        source=source,
        shares=shares,
        samples=samples or default,
        sequence_length=length,
        seed=seed or 0,
        chat=chat,
        samples_given=samples is not None,
        length_given=sequence_length is not None,
        writer=architecture.source.content_hash,
        shape=shape,
    )
    if len(shares) > 1:
        require_mixable(settings, shares)
    return settings


def _chat_of(sources: Sequence[TextSource]) -> Chat | None:
    return "answers" if any(source.is_conversations for source in sources) else None


def _require_readable(sources: Sequence[TextSource], chat: Chat | None) -> None:
    """Raise a UsageError for a text that a model which only reads has no use for."""
    if chat is not None:
        raise UsageError(
            "--chat is for language models; this model reads single texts.",
            hint="Leave out --chat.",
        )
    for source in sources:
        if source.is_written or source.is_reference:
            why = "this model writes none" if source.is_written else "it is one running text"
            raise UsageError(
                f"{source.name} is no text for a model that only reads: {why}.",
                hint="Name a .jsonl file of texts such as it will read, or wikitext2.",
            )


def require_mixable(settings: CalibrationSettings, needed: Collection[str]) -> None:
    """Raise a UsageError unless sources can be mixed, and each that is `needed` has a sequence."""
    for source, count in settings.counts.items():
        if is_reference(source):
            raise UsageError(
                f"{source} cannot be mixed: it is drawn as in the reference implementation.",
                hint=f"Mix {text_source(source).in_windows} instead, which is cut into windows.",
            )
        if source in needed and not count:
            raise UsageError(
                f"Too few sequences ({settings.samples}) for {settings.source!r}: none would be "
                f"from {source}.",
                hint="Increase --samples or the share.",
            )


def require_given_text(settings: CalibrationSettings) -> None:
    """Raise a UsageError if a streamed model would have to write its text."""
    if any(map(is_written, settings.shares)):
        raise UsageError(
            "A streamed model cannot write its own text: each token would read all of its weights.",
            hint="Use --calibration wikitext2, or a file.",
        )
