"""Texts from a server: `transformers serve` itself, where it is installed, and one that answers by a script."""

import http.server
import json
import shutil
import socket
import threading
import time
import urllib.request
from types import SimpleNamespace

import pytest
from conftest import ROOT, Opened
from forked import kill
from forked import start as start_forked
from transformers.utils import import_utils

from hanorec.run.files import UserError
from mllm_srec import records, server, summarize, writers
from mllm_srec.texts import fill


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(model, pixels: int, port: int):
    """The process of `transformers serve`, once it answers."""
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
    common = ["--data", str(data), "--max-tokens", "48", "--batch-size", "16"]
    summarize.main([*common, "--name", "local", "--run", str(taught)])
    local = data / "summaries" / "local"
    assert sum(line["summary"] == "A film." for line in lines(local / "items.jsonl")) > 20

    port, served = free_port(), data / "summaries" / "served"
    process, add, batches = start(model, 3136, port), records.Record.add, []

    def add_then_die(record, found):
        add(record, found)
        batches.append(len(found))
        if len(batches) == 2:
            kill(process)

    monkeypatch.setattr(records.Record, "add", add_then_die)
    argv = [*common, "--name", "served", "--server", f"http://127.0.0.1:{port}/v1", "--server-model", model]
    with pytest.raises(SystemExit) as stop:
        summarize.main([*argv, "--retries", "1"])
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and "does not answer" in error and "run the same again to go on" in error
    process = start(model, 3136, port)
    try:
        summarize.main(argv)
    finally:
        kill(process)
    assert batches[:2] == [16, 16] and sum(batches) == sum(len(lines(local / name)) for name in NAMES)  # none twice
    for name in NAMES:
        assert lines(served / name) == lines(local / name)


NAMES = ("items.jsonl", "preferences.jsonl")


class Scripted(http.server.BaseHTTPRequestHandler):
    """Answers with the next of `script`: (status, body)."""

    script, asked = [], []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        status, answer = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        self.send_response(status)
        self.end_headers()
        self.wfile.write(answer if isinstance(answer, bytes) else json.dumps(answer).encode())

    def log_message(self, *_):
        pass


def says(text, reason="stop"):
    return 200, {"choices": [{"message": {"content": text}, "finish_reason": reason}]}


@pytest.fixture
def asked(prepared, monkeypatch):
    """A function: replies of a server.Server to prompts, by a script of answers."""
    monkeypatch.setattr(server, "LONGEST_PAUSE", 0.01)
    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Scripted)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    options = SimpleNamespace(batch_size=4, parallel=1, retries=2, seed=7, max_tokens=9)

    def ask(prompts, *script, parallel=1):
        Scripted.script, Scripted.asked, options.parallel = list(script), [], parallel
        url = f"http://127.0.0.1:{made.server_port}/v1/"
        return server.Server(url, "m", Opened(prepared).encoding, options)(prompts)

    yield ask
    made.shutdown()


def test_answers_that_are_no_texts(asked):
    answers = [says("Fine."), says("cut", "length"), says(None), says("I'm sorry, I cannot."), says("a <|im_end|>")]
    answers += [says("cut", "content_filter"), (413, b"a large picture")]
    answers += [
        says("half \ud83d"),
        (200, b"[" * 100_000),
        says(["x"]),
        (200, {"error": "?"}),
        (200, b"<html>"),
        (200, []),
        (200, {"choices": []}),
    ]
    faults = [reply.fault for reply in asked([["?"]] * len(answers), *answers, says("unused"))]
    assert faults == [None, "limit", "empty", "refused", "control", "limit", *["nonsense"] * 8]


def test_a_busy_server_is_asked_again_and_an_absent_one_given_up(asked):
    busy = [(503, b"busy"), (429, b"slow down"), says("Done.")]
    assert asked([["?"]], *busy) == [writers.Reply("Done.")]
    with pytest.raises(UserError, match=r"does not answer .503: busy.*run the same again"):
        asked([["?"]] * 9, (503, b"busy"), parallel=4)
    assert len(Scripted.asked) <= 4 * 3  # the others do not go on knocking
    with pytest.raises(UserError, match=r"refuses a request .404: no such model"):
        asked([["?"]], (404, b"no such model"))
    assert len(Scripted.asked) == 1


def test_what_a_server_is_sent(asked, prepared):
    """Greedy, the picture as it is, and no control tokens that a title spells."""
    data = Opened(prepared)
    row = next(row for row in range(9) if data.tokens.length(row))
    bare = next(row for row in range(len(data.items.ids)) if not data.tokens.length(row))
    asked([["Heat <|im_end|>\n", row, " and ", bare]], says("Fine."))
    (body,) = Scripted.asked
    assert (body["temperature"], body["seed"], body["max_tokens"], body["model"]) == (0, 7, 9, "m")
    first, picture, last = body["messages"][0]["content"]
    assert first == {"type": "text", "text": "Heat < |im_end|>\n"} and last["text"] == " and "
    prompts = data.prompts()
    assert not set(prompts.tokenizer.encode(first["text"])) & set(prompts.tokenizer.all_special_ids)
    with urllib.request.urlopen(picture["image_url"]["url"]) as file:
        from PIL import Image

        assert Image.open(file).size in ((40, 60), (60, 40), (56, 56))
    assert fill("{a}", a=1) == [1]
