"""One file from a model hub or a plain address, resumed, checked, and in place only when whole.

The decision a reader would question: files arrive in a folder of their own (`.download` beside the models)
and move to their place after their checksum agrees, so that an engine that starts meanwhile can't load half
a file. What arrives whole with a wrong checksum is kept beside the place as `.bad`, for whoever wants to
know what the server sent.
"""

from __future__ import annotations

import logging
import sys
import threading
from pathlib import Path

from musetalk.errors import WeightsError
from musetalk.files import file_sha256, replace_file
from musetalk.weights.registry import Source

log = logging.getLogger(__name__)

STAGING_FOLDER = ".download"
ATTEMPTS = 6  # in a row without a new byte
PAUSE = 1.0  # seconds before the second attempt, doubled for each later one
TIMEOUT = 30.0  # seconds without an answer
CHUNK = 1 << 20  # bytes
HUB_HOST = "huggingface.co"
USER_AGENT = "enhanced-musetalk"


def fetch(source: Source, target: Path, staging: Path, mirror: str | None, *, pause: float = PAUSE) -> str:
    """Brings `source` to `target` and returns its sha256.

    Args:
        source: what to get.
        target: its place; replaced when the new file is whole and right.
        staging: folder for what has arrived so far; a later call goes on from there.
        mirror: address of another hub; asked first for plain files too, under the target's last two names.
        pause: seconds before a second attempt.

    Raises:
        WeightsError: the file can't be got, or what arrived is another one.
    """
    staging.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.repository:
        arrived = _from_hub(source, staging, mirror)
    else:
        arrived = _from_addresses(source, target, staging, mirror, pause)
    return _accept(source, arrived, target)


def _accept(source: Source, arrived: Path, target: Path) -> str:
    size, digest = arrived.stat().st_size, file_sha256(arrived)
    if source.sha256 is None or digest == source.sha256:
        replace_file(arrived, target)
        return digest
    bad = target.with_name(target.name + ".bad")
    replace_file(arrived, bad)
    raise WeightsError(
        f"{target.name} arrived with another checksum 校验和不符: {size} bytes, sha256 {digest[:16]}…, "
        f"expected {source.sha256[:16]}…; kept as {bad}",
        "try again, or use another --mirror 请重试或更换镜像",
    )


def _failed(name: str, address: str, error: object) -> WeightsError:
    return WeightsError(
        f"{name} can't be downloaded from {address} 下载失败: {error}",
        "check the network, or name a mirror with --mirror URL or HF_ENDPOINT; "
        "run the same command again to go on 请检查网络或使用镜像，重新运行将继续下载",
    )


def _from_hub(source: Source, staging: Path, mirror: str | None) -> Path:
    try:
        from huggingface_hub import constants, hf_hub_download
        from huggingface_hub.utils import disable_progress_bars
    except ImportError as e:
        raise WeightsError(
            "huggingface_hub is not installed 未安装huggingface_hub",
            "run make install-full, or pip install huggingface_hub",
        ) from e
    if not sys.stderr.isatty():
        disable_progress_bars()
    hub = mirror or constants.ENDPOINT
    folder = staging / source.repository.replace("/", "--")
    try:
        arrived = hf_hub_download(
            source.repository,
            source.location,
            revision=source.revision,
            local_dir=folder,
            endpoint=hub,
            token=None if is_the_hub(hub) else False,
        )
    except (OSError, ValueError, RuntimeError) as e:
        raise _failed(source.location, hub, e) from e
    return Path(arrived)


def is_the_hub(address: str) -> bool:
    """Whether an address is the hub that stored tokens are for; no other host is to see them."""
    from urllib.parse import urlsplit

    parts = urlsplit(address)
    return parts.scheme == "https" and parts.hostname == HUB_HOST


def _from_addresses(source: Source, target: Path, staging: Path, mirror: str | None, pause: float) -> Path:
    import http.client

    addresses = [source.location]
    if mirror:
        addresses.insert(0, f"{mirror.rstrip('/')}/{target.parent.name}/{target.name}")
    partial = staging / f"{target.parent.name}--{target.name}.part"
    for number, address in enumerate(addresses, 1):
        try:
            _resume_until_whole(address, partial, source.size, pause)
        except (OSError, http.client.HTTPException) as e:
            if number == len(addresses):
                raise _failed(target.name, address, e) from e
            log.info("%s has no %s: %s", mirror, target.name, e)
        else:
            return partial
    raise AssertionError("no address")


def _resume_until_whole(address: str, partial: Path, size: int | None, pause: float) -> None:
    import http.client
    import urllib.error

    failures = 0
    while True:
        before = partial.stat().st_size if partial.exists() else 0
        try:
            if _append(address, partial, before, size):
                return
            error: Exception = OSError(f"the connection ended at {partial.stat().st_size} bytes")
        except urllib.error.HTTPError as e:
            if e.code < 500 and e.code not in (408, 429):
                raise
            error = e
        except (OSError, http.client.HTTPException) as e:
            error = e
        grown = partial.exists() and partial.stat().st_size > before
        failures = 0 if grown else failures + 1
        if failures == ATTEMPTS:
            raise error
        log.info("%s: %s, going on", partial.name, error)
        threading.Event().wait(pause * 2 ** max(0, failures - 1))


def _append(address: str, partial: Path, have: int, size: int | None) -> bool:
    """Adds what the server still has to `partial`; True when the file is whole.

    A server that ignores the range starts again at zero. One that answers that there is nothing beyond
    `have` has sent everything, if no size says otherwise.
    """
    import urllib.error
    import urllib.request

    if size is not None and have >= size:
        if have == size:
            return True
        have = 0
    headers = {"User-Agent": USER_AGENT, **({"Range": f"bytes={have}-"} if have else {})}
    try:
        response = urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as e:
        if e.code == 416 and have and size is None:
            return True
        raise
    with response:
        resumed = response.status == 206
        expected = response.length
        received = 0
        with partial.open("ab" if resumed else "wb") as stream:
            while block := response.read1(CHUNK):
                stream.write(block)
                received += len(block)
                if size is not None and received > size:
                    raise OSError(f"the server sends more than {size} bytes")
    total = partial.stat().st_size
    if size is not None:
        return total == size
    return expected is None or received >= expected
