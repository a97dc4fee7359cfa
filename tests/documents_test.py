"""What tokens see of the other documents in their sequence, on batches of a text source."""

import json

import jax
import numpy as np
import pytest

from configs import dense
from moejax import data, model as model_lib
from tests import tiny


@pytest.fixture
def batch(tmp_path):
  lines = [json.dumps({'text': ' document'[: 2 + i % 5]}) for i in range(200)]
  (tmp_path / 'a.jsonl').write_text('\n'.join(lines))
  section = dense.get_config('debug').data.to_dict()
  section |= {'source': 'jsonl', 'files': f'{tmp_path}/a.jsonl', 'batch_size': tiny.B}
  config = data.DataConfig(**section | {'sequence_length': tiny.L})
  return data.make_loader(config, 'train').batch(0)


def _nats(config, params, batch):
  return jax.jit(lambda batch: model_lib.bind(config, params).loss(batch)[0])(batch)


@pytest.mark.parametrize(
  ('blocks', 'positions'), [(tiny.DENSE, 'rope'), (tiny.MAMBA, 'learned')], ids=['rope', 'mamba']
)
def test_document_mask_keeps_documents_apart(batch, blocks, positions):
  changes = {'vocab_size': 259, 'blocks': blocks, 'positions': positions, 'num_heads': 2}
  masked = tiny.model_config(**changes, document_mask=True)
  params = jax.jit(model_lib.init_params, static_argnums=0)(masked, jax.random.key(0))
  first = batch['segments'] == 1
  other = {**batch, 'inputs': np.where(first, batch['inputs'] % 200 + 40, batch['inputs'])}
  counted = {'counted': ~first}
  assert counted['counted'].sum() > tiny.B
  nats, nats_of_other = (_nats(masked, params, b | counted) for b in (batch, other))
  assert nats == nats_of_other
  # Without the mask a sequence is one text: the first document matters, positions do not restart.
  whole = tiny.model_config(**changes)
  nats, nats_of_other = (_nats(whole, params, b | counted) for b in (batch, other))
  assert abs(nats - nats_of_other) > 1e-3
  places = np.broadcast_to(np.arange(tiny.L, dtype=np.int32), first.shape)
  assert nats == _nats(whole, params, batch | counted | {'positions': places})
