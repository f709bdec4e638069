"""Train the mouth network: `python -m musetalk.training.train --tracks FOLDER … --strangers FOLDER`.

Speech is synthesized by every engine the machine has, encoded once, and kept under --work_dir, as are the
members' checkpoints: an interrupted run goes on where it stopped. --tracks names folders of real speech with
measured mouths (see `corpus.read_clips` for their forms); without one the network learns from synthetic
speech alone: it then follows the phones but not how far and how fast people move. --strangers names a folder
of clips that nothing is learned from, to judge the network by. The same machine, engines and seed give the
same file, if nothing interrupts the speaking: espeak-ng's noise goes on from one sentence to the next.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from musetalk.config import LITE_MODELS, REPOSITORY
from musetalk.engines.lite.parameters import HIGH, LOW
from musetalk.engines.lite.speech import NETWORK_FILE, open_session
from musetalk.errors import InputError, MuseTalkError
from musetalk.files import replace_file
from musetalk.training import corpus, report, voices
from musetalk.training.convert_encoder import ENCODER_PATH
from musetalk.training.judge import Judge
from musetalk.training.plots import draw_panels
from musetalk.whisper import STEPS_PER_SECOND

if TYPE_CHECKING:
    import torch

    from musetalk.training.mouth_model import Follower, Labeller, Member, Projection

    Kind = TypeVar("Kind", bound=Member)

logger = logging.getLogger(__name__)

LABELLERS, LABELLER_STEPS = 3, 600
FOLLOWERS, FOLLOWER_STEPS = 8, 400  # longer, and they follow those they learn from, and strangers less
BATCH = 32
WINDOW = 100  # steps of 20 ms
EDGE = 6  # steps that the network looks to each side
PEAK_RATE = 3e-3  # of AdamW, one cycle
CHECKPOINT_STEPS = 100
THREADS = 1  # more of them gain little on so small a network, and lose much on a busy machine
OPENING_ALONE = 0.06  # eye distances for each deviation, where followers alone open the mouth
STILL_SECONDS = 400  # of sound that isn't speech
JUDGING_ONLY = ("wild", "news_ar")  # groups of clips whose terms allow judging a network, not training it


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


def real_recordings(
    clips: Sequence[corpus.Clip], encode: corpus.Encode, work_dir: Path, seed: int
) -> Iterator[Recording]:
    """The speakers of clips that may be learned from, encoded now or read from an earlier run."""
    allowed = [clip for clip in clips if clip.group not in JUDGING_ONLY]
    for name, spoken in corpus.learnable(allowed).items():
        path = work_dir / f"seed{seed}_tracks_{name}.npz"
        if path.exists():
            yield load_recording(path)
            continue
        samples = list(corpus.real_samples(spoken, encode))
        logger.info("%s: %d clips of real speech", name, len(spoken))
        yield save_recording(path, Recording(name, spoken[0].language, samples))


def projected(recordings: Sequence[Recording], projection: Projection) -> list[Recording]:
    """The recordings with components in place of their hidden states."""
    return [
        recording._replace(
            samples=[
                sample._replace(states=projection.components(sample.states)) for sample in recording.samples
            ]
        )
        for recording in recordings
    ]


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


def train_labeller(recordings: Sequence[Recording], seed: int, steps: int, path: Path) -> Labeller:
    """A labeller trained on projected synthetic speech; `path` holds its last checkpoint, gone on from."""
    import torch

    from musetalk.training.mouth_model import Labeller, synthetic_loss

    torch.manual_seed(seed)
    spread = parameter_spread(recordings)

    def loss(member: torch.nn.Module, batch: Sequence[torch.Tensor]) -> torch.Tensor:
        components, loudness, truth, weight = batch
        return synthetic_loss(member(components, loudness), truth, weight, spread)

    return _trained(Labeller(), recordings, loss, seed, steps, path)


def train_follower(recordings: Sequence[Recording], seed: int, steps: int, path: Path) -> Follower:
    """A follower trained on projected speech of filmed speakers, checkpoints as `train_labeller`'s."""
    import torch

    from musetalk.training.mouth_model import Follower, following_loss

    torch.manual_seed(seed)

    def loss(member: torch.nn.Module, batch: Sequence[torch.Tensor]) -> torch.Tensor:
        components, loudness, truth, weight = batch
        return following_loss(member(components, loudness), truth, weight)

    follower = _trained(Follower(len(corpus.MEASURED)), recordings, loss, seed, steps, path)
    _standardize(follower, recordings)
    return follower


