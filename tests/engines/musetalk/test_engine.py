"""The MuseTalk engine against numbers of the reference implementation, and against bad checkpoints."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from musetalk import checkpoints, device
from musetalk.config import REPOSITORY, EngineConfig
from musetalk.errors import CacheError, DeviceError, WeightsError
from musetalk.templates.template import Template
from tests.conftest import make_template
from tests.engines.conftest import NEEDS_FULL, model_paths

torch = pytest.importorskip("torch", reason=NEEDS_FULL)
pytest.importorskip("diffusers", reason=NEEDS_FULL)
pytest.importorskip("transformers", reason=NEEDS_FULL)

from musetalk.engines.base import FaceFrame, MixingEngine, hear_all  # noqa: E402
from musetalk.engines.choice import create_engine  # noqa: E402
from musetalk.engines.musetalk import networks  # noqa: E402
from musetalk.engines.musetalk.architectures.blocks import Upsampler  # noqa: E402
from musetalk.engines.musetalk.engine import (  # noqa: E402
    BatchLimit,
    MuseTalkEngine,
    MuseTalkGenerator,
    running_dtype,
    sinusoidal_positions,
)
from musetalk.weights import files as weight_files  # noqa: E402

DATA = REPOSITORY / "tests" / "data"
CPU_INFO = Path("/proc/cpuinfo")
FACE = (40, 36, 150, 192)
FPS_25 = Fraction(25)
UNET_START = [-0.0080875, -0.0629875, -0.0111438]  # first values of the goldens' weights
VAE_START = [-0.1350839, -0.0051757, 0.1869312]
WHISPER_START = [0.0003193, 0.0199689, -0.0330225]


def make_engine(folder: Path, **settings: Any) -> MuseTalkEngine:
    config = EngineConfig(engine="musetalk", models=model_paths(folder), fp16=False, **settings)
    engine = create_engine("musetalk", config, "cpu")
    assert isinstance(engine, MuseTalkEngine)
    return engine


@pytest.fixture(scope="module")
def engine(tiny_models: Path) -> MuseTalkEngine:
    return make_engine(tiny_models)


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(DATA / "generator" / "generator.npz") as file:
        return dict(file)


def template_of(latents: list[np.ndarray]) -> Template:
    base = make_template(len(latents))
    n = len(latents)
    return Template.from_frames(
        base.frames[:n], base.bboxes[:n], latents, base.masks[:n], base.crop_boxes[:n]
    )


@pytest.fixture(scope="module")
def generator(engine: MuseTalkEngine, golden: dict[str, np.ndarray]) -> MuseTalkGenerator:
    latents = [np.concatenate([golden[f"masked_mean{i}"], golden[f"ref_mean{i}"]], axis=1) for i in range(3)]
    return engine.open(template_of(latents))


def whole(crop: np.ndarray) -> FaceFrame:
    return FaceFrame(crop, (0, 0, 256, 256), np.zeros((68, 2), np.float32), None)


def test_seeded_weights_are_those_of_the_goldens(tiny_models: Path) -> None:
    files = weight_files.find_files(model_paths(tiny_models))
    unet = checkpoints.read_tensors(files.unet_weights)["conv_in.weight"].flatten()[:3]
    vae = checkpoints.read_tensors(files.vae_weights)["encoder.conv_in.weight"].flatten()[:3]
    whisper = checkpoints.read_tensors(files.whisper_weights)["encoder.conv1.weight"].flatten()[:3]
    torch.testing.assert_close(unet, torch.tensor(UNET_START), atol=1e-6, rtol=0)
    torch.testing.assert_close(vae, torch.tensor(VAE_START), atol=1e-6, rtol=0)
    torch.testing.assert_close(whisper, torch.tensor(WHISPER_START), atol=1e-6, rtol=0)


def test_latents_equal_the_references_posterior_means(
    engine: MuseTalkEngine, golden: dict[str, np.ndarray]
) -> None:
    latents = list(engine.encode(whole(golden[f"crop{i}"]) for i in range(3)))
    for i, latent in enumerate(latents):
        assert latent.shape == (1, 8, 32, 32) and latent.dtype == np.float32
        assert latent.flags.c_contiguous
        np.testing.assert_allclose(latent[:, :4], golden[f"masked_mean{i}"], atol=1e-4)
        np.testing.assert_allclose(latent[:, 4:], golden[f"ref_mean{i}"], atol=1e-4)


def test_encoding_crops_the_box_and_resizes_by_lanczos(engine: MuseTalkEngine) -> None:
    import cv2

    frame = np.random.RandomState(3).randint(0, 256, (240, 200, 3), np.uint8)
    x1, y1, x2, y2 = FACE
    resized = cv2.resize(frame[y1:y2, x1:x2], (256, 256), interpolation=cv2.INTER_LANCZOS4)
    boxed = FaceFrame(frame, FACE, np.zeros((68, 2), np.float32), None)
    (found,), (expected,) = engine.encode([boxed]), engine.encode([whole(resized)])
    np.testing.assert_array_equal(found, expected)


def test_the_unet_step_equals_the_references(engine: MuseTalkEngine, golden: dict[str, np.ndarray]) -> None:
    latents = np.concatenate(
        [np.concatenate([golden[f"masked_mean{i}"], golden[f"ref_mean{i}"]], axis=1) for i in range(3)]
    )
    prompts = golden["audio_prompts"] + sinusoidal_positions(50, 384)
    engine.open(template_of([latents[:1]]))
    with torch.inference_mode():
        found = engine.runtime.predict(torch.from_numpy(latents), prompts)
    np.testing.assert_allclose(found.numpy(), golden["pred_latents"], atol=1e-4)


def test_frames_equal_the_references(generator: MuseTalkGenerator, golden: dict[str, np.ndarray]) -> None:
    frames = np.stack(generator.generate(golden["audio_prompts"], [0, 1, 2]))
    assert frames.dtype == np.uint8
    difference = np.abs(frames.astype(int) - golden["frames_bgr"])
    assert (difference <= 1).mean() >= 0.999


def test_any_batch_gives_the_frames_of_batch_1(
    generator: MuseTalkGenerator, golden: dict[str, np.ndarray]
) -> None:
    prompts = golden["audio_prompts"][[0, 1, 2, 1, 0]]
    indices = [0, 1, 2, 3, 5]
    single = [generator.generate(prompts[i : i + 1], indices[i : i + 1])[0] for i in range(5)]
    for parts in ([slice(0, 5)], [slice(0, 2), slice(2, 5)]):
        batched = [face for part in parts for face in generator.generate(prompts[part], indices[part])]
        difference = np.abs(np.stack(batched).astype(int) - np.stack(single))
        assert (difference <= 1).mean() >= 0.999


def exhausted(kind: str) -> Exception:
    if kind == "cuda":
        return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    if kind == "cpu":
        return RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")
    return MemoryError()


@pytest.mark.parametrize("kind", ["cuda", "cpu", "host"])
def test_out_of_memory_halves_the_batch_and_says_so_once(
    engine: MuseTalkEngine,
    golden: dict[str, np.ndarray],
    generator: MuseTalkGenerator,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kind: str,
) -> None:
    prompts = golden["audio_prompts"]
    expected = generator.generate(prompts, [0, 1, 2])
    latents = [np.concatenate([golden[f"masked_mean{i}"], golden[f"ref_mean{i}"]], axis=1) for i in range(3)]
    fresh = engine.open(template_of(latents))
    predict, seen = engine.runtime.predict, []

    def limited(latents: Any, prompts: Any) -> Any:
        seen.append(len(latents))
        if len(latents) > 1:
            raise exhausted(kind)
        return predict(latents, prompts)

    monkeypatch.setattr(engine.runtime, "predict", limited)
    with caplog.at_level(logging.WARNING):
        first = fresh.generate(prompts, [0, 1, 2])
        fresh.generate(prompts, [0, 1, 2])
    assert seen == [3, 1, 1, 1, 1, 1, 1]
    assert len(caplog.records) == 1
    difference = np.abs(np.stack(first).astype(int) - np.stack(expected))
    assert (difference <= 1).mean() >= 0.999


def test_faces_of_several_templates_are_made_in_one_batch(
    engine: MuseTalkEngine, golden: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = [np.concatenate([golden[f"masked_mean{i}"], golden[f"ref_mean{i}"]], axis=1) for i in range(3)]
    first, second = engine.open(template_of(latents[:2])), engine.open(template_of(latents[2:]))
    prompts, predict, batches = golden["audio_prompts"], engine.runtime.predict, []

    def counted(latents: Any, prompts: Any) -> Any:
        batches.append(len(latents))
        return predict(latents, prompts)

    alone = [first.generate(prompts[:2], [0, 1]), second.generate(prompts[2:], [0])]
    monkeypatch.setattr(engine.runtime, "predict", counted)
    assert isinstance(engine, MixingEngine)
    mixed = engine.generate_mixed([(first, prompts[:2], [0, 1]), (second, prompts[2:], [0])])
    assert batches == [3]
    assert [len(faces) for faces in mixed] == [2, 1]
    for faces, expected in zip(mixed, alone, strict=True):
        assert np.abs(np.stack(faces).astype(int) - np.stack(expected)).max() <= 1


def test_out_of_memory_at_batch_1_says_what_to_do() -> None:
    def work(_part: slice) -> list[int]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(DeviceError) as error:
        BatchLimit("cpu").run(work, 4)
    assert "减少batch_size或启用fp16" in error.value.hint
    assert error.value.exit_code == 5


def test_the_failed_batch_is_let_go_before_the_memory_is_given_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held: list[weakref.ref[Any]] = []
    freed: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(held[-1]() is None))

    def work(part: slice) -> list[int]:
        batch = torch.zeros(part.stop - part.start)
        held.append(weakref.ref(batch))
        if len(batch) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [part.start]

    assert BatchLimit("cuda:0").run(work, 4) == [0, 1, 2, 3]
    assert freed == [True, True]


def out_of_memory(*_: object, **__: object) -> Any:
    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


@pytest.mark.parametrize("stage", ["opening", "encoding a face", "encoding audio"])
def test_memory_that_is_missing_anywhere_is_a_device_error(
    tiny_models: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    engine = make_engine(tiny_models)
    template = template_of([np.zeros((1, 8, 32, 32), np.float32)])
    prompts = hear_all(engine.listen(FPS_25), [np.zeros(16_000, np.float32)])
    latents = engine.encode([whole(np.zeros((256, 256, 3), np.uint8))])
    stages: dict[str, Callable[[], object]] = {
        "opening": lambda: engine.open(template),
        "encoding a face": lambda: next(latents),
        "encoding audio": lambda: next(prompts),
    }
    monkeypatch.setattr(networks, "materialise", out_of_memory)
    with pytest.raises(DeviceError) as error:
        stages[stage]()
    assert error.value.exit_code == 5 and "减少batch_size或启用fp16" in error.value.hint


def test_a_card_that_torch_cannot_use_is_replaced_by_the_cpu(
    tiny_models: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(device, "_torchs_complaint", lambda _: "no kernel image is available")
    device.warn_of_missing.cache_clear()
    config = EngineConfig(engine="musetalk", device="cuda:0", models=model_paths(tiny_models))
    with caplog.at_level(logging.WARNING):
        assert create_engine("musetalk", config, "cuda:0").device == "cpu"
    assert [record.getMessage().count("未找到GPU，改用CPU") for record in caplog.records] == [1]
    with pytest.raises(DeviceError, match="no kernel image") as error:
        create_engine("musetalk", dataclasses.replace(config, strict_device=True), "cuda:0")
    assert error.value.exit_code == 5


def test_a_template_without_any_face_is_a_cache_error(engine: MuseTalkEngine) -> None:
    with pytest.raises(CacheError) as error:
        engine.open(make_template(2, faceless=(0, 1)))
    assert error.value.exit_code == 6


@pytest.mark.parametrize("region", ["on", "off"])
def test_compiling_reaches_what_a_frame_really_calls(
    tiny_models: Path, monkeypatch: pytest.MonkeyPatch, golden: dict[str, np.ndarray], region: Any
) -> None:
    compiled: list[str] = []
    called: list[str] = []

    def compile_(function: Callable[..., Any], *_: object, **__: object) -> Callable[..., Any]:
        name = getattr(function, "__qualname__", repr(function)).partition(".")[0]
        compiled.append(name)

        def run(*arguments: Any, **settings: Any) -> Any:
            called.append(name)
            return function(*arguments, **settings)

        return run

    latents = [np.concatenate([golden["masked_mean0"], golden["ref_mean0"]], axis=1)]
    expected = make_engine(tiny_models, vae_region=region).open(template_of(latents))
    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(MuseTalkEngine, "_compiles", True)
    engine = make_engine(tiny_models, vae_region=region, compile=True)
    generator, _again = engine.open(template_of(latents)), engine.open(template_of(latents))
    called.clear()
    found = generator.generate(golden["audio_prompts"][:1], [0])
    decoder = "decoder_of_cuts" if region == "on" else "Module"
    assert called == ["Module", decoder]
    assert compiled.count("Module") == (1 if region == "on" else 2)
    np.testing.assert_array_equal(found[0], expected.generate(golden["audio_prompts"][:1], [0])[0])


def test_other_failures_are_not_taken_for_memory() -> None:
    def work(_part: slice) -> list[int]:
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        BatchLimit("cpu").run(work, 4)


@pytest.mark.parametrize("size", [(4, 4), (5, 7)])
def test_folded_upsampling_is_the_doubling_and_the_convolution(size: tuple[int, int]) -> None:
    torch.manual_seed(3)
    block = torch.nn.Module()
    block.upsamplers = torch.nn.ModuleList([Upsampler(6)])
    image = torch.randn(2, 6, *size)
    with torch.inference_mode():
        expected = block.upsamplers[0](image)
        networks.fold_upsampling(block)
        assert not isinstance(block.upsamplers[0], Upsampler)
        torch.testing.assert_close(block.upsamplers[0](image), expected, atol=1e-5, rtol=0)


def test_a_released_network_is_read_again(tiny_models: Path) -> None:
    network = networks.open_vae(weight_files.find_files(model_paths(tiny_models)))
    first = network.load("cpu", "float32")
    assert network.load("cpu", "float32") is first
    expected = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    network.release()
    again = network.load("cpu", "float32")
    assert again is not first
    for name, tensor in again.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], atol=0, rtol=0)


def test_positions_follow_vaswani() -> None:
    code = sinusoidal_positions(50, 384)
    for position, channel in [(0, 0), (7, 10), (49, 383)]:
        angle = position / 10_000 ** ((channel // 2 * 2) / 384)
        expected = np.cos(angle) if channel % 2 else np.sin(angle)
        assert code[position, channel] == pytest.approx(expected, abs=1e-5)


def test_half_precision_is_taken_only_where_the_device_computes_in_it() -> None:
    assert running_dtype("cuda:0", half=True) == "float16"
    assert running_dtype("cpu", half=False) == "float32"


@pytest.mark.skipif(not CPU_INFO.exists(), reason="reads the processor's flags from /proc/cpuinfo")
def test_half_precision_on_a_cpu_is_what_its_flags_say() -> None:
    flags = set(re.search(r"^(?:flags|Features)\s*:(.*)$", CPU_INFO.read_text(), re.MULTILINE)[1].split())
    native = bool(flags & {"avx512_bf16", "amx_tile"})
    assert running_dtype("cpu", half=True) == ("bfloat16" if native else "float32")


def test_a_template_of_another_engine_is_refused(engine: MuseTalkEngine) -> None:
    with pytest.raises(CacheError):
        engine.open(make_template(2))


def test_the_fingerprint_names_version_and_vae(tiny_models: Path, tmp_path: Path) -> None:
    files = weight_files.find_files(model_paths(tiny_models))
    other = weight_files.MuseTalkFiles(**{**vars(files), "version": "v1"})
    assert weight_files.latents_fingerprint(files) != weight_files.latents_fingerprint(other)
    changed = tmp_path / "vae.safetensors"
    content = bytearray(files.vae_weights.read_bytes())
    content[len(content) // 2] ^= 1
    changed.write_bytes(content)
    retrained = weight_files.MuseTalkFiles(**{**vars(files), "vae_weights": changed})
    assert weight_files.latents_fingerprint(files) != weight_files.latents_fingerprint(retrained)


@pytest.fixture
def models(tiny_models: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return shutil.copytree(tiny_models, tmp_path / "models")


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_weights_of_another_version_name_the_keys_that_differ(models: Path) -> None:
    edit_json(models / "musetalkV15/musetalk.json", block_out_channels=[32, 32, 64])
    with pytest.raises(
        WeightsError, match=r"unet\.pth does not fit .*musetalk\.json.*shape .*\(.*instead of"
    ) as error:
        make_engine(models)
    assert "--version" in error.value.hint


def test_a_vae_of_another_width_is_refused(models: Path) -> None:
    edit_json(models / "sd-vae/config.json", block_out_channels=[32, 32, 32, 64])
    with pytest.raises(WeightsError, match="does not fit"):
        make_engine(models)


def test_a_vae_with_other_latents_is_refused(models: Path) -> None:
    from musetalk.tools.random_weights import SIZES, write_vae

    write_vae(models, {**SIZES["tiny"].vae, "latent_channels": 16}, seed=0)
    with pytest.raises(WeightsError, match="another VAE"):
        make_engine(models)


def test_missing_and_extra_keys_are_named(models: Path) -> None:
    path = models / "musetalkV15/unet.pth"
    state = torch.load(path)
    state["surplus.weight"] = state.pop("conv_in.weight")
    torch.save(state, path)
    with pytest.raises(WeightsError, match=r"missing conv_in\.weight; extra surplus\.weight"):
        make_engine(models)


@pytest.mark.parametrize("content", ["{", "[]", '{"block_out_channels": "wide"}'])
def test_a_broken_configuration_is_named(models: Path, content: str) -> None:
    (models / "musetalkV15/musetalk.json").write_text(content)
    with pytest.raises(WeightsError, match=r"musetalk\.json"):
        make_engine(models)


def test_a_whisper_of_another_width_is_refused(models: Path) -> None:
    from musetalk.tools.random_weights import SIZES, write_whisper

    write_whisper(models, {**SIZES["tiny"].whisper, "d_model": 96}, seed=0)
    engine = make_engine(models)
    with pytest.raises(WeightsError, match="another Whisper"):
        next(hear_all(engine.listen(FPS_25), [np.zeros(16_000, np.float32)]))


def test_the_official_files_older_key_names_load(
    models: Path, engine: MuseTalkEngine, golden: dict[str, np.ndarray]
) -> None:
    from safetensors.torch import load_file

    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    vae = load_file(models / "sd-vae/diffusion_pytorch_model.safetensors")
    for new, old in old_names.items():
        vae = {key.replace(f".{new}.", f".{old}."): tensor for key, tensor in vae.items()}
    assert any(".proj_attn." in key for key in vae)
    torch.save(vae, models / "sd-vae/diffusion_pytorch_model.bin")
    (models / "sd-vae/diffusion_pytorch_model.safetensors").unlink()
    whisper = load_file(models / "whisper/model.safetensors")
    torch.save(
        {f"model.{key}": tensor for key, tensor in whisper.items()}, models / "whisper/pytorch_model.bin"
    )
    (models / "whisper/model.safetensors").unlink()

    renamed = make_engine(models)
    crop = whole(golden["crop0"])
    np.testing.assert_array_equal(next(renamed.encode([crop])), next(engine.encode([crop])))
    tone = [np.sin(np.arange(8_000) / 20).astype(np.float32)]
    found, expected = (hear_all(e.listen(FPS_25), tone) for e in (renamed, engine))
    np.testing.assert_array_equal(next(found), next(expected))


LOADING = """
import re, sys, torch
from pathlib import Path
from musetalk.checkpoints import read_tensors
from musetalk.engines.musetalk.networks import Network
with torch.device("meta"):
    module = torch.nn.Sequential(*(torch.nn.Linear(2048, 2048, bias=False) for _ in range(20)))
