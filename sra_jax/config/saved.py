"""Configs as files and flags: written, read back, compared."""

import json
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from sra_jax import files
from sra_jax.config.flag import check_read
from sra_jax.config.keys import CAPTION_KEYS, FREE_KEYS, default, flatten, tell_captions
from sra_jax.config.limits import expand_paths
from sra_jax.config.objects import method_names, tells_captions
from sra_jax.diffusion.registry import process_defaults
from sra_jax.errors import UserError
from sra_jax.methods.registry import NONE, names_of


def to_json(config: ConfigDict) -> str:
    """The config as JSON, without the keys of methods that it does not name; tuples become lists.

    `from_json` restores both.
    """
    return json.dumps(as_read(config), indent=2)


def as_read(config: ConfigDict) -> dict[str, Any]:
    """The config as nested dicts, without the keys of methods that it does not name: nothing reads them."""
    values = config.to_dict()
    named = names_of(config.method.name)
    values["method"] = {key: value for key, value in values["method"].items() if key == "name" or key in named}
    return values


def from_json(text: str) -> ConfigDict:
    """The inverse of `to_json`. Keys that came into being after the text was written get their defaults."""

    def tuples(value: Any) -> Any:
        if isinstance(value, list):
            return tuple(tuples(v) for v in value)
        return {k: tuples(v) for k, v in value.items()} if isinstance(value, dict) else value

    saved = tuples(json.loads(text))
    if not isinstance(saved, dict):
        raise ValueError("it holds no keys")
    model = saved.get("model")
    told_captions = isinstance(model, dict) and model.get("name") == "mmdit"
    config, usual = default(), default()
    if told_captions:
        tell_captions(config)
        tell_captions(usual)
    for group in ("process", "sampling"):  # their keys belong to the saved family
        config[group] = ConfigDict()
    with config.unlocked():
        for key, value in saved.items():
            if isinstance(value, dict) and key in config:
                with config[key].ignore_type():
                    config[key].update(value)
            else:
                config[key] = value
        for key, value in usual.sampling.items():
            if key not in config.sampling:
                config.sampling[key] = value
    return config.lock()


def readable(config: ConfigDict) -> str:
    """The config for people: a line `key = value` for each key, with the default where the value is another.

    A value is written as a flag takes it: `--config.KEY=VALUE`.
    """
    usual = dict(flatten(default())) | {
        f"process.{key}": value for key, value in process_defaults(config.process.name).items()
    }

    def shown(value: Any) -> str:
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        return text or "''"

    leaves = dict(flatten(ConfigDict(as_read(config))))
    longest = max(map(len, leaves))
    lines = []
    group = ""
    for key in sorted(leaves, key=lambda key: ("." in key, key)):
        value = leaves[key]
        if (new := key.rpartition(".")[0]) != group:
            lines.append("")
            group = new
        line = f"{key:{longest}} = {shown(value)}"
        lines.append(f"{line:{longest + 24}} # default {shown(usual[key])}" if usual.get(key, value) != value else line)
    return "\n".join(lines)


def read(path: Path) -> ConfigDict:
    """The config that a run saved at `path` (its workdir's config.json).

    Raises:
      UserError: there is no such file, it is not a config, or one of a newer version.
    """
    try:
        config = from_json(files.read_text(path))
    except OSError as error:
        raise UserError(f"no run at {path.parent}: {path.name} cannot be read ({error.strerror}); train one, or check "
                        "--workdir") from error  # fmt: skip
    except (AttributeError, TypeError, ValueError) as error:  # as ml_collections speaks of values of another type
        raise UserError(f"{path} is not a saved config: {str(error).splitlines()[0]}") from error
    known = {key for key, _ in flatten(default())}
    if tells_captions(config):
        known |= CAPTION_KEYS.keys()
    keys = [key for key, _ in flatten(config) if key.partition(".")[0] not in ("process", "sampling")]
    if new := sorted(set(keys) - known):
        raise UserError(
            f"{path} has keys that this version does not know: {', '.join(new[:5])}. A newer version wrote it, or it "
            "was changed by hand: take that version, or remove them"
        )
    return config


def _comparable(config: ConfigDict) -> dict[str, Any]:
    """What two configs are compared by: the keys that something reads, the methods in one order."""
    values = as_read(config)
    values["method"]["name"] = "+".join(method_names(config)) or NONE
    if "sra" not in method_names(config):
        values["alignment"] = {}
    else:
        del values["alignment"]["enabled"]
    return values


def differences(saved: ConfigDict, given: ConfigDict) -> list[str]:
    """Keys in which two configs differ so that a run of one cannot continue as the other: `key: saved -> given`."""
    old, new = (dict(flatten(ConfigDict(_comparable(config)))) for config in (saved, given))
    scheduled = given.optimizer.schedule != "constant" or given.ema.schedule != "constant"
    free = FREE_KEYS[3:] if scheduled else FREE_KEYS

    def shapes_the_run(key: str) -> bool:
        return key != "name" and not any(key == name or key.startswith(f"{name}.") for name in free)

    return [
        f"{key}: {old.get(key, 'absent')!r} -> {new.get(key, 'absent')!r}"
        for key in sorted(old.keys() | new.keys())
        if shapes_the_run(key) and old.get(key) != new.get(key)
    ]


def from_flag(value: ConfigDict | None, flag_values: flags.FlagValues = flags.FLAGS) -> ConfigDict:
    """The config of --config and its overrides, a copy; `~` is expanded in the paths that it holds.

    Raises:
      UserError: no recipe was given, a path that is an address, or a flag of a method that is not named.
    """
    if value is None:
        raise UserError("--config is missing: name a recipe, such as --config=configs/digits.py")
    config = value.copy_and_resolve_references()
    check_read(config, flag_values)
    expand_paths(config)
    return config
