"""Person names: fuzzy matching holds literal matching, and the keys of the index lose no match."""

from __future__ import annotations

import apsw
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomnode.index.names import (
    MAX_WORDS,
    Form,
    fuzzy_person,
    name_condition,
    name_keys,
    next_prefix,
    person,
    sound,
    words,
)

NAME = st.text("aAbBsS ßäÄé^=ø'-.山太ヤや ſİ", max_size=14)
WORD = st.sampled_from(
    [
        "Meier",
        "Mayr",
        "Müller",
        "MUELLER",
        "Smith",
        "schmidt",
        "O'Brien",
        "Ng",
        "Li",
        "山田",
        "ヤマダ",
        "Łukasz",
        "J",
        "de",
    ]
)
QUERY = st.lists(st.sampled_from(["*", "?", "a", "B", "ß", "ä", "^", "=", " ", "山", "s", "'"]), max_size=8).map(
    "".join
)


@pytest.mark.parametrize(
    ("query", "stored", "expected"),
    [
        ("Meier^Anna", "MEYER^ANNA", True),
        ("Mayr", "Meier^Anna", True),
        ("Swain", "Swayne^Tom", True),
        ("Smith^Mary", "Mary^Smith", True),
        ("Smith^Mary", "Smith, Mary", True),
        ("Katherine", "Catherine^Jones", True),
        ("Muller", "Müller^Jörg", True),
        ("Mueller^Joerg", "Müller^Jörg", True),
        ("Schmidt", "Smith^John", True),
        ("Schröder", "SCHROEDER^EVA", True),
        ("Philip", "Filip^Novák", True),
        ("OBrien", "O'Brien^Pat", True),
        ("Wagner", "Vagner^Ivan", True),
        ("Smith^J", "Smith^John", True),
        ("Smith^John", "Smith^J", True),
        ("Soren", "Sørensen^Søren", True),
        ("Sm?th^M*", "Mary^Smith", True),
        ("ヤマダ", "やまだ^たろう", True),
        ("山田", "Yamada^Tarou=山田^太郎", True),
        ("Tarou^Yamada", "Yamada^Tarou=山田^太郎", True),
        ("Li", "Lee^Ann", False),
        ("Smith^Peter", "Smith^Mary", False),
        ("Meier", "Bauer^Max", False),
        ("田山", "山田^太郎", False),
        ("*", "", False),
        ("***^?", "Smith^Anna", False),
    ],
)
def test_fuzzy(query: str, stored: str, expected: bool) -> None:
    assert fuzzy_person(query, stored) is expected


@pytest.mark.parametrize(
    ("one", "other"),
    [("meier", "mayr"), ("thompson", "tomson"), ("clark", "klarck"), ("jorgen", "jorgan"), ("wright", "rite")],
)
def test_sounds_alike(one: str, other: str) -> None:
    assert sound(one) == sound(other)


@given(QUERY | NAME, NAME)
def test_fuzzy_finds_at_least_what_literal_matching_finds(query: str, stored: str) -> None:
    assert fuzzy_person(query, stored) or not person(query, stored)


def by_keys(query: str, stored: str, *, fuzzy: bool, unknown: bool = False) -> bool:
    """Whether the tables of the index lead from the query to a name."""
    condition, parameters = name_condition("o.id", "names", "owner_id", query, fuzzy=fuzzy, unknown=unknown)
    with apsw.Connection(":memory:") as connection:
        connection.execute("CREATE TABLE owners(id); CREATE TABLE names(form, key, owner_id)")
        connection.execute("INSERT INTO owners VALUES (1)")
        connection.executemany("INSERT INTO names VALUES (?, ?, 1)", [(f.value, k) for f, k in name_keys(stored)])
        return bool(connection.execute(f"SELECT 1 FROM owners o WHERE {condition}", parameters).fetchone())


@given(QUERY | NAME, NAME)
def test_no_literal_match_is_lost(query: str, stored: str) -> None:
    if query.strip(" ") not in ("", "*") and stored and person(query, stored):
        assert by_keys(query, stored, fuzzy=False)
        assert by_keys(query, stored, fuzzy=True)


@given(st.lists(WORD, min_size=1, max_size=3), st.lists(WORD, min_size=1, max_size=3), st.sampled_from("^ ="))
def test_no_fuzzy_match_is_lost(query: list[str], stored: list[str], between: str) -> None:
    for pattern in (between.join(query), query[0][:2] + "*", "?" + query[0][1:]):
        if fuzzy_person(pattern, "^".join(stored)):
            assert by_keys(pattern, "^".join(stored), fuzzy=True)


def test_keys_narrow() -> None:
    assert not by_keys("Smith^John", "Smith^Anna", fuzzy=False)
    assert not by_keys("smi*", "Meier^Anna", fuzzy=False)
    assert not by_keys("Smith^Peter", "Smith^Anna", fuzzy=True)
    assert not by_keys("Smith", "", fuzzy=False)
    assert by_keys("Smith", "", fuzzy=False, unknown=True)


def test_a_hostile_name_has_few_keys() -> None:
    name = " ".join(f"w{n}" for n in range(10_000))
    assert len(words(name)) <= MAX_WORDS
    assert sum(1 for form, _ in name_keys(name) if form is not Form.group) <= 2 * MAX_WORDS


@given(st.text(min_size=1, max_size=4), st.text(max_size=4))
def test_next_prefix_is_above_all_that_begin_so(prefix: str, rest: str) -> None:
    above = next_prefix(prefix)
    if above is not None:
        assert prefix + rest < above
        above.encode()
    else:
        assert set(prefix) == {"\U0010ffff"}
