"""DeepNorm's scales, and what a resolved config holds."""

import pytest

from megakexue.config import ModelConfig, ResolvedRope, RopeConfig
from megakexue.core.resolve import deepnorm_scales, resolve
from tests.helpers import tiny

# DeepNet's decoder row and 8978's, by the number of layers M: (2M)^1/4, (8M)^-1/4, (2M)^-1/2
DEEPNORM = {
    2: (1.414214, 0.5, 0.5), 4: (1.681793, 0.420448, 0.353553), 6: (1.861210, 0.379918, 0.288675),
    8: (2, 0.353553, 0.25), 12: (2.213364, 0.319472, 0.204124), 16: (2.378414, 0.297302, 0.176777),
    24: (2.632148, 0.268642, 0.144338), 28: (2.735565, 0.258487, 0.133631), 32: (2.828427, 0.25, 0.125),
    36: (2.912951, 0.242746, 0.117851), 40: (2.990698, 0.236435, 0.111803), 48: (3.130169, 0.225901, 0.102062),
    64: (3.363586, 0.210224, 0.088388), 80: (3.556559, 0.198818, 0.079057), 96: (3.722419, 0.189959, 0.072169),
    100: (3.760603, 0.18803, 0.070711), 1000: (6.687403, 0.105737, 0.022361),
}  # fmt: skip


@pytest.mark.parametrize("n_layers", DEEPNORM)
def test_deepnorm_table(n_layers: int) -> None:
    alpha, beta, root = DEEPNORM[n_layers]
    assert deepnorm_scales("paper", n_layers) == pytest.approx((alpha, beta), abs=1e-6)
    assert deepnorm_scales("sgd", n_layers) == pytest.approx((alpha, 1 / alpha), abs=1e-6)
    assert deepnorm_scales("adam", n_layers) == pytest.approx((1 / root, root), rel=1e-4)
    assert deepnorm_scales("lamb", n_layers) == pytest.approx((1, root), abs=1e-6)
    # the conditions that 8978 derives them from: lambda / alpha, and for LAMB lambda^2 / alpha
    for recipe, power, condition in (
        ("sgd", 1, (2 * n_layers) ** -0.5),
        ("adam", 1, 1 / (2 * n_layers)),
        ("lamb", 2, 1 / (2 * n_layers)),
    ):
        a, gain = deepnorm_scales(recipe, n_layers)
        assert gain**power / a == pytest.approx(condition)


def test_the_row_of_each_optimizer() -> None:
    # an update that does not depend on the gradient's size, nor on the weights', is in the row of Adam: Muon's too
    given = ModelConfig(vocab_size=97, d_model=48, n_layers=3, n_heads=6, d_ff=80)
    alphas = {name: resolve(given, name, 64).residual_alpha for name in ("tiger", "lion", "adamw", "muon")}
    assert alphas == {"tiger": 1.0, "lion": 6**0.5, "adamw": 6**0.5, "muon": 6**0.5}


def test_resolved_scales_are_numbers_and_given_ones_are_kept() -> None:
    config = tiny(embed_scale=3.0, logit_scale=0.1, residual_alpha=1.5, rope=RopeConfig(base=9000, context=128))
    assert (config.embed_scale, config.logit_scale, config.residual_alpha) == (3.0, 0.1, 1.5)
    assert config.rope == ResolvedRope(base=9000.0, context=128)
    default = tiny()
    assert isinstance(default.rope.base, float) and default.rope.context == 64
    assert default.residual_alpha == pytest.approx(6**0.5) and default.branch_gain == pytest.approx(1 / 6)
    assert resolve(default, "adamw", 9999) == default
