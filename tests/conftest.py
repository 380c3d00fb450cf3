"""Shared by all tests. Puts the repository on the path, works offline, and uses one thread a process. Some folders are
built once and shared by all workers of pytest."""

import fcntl
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: every core has a worker of its own
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]
MOVIELENS = ROOT.parent / "shared" / "data" / "movielens-small"


def movielens(folder, users=40, items=60, seed=0, layout="csv"):
    """A small MovieLens in either layout, with ties in time, unordered rows, equal titles and some posters."""
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(users):
        for item in rng.permutation(items)[: rng.integers(4, 14)]:
            rows.append(
                (f"{user * 3 + 1}", f"{item + 100}", f"{rng.integers(1, 11) / 2}", f"{rng.integers(1000, 1008)}")
            )
    rows = [rows[i] for i in rng.permutation(len(rows))]
    titles = {str(item + 100): f"Film {item // 2 if item < 8 else item}, The (1999)" for item in range(items)}
    folder.mkdir(parents=True, exist_ok=True)
    if layout == "csv":
        lines = ["userId,movieId,rating,timestamp", *(",".join(row) for row in rows)]
        (folder / "ratings.csv").write_bytes(("\ufeff" + "\r\n".join(lines) + "\r\n").encode())
        lines = ["movieId,title,genres", *(f'{item},"{title}",Drama' for item, title in titles.items())]
        (folder / "movies.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        (folder / "ratings.dat").write_text("".join("::".join(row) + "\n" for row in rows), encoding="latin-1")
        lines = (f"{item}::{title.replace('Film', 'Café')}::Drama\n" for item, title in titles.items())
        (folder / "movies.dat").write_bytes("".join(lines).encode("latin-1"))
    return rows, titles


def draw_posters(folder, items=range(100, 158), seed=0):
    """Noise for posters, in three sizes; some items have none."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for item in items:
        size = ((60, 40), (40, 60), (56, 56))[item % 3]
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{item}.jpg")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """One worker a core, at most eight. With more, loading the libraries takes longer than the tests."""
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())


FORKED = ("test_processes.py", "test_server.py", "test_resume.py", "test_teach.py")


def pytest_collection_modifyitems(items):
    """Run the tests that start processes first. They are long, and nobody shall wait for them at the end.

    So one worker is enough to load the libraries for their processes (see helpers/forked.py).
    """
    items.sort(key=lambda item: item.path.name not in FORKED)


def made_once(tmp_path_factory, name, make):
    """The folder of this name that all workers share. The first that asks has make(folder) fill it, the others wait."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, done = base / name, base / f"{name}.done"
    with open(base / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


def left_alone(folder):
    """Yields a folder that all workers read, and sees at the end that no test wrote into it."""
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    yield folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before, f"a test wrote into {folder}"


def words(*argv):
    return [str(word) for word in argv]


class Opened:
    """A data folder and one of its encodings, opened; summaries: a name of summaries, for the prompts."""

    def __init__(self, folder, model=None, blank_images=False, images=None, summaries=None):
        from hanorec.data.folder import DataFolder
        from hanorec.model.encoding import Encoding

        self.data = DataFolder(folder)
        self.encoding = Encoding(self.data, model, blank_images, images)
        self.items, self.tokens, self.summaries = self.data.items, self.encoding.tokens, summaries
        self.source, self.examples, self.sequences = self.encoding.source, self.data.examples, self.data.sequences

    def prompts(self, candidate_images=False, history_first=False):
        from mllm_srec.chain_of_thought import load_prompts

        layout = {"candidate_images": candidate_images, "history_first": history_first}
        return load_prompts(self.data, self.encoding, summaries=self.summaries, **layout)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A small prepared and encoded data folder, made by the real script from a small MovieLens. All workers read it: a
    test that writes takes a copy."""
    import prepare_data

    def make(folder):
        movielens(folder / "raw", users=30)
        draw_posters(folder / "raw" / "posters")
        argv = ["--dataset", "movielens", "--source", folder / "raw", "--out", folder / "data", "--max-pixels", 3136]
        prepare_data.main(words(*argv))

    yield from left_alone(made_once(tmp_path_factory, "prepared", make) / "data")


@pytest.fixture
def data(prepared, tmp_path):
    """A copy of the prepared data that the test may change."""
    shutil.copytree(prepared, tmp_path / "data", ignore=shutil.ignore_patterns(".lock"))
    return tmp_path / "data"


@pytest.fixture(scope="session")
def sft_run(prepared, tmp_path_factory):
    """A few steps of the real sft.py on it, all weights of the tiny backbone. A copy of this worker's own: what scores
    it, or trains on it, leaves files in it."""
    import sft

    def make(folder):
        argv = "--max-steps 6 --batch-size 8 --eval-limit 8 --warmup-steps 0".split()
        sft.main(words("--data", prepared, "--out", folder / "sft", *argv))

    out = tmp_path_factory.mktemp("runs") / "sft"
    shutil.copytree(made_once(tmp_path_factory, "sft_run", make) / "sft", out)
    return out


@pytest.fixture(scope="session")
def taught(prepared, tmp_path_factory):
    """A run of teach.py that has learned to say of most items that they are a film. All workers read it."""
    from mllm_srec import teach

    def make(folder):
        items = map(json.loads, (prepared / "items.jsonl").read_text().splitlines())
        facts = {"kind": "film"}
        texts = ({"item": line["item"], "text": "A film.", "facts": facts} for line in items)
        (folder / "films.jsonl").write_text("".join(json.dumps(line) + "\n" for line in texts))
        argv = ["--data", prepared, "--out", folder / "teach", "--descriptions", folder / "films.jsonl", "--share", 1]
        teach.main(words(*argv, "--max-steps", 80, "--batch-size", 6))

    yield from left_alone(made_once(tmp_path_factory, "taught", make) / "teach")


@pytest.fixture(scope="session")
def dpo_run(sft_run, tmp_path_factory):
    """A few steps of dpo_hano.py on the SFT run; this worker's own."""
    from stages import dpo

    out = tmp_path_factory.mktemp("runs") / "dpo_hano"
    return dpo(sft_run, out, "--sigma", 0.05)


@pytest.fixture(scope="session")
def lora_run(prepared, tmp_path_factory):
    """A step of sft.py with LoRA; this worker's own."""
    import sft

    out = tmp_path_factory.mktemp("lora") / "sft"
    argv = "--tune lora --max-steps 1 --batch-size 2 --eval-limit 2".split()
    sft.main(["--data", str(prepared), "--out", str(out), *argv])
    return out
