"""Encode a set of images to latents for training, or check latents that were encoded before.

Sources: tfds:NAME[:VERSION][:SPLIT], imagefolder:DIR, idx:DIR[:train|t10k], edm2:DIR, sklearn:photos; with captions:
coco:DIR[:SPLIT], captions:DIR (images and captions.jsonl), tfds:coco_captions.

Images are cropped as ADM does (box halving, bicubic, centre), scaled to [-1, 1] and encoded; the mean and the standard
deviation of the posterior are stored in ArrayRecord shards with the label, and manifest.json describes them. Train on
them with --config.data.name=latents --config.data.path=OUTPUT.

A folder's classes are numbered in the order of their names as text (torchvision's: 0, 1, 10, 11, 2, ...); which label
stands for which is said at the start and kept in the manifest. Hidden files and folders are passed over.

Of a source with captions all captions are embedded by a CLIP text tower and stored beside the latents, in half
precision, with the empty one; or their token ids are (--captions=ids). A caption that cannot be used or is cut is named
on stderr and in captions.json.

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

    # COCO's unpacked archives, with captions for text to image
    python tools/prepare_latents.py --source=coco:/data/coco:train2014 --output=/data/coco256 --image_size=256 \\
        --vae=/models/sd-vae-ft-ema --text_encoder=/models/clip-vit-large-patch14

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

from sra_jax import heap

if __name__ == "__main__":
    heap.tune()

import jax
import jax.numpy as jnp
from absl import flags
from tqdm import tqdm

from sra_jax import cli, files, values
from sra_jax.data import caption_shards, classes, features, shards
from sra_jax.data.caption_sources import is_captioned, open_captions
from sra_jax.data.captions import TextEncoder
from sra_jax.data.image_sources import ImageSource, open_images
from sra_jax.data.images import CROPS
from sra_jax.data.moments import MomentsFolder
from sra_jax.data.preparation import ImageEncoder, MomentsCopier, prepare
from sra_jax.distributed import compilation_cache
from sra_jax.distributed.devices import check_devices
from sra_jax.errors import UserError
from sra_jax.interop import autoencoder, clip_text

EXIT_SKIPPED = 3
EXIT_DAMAGED = 4

FLAGS = flags.FLAGS
cli.source_flag("source", None, "Where the images are: see above.")
cli.path_flag("output", None, "Folder of the latents; made if it does not exist.", local=True)
cli.path_flag(
    "data_dir", None, "With tfds: the folder of its sets; by default TFDS's own, or TFDS_DATA_DIR.", local=True
)
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
    local=True,
)
cli.path_flag(
    "text_encoder", clip_text.DEFAULT_CLIP,
    "With a source of captions: folder with config.json, model.safetensors and the tokenizer of a CLIP, or a Hugging "
    "Face id; only its text tower is read.",
)  # fmt: skip
flags.DEFINE_enum(
    "captions", "embeddings", sorted(caption_shards.FORMS),
    "With a source of captions: what is stored of them. embeddings: nothing is left to do while training. ids: token "
    "ids, 300 times smaller; the devices embed them in training, for which --config.data.captions=ids.",
)  # fmt: skip
cli.whole_flag("context_length", None, "Tokens a caption; by default as many as the text encoder has.", 2, 2**16)
flags.DEFINE_enum(
    "crop", None, sorted(CROPS),
    "adm: ADM's box halving and bicubic, by default; square: the largest square with Lanczos, as U-ViT and REPA crop "
    "COCO, by default with a source of captions.",
)  # fmt: skip
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


def _only_for_captions(*names: str) -> None:
    given = [f"--{name}" for name in names if FLAGS[name].present]
    if given:
        raise UserError(f"{', '.join(given)}: --source={FLAGS.source} has no captions; leave it out")


def store_captions(source: ImageSource, tower: clip_text.TextTower) -> None:
    """Store the captions of all examples beside the latents, where they are not there yet."""
    stored = caption_shards.read(FLAGS.output)
    if stored is None:
        stored = caption_shards.store(
            FLAGS.output, source, TextEncoder(tower.config, tower.params, tower.tokenizer), form=FLAGS.captions,
            name=tower.name, fingerprint=tower.fingerprint,
            progress=lambda numbers: tqdm(numbers, desc="captions", unit="example", dynamic_ncols=True),
        )  # fmt: skip
    elif stored.form != FLAGS.captions:
        raise UserError(
            f"{FLAGS.output} stores {stored.form} of captions: give --captions={stored.form}, or delete "
            f"{caption_shards.FILE} there to store {FLAGS.captions}"
        )
    elif (stored.encoder_sha256, stored.length) != (tower.fingerprint, tower.tokenizer.length):
        raise UserError(
            f"the captions in {FLAGS.output} are of {stored.encoder} with {stored.length} tokens: name that "
            f"--text_encoder and --context_length={stored.length}, or delete {caption_shards.FILE} to store others"
        )
    for name, reason in stored.bad:
        print(f"{name}: {reason}", file=sys.stderr)
    print(
        f"{sum(stored.counts)} captions of {len(stored.counts)} examples, as {stored.form}: {stored.length} tokens of "
        f"width {stored.width}, {len(stored.bad)} remarks"
    )


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
    stored, captions = features.read(FLAGS.output), caption_shards.read(FLAGS.output)
    beside = (stored.shards if stored else ()) + (captions.shards if captions else ())
    problems = shards.damaged_shards(FLAGS.output, manifest, lambda s: tqdm(s, unit="shard", disable=None))
    for shard in tqdm(beside, unit="shard", disable=None):
        if problem := shards.damaged_file(FLAGS.output, shard):
            problems.append(problem)
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        count = len(manifest.shards) + len(beside)
        print(f"{len(problems)} of {count} shards are damaged. {shards.REPAIR}", file=sys.stderr)
        return EXIT_DAMAGED
    print(f"{len(manifest.shards)} shards with {manifest.examples} examples are whole")
    if stored is not None:
        print(f"so are the {len(stored.shards)} shards of their features")
    if captions is not None:
        print(f"so are the {len(captions.shards)} shards with {sum(captions.counts)} captions")
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
    compilation_cache.use()
    index, count = processes()
    captioned = is_captioned(FLAGS.source)
    if not captioned:
        _only_for_captions("text_encoder", "context_length", "captions")
    tower = clip_text.load(FLAGS.text_encoder, FLAGS.context_length) if captioned else None
    kind, _, path = FLAGS.source.partition(":")
    source: MomentsFolder | ImageSource
    maker: MomentsCopier | ImageEncoder
    if kind == "edm2":
        if FLAGS.data_dir:
            raise UserError("--data_dir is the folder of TFDS's sets, and edm2 is none of them")
        if FLAGS.flip or FLAGS.crop:
            raise UserError("--flip and --crop need images: what is encoded already can be neither flipped nor cropped")
        moments = source = MomentsFolder(path)
        vae_config, fingerprint = autoencoder.read_config(FLAGS.vae), None
        maker = MomentsCopier(moments, vae_config)
        if FLAGS["image_size"].present and maker.settings["image_size"] != FLAGS.image_size:
            raise UserError(
                f"--image_size={FLAGS.image_size}, but {path} holds moments {moments.shape[1:]}, which are those of "
                f"{maker.settings['image_size']} pixels: leave --image_size out"
            )
    else:
        source = (open_captions if captioned else open_images)(FLAGS.source, FLAGS.data_dir)
        vae = autoencoder.load(FLAGS.vae, jnp.dtype(FLAGS.compute_dtype))
        vae_config, fingerprint = vae.config, vae.fingerprint
        crop = FLAGS.crop or ("square" if captioned else "adm")
        maker = ImageEncoder(vae, FLAGS.image_size, FLAGS.batch_size, FLAGS.flip, crop)

    told = "with captions" if captioned else classes.described(source.num_classes, source.class_names)
    print(f"{FLAGS.source}: {len(source):,} images, {told}")
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
    if report.complete and tower is not None and not isinstance(source, MomentsFolder):
        store_captions(source, tower)
    if report.complete:
        print(f"{FLAGS.output} is complete: train with --config.data.name=latents --config.data.path={FLAGS.output}")
    else:
        print("the shards of other processes are not done yet")
    return EXIT_SKIPPED if report.skipped else 0


if __name__ == "__main__":
    cli.run(main)
