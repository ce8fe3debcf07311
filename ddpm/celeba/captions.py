r"""Forty CelebA attributes <-> one English sentence.

    describe   attributes -> "a smiling young man with black hair and a mustache, wearing eyeglasses"
    parse      sentence   -> {"Smiling": True, "Young": True, "Male": True, "Black_Hair": True, ...}
    consistent attributes -> the attributes once their contradictions are resolved

One table holds every wording. `describe` reads it from left to right, `parse` from right to left,
and for every row of attributes they agree: what `parse(describe(row))` states is true of `consistent(row)`."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    "without" and "wearing". The full form takes the first wording, a seeded one any.

    `kept` are wordings that no training caption has: an evaluation asks what the words they share with others are
    worth. `synonyms` are for `parse` alone.
    """

    name: str
    value: bool
    wordings: str
    kept: str = ""
    synonyms: str = ""


FACIAL_HAIR = ("5_o_Clock_Shadow", "Goatee", "Mustache", "Sideburns")
# Wordings / those kept from training / synonyms, in the order of the full form. SPELLING unifies grey, blonde, ...
TABLE = """
+Male: noun man | noun gentleman | noun guy | noun dude | noun male / noun male person / he, his, him
+Male: / / boy, grandpa, grandfather
-Male: noun woman | noun lady | noun female / noun female person / she, her, hers
-Male: / / girl, grandma, grandmother
+Blurry: photo a blurry photo of | photo a blurry picture of / / blurry, out of focus
+Attractive: is attractive | is good-looking | is beautiful | is handsome | is pretty / / gorgeous
-Smiling: without a smile
+Smiling: is smiling | with a smile | is laughing | is grinning | with a grin / with a big smile / smiles
+Chubby: is chubby | is plump | is overweight | is fat / is very chubby
+Bald: is bald | is bald-headed / is completely bald / baldheaded, hairless
+No_Beard: is clean-shaven | without a beard | is beardless / / clean shaved
+Young: age young | age youthful | age teenage / age very young / boy, girl
-Young: age older | age old | age elderly | age middle-aged | age senior / age very old
    / grandpa, grandfather, grandma, grandmother
+Straight_Hair: with straight hair / with hair that is straight / hair is straight
+Wavy_Hair: with wavy hair | with curly hair / with hair that is wavy / wavy, curly
+Black_Hair: with black hair | haired black-haired / with hair that is black / hair is black
+Blond_Hair: with blond hair | with blonde hair | haired blond | haired blonde | haired fair-haired
    / with hair that is blond
+Brown_Hair: with brown hair | haired brown-haired | haired brunette / with hair that is brown / hair is brown
+Gray_Hair: with gray hair | with grey hair | haired grey-haired | with white hair | haired white-haired
    / with hair that is gray / hair is gray
+Bangs: with bangs | with a fringe / with long bangs
+Receding_Hairline: with a receding hairline | with receding hair | is balding
    / with a hairline that is receding
+Pale_Skin: with pale skin | is pale-skinned | is pale | with fair skin / with very pale skin
+Oval_Face: with an oval face
+Bushy_Eyebrows: with bushy eyebrows | with thick eyebrows / with eyebrows that are bushy
+Arched_Eyebrows: with arched eyebrows / with eyebrows that are arched
+Narrow_Eyes: with narrow eyes | with small eyes / with eyes that are narrow
+Bags_Under_Eyes: with bags under the eyes | with eye bags | with baggy eyes / / bags under
+Big_Nose: with a big nose | with a large nose | with a huge nose / with a nose that is big
+Pointy_Nose: with a pointy nose | with a pointed nose | with a sharp nose / with a nose that is pointy
+High_Cheekbones: with high cheekbones | with prominent cheekbones
+Rosy_Cheeks: with rosy cheeks | with pink cheeks | with red cheeks / with cheeks that are rosy
+Big_Lips: with big lips | with full lips | with large lips | with thick lips / with lips that are full
    / plump lips
+Mouth_Slightly_Open: with a slightly open mouth | with slightly parted lips | with an open mouth
    | with parted lips / / mouth open, mouth slightly open
+Double_Chin: with a double chin
+Sideburns: with sideburns / with long sideburns / sideburn
+Goatee: with a goatee / with a small goatee
+Mustache: with a mustache | with a moustache / with a big mustache
+5_o_Clock_Shadow: with a five o'clock shadow | with stubble / with some stubble / clock shadow
-No_Beard: with a beard / with a full beard / facial hair
-Eyeglasses: without glasses | without eyeglasses
+Eyeglasses: wearing eyeglasses | wearing glasses | with glasses | with sunglasses | wearing spectacles
    / wearing large glasses
-Wearing_Hat: without a hat
+Wearing_Hat: wearing a hat | with a hat | wearing a cap | wearing a beanie / wearing a large hat / fedora
-Wearing_Earrings: without earrings
+Wearing_Earrings: wearing earrings | with earrings / wearing big earrings / earring
+Wearing_Necklace: wearing a necklace | with a necklace / wearing a gold necklace / necklaces
-Wearing_Necktie: without a tie
+Wearing_Necktie: wearing a necktie | wearing a tie | with a tie / wearing a dark tie
+Wearing_Lipstick: wearing lipstick | with red lips / wearing bright lipstick
-Heavy_Makeup: without makeup
+Heavy_Makeup: wearing heavy makeup | with heavy makeup | wearing makeup / wearing a lot of makeup / make up
"""


