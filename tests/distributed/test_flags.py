"""What the flags of several processes may say, before any of them is waited for."""

import pytest
from absl import flags
from absl.testing import flagsaver

from sra_jax.distributed import processes
from sra_jax.errors import UserError


@pytest.fixture
def defined():
    """The flags, for the time of a test."""
    before = set(flags.FLAGS)
    processes.define_flags()
    yield
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("address", "count", "index", "message"),
    [
        ("10.0.0.1", 2, 0, "--coordinator_address=10.0.0.1 must be HOST:PORT"),
        (":1234", 2, 0, "must be HOST:PORT"),
        ("host:", 2, 0, "must be HOST:PORT"),
        ("host:port", 2, 0, "must be HOST:PORT"),
        ("host:١٢٣٤", 2, 0, "must be HOST:PORT"),
        ("host:0", 2, 0, "port from 1 to 65535"),
        ("host:70000", 2, 0, "port from 1 to 65535"),
        ("host:99999999999999999999", 2, 0, "port from 1 to 65535"),
        ("host:1234", 2, 2, "--process_id=2 is none of --num_processes=2: they count from 0 to 1"),
        ("host:1234", None, None, "--num_processes, --process_id missing"),
    ],
)
def test_places_that_no_process_has(defined, address, count, index, message):
    given = {"coordinator_address": address, "num_processes": count, "process_id": index}
    with flagsaver.flagsaver(**given), pytest.raises(UserError, match=message), processes.joined():
        pass
