"""Captions of real digits: scikit-learn's scans on a 16x16 canvas, one or two of them, and what they say in words.

A canvas holds one scan in the middle, or two side by side, each at one of three heights. Its captions come from a
small grammar with several wordings. No label goes with them: what is on a canvas is known from words alone. `HELD_OUT`
pairs are in no training canvas, in any wording, while every digit is trained on each side.
"""

import functools
from typing import Any

import jax
import numpy as np
from flax import nnx
from PIL import Image

from sra_jax.data import digits
from sra_jax.data.captions import TextEncoder, turn
from sra_jax.data.dataset import Dataset, Decoder, Example
from sra_jax.interop.clip_text import ClipTokenizer, make_tokenizer, vocabulary_of
from sra_jax.models.clip_text import ClipText, ClipTextConfig

SIDE = 16
SCAN = 8
TOPS = (0, 4, 8)
"""Where scans may begin, from the top."""

CANVASES = 20_000
SINGLE_SHARE = 0.2
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

Content = tuple[int, ...]
"""The digits of a canvas, one or two, from left to right."""

SINGLES: tuple[Content, ...] = tuple((digit,) for digit in range(10))

HELD_OUT: tuple[Content, ...] = tuple((left, (left + step) % 10) for step in (3, 6) for left in range(10))
"""Pairs that are never trained: two of each left and two of each right digit."""

TRAINED: tuple[Content, ...] = tuple(
    (left, right) for left in range(10) for right in range(10) if (left, right) not in HELD_OUT
)

PAIRS = {"seen": TRAINED, "held_out": HELD_OUT}

WORDINGS = {
    1: ("a {0}", "{0}", "the digit {0}"),
    2: ("a {0} left of a {1}", "a {1} right of a {0}", "{0}, then {1}", "{0} and {1}"),
}
"""How a canvas of so many digits is told. {0} is the left digit."""

LENGTH = 9
"""Tokens of a caption, begin and end included: one a word, for the vocabulary knows the grammar's words."""

TOWER: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
MIXING = 0.3
"""How much the tower's random layers add to its tokens, which are of unit size: enough to tell places apart."""

PARTS = {"generator": slice(0, 550), "judge": slice(550, 1500), "unseen": slice(1500, None)}
"""Who sees which of the 1,797 scans, after a fixed shuffle: the model, its judge in training, the judge when tested."""


def caption(content: Content, wording: int) -> str:
    """The caption of a canvas in one of its `WORDINGS`."""
    return WORDINGS[len(content)][wording].format(*(NAMES[digit] for digit in content))


def captions(content: Content) -> tuple[str, ...]:
    """All captions of a canvas."""
    return tuple(caption(content, wording) for wording in range(len(WORDINGS[len(content)])))


@functools.cache
def scans(part: str) -> tuple[np.ndarray, np.ndarray]:
    """The scans (n,8,8) uint8 in 0..16 of one of `PARTS`, and their digits (n,)."""
    every = digits.Digits()
    order = np.random.RandomState(0).permutation(len(every))[PARTS[part]]
    return every.images[order, :, :, 0], every.labels[order]


def place(canvas: np.ndarray, scan: np.ndarray, top: int, left: int) -> None:
    """Put a scan on a canvas (16,16); where both have ink the stronger stays."""
    region = canvas[top : top + SCAN, left : left + SCAN]
    np.maximum(region, scan, out=region)


