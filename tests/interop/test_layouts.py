"""Layouts are told by names alone; folders and files of every published form are found."""

import dataclasses

import pytest

from scaling_perception.interop import hf_clip
from scaling_perception.interop.layouts import LAYOUTS, Found, left_aside, locate, recognise
from scaling_perception.interop.safetensors_io import flatten_tree
from scaling_perception.interop.torch_dit import leaf_pieces
from scaling_perception.models import tiny_vae, vae, vae_torch
from scaling_perception.models.clip_text import CLIPTextConfig
from scaling_perception.models.dit import abstract_params
from scaling_perception.models.presets import get_preset
from scaling_perception.support.errors import UserError

KL = vae.VAEConfig((16, 16), 1, norm_num_groups=8)


def dit_names(preset, attention="auto", **changes):
    plans = leaf_pieces(get_preset(preset, depth=2, dim=32, heads=2, **changes), attention)
    return [piece.tensor for plan in plans.values() for piece in plan.pieces]


def kl_names(age):
    tables = [vae_torch.torch_names(part, KL) for part in vae.PARTS]
    return [names[min(age, len(names) - 1)] for table in tables for names in table.values()]


def tiny_names():
    return [name for part in ("encoder", "decoder") for name in tiny_vae.part_shapes(part, tiny_vae.SMALL)]


CLIP = [name for names in hf_clip.torch_names(CLIPTextConfig(layers=2)).values() for name in names]

NAMES = [
    ("dit", dit_names("XL/2")),
    ("dit_moe", dit_names("S/2-8E2A")),
    ("dit_moe", dit_names("S/2-8E2A", qk_norm=True)),
    ("generalist", dit_names("XL-8E2A")),
    ("generalist", dit_names("XL-generalist")),
    ("sd_vae", kl_names(0)),
    ("sd_vae", kl_names(1)),
    ("taesd", list(tiny_vae.torch_names("encoder", tiny_vae.TAESD).values())),
    ("taesd", list(tiny_vae.torch_names("decoder", tiny_vae.TAESD).values())),
    ("taesd", [f"decoder.layers.{name}" for name in tiny_vae.torch_names("decoder", tiny_vae.TAESD).values()]),
    ("clip", CLIP),
    ("clip", [name.removeprefix("text_model.") for name in CLIP]),
    ("clip", [*CLIP, "vision_model.embeddings.class_embedding", "logit_scale"]),
    ("ours", list(flatten_tree(abstract_params(get_preset("nano"))))),
    ("ours", list(flatten_tree(abstract_params(dataclasses.replace(get_preset("nano"), experts=4))))),
    ("ours", tiny_names()),
    ("ours", [f"encoder/{name}" for name in tiny_names()]),
]


@pytest.mark.parametrize(("layout", "names"), NAMES)
def test_every_layout_is_told_by_its_names_in_any_order(layout, names):
    assert layout in LAYOUTS
    assert recognise(names) == layout == recognise(names[::-1])


def test_what_fits_nothing_is_shown():
    names = ["model.diffusion_model.time_embed.0.weight", "b", "c", "d", "e"]
    with pytest.raises(UserError, match=r"x.pt .*5 tensors, first model.diffusion_model.*, b, c, d\): known are dit,"):
        recognise(names, "x.pt")
    with pytest.raises(UserError, match="no tensor"):
        recognise([])


