"""The tables of options: defaults in --help, and misspelt names."""

import argparse

import pytest

from hanorec.run.options import Option, Parser, training_options
from hanorec.run.runs import next_command


def test_help_shows_defaults_and_inherited_options():
    tables = training_options(inherits=["lora_rank", "no_pack"], max_steps=(None, 120), lr=(1e-4, 1e-3))
    helps = {option.name: option.settings()["help"] for options in tables.values() for option in options}
    assert helps["--max-steps"].endswith(" [none; tiny: 120]")
    assert helps["--lr"].endswith(" [0.0001; tiny: 0.001]")
    assert helps["--lora-rank"].endswith(" [8; from the run before]")
    assert helps["--no-pack"].endswith(" [from the run before]")
    assert "[" not in helps["--quantize"] and "[" not in Option("--scores", str, [], "files").settings()["help"]


@pytest.mark.parametrize("names", [{"inherits": ["lora-rank"]}, {"learning_rate": (1, 2)}])
def test_a_misspelt_training_option_is_refused(names):
    with pytest.raises(ValueError, match="no training option has the name l"):
        training_options(**names)


@pytest.mark.parametrize(
    ("word", "end"),
    [
        ("--batchsize", "; did you mean --batch-size? (--help lists the options)"),
        ("--max_length=5", "; did you mean --max-length? (--help lists the options)"),
        ("--zzz", "(--help lists the options)"),
        ("sft.py", "(--help lists the options)"),
    ],
)
def test_an_unknown_option_suggests_the_nearest(word, end, capsys):
    parser = Parser("", training_options())
    with pytest.raises(SystemExit):
        parser.parse_args([word])
    error = capsys.readouterr().err.strip()
    assert error.endswith(end) and ("did you mean" in error) == ("did you mean" in end)


def test_the_command_after_a_stage_is_one_that_a_shell_reads():
    options = argparse.Namespace(out="runs/my shop/sft", data="data/x")
    assert next_command("sft", options) == "python dpo_hano.py --sft 'runs/my shop/sft'"
