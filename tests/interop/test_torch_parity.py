"""Our models against torch modules of random sizes: outputs, routing and the gradient of every parameter.

The torch side (benchmarks/torch_dit.py) holds its weights under the published names, so the mapping is tested as well.
"""

import math
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling_perception.interop.torch_dit import dit_from_torch, dit_to_torch
from scaling_perception.models.dit import DiT, DiTConfig, position_table
from scaling_perception.models.surgery import upcycle
from scaling_perception.timing import peer

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch", reason="needs PyTorch")
torch_reference = peer.load("torch_dit")
TorchDiT, sincos_table = torch_reference.TorchDiT, torch_reference.sincos_table

OUTPUT, GRADIENT = 1e-5, 1e-4  # largest difference over the largest reference value, float32
HALF_OUTPUT, HALF_GRADIENT = 2e-2, 3e-2  # norm of the difference over that of the reference, bfloat16
GAP = 1e-5  # between the last chosen score and the first that is not: no rounding turns it over
ALPHA, SCALE = 0.01, 5.0  # the balance loss is not scaled with the main one


class Case(NamedTuple):
    """A drawn model: sizes, attention layout in the checkpoint, seed of weights and inputs."""

    config: DiTConfig
    attention: str
    seed: int


class Numbers(NamedTuple):
    """What one side makes of the same weights and inputs.

    Attributes:
        out: (B, h, w, C). gradient: by published name.
        weights: (L, N, E), what each expert's output is multiplied by, 0 where it was not chosen; empty if dense.
        balance: (L,), 1 at perfect balance; empty if dense.
        gap: the smallest of all tokens; infinite where all experts are chosen.
    """

    out: np.ndarray
    gradient: dict[str, np.ndarray]
    weights: np.ndarray = np.zeros((0, 0, 0))
    balance: np.ndarray = np.zeros(0)
    gap: float = math.inf


