"""The doctor: a sound machine passes, and each fault is found and told with its mend."""

import json

import pytest

from scaling_perception import doctor
from scaling_perception.cli import main


def levels(found):
    return {item.name: item.level for item in found}


def test_a_sound_machine_has_no_failure(capsys):
    assert main(["doctor", "--json"]) == 0
    found = {item["name"]: item for item in json.loads(capsys.readouterr().out)}
    names = {"python", "jax", "devices", "arithmetic", "memory", "disk", "autoencoder 'tiny'", "model 'mini'"}
    assert names <= set(found)
    assert not [item for item in found.values() if item["level"] == "FAIL"]
    assert "8 x" in found["devices"]["text"]


def test_an_old_or_missing_package_is_found(monkeypatch):
    monkeypatch.setattr(doctor, "_PACKAGES", {"numpy": (999,), "no-such-package-here": (1,)})
    found = {item.name: item for item in doctor._check_packages()}
    assert found["numpy"].level == "FAIL" and "pip install -U numpy" in found["numpy"].text
    assert found["no-such-package-here"].level == "FAIL" and "pip install -e ." in found["no-such-package-here"].text


def test_wrong_arithmetic_is_found(monkeypatch):
    import jax

    real = jax.grad
    monkeypatch.setattr(jax, "grad", lambda f: lambda x: real(f)(x) * 1.01)
    assert doctor._check_arithmetic().level == "FAIL"


def test_broken_weights_are_found(monkeypatch):
    from scaling_perception.models import autoencoders
    from scaling_perception.support.errors import UserError

    def broken(name):
        raise UserError("encoder.safetensors is truncated: fetch it again")

    monkeypatch.setattr(autoencoders, "load_autoencoder", broken)
    found = {item.name: item for item in doctor._check_weights()}
    assert found["autoencoder 'tiny'"].level == "FAIL" and "truncated" in found["autoencoder 'tiny'"].text


DATASETS = [("scenes", "", "ok"), ("hypersim", "nowhere", "FAIL"), ("hypersin", "", "FAIL")]


@pytest.mark.parametrize("name, folder, level", DATASETS)
def test_a_dataset_is_opened(name, folder, level, capsys):
    found = doctor._check_dataset(name, folder)
    assert found.level == level
    if name == "hypersin":
        assert "hypersim" in found.text


def test_failures_decide_the_exit_code(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "findings", lambda *_: [doctor.Finding("FAIL", "x", "mend it")])
    assert main(["doctor"]) == 1
    assert "1 problem(s)" in capsys.readouterr().out
