"""What deploy/ names exists: paths, flags, variables, ports; and the tools that are here find no fault."""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from musetalk import cli
from musetalk.config import REPOSITORY, ServerConfig

DEPLOY = REPOSITORY / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text("utf-8")
UNIT = (DEPLOY / "musetalk.service").read_text("utf-8")
HAPROXY = (DEPLOY / "haproxy.cfg").read_text("utf-8")
IGNORED = [line for line in (REPOSITORY / ".dockerignore").read_text("utf-8").splitlines() if line[:1] != "#"]
COMPOSE_KEYS = {
    *("build", "image", "command", "environment", "volumes", "networks", "stop_grace_period", "restart"),
    *("profiles", "depends_on"),
}


def compose() -> dict[str, Any]:
    yaml = pytest.importorskip("yaml", reason="needs PyYAML (make install-full)")
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text("utf-8"))


def instructions(name: str) -> list[str]:
    """The Dockerfile's lines of one kind, continued lines joined."""
    joined = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE))
    return [line.partition(" ")[2].strip() for line in joined.splitlines() if line.startswith(f"{name} ")]


def serve(flags: list[str]) -> Any:
    """The worker's command line, parsed."""
    command, arguments = cli.service_main(flags)
    assert command is cli.serve_command
    return arguments


def test_what_the_image_copies_is_there() -> None:
    for line in instructions("COPY"):
        *sources, _target = line.split()
        for source in sources:
            assert list(REPOSITORY.glob(source)), source
            assert f"!{source}" in IGNORED, source
    copied = " ".join(instructions("COPY"))
    assert all(name in copied for name in ("musetalk musetalk", "models/lite models/lite", "*.py"))
    assert IGNORED[0] == "*"


def test_the_image_installs_what_the_requirements_name() -> None:
    for name in re.findall(r"-r ([\w.-]+\.txt)", " ".join(instructions("RUN"))):
        assert (REPOSITORY / name).is_file()
    (steps,) = [line for line in instructions("RUN") if "mediapipe" in line]
    (mediapipe,) = re.findall(r"mediapipe==\S+?(?=;)", steps)
    assert mediapipe in (REPOSITORY / "requirements-no-deps.txt").read_text()
    pattern = re.search(r"sed -n '(.*?)' (\S+)\)", steps)
    assert pattern is not None
    found = subprocess.run(
        ["sed", "-n", pattern[1], pattern[2]], cwd=REPOSITORY, capture_output=True, check=True
    )
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", found.stdout.decode())


def test_the_image_runs_the_worker_as_nobody_special() -> None:
    (user,), (entry,), (command,) = (instructions(name) for name in ("USER", "ENTRYPOINT", "CMD"))
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", user)
    python, script, *flags = json.loads(entry)
    assert python == "python" and (REPOSITORY / Path(script).name).is_file()
    arguments = serve([*flags, *json.loads(command)])
    assert arguments.host == "0.0.0.0"
    (health,) = re.findall(r"HEALTHCHECK.*?CMD (\[.*?\])", DOCKERFILE, re.DOTALL)
    assert f":{ServerConfig.http_port}/health" in json.loads(health)[2]
    compile(json.loads(health)[2], "health check", "exec")
    assert instructions("EXPOSE") == [f"{ServerConfig.http_port} {ServerConfig.tcp_port}"]


def test_variables_that_are_set_are_read() -> None:
    sources = "".join(path.read_text("utf-8") for path in (REPOSITORY / "musetalk").rglob("*.py"))
    named = set(re.findall(r"\bMUSE(?:TALK)?_[A-Z_]+", DOCKERFILE + UNIT + HAPROXY))
    named |= set(compose()["services"]["musetalk-python"]["environment"])
    assert len(named) >= 4
    for name in named:
        assert f'"{name}"' in sources, name


