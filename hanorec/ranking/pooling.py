"""Group runs that differ in nothing but their seed. A group becomes one row of the results."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from hanorec.run.files import UserError
from hanorec.run.runs import COMMANDS, read_run

Seeds = tuple[int, ...]  # the run's own seed, then those of the runs that it started from; the SFT run's is the last
Groups = dict[str, dict[Seeds, Path]]  # the runs by their seeds, sorted by the SFT seed, for each group name

# Options that do not change what is learned. The hash of the data in config.json stands for `data`.
NOT_COMPARED = ("seed", "out", "data", "resume", "save_every", "keep", "report_to", "export", "trust_remote_code")
STARTS = ("sft", "start")  # options that name the run before


def settings(config: dict) -> dict:
    """Return what must be equal in the runs of a group: options and data, and the same of the run before."""
    options = {name: value for name, value in config["options"].items() if name not in NOT_COMPARED}
    for name in STARTS:
        if options.get(name):
            options[name] = settings(read_run(Path(options[name]), COMMANDS))
    return options | {"stage": config["stage"], "hash of the data": config["data"]}


def seeds_of(config: dict) -> Seeds:
    """Return the seeds of a run and of the runs before it."""
    options = config["options"]
    starts = [options[name] for name in STARTS if options.get(name)]
    before = [seeds_of(read_run(Path(start), COMMANDS)) for start in starts]
    return options.get("seed", 0), *itertools.chain(*before)


def differing(one: dict, other: dict) -> list[str]:
    """Return the names of the settings that differ."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def group_runs(configs: dict[Path, dict]) -> Groups:
    """Group runs that differ in nothing but --seed.

    Args:
        configs: config.json of each run.

    Raises:
        UserError: no two runs can be pooled, or a group has two runs of the same seeds.
    """
    if len(configs) < 2:
        raise UserError("--pool needs two or more runs that differ in nothing but --seed")
    found: list[tuple[dict, dict[Seeds, Path]]] = []
    for run, config in configs.items():
        own, seeds = settings(config), seeds_of(config)
        group = next((runs for known, runs in found if known == own), None)
        if group is None:
            group = {}
            found.append((own, group))
        if seeds in group:
            raise UserError(f"--pool: {group[seeds]} and {run} differ in nothing, their --seed is {seeds[0]}; give one")
        group[seeds] = run
    if len(found) == len(configs):
        one, other = itertools.islice(configs, 2)
        names = ", ".join(differing(found[0][0], found[1][0]))
        raise UserError(f"--pool: no two runs differ in nothing but --seed; {one} and {other} differ in {names}")
    groups: Groups = {}
    for _, runs in found:
        name = group_name([str(run) for run in runs.values()])
        if name in groups:
            name = ", ".join(map(str, runs.values()))
        groups[name] = dict(sorted(runs.items(), key=lambda seeds_and_run: seeds_and_run[0][::-1]))
    return groups


def common_start(texts: Sequence[str]) -> str:
    """Return the characters that all texts begin with."""
    equal = itertools.takewhile(lambda characters: len(set(characters)) == 1, zip(*texts, strict=False))
    return "".join(characters[0] for characters in equal)


def group_name(names: Sequence[str]) -> str:
    """Return the part that the names of runs have in common, with the number of runs.

    >>> group_name(["runs/x/sft-1", "runs/x/sft-2"]), group_name(["runs/1/sft"])
    ('runs/x/sft-* (2 seeds)', 'runs/1/sft')
    """
    if len(names) == 1:
        return names[0]
    start = common_start(names)
    end = common_start([name[len(start) :][::-1] for name in names])[::-1]
    return f"{start}*{end} ({len(names)} seeds)"


def reference_group(groups: Groups, compared: Sequence[Path]) -> str:
    """Return the name of the group that contains the runs of --compare.

    Raises:
        UserError: they are in several groups, or another group has other SFT seeds, or has one twice.
    """
    names = [name for name, runs in groups.items() if set(compared) & set(runs.values())]
    if len(names) > 1:
        raise UserError(f"--compare names runs of several groups: {' and '.join(names)}; give runs of one")
    last = {name: [seeds[-1] for seeds in runs] for name, runs in groups.items()}
    for name, own in last.items():
        if own != last[names[0]] or len(set(own)) < len(own):
            own, wanted = (", ".join(map(str, numbers)) for numbers in (own, last[names[0]]))
            fault = f"{name} has {own}, but {names[0]} has {wanted}"
            raise UserError(f"--compare pairs runs by the --seed of their SFT runs: {fault}")
    return names[0]
