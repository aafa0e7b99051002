"""Settings: where each value comes from, and what is refused before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tether import environment, settings
from tether.errors import ConfigError
from tether.settings import Settings


def load(
    tmp_path: Path, *, files: dict[str, Any] | None = None, environ: dict[str, str] | None = None, **given: Any
) -> Settings:
    for name, content in (files or {}).items():
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return settings.load("gateway", overrides=given, environ=environ or {}, config_dir=tmp_path)


def refused(tmp_path: Path, **more: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, **more)
    assert "\n" not in caught.value.message
    return caught.value


def test_without_anything_the_defaults_hold(tmp_path: Path) -> None:
    assert load(tmp_path) == Settings()


def test_later_sources_win(tmp_path: Path) -> None:
    files: dict[str, Any] = {"gateway.json": {"workers": 3, "http_port": 1, "region": "a", "http_host": "h"}}
    files["gateway.prod.json"] = {"workers": 4, "http_port": 2, "region": "b"}
    environ = {"TETHER_ENVIRONMENT": "prod", "TETHER_WORKERS": "5", "TETHER_HTTP_PORT": "3"}
    found = load(tmp_path, files=files, environ=environ, workers=6)
    assert (found.http_host, found.region, found.http_port, found.workers) == ("h", "b", 3, 6)


def test_the_command_line_chooses_the_environment_too(tmp_path: Path) -> None:
    found = load(tmp_path, files={"gateway.prod.json": {"workers": 4}}, environment="prod")
    assert (found.environment, found.workers) == ("prod", 4)


def test_what_the_command_line_does_not_give_counts_for_nothing(tmp_path: Path) -> None:
    assert load(tmp_path, environ={"TETHER_WORKERS": "5"}, workers=None).workers == 5


def test_the_data_directory_is_tether_home(tmp_path: Path) -> None:
    assert load(tmp_path, environ={"TETHER_HOME": "/data"}).home == "/data"


def test_variables_of_the_client_and_of_others_are_left_alone(tmp_path: Path) -> None:
    environ = dict.fromkeys((*environment.OTHER_VARIABLES, "TETHER_CONFIG_DIR", "TETHERED", "PATH"), "x")
    assert load(tmp_path, environ=environ) == Settings()


def test_the_config_folder_comes_from_the_environment(tmp_path: Path) -> None:
    (tmp_path / "gateway.json").write_text('{"workers": 7}')
    assert settings.load("gateway", environ={"TETHER_CONFIG_DIR": str(tmp_path)}).workers == 7


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"files": {"gateway.json": {"wrokers": 1}}}, "'workers'"),
        ({"wrokers": 1}, "'workers'"),
        ({"files": {"gateway.json": "{"}}, "JSON"),
        ({"files": {"gateway.json": []}}, "object"),
        ({"environ": {"TETHER_WORKERS": "two"}}, "TETHER_WORKERS"),
        ({"environ": {"TETHER_WORKERS": "0"}}, "between 1 and 256"),
        ({"environ": {"TETHER_SHUTDOWN_TIMEOUT_S": "nan"}}, "between"),
        ({"files": {"gateway.json": {"workers": "2"}}}, "whole number"),
        ({"files": {"gateway.json": {"workers": True}}}, "whole number"),
        ({"files": {"gateway.json": {"shutdown_timeout_s": 10**400}}}, "number"),
        ({"log_level": "loud"}, "debug, info"),
        ({"max_body_bytes": 7 << 20}, "max_payload_bytes"),
        ({"heartbeat_s": 2.0}, "heartbeat_s"),
        ({"replicas": 3}, "nats_url"),
        ({"prefix": "a.b"}, "'prefix'"),
        ({"region": "EU West"}, "'region'"),
        ({"worker_name": "w>"}, "'worker_name'"),
    ],
)
def test_what_cannot_be_is_refused_and_says_what_would_do(tmp_path: Path, more: dict[str, Any], words: str) -> None:
    assert words in refused(tmp_path, **more).message


KUBERNETES = {
    "TETHER_SERVICE_HOST": "10.0.0.1",
    "TETHER_SERVICE_PORT": "8000",
    "TETHER_SERVICE_PORT_HTTP": "8000",
    "TETHER_PORT": "tcp://10.0.0.1:8000",
    "TETHER_PORT_8000_TCP": "tcp://10.0.0.1:8000",
    "TETHER_PORT_8000_TCP_PROTO": "tcp",
    "TETHER_PORT_8000_TCP_PORT": "8000",
    "TETHER_PORT_8000_TCP_ADDR": "10.0.0.1",
    "TETHER_GATEWAY_PORT": "tcp://10.0.0.1:8000",
    "TETHER_NATS_PORT": "tcp://10.0.0.2:4222",  # the name of a setting too
    "TETHER_NATS_SERVICE_PORT_MONITOR": "8222",
    "TETHER_HTTP_PORT": "udp://[fd00::1]:8000",
}


def test_what_kubernetes_sets_for_a_service_changes_no_setting_and_is_told_in_one_line(tmp_path: Path) -> None:
    assert load(tmp_path, environ=KUBERNETES) == Settings()
    (line,) = settings.ignored({**KUBERNETES, "TETHER_WORKERS": "3"})
    assert all(name in line for name in KUBERNETES)
    assert "enableServiceLinks" in line


@pytest.mark.parametrize(
    ("name", "near"),
    [("TETHER_WROKERS", "TETHER_WORKERS"), ("TETHER_OSP_PORT", "TETHER_OPS_PORT"), ("TETHER_0123456789", "")],
)
def test_a_variable_that_is_no_setting_is_told_with_the_nearest_one(tmp_path: Path, name: str, near: str) -> None:
    assert load(tmp_path, environ={name: "1"}) == Settings()
    (line,) = settings.ignored({name: "1", "TETHER_URL": "x", "TETHER_TEST_X": "x", "PATH": "x"})
    assert name in line
    assert ("did you mean" in line) == bool(near)
    assert near in line


def test_a_whole_number_may_stand_for_a_number(tmp_path: Path) -> None:
    assert load(tmp_path, files={"gateway.json": {"shutdown_timeout_s": 3}}).shutdown_timeout_s == 3.0


def test_every_default_is_within_its_own_limits(tmp_path: Path) -> None:
    defaults = {info.name: info.default for info in settings.table()}
    assert load(tmp_path, **defaults) == Settings()


def test_the_schema_describes_every_setting() -> None:
    found = settings.schema()
    assert set(found["properties"]) == set(settings.as_dict(Settings()))
    assert found["properties"]["workers"] == {
        "type": "integer",
        "default": 2,
        "description": "Workers that 'tether up' starts.",
        "minimum": 1,
        "maximum": 256,
    }
    assert found["properties"]["log_format"]["enum"] == ["auto", "json", "text"]
    assert not found["additionalProperties"]
