"""CLIP's text tower and its tokenizer in the files of Hugging Face, read without PyTorch.

A folder holds `config.json` and `model.safetensors`, of the text tower alone or of a whole CLIP, and the tokenizer as
`tokenizer.json` or as `vocab.json` and `merges.txt`.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from flax import nnx, traverse_util
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from sra_jax import files, remote
from sra_jax.errors import UserError
from sra_jax.interop import hub
from sra_jax.models.clip_text import ACTIVATIONS, ClipText, ClipTextConfig

DEFAULT_CLIP = "openai/clip-vit-large-patch14"
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
TOKENIZER_FILE = "tokenizer.json"
VOCABULARY_FILES = ("vocab.json", "merges.txt")
_KIND = hub.Kind(
    "text encoder", "clip", f"{CONFIG_FILE}, {WEIGHTS_FILE} and {TOKENIZER_FILE} of a CLIP", DEFAULT_CLIP
)
BEGIN, END = "<|startoftext|>", "<|endoftext|>"

# One part of the path in our tree -> the same part of a Hugging Face name
_PART_NAMES = {
    "tokens": "embeddings.token_embedding",
    "positions": "embeddings.position_embedding",
    "norm": "final_layer_norm",
    "norm_attention": "layer_norm1",
    "norm_mlp": "layer_norm2",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "out": "self_attn.out_proj",
    "hidden": "mlp.fc1",
    "back": "mlp.fc2",
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
}
_PREFIX = "text_model."
# What else a file of a whole CLIP, or of an older version, holds
_OTHERS = re.compile(r"vision_model\.|visual_projection\.|text_projection\.|logit_scale$|embeddings\.position_ids$")


@dataclasses.dataclass(frozen=True)
class TextTower:
    """A text encoder that is not trained.

    Attributes:
      name: where it came from: a folder or a Hugging Face id.
      config: its sizes.
      params: its parameters, a nested dict.
      tokenizer: captions to ids.
      fingerprint: SHA-256 of its weights.
    """

    name: str
    config: ClipTextConfig
    params: Mapping[str, Any]
    tokenizer: "ClipTokenizer"
    fingerprint: str


class ClipTokenizer:
    """Captions to rows of token ids: begin, pieces, end, then end again up to the length.

    Padding is the end token, as Stable Diffusion's and U-ViT's captions were padded; OpenAI's own code pads with 0,
    which gives other embeddings at the padded positions.

    Args:
      tokenizer: splits and merges as CLIP's does; it adds no special tokens.
      length: L, ids a caption.

    Raises:
      UserError: the vocabulary has no begin or end token, or there is no room for them.
    """

    def __init__(self, tokenizer: Tokenizer, length: int):
        self._tokenizer = tokenizer
        begin, end = (tokenizer.token_to_id(token) for token in (BEGIN, END))
        if begin is None or end is None:
            raise UserError(f"the tokenizer's vocabulary has no {BEGIN} and {END}, so it is not CLIP's")
        if length < 2:
            raise UserError(f"{length} tokens a caption leave no room for {BEGIN} and {END}: at least 2")
        self._begin, self._end, self.length = begin, end, length

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Args:
          texts: N captions.

        Returns:
          Ids (N,L) int32; the place of the first end token (N,) int32; whether a caption was cut (N,) bool.
        """
        ids = np.full((len(texts), self.length), self._end, np.int32)
        ids[:, 0] = self._begin
        ends, cut = np.empty(len(texts), np.int32), np.empty(len(texts), bool)
        for row, encoding in enumerate(self._tokenizer.encode_batch(list(texts), add_special_tokens=False)):
            kept = encoding.ids[: self.length - 2]
            ids[row, 1 : 1 + len(kept)] = kept
            ends[row], cut[row] = 1 + len(kept), len(kept) < len(encoding.ids)
        return ids, ends, cut


