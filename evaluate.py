"""Rank candidates by log-likelihood; AUC, GAUC, HR@K, NDCG@K, MRR with intervals, beside simple baselines.

    python evaluate.py                                                    # the demo's runs, side by side
    python evaluate.py --run runs/ml-1m/sft runs/ml-1m/dpo_hano           # writes metrics.json, predictions.jsonl there
    python evaluate.py --run runs/ml-1m/dpo_hano --compare runs/ml-1m/sft # paired bootstrap of the difference
    python evaluate.py --data data/ml-1m --scores other.jsonl             # another system's scores, same candidates
    python evaluate.py --run runs/demo/sft --user user007 --top-k 5       # recommendations by name

Every candidate's title is scored behind one prompt; Yes/No by log p(Yes) - log p(No). Nothing is sampled or parsed.
"""

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from hanorec.model.prompts import Prompts, Row, item_rows
from hanorec.ranking import exchange
from hanorec.ranking.metrics import Result, measure, tables
from hanorec.run import runs
from hanorec.run.runs import UserError
from mllm_srec import srec

DEMO_RUNS = (Path("runs/demo/sft"), Path("runs/demo/dpo_hano"))
MANIFEST = {"options": dict, "seed": int, "files": dict}
ENCODING = {"backbone": str, "max_pixels": int, "dtype": str, "items": str, "tokens": (str, type(None))}


def popularity_scores(data, rows) -> np.ndarray:
    """[R, C]: how many training interactions each candidate has."""
    counts = np.bincount(np.concatenate([*data.sequences().values()]), minlength=len(data.catalogue.ids))
    return counts[[row.candidates for row in rows]].astype(float)


def cooccurrence_scores(data, rows) -> np.ndarray:
    """[R, C]: the number of pairs (history item, training user) whose user has both that item and the candidate."""
    sequences = [*data.sequences().values()]
    users = np.repeat(np.arange(len(sequences)), [len(s) for s in sequences])
    items = np.concatenate(sequences)
    order = np.argsort(items, kind="stable")
    users, start = users[order], np.append(0, np.bincount(items, minlength=len(data.catalogue.ids)).cumsum())
    scores = np.zeros((len(rows), len(rows[0].candidates)))
    for number, row in enumerate(rows):
        shared = np.zeros(len(sequences))  # of each training user: how many history items they have
        for item in row.history:
            shared[users[start[item] : start[item + 1]]] += 1
        scores[number] = [shared[users[start[c] : start[c + 1]]].sum() for c in row.candidates]
    return scores


def target_columns(rows) -> np.ndarray:
    return np.array([row.candidates.index(row.target) for row in rows])


