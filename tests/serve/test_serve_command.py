# SPDX-License-Identifier: Apache-2.0
"""The command serve: one line per fault, and a real server from its start to Ctrl-C."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unimedi_components.__main__ import main
from unimedi_components.retrieval import Embeddings


def fault(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["serve", *words])
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line.removeprefix("error: ")


def test_faults_are_one_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # what is no fault would serve for ever
    monkeypatch.setattr("uvicorn.Server.run", lambda *args, **options: pytest.fail("it serves"))
    free = ["--port", "0", "--device", "cpu", "--checkpoint", str(checkpoint)]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert fault([*free[2:], "--port", str(port)], capsys) == (
            f"port {port} of 127.0.0.1 is in use; give another one with --port"
        )
    missing = tmp_path / "none" / "model.pt"
    assert fault(["--port", "0", "--checkpoint", str(missing)], capsys).startswith(f"{missing}: no such checkpoint")
    assert fault([*free, "--index", str(tmp_path / "no.npz")], capsys).startswith(
        f"{tmp_path / 'no.npz'}: no such file"
    )
    entry = {"id": "a", "kind": "report", "dim": 2, "source": "", "text": "clear."}
    other = Embeddings(np.eye(1, 16, dtype=np.float32), [entry], "f" * 64).save(tmp_path / "other.npz")
    assert "the index was made with model ffffffffffff" in fault([*free, "--index", str(other)], capsys)
    assert "chest_ctt" in fault([*free, "--prompts", "chest_xray,chest_ctt"], capsys)
    assert "are both for 2D; give one" in fault([*free, "--prompts", "chest_xray,chest_xray"], capsys)
    for host in ("0.0.0.0", "192.168.0.1", "::"):
        message = fault([*free, "--host", host], capsys)
        assert message.startswith(f"--host {host} is reached by other machines, and the page has no login")
    assert "cannot listen at 192.0.2.1" in fault([*free, "--host", "192.0.2.1", "--allow_remote"], capsys)
    assert fault(["--port", "99999"], capsys).startswith("there is no port 99999; give one below")
    assert fault(["--port", "http"], capsys) == "--port must be a whole number of at least 0, got 'http'"
    assert fault(["--max_upload_mb", "0"], capsys) == "--max_upload_mb must be a whole number of at least 1, got 0"


def test_missing_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name))
    assert fault([], capsys) == "serve needs the extra 'serve' (uvicorn): pip install 'unimedi-components[serve]'"


def post(url: str, name: str, content: bytes) -> tuple[int, dict[str, Any]]:
    body = f'--b\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    request = urllib.request.Request(f"{url}/api/analyse", body + content + b"\r\n--b--\r\n", headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_a_server_from_start_to_ctrl_c(started: Any, files: Any) -> None:
    process, url, folder = started("--max_upload_mb", "3", "--prompts", "chest_xray")
    assert url.startswith("http://127.0.0.1:")
    good = files.picture("film.png").read_bytes()
    status, answer = post(url, "film.png", good)
    assert status == 200 and len(answer["findings"]) > 5
    # larger than allowed: the client hears why, though it sent all before it listened
    status, answer = post(url, "big.nii", bytes(12 * 2**20))
    assert status == 413 and "larger than 3 MB" in answer["error"] and "--max_upload_mb" in answer["error"]
    # a client that leaves in the middle of its upload
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /api/analyse HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: 999999\r\n"
        connection.sendall(f"{head}Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n".encode())
    assert post(url, "film.png", good)[0] == 200
    assert os.listdir(folder) == []
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=30)
    assert process.returncode == 0 and out == "ended\n" and "Traceback" not in errors


def test_remote_addresses_are_allowed_when_asked_for(started: Any) -> None:
    process, url, _ = started("--host", "0.0.0.0", "--allow_remote")
    with urllib.request.urlopen(f"{url.replace('0.0.0.0', '127.0.0.1')}/health", timeout=30) as answer:
        assert json.load(answer)["status"] == "ok"
    process.terminate()
    _, errors = process.communicate(timeout=30)
    assert "warning: other machines can reach 0.0.0.0; there is no login and no encryption" in errors
