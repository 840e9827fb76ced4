"""From images to a trained model through the tools: latents are prepared, trained on, resumed and decoded."""

import jax
import numpy as np
from PIL import Image

from tests.checkpoints import final_state
from tests.conftest import TINY_DIGITS, run


def test_latents_train_resume_exactly_and_decode(image_folder, tiny_vae, tmp_path):
    latents = tmp_path / "latents"
    run("tools/prepare_latents.py", f"--source=imagefolder:{image_folder}", f"--vae={tiny_vae.folder}",
        "--image_size=16", "--batch_size=2", f"--output={latents}", "--dtype=bfloat16")  # fmt: skip
    flags = (
        *TINY_DIGITS, "--config.data.name=latents", f"--config.data.path={latents}", "--config.data.channels=4",
        "--config.data.num_classes=2", "--config.batch_size=4", "--config.checkpoint_every=3",
    )  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run("main.py", *flags, "--config.steps=6", "--config.sample_every=6", f"--workdir={whole}")
    run("main.py", *flags, "--config.steps=3", f"--workdir={parts}")
    resumed = run("main.py", *flags, "--config.steps=6", "--config.data.workers=2", f"--workdir={parts}")
    assert "resuming" in resumed.stdout
    assert "leaked" not in resumed.stderr  # the workers' memory
    jax.tree.map(np.testing.assert_array_equal, final_state(parts), final_state(whole))

    preview = np.asarray(Image.open(whole / "samples" / "step_0000006.png"))
    assert preview.shape[-1] == 3  # colours: decoded, not latents
    output = tmp_path / "samples.npz"
    run("tools/sample.py", f"--workdir={whole}", "--num_samples=3", "--sampling_steps=2", f"--output={output}")
    assert np.load(output)["arr_0"].shape == (3, 16, 16, 3)


def test_a_recipe_without_latents_says_how_to_make_them(tmp_path):
    done = run("main.py", "--config=configs/sit_b2.py", f"--workdir={tmp_path}", code=2)
    assert "tools/prepare_latents.py --source=" in done.stderr
    assert ":smoke" in done.stderr
