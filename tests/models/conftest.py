from tests.fixtures import tiny_vae  # noqa: F401
