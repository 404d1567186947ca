"""Fixtures of whole jobs: a real server process with all that it starts, and a tiny trained LLaMA with its own text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from jobs.json_files import read_json
from jobs.layout import attempt_tag
from jobs.process import ProcessIdentity, sweep, tagged

TERMINAL = ("succeeded", "failed", "cancelled")
#: Tokens in a window of the tiny model, pieces in its vocabulary, weights that share a scale in its jobs.
CONTEXT, VOCABULARY, GROUP = 64, 300, 32

Spec = dict[str, Any]
Job = dict[str, Any]


@dataclass
class KbopServer:
    """`kbop serve` on a free port: what a user sees of it over HTTP, and the processes behind it.

    Attributes:
        folder: parent of the data directory and of the server's log.
        environment: KBOP_ settings.
    """

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[str] | None = None
    http: httpx.Client = field(default_factory=httpx.Client)

    @property
    def data_dir(self) -> Path:
        return self.folder / "data"

    def start(self) -> None:
        """Start it, or start it again on the same data directory after `kill`; returns when it listens."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("KBOP_")}
        own = {"KBOP_DATA_DIR": str(self.data_dir), "KBOP_CPU_SLOTS": "2", "CUDA_VISIBLE_DEVICES": ""}
        environment = inherited | own | {"HF_HUB_OFFLINE": "1", "KBOP_DISK_FLOOR_BYTES": "0"} | self.environment
        with (self.folder / "server.log").open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "service.cli", "serve", "--port", "0"],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("kbop is listening on "), (self.folder / "server.log").read_text()
        self.http.close()
        self.http = httpx.Client(base_url=line.split()[-1], timeout=30, trust_env=False)

    def kill(self) -> None:
        """SIGKILL the server alone; runners and ranks are not its to take along."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            assert self.process.stdout is not None
            self.process.stdout.close()
            self.process = None

    def close(self) -> None:
        """Leave no process behind: the server, then every runner, then every rank of every attempt."""
        self.http.close()
        self.kill()
        for folder in self.data_dir.glob("jobs/*/attempts/*"):
            runner = ProcessIdentity.from_json(read_json(folder / "runner.json"))
            process = None if runner is None else runner.process()
            if process is not None:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            sweep(attempt_tag(folder.parent.parent.name, int(folder.name)))

    def submit(self, spec: Spec) -> str:
        """A job's id."""
        answer = self.http.post("/v1/jobs", json=spec)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def refusal(self, spec: Spec) -> Job:
        """The problem that the server answers a submission with; nothing is queued."""
        answer = self.http.post("/v1/jobs", json=spec)
        assert answer.status_code == 422, answer.text
        assert answer.headers["content-type"] == "application/problem+json"
        return dict(answer.json())

    def job(self, job_id: str) -> Job:
        answer = self.http.get(f"/v1/jobs/{job_id}")
        answer.raise_for_status()
        return dict(answer.json())

    def events(self, job_id: str) -> list[Job]:
        """Every event so far."""
        page = self.http.get(f"/v1/jobs/{job_id}/events", params={"limit": 1000}).json()
        assert not page["has_more"]
        return list(page["data"])

    def report(self, job_id: str) -> Job:
        return dict(self.http.get(f"/v1/jobs/{job_id}/report").raise_for_status().json())

    def artifacts(self, job_id: str) -> dict[str, Job]:
        """Path → artifact."""
        return {a["path"]: a for a in self.http.get(f"/v1/jobs/{job_id}/artifacts").raise_for_status().json()["data"]}

    def content(self, job_id: str, path: str) -> bytes:
        """Bytes of one artifact."""
        return self.http.get(f"/v1/jobs/{job_id}/artifacts/{path}").raise_for_status().content

    def until(self, condition: Callable[[], object], job_id: str, seconds: float = 90) -> None:
        """Wait; a job that fails or takes too long shows its logs."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not within {seconds} s\n{self.logs(job_id)}"
            time.sleep(0.05)

    def ended(self, job_id: str, seconds: float = 240) -> Job:
        """The job once it has reached its end."""
        self.until(lambda: self.job(job_id)["status"] in TERMINAL, job_id, seconds)
        return self.job(job_id)

    def succeeded(self, job_id: str, seconds: float = 240) -> Job:
        """The job, which must succeed."""
        job = self.ended(job_id, seconds)
        assert job["status"] == "succeeded", f"{job['error']}\n{self.logs(job_id)}"
        return job

    def folder_of(self, job_id: str) -> Path:
        """The job's folder."""
        return self.data_dir / "jobs" / job_id

    def attempts(self, job_id: str) -> list[str]:
        """Names of the attempts' folders."""
        return sorted(folder.name for folder in (self.folder_of(job_id) / "attempts").iterdir())

    def ranks(self, job_id: str, attempt: int = 1) -> list[psutil.Process]:
        """Living ranks of an attempt: what carries its tag and was started as a rank."""
        return tagged(attempt_tag(job_id, attempt))

    def until_trained(self, job_id: str) -> None:
        """Wait until the job trains and has a complete training checkpoint."""
        checkpoints = self.folder_of(job_id) / "work/train/checkpoints"
        self.until(lambda: any(checkpoints.glob("step-*/manifest.json")), job_id)

    def logs(self, job_id: str) -> str:
        """Ends of every log of a job."""
        paths = sorted(self.folder_of(job_id).glob("attempts/*/*.log"))
        return "\n".join(f"== {path}\n{path.read_text(errors='replace')[-3000:]}" for path in paths)


