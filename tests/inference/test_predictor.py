"""The predictor: members and images do not depend on their company, nothing compiles in vain, refusals are clear."""

import dataclasses
import json
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from scaling_perception.cli import main
from scaling_perception.diffusion.sampler import ddim_sample, sampler_tables
from scaling_perception.inference.batches import BatchPlan
from scaling_perception.inference.draws import image_id
from scaling_perception.inference.predictor import Predictor
from scaling_perception.interop.model_folder import save_model
from scaling_perception.interop.released import RELEASED, describe
from scaling_perception.interop.safetensors_io import save_tree
from scaling_perception.interop.torch_dit import dit_to_torch
from scaling_perception.models.autoencoders import save_part
from scaling_perception.models.config import config_from_dict
from scaling_perception.models.dit import DiT
from scaling_perception.support.errors import UserError
from scaling_perception.tasks import get_task

# Padded to four rows, so that the whole module needs few graphs.
FAST = {"steps": 2, "batch_size": 4}

pytest_plugins = ("nano",)


def test_member_is_the_same_in_any_ensemble(predictor, make_image):
    image = make_image()
    four = predictor(image, ensemble=4, **FAST).members
    two = predictor(image, ensemble=2, **FAST).members
    seven = predictor(image, ensemble=7, **FAST).members  # two batches of four
    assert four.shape == (4, 40, 56) and seven.shape == (7, 40, 56)
    assert np.abs(four[0] - four[1]).max() > 1e-3, "members must differ"
    np.testing.assert_allclose(two, four[:2], atol=2e-5)
    np.testing.assert_allclose(seven[:4], four, atol=2e-5)


def test_image_is_the_same_alone_in_a_batch_and_in_any_order(predictor, make_image):
    images = [make_image(40, 56, 0), make_image(40, 56, 1), make_image(24, 30, 2)]
    alone = [predictor(image, ensemble=2, **FAST) for image in images]
    batch = predictor(images, ensemble=2, **FAST)
    turned = predictor(images[::-1], ensemble=2, **FAST)
    assert len(batch) == 3 and isinstance(batch.prediction, list)  # sizes differ
    assert batch[2].prediction.shape == (24, 30)
    for i, one in enumerate(alone):
        np.testing.assert_allclose(batch.prediction[i], one.prediction, atol=2e-5)
        np.testing.assert_allclose(turned.prediction[2 - i], one.prediction, atol=2e-5)
        np.testing.assert_allclose(batch[i].uncertainty, one.uncertainty, atol=2e-5)
    stacked = predictor(np.stack(images[:2]), ensemble=2, **FAST)
    assert stacked.prediction.shape == (2, 40, 56) and stacked.members.shape == (2, 2, 40, 56)
    np.testing.assert_allclose(stacked.prediction[1], alone[1].prediction, atol=2e-5)


def test_key_and_image_decide_the_noise(predictor, make_image):
    image = make_image()
    first = predictor(image, ensemble=4, key=0, **FAST)
    again = predictor(image, ensemble=4, key=0, **FAST)
    other = predictor(image, ensemble=4, key=1, **FAST)
    np.testing.assert_array_equal(first.prediction, again.prediction)
    assert np.abs(first.members - other.members).max() > 1e-3
    raws = [{"image": make_image(seed=s)} for s in (0, 1, 0)]
    assert image_id(raws[0]) == image_id(raws[2]) != image_id(raws[1])


def test_only_shapes_and_step_counts_compile(make_predictor, make_image):
    predictor = make_predictor(seed=3)
    first = predictor(make_image(), ensemble=2, steps=2, batch_size=2).prediction
    assert predictor.traces == {"encode": 1, "sample": 1}
    predictor(make_image(64, 20, 5), ensemble=2, steps=2, key=9, batch_size=2)
    predictor([make_image(seed=s) for s in range(3)], ensemble=2, steps=2, preset="paper", batch_size=2)
    predictor(make_image(), task="amodal", prompt=np.ones((40, 56), bool), ensemble=2, steps=2, batch_size=2)
    predictor.params = {**predictor.params, "label_embed": predictor.params["label_embed"] * -1}
    changed = predictor(make_image(), ensemble=2, steps=2, batch_size=2).prediction
    assert predictor.traces == {"encode": 1, "sample": 1}, "keys, images, presets, tasks and weights are arguments"
    assert np.abs(changed - first).max() > 1e-3, "new weights must be used"
    predictor(make_image(), ensemble=2, steps=3, batch_size=2)
    assert predictor.traces == {"encode": 1, "sample": 2}