def compose(content: Content, part: str, random: np.random.RandomState) -> np.ndarray:
    """A canvas (16,16) uint8 in 0..16 of these digits, with scans of a part and heights at random."""
    images, labels = scans(part)
    canvas = np.zeros((SIDE, SIDE), np.uint8)
    lefts = ((SIDE - SCAN) // 2,) if len(content) == 1 else (0, SIDE - SCAN)
    for digit, left in zip(content, lefts, strict=True):
        scan = images[random.choice(np.flatnonzero(labels == digit))]
        place(canvas, scan, TOPS[random.randint(len(TOPS))], left)
    return canvas


def merges() -> list[tuple[str, str]]:
    """Merges that make one token of each of the grammar's words."""
    grammar = " ".join(wording for wordings in WORDINGS.values() for wording in wordings)
    words = {word for word in grammar.replace(",", " ").split() if "{" not in word} | set(NAMES)
    pairs: dict[tuple[str, str], None] = {}
    for word in sorted(words):
        piece, *rest = [*word[:-1], f"{word[-1]}</w>"]
        for character in rest:
            pairs[piece, character] = None
            piece += character
    return list(pairs)


def text_encoder(data: Any) -> TextEncoder:
    """The set's text encoder: a small CLIP tower of seeded random numbers, never trained."""
    del data
    return _tower()


@functools.cache
def _tower() -> TextEncoder:
    pieces = merges()
    vocabulary = vocabulary_of(pieces)
    config = ClipTextConfig(vocab_size=len(vocabulary), max_position_embeddings=LENGTH, **TOWER)

    @jax.jit
    def draw(key: jax.Array) -> Any:
        return nnx.to_pure_dict(nnx.split(ClipText(config, rngs=nnx.Rngs(key)))[1])

    params = jax.tree.map(np.array, draw(jax.random.key(0)))
    for table, spread in (("tokens", 1.0), ("positions", 0.5)):
        params[table]["embedding"] *= spread / params[table]["embedding"].std()
    for layer in ("out", "back"):
        params["layers"][layer]["kernel"] *= MIXING
    return TextEncoder(config, params, ClipTokenizer(make_tokenizer(vocabulary, pieces), LENGTH))


class DigitsCaptions:
    """Random access to canvases: `image` (16,16,1) uint8 in 0..16, a caption and its `end` () int32.

    Args:
      form: of the captions: "embeddings", `context` (L,C) float32, or "ids", `ids` (L,) int32.
    """

    def __init__(self, form: str = "embeddings"):
        random = np.random.RandomState(1)
        contents = [
            SINGLES[random.randint(10)] if random.rand() < SINGLE_SHARE else TRAINED[random.randint(len(TRAINED))]
            for _ in range(CANVASES)
        ]
        self.images = np.stack([compose(content, "generator", random) for content in contents])[..., None]
        texts: list[str] = []
        first: dict[Content, int] = {}
        for content in (*SINGLES, *TRAINED):
            first[content] = len(texts)
            texts += captions(content)
        ids, ends, _ = _tower().tokenizer(texts)
        self._captions = _tower()(texts) if form == "embeddings" else {"ids": ids, "end": ends}
        self._first = np.array([first[content] for content in contents])
        self._counts = np.array([len(WORDINGS[len(content)]) for content in contents])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Example:
        """A canvas with the caption of its first epoch."""
        one = self.read_epochs(np.array([index]), np.array([0]))
        return {name: np.asarray(array[0]) for name, array in one.items()}

    def read_epochs(self, indices: np.ndarray, epochs: np.ndarray) -> dict[str, np.ndarray]:
        """The canvases at `indices` (B,) with the captions of their `epochs` (B,), stacked."""
        chosen = self._first[indices] + turn(indices, epochs, self._counts[indices])
        return {"image": self.images[indices], **{name: array[chosen] for name, array in self._captions.items()}}


def prompts(kind: str, count: int, seed: int) -> tuple[list[str], list[Content]]:
    """Captions of pairs, wordings in turn: `seen` of those that are trained, `held_out` of those that never are.

    Returns:
      `count` captions, and the digits that each asks for.
    """
    pairs = PAIRS[kind]
    random = np.random.RandomState(seed)
    contents = [pairs[i] for i in random.randint(len(pairs), size=count)]
    return [caption(content, i % len(WORDINGS[2])) for i, content in enumerate(contents)], contents


PROMPT_LISTS = {
    kind: functools.partial(lambda kind, count, seed: prompts(kind, count, seed)[0], kind) for kind in PAIRS
}


def load(data: Any) -> Dataset:
    """The whole set, with captions in the form that `data` asks for."""
    form = data.get("captions", "embeddings")  # a recipe with labels asks for none and is refused later
    return Dataset(
        source=DigitsCaptions(form), latent_shape=(SIDE, SIDE, 1), num_classes=0, encode=digits.encode,
        null=_tower().null, text=_tower() if form == "ids" else None,
    )  # fmt: skip


def decoder(data: Any) -> Decoder:
    """Latents in [-1, 1] to grey images, as for the digits."""
    return digits.decoder(data)


def example_from_image(data: Any, picture: Image.Image) -> Example:
    """Any square picture as 16x16 grey levels 0..16, with the empty caption."""
    del data
    grey = np.asarray(picture.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX), np.float32)
    return {"image": np.round(grey * (digits.LEVELS / 255)).astype(np.uint8)[..., None], **_tower().null}
