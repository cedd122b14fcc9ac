"""launch/kubernetes.yaml: its own command as two pods on this machine, and what it says."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megakexue.config import load_config
from megakexue.hosts import is_passed
from tests.conftest import Popen, Prepared
from tests.helpers import ROOT, column, tiny_run
from tests.launch.conftest import N_STEPS
from tests.ranks import free_port

DOCUMENTS = {d["kind"]: d for d in yaml.safe_load_all((ROOT / "launch" / "kubernetes.yaml").read_text())}
POD = DOCUMENTS["Job"]["spec"]["template"]["spec"]
CONTAINER = POD["containers"][0]
NODES, RANKS = (int(word.partition("=")[2]) for word in CONTAINER["command"][2:])


@pytest.mark.slow
def test_two_pods_give_the_losses_of_two_local_ranks(
    prepared: Prepared, reference: Path, tmp_path: Path, popen: Popen
) -> None:
    variables = {entry["name"]: entry["value"] for entry in CONTAINER["env"]} | DOCUMENTS["ConfigMap"]["data"]
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    _, program, nodes, _ = CONTAINER["command"]
    trainer, _, *changes = CONTAINER["args"]
    changes = [*changes, *tiny_run(prepared, tmp_path / "run", f"train.steps={N_STEPS}")]
    command = [sys.executable, program, nodes, "--ranks=1", trainer, "configs/tiny_gqa.yaml", *changes]
    pods = []
    for index in range(NODES):
        environment = os.environ | variables | {"PYTHONPATH": str(ROOT), "JOB_COMPLETION_INDEX": str(index)}
        pods.append(popen(command, cwd=ROOT, env=environment, stdout=-1, stderr=subprocess.STDOUT))
    said = [pod.communicate(timeout=300)[0] for pod in pods]
    assert [pod.returncode for pod in pods] == [0, 0], said
    assert column(tmp_path / "run") == column(reference)


def test_the_manifest_is_one_that_kubernetes_takes() -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="not installed: kubernetes-validate")
    for document in DOCUMENTS.values():
        for version in ("1.31", "1.37"):
            validator.validate(document, version, strict=True)
    wrong = DOCUMENTS["Service"] | {"spec": {"clusterIp": "None"}}
    with pytest.raises(validator.ValidationError):
        validator.validate(wrong, "1.37", strict=True)


def test_the_manifest_agrees_with_itself_and_with_the_program() -> None:
    job: dict[str, Any] = DOCUMENTS["Job"]["spec"]
    assert CONTAINER["command"] == [
        f"{CONTAINER['workingDir']}/.venv/bin/python",
        "launch/pod.py",
        *CONTAINER["command"][2:],
    ]
    assert job["parallelism"] == job["completions"] == NODES
    limits = CONTAINER["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == RANKS
    names = {document["metadata"]["name"] for document in DOCUMENTS.values()}
    assert names == {POD["subdomain"]} == set(DOCUMENTS["Service"]["spec"]["selector"].values())
    config = load_config(ROOT / CONTAINER["args"][1], CONTAINER["args"][2:])
    assert POD["terminationGracePeriodSeconds"] >= config.checkpoint.grace_s + 60
    # a pod has nothing but what the manifest sets: the place, what a container lacks, and the list of hosts.py
    own = {entry["name"] for entry in CONTAINER["env"]} | set(DOCUMENTS["ConfigMap"]["data"])
    assert {name for name in own if not is_passed(name)} == {"MASTER_ADDR", "MASTER_PORT", "HOME", "USER"}
    assert int(DOCUMENTS["ConfigMap"]["data"]["OMP_NUM_THREADS"]) * RANKS == limits["cpu"]
