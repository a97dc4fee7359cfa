"""A page about every expert of a run: its tokens and contexts, load, neighbours, death.

  python -m moejax.passports --workdir=runs/moe --output=experts.html

One pass over validation text finds the most typical tokens of every expert and where it weighs
most; metrics.jsonl tells how loads developed in training. The page is one file that loads nothing,
for any browser, with a search box; it says how its numbers are defined.
"""

import jax
from absl import flags

from moejax import cli, config as config_lib, files, text as text_lib
from moejax.distributed import is_process_0
from moejax.passports import findings, history, observe, page
from moejax.run_folder import load_run


def main():
  args = flags.FLAGS
  if not args.output.endswith('.html'):
    raise ValueError(f'--output: expected a .html file, got {args.output}.')
  cli.join_processes()
  run_config, step, params, mesh = load_run(args.workdir)
  config_lib.check_batch(run_config, mesh)
  with jax.set_mesh(mesh):
    layers, text = observe.observe(run_config, params, mesh, args.batches or None)
  if not is_process_0():
    return cli.OK
  logged = history.read(args.workdir)
  decay = run_config.optimizer.weight_decay
  found = [findings.of_layer(layer, run_config.model, decay, logged) for layer in layers]
  facts = page.facts(run_config, step, layers)
  name = files.path(args.workdir).name
  content = page.page(name, facts, layers, found, text, logged)
  files.write(args.output, content)
  labels = [finding.label for of_layer in found for finding in of_layer]
  print(
    f'{len(labels)} experts, {labels.count("dead")} dead, {labels.count("twin")} twins; written to '
    f'{args.output} ({text_lib.size(len(content.encode()))})',
    flush=True,
  )
  return cli.OK


if __name__ == '__main__':
  cli.define_process_flags()
  cli.define_path('workdir', None, 'Folder of a run with experts.', required=True, bucket=True)
  cli.define_path('output', None, 'The page, a .html file.', required=True)
  flags.DEFINE_integer('batches', 100, 'Batches of validation; 0: all.', lower_bound=0)
  cli.run(main, needs_config=False)
