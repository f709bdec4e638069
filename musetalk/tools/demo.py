"""`python -m musetalk.tools.demo`: the bundled portrait says the bundled sentence.

Leaves output/demo.mp4 and output/demo.png and prints the renderer's JSON. It drives the same command
lines that a caller would.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from musetalk import cli
from musetalk.config import LITE_MODELS, REPOSITORY

PORTRAIT = LITE_MODELS / "portraits" / "astronaut.jpg"
SPEECH = LITE_MODELS / "speech" / "demo_en.flac"
TEMPLATE_ID = "demo"


def _command(*arguments: str) -> tuple[dict[str, Any], int]:
    return cli.execute(cli.service_main, arguments)


def demo(arguments: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """Preprocesses, renders and draws; the answer is that of the first step that fails, or the renderer's."""
    from musetalk.tools.contact_sheet import contact_sheet

    cache = ("--cache_dir", str(REPOSITORY / "template_cache"), "--template_id", arguments.template_id)
    source = ("--template_image_path", str(arguments.portrait), "--engine", "lite")
    answer, code = _command("--preprocess", *cache, *source)
    if code:
        return answer, code
    video = arguments.output_dir / "demo.mp4"
    answer, code = _command(
        "--inference", *cache, "--audio_path", str(arguments.audio), "--output_path", str(video)
    )
    if code:
        return answer, code
    picture = video.with_suffix(".png")
    contact_sheet(video, picture)
    cli.say(f"video 视频: {video}", f"picture 图片: {picture}")
    return {**answer, "picture_path": str(picture)}, 0


def demo_main(argv: Sequence[str]) -> tuple[cli.Command, argparse.Namespace]:
    """The demo's command line."""
    parser = argparse.ArgumentParser(
        prog="python -m musetalk.tools.demo", description="A talking portrait 演示"
    )
    parser.add_argument("--portrait", type=Path, default=PORTRAIT)
    parser.add_argument("--audio", type=Path, default=SPEECH)
    parser.add_argument("--output_dir", type=Path, default=REPOSITORY / "output")
    parser.set_defaults(template_id=TEMPLATE_ID, verbose=False)
    return demo, parser.parse_args(argv)


if __name__ == "__main__":
    cli.run(demo_main)
