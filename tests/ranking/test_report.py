"""The report: what is chosen, drawn and written, against slow loops and the numbers that it is made of."""

import csv
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from reports import HOSTILE, evaluated, write_page

from hanorec.data.folder import DataFolder
from hanorec.ranking import charts, gallery, results
from hanorec.ranking.curves import training_charts
from hanorec.ranking.gallery import Posters, System
from hanorec.ranking.markdown import SLICE_TABLE, TABLES, cell, short
from hanorec.ranking.markup import Html, element
from hanorec.ranking.metrics import measure, target_ranks
from hanorec.ranking.report_recipes import recipe
from hanorec.ranking.report_tables import results_section

VOID = {"meta", "link", "input"}


class Read(HTMLParser):
    """Reads a page: its elements, with their attributes and the text inside. Fails where an element is not closed."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        entry = SimpleNamespace(tag=tag, text="", inside=[one.tag for one in self.open], attributes=dict(attributes))
        self.elements.append(entry)
        if tag not in VOID:
            self.open.append(entry)

    def handle_endtag(self, tag):
        assert self.open.pop().tag == tag

    def handle_data(self, text):
        for entry in self.open:
            entry.text += text

    def of(self, tag, class_=None):
        """The elements of this tag, and of this class if one is given."""
        own = [one for one in self.elements if one.tag == tag]
        return [one for one in own if class_ is None or class_ in one.attributes.get("class", "").split()]


@pytest.fixture(scope="module")
def page(prepared, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    made = write_page(prepared, path)
    return Read(path.read_text(encoding="utf-8")), made, path


# ---------------------------------------------------------------------------------------------------------------------
# The page


def test_titles_and_names_are_text(page):
    """No title makes an element, an attribute or an address."""
    read, (_, _, data, examples, *_), path = page
    tags = {one.tag for one in read.elements}
    assert not tags & {"script", "img", "b>", "iframe", "object", "embed", "form"} and len(read.of("h1")) == 1
    names = {name for one in read.elements for name in one.attributes}
    assert not [name for name in names if name.startswith("on")]
    for one in read.elements:
        for name in ("src", "href", "action", "data", "srcset"):
            assert one.attributes.get(name, "#").startswith(("#", "data:,")), one.attributes
    style = "".join(one.text for one in read.of("style"))
    assert set(re.findall(r"url\((.{11})", style)) == {"data:image/"} and "@import" not in style
    assert "default-src 'none'" in read.of("meta")[2].attributes["content"]
    captions = {one.text.removeprefix("target") for one in read.of("figcaption")}
    seen = {item for example in examples for item in (*example.history, *example.candidates)}
    assert {0, 1, 2, 3, 4} <= seen
    for title in HOSTILE[:4]:
        assert title in captions
    assert "Film \\u202e reversed \\ud800 half \\x1b[2J and \\x00" in captions
    assert "<b>hanorec</b>" in {one.text for one in read.of("span", "key")}
    assert path.stat().st_size < 5e6
    assert data.items.titles[0] == HOSTILE[0]


def test_the_table_holds_the_numbers_of_the_results(page):
    read, (made, *_), _ = page
    rows = [one.text for one in read.of("tr")]
    names = {name: name.removeprefix("runs/small/") for name in made.table}
    for columns in TABLES:
        for name, result in made.table.items():
            expected = names[name] + "".join(cell(result, metric) for metric in columns)
            assert expected in rows
        for name, result in made.differences.items():
            texts = []
            for metric in columns:
                numbers = (result.values[metric], *result.interval(metric))
                value, low, high = ("+" * (round(number, 3) > 0) + short(number) for number in numbers)
                texts.append(f"{value} [{low}, {high}]")
            assert names[name] + "".join(texts) in rows
    (line, other) = [one.text for one in read.of("li")][:2]
    first, last = (target_ranks(system.scores, targets_of(page)) for system in page[1][1])
    up, down = (first > last).sum(), (first < last).sum()
    assert f"{up} moved up, {down} moved down and {len(first) - up - down} kept their place" in line
    low, high = made.differences["runs/small/<b>hanorec</b>"].interval("NDCG@3")
    verdict = "NDCG@3 higher" if low > 0 else "NDCG@3 lower" if high < 0 else "NDCG@3 no difference shown"
    assert verdict in line and f"a random order {short(made.table['chance'].values['NDCG@3'])}" in other


def test_the_protocol_is_a_sentence(page, prepared):
    read, (_, _, _, examples, *_), _ = page
    expected = f"Each of the {len(examples)} examples of {prepared} (test, leave-one-out) ranks the item that a user "
    expected += "chose next among 9 others (uniform negatives), after a history of up to 5 items. "
    assert read.of("p")[0].text.startswith(expected)


def targets_of(page):
    return np.array([example.candidates.index(example.target) for example in page[1][3]])


def test_bars_lie_on_the_axis_of_their_column(page):
    """Each dot, and both ends of each interval, measured in pixels from two ticks of the column's head."""
    read, (made, *_), _ = page
    table = [
        one
        for one in read.elements
        if "table" in one.inside and one.tag in ("text", "circle", "line", "tr", "td", "th")
    ]
    ticks, rows = {}, []
    for one in table:
        if one.tag == "tr":
            rows.append([])
            column = -1
        elif one.tag in ("td", "th"):
            column += 1
        elif one.tag == "text":
            ticks.setdefault((len(rows), column), []).append((float(one.text), float(one.attributes["x"])))
        elif "dot" in one.attributes["class"]:
            rows[-1].append((column, float(one.attributes["cx"])))
        elif "interval" in one.attributes["class"]:
            rows[-1].append((column, float(one.attributes["x1"]), float(one.attributes["x2"])))
    for column, metric in enumerate(TABLES[0], 1):
        (value, x), *_, (last_value, last_x) = ticks[1, column]
        scale = (last_x - x) / (last_value - value)
        for row, result in zip(rows[1:], made.table.values(), strict=False):
            (_, low, high), (_, dot) = [entry for entry in row if entry[0] == column]
            expected = [x + (number - value) * scale for number in (result.values[metric], *result.interval(metric))]
            assert [dot, low, high] == pytest.approx(expected, abs=0.11)


