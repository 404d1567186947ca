"""Bad input ends in a clear error: 422 with a code from the API, or a failed job that its user can repair.

Errors in ranks are provoked in this process, with the pipeline of one rank; only a few go through the whole chain.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(300)

Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def server(serve, tiny):
    return serve(tiny.folder)


@pytest.fixture
def inside(tiny, request):
    """A new folder under the server's root."""
    folder = tiny.folder / request.node.name.replace("/", "_")
    folder.mkdir()
    return folder


# Refused on submission


def refused(server, spec: dict[str, Any], code: str, pointer: str) -> str:
    """The detail of a refusal, which must name the field, say what to do, and queue nothing."""
    before = server.http.get("/v1/jobs").json()["data"]
    problem = server.refusal(spec)
    assert (problem["code"], problem["errors"][0]["pointer"]) == (code, pointer), problem
    assert problem["hint"] and problem["request_id"]
    assert server.http.get("/v1/jobs").json()["data"] == before
    return str(problem["detail"])


@pytest.mark.parametrize(
    ("field", "value", "code", "pointer"),
    [
        ("model", "/nowhere/at/all", "path_not_allowed", "/model"),
        ("model", "{folder}/no-such-model", "unknown_model", "/model"),
        ("model", "builtin:no-such-model", "unknown_model", "/model"),
        ("model", "nobody/nothing", "owner_not_allowed", "/model"),
        ("model", "./relative", "path_not_allowed", "/model"),
        ("model", "{folder}/../../../etc", "path_not_allowed", "/model"),
        ("data", [{"source": "/etc/passwd"}], "path_not_allowed", "/data/0/source"),
        ("data", [{"source": "{folder}/no-such.txt"}], "unknown_data", "/data/0/source"),
        ("data", [{"source": "{folder}/model/model.safetensors"}], "bad_data_type", "/data/0/source"),
        ("eval", [{"source": "builtin:python-docs"}, {"source": "/etc/passwd"}], "path_not_allowed", "/eval/1/source"),
        ("colour", "red", "invalid_spec", "/colour"),
        ("data", "text", "invalid_spec", "/data"),
        ("data", [], "invalid_spec", "/data"),
        ("group_size", 12, "invalid_spec", "/group_size"),
        ("seed", "one", "invalid_spec", "/seed"),
        ("method", {"flip_rate": "fast"}, "invalid_spec", "/method/flip_rate"),
        ("method", {"steps": 5}, "invalid_spec", "/method/steps"),
        ("resources", {"gpus": 0}, "invalid_spec", "/resources/gpus"),
        ("resources", {"gpus": 3}, "not_enough_devices", "/resources/gpus"),
    ],
)
def test_a_spec_is_refused_with_the_field_that_is_wrong(server, tiny, field, value, code, pointer):
    value = json.loads(json.dumps(value).replace("{folder}", str(tiny.folder)))
    spec = tiny.spec() | {field: value}
    refused(server, spec, code, pointer)


def test_a_link_out_of_the_allowed_folder_is_refused(server, tiny, tmp_path, inside):
    shutil.copytree(tiny.model, tmp_path / "outside")
    (inside / "link").symlink_to(tmp_path / "outside")
    refused(server, tiny.spec(model=str(inside / "link")), "path_not_allowed", "/model")


def test_weights_that_are_a_link_out_of_the_allowed_folder_are_refused(server, tiny, tmp_path, inside):
    outside = shutil.move(copy_of(tiny.model, inside / "model") / "model.safetensors", tmp_path)
    (inside / "model" / "model.safetensors").symlink_to(outside)
    refused(server, tiny.spec(model=str(inside / "model")), "path_not_allowed", "/model")


def test_weights_that_are_only_pickles_are_refused(server, tiny, inside):
    import torch

    model = copy_of(tiny.model, inside / "model")
    (model / "model.safetensors").unlink()
    torch.save({"weight": torch.ones(1)}, model / "pytorch_model.bin")
    detail = refused(server, tiny.spec(model=str(model)), "pickle_weights", "/model")
    assert "pickle" in detail


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_config_that_brings_code_is_refused(server, tiny, inside, file):
    model = copy_of(tiny.model, inside / "model")
    set_json(model / file, auto_map={"AutoModelForCausalLM": "evil.Model"})
    refused(server, tiny.spec(model=str(model)), "remote_code", "/model")


