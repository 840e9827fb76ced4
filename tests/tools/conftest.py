import pytest

from sra_jax.evaluation import extractors
from sra_jax.evaluation.datasets import named_images
from tests.conftest import made_once
from tests.fixtures import coco_folder, image_folder, tiny_clip, tiny_vae  # noqa: F401


@pytest.fixture(scope="module")
def classifier_cache(tmp_path_factory):
    """A cache that holds the classifier of the digits, which the session trains once."""
    patch = pytest.MonkeyPatch()
    with made_once(tmp_path_factory, "classifiers") as (folder, to_do):
        patch.setenv("SRA_JAX_CACHE", str(folder))
        if to_do:
            extractors.trained_on(named_images("digits", 8, 1), progress=False)
    yield folder
    patch.undo()
