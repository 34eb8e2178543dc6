"""Loading autoencoders: shipped weights that work, folders of every layout, and one-line errors for what is wrong."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from scaling_perception.data.sources.scenes import render_scene
from scaling_perception.models import tiny_vae, vae
from scaling_perception.models.autoencoders import (
    TINY_FOLDER,
    load_autoencoder,
    load_kl,
    load_part,
    make_tiny,
    part_size,
    save_part,
    tree_hash,
)
from scaling_perception.models.vae_tiles import VAELimits
from scaling_perception.support.errors import UserError
from scaling_perception.training.round_trip import round_trip_report

NARROW = tiny_vae.TinyVAEConfig(
    encoder_widths=(4, 4, 4), encoder_blocks=(1, 1, 1), decoder_widths=(4, 4, 4), decoder_blocks=(1, 1, 1), patch=2
)


def narrow_params(seed=0):
    keys = jax.random.split(jax.random.key(seed))
    parts = {part: tiny_vae.init_part(part, NARROW, keys[i]) for i, part in enumerate(("encoder", "decoder"))}
    # weights that float16 holds exactly, so that what is saved comes back bit for bit
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float16).astype(np.float32), parts)


@pytest.fixture
def folder(tmp_path):
    params = narrow_params()
    for part in ("encoder", "decoder"):
        save_part(tmp_path, part, NARROW, params[part], {"steps": 3})
    return tmp_path


@pytest.fixture(scope="module")
def shipped():
    return load_autoencoder("tiny")


def test_the_shipped_weights_carry_every_task_through_latents(shipped):
    """Held-out scenes (test split). These six give 26.5 dB, AbsRel 0.035, EPE 0.40 px, IoU 0.906 and 0.964; an
    untrained network gives 6.6 dB, 0.60, 26 px, 0.15 and 0.
    """
    report = round_trip_report(shipped, [render_scene(2_000_000_000 + index, 128) for index in range(6)])
    assert report["images"] == 6
    assert report["psnr"] > 25.5
    assert report["depth_abs_rel"] < 0.042
    assert report["flow_epe"] < 0.5
    assert report["mask_iou"] > 0.88
    assert report["visible_iou"] > 0.95


def test_the_shipped_latents_are_scaled_as_stable_diffusion_s(shipped):
    """Means and deviations of the target-free latents lie where TAESD's do (unit order, four distinct channels)."""
    images = np.stack([render_scene(2_000_000_000 + index, 64)["image"] for index in range(4)]) / 127.5 - 1
    mean, logvar = shipped.encode(shipped.params, images.astype(np.float32))
    assert logvar is None and mean.shape == (4, 8, 8, 4) and mean.dtype == np.float32
    assert (np.std(mean, axis=(0, 1, 2)) > 0.3).all() and (np.abs(mean) < 6).all()


def test_the_shipped_files_are_small_and_keep_no_folder_names():
    files = [TINY_FOLDER / f"{part}.safetensors" for part in ("encoder", "decoder")]
    assert sum(file.stat().st_size for file in files) < 3 * 2**20
    for file in files:
        header = file.read_bytes()[:20_000].decode("latin1")
        assert "/tmp" not in header and "/work" not in header and "teacher" in header


def test_the_latents_of_taesd_are_met(shipped, shared_dir):
    taesd = load_autoencoder(str(shared_dir / "data" / "weights" / "taesd_bf16"))
    images = np.stack([render_scene(2_000_000_000 + index, 128)["image"] for index in range(3)]) / 127.5 - 1
    ours = np.asarray(shipped.encode(shipped.params, images.astype(np.float32))[0])
    theirs = np.asarray(taesd.encode(taesd.params, images.astype(np.float32))[0])
    assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.87  # 0.89; the grain of the pictures is what differs


def test_what_is_saved_comes_back(folder):
    model = load_autoencoder(str(folder))
    expected = narrow_params()
    jax.tree.map(np.testing.assert_array_equal, model.params, expected)
    assert model.config == NARROW and model.factor == 8 and model.latent_channels == 4
    images = np.random.default_rng(0).uniform(-1, 1, (2, 16, 24, 3)).astype(np.float32)
    latents, _ = model.encode(model.params, images)
    assert latents.shape == (2, 2, 3, 4)
    np.testing.assert_array_equal(latents, tiny_vae.Encoder(NARROW).apply({"params": expected["encoder"]}, images))
    assert model.decode(model.params, latents).shape == images.shape


