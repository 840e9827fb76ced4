"""What samples are compared with: statistics and features of a reference set."""

import dataclasses
import json
from pathlib import Path

import numpy as np

from sra_jax import files, remote
from sra_jax.errors import UserError
from sra_jax.evaluation.features import Extractor, extract_features
from sra_jax.evaluation.images import Digest, ImageSet, npz_names, open_images, read_npz
from sra_jax.evaluation.statistics import GaussianStatistics, Moments

FORMAT = "sra_jax statistics 1"
MOST_FEATURES = 10_000  # as many as ADM's reference files have images

# Names of the statistics in ADM's reference files; ours use the same, so ADM's suite reads them too.
POOL = ("mu", "sigma")
SPATIAL = ("mu_s", "sigma_s")


@dataclasses.dataclass(frozen=True)
class Reference:
    """A reference set as one extractor sees it.

    Attributes:
      name: of the set.
      extractor: identity of the extractor.
      image_size: (H,W) in pixels; None where the file does not say (mu and sigma alone).
      count: how many images the statistics are of; None where the file does not say (ADM's).
      pool: statistics of pool features, for FID.
      spatial: statistics of spatial features, for sFID; None if the extractor has none.
      features: (M,D) float32 pool features of up to MOST_FEATURES images, for precision, recall and KID; None if the
        source holds none.
      class_names: one a label of the set, or None where it has none.
      checksum: 16 hexadecimal digits that stand for the images, or for the file where it was read from one; or None.
    """

    name: str
    extractor: str
    image_size: tuple[int, int] | None
    count: int | None
    pool: GaussianStatistics
    spatial: GaussianStatistics | None
    features: np.ndarray | None
    class_names: tuple[str, ...] | None = None
    checksum: str | None = None


@dataclasses.dataclass(frozen=True)
class Stored:
    """What a statistics file of ours says of itself; see `Reference`."""

    name: str
    extractor: str
    image_size: tuple[int, int] | None
    count: int | None
    class_names: tuple[str, ...] | None


def stored_metadata(path: str | Path | ImageSet) -> Stored | None:
    """What a statistics file of ours says of itself, None for any other source.

    Raises:
      UserError: the path is not there, or an npz file is damaged.
    """
    if isinstance(path, ImageSet):
        return None
    path = files.local(path)
    if path.is_dir():
        return None
    if not path.exists():
        raise UserError(f"{path} does not exist: expected an npz file or a folder of images")
    if path.suffix != ".npz" or "meta" not in npz_names(path):
        return None
    try:
        metadata = json.loads(str(read_npz(path, ["meta"])["meta"]))
        if metadata["format"] != FORMAT:
            raise UserError(
                f"{path} is of the format {metadata['format']!r}, this version reads {FORMAT!r}: make it again from "
                "the images"
            )
        size, count, names = metadata["image_size"], metadata["count"], metadata.get("class_names")
        return Stored(
            name=str(metadata["name"]),
            extractor=str(metadata["extractor"]),
            image_size=None if size is None else (int(size[0]), int(size[1])),
            count=None if count is None else int(count),
            class_names=None if names is None else tuple(map(str, names)),
        )
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} has a meta entry that is not ours: {error!r}") from error


def holds_inception_statistics(path: str | Path | ImageSet) -> bool:
    """Whether a source is a file of ADM, pytorch-fid or clean-fid: mu and sigma of the published Inception's features.

    Raises:
      UserError: the path is not there, or an npz file is damaged.
    """
    if isinstance(path, ImageSet) or stored_metadata(path):
        return False
    path = files.local(path)
    return path.suffix == ".npz" and not path.is_dir() and set(POOL) <= set(npz_names(path))


def refuse_inception_statistics(path: str | Path | ImageSet, identity: str) -> None:
    """Raises a `UserError` where a source holds statistics of another extractor than the one named."""
    if holds_inception_statistics(path):
        raise UserError(
            f"{path} holds statistics of the FID Inception network with its published weights, this is {identity}: "
            "their numbers do not compare. Use --extractor=inception, or a reference of images only"
        )


