"""Train the mouth network: `python -m musetalk.training.train [--tracks FOLDER] [--output models/lite]`.

Speech is synthesized by every engine the machine has, encoded once, and kept under --work_dir, as are the
members' checkpoints: an interrupted run goes on where it stopped. --tracks names a folder of real speech with
measured mouths (``tracks.npz`` and ``SPEAKER.flac``, or GRID's videos as ``SPEAKER/*.mpg``); the speakers of
`HELD_OUT_SPEAKERS` are only judged on, never learned from. Without the folder the network learns from
synthetic speech alone: it then follows the phones but not how far and how fast people move, which costs
about a sixth of the opening's correlation with real mouths. The same machine, engines and seed give the same
file, if nothing interrupts the speaking: espeak-ng's noise goes on from one sentence to the next.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from musetalk.config import LITE_MODELS, REPOSITORY
from musetalk.engines.lite.parameters import HIGH, LOW
from musetalk.engines.lite.speech import NETWORK_FILE, open_session
from musetalk.errors import InputError, MuseTalkError
from musetalk.files import replace_file
from musetalk.training import corpus, report, voices
from musetalk.training.convert_encoder import ENCODER_PATH
from musetalk.training.plots import draw_panels
from musetalk.whisper import STEPS_PER_SECOND

if TYPE_CHECKING:
    import torch

    from musetalk.training.mouth_model import Member

logger = logging.getLogger(__name__)

HELD_OUT_SPEAKERS = ("s26", "s31", "x")
STEPS = 800
BATCH = 32
WINDOW = 100  # steps of 20 ms
EDGE = 6  # steps that the network looks to each side
PEAK_RATE = 2e-3  # of AdamW, one cycle
CHECKPOINT_STEPS = 100
THREADS = 1  # more of them gain little on so small a network, and lose much on a busy machine
CLEAN_SENTENCES = 60  # of a real speaker that are scored


class MemberPlan(NamedTuple):
    """One member of the mean: the share of each batch and of the loss that is real speech."""

    name: str
    real_share: float


SYNTHETIC_MEMBER = MemberPlan("synthetic", 0.0)  # alone, where there is no real speech to learn from
MEMBERS = (
    MemberPlan("both_a", 0.5),
    MemberPlan("both_b", 0.5),
    MemberPlan("both_c", 0.6),
    MemberPlan("real_a", 0.85),
    MemberPlan("real_b", 0.85),
)


class Recording(NamedTuple):
    """The samples of one speaker, synthetic or real."""

    name: str
    language: str
    samples: list[corpus.Sample]


def save_recording(path: Path, recording: Recording) -> Recording:
    """Keep a recording as an .npz file, whole or not at all; returns it."""
    columns = zip(*recording.samples, strict=True)
    joined = {
        name: np.concatenate(column) for name, column in zip(corpus.Sample._fields, columns, strict=True)
    }
    lengths = np.array([len(sample.loudness) for sample in recording.samples])
    partial = path.with_suffix(".part")
    with partial.open("wb") as file:
        labels = {"name": np.array(recording.name), "language": np.array(recording.language)}
        arrays: dict[str, Any] = {**labels, "lengths": lengths, **joined}
        np.savez(file, **arrays)
    replace_file(partial, path)
    return recording


def load_recording(path: Path) -> Recording:
    """A recording that `save_recording` kept."""
    with np.load(path) as stored:
        cuts = np.cumsum(stored["lengths"])[:-1]
        columns = [np.split(stored[name], cuts) for name in corpus.Sample._fields]
        samples = [corpus.Sample(*parts) for parts in zip(*columns, strict=True)]
        return Recording(str(stored["name"]), str(stored["language"]), samples)


def _file_name(voice: str) -> str:
    return voice.replace(":", "_").replace("/", "_")


def synthetic_recordings(
    chosen: Sequence[voices.CorpusVoice],
    encode: corpus.Encode,
    work_dir: Path,
    seed: int,
    condition: corpus.Condition = corpus.degraded,
) -> Iterator[Recording]:
    """Each voice's speech, spoken and encoded now or read from an earlier run."""
    for voice, seconds in chosen:
        kind = "" if condition is corpus.degraded else "_clean"
        path = work_dir / f"seed{seed}_{_file_name(voice.name)}_{seconds:.0f}s_{voice.language}{kind}.npz"
        if path.exists():
            yield load_recording(path)
            continue
        begun = time.monotonic()
        rng = np.random.default_rng([seed, zlib.crc32(voice.name.encode())])
        said = corpus.speak(voice, seconds, rng)
        samples = list(corpus.synthetic_samples(said, encode, rng, condition))
        logger.info("%s: %d s of speech in %.0f s", voice.name, seconds, time.monotonic() - begun)
        yield save_recording(path, Recording(voice.name, voice.language, samples))


