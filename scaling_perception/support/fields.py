"""Every field of a training config in one table: default, type, range or choices, unit, and one sentence.

``configs/common.py`` makes the defaults of it, ``support/field_checks.py`` checks a config against it when it is loaded
or trained, `train --help-config` prints it, and docs/reference.md holds it. A new field is a new row and nothing else.

Names are dotted; ``NAME`` stands for any key of a table whose keys the user chooses (``data.mixture.NAME.count``).
"""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True)
class Field:
    """One field, or one argument of a config file.

    Attributes:
        default: what a config begins with; of the field's type. A class (``int``, ``str``, …): the field is optional.
        range: an interval of finite numbers such as ``[0, 1)`` or ``(0, inf)``; of a tuple, that of each member.
        choices: the values allowed, or ``module:attribute`` where they are listed.
        also: values allowed besides the range or the choices.
        unit: of the number, for the reader.
        text: one sentence, without its full stop.
        refused: values that some would try, and why they are none.
        free: it may differ when a run is resumed, for no number of the run and none of its data depends on it.
    """

    default: Any
    text: str
    range: str = ""
    choices: tuple[Any, ...] | str = ()
    also: tuple[Any, ...] = ()
    unit: str = ""
    refused: Mapping[Any, str] = dataclasses.field(default_factory=dict)
    free: bool = False

    @property
    def optional(self) -> bool:
        """Whether a config may lack it."""
        return isinstance(self.default, type)

    @property
    def kind(self) -> type:
        """The type of its values."""
        return self.default if isinstance(self.default, type) else type(self.default)

    def options(self) -> tuple[Any, ...]:
        """The choices, looked up where they are listed; () = any value."""
        return tuple(resolve(self.choices)) if isinstance(self.choices, str) else self.choices


def resolve(place: str) -> Any:
    """What ``module:attribute`` of this package means; called, if it is a function without arguments for a list."""
    module, _, name = place.partition(":")
    found = getattr(importlib.import_module(f"scaling_perception.{module}"), name)
    return found() if name.endswith("_names") else found


_COUNT, _FROM_1, _POSITIVE, _FROM_0, _SHARE = "[0, inf)", "[1, inf)", "(0, inf)", "[0, inf)", "[0, 1)"
_SKIP = ("none", "skip", "raise")

