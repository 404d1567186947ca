"""What the settings accept and refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from service.serve import cluster_of, devices_of
from service.settings import SSH, ServerSettings, is_loopback

KEY = SecretStr("a-key-of-some-length")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOST", "API_KEY", "MODEL_ROOTS", "HUB_OWNERS", "DATABASE_URL", "HOSTS"):
        monkeypatch.delenv(f"KBOP_{name}", raising=False)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "[::1]", "localhost"])
def test_a_loopback_host_needs_no_key(host: str) -> None:
    assert is_loopback(host) and ServerSettings(host=host).api_key is None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "some-name"])
def test_any_other_host_without_a_key_is_refused_with_the_way_out(host: str) -> None:
    with pytest.raises(ValidationError, match="KBOP_API_KEY"):
        ServerSettings(host=host)
    assert ServerSettings(host=host, api_key=KEY).host == host


@pytest.mark.parametrize("key", ["short", "has a space in it!", "ümlautümlautümlaut"])
def test_a_weak_or_unsendable_key_is_refused_without_being_printed(key: str) -> None:
    with pytest.raises(ValidationError) as caught:
        ServerSettings.model_validate({"api_key": key})
    assert key not in str(caught.value)


def test_the_key_is_not_in_the_message_about_another_setting() -> None:
    with pytest.raises(ValidationError) as caught:
        ServerSettings(api_key=KEY, port=-1)
    text = KEY.get_secret_value()
    assert text not in str(caught.value) and text not in repr(ServerSettings(api_key=KEY))


def test_roots_are_read_like_path_and_owners_by_comma(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KBOP_MODEL_ROOTS", f"{tmp_path}/a:{tmp_path}/b")
    monkeypatch.setenv("KBOP_HUB_OWNERS", "one, two")
    settings = ServerSettings()
    assert settings.model_roots == (tmp_path / "a", tmp_path / "b") and settings.hub_owners == ("one", "two")


def test_the_database_is_sqlite_in_the_data_directory_by_default(tmp_path: Path) -> None:
    assert ServerSettings(data_dir=tmp_path).resolved_database_url() == f"sqlite:///{tmp_path / 'kbop.db'}"


def test_jobs_run_on_this_machine_without_a_host_list_and_on_its_nodes_with_one(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("a slots=2\nb slots=1\n")
    assert cluster_of(ServerSettings()) is None
    settings = ServerSettings(hosts=tmp_path / "hosts", node_python="/opt/python")
    cluster = cluster_of(settings)
    assert cluster is not None and (cluster.python, cluster.start_command) == ("/opt/python", SSH)
    assert devices_of(settings, cluster) == ("a/cuda:0", "a/cuda:1", "b/cuda:0")


@pytest.mark.parametrize("command", ["ssh {host}", "ssh '{command}"])
def test_a_node_command_that_would_start_nothing_is_refused(tmp_path: Path, command: str) -> None:
    with pytest.raises(ValidationError, match=r"has no \{command\}|is no command"):
        ServerSettings(hosts=tmp_path, node_command=command)


@pytest.mark.parametrize("idle", [{"node_command": "ssh {host} {command}"}, {"node_python": "/opt/python"}])
def test_a_setting_of_nodes_without_nodes_is_refused(idle: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match="no effect without KBOP_HOSTS"):
        ServerSettings(**idle)
