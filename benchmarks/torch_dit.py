"""The paper's models in PyTorch, written from their description (facts 1.1, 1.3, 2, 3.1), for tests and benches alike.

Parameters have the published names, so a ``state_dict()`` of these modules is a checkpoint. Plain and slow: experts one
after the other, samples one after the other where each has its own patch embedding.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPSILON = 1e-6


def sincos_table(dim: int, grid: int) -> Tensor:
    """(1, grid * grid, dim): columns in the first half, rows in the second, each [sin, cos]."""
    table = np.zeros((grid, grid, dim))
    quarter = dim // 4
    for row in range(grid):
        for column in range(grid):
            for i in range(quarter):
                omega = 10000.0 ** (-i / quarter)
                for offset, position in ((0, column), (2 * quarter, row)):
                    table[row, column, offset + i] = math.sin(position * omega)
                    table[row, column, offset + quarter + i] = math.cos(position * omega)
    return torch.tensor(table.reshape(1, grid * grid, dim), dtype=torch.float32)


def norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPSILON)


def shifted(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Projected(nn.Module):
    """What is published as ``x_embedder``: a convolution, or one for each task, under the name ``proj``."""

    def __init__(self, dim: int, channels: int, patch: int, tasks: int = 0, first_label: int = 0) -> None:
        super().__init__()
        self.tasks, self.first_label, self.patch, self.dim = tasks, first_label, patch, dim

        def conv() -> nn.Conv2d:
            return nn.Conv2d(channels, dim, kernel_size=patch, stride=patch)

        self.proj: Any = nn.ModuleDict({f"conv_in_{i + 1}": conv() for i in range(tasks)}) if tasks else conv()

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        if not self.tasks:
            return self.proj(x).flatten(2).transpose(1, 2)
        rows = []
        for picture, number in zip(x, label.tolist(), strict=True):
            task = number - self.first_label
            if 0 <= task < self.tasks:
                rows.append(self.proj[f"conv_in_{task + 1}"](picture[None]).flatten(2).transpose(1, 2)[0])
            else:
                tokens = (x.shape[2] // self.patch) * (x.shape[3] // self.patch)
                rows.append(x.new_zeros(tokens, self.dim))
        return torch.stack(rows)


class Timestep(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        dtype = next(self.parameters()).dtype
        frequencies = torch.exp(-math.log(10000.0) * torch.arange(128, dtype=dtype) / 128)
        angles = t.to(dtype)[:, None] * frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))


class Label(nn.Module):
    def __init__(self, rows: int, dim: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(rows, dim)

    def forward(self, label: Tensor) -> Tensor:
        return self.embedding_table(label)


class PlainAttention(nn.Module):
    """The layout of timm: ``qkv`` and ``proj``; ``explicit`` as it was when DiT was written, else as it is today."""

    def __init__(self, dim: int, heads: int, explicit: bool = False) -> None:
        super().__init__()
        self.heads, self.explicit = heads, explicit
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.explicit:
            mixed = (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(dim=-1) @ value
        else:
            mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class FlashAttention(nn.Module):
    """DiT-MoE's other layout: ``Wqkv`` and ``out_proj``, with or without norms of queries and keys in each head."""

    def __init__(self, dim: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.Wqkv, self.out_proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.q_norm = nn.LayerNorm(dim // heads, eps=EPSILON) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(dim // heads, eps=EPSILON) if qk_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (part.unflatten(2, (self.heads, -1)) for part in self.Wqkv(x).chunk(3, dim=2))
        logits = torch.einsum("bqhd,bkhd->bhqk", self.q_norm(query), self.k_norm(key))
        weights = torch.softmax(logits / math.sqrt(query.shape[-1]), dim=-1)
        return self.out_proj(torch.einsum("bhqk,bkhd->bqhd", weights, value).flatten(2))


class Gelu(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Swiglu(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Gate(nn.Module):
    def __init__(self, experts: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, dim))

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x @ self.weight.T, dim=-1)


class WithLoss(torch.autograd.Function):
    """The identity on ``x``; backward, ``extra`` gets gradient 1, whatever the gradient of ``x`` was scaled by."""

    @staticmethod
    def forward(ctx, x: Tensor, extra: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return gradients[0], gradients[0].new_ones(())


class Mixture(nn.Module):
    """Routed experts. ``seen`` holds the last call's scores, chosen experts (falling), their weights, balance loss."""

    def __init__(
        self, dim: int, hidden: int, experts: int, active: int, kind: str, shared: int, renormalise: bool, alpha: float
    ) -> None:
        super().__init__()
        self.active, self.renormalise, self.alpha = active, renormalise, alpha
        self.gate = Gate(experts, dim)
        self.experts = nn.ModuleList([(Swiglu if kind == "swiglu" else Gelu)(dim, hidden) for _ in range(experts)])
        if shared:
            self.shared_experts = Swiglu(dim, shared * dim)
        self.seen: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        flat, experts = x.flatten(0, 1), len(self.experts)
        scores = self.gate(flat)
        weight, chosen = scores.sort(dim=-1, descending=True)
        weight, chosen = weight[:, : self.active], chosen[:, : self.active]
        # divided by their sum; written out for one expert, whose weight is then 1 and has no gradient
        if self.renormalise and self.active > 1:
            weight = weight / (weight.sum(dim=-1, keepdim=True) + 1e-20)
        elif self.renormalise:
            weight = torch.ones_like(weight)
        share = F.one_hot(chosen, experts).to(scores.dtype).sum(dim=(0, 1)) / chosen.numel()
        loss = self.alpha * (experts * share * scores.mean(dim=0)).sum()
        self.seen = {"scores": scores, "chosen": chosen, "weight": weight, "loss": loss}
        total = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, place = torch.nonzero(chosen == number, as_tuple=True)
            total = total.index_add(0, token, weight[token, place, None] * expert(flat[token]))
        if hasattr(self, "shared_experts"):
            total = total + self.shared_experts(flat)
        return WithLoss.apply(total.view_as(x), loss)


class TorchBlock(nn.Module):
    def __init__(self, dim: int, attention: nn.Module, name: str, ffn: nn.Module) -> None:
        super().__init__()
        self.attn, self.ffn_name = attention, name
        self.add_module(name, ffn)  # "mlp" or "moe"
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(condition).chunk(6, dim=1)
        x = x + gate_a.unsqueeze(1) * self.attn(shifted(norm(x), shift_a, scale_a))
        return x + gate_m.unsqueeze(1) * self.get_submodule(self.ffn_name)(shifted(norm(x), shift_m, scale_m))


class Last(nn.Module):
    def __init__(self, dim: int, features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.linear(shifted(norm(x), *self.adaLN_modulation(condition).chunk(2, dim=1)))


class TorchDiT(nn.Module):
    """x (B, C, H, W), t (B,) or (1,), label (B,) to (B, C_out, H, W).

    Args:
        hidden: width of an MLP, and of each expert.
        label_rows: of the label table, the null row included.
        tasks: 0, or how many patch embeddings there are, for labels from ``first_task`` on.
        attention: ``flash``, or in the layout of timm ``explicit`` or ``sdpa`` (any other word means the last).
        experts: 0 = a dense model, else see ``Mixture``.
        alpha: weight of the balance loss.
    """

    def __init__(
        self,
        *,
        input_size: int,
        patch: int,
        channels: int,
        out_channels: int,
        dim: int,
        depth: int,
        heads: int,
        hidden: int,
        label_rows: int,
        tasks: int = 0,
        first_task: int = 0,
        attention: str = "sdpa",
        qk_norm: bool = False,
        experts: int = 0,
        active: int = 0,
        kind: str = "gelu",
        shared: int = 0,
        renormalise: bool = False,
        alpha: float = 0.01,
    ) -> None:
        super().__init__()
        self.patch, self.grid = patch, input_size // patch
        self.x_embedder = Projected(dim, channels, patch, tasks, first_task)
        self.t_embedder = Timestep(dim)
        self.y_embedder = Label(label_rows, dim)
        self.pos_embed = nn.Parameter(sincos_table(dim, self.grid), requires_grad=False)

        def block() -> TorchBlock:
            plain = PlainAttention(dim, heads, attention == "explicit")
            attend = FlashAttention(dim, heads, qk_norm) if attention == "flash" else plain
            if experts:
                return TorchBlock(
                    dim, attend, "moe", Mixture(dim, hidden, experts, active, kind, shared, renormalise, alpha)
                )
            return TorchBlock(dim, attend, "mlp", Gelu(dim, hidden))

        self.blocks = nn.ModuleList([block() for _ in range(depth)])
        self.final_layer = Last(dim, patch * patch * out_channels)

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        tokens = self.x_embedder(x, label) + self.pos_embed
        condition = self.t_embedder(t) + self.y_embedder(label)
        for block in self.blocks:
            tokens = block(tokens, condition)
        pixels = self.final_layer(tokens, condition)
        pixels = pixels.unflatten(2, (self.patch, self.patch, -1)).unflatten(1, (self.grid, self.grid))
        return torch.einsum("nhwpqc->nchpwq", pixels).flatten(4, 5).flatten(2, 3)

    def mixtures(self) -> list[Mixture]:
        """The layers with experts, in order."""
        return [module for module in self.modules() if isinstance(module, Mixture)]
