"""The documents agree with the code.

Every command in them is parsed by its script. Every option, file, test, link and metric that they name exists.
"""

import ast
import contextlib
import importlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from functools import cache

import pytest
from conftest import ROOT
from PIL import Image

MODULES = {
    "prepare_data": "prepare_data",
    "sft": "sft",
    "dpo_hano": "dpo_hano",
    "evaluate": "evaluate",
    "summarize": "mllm_srec.summarize",
    "teach": "mllm_srec.teach",
    "sasrec": "hanorec.ranking.sasrec",
    "export": "hanorec.export",
    "recommend": "hanorec.recommend",
}
README = ROOT / "README.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = sorted((ROOT / "recipes").glob("*.sh"))
BACKBONES = ["Qwen/Qwen2-VL-2B-Instruct", "Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct"]
BACKBONES += ["llava-hf/llava-v1.6-vicuna-7b-hf", "llava-hf/llava-v1.6-mistral-7b-hf"]
# Counters in manifest.json and names of splits; they look like names of tests
COUNTERS = {"test_rows", "test_hard", "test_popularity", "test_99"}
LAUNCHER = {"--multi_gpu", "--num_processes", "--cpu", "--config_file", "--no-deps"}  # of accelerate launch and pip
BLOCK = re.compile(r"^```\w*\n(.*?)^```$", re.M | re.S)
INLINE = re.compile(r"(`+)(.+?)\1", re.S)


def read(path):
    return path.read_text(encoding="utf-8")


def code_of(document):
    """Every line of a document's code blocks, and every piece of its inline code."""
    text = read(document)
    for block in BLOCK.findall(text):
        yield from block.replace("\\\n", " ").splitlines()
    for _, piece in INLINE.findall(BLOCK.sub("", text)):
        yield " ".join(piece.split())


def command_of(words):
    """Split the words of a command line into (script, its arguments). None if the line starts no Python script.

    The script is a name in MODULES, or the path of another script. `VARIABLE=value` and `taskset -c N` may stand before
    the command, and the options of `accelerate launch` before the script.
    """
    words = list(words)
    while words and (re.fullmatch(r"\w+=\S*", words[0]) or words[0] == "taskset"):
        words = words[3:] if words[0] == "taskset" else words[1:]
    if words[:2] == ["accelerate", "launch"]:
        while words and words[0] != "-m" and not words[0].endswith(".py"):
            words = words[1:]
    elif words[:1] == ["python"]:
        words = words[1:]
    elif not words or words[0].removesuffix(".py") not in MODULES or len(words) == 1:
        return None  # inline code such as `sft.py`, without options, is a file's name
    if words[:1] == ["-m"]:
        return words[1].rpartition(".")[2], words[2:]
    if not words or not words[0].endswith(".py"):
        return None
    name = words[0].removesuffix(".py")
    return (name if name in MODULES else words[0]), words[1:]


def commands():
    """Yield (file, script, arguments) of every command in the documents, the Makefile and the docstrings."""
    lines = [(document.name, line) for document in DOCUMENTS for line in code_of(document)]
    for module in MODULES.values():
        path = ROOT / (module.replace(".", "/") + ".py")
        docstring = ast.get_docstring(ast.parse(read(path))) or ""
        starts = re.findall(r"^\s*((?:python|accelerate) .*)$", docstring, re.M)
        lines += [(path.name, line) for line in starts]
    makefile = read(ROOT / "Makefile").replace("$(BIN)/", "")
    lines += [("Makefile", line.strip()) for line in makefile.splitlines() if line.startswith("\t")]
    for file, line in lines:
        try:
            command = command_of(shlex.split(line, comments=True))
        except ValueError:  # a line with an apostrophe is no command
            continue
        if command and command[0] != "pip":
            yield file, *command


def parse(script, words, file):
    """Parse the words with the script's own parser. If it fails, the test fails and names the file."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return importlib.import_module(MODULES[script]).parse(words)
    except SystemExit:
        pytest.fail(f"{file}: {script} {shlex.join(words)}: {errors.getvalue().strip()}")


@cache
def help_of(script):
    """The text that a script's --help prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
        importlib.import_module(MODULES[script]).parse(["--help"])
    return printed.getvalue()


def test_the_readme_is_short_and_has_one_python_example():
    assert len(read(README).splitlines()) <= 220
    assert read(README).count("```python\n") == 1


