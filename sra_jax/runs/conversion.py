"""From a file of PyTorch tensors to a run's folder, and back.

Nothing is held in memory whole but one of the four trees of a run at a time: parameters, EMA, AdamW's two moments.
"""

import ctypes
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from sra_jax import config as config_lib
from sra_jax import files, remote
from sra_jax.errors import UserError
from sra_jax.interop import mmdit
from sra_jax.interop.families import REVERSED, Contents, to_original_sit
from sra_jax.interop.pytorch import SRA_HEAD, Tree, insert, pytorch_from_params
from sra_jax.interop.tensor_files import TensorFile
from sra_jax.methods.registry import METHODS
from sra_jax.models.flops import Shape
from sra_jax.models.mmdit import MMDiTConfig
from sra_jax.models.transformer import TransformerConfig
from sra_jax.runs import CHECKSUMS, CONFIG, TREES, checksums
from sra_jax.runs.checkpoints import check_writable
from sra_jax.runs.state import Networks, make_optimizer
from sra_jax.runs.trained import TrainedModel

READ_TOGETHER = 4
"""Tensors that are read from one opening of the file: more are faster, fewer take less memory."""

WRITING_GIGABYTES = 1
"""What orbax may hold in memory beside the tree that it writes."""


def read_tree(file: TensorFile, group: str, contents: Contents) -> Tree:
    """A group of a file's tensors as a parameter tree, {"model": ...} and the method's head where it is there; float32.

    Tensors under the original SiT's time are changed to our time and velocity; their moments cannot be.
    """
    tree: Tree = {}
    for path, names in contents.leaves():
        tensors = _read_few(file, group, [contents.in_file(name) for name in names])
        insert(tree, path, jax.numpy.asarray(contents.leaf(path, names, tensors)))
        _return_memory()
    if contents.head:
        tree[METHODS[contents.method].own_head] = tree.pop("head")
    return tree


def _read_few(file: TensorFile, group: str, names: Sequence[str]) -> Iterator[np.ndarray]:
    """The tensors one after the other, read a few at a time."""
    for first in range(0, len(names), READ_TOGETHER):
        yield from file.read(group, names[first : first + READ_TOGETHER])


def check_config(config: ConfigDict, contents: Contents) -> None:
    """Raises `UserError` where a run's config does not describe the network of a file."""
    config_lib.check(config)
    if config.ema.profiles:
        raise UserError(
            f"ema.profiles={config.ema.profiles!r}: the file has no such averages, and they cannot begin later; leave "
            "it out"
        )
    wanted, found = config_lib.transformer_of(config), contents.network
    if type(wanted) is not type(found):
        fitting = "mmdit" if isinstance(found, MMDiTConfig) else "transformer"
        raise UserError(
            f"the config does not describe the file: model.name={config.model.name!r}, and the file's tensors are "
            f"those of model.name={fitting!r}"
        )
    outputs = found.channels if contents.family in REVERSED else found.output_channels
    heads, head = set(config_lib.methods_of(config).heads(wanted)), METHODS[contents.method].own_head
    pairs = {
        "model.depth": (wanted.depth, found.depth), "model.width": (wanted.width, found.width),
        "model.heads": (wanted.heads, found.heads), "model.patch": (wanted.patch, found.patch),
        "model.mlp_ratio": (wanted.mlp_ratio, found.mlp_ratio),
        "data.image_size": (wanted.input_size, found.input_size), "data.channels": (wanted.channels, found.channels),
        "output channels (process.name)": (wanted.output_channels, outputs),
        f"the head of {contents.method} (method.name)": (head in heads, contents.head),
    }  # fmt: skip
    if isinstance(wanted, TransformerConfig) and isinstance(found, TransformerConfig):
        pairs |= {
            "data.num_classes": (wanted.num_classes, found.num_classes),
            "model.null_label": (wanted.null_label, found.null_label),
        }
    if isinstance(wanted, MMDiTConfig) and isinstance(found, MMDiTConfig):
        pairs |= {
            "data.context_width": (wanted.context_width, found.context_width),
            "model.pooled": (wanted.pooled, found.pooled),
        }
    wrong = [f"{key}: {asked} in the config, {has} in the file" for key, (asked, has) in pairs.items() if asked != has]
    if wrong:
        raise UserError("the config does not describe the file:\n  " + "\n  ".join(wrong))


