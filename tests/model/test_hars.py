"""lambda of the pairs, in all its forms, and eta."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import Opened

from hanorec.model import hars
from hanorec.model.finished import load_finished
from hanorec.model.pairs import Pairs, pools
from hanorec.run.files import UserError

KINDS = ("rank", "yes", "no")


@pytest.fixture(scope="module")
def opened(prepared):
    return Opened(prepared)


def pair_hardness(opened, sft_run, hardness, sign=1, reference=None, top_k=10, rejected=3):
    examples = opened.examples("train")
    pairs = Pairs(opened.prompts(), examples, KINDS, 4096, pools(examples, rejected, "model"))
    pairs.columns = pairs.columns[:, 1 : 1 + rejected]
    options = SimpleNamespace(hardness=hardness, hardness_sign=sign, top_k=top_k)
    model = load_finished(sft_run, opened.encoding)
    accelerator = SimpleNamespace(print=print, device="cpu")
    vectors = hars.item_vectors(opened.encoding, model)
    return pairs, hars.pair_hardness(options, vectors, pairs, reference, accelerator)


def test_cluster_means_equal_a_loop():
    vectors = torch.randn(60, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    unit = vectors.numpy() / np.linalg.norm(vectors.numpy(), axis=1, keepdims=True)
    means = hars.cluster_means(vectors, 4).numpy()
    for item in range(60):
        others = sorted((other for other in range(60) if other != item), key=lambda other: -unit[item] @ unit[other])
        np.testing.assert_allclose(means[item], unit[others[:4]].mean(0), atol=1e-6)


@pytest.mark.parametrize("hardness", ["topk", "clusters", "cosine", "constant", "none"])
def test_a_lambda_for_each_item_of_the_pool(opened, sft_run, hardness):
    """The mean over the rejected answers of each kind is 1. A Yes/No pair has one, about the example's own item."""
    pairs, values = pair_hardness(opened, sft_run, hardness)
    assert values.shape == (len(pairs), len(pairs.pool[0]))
    assert values[1::3, 1:].isnan().all() and values[2::3, 1:].isnan().all()
    assert torch.equal(values[1::3, 0], values[2::3, 0])
    for kind in (values[0::3].gather(1, pairs.columns), values[1::3, 0]):
        assert float(kind.mean()) == pytest.approx(1, abs=0.01 if hardness == "topk" else 0.03)
    spread = float(values.nan_to_num(1).max() - values.nan_to_num(1).min())
    assert (spread > 0.8) if hardness in ("clusters", "cosine") else (spread < 0.2)
    if hardness in ("constant", "none"):
        assert spread < 1e-6


@pytest.mark.parametrize("hardness", ["clusters", "cosine"])
def test_each_kind_of_pairs_has_its_own_mean_and_deviation(opened, sft_run, hardness):
    pairs, values = pair_hardness(opened, sft_run, hardness)
    for kind in (values[0::3].gather(1, pairs.columns), values[1::3, 0]):
        standardised = (kind / 2).logit()
        assert float(standardised.mean()) == pytest.approx(0, abs=1e-4)
        assert float(standardised.std()) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("hardness", ["topk", "clusters", "cosine"])
def test_the_sign_turns_the_order(opened, sft_run, hardness):
    _, values = pair_hardness(opened, sft_run, hardness)
    _, turned = pair_hardness(opened, sft_run, hardness, sign=-1)
    order = values[0].argsort()
    assert (turned[0][order].diff() <= 1e-6).all() and (values[0][order].diff() >= 0).all()


def test_more_neighbours_than_items_are_refused(opened, sft_run):
    pair_hardness(opened, sft_run, "clusters", top_k=len(opened.items) - 1)
    with pytest.raises(UserError, match="needs more items"):
        pair_hardness(opened, sft_run, "clusters", top_k=len(opened.items))


def sigmoid(value):
    return 1 / (1 + np.exp(-value))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("hardness", ["topk", "clusters"])
