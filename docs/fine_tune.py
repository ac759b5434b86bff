"""Fine-tune models on one task with the same steps, and compare them.

    python docs/fine_tune.py train.jsonl test.jsonl MODEL [PRUNED ...]

Each line of the files is {"prompt": "…", "choices": ["…", "…"], "right": 0}. Only answers are
learned.
"""

import json
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

EPOCHS, BATCH, RATE = 2, 8, 2e-5
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def read(path):
    """Return the items of a file."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def losses(model, tokenizer, pairs):
    """Return the summed loss of each answer after its prompt."""
    prompts = [tokenizer(prompt).input_ids for prompt, _ in pairs]
    texts = [tokenizer(prompt + answer).input_ids for prompt, answer in pairs]
    longest = max(map(len, texts))
    ids = torch.tensor([text + [0] * (longest - len(text)) for text in texts], device=DEVICE)
    place = torch.arange(longest, device=DEVICE)
    starts, ends = (
        torch.tensor([*map(len, each)], device=DEVICE)[:, None] for each in (prompts, texts)
    )
    mask = (place < ends).long()
    with torch.autocast(DEVICE, torch.bfloat16):
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
    each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return (each * ((place >= starts) & (place < ends))[:, 1:]).sum(1)


def train(model, tokenizer, items):
    """Train all weights; return the median seconds of a step."""
    order = [
        n
        for epoch in range(EPOCHS)
        for n in torch.randperm(len(items), generator=seeded(epoch)).tolist()
    ]
    steps = [[items[n] for n in order[at : at + BATCH]] for at in range(0, len(order), BATCH)]
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0)
    schedule = get_cosine_schedule_with_warmup(optimizer, len(steps) // 10, len(steps))
    seconds = []
    for step in steps:
        start = time.perf_counter()
        losses(
            model, tokenizer, [(item["prompt"], item["choices"][item["right"]]) for item in step]
        ).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(), optimizer.zero_grad(), schedule.step()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[len(seconds) // 2]


def seeded(seed):
    """Return a generator of random numbers, the same for every model."""
    return torch.Generator().manual_seed(seed)


@torch.inference_mode()
def accuracy(model, tokenizer, items):
    """Return the share of items whose right answer is the likeliest."""
    found = [
        losses(model, tokenizer, [(item["prompt"], one) for one in item["choices"]]).argmin()
        for item in items
    ]
    return sum(int(best) == item["right"] for best, item in zip(found, items, strict=True)) / len(
        items
    )


if __name__ == "__main__":
    learned, asked = read(sys.argv[1]), read(sys.argv[2])
    for name in sys.argv[3:]:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(DEVICE)
        tokenizer = AutoTokenizer.from_pretrained(name)
        before, step = accuracy(model, tokenizer, asked), train(model, tokenizer, learned)
        after = accuracy(model, tokenizer, asked)
        print(
            f"{name}: {before:.3f} before, {after:.3f} after, {step * 1000:.0f} ms a step",
            flush=True,
        )
