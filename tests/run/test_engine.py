"""DeepSpeed under every stage and dtype, on two real ranks, against plain single-process training."""

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from megakexue.config import ResolvedConfig, UserError
from megakexue.core.attention import Layout
from megakexue.core.axes import axes, shape
from megakexue.core.decoder import Decoder, initial_weight
from megakexue.core.device import has_compiler
from megakexue.core.loss import plain_cross_entropy
from megakexue.core.schedule import clip_factor, lr_factor
from megakexue.dist import ALONE
from megakexue.run.data import Batches
from tests.conftest import Prepared
from tests.helpers import make_config
from tests.ranks import run_on_ranks

STAGES = (0, 1, 2, 3)
DTYPES = ("fp32", "bf16", "fp16")


def initial_masters(engine: Any, config: ResolvedConfig) -> None:
    engine.load_new(seed=0)


def own_batches(config: ResolvedConfig, ranks: Any, *, same_batch: bool = False) -> Batches:
    """The batches of this rank; `same_batch` gives every rank the rows of rank 0."""
    size = config.train.global_batch_size // ranks.world_size if same_batch else config.train.global_batch_size
    return Batches(
        config.data,
        global_batch_size=size,
        micro_batch_size=config.train.micro_batch_size,
        ranks=ALONE if same_batch else ranks,
        cache=Path("unused"),
    )


def train_steps(config: ResolvedConfig, *, same_batch: bool) -> dict[str, Any]:
    """Train `train.steps` on this rank."""
    from megakexue.run.engine import Engine, start

    ranks = start(config.engine)
    engine = Engine(config, ranks)
    initial_masters(engine, config)
    engine.check_weights()
    if config.loss.emo:
        head = initial_weight("embedding.weight" if config.model.tie_embeddings else "head.weight", config.model, 0)
        engine.compare_tokens_by(head)
    data = own_batches(config, ranks, same_batch=same_batch)
    results = []
    for step in range(config.train.steps):
        batches = data.next_step()
        lr = config.optim.lr * lr_factor(config.optim, step + 1, config.train.steps)
        results.append(engine.train_step(batches, lr, step + 1))
        engine.check_weights()
    data.close()
    state = [(s.name, s.start, s.stop, {k: v.clone() for k, v in views.items()}) for s, views in engine.state_tensors()]
    loss = engine.evaluation_loss(batches[0]).item()
    return {
        "results": results,
        "state": state,
        "n_updates": engine.optimizer.n_updates,
        "evaluation": loss,
    }


def many_cases(cases: list[tuple[ResolvedConfig, bool]]) -> list[dict[str, Any]]:
    return [train_steps(config, same_batch=same) for config, same in cases]


def assemble(
    ranks: list[dict[str, Any]], config: ResolvedConfig, *, sharded: bool
) -> dict[str, dict[str, torch.Tensor]]:
    """Put the segments of all ranks together, asserting that they cover each parameter exactly once."""
    whole: dict[str, dict[str, torch.Tensor]] = {}
    counts: dict[str, torch.Tensor] = {}
    for result in ranks if sharded else ranks[:1]:
        for name, start, stop, views in result["state"]:
            n = math.prod(shape(name, config.model))
            counts.setdefault(name, torch.zeros(n, dtype=torch.int))[start:stop] += 1
            for kind, value in views.items():
                whole.setdefault(kind, {}).setdefault(name, torch.full((n,), torch.nan))[start:stop] = value
    with torch.device("meta"):
        expected = dict(Decoder(config.model, "reference").named_parameters())
    assert counts.keys() == expected.keys()
    assert all((count == 1).all() for count in counts.values())
    return whole


def plain_training(config: ResolvedConfig) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """The same steps with none of our engine: one process, the rules as the papers write them, all rows at once."""
    model = Decoder(config.model, "reference")
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(initial_weight(name, config.model, 0))
    optim = config.optim
    gains = [p for p in parameters.values() if p.dim() == 1]
    is_muon = optim.name == "muon"
    matrices = {n: p for n, p in parameters.items() if is_muon and n.startswith("blocks.") and p.dim() == 2}
    decayed = [p for name, p in parameters.items() if p.dim() == 2 and name not in matrices]
    adamw = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": gains, "weight_decay": 0.0}],
        betas=(0.9, 0.95) if is_muon else (optim.beta1, optim.beta2 or 0.0),
        eps=optim.eps,
    )
    momentum = {name: torch.zeros_like(p) for name, p in parameters.items()}
    size = config.train.global_batch_size
    data = Batches(config.data, global_batch_size=size, micro_batch_size=size, ranks=ALONE, cache=Path("unused"))
    losses, norms = [], []
    for step in range(config.train.steps):
        (batch,) = data.next_step()
        x = model.embedding(batch.tokens)
        rotary = model.rotary(batch.positions, batch.tokens.shape[1])
        layout = Layout(batch.positions, batch.cu_seqlens, backend="reference", dtype=x.dtype)
        for block in model.blocks:
            x = block(x, rotary, layout, None)
        logits = x.flatten(0, 1), model.head.weight
        loss = plain_cross_entropy(*logits, batch.targets.flatten(), config.model.logit_scale).sum()
        loss = loss / batch.n_targets
        loss.backward()
        squares = [p.grad.double().square().sum() for p in parameters.values() if p.grad is not None]
        norm = torch.stack(squares).sum().sqrt()
        for p in parameters.values():
            assert p.grad is not None
            p.grad *= clip_factor(optim, norm).item()
        lr = optim.lr * lr_factor(optim, step + 1, config.train.steps)
        if optim.name in ("adamw", "muon"):
            for group in adamw.param_groups:
                group["lr"] = lr
            adamw.step()
            for name, p in matrices.items():
                plain_muon_step(p, momentum[name], config, lr)
        else:
            with torch.no_grad():
                for name, p in parameters.items():
                    plain_sign_step(name, p, momentum[name], config, lr, batch.tokens)
        for p in parameters.values():
            p.grad = None
        losses.append(loss.item())
        norms.append(norm.item())
    data.close()
    return losses, norms, {name: p.detach().view(-1) for name, p in parameters.items()}