def _read_table() -> Iterator[Phrase]:
    r"""A phrase a line, "+" or "-" for true or false; an indented line goes on."""
    for line in TABLE.replace("\n    ", " ").strip().splitlines():
        name, _, texts = line.partition(": ")
        yield Phrase(name[1:], name[0] == "+", *(text.strip() for text in texts.split("/")))


PHRASES: tuple[Phrase, ...] = tuple(_read_table())
# A noun that states age and gender, by (Male, Young).
AGED = {
    (1, 1): ("boy",),
    (0, 1): ("girl",),
    (1, 0): ("grandpa", "grandfather"),
    (0, 0): ("grandma", "grandmother"),
}
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


def describe(
    attributes: ArrayLike | Mapping[str, object], seed: int | Sequence[int] | None = None, kept: bool = False
) -> str:
    r"""One sentence that describes a face: lowercase, without a full stop.

    Without a seed it is the full form, used for evaluation: fixed wording, every positive attribute of
    `consistent(attributes)`, and always man or woman, young or older. (No_Beard is stated of men only.)
    With a seed it is one of many, used for training: wordings, order and opening vary, gender stays in 90 %. Half of
    the wordings are the first. One caption in four is a list of keywords. Half of the captions state everything else
    too, because a model learns late what some captions leave out. In the others each statement stays with a
    probability that is itself drawn for the caption, so that some are short. What a face lacks, for example a hat, is
    said in 5 %.

    Args:
        attributes: as for `consistent`.
        seed: None, a non-negative int or a sequence of them; attributes and seed decide the sentence.
        kept: state everything, in the wordings that no training caption has, where there are some.

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
    is_full = kept or rng is None
    keep = 1.0 if is_full or rng.random() < 0.5 else rng.uniform(0.1, 1.0)
    denials = None if is_full else rng.spawn(1)[0]
    places: dict[str, list[str]] = defaultdict(list)
    for phrase in PHRASES:
        if not phrase.wordings or row[phrase.name] != phrase.value or not _is_sensible(phrase, row, places):
            continue
        if phrase.wordings.startswith("without"):
            stays = not is_full and denials.random() < 0.05
        else:
            stays = is_full or rng.random() < (0.9 if phrase.name == "Male" else keep)
        if stays:
            wordings = (kept and phrase.kept or phrase.wordings).split(" | ")
            is_first = is_full or rng.random() < 0.5
            place, _, text = wordings[0 if is_first else rng.integers(len(wordings))].partition(" ")
            places[place].append(text)
    if rng is None:
        return _sentence(places, None)
    if places["noun"] and places["age"] and not kept and rng.random() < 0.15:
        places["noun"] = [str(rng.choice(AGED[row["Male"], row["Young"]]))]
        places["age"] = places["age"] if rng.random() < 0.5 else []
    return _sentence(places, rng) if kept or rng.random() < 0.75 else _keywords(places, rng)


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


def _keywords(places: Mapping[str, list[str]], rng: np.random.Generator) -> str:
    r""" "black hair, sunglasses, man, no beard"."""
    lacks = [f"no {_bare(text)}" for text in places["without"]]
    has = [_bare(text) for place, texts in places.items() if place != "without" for text in texts]
    return ", ".join(rng.permutation(has + lacks).tolist()) or "person"


def _clauses(has: list[str], lacks: list[str], wears: list[str], who: bool, wearing_first: bool) -> str:
    r""" "with black hair but no beard, wearing a hat", or the like."""
    wearing = f"wearing {_listed(wears)}" if wears else ""
    if not has:
        lacking = f"without {' or '.join(lacks)}" if lacks else ""
        return ", ".join(filter(None, [lacking, wearing]))
    having = _listed(has) + (f" but no {' or '.join(map(_bare, lacks))}" if lacks else "")
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


def _bare(text: str) -> str:
    r"""Without its article, and a blurry photo of nobody."""
    return text.removeprefix("a ").removeprefix("an ").removesuffix(" of")


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
        meaning = meanings[found.lastindex - 1]
        if "or" in meaning:
            negating = negating or negated
        elif "no" in meaning or "end" in meaning:
            negating = "no" in meaning
            negated = False
        else:
            for name, value in meaning.items():
                stated.setdefault(name, value != negating)
            negated = negating
            negating = False
    excluded = [loser for winner, losers in EXCLUDES.items() if stated.get(winner) for loser in losers]
    excluded += [winner for winner, losers in EXCLUDES.items() if any(map(stated.get, losers))]
    return stated | {name: False for name in excluded if name not in stated}


def plain_words(text: str) -> set[str]:
    r"""The words and numbers of a text as they are written, in lower case."""
    return set(re.findall(r"[^\W_]+(?:['\u2019][^\W_]+)*", text.lower()))


def vocabulary() -> set[str]:
    r"""All words that `describe` makes training captions of."""
    frame = "a an and or who has is with without but no wearing person"
    nouns = [noun for nouns in AGED.values() for noun in nouns]
    wordings = [w.partition(" ")[2] for phrase in PHRASES for w in phrase.wordings.split(" | ")]
    return plain_words(" ".join([frame, *nouns, *OPENINGS, *wordings]))


def _words(text: str) -> list[str]:
    r"""Words and punctuation marks, in lower case and one spelling."""
    text = re.sub("[\u2018\u2019]", "'", text.lower().replace("_", " "))
    words = (word.removesuffix("'s") for word in re.findall(r"\w+(?:'\w+)*|[,.;:!?]", text))
    return [SPELLING.get(word, word) for word in words]


@cache
def _grammar() -> tuple[re.Pattern, list[dict[str, bool]]]:
    r"""A pattern of alternatives, and for each what it states: attributes and their truths, "no", "or", "end", none."""
    phrases: dict[str, dict[str, bool]] = {text: {} for text in IGNORED.split(", ")}
    for phrase in PHRASES:
        wordings = (wording.partition(" ") for wording in f"{phrase.wordings} | {phrase.kept}".split(" | "))
        texts = [text for place, _, text in wordings if place not in ("photo", "without")]
        for text in filter(None, texts + phrase.synonyms.split(", ")):
            phrases.setdefault(" ".join(_words(_bare(text))), {})[phrase.name] = phrase.value
    pairs = [text.split() for text in phrases if text.count(" ") == 1]
    between = _any({first for first, _ in pairs} | set(BETWEEN.split()))
    patterns = [_any(NEGATORS.split()), "or|nor", _any(ENDS.split())]
    meanings = [{"no": True}, {"or": True}, {"end": True}]
    for text in sorted(phrases, key=lambda text: -text.count(" ")):  # the longest wins
        pattern = re.escape(text)
        if text.count(" ") == 1:  # adjective and noun: "black, wavy hair" is also "black hair"
            first, second = map(re.escape, text.split())
            pattern += rf"|{first}(?=(?: (?:{between})){{1,5}} {second}(?!\S))"
        patterns.append(pattern)
        meanings.append(phrases[text])
    return re.compile(rf"(?<!\S)(?:{'|'.join(f'({pattern})' for pattern in patterns)})(?!\S)"), meanings


def _any(words: Iterable[str]) -> str:
    return "|".join(map(re.escape, sorted(words)))
