"""The run folder and what every script needs: options kept and inherited, atomic writes, locks, one-line errors, the
accelerator."""

import argparse
import contextlib
import errno
import fcntl
import functools
import hashlib
import importlib.metadata
import io
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path


class UserError(ValueError):
    """A mistake of the user's; the message says what is wrong, where, and what to do."""

    exit_code = 2


def printable(text) -> str:
    r"""Text from the data for a terminal: on one line, control characters and marks of direction escaped.

    >>> printable("a\x1b[2Jb\u202ec\n")
    'a\\x1b[2Jb\\u202ec\\n'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(text))


UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}


def unwritable(error: Exception) -> str | None:
    """What is wrong with the disk, where that is what the error says, and which file it was."""
    told = re.search(r"\(os error (\d+)\)", str(error))  # libraries in Rust keep the number in their text alone
    number = error.errno if isinstance(error, OSError) else int(told[1]) if told else None
    if number not in UNWRITABLE:
        return None
    where = getattr(error, "filename", None) or ", ".join(getattr(error, "__notes__", ["a file"]))
    return f"{where}: {os.strerror(number)}; make room or give leave to write there, or choose another folder"


LONGEST_MESSAGE = 1000  # characters; a message may quote a line of a file, which may be of any length


def one_line_errors(main: Callable) -> Callable:
    """Wrap a script's main: an error that has an `exit_code`, or of a disk that is full or read-only, ends in one line
    on stderr and that code."""

    @functools.wraps(main)
    def wrapped(argv: list[str] | None = None):
        if isinstance(sys.stdout, io.TextIOWrapper):  # a title may not be in the terminal's encoding
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            return main(argv)
        except Exception as error:
            disk = unwritable(error)
            code = UserError.exit_code if disk else getattr(error, "exit_code", None)
            if code is None:
                raise
            message = printable(" ".join((disk or str(error)).split()))
            if len(message) > LONGEST_MESSAGE:
                message = f"{message[: LONGEST_MESSAGE // 2]} ... {message[-LONGEST_MESSAGE // 2 :]}"
            print(f"{Path(sys.modules[main.__module__].__file__).name}: error: {message}", file=sys.stderr, flush=True)
            raise SystemExit(code) from error

    return wrapped


def beside_name(path: Path, kind: str) -> Path:
    """A name beside `path` that nobody reads; `locked` clears away what a kill leaves under such names."""
    return path.with_name(f".{path.name}.{os.getpid()}.{kind}.partial")


def to_disk(path: Path) -> None:
    """Wait until the disk holds a file, or a folder with all in it, so that no power cut can take it back."""
    for each in [path, *path.rglob("*")]:
        descriptor = os.open(each, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def clear(path: Path) -> None:
    """Remove a file or a folder that may be there."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def remove(folder: Path) -> None:
    """Remove a folder that may be there; to a reader it is gone at once, whole."""
    if folder.exists():
        os.replace(folder, gone := beside_name(folder, "old"))
        clear(gone)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write a file or a folder at; it takes the final name once the block has ended well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside, old = beside_name(path, "new"), beside_name(path, "old")
    clear(beside)  # of a process of this number that was killed
    try:
        yield beside
        to_disk(beside)
        if path.is_dir():
            os.replace(path, old)
        os.replace(beside, path)
        parent = os.open(path.parent, os.O_RDONLY)
        os.fsync(parent)  # the new name too
        os.close(parent)
    except Exception as error:
        error.add_note(str(path))
        raise
    finally:
        clear(beside)
        clear(old)


