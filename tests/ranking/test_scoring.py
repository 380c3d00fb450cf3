"""Scores by a model: examples whose history was cut are reported; and what recommendations print."""

from accelerate import Accelerator
from conftest import Opened

from hanorec.data.folder import Example
from hanorec.model.load import load_model
from hanorec.model.packing import PackedMLLM
from hanorec.model.trees import tree_length
from hanorec.ranking import by_title
from hanorec.ranking.scoring import score_examples


def test_examples_whose_history_was_cut_are_reported(prepared):
    data = Opened(prepared)
    prompts, examples = data.prompts(), data.examples("test", 6)
    lengths = [tree_length(prompts.evaluation_tree(example, "rank")) for example in examples]
    options, shortened = {"tasks": ["rank"], "max_length": max(lengths) - 1}, set()
    model = PackedMLLM(load_model(data.source))
    score_examples(model, data.encoding, prompts, examples, options, Accelerator(), shortened=shortened)
    too_long = [example for example, length in zip(examples, lengths, strict=True) if length == max(lengths)]
    assert shortened == {(example.user, example.target) for example in too_long}


def test_only_the_printed_titles_are_escaped(prepared, monkeypatch, capsys):
    escaped = []
    monkeypatch.setattr(by_title, "printable", lambda text: escaped.append(text) or text)
    data = Opened(prepared).data
    by_title.print_recommendations("run", data, Example("u", [0], 1, [1, 2, 3], 2), [0.5, 2.0, 1.0], 2, "scores")
    titles, ids = data.items.titles, data.items.ids
    assert escaped == ["u", titles[0], f"{titles[2]} ({ids[2]})", f"{titles[3]} ({ids[3]})"]
    shown = f"     1. {titles[2]} ({ids[2]}), 2.000\n     2. {titles[3]} ({ids[3]}), 1.000\n"
    assert capsys.readouterr().out.endswith(f"  top 2 of 3, with scores:\n{shown}")