FIELDS: dict[str, Field] = {
    "seed": Field(2024, "what all random numbers of the run come from", "[0, 4294967295]"),
    "objective": Field(
        "diffusion",
        "what is trained; one_step: a model's one step, by the task's loss in pixels",
        choices=("diffusion", "one_step", "autoencoder"),
    ),
    "model": Field("XL/2", "a preset of `presets`", choices="models.presets:preset_names"),
    "model_changes": Field({}, "sizes of the preset to change"),
    "model_changes.name": Field(str, "name in the model's description"),
    "model_changes.dim": Field(int, "width D", _FROM_1),
    "model_changes.depth": Field(int, "layers", _FROM_1),
    "model_changes.heads": Field(int, "attention heads; D is a multiple", _FROM_1),
    "model_changes.patch_size": Field(int, "side of a patch", _FROM_1, unit="latent pixels"),
    "model_changes.in_channels": Field(int, "channels of the noisy latent", choices=(4,)),
    "model_changes.cond_channels": Field(
        int, "condition channels: none, image, image and prompt", choices=(0, 4, 8, 36, 72)
    ),
    "model_changes.features": Field(int, "channels of features beside the latent of each condition", choices=(0, 32)),
    "model_changes.mlp_ratio": Field(float, "hidden width of the MLP over D", _POSITIVE),
    "model_changes.num_classes": Field(int, "class rows of the label table", _COUNT),
    "model_changes.task_labels": Field(int, "task rows after the class rows", _COUNT),
    "model_changes.routed": Field(bool, "one patch embedding for each task label"),
    "model_changes.learn_sigma": Field(bool, "output channels for the learned variance"),
    "model_changes.experts": Field(int, "expert MLPs in every block; 0 = dense", _COUNT),
    "model_changes.active_experts": Field(int, "experts that each token meets", _FROM_1),
    "model_changes.expert_mlp": Field(str, "MLP of an expert", choices="models.config:EXPERT_MLPS"),
    "model_changes.shared_experts": Field(int, "width over D of the expert that every token meets; 0 = none", _COUNT),
    "model_changes.gating": Field(
        str, "weights of the chosen experts: as they are, or divided by their sum", choices="models.config:GATINGS"
    ),
    "model_changes.qk_norm": Field(bool, "LayerNorm of queries and keys in each head"),
    "model_changes.context_dim": Field(int, "width of the task's text embedding; 0 = none", _COUNT),
    "resolution": Field(512, "side of the square pictures, a multiple of 16", "[8, inf)", unit="pixels"),
    "autoencoder": Field("tiny", "shipped name, folder or hub id"),
    "init": Field("", "model folder, training run or shipped name to start from; empty = from scratch"),
    "init_surgery": Field(
        "auto", "fit the weights of init to this model, or take equal shapes alone", choices=("auto", "none")
    ),
    "init_gain": Field(
        "exact", "scale of an input that is widened: exact, or the authors' 0.5 and 0.33", choices=("exact", "released")
    ),
    "upcycle": Field({}, "how experts differ from the MLP that they are copied from"),
    "upcycle.noise": Field(0.0, "noise on each copy, relative to the weights' deviation", _FROM_0),
    "upcycle.drop": Field(0.0, "share of each copy's hidden units that is drawn anew", "[0, 1]"),
    "task_prompts": Field({}, "task = text: a fixed text embedding of a task"),
    "task_prompts.NAME": Field(str, "the text of task NAME"),
    "text_encoder": Field("", "CLIP text encoder of the prompts: folder or hub id"),
    "diffusion": Field("fixed", "schedule, prediction and grid by name", choices="diffusion.schedules:PRESETS"),
    "diffusion_changes": Field({}, "parts of that preset to change"),
    "diffusion_changes.schedule": Field(
        str, "noise schedule", choices="diffusion.schedules:SCHEDULES", also=("squaredcos_cap_v2",)
    ),
    "diffusion_changes.prediction": Field(
        str,
        "what the network predicts",
        choices="diffusion.schedules:PREDICTIONS",
        also=("v_prediction", "sample", "eps"),
    ),
    "diffusion_changes.spacing": Field(str, "the sampler's grid of timesteps", choices="diffusion.schedules:SPACINGS"),
    "diffusion_changes.steps_offset": Field(int, "added to the leading grid", "[0, 999]", unit="timesteps"),
    "diffusion_changes.final_alpha_one": Field(bool, "the last step goes to a clean latent"),
    "diffusion_changes.zero_snr": Field(bool, "the last timestep carries no signal"),
    "timestep_sampling": Field(
        "uniform",
        "draws of timesteps; high_noise: half of them from the noisiest tenth; logit_normal: the middle most",
        choices=("uniform", "high_noise", "logit_normal"),
    ),
    "noise": Field(
        "gaussian",
        "or annealed multi-resolution noise (Marigold); zeros: one_step starts without noise",
        choices=("gaussian", "multires", "zeros"),
    ),
    "balance_loss": Field(0.01, "weight alpha of the balance loss of models with experts", _FROM_0),
    "label_dropout": Field(0.1, "share of class labels that pre-training drops", _SHARE),
    "samples": Field({}, "pictures that a finished pre-training draws"),
    "samples.count": Field(8, "how many; 0 = none", _COUNT, unit="pictures"),
    "samples.steps": Field(50, "denoising steps of each", "[1, 1000]", unit="steps"),
    "samples.guidance": Field(4.0, "strength of classifier-free guidance; 1 = none", _FROM_0),
    "latent_norm": Field("none", "auto: target latents are normalised by task and channel", choices=("none", "auto")),
    "task_options": Field({}, "how ground truth becomes pictures"),
    "task_options.flow_divisor": Field(75.0, "flow that a picture shows as 1, at width 512", _POSITIVE, unit="pixels"),
    "task_options.flow_frame": Field(
        "native",
        "frame whose pixels measure flow: the picture at width 512, or the 512x512 it is squashed to",
        choices="tasks.samples:FLOW_FRAMES",
    ),
    "task_options.flow_refine": Field(
        0, "how often merged flow is doubled in size and refined by matching", "[0, 4]", unit="times"
    ),
    "task_options.depth_quantiles": Field((0.02, 0.98), "valid depths that become -1 and 1; rising", "[0, 1]"),
    "task_options.mask_threshold": Field(
        250.0, "a predicted object is as dark as this or darker", "[0, 255]", unit="grey"
    ),
    "task_options.keep_visible": Field(False, "the predicted mask also covers the given visible part"),
    "task_options.mask_opening": Field(
        0,
        "what is painted beside the given mask joins it only where it is wider than twice this",
        "[0, 16]",
        unit="pixels",
        free=True,
    ),
    "task_options.image_resize": Field("bilinear", "how pictures become square", choices="tasks.samples:IMAGE_RESIZES"),
    "task_options.depth_prompt": Field(
        "ones", "prompt of depth: ones, or the mask of valid depths", choices="tasks.samples:DEPTH_PROMPTS"
    ),
    "task_options.clip_depth": Field(True, "decoded depth is clipped before members are merged"),
    "mesh": Field({}, "how many devices share what; -1 once: the devices that are left"),
    "mesh.data": Field(-1, "devices that split the batch", _FROM_1, also=(-1,), unit="devices", free=True),
    "mesh.fsdp": Field(1, "devices that split batch and weights", _FROM_1, also=(-1,), unit="devices", free=True),
    "mesh.expert": Field(1, "devices that split batch and experts", _FROM_1, also=(-1,), unit="devices", free=True),
    "mesh.tensor": Field(1, "devices that split wide matrices", _FROM_1, also=(-1,), unit="devices", free=True),
    "data": Field({}, "what is trained on"),
    "data.cache": Field("", "folder or folders of prepared latents; empty = read and encode as it goes", free=True),
    "data.mixture": Field({}, "name = entry: the sources, and how much of each"),
    "data.mixture.NAME": Field(dict, "one source and task"),
    "data.mixture.NAME.source": Field(str, "data set", choices="data.sources:SOURCES", also=("",)),
    "data.mixture.NAME.root": Field(str, "folder of the data set", free=True),
    "data.mixture.NAME.split": Field(str, "part of the data set; empty = all"),
    "data.mixture.NAME.task": Field(str, "what it teaches", choices="tasks:TASKS"),
    "data.mixture.NAME.count": Field(int, "samples taken; 0 = all", _COUNT, unit="samples"),
    "data.mixture.NAME.start": Field(int, "first sample taken", _COUNT),
    "data.mixture.NAME.weight": Field(float, "share of the batch, relative to the other entries", _FROM_0),
    "data.mixture.NAME.resolution": Field(
        int, "side that scenes are rendered at; 0 = resolution", _COUNT, unit="pixels"
    ),
    "data.flip": Field(True, "half of the samples are mirrored"),
    "data.augment": Field({}, "random changes of pictures that are read as it goes, not of a cache"),
    "data.augment.crop": Field(1.0, "smallest share of height and width that a crop keeps; 1 = no crops", "(0, 1]"),
    "data.augment.brightness": Field(0.0, "largest change of the picture's brightness, as a share", "[0, 1]"),
    "data.augment.contrast": Field(0.0, "largest change of its contrast, as a share", "[0, 1]"),
    "data.augment.saturation": Field(0.0, "largest change of its saturation, as a share", "[0, 1]"),
    "data.augment.hue": Field(0.0, "largest turn of its colours", "[0, 0.5]", unit="turns"),
    "data.workers": Field(0, "processes that read samples; 0 or 1 = a thread", _COUNT, unit="processes", free=True),
    "held_out": Field({}, "what train.validate_every measures, as in data"),
    "held_out.cache": Field("", "folder or folders of prepared latents that are not trained on"),
    "held_out.mixture": Field({}, "as data.mixture"),
    "held_out.shared": Field(False, "it may hold samples that are trained on, to measure the loss of those"),
    "train": Field({}, "the run"),
    "train.steps": Field(30_000, "length of the run", _FROM_1, unit="steps"),
    "train.batch_size": Field(1024, "samples of a step, over all devices", _FROM_1, unit="samples"),
    "train.log_every": Field(50, "between rows of metrics.jsonl", _FROM_1, unit="steps", free=True),
    "train.checkpoint_every": Field(1000, "between checkpoints", _FROM_1, unit="steps", free=True),
    "train.keep": Field(2, "newest checkpoints that stay", _FROM_1, unit="checkpoints", free=True),
    "train.keep_every": Field(0, "and all at multiples of this; 0 = none", _COUNT, unit="steps", free=True),
    "train.export_kept": Field(False, "also export the average at those multiples, as models/STEP", free=True),
    "train.keep_best": Field(0, "and those whose metric is smallest; 0 = none", _COUNT, unit="checkpoints", free=True),
    "train.best_metric": Field(
        "", "which: any that is logged; empty = held_out_loss where it is measured, else loss", free=True
    ),
    "train.export_from": Field(
        "last", "the finished model: average of the last step, or of the best kept", choices=("last", "best"), free=True
    ),
    "train.validate_every": Field(0, "between measurements of held_out; 0 = never", _COUNT, unit="steps", free=True),
    "train.validate_samples": Field(256, "of held_out that are measured", _FROM_1, unit="samples"),
    "train.dtype": Field(
        "float32",
        "of activations",
        choices=("float32", "bfloat16"),
        refused={
            "float16": "most gradients round to zero in it: give bfloat16, or float32 (export_dtype may be float16)"
        },
    ),
    "train.stream_dtype": Field(
        "compute", "of the tokens between blocks: train.dtype, or less rounding", choices=("compute", "float32")
    ),
    "train.matmul_precision": Field(
        "default", "of float32 products: the device's own, or more passes", choices=("default", "high", "highest")
    ),
    "train.accumulate": Field(1, "parts that a batch is computed in; same update", _FROM_1, unit="parts", free=True),
    "train.gather": Field(
        "layer",
        "where weights split over fsdp are gathered: in each layer, or once a step: fewer bytes sent, more memory",
        choices=("layer", "step"),
        free=True,
    ),
    "train.on_nan": Field(
        "raise",
        "at a loss or gradient that is not finite: stop, or skip the step",
        choices=("raise", "skip"),
        free=True,
    ),
    "train.on_spike": Field("none", "at a loss or gradient far above the last ones", choices=_SKIP, free=True),
    "train.spike_factor": Field(10.0, "how far above their median", "(1, inf)", free=True),
    "train.spike_window": Field(
        128, "of that median; the policy holds once half are known", "[2, inf)", unit="steps", free=True
    ),
    "train.check_replicas": Field(
        0, "between comparisons of the copies of the state on all devices; 0 = never", _COUNT, unit="steps", free=True
    ),
    "train.wandb": Field("", "project of Weights & Biases that gets the metrics, too", free=True),
    "train.remat": Field(False, "compute activations again in the backward pass: slower, less memory", free=True),
    "train.export_dtype": Field(
        "float32", "of the exported weights", choices=("float32", "bfloat16", "float16"), free=True
    ),
    "optim": Field({}, "the optimiser"),
    "optim.name": Field("adamw", "optimiser", choices=("adamw", "adam", "muon")),
    "optim.lr": Field(1.2e-4, "learning rate after the warm-up", _POSITIVE),
    "optim.lr_final": Field(1.2e-6, "learning rate of the last step; at most lr", _FROM_0),
    "optim.warmup": Field(100, "linear warm-up, at most half of the run", _COUNT, unit="steps"),
    "optim.schedule": Field("exponential", "way from lr to lr_final", choices=("exponential", "cosine", "constant")),
    "optim.b1": Field(0.9, "decay of the first moment", _SHARE),
    "optim.b2": Field(0.999, "decay of the second moment", _SHARE),
    "optim.eps": Field(1e-8, "added to the root of the second moment", _POSITIVE),
    "optim.weight_decay": Field(0.0, "decoupled, of kernels alone; times the learning rate", _FROM_0),
    "optim.grad_clip": Field(0.0, "largest gradient norm; 0 = no clipping", _FROM_0),
    "optim.ema": Field(0.9999, "decay of the running average that is exported; 0 = none", _SHARE),
    "optim.ema_warmup": Field(False, "step t has a decay of at most (1 + t) / (10 + t), for runs below 90,000 steps"),
    "optim.ema_every": Field(1, "between updates of the average, by the decay of as many", _FROM_1, unit="steps"),
    "optim.ema_dtype": Field(
        "float32", "of the average; bfloat16 is rounded at random", choices=("float32", "bfloat16")
    ),
    "optim.ema_place": Field("device", "where the average is kept", choices=("device", "host")),
    "phase": Field(str, "autoencoder: the part that is trained", choices=("encoder", "decoder")),
    "teacher": Field(str, "autoencoder: folder with TAESD's files, or a hub id"),
    "bank": Field(int, "autoencoder: pictures of the bank", _FROM_1, unit="pictures"),
    "vae": Field(dict, "autoencoder: its sizes"),
    "vae.encoder_widths": Field(tuple, "channels of each level, from pixels to latents", _FROM_1),
    "vae.encoder_blocks": Field(tuple, "residual blocks of each level", _COUNT),
    "vae.decoder_widths": Field(tuple, "channels of each level, from latents to pixels", _FROM_1),
    "vae.decoder_blocks": Field(tuple, "residual blocks of each level", _COUNT),
    "vae.patch": Field(int, "pixels in each direction that become channels first", _FROM_1, unit="pixels"),
    "vae.latent_channels": Field(int, "channels of a latent", _FROM_1),
}
for _name in [name for name in FIELDS if name.startswith("data.mixture.")]:
    FIELDS[_name.replace("data.", "held_out.", 1)] = FIELDS[_name]


