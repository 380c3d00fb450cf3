"""Equations (5) to (12) against numbers computed by hand and TRL's formula; NoDO with every form of checkpointing."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import hanorec_loss as h


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_fused_vectors_by_hand():
    text = torch.tensor([[3.0, 4.0], [2.0, 0.0], [0.0, 5.0]])
    image = torch.tensor([[0.0, 2.0], [0.0, 0.0], [7.0, 0.0]])
    expected = [[0.6 / math.sqrt(3.6), 1.8 / math.sqrt(3.6)], [1, 0], [math.sqrt(0.5), math.sqrt(0.5)]]
    torch.testing.assert_close(h.fuse_item_vectors(text, image), torch.tensor(expected))


def test_neighbor_profiles_by_hand():
    # unit vectors at 0, 60 and 90 degrees: cosines .5 (0-60), 0 (0-90), cos 30 (60-90)
    angles = torch.tensor([0.0, math.pi / 3, math.pi / 2])
    vectors = torch.stack([angles.cos(), angles.sin()], dim=1) * torch.tensor([[1.0], [5.0], [0.1]])
    near = math.cos(math.pi / 6)
    expected = torch.tensor([[0.5, 0.0], [near, 0.5], [near, 0.0]]).softmax(-1)
    torch.testing.assert_close(h.neighbor_profiles(vectors, k=2), expected)
    cold = torch.tensor([[0.5, 0.0], [near, 0.5], [near, 0.0]]).div(0.1).softmax(-1)
    torch.testing.assert_close(h.neighbor_profiles(vectors, k=2, temperature=0.1), cold, atol=1e-5, rtol=1e-5)


def test_neighbor_profiles_by_blocks_equal_brute_force():
    vectors = torch.randn(2100, 8, generator=torch.Generator().manual_seed(0))
    unit = F.normalize(vectors, dim=-1)
    cosines = (unit @ unit.T).fill_diagonal_(-2)
    expected = cosines.sort(dim=-1, descending=True).values[:, :10].softmax(-1)
    torch.testing.assert_close(h.neighbor_profiles(vectors), expected)
    with pytest.raises(ValueError, match="k=10"):
        h.neighbor_profiles(vectors[:10])


def test_distances_by_hand():
    profiles = torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.5, 0.5]])
    found = h.pair_distance(profiles, torch.tensor([0, 1]), torch.tensor([1, 2]))
    torch.testing.assert_close(found, torch.tensor([math.hypot(0.3, 0.3), math.hypot(0.4, 0.4)]))  # (5)
    vectors = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    found = h.cosine_distance(vectors, torch.tensor([0, 0]), torch.tensor([1, 2]))
    torch.testing.assert_close(found, torch.tensor([1.0, 1 - math.sqrt(0.5)]))


def test_hardness_by_hand():
    found = h.hardness_weight(torch.tensor([0.0, 0.2]), 0.1)  # (6)
    torch.testing.assert_close(found, torch.tensor([0.5 / sigmoid(0.1), sigmoid(0.2) / sigmoid(0.1)]))


@pytest.mark.parametrize(
    ("gap", "expected"),
    [
        ([1.0, 2.0, 3.0, 6.0], sigmoid((2 / 3 + 1) / 2) / sigmoid(1)),  # mean 3: r = 1/3, 2/3, 1, 2
        ([-1.0, -2.0, -3.0, -6.0], sigmoid((2 / 3 + 1) / 2) / sigmoid(1)),  # eta(R) = eta(-R), as mean(R) is not near 0
        ([4.0, 1.0], 1.0),  # two pairs: nothing is dropped
        ([0.0, 0.0, 0.0], 1.0),  # like before the first step: r = 0
        ([1.0, -1.0, 0.5, -0.5], sigmoid(0.0) / sigmoid(0.0)),  # mean 0: divided by mean |R|
        ([3.0, -1.0, -1.0, -1.0, 0.0], sigmoid(-2 / 3 / 1.2) / sigmoid(0.0)),  # r = R / 1.2
    ],
)
def test_responsiveness_by_hand(gap, expected):
    assert float(h.responsiveness(torch.tensor(gap))) == pytest.approx(expected, rel=1e-6)  # (8)


LOGPS = tuple(
    torch.tensor(values) for values in ([-4.0, -9.0, -2.5], [-6.0, -8.0, -7.5], [-5.0, -9.5, -4.0], [-5.5, -9.0, -6.0])
)


def test_loss_by_hand():
    hardness = torch.tensor([0.9, 1.0, 1.1])
    losses, metrics = h.hanorec_loss(*LOGPS, hardness, beta=0.2)
    gap = [1 - (-0.5), 0.5 - 1.0, 1.5 - (-1.5)]  # (chosen - reference) - (rejected - reference)
    rewards = [0.2 * g for g in gap]  # (7)
    mean = sum(rewards) / 3
    eta = sigmoid(sorted(r / mean for r in rewards)[1]) / sigmoid(1)  # (8): only the middle one is kept
    betas = [0.2 * eta * weight for weight in (0.9, 1.0, 1.1)]  # (11)
    expected = [-math.log(sigmoid(b * g)) for b, g in zip(betas, gap, strict=True)]  # (12)
    torch.testing.assert_close(losses, torch.tensor(expected))
    assert float(metrics["eta"]) == pytest.approx(eta)
    assert float(metrics["beta_mean"]) == pytest.approx(sum(betas) / 3)
    assert float(metrics["accuracy"]) == pytest.approx(2 / 3)
    assert float(metrics["margin"]) == pytest.approx(mean)
    assert float(metrics["reward_chosen"]) == pytest.approx(0.2 * (1 + 0.5 + 1.5) / 3)
    assert float(metrics["reward_rejected"]) == pytest.approx(0.2 * (-0.5 + 1 - 1.5) / 3)
    sizes = [b * sigmoid(-b * g) for b, g in zip(betas, gap, strict=True)]  # of each pair's gradient
    share = (sizes[0] + sizes[1]) / (sizes[0] + 2 * sizes[1] + sizes[2])
    assert float(metrics["hard_gradient_share"]) == pytest.approx(share)


def test_hard_gradient_share_for_equally_hard_pairs_and_without_gradient():
    gap, zeros, ones = torch.tensor([0.0, 2.0, 0.0, 2.0]), torch.zeros(4), torch.ones(4)
    _, metrics = h.hanorec_loss(gap, zeros, zeros, zeros, ones, beta=1.0, eta=1.0)
    assert float(metrics["hard_gradient_share"]) == pytest.approx(0.5)  # both halves of the batch have the gaps 0, 2
    _, metrics = h.hanorec_loss(gap.sort()[0], zeros, zeros, zeros, ones, beta=1.0, eta=1.0)
    assert float(metrics["hard_gradient_share"]) == pytest.approx(0.5 / (0.5 + sigmoid(-2)))
    _, metrics = h.hanorec_loss(ones * 1000, zeros, zeros, zeros, ones, beta=1.0, eta=1.0)  # sigmoid(-1000) is 0
    assert float(metrics["hard_gradient_share"]) == 0.5


def test_plain_dpo_is_trl_formula():
    """TRL's sigmoid loss: logits = (chosen - rejected) - (ref_chosen - ref_rejected); -logsigmoid(beta * logits)."""
    generator = torch.Generator().manual_seed(0)
    logps = [-20 * torch.rand(64, generator=generator) for _ in range(4)]
    leaves = [x.clone().requires_grad_(True) for x in logps[:2]]
    losses, _ = h.hanorec_loss(*leaves, *logps[2:], torch.ones(64), beta=0.3, eta=1.0)
    others = [x.clone().requires_grad_(True) for x in logps[:2]]
    logits = (others[0] - others[1]) - (logps[2] - logps[3])
    expected = -F.logsigmoid(0.3 * logits)
    torch.testing.assert_close(losses, expected)
    losses.mean().backward()
    expected.mean().backward()
    for one, other in zip(leaves, others, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_no_gradient_through_beta_and_eta():
    leaves = [x.clone().requires_grad_(True) for x in LOGPS[:2]]
    losses, metrics = h.hanorec_loss(*leaves, *LOGPS[2:], torch.tensor([0.9, 1.0, 1.1]), beta=0.2)
    (grad,) = torch.autograd.grad(losses.sum(), leaves[0])
    gap = (LOGPS[0] - LOGPS[2]) - (LOGPS[1] - LOGPS[3])
    beta = 0.2 * metrics["eta"] * torch.tensor([0.9, 1.0, 1.1])
    torch.testing.assert_close(grad, -beta * torch.sigmoid(-beta * gap))
    assert not any(value.requires_grad for value in metrics.values())


def test_beta_floor_gather_and_callable_eta():
    _, metrics = h.hanorec_loss(*LOGPS, torch.ones(3), beta=0.2, eta=0.0)
    assert float(metrics["beta_mean"]) == pytest.approx(1e-6)
    other = torch.tensor([0.5, -0.2, 0.9])  # the gaps of another process
    _, metrics = h.hanorec_loss(*LOGPS, torch.ones(3), beta=0.2, gather=lambda mine: torch.cat([mine, other]))
    gap = (LOGPS[0] - LOGPS[2]) - (LOGPS[1] - LOGPS[3])
    torch.testing.assert_close(metrics["eta"], h.responsiveness(torch.cat([0.2 * gap, other])))
    seen = []
    h.hanorec_loss(*LOGPS, torch.ones(3), beta=0.2, eta=lambda gap: seen.append(gap) or 1.0)
    torch.testing.assert_close(seen[0], 0.2 * gap)


def test_half_precision_is_computed_in_float32():
    losses, metrics = h.hanorec_loss(*(x.bfloat16() for x in LOGPS), torch.ones(3).bfloat16(), beta=0.2)
    assert losses.dtype == torch.float32 and all(v.dtype == torch.float32 for v in metrics.values())
    with pytest.raises(ValueError, match=r"must be \[B\]"):
        h.hanorec_loss(*LOGPS[:3], torch.ones(2), torch.ones(3))


class Layer(torch.nn.Module):
    """A linear layer with LoRA, named as PEFT names them."""

    def __init__(self):
        super().__init__()
        self.base = torch.nn.Linear(16, 16).requires_grad_(False)
        self.lora_A = torch.nn.ModuleDict({"default": torch.nn.Linear(16, 4, bias=False)})
        self.lora_B = torch.nn.ModuleDict({"default": torch.nn.Linear(4, 16, bias=False)})

    def forward(self, x):
        return torch.tanh(self.base(x) + self.lora_B["default"](self.lora_A["default"](x)))


class Stack(torch.nn.Module):
    """Three layers, with activation checkpointing unless reentrant is None."""

    def __init__(self, reentrant):
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.reentrant = torch.nn.ModuleList(Layer() for _ in range(3)), reentrant

    def forward(self, x):
        for layer in self.layers:
            x = layer(x) if self.reentrant is None else checkpoint(layer, x, use_reentrant=self.reentrant)
        return x.square().sum()


def noisy_gradients(reentrant, relative):
    """Run forward and backward under noise. Returns (the model, its gradients)."""
    model = Stack(reentrant)
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
    with h.noisy_lora(model, 0.3, relative, torch.Generator().manual_seed(2)):
        model(x).backward()
    return model, [p.grad for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("relative", [True, False])
def test_noisy_gradients_do_not_depend_on_checkpointing(relative):
    _, plain = noisy_gradients(None, relative)
    for reentrant in (False, True):
        for one, other in zip(noisy_gradients(reentrant, relative)[1], plain, strict=True):
            torch.testing.assert_close(one, other)
    clean = Stack(None)
    clean(torch.randn(5, 16, generator=torch.Generator().manual_seed(1)).requires_grad_(True)).backward()
    differences = [
        (p.grad - g).norm() / g.norm()
        for p, g in zip((p for p in clean.parameters() if p.requires_grad), plain, strict=True)
    ]
    assert max(differences) > 0.05  # the noise changes the gradients


def test_weights_come_back_bit_for_bit_also_after_an_error():
    model = Stack(None)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match="stop"), h.noisy_lora(model, 0.3, False):
        assert not torch.equal(model.layers[0].lora_A["default"].weight, before["layers.0.lora_A.default.weight"])
        assert torch.equal(model.layers[0].base.weight, before["layers.0.base.weight"])
        raise RuntimeError("stop")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_backward_after_the_noise_is_gone_is_refused():
    model = Stack(None)
    with h.noisy_lora(model, 0.3):
        loss = model(torch.randn(5, 16))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("fused", [False, True])
def test_an_optimizer_step_under_the_noise_is_refused(fused):
    model, other = Stack(None), torch.nn.Linear(16, 1)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=fused)
    with pytest.raises(RuntimeError, match="after leaving noisy_lora"), h.noisy_lora(model, 0.3):
        model(torch.randn(5, 16)).backward()
        torch.optim.SGD(other.parameters()).step()  # an optimizer of other weights may step
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    optimizer.step()
    assert not all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize(("relative", "expected"), [(True, 0.3), (False, None)])
