"""Texts that the model writes itself; `engine/text/` has it write them."""

from pathlib import Path

from sleb_cli.texts.local_file import read_file, require_file, take_split
from sleb_cli.texts.messages import Prompt, parse_lines
from sleb_cli.texts.source import WHOLE, Conversation, TextSource, TextSplit

SELF = "self"
SELF_CHAT = "self-chat"
ANSWERS = "answers:"


class OwnText(TextSource):
    """Text that the model writes from nothing."""

    is_written = True


class OwnChat(TextSource):
    """Conversations of which the model writes both sides."""

    is_written = True
    holds_conversations = True


class Answers(OwnChat):
    """`answers:FILE`: the model's answers to the prompts in a file.

    The file has a prompt in each line of text, or in the `prompt` or the `messages` of each line of
    JSON.
    """

    has_prompts = True

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.file = name.removeprefix(ANSWERS)

    def require(self) -> None:
        """Raise a DataError unless the file of prompts is there."""
        require_file(self.file)

    def prompts(self, split: TextSplit = WHOLE) -> list[Conversation]:
        """Read the prompts in this part of the file."""
        content = read_file(self.file or self.name)
        if Path(self.file).suffix == ".jsonl":
            prompts = [line.conversation for line in parse_lines(self.file, content, Prompt)]
        else:
            lines = [line.strip() for line in content.splitlines()]
            prompts = [[{"role": "user", "content": line}] for line in lines if line]
        return take_split(prompts, split, self.file, "prompt")
