"""Spoil valid input files at random, and check that each reader reads them or refuses them in one line.

    python tests/fuzz.py --inputs 10000     # prints counts; exit code 1 if there is a finding
    python tests/fuzz.py --replay 123       # repeats input 123, keeps its files and prints a traceback

The readers are those of raw layouts, pictures, and files between stages. A data folder that is made from a spoilt input
must pass layouts.check_rows. A finding is any other exception, a failed check, or an input that takes over 10 seconds.
"""

import argparse
import collections
import contextlib
import gzip
import io
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from pathlib import Path

import conftest  # noqa: F401  # puts the repository on the path
import layouts
import numpy as np
from conftest import Opened
from PIL import Image
from spoilt import sign

import prepare_data
from hanorec.data.folder import DataFolder
from hanorec.model.images import open_image
from hanorec.ranking import exchange
from hanorec.ranking.baselines import baseline_scores
from hanorec.ranking.metrics import measure
from hanorec.ranking.scoring import target_columns
from hanorec.run.files import file_hash, write_json
from hanorec.run.runs import check_out, read_run

LIMIT = 10  # seconds for an input
KINDS = [*layouts.LAYOUTS, "picture", "stages", "run", "encoding"]
WORDS = ["nan", "-inf", "1e999", "-1", "0", "9" * 400, "1.5", "", " ", "../../x", "/etc/passwd", "\0", "\x1b[2J", "😀"]
WORDS += ["\u202e", "\ud800", '"', "'", ",", "\t", "::", "[]", "{}", "null", "true"]
WORDS += ["[" * 9999, "x" * 20_000, "\\ud800"]
WORDS += ["2024-02-30", "2024-01-01T00:00:00+14:00", "<|im_end|>", "\r", "\n", "\ufeff", "user", "item", "1970"]


def spoil(content: bytes, rng) -> bytes:
    """Change a file's bytes in one random way. Returns the spoilt bytes."""
    size, lines = len(content), content.splitlines(keepends=True) or [b""]
    at, line = int(rng.integers(size + 1)), int(rng.integers(len(lines)))
    word = str(rng.choice(np.array(WORDS, dtype=object))).encode("utf-8", "surrogatepass")
    change = rng.integers(14)
    if change == 0:  # flip a bit in some bytes
        spoilt = bytearray(content)
        for offset in rng.integers(size, size=min(size, int(rng.integers(1, 9)))) if size else []:
            spoilt[offset] ^= 1 << int(rng.integers(8))
        return bytes(spoilt)
    if change == 1:
        return content[:at]
    if change == 2:
        return content[:at] + rng.bytes(int(rng.integers(1, 40))) + content[at:]
    if change == 3:
        return content[:at] + word + content[at:]
    if change == 4:  # replace a field
        fields = lines[line].replace(b"\t", b",").split(b",")
        fields[int(rng.integers(len(fields)))] = word
        lines[line] = (b"\t" if b"\t" in lines[line] else b",").join(fields) + b"\n"
    elif change == 5:
        del lines[line]
    elif change == 6:
        lines.insert(int(rng.integers(len(lines) + 1)), lines[line])
    elif change == 7:
        lines = [lines[number] for number in rng.permutation(len(lines))]
    elif change == 8:
        lines[line] = lines[line] * int(rng.integers(2, 300))
    elif change == 9:
        encoding = str(rng.choice(["utf-16", "utf-16-le", "utf-32", "utf-8-sig"]))
        return content.decode("utf-8", "replace").encode(encoding)
    elif change == 10:
        return content.decode("utf-8", "replace").encode("latin-1", "replace")
    elif change == 11:  # replace one value everywhere
        values = lines[line].replace(b"\t", b" ").replace(b",", b" ").split() or [b" "]
        return content.replace(values[int(rng.integers(len(values)))], word)
    elif change == 12:
        old, new = rng.choice([",", "\t", ";", "::", "\n", "\r\n", " ", '"', ":"], size=2)
        return content.replace(str(old).encode(), str(new).encode())
    else:
        return b"" if rng.random() < 0.3 else rng.bytes(size % 3000)
    return b"".join(lines)