class Data:
    """A data folder with one backbone's encoding. images: `stored` or `live`, where its image tokens come from; None:
    stored where they are. story: the name of what summarize.py wrote there ("": the backbone's), which prompts then
    tell; None: plain prompts."""

    def __init__(
        self,
        folder: Path,
        model: str | None,
        blank_images=False,
        images=None,
        story: str | None = None,
        encoded=True,
        trust: bool = False,
    ):
        from hanorec.model import mllm

        self.folder, self.again, self.trust = Path(folder), "prepare it with prepare_data.py", trust
        self.story = None
        self.manifest = runs.read_json(self.folder / "manifest.json", MANIFEST, self.again)
        items = self.lines("items", runs.ITEM)
        if not encoded:
            self.catalogue = mllm.Catalogue(items)
            return
        paths = [path.parent for path in sorted(self.folder.glob("encoded/[!.]*/manifest.json"))]
        manifests = [(path, runs.read_json(path / "manifest.json", ENCODING, self.again)) for path in paths]
        encodings = {runs.printable(manifest["backbone"]): (path, manifest) for path, manifest in manifests}
        names = ", ".join(encodings) or "no backbone"
        if model is None and len(encodings) > 1:
            raise UserError(f"{folder} is encoded for {names}; say which with --model")
        model = model or next(iter(encodings), mllm.TINY)
        renew = f"run prepare_data.py --out {folder} --encode-only --model {model}"
        if model not in encodings:
            raise UserError(f"{folder} is encoded for {names}, not for {model}; {renew}")
        path, encoding = encodings[model]
        if encoding["items"] != self.manifest["files"]["items.jsonl"]:
            raise UserError(f"{path} is of another items.jsonl; {renew} --max-pixels {encoding['max_pixels']}")
        self.backbone, self.encoding = model, encoding
        self.source = self.folder / "tiny" if model == mllm.TINY else model
        if images == "stored" and encoding["tokens"] is None:
            raise UserError(f"{path} holds no image tokens; go without --images, or {renew}")
        live = images == "live" or encoding["tokens"] is None
        processor = mllm.load_image_processor(self.source, encoding["max_pixels"], trust) if live else None
        self.catalogue = mllm.Catalogue(items, path, blank_images, (self.folder, processor) if live else None)
        if story is not None and blank_images:
            raise UserError("summaries tell what the pictures show: with them --blank-images hides little")
        self.story = None if story is None else self.folder / "summaries" / (story or path.name)

    def lines(self, name: str, fields: dict) -> list[dict]:
        """The lines of a file of the data folder that is as it was prepared."""
        path = self.folder / f"{name}.jsonl"
        found = runs.read_jsonl(path, fields, self.again)
        if not found or self.manifest["files"].get(path.name) != runs.file_hash(path):
            raise UserError(f"{path} is empty, or not what manifest.json lists; {self.again}")
        return found

    def rows(self, split: str, limit: int = 0) -> list:
        """The rows of train, val or test; the first `limit` where that is not 0."""
        lines = self.lines(split, runs.ROW)
        if len({len(line["candidates"]) for line in lines}) != 1:
            raise UserError(f"{self.folder / split}.jsonl has candidates of several lengths; {self.again}")
        return [Row.of(line, self.catalogue.row_of) for line in (lines[:limit] if limit else lines)]

    def sequences(self) -> dict[str, list[int]]:
        """Each training user's items in order of time, as rows."""
        lines = self.lines("sequences", {"user": str, "items": list})
        return {line["user"]: item_rows(line["items"], self.catalogue.row_of, line["user"]) for line in lines}

    def timelines(self) -> dict[str, list[int]]:
        """All that each user is known to have chosen before the test row's target, in order of time, as rows."""
        return srec.timelines(self.sequences(), [*self.rows("val"), *self.rows("test")])

    def prompts(self, candidate_images: bool = False):
        from hanorec.model import packing

        kind = Prompts
        if self.story:
            story = srec.load_story(self.story, self.catalogue, self.timelines(), self.encoding)
            kind = partial(srec.SRecPrompts, story)
        return packing.load_prompts(self.source, self.catalogue, candidate_images, self.trust, kind)

    def hash(self) -> str:
        return runs.value_hash([self.manifest, self.encoding, *([srec.story_hash(self.story)] if self.story else [])])


