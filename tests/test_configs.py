import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from ml_collections import ConfigDict

from scaling_perception.interop.find import SHIPPED
from scaling_perception.models import presets
from scaling_perception.models.dit import abstract_params
from scaling_perception.models.presets import get_preset, preset_names
from scaling_perception.support import configs
from scaling_perception.support.configs import convert, find_config, flatten, load_config
from scaling_perception.support.errors import UserError
from scaling_perception.tasks import TaskOptions
from scaling_perception.training.diffusion import network_of
from scaling_perception.training.optim import make_optimizer
from scaling_perception.training.state import abstract_state

ROOT = Path(__file__).parent.parent
FILES = sorted(path.name for path in (ROOT / "configs").glob("*.py") if path.name != "common.py")
DIFFUSION = [name for name in FILES if load_config(f"configs/{name}").objective == "diffusion"]


def read(name):
    """The docstring and ARGS of a config file."""
    package = configs._execute(ROOT / "configs" / name)
    return package.__doc__ or "", getattr(package, "ARGS", {})


def test_there_are_configs_for_every_task():
    named = {"depth.py", "flow.py", "amodal.py", "generalist.py", "mini.py", "quickstart.py", "finetune.py"}
    assert named <= set(FILES)


def test_every_preset_has_a_recipe_or_is_asked_for_one(monkeypatch):
    for name in preset_names():  # a new one must be entered in configs/common.py
        batch = load_config(f"configs/depth.py:model={name}").train.batch_size
        assert batch == (32 if name in {*"a1 a2 a3 a4 a5 a6 nano mini".split()} else 1024)
    monkeypatch.setitem(presets._TABLE, "huge", get_preset("XL/2"))
    with pytest.raises(UserError, match="recipe=auto knows none for model 'huge': add recipe=ablation or recipe=final"):
        load_config("configs/depth.py:model=huge")
    assert load_config("configs/depth.py:model=huge,recipe=ablation").train.batch_size == 32


@pytest.mark.parametrize("name", DIFFUSION)
def test_every_config_makes_a_network_and_an_optimiser(name):
    config = load_config(f"configs/{name}")
    dit = network_of(config)
    tx, schedule = make_optimizer(config.optim, config.train.steps, ("pos_embed",))
    shapes = abstract_state(lambda key: jax.tree.map(lambda x: jax.numpy.zeros(x.shape), abstract_params(dit)), tx)
    assert shapes.params["pos_embed"].shape == (dit.tokens, dit.dim)
    first, last = (float(schedule(step)) for step in (config.optim.warmup, config.train.steps))
    assert 0 < last <= first and (last == first) == (config.optim.schedule == "constant")
    assert dit.input_size * 8 == config.resolution
    TaskOptions.from_dict(config.task_options.to_dict())
    json.dumps(config.to_dict())  # goes into config.json


@pytest.mark.parametrize("name", FILES)
def test_every_argument_is_documented_accepted_and_used(name):
    doc, args = read(name)
    plain = json.dumps(load_config(f"configs/{name}").to_dict())
    told = set(re.findall(r"``(\w+)``", doc))
    samples = {"model": "a2", "res": 96, "recipe": "ablation", "diffusion": "released", "phase": "decoder"}
    samples |= {"flip": "false", "task": "flow", "noise": "gaussian", "size": "s5", "lr": 0.1}
    samples |= {"source": "scenes", "gating": "paper", "gain": "released", "active": 4, "schedule": "linear"}
    only_with = {"active": "experts=4,", "gating": "experts=4,"} if name == "scenes_study.py" else {}
    for key, default in args.items():
        assert key in told, f"the docstring does not tell the argument {key}"
        value = samples.get(key, default + 16 if isinstance(default, int) else f"{default}x")
        head = only_with.get(key, "")
        before = json.dumps(load_config(f"configs/{name}:{head}").to_dict()) if head else plain
        changed = json.dumps(load_config(f"configs/{name}:{head}{key}={value}").to_dict())
        assert changed != before, f"the argument {key} changes nothing"


