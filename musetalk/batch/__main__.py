"""Many clips on the command line: `python -m musetalk.batch JOBS.csv|jsonl|-`.

One JSON object on stdout; a bar, then a table on stderr. A manifest keeps what is done for `--resume`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from musetalk.batch import ray_actors
from musetalk.batch.clips import Setup
from musetalk.batch.crew import Crew, carry_out
from musetalk.batch.jobs import Job, Rendering, Settings, make_jobs, read_rows
from musetalk.batch.manifest import FAILED, Manifest, entry_of, open_manifest, read_entries
from musetalk.batch.pool import ProcessCrew, local_pool, runs_musetalk
from musetalk.batch.report import Tally, write_report
from musetalk.batch.schedule import Schedule, Settled
from musetalk.batch.simulation import Plan, replay, simulate
from musetalk.cli import Answer, Command, configure_logging, run, say, service_of, settings_parser
from musetalk.config import Defaults
from musetalk.device import usable_cores
from musetalk.errors import InputError, InterruptedRun
from musetalk.service import IntegratedMuseTalkService

STANDARD_INPUT = "-"
MANIFEST_SUFFIX = ".manifest.jsonl"
RAY_DEPTH = 2  # tasks that an actor has at once, so that it needn't wait for the network


def batch_main(argv: Sequence[str]) -> tuple[Command, argparse.Namespace]:
    """The command line of `python -m musetalk.batch`."""
    parser = settings_parser("-m musetalk.batch", "Many clips, from a table 批量生成")
    parser.add_argument(
        "jobs", metavar="JOBS.csv|jsonl|-", nargs="?", help="rows: template, audio, output and settings"
    )
    group = parser.add_argument_group("batch 批量")
    group.add_argument("--processes", type=_count, help="workers (default: what fits cores and memory)")
    group.add_argument("--resume", action="store_true", help="leave out rows that are done and valid")
    group.add_argument("--manifest", type=Path, help="what is done so far (default JOBS.manifest.jsonl)")
    group.add_argument("--report", type=Path, metavar="FILE", help="the answer with every row, as JSON")
    group.add_argument(
        "--memory_limit", type=int, default=Defaults.memory_limit, help="bytes of open templates, a worker"
    )
    group.add_argument(
        "--encoder_threads", type=_count, help="of libx264, whose bytes depend on it (default: one clip's)"
    )
    group = parser.add_argument_group("cluster 集群")
    group.add_argument("--ray", metavar="ADDRESS", help="local, auto, ray://HOST:10001: actors do the work")
    group.add_argument("--cpus_per_actor", type=float, help="(default 1, MuseTalk without cards 2)")
    group.add_argument("--gpus_per_actor", type=float, help="part of a card (default: by its memory)")
    plan = Plan(1)
    group = parser.add_argument_group("simulation 模拟")
    group.add_argument("--simulate", type=_count, metavar="N", help="what a batch would take N workers")
    group.add_argument("--clips", type=_count, default=plan.clips, help="(default %(default)s)")
    group.add_argument("--templates", type=_count, default=plan.templates, help="(default %(default)s)")
    group.add_argument(
        "--clip_seconds", type=float, default=plan.seconds, help="of speech (default %(default)s)"
    )
    group.add_argument("--lifetime", type=float, default=0.0, help="hours that a worker lives")
    group.add_argument("--times", type=Path, metavar="REPORT", help="simulate the batch of this --report")
    arguments = parser.parse_args(argv)
    if arguments.simulate is None and arguments.jobs is None:
        parser.error("a table of jobs is needed, or --simulate 缺少任务表")
    return batch_command if arguments.simulate is None else simulate_command, arguments


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
        left = [job for job in jobs if manifest.done(job) is None]
        tally = Tally(len(rows), len(jobs) - len(left))
        for row in refused:
            _note(manifest, tally, _refusal(row.row, row.cells, row.error))
        workers, interrupted = _work_off(left, arguments, service, manifest, tally)
        answer = {**tally.answer(workers), "manifest": str(manifest.path)}
        if arguments.report:
            rows_of_keys = {job.key: job.row for job in jobs} | {
                _refused(row.row): row.row for row in refused
            }
            write_report(arguments.report, answer, read_entries(path, rows_of_keys))
    say(*tally.table(answer))
    return _ended(answer, tally, interrupted)


def simulate_command(arguments: argparse.Namespace) -> tuple[Answer, int]:
    """Tells what a batch would take so many workers; nothing is rendered."""
    if arguments.times is not None:
        try:
            report = json.loads(arguments.times.read_bytes())
        except (OSError, ValueError) as e:
            raise InputError(f"the report {arguments.times} can't be read: {e}", "check the path") from e
        answer = replay(report, arguments.simulate, arguments.lifetime)
    else:
        plan = Plan(
            arguments.simulate,
            arguments.clips,
            arguments.templates,
            arguments.clip_seconds,
            arguments.lifetime,
        )
        answer = simulate(plan)
    hours = answer["seconds"] / 3600
    message = f"✅ {answer['done']} clips in {hours:.2f} h of {answer['workers']} workers 模拟完成"
    say(message)
    return {"success": True, "message": message, **answer}, 0


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

    encoding = dataclasses.replace(service.encoding, threads=arguments.encoder_threads or encoder_threads())
    rendering = Rendering(str(arguments.fps), arguments.articulation)
    return Settings(service.config, service.settings, encoding, rendering)


def _refused(row: int) -> str:
    """The key of a row that can't become a job."""
    return f"refused-{row}"


def _refusal(row: int, cells: Mapping[str, Any], error: Any) -> dict[str, Any]:
    told = {"state": FAILED, "row": row, "key": _refused(row), "template_id": cells.get("template")}
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
            with _hired(jobs, arguments, service) as (crew, workers, depth):
                carry_out(Schedule(jobs, depth), crew, settle, tally.notice)
    except InterruptedRun as e:
        return workers, e
    finally:
        tally.close()
    return workers, None


@contextlib.contextmanager
def _hired(
    jobs: Sequence[Job], arguments: argparse.Namespace, service: IntegratedMuseTalkService
) -> Iterator[tuple[Crew, int, int]]:
    """The crew, how many workers it has, and how many tasks each of them is given at once."""
    setup = Setup(service.store.cache_dir.absolute(), arguments.memory_limit)
    begin = functools.partial(configure_logging, arguments.verbose)
    with contextlib.ExitStack() as stack:
        if arguments.ray is None:
            pool = local_pool(jobs, service, arguments.processes)
            setup = dataclasses.replace(setup, cores=pool.cores)
            workers, depth = len(pool.devices), 1
            crew: Crew = stack.enter_context(contextlib.closing(ProcessCrew(setup, pool.devices, begin)))
        else:
            cpus = arguments.processes or usable_cores()
            stack.enter_context(ray_actors.connected(arguments.ray, cpus))
            staff = ray_actors.staff(runs_musetalk(jobs, service), service.config.device, _asked(arguments))
            workers, depth = staff.count, RAY_DEPTH
            crew = stack.enter_context(contextlib.closing(ray_actors.RayCrew(setup, staff, begin)))
        yield crew, workers, depth


def _asked(arguments: argparse.Namespace) -> ray_actors.Asked:
    return ray_actors.Asked(arguments.processes, arguments.cpus_per_actor, arguments.gpus_per_actor)


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
