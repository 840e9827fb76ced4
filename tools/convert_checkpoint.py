"""Bring PyTorch checkpoints in, and weights out.

In: the workdir then holds a run of one checkpoint. tools/sample.py and the other tools use it; main.py goes on with it
where the file holds a trained SRA (AdamW's state is taken over where it is there), or starts a new run from its EMA:
python main.py --config=configs/sit_xl2.py --config.init_from=runs/sit --workdir=runs/finetuned.

Size, patch, classes and resolution are read from the tensors. --config gives the run another recipe than the paper's
for this size (configs/NAME.py, with --config.* overrides). Families, which --family=auto tells apart where it can:

    sit           SRA's and REPA's SiT (REPA's projectors are dropped)
    dit           DiT and SRA's DiT
    sit_original  the original SiT, which counts time from noise to data and predicts the opposite velocity; its weights
                  are changed so that this project's samplers make the same images
    mmdit         REPA's text to image, with or without SRA's head (projectors are dropped)

Out: tensors carry the authors' names, with pos_embed and, where it was trained, ap_head, as load_state_dict takes them
with strict=True. A .pt is {"ema": ..., "steps": ...} for --export=ema, {"model": ...} for params, all for both.

PyTorch is needed for .pt only. Pickles are read without running any code in them.
A file may lie at an address: hf://OWNER/NAME/FILE[@REVISION] (HF_TOKEN where it needs access), gs://BUCKET/FILE. With
--card, --output is a folder to upload; where its config.json lies beside a file that comes in, it is the recipe.

Exit codes: 0 done, 1 made but not written (kept elsewhere, the message says where), 2 bad input.

Examples:

    python tools/convert_checkpoint.py --checkpoint=step-400000.pt --workdir=runs/sra      # SRA's own, SiT or DiT
    python tools/convert_checkpoint.py --checkpoint=DiT-XL-2-256x256.pt --workdir=runs/dit
    python tools/convert_checkpoint.py --checkpoint=SiT-XL-2-256x256.pt --workdir=runs/sit --family=sit_original
    python tools/convert_checkpoint.py --workdir=runs/sra --export=ema --output=sra.pt     # or .safetensors
    python tools/convert_checkpoint.py --workdir=runs/sra --export=ema --card --output=to_upload   # for Hugging Face
    python tools/convert_checkpoint.py --checkpoint=hf://OWNER/NAME/model.safetensors --workdir=runs/theirs
"""

import importlib
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from sra_jax import cli, files, remote, values  # first: it quiets what the others load

# isort: split
import jax
from absl import flags
from ml_collections import ConfigDict

from configs import common
from sra_jax import config as config_lib
from sra_jax.errors import UserError
from sra_jax.interop import families
from sra_jax.interop.tensor_files import TensorFile, open_tensor_file
from sra_jax.methods.registry import METHODS, names_of
from sra_jax.models.flops import Shape
from sra_jax.models.mmdit import MMDiTConfig
from sra_jax.runs import CONFIG as CONFIG_FILE
from sra_jax.runs import card, conversion
from sra_jax.sampling.options import define_ema_flag

FLAGS = flags.FLAGS
RECIPES = pathlib.Path(common.__file__).parent

