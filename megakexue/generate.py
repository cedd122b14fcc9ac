"""Text from a bundle: greedy, or by temperature and top-p with a seed, with a key/value cache.

    p = softmax(logits / temperature), cut to the smallest set of the most probable tokens with mass >= top_p

What must stay true: the same seed gives the same text; the cache changes nothing but the rounding; ids that the
tokenizer does not have (a padded vocabulary) are never chosen, whatever their logits.
"""

import codecs
import math
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from megakexue import dist
from megakexue.config import require
from megakexue.export import Bundle
from megakexue.model import Decoder, KVCache
from megakexue.tokenizer import Tokenizer

PREFILL = 512
"""Prompt tokens that go through the model at once: a long prompt must not cost the square of its length in memory."""


def load_decoder(bundle: Bundle, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> Decoder:
    """Return the bundle's model, ready to compute."""
    with torch.device(device or dist.device()):
        # a few queries against a cache: the fused and blocked forms have nothing to win
        model = Decoder(bundle.config, "reference").to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(bundle.weight(name))
    return model.eval()


def next_token(logits: Float[Tensor, " v"], *, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """Choose a token: the best one at temperature 0, else a draw from the smallest set of mass `top_p`.

    The draw is made on the CPU in float64, so that it depends on the logits and the generator alone.
    """
    require(bool(logits.isfinite().all()), "the model's logits are not finite in this dtype: generate in fp32")
    if temperature == 0:
        return int(logits.argmax())
    logits = logits.double().cpu()
    probabilities = torch.softmax((logits - logits.max()) / temperature, dim=-1)
    ordered, index = probabilities.sort(descending=True, stable=True)
    ordered = ordered.where(ordered.cumsum(0) - ordered < top_p, 0)  # the first token is always kept
    return int(index[torch.multinomial(ordered, 1, generator=generator)])


@torch.no_grad()
def generate(
    model: Decoder,
    prompt: list[int],
    *,
    n_tokens: int,
    stop_id: int,
    vocab_size: int | None = None,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
) -> Iterator[int]:
    """Yield up to `n_tokens` tokens after `prompt` (which begins with BOS), ending before `stop_id`.

    Args:
        vocab_size: of the tokenizer; ids from there on are never chosen. None: the model's.

    Raises:
        UserError: temperature or top_p is out of range, or logits are not finite.
    """
    require(0 <= temperature < math.inf, f"temperature={temperature} must be finite and not negative; 0 is greedy")
    require(0 < top_p <= 1, f"top_p={top_p} must be in (0, 1]")
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    caches = [KVCache() for _ in model.blocks]
    tokens: Int64[Tensor, "1 t"] = torch.tensor([prompt], device=device)
    n_seen = 0
    for _ in range(n_tokens):
        for part in tokens.split(PREFILL, dim=1):
            positions = torch.arange(n_seen, n_seen + part.shape[1], device=device)[None]
            logits = model(part, positions, caches=caches, n_positions=len(prompt) + n_tokens)[0, -1]
            n_seen += part.shape[1]
        token = next_token(logits[:vocab_size], temperature=temperature, top_p=top_p, generator=generator)
        if token == stop_id:
            return
        yield token
        tokens = torch.tensor([[token]], device=device)


def complete(model: Decoder, tokenizer: Tokenizer, text: str | bytes, **options: float | int) -> Iterator[str]:
    """Yield the continuation of `text`, a string for each token; `options` are those of `generate`.

    The bytes of an unfinished character are held back (the string is then empty) and come with its last one. If it is
    never finished they do not come; bytes that cannot be UTF-8 show as U+FFFD.
    """
    prompt = [tokenizer.bos_id, *tokenizer.encode(text)]
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    options = {"stop_id": tokenizer.eos_id, "vocab_size": tokenizer.vocab_size} | options
    for token in generate(model, prompt, **options):  # type: ignore[arg-type]
        yield decoder.decode(tokenizer.decode_bytes([token]))
