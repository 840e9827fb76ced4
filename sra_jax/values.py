"""Numbers, intervals and paths from outside, as text or as values: each is read strictly or refused in one line.

`name` is what the user gave the value to, as the message shall say it: `--seed`, or `alignment.interval`.
"""

import math
import os
import re
from typing import Any

from sra_jax import remote
from sra_jax.errors import UserError

INTEGER = re.compile(r"[+-]?[0-9]+", re.ASCII)
REAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", re.ASCII)

SHOWN = 100
"""Characters of a wrong value that a message repeats."""

SEED_LIMIT = 2**32 - 1
"""The random keys hold 32 bits of a seed: a larger one would be the same as a smaller."""

PATH_KINDS = ("edm2", "idx", "imagefolder")
"""Kinds of a source of images, KIND:PATH, whose rest is a path."""

COUNT_LIMIT = 10**9
"""Of steps, samples and examples, which 32-bit integers number."""

BATCH_LIMIT = 2**20
"""Of what is worked on at a time."""

WORKERS_LIMIT = 256
"""Of threads or processes that are started on one machine."""


def shown(value: Any) -> str:
    """A value as one would type it: tuples and lists with commas; cut where it is very long."""
    if isinstance(value, (tuple, list)):
        value = ",".join(map(shown, value))
    if isinstance(value, int) and abs(value) >= 10**SHOWN:
        return f"{'-' * (value < 0)}1e{SHOWN} and more"
    text = str(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def limits(low: float | None, high: float | None, open_low: bool = False, open_high: bool = False) -> str:
    """A range in words: `at least 1`, `above 0 and at most 1`; empty where there is none."""

    def number(end: float) -> str:
        return f"{end:,}" if isinstance(end, int) else f"{end:g}"

    ends = [f"{'above' if open_low else 'at least'} {number(low)}"] if low is not None else []
    ends += [f"{'below' if open_high else 'at most'} {number(high)}"] if high is not None else []
    return " and ".join(ends)


def whole(name: str, value: Any, low: int | None = None, high: int | None = None) -> int:
    """A whole number, given as one or as text in the digits 0-9.

    Raises:
      UserError: something else, or out of the range low..high (both ends allowed).
    """
    allowed = limits(low, high)
    text = isinstance(value, str)
    if isinstance(value, bool) or not (INTEGER.fullmatch(value.strip()) if text else isinstance(value, int)):
        raise UserError(f"{name}={shown(value)} must be {', '.join(filter(None, ('a whole number', allowed)))}")
    # a number of thousands of digits is out of any range, and Python refuses to read it
    endless = text and len(value) > SHOWN
    number = 0 if endless else int(value)
    if endless or (low is not None and number < low) or (high is not None and number > high):
        raise UserError(f"{name}={shown(value)} must be {allowed or 'a shorter number'}")
    return number


def number(
    name: str, value: Any, low: float | None = None, high: float | None = None, *, open_low: bool = False,
    open_high: bool = False,
) -> float:
    """A finite number, given as one or as text.

    Args:
      name: what it was given to.
      value: the number, or its text in the digits 0-9.
      low, high: the range; None is open.
      open_low, open_high: whether that end itself is not allowed.

    Raises:
      UserError: something else, NaN, infinite, or out of the range.
    """
    allowed = limits(low, high, open_low, open_high)
    readable = REAL.fullmatch(value.strip()) if isinstance(value, str) else isinstance(value, (int, float))
    try:
        result = float(value) if readable and not isinstance(value, bool) else math.nan
    except OverflowError:  # a whole number of hundreds of digits
        result = math.inf
    if not math.isfinite(result):
        raise UserError(f"{name}={shown(value)} must be {', '.join(filter(None, ('a finite number', allowed)))}")
    too_low = low is not None and (result <= low if open_low else result < low)
    too_high = high is not None and (result >= high if open_high else result > high)
    if too_low or too_high:
        raise UserError(f"{name}={shown(value)} must be {allowed}")
    return result


def interval(name: str, value: Any, *, fixed: bool, advice: str) -> tuple[float, float]:
    """An interval of fractions, 0 <= low <= high <= 1.

    Args:
      name: what it was given to.
      value: two numbers, or their text (`0,0.7`, with or without brackets and spaces); what config flags make of a
        spelling that they do not understand is taken, too.
      fixed: whether one number k is allowed, and means the interval [k, k].
      advice: what the message ends with, such as `the paper uses 0,0.2`.

    Returns:
      (low, high).

    Raises:
      UserError: anything else.
    """
    one = ", or one number for a fixed value" if fixed else ""
    wrong = UserError(
        f"{name}={shown(value)} must be two numbers low,high with 0 <= low <= high <= 1{one}; {advice}"
    )
    parts = value if isinstance(value, (tuple, list)) else [value]
    if len(parts) == 1 and isinstance(parts[0], str):
        text = parts[0].strip()
        if text[:1] + text[-1:] in ("()", "[]"):
            text = text[1:-1]
        parts = text.removesuffix(",").split(",")
    try:
        ends = [number(name, part, 0, 1) for part in parts]
    except UserError as error:
        raise wrong from error
    if len(ends) == 1 and fixed:
        ends *= 2
    if len(ends) != 2 or ends[0] > ends[1]:
        raise wrong
    return ends[0], ends[1]


def path(name: str, text: str | os.PathLike, local: bool = False) -> str:
    """A path, `~` expanded, or an address such as gs://bucket/run, as it is.

    Args:
      name: what it was given to.
      text: the path.
      local: refuse addresses, too.

    Raises:
      UserError: an empty path, an address that nothing here reads, or the home of an unknown user.
    """
    text = os.fspath(text)
    if not text.strip():
        raise UserError(f"{name}= is empty: give a path, or leave it out")
    if remote.is_address(text):
        if local:
            raise UserError(
                f"{name}={text} is an address ({remote.scheme(text)}://); this path is local, such as /data/run, run "
                "or ~/run: mount or copy it"
            )
        return remote.checked(name, text)
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise UserError(f"{name}={text} names the home of a user who is not known here; give the whole path")
    return expanded


def source(name: str, text: str) -> str:
    """A path that may have in front what lies there, KIND:PATH, where the path is local; read as `path` does.

    Other names, such as `tfds:imagenet2012` or a Hugging Face id, stay as they are.
    """
    kind, colon, rest = text.partition(":")
    return f"{kind}:{path(name, rest, local=True)}" if colon and kind in PATH_KINDS else path(name, text)
