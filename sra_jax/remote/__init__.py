"""Addresses where paths are asked for: gs:// and what else `etils.epath` knows, and hf:// for files of Hugging Face.

A local path stays a `pathlib.Path`, and nothing of this is loaded for it. An address is a path of epath's (paths.py)
with pathlib's methods; gs:// goes through gcsfs, s3:// through s3fs, az:// through adlfs. An object appears whole by
itself; it cannot be appended to, has no lock and no rename. What needs a local file gets a copy (`files.local`).
"""

import contextlib
import functools
import hashlib
import importlib.util
import json
import logging
import os
import re
import shutil
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from errno import EIO, ENOENT
from pathlib import Path
from typing import Any, cast

from sra_jax.errors import UserError

SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")

PACKAGES = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs"}
"""Schemes, and what fsspec needs for each."""

HUB = "hf"
DEFAULT_HUB = "https://huggingface.co"
HUB_FORM = "hf://OWNER/NAME/FILE, with @REVISION at its end where another than main is meant"

CHECKPOINTS = ("gs",)
"""Schemes of the addresses to which orbax writes checkpoints."""

BLOCK = 8 << 20
TIMEOUT_SECONDS = 60

LIBRARIES = (
    "gcsfs", "google", "aiohttp", "s3fs", "botocore", "aiobotocore", "adlfs", "azure", "fsspec", "requests", "urllib3",
)  # fmt: skip
"""Packages whose errors speak of the storage."""

NARRATORS = ("gcsfs", "google.auth", "s3fs", "adlfs")
"""Loggers that tell of every attempt, with its trace."""

