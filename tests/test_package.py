"""What is installed and published: lean imports, the wheel, one repository address, the workflows."""

import importlib.metadata
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import yaml
from PIL import Image

import scaling_perception
from scaling_perception.support.compilation import EXECUTABLES

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))

# ---- Lean ------------------------------------------------------------------------------------------------------------

HEAVY = ("tensorflow_datasets", "tensorflow_metadata", "transformers", "orbax", "grain", "pyarrow", "pandas", "torch")


def cpu_seconds(words, **options):
    """Processor seconds, user and system, of a process that must succeed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, **options)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def picture(folder):
    Image.linear_gradient("L").resize((96, 64)).convert("RGB").save(folder / "photo.png")
    return folder / "photo.png"


def test_help_takes_little_time():
    assert min(cpu_seconds([sys.executable, "-m", "scaling_perception", "--help"]) for _ in range(2)) < 0.4


def test_predict_imports_nothing_that_it_does_not_use(tmp_path):
    words = ["predict", "--task", "depth", "--steps", "1", "--ensemble", "1", "--out", "out", str(picture(tmp_path))]
    code = (
        "import sys\n"
        "from scaling_perception.cli import main\n"
        f"assert main({words!r}) == 0\n"
        f"found = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "assert not found, found"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "out").glob("photo_depth*.png"))


@pytest.mark.slow  # a quiet machine: other processes make the same work cost up to twice as much
def test_a_warm_predict_takes_few_seconds_beyond_the_import_of_jax(tmp_path):
    one = picture(tmp_path)
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", EXECUTABLES)}
    environment["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path / "programs")
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"  # the command's own
    words = [sys.executable, "-m", "scaling_perception", "predict", "--task", "depth", "--model", "mini"]
    words += ["--overwrite", "--out", tmp_path / "out", one]
    cpu_seconds(words, env=environment)  # compiles
    jax = [cpu_seconds([sys.executable, "-c", "import jax"], env=environment) for _ in range(3)]
    warm = [cpu_seconds(words, env=environment) for _ in range(3)]
    assert min(warm) - min(jax) < 3  # 2.0


# ---- The wheel -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_wheel_works_in_an_empty_environment_elsewhere(tmp_path):
    """Built as published, from the source distribution; dependencies come from the present environment."""
    pytest.importorskip("build", reason="needs build: pip install build")
    source = tmp_path / "source"  # as committed: files that git ignores are not in a wheel either
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".git", "__pycache__", ".*_cache"))
    built = subprocess.run(
        [sys.executable, "-m", "build", "--outdir", str(tmp_path / "dist"), str(source)], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stdout + built.stderr
    shutil.rmtree(source)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert wheel.stat().st_size <= 15e6
    names = set(zipfile.ZipFile(wheel).namelist())
    here = [path for folder in ("scaling_perception", "configs") for path in (ROOT / folder).rglob("*")]
    files = {str(path.relative_to(ROOT)) for path in here if path.is_file() and path.suffix != ".pyc"}
    files = {re.sub("^configs/", "scaling_perception/_configs/", name) for name in files}
    assert not files - names, "files of the package that the wheel lacks"
    assert not {name for name in names - files if ".dist-info/" not in name}, (
        "files of the wheel that are no part of it"
    )

    python = tmp_path / "venv" / "bin" / "python"
    venv.create(tmp_path / "venv", with_pip=False)
    words = ["--python", str(python), "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *words], check=True)
    site = subprocess.check_output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True)
    # on the path behind the wheel; the .pth file of an editable installation there has no effect
    (Path(site.strip()) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    away = tmp_path / "away"
    away.mkdir()
    picture(away)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*words):
        done = subprocess.run([str(word) for word in words], cwd=away, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    where = run(python, "-c", "import scaling_perception; print(scaling_perception.__file__)")
    assert Path(where.strip()).is_relative_to(tmp_path / "venv")
    command = tmp_path / "venv" / "bin" / "scaling-perception"
    assert "predict" in run(command, "--help")
    assert run(command, "--version").split()[-1] == scaling_perception.__version__
    run(command, *"predict --task depth --model mini --steps 1 --ensemble 2 --out out photo.png".split())
    assert list((away / "out").glob("photo_depth*.png"))
    run(command, *"fit paper:fig8b --form power --bootstraps 100 --json law.json".split())  # as a notebook does
    code = "from scaling_perception.support.configs import load_config; print(load_config('configs/mini.py').to_json())"
    assert json.loads(run(python, "-c", code))["train"]


# ---- What is published beside it -------------------------------------------------------------------------------------


def test_every_file_names_the_address_of_pyproject():
    repository = PROJECT["urls"]["Repository"]
    owner, name = repository.removeprefix("https://github.com/").split("/")
    allowed = (repository, f"{owner}/{name}", f"https://{owner}.github.io/{name}/")
    files = [ROOT / one for one in ("README.md", "CITATION.cff", "CHANGELOG.md", "mkdocs.yml")]
    files += [*ROOT.glob(".github/ISSUE_TEMPLATE/*.yml"), *ROOT.glob("colabs/*.ipynb"), *ROOT.glob("docs/*.md")]
    found = {}
    for path in (path for path in files if path.exists()):
        for address in re.findall(r"[\w./:+-]*scaling-perception/[\w./:@-]*", path.read_text(encoding="utf-8")):
            found.setdefault(path.name, []).append(address)
            if "github" in address:
                assert any(one in address for one in allowed), f"{path}: {address}"
    assert "CITATION.cff" in found


def test_versions_agree():
    assert importlib.metadata.version("scaling-perception") == scaling_perception.__version__
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == scaling_perception.__version__
    assert cited["repository-code"] == PROJECT["urls"]["Repository"] and cited["license"] == PROJECT["license"]
    assert f"\n## {scaling_perception.__version__}\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_workflows_run_what_the_project_supports():
    jobs = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"] for path in WORKFLOWS}
    assert jobs.keys() == {"tests", "docs", "publish"}
    tested = jobs["tests"]["tests"]["strategy"]["matrix"]["python-version"]
    prefix = "Programming Language :: Python :: 3."
    assert tested == [one.removeprefix(prefix[:-2]) for one in PROJECT["classifiers"] if one.startswith(prefix)]
    assert PROJECT["requires-python"] == f">={tested[0]}"
    lines = " ".join(step.get("run", "") for one in jobs.values() for job in one.values() for step in job["steps"])
    for extra in re.findall(r"\.\[(\w+)\]", lines):
        assert extra in PROJECT["optional-dependencies"], extra
    publisher = jobs["publish"]["publish"]
    assert publisher["permissions"] == {"id-token": "write"} and "secrets." not in WORKFLOWS[1].read_text()


def test_workflows_pass_actionlint():
    if not shutil.which("actionlint"):
        pytest.skip("needs actionlint: https://github.com/rhysd/actionlint")
    done = subprocess.run(["actionlint", *map(str, WORKFLOWS)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path):
    for module in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(module, reason="needs the extra docs: pip install 'scaling-perception[docs]'")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > len(list((ROOT / "docs").glob("*.md")))
    loads = re.compile(
        r"""<(?:script|img|iframe)[^>]*\ssrc="(?:https?:)?//|<link[^>]*rel="(?!canonical|edit)[^"]*"[^>]*href="https?://"""
    )
    for page in pages:
        found = loads.search(page.read_text(encoding="utf-8"))
        assert not found, f"{page}: {found[0]}"


def test_the_navigation_lists_every_page_once():
    listed = re.findall(r"^ +- .*: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))
