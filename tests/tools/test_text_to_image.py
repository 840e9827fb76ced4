"""Text to image as a user does it: COCO's files to latents and captions (tools/prepare_latents.py), training, resume,
prompts, FID."""

import json

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import load_file, save_file

from sra_jax.data import caption_shards, latents
from sra_jax.data.caption_sources import open_captions, usable
from sra_jax.data.captions import embedded
from sra_jax.data.images import read_image, square_crop
from sra_jax.distributed import sharding
from sra_jax.errors import UserError
from sra_jax.interop import clip_text
from sra_jax.interop import mmdit as interop
from sra_jax.runs.trained import TrainedModel
from tests.conftest import kill_when, made_once, run, start
from tests.in_process import call
from tests.interop.random_tensors import mmdit_shapes, random_mmdit
from tests.tools.test_training_on_latents import final_state

TINY = (
    "--config=configs/t2i_coco.py:smoke", "--config.model.depth=3", "--config.model.width=32", "--config.batch_size=4",
    "--config.alignment.teacher_block=2", "--config.steps=6", "--config.checkpoint_every=3", "--config.log_every=2",
    "--config.sampling.steps=2", "--config.sampling.preview_prompts=('a cat','a dog')",
)  # fmt: skip
DEMO = (
    "--config=configs/digits_captions.py", "--config.model.depth=3", "--config.model.width=32",
    "--config.model.initialisation=uniform",
    "--config.batch_size=8", "--config.alignment.student_block=1", "--config.alignment.teacher_block=2",
    "--config.steps=4", "--config.optimizer.warmup_steps=0", "--config.checkpoint_every=4", "--config.log_every=2",
    "--config.sample_every=4", "--config.sampling.steps=2", "--config.sampling.preview_per_class=2",
)  # fmt: skip


@pytest.fixture
def prepare(coco_folder, tiny_vae, tiny_clip):
    def prepared(output, *flags, code=0):
        return call(
            "prepare_latents", f"--source=coco:{coco_folder}:tiny2014", f"--vae={tiny_vae.folder}", "--image_size=16",
            "--batch_size=8", f"--text_encoder={tiny_clip}", f"--output={output}", *flags, code=code,
        )  # fmt: skip

    return prepared


def data(folder, captions="embeddings"):
    return ConfigDict({"path": str(folder), "image_size": 8, "channels": 4, "num_classes": 0, "vae": "",
                       "text_encoder": "", "context_length": 7, "context_width": 12, "captions": captions})  # fmt: skip


@pytest.mark.parametrize("flip", [False, True])
def test_captions_lie_beside_the_latents(prepare, coco_folder, tiny_clip, tmp_path, flip):
    """Every usable caption of every image, embedded by the tower, in the latents' order; the others are named."""
    output = tmp_path / "latents"
    done = prepare(output, "--shard_size=2", *(["--flip"] if flip else []))
    for part in ("its caption is empty", "NoneType, not text", "told the empty one", "its caption was cut to 7 tokens"):
        assert part in done.stderr
    items = list(open_captions(f"coco:{coco_folder}:tiny2014").items(0, 5))
    stored = caption_shards.read(output)
    texts = [usable(item)[0] or [""] for item in items for _ in range(2 if flip else 1)]
    assert stored.counts == tuple(map(len, texts))
    assert "its caption was cut" in " ".join(reason for _, reason in stored.bad)

    dataset = latents.load(data(output))
    encoder = latents.text_encoder(data(output))
    assert len(dataset.source) == len(texts)
    seen = [set() for _ in texts]
    for epoch in range(6):
        batch = dataset.source.read_epochs(np.arange(len(texts)), np.full(len(texts), epoch))
        assert batch["context"].dtype == np.float16
        assert "label" not in batch
        for index, own in enumerate(texts):
            expected = encoder(own)
            pairs = zip(expected["context"].astype(np.float16), expected["end"], strict=True)
            matches = [
                i for i, (context, end) in enumerate(pairs)
                if np.array_equal(batch["context"][index], context) and batch["end"][index] == end
            ]  # fmt: skip
            assert matches, (index, epoch)
            seen[index].update(matches)
    assert [len(found) for found in seen] == [len(own) for own in texts]
    tower = clip_text.load(str(tiny_clip))
    np.testing.assert_array_equal(dataset.null["end"], tower.tokenizer([""])[1][0])
    np.testing.assert_allclose(dataset.null["context"], encoder([""])["context"][0], atol=1e-6)


