"""Evaluation sets of depth and flow in the layouts in which they are published: real bytes, few pixels."""

import numpy as np
import pytest
from PIL import Image
from small_sets import H, W, check_raw, picture, refuse, write, write_flow

from scaling_perception.data import formats
from scaling_perception.data.sources import open_source
from scaling_perception.support.errors import UserError

# Real samples


@pytest.mark.parametrize(
    ("name", "folder", "count", "size", "depths", "share"),
    [
        ("nyuv2", "nyuv2", 1, (480, 640), (0.5, 10), 0.73),
        ("kitti_depth", "kitti_depth", 1, (375, 1242), (1, 80), 0.19),
        ("icl_nuim", "icl_nuim", 6, (480, 640), (0.1, 5), None),
        ("tum_rgbd", "tum_rgbd", 1, (480, 640), (0.1, 10), None),
    ],
)
def test_real_depth_benchmarks(shared_dir, name, folder, count, size, depths, share):
    source = open_source(name, shared_dir / "data" / folder, "val", "depth")
    assert len(source) == count
    for i in range(count):
        raw = source[i]
        check_raw(raw, "depth")
        known = raw["depth"][raw["valid"]]
        assert raw["depth"].shape == size and depths[0] < known.min() and known.max() < depths[1]
    if share:
        assert abs(raw["valid"].mean() - share) < 0.01


def test_real_flow_benchmarks(shared_dir):
    source = open_source("middlebury_flow", shared_dir / "data" / "middlebury_flow", "val", "flow")
    assert [e.key for e in source.entries] == ["RubberWhale/frame10", "Urban2/frame10"]
    speeds = []
    for i in range(2):
        raw = source[i]
        check_raw(raw, "flow")
        assert not raw["flow"][~raw["valid"]].any()
        speeds.append(np.linalg.norm(raw["flow"], axis=-1).max())
    assert abs(speeds[0] - 4.6) < 0.1 and 20 < speeds[1] < 23
    assert not source[0]["valid"].all()
    for rendering in ("clean", "final"):
        source = open_source("sintel", shared_dir / "data" / "sintel", "val", "flow", rendering=rendering)
        assert [e.key for e in source.entries] == [f"alley_1/{rendering}/frame_0002"]
        raw = source[0]
        check_raw(raw, "flow")
        assert raw["flow"].shape == (436, 1024, 2) and 0 < raw["occluded"].mean() < 0.2 and not raw["valid"].all()
    refuse("no rendering 'finale'; did you mean 'final'", "sintel", shared_dir, rendering="finale")


# Depth


def write_millimetres(path, seed=0, height=H, width=W):
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = np.random.default_rng(seed).integers(500, 9000, (height, width), dtype=np.uint16)
    stored[0, 0] = 0
    formats.write_png16(path, stored)
    return stored


def keys(source):
    return [entry.key for entry in source.entries]


def test_nyu_as_marigold_lays_it_out(tmp_path):
    lines = []
    for part, scene, number in (("test", "kitchen_0004", 1), ("test", "office_0008", 2), ("train", "cafe_0001", 3)):
        folder = tmp_path / part / scene
        write(folder / f"rgb_{number:04d}.png", picture(number))
        stored = write_millimetres(folder / f"depth_{number:04d}.png", number)
        write_millimetres(folder / f"filled_{number:04d}.png", 9)
        lines.append(" ".join(f"{part}/{scene}/{kind}_{number:04d}.png" for kind in ("rgb", "depth", "filled")))
    source = open_source("nyuv2", tmp_path, "val", "depth")
    assert keys(source) == ["test/kitchen_0004/rgb_0001", "test/office_0008/rgb_0002"]
    check_raw(source[0], "depth")
    everything = open_source("nyuv2", tmp_path, "all", "depth")
    assert len(everything) == 3
    np.testing.assert_array_equal(everything[2]["depth"], stored / np.float32(1000))
    assert not everything[2]["valid"][0, 0] and everything[2]["valid"].sum() == H * W - 1
    (tmp_path / "list.txt").write_text("\n".join(lines[:0:-1]))  # the list decides which, and in which order
    listed = open_source("nyuv2", tmp_path, "test", "depth", list="list.txt")
    assert keys(listed) == ["train/cafe_0001/rgb_0003", "test/office_0008/rgb_0002"]
    assert listed.fingerprint() != everything.fingerprint() and listed.fingerprint()["options"]["list"] == "list.txt"


