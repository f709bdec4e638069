"""A clip's own time against plain arithmetic: what a viewer of the clip itself would see at each moment."""

from __future__ import annotations

from fractions import Fraction
from itertools import accumulate

import numpy as np
import pytest

from musetalk.errors import CacheError
from musetalk.templates.template import TIME_KEY, Template
from musetalk.templates.timeline import Timeline
from tests.conftest import make_template

NTSC = Fraction(30_000, 1001)


def shown(timeline: Timeline, fps: Fraction, count: int) -> list[int]:
    return [timeline.position(i / fps) for i in range(count)]


def there_and_back(starts: list[Fraction], end: Fraction, second: Fraction) -> int:
    """The frame that a cycle shows at a second, by looking for it."""
    within = second % (2 * end)
    if within < end:
        return max(i for i, start in enumerate(starts) if start <= within)
    return max(i for i, start in enumerate(starts) if start < 2 * end - within)


@pytest.mark.parametrize("rate", [Fraction(6), Fraction(24), Fraction(25), NTSC, Fraction(60), Fraction(240)])
def test_at_its_own_rate_a_clip_is_shown_frame_by_frame(rate: Fraction) -> None:
    timeline = Timeline.of([float(i / rate) for i in range(90)], rate)
    cycle = [*range(90), *range(90, 180)]
    assert shown(timeline, rate, 400) == [cycle[i % 180] for i in range(400)]


@pytest.mark.parametrize("rate", [Fraction(6), Fraction(12), Fraction(25), NTSC, Fraction(50), Fraction(60)])
@pytest.mark.parametrize("fps", [Fraction(25), NTSC, Fraction(10), Fraction(60)])
def test_at_another_rate_every_moment_shows_the_clip_s_frame_of_that_moment(
    rate: Fraction, fps: Fraction
) -> None:
    count = 40
    template = make_timed(Timeline.even(count, rate))
    starts = [i / rate for i in range(count)]
    expected = [there_and_back(starts, count / rate, i / fps) for i in range(300)]
    assert [template.position(i, fps) for i in range(300)] == expected


def test_an_uneven_clip_is_shown_at_its_own_times() -> None:
    spans = [Fraction(int(ms), 1000) for ms in np.random.default_rng(3).choice([20, 33, 33, 100, 250], 51)]
    starts = [Fraction(0), *accumulate(spans[:-1])]
    timeline = Timeline.of([float(start) for start in starts], Fraction(25))
    template = make_timed(timeline)
    end = starts[-1] + sorted(spans[:-1])[25]
    expected = [there_and_back(starts, end, Fraction(i, 30)) for i in range(900)]
    assert not timeline.is_even
    assert [template.position(i, Fraction(30)) for i in range(900)] == expected


@pytest.mark.parametrize("rate", [Fraction(24_000, 1001), NTSC, Fraction(60), Fraction(24)])
def test_stamps_in_whole_milliseconds_are_an_even_rate(rate: Fraction) -> None:
    """Matroska rounds them: walked as they stand, a frame would be shown twice and the next one never."""
    timeline = Timeline.of([round(float(i / rate), 3) for i in range(200)], rate)
    assert timeline.is_even and timeline.fps == rate
    assert shown(timeline, rate, 200) == list(range(200))


def test_a_steady_clip_whose_container_names_another_rate_keeps_its_times() -> None:
    timeline = Timeline.of([i / 10 for i in range(30)], Fraction(25))
    assert timeline.fps == 10
    assert timeline.duration == pytest.approx(3)


def test_a_single_frame_is_a_clip_too() -> None:
    timeline = Timeline.of([0.0], Fraction(25))
    assert shown(timeline, Fraction(60), 5) == [0, 0, 0, 1, 1]


def make_timed(timeline: Timeline) -> Template:
    count = len(timeline.spans)
    plain = make_template(count, (16, 16))
    half = slice(0, count)
    return Template.from_frames(
        plain.frames[half],
        plain.bboxes[half],
        plain.latents[half],
        plain.masks[half],
        plain.crop_boxes[half],
        timeline,
    )


@pytest.mark.parametrize("timeline", [Timeline.even(4, NTSC), Timeline(Fraction(9), (0.1, 0.2, 0.05, 0.1))])
def test_a_cache_keeps_it(timeline: Timeline) -> None:
    again = Template.from_dict(make_timed(timeline).to_dict()).timeline
    assert again is not None
    assert again.fps == timeline.fps and again.is_even == timeline.is_even
    np.testing.assert_allclose(again.spans, timeline.spans)


@pytest.mark.parametrize(
    "times",
    [
        {},
        {"rate": [25, 1], "seconds": [0.0, 0.1]},
        {"rate": [25, 0], "seconds": [0.0, 0.1, 0.2, 0.3, 0.4]},
        {"rate": [-25, 1], "seconds": [0.0, 0.1, 0.2, 0.3, 0.4]},
        {"rate": [25, 1], "seconds": [0.0, 0.1, 0.1, 0.3, 0.4]},
        {"rate": [25, 1], "seconds": [0.0, 0.1, float("nan"), 0.3, 0.4]},
        {"rate": [25, 1], "seconds": "later"},
        {"rate": 25, "seconds": [0.0, 0.1, 0.2, 0.3, 0.4]},
        None,
    ],
)
def test_times_that_can_not_be_are_a_damaged_cache(times: object) -> None:
    with pytest.raises(CacheError):
        Template.from_dict({**make_template(4).to_dict(), TIME_KEY: times})


def test_a_cache_without_times_shows_one_frame_per_output_frame() -> None:
    template = Template.from_dict(make_template(3).to_dict())
    assert [template.position(i, Fraction(60)) for i in range(7)] == [0, 1, 2, 2, 1, 0, 0]
