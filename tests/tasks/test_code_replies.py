from typing import Any

import pytest

from sputnik.tasks.code import gives, same


@pytest.mark.parametrize(
    ("expected", "given", "equal"),
    [
        (1, 1, True), (1, True, False), (True, 1, False), (False, False, True), (1, 1.0, True), (1.0, 1, True),
        (0.1 + 0.2, 0.3, True), (0.3, 0.3001, False), (1.0, float("nan"), False), (1.0, 10**400, False),
        (2**53 + 1, 2**53, False), (10**300, float("inf"), False), ([1, [2]], (1, [2]), True), ([1], [1, 2], False),
        ([], None, False), (None, None, True), ("a", "a", True), ("a", b"a", False), ([1, 2], {1, 2}, False),
        ({"1": [2]}, {1: (2,)}, True), ({"1": 2}, {"1": 2, "3": 4}, False), ("1", 1, False), ({}, [], False),
    ],
)  # fmt: skip
def test_results_are_compared_as_json_but_booleans_are_no_numbers(expected: Any, given: Any, equal: bool) -> None:
    assert same(expected, given) is equal


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ('{"value": 5}', True),
        ('{"value": 5}' + " " * 2000, False),  # much longer than it need be: not read at all
        ('{"value": {"complex": [1' + "0" * 400 + ", 1]}}", False),
        ('{"value": {"set": [[]]}}', False),
        ('{"value": ' + "[" * 900, False),
        ('["value"]', False),
    ],
)
def test_a_reply_of_any_kind_is_right_or_not(reply: str, right: bool) -> None:
    assert gives(reply, 5) is right
