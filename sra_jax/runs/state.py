"""What a run carries from step to step, and how it begins."""

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sra_jax import config as config_lib
from sra_jax.config.profiles import TEACHER, Profile, profile
from sra_jax.distributed import sharding
from sra_jax.models import attention
from sra_jax.models.flops import Shape
from sra_jax.models.mmdit import MMDiT, MMDiTConfig
from sra_jax.models.stack import ANYWHERE, STACKS, Placement
from sra_jax.models.transformer import Transformer

Params = dict[str, Any]


def placement_on(mesh: Mesh, config: ConfigDict, training: bool = False) -> Placement:
    """Where arrays lie while the recipe's networks run on a mesh, and how they attend and multiply there.

    Args:
      mesh: the devices.
      config: the recipe.
      training: whether it is for a training step, to which `model.unroll` applies.

    Raises:
      UserError: `model.attention` or `model.products` cannot run on these devices.
    """
    shape = config_lib.transformer_of(config)
    name = sharding.implementation_on(mesh, config.model.attention, shape)
    unrolls = {"yes": True, "no": False}.get(config.model.unroll, sharding.gains_by_unrolling(mesh, name))
    return dataclasses.replace(
        sharding.placement(
            mesh, config_lib.DTYPES[config.dtype], sharding.attention_on(mesh, name, shape), config.model.products
        ),
        apart=attention.IMPLEMENTATIONS[name].apart, unrolled=training and unrolls,
    )  # fmt: skip


@flax.struct.dataclass
class TrainState:
    """One run at one step.

    Attributes:
      step: number of updates made, int32 scalar.
      params: {"model": the transformer's parameters} and those of the methods' heads by their names ("head" is SRA's);
        float32.
      ema: the teacher, a tree like `params`.
      opt_state: the optimizer's.
      profiles: further EMAs by their names (`ema.profiles`), trees like `params`.
    """

    step: jax.Array
    params: Params
    ema: Params
    opt_state: optax.OptState
    profiles: dict[str, Params] = flax.struct.field(default_factory=dict)


def _network(shape: Shape, rngs: nnx.Rngs, placement: Placement) -> Transformer | MMDiT:
    if isinstance(shape, MMDiTConfig):
        return MMDiT(shape, rngs=rngs, placement=placement)
    return Transformer(shape, rngs=rngs, placement=placement)


class Networks:
    """The static half of the student and the teacher: functions of a parameter tree.

    Args:
      config: the recipe.
      placement: where arrays lie while the networks run; `sharding.placement` makes it from a mesh.

    Attributes:
      shape: the transformer's.
    """

    def __init__(self, config: ConfigDict, placement: Placement = ANYWHERE):
        self.shape = shape = config_lib.transformer_of(config)
        makers: dict[str, Callable[[nnx.Rngs], nnx.Module]] = {
            "model": lambda rngs: _network(shape, rngs, placement)
        }
        makers |= config_lib.methods_of(config).heads(shape)
        self._makers = makers
        self._placement = placement
        self._graphs = {
            name: nnx.graphdef(nnx.eval_shape(lambda make=make: make(nnx.Rngs(0)))) for name, make in makers.items()
        }

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters, float32."""
        model_key, head_key = jax.random.split(key, 2)

        def own(name: str) -> jax.Array:  # a head begins the same, whatever other heads there are
            if name == "model":
                return model_key
            return head_key if name == "head" else jax.random.fold_in(head_key, zlib.crc32(name.encode()))

        return {
            name: nnx.to_pure_dict(nnx.split(make(nnx.Rngs(params=own(name))))[1])
            for name, make in self._makers.items()
        }

    def model(self, params: Params) -> Any:
        """The transformer with these parameters; inside a traced function."""
        stacks = {name: tree for name, tree in params["model"].items() if name in STACKS}
        others = {name: tree for name, tree in params["model"].items() if name not in STACKS}
        return nnx.merge(self._graphs["model"], self._placement.others(others) | stacks)

    def head(self, params: Params, name: str) -> nnx.Module:
        """One of the methods' heads with these parameters; inside a traced function."""
        return nnx.merge(self._graphs[name], self._placement.others({name: params[name]})[name])


def learning_rate(config: ConfigDict, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up, then constant or a cosine to 0 at step `steps`."""
    optimizer = config.optimizer
    peak, warmup = optimizer.learning_rate, optimizer.warmup_steps
    if optimizer.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, max(steps - warmup, 1))
    else:
        after = optax.constant_schedule(peak)
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def ema_decay(config: ConfigDict, steps: int) -> Callable[[jax.Array], jax.Array]:
    """EMA decay by step: constant, or from `decay` to 1 as 1 - (1 - decay) (cos(pi step / steps) + 1) / 2 (BYOL)."""
    decay = config.ema.decay
    if config.ema.schedule == "constant":
        return lambda step: jnp.float32(decay)
    return lambda step: 1 - (1 - decay) * (jnp.cos(jnp.pi * jnp.minimum(step / steps, 1.0)) + 1) / 2


def make_optimizer(config: ConfigDict, steps: int) -> optax.GradientTransformation:
    """AdamW after clipping the global gradient norm."""
    optimizer = config.optimizer
    adamw = optax.adamw(
        learning_rate(config, steps), b1=optimizer.b1, b2=optimizer.b2, eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
    )  # fmt: skip
    return optax.chain(clip_by_global_norm(optimizer.clip_norm), adamw) if optimizer.clip_norm else adamw


def clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    """Gradients scaled down, all by one factor, to a global norm of at most `limit`.

    As optax's of that name, but with one division in place of one an entry: the compiler then clips where it reads the
    gradients and writes no clipped copy of them.
    """

    def clip(gradients: Params, params: Params | None = None) -> Params:
        del params
        factor = limit / jnp.maximum(optax.tree.norm(gradients), limit)
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), gradients)

    return optax.stateless(clip)


def sampled(config: ConfigDict, state: TrainState) -> Params:
    """The EMA that previews and evaluation use."""
    name = config.ema.sampled
    return state.ema if name == TEACHER else state.profiles[profile("ema.sampled", name).name]


def init_state(
    networks: Networks, optimizer: optax.GradientTransformation, key: jax.Array, profiles: Sequence[Profile] = ()
) -> TrainState:
    """The state before the first step; the EMAs start as copies of the student. To be jitted with shardings."""
    params = networks.init(key)
    return TrainState(
        step=jnp.zeros((), jnp.int32), params=params, ema=jax.tree.map(jnp.copy, params),
        opt_state=optimizer.init(params), profiles={one.name: jax.tree.map(jnp.copy, params) for one in profiles},
    )  # fmt: skip