def real_recordings(folder: Path, encode: corpus.Encode, work_dir: Path, seed: int) -> Iterator[Recording]:
    """The speakers of a folder of tracks, encoded now or read from an earlier run."""
    measured = (folder / "tracks.npz").exists()
    for speaker in corpus.read_tracks(folder) if measured else corpus.measure_speakers(folder):
        path = work_dir / f"seed{seed}_tracks_{speaker.name}.npz"
        if path.exists():
            yield load_recording(path)
            continue
        rng = np.random.default_rng([seed, zlib.crc32(speaker.name.encode())])
        samples = list(corpus.real_samples(speaker, encode, rng))
        logger.info("%s: %d sentences of real speech", speaker.name, len(speaker.waveforms))
        yield save_recording(path, Recording(speaker.name, "en", samples))


class Batches:
    """Random windows of `WINDOW` steps out of samples, longer samples more often.

    The network meets the begin and end of a sound with nothing beyond them, so every fifth window lies at
    one; elsewhere the outermost steps, whose neighbours were cut off, have no weight.
    """

    def __init__(self, recordings: Sequence[Recording], rng: np.random.Generator) -> None:
        every = [sample for recording in recordings for sample in recording.samples]
        self.samples = [sample for sample in every if len(sample.loudness) >= WINDOW]
        self.rng = rng
        lengths = np.array([len(sample.loudness) for sample in self.samples], float)
        self.chances = lengths / lengths.sum() if len(lengths) else lengths

    def draw(self, size: int) -> list[torch.Tensor]:
        """States, loudness, truth and weight, float32, each (size, `WINDOW`, …)."""
        import torch

        chosen = self.rng.choice(len(self.samples), size, p=self.chances)
        rows = [self._window(self.samples[i]) for i in chosen]
        return [torch.from_numpy(np.stack(column)).float() for column in zip(*rows, strict=True)]

    def _window(self, sample: corpus.Sample) -> corpus.Sample:
        last = len(sample.loudness) - WINDOW
        begin = int(self.rng.integers(0, last + 1))
        edge = self.rng.random()
        begin = 0 if edge < 0.1 else last if edge < 0.2 else begin
        window = corpus.Sample(*(values[begin : begin + WINDOW] for values in sample))
        weight = window.weight.copy()
        if begin > 0:
            weight[:EDGE] = 0
        if begin < last:
            weight[-EDGE:] = 0
        return window._replace(weight=weight)


def parameter_spread(recordings: Sequence[Recording]) -> torch.Tensor:
    """(10,) what counts as one unit of each rig parameter's error: its deviation, not less than 0.03."""
    import torch

    truth = np.concatenate([sample.truth for recording in recordings for sample in recording.samples])
    return torch.from_numpy(truth.std(0) + 0.03)


def train_member(
    plan: MemberPlan,
    synthetic: Sequence[Recording],
    real: Sequence[Recording],
    seed: int,
    steps: int,
    path: Path,
) -> Member:
    """A trained member; `path` holds its last checkpoint and is gone on from where it exists."""
    import torch

    from musetalk.training.mouth_model import Member

    torch.manual_seed(seed)
    member = Member()
    optimizer = torch.optim.AdamW(member.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, steps)
    rng = np.random.default_rng(seed)
    spoken, filmed = Batches(synthetic, rng), Batches(real, rng)
    spread = parameter_spread(synthetic)
    parts = {"member": member, "optimizer": optimizer, "schedule": schedule}
    first = _resume(path, parts, rng)
    for step in range(first, steps):
        loss = _batch_loss(member, plan.real_share, spoken, filmed, spread)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % CHECKPOINT_STEPS == 0 or step + 1 == steps:
            _checkpoint(path, parts, rng, step + 1)
            logger.info("%s: step %d of %d, loss %.3f", plan.name, step + 1, steps, loss.item())
    return member.eval()