def test_a_weight_file_that_was_cut_short_is_refused(server, tiny, inside):
    weights = copy_of(tiny.model, inside / "model") / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1)
    refused(server, tiny.spec(model=str(inside / "model")), "bad_weights", "/model")


def test_a_text_without_a_byte_is_refused(server, tiny, inside):
    (inside / "empty.txt").touch()
    refused(server, tiny.spec(data=[{"source": str(inside / "empty.txt")}]), "empty_data", "/data/0/source")


# Found by a rank


def copy_of(model: Path, target: Path) -> Path:
    return Path(shutil.copytree(model, target))


def set_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_weights(model: Path, change: Callable[[dict[str, Any]], dict[str, Any] | None]) -> None:
    """Rewrite the weights of a model by `change`, which edits the tensors or returns others."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    save_file(change(tensors) or tensors, model / "model.safetensors", {"format": "pt"})


def poison(value: float, name: str = "model.layers.1.mlp.down_proj.weight") -> Change:
    """One weight becomes `value`."""

    def change(tensors: dict[str, Any]) -> None:
        tensors[name][0, 0] = value

    return lambda model: change_weights(model, change)


def scale(factor: float, part: str) -> Change:
    """Every tensor whose name holds `part` is multiplied."""

    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        return {name: t * factor if part in name else t for name, t in tensors.items()}

    return lambda model: change_weights(model, change)


def forget_a_layer(model: Path) -> None:
    change_weights(model, lambda tensors: {n: t for n, t in tensors.items() if "layers.1.mlp" not in n})


def shrink_the_vocabulary(model: Path) -> None:
    set_json(model / "config.json", vocab_size=200)
    name = "model.embed_tokens.weight"
    change_weights(model, lambda tensors: tensors | {name: tensors[name][:200].contiguous()})


def remove_the_tokenizer(model: Path) -> None:
    for file in model.glob("tokenizer*"):
        file.unlink()


class OneRank:
    """The pipeline of one rank in this process, on a job of effort quick, which needs no DeepSpeed engine."""

    def __init__(self, folder: Path, spec: dict[str, Any]) -> None:
        import torch

        from jobs.journal import Journal
        from jobs.spec import JobSpec
        from jobs.workspace import Workspace
        from kbop_core.shard import Gang

        torch.set_num_threads(1)
        gang, journal = Gang(), Journal(None)
        self.folder = folder / "job"
        self.space = Workspace(self.folder, JobSpec.model_validate(spec), 1, gang, torch.device("cpu"), journal)

    def run(self) -> dict[str, Any]:
        """The report, read as strictly as other programs read JSON."""
        from jobs.pipeline import run_pipeline

        run_pipeline(self.space)

        def refuse(constant: str) -> None:
            raise AssertionError(f"{constant} in report.json, which is not JSON")

        return dict(json.loads((self.folder / "work/report/report.json").read_text(), parse_constant=refuse))

    def error(self) -> Any:
        """What the rank would leave in error.json; it must be the user's to repair, and leave nothing to publish."""
        from jobs.rank_main import describe
        from kbop_core.errors import KbopError

        with pytest.raises(KbopError) as caught:
            self.run()
        known = describe(caught.value)
        assert known is not None and known.message and known.hint
        assert (known.origin, known.retryable) == ("user", False), known
        assert not (self.folder / "work/packed").exists() and not (self.folder / "work/report").exists()
        return known

    def stages(self) -> set[str]:
        """Stages with a done marker."""
        return {marker.stem for marker in (self.folder / "work/stages").glob("*.json")}


@pytest.fixture
def quick(tiny, tmp_path):
    """Makes a one-rank job with changed fields and, if asked, a changed copy of the model."""

    def make(change: Change | None = None, **fields: Any) -> OneRank:
        spec = tiny.spec(method={"effort": "quick", "calibration_tokens": 512} | fields.pop("method", {}))
        if change is not None:
            spec["model"] = str(copy_of(tiny.model, tmp_path / "model"))
            change(tmp_path / "model")
        spec["eval"] = [{"source": str(tiny.page)}]
        return OneRank(tmp_path, spec | fields)

    return make