@pytest.mark.parametrize("name", FILES)
def test_the_docstring_says_where_it_comes_from_and_how_to_launch_it(name):
    doc, _ = read(name)
    doc = re.sub(r"\\\n\s*", "", doc)  # a line may go on in the next
    lines = [line.strip() for line in doc.splitlines() if line.strip().startswith("scaling-perception train")]
    assert lines and all(f"configs/{name}" in line and "--workdir" in line for line in lines)
    for line in lines:
        words = line.split()
        load_config(words[words.index("--config") + 1])  # each launch line is accepted as it stands
    assert re.search(r"paper|facts|shipped", doc)


def test_paper_values():
    depth = load_config("configs/depth.py")
    assert (depth.train.steps, depth.train.batch_size, depth.optim.lr, depth.optim.lr_final) == (
        30000,
        1024,
        1.2e-4,
        1.2e-6,
    )
    assert (depth.optim.warmup, depth.optim.schedule, depth.optim.ema) == (100, "exponential", 0.9999)
    assert (depth.optim.b1, depth.optim.b2, depth.optim.weight_decay, depth.optim.grad_clip) == (0.9, 0.999, 0.0, 0.0)
    ladder = load_config("configs/depth.py:model=a4,res=256")
    assert (ladder.train.batch_size, ladder.optim.lr, ladder.optim.lr_final) == (32, 3e-5, 3e-7)
    flow, amodal = load_config("configs/flow.py"), load_config("configs/amodal.py")
    assert (flow.train.steps, flow.resolution, flow.task_options.flow_divisor) == (40000, 512, 75.0)
    assert (amodal.train.steps, amodal.train.batch_size, amodal.resolution) == (6000, 4096, 256)
    assert network_of(depth).cond_channels == 4 and network_of(depth).label_rows == 1001
    generalist = network_of(load_config("configs/generalist.py"))
    assert generalist.label_rows == 1005 and generalist.routed and generalist.input_channels == 12


def test_overrides_take_the_type_of_the_field():
    changes = ["optim.lr=3", "train.steps=1e4", "data.flip=false", "model_changes.depth=3", "seed=7"]
    config = load_config("configs/depth.py", [*changes, "task_options.depth_quantiles=[0.1, 0.9]"])
    assert config.optim.lr == 3.0 and isinstance(config.optim.lr, float)
    assert config.train.steps == 10_000 and isinstance(config.train.steps, int)
    assert config.data.flip is False and config.seed == 7
    assert config.model_changes.to_dict() == {"cond_channels": 4, "depth": 3}
    assert config.task_options.depth_quantiles == (0.1, 0.9)
    config = load_config("configs/mini.py", ["data.mixture={}", "data.mixture.depth={'task': 'depth'}", "init=a=b"])
    assert config.data.mixture.to_dict() == {"depth": {"task": "depth"}} and config.init == "a=b"
    config = load_config("configs/depth.py", ["model_changes={'cond_channels': 8}"])
    assert config.model_changes.to_dict() == {"cond_channels": 8}  # replaced, not merged
    held = "held_out.mixture.a={'task': 'depth'}"
    config = load_config("configs/depth.py", ["data.mixture.depth.resolution=48", held, "held_out.mixture.a.root=12"])
    assert config.data.mixture.depth.resolution == 48
    assert config.held_out.mixture.to_dict() == {"a": {"task": "depth", "root": "12"}}
    with pytest.raises((KeyError, AttributeError)):
        config.optim.rate = 1.0  # locked


