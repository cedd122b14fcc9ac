"""A bundle as a model of lm-evaluation-harness (`lm_eval`), and the harness's tasks on it.

    tools/evaluate.py BUNDLE --tasks hellaswag,arc_easy
    python -m megakexue.bundle.harness --model megakexue --model_args bundle=BUNDLE --tasks hellaswag,arc_easy

The second line is the harness's own program, with all its options: `lm_eval` knows only the models that it came with,
so somebody must import this module first.

Texts become tokens as in the harness's model `hf`, and are cut alike, so that an export by tools/export_hf.py gets the
same numbers (docs/evaluation.md has its arguments):

    log-likelihood   BOS context | continuation, where the continuation is what encoding both adds to the context; what
                     is too long loses tokens at the left, BOS first
    rolling          BOS text, in windows of the model's context; each token is predicted once, by all that fits
    generation       BOS context, at most as long as leaves room for the new tokens; it ends at EOS or a stop string

What must stay true: log-probabilities are float32, from the logits of CHUNK tokens at a time, and are added up in
float64; neither the batch nor the order of the requests changes a number but by rounding; each result is in the cache
as soon as its batch is done; a cache of another model is refused.
"""

import difflib
import hashlib
import json
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from megakexue.bundle.bundle import Bundle
from megakexue.bundle.evaluate import BATCH_TOKENS, CHUNK
from megakexue.bundle.generate import generate, load_decoder
from megakexue.config import UserError, require, run_program
from megakexue.core.attention import choose_backend
from megakexue.core.device import DTYPES, find_device


def _refuse() -> None:
    raise UserError("lm-evaluation-harness is not installed: pip install 'megakexue[lm-eval]'")


try:
    from jinja2 import TemplateError
    from lm_eval.api.model import CacheHook, TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table
    from tqdm import tqdm
except ImportError:
    run_program(_refuse) if __name__ == "__main__" else _refuse()

Score = tuple[float, bool]
"""The log-probability of a continuation, and whether each of its tokens is the most probable one."""
NEW_TOKENS = 256
"""That a task generates which does not say how many, as in `hf`."""
KEPT = ("results", "groups", "group_subtasks", "versions", "n-shot", "n-samples", "higher_is_better", "lm_eval_version")
"""Of the harness's results; the others describe the machine and the tasks' files."""


