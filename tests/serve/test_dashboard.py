"""Whatever the dashboard and the alerts ask for, a running server exports."""

import json
import re
import time
import urllib.request
from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).parent.parent.parent / "deploy"


def queries() -> list[str]:
    board = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text(encoding="utf-8"))
    rules = yaml.safe_load((DEPLOY / "alerts.yaml").read_text(encoding="utf-8"))["groups"][0]["rules"]
    panels = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    return [*panels, *(rule["expr"] for rule in rules)]


def exported(page: str) -> set[str]:
    """Names of samples, also of families that have none yet."""
    found = set()
    for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", page, re.MULTILINE):
        suffixes = ("_bucket", "_sum", "_count") if kind == "histogram" else ("",)
        found |= {name + suffix for suffix in suffixes}
    return found


def test_every_query_names_metrics_and_labels_that_are_exported(server: Any) -> None:
    server.client.chat.completions.create(model="babbler", messages=[{"role": "user", "content": "hi"}], max_tokens=3)
    end, page = time.monotonic() + 60, ""
    while 'http_responses_total{route="/v1/chat/completions",status="200"}' not in page:  # counted after it has left
        assert time.monotonic() < end, page
        with urllib.request.urlopen(f"http://127.0.0.1:{server.operator_port}/metrics", timeout=30) as reply:
            page = reply.read().decode()
    named = {name for query in queries() for name in re.findall(r"sputnik:\w+", query)}
    assert len(named) >= 15 and not named - exported(page)
    assert re.search(r'sputnik:request_success_total\{finished_reason="[^"]+"\} [1-9]', page)
    assert re.search(r"sputnik:request_queue_time_seconds_count [1-9]", page)
    labels = {label for query in queries() for label in re.findall(r"by \((\w+)\)", query)} - {"le"}
    assert labels == {"finished_reason", "reason", "status"}
