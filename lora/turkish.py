"""Is a Turkish word used in a sentence? Its stem, as it changes, with nothing but endings behind it.

Turkish inflects by hanging endings on a stem, in a fixed order, and the stem may change where they meet it:

    kitap  + -ı    kitabı      a last p, ç, t, k becomes b, c, d, ğ before a vowel (renk, rengi)
    ağız   + -ı    ağzı        some words lose the vowel of their last syllable
    git-   + -iyor gidiyor     the same softening in verbs
    başla- + -ıyor başlıyor    a last a, e narrows before -yor (de-, ye-: diyor, diyecek)

A token counts if it is one of these stems with a row of endings behind it. That tells "elleri" (el, hand) from "elmayı"
(elma, apple). Vowel harmony is not checked: this recognises words in text that is Turkish, not whether it is.
"""

from __future__ import annotations

import re

_SOFT = {"p": "b", "ç": "c", "t": "d", "k": "ğ", "g": "ğ"}
_PRONOUNS = {"ben": "ban", "sen": "san", "o": "on", "bu": "bun", "şu": "şun"}  # bana, sana, ona: irregular

# Endings by their sounds. A is a or e; I is ı, i, u or ü; D and C are d and c, but t and ç after a voiceless consonant;
# K is k or ğ. What stands in (brackets) comes only after a vowel if it is a consonant, only after a consonant if a
# vowel.
_VOWEL, _VOICELESS = "aeıioöuü", "fstkçşhp"
_SOUNDS = {
    "A": "[ae]",
    "I": "[ıiuü]",
    "D": f"(?:(?<=[{_VOICELESS}])t|(?<![{_VOICELESS}])d)",
    "C": f"(?:(?<=[{_VOICELESS}])ç|(?<![{_VOICELESS}])c)",
    "K": "[kğ]",
    "(I)": f"(?<![{_VOWEL}])[ıiuü]",
    "(A)": f"(?<![{_VOWEL}])[ae]",
    **{f"({letter})": f"(?<=[{_VOWEL}]){letter}" for letter in "ynsm"},
}


def _slot(endings: str) -> str:
    """A place that one of these endings may fill."""
    sounds = (re.findall(r"\(.\)|.", ending) for ending in endings.split())
    return f"(?:{'|'.join(''.join(_SOUNDS.get(sound, sound) for sound in ending) for ending in sounds)})?"


# plural, whose, case, "the one at", is/was
_NOUN = "".join(
    map(
        _slot,
        (
            "lAr",
            "(I)m (m) (I)n (n) (s)I (I) (I)mIz (m)Iz (I)nIz (n)Iz",
            "(y)I nI (I) (y)A nA (A) DA nDA DAn nDAn (I)n (n)In (y)In (y)lA lA CA",
            "ki kiler",
            "(y)Im (I)m sIn (y)Iz (I)z sInIz DIr DI DIm DIn DIk (y)DI (y)DIm (y)DIn (y)DIk mIş (y)mIş sA (y)sA (y)ken",
        ),
    )
)
_FINITE = "".join(  # not, can, tense, was/if, who
    map(
        _slot,
        (
            "mA m (y)AmA AmA (y)Am Am",
            "(y)Abil Abil",
            "Iyor yor (y)AcAK AcAK DI mIş Ar Ir r z sA mAlI (y)A A",
            "DI (y)DI mIş (y)mIş sA (y)sA DIr ken",
            "m n k Im (y)Im sIn Iz (y)Iz sInIz nIz lAr lIm In InIz (y)In (y)InIz sInlAr",
        ),
    )
)
_PARTICIPLES = "mAK mA Ip (y)Ip ArAK (y)ArAK IncA (y)IncA An (y)An DIK AcAK (y)AcAK"
_VERBAL_NOUN = _slot("mA (y)AmA AmA") + _slot(_PARTICIPLES) + _NOUN


def tokens(sentence: str) -> list[str]:
    """Words in lower case (Turkish has İ, i and I, ı); an apostrophe separates a name from its endings."""
    return re.findall(r"\w+", sentence.replace("İ", "i").replace("I", "ı").lower())


def _changed(stem: str) -> set[str]:
    """A stem, and how it looks before an ending that begins with a vowel."""
    if stem[-1] not in _SOFT or (len(stem) < 3 and stem != "et"):  # atı, but ediyor
        return {stem}
    return {stem, stem[:-1] + ("g" if stem.endswith("nk") else _SOFT[stem[-1]])}


def _is_form(token: str, word: str) -> bool:
    """Whether a token is a dictionary form, inflected or not; both in lower case."""
    stems = _changed(word) | {_PRONOUNS.get(word, word)}
    if re.search(rf"[{_VOWEL}][^{_VOWEL}]+[ıiuü][^{_VOWEL}]$", word):
        stems.add(word[:-2] + word[-1])  # ağz-ı
    readings = [(stems, _NOUN)]
    if verb := re.fullmatch(r"(.+)m[ea]k", word):
        stems = _changed(verb[1])
        if verb[1][-1] in "ae":
            stems.add(verb[1][:-1])  # başl-ıyor
            stems |= {verb[1][:-1] + "i"} if len(verb[1]) == 2 else set()  # di-yecek
        readings += [(stems, _FINITE), (stems, _VERBAL_NOUN)]
    return any(re.fullmatch(f"(?:{'|'.join(map(re.escape, stems))}){endings}", token) for stems, endings in readings)


def uses(word: str, sentence: str) -> bool:
    """Whether a dictionary form stands in the sentence, inflected or not; of several words, one after the other."""
    parts, said = tokens(word), tokens(sentence)
    starts = range(len(said) - len(parts) + 1)
    return any(all(_is_form(token, part) for token, part in zip(said[start:], parts)) for start in starts)
