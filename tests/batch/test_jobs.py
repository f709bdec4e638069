"""Tables as people write them, and the jobs they become."""

from __future__ import annotations

import dataclasses
import json
from fractions import Fraction
from pathlib import Path

import pytest

from musetalk.batch.jobs import COLUMNS, Settings, make_jobs, read_rows
from musetalk.config import EncodingConfig, EngineConfig, PreprocessingConfig, parse_fps
from musetalk.errors import InputError

ROW = {"template": "小哈 (1)", "audio": "a.wav", "output": "o.mp4"}


def jobs_of(*rows: dict, defaults: Settings | None = None):
    return make_jobs([{**ROW, **row} for row in rows], defaults or Settings())


def one_job(**cells):
    (job,), refused = jobs_of(cells)
    assert not refused
    return job


def test_csv_of_spreadsheets_and_json_lines_say_the_same():
    comma = "\ufefftemplate,audio,output,crf\r\n小哈 (1),a.wav,o.mp4,20\r\n,,,\r\n"
    semicolon = comma.replace(",", ";")
    lines = '\n{"template": "小哈 (1)", "audio": "a.wav", "output": "o.mp4", "crf": 20}\n\n'
    read = [make_jobs(read_rows(text), Settings())[0] for text in (comma, semicolon, lines)]
    assert read[0] == read[1] == read[2] and len(read[0]) == 1
    assert read[0][0].settings.encoding.crf == 20


def test_quoted_cells_hold_commas_and_line_breaks():
    (row,) = read_rows('template,audio,output\n"a, b","c\nd.wav",o.mp4\n')
    assert row == {"template": "a, b", "audio": "c\nd.wav", "output": "o.mp4"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("template,audio,output,fsp,colour\nt,a,o,25,red\n", "fsp, colour"),
        ('{"template": "t", "audio": "a", "output": "o", "fsp": 25}', "fsp"),
        ("template,audio,output,device\nt,a,o,cpu\n", "device"),
        ("template,audio,output,threads\nt,a,o,1\n", "threads"),
        ("template,audio,output\n", "no rows"),
        ("", "no rows"),
        ("template,audio,output\nt,a,o,more\n", "line 2"),
        ('template,audio,output\nt,a,"o\n', "not CSV"),
        ('{"template": "t"}\n{"template"', "line 2"),
        ('{"template": "t"}\n[1]', "line 2"),
    ],
)
def test_a_table_that_cannot_be_meant_is_refused_whole(text, words):
    with pytest.raises(InputError, match=words):
        read_rows(text)


def test_every_setting_of_the_commands_is_a_column():
    fields = {
        f.name
        for kind in (PreprocessingConfig, EncodingConfig, EngineConfig)
        for f in dataclasses.fields(kind)
    }
    assert fields - {"device", "strict_device", "models", "threads"} <= COLUMNS.keys()
    assert {"fps", "articulation", "frames_dir", "version", "whisper_dir"} <= COLUMNS.keys()


def test_cells_become_settings_of_their_kinds():
    job = one_job(
        template="./face.png",
        **{"bbox_shift": " -3 ", "seconds": "2.5", "idle_motion": "Yes", "fp16": "0", "batch_size": "4"},
        **{"fps": "29.97", "articulation": "1.2", "encoder": "libx265", "whisper_dir": "w", "engine": "lite"},
    )
    settings = job.settings
    assert settings.template == PreprocessingConfig(bbox_shift=-3, seconds=2.5, idle_motion=True)
    assert (settings.engine.fp16, settings.engine.batch_size, settings.engine.engine) == (False, 4, "lite")
    assert settings.engine.models.whisper_dir == Path("w") and settings.encoding.encoder == "libx265"
    assert parse_fps(settings.rendering.fps) == Fraction(30_000, 1001)
    assert settings.rendering.articulation == 1.2


