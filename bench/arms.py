"""The arms of bench/study.py: which runs a study compares, with their options."""

from dataclasses import dataclass, replace

DPO = "--hardness none --responsiveness none --sigma 0"  # plain DPO: without HaRS and NoDO


@dataclass(frozen=True)
class Arm:
    """One row of a study.

    Args:
        label: name of the row.
        options: options of the script, besides those of its family and of the study.
        family: arms of a family share a learning rate and a beta, which `study.py --grid` compares on validation;
            those of `paper` are the paper's.
        script: `sft.py`, or `dpo_hano.py`, which starts from the arm `sft`.
        group: index of its table's title in tables.TITLES.
        base: the arm that it adds one thing to, if there is one.
    """

    label: str
    options: str = ""
    family: str = ""
    script: str = "dpo_hano.py"
    group: int = 1
    base: str = ""


START = {
    "sft": Arm("SFT", script="sft.py", group=0),
    "titles": Arm("SFT without posters", "--blank-images", script="sft.py", group=0),
}
CONTROLS = {
    "continued": Arm("SFT continued", f"--objective sft {DPO}", "continued"),
    "softmax": Arm("softmax over 10 titles, no reference", f"--objective softmax --rejected 9 {DPO}", "softmax"),
}
PREFERENCE = {
    "dpo": Arm("DPO", DPO, "dpo", group=2),
    "dpo_model": Arm("DPO, rejected from the model", f"--rejected-from model {DPO}", "dpo", group=2),
    "sdpo9": Arm("S-DPO, 9 rejected", f"--rejected 9 {DPO}", "sdpo", group=2),
    "sdpo3": Arm("S-DPO, 3 rejected", f"--rejected 3 {DPO}", "sdpo", group=2),
    "sdpo3_model": Arm(
        "S-DPO, 3 rejected from the model", f"--rejected 3 --rejected-from model {DPO}", "sdpo", group=2
    ),
    "sdpo8_model": Arm(
        "S-DPO, 8 rejected from the model", f"--rejected 8 --rejected-from model {DPO}", "sdpo", group=2
    ),
}


def hars(label: str, hardness: str, responsiveness: str = "none") -> Arm:
    """Return an arm with a lambda or an eta, without noise."""
    options = f"--hardness {hardness} --responsiveness {responsiveness} --sigma 0"
    return Arm(label, options, "dpo", group=3, base="dpo")


HARS = {
    "topk": hars("lambda topk (the paper)", "topk"),
    "clusters": hars("lambda clusters", "clusters"),
    "cosine": hars("lambda cosine", "cosine"),
    "margin": hars("lambda margin", "margin"),
    "constant": hars("lambda constant", "constant"),
    "margin_turned": hars("lambda margin, sign turned", "margin --hardness-sign -1"),
    "clusters_turned": hars("lambda clusters, sign turned", "clusters --hardness-sign -1"),
    "eta": hars("eta batch (the paper)", "none", "batch"),
    "eta_ema": hars("eta ema", "none", "ema"),
}


def nodo(label: str, noise: str) -> Arm:
    """Return an arm with a perturbation, without lambda and eta."""
    return Arm(label, f"--hardness none --responsiveness none {noise}", "dpo", group=4, base="dpo")


NODO = {
    "nodo_05": nodo("NoDO relative .05 (the paper's sigma)", "--sigma 0.05"),
    "nodo_1": nodo("NoDO relative .1", "--sigma 0.1"),
    "nodo_3": nodo("NoDO relative .3", "--sigma 0.3"),
    "absolute_005": nodo("NoDO absolute .005", "--noise absolute --sigma 0.005"),
    "absolute_05": nodo("NoDO absolute .05 (the authors' code)", "--noise absolute --sigma 0.05"),
    # The next two: as large as NoDO relative .3, by the KL divergence that the runs log (noise_kl)
    "embeddings": nodo("noise on the embeddings .09", "--noise embeddings --sigma 0.09"),
    "dropout": nodo("LoRA dropout .05", "--sigma 0 --lora-dropout 0.05"),
}
PAPER = {
    "paper": Arm("HaNoRec, the paper's settings", "--sigma 0.05 --lora-dropout 0.05", "paper", group=5),
    "wo_hars": Arm(
        "w/o HaRS", "--sigma 0.05 --hardness none --responsiveness none --lora-dropout 0.05", "paper", group=5
    ),
    "wo_nodo": Arm("w/o NoDO", "--sigma 0 --lora-dropout 0.05", "paper", group=5),
    "wo_sam": Arm("w/o SAM", "--sigma 0.05 --hardness cosine --lora-dropout 0.05", "paper", group=5),
    "wo_all": Arm("w/o ALL", f"{DPO} --lora-dropout 0.05", "paper", group=5),
}