def _batch_loss(
    member: Member, real_share: float, spoken: Batches, filmed: Batches, spread: torch.Tensor
) -> torch.Tensor:
    """The loss of one drawn batch, of which `real_share` is real speech."""
    import torch

    from musetalk.training.mouth_model import real_loss, synthetic_loss

    n_real = round(BATCH * real_share)
    losses = []
    if n_real < BATCH:
        states, loudness, truth, weight = spoken.draw(BATCH - n_real)
        loss = synthetic_loss(member(states, loudness), truth, weight, spread)
        losses.append((1 - real_share) * loss)
    if n_real:
        states, loudness, truth, weight = filmed.draw(n_real)
        losses.append(real_share * real_loss(member(states, loudness), truth, weight))
    return torch.stack(losses).sum()


def _checkpoint(path: Path, parts: dict, rng: np.random.Generator, step: int) -> None:
    import torch

    state = {name: part.state_dict() for name, part in parts.items()}
    state |= {"step": step, "torch_rng": torch.get_rng_state(), "rng": json.dumps(rng.bit_generator.state)}
    partial = path.with_suffix(".part")
    torch.save(state, partial)
    replace_file(partial, path)


def _resume(path: Path, parts: dict, rng: np.random.Generator) -> int:
    """Bring the parts to the checkpoint's state; returns the steps done."""
    import torch

    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    torch.set_rng_state(state["torch_rng"])
    rng.bit_generator.state = json.loads(state["rng"])
    return state["step"]


def encoder() -> corpus.Encode:
    """The bundled Whisper encoder as a function."""
    session = open_session(ENCODER_PATH)
    return lambda mel: session.run(None, {"mel": mel})[0]


class Corpus(NamedTuple):
    """What there is to learn from and to be judged on."""

    synthetic: list[Recording]
    real: list[Recording]
    held_out_clean: list[Recording]
    held_out_degraded: list[Recording]
    held_out_real: list[Recording]


def build_corpus(tracks: Path | None, work_dir: Path, seed: int) -> Corpus:
    """Speak, degrade and encode everything; what an earlier run kept in `work_dir` is read."""
    encode = encoder()
    synthetic = list(synthetic_recordings(voices.training_voices(), encode, work_dir, seed))
    unheard = voices.held_out_voices()
    clean = list(synthetic_recordings(unheard, encode, work_dir, seed, corpus.as_it_is))
    degraded = list(synthetic_recordings(unheard, encode, work_dir, seed))
    real = list(real_recordings(tracks, encode, work_dir, seed)) if tracks else []
    return Corpus(
        synthetic,
        [recording for recording in real if recording.name not in HELD_OUT_SPEAKERS],
        clean,
        degraded,
        [recording for recording in real if recording.name in HELD_OUT_SPEAKERS],
    )


class Ablation(NamedTuple):
    """One ingredient less or alone: which recordings, the share of real speech, whether loudness is heard."""

    name: str
    voices: str  # prefix of the synthetic voices' names
    languages: tuple[str, ...]
    real_share: float
    loudness: bool = True


ABLATIONS = (
    Ablation("flite alone", "flite", ("en",), 0.0),
    Ablation("every synthesizer, English alone", "", ("en",), 0.0),
    Ablation("every synthesizer", "", ("en", "cmn"), 0.0),
    Ablation("real speech alone", "", ("en", "cmn"), 1.0),
    Ablation("both, real speech 6 of 10", "", ("en", "cmn"), 0.6),
    Ablation("the same, deaf to loudness", "", ("en", "cmn"), 0.6, loudness=False),
)
ABLATION_STEPS = 250


def _deafened(recordings: Sequence[Recording]) -> list[Recording]:
    """The recordings with no word of how loud they are."""
    return [
        recording._replace(
            samples=[sample._replace(loudness=np.zeros_like(sample.loudness)) for sample in recording.samples]
        )
        for recording in recordings
    ]


def predictor(members: Sequence[Member]) -> report.Predict:
    """The mean of the members as a function of a sample."""
    import torch

    from musetalk.training.mouth_model import decided

    def predict(sample: corpus.Sample) -> np.ndarray:
        states = torch.from_numpy(sample.states[None]).float()
        loudness = torch.from_numpy(sample.loudness[None]).float()
        with torch.no_grad():
            mean = torch.stack([member(states, loudness)[0] for member in members]).mean(0)
        return np.clip(decided(mean).numpy(), LOW, HIGH)

    return predict


