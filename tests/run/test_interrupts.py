"""Ctrl-C ends each script with one line: while it imports its libraries, and in its main."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPTS = ["sft.py", "dpo_hano.py", "evaluate.py", "prepare_data.py", "hanorec.recommend", "hanorec.export"]
SCRIPTS += ["hanorec.ranking.sasrec", "mllm_srec.summarize", "mllm_srec.teach"]
# Python runs this before a script. The signal comes when the script imports the module; like numpy, the import turns
# KeyboardInterrupt into another error
SITE = """
import os, signal, sys
if os.environ["START"] == "default":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the shell's & may have ignored it
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["INTERRUPTED"]:
            try:
                os.kill(os.getpid(), signal.SIGINT)
                for _ in range(10):
                    pass
            except KeyboardInterrupt:
                raise ImportError("cannot load module more than once per process")
sys.meta_path.insert(0, Finder())
sys.modules.pop("argparse", None)
"""


def interrupted(folder, script, module, *argv, start="default"):
    """Run a script which gets Ctrl-C when it imports a module. Returns (exit code, the lines of stderr)."""
    (folder / "sitecustomize.py").write_text(SITE)
    environment = os.environ | {"PYTHONPATH": f"{folder}:{ROOT}", "INTERRUPTED": module, "START": start}
    words = [script] if script.endswith(".py") else ["-m", script]
    command = [sys.executable, *words, *map(str, argv)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.returncode, done.stderr.strip().splitlines()


@pytest.mark.parametrize("script", SCRIPTS)
def test_ctrl_c_during_the_first_import_ends_with_one_line(script, tmp_path):
    """argparse is the first module that the scripts import."""
    name = script if script.endswith(".py") else f"{script.split('.')[-1]}.py"
    assert interrupted(tmp_path, script, "argparse") == (-signal.SIGINT, [f"{name}: stopped"])


def test_ctrl_c_during_the_slow_imports_ends_with_one_line(prepared, sft_run, tmp_path):
    """After the options are checked, also where an import turns the exception into another one."""
    out = tmp_path / "out"
    for script, argv in {
        "sft.py": ["--data", prepared, "--out", out],
        "dpo_hano.py": ["--sft", sft_run, "--out", out],
        "evaluate.py": ["--run", sft_run],
        "hanorec.recommend": ["--run", sft_run, "--user", "1"],
        "hanorec.export": ["--run", sft_run, "--to", out],
    }.items():
        name = script if script.endswith(".py") else f"{script.split('.')[-1]}.py"
        assert interrupted(tmp_path, script, "torch", *argv) == (-signal.SIGINT, [f"{name}: stopped"])


def test_a_process_that_ignores_ctrl_c_goes_on(tmp_path):
    environment = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    code = environment + "from hanorec.run import interrupts; interrupts.stop_at_once(); interrupts.raise_again(); "
    code += "signal.raise_signal(signal.SIGINT); print('goes on')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "goes on" and not done.stderr


def test_ctrl_c_in_main_cleans_up_and_ends_with_one_line(tmp_path):
    """In main Ctrl-C is an exception, so that no half-written file stays."""
    code = "import os, signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "from hanorec.run import interrupts\ninterrupts.stop_at_once()\n"
    code += "from pathlib import Path\nfrom hanorec.run.files import one_line_errors, replacing\n"
    code += (
        "@one_line_errors\ndef parse(argv):\n    assert signal.getsignal(signal.SIGINT) is interrupts.end\nparse([])\n"
    )
    code += f"@one_line_errors\ndef main(argv):\n    with replacing(Path({str(tmp_path / 'file')!r})) as new:\n"
    code += "        new.touch()\n        os.kill(os.getpid(), signal.SIGINT)\nmain([])\n"
    done = subprocess.run([sys.executable, "-c", f"__file__ = 'evaluate.py'\n{code}"], capture_output=True, cwd=ROOT)
    assert done.returncode == -signal.SIGINT and done.stderr.decode().strip() == "evaluate.py: stopped"
    assert not list(tmp_path.iterdir())