def import_checkpoint(
    file: TensorFile, contents: Contents, config: ConfigDict, workdir: Path, fresh_optimizer: bool = False
) -> str:
    """Write a file's weights as a run that tools read and that training goes on with.

    Args:
      file: an opened checkpoint; a group that it lacks (params or ema) is taken from the other.
      contents: as `families.describe` gives it.
      config: the run's.
      workdir: must not exist, or be empty; appears whole or not at all. At an address config.json comes last, without
        which it is no run.
      fresh_optimizer: start the optimizer anew although the file holds its state.

    Returns:
      What became of the optimizer's state.

    Raises:
      UserError: the config does not fit, or the folder holds something.
    """
    check_config(config, contents)
    _check_free(workdir)
    params = "params" if "params" in file.groups else "ema"
    ema = "ema" if "ema" in file.groups else "params"
    if fresh_optimizer or "mu" not in file.groups:
        fate = "started anew" if fresh_optimizer else "not in the file: started anew"
    elif contents.family in REVERSED:
        fate = "started anew: its second moments do not survive the change of time"
        fresh_optimizer = True
    else:
        fate = f"taken over, {file.moment_step} updates"

    def optimizer_state() -> Any:
        abstract = jax.eval_shape(Networks(config).init, jax.random.key(0))
        if fresh_optimizer or "mu" not in file.groups:
            zeros = jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), abstract)
            return _filled(config, abstract, zeros, zeros, count=0, step=file.step)
        return _filled(config, abstract, read_tree(file, "mu", contents), read_tree(file, "nu", contents),
                       count=file.moment_step, step=file.step)  # fmt: skip

    write_run(workdir, config, file.step, {
        "params": lambda: read_tree(file, params, contents),
        "ema": lambda: read_tree(file, ema, contents),
        "opt_state": optimizer_state,
    })  # fmt: skip
    return fate


def _filled(config: ConfigDict, abstract: Tree, mu: Tree, nu: Tree, count: int, step: int) -> optax.OptState:
    """The optimizer's state with these moments after `count` updates, its schedules at `step`."""

    def fill(state: Any) -> Any:
        if isinstance(state, optax.ScaleByAdamState):
            return state._replace(count=np.asarray(count, np.int32), mu=mu, nu=nu)
        return state._replace(count=np.asarray(step, np.int32))

    def is_state(node: Any) -> bool:
        return isinstance(node, (optax.ScaleByAdamState, optax.ScaleByScheduleState))

    empty = jax.eval_shape(make_optimizer(config, steps=config.steps or 1).init, abstract)
    return jax.tree.map(fill, empty, is_leaf=is_state)


def write_run(workdir: Path, config: ConfigDict, step: int, trees: Mapping[str, Callable[[], Any]]) -> None:
    """A run's folder with one checkpoint, each tree made, written and dropped in turn.

    Args:
      workdir: appears whole or not at all; at an address config.json comes last.
      config: the run's.
      step: the checkpoint's.
      trees: params, ema and opt_state, made when they are called.

    Raises:
      UserError: the folder holds something, another program is writing it, or an array is not finite.
    """
    if remote.is_address(workdir):
        check_writable("--workdir", workdir)
        with files.locked(workdir, "choose another --workdir"):
            _check_free(workdir)
            _write_run(workdir, config, step, trees)
        return
    workdir = workdir.absolute()
    workdir.parent.mkdir(parents=True, exist_ok=True)
    _check_free(workdir)
    if workdir.exists():
        workdir.rmdir()  # empty; its place is taken by the whole folder
    with files.locked(workdir, "choose another --workdir"):
        _check_free(workdir)
        with files.whole(workdir) as part:
            _write_run(part, config, step, trees)


def _check_free(workdir: Path) -> None:
    if remote.is_address(workdir):
        with remote.asked(workdir):
            taken = workdir.exists() and any(path.name != ".lock" for path in remote.walk(workdir))
    else:
        taken = workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir()))
    if taken:
        raise UserError(f"--workdir={workdir} exists and is not empty; choose another")


def _write_run(part: Path, config: ConfigDict, step: int, trees: Mapping[str, Callable[[], Any]]) -> None:
    if not remote.is_address(part):
        files.remove_folder(part)
    folder = part / "checkpoints"
    manager = ocp.CheckpointManager(folder, item_names=(*TREES, "meta"))
    meta = {"step": step, "config": config.to_dict(), "data": {"next_batch": step}}
    manager.save(step, args=ocp.args.Composite(meta=ocp.args.JsonSave(meta)))
    manager.close()
    sums: dict[str, Any] = {"meta": checksums.data(meta)}
    for name, make in trees.items():
        tree = make()
        sums[name], infinite = checksums.arrays(tree)
        if infinite:
            raise UserError(f"{name}/{infinite[0]} holds NaN or infinity; a run cannot begin from that")
        # a writer of its own for each tree: it holds what it wrote until it is closed
        with ocp.Checkpointer(ocp.StandardCheckpointHandler(save_concurrent_gb=WRITING_GIGABYTES)) as writer:
            writer.save(folder / str(step) / name, args=ocp.args.StandardSave(tree))
        del tree
        _return_memory()
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as writer:
        writer.save(folder / str(step) / CHECKSUMS, args=ocp.args.JsonSave(sums))
    files.write_text(part / CONFIG, config_lib.to_json(config) + "\n")


def _return_memory() -> None:
    """Give freed memory back to the system: glibc keeps what many pieces of some megabytes leave."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


SELF_FLOW_HEAD = METHODS["self_flow"].foreign_head
PURPOSES = ("training", "sampling")
"""What an export is for: the authors' training code wants the projection head, their sampling the network alone."""


