"""Export a Modelfile, with which Ollama runs the pruned model under the chat template of the original."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sleb_cli.plan import CHECKPOINT_PLAN, checkpoint_name
from sleb_plugins.errors import UnsupportedModelError
from sleb_plugins.exporter import Exporter, Pruning

_LINE = r"^\s|\s$|[\n\r\t]"
"""What is not part of a name on one line."""

_STOP = _LINE + '|"'

_TEMPLATE = r'"""|\{\{|\{$'
"""What ends a template, or begins one of its actions; an action follows each of our pieces."""

MARKS = "WORDS-1", "WORDS-2", "WORDS-3"
"""Stand for messages in a chat template, to find what is between them."""


class Ollama(Exporter):
    """A Modelfile for `ollama create`."""

    name = "ollama"
    description = "a Modelfile for Ollama, with the chat template of the original"
    uses_source = True

    def export(self, pruning: Pruning) -> str:
        """Return the Modelfile, without a template if there is none or Ollama's language cannot say it.

        Raises:
            UnsupportedModelError: the model's folder or template would be read as other instructions.
        """
        import transformers

        from sleb_cli.engine.third_party import translate_transformers_errors

        with translate_transformers_errors(f"the tokenizer of {pruning.model}"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(pruning.model, revision=pruning.revision)
        template, stops = _chat(tokenizer)
        place = _inert("name", _place(pruning), _LINE)
        lines = ["# ollama create NAME -f THIS_FILE && ollama run NAME", f"FROM {place}"]
        if template:
            lines.append(f'TEMPLATE """{template}"""')
        else:
            lines.append("# No TEMPLATE: the chat template is missing, or does more than put messages in place.")
        stops = [_inert("stop token", stop, _STOP) for stop in stops]
        lines += [f'PARAMETER stop "{stop}"' for stop in stops]
        return "\n".join(lines) + "\n"


def _place(pruning: Pruning) -> str:
    """Return where `sleb apply` writes the pruned model, unless told otherwise."""
    if pruning.plan_file and pruning.plan_file.name == CHECKPOINT_PLAN:
        folder = str(pruning.plan_file.parent)
        return folder if pruning.plan_file.is_absolute() else f"./{folder}"
    is_demo = pruning.plan and pruning.plan["model"]["id"] == "demo"  # whose folder is called otherwise
    base = pruning.source_file.stem if pruning.source_file else "demo" if is_demo else Path(pruning.model).name
    name = checkpoint_name(base, pruning.blocks - len(pruning.removals))
    return f"./{name}.gguf" if pruning.source_file else f"./{name}"


def _inert(what: str, text: str, instruction: str) -> str:
    """Return a text that stands for itself in a Modelfile: no part of it matches `instruction`.

    Raises:
        UnsupportedModelError: it does not, or Ollama would drop a part, as it does with what cannot be printed.
    """
    if re.search(instruction, text) or not re.sub(r"[\n\r\t]", "", text).isprintable():
        raise UnsupportedModelError(
            f"A Modelfile cannot hold the {what} {text!r}.",
            hint="Rename the folder or file, or write the Modelfile by hand.",
        )
    return text


def _chat(tokenizer: Any) -> tuple[str, list[str]]:
    """Return the template in Ollama's language, empty if it cannot say it, and what ends an answer.

    A conversation is the opening, with or without a system prompt, and then in turn the user's words, what opens an
    answer, the answer, and what follows it up to the next user's words.
    """
    user, answer, later = MARKS
    turns = [("user", user), ("assistant", answer), ("user", later)]
    alone, talk = _pieces(tokenizer, turns[:1]), _pieces(tokenizer, turns)
    if not alone or not talk:
        return "", []
    opening, opens_answer = alone
    # Some templates write a space before an answer that is there, and none where the model is to write one.
    if talk[0] != opening or talk[3] != opens_answer or not talk[1].startswith(opens_answer):
        return "", []
    space, after_answer = talk[1].removeprefix(opens_answer), talk[2]
    if led := _pieces(tokenizer, [("system", answer), *turns[:1]]):
        if led[2] != opens_answer:
            return "", []
        begin = f"{{{{ if .System }}}}{led[0]}{{{{ .System }}}}{led[1]}{{{{ else }}}}{opening}{{{{ end }}}}"
    else:  # as templates do that put it before the first user's words
        begin = f"{opening}{{{{ if .System }}}}{{{{ .System }}}}\n\n{{{{ end }}}}"
    messages = (
        f'{{{{ range .Messages }}}}{{{{ if eq .Role "user" }}}}{{{{ .Content }}}}{opens_answer}'
        f'{{{{ else if eq .Role "assistant" }}}}{space}{{{{ .Content }}}}{after_answer}{{{{ end }}}}{{{{ end }}}}'
    )
    special = [token.content for token in tokenizer.added_tokens_decoder.values()]
    ends = [token for token in special if after_answer.lstrip().startswith(token)]
    return begin + messages, ends


def _pieces(tokenizer: Any, messages: Sequence[tuple[str, str]]) -> list[str] | None:
    """Return what a template puts around these messages, without a BOS that Ollama adds; None if it refuses them."""
    from sleb_cli.engine.text.windows import adds_bos

    conversation = [{"role": role, "content": words} for role, words in messages]
    try:
        whole = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    except Exception:  # a template may raise what it likes
        return None
    found = list[str]()
    for _, words in messages:
        before, mark, whole = whole.partition(words)
        if not mark:
            return None
        found.append(before)
    begin = found[0].removeprefix(tokenizer.bos_token if adds_bos(tokenizer) else "")
    return [_inert("chat template's", piece, _TEMPLATE) for piece in (begin, *found[1:], whole)]