@register_model("megakexue")
class BundleLM(TemplateLM):
    """A bundle for the harness. The arguments are the `--model_args` of its program."""

    def __init__(
        self, bundle: str | Bundle | None = None, *, device: str | None = None, dtype: str = "fp32",
        backend: str = "auto", batch_tokens: int = BATCH_TOKENS, max_length: int | None = None,
        add_bos_token: bool = True, batch_size: int | str = 1, max_batch_size: int | None = None, **unknown: Any,
    ) -> None:  # fmt: skip
        """Load the model.

        Args:
            dtype: of the weights: fp32, bf16 or fp16.
            backend: of attention, as `attention.backend` in a config.
            batch_tokens: that go through the model at a time; a longer row goes alone.
            max_length: tokens that the model sees at a time; None: its context.
            add_bos_token: whether a text begins with BOS, as in training. A text with nothing before it always does.
            batch_size, max_batch_size: the harness gives them to each model. Batches are counted in tokens here.

        Raises:
            UserError: there is no such bundle, device, dtype or backend, or a number is out of range.
        """
        super().__init__()
        require(not unknown, f"--model_args: {', '.join(unknown)} is no argument of ours: drop it")
        if bundle is None:
            raise UserError("--model_args lacks the bundle: write bundle=PATH")
        for name, value in (("max_length", max_length), ("batch_tokens", batch_tokens)):
            is_size = value is None or (isinstance(value, int) and value > 0)
            require(is_size, f"{name}={value} must be a positive whole number")
        opened = bundle if isinstance(bundle, Bundle) else Bundle(bundle)
        require(dtype in DTYPES, f"dtype={dtype} must be one of {', '.join(DTYPES)}")
        require(
            str(batch_size) in ("1", "auto") and max_batch_size is None,
            f"batch_size={batch_size}: batches are counted in tokens, so set batch_tokens=N of --model_args",
        )
        if device == "cuda:0" and not torch.cuda.is_available():
            device = None  # the harness says cuda:0 where nobody has said anything
        self.config, self.tokenizer = opened.config, opened.load_tokenizer()
        self.max_length = self.config.rope.context if max_length is None else max_length
        self.batch_tokens, self.add_bos_token = batch_tokens, add_bos_token
        self._device = find_device(device)
        widths = self.config.head_width, self.config.value_width
        chosen, _ = choose_backend(backend, self._device.type, DTYPES[dtype], *widths)  # type: ignore[arg-type]
        self.model = load_decoder(opened, self._device, DTYPES[dtype], chosen)
        manifest = (opened.folder / "manifest.json").read_text(encoding="utf-8")  # has the hashes of the weights
        decisive = manifest, repr(self.config), dtype, self.max_length, add_bos_token
        self.fingerprint = hashlib.sha256(repr(decisive).encode()).hexdigest()

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What a text follows that has nothing before it."""
        return self.tokenizer.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return BOS, unless it is not wanted, and the ids of the text."""
        with_bos = self.add_bos_token if add_special_tokens is None else add_special_tokens
        return [self.tokenizer.bos_id] * with_bos + self.tokenizer.encode(string)

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Take a cache. Raises UserError: its results are of another model, or of other settings."""
        results = cache_hook.dbdict
        if results is not None:
            if not len(results):
                results["model"] = self.fingerprint
            require(
                results.get("model") == self.fingerprint,
                f"the cache {results.filename} has results of another model or of other settings: name another file",
            )
        super().set_cache_hook(cache_hook)

    # ------------------------------------------------------------------------------------------------- log-likelihoods

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[Score]:
        """Return the score of each request: its texts, the ids of its context, and those of its continuation."""
        found: dict[int, Score] = {}
        for i, score in self._scores([request[1:] for request in requests], disable_tqdm):
            found[i] = score
            self.cache_hook.add_partial("loglikelihood", requests[i][0], score)
        return [found[i] for i in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each text, after BOS."""
        windows: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []  # of each window, the text
        for i, request in enumerate(requests):
            ids = self.tokenizer.encode(request.args[0])
            own = get_rolling_token_windows(ids, self.prefix_token_id, max_seq_len=self.max_length, context_len=1)
            windows += [make_disjoint_window(window) for window in own]
            owners += [i] * (len(windows) - len(owners))
        totals, missing = [0.0] * len(requests), Counter(owners)
        for k, (log_prob, _) in self._scores(windows, disable_tqdm):
            i = owners[k]
            totals[i] += log_prob
            missing[i] -= 1
            if not missing[i]:
                self.cache_hook.add_partial("loglikelihood_rolling", requests[i].args, totals[i])
        return totals

    def _scores(self, pairs: Sequence[tuple[list[int], list[int]]], disable_tqdm: bool) -> Iterator[tuple[int, Score]]:
        """Yield the number and the score of each pair of context and continuation, batch by batch, longest first.

        Pairs with the same tokens but for the last one, such as the letters of a multiple choice, are one row.

        Raises:
            UserError: a continuation has no tokens, or more than the model sees at a time.
        """
        rows: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, (context, continuation) in enumerate(pairs):
            n = len(continuation)
            require(n > 0, "a task has a continuation without tokens: look at its doc_to_target and doc_to_choice")
            require(
                n <= self.max_length,
                f"a task has a continuation of {n} tokens, and the model sees {self.max_length}: leave the task out",
            )
            whole = [*(context or [self.prefix_token_id]), *continuation]
            rows[tuple(whole[-(self.max_length + 1) : -1])].append(i)
        tokens, owners = list(rows), list(rows.values())
        bar = tqdm(total=len(pairs), desc="log-likelihoods", disable=disable_tqdm or None)
        for batch in batches([len(row) for row in tokens], self.batch_tokens):
            of_batch = [(row, i) for row, k in enumerate(batch) for i in owners[k]]
            continuations = [(row, pairs[i][1]) for row, i in of_batch]
            for (_, i), score in zip(of_batch, self._score_batch([tokens[k] for k in batch], continuations)):
                yield i, score
            bar.update(len(of_batch))
        bar.close()

    @torch.no_grad()
    def _score_batch(self, rows: list[tuple[int, ...]], continuations: list[tuple[int, list[int]]]) -> list[Score]:
        """Return the score of each continuation, given with the number of its row, whose last tokens predict it."""
        longest, pad = max(map(len, rows)), self.tokenizer.pad_id
        tokens = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows], device=self._device)
        positions = torch.arange(longest, device=self._device).expand_as(tokens)
        hidden = self.model.hidden(tokens, positions, n_positions=longest).flatten(0, 1)
        ends = [(row * longest + len(rows[row]), len(ids)) for row, ids in continuations]
        places = torch.cat([torch.arange(end - n, end) for end, n in ends]).to(self._device)
        targets = torch.tensor([token for _, ids in continuations for token in ids], device=self._device)
        log_probs, is_best = [], []
        for at, target in zip(places.split(CHUNK), targets.split(CHUNK)):
            logits = self.model.head(hidden[at]).float()
            log_probs.append(-functional.cross_entropy(logits, target, reduction="none"))
            is_best.append(logits.argmax(-1) == target)
        lengths = [n for _, n in ends]
        parts = torch.cat(log_probs).double().cpu().split(lengths), torch.cat(is_best).cpu().split(lengths)
        return [(float(own.sum()), bool(best.all())) for own, best in zip(*parts)]

    # ------------------------------------------------------------------------------------------------------ generation

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the continuation of each context up to the first stop string, EOS, or the number of tokens.

        Raises:
            UserError: a task asks for what `generate` does not have, or for more tokens than the model sees.
        """
        alike: dict[str, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            alike[json.dumps(request.args[1], sort_keys=True)].append(i)
        texts: dict[int, str] = {}
        seeds = _seeds([request.args[0] for request in requests])
        bar = tqdm(total=len(requests), desc="generation", disable=disable_tqdm or None)  # None: on a terminal
        for indices in alike.values():
            options = normalize_gen_kwargs(requests[indices[0]].args[1], NEW_TOKENS)
            n_new, until = options.pop("max_gen_toks"), options.pop("until")
            room = self.max_length - n_new
            require(
                room > 0,
                f"a task generates {n_new} tokens, and the model sees {self.max_length} in all: lower max_gen_toks in "
                "the task's generation_kwargs",
            )
            drawn = _how_to_draw(options)
            prompts = [self.tok_encode(requests[i].args[0])[-room:] or [self.prefix_token_id] for i in indices]
            for batch in batches([len(prompt) + n_new for prompt in prompts], self.batch_tokens):
                # texts of sampling depend on the request, and not on the batch or on what was in the cache
                own = [seeds[indices[k]] for k in batch]
                found = self._continue([prompts[k] for k in batch], n_new, until, seed=own, **drawn)
                for k, text in zip(batch, found):
                    texts[indices[k]] = text
                    self.cache_hook.add_partial("generate_until", requests[indices[k]].args, text)
                bar.update(len(batch))
        bar.close()
        return [texts[i] for i in range(len(requests))]

    def _continue(self, prompts: list[list[int]], n_tokens: int, until: list[str], **drawn: Any) -> list[str]:
        """Return what follows each prompt, before the first stop string."""
        ids: list[list[int]] = [[] for _ in prompts]
        texts, running = [""] * len(prompts), set(range(len(prompts)))
        tokenizer = self.tokenizer
        steps = generate(
            self.model, prompts, n_tokens=n_tokens, stop_id=tokenizer.eos_id, vocab_size=tokenizer.vocab_size, **drawn
        )
        for tokens in steps:
            for i in list(running):
                if (token := tokens[i]) is not None:
                    ids[i].append(token)
                    texts[i] = tokenizer.decode(ids[i])
                if token is None or any(stop and stop in texts[i] for stop in until):
                    running.remove(i)
            if not running:
                break
        return [postprocess_generated_text(text, until, None) for text in texts]


def batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Yield the numbers of the rows, longest first, as many at a time as fit into `batch_tokens` after padding."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    at = 0
    while at < len(order):
        n = max(1, batch_tokens // lengths[order[at]])
        yield order[at : at + n]
        at += n


def _seeds(prompts: list[str]) -> list[int]:
    """Return a seed for each text: by its prompt, and by how often the prompt came before."""
    seen: Counter[str] = Counter()
    seeds = []
    for prompt in prompts:
        seeds.append(zlib.crc32(f"{seen[prompt]} {prompt}".encode()))
        seen[prompt] += 1
    return seeds


def _how_to_draw(options: dict[str, Any]) -> dict[str, float]:
    """Return temperature and top-p from the rest of a task's generation_kwargs. Raises UserError: there are others."""
    is_drawn = options.pop("do_sample")
    temperature, top_p = options.pop("temperature", 0.0), options.pop("top_p", 1.0)
    options = {key: value for key, value in options.items() if (key, value) != ("num_beams", 1)}
    require(not options, f"a task sets {', '.join(options)} in its generation_kwargs, which our generation lacks")
    return {"temperature": temperature, "top_p": top_p} if is_drawn else {"temperature": 0.0}


