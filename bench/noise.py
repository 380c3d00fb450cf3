"""Find rivals of NoDO that disturb a policy as much as it does: python bench/noise.py --run runs/demo/dpo-1

Prints the KL divergence of the next token under each perturbation from the clean policy, in nats, over the answers of
training pairs: NoDO of several sizes, noise on the embeddings, and LoRA dropout.
"""

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from hanorec.data.folder import DataFolder  # noqa: E402
from hanorec.model.encoding import Encoding  # noqa: E402
from hanorec.model.finished import load_finished  # noqa: E402
from hanorec.model.noise import noise_effect, perturbation  # noqa: E402
from hanorec.model.packing import PackedMLLM  # noqa: E402
from hanorec.model.pairs import Pairs, pools  # noqa: E402
from hanorec.run.runs import read_run  # noqa: E402
from mllm_srec.chain_of_thought import load_run_prompts  # noqa: E402

NOISES = [("relative", sigma) for sigma in (0.05, 0.1, 0.3)]
NOISES += [("absolute", sigma) for sigma in (0.005, 0.05)]
NOISES += [("embeddings", sigma) for sigma in (0.003, 0.01, 0.03, 0.1, 0.3)]
DROPOUTS = (0.001, 0.01, 0.05, 0.1, 0.3)


def main(argv: list[str] | None = None) -> dict[tuple[str, float], float]:
    """Print the table. Returns the mean KL by kind and size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="finished run of dpo_hano.py")
    parser.add_argument("--batches", type=int, default=5)
    given = parser.parse_args(argv)
    config = read_run(given.run, ["dpo_hano"])
    trained = config["options"]
    data = DataFolder(Path(trained["data"]))
    encoding = Encoding(data, trained["model"], trained["blank_images"])
    prompts = load_run_prompts(given.run, config, data, encoding)
    examples = data.examples("train", 8 * given.batches)
    kinds = ("rank", "yes", "no")
    pairs = Pairs(prompts, examples, kinds, trained["max_length"], pools(examples, 1, "data"))
    packed = PackedMLLM(load_finished(given.run, encoding, torch.float32))
    for name, weight in packed.named_parameters():
        weight.requires_grad_("lora_" in name)
    reference = torch.zeros(len(pairs), 2)
    size = len(pairs) // given.batches
    batches = [
        pairs.batch([*range(start, start + size)], packed, encoding.tokens, reference, reference[:, 1:])
        for start in range(0, len(pairs), size)
    ]

    def mean_kl(noise: str, sigma: float) -> float:
        options = SimpleNamespace(seed=0, noise=noise, sigma=sigma)
        effects = []
        for step, batch in enumerate(batches):
            effects.append(noise_effect(packed, batch, perturbation(packed, options, step, 1))["noise_kl"])
        return float(torch.stack(effects).mean())

    found = {setting: mean_kl(*setting) for setting in NOISES}
    layers = [module for name, module in packed.named_modules() if name.endswith("lora_dropout")]
    for probability in DROPOUTS:
        for layer in layers:
            for adapter in layer:
                layer[adapter] = torch.nn.Dropout(probability)
        found["dropout", probability] = mean_kl("relative", 0.0)
    for (kind, sigma), kl in found.items():
        print(f"{kind:10} {sigma:<6} {kl:.2e}")
    return found


if __name__ == "__main__":
    main()
