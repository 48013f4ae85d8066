"""Person names: literal matching without case, fuzzy matching, and the keys that an index holds. Pure.

Literal (PS3.4 C.2.2.2.1.1): without case, by component group; a name with one component
group in the query matches any stored group.

Fuzzy, where it was negotiated: what literal matching finds, and every name that has, in any
group and any order, a word for each word of the query. Words are compared without case and
diacritics (Müller, MULLER), and else by their sound: consonants reduced to classes, vowels
left out (Meier, Meyer, Mayr; Swain, Swayne; Katherine, Catherine). An initial stands for a
word that begins with it. Wildcards apply to a word. Scripts without an alphabet have no
sound; their words must be equal.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from enum import IntEnum
from functools import lru_cache

Condition = tuple[str, tuple[object, ...]]


class Form(IntEnum):
    """What a key of the tables ``study_names`` and ``patient_names`` is."""

    group = 0
    word = 1
    sound = 2


# Wildcards


def wild(query: str, stored: str) -> bool:
    """``*`` is any run of characters, ``?`` any one (C.2.2.2.4); linear in time, unlike a regular expression."""
    if "*" not in query:
        if "?" not in query:
            return query == stored
        return len(query) == len(stored) and all(q in ("?", s) for q, s in zip(query, stored, strict=True))
    parts = query.split("*")
    first, last = parts[0], parts[-1]
    if len(stored) < len(first) + len(last) or not wild(first, stored[: len(first)]):
        return False
    end = len(stored) - len(last)
    if not wild(last, stored[end:]):
        return False
    position = len(first)
    for part in parts[1:-1]:
        found = _find(part, stored, position, end)
        if found < 0:
            return False
        position = found + len(part)
    return True


def _find(part: str, stored: str, position: int, end: int) -> int:
    """First place of ``part`` (which may hold ``?``) in stored[position:end], or -1."""
    if "?" not in part:
        return stored.find(part, position, end)
    return next((i for i in range(position, end - len(part) + 1) if wild(part, stored[i : i + len(part)])), -1)


def longest_literal(pattern: str, wildcards: str, padding: str) -> str:
    """The longest run without wildcards: every match holds it, and looking for it takes linear time."""
    return max((chunk.strip(padding) for chunk in re.split(f"[{re.escape(wildcards)}]", pattern)), key=len)


def next_prefix(prefix: str) -> str | None:
    """The least text above all that begin with ``prefix``; None when there is none."""
    for position in range(len(prefix) - 1, -1, -1):
        code = ord(prefix[position]) + 1
        if 0xD800 <= code <= 0xDFFF:  # surrogates are no characters
            code = 0xE000
        if code <= 0x10FFFF:
            return prefix[:position] + chr(code)
    return None


# Literal

MAX_NAME = 1024
"""Longer names are not cached, and no words behind it are looked at; the standard ends at 3 x 64 characters."""


def fold(text: str) -> str:
    """Person names are compared without case (PS3.4 C.2.2.2.1)."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())


def groups(name: str) -> tuple[str, ...]:
    """Component groups of a name, folded, without the empty components at their ends."""
    return _groups(name) if len(name) <= MAX_NAME else _groups.__wrapped__(name)  # a cache of long ones takes memory


@lru_cache(maxsize=1024)
def _groups(name: str) -> tuple[str, ...]:
    return tuple(g.rstrip("^ ") for g in fold(name).rstrip("= ").split("="))


def person(query: str, stored: str) -> bool:
    wanted, names = groups(query), groups(stored)
    if len(wanted) == 1:
        return any(_group(wanted[0], name) for name in names if name)
    filled = (*names, *[""] * (len(wanted) - len(names)))
    return all(not g or (n and _group(g, n)) for g, n in zip(wanted, filled, strict=False))


def _group(query: str, name: str) -> bool:
    """One component group; ``Smith^*`` also finds a name that has no given name."""
    return wild(query, name) or (query.endswith("*") and wild(query, name + "^" * (4 - name.count("^"))))


def person_condition(expression: str, query: str) -> Condition:
    """On a name as stored. LIKE folds case in ASCII alone, so other rows are left to the predicate."""
    folded = fold(query)
    chunk = longest_literal(folded, "*?=", " ^")
    if not folded.isascii() or not chunk:
        return f"{expression} <> ''", ()
    escaped = "".join("!" + c if c in "!%_" else c for c in chunk)
    return f"({expression} LIKE ? ESCAPE '!' OR {expression} GLOB '*[^ -~]*')", (f"%{escaped}%",)


# Fuzzy

MAX_WORDS = 32
"""What is looked at of one name."""

_ROMAN = str.maketrans({"ø": "o", "ł": "l", "đ": "d", "ð": "d", "þ": "th", "æ": "ae", "œ": "oe", "ı": "i", "ß": "ss"})
_KANA = {code: code - 0x60 for code in range(0x30A1, 0x30F7)}  # katakana to hiragana
_BETWEEN_WORDS = re.compile(r"[\s^=,._\-/\u3000]+")
_SILENT = re.compile("['’`´ʼ]")


def _normal(text: str) -> str:
    decomposed = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).casefold())
    bare = "".join(c for c in decomposed if not unicodedata.combining(c))
    return _SILENT.sub("", bare.translate(_ROMAN).translate(_KANA))


def words(name: str) -> tuple[str, ...]:
    """The words of a name, of all its component groups, in their bare form."""
    return _words(name[:MAX_NAME])