def make_tokenizer(vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> Tokenizer:
    """CLIP's tokenizer around a vocabulary: NFC, white space to one space, lower case, its pattern, bytes, BPE.

    Args:
      vocabulary: piece -> id, with the begin and end tokens. An unknown piece becomes the end token.
      merges: pairs of pieces, in order.
    """
    tokenizer = Tokenizer(
        models.BPE(
            dict(vocabulary), list(merges), unk_token=END, continuing_subword_prefix="", end_of_word_suffix="</w>",
            fuse_unk=False,
        )
    )  # fmt: skip
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(tokenizers.Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([token for token in (BEGIN, END) if token in vocabulary])
    return tokenizer


def vocabulary_of(merges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """The vocabulary that CLIP numbers from its merges: bytes, bytes that end a word, merged pieces, begin, end."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*characters, *(f"{character}</w>" for character in characters), *map("".join, merges), BEGIN, END]
    return {piece: number for number, piece in enumerate(pieces)}


def parse_merges(text: str) -> list[tuple[str, str]]:
    """The pairs of a merges.txt, whose first line may be a `#version` comment."""
    lines = [line for line in text.splitlines() if line.strip()]
    if lines and lines[0].startswith("#version"):
        lines = lines[1:]
    pairs = [line.split() for line in lines]
    wrong = next((line for line, pair in zip(lines, pairs, strict=True) if len(pair) != 2), None)
    if wrong is not None:
        raise ValueError(f"{wrong!r} is no pair of pieces")
    return [(first, second) for first, second in pairs]


def load_tokenizer(clip: str, length: int) -> ClipTokenizer:
    """The tokenizer in a folder or of a Hugging Face id.

    Raises:
      UserError: its files are missing, damaged, or not CLIP's.
    """
    folder = Path(clip).expanduser()
    try:
        if folder.is_dir() and not (folder / TOKENIZER_FILE).is_file():
            vocabulary, merges = (hub.find(clip, name, _KIND).read_text("utf-8") for name in VOCABULARY_FILES)
            tokenizer = make_tokenizer(json.loads(vocabulary), parse_merges(merges))
        else:
            tokenizer = Tokenizer.from_str(hub.find(clip, TOKENIZER_FILE, _KIND).read_text("utf-8"))
            tokenizer.no_padding()
            tokenizer.no_truncation()
    except UserError:
        raise
    except Exception as error:  # the tokenizers package raises bare Exceptions
        raise UserError(f"the tokenizer of {clip} cannot be read: {error}") from error
    return ClipTokenizer(tokenizer, length)


def config_from_json(text: str, where: str) -> ClipTextConfig:
    """The sizes that a `config.json`, of a whole CLIP or of its text tower, describes.

    Raises:
      UserError: it is not CLIP's, or has something that this implementation does not.
    """
    try:
        given = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON: {error}") from error
    if isinstance(given, dict) and isinstance(given.get("text_config"), dict):
        given = given["text_config"]
    if not isinstance(given, dict) or given.get("model_type", "clip_text_model") not in ("clip", "clip_text_model"):
        raise UserError(f"{where} is not the config.json of a CLIP or of its text tower")
    known = {field.name for field in dataclasses.fields(ClipTextConfig)} - {"dtype"}
    config = ClipTextConfig(**{key: value for key, value in given.items() if key in known and value is not None})
    if config.hidden_act not in ACTIVATIONS:
        raise UserError(f"{where}: hidden_act={config.hidden_act!r} is not supported, only {', '.join(ACTIVATIONS)}")
    if config.hidden_size % config.num_attention_heads:
        raise UserError(
            f"{where}: num_attention_heads={config.num_attention_heads} does not divide "
            f"hidden_size={config.hidden_size}"
        )
    return config


def config_to_json(config: ClipTextConfig) -> str:
    """The `config.json` of a text tower alone."""
    values = {key: value for key, value in dataclasses.asdict(config).items() if key != "dtype"}
    values |= {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"}
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


def abstract_params(config: ClipTextConfig) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """The tower's graph and its parameters' shapes, without memory."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: ClipText(config, rngs=nnx.Rngs(0))))
    return graphdef, nnx.to_pure_dict(state)


def _names(path: tuple[str, ...], layers: int) -> list[str]:
    """The Hugging Face names of a leaf: one, or one a layer where it is stacked."""
    if path[0] != "layers":
        return [".".join(_PART_NAMES.get(part, part) for part in path)]
    inside = ".".join(_PART_NAMES.get(part, part) for part in path[1:])
    return [f"encoder.layers.{i}.{inside}" for i in range(layers)]


def _to_ours(array: np.ndarray, path: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
    """A tensor in our layout, of this shape where its size allows."""
    if path[-1] == "kernel":
        array = array.T
    return array.reshape(shape) if array.size == np.prod(shape) else array


def params_from_tensors(tensors: Mapping[str, np.ndarray], config: ClipTextConfig, where: str) -> dict[str, Any]:
    """The parameter tree of `config` from tensors under Hugging Face names, with or without `text_model.` before them.

    Args:
      tensors: name -> array, any floating type. Those of a whole CLIP that are not the text tower's are left out.
      config: the sizes.
      where: what the tensors were read from, for messages.

    Returns:
      A nested dict as `nnx.to_pure_dict` gives, float32.

    Raises:
      UserError: a tensor is missing, unknown or of another shape; all such tensors are named.
    """
    given = {name.removeprefix(_PREFIX): array for name, array in tensors.items()}
    given = {name: array for name, array in given.items() if not _OTHERS.match(name)}
    _, shapes = abstract_params(config)
    params, problems = {}, []
    for path, abstract in traverse_util.flatten_dict(shapes).items():
        names = _names(path, config.num_hidden_layers)
        shape = abstract.shape[1:] if path[0] == "layers" else abstract.shape
        wanted = _torch_shape(path, shape)
        layers = []
        for name in names:
            array = given.pop(name, None)
            if array is None:
                problems.append(f"missing {name}")
            elif array.shape != wanted:
                problems.append(f"{name} has shape {array.shape}, {CONFIG_FILE} asks for {wanted}")
            else:
                layers.append(_to_ours(np.asarray(array, np.float32), path, shape))
        if len(layers) == len(names):
            params[path] = np.stack(layers) if path[0] == "layers" else layers[0]
    problems += [f"unknown {name}" for name in given]
    if problems:
        listed = "\n  ".join(problems[:20] + ([f"... and {len(problems) - 20} more"] if len(problems) > 20 else []))
        raise UserError(
            f"the weights in {where} do not fit its {CONFIG_FILE}:\n  {listed}\nTake both files from one repository."
        )
    return traverse_util.unflatten_dict(params)


def _torch_shape(path: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """A tensor's shape there: linear weights are matrices (out, in), heads and their channels are one axis."""
    if path[-1] == "kernel":
        inputs = 2 if path[-2] == "out" else 1
        return int(np.prod(shape[inputs:])), int(np.prod(shape[:inputs]))
    return (int(np.prod(shape)),) if path[-1] != "embedding" else shape


def tensors_from_params(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The inverse of `params_from_tensors`, under the names without a prefix."""
    tensors = {}
    for path, array in traverse_util.flatten_dict(params).items():
        array = np.asarray(array)
        stacked = path[0] == "layers"
        layers = array if stacked else array[None]
        for name, layer in zip(_names(path, len(layers)), layers, strict=True):
            rows, *columns = _torch_shape(path, layer.shape)
            tensors[name] = np.ascontiguousarray(
                layer.reshape(*columns, rows).T if columns and path[-1] == "kernel" else layer.reshape(rows, *columns)
            )
    return tensors


def load(clip: str, length: int | None = None) -> TextTower:
    """A text tower with its weights and its tokenizer.

    Args:
      clip: a folder with config.json, model.safetensors and the tokenizer's files, or a Hugging Face id `owner/name`
        (`owner/name/folder` for a folder inside a repository), fetched once into a cache in `$XDG_CACHE_HOME/sra_jax`
        (by default ~/.cache/sra_jax).
      length: L, tokens a caption; None takes as many as the tower has positions.

    Raises:
      UserError: files are missing and cannot be fetched, do not fit each other, or the length does not fit the tower.
    """
    config_path, weights_path = (hub.find(clip, name, _KIND) for name in (CONFIG_FILE, WEIGHTS_FILE))
    config = config_from_json(config_path.read_text(), str(config_path))
    length = config.max_position_embeddings if length is None else length
    if not 2 <= length <= config.max_position_embeddings:
        raise UserError(
            f"{length} tokens a caption do not fit the text encoder {clip}: from 2 to {config.max_position_embeddings}"
        )
    params = params_from_tensors(hub.read_safetensors(weights_path), config, str(weights_path))
    return TextTower(clip, config, params, load_tokenizer(clip, length), remote.file_sha256(weights_path))


def save(folder: Path, config: ClipTextConfig, params: Mapping[str, Any], tokenizer: Tokenizer) -> None:
    """Write a folder that `load` and Hugging Face's transformers read.

    Raises:
      UserError: the folder already holds a text encoder.
    """
    folder = Path(folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE):
        if (folder / name).exists():
            raise UserError(f"{folder / name} exists already: name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    files.write_safetensors(folder / WEIGHTS_FILE, tensors_from_params(params), {"format": "pt"})
    files.write_text(folder / TOKENIZER_FILE, tokenizer.to_str(pretty=True))
    files.write_text(folder / CONFIG_FILE, config_to_json(config))
