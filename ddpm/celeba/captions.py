r"""Forty CelebA attributes <-> one English sentence.

    describe   attributes -> "a smiling young man with black hair and a mustache, wearing eyeglasses"
    parse      sentence   -> {"Smiling": True, "Young": True, "Male": True, "Black_Hair": True, ...}
    consistent attributes -> the attributes once their contradictions are resolved

One table, `PHRASES`, holds every wording. `describe` reads it from left to right, `parse` from right to left,
and for every row of attributes they agree: what `parse(describe(row))` states is true of `consistent(row)`."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

# The names and the order of list_attr_celeba.txt.
NAMES = """
    5_o_Clock_Shadow Arched_Eyebrows Attractive Bags_Under_Eyes Bald Bangs Big_Lips Big_Nose
    Black_Hair Blond_Hair Blurry Brown_Hair Bushy_Eyebrows Chubby Double_Chin Eyeglasses
    Goatee Gray_Hair Heavy_Makeup High_Cheekbones Male Mouth_Slightly_Open Mustache Narrow_Eyes
    No_Beard Oval_Face Pale_Skin Pointy_Nose Receding_Hairline Rosy_Cheeks Sideburns Smiling
    Straight_Hair Wavy_Hair Wearing_Earrings Wearing_Hat Wearing_Lipstick Wearing_Necklace
    Wearing_Necktie Young