def test_the_id_names_the_encoder_alone(folder):
    first = load_autoencoder(str(folder))
    assert len(first.id) == 12 and first.id == tree_hash(narrow_params()["encoder"])
    save_part(folder, "decoder", NARROW, narrow_params(1)["decoder"], {})
    assert load_autoencoder(str(folder)).id == first.id  # latents made before stay valid
    save_part(folder, "encoder", NARROW, narrow_params(1)["encoder"], {})
    assert load_autoencoder(str(folder)).id != first.id


def test_every_published_layout_gives_the_same_network(tmp_path, golden):
    names = json.loads((golden / "tiny_ae" / "names.json").read_text())
    rng = np.random.default_rng(0)
    own, single = {}, {}
    for part, shift in (("encoder", 0), ("decoder", 1)):
        own[part] = {k: rng.normal(0, 0.05, s).astype(np.float32) for k, s in names[f"taesd_{part}"].items()}
        for name, value in own[part].items():
            position, rest = name.split(".", 1)
            single[f"{part}.layers.{int(position) - shift}.{rest}"] = value
        (tmp_path / "own").mkdir(exist_ok=True)
        save_file(own[part], tmp_path / "own" / f"taesd_{part}.safetensors")
    assert set(single) == set(names["diffusers"])
    (tmp_path / "single").mkdir()
    save_file(single, tmp_path / "single" / "diffusion_pytorch_model.safetensors")
    first, second = (load_autoencoder(str(tmp_path / layout)) for layout in ("own", "single"))
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)
    assert first.id == second.id and first.config == tiny_vae.TAESD


def test_wrong_names_and_missing_files_are_told_in_one_line(tmp_path, folder, monkeypatch):
    def message(name):
        with pytest.raises(UserError) as caught:
            load_autoencoder(str(name))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "neither 'tiny' nor a folder" in message("tinny")
    assert "neither 'tiny' nor a folder" in message(folder / "encoder.safetensors")
    (tmp_path / "empty").mkdir()
    assert "taesd_encoder.safetensors does not exist" in message(tmp_path / "empty")
    (folder / "decoder.safetensors").unlink()
    assert "decoder.safetensors does not exist" in message(folder)

    import huggingface_hub

    def offline(*args, **kwargs):
        raise OSError("no route to host\nand more lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    text = message("madebyollin/taesd")
    assert "could not be fetched" in text and "no route to host" in text


def test_a_hub_id_is_fetched(folder, monkeypatch):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: asked.append(name) or str(folder))
    assert load_autoencoder("somebody/small-vae").id == tree_hash(narrow_params()["encoder"])
    assert asked == ["somebody/small-vae"]


def test_damaged_files_are_named(folder):
    file = folder / "encoder.safetensors"
    whole = file.read_bytes()
    for length in (4, 100, len(whole) - 10):
        file.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"encoder\.safetensors is truncated"):
            load_autoencoder(str(folder))
    file.write_bytes(whole)
    state = load_file(file)
    shutil.copy(folder / "decoder.safetensors", file)
    with pytest.raises(UserError, match="is no encoder written by"):
        load_autoencoder(str(folder))
    metadata = {"format": "scaling-perception tiny autoencoder 1", "part": "encoder"}
    metadata["config"] = json.dumps(NARROW.to_dict())
    save_file(state | {"stem/bias": np.zeros(9, np.float16)}, file, metadata)
    with pytest.raises(UserError, match=r"'stem/bias' has shape \(9,\) but \(4,\) is expected"):
        load_autoencoder(str(folder))
    save_file({k: v for k, v in state.items() if k != "head/kernel"}, file, metadata)
    with pytest.raises(UserError, match="'head/kernel' is missing"):
        load_autoencoder(str(folder))
    save_file(state | {"extra": np.zeros(2, np.float16)}, file, metadata)
    with pytest.raises(UserError, match="'extra' does not belong"):
        load_part(folder, "encoder")