def test_token_ids_in_place_of_embeddings(prepare, coco_folder, tmp_path):
    """Stored as ids and embedded on the devices, captions are those that are stored embedded, half precision apart."""
    batches = {}
    for form in ("embeddings", "ids"):
        prepare(tmp_path / form, f"--captions={form}")
        dataset = latents.load(data(tmp_path / form, captions=form))
        batch = dataset.source.read_epochs(np.arange(5), np.arange(5))
        mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "model": 1}, jax.devices()[:1])
        embed = embedded(dataset.text, mesh, np.float32)
        batches[form] = embed(jax.tree.map(jax.numpy.asarray, batch))
    assert batches["ids"].keys() == batches["embeddings"].keys()
    assert batches["ids"]["context"].dtype == np.float32
    np.testing.assert_allclose(batches["ids"]["context"], batches["embeddings"]["context"], rtol=1e-3, atol=1e-5)
    for name in ("end", "mean", "std"):
        np.testing.assert_array_equal(batches["ids"][name], batches["embeddings"][name])
    assert [caption_shards.read(tmp_path / form).record_bytes for form in ("embeddings", "ids")] == [172, 32]
    with pytest.raises(UserError, match=r"set data\.captions='ids' or delete captions\.json"):
        latents.load(data(tmp_path / "ids"))
    assert "give --captions=ids" in prepare(tmp_path / "ids", code=2).stderr


def test_captions_are_checked_and_a_broken_off_attempt_goes_on(prepare, tmp_path):
    output = tmp_path / "latents"
    prepare(output, "--shard_size=2")
    whole = {path.name: path.read_bytes() for path in output.glob("captions*")}
    assert "captions" in call("prepare_latents", "--verify", f"--output={output}").stdout
    shard = sorted(output.glob("captions-*"))[1]
    (output / "captions.json").unlink()
    shard.unlink()
    prepare(output, "--shard_size=2")
    assert {path.name: path.read_bytes() for path in output.glob("captions*")} == whole
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    assert shard.name in call("prepare_latents", "--verify", f"--output={output}", code=4).stderr
    assert "--context_length=7" in prepare(output, "--shard_size=2", "--context_length=5", code=2).stderr


def test_captions_that_are_missing_or_another_encoders(prepare, image_folder, tiny_vae, tiny_clip, tmp_path):
    plain = tmp_path / "plain"
    call("prepare_latents", f"--source=imagefolder:{image_folder}", f"--vae={tiny_vae.folder}", "--image_size=16",
         "--batch_size=8", f"--output={plain}")  # fmt: skip
    done = run("main.py", *TINY, "--config.data.name=latents", f"--config.data.path={plain}",
               "--config.data.image_size=8", f"--workdir={tmp_path / 'w'}", code=2)  # fmt: skip
    assert "holds latents without captions" in done.stderr
    refused = call("prepare_latents", f"--source=imagefolder:{image_folder}", f"--text_encoder={tiny_clip}",
                   f"--output={tmp_path / 'no'}", code=2)  # fmt: skip
    assert "has no captions" in refused.stderr
    output = tmp_path / "latents"
    prepare(output)
    values = json.loads((output / "captions.json").read_text())
    values["encoder"]["sha256"] = "0" * 64
    (output / "captions.json").write_text(json.dumps(values))
    with pytest.raises(Exception, match="has other weights"):
        latents.text_encoder(data(output))


