"""deploy/kubernetes: manifests that a cluster takes, and in which the programs find what they need."""

import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import kubernetes_validate
import pytest
import yaml

from bridge import __version__
from bridge.errors import SettingsError
from bridge.settings import Settings, load
from bridge.settings.load import CREDENTIALS_VARIABLE, DEFAULT_PATHS
from bridge.settings.models import parse_size
from tests.support.environment import ROOT

FOLDER: Final = ROOT / "deploy" / "kubernetes"
DOCUMENTS: Final[list[dict[str, Any]]] = [
    document for file in sorted(FOLDER.glob("*.yaml")) for document in yaml.safe_load_all(file.read_text())
]
EXIT_ROOM: Final = 5.0
"""Seconds that a process may take beyond its own limit of a stop, for goodbyes."""


class Pod(NamedTuple):
    name: str
    spec: Mapping[str, Any]

    @property
    def containers(self) -> list[Mapping[str, Any]]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]


def of_kind(*kinds: str) -> Iterator[Mapping[str, Any]]:
    return (document for document in DOCUMENTS if document["kind"] in kinds)


def named(document: Mapping[str, Any]) -> str:
    return f"{document['kind']}-{document['metadata']['name']}"


PODS: Final = [Pod(named(each), each["spec"]["template"]["spec"]) for each in of_kind("Deployment", "Job")]


@pytest.mark.parametrize("version", ["1.30", "1.37"])
@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_kubernetes_takes_every_manifest_to_the_letter(document: Mapping[str, Any], version: str) -> None:
    kubernetes_validate.validate(document, version, strict=True)
    assert "namespace" not in document["metadata"], "it is the one that kubectl is told"


def test_no_manifest_holds_a_secret() -> None:
    assert list(of_kind("Secret")) == []


@pytest.mark.parametrize("pod", PODS, ids=[pod.name for pod in PODS])
def test_a_pod_runs_this_version(pod: Pod) -> None:
    assert {container["image"] for container in pod.containers} == {f"pgbridge:{__version__}"}


@pytest.mark.parametrize("pod", PODS, ids=[pod.name for pod in PODS])
def test_a_pod_is_restricted(pod: Pod) -> None:
    """Pod Security Standards, the policy `restricted`; and a file system that nobody writes to."""
    context = pod.spec["securityContext"]
    assert context["runAsNonRoot"] is True
    assert context["runAsUser"] == context["runAsGroup"] == context["fsGroup"] == 10001
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod.spec["automountServiceAccountToken"] is False
    for container in pod.containers:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["requests"].keys() == {"cpu", "memory"}
        assert container["resources"]["limits"].keys() == {"memory"}


def test_no_variable_of_a_service_is_read_as_a_setting(tmp_path: Path) -> None:
    (tmp_path / "bridge.toml").write_text('name = "shop"\n')
    with pytest.raises(SettingsError, match="service_host: unknown key"):
        load(tmp_path / "bridge.toml", {"PGBRIDGE_SERVICE_HOST": "10.0.0.1"})
    for pod in PODS:
        assert pod.spec["enableServiceLinks"] is False