def make(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (["DiT.pt"], ["DiT.pt"]),
        (["config.json", "model.safetensors", "README.md"], ["model.safetensors"]),
        (["pytorch_model.bin", "model.safetensors"], ["model.safetensors"]),
        (["diffusion_pytorch_model.bin", "config.json"], ["diffusion_pytorch_model.bin"]),
        (["model.safetensors", "model.fp16.safetensors"], ["model.safetensors"]),
        (["model.safetensors", "ema.safetensors"], ["ema.safetensors"]),
        (["model.safetensors", "model_ema.pt"], ["model_ema.pt"]),
        (["unet-ema.bin", "unet-ema.safetensors", "unet.bin"], ["unet-ema.safetensors"]),
        (["model.safetensors.index.json", "model.ema.ckpt", "model.ckpt"], ["model.ema.ckpt"]),
        (["schema.pt"], ["schema.pt"]),
        (["pytorch_model.bin", "optimizer.bin", "scheduler.bin", "custom_checkpoint_0.pkl"], ["pytorch_model.bin"]),
        (["model-00001-of-00002.safetensors", "model.safetensors.index.json"], ["model.safetensors.index.json"]),
        (
            ["taesd_decoder.safetensors", "taesd_encoder.safetensors"],
            ["taesd_encoder.safetensors", "taesd_decoder.safetensors"],
        ),
        (["decoder.safetensors", "encoder.safetensors"], ["encoder.safetensors", "decoder.safetensors"]),
        (["taesd_decoder.pth", "taesd_encoder.pth"], ["taesd_encoder.pth", "taesd_decoder.pth"]),
        (["text_encoder/model.safetensors", "tokenizer/vocab.json"], ["text_encoder/model.safetensors"]),
        (["model/config.json", "model/model.safetensors", "checkpoints/1"], ["model/model.safetensors"]),
        (["vae/diffusion_pytorch_model.safetensors"], ["vae/diffusion_pytorch_model.safetensors"]),
    ],
)
def test_weights_of_a_folder(tmp_path, files, found):
    make(tmp_path, *files)
    assert [str(path.relative_to(tmp_path)) for path in locate(tmp_path).weights] == found


def test_several_averages_need_a_choice_and_what_is_pickled_is_not_read(tmp_path):
    make(tmp_path, "model.pt", "ema_0.999.pt", "ema_0.9999.pt")
    with pytest.raises(UserError, match=r"holds 2 averages \(ema_0.999.pt, ema_0.9999.pt\): give the one file"):
        locate(tmp_path)
    make(tmp_path / "saved", "model.safetensors", "random_states_0.pkl", "custom_checkpoint_1.pkl")
    (line,) = left_aside(tmp_path / "saved")
    assert line.startswith(f"{tmp_path / 'saved' / 'custom_checkpoint_1.pkl'} is not read: ") and "Accelerate" in line
    with pytest.raises(UserError) as told:
        locate(tmp_path / "saved" / "custom_checkpoint_1.pkl")
    assert str(told.value) == line
    assert left_aside(tmp_path) == left_aside(tmp_path / "model.pt") == left_aside(tmp_path / "none") == []


def test_a_whole_repository_needs_a_choice(tmp_path):
    make(tmp_path, "model_index.json", "v1-5.safetensors", "vae/model.safetensors", "text_encoder/model.safetensors")
    with pytest.raises(UserError, match="holds text_encoder and vae: choose with --layout"):
        locate(tmp_path)
    assert locate(tmp_path, "clip").folder == tmp_path / "text_encoder"
    assert locate(tmp_path, "sd_vae").folder == tmp_path / "vae"


def test_either_half_of_an_autoencoder_finds_the_other(tmp_path):
    make(tmp_path, "taesd_encoder.safetensors", "taesd_decoder.safetensors", "lone_taesd_encoder.pth")
    pair = (tmp_path / "taesd_encoder.safetensors", tmp_path / "taesd_decoder.safetensors")
    assert locate(pair[0]) == locate(pair[1]) == Found(pair, tmp_path)
    with pytest.raises(UserError, match="half an autoencoder and lone_taesd_decoder.pth is not beside it"):
        locate(tmp_path / "lone_taesd_encoder.pth")


def test_what_cannot_be_found_is_told(tmp_path):
    make(tmp_path, "a/x.safetensors", "a/y.safetensors", "b/readme.txt", "c/model-00001-of-00002.safetensors", "n.txt")
    make(tmp_path, "c/model-00002-of-00002.safetensors")
    cases = [
        (tmp_path / "none", "auto", "does not exist"),
        (tmp_path / "n.txt", "auto", "no checkpoint file: its name should end in .safetensors, .pt"),
        (tmp_path / "a", "auto", "holds x.safetensors, y.safetensors: give the one file"),
        (tmp_path / "b", "auto", "holds no weights .*only readme.txt"),
        (tmp_path / "c", "auto", "shards without their index"),
        (tmp_path / "b", "dti", "unknown layout 'dti'; did you mean 'dit'"),
    ]
    for path, layout, words in cases:
        with pytest.raises(UserError, match=words) as told:
            locate(path, layout)
        assert "\n" not in str(told.value)
