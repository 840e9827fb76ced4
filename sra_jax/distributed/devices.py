"""Whether there are devices at all: asked before any work, so that a machine without them says so in one line."""

import os

import jax

from sra_jax.errors import UserError


def check_devices() -> None:
    """Find this process's devices; nothing is compiled.

    Raises:
      UserError: JAX has none of the platforms that it was told to use, or one that cannot be started.
    """
    try:
        jax.devices()
    except (AssertionError, RuntimeError) as error:  # the first where a platform is left out without a word
        asked = os.environ.get("JAX_PLATFORMS", "")
        told = f"JAX_PLATFORMS={asked}" if asked else "JAX"
        reason = (str(error).strip().splitlines() or ["there is no such device here"])[0][:200]
        raise UserError(
            f"{told} finds no device to compute on ({reason}): leave JAX_PLATFORMS out to use what is there, or "
            "install the plugin of the device, such as jax[cuda13] or jax[tpu]"
        ) from error