def test_slices_are_plots_of_their_numbers(page):
    """A chart for each slicing and metric; the tip of each dot has the slice's value and interval."""
    read, (made, *_), _ = page
    titles, tips = {one.text for one in read.of("b")}, [one.text for one in read.of("title")]
    count = 0
    for metric in SLICE_TABLE:
        for name in ("runs/small/<b>sft</b>", "runs/small/<b>hanorec</b>"):
            for slicing, slices in made.table[name].slices.items():
                assert (f"{metric} by {slicing}" in titles) == (len(slices) > 1)
                for label, part in slices.items() if len(slices) > 1 else ():
                    low, high = map(charts.number, part.interval(metric))
                    values = f"{charts.number(part.values[metric])} [{low}, {high}]"
                    assert f"{name.removeprefix('runs/small/')}, {label.partition(': ')[0]}: {values}" in tips
                    count += 1
    assert count >= 36


def test_each_example_shows_its_posters_in_each_order(page):
    """The text of each card, from scores sorted by hand; and the classes of the filters."""
    read, (_, systems, data, examples, slicings, _), _ = page
    cards = {one.text.removeprefix("User ").split(",")[0]: one for one in read.of("article")}
    assert len(cards) >= 10
    titles = [escaped_title(title) for title in data.items.titles]
    targets = targets_of(page)
    hard = [*slicings["cosine of target and hardest negative"].values()][-1]
    found = 0
    for number, example in enumerate(examples):
        card = next(
            (
                one
                for text, one in cards.items()
                if re.match(rf"{example.user}(gained|lost|at random|uninformative)", text)
            ),
            None,
        )
        if card is None:
            continue
        found += 1
        history = "".join(unseen(data, item) + titles[item] for item in example.history)
        assert f"history, oldest first{history}" in card.text
        places = []
        for system in systems:
            order = sorted(range(10), key=lambda c: (-system.scores[number][c], c))
            text = ""
            for place, item in enumerate((example.candidates[c] for c in order), 1):
                text += f"{place}{unseen(data, item)}{'target' * (item == example.target)}{titles[item]}"
            assert text in card.text
            target = system.scores[number][targets[number]]
            above = sum(score > target for score in system.scores[number])
            tied = sum(score == target for score in system.scores[number])
            places.append(above + (tied + 1) / 2)
            assert f"target in place {places[-1]:g} of 10" in card.text
        classes = card.attributes["class"].split()
        assert ("is-won" in classes) == (places[1] < places[0]) and ("is-lost" in classes) == (places[1] > places[0])
        assert ("is-hard" in classes) == hard[number]
        assert ("is-uninformative-title" in classes) <= (titles[example.target].startswith(("Untitled", "Film")))
    assert found == len(cards)
    for label in read.of("label"):
        group, _, tag = label.attributes["for"].partition("-")
        counted = re.search(r"\((\d+)\)", label.text)
        if counted:
            assert int(counted[1]) == len(read.of("article", tag)), group


