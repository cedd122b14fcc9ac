"""The command blocks of README and docs/: each is run here as it stands, or says why it is not.

A block that is not run has `<!-- not run: REASON -->` in the line above it. Its programs and options must exist, and
its configs must load. The others run one after another in a world with a small text, a small run, and the names that
the documents use; models are made smaller and runs shorter by settings that come after those of the command.
"""

import os
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from megakexue.config import load_config, read_yaml
from tests.conftest import Prepared, stdlib_files
from tests.helpers import ROOT, tiny_config, train_all
from tests.programs import run_forked
from tests.ranks import FIXED, run_on_ranks
from tests.test_layout import DOCUMENTS, parser_of

BLOCK = re.compile(r"(?:^ *<!-- not run: (.+?) -->\n)?^( *)```bash\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
REASONS = ("needs a cluster", "needs a GPU", "needs files of others", "needs a bucket", "needs an installation",
           "needs namespaces", "takes minutes", "takes an hour", "is what these tests run in")  # fmt: skip
SMALLER = {
    **{f"--vocab-size {n}": "--vocab-size 512" for n in (4096, 8192, 32768)},
    "--lengths 4096,16384,65536 --seeds 20": "--lengths 64,128 --seeds 2",
    "--n-tokens 60": "--n-tokens 4",
    "--split-by-length 4096": "--split-by-length 256",
}
"""Options of programs, in their place."""
TRAINING = ["train.steps=2", "optim.warmup_steps=1", "train.global_batch_size=2", "train.micro_batch_size=1",
            "evaluate.every_steps=null", "metrics.peak_tflops=1"]  # fmt: skip
SMALL = ["model.d_model=64", "model.n_heads=2", "model.n_kv_heads=1", "model.n_layers=1", "model.d_ff=64"]
"""For configs whose model is not taken from what was trained before."""
FAILS = {"train.run=runs/overflow": 1, "--recipe": 2}
"""Words of commands that end with another exit code than 0: a step that overflows, and rows that no recipe has."""


@dataclass(frozen=True)
class Block:
    document: Path
    reason: str | None
    """Why it is not run."""
    commands: list[list[str]]
    """Words of each command, without comments."""


def blocks_of(document: Path) -> list[Block]:
    found = []
    for reason, indent, text in BLOCK.findall(document.read_text(encoding="utf-8")):
        lines = re.sub(rf"^{indent}", "", text, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
        commands = [shlex.split(line, comments=True) for line in lines]
        found.append(Block(document, reason or None, [command for command in commands if command]))
    return found


BLOCKS = [block for document in DOCUMENTS for block in blocks_of(document)]


def program_of(command: list[str]) -> list[str] | None:
    """The command as one process, without a launcher before it; None: it starts no Python program of ours."""
    at = [i for i, word in enumerate(command) if re.fullmatch(r"(tools|launch)/[\w/]+\.py", word)]
    return command[at[-1] :] if at else None


def test_blocks_are_found_and_give_known_reasons() -> None:
    assert sum(text.read_text(encoding="utf-8").count("```bash\n") for text in DOCUMENTS) == len(BLOCKS)
    for block in BLOCKS:
        assert block.reason is None or block.reason.startswith(REASONS), (block.document.name, block.reason)


def test_what_is_not_run_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs, options, configs and keys exist; make has its targets."""
    n = 0
    for block in BLOCKS:
        for command in block.commands if block.reason else []:
            program = program_of(command)
            if command[0] == "make":
                assert f"\n{command[1]}:" in (ROOT / "Makefile").read_text()
            elif program is not None:
                n += 1
                parser, method = parser_of(ROOT / program[0], monkeypatch)
                arguments = getattr(parser, method)(program[1:])
                config = getattr(arguments, "config", None)
                if config is not None and Path(config).parts[0] == "configs":
                    load_config(ROOT / config, getattr(arguments, "overrides", None))
    assert n > 20


@pytest.fixture(scope="module")
def world(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the names of the documents: a trained demo run, its data, and texts."""
    folder = tmp_path_factory.mktemp("world")
    for name in ("tools", "launch", "configs", "docs"):
        (folder / name).symlink_to(ROOT / name)
    demo = folder / "runs" / "demo"
    small = tiny_config(prepared, demo / "run", "model.d_model=64", "model.n_heads=2", "model.n_kv_heads=1",
                        "train.steps=4", "evaluate.every_steps=null")  # fmt: skip
    run_on_ranks(1, train_all, [small])
    shutil.copytree(prepared.data, demo / "data")
    shutil.copy(prepared.tokenizer, demo)
    for name in ("", "email", "json", "pydoc_data", "xml"):
        (folder / "text" / name).mkdir(exist_ok=True, parents=True)
        for i, path in enumerate(stdlib_files(16)):
            content = path.read_text(encoding="utf-8")
            (folder / "text" / name / path.name).write_text(f"# {name}\n" + (content if i % 2 else content[:300]))
    (folder / "corpus").symlink_to("text")
    return folder


def shorter(command: list[str]) -> list[str]:
    """The same command on a small model."""
    if "prepare_data" in command[0]:
        return [*command, "--valid-fraction", "0.2"]  # of few documents
    if "configs/tiny_grown.yaml" in command and "grow_model" in command[0]:
        return [*command, "data.seq_len=64", "model.vocab_size=512"]
    if command[0] != "launch/train.py" and "inject_faults" not in command[0]:
        return [*command, *(["--n-rows", "2"] if "--by-position" in command else [])]
    config, *overrides = command[1:]
    trained = "tiny_2048" in config or "tiny_grown" in config
    length = [] if "tiny_2048" in config else ["data.seq_len=64"]
    steps = ["train.steps=24"] if "inject_faults" in command[0] else []  # more than faults
    steps += ["evaluate.every_steps=2"] if config == "configs/10m.yaml" else []  # for the comparison that follows
    small = [*([] if trained else SMALL), *([] if "tiny_2048" in config else ["model.vocab_size=512"])]
    return [command[0], config, *overrides, *TRAINING, *length, *steps, *small]


def run_document(name: str, world: Path) -> list[tuple[list[str], str, str]]:
    """Run the blocks of a document; return each command with its stdout and stderr."""
    commands = []
    for block in blocks_of(ROOT / name):
        for command in [] if block.reason else block.commands:
            line = shlex.join([word.replace("$text", "text").replace("$torch", "text") for word in command])
            for option, small in SMALLER.items():
                line = line.replace(option, small)
            program = program_of(shlex.split(line))
            # the environment is here already, and the text is that of the world
            assert program is not None or re.match("source|make|text=|torch=", command[0]), command
            if program is not None:
                commands.append(shorter(program))
    done = run_forked(commands, cwd=world, env=os.environ | FIXED | {"PYTHONPATH": str(ROOT)})
    for command, (code, _, err) in zip(commands, done, strict=True):
        expected = next((code for word, code in FAILS.items() if word in command), 0)
        assert code == expected and ("--recipe" not in command or "was validated on other rows" in err), (command, err)
    return [(command, out, err) for command, (_, out, err) in zip(commands, done, strict=True)]


@pytest.mark.slow
def test_the_ten_lines_of_the_readme(world: Path) -> None:
    done = run_document("README.md", world)
    assert [Path(command[0]).stem for command, _, _ in done] == [
        "train_tokenizer", "prepare_data", "train", "plot_run", "export_model", "generate"
    ]  # fmt: skip
    assert done[-1][1].startswith("def read(self, ")


@pytest.mark.slow
def test_the_first_run(world: Path) -> None:
    done = run_document("docs/first_run.md", world)
    faults, report, overflow, replay = done[-4:]
    assert "embedding: output has" in replay[1] + replay[2]
    assert overflow[0][1] == "configs/tiny_gqa.yaml" and (world / "runs/overflow/dumps/step_00000001").is_dir()
    assert "runs/faults" in report[0] and (world / "runs/faults/metrics.jsonl").is_file(), faults


@pytest.mark.slow
def test_the_job_for_a_longer_context(world: Path) -> None:
    done = run_document("docs/long_context.md", world)
    merged = read_yaml(world / "runs/long/run/config.yaml")["model"]
    assert (merged["d_model"], merged["rope"]["trained_context"], merged["rope"]["context"]) == (64, 64, 2048)
    assert "from" not in merged and merged["rope"]["extension"] == "base"
    before, after = [d for d in done if "--by-position" in d[0] and "--set" not in d[0]][:2]
    assert "longer than the 64 tokens" in before[2] and "longer than" not in after[2]
    assert re.search(r"1024-2047 .*\d", before[1]) and re.search(r"1024-2047 .*\d", after[1])
    needles = next(out for command, out, _ in done if "--needle" in command)
    assert all(f" {length} " in needles.replace(",", "") for length in (256, 1024)), needles


@pytest.mark.slow
def test_the_other_documents(world: Path) -> None:
    """Those with blocks that run: an unknown one would be left out without a word."""
    with_blocks = {block.document.name for block in BLOCKS if block.reason is None}
    own = {"README.md", "README.zh.md", "first_run.md", "long_context.md"}
    assert with_blocks - own == {"config.md", "evaluation.md", "growth.md", "recipes.md", "scale.md"}
    (world / "bundles").mkdir(exist_ok=True)
    run_forked([["tools/export_model.py", "runs/demo/run", "--out", "bundles/4k"]], cwd=world,
               env=os.environ | FIXED | {"PYTHONPATH": str(ROOT)})  # fmt: skip
    shutil.copytree(world / "bundles/4k", world / "bundles/32k")
    (world / "data").mkdir(exist_ok=True)
    for name in ("web", "32k"):
        if (world / "data" / name).exists():  # that of the first run, with another tokenizer
            (world / "data" / name).rename(world / "data" / f"{name}_before")
        (world / "data" / name).symlink_to(world / "runs/demo/data")
    for name in sorted(with_blocks - own):
        run_document(f"docs/{name}", world)
