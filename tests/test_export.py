"""hanorec.export: its models load without this project, its model card, permissions, refusals."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import Opened
from spoilt import refused

import dpo_hano
import evaluate
import sft
from hanorec import export
from hanorec.data.folder import Example
from hanorec.model.finished import load_finished
from hanorec.model.load import load_tokenizer
from hanorec.model.packing import PackedMLLM


def exported(run, to):
    export.main(["--run", str(run), "--to", str(to)])
    return to


def logits(code, folder, tmp_path):
    """Run code in a process that imports transformers and peft, not this project. Returns its tensor `logits`."""
    head = "import sys, torch, peft, transformers as t\nload = t.AutoModelForImageTextToText.from_pretrained\n"
    head += "tokenizer = t.AutoTokenizer.from_pretrained('merged')\n"
    head += "chat = tokenizer.apply_chat_template([{'role': 'user', 'content': 'Film 3?'}], tokenize=False)\n"
    head += "ids = tokenizer(chat, return_tensors='pt')\n"
    tail = f"\nassert 'hanorec' not in sys.modules\ntorch.save(logits, {str(tmp_path / 'logits.pt')!r})"
    subprocess.run([sys.executable, "-c", head + code + tail], check=True, cwd=folder)
    return torch.load(tmp_path / "logits.pt", weights_only=True)


def own_logits(run, prepared):
    model, tokenizer = load_finished(run, Opened(prepared).encoding), load_tokenizer(prepared / "tiny")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Film 3?"}], tokenize=False)
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt")).logits


def test_an_export_loads_without_this_project(prepared, sft_run, dpo_run, tmp_path):
    """After DPO: merged/, and base/ with adapter/. The base is the SFT model."""
    before = {path: path.read_bytes() for path in dpo_run.rglob("*") if path.is_file()}
    folder = exported(dpo_run, tmp_path / "export")
    assert before == {path: path.read_bytes() for path in dpo_run.rglob("*") if path.is_file()}
    assert {path.name for path in folder.iterdir()} == {"README.md", "merged", "base", "adapter"}
    with_adapter = "logits = peft.PeftModel.from_pretrained(load('base'), 'adapter')(**ids).logits"
    for code, run in (
        ("logits = load('merged')(**ids).logits", dpo_run),
        (with_adapter, dpo_run),
        ("logits = load('base')(**ids).logits", sft_run),
    ):
        found = logits(code, folder, tmp_path)
        torch.testing.assert_close(found, own_logits(run, prepared), atol=1e-4, rtol=0)
    assert not torch.allclose(found, own_logits(dpo_run, prepared), atol=1e-6)
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str((folder / "base").resolve())


def test_the_adapter_of_an_sft_run_lies_on_the_backbone(prepared, lora_run, tmp_path):
    folder = exported(lora_run, tmp_path / "export")
    assert {path.name for path in folder.iterdir()} == {"README.md", "merged", "adapter"}
    assert not (folder / "adapter" / "README.md").exists()  # PEFT's blank card
    base = json.loads((folder / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(prepared / "tiny")
    code = f"logits = peft.PeftModel.from_pretrained(load({base!r}), 'adapter')(**ids).logits"
    torch.testing.assert_close(
        logits(code, folder, tmp_path),
        logits("logits = load('merged')(**ids).logits", folder, tmp_path),
        atol=1e-4,
        rtol=0,
    )


def run_snippet(card, folder):
    """Run the Python code of a model card. Returns its printed (title, number)."""
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=folder, capture_output=True, text=True)
    return [(title, float(number)) for title, number in re.findall(r"^(.*) (-?\d\S*)$", done.stdout, re.M)]


def blank_example(data, **layout):
    """A data folder's prompts as if no item had a picture, and the example that the snippet asks."""
    prompts = data.prompts(**layout)
    prompts.tokens.lengths = [0] * len(data.items)
    return prompts, Example("", [0, 1, 2], 3, [3, 4, 5], 4)


def test_the_snippet_of_the_model_card_gives_the_projects_scores(prepared, sft_run, tmp_path):
    folder = exported(sft_run, tmp_path / "export")
    assert {path.name for path in folder.iterdir()} == {"README.md", "merged"}
    printed = run_snippet((folder / "README.md").read_text(), folder)
    data = Opened(prepared)
    prompts, example = blank_example(data)
    packed = PackedMLLM(load_finished(sft_run, data.encoding))
    with torch.no_grad():
        batch = packed.collate([prompts.ranking_tree(example, example.candidates)], data.tokens)
        expected = packed(batch).flatten().tolist()
    assert [title for title, _ in printed] == data.items.titles[3:6]
    np.testing.assert_allclose([number for _, number in printed], expected, atol=1e-4)


