"""Commands that need the Hub, without a network: one sentence within seconds."""

import os
import subprocess
import sys

import pytest

from conftest import calibration

# A port that refuses connections, as the network does that is not there.
NOBODY = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
OUT_OF_REACH = "http://127.0.0.1:9 is out of reach (Connection refused)"


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("search", "org/name"), 4, "There is no folder org/name here, the cache lacks the model, and"),
        (("search", "MODEL", "--calibration", "c4"), 5, "cannot be loaded: not in the cache, and"),
        pytest.param(
            ("search", "MODEL", "--metric", "task:piqa"),
            5,
            "The data of piqa cannot be loaded: not in the cache, and",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_one_sentence_and_no_retries(tiny_llama, text_file, tmp_path, options, code, message):
    words = [str(tiny_llama) if word == "MODEL" else word for word in options]
    rest = [] if "--calibration" in words else map(str, calibration(text_file))
    command = [sys.executable, "-m", "sleb_cli", *words, *rest, "--remove", "1"]
    cache = {"HF_HOME": str(tmp_path / "home")}
    # The retries alone would take 31 seconds for each of several files.
    result = subprocess.run(
        command, env=os.environ | NOBODY | cache, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == code, result.stderr
    assert "Retrying" not in result.stderr
    last = result.stderr.splitlines()[-2:]
    assert last[0].startswith("error: ")
    assert message in last[0]
    assert OUT_OF_REACH in last[0]
    assert last[1].startswith("hint: ")
