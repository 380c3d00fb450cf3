"""Scripts on full and on read-only disks."""

import resource
import shutil
import subprocess

import layouts
import pytest
from spoilt import refused

import dpo_hano
import evaluate
import prepare_data
import sft


@pytest.fixture
def disk(tmp_path):
    """A function that mounts a small disk. The test is skipped if mounting is not allowed."""
    mounted = []

    def mount(size):
        folder = tmp_path / "disk"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a file system is not permitted here")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("size", ["4k", "8k", "24k", "48k", "96k", "1m", "2m"])
def test_preparing_onto_a_full_disk(size, disk, tmp_path, capsys):
    argv = [*layouts.write("csv", tmp_path / "raw", images=True), "--out", disk(size) / "data", "--max-pixels", 784]
    error = refused(capsys, prepare_data.main, *argv)
    assert "No space left on device" in error or "bytes free; give --tokens live" in error
    assert not list((tmp_path / "disk").rglob("*.partial"))


@pytest.mark.parametrize("size", ["4k", "16k", "1m"])
def test_training_and_evaluating_on_a_full_disk(size, disk, prepared, lora_run, tmp_path, capsys):
    folder = disk(size)
    argv = ["--data", prepared, "--out", folder / "sft", "--max-steps", 1, "--batch-size", 2, "--eval-limit", 2]
    assert "No space left on device" in refused(capsys, sft.main, *argv, "--warmup-steps", 0)
    shutil.rmtree(folder / "sft")
    if size == "1m":
        shutil.copytree(lora_run, folder / "run")
        with open(folder / "rest", "wb", buffering=0) as file, pytest.raises(OSError):
            while True:
                file.write(bytes(4096))
        error = refused(capsys, evaluate.main, "--run", folder / "run")
        assert "predictions.jsonl: No space left on device; make room" in error


def test_read_only_disks(disk, prepared, lora_run, tmp_path, capsys):
    folder = disk("4m")
    shutil.copytree(lora_run, folder / "run")
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    argv = ["--data", prepared, "--out", folder / "sft", "--max-steps", 1, "--batch-size", 2]
    assert "sft cannot be written" in refused(capsys, sft.main, *argv, "--warmup-steps", 0)
    assert "data cannot be written" in refused(capsys, prepare_data.main, "--out", folder / "data")
    assert "metrics.json" in refused(capsys, evaluate.main, "--run", folder / "run", "--limit", 2)
    dpo = ["--sft", folder / "run", "--out", tmp_path / "dpo", "--max-steps", 1, "--batch-size", 3]
    assert "Read-only file system" in refused(capsys, dpo_hano.main, *dpo)  # the reference is kept in the SFT run


@pytest.mark.parametrize("limit", [100, 3000, 100_000, 1_000_000])
def test_a_limit_on_file_sizes(limit, tmp_path, capsys):
    """Every write beyond the limit fails, as on a full disk. This test runs without mounting a disk."""
    argv = [*layouts.write("csv", tmp_path / "raw", images=True), "--out", tmp_path / "data", "--max-pixels", 784]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        error = refused(capsys, prepare_data.main, *argv)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "File too large" in error and not list((tmp_path / "data").rglob("*.partial"))
