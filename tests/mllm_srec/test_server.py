"""Texts from a server: `transformers serve`, if it is installed, and a server with scripted answers."""

import http.server
import json
import shutil
import threading
import time
import urllib.request
from types import SimpleNamespace

import pytest
from conftest import ROOT, Opened
from forked import free_port, kill
from forked import start as start_forked
from layouts import lines
from PIL import Image
from transformers.utils import import_utils

from hanorec.run import records
from hanorec.run.files import UserError
from mllm_srec import server, summarize, writers

NAMES = ("items.jsonl", "preferences.jsonl")


def start(model, pixels: int, port: int):
    """Start `transformers serve`. Returns its process as soon as the server answers."""
    process = start_forked(ROOT / "tests" / "helpers" / "serve.py", model, port, pixels, log="/dev/null")
    for _ in range(300):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
            return process
        except OSError:
            assert process.is_alive()
            time.sleep(0.2)
    raise TimeoutError


@pytest.mark.skipif(
    not getattr(import_utils, "is_serve_available", lambda: False)(), reason="transformers serve is not installed here"
)
def test_transformers_serve_writes_the_same_and_may_die_half_way(prepared, data, taught, monkeypatch, capsys):
    shutil.copytree(prepared.parent / "raw", data.parent / "raw")  # the posters
    model = str(taught / "model")
    options = ["--data", str(data), "--max-tokens", "48", "--batch-size", "16"]
    summarize.main([*options, "--name", "local", "--run", str(taught)])
    local = data / "summaries" / "local"
    assert sum(line["summary"] == "A film." for line in lines(local / "items.jsonl")) > 20

    port, served = free_port(), data / "summaries" / "served"
    process, add, batches = start(model, 3136, port), records.Record.add, []

    def add_then_die(record, batch):
        add(record, batch)
        batches.append(len(batch))
        if len(batches) == 2:
            kill(process)

    monkeypatch.setattr(records.Record, "add", add_then_die)
    argv = [*options, "--name", "served", "--server", f"http://127.0.0.1:{port}/v1", "--server-model", model]
    with pytest.raises(SystemExit) as stop:
        summarize.main([*argv, "--retries", "1"])
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and "does not answer" in error and "run the same command again" in error
    process = start(model, 3136, port)
    try:
        summarize.main(argv)
    finally:
        kill(process)
    texts = sum(len(lines(local / name)) for name in NAMES)
    assert batches[:2] == [16, 16] and sum(batches) == texts  # no text is written twice
    for name in NAMES:
        assert lines(served / name) == lines(local / name)


class Scripted(http.server.BaseHTTPRequestHandler):
    """Answers with the next (status, body) of `script`. The last one is repeated."""

    script = []
    bodies = []  # of the requests

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.bodies.append(body)
        status, content = self.respond()
        self.send_response(status)
        self.end_headers()
        self.wfile.write(content if isinstance(content, bytes) else json.dumps(content).encode())

    def respond(self):
        return self.script.pop(0) if len(self.script) > 1 else self.script[0]

    def log_message(self, *_):
        pass


def answer(text, reason="stop"):
    """A scripted answer with this text."""
    return 200, {"choices": [{"message": {"content": text}, "finish_reason": reason}]}


@pytest.fixture
def replies_to(prepared, monkeypatch):
    """A function that gives prompts to a server.Server with scripted answers. It returns the replies."""
    monkeypatch.setattr(server, "LONGEST_PAUSE", 0.01)
    scripted = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Scripted)
    threading.Thread(target=scripted.serve_forever, args=(0.01,), daemon=True).start()
    options = SimpleNamespace(batch_size=4, parallel=1, retries=2, seed=7, max_tokens=9)

    def replies_to(prompts, *script, parallel=1):
        Scripted.script, Scripted.bodies, options.parallel = list(script), [], parallel
        url = f"http://127.0.0.1:{scripted.server_port}/v1/"
        return server.Server(url, "m", Opened(prepared).encoding, options)(prompts)

    yield replies_to
    scripted.shutdown()


def test_answers_that_are_not_usable_texts(replies_to):
    good = [answer("Fine.")]
    bad = [answer("cut", "length"), answer(None), answer("I'm sorry, I cannot."), answer("a <|im_end|>")]
    bad += [answer("cut", "content_filter"), (413, b"a large picture"), answer("half \ud83d"), (200, b"[" * 100_000)]
    bad += [answer(["x"]), (200, {"error": "?"}), (200, b"<html>"), (200, []), (200, {"choices": []})]
    faults = [reply.fault for reply in replies_to([["?"]] * 14, *good, *bad, answer("unused"))]
    assert faults == [None, "limit", "empty", "refused", "control", "limit", *["nonsense"] * 8]


def test_a_busy_server_gets_the_request_again_and_an_absent_one_ends_the_run(replies_to):
    busy = [(503, b"busy"), (429, b"slow down"), answer("Done.")]
    assert replies_to([["?"]], *busy) == [writers.Reply("Done.")]
    with pytest.raises(UserError, match=r"does not answer .503: busy.*run the same command again"):
        replies_to([["?"]] * 9, (503, b"busy"), parallel=4)
    assert len(Scripted.bodies) <= 4 * 3  # the other requests stop too
    with pytest.raises(UserError, match=r"refuses a request .404: no such model"):
        replies_to([["?"]], (404, b"no such model"))
    assert len(Scripted.bodies) == 1


def test_the_first_error_is_reported(replies_to, monkeypatch):
    """The first prompt pauses while the second is refused."""
    monkeypatch.setattr(server, "LONGEST_PAUSE", 60)
    busy, refused, first_came = (503, b"busy"), (401, b"no key"), threading.Event()

    def respond(self):
        if "first" in str(self.bodies[-1]):
            first_came.set()
            return busy
        first_came.wait()
        return refused

    monkeypatch.setattr(Scripted, "respond", respond)
    with pytest.raises(UserError, match=r"refuses a request .401: no key"):
        replies_to([["first"], ["second"]], parallel=2)


def test_the_request_that_a_server_gets(replies_to, prepared):
    """It has greedy decoding, the picture, and no control token that a title spells."""
    data = Opened(prepared)
    with_image = next(item for item in range(9) if data.tokens.lengths[item])
    without_image = next(item for item in range(len(data.items)) if not data.tokens.lengths[item])
    replies_to([["Heat <|im_end|>\n", with_image, " and ", without_image]], answer("Fine."))
    (body,) = Scripted.bodies
    assert (body["temperature"], body["seed"], body["max_tokens"], body["model"]) == (0, 7, 9, "m")
    first, picture, last = body["messages"][0]["content"]
    assert first == {"type": "text", "text": "Heat < |im_end|>\n"} and last["text"] == " and "
    tokenizer = data.prompts().tokenizer
    assert not set(tokenizer.encode(first["text"])) & set(tokenizer.all_special_ids)
    with urllib.request.urlopen(picture["image_url"]["url"]) as file:
        assert Image.open(file).size in ((40, 60), (60, 40), (56, 56))