def test_the_unit_runs_the_worker() -> None:
    (line,) = re.findall(r"^ExecStart=(.*)$", UNIT, re.MULTILINE)
    python, script, *flags = shlex.split(line)
    assert python.endswith(".venv/bin/python") and (REPOSITORY / Path(script).name).is_file()
    (stop,) = re.findall(r"^TimeoutStopSec=(\d+)$", UNIT, re.MULTILINE)
    assert serve(flags).grace < float(stop)
    (codes,) = re.findall(r"^RestartPreventExitStatus=(.*)$", UNIT, re.MULTILINE)
    assert {int(code) for code in codes.split()} <= {2, 3, 4, 5, 6, 7}


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_systemd_finds_no_fault_with_the_unit(tmp_path: Path) -> None:
    program = shutil.which("true")
    unit = re.sub(r"^ExecStart=\S+", f"ExecStart={program}", UNIT, flags=re.MULTILINE)
    (tmp_path / "musetalk.service").write_text(unit)
    verify = ["systemd-analyze", "verify", "--man=no", str(tmp_path / "musetalk.service")]
    done = subprocess.run(verify, capture_output=True, text=True, check=False)
    told = [line for line in (done.stdout + done.stderr).splitlines() if "musetalk.service" in line]
    assert told == []


def test_the_compose_file_shares_folders_between_worker_and_caller() -> None:
    found = compose()
    assert found.keys() == {"name", "services", "networks", "volumes"}
    worker, caller = found["services"]["musetalk-python"], found["services"]["caller"]
    for service in (worker, caller):
        assert service.keys() <= COMPOSE_KEYS
        assert set(service["networks"]) <= found["networks"].keys()
    mounts = [dict(volume.split(":") for volume in service["volumes"]) for service in (worker, caller)]
    assert mounts[1].keys() < mounts[0].keys() == found["volumes"].keys()
    assert all(mounts[0][name] != mounts[1][name] for name in mounts[1])
    assert set(worker["environment"].values()) == set(mounts[0].values())
    assert caller["environment"]["MUSETALK_URL"] == f"http://musetalk-python:{ServerConfig.http_port}"


