"""What is done beside training, ours and in PyTorch: encoding by the VAE, the FID network, the metrics.

Each side lives in a process of its own (sides.py) and does one task at a time. Weights and features are random: neither
speed nor memory depends on them.
"""

import dataclasses
import importlib.util
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

PEERS = {
    "vae": "diffusers", "inception": "torch_fidelity", "statistics": "torch_fidelity", "fid": "torch_fidelity",
    "inception_score": "torch_fidelity", "precision_recall": "torch_fidelity", "kid": "torch_fidelity",
}  # fmt: skip
"""Task -> the package that does it in PyTorch."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much a task is given.

    Attributes:
      images: at a time, of the VAE and of the FID network.
      image_size: their height and width.
      features: of each of two sets, (features,2048), for the metrics; logits (features,1008).
      small_vae: one of a hundredth of the size, for tests.
    """

    images: int = 4
    image_size: int = 256
    features: int = 10_000
    small_vae: bool = False

    @property
    def texts(self) -> dict[str, str]:
        """Task -> what it does, as a table says it."""
        images = f"{self.images} images of {self.image_size} pixels"
        return {
            "vae": f"the VAE encodes {images}", "inception": f"the FID network, {images}",
            "statistics": f"mean and covariance of {self.features:,} features",
            "fid": "FID of two means and covariances",
            "inception_score": f"inception score of {self.features:,} images",
            "precision_recall": f"precision and recall, {self.features:,} features against as many",
            "kid": "KID, 100 subsets of 1,000",
        }  # fmt: skip

    def pictures(self) -> np.ndarray:
        """(N,H,W,3) uint8."""
        shape = (self.images, self.image_size, self.image_size, 3)
        return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)

    def pool(self) -> tuple[np.ndarray, np.ndarray]:
        """Two sets (features,2048) float32, positive and correlated as an Inception's are."""
        generator = np.random.default_rng(1)
        mixing = generator.standard_normal((256, 2048), dtype=np.float32) / 16
        first, second = (
            np.maximum(generator.standard_normal((self.features, 256), dtype=np.float32) @ mixing + shift, 0)
            for shift in (0.0, 0.1)
        )
        return first, second

    def logits(self) -> np.ndarray:
        """(features,1008) float32."""
        return 2 * np.random.default_rng(2).standard_normal((self.features, 1008), dtype=np.float32)


class _Side:
    """Prepares tasks by name and times them.

    Args:
      text: `Sizes` as JSON.
    """

    def __init__(self, text: str):
        self.sizes = Sizes(**json.loads(text))
        self._tasks: dict[str, Callable[[], Any]] = {}

    def prepare(self, task: str) -> None:
        """Make what the task needs, and do it once."""
        self._tasks[task] = getattr(self, f"make_{task}")()
        self._tasks[task]()

    def run(self, task: str) -> float:
        """Seconds of a task."""
        start = time.perf_counter()
        self._tasks[task]()
        return time.perf_counter() - start


