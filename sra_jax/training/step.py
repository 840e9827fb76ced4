"""One training step: draws, the student's pass, the teacher's where the method asks for one, loss, optimizer, EMA.

What is a method's own it says itself (sra_jax/methods); the paper's order is SRA's (arXiv 2505.02831, section 3).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from sra_jax.config.profiles import Profile
from sra_jax.data.dataset import told
from sra_jax.diffusion.guidance import Condition, without
from sra_jax.diffusion.process import Process
from sra_jax.methods.groups import position_times
from sra_jax.methods.method import Seen, Term, View
from sra_jax.methods.registry import Methods
from sra_jax.models.flops import Shape
from sra_jax.models.transformer import TransformerConfig
from sra_jax.runs.state import Networks, Params, TrainState

Metrics = dict[str, Any]

SAMPLED_TOKENS = 256
"""Of so many tokens the log has cosines and ranks."""


def draw(
    key: jax.Array, x0: jax.Array, batch: Mapping[str, jax.Array], process: Process, methods: Methods,
    shape: Shape, *, label_dropout: float, null: Condition | None = None,
) -> dict[str, Any]:
    """Everything random in a step but the latents, for the whole global batch.

    Values depend on the key and on an example's place in the batch, not on how the batch is split over devices.

    Args:
      key: of the step.
      x0: latents (B,H,W,C).
      batch: the data set's arrays, of which `told` reads labels or captions.
      process: of the noise.
      methods: draw what is their own.
      shape: the network's; `num_classes` is its null label.
      label_dropout: share of labels, or captions, that the student does not get.
      null: the empty caption where there are captions; None: the null label.

    Returns:
      x0, noise e (B,H,W,C), labels or captions y (B,...) after dropout, student times t (B,), and what the methods drew
      or replaced.
    """
    noise_key, time_key, method_key, dropout_key = jax.random.split(key, 4)
    dropped = jax.random.uniform(dropout_key, x0.shape[:1]) < label_dropout
    example = {
        "x0": x0,
        "e": jax.random.normal(noise_key, x0.shape),
        "y": without(told(batch), cast(TransformerConfig, shape).num_classes if null is None else null, dropped),
        "t": process.sample_time(time_key, x0.shape[0]),
    }
    return example | methods.draw(method_key, {**batch, **example}, process, shape)


def total_loss(
    params: Params, teacher: Params, example: Mapping[str, jax.Array], weights: Mapping[str, jax.Array], *,
    networks: Networks, process: Process, methods: Methods,
) -> tuple[jax.Array, tuple[Metrics, Metrics]]:
    """L = L_gen + the sum of the methods' weighted terms, of one batch.

    Args:
      params: the student's.
      teacher: the EMA's; constant.
      example: as `draw` returns it.
      weights: of each method's term, by its name.
      networks, process, methods: the static parts; the baseline's loss is L_gen and no teacher is run.

    Returns:
      As `summed`.
    """
    return summed(look(params, teacher, example, networks=networks, process=process, methods=methods), weights, methods)


def look(
    params: Params, teacher: Params, example: Mapping[str, jax.Array], *, networks: Networks, process: Process,
    methods: Methods,
) -> Seen:
    """The student's pass over a batch and, where a method asks for it, the teacher's; arguments as `total_loss`."""
    shape, x0, e = networks.shape, example["x0"], example["e"]

    def run(params: Params, view: View, **options: Any) -> tuple[Any, jax.Array]:
        times = position_times(view.t, view.groups, shape)
        result = networks.model(params)(
            process.perturb(x0, e, times), view.t, view.y, groups=view.groups, segments=view.segments, sizes=view.sizes,
            **options,
        )
        return result, times

    taps = methods.student_taps
    (prediction, tapped), times = run(params, methods.student_view(example, shape), taps=taps)
    taught: dict[int, jax.Array] = {}
    if methods.teaching:
        last = methods.teacher_taps
        view = methods.teaching.teacher_view(example, shape)
        (_, tokens), _ = run(jax.lax.stop_gradient(teacher), view, taps=last, stop=last[-1])
        taught = dict(zip(last, tokens, strict=True))
    return Seen(
        example, dict(zip(taps, tapped, strict=True)), taught, prediction, times, process, shape,
        lambda name, tokens: networks.head(params, name)(tokens),
    )  # fmt: skip


def summed(
    seen: Seen, weights: Mapping[str, jax.Array], methods: Methods
) -> tuple[jax.Array, tuple[Metrics, Metrics]]:
    """The loss of what the networks made of a batch.

    Returns:
      The loss; its parts and norms of tokens, scalars; and for each method a few tokens of what it works on and
      compares, as `sample` takes them.
    """
    loss = seen.denoising.mean()
    metrics: Metrics = {"loss_denoising": loss}
    samples = {}
    for method in methods:
        term = method.loss(seen)
        loss = loss + weights[method.name] * term.loss
        named = {"loss": term.loss, **norms(term)}
        metrics |= {method.log.get(key, f"{method.name}/{key}"): value for key, value in named.items()}
        samples[method.name] = sample(term)
    return loss, (metrics, samples)


def norms(term: Term) -> Metrics:
    """Mean L2 norms of the student's tokens, before any head, and of their targets."""
    tokens = {"student_norm": term.features, "target_norm": term.target}
    return {name: jnp.linalg.norm(x, axis=-1).mean() for name, x in tokens.items() if x is not None}