def test_the_composed_worker_trusts_the_inner_network_and_has_time_to_drain() -> None:
    found = compose()
    worker = found["services"]["musetalk-python"]
    arguments = serve(["--serve", *worker["command"]])
    (subnet,) = found["networks"]["inside"]["ipam"]["config"]
    assert arguments.trust == [subnet["subnet"]]
    assert arguments.grace < float(worker["stop_grace_period"].removesuffix("s"))
    build = worker["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).is_file()
    arguments_of_build = {line.partition("=")[0] for line in instructions("ARG")}
    assert build["args"].keys() == arguments_of_build - {"RAY"}


def test_the_image_has_what_the_compose_file_mounts() -> None:
    made = " ".join(instructions("RUN"))
    for volume in compose()["services"]["musetalk-python"]["volumes"]:
        assert volume.partition(":")[2] in made


@pytest.mark.skipif(not shutil.which("hadolint"), reason="needs hadolint")
def test_hadolint_finds_no_fault_with_the_image() -> None:
    subprocess.run(["hadolint", str(DEPLOY / "Dockerfile")], check=True)


@pytest.mark.skipif(not shutil.which("haproxy"), reason="needs haproxy")
def test_haproxy_takes_the_configuration() -> None:
    done = subprocess.run(
        ["haproxy", "-c", "-f", str(DEPLOY / "haproxy.cfg")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "WARNING" not in done.stderr.upper(), done.stderr


def test_the_example_of_the_balancer_starts_workers_where_it_looks_for_them() -> None:
    (line,) = re.findall(r"--serve (--http_port .*?) &$", HAPROXY, re.MULTILINE)
    for number in "123":
        arguments = serve(["--serve", *line.replace("$n", number).split()])
        assert f"WORKER{number}_HTTP-127.0.0.1:{arguments.http_port}" in HAPROXY
        assert f"WORKER{number}_LINES-127.0.0.1:{arguments.port}" in HAPROXY


RAY_SERVICE_FIELDS = {
    *("upgradeStrategy", "rayClusterDeletionDelaySeconds", "serveConfigV2", "rayClusterConfig"),
    *("serviceUnhealthySecondThreshold", "serveService", "excludeHeadPodFromServeSvc"),
}
RAY_CLUSTER_FIELDS = {
    *("rayVersion", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec", "workerGroupSpecs"),
    *("headServiceAnnotations", "gcsFaultToleranceOptions", "suspend", "managedBy", "authOptions"),
}
HEAD_FIELDS = {"rayStartParams", "template", "serviceType", "headService", "enableIngress"}
WORKER_FIELDS = {
    *("groupName", "replicas", "minReplicas", "maxReplicas", "numOfHosts", "rayStartParams", "template"),
    *("scaleStrategy", "suspend", "idleTimeoutSeconds"),
}
"""What ray.io/v1 knows, from KubeRay's documentation; its whole schema isn't at hand to check against."""


def kuberay() -> dict[str, dict[str, Any]]:
    yaml = pytest.importorskip("yaml", reason="needs PyYAML (make install-full)")
    documents = yaml.safe_load_all((DEPLOY / "kuberay.yaml").read_text("utf-8"))
    return {document["kind"]: document for document in documents}


def test_the_ray_service_has_the_fields_that_kuberay_knows() -> None:
    service, claim = kuberay()["RayService"], kuberay()["PersistentVolumeClaim"]
    assert service["apiVersion"] == "ray.io/v1" and service.keys() == {
        "apiVersion",
        "kind",
        "metadata",
        "spec",
    }
    assert len(service["metadata"]["name"]) <= 47 and service["spec"].keys() <= RAY_SERVICE_FIELDS
    assert service["spec"]["upgradeStrategy"] == {"type": "NewCluster"}
    cluster = service["spec"]["rayClusterConfig"]
    assert cluster.keys() <= RAY_CLUSTER_FIELDS and cluster["headGroupSpec"].keys() <= HEAD_FIELDS
    (group,) = cluster["workerGroupSpecs"]
    assert group.keys() <= WORKER_FIELDS and group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for part in (cluster["headGroupSpec"], group):
        assert all(isinstance(value, str) for value in part["rayStartParams"].values())
        (container,) = part["template"]["spec"]["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        (volume,) = part["template"]["spec"]["volumes"]
        assert mounted == {volume["name"]}
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


def test_the_ray_service_runs_the_application_of_the_version_that_is_pinned() -> None:
    yaml = pytest.importorskip("yaml", reason="needs PyYAML (make install-full)")
    spec = kuberay()["RayService"]["spec"]
    pinned = re.search(
        r"^ray\[serve\]==(\S+)", (REPOSITORY / "requirements-ray.txt").read_text(), re.MULTILINE
    )
    assert pinned is not None and spec["rayClusterConfig"]["rayVersion"] == pinned[1]
    (application,) = yaml.safe_load(spec["serveConfigV2"])["applications"]
    module, _, name = application["import_path"].partition(":")
    assert (DEPLOY / f"{module}.py").is_file()
    assert f"deploy/{module}.py" in " ".join(instructions("COPY"))
    tree = ast.parse((DEPLOY / f"{module}.py").read_text("utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    (options,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Options"]
    known = {node.target.id for node in options.body if isinstance(node, ast.AnnAssign)}  # type: ignore[union-attr]
    assert application["args"].keys() <= known
    (container,) = spec["rayClusterConfig"]["workerGroupSpecs"][0]["template"]["spec"]["containers"]
    limits = container["resources"]["limits"]
    assert application["args"]["num_cpus"] <= int(limits["cpu"])
    assert application["args"]["num_gpus"] <= limits["nvidia.com/gpu"]


def test_serve_takes_the_configuration() -> None:
    schema = pytest.importorskip("ray.serve.schema", reason="needs Ray (requirements-ray.txt)")
    yaml = pytest.importorskip("yaml", reason="needs PyYAML (make install-full)")
    schema.ServeDeploySchema(**yaml.safe_load(kuberay()["RayService"]["spec"]["serveConfigV2"]))
