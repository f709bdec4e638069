"""The cache folder: publication, checks, hostile and damaged files, ids, locking."""

from __future__ import annotations

import codecs
import json
import multiprocessing
import operator
import os
import pickle
import subprocess
import sys
import threading
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest

from musetalk.errors import CacheError, CacheMissingError, InputError, OutputError
from musetalk.files import file_sha256
from musetalk.templates.store import TemplateStore, check_template_id
from musetalk.templates.template import Template
from tests.conftest import make_template


def publish(store: TemplateStore, template_id: str = "anna (2)", n_frames: int = 2) -> dict:
    template = make_template(n_frames)
    metadata = {"template_id": template_id, "version": "2.0", "engine": "lite", "frame_count": len(template)}
    with store.lock(template_id):
        return dict(store.publish(template_id, template, metadata, b"jpeg"))


def stray_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.endswith(".tmp"))


def test_published_template_loads_equal_and_shares_frames(tmp_path):
    store = TemplateStore(tmp_path / "缓存 dir")
    publish(store)
    template, metadata = store.load("anna (2)")
    expected = make_template(2)
    for name in ("frames", "masks", "latents"):
        for got, want in zip(getattr(template, name), getattr(expected, name), strict=True):
            np.testing.assert_array_equal(got, want)
    assert template.bboxes == expected.bboxes and template.crop_boxes == expected.crop_boxes
    assert template.frames[0] is template.frames[3]
    assert metadata["pkl_sha256"] == file_sha256(store.pickle_path("anna (2)"))


def test_pickle_opens_without_the_package(tmp_path):
    store = TemplateStore(tmp_path)
    publish(store)
    code = (
        "import pickle, sys; data = pickle.load(open(sys.argv[1], 'rb'));"
        "print(sorted(data), type(data['coord_list_cycle'][0]))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code, str(store.pickle_path("anna (2)"))],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert "mask_coords_list_cycle" in shown.stdout and "tuple" in shown.stdout


def test_file_is_hardly_larger_than_its_unique_frames(tmp_path):
    store = TemplateStore(tmp_path)
    template = make_template(20, size=(640, 360))
    with store.lock("clip"):
        metadata = store.publish("clip", template, {"template_id": "clip"})
    unique = sum(template.frames[i].nbytes + template.masks[i].nbytes for i in set(template.unique))
    assert metadata["pkl_size"] == store.size("clip") < unique + 64_000


def test_frames_that_share_most_bytes_are_stored_as_differences(tmp_path):
    store = TemplateStore(tmp_path)
    still = make_template(1, size=(640, 360))
    frames = [still.frames[0].copy() for _ in range(20)]
    for i, frame in enumerate(frames):
        frame[100:200, 100 + i : 200 + i] += 3
    template = Template.from_frames(
        frames, still.bboxes[:1] * 20, still.latents[:1] * 20, still.masks[:1] * 20, still.crop_boxes[:1] * 20
    )
    with store.lock("alive"):
        size = store.publish("alive", template, {"template_id": "alive"})["pkl_size"]
    assert size < 3 * frames[0].nbytes
    with store.pickle_path("alive").open("rb") as stream:
        plain = pickle.load(stream)["frame_list_cycle"]
    for loaded in (store.load("alive")[0].frames, plain):
        for got, want in zip(loaded, template.frames, strict=True):
            np.testing.assert_array_equal(got, want)
        assert loaded[19] is loaded[20]


def test_a_pickle_is_hashed_only_when_somebody_may_have_written_to_it(tmp_path, monkeypatch):
    store, hashed = TemplateStore(tmp_path), []
    publish(store)
    pickle_path, metadata_path = store.pickle_path("anna (2)"), store.metadata_path("anna (2)")
    monkeypatch.setattr(
        "musetalk.templates.store.file_sha256", lambda path: hashed.append(path) or file_sha256(path)
    )
    written = pickle_path.stat().st_mtime_ns
    os.utime(metadata_path, ns=(written, written + 10**9))
    assert store.check("anna (2)").valid and hashed == []
    os.utime(metadata_path, ns=(written, written))
    assert store.check("anna (2)").valid and hashed == [pickle_path]
    os.utime(metadata_path, ns=(written, written + 10**9))
    _flip(pickle_path, 1000)
    os.utime(pickle_path, ns=(written, written + 1))
    assert not store.check("anna (2)").valid and len(hashed) > 1


def test_missing_template_has_the_documented_message(tmp_path):
    with pytest.raises(CacheMissingError) as caught:
        TemplateStore(tmp_path).load("xiaoha")
    assert caught.value.message == "❌ 模板缓存不存在: xiaoha"
    assert caught.value.hint.startswith("💡 请先运行预处理创建缓存")
    assert caught.value.exit_code == 6


def _flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda pkl, meta: _flip(pkl, pkl.stat().st_size // 2),
        lambda pkl, meta: pkl.write_bytes(pkl.read_bytes()[:-100]),
        lambda pkl, meta: pkl.write_bytes(b""),
        lambda pkl, meta: pkl.unlink(),
        lambda pkl, meta: meta.write_bytes(meta.read_bytes()[:40]),
        lambda pkl, meta: meta.write_text("[]"),
        lambda pkl, meta: meta.write_text('{"template_id": "other"}'),
        lambda pkl, meta: meta.write_bytes(b"\xff\xfe"),
        lambda pkl, meta: meta.write_text(
            json.dumps({**json.loads(meta.read_text("utf-8")), "schema_version": 99})
        ),
        lambda pkl, meta: meta.write_text('{"template_id": "anna (2)", "schema_version": "x"}'),
    ],
)
def test_damage_is_seen_by_check_and_load(tmp_path, damage):
    store = TemplateStore(tmp_path)
    publish(store)
    damage(store.pickle_path("anna (2)"), store.metadata_path("anna (2)"))
    check = store.check("anna (2)")
    assert check.exists and not check.valid and check.hint
    with pytest.raises(CacheError):
        store.load("anna (2)")


