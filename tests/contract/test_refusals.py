"""What commands refuse, through `main()`: each row of the table of clashes, and what is wrong with
one option.

A refusal of any room is a row here, with its exit code and a part of what is said: of `FIRST` if it
comes before torch is imported, else of `SECOND`. Tests of rooms need not repeat it.
"""

import json
import os
import subprocess
import sys
from dataclasses import MISSING, fields
from itertools import product
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import lm_eval
import pytest

from conftest import save_model
from families import experts_config, tiny_config
from sleb_cli import requests
from sleb_cli.checks.clashes import CLASHES, Clash

COMMANDS = {
    name: getattr(requests, f"{name.capitalize()}Request")
    for name in "search apply eval bench export".split()
}


def typed(request, option):
    """Return an option with some value, as on the command line."""
    name, _, value = option.partition("=")
    flag = requests.option_of(name)
    kind = requests.kinds_of(get_type_hints(request)[name])[0]
    if kind is bool:
        return requests.option_of(f"no_{name}") if value == "False" else flag
    if get_origin(kind) is Literal:
        return f"{flag} {get_args(kind)[-1]}"
    return f"{flag} {value.replace('*', 'x') or 3}"


def clashing():
    """Return a command for each way in which a row forbids it, and what is said of it."""
    commands = []
    for row, (command, request) in product(CLASHES, COMMANDS.items()):
        if not issubclass(request, row.request_type):
            continue
        if isinstance(row, Clash):
            others = row.others.split()
            says = "cannot be combined: "
        else:
            others = [row.beside]
            says = "requires "
        names = {field.name for field in fields(request)}
        for one, other in product(row.options.split(), others):
            pair = [each for each in (one, other) if each]
            is_there = names.issuperset(each.partition("=")[0] for each in pair)
            if one != other and is_there:
                options = " ".join(typed(request, each) for each in pair)
                commands.append((f"{command} no/model {options}", 2, says))
    return commands


NO_MODEL = {
    "org/none": "neither a local folder nor in the cache",
    "taken": "taken has no config.json",
    "adapter": "is a PEFT adapter for org/base, not a whole model",
    "bare": "has no weights: no model.safetensors",
    "lacking": "lacks 1 of its 1 weight files, such as a.safetensors",
    "linked": "links to a file outside the model's folder",
    "piped": "is a pipe or a device, not a file",
    "none.gguf": "There is no folder or file none.gguf",
    "./none": "There is no folder or file ./none",
    "bad.gguf": "bad.gguf is truncated, or is not a GGUF file",
}
"""What is no model, or not all of one, and what is said of it."""

ON_MODELS = (
    "search {} --remove 1",
    "apply {} --blocks 1",
    "eval {}",
    "bench {}",
    "export {} --blocks 1 --to mergekit",
)
OF_NO_MODEL = [
    (command.format(model), 4, says)
    for command, (model, says) in product(ON_MODELS, NO_MODEL.items())
]

