"""What the tests of the stages share: small runs, what they leave, and how a mistake is answered."""

import json

import pytest

import dpo_hano


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def training(path):
    return [line for line in lines(path) if "loss" in line]


def dpo(sft_run, out, *more):
    argv = ["--sft", sft_run, "--out", out, "--max-steps", 3, "--batch-size", 6, "--eval-limit", 8, "--lr", 1e-3, *more]
    dpo_hano.main([str(word) for word in argv])
    return out


SMALL = "--max-steps 1 --batch-size 3 --grad-accum 1 --eval-limit 2".split()


def refused(capsys, main, *argv):
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in argv])
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert "Traceback" not in error and "usage:" not in error
    return error.splitlines()[-1]