def _standardize(follower: Follower, recordings: Sequence[Recording]) -> None:
    """Brings what it says of the filmed speech to mean 0 and deviation 1: the loss hardly asks how far."""
    import torch

    said = []
    with torch.no_grad():
        for sample in (sample for recording in recordings for sample in recording.samples):
            components, loudness = (torch.from_numpy(x)[None] for x in (sample.states, sample.loudness))
            said.append(follower(components, loudness)[0][torch.from_numpy(sample.weight) > 0])
        deviation, mean = torch.std_mean(torch.cat(said), 0)
        last = follower.convolution(-1)
        last.weight.div_(deviation[:, None, None])
        if last.bias is not None:
            last.bias.sub_(mean).div_(deviation)


def _trained(
    member: Kind,
    recordings: Sequence[Recording],
    loss_of: Callable[[torch.nn.Module, Sequence[torch.Tensor]], torch.Tensor],
    seed: int,
    steps: int,
    path: Path,
) -> Kind:
    import torch

    optimizer = torch.optim.AdamW(member.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, steps)
    rng = np.random.default_rng(seed)
    batches = Batches(recordings, rng)
    parts = {"member": member, "optimizer": optimizer, "schedule": schedule}
    for step in range(_resume(path, parts, rng), steps):
        loss = loss_of(member, batches.draw(BATCH))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % CHECKPOINT_STEPS == 0 or step + 1 == steps:
            _checkpoint(path, parts, rng, step + 1)
            logger.info("%s: step %d of %d, loss %.3f", path.stem, step + 1, steps, loss.item())
    return member.eval()


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
    """What there is to learn from, and labelled sound to be judged on; `still` is sound that isn't speech."""

    synthetic: list[Recording]
    real: list[Recording]
    still: Recording
    held_out_clean: list[Recording]
    held_out_degraded: list[Recording]
    held_out_still: Recording


