"""PyTorch files: what is in them is read, never run; damage is one line; what is written torch can read."""

import argparse
import os
import pickle
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from scaling_perception.interop import torch_files
from scaling_perception.interop.torch_files import open_tensors, open_torch, write_torch
from scaling_perception.support.errors import UserError

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch", reason="needs PyTorch")

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(7, dtype=torch.int64)}


def contents(source):
    return {name: np.array(source.read(name)) for name in source.shapes}


def check(source, state):
    assert sorted(source.shapes) == sorted(state) == sorted(source.dtypes)
    for name, tensor in state.items():
        found = source.read(name)
        assert found.shape == source.shapes[name] == tuple(tensor.shape) and found.dtype == source.dtypes[name]
        np.testing.assert_array_equal(found.astype(np.float64), tensor.double().numpy())


class Poison:
    """Would make a file named by its argument, if unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_both_forms_of_file_are_read(tmp_path, zipped):
    torch.save(STATE, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    source = open_torch(tmp_path / "a.pt")
    check(source, STATE)
    assert source.origin == str(tmp_path / "a.pt") and not source.read("a.weight").flags.writeable


def test_a_file_that_was_packed_again_is_read_right(tmp_path):
    torch.save({"a": torch.ones(1000)}, tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as old,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    check(open_torch(tmp_path / "b.pt"), {"a": torch.ones(1000)})


def test_every_dtype_comes_back_both_ways(tmp_path):
    rng = np.random.default_rng(0)
    kinds = ("float32", "float64", "float16", "bfloat16", "float8_e4m3fn", "int64", "int8", "uint8", "bool")
    arrays = {kind: rng.integers(0, 2, (3, 5)).astype(np.dtype(kind)) for kind in kinds}
    arrays |= {"scalar": np.float32(3).reshape(()), "empty": np.zeros((0, 4), np.float32)}
    write_torch(tmp_path / "a.pt", arrays)
    loaded = torch.load(tmp_path / "a.pt", weights_only=True)
    assert list(loaded) == list(arrays) and loaded["bfloat16"].dtype == torch.bfloat16
    source = open_torch(tmp_path / "a.pt")
    for name, array in arrays.items():
        found = source.read(name)
        assert found.dtype == array.dtype and found.shape == array.shape
        assert found.tobytes() == array.tobytes()
    assert source.dtypes["bfloat16"] == ml_dtypes.bfloat16 and os.listdir(tmp_path) == ["a.pt"]


def test_views_and_shared_storage_are_read(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    state = {"turned": base.T, "part": base[1:, ::2], "again": base, "half": base.to(torch.bfloat16).T}
    torch.save(state, tmp_path / "a.pt")
    check(open_torch(tmp_path / "a.pt"), state)


def test_the_average_is_preferred_and_told(tmp_path):
    other = {name: tensor + 1 for name, tensor in STATE.items()}
    args = argparse.Namespace(model="DiT-XL/2")
    for content, entry, expected in (
        ({"model": other, "ema": STATE, "opt": {"state": {}}, "args": args}, "ema", STATE),
        ({"model": STATE, "args": args, "step": 3}, "model", STATE),
        ({"state_dict": other}, "state_dict", other),
        ({"ema": {f"module.{name}": tensor for name, tensor in STATE.items()}}, "ema", STATE),
    ):
        torch.save(content, tmp_path / "a.pt")
        source = open_torch(tmp_path / "a.pt")
        check(source, expected)
        assert f"(its '{entry}' weights)" in source.origin
    mixed = {"module.a": STATE["b"], "b": STATE["b"]}  # no prefix of all
    torch.save(mixed, tmp_path / "a.pt")
    check(open_torch(tmp_path / "a.pt"), mixed)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle", "namespace"])
def test_a_poisoned_file_is_refused_and_not_run(tmp_path, form):
    path, mark = tmp_path / "a.pt", tmp_path / "run"
    poison = Poison(mark)
    if form == "pickle":
        path.write_bytes(pickle.dumps({"ema": poison}))
    else:
        content = {"ema": STATE, "args": argparse.Namespace(x=poison)} if form == "namespace" else {"a": poison}
        torch.save(content, path, _use_new_zipfile_serialization=form != "legacy")
    words = r"a\.pt (holds objects other than tensors \(posix\.system\)|is no whole PyTorch checkpoint)"
    with pytest.raises(UserError, match=words) as caught:
        open_torch(path)
    assert "\n" not in str(caught.value) and not mark.exists()
    pickle.loads(pickle.dumps(poison))  # it does work where pickle is trusted
    assert mark.exists()


def test_damage_is_one_line(tmp_path):
    torch.save({"a": torch.ones(1000)}, tmp_path / "whole.pt")
    torch.save({"a": torch.ones(1000)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("hello.txt", "x" * 1000)
    for content, words in (
        ((tmp_path / "whole.pt").read_bytes()[:2000], "no whole PyTorch checkpoint"),
        ((tmp_path / "old.pt").read_bytes()[:2000], "no whole PyTorch checkpoint"),
        ((tmp_path / "other.zip").read_bytes(), "no whole PyTorch checkpoint"),
        (b"", "is empty"),
        (b"\n<!DOCTYPE html><html><head>", "is a web page, not a checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "only a Git LFS pointer"),
        (np.random.default_rng(0).bytes(1000), "no whole PyTorch checkpoint"),
        (pickle.dumps([1, 2], protocol=2), "no whole PyTorch checkpoint|holds list instead"),
    ):
        (tmp_path / "a.pt").write_bytes(content)
        with pytest.raises(UserError, match=words) as caught:
            open_torch(tmp_path / "a.pt")
        assert "a.pt" in str(caught.value) and "\n" not in str(caught.value)


def test_files_without_weights_are_told(tmp_path):
    for content, words in (
        ([torch.ones(2)], "holds list instead of a state dict"),
        ({"epoch": 3, "lr": 0.1}, "no state dict .'epoch' is no tensor."),
        ({"ema": {}}, "entry ema is no state dict .it is empty."),
        ({"a": torch.ones(2).to_sparse()}, "tensor a is torch.float32, torch.sparse_coo"),
    ):
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(UserError, match=words):
            open_torch(tmp_path / "a.pt")
    with pytest.raises(UserError, match="does not exist"):
        open_torch(tmp_path / "none.pt")


def test_without_torch_the_way_to_get_it_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    for call in (open_torch, lambda path: write_torch(path, {})):
        with pytest.raises(UserError, match=r"need torch: pip install 'scaling-perception\[torch\]'"):
            call(tmp_path / "a.pt")
    assert not os.listdir(tmp_path)


def test_kind_of_file_is_chosen_by_name_then_content(tmp_path):
    arrays = {name: tensor.numpy() for name, tensor in STATE.items()}
    for name, write in (("a.safetensors", save_file), ("b.pt", None), ("c", None), ("d", save_file)):
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        if write:
            write(arrays, folder / name)
        else:
            torch.save(STATE, folder / name)
        check(open_tensors(folder / name), STATE)
    check(open_tensors(tmp_path / "a_safetensors"), STATE)  # a folder with one checkpoint
    check(open_tensors(tmp_path / "b_pt"), STATE)
    torch.save(STATE, tmp_path / "b_pt" / "e.pt")
    with pytest.raises(UserError, match=r"has 2 checkpoint files \(b.pt, e.pt\): name the one"):
        open_tensors(tmp_path / "b_pt")
    with pytest.raises(UserError, match="has no checkpoint"):
        open_tensors(tmp_path / "d")
    with pytest.raises(UserError, match="does not exist"):
        open_tensors(tmp_path / "nothing")


def test_a_long_read_lets_go_of_the_file(tmp_path, monkeypatch):
    state = {str(i): torch.full((1000,), float(i)) for i in range(8)}
    torch.save(state, tmp_path / "a.pt")
    opened = []
    real = torch_files._open
    monkeypatch.setattr(torch_files, "_open", lambda *args: opened.append(1) or real(*args))
    monkeypatch.setattr(torch_files, "_REOPEN_BYTES", 6000)
    check(open_torch(tmp_path / "a.pt"), state)
    assert len(opened) == 4


def test_a_failed_write_leaves_the_old_file_and_one_line(tmp_path, monkeypatch):
    write_torch(tmp_path / "a.pt", {"a": np.zeros(3, np.float32)})
    before = (tmp_path / "a.pt").read_bytes()

    def full(*_):
        raise RuntimeError("[enforce fail at inline_container.cc:1] . unexpected pos\nmore")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="cannot write .*a.pt.*free space") as caught:
        write_torch(tmp_path / "a.pt", iter([("a", np.ones(3, np.float32))]))
    assert "\n" not in str(caught.value)

    def broken():
        yield "a", np.ones(3, np.float32)
        raise KeyError("b")  # a fault of the source is not called a full disk

    with pytest.raises(KeyError):
        write_torch(tmp_path / "a.pt", broken())
    assert (tmp_path / "a.pt").read_bytes() == before and os.listdir(tmp_path) == ["a.pt"]


def test_full_disk_leaves_nothing(tmp_path):
    code = """
