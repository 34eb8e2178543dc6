"""Each figure and table of the paper that has a training side: its runs, as published, and at toy size."""

import json
import re
from pathlib import Path

import pytest

from scaling_perception import train
from scaling_perception.scaling.dry_run import describe_run
from scaling_perception.support import configs
from scaling_perception.support.configs import config_runs, find_config, load_config
from scaling_perception.support.errors import UserError
from scaling_perception.support.verbs import make_parser
from scaling_perception.training.diffusion import network_of

ROOT = Path(__file__).parent.parent
FILES = sorted(path.stem for path in (ROOT / "configs" / "paper").glob("*.py") if path.stem != "shared")

# file: its runs, and (steps, batch, first rate, last rate) of each
GRID = {
    "fig2": (["a1", "a2", "a3", "a4", "a5", "a6"], (400_000, 256, 1e-4, 1e-4)),
    "fig3": (["a1", "a2", "a3", "a4", "a5", "a6"], (30_000, 32, 3e-5, 3e-7)),
    "fig4": ([f"{s}-{n}k" for s in ("pretrain", "finetune") for n in (60, 80, 100, 120)], None),
    "fig5": (["XL-2-256", "XL-2-512", "L-2-8E2A-256", "L-2-8E2A-512"], (30_000, 32, 3e-5, 3e-7)),
    "fig6": (
        [f"{m}-{x}" for m in ("a2", "a3", "a4") for x in ("4E2A", "8E1A", "8E2A", "8E4A", "16E2A")],
        (15_000, 32, 3e-5, 3e-7),
    ),
    "fig8ef": (["linear", "scaled_linear", "cosine"], (30_000, 32, 3e-5, 3e-7)),
    "fig9": (["dense", "upcycled"], None),
    "tab2": (["S-2-8E2A-256", "S-2-16E2A-256", "L-2-8E2A-256", "L-2-8E2A-512"], (400_000, 256, 1e-4, 1e-4)),
    "tab3": (["depth"], (30_000, 1024, 1.2e-4, 1.2e-6)),
    "tab4": (["flow"], (40_000, 1024, 1.2e-4, 1.2e-6)),
    "tab5": (["amodal"], (6_000, 4096, 1.2e-4, 1.2e-6)),
}
TRIAL = {"fig2": "textures", "tab2": "textures", "fig4": "textures"}


def test_every_figure_and_table_is_here():
    assert set(FILES) == set(GRID)


@pytest.mark.parametrize("stem", FILES)
def test_runs_are_those_of_the_paper(stem):
    found = config_runs(f"configs/paper/{stem}.py:data=DATA")
    names, values = GRID[stem]
    assert [name for name, _ in found] == names
    for name, spec in found:
        config = load_config(spec)
        network_of(config)
        optim, train = config.optim, config.train
        if values:
            assert (train.steps, train.batch_size, optim.lr, optim.lr_final) == values, name
        assert all(entry.root.startswith("DATA/") for entry in config.data.mixture.values())
        assert config.autoencoder == "stabilityai/sd-vae-ft-ema" and config.diffusion == "paper"
        json.dumps(config.to_dict())


def test_runs_start_from_one_another():
    def start(spec):
        return load_config(f"configs/paper/{spec}").init

    assert start("fig2.py:model=a3") == "" and start("fig3.py:model=a3,runs=R") == "R/fig2/a3"
    assert start("fig4.py:stage=finetune,pretrained=80000,runs=R") == "R/fig4/pretrain-80k"
    assert start("fig5.py:model=XL/2,res=512,models=M") == start("tab3.py:models=M") == "M/DiT-XL-2-512x512"
    assert start("tab5.py:models=M") == "M/DiT-XL-2-256x256" and start("fig6.py:model=a2,runs=R") == "R/fig3/a2"
    assert start("fig5.py:model=L/2-8E2A,res=512,runs=R") == "R/tab2/L-2-8E2A-512"
    assert start("fig9.py:stage=upcycled,runs=R") == "R/fig9/dense" and start("fig3.py:init=X") == "X"
    for stem in ("fig3", "fig4", "fig6", "fig8ef", "fig9"):  # and what they start from has that name
        for _, spec in config_runs(f"configs/paper/{stem}.py:runs=R,models=M"):
            init = Path(load_config(spec).init)
            if init.parts[:1] == ("R",):
                assert init.name in GRID[init.parts[1]][0]


