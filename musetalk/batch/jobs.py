"""The rows of a batch: read from CSV or JSON lines, checked, and made into jobs that need nothing else.

The decision a reader would question: an unknown column refuses the whole batch, a bad value only its row. A
misspelt column would otherwise be found the next morning, in ten thousand clips of the wrong frame rate.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import os
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from musetalk.batch.transfer import absolute, is_remote, name_of
from musetalk.config import (
    IMAGE_SUFFIXES,
    SOURCE_FPS,
    VIDEO_SUFFIXES,
    Defaults,
    EncodingConfig,
    EngineConfig,
    ModelPaths,
    PreprocessingConfig,
    parse_articulation,
    parse_fps,
)
from musetalk.errors import InputError, MuseTalkError
from musetalk.templates.store import check_template_id

REQUIRED = ("template", "audio", "output")
PICTURE_SUFFIXES = (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES, ".avif", ".heic")
HASH_LENGTH = 10  # characters in the id of a template that a batch makes
STEM_LENGTH = 60
OF_THE_MACHINE = ("device", "strict_device", "models", "engine")
TRUE, FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


@dataclass(frozen=True)
class Rendering:
    """How a clip is rendered, apart from engine, template and file.

    Attributes:
        fps: a number or "source".
        articulation: how far the mouth moves, `lite` alone.
        frames_dir: also takes each frame as PNG; "" for none.
    """

    fps: str = str(Defaults.fps)
    articulation: float = Defaults.articulation
    frames_dir: str = ""

    def __post_init__(self) -> None:
        if self.fps != SOURCE_FPS:
            parse_fps(self.fps)
        parse_articulation(self.articulation)


@dataclass(frozen=True)
class Settings:
    """Everything that may differ between two rows of a batch beside their files."""

    engine: EngineConfig = dataclasses.field(default_factory=EngineConfig)
    template: PreprocessingConfig = dataclasses.field(default_factory=PreprocessingConfig)
    encoding: EncodingConfig = dataclasses.field(default_factory=EncodingConfig)
    rendering: Rendering = dataclasses.field(default_factory=Rendering)


@dataclass(frozen=True)
class Job:
    """One clip to be made.

    Attributes:
        row: its number in the table, from 1.
        template_id: the template's name in the cache folder.
        picture: what the template is made from, an absolute path or a URL; "" where it is there already.
        audio, output: absolute paths or URLs.
        settings: how it is made.
        key: hex sha256 of all that shapes the clip; the same key is the same clip.
    """

    row: int
    template_id: str
    picture: str
    audio: str
    output: str
    settings: Settings
    key: str

    @property
    def group(self) -> tuple[str, EngineConfig]:
        """What a worker opens for it; jobs of one group share that."""
        return self.template_id, self.settings.engine


@dataclass(frozen=True)
class RefusedRow:
    """A row that can't become a job.

    Attributes:
        row: its number in the table, from 1.
        cells: what it says.
        error: why.
    """

    row: int
    cells: Mapping[str, Any]
    error: MuseTalkError


def _kinds(kind: type, leave: tuple[str, ...] = ()) -> dict[str, Any]:
    """A dataclass's fields and their types, without those to leave."""
    return {name: hint for name, hint in typing.get_type_hints(kind).items() if name not in leave}


_ENGINE = {"engine": str, **_kinds(EngineConfig, OF_THE_MACHINE)}
_MODELS = _kinds(ModelPaths)
_TEMPLATE = _kinds(PreprocessingConfig)
_ENCODING = _kinds(EncodingConfig, ("threads",))
_RENDERING = _kinds(Rendering)
COLUMNS: dict[str, Any] = {**_RENDERING, **_ENCODING, **_TEMPLATE, **_ENGINE, **_MODELS}
"""The optional columns and what they hold: the settings of the commands, under their names."""


def read_rows(text: str) -> list[dict[str, Any]]:
    """The table's rows: JSON lines where the text begins with a brace, else CSV with a heading.

    Raises:
        InputError: it is neither, has no rows, or names columns that nothing is known of.
    """
    text = text.removeprefix("\ufeff")
    rows = list(_json_rows(text) if text.lstrip()[:1] == "{" else _csv_rows(text))
    if not rows:
        raise InputError("the batch has no rows 没有任务", f"give {', '.join(REQUIRED)} for each clip")
    known = {*REQUIRED, *COLUMNS}
    unknown = dict.fromkeys(str(name) for row in rows for name in row if name not in known)
    if unknown:
        raise InputError(
            f"unknown columns 未知的列: {', '.join(unknown)}",
            f"columns are {', '.join(REQUIRED)}, and {', '.join(sorted(COLUMNS))}",
        )
    return rows


