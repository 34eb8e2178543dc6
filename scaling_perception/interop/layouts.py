"""Which layout a checkpoint has, told by the names of its tensors, and which files of a folder hold them.

Layouts: ``dit`` (Meta's DiT), ``dit_moe`` (DiT-MoE), ``generalist`` (the authors' release: one patch convolution per
task), ``sd_vae`` (AutoencoderKL), ``taesd`` (TAESD, as its own two files or as one ``AutoencoderTiny``), ``clip`` (a
CLIP text encoder), ``ours`` (a folder that this package wrote). Nothing is read but names.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from scaling_perception.support.errors import UserError, did_you_mean

LAYOUTS = ("dit", "dit_moe", "generalist", "sd_vae", "taesd", "clip", "ours")

INDEX_END = ".safetensors.index.json"
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_REGISTERED = r"custom_checkpoint_\d+\.pkl"  # what Accelerate saves of objects that were registered with it

# layout: patterns that all have a matching name; the first layout that fits is taken
_SIGNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("generalist", (r"x_embedder\.proj\.conv_in_\d+\.weight", r"blocks\.\d+\..*")),
    ("dit_moe", (r"x_embedder\.proj\.weight", r"blocks\.\d+\.moe\..*")),
    ("dit", (r"x_embedder\.proj\.weight", r"blocks\.\d+\..*")),
    ("clip", (r"(text_model\.)?embeddings\.token_embedding\.weight", r"(text_model\.)?encoder\.layers\.0\..*")),
    ("sd_vae", (r"(encoder|decoder)\.conv_in\.weight", r"(encoder|decoder)\.mid_block\..*")),
    ("taesd", (r"(encoder|decoder)\.layers\.\d+\.weight", r"(encoder|decoder)\.layers\.\d+\.conv\.0\.weight")),
    ("taesd", (r"\d+\.weight", r"\d+\.conv\.0\.weight")),
    ("ours", (r"patch_embed/kernel", r"blocks/.*")),
    ("ours", (r"((encoder|decoder)/)?(stem|conv_in)/kernel", r".*/(conv0|conv1)/kernel")),
)


def recognise(names: Iterable[str], origin: str = "the checkpoint") -> str:
    """The layout that tensors of these names have.

    Raises:
        UserError: none fits; tells the first names that were seen and the layouts known.
    """
    names = list(names)
    for layout, patterns in _SIGNS:
        if all(any(re.fullmatch(pattern, name) for name in names) for pattern in patterns):
            return layout
    seen = f"{len(names)} tensors, first {', '.join(names[:4])}" if names else "no tensor"
    raise UserError(f"{origin} has no layout that is known ({seen}): known are {', '.join(LAYOUTS)}")


class Found(NamedTuple):
    """Where the tensors of one checkpoint are.

    Attributes:
        weights: files to open; the index stands for its shards. TAESD: encoder, then decoder.
        folder: the folder they are in; None for a bare file.
    """

    weights: tuple[Path, ...]
    folder: Path | None


def locate(path: str | Path, layout: str = "auto") -> Found:
    """The weight files of a checkpoint: a file, a folder of one or several shards, a diffusers or transformers folder,
    TAESD's pair of files, a model folder of ours, or a Stable Diffusion repository (its ``text_encoder`` or ``vae``).

    Raises:
        UserError: nothing there, or several things of which ``layout`` does not choose one.
    """
    path = Path(path)
    if layout not in ("auto", *LAYOUTS):
        raise UserError(f"unknown layout '{layout}'{did_you_mean(layout, ('auto', *LAYOUTS))}")
    if path.is_file():
        return _of_file(path)
    if not path.is_dir():
        raise UserError(f"{path} does not exist: give a checkpoint file or the folder of one")
    wanted = {
        "clip": ["text_encoder"],
        "sd_vae": ["vae"],
        "ours": ["model"],
        "auto": ["text_encoder", "vae", "model", "pytorch_model"],
    }
    below = [path / name for name in wanted.get(layout, []) if (path / name).is_dir() and _weights(path / name)]
    # a whole Stable Diffusion repository may have weights of its own beside its parts
    if below and (layout in ("clip", "sd_vae") or (path / "model_index.json").is_file() or not _weights(path)):
        if len(below) > 1:
            names = " and ".join(folder.name for folder in below)
            raise UserError(f"{path} holds {names}: choose with --layout clip or --layout sd_vae, or give the folder")
        return Found(_weights(below[0]), below[0])
    inside = _weights(path)
    if inside:
        return Found(inside, path)
    listed = sorted(file.name for file in path.iterdir())
    shown = f"{', '.join(listed[:5])}{', …' if len(listed) > 5 else ''}" if listed else "nothing"
    raise UserError(f"{path} holds no weights ({', '.join(SUFFIXES)}), only {shown}: give the folder that holds them")


def _of_file(path: Path) -> Found:
    for part, other in (("encoder", "decoder"), ("decoder", "encoder")):
        # half an autoencoder: its other half is beside it
        if path.suffix in SUFFIXES and _is_half(path.name, part):
            beside = path.with_name(path.stem.removesuffix(part) + other + path.suffix)
            if not beside.is_file():
                raise UserError(f"{path} is half an autoencoder and {beside.name} is not beside it: put it there")
            return Found((path, beside) if part == "encoder" else (beside, path), path.parent)
    if re.fullmatch(_REGISTERED, path.name):
        raise UserError(_not_read(path))
    if not path.name.endswith((*SUFFIXES, INDEX_END)):
        raise UserError(f"{path} is no checkpoint file: its name should end in {', '.join(SUFFIXES)} or {INDEX_END}")
    return Found((path,), None)


def left_aside(path: str | Path) -> list[str]:
    """A line for each file of a checkpoint folder that may hold weights and is never read."""
    files = sorted(Path(path).iterdir()) if Path(path).is_dir() else []
    return [_not_read(file) for file in files if re.fullmatch(_REGISTERED, file.name)]


def _not_read(file: Path) -> str:
    return (
        f"{file} is not read: it is a pickle of what was registered with Accelerate beside the model, often an average "
        "of the weights; to convert that, save its state dict (names and tensors) by torch.save as a .pt file"
    )


def _is_half(name: str, part: str) -> bool:
    return re.fullmatch(rf"(.*taesd.*)?{part}\.\w+", name) is not None


def _weights(folder: Path) -> tuple[Path, ...]:
    """The weight files right in a folder, () if there are none; its average, in whichever form, if it has one.

    Raises:
        UserError: several that are not parts of one checkpoint.
    """
    averages = _averages(folder)
    if len(averages) > 1:
        raise UserError(f"{folder} holds {len(averages)} averages ({', '.join(averages[:5])}): give the one file")
    if averages:
        return (folder / averages[0],)
    indexes = sorted(folder.glob(f"*{INDEX_END}"))
    if len(indexes) == 1:
        return tuple(indexes)
    for suffix in SUFFIXES:  # of a checkpoint in two forms the one that needs no torch comes first
        files = {file.name: file for file in sorted(folder.glob(f"*{suffix}")) if not file.name.startswith(".")}
        pairs = [name for name in files if _is_half(name, "encoder")]
        for name in pairs:
            other = name.removesuffix(f"encoder{suffix}") + f"decoder{suffix}"
            if other in files and len(files) == 2:
                return files[name], files[other]
        if len(files) == 1:
            return tuple(files.values())
        usual = [name for name in files if name in (f"model{suffix}", f"diffusion_pytorch_model{suffix}")]
        usual = usual or [name for name in files if name in (f"pytorch_model{suffix}", "mp_rank_00_model_states.pt")]
        if len(usual) == 1:
            return (files[usual[0]],)
        if files and all(re.fullmatch(r".*-\d+-of-\d+\.safetensors", name) for name in files):
            raise UserError(f"{folder} holds shards without their index (*{INDEX_END}): copy it there too")
        if files:
            raise UserError(f"{folder} holds {', '.join(list(files)[:5])}: give the one file that is meant")
    return ()


def _averages(folder: Path) -> list[str]:
    """Names of the files that hold a running average: each once, where it is there in several forms."""
    found: dict[str, str] = {}
    for suffix in (INDEX_END, *SUFFIXES):
        for file in sorted(folder.glob(f"*{suffix}")):
            stem = file.name.removesuffix(suffix)
            if re.search(r"(^|[_.-])ema([_.-]|$)", stem) and not re.search(r"^\.|-\d+-of-\d+$", stem):
                found.setdefault(stem, file.name)
    return list(found.values())