torch.zeros(8, 8).to(torch.bfloat16)
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
before = peak()
Network(module, lambda: read_tensors(Path(sys.argv[1]))).load("cpu", "bfloat16")
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mapped pages are released on Linux only")
def test_loading_peaks_little_above_the_weights_in_their_running_precision(tmp_path: Path) -> None:
    state = {f"{i}.weight": torch.zeros(2048, 2048) for i in range(20)}
    torch.save(state, tmp_path / "net.pth")
    running = 20 * 2048 * 2048 * 2
    del state
    command = [sys.executable, "-c", LOADING, str(tmp_path / "net.pth")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=True)
    assert running * 0.9 <= int(done.stdout) <= running * 1.3


@pytest.mark.parametrize("batch_size", [1, 7, 32])
def test_the_command_renders_a_cache_of_the_original_system_as_it_did(
    tiny_models: Path, tmp_path: Path, batch_size: int
) -> None:
    cv2 = pytest.importorskip("cv2")
    cache = shutil.copytree(DATA / "e2e" / "template_cache", tmp_path / "cache 缓存")
    frames = tmp_path / "frames"
    command = [sys.executable, str(REPOSITORY / "integrated_musetalk_service.py"), "--inference"]
    command += ["--template_id", "legacy", "--audio_path", str(DATA / "e2e" / "audio.wav"), "--fps", "25"]
    command += ["--output_path", str(tmp_path / "out.mp4"), "--cache_dir", str(cache), "--device", "cpu"]
    command += ["--frames_dir", str(frames), "--engine", "musetalk", "--version", "v15", "--no_fp16"]
    command += [
        "--unet_config",
        str(tiny_models / "musetalkV15/musetalk.json"),
        "--batch_size",
        str(batch_size),
    ]
    command += ["--unet_model_path", str(tiny_models / "musetalkV15/unet.pth")]
    command += ["--vae_type", str(tiny_models / "sd-vae"), "--whisper_dir", str(tiny_models / "whisper")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr.decode()
    answer = json.loads(done.stdout)
    with np.load(DATA / "e2e" / "expected_frames.npz") as file:
        expected = file["frames_bgr"]
    assert (answer["engine"], answer["dtype"], answer["frames"]) == ("musetalk", "float32", len(expected))
    assert answer["vae_decoder"] == "full"
    found = np.stack([cv2.imread(str(path)) for path in sorted(frames.iterdir())])
    difference = np.abs(found.astype(int) - expected)
    assert (difference <= 1).mean() >= 0.999