# ------------------------------------------------------------------------------------------------------------- programs


def load_tasks(names: list[str], folders: list[Path]) -> list[Any]:
    """Return the harness's tasks and groups, with their data.

    Args:
        names: of tasks, groups or tags, also with `*`.
        folders: with YAML files of tasks, whose `!function` is code that is run. The harness's own tasks come before
            them, and are only looked at if a name is in no folder: reading all their files takes 20 s.

    Raises:
        UserError: there is no such task, or its data cannot be had.
    """
    from lm_eval.tasks import TaskManager

    paths = [str(folder) for folder in folders]
    manager = TaskManager(include_path=paths, include_defaults=False)
    if not all(manager.match_tasks([name]) for name in names):
        manager = TaskManager(include_path=paths)
    for name in names:
        near = difflib.get_close_matches(name, manager.all_tasks, n=3)
        advice = f"did you mean {' or '.join(near)}?" if near else "`lm_eval ls tasks` lists its own"
        where = ", ".join(["lm_eval", *paths])
        require(bool(manager.match_tasks([name])), f"--tasks {name}: there is no such task in {where}: {advice}")
    found = sorted({match for name in names for match in manager.match_tasks([name])})
    try:
        loaded = manager.load(found)
    except Exception as error:  # of the task's own code, of the packages for data, or of the network
        advice = ": without a network, take tasks whose data is here" if isinstance(error, ConnectionError) else ""
        if isinstance(error, FileNotFoundError):
            advice = f": a task's data_files count from the folder of the command, which is {Path.cwd()}"
        raise UserError(f"the data of {', '.join(found)} cannot be loaded: {_one_line(error)}{advice}") from error
    groups = [group for name, group in loaded.get("groups", {}).items() if name in found]
    inner = {task.task_name for group in groups for task in group.get_all_tasks()}
    return groups + [task for name, task in loaded["tasks"].items() if name not in inner]