FIRST = [
    *OF_NO_MODEL,
    *clashing(),
    ("search taken/short.txt --remove 1", 4, "is a file, not a model"),
    ("search MODEL --remove 1 --revision main", 2, "--revision does not apply"),
    ("search elsewhere --remove 1 --trust-remote-code", 4, "code of another repository, org/code"),
    ("search no/model --remove 1 --metric energy", 2, "energy does not score blocks"),
    ("search no/model --remove 1 --calibration self:0.5,c4", 2, "c4 has no share in the mixture"),
    ("search no/model --remove 1 --calibration c4:0.5,c4:0.5", 2, "names c4 twice"),
    ("search no/model --remove 1 -o half.json", 8, "holds an unfinished search"),
    ("apply bad.gguf --blocks 1 -o bad.gguf", 8, "is the source file itself"),
    ("apply nameless.json", 3, "was made for tiny, and does not say where that is"),
    ("apply experts.json --recover", 2, "does not apply to experts.json, a plan that"),
    ("apply experts.json --remove 1", 2, "has 2 groups of experts"),
    ("export experts.json --to mergekit", 2, "describes a removal of blocks"),
    ("eval experts.json --experts-per-token 1", 2, "--experts-per-token does not apply to"),
    ("apply experts.json --heal --stream", 2, "cannot be combined: healing trains"),
    ("apply experts.json --device-map auto", 2, "--device-map does not apply"),
    ("export experts.json --to indices", 2, "removes experts"),
    ("export experts.json --to llama-quantize", 2, "removes experts"),
    ("search demo --config nowhere.yaml", 2, "There is no file nowhere.yaml"),
    ("search demo --config /dev/zero", 2, "it is a pipe or a device"),
    ("search --config nowhere.json", 3, "There is no plan nowhere.json"),
    ("search no/model --remove 1 --protect x", 2, "--protect 'x' is not a list of numbers"),
    ("apply PLAN --tasks piqa", 2, "--tasks is an option of `sleb eval`."),
    ("eval no/model --experts-per-token 0", 2, "is too small"),
    ("eval PLAN --remove 0,1", 2, "Cannot remove 0 blocks"),
    ("search no/model", 2, "No target given: one of --ratio, --remove, --target-params"),
    ("search no/model --ratio 20%x", 2, "The ratio 20%x is not between 0 and 1"),
    ("search no/model --ratio 120%", 2, "The ratio 120% is not between 0 and 1"),
    ("search no/model --target-params 1X", 2, "--target-params 1X is not a number of parameters"),
    ("search no/model --max-perplexity-ratio 0.9", 2, "not a number of 1 or more"),
    ("search no/model --remove 1 --metric nl", 2, "Unknown metric 'nl'"),
    ("search no/model --remove 1 --strategy gredy", 2, "Did you mean 'greedy'?"),
    ("search no/model --remove 1 --dtype int3", 2, "Unknown data type 'int3'"),
    ("search no/model --remove 1 --memory lots", 2, "--memory lots is not a size"),
    ("search no/model --remove 1 --metric cosine --fast", 2, "--fast does not apply to cosine"),
    ("search no/model --remove 1 --strategy oneshot --fast", 2, "--fast does not apply to"),
    ("search no/model --remove 1 --strategy refine --metric cosine", 2, "cosine scores single"),
    ("search no/model --remove 1 --extend PLAN --strategy refine", 2, "--strategy greedy only"),
    ("search --remove 1 --extend nameless.json", 3, "does not say where that is"),
    ("search --extend PLAN --ratio 0.9", 2, "At most 4 blocks can be removed from"),
    ("search no/model --remove 1 --extend nowhere.json", 3, "no plan nowhere.json"),
    ("search no/model --remove 1 -o no/plan.json", 8, "folder does not exist"),
    ("search no/model --remove 1 -o PLAN", 8, "already exists"),
    ("search /no/model --remove 1 -o PLAN", 4, "There is no folder or file /no/model"),
    ("search no/model --remove 1 --holdout 1", 2, "--holdout 1 is too large"),
    ("search no/model --remove 1 --calibration nowhere.txt", 5, "no file nowhere.txt"),
    ("search no/model --remove 1 --calibration answers:nowhere:0.5,self:0.5", 5, "no file nowhere"),
    ("search no/model --remove 1 --calibration self:0.5,c4:0.4", 2, "sum to 0.9, not to 1"),
    ("search no/model --remove 1 --calibration=", 2, "--calibration has an empty value"),
    ("apply nowhere.json", 3, "no plan nowhere.json"),
    *(
        (f"{command} nowhere{ending}", 3, f"There is no plan nowhere{ending}.")
        for command in ("apply", "export --to mergekit", "export --to report")
        for ending in ("", ".gguf", ".jsn")
    ),
    ("apply no/model --blocks 1 --model other", 2, "--model applies to a plan"),
    ("apply no/model --blocks 1 --dtype int3", 2, "Unknown data type 'int3'"),
    ("apply no/model --blocks 1 --max-shard-size lots", 2, "--max-shard-size lots is not a size"),
    ("apply no/model --blocks 1 -o taken", 8, "already exists"),
    ("apply no/model --blocks 1 -o taken --force", 8, "is not a checkpoint"),
    ("apply no/model --blocks 1 --keep-failed taken", 8, "already exists"),
    ("apply no/model --blocks 1 --heal --heal-minutes 0", 2, "--heal-minutes 0 is too small"),
    ("apply no/model --blocks 1 --recover --calibration nowhere.txt", 5, "no file nowhere.txt"),
    ("apply PLAN --blocks 1", 2, "is a plan with its own blocks"),
    ("apply PLAN --remove 3", 2, "names 2"),
    ("apply PLAN -o out.gguf", 2, "can only be made from a GGUF file of the model"),
    ("apply PLAN --source no.gguf -o out", 2, "does not end in .gguf"),
    ("apply no/model --blocks", 2, "requires an argument"),
    ("apply no/model --blocks 9-5", 2, "The range 9-5 counts down."),
    ("apply no/model --blocks 5-", 2, "not a list of numbers"),
    ("eval PLAN --remove 1-99999999999999999999", 2, "has more than 4,096 numbers"),
    ("eval PLAN --remove 1-999999999", 2, "has more than 4,096 numbers"),
    ("apply no/model --blocks 1,x", 2, "not a list of numbers"),
    ("apply no/model --blocks 1,2 --remove 3", 2, "Cannot remove 3 blocks: --blocks names 2"),
    ("apply no/model --blocks 1 --source x.gguf -o no/out.gguf", 8, "folder does not exist"),
    ("eval no/model --batch-size many", 2, "--batch-size many"),
    ("eval no/model --every 1", 2, "needs a plan or --blocks"),
    ("eval MODEL --remove 1", 2, "Name its plan, llama-plan.json, or use --blocks"),
    ("apply bad.gguf", 2, "Name its plan, of-gguf.json, or use --blocks"),
    ("apply bare", 2, "Name a plan, which `sleb search bare --ratio 0.2` writes, or use --blocks"),
    ("eval no/model --blocks 1,2,3 --remove 2,4", 2, "Use --remove 1 to 3"),
    ("eval PLAN --remove 0", 2, "Use --remove 1 to 2"),
    ("eval PLAN --perplexity TEXT,", 2, "--perplexity has an empty value"),
    ("eval PLAN --perplexity nowhere.txt", 5, "no file nowhere.txt"),
    ("eval PLAN --tasks piqa --include-path nowhere", 5, "no folder nowhere"),
    ("eval PLAN -o PLAN", 8, "already exists"),
    ("bench no/model --sweep prompts=8", 2, "--sweep cannot vary 'prompts'"),
    ("bench no/model --sweep batch=one", 2, "'batch=one' is not a name and a list of numbers"),
    ("bench no/model --sweep batch=0", 2, "--batch-size 0 is too small"),
    ("bench no/model --sweep batch=1 --batch-size 2", 2, "and so does --batch-size"),
    ("bench no/model --sweep batch=1 --sweep batch=2", 2, "--sweep sets batch twice"),
    ("bench no/model --engine lama.cpp", 2, "Did you mean 'llama.cpp'?"),
    ("bench no/model --engine llama.cpp --dtype float32", 2, "--dtype does not apply to"),
    ("bench no/model --engine vllm --source x.gguf", 2, "--source does not apply to"),
    ("export no/model --blocks 1 --to gguf", 2, "`sleb apply` writes GGUF files."),
    ("export no/model --blocks 1 --to ollama", 2, "`FROM ./model.gguf`"),
    ("export no/model --blocks 1 --to mergekit -o PLAN", 8, "already exists"),
    ("export PLAN --to tabel", 2, "Did you mean 'table'?"),
    ("export PLAN --to csv", 2, "Use table"),
    ("export PLAN --to table -o table.html", 2, "A table cannot be table.html"),
    ("export PLAN no/plan.json --to table", 3, "no plan no/plan.json"),
    ("export PLAN PLAN --to indices", 2, "--to indices describes one plan, not 2"),
    ("export PLAN --to indices --source x.gguf", 2, "--source does not apply to --to indices"),
    ("export no/model --blocks 1 --to report", 2, "describes a plan"),
    ("search MODEL --remove 1 --calibration wikitext3", 5, "Unknown text source 'wikitext3'"),
    ("search MODEL --ratio 0.9", 2, "At most 4 blocks can be removed"),
    ("search MODEL --remove 5", 2, "which has 6; 5 were to go"),
    ("search MODEL --remove 1 --protect-first 3 --protect-last 3", 2, "At most 0 blocks"),
    ("search MODEL --remove 2 --protect 6", 2, "There is no block 6 to protect"),
    ("search MODEL --remove 2 --unit experts", 4, "nor its weights name any"),
    ("apply MODEL --blocks 1 -o no/out", 8, "folder does not exist"),
    ("apply MODEL --blocks 1 -o /proc/out", 8, "Cannot write /proc/out"),
    ("eval MODEL --perplexity self", 5, "self is text to calibrate on"),
]
"""What is answered before torch is imported: no model is looked for."""