def test_halves_of_two_models_do_not_mix(folder):
    other = tiny_vae.TinyVAEConfig((4, 4, 4), (1, 1, 1), (4, 4, 6), (1, 1, 1), 2)
    save_part(folder, "decoder", other, tiny_vae.init_part("decoder", other, jax.random.key(0)), {})
    with pytest.raises(UserError, match="different models"):
        load_autoencoder(str(folder))


def test_sizes_that_do_not_fit_are_refused():
    model = make_tiny("narrow", NARROW, narrow_params())
    with pytest.raises(UserError, match="20x16 is no multiple of 8"):
        model.encode(model.params, np.zeros((1, 16, 20, 3), np.float32))


FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def reference(golden):
    """(config.json, tensors, recorded arrays) of a small AutoencoderKL."""
    file = golden / "vae" / "small_32x32.safetensors"
    with safe_open(file, "np") as handle:
        fields = {"_class_name": "AutoencoderKL", **json.loads(handle.metadata()["config"])}
    arrays = load_file(file)
    state = {k.removeprefix("weights/"): v for k, v in arrays.items() if k.startswith("weights/")}
    return fields, state, {k: np.moveaxis(v, 1, -1) for k, v in arrays.items() if not k.startswith("weights/")}


def write_kl(folder, reference, name=FILE, change=None, drop=""):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(reference[0]))
    state = {k: v for k, v in (reference[1] | (change or {})).items() if k != drop}
    save_file(state, folder / name)
    return folder


@pytest.fixture(scope="module")
def kl(reference, tmp_path_factory):
    return load_autoencoder(str(write_kl(tmp_path_factory.mktemp("kl") / "published", reference)))


def test_stable_diffusion_s_autoencoder_behind_the_same_interface(kl, reference):
    arrays = reference[2]
    assert kl.factor == 8 and kl.latent_channels == 4 and isinstance(kl.config, vae.VAEConfig)
    assert kl.id == tree_hash(kl.params["encoder"]) and "quant_conv" in kl.params["encoder"]
    mean, logvar = jax.jit(kl.encode)(kl.params, arrays["in/image"])
    np.testing.assert_allclose(mean, arrays["out/latent_mode_scaled"], atol=1e-5)
    np.testing.assert_allclose(np.exp(0.5 * logvar), 0.18215 * arrays["out/std"], rtol=1e-5)
    decode = jax.jit(kl.decode)
    np.testing.assert_allclose(decode(kl.params, mean), arrays["out/roundtrip_scaled"], atol=2e-5)
    np.testing.assert_allclose(decode(kl.params, 0.18215 * arrays["in/z"]), arrays["out/decode_of_z"], atol=2e-5)
    with pytest.raises(UserError, match="20x16 is no multiple of 8"):
        kl.encode(kl.params, np.zeros((1, 16, 20, 3), np.float32))


OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}  # of the attention, before 0.17


@pytest.mark.parametrize("names", ["new", "old"])
def test_published_folders_of_both_generations(names, kl, reference, golden, tmp_path):
    fields = json.loads((golden / "checkpoints" / f"vae_{names}_names" / "config.json").read_text())
    state = dict(reference[1])
    if names == "old":
        for now, before in OLD_NAMES.items():
            state = {name.replace(f".{now}.", f".{before}."): value for name, value in state.items()}
        assert len(set(state) - set(reference[1])) == 16
    model = load_autoencoder(str(write_kl(tmp_path / "published", (fields, state))))
    jax.tree.map(np.testing.assert_array_equal, model.params, kl.params)
    assert model.id == kl.id and model.config == kl.config


def test_where_an_autoencoder_may_lie(kl, reference, tmp_path):
    for folder, name in (("repository/vae", FILE), ("half", "diffusion_pytorch_model.fp16.safetensors")):
        write_kl(tmp_path / folder, reference, name)
    model = load_autoencoder(str(tmp_path / "repository"))
    assert model.id == kl.id and model.name == str(tmp_path / "repository")
    assert load_autoencoder(str(tmp_path / "half")).id == kl.id
    save_file(reference[1] | {"quant_conv.bias": np.ones(8, np.float32)}, tmp_path / "half" / FILE)
    assert load_autoencoder(str(tmp_path / "half")).id != kl.id  # the plain file goes first, and quant_conv counts
    config, params = load_kl(tmp_path / "repository")
    assert config == kl.config and tree_hash(params) == tree_hash(kl.params)


