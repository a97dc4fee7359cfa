"""Makes the folders hf_gpt2, hf_llama, ...: random models of transformers.

  python tests/reference/make_hf.py         # with torch and transformers; made by 2.13.0 and 5.24.0
  python tests/reference/make_hf.py olmoe   # only this one

Each holds what `save_pretrained` writes, and logits.npz: `ids` [B, L], their `logits` [B, L, V] in
float32, and `greedy` [B, 20], the continuation of `ids` by `generate(do_sample=False)`.
"""

import json
import pathlib
import sys

import numpy as np
import torch
import transformers

_SHARED = dict(vocab_size=260, bos_token_id=None, eos_token_id=None, pad_token_id=None)
_SIZES = dict(
  hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, **_SHARED
)
CONFIGS = {
  'mamba': lambda: transformers.MambaConfig(
    hidden_size=20, state_size=5, num_hidden_layers=2, **_SHARED
  ),
  'mamba2': lambda: transformers.Mamba2Config(
    hidden_size=12,
    state_size=5,
    num_heads=6,
    head_dim=4,
    n_groups=2,
    chunk_size=4,
    num_hidden_layers=2,
    **_SHARED,
  ),
  'gpt2': lambda: transformers.GPT2Config(
    n_embd=12, n_layer=2, n_head=3, n_positions=32, **_SHARED
  ),
  'llama': lambda: transformers.LlamaConfig(
    **_SIZES,
    intermediate_size=40,
    rms_norm_eps=1e-3,
    rope_parameters={'rope_type': 'default', 'rope_theta': 500.0},
  ),
  'mixtral': lambda: transformers.MixtralConfig(
    **_SIZES, intermediate_size=24, num_local_experts=5, tie_word_embeddings=True
  ),
  'olmoe': lambda: transformers.OlmoeConfig(
    **_SIZES, intermediate_size=16, num_experts=6, num_experts_per_tok=3, tie_word_embeddings=True
  ),
  'qwen3_moe': lambda: transformers.Qwen3MoeConfig(
    **_SIZES,
    head_dim=6,
    moe_intermediate_size=16,
    num_experts=6,
    num_experts_per_tok=3,
    norm_topk_prob=True,
  ),
}


def random_model(name, seed=0, **changes):
  """A model whose parameters, norms and biases too, have random values at which they matter."""
  torch.manual_seed(seed)
  config = CONFIGS[name]()
  config.update(changes)
  model = transformers.AutoModelForCausalLM.from_config(config).eval()
  with torch.no_grad():
    # Mamba's recurrence is only stable near its initial values.
    for parameter in () if name.startswith('mamba') else model.parameters():
      spread = 0.2 if parameter.ndim == 1 else 0.4
      parameter.copy_(
        (parameter if parameter.ndim == 1 else 0) + spread * torch.randn_like(parameter)
      )
  return model


def greedy(model, ids, length=20):
  """int32 [B, length]: the greedy continuation of `ids`."""
  ids = torch.from_numpy(np.asarray(ids)).long()
  mask = torch.ones_like(ids)
  out = model.generate(ids, attention_mask=mask, max_new_tokens=length, do_sample=False)
  return out[:, ids.shape[1] :].numpy().astype(np.int32)


def logits(model, ids):
  """Float32 [B, L, V]."""
  with torch.no_grad():
    return model(torch.from_numpy(np.asarray(ids)).long()).logits.float().numpy()


def main():
  for name in sys.argv[1:] or ('gpt2', 'llama', 'mixtral', 'olmoe', 'qwen3_moe', 'mamba2'):
    folder = pathlib.Path(__file__).parent / f'hf_{name}'
    model = random_model(name)
    model.save_pretrained(folder)
    (folder / 'generation_config.json').unlink()
    ids = np.random.default_rng(0).integers(0, 260, (2, 7), dtype=np.int32)
    arrays = {'ids': ids, 'logits': logits(model, ids), 'greedy': greedy(model, ids)}
    np.savez_compressed(folder / 'logits.npz', **arrays)
    print(name, json.loads((folder / 'config.json').read_text())['model_type'], arrays['greedy'])


if __name__ == '__main__':
  main()
