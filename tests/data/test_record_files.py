import os

import numpy as np
import pytest
from array_record.python import array_record_module

from sra_jax.data.record_files import WRITER_OPTIONS, RecordFile, UnreadableFileError, read_records


def write(path, sizes, options=WRITER_OPTIONS, seed=0):
    """A file of random records; the records."""
    rng = np.random.default_rng(seed)
    records = [rng.bytes(size) for size in sizes]
    writer = array_record_module.ArrayRecordWriter(str(path), options)
    for record in records:
        writer.write(record)
    writer.close()
    return records


def read(files, numbers, part_sizes):
    """The records as `read_records` gives them, put together from their parts."""
    parts = [np.full((len(numbers), size), 255, np.uint8) for size in part_sizes]
    read_records(files, np.asarray(numbers), parts)
    return [row.tobytes() for row in np.concatenate(parts, axis=1)]


# Sizes of 1 and 2 bytes' and 3 bytes' varints, of latents of 32x32x4 and 64x64x4, and around a block's 65512 bytes; the
# chunk of a record of 65427 bytes ends where the first block does, that of 65467 bytes is as long as a block's content.
@pytest.mark.parametrize(
    "size", [3, 36, 127, 128, 16383, 16384, 16388, 32772, 65427, 65467, 65468, 65512, 65513, 131076, 262149]
)
def test_records_of_any_size_are_where_they_are_expected(size, tmp_path):
    count = 12 if size > 16384 else 70
    records = [write(tmp_path / str(seed), [size] * count, seed=seed) for seed in (0, 1)]
    files = [RecordFile(str(tmp_path / str(seed)), count, size) for seed in (0, 1)]
    assert files[0].direct
    assert files[1].direct
    chosen = np.random.default_rng(2).integers(0, [2, count], (3 * count, 2))
    part_sizes = [size // 2, size // 3, size - size // 2 - size // 3]
    found = read([files[file] for file, _ in chosen], chosen[:, 1], part_sizes)
    assert found == [records[file][number] for file, number in chosen]
    assert files[0].read(count - 1) == records[0][-1]


@pytest.mark.parametrize("options", ["group_size:2,uncompressed", "group_size:1,zstd:1", "group_size:1,transpose"])
def test_other_layouts_are_read_by_array_record(options, tmp_path):
    records = write(tmp_path / "file", [300] * 9, options)
    file = RecordFile(str(tmp_path / "file"), 9, 300)
    assert not file.direct
    assert read([file] * 4, [8, 0, 3, 3], [200, 100]) == [records[i] for i in (8, 0, 3, 3)]


def test_files_that_do_not_fit(tmp_path):
    path = tmp_path / "file"
    write(path, [300] * 9)
    with pytest.raises(UnreadableFileError, match=r"file cannot be read .it holds 9 records instead of 8"):
        RecordFile(str(path), 8, 300)
    with pytest.raises(UnreadableFileError, match=r"file cannot be read .record 0 has 300 bytes instead of 299"):
        RecordFile(str(path), 9, 299)
    with pytest.raises(UnreadableFileError, match=r"absent cannot be read"):
        RecordFile(str(tmp_path / "absent"), 9, 300)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UnreadableFileError, match=r"file cannot be read"):
        RecordFile(str(path), 9, 300)


def test_a_file_that_is_cut_while_it_is_open(tmp_path):
    write(tmp_path / "file", [30_000] * 9)
    file = RecordFile(str(tmp_path / "file"), 9, 30_000)
    os.truncate(tmp_path / "file", 100_000)
    read([file] * 3, [0, 1, 2], [30_000])
    with pytest.raises(UnreadableFileError, match=r"it ends inside record 3"):
        read([file] * 2, [1, 3], [30_000])
