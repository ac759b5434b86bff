"""When the Hub counts as out of reach, and what works without it."""

import socket
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import datasets
import pytest
from huggingface_hub import close_session, constants

from sleb_cli.engine.hub import offline_if_unreachable
from sleb_cli.engine.text.sources import evaluation_text

NOBODY = "http://127.0.0.1:9"


@pytest.fixture
def endpoint(monkeypatch):
    """Name the Hub's address, which nobody here forbids to ask."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("sleb_cli.engine.hub.time.sleep", lambda seconds: None)
    close_session()
    yield lambda address: monkeypatch.setattr(constants, "ENDPOINT", address)
    close_session()


@contextmanager
def server(status):
    """Answer every request with this status, and collect what was asked."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{listening.server_port}", asked
        listening.shutdown()
        thread.join()


@pytest.mark.parametrize("status", [200, 404, 503])
def test_whoever_answers_is_reached(endpoint, status):
    with server(status) as (address, asked):
        endpoint(address)
        with offline_if_unreachable() as unreachable:
            assert unreachable is None
            assert not constants.is_offline_mode()
    assert asked == ["/"]


def test_a_proxy_may_be_the_only_way(endpoint, monkeypatch):
    with server(200) as (address, asked):
        monkeypatch.setenv("HTTP_PROXY", address)
        endpoint("http://hub.invalid")
        with offline_if_unreachable() as unreachable:
            assert unreachable is None
    assert asked == ["http://hub.invalid/"]


def test_nobody_answers_only_inside_is_it_offline(endpoint):
    endpoint(NOBODY)
    with pytest.raises(KeyError), offline_if_unreachable() as unreachable:
        assert unreachable == f"{NOBODY} is out of reach (Connection refused)"
        assert constants.is_offline_mode()
        raise KeyError
    assert not constants.is_offline_mode()


def test_packets_that_vanish_are_waited_for_once(endpoint, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    with socket.socket() as full, socket.socket() as waiting:
        full.bind(("127.0.0.1", 0))
        full.listen(0)  # one connection fits into the queue, and nobody takes it out
        waiting.connect(full.getsockname())
        endpoint("http://{}:{}".format(*full.getsockname()))
        with offline_if_unreachable() as unreachable:
            assert unreachable.endswith("is out of reach (timed out)")


def test_a_slow_answer_is_one(endpoint, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(5)
        endpoint("http://{}:{}".format(*silent.getsockname()))
        with offline_if_unreachable() as unreachable:
            assert unreachable is None


def test_a_data_set_in_the_cache_needs_no_hub(endpoint, tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text('{"text": "river"}\n{"text": "stone"}\n')
    cache = tmp_path / "datasets"
    datasets.load_dataset("json", data_files={"test": str(tmp_path / "rows.jsonl")}, cache_dir=str(cache))
    # Named as if it came from the Hub.
    (rows,) = cache.glob("json/*/*/*/json-test.arrow")
    rows.rename(rows.with_name("words-test.arrow"))
    rows.parents[2].rename(cache / "json" / "default")
    (cache / "json").rename(cache / "org___words")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    endpoint(NOBODY)
    assert evaluation_text("org/words").content == "river\n\nstone"