def load_result(run: Path, data: Data, dtype=None, attn: str | None = None):
    """The model that a finished run ended with. Without a dtype all adapters are merged, in float32. With one, the last
    stays an adapter, as in training: rounded into half-precision weights, most of what it learned would be lost. On a
    quantized base all of them stay adapters. attn: its attention [the run's]."""
    from hanorec.model import mllm

    config = runs.read_run(run, ("teach", "sft", "dpo_hano"))
    options, sft = config["options"], config["stage"] != "dpo_hano"
    if options.get("model", data.backbone) != data.backbone:
        raise UserError(f"{run} is a run of {options['model']}, and {data.folder} is encoded for {data.backbone}")
    attn, quantize = attn or options.get("attn", "sdpa"), options.get("quantize")
    ended = runs.read_json(run / "result.json", {"weights": str}, f"run {config['stage']}.py --out {run} again")
    if runs.weights_hash(run) != ended["weights"]:
        raise UserError(f"{run} does not hold the weights that it ended with; run {config['stage']}.py again")
    if not sft:
        start = Path(options["sft"])
        if runs.weights_hash(start) != config["sft_weights"]:
            raise UserError(f"{run} was trained on other weights of {start}; run dpo_hano.py again")
        model = load_result(start, data, dtype if quantize else None, attn)
    elif options["tune"] == "full":
        own, given = (mllm.load_tokenizer(name, data.trust).get_vocab() for name in (run / "model", data.source))
        if own != given:
            raise UserError(f"{run} has another tokenizer than {data.folder}: it was trained on other titles")
        return mllm.load_model(run / "model", dtype, attn, trust=data.trust)
    else:
        model = mllm.load_model(data.source, dtype if quantize else None, attn, quantize, data.trust)
        model = model.dequantize() if quantize and dtype is None else model  # to the values that it was trained with
    model = model if quantize else model.to(dtype)
    return mllm.load_adapter(model, run / "adapter", dtype is None, mllm.FROZEN if sft and quantize else mllm.TRAINED)


def score_rows(model, data: Data, prompts, rows, options: dict, accelerator, batch_size: int = 0):
    """(scores, yes_scores), each [R, C] or None for a task that the model was not trained on; rows are shared out over
    the processes and every process gets all. model: a packing.PackedMLLM. options: a run's (tasks, max_length)."""
    import torch
    from accelerate.utils import gather_object, tqdm

    from hanorec.model import mllm

    tasks, world = options["tasks"], accelerator.num_processes
    builds = [partial(prompts.evaluation_tree, task=task) for task in tasks]
    found = []
    model.eval()
    batch_size = batch_size or (16 if data.backbone == mllm.TINY else 2)
    numbers = range(len(rows))  # in batches that are the same however many processes share them: to the last bit
    chunks = [numbers[i : i + batch_size] for i in numbers[::batch_size]]
    for chunk in tqdm(runs.shared_out(chunks, accelerator), desc="evaluate", unit="batch", leave=False):
        trees = [prompts.fitting(build, rows[i], options["max_length"]) for i in chunk for build in builds]
        batch = model.collate(trees, data.catalogue)
        with torch.no_grad(), accelerator.autocast():  # inference mode would spoil what sharded weights are gathered in
            logps = model(batch.to(accelerator.device))
        found += list(zip(chunk, logps.view(len(chunk), -1).tolist(), strict=True))
    found = gather_object(found) if world > 1 else found
    logps = np.array([values for _, values in sorted(dict(found).items())])
    if not np.isfinite(logps).all():
        raise UserError("the model's scores are no numbers: its weights diverged; train with a lower --lr")
    count = len(rows[0].candidates)
    scores = logps[:, :count] if "rank" in tasks else None
    yes = (logps[:, -2 * count :: 2] - logps[:, -2 * count + 1 :: 2]) if "yesno" in tasks else None
    return scores, yes


def validate(model, data: Data, prompts, rows, options: argparse.Namespace, accelerator) -> dict[str, float]:
    """Metrics without intervals, as training needs them; `select` is what the best weights are chosen by."""
    scores, yes = score_rows(model, data, prompts, rows, vars(options), accelerator)
    values = measure(scores if scores is not None else yes, yes, target_columns(rows), resamples=1).values
    return values | {"select": values["NDCG@3"] if scores is not None else values["AUC"]}