def run_tasks(
    lm: BundleLM, tasks: list[Any], *, n_shots: int | None = None, limit: int | None = None, cache: Path | None = None
) -> dict[str, Any]:
    """Run what `load_tasks` has given and return the harness's results: numbers by task and metric.

    Args:
        n_shots: examples before each question; None: as the task says.
        limit: take only the first documents of each task.
        cache: folder for results, a file for each model; what is in it is not computed again.

    Raises:
        UserError: a task does not fit its data or the model, or the cache cannot be written.
    """
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    try:
        results = simple_evaluate(
            lm, tasks=tasks, num_fewshot=n_shots, limit=limit, log_samples=False,
            task_manager=TaskManager(include_defaults=False),  # they are loaded, and it need not look for any
            use_cache=None if cache is None else str(cache / lm.fingerprint[:16]),
        )  # fmt: skip
    except (OSError, TemplateError) as error:
        raise UserError(f"the tasks cannot be run: {_one_line(error)}") from error
    return {key: results[key] for key in KEPT if key in results}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def table(results: dict[str, Any]) -> str:
    """Return the harness's table of tasks, and of groups where there are any."""
    return "\n".join(make_table(results, column) for column in ("results", "groups") if results.get(column))


def main() -> None:
    """Run the harness's own program, which now knows the model `megakexue`."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    run_program(main)
