"""Python code and pickles in a backbone's folder."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from spoilt import refused

import dpo_hano
import evaluate
import prepare_data
import sft
from hanorec import export

CODE = """from pathlib import Path
Path(__file__).with_name("ran").touch()
Path({marker!r}).touch()
from transformers import PretrainedConfig
class Strange(PretrainedConfig):
    model_type = "strange"
"""


def test_a_models_own_code_runs_only_with_trust_remote_code(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    marker = tmp_path / "ran"
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "strange.py").write_text(CODE.format(marker=str(marker)))
    config = {"model_type": "strange", "auto_map": {"AutoConfig": "strange.Strange"}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    argv = ["--out", data, "--encode-only", "--model", tmp_path / "model"]
    assert "read that code, then give --trust-remote-code" in refused(capsys, prepare_data.main, *argv)
    assert not marker.exists()
    with pytest.raises(SystemExit):  # this code defines no model
        prepare_data.main([*map(str, argv), "--trust-remote-code"])
    assert marker.exists()


def test_trust_is_given_anew_on_each_command(prepared, data, tmp_path, monkeypatch):
    """Code is trusted only if this command has --trust-remote-code, whatever a run's config.json says."""
    import transformers
    from transformers.models.auto import image_processing_auto

    shutil.copytree(prepared.parent / "raw", tmp_path / "raw")  # the posters
    trusted = []
    for owner, name in (
        (transformers, "AutoConfig"),
        (transformers, "AutoModelForImageTextToText"),
        (transformers, "AutoTokenizer"),
        (image_processing_auto, "AutoImageProcessor"),
    ):
        kind = getattr(owner, name)

        def recorded(*words, original=kind.from_pretrained, kind=name, **options):
            trusted.append((kind, options["trust_remote_code"]))
            assert "Model" not in kind or options["use_safetensors"]
            return original(*words, **options)

        monkeypatch.setattr(kind, "from_pretrained", recorded)

    def trust_of(main, *argv):
        """Run a script. Returns the values of trust_remote_code that it passed to transformers."""
        trusted.clear()
        main([str(word) for word in argv])
        assert len({kind for kind, _ in trusted}) == 4
        return {trust for _, trust in trusted}

    small = ["--max-steps", 1, "--batch-size", 3, "--eval-limit", 2]
    train = ["--data", data, "--out", tmp_path / "sft", "--tune", "full", "--warmup-steps", 0, *small]
    cases = (([], False), (["--trust-remote-code"], True))
    for argv, expected in cases:
        assert trust_of(prepare_data.main, "--out", data, "--encode-only", "--max-pixels", 3136, *argv) == {expected}
        assert trust_of(sft.main, *train, "--overwrite", *argv) == {expected}
    assert json.loads((tmp_path / "sft" / "config.json").read_text())["options"]["trust_remote_code"] is True
    for argv, expected in cases:
        dpo = ["--sft", tmp_path / "sft", "--out", tmp_path / "dpo", "--overwrite", *small]
        assert trust_of(dpo_hano.main, *dpo, *argv) == {expected}
        assert trust_of(evaluate.main, "--run", tmp_path / "dpo", "--limit", 2, *argv) == {expected}
        to = tmp_path / f"export-{len(argv)}"
        assert trust_of(export.main, "--run", tmp_path / "dpo", "--to", to, *argv) == {expected}


def test_pickled_weights_are_refused(data, capsys):
    model = data / "tiny" / "model.safetensors"
    torch.save(load_file(model), data / "tiny" / "pytorch_model.bin")
    model.unlink()
    error = refused(capsys, sft.main, "--data", data, "--out", data.parent / "sft", "--batch-size", 2)
    assert "cannot be loaded as an image-text model" in error
