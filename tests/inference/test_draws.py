"""Members that see the mirror image: what they predict, however they are sampled, and what does not go with them."""

import jax
import numpy as np
import pytest

from scaling_perception.evaluation.nested import Adaptive
from scaling_perception.evaluation.protocols import get_protocol, measure, prepare_raw
from scaling_perception.evaluation.sweep import sweep
from scaling_perception.inference.draws import mirrored_back
from scaling_perception.inference.predictor import Predictor
from scaling_perception.inference.settings import Settings
from scaling_perception.parallel.mesh import make_mesh
from scaling_perception.support.errors import UserError
from scaling_perception.tasks import TASKS

pytest_plugins = ("nano",)

FAST = {"steps": 2, "batch_size": 4}


def asked(make_raw, task, **more):
    """Arguments of a call, and those of the same picture in a mirror."""
    raw = make_raw(32, 32, 3, **more)
    prompt = None if task == "depth" else raw["image2" if task == "flow" else "visible_mask"]
    turned = [None if one is None else np.ascontiguousarray(one[:, ::-1]) for one in (raw["image"], prompt)]
    return (raw["image"], prompt), tuple(turned)


@pytest.mark.parametrize("task", ["depth", "flow", "amodal"])
def test_every_second_member_is_the_mirror_images_own_mirrored_back(predictor, make_raw, task, monkeypatch):
    monkeypatch.setattr("scaling_perception.inference.model.image_id", lambda raw: 7)  # the same noise for both
    (image, prompt), (other, turned) = asked(make_raw, task)
    plain = predictor(image, task, ensemble=4, prompt=prompt, **FAST).members
    mirror = predictor(other, task, ensemble=4, prompt=turned, **FAST).members
    back = mirror[:, :, ::-1] * (np.float32([-1, 1]) if task == "flow" else 1)
    found = predictor(image, task, ensemble=4, prompt=prompt, views="flip", **FAST).members
    np.testing.assert_allclose(found[::2], plain[::2], atol=1e-5)
    np.testing.assert_allclose(found[1::2], back[1::2], atol=1e-5)
    assert np.abs(found[1::2] - plain[1::2]).max() > 1e-2
    one = predictor(image, task, ensemble=1, prompt=prompt, views="flip", **FAST).members
    np.testing.assert_allclose(one, plain[:1], atol=1e-5)


def test_channels_of_every_pass_turn_as_it_says():
    for name, task in TASKS.items():
        pixels = np.random.default_rng(0).random((2, len(task.passes), 3, 4, 4, 3), np.float32)
        for first in (0, 1):
            back = mirrored_back(pixels, name, first)
            for number, one in enumerate(task.passes):
                for member in range(3):
                    seen = pixels[0, number, member]
                    expected = one.mirror(seen) if (first + member) % 2 else seen
                    np.testing.assert_array_equal(back[0, number, member], expected)
        assert (mirrored_back(mirrored_back(pixels, name), name) == pixels).all()


@pytest.mark.parametrize(
    "how",
    [{"batch_size": 3}, {"tolerance": 0.0, "first": 3}, {"step_tolerance": 0.0, "step_chunk": 1}, {"antithetic": True}],
)
def test_members_do_not_depend_on_how_they_are_batched(predictor, make_raw, how):
    (image, prompt), _ = asked(make_raw, "flow")
    settings = {"steps": 2, "ensemble": 5, "prompt": prompt, "views": "flip"}
    if "antithetic" in how:
        settings["antithetic"], how = True, {"batch_size": 2}
    whole = predictor(image, "flow", **settings, batch_size=5).members
    np.testing.assert_allclose(
        predictor(image, "flow", **settings, **{"batch_size": 2} | how).members, whole, atol=2e-5
    )


def test_on_several_devices(nano_folder, make_raw):
    (image, prompt), _ = asked(make_raw, "flow")
    settings = {"steps": 2, "ensemble": 4, "prompt": prompt, "views": "flip"}
    alone = Predictor.from_pretrained(nano_folder)(image, "flow", **settings).members
    mesh = make_mesh(data=2, fsdp=2, devices=jax.devices()[:4])
    split = Predictor.from_pretrained(nano_folder, mesh=mesh)(image, "flow", **settings).members
    np.testing.assert_allclose(split, alone, atol=2e-5)


def test_views_are_part_of_the_grid(predictor, make_raw):
    """Cells of both views in one run against calls; one member sees the picture alone, so it has one cell."""
    raws = [make_raw(32, 32, seed) for seed in range(3)]
    protocol, adaptive = get_protocol("flow", "scenes"), Adaptive((0.0,), 2, (0.0,), 2, latents=True)
    options = {"batch_size": 4, "adaptive": adaptive, "views": ["plain", "flip"], "controls": 1}
    found, _ = sweep(predictor, raws, "flow", protocol, [5], [1, 3], **options)
    plain, flip = ([c for c in found["cells"] if c.get("views", "plain") == one] for one in ("plain", "flip"))
    kinds = [(c["kind"], c["ensemble"], c.get("merge_in")) for c in flip]
    assert kinds == [("constant", 3, None), ("adaptive", 3, None), ("steps", 3, None)]
    assert len(plain) == 6  # sizes 1 and 3, one in latents, adaptive, steps of both sizes
    prompts, images = ([raw[name] for raw in raws] for name in ("image2", "image"))
    for view, cells in (("plain", plain), ("flip", flip)):
        out = predictor(images, "flow", 5, 3, prompt=prompts, batch_size=4, views=view).prediction
        expected = [
            measure(one, prepare_raw(raw, protocol), protocol)["epe"] for one, raw in zip(out, raws, strict=True)
        ]
        for cell in cells:
            if cell["ensemble"] == 3 and "merge_in" not in cell:
                assert [row["epe"] for row in cell["rows"]] == pytest.approx(expected, rel=1e-4)
    assert flip[0]["rows"] != plain[1]["rows"] and "views" not in found["controls"]["cell"]
    alone, _ = sweep(predictor, raws, "flow", protocol, [5], [1, 3], batch_size=4, views=["flip"])
    assert [cell["ensemble"] for cell in alone["cells"]] == [1, 3]
    assert alone["cells"][1]["rows"] == flip[0]["rows"]


def test_refusals(predictor, make_image):
    with pytest.raises(UserError, match="unknown views 'flp'; did you mean 'flip'"):
        predictor(make_image(), views="flp", **FAST)
    with pytest.raises(UserError, match="merge_in 'latents' does not go with views 'flip'"):
        Settings(views="flip", merge_in="latents")