class _Payload:
    def __init__(self, module_function, *arguments):
        self.call = module_function, arguments

    def __reduce__(self):
        return self.call


ENDLESS: list = []
ENDLESS.append(ENDLESS)


@pytest.mark.parametrize(
    "payload",
    [
        _Payload(os.system, "echo hostile > hostile.txt"),
        _Payload(eval, "open('hostile.txt','w')"),
        _Payload(getattr, "text", "__class__"),
        _Payload(np.save, "hostile.txt", 1),
        _Payload(np.dtype, "O"),
        _Payload(np.ndarray, (10**14,), "u1"),
        _Payload(subprocess.Popen, ["touch", "hostile.txt"]),
        _Payload(zlib.decompress, zlib.compress(bytes(300_000_000))),
        _Payload(zlib.decompress, zlib.compress(bytes(1000))[:-5]),
        _Payload(operator.add, 1, 2),
        _Payload(operator.add, np.zeros((1 << 20, 1), np.uint8), np.zeros((1, 1 << 20), np.uint8)),
        ENDLESS,
        np.array([_Payload(os.system, "echo hostile > hostile.txt")], dtype=object),
        np.zeros(3, dtype=[("a", "O")]),
    ],
)
def test_hostile_pickle_is_refused_and_not_executed(tmp_path, monkeypatch, payload):
    monkeypatch.chdir(tmp_path)
    store = TemplateStore(tmp_path)
    publish(store)
    data = {**make_template(1).to_dict(), "input_latent_list_cycle": [payload, payload]}
    path = store.pickle_path("anna (2)")
    path.write_bytes(pickle.dumps(data, protocol=4))
    metadata = json.loads(store.metadata_path("anna (2)").read_text("utf-8"))
    metadata.update(pkl_sha256=file_sha256(path), pkl_size=path.stat().st_size)
    store.metadata_path("anna (2)").write_text(json.dumps(metadata))
    with pytest.raises(CacheError):
        store.load("anna (2)")
    assert not Path("hostile.txt").exists()


BIG = 1 << 30  # bytes or memo entries, that a few bytes ask for
FRAME = np.zeros((1000, 1000, 3), np.uint8)
DEFLATED = zlib.compress(bytes(3_000_000))
TEXT = "\x00" * 3_000_000