def build_corpus(tracks: Sequence[Path], work_dir: Path, seed: int) -> Corpus:
    """Speak, degrade and encode everything; what an earlier run kept in `work_dir` is read."""
    encode = encoder()
    synthetic = list(synthetic_recordings(voices.training_voices(), encode, work_dir, seed))
    unheard = voices.held_out_voices()
    clean = list(synthetic_recordings(unheard, encode, work_dir, seed, corpus.as_it_is))
    degraded = list(synthetic_recordings(unheard, encode, work_dir, seed))
    clips = [clip for folder in tracks for clip in corpus.read_clips(folder)]
    return Corpus(
        synthetic,
        list(real_recordings(clips, encode, work_dir, seed)),
        still_recording(STILL_SECONDS, encode, seed),
        clean,
        degraded,
        still_recording(STILL_SECONDS // 4, encode, seed + 1000),
    )


def still_recording(seconds: int, encode: corpus.Encode, seed: int) -> Recording:
    """Noise, hum, clicks and music, in which a mouth rests."""
    rng = np.random.default_rng([seed, zlib.crc32(b"still")])
    return Recording("still", "", list(corpus.still_samples(seconds, encode, rng)))


def fitted_projection(found: Corpus, path: Path) -> Projection:
    """The components of all voices that are learned from, fitted now or read from an earlier run's `path`."""
    from musetalk.training.mouth_model import Projection, fit_projection

    if not path.exists():
        heard = [[sample.states for sample in r.samples] for r in (*found.synthetic, *found.real)]
        fitted = fit_projection(heard)
        partial = path.with_suffix(".part")
        with partial.open("wb") as file:
            np.savez(file, mean=fitted.mean, directions=fitted.directions)
        replace_file(partial, path)
    with np.load(path) as stored:
        return Projection(stored["mean"], stored["directions"])


class Trained(NamedTuple):
    """All parts of a network."""

    projection: Projection
    labellers: list[Labeller]
    followers: list[Follower]


def train_members(found: Corpus, work_dir: Path, seed: int) -> Trained:
    """The components and every member; seeds count up from `seed` × 100."""
    projection = fitted_projection(found, work_dir / f"seed{seed}_components.npz")
    labelled = projected([*found.synthetic, found.still], projection)
    filmed = projected(found.real, projection)
    labellers = [
        train_labeller(labelled, seed * 100 + i, LABELLER_STEPS, work_dir / f"seed{seed}_labeller_{i}.pt")
        for i in range(LABELLERS)
    ]
    followers = [
        train_follower(filmed, seed * 100 + i, FOLLOWER_STEPS, work_dir / f"seed{seed}_follower_{i}.pt")
        for i in range(FOLLOWERS if filmed else 0)
    ]
    return Trained(projection, labellers, followers)


def predictor(network: bytes) -> report.Predict:
    """A mouth network's ONNX file as a function of a sample."""
    import onnxruntime

    session = onnxruntime.InferenceSession(network, providers=["CPUExecutionProvider"])

    def predict(sample: corpus.Sample) -> np.ndarray:
        states = sample.states.transpose(1, 0, 2).astype(np.float32)
        (values,) = session.run(None, {"hidden_states": states, "loudness": sample.loudness})
        return np.clip(values, LOW, HIGH)

    return predict


def score(network: bytes, found: Corpus) -> dict[str, report.SyntheticScores]:
    """Judge a network's ONNX file on the labelled speech that nothing was learned from."""
    predict = predictor(network)
    result = {}
    for kind, recordings in (("", found.held_out_clean), (", degraded", found.held_out_degraded)):
        for language, name in (("en", "English"), ("cmn", "Mandarin")):
            samples = [s for r in recordings if r.language == language for s in r.samples]
            if samples:
                result[name + kind] = report.synthetic_scores(samples, predict)
    return result


def variants(trained: Trained) -> dict[str, bytes]:
    """Networks with one ingredient less, made of the same members."""
    from musetalk.training.mouth_model import Mix, export

    whole = trained.projection, trained.labellers
    networks = {"labellers alone": export(*whole, [])}
    if trained.followers:
        networks |= {
            "one follower": export(*whole, trained.followers[:1]),
            "followers' opening alone": export(*trained, Mix(OPENING_ALONE, 0.0)),
            "labellers' width alone": export(*trained, Mix(width_followed=0.0)),
            "followers' width alone": export(*trained, Mix(width_labelled=0.0)),
            "mouth not earlier": export(*trained, advance=0),
        }
    return {**networks, "what ships": export(*trained)}


def train(
    tracks: Sequence[Path],
    strangers: Path | None,
    beside: Path | None,
    output: Path,
    work_dir: Path,
    seed: int,
) -> None:
    """Train all members and write the network and its report into `output`.

    Args:
        tracks: folders of clips to learn from.
        strangers: a folder of clips to judge by.
        beside: another network's ONNX file to judge, the one before say.

    Raises:
        InputError: the machine has no synthesizer, or a folder can't be read.
    """
    import torch

    begun = time.monotonic()
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    work_dir.mkdir(parents=True, exist_ok=True)
    found = build_corpus(tracks, work_dir, seed)
    if not found.synthetic:
        raise InputError("no speech synthesizer was found", "install flite, festival or espeak-ng")
    if not found.real:
        logger.warning("no --tracks: learning from synthetic speech alone follows real mouths less well")
    trained = train_members(found, work_dir, seed)
    networks = variants(trained)
    output.mkdir(parents=True, exist_ok=True)
    (output / NETWORK_FILE).write_bytes(networks["what ships"])
    if beside:
        networks = {"the network before": beside.read_bytes(), **networks}
    _write_report(output, found, networks, strangers, f"seed {seed}")
    logger.info("done in %.0f min", (time.monotonic() - begun) / 60)


def _write_report(
    output: Path, found: Corpus, networks: dict[str, bytes], strangers: Path | None, how: str
) -> None:
    learned = [recording.name for recording in found.real]
    clips = [
        clip
        for clip in (corpus.read_clips(strangers) if strangers else [])
        if not any(name.startswith(f"{clip.group}_") for name in learned)
    ]
    judged = Judge(clips)
    rows = {name: judged(network) for name, network in networks.items()} if clips else {}
    predict = predictor(networks["what ships"])
    shown = [*found.held_out_clean[:1], *found.held_out_clean[-1:]]
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
    labelled = {name: score(network, found) for name, network in networks.items()}
    stillness = report.largest_openings(found.held_out_still.samples, corpus.STILL_KINDS, predict)
    text = report.page(how, seconds, learned, labelled, stillness, rows)
    (output / "REPORT.md").write_text(text, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="train the lite engine's mouth network")
    parser.add_argument(
        "--tracks",
        type=Path,
        nargs="+",
        default=[],
        help="folders of real speech to learn from: tracks.npz with flac files, or SPEAKER/*.mpg",
    )
    parser.add_argument("--strangers", type=Path, help="folder of clips to judge the network by")
    parser.add_argument("--beside", type=Path, help="another mouth network to judge, for the report")
    parser.add_argument("--output", type=Path, default=LITE_MODELS)
    parser.add_argument("--work_dir", type=Path, default=REPOSITORY / "output" / "lite_training")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        train(
            options.tracks,
            options.strangers,
            options.beside,
            options.output,
            options.work_dir,
            options.seed,
        )
    except MuseTalkError as e:
        logger.error("%s. %s", e.message, e.hint)
        return e.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