class JaxTasks(_Side):
    """Ours."""

    def make_vae(self) -> Callable[[], Any]:
        """From pixels in [-1, 1] on the device to means and deviations there."""
        import jax

        vae = random_autoencoder(self.sizes.small_vae)
        images = jax.device_put(self.sizes.pictures().astype(np.float32) / 127.5 - 1)
        return lambda: jax.block_until_ready(vae.encode(images))

    def make_inception(self) -> Callable[[], Any]:
        """From uint8 pixels to pool features and logits."""
        import jax

        from sra_jax.evaluation.extractors import build_extractor

        extractor = build_extractor("inception_random")
        parameters, apply = jax.device_put(extractor.parameters), jax.jit(extractor.apply)
        images = self.sizes.pictures()
        return lambda: jax.block_until_ready(apply(parameters, images))

    def make_statistics(self) -> Callable[[], Any]:
        """Mean and covariance, float64."""
        from sra_jax.evaluation.statistics import gaussian_statistics

        first, _ = self.sizes.pool()
        return lambda: gaussian_statistics(first)

    def make_fid(self) -> Callable[[], Any]:
        """The distance alone."""
        from sra_jax.evaluation.frechet import frechet_distance
        from sra_jax.evaluation.statistics import gaussian_statistics

        first, second = map(gaussian_statistics, self.sizes.pool())
        return lambda: frechet_distance(first, second)

    def make_inception_score(self) -> Callable[[], Any]:
        """Of ten parts."""
        from sra_jax.evaluation.inception_score import inception_score

        logits = self.sizes.logits()
        return lambda: inception_score(logits, split_size=max(1, len(logits) // 10))

    def make_precision_recall(self) -> Callable[[], Any]:
        """With three neighbours."""
        from sra_jax.evaluation.precision_recall import precision_recall

        first, second = self.sizes.pool()
        return lambda: precision_recall(first, second)

    def make_kid(self) -> Callable[[], Any]:
        """Of the polynomial kernel."""
        from sra_jax.evaluation.kid import kernel_distance

        first, second = self.sizes.pool()
        return lambda: kernel_distance(first, second)


class PytorchTasks(_Side):
    """diffusers' VAE, torch-fidelity's network and metrics, as they are."""

    def __init__(self, text: str):
        super().__init__(text)
        import torch

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        torch.set_grad_enabled(False)
        self._torch = torch

    def make_vae(self) -> Callable[[], Any]:
        """Channels last in memory, as ours."""
        from diffusers import AutoencoderKL

        torch, small = self._torch, self.sizes.small_vae
        vae = AutoencoderKL(
            block_out_channels=(32,) * 4 if small else (128, 256, 512, 512), layers_per_block=1 if small else 2,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        ).eval()  # fmt: skip
        vae = vae.to(memory_format=torch.channels_last)
        images = torch.from_numpy(self.sizes.pictures().astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2)
        images = images.contiguous(memory_format=torch.channels_last)
        return lambda: vae.encode(images).latent_dist.mean.numpy()

    def make_inception(self) -> Callable[[], Any]:
        """With its initial weights."""
        network, pictures = untrained_inception(), self.sizes.pictures()
        return lambda: network(self._torch.from_numpy(pictures.transpose(0, 3, 1, 2).copy()))

    def make_statistics(self) -> Callable[[], Any]:
        """NumPy's mean and covariance."""
        from torch_fidelity.metric_fid import fid_features_to_statistics

        first = self._torch.from_numpy(self.sizes.pool()[0])
        return lambda: fid_features_to_statistics(first)

    def make_fid(self) -> Callable[[], Any]:
        """The distance alone."""
        from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

        first, second = (fid_features_to_statistics(self._torch.from_numpy(x)) for x in self.sizes.pool())
        return lambda: fid_statistics_to_metric(first, second, False)

    def make_inception_score(self) -> Callable[[], Any]:
        """Of ten parts."""
        from torch_fidelity.metric_isc import isc_features_to_metric

        logits = self._torch.from_numpy(self.sizes.logits())
        return lambda: isc_features_to_metric(logits)

    def make_precision_recall(self) -> Callable[[], Any]:
        """With three neighbours."""
        from torch_fidelity.metric_prc import prc_features_to_metric

        first, second = (self._torch.from_numpy(x) for x in self.sizes.pool())
        return lambda: prc_features_to_metric(first, second, verbose=False)

    def make_kid(self) -> Callable[[], Any]:
        """Of the polynomial kernel."""
        from torch_fidelity.metric_kid import kid_features_to_metric

        first, second = (self._torch.from_numpy(x) for x in self.sizes.pool())
        size = min(1000, len(first))
        return lambda: kid_features_to_metric(first, second, verbose=False, kid_subset_size=size)


def random_autoencoder(small: bool, **options: Any) -> Any:
    """Stable Diffusion's VAE with random weights, or one of a hundredth of its size; `options` of `Autoencoder`."""
    import jax

    from sra_jax.models.autoencoder import Autoencoder, AutoencoderConfig, abstract_model

    config = AutoencoderConfig(block_out_channels=(32,) * 4, layers_per_block=1) if small else AutoencoderConfig()
    generator = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: generator.normal(0, 0.02, x.shape).astype(np.float32), abstract_model(config)[1]
    )  # fmt: skip
    return Autoencoder(config, params, **options)


def untrained_inception() -> Callable[[Any], Any]:
    """torch-fidelity's network with its initial weights, of uint8 images (N,3,H,W)."""
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Untrained(FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict: Any) -> None:
            return None

    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        torch.save({}, file.name)
        return Untrained("untrained", ["2048", "logits_unbiased"], file.name)


def missing_peers() -> list[str]:
    """Packages of `PEERS`, and torch, that are not installed."""
    return [name for name in dict.fromkeys(("torch", *PEERS.values())) if importlib.util.find_spec(name) is None]


def machine() -> str:
    """The processor's name as the system gives it, and how many cores this process may use."""
    name = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        lines = (line.partition(":") for line in info.read_text().splitlines())
        name = next((value.strip() for key, _, value in lines if key.strip() == "model name"), name)
    return f"{len(os.sched_getaffinity(0))} cores of {name}"