@pytest.mark.parametrize(
    ("spec", "override", "words"),
    [
        ("configs/dept.py", "", r"config configs/dept.py does not exist; did you mean 'configs/depth.py'\?"),
        ("configs/depth.py:modle=a1", "", "config argument 'modle' is unknown; did you mean 'model'"),
        ("configs/depth.py:model", "", "config argument 'model' has no value"),
        ("configs/depth.py:res=big", "", "config argument 'res' is 'big': give a value of type int"),
        ("configs/depth.py:recipe=finale", "", "did you mean 'final'"),
        (
            "configs/depth.py",
            "data.mixture.depth.resolution=wide",
            "data.mixture.depth.resolution is 'wide': give a whole",
        ),
        ("configs/depth.py", "data.mixture.dept.count=4", "data.mixture has no entry 'dept'; did you mean 'depth'"),
        (
            "configs/depth.py",
            "held_out.mixture.depth.count=4",
            "no entry 'depth'; give a new entry as a whole: --config",
        ),
        ("configs/depth.py", "data.mixture.depth.resoluton=4", "unknown config key 'data.mixture.depth.resoluton'"),
        ("configs/depth.py", "lr=1", "unknown config key 'lr'; did you mean 'optim.lr'"),
        ("configs/depth.py", "optim.learning=1", "unknown config key 'optim.learning'"),
        ("configs/depth.py", "optm.b1=1", "did you mean 'optim.b1'"),
        ("configs/depth.py", "optim.lr=fast", "config.optim.lr is 'fast': give a value of type float"),
        ("configs/depth.py", "train.steps=1.5", "config.train.steps is '1.5': give a value of type int"),
        ("configs/depth.py", "data.flip=maybe", "type bool"),
        ("configs/depth.py", "optim=3", "give a value of type table"),
        ("configs/depth.py", "optim.lr", "has no value: write --config.some.key=value"),
        ("configs/depth.py", "seed.x=1", "'seed' holds one value, no keys"),
        ("configs/depth.py", "task_options.depth_quantiles=3", "type tuple"),
    ],
)
def test_mistakes_are_told_in_one_line(spec, override, words):
    with pytest.raises(UserError, match=words) as told:
        load_config(spec, [override] if override else [])
    assert "\n" not in str(told.value)


def test_places_where_a_config_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config("configs/depth.py") == (ROOT / "configs" / "depth.py").resolve()
    assert find_config("depth.py").name == "depth.py"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "amodal.py").write_text((ROOT / "configs" / "amodal.py").read_text().replace("256", "128"))
    assert load_config("configs/amodal.py").resolution == 128  # the working folder comes first, and finds our common.py
    packaged = tmp_path / "packaged"
    packaged.mkdir()
    (packaged / "only.py").write_text(
        "def get_config(arg=''):\n    from . import common\n    return common.defaults()\n"
    )
    monkeypatch.setattr(configs, "_SHIPPED", (packaged, ROOT / "configs"))
    assert load_config("configs/only.py").model == "XL/2"


def test_files_that_are_no_configs(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "b.py").write_text("def get_config(arg=''):\n    return {}\n")
    (tmp_path / "c.py").write_text("def get_config(:\n")
    for name, words in [("a", "has no get_config"), ("b", "returns dict"), ("c", "line 1")]:
        with pytest.raises(UserError, match=words):
            load_config(str(tmp_path / f"{name}.py"))


def test_convert_and_flatten():
    assert convert("x", True, "no") is False and convert("x", 3, "30_000") == 30_000
    with pytest.raises(UserError):
        convert("x", 3, "inf")
    nested = ConfigDict({"a": {"b": 1, "c": {}}, "d": (1, 2)})
    assert flatten(nested) == {"a.b": 1, "a.c": {}, "d": (1, 2)}


def test_loading_a_config_needs_no_jax():
    code = (
        "import sys; from scaling_perception.support.configs import load_config; load_config('configs/depth.py');"
        "sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_an_edit_within_the_same_second_counts(tmp_path):
    path = tmp_path / "own.py"
    text = "from ml_collections import ConfigDict\nfrom . import common\n\n\ndef get_config(arg=''):\n"
    text += "    config = common.defaults()\n    config.seed = 3\n    return config\n"
    for seed in "34":
        path.write_text(text.replace("3", seed))
        os.utime(path, (1_000_000_000, 1_000_000_000))
        assert load_config(str(path)).seed == int(seed)
    assert not (tmp_path / "__pycache__").exists()


@pytest.mark.parametrize("spec", ["finetune.py:", "one_step.py:", "upcycle.py:task=generalist,model=mini,res=128,"])
def test_a_start_keeps_the_passes_that_it_knows(spec, tmp_path):
    for init, rows in (("mini", 5), ("mini-scenes", 4), (str(SHIPPED / "mini"), 5), (str(tmp_path), 4)):
        config = load_config(f"configs/{spec}init={init}")
        assert network_of(config).task_labels == rows
        more = 32 if rows == 5 else 0
        assert (network_of(config).features, config.autoencoder) == (more, "tiny+lite0+match" if more else "tiny")
        assert config.task_options.flow_frame == ("native" if init == str(tmp_path) else "square")
