"""Every family learns: what comes three tokens later is known, to a model that remembers three."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moejax import step as step_lib
from tests import tiny

STEPS, ROWS, PERIOD = 200, 32, 3
# Nothing tells the first tokens of a sequence; all others repeat them.
LEAST = (PERIOD - 1) / tiny.L * np.log(tiny.V - 1)


def _batches():
  """Sequences of three random tokens in a circle, of every step."""
  ids = np.random.default_rng(0).integers(1, tiny.V, (STEPS, ROWS, PERIOD), dtype=np.int32)
  ids = np.tile(ids, tiny.L // PERIOD + 1)[..., : tiny.L + 1]
  same = {name: tiny.batch(rows=ROWS)[name] for name in ('segments', 'positions')}
  return {'inputs': ids[..., :-1], 'targets': ids[..., 1:]}, same


@pytest.mark.heavy
@pytest.mark.parametrize('model', tiny.models(slow='moe in mamba2'))
def test_two_hundred_steps_teach_it_to_remember(model):
  config = tiny.model_config(**tiny.MODELS[model], init_scale=1.0, d_model=24)
  optimizer = optax.adam(1e-2)
  step = tiny.train_step(config, optimizer, schedule=lambda step: jnp.float32(1e-2))
  ids, same = _batches()

  @jax.jit
  def run(key):
    state = step_lib.init_state(config, optimizer, key)
    return jax.lax.scan(lambda state, ids: step(state, ids | same), state, ids)[1]['loss']

  losses = np.asarray(run(jax.random.key(0)))
  print(model, LEAST, losses[:3], losses[[50, 100, 150]], losses[-10:].mean())
  assert losses[0] > 0.9 * np.log(tiny.V)
  assert losses[-10:].mean() < 1.5 * LEAST
