"""What the tools that sample are told on the command line."""

from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from sra_jax import cli, files, values
from sra_jax import config as config_lib
from sra_jax.data import registry as datasets
from sra_jax.data.caption_sources import is_captioned
from sra_jax.data.caption_sources import prompts as captions_of_images
from sra_jax.errors import UserError
from sra_jax.runs.trained import TrainedModel
from sra_jax.sampling.generation import Asked

SCHEMES = ("balanced", "uniform")
LABELS_HELP = (
    "balanced (each class equally often, in turn), uniform (drawn at random from --seed, as for the published figures "
    "of DiT and SiT), or classes, taken in turn: 207,360, or names where the run's set has them."
)


def define_ema_flag() -> None:
    """The flag of every tool that reads an EMA."""
    flags.DEFINE_string(
        "ema", "", "Which EMA: teacher, a tracked one such as 0.999 or power:0.05, or another power:S made from the "
        "tracked power functions at all saved steps; default: the run's ema.sampled.",
    )  # fmt: skip


def define_sampling_flags() -> None:
    """Flags of every tool that samples; each replaces the run's own value."""
    flags.DEFINE_string("sampler", None, "Sampler of the run's family, such as sde, ode or heun; default: the run's.")
    flags.DEFINE_string("sampling_steps", None, "Steps of the sampler; default: the run's.")
    cli.number_flag("guidance_scale", None, "1 turns guidance off; default: the run's.", 1.0, 1000.0)
    cli.number_flag("eta", None, "DDIM's noise: 0 is deterministic, 1 as DDPM; default: the run's.", 0.0, 1.0)
    flags.DEFINE_string(
        "guidance_interval", None, "Guide where low <= t <= high, fractions of the time range; default: the run's."
    )
    define_ema_flag()
    flags.DEFINE_bool("correction", None, "Take back how the run's method shifts the velocity; default: the run's.")
    cli.whole_flag("guidance_channels", None, "Guide the first so many channels; 0: all; default: the run's.", 0, 4096)


def sampling_overrides() -> dict[str, Any]:
    """What the sampling flags replace in the config's `sampling` section.

    Raises:
      UserError: a value that cannot be read.
    """
    given = flags.FLAGS
    overrides: dict[str, Any] = {
        name: getattr(given, name)
        for name in ("sampler", "guidance_scale", "guidance_channels", "eta", "correction")
        if getattr(given, name) is not None
    }
    if given.sampling_steps is not None:
        steps = given.sampling_steps
        overrides["steps"] = values.whole("--sampling_steps", steps) if values.INTEGER.fullmatch(steps) else steps
    if given.guidance_interval is not None:
        overrides["guidance_interval"] = config_lib.guidance_interval("--guidance_interval", given.guidance_interval)
    return overrides


def define_label_flags() -> None:
    """Flags that say what samples show: labels, or prompts where the run is told captions."""
    flags.DEFINE_string("labels", "balanced", f"Of a run with labels: {LABELS_HELP}")
    flags.DEFINE_multi_string(
        "prompt", [], "Of a run with captions: one to draw; give it several times for several, taken in turn."
    )
    flags.DEFINE_string(
        "prompts", None, "Of a run with captions: a text file of captions to draw, one a line; or images that have "
        "some, coco:DIR:val2014 or captions:DIR: one caption of each of so many images, chosen by --seed; or captions "
        "that the training set brings: seen or held_out with digits_captions.",
    )  # fmt: skip


def asked(model: TrainedModel, count: int, seed: int) -> Asked:
    """What `count` samples are to show, as `Generator.images` takes it: labels, or prompts.

    Raises:
      UserError: flags that do not go with the run, or prompts that cannot be read.
    """
    given = flags.FLAGS
    if not config_lib.tells_captions(model.config):
        if given.prompt or given.prompts:
            raise UserError("--prompt and --prompts need a run that is told captions; this one takes --labels")
        return parse_labels(given.labels, model.class_names)
    if given["labels"].present:
        raise UserError("--labels needs a run that is told labels; this one is told captions: --prompt or --prompts")
    if bool(given.prompt) == bool(given.prompts):
        raise UserError('this run is told captions: give --prompt="a caption" or --prompts=FILE, one of the two')
    if given.prompt:
        return [checked_prompt("--prompt", text) for text in given.prompt]
    return prompts_of(model.config.data, given.prompts, count, seed)


def prompts_of(data: ConfigDict, name: str, count: int, seed: int) -> list[str]:
    """The prompts that --prompts names: a list of the data set's own, captions of images, or the lines of a file.

    Raises:
      UserError: no such list or file, a line without a caption, or bytes that are no text.
    """
    own = datasets.prompt_lists(data)
    if name in own:
        return own[name](count, seed)
    if is_captioned(name):
        return captions_of_images(name, count, seed)
    path = files.local(name).expanduser()
    if not path.is_file():
        names = f", nor a list of data.name={data.name!r}: {', '.join(own)}" if own else ""
        raise UserError(f"--prompts={name} is no file of captions, one a line{names}")
    try:
        lines = path.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts={name} is not UTF-8 text: {error}") from error
    if not lines:
        raise UserError(f"--prompts={name} is empty: one caption a line")
    return [checked_prompt(f"--prompts={name}, line {number}", line) for number, line in enumerate(lines, start=1)]


def checked_prompt(where: str, text: str) -> str:
    """The prompt; raises a `UserError` where it is blank."""
    if not text.strip():
        raise UserError(f"{where} is blank: write a caption")
    return text


def parse_labels(text: str, class_names: Sequence[str] | None = None) -> str | Sequence[int]:
    """The --labels flag: a scheme's name, or classes with commas between, each its number, its name or name:NAME.

    Args:
      text: the flag's value.
      class_names: the run's, or None where it has only numbers.

    Raises:
      UserError: neither.
    """
    if text in SCHEMES:
        return text
    return [_label(part.strip(), text, class_names or ()) for part in text.split(",")]


def _label(part: str, text: str, class_names: Sequence[str]) -> int:
    if values.INTEGER.fullmatch(part):
        return values.whole("--labels", part)
    name = part.removeprefix("name:")
    if name in class_names:
        return class_names.index(name)
    known = f"; this run's names begin with {', '.join(class_names[:3])}" if class_names else ""
    raise UserError(
        f"--labels={values.shown(text)} must be {', '.join(SCHEMES)}, or classes such as 3 or 1,5,7: numbers, or names "
        f"where the run has them (name:7 for one that looks like a number){known}"
    )


def describe_labels(labels: Asked, class_names: Sequence[str] | None) -> str | None:
    """What the chosen class numbers stand for, in words; None where there is nothing to say."""
    if isinstance(labels, str) or class_names is None:
        return None
    if any(not 0 <= label < len(class_names) for label in map(int, labels)):
        return None
    return ", ".join(f"{label} = {class_names[label]}" for label in dict.fromkeys(labels))
