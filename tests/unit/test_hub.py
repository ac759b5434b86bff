"""When the Hub counts as out of reach, what works without it, and the one sentence where nothing does."""

import socket
import threading

import datasets
import pytest
from huggingface_hub import close_session, constants

from conftest import calibration
from hub import Hub
from sleb_cli.engine.hub import offline_if_unreachable
from sleb_cli.engine.text.sources import evaluation_text

NOBODY = "http://127.0.0.1:9"


@pytest.fixture
def why(monkeypatch):
    """Return why the Hub at an address counts as out of reach, if it does."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("sleb_cli.engine.hub.time.sleep", lambda seconds: None)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)

    def why(address):
        close_session()
        monkeypatch.setattr(constants, "ENDPOINT", address)
        with offline_if_unreachable() as unreachable:
            assert constants.is_offline_mode() == (unreachable is not None)
        assert not constants.is_offline_mode()
        return unreachable

    yield why
    close_session()


@pytest.mark.parametrize("status", [200, 404, 503])
def test_whoever_answers_is_reached(why, monkeypatch, status):
    with Hub() as hub:
        hub.refuses = {"": status}
        thread = threading.Thread(target=hub.serve_forever)
        thread.start()
        assert why(hub.address) is None
        monkeypatch.setenv("HTTP_PROXY", hub.address)  # which may be the only way
        assert why("http://hub.invalid") is None
        hub.shutdown()
        thread.join()
    assert hub.asked == ["HEAD /", "HEAD http://hub.invalid/"]


def test_it_is_offline_only_inside_even_after_an_error(why):
    assert why(NOBODY) == f"{NOBODY} cannot be reached (Connection refused)"
    with pytest.raises(KeyError), offline_if_unreachable():
        raise KeyError
    assert not constants.is_offline_mode()


@pytest.mark.parametrize(("queue", "reason"), [(0, "timed out"), (5, None)], ids=["no connection", "slow answer"])
def test_only_a_slow_connection_is_out_of_reach(why, queue, reason):
    with socket.socket() as silent, socket.socket() as waiting:
        silent.bind(("127.0.0.1", 0))
        silent.listen(queue)  # one connection fits into an empty queue, and nobody takes it out
        waiting.connect(silent.getsockname())
        found = why("http://{}:{}".format(*silent.getsockname()))
    assert found is None if reason is None else found.endswith(f"cannot be reached ({reason})")


def test_a_data_set_in_the_cache_needs_no_hub(why, tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text('{"text": "river"}\n{"text": "stone"}\n')
    cache = tmp_path / "datasets"
    datasets.load_dataset("json", data_files={"test": str(tmp_path / "rows.jsonl")}, cache_dir=str(cache))
    # Named as if it came from the Hub.
    (rows,) = cache.glob("json/*/*/*/json-test.arrow")
    rows.rename(rows.with_name("words-test.arrow"))
    rows.parents[2].rename(cache / "json" / "default")
    (cache / "json").rename(cache / "org___words")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    assert why(NOBODY)
    assert evaluation_text("org/words", 2048).content == "river\n\nstone"


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("org/name",), 4, "org/name is neither a local folder nor in the cache, and"),
        (("MODEL", "--calibration", "c4"), 5, "cannot be loaded: not in the cache, and"),
    ],
)  # fmt: skip
def test_one_sentence_and_no_retries(why, run_sleb, tiny_llama, text_file, options, code, message):
    why(NOBODY)
    words = [tiny_llama if word == "MODEL" else word for word in options]
    result = run_sleb("search", *calibration(text_file), *words, "--remove", 1)
    assert result.exit_code == code, result.stderr
    assert "Retrying" not in result.stderr
    error, hint = result.stderr.splitlines()[-2:]
    assert error.startswith("error: ")
    assert message in error
    assert f"{NOBODY} cannot be reached (Connection refused)" in error
    assert hint.startswith("hint: ")
