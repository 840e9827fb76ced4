import jax.numpy as jnp
import numpy as np
import pytest

from sra_jax.diffusion.guidance import Guidance, loop
from sra_jax.diffusion.interpolant import Interpolant
from sra_jax.diffusion.registry import SAMPLERS

NULL = 7


def denoise(x, t, y):
    """A prediction that tells the label: y everywhere."""
    return jnp.broadcast_to(y.reshape(-1, 1, 1, 1).astype(jnp.float32), x.shape)


def test_mixes_towards_the_label():
    x, t, y = jnp.zeros((2, 1, 1, 3)), jnp.zeros(2), jnp.array([1, 2])
    guided = Guidance(NULL, scale=1.5).guide(denoise)(x, t, y)
    np.testing.assert_allclose(guided[:, 0, 0, 0], [7 + 1.5 * (1 - 7), 7 + 1.5 * (2 - 7)])


def test_first_channels_only():
    x, t, y = jnp.zeros((1, 1, 1, 3)), jnp.zeros(1), jnp.array([1])
    guided = Guidance(NULL, scale=2.0, channels=2).guide(denoise)(x, t, y)
    np.testing.assert_allclose(guided.ravel(), [7 + 2 * (1 - 7), 7 + 2 * (1 - 7), 1])


def test_interval_includes_both_ends():
    times = np.array([1.0, 0.75, 0.5, 0.25, 0.0])
    np.testing.assert_array_equal(Guidance(NULL, 2.0, 0.25, 0.75).active(times), [False, True, True, True, False])
    assert not Guidance(NULL, 1.0, 0.0, 1.0).active(times).any()


@pytest.mark.parametrize("name", ["ode", "heun", "sde"])
def test_unguided_steps_cost_the_conditional_branch_only(name):
    """What is compiled evaluates 2N examples in the guided stretch and N outside it."""
    sizes = []

    def counting(x, t, y):
        sizes.append(x.shape[0])
        return denoise(x, t, y)

    SAMPLERS[name].sample(
        Interpolant(), counting, jnp.ones((3, 2, 2, 1)), jnp.zeros(3, int), lambda i: jnp.zeros((3, 2, 2, 1)), steps=10,
        guidance=Guidance(NULL, 2.0, 0.3, 0.6),
    )  # fmt: skip
    assert set(sizes) == {3, 6}
    assert sizes[0] == sizes[-1] == 3  # pure noise and nearly clean: outside the interval


def test_loop_runs_every_step_once_in_order():
    active = np.array([False, True, True, False, False])
    flags = []

    def step(x, i, denoiser):
        flags.append(denoiser is denoise)
        return x * 10 + i

    assert float(loop(step, jnp.float32(0), active, denoise, Guidance(NULL, 2.0))) == 1234
    assert flags.count(True) == 2  # one compiled loop before and one after the guided stretch
    assert flags.count(False) == 1
