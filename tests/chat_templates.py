"""Published chat templates, in short, and what they make of a conversation and its thoughts.

What the model writes of a text stands in ⟦⟧.
"""

import re
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from conftest import train_tokenizer

CONTENT = "{% set words = m.content.split('</think>')[-1].lstrip('\\n') %}"
IM_START = (
    "{% for m in messages %}{% if m.role != 'assistant' %}"
    "<|im_start|>{{ m.role + '\n' + m.content }}<|im_end|>\n"
)
QWEN3 = (
    "{% set ns = namespace(query=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set "
    "ns.query = loop.index0 %}"
    "{% endif %}{% endfor %}"
    + IM_START
    + "{% else %}"
    + CONTENT
    + "{% set thought = m.reasoning_content or '' %}"
    "{% if '</think>' in m.content %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}{% endif "
    "%}"
    "<|im_start|>assistant\n{% if loop.index0 > ns.query %}<think>\n{{ thought.strip('\\n') "
    "}}\n</think>\n\n{% endif %}"
    "{{ words }}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt "
    "%}<|im_start|>assistant\nOPEN{% endif %}"
)
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}{% "
    "endfor %}"
    "{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}{% elif m.role == "
    "'assistant' %}"
    "<｜Assistant｜>{{ m.content.split('</think>')[-1] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
)
GPT_OSS = (
    "<|start|>system<|message|>Current date: {{ strftime_now('%Y-%m-%d') }}<|end|>"
    "{% for m in messages %}{% if m.role == 'system' %}<|start|>developer<|message|>{{ m.content "
    "}}<|end|>"
    "{% elif m.role == 'user' %}<|start|>user<|message|>{{ m.content }}<|end|>"
    "{% elif '<|channel|>' in m.content %}{{ raise_exception('channels in the content') }}"
    "{% elif loop.last and not add_generation_prompt %}{% if 'thinking' in m %}"
    "<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|return|>"
    "{% else %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>{% endif %}{% "
    "endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
GEMMA3 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content + "
    "'\n\n' %}"
    "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must "
    "alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ system if loop.first }}"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt "
    "%}<start_of_turn>model\n{% endif %}"
)
PHI4 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}"
)
PHI4_MINI = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}"
)
MISTRAL = (  # the system's words are in the last question
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content + "
    "'\n\n' %}"
    "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}{% if m.role == 'user' "
    "%}[INST] "
    "{{ system if loop.index0 >= (messages | length) - 2 }}{{ m.content }}[/INST]{% else %} {{ "
    "m.content }} </s>"
    "{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Published:
    """A template, and turns as it writes them.

    `earlier` is a turn with more after it, `last` the last one; `thinking` is the last one with a
    thought in the field for it, and `inside` with the thought in the answer's content. The template
    needs the tokens `special`, and those `added`, which are no special ones. `written` is an answer
    with a thought as a model writes it.
    """

    text: str
    opening: str
    earlier: str
    last: str
    thinking: str
    inside: str
    special: tuple[str, ...]
    added: tuple[str, ...] = ("<think>", "</think>")

    @property
    def written(self) -> str:
        for text in (self.thinking, self.inside):
            answer = re.search("⟦(.*)⟧", text, re.DOTALL)[1]
            if "river" in answer:
                break
        if self.text == R1:  # which cuts the thought
            return "river\n</think>\n\nfield</s>"
        return answer.replace("<|end|></s>", "<|end|>")  # the template adds the end of the text

    def make_tokenizer(self) -> PreTrainedTokenizerFast:
        tokenizer = train_tokenizer(bos=True)
        tokenizer.chat_template = self.text
        tokenizer.add_special_tokens({"extra_special_tokens": [*self.special]})
        tokenizer.add_tokens([*self.added])
        return tokenizer


def tokens_of(tokenizer, text):
    """Return the tokens of a text, and whether they stand in brackets."""
    tokens = []
    for at, piece in enumerate(re.split("[⟦⟧]", text)):
        ids = tokenizer(piece, add_special_tokens=False).input_ids
        tokens += [(token, at % 2 == 1) for token in ids]
    return tokens


THOUGHT = "<think>\nriver\n</think>\n\n"
IM = "<|im_start|>", "<|im_end|>"
CHAT_ML = "<|im_start|>system\nstone<|im_end|>\n"
IM_EARLIER = "<|im_start|>user\nsnow<|im_end|>\n<|im_start|>assistant\n⟦bridge<|im_end|>⟧\n"
IM_LAST = "<|im_start|>user\nmill<|im_end|>\n<|im_start|>assistant\n"
R1_LAST = "<｜User｜>mill<｜Assistant｜>⟦field</s>⟧"
OSS_LAST = "<|start|>user<|message|>mill<|end|><|start|>assistant"
GEMMA3_LAST = "<start_of_turn>user\nmill<end_of_turn>\n<start_of_turn>model\n"
PHI4_LAST = "<|im_start|>user<|im_sep|>mill<|im_end|><|im_start|>assistant<|im_sep|>"
MINI_LAST = "<|user|>mill<|end|><|assistant|>"

PUBLISHED = {
    "qwen3": Published(
        QWEN3.replace("OPEN", ""), CHAT_ML, IM_EARLIER,
        IM_LAST + "<think>\n\n</think>\n\n⟦field<|im_end|>⟧\n",
        *[IM_LAST + f"⟦{THOUGHT}field<|im_end|>⟧\n"] * 2, IM,
    ),
    "qwen3-thinking": Published(
        QWEN3.replace("OPEN", "<think>\n"), CHAT_ML, IM_EARLIER,
        IM_LAST + "<think>\n\n</think>\n\n⟦field<|im_end|>⟧\n",
        *[IM_LAST + "<think>\n⟦river\n</think>\n\nfield<|im_end|>⟧\n"] * 2, IM,
    ),
    "r1": Published(
        R1, "<s>stone", "<｜User｜>snow<｜Assistant｜>⟦bridge</s>⟧", R1_LAST, R1_LAST,
        R1_LAST.replace("field", "\n\nfield"), (),
        ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"),
    ),
    "gpt-oss": Published(
        GPT_OSS, "<|start|>system<|message|>Current date: "
                 "2025-01-01<|end|><|start|>developer<|message|>stone<|end|>",
        OSS_LAST.replace("mill", "snow") + "<|channel|>final<|message|>⟦bridge<|end|>⟧",
        OSS_LAST + "<|channel|>final<|message|>⟦field<|return|>⟧",
        OSS_LAST + "⟦<|channel|>analysis<|message|>river<|end|><|start|>assistant"
                   "<|channel|>final<|message|>field<|return|>⟧",
        OSS_LAST + f"⟦<|channel|>final<|message|>{THOUGHT}field<|return|>⟧",
        ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>"), (),
    ),
    "gemma3": Published(
        GEMMA3, "<s>",
        "<start_of_turn>user\nsnow<end_of_turn>\n<start_of_turn>model\n⟦bridge<end_of_turn>⟧\n",
        *[GEMMA3_LAST + "⟦field<end_of_turn>⟧\n"] * 2,
        GEMMA3_LAST + f"⟦{THOUGHT}field<end_of_turn>⟧\n", ("<start_of_turn>", "<end_of_turn>"), (),
    ),
    "phi4": Published(
        PHI4, "<|im_start|>system<|im_sep|>stone<|im_end|>",
        PHI4_LAST.replace("mill", "snow") + "⟦bridge<|im_end|>⟧",
        *[PHI4_LAST + "⟦field<|im_end|>⟧"] * 2,
        PHI4_LAST + f"⟦{THOUGHT}field<|im_end|>⟧", (*IM, "<|im_sep|>"),
    ),
    "phi4-mini": Published(
        PHI4_MINI, "<|system|>stone<|end|>", "<|user|>snow<|end|><|assistant|>⟦bridge<|end|>⟧",
        *[MINI_LAST + "⟦field<|end|></s>⟧"] * 2, MINI_LAST + f"⟦{THOUGHT}field<|end|></s>⟧",
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), (),
    ),
    "mistral": Published(
        MISTRAL, "<s>", "[INST] snow[/INST]⟦ bridge </s>⟧", *["[INST] stone\n\nmill[/INST]⟦ field "
                                                              "</s>⟧"] * 2,
        f"[INST] stone\n\nmill[/INST]⟦ {THOUGHT}field </s>⟧", ("[INST]", "[/INST]"), (),
    ),
}  # fmt: skip

PUBLISHED_TOKENIZERS = {name: template.make_tokenizer() for name, template in PUBLISHED.items()}