SHORT = "--samples 4 --sequence-length 32"
SECOND = [
    (f"search MODEL --remove 0 --calibration TEXT {SHORT}", 2, "already at 6 of 6 blocks"),
    ("search MODEL --remove 1 --device gpu", 2, "Unknown device 'gpu'"),
    ("search MODEL --remove 1 --sequence-length 129", 2, "128 positions"),
    ("search MODEL --remove 1 --stream --calibration self", 2, "write its own text"),
    ("search MODEL --remove 1 --chat all --calibration TEXT", 2, "--chat needs conversations"),
    ("search MODEL --remove 2 --strategy contiguous --protect 2,3", 2, "No 2 consecutive blocks"),
    ("search MODEL --target-memory 1MB --serve-length 4096", 2, "exceeds the 128 positions"),
    ("search MODEL --remove 1 --calibration TEXT --samples 9999", 5, "text for"),
    (f"search MODEL --remove 1 --calibration TEXT {SHORT} --memory 1kB", 7, ""),
    ("search MODEL --remove 1 --calibration .", 5, "is a folder"),
    (
        f"search MODEL --remove 1 --calibration TEXT {SHORT} --samples 1 --holdout 0.2",
        2,
        "be split",
    ),
    ("search MODEL --remove 2 --protect-kind mamba", 2, "All its blocks are of one kind"),
    ("search MIXED --remove 2 --protect-kind full_atention", 2, "Did you mean 'full_attention'?"),
    ("search MIXED --remove 2 --protect-kind full_attention --protect 2", 2, "At most 1 block"),
    (f"search MIXTURE --unit experts --remove 5 --calibration TEXT {SHORT}", 2, "must stay"),
    (
        f"search MIXTURE --unit experts --target-params 10M --calibration TEXT {SHORT}",
        2,
        "The model is already at",
    ),
    ("search MIXTURE --unit experts --remove 2 --metric nll", 2, "nll does not score experts"),
    ("eval MIXTURE --experts-per-token 2", 2, "so --experts-per-token 2 spares none"),
    ("bench MIXTURE --blocks 2 --experts-per-token 1", 2, "each names what is compared"),
    ("bench MODEL --experts-per-token 1", 2, "is dense: its tokens choose no experts"),
    (f"apply MODEL --blocks 1 --recover --calibration TEXT {SHORT}", 5, "cannot be divided"),
    ("apply MODEL --blocks 1 --recover --calibration TEXT --samples 9999", 5, "text for"),
    ("apply MODEL --blocks 1 --recover --prompt query", 2, "--prompt is for embedding models"),
    ("apply MODEL --blocks 1 --recover --device cuda:77", 7, "no usable cuda:77"),
    ("apply MODEL --blocks 1,1", 2, "named twice"),
    ("apply MODEL --blocks -1", 2, "no block -1"),
    ("apply MODEL --blocks 0,1,2,3,4,5", 2, "All 6 blocks"),
    ("eval MODEL --tasks canarys", 5, "Did you mean 'canaries'?"),
    ("eval MODEL --tasks bad --include-path .", 5, "lm-eval cannot load bad"),
    ("eval MODEL --tasks sleb_sums --num-fewshot 9", 2, "sleb_sums has 8 examples, not 9"),
    ("eval MODEL --perplexity taken/short.txt", 5, "less than one sequence of 128"),
    ("eval MODEL --perplexity wikitext2", 5, "Salesforce/wikitext"),
    ("search MODEL --remove 1", 5, "`sleb search --calibration self` need no network"),
    ("eval MODEL", 5, "`sleb eval --tasks canaries` and"),
    ("eval MODEL --perplexity org/none", 5, "The data set org/none:train:text cannot be loaded"),
    ("eval MODEL --perplexity TEXT --sequence-length 999", 2, "128 positions"),
    ("bench MODEL --prompt-length 100 --new-tokens 100", 2, "exceeds the model's 128 positions"),
    ("bench MODEL --sweep prompt=8,2048", 2, "A prompt of 2048 tokens exceeds"),
]
"""What the model, the text or the machine do not allow."""