def recommend(name: str, data: Data, row, scores: np.ndarray, top_k: int, unit: str) -> None:
    """Print a user's history and the best candidates by name."""
    titles, ids = ([runs.printable(t) for t in texts] for texts in (data.catalogue.titles, data.catalogue.ids))
    print(f"\n{name}: user {runs.printable(row.user)}\n  history, oldest first:", end="\n    ")
    print(*(titles[item] for item in row.history), sep="\n    ")
    print(f"  top {min(top_k, len(scores))} of {len(scores)}, with {unit}:")
    for place, column in enumerate(np.argsort(-scores, kind="stable")[:top_k], 1):
        item = row.candidates[column]
        chosen = "  <- came next" if item == row.target else ""
        print(f"    {place:2}. {titles[item]} ({ids[item]}), {scores[column]:.3f}{chosen}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = runs.Parser(__doc__)
    parser.add_argument("--run", type=Path, nargs="+", default=[], help="run folders [those of runs/demo]")
    parser.add_argument("--data", type=Path, help="data folder, where no run names it (--scores)")
    parser.add_argument("--split", choices=["val", "test"], default="test", help="[test]")
    parser.add_argument("--limit", type=runs.non_negative_int, default=0, help="only the first rows; 0: all [0]")
    parser.add_argument("--blank-images", action="store_true", help="replace every image by a neutral one")
    parser.add_argument("--images", choices=["stored", "live"], help="image tokens read, or made [as in training]")
    parser.add_argument("--compare", type=Path, metavar="RUN", help="also the difference of each --run to this one")
    parser.add_argument("--scores", type=Path, nargs="+", default=[], help="other systems' predictions.jsonl")
    recbole = "RecBole's files of the same rows, and the first run's scores of all candidates"
    parser.add_argument("--export-recbole", type=Path, metavar="DIR", help=recbole)
    parser.add_argument("--batch-size", type=runs.positive_int, default=0, help="rows at once [tiny: 16, else 2]")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="auto: bf16 on GPUs")
    parser.add_argument("--no-pack", action="store_true", help="one plain forward per answer [as the run was trained]")
    parser.add_argument("--seed", type=runs.non_negative_int, default=0, help="of the bootstrap [0]")
    runs.add_trust_option(parser)
    parser.add_argument("--user", help="print this user's recommendations instead of metrics")
    parser.add_argument("--top-k", type=runs.positive_int, default=10, help="how many of them [10]")
    parser.add_argument("--from", dest="among", metavar="ID,ID,...", help="among these items [the candidates]")
    options = parser.parse_args(argv)
    if options.among and not options.user:
        parser.error("--from needs --user")
    if options.export_recbole and options.scores and not options.run:
        parser.error("--export-recbole needs --run, whose scores it writes")
    if options.export_recbole and options.limit:
        parser.error("--export-recbole writes whole splits and goes without --limit")
    if options.user and (options.scores or options.compare or options.export_recbole):
        parser.error("--user goes without --scores, --compare and --export-recbole")
    return options


def candidates_among(options: argparse.Namespace, data: Data, rows: list) -> list:
    """The row of --user, its candidates replaced by those of --from."""
    found, path = [row for row in rows if row.user == options.user], data.folder / f"{options.split}.jsonl"
    if not found:
        raise UserError(f'user {options.user} has no row in {path}; its "user" fields are the ids')
    ids = [item.strip() for item in (options.among or "").split(",") if item.strip()]
    unknown = [item for item in ids if item not in data.catalogue.row_of]
    if unknown:
        raise UserError(f"--from: {unknown[0]} is not in {data.folder / 'items.jsonl'}")
    return [replace(found[0], candidates=[data.catalogue.row_of[i] for i in dict.fromkeys(ids)])] if ids else found


def chosen_runs(options: argparse.Namespace) -> tuple[dict[Path, dict], Path]:
    """The configs of the runs to evaluate, and the data folder that they share."""
    names = options.run or [run for run in DEMO_RUNS if run.exists() and not options.scores]
    if not names and not options.scores:
        raise UserError("no --run given and no runs/demo here; run sft.py first")
    configs = {run: runs.read_run(run) for run in [*names, *([options.compare] if options.compare else [])]}
    folders = {str(path) for path in (options.data, *(c["options"]["data"] for c in configs.values())) if path}
    if not folders:
        raise UserError("--scores without --run needs --data, the folder whose candidates were scored")
    if len(folders) > 1:
        raise UserError(f"one data folder at a time, not {' and '.join(sorted(folders))}; give runs of the same data")
    return configs, Path(folders.pop())


