"""TensorBoard's event files, written without TensorFlow, whose import would be most of a command's start.

An event file is a list of records (length, checksum, bytes), each an `Event` of TensorBoard's protocol buffers, which
come with the package tensorboard, as does the framing.
"""

import io
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from sra_jax import files, remote

if TYPE_CHECKING:
    from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2

OBJECT_BYTES = 4 << 20


class Writer:
    """Adds a file of its own to a folder of events. Its methods raise `OSError` where it cannot be written.

    An object at an address is written anew as it grows, so there a further one is begun every `OBJECT_BYTES`.
    """

    def __init__(self, folder: Path):
        # Half a second that commands which log nothing need not wait for.
        from tensorboard.compat.proto import event_pb2

        self._folder, self._event = folder, event_pb2.Event
        if not remote.is_address(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._begin()

    def _begin(self) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        # TensorBoard reads the files of a folder in the order of their names.
        now = time.time_ns()
        name = f"events.out.tfevents.{now // 10**9}.{socket.gethostname()}.{os.getpid()}.{now % 10**9}"
        path = self._folder / name
        self._object = files.Growing(path, old=False) if remote.is_address(path) else None
        self._records = RecordWriter(self._object or path.open("xb"))
        self._write(self._event(wall_time=time.time(), file_version="brain.Event:2"))

    def _write(self, event: "event_pb2.Event") -> None:
        self._records.write(event.SerializeToString())
        self._records.flush()
        if self._object is not None and self._object.tell() > OBJECT_BYTES:
            self._records.close()
            self._begin()

    def _write_values(
        self, step: int, values: "Mapping[str, tensor_pb2.TensorProto]", metadata: "summary_pb2.SummaryMetadata"
    ) -> None:
        event = self._event(wall_time=time.time(), step=step)
        for name, tensor in values.items():
            event.summary.value.add(tag=name, tensor=tensor, metadata=metadata)
        self._write(event)

    def write_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of a step under their names."""
        from tensorboard.compat.proto import tensor_pb2, tensor_shape_pb2, types_pb2
        from tensorboard.plugins.scalar import metadata

        scalar = tensor_shape_pb2.TensorShapeProto()
        tensors = {
            name: tensor_pb2.TensorProto(dtype=types_pb2.DT_FLOAT, tensor_shape=scalar, float_val=[value])
            for name, value in values.items()
        }
        self._write_values(step, tensors, metadata.create_summary_metadata(display_name="", description=""))

    def write_images(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Pictures (N,H,W,C) uint8 of a step, C 1 or 3, under their names."""
        from tensorboard.compat.proto import tensor_pb2, tensor_shape_pb2, types_pb2
        from tensorboard.plugins.image import metadata

        tensors = {}
        for name, batch in pictures.items():
            parts = [str(batch.shape[2]).encode(), str(batch.shape[1]).encode(), *map(_png, batch)]
            length = tensor_shape_pb2.TensorShapeProto.Dim(size=len(parts))
            tensors[name] = tensor_pb2.TensorProto(
                dtype=types_pb2.DT_STRING, tensor_shape=tensor_shape_pb2.TensorShapeProto(dim=[length]),
                string_val=parts,
            )  # fmt: skip
        self._write_values(step, tensors, metadata.create_summary_metadata(display_name="", description=""))

    def flush(self) -> None:
        """What was written is in the file."""
        self._records.flush()

    def sync(self) -> None:
        """What was written is in the file, and in the object at an address."""
        if self._object is not None:
            self._object.sync()

    def close(self) -> None:
        """The file is whole after this."""
        self._records.close()


def _png(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture).save(file, format="PNG")
    return file.getvalue()
