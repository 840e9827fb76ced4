from tests.fixtures import coco_folder, image_folder, tiny_clip, tiny_vae  # noqa: F401
