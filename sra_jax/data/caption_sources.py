"""Images with captions from where users have them, named by one string each.

    coco:DIR[:SPLIT]         COCO's own layout: DIR/SPLIT/*.jpg and DIR/annotations/captions_SPLIT.json; train2014
    captions:DIR             a folder of images with captions.jsonl: {"file": ..., "captions": [...]} a line
    tfds:coco_captions[:...] TFDS's set, prepared on disk

Captions are taken as they are written. One that cannot be used is named with the reason, and an image without any is
told the empty one.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sra_jax.data.image_sources import ImageItem, ImageSource, RandomAccess, TfdsImages, digest, existing_folder
from sra_jax.errors import UserError

CAPTIONS_FILE = "captions.jsonl"
DEFAULT_SPLIT = "train2014"
LONGEST = 2000
"""Characters of a caption; what is longer is no caption, and was not written as one."""


@dataclasses.dataclass(frozen=True)
class CaptionedItem(ImageItem):
    """One image, not read yet, with what its source says of it.

    Attributes:
      captions: as they lie there; anything, for sources are checked one by one (`usable`).
    """

    captions: tuple[Any, ...] = ()


def usable(item: CaptionedItem) -> tuple[list[str], list[tuple[str, str]]]:
    """The captions of an image that can be used, and [name, reason] of each that cannot, or of the lack of any."""
    good: list[str] = []
    bad: list[tuple[str, str]] = []
    for caption in item.captions:
        if not isinstance(caption, str):
            bad.append((item.where, f"its caption is {type(caption).__name__}, not text"))
        elif not caption.strip():
            bad.append((item.where, "its caption is empty"))
        elif any("\ud800" <= character <= "\udfff" for character in caption):
            bad.append((item.where, "its caption is not UTF-8"))
        elif len(caption) > LONGEST:
            bad.append((item.where, f"its caption has {len(caption)} characters, more than {LONGEST}"))
        else:
            good.append(caption)
    if not good:
        bad.append((item.where, "it has no caption and is told the empty one"))
    return good, bad


class _Captioned(RandomAccess):
    """Images with captions in files. They have no classes: all are of the one class 0."""

    num_classes = 1
    class_names: tuple[str, ...] | None = None

    def __init__(self, folder: Path, entries: list[tuple[str, tuple[Any, ...]]]):
        self._folder, self._entries = folder, entries
        self._labels = [0] * len(entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> CaptionedItem:
        name, captions = self._entries[index]
        path = self._folder / name
        return CaptionedItem(str(path), path, 0, captions)

    def fingerprint(self) -> str:
        """Changes with names and captions."""
        return digest(json.dumps(entry) for entry in self._entries)


def _text(path: Path) -> str:
    """A file's text; bytes that are not UTF-8 become lone surrogates, by which their captions are found."""
    try:
        return path.read_bytes().decode("utf-8", "surrogateescape")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error


class CocoCaptions(_Captioned):
    """COCO's images in the order of their ids, captions in the order of the file."""

    def __init__(self, path: str):
        folder, _, split = path.partition(":")
        split = split or DEFAULT_SPLIT
        root = existing_folder(folder, f"{split}/*.jpg and annotations/captions_{split}.json, as COCO's archives do")
        listing = root / "annotations" / f"captions_{split}.json"
        if not listing.is_file():
            raise UserError(
                f"coco:{path}: there is no {listing}: unpack COCO's annotations archive in {root}, or name another "
                f"split, coco:{folder}:val2014"
            )
        images = existing_folder(str(root / split), f"the images of COCO's {split}.zip")
        try:
            values = json.loads(_text(listing))
            files = {int(image["id"]): str(image["file_name"]) for image in values["images"]}
            captions: dict[int, list[Any]] = {number: [] for number in files}
            for annotation in values["annotations"]:
                captions.setdefault(int(annotation["image_id"]), []).append(annotation.get("caption"))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f'{listing} is not COCO\'s: {{"images": [{{"id", "file_name"}}], "annotations": [{{"image_id", '
                f'"caption"}}]}} ({error!r})'
            ) from error
        if not files:
            raise UserError(f"{listing} lists no image")
        if unknown := captions.keys() - files.keys():
            raise UserError(f"{listing} has captions of {len(unknown)} images that it does not list: {min(unknown)}")
        super().__init__(images, [(_inside(listing, files[i]), tuple(captions[i])) for i in sorted(files)])