def write_kitti(root, images=("0000000005", "0000000069", "0000000075"), with_depth=2, drive=2):
    """The raw recordings and, apart from them, the annotated depth; one image has none."""
    name = f"2011_09_26_drive_{drive:04d}_sync"
    lines = []
    for index, one in enumerate(images):
        image = f"2011_09_26/{name}/image_02/data/{one}.png"
        depth = f"{name}/proj_depth/groundtruth/image_02/{one}.png"
        write(root / "raw" / image, picture(index))
        write(root / "raw" / image.replace("image_02", "image_03"), picture(index))  # the other camera
        if index < with_depth:
            target = root / "data_depth_annotated" / "val" / depth
            target.parent.mkdir(parents=True, exist_ok=True)
            formats.write_png16(target, np.full((H, W), 256 * (index + 2), np.uint16))
        lines.append(f"{image} {depth if index < with_depth else 'None'} 721.5377")
    return lines


def test_kitti_eigen_list_leaves_out_what_has_no_truth(tmp_path):
    lines = write_kitti(tmp_path) + write_kitti(tmp_path, drive=9)
    (tmp_path / "eigen.txt").write_text("\n".join(lines) + "\n")
    source = open_source("kitti_depth", tmp_path, "test", "depth", list="eigen.txt")
    assert len(source) == 4 and source.notes == ["2 of 6 images have no ground truth and are left out"]
    assert keys(source)[0] == "2011_09_26/2011_09_26_drive_0002_sync/image_02/data/0000000005"
    assert source[1]["depth"].max() == 3 and source[2]["depth"].max() == 2  # same numbers, another drive
    by_name = open_source("kitti_depth", tmp_path, "val", "depth")
    assert len(by_name) == 4 and by_name.notes == source.notes
    np.testing.assert_array_equal(by_name[3]["image"], source[3]["image"])
    lines[0] = lines[0].replace("proj_depth/groundtruth/image_02/0000000005", "proj_depth/groundtruth/image_02/99")
    (tmp_path / "eigen.txt").write_text("\n".join(lines))
    refuse("image_02/99.png is missing", "kitti_depth", tmp_path, list="eigen.txt")
    (tmp_path / "eigen.txt").write_text("a.png\n")
    refuse("eigen.txt line 1 is 'a.png': it must be 'image-file depth-file'", "kitti_depth", tmp_path, list="eigen.txt")
    (tmp_path / "eigen.txt").write_text("0000000005.png 0000000005.png\n")
    refuse("keep one of them", "kitti_depth", tmp_path, list="eigen.txt")
    refuse("none.txt does not exist", "kitti_depth", tmp_path, list="none.txt")


def test_kitti_as_marigold_lays_it_out(tmp_path):
    lines = write_kitti(tmp_path / "elsewhere")
    for line in lines:  # one folder for both
        image, depth = line.split()[:2]
        write(tmp_path / "kitti" / image, picture(3))
        if depth != "None":
            place = tmp_path / "kitti" / depth
            place.parent.mkdir(parents=True, exist_ok=True)
            formats.write_png16(place, np.full((H, W), 512, np.uint16))
    (tmp_path / "eigen_test_files_with_gt.txt").write_text("\n".join(lines))
    given = str(tmp_path / "eigen_test_files_with_gt.txt")
    source = open_source("kitti_depth", tmp_path / "kitti", "val", "depth", list=given)
    assert len(source) == 2 and (source[0]["depth"] == 2).all()
    check_raw(source[1], "depth")


@pytest.mark.parametrize(
    ("image", "depth"),
    [
        ("rgb/{0}/images/dslr_images", "depth/{0}_dslr_depth/{0}/ground_truth_depth/dslr_images"),
        ("{0}/images/dslr_images", "{0}/ground_truth_depth/dslr_images"),
    ],
)
def test_eth3d_is_raw_float32_in_files_called_jpg(tmp_path, image, depth):
    for scene in ("office", "pipes"):
        folder = tmp_path / image.format(scene)
        folder.mkdir(parents=True)
        exif = Image.Exif()
        exif[0x0112] = 6  # a camera that was turned: the depth lies on the pixels as they are stored
        Image.fromarray(picture(0)).save(folder / "DSC_0219.JPG", quality=95, exif=exif)
        truth = np.linspace(0.5, 40, H * W, dtype="<f4").reshape(H, W) + (scene == "pipes")
        truth[0, :3] = np.inf
        place = tmp_path / depth.format(scene) / "DSC_0219.JPG"
        place.parent.mkdir(parents=True)
        place.write_bytes(truth.tobytes())
    source = open_source("eth3d", tmp_path, "val", "depth")
    assert len(source) == 2
    raw = source[1]
    check_raw(raw, "depth")
    assert raw["image"].shape == (H, W, 3)
    assert not raw["valid"][0, :3].any() and not raw["depth"][0, :3].any() and raw["valid"].sum() == H * W - 3
    np.testing.assert_array_equal(raw["depth"][raw["valid"]], truth[np.isfinite(truth)])
    place.write_bytes(truth.tobytes()[:-4])
    with pytest.raises(UserError, match=r"DSC_0219.JPG is no raw depth of its picture .764 bytes where .* 16x12 needs"):
        open_source("eth3d", tmp_path, "val", "depth")[1]
    place.unlink()
    refuse("DSC_0219.JPG is missing", "eth3d", tmp_path)


