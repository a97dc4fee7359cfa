"""Models of the package transformers: one file for each architecture that moejax has too."""

from moejax.hf.gpt2 import GPT2
from moejax.hf.llama import LLAMA
from moejax.hf.mamba import MAMBA
from moejax.hf.mamba2 import MAMBA2
from moejax.hf.mixtral import MIXTRAL
from moejax.hf.nemotron_h import NEMOTRON_H
from moejax.hf.olmoe import OLMOE
from moejax.hf.qwen3_moe import QWEN3_MOE

_ALL = GPT2, LLAMA, MIXTRAL, OLMOE, QWEN3_MOE, MAMBA, MAMBA2, NEMOTRON_H
ARCHITECTURES = {a.name: a for a in _ALL}  # by their model_type


def of_options(options):
  """The Architecture of a config.json.

  Raises:
    ValueError: it is not one of ours.
  """
  kind = options.get('model_type')
  if not isinstance(kind, str) or kind not in ARCHITECTURES:
    raise ValueError(
      f'model_type must be one of {", ".join(ARCHITECTURES)}; got {kind}. (Checkpoints of the '
      'package mamba_ssm have none; on the hub, those for transformers have -hf in their names.)'
    )
  return ARCHITECTURES[kind]


def of_run(run_config):
  """The Architecture that expresses the model of a RunConfig.

  Raises:
    ValueError: there is none, with every field that would have to differ.
  """
  model = run_config.model
  problems = {a: list(a.problems(run_config)) for a in ARCHITECTURES.values() if a.fits(model)}
  for architecture, found in problems.items():
    if not found:
      return architecture
  lines = ['transformers cannot express this model.']
  if not problems:
    have = [f'{"+".join(a.layer)} ({a.name})' for a in ARCHITECTURES.values()]
    lines.append(f'model.blocks: its layers are {", ".join(have)}; got {model.blocks}.')
  if 'mot' in model.kinds:
    lines.append(
      'Mixture of Tokens has no counterpart there: python -m moejax.transition_tuning '
      '--router=token_choice makes a sparse model of the same experts.'
    )
  for architecture, found in problems.items():
    lines.append(f'As {architecture.name} (--config={architecture.config}):')
    lines += [f'  {problem}' for problem in found]
  lines.append('python -m moejax.convert to_safetensors writes any model to one file.')
  raise ValueError('\n'.join(lines))