def unseen(data, item):
    return "" if data.items.images[item] else "no picture"


def escaped_title(title):
    return "".join(c if c not in "\u202e\ud800\x1b\x00" else c.encode("unicode_escape").decode() for c in title)


def test_a_single_system_and_a_long_list(prepared, tmp_path):
    """With one system `won` is the first place. In a long list the target is shown with its place."""
    path = tmp_path / "report.html"
    results, (system,), data, examples, *_ = write_page(prepared, path, systems=1)
    read = Read(path.read_text(encoding="utf-8"))
    assert not [one for one in read.of("section") if one.attributes.get("id") == "differences"]
    assert "gained most" not in path.read_text(encoding="utf-8") and not results.differences
    targets = np.array([example.candidates.index(example.target) for example in examples])
    place = target_ranks(system.scores, targets)
    assert f"{(place == 1).sum()} are in the first place" in read.of("li")[0].text
    example = SimpleNamespace(candidates=list(range(40)), target=7)
    scores = -np.arange(40.0)[::-1]
    text = Read(gallery.strip(Posters(data), example, scores)).elements[0].text
    assert text.endswith(f"…33target{data.items.titles[7]}") and text.startswith(f"1{data.items.titles[39]}2")


def test_a_run_with_the_name_of_a_baseline_keeps_its_row(prepared, tmp_path):
    made, *_ = write_page(prepared, tmp_path / "report.html", shown=["runs/chance", "runs/sft"])
    read = Read((tmp_path / "report.html").read_text(encoding="utf-8"))
    heads = [one.text for one in read.of("th")]
    assert heads.count("chance") == heads.count("runs/chance") == 2 and "runs/chance" in made.table


# ---------------------------------------------------------------------------------------------------------------------
# What is chosen and drawn


def test_the_largest_moves_are_chosen():
    """Against sorting in a loop; and a title says nothing by its words alone."""
    random = np.random.default_rng(3)
    count, targets = 200, np.random.default_rng(1).integers(0, 5, 200)
    systems = [System(name, random.normal(size=(count, 5)).round(1)) for name in "ab"]
    untold = random.random(count) < 0.1
    groups, sizes = gallery.choose(systems, targets, untold, seed=0)

    def place(scores, target):
        above, tied = sum(s > scores[target] for s in scores), sum(s == scores[target] for s in scores)
        return above + (tied + 1) / 2

    def share(scores, target):
        odds = np.exp(scores)
        return odds[target] / odds.sum()

    def gain(number):
        old, new = (system.scores[number] for system in systems)
        target = targets[number]
        return place(old, target) - place(new, target), share(new, target) - share(old, target)

    order = sorted(range(count), key=gain)
    chosen = {name: [number for number, own in groups.items() if name in own] for name in gallery.GROUPS}
    assert chosen["gained most"] == order[::-1][:10]
    assert set(chosen["lost most"]) == set(order[:10])
    assert len(chosen["at random"]) == len(chosen["uninformative title"]) == 10
    assert all(untold[chosen["uninformative title"]])
    gains = [gain(number)[0] for number in range(count)]
    assert sizes["gained most"] == sum(g > 0 for g in gains) and sizes["lost most"] == sum(g < 0 for g in gains)
    still, _ = gallery.choose([systems[0], systems[0]], targets, untold, seed=0)
    assert {name for own in still.values() for name in own} == {"at random", "uninformative title"}