def test_the_readme_shows_a_shop_from_its_tables_to_the_page():
    """Installing, two heads, five commands, what is printed, who else can get recommendations, and the page."""
    _, _, section = read(README).partition("## Your own shop in five commands\n")
    section = section.partition("\n## ")[0]
    assert "user,item,timestamp" in section and "item,title" in section and "make install" in section
    scripts = re.findall(r"^python (?:-m )?(\S+) --", section, re.M)[:5]
    assert scripts == ["prepare_data.py", "sft.py", "dpo_hano.py", "hanorec.recommend", "evaluate.py"]
    for text in ("3 of 68 candidates, ranked by", "**Recommending.**", "--history", "--users all", "**Look at it.**"):
        assert text in section, text
    assert "doi       = {10.1145/3805712.3809590}" in read(README)


def test_on_one_device_the_readme_starts_no_launcher():
    launched = [line for line in code_of(README) if "accelerate launch" in line]
    assert launched and all("--num_processes" in line or line == "accelerate launch" for line in launched)


def test_the_messages_in_the_readme_are_those_of_the_code():
    _, _, section = read(README).partition("## If something fails\n")
    messages = re.findall(r"^\| `(.+?)` \|", section.partition("\n## ")[0], re.M)
    code = "".join(map(read, [*ROOT.glob("*.py"), *(ROOT / "hanorec").rglob("*.py")]))
    assert len(messages) == 6 and [text for text in messages if text not in code] == []


def test_every_command_in_the_documents_is_parsed_by_its_script():
    found = list(commands())
    assert {script for _, script, _ in found} >= set(MODULES)
    assert {"README.md", "Makefile"} <= {file for file, _, _ in found}
    for file, script, words in found:
        if script in MODULES:
            parse(script, words, file)
        elif script not in ("pytest", "venv"):
            assert (ROOT / script).exists(), f"{file} runs {script}, which does not exist"


def test_every_option_named_in_the_documents_exists():
    options = set(re.findall(r"--[a-z][\w-]*", "".join(map(help_of, MODULES))))
    tools = [*ROOT.glob("bench/*.py"), *ROOT.rglob("tests/**/*.py")]
    options |= set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', "".join(map(read, tools))))
    for document in DOCUMENTS:
        named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", read(document)))
        assert named - options - LAUNCHER == set(), document.name


@pytest.mark.parametrize(
    ("script", "pages"),
    [
        ("prepare_data", ["data"]),
        ("sft", ["training"]),
        ("dpo_hano", ["training"]),
        ("evaluate", ["evaluation"]),
        ("sasrec", ["evaluation"]),
        ("export", ["training"]),
        ("recommend", ["recommending"]),
        ("summarize", ["mllm_srec"]),
        ("teach", ["mllm_srec", "training"]),
    ],
)
def test_every_option_is_documented(script, pages):
    text = "".join(read(ROOT / "docs" / f"{page}.md") for page in pages)
    options = set(re.findall(r"^  (--[a-z][\w-]*)", help_of(script), re.M))
    named = set(re.findall(r"--[a-z][\w-]*", text))
    assert options and options - named == set()


def test_make_targets_in_the_documents_exist():
    rules = read(ROOT / "Makefile")
    code = [line for document in DOCUMENTS for line in code_of(document)]
    targets = {line.split()[1] for line in code if re.match(r"make \w", line)}
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", rules, re.M), target
    assert "make test" in read(ROOT / ".ci" / "run")


