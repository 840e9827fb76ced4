"""Measure reading prepared latents and encoding images, each against its counterpart in the PyTorch world.

  # latents: shards against a loop over one .npy file an example, alternating, warm and (as root, on Linux) cold;
  # "pipeline" is what training reads from, with its shuffling and its threads
  python tools/benchmark.py data --folder=/tmp/benchmark --examples=8192

  # encoding: our autoencoder against diffusers' (needs torch and diffusers; weights are random, sizes are SD's)
  python tools/benchmark.py vae --folder=/tmp/benchmark

The data that is made in --folder is kept and used again. Every figure is the median or the best of --rounds rounds, in
which the contestants take turns.
"""

import functools
import itertools
import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from sra_jax import cli, values
from sra_jax.data import latents, pipeline
from sra_jax.data.moments import MomentsFolder
from sra_jax.data.preparation import MomentsCopier, prepare
from sra_jax.errors import UserError
from sra_jax.interop import autoencoder
from sra_jax.models.autoencoder import AutoencoderConfig

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Flags of the commands data and vae."""
    cli.path_flag("folder", None, "Where test data is made, on the disk that is measured.", local=True)
    cli.whole_flag("examples", 8192, "read: examples, with 32x32x4 means and standard deviations.", 1, 10_000_000)
    cli.whole_flag("shard_size", 4096, "read: examples a shard.", 1, values.BATCH_LIMIT)
    cli.whole_flag("batch_size", 256, "Examples a batch (read), images (encode: 4 is enough).", 1, values.BATCH_LIMIT)
    cli.whole_flag("epochs", 4, "read: passes over the examples; the pipeline starts anew each round.", 1, 1000)
    cli.whole_flag("image_size", 256, "encode: side of the images.", 1, 16_384)
    cli.whole_flag("rounds", 5, "How often each contestant runs.", 1, 1000)


def race(contestants: dict[str, Callable[[], int]], before: Callable[[], None] = lambda: None) -> None:
    """Run all contestants, which return how many items they worked on, in turn --rounds times and print their speed."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(FLAGS.rounds):
        for name, run in contestants.items():
            before()
            start = time.perf_counter()
            items = run()
            seconds[name].append((time.perf_counter() - start) / items)
    baseline = statistics.median(next(iter(seconds.values())))
    for name, times in seconds.items():
        median = statistics.median(times)
        print(f"  {name:34s} {1 / median:9.2f}/s, best {1 / min(times):9.2f}/s, {baseline / median:5.2f}x")


def drop_caches() -> None:
    """Empty Linux's page cache."""
    os.sync()
    pathlib.Path("/proc/sys/vm/drop_caches").write_text("3")


def train(source: latents.LatentSource, epochs: int) -> int:
    """Take batches as training does and do nothing with them; the number of examples."""
    rows = range(FLAGS.batch_size)
    count = epochs * len(source) // len(rows)
    stream = pipeline.batches(source, batch_size=len(rows), seed=0, rows=rows)
    for _ in itertools.islice(stream, count):
        pass
    stream.close()
    return count * len(rows)