@pytest.mark.parametrize(
    ("change", "codes", "said"),
    [
        (poison(float("nan")), {"bad_weights"}, "model.layers.1.mlp.down_proj.weight"),
        (poison(float("-inf")), {"bad_weights"}, "NaN or infinity in 1 "),
        (forget_a_layer, {"bad_weights", "model_error"}, "model.layers.1.mlp"),
        (shrink_the_vocabulary, {"model_error", "data_error", "unsupported_model"}, "199"),
        (lambda m: set_json(m / "config.json", intermediate_size=96), {"bad_weights", "model_error"}, ""),
        (lambda m: set_json(m / "config.json", model_type="no-such-type"), {"model_error"}, "no-such-type"),
        (remove_the_tokenizer, {"model_error"}, "tokenizer"),
    ],
    ids=["nan", "infinity", "missing-tensors", "too-many-tokens", "other-shapes", "unknown-type", "no-tokenizer"],
)
def test_a_model_that_cannot_be_used_is_refused_in_prepare(quick, change, codes, said):
    job = quick(change)
    error = job.error()
    assert error.code in codes and said in error.message, error
    assert job.stages() == set()


@pytest.mark.parametrize(("keep", "code"), [(["*"], "nothing_to_binarize"), (["*no.such.layer"], "unsupported_model")])
def test_a_job_that_binarizes_nothing_or_keeps_what_is_not_there_is_refused(quick, keep, code):
    assert quick(keep=keep).error().code == code


def test_a_context_beyond_the_models_own_is_refused(quick):
    error = quick(method={"context": 128}).error()
    assert "128" in error.message and "64" in error.message


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("blank.txt", b" \n\t\n", "empty_text"),
        ("latin.txt", "caf\u00e9 ".encode("latin-1") * 200, "not_utf8"),
        ("cut.txt", "caf\u00e9".encode()[:-1], "not_utf8"),
        ("short.txt", b"six or seven tokens", "text_too_short"),
        ("blank.jsonl", b'{"text": " "}\n{"text": ""}\n', "empty_text"),
        ("latin.jsonl", '{"text": "caf\u00e9"}\n'.encode("latin-1"), "not_utf8"),
        ("other.jsonl", b'{"body": "words"}\n', "data_error"),
        ("broken.jsonl", b'{"text": "words"}\n{"text": \n', "data_error"),
        ("short.jsonl", b'{"text": "few"}\n{"text": "words"}\n', "text_too_short"),
        ("not.parquet", b"PAR1 or so", "data_error"),
    ],
)
@pytest.mark.parametrize("side", ["data", "eval"])
def test_a_text_that_cannot_be_used_is_refused_by_name(quick, tmp_path, side, name, content, code):
    (tmp_path / name).write_bytes(content)
    job = quick(**{side: [{"source": str(tmp_path / name)}]})
    error = job.error()
    assert error.code == code, error
    assert (side == "data" and code == "text_too_short") or name in error.message
    assert job.stages() == set()


def test_one_source_on_both_sides_is_refused(quick, tiny):
    assert quick(eval=[{"source": str(tiny.train)}]).error().code == "data_overlap"


def test_the_same_text_under_another_name_is_refused(quick, tiny, tmp_path):
    shutil.copy(tiny.train, tmp_path / "other.txt")
    assert quick(eval=[{"source": str(tmp_path / "other.txt")}]).error().code == "data_overlap"


def test_one_story_in_both_texts_is_refused_and_shown(quick, tiny, tmp_path):
    stories = tiny.stories.read_text().splitlines()
    (tmp_path / "more.jsonl").write_text("\n".join([stories[3], *['{"text": "more words"}'] * 60]))
    error = quick(data=[{"source": str(tiny.stories)}], eval=[{"source": str(tmp_path / "more.jsonl")}]).error()
    assert error.code == "data_overlap" and json.loads(stories[3])["text"][:20] in error.message


def test_two_sides_of_one_split_do_not_overlap(quick, tiny):
    sides = {
        side: [{"source": str(tiny.train), "split": split}] for side, split in (("data", "train"), ("eval", "eval"))
    }
    assert len(quick(**sides).run()["perplexity"]) == 1


