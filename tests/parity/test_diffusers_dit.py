"""Our transformer against diffusers' DiT with random weights, mapped here by names: a check independent of both the
goldens and sra_jax.interop."""

import jax
import numpy as np
import pytest
from flax import nnx

from sra_jax.models.transformer import Transformer, TransformerConfig

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

CHANNELS, CLASSES, PATCH, DEPTH, HEADS, HEAD_WIDTH, SIZE = 4, 7, 2, 3, 4, 8, 16
WIDTH = HEADS * HEAD_WIDTH


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=HEAD_WIDTH, in_channels=CHANNELS, out_channels=2 * CHANNELS,
        num_layers=DEPTH, sample_size=SIZE, patch_size=PATCH, num_embeds_ada_norm=CLASSES, norm_eps=1e-6,
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    # Every block owns a copy of the embedding of time and label; DiT has one. And diffusers spaces the 128 frequencies
    # over 127 intervals, where DiT's and SiT's own code has 128.
    shared = model.transformer_blocks[0].norm1.emb
    shared.time_proj.downscale_freq_shift = 0
    for block in model.transformer_blocks:
        block.norm1.emb = shared
    return model


def our_params(theirs) -> dict:
    tensors = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}

    def linear(name: str) -> dict:
        return {"kernel": tensors[f"{name}.weight"].T, "bias": tensors[f"{name}.bias"]}

    def block(i: int) -> dict:
        name = f"transformer_blocks.{i}"
        q, k, v = (linear(f"{name}.attn1.to_{part}") for part in "qkv")
        out = linear(f"{name}.attn1.to_out.0")
        qkv = {leaf: np.stack([q[leaf], k[leaf], v[leaf]], axis=-2) for leaf in ("kernel", "bias")}
        return {
            "attention": {
                "qkv": {leaf: array.reshape(*array.shape[:-1], HEADS, HEAD_WIDTH) for leaf, array in qkv.items()},
                "out": {"kernel": out["kernel"].reshape(HEADS, HEAD_WIDTH, WIDTH), "bias": out["bias"]},
            },
            "mlp": {"hidden": linear(f"{name}.ff.net.0.proj"), "out": linear(f"{name}.ff.net.2")},
            "modulation": linear(f"{name}.norm1.linear"),
        }

    embedding = "transformer_blocks.0.norm1.emb"
    patch_kernel = tensors["pos_embed.proj.weight"]  # (D, C, p, p)
    return {
        "patch_embedding": {
            "kernel": patch_kernel.transpose(2, 3, 1, 0).reshape(-1, WIDTH),
            "bias": tensors["pos_embed.proj.bias"],
        },
        "time_embedding": {
            "hidden": linear(f"{embedding}.timestep_embedder.linear_1"),
            "out": linear(f"{embedding}.timestep_embedder.linear_2"),
        },
        "label_embedding": {"embedding": tensors[f"{embedding}.class_embedder.embedding_table.weight"]},
        "blocks": jax.tree.map(lambda *layers: np.stack(layers), *(block(i) for i in range(DEPTH))),
        "final": {"modulation": linear("proj_out_1"), "linear": linear("proj_out_2")},
    }


def test_transformer_equals_diffusers(theirs):
    config = TransformerConfig(
        input_size=SIZE, channels=CHANNELS, output_channels=2 * CHANNELS, num_classes=CLASSES, patch=PATCH,
        depth=DEPTH, width=WIDTH, heads=HEADS,
    )  # fmt: skip
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
    params = our_params(theirs)
    expected_shapes = jax.tree.map(lambda leaf: leaf.shape, nnx.to_pure_dict(abstract))
    assert jax.tree.map(np.shape, params) == expected_shapes  # every parameter is set, and no other

    generator = np.random.default_rng(0)
    x = generator.standard_normal((5, SIZE, SIZE, CHANNELS)).astype(np.float32)
    t = np.array([0, 1, 250, 731, 999], np.int32)
    y = np.array([0, 3, 6, CLASSES, 1], np.int32)  # the null label too

    tokens = []
    hooks = [
        block.register_forward_hook(lambda module, inputs, output: tokens.append(output.numpy()))
        for block in theirs.transformer_blocks
    ]
    with torch.no_grad():
        expected = theirs(
            torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(t).long(), torch.from_numpy(y).long()
        ).sample.permute(0, 2, 3, 1)
    for hook in hooks:
        hook.remove()

    @jax.jit
    def ours(params, x, t, y):
        return nnx.merge(graphdef, params)(x, t, y, taps=tuple(range(1, DEPTH + 1)))

    prediction, features = ours(params, x, t, y)
    for actual, wanted in zip([prediction, *features], [expected.numpy(), *tokens], strict=True):
        assert np.abs(wanted).max() > 0.5  # a network that predicts something
        # t = 999 multiplies the rounding of the sinusoids' frequencies: float32 agrees to about 1e-5 of the scale.
        np.testing.assert_allclose(actual, wanted, rtol=0, atol=3e-5 * np.abs(wanted).max())
