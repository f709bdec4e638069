"""Sentences for synthetic speech, drawn by seed: English from word lists and a grammar, Mandarin as pinyin.

The lists were written for this purpose: every phone in many neighbourhoods, p, b, m, f and v often. Mandarin
draws from all syllables, because coverage counts here and meaning doesn't.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from musetalk.training.voices import Language

Rng = np.random.Generator


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_NOUNS = _words("""
    baby mother father brother people papa woman farmer doctor painter window table plate paper pencil
    book boat apple pepper lemon plum berry peach bread butter coffee tea milk water fire fish bird
    puppy camel monkey elephant giraffe mouse house room roof garden farm forest river bridge road
    street village city market shop museum theatre movie music drum piano violin voice mouth lip tooth
    thumb finger shoulder knee foot shoe shirt coat hat glove watch clock hour morning evening month
    year spring autumn weather storm cloud rain snow sun moon planet ship wave beach island ocean bottle
    cup spoon knife fork bowl box bag key lamp mirror chair sofa bed pillow blanket towel soap brush
    camera phone computer screen button engine wheel bicycle train airport picture letter number
    question answer idea problem reason story history science nature future measure vision treasure
    pleasure garage beige judge jury law job office boss team member company budget price money bank
""")
_VERBS = _words("""
    makes finds moves brings keeps leaves buys sells opens closes watches likes loves hates knows thinks
    remembers forgets paints builds breaks fixes washes cleans pushes pulls throws catches follows meets
    helps calls asks tells shows gives takes borrows wants needs sees hears feels touches tastes smells
    chooses carries covers
""")
_ADJECTIVES = _words("""
    big small warm cold old young new blue brown purple orange yellow white black green red quiet loud
    soft hard smooth rough heavy light thick thin wide narrow deep shallow fast slow happy angry brave
    funny famous simple beautiful wonderful terrible possible empty full fresh sweet sour bitter wet dry
    clean dirty rich poor foolish
""")
_ADVERBS = _words("""
    today tomorrow yesterday always never often usually maybe probably soon now then here there
    everywhere slowly quickly carefully easily very badly quite well again together before lunch after
    work at home by the river
""")
_PLACES = (
    "in the garden",
    "by the window",
    "on the table",
    "under the bridge",
    "near the museum",
    "at the airport",
    "behind the house",
    "from above",
    "with my family",
    "for both of them",
    "through the forest",
    "over the wall",
    "between the shops",
    "before five",
)
_OPENERS = (
    "well",
    "oh",
    "you know",
    "of course",
    "to be fair",
    "in my view",
    "as far as I remember",
    "by the way",
    "honestly",
    "so",
    "but why",
    "good morning everybody",
    "thank you very much",
    "excuse me",
    "what a pity",
    "have a good time",
    "please wait a moment",
)
_PEOPLE = _words("""
    I you we they my_mother Bob Mary Philip Vivian nobody everyone the_whole_team somebody Joe Emma
""")
_LETTERS = _words("""
    a b c d e f g h i j k l m n o p q r s t u v w x y z
""")
_DIGITS = _words("""
    zero one two three four five six seven eight nine ten eleven twelve fifteen thirty fifty a_hundred
