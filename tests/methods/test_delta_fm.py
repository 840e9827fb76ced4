"""The shift that contrastive flow matching gives the velocity, and its correction while sampling."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits
from sra_jax.data import registry
from sra_jax.diffusion.guidance import Guidance
from sra_jax.diffusion.interpolant import Interpolant
from sra_jax.diffusion.registry import SAMPLERS
from sra_jax.errors import UserError
from sra_jax.methods.correction import Correction, LatentMeans
from sra_jax.methods.delta_fm import DeltaFM
from sra_jax.methods.method import Seen
from sra_jax.methods.registry import Methods
from sra_jax.models.transformer import TransformerConfig
from sra_jax.runs import latent_means
from sra_jax.training.loop import train
from sra_jax.training.step import draw
from tests.in_process import call

SHARES, CENTRES, SPREAD = np.array([0.5, 0.3, 0.2]), np.array([2.0, -1.0, 4.0]), 0.5
CLASSES = len(SHARES)
MEANS = LatentMeans(
    np.full((1, 1, 1), SHARES @ CENTRES, np.float32), CENTRES.reshape(-1, 1, 1, 1).astype(np.float32),
    SHARES.astype(np.float32),
)  # fmt: skip
SHAPE = TransformerConfig(
    input_size=1, channels=1, num_classes=CLASSES, output_channels=1, patch=1, depth=1, width=4, heads=1
)


def minimiser(method, process, dropout, weight, rows=3000, batches=8):
    """Of the run's own loss: the best velocity among those affine in x and t for each label, (labels, 3)."""

    def loss(theta, example):
        x = process.perturb(example["x0"], example["e"], example["t"])
        features = jnp.stack([jnp.ones(rows), x.ravel(), example["t"]], axis=1)
        prediction = (theta[example["y"]] * features).sum(axis=1).reshape(-1, 1, 1, 1)
        seen = Seen(example, {}, {}, prediction, example["t"], process, SHAPE, lambda name, tokens: tokens)
        gen = process.loss(prediction, example["x0"], example["e"], example["t"]).mean()
        return gen + weight * method.loss(seen).loss

    zero = jnp.zeros((CLASSES + 1, 3))
    first, second = jax.jit(jax.grad(loss)), jax.jit(jax.hessian(loss))
    slope, curvature = 0, 0
    for seed in range(batches):
        label_key, latent_key, key = jax.random.split(jax.random.key(seed), 3)
        labels = jax.random.choice(label_key, CLASSES, (rows,), p=jnp.asarray(SHARES))
        x0 = jnp.asarray(CENTRES)[labels] + SPREAD * jax.random.normal(latent_key, (rows,))
        example = draw(
            key, x0.reshape(-1, 1, 1, 1), {"label": labels}, process, Methods((method,)), SHAPE, label_dropout=dropout
        )
        slope += np.asarray(first(zero, example), np.float64).ravel()
        curvature += np.asarray(second(zero, example), np.float64).reshape(zero.size, zero.size)
    return -np.linalg.solve(curvature, slope).reshape(zero.shape)  # the loss is quadratic in theta


@pytest.mark.parametrize(
    ("keys", "process"),
    [
        ({}, Interpolant()),
        ({"negatives": "other_label", "drop_null": True}, Interpolant(path="cosine")),
        pytest.param({"drop_null": True}, Interpolant(path="cosine"), marks=pytest.mark.slow),
        pytest.param({}, Interpolant(path="cosine", time_distribution="logit_normal"), marks=pytest.mark.slow),
        pytest.param({"negatives": "other_label"}, Interpolant(), marks=pytest.mark.slow),
        pytest.param({"negatives": "other_label", "drop_null": True}, Interpolant(), marks=pytest.mark.slow),
    ],
    ids=["all", "other_label, drop_null, cosine", "drop_null", "logit_normal", "other_label", "other_label, drop_null"],
)  # fmt: skip
def test_the_loss_is_least_where_the_correction_gives_the_velocity(keys, process):
    """Negatives, anchors and weights are those that training draws; without the method's term the best is u itself."""
    method, dropout = DeltaFM(weight=0.4, **keys), 0.3
    learned, meant = (minimiser(method, process, dropout, weight) for weight in (0.4, 0.0))
    correction = method.correction(MEANS, process, CLASSES, dropout)
    labels, t = np.repeat(np.arange(CLASSES + 1), 4), np.tile([0.2, 0.5, 0.3, 0.8], CLASSES + 1)
    x = process.coefficients(t)[0] * np.append(CENTRES, SHARES @ CENTRES)[labels] + np.tile([-0.5, 0.5, 0, 0.5], 4)
    features = np.stack([np.ones_like(x), x, t], axis=1)

    def network(theta):
        return lambda x, t, y: jnp.asarray((theta[labels] * features).sum(axis=1).reshape(-1, 1, 1, 1), jnp.float32)

    given = (jnp.asarray(x).reshape(-1, 1, 1, 1), jnp.asarray(t), jnp.asarray(labels))
    expected = network(meant)(*given).ravel()
    np.testing.assert_allclose(correction.correct(network(learned))(*given).ravel(), expected, atol=0.1)
    moved = np.abs(network(learned)(*given).ravel() - expected)
    assert moved[labels < CLASSES].mean() > 0.4
    if method.drop_null:
        assert moved[labels == CLASSES].max() < 1e-3


