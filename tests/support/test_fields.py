"""The table of fields: every field of a config has a row, every row refuses what is wrong, and the docs hold it."""

import json
import math
import re
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from scaling_perception.diffusion import schedules
from scaling_perception.models.config import DiTConfig
from scaling_perception.models.tiny_vae import TinyVAEConfig
from scaling_perception.support import field_checks
from scaling_perception.support.configs import flatten, load_config
from scaling_perception.support.errors import UserError, did_you_mean
from scaling_perception.support.field_checks import as_markdown, as_rows, check_config, notes
from scaling_perception.support.fields import ARGUMENTS, FIELDS, defaults
from scaling_perception.support.verbs import run_verb
from scaling_perception.tasks.samples import TaskOptions
from scaling_perception.training.identity import FREE, LATER

ROOT = Path(__file__).parent.parent.parent
SETTABLE = {name: field for name, field in FIELDS.items() if field.kind is not dict}


def whole(name):
    """A valid config that has the field ``name``, as a plain dict, and the table that holds it."""
    spec = "configs/tiny_vae.py" if name.split(".")[0] in ("phase", "teacher", "bank", "vae") else "configs/mini.py"
    config = load_config(spec).to_dict()
    if name.startswith("held_out.mixture"):
        config["held_out"]["mixture"] = {"NAME": dict(config["data"]["mixture"]["depth"])}
    if name.startswith("data.mixture"):
        config["data"]["mixture"] = {"NAME": dict(config["data"]["mixture"]["depth"])}
    table = config
    for part in name.split(".")[:-1]:
        table = table[part]
    return config, table, name.rsplit(".", 1)[-1]


def wrong_values(field):
    """Values that the field must refuse: of another type, beyond each end of its range, not finite, no choice."""
    if field.kind is str:
        return [7, None, *(["nothing such"] if field.choices else [])]
    if field.kind is bool:
        return ["yes", 1, None]
    if field.kind is tuple:
        return [(math.nan, 0.5), (), 3, (-1.0, 0.5), ("a", 1)]
    found = [math.nan, math.inf, -math.inf, "3", True, None]
    if field.choices:
        return [*found, 7]
    low, high, with_low, with_high = field_checks._ends(field.range)
    ends = [low - 1, -5] if with_low else [low]
    if high != math.inf:
        ends += [high + 1] if with_high else [high]
    return [*found, *map(field.kind, ends), *([1.5] if field.kind is int else [])]


@pytest.mark.parametrize("name", SETTABLE)
def test_every_field_refuses_what_is_wrong_and_names_itself(name):
    for value in wrong_values(SETTABLE[name]):
        if value in SETTABLE[name].also and value is not True:
            continue
        config, table, key = whole(name)
        table[key] = value
        with pytest.raises(UserError) as refusal:
            check_config(ConfigDict(config))
        assert name in str(refusal.value) and "\n" not in str(refusal.value), (value, refusal.value)