def draw(family: str, count: int) -> list[Case]:
    """``count`` models of a family. What has few values takes turns, in an order of its own, so that each comes up."""
    rng = np.random.default_rng([*family.encode()])

    def turns(*options: Any) -> list[Any]:
        return [options[i % len(options)] for i in rng.permutation(count)]

    def pick(low: int, high: int) -> int:
        return int(rng.integers(low, high + 1))

    cases, mixed = [], family in ("scratch", "generalist")
    patches, heads, sigma, active = turns(2, 1, 4), turns(4, 3, 2, 1), turns(True, False), turns(2, 1, 3)
    gatings, shared = turns("paper", "renormalised"), turns(*((2, 0, 1) if family == "scratch" else (0, 2)))
    attentions = turns("flash", "normed", "timm") if family == "scratch" else ["timm"] * count
    for i in range(count):
        step = 4 // math.gcd(4, heads[i])  # the width is a multiple of 4
        dim = heads[i] * step * pick(-(-4 // step), 12 // step)
        fields: dict[str, Any] = {"cond_channels": pick(0, 6), "num_classes": pick(1, 12)}
        if mixed:
            fields |= {"active_experts": active[i], "gating": gatings[i], "shared_experts": shared[i]}
            fields |= {"experts": pick(max(2, active[i]), 8), "qk_norm": attentions[i] == "normed"}
            fields["expert_mlp"] = "swiglu" if family == "scratch" else "gelu"
        if family == "generalist":
            fields |= {"routed": True, "task_labels": pick(2, 5)}
        if family == "generalist" and i == count - 1:  # the dense one that it is upcycled from
            fields |= {"experts": 0, "shared_experts": 0}
        config = DiTConfig(
            name=f"{family}{i}",
            input_size=patches[i] * pick(2, 4),
            dim=dim,
            depth=pick(1, 3),
            heads=heads[i],
            patch_size=patches[i],
            in_channels=pick(1, 5),
            mlp_ratio=pick(dim // 2, 3 * dim) / dim,
            learn_sigma=sigma[i],
            **fields,
        )
        cases.append(Case(config, "timm" if attentions[i] == "timm" else "flash", i))
    return cases


DENSE, SCRATCH, GENERALIST, UPCYCLED = draw("dense", 6), draw("scratch", 6), draw("generalist", 5), draw("upcycled", 3)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny tensors: torch's threads would only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


by_name = pytest.mark.parametrize("case", DENSE + SCRATCH + GENERALIST, ids=lambda case: case.config.name)


def randomise(model: Any, seed: int) -> None:
    """Every parameter but the position table drawn anew, with sizes that keep activations near 1 and no branch zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, leaf in model.named_parameters():
            if name == "pos_embed":
                continue
            drawn = torch.randn(leaf.shape, generator=generator)
            if name.endswith("_norm.weight"):
                drawn = 1 + 0.3 * drawn
            elif name.endswith(".bias"):
                drawn = 0.3 * drawn
            elif "embedding_table" not in name:
                drawn = drawn / math.sqrt(leaf[0].numel())
            leaf.copy_(drawn)


def torch_model(case: Case) -> Any:
    config = case.config
    model = TorchDiT(
        input_size=config.input_size,
        patch=config.patch_size,
        channels=config.cond_channels + config.in_channels,
        out_channels=config.in_channels * (2 if config.learn_sigma else 1),
        dim=config.dim,
        depth=config.depth,
        heads=config.heads,
        hidden=round(config.dim * config.mlp_ratio),
        label_rows=config.num_classes + config.task_labels + 1,
        tasks=config.task_labels if config.routed else 0,
        first_task=config.num_classes,
        attention=case.attention,
        qk_norm=config.qk_norm,
        experts=config.experts,
        active=config.active_experts,
        kind=config.expert_mlp,
        shared=config.shared_experts,
        renormalise=config.gating == "renormalised",
        alpha=ALPHA,
    )
    randomise(model, case.seed)
    return model


def inputs_of(case: Case) -> dict[str, np.ndarray]:
    """x, t, label, target, channels last. Labels: every task, an ordinary class, the null label."""
    config, rng = case.config, np.random.default_rng(case.seed)
    labels = [*range(config.num_classes, config.num_classes + config.task_labels), 0, config.label_rows - 1]
    size, batch = config.input_size, max(3, len(labels))
    labels += rng.integers(0, config.label_rows, batch - len(labels)).tolist()
    return {
        "x": rng.standard_normal((batch, size, size, config.input_channels)).astype(np.float32),
        "t": rng.uniform(0, 999, 1 if case.seed % 4 == 3 else batch).astype(np.float32),  # one may serve all
        "label": rng.permutation(labels).astype(np.int32),
        "target": rng.standard_normal((batch, size, size, config.out_channels)).astype(np.float32),
    }


def state_of(model: Any) -> dict[str, np.ndarray]:
    return {name: leaf.detach().numpy().copy() for name, leaf in model.state_dict().items()}


def run_torch(model: Any, inputs: dict[str, np.ndarray], dtype: Any = torch.float32) -> Numbers:
    model = model.to(dtype).train()
    model.zero_grad(set_to_none=True)
    x, target = (torch.tensor(inputs[name].transpose(0, 3, 1, 2), dtype=dtype) for name in ("x", "target"))
    out = model(x, torch.tensor(inputs["t"], dtype=dtype), torch.tensor(inputs["label"], dtype=torch.int64))
    (SCALE * (out - target).square().mean()).backward()  # the balance loss adds itself
    gradient = {}
    for name, leaf in model.named_parameters():
        if name != "pos_embed":  # never trained
            gradient[name] = np.zeros(leaf.shape) if leaf.grad is None else leaf.grad.numpy().copy()
    out = out.detach().numpy().transpose(0, 2, 3, 1)
    seen = [mixture.seen for mixture in model.mixtures()]
    if not seen:
        return Numbers(out, gradient)
    weights, gap = [], math.inf
    for layer in seen:
        weights.append(torch.zeros_like(layer["scores"]).scatter(1, layer["chosen"], layer["weight"]).detach().numpy())
        ordered, active = layer["scores"].sort(dim=1, descending=True).values, layer["chosen"].shape[1]
        if active < ordered.shape[1]:
            gap = min(gap, (ordered[:, active - 1] - ordered[:, active]).min().item())
    balance = np.array([layer["loss"].item() / ALPHA for layer in seen])
    return Numbers(out, gradient, np.stack(weights), balance, gap)


@lru_cache
def compiled(config: DiTConfig, dtype: Any, dispatch: str) -> Any:
    """One program for output, routing and gradients: it is compiling that takes the time here."""
    model = DiT(config, dtype=dtype, dispatch=dispatch)

    def loss(params, inputs):
        args = (inputs["x"], inputs["t"], inputs["label"])
        (out, stats), seen = model.apply({"params": params}, *args, with_stats=True, mutable="intermediates")
        value = SCALE * jnp.mean(jnp.square(out - inputs["target"]))
        if config.experts:
            value = value + ALPHA * jnp.sum(stats["balance"])
        return value, (out, stats, seen)

    # a quarter of the time to compile; what is computed is the same
    options = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
    return jax.jit(jax.grad(loss, has_aux=True), compiler_options=options)


def run_ours(
    case: Case, state: dict[str, np.ndarray], inputs: dict[str, np.ndarray], dtype: Any = jnp.float32
) -> Numbers:
    config = case.config
    dispatch = ("ragged", "dense", "auto")[case.seed % 3]
    gradient, (out, stats, seen) = compiled(config, dtype, dispatch)(dit_from_torch(state, config), inputs)
    named = dit_to_torch(jax.tree.map(np.asarray, gradient), config, case.attention)
    assert not named.pop("pos_embed").any()
    if not config.experts:
        return Numbers(np.asarray(out), named)
    routing = seen["intermediates"]["blocks"]["moe"]
    index, weight = np.asarray(routing["index"][0]), np.asarray(routing["weight"][0])
    weights = np.zeros((*index.shape[:2], config.experts), np.float32)
    np.put_along_axis(weights, index, weight, axis=2)
    np.testing.assert_allclose(np.asarray(stats["load"]), (weights > 0).mean(1) / config.active_experts, rtol=1e-5)
    return Numbers(np.asarray(out), named, weights, np.asarray(stats["balance"]))


def largest(mine: np.ndarray, theirs: np.ndarray) -> float:
    """Largest difference over the largest reference value."""
    assert mine.shape == theirs.shape
    return float(np.abs(mine - theirs).max() / np.abs(theirs).max())


def scale_of(name: str, theirs: Numbers) -> float:
    """Size of the gradient that rounding is measured against."""
    if name.endswith("k_norm.bias"):  # it adds the same to all logits of a query: its gradient is 0 but for rounding
        name = name.replace(".bias", ".weight")
    return float(np.abs(theirs.gradient[name]).max())


def gradient_errors(mine: Numbers, theirs: Numbers) -> dict[str, float]:
    """The largest difference in each tensor over its largest value; where torch has 0 throughout, so must we."""
    errors = {}
    for name, reference in theirs.gradient.items():
        assert mine.gradient[name].shape == reference.shape
        difference, scale = np.abs(mine.gradient[name] - reference).max(), scale_of(name, theirs)
        errors[name] = float(difference / scale if scale else difference and np.inf)
    return errors


def differences(mine: Numbers, theirs: Numbers) -> list[str]:
    """What is not the same within float32: routing, balance, output, gradients by name. A NaN is a difference."""
    found = []
    if not theirs.gap > GAP:
        found.append(f"scores too near: {theirs.gap}")
    if theirs.balance.size:
        if not np.array_equal(mine.weights > 0, theirs.weights > 0):
            found.append("routing")
        if not largest(mine.weights, theirs.weights) <= OUTPUT:
            found.append("weights")
        if not np.allclose(mine.balance, theirs.balance, rtol=1e-5, atol=0):
            found.append("balance")
    if not largest(mine.out, theirs.out) <= OUTPUT:
        found.append("output")
    if mine.gradient.keys() != theirs.gradient.keys():
        return [*found, "names"]
    errors = gradient_errors(mine, theirs)
    return found + [f"gradient of {name}: {error:.1e}" for name, error in errors.items() if not error <= GRADIENT]


@lru_cache
def both(case: Case) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], Numbers, Numbers]:
    """The torch model's weights, inputs, and what torch and we make of them."""
    model, inputs = torch_model(case), inputs_of(case)
    state = state_of(model)
    return state, inputs, run_torch(model, inputs), run_ours(case, state, inputs)


def test_every_option_is_drawn():
    def seen(cases, *fields):
        return {tuple(getattr(case.config, field) for field in fields) for case in cases}

    assert {(1, True), (1, False), (2, True), (2, False), (4, True), (4, False)} == seen(
        DENSE, "patch_size", "learn_sigma"
    )
    assert len(seen(DENSE, "in_channels")) > 2 and len(seen(DENSE, "cond_channels")) > 2
    assert all(case.config.mlp_ratio != 4 for case in DENSE + SCRATCH + GENERALIST)
    assert {(case.attention, case.config.qk_norm) for case in SCRATCH} == {
        ("timm", False), ("flash", False), ("flash", True),
    }  # fmt: skip
    assert seen(SCRATCH, "shared_experts") == {(0,), (1,), (2,)} and seen(GENERALIST, "shared_experts") == {(0,), (2,)}
    assert seen(SCRATCH, "active_experts") == seen(GENERALIST, "active_experts") == {(1,), (2,), (3,)}
    assert seen(SCRATCH, "gating") == seen(GENERALIST, "gating") == {("paper",), ("renormalised",)}
    assert {(0,)} < seen(GENERALIST, "experts")


@by_name
def test_output_routing_and_all_gradients_are_those_of_torch(case):
    config, (_, inputs, theirs, mine) = case.config, both(case)
    assert not differences(mine, theirs)
    table = sincos_table(config.dim, config.grid)[0].numpy()
    np.testing.assert_allclose(position_table(config.dim, config.grid), table, rtol=0, atol=1e-6)
    if config.routed:  # ordinary classes and the null label were among them
        assert set(inputs["label"]) >= {0, *range(config.num_classes, config.label_rows)}


@by_name
def test_error_is_that_of_float32_itself(case):
    _, inputs, single, mine = both(case)
    exact = run_torch(torch_model(case), inputs, torch.float64)
    assert exact.out.dtype == np.float64
    error, floor = largest(mine.out, exact.out), largest(single.out, exact.out)
    assert error <= 3 * floor + 1e-6
    error, floor = (np.max([*gradient_errors(numbers, exact).values()]) for numbers in (mine, single))
    assert error <= 3 * floor + 1e-6


@pytest.mark.parametrize(
    "case, quiet",
    [(DENSE[2], ("pos_embed", "x_embedder")), (SCRATCH[1], ("blocks.0.attn.Wqkv",))],
    ids=["tokens", "qk"],
)
def test_epsilon_of_the_norms_shows_where_they_get_little(case, quiet, monkeypatch):
    inputs = inputs_of(case)

    def outcome():
        model = torch_model(case)
        with torch.no_grad():
            for name, leaf in model.named_parameters():
                leaf.mul_(0.05 if name.startswith(quiet) else 1)
        return state_of(model), run_torch(model, inputs)

    state, theirs = outcome()
    mine = run_ours(case, state, inputs)
    assert not differences(mine, theirs)
    monkeypatch.setattr(torch_reference, "EPSILON", 1e-5)
    assert "output" in differences(mine, outcome()[1])


@pytest.mark.parametrize("case", [DENSE[2], SCRATCH[1], GENERALIST[0]], ids=lambda case: case.config.name)
def test_bfloat16_is_near(case):
    def apart(mine, theirs):
        return np.linalg.norm(np.subtract(mine, theirs, dtype=np.float64)) / np.linalg.norm(theirs)

    def together(numbers):
        return np.concatenate([numbers.gradient[name].ravel() for name in sorted(numbers.gradient)])

    state, inputs, theirs, _ = both(case)
    mine = run_ours(case, state, inputs, jnp.bfloat16)
    output, gradient = apart(mine.out, theirs.out), apart(together(mine), together(theirs))
    assert 1e-4 < output <= HALF_OUTPUT and gradient <= HALF_GRADIENT
    if case.config.experts:
        same = np.mean((mine.weights > 0) == (theirs.weights > 0))
        assert same > 0.95


@pytest.mark.parametrize("case", UPCYCLED, ids=lambda case: case.config.name)
def test_upcycled_and_renormalised(case):
    config, seed = case.config, case.seed
    experts, active = ((4, 2), (8, 1), (5, 3))[seed]
    dense_model, inputs = torch_model(case), inputs_of(case)
    params = dit_from_torch(state_of(dense_model), config)
    equal, new = upcycle(params, config, experts, active)
    grown = Case(new, case.attention, seed)
    kept = run_ours(grown, dit_to_torch(equal, new), inputs)
    error = largest(kept.out, run_torch(dense_model, inputs).out)
    assert error <= OUTPUT

    different, again = upcycle(params, config, experts, active, noise=0.5, key=jax.random.key(seed))
    assert again == new
    state, model = dit_to_torch(different, new), torch_model(grown)
    model.load_state_dict({name: torch.tensor(value) for name, value in state.items()})  # strict: the names are theirs
    theirs = run_torch(model, inputs)
    np.testing.assert_allclose(theirs.weights.sum(-1), 1, rtol=1e-6)
    assert not differences(run_ours(grown, state, inputs), theirs)


@pytest.mark.parametrize("case", [SCRATCH[1], GENERALIST[3]], ids=lambda case: case.config.name)
def test_one_number_changed_in_any_tensor_is_noticed(case):
    state, inputs, theirs, mine = both(case)
    assert not differences(mine, theirs)
    unnoticed = set()
    for name, value in state.items():
        changed = value.copy()
        where = np.argmax(np.abs(theirs.gradient[name])) if name in theirs.gradient else 0
        changed.flat[where] += 0.01
        if not differences(run_ours(case, {**state, name: changed}, inputs), theirs):
            unnoticed.add(name)
    idle = {name for name, gradient in theirs.gradient.items() if not gradient.any()}  # experts that no token chose
    assert len(idle) < len(state) / 10
    assert unnoticed == idle | {name for name in state if name.endswith("k_norm.bias")}


def test_a_scaled_balance_loss_is_noticed():
    _, inputs, theirs, mine = both(SCRATCH[1])
    model = torch_model(SCRATCH[1])
    for mixture in model.mixtures():
        mixture.alpha = SCALE * ALPHA
    scaled = run_torch(model, inputs)
    found = differences(mine, scaled)
    assert "balance" in found and any("moe.gate.weight" in line for line in found)
    assert "output" not in found and not differences(mine, theirs)
