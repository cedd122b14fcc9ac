"""Generation: the cache changes nothing, draws follow the softmax, characters come whole, the program end to end."""

import io
import itertools
import math
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megakexue.bundle.bundle import Bundle, write_bundle
from megakexue.bundle.evaluate import loss_by_position
from megakexue.bundle.generate import CANDIDATES, PREFILL, complete, generate, load_decoder, next_tokens
from megakexue.config import MlaConfig, ModelConfig, ResolvedModel, RopeConfig, UserError
from megakexue.core.axes import parameter_names, shape
from megakexue.core.batch import make_batch
from megakexue.core.decoder import Cache, Decoder, initial_weight
from megakexue.core.resolve import resolve
from megakexue.text.tokenizer import SentencePiece, Tokenizer
from tests.conftest import Popen, Prepared
from tests.helpers import ROOT
from tests.programs import run_without_torch
from tests.ranks import run_on_ranks

CPU = torch.device("cpu")
N_PIECES, VOCAB_SIZE = 512, 528
NEVER = None  # generation that stops at nothing


def make_config(**changes: Any) -> ResolvedModel:
    sizes = {"vocab_size": VOCAB_SIZE, "d_model": 32, "n_layers": 2, "n_heads": 4, "d_ff": 48}
    if "mla" not in changes:
        sizes["n_kv_heads"] = 2
    return resolve(ModelConfig(**(sizes | changes), rope=RopeConfig(base=1e4)), "adamw", 64)


