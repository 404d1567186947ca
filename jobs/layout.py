"""Where the files of jobs are: the one place that knows the names of what lies under a data directory.

Refuses to create, read or write any of them.

    data_dir/
      kbop.db, scheduler.lock
      artifacts/sha256/ab/<hex>
      jobs/<job_id>/             job_dir
        spec.json                the resolved spec
        work/                    stage outputs, shared by all attempts
          stages/<stage>.json    done markers
          train/metrics.jsonl    one line per training step
          packed/                checkpoint to publish, with manifest.json
          report/                report.json, report.html
        attempts/<n>/            launch.json runner.json events.jsonl error.json exit.json *.log
"""

from __future__ import annotations

from pathlib import Path


def artifacts_dir(data_dir: Path) -> Path:
    """Folder of the content-addressed artifact store."""
    return data_dir / "artifacts"


def job_dir(data_dir: Path, job_id: str) -> Path:
    """Folder of one job."""
    return data_dir / "jobs" / job_id


def attempt_dir(job_dir: Path, attempt: int) -> Path:
    """Folder of one attempt (1, 2, ...) of the job at `job_dir`."""
    return job_dir / "attempts" / str(attempt)


def packed_dir(job_dir: Path) -> Path:
    """The checkpoint folder that is published."""
    return job_dir / "work" / "packed"


def training_metrics(job_dir: Path) -> Path:
    """What stage `train` wrote about each step, one JSON object a line."""
    return job_dir / "work" / "train" / "metrics.jsonl"


def report_dir(job_dir: Path) -> Path:
    """Folder of report.json and report.html."""
    return job_dir / "work" / "report"


def rank_log(attempt_dir: Path, rank: int) -> Path:
    """Standard output and error of one rank."""
    return attempt_dir / f"rank{rank}.log"


def node_log(attempt_dir: Path, node: str) -> Path:
    """What the start command and the agent of a node wrote to standard error."""
    return attempt_dir / f"node-{node}.log"


def runner_log(attempt_dir: Path) -> Path:
    """Standard output and error of the runner."""
    return attempt_dir / "runner.log"


def attempt_tag(job_id: str, attempt: int) -> str:
    """Value of KBOP_ATTEMPT_TAG, by which every process of an attempt is found."""
    return f"{job_id}/{attempt}"