"""
ATTRIBUTES: tuple[str, ...] = tuple(NAMES.split())


class Phrase(NamedTuple):
    r"""How sentences express `name = value`: by one of the wordings, each after its place in the sentence.

    Places are "photo" (the opening), "is" (an adjective), "age", "haired" (an adjective after the age), "noun", "with",
    "without" and "wearing". The full form takes the first wording, a seeded one any. `synonyms` are for `parse` alone.
    """

    name: str
    value: bool
    wordings: str
    synonyms: str = ""


FACIAL_HAIR = ("5_o_Clock_Shadow", "Goatee", "Mustache", "Sideburns")
# In the order of the full form. Spellings (grey, blonde, moustache, black-haired) are unified by SPELLING.
PHRASES: tuple[Phrase, ...] = (
    Phrase("Male", True, "noun man | noun man | noun gentleman | noun guy", "male, boy, he, his, him"),
    Phrase("Male", False, "noun woman | noun woman | noun lady", "female, girl, she, her, hers"),
    Phrase("Blurry", True, "photo a blurry photo of | photo a blurry picture of", "blurry, out of focus"),
    Phrase("Attractive", True, "is attractive | is good-looking", "handsome, beautiful, pretty, gorgeous"),
    Phrase("Smiling", True, "is smiling | is smiling | with a smile", "smiles, grin, grinning, laughing"),
    Phrase("Chubby", True, "is chubby", "plump, fat, overweight"),
    Phrase("Bald", True, "is bald", "bald headed, baldheaded, hairless"),
    Phrase("No_Beard", True, "is clean-shaven | without a beard", "clean shaved, beardless"),
    Phrase("Young", True, "age young", "youthful, teenage"),
    Phrase("Young", False, "age older", "old, elderly, middle aged, senior"),
    Phrase("Straight_Hair", True, "with straight hair", "hair is straight"),
    Phrase("Wavy_Hair", True, "with wavy hair", "wavy, curly"),
    Phrase("Black_Hair", True, "with black hair | haired black-haired", "hair is black"),
    Phrase("Blond_Hair", True, "with blond hair | with blonde hair | haired blond", "fair hair"),
    Phrase("Brown_Hair", True, "with brown hair | haired brown-haired", "brunette, hair is brown"),
    Phrase("Gray_Hair", True, "with gray hair | haired grey-haired", "white hair, hair is gray"),
    Phrase("Bangs", True, "with bangs", "fringe"),
    Phrase("Receding_Hairline", True, "with a receding hairline", "receding hair, balding"),
    Phrase("Pale_Skin", True, "with pale skin | is pale-skinned", "pale, fair skin"),
    Phrase("Oval_Face", True, "with an oval face"),
    Phrase("Bushy_Eyebrows", True, "with bushy eyebrows | with thick eyebrows"),
    Phrase("Arched_Eyebrows", True, "with arched eyebrows"),
    Phrase("Narrow_Eyes", True, "with narrow eyes", "small eyes"),
    Phrase("Bags_Under_Eyes", True, "with bags under the eyes", "bags under, eye bags, baggy eyes"),
    Phrase("Big_Nose", True, "with a big nose | with a large nose", "huge nose"),
    Phrase("Pointy_Nose", True, "with a pointy nose | with a pointed nose", "sharp nose"),
    Phrase("High_Cheekbones", True, "with high cheekbones", "prominent cheekbones"),
    Phrase("Rosy_Cheeks", True, "with rosy cheeks | with pink cheeks", "red cheeks"),
    Phrase("Big_Lips", True, "with big lips | with full lips", "large lips, thick lips, plump lips"),
    Phrase("Mouth_Slightly_Open", True, "with a slightly open mouth | with slightly parted lips"),
    Phrase("Mouth_Slightly_Open", True, "", "open mouth, mouth open, mouth slightly open, parted lips"),
    Phrase("Double_Chin", True, "with a double chin"),
    Phrase("Sideburns", True, "with sideburns", "sideburn"),
    Phrase("Goatee", True, "with a goatee"),
    Phrase("Mustache", True, "with a mustache | with a moustache"),
    Phrase("5_o_Clock_Shadow", True, "with a five o'clock shadow | with stubble", "clock shadow"),
    Phrase("No_Beard", False, "with a beard", "facial hair"),
    Phrase(
        "Eyeglasses", True, "wearing eyeglasses | wearing glasses | with glasses", "sunglasses, spectacles"
    ),
    Phrase("Wearing_Hat", True, "wearing a hat", "cap, beanie, fedora"),
    Phrase("Wearing_Earrings", True, "wearing earrings", "earring"),
    Phrase("Wearing_Necklace", True, "wearing a necklace", "necklaces"),
    Phrase("Wearing_Necktie", True, "wearing a necktie | wearing a tie"),
    Phrase("Wearing_Lipstick", True, "wearing lipstick", "red lips"),
    Phrase("Heavy_Makeup", True, "wearing heavy makeup | with heavy makeup", "makeup, make up"),
)
OPENINGS = ("", "", "", "a photo of", "a portrait of", "a picture of", "this is")  # where nothing is blurry
SHARED = ("hair", "eyebrows", "nose")  # one noun for several adjectives: "wavy brown hair"
HAIR_COLOURS = ("Gray_Hair", "Blond_Hair", "Brown_Hair", "Black_Hair")  # the rarest of CelebA comes first
# What cannot be true together: the name before the colon wins. Of several hair colours the rarest one does.
EXCLUDES: dict[str, tuple[str, ...]] = {
    "Bald": (*HAIR_COLOURS, "Straight_Hair", "Wavy_Hair", "Bangs", "Receding_Hairline"),
    **{colour: HAIR_COLOURS[i + 1 :] for i, colour in enumerate(HAIR_COLOURS)},
    "Straight_Hair": ("Wavy_Hair",),
    **{name: ("No_Beard",) for name in FACIAL_HAIR},
}


def consistent(attributes: ArrayLike | Mapping[str, object]) -> np.ndarray:
    r"""The attributes as a sentence can state them: contradictions resolved, everything else untouched.

    Bald wins over hair colour, straight or wavy hair, bangs and a receding hairline. Of several hair colours
    the rarest wins: gray, blond, brown, black. Straight and wavy at once is neither. Goatee, mustache,
    sideburns and five o'clock shadow win over No_Beard; a woman has none of the four, and has No_Beard.

    Args:
        attributes: 40 numbers in the order of `ATTRIBUTES`, true where > 0 (so 0/1, -1/1 and bools all do),
            or a mapping from names to such numbers, in which a missing name is false.

    Returns:
        (40,) uint8 of zeros and ones. `consistent(consistent(a))` equals `consistent(a)`.

    Raises:
        ValueError: not 40 finite numbers, or a name that is none of `ATTRIBUTES`.

    >>> row = consistent({"Male": 1, "Bald": 1, "Black_Hair": 1, "No_Beard": 1, "Goatee": 1})
    >>> [name for name, value in zip(ATTRIBUTES, row) if value]
    ['Bald', 'Goatee', 'Male']
    """
    has = dict(zip(ATTRIBUTES, _truths(attributes), strict=True))
    if not has["Male"]:
        has.update(dict.fromkeys(FACIAL_HAIR, False), No_Beard=True)
    if has["Straight_Hair"] and has["Wavy_Hair"]:
        has.update(Straight_Hair=False, Wavy_Hair=False)
    for winner, losers in EXCLUDES.items():
        if has[winner]:
            has.update(dict.fromkeys(losers, False))
    return np.array([has[name] for name in ATTRIBUTES], dtype=np.uint8)


def describe(attributes: ArrayLike | Mapping[str, object], seed: int | Sequence[int] | None = None) -> str:
    r"""One sentence that describes a face: lowercase, without a full stop.

    Without a seed it is the full form, used for evaluation: fixed wording, every positive attribute of
    `consistent(attributes)`, and always man or woman, young or older. (No_Beard is stated of men only.)
    With a seed it is one of many, used for training: synonyms, order and opening vary, gender stays in 90 %.
    Half of these state everything else too, because a model learns late what some captions leave out. In the others
    each statement stays with a probability that is itself drawn for the caption, so that some are short.

    Args:
        attributes: as for `consistent`.
        seed: None, a non-negative int or a sequence of them; attributes and seed decide the sentence.

    Returns:
        The sentence. The full forms of CelebA fit CLIP's 75 tokens; so do the seeded ones.

    Raises:
        ValueError: as for `consistent`.

    >>> describe({"Male": 1, "Young": 1, "Smiling": 1, "Black_Hair": 1, "Mustache": 1, "Eyeglasses": 1})
    'a smiling young man with black hair and a mustache, wearing eyeglasses'
    >>> describe([0] * 40)
    'an older woman'
    """
    row = dict(zip(ATTRIBUTES, consistent(attributes).tolist(), strict=True))
    rng = None if seed is None else np.random.default_rng(seed)
    keep = 1.0 if rng is None or rng.random() < 0.5 else rng.uniform(0.1, 1.0)
    places: dict[str, list[str]] = defaultdict(list)
    for phrase in PHRASES:
        if phrase.wordings and row[phrase.name] == phrase.value and _is_sensible(phrase, row, places):
            wordings = phrase.wordings.split(" | ")
            if rng is None or rng.random() < (0.9 if phrase.name == "Male" else keep):
                wording = wordings[0 if rng is None else rng.integers(len(wordings))]
                place, _, text = wording.partition(" ")
                places[place].append(text)
    return _sentence(places, rng)


def _truths(attributes: ArrayLike | Mapping[str, object]) -> list[bool]:
    r"""40 truths in the order of `ATTRIBUTES`, or a ValueError that says what is wrong with the input."""
    if isinstance(attributes, Mapping):
        if unknown := [name for name in attributes if name not in ATTRIBUTES]:
            advice = "check the spelling, for example 'Black_Hair' or '5_o_Clock_Shadow'"
            raise ValueError(f"expected names of captions.ATTRIBUTES, got {unknown[:3]}; {advice}")
        attributes = [attributes.get(name, 0) for name in ATTRIBUTES]
    values = np.asarray(attributes, dtype=float)
    advice = "pass 0/1, -1/1 or bools in the order of captions.ATTRIBUTES, or a mapping name -> truth"
    if values.shape != (len(ATTRIBUTES),):
        raise ValueError(f"expected {len(ATTRIBUTES)} numbers, got shape {values.shape}; {advice}")
    if not np.isfinite(values).all():
        name = ATTRIBUTES[np.isfinite(values).argmin()]
        raise ValueError(f"expected finite numbers, got another one for {name}; {advice}")
    return (values > 0).tolist()


def _is_sensible(phrase: Phrase, row: Mapping[str, int], places: Mapping[str, list[str]]) -> bool:
    r"""Beards: "clean-shaven" of someone called a man, "a beard" where there is no other facial hair."""
    if phrase.name != "No_Beard":
        return True
    if phrase.value:
        return bool(places["noun"]) and bool(row["Male"])
    return not any(row[name] for name in FACIAL_HAIR)


def _sentence(places: dict[str, list[str]], rng: np.random.Generator | None) -> str:
    r"""Opening, person, clauses. A generator varies their order and how they are joined."""

    def sometimes() -> bool:
        return rng is not None and rng.random() < 0.25

    has = _share_nouns(places["with"])
    wears = places["wearing"]
    qualities = places["is"]
    opening = places["photo"]
    if rng is not None:
        for texts in (has, wears, qualities):
            rng.shuffle(texts)
        opening = opening or [OPENINGS[rng.integers(len(OPENINGS))]]
    adjectives = [", ".join(qualities), *places["age"]]  # a smiling young woman
    if sometimes():
        adjectives = [", ".join(places["age"] + qualities)]  # a young, smiling woman
    person = _join(*adjectives, *places["haired"], *(places["noun"] or ["person"]))
    article = "an" if person[0] in "aeiou" else "a"
    clauses = _clauses(has, places["without"], wears, who=sometimes(), wearing_first=sometimes())
    return _join(*opening, article, person, clauses)


def _clauses(has: list[str], lacks: list[str], wears: list[str], who: bool, wearing_first: bool) -> str:
    r""" "with black hair but no beard, wearing a hat", or the like."""
    wearing = f"wearing {_listed(wears)}" if wears else ""
    if not has:
        return ", ".join(filter(None, [*(f"without {text}" for text in lacks), wearing]))
    having = _listed(has) + "".join(f" but no {text.removeprefix('a ')}" for text in lacks)
    if who:
        comma = "," if len(has) > 1 else ""
        return f"who has {having}" + (f"{comma} and is {wearing}" if wears else "")
    clauses = [f"with {having}", *filter(None, [wearing])]
    return ", ".join(reversed(clauses) if wearing_first else clauses)


def _share_nouns(items: list[str]) -> list[str]:
    r"""Neighbours with the same noun become one: a big nose, a pointy nose -> a big pointy nose."""
    shared: list[str] = []
    for item in items:
        noun = item.split()[-1]
        if shared and noun in SHARED and shared[-1].endswith(f" {noun}"):
            shared[-1] = shared[-1].removesuffix(noun) + item.removeprefix("a ")
        else:
            shared.append(item)
    return shared


def _listed(items: list[str]) -> str:
    r""" "a", "a and b", "a, b and c"."""
    return " and ".join(filter(None, [", ".join(items[:-1]), items[-1]]))


def _join(*words: str) -> str:
    return " ".join(filter(None, words))


SPELLINGS = """
    grey=gray blonde=blond moustache=mustache mustached=mustache mustachioed=mustache bearded=beard
    o'clock=clock goateed=goatee eyebrow=eyebrows brows=eyebrows haired=hair skinned=skin
    nosed=nose faced=face mouthed=mouth