@pytest.mark.slow
def test_from_cocos_files_to_a_fid(prepare, coco_folder, tmp_path):
    """Trained in one go, and killed and resumed, to the same bits; previews, samples and FID of prompts."""
    output = tmp_path / "latents"
    prepare(output)
    flags = (*TINY, "--config.data.name=latents", f"--config.data.path={output}", "--config.data.image_size=8",
             "--config.data.context_length=7", "--config.data.context_width=12")  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run("main.py", *flags, "--config.sample_every=6", f"--workdir={whole}")
    flags = (*flags, "--config.sample_every=0", "--config.checkpoint_every=1", f"--workdir={parts}")
    kill_when(start("main.py", *flags), (parts / "checkpoints" / "2").exists)
    resumed = run("main.py", *flags, "--config.data.workers=1")
    assert "resuming" in resumed.stdout
    jax.tree.map(np.testing.assert_array_equal, final_state(parts), final_state(whole))
    assert (whole / "samples" / "step_0000006.png").exists()

    prompts = tmp_path / "captions.txt"
    prompts.write_text("a cat\na dog\n")
    samples = tmp_path / "samples.npz"
    run("tools/sample.py", f"--workdir={whole}", f"--prompts={prompts}", "--num_samples=3", f"--output={samples}")
    arrays = np.load(samples)
    assert arrays["arr_0"].shape == (3, 16, 16, 3)
    assert arrays["prompts"].tolist() == ["a cat", "a dog"]
    np.testing.assert_array_equal(arrays["arr_1"], [0, 1, 0])
    squares = tmp_path / "squares"
    squares.mkdir()
    for item in open_captions(f"coco:{coco_folder}:tiny2014").items(0, 5):
        square_crop(read_image(item.content), 16).save(squares / item.content.name)
    prompts = f"coco:{coco_folder}:tiny2014"
    done = run("tools/fid.py", f"--workdir={whole}", f"--prompts={prompts}", "--num_samples=4",
               f"--reference={squares}", "--extractor=inception_random", "--resize=pytorch",
               "--metrics=fid")  # fmt: skip
    result = json.loads(done.stdout)
    assert result["extractor"].endswith("pytorch_resize")
    assert np.isfinite(result["fid"])
    assert result["prompts"] == prompts


