"""deploy/: what its files say of one another, of the server and of `llama2 plan`; what validators do not look at."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from llama2 import plan
from llama2.cli.main import program
from llama2.serve.metrics import Metrics

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"


def documents(path: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / path).read_text(encoding="utf-8")))


def serve_options() -> set[str]:
    import typer.main

    command = typer.main.get_command(program("serve")).commands["serve"]  # type: ignore[attr-defined]
    return {name for each in command.params for name in each.opts}


# The container's start


@pytest.fixture
def start(tmp_path: Path) -> Any:
    """The start script with a `llama2` that says what it was called with, and with /models in the test's folder."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "llama2").write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n')
    (programs / "llama2").chmod(0o755)
    (tmp_path / "models").mkdir()
    script = tmp_path / "start.sh"
    text = (DEPLOY / "container/start.sh").read_text(encoding="utf-8")
    script.write_text(text.replace("/models/*", f"{tmp_path}/models/*"), encoding="utf-8")

    def run(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": f"{programs}:{os.environ['PATH']}", "LLAMA2_API_KEY": "k"} | variables
        command = ["sh", str(script), *words]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    return run


def test_the_only_model_is_served_with_the_options_as_they_are(start: Any, tmp_path: Path) -> None:
    model = tmp_path / "models/a model.gguf"
    model.write_bytes(b"x")
    done = start("--drain", "4 5", "", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    expected = [
        "serve",
        "-m",
        str(model),
        "--host",
        "0.0.0.0",  # noqa: S104
        "--port",
        "8080",
        "--drain",
        "4 5",
        "",
        "--json",
    ]
    assert done.stdout.splitlines() == expected
    assert start("--json", MODEL=str(model)).stdout.splitlines()[-3:] == ["--port", "8080", "--json"]


@pytest.mark.parametrize(
    ("files", "variables", "said"),
    [
        ([], {}, "/models holds no model; mount a volume there that has one, or set MODEL"),
        (["a", "b"], {}, "/models holds 2 models; set MODEL to one of them"),
        ([], {"MODEL": "/nowhere/m.gguf"}, "/nowhere/m.gguf: no such model, or it cannot be read; mount the volume"),
        (["a"], {"MODEL_SHA256": "0" * 64}, "its SHA-256 is " + hashlib.sha256(b"x").hexdigest() + ", not 0000"),
        (["a"], {"LLAMA2_API_KEY": ""}, "LLAMA2_API_KEY: is not set, and others can reach this server"),
    ],
)
def test_what_is_missing_is_one_line(
    files: list[str], variables: dict[str, str], said: str, start: Any, tmp_path: Path
) -> None:
    for name in files:
        (tmp_path / "models" / name).write_bytes(b"x")
    done = start(**variables)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert said in done.stderr


def test_a_right_hash_is_taken(start: Any, tmp_path: Path) -> None:
    (tmp_path / "models/m").write_bytes(b"x")
    assert start(MODEL_SHA256=hashlib.sha256(b"x").hexdigest()).returncode == 0


# Files that name one another


def test_options_of_the_server_exist() -> None:
    known = serve_options()
    compose = documents("container/compose.yaml")[0]["services"]["server"]
    (container,) = documents("kubernetes/deployment.yaml")[0]["spec"]["template"]["spec"]["containers"]
    unit = (DEPLOY / "systemd/llama2.service").read_text(encoding="utf-8")
    for words in (compose["command"], container["args"], unit.split()):
        named = {word for word in words if word.startswith("--")}
        assert named
        assert named <= known


def test_answers_have_time_to_finish() -> None:
    """Whoever stops the server waits longer than it lets answers run, and Kubernetes' first pause is within it."""
    compose = documents("container/compose.yaml")[0]["services"]["server"]
    spec = documents("kubernetes/deployment.yaml")[0]["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    pause = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    unit = (DEPLOY / "systemd/llama2.service").read_text(encoding="utf-8")
    waits = [
        (compose["command"], int(compose["stop_grace_period"].removesuffix("s"))),
        (container["args"], spec["terminationGracePeriodSeconds"] - pause),
        (unit.split(), int(re.search(r"TimeoutStopSec=(\d+)", unit)[1])),  # type: ignore[index]
    ]
    for words, seconds in waits:
        assert float(words[words.index("--drain") + 1]) + 5 <= seconds


def test_kubernetes_files_fit_together() -> None:
    listed = documents("kubernetes/kustomization.yaml")[0]
    assert sorted([*listed["resources"], "kustomization.yaml"]) == sorted(
        path.name for path in (DEPLOY / "kubernetes").iterdir()
    )
    found = {each["kind"]: each for name in listed["resources"] for each in documents(f"kubernetes/{name}")}
    template = found["Deployment"]["spec"]["template"]
    labels = template["metadata"]["labels"]
    selectors = [found["Service"]["spec"]["selector"], found["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"]]
    selectors += [found[kind]["spec"]["selector"]["matchLabels"] for kind in ("Deployment", "PodDisruptionBudget")]
    assert all(selector == labels for selector in selectors)
    (container,) = template["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert found["Service"]["spec"]["ports"][0]["targetPort"] in ports
    probes = (container[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness"))
    assert {(each.get("httpGet") or each["tcpSocket"])["port"] for each in probes} <= ports.keys()
    volumes = {volume["name"] for volume in template["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    target = found["HorizontalPodAutoscaler"]["spec"]
    assert target["scaleTargetRef"]["name"] == found["Deployment"]["metadata"]["name"]
    names = {family.name for family in Metrics().registry.collect()}
    assert {metric["pods"]["metric"]["name"] for metric in target["metrics"]} <= names


def test_one_user_one_model_one_size() -> None:
    """The image's user is the pods', memory fits 7B in Q4_K_M with four whole contexts, and versions agree."""
    dockerfile = (DEPLOY / "container/Dockerfile").read_text(encoding="utf-8")
    security = documents("kubernetes/deployment.yaml")[0]["spec"]["template"]["spec"]["securityContext"]
    assert f"USER {security['runAsUser']}:{security['runAsGroup']}" in dockerfile
    assert documents("container/compose.yaml")[0]["services"]["server"]["user"] == "10001:10001"
    needed = memory("7B", "Q4_K_M", 4)
    (container,) = documents("kubernetes/deployment.yaml")[0]["spec"]["template"]["spec"]["containers"]
    limits = container["resources"]
    assert needed < int(limits["requests"]["memory"].removesuffix("Gi")) * 2**30
    assert (
        needed
        < int(
            documents("container/compose.yaml")[0]["services"]["server"]["deploy"]["resources"]["limits"][
                "memory"
            ].removesuffix("G")
        )
        * 10**9
    )
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert documents("kubernetes/kustomization.yaml")[0]["images"][0]["newTag"] == version
    assert documents("azure/environment.yml")[0]["image"].endswith(f":{version}")


def memory(size: str, format: str, batch: int) -> float:
    """Bytes that a server needs, as `llama2 plan` computes them."""
    config = plan.NAMED[size]
    machine = plan.Machine("any", operations=1, bandwidth=1, overhead=plan.PROCESS)
    found = plan.generation(
        config, plan.tensor_formats(config, format), machine, context=config.context_length, batch=batch
    )
    return sum(found.memory.values())


def test_figures_of_the_guide_are_those_of_plan() -> None:
    text = (ROOT / "docs/guides/deploy.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+B) \| (Q\w+) \| (\d+) \| ([\d.]+) \| ([\d.]+) \|", text, re.MULTILINE)
    assert len(rows) >= 6
    for size, format, answers, disk, shown in rows:
        config = plan.NAMED[size]
        file = sum(plan.weight_bytes(config, plan.tensor_formats(config, format)).values())
        assert (float(disk), float(shown)) == (round(file / 1e9, 1), round(memory(size, format, int(answers)) / 1e9, 1))


# Azure


AZURE = {
    "model.yml": "load_model",
    "environment.yml": "load_environment",
    "environment-jobs.yml": "load_environment",
    "endpoint.yml": "load_online_endpoint",
    "deployment.yml": "load_online_deployment",
    "deployment-score.yml": "load_online_deployment",
    "sft.yml": "load_job",
    "evaluate.yml": "load_job",
}


@pytest.mark.parametrize("name", AZURE)
def test_azures_package_reads_each_file(name: str) -> None:
    client = pytest.importorskip("azure.ai.ml", reason="azure-ai-ml is not installed")
    getattr(client, AZURE[name])(DEPLOY / "azure" / name)


def test_every_file_of_azures_is_known() -> None:
    schemas = {
        path.name
        for path in (DEPLOY / "azure").glob("*.yml")
        if "$schema" in yaml.safe_load(path.read_text(encoding="utf-8"))
    }
    assert schemas == set(AZURE)


def azure_problems(found: dict[str, dict[str, Any]]) -> list[str]:
    """What Azure's package does not notice: values out of range, and names that no other file has."""
    problems = []
    endpoint, model = found["endpoint.yml"], found["model.yml"]
    deployments = [each for name, each in found.items() if name.startswith("deployment")]
    if sum(endpoint["traffic"].values()) != 100 or not endpoint["traffic"].keys() <= {d["name"] for d in deployments}:
        problems.append("traffic")
    environments = {
        f"azureml:{e['name']}:{e['version']}" for name, e in found.items() if name.startswith("environment")
    }
    for each in deployments:
        settings = each["request_settings"]
        checks = {
            "endpoint_name": each["endpoint_name"] == endpoint["name"],
            "model": each["model"] == f"azureml:{model['name']}:{model['version']}",
            "environment": each["environment"] in environments,
            "instance_count": 1 <= each["instance_count"] <= 500,
            "request_timeout_ms": 0 < settings["request_timeout_ms"] <= 180_000,
            "max_concurrent_requests_per_instance": settings["max_concurrent_requests_per_instance"] >= 1,
            "probes": all(p["timeout"] <= p["period"] for k, p in each.items() if k.endswith("_probe")),
            "MODEL": Path(each.get("environment_variables", {}).get("MODEL", model["path"])).name
            == Path(model["path"]).name,
        }
        problems += [name for name, right in checks.items() if not right]
    routes = found["environment.yml"]["inference_config"]
    problems += [name for name, route in routes.items() if not 1 <= route["port"] <= 65535]
    for name in ("sft.yml", "evaluate.yml"):
        job = found[name]
        used = set(re.findall(r"\$\{\{(inputs|outputs)\.(\w+)\}\}", job["command"]))
        if used != {(kind, key) for kind in ("inputs", "outputs") for key in job[kind]}:
            problems.append("command")
        if job["environment"] not in environments:
            problems.append("environment")
    return problems


def azure_files() -> dict[str, dict[str, Any]]:
    return {name: documents(f"azure/{name}")[0] for name in AZURE}


def test_azures_files_fit_together() -> None:
    assert azure_problems(azure_files()) == []


@pytest.mark.parametrize(
    ("file", "path", "value", "problem"),
    [
        ("deployment.yml", ("instance_count",), 0, "instance_count"),
        ("deployment.yml", ("request_settings", "request_timeout_ms"), 600_000, "request_timeout_ms"),
        ("deployment.yml", ("model",), "azureml:llama-2-7b-chat:2", "model"),
        ("deployment.yml", ("environment_variables", "MODEL"), "/models/other.gguf", "MODEL"),
        ("deployment.yml", ("liveness_probe", "timeout"), 60, "probes"),
        ("endpoint.yml", ("traffic",), {"container": 90}, "traffic"),
        ("endpoint.yml", ("traffic",), {"contaner": 100}, "traffic"),
        ("environment.yml", ("inference_config", "scoring_route", "port"), 80800, "scoring_route"),
        ("sft.yml", ("command",), "llama2 sft ${{inputs.dialog}}", "command"),
        ("evaluate.yml", ("environment",), "azureml:llama2-job:1", "environment"),
    ],
)
def test_mistakes_that_azures_package_passes_are_found(
    file: str, path: tuple[str, ...], value: Any, problem: str
) -> None:
    found = azure_files()
    place = found[file]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert problem in azure_problems(found)
