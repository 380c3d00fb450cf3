"""The shape of the project: the tree, imports, sizes of files and functions, and forbidden calls."""

import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

TOP = {"prepare_data", "sft", "dpo_hano", "evaluate", "hanorec_loss"}  # the Python files at the top level
STAGES = TOP - {"hanorec_loss"}
# A room imports only from itself and from the rooms before it
ROOMS = ["hanorec/run", "hanorec/data", "hanorec/model", "hanorec/ranking", "mllm_srec"]
SCRIPTS = {name: f"{name}.py" for name in STAGES} | {n: f"mllm_srec/{n}.py" for n in ("summarize", "teach")}
SCRIPTS |= {"sasrec": "hanorec/ranking/sasrec.py", "export": "hanorec/export.py", "recommend": "hanorec/recommend.py"}
REQUIRED = {"torch", "transformers", "peft", "accelerate", "PIL", "numpy"}
WITH_TRANSFORMERS = {"safetensors", "tokenizers", "huggingface_hub"}
OPTIONAL = {"pyarrow"}  # used if it is installed


def project_files():
    """{path without the ending: path} of every Python file outside tests/ and bench/."""
    paths = [*ROOT.glob("*.py"), *(ROOT / "hanorec").rglob("*.py"), *(ROOT / "mllm_srec").rglob("*.py")]
    return {path.relative_to(ROOT).with_suffix("").as_posix(): path for path in paths if path.name != "__init__.py"}


FILES = project_files()


def room_of(name):
    """The room of a file; "" for a file at the top level."""
    return max((room for room in ROOMS if name.startswith(f"{room}/")), default="")


def imported(path):
    """The modules that a file imports: project files by their path, others by their first name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{name.name}" for name in node.names]
        else:
            continue
        for name in names:
            own = [part for part in (name, name.rpartition(".")[0]) if part.replace(".", "/") in FILES]
            yield own[0].replace(".", "/") if own else name.split(".")[0]


def test_the_tree():
    assert {path.stem for path in ROOT.glob("*.py")} == TOP
    folders = {name.rpartition("/")[0] for name in FILES} - {""}
    assert folders - {"hanorec"} == set(ROOMS)  # hanorec itself is for entry points
    assert {"recipes", "docs", "bench", "configs", "tests"} <= {path.name for path in ROOT.iterdir() if path.is_dir()}
    for folder in folders | {"hanorec"}:
        assert (ROOT / folder / "__init__.py").read_text() == "", folder
    assert not [name for name in FILES if re.search(r"(utils|helpers|common)$", name)]


@pytest.mark.parametrize("name", sorted(FILES))
def test_imports_go_one_way(name):
    own = set(imported(FILES[name])) & set(FILES)
    assert not own & STAGES, f"{name} imports a stage"
    if name == "hanorec_loss":
        assert not own
    if room_of(name):
        allowed = ROOMS[: ROOMS.index(room_of(name)) + 1]
        assert not [other for other in own - {"hanorec_loss"} if room_of(other) not in allowed], name


def test_no_imports_form_a_circle():
    remaining = {name: set(imported(path)) & set(FILES) for name, path in FILES.items()}
    while remaining:
        ready = [name for name, needs in remaining.items() if not needs & set(remaining)]
        assert ready, f"a circle among {sorted(remaining)}"
        for name in ready:
            del remaining[name]


def test_only_listed_libraries_are_imported():
    outside = {name for path in FILES.values() for name in imported(path)} - set(FILES) - set(sys.stdlib_module_names)
    assert outside <= REQUIRED | WITH_TRANSFORMERS | OPTIONAL
    assert set(imported(FILES["hanorec_loss"])) - set(sys.stdlib_module_names) == {"torch"}
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    names = {re.split(r"[<>=]", line)[0] for line in lines if line and not line.startswith("#")}
    assert names == (REQUIRED - {"PIL"}) | {"pillow"}


@pytest.mark.parametrize("name", sorted(FILES))
def test_files_and_functions_are_short(name):
    text = FILES[name].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= (250 if name == "hanorec_loss" else 300)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            limit = 60 if node.name == "main" else 40
            assert node.end_lineno - node.lineno + 1 <= limit, f"{name}: {node.name}"


def test_nothing_is_unpickled_evaluated_or_given_to_a_shell():
    """No file imports a module for pickles or processes, or makes one of the calls that are listed here.

    torch.load is allowed with weights_only=True. The code of a backbone is trusted only by a variable named `trust`,
    and each call of an Auto class passes trust_remote_code.
    """
    forbidden = {"pickle", "marshal", "shelve", "dill", "joblib", "subprocess", "pty"}
    for path in FILES.values():
        assert not set(imported(path)) & forbidden, path.name
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called, options = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            assert called not in ("eval", "exec", "compile", "__import__", "os.system", "os.popen"), path.name
            assert not re.match(r"os\.(exec|spawn)", called), path.name
            assert called != "torch.load" or options.get("weights_only") == "True", path.name
            assert not called.endswith(("np.load", "numpy.load")) or "allow_pickle" not in options, path.name
            assert options.get("trust_remote_code", "trust") == "trust", path.name
            if called.startswith("Auto") and called.endswith(".from_pretrained"):
                assert "trust_remote_code" in options, path.name


def test_the_loss_carries_its_licence():
    assert (ROOT / "hanorec_loss.py").read_text().startswith("# SPDX-License-Identifier: MIT\n")


@pytest.mark.parametrize("script", sorted(SCRIPTS))
@pytest.mark.parametrize("mistake", [False, True])
def test_help_and_mistakes_do_not_load_the_heavy_libraries(script, mistake):
    code = f"import sys, runpy\nsys.argv = [{script!r}, {'--no-such-option' if mistake else '--help'!r}]\n"
    code += f"try:\n    runpy.run_path({SCRIPTS[script]!r}, run_name='__main__')\n"
    code += f"except SystemExit as stop:\n    assert stop.code == {2 if mistake else 0}\n"
    code += "assert not {'torch', 'transformers', 'peft', 'accelerate'} & set(sys.modules)\n"
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "error: unrecognized arguments" in result.stderr if mistake else "usage:" in result.stdout


def test_ci_runs_the_readmes_test_command():
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    assert "make test" in (ROOT / "README.md").read_text()
