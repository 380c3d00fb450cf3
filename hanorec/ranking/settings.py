"""How to recommend: the arguments of `recommend`, with the defaults of `python -m hanorec.recommend`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Settings:
    """How to recommend.

    Args:
        data: the data folder; None for that of the run.
        among: ids of the candidates; None for all items.
        top_k: number of recommendations.
        shortlist: number of candidates that the model ranks; a first stage chooses them if there are more.
        repeat: also recommend items that the user has.
        out: a file of JSON lines to write. An interrupted call continues it.
        dtype: auto, float32 or bfloat16.
        trust: run the Python code that comes with the backbone.
    """

    data: str | Path | None = None
    among: Sequence[str] | None = None
    top_k: int = 10
    shortlist: int = 100
    repeat: bool = False
    out: str | Path | None = None
    dtype: str = "auto"
    trust: bool = False
