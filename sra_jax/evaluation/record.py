"""What a measurement depends on, kept with its result, so that it can be made again and compared.

A result's `record` has two parts. `given` is what the command line of tools/fid.py chooses, and repeats it; the rest is
what was found there: checksums of the weights that were used, the images compared with, the versions and devices.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from sra_jax import files, remote
from sra_jax.errors import UserError
from sra_jax.evaluation.evaluate import METRICS
from sra_jax.evaluation.features import Extractor
from sra_jax.evaluation.reference import Reference
from sra_jax.runs import checksums, environment
from sra_jax.sampling.generation import Generator

NAME = "record"
PLACES = ("workdir", "samples", "reference", "data_dir", "weights")
"""What `given` holds of where things lie: it may be elsewhere the next time."""

AGREES = 1e-3
"""Relative difference up to which two results agree: another device or version rounds otherwise, and samples follow."""


def of_model(
    config: ConfigDict, step: int, weights: str, checksum: str, generator: Generator
) -> dict[str, Any]:
    """Of a run's own samples: which parameters, and how images are made of them.

    Args:
      config: the run's.
      step: of the checkpoint.
      weights: which of its trees, as `TrainedModel.weights` says it.
      checksum: the tree's, by `params_checksum`.
      generator: makes the images.
    """
    return {
        "checkpoint": {
            "run": config.name, "step": step, "weights": weights, "checksum": checksum,
        },
        "dtype": config.dtype, "sampling": plain(generator.describe()), "decoder": generator.decoder_weights(),
    }  # fmt: skip


def given_sampling(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """Flags of tools/fid.py that repeat what `Generator.describe` says."""
    given = {name: value for name, value in sampling.items() if name not in ("steps", "guidance_interval")}
    given["sampling_steps"] = str(sampling["steps"])
    given["guidance_interval"] = ",".join(map(str, sampling["guidance_interval"]))
    return given


def of_measurement(extractor: Extractor, reference: Reference | None) -> dict[str, Any]:
    """Of any samples: with what they are measured, and on what."""
    return {
        "extractor": extractor.identity,
        "reference": None if reference is None else {
            "name": reference.name, "count": reference.count, "checksum": reference.checksum,
        },
        "environment": environment_now(),
    }  # fmt: skip


def environment_now() -> dict[str, Any]:
    """Settings, versions and devices of this process, as JSON data."""
    found = environment.current()
    return {**found, "device": f"{jax.local_device_count()} x {found['device']}"}


def plain(values: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(values))


def params_checksum(params: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that stand for all names and bits of the network in `params`, however it lies on devices.

    All processes call it together.
    """
    sums, _ = checksums.arrays({"model": params["model"]})
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()[:16]


def read(path: str | Path) -> dict[str, Any]:
    """A result with its record.

    Raises:
      UserError: there is no such file, or it holds no such result.
    """
    try:
        result = json.loads(files.read_text(remote.path(path)))
        given = result[NAME]["given"]
        if not isinstance(given, dict) or not all(isinstance(name, str) for name in given):
            raise TypeError("no flags")
    except OSError as error:
        raise UserError(f"--again={path} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--again={path} is no result that says how it was made; tools/fid.py writes such (--json, or evaluation/ "
            "of a run), and so does evaluation while training"
        ) from error
    return result


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What shaped one result otherwise than another, `key: old -> new`; where things lie is not compared."""

    def comparable(result: Mapping[str, Any]) -> dict[str, Any]:
        record = plain(result[NAME])
        record["given"] = {name: value for name, value in record["given"].items() if name not in PLACES}
        return record

    return changes(comparable(old), comparable(new))


def changes(old: Mapping[str, Any], new: Mapping[str, Any], missing: Any = None) -> list[str]:
    """Leaves in which JSON data differ, `dotted key: old -> new`; `missing` stands for one that is not there."""
    one, other = dict(flat(old)), dict(flat(new))
    return [
        f"{key}: {one.get(key, missing)!r} -> {other.get(key, missing)!r}"
        for key in sorted(one.keys() | other.keys()) if one.get(key) != other.get(key)
    ]  # fmt: skip


def flat(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf of JSON data; a list is one."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from flat(value, f"{prefix}{key}.")
    else:
        yield prefix.removesuffix("."), values


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[bool, list[str]]:
    """Whether a result that was made again agrees, and what to tell people, line by line.

    Args:
      old, new: results with records.

    Returns:
      True where every number of the old one is there and within `AGREES`; the lines.
    """
    lines, agrees = [], True
    for name in [name for name, value in old.items() if isinstance(value, float)]:
        label = METRICS[name][0] if name in METRICS else name
        if name not in new:
            agrees = False
            lines.append(f"  {label:<22}{old[name]:>14.6f} -> not measured")
            continue
        off = abs(new[name] - old[name]) / max(abs(old[name]), 1e-12)
        agrees &= off <= AGREES
        said = "equal" if new[name] == old[name] else f"off by {off:.2g} of it"
        lines.append(f"  {label:<22}{old[name]:>14.6f} -> {new[name]:.6f}, {said}")
    changed = differences(old, new)
    if changed:
        lines.append("made otherwise:")
        lines += [f"  {line}" for line in changed]
    else:
        lines.append("made in the same way, by all that is recorded")
    return agrees, [f"{'agrees' if agrees else 'does not agree'} (to {AGREES:g} of each metric):", *lines]