Serve = Callable[..., KbopServer]


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """Starts servers that may read `roots`; ends them and all they started."""
    servers: list[KbopServer] = []

    def start(*roots: Path, **environment: str) -> KbopServer:
        allowed = os.pathsep.join(map(str, roots))
        own = {"KBOP_MODEL_ROOTS": allowed, "KBOP_DATA_ROOTS": allowed} | environment
        servers.append(KbopServer(tmp_path_factory.mktemp("server"), own))
        servers[-1].start()
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@dataclass(frozen=True)
class Tiny:
    """A model of two blocks that has learned a little, and prose of this Python's own documentation.

    Attributes:
        folder: holds the others.
        model: LLaMA in Hugging Face form (hidden 64, FFN 128, GQA, tied head, float32), with its tokenizer.
        train: .txt to train on.
        stories: .jsonl of several documents, not in `train`.
        page: .txt of one document, not in `train`.
    """

    folder: Path
    model: Path
    train: Path
    stories: Path
    page: Path

    def spec(self, **changes: Any) -> Spec:
        """A job of 40 steps on two ranks, with some fields replaced (`method` and `resources`: merged)."""
        spec: Spec = {
            "model": str(self.model),
            "data": [{"source": str(self.train)}],
            "eval": [{"source": str(self.stories)}, {"source": str(self.page)}],
            "method": {
                "tokens": 40 * 8 * CONTEXT,
                "batch_tokens": 8 * CONTEXT,
                "calibration_tokens": 64 * CONTEXT,
                "blockwise_steps": 2,
            },
            "group_size": GROUP,
            "checkpoint_every": 5,
            "resources": {"gpus": 2, "max_micro_batch": 4},
        }
        for part in ("method", "resources"):
            changes[part] = spec[part] | changes.get(part, {})
        if changes["method"].get("effort") == "quick":  # what only training reads is refused there
            changes["method"] = {k: v for k, v in changes["method"].items() if k not in ("tokens", "batch_tokens")}
        if changes.get("init") == "random":
            del changes["method"]["calibration_tokens"], changes["method"]["blockwise_steps"]
        return spec | changes


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """The tiny model: made and trained once for all tests, in a few seconds."""
    folder = tmp_path_factory.mktemp("tiny").resolve()
    made = Tiny(folder, folder / "model", folder / "train.txt", folder / "stories.jsonl", folder / "page.txt")
    page, stories, train = prose()
    made.page.write_text(page, encoding="utf-8")
    made.train.write_text(train, encoding="utf-8")
    made.stories.write_text("".join(json.dumps({"text": story}) + "\n" for story in stories), encoding="utf-8")
    make_model(made.model, train)
    return made


def prose() -> tuple[str, list[str], str]:
    """English that every Python installation carries: one page, some paragraphs, and 50 kB of neither."""
    from pydoc_data.topics import topics

    page, stories = "import", ("with", "dict", "class")
    names = ("if", "assert", "exprlists", "for", "function", "global", "lambda", "return", "subscriptions", "try")
    names += ("while", "yield", "booleans", "calls", "comparisons", "numbers")
    paragraphs = [p for name in stories for p in topics[name].split("\n\n") if len(p) > 80]
    return topics[page], paragraphs, "\n".join(topics[name] for name in names if name in topics)


def make_model(folder: Path, text: str) -> None:
    """Train a tokenizer and, for a few hundred steps, a LLaMA on `text`; write both to `folder`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    tokenizer = make_tokenizer(text)
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    ids = torch.tensor(tokenizer(text).input_ids)
    windows = ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3)
    for _ in range(250):
        batch = windows[torch.randint(len(windows), (8,))]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)


def make_tokenizer(text: str) -> Any:
    """Byte-level BPE with a BOS at the start of each document."""
    from tokenizers import ByteLevelBPETokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "</s>"]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([text], vocab_size=VOCABULARY, special_tokens=special, show_progress=False)
    bpe._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>")
