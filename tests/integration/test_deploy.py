"""What is shipped: the compose file, the images' recipe, and a wheel that works without its source tree."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import HeaderParser
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = ROOT / "deploy" / "compose.yaml"
PACKAGES = ("service", "jobs", "kbop_core")

pytestmark = pytest.mark.timeout(180)


# The compose file


@pytest.fixture(scope="module")
def compose_client() -> list[str]:
    """A command that understands compose files; `config` needs no daemon."""
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]) and subprocess.run([*command, "version"], capture_output=True).returncode == 0:
            return command
    pytest.skip("needs a compose client: neither `docker compose` nor `docker-compose` is here")


def config(client: list[str], **changes: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("KBOP_")} | changes
    command = [*client, "-f", str(COMPOSE), "config"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_the_compose_file_is_valid_for_the_client_that_is_here(compose_client):
    yaml = pytest.importorskip("yaml")
    answer = config(compose_client, KBOP_API_KEY="a-long-enough-key")
    assert answer.returncode == 0, answer.stderr
    services = yaml.safe_load(answer.stdout)["services"]
    assert services.keys() == {"server", "worker"}
    assert {s["environment"]["KBOP_API_KEY"] for s in services.values()} == {"a-long-enough-key"}


def test_the_compose_file_refuses_to_start_without_a_key(compose_client):
    answer = config(compose_client)
    assert answer.returncode != 0 and "openssl rand" in answer.stderr


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    yaml = pytest.importorskip("yaml")
    return dict(yaml.safe_load(COMPOSE.read_text())["services"])


def volumes(service: dict[str, Any]) -> dict[str, str]:
    """Place in the container → what is there, options included."""
    found = {}
    for volume in service["volumes"]:
        source, place, *options = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", volume).split(":")
        found[place] = ":".join([source, *options])
    return found


def test_the_worker_reserves_gpus_and_shared_memory_and_waits_for_a_healthy_server(services):
    worker = services["worker"]
    (device,) = worker["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia" and "gpu" in device["capabilities"]
    assert int(re.fullmatch(r"(\d+)gb", worker["shm_size"])[1]) >= 1
    assert worker["depends_on"] == {"server": {"condition": "service_healthy"}}


def test_server_and_worker_share_one_data_volume_and_read_only_sources(services):
    server, worker = volumes(services["server"]), volumes(services["worker"])
    assert server == worker and server["/data"] == "data"
    assert all(server[place].endswith(":ro") for place in ("/models", "/texts"))
    settings = services["server"]["environment"]
    assert settings == services["worker"]["environment"]
    places = [settings[f"KBOP_{name}"] for name in ("DATA_DIR", "MODEL_ROOTS", "DATA_ROOTS")]
    assert places == ["/data", "/models", "/texts"]


def test_every_setting_in_the_compose_file_exists(services):
    from service.settings import ServerSettings

    environment = services["server"]["environment"]
    names = {name.removeprefix("KBOP_").lower() for name in environment if name.startswith("KBOP_")}
    assert names <= ServerSettings.model_fields.keys()


def test_the_server_is_published_on_loopback_only_and_leaves_scheduling_to_the_worker(services):
    assert services["server"]["ports"] == ["127.0.0.1:8700:8700"] and "ports" not in services["worker"]
    assert services["server"]["environment"]["KBOP_EMBED_SCHEDULER"] == "false"
    assert services["worker"]["command"] == ["kbop", "worker"]


def test_the_worker_is_given_longer_to_stop_than_its_ranks(services):
    from service.settings import ServerSettings

    seconds = int(services["worker"]["stop_grace_period"].removesuffix("s"))
    assert seconds > ServerSettings.model_fields["grace_s"].default


# The example for Prometheus


def test_prometheus_finds_the_server_with_its_key():
    from service.settings import DEFAULT_PORT

    yaml = pytest.importorskip("yaml")
    (job,) = yaml.safe_load((ROOT / "deploy" / "prometheus.yml").read_text())["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"127.0.0.1:{DEFAULT_PORT}"]}]
    assert job.get("metrics_path", "/metrics") == "/metrics" and job["authorization"]["credentials_file"]


# The images


@pytest.fixture(scope="module")
def stages() -> dict[str, list[list[str]]]:
    """Build stage → its instructions as [NAME, rest], with those of the stage it starts from."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    found: dict[str, list[list[str]]] = {}
    current: list[list[str]] = []
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        instruction, rest = line.split(None, 1)
        if instruction == "FROM":
            base, _, name = rest.split()
            current = found[name] = list(found.get(base, []))
        current.append([instruction, rest])
    return found


