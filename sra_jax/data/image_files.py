"""The image files below a folder, as every reader of folders sees them.

Hidden entries and what systems leave beside pictures (`.ipynb_checkpoints`, `._name.png`, `@eaDir`, `__MACOSX`, ...)
are no classes and no images, at any depth. Links are followed, but not into a folder that is being walked already.
"""

import collections
import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from sra_jax.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")

SYSTEM_NAMES = frozenset({
    "@eadir", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "$recycle.bin", "__macosx", "__pycache__",
    "lost+found", "system volume information", "thumbs.db", "desktop.ini",
})  # fmt: skip
"""Folders and files of Synology, QNAP, Windows, macOS, Linux and Python, in lower case."""


def is_system_name(name: str) -> bool:
    """Whether a file or folder of this name is nobody's data."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


@dataclasses.dataclass(frozen=True)
class ImageTree:
    """What lies below a folder.

    Attributes:
      classes: name of each folder at the first level, sorted as text (torchvision's order) -> paths of its image files
        at any depth, from the root, sorted.
      beside: image files that are in none of these folders, sorted.
      left_out: what was passed over -> how many.
    """

    classes: Mapping[str, tuple[str, ...]]
    beside: tuple[str, ...]
    left_out: Mapping[str, int]


def walk(folder: Path) -> ImageTree:
    """The image files below `folder`.

    Raises:
      UserError: a folder cannot be listed.
    """
    left_out: collections.Counter[str] = collections.Counter()
    classes, beside = {}, []
    for entry in _entries(folder, left_out):
        if entry.is_dir():
            classes[entry.name] = tuple(sorted(_images(Path(entry.path), entry.name, (folder,), left_out)))
        elif _is_image(entry, left_out):
            beside.append(entry.name)
    return ImageTree(dict(sorted(classes.items())), tuple(sorted(beside)), dict(left_out))


def described(left_out: Mapping[str, int]) -> str:
    """What was passed over, in words: `3 .txt, 1 hidden or a system's`; empty where nothing was."""
    return ", ".join(f"{count:,} {what}" for what, count in sorted(left_out.items(), key=lambda item: -item[1]))


def _entries(folder: Path, left_out: collections.Counter[str]) -> Iterator[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if is_system_name(entry.name):
                    left_out["hidden or a system's"] += 1
                else:
                    yield entry
    except OSError as error:
        raise UserError(f"{folder} cannot be listed ({error.strerror})") from error


def _is_image(entry: os.DirEntry, left_out: collections.Counter[str]) -> bool:
    suffix = os.path.splitext(entry.name)[1].lower()
    if suffix not in IMAGE_SUFFIXES:
        left_out[suffix or "without a suffix"] += 1
    elif not entry.is_file():
        left_out["broken links, pipes or devices"] += 1
    else:
        return True
    return False


def _images(
    folder: Path, prefix: str, above: tuple[Path, ...], left_out: collections.Counter[str]
) -> Iterator[str]:
    """Paths of the images in one folder and those below it, each with `prefix` in front."""
    if any(os.path.samefile(folder, other) for other in above):
        left_out["links to a folder above"] += 1
        return
    for entry in _entries(folder, left_out):
        path = os.path.join(prefix, entry.name)
        if entry.is_dir():
            yield from _images(Path(entry.path), path, (*above, folder), left_out)
        elif _is_image(entry, left_out):
            yield path
