"""Whether the model of an export, as transformers loads it, is ours: the logits of both on real text.

What must stay true: no code of the folder is run; the modelling file that it holds is that of this package.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megakexue.bundle.bundle import TrainedModel
from megakexue.bundle.generate import load_decoder
from megakexue.config import UserError, require
from megakexue.core.device import find_device

TOLERANCE = 1e-4
"""The largest difference of a logit, as a share of the logits' standard deviation. Another order of the sums in float32
changes them by 1e-6 to 1e-5 of it; a forgotten scale by more than 0.01."""
N_TOKENS = 256
"""At most so many tokens are looked at."""
N_STEPS = 16
"""The last of them go through the cache one by one."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """What the check has found: differences as shares of the standard deviation of the logits."""

    n_tokens: int
    whole: float
    """The largest one, of a row at once."""
    cached: float
    """The largest one, of a row whose last tokens come one by one."""
    rounded: tuple[float, float] | None
    """What rounding to the dtype of the export changes, as root mean square, and the share of the tokens after which
    the best token stays the same; None: nothing is rounded."""

    def __str__(self) -> str:
        text = (
            f"on {self.n_tokens} tokens in float32, logits differ by {self.whole:.1e} of their deviation, "
            f"with the cache by {self.cached:.1e}"
        )
        if self.rounded is None:
            return text
        rms, same = self.rounded
        return f"{text}; rounding the weights moves logits by {rms:.1e} and keeps {same:.1%} of the best tokens"


@torch.no_grad()
def compare(
    model: TrainedModel, folder: Path, weights: Iterable[tuple[str, Tensor]], ids: list[int],
    device: torch.device | None,
) -> Agreement:  # fmt: skip
    """Load the folder by transformers in float32 and compare.

    Args:
        weights: of the class in the folder, before they were rounded. The files must hold them rounded; the logits are
            compared without the rounding.
        ids: real text, of which the first tokens are used.

    Raises:
        UserError: transformers is missing, or what it computes is not what our model does.
    """
    device = device or find_device()
    ids = ids[: min(N_TOKENS, model.config.rope.context)]
    require(len(ids) > N_STEPS, f"the text of the check has {len(ids)} tokens: give more than {N_STEPS} with --text")
    tokens = torch.tensor([ids], device=device)
    positions = torch.arange(len(ids), device=device)[None]
    ours = load_decoder(model, device)(tokens, positions)[0]
    theirs = load(folder).to(device)
    rounded = theirs(tokens).logits[0]
    is_rounded = _restore(theirs, weights, folder)
    whole = theirs(tokens).logits[0]
    deviation = ours.std()
    agreement = Agreement(
        n_tokens=len(ids),
        whole=_largest(whole - ours) / deviation.item(),
        cached=_largest(_stepwise(theirs, tokens) - ours) / deviation.item(),
        rounded=(
            ((rounded - whole).square().mean().sqrt() / deviation).item(),
            (rounded.argmax(-1) == whole.argmax(-1)).double().mean().item(),
        )
        if is_rounded
        else None,
    )
    require(
        max(agreement.whole, agreement.cached) <= TOLERANCE,
        f"the exported model is not ours: {agreement}; at most {TOLERANCE:g} is rounding",
    )
    return agreement


def _largest(difference: Tensor) -> float:
    """Return the largest magnitude; infinite where a logit is not a number."""
    return difference.abs().nan_to_num(nan=float("inf")).max().item()


def load(folder: Path) -> Any:
    """Return the model of an export as transformers loads it, in float32. Raises UserError: transformers is missing."""
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            "the check needs transformers: pip install 'megakexue[hf]', or leave the check out with --no-check"
        ) from error
    from megakexue.bundle.modeling_megakexue import MegakexueForCausalLM

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    is_ours = (folder / "modeling_megakexue.py").exists()
    loader = MegakexueForCausalLM if is_ours else transformers.AutoModelForCausalLM
    return loader.from_pretrained(folder, dtype=torch.float32).eval()


def _restore(model: Any, weights: Iterable[tuple[str, Tensor]], folder: Path) -> bool:
    """Put in the weights before rounding; return whether any was rounded.

    Raises:
        UserError: the model has other parameters, or other values than the rounded ones.
    """
    parameters = dict(model.named_parameters())
    is_rounded = False
    for name, weight in weights:
        require(name in parameters, f"{folder}: transformers' {type(model).__name__} has no parameter {name}")
        parameter, exact = parameters.pop(name), weight.float()
        exact = exact.to(parameter.device)
        for dtype in (torch.float32, torch.bfloat16):
            if torch.equal(parameter, exact.to(dtype).float()):
                is_rounded |= dtype != torch.float32
                break
        else:
            raise UserError(f"{folder}: transformers loads other values of {name} than were written")
        parameter.copy_(exact)
    require(not parameters, f"{folder}: transformers' {type(model).__name__} has {sorted(parameters)[:3]} too")
    return is_rounded


def _stepwise(model: Any, tokens: Tensor) -> Tensor:
    """Return the logits [t, v] of a row of which the last tokens come one by one, through the cache."""
    n_first = tokens.shape[1] - N_STEPS
    out = model(tokens[:, :n_first], use_cache=True)
    cache = "cache" if "cache" in out else "past_key_values"  # since transformers 5.2x, and before
    parts = [out.logits]
    for i in range(n_first, tokens.shape[1]):
        out = model(tokens[:, i : i + 1], use_cache=True, **{cache: out[cache]})
        parts.append(out.logits)
    return torch.cat(parts, dim=1)[0]