""")
_FINALS = {
    "b": "a ai an ang ao ei en eng i ian iao ie in ing o u",
    "p": "a ai an ang ao ei en eng i ian iao ie in ing o ou u",
    "m": "a ai an ang ao e ei en eng i ian iao ie in ing iu o ou u",
    "f": "a an ang ei en eng o ou u",
    "d": "a ai an ang ao e ei eng i ian iao ie ing iu ong ou u uan ui un uo",
    "t": "a ai an ang ao e eng i ian iao ie ing ong ou u uan ui un uo",
    "n": "a ai an ang ao e ei en eng i ian iang iao ie in ing iu ong u uan uo v ve",
    "l": "a ai an ang ao e ei eng i ia ian iang iao ie in ing iu ong ou u uan un uo v ve",
    "g": "a ai an ang ao e ei en eng ong ou u ua uai uan uang ui un uo",
    "k": "a ai an ang ao e en eng ong ou u ua uai uan uang ui un uo",
    "h": "a ai an ang ao e ei en eng ong ou u ua uai uan uang ui un uo",
    "j": "i ia ian iang iao ie in ing iong iu u uan ue un",
    "q": "i ia ian iang iao ie in ing iong iu u uan ue un",
    "x": "i ia ian iang iao ie in ing iong iu u uan ue un",
    "zh": "a ai an ang ao e en eng i ong ou u ua uan uang ui un uo",
    "ch": "a ai an ang ao e en eng i ong ou u uai uan uang ui un uo",
    "sh": "a ai an ang ao e ei en eng i ou u ua uai uan uang ui un uo",
    "r": "an ang ao e en eng i ong ou u uan ui un uo",
    "z": "a ai an ang ao e ei en eng i ong ou u uan ui un uo",
    "c": "a ai an ang ao e en eng i ong ou u uan ui un uo",
    "s": "a ai an ang ao e en eng i ong ou u uan ui un uo",
    "y": "a an ang ao e i in ing ong ou u uan ue un",
    "w": "a ai an ang ei en eng o u",
    "": "ai an ang ao e en er ou",
}
# What Mandarin says most, so that the corpus has its rhythm; the rest is drawn from all syllables.
_COMMON = _words("""
    de5 shi4 bu4 wo3 ni3 ta1 men5 zhe4 ge4 yi1 you3 le5 zai4 ren2 zhong1 guo2 da4 lai2 shang4 dao4 shuo1
    wei4 he2 hao3 xue2 sheng1 jia1 hui4 ke3 yi3 ming2 tian1 jin1 nian2 ba3 bei3 peng2 mei2 ma5 fei1
    fang1 wen4 ti2
""")
SYLLABLES = [initial + final for initial, finals in _FINALS.items() for final in finals.split()]


def _pick(rng: Rng, words: Sequence[str]) -> str:
    return words[int(rng.integers(len(words)))].replace("_", " ")


def _noun_phrase(rng: Rng) -> str:
    adjective = _pick(rng, _ADJECTIVES) + " " if rng.random() < 0.5 else ""
    return (
        f"{_pick(rng, ('the', 'a', 'my', 'this', 'every', 'their', 'some'))} {adjective}{_pick(rng, _NOUNS)}"
    )


def english_sentence(rng: Rng) -> str:
    """A sentence of 6 to 20 words; one in six spells letters and digits."""
    if rng.random() < 1 / 6:
        return " ".join(_pick(rng, _LETTERS if rng.random() < 0.5 else _DIGITS) for _ in range(8)) + "."
    subject = _pick(rng, _PEOPLE) if rng.random() < 0.5 else _noun_phrase(rng)
    clause = f"{subject} {_pick(rng, _VERBS)} {_noun_phrase(rng)} {_pick(rng, _PLACES)}"
    if rng.random() < 0.5:
        clause = f"{_pick(rng, _OPENERS)}, {clause}"
    if rng.random() < 0.5:
        clause += f", {_pick(rng, ('and', 'but', 'because', 'while', 'so'))} {_noun_phrase(rng)}"
        clause += f" {_pick(rng, _VERBS)} {_noun_phrase(rng)} {_pick(rng, _ADVERBS)}"
    return clause + _pick(rng, (".", ".", "?", "!"))


def mandarin_sentence(rng: Rng) -> str:
    """Pinyin with tone digits: one to three clauses of 4 to 9 syllables."""

    def syllable() -> str:
        if rng.random() < 0.4:
            return _pick(rng, _COMMON)
        return _pick(rng, SYLLABLES) + str(rng.integers(1, 5))

    clauses = [" ".join(syllable() for _ in range(rng.integers(4, 10))) for _ in range(rng.integers(1, 4))]
    return ", ".join(clauses) + "."


SENTENCES: dict[Language, Callable[[Rng], str]] = {"en": english_sentence, "cmn": mandarin_sentence}