def parts_of(path: str | Path | ImageSet, extractor: Extractor) -> frozenset[str]:
    """Which of `pool`, `spatial` and `features` a source can give, told without loading it."""
    if isinstance(path, ImageSet) or not (stored_metadata(path) or holds_inception_statistics(path)):
        return frozenset({"pool", "features"} | {"spatial"} & extractor.outputs)
    names = set(npz_names(files.local(path)))
    given = {"spatial": set(SPATIAL) <= names, "features": bool({"features", "arr_0"} & names)}
    return frozenset({"pool"} | {part for part, there in given.items() if there})


def reference_images(path: str | Path | ImageSet) -> ImageSet | None:
    """The images of a reference source, None for a statistics file, which has none.

    Raises:
      UserError: the path is not there, or damaged.
    """
    if isinstance(path, ImageSet):
        return path
    return None if stored_metadata(path) else open_images(path)


def image_size_of(path: str | Path | ImageSet) -> tuple[int, int] | None:
    """Height and width of a source's images, told without loading it; None for mu and sigma alone."""
    if isinstance(path, ImageSet):
        return path.shape[1:3]
    if stored := stored_metadata(path):
        return stored.image_size
    return None if "arr_0" not in npz_names(files.local(path)) else open_images(path).shape[1:3]


def make_reference(
    images: ImageSet,
    extractor: Extractor,
    *,
    most_features: int = MOST_FEATURES,
    batch_size: int | None = None,
    progress: bool = True,
) -> Reference:
    """Statistics of all images and features of up to `most_features` of them, evenly spaced.

    Raises:
      UserError: fewer than two images, or images that cannot be read.
    """
    if len(images) < 2:
        raise UserError(f"a reference needs at least 2 images, {images.name} has {len(images)}")
    chosen = np.zeros(len(images), bool)
    chosen[np.linspace(0, len(images) - 1, min(most_features, len(images))).round().astype(int)] = True
    pool, spatial = Moments(), Moments()
    features = []
    done = 0
    digest = Digest()
    for batch, _ in extract_features(
        digest.watched(images.batches(256)),
        extractor,
        batch_size=batch_size,
        total=len(images),
        description=f"reference {images.name}",
        progress=progress,
    ):
        pool.update(batch["pool"])
        if "spatial" in extractor.outputs:
            spatial.update(batch["spatial"])
        features.append(batch["pool"][chosen[done : done + len(batch["pool"])]])
        done += len(batch["pool"])
    return Reference(
        name=images.name,
        extractor=extractor.identity,
        image_size=images.shape[1:3],
        count=len(images),
        pool=pool.statistics(),
        spatial=spatial.statistics() if spatial.count else None,
        features=np.concatenate(features),
        class_names=images.class_names,
        checksum=digest.text,
    )


def save_reference(reference: Reference, path: str | Path) -> None:
    """Writes a statistics file that `load_reference` reads; its mu, sigma, mu_s, sigma_s are named as in ADM's files.

    Raises:
      UserError: the file exists, or its name does not end with .npz.
    """
    path = check_statistics_path("statistics", path)
    metadata = {
        "format": FORMAT,
        "name": reference.name,
        "extractor": reference.extractor,
        "image_size": reference.image_size and list(reference.image_size),
        "count": reference.count,
        "class_names": reference.class_names,
    }
    arrays = dict(zip(POOL, (reference.pool.mean, reference.pool.covariance), strict=True))
    if reference.spatial is not None:
        arrays |= dict(zip(SPATIAL, (reference.spatial.mean, reference.spatial.covariance), strict=True))
    if reference.features is not None:
        arrays["features"] = reference.features
    files.write_npz(path, {"meta": np.array(json.dumps(metadata)), **arrays})


