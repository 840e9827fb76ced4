"""What the tests of SRA's family share: a golden file's network, its losses by this project, and comparing with all of
the file's arrays. README.family.md of the goldens explains them.

A file's `meta/config` names what there is; sizes, blocks and names of runs are read, never written here.
"""

import functools
import json
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from sra_jax import config as config_lib
from sra_jax.interop.pytorch import POSITION_TABLE, params_from_pytorch, pytorch_from_params
from sra_jax.runs.state import Networks

TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
EMBEDDING, LABELS, QKV_BIAS = "x_embedder.proj.weight", "y_embedder.embedding_table.weight", "attn.qkv.bias"
LAYER = (("weight", "kernel"), ("bias", "bias"))

ONCE = {"xla_backend_optimization_level": 0}
"""For programs that run once or twice: their compilation takes half as long."""

Layers = Mapping[str, tuple[str | int, ...]]
"""PyTorch names of layers -> where they lie in a tree of parameters."""


def close(actual: Any, expected: np.ndarray, tolerance: float = TOLERANCE, scale: float | None = None, what: str = ""):
    """Equal to `tolerance` times the scale, which is the largest magnitude of what is expected unless it is given."""
    assert np.shape(actual) == np.shape(expected), what
    scale = scale or float(np.abs(expected).max()) or 1.0
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale, err_msg=what)


def nhwc(x: np.ndarray) -> jax.Array:
    return jnp.asarray(np.moveaxis(x, -3, -1))


def nchw(x: jax.Array) -> jax.Array:
    return jnp.moveaxis(x, -1, -3)


def layers_from(tensors: Mapping[str, np.ndarray], layers: Layers) -> dict[Any, Any]:
    """A tree of the linear and convolutional layers of a state dict."""
    tree: dict[Any, Any] = {}
    for layer, (*parents, last) in layers.items():
        place = functools.reduce(lambda node, key: node.setdefault(key, {}), parents, tree)
        place[last] = {ours: jnp.asarray(_ours(tensors[f"{layer}.{theirs}"])) for theirs, ours in LAYER}
    return tree


def layers_to(tree: Mapping[Any, Any], layers: Layers) -> dict[str, np.ndarray]:
    """The inverse of `layers_from`."""
    tensors = {}
    for layer, path in layers.items():
        node = functools.reduce(lambda node, key: node[key], path, tree)
        tensors |= {f"{layer}.{theirs}": _theirs(np.asarray(node[ours])) for theirs, ours in LAYER}
    return tensors


def _ours(tensor: np.ndarray) -> np.ndarray:
    return tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T


def _theirs(tensor: np.ndarray) -> np.ndarray:
    return tensor.transpose(3, 2, 0, 1) if tensor.ndim == 4 else tensor.T


def numbered(names: Collection[str], stem: str, path: tuple[str | int, ...]) -> Layers:
    """The layers `<stem>.<number>` among names of tensors, as the list of layers at `path`."""
    found = {int(match[1]) for name in names if (match := re.fullmatch(re.escape(stem) + r"\.(\d+)\.weight", name))}
    assert found, stem
    return {f"{stem}.{number}": (*path, place) for place, number in enumerate(sorted(found))}


class Golden:
    """A golden file.

    Args:
      arrays: the file's.
      layers: of its heads.

    Attributes:
      arrays: the file's.
      meta: its `meta/config`.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], layers: Layers | None = None):
        self.arrays = arrays
        self.meta = json.loads(str(arrays["meta/config"]))
        self.layers = layers or {}

    def below(self, prefix: str) -> dict[str, np.ndarray]:
        """Arrays whose keys begin so, by the rest of their keys."""
        return {key.removeprefix(prefix): x for key, x in self.arrays.items() if key.startswith(prefix)}

    def names(self, prefix: str) -> list[str]:
        """The first parts of the keys below a prefix."""
        return list(dict.fromkeys(key.partition("/")[0] for key in self.below(prefix)))

    def recipe(self, name: str = "none", path: str = "linear", **keys: Any) -> ConfigDict:
        """A config of the file's network with a method, a path of the process and the method's keys."""
        meta, config = self.meta, config_lib.default()
        config.data.update(
            image_size=meta["input_size"], channels=meta["in_channels"],
            num_classes=self.arrays[f"sd/{LABELS}"].shape[0] - 1,
        )  # fmt: skip
        config.model.update(
            patch=meta["patch_size"], depth=meta["depth"], width=meta["hidden_size"], heads=meta["num_heads"],
            mlp_ratio=meta["mlp_ratio"],
        )  # fmt: skip
        config.process.path = path
        config.method.name = name
        if keys:
            config.method[name].update(keys)
        return config

    def tree(self, prefix: str = "sd/", changes: Mapping[str, np.ndarray] | None = None) -> dict[str, Any]:
        """A state dict of the file, some of its tensors changed, as parameters."""
        tensors = self.below(prefix) | (changes or {})
        meta = self.meta
        kernel = (meta["hidden_size"], meta["in_channels"], meta["patch_size"], meta["patch_size"])
        tensors[EMBEDDING] = tensors[EMBEDDING].reshape(kernel)
        model = params_from_pytorch(tensors, meta["num_heads"])["model"]
        return {"model": jax.tree.map(jnp.asarray, model), **layers_from(tensors, self.layers)}

    def tensors(self, tree: Mapping[str, Any], layers: Layers | None = None) -> dict[str, np.ndarray]:
        """A tree like the parameters under the file's names."""
        backbone = pytorch_from_params({"model": tree["model"]}, self.meta["in_channels"], self.meta["input_size"])
        backbone[EMBEDDING] = backbone[EMBEDDING].reshape(self.arrays[f"sd/{EMBEDDING}"].shape)
        return backbone | layers_to(tree, self.layers if layers is None else layers)

    def parameters(self) -> list[str]:
        """Names of the trainable parameters, in the order of the norms of gradients."""
        names = self.arrays.get("param_names", [name for name in self.below("sd/") if name != POSITION_TABLE])
        return [str(name) for name in names]

    def example(self) -> dict[str, jax.Array]:
        """Latents, noise, times and labels as far as the file has them for all of its runs."""
        stored = self.below("in/")
        example = {"x0": nhwc(stored["x0"]), "e": nhwc(stored["noise"]), "y": jnp.asarray(stored["labels"])}
        return example | ({"t": jnp.asarray(stored["t"])} if "t" in stored else {})

    def compare(
        self, prefix: str, found: Mapping[str, Any], gradients: Mapping[str, Mapping[str, np.ndarray]] | None = None,
        given: Collection[str] = (), unit: Collection[str] = (), names: Collection[str] | None = None,
    ) -> None:
        """Every array below a prefix with what was found; there is at least one, and none that is not known.

        Args:
          prefix: of the keys.
          found: by the rest of the key.
          gradients: tensors by what stands before `grad/<param>`, `grad_l2` and `grad_probe` in the rest of the key.
          given: rests of keys, or parts of them that end in "/", of what the run starts from.
          unit: rests of keys of means of cosines, whose scale is 1.
          names: of the parameters, in the order of the norms; None: the file's.
        """
        names = self.parameters() if names is None else names
        compared = 0
        for rest, expected in self.below(prefix).items():
            if rest in given or any(part.endswith("/") and rest.startswith(part) for part in given):
                continue
            match = re.fullmatch(r"(.*?)grad(?:_(l2|probe)|/(.+))", rest)
            if match and match[1] in (gradients or {}):
                _compare_gradient(gradients[match[1]], match[2], match[3], expected, names, prefix + rest)
            else:
                assert rest in found, f"{prefix}{rest} is compared with nothing"
                close(found[rest], expected, scale=1.0 if rest in unit else None, what=prefix + rest)
            compared += 1
        assert compared, f"nothing to compare below {prefix}"

    def check_prefixes(self, *prefixes: str) -> None:
        """Every key begins with one of these, which the file's tests compare or start from."""
        known = ("meta/config", "param_names", "sd/", "ema/", *prefixes)
        assert not [key for key in self.arrays if not key.startswith(known)]


