"""The model card of an exported folder, and what is different there."""

from moejax import flops, report, text as text_lib

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [moejax, {kind}]
---

# {name}

A {class_name}, trained with moejax and exported at step {step}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({folder!r})
tokenizer = AutoTokenizer.from_pretrained({folder!r})
inputs = tokenizer('def ', return_tensors='pt')
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```

| | |
|---|---|
{table}

Fields of its config that are not the defaults of moejax:

```
{fields}
```
"""


def notes(run_config):
  """Sentences about what transformers computes differently."""
  model, found = run_config.model, []
  if model.dropless():
    found.append(
      f'model.moe.capacity_factor = {model.moe.capacity_factor:g} has no counterpart there: no '
      'token is dropped. Compare with the loss without drops (loss_dropless).'
    )
  if model.document_mask:
    found.append(
      'model.document_mask has no counterpart there: a sequence of several documents is one text.'
    )
  return found


def text(architecture, run_config, fields, step, summary, folder, notes):
  """The card, in Markdown.

  Args:
    architecture: of the model.
    run_config: of the run.
    fields: of its config that are not the defaults: a dict of values by name.
    step: of the checkpoint.
    summary: the content of summary.json, or {}.
    folder: name of the folder.
    notes: sentences.
  """
  counts, data = flops.param_counts(run_config.model), run_config.data
  rows = {
    'parameters': f'{text_lib.short(counts["total"])}, of which {text_lib.short(counts["active"])} '
    'are active outside of the embeddings',
    'context': f'{run_config.model.max_length} tokens',
    'trained on': f'data.source={data.source}'
    + (f', {text_lib.short(summary["tokens_seen"])} tokens' if 'tokens_seen' in summary else ''),
  }
  result = summary.get('validation') or {}
  if summary.get('steps') == step and 'loss' in result:
    rows['validation'] = report.describe(result)
  card = _CARD.format(
    kind=architecture.name,
    name=folder,
    class_name=architecture.class_name,
    step=step,
    folder=folder,
    fields='\n'.join(f'{name} = {value!r}' for name, value in fields.items()),
    table='\n'.join(f'| {name} | {value} |' for name, value in rows.items()),
  )
  return card + ''.join(f'\n{note}\n' for note in notes)
