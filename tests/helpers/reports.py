"""A report from made-up scores: two systems on a small data folder, whose titles hold HTML and scripts."""

from types import SimpleNamespace

import numpy as np

from hanorec.data.folder import DataFolder
from hanorec.ranking.gallery import System
from hanorec.ranking.report import write_report
from hanorec.ranking.results import measure_all
from hanorec.ranking.slices import make_slicings

HOSTILE = (
    "<script>window.broken = 1</script>",
    '"><img src="https://example.org/a.png" onerror="window.broken = 2">',
    "</figcaption></style></body><h1>Title</h1>",
    "' onmouseover='window.broken = 3' & &lt;b&gt; $body ${style}",
    "Film \u202e reversed \ud800 half \x1b[2J and \x00",
)


def evaluated(folder, seed=0, systems=2, shown=None):
    """(results, systems, data, examples, slicings, options) of random scores on the test split of a data folder."""
    data = DataFolder(folder)
    data.items.titles[: len(HOSTILE)] = HOSTILE
    data.items.titles[10:16] = [f"Untitled {number}" for number in range(6)]
    examples, random = data.examples("test"), np.random.default_rng(seed)
    shape = (len(examples), len(examples[0].candidates))
    vectors = random.normal(size=(3, len(data.items), 4))
    slicings = make_slicings(examples, random.integers(0, 9, len(data.items)), *vectors)
    options = SimpleNamespace(split="test", seed=0, limit=0, blank_images=False, shuffle_images=False)
    names = shown or [f"runs/small/<b>{name}</b>" for name in ("sft", "hanorec", "third")[:systems]]
    scores = {name: random.normal(size=shape).round(1) for name in names}
    groups = {name: {(0,): name} for name in names}
    scored = {name: (own, own) for name, own in scores.items()}
    reference = names[0] if len(names) > 1 else None
    results = measure_all(scored, {}, {}, groups, reference, data, examples, slicings, options)
    return results, [System(name, own) for name, own in scores.items()], data, examples, slicings, options


def write_page(folder, path, runs=None, **how):
    """Write a report of these scores. Returns what `evaluated` returns."""
    results, systems, data, examples, slicings, options = evaluated(folder, **how)
    write_report(path, results, systems, runs or {}, data, examples, slicings, options)
    return results, systems, data, examples, slicings, options