import resource, signal, sys
import numpy as np
import torch
from scaling_perception.interop.torch_files import write_torch
from scaling_perception.support.errors import UserError
def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
def write(*args):  # the gathered tensors fit; what torch writes does not
    limit(2**20)
    real(*args)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
real = torch.save
for size, torch.save in ((2**20, real), (3 * 2**20, write)):
    limit(size)
    try:
        write_torch(sys.argv[1], ((str(i), np.ones((512, 512), np.float32)) for i in range(2)))
    except UserError as error:
        print(error)
"""
    words = [sys.executable, "-c", code, str(tmp_path / "a.pt")]
    done = subprocess.run(words, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and all(line.startswith("cannot write") for line in lines), done
    assert os.listdir(tmp_path) == []


def test_published_forms(shared_dir):
    folder = shared_dir / "golden" / "checkpoints"
    for name, entry in (
        ("dit/DiT-tiny-2-64x64.pt", None),
        ("dit/0000002.pt", "ema"),
        ("generalist/dit_moe_generalist_tiny.pt", None),
        ("generalist/dit_moe_generalist_tiny_ema.pt", "ema"),
    ):
        source = open_tensors(folder / name)
        assert ("'ema'" in source.origin) == bool(entry)
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(folder / name, weights_only=True)
        check(source, loaded[entry] if entry else loaded)
    case = load_file(folder.parent / "generalist" / "uc_e8_top2.safetensors")
    found = contents(open_tensors(folder / "generalist" / "dit_moe_generalist_tiny.pt"))
    assert all(np.array_equal(case[f"weights/{name}"], array) for name, array in found.items())


@pytest.mark.parametrize("prefix", ["module._orig_mod.", "_orig_mod.module.", "model.", "_forward_module.model."])
def test_stacked_prefixes_are_dropped(tmp_path, prefix):
    torch.save(
        {"state_dict": {prefix + name: tensor for name, tensor in STATE.items()}, "epoch": 3}, tmp_path / "a.ckpt"
    )
    check(open_torch(tmp_path / "a.ckpt"), STATE)


def test_what_trainers_write(tmp_path):
    other = {name: tensor + 1 for name, tensor in STATE.items()}
    both = {f"model.{n}": t for n, t in other.items()} | {f"ema_model.{n}": t for n, t in STATE.items()}
    torch.save({"state_dict": both, "pytorch-lightning_version": "2.4", "loops": {}}, tmp_path / "a.ckpt")
    check(open_torch(tmp_path / "a.ckpt"), STATE)
    torch.save({"module": STATE, "ds_version": "0.15", "param_shapes": [{}]}, tmp_path / "mp_rank_00_model_states.pt")
    check(open_torch(tmp_path / "mp_rank_00_model_states.pt"), STATE)
    empty = {name: torch.empty(0) for name in STATE}
    torch.save({"module": empty, "param_shapes": [{}]}, tmp_path / "mp_rank_00_model_states.pt")
    torch.save({"optimizer_state_dict": {}}, tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    for path in tmp_path.glob("*mp_rank*"):
        with pytest.raises(UserError, match=r"DeepSpeed ZeRO.*zero_to_fp32.py"):
            open_torch(path)


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (lambda: torch.empty(2, device="meta"), "tensor a is torch.float32, .* without data"),
        (
            lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
            "tensor a is torch.qint8, .* quantised",
        ),
        (lambda: torch.ones(2, 2).to_sparse_csr(), "tensor a is torch.float32, torch.sparse_csr"),
    ],
)
def test_tensors_that_hold_no_plain_numbers_are_named(tmp_path, tensor, words):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save({"a": tensor()}, tmp_path / "a.pt")
        with pytest.raises(UserError, match=words) as caught:
            open_torch(tmp_path / "a.pt")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("protocol", [2, 4])
def test_what_a_pickle_calls_is_named(tmp_path, protocol):
    (tmp_path / "a.pt").write_bytes(pickle.dumps({"w": Poison(tmp_path / "mark")}, protocol=protocol))
    with pytest.raises(UserError, match=r"objects other than tensors \(posix\.system\)"):
        open_torch(tmp_path / "a.pt")
    assert not (tmp_path / "mark").exists()
