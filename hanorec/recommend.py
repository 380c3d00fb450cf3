"""Recommend items after a user's last interaction, or after any history, with the model of a run.

    python -m hanorec.recommend --run runs/shop/dpo_hano --user "Jana Brandt" --top-k 10
    python -m hanorec.recommend --run runs/shop/dpo_hano --history P0012,P0031        # of anybody, by item ids
    python -m hanorec.recommend --run runs/shop/dpo_hano --users all --out recommendations.jsonl

Candidates are all items that the user does not have. A large catalogue is first cut to --shortlist items: by SASRec, if
`python -m hanorec.ranking.sasrec` has trained it on the data folder, else by co-occurrence. --out writes a JSON line
for each user. With `accelerate launch -m hanorec.recommend`, processes share the users; the same command continues an
interrupted file. The data folder may be prepared later than the run was trained: see docs/recommending.md.
"""

if __name__ == "__main__":
    from hanorec.run import interrupts

    interrupts.stop_at_once()  # before the other imports

import argparse
import os
from pathlib import Path

from hanorec.ranking.settings import Settings
from hanorec.run.files import UserError, not_a_folder, one_line_errors, printable
from hanorec.run.options import DTYPE, TRUST, Option, Parser, positive_int
from hanorec.run.runs import read_run

FROM_HELP = "candidates: all, ids, or a file with an id on each line"
SHORTLIST_HELP = "number of candidates that the model ranks; a first stage chooses them if there are more"
TABLES = (".csv", ".tsv", ".xls", ".xlsx", ".parquet")  # no --out
OPTIONS = {
    "": [
        Option("--run", Path, None, "run folder of sft.py or dpo_hano.py"),
        Option("--data", Path, None, "data folder", shown="that of the run"),
        Option("--out", Path, None, "JSON lines to write", shown="none; print", metavar="FILE"),
        DTYPE,
        TRUST,
    ],
    "for whom (one of these)": [
        Option("--user", str, None, "user id"),
        Option("--users", ["all"], None, "every user of the data folder; needs --out"),
        Option("--history", str, None, "item ids, oldest first", metavar="ID,ID,..."),
    ],
    "what": [
        Option("--top-k", positive_int, Settings.top_k, "number of recommendations"),
        Option("--from", str, "all", FROM_HELP, metavar="all|ID,ID,...|FILE", dest="among"),
        Option("--shortlist", positive_int, Settings.shortlist, SHORTLIST_HELP),
        Option("--repeat", bool, False, "also recommend items that the user has"),
    ],
}


@one_line_errors
def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the options, and check that they go together."""
    parser = Parser(__doc__, OPTIONS)
    options = parser.parse_args(argv)
    if not options.run:
        parser.error("give --run RUN, a folder that sft.py or dpo_hano.py wrote")
    if sum(value is not None for value in (options.user, options.users, options.history)) != 1:
        parser.error("give one of --user ID, --users all and --history ID,ID,...")
    if options.users and not options.out:
        parser.error("--users all needs --out FILE, for a JSON line for each user")
    if options.out:
        not_a_folder(options.out)
    if options.out and options.out.suffix.lower() in TABLES:
        parser.error(f"--out writes JSON lines, no table; name it {options.out.with_suffix('.jsonl')}")
    return options


@one_line_errors
def checked_options(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the options. UserError if --run is no finished run."""
    options = parse(argv)
    read_run(options.run)
    return options


if __name__ == "__main__":
    checked_options()  # prints --help and errors before the slow imports

from hanorec.ranking.recommending import recommend


def ids_of(text: str) -> list[str]:
    """Return the ids in a text that separates them by commas, or in the file that it names, one on each line."""
    path = Path(text)
    ids = text.split(",")
    if len(ids) == 1 and path.is_file():
        try:
            ids = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read ({error}); give a text file with an id on each line") from error
    return [name.strip() for name in ids if name.strip()]


def text_lines(line: dict, run: Path) -> list[str]:
    """Return a user's recommendations as lines for the screen."""
    history, best, count = line["history"], line["recommendations"], line["candidates"]
    texts = [f"{run}: {line['user']}, after {line['interactions']} items. The model reads the last {len(history)}:"]
    texts += [f"    {item['title']} ({item['item']})" for item in history]
    chosen = f"chosen by {line['first_stage']}, then " if line["first_stage"] else ""
    texts.append(f"  {len(best)} of {count} candidates, {chosen}ranked by {line['unit']}:")
    for place, item in enumerate(best, 1):
        score = "left in an earlier round" if item["score"] is None else f"{item['score']:.3f}"
        texts.append(f"    {place:2}. {item['title']} ({item['item']}), {score}")
    if not count:
        texts.append("    none: the user has all candidates; --repeat recommends them too")
    return texts


@one_line_errors
def main(argv: list[str] | None = None) -> list[dict]:
    """Run the script. Returns what `recommend` returns."""
    options = checked_options(argv)
    settings = {name: getattr(options, name) for name in ("data", "top_k", "shortlist", "repeat", "out", "dtype")}
    settings["trust"] = options.trust_remote_code
    settings["among"] = None if options.among == "all" else ids_of(options.among)
    history = None if options.history is None else ids_of(options.history)
    users = None if options.users or history is not None else [options.user]
    lines = recommend(options.run, users, history, **settings)
    if int(os.environ.get("RANK", 0)) == 0:
        texts = [] if options.users else text_lines(lines[0], options.run)
        if options.out:
            texts.append(f"{options.out}: {len(lines)} lines, each with up to {options.top_k} recommendations")
        print("", *map(printable, texts), sep="\n")
    return lines


if __name__ == "__main__":
    main()