_REPOSITORY = re.compile(r"hf://((?:(?:datasets|spaces)/)?[\w-][\w.-]*/[\w-][\w.-]*)(?:@([^/@]+))?(?:/(.*))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


class Unreachable(OSError):
    """The storage of an address did not do what it was asked for; `strerror` says why, `filename` is the address."""

    def __init__(self, address: str | os.PathLike, reason: object):
        super().__init__(EIO, f"{reason}", os.fspath(address))


def is_address(path: str | os.PathLike) -> bool:
    """Whether it begins with a scheme, such as gs://."""
    return SCHEME.match(os.fspath(path)) is not None


def scheme(path: str | os.PathLike) -> str:
    """`gs` of gs://bucket/file; empty for a local path."""
    found = SCHEME.match(os.fspath(path))
    return found[1] if found else ""


def checked(name: str, text: str) -> str:
    """An address as a user gives it, without a slash at its end; nothing is asked of the network.

    Args:
      name: what it was given to, such as `--workdir`.
      text: the address.

    Raises:
      UserError: a scheme that nothing here reads, one whose package is not installed, or no bucket or file.
    """
    kind = scheme(text)
    if kind == HUB:
        hub_parts(text)
        return text
    from etils import epath

    try:
        epath.Path(text)
    except KeyError as error:
        known = ", ".join(f"{one}://" for one in (*PACKAGES, HUB))
        raise UserError(
            f"{name}={text} is an address ({kind}://) that nothing here reads: use {known} or a local path"
        ) from error
    package = PACKAGES.get(kind)
    if package and importlib.util.find_spec(package) is None:
        raise UserError(f"{name}={text}: {kind}:// needs the package {package} (python -m pip install {package})")
    if not text[len(kind) + 3 :].strip("/"):
        raise UserError(f"{name}={text} names no bucket: give {kind}://BUCKET/PATH")
    return text.rstrip("/")


def path(given: str | os.PathLike) -> Path:
    """A path with pathlib's methods: `pathlib.Path`, or epath's for an address.

    `stat()` gives other names for an address; `files.size` and `files.modified` ask for both.
    """
    if not is_address(given):
        return Path(given)
    from etils import epath

    _prepare()
    return cast(Path, epath.Path(given))


@functools.cache
def _prepare() -> None:
    """Once, when the first address is met."""
    from sra_jax.remote import paths

    paths.register(list(PACKAGES))
    for name in NARRATORS:  # what they raise is said once, in one line
        if logging.getLogger(name).level == logging.NOTSET:
            logging.getLogger(name).setLevel(logging.CRITICAL)


@contextlib.contextmanager
def asked(address: str | os.PathLike) -> Iterator[None]:
    """Turns the errors of the packages that speak to a storage into `Unreachable`; a missing file stays one."""
    try:
        yield
    except Unreachable:
        raise
    except FileNotFoundError as error:
        raise FileNotFoundError(ENOENT, error.strerror or os.strerror(ENOENT), os.fspath(address)) from error
    except Exception as error:
        if isinstance(error, OSError) or is_storage_error(error):
            raise Unreachable(address, reason(error)) from error
        raise


def is_storage_error(error: BaseException) -> bool:
    """Whether a package that speaks to a storage made it."""
    return any(kind.__module__.partition(".")[0] in LIBRARIES for kind in type(error).__mro__)


def reason(error: BaseException) -> str:
    """What a storage said, in one line."""
    lines = (" ".join(str(part).split()) for part in (error, error.__cause__ or "") if str(part).strip())
    return next(lines, type(error).__name__)[:300]


def reach(name: str, address: str | os.PathLike) -> None:
    """Ask for an address once, so that what cannot be reached ends before any work.

    Raises:
      UserError: no answer, or none without other credentials.
    """
    try:
        with asked(address):
            path(address).exists()
    except OSError as error:
        raise unreachable(name, address, error) from error


def unreachable(name: str, address: str | os.PathLike, error: OSError) -> UserError:
    """What to tell a user of an address that does not answer, or to which nothing can be written."""
    said = "there is no such bucket" if isinstance(error, FileNotFoundError) else error.strerror or error
    return UserError(
        f"{name}={os.fspath(address)} cannot be reached ({said}): check its name, the network and "
        f"your credentials{ADVICE.get(scheme(address), '')}"
    )


ADVICE = {
    "gs": " (gcloud auth application-default login, or GOOGLE_APPLICATION_CREDENTIALS)",
    "s3": " (AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)",
}


def state(address: str | os.PathLike) -> dict[str, Any]:
    """What tells one version of an object from another, as JSON data, with its `size` in bytes where it is known.

    Raises:
      FileNotFoundError: there is none.
      Unreachable: no answer.
    """
    if scheme(address) == HUB:
        return _hub_state(os.fspath(address))
    with asked(address):
        found = cast(Any, path(address).stat())
    if found.is_directory:
        raise FileNotFoundError(ENOENT, "is a folder, not a file", os.fspath(address))
    return {"size": found.length, "modified": found.mtime, "tag": getattr(found, "tag", "")}


def download(address: str | os.PathLike, target: Path) -> None:
    """Copy an object to a local file.

    Raises:
      FileNotFoundError, Unreachable: as `state`; or fewer bytes arrived than there are.
      OSError: the local file cannot be written.
    """
    with target.open("wb") as file:
        if scheme(address) == HUB:
            _hub_download(os.fspath(address), file)
            return
        with contextlib.ExitStack() as stack:
            with asked(address):
                source = stack.enter_context(path(address).open("rb"))
            for block in _blocks(source, lambda: asked(address)):
                file.write(block)


def _blocks(source: Any, asking: Callable[[], contextlib.AbstractContextManager[None]]) -> Iterator[bytes]:
    """What `source.read` gives until its end; each reading, and nothing else, happens within `asking()`."""
    while True:
        with asking():
            block = source.read(BLOCK)
        if not block:
            return
        yield block


def upload(source: Path, address: str | os.PathLike) -> None:
    """Copy a local file to an address, where it appears whole, in place of what is there.

    Raises:
      Unreachable: it could not be written.
    """
    target = path(address)
    with asked(address):
        with source.open("rb") as file, target.open("wb") as written:
            shutil.copyfileobj(file, written, BLOCK)
        arrived = cast(Any, target.stat()).length
    if arrived != source.stat().st_size:
        raise Unreachable(address, f"{arrived} of {source.stat().st_size} bytes arrived")


def walk(folder: Path) -> Iterator[Path]:
    """All files below an address."""
    with asked(folder):
        entries = list(folder.iterdir())
    for entry in entries:
        if entry.name and os.fspath(entry) != os.fspath(folder):
            with asked(entry):
                is_folder = entry.is_dir()
            if is_folder:
                yield from walk(entry)
            else:
                yield entry


def move_folder(source: Path, target: Path) -> None:
    """Copy all files below one address to another, then remove them there."""
    for file in list(walk(source)):
        with asked(file):
            cast(Any, file).copy(target / os.path.relpath(file, source), overwrite=True)
    remove_folder(source)


def remove_folder(folder: Path) -> None:
    """Remove all files below an address, if there are any."""
    with contextlib.suppress(FileNotFoundError), asked(folder):
        cast(Any, folder).rmtree()


def place(address: str | os.PathLike) -> str:
    """Where a copy of an address lies below a folder of copies."""
    text = os.fspath(address)
    if scheme(text) == HUB:
        repository, revision, file = hub_file(text)
        return f"{HUB}/{repository.replace('/', '--')}/{revision.replace('/', '--')}/{file}"
    return text.replace("://", "/", 1)


def hub_parts(text: str) -> tuple[str, str, str]:
    """Repository, revision and file or folder of hf://OWNER/NAME/FILE[@REVISION], or OWNER/NAME@REVISION/FILE.

    The file is empty where the address names a repository alone.

    Raises:
      UserError: something else.
    """
    found = _REPOSITORY.fullmatch(text)
    if found is None:
        raise UserError(f"{text} is no file of Hugging Face: {HUB_FORM}")
    repository, revision, file = found[1], found[2], found[3] or ""
    if revision is None and "@" in file:
        file, _, revision = file.partition("@")
    if ".." in file.split("/") or revision == "":
        raise UserError(f"{text} is no file of Hugging Face: {HUB_FORM}")
    return repository, revision or "main", file.strip("/")


def hub_file(text: str) -> tuple[str, str, str]:
    """`hub_parts` of an address that names a file.

    Raises:
      UserError: something else.
    """
    repository, revision, file = hub_parts(text)
    if not file:
        raise UserError(f"{text} names no file: {HUB_FORM}")
    return repository, revision, file


def inside(folder: str, file: str) -> str:
    """The address of a file in a folder at an address; on Hugging Face the folder may be the whole repository."""
    if scheme(folder) != HUB:
        return f"{folder.rstrip('/')}/{file}"
    repository, revision, below = hub_parts(folder)
    return f"{HUB}://{repository}/{below + '/' if below else ''}{file}@{revision}"


def beside(path_of_file: str, name: str) -> str:
    """The path or address of another file in the same folder."""
    if scheme(path_of_file) != HUB:
        return os.fspath(path(path_of_file).parent / name)
    repository, revision, file = hub_file(path_of_file)
    folder = file.rpartition("/")[0]
    return f"{HUB}://{repository}/{folder + '/' if folder else ''}{name}@{revision}"


def _hub_request(text: str, method: str) -> urllib.request.Request:
    repository, revision, file = hub_file(text)
    host = os.environ.get("HF_ENDPOINT", DEFAULT_HUB).rstrip("/")
    address = f"{host}/{repository}/resolve/{urllib.parse.quote(revision, safe='')}/{urllib.parse.quote(file)}"
    request = urllib.request.Request(address, method=method)
    if token := os.environ.get("HF_TOKEN", "").strip():
        request.add_unredirected_header("Authorization", f"Bearer {token}")  # not for the host of the bytes
    return request


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """The answer that points elsewhere is the one that describes the file."""

    def redirect_request(self, *_: Any) -> None:
        """Stay."""


@contextlib.contextmanager
def _hub_asked(text: str) -> Iterator[None]:
    try:
        yield
    except urllib.error.HTTPError as error:
        repository, revision, file = hub_file(text)
        if error.code == 404:
            raise FileNotFoundError(
                ENOENT, f"there is no {file} in {repository} at revision {revision} ({error.url} answers 404)", text
            ) from error
        token = "HF_TOKEN is not accepted" if os.environ.get("HF_TOKEN") else "set HF_TOKEN"
        hint = f": {repository} may need access, {token}" if error.code in (401, 403) else ""
        raise Unreachable(text, f"{error.url} answers {error.code} {error.reason}{hint}") from error
    except OSError as error:  # no network, time-outs
        raise Unreachable(text, f"{os.environ.get('HF_ENDPOINT', DEFAULT_HUB)}: {error}") from error


def _hub_state(text: str) -> dict[str, Any]:
    """ETag and size of a file; the ETag of a large file is its SHA-256."""
    with _hub_asked(text):
        try:
            with urllib.request.build_opener(_NoRedirect).open(_hub_request(text, "HEAD"), timeout=30) as response:
                headers: Any = response.headers
        except urllib.error.HTTPError as error:
            if not 300 <= error.code < 400:
                raise
            headers = error.headers
    tag = (headers.get("X-Linked-Etag") or headers.get("ETag") or headers.get("Last-Modified") or "").strip()
    size = headers.get("X-Linked-Size") or headers.get("Content-Length")
    return {"tag": tag.removeprefix("W/").strip('"'), "size": None if size is None else int(size)}


def _hub_download(text: str, file: Any) -> None:
    with _hub_asked(text):
        response = urllib.request.urlopen(_hub_request(text, "GET"), timeout=TIMEOUT_SECONDS)
    with response:
        expected, arrived = response.headers.get("Content-Length"), 0
        for block in _blocks(response, lambda: _hub_asked(text)):
            file.write(block)
            arrived += len(block)
    if expected is not None and arrived != int(expected):
        raise Unreachable(text, f"{arrived} of {expected} bytes arrived")


def is_fixed(address: str | os.PathLike) -> bool:
    """Whether what lies there can never change: a file of Hugging Face at a commit."""
    return scheme(address) == HUB and _COMMIT.fullmatch(hub_file(os.fspath(address))[1]) is not None


def sha256_of(found: Mapping[str, Any]) -> str | None:
    """The checksum that the storage itself states, of what `state` gave; None where it states none."""
    tag = str(found.get("tag", ""))
    return tag if re.fullmatch(r"[0-9a-f]{64}", tag) else None


def describe(found: Mapping[str, Any]) -> str:
    """What `state` gave, as the text that is kept beside a copy."""
    return json.dumps(dict(found), sort_keys=True)


def file_sha256(local: str | os.PathLike) -> str:
    """SHA-256 of a local file in hexadecimal digits."""
    with open(local, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