def spoil_one(folder: Path, rng, names=None) -> None:
    """Make one to three changes in a folder's files. A gzipped file is often changed before compression.

    Args:
        names: change only files with these names; None: all files.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and (not names or path.name in names))
    for _ in range(int(rng.choice([1, 1, 2, 3]))):
        path = paths[int(rng.integers(len(paths)))]
        content = path.read_bytes()
        inside = path.suffix == ".gz" and rng.random() < 0.7
        with contextlib.suppress(OSError, EOFError, zlib.error):  # a change before may have spoilt the gzip
            content = gzip.decompress(content) if inside else content
        content = spoil(content, rng)
        path.write_bytes(gzip.compress(content, 1) if inside else content)


def fuzz_layout(kind: str, folder: Path, rng) -> None:
    argv = layouts.write(kind, folder / "raw")
    spoil_one(folder / "raw", rng)
    argv += ["--out", str(folder / "data")]
    argv += [[], ["--split", "user"], ["--drop-untitled"], ["--min-rating", "2"]][int(rng.integers(4))]
    prepare_data.main(argv)
    layouts.check_rows(folder / "data")


def fuzz_picture(folder: Path, rng) -> None:
    picture = Image.fromarray(rng.integers(0, 256, (24, 31, 3), dtype=np.uint8))
    mode = str(rng.choice(["RGB", "L", "P", "1", "CMYK", "RGBA", "I;16"]))
    kinds = {"CMYK": ["JPEG"], "I;16": ["PNG"], "RGBA": ["PNG", "WEBP"], "P": ["PNG", "GIF", "BMP"]}
    kind = str(rng.choice(kinds.get(mode, ["JPEG", "PNG", "BMP"])))
    exif = Image.Exif()
    exif[0x0112] = int(rng.integers(0, 10))
    path = folder / "picture.jpg"
    options = {"exif": exif} if kind in ("JPEG", "PNG", "WEBP") else {}
    picture = picture.convert("L").convert("I;16") if mode == "I;16" else picture.convert(mode)
    picture.save(path, kind, **options)
    spoil_one(folder, rng)
    image = open_image(path)
    assert image.mode == "RGB" and len(image.tobytes()) == 3 * image.width * image.height


def fuzz_stages(folder: Path, rng) -> None:
    shutil.copytree(BASE / "data", folder / "data")
    names = ["items.jsonl", "test.jsonl", "sequences.jsonl", "histories.jsonl", "manifest.json"]
    scores = str(rng.choice(["scores.jsonl", "scores.inter"]))
    spoil_one(folder / "data", rng, {*names, scores} if rng.random() < 0.7 else {scores})
    if rng.random() < 0.8:  # with the right hashes, so that the contents are read too
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            sign(folder / "data")
    data = DataFolder(folder / "data")
    examples = data.examples("test")
    baseline_scores([*data.sequences().values()], len(data.items), examples)
    assert all(items for items, _ in data.histories().values())
    read, yes = exchange.read_scores(folder / "data" / scores, data.items.ids, examples)
    assert np.isfinite(read).all() and (yes is None or np.isfinite(yes).all())
    assert np.isfinite(list(measure(read, yes, target_columns(examples), resamples=2).values.values())).all()


def fuzz_run(folder: Path, rng) -> None:
    shutil.copytree(BASE / "run", folder / "run")
    spoil_one(folder / "run", rng)
    read_run(folder / "run")
    check_out(folder / "run", "sft", overwrite=True)


def fuzz_encoding(folder: Path, rng) -> None:
    shutil.copytree(BASE / "data", folder / "data")
    spoil_one(folder / "data" / "encoded", rng)
    data = Opened(folder / "data")
    for item in range(len(data.items.ids)):
        assert len(data.tokens.of(item)) == data.tokens.lengths[item]
        assert len(data.tokens.grids[item]) == 3


def make_base(folder: Path) -> None:
    """Write valid files between stages, to be spoilt: a data folder with encoding and scores, and a run folder."""
    import torch
    from safetensors.torch import save_file

    prepare_data.main([*layouts.write("csv", folder / "raw"), "--out", str(folder / "data")])
    count = len(layouts.lines(folder / "data" / "items.jsonl"))
    encoded = folder / "data" / "encoded" / "tiny"
    encoded.mkdir(parents=True)
    tensors = {"text": torch.rand(count, 4), "image": torch.rand(count, 4), "grid": torch.ones(count, 3).long()}
    tensors |= {
        "offsets": torch.arange(count + 1) * 2,
        "neutral": torch.rand(2, 4),
        "neutral_grid": torch.ones(3).long(),
    }
    save_file(tensors, encoded / "items.safetensors")
    save_file({"image_tokens": torch.rand(2 * count, 4)}, encoded / "image_tokens.safetensors")
    manifest = {"backbone": "tiny", "max_pixels": 784, "dtype": "float32", "tokens": "0"}
    manifest["items"] = file_hash(folder / "data" / "items.jsonl")
    write_json(encoded / "manifest.json", manifest)
    data, rng = Opened(folder / "data"), np.random.default_rng(0)
    examples = data.examples("test")
    scores = rng.random((len(examples), len(examples[0].candidates)))
    exchange.write_predictions(folder / "data" / "scores.jsonl", data.items.ids, examples, scores, scores)
    exchange.write_recbole(folder / "recbole", data.items, {"candidates": examples}, scores, {})
    (folder / "recbole" / "recbole.candidates.inter").rename(folder / "data" / "scores.inter")
    options = {"data": "d", "model": "tiny", "tasks": ["rank"], "max_length": 9, "candidate_images": False}
    options |= {"tune": "lora", "blank_images": False, "lora_rank": 8, "lora_alpha": 32, "lora_dropout": 0.05}
    write_json(folder / "run" / "config.json", {"stage": "sft", "options": options, "data": "0"})
    write_json(folder / "run" / "result.json", {"weights": "0"})


def one_input(number: int, folder: Path) -> tuple[str, str]:
    """Make the input of this number and read it. Returns (its kind, `well`, `refused` or the text of a finding)."""
    rng = np.random.default_rng(number)
    kind = KINDS[int(rng.integers(len(KINDS)))]
    errors = io.StringIO()
    signal.alarm(LIMIT)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if kind in layouts.LAYOUTS:
                fuzz_layout(kind, folder, rng)
            else:
                globals()[f"fuzz_{kind}"](folder, rng)
        return kind, "well"
    except SystemExit as stop:
        line = errors.getvalue()
        one_line = len(line.splitlines()) == 1 and "error: " in line and line.strip().isprintable()
        return kind, "refused" if stop.code == 2 and one_line else f"exit code {stop.code}, {line!r}"
    except BaseException as error:
        return kind, "refused" if getattr(error, "exit_code", None) == 2 else traceback.format_exc()
    finally:
        signal.alarm(0)


def out_of_time(*_):
    raise TimeoutError(f"took over {LIMIT} seconds")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000, help="number of inputs [10000]")
    parser.add_argument("--seed", type=int, default=0, help="number of the first input [0]")
    parser.add_argument("--replay", type=int, metavar="NUMBER", help="make only this input, and keep its files")
    options = parser.parse_args()
    signal.signal(signal.SIGALRM, out_of_time)
    prepare_data.encode = lambda options: None
    with contextlib.redirect_stdout(io.StringIO()):
        make_base(BASE)
    if options.replay is not None:
        kept = Path(tempfile.mkdtemp())
        print(kept, *one_input(options.replay, kept), sep="\n")
        return 0
    counts, findings, slowest, began = collections.Counter(), 0, (0.0, 0), time.perf_counter()
    for number in range(options.seed, options.seed + options.inputs):
        started = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=BASE) as folder:
            kind, outcome = one_input(number, Path(folder))
        slowest = max(slowest, (time.perf_counter() - started, number))
        counts[outcome if outcome in ("well", "refused") else "findings"] += 1
        if outcome not in ("well", "refused"):
            findings += 1
            print(f"--replay {number} ({kind}):\n{outcome}", flush=True)
    took = time.perf_counter() - began
    print(
        f"{options.inputs} inputs of {len(KINDS)} kinds: {counts['well']} were read, {counts['refused']} refused, "
        f"{findings} findings; {took:.0f} s, the slowest {slowest[0]:.2f} s (--replay {slowest[1]})"
    )
    return int(findings > 0)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as base:
        BASE = Path(base)
        sys.exit(main())
