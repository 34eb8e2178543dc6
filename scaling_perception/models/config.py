"""What a DiT is made of, as plain numbers: the sizes that a preset, a model folder or a checkpoint states."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from scaling_perception.support.errors import UserError, did_you_mean

EXPERT_MLPS = ("gelu", "swiglu")
GATINGS = ("paper", "renormalised")

TIME_FREQUENCIES = 128  # sinusoids of a timestep: 128 cosines, then 128 sines


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Sizes of a DiT. All are plain numbers, so a config is JSON-able (``dataclasses.asdict``).

    Attributes:
        name: preset it came from.
        input_size: side of the square latent grid, h = w (image side / 8).
        patch_size: side of a patch in latent pixels.
        in_channels: channels of the noisy latent.
        cond_channels: channels of the latents put before it: 0 none, 4 image, 8 image and prompt. Order: [image,
            prompt, noisy] (facts 2). With ``features`` each of them has so many channels more.
        features: channels that the autoencoder appends to the latent of a condition, see ``autoencoders``.
        dim, depth, heads: width D, layers L, attention heads.
        mlp_ratio: hidden width of the MLP over D.
        num_classes: class rows of the label table.
        task_labels: task rows after them; the null row is last.
        routed: one patch embedding per task label (PatchEmbedRouter, facts 2) instead of one for all.
        learn_sigma: whether as many output channels again are made for the learned variance.
        experts: routed expert MLPs E in every block, in place of its MLP; 0 = dense.
        active_experts: experts K that each token meets.
        expert_mlp: ``gelu`` (as the dense MLP, upcycled models) or ``swiglu`` (without biases, DiT-MoE), facts 3.1.
        shared_experts: 0, or width over D of one SwiGLU that every token meets besides (2 in DiT-MoE).
        gating: ``paper``: the chosen experts' softmax weights as they are; ``renormalised``: divided by their sum.
        qk_norm: LayerNorm of queries and keys in each head (DiT-MoE's other attention layout, facts 1.2).
        context_dim: 0, or width of a fixed embedding of the task that is projected and added to the condition.
    """

    name: str
    input_size: int
    dim: int
    depth: int
    heads: int
    patch_size: int = 2
    in_channels: int = 4
    cond_channels: int = 0
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    task_labels: int = 0
    routed: bool = False
    learn_sigma: bool = True
    experts: int = 0
    active_experts: int = 2
    expert_mlp: str = "gelu"
    shared_experts: int = 0
    gating: str = "paper"
    qk_norm: bool = False
    context_dim: int = 0
    features: int = 0

    def __post_init__(self) -> None:
        for field in ("input_size", "dim", "depth", "heads", "patch_size", "in_channels"):
            if getattr(self, field) < 1:
                raise UserError(f"model {field}={getattr(self, field)}: give a whole number of 1 or more")
        for field in (
            "cond_channels",
            "num_classes",
            "task_labels",
            "experts",
            "shared_experts",
            "context_dim",
            "features",
        ):
            if getattr(self, field) < 0:
                raise UserError(f"model {field}={getattr(self, field)}: give 0 or more")
        if self.dim % self.heads:
            raise UserError(f"model dim={self.dim} is not a multiple of heads={self.heads}: change one of them")
        if self.dim % 4:
            raise UserError(f"model dim={self.dim}: the position table needs a multiple of 4")
        if self.input_size % self.patch_size:
            raise UserError(f"model input_size={self.input_size} is not a multiple of patch_size={self.patch_size}")
        if self.features and self.cond_channels % self.condition_channels:
            raise UserError(
                f"model cond_channels={self.cond_channels}: with features={self.features} a picture has "
                f"{self.condition_channels} channels: give 0, {self.condition_channels} or "
                f"{2 * self.condition_channels}"
            )
        if self.routed and not self.task_labels:
            raise UserError("model routed=True needs task_labels above 0: one patch embedding is made per task label")
        for field, options in (("expert_mlp", EXPERT_MLPS), ("gating", GATINGS)):
            if getattr(self, field) not in options:
                raise UserError(f"model {field}={getattr(self, field)!r}{did_you_mean(getattr(self, field), options)}")
        if self.experts and not 1 <= self.active_experts <= self.experts:
            raise UserError(f"model active_experts={self.active_experts}: give 1 to experts={self.experts}")
        if self.shared_experts and not self.experts:
            raise UserError("model shared_experts needs experts above 0: a dense block has no shared expert")

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.input_size // self.patch_size

    @property
    def tokens(self) -> int:
        """T, patches in the picture."""
        return self.grid**2

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.heads

    @property
    def hidden(self) -> int:
        """F, hidden width of the MLP, and of each expert."""
        return round(self.dim * self.mlp_ratio)

    @property
    def condition_channels(self) -> int:
        """Channels of one condition: its latent, then its features."""
        return self.in_channels + self.features

    @property
    def conditions(self) -> int:
        """Pictures that condition the model: 0, 1 (image) or 2 (image and prompt)."""
        return self.cond_channels // self.condition_channels

    @property
    def input_channels(self) -> int:
        """Channels of the model's input: condition latents and the noisy latent."""
        return self.cond_channels + self.in_channels

    @property
    def out_channels(self) -> int:
        """Channels of the model's output: the prediction, then the variance logits if learned."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def label_rows(self) -> int:
        """Rows of the label table: classes, tasks, null."""
        return self.num_classes + self.task_labels + 1

    @property
    def null_label(self) -> int:
        """The unconditional label, which is also what a single-task model is fed (facts 2)."""
        return self.label_rows - 1

    def task_label(self, index: int) -> int:
        """Label of row ``index`` of the model's passes where the model has tasks, else the null label."""
        if not self.task_labels:
            return self.null_label
        if not 0 <= index < self.task_labels:
            raise UserError(f"task index {index}: model {self.name} knows {self.task_labels} tasks (0 is the first)")
        return self.num_classes + index


def config_from_dict(fields: Mapping[str, Any]) -> DiTConfig:
    """A config from its JSON form.

    Raises:
        UserError: a field is unknown, missing, or of the wrong kind.
    """
    known = {field.name: field for field in dataclasses.fields(DiTConfig)}
    kinds = {field.name: type(field.default) for field in known.values() if field.default is not dataclasses.MISSING}
    kinds["name"] = str
    given: dict[str, Any] = {}
    for name, value in fields.items():
        if name not in known:
            raise UserError(f"model has no field '{name}'{did_you_mean(name, known)}")
        kind = kinds.get(name, int)
        accepted = (int, float) if kind is float else kind
        if not isinstance(value, accepted) or (kind is not bool and isinstance(value, bool)):
            raise UserError(f"model {name}={value!r}: expected a value of type {kind.__name__}")
        given[name] = kind(value)
    missing = [n for n, field in known.items() if field.default is dataclasses.MISSING and n not in given]
    if missing:
        raise UserError(f"model field '{missing[0]}' is missing: add it to the model's description")
    return DiTConfig(**given)