def test_the_snippet_of_a_yes_no_run(prepared, sft_run, tmp_path):
    """The same weights, as a run that was not trained to rank."""
    shutil.copytree(sft_run, tmp_path / "sft")
    config = json.loads((sft_run / "config.json").read_text())
    config["options"]["tasks"] = ["yesno"]
    (tmp_path / "sft" / "config.json").write_text(json.dumps(config))
    folder = exported(tmp_path / "sft", tmp_path / "export")
    printed = run_snippet((folder / "README.md").read_text(), folder)
    data = Opened(prepared)
    prompts, example = blank_example(data)
    packed = PackedMLLM(load_finished(sft_run, data.encoding))
    expected = []
    for candidate in example.candidates:
        tree = prompts.yesno_questions(example, [candidate])
        tree += [prompts.answer("Yes", 1), prompts.answer("No", 1)]
        with torch.no_grad():
            yes, no = packed(packed.collate([tree], data.tokens)).flatten().tolist()
        expected.append(yes - no)
    np.testing.assert_allclose([number for _, number in printed], expected, atol=1e-4)


def test_the_model_card_says_data_protocol_metrics_and_method(dpo_run, sft_run, tmp_path):
    shutil.copytree(dpo_run, tmp_path / "run", ignore=shutil.ignore_patterns("*metrics.json"))
    card = (exported(tmp_path / "run", tmp_path / "before") / "README.md").read_text()
    assert f"This run was not evaluated: `python evaluate.py --run {tmp_path / 'run'}`" in card
    evaluate.main(["--run", str(tmp_path / "run")])
    card = (exported(tmp_path / "run", tmp_path / "after") / "README.md").read_text()
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    for name, value in metrics["values"].items():
        low, high = metrics["intervals"][name]
        assert f"| {name} | {value:.4f} | {low:.4f} to {high:.4f} |" in card
    for text in (
        "leave-one-out",
        "negatives, seed 42",
        "an untrained Qwen2.5-VL",
        "## Licence",
        "arxiv.org/abs/2511.18740",
    ):
        assert text in card, text
    assert re.search(r"\| --sigma \|  \| 0\.05 \|", card) and re.search(r"\| --warmup-steps \| 0 \|  \|", card)
    assert card.startswith("---\nlibrary_name: transformers\n") and "base_model" not in card  # tiny is on no hub


def test_titles_cannot_break_the_card(prepared, sft_run, monkeypatch, tmp_path):
    """A title is data: quotes, fences and line ends of a title stay inside the snippet's strings."""
    from hanorec.model import card

    data = Opened(prepared)
    prompts = data.prompts()
    evil = ['"""```', "'); import os; print('x", "a\\", "{b}", "\n```\n# c", "\u202ed"]
    prompts.items.titles[:6] = evil
    config = json.loads((sft_run / "config.json").read_text())
    text = card.model_card(sft_run, config, prompts, data.encoding)
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, re.S | re.M)
    scope = {}
    lists = "\n".join(line for line in code.splitlines() if re.match("(history|candidates) = ", line))
    exec(lists, scope)
    assert scope["history"] == evil[:3] and scope["candidates"] == ["{b}", "\\n```\\n# c", "\\u202ed"]
    compile(code, "snippet", "exec")


def test_other_users_may_read_the_files(dpo_run, tmp_path):
    """safetensors writes files that only their owner may read."""
    folder = exported(dpo_run, tmp_path / "export")
    for path in [*folder.rglob("*"), *dpo_run.glob("adapter/*")]:
        assert path.stat().st_mode & 0o444 == 0o444, path


def test_what_export_refuses(prepared, sft_run, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    assert "there exists; choose another --to" in refused(
        capsys, export.main, "--run", sft_run, "--to", tmp_path / "there"
    )
    assert "give --run RUN and --to DIR" in refused(capsys, export.main, "--run", sft_run)
    for main in (sft.main, dpo_hano.main):  # exporting is no part of training
        assert "unrecognized arguments: --export" in refused(capsys, main, "--export", tmp_path / "new")
    shutil.copytree(sft_run, tmp_path / "run")
    config = json.loads((sft_run / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps(config | {"data": "other"}))
    assert "trained on an earlier" in refused(capsys, export.main, "--run", tmp_path / "run", "--to", tmp_path / "new")
    (tmp_path / "run" / "result.json").unlink()
    assert "is not finished" in refused(capsys, export.main, "--run", tmp_path / "run", "--to", tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("prompts", ["0" * 64, 5])
def test_a_run_of_other_prompts_is_not_exported(prompts, sft_run, tmp_path, capsys):
    shutil.copytree(sft_run, tmp_path / "run")
    config = json.loads((sft_run / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps(config | {"prompts": prompts}))
    error = refused(capsys, export.main, "--run", tmp_path / "run", "--to", tmp_path / "new")
    assert "was trained on other prompts than those of today" in error
