"""Tests for a Python that has lm_eval; test_harness.py runs them.

Bundles in lm_eval: against a computation by hand and its own model of transformers, and what is refused.
"""

import json
import math
import os
import re
import runpy
import subprocess
import sys
from operator import eq
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from megakexue.bundle.bundle import Bundle, write_bundle
from megakexue.bundle.evaluate import CHUNK
from megakexue.bundle.generate import load_decoder
from megakexue.bundle.hf_export import export_hf
from megakexue.config import UserError
from megakexue.core.axes import parameter_names
from megakexue.core.decoder import Decoder
from megakexue.text.tokenizer import Tokenizer
from tests.bundle.exporting import PLAIN, random_bundle
from tests.conftest import Prepared, stdlib_files
from tests.helpers import ROOT

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what lm_eval imports

MODELS: dict[str, dict[str, Any]] = {
    "llama": PLAIN | dict(embed_scale=3.3, logit_scale=4.0),
    "deepnorm_log_n": dict(logit_scale=4.0),
}
"""A plain class of transformers, and one that brings its modelling file; for a context of 64 tokens."""
CONTEXT = 64


class Texts(NamedTuple):
    documents: list[str]
    endings: list[tuple[str, list[str]]]
    beginnings: list[str]


def make_texts() -> Texts:
    """Real text, of any length: one document of one letter, several of more than one window."""
    lines = [line for path in stdlib_files(5) for line in path.read_text("utf-8").splitlines() if len(line) > 30]
    documents = ["a", lines[0], "günstig 苏剑林 🙂\t" + lines[9]]
    documents += ["\n".join(lines[at : at + 5]) for at in range(0, 20, 5)]
    endings = [
        (line[:20].rstrip() if i % 3 else " ".join(lines[i : i + 9]), [line[20:], other[20:25], " x", " =="])
        for i, (line, other) in enumerate(zip(lines[:6], lines[10:]))
    ]
    return Texts(documents, endings, [line[:n] for n, line in zip((1, 25, 500), lines[20:])] + [lines[4] * 9])


TEXTS = make_texts()


