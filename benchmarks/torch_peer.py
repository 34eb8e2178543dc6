"""The same models in PyTorch, for comparison only: the released way of sampling, member by member.

What the authors' pipeline does with one picture (facts 2, 4.3, 7): for every member again encode the picture, walk the
DDIM grid in a Python loop with the network at batch 1 and the scheduler's arithmetic as diffusers has it, and decode.
float32 throughout. Networks are written from their description (facts 1.1, 2); weights are ours, converted.

Imports torch, an extra: import this module where it is asked for.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from scaling_perception.diffusion.schedules import TRAIN_STEPS, DiffusionPreset, timestep_grid
from scaling_perception.interop.torch_dit import dit_to_torch
from scaling_perception.models import tiny_vae, vae
from scaling_perception.models.autoencoders import Autoencoder
from scaling_perception.models.config import DiTConfig
from scaling_perception.support.errors import UserError

from .torch_dit import TorchDiT


def make_dit(config: DiTConfig, params: Mapping[str, Any], attention: str = "sdpa") -> TorchDiT:
    """The model with our parameters; ``attention``: explicit, as timm's was when DiT was written, or sdpa, as it is.

    Raises:
        UserError: a model with a part that this rendering has not.
    """
    if config.experts or config.qk_norm or config.context_dim:
        raise UserError(f"--against torch has dense models alone, and {config.name} is none: choose a1 to a6 or XL/2")
    model = TorchDiT(
        input_size=config.input_size,
        patch=config.patch_size,
        channels=config.input_channels,
        out_channels=config.out_channels,
        dim=config.dim,
        depth=config.depth,
        heads=config.heads,
        hidden=config.hidden,
        label_rows=config.label_rows,
        tasks=config.task_labels if config.routed else 0,
        first_task=config.task_label(0) if config.routed else 0,
        attention=attention,
    )
    state = dit_to_torch(params, config, attention="timm")
    model.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in state.items()})
    return model.eval()


class _Layers:
    """A parameter tree of an autoencoder as torch functions; kernels are turned once, here."""

    def __init__(self, tree: Mapping[str, Any]) -> None:
        flat = {name: np.asarray(leaf, np.float32) for name, leaf in tiny_vae.flatten(tree).items()}
        turned = {n: a.transpose(3, 2, 0, 1) if a.ndim == 4 else a.T for n, a in flat.items()}
        self.leaves = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in turned.items()}

    def conv(self, name: str, x: Tensor, stride: int = 1, padding: int | None = None) -> Tensor:
        kernel = self.leaves[f"{name}/kernel"]
        padding = kernel.shape[-1] // 2 if padding is None else padding
        return F.conv2d(x, kernel, self.leaves.get(f"{name}/bias"), stride, padding)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.leaves[f"{name}/kernel"], self.leaves[f"{name}/bias"])

    def norm(self, name: str, x: Tensor, groups: int) -> Tensor:
        return F.group_norm(x, groups, self.leaves[f"{name}/scale"], self.leaves[f"{name}/bias"], vae.NORM_EPSILON)

    def count(self, prefix: str) -> int:
        """How many layers there are with names that are ``prefix`` and a number."""
        heads = {name.split("/")[0] for name in self.leaves}
        return sum(head.removeprefix(prefix).isdigit() for head in heads if head.startswith(prefix))


def _tiny_block(layers: _Layers, name: str, x: Tensor) -> Tensor:
    y = F.relu(layers.conv(f"{name}/conv0", x))
    y = F.relu(layers.conv(f"{name}/conv1", y))
    return F.relu(x + layers.conv(f"{name}/conv2", y))


def _tiny_encode(layers: _Layers, config: tiny_vae.TinyVAEConfig, x: Tensor) -> Tensor:
    x = (x + 1) / 2
    if config.patch > 1:  # the kernels know the channels of a patch in the order row, column, channel
        x = F.pixel_unshuffle(x, config.patch).unflatten(1, (x.shape[1], -1)).transpose(1, 2).flatten(1, 2)
    for level, blocks in enumerate(config.encoder_blocks):
        x = layers.conv(f"down{level}", x, 2) if level else layers.conv("stem", x)
        for block in range(blocks):
            x = _tiny_block(layers, f"level{level}_block{block}", x)
    return layers.conv("head", x)


def _tiny_decode(layers: _Layers, config: tiny_vae.TinyVAEConfig, z: Tensor) -> Tensor:
    x = torch.tanh(z / 3) * 3
    for level, blocks in enumerate(config.decoder_blocks):
        up = F.interpolate(x, scale_factor=2.0) if level else x
        x = layers.conv(f"up{level}", up) if level else F.relu(layers.conv("stem", x))
        for block in range(blocks):
            x = _tiny_block(layers, f"level{level}_block{block}", x)
    x = layers.conv("head", x)
    if config.patch > 1:
        x = F.pixel_shuffle(x.unflatten(1, (config.patch**2, -1)).transpose(1, 2).flatten(1, 2), config.patch)
    return x * 2 - 1


def _kl_block(layers: _Layers, name: str, x: Tensor, groups: int) -> Tensor:
    y = layers.conv(f"{name}/conv1", F.silu(layers.norm(f"{name}/norm1", x, groups)))
    y = layers.conv(f"{name}/conv2", F.silu(layers.norm(f"{name}/norm2", y, groups)))
    return y + (layers.conv(f"{name}/shortcut", x) if f"{name}/shortcut/kernel" in layers.leaves else x)


def _kl_middle(layers: _Layers, x: Tensor, groups: int) -> Tensor:
    x = _kl_block(layers, "mid_block0", x, groups)
    tokens = layers.norm("mid_attention/norm", x, groups).flatten(2).transpose(1, 2)
    query, key, value = (layers.linear(f"mid_attention/{name}", tokens) for name in ("query", "key", "value"))
    mixed = F.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None])[:, 0]
    x = x + layers.linear("mid_attention/out", mixed).transpose(1, 2).reshape(x.shape)
    return _kl_block(layers, "mid_block1", x, groups)


def _kl_encode(layers: _Layers, config: vae.VAEConfig, x: Tensor) -> Tensor:
    groups = config.norm_num_groups
    x = layers.conv("conv_in", x)
    for level in range(len(config.block_out_channels)):
        for block in range(layers.count(f"level{level}_block")):
            x = _kl_block(layers, f"level{level}_block{block}", x, groups)
        if f"level{level}_down/kernel" in layers.leaves:
            x = layers.conv(f"level{level}_down", F.pad(x, (0, 1, 0, 1)), 2, 0)
    x = F.silu(layers.norm("norm_out", _kl_middle(layers, x, groups), groups))
    x = layers.conv("conv_out", x)
    x = layers.conv("quant_conv", x) if config.use_quant_conv else x
    return x.chunk(2, dim=1)[0] * config.scaling_factor


def _kl_decode(layers: _Layers, config: vae.VAEConfig, z: Tensor) -> Tensor:
    groups, x = config.norm_num_groups, z / config.scaling_factor
    x = layers.conv("post_quant_conv", x) if config.use_post_quant_conv else x
    x = _kl_middle(layers, layers.conv("conv_in", x), groups)
    for level in range(len(config.block_out_channels)):
        for block in range(layers.count(f"level{level}_block")):
            x = _kl_block(layers, f"level{level}_block{block}", x, groups)
        if f"level{level}_up/kernel" in layers.leaves:
            x = layers.conv(f"level{level}_up", F.interpolate(x, scale_factor=2.0))
    return layers.conv("conv_out", F.silu(layers.norm("norm_out", x, groups)))


def make_coders(autoencoder: Autoencoder) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """(encode, decode) of pictures (B, 3, H, W) in [-1, 1] and scaled latents (B, 4, h, w), without features."""
    config, params = autoencoder.config, autoencoder.params
    coder = params["encoder"]["latents"] if autoencoder.features else params["encoder"]
    encoder, decoder = _Layers(coder), _Layers(params["decoder"])
    if isinstance(config, vae.VAEConfig):
        return lambda x: _kl_encode(encoder, config, x), lambda z: _kl_decode(decoder, config, z)
    return lambda x: _tiny_encode(encoder, config, x), lambda z: _tiny_decode(decoder, config, z)


def ddim_step(alphas: Tensor, final: Tensor, out: Tensor, t: int, steps: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """diffusers' DDIMScheduler.step for v-prediction with eta 0: (the next x, the clean estimate)."""
    previous = t - TRAIN_STEPS // steps
    alpha, after = alphas[t], alphas[previous] if previous >= 0 else final
    beta = 1 - alpha
    clean = alpha**0.5 * x - beta**0.5 * out
    noise = alpha**0.5 * out + beta**0.5 * x
    variance = (1 - after) / beta * (1 - alpha / after)
    deviation = 0.0 * variance**0.5
    direction = (1 - after - deviation**2) ** 0.5 * noise
    return after**0.5 * clean + direction, clean