FILES = {
    "taken/short.txt": "short",
    "answers.txt": "",
    "bad.yaml": "task: bad\n",
    "bad.gguf": "GGUF",
    "half.json.journal": "",
    "adapter/adapter_config.json": '{"base_model_name_or_path": "org/base"}',
    "bare/config.json": "{}",
    "lacking/config.json": "{}",
    "lacking/model.safetensors.index.json": '{"weight_map": {"a": "a.safetensors"}}',
    "linked/config.json": "{}",
    "piped/config.json": "{}",
    "elsewhere/config.json": '{"auto_map": {"AutoConfig": "org/code--x.C"}}',
}
EXPERTS = {
    "count": 8,
    "active": 2,
    "groups": 2,
    "parameters": [9, 8],
    "active_parameters": [9, 9],
    "weights_bytes": [9, 8],
    "blocks": [{"block": 0, "removals": [0, 4], "scores": [1.0] * 8, "tokens": [1] * 8}],
    "texts": [],
}


@pytest.fixture(scope="module")
def of_kinds(tmp_path_factory):
    """Models with experts, and with blocks of two kinds."""
    folder = tmp_path_factory.mktemp("kinds")
    return {
        "MIXTURE": str(save_model(folder / "mixture", experts_config("mixtral"))),
        "MIXED": str(save_model(folder / "mixed", tiny_config("gemma3_text"))),
    }


