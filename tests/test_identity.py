"""Result UIDs: the same work always has the same ones, other work never."""

from __future__ import annotations

import random
import re
import uuid

from hypothesis import given
from hypothesis import strategies as st

from dicomnode.identity import derived_uid, input_digest, parameters_digest, result_identity

parts = st.lists(st.text(max_size=10), min_size=1, max_size=5)


@given(parts)
def test_uid_is_a_valid_uuid_under_2_25(found: list[str]) -> None:
    uid = derived_uid(*found)
    assert re.fullmatch(r"2\.25\.(0|[1-9][0-9]{0,38})", uid) and len(uid) <= 64
    number = uuid.UUID(int=int(uid.removeprefix("2.25.")))
    assert number.version == 8 and number.variant == uuid.RFC_4122


@given(parts, parts)
def test_parts_are_not_just_joined(one: list[str], two: list[str]) -> None:
    assert (derived_uid(*one) == derived_uid(*two)) is (one == two)


def test_uids_of_released_versions_stay() -> None:
    """A change here would make second objects of what was already delivered."""
    assert derived_uid("result", "x") == "2.25.294976361388045236522850186066696880647"
    assert input_digest([("1.2", "a")]) == ("1bb99e7df3011216623c96eda0cfcd5a7905bf5c346722d33c8a7f255907787e")


@given(st.lists(st.tuples(st.text("0123.", min_size=1), st.text("abc")), max_size=8), st.randoms())
def test_input_digest_is_of_the_set(pairs: list[tuple[str, str]], shuffler: random.Random) -> None:
    again = [*pairs, *pairs]
    shuffler.shuffle(again)
    assert input_digest(pairs) == input_digest(again)
    assert input_digest([*pairs, ("9.9", "new")]) != input_digest(pairs)


def test_parameters_digest_ignores_the_order_of_keys() -> None:
    assert parameters_digest({"a": 1, "b": [1, 2]}) == parameters_digest({"b": [1, 2], "a": 1})
    assert parameters_digest({"a": 1}) != parameters_digest({"a": 2})


BASE = {"inputs": "i", "model_digest": "m", "parameters": "p", "revision": 1}


def uids(**changes: object) -> set[str]:
    found = result_identity(**{**BASE, **changes}, segment_numbers=[1, 2], content_datetime="t")  # type: ignore[arg-type]
    return {found.seg_series_uid, found.seg_uid, found.sr_series_uid, found.sr_uid, *found.tracking_uids.values()}


def test_result_uids_depend_on_everything_that_shapes_the_result() -> None:
    assert len(uids()) == 6 and uids() == uids()
    for change in ({"inputs": "j"}, {"model_digest": "n"}, {"parameters": "q"}, {"revision": 2}):
        assert not uids() & uids(**change)


def test_time_takes_no_part() -> None:
    one = result_identity(**BASE, segment_numbers=[1], content_datetime="2026")  # type: ignore[arg-type]
    two = result_identity(**BASE, segment_numbers=[1], content_datetime="2027")  # type: ignore[arg-type]
    assert one.sr_uid == two.sr_uid and one.content_datetime != two.content_datetime
