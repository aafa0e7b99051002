"""Names of streams, subjects, buckets: one for each thing, and back."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tether.domain.job import SHARED, Lane, LaneKind, Priority
from tether.domain.manifest import NAME_PATTERN, check_name
from tether.errors import BadName
from tether.wire.subjects import Names, name_of, pool_token, token

client_names = st.from_regex(NAME_PATTERN, fullmatch=True).filter(lambda name: not name.endswith("\n"))
lanes = st.builds(
    Lane,
    kind=st.sampled_from(LaneKind),
    model=client_names,
    version=st.integers(1, 2**31),
    region=st.sampled_from(["local", "eu-west_1"]),
    pool=st.just(SHARED) | client_names,
    priority=st.just(Priority.NORMAL),
)
NAMES = Names("tether", infer_shards=3, job_shards=2, partitions=4)


@given(client_names)
def test_a_client_name_is_one_plain_token_and_comes_back(name: str) -> None:
    assert re.fullmatch(r"[a-z0-9_=-]+", token(name))
    assert name_of(token(name)) == name


@given(lanes, st.sampled_from(Priority))
def test_a_lane_is_read_back_from_its_subject(lane: Lane, priority: Priority) -> None:
    if lane.kind is LaneKind.JOB:
        lane = Lane(lane.kind, lane.model, lane.version, lane.region, lane.pool, priority)
    subject = NAMES.lane(lane)
    assert NAMES.parse_lane(subject) == lane
    shards = NAMES.infer_shards if lane.kind is LaneKind.INFER else NAMES.job_shards
    wildcards = NAMES.infer_subjects if lane.kind is LaneKind.INFER else NAMES.jobs_subjects
    stream = NAMES.infer_stream if lane.kind is LaneKind.INFER else NAMES.jobs_stream
    own = pool_token(lane.pool)
    found = [shard for shard in (*range(shards), own) if subject.startswith(wildcards(shard)[:-1])]
    assert [stream(shard) for shard in found] == [NAMES.lane_stream(lane)]
    assert (found == [own]) == (lane.pool != SHARED)


@given(lanes, lanes)
def test_two_lanes_never_share_a_consumer(first: Lane, second: Lane) -> None:
    same = NAMES.lane_consumer(first) == NAMES.lane_consumer(second)
    assert not (same and first.kind == second.kind and first != second)
    assert not re.search(r"[.*>/\\\s]", NAMES.lane_consumer(first))


def test_names_that_joined_alike_have_consumers_of_their_own() -> None:
    first = Lane(LaneKind.INFER, "a_b", 1, pool="shared")
    second = Lane(LaneKind.INFER, "b", 1, pool="shared_a")
    assert NAMES.lane_consumer(first) != NAMES.lane_consumer(second)


@pytest.mark.parametrize(
    "subject",
    [
        "",
        "tether",
        "tether.infer",
        "other.infer.0.local.shared.m.1",
        "tether.infer.0.local.shared.m",
        "tether.infer.0.local.shared.m.x",
        "tether.infer.0.local.shared.m.1.2",
        "tether.job.0.urgent.local.shared.m.1",
        "tether.result.j",
    ],
)
def test_what_is_no_lane_is_none(subject: str) -> None:
    assert NAMES.parse_lane(subject) is None


def test_everything_has_a_name_under_the_prefix() -> None:
    names = Names("acme")
    lane = Lane(LaneKind.JOB, "m.v2", 3)
    assert names.lane(lane) == "acme.job.0.normal.local.shared.m=v2.3"
    assert names.results_stream == "ACME_RESULTS"
    assert names.dead_stream == "ACME_DEAD"
    assert names.result("j") == "acme.result.j"
    assert names.results() == "acme.result.*"
    assert names.reply("g") == "acme.reply.g"
    assert names.dead(lane) == "acme.dead.shared.m=v2.3"
    assert names.dead_subjects() == "acme.dead.>"
    assert names.service("registerWorker") == "acme.svc.registerWorker"
    assert names.bucket_stream("models") == "KV_ACME_models"
    assert names.bucket_key("models", names.version_key("m.v2", 3)) == "$KV.ACME_models.m=v2.3"
    assert names.inbox("worker", "worker-1") == "_INBOX.acme.worker.worker-1"
    assert names.chunk_bucket("m") == names.chunk_buckets()[0] == "ACME_CHUNKS_0"
    assert names.object_stream("B") == "OBJ_B"
    assert names.object_chunk("B", "n") == "$O.B.C.n"
    assert names.object_meta("B", "e") == "$O.B.M.e"


@given(client_names)
def test_a_model_stays_in_one_partition(model: str) -> None:
    assert NAMES.chunk_bucket(model) in NAMES.chunk_buckets()
    assert NAMES.chunk_bucket(model) == Names("tether", partitions=4).chunk_bucket(model)


@pytest.mark.parametrize("name", ["", "A", "-a", ".a", "a b", "a*", "a>", "a=b", "é", "a\n", "a" * 65, "a/b", "\ud800"])
def test_names_that_would_break_a_subject_are_refused(name: str) -> None:
    with pytest.raises(BadName, match="model") as caught:
        check_name(name, field="model")
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("name", ["a", "0", "a.b-c_d", "a" * 64])
def test_names_that_are_allowed_come_back(name: str) -> None:
    assert check_name(name, field="model") == name


def test_an_isolated_tenant_is_read_from_its_stream_and_only_from_that() -> None:
    names = Names("tether")
    assert names.stream_pool(names.pool_jobs_stream("a.b-c")) == "a.b-c"
    for other in ("TETHER_JOBS_0", names.pool_infer_stream("a"), "TETHER_RESULTS_=a", "KV_TETHER_jobs"):
        assert names.stream_pool(other) is None


def test_a_route_of_a_pool_has_a_key_of_its_own() -> None:
    names = Names("tether")
    assert names.version_key("m.n", 3) == names.version_key("m.n", 3, "shared") == "m=n.3"
    assert names.version_key("m.n", 3, "a.b") == "m=n.3.=a=b"