def field_named(name: str) -> Field | None:
    """The row of a field by its dotted name in a config, ``data.mixture.depth.count``; None where there is none."""
    row = ""
    for part in name.split("."):
        row = f"{row}.{part}" if f"{row}.{part}".lstrip(".") in FIELDS else f"{row}.NAME"
    return FIELDS.get(row.lstrip("."))


# Arguments after the colon of a config file: the field whose values they take. Files choose their own defaults.
ARGUMENTS: dict[str, Field] = {
    "model": FIELDS["model"],
    "res": FIELDS["resolution"],
    "steps": FIELDS["train.steps"],
    "batch": FIELDS["train.batch_size"],
    "pretrained": FIELDS["train.steps"],
    "count": FIELDS["data.mixture.NAME.count"],
    "source": FIELDS["data.mixture.NAME.source"],
    "classes": dataclasses.replace(FIELDS["model_changes.num_classes"], range=_FROM_1),
    "experts": dataclasses.replace(FIELDS["model_changes.experts"], range=_FROM_1),
    "active": FIELDS["model_changes.active_experts"],
    "gating": FIELDS["model_changes.gating"],
    "gain": FIELDS["init_gain"],
    "seed": FIELDS["seed"],
    "lr": FIELDS["optim.lr"],
    "diffusion": FIELDS["diffusion"],
    "schedule": FIELDS["diffusion_changes.schedule"],
    "recipe": Field("auto", "batch and rates", choices=("auto", "final", "ablation")),
    "phase": FIELDS["phase"],
    "bank": FIELDS["bank"],
}


def defaults() -> ConfigDict:
    """A config with every field that has a default."""
    config = ConfigDict()
    for name, field in FIELDS.items():
        if not field.optional:
            table: Any = config
            *folders, last = name.split(".")
            for folder in folders:
                table = table[folder]
            table[last] = ConfigDict() if isinstance(field.default, Mapping) else field.default
    return config
