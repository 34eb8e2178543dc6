"""Eight CPU devices for every test, a shared compilation cache, where reference arrays are, and what is skipped."""

import gc
import importlib.metadata
import importlib.util
import os
import re
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of a test's time is compiling: LLVM's optimisations cost more than they bring at these sizes, and the emitters by
# way of MLIR take twice as long as those that write LLVM's code directly.
_XLA_FLAGS = ["--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"]
if importlib.metadata.version("jaxlib") < "0.11":  # XLA ends the process where a flag is gone
    _XLA_FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_XLA_FLAGS]).strip()
_CACHE = os.path.join(tempfile.gettempdir(), f"scaling-perception-jax-{os.getuid()}")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _CACHE)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ["SCALING_PERCEPTION_EXECUTABLES"] = ""  # tests count what is traced
os.environ.setdefault("XDG_CACHE_HOME", _CACHE + "-user")  # hashes of the tests' files are nothing for the user's own

import jax  # noqa: E402
import pytest  # noqa: E402
from absl import flags  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
# Traced programs are millions of objects that stay: looking through them for cycles took a tenth of the time.
gc.set_threshold(50_000, 20, 50)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in a shell's background; the tests' children inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
flags.FLAGS.mark_as_parsed()  # grain reads absl flags; a test run has none

HERE = Path(__file__).parent
SHARED = Path(os.environ.get("SCALING_PERCEPTION_SHARED", HERE.parent.parent / "shared"))
# Marker: the fixture that gives it, whether it is here, and the reason to skip where it is not.
NEEDS = {
    "torch": (
        "torch",
        importlib.util.find_spec("torch") is not None,
        "needs PyTorch: pip install 'scaling-perception[torch]'",
    ),
    "shared": (
        "shared_dir",
        (SHARED / "golden").is_dir(),
        f"needs ../shared: no reference material at {SHARED}; set SCALING_PERCEPTION_SHARED",
    ),
}


SHAPED = ("models", "diffusion", "ops", "tasks", "inference")  # rooms whose signatures have shapes


def pytest_addoption(parser):
    parser.addoption("--shapes", action="store_true", help="check the shapes and dtypes of signatures at every call")


def pytest_configure(config):
    if config.getoption("--shapes"):
        from jaxtyping import install_import_hook

        rooms = [f"scaling_perception.{room}" for room in SHAPED]
        early = [name for name in sys.modules if name.startswith(tuple(rooms))]
        assert not early, f"imported before their signatures could be checked: {early}"
        install_import_hook(rooms, "shape_checks.check")
    if "SCALING_PERCEPTION_SHARED" in os.environ and not NEEDS["shared"][1]:
        raise pytest.UsageError(f"SCALING_PERCEPTION_SHARED={SHARED} has no folder golden: correct or unset it")


# The files that take longest, first, so that no process is left with one of them at the end.
LONGEST = (
    "training/test_processes.py",
    "test_shipped.py",
    "test_compile.py",
    "models/test_dispatch.py",
    "training/test_meshes.py",
    "test_colabs.py",
    "training/test_checkpoint_crashes.py",
    "models/test_dit.py",
    "training/test_pretrain.py",
    "training/test_start.py",
    "test_quickstart.py",
    "models/test_matching.py",
    "training/test_one_step.py",
    "test_legacy.py",
    "training/test_train.py",
    "models/test_moe.py",
    "data/test_workers.py",
    "training/test_resume.py",
    "models/test_vae.py",
    "inference/test_engine.py",
    "test_normals_verbs.py",
    "training/test_averaging.py",
    "evaluation/test_sweep.py",
    "test_evaluate.py",
    "ops/test_grouped_matmul.py",
    "data/test_pipeline.py",
    "models/test_autoencoders.py",
    "training/test_autoencoder.py",
    "training/test_accumulation.py",
    "training/test_spikes.py",
    "training/test_optim.py",
    "test_convert.py",
    "test_house.py",
    "tasks/test_ensemble.py",
    "models/test_surgery.py",
    "inference/test_adaptive.py",
    "support/test_executables.py",
    "inference/test_merging_latents.py",
    "training/test_prompts.py",
    "test_bench.py",
    "test_bench_data.py",
    "test_presets_verb.py",
)


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items):
    """Long files go first; what asks for PyTorch or the reference material, through a fixture too, is marked."""
    place = {HERE / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))
    for item in items:
        for marker, (fixture, _, _) in NEEDS.items():
            if fixture in item.fixturenames:
                item.add_marker(marker)


def pytest_runtest_setup(item):
    for marker, (_, here, reason) in NEEDS.items():
        if not here and item.get_closest_marker(marker):
            pytest.skip(reason)


def count_reasons(reasons: list[str]) -> str:
    """One line: «skipped: 12 need PyTorch, 7 need ../shared». A reason reads «needs WHAT: how to get it»."""
    missing = [re.sub(r"^could not import '([\w.]+)'", r"needs \1", reason) for reason in reasons]
    counts = Counter(reason.split(": ")[0] for reason in missing)
    words = (f"{n} {what.replace('needs ', 'need ', 1) if n > 1 else what}" for what, n in counts.most_common())
    return "skipped: " + ", ".join(words)


@pytest.hookimpl(trylast=True)  # the last line but pytest's own
def pytest_terminal_summary(terminalreporter):
    reasons = [report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.stats.get("skipped", [])]
    if reasons:
        terminalreporter.write_line(count_reasons(reasons))


@pytest.fixture(scope="module")
def one_device():
    """Runs of the command train use one device, whatever their config says: it compiles in half the time of eight."""
    from scaling_perception.parallel import mesh

    one = mesh.make_mesh(devices=jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesh, "make_mesh", lambda **_: one)
        yield one


@pytest.fixture(scope="session")
def golden() -> Path:
    """Small reference arrays that travel with the tests."""
    return HERE / "golden"


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Real samples and larger reference arrays. Tests that ask for them carry the marker `shared`."""
    return SHARED


@pytest.fixture(scope="session")
def torch():
    """PyTorch, for comparison. Tests that ask for it carry the marker `torch`."""
    return pytest.importorskip("torch")
