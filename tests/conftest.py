"""Eight CPU devices for every test, a shared compilation cache, and where reference arrays are."""

import os
import signal
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8").strip()
_CACHE = os.path.join(tempfile.gettempdir(), f"scaling-perception-jax-{os.getuid()}")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _CACHE)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import jax  # noqa: E402
import pytest  # noqa: E402
from absl import flags  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in a shell's background; the tests' children inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
flags.FLAGS.mark_as_parsed()  # grain reads absl flags; a test run has none

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def golden() -> Path:
    """Small reference arrays that travel with the tests."""
    return HERE / "golden"


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Real samples and larger reference arrays, beside the checkout; tests that need them skip without."""
    folder = Path(os.environ.get("SCALING_PERCEPTION_SHARED", HERE.parent.parent / "shared"))
    if not (folder / "golden").is_dir():
        pytest.skip(f"reference material not found at {folder} (set SCALING_PERCEPTION_SHARED)")
    return folder