cli.path_flag("checkpoint", None, "File to bring in: .pt or .safetensors.")
cli.path_flag("workdir", None, "The run's folder: written with --checkpoint, read with --export.", required=True)
flags.DEFINE_enum(
    "family", "auto", ["auto", *families.FAMILIES],
    "What the file holds; with --export, whose names, time and channels it gets.",
)  # fmt: skip
flags.DEFINE_enum(
    "method", "auto", ["auto", *(name for name, method in METHODS.items() if method.own_head)],
    "Whose the projection head in the file is: SRA and DTS+AS name theirs alike.",
)  # fmt: skip
cli.whole_flag("patch", None, "Side of a patch, where the file does not tell (Self-Flow); by default 2.", 1, 1024)
cli.whole_flag("heads", None, "Attention heads, for widths and depths other than S, B, L, XL.", 1, 1024)
cli.whole_flag(
    "num_classes", None, "Classes, where the file does not tell whether its last label is the null label.", 1, 10**6
)
flags.DEFINE_bool("fresh_optimizer", False, "Leave the file's optimizer state out.")
flags.DEFINE_enum("export", None, ["ema", "params", "both"], "Write these weights of the workdir to --output.")
flags.DEFINE_enum(
    "export_for", None, conversion.PURPOSES,
    "training: with the projection head, as the authors' training code loads it; sampling: the network alone. By "
    "default all that was trained.",
)  # fmt: skip
cli.path_flag("output", None, "File that --export writes: .pt or .safetensors.")
cli.whole_flag("step", None, "Checkpoint that --export reads; by default the newest.", 0, values.COUNT_LIMIT)
flags.DEFINE_bool(
    "card", False,
    "Make --output a folder to upload to Hugging Face: the weights as safetensors, config.json and a model "
    "card, README.md.",
)  # fmt: skip
flags.DEFINE_bool("overwrite", False, "Replace --output where it exists.")
define_ema_flag()
CONFIG = config_lib.define_flag("Recipe of the run; by default the paper's for the size.")


def main() -> None:
    """In or out."""
    jax.config.update("jax_platforms", "cpu")  # moving arrays needs no accelerator
    if bool(FLAGS.checkpoint) == bool(FLAGS.export):
        raise UserError("give either --checkpoint=FILE, to bring it in, or --export=ema, to write --output")
    if FLAGS.card and not FLAGS.export:
        raise UserError("--card belongs to --export: it describes what is written to --output")
    if FLAGS.export:
        export()
    else:
        bring_in()


def export() -> None:
    """Workdir to file."""
    if not FLAGS.output:
        raise UserError("--export needs --output=FILE.pt or --output=FILE.safetensors, with --card --output=FOLDER")
    workdir, folder = remote.path(FLAGS.workdir), remote.path(FLAGS.output)
    if FLAGS.card:
        for name in (card.WEIGHTS_FILE, card.CONFIG_FILE, card.CARD_FILE):
            files.check_output("--output", folder / name, FLAGS.overwrite)
        output = folder / card.WEIGHTS_FILE
    else:
        output = files.check_output("--output", folder, FLAGS.overwrite)
    step, loaded_by = conversion.export_checkpoint(
        workdir, FLAGS.step, FLAGS.export, output, FLAGS.export_for, FLAGS.family, FLAGS.ema
    )
    if FLAGS.card:
        config = config_lib.read(workdir / CONFIG_FILE)
        card.write(folder, workdir, config, step, FLAGS.export, FLAGS.ema, loaded_by)
        print(f"{folder} is ready: hf upload {card.PLACE} {folder}")
    print(f"{output}: {FLAGS.export} of step {step}, {loaded_by}")


def bring_in() -> None:
    """File to workdir."""
    file = open_tensor_file(files.local(FLAGS.checkpoint))
    given = config_lib.from_flag(CONFIG.value) if CONFIG.value is not None else card.config_beside(FLAGS.checkpoint)
    heads = FLAGS.heads or (given.model.heads if given is not None else None)
    classes = FLAGS.num_classes or (given.data.num_classes if given is not None else None)
    patch = FLAGS.patch or (given.model.patch if given is not None else None)
    contents = families.describe(file, FLAGS.family, heads, common.SIZES, classes, FLAGS.method, patch)
    families.check_positions(file, contents.network)
    if CONFIG.value is None and given is not None:
        given = fitting(given, contents)
    config, lost = recipe(contents, file) if given is None else (given, [])
    workdir = remote.path(FLAGS.workdir)
    optimizer = conversion.import_checkpoint(file, contents, config, workdir, FLAGS.fresh_optimizer)
    network = contents.network
    if isinstance(network, MMDiTConfig):
        told = f"captions of width {network.context_width}"
    else:
        null = "and a null label" if network.null_label else "and no null label"
        told = f"{network.num_classes} classes {null} ({contents.classes})"
    print(
        f"{file.path}: {contents.family} ({contents.reason}), {network.depth} blocks, width {network.width}, "
        f"{network.heads} heads, patch {network.patch}, latents {network.input_size}x{network.input_size}x"
        f"{network.channels}, {told}, "
        f"{f'with the head of {contents.method}' if contents.head else 'without a head'}"
    )
    for line in lost:
        print(f"left out: {line}")
    if contents.dropped:
        print(f"left out: {len(contents.dropped)} tensors of training only, such as {contents.dropped[0]}")
    for name, other in (("params", "ema"), ("ema", "params")):
        if name not in file.groups:
            print(f"{name}: not in the file, a copy of its {other}")
    print(f"optimizer state: {optimizer}")
    print(f"{workdir}: recipe {config.name}, checkpoint of step {file.step}")


