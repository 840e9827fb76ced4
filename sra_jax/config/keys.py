"""Every key that a recipe has, what it means, and the checks that run before any work starts.

A recipe (configs/*.py) starts from `default()` and changes values; it adds keys only under `process` and `sampling`,
whose keys belong to the family that `process.name` names, and `CAPTION_KEYS` where `model.name` is mmdit. A key that
nothing reads is refused.
"""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from sra_jax.diffusion.registry import process_defaults
from sra_jax.methods.registry import METHODS
from sra_jax.methods.registry import defaults as method_defaults

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
LEARNING_RATE_SCHEDULES = ("constant", "cosine")
EMA_SCHEDULES = ("constant", "cosine")
AUTO = "auto"
"""Of model.remat: left to the memory of the devices, as mesh.fsdp=0 and accumulation=0 are."""

FREE_KEYS = (
    "steps", "epochs", "examples", "log_every", "sample_every", "checkpoint_every", "keep", "keep_every",
    "accumulation", "data.path", "data.cache", "data.workers", "data.vae", "data.text_encoder", "mesh",
    "model.attention", "model.products", "model.remat", "model.unroll", "sampling", "evaluation", "ema.sampled",
    "compilation_cache", "device_memory", "log", "profile",
)  # fmt: skip
"""Keys, or groups of keys, that a resumed run may change: they move no number beyond rounding. The length of
the run is free as long as no schedule depends on it."""


def default() -> ConfigDict:
    """All keys with their defaults; a recipe must set `data` and `model`.

    Units: lengths of a run in steps unless the name says otherwise; fractions in [0, 1].
    """
    return ConfigDict(
        {
            "name": "run",  # names the default workdir, runs/NAME
            "seed": 0,  # of parameters, data order, noise; a run is a function of its config
            "init_from": "",  # workdir of another run, from whose EMA a new run starts; empty: from random weights
            "steps": 0,  # length of the run in steps; or give one of epochs and examples
            "epochs": 0.0,  # passes over the training set, rounded up to whole steps
            "examples": 0,  # training examples seen, rounded up to whole steps
            "batch_size": 256,  # examples a step over all devices and processes
            "accumulation": 1,  # microbatches a step; 0: as many as the memory asks for
            "dtype": "float32",  # of matrix products: float32 or bfloat16; everything else is float32
            "label_dropout": 0.1,  # share of labels replaced by the null label, or captions by the empty one
            "log_every": 100,  # steps between lines of metrics.jsonl
            "sample_every": 10_000,  # steps between preview grids; 0 makes none
            "checkpoint_every": 10_000,  # steps between checkpoints; the last step is always saved
            "keep": 3,  # newest checkpoints that are kept
            "keep_every": 0,  # checkpoints of every so many steps are kept for good; 0: none
            "compilation_cache": "",  # folder of compiled programs, or off; empty: programs/ in ~/.cache/sra_jax
            "device_memory": 0.0,  # GB of a device that a step may use; 0: what the device says
            "log": {
                "wandb": "",  # project of Weights & Biases that is logged to as well; empty: none
            },
            "profile": {
                "start": 0,  # step from which on a trace is written to the workdir's profile/; 0: none
                "steps": 5,  # length of the trace
            },
            "data": {
                "name": "synthetic",  # digits, latents, pixels or synthetic
                "path": "",  # latents: folder or address of prepared ones; pixels: idx:DIR and the like
                "cache": "",  # local folder for copies of latents at an address (gs://); empty: in ~/.cache/sra_jax
                "image_size": 32,  # height and width that the model sees
                "channels": 4,  # of what the model sees: 4 for latents, 1 or 3 for pixels
                "num_classes": 1000,  # labels run from 0 to one less; the number itself is the null; 0: captions
                "vae": "",  # autoencoder that decodes latents: a folder or a Hugging Face id; empty: the one they name
                "workers": 0,  # processes that read ahead; 0 reads in threads
            },
            "model": {
                "name": "transformer",  # transformer: DiT and SiT, told labels; mmdit: text to image, told captions
                "patch": 2,  # side of the square that becomes a token; divides data.image_size
                "depth": 12,  # transformer blocks
                "width": 768,  # of a token; divisible by heads and by 4
                "heads": 12,  # of attention
                "mlp_ratio": 4.0,  # width of the MLP over the width of a token
                "null_label": True,  # a row of the label table for it; False, as DiT without label dropout: no guidance
                "attention": "auto",  # its implementation: auto, plain, cudnn (NVIDIA GPUs), flash or splash (TPUs)
                "products": "auto",  # what multiplies float32 matrices on a CPU: xla, blas (SciPy's); auto: the quicker
                "unroll": "auto",  # a step's blocks compiled one by one: yes, no; auto: yes on GPUs with whole states
                "remat": "none",  # recomputed in the backward pass: none, dots, block, full; auto: by the memory
            },
            "process": {
                "name": "interpolant",  # the family: interpolant (SiT) or gaussian (DiT); each has its own other keys
                **process_defaults("interpolant"),
            },
            "method": {
                "name": "sra",  # what is added to the denoising loss: none, a method, or a sum such as sra+dispersive
                **{name: method_defaults(name) for name in METHODS if not METHODS[name].section},
            },
            "alignment": {
                "enabled": True,  # False takes SRA out of the methods; alone, it trains the baseline
                "student_block": 3,  # m, the student's block, counted from 1
                "teacher_block": 8,  # n >= m, the teacher's block; it runs blocks 1..n only
                "distance": "smooth_l1",  # smooth_l1, l1, l2, cosine, cosine_tokens
                "beta": 0.05,  # of smooth_l1: where it turns from quadratic to linear
                "weight": 0.2,  # lambda, of the alignment loss; at least 0
                "weight_schedule": "constant",  # or decay: a tenth every weight_decay_steps after weight_decay_start
                "weight_decay_start": 0,  # step at which the decay of the weight begins
                "weight_decay_steps": 1,  # steps for one factor of ten
                "weight_decay_stair": 1,  # the decaying weight changes once in so many steps
                "interval": (0.0, 0.2),  # teacher earlier by U[low, high) of the whole time range; low = high: fixed
                "head": True,  # whether the student has a projection head, which sampling does without
            },
            "optimizer": {
                "learning_rate": 1e-4,  # at its highest; above 0
                "schedule": "constant",  # of the learning rate: constant, or cosine, to 0 at the last step
                "warmup_steps": 0,  # steps of a linear rise from 0
                "b1": 0.9,  # decay of the gradient's running mean, in [0, 1)
                "b2": 0.999,  # decay of its square's running mean, in [0, 1)
                "eps": 1e-8,  # added to the root of the latter; above 0
                "weight_decay": 0.0,  # decoupled, times the learning rate; at least 0
                "clip_norm": 1.0,  # of the global gradient norm; 0 does not clip
            },
            "ema": {
                "decay": 0.9999,  # share of the old average that a step keeps, in [0, 1]
                "schedule": "constant",  # of the decay: constant, or cosine, from decay to 1 over the run (BYOL)
                "profiles": "",  # further EMAs: decays and relative widths, 0.999,0.9999 or power:0.05,power:0.1
                "sampled": "teacher",  # the EMA that previews, evaluation and tools use: teacher, or one of profiles
            },
            "sampling": {
                "sampler": "sde",  # with interpolant: ode, heun or sde; with gaussian: ddpm or ddim
                "steps": 250,  # of the sampler; with gaussian a text, a number or sections: "250", "10,10,5", "ddim50"
                "guidance_scale": 1.0,  # at least 1; 1 turns guidance off
                "guidance_interval": (0.0, 1.0),  # guided where low <= t <= high, fractions of the time range
                "guidance_channels": 0,  # guide the first so many channels; 0 guides all
                "correction": True,  # take back the method's shift of the velocity, where it has one (delta_fm)
                "preview_classes": 10,  # rows of a preview grid: the first so many classes
                "preview_per_class": 8,  # its columns
            },
            "evaluation": {
                "every": 0,  # steps between evaluations of the EMA; 0 makes none
                "num_samples": 5000,  # images a measurement
                "batch_size": 250,  # samples at a time over all devices
                "reference": "dataset",  # the training set's own images, or as tools/fid.py takes it
                "extractor": "inception",  # inception, inception_random or classifier
                "weights": "",  # of the extractor; empty: the cache or the network
            },
            "mesh": {
                "data": -1,  # devices over which the batch is split, with a whole state each; -1: all that are left
                "fsdp": 0,  # devices over which batch and state are split; 0: by the memory; -1: all that are left
                "model": 1,  # devices over which attention heads and the MLP are split (tensor parallelism)
            },
        },
        convert_dict=True,
    )


