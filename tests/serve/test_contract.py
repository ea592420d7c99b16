"""What the OpenAPI document promises, tried by schemathesis: no request makes a 5xx or a hang, every reply fits.

Two of its checks are left out: that whatever fits the schema is accepted (requests may contradict themselves, which no
schema says: a forced call without tools), and embeddings, which are an honest 501. A body beyond the limit is 413.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

REFUSALS = "[checks.negative_data_rejection]\nexpected-statuses = [400, 401, 403, 404, 405, 413, 415]\n"
SECONDS = 60
"""After which a request hangs: some ask for a context full of tokens."""


@pytest.fixture(scope="module")
def brief(start_server: Callable[..., Any]) -> Any:
    """A server whose answers are short unless a request says otherwise."""
    server = start_server("--slots", "8", "--max-tokens", "8")
    server.wait("stop     Ctrl-C")
    return server


def schemathesis(server: Any, folder: Path, *flags: str) -> int:
    """How many requests it made; fails with its report if it found anything."""
    (folder / "schemathesis.toml").write_text(REFUSALS, encoding="utf-8")
    found = subprocess.run(
        [
            Path(sys.executable).parent / "schemathesis", "run", f"{server.url}/openapi.json", "--seed", "1",
            "--header", f"Authorization: Bearer {server.key}", "--exclude-path", "/v1/embeddings",
            "--checks", "all", "--exclude-checks", "positive_data_acceptance", "--request-timeout", str(SECONDS),
            "--suppress-health-check", "all", "--warnings", "off", "--no-color", *flags,
        ],
        cwd=folder, capture_output=True, text=True, timeout=1100, env=os.environ | {"COLUMNS": "200"},
    )  # fmt: skip
    assert found.returncode == 0, found.stdout[-8000:] + found.stderr
    counted = re.search(r"([\d,]+) generated", found.stdout)
    assert counted is not None, found.stdout
    return int(counted[1].replace(",", ""))


def test_three_hundred_requests_keep_the_contract(brief: Any, tmp_path: Path) -> None:
    assert schemathesis(brief, tmp_path, "--phases", "fuzzing", "--max-examples", "24") >= 300
    brief.until_idle()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_thousands_of_requests_keep_the_contract(brief: Any, tmp_path: Path) -> None:
    assert schemathesis(brief, tmp_path, "--max-examples", "20") >= 1500
    brief.until_idle()
    assert brief.fetch("/ready")[0] == 200


def test_the_document_describes_every_route_with_bodies_replies_and_errors(brief: Any) -> None:
    document = brief.fetch("/openapi.json")[1]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            responses = operation["responses"]
            if path != "/v1/embeddings":
                reply = responses["200"]["content"]["application/json"]["schema"]
                assert reply["$ref"].rpartition("/")[2] in document["components"]["schemas"], path
            kind = "AnthropicError" if "/messages" in path else "Error"
            error = responses["400"]["content"]["application/json"]["schema"]
            assert error == {"$ref": f"#/components/schemas/{kind}"}
            assert ("529" in responses) == ("/messages" in path)
            assert ("requestBody" in operation) == (method == "post" and "{id}" not in path and "embed" not in path)
    streams = {
        path for path, found in document["paths"].items() for operation in found.values()
        if "text/event-stream" in operation["responses"].get("200", {}).get("content", ())
    }  # fmt: skip
    assert streams == {"/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses", "/v1/responses/{id}"}