def test_every_field_has_a_row_and_every_default_passes():
    config = defaults()
    assert not {name for name in flatten(config) if name not in FIELDS}
    config.model_changes.update({"cond_channels": 4})
    check_config(config)
    for folder in (ROOT / "configs", ROOT / "configs" / "paper"):
        for path in folder.glob("*.py"):
            if path.stem not in ("common", "shared"):
                load_config(str(path))
    changes = {name.split(".")[1] for name in FIELDS if name.startswith("model_changes.")}
    assert changes == set(DiTConfig.__dataclass_fields__) - {"input_size"}
    for head, kind in (
        ("vae", TinyVAEConfig),
        ("diffusion_changes", schedules.DiffusionPreset),
        ("task_options", TaskOptions),
    ):
        assert {n.split(".")[1] for n in FIELDS if n.startswith(head + ".")} == set(kind.__dataclass_fields__)
    assert config.task_options.to_dict() == {**TaskOptions().to_dict(), "depth_quantiles": (0.02, 0.98)}
    for name, field in FIELDS.items():
        assert field.text and field.text[-1] != ".", name
        assert all(isinstance(one, field.kind) for one in field.options()), name
    for alias in FIELDS["diffusion_changes.schedule"].also + FIELDS["diffusion_changes.prediction"].also:
        assert alias in schedules._SCHEDULE_ALIASES | schedules._PREDICTION_ALIASES
    assert {name for name in (*FREE, *LATER) if name not in FIELDS} == set()
    json.dumps(config.to_dict())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optim.lr": 1e-7}, "optim.lr_final is 1e-05, above optim.lr, 1e-07"),
        ({"optim.lr_final": 0.0, "optim.schedule": "exponential"}, "ends above zero"),
        ({"optim.weight_decay": 0.1, "optim.name": "adam"}, "adam has none"),
        ({"task_options.depth_quantiles": (0.9, 0.1)}, "depth_quantiles"),
        ({"task_options.depth_quantiles": (0.1, 0.5, 0.9)}, "depth_quantiles"),
        ({"mesh.data": -1, "mesh.fsdp": -1}, "at most once"),
        ({"train.accumulate": 3}, "multiple of train.accumulate, 3"),
        ({"train.export_from": "best"}, "train.keep_best"),
        ({"train.keep_best": 1, "train.best_metric": "held_out_loss"}, "train.validate_every"),
        ({"train.keep_best": 1, "train.validate_every": 300, "held_out.cache": "x"}, "multiple of"),
        ({"model_changes.active_experts": 4}, "mini has no experts"),
        ({"model_changes.experts": 4, "model_changes.active_experts": 5}, "active_experts=5"),
        ({"model_changes.dim": 130}, "dim=130"),
        ({"model_changes.input_size": 8}, "follows from the resolution"),
        ({"resolution": 100}, "resolution 100"),
        ({"diffusion_changes.prediction": "epsilon", "diffusion_changes.zero_snr": True}, "zero_snr"),
        ({"phase": "encoder"}, "objective=autoencoder alone"),
        ({"objective": "autoencoder"}, "is missing"),
        ({"timestep_sampling": "Uniform"}, "did you mean 'uniform'"),
        ({"train.dtype": "float16"}, "give bfloat16, or float32"),
        ({"optim.learning_rate": 1.0}, "unknown field 'optim.learning_rate'"),
        ({"data.mixture.depth.wieght": 1.0}, "did you mean 'weight'"),
        ({"task_prompts.depth": 3}, "task_prompts.depth"),
    ],
)  # fmt: skip
def test_fields_that_contradict_each_other(changes, words):
    config = ConfigDict(load_config("configs/mini.py").to_dict())
    for name, value in changes.items():
        table = config
        for part in name.split(".")[:-1]:
            table = table[part]
        table[name.rsplit(".", 1)[-1]] = value
    with pytest.raises(UserError, match=words) as refusal:
        check_config(config)
    assert "\n" not in str(refusal.value)


def test_a_field_that_is_missing_and_one_of_another_table():
    for name in ("optim.b2", "held_out", "data.flip"):
        config, table, key = whole(name)
        del table[key]
        with pytest.raises(UserError, match=f"no field '{name}"):
            check_config(ConfigDict(config))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("upcycle.py:experts=0", "argument 'experts' is 0: give a whole number of at least 1"),
        ("upcycle.py:active=0", "'active' is 0"),
        ("upcycle.py:experts=2,active=3", "active_experts=3"),
        ("upcycle.py:gating=papre", "did you mean 'paper'"),
        ("upcycle.py:steps=-4", "'steps' is -4"),
        ("paper/fig6.py:experts=-8", "'experts' is -8"),
        ("mini.py:batch=0", "'batch' is 0"),
        ("mini.py:count=-1", "'count' is -1"),
        ("mini.py:res=-64", "'res' is -64"),
        ("mini.py:model=mnii", "did you mean 'mini'"),
        ("depth.py:recipe=Final", "did you mean 'final'"),
        ("pretrain.py:classes=0", "'classes' is 0"),
        ("pretrain.py:source=imagnet", "did you mean 'imagenet'"),
        ("tiny_vae.py:bank=-3", "'bank' is -3"),
        ("tiny_vae.py:phase=both", "'phase' is 'both'"),
        ("from_dit.py:gain=exactly", "did you mean 'exact'"),
        ("paper/fig4.py:pretrained=0", "'pretrained' is 0"),
        ("paper/fig8ef.py:schedule=cosin", "did you mean 'cosine'"),
        ("finetune.py:task=dept", "did you mean 'depth'"),
    ],
)  # fmt: skip
def test_arguments_after_the_colon_have_ranges(spec, words):
    with pytest.raises(UserError, match=words):
        load_config(f"configs/{spec}")


