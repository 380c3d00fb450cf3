"""The project's shape: who imports whom, how long files are, what the README and the docstrings promise."""

import ast
import importlib
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

# Which local files each file at the top may import
IMPORTS = {
    "hanorec_loss": set(),
    "backbones": set(),
    "lora": set(),
    "mllm": {"backbones", "lora"},
    "attention": set(),
    "packing": {"attention", "backbones", "mllm", "prompts"},
    "prompts": set(),
    "runs": set(),
    "checkpoints": {"runs"},
    "training": {"checkpoints", "runs"},
    "demo": {"prompts", "readers", "runs", "srec"},
    "readers": {"runs"},
    "metrics": set(),
    "exchange": {"readers", "runs"},
    "prepare_data": {"mllm", "packing", "prompts", "runs", "demo", "readers"},
    "evaluate": {"metrics", "mllm", "packing", "prompts", "runs", "exchange", "srec"},
    "records": {"runs"},
    "writers": {"backbones", "mllm"},
    "server": {"mllm", "runs", "writers"},
    "srec": {"prompts", "runs"},
    "summarize": {"evaluate", "mllm", "packing", "records", "runs", "server", "srec", "writers"},
    "teach": {"checkpoints", "evaluate", "mllm", "packing", "prompts", "runs", "sft", "srec", "training"},
    "sft": {"checkpoints", "mllm", "packing", "runs", "training", "evaluate"},
    "dpo_hano": {"checkpoints", "mllm", "packing", "runs", "training", "evaluate", "hanorec_loss"},
}
SCRIPTS = {"prepare_data", "summarize", "teach", "sft", "dpo_hano", "evaluate"}
REQUIRED = {"torch", "transformers", "peft", "accelerate", "PIL", "numpy"}
WITH_TRANSFORMERS = {"safetensors", "tokenizers"}
MODULES = {name: name for name in SCRIPTS} | {name: f"mllm_srec.{name}" for name in ("summarize", "teach")}
OPTIONAL = {"pyarrow"}  # where it is installed


def project_files():
    """Every Python file outside tests/ and bench/, by its path without the ending."""
    folders = [ROOT.glob("*.py"), (ROOT / "hanorec").rglob("*.py"), (ROOT / "mllm_srec").rglob("*.py")]
    paths = [path for folder in folders for path in folder if path.name != "__init__.py"]
    return {path.relative_to(ROOT).with_suffix("").as_posix(): path for path in paths}


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
            own = [part for part in (name, name.rpartition(".")[0]) if part.replace(".", "/") in project_files()]
            yield own[0].replace(".", "/") if own else name.split(".")[0]


def test_import_tree():
    files = project_files()
    assert {path.split("/")[-1] for path in files} == set(IMPORTS)
    for name, path in files.items():
        local = {other.split("/")[-1] for other in set(imported(path)) & set(files)}
        allowed = IMPORTS[name.split("/")[-1]]
        assert local <= allowed, f"{path.name} imports {local - allowed}"
    outside = {name for path in files.values() for name in imported(path)} - set(files) - set(sys.stdlib_module_names)
    assert outside <= REQUIRED | WITH_TRANSFORMERS | OPTIONAL
    assert set(imported(files["hanorec_loss"])) - set(sys.stdlib_module_names) == {"torch"}
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    names = {re.split(r"[<>=]", line)[0] for line in lines if line and not line.startswith("#")}
    assert names == (REQUIRED - {"PIL"}) | {"pillow"}


def test_nothing_is_unpickled_evaluated_or_given_to_a_shell():
    """JSON and safetensors only, and no process started."""
    for path in project_files().values():
        assert not set(imported(path)) & {"pickle", "marshal", "shelve", "dill", "joblib", "subprocess", "pty"}, (
            path.name
        )
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
                assert "trust_remote_code" in options or "further" in ast.unparse(node), path.name


def test_sizes():
    for path in project_files().values():
        limit = 250 if path.stem == "hanorec_loss" else 400
        assert len(path.read_text(encoding="utf-8").splitlines()) <= limit, path.name


def test_the_loss_carries_its_licence():
    assert (ROOT / "hanorec_loss.py").read_text().startswith("# SPDX-License-Identifier: MIT\n")


def commands():
    """Every command of the README's code blocks and of the scripts' docstrings, as (script, words)."""
    texts = re.findall(r"```\w*\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    texts += [ast.get_docstring(ast.parse(path.read_text())) or "" for path in project_files().values()]
    texts += re.findall(r"`([^`\n]+)`", (ROOT / "README.md").read_text(encoding="utf-8"))
    for text in texts:
        for line in text.replace("\\\n", " ").splitlines():
            match = re.search(r"(?:python|accelerate launch.*?) (?:-m mllm_srec\.)?(\w+)(?:\.py)?\b(.*)", line)
            if match and match[1] in IMPORTS:
                yield match[1], shlex.split(match[2], comments=True)


def test_every_command_in_the_documents_is_parsed_by_its_script():
    found = list(commands())
    assert len(found) > 20 and {script for script, _ in found} == SCRIPTS
    for script, words in found:
        importlib.import_module(MODULES[script]).parse(words)


def test_every_option_named_in_the_readme_exists():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    scripts = project_files().values()
    known = set(re.findall(r'"(--[\w-]+)"', "".join(path.read_text() for path in scripts)))
    launcher = {"--multi_gpu", "--num_processes", "--cpu", "--config_file"}
    assert set(re.findall(r"--[a-z][\w-]*", text)) - known - launcher == set()


def test_make_targets_in_the_readme_exist():
    text, rules = (ROOT / "README.md").read_text(encoding="utf-8"), (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"^make (\w+)", text, re.M)):
        assert re.search(rf"^{target}:", rules, re.M), target
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_the_readmes_example_of_the_loss_runs_beside_a_copy(tmp_path):
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    (tmp_path / "hanorec_loss.py").write_text((ROOT / "hanorec_loss.py").read_text())
    (tmp_path / "example.py").write_text(example + "\nassert losses.shape == (64,) and float(metrics['eta']) > 0\n")
    subprocess.run([sys.executable, "example.py"], cwd=tmp_path, check=True)


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_help_and_mistakes_answer_without_the_heavy_libraries(script):
    code = f"import sys, {MODULES[script]} as script\ntry:\n    script.main(['--help'])\n"
    code += "except SystemExit as stop:\n    assert stop.code == 0\n"
    code += "assert not {'torch', 'transformers', 'peft', 'accelerate'} & set(sys.modules)\n"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "usage:" in result.stdout