def export_checkpoint(
    workdir: Path, step: int | None, weights: str, output: Path, purpose: str | None = None, family: str = "auto",
    ema: str = "",
) -> tuple[int, str]:
    """Write a run's weights under the authors' names, with the position table, as `load_state_dict` takes them.

    Args:
      workdir: the run's.
      step: which checkpoint; None takes the newest.
      weights: "ema", "params" or "both".
      output: .safetensors, a bare state dict of one of the two; or .pt, a dict with `ema` and/or `model`, and `steps`.
      purpose: one of `PURPOSES`; None writes all that was trained.
      family: whose names, time and channels: "sit" or "dit" as the run's process has it, a name of `REVERSED`,
        "mmdit" for a run with captions, or "auto": self_flow where the run has its head, else what fits.
      ema: which EMA, as `profiles.restore` takes it.

    Returns:
      The step, and what loads the file.

    Raises:
      UserError: no such run or step, another suffix, both trees for safetensors, no head to train on with, or a family
        that the run's process does not fit.
    """
    if output.suffix not in (".safetensors", ".pt"):
        raise UserError(f"--output={output} must end in .pt or .safetensors")
    if output.suffix == ".safetensors" and weights == "both":
        raise UserError("a .safetensors file holds one state dict: --export=ema or --export=params")
    groups: dict[str, dict[str, np.ndarray]] = {}
    for tree in ("params", "ema") if weights == "both" else (weights,):
        model = TrainedModel(workdir, step, tree, ema=ema if tree == "ema" else "")
        params, theirs = _under_their_names(model.params, purpose)
        if purpose == "training" and "head" not in params:
            raise UserError(
                f"--export_for=training needs a projection head, which the run at {workdir} did not train: "
                "--export_for=sampling"
            )
        network = config_lib.transformer_of(model.config)
        if isinstance(network, MMDiTConfig):
            if family not in ("auto", "mmdit"):
                raise UserError(f"--family={family} does not fit the run at {workdir}, which is an MMDiT")
            tensors = mmdit.pytorch_from_params(params, network.channels, network.input_size // network.patch)
            groups["model" if tree == "params" else tree] = tensors
            chosen = "mmdit"
            continue
        own = "sit" if model.config.process.name == "interpolant" else "dit"
        chosen = ("self_flow" if theirs == SELF_FLOW_HEAD else own) if family == "auto" else family
        if chosen not in (own, *REVERSED) or (chosen in REVERSED and own == "dit"):
            raise UserError(f"--family={family} does not fit the run at {workdir}, which is a {own}")
        tensors = pytorch_from_params(params, network.channels, network.input_size)
        if chosen in REVERSED:
            flat = chosen == "self_flow"
            tensors = {name: to_original_sit(name, tensor, network, flat) for name, tensor in tensors.items()}
        tensors = {name.replace(f"{SRA_HEAD}.", f"{theirs}.", 1): tensor for name, tensor in tensors.items()}
        groups["model" if tree == "params" else tree] = tensors
    if output.suffix == ".safetensors":
        (tensors,) = groups.values()
        files.write_results({output: lambda path: files.write_safetensors(path, tensors)})
    else:
        files.write_results({output: lambda path: _torch_save(groups, model.step, path)})
    return model.step, loads(network, "head" in params, chosen)


def _under_their_names(params: Tree, purpose: str | None) -> tuple[Tree, str]:
    """The network and, unless it is for sampling, the head that a checkpoint of the method's authors has, here under
    the name of SRA's; and how the head's tensors begin there."""
    kept: Tree = {"model": params["model"]}
    for method in METHODS.values():
        if method.own_head and method.own_head in params:
            if purpose != "sampling":
                kept["head"] = params[method.own_head]
            return kept, method.foreign_head
    return kept, SRA_HEAD


def loads(network: Shape, head: bool, family: str) -> str:
    """Which of the authors' classes take a state dict of this network, and how strictly."""
    if family == "mmdit":
        return f"{'with' if head else 'without'} SRA's head: REPA's MMDiT of these sizes takes it"
    if family in REVERSED:
        names = "Self-Flow's class" if family == "self_flow" else "the original SiT's class"
        return f"{'with' if head else 'without'} a head: {names} with {2 * network.channels} output channels takes it"
    if head:
        return "with ap_head: SRA's own classes load it with strict=True, others without ap_head"
    if network.output_channels == 2 * network.channels:
        return "without ap_head: DiT's own class loads it with strict=True, SRA's with strict=False"
    return (
        "without ap_head: SRA's SiT loads it with strict=False and samples from it. The original SiT cannot: it has "
        f"{2 * network.channels} output channels and the opposite time"
    )


def _torch_save(groups: Mapping[str, Mapping[str, np.ndarray]], step: int, path: Path) -> None:
    try:
        import torch
    except ImportError as error:
        raise UserError("writing .pt needs PyTorch (pip install torch); --output=FILE.safetensors does not") from error
    content = {
        group: {name: torch.tensor(tensor) for name, tensor in tensors.items()} for group, tensors in groups.items()
    }
    with files.whole(path) as unfinished, unfinished.open("wb") as file:
        torch.save({**content, "steps": step}, file)