@pytest.fixture
def words(tiny_llama, llama_plan, of_kinds, text_file, tmp_path, monkeypatch):
    """Write the files that lines name, and split a line into its words."""
    # To say that it has no such task, lm-eval reads all of them, which takes ten seconds.
    tasks = Path(lm_eval.__file__).parent / "tasks/piqa/none"
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(tasks))
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    Path("linked/tokenizer.json").symlink_to(__file__)
    os.mkfifo("piped/tokenizer.json")
    plan = json.loads(llama_plan.read_text())
    of_gguf = plan | {"model": plan["model"] | {"id": str(tmp_path / "bad.gguf")}}
    nameless = plan | {"model": plan["model"] | {"id": "tiny"}}
    in_groups = plan | {"removals": [], "steps": [], "experts": EXPERTS}
    Path("of-gguf.json").write_text(json.dumps(of_gguf))
    Path("nameless.json").write_text(json.dumps(nameless))
    Path("experts.json").write_text(json.dumps(in_groups))

    def split(line):
        line = line.replace("MODEL", str(tiny_llama)).replace("TEXT", str(text_file))
        for name, model in of_kinds.items():
            line = line.replace(name, model)
        return line.replace("PLAN", llama_plan.name).split()

    return split


@pytest.mark.parametrize(("line", "code", "says"), [*FIRST, *SECOND])
def test_it_is_refused_with_a_hint_and_nothing_is_written(
    run_sleb, words, tmp_path, line, code, says
):
    before = sorted(os.listdir(tmp_path))
    result = run_sleb(*words(line))
    shown = " ".join(result.stderr.split())
    assert (result.exit_code, result.stdout) == (code, "")
    assert all(part in shown for part in (says, "error: ", "hint: ")), shown
    assert "Traceback" not in shown
    written = {*os.listdir(tmp_path)} - {"cache"}  # which keeps the names of lm-eval's tasks
    assert sorted(written) == before


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("prune org/model", "`sleb search MODEL --ratio 0.2`, then"),
        ("compress org/model", "`sleb search MODEL --ratio 0.2`, then"),
        ("org/model --ratio 0.2", "`sleb search org/model --ratio 0.2`"),
        ("demo", "`sleb search demo --ratio 0.2`"),
        ("search --ratio 0.2", "Name a Hub id, a folder, a .gguf file, or demo"),
        ("search org/model --layers 6", "Use --remove 6"),
        ("search org/model -n 6", "Use --remove 6"),
        ("search org/model -r 0.2", "Use --ratio 0.2"),
        ("search org/model --sparsity 20", "Use --ratio 0.2"),
        ("search org/model --ratio 20", "0.2 or 20%"),
        ("search --model org/model --ratio 0.2", "sleb search MODEL"),
        ("search org/model --dataset c4", "Use --calibration"),
        ("eval --dataset c4", "Use --perplexity"),
        ("apply --ratio 0.2", "use --remove, or search again"),
        ("apply --to gguf", "-o model.gguf"),
        ("search org/model --ratio 0.2 --metric perplexity", "Use nll"),
        ("search org/model --ratio 0.2 --metric shortgpt", "Use cosine"),
        ("search org/model --ratio 0.2 --calibration wikitext", "Did you mean 'wikitext2'?"),
        ("export report", "--to report"),
        ("export PLAN --to html", "Use report"),
        ("bare", "`sleb search bare --ratio 0.2`"),
        ("heal PLAN", "Use `sleb apply --heal`."),
        ("recover", "Use `sleb apply --recover`."),
        ("search org/model --experts 3", "Use --unit experts --remove 3"),
        ("search org/model --remove 20%", "--ratio 20%"),
        ("--ratio 0.2 org/model", "--ratio is an option of `sleb search`"),
        ("search ./takn --ratio 0.2", "Check the path."),
        ("search bar --ratio 0.2", "Did you mean 'bare'?"),
        ("search ./bad.ggf --ratio 0.2", "Did you mean 'bad.gguf'?"),
        ("search no/model --ratio 0.2 --calibration taken/shrt.txt", "Did you mean 'short.txt'?"),
        ("eval no/model --perplexity answrs.tx", "Did you mean 'answers.txt'?"),
        ("apply llama-plan.jsn", "Did you mean 'llama-plan.json'?"),
        ("apply --no-such", "See `sleb apply --help`."),
        ("no-such", "See `sleb --help`."),
    ],
)
def test_the_natural_wrong_guess_is_told_the_right_word(run_sleb, words, line, hint):
    result = run_sleb(*words(line))
    assert hint in " ".join(result.stderr.partition("hint: ")[2].split())
    guessed = ("Possible options", "Did you mean 'eval'")
    assert hint.startswith("See ") or not any(words in result.stderr for words in guessed)
    assert result.exit_code in (2, 3, 4, 5)


