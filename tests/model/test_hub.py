"""Names of the hub: a wrong one, no network, offline mode, and a server without the hub's API."""

import contextlib
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer

import huggingface_hub
import pytest

from hanorec.model import load
from hanorec.run.files import UserError

MESSAGE = "'no/such-model' is no folder here, and the hub does not give it: check the name, or you are offline: "


@contextlib.contextmanager
def server(status, headers):
    """A server that gives every request this status and these headers. Yields its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


@pytest.fixture
def online(monkeypatch):
    """Leave offline mode, which all tests run in. Returns a function that sets the hub's address."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return lambda address: monkeypatch.setattr(load, "HfApi", partial(huggingface_hub.HfApi, endpoint=address))


def refused_within_seconds(name="no/such-model"):
    began = time.monotonic()
    with pytest.raises(UserError) as error:
        load.load_config(name)
    assert time.monotonic() - began < 5
    return str(error.value)


def test_a_name_that_the_hub_does_not_know(online):
    with server(404, {"X-Error-Code": "RepoNotFound"}) as address:
        online(address)
        assert refused_within_seconds().startswith(MESSAGE)


def test_without_network(online):
    with server(404, {}) as address:
        pass
    online(address)  # nothing listens there any more
    assert "Connection refused" in refused_within_seconds().removeprefix(MESSAGE)


def test_in_offline_mode():
    assert "offline mode is enabled" in refused_within_seconds().removeprefix(MESSAGE)


def test_a_name_that_no_hub_can_have():
    assert refused_within_seconds("../no/folder").startswith("'../no/folder' is no folder here, and the hub")


def test_a_server_without_the_hubs_api_is_left_to_the_loader(online):
    """A mirror may have the files of models and nothing else."""
    with server(503, {}) as address:
        online(address)
        load.check_name("no/such-model")


def test_a_model_in_the_cache_needs_no_hub(monkeypatch, tmp_path):
    snapshot = tmp_path / "models--no--such-model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text('{"model_type": "llava"}')
    (tmp_path / "models--no--such-model" / "refs").mkdir()
    (tmp_path / "models--no--such-model" / "refs" / "main").write_text("abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    load.check_name("no/such-model")
