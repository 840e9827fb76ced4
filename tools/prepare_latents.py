"""Encode a set of images to latents for training, or check latents that were encoded before.

Sources: tfds:NAME[:VERSION][:SPLIT], imagefolder:DIR, idx:DIR[:train|t10k], edm2:DIR, sklearn:photos.

Images are cropped as ADM does (box halving, bicubic, centre), scaled to [-1, 1] and encoded; the mean and the standard
deviation of the posterior are stored in ArrayRecord shards with the label, and manifest.json describes them. Train on
them with --config.data.name=latents --config.data.path=OUTPUT.

A folder's classes are numbered in the order of their names as text (torchvision's: 0, 1, 10, 11, 2, ...); which label
stands for which is said at the start and kept in the manifest. Hidden files and folders are passed over.

Interrupted work goes on with the next unfinished shard when the same command runs again, and gives the same bytes on
the same devices and --batch_size. To share the work, run the command in several processes on one file system: the
process's index and count are JAX's on a TPU pod, those of a SLURM step (SLURM_PROCID, SLURM_STEP_NUM_TASKS), or the
flags'. The last process to finish writes the manifest.

Exit codes: 0 all images encoded (in this process's shards); 2 bad input; 3 done, but some images could not be read:
they are listed on stderr and in the manifest; 4 --verify found damaged shards, or examples that are not finite.

Examples:

    # ImageNet, prepared by TensorFlow Datasets
    python tools/prepare_latents.py --source=tfds:imagenet2012 --data_dir=/data/tfds --output=/data/latents256

    # a folder of class folders, with a VAE from a folder, in half the space
    python tools/prepare_latents.py --source=imagefolder:/data/train --output=/data/latents512 --image_size=512 \\
        --vae=/models/sd-vae-ft-ema --dtype=float16

    # .npy moments and dataset.json of the PyTorch code: converted, not encoded again
    python tools/prepare_latents.py --source=edm2:/data/vae-sd --output=/data/latents256

    # two sample photographs, for a first try
    python tools/prepare_latents.py --source=sklearn:photos --output=/tmp/photos --vae=/models/sd-vae-ft-ema

    # features of an external encoder beside the latents, for REPA: one array (tokens, channels) an example
    python tools/prepare_latents.py --features=/data/dinov2 --output=/data/latents256

    # read every shard: compare checksums, look for NaN and for labels without a class
    python tools/prepare_latents.py --verify --output=/data/latents256
"""

import os
import pathlib
import sys
from collections.abc import Callable

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from sra_jax import memory_pages

if __name__ == "__main__":
    memory_pages.use_large_pages()

import jax
import jax.numpy as jnp
from absl import flags
from tqdm import tqdm

from sra_jax import cli, files, values
from sra_jax.data import classes, features, shards
from sra_jax.data.image_sources import ImageSource, open_images
from sra_jax.data.moments import MomentsFolder
from sra_jax.data.preparation import ImageEncoder, MomentsCopier, prepare
from sra_jax.distributed.devices import check_devices
from sra_jax.errors import UserError
from sra_jax.interop import autoencoder

EXIT_SKIPPED = 3
EXIT_DAMAGED = 4

FLAGS = flags.FLAGS
cli.source_flag("source", None, "Where the images are: see above.")
cli.path_flag("output", None, "Folder of the latents; made if it does not exist.")
cli.path_flag("data_dir", None, "With tfds: the folder of its sets; by default TFDS's own, or TFDS_DATA_DIR.")
cli.whole_flag("image_size", 256, "Side of the cropped images in pixels.", 1, 16_384)
cli.path_flag(
    "vae",
    autoencoder.DEFAULT_VAE,
    "Folder with config.json and diffusion_pytorch_model.safetensors of a diffusers AutoencoderKL, or a Hugging Face "
    "id. With edm2: the VAE that made the moments, of which only config.json is read.",
)
flags.DEFINE_enum("dtype", "float32", shards.DTYPES, "Type of mean and standard deviation on disk.")
flags.DEFINE_enum("compute_dtype", "float32", ["float32", "bfloat16"], "Type of the VAE's convolutions.")
flags.DEFINE_bool("flip", False, "Also store each image flipped left to right.")
cli.whole_flag(
    "batch_size", 32, "Images that are encoded together, over all devices of this process.", 1, values.BATCH_LIMIT
)
cli.whole_flag("shard_size", 4096, "Images a shard.", 1, values.BATCH_LIMIT)
cli.whole_flag(
    "workers", min(os.cpu_count() or 1, values.WORKERS_LIMIT), "Threads that read and crop images.", 1,
    values.WORKERS_LIMIT,
)  # fmt: skip
cli.whole_flag("process_index", None, "Which of the processes this is, from 0; by default found out.", 0, 99_999)
cli.whole_flag("process_count", None, "Over how many processes the shards are split; by default found out.", 1, 100_000)
cli.paths_flag(
    "features", None,
    "Store an encoder's features beside the latents in --output: a folder of .npy files (tokens, channels), one an "
    "example in the source's order, or one .npy file (examples, tokens, channels); several encoders with commas.",
)
flags.DEFINE_bool("verify", False, "Only check the shards in --output against their checksums.")