def sample(term: Term) -> Metrics:
    """About `SAMPLED_TOKENS` tokens (S,K), spread evenly, of the student's, of what is compared and of its target."""

    def some(x: jax.Array) -> jax.Array:
        side = round(SAMPLED_TOKENS**0.5)
        rows, tokens = (max(1, size // side) for size in x.shape[:2])
        return x[::rows, ::tokens][:side, :side].reshape(-1, x.shape[-1])

    parts = {"features": term.features, "compared": term.compared, "target": term.target}
    return {name: jax.lax.stop_gradient(some(x)) for name, x in parts.items() if x is not None}


def update_ema(ema: Params, params: Params, decay: jax.Array | float) -> Params:
    """decay * ema + (1 - decay) * params, leaf by leaf."""
    return jax.tree.map(lambda average, new: decay * average + (1 - decay) * new, ema, params)


def update_profiles(
    profiles: Mapping[str, Params], params: Params, wanted: Sequence[Profile], step: jax.Array
) -> dict[str, Params]:
    """The further EMAs after the update that follows `step` others: each moves towards the parameters by its rate."""

    def moved(one: Profile) -> Params:
        rate = one.rate_at(step)
        return jax.tree.map(lambda average, new: average + rate * (new - average), profiles[one.name], params)

    return {one.name: moved(one) for one in wanted}


def make_train_step(
    *, networks: Networks, process: Process, methods: Methods, encode: Callable[..., jax.Array],
    optimizer: optax.GradientTransformation, learning_rate: optax.Schedule, ema_decay: Callable[[jax.Array], jax.Array],
    seed: int, label_dropout: float, accumulation: int, profiles: Sequence[Profile] = (),
    null: Condition | None = None,
) -> Callable[[TrainState, Mapping[str, jax.Array]], tuple[TrainState, Metrics]]:
    """The pure function `train_step(state, batch) -> (state, metrics)`; the caller jits and shards it.

    `batch` is a global batch as the dataset stacks it. Randomness is a function of (seed, state.step). The metrics are
    float32 scalars of this step, and under "samples" the tokens that `total_loss` hands out; norms are taken before
    clipping (gradient) and after the optimizer (update, parameters).
    """

    def loss(
        params: Params, ema: Params, example: Mapping[str, jax.Array], weights: Mapping[str, jax.Array]
    ) -> tuple[jax.Array, tuple[Metrics, Metrics]]:
        return total_loss(params, ema, example, weights, networks=networks, process=process, methods=methods)

    def train_step(state: TrainState, batch: Mapping[str, jax.Array]) -> tuple[TrainState, Metrics]:
        latent_key, draw_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step))
        example = draw(
            draw_key, encode(batch, latent_key), batch, process, methods, networks.shape, label_dropout=label_dropout,
            null=null,
        )  # fmt: skip
        weights = methods.weights_at(state.step)
        gradients, metrics = accumulate(
            jax.value_and_grad(loss, has_aux=True), state.params, state.ema, example, weights, accumulation,
            methods.together(example["x0"].shape[0]),
        )  # fmt: skip
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = update_ema(state.ema, params, ema_decay(state.step))
        others = update_profiles(state.profiles, params, profiles, state.step)
        metrics |= {
            "learning_rate": jnp.asarray(learning_rate(state.step), jnp.float32),
            "grad_norm": optax.tree.norm(gradients),
            "param_norm": optax.tree.norm(params),
            "update_norm": optax.tree.norm(updates),
        }
        metrics |= {method.log.get("weight", f"{method.name}/weight"): weights[method.name] for method in methods}
        return TrainState(state.step + 1, params, ema, opt_state, others), metrics

    return train_step


def accumulate(
    value_and_grad: Callable[..., Any], params: Params, ema: Params, example: Mapping[str, jax.Array],
    weights: Mapping[str, jax.Array], parts: int, together: int = 1,
) -> tuple[Params, Metrics]:
    """Gradient and metrics of the mean loss over the batch, in `parts` equal microbatches one after the other.

    Args:
      value_and_grad: of the loss, with its metrics and its samples of tokens beside it.
      params, ema, example, weights: as `total_loss` takes them.
      parts: how many microbatches.
      together: consecutive examples that no microbatch parts; divides the size of one.

    Returns:
      Both averaged over the microbatches, the samples those of the last.
    """

    def one(part: Mapping[str, jax.Array]) -> tuple[tuple[Params, Metrics], Metrics]:
        (loss, (metrics, samples)), gradients = value_and_grad(params, ema, part, weights)
        return (gradients, {"loss": loss, **metrics}), samples

    def joined(averages: tuple[Params, Metrics], samples: Metrics) -> tuple[Params, Metrics]:
        gradients, metrics = averages
        return gradients, {**metrics, "samples": samples}

    if parts == 1:
        return joined(*one(example))

    def split(x: jax.Array) -> jax.Array:
        # Microbatch i takes every parts-th stretch of examples: each device then works on its own rows only.
        stretches = x.reshape(-1, parts, together, *x.shape[1:]).swapaxes(0, 1)
        return stretches.reshape(parts, -1, *x.shape[1:])

    microbatches = jax.tree.map(split, dict(example))
    shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], microbatches))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def body(carry: tuple[Any, Metrics], part: Mapping[str, jax.Array]) -> tuple[tuple[Any, Metrics], None]:
        averages, samples = one(part)
        return (jax.tree.map(jnp.add, carry[0], averages), samples), None

    (total, samples), _ = jax.lax.scan(body, zeros, microbatches)
    return joined(jax.tree.map(lambda x: x / parts, total), samples)