@pytest.fixture(scope="module")
def bundles(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """Random weights that choose no bytes, whose texts transformers' decoder shows in another way if they are no UTF-8.

    It writes a U+FFFD for each byte of a row of them, ours only for those that cannot be read.
    """
    folder = tmp_path_factory.mktemp("harness")
    found = {}
    for name, changes in MODELS.items():
        bundle = random_bundle(prepared, folder / f"{name}_any", **changes)
        weights = {key: bundle.weight(key) for key in parameter_names(bundle.config)}
        tokenizer = bundle.load_tokenizer()
        is_byte = [i < 260 and len(tokenizer.piece(i)) == 1 for i in range(tokenizer.vocab_size)]
        weights["head.weight"][: len(is_byte)][torch.tensor(is_byte)] = 0
        found[name] = Bundle(
            write_bundle(folder / name, bundle.config, weights.items(), bundle.tokenizer, {"of": name})
        )
    return found


# ------------------------------------------------------------------------------------------------------------- by hand


class ByHand:
    """One text at a time, whole rows, no cache, float64 after the logits."""

    def __init__(self, bundle: Bundle, bos: bool = True) -> None:
        self.model: Decoder = load_decoder(bundle, torch.device("cpu"), backend="reference")
        self.tokenizer: Tokenizer = bundle.load_tokenizer()
        self.first = [self.tokenizer.bos_id] if bos else []

    @torch.no_grad()
    def logits(self, ids: list[int]) -> Tensor:
        return self.model(torch.tensor([ids]), torch.arange(len(ids))[None])[0].double()

    def score(self, ids: list[int], n: int) -> tuple[float, bool]:
        """Of the last `n` tokens, with at most a context of tokens before the last one."""
        seen = ids[-(CONTEXT + 1) :]
        logits = self.logits(seen[:-1])[-n:]
        found = [float(torch.log_softmax(row, 0)[token]) for row, token in zip(logits, ids[-n:])]
        return math.fsum(found), logits.argmax(-1).tolist() == ids[-n:]

    def ending(self, context: str, ending: str) -> tuple[float, bool]:
        before = [*self.first, *self.tokenizer.encode(context)] if context else [self.tokenizer.bos_id]
        whole = (
            self.first + self.tokenizer.encode(context + ending) if context else before + self.tokenizer.encode(ending)
        )
        return self.score(whole, len(whole) - len(before))

    def document(self, text: str) -> float:
        ids = [self.tokenizer.bos_id, *self.tokenizer.encode(text)]
        parts = range(1, len(ids), CONTEXT)
        return math.fsum(self.score(ids[: at + CONTEXT], len(ids[at : at + CONTEXT]))[0] for at in parts)

    def line(self, text: str, stop: str, n_new: int) -> str:
        ids, n_first = [*self.first, *self.tokenizer.encode(text)][-(CONTEXT - n_new) :], 0
        n_first = len(ids)
        for _ in range(n_new):
            token = int(self.logits(ids)[-1, : self.tokenizer.vocab_size].argmax())
            ids.append(token)
            if token == self.tokenizer.eos_id or stop in self.tokenizer.decode(ids[n_first:]):
                break
        return self.tokenizer.decode(ids[n_first:]).split(stop)[0]


STOP, N_NEW = "e", 12


class Expected(NamedTuple):
    documents: list[float]
    endings: list[list[tuple[float, bool]]]
    lines: list[str]


def expected(bundle: Bundle, bos: bool = True) -> Expected:
    hand = ByHand(bundle, bos)
    return Expected(
        [hand.document(text) for text in TEXTS.documents],
        [[hand.ending(context, ending) for ending in endings] for context, endings in TEXTS.endings],
        [hand.line(text, STOP, N_NEW) for text in TEXTS.beginnings],
    )


# --------------------------------------------------------------------------------------------------- three local tasks


def write_tasks(folder: Path, answers: list[str]) -> Path:
    """The shipped tasks with our own data."""
    lines = [{"text": text, "answer": answer} for text, answer in zip(TEXTS.beginnings, answers)]
    data: dict[str, tuple[str, list[Any], str]] = {
        "own_documents": ("example_documents", [{"text": text} for text in TEXTS.documents], ""),
        "own_endings": (
            "example_endings",
            [{"beginning": a, "endings": b, "answer": i % 4} for i, (a, b) in enumerate(TEXTS.endings)],
            "",
        ),
        "own_lines": (
            "example_sums", lines,
            f'doc_to_text: "{{{{text}}}}"\ngeneration_kwargs: {{until: ["{STOP}"], max_gen_toks: {N_NEW}}}\n'
            "filter_list: null\n",
        ),
    }  # fmt: skip
    folder.mkdir()
    for name, (shipped, documents, more) in data.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(document) + "\n" for document in documents))
        (folder / f"{name}.yaml").write_text(
            f"include: {ROOT}/configs/tasks/{shipped}.yaml\ntask: {name}\n"
            f"dataset_kwargs: {{data_files: {{test: {path}}}}}\n{more}"
        )
    return folder


def metrics(expected: Expected, answers: list[str]) -> dict[str, dict[str, float]]:
    """What the harness makes of the numbers."""
    n_bytes = sum(len(text.encode()) for text in TEXTS.documents)
    scores = [[score for score, _ in document] for document in expected.endings]
    lengths = [[len(ending) for ending in endings] for _, endings in TEXTS.endings]
    normed = [[score / n for score, n in zip(*rows)] for rows in zip(scores, lengths)]

    def accuracy(rows: list[list[float]]) -> float:
        return sum(row.index(max(row)) == i % 4 for i, row in enumerate(rows)) / len(rows)

    return {
        "own_documents": {"bits_per_byte,none": -math.fsum(expected.documents) / math.log(2) / n_bytes},
        "own_endings": {"acc,none": accuracy(scores), "acc_norm,none": accuracy(normed)},
        "own_lines": {"exact_match,none": sum(map(eq, expected.lines, answers)) / len(answers)},
    }


