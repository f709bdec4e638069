"""One worker's share: what a cancelled task leaves."""

from __future__ import annotations

import threading

from musetalk.batch.clips import ClipMaker, Setup
from musetalk.batch.jobs import Settings, make_jobs
from musetalk.config import EngineConfig
from musetalk.templates.store import TemplateStore


def test_a_cancelled_preparation_leaves_no_template(portrait, tmp_path):
    row = {"template": str(portrait), "audio": "a.wav", "output": "o.mp4"}
    (job,), _ = make_jobs([row], Settings(EngineConfig(engine="lite")))
    cancel, maker = threading.Event(), ClipMaker(Setup(tmp_path), "cpu")
    cancel.set()
    assert maker.prepare(job, cancel).exit_code == 130
    assert TemplateStore(tmp_path).template_ids() == []
    cancel.clear()
    assert not maker.prepare(job, cancel).failed
    assert TemplateStore(tmp_path).template_ids() == [job.template_id]
