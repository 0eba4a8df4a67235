"""The files of the deployment: no engine runs them here, so schemas, linters and the programs themselves read them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from service.observability import Metrics
from service.settings import Settings

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())


@pytest.mark.parametrize(
    "command",
    [
        ["check-jsonschema", "--builtin-schema", "vendor.compose-spec", "docker-compose.yml"],
        ["hadolint", "docker/Dockerfile"],
    ],
    ids=lambda command: command[0],
)
def test_linters_find_nothing(command: list[str]) -> None:
    done = subprocess.run([BIN / command[0], *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_compose_names_settings_and_files_that_there_are() -> None:
    settings = {f"ENGRAM_{name.upper()}" for name in Settings.model_fields}
    for name, service in COMPOSE["services"].items():
        environment = service.get("environment", {})
        if service.get("image", "").startswith("engram:"):
            assert environment.keys() <= settings, name
            target = service["build"]["target"]
            assert f" AS {target}\n" in (ROOT / "docker/Dockerfile").read_text(), name
        for volume in service.get("volumes", []):
            source = volume.partition(":")[0]
            assert source in COMPOSE["volumes"] or (ROOT / source).exists(), volume
    templated = set(re.findall(r"\$\{(\w+)\}", (ROOT / "docker/nginx.conf.template").read_text()))
    assert templated == COMPOSE["services"]["balancer"]["environment"].keys()


def test_the_image_installs_what_the_package_asks_for() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for name in re.findall(r"e\['(\w+)'\]", (ROOT / "docker/Dockerfile").read_text()):
        assert name in extras


def test_the_dashboard_asks_for_metrics_that_there_are() -> None:
    there = {
        sample + suffix
        for metric in Metrics().registry.collect()
        for sample in [metric.name]
        for suffix in ("", "_total", "_bucket", "_sum", "_count")
    }
    dashboard = json.loads((ROOT / "docker/grafana/dashboards/engram.json").read_text())
    asked = {
        name
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"engram_\w+", target["expr"])
    }
    assert asked <= there, asked - there
    assert len(asked) >= 10
