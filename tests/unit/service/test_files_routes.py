"""Artifacts, reports and logs over HTTP."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.unit.service.conftest import Server

CONTENT = bytes(range(256)) * 4
ETAG = f'"{hashlib.sha256(CONTENT).hexdigest()}"'


def url(server: Server, content: bytes = CONTENT) -> str:
    return f"/v1/jobs/{server.finish({'sub/model.bin': content})}/artifacts/sub/model.bin"


def test_the_list_names_size_hash_and_address(server: Server) -> None:
    job_id = server.finish({"sub/a b#.bin": CONTENT})
    (item,) = server.http.get(f"/v1/jobs/{job_id}/artifacts").json()["data"]
    assert (item["path"], item["size"], f'"{item["sha256"]}"') == ("sub/a b#.bin", 1024, ETAG)
    assert server.http.get(item["url"]).content == CONTENT
    assert server.http.get(f"/v1/jobs/{job_id}").json()["artifacts"] == 1


def test_a_download_has_its_length_and_its_hash_as_etag(server: Server) -> None:
    answer = server.http.get(url(server))
    assert answer.content == CONTENT and answer.headers["etag"] == ETAG
    assert answer.headers["content-length"] == "1024" and "content-encoding" not in answer.headers
    assert 'filename="model.bin"' in answer.headers["content-disposition"]


def test_head_tells_the_same_without_the_bytes(server: Server) -> None:
    answer = server.http.head(url(server), headers={"Range": "bytes=0-1"})
    assert (answer.status_code, answer.content, answer.headers["content-length"]) == (200, b"", "1024")
    assert answer.headers["etag"] == ETAG


@pytest.mark.parametrize(
    ("value", "first", "last"),
    [("bytes=0-", 0, 1023), ("bytes=10-19", 10, 19), ("bytes=-5", 1019, 1023),
     ("bytes=1000-9999", 1000, 1023), ("bytes=1023-1023", 1023, 1023), ("bytes=-5000", 0, 1023)],
)  # fmt: skip
def test_one_range_is_answered_with_206(server: Server, value: str, first: int, last: int) -> None:
    answer = server.http.get(url(server), headers={"Range": value})
    assert answer.status_code == 206 and answer.content == CONTENT[first : last + 1]
    assert answer.headers["content-range"] == f"bytes {first}-{last}/1024"


@pytest.mark.parametrize("value", ["bytes=1024-", "bytes=5000-6000", "bytes=-0"])
def test_a_range_behind_the_end_is_416_with_the_size(server: Server, value: str) -> None:
    answer = server.http.get(url(server), headers={"Range": value})
    assert (answer.status_code, answer.json()["code"]) == (416, "range_not_satisfiable")
    assert answer.headers["content-range"] == "bytes */1024"


@pytest.mark.parametrize("value", ["bytes=a-b", "bytes=-", "bytes=9-3", "items=0-1", "bytes=0-1,5-6", "bytes", "0-1"])
def test_ranges_that_are_malformed_or_several_get_the_whole_file(server: Server, value: str) -> None:
    answer = server.http.get(url(server), headers={"Range": value})
    assert (answer.status_code, answer.content) == (200, CONTENT)


def test_an_outdated_part_gets_the_whole_file(server: Server) -> None:
    where = url(server)
    assert server.http.get(where, headers={"Range": "bytes=5-", "If-Range": ETAG}).status_code == 206
    for old in ('"other"', f"W/{ETAG}", "Mon, 05 Jan 2026 10:00:00 GMT"):
        answer = server.http.get(where, headers={"Range": "bytes=5000-", "If-Range": old})
        assert (answer.status_code, answer.content) == (200, CONTENT)


@pytest.mark.parametrize("value", [ETAG, f"W/{ETAG}", f'"x", {ETAG}', "*"])
def test_what_the_client_has_is_not_sent_again(server: Server, value: str) -> None:
    answer = server.http.get(url(server), headers={"If-None-Match": value})
    assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", ETAG)


def test_an_empty_file_is_a_file(server: Server) -> None:
    where = url(server, b"")
    assert (server.http.get(where).status_code, server.http.get(where).content) == (200, b"")
    assert server.http.get(where, headers={"Range": "bytes=0-"}).status_code == 416


@pytest.mark.parametrize(
    "path",
    [
        "../../kbop.db",
        "..%2f..%2fkbop.db",
        "%2fetc%2fpasswd",
        "sub%5cmodel.bin",
        "",
        "sub",
        "sub/model.bin/",
        "%00",
    ],
)
def test_no_other_path_than_a_published_one_leads_to_a_file(server: Server, path: str) -> None:
    answer = server.http.get(url(server).removesuffix("sub/model.bin") + path)
    assert answer.status_code == 404 and answer.headers["content-type"] == "application/problem+json"


def test_bytes_that_are_gone_are_a_server_error_with_a_code(server: Server) -> None:
    where = url(server)
    for blob in (server.data_dir / "artifacts/sha256").rglob("*"):
        if blob.is_file():
            blob.unlink()
    answer = server.http.get(where)
    assert (answer.status_code, answer.json()["code"]) == (500, "blob_missing")


REPORT = {"report/report.json": b'{"perplexity": []}', "report/report.html": b"<h1>report</h1>"}


def test_the_report_is_json_and_a_page_for_browsers(server: Server) -> None:
    where = f"/v1/jobs/{server.finish(REPORT)}/report"
    assert server.http.get(where).json() == {"perplexity": []}
    page = server.http.get(where, headers={"Accept": "text/html,application/xhtml+xml;q=0.9,*/*;q=0.8"})
    assert page.text == "<h1>report</h1>" and page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]


def test_no_report_yet_is_404_with_the_status(server: Server) -> None:
    answer = server.http.get(f"/v1/jobs/{server.submit()['id']}/report")
    assert (answer.status_code, answer.json()["code"]) == (404, "no_report") and "queued" in answer.json()["detail"]


def log_file(server: Server, name: str, text: bytes) -> str:
    job_id = server.submit()["id"]
    server.claim()
    folder = server.data_dir / "jobs" / job_id / "attempts" / "1"
    folder.mkdir(parents=True)
    (folder / name).write_bytes(text)
    return f"/v1/jobs/{job_id}/logs"


def test_logs_are_the_last_lines_of_rank_0_or_another_process(server: Server) -> None:
    where = log_file(server, "rank0.log", b"one\ntwo\nthree\n")
    assert server.http.get(where, params={"tail": 2}).text == "two\nthree\n"
    assert server.http.get(where).text == "one\ntwo\nthree\n"
    assert server.http.get(where, params={"rank": "runner"}).json()["code"] == "no_logs"


def test_an_unfinished_line_and_broken_utf8_are_shown(server: Server) -> None:
    where = log_file(server, "runner.log", b"a\nb\xff c")
    assert server.http.get(where, params={"rank": "runner", "tail": 1}).text == "b\ufffd c"


@pytest.mark.parametrize("query", ["rank=../x", "rank=-1", "tail=0", "tail=10001", "attempt=0", "rank=0%00"])
def test_logs_cannot_be_asked_for_by_path(server: Server, query: str) -> None:
    assert server.http.get(f"/v1/jobs/{server.submit()['id']}/logs?{query}").status_code == 422


def test_a_huge_log_is_read_from_its_end_only(server: Server) -> None:
    where = log_file(server, "rank0.log", b"x" * (3 << 20) + b"\nlast\n")
    assert server.http.get(where, params={"tail": 1}).text == "last\n"
    assert len(server.http.get(where, params={"tail": 2}).content) <= 1 << 20


def test_a_report_is_served_byte_for_byte(server: Server) -> None:
    text = json.dumps({"b": 1, "a": [1.0, None]}).encode()
    job_id = server.finish({"report/report.json": text})
    assert server.http.get(f"/v1/jobs/{job_id}/report").content == text