@pytest.mark.parametrize(
    ("line", "kind"),
    [("apply nowhere --json", "PlanError"), ("serch --json", "UsageError"),
     ("plugins --json --no-such", "UsageError"), (f"eval {'x' * 300} --json", "UsageError")],
)  # fmt: skip
def test_json_holds_an_error_too(run_sleb, words, line, kind):
    result = run_sleb(*words(line))
    error = json.loads(result.stdout)["error"]
    assert (error["class"], error["exit_code"]) == (kind, result.exit_code)
    assert [error["message"], error["hint"]] == [
        text.partition(": ")[2] for text in result.stderr.splitlines()
    ]


ALONE = """
import sys
from functools import cache
import typer
from sleb_cli import plugin_manager
from sleb_cli.__main__ import main
# Built once for all of them.
typer.main.get_command = cache(typer.main.get_command)
plugin_manager.entry_points = cache(plugin_manager.entry_points)
codes = [main(words) for words in {lines}]
print([codes, {{'torch', 'transformers', 'datasets'}} & {{*sys.modules}}])
"""


def test_what_needs_no_model_is_answered_without_torch(words):
    code = ALONE.format(lines=[words(line) for line, _, _ in FIRST])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    codes = [code for _, code, _ in FIRST]
    assert done.stdout == f"{[codes, set()]}\n", done.stderr


def numbers():
    """Return each command and option that takes a number, or a text that may be one."""
    found = []
    for command, request in COMMANDS.items():
        annotations = get_type_hints(request)
        for field in fields(request):
            kinds = {*requests.kinds_of(annotations[field.name])}
            for kind in [*kinds]:
                kinds.update(get_args(kind))
            if kinds & {int, float} and field.default is not MISSING:
                found.append((command, requests.option_of(field.name)))
    return found


OUT_OF_REASON = ("nan", "inf", "-inf", "-1", "9" * (sys.int_info.default_max_str_digits + 1))
TARGETS = [requests.option_of(name) for name in requests.TARGET_NAMES]


@pytest.mark.parametrize(("command", "option"), numbers())
def test_a_number_out_of_reason_is_refused_in_a_sentence(run_sleb, words, command, option):
    subject = "MODEL" if option == "--blocks" else "PLAN"
    if command == "search":
        subject = "MODEL --calibration TEXT --samples 8 --sequence-length 16"
        if option not in TARGETS:
            subject += " --remove 1"
    elif command == "export":
        subject = "PLAN --to indices"
    for value in OUT_OF_REASON:
        result = run_sleb(command, *words(subject), option, value)
        assert result.exit_code == 2, (value[:40], result.stderr)
        assert "error: " in result.stderr
