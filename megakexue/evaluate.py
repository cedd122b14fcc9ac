"""Validation loss: the mean over the target tokens of fixed rows, the same for any world size."""

import torch

from megakexue import dist
from megakexue.data import Batches
from megakexue.engine import Engine


def validation_loss(engine: Engine, batches: Batches, n_rows: int) -> tuple[float, int]:
    """Return (mean loss in nats, target tokens) over the first `n_rows` validation rows, on every rank."""
    total = torch.zeros(2, dtype=torch.float64, device=engine.device)
    for batch in batches.first_rows(n_rows):
        loss = engine.evaluation_loss(batch)
        total += torch.stack([loss.double(), loss.new_tensor(batch.n_targets, dtype=torch.float64)])
    loss_sum, n_tokens = dist.sum_over_ranks(total).tolist()
    return loss_sum / max(1, n_tokens), int(n_tokens)