def test_passes_of_flow_share_their_noise(make_predictor, make_image):
    """With both label rows and both patch embeddings equal, u and v can differ only by their noise."""
    predictor = make_predictor()
    params = {**predictor.params, "label_embed": predictor.params["label_embed"] * 0}
    embed = params["patch_embed"]
    params["patch_embed"] = {name: embed[name][:1].repeat(4, axis=0) for name in embed}
    image = make_image()
    differing = predictor(image, task="flow", prompt=make_image(seed=4), ensemble=1, **FAST)
    assert np.abs(differing.prediction[..., 0] - differing.prediction[..., 1]).max() > 1e-3
    predictor.params = params
    flow = predictor(image, task="flow", prompt=make_image(seed=4), ensemble=1, **FAST)
    assert flow.prediction.shape == (40, 56, 2)
    np.testing.assert_allclose(flow.prediction[..., 0], flow.prediction[..., 1], atol=1e-4)


def test_prompt_matters(predictor, make_image):
    image = make_image()
    left, right = np.zeros((2, 40, 56), bool)
    left[:, :28] = right[:, 28:] = True
    one = predictor(image, task="amodal", prompt=left, ensemble=1, **FAST)
    two = predictor(image, task="amodal", prompt=Image.fromarray(right), ensemble=1, **FAST)
    assert one.prediction.dtype == bool and one.prediction.shape == (40, 56)
    assert one.whole.shape == (40, 56, 3) and one.members.shape == (1, 40, 56, 3)
    assert np.abs(one.whole - two.whole).max() > 1e-3
    assert not one.uncertainty.any()


def test_latent_norm_is_undone(make_predictor, make_image):
    """Scale 0 and a shift leave the decoder one constant latent, whatever the network says."""
    norm = {"shift": [[0.1, 0.2, 0.3, 0.4]] * 4, "scale": [[0.0] * 4] * 4}
    predictor = make_predictor(latent_norm=norm)
    raws = predictor.raw_inputs([make_image()], "depth")
    plan = predictor.plan("depth", 2, 1, 4)
    tables = sampler_tables(predictor.diffusion, 2)
    pixels = predictor.sample(predictor.encode(raws, "depth", plan), raws, "depth", 2, tables, 0, plan)
    latent = np.broadcast_to(np.float32(norm["shift"][0]), (1, 4, 4, 4))
    expected = predictor.autoencoder.decode(predictor.autoencoder.params, latent)
    np.testing.assert_allclose(pixels[0, 0], np.repeat(expected, 2, axis=0), atol=1e-5)