def test_scannet_sample(tmp_path):
    Image.fromarray(picture(1)).save(write_scannet(tmp_path, "scene0406_02", "000300"))
    Image.fromarray(picture(2)).save(write_scannet(tmp_path, "scene0088_02", "001100"))
    source = open_source("scannet", tmp_path, "val", "depth")
    assert keys(source) == ["scene0088_02/color/001100", "scene0406_02/color/000300"]
    check_raw(source[0], "depth")
    (tmp_path / "l.txt").write_text("scene0406_02/color/000300.jpg scene0406_02/depth/000300.png\n")
    assert keys(open_source("scannet", tmp_path, "val", "depth", list="l.txt")) == ["scene0406_02/color/000300"]
    large = tmp_path / "scene0088_02" / "color" / "001100.jpg"
    Image.fromarray(np.kron(picture(2), np.ones((2, 2, 1), np.uint8))).save(large)  # as ScanNet's own tool exports it
    assert open_source("scannet", tmp_path, "val", "depth")[0]["image"].shape == (H, W, 3)
    Image.fromarray(picture(2, 24, 30)).save(large)
    refuse("001100.png is 16x12 but .*001100.jpg is 30x24", "scannet", tmp_path, read=True)


def write_scannet(root, scene, number):
    write_millimetres(root / scene / "depth" / f"{number}.png")
    (root / scene / "color").mkdir()
    return root / scene / "color" / f"{number}.jpg"


def write_diode(root, part, number):
    kind = "indoors" if part.endswith("indoors") else "outdoor"
    stem = root / part / "scene_00021" / "scan_00189" / f"00021_00189_{kind}_{number:03d}_010"
    write(stem.with_name(stem.name + ".png"), picture(number))
    depth = np.full((H, W, 1), 1000, np.float32)  # far out of the range that predictions are clipped to
    depth[2, 3] = 0.25
    mask = np.zeros((H, W), np.float64)
    mask[2:6, 3:] = 1
    np.save(stem.with_name(stem.name + "_depth.npy"), depth)
    np.save(stem.with_name(stem.name + "_depth_mask.npy"), mask)
    return stem.relative_to(root).as_posix()


def test_diode_is_valid_where_its_mask_says(tmp_path):
    stems = [write_diode(tmp_path, f"val/{kind}", n) for kind in ("indoors", "outdoor") for n in (1, 2)]
    write_diode(tmp_path, "train/indoors", 7)
    source = open_source("diode", tmp_path, "val", "depth")
    assert keys(source) == sorted(stems)
    raw = source[0]
    check_raw(raw, "depth")
    assert raw["valid"].sum() == 4 * (W - 3) and raw["valid"][2, 3] and raw["depth"][2, 3] == np.float32(0.25)
    assert len(open_source("diode", tmp_path / "val", "val", "depth")) == 4
    assert keys(open_source("diode", tmp_path, "val", "depth", scenes="outdoor")) == sorted(stems)[2:]
    inside = [stem.removeprefix("val/") for stem in stems]  # as the published lists name them
    (tmp_path / "l.txt").write_text("".join(f"{s}.png {s}_depth.npy {s}_depth_mask.npy\n" for s in inside[1:]))
    listed = open_source("diode", tmp_path, "val", "depth", list="l.txt")
    assert keys(listed) == inside[1:] and listed[0]["valid"].sum() == raw["valid"].sum()
    assert len(open_source("diode", tmp_path, "val", "depth", list="l.txt", scenes="indoors")) == 1
    mask = tmp_path / f"{stems[0]}_depth_mask.npy"
    np.save(mask, np.zeros((H, W)))
    refuse("_depth.npy has no valid pixel", "diode", tmp_path, "val", read=True)
    np.save(mask, np.zeros((H, W, 3)))
    refuse("_depth_mask.npy holds .12, 16, 3.: a mask needs one channel", "diode", tmp_path, "val", read=True)
    mask.write_bytes(mask.read_bytes()[:200])
    refuse("_depth_mask.npy is no whole .npy file", "diode", tmp_path, "val", read=True)
    mask.unlink()
    refuse("_depth_mask.npy is missing", "diode", tmp_path, "val")
    refuse("no scenes 'inside'", "diode", tmp_path, scenes="inside")


# Flow