def write_json(path: Path, value) -> None:
    with replacing(path) as beside:
        beside.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_jsonl(path: Path, rows: Iterable) -> None:
    """Write rows (dicts, or lines already in JSON) to `path`."""
    with replacing(path) as beside, open(beside, "w", encoding="utf-8") as file:
        file.writelines((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows)


# The fields of the files between stages that others read, and their types
ITEM = {"item": str, "title": str, "image": (str, type(None))}
ROW = {"user": str, "history": list, "target": str, "candidates": list, "rejected": str}
RUN = {"stage": str, "options": dict, "data": str}
RUN_OPTIONS = {"data": str, "model": str, "tasks": list, "max_length": int, "candidate_images": bool}
RUN_OPTIONS |= {"blank_images": bool, "lora_rank": int, "lora_alpha": int, "lora_dropout": (int, float)}
STAGES = {"sft": RUN_OPTIONS | {"tune": str}, "dpo_hano": RUN_OPTIONS | {"sft": str}}
STAGES["teach"] = {"data": str, "model": str, "tune": str, "share": (int, float), "seed": int}


def require(value, fields: dict, where: str, remedy: str) -> dict:
    """`value`, an object that has these fields of these types; UserError with the remedy where it is none."""
    if not isinstance(value, dict):
        raise UserError(f"{where}: no JSON object; {remedy}")
    for name, kind in fields.items():
        if name not in value:
            raise UserError(f"{where}: no {name!r}; {remedy}")
        if not isinstance(value[name], kind):
            raise UserError(f"{where}: {name!r} cannot be {json.dumps(value[name])}; {remedy}")
    return value


def read_json(path: Path, fields: dict, remedy: str) -> dict:
    """The JSON object in `path` with these fields (name to type); UserError where it is missing or broken."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; {remedy}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}); {remedy}") from error
    return require(value, fields, str(path), remedy)


def read_jsonl(path: Path, fields: dict, remedy: str) -> list[dict]:
    """The rows of `path`, each with these fields (name to type); UserError names the line that is broken."""
    rows = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                rows.append(require(json.loads(line), fields, f"{path}, line {number}", remedy))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; {remedy}") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path}, line {len(rows) + 1}: not JSON ({error}); {remedy}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); {remedy}") from error
    return rows


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def value_hash(value) -> str:
    """SHA-256 of a JSON value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` (made where absent) for one writer at a time; UserError where another holds it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "w")  # closed below; its lock ends with it, also by a kill
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error}); choose another --out") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"{folder} is in use by another process; wait for it, or choose another --out") from error
        for left in [*folder.glob(".*.partial"), *folder.glob("*/.*.partial")]:  # by a writer that was killed
            clear(left)
        yield


def weights_hash(run: Path) -> str:
    """SHA-256 over the weight files that a run ended with."""
    files = sorted([*run.glob("adapter/*.safetensors"), *run.glob("model/*.safetensors")])
    return value_hash([file_hash(path) for path in files])


def plain(options: argparse.Namespace) -> dict:
    """The options as JSON values."""
    return {name: str(v) if isinstance(v, Path) else v for name, v in vars(options).items()}


def check_out(out: Path, stage: str) -> None:
    """UserError where `out` holds something else than an earlier run of this stage."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file, not a folder; choose another --out")
    if any(not path.name.startswith(".") for path in out.glob("*")):
        config = out / "config.json"
        before = read_json(config, {}, "choose another --out") if config.exists() else {}
        if before.get("stage") != stage:
            raise UserError(f"{out} holds files but is no run folder of {stage}.py; choose another --out")


def versions() -> dict[str, str]:
    """Of the libraries that compute."""
    return {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "accelerate")}


def begin_run(out: Path, stage: str, options: dict, **facts) -> None:
    """Write out/config.json for a run that starts, and drop what an earlier run of that name left. Refuses a folder
    that holds something else."""
    check_out(out, stage)
    (out / "result.json").unlink(missing_ok=True)  # first: from here on the run is unfinished
    remove(out / "checkpoints")  # and has none, before the options are those of the new run
    write_json(out / "config.json", {"stage": stage, "options": options, **facts, "versions": versions()})
    for pattern in ("metrics.jsonl", "*metrics.json", "*predictions.jsonl"):
        for old in out.glob(pattern):
            old.unlink()
    for old in ("adapter", "model", "reference"):
        remove(out / old)


def read_run(run: Path, stages: Iterable[str] = ("sft", "dpo_hano")) -> dict:
    """The config of a finished run folder; UserError where it is none, unfinished, or of another stage."""
    run = Path(run)
    stages = tuple(stages)
    makers = " or ".join(f"{stage}.py" for stage in stages)
    remedy = f"give a run folder, as {makers} writes it"
    if inside := sorted(str(path.parent) for path in run.glob("*/config.json")):
        remedy += f" (there are {', '.join(inside)})"
    config = read_json(run / "config.json", {}, remedy)
    if config.get("stage") not in stages:
        raise UserError(f"{run} is no run of {makers}; give a run folder that it wrote")
    if not (run / "result.json").exists():
        raise UserError(f"{run} is not finished (no result.json); give its own command again, which continues it")
    require(config, RUN, f"{run}/config.json", remedy)
    require(config["options"], STAGES[config["stage"]], f"{run}/config.json", remedy)
    if config["options"].get("tasks", ["rank"]) not in (["rank"], ["yesno"], ["rank", "yesno"]):
        raise UserError(f"{run}/config.json: unknown tasks; {remedy}")
    return config


def inherit(options: argparse.Namespace, config: dict, names: Iterable[str], source: Path) -> None:
    """Fill the options that were not given (None) from the run before, and print which."""
    taken = {}
    for name in names:
        if getattr(options, name, None) is None and name in config["options"]:
            taken[name] = config["options"][name]
            setattr(options, name, taken[name])
    taken = {name: value for name, value in taken.items() if value is not None}
    if taken and int(os.environ.get("RANK", 0)) == 0:
        shown = {name.replace("_", "-"): " ".join(v) if isinstance(v, list) else v for name, v in taken.items()}
        print(printable(f"from {source}: " + ", ".join(f"{name} {value}" for name, value in shown.items())))


def bounded(kind: type, low: float, high: float = math.inf, open_below: bool = False) -> Callable:
    """An argparse type: a number of this kind with low <= number < high (low < number if open_below)."""

    def parse(text: str):
        value = kind(text)
        if not (low < value if open_below else low <= value) or not value < high:
            limits = f"from {low} {'excluded ' * open_below}to below {high}"
            raise argparse.ArgumentTypeError(f"{text} is out of range: {limits}")
        return value

    parse.__name__ = kind.__name__  # argparse names it where the text is no number at all
    return parse


positive_int, non_negative_int = bounded(int, 1, 2**31), bounded(int, 0, 2**31)
positive_float, non_negative_float = bounded(float, 0, 1e36, open_below=True), bounded(float, 0, 1e36)
probability = bounded(float, 0, 1)


def add_trust_option(parser) -> None:
    """--trust-remote-code. It is never inherited: a run folder may come from somebody else."""
    told = "run the Python code that comes with the backbone; each command needs it anew"
    parser.add_argument("--trust-remote-code", action="store_true", help=told)


class Parser(argparse.ArgumentParser):
    """Shows the script's docstring as it is, takes no abbreviations, and answers a mistake in one line."""

    def __init__(self, doc: str):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")


def set_defaults(options: argparse.Namespace, **defaults) -> None:
    """Give options that are still None their value."""
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)


def start_accelerator(mixed_precision: str = "no", report_to: str | None = None, out: Path | None = None):
    """An Accelerator with the processes the launcher was asked for; on a CPU alone, with all its threads."""
    import torch
    from accelerate import Accelerator
    from accelerate.tracking import get_available_trackers

    if report_to and report_to not in [str(t.value) for t in get_available_trackers()]:
        raise UserError(f"--report-to {report_to}: accelerate knows no such tracker, or its package is not installed")
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"  # which has the precision of its config file
    precision = None if deepspeed else mixed_precision
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.accelerator.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"  # else each process would run by itself
    accelerator = Accelerator(mixed_precision=precision, log_with=report_to, project_dir=out)
    if deepspeed:
        from transformers.integrations import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()  # weights are loaded whole and checked, then shared out
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1  # any number will do
    asked = launched_processes()
    if asked > accelerator.num_processes:
        raise UserError(
            f"the launcher was asked for {asked} processes but started {accelerator.num_processes}; several CPU "
            f"processes are accelerate launch --multi_gpu --num_processes {asked} ..."
        )
    if accelerator.device.type == "cpu" and accelerator.num_processes == 1 and not threads_are_chosen():
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(cores)  # the launcher sets one thread where it is not told
    return accelerator


def launcher() -> list[str]:
    """The command line of the `accelerate launch` that started this process; empty where there is none to be seen."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text().rstrip("\0").split("\0")
    except OSError:
        return []
    return words if "launch" in words else []


def threads_are_chosen() -> bool:
    """Whether the user set OMP_NUM_THREADS. A launcher sets it too: then its own environment tells."""
    if not launcher():
        return "OMP_NUM_THREADS" in os.environ
    environment = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
    return any(entry.startswith(b"OMP_NUM_THREADS=") for entry in environment)


def launched_processes() -> int:
    """--num_processes of the `accelerate launch` that started this process, 1 where there is none to be seen."""
    words = launcher()
    for flag, value in zip(words, [*words[1:], ""], strict=False):
        name, _, inline = flag.replace("-", "_").partition("=")
        if name == "__num_processes":
            return int(inline or value or 1)
    return 1


def shared_out(chunks: list, accelerator) -> list:
    """This process's of the chunks: as many on every process, which sharded weights need, so that some come twice."""
    world = accelerator.num_processes
    rounds = -(-len(chunks) // world)
    return [chunks[(i * world + accelerator.process_index) % len(chunks)] for i in range(rounds)]