def test_arguments_have_rows():
    assert all(field.choices or field.range for field in ARGUMENTS.values())


def test_what_has_no_effect_is_said():
    assert notes(load_config("configs/mini.py")) == []
    short = ["train.steps=8", "held_out.cache=x", "train.best_metric=loss"]
    lines = notes(load_config("configs/mini.py", short))
    assert [line.split()[0] for line in lines] == ["optim.warmup", "held_out", "train.best_metric"]


def test_errors_of_a_config_file_are_one_line(tmp_path):
    head = "from ml_collections import ConfigDict\nfrom . import common\n\ndef get_config(arg=''):\n"
    for body, words in (
        ("    return common.nothing\n", "line 5: AttributeError"),
        ("    c = common.defaults()\n    c.train.steps = 'many'\n    return c\n", "line 6: TypeError"),
        ("    c = common.defaults()\n    c.optim.lrate = 1.0\n    return c\n", "unknown field 'optim.lrate'"),
        ("    return ConfigDict({'model': 'a1'})\n", "no field 'seed': begin with common.defaults"),
    ):
        (tmp_path / "own.py").write_text(head + body)
        with pytest.raises(UserError, match=words) as refusal:
            load_config(str(tmp_path / "own.py"))
        assert "\n" not in str(refusal.value)


def test_the_nearest_name_is_found_in_any_case():
    assert "'XL/2'" in did_you_mean("xl/2", ("XL/2", "a1")) and "'uniform'" in did_you_mean("UNIFORM", ("uniform",))


def test_the_docs_hold_the_table_and_the_command_prints_it(capsys):
    text = (ROOT / "docs" / "reference.md").read_text()
    assert as_markdown() in text, "write the table anew with `scaling-perception train --help-config markdown`"
    with pytest.raises(SystemExit) as done:
        run_verb("train", ["--help-config"])
    printed = capsys.readouterr().out
    assert done.value.code == 0 and all(row[0] in printed and row[3] in printed for row in as_rows())


@pytest.mark.parametrize("field", ["data.cache", "held_out.cache"])
@pytest.mark.parametrize(
    ("caches", "told"),
    [
        ("{0}/a:{0}/b:{0}/a", "has {0}/a twice: give each cache once"),
        ("{0}/a:{0}/link", "has {0}/link twice, also as {0}/a: give each cache once"),
        ("{0}/a:{0}/b/../a/", "twice, also as {0}/a: give each cache once"),
        ("gs://bucket/a:gs://bucket/a", "has gs://bucket/a twice"),
    ],
)
def test_a_cache_that_is_given_twice_is_refused(tmp_path, field, caches, told):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("a")
    config = defaults()
    table, name = field.split(".")
    config[table][name] = caches.format(tmp_path)
    with pytest.raises(UserError, match=re.escape(told.format(tmp_path))) as error:
        check_config(config)
    assert str(error.value).startswith(field)
    config[table][name] = f"{tmp_path}/a:{tmp_path}/b"
    check_config(config)
