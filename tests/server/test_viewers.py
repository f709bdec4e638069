"""Everybody who watches sees one encode, from a key frame on, and nobody waits for anybody."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np

from musetalk.media.fragments import Fragment
from musetalk.media.video import probe_video, read_video
from musetalk.server.live import LiveSession
from musetalk.server.viewers import FALLEN_BEHIND, Viewer, Viewers
from tests.server.live_stand_ins import session

RATE = 16_000


class Watching:
    """A viewer who takes everything at once."""

    def __init__(self, viewers: Viewers):
        self.content, self.fragments = b"", 0
        self.lock, self.seen = threading.Lock(), threading.Condition()
        self.viewer: Viewer | None = None
        self.viewer = viewers.join(self.wake)
        self.wake()

    def wake(self):
        if self.viewer is None:
            return
        with self.lock:
            taken = self.viewer.take()
            self.content += b"".join(taken)
        with self.seen:
            self.fragments += len(taken)
            self.seen.notify_all()

    def wait_for(self, fragments: int):
        with self.seen:
            assert self.seen.wait_for(lambda: self.fragments >= fragments, 60)


def feed(viewers: Viewers, live: LiveSession, enough, spoken: float = 0.0) -> None:
    """Frames until `enough()`; the sound is a tone of amplitude `spoken`."""
    width, height = live.size
    tone = (spoken * np.sin(np.arange(640) * 2 * np.pi / 40)).astype(np.float32)
    frame = np.full((height * 3 // 2, width), 128, np.uint8)
    while not enough():
        viewers.write(frame, tone)


def fed_in_background(viewers: Viewers, live: LiveSession, stop: threading.Event) -> threading.Thread:
    thread = threading.Thread(target=feed, args=(viewers, live, stop.is_set, 0.5), daemon=True)
    thread.start()
    return thread


def saved(content: bytes, folder: Path) -> Path:
    path = folder / "seen.mp4"
    path.write_bytes(content)
    return path


def test_several_viewers_encode_once_and_who_joins_begins_at_a_key_frame(tmp_path):
    live = session()
    viewers, stop = live.viewers, threading.Event()
    first = Watching(viewers)
    thread = fed_in_background(viewers, live, stop)
    first.wait_for(60)
    second = Watching(viewers)
    second.wait_for(40)
    stop.set()
    thread.join()
    assert viewers.encoders_started == 1 and len(viewers) == 2
    viewers.close()
    assert second.viewer.over and len(viewers) == 0
    for watching in (first, second):
        path = saved(watching.content, tmp_path)
        assert (probe_video(path).width, round(probe_video(path).fps)) == (64, 25)
        frames = list(read_video(path))
        assert len(frames) > 10 and abs(float(frames[0].mean()) - 128) < 40


def test_who_joins_is_given_the_newest_fragment_that_others_have():
    live = session()
    viewers, stop = live.viewers, threading.Event()
    first = Watching(viewers)
    thread = fed_in_background(viewers, live, stop)
    first.wait_for(60)
    stop.set()
    thread.join()
    viewers._writer.finish()  # all that went in has left
    reader = next(thread for thread in threading.enumerate() if thread.name == "viewers")
    reader.join()
    taken = viewers.join(lambda: None).take()
    assert taken[0] == first.content[: len(taken[0])] and taken[0][4:8] == b"ftyp"
    assert first.content.endswith(b"".join(taken[1:])) and 1 < len(taken) < first.fragments
    viewers.close()


def test_the_stream_carries_what_was_said(tmp_path):
    from musetalk.media.audio import read_waveform

    live = session()
    viewers, stop = live.viewers, threading.Event()
    watching = Watching(viewers)
    thread = fed_in_background(viewers, live, stop)
    watching.wait_for(120)
    stop.set()
    thread.join()
    viewers.close()
    sound = np.concatenate(list(read_waveform(saved(watching.content, tmp_path))))
    spectrum = np.abs(np.fft.rfft(sound[1600:17_600]))
    assert np.argmax(spectrum) == 400 and np.abs(sound).max() > 0.4


def test_without_viewers_nothing_is_encoded():
    live = session()
    viewers = live.viewers
    viewers.write(np.zeros((72, 64), np.uint8), np.zeros(640, np.float32))
    assert viewers.encoders_started == 0 and not live._outputs
    watching = Watching(viewers)
    assert live._outputs == (viewers,)
    viewers.leave(watching.viewer)
    viewers.leave(watching.viewer)
    assert not live._outputs and viewers._writer is None


def test_after_the_last_has_left_another_may_come():
    live = session()
    viewers, stop = live.viewers, threading.Event()
    viewers.leave(Watching(viewers).viewer)
    watching = Watching(viewers)
    thread = fed_in_background(viewers, live, stop)
    watching.wait_for(5)
    stop.set()
    thread.join()
    viewers.close()
    assert viewers.encoders_started == 2 and watching.content[4:8] == b"ftyp"


def offered(viewer: Viewer, fragments: int) -> None:
    """Numbers as fragments, every sixth a place to begin."""
    for number in range(fragments):
        viewer.offer(Fragment(b"%d" % number, number % 6 == 0))


def test_a_slow_viewer_is_skipped_forward_to_a_key_frame():
    viewer, last = Viewer(lambda: None), FALLEN_BEHIND * 7 // 2
    viewer.offer(Fragment(b"header", True))
    assert viewer.take() == [b"header"]
    offered(viewer, last)
    taken = [int(content) for content in viewer.take()]
    assert viewer.skipped and len(taken) <= FALLEN_BEHIND
    assert taken[0] % 6 == 0 and taken == list(range(taken[0], last))


def test_who_never_took_the_header_still_gets_it():
    viewer = Viewer(lambda: None)
    viewer.offer(Fragment(b"header", True))
    offered(viewer, FALLEN_BEHIND * 7 // 2)
    assert viewer.take()[0] == b"header" and viewer.skipped


def test_an_encoder_that_dies_ends_its_viewers_and_not_the_session():
    live = session()
    viewers = live.viewers
    watching = Watching(viewers)
    viewers._writer.abort()
    feed(viewers, live, lambda: watching.viewer.over)
    assert viewers._writer is None and not live.ended


def test_who_joins_when_the_session_has_ended_starts_no_encoder():
    live = session()
    live.viewers.close()
    viewer = live.viewers.join(lambda: None)
    assert viewer.over and (len(live.viewers), live.viewers.encoders_started) == (0, 0)