def _compare_gradient(
    tensors: Mapping[str, np.ndarray], kind: str | None, name: str | None, expected: np.ndarray,
    names: Collection[str], what: str,
) -> None:
    if kind is None:
        close(without_key_bias(name, tensors[name]), without_key_bias(name, expected), GRADIENT_TOLERANCE, what=what)
        return
    flat = [np.asarray(tensors[name], np.float64).ravel() for name in names]
    norms = np.array([np.linalg.norm(x) for x in flat])
    probes = [np.cos(0.37 * np.arange(1, x.size + 1)) @ x for x in flat]
    found = norms if kind == "l2" else np.array(probes)
    assert found.shape == expected.shape, what
    scale = np.maximum(norms, np.finfo(np.float32).tiny)
    np.testing.assert_allclose(found / scale, expected / scale, rtol=0, atol=GRADIENT_TOLERANCE, err_msg=what)


def without_key_bias(name: str, tensor: np.ndarray) -> np.ndarray:
    """The key third of the qkv bias has a true gradient of zero; what is stored there is rounding noise."""
    if not name.endswith(QKV_BIAS):
        return tensor
    query, _, value = np.split(np.asarray(tensor), 3)
    return np.concatenate([query, value])


def with_gradients(losses: Callable[..., tuple[Mapping[str, jax.Array], Any]]) -> Callable[..., Any]:
    """Compiled once: losses by name, whatever else was found, and the gradient of each loss in the parameters.

    Args:
      losses: `losses(params, *inputs)` -> (scalars by name, found).
    """

    @functools.partial(jax.jit, compiler_options=ONCE)
    def run(params: Any, *inputs: Any) -> tuple[Mapping[str, jax.Array], Any, Mapping[str, Any]]:
        def stacked(params: Any) -> tuple[jax.Array, Any]:
            totals, found = losses(params, *inputs)
            return jnp.stack([totals[name] for name in sorted(totals)]), (totals, found)

        _, pull, (totals, found) = jax.vjp(stacked, params, has_aux=True)
        each = jax.vmap(lambda one: pull(one)[0])(jnp.eye(len(totals)))  # one backward pass for all
        gradients = {name: jax.tree.map(lambda x, i=i: x[i], each) for i, name in enumerate(sorted(totals))}
        return totals, found, gradients

    return run


class EitherTime:
    """Networks some of which know their authors' time: 1 is data, and the velocity points to the data.

    Args:
      networks: of this project.
      reverse: bool; whether they are such.
    """

    def __init__(self, networks: Networks, reverse: jax.Array | bool):
        self.networks, self.reverse = networks, reverse
        self.shape, self.head = networks.shape, networks.head

    def model(self, params: Any) -> Callable[..., Any]:
        model = self.networks.model(params)

        def run(x: jax.Array, t: jax.Array, y: jax.Array, **options: Any) -> tuple[Any, Any]:
            prediction, taps = model(x, jnp.where(self.reverse, 1 - t, t), y, **options)
            return None if prediction is None else prediction * sign(self.reverse), taps

        return run


def sign(reverse: jax.Array | bool) -> jax.Array:
    """Of a velocity in the other time."""
    return jnp.where(reverse, -1.0, 1.0)