def plain_muon_step(p: torch.nn.Parameter, buffer: torch.Tensor, config: ResolvedConfig, lr: float) -> None:
    """Muon on one whole matrix, as Moonlight has published it (arXiv 2502.16982), with its sum of gradients."""
    optim = config.optim
    assert p.grad is not None
    buffer.mul_(optim.beta1).add_(p.grad)
    g = p.grad.add(buffer, alpha=optim.beta1)
    x = g.T if g.shape[0] > g.shape[1] else g
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    x = x.T if g.shape[0] > g.shape[1] else x
    with torch.no_grad():
        p.mul_(1 - lr * optim.weight_decay).add_(x, alpha=-lr * 0.2 * max(g.shape) ** 0.5)


def plain_sign_step(
    name: str, p: torch.Tensor, m: torch.Tensor, config: ResolvedConfig, lr: float, tokens: torch.Tensor
) -> None:
    """Tiger (9512) and Lion (9473) on one whole parameter, its embedding lazy by the tokens of the batch (9736)."""
    optim, g = config.optim, p.grad
    assert g is not None
    eta: Any = lr
    if optim.name == "tiger":
        m.mul_(optim.beta1).add_(g, alpha=1 - optim.beta1)
        direction = m
        eta = lr * p.square().mean().sqrt()
        if name == "embedding.weight":
            eta = lr * p.square().mean(-1, keepdim=True).sqrt()
        if p.dim() == 1:
            eta = lr / 2
    else:
        assert optim.beta2 is not None
        direction = optim.beta1 * m + (1 - optim.beta1) * g
        m.mul_(optim.beta2).add_(g, alpha=1 - optim.beta2)
    update = eta * (torch.sign(direction) + (optim.weight_decay if p.dim() == 2 else 0.0) * p)
    if name == "embedding.weight" and not config.model.tie_embeddings:
        occurs = torch.zeros(len(p), 1)
        occurs[tokens.unique()] = 1
        update *= occurs
    p.sub_(update)


TIGER, LION, ADAMW = {"name": "tiger", "lr": 1e-2}, {"name": "lion", "lr": 1e-3}, {"name": "adamw", "lr": 1e-2}
MUON = {"name": "muon", "lr": 1e-2}


def where(config: ResolvedConfig) -> str:
    kind = "mla" if config.model.mla else "gqa"
    tied = "tied" if config.model.tie_embeddings else "untied"
    return f"{config.optim.name} stage {config.engine.zero_stage} {config.engine.dtype} {kind} {tied}"


def on_two_ranks(configs: list[ResolvedConfig], *, same_batch: bool) -> list[tuple[Any, Any]]:
    """Train each config on two ranks; return the results of the first and the state of both, put together."""
    done = []
    of_ranks = run_on_ranks(2, many_cases, [(config, same_batch) for config in configs])
    for config, (first, second) in zip(configs, zip(*of_ranks), strict=True):
        assert repr(first["results"]) == repr(second["results"]), f"{where(config)}: ranks disagree"
        assert [r.status for r in first["results"]] == ["applied"] * config.train.steps, where(config)
        assert first["n_updates"] == config.train.steps, where(config)
        done.append((first, assemble([first, second], config, sharded=config.engine.zero_stage > 0)))
    return done