def fitting(published: ConfigDict, contents: families.Contents) -> ConfigDict | None:
    """A config that lies beside the file, if it describes it; a method whose head was left out is none any more."""
    with published.unlocked():
        heads = {METHODS[name].own_head for name in names_of(published.method.name)} - {""}
        if heads and not contents.head:
            published.method.name, published.alignment.enabled = "none", False
        published.ema.profiles, published.ema.sampled = "", "teacher"
    try:
        conversion.check_config(published, contents)
    except UserError as error:
        print(f"{card.CONFIG_FILE} beside the file is left aside: {str(error).splitlines()[0]}", file=sys.stderr)
        return None
    return published.lock()


def recipe(contents: families.Contents, file: TensorFile) -> tuple[ConfigDict, list[str]]:
    """The paper's recipe for the size, or the nearest one with the size put in; what the file says of its training.

    With a line for each of the file's settings that has no like here.
    """
    network = contents.network
    depth, width = network.depth, network.width
    name, known, config = _nearest(network, "dit" if contents.family == "dit" else "sit")
    with config.unlocked():
        config.name = name
        config.data.update(image_size=network.input_size, channels=network.channels)
        config.model.update(
            patch=network.patch, depth=depth, width=width, heads=network.heads, mlp_ratio=network.mlp_ratio
        )
        if not known:  # the paper's blocks are at about a quarter and two thirds of the depth
            config.alignment.update(student_block=max(1, depth // 4), teacher_block=max(1, depth * 2 // 3))
            common.small_methods(config, standardise="none")
        config.method.name = contents.method if contents.head else "none"
        config.alignment.enabled = contents.head
        if isinstance(network, MMDiTConfig):
            config.data.context_width, config.model.pooled = network.context_width, network.pooled
        else:
            config.data.num_classes = network.num_classes
            if not network.null_label:
                config.model.null_label, config.label_dropout, config.sampling.guidance_scale = False, 0.0, 1.0
        leaves = dict(config_lib.flatten(config))
        section = METHODS[contents.method].section or f"method.{contents.method}"
        told, lost = families.arguments_to_config(file.arguments, section)
        config.update_from_flattened_dict({key: value for key, value in told.items() if key in leaves})
    return config.lock(), lost


def _nearest(network: Shape, family: str) -> tuple[str, bool, ConfigDict]:
    """A recipe's name for the size, whether there is such a recipe, and it or the nearest one."""
    depth, width = network.depth, network.width
    if isinstance(network, MMDiTConfig):
        config = importlib.import_module("configs.t2i_coco").get_config()
        known = (depth, width) == (config.model.depth, config.model.width)
        return config.name if known else f"t2i_{depth}x{width}_p{network.patch}", known, config
    sizes = {(size["depth"], size["width"]): name.lower() for name, size in common.SIZES.items()}
    name = f"{family}_{sizes.get((depth, width), f'{depth}x{width}_p')}{network.patch}"
    if network.input_size == 64:
        name += "_512"
    known = (RECIPES / f"{name}.py").exists()
    return name, known, importlib.import_module(f"configs.{name if known else f'{family}_b2'}").get_config()


if __name__ == "__main__":
    cli.run(main)
