"""MaxText 0.2.5: its training step, set up and called as its training loop does."""

import os
import pathlib
import tempfile

from benchmarks.peers.contenders import worker


def prepare(task):
  os.environ['DECOUPLE_GCLOUD'] = 'TRUE'  # before its import
  import jax
  import maxtext
  from flax import nnx
  from maxtext.trainers.pre_train import train
  from maxtext.utils import sharding, train_utils

  base = pathlib.Path(maxtext.__file__).parent / 'configs' / 'base.yml'
  options = _options(task) | task['changes']
  config, recorder = train.initialize(['', str(base), *(f'{k}={v}' for k, v in options.items())])
  _, _, shardings, model, mesh, _, _, loader, rampup, _, state = train_utils.setup_train_loop(
    config, recorder
  )
  module, state = nnx.split(state)
  of_params, shardings = sharding.maybe_update_params_sharding_with_opt(config, shardings)
  steps = train.train_step, train.eval_step
  train_step, _ = train_utils.jit_train_and_eval_step(
    config, module, mesh, state, shardings, *steps, None, of_params
  )
  batch, held = loader.load_next_batch(rampup_manager=rampup), [state]

  def step():
    with jax.set_mesh(mesh), train.logical_axis_rules(config.logical_axis_rules):
      held[0], metrics = train_step(held[0], batch)
    jax.block_until_ready(metrics['scalar']['learning/loss'])

  return step


def _options(task):
  """Its own config for a config.json of transformers' Llama or Mixtral."""
  model = task['model']
  heads = model['num_attention_heads']
  options = {
    'decoder_block': {'llama': 'llama2', 'mixtral': 'mixtral'}[model['model_type']],
    'base_emb_dim': model['hidden_size'],
    'base_num_query_heads': heads,
    'base_num_kv_heads': heads,
    'head_dim': model['hidden_size'] // heads,
    'base_mlp_dim': model['intermediate_size'],
    'base_num_decoder_layers': model['num_hidden_layers'],
    'vocab_size': model['vocab_size'],
    'max_target_length': task['length'],
    'per_device_batch_size': task['batch'],
    'dtype': 'float32',
    'weight_dtype': 'float32',
    'attention': 'dot_product',
    'remat_policy': 'minimal',  # faster here than its default, `full`
    'dataset_type': 'synthetic',
    'steps': 10**6,
    'hardware': 'cpu',
    'run_name': 'peers',
    'base_output_directory': tempfile.mkdtemp(),
    **dict.fromkeys(_OFF, False),
    'skip_jax_distributed_system': True,
  }
  if 'num_local_experts' in model:
    options |= {
      'num_experts': model['num_local_experts'],
      'num_experts_per_tok': model['num_experts_per_tok'],
      'base_moe_mlp_dim': model['intermediate_size'],
      'sparse_matmul': False,
    }
  return options


_OFF = (
  'enable_checkpointing',
  'enable_goodput_recording',
  'enable_tensorboard',
  'log_config',
  'monitor_goodput',
)

if __name__ == '__main__':
  worker.serve(prepare)