CAPTION_FORMS = ("embeddings", "ids")
"""What a set stores of captions."""

CAPTION_KEYS: dict[str, tuple[Any, str]] = {
    "data.context_length": (77, "tokens of a caption, padding included"),
    "data.context_width": (768, "channels of a caption's embeddings, one a token"),
    "data.captions": ("embeddings", "embeddings, as prepared; ids: the text tower embeds token ids on the devices"),
    "data.text_encoder": ("", "a folder or a Hugging Face id; empty: the one that embedded the captions"),
    "model.initialisation": (
        "uniform", "uniform: weights and biases within 1 / sqrt(inputs), PyTorch's and REPA's; adaln_zero: DiT's"
    ),
    "model.pooled": (False, "whether the embedding at a caption's end joins the time in the blocks' condition"),
    "sampling.preview_prompts": (("",), "captions of the rows of a preview grid, in place of classes"),
}  # fmt: skip
"""The keys that come with `model.name=mmdit`: default and meaning."""


def tell_captions(config: ConfigDict) -> None:
    """Turn a recipe into one of text to image: an MMDiT with its keys, told captions in place of labels."""
    config.model.name = "mmdit"
    config.data.num_classes = 0
    for key, (value, _) in CAPTION_KEYS.items():
        group, _, name = key.partition(".")
        config[group][name] = value


def flatten(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf, in order."""
    for key in config:
        value = config[key]
        if isinstance(value, ConfigDict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