def test_mean_rates():
    """By Monte Carlo over the times that training draws."""
    for path in ("linear", "cosine"):
        for times in ("uniform", "logit_normal"):
            process = Interpolant(path, times)
            rates = process.coefficients(process.sample_time(jax.random.key(0), 200_000))[2]
            assert process.mean_rate() == pytest.approx(float(rates.mean()), abs=5e-3)


def velocity(x, t, y):
    """u of Gaussian classes in closed form, and of their mixture for the null label; on the linear path."""
    alpha, sigma = (1 - t)[:, None], t[:, None]
    variance = (alpha * SPREAD) ** 2 + sigma**2  # of x_t within a class
    gap = x.reshape(-1, 1) - alpha * CENTRES
    latent = CENTRES + alpha * SPREAD**2 / variance * gap  # E[x0 | x_t, class], (B, classes)
    noise = sigma / variance * gap
    posterior = jax.nn.softmax(jnp.log(jnp.asarray(SHARES)) - gap**2 / (2 * variance), axis=1)
    chosen = jnp.where((y == CLASSES)[:, None], posterior, jax.nn.one_hot(y, CLASSES))
    return (chosen * (noise - latent)).sum(axis=1).reshape(x.shape)


@pytest.mark.parametrize(("name", "scale"), [("ode", 2.5), ("sde", 1.0)])
@pytest.mark.parametrize("drop_null", [False, True])
def test_corrected_samples_of_gaussian_data_are_those_of_the_true_velocity(name, scale, drop_null):
    """The network is replaced by the exact minimiser: each branch of guidance has its own shift."""
    weight, dropout = 0.3, 0.2
    method = DeltaFM(weight=weight, drop_null=drop_null)
    other = -SHARES @ CENTRES  # the mean velocity of another example

    def network(x, t, y):
        moved = weight / (1 - dropout) * (y < CLASSES) if drop_null else weight + 0.0 * y
        moved = moved[:, None, None, None]
        return (velocity(x, t, y) - moved * other) / (1 - moved)

    correct = method.correction(MEANS, Interpolant(), CLASSES, dropout).correct
    labels = jnp.arange(3000) % CLASSES
    noises = jax.random.normal(jax.random.key(0), (41, 3000, 1, 1, 1))

    def samples(denoise):
        return np.ravel(SAMPLERS[name].sample(
            Interpolant(), denoise, noises[40], labels, lambda i: noises[i], steps=40,
            guidance=Guidance(CLASSES, scale, 0.0, 0.7),
        ))  # fmt: skip

    true = samples(velocity)
    np.testing.assert_allclose(samples(correct(network)), true, atol=2e-3)
    assert np.abs(samples(network) - true).mean() > 0.1
    if scale == 1:
        for label, centre in enumerate(CENTRES):
            assert true[labels == label].mean() == pytest.approx(centre, abs=0.1)


