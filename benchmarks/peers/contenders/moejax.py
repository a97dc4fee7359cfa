"""moejax: the training step as its trainer calls it, decoding as its `generate` does."""

import jax

from benchmarks.accelerator.models import Training
from benchmarks.peers import cases
from benchmarks.peers.contenders import worker
from moejax import allocator, compilation_cache, decode, step as step_lib

_GREEDY = {'temperature': 0.0, 'top_k': 0, 'top_p': 1.0, 'min_p': 0.0, 'repetition_penalty': 1.0}


def prepare(task):
  if task['kind'] == 'product':
    return _product(task['size'])
  run_config = cases.run_config(task)
  return _training(run_config) if task['kind'] == 'train' else _decoding(run_config, task)


def _product(size):
  a = jax.random.normal(jax.random.key(0), (size, size))
  multiply = jax.jit(lambda a: a @ a)
  return lambda: multiply(a).block_until_ready()


def _training(run_config):
  training = Training(run_config)
  return lambda: jax.block_until_ready(training())


def _decoding(run_config, task):
  config, new = run_config.model, task['length'] - task['prompt']
  params = jax.jit(step_lib.fresh_state(run_config))()['params']
  prompts = worker.tokens(task, task['prompt'])
  seeds = list(range(len(prompts)))

  def step():
    for _ in decode.stream(config, params, prompts, new, seeds, _GREEDY):
      pass

  return step


if __name__ == '__main__':
  allocator.keep_pages()  # both as moejax.cli does it
  compilation_cache.enable()
  worker.serve(prepare)
