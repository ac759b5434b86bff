"""What `sleb search` refuses of a request before it loads anything."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from sleb_cli.engine.door.search import resolve_comparison, resolve_search
from sleb_cli.engine.process_group import ProcessGroup
from sleb_cli.events import ignore
from sleb_cli.plugin_manager import load_plugins
from sleb_cli.requests import SearchRequest
from sleb_plugins import SlebError

REGISTRY = load_plugins()
ONE, TWO = {"remove": 1}, {"remove": 2}
REFUSED = [
    ({"ratio": "0.2", **ONE}, 2, "--ratio and --remove cannot be combined"),
    ({"ratio": "20%", "model": "no/such-model"}, 2, "The ratio 20% is not between 0 and 1"),
    ({"target_params": "1X", "model": "no/such-model"}, 2, "--target-params 1X is not a number of parameters"),
    ({"ratio": "0.9"}, 2, "At most 4 blocks can be removed, which leaves the model at 2 of 6 blocks"),
    ({"remove": 0}, 2, "The model is already at 6 of 6 blocks; the target is 6 of 6 blocks"),
    ({**ONE, "metric": "nl"}, 2, "Unknown metric 'nl'"),
    ({**ONE, "dtype": "int3"}, 2, "Unknown data type 'int3'"),
    ({**ONE, "device": "gpu"}, 2, "Unknown device 'gpu'"),
    ({**ONE, "sequence_length": 129}, 2, "128 positions"),
    ({**ONE, "memory": "lots"}, 2, "--memory lots is not a size"),
    ({**ONE, "stream": True, "calibration": "self"}, 2, "write its own text"),
    ({"target_speedup": 1.2, "stream": True}, 2, "times the whole model"),
    ({"target_speedup": 1.2, "device_map": "auto"}, 2, "times the whole model on one device"),
    ({**ONE, "device_map": "auto", "stream": True}, 2, "--device-map and --stream"),
    ({**ONE, "device_map": "auto", "device": "cpu"}, 2, "--device does not apply"),
    ({**ONE, "metric": "cosine", "fast": True}, 2, "--fast does not apply to cosine"),
    ({**ONE, "extend": Path("nowhere.json")}, 3, "no plan nowhere.json"),
    ({**ONE, "chat": "all"}, 2, "is plain text, but --chat needs conversations"),
    ({**ONE, "revision": "main"}, 2, "--revision does not apply"),
    ({**ONE, "output": Path("no/plan.json")}, 8, "folder does not exist"),
    ({**TWO, "strategy": "gredy"}, 2, "Unknown strategy 'gredy'"),
    ({**TWO, "strategy": "oneshot", "fast": True}, 2, "--fast does not apply to --strategy oneshot"),
    ({**TWO, "strategy": "refine", "metric": "cosine"}, 2, "cosine scores single blocks"),
    ({**TWO, "strategy": "contiguous", "protect": (2, 3)}, 2, "No 2 consecutive blocks can be removed"),
    ({"target_memory": "1MB", "serve_length": 4096}, 2, "--serve-length 4096 exceeds the 128 positions"),
    ({**TWO, "serve_length": 128}, 2, "--serve-length requires --target-memory"),
    ({"target_speedup": "1"}, 2, "--target-speedup 1 is not a number of 1.01 or more"),
    ({"max_perplexity_ratio": "0.9"}, 2, "not a number of 1 or more"),
    ({**ONE, "holdout": 1.0}, 2, "--holdout must be at least 0 and below 1, not 1"),
    ({**TWO, "compare": ("nll",)}, 2, "needs at least two entries"),
    ({**TWO, "compare": ("nll", "nll@greedy")}, 2, "names an entry twice"),
    ({**TWO, "compare": ("nll", "cosine@best")}, 2, "Unknown strategy 'best'"),
    ({**TWO, "compare": ("nll", "cosine"), "metric": "nll"}, 2, "so --metric does not apply"),
]


@pytest.mark.parametrize(("options", "code", "message"), REFUSED, ids=str)
def test_it_is_refused_with_a_hint(tiny_llama, text_file, tmp_path, monkeypatch, options, code, message):
    monkeypatch.chdir(tmp_path)
    usual = SearchRequest(str(tiny_llama), calibration=str(text_file), samples=4, sequence_length=32)
    request = replace(usual, **options)
    door = resolve_comparison if request.compare else resolve_search
    with pytest.raises(SlebError, match=re.escape(message)) as caught:
        door(request, REGISTRY, ignore, ProcessGroup())

    assert (caught.value.exit_code, bool(caught.value.hint)) == (code, True)
    assert list(tmp_path.iterdir()) == []