def combined(label: str, options: str) -> Arm:
    """Return an arm that adds something to S-DPO with nine rejected answers."""
    options = f"--rejected 9 --responsiveness none {options}"
    return Arm(f"S-DPO, 9 rejected, {label}", options, "sdpo", group=5, base="sdpo9")


COMBINED = {
    "sdpo9_margin": combined("lambda margin", "--hardness margin --sigma 0"),
    "sdpo9_turned": combined("lambda margin, sign turned", "--hardness margin --hardness-sign -1 --sigma 0"),
    "sdpo9_nodo": combined("NoDO relative .3", "--hardness none --sigma 0.3"),
    "sdpo9_sft": combined("SFT weight .1", "--hardness none --sigma 0 --sft-weight 0.1"),
}

# For the other study: of HaRS, NoDO and the combinations those that are best on the demo's validation, five seeds
BEST = {"margin": HARS["margin"], "absolute_05": NODO["absolute_05"], "sdpo9_turned": COMBINED["sdpo9_turned"]}


def with_larger_noise(arms: dict[str, Arm]) -> dict[str, Arm]:
    """Return the arms with the paper's sigma for MovieLens, 0.1."""
    return {name: replace(arm, options=arm.options.replace("sigma 0.05", "sigma 0.1")) for name, arm in arms.items()}


def grid(alone: tuple[str, ...], rates: tuple[str, str]) -> dict[str, list[str]]:
    """Return the four recipes that each family tries: two learning rates with two betas, or four learning rates.

    Args:
        alone: the learning rates of SFT continued, whose loss has no beta. rates: those of the other families.
    """
    both = [f"--lr {lr} --beta {beta}" for lr in rates for beta in ("0.1", "1")]
    return {"continued": [f"--lr {lr} --beta 0.1" for lr in alone], "softmax": both, "dpo": both, "sdpo": both}


@dataclass(frozen=True)
class Study:
    """A study.

    Args:
        prepare: options of prepare_data.py.
        options: of each script, by script.
        grid: the recipes that each family tries, on validation. recipes: the one that it takes.
        arms: the arms by name; `sft` and `continued` are among them.
        splits: the splits to evaluate.
    """

    name: str
    prepare: str
    options: dict[str, str]
    grid: dict[str, list[str]]
    recipes: dict[str, str]
    arms: dict[str, Arm]
    splits: list[str]
    seeds: list[int]

    def run_folder(self, arm: str, seed: int) -> str:
        """Return the run folder of an arm and a seed."""
        return f"runs/{self.name}/{arm}-{seed}"

    def grid_folder(self, family: str, recipe: str) -> str:
        """Return the run folder of a recipe of the grid."""
        _, lr, _, beta = recipe.split()
        return f"runs/{self.name}/grid/{family}-{lr}-{beta}-1"


def recipes(continued: str, softmax: str, dpo: str, sdpo: str) -> dict[str, str]:
    """Return the recipe of each family, from the learning rates that validation chose; it chose beta 1 everywhere."""
    chosen = {family: f"--lr {lr} --beta 1" for family, lr in (("softmax", softmax), ("dpo", dpo), ("sdpo", sdpo))}
    return {"paper": "--lr 1e-4 --beta 0.1", "continued": f"--lr {continued} --beta 0.1"} | chosen


STUDIES = {
    "demo": Study(
        name="demo",
        prepare="",
        options={"sft.py": "", "dpo_hano.py": "--max-steps 300"},
        grid=grid(("1e-4", "3e-4", "1e-3", "3e-3"), ("1e-3", "3e-3")),
        recipes=recipes(continued="3e-4", softmax="3e-3", dpo="1e-3", sdpo="3e-3"),
        arms=START | CONTROLS | PREFERENCE | HARS | NODO | PAPER | COMBINED,
        splits=["test", "test_hard"],
        seeds=[1, 2, 3, 4, 5],
    ),
    "movielens-small": Study(
        name="movielens-small",
        prepare="--dataset movielens --source movielens-small/ --out data/movielens-small --history 20 "
        "--max-windows-per-user 0 --max-pixels 784 --further-tests popularity 99",
        options={
            "sft.py": "--warmup-steps 4000 --dropout 0 --lr 3e-4 --max-steps 1500 --eval-limit 0 --dtype float32",
            "dpo_hano.py": "--max-steps 200 --eval-limit 0",
        },
        grid=grid(("3e-5", "1e-4", "3e-4", "1e-3"), ("1e-4", "3e-4")),
        recipes=recipes(continued="3e-5", softmax="3e-4", dpo="1e-4", sdpo="1e-4"),
        arms=START | CONTROLS | PREFERENCE | BEST | with_larger_noise(PAPER),
        splits=["test", "test_popularity"],
        seeds=[1, 2, 3],
    ),
}
