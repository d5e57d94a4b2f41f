# SPDX-License-Identifier: Apache-2.0
"""A server without a login: who may ask, what browsers are told, and that it answers while the network works."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

import unimedi_components.serve
from unimedi_components.serve import Analyser, create_app

STATIC = Path(unimedi_components.serve.__file__).with_name("static")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:8000", "localhost", "LOCALHOST:81", "[::1]", "[::1]:8000"])
def test_own_names(client: TestClient, host: str) -> None:
    assert client.get("/health", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil", "", "10.0.0.1"]
)
def test_other_names_are_refused(client: TestClient, host: str) -> None:
    """A page whose name was pointed at this machine (DNS rebinding) still sends its own name."""
    answer = client.get("/api/about", headers={"host": host})
    assert answer.status_code == 400 and "is not this server's" in answer.json()["error"]


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        (None, 200),
        ("http://127.0.0.1", 200),
        ("http://evil.example", 403),
        ("http://127.0.0.1:81", 403),
        ("http://localhost", 403),
        ("null", 403),
    ],
)
def test_other_sites_cannot_post(client: TestClient, origin: str | None, status: int) -> None:
    headers = {} if origin is None else {"origin": origin}
    answer = client.post("/api/search", json={"text": "effusion"}, headers=headers)
    assert answer.status_code == status
    assert status == 200 or "another site's page" in answer.json()["error"]


def test_what_browsers_are_told(client: TestClient) -> None:
    for path in ("/", "/static/app.js", "/static/style.css", "/health", "/nothing"):
        headers = client.get(path).headers
        policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'none'" and policy["script-src"] == policy["style-src"] == "'self'"
        assert policy["frame-ancestors"] == "'none'" and "access-control-allow-origin" not in headers
        assert headers["x-content-type-options"] == "nosniff" and headers["cache-control"] == "no-store"
        assert headers["referrer-policy"] == "no-referrer" and headers["cross-origin-resource-policy"] == "same-origin"


def test_the_page_needs_nothing_from_elsewhere_and_is_all_there(client: TestClient) -> None:
    for file in STATIC.iterdir():
        text = file.read_text(encoding="utf-8")
        found = set(re.findall(r"(?:https?:)?//[a-z0-9.-]+\.[a-z]{2,}", text))
        assert found <= {"http://www.w3.org", "//www.w3.org"}, file.name
        assert "innerHTML" not in text and "style=" not in text and "onclick" not in text
    page = client.get("/").text
    linked = re.findall(r'(?:src|href)="(/[^"]+)"', page)
    assert {"/static/app.js", "/static/result.js", "/static/style.css", "/static/icon.svg"} == set(linked)
    assert all(client.get(path).status_code == 200 for path in linked)
    # every element that a script asks for is in the page
    scripts = "".join((STATIC / name).read_text() for name in ("app.js", "result.js"))
    assert set(re.findall(r'byId\("([a-z-]+)"\)', scripts)) <= set(re.findall(r'id="([a-z-]+)"', page))


def test_openapi_describes_the_upload_and_the_answer(client: TestClient) -> None:
    for path in ("/docs", "/redoc"):
        assert client.get(path).status_code == 404
    schema = client.get("/openapi.json").json()
    post = schema["paths"]["/api/analyse"]["post"]
    body = post["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert body["properties"]["files"]["items"] == {"type": "string", "format": "binary"}
    assert set(post["responses"]) == {"200", "400", "413", "415", "422", "503"}
    answer = post["responses"]["200"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
    fields = schema["components"]["schemas"][answer]["properties"]
    assert {"kind", "findings", "pictures", "slabs", "neighbours", "warnings", "seen"} <= set(fields)


def test_one_study_at_a_time_while_the_server_answers(
    analyser: Analyser, files: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, leave, original = threading.Event(), threading.Event(), analyser.study
    active, most = [0], [0]

    def slow(study: Any) -> Any:
        active[0] += 1
        most[0] = max(most[0], active[0])
        entered.set()
        assert leave.wait(30)
        result = original(study)
        active[0] -= 1
        return result

    monkeypatch.setattr(analyser, "study", slow)
    content, answers = files.picture("film.png").read_bytes(), []
    with TestClient(create_app(analyser), base_url="http://127.0.0.1") as client:

        def post() -> None:
            answers.append(client.post("/api/analyse", files=[("files", ("film.png", content))]))

        threads = [threading.Thread(target=post) for _ in range(11)]
        for thread in threads:
            thread.start()
        assert entered.wait(30)
        while client.get("/health").json()["waiting"] < 8 or len(answers) < 3:
            pass
        assert {answer.status_code for answer in answers} == {503}
        assert "busy" in json.loads(answers[0].content)["error"]
        leave.set()
        for thread in threads:
            thread.join(60)
        assert sorted(answer.status_code for answer in answers) == [200] * 8 + [503] * 3
        assert most == [1] and client.get("/health").json()["waiting"] == 0
