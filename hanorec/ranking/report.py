"""Write report.html: one file with the results, the differences, slices, training curves and a gallery of examples.

The page needs no network and no JavaScript. report.html beside this module is its frame, with the style sheet.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from string import Template

import numpy as np

from hanorec.data.folder import DataFolder, Example
from hanorec.ranking import charts, gallery
from hanorec.ranking.curves import PAPER, training_charts
from hanorec.ranking.gallery import Posters, System
from hanorec.ranking.markup import Html, element, escaped, joined
from hanorec.ranking.pooling import common_start
from hanorec.ranking.report_recipes import recipes
from hanorec.ranking.report_tables import differences, in_short, results_section, slices
from hanorec.ranking.results import Results, negatives_of
from hanorec.ranking.scoring import target_columns
from hanorec.ranking.slices import Slicings
from hanorec.run.files import replacing

FRAME = Path(__file__).with_name("report.html")
HARDEST = "cosine of target and hardest negative"  # the slicing whose highest slice is `hard`
OPEN = 4  # of more runs, the training curves are seen after a click
SECTIONS = {
    "short": "In short",
    "results": "Results",
    "differences": "Differences",
    "slices": "Slices",
    "training": "Training",
    "examples": "Examples",
}


def write_report(
    path: Path,
    results: Results,
    systems: Sequence[System],
    configs: dict[Path, dict],
    data: DataFolder,
    examples: Sequence[Example],
    slicings: Slicings,
    options: argparse.Namespace,
) -> None:
    """Write the report of an evaluation.

    Args:
        results: with slices.
        systems: those whose rankings are shown. The gallery compares the last one with the first one.
        configs: config.json of each run whose training is shown.
        slicings: the slices of the examples.
        options: of evaluate.py.
    """
    words = recipes(systems, configs, results.reference)
    results, systems = with_short_names(results, systems)
    recipe_of = {system.name: recipe for system, recipe in zip(systems, words, strict=True) if recipe}
    targets, posters = target_columns(examples), Posters(data)
    colours = {system.name: f"c{index % charts.COLOURS}" for index, system in enumerate(systems)}
    names = ", ".join(colours)
    parts = {
        "short": in_short(results, systems, targets, recipe_of),
        "results": results_section(results.table, colours),
        "differences": differences(results, colours),
        "slices": slices(results, list(colours)),
        "training": training(configs),
        "examples": examples_section(systems, data, examples, targets, slicings, posters, options.seed),
    }
    introduction = protocol_sentence(data, examples, options)
    text = page(names, introduction, {name: part for name, part in parts.items() if part}, results.protocol, posters)
    with replacing(path) as new:
        new.write_text(text, encoding="utf-8")


def training(configs: dict[Path, dict]) -> Html:
    """Return the training curves of the runs, below the name of the paper whose equations they cite."""
    cited = any(config["stage"] == "dpo_hano" for config in configs.values())
    own = [training_charts(run, config, len(configs) <= OPEN) for run, config in configs.items()]
    return joined([element("p", PAPER, class_="note") if cited else None, *own])


def page(names: str, introduction: str, parts: dict[str, Html], protocol: str, posters: Posters) -> str:
    """Return the HTML of the page.

    Args:
        names: the systems, for the title.
        parts: the content of the sections, by their keys in SECTIONS.
        protocol: the last line.
    """
    style = [posters.style()]
    for group, tags in (("picked", gallery.GROUPS), ("outcome", gallery.OUTCOMES)):
        style.append(gallery.filter_rules(group, tags))
    unreadable = f"{posters.unreadable} images cannot be read. " * bool(posters.unreadable)
    body = [
        element("h1", names),
        element("p", introduction),
        element("nav", *[element("a", SECTIONS[name], href=f"#{name}") for name in parts]),
        *[element("section", element("h2", SECTIONS[name]), part, id=name) for name, part in parts.items()],
        element("p", unreadable, protocol, class_="note"),
    ]
    frame = Template(FRAME.read_text(encoding="utf-8"))
    return frame.substitute(title=escaped(f"{names}: report"), style="\n".join(style), body=joined(body))


def with_short_names(results: Results, systems: Sequence[System]) -> tuple[Results, list[System]]:
    """Return results and systems by names without the folder that all systems share. The systems come first."""
    names = [system.name for system in systems]
    folder = common_start(names).rpartition("/")[0]
    short_of = {name: name.removeprefix(f"{folder}/") for name in names}
    if set(short_of.values()) & results.table.keys():  # a run with the name of a baseline
        short_of = {name: name for name in names}
    order = dict.fromkeys([*names, *results.table])
    table = {short_of.get(name, name): results.table[name] for name in order}
    compared = {short_of[name]: difference for name, difference in results.differences.items()}
    short_results = replace(results, table=table, reference=short_of.get(results.reference), differences=compared)
    return short_results, [replace(system, name=short_of[system.name]) for system in systems]


def protocol_sentence(data: DataFolder, examples: Sequence[Example], options: argparse.Namespace) -> str:
    """Say in a sentence what was measured."""
    prepared, longest = data.manifest["options"], max(len(example.history) for example in examples)
    images = ", every image blank" if options.blank_images else ", every image another item's" * options.shuffle_images
    others = f"{len(examples[0].candidates) - 1} others ({negatives_of(data, options.split)} negatives)"
    return (
        f"Each of the {len(examples)} examples of {data.folder} ({options.split}, {prepared['split']}) ranks the item "
        f"that a user chose next among {others}, after a history of up to {longest} items{images}. "
        "AUC and GAUC of the language models are of a separate Yes/No question, the other metrics of the ranking by "
        "title. Brackets and bars are 95% bootstrap intervals."
    )


# ---------------------------------------------------------------------------------------------------------------------
# Examples


def examples_section(
    systems: Sequence[System],
    data: DataFolder,
    examples: Sequence[Example],
    targets: np.ndarray,
    slicings: Slicings,
    posters: Posters,
    seed: int,
) -> Html:
    """Return the gallery, with its filters."""
    untold = gallery.says_nothing(data.items.titles)[[example.target for example in examples]]
    *_, (name, mask) = slicings[HARDEST].items()
    outcomes = gallery.outcomes(systems, targets, mask if name.startswith("high") else np.zeros_like(mask))
    groups, sizes = gallery.choose(systems, targets, untold, seed)
    cards, counts = [], {}
    for number, picked in groups.items():
        tags = [*picked, *(outcome for outcome, of in outcomes.items() if of[number])]
        first = any(tag not in counts for tag in picked)  # of its group
        for tag in tags:
            counts[tag] = counts.get(tag, 0) + 1
        cards.append(gallery.card(number, tags, systems, examples[number], targets, posters, first))
    shown = f" of {len(cards)} examples are shown. Click on an example to see its posters."
    cards.append(element("p", shown, class_="note count"))
    picked, own = ({tag: counts[tag] for tag in tags if tag in counts} for tags in (gallery.GROUPS, gallery.OUTCOMES))
    return joined(
        [
            element("ul", *[element("li", text) for text in how_chosen(systems, sizes)], class_="note"),
            gallery.filters("picked", "picked", picked, "all"),
            gallery.filters("outcome", "outcome", own, "any"),
            element("div", *cards, class_="cards"),
        ]
    )


def how_chosen(systems: Sequence[System], sizes: dict[str, int]) -> list[str]:
    """Explain the groups and the outcomes."""
    texts = ["won: the target is in the first place. lost: it is not among the first three."]
    if len(systems) > 1:
        moved = f"{sizes['gained most']} targets moved up and {sizes['lost most']} moved down"
        largest = f"The {gallery.PICKED} largest moves of each are here."
        texts = [f"From {systems[0].name} to {systems[-1].name}, {moved} (won, lost). {largest}"]
    texts.append("hard: the third of the examples with the largest cosine of target and hardest negative.")
    if not sizes["uninformative title"]:
        return texts
    rule = f"nothing but a number, or (numbers removed) a title that {gallery.SAME_TITLES} or more items share"
    untold = f"uninformative title: {rule}, e.g. 'Untitled 52'. {sizes['uninformative title']} targets have one;"
    texts.append(f"{untold} {gallery.PICKED} of them, or fewer, are here.")
    return texts
