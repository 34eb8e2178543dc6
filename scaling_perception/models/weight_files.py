"""Reading the weight files of autoencoders and of what goes with them."""

from pathlib import Path

import ml_dtypes  # noqa: F401  gives numpy the name bfloat16
import numpy as np

from scaling_perception.support.errors import UserError


def read_safetensors(file: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Every tensor of a file (bfloat16 becomes float32) and its metadata.

    Raises:
        UserError: the file is missing, truncated or no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise UserError(f"{file} does not exist: give a folder with a whole autoencoder, or 'tiny'")
    try:
        # numpy's arrays: through JAX a program is compiled for each shape
        with safe_open(file, framework="numpy") as handle:
            metadata = handle.metadata() or {}
            state = {name: np.asarray(handle.get_tensor(name), np.float32) for name in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is truncated or no safetensors file ({error}): copy or download it again") from None
    return state, metadata
