"""Every value that comes from the environment: the server's settings and the client's endpoint and key.

Refuses to be read elsewhere: no other module looks at `os.environ`; they receive these values as arguments.
"""

from __future__ import annotations

import ipaddress
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

from platformdirs import user_data_path
from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

Paths = Annotated[tuple[Path, ...], NoDecode]
Names = Annotated[tuple[str, ...], NoDecode]

# `hide_input_in_errors`: a message about one setting must not print the API key beside it.
ENVIRONMENT = SettingsConfigDict(
    env_prefix="KBOP_", env_ignore_empty=True, extra="ignore", frozen=True, hide_input_in_errors=True
)

MIB = 2**20
DEFAULT_PORT = 8700
#: Asks nothing, and notices within seconds that a node is not there, or not any more.
SSH = "ssh -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=5 -o ServerAliveCountMax=3 {host} {command}"


def is_loopback(host: str) -> bool:
    """Whether `host` can only be reached from this machine; a name other than `localhost` counts as not."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def visible_gpus() -> str | None:
    """CUDA_VISIBLE_DEVICES of this process; None when it is not set (empty means: no GPU at all)."""
    return os.environ.get("CUDA_VISIBLE_DEVICES")


class ServerSettings(BaseSettings):
    """Settings of `kbop serve` and `kbop worker`; each is also an environment variable `KBOP_<NAME>`."""

    model_config = ENVIRONMENT

    host: str = Field(default="127.0.0.1", min_length=1, description="Address to listen on.")
    port: int = Field(default=DEFAULT_PORT, ge=0, le=65_535, description="TCP port; 0 takes a free one.")
    data_dir: Path = Field(
        default_factory=lambda: user_data_path("kbop"), description="Database, artifacts and job folders."
    )
    database_url: str | None = Field(default=None, description="SQLAlchemy URL; default: SQLite in `data_dir`.")
    model_roots: Paths = Field(default=(), description="Folders models may be read from, separated like PATH.")
    data_roots: Paths = Field(default=(), description="Folders text may be read from, separated like PATH.")
    hub_owners: Names = Field(default=(), description="Hub owners allowed, separated by commas; `*` is any.")
    api_key: SecretStr | None = Field(
        default=None, description="When set, /v1 routes and /metrics want it as Bearer token."
    )
    embed_scheduler: bool = Field(default=True, description="Run the scheduler inside `kbop serve`.")
    cpu_slots: int = Field(
        default_factory=lambda: os.cpu_count() or 1,
        ge=1,
        le=4096,
        description="Ranks at once where there is no GPU.",
    )
    max_attempts: int = Field(default=3, ge=1, le=100, description="Attempts of a job that system errors end.")
    lease_s: float = Field(default=30.0, ge=1.0, le=3600.0, description="Seconds a runner may be silent.")
    grace_s: float = Field(default=30.0, ge=0.0, le=3600.0, description="Seconds between SIGTERM and SIGKILL.")
    hosts: Path | None = Field(
        default=None, description="Host list (DeepSpeed hostfile) of the nodes jobs run on; default: this machine."
    )
    node_command: str = Field(
        default=SSH,
        description="How a process is started on a node: a command with `{host}` and, as one argument, `{command}`.",
    )
    node_python: str = Field(
        default=sys.executable, min_length=1, description="Python on every node in which kbop is installed."
    )
    watchdog_s: float = Field(
        default=1800.0,
        ge=1.0,
        le=7 * 86_400.0,
        description="Seconds training may go without a step before its attempt ends; other stages: four times that.",
    )
    disk_floor_bytes: int = Field(default=512 * MIB, ge=0, description="Free bytes below which no job starts.")
    max_body_bytes: int = Field(default=MIB, ge=1024, le=1024 * MIB, description="Largest request body.")

    @field_validator("model_roots", "data_roots", mode="before")
    @classmethod
    def _split_paths(cls, value: object) -> object:
        return tuple(p for p in value.split(os.pathsep) if p) if isinstance(value, str) else value

    @field_validator("hub_owners", mode="before")
    @classmethod
    def _split_names(cls, value: object) -> object:
        return tuple(n.strip() for n in value.split(",") if n.strip()) if isinstance(value, str) else value

    @field_validator("data_dir", "model_roots", "data_roots", "hosts", mode="after")
    @classmethod
    def _absolute(cls, value: Path | tuple[Path, ...] | None) -> Path | tuple[Path, ...] | None:
        if value is None:
            return None
        if isinstance(value, tuple):
            return tuple(p.expanduser().resolve() for p in value)
        return value.expanduser().resolve()

    @field_validator("api_key", mode="after")
    @classmethod
    def _long_enough(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and len(value.get_secret_value()) < 16:
            raise ValueError("the API key has fewer than 16 characters: make one with `openssl rand -hex 32`")
        if value is not None and not all("!" <= c <= "~" for c in value.get_secret_value()):
            raise ValueError("the API key may hold visible ASCII characters only, or no HTTP header could carry it")
        return value

    @field_validator("node_command", mode="after")
    @classmethod
    def _starts_a_command(cls, value: str) -> str:
        try:
            words = shlex.split(value)
        except ValueError as error:
            raise ValueError(f"{value!r} is no command: {error}") from None
        if not any("{command}" in word for word in words):
            raise ValueError(f"{value!r} has no {{command}}, so it would start nothing: the default is {SSH!r}")
        return value

    @model_validator(mode="after")
    def _nodes_need_a_host_list(self) -> ServerSettings:
        idle = sorted(self.model_fields_set & {"node_command", "node_python"})
        if self.hosts is None and idle:
            raise ValueError(f"KBOP_{idle[0].upper()} has no effect without KBOP_HOSTS: set both or none")
        return self

    @model_validator(mode="after")
    def _public_needs_a_key(self) -> ServerSettings:
        if self.api_key is None and not is_loopback(self.host):
            raise ValueError(
                f"refusing to listen on {self.host} without an API key, where anybody on the network could "
                "submit jobs: set KBOP_API_KEY (16 or more characters), or listen on 127.0.0.1"
            )
        return self

    def resolved_database_url(self) -> str:
        """The SQLAlchemy URL in force."""
        return self.database_url or f"sqlite:///{self.data_dir / 'kbop.db'}"


class ClientSettings(BaseSettings):
    """Where the commands that talk to a server find it."""

    model_config = ENVIRONMENT

    endpoint: str = Field(default=f"http://127.0.0.1:{DEFAULT_PORT}", description="Base URL of the server.")
    api_key: SecretStr | None = Field(default=None, description="Sent as Bearer token.")
