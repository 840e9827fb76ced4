"""Pictures of what a model's tokens hold: their first three principal components as colours.

Rows are blocks, columns noise levels (0 = data, 1 = noise), several runs side by side; the first row is what the
network saw (for latents: their first three channels). --example is a number in the run's dataset; --image a picture
file, cropped to a square and resized, for sets that are made of pictures.

So that pictures compare, a block's components are those of its tokens at all shown levels together, each signed to go
with the brightness of the clean input and scaled to its 1st and 99th percentile: colours mean the same along a row, not
between rows.

Exit codes: 0 done, 1 made but not written (kept elsewhere, the message says where), 2 bad input.

Examples:

    python tools/pca.py --workdir=runs/digits --output=pca.png
    python tools/pca.py --workdir=runs/sra,runs/baseline --names=SRA,baseline --example=7 --output=pca.png
    python tools/pca.py --workdir=W --image=cat.jpg --blocks=4,8,16,24 --levels=0.1,0.3,0.5,0.7 --output=cat.png
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import numpy as np
from absl import flags
from PIL import Image

from sra_jax import cli, files, remote, values
from sra_jax import config as config_lib
from sra_jax.data import classes, images
from sra_jax.data import registry as datasets
from sra_jax.data.captions import embedded
from sra_jax.data.dataset import Example
from sra_jax.distributed import sharding
from sra_jax.errors import UserError
from sra_jax.inspection import plots
from sra_jax.inspection.principal_components import token_colours
from sra_jax.inspection.tokens import Settings, check_condition, make_extractor, parse_blocks, parse_levels
from sra_jax.runs.trained import TrainedModel
from sra_jax.sampling.options import define_ema_flag

FLAGS = flags.FLAGS

cli.paths_flag("workdir", None, "Folders of runs.", required=True)
flags.DEFINE_list("names", None, "What the picture calls them; default: the folders'.")
cli.path_flag("output", None, "PNG file to write.", required=True)
cli.whole_flag("step", None, "Checkpoint to read; by default the newest.", 0, values.COUNT_LIMIT)
flags.DEFINE_enum("weights", "ema", ["ema", "params"], "Which of the two parameter trees.")
define_ema_flag()
flags.DEFINE_list("blocks", ["all"], "Blocks, counted from 1, or all.")
flags.DEFINE_list("levels", ["0", "0.2", "0.4", "0.6", "0.8"], "Noise levels from 0 (data) to 1 (noise).")
flags.DEFINE_enum("condition", "null", ["null", "true"], "The label that the network sees.")
cli.whole_flag("example", 0, "Number of an example of the run's dataset.", 0, values.COUNT_LIMIT)
cli.path_flag("image", None, "Picture file to use instead.")
cli.whole_flag("seed", 0, "Of the noise.", 0, values.SEED_LIMIT)
flags.DEFINE_bool("overwrite", False, "Replace --output where it exists.")


def main() -> None:
    """Extract, project, draw."""
    output = files.check_output("--output", FLAGS.output, FLAGS.overwrite)
    names = FLAGS.names or [remote.path(workdir).name for workdir in FLAGS.workdir]
    if len(names) != len(FLAGS.workdir) or len(set(names)) != len(names):
        raise UserError(f"--names={','.join(names)}: give one name of its own to each of {len(FLAGS.workdir)} workdirs")
    if FLAGS.image and FLAGS.condition == "true":
        raise UserError("--condition=true needs a label, which --image has not; use --example")
    models = [
        TrainedModel(remote.path(workdir), FLAGS.step, FLAGS.weights, ema=FLAGS.ema) for workdir in FLAGS.workdir
    ]
    depth = min(model.config.model.depth for model in models)
    settings = Settings(parse_blocks(FLAGS.blocks, depth), parse_levels(FLAGS.levels), FLAGS.condition, FLAGS.seed)
    settings.check(depth)
    for model in models:
        check_condition(settings.condition, model.config)
    with files.locked_output(output, "choose another --output"):
        draw(output, names, models, settings)


def draw(output: pathlib.Path, names: list[str], models: list[TrainedModel], settings: Settings) -> None:
    """All models in one picture."""
    maps = {}
    for name, model in zip(names, models, strict=True):
        maps[name], inputs = run(model, settings)
    files.write_results({output: lambda path: plots.token_figure(path, maps, inputs, settings.blocks, settings.levels)})
    print(f"{output}: {len(settings.blocks)} blocks at {len(settings.levels)} noise levels of {', '.join(names)}")


def run(model: TrainedModel, settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    """Colours (L,K,G,G,3) and noisy inputs (L,H,W,1 or 3) in [0, 1] of one model."""
    dataset = datasets.load(model.config.data)
    classes.check_same(model.class_names, dataset.class_names, model.config.data.path or model.config.data.name)
    if FLAGS.image:
        example = datasets.example_from_image(model.config.data, read_image(files.local(FLAGS.image)))
    else:
        if FLAGS.example >= len(dataset.source):
            raise UserError(f"--example={FLAGS.example}: examples run from 0 to {len(dataset.source) - 1}")
        example = dataset.source[FLAGS.example]
    copies = model.mesh.size  # each device works on one; the first is shown
    batch: Example = {key: np.repeat(np.asarray(array)[None], copies, axis=0) for key, array in example.items()}
    indices = np.full(copies, FLAGS.example, np.int32)
    embed = embedded(dataset.text, model.mesh, config_lib.DTYPES[model.config.dtype])
    put = embed(sharding.put_rows({**batch, "index": indices}, model.mesh))
    index = put.pop("index")
    x_t, tokens = jax.jit(make_extractor(model, dataset, settings, pool=False))(model.params, put, index)
    encode_key = jax.random.fold_in(jax.random.key(settings.seed), FLAGS.example)  # as the extractor has it
    latents = sharding.gather(jax.jit(dataset.encode)(put, encode_key))[0]
    shown = sharding.gather(x_t)[0][..., : 3 if latents.shape[-1] >= 3 else 1]
    low, high = latents.min(), latents.max()
    inputs = np.clip((shown - low) / max(high - low, 1e-12), 0, 1)
    return token_colours(sharding.gather(tokens)[0], latents), inputs


def read_image(path: pathlib.Path) -> Image.Image:
    """A picture file, cropped to its central square, RGB."""
    try:
        picture = images.read_image(path).convert("RGB")
    except images.UnreadableImageError as error:
        raise UserError(f"--image={path} cannot be read as a picture ({error})") from error
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side))


if __name__ == "__main__":
    cli.run(main)