def test_scale_of_the_noise(relative, expected):
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"lora_A": torch.nn.Linear(400, 300, bias=False)})
    weight = model["lora_A"].weight
    before = weight.detach().clone()
    with h.noisy_lora(model, 0.3, relative, torch.Generator().manual_seed(0)) as size:
        noise = weight.detach() - before
    rms = float(before.square().mean().sqrt())
    assert float(noise.std()) == pytest.approx(0.3 * rms if relative else 0.3, rel=0.02)
    assert float(size) == pytest.approx(float(noise.norm() / before.norm()), rel=1e-3)
    if relative:
        assert float(size) == pytest.approx(expected, rel=0.02)


def lora_of(*shapes, dtype=torch.float32):
    """A model of LoRA matrices of these shapes, with weights of very different sizes."""
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Module()
    for number, shape in enumerate(shapes):
        matrix = torch.nn.Module()
        matrix.weight = torch.nn.Parameter(
            (torch.randn(shape, generator=generator) * 10.0 ** (number % 3 - 1)).to(dtype)
        )
        setattr(model, f"layer{number}", torch.nn.ModuleDict({"lora_A": matrix}))
    return model, list(model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_draw_serves_all_matrices(dtype):
    """Each matrix gets its part of the draw, times its own root mean square. Matrix 2 is all zeros, as LoRA's new B."""
    shapes = ((4, 16), (30, 7), (3, 5), (5, 1))
    model, weights = lora_of(*shapes, dtype=dtype)
    weights[2].data.zero_()
    before = [weight.detach().clone() for weight in weights]
    drawn = torch.randn(sum(map(math.prod, shapes)), generator=torch.Generator().manual_seed(5))
    with h.noisy_lora(model, 0.3, generator=torch.Generator().manual_seed(5)) as size:
        noisy = [weight.detach().clone() for weight in weights]
    noise_square = 0.0
    for old, new, part in zip(before, noisy, drawn.split([weight.numel() for weight in weights]), strict=True):
        noise = 0.3 * part.view(old.shape) * old.double().square().mean().sqrt()
        noise_square += float(noise.square().sum())
        torch.testing.assert_close(new, (old + noise).to(dtype))
    weight_square = sum(float(old.double().square().sum()) for old in before)
    assert float(size) == pytest.approx(math.sqrt(noise_square / weight_square), rel=1e-4)
    assert all(torch.equal(weight, old) for weight, old in zip(weights, before, strict=True))


class Calls(TorchDispatchMode):
    """Lists the names of the operations that a GPU would run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and "empty" not in str(func) and "split" not in str(func) and "unbind" not in str(func):
            self.names.append(str(func))
        return func(*args, **kwargs or {})


def test_the_number_of_operations_does_not_grow_with_the_matrices():
    """With one kernel or more for each matrix, and a draw on the CPU for each, NoDO took longer than the step."""
    found = []
    for matrices in (2, 200):
        model, _ = lora_of(*[(4, 8)] * matrices)
        with Calls() as calls, h.noisy_lora(model, 0.3, generator=torch.Generator().manual_seed(0)):
            pass
        found.append(calls.names)
    assert found[0] == found[1] and len(found[0]) < 20 and sum("randn" in name for name in found[0]) == 1


def test_noise_repeats_with_its_generator_and_sigma_zero_adds_none():
    def draw(seed):
        model = Stack(None)
        with h.noisy_lora(model, 0.3, generator=torch.Generator().manual_seed(seed)):
            return [p.detach().clone() for p in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(draw(1), draw(1), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(draw(1), draw(2), strict=True))
    model = Stack(None)
    before = [p.detach().clone() for p in model.parameters()]
    with h.noisy_lora(model, 0.0) as size:
        assert float(size) == 0 and all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_noise_refuses_models_without_trainable_lora_and_badly_sharded_ones():
    with pytest.raises(ValueError, match="no trainable LoRA"), h.noisy_lora(torch.nn.Linear(2, 2), 0.1):
        pass
    frozen = Stack(None).requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable LoRA"), h.noisy_lora(frozen, 0.1):
        pass
    empty = Stack(None)
    empty.layers[0].lora_A["default"].weight = torch.nn.Parameter(torch.empty(0))
    with pytest.raises(ValueError, match="sharded away"), h.noisy_lora(empty, 0.1):
        pass
    sharded = Stack(None)
    sharded.layers[0].lora_A["default"].weight.device_mesh = "as a DTensor has one"
    with pytest.raises(ValueError, match="need a generator"), h.noisy_lora(sharded, 0.1):
        pass


def logps(batch, rejected, spread=3.0, seed=0):
    """Random (policy chosen [B], policy rejected [B, K], reference chosen, reference rejected, hardness [B, K])."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch,), (batch, rejected)] * 2
    found = [torch.randn(shape, generator=generator) * spread - 20 for shape in shapes]
    return *found, 0.5 + torch.rand(batch, rejected, generator=generator)


def test_several_rejected_answers_equal_a_loop():
    tensors = logps(5, 4)
    policy_chosen, policy_rejected, reference_chosen, reference_rejected, hardness = (x.double() for x in tensors)
    gaps = [
        [
            float((policy_chosen[i] - reference_chosen[i]) - (policy_rejected[i, k] - reference_rejected[i, k]))
            for k in range(4)
        ]
        for i in range(5)
    ]
    eta = float(h.responsiveness(torch.tensor([0.3 * gap for row in gaps for gap in row])))  # of all gaps
    expected = [
        math.log(1 + sum(math.exp(-0.3 * eta * float(hardness[i, k]) * gaps[i][k]) for k in range(4))) for i in range(5)
    ]
    losses, metrics = h.hanorec_loss(*tensors, beta=0.3)
    torch.testing.assert_close(losses, torch.tensor(expected), rtol=1e-5, atol=1e-6)
    assert float(metrics["accuracy"]) == pytest.approx(sum(gap > 0 for row in gaps for gap in row) / 20)
    assert float(metrics["margin"]) == pytest.approx(0.3 * sum(map(sum, gaps)) / 20, rel=1e-4)


def test_a_constant_beta_is_s_dpo():
    """S-DPO: -log sigmoid(-log of the sum over rejected answers of exp(rejected log ratio - chosen log ratio))."""
    policy_chosen, policy_rejected, reference_chosen, reference_rejected, _ = tensors = logps(6, 3)
    losses, _ = h.hanorec_loss(*tensors[:4], torch.ones(6), beta=0.7, eta=1.0)
    chosen, rejected = 0.7 * (policy_chosen - reference_chosen), 0.7 * (policy_rejected - reference_rejected)
    expected = -F.logsigmoid(-torch.log(torch.exp(rejected - chosen[:, None]).sum(1)))
    torch.testing.assert_close(losses, expected)


def test_one_rejected_answer_is_the_same_to_the_last_bit():
    policy_chosen, policy_rejected, reference_chosen, reference_rejected, hardness = logps(64, 1, spread=40)
    found = []
    for many in (False, True):
        wide = [x if many else x.flatten() for x in (policy_rejected, reference_rejected, hardness)]
        policy = [policy_chosen.clone().requires_grad_(), wide[0].clone().requires_grad_()]
        losses, metrics = h.hanorec_loss(*policy, reference_chosen, wide[1], wide[2])
        losses.mean().backward()
        found.append((losses, policy[0].grad, policy[1].grad.flatten(), torch.stack(list(metrics.values()))))
    gap = ((policy_chosen - reference_chosen) - (policy_rejected - reference_rejected).flatten()).requires_grad_()
    eta = h.responsiveness(0.1 * gap)
    loss = -F.logsigmoid((0.1 * eta * hardness.flatten()).clamp_min(1e-6) * gap)
    loss.mean().backward()
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert torch.equal(found[0][0], loss) and torch.equal(found[0][1], gap.grad)


@pytest.mark.parametrize("gap", [1e4, -1e4])
def test_large_gaps_of_several_rejected_answers_stay_finite(gap):
    chosen = torch.full((3,), gap, requires_grad=True)
    rejected, hardness = torch.zeros(3, 4), torch.ones(3, 4)
    losses, metrics = h.hanorec_loss(chosen, rejected, torch.zeros(3), rejected, hardness, beta=1.0, eta=1.0)
    losses.sum().backward()
    assert torch.isfinite(losses).all() and torch.isfinite(chosen.grad).all()
    assert all(torch.isfinite(value) for value in metrics.values())
    assert float(losses[0].detach()) == pytest.approx(0 if gap > 0 else 1e4 + math.log(4), abs=1e-3)


def test_the_gradient_share_is_that_of_autograd():
    tensors = list(logps(4, 3))
    tensors[1].requires_grad_()
    losses, metrics = h.hanorec_loss(*tensors, eta=1.0)
    losses.sum().backward()
    size = tensors[1].grad.abs().flatten()[tensors[4].flatten().argsort(stable=True)]
    assert float(metrics["hard_gradient_share"]) == pytest.approx(float(size[:6].sum() / size.sum()), rel=1e-5)


@pytest.mark.parametrize("shape", [(3, 2), (4, 2, 1), (2,)])
def test_rejected_answers_of_other_shapes_are_refused(shape):
    one, many = torch.zeros(4), torch.zeros(shape)
    with pytest.raises(ValueError, match="must be"):
        h.hanorec_loss(one, many, one, many, one)


def test_absent_rejected_answers_do_not_count():
    """Pairs with 3, 1 and 2 rejected answers, in one call and one by one."""
    generator = torch.Generator().manual_seed(3)
    policy, reference = torch.randn(2, 3, 4, generator=generator) * 9
    hardness = 0.5 + torch.rand(3, 3, generator=generator)
    reference[1, 2:] = reference[2, 3:] = torch.nan
    policy[1, 2] = torch.nan  # whatever the policy has in such a place
    counts, leaf = (3, 1, 2), policy.clone().requires_grad_(True)
    seen = []

    def eta(gap):
        seen.append(gap)
        return 0.9

    losses, metrics = h.hanorec_loss(leaf[:, 0], leaf[:, 1:], reference[:, 0], reference[:, 1:], hardness, 0.3, eta)
    losses.sum().backward()
    gaps, sizes = [], []
    for row, count in enumerate(counts):
        own, end = policy[row : row + 1].clone().requires_grad_(True), 1 + count
        pair = (own[:, 0], own[:, 1:end], reference[row : row + 1, 0], reference[row : row + 1, 1:end])
        loss, _ = h.hanorec_loss(*pair, hardness[row : row + 1, :count], 0.3, 0.9)
        loss.backward()
        torch.testing.assert_close(losses[row : row + 1], loss)
        torch.testing.assert_close(leaf.grad[row, :end], own.grad[0, :end])
        assert not leaf.grad[row, end:].nan_to_num(0).any()
        gaps += ((pair[0] - pair[2])[:, None] - (pair[1] - pair[3])).flatten().tolist()
        sizes += hardness[row, :count].tolist()
    assert seen[0].isnan().tolist() == reference[:, 1:].isnan().tolist()
    assert seen[0][~seen[0].isnan()].tolist() == pytest.approx([0.3 * gap for gap in gaps])
    assert float(metrics["margin"]) == pytest.approx(0.3 * sum(gaps) / 6, rel=1e-5)
    assert float(metrics["lambda_mean"]) == pytest.approx(sum(sizes) / 6)
    assert float(metrics["accuracy"]) == pytest.approx(sum(gap > 0 for gap in gaps) / 6)


def test_eta_and_metrics_leave_absent_answers_out():
    """As if the absent answers were cut out, for 1 to 7 answers; with fewer than three gaps nothing is trimmed."""
    generator = torch.Generator().manual_seed(0)
    for count in range(1, 8):
        gap = torch.full((2, 4), torch.nan)
        present = torch.randperm(8, generator=generator)[:count]
        gap.view(-1)[present] = torch.randn(count, generator=generator)
        cut = gap[~gap.isnan()]
        torch.testing.assert_close(h.responsiveness(gap), h.responsiveness(cut))
        torch.testing.assert_close(h.responsiveness(gap, 1e9), torch.tensor(1.0))
        torch.testing.assert_close(h.trimmed_mean(gap), h.trimmed_mean(cut))
    policy, reference = torch.randn(2, 3, 4, generator=generator) * 9
    hardness = 0.5 + torch.rand(3, 3, generator=generator)
    reference[1, 2:] = reference[2, 3:] = torch.nan
    pairs = (policy[:, 0], policy[:, 1:], reference[:, 0], reference[:, 1:])
    _, metrics = h.hanorec_loss(*pairs, hardness, 0.3, eta=0.9)
    present = ~reference[:, 1:].isnan()
    scores = -0.3 * 0.9 * hardness * ((policy - reference)[:, :1] - (policy - reference)[:, 1:])
    scores = scores.masked_fill(~present, -torch.inf)
    size = 0.27 * hardness * scores.softmax(1) * scores.logsumexp(1, keepdim=True).sigmoid()
    size = size[present][hardness[present].argsort()]
    assert float(metrics["hard_gradient_share"]) == pytest.approx(float(size[:3].sum() / size.sum()), rel=1e-5)
    for name, values in (("lambda", hardness[present]), ("beta", 0.27 * hardness[present])):
        assert float(metrics[f"{name}_p01"]) == pytest.approx(float(values.quantile(0.01)))
        assert float(metrics[f"{name}_p99"]) == pytest.approx(float(values.quantile(0.99)))
    expected = -0.3 * (policy - reference)[:, 1:][present].mean()
    assert float(metrics["reward_rejected"]) == pytest.approx(-float(expected), rel=1e-5)


def test_a_prompt_without_any_rejected_answer_has_no_finite_loss():
    logps, nothing = torch.zeros(2), torch.tensor([[0.0, 0.0], [torch.nan, torch.nan]])
    losses, _ = h.hanorec_loss(logps, torch.zeros(2, 2), logps, nothing, torch.ones(2), eta=1.0)
    assert losses.isnan().tolist() == [False, True]
