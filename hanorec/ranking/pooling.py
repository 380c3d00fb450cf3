"""Group runs that differ in nothing but their seed. A group becomes one row of the results."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from hanorec.run.files import UserError
from hanorec.run.runs import COMMANDS, read_run

Seeds = tuple[int, ...]  # the seed of the SFT run, then those of the other runs of the chain, the last run first
Groups = dict[str, dict[Seeds, Path]]  # the runs by their seeds, in order of the SFT seed, by name of the group

# Options that do not change what is learned. The hash of the data in config.json stands for `data`. Older runs have
# the option `export`.
NOT_COMPARED = ("seed", "out", "data", "resume", "overwrite", "save_every", "keep", "report_to", "trust_remote_code")
NOT_COMPARED += ("export",)
STARTS = ("sft", "start")  # options that name the run before


def chain_of(config: dict, prefix: str = "") -> dict[str, dict]:
    """Return config.json of a run and of the runs before it, the last run first.

    The keys are prefixes: empty for the run itself, `sft.` for its SFT run, `sft.start.` for the run before that one.
    """
    chain = {prefix: config}
    for name in STARTS:
        if config["options"].get(name):
            chain |= chain_of(read_run(Path(config["options"][name]), COMMANDS), f"{prefix}{name}.")
    return chain


def settings_of(chain: dict[str, dict]) -> dict:
    """Return what must be equal in the runs of a group: stage, data and options of each run of the chain."""
    settings = {}
    for prefix, config in chain.items():
        settings |= {f"{prefix}stage": config["stage"], f"{prefix}hash of the data": config["data"]}
        for name, value in config["options"].items():
            if name not in (*NOT_COMPARED, *STARTS):
                settings[prefix + name] = value
    return settings


def seeds_of(chain: dict[str, dict]) -> Seeds:
    """Return the seeds of the runs of a chain, that of the SFT run first."""
    by_stage = sorted(chain.values(), key=lambda config: config["stage"] != "sft")  # stable
    return tuple(config["options"].get("seed", 0) for config in by_stage)


def differing(one: dict, other: dict) -> list[str]:
    """Return the names of the settings that differ, or that only one of the two has."""
    return sorted(name for name in one | other if name not in one or name not in other or one[name] != other[name])


def group_runs(configs: dict[Path, dict]) -> Groups:
    """Group runs that differ in nothing but --seed.

    Args:
        configs: config.json of each run.

    Raises:
        UserError: no two runs can be pooled, or two runs of a group have the same seed or SFT runs of the same seed.
    """
    if len(configs) < 2:
        raise UserError("--pool needs two or more runs that differ in nothing but --seed")
    chains = {run: chain_of(config) for run, config in configs.items()}
    grouped: list[tuple[dict, dict[Seeds, Path]]] = []  # (settings, runs) of each group
    for run, chain in chains.items():
        settings, seeds = settings_of(chain), seeds_of(chain)
        runs = next((runs for others, runs in grouped if others == settings), None)
        if runs is None:
            runs = {}
            grouped.append((settings, runs))
        for other_seeds, other in runs.items():
            check_independent(other, other_seeds, run, seeds)
        runs[seeds] = run
    if len(grouped) == len(configs):
        one, other = itertools.islice(configs, 2)
        names = ", ".join(differing(grouped[0][0], grouped[1][0]))
        raise UserError(f"--pool: no two runs differ in nothing but --seed; {one} and {other} differ in {names}")
    groups: Groups = {}
    for _, runs in grouped:
        name = group_name([str(run) for run in runs.values()])
        if name in groups:
            name = ", ".join(map(str, runs.values()))
        groups[name] = dict(sorted(runs.items()))
    return groups


def check_independent(one: Path, one_seeds: Seeds, other: Path, other_seeds: Seeds) -> None:
    """Raise UserError if two runs of a group have the same SFT seed: they are no two independent trainings."""
    if one_seeds == other_seeds:
        raise UserError(f"--pool: {one} and {other} differ in nothing, also not in --seed; give one")
    if one_seeds[0] == other_seeds[0]:
        fault = f"{one} and {other} start from SFT runs of one --seed, {one_seeds[0]}"
        raise UserError(f"--pool: {fault}, so they are not independent; train an SFT run for each seed, or give one")


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
        UserError: the runs are in several groups, or another group has other SFT seeds.
    """
    names = [name for name, runs in groups.items() if set(compared) & set(runs.values())]
    if len(names) > 1:
        raise UserError(f"--compare names runs of several groups: {' and '.join(names)}; give runs of one")
    sft_seeds = {name: [seeds[0] for seeds in runs] for name, runs in groups.items()}
    for name, numbers in sft_seeds.items():
        if numbers != sft_seeds[names[0]]:
            has, wanted = (", ".join(map(str, numbers)) for numbers in (numbers, sft_seeds[names[0]]))
            fault = f"{name} has {has}, but {names[0]} has {wanted}"
            remedy = "give runs of the same seeds in every group"
            raise UserError(f"--compare pairs runs by the --seed of their SFT runs: {fault}; {remedy}")
    return names[0]
