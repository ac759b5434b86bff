"""Honest folders, and commands that work in them, before anything in them lies."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from conftest import gpt2_config, llama_config, prose, save_model
from faults.arrangements import saving_always
from faults.hostile import SECRET
from faults.lies import to_text
from faults.program import KILL, Calls, Fault, Program
from gguf_models import convert_llama, write_gguf
from measured_plans import make_benchmark, make_evaluation, make_plan
from sleb_cli.atomic import to_json

TEXT = ("--calibration", "text.txt", "--samples", "2", "--sequence-length", "8", "--sample-tokens", "2")
CUT = ("apply", "model", "--blocks", "1", "-o", "out", "--no-verify")
APPLY = CUT[:-1]
SEARCH = ("search", "model", "--remove", "1", *TEXT, "-o", "out.json")
CHAT = (*SEARCH, "--calibration", "chat.jsonl", "--chat", "all", "--sequence-length", "128")
EVAL = ("eval", "model", "--perplexity", "text.txt", "--sequence-length", "8", "--max-windows", "2", "-o", "out.json")
ROWS_OF_PLAN = ("export", "plan.json", "--to", "csv")
RESUME = (*SEARCH, "--resume")
STREAM = (*RESUME, "--stream")
HEAL = (*CUT, "--heal", "--heal-tokens", "64", *TEXT[:-2], "--samples", "8")
CUT_GGUF = ("apply", "whole.gguf", "--blocks", "1", "-o", "out.gguf", "--no-verify")
PLANNED = (
    ("apply", "plan.json", "-o", "out", "--no-verify"), ("export", "plan.json", "--to", "indices"),
    ("eval", "plan.json", *EVAL[2:]),
    ("search", "model", "--extend", "plan.json", "--remove", "2", "-o", "out.json", "--sample-tokens", "0"),
)  # fmt: skip
CODE = b"raise SystemExit('code was run')\n"
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
ROWS = [{"text": prose(3, seed)} for seed in range(12)]
TALK = [{"role": "user", "content": "river"}, {"role": "assistant", "content": prose(3)}]


def make_bases(program: Program, top: Path) -> dict[str, Path]:
    """Make honest folders in which commands work, each with files outside of the model that nothing may touch."""
    small = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    configs = {"llama": llama_config(3, **small), "shards": llama_config(3, **small), "gpt2": gpt2_config(3)}
    for name, config in configs.items():
        save_model(top / name / "model", config, **({"max_shard_size": "12KB"} if name == "shards" else {}))
        (top / name / "text.txt").write_text(prose(60))
        (top / name / "chat.jsonl").write_bytes(b"".join(to_text({"messages": TALK}) + b"\n" for _ in range(4)))
        outside = top / name / "outside"
        shutil.copytree(top / "llama" / "model", outside)
        (outside / "note.txt").write_bytes(SECRET)
        for path in outside.glob("*.json"):
            path.write_text(json.dumps(json.loads(path.read_text()) | {"_note": SECRET.decode()}))
        save_file(load_file(outside / "model.safetensors"), outside / "model.safetensors", {"note": SECRET.decode()})
        (outside / "chat_template.jinja").write_bytes(SECRET)
        (outside / "code.py").write_bytes(CODE)
    for name in ("pickle", "chat", "files", "planned", "journal", "walk", "healing"):
        shutil.copytree(top / "llama", top / name)
    (top / "chat" / "model" / "chat_template.jinja").write_text(TEMPLATE)
    weights = top / "pickle" / "model" / "model.safetensors"
    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
    weights.unlink()
    plan = make_plan(8, 3, kinds=True)
    records = {"plan": plan, "plan.eval": make_evaluation(plan, items=20),
               "plan.bench": make_benchmark(plan, iterations=3, batches=(1,))}  # fmt: skip
    for name, record in records.items():
        (top / "files" / f"{name}.json").write_text(to_json(record.to_data()))
    keys = {"vocab_size": 4, "attention.head_count_kv": [1, 2, 2, 1], "leading_dense_block_count": 1}
    write_gguf(top / "files" / "whole.gguf", "llama", 4, keys)
    convert_llama(top / "llama" / "model", top / "files" / "real.gguf")
    (top / "files" / "rows.jsonl").write_bytes(b"\n".join(map(to_text, ROWS)))
    program.run(*SEARCH, "--protect-first", 0, "-o", "plan.json", cwd=top / "planned")
    # Killed as it gives something its name, a command leaves what it had saved.
    for name, command, at in (("journal", RESUME, 1), ("walk", STREAM, 2), ("healing", HEAL, 3)):
        fault = Fault(top / name, at, KILL, Calls.RENAME)
        program.run(*command, cwd=top / name, fault=fault, before=(saving_always,), codes=[-9])
    return {path.name: path for path in top.iterdir()}
