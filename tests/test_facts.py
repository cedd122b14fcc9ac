"""What must be equal on all hosts: what a host says of itself, and the table of what differs."""

import shutil
from pathlib import Path

import pytest

from megakexue import facts
from megakexue.facts import MAX_ROWS, REMEDIES, compare, host_facts
from tests.conftest import Prepared
from tests.helpers import ROOT, tiny_config


def test_all_that_decides_what_is_trained_is_a_fact(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(prepared, tmp_path / "run")
    before = host_facts(config)
    assert {name.split()[0] for name in before} == set(REMEDIES) - {"bundle", "variable", "device", "place"}
    assert "missing" not in before.values() and host_facts(config) == before

    def changes(after: dict[str, str]) -> set[str]:
        return {name for name in before | after if before.get(name) != after.get(name)}

    assert changes(host_facts(tiny_config(prepared, tmp_path / "run", "optim.lr=1e-4"))) == {"config optim.lr"}
    manifest = Path(config.data.sources[0].path, "manifest.json")
    content = manifest.read_bytes()
    try:
        manifest.write_bytes(content + b" ")
        assert changes(host_facts(config)) == {f"data {manifest.parent}"}
    finally:
        manifest.write_bytes(content)
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    assert changes(host_facts(config)) == {"variable NVIDIA_TF32_OVERRIDE"}
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE")
    shutil.copytree(ROOT / "megakexue", tmp_path / "megakexue")
    monkeypatch.setattr(facts, "ROOT", tmp_path)
    assert host_facts(config) == before  # wherever the code lies
    with open(tmp_path / "megakexue" / "core" / "rope.py", "a") as file:
        file.write("# another\n")
    assert changes(host_facts(config)) == {"code megakexue/core/rope.py"}


def test_equal_hosts_need_no_table() -> None:
    assert compare({}) is None and compare({"n1": {"a": "1"}, "n2": {"a": "1"}}) is None


def test_the_table_says_who_has_what_and_what_to_do() -> None:
    first = {"config optim.lr": "0.02", "config seed": "0", "version torch": "2.14.1"}
    other = {"config optim.lr": "0.0001", "config seed": "0"}
    table = compare({"n1": first, "n3": first, "n4": first, "n2": other})
    assert table is not None and table.splitlines()[1:] == [
        "                   n1, n3 and 1 more  n2",
        "  config optim.lr  0.02               0.0001",
        "  version torch    2.14.1             -",
        f"config: {REMEDIES['config']}",
        f"version: {REMEDIES['version']}",
    ]


def test_a_table_stays_small() -> None:
    hosts = {f"n{i}": {f"code file_{j}.py": f"{i}" * 99 for j in range(50)} for i in range(9)}
    table = compare(hosts)
    assert table is not None
    lines = table.splitlines()
    assert len(lines) == MAX_ROWS + 5 and max(map(len, lines)) < 240
    assert lines[-3:-1] == ["  and 38 more", "  and 5 more hosts that are like none of these"]
