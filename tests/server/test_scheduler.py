"""Sessions are served in turns, live ones first; what can be mixed is; who cancels waits no longer."""

from __future__ import annotations

import logging
import threading

import numpy as np
import pytest

from musetalk.compositor import FrameCompositor
from musetalk.errors import CancelledRun
from musetalk.rendering import OpenedTemplate
from musetalk.server.commands import Overheard, listening
from musetalk.server.scheduler import MIXED_FRAMES, Scheduler
from tests.conftest import make_template

SOON = 30.0  # seconds after which a test gives up


class GatedGenerator:
    """Notes what it is asked for, in order, once the gate is open."""

    def __init__(self, asked: list, gate: threading.Event) -> None:
        self.asked = asked
        self.gate = gate

    def generate(self, audio_prompts, indices):
        self.gate.wait(SOON)
        self.asked.append((int(audio_prompts[0, 0]), len(indices)))
        return [np.full((2, 2, 3), int(prompt[0]), np.uint8) for prompt in audio_prompts]


class PlainEngine:
    name, device, dtype, fingerprint = "lite", "cpu", "float32", "plain"


class MixingStandIn(PlainEngine):
    """Mixes requests; notes how many frames of how many requests a batch held."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def generate_mixed(self, requests):
        self.batches.append([len(indices) for _, _, indices in requests])
        return [[np.full((2, 2, 3), int(p[0]), np.uint8) for p in prompts] for _, prompts, _ in requests]


def opened(engine, asked: list, gate: threading.Event) -> OpenedTemplate:
    template = make_template(2, (64, 48))
    return OpenedTemplate("t", template, engine, GatedGenerator(asked, gate), FrameCompositor(template))


class Sessions:
    """Threads that each ask for one batch, started one after the other while the gate is shut."""

    def __init__(self, engine) -> None:
        self.asked: list[tuple[int, int]] = []
        self.gate = threading.Event()
        self.scheduler = Scheduler("cpu", 1)
        self.template = opened(engine, self.asked, self.gate)
        self.faces: dict[int, list[np.ndarray] | BaseException] = {}
        self.threads: list[threading.Thread] = []
        self.cancels: dict[int, threading.Event] = {}

    def ask(self, number: int, frames: int = 1, live: bool = False) -> None:
        cancel = self.cancels.setdefault(number, threading.Event())
        generate = self.scheduler.generate(self.template, cancel, live=live)

        def run() -> None:
            try:
                self.faces[number] = generate(np.full((frames, 1), number, np.float32), [0] * frames)
            except CancelledRun as e:
                self.faces[number] = e

        waiting = self.scheduler.depth
        self.threads.append(threading.Thread(target=run))
        self.threads[-1].start()
        while self.scheduler.depth == waiting and len(self.threads) > 1 and self.threads[-1].is_alive():
            threading.Event().wait(0.001)  # until it waits behind those before it

    def first_is_served(self) -> None:
        """The first request is in the generator, which waits for the gate."""
        self.ask(0)
        while self.scheduler.depth:
            threading.Event().wait(0.001)

    def finish(self) -> None:
        self.gate.set()
        for thread in self.threads:
            thread.join(SOON)
        self.scheduler.close()


def test_requests_are_served_in_turn_and_live_ones_first():
    sessions = Sessions(PlainEngine())
    sessions.first_is_served()
    for number, live in ((1, False), (2, False), (3, True), (4, False), (5, True)):
        sessions.ask(number, live=live)
    sessions.finish()
    assert [number for number, _ in sessions.asked] == [0, 3, 5, 1, 2, 4]
    assert all(int(sessions.faces[n][0][0, 0, 0]) == n for n in range(6))


def test_an_engine_that_can_mix_gets_the_waiting_requests_at_once():
    engine = MixingStandIn()
    sessions = Sessions(engine)
    sessions.first_is_served()
    for number in range(1, 5):
        sessions.ask(number, frames=MIXED_FRAMES // 3)
    sessions.finish()
    assert engine.batches[0] == [MIXED_FRAMES // 3] * 3
    assert all(int(sessions.faces[n][-1][0, 0, 0]) == n for n in range(5))


def test_who_cancels_is_let_go_and_leaves_the_queue():
    sessions = Sessions(PlainEngine())
    sessions.first_is_served()
    sessions.ask(1)
    sessions.ask(2)
    sessions.cancels[1].set()
    sessions.threads[1].join(SOON)
    assert isinstance(sessions.faces[1], CancelledRun)
    sessions.finish()
    assert [number for number, _ in sessions.asked] == [0, 2]


def test_a_failure_reaches_the_one_who_asked():
    class Broken(PlainEngine):
        pass

    template = opened(Broken(), [], threading.Event())
    template.generator.generate = lambda prompts, indices: 1 / 0
    scheduler = Scheduler("cpu", 1)
    generate = scheduler.generate(template, threading.Event())
    with pytest.raises(ZeroDivisionError):
        generate(np.zeros((1, 1), np.float32), [0])
    scheduler.close()
    with pytest.raises(CancelledRun):
        generate(np.zeros((1, 1), np.float32), [0])


@pytest.mark.parametrize("mixed", [False, True])
def test_what_a_generator_warns_of_is_told_to_the_request_that_asked(mixed):
    """Also where a mixed batch fails and each request is served by itself."""
    told: dict[str, list[str]] = {"anna": [], "otto": []}
    gate, begun, log = threading.Event(), threading.Event(), logging.Logger("of this test")
    log.addHandler(Overheard())

    class Engine(MixingStandIn if mixed else PlainEngine):
        def generate_mixed(self, requests):
            raise ValueError("not these together")

    template = opened(Engine(), [], gate)

    def generate(prompts, indices):
        begun.set()
        gate.wait(SOON)
        log.warning("halved for %s", prompts[0])
        return [prompts]

    template.generator.generate = generate
    scheduler = Scheduler("cpu", 1)

    def request(name: str) -> None:
        listening.set(lambda line: told[name].append(line["log"]))
        scheduler.generate(template, threading.Event())([name], [0])

    threads = [threading.Thread(target=request, args=(name,)) for name in ("first", *told)]
    told["first"] = []
    threads[0].start()
    assert begun.wait(SOON)
    for thread in threads[1:]:
        thread.start()
    while scheduler.depth < 2:  # the others wait, for one batch
        pass
    gate.set()
    for thread in threads:
        thread.join()
    scheduler.close()
    assert told == {name: [f"halved for {name}"] for name in told}