def values(stage: list[list[str]], name: str) -> list[str]:
    return [rest for instruction, rest in stage if instruction == name]


@pytest.mark.parametrize("target", ["server", "worker"])
def test_an_image_runs_as_a_user_without_rights_and_says_how_it_is(services, stages, target):
    assert services[target]["build"]["target"] == target
    stage = stages[target]
    assert values(stage, "USER") == ["kbop"] and stage[-1][0] == "CMD"
    assert any(f"useradd --create-home --uid {uid} kbop" in run for run in values(stage, "RUN") for uid in [10001])
    (health,) = values(stage, "HEALTHCHECK")
    program, option, code = json.loads(health.partition("CMD")[2])
    assert (program, option) == ("python", "-c")
    ast.parse(code)


def test_what_the_workers_health_check_asks_for_exists(stages, tmp_path):
    code = json.loads(values(stages["worker"], "HEALTHCHECK")[0].partition("CMD")[2])[2]
    assert subprocess.run([sys.executable, "-c", code.replace("/data", str(tmp_path))], check=False).returncode == 1


def test_the_server_image_has_no_torch(stages):
    assert not any("torch" in run or "worker" in run for run in values(stages["server"], "RUN"))
    assert any("[worker]" in run for run in values(stages["worker"], "RUN"))


def test_the_images_copy_what_is_there_and_not_ignored(stages):
    ignored = {line.strip() for line in (ROOT / ".dockerignore").read_text().splitlines() if line.strip()}
    for stage in stages.values():
        for copied in values(stage, "COPY"):
            for source in copied.split()[:-1]:
                assert (ROOT / source).exists() and source not in ignored
    copied = " ".join(values(stages["server"], "COPY"))
    assert all(package in copied for package in PACKAGES)


# The wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of the sources, so that nothing appears in the project's folder."""
    source = tmp_path_factory.mktemp("source")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", str(source), "--no-deps", "--quiet", "--wheel-dir", str(out)]
    environment = os.environ | {"DS_BUILD_OPS": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    isolation = ["--no-build-isolation"] if can_build_here() else []
    done = subprocess.run([*command, *isolation], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return next(out.glob("kbop-*.whl"))


def can_build_here() -> bool:
    """Whether this environment's setuptools is new enough; otherwise pip fetches one."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return int(version("setuptools").split(".")[0]) >= 77
    except PackageNotFoundError:
        return False


def test_the_wheel_holds_every_module_and_the_files_they_need(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(p.relative_to(ROOT)) for package in PACKAGES for p in (ROOT / package).rglob("*.py")}
    assert modules - names == set()
    assert "jobs/migrations/versions/0001_first.py" in names and "jobs/templates/report.html.j2" in names
    teacher = {str(p.relative_to(ROOT)) for p in (ROOT / "jobs/demo/teacher").iterdir()}
    assert {Path(name).name for name in teacher} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert teacher - names == set()


def test_the_wheel_holds_nothing_else(wheel):
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)


def test_the_wheel_needs_torch_only_for_a_worker(wheel):
    archive = zipfile.ZipFile(wheel)
    (metadata,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    needs = HeaderParser().parsestr(archive.read(metadata).decode()).get_all("Requires-Dist")
    heavy = [n for n in needs if re.match(r"(torch|deepspeed|transformers|datasets|numpy|matplotlib)\b", n)]
    assert heavy and all("extra == " in need for need in heavy)
    assert any("kbop = service.cli:app" in archive.read(n).decode() for n in archive.namelist() if "entry_points" in n)


#: Migrations, the built-in model and the command line, from the wheel alone.
USE = """
import sys
from pathlib import Path
import jobs
from jobs.sources import SourcePolicy, resolve_model
from jobs.store import Store
from typer.testing import CliRunner
from service.cli import app

here = Path.cwd().resolve()
assert Path(jobs.__file__).is_relative_to(here), jobs.__file__
Store.open(f"sqlite:///{here}/kbop.db").ping()
assert Path(resolve_model("builtin:demo", SourcePolicy()).location).is_relative_to(here)
assert CliRunner().invoke(app, ["--help"]).exit_code == 0
assert "torch" not in sys.modules
"""


def test_the_wheel_works_without_the_source_tree(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", USE]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