def test_means_of_a_training_set():
    dataset = registry.load(digits.get_config().data)
    examples = [dataset.source[i] for i in range(len(dataset.source))]
    labels = np.array([example["label"] for example in examples])
    latents = np.asarray(dataset.encode({name: np.stack([e[name] for e in examples]) for name in examples[0]}, None))
    means = latent_means.measure(dataset, classes=True)
    np.testing.assert_allclose(means.mean, latents.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(means.class_shares, np.bincount(labels) / len(labels), rtol=1e-6)
    for label in range(10):
        np.testing.assert_allclose(means.class_means[label], latents[labels == label].mean(axis=0), atol=1e-5)
    alone = latent_means.measure(dataset, classes=False)
    assert alone.class_means is None
    np.testing.assert_array_equal(alone.mean, means.mean)


def test_a_class_without_others_is_not_shifted():
    means = LatentMeans(np.ones((1, 1, 1), np.float32), np.ones((1, 1, 1, 1), np.float32), np.ones(1, np.float32))
    correction = DeltaFM(negatives="other_label").correction(means, Interpolant(), 1, label_dropout=0.0)
    assert correction.weight[0] == 0
    assert np.isfinite(correction.velocity).all()


def test_a_loss_without_a_minimum_is_refused():
    DeltaFM(weight=0.85).shift(0.2)
    with pytest.raises(UserError, match=r"method.delta_fm.weight=0.85 over the 0.8 of examples with a label is 1.06"):
        DeltaFM(weight=0.85, drop_null=True).shift(0.2)


@pytest.fixture(scope="module")
def contrasted(tmp_path_factory):
    """The workdir of a run with the method, at its second step, and the recipe."""
    config = digits.get_config("delta_fm")
    config.update_from_flattened_dict({
        "model.width": 32, "model.depth": 2, "model.heads": 2, "batch_size": 16, "optimizer.warmup_steps": 0,
        "log_every": 1, "sample_every": 2, "steps": 2, "checkpoint_every": 2, "sampling.steps": 2,
        "sampling.preview_per_class": 1, "method.delta_fm.weight": 0.5,
    })  # fmt: skip
    workdir = tmp_path_factory.mktemp("contrasted") / "run"
    train(config, workdir)
    return workdir, config


def sampled(workdir, output, *flags, code=0):
    done = call("sample", f"--workdir={workdir}", "--num_samples=8", f"--output={output}", *flags, code=code)
    return done if code else np.load(output)["arr_0"].astype(int)


@pytest.mark.slow
def test_a_run_keeps_the_mean_and_its_tools_use_it(contrasted, tmp_path):
    workdir, config = contrasted
    path = workdir / latent_means.FILE
    expected = latent_means.measure(registry.load(config.data), classes=False)
    with np.load(path) as arrays:
        assert list(arrays) == ["mean"]
        np.testing.assert_array_equal(arrays["mean"], expected.mean)
    first = path.stat()
    config.steps = 4
    train(config, workdir)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (first.st_ino, first.st_mtime_ns)
    corrected = sampled(workdir, tmp_path / "a.npz")
    assert np.abs(sampled(workdir, tmp_path / "b.npz", "--nocorrection") - corrected).max() > 1
    np.testing.assert_array_equal(sampled(workdir, tmp_path / "c.npz", "--correction"), corrected)


def test_a_run_without_its_mean_says_so(contrasted, tiny_run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(contrasted[0], copy)
    (copy / latent_means.FILE).unlink()
    done = sampled(copy, tmp_path / "a.npz", code=2)
    assert "delta_fm samples with the mean latent, and there is no" in done.stderr
    assert "--nocorrection samples without it" in done.stderr
    np.savez(copy / latent_means.FILE, mean=np.zeros((2, 2, 1)))
    assert "holds no mean of shape (8, 8, 1)" in sampled(copy, tmp_path / "a.npz", code=2).stderr
    (copy / latent_means.FILE).write_bytes(b"PK")
    assert "cannot be read" in sampled(copy, tmp_path / "a.npz", code=2).stderr
    sampled(copy, tmp_path / "a.npz", "--nocorrection")
    done = sampled(tiny_run, tmp_path / "b.npz", "--correction", code=2)
    assert "trained with sra, which shifts no velocity" in done.stderr


def test_weights_are_of_labels():
    """One velocity for all, or one each."""
    base = Correction(np.array([0.5, 0.25, 0.0]), np.full((1, 1, 1, 1), 8.0))
    given = (jnp.ones((3, 1, 1, 1)), jnp.zeros(3), jnp.arange(3))
    denoise = lambda x, t, y: 4 * x  # noqa: E731
    np.testing.assert_allclose(base.correct(denoise)(*given).ravel(), [6, 5, 4])
    each = dataclasses.replace(base, velocity=np.array([8.0, 16, 32]).reshape(3, 1, 1, 1))
    np.testing.assert_allclose(each.correct(denoise)(*given).ravel(), [6, 7, 4])
