"""Many clips on the command line: `python -m musetalk.batch JOBS.csv|jsonl|-`.

One JSON object on stdout; a bar, then a table on stderr. A manifest keeps what is done for `--resume`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from musetalk.batch.crew import Crew, carry_out
from musetalk.batch.jobs import Job, Rendering, Settings, make_jobs, read_rows
from musetalk.batch.manifest import FAILED, Manifest, entry_of, open_manifest
from musetalk.batch.report import Tally, write_report
from musetalk.batch.schedule import Schedule, Settled
from musetalk.cli import Answer, Command, configure_logging, run, say, service_of, settings_parser
from musetalk.config import Defaults
from musetalk.errors import InputError, InterruptedRun
from musetalk.service import IntegratedMuseTalkService

STANDARD_INPUT = "-"
MANIFEST_SUFFIX = ".manifest.jsonl"
RAY_DEPTH = 2  # tasks that an actor has at once, so that it needn't wait for the network


def batch_main(argv: Sequence[str]) -> tuple[Command, argparse.Namespace]:
    """The command line of `python -m musetalk.batch`."""
    parser = settings_parser("-m musetalk.batch", "Many clips, from a table 批量生成")
    parser.add_argument("jobs", metavar="JOBS.csv|jsonl|-", help="rows: template, audio, output and settings")
    group = parser.add_argument_group("batch 批量")
    group.add_argument("--processes", type=_count, help="workers (default: what fits cores and memory)")
    group.add_argument("--resume", action="store_true", help="leave out rows that are done and valid")
    group.add_argument("--manifest", type=Path, help="what is done so far (default JOBS.manifest.jsonl)")
    group.add_argument("--report", type=Path, metavar="FILE", help="the answer with every row, as JSON")
    group.add_argument(
        "--memory_limit", type=int, default=Defaults.memory_limit, help="bytes of open templates, a worker"
    )
    return batch_command, parser.parse_args(argv)


def _count(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) <= 10_000:
        raise argparse.ArgumentTypeError(f"{text} is no number of workers")
    return int(text)


def batch_command(arguments: argparse.Namespace) -> tuple[Answer, int]:
    """Renders every row that isn't done yet."""
    rows = read_rows(_text_of(arguments.jobs))
    service = service_of(arguments)
    jobs, refused = make_jobs(rows, _defaults(service, arguments))
    path = arguments.manifest or _manifest_path(arguments.jobs)
    with open_manifest(path.absolute(), resume=arguments.resume) as manifest:
        kept = {job.key: manifest.done(job) for job in jobs}
        skipped = [entry for entry in kept.values() if entry is not None]
        left = [job for job in jobs if kept[job.key] is None]
        tally = Tally(len(rows), skipped)
        for row in refused:
            _note(manifest, tally, _refusal(row.row, row.cells, row.error))
        workers, interrupted = _work_off(left, arguments, service, manifest, tally)
        answer = {**tally.answer(workers), "manifest": str(manifest.path)}
        if arguments.report:
            write_report(arguments.report, answer, [*skipped, *tally.entries])
    say(*tally.table(answer))
    return _ended(answer, tally, interrupted)


def _text_of(jobs: str) -> str:
    try:
        content = sys.stdin.buffer.read() if jobs == STANDARD_INPUT else Path(jobs).read_bytes()
        return content.decode("utf-8")
    except OSError as e:
        raise InputError(f"the batch {jobs} can't be read: {e.strerror or e}", "check the path") from e
    except UnicodeDecodeError as e:
        raise InputError(f"the batch {jobs} is not UTF-8 编码不是UTF-8", "save it as UTF-8") from e


def _manifest_path(jobs: str) -> Path:
    return Path(("batch" if jobs == STANDARD_INPUT else jobs) + MANIFEST_SUFFIX)


def _defaults(service: IntegratedMuseTalkService, arguments: argparse.Namespace) -> Settings:
    """What rows are made with that don't say: the flags, and as many encoder threads everywhere as here."""
    from musetalk.media.video import encoder_threads

    encoding = dataclasses.replace(service.encoding, threads=encoder_threads())
    rendering = Rendering(str(arguments.fps), arguments.articulation)
    return Settings(service.config, service.settings, encoding, rendering)


def _refusal(row: int, cells: Mapping[str, Any], error: Any) -> dict[str, Any]:
    told = {"state": FAILED, "row": row, "key": "", "template_id": cells.get("template")}
    words = {name: getattr(error, name) for name in ("error_code", "exit_code", "message", "hint")}
    return {**told, "audio": cells.get("audio"), "output": cells.get("output"), "attempts": 0, **words}


def _note(manifest: Manifest, tally: Tally, entry: dict[str, Any]) -> None:
    manifest.append(entry)
    tally.count(entry)


def _work_off(
    jobs: Sequence[Job],
    arguments: argparse.Namespace,
    service: IntegratedMuseTalkService,
    manifest: Manifest,
    tally: Tally,
) -> tuple[int, InterruptedRun | None]:
    """Has the jobs done; how many workers did them, and what ended them early."""

    def settle(settled: Settled) -> None:
        _note(manifest, tally, entry_of(settled))

    workers = 0
    try:
        if jobs:
            make_crew, workers, depth = _crew_for(jobs, arguments, service)
            with contextlib.closing(make_crew()) as crew:
                carry_out(Schedule(jobs, depth), crew, settle, tally.notice)
    except InterruptedRun as e:
        return workers, e
    finally:
        tally.close()
    return workers, None


def _crew_for(
    jobs: Sequence[Job], arguments: argparse.Namespace, service: IntegratedMuseTalkService
) -> tuple[Callable[[], Crew], int, int]:
    """What makes the crew, how many workers it has, and how many tasks each of them is given at once."""
    from musetalk.batch.clips import Setup
    from musetalk.batch.pool import ProcessCrew, local_devices

    setup = Setup(service.store.cache_dir.absolute(), arguments.memory_limit)
    begin = functools.partial(configure_logging, arguments.verbose)
    devices = local_devices(jobs, service, arguments.processes)
    return lambda: ProcessCrew(setup, devices, begin), len(devices), 1


def _ended(answer: Answer, tally: Tally, interrupted: InterruptedRun | None) -> tuple[Answer, int]:
    """The answer and the exit code: the interrupt's, else that of the first row that failed."""
    done, failed = answer["done"] + answer["skipped"], answer["failed"]
    if interrupted is not None:
        message, hint = "interrupted 已中断", "run it again with --resume 请加--resume重新运行"
        say(message, hint)
        told = {"error_code": "interrupted", "error": message, "message": message, "hint": hint}
        return {"success": False, **told, **answer}, interrupted.exit_code
    message = f"✅ {done} clips of {answer['rows']} are there 批量完成"
    if not failed:
        return {"success": True, "message": message, **answer}, 0
    first = tally.failures[0]
    words = (
        f"❌ {failed} of {answer['rows']} rows failed 部分任务失败; row {first['row']}: {first['message']}"
    )
    told = {"error_code": first["error_code"], "error": words, "message": words, "hint": first["hint"]}
    return {"success": False, **told, **answer}, first["exit_code"]


if __name__ == "__main__":
    run(batch_main)
