from tests.fixtures import image_folder, tiny_vae  # noqa: F401
