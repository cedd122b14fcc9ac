"""Text from a bundle: greedy, or by temperature and top-p with a seed, with a key/value cache."""

import codecs
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from megakexue import dist
from megakexue.attention import choose_backend
from megakexue.config import require
from megakexue.export import Bundle
from megakexue.model import Decoder, KVCache
from megakexue.tokenizer import Tokenizer


def load_decoder(bundle: Bundle, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> Decoder:
    """Return the bundle's model, ready to compute."""
    device = device or dist.device()
    # a few queries against a cache: the fused and blocked forms have nothing to win
    backend, _ = choose_backend("reference", device.type, dtype, bundle.config.head_width, 1)
    with torch.device(device):
        model = Decoder(bundle.config, backend).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(bundle.weight(name))
    return model.eval()


def next_token(logits: Float[Tensor, "v"], *, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """Choose a token: the best one at temperature 0, else a draw from the smallest set of mass `top_p`."""
    if temperature == 0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits.float().cpu() / temperature, dim=-1)
    ordered, index = probabilities.sort(descending=True)
    ordered = ordered.where(ordered.cumsum(0) - ordered < top_p, 0)  # the first token is always kept
    return int(index[torch.multinomial(ordered, 1, generator=generator)])


@torch.no_grad()
def generate(
    model: Decoder,
    prompt: list[int],
    *,
    n_tokens: int,
    stop_id: int,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
) -> Iterator[int]:
    """Yield up to `n_tokens` tokens after `prompt` (which begins with BOS), ending before `stop_id`.

    Raises:
        UserError: temperature or top_p is out of range.
    """
    require(temperature >= 0, f"temperature={temperature} must not be negative; 0 is greedy")
    require(0 < top_p <= 1, f"top_p={top_p} must be in (0, 1]")
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    caches = [KVCache() for _ in model.blocks]
    n_positions = len(prompt) + n_tokens
    tokens: Int64[Tensor, "1 t"] = torch.tensor([prompt], device=device)
    position = 0
    for _ in range(n_tokens):
        positions = torch.arange(position, position + tokens.shape[1], device=device)[None]
        logits = model(tokens, positions, caches=caches, n_positions=n_positions)[0, -1]
        position += tokens.shape[1]
        token = next_token(logits, temperature=temperature, top_p=top_p, generator=generator)
        if token == stop_id:
            return
        yield token
        tokens = torch.tensor([[token]], device=device)


def complete(model: Decoder, tokenizer: Tokenizer, text: str, **options: float | int) -> Iterator[str]:
    """Yield the continuation of `text` piece by piece; bytes of an unfinished character are held back."""
    prompt = [tokenizer.bos_id, *tokenizer.encode(text)]
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in generate(model, prompt, stop_id=tokenizer.eos_id, **options):  # type: ignore[arg-type]
        if piece := decoder.decode(tokenizer.decode_bytes([token])):
            yield piece
