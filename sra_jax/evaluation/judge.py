"""Does a canvas of the digits with captions show what its caption asks for? A judge that never saw the model's scans.

The judge looks at a canvas in three strips, left, middle and right, each as wide as a scan, and tells of each which
digit stands there, whether it is blank, or that it shows anything else: parts of digits, several on top of each other.
It is a support vector machine, for which few scans are enough: trained on the strips of whole canvases, blank and
crowded ones among them, of scans that the model is not trained on, and tested on real canvases of scans that neither
has seen.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from sra_jax.data import digits, digits_captions
from sra_jax.data.digits_captions import SCAN, SIDE, Content
from sra_jax.runs.state import Params
from sra_jax.sampling.generation import Generator

if TYPE_CHECKING:
    from sklearn.svm import SVC

BLANK, OTHER = 10, 11
"""Classes of a strip beside the ten digits."""

LEVEL = 255 / digits.LEVELS
"""Of an image, to one of the scans, whose distances the machine's width fits."""

LEFTS = (0, (SIDE - SCAN) // 2, SIDE - SCAN)
"""Where the strips begin."""

SHARES = {"pair": 0.7, "single": 0.15, "blank": 0.05, "crowded": 0.1}
"""What a judge's canvases show; blank ones have specks, crowded ones three to five scans anywhere."""

CANVASES = 2000
TESTED = 2000


def answer(content: Content) -> tuple[int, int, int]:
    """The classes of the strips of a canvas with these digits. Parts of digits are seen between two, beside one."""
    return (content[0], OTHER, content[1]) if len(content) == 2 else (OTHER, content[0], OTHER)


def canvases(part: str, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Real canvases as the model's samples come: (count,16,16,1) uint8, and the classes of their strips (count,3).

    Args:
      part: of the scans, one of `digits_captions.PARTS`.
      count: how many.
      seed: of the choice.
    """
    random = np.random.RandomState(seed)
    images, classes = [], []
    for kind in random.choice(list(SHARES), size=count, p=list(SHARES.values())):
        if kind == "blank":
            specks = random.rand(SIDE, SIDE) < 0.1 * random.rand()
            image, found = np.where(specks, random.randint(17, size=(SIDE, SIDE)), 0).astype(np.uint8), (BLANK,) * 3
        elif kind == "crowded":
            image, found = _crowd(part, random), (OTHER,) * 3
        else:
            content = tuple(random.randint(10, size=2 if kind == "pair" else 1).tolist())
            image, found = digits_captions.compose(content, part, random), answer(content)
        images.append(image)
        classes.append(found)
    levels = jnp.asarray(np.stack(images)[..., None])
    return np.asarray(digits.decode(digits.encode({"image": levels}, None))), np.array(classes)


def _crowd(part: str, random: np.random.RandomState) -> np.ndarray:
    """Scans on top of each other: in each strip lie several, or parts of several."""
    scans, _ = digits_captions.scans(part)
    canvas = np.zeros((SIDE, SIDE), np.uint8)
    for left in (*LEFTS, *random.randint(SIDE - SCAN + 1, size=random.randint(1, 3)).tolist()):
        digits_captions.place(canvas, scans[random.randint(len(scans))], random.randint(SIDE - SCAN + 1), left)
    return canvas


def strips(images: np.ndarray) -> np.ndarray:
    """Canvases (N,16,16,1) -> their strips (3N,16,8,1), those of a canvas together."""
    return np.stack([images[:, :, left : left + SCAN] for left in LEFTS], axis=1).reshape(-1, SIDE, SCAN, 1)


@dataclasses.dataclass(frozen=True)
class Judge:
    """A trained judge.

    Attributes:
      machine: of strips.
      accuracy: share of `TESTED` real canvases of unseen scans that it judges right, pairs and single digits.
    """

    machine: "SVC"
    accuracy: float

    def right(self, images: np.ndarray, asked: Sequence[Content]) -> np.ndarray:
        """Whether each image (N,16,16,1) uint8 shows exactly the digits asked for, in their order; (N,) bool."""
        return shown_right(classes_of(self.machine, images), np.array([answer(content) for content in asked]))


def shown_right(seen: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Whether the strips seen (N,3) are those expected: the same digits where there are any, and no digit beside one.

    Between two digits there is no room for a third, so that the middle of a pair is not asked for.
    """
    digit = expected < BLANK
    right = np.where(digit, seen == expected, seen >= BLANK)
    right[:, 1] |= digit[:, 0]
    return np.all(right, axis=1)


def classes_of(machine: "SVC", images: np.ndarray) -> np.ndarray:
    """The judged classes of the strips of each image (N,16,16,1) uint8, (N,3)."""
    return machine.predict(strips(images).reshape(len(images) * len(LEFTS), -1) / LEVEL).reshape(-1, len(LEFTS))


@functools.cache
def trained_judge(count: int = CANVASES) -> Judge:
    """The judge, trained in seconds, the same every time, on so many canvases."""
    from sklearn.svm import SVC  # seconds, which only who judges waits

    images, classes = canvases("judge", count, seed=0)
    machine = SVC(gamma=0.001, C=10).fit(strips(images).reshape(classes.size, -1) / LEVEL, classes.ravel())
    unseen, expected = canvases("unseen", TESTED, seed=1)
    told = (expected < BLANK).any(axis=1)
    return Judge(machine, float(shown_right(classes_of(machine, unseen), expected)[told].mean()))


def can_tell(data: ConfigDict, prompts: str | None) -> bool:
    """Whether there is a judge of samples for these prompts of a data set, by the name of their list."""
    return data.name == "digits_captions" and prompts in digits_captions.PAIRS


def measure(
    generator: Generator, params: Params, kind: str, count: int, seed: int
) -> tuple[dict[str, float], np.ndarray]:
    """Judge `count` samples, one a prompt; none is thrown away.

    Args:
      generator: of the run.
      params: {"model": ...}.
      kind: of prompts, one of `digits_captions.PAIRS`.
      count: of prompts and samples.
      seed: of the choice of prompts.

    Returns:
      `judged_right`, the share of samples that show exactly what was asked for; `judge_accuracy`, the judge's own share
      of right answers on real canvases of scans that nobody was trained on; and the images (count,16,16,1) uint8.
    """
    texts, contents = digits_captions.prompts(kind, count, seed)
    judge = trained_judge()
    images = []
    with tqdm(total=count, desc=f"samples of {kind} pairs", unit="image", dynamic_ncols=True) as bar:
        for batch, _ in generator.images(params, count, texts):
            images.append(batch)
            bar.update(len(batch))
    shown = np.concatenate(images)
    return {"judged_right": float(judge.right(shown, contents).mean()), "judge_accuracy": judge.accuracy}, shown


def table(result: Mapping[str, Any]) -> str:
    """The result of `measure` as lines for a terminal."""
    rows = {"shows what was asked": "judged_right", "the judge itself": "judge_accuracy"}
    return "\n".join(f"  {label:<22}{result[name]:>12.4f}" for label, name in rows.items())
