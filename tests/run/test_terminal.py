"""Control characters in titles, ids and options do not reach the terminal."""

import json
import os
import subprocess
import sys
import unicodedata

import layouts
import pytest
from conftest import ROOT
from layouts import TITLES, table
from spoilt import LOG, refused

import dpo_hano
import evaluate
import prepare_data
import sft

EVIL = "Film\x1b[2J\x1b]0;x\x07 \u202egnp.\u2066 \x9b31m\u200b"


def controls(text):
    """The characters of a text that could control a terminal, line ends aside."""
    return [c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c != "\n"]


def test_control_characters_do_not_reach_the_terminal(tmp_path, capsys):
    """Titles, users and items with control characters, in prompts, recommendations, inherited options and errors."""
    raw = tmp_path / "raw"
    argv = [*layouts.write("csv", raw), "--out", tmp_path / "data"]
    rows = [(f"{u}\x1b[1m", f"{i}\x1b[8m", t, r) for u, i, t, r in layouts.interactions()]
    (raw / "log.csv").write_bytes(table(LOG, rows))
    titles = [(f"{item}\x1b[8m", f"{EVIL} {item}") for item in TITLES]
    (raw / "items.csv").write_bytes(table(["item", "title"], titles))
    prepare_data.main([*map(str, argv), "--show", "2"])
    run = ["--data", tmp_path / "data", "--out", tmp_path / "sft", "--max-steps", 1, "--warmup-steps", 0]
    sft.main([str(word) for word in [*run, "--eval-limit", 2, "--batch-size", 2]])
    user = rows[0][0]
    evaluate.main(["--run", str(tmp_path / "sft"), "--user", user])
    out = capsys.readouterr().out
    assert not controls(out) and r"Film\x1b[2J" in out and r"\u202egnp" in out and r"i3\x1b[8m" in out
    assert r"i\x1b" in refused(capsys, evaluate.main, "--run", tmp_path / "sft", "--user", user, "--from", "i\x1b")
    config = json.loads((tmp_path / "sft" / "config.json").read_text())
    config["options"]["attn"] = EVIL
    (tmp_path / "sft" / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit):
        dpo_hano.main(["--sft", str(tmp_path / "sft"), "--out", str(tmp_path / "dpo")])
    printed = capsys.readouterr()
    assert r"attn Film\x1b[2J" in printed.out and not controls(printed.out)
    assert not controls(printed.err.replace("\r", ""))


def test_a_terminal_that_cannot_show_a_character(prepared):
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    code = "from hanorec.run.files import one_line_errors\n@one_line_errors\ndef main(argv):\n"
    code += "    print('\\U0001f600')\nmain([])"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, cwd=ROOT)
    assert done.stdout.strip() == rb"\U0001f600", done.stderr