@pytest.mark.slow
def test_a_bundle_its_export_and_a_computation_by_hand_have_the_same_numbers(
    bundles: dict[str, Bundle], tmp_path: Path
) -> None:
    by_hand = {name: (expected(bundle), expected(bundle, bos=False)) for name, bundle in bundles.items()}
    (tmp_path / "out").mkdir()
    models = {}
    for name, bundle in bundles.items():
        export_hf(bundle, tmp_path / name, dtype="fp32", check=False)
        models[name] = (str(bundle.folder), str(tmp_path / name))
    # those of the first model, where every second one is right
    answers = [line + "?" * (i % 2) for i, line in enumerate(by_hand["llama"][0].lines)]
    tasks = write_tasks(tmp_path / "tasks", answers)
    given = {
        "models": models, "tasks": str(tasks), "out": str(tmp_path / "out"), "tool": str(ROOT / "tools/evaluate.py"),
    }  # fmt: skip
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("run_harness.py")), json.dumps(given)],
        capture_output=True, text=True, env=environment, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for name, (with_bos, without) in by_hand.items():
        of = found[name]
        for own, sides in ((with_bos, ("ours", "theirs")), (without, ("ours without BOS", "theirs without BOS"))):
            for side in sides:
                for responses, scores in zip(of[side]["own_endings"]["responses"], own.endings, strict=True):
                    got = [(float(response[0][0]), response[0][1] == "True") for response in responses]
                    assert [x for x, _ in got] == pytest.approx([x for x, _ in scores], rel=1e-5, abs=1e-5)
                    assert [x for _, x in got] == [x for _, x in scores]
                assert [response[0][0] for response in of[side]["own_lines"]["responses"]] == own.lines, (name, side)
        for side in ("ours", "ours without BOS", "theirs without BOS"):
            totals = [float(response[0][0]) for response in of[side]["own_documents"]["responses"]]
            assert totals == pytest.approx(with_bos.documents, rel=1e-5), (name, side)
        # with its defaults `hf` puts two BOS before a document, and scores the second one
        totals = [float(response[0][0]) for response in of["theirs"]["own_documents"]["responses"]]
        assert all(abs(total - own) > 0.1 for total, own in zip(totals, with_bos.documents))
    written, numbers = found["tool"], [metrics(own, answers) for own, _ in by_hand.values()]
    assert [(one["bundle"], one["context"]) for one in written] == [(bundle, CONTEXT) for bundle, _ in models.values()]
    assert numbers[0] != numbers[1] and 0 < numbers[0]["own_lines"]["exact_match,none"] < 1, "or this shows nothing"
    ours = [{task: of["metrics"] for task, of in found[name]["ours"].items()} for name in by_hand]
    for results in ([one["results"] for one in written], ours, [found["program"]["results"]]):
        for got, by_task in zip(results, numbers):
            for task, values in got.items():
                assert {key: values[key] for key in by_task[task]} == pytest.approx(by_task[task], rel=1e-5)
    value = f"{numbers[0]['own_documents']['bits_per_byte,none']:.4f}"
    row = rf"^\|own_documents *\| *1\|none *\| *0\|bits_per_byte\|↓ *\|{value}\|"
    assert re.search(row, done.stderr, re.MULTILINE), done.stderr


# ------------------------------------------------------------------------------------------------------ in one process


def requests(kind: str) -> list[Any]:
    """As the harness gives them to a model."""
    from lm_eval.api.instance import Instance

    options = {"until": [STOP], "max_gen_toks": N_NEW}
    arguments: dict[str, list[tuple[Any, ...]]] = {
        "loglikelihood": [(context, ending) for context, endings in TEXTS.endings for ending in endings],
        "loglikelihood_rolling": [(text,) for text in TEXTS.documents],
        "generate_until": [(text, options) for text in TEXTS.beginnings],
    }
    return [Instance(kind, {}, values, i) for i, values in enumerate(arguments[kind])]  # type: ignore[arg-type]


def open_lm(bundle: Bundle, **options: Any) -> Any:
    from megakexue.bundle.harness import BundleLM

    return BundleLM(bundle, device="cpu", **options)


def test_neither_the_batch_nor_the_order_changes_a_number(bundles: dict[str, Bundle]) -> None:
    alone, together = (open_lm(bundles["deepnorm_log_n"], batch_tokens=n) for n in (1, 10**6))
    for kind in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        given = requests(kind)
        one, all_of_them, backwards = (
            getattr(lm, kind)(order) for lm, order in ((alone, given), (together, given), (together, given[::-1]))
        )
        for other in (all_of_them, backwards[::-1]):
            if kind == "generate_until":
                assert other == one
                continue
            for a, b in zip(one, other, strict=True):
                assert b == pytest.approx(a, rel=1e-5)


def test_only_the_logits_of_a_chunk_exist_at_a_time(bundles: dict[str, Bundle]) -> None:
    lm, sizes = open_lm(bundles["llama"], batch_tokens=10**6), list[int]()
    lm.model.head.register_forward_hook(lambda _, arguments, logits: sizes.append(len(logits)))
    lm.loglikelihood_rolling(requests("loglikelihood_rolling") * 3)
    assert len(sizes) > 2 and {CHUNK} == set(sizes[:-1])


