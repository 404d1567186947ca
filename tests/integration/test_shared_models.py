"""A pretrained model and texts written by others: perplexities that the world knows, and one whole job on them."""

from __future__ import annotations

import math

import pytest

pytestmark = pytest.mark.timeout(480)

MODEL = "models/stories260K-hf"
STORIES = "text/tinystories/tinystories_v2_A.jsonl"
#: Of the evaluation texts, so that a job stays short.
DOCUMENTS, PAGE_BYTES = 150, 60_000


def test_the_teachers_perplexity_is_the_one_its_author_measured(shared_data):
    import torch

    from kbop_core.documents import read_documents
    from kbop_core.hf import context_length, load_model, load_tokenizer
    from kbop_core.perplexity import evaluate
    from kbop_core.text import evaluation_windows

    torch.set_num_threads(2)
    model, tokenizer = load_model(str(shared_data / MODEL)), load_tokenizer(str(shared_data / MODEL))
    assert context_length(model) == 512
    windows = evaluation_windows(read_documents(shared_data / STORIES), tokenizer.encode, 512, "TinyStories A")
    assert evaluate(model, windows, 32).perplexity == pytest.approx(3.7421, abs=0.002)


@pytest.fixture(scope="module")
def report(serve, shared_data, tmp_path_factory):
    """Of a job of 2 ranks with 60,000 training tokens on stories260K."""
    folder = tmp_path_factory.mktemp("texts").resolve()
    stories = (shared_data / STORIES).read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "stories.jsonl").write_text("".join(stories[:DOCUMENTS]), encoding="utf-8")
    page = (shared_data / "text/wikitext-2-raw/wiki.test.raw").read_bytes()[:PAGE_BYTES]
    (folder / "wiki.txt").write_text(page.decode("utf-8", "ignore"), encoding="utf-8")
    server = serve(shared_data, folder)
    job_id = server.submit(
        {
            "model": str(shared_data / MODEL),
            "data": [{"source": str(shared_data / "text/tinystories/tinystories_1000_normalised.txt")}],
            "eval": [{"source": str(folder / "stories.jsonl")}, {"source": str(folder / "wiki.txt")}],
            "method": {"tokens": 60_000, "context": 256, "calibration_tokens": 16_384, "blockwise_steps": 50},
            "resources": {"gpus": 2},
        }
    )
    server.succeeded(job_id, seconds=240)
    return server.report(job_id)


def test_a_job_on_a_real_model_ends_far_below_plain_binarization(report):
    stories, page = report["perplexity"]
    assert (stories["set"], page["set"]) == ("stories.jsonl", "wiki.txt")
    assert stories["teacher"] < stories["kbop"] < stories["init"] < stories["plain"]
    assert stories["kbop"] < stories["plain"] / 10
    assert all(math.isfinite(page[kind]) for kind in ("teacher", "plain", "init", "kbop"))


def test_bnn_init_alone_repairs_most_of_what_plain_binarization_breaks(report):
    stories = report["perplexity"][0]
    assert stories["teacher"] == pytest.approx(3.74, abs=0.15)
    assert stories["plain"] > 1000 and stories["init"] < 200


def test_the_ragged_width_of_a_real_model_is_counted_in_its_bits(report):
    # Hidden 64 and FFN 172 are no multiples of 128, so each row has one scale; a row of 172 signs fills 21.5 bytes.
    rows = {64: 5 * (64 + 32 + 32 + 64 + 172 + 172), 172: 5 * 64}
    weights = sum(width * count for width, count in rows.items())
    stored = sum((8 * math.ceil(width / 8) + 16) * count for width, count in rows.items())
    assert report["bits"]["binary_weights"] == weights
    assert report["bits"]["bits_per_binary_weight"] == pytest.approx(stored / weights, rel=1e-9)
