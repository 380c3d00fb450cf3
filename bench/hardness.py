"""Print the spread of lambda over the training pairs, for each form of hardness.

    python bench/hardness.py                                  # runs/demo/sft
    python bench/hardness.py --sft runs/movielens-small/sft-1 --pairs 2000

Also prints `union`, a second reading of "cluster similarity": the profiles of both items, softmax of the cosines of
their K nearest neighbours, are laid out over the union of the neighbours, and D is their Euclidean distance.
All forms are computed for the first --pairs examples; `margin` needs the reference's log-probabilities of their pairs.
"""

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from hanorec.data.folder import DataFolder  # noqa: E402
from hanorec.model.encoding import Encoding  # noqa: E402
from hanorec.model.finished import load_finished  # noqa: E402
from hanorec.model.hars import item_vectors, lambdas, pair_hardness  # noqa: E402
from hanorec.model.packing import PackedMLLM  # noqa: E402
from hanorec.model.pairs import Pairs, pools  # noqa: E402
from hanorec.model.reference import score_pairs  # noqa: E402
from hanorec.run.launch import start_accelerator  # noqa: E402
from hanorec.run.runs import read_run  # noqa: E402
from mllm_srec.chain_of_thought import load_run_prompts  # noqa: E402


def union_distance(vectors: torch.Tensor, chosen: list[int], rejected: list[int], k: int) -> torch.Tensor:
    """Return the distance of the two items' profiles, laid out over the union of their neighbours: [pairs]."""
    unit = F.normalize(vectors.float(), dim=-1)
    cosines = (unit @ unit.T).fill_diagonal_(-torch.inf)
    nearest = cosines.topk(k, dim=-1)
    profiles = torch.zeros_like(cosines).scatter(1, nearest.indices, nearest.values.softmax(dim=-1))
    return (profiles[chosen] - profiles[rejected]).norm(dim=-1)


def main(argv: list[str] | None = None) -> dict[str, torch.Tensor]:
    """Print the table. Returns lambda of the ranking pairs by form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sft", type=Path, default=Path("runs/demo/sft"))
    parser.add_argument("--pairs", type=int, default=1000, help="examples to use, the first ones")
    parser.add_argument("--top-k", type=int, default=10)
    given = parser.parse_args(argv)
    config = read_run(given.sft, ["sft"])
    trained = config["options"]
    data = DataFolder(Path(trained["data"]))
    encoding = Encoding(data, trained["model"], trained["blank_images"])
    examples = data.examples("train", given.pairs)
    prompts = load_run_prompts(given.sft, config, data, encoding)
    pairs = Pairs(prompts, examples, ["rank"], trained["max_length"], pools(examples, 1, "data"))
    model = load_finished(given.sft, encoding)
    accelerator = start_accelerator()
    reference = score_pairs(PackedMLLM(model), encoding, pairs, [*range(len(pairs))], accelerator)
    vectors = item_vectors(encoding, model)
    found = {}
    for hardness in ("topk", "clusters", "cosine", "margin"):
        options = SimpleNamespace(hardness=hardness, hardness_sign=1, top_k=given.top_k)
        found[hardness] = pair_hardness(options, vectors, pairs, reference, accelerator)[:, 0]
    chosen, rejected = [example.target for example in examples], [example.rejected for example in examples]
    distance = union_distance(vectors, chosen, rejected, given.top_k)
    found["union"] = lambdas(SimpleNamespace(hardness="clusters", hardness_sign=1), distance, distance)
    margin = (reference[:, 0] - reference[:, 1]).numpy()
    print(f"lambda of {len(pairs)} pairs   1%     50%    99%    correlation with the reference's margin")
    for name, values in found.items():
        low, middle, high = values.quantile(torch.tensor([0.01, 0.5, 0.99])).tolist()
        print(f"{name:21} {low:.3f}  {middle:.3f}  {high:.3f}  {np.corrcoef(values.numpy(), margin)[0, 1]:+.2f}")
    return found


if __name__ == "__main__":
    main()