class CaptionsFolder(_Captioned):
    """A folder of images with `captions.jsonl`, in the order of its lines."""

    def __init__(self, path: str):
        folder = existing_folder(path, f"images and {CAPTIONS_FILE}")
        listing = folder / CAPTIONS_FILE
        if not listing.is_file():
            raise UserError(f'{folder} has no {CAPTIONS_FILE}: lines {{"file": "a.jpg", "captions": ["..."]}}')
        entries = []
        for number, line in enumerate(_text(listing).splitlines(), start=1):
            if line.strip():
                entries.append(_entry(f"{listing}, line {number}", line))
        if not entries:
            raise UserError(f"{listing} lists no image")
        super().__init__(folder, entries)


def _entry(where: str, line: str) -> tuple[str, tuple[Any, ...]]:
    """The file and the captions of a line."""
    try:
        values: Mapping[str, Any] = json.loads(line)
        name = values["file"]
        given = values.get("captions", values.get("caption", []))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f'{where} is not {{"file": "a.jpg", "captions": ["..."]}} ({error!r})') from error
    if not isinstance(name, str) or not name:
        raise UserError(f"{where}: file={name!r} is no name of a file")
    return _inside(where, name), tuple(given) if isinstance(given, list) else (given,)


def _inside(where: Any, name: str) -> str:
    """A name of a file in the folder; raises a `UserError` for one that leads out of it."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise UserError(f"{where}: {name!r} leads out of the folder")
    return name


class TfdsCaptions(TfdsImages):
    """TFDS's `coco_captions`, prepared on disk: the features `image` and `captions`, a sequence with `text`."""

    @staticmethod
    def _classes(features: Any) -> tuple[tuple[str, ...] | None, int]:
        del features
        return None, 1

    @staticmethod
    def _check_features(path: str, features: Any) -> None:
        if not {"image", "captions"} <= set(features or ()):
            raise UserError(f"tfds:{path} has no captions: its features are {', '.join(features or ())}")

    def _item(self, index: int, example: Any) -> CaptionedItem:
        where = f"tfds:{self._name}:{self._split}[{index}]"
        captions = example["captions"]
        texts: Iterable[Any] = captions["text"] if isinstance(captions, Mapping) else [c["text"] for c in captions]
        found = [bytes(text).decode("utf-8", "surrogateescape") if isinstance(text, bytes) else text for text in texts]
        return CaptionedItem(where, bytes(example["image"]), 0, tuple(found))


_SOURCES = {"coco": CocoCaptions, "captions": CaptionsFolder}


def is_captioned(specification: str) -> bool:
    """Whether a source is one of these."""
    kind, _, path = specification.partition(":")
    return kind in _SOURCES or (kind == "tfds" and path.startswith("coco_captions"))


def open_captions(specification: str, data_dir: str | None = None) -> ImageSource:
    """The source that a string such as `coco:/data/coco:val2014` names; its items are `CaptionedItem`s.

    Args:
      specification: the string.
      data_dir: for tfds, the folder of its sets.

    Raises:
      UserError: missing, empty or damaged; the message says what was looked for.
    """
    kind, _, path = specification.partition(":")
    if kind == "tfds":
        return TfdsCaptions(path, data_dir)
    if data_dir:
        raise UserError(f"--data_dir is the folder of TFDS's sets, and {specification} is none of them")
    return _SOURCES[kind](path)


def prompts(specification: str, count: int, seed: int) -> list[str]:
    """One caption of each of `count` images of a source, both chosen by a seed, as U-ViT and REPA choose theirs.

    Images without a usable caption are left out.

    Raises:
      UserError: the source has fewer images with captions.
    """
    source = open_captions(specification)
    random = np.random.RandomState(seed)
    chosen: list[str] = []
    order: Iterator[int] = iter(random.permutation(len(source)).tolist())
    while len(chosen) < count:
        index = next(order, None)
        if index is None:
            raise UserError(f"{specification} has captions of {len(chosen)} images, fewer than the {count} asked for")
        item = source[index] if source.random_access else next(iter(source.items(index, index + 1)))
        assert isinstance(item, CaptionedItem)
        captions, _ = usable(item)
        if captions:
            chosen.append(captions[random.randint(len(captions))])
    return chosen
