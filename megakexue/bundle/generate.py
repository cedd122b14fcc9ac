"""Text from a bundle, for a batch of prompts, with a cache: greedy, or drawn with a seed by temperature and top-p.

    p = softmax(logits / temperature), cut to the smallest set of the most probable tokens with mass >= top_p

A draw is one uniform number u of the row's own generator: the first token, in the order of probability, at which the
sum of p is above u times the mass of the set. So the whole batch is drawn at once, and what is not in the set need not
be sorted.

Prompts of different lengths are padded on the right. The cache keeps a token in the slot of its position, so the tokens
that follow overwrite the padding before any query sees it (megakexue/core/decoder.py, Cache).

What must stay true: up to rounding, the same seed gives the same text whatever other prompts are in the batch; the
cache changes nothing but the rounding; ids that the tokenizer does not have (a padded vocabulary) are never chosen.
"""

import codecs
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor
from torch.nn import functional

from megakexue.bundle.bundle import TrainedModel
from megakexue.config import require
from megakexue.core.attention import Backend
from megakexue.core.decoder import Cache, Decoder
from megakexue.core.device import find_device
from megakexue.text.tokenizer import Tokenizer

PREFILL = 512
"""Prompt tokens that go through the model at once: a long prompt must not cost the square of its length in memory."""

CANDIDATES = 512
"""The most probable tokens that are looked at first, which takes a tenth of the time of sorting all tokens."""


def load_decoder(
    source: TrainedModel, device: torch.device | None = None, dtype: torch.dtype = torch.float32,
    backend: Backend = "sdpa",
) -> Decoder:  # fmt: skip
    """Return the model of a bundle or of a checkpoint, ready to compute."""
    with torch.device(device or find_device()):
        model = Decoder(source.config, backend).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(source.weight(name))
    return model.eval()


def next_tokens(
    logits: Float[Tensor, "n v"], *, temperature: float, top_p: float, generators: Sequence[torch.Generator]
) -> list[int]:
    """Choose a token for each row: the best one at temperature 0, else a draw from the smallest set of mass `top_p`.

    The draw is made on the CPU in float64, so that it depends on the logits and the row's generator alone. The device
    is waited for once.

    Raises:
        UserError: logits are not finite.
    """
    if temperature != 0:
        logits = logits.cpu()
    is_finite = torch.stack(logits.aminmax()).isfinite().all()
    if temperature == 0:
        chosen = logits.argmax(-1)
    else:
        wide = logits.double()
        probabilities = torch.softmax((wide - wide.amax(-1, keepdim=True)) / temperature, dim=-1)
        uniform = torch.cat([torch.rand(1, dtype=torch.float64, generator=generator) for generator in generators])
        chosen = _draw(probabilities, top_p, uniform, CANDIDATES)
    *tokens, all_finite = torch.cat([chosen, is_finite[None]]).tolist()
    require(
        bool(all_finite),
        "the model's logits are not finite: generate in fp32, and if that is what this is, from other weights",
    )
    return tokens


def _draw(
    probabilities: Float64[Tensor, "n v"], top_p: float, uniform: Float64[Tensor, " n"], n_candidates: int
) -> Int64[Tensor, " n"]:
    """Return the tokens at which `uniform` falls. The number of candidates changes nothing but the time."""
    is_partial = n_candidates < probabilities.shape[1]
    if is_partial:
        # in the order of ids, so that the stable sort puts equal ones in the order that it gives to all tokens
        index = probabilities.topk(n_candidates, sorted=False).indices.sort().values
        ordered, order = probabilities.gather(1, index).sort(descending=True, stable=True)
        order = index.gather(1, order)
    else:
        ordered, order = probabilities.sort(descending=True, stable=True)
    total = ordered.cumsum(-1)
    before = functional.pad(total[:, :-1], (1, 0))
    last = (before < top_p).sum(-1, keepdim=True) - 1  # the first token is always in the set
    # below `last` at the latest: u is at most 1 - 2^-53, with which a product is rounded to less than the mass
    place = (total <= uniform[:, None] * total.gather(1, last)).sum(-1, keepdim=True)
    chosen = order.gather(1, place)[:, 0]
    if is_partial:
        # the set may go on where its last token is as probable as the least candidate
        is_open = (ordered.gather(1, last) <= ordered[:, -1:])[:, 0]
        if is_open.any():
            chosen[is_open] = _draw(probabilities[is_open], top_p, uniform[is_open], probabilities.shape[1])
    return chosen