def anchors(document):
    """The anchors of a document's headings, as GitHub writes them."""
    headings = re.findall(r"^#+ +(.+?) *$", BLOCK.sub("", read(document)), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_resolve(document):
    text = INLINE.sub("", BLOCK.sub("", read(document)))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        path = document.parent / name if name else document
        assert path.exists(), f"{document.name}: {link}"
        assert not anchor or anchor in anchors(path), f"{document.name}: {link}"


def test_every_document_is_reached_from_the_readme():
    for path in [*DOCUMENTS[1:], *RECIPES]:
        assert path.relative_to(ROOT).as_posix() in read(README), path.name


def test_tests_named_in_the_documents_exist():
    tests = "".join(map(read, (ROOT / "tests").rglob("test_*.py")))
    defined = set(re.findall(r"def (test_\w+)", tests))
    for document in DOCUMENTS:
        named = set(re.findall(r"`(test_\w+)`", read(document)))
        assert named - defined - COUNTERS == set(), document.name


def test_files_named_in_the_documents_exist():
    named = re.compile(r"`((?:hanorec|mllm_srec|tests|bench|docs|recipes|configs)/[\w./-]*)`")
    for document in DOCUMENTS:
        for path in named.findall(read(document)):
            assert (ROOT / path).exists(), f"{document.name} names {path}"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_recipes_are_valid_and_their_commands_parse(recipe, tmp_path):
    """The recipe runs in bash, with a `python` and an `accelerate` that only write down how they were called."""
    subprocess.run(["bash", "-n", recipe], check=True)
    assert "\nset -euo pipefail\n" in read(recipe)
    for name in ("python", "accelerate"):
        stub = tmp_path / "bin" / name
        stub.parent.mkdir(exist_ok=True)
        stub.write_text(f'#!/usr/bin/env bash\nprintf "%q " {name} "$@" >> "$CALLS"\necho >> "$CALLS"\n')
        stub.chmod(0o755)
    for number, backbone in enumerate(BACKBONES):
        calls = tmp_path / f"calls-{number}"
        names = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "BACKBONE": backbone, "CALLS": str(calls)}
        subprocess.run(["bash", recipe], cwd=tmp_path, env=os.environ | names, check=True)
        found = [command_of(shlex.split(line)) for line in read(calls).splitlines()]
        assert found[-1][0] == "evaluate" and len(found) > 3
        for script, words in found:
            parse(script, words, recipe.name)
        assert backbone.split("/")[1] in read(calls)


def test_the_example_of_the_loss_runs_beside_a_copy(tmp_path):
    pytest.importorskip("torch")
    (example,) = re.findall(r"```python\n(.*?)```", read(README), re.S)
    (tmp_path / "hanorec_loss.py").write_text(read(ROOT / "hanorec_loss.py"))
    (tmp_path / "example.py").write_text(example + "\nassert losses.shape == (64,) and float(metrics['eta']) > 0\n")
    subprocess.run([sys.executable, "example.py"], cwd=tmp_path, check=True)


def test_every_metric_that_training_logs_is_explained(sft_run):
    torch = pytest.importorskip("torch")
    from hanorec_loss import hanorec_loss

    _, metrics = hanorec_loss(*torch.zeros(5, 4))
    names = {*metrics, "noise", "pairs_per_second"}
    for line in map(json.loads, read(sft_run / "metrics.jsonl").splitlines()):
        names |= {re.sub("^val_(?!select).*", "val_...", name) for name in line}
    assert {"loss", "grad_norm", "lr", "samples_per_second", "val_..."} <= names
    for name in sorted(names):
        assert f"`{name}`" in read(ROOT / "docs" / "training.md"), f"docs/training.md does not explain {name}"


def test_the_picture_is_drawn_for_long_titles_and_without_posters(tmp_path):
    """Long titles and missing posters do not change the size of the picture."""
    items = [
        {"item": str(n), "title": f"The {'very ' * n}long title, part {n} (19{n:02})", "image": None} for n in range(12)
    ]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    example = {"user": "u", "history": ["1", "9", "3"], "target": "4", "candidates": ["4", "2", "11"], "rejected": "2"}
    (tmp_path / "test.jsonl").write_text(json.dumps(example) + "\n")
    scores = {"user": "u", "target": "4", "candidates": example["candidates"], "scores": [-3.5, -2.25, -900.0]}
    (tmp_path / "predictions.jsonl").write_text(json.dumps(scores) + "\n")
    (tmp_path / "config.json").write_text(json.dumps({"options": {"data": str(tmp_path)}}))
    words = ["--run", tmp_path, "--out", tmp_path / "ranked.png"]
    subprocess.run([sys.executable, ROOT / "bench" / "picture.py", *words], check=True)
    with Image.open(tmp_path / "ranked.png") as picture:
        assert picture.size == (900, 390)
    assert (tmp_path / "ranked.png").stat().st_size < 60_000


def test_the_next_commands_that_stages_print_are_parsed_by_their_scripts():
    from hanorec.run.runs import NEXT

    for stage, command in NEXT.items():
        script, words = command_of(shlex.split(re.sub(r"{\w+}", "runs/x", command)))
        parse(script, words, f"next after {stage}")
