"""The update rule against the paper's two lines."""

import jax.numpy as jnp
import numpy as np
import optax
from conftest import run_config

from alexnet_jax import optim


def test_update_rule_is_the_papers_through_a_rate_cut() -> None:
    """Section 5: v <- 0.9 v - 0.0005 e w - e g; w <- w + v."""
    config = run_config("imagenet2012", **{"optim.cut_epochs": (3.0, 5.0)}).optim
    rule = optim.sgd(config, optim.schedule(config, steps_per_epoch=2))
    generator = np.random.default_rng(0)
    w = generator.normal(size=5)
    params = {"w": jnp.array(w)}
    state = rule.init(params)
    v = np.zeros(5)
    for step in range(14):
        rate = 0.01 if step < 6 else 0.001 if step < 10 else 0.0001
        g = generator.normal(size=5)
        updates, state = rule.update({"w": jnp.array(g)}, state, params)
        params = optax.apply_updates(params, updates)
        v = 0.9 * v - 0.0005 * rate * w - rate * g
        w = w + v
        np.testing.assert_allclose(params["w"], w, rtol=1e-5)


def test_the_paper_cuts_the_rate_three_times_by_ten() -> None:
    rate = optim.schedule(run_config("imagenet2012").optim, steps_per_epoch=10)
    steps = [0, 229, 230, 509, 510, 779, 780, 899]
    np.testing.assert_allclose(
        [rate(step) for step in steps], [1e-2, 1e-2, 1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5], rtol=1e-5
    )