def test_rows_that_differ_in_their_last_token_are_computed_once(bundles: dict[str, Bundle]) -> None:
    lm, seen = open_lm(bundles["llama"]), list[int]()
    lm.model.embedding.register_forward_hook(lambda _, arguments, rows: seen.append(len(rows)))
    rows = [(None, [1, 300, 310], [target]) for target in (320, 330, 340, 320)] + [(None, [1], [300, 310, 320])]
    scores = lm._loglikelihood_tokens(rows, disable_tqdm=True)
    assert seen == [1] and scores[0] == scores[3] and len({score for score, _ in scores}) == 4
    own = [ByHand(bundles["llama"]).score([*row[1], *row[2]], len(row[2])) for row in rows]
    assert [score for score, _ in scores] == pytest.approx([score for score, _ in own], rel=1e-5)


class Stopped(Exception):
    """Stands for a signal."""


@pytest.mark.parametrize("kind", ["loglikelihood", "loglikelihood_rolling", "generate_until"])
def test_what_is_in_the_cache_is_not_computed_again(
    bundles: dict[str, Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    from lm_eval.api.model import CachingLM

    class Counting(Decoder):
        """Counts tokens, and stops in the middle where it is told to."""

        n_tokens, limit = 0, 10**9

        def hidden(self, tokens: Tensor, *rest: Any, **options: Any) -> Tensor:
            if Counting.n_tokens > Counting.limit:
                raise Stopped
            Counting.n_tokens += tokens.numel()
            return super().hidden(tokens, *rest, **options)

    def compute() -> list[Any]:
        lm = open_lm(bundles["llama"], batch_tokens=70)
        lm.model.__class__ = Counting
        Counting.n_tokens = 0
        cached = CachingLM(lm, str(tmp_path / "cache.db"))
        try:
            return getattr(cached, kind)(requests(kind))
        finally:
            cached.dbdict.close()

    straight = getattr(open_lm(bundles["llama"], batch_tokens=70), kind)(requests(kind))
    monkeypatch.setattr(Counting, "limit", 10**9)
    assert compute() == straight
    n_all = Counting.n_tokens
    assert compute() == straight and Counting.n_tokens == 0
    (tmp_path / "cache.db").unlink()
    monkeypatch.setattr(Counting, "limit", n_all // 2)
    with pytest.raises(Stopped):
        compute()
    n_first = Counting.n_tokens
    monkeypatch.setattr(Counting, "limit", 10**9)
    assert compute() == straight
    # of a text in several windows all are computed again, and so is a batch that was not whole
    assert 0 < Counting.n_tokens < n_all and Counting.n_tokens <= n_all - n_first + 4 * CONTEXT
    message = "has results of another model or of other settings: name another file"
    for other in (open_lm(bundles["deepnorm_log_n"]), open_lm(bundles["llama"], max_length=32)):
        with pytest.raises(UserError, match=message):
            CachingLM(other, str(tmp_path / "cache.db"))


def test_a_tokenizer_json(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    export_hf(bundles["llama"], tmp_path / "export", check=False)
    (tmp_path / "export" / "tokenizer.model").unlink()
    weights = {name: bundles["llama"].weight(name) for name in parameter_names(bundles["llama"].config)}
    tokenizer = tmp_path / "export" / "tokenizer.json"
    other = Bundle(write_bundle(tmp_path / "bundle", bundles["llama"].config, weights.items(), tokenizer, {"of": "it"}))
    assert type(other.load_tokenizer()).__name__ == "TokenizerJson"
    for kind in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        found, own = (getattr(open_lm(bundle), kind)(requests(kind)) for bundle in (other, bundles["llama"]))
        assert found == own


def test_mistakes(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    from lm_eval.api.instance import Instance

    bundle = bundles["llama"]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"bundle": str(tmp_path)}, f"{tmp_path} is no bundle: make one with tools/export_model.py"),
        ({"dtype": "float32"}, "dtype=float32 must be one of fp32, bf16, fp16"),
        ({"batch_size": 8}, "batch_size=8: batches are counted in tokens, so set batch_tokens=N of --model_args"),
        ({"max_length": 0}, "max_length=0 must be a positive whole number"),
        ({"bundle": None}, "--model_args lacks the bundle: write bundle=PATH"),
        ({"add_bos": True}, "--model_args: add_bos is no argument of ours: drop it"),
        ({"batch_tokens": 0}, "batch_tokens=0 must be a positive whole number"),
    ]
    for options, message in cases:
        with pytest.raises(UserError, match=re.escape(message)):
            open_lm(**{"bundle": bundle} | options)
    lm = open_lm(bundle)
    asked: list[tuple[str, tuple[Any, ...], str]] = [
        ("loglikelihood", ("a", " b" * 500), "tokens, and the model sees 64: leave the task out"),
        ("loglikelihood", ("a", ""), "a task has a continuation without tokens: look at its doc_to_target and doc_to_"),
        ("generate_until", ("a", {}), "a task generates 256 tokens, and the model sees 64 in all: lower max_gen_toks"),
        (
            "generate_until", ("a", {"max_gen_toks": 8, "top_k": 4}),
            "a task sets top_k in its generation_kwargs, which our generation lacks",
        ),
    ]  # fmt: skip
    for kind, arguments, message in asked:
        with pytest.raises(UserError, match=re.escape(message)):
            getattr(lm, kind)([Instance(kind, {}, arguments, 0)])  # type: ignore[arg-type]


def test_sampling_depends_on_the_request_alone(bundles: dict[str, Bundle]) -> None:
    from lm_eval.api.instance import Instance

    options = {"until": [], "max_gen_toks": 10, "do_sample": True, "temperature": 1.0}
    prompts = ["import ", "def ", "import ", "import "]
    given = [Instance("generate_until", {}, (prompt, options), 0) for prompt in prompts]
    texts = open_lm(bundles["llama"]).generate_until(given)
    assert len({texts[i] for i in (0, 2, 3)}) > 1
    assert open_lm(bundles["llama"], batch_tokens=1).generate_until(given) == texts
    assert open_lm(bundles["llama"]).generate_until([given[i] for i in (0, 2, 3)]) == [texts[i] for i in (0, 2, 3)]


def run_program(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit code of tools/evaluate.py."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "tools" / "evaluate.py"), run_name="__main__")
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_mistakes_of_the_program(
    bundles: dict[str, Bundle], prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from lm_eval.tasks import manager

    monkeypatch.setattr(manager, "__file__", str(tmp_path / "manager.py"))  # none of its own tasks: they take long
    folder = bundles["llama"].folder
    (tmp_path / "broken.yaml").write_text(
        f"include: {ROOT}/configs/tasks/example_sums.yaml\ntask: broken\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path}/no.jsonl}}}}\n"
    )
    mine = ["--include", tmp_path]
    cases: list[tuple[list[object], str]] = [
        ([folder, "--tasks", "example_sum"], f"--tasks example_sum: there is no such task in lm_eval, {ROOT}/configs/"),
        ([folder, "--tasks", "example_sum"], "did you mean example_sums or "),
        (
            [folder, "--tasks", "broken", *mine],
            f"the data of broken cannot be loaded: Unable to find '{tmp_path}/no.js",
        ),
        ([folder, "--tasks", "x", "--include", tmp_path / "no"], f"--include {tmp_path}/no: no such folder"),
        ([folder, "--tasks", "x", "--limit", 0], "--limit 0 must be positive"),
        ([folder, "--tasks", "x", "--num-fewshot", -1], "--num-fewshot -1 must not be negative"),
        ([folder, "--tasks", "x", "--split", "valid"], "--split has an effect only without --tasks: drop it"),
        ([folder, prepared.data, "--tasks", "x"], f"{prepared.data} is no bundle: make one with tools/export_model.py"),
        ([folder, prepared.data, "--limit", 3], "--limit has an effect only with --tasks: drop it"),
        ([folder, "--tasks", "example_sums", "--cache", ROOT / "README.md"], "the tasks cannot be run: "),
        ([folder, prepared.data, "--tasks", ","], "argument --tasks: name a task at least"),
        ([folder], f"{folder}: name a bundle and then prepared data, or a bundle and --tasks"),
    ]
    for arguments, message in cases:
        assert run_program(monkeypatch, "--device", "cpu", *arguments) == 2
        assert message in capsys.readouterr().err


def test_without_the_harness_its_package_is_named(
    bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.delitem(sys.modules, "megakexue.bundle.harness", raising=False)
    message = "error: lm-evaluation-harness is not installed: pip install 'megakexue[lm-eval]'\n"
    assert run_program(monkeypatch, bundles["llama"].folder, "--tasks", "x") == 2
    assert capsys.readouterr().err == message
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module("megakexue.bundle.harness", run_name="__main__")
    assert capsys.readouterr().err == message
