"""One training step: the whole method in the paper's order (arXiv 2505.02831, section 3)."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sra_jax.diffusion.process import Process
from sra_jax.methods.sra import Alignment
from sra_jax.runs.state import Networks, Params, TrainState

Metrics = dict[str, jax.Array]


def draw(
    key: jax.Array, x0: jax.Array, labels: jax.Array, process: Process, *, interval: tuple[float, float],
    null_label: int, label_dropout: float,
) -> dict[str, jax.Array]:
    """Everything random in a step but the latents, for the whole global batch.

    Values depend on the key and on an example's place in the batch, not on how the batch is split over devices.

    Returns:
      x0 (B,H,W,C), noise e (B,H,W,C), labels y (B,) after dropout, student times t (B,), teacher times s (B,).
    """
    noise_key, time_key, offset_key, dropout_key = jax.random.split(key, 4)
    t = process.sample_time(time_key, x0.shape[0])
    dropped = jax.random.uniform(dropout_key, labels.shape) < label_dropout
    return {
        "x0": x0,
        "e": jax.random.normal(noise_key, x0.shape),
        "y": jnp.where(dropped, null_label, labels),
        "t": t,
        "s": process.teacher_time(offset_key, t, interval),
    }


def sra_loss(
    params: Params, teacher: Params, example: Mapping[str, jax.Array], weight: jax.Array, *, networks: Networks,
    process: Process, alignment: Alignment | None,
) -> tuple[jax.Array, Metrics]:
    """L = L_gen + lambda L_sa of one batch.

    Args:
      params: the student's.
      teacher: the EMA's; constant.
      example: as `draw` returns it.
      weight: lambda.
      networks, process, alignment: the static parts; without alignment the loss is L_gen and no teacher is run.

    Returns:
      The loss and its parts, scalars: loss_denoising and, with alignment, loss_alignment and the mean L2 norms of the
      student's (before the head) and the teacher's tokens.
    """
    x0, e, y, t = (example[name] for name in ("x0", "e", "y", "t"))
    taps = () if alignment is None else (alignment.student_block,)
    prediction, tapped = networks.model(params)(process.perturb(x0, e, t), t, y, taps=taps)
    denoising = process.loss(prediction, x0, e, t).mean()
    if alignment is None:
        return denoising, {"loss_denoising": denoising}

    s, (h,) = example["s"], tapped
    last = alignment.teacher_block
    frozen = jax.lax.stop_gradient(teacher)
    _, (h_teacher,) = networks.model(frozen)(process.perturb(x0, e, s), s, y, taps=(last,), stop=last)
    aligning = alignment.loss(networks.project(params, h), h_teacher)
    return denoising + weight * aligning, {
        "loss_denoising": denoising,
        "loss_alignment": aligning,
        "student_feature_norm": jnp.linalg.norm(h, axis=-1).mean(),
        "teacher_feature_norm": jnp.linalg.norm(h_teacher, axis=-1).mean(),
    }


def update_ema(ema: Params, params: Params, decay: jax.Array | float) -> Params:
    """decay * ema + (1 - decay) * params, leaf by leaf."""
    return jax.tree.map(lambda average, new: decay * average + (1 - decay) * new, ema, params)


def make_train_step(
    *, networks: Networks, process: Process, alignment: Alignment | None, encode: Callable[..., jax.Array],
    optimizer: optax.GradientTransformation, learning_rate: optax.Schedule, ema_decay: Callable[[jax.Array], jax.Array],
    seed: int, null_label: int, label_dropout: float, accumulation: int,
) -> Callable[[TrainState, Mapping[str, jax.Array]], tuple[TrainState, Metrics]]:
    """The pure function `train_step(state, batch) -> (state, metrics)`; the caller jits and shards it.

    `batch` is a global batch as the dataset stacks it. Randomness is a function of (seed, state.step). The metrics are
    float32 scalars of this step; norms are taken before clipping (gradient) and after the optimizer (update,
    parameters).
    """

    def loss(params: Params, ema: Params, example: Mapping[str, jax.Array], weight: jax.Array):
        return sra_loss(
            params, ema, example, weight, networks=networks, process=process, alignment=alignment
        )

    def train_step(state: TrainState, batch: Mapping[str, jax.Array]) -> tuple[TrainState, Metrics]:
        latent_key, draw_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step))
        example = draw(
            draw_key, encode(batch, latent_key), batch["label"], process,
            interval=alignment.interval if alignment else (0.0, 0.0), null_label=null_label,
            label_dropout=label_dropout,
        )  # fmt: skip
        weight = alignment.weight_at(state.step) if alignment else jnp.float32(0)
        gradients, metrics = accumulate(
            jax.value_and_grad(loss, has_aux=True), state.params, state.ema, example, weight, accumulation
        )
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = ema_decay(state.step)
        ema = update_ema(state.ema, params, decay)
        metrics |= {
            "learning_rate": jnp.asarray(learning_rate(state.step), jnp.float32),
            "grad_norm": optax.tree.norm(gradients),
            "param_norm": optax.tree.norm(params),
            "update_norm": optax.tree.norm(updates),
        }
        if alignment:
            metrics["alignment_weight"] = weight
        return TrainState(state.step + 1, params, ema, opt_state), metrics

    return train_step


def accumulate(
    value_and_grad: Callable[..., Any], params: Params, ema: Params, example: Mapping[str, jax.Array],
    weight: jax.Array, parts: int,
) -> tuple[Params, Metrics]:
    """Gradient and metrics of the mean loss over the batch, in `parts` equal microbatches one after the other."""

    def one(part: Mapping[str, jax.Array]) -> tuple[Params, Metrics]:
        (loss, metrics), gradients = value_and_grad(params, ema, part, weight)
        return gradients, {"loss": loss, **metrics}

    if parts == 1:
        return one(example)

    def split(x: jax.Array) -> jax.Array:
        # Microbatch i takes every parts-th example: each device then works on its own rows only.
        return x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)

    microbatches = {name: split(x) for name, x in example.items()}
    shapes = jax.eval_shape(one, {name: x[0] for name, x in microbatches.items()})
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = jax.lax.scan(lambda sums, part: (jax.tree.map(jnp.add, sums, one(part)), None), zeros, microbatches)
    return jax.tree.map(lambda x: x / parts, total)