@runs.one_line_errors
def main(argv: list[str] | None = None) -> dict[str, Result] | None:
    options = parse(argv)
    configs, folder = chosen_runs(options)
    from hanorec.model import mllm, packing

    accelerator = runs.start_accelerator()
    results, split = {}, "" if options.split == "test" else f"{options.split}_"
    prefix = split + "blank_" * options.blank_images + (f"first{options.limit}_" if options.limit else "")
    for run, config in configs.items():
        made, blank = config["options"], options.blank_images or config["options"]["blank_images"]
        images, trust = options.images or made.get("images"), options.trust_remote_code
        data = Data(folder, made["model"], blank, images, made.get("summaries"), trust=trust)
        if config["data"] != data.hash():
            raise UserError(f"{run} was trained on an earlier {folder}; train it again, or prepare that data again")
        rows = data.rows(options.split, 0 if options.user else options.limit)
        rows = candidates_among(options, data, rows) if options.user else rows
        dtype = mllm.pick_dtype(options.dtype, accelerator)
        pack = not (options.no_pack or config["options"].get("no_pack"))
        model = packing.load_packed(load_result(run, data, dtype), data, pack, accelerator.device)
        prompts = data.prompts(config["options"]["candidate_images"])
        scores, yes = score_rows(model, data, prompts, rows, config["options"], accelerator, options.batch_size)
        ranked = scores if scores is not None else yes
        if options.user:
            unit = "log-likelihood" if scores is not None else "log p(Yes) - log p(No)"
            recommend(str(run), data, rows[0], ranked[0], options.top_k, unit)
            continue
        results[str(run)] = measure(ranked, yes, target_columns(rows), options.seed)
        if accelerator.is_main_process:
            exchange.write_predictions(run / f"{prefix}predictions.jsonl", data.catalogue.ids, rows, scores, yes)
            if options.export_recbole and run == next(iter(configs)):
                splits = {split: data.rows(split) for split in ("train", "val", "test")} | {"candidates": rows}
                exchange.write_recbole(options.export_recbole, data.catalogue, splits, ranked)
    if options.user or not accelerator.is_main_process:
        return None

    if not configs:
        data = Data(folder, None, encoded=False)
        rows = data.rows(options.split, options.limit)
    for path in options.scores:
        scores, yes = exchange.read_scores(path, data.catalogue.ids, rows)
        results[str(path)] = measure(scores, yes if yes is not None else scores, target_columns(rows), options.seed)
    compared = results.get(str(options.compare))
    for name in [name for name, result in results.items() if compared and result is not compared]:
        results[f"{name} minus {options.compare}"] = results[name].minus(compared)
    baselines = {"co-occurrence": cooccurrence_scores(data, rows), "popularity": popularity_scores(data, rows)}
    for name, scores in (baselines | {"chance": np.zeros((len(rows), len(rows[0].candidates)))}).items():
        results[name] = measure(scores, scores, target_columns(rows), options.seed)
    made = data.manifest["options"]
    protocol = f"{folder}: {options.split} ({made['split']}), {len(rows)} rows, {len(rows[0].candidates)} candidates, "
    protocol += f"{made['negative_sampling']} negatives, seed {made['seed']}" + ", blank images" * options.blank_images
    print(f"\n{runs.printable(protocol)}; each value with its 95% bootstrap interval\n\n{tables(results)}")
    for run in configs:
        result = results[str(run)]
        found = {"values": result.values, "intervals": {name: result.interval(name) for name in result.values}}
        runs.write_json(run / f"{prefix}metrics.json", {"protocol": protocol, **found})
    return results


if __name__ == "__main__":
    main()
