"""Out of memory: one line whose numbers are the dry run's."""

import pytest

from scaling_perception.scaling.dry_run import describe_run
from scaling_perception.scaling.memory_advice import advice, explaining_memory
from scaling_perception.support.configs import load_config
from scaling_perception.support.errors import UserError

SPEC = "configs/depth.py:model=nano,res=64,cache=none"


def needs(devices, *overrides):
    return f"{describe_run(load_config(SPEC, overrides), devices)['memory']['total'] / 1e9:.3g} GB"


def test_each_change_has_what_a_device_then_needs():
    told = advice(load_config(SPEC, ["train.batch_size=64"]), 4)
    assert f"a device needs {needs(4, 'train.batch_size=64')} for this config" in told
    for change in ("train.accumulate=8", "train.remat=true", "train.batch_size=32"):
        assert f"{change} needs {needs(4, 'train.batch_size=64', change)}" in told
    spread = needs(4, "train.batch_size=64", "mesh.fsdp=4", "mesh.data=1")
    assert f"mesh.fsdp=4 and mesh.data=1 needs {spread}" in told
    assert "accumulate=32" not in told  # 64 samples on 4 devices have no 32 parts


def test_what_is_used_already_is_not_advised():
    told = advice(load_config(SPEC, ["train.batch_size=1", "train.remat=true"]), 1)
    assert not any(word in told for word in ("accumulate", "remat", "fsdp", "batch_size")) and "smaller model" in told


def test_a_run_without_a_dry_run_has_words_alone():
    assert "smaller train.batch_size" in advice(load_config("configs/tiny_vae.py"), 1)


def test_an_error_of_memory_becomes_one_line_and_others_stay():
    config = load_config(SPEC, ["train.batch_size=8"])
    with pytest.raises(UserError, match=r"^out of memory \(RESOURCE_EXHAUSTED: x\): by the dry run .*remat") as caught:
        with explaining_memory(config):
            raise RuntimeError("RESOURCE_EXHAUSTED: x\nmore")
    assert "\n" not in str(caught.value)
    with pytest.raises(RuntimeError, match="^bug$"), explaining_memory(config):
        raise RuntimeError("bug")