@pytest.mark.parametrize("task", ["depth", "flow"])
def test_sampling_equals_the_plain_loop_over_whole_inputs(make_predictor, make_image, task):
    """What is computed ahead of the scan changes nothing: the whole network on [image, prompt, noisy] each time."""
    predictor = make_predictor(latent_norm={"shift": [[0.5] * 4] * 4, "scale": [[2.0] * 4] * 4})
    raws = predictor.raw_inputs([make_image()], task, None if task == "depth" else [make_image(seed=4)])
    plan, key = BatchPlan(1, 2), jax.random.key(3)
    tables = sampler_tables(predictor.diffusion, 2)
    latents = predictor.encode(raws, task, plan)
    conditions = get_task(task).conditions(raws[0], predictor.resolution, predictor.options)
    vae, size = predictor.autoencoder, predictor.config.input_size
    shown = np.stack([conditions["image"], conditions["prompt"]])
    encoded = np.concatenate(list(vae.encode(vae.params, shown)[0]), axis=-1)
    np.testing.assert_allclose(latents[0], encoded, atol=1e-5)
    found = predictor.sample(latents, raws, task, 2, tables, key, plan)[0]
    model = DiT(predictor.config)
    for member in range(2):
        own = jax.random.fold_in(jax.random.fold_in(key, image_id(raws[0])), member)
        noise = jax.random.normal(own, (1, size, size, 4))
        for number, index in enumerate(one.id for one in get_task(task).passes):

            def denoise(x, t, label=index):
                whole = jnp.concatenate([encoded[None], x], axis=-1)
                return model.apply({"params": predictor.params}, whole, t[None], jnp.asarray([label]))

            pixels = vae.decode(vae.params, ddim_sample(denoise, tables, noise) * 2.0 + 0.5)
            np.testing.assert_allclose(found[number, member], pixels[0], atol=2e-4)


@pytest.mark.parametrize("kind", ["grey", "rgba", "sixteen", "float", "pil", "pil16", "path"])
def test_every_kind_of_picture(predictor, make_image, tmp_path, kind):
    image = make_image()
    grey = image[..., :1].repeat(3, axis=-1)
    alpha = np.full((40, 56, 1), 255, np.uint8)
    Image.fromarray(image).save(tmp_path / "a.png")
    given, same = {
        "grey": (grey[..., 0], grey),
        "rgba": (np.concatenate([image, alpha], axis=-1), image),
        "sixteen": (image.astype(np.uint16) * 256 + 7, image),
        "float": (image / np.float32(255), image),
        "pil": (Image.fromarray(np.concatenate([image, alpha], axis=-1), "RGBA"), image),
        "pil16": (Image.fromarray(grey[..., 0].astype(np.uint16) * 256), grey),
        "path": (tmp_path / "a.png", image),
    }[kind]
    found, expected = (predictor.raw_inputs([one], "depth")[0]["image"] for one in (given, same))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("kind", ["array", "path"])
def test_frames_of_16_bits_lose_as_many_bits(predictor, tmp_path, kind):
    dark, bright = np.full((40, 56), 4000, np.uint16), np.full((40, 56), 4000, np.uint16)
    bright[:8] = 4200  # beyond 12 bits
    frames: list[Any] = [dark, bright]
    if kind == "path":
        for name, frame in zip(("a.png", "b.png"), frames, strict=True):
            Image.fromarray(frame).save(tmp_path / name)
        frames = [tmp_path / "a.png", tmp_path / "b.png"]
    field = get_task("flow").prompt.field
    for first, second in (frames, frames[::-1], [frames[1], np.zeros((40, 56), np.uint8)]):
        (raw,) = predictor.raw_inputs([first], "flow", [second])
        rest = {name: set(raw[name][8:].ravel()) for name in ("image", field)}
        assert rest["image"] == {4000 >> 6} and rest[field] in ({4000 >> 6}, {0})
    assert set(predictor.raw_inputs([dark], "depth")[0]["image"].ravel()) == {4000 >> 4}, "one alone has its own"


def test_transparent_is_white(predictor, make_image):
    image = np.concatenate([make_image(), np.zeros((40, 56, 1), np.uint8)], axis=-1)
    assert (predictor.raw_inputs([image], "depth")[0]["image"] == 255).all()


