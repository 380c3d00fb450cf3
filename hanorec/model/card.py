"""Write the model card of an exported run: data, protocol, metrics, base model, method, licence, how to load it."""

from pathlib import Path

from hanorec.model.encoding import Encoding
from hanorec.model.prompts import AFTER_HISTORY, CANDIDATE, HISTORY, NO, RANK_QUESTION, YES, YESNO_QUESTION, Prompts
from hanorec.run.files import printable, read_json
from hanorec.run.options import words
from hanorec.run.runs import read_run

# Options that say where and how a run was computed, not what was learned
NOT_METHOD = {"sft", "data", "out", "start", "model", "resume", "overwrite", "save_every", "keep", "report_to"}
NOT_METHOD |= {"export", "trust_remote_code", "gradient_checkpointing", "images", "eval_limit"}

CARD = """\
{front}# {name}

This model ranks candidates for the next item of a user's history. It reads the items' titles and pictures. It was
trained by {method} with the code of HaNoRec (SIGIR 2026, [arXiv 2511.18740](https://arxiv.org/abs/2511.18740)).

- Base model: {base}
- `merged/` is the complete model in float32. {adapter}

## Data

{data}

## Results

{results}

## Training

Weights of step {step} were the best on the validation examples, or the last.

{options}

## Licence

The weights were made from the base model and from the data, and both have licences of their own. Check that these
allow what you do with the weights, before you publish them too. The code of HaNoRec has the MIT licence.

## Load it

This needs transformers alone, and runs in the folder of this file. {snippet_note}

```python
{snippet}```
"""

SNIPPET = """\
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

model = AutoModelForImageTextToText.from_pretrained("merged").eval()
tokenizer = AutoTokenizer.from_pretrained("merged")


def tokens(*texts):
    \"\"\"Return the tokens of texts, which are tokenized one by one as in the training.\"\"\"
    return [token for text in texts for token in tokenizer(text, add_special_tokens=False).input_ids]


def logp(question, answer):
    \"\"\"Return the log-probability of an answer to a question, which is a list of texts.\"\"\"
    ids, answer_ids = tokens({head}, *question, {tail}), tokens(answer, {end})
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids + answer_ids])).logits[0, len(ids) - 1 : -1]
    return float(logits.log_softmax(-1).gather(1, torch.tensor(answer_ids)[:, None]).sum())


history = {history}
candidates = {candidates}
lines = [title + "\\n" for title in history]
{scoring}"""
RANK_SCORING = """\
choices = [title + "\\n" for title in candidates]
question = {question}
for title in candidates:
    print(title, logp(question, title))
"""
CANDIDATES_FIRST = "[{rank}, *choices, {history}, *lines]"
HISTORY_FIRST = "[{history}, *lines, {after}, {rank}, *choices]"
YESNO_SCORING = """\
for title in candidates:
    question = [{history}, *lines, {candidate}, title + "\\n", {yesno}]
    print(title, logp(question, {yes}) - logp(question, {no}))
"""


def model_card(run: Path, config: dict, prompts: Prompts, encoding: Encoding) -> str:
    """Return the text of the model card, in Markdown.

    Args:
        config: the config.json of the run. prompts: those that the run was trained on.
    """
    options = config["options"]
    stages = {"sft.py": options}
    method, adapter = "supervised fine-tuning", ""
    if config["stage"] == "dpo_hano":
        stages = {"sft.py": read_run(Path(options["sft"]))["options"], "dpo_hano.py": options}
        method += " and then preference optimisation"
        adapter = "`base/` is the model before preference optimisation, and `adapter/` the LoRA on it."
    elif options["tune"] == "lora":
        adapter = "`adapter/` is the LoRA on the base model."
    hub = not encoding.tiny and not Path(options["model"]).is_dir()
    front = f"base_model: {options['model']}\n" if hub else ""
    tags = "library_name: transformers\npipeline_tag: image-text-to-text\ntags:\n- recommendation\n- hanorec\n"
    result = read_json(run / "result.json", {"best": dict}, "train the run again")
    return CARD.format(
        front=f"---\n{front}{tags}---\n\n",
        name=line(f"{Path(options['data']).name}: {run.name}"),
        method=method,
        base="an untrained Qwen2.5-VL of under a million weights" if encoding.tiny else line(options["model"]),
        adapter=adapter,
        data=data_lines(encoding.data.manifest),
        results=results(run),
        step=result["best"].get("step"),
        options=option_table(stages),
        snippet_note=snippet_note(options),
        snippet=snippet(options, prompts),
    )


