"""The tool: the numbers it prints, the configs it reads, the plot, the table, and what it refuses."""

import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megakexue.core.bases import TABLE, first_violation
from tests.helpers import ROOT

TOOL = ROOT / "tools" / "rope_base.py"
Tool = Callable[..., tuple[int, str, str]]


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tool:
    """Run the program in this process; return exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
        code = 0
        try:
            runpy.run_path(str(TOOL), run_name="__main__")
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_bases_of_a_width_and_context(tool: Tool) -> None:
    code, out, err = tool("--d-rotary", 128, "--context", 4096)
    assert (code, err) == (0, "")
    lines = [line.split("  ") for line in out.splitlines()]
    assert lines[0] == ["64 rotated pairs, 4096 tokens: f_b(m) = sum cos(m b^(-2i/128)) >= 0 for m < 4096"]
    values = {line.split("  ")[0]: float(line.split("  ", 1)[1].split()[0]) for line in out.splitlines()[1:]}
    assert values == {
        "infimum": 26952.34,
        "last invalid": pytest.approx(58789.498, abs=0.01),
        "safe": 58800,
    }


def test_a_given_base(tool: Tool) -> None:
    out = tool("--d-rotary", 128, "--context", 4096, "--base", 1e4)[1]
    assert (
        "base          10000          INVALID: serves 1707 tokens, f(1707) = -0.498932; lowest f(4060) = -8.36293"
        in out
    )
    out = tool("--d-rotary", 128, "--context", 8192, "--base", 5e5)[1]
    assert "base          500000         valid: serves 18438 tokens; lowest f(8140) = 5.97198" in out
    # no violation below 2^22 tokens
    assert first_violation(1e15, 128, 2**22) is None
    assert "valid: serves at least 4194304 tokens" in tool("--d-rotary", 128, "--context", 256, "--base", 1e15)[1]


def test_unrotated_pairs(tool: Tool) -> None:
    out = tool("--d-rotary", 96, "--unrotated", 16, "--context", 1024, "--base", 390.4)[1]
    assert "sum cos(m b^(-2i/96)) + 16 >= 0" in out
    assert "infimum       4.96926 " in out
    assert "safe          391 " in out
    assert f"INVALID: serves {first_violation(390.4, 96, 1024, 16)} tokens" in out
    code, _, err = tool("--d-rotary", 2, "--context", 7)
    assert code == 2 and err.startswith("error: no RoPE base satisfies the bound rule (10122) for a rotary width of 2")


def test_a_config(tool: Tool) -> None:
    config = ROOT / "configs" / "tiny_gqa.yaml"
    width = ["model.d_head=64", "data.seq_len=4096"]
    code, out, err = tool("--config", config, *width, "model.rope.base=10000")
    assert (code, err) == (0, "")
    assert "32 rotated pairs, 4096 tokens" in out
    assert "base          10000          INVALID: serves 725 tokens" in out
    assert out.splitlines()[-1] == (
        "WARNING: model.rope.base=10000 violates the bound rule (10122) at 725 of 4096 tokens: f(725) = -0.408 is the "
        "first below 0; model.rope.base=977000 satisfies it"
    )
    out = tool(*width, "--config", config)[1]
    assert "base          977000         valid: serves" in out and "WARNING" not in out
    # an extension keeps the base of the trained context
    extension = ["model.rope.extension=ntk", "model.rope.trained_context=1024", "train.init_from=bundle"]
    out = tool("--config", config, *width, *extension)[1]
    assert "32 rotated pairs, 1024 tokens" in out
    assert "base          23100          valid" in out
    assert out.splitlines()[-1].startswith(
        "model.rope.extension=ntk from 1024 tokens violates the bound rule (10122) at"
    )


def test_plot(tool: Tool, tmp_path: Path) -> None:
    from matplotlib import image

    out = tmp_path / "rule.png"
    arguments = ["--d-rotary", 64, "--context", 300, "--base", 100, "--plot", out]
    code, text, err = tool(*arguments)
    assert (code, err) == (0, "") and text.endswith(f"wrote {out}\n")
    pixels = image.imread(out)
    assert pixels.shape == (750, 1350, 4)
    for color in ((31, 119, 180), (255, 127, 14), (44, 160, 44)):  # the first three of matplotlib's cycle
        assert (np.abs(pixels[..., :3] * 255 - color).max(axis=-1) < 2).sum() > 500
    assert [path.name for path in tmp_path.iterdir()] == ["rule.png"]
    before = out.read_bytes()
    code, _, err = tool(*arguments)
    assert (code, err) == (2, f"error: --plot {out} exists: choose another name or add --overwrite\n")
    assert out.read_bytes() == before
    assert tool("--d-rotary", 64, "--context", 300, "--plot", out, "--overwrite")[0] == 0
    assert out.read_bytes() != before


def test_missing_matplotlib_says_what_to_install(tool: Tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = tool("--d-rotary", 64, "--context", 256, "--plot", tmp_path / "a.png")
    assert (code, err) == (2, "error: --plot needs matplotlib, which is not installed: pip install 'matplotlib>=3.9'\n")


def test_the_table_can_be_rebuilt(tool: Tool, tmp_path: Path) -> None:
    shipped = TABLE.read_text(encoding="utf-8").splitlines()
    assert shipped[0].endswith(
        "rebuild with tools/rope_base.py --write-table megakexue/core/rope_bases.tsv --overwrite"
    )
    assert shipped[1].split("\t") == ["d_rotary", "context", "infimum", "last_invalid"]
    out = tmp_path / "part.tsv"
    code, _, err = tool("--write-table", out, "--d-rotary", 64, "--context", 512)
    assert (code, err) == (0, "")
    part = out.read_text(encoding="utf-8").splitlines()
    assert part[:2] == shipped[:2]
    rows = [[float(value) for value in line.split("\t")] for line in part[2:]]
    known = [[float(value) for value in line.split("\t")] for line in shipped[2:] if line.startswith("64\t")]
    assert np.array(rows) == pytest.approx(np.array(known[:2]), rel=1e-6)
    assert [path.name for path in tmp_path.iterdir()] == ["part.tsv"]


def test_user_errors(tool: Tool, tmp_path: Path) -> None:
    config = ROOT / "configs" / "tiny_gqa.yaml"
    table = tmp_path / "old.tsv"
    table.write_text("old", encoding="utf-8")
    for arguments, message in [
        ((), "give --d-rotary and --context, or --config"),
        (("--d-rotary", 64), "give --d-rotary and --context, or --config"),
        (("--d-rotary", 63, "--context", 64), "--d-rotary 63 must be even"),
        (("--d-rotary", 64, "--context", 0), "--context 0 is too small"),
        (("--d-rotary", 64, "--context", "1e12"), "--context 1000000000000 must be at most 67108864"),
        (("--d-rotary", "1e12", "--context", 64), "--d-rotary 1000000000000 must be at most 65536"),
        (("--d-rotary", 64, "--context", 64, "--unrotated", -1), "--unrotated -1 is too small"),
        (("--d-rotary", 64, "--context", 64, "--base", 1), "--base 1.0 must be above 1"),
        (("--d-rotary", 64, "--context", 64, "data.seq_len=3"), "['data.seq_len=3'] change a config: give --config"),
        (("--config", config, "--context", 64), "--context and --config: give one; the config has its own"),
        (("--config", config, "data.seqlen=64"), "seqlen"),
        (("--d-rotary", 64, "--context", 64, "--plot", "a.pdf"), "--plot a.pdf must end in .png"),
        (("--d-rotary", 64, "--context", 64, "--plot", tmp_path / "no" / "a.png"), f"there is no folder {tmp_path}/no"),
        (("--write-table", table), f"--write-table {table} exists: choose another name or add --overwrite"),
        (("--write-table", tmp_path / "a.tsv", "--base", 3), "--write-table does not go with --base"),
    ]:
        code, _, err = tool(*arguments)
        assert code == 2 and message in err, arguments
    assert table.read_text(encoding="utf-8") == "old"


def test_help_teaches(tool: Tool) -> None:
    command = [sys.executable, "-W", "error", str(TOOL), "--help"]
    result = subprocess.run(command, text=True, capture_output=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert "tools/rope_base.py --d-rotary 128 --context 4096 --base 10000 --plot rule.png" in result.stdout