def test_lambda_of_neighbours_by_a_loop(opened, hardness, sign):
    """Equations (5, 6) of the profiles; equation (6) of the standardised 1 - cosine of the cluster means."""
    k, count = 4, len(opened.items)
    vectors = torch.randn(count, 6, generator=torch.Generator().manual_seed(0))
    unit = vectors.double().numpy() / np.linalg.norm(vectors.double().numpy(), axis=1, keepdims=True)
    described = []  # the profile of each item, or the mean of its cluster
    for item in range(count):
        others = sorted((o for o in range(count) if o != item), key=lambda o: -unit[item] @ unit[o])[:k]
        powers = np.array([np.exp(unit[item] @ unit[other]) for other in others])
        described.append(powers / powers.sum() if hardness == "topk" else sum(unit[other] for other in others) / k)
    examples = opened.examples("train")
    pairs = Pairs(opened.prompts(), examples, KINDS, 4096, pools(examples, 2, "model"))
    pairs.columns = pairs.columns[:, 1:3]
    distance = np.zeros((len(examples), len(pairs.pool[0])))
    for row, example in enumerate(examples):
        for column, item in enumerate(pairs.pool[row]):
            one, other = described[example.target], described[item]
            cosine = one @ other / (one @ one * (other @ other)) ** 0.5
            distance[row, column] = sign * (np.sqrt(((one - other) ** 2).sum()) if hardness == "topk" else 1 - cosine)
    options = SimpleNamespace(hardness=hardness, hardness_sign=sign, top_k=k)
    values = hars.pair_hardness(options, vectors, pairs, None, SimpleNamespace(print=print, device="cpu")).numpy()
    for kind, columns in enumerate(([1, 2], [0], [0])):  # that the pairs of this kind reject
        mean, deviation = distance[:, columns].mean(), distance[:, columns].std(ddof=1)
        topk = sigmoid(distance) / sigmoid(mean)
        expected = topk if hardness == "topk" else sigmoid((distance - mean) / deviation) / sigmoid(0)
        used = slice(None) if kind == 0 else slice(1)
        assert expected[:, used].std() > 1e-3
        np.testing.assert_allclose(values[kind::3, used], expected[:, used], rtol=2e-5)


@pytest.mark.parametrize("sign", [1, -1])
def test_margin_by_hand(opened, sft_run, sign):
    """0.5 + sigmoid of the standardised margin of each kind, over the rejected items; a small margin is hard."""
    examples = opened.examples("train")
    pool = len(pools(examples, 1, "model")[0])
    reference = 5 * torch.randn(3 * len(examples), 1 + pool, generator=torch.Generator().manual_seed(0))
    reference[1::3, 2:] = reference[2::3, 2:] = torch.nan
    pairs, values = pair_hardness(opened, sft_run, "margin", sign, reference)
    margin = (reference[:, :1] - reference[:, 1:]).numpy().astype(float)
    for kind in range(3):
        own = margin[kind::3]
        among = np.take_along_axis(own, pairs.columns.numpy(), 1) if kind == 0 else own[:, :1]
        expected = 0.5 + sigmoid(sign * (own - among.mean()) / among.std(ddof=1))
        np.testing.assert_allclose(values[kind::3].numpy(), expected, rtol=1e-4, equal_nan=True)
    assert float(values.nan_to_num(1).min()) > 0.5 and float(values.nan_to_num(1).max()) < 1.5


@pytest.mark.parametrize(("dtype", "nats"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
def test_rounding_errors_give_an_eta_of_1(beta, dtype, nats):
    """The guard is in nats of the log-ratio gaps, so it does not depend on beta."""
    response = hars.Responsiveness("batch", beta, dtype)
    gaps = torch.tensor([1.0, -0.5, 1.5, 0.8])  # of mean size 0.95
    assert float(response(beta * nats * gaps)) == 1
    assert float(response(beta * nats * 1.2 * gaps)) != pytest.approx(1, abs=1e-3)


def test_moving_average_of_eta():
    response = hars.Responsiveness("ema")
    assert response(torch.tensor([1.0, 1.0, 1.0])) == 1.0
    eta = response(torch.tensor([2.0, 2.0, 2.0]))  # the average is 0.9 * 1 + 0.1 * 2
    assert float(eta) == pytest.approx((1 / (1 + np.exp(-2))) / (1 / (1 + np.exp(-1.1))))
    other = hars.Responsiveness("ema")
    other.load_state_dict(response.state_dict())
    assert float(other(torch.ones(3))) == float(response(torch.ones(3)))