"""
SPELLING = dict(pair.split("=") for pair in SPELLINGS.split())
NEGATORS = "no not non without neither never lacks lacking isn't isnt doesn't"
ENDS = ". ; : ! ? but"  # of a negation that has found nothing to negate
# Not what they seem to state.
IGNORED = "year old, years old, old photo, old picture, old hat, bow tie, blurry background"
BETWEEN = "and or , long short dark light thick thin very curly length"  # an adjective and its noun


def parse(sentence: str) -> dict[str, bool]:
    r"""What a sentence states about the 40 attributes; those that are not mentioned are absent.

    True is what the sentence states, False what it negates ("without glasses") or excludes ("woman" is not Male, and
    both sides of `EXCLUDES`). Any text will do; unknown words are skipped. Of two contradictory statements the
    first holds, and a statement holds over what another one excludes. A negation covers the next phrase, and those
    that follow it after "or".

    Args:
        sentence: free English text of any length.

    Returns:
        Attribute name -> truth.

    Raises:
        TypeError: not a string.

    >>> parse("A woman with NO hat, smiling!")
    {'Male': False, 'Wearing_Hat': False, 'Smiling': True}
    >>> parse("a man with a moustache")
    {'Male': True, 'Mustache': True, 'No_Beard': False}
    """
    if not isinstance(sentence, str):
        raise TypeError(f"expected a str, got {type(sentence).__name__}; parse one caption at a time")
    grammar, meanings = _grammar()
    stated: dict[str, bool] = {}
    negated = False  # the last phrase
    negating = False  # the next one
    for found in grammar.finditer(" ".join(_words(sentence))):
        name, value = meanings[found.lastindex - 1]
        if name == "or":
            negating = negating or negated
        elif name in ("no", "end"):
            negating = name == "no"
            negated = False
        else:
            if name:
                stated.setdefault(name, value != negating)
            negated = negating
            negating = False
    excluded = [loser for winner, losers in EXCLUDES.items() if stated.get(winner) for loser in losers]
    excluded += [winner for winner, losers in EXCLUDES.items() if any(map(stated.get, losers))]
    return stated | {name: False for name in excluded if name not in stated}


def _words(text: str) -> list[str]:
    r"""Words and punctuation marks, in lower case and one spelling."""
    text = re.sub("[\u2018\u2019]", "'", text.lower().replace("_", " "))
    words = (word.removesuffix("'s") for word in re.findall(r"\w+(?:'\w+)*|[,.;:!?]", text))
    return [SPELLING.get(word, word) for word in words]


@cache
def _grammar() -> tuple[re.Pattern, list[tuple[str, bool]]]:
    r"""A pattern of alternatives, and for each what it states: an attribute and its truth, "no", "or", "end" or ""."""
    phrases = [(text.split(), "", True) for text in IGNORED.split(", ")]
    for phrase in PHRASES:
        wordings = (wording.partition(" ") for wording in phrase.wordings.split(" | "))
        texts = [text for place, _, text in wordings if place not in ("photo", "without")]
        for text in filter(None, texts + phrase.synonyms.split(", ")):
            words = _words(text.removeprefix("a ").removeprefix("an "))
            phrases.append((words, phrase.name, phrase.value))
    phrases.sort(key=lambda phrase: -len(phrase[0]))  # the longest wins
    between = _any({words[0] for words, _, _ in phrases if len(words) == 2} | set(BETWEEN.split()))
    patterns = [_any(NEGATORS.split()), "or|nor", _any(ENDS.split())]
    for words, _, _ in phrases:
        pattern = re.escape(" ".join(words))
        if len(words) == 2:  # adjective and noun: "black, wavy hair" is also "black hair"
            first, second = map(re.escape, words)
            pattern += rf"|{first}(?=(?: (?:{between})){{1,5}} {second}(?!\S))"
        patterns.append(pattern)
    grammar = "|".join(f"({pattern})" for pattern in patterns)
    meanings = [("no", True), ("or", True), ("end", True), *((name, value) for _, name, value in phrases)]
    return re.compile(rf"(?<!\S)(?:{grammar})(?!\S)"), meanings


def _any(words: Iterable[str]) -> str:
    return "|".join(map(re.escape, sorted(words)))