def score(predict: report.Predict, found: Corpus) -> report.Scores:
    """Judge a network on the held-out parts of the corpus."""
    synthetic = {}
    for kind, recordings in (("", found.held_out_clean), (", degraded", found.held_out_degraded)):
        for language, name in (("en", "English"), ("cmn", "Mandarin")):
            samples = [s for r in recordings if r.language == language for s in r.samples]
            if samples:
                synthetic[name + kind] = report.synthetic_scores(samples, predict)
    real = {}
    for recording in (*found.held_out_real, *found.real):
        clean = recording.samples[::2][:CLEAN_SENTENCES]
        held_out = recording.name in HELD_OUT_SPEAKERS
        name = f"{recording.name}, held out" if held_out else f"{recording.name}, learned from"
        real[name] = report.real_scores(clean, predict, recording.name == "x")
    return report.Scores(synthetic, real)


def run_ablations(found: Corpus, work_dir: Path, seed: int) -> dict[str, report.Scores]:
    """Train and score a member for each of `ABLATIONS` that the corpus allows."""
    rows = {}
    for ablation in ABLATIONS:
        if ablation.real_share and not found.real:
            continue
        chosen = [
            recording
            for recording in found.synthetic
            if recording.name.startswith(ablation.voices) and recording.language in ablation.languages
        ]
        if not chosen:
            continue
        judged = found
        if not ablation.loudness:
            judged = Corpus(*(_deafened(part) for part in found))
            chosen = _deafened(chosen)
        path = work_dir / f"seed{seed}_ablation_{ablation.name.replace(' ', '_')}.pt"
        plan = MemberPlan(ablation.name, ablation.real_share)
        member = train_member(plan, chosen, judged.real, seed, ABLATION_STEPS, path)
        rows[ablation.name] = score(predictor([member]), judged)
    return rows


def train(tracks: Path | None, output: Path, work_dir: Path, seed: int, steps: int, ablations: bool) -> None:
    """Train all members and write the network and its report into `output`.

    Raises:
        InputError: the machine has no synthesizer, or `tracks` can't be read.
    """
    import torch

    from musetalk.training.mouth_model import export

    begun = time.monotonic()
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    work_dir.mkdir(parents=True, exist_ok=True)
    found = build_corpus(tracks, work_dir, seed)
    if not found.synthetic:
        raise InputError("no speech synthesizer was found", "install flite, festival or espeak-ng")
    if not found.real:
        logger.warning(
            "no --tracks: learning from synthetic speech alone, which costs about a sixth of the opening's "
            "correlation with real mouths"
        )
    members = []
    for i, plan in enumerate(MEMBERS if found.real else [SYNTHETIC_MEMBER], 1):
        path = work_dir / f"seed{seed}_{plan.name}_{steps}.pt"
        members.append(train_member(plan, found.synthetic, found.real, seed * 100 + i, steps, path))
    output.mkdir(parents=True, exist_ok=True)
    (output / NETWORK_FILE).write_bytes(export(members))
    predict = predictor(members)
    reached = score(predict, found)
    rows = {**run_ablations(found, work_dir, seed), "what ships": reached} if ablations else {}
    _write_report(output, found, predict, reached, rows, f"seed {seed}, {steps} steps a member")
    logger.info("done in %.0f min", (time.monotonic() - begun) / 60)


def _write_report(
    output: Path,
    found: Corpus,
    predict: report.Predict,
    reached: report.Scores,
    ablations: dict[str, report.Scores],
    how: str,
) -> None:
    shown = [*found.held_out_clean[:1], *found.held_out_clean[-1:], *found.held_out_real[:2]]
    panels = [
        panel
        for recording in shown
        for panel in report.sample_panels(recording.samples[0], predict, recording.name)
    ]
    draw_panels(panels, output / "curves.png")
    seconds = {
        f"{recording.name} ({recording.language})": sum(len(s.loudness) for s in recording.samples)
        / STEPS_PER_SECOND
        for recording in found.synthetic
    }
    text = report.page(how, seconds, [recording.name for recording in found.real], reached, ablations)
    (output / "REPORT.md").write_text(text, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="train the lite engine's mouth network")
    parser.add_argument(
        "--tracks", type=Path, help="folder of real speech: tracks.npz and SPEAKER.flac, or SPEAKER/*.mpg"
    )
    parser.add_argument("--output", type=Path, default=LITE_MODELS)
    parser.add_argument("--work_dir", type=Path, default=REPOSITORY / "output" / "lite_training")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps of each member")
    parser.add_argument("--ablations", action="store_true", help="also measure what each ingredient is worth")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        train(
            options.tracks, options.output, options.work_dir, options.seed, options.steps, options.ablations
        )
    except MuseTalkError as e:
        logger.error("%s. %s", e.message, e.hint)
        return e.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