class _Again:
    """An array of the same bytes as all others of its kind."""

    content = bytes(3_000_000)

    def __reduce__(self):
        rebuild, arguments, state = np.zeros(3_000_000, np.uint8).__reduce__()
        return rebuild, arguments, (*state[:-1], self.content)


GREEDY = {
    "bytearray of a number": pickle.dumps(_Payload(bytearray, BIG), protocol=4),
    "bytearray that is cut": b"\x80\x05\x96" + BIG.to_bytes(8, "little") + b"x.",
    "bytes that are cut": b"\x80\x04\x8e" + BIG.to_bytes(8, "little") + b"x.",
    "text that is cut": b"\x80\x04\x8d" + BIG.to_bytes(8, "little") + b"x.",
    "frame that is cut": b"\x80\x04\x95" + BIG.to_bytes(8, "little") + b"N.",
    "memo with a hole": b"\x80\x04Nr\xff\xff\xff\x0f.",
    "memo with a hole, as text": b"Np268435455\n.",
    **{
        f"{name} often": pickle.dumps([make() for _ in range(150)], protocol=protocol)
        for name, protocol, make in (
            ("one blob inflated", 4, lambda: _Payload(zlib.decompress, DEFLATED)),
            ("one frame added", 4, lambda: _Payload(operator.add, FRAME, FRAME)),
            ("one text encoded", 2, lambda: _Payload(codecs.encode, TEXT, "latin1")),
            ("one array restored", 4, _Again),
        )
    },
}


@pytest.mark.parametrize("name", GREEDY)
def test_a_pickle_takes_no_more_memory_than_it_could_hold(tmp_path, name):
    (tmp_path / "t_preprocessed.pkl").write_bytes(GREEDY[name])
    size = len(GREEDY[name])
    (tmp_path / "t_metadata.json").write_text(json.dumps({"template_id": "t", "version": "1.0"}))
    tracemalloc.start()
    try:
        with pytest.raises(CacheError):
            TemplateStore(tmp_path).load("t")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20_000_000 + 12 * size


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_cache_of_the_original_system_loads_with_a_warning(tmp_path, caplog, protocol):
    store = TemplateStore(tmp_path)
    data = make_template(2).to_dict()
    data["coord_list_cycle"] = [tuple(np.int64(v) for v in box) for box in data["coord_list_cycle"]]
    data["mask_list_cycle"] = [np.asfortranarray(mask) for mask in data["mask_list_cycle"]]
    store.pickle_path("old").write_bytes(pickle.dumps(data, protocol=protocol))
    store.metadata_path("old").write_text(json.dumps({"template_id": "old", "version": "1.0"}))
    template, _ = store.load("old")
    assert ["original system" in record.message for record in caplog.records] == [True]
    np.testing.assert_array_equal(template.masks[1], make_template(2).masks[1])
    assert template.bboxes == make_template(2).bboxes
    check = store.check("old")
    assert check.valid and "legacy" in check.message


@pytest.mark.parametrize("good", ["xiaoha", "小哈_3f2a", "anna (2)", "a.b-c[1]", "हिन्दी", "é" * 60])
def test_ids_people_choose_are_accepted(good):
    assert check_template_id(good) == good


@pytest.mark.parametrize(
    "bad",
    [
        *("", " ", "../x", "a/b", "a\\b", ".hidden", "CON", "nul.txt", "com1", "x" * 121, "模" * 100, "a:b"),
        *("a\0b", "a\nb", "trailing.", "a*", "<a>", "~", "x" * 300),
    ],
)
def test_ids_that_are_no_file_name_are_refused(bad):
    with pytest.raises(InputError) as caught:
        check_template_id(bad)
    assert caught.value.exit_code == 3 and len(caught.value.message) < 150


def test_folder_that_cannot_be_made_is_an_output_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError), TemplateStore(tmp_path / "file" / "cache").lock("x"):
        pass


def _publish_again_and_again(folder: str, started, stop) -> None:
    store = TemplateStore(folder)
    n_frames = 0
    while not stop.is_set():
        publish(store, "busy", 1 + n_frames % 3)
        n_frames += 1
        started.set()