def test_orientation_of_photographs(predictor, make_image, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera turned
    Image.fromarray(make_image()).save(tmp_path / "a.png", exif=exif)
    from_path = predictor.raw_inputs([tmp_path / "a.png"], "depth")[0]["image"]
    from_pil = predictor.raw_inputs([Image.open(tmp_path / "a.png")], "depth")[0]["image"]
    assert from_path.shape == (56, 40, 3)
    np.testing.assert_array_equal(from_path, from_pil)


WRONG_KEYS = (-1, 2**32, 1.5, "0", None, True, np.zeros(2), jax.random.split(jax.random.key(0)))
WRONG_KINDS = (
    *(("antithetic", value) for value in ("no", 1, None)),
    *((name, value) for name in ("steps", "ensemble") for value in (1.5, 2.0, "2", None, True)),
    *((name, value) for name in ("tolerance", "eta", "clip") for value in ("x", float("nan"), False, [1])),
    *(("solver", value) for value in (3, None)),
    ("ensemble", 10_001),
    ("batch_size", 1.5),
    ("batch_size", "4"),
)


@pytest.fixture
def undeclared(pytestconfig):
    """Values of types that signatures do not declare."""
    if pytestconfig.getoption("--shapes"):
        pytest.skip("signatures are checked at every call")


def test_values_of_another_type_are_refused(predictor, make_image, undeclared):
    for name, value in [*(("key", key) for key in WRONG_KEYS), *WRONG_KINDS]:
        with pytest.raises(UserError, match=f"^{name} .*: give"):
            predictor(make_image(), **{name: value})


def test_numbers_of_numpy_and_batches_of_jax_are_taken(predictor, make_image, undeclared):
    images = [make_image(seed=0), make_image(seed=1)]
    one = predictor(
        images, key=np.uint32(0), steps=np.int64(2), ensemble=np.int32(1), eta=np.float32(0), antithetic=np.bool_(False)
    )
    other = predictor(jnp.stack(images), steps=2, ensemble=1, key=jax.random.key(0))
    np.testing.assert_array_equal(one.prediction, other.prediction)


def test_refusals(predictor, make_predictor, make_image, tmp_path):
    image, mask = make_image(), np.ones((40, 56), bool)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nrubbish")
    cases = [
        (lambda: predictor(image, task="dept"), "did you mean 'depth'"),
        (lambda: predictor(image, preset="fixd"), "did you mean 'fixed'"),
        (lambda: predictor(image, cache_interval=3), "cache_interval goes with cache: give that too"),
        (lambda: predictor(image, cache="none", cache_interval=3), "cache_interval has no effect with cache none"),
        (lambda: predictor.intermediates(image, first=3), "first goes with tolerance"),
        (lambda: predictor(image, spacing="trailng"), "did you mean 'trailing'"),
        (lambda: predictor(image, reduce="lsqq"), "did you mean 'lsq'"),
        (lambda: predictor(image, task="flow", prompt=image, reduce="lsq"), "merge flow members"),
        (lambda: predictor(image, steps=0), "0 sampling steps"),
        (lambda: predictor(image, ensemble=0), "ensemble 0"),
        (lambda: predictor(image, batch_size=0), "batch_size 0"),
        (lambda: predictor([]), "no image was given"),
        (lambda: predictor(image, task="flow"), "flow needs a prompt"),
        (lambda: predictor([image, image], task="amodal", prompt=[mask]), "got 1 for 2"),
        (lambda: predictor(image, prompt=mask), "depth takes no prompt"),
        (lambda: predictor(image, task="amodal", prompt=mask[:20]), "visible_mask is 56x20 but image is 56x40"),
        (lambda: predictor(image[None, None]), "image array has shape"),
        (lambda: predictor(image.astype(np.float32)), "floats must be in"),
        (lambda: predictor(image.astype(np.float32) * np.nan), "floats must be in"),
        (lambda: predictor(image.astype(np.int64)), "type int64"),
        (lambda: predictor(tmp_path / "none.png"), "none.png does not exist"),
        (lambda: predictor(tmp_path / "broken.png"), "broken.png"),
        (lambda: make_predictor(tasks=["depth"])(image, task="flow", prompt=image), "does not know flow"),
        (lambda: make_predictor(resolution=64), "does not fit"),
    ]
    for call, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_presets_choose_the_grid_and_keep_the_schedule(predictor, make_predictor):
    own = predictor.choose_diffusion()
    assert (own.schedule, own.prediction, own.spacing) == ("cosine", "v", "trailing")
    paper = predictor.choose_diffusion("paper")
    assert (paper.schedule, paper.prediction, paper.spacing) == ("cosine", "v", "leading")
    with pytest.warns(UserWarning, match="scaled_linear schedule; this model was trained on cosine"):
        released = predictor.choose_diffusion("released")
    assert (released.schedule, released.spacing, released.steps_offset) == ("cosine", "leading", 1)
    assert not released.final_alpha_one
    noise = make_predictor(diffusion={"schedule": "cosine", "prediction": "epsilon", "spacing": "leading"})
    with pytest.warns(UserWarning, match="multiplied by up to 20"):
        noise.choose_diffusion("fixed")


def test_batches_are_bounded_and_tight(predictor):
    assert predictor.plan("depth", 5, 1) == (1, 5)
    assert predictor.plan("depth", 5, 100, batch_size=32) == (6, 5)
    assert predictor.plan("depth", 50, 100, batch_size=32) == (1, 25)  # two batches of 25, none padded
    images, members = predictor.plan("flow", 3, 10**6)
    assert 0 < images * members * 2 * predictor.resolution**2 <= 2**22


def test_specialist_uses_the_null_label_and_no_prompt(make_predictor, make_image):
    model = {"num_classes": 3, "task_labels": 0, "routed": False, "cond_channels": 4, "learn_sigma": True}
    one = make_predictor(model=model, tasks=["depth"], latent_norm={"shift": [[0.0] * 4], "scale": [[1.0] * 4]})
    first = one(make_image(), ensemble=1, **FAST).members
    table = one.params["label_embed"]
    one.params = {**one.params, "label_embed": table.at[:3].set(9.0)}
    np.testing.assert_array_equal(one(make_image(), ensemble=1, **FAST).members, first)
    one.params = {**one.params, "label_embed": table.at[3].set(9.0)}
    assert np.abs(one(make_image(), ensemble=1, **FAST).members - first).max() > 1e-4


def test_broken_weights_are_no_result(make_predictor, make_image):
    predictor = make_predictor()
    predictor.params = {**predictor.params, "label_embed": predictor.params["label_embed"] * np.nan}
    with pytest.raises(UserError, match="NaN or infinite"):
        predictor(make_image(), ensemble=1, **FAST)


def test_macs_count_passes_steps_and_members(make_predictor, make_image):
    import scaling_perception as sp
    from scaling_perception.models.compute import forward_macs

    assert sp.Predictor is Predictor
    predictor = make_predictor()
    one = forward_macs(predictor.config)
    assert predictor.macs("depth", 2, 4) == 8 * one and predictor.macs("flow", 2, 4) == 16 * one
    both = predictor([make_image(), make_image(seed=1)], ensemble=2, **FAST)
    assert both.macs.tolist() == [4.0 * one] * 2
    twice = predictor(make_image(), steps=2, ensemble=2, solver="heun")  # two evaluations, and one in the last step
    assert twice.forwards == 6 and twice.macs == 6.0 * one
    first, last = predictor.intermediates(make_image(), at=(0, -1), steps=2, ensemble=2, solver="heun")
    assert (first.forwards, last.forwards) == (2, 6)
    np.testing.assert_allclose(last.prediction, twice.prediction, atol=1e-5)
    with pytest.raises(UserError, match="step_tolerance goes with solvers without noise: eta 0, and not ddpm"):
        predictor(make_image(), steps=2, solver="ancestral", step_tolerance=0.1)  # ddpm by its other name
    with pytest.raises(UserError, match="step_tolerance goes with one evaluation a step"):
        predictor(make_image(), steps=2, solver="heun", step_tolerance=0.1)


def test_from_pretrained_finds_folders_runs_and_names(predictor, make_image, tmp_path, monkeypatch):
    for part in ("encoder", "decoder"):
        save_part(tmp_path / "vae", part, predictor.autoencoder.config, predictor.autoencoder.params[part], {})
    meta = {**predictor.meta, "autoencoder": str(tmp_path / "vae")}
    save_model(tmp_path / "run" / "model", predictor.params, meta)
    loaded = Predictor.from_pretrained(str(tmp_path / "run"))
    assert loaded.id == predictor.id
    given = predictor(make_image(), ensemble=2, **FAST).prediction
    found = loaded(make_image(), ensemble=2, **FAST).prediction
    np.testing.assert_allclose(found, given, atol=0.02)  # the autoencoder was stored in float16
    monkeypatch.setattr("scaling_perception.interop.find.SHIPPED", tmp_path / "run")
    assert Predictor.from_pretrained("model").id == predictor.id
    with pytest.raises(UserError, match="did you mean 'model'"):
        Predictor.from_pretrained("modle")
    (tmp_path / "half" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="no model/ yet"):
        Predictor.from_pretrained(str(tmp_path / "half"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        Predictor.from_pretrained(str(tmp_path / "file"))


def test_hub_id_without_network_is_one_line(monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    def refuse(*_, **__):
        raise LocalEntryNotFoundError("cannot reach the hub.\nand a long story")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(UserError, match="could not be fetched from the hub") as caught:
        Predictor.from_pretrained("someone/model")
    assert "\n" not in str(caught.value)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of the hub, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


@pytest.mark.parametrize("shard_bytes", [2**30, 20_000])
def test_hub_model_loads_from_the_cache_without_network(predictor, nano_folder, hub, shard_bytes):
    commit, repo = "c0ffee" + "0" * 34, hub / "models--someone--a-model"
    snapshot = repo / "snapshots" / commit
    meta = {**predictor.meta, "autoencoder": str(nano_folder.parent / "vae")}
    save_model(snapshot, predictor.params, meta, max_shard_bytes=shard_bytes)
    assert (snapshot / "model.safetensors.index.json").exists() == (shard_bytes == 20_000)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    assert Predictor.from_pretrained("someone/a-model").id == predictor.id
    for weights in snapshot.glob("*.safetensors*"):
        weights.unlink()
    with pytest.raises(UserError, match="hub model 'someone/a-model' has no config.json and model.safetensors") as told:
        Predictor.from_pretrained("someone/a-model")
    assert "\n" not in str(told.value)


def test_hub_model_that_is_not_cached_is_one_quick_line_without_network(hub):
    with pytest.raises(UserError, match="'someone/other' .* could not be fetched from the hub") as told:
        Predictor.from_pretrained("someone/other")
    assert "\n" not in str(told.value)


def test_what_is_no_model_of_ours_is_told_the_way_to_one(predictor, tmp_path):
    for name in ("XL/2", "L/2-8E2A", "a4"):
        with pytest.raises(UserError, match=f"'{name}' is a size and comes without weights: train it"):
            Predictor.from_pretrained(name)
    state = dit_to_torch(predictor.params, predictor.config)
    save_tree(tmp_path / "published" / "model.safetensors", state)
    (tmp_path / "published" / "config.json").write_text("{}")
    (tmp_path / "dit.pt").write_bytes(b"PK")
    for path in (tmp_path / "published", tmp_path / "published" / "model.safetensors", tmp_path / "dit.pt"):
        with pytest.raises(UserError, match="another layout than ours: convert it first") as told:
            Predictor.from_pretrained(str(path))
        assert f"scaling-perception convert {path} DIR" in str(told.value) and "\n" not in str(told.value)


def test_model_without_tasks_says_so_whatever_its_autoencoder(make_image, tmp_path):
    from nano import nano_params

    sizes = {"name": "x", "input_size": 4, "dim": 16, "depth": 1, "heads": 2, "num_classes": 3}
    meta = describe(config_from_dict(sizes))
    assert meta["autoencoder"] == "stabilityai/sd-vae-ft-ema"  # not here, and not asked for
    save_model(tmp_path / "m", nano_params(meta), meta)
    model = Predictor.from_pretrained(tmp_path / "m")
    for task, prompt in (("depth", None), ("flow", make_image())):
        with pytest.raises(UserError, match="knows no task: .* fine-tune it first"):
            model(make_image(), task=task, prompt=prompt)


def test_converted_model_with_experts_predicts(make_predictor, make_image, nano_folder, tmp_path):
    made = make_predictor(model={"experts": 4, "learn_sigma": True})
    save_tree(tmp_path / "published.safetensors", dit_to_torch(made.params, made.config))
    assert main(["convert", str(tmp_path / "published.safetensors"), str(tmp_path / "ours"), "--heads", "2"]) == 0
    loaded = Predictor.from_pretrained(tmp_path / "ours", autoencoder=str(nano_folder.parent / "vae"))
    assert loaded.id == made.id and loaded.tasks == ("depth", "amodal", "flow")
    assert loaded.meta["diffusion"] == RELEASED["diffusion"]
    depth = loaded(make_image(), ensemble=2, steps=2, batch_size=4)
    assert depth.prediction.shape == (40, 56) and 0 <= depth.prediction.min() < depth.prediction.max() <= 1
    plain = loaded(make_image(), ensemble=2, steps=2, batch_size=4, reduce="median")
    assert 0 <= plain.prediction.min() and plain.prediction.max() <= 1
    again = make_predictor(
        model={"experts": 4, "learn_sigma": True},
        diffusion=RELEASED["diffusion"],
        task_options=RELEASED["task_options"],
    )(make_image(), ensemble=2, steps=2, batch_size=4)
    np.testing.assert_allclose(depth.members, again.members, atol=0.05)  # the autoencoder was stored in float16


def test_the_visible_part_joins_the_mask_where_the_model_says_so(nano_folder):
    predictor = Predictor.from_pretrained(nano_folder)
    side = predictor.resolution
    white = np.ones((1, side, side, 3), np.float32)  # nothing painted
    visible = np.zeros((side, side), bool)
    visible[2:5, 3:9] = True
    for keep, expected in ((False, np.zeros_like(visible)), (True, visible)):
        predictor.options = dataclasses.replace(predictor.options, keep_visible=keep)
        found = predictor.merge(white, "amodal", (side, side), "median", {"visible_mask": visible})
        np.testing.assert_array_equal(found.prediction, expected)


def test_a_prompt_that_is_the_same_everywhere_is_encoded_once(make_predictor, make_image, monkeypatch):
    predictor = make_predictor()
    encode, seen = predictor.engine.encode, []

    def counted(vae, pictures, frames=False):
        seen.append(pictures.shape[:2])
        return encode(vae, pictures, frames)

    monkeypatch.setattr(predictor.engine, "encode", counted)
    first = predictor([make_image(), make_image(seed=1)], ensemble=2, **FAST).members
    assert seen == [(1, 2), (1, 2)]  # the pictures, and the prompt
    again = predictor([make_image(), make_image(seed=1)], ensemble=2, **FAST).members
    np.testing.assert_array_equal(again, first)
    assert seen[2:] == [(1, 2)]
    predictor(make_image(), "amodal", prompt=np.ones((40, 56), bool), ensemble=1, **FAST)
    assert len(seen) == 5, "a mask is the picture's own, even one that covers it all"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": "depth"}, "tasks of the model is 'depth': give a list"),
        ({"tasks": ["depth", "x"]}, "tasks of the model has 'x'"),
        ({"tasks": ["depth", 3]}, "tasks of the model has 3"),
        ({"passes": ["depth", "flow"]}, "passes of the model has 'flow'; did you mean"),
        ({"diffusion": "fixed"}, "diffusion of the model is 'fixed': give a table"),
        ({"diffusion": {"steps_offset": "1"}}, "diffusion steps_offset of the model is '1': give a value of type int"),
        ({"task_options": {"flow_divisor": "75"}}, "flow_divisor '75' must be a number"),
        ({"task_options": [1]}, "task_options are"),
    ],
)
def test_wrong_values_of_a_description_name_file_and_field(changes, message, nano_folder, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(nano_folder, folder)
    meta = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**meta, **changes}))
    with pytest.raises(UserError) as caught:
        Predictor.from_pretrained(folder)
    assert str(caught.value).startswith(f"{folder / 'config.json'}: {message}") and "\n" not in str(caught.value)
