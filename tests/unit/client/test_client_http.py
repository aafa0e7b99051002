"""When a client tries again and when it gives up, with a clock of the test's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from support.http.drive import BROKEN, REFUSED, Drive, refusal, reply

from tether.client import operations as flows
from tether.client.protocol import (
    TIMEOUT_HEADER,
    Flow,
    NoResponse,
    OperationDeadline,
    Request,
    Response,
    RetryPolicy,
    exchange,
    failure,
)
from tether.errors import (
    BadJson,
    Conflict,
    DeadlineExceeded,
    Forbidden,
    InvalidRequest,
    ModelNotFound,
    NotFound,
    QueueFull,
    TetherError,
    Unavailable,
)

# tries


def asking(**more: Any) -> Callable[[RetryPolicy], Flow[Response]]:
    return lambda policy: exchange(policy, Request("GET", "/", **more))


def test_a_refused_connection_is_tried_again_with_growing_pauses() -> None:
    drive = Drive([REFUSED, REFUSED, REFUSED, reply({})])
    assert drive(asking(repeatable=False)).status == 200
    assert drive.pauses == [0.1, 0.2, 0.4]


def test_tries_are_bounded() -> None:
    drive = Drive([REFUSED] * 99, tries=3)
    with pytest.raises(Unavailable, match="connection refused"):
        drive(asking())
    assert len(drive.sent) == 3


def test_an_answer_that_got_lost_is_asked_for_again_only_where_that_is_harmless() -> None:
    assert Drive([BROKEN, reply({})])(asking()).status == 200
    drive = Drive([BROKEN, reply({})])
    with pytest.raises(Unavailable):
        drive(asking(repeatable=False))
    assert len(drive.sent) == 1


@pytest.mark.parametrize(("code", "status"), [("queue_full", 429), ("unavailable", 503), ("model_not_ready", 503)])
def test_overload_waits_as_long_as_the_server_says(code: str, status: int) -> None:
    drive = Drive([refusal(code, status, retry_after="3"), reply({})])
    assert drive(asking()).status == 200
    assert drive.pauses == [3.0]


def test_overload_is_waited_out_for_longer_than_a_dead_server_but_not_past_the_timeout() -> None:
    drive = Drive([refusal("queue_full", 429, retry_after="1")] * 99, tries=3, timeout=10.0)
    with pytest.raises(QueueFull):
        drive(asking())
    assert len(drive.sent) > 3
    assert drive.now < 10.0


def test_a_full_queue_stored_nothing_so_anything_may_be_sent_again() -> None:
    assert Drive([refusal("queue_full", 429), reply({})])(asking(repeatable=False)).status == 200
    with pytest.raises(Unavailable):
        Drive([refusal("unavailable", 503), reply({})])(asking(repeatable=False))


def test_each_try_has_what_is_left_of_the_time() -> None:
    drive = Drive([refusal("unavailable", 503, retry_after="4"), reply({})], timeout=10.0)
    drive(asking())
    assert [send.timeout for send in drive.sent] == [10.0, 6.0]


def test_a_late_answer_is_a_deadline() -> None:
    with pytest.raises(DeadlineExceeded):
        Drive([NoResponse("timed out", sent=True, late=True)])(asking())


@pytest.mark.parametrize(
    ("got", "kind"),
    [
        (refusal("model_not_found", 404), ModelNotFound),
        (refusal("from_the_future", 418), TetherError),
        (reply(b"<html>", 404), NotFound),
        (reply(b"", 403), Forbidden),
        (reply(b"", 414), InvalidRequest),
        (reply(b"", 431), InvalidRequest),
        (reply(b"bad gateway", 502), Unavailable),
        (reply([], 409), Conflict),
        (reply({"error": "x"}, 500), TetherError),
    ],
)
def test_errors_take_the_class_of_their_code_or_else_of_their_status(got: Response, kind: type[TetherError]) -> None:
    error = failure(got)
    assert type(error) is kind


def test_a_status_without_a_body_is_told_in_words() -> None:
    error = failure(reply(b"", 431))
    assert error is not None
    assert error.message == "the server responded with HTTP 431: the headers are too large or too many"


@pytest.mark.parametrize(("text", "seconds"), [("7", 7.0), ("", 1.0), ("soon", 1.0), ("-1", 0.0), ("1e9", 3600.0)])
def test_retry_after_is_read_with_care(text: str, seconds: float) -> None:
    error = failure(refusal("unavailable", 503, retry_after=text))
    assert isinstance(error, Unavailable)
    assert error.retry_after == seconds


def test_an_answer_that_is_not_json_is_bad_json() -> None:
    for body in (b"<html>", b"[]", b"\xff"):
        with pytest.raises(BadJson):
            Drive([reply(body)])(lambda policy: flows.cancel(policy, "j"))


# one patience for many requests


def patiently(told: list[str], seconds: float = 60.0) -> Callable[[RetryPolicy], Flow[list[Response]]]:
    """Two requests, one after the other, within one time."""

    def flow(policy: RetryPolicy) -> Flow[list[Response]]:
        shared = replace(policy, patience=OperationDeadline(policy.monotonic() + seconds, told.append))
        first = yield from exchange(shared, Request("GET", "/a"))
        second = yield from exchange(shared, Request("GET", "/b"))
        return [first, second]

    return flow


def test_a_server_that_answered_once_is_waited_for_until_the_time_of_all_requests_is_over() -> None:
    told: list[str] = []
    drive = Drive([reply({}), *[REFUSED] * 20, reply({})])
    assert [got.status for got in drive(patiently(told))] == [200, 200]
    assert told == ["", *["no response: connection refused"] * 20, ""]
    left = [float(sent.headers[TIMEOUT_HEADER]) for sent in drive.sent]
    assert left == sorted(left, reverse=True)
    assert left[0] == 60
    assert left[-1] == pytest.approx(60 - drive.now, abs=0.01)


def test_the_time_of_all_requests_is_not_begun_anew_by_each() -> None:
    slow = [refusal("unavailable", 503, retry_after="20")] * 2
    drive = Drive([*slow, reply({}), *slow, reply({})])
    with pytest.raises(Unavailable):
        drive(patiently([]))
    assert drive.now == 40


def test_a_server_that_never_answered_is_given_up_after_a_few_tries() -> None:
    drive = Drive([REFUSED] * 99, tries=3)
    with pytest.raises(Unavailable):
        drive(patiently([]))
    assert len(drive.sent) == 3


@pytest.mark.parametrize(("code", "status"), [("storage_full", 503), ("quota_exceeded", 429)])
def test_room_is_not_waited_for(code: str, status: int) -> None:
    drive = Drive([refusal(code, status, retry_after="10")])
    with pytest.raises(TetherError) as caught:
        drive(patiently([]))
    assert caught.value.code == code
    assert drive.now == 0