def test_two_sets_of_one_file_name_are_both_reported(quick, tiny, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    text = tiny.page.read_text()
    (tmp_path / "a" / "test.txt").write_text(text[:3000])
    (tmp_path / "b" / "test.txt").write_text(text[3000:])
    report = quick(eval=[{"source": str(tmp_path / folder / "test.txt")} for folder in ("a", "b")]).run()
    assert [row["tokens"] for row in report["perplexity"]] == [e["tokens"] for e in report["data"]["evaluation"]]
    assert len({row["teacher"] for row in report["perplexity"]}) == 2


@pytest.mark.parametrize("change", [scale(1e4, "embed"), scale(1e30, "_proj")], ids=["logits", "activations"])
def test_finite_weights_whose_results_overflow_are_the_users_error(quick, change):
    error = quick(change).error()
    assert error.code in {"bad_weights", "model_error", "non_finite_loss"}, error


def test_scales_beyond_what_the_file_can_hold_are_the_users_error(quick):
    error = quick(scale(1e7, "down_proj")).error()
    assert error.code == "bad_weights" and "float16" in error.message


# Through the whole chain


def failed(server, spec: dict[str, Any]) -> dict[str, Any]:
    """The error of a job that must fail at once, with nothing published and nobody left."""
    job_id = server.submit(spec)
    job = server.ended(job_id)
    assert (job["status"], job["attempt"], job["artifacts"]) == ("failed", 1, 0), job
    assert server.ranks(job_id) == [] and server.http.get(f"/v1/jobs/{job_id}/report").status_code == 404
    assert not (server.data_dir / "artifacts").exists() or not list((server.data_dir / "artifacts").rglob("*/*/*"))
    error = dict(job["error"])
    assert error["message"] and error["hint"] and error["log_tail"]
    assert (error["origin"], error["retryable"]) == ("user", False), error
    return error


def test_a_job_on_damaged_weights_fails_once_and_says_why(server, tiny, inside):
    poison(float("nan"))(copy_of(tiny.model, inside / "model"))
    error = failed(server, tiny.spec(model=str(inside / "model")))
    assert error["code"] == "bad_weights" and "down_proj" in error["message"]


def test_a_model_whose_results_overflow_fails_once_and_says_why(server, tiny, inside):
    scale(1e18, "embed")(copy_of(tiny.model, inside / "model"))
    error = failed(server, tiny.spec(model=str(inside / "model")))
    assert error["code"] in {"bad_weights", "model_error", "non_finite_loss"}, error


def test_a_loss_that_is_not_finite_stops_both_ranks_before_a_weight_changes(quick, tiny):
    """The teacher breaks after `init`: that its loss is a number is checked in every step, not taken over."""
    job = quick(lambda model: None)
    job.run()
    for stage in ("train", "pack", "evaluate"):
        (job.folder / f"work/stages/{stage}.json").unlink()
    for folder in ("packed", "report"):
        shutil.rmtree(job.folder / "work" / folder)
    model = job.space.spec.model
    scale(1e30, "_proj")(Path(model))
    spec = tiny.spec(model=model, eval=[{"source": str(tiny.page)}])
    (job.folder / "spec.json").write_text(json.dumps(spec))
    start = (job.folder / "work/init/student.safetensors").read_bytes()
    error, codes = run_two_ranks(job.folder)
    assert (error["code"], error["origin"], error["retryable"]) == ("non_finite_loss", "user", False)
    assert "step 0" in error["message"] and 1 in codes and set(codes) <= {1, 70}  # 70: the peer went away first
    assert job.stages() == {"prepare", "init"} and not list((job.folder / "work/train").glob("checkpoints/step-*"))
    assert (job.folder / "work/init/student.safetensors").read_bytes() == start


def run_two_ranks(job_dir: Path) -> tuple[dict[str, Any], list[int | None]]:
    """Ranks as the runner starts them, without a runner: error.json and the exit codes."""
    from jobs.gang import Launch, LocalGang
    from jobs.process import free_port

    attempt = job_dir / "attempts" / "1"
    attempt.mkdir(parents=True)
    gang = LocalGang(Launch("job", 1, ("cpu:0", "cpu:1"), free_port(), job_dir))
    gang.start()
    try:
        deadline = time.monotonic() + 90
        while None in gang.poll():
            assert time.monotonic() < deadline, (attempt / "rank0.log").read_text()[-3000:]
            time.sleep(0.1)
    finally:
        gang.kill()
    return dict(json.loads((attempt / "error.json").read_text())), gang.poll()
