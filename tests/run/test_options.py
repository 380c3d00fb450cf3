"""The tables of options: defaults in --help, and misspelt names."""

import pytest

from hanorec.run.options import Option, training_options


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