def test_particulars():
    pretrain = load_config("configs/paper/fig4.py:stage=pretrain,pretrained=60000")
    assert pretrain.train.steps == 60_000 and pretrain.diffusion_changes.schedule == "linear"
    assert load_config("configs/paper/fig8ef.py:schedule=linear").diffusion_changes.schedule == "linear"
    assert load_config("configs/paper/fig8ef.py").train.keep_every == 5000
    upcycled = load_config("configs/paper/fig9.py:stage=upcycled,gating=paper")
    assert upcycled.train.steps == 4000 and network_of(upcycled).experts == 8 and upcycled.resolution == 512
    assert network_of(upcycled).gating == "paper" and network_of(upcycled).routed
    dense = load_config("configs/paper/fig9.py:caches=C")
    assert dense.data.cache.split(":") == ["C/pix2gestalt512", "C/hypersim512", "C/flying_chairs512"]
    assert load_config("configs/paper/fig2.py:caches=C").data.cache == "C/imagenet256"
    for stem in ("fig4", "fig9"):
        with pytest.raises(UserError, match="config argument 'stage' is 'finetun'"):
            load_config(f"configs/paper/{stem}.py:stage=finetun")


@pytest.mark.parametrize("stem", FILES)
def test_every_run_can_be_built_at_toy_size(stem):
    built = set()
    for name, spec in config_runs(f"configs/paper/{stem}.py:vae=tiny"):
        source = TRIAL.get(stem, "scenes") if "finetune" not in name else "scenes"
        file, _, arg = spec.partition(".py:")
        parts = [part for part in arg.split(",") if part.partition("=")[0] not in ("model", "res")]
        toy = f"{file}.py:{','.join([*parts, 'model=nano', 'res=64', f'source={source}'])}"
        if toy in built:  # runs that differ in size alone
            continue
        built.add(toy)
        told = describe_run(load_config(toy, ["train.batch_size=8", "mesh.data=1", "init="]))
        assert told["model"]["name"] == "nano" and told["model"]["tokens"] == 16
        assert told["data"]["sources"][0]["source"] == source and told["memory"]["total"] < 1e9


@pytest.mark.parametrize("stem", FILES)
def test_the_docstring_tells_arguments_and_launch_lines(stem):
    module = configs._execute(ROOT / "configs" / "paper" / f"{stem}.py")
    doc = re.sub(r"\\\n\s*", "", module.__doc__ or "")
    shared = configs._execute(ROOT / "configs" / "paper" / "shared.py")
    for key in module.ARGS:
        where = shared.__doc__ if key in shared.ARGS else doc
        assert f"``{key}``" in where, key
    lines = [line.strip() for line in doc.splitlines() if line.strip().startswith("scaling-perception train")]
    assert lines
    for line in lines:
        words = line.split()
        load_config(words[words.index("--config") + 1])
        assert words[words.index("--workdir") + 1].startswith(f"runs/paper/{stem}/")
    named = {name for name, _ in config_runs(f"configs/paper/{stem}.py")}
    assert {line.rsplit("/", 1)[1].removesuffix("-paper") for line in lines} <= named
    assert re.match(r"(Fig|Table)", module.__doc__)


def test_places_and_mistakes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config("configs/paper/fig2.py") == find_config("paper/fig2.py") == ROOT / "configs/paper/fig2.py"
    (tmp_path / "configs" / "paper").mkdir(parents=True)
    own = (ROOT / "configs" / "pretrain.py").read_text().replace("400_000", "7")
    (tmp_path / "configs" / "pretrain.py").write_text(own)
    text = (ROOT / "configs" / "paper" / "fig2.py").read_text()
    (tmp_path / "configs" / "paper" / "fig2.py").write_text(text)
    assert load_config("configs/paper/fig2.py").train.steps == 7  # the person's own files come before ours
    for name, words in (("configs/paper/fig1.py", "did you mean 'configs/paper/fig"), ("fig2.py", "fig2")):
        with pytest.raises(UserError, match=words):
            find_config(name)
    with pytest.raises(UserError, match="depth.py is one run: give it to `train` as it is"):
        config_runs("configs/depth.py")


def test_every_line_of_the_recipes_is_accepted():
    lines = (ROOT / "docs" / "recipes.md").read_text().replace("\\\n", " ").splitlines()
    told = [line.split() for line in lines if line.startswith("scaling-perception ")]
    assert {words[1] for words in told} == {"train", "prepare", "generate", "convert", "compile", "evaluate"}
    for _, verb, *words in told:
        if verb in ("train", "compile"):
            words, overrides = train.split_overrides(words)
            network_of(load_config(words[words.index("--config") + 1], overrides))
        make_parser(verb).parse_args(words)