@torch.no_grad()
def generate(
    model: Decoder, prompts: Sequence[list[int]], *, n_tokens: int, stop_id: int | None, vocab_size: int | None = None,
    temperature: float = 0.8, top_p: float = 0.95, seed: int | Sequence[int] = 0, caches: list[Cache] | None = None,
) -> Iterator[list[int | None]]:  # fmt: skip
    """Yield up to `n_tokens` times the next token of every prompt, or None for a prompt that has ended.

    Args:
        prompts: token ids, each beginning with BOS. Row i draws with seed + i, or with seed[i], as it would alone with
            that seed. In half precision the rounding of the logits depends on the batch, so texts may differ.
        stop_id: the token that ends a text and is not yielded. None: no token does.
        vocab_size: of the tokenizer; ids from there on are never chosen. None: the model's.
        caches: empty ones, one for each layer, for a caller that reads them afterwards.

    Raises:
        UserError: temperature or top_p is out of range, or logits are not finite.
    """
    require(0 <= temperature < math.inf, f"temperature={temperature} must be finite and not negative; 0 is greedy")
    require(0 < top_p <= 1, f"top_p={top_p} must be in (0, 1]")
    assert prompts and all(prompts), "there is a prompt, and each has at least its BOS"
    device = model.embedding.weight.device
    seeds = range(seed, seed + len(prompts)) if isinstance(seed, int) else seed
    generators = [torch.Generator().manual_seed(own) for own in seeds]
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    longest = int(lengths.max())
    caches = caches or [Cache() for _ in model.blocks]
    rows = torch.tensor([prompt + [prompt[0]] * (longest - len(prompt)) for prompt in prompts], device=device)
    # the prompts, in parts; of each row the hidden state of its last token is kept
    last = torch.zeros(len(prompts), model.config.d_model, dtype=model.embedding.weight.dtype, device=device)
    for low in range(0, longest, PREFILL):
        high = min(low + PREFILL, longest)
        positions = torch.arange(low, high, device=device).expand(len(prompts), -1)
        hidden = model.hidden(rows[:, low:high], positions, caches=caches, n_positions=high)
        ends_here = (low < lengths) & (lengths <= high)
        last[ends_here] = hidden[ends_here, lengths[ends_here] - 1 - low]
    running = list(range(len(prompts)))
    for step in range(n_tokens):
        logits = model.head(last)[:, :vocab_size]
        if len(running) < len(prompts):
            logits = logits[running]
        own = [generators[i] for i in running]
        tokens = next_tokens(logits, temperature=temperature, top_p=top_p, generators=own)
        chosen: list[int | None] = [None] * len(prompts)
        for i, token in zip(list(running), tokens, strict=True):
            if token == stop_id:
                running.remove(i)
            else:
                chosen[i] = token
        if not running:
            return
        yield chosen
        if step == n_tokens - 1:
            return
        # a row that has ended is computed too, and its result is not used
        fed = torch.tensor([[p[0] if token is None else token] for p, token in zip(prompts, chosen)], device=device)
        positions = (lengths + step)[:, None]
        last = model.hidden(fed, positions, caches=caches, n_positions=longest + step + 1)[:, 0]


def complete(
    model: Decoder, tokenizer: Tokenizer, texts: Sequence[str | bytes], **options: Any
) -> Iterator[list[str | None]]:
    """Yield the continuations of `texts`: for each token a string, or None when the text has ended.

    `options` are those of `generate`. The bytes of a character come together with its last one; until then the string
    is empty. A character that is never finished does not come. Bytes that cannot be UTF-8 show as U+FFFD.
    """
    prompts = [encode_prompt(tokenizer, text) for text in texts]
    decoders = [codecs.getincrementaldecoder("utf-8")(errors="replace") for _ in texts]
    options = {"stop_id": tokenizer.eos_id, "vocab_size": tokenizer.vocab_size} | options
    for tokens in generate(model, prompts, **options):
        yield [
            None if token is None else decoder.decode(tokenizer.piece(token))
            for token, decoder in zip(tokens, decoders, strict=True)
        ]


def encode_prompt(tokenizer: Tokenizer, text: str | bytes) -> list[int]:
    """Return the tokens that a text is continued from: BOS and its own."""
    return [tokenizer.bos_id, *tokenizer.encode(text)]