@lru_cache(maxsize=1024)
def _words(name: str) -> tuple[str, ...]:
    bare = _normal(name)
    return tuple(dict.fromkeys(w for w in _BETWEEN_WORDS.split(bare) if w))[:MAX_WORDS]


_SPELLINGS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), sound)
    for pattern, sound in (
        ("^[kg]n", "n"),
        ("^wr", "r"),
        ("tsch|sch|tch|sh|ch(?=[ei])|cz|sz|zh|ts|tz|dz|ds(?=.)", "s"),
        ("dt|th|td", "t"),
        ("ph|pf", "f"),
        ("mp(?=[st])", "m"),
        ("x", "ks"),
        ("ck|ch|kh|qu|q", "k"),
        ("gh(?=t)", ""),
        ("c(?=[eiy])", "s"),
        ("w(?=[aeiouy])", "v"),
        ("^y(?=[aeiou])", "j"),
    )
)
_CLASSES = {
    **dict.fromkeys("bp", "p"),
    **dict.fromkeys("fv", "f"),
    **dict.fromkeys("cgkq", "k"),
    **dict.fromkeys("sz", "s"),
    **dict.fromkeys("dt", "t"),
    **dict.fromkeys("mn", "n"),
    "j": "j",
    "l": "l",
    "r": "r",
}


@lru_cache(maxsize=4096)
def sound(word: str) -> str:
    """How a bare word sounds, roughly and in no language in particular; another script is its own sound."""
    if not re.fullmatch("[a-z]+", word):
        return word
    spelt = word
    for pattern, replacement in _SPELLINGS:
        spelt = pattern.sub(replacement, spelt)
    heard = ["a"] if spelt[:1] in tuple("aeiouy") else ["h"] if spelt.startswith("h") else []
    last = ""
    for letter in spelt:
        kind = _CLASSES.get(letter, "")
        if kind and kind != last:
            heard.append(kind)
        last = kind
    if sum(1 for kind in heard if kind not in "ah") < 2:  # Li, Lee and Lau are not the same
        return re.sub(r"(.)\1+", r"\1", word.replace("y", "i"))
    return "".join(heard)


def fuzzy_person(query: str, stored: str) -> bool:
    """At least what :func:`person` finds (PS3.4 C.2.2.2.1.1)."""
    wanted = [w for w in words(query) if w.strip("*")]
    if person(query, stored):
        return True
    here = words(stored)
    return bool(wanted) and all(any(_word(w, h) for h in here) for w in wanted)


def _word(query: str, stored: str) -> bool:
    if "*" in query or "?" in query:
        return wild(query, stored)
    if min(len(query), len(stored)) == 1:
        return query[0] == stored[0]
    return query == stored or sound(query) == sound(stored)


# The index


def name_keys(name: str) -> Iterator[tuple[Form, str]]:
    """Keys under which a name is found; an empty name has the empty group."""
    found = [g for g in groups(name) if g] or [""]
    yield from ((Form.group, g) for g in dict.fromkeys(found))
    bare = words(name)
    yield from ((Form.word, w) for w in bare)
    yield from ((Form.sound, s) for s in dict.fromkeys(sound(w) for w in bare))


def name_condition(owner: str, table: str, column: str, query: str, *, fuzzy: bool, unknown: bool) -> Condition:
    """Names that may match, by the keys in ``table``; ``unknown``: empty names match too.

    ``owner`` is the id of who has the name, ``column`` its name in the table.
    """
    pick = f"SELECT {column} FROM {table} WHERE"
    literal, parameters = _literal_keys(query)
    where = f"{pick} form = {Form.group.value} AND {literal}"
    if unknown:
        where += f" UNION {pick} form = {Form.group.value} AND key = ''"
    wanted = [w for w in words(query) if w.strip("*")] if fuzzy else []
    if wanted:
        parts = [_word_keys(w) for w in wanted]
        every = " INTERSECT ".join(
            f"SELECT * FROM ({' UNION '.join(f'{pick} {c}' for c, _ in part)})" for part in parts
        )
        where += f" UNION SELECT * FROM ({every})"
        parameters = (*parameters, *(p for part in parts for _, values in part for p in values))
    return f"{owner} IN ({where})", parameters


def _literal_keys(query: str) -> Condition:
    """Any group of the query is necessary; the first one that is there is looked for."""
    group = next((g for g in groups(query) if g.strip("*")), "*")
    return _key_condition(group, " ^")


def _key_condition(pattern: str, padding: str) -> Condition:
    """On ``key``; what precedes the first wildcard, without ``padding``, bounds the keys."""
    head = re.split(r"[*?]", pattern, maxsplit=1)[0]
    if head == pattern:
        return "key = ?", (pattern,)
    prefix = head.rstrip(padding)
    if not prefix:
        chunk = longest_literal(pattern, "*?", padding)
        return ("instr(key, ?) > 0", (chunk,)) if chunk else ("key <> ''", ())
    above = next_prefix(prefix)
    return ("key >= ?", (prefix,)) if above is None else ("key >= ? AND key < ?", (prefix, above))


def _word_keys(word: str) -> Sequence[Condition]:
    form = f"form = {Form.word.value} AND"
    if "*" in word or "?" in word:
        text, parameters = _key_condition(word, "")
        return [(f"{form} {text}", parameters)]
    if len(word) == 1:
        text, parameters = _key_condition(word + "*", "")
        return [(f"{form} {text}", parameters)]
    return [
        (f"{form} key IN (?, ?)", (word, word[0])),
        (f"form = {Form.sound.value} AND key = ?", (sound(word),)),
    ]