def store_features() -> int:
    """Store --features beside the latents in --output; the exit code."""
    stored = features.store(
        FLAGS.output, FLAGS.features, lambda numbers: tqdm(numbers, unit="example", dynamic_ncols=True)
    )
    print(
        f"{FLAGS.output}: features of {stored.tokens} tokens, widths {','.join(map(str, stored.widths))}; train with "
        f"--config.method.name=repa --config.method.repa.widths={','.join(map(str, stored.widths))}"
    )
    return 0


def processes() -> tuple[int, int]:
    """This process's index and the number of processes: flags, else JAX's, else SLURM's."""
    if (FLAGS.process_index is None) != (FLAGS.process_count is None):
        raise UserError("give both --process_index and --process_count, or neither")
    if FLAGS.process_count is not None:
        return FLAGS.process_index, FLAGS.process_count
    if jax.process_count() > 1:
        return jax.process_index(), jax.process_count()
    return int(os.environ.get("SLURM_PROCID", 0)), int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))


def verify() -> int:
    """Check every shard of --output; the exit code."""
    manifest = shards.read_manifest(FLAGS.output)
    stored = features.read(FLAGS.output)
    beside = stored.shards if stored else ()
    problems = shards.damaged_shards(FLAGS.output, manifest, lambda s: tqdm(s, unit="shard", disable=None))
    problems += [problem for shard in beside if (problem := shards.damaged_file(FLAGS.output, shard))]
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        count = len(manifest.shards) + len(beside)
        print(f"{len(problems)} of {count} shards are damaged. {shards.REPAIR}", file=sys.stderr)
        return EXIT_DAMAGED
    print(f"{len(manifest.shards)} shards with {manifest.examples} examples are whole")
    if stored is not None:
        print(f"so are the {len(stored.shards)} shards of their features")
    return 0


def show_progress() -> Callable[[int, int], None]:
    """A progress bar with images a second and the time left; it appears when work begins."""
    bar: tqdm | None = None

    def show(images: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            # what earlier runs did counts as done, but not for this run's speed
            bar = tqdm(total=total, initial=images, unit="image", smoothing=0.05, dynamic_ncols=True)
        bar.update(images - bar.n)
        if images == total:
            bar.close()

    return show


def main() -> int:
    """Prepare or verify; the exit code."""
    if not FLAGS.output:
        raise UserError("--output is missing: the folder for the latents")
    if FLAGS.verify:
        return verify()
    if FLAGS.features:
        return store_features()
    if not FLAGS.source:
        raise UserError("--source is missing, for example --source=imagefolder:/data/train")
    files.check_output("--output", FLAGS.output, folder=True)
    check_devices()
    index, count = processes()
    kind, _, path = FLAGS.source.partition(":")
    source: MomentsFolder | ImageSource
    maker: MomentsCopier | ImageEncoder
    if kind == "edm2":
        if FLAGS.data_dir:
            raise UserError("--data_dir is the folder of TFDS's sets, and edm2 is none of them")
        if FLAGS.flip:
            raise UserError("--flip needs images: moments that are encoded already cannot be flipped exactly")
        moments = source = MomentsFolder(path)
        vae_config, fingerprint = autoencoder.read_config(FLAGS.vae), None
        maker = MomentsCopier(moments, vae_config)
        if FLAGS["image_size"].present and maker.settings["image_size"] != FLAGS.image_size:
            raise UserError(
                f"--image_size={FLAGS.image_size}, but {path} holds moments {moments.shape[1:]}, which are those of "
                f"{maker.settings['image_size']} pixels: leave --image_size out"
            )
    else:
        source = open_images(FLAGS.source, FLAGS.data_dir)
        vae = autoencoder.load(FLAGS.vae, jnp.dtype(FLAGS.compute_dtype))
        vae_config, fingerprint = vae.config, vae.fingerprint
        maker = ImageEncoder(vae, FLAGS.image_size, FLAGS.batch_size, FLAGS.flip)

    print(f"{FLAGS.source}: {len(source):,} images, {classes.described(source.num_classes, source.class_names)}")
    if source.left_out:
        print(f"{FLAGS.source}: left out {source.left_out}")
    report = prepare(
        source,
        maker,
        FLAGS.output,
        source_name=FLAGS.source,
        vae_name=FLAGS.vae,
        vae_fingerprint=fingerprint,
        vae_config=vae_config,
        dtype=FLAGS.dtype,
        batch_size=FLAGS.batch_size,
        shard_size=FLAGS.shard_size,
        process_index=index,
        process_count=count,
        workers=FLAGS.workers,
        progress=show_progress(),
        on_skip=lambda name, reason: tqdm.write(f"skipped {name}: {reason}", file=sys.stderr),
    )
    print(f"{report.examples} images encoded by process {index} of {count}, {len(report.skipped)} unreadable")
    if report.complete:
        print(f"{FLAGS.output} is complete: train with --config.data.name=latents --config.data.path={FLAGS.output}")
    else:
        print("the shards of other processes are not done yet")
    return EXIT_SKIPPED if report.skipped else 0


if __name__ == "__main__":
    cli.run(main)