@pytest.fixture(scope="module")
def credentials(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the documentation has them made: one Secret for each folder, by `kubectl create secret --from-file`."""
    folder = tmp_path_factory.mktemp("init") / "shop"
    words = ["--name", "shop", "--database", "postgresql://db.internal/shop", "--broker", "rabbitmq"]
    words += ["--at", "amqps://mq.internal/shop", "--topic", "shop.invoice.requested", "--worker", "invoices"]
    program = [sys.executable, "-m", "bridge.cli", "init", "--folder", str(folder)]
    subprocess.run([*program, *words], cwd=ROOT, check=True, capture_output=True)
    return folder / "credentials"


def mounted(place: Path, files: Mapping[str, str]) -> None:
    """As the kubelet lays a ConfigMap or a Secret out: links to links."""
    data = place / "..2026_11_29_12_00_00.1"
    data.mkdir(parents=True)
    (place / "..data").symlink_to(data.name)
    for name, text in files.items():
        (data / name).write_text(text)
        (place / name).symlink_to(f"..data/{name}")


def settings_of(pod: Pod, container: Mapping[str, Any], credentials: Path, root: Path) -> Settings:
    """What the container's program loads."""
    volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
    for mount in container["volumeMounts"]:
        volume, place = volumes[mount["name"]], root / mount["mountPath"].lstrip("/")
        if "configMap" in volume:
            [config] = [
                each for each in of_kind("ConfigMap") if each["metadata"]["name"] == volume["configMap"]["name"]
            ]
            mounted(place, config["data"])
        elif "secret" in volume:
            assert volume["secret"]["defaultMode"] == 0o440, "the program's group reads it, and nobody writes to it"
            process = volume["secret"]["secretName"].removeprefix("pgbridge-")
            mounted(place, {file.name: file.read_text() for file in (credentials / process).iterdir()})
    environ = {each["name"]: each["value"] for each in container["env"]}
    environ[CREDENTIALS_VARIABLE] = str(root / environ[CREDENTIALS_VARIABLE].lstrip("/"))
    [config_path] = [path for path in DEFAULT_PATHS if path.is_absolute()]
    return load(root / str(config_path).lstrip("/"), environ)


def login(settings: Settings) -> tuple[str, str]:
    """Who the program is in PostgreSQL and at the broker."""
    of_workers = "user=shop_workers" in settings.workers_postgres.dsn.get_secret_value()
    dsn = (settings.workers_postgres if of_workers else settings.postgres).dsn.get_secret_value()
    url = settings.sinks["events"].url.get_secret_value()  # type: ignore[attr-defined]
    return dsn.partition("user=")[2].split()[0], url.partition("://")[2].partition(":")[0]


def test_each_program_finds_its_settings_and_its_own_secrets(credentials: Path, tmp_path: Path) -> None:
    found = {}
    for pod in PODS:
        for container in pod.containers:
            if container["name"] != "migrate":  # which has no login at the broker: see below
                settings = settings_of(pod, container, credentials, tmp_path / container["name"])
                found[" ".join(container["command"])] = login(settings)
    assert found == {
        "pgbridge run": ("shop_bridge", "shop_bridge"),
        "pgbridge-worker run invoices": ("shop_workers", "shop_workers"),
        "pgbridge topology --apply": ("shop_operator", "shop_operator"),
    }


def test_the_migration_is_done_by_the_owner(credentials: Path) -> None:
    [job] = of_kind("Job")
    [migrate] = job["spec"]["template"]["spec"]["initContainers"]
    assert migrate["command"] == ["pgbridge", "migrate"]
    assert {"name": "owner", "mountPath": "/run/secrets/pgbridge", "readOnly": True} in migrate["volumeMounts"]
    assert "user=shop_owner" in (credentials / "owner" / "postgres.dsn").read_text()


@pytest.mark.parametrize("name", ["pgbridge", "pgbridge-invoices"])
def test_a_deployment_fits_the_program_that_it_runs(name: str, credentials: Path, tmp_path: Path) -> None:
    [deployment] = [each for each in of_kind("Deployment") if each["metadata"]["name"] == name]
    template = deployment["spec"]["template"]
    pod = Pod(name, template["spec"])
    [container] = pod.containers
    settings = settings_of(pod, container, credentials, tmp_path)
    worker = settings.workers.get("invoices") if name == "pgbridge-invoices" else None
    limit, listen = (
        (settings.relay.shutdown_limit, settings.observe.listen)
        if worker is None
        else (worker.shutdown_limit, worker.listen)
    )
    assert pod.spec["terminationGracePeriodSeconds"] >= limit + EXIT_ROOM
    [port] = container["ports"]
    assert listen == f"0.0.0.0:{port['containerPort']}"
    assert template["metadata"]["annotations"]["prometheus.io/port"] == str(port["containerPort"])
    for probe, path in (("livenessProbe", "/livez"), ("readinessProbe", "/readyz")):
        assert container[probe]["httpGet"] == {"path": path, "port": port["name"]}
    labels = template["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels
    if worker is not None:
        [volume] = [each for each in container["volumeMounts"] if each["name"] == "invoices"]
        assert worker.options["path"] == volume["mountPath"]
        at_once = worker.concurrency * parse_size(worker.options["memory_limit"])
        assert parse_size(container["resources"]["limits"]["memory"] + "B") >= at_once + (256 << 20)


def test_while_bridges_are_replaced_one_always_leads_or_takes_over() -> None:
    [bridge] = [each for each in of_kind("Deployment") if each["metadata"]["name"] == "pgbridge"]
    assert bridge["spec"]["replicas"] == 2
    assert bridge["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    [budget] = of_kind("PodDisruptionBudget")
    assert budget["spec"]["maxUnavailable"] == 1
    assert budget["spec"]["selector"] == bridge["spec"]["selector"]


def test_the_network_lets_pods_be_seen_and_reach_what_they_need() -> None:
    [policy] = of_kind("NetworkPolicy")
    selected = policy["spec"]["podSelector"]["matchLabels"].items()
    for document in of_kind("Deployment", "Job"):
        assert selected <= document["spec"]["template"]["metadata"]["labels"].items()
    assert policy["spec"]["ingress"] == [{"ports": [{"protocol": "TCP", "port": 9187}]}]
    assert [port["port"] for port in policy["spec"]["egress"][0]["ports"]] == [53, 53, 5432, 5671]