class Sampler:
    """One picture to decoded members, as the released code does it.

    Args:
        network: from `make_dit`, or that compiled.
        label: row of the label table.
    """

    def __init__(self, network: Any, autoencoder: Autoencoder, diffusion: DiffusionPreset, steps: int, label: int):
        if diffusion.prediction != "v" or diffusion.spacing != "leading":
            raise ValueError("written for v-prediction on the leading grid")
        self.network, self.steps = network, steps
        self.encode, self.decode = make_coders(autoencoder)
        self.timesteps = [int(t) for t in timestep_grid("leading", steps, diffusion.steps_offset)[0]]
        self.alphas = torch.from_numpy(diffusion.alphas_cumprod().astype(np.float32))
        self.final = torch.tensor(1.0) if diffusion.final_alpha_one else self.alphas[0]
        self.label = torch.tensor([label])

    def __call__(self, picture: np.ndarray, noise: np.ndarray, estimates: list[np.ndarray] | None = None) -> np.ndarray:
        """Picture (R, R, 3) in [-1, 1] and noise (M, h, w, 4) to pixels (M, R, R, 3).

        ``estimates`` gets the clean latents (1, h, w, 4) of every step, member by member.
        """
        members = []
        with torch.inference_mode():
            image = torch.from_numpy(picture.transpose(2, 0, 1)[None].copy())
            for start in torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()):
                latent = self.encode(image)  # for every member again, as in the released code
                x = start[None]
                for t in self.timesteps:
                    out = self.network(torch.cat([latent, x], dim=1), torch.tensor([t]), self.label)
                    x, clean = ddim_step(self.alphas, self.final, out[:, : x.shape[1]], t, self.steps, x)
                    if estimates is not None:
                        estimates.append(clean.permute(0, 2, 3, 1).numpy())
                members.append(self.decode(x)[0].permute(1, 2, 0).numpy())
        return np.stack(members)