@pytest.mark.slow
def test_a_run_on_token_ids(prepare, tmp_path):
    """In two parts the same bits; the losses of stored embeddings but for their half precision."""
    losses = {}
    for form in ("embeddings", "ids"):
        prepare(tmp_path / form, f"--captions={form}")
        flags = (*TINY, "--config.data.name=latents", f"--config.data.path={tmp_path / form}", "--config.log_every=1",
                 "--config.data.image_size=8", "--config.data.context_length=7", "--config.data.context_width=12",
                 f"--config.data.captions={form}", "--config.sample_every=0")  # fmt: skip
        run("main.py", *flags, f"--workdir={tmp_path / f'run_{form}'}")
        lines = (tmp_path / f"run_{form}" / "metrics.jsonl").read_text().splitlines()
        losses[form] = [json.loads(line)["loss"] for line in lines]
    np.testing.assert_allclose(losses["ids"], losses["embeddings"], rtol=1e-3)
    run("main.py", *flags, "--config.steps=3", f"--workdir={tmp_path / 'parts'}")
    run("main.py", *flags, f"--workdir={tmp_path / 'parts'}")
    jax.tree.map(np.testing.assert_array_equal, final_state(tmp_path / "parts"), final_state(tmp_path / "run_ids"))


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The workdir of a finished tiny run of the demo. Read only."""
    with made_once(tmp_path_factory, "tiny_captions_run") as (workdir, to_do):
        if to_do:
            run("main.py", *DEMO, f"--workdir={workdir}")
    return workdir


def test_prompts_are_drawn_in_turn(demo, tmp_path):
    """Sample i depends on the seed, i and its prompt alone; prompts make a difference."""

    def sample(*prompts):
        output = tmp_path / f"{len(list(tmp_path.iterdir()))}.npz"
        flags = [f"--prompt={prompt}" for prompt in prompts]
        call("sample", f"--workdir={demo}", *flags, "--num_samples=4", "--guidance_scale=50", "--batch_size=3",
             f"--output={output}")  # fmt: skip
        return np.load(output)["arr_0"].astype(int)

    both, one = sample("a three", "one, then four"), sample("a three")
    assert np.abs(both[[0, 2]] - one[[0, 2]]).max() <= 1
    assert np.abs(both[[1, 3]] - one[[1, 3]]).reshape(2, -1).max(axis=1).min() > 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "give --prompt="),
        (("--prompt=a", "--prompts=seen"), "one of the two"),
        (("--labels=3",), "told captions"),
        (("--prompt= ",), "--prompt is blank"),
        (("--prompts=absent.txt",), "no file of captions, one a line, nor a list"),
    ],
)
def test_wrong_prompts(demo, tmp_path, flags, message):
    done = call("sample", f"--workdir={demo}", "--num_samples=2", f"--output={tmp_path / 's.npz'}", *flags, code=2)
    assert message in done.stderr
    assert not (tmp_path / "s.npz").exists()


def test_files_of_prompts_are_checked(demo, tmp_path):
    for content, message in ((b"", "is empty"), (b"a\n\nb\n", "line 2 is blank"), (b"\xff", "is not UTF-8")):
        file = tmp_path / "prompts.txt"
        file.write_bytes(content)
        done = call("sample", f"--workdir={demo}", f"--prompts={file}", f"--output={tmp_path / 's.npz'}", code=2)
        assert message in done.stderr


def test_a_run_with_labels_takes_no_prompts(tiny_run, tmp_path):
    done = call("sample", f"--workdir={tiny_run}", "--prompt=a", f"--output={tmp_path / 's.npz'}", code=2)
    assert "takes --labels" in done.stderr


def test_out_under_repas_names_and_in_again(demo, tmp_path):
    """The weights of a run as a state dict of REPA's class with SRA's head, and as a run again, bit for bit."""
    file, again = tmp_path / "ema.safetensors", tmp_path / "again"
    done = call("convert_checkpoint", f"--workdir={demo}", "--export=ema", f"--output={file}")
    assert "with SRA's head: REPA's MMDiT" in done.stdout
    original = TrainedModel(demo)
    tensors, shape = load_file(file), original.networks.shape
    assert {name: tensor.shape for name, tensor in tensors.items()} == mmdit_shapes(**sizes_of(shape), head=True)
    done = call("convert_checkpoint", f"--checkpoint={file}", f"--workdir={again}", *DEMO)
    assert "mmdit (its joint_blocks), 3 blocks, width 32, 4 heads" in done.stdout
    assert "captions of width 64, with the head of sra" in done.stdout
    jax.tree.map(np.testing.assert_array_equal, TrainedModel(again).params, original.params)
    refused = call("convert_checkpoint", f"--workdir={demo}", "--export=ema", "--family=sit",
                   f"--output={tmp_path / 'x.safetensors'}", code=2)  # fmt: skip
    assert "which is an MMDiT" in refused.stderr


def sizes_of(shape):
    return {"input_size": shape.input_size, "channels": shape.channels, "patch": shape.patch, "depth": shape.depth,
            "width": shape.width, "context": shape.context_width}  # fmt: skip


SMALL_REPA = {"input_size": 8, "channels": 4, "patch": 2, "depth": 3, "width": 64, "context": 12}


def test_repas_checkpoints_come_in(tmp_path):
    """Without --config: the recipe of COCO at the file's sizes, heads of 32 channels; projectors are left out."""
    tensors = random_mmdit(0, **SMALL_REPA, head=False)
    projector = {"projectors.0.0.weight": np.zeros((8, 64), np.float32)}
    save_file(tensors | projector, tmp_path / "repa.safetensors")
    workdir = tmp_path / "run"
    done = call("convert_checkpoint", f"--checkpoint={tmp_path / 'repa.safetensors'}", f"--workdir={workdir}")
    assert "left out: 1 tensors of training only, such as projectors.0.0.weight" in done.stdout
    model = TrainedModel(workdir)
    config, shape = model.config, model.networks.shape
    assert (config.name, config.method.name, config.alignment.enabled) == ("t2i_3x64_p2", "none", False)
    assert (sizes_of(shape), shape.heads, shape.context_length) == (SMALL_REPA, 2, 77)
    for name, tensor in interop.pytorch_from_params(model.params, 4, 4).items():
        np.testing.assert_array_equal(tensor, tensors[name], err_msg=name)