def test_limits_and_type_of_the_computation_are_the_caller_s(kl, reference, tmp_path):
    folder = str(write_kl(tmp_path / "kl", reference))
    z = np.tile(0.18215 * reference[2]["in/z"], (2, 1, 2, 1))
    rows = (  # and what the network's first convolution makes at once
        ({}, "f32[2,4,8,32]"),  # both fit in 64 x 64
        ({"limits": VAELimits(decode_pixels=32)}, "f32[1,4,8,32]"),
        ({"limits": VAELimits(tile=4, overlap=2)}, "f32[2,4,4,32]"),
        ({"dtype": "bfloat16"}, "bf16[2,4,8,32]"),
    )
    for options, made in rows:
        model = load_autoencoder(folder, **options)
        traced = jax.make_jaxpr(model.decode)(model.params, z)
        assert made in str(traced), options
        assert ("f32[2,4,8,32]" in str(traced)) == ("limits" not in options)
        assert traced.out_avals[0].shape == (2, 32, 64, 3) and traced.out_avals[0].dtype == np.float32


def test_sizes_of_either_family(shipped, kl):
    assert part_size(kl, "encoder", 32, 32) == (
        sum(leaf.size for leaf in jax.tree.leaves(kl.params["encoder"])),
        vae.macs("encoder", kl.config, 32, 32),
    )
    assert part_size(shipped, "decoder", 64, 64)[1] == tiny_vae.macs("decoder", shipped.config, 64, 64)


def test_damaged_and_foreign_autoencoders_are_told_in_one_line(reference, tmp_path):
    def message(folder):
        with pytest.raises(UserError) as caught:
            load_autoencoder(str(folder))
        assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
        return str(caught.value)

    query = "encoder.mid_block.attentions.0.to_q.weight"
    whole = write_kl(tmp_path / "kl", reference)
    data = (whole / FILE).read_bytes()
    (whole / FILE).write_bytes(data[:-1000])
    assert f"{FILE} is truncated" in message(whole)
    assert f"'{query}' (32, 32) is missing" in message(write_kl(tmp_path / "less", reference, drop=query))
    assert "'decoder.more' has no place" in message(
        write_kl(tmp_path / "m", reference, change={"decoder.more": np.eye(2)})
    )
    assert "has shape (32, 31)" in message(write_kl(tmp_path / "shape", reference, change={query: np.zeros((32, 31))}))

    (whole / FILE).write_bytes(data)
    described = whole / "config.json"
    for text, expected in (
        ("[1]", "config.json is no description"),
        ("{", "config.json is not valid JSON"),
        ('{"_class_name": "VQModel"}', "_class_name is 'VQModel'"),
        (json.dumps({**reference[0], "act_fn": "relu"}), "act_fn is 'relu'"),
        (json.dumps({**reference[0], "layers_per_block": 2}), "resnets.1"),
        (json.dumps({**reference[0], "_class_name": "AutoencoderTiny"}), "give a whole TAESD encoder file"),
    ):
        described.write_text(text)
        assert expected in message(whole)
    described.unlink()  # then the sizes are Stable Diffusion's
    assert "has shape" in message(whole) and "(128," in message(whole)

    pickled = tmp_path / "pickled"
    for name in ("diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model.bin"):
        (pickled / name).parent.mkdir(parents=True, exist_ok=True)
        (pickled / name).touch()
        assert "pickled checkpoint" in message(pickled) and "convert it to" in message(pickled)
        (pickled / name).unlink()


def test_a_hub_id_may_be_a_whole_model_in_half_precision(reference, kl, tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def fetch(name, allow_patterns, **_):
        asked.append(allow_patterns)
        if "vae/diffusion_pytorch_model.fp16.safetensors" in allow_patterns and name == "somebody/half":
            write_kl(tmp_path / "vae", reference, "diffusion_pytorch_model.fp16.safetensors")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    with pytest.raises(UserError, match="somebody/pickled' on the hub has no safetensors file"):
        load_autoencoder("somebody/pickled")
    assert "vae/config.json" in asked[0] and f"vae/{FILE}" in asked[0]
    assert load_autoencoder("somebody/half").id == kl.id