def test_readers_beside_writers_in_other_processes_see_whole_templates(tmp_path):
    context = multiprocessing.get_context("spawn")
    started, stop = context.Event(), context.Event()
    writers = [
        context.Process(target=_publish_again_and_again, args=(str(tmp_path), started, stop))
        for _ in range(2)
    ]
    for writer in writers:
        writer.start()
    try:
        assert started.wait(60)
        store = TemplateStore(tmp_path)
        seen = {len(store.load("busy")[0]) for _ in range(60)}
        assert all(store.check("busy").valid for _ in range(20))
    finally:
        stop.set()
        for writer in writers:
            writer.join(60)
    assert seen <= {2, 4, 6} and not stray_files(tmp_path)


def test_killed_writer_leaves_no_half_template(tmp_path):
    code = (
        "import sys, os\nfrom musetalk import files\n"
        "from tests.templates.test_store import publish, TemplateStore\n"
        "original = files.replace_file\n"
        "def dies(source, target):\n"
        "    if target.name.endswith(sys.argv[2]): os._exit(9)\n"
        "    original(source, target)\n"
        "files.replace_file = dies\npublish(TemplateStore(sys.argv[1]), 'x')\n"
    )
    store = TemplateStore(tmp_path)
    for stage in ("_preprocessed.pkl", "_preview.jpg", "_metadata.json"):
        publish(store, "x")
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path), stage], check=False)
        assert done.returncode == 9
        if stage == "_preview.jpg":  # the picture comes first, the old pair is still there
            assert store.check("x").valid
        else:
            assert not store.check("x").valid
            with pytest.raises(CacheError):
                store.load("x")
        publish(store, "x")
        assert store.check("x").valid and not stray_files(tmp_path)


def test_lock_excludes_other_threads(tmp_path):
    store, order = TemplateStore(tmp_path), []
    entered = threading.Event()

    def second():
        entered.set()
        with TemplateStore(tmp_path).lock("x"):
            order.append("second")

    with store.lock("x"):
        thread = threading.Thread(target=second)
        thread.start()
        entered.wait()
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_check_tells_of_a_writer_instead_of_waiting_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr("musetalk.templates.store.CHECK_TIMEOUT", 0.1)
    with TemplateStore(tmp_path).lock("x"):
        check = TemplateStore(tmp_path).check("x")
    assert not check.exists and not check.valid and "another process" in check.message


def test_reader_of_metadata_waits_for_the_writer(tmp_path):
    writer, reader, seen = TemplateStore(tmp_path), TemplateStore(tmp_path), []
    with writer.lock("x"):
        thread = threading.Thread(target=lambda: seen.append(reader.read_metadata("x")))
        thread.start()
        writer.publish("x", make_template(1), {"template_id": "x"})
    thread.join()
    assert seen[0]["template_id"] == "x"


def test_files_that_are_no_templates_are_not_listed(tmp_path):
    store = TemplateStore(tmp_path)
    publish(store, "b")
    for name in ("a+b_metadata.json", "_metadata.json", ".b_metadata.json"):
        (tmp_path / name).write_text("{}")
    assert store.template_ids() == ["b"] and store.info()["template_count"] == 1


def test_list_info_export_and_clean(tmp_path):
    store = TemplateStore(tmp_path / "cache")
    assert store.template_ids() == [] and store.info()["template_count"] == 0
    publish(store, "b")
    publish(store, "小哈")
    assert store.template_ids() == ["b", "小哈"] and store.info()["templates"] == ["b", "小哈"]
    store.export("b", tmp_path / "copy" / "state.pkl")
    assert file_sha256(tmp_path / "copy" / "state.pkl") == file_sha256(store.pickle_path("b"))
    assert store.clean("b") == 3 and store.template_ids() == ["小哈"] and not store.check("b").exists


def test_clean_removes_a_template_that_lies_in_a_folder_of_its_own(tmp_path):
    store = TemplateStore(tmp_path / "cache")
    publish(store, "b")
    nested = store.cache_dir / "b"
    nested.mkdir()
    for path in list(store.cache_dir.glob("b_*")):
        path.rename(nested / path.name)
    assert store.check("b").exists and store.clean("b") == 3
    assert not store.check("b").exists and not list(nested.iterdir())