@pytest.mark.parametrize("seed", range(30))
def test_an_axis_holds_its_values(seed):
    random = np.random.default_rng(seed)
    values = (random.normal(size=5) * 10.0 ** random.integers(-8, 8) + random.normal()).tolist()
    for zero in (False, True):
        axis = charts.axis_of(values, zero=zero)
        steps = np.diff(axis.ticks)
        assert axis.ticks[0] <= min(values) + 1e-12 and max(values) <= axis.ticks[-1] + 1e-12
        assert 2 <= len(axis.ticks) <= 7 and steps == pytest.approx(steps[0], rel=1e-3)
        assert not zero or 0 in axis.ticks or axis.ticks[0] < 0 < axis.ticks[-1]
        assert axis.part(axis.ticks[0]) == 0 and axis.part(axis.ticks[-1]) == 1


def test_curves_are_means_of_neighbours_and_leave_out_nulls():
    values = [float(number) for number in range(1000)]
    thin = charts.Series("", values, [None, *values[1:]], values, values).thinned()
    assert len(thin.x) <= charts.POINTS and thin.x == thin.y == thin.low
    assert thin.y[0] == np.mean(range(1, 8)) and len(thin.x) == 143
    assert charts.curves("", "", [charts.Series("", [1], [None])]) is None