@pytest.mark.parametrize(
    ("change", "flags", "message"),
    [
        (lambda t: t.pop("joint_blocks.1.x_block.mlp.fc1.bias"), (), "missing: joint_blocks.1.x_block.mlp.fc1.bias"),
        (lambda t: t.pop("context_embedder.weight"), (), "no tensor context_embedder.weight, so it is no MMDiT"),
        (lambda t: t.update(pos_embed=t["pos_embed"] + 1), (), "pos_embed of params is not"),
        (lambda t: t.update({"register": np.zeros(3, np.float32)}), (), "unknown: register"),
        (lambda t: None, ("--family=sit",), "--family=sit does not fit"),
        (lambda t: None, ("--method=dts_as",), "has SRA's head or none"),
        (lambda t: None, ("--heads=5",), "--heads=5 does not divide the width 64"),
        (lambda t: None, ("--config=configs/digits_captions.py",), "model.depth: 5 in the config, 3 in the file"),
        (lambda t: None, ("--config=configs/digits.py",), "those of model.name='mmdit'"),
    ],
)
def test_bad_checkpoints_leave_nothing_behind(tmp_path, change, flags, message):
    tensors = random_mmdit(0, **SMALL_REPA, head=True)
    change(tensors)
    save_file(tensors, tmp_path / "weights.safetensors")
    workdir = tmp_path / "run"
    done = call("convert_checkpoint", f"--checkpoint={tmp_path / 'weights.safetensors'}", f"--workdir={workdir}",
                *flags, code=2)  # fmt: skip
    assert message in done.stderr
    assert not workdir.exists()


def test_tokens_of_a_run_with_captions(demo, tmp_path):
    output = tmp_path / "p.png"
    call("pca", f"--workdir={demo}", "--blocks=1,3", "--levels=0.5", "--condition=true", f"--output={output}")
    assert output.exists()
    done = call("linear_probe", f"--workdir={demo}", f"--output={tmp_path / 'probe'}", code=2)
    assert "predicts labels" in done.stderr


def test_a_judge_says_how_many_samples_are_right(demo, tmp_path):
    """Of an untrained run next to none, and how good the judge is; the samples can be kept."""
    samples = tmp_path / "samples.npz"
    for kind in ("seen", "held_out"):
        done = call("fid", f"--workdir={demo}", f"--prompts={kind}", "--num_samples=12", "--sampling_batch_size=12",
                    f"--save_samples={samples}")  # fmt: skip
        result = json.loads(done.stdout)
        assert result["prompts"] == kind
        assert result["judged_right"] <= 1 / 6
        assert result["judge_accuracy"] >= 0.97
        assert np.load(samples)["arr_0"].shape == (12, 16, 16, 1)
        samples.unlink()


def test_the_judge_takes_no_reference(demo):
    done = call("fid", f"--workdir={demo}", "--prompts=held_out", "--reference=dataset", code=2)
    assert "needs no --reference" in done.stderr