def test_released_sintel_and_kitti_layouts(tmp_path):
    top = tmp_path / "sintel" / "training"
    for frame in (1, 2, 3):
        write(top / "clean" / "alley" / f"frame_{frame:04d}.png", picture(frame))
        if frame < 3:
            write_flow(top / "flow" / "alley" / f"frame_{frame:04d}.flo", frame)
    wrong = np.zeros((H, W), np.uint8)
    wrong[:3] = 255
    write(top / "invalid" / "alley" / "frame_0001.png", wrong)
    source = open_source("sintel", tmp_path / "sintel", "val", "flow")
    assert len(source) == 2  # the last frame has no flow
    np.testing.assert_array_equal(source[0]["valid"], wrong == 0)
    np.testing.assert_array_equal(source[1]["image2"], picture(3))
    assert source[1]["valid"].all()
    (top / "flow" / "alley" / "frame_0001.flo").unlink()
    refuse("frame_0001.flo is missing", "sintel", tmp_path / "sintel")

    kitti = tmp_path / "kitti" / "training"
    write(kitti / "image_2" / "000000_10.png", picture(0))
    write(kitti / "image_2" / "000000_11.png", picture(1))
    known = np.random.default_rng(0).random((H, W)) < 0.3
    (kitti / "flow_occ").mkdir()
    formats.write_kitti_flow(kitti / "flow_occ" / "000000_10.png", np.full((H, W, 2), 3.5), known)
    raw = open_source("kitti_flow", tmp_path / "kitti", "all", "flow")[0]
    np.testing.assert_array_equal(raw["valid"], known)
    assert (raw["flow"][known] == 3.5).all() and not raw["flow"][~known].any()

    crop = tmp_path / "crop"
    name = "2011_09_26_drive_0002_sync_{}_0000000005_image_02.png"
    write(crop / "image" / name.format("image"), picture(0))
    (crop / "groundtruth_depth").mkdir()
    formats.write_png16(crop / "groundtruth_depth" / name.format("groundtruth_depth"), np.full((H, W), 512, np.uint16))
    assert (open_source("kitti_depth", crop, "val", "depth")[0]["depth"] == 2).all()


def write_kitti_pair(folder, camera, number=0):
    for frame in (10, 11):
        write(folder / camera / f"{number:06d}_{frame}.png", picture(frame))
    known = np.zeros((H, W), bool)
    known[3:9] = True
    seen = known.copy()
    seen[3:5, :4] = False
    for name, valid in (("flow_occ", known), ("flow_noc", seen)):
        (folder / name).mkdir(exist_ok=True)
        formats.write_kitti_flow(folder / name / f"{number:06d}_10.png", np.full((H, W, 2), -2.25), valid)
    return known, known & ~seen


def test_kitti_flow_of_both_years_knows_what_is_occluded(tmp_path):
    for year, camera in (("2012", "colored_0"), ("2015", "image_2")):
        known, occluded = write_kitti_pair(tmp_path / year / "training", camera)
        write(tmp_path / year / "testing" / camera / "000000_10.png", picture(0))  # its truth is not public
        write(tmp_path / year / "testing" / camera / "000000_11.png", picture(0))
    assert len(open_source("kitti_flow", tmp_path, "val", "flow")) == 2
    for year in (2012, 2015):
        source = open_source("kitti_flow", tmp_path, "val", "flow", year=year)
        assert len(source) == len(open_source("kitti_flow", tmp_path / str(year), "all", "flow")) == 1
        raw = source[0]
        check_raw(raw, "flow")
        np.testing.assert_array_equal(raw["valid"], known)
        np.testing.assert_array_equal(raw["occluded"], occluded)
    damaged = tmp_path / "2012" / "training" / "flow_noc" / "000000_10.png"
    damaged.write_bytes(damaged.read_bytes()[:60])
    refuse("flow_noc/000000_10.png is cut short", "kitti_flow", tmp_path / "2012", read=True)


def test_sintel_without_its_test_part_and_middlebury_as_unpacked(tmp_path):
    for part in ("training", "test"):
        for frame in (1, 2):
            write(tmp_path / "Sintel" / part / "final" / "cave" / f"frame_{frame:04d}.png", picture(frame))
    write_flow(tmp_path / "Sintel" / "training" / "flow" / "cave" / "frame_0001.flo", 1)
    source = open_source("sintel", tmp_path / "Sintel", "val", "flow", rendering="final")
    assert keys(source) == ["training/final/cave/frame_0001"] and "occluded" not in source[0]
    for frame in ("09", "10", "11"):
        write(tmp_path / "mb" / "other-color-allframes" / "other-data" / "Venus" / f"frame{frame}.png", picture(1))
    write_flow(tmp_path / "mb" / "other-gt-flow" / "other-gt-flow" / "Venus" / "flow10.flo", 1)
    source = open_source("middlebury_flow", tmp_path / "mb", "val", "flow")
    assert len(source) == 1
    check_raw(source[0], "flow")