def test_training_curves_of_a_run(tmp_path):
    """One chart for each metric that the run has; nulls and missing files are no error."""
    lines = [{"step": step, "loss": 1 / step, "warmup": float(step < 4), "eta": None} for step in range(1, 9)]
    lines += [{"step": 8, "val_NDCG@3": 0.5, "val_AUC": 0.6, "lambda_mean": 1, "lambda_p01": 0.5, "lambda_p99": 2}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = {"stage": "sft", "options": {"lr": 0.1, "sft": "<i>"}}
    read = Read(training_charts(tmp_path, config, True))
    assert [one.text for one in read.of("b")] == ["loss", "validation", "lambda"]
    assert "sft <i>, lr 0.1" in read.of("p")[0].text
    path = next(one for one in read.of("path") if "curve" in one.attributes["class"])
    ys = [float(pair.split()[1]) for pair in path.attributes["d"][1:].split("L")]
    assert len(ys) == 8 and ys == sorted(ys)  # the loss falls, and SVG counts downwards
    mark = next(one for one in read.of("line") if one.attributes["class"] == "mark")
    xs = [float(pair.split()[0]) for pair in path.attributes["d"][1:].split("L")]
    assert float(mark.attributes["x1"]) == pytest.approx(xs[2], abs=0.1)  # the warm-up's last step
    (tmp_path / "metrics.jsonl").unlink()
    read = Read(training_charts(tmp_path, config, False))
    assert "is missing" in read.of("p")[1].text and not read.of("figure")


def dpo_config(**options):
    method = {"beta": 1.0, "rejected": 9, "hardness": "none", "responsiveness": "none", "sigma": 0.0, "lr": 0.003}
    return {"stage": "dpo_hano", "options": {"sft": "runs/small/sft-1", **method, **options}}


def test_charts_of_parts_that_are_off_are_left_out(tmp_path):
    """Constant charts of parts that are off are not drawn; those of a part that is on are, constant or not."""
    names = ("loss", "eta", "lambda_mean", "lambda_p01", "lambda_p99", "beta_mean", "beta_p01", "beta_p99", "noise")
    lines = [json.dumps({"step": step, **dict.fromkeys(names, 1)}) for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    for options, titles, off in (
        ({}, ["loss"], "off in this run: lambda, eta, noise"),
        ({"responsiveness": "batch"}, ["loss", "eta", "beta"], "off in this run: lambda, noise"),
        (
            {"hardness": "topk", "responsiveness": "batch", "sigma": 0.1},
            ["loss", "eta", "lambda", "beta", "noise"],
            None,
        ),
    ):
        read = Read(training_charts(tmp_path, dpo_config(**options), True))
        assert [one.text for one in read.of("b")] == titles
        assert [one.text for one in read.of("p") if one.text.startswith("off")] == [off] * bool(off)
    assert "equation (12) for 9 rejected; before learning log(1 + 9) = 2.303" in read.of("figcaption")[0].text
    read = Read(training_charts(tmp_path, dpo_config(rejected=1), True))
    assert "equation (12); before learning log 2 = .693" in read.of("figcaption")[0].text
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "noise": 0}\n{"step": 2, "noise": 1}\n')
    read = Read(training_charts(tmp_path, dpo_config(), True))  # the file contradicts the options
    assert [one.text for one in read.of("b")] == ["noise"]


def test_the_page_says_what_the_runs_and_the_metrics_are(prepared, tmp_path):
    """The recipes in front, what each metric is of, and the paper once."""
    sft = {"stage": "sft", "options": {"model": "tiny", "tune": "full", "lr": 0.001, "epochs": 3, "start": None}}
    runs = {Path(f"runs/small/<b>{name}</b>"): config for name, config in (("sft", sft), ("hanorec", dpo_config()))}
    write_page(prepared, tmp_path / "report.html", runs=runs)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    read = Read(text)
    first, second, _ = [one.text for one in read.of("li")][:3]
    assert first == "<b>sft</b> (SFT from tiny: tune full, lr 0.001, epochs 3): the reference."
    recipe = "(DPO from sft-1: 9 rejected, beta 1, lr 0.003; no lambda, eta, noise)"
    assert second.startswith(f"<b>hanorec</b> {recipe} against <b>sft</b>: NDCG@3 ")
    parts = ("NDCG@3 ", "HR@3 ", "Places in the ranking by title: of ", "AUC is not computed from these. AUC ")
    assert [*parts] == sorted(parts, key=second.index)
    assert text.count("one seed") == 1 and "Each run has one seed: the intervals are over users" in text
    assert text.count("arXiv 2511.18740") == 1 and text.count("about each candidate (AUC over all candidates") == 1
    drawn = {one.text for one in read.of("b") if one.text.startswith("NDCG@3 by ")}
    assert f"by each of {len(drawn)} values" in text or (len(drawn) == 1 and "by one value" in text)


def test_the_user_is_named_once(prepared):
    data = DataFolder(prepared)
    example, scores = data.examples("test")[0], np.arange(10.0)[None]
    for user, title in (("user102", "user102"), ("7", "User 7")):
        text = gallery.card(0, [], [System("a", scores)], replace(example, user=user), np.array([0]), Posters(data))
        assert Read(text).of("h3")[0].text.partition("target's place")[0] == title


def test_notes_below_the_results_are_about_what_is_there():
    result = measure(np.array([[1.0, 0.0]]), None, np.array([0]), resamples=2)
    text = results_section({"a": result}, {})
    assert "±" not in text and "best possible" not in text
    result.sd = dict.fromkeys(result.values, 0.25)
    text = results_section({"a": result, "ceiling": result}, {})
    assert "± is the standard deviation over seeds" in text and "best possible" in text


def test_a_recipe_names_what_differs_from_the_reference():
    other = dpo_config(hardness="topk", sigma=0.1, noise="relative", epochs=2, seed=3)
    expected = "DPO from sft-1: 9 rejected, beta 1, lr 0.003, epochs 2; lambda by topk, noise 0.1 (relative); no eta"
    assert recipe(other, dpo_config(epochs=1, seed=1)) == expected
    whole = dpo_config(hardness="topk", responsiveness="batch", sigma=0.1, noise="relative")
    assert recipe(whole).startswith("HaNoRec from sft-1: ")
    assert recipe(dpo_config(objective="softmax")) == "DPO from sft-1: 9 rejected, beta 1, lr 0.003, objective softmax"


def test_thumbnails_are_small_and_unreadable_images_are_counted(tmp_path):
    """Many images that no encoder can make small fit; each is a JPEG of its item."""
    random, count = np.random.default_rng(0), 400
    images = []
    for item in range(20):
        Image.fromarray(random.integers(0, 256, (400, 300, 3), dtype=np.uint8)).save(tmp_path / f"{item}.png")
    images = [f"{item % 20}.png" for item in range(count)] + ["none.png", None]
    items = SimpleNamespace(titles=[""] * (count + 2), images=images)
    posters = Posters(SimpleNamespace(items=items, folder=tmp_path))
    texts = [Read(posters.poster(item)).of("div", "poster")[0].text for item in range(count + 2)]
    assert texts == [""] * count + ["cannot be read", "no picture"]
    style = posters.style()
    assert len(style) < 4e6 and posters.unreadable == 1 and len(style.splitlines()) == count
    assert len({rule.split("base64,")[1] for rule in style.splitlines()}) == 20


def test_only_what_element_made_is_html():
    assert (
        element("b", "<i>", element("i", 1), None, class_="a\"'<")
        == '<b class="a&quot;&#x27;&lt;">&lt;i&gt;<i>1</i></b>'
    )
    assert element("p", f"{Html('<b>')}") == "<p>&lt;b&gt;</p>"  # a text made from Html is a text again


# ---------------------------------------------------------------------------------------------------------------------
# results.md and results.csv


def test_results_files_hold_every_number(prepared, tmp_path):
    made, *_ = evaluated(prepared, shown=[str(tmp_path / "a"), str(tmp_path / "b")])
    run = tmp_path / "b"
    made.runs[run] = made.runs[str(run)]
    results.write_results(run, made, {"extra": 1}, "val_")
    assert json.loads((run / "val_metrics.json").read_text())["extra"] == 1
    text = (run / "val_results.md").read_text()
    assert text == made.text() + "\n"
    with open(run / "val_results.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    expected = {}
    for minus, table in (("", made.table), (str(tmp_path / "a"), made.differences)):
        for name, result in table.items():
            parts = {("", ""): result} | {(s, n): part for s, own in result.slices.items() for n, part in own.items()}
            for (slicing, label), part in parts.items():
                for metric, value in part.values.items():
                    expected[name, minus, slicing, label, metric] = (value, *part.interval(metric))
    assert len(rows) == len(expected)
    for row in rows:
        key = tuple(row[name] for name in ("system", "minus", "slicing", "slice", "metric"))
        assert [float(row[name]) for name in ("value", "low", "high")] == pytest.approx(expected[key], abs=0)
        assert row["sd"] == "" and int(row["examples"]) > 0


def test_a_result_of_several_seeds_has_its_standard_deviation_in_the_file():
    result = measure(np.array([[1.0, 0.0]]), None, np.array([0]), resamples=2)
    result.sd = dict.fromkeys(result.values, 0.25)
    assert {row[7] for row in results.csv_rows(result, "a")} == {0.25}


def test_the_frame_has_no_script_and_no_address():
    text = (ROOT / "hanorec" / "ranking" / "report.html").read_text()
    assert "<script" not in text and "http:" not in text and "https:" not in text and "url(" not in text
