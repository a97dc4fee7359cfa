"""transformers on PyTorch: its models, AdamW in one pass, gradients clipped; `generate`.

Experts are grouped products, its default. Mamba is mambapy's scan, much faster than its own loop.
"""

import os

import torch
import transformers

from benchmarks.peers.contenders import worker


def prepare(task):
  torch.set_num_threads(os.cpu_count() or 1)
  torch.manual_seed(0)
  if task['kind'] == 'product':
    return _product(task['size'])
  options = dict(task['model'])
  config = transformers.AutoConfig.for_model(options.pop('model_type'), **options)
  config.use_mambapy, config.output_router_logits = True, 'num_local_experts' in options
  model = transformers.AutoModelForCausalLM.from_config(config)
  return (_training if task['kind'] == 'train' else _decoding)(model, task)


def _product(size):
  a = torch.randn(size, size)
  return lambda: a @ a


def _training(model, task):
  ids = torch.tensor(worker.tokens(task, task['length'] + 1))
  inputs, targets = ids[:, :-1], ids[:, 1:].flatten()
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
  model.train()

  def step():
    optimizer.zero_grad()
    output = model(inputs, use_cache=False)
    loss = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), targets)
    loss = loss + 0.01 * (getattr(output, 'aux_loss', None) or 0.0)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()

  return step


def _decoding(model, task):
  prompts = torch.tensor(worker.tokens(task, task['prompt']))
  new = task['length'] - task['prompt']
  model.eval()
  options = {'max_new_tokens': new, 'min_new_tokens': new, 'do_sample': False, 'pad_token_id': 0}
  return lambda: model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)


if __name__ == '__main__':
  worker.serve(prepare)