def test_rows_inherit_what_they_do_not_say():
    defaults = Settings(encoding=EncodingConfig(crf=30, threads=7))
    (plain, own), _ = jobs_of({}, {"crf": "20", "output": "p.mp4"}, defaults=defaults)
    assert plain.settings.encoding == EncodingConfig(crf=30, threads=7)
    assert own.settings.encoding == EncodingConfig(crf=20, threads=7)


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        ({"audio": ""}, "audio missing"),
        ({"audio": None, "output": " "[:0]}, "audio and output missing"),
        ({"crf": "99"}, "crf is 99"),
        ({"crf": "good"}, "crf is 'good'"),
        ({"crf": 20.5}, "crf is '20.5'"),
        ({"fps": "0"}, "fps is '0'"),
        ({"articulation": "9"}, "articulation is 9.0"),
        ({"fp16": "perhaps"}, "fp16 is 'perhaps'"),
        ({"template": "a|b"}, "template_id|template id"),
        ({"template": "there", "bbox_shift": "2"}, "bbox_shift says nothing"),
        ({"template": "f.png", "parsing_mode": "nose"}, "parsing_mode"),
        ({"template": "s3://[bucket/f.png"}, "no address"),
        ({"audio": "https://[host/a.wav"}, "no address"),
        ({"output": "file://[host/o.mp4"}, "no address"),
    ],
)
def test_a_bad_value_refuses_its_row_alone(cells, words):
    jobs, (refused,) = jobs_of({"output": "first.mp4"}, cells, {"output": "last.mp4"})
    assert [job.row for job in jobs] == [1, 3] and refused.row == 2
    assert isinstance(refused.error, InputError) and refused.error.hint
    with pytest.raises(InputError, match=words):
        raise refused.error


def test_two_rows_never_write_one_file():
    jobs, refused = jobs_of({"output": "x/../o.mp4"}, {"output": "o.mp4"}, {"output": "./o.mp4"})
    assert [job.row for job in jobs] == [1] and [row.row for row in refused] == [2, 3]
    assert all("row 1" in row.error.message for row in refused)


@pytest.mark.parametrize("name", ["face.JPG", "./folder", "https://x.y/z", "s3://bucket/face.mp4", "C:\\f"])
def test_places_are_pictures_and_names_are_ids(name):
    assert one_job(template=name).picture
    assert one_job(template="face v1.2").template_id == "face v1.2"
    assert not one_job(template="face v1.2").picture


def test_rows_of_one_picture_and_its_settings_share_a_template():
    row = {"template": "dir/小 哈.jpg"}
    (first, again, shifted), _ = jobs_of(
        row, {**row, "output": "2.mp4", "crf": "9"}, {**row, "output": "3.mp4", "bbox_shift": "1"}
    )
    assert first.template_id == again.template_id != shifted.template_id
    assert first.template_id.startswith("小 哈_") and first.group == again.group
    assert first.picture == str(Path("dir/小 哈.jpg").absolute())


def test_the_key_knows_what_shapes_a_clip_and_nothing_else(tmp_path):
    audio = tmp_path / "a.wav"
    audio.write_bytes(b"1")
    row = {"audio": str(audio)}
    key = one_job(**row).key
    assert one_job(**row).key == key
    machine = Settings(EngineConfig(device="cuda:1", strict_device=True), encoding=EncodingConfig(threads=9))
    assert jobs_of(row, defaults=machine)[0][0].key == key
    others = [{"crf": "19"}, {"fps": "30"}, {"output": "p.mp4"}, {"template": "q"}, {"batch_size": "4"}]
    keys = [one_job(**{**row, **other}).key for other in others]
    audio.write_bytes(b"12")
    assert len({key, one_job(**row).key, *keys}) == len(others) + 2


def test_jobs_are_json_lines_too(tmp_path):
    rows = read_rows(json.dumps({**ROW, "frames_dir": "frames", "seconds": None}))
    (job,), _ = make_jobs(rows, Settings())
    assert job.settings.rendering.frames_dir == "frames"