def _json_rows(text: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise InputError(f"line {number} of the batch is not JSON: {e}", "one object a line") from e
        if not isinstance(row, dict):
            raise InputError(f"line {number} of the batch is no JSON object", "one object a line")
        yield row


def _csv_rows(text: str) -> Iterator[dict[str, Any]]:
    heading = text.partition("\n")[0]
    delimiter = max(",;\t", key=heading.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, restkey="", strict=True)
    try:
        for row in reader:
            cells = {(name or "").strip(): value for name, value in row.items() if value is not None}
            if "" in cells:
                raise InputError(
                    f"line {reader.line_num} of the batch has more cells than the heading", "quote commas"
                )
            if any(cells.values()):
                yield cells
    except csv.Error as e:
        raise InputError(f"line {reader.line_num} of the batch is not CSV: {e}", "export it again") from e


def make_jobs(rows: Iterable[Mapping[str, Any]], defaults: Settings) -> tuple[list[Job], list[RefusedRow]]:
    """The rows as jobs, and those that can't be.

    Args:
        defaults: where a row doesn't say.
    """
    jobs: list[Job] = []
    refused: list[RefusedRow] = []
    writers: dict[str, int] = {}
    for number, cells in enumerate(rows, 1):
        try:
            job = _job(number, cells, defaults)
            first = writers.setdefault(os.path.normcase(os.path.normpath(job.output)), number)
            if first != number:
                raise InputError(f"row {first} writes {job.output} too 输出重复", "give each its own output")
            jobs.append(job)
        except MuseTalkError as e:
            refused.append(RefusedRow(number, cells, e))
    return jobs, refused


def _job(row: int, cells: Mapping[str, Any], defaults: Settings) -> Job:
    filled = {name: value for name, value in cells.items() if value not in (None, "")}
    missing = [name for name in REQUIRED if not isinstance(filled.get(name), str)]
    if missing:
        raise InputError(f"{' and '.join(missing)} missing 缺少参数", "fill the row's cells")
    template, audio, output = (filled.pop(name) for name in REQUIRED)
    settings = _settings(filled, defaults)
    picture = absolute(template) if is_picture_name(template) else ""
    if not picture and (said := sorted(filled.keys() & _TEMPLATE.keys())):
        raise InputError(
            f"{', '.join(said)} says nothing to a template that is there: {template}",
            "name the picture to make a template of 请填写图片路径",
        )
    template_id = _made_id(picture, settings) if picture else check_template_id(template)
    places = (template_id, picture, absolute(audio), absolute(output))
    return Job(row, *places, settings, _key(places, settings))


def _settings(cells: Mapping[str, Any], defaults: Settings) -> Settings:
    values = {name: _value(name, COLUMNS[name], value) for name, value in cells.items()}

    def changed(base: Any, names: Iterable[str], **more: Any) -> Any:
        return dataclasses.replace(base, **{name: values[name] for name in names if name in values}, **more)

    models = changed(defaults.engine.models, _MODELS)
    return Settings(
        changed(defaults.engine, _ENGINE, models=models),
        changed(defaults.template, _TEMPLATE),
        changed(defaults.encoding, _ENCODING),
        changed(defaults.rendering, _RENDERING),
    )


def _value(name: str, kind: Any, value: Any) -> Any:
    """A cell's text, or a JSON value, as what its column holds."""
    kinds = [part for part in typing.get_args(kind) if isinstance(part, type) and part is not type(None)]
    wanted = kind if isinstance(kind, type) else kinds[0] if kinds else str
    text = str(value).strip()
    try:
        if wanted is bool:
            return {**dict.fromkeys(TRUE, True), **dict.fromkeys(FALSE, False)}[text.lower()]
        return wanted(text)
    except (KeyError, ValueError) as e:
        words = {int: "a whole number", float: "a number", bool: "true or false"}[wanted]
        raise InputError(f"{name} is {text[:40]!r}", f"{name} is {words}") from e


def is_picture_name(template: str) -> bool:
    """Whether a row's template is a picture, clip or folder to make one of, not the id of one."""
    place = any(mark in template for mark in "/\\")
    return place or template.lower().endswith(PICTURE_SUFFIXES)


def _made_id(picture: str, settings: Settings) -> str:
    """The id of the template that is made of a picture: the same for the same place and settings."""
    shaped = repr((picture, settings.template, settings.engine.engine, settings.engine.models))
    digest = hashlib.sha256(shaped.encode("utf-8", "surrogatepass")).hexdigest()[:HASH_LENGTH]
    stem = "".join(c if c.isalnum() or c in " -_" else "_" for c in Path(name_of(picture)).stem)
    return check_template_id(f"{stem[:STEM_LENGTH].strip()}_{digest}")


def _key(places: tuple[str, str, str, str], settings: Settings) -> str:
    """What shapes the clip: files as they are now, settings, neither devices nor numbers of threads."""
    plain = dataclasses.asdict(settings)
    for part, name in (("engine", "device"), ("engine", "strict_device"), ("encoding", "threads")):
        del plain[part][name]
    shaped = [*places, *map(_state, places[1:3]), plain]
    return hashlib.sha256(json.dumps(shaped, sort_keys=True, default=str).encode()).hexdigest()


def _state(place: str) -> list[int]:
    """Size and time of a file of this machine; nothing of others."""
    try:
        status = Path(place).stat() if place and not is_remote(place) else None
    except (OSError, ValueError):
        return []
    return [status.st_size, status.st_mtime_ns] if status else []