class Trainer:
    """One training step of a depth specialist as `training.step` defines it: loss, gradient, AdamW, running average.

    Args:
        network: from `make_dit`; its parameters are what is trained.
        forward: the network, or that compiled.
        optim: ``lr``, ``b1``, ``b2``, ``eps``, ``ema`` (no weight decay, no clipping).
        batch: ``image``, ``target`` (B, h, w, 4) and ``valid`` (B, h, w), numpy.
        label: row of the label table.
    """

    def __init__(
        self,
        network: TorchDiT,
        forward: Any,
        diffusion: DiffusionPreset,
        optim: Any,
        batch: Mapping[str, np.ndarray],
        label: int,
    ) -> None:
        if diffusion.prediction != "v":
            raise ValueError("written for v-prediction")
        self.network, self.forward, self.decay = network.train(), forward, optim.ema
        self.trained = [leaf for leaf in network.parameters() if leaf.requires_grad]
        betas = (optim.b1, optim.b2)
        # fused: its fastest, one pass over all parameters
        self.optimizer = torch.optim.AdamW(self.trained, optim.lr, betas, optim.eps, weight_decay=0.0, fused=True)
        self.ema = [leaf.detach().clone() for leaf in self.trained]
        levels = torch.from_numpy(diffusion.alphas_cumprod())
        self.signal, self.noise = levels.sqrt().float(), (1 - levels).sqrt().float()
        self.image, self.target = (
            torch.from_numpy(batch[name].transpose(0, 3, 1, 2).copy()) for name in ("image", "target")
        )
        self.valid = torch.from_numpy(batch["valid"])[:, None].expand(self.target.shape)
        self.target = torch.where(self.valid, self.target, 0)
        self.label = torch.full((len(self.target),), label)

    def __call__(self, draws: tuple[np.ndarray, np.ndarray] | None = None) -> float:
        """The loss before the step. ``draws``: timesteps (B,) and noise (B, h, w, 4); None draws them.

        The gradient stays in the leaves until the next call.
        """
        if draws is None:
            t, eps = torch.randint(0, TRAIN_STEPS, self.label.shape), torch.randn_like(self.target)
        else:
            t, eps = (
                torch.from_numpy(draws[0].astype(np.int64)),
                torch.from_numpy(draws[1].transpose(0, 3, 1, 2).copy()),
            )
        signal, noise = self.signal[t, None, None, None], self.noise[t, None, None, None]
        noisy, wanted = signal * self.target + noise * eps, signal * eps - noise * self.target
        out = self.forward(torch.cat([self.image, noisy], dim=1), t, self.label)[:, : noisy.shape[1]]
        loss = torch.where(self.valid, out - wanted, 0).square().sum() / self.valid.sum()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        now = [leaf.detach() for leaf in self.trained]
        torch._foreach_lerp_(self.ema, now, 1 - self.decay)  # pyright: ignore[reportPrivateImportUsage]
        return loss.item()

    def gradients(self) -> dict[str, np.ndarray]:
        """Of the last step, by the names that a checkpoint has for the parameters."""
        named = self.network.named_parameters()
        return {name: leaf.grad.numpy() for name, leaf in named if leaf.grad is not None}