def alone(config: ResolvedConfig) -> ResolvedConfig:
    """What each of two ranks does that have the same rows, on one rank without sharding."""
    train = replace(config.train, global_batch_size=config.train.global_batch_size // 2)
    return replace(config, train=train, engine=replace(config.engine, zero_stage=0))


def test_what_is_compiled_depends_on_the_config_and_the_machine_alone(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megakexue.run import engine as module

    def chosen(setting: str, device: str = "cpu", steps: int = 4, world_size: int = 2) -> tuple[bool, str]:
        config = make_config(prepared, steps=steps)
        config = replace(config, engine=replace(config.engine, compile=setting))  # type: ignore[arg-type]
        return module.choose_compile(config, torch.device(device), world_size)

    monkeypatch.setattr(module, "has_compiler", lambda: True)
    assert chosen("off") == chosen("off", "cuda") == (False, "engine.compile")
    assert chosen("on") == chosen("on", "cuda") == (True, "engine.compile")
    assert chosen("auto", "cuda")[0]
    is_compiled, reason = chosen("auto")
    assert not is_compiled and "FLOP a rank are too few to earn the compiler's minute" in reason
    assert chosen("auto", steps=10**8)[0] and not chosen("auto", steps=10**8, world_size=10**7)[0]
    monkeypatch.setattr(module, "has_compiler", lambda: False)
    assert chosen("auto", steps=10**8) == (False, "there is no C++ compiler, g++")
    with pytest.raises(UserError, match=r"engine\.compile=on needs a C\+\+ compiler, and there is no g\+\+"):
        chosen("on")


def counted(configs: list[ResolvedConfig]) -> list[tuple[dict[str, Any], dict[str, int]]]:
    """Train each config; return its results, and how many graphs the compiler made and where it gave up."""
    import torch._dynamo

    done = []
    for config in configs:
        torch._dynamo.reset()
        counters = torch._dynamo.utils.counters
        counters.clear()
        results = train_steps(config, same_batch=False)
        n_graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
        done.append((results, {"graphs": n_graphs, "breaks": breaks}))
    return done


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="needs g++")
def test_compiled_stages_are_equal_in_every_bit_and_near_eager(prepared: Prepared) -> None:
    def compiled(config: ResolvedConfig) -> ResolvedConfig:
        return replace(config, engine=replace(config.engine, compile="on"))

    # one micro-batch: the sum of two ranks is the same in any order
    stages = (1, False), (2, False), (3, False), (3, True)
    kinds = [make_config(prepared, stage=stage, mla=mla, optim=TIGER, rows=4) for stage, mla in stages]
    of_ranks = run_on_ranks(2, counted, [compiled(config) for config in kinds])
    plain = run_on_ranks(2, counted, [kinds[0], kinds[3]])
    # however many documents the rows have: the two parts of all blocks in training and in evaluation, and of the loss
    # its gradient, the sum over chunks, and the scaling of both gradients
    assert [counts for _, counts in of_ranks[0]] == [{"graphs": 8, "breaks": 0}] * len(kinds)
    assert plain[0][0][1]["graphs"] == 0

    def state(of_all: Any, i: int, config: ResolvedConfig) -> dict[str, dict[str, torch.Tensor]]:
        return assemble([done[i][0] for done in of_all], config, sharded=True)

    for i, config in enumerate(kinds):
        first, near = state(of_ranks, i // 3 * 3, config), state(plain, i // 3, config)
        for kind, of_kind in state(of_ranks, i, config).items():
            for name, value in of_kind.items():
                assert torch.equal(value, first[kind][name]), (where(config), kind, name)
                assert (value - near[kind][name]).abs().max() <= 2e-3 * value.abs().max() + 1e-7, (i, kind, name)


RECOMPUTE: tuple[dict[str, Any], ...] = (
    *(dict(recompute=what) for what in ("none", "product", "feed_forward", "block")),
    dict(recompute="block", recompute_offload=True),
)


def recomputing(config: ResolvedConfig, compile: Literal["on", "off"] = "off") -> list[ResolvedConfig]:
    """The config with each setting of engine.recompute."""
    return [replace(config, engine=replace(config.engine, compile=compile, **what)) for what in RECOMPUTE]


def check_nothing_changes(configs: list[ResolvedConfig], of_ranks: list[list[dict[str, Any]]]) -> None:
    """Compare each run with the first of its kind, of which there are as many as settings of engine.recompute."""
    for results in of_ranks:
        for i, (config, found) in enumerate(zip(configs, results, strict=True)):
            kept, what = results[i - i % len(RECOMPUTE)], f"{where(config)} {config.engine.recompute}"
            for key in ("results", "evaluation"):
                assert repr(found[key]) == repr(kept[key]), what
            for (name, *_, views), (*_, expected) in zip(found["state"], kept["state"], strict=True):
                assert all(torch.equal(value, expected[kind]) for kind, value in views.items()), (what, name)


@pytest.mark.slow
def test_what_is_computed_again_changes_no_bit(prepared: Prepared) -> None:
    absorbed = TIGER | {"accumulate": "momentum"}
    kinds = [
        dict(stage=0, dtype="fp32", optim=ADAMW), dict(stage=1, dtype="fp16", optim=TIGER),
        dict(stage=1, dtype="bf16", optim=TIGER, mla=True), dict(stage=2, dtype="bf16", optim=TIGER),
        dict(stage=2, dtype="bf16", optim=absorbed, mla=True), dict(stage=3, dtype="bf16", optim=absorbed),
        dict(stage=3, dtype="fp32", optim=TIGER, mla=True),
    ]  # fmt: skip
    configs = [config for kind in kinds for config in recomputing(make_config(prepared, steps=2, **kind))]  # type: ignore[arg-type]
    check_nothing_changes(configs, run_on_ranks(2, many_cases, [(config, False) for config in configs]))


@pytest.mark.slow
def test_rows_in_tiles_are_whole_rows(prepared: Prepared) -> None:
    """Up to rounding; and with tiles too, it changes no bit whether blocks are computed again."""
    kinds = [
        dict(stage=0, dtype="fp32"), dict(stage=1, dtype="fp32", mla=True), dict(stage=2, dtype="bf16"),
        dict(stage=3, dtype="fp32"), dict(stage=3, dtype="bf16", mla=True),
    ]  # fmt: skip
    settings: tuple[dict[str, Any], ...] = (
        dict(),
        dict(tile_tokens=24),
        dict(tile_tokens=24, recompute="block", recompute_offload=True),
    )
    configs = [make_config(prepared, steps=4, optim=ADAMW, **kind) for kind in kinds]  # type: ignore[arg-type]
    configs = [replace(c, engine=replace(c.engine, **changes)) for c in configs for changes in settings]
    for results in run_on_ranks(2, many_cases, [(config, False) for config in configs]):
        for i in range(0, len(configs), 3):
            whole, tiles, again = (repr(found["results"]) for found in results[i : i + 3])
            assert tiles == again and tiles != whole
            rel = 2e-6 if configs[i].engine.dtype == "fp32" else 3e-3
            for a, b in zip(results[i]["results"], results[i + 1]["results"], strict=True):
                assert a.loss == pytest.approx(b.loss, rel=rel) and a.grad_norm == pytest.approx(b.grad_norm, rel=rel)


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="needs g++")
def test_what_is_computed_again_changes_no_bit_of_compiled_blocks(prepared: Prepared) -> None:
    kinds = dict(stage=3, dtype="fp32"), dict(stage=2, dtype="bf16", mla=True)
    bases = [make_config(prepared, optim=TIGER, rows=4, steps=2, **kind) for kind in kinds]  # type: ignore[arg-type]
    configs = [config for base in bases for config in recomputing(base, "on")]
    check_nothing_changes(configs, run_on_ranks(1, many_cases, [(config, False) for config in configs]))


@pytest.mark.slow
def test_two_ranks_with_the_same_rows_are_one_rank(prepared: Prepared) -> None:
    # each stage with each dtype, rule and kind; tied or not in turn, so that each pair of settings occurs
    configs = [
        make_config(prepared, stage=s, dtype=d, tied=(o + (d == "bf16") + s) % 2 == 1, optim=optim,
                    steps=8 if optim is TIGER else 4)
        for o, optim in enumerate((TIGER, LION, ADAMW)) for d in ("fp32", "bf16") for s in STAGES
    ]  # fmt: skip
    configs += [make_config(prepared, stage=s, dtype="fp16", optim=o) for o in (TIGER, ADAMW) for s in STAGES]
    configs += [
        make_config(prepared, stage=s, dtype=d, tied=s == 1, mla=s == 2, optim=MUON)
        for s, d in ((0, "bf16"), (1, "fp32"), (2, "fp32"), (3, "fp32"))
    ]
    configs += [make_config(prepared, stage=s, dtype=("fp32", "bf16")[s // 2], mla=True, optim=TIGER) for s in STAGES]
    configs += [
        make_config(prepared, stage=s, dtype=d, tied=t, emo=True, optim=TIGER)
        for s, d, t in ((1, "fp32", False), (3, "bf16", True), (3, "fp32", False))
    ]
    two = on_two_ranks(configs, same_batch=True)
    halves = {repr(alone(config)): alone(config) for config in configs}
    one = dict(zip(halves, run_on_ranks(1, many_cases, [(c, True) for c in halves.values()])[0], strict=True))
    for config, (first, whole) in zip(configs, two, strict=True):
        half = one[repr(alone(config))]
        is_halved = config.engine.dtype == "fp16" and config.engine.zero_stage >= 2
        for field in ("loss", "grad_norm"):
            got, want = ([getattr(r, field) for r in run["results"]] for run in (first, half))
            assert got == pytest.approx(want, rel=1e-6 if is_halved else 1e-15), f"{where(config)}: {field}"
        evaluation = pytest.approx(half["evaluation"], rel=1e-3 if is_halved else 1e-15)
        assert first["evaluation"] == evaluation, where(config)
        # every bit of masters and state
        for kind, tensors in assemble([half], config, sharded=False).items():
            for name, value in tensors.items():
                what = f"{where(config)}: {kind} {name}"
                if is_halved:
                    check_halved(whole[kind][name] - value, config, what)
                else:
                    assert torch.equal(whole[kind][name], value), what


def with_given_gradients(configs: list[ResolvedConfig]) -> list[dict[str, Any]]:
    """Take steps by gradients that no reduction has rounded: the same for every stage and number of ranks."""
    from megakexue.run.engine import Engine, start

    done = []
    for config in configs:
        ranks = start(config.engine)
        engine = Engine(config, ranks)
        initial_masters(engine, config)
        data, given_, layout = own_batches(config, ranks, same_batch=True), itertools.count(), engine._layout

        def gradients(engine: Any = engine, given_: Any = given_, reduced: Any = layout.gradients) -> Any:
            pieces, step = reduced(), next(given_)
            for i, name in enumerate(engine.optimizer.names):
                n = math.prod(shape(name, engine.config.model))
                whole = torch.randn(n, generator=torch.Generator().manual_seed(1000 * step + i))
                for s in engine.segments:
                    if s.name == name:
                        s.of(pieces[s.flat]).copy_(whole[s.start : s.stop])
            return pieces

        layout.gradients = gradients  # type: ignore[method-assign]
        for step in range(config.train.steps):
            assert engine.train_step(data.next_step(), config.optim.lr, step + 1).status == "applied"
            engine.check_weights()
        data.close()
        state = [(s.name, s.start, s.stop, {k: v.clone() for k, v in x.items()}) for s, x in engine.state_tensors()]
        assert engine.optimizer._matrices is not None
        done.append({"state": state, "rounds": len(engine.optimizer._matrices.rounds)})
    return done


@pytest.mark.slow
def test_muon_is_the_same_on_any_number_of_ranks(prepared: Prepared) -> None:
    for n_ranks, stages in ((1, (0,)), (3, STAGES), (4, (1,))):
        configs = [make_config(prepared, stage=s, optim=MUON, rows=2 * n_ranks, steps=2) for s in stages]
        of_ranks = run_on_ranks(n_ranks, with_given_gradients, configs)
        for config, done in zip(configs, zip(*of_ranks), strict=True):
            assert done[0]["rounds"] > 2, "messages are bounded"
            whole = assemble(list(done), config, sharded=config.engine.zero_stage > 0)
            if n_ranks == 1:
                alone_ = whole
            assert {"momentum", "exp_avg", "exp_avg_sq"} < whole.keys() == alone_.keys()
            for kind, tensors in alone_.items():
                for name, value in tensors.items():
                    assert torch.equal(whole[kind][name], value), f"{n_ranks} ranks, {where(config)}: {kind} {name}"


def sharing_rows(prepared: Prepared, **kind: Any) -> ResolvedConfig:
    config = make_config(prepared, rows=4, **kind)
    return replace(config, engine=replace(config.engine, sequence_ranks=2))


@pytest.mark.slow
def test_two_ranks_that_share_rows_are_one_rank(prepared: Prepared) -> None:
    absorbed = TIGER | {"accumulate": "momentum"}
    kinds: list[dict[str, Any]] = [
        dict(stage=1, optim=ADAMW, steps=20), dict(stage=2, optim=ADAMW, steps=20, mla=True),
        dict(stage=3, optim=TIGER, steps=20), dict(stage=2, optim=absorbed, steps=3),
        dict(stage=0, optim=TIGER, steps=3, dtype="bf16"), dict(stage=3, optim=TIGER, steps=3, dtype="bf16", mla=True),
    ]  # fmt: skip
    shared = [sharing_rows(prepared, **kind) for kind in kinds]
    one = [make_config(prepared, rows=4, **kind) for kind in kinds]
    ((first, second),) = [run_on_ranks(2, many_cases, [(config, False) for config in shared])]
    (expected,) = run_on_ranks(1, many_cases, [(config, False) for config in one])
    for config, a, b, want in zip(one, first, second, expected, strict=True):
        rel = 1e-6 if config.engine.dtype == "fp32" else 2e-3
        assert a["results"] == b["results"], where(config)
        for got, result in zip(a["results"], want["results"], strict=True):
            assert got.n_targets == result.n_targets and got.status == result.status == "applied"
            assert got.loss == pytest.approx(result.loss, rel=rel), where(config)
            assert got.grad_norm == pytest.approx(result.grad_norm, rel=20 * rel), where(config)
        assert a["evaluation"] + b["evaluation"] == pytest.approx(want["evaluation"], rel=rel), where(config)


def by_itself(configs: list[ResolvedConfig], spoilt: list[ResolvedConfig]) -> tuple[list[Any], list[list[Any]]]:
    return many_cases([(config, False) for config in configs]), inject_into_gradients(spoilt)


@pytest.mark.slow
def test_a_rank_by_itself_takes_the_same_steps_at_every_stage(prepared: Prepared) -> None:
    # without DeepSpeed's reduction at stages 0 to 2, with it at stage 3
    kinds = [
        make_config(prepared, dtype=d, optim=TIGER | {"accumulate": accumulate}, rows=4, steps=2)
        for d, accumulate in (("fp32", "gradient"), ("bf16", "gradient"), ("bf16", "momentum"))
    ]
    kinds += [make_config(prepared, dtype="fp16", tied=True, optim=ADAMW, rows=4, steps=2)]
    kinds += [make_config(prepared, dtype="bf16", optim=MUON, rows=4, steps=2)]
    configs = [replace(c, engine=replace(c.engine, zero_stage=s)) for c in kinds for s in STAGES]
    spoilt = configs[len(STAGES) : 2 * len(STAGES)]
    ((results, of_spoilt),) = run_on_ranks(1, by_itself, configs, spoilt)
    for config, steps in zip(spoilt, of_spoilt, strict=True):
        for name, result in zip(SUSPECTS, steps, strict=True):
            facts = result.bad_tensors, result.bad_loss_ranks, result.bad_gradient_ranks
            assert facts == ([name], [], [0]), f"{where(config)}: {facts}"
    for i, (config, result) in enumerate(zip(configs, results)):
        first = results[i // len(STAGES) * len(STAGES)]
        for got, expected in zip(result["results"], first["results"], strict=True):
            # the sums in float64 have another order
            assert got.grad_norm == pytest.approx(expected.grad_norm, rel=1e-13), where(config)
            assert replace(got, grad_norm=0.0) == replace(expected, grad_norm=0.0), where(config)
        of_first = assemble([first], config, sharded=False)
        for kind, tensors in assemble([result], config, sharded=True).items():
            for name, value in tensors.items():
                assert torch.equal(value, of_first[kind][name]), f"{where(config)}: {kind} {name}"


def count_operations(configs: list[ResolvedConfig]) -> list[tuple[int, int]]:
    """Of one step: those of the sums and of the update, and those after the host has waited for the device."""
    from megakexue.core import rules
    from megakexue.run.engine import Engine, start
    from tests.core.test_optim import Operations

    rules.CHUNK = 2**30  # more layers have more elements too
    counts = []
    for config in configs:
        engine = Engine(config, start(config.engine))
        initial_masters(engine, config)
        data = own_batches(config, engine.ranks)
        engine.train_step(data.next_step(), 1e-3, 1)
        operations, after = Operations(), Operations()

        def counted(function: Any, mode: Any) -> Any:
            def run(*args: Any, **kwargs: Any) -> Any:
                with mode:
                    return function(*args, **kwargs)

            return run

        for name in ("gradient_sums", "weight_sums", "step"):
            setattr(engine.optimizer, name, counted(getattr(engine.optimizer, name), operations))
        engine._update = counted(engine._update, after)  # type: ignore[method-assign]
        engine.train_step(data.next_step(), 1e-3, 2)
        data.close()
        counts.append((len(operations.names), len(after.names)))
    return counts


def test_the_tail_of_a_step_takes_as_many_operations_for_two_layers_as_for_six(prepared: Prepared) -> None:
    configs = [
        replace(config, model=replace(config.model, n_layers=n))
        for stage in (1, 2, 3)
        for config in (make_config(prepared, stage=stage, dtype="bf16", optim=TIGER, rows=2),)
        for n in (2, 6)
    ]
    (counts,) = run_on_ranks(1, count_operations, configs)
    for (of_sums, tail), (of_more_sums, tail_of_more), stage in zip(counts[::2], counts[1::2], (1, 2, 3)):
        assert of_sums == of_more_sums > 20, stage
        # at stage 3 DeepSpeed gathers the small parameters again, one by one
        assert stage == 3 or 20 < tail == tail_of_more, stage


def check_halved(difference: torch.Tensor, config: ResolvedConfig, what: str) -> None:
    """Stages 2 and 3 halve each micro-batch's gradient before adding, which loses the last bit of fp16's subnormals.

    That is up to 2^-25 / 65536 = 5e-13, of which AdamW makes 5e-13 / eps = 5e-5 lr, and Tiger another sign where the
    momentum is that small.
    """
    if config.optim.name == "adamw":
        assert difference.abs().max() < 1e-4 * config.optim.lr, what
    else:
        assert (difference != 0).float().mean() < 2e-3, what


@pytest.mark.slow
def test_two_ranks_with_different_rows_go_by_the_plain_rules(prepared: Prepared) -> None:
    configs = [
        make_config(prepared, stage=s, dtype=d, optim=o)
        for o, d in (
            (TIGER, "fp32"),
            (LION, "fp32"),
            (ADAMW, "fp32"),
            (MUON, "fp32"),
            (TIGER, "bf16"),
            (ADAMW, "fp16"),
        )
        for s in STAGES
    ]
    configs += [make_config(prepared, stage=s, mla=True, optim=ADAMW) for s in STAGES]
    configs += [make_config(prepared, stage=s, micro=1, optim=ADAMW) for s in STAGES]
    references: dict[tuple[str, bool], tuple[list[float], list[float], dict[str, torch.Tensor]]] = {}
    for config, (first, whole) in zip(configs, on_two_ranks(configs, same_batch=False), strict=True):
        key = config.optim.name, config.model.mla is not None
        if config.engine.dtype == "fp32" and key not in references:
            references[key] = plain_training(config)
        losses, norms, weights = references[key]
        # fp32: up to the order of float32 sums; half precision: to that of the weights
        rel = {"fp32": 1e-5 if config.optim.name in ("tiger", "lion") else 1e-6, "bf16": 2e-3, "fp16": 3e-4}[
            config.engine.dtype
        ]
        assert [r.loss for r in first["results"]] == pytest.approx(losses, rel=rel), where(config)
        if config.engine.dtype == "fp32":
            assert [r.grad_norm for r in first["results"]] == pytest.approx(norms, rel=10 * rel), where(config)
            for name, value in weights.items():
                check_rounding(whole["master"][name] - value, config, f"{where(config)}: {name}")


def check_rounding(difference: torch.Tensor, config: ResolvedConfig, what: str) -> None:
    """AdamW divides by sqrt(v), so where a gradient is rounding noise it may move by another fraction of lr.

    A sign may turn there.
    """
    difference, lr = difference.abs(), config.optim.lr
    if config.optim.name == "muon":  # measured: 4e-4 and 2e-5
        assert difference.max() < 4e-3 * lr and difference.mean() < 1e-4 * lr, f"{what} {difference.max()}"
    elif config.optim.name == "adamw":
        assert difference.max() < 0.02 * lr, f"{what} {difference.max()}"
        assert difference.mean() < 1e-5 * lr, f"{what} {difference.mean()}"
    else:
        turned = (difference > 1e-6).float().mean()
        assert turned < 1e-3, f"{what} {turned}"
        assert difference.max() < 2 * config.train.steps * lr, what


def huge_gradients(configs: list[ResolvedConfig]) -> list[tuple[Any, int]]:
    """One step whose gradients are finite and beyond what float32 can square."""
    from megakexue.run.engine import Engine, start

    outcomes = []
    for config in configs:
        ranks = start(config.engine)
        engine = Engine(config, ranks)
        initial_masters(engine, config)
        data = own_batches(config, ranks)
        for p in engine.module.parameters():
            p.register_hook(lambda g: g * 1e23)
        result = engine.train_step(data.next_step(), 1e-3, 1)
        engine.check_weights()
        data.close()
        outcomes.append((result, engine.optimizer.n_updates))
    return outcomes


@pytest.mark.slow
def test_momentum_accumulates_what_the_gradient_does(prepared: Prepared) -> None:
    # 8634: equal up to the order of float32 sums, without a buffer for the gradient. The clipping of each micro-batch
    # is another thing than that of their mean, so there is none here
    cases = [(stage, k) for stage in STAGES for k in (1, 8)]
    configs = [
        make_config(prepared, stage=stage, rows=16, micro=8 // k, steps=3,
                    optim=TIGER | {"clip": None, "accumulate": accumulate})
        for stage, k in cases for accumulate in ("gradient", "momentum")
    ]  # fmt: skip
    two = list(zip(*run_on_ranks(2, many_cases, [(config, False) for config in configs])))
    runs = [assemble(list(r), c, sharded=c.engine.zero_stage > 0) for r, c in zip(two, configs)]
    for (stage, k), by_gradient, by_momentum, ranks in zip(cases, runs[::2], runs[1::2], zip(two[::2], two[1::2])):
        where = f"stage {stage}, {k} micro-batches"
        for name, value in by_gradient["momentum"].items():
            other = by_momentum["momentum"][name]
            if k == 1:
                assert torch.equal(other, value) and torch.equal(
                    by_momentum["master"][name], by_gradient["master"][name]
                )
                continue
            assert (other - value).abs().max() < 1e-5 * value.abs().max(), f"{where}: {name}"
            turned = ((by_momentum["master"][name] - by_gradient["master"][name]).abs() > 1e-6).float().mean()
            assert turned < 2e-3, f"{where}: {name}: {turned}"
        losses = [[r.loss for r in rank[0]["results"]] for rank in ranks]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6), where


POLICIES: tuple[Any, ...] = ("shrink", "skip", "rollback", "stop")


def inject(config: ResolvedConfig) -> list[tuple[Any, ...]]:
    """On the last rank, a NaN or an infinity in the second of four micro-batches, under every policy on one engine."""
    from megakexue.run.engine import Engine, start

    ranks = start(config.engine)
    engine = Engine(config, ranks)
    initial_masters(engine, config)
    data = own_batches(config, ranks)

    def state(kind: str) -> dict[tuple[str, int], torch.Tensor]:
        return {(s.name, s.start): views[kind].clone() for s, views in engine.state_tensors() if kind in views}

    outcomes = []
    step = 0
    first = DTYPES.index(config.engine.dtype) + config.engine.zero_stage // 2
    for n, policy in enumerate(POLICIES, start=first):
        value = (math.nan, math.inf)[n % 2]  # at each stage, as at each dtype, every policy meets both
        engine.config = replace(config, guard=replace(config.guard, on_nonfinite=policy))
        engine.guard.config = engine.config.guard
        for is_bad in (True, False):
            calls = 0

            def poison(
                module: Any, inputs: Any, out: torch.Tensor, is_bad: bool = is_bad, value: float = value
            ) -> torch.Tensor:
                nonlocal calls
                calls += 1
                bad = is_bad and calls == 2 and ranks.rank == ranks.world_size - 1
                return torch.cat([out[:, :1] * value, out[:, 1:]], 1) if bad else out

            hook = engine.module.get_submodule("blocks.1.feed_forward").register_forward_hook(poison)
            before = {kind: state(kind) for kind in ("master", "momentum")}
            step += 1
            result = engine.train_step(data.next_step(), config.optim.lr, step)
            hook.remove()
            engine.check_weights()
            after = {kind: state(kind) for kind in ("master", "momentum")}
            is_finite = all(t.isfinite().all() for tensors in after.values() for t in tensors.values())
            unmoved = [n for n in before["master"] if torch.equal(before["master"][n], after["master"][n])]
            # with ratio 0.99 every element goes a hundredth of its way to the centre
            shrunk = all(
                torch.allclose(after["master"][n] - c, (t - c) * 0.99, atol=1e-7)
                for n, t in before["master"].items()
                for c in [1.0 if "gain" in n[0] else 0.0]
            )
            same_momentum = all(torch.equal(t, after["momentum"][n]) for n, t in before["momentum"].items())
            facts = (is_finite, sorted({n for n, _ in unmoved}), shrunk, same_momentum, result.reason_to_stop)
            outcomes.append((f"{policy} {value}", is_bad, result, facts))
    data.close()
    return outcomes


def inject_all(configs: list[ResolvedConfig]) -> list[list[tuple[Any, ...]]]:
    return [inject(config) for config in configs]


@pytest.mark.slow
def test_one_bad_micro_batch_of_one_rank(prepared: Prepared) -> None:
    configs = [
        make_config(prepared, stage=stage, dtype=dtype, rows=16, micro=2,
                    optim=TIGER | {"accumulate": ("gradient", "momentum")[(stage + i) % 2]})
        for stage in STAGES for i, dtype in enumerate(DTYPES)
    ]  # fmt: skip
    configs += [make_config(prepared, stage=s, rows=16, micro=2, optim=MUON) for s in (0, 3)]
    expected = {"shrink": "shrunk", "skip": "skipped", "rollback": "rolled back", "stop": "skipped"}
    for config, ranks in zip(configs, zip(*run_on_ranks(2, inject_all, configs))):
        in_momentum = config.optim.accumulate == "momentum"
        for (injected, is_bad, result, facts), (_, _, other, other_facts) in zip(*ranks):
            of_optim = f"{config.optim.name} {config.optim.accumulate}"
            where = f"stage {config.engine.zero_stage} {config.engine.dtype} {of_optim} {injected}"
            policy = injected.split()[0]
            is_finite, unmoved, shrunk, same_momentum, reason = facts
            assert repr(result) == repr(other), f"{where}: ranks disagree"
            assert is_finite and other_facts[0], where
            if is_bad:
                assert result.status == expected[policy], where
                assert result.bad_loss_ranks == [1] and len(result.bad_tensors) > 10, where
                assert result.bad_gradient_ranks == [], f"{where}: a bad loss makes bad gradients, and is said alone"
                assert "loss nan" in result.note or "loss inf" in result.note, where
                assert shrunk == (policy == "shrink") == other_facts[2], where
                # the other micro-batches stay in a momentum that accumulates them
                assert same_momentum == (not in_momentum), where
                # gains and biases are at their centre before they have moved
                moved = [name for name in unmoved if axes(name).role in ("matrix", "embedding")] == []
                assert moved == (policy == "shrink"), where
                assert (reason is not None) == (policy == "stop"), where
            else:
                # a gradient that underflows in fp16 moves nothing; everything else goes on
                moved_all = not set(unmoved) & set(other_facts[1])
                assert result.status == "applied" and moved_all, f"{where}: {unmoved} {other_facts[1]}"


SUSPECTS = ("embedding.weight", "blocks.0.attention_norm.gain", "blocks.1.attention.wo", "head.weight")


def inject_into_gradients(configs: list[ResolvedConfig]) -> list[list[Any]]:
    """An infinity in the gradient of one parameter in the first of two micro-batches: of one rank, then of the other.

    Each step has another policy.
    """
    from megakexue.run.engine import Engine, start

    outcomes = []
    for config in configs:
        ranks = start(config.engine)
        engine = Engine(config, ranks)
        initial_masters(engine, config)
        data = own_batches(config, ranks)
        parameters = dict(engine.module.named_parameters())
        results = []
        for step, (policy, name) in enumerate(zip(POLICIES, SUSPECTS)):
            engine.config = replace(config, guard=replace(config.guard, on_nonfinite=policy))
            engine.guard.config = engine.config.guard
            calls, is_own = itertools.count(), ranks.rank == step % ranks.world_size

            def poison(gradient: torch.Tensor, calls: Any = calls, is_own: bool = is_own) -> torch.Tensor:
                return gradient.index_fill(0, torch.tensor([3]), math.inf) if is_own and next(calls) == 0 else gradient

            hook = parameters[name].register_hook(poison)
            results.append(engine.train_step(data.next_step(), config.optim.lr, step + 1))
            hook.remove()
        data.close()
        outcomes.append(results)
    return outcomes


@pytest.mark.slow
def test_an_infinity_in_one_gradient_of_one_rank_names_that_tensor_and_that_rank(prepared: Prepared) -> None:
    configs = [
        make_config(prepared, stage=stage, dtype=dtype, optim=TIGER | {"accumulate": accumulate})
        for stage in STAGES
        for dtype, accumulate in zip(DTYPES, ("momentum", "gradient", "gradient"))
    ]
    configs += [make_config(prepared, stage=1, optim=MUON)]
    expected = {"shrink": "shrunk", "skip": "skipped", "rollback": "rolled back", "stop": "skipped"}
    for config, (first, second) in zip(configs, zip(*run_on_ranks(2, inject_into_gradients, configs))):
        assert repr(first) == repr(second), f"{where(config)}: ranks disagree"
        for step, (policy, name, result) in enumerate(zip(POLICIES, SUSPECTS, first, strict=True)):
            # in fp16 it might be the loss scale, so the step is skipped whatever the policy
            status = "skipped" if config.engine.dtype == "fp16" else expected[policy]
            assert math.isfinite(result.loss) and not result.is_finite, where(config)
            facts = result.status, result.bad_tensors, result.bad_loss_ranks, result.bad_gradient_ranks
            assert facts == (status, [name], [], [step % 2]), f"{where(config)}: {policy}: {facts}"


@pytest.mark.slow
def test_large_but_finite_gradients_are_applied(prepared: Prepared) -> None:
    # DeepSpeed's own checks take the infinite float32 norm for an overflow at stage 0, and drop the step
    configs = [make_config(prepared, stage=s, dtype=d) for d in ("fp32", "bf16") for s in STAGES]
    for config, (result, n_updates) in zip(configs, run_on_ranks(2, huge_gradients, configs)[0]):
        where = f"stage {config.engine.zero_stage} {config.engine.dtype}"
        assert (result.status, n_updates) == ("applied", 1), where
        assert result.grad_norm > 1e20, where