@pytest.fixture(scope="module")
def bundle(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Random weights with clear preferences, most of all for ids that the tokenizer does not have."""
    config = make_config()
    weights = {name: initial_weight(name, config, seed=0) for name in parameter_names(config)}
    weights["head.weight"] *= 8
    weights["head.weight"][N_PIECES:] *= 4
    out = tmp_path_factory.mktemp("generate") / "bundle"
    return Bundle(write_bundle(out, config, weights.items(), prepared.tokenizer, {"from": "a test"}))


@pytest.fixture(scope="module")
def model(bundle: Bundle) -> Decoder:
    return load_decoder(bundle, CPU)


@pytest.fixture(scope="module")
def tokenizer(bundle: Bundle) -> Tokenizer:
    return bundle.load_tokenizer()


def continuation(model: Decoder, prompt: list[int], **options: Any) -> list[int]:
    """The tokens of one prompt, until it ends."""
    return [token for (token,) in generate(model, [prompt], **options) if token is not None]


def texts_of(model: Decoder, tokenizer: Tokenizer, text: str | bytes, **options: Any) -> list[str]:
    return [piece for (piece,) in complete(model, tokenizer, [text], **options) if piece is not None]


@torch.no_grad()
def all_logits(model: Decoder, tokens: list[int]) -> Tensor:
    """[t, v], of the whole text at once."""
    return model(torch.tensor([tokens]), torch.arange(len(tokens))[None])[0]


def greedy_without_cache(model: Decoder, prompt: list[int], n: int, stop_id: int | None, vocab_size: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(n):
        token = int(all_logits(model, tokens)[-1, :vocab_size].argmax())
        if token == stop_id:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


@pytest.mark.parametrize("text", ["", "def f(x):\n    return", "import os\n" * 200])
def test_greedy_is_the_best_token_of_the_whole_text(
    bundle: Bundle, model: Decoder, tokenizer: Tokenizer, text: str
) -> None:
    prompt = [tokenizer.bos_id, *tokenizer.encode(text)]
    assert len(prompt) > PREFILL or len(text) < 100  # the long one goes through the model in parts
    plain = load_decoder(bundle, CPU)
    plain.backend = "blocked"  # what training uses on CPU
    expected = greedy_without_cache(plain, prompt, 20, NEVER, N_PIECES)
    got = continuation(model, prompt, n_tokens=20, stop_id=NEVER, vocab_size=N_PIECES, temperature=0.0)
    assert got == expected and len(got) == 20 and len(set(got)) > 5


MLA = MlaConfig(d_latent=16, d_query_latent=20, d_nope=8, d_rope=8, d_value=12)


@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 1}, {"mla": MLA}], ids=str)
def test_a_row_in_a_batch_is_the_row_alone(changes: dict[str, Any]) -> None:
    config = make_config(**changes)
    model = Decoder(config, "reference")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_weight(name, config, seed=3) * (8 if name == "head.weight" else 1))
    generator = torch.Generator().manual_seed(0)
    # one is longer than a part of the prefill, and another ends in the same part as it begins
    prompts = [torch.randint(1, 500, (n,), generator=generator).tolist() for n in (1, PREFILL + 30, 7, PREFILL)]
    caches = [Cache() for _ in model.blocks]
    options: dict[str, Any] = {"n_tokens": 16, "temperature": 0.7}
    alone = [continuation(model, prompt, **options, stop_id=NEVER, seed=5 + i) for i, prompt in enumerate(prompts)]
    rows = list(generate(model, prompts, **options, stop_id=NEVER, seed=5, caches=caches))
    assert [list(row) for row in zip(*rows)] == alone and len(rows) == 16
    # a row that ends leaves the others as they are
    stop = alone[2][10]
    ended = list(zip(*generate(model, prompts, **options, stop_id=stop, seed=5)))
    for row, whole in zip(ended, alone):
        n = whole.index(stop) if stop in whole else 16
        assert list(row) == whole[:n] + [None] * (len(row) - n)
    assert ended[2][10] is None


def use_compiled() -> list[tuple[list[list[int | None]], list[float], int]]:
    """Of an eager and a compiled model: what it generates, its losses on rows of two shapes, and the graphs made.

    Graphs are run as they are: the machine code of a shape would take ten seconds.
    """
    config, rng, done = make_config(), np.random.default_rng(0), []
    rows = [rng.integers(4, N_PIECES, (n_rows, 21)) for n_rows in (3, 2)]
    for is_compiled in (False, True):
        model = Decoder(config, "blocked")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(initial_weight(name, config, seed=3) * (8 if name == "head.weight" else 1))
        if is_compiled:
            with mock.patch.object(torch, "compile", partial(torch.compile, backend="eager")):
                model.compile_parts()
        batches = [make_batch(some, [], bos_id=1, pad_id=3) for some in rows]
        losses = [loss_by_position(model, [batch], [0, 20])[0].loss_sum for batch in batches * 2]
        texts = list(generate(model, [[1, 7, 9], [1]], n_tokens=12, stop_id=NEVER, seed=1))
        done.append((texts, losses, torch._dynamo.utils.counters["stats"]["unique_graphs"]))
    return done


def test_a_compiled_model_generates_and_is_evaluated() -> None:
    (((texts, losses, _), (own_texts, own_losses, n_graphs)),) = run_on_ranks(1, use_compiled)
    assert own_texts == texts and len(texts) == 12
    assert own_losses == pytest.approx(losses, rel=1e-6)
    assert n_graphs == 4  # two a shape; none for the cache, which grows with each token


def test_ids_that_the_tokenizer_lacks_are_never_chosen(model: Decoder, tokenizer: Tokenizer) -> None:
    prompt = [tokenizer.bos_id, *tokenizer.encode("class A:")]
    options: dict[str, Any] = {"n_tokens": 20, "stop_id": NEVER}
    for temperature in (0.0, 1.0, 5.0):
        free = continuation(model, prompt, **options, temperature=temperature, top_p=1.0)
        assert max(free) >= N_PIECES  # they would be
        known = continuation(model, prompt, **options, temperature=temperature, top_p=1.0, vocab_size=N_PIECES)
        assert max(known) < N_PIECES
    assert len(texts_of(model, tokenizer, "class A:", n_tokens=20, stop_id=NEVER, temperature=5.0)) == 20


def test_the_seed_decides_the_text(model: Decoder, tokenizer: Tokenizer) -> None:
    def text(**options: Any) -> str:
        return "".join(texts_of(model, tokenizer, "for", n_tokens=15, stop_id=NEVER, **options))

    texts = [text(seed=seed) for seed in range(5)]
    torch.manual_seed(99)  # the global generator has no part in it
    assert [text(seed=seed) for seed in range(5)] == texts
    assert len(set(texts)) == 5


def test_narrow_settings_are_greedy(model: Decoder, tokenizer: Tokenizer) -> None:
    def tokens(**options: Any) -> list[int]:
        return continuation(model, [tokenizer.bos_id], n_tokens=15, stop_id=NEVER, vocab_size=N_PIECES, **options)

    greedy = tokens(temperature=0.0)
    for options in ({"top_p": 1e-9, "temperature": 2.0}, {"temperature": 1e-300}, {"temperature": 1e-4, "top_p": 1.0}):
        assert tokens(**options) == greedy
    assert tokens(temperature=2.0, top_p=0.999) != greedy


def chi_square(counts: list[int], probabilities: list[float]) -> float:
    n = sum(counts)
    return sum((count - n * p) ** 2 / (n * p) for count, p in zip(counts, probabilities, strict=True))


LOGITS = [1.0, -0.5, 2.0, 0.3, -3.0, 1.5]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.6])
def test_draws_follow_the_softmax_of_the_most_probable(temperature: float, top_p: float) -> None:
    powers = [math.exp(x / temperature) for x in LOGITS]
    probabilities = {i: power / sum(powers) for i, power in enumerate(powers)}
    kept: dict[int, float] = {}
    for i in sorted(probabilities, key=lambda i: -probabilities[i]):
        if sum(kept.values()) < top_p:
            kept[i] = probabilities[i]
    generators, logits = [torch.Generator().manual_seed(i) for i in range(50)], torch.tensor(LOGITS).expand(50, -1)
    draws: list[int] = []
    for _ in range(40):
        draws += next_tokens(logits, temperature=temperature, top_p=top_p, generators=generators)
    assert set(draws) <= kept.keys()
    # 20.5 is exceeded once in a thousand times with the 5 degrees of freedom of the widest set
    assert chi_square([draws.count(i) for i in kept], [p / sum(kept.values()) for p in kept.values()]) < 20.5


def test_first_tokens_of_many_seeds_follow_the_softmax() -> None:
    config = make_config(vocab_size=8, d_model=16, n_layers=1)
    model = Decoder(config, "reference")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_weight(name, config, seed=3) * (3 if name == "head.weight" else 1))
    prompt = [1, 5, 2]
    options: dict[str, Any] = {"n_tokens": 1, "stop_id": NEVER, "temperature": 0.9, "top_p": 1.0}
    draws = [continuation(model, prompt, **options, seed=seed)[0] for seed in range(250)]
    # a batch draws what its rows would draw alone
    draws += [token for token in next(generate(model, [prompt] * 250, **options, seed=250)) if token is not None]
    probabilities = (all_logits(model, prompt)[-1].double() / 0.9).softmax(-1).tolist()
    assert max(probabilities) > 0.25 and min(probabilities) > 0.01
    # 24.3: once in a thousand times with 7 degrees of freedom
    assert chi_square([draws.count(i) for i in range(8)], probabilities) < 24.3


@settings(deadline=None)  # the machine may be busy
@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=30),
    st.floats(0, 1e6),
    st.floats(1e-6, 1),
    st.integers(0, 2**62),
)
def test_a_token_is_always_among_the_most_probable(
    logits: list[float], temperature: float, top_p: float, seed: int
) -> None:
    generators = [torch.Generator().manual_seed(seed)]
    (token,) = next_tokens(torch.tensor([logits]), temperature=temperature, top_p=top_p, generators=generators)
    if temperature == 0:
        assert logits[token] == max(logits)
    else:
        powers = [math.exp((x - max(logits)) / temperature) for x in logits]
        # a part in 1e9: two ways to compute a power may differ in the last bit
        before = sum(power for power in powers if power > powers[token] * (1 + 1e-9)) / sum(powers)
        assert before < top_p + 1e-9 and powers[token] > 0


@given(st.integers(0, 2**62), st.sampled_from([0.05, 1.0, 30.0, 1e4]), st.sampled_from([0.3, 0.95, 1.0]))
@settings(deadline=None, max_examples=40)
def test_a_row_is_drawn_as_alone_and_candidates_only_save_time(seed: int, temperature: float, top_p: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    n_tokens = CANDIDATES + 200
    wide = torch.randn(6, n_tokens, generator=generator) * 20
    wide[1] = 0.0  # all equal
    wide[2] = wide[2].round()  # many equal
    wide[3, CANDIDATES - 5 :] = wide[3].min()  # equal where the candidates end
    wide[4] /= 100
    seeds = range(6)

    def drawn(rows: Tensor, of: Iterable[int]) -> list[int]:
        generators = [torch.Generator().manual_seed(i) for i in of]
        return next_tokens(rows, temperature=temperature, top_p=top_p, generators=generators)

    together = drawn(wide, seeds)
    assert together == [drawn(wide[[i]], [i])[0] for i in seeds]
    # against the definition, with all tokens sorted
    for row, i, token in zip(wide.double(), seeds, together):
        p = ((row - row.max()) / temperature).softmax(-1)
        order = (-p).argsort(stable=True)
        sums = list(itertools.accumulate(p[order].tolist()))
        mass = next((total for total in sums if total >= top_p), sums[-1])
        u = torch.rand(1, dtype=torch.float64, generator=torch.Generator().manual_seed(i)).item()
        assert token == order[next(n for n, total in enumerate(sums) if total > u * mass)]


def test_the_end_of_the_document_ends_the_text(bundle: Bundle, tokenizer: Tokenizer) -> None:
    model = load_decoder(bundle, CPU)
    prompt = [tokenizer.bos_id, *tokenizer.encode("def")]
    free = greedy_without_cache(model, prompt, 20, NEVER, N_PIECES)
    last = max(free, key=free.index)  # the token that is chosen latest for the first time
    with torch.no_grad():  # where the model would choose it, the model now chooses the end
        model.head.weight[tokenizer.eos_id] = 1.001 * model.head.weight[last]
    expected = greedy_without_cache(model, prompt, 20, tokenizer.eos_id, N_PIECES)
    assert expected == free[: free.index(last)] and len(expected) >= 3
    pieces = texts_of(model, tokenizer, "def", n_tokens=20, temperature=0.0)
    assert "".join(pieces) == tokenizer.decode(expected) and len(pieces) == len(expected)
    assert texts_of(model, tokenizer, "def", n_tokens=3, temperature=0.0, stop_id=NEVER) == [
        tokenizer.decode([token]) for token in free[:3]
    ]


def chain_weights(config: ResolvedModel, tokens: list[int]) -> dict[str, Tensor]:
    """Weights of a model that follows each of these different tokens by the next, whatever came before."""
    assert len(set(tokens)) == len(tokens) <= config.d_model + 1
    weights = {name: torch.zeros(shape(name, config)) for name in parameter_names(config)}
    for i, (token, following) in enumerate(itertools.pairwise(tokens)):
        weights["embedding.weight"][token, i] = 1.0
        weights["head.weight"][following, i] = 100.0
    for name in weights:
        if name.endswith("gain"):
            weights[name].fill_(1.0)
    return weights


def write_chain(out: Path, prepared: Prepared, tokens: list[int]) -> Bundle:
    config = make_config(residual="prenorm")
    lineage = {"from": "a test"}
    return Bundle(write_bundle(out, config, chain_weights(config, tokens).items(), prepared.tokenizer, lineage))


def test_characters_of_several_tokens_come_whole(prepared: Prepared, tmp_path: Path) -> None:
    tokenizer = SentencePiece(prepared.tokenizer)
    bytes_of = {text: tokenizer.encode(text) for text in ("你", "🙂")}
    assert [len(ids) for ids in bytes_of.values()] == [3, 4]  # the vocabulary has no piece for them
    (plain,) = tokenizer.encode("x")

    def pieces(name: str, tokens: list[int], **options: Any) -> list[str]:
        chain = [tokenizer.bos_id, *tokens, tokenizer.eos_id]
        model = load_decoder(write_chain(tmp_path / name, prepared, chain), CPU)
        return texts_of(model, tokenizer, "", **({"n_tokens": 50} | options))

    text = [*bytes_of["你"], plain, *bytes_of["🙂"]]
    assert pieces("whole", text) == ["", "", "你", "x", "", "", "", "🙂"]
    assert pieces("cut", text, n_tokens=6) == ["", "", "你", "x", "", ""]
    assert pieces("broken", [*bytes_of["你"][:2], plain]) == ["", "", "\ufffdx"]
    assert pieces("silent", [tokenizer.pad_id, plain]) == ["", "x"]


def test_a_prompt_may_be_any_bytes(model: Decoder, tokenizer: Tokenizer) -> None:
    for prompt in ("", "\ufeff\0 ▁<s></s>", "从前有座山🙂", b"\xff\xfe\x00half \xe4\xbd", "\udc80"):
        assert len(texts_of(model, tokenizer, prompt, n_tokens=3, stop_id=NEVER)) == 3


def test_what_generation_refuses(bundle: Bundle, model: Decoder, tokenizer: Tokenizer) -> None:
    for options, message in [
        ({"temperature": -0.1}, "temperature=-0.1 must be finite and not negative; 0 is greedy"),
        ({"temperature": math.nan}, "temperature=nan must be finite"),
        ({"temperature": math.inf}, "temperature=inf must be finite"),
        ({"top_p": 0.0}, r"top_p=0.0 must be in \(0, 1\]"),
        ({"top_p": 1.5}, r"top_p=1.5 must be in \(0, 1\]"),
    ]:
        with pytest.raises(UserError, match=message):
            next(generate(model, [[1]], n_tokens=1, stop_id=NEVER, **options))  # type: ignore[arg-type]
    overflowing = load_decoder(bundle, CPU, torch.float16)
    with torch.no_grad():
        overflowing.head.weight.fill_(60000.0)
    with pytest.raises(UserError, match="the model's logits are not finite: generate in fp32, and if"):
        texts_of(overflowing, tokenizer, "a", n_tokens=2, temperature=0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}])
def test_weights_come_in_the_dtype_asked_for(
    prepared: Prepared, tmp_path: Path, dtype: torch.dtype, changes: dict[str, Any]
) -> None:
    config = make_config(**changes)
    weights = {name: initial_weight(name, config, seed=1) for name in parameter_names(config)}
    bundle = Bundle(write_bundle(tmp_path / "bundle", config, weights.items(), prepared.tokenizer, {}))
    model = load_decoder(bundle, CPU, dtype)
    assert dict(model.named_parameters()).keys() == weights.keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name].to(dtype))
    # half precision moves logits of standard deviation 1/2 by little
    tokens = list(range(100, 140))
    difference = all_logits(model, tokens) - all_logits(load_decoder(bundle, CPU), tokens)
    assert 0 < difference.abs().max() < 0.05


# --- the program -----------------------------------------------------------------------------------------------------

ENVIRONMENT = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


PROGRAM = ROOT / "tools" / "generate.py"


def program(*arguments: str | bytes | Path, stdin: bytes = b"") -> tuple[int, bytes, str]:
    """Return code, stdout, and stderr of a process of its own."""
    done = subprocess.run([sys.executable, PROGRAM, *arguments], input=stdin, capture_output=True, env=ENVIRONMENT)
    return done.returncode, done.stdout, done.stderr.decode()


@pytest.fixture
def program_here(
    monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> Callable[..., tuple[int, bytes, str]]:
    """The same in the process of the tests, which has imported torch already."""

    def run(*arguments: str | bytes | Path, stdin: bytes = b"") -> tuple[int, bytes, str]:
        monkeypatch.setattr(sys, "argv", [str(PROGRAM), "--device", "cpu", *map(os.fsdecode, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        code = 0
        try:
            runpy.run_path(str(PROGRAM), run_name="__main__")
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capfdbinary.readouterr()
        return code, out, err.decode()

    return run


def test_mistakes_in_the_arguments_are_told_before_torch_is_imported(bundle: Bundle, tmp_path: Path) -> None:
    cases = [
        (["--temperature", "-1"], "--temperature -1.0 must not be negative"),
        (["--temperature", "nan"], "argument --temperature: nan must be a finite number, such as 0.1 or 1e-3"),
        (["--top-p", "0"], "--top-p 0.0 must be above 0 and at most 1"),
        (["--n-tokens", "0"], "--n-tokens 0 must be positive"),
        (["--n-samples", "0"], "--n-samples 0 must be between 1 and 65536"),
        (["--n-samples", "1e15"], "--n-samples 1000000000000000 must be between 1 and 65536"),
        (["--seed", "-1"], "--seed -1 must be between 0 and 2^62"),
        (["--greedy", "--seed", "0"], "--seed has no effect with --greedy: drop one of them"),
        (["--greedy", "--n-samples", "2"], "--n-samples has no effect with --greedy"),
        (["--greedy", "--top-p", "0.5"], "--top-p has no effect with --greedy"),
        (["--greedy", "--temperature", "1"], "--temperature has no effect with --greedy"),
        (["--prompt-file", str(tmp_path / "none")], f"cannot read --prompt-file {tmp_path}/none: No such file"),
        (["--prompt", "a", "--prompt-file", "b"], "not allowed with argument --prompt"),
        (["--dtype", "fp8"], "invalid choice: 'fp8'"),
        (["--n-tokens", "many"], "argument --n-tokens: many must be a whole number, such as 1000 or 1e3"),
    ]
    command_lines = [[str(bundle.folder), *arguments] for arguments, _ in cases]
    results = run_without_torch(PROGRAM, [*command_lines, [str(tmp_path / "none"), "--prompt", ""]])
    for (code, stdout, stderr), (_, message) in zip(results[:-1], cases, strict=True):
        assert (code, stdout) == (2, "") and message in stderr, stderr
    makers = "tools/export_model.py or tools/import_hf.py"
    assert results[-1] == (2, "", f"error: no bundle {tmp_path}/none: make one with {makers}\n")


@pytest.mark.slow
def test_the_program_shows_prompt_and_text(
    prepared: Prepared, tmp_path: Path, program_here: Callable[..., tuple[int, bytes, str]]
) -> None:
    tokenizer = SentencePiece(prepared.tokenizer)
    (last,) = tokenizer.encode("x")
    chain = write_chain(tmp_path / "chain", prepared, [last, *tokenizer.encode("你🙂"), tokenizer.eos_id])
    code, stdout, stderr = program_here(chain.folder, "--prompt", "山x", "--greedy", "--n-tokens", "20")
    assert code == 0 and stdout.decode() == "山x你🙂\n"
    # two layers, keys and values, two groups of 8 numbers of 4 bytes
    said = r"7 tokens in \d+\.\d\d s: \d+\.\d tokens/s; 256 bytes of cache a token\n"
    assert re.fullmatch(said, stderr), stderr
    # bytes that are no text go through as they are; here the model takes up after a newline and then x
    code, stdout, stderr = program(chain.folder, "--seed", "5", "--temperature", "0.1", stdin=b"\xff\nx")
    assert code == 0 and stdout == b"\xff\nx" + "你🙂\n".encode()
    assert re.fullmatch(r"warning: 204 tokens are more than the 64 of the model's RoPE context\n" + said, stderr)
    (tmp_path / "prompt").write_bytes(b"1 \xe4\xbdx")
    code, stdout, stderr = program_here(
        chain.folder, "--prompt-file", tmp_path / "prompt", "--n-samples", "2", "--seed", "3", "--temperature", "0.1",
        "--n-tokens", "60",
    )  # fmt: skip
    text = b"1 \xe4\xbdx" + "你🙂\n".encode()
    assert stdout == b"--- seed 3 ---\n" + text + b"--- seed 4 ---\n" + text
    assert stderr.startswith("warning: 66 tokens are more than the 64 of the model's RoPE context\n14 tokens in ")


def test_the_program_draws_the_same_text_for_a_seed(
    bundle: Bundle, model: Decoder, tokenizer: Tokenizer, program_here: Callable[..., tuple[int, bytes, str]]
) -> None:
    options = ["--prompt", "", "--n-tokens", "20", "--dtype", "fp32"]
    code, stdout, stderr = program_here(bundle.folder, *options, "--n-samples", "2", "--temperature", "3")
    assert code == 0, stderr
    samples = re.fullmatch(r"--- seed 0 ---\n(.*)\n--- seed 1 ---\n(.*)\n", stdout.decode(), re.DOTALL)
    assert samples is not None
    first, second = samples.groups()
    assert first != second
    for seed, text in enumerate((first, second)):
        assert text == "".join(texts_of(model, tokenizer, "", n_tokens=20, temperature=3.0, seed=seed))
    assert program_here(bundle.folder, *options, "--seed", "1", "--temperature", "3")[1].decode() == second + "\n"


@pytest.mark.slow
def test_the_program_continues_a_batch(bundle: Bundle, model: Decoder, tokenizer: Tokenizer) -> None:
    prompts = ["import os", "x", "def 山(a, b):"]
    given = [argument for prompt in prompts for argument in ("--prompt", prompt)]
    options = ["--n-tokens", "9", "--temperature", "1.5", "--n-samples", "2"]
    code, stdout, stderr = program(bundle.folder, *given, *options)  # a process draws what another would
    assert code == 0, stderr
    expected = ""
    for i, prompt in enumerate(prompt for prompt in prompts for _ in range(2)):
        text = "".join(texts_of(model, tokenizer, prompt, n_tokens=9, temperature=1.5, seed=i))
        expected += f"--- prompt {i // 2 + 1}, seed {i} ---\n{prompt}{text}\n"
    assert stdout.decode() == expected


@pytest.mark.slow
def test_text_streams_and_a_reader_may_leave(bundle: Bundle, popen: Popen) -> None:
    arguments = ["--prompt", "def", "--n-tokens", "1000000", "--temperature", "50"]
    command = [sys.executable, PROGRAM, bundle.folder, *arguments]
    process = popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT, text=False)
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.read(20)[:3] == b"def"
    assert process.poll() is None
    process.stdout.close()
    stderr = process.stderr.read().decode()
    assert process.wait(60) == 141  # as of a program that SIGPIPE ended
    assert "Traceback" not in stderr and "BrokenPipe" not in stderr


def test_a_device_that_is_not_there_is_an_error(
    bundle: Bundle, program_here: Callable[..., tuple[int, bytes, str]]
) -> None:
    for device in ("cuda:99", "abacus"):
        code, stdout, stderr = program_here(bundle.folder, "--prompt", "", "--device", device)
        assert code == 2 and stdout == b""
        assert re.fullmatch(rf"error: --device {device}: .+\n", stderr), stderr