def check_statistics_path(flag: str, path: str | Path) -> Path:
    """Refuses a path that exists already, cannot be written or is not called .npz, before any work starts.

    Raises:
      UserError: as said.
    """
    if Path(path).suffix != ".npz":
        raise UserError(f"statistics are written as npz; {path} does not end with .npz")
    return files.check_output(flag, path)


def _statistics(path: Path, names: tuple[str, str]) -> GaussianStatistics:
    arrays = read_npz(path, list(names))
    mean, covariance = (np.asarray(arrays[name], np.float64) for name in names)
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise UserError(f"{path}: {names[0]} {mean.shape} and {names[1]} {covariance.shape} are no mean and covariance")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError(f"{path}: {names[0]} or {names[1]} holds NaN or infinite values")
    return GaussianStatistics(mean, covariance)


def _load_stored(path: Path, metadata: Stored, extractor: Extractor) -> Reference:
    if metadata.extractor != extractor.identity:
        raise UserError(
            f"{path} was made with the extractor {metadata.extractor}, this is {extractor.identity}: their numbers "
            "do not compare. Use the same extractor and weights, or make the statistics again from the images"
        )
    names = npz_names(path)
    pool = _statistics(path, POOL)
    features = read_npz(path, ["features"])["features"] if "features" in names else None
    if features is not None and (features.ndim != 2 or features.shape[1:] != pool.mean.shape):
        raise UserError(f"{path}: features {features.shape} do not fit mu {pool.mean.shape}")
    return Reference(
        pool=pool,
        spatial=_statistics(path, SPATIAL) if set(SPATIAL) <= set(names) else None,
        features=features,
        checksum=remote.file_sha256(path)[:16],
        **dataclasses.asdict(metadata),
    )


def load_reference(
    path: str | Path | ImageSet,
    extractor: Extractor,
    *,
    with_features: bool = True,
    batch_size: int | None = None,
    progress: bool = True,
) -> Reference:
    """A reference from a statistics file, one of ADM's reference files, an npz of images or a folder of images.

    Args:
      path: statistics file (`save_reference`); ADM's VIRTUAL_*.npz (statistics of the whole set with 10,000 of its
        images); mu and sigma alone, as pytorch-fid and clean-fid write them; npz or folder of images; or images that
        are open already.
      extractor: the network whose features are compared.
      with_features: whether features are needed (precision, recall, KID). ADM's files hold images for them, which then
        go through the network; statistics files of ours hold the features themselves.
      batch_size: images at a time.
      progress: whether there is a progress bar.

    Raises:
      UserError: the source is missing, damaged or incomplete, or was made with another extractor.
    """
    if isinstance(path, ImageSet):
        return make_reference(path, extractor, batch_size=batch_size, progress=progress)
    path = files.local(path)
    metadata = stored_metadata(path)
    if metadata:
        return _load_stored(path, metadata, extractor)
    if not holds_inception_statistics(path):
        return make_reference(open_images(path), extractor, batch_size=batch_size, progress=progress)
    if extractor.resize != "tf1" and set(SPATIAL) <= set(npz_names(path)):
        raise UserError(
            f"{path} holds statistics of ADM's suite, which resizes as TensorFlow 1 did: leave out "
            f"--resize={extractor.resize}, or give pytorch-fid's statistics or images"
        )
    if not extractor.published:
        refuse_inception_statistics(path, extractor.identity)
    pool = _statistics(path, POOL)
    images = open_images(path) if "arr_0" in npz_names(path) else None
    features = None
    if with_features and images is not None:
        features = make_reference(images, extractor, batch_size=batch_size, progress=progress).features
    return Reference(
        name=path.stem,
        extractor=extractor.identity,
        image_size=None if images is None else images.shape[1:3],
        count=None,
        pool=pool,
        spatial=_statistics(path, SPATIAL) if set(SPATIAL) <= set(npz_names(path)) else None,
        features=features,
        checksum=remote.file_sha256(path)[:16],
    )
