"""Every option of every command has help, is in the reference, and is accepted by a run."""

import re
import shutil
from pathlib import Path

import pytest
from typer.main import get_command

from conftest import calibration, write_task
from gguf_models import convert_llama
from sleb_cli.app import app

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = get_command(app).commands
WINDOWS = "--sequence-length 16 --max-windows 2"
SHAPE = "--prompt-length 4 --iterations 1 --warmup 0"
RUNS = {
    "search": [
        "MODEL --remove 1 TEXT --sequence-length 16 --seed 1 --device cpu --dtype float32 --batch-size 2 --memory 1GB "
        "--no-stream --protect-first 1 --protect-last 1 --protect 2 --metric cosine --strategy greedy --holdout 0.5 "
        "--sample-tokens 2 --trust-remote-code --no-fast --quiet",
        "MODEL --ratio 0.3 TEXT --fast --stream --resume -o new.json --force --json",
        "MODEL --remove 3 --extend PLAN --force",
        "MODEL --remove 1 TEXT --compare nll,cosine --device-map auto --force",
        "MODEL --target-params 70k TEXT --force",
        "MODEL --target-memory 250kB --serve-length 8 TEXT --force",
        "MODEL --max-perplexity-ratio 9 TEXT --force",
    ],
    "apply": [
        "PLAN --remove 1 --dtype bfloat16 --max-shard-size 40kB --keep-failed failed --device-map auto --json",
        "PLAN --model MODEL --any-model --no-verify --stream -o new --trust-remote-code --quiet",
        "PLAN --recover TEXT --sequence-length 16 --seed 1 --device cpu --no-stream --force",
        "MODEL --blocks 1 --heal --heal-minutes 0.01 TEXT --sequence-length 16 -o healed",
        "MODEL --blocks 1 --heal --heal-tokens 64 TEXT --sequence-length 16 -o tokens",
        "PLAN --source GGUF -o small.gguf",
    ],
    "eval": [
        f"PLAN --remove 1,2 --perplexity FILE {WINDOWS} --bos --stream --dtype float32 --device cpu -o new.json --json",
        f"PLAN --model MODEL --any-model --every 1 --perplexity FILE {WINDOWS} --no-stream --trust-remote-code --force",
        f"MODEL --blocks 1 --perplexity FILE {WINDOWS} --device-map auto --batch-size 2 -q",
        "CHAT --tasks mine --include-path tasks --limit 4 --num-fewshot 1 --show-flips 2 --apply-chat-template",
    ],
    "bench": [
        f"PLAN --remove 1,2 --prompt {SHAPE} --batch-size 1 --threads 1 --dtype float32 --device cpu -o new.json",
        f"PLAN --model MODEL --any-model --every 1 --generation {SHAPE} --new-tokens 2 --engine transformers",
        "MODEL --blocks 1 --trust-remote-code --sweep new=2,3 --prompt-length 4 --iterations 1 --quiet --json --force",
    ],
    "export": [
        "PLAN --to indices --remove 1 --json",
        "PLAN --to llama-quantize --source GGUF -o command.txt --force",
        "PLAN --model MODEL --any-model --to mergekit --trust-remote-code --quiet",
        "MODEL --blocks 1 --to indices",
    ],
    "plugins": ["--json"],
}  # fmt: skip
"""Runs by command that together take every option, but for those of the next table."""
ELSEWHERE = {
    "--chat": "cli/test_chat_model.py", "--compile": "cli/test_bench.py",
    "--config": "cli/test_config_file.py", "--protect-kind": "cli/test_per_block_configs.py",
    "--revision": "cli/test_models.py", "--run-code": "cli/test_eval.py", "--scripts": "cli/test_vocabulary.py",
    "--source": "cli/test_bench_engines.py",
    "--target-speedup": "cli/test_how_far.py",
}  # fmt: skip


@pytest.mark.parametrize("command", RUNS)
def test_every_option_has_help_is_in_the_reference_and_is_run_somewhere(command):
    page = (ROOT / "docs" / "reference" / "commands.md").read_text()
    words = " ".join(RUNS[command]).replace("TEXT", " ".join(map(str, calibration("")))).split()
    options = [each for each in COMMANDS[command].params if each.opts[0].startswith("-")]
    names = [name for each in options for name in (*each.opts, *each.secondary_opts)]
    assert [each.opts for each in options if not each.help] == []
    assert [name for name in names if not re.search(rf"(?<!\S){name}\b", page)] == []
    for name, file in ELSEWHERE.items():
        assert name in (ROOT / "tests" / file).read_text()
    assert [each.opts for each in options if not {*each.opts} & {*words, *ELSEWHERE}] == []


@pytest.fixture
def run(run_sleb, tiny_llama, llama_plan, text_file, tmp_path):
    rows = [{"q": f"item {number}", "choices": ["yes", "no"], "gold": number % 2} for number in range(6)]
    write_task(tmp_path / "tasks", "mine", rows, fewshot_split="test")
    given = {"MODEL": [tiny_llama], "PLAN": [llama_plan], "FILE": [text_file], "TEXT": calibration(text_file, 8, 16)}

    def run(command, words):
        if "CHAT" in words:
            given["CHAT"] = [shutil.copytree(tiny_llama, tmp_path / "chat")]
            template = "{% for message in messages %}<{{ message.role }}>{{ message.content }}</s>{% endfor %}"
            (tmp_path / "chat" / "chat_template.jinja").write_text(template)
        if "GGUF" in words:
            given["GGUF"] = [convert_llama(tiny_llama, tmp_path / "whole.gguf")]
        return run_sleb(command, *(part for word in words.split() for part in given.get(word, [word])))

    return run


@pytest.mark.usefixtures("without_memory")
@pytest.mark.parametrize(("command", "words"), [(name, words) for name, runs in RUNS.items() for words in runs])
def test_options_are_accepted(run, command, words):
    result = run(command, words)
    assert result.exit_code == 0, result.stderr
