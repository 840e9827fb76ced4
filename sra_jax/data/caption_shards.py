"""Captions, stored beside latents: for each shard of latents one of captions, those of an image together.

A record is one caption: its embeddings (L,C) float16 or its token ids (L,) int32, as captions.json says, then the place
of its end token, int32, little-endian.
`captions.json` says how many captions each example has and what embedded them; `captions_null.npz` holds the empty one.
"""

import copy
import dataclasses
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_module

from sra_jax import files, remote
from sra_jax.data import record_files, shards
from sra_jax.data.caption_sources import usable
from sra_jax.data.captions import ENCODED_TOGETHER, Captions, TextEncoder, turn
from sra_jax.data.image_sources import ImageSource
from sra_jax.errors import UserError

FORMAT = "sra-jax captions, version 1"
FILE = "captions.json"
NULL_FILE = "captions_null.npz"
FORMS: dict[str, tuple[str, np.dtype]] = {"embeddings": ("context", np.dtype("<f2")), "ids": ("ids", np.dtype("<i4"))}
"""What is stored of a caption: the name of its array in examples, and its type."""

AGAIN = f"delete {FILE} and run tools/prepare_latents.py again"


@dataclasses.dataclass(frozen=True)
class Stored:
    """What captions.json says.

    Attributes:
      form: one of `FORMS`.
      length: L, tokens a caption.
      width: C, channels of an embedding.
      encoder: the text encoder's name as the user gave it.
      encoder_sha256: of its weights.
      counts: captions of each example, in the latents' order; at least 1.
      bad: [name, reason] of captions that could not be used, and of those that were cut.
      shards: one for each shard of latents, in the same order.
    """

    form: str
    length: int
    width: int
    encoder: str
    encoder_sha256: str
    counts: tuple[int, ...]
    bad: tuple[tuple[str, str], ...]
    shards: tuple[shards.Shard, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what is stored of a caption."""
        return (self.length, self.width) if self.form == "embeddings" else (self.length,)

    @property
    def record_bytes(self) -> int:
        """Of one caption."""
        return math.prod(self.shape) * FORMS[self.form][1].itemsize + 4


def read(folder: str | os.PathLike) -> Stored | None:
    """The captions in a folder of latents; None where it has none.

    Raises:
      UserError: captions.json is something else.
    """
    return shards.read_described(folder, FILE, FORMAT, _parsed, "captions", AGAIN)


def _parsed(values: Mapping[str, Any]) -> Stored:
    if values["stores"] not in FORMS:
        raise ValueError(f"it stores {values['stores']!r}, and not {' or '.join(FORMS)}")
    described = Stored(
        values["stores"], int(values["length"]), int(values["width"]), str(values["encoder"]["name"]),
        str(values["encoder"]["sha256"]), tuple(map(int, values["counts"])),
        tuple((name, reason) for name, reason in values["bad"]), (),
    )  # fmt: skip
    stored = tuple(shards.read_shard(given, described.record_bytes) for given in values["shards"])
    return dataclasses.replace(described, shards=stored)


def read_null(folder: str | os.PathLike) -> Captions:
    """The empty caption, `context` (L,C) float32 and `end` () int32.

    Raises:
      UserError: its file is missing or damaged.
    """
    path = remote.path(folder).expanduser() / NULL_FILE
    try:
        with np.load(files.local(path)) as arrays:
            return {"context": arrays["context"], "end": arrays["end"]}
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise UserError(f"{path} is missing or damaged ({error}): {AGAIN}") from error


def store(
    folder: str | os.PathLike, source: ImageSource, encoder: TextEncoder, *, form: str, name: str, fingerprint: str,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Stored:
    """Store all captions of the examples in a folder of latents; a killed attempt goes on at the next shard.

    Args:
      folder: of latents that were prepared from `source`.
      source: of images with captions.
      encoder: what embeds them.
      form: one of `FORMS`.
      name: the encoder's, as the user gave it.
      fingerprint: SHA-256 of its weights.
      progress: wraps the numbers of the examples, to show how far the work is.

    Raises:
      UserError: the latents are another source's, or have captions already.
    """
    folder, manifest = Path(folder).expanduser(), shards.read_manifest(folder)
    if (folder / FILE).exists():
        raise UserError(f"{folder / FILE} exists: these latents have captions; delete it to store others")
    if manifest.settings.get("source_fingerprint") != source.fingerprint():
        raise UserError(f"the latents in {folder} were made of {manifest.source}, which has changed since")
    length, width = encoder.null["context"].shape
    stored = Stored(form, length, width, name, fingerprint, (), (), ())
    with files.locked(folder, "store the captions in another folder"):
        files.write_npz(folder / NULL_FILE, encoder.null)
        items = _examples(source, manifest)
        numbers = iter(progress(range(manifest.examples)))
        counts: list[int] = []
        bad: list[tuple[str, str]] = []
        made: list[shards.Shard] = []
        for latents in manifest.shards:
            of_shard = [item for _, item in zip(itertools.islice(numbers, latents.examples), items, strict=False)]
            shard, own_counts, own_bad = _write_shard(folder, latents, of_shard, encoder, stored)
            made.append(shard)
            counts += own_counts
            bad += own_bad
        next(numbers, None)  # the progress bar sees the end
        stored = dataclasses.replace(stored, counts=tuple(counts), bad=tuple(bad), shards=tuple(made))
        values = {
            "format": FORMAT, "stores": form, "length": length, "width": width,
            "encoder": {"name": name, "sha256": fingerprint},
            "record": f"{form} {stored.shape} {FORMS[form][1].name}, place of the end token int32; little-endian",
            "captions": sum(counts), "counts": counts, "bad": bad,
            "shards": [dataclasses.asdict(shard) for shard in made],
        }  # fmt: skip
        files.write_text(folder / FILE, json.dumps(values) + "\n")
    return stored


def _examples(source: ImageSource, manifest: shards.Manifest) -> Iterator[Any]:
    """The source's items that became examples, in the latents' order: without unreadable ones, twice where flipped."""
    skipped = {name for name, _ in manifest.skipped}
    copies = 2 if manifest.settings.get("flip") else 1
    for item in source.items(0, len(source)):
        if item.where not in skipped:
            yield from itertools.repeat(item, copies)


def _write_shard(
    folder: Path, latents: shards.Shard, items: Sequence[Any], encoder: TextEncoder, stored: Stored
) -> tuple[shards.Shard, list[int], list[tuple[str, str]]]:
    """The captions of one shard of latents: the shard, captions of each example, those that were bad or cut.

    What an earlier attempt finished is kept.
    """
    path = folder / latents.file.replace("latents", "captions", 1)
    note = folder / shards.PROGRESS_FOLDER / f"{path.stem}.json"
    made_of = [stored.form, stored.encoder, stored.encoder_sha256, stored.length]
    if path.is_file() and note.is_file():
        kept = json.loads(note.read_text())
        if kept["made_of"] == made_of and kept["shard"]["bytes"] == path.stat().st_size:
            return shards.Shard(**kept["shard"]), kept["counts"], [(name, reason) for name, reason in kept["bad"]]
    counts: list[int] = []
    bad: list[tuple[str, str]] = []
    with files.whole(path) as unfinished:
        writer = array_record_module.ArrayRecordWriter(str(unfinished), record_files.WRITER_OPTIONS)
        try:
            for texts in _texts(items, counts, bad):
                ids, ends, cut = encoder.tokenizer([text for _, text in texts])
                rows = encoder.embed(ids) if stored.form == "embeddings" else ids
                for (where, text), row, end, short in zip(texts, rows, ends, cut, strict=True):
                    if short:
                        bad.append((where, f"its caption was cut to {stored.length} tokens: {text[:60]!r}"))
                    writer.write(row.astype(FORMS[stored.form][1]).tobytes() + np.array(end, "<i4").tobytes())
        finally:
            writer.close()
        shard = shards.Shard(path.name, sum(counts), unfinished.stat().st_size, remote.file_sha256(unfinished))
    values = {"made_of": made_of, "counts": counts, "bad": bad, "shard": dataclasses.asdict(shard)}
    files.write_text(note, json.dumps(values))
    return shard, counts, bad


def _texts(
    items: Sequence[Any], counts: list[int], bad: list[tuple[str, str]]
) -> Iterator[list[tuple[str, str]]]:
    """[image, caption] of many images at a time; `counts` and `bad` are filled on the way."""
    texts: list[tuple[str, str]] = []
    for item in items:
        good, own_bad = usable(item)
        bad += own_bad
        counts.append(max(1, len(good)))
        texts += [(item.where, text) for text in good or [""]]
        if len(texts) >= ENCODED_TOGETHER:
            yield texts
            texts = []
    if texts:
        yield texts


class WithCaptions:
    """A source of latents whose examples carry a caption, another one each epoch; picklable.

    An example has `context` (L,C) float16, or `ids` (L,) int32, and `end` () int32 in place of a label.

    Args:
      latents: the source of the latents, whose examples are those of the shards in their order.
      folder: that holds both.
      stored: as `read` gives it.

    Raises:
      UserError: shards of captions are missing, or speak of another number of examples than those of the latents.
    """

    def __init__(self, latents: Any, folder: str, stored: Stored):
        self.latents, self._stored = latents, stored
        root = Path(folder).expanduser()
        filled = [shard for shard in stored.shards if shard.examples]
        self._paths = [str(root / shard.file) for shard in filled]
        self._ends = np.cumsum([shard.examples for shard in filled])
        self._counts = np.array(stored.counts)
        self._first = np.cumsum(self._counts) - self._counts
        self._files: dict[int, record_files.RecordFile] = {}
        for shard in filled:
            path = root / shard.file
            if not path.is_file() or path.stat().st_size != shard.bytes:
                raise UserError(f"{path} is missing or damaged: {AGAIN}")
        if len(self._counts) != len(latents) or not len(filled) or self._ends[-1] != self._counts.sum():
            raise UserError(f"{root / FILE} speaks of another number of examples than the latents: {AGAIN}")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}

    def over(self, latents: Any) -> "WithCaptions":
        """The same captions over another source of the same examples."""
        other = copy.copy(self)
        other.latents = latents
        return other

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """An example with the caption of its first epoch."""
        one = self.read_epochs(np.array([index]), np.array([0]))
        return {name: np.asarray(array[0]) for name, array in one.items()}

    def where(self, index: int) -> str:
        """What messages call an example."""
        return self.latents.where(index)

    def read_epochs(self, indices: np.ndarray, epochs: np.ndarray) -> dict[str, np.ndarray]:
        """The examples at `indices` (B,) with the captions of their `epochs` (B,), stacked."""
        chosen = self._first[indices] + turn(indices, epochs, self._counts[indices])
        found = {name: array for name, array in self.latents.read_batch(indices).items() if name != "label"}
        return found | self._read(chosen)

    def _read(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """The captions of these numbers (B,), counted over all shards."""
        shard = np.searchsorted(self._ends, numbers, side="right")
        starts = np.concatenate([[0], self._ends[:-1]])
        name, dtype = FORMS[self._stored.form]
        rows = np.empty((len(numbers), self._stored.record_bytes - 4), np.uint8)
        end = np.empty((len(numbers), 4), np.uint8)
        try:
            opened = [self._file(each, starts) for each in shard.tolist()]
            record_files.read_records(opened, numbers - starts[shard], [rows, end])
        except record_files.UnreadableFileError as error:
            raise UserError(f"{error}: {AGAIN}") from error
        return {name: rows.view(dtype).reshape(-1, *self._stored.shape), "end": end.view("<i4").reshape(-1)}

    def _file(self, number: int, starts: np.ndarray) -> record_files.RecordFile:
        if number not in self._files:
            records = int(self._ends[number] - starts[number])
            self._files[number] = record_files.RecordFile(self._paths[number], records, self._stored.record_bytes)
        return self._files[number]
