"""The deployment files: linted where a linter is there, and in step with the program that they run."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from sputnik.cli.serve import ServeConfig

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
YAML = sorted(DEPLOY.rglob("*.yaml"))


def tool(name: str) -> str:
    """The program of a package in our environment, or of the machine."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not here")
    return found


def lint(*command: str) -> None:
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert found.returncode == 0, found.stdout + found.stderr


def documents(name: str) -> list[Any]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text(encoding="utf-8")))


def kubernetes(kind: str) -> Any:
    (found,) = [each for each in documents("kubernetes.yaml") if each["kind"] == kind]
    return found


def unit() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in (DEPLOY / "sputnik@.service").read_text(encoding="utf-8").splitlines():
        if match := re.fullmatch(r"(\w+)=(.*)", line):
            found.setdefault(match[1], []).append(match[2])
    return found


def parsed(flags: list[str]) -> ServeConfig:
    import tyro

    return tyro.cli(ServeConfig, args=flags)


# --- linters ---


def test_the_dockerfile_passes_hadolint() -> None:
    lint(tool("hadolint"), "deploy/Dockerfile")


def test_the_manifests_are_those_of_kubernetes() -> None:
    lint(tool("kubernetes-validate"), "--strict", "deploy/kubernetes.yaml")


def test_the_composition_is_one_of_docker_compose() -> None:
    lint(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", "deploy/compose.yaml")


def test_yaml_is_tidy() -> None:
    rules = "{extends: default, rules: {line-length: {max: 130}, document-start: disable, braces: disable}}"
    lint(tool("yamllint"), "--strict", "-d", rules, *map(str, YAML))


def test_the_unit_is_one_of_systemd_and_leaves_little_exposed(tmp_path: Path) -> None:
    analyze = tool("systemd-analyze")
    text = (DEPLOY / "sputnik@.service").read_text(encoding="utf-8")
    path = tmp_path / "sputnik@8000.service"
    path.write_text(re.sub(r"(?<=ExecStart=)\S+", "/bin/true", text), encoding="utf-8")
    lint(analyze, "verify", str(path))
    lint(analyze, "security", "--offline=true", "--threshold=20", "--no-pager", str(path))


def test_the_entrypoint_is_shell_and_hands_secrets_on(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("sk-from-a-file\n")
    for name, text in (("python", "exit 1\n"), ("sputnik", 'echo "$SPUTNIK_API_KEY|${SPUTNIK_API_KEY_FILE:-}|$*"\n')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}")
        (tmp_path / name).chmod(0o755)
    found = subprocess.run(
        ["sh", str(DEPLOY / "entrypoint.sh"), "/model", "--drain=120"], capture_output=True, text=True, timeout=30,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "SPUTNIK_API_KEY_FILE": str(tmp_path / "key")},
    )  # fmt: skip
    assert found.stdout == "sk-from-a-file||serve /model --drain=120\n" and "without compiled kernels" in found.stderr


# --- in step with the program ---


def grace(drain: float) -> float:
    """Seconds that a drain may take: the gateway, then the worker, each with ten beyond."""
    return 2 * (drain + 10)


def test_every_command_is_one_of_sputnik_and_has_time_to_drain() -> None:
    (line,) = unit()["ExecStart"]
    verb, *flags = shlex.split(line)[1:]
    config = parsed(
        [flag.replace("${SPUTNIK_MODEL}", "m").replace("%S", "/var/lib").replace("%i", "8000") for flag in flags]
    )
    assert verb == "serve" and float(unit()["TimeoutStopSec"][0]) >= grace(config.drain)
    assert unit()["RestartPreventExitStatus"] == ["2"] and unit()["KillMode"] == ["mixed"]

    server = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))["services"]["sputnik"]
    config = parsed([flag.replace("${MODEL_NAME:-sputnik}", "m") for flag in server["command"]])
    assert float(server["stop_grace_period"].removesuffix("s")) >= grace(config.drain) and config.host == "0.0.0.0"

    pod = kubernetes("Deployment")["spec"]["template"]["spec"]
    (container,) = [each for each in pod["containers"] if each["name"] == "sputnik"]
    before = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] >= before + grace(parsed(container["args"]).drain)


def test_nobody_runs_as_root_and_no_secret_stands_in_a_file() -> None:
    dockerfile = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    assert re.findall(r"^USER (\d+)", dockerfile, re.MULTILINE)[-1] == "10001" and "HEALTHCHECK" in dockerfile
    assert unit()["DynamicUser"] == unit()["NoNewPrivileges"] == ["yes"] and "MemoryMax" in unit()
    pod = kubernetes("Deployment")["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] and not pod["automountServiceAccountToken"]
    for container in pod["containers"]:
        locked = container["securityContext"]
        assert locked["readOnlyRootFilesystem"] and locked["capabilities"]["drop"] == ["ALL"], container["name"]
        assert "memory" in container["resources"]["limits"]
    assert not any(kubernetes("Secret")["stringData"].values())
    composition = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    assert all(each["file"].startswith("./secrets/") for each in composition["secrets"].values())
    assert "secrets/" in (DEPLOY / ".gitignore").read_text().splitlines()
    values = re.findall(r"^(SPUTNIK_\w*(?:KEY|PEPPER))=(.*)$", (DEPLOY / "sputnik.environment").read_text(), re.M)
    assert values and not any(value for _, value in values)


def test_what_a_file_mounts_or_names_is_there() -> None:
    composition = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    for service in composition["services"].values():
        sources = [volume.split(":")[0] for volume in service.get("volumes", []) if not volume.startswith("$")]
        for source in sources:
            assert (DEPLOY / source).exists() if source.startswith(".") else source in composition["volumes"], source
        assert set(service.get("secrets", [])) <= set(composition["secrets"])
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", (DEPLOY / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    sent = {line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")}
    named = {name for line in copied for name in line.split()}
    assert named == sent and all((ROOT / name).exists() for name in named)


def test_probes_ask_for_what_each_route_says() -> None:
    (server, _) = kubernetes("Deployment")["spec"]["template"]["spec"]["containers"]
    paths = {name: server[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")}
    assert paths == {"startup": "/ready", "readiness": "/ready", "liveness": "/health"}
    assert "/ready" in unit()["ExecStartPost"][0]


@pytest.mark.parametrize(
    ("name", "directive"), [("Caddyfile", "flush_interval -1"), ("nginx.conf", "proxy_buffering off;")]
)
def test_a_proxy_holds_no_stream_back(name: str, directive: str) -> None:
    text = (DEPLOY / name).read_text(encoding="utf-8")
    assert directive in text and text.count("{") == text.count("}")
    assert "127.0.0.1:8000" in re.findall(r"Host (\S+?);?$", text, re.MULTILINE), "the server knows itself as that"


def test_every_panel_has_a_place_of_its_own() -> None:
    board = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text(encoding="utf-8"))
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]]
    assert len(set(places)) == len(places) >= 10 and len({panel["id"] for panel in board["panels"]}) == len(places)
    (source,) = documents("grafana/datasource.yaml")[0]["datasources"]
    assert {panel["datasource"]["uid"] for panel in board["panels"]} == {source["uid"]}
