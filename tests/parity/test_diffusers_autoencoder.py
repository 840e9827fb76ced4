"""The full-size Stable Diffusion autoencoder against diffusers: its weights, written by diffusers, on a photograph."""

import numpy as np
import pytest
from sklearn.datasets import load_sample_image

from sra_jax.data.images import centre_crop, read_image
from sra_jax.interop import autoencoder as interop
from sra_jax.models.autoencoder import AutoencoderConfig

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

TOLERANCE = 1e-4


def relative(ours, theirs):
    theirs = np.moveaxis(theirs.numpy(), 1, -1)
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """diffusers' autoencoder and ours with the same random weights, through files that diffusers wrote."""
    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    ).eval()  # fmt: skip
    theirs.save_pretrained(folder)
    assert sum(parameter.numel() for parameter in theirs.parameters()) == 83_653_863
    ours = interop.load(str(folder))
    assert ours.config == AutoencoderConfig()
    return theirs, ours


def test_encode_and_decode_a_photograph(both):
    theirs, ours = both
    photo = np.asarray(centre_crop(read_image(load_sample_image("china.jpg")), 256))
    images = (photo[None] / 127.5 - 1).astype(np.float32)
    with torch.inference_mode():
        posterior = theirs.encode(torch.from_numpy(images).permute(0, 3, 1, 2)).latent_dist
        decoded = theirs.decode(posterior.mean).sample
    mean, std = ours.encode(images)
    assert mean.shape == (1, 32, 32, 4)
    assert relative(mean, posterior.mean) < TOLERANCE
    assert np.abs(np.asarray(std) / np.moveaxis(posterior.std.numpy(), 1, -1) - 1).max() < TOLERANCE
    assert relative(ours.decode(np.moveaxis(posterior.mean.numpy(), 1, -1)), decoded) < TOLERANCE


def test_diffusers_reads_what_we_write(tmp_path):
    config = AutoencoderConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)
    torch.manual_seed(1)
    theirs = diffusers.AutoencoderKL(
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    tensors = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    interop.save(tmp_path / "ours", config, interop.params_from_tensors(tensors, config, "diffusers"))
    back = diffusers.AutoencoderKL.from_pretrained(tmp_path / "ours", low_cpu_mem_usage=False)
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[name]), name