def line(value) -> str:
    """Return a value as text for a line or a cell of Markdown: without line ends, markup and control characters."""
    text = printable(value)
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#" else c for c in text)


def table(head: list[str], rows: list[list]) -> str:
    rows = [head, ["---"] * len(head), *[[line(cell) for cell in row] for row in rows]]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def data_lines(manifest: dict) -> str:
    """Describe the data and the protocol of a data folder."""
    prepared = manifest["options"]
    rows = [["source", manifest.get("source")], ["seed", manifest["seed"]]]
    rows += [[name.replace("_", " "), prepared[name]] for name in ("split", "history", "negatives") if name in prepared]
    rows += [[name.replace("_", " "), count] for name, count in manifest.get("counts", {}).items() if count]
    return table(["", ""], rows)


def results(run: Path) -> str:
    """Return the metrics that evaluate.py wrote into the run, with their protocol and intervals."""
    if not (run / "metrics.json").exists():
        return f"This run was not evaluated: `python evaluate.py --run {printable(run)}` measures it."
    metrics = read_json(run / "metrics.json", {"protocol": str, "values": dict, "intervals": dict}, "delete it")
    rows = []
    for name, value in metrics["values"].items():
        low, high = metrics["intervals"][name]
        rows.append([name, f"{value:.4f}", f"{low:.4f} to {high:.4f}"])
    heading = "Each value has its 95% bootstrap interval."
    return f"{line(metrics['protocol'])}. {heading}\n\n{table(['metric', 'value', '95% interval'], rows)}"


def option_table(stages: dict[str, dict]) -> str:
    """Return a table of the options that decide what is learned. stages: the options by name of the script."""
    names = dict.fromkeys(name for options in stages.values() for name in options if name not in NOT_METHOD)
    rows = []
    for name in names:
        values = [options.get(name) for options in stages.values()]
        if any(value is not None and value is not False for value in values):
            rows.append([f"--{name.replace('_', '-')}", *("" if value is None else words(value) for value in values)])
    return table(["option", *stages], rows)


def snippet_note(options: dict) -> str:
    """Say what the snippet prints, and what its prompts lack."""
    score = "the log-likelihood of each candidate" if "rank" in options["tasks"] else "log p(Yes) - log p(No)"
    note = f"It prints {score}. The prompts of the training also show the picture after each title of the history."
    if options.get("summaries"):
        note += " They also hold summaries and preferences."
    return note


def snippet(options: dict, prompts: Prompts) -> str:
    """Return the Python code that loads the model and scores titles of the catalogue."""
    template, titles = prompts.template, prompts.items.titles
    texts = {"rank": RANK_QUESTION, "history": HISTORY, "candidate": CANDIDATE, "yesno": YESNO_QUESTION}
    texts |= {"yes": YES, "no": NO, "after": AFTER_HISTORY}
    literals = {name: repr(text) for name, text in texts.items()}
    question = (HISTORY_FIRST if prompts.history_first else CANDIDATES_FIRST).format(**literals)
    scoring = RANK_SCORING if "rank" in options["tasks"] else YESNO_SCORING
    return SNIPPET.format(
        head=repr(prompts.tokenizer.decode(template.head)),
        tail=repr(prompts.tokenizer.decode(template.tail)),
        end=repr(prompts.tokenizer.decode([template.end_of_turn])),
        history=repr([printable(title) for title in titles[:3]]),
        candidates=repr([printable(title) for title in titles[3:6] or titles[:3]]),
        scoring=scoring.format(**literals, question=question),
    )