def read() -> None:
    """Shards against .npy files."""
    folder = pathlib.Path(FLAGS.folder)
    npy = folder / f"npy{FLAGS.examples}"
    rng = np.random.default_rng(0)
    names = [f"{i // 1000:05d}/img-mean-std-{i:08d}.npy" for i in range(FLAGS.examples)]
    if not (npy / "dataset.json").exists():
        for name in names:
            (npy / name).parent.mkdir(parents=True, exist_ok=True)
            np.save(npy / name, np.abs(rng.standard_normal((8, 32, 32), np.float32)))
        labels = [[name, i % 1000] for i, name in enumerate(names)]
        (npy / "dataset.json").write_text(json.dumps({"labels": labels}))
    order = rng.permutation(FLAGS.examples)
    batches = [order[i : i + FLAGS.batch_size] for i in range(0, FLAGS.examples, FLAGS.batch_size)]

    def npy_loop() -> int:
        for batch in batches:
            np.stack([np.load(npy / names[i]) for i in batch])
        return FLAGS.examples

    sources: dict[str, latents.LatentSource] = {}
    contestants: dict[str, Callable[[], int]] = {"loop over .npy files": npy_loop}
    for dtype in ("float32", "float16"):
        output = folder / f"shards{FLAGS.examples}-{FLAGS.shard_size}-{dtype}"
        source = MomentsFolder(str(npy))
        config = AutoencoderConfig()
        prepare(
            source,
            MomentsCopier(source, config),
            str(output),
            source_name="benchmark",
            vae_name=autoencoder.DEFAULT_VAE,
            vae_fingerprint=None,
            vae_config=config,
            dtype=dtype,
            batch_size=256,
            shard_size=FLAGS.shard_size,
        )
        data = ConfigDict(
            {"path": str(output), "image_size": 32, "channels": 4, "num_classes": source.num_classes, "vae": ""}
        )
        loaded = latents.load(data).source
        assert isinstance(loaded, latents.LatentSource)

        def one_by_one(examples: latents.LatentSource = loaded) -> int:
            for batch in batches:
                read = [examples[i] for i in batch]
                for key in ("mean", "std", "label"):
                    np.stack([example[key] for example in read])
            return FLAGS.examples

        def in_batches(examples: latents.LatentSource = loaded) -> int:
            for batch in batches:
                examples.read_batch(batch)
            return FLAGS.examples

        contestants[f"{dtype} shards, read_batch"] = in_batches
        contestants[f"{dtype} shards, one by one"] = one_by_one
        sources[f"{dtype} shards, pipeline"] = loaded
    print(f"reading and batching {FLAGS.examples} examples in random order, page cache warm")
    warm = contestants | {name: functools.partial(train, source, FLAGS.epochs) for name, source in sources.items()}
    for run in warm.values():
        run()
    race(warm)
    try:
        drop_caches()
    except OSError as error:
        print(f"page cache cold: not measured, it cannot be emptied ({error})")
        return
    print("the same, page cache emptied before each round")
    cold = contestants | {name: functools.partial(train, source, 1) for name, source in sources.items()}
    race(cold, drop_caches)


def encode() -> None:
    """Our encoder against diffusers'."""
    try:
        import torch
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise UserError(f"--job=encode compares with diffusers: pip install torch diffusers ({error})") from error
    from sklearn.datasets import load_sample_images

    from sra_jax.data.images import centre_crop, read_image

    folder = str(pathlib.Path(FLAGS.folder) / "vae")
    if not os.path.isdir(folder):
        torch.manual_seed(0)
        AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        ).save_pretrained(folder)
    photos = [np.asarray(centre_crop(read_image(p), FLAGS.image_size)) for p in load_sample_images().images]
    count = FLAGS.batch_size if FLAGS["batch_size"].present else 4
    images = (np.stack([photos[i % 2] for i in range(count)]) / 127.5 - 1.0).astype(np.float32)
    ours = autoencoder.load(folder)
    on_device = jax.device_put(images)
    theirs = AutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False).eval()
    theirs_last = AutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False).eval()
    theirs_last = theirs_last.to(memory_format=torch.channels_last)
    first = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    last = first.to(memory_format=torch.channels_last)

    def run_theirs(model: AutoencoderKL, batch: torch.Tensor) -> np.ndarray:
        with torch.inference_mode():
            return model.encode(batch).latent_dist.mean.numpy()

    mean = np.moveaxis(run_theirs(theirs, first), 1, -1)
    difference = np.abs(np.asarray(ours.encode(on_device)[0]) - mean).max() / np.abs(mean).max()
    print(f"encoding {count} images of {FLAGS.image_size} pixels in float32; means differ by {difference:.1e} relative")

    def run_ours() -> int:
        jax.block_until_ready(ours.encode(on_device))
        return count

    race(
        {
            "diffusers": lambda: len(run_theirs(theirs, first)),
            "diffusers, channels last": lambda: len(run_theirs(theirs_last, last)),
            "sra_jax": run_ours,
        }
    )
