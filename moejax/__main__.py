"""Every program by one name: `moejax PROGRAM` is `python -m moejax.PROGRAM`.

  moejax train --config=mot.py --workdir=runs/mot
  moejax generate --workdir=runs/mot --prompt="def "

Without a program, `moejax --config=...` trains.
"""

import runpy
import sys

from moejax import cli
from moejax.text import did_you_mean

# By name: the module, and what it does.
PROGRAMS = {
  'train': ('main', 'trains a language model, or resumes a run'),
  'evaluate': ('evaluate', 'validation loss of a run, in every decoding mode'),
  'generate': ('generate', 'text from a run'),
  'eval_harness': ('eval_harness', 'lm-evaluation-harness on a run'),
  'replay': ('replay', 'one training step again, with norms by layer'),
  'compare': ('compare', 'a plot and a table of several runs'),
  'verify': ('verify', "checks all files of a run's checkpoints"),
  'drill': ('drill', 'faults on purpose: what of docs/reliability.md holds here?'),
  'transition_tuning': (
    'transition_tuning',
    'a run goes on under another router; dense ones get experts',
  ),
  'reroute': ('reroute', 'the losses of runs under other routers, and what repairs them'),
  'drops': ('drops', 'which tokens find no slot, and which capacity factor a run needs'),
  'passports': ('passports', 'a page about every expert: its tokens, load, neighbours, death'),
  'privacy': ('privacy', 'how much one request changes the outputs of others'),
  'convert': ('convert', 'runs to and from safetensors and transformers'),
  'tokenizer': ('tokenizer', 'trains a SentencePiece tokenizer'),
  'tokenize': ('tokenize', 'writes a corpus to token files'),
  'sweep': ('sweep', 'one config with many values of its fields, and a table'),
  'transfer': ('transfer', 'does the learning rate of a small model suit a larger one?'),
  'reproduce': ('reproduce', "the papers' claims in miniature, with verdicts"),
  'scaling_laws': ('scaling_laws', 'plans for a budget, grids of runs, fits, figures'),
  'preflight': ('preflight', 'checks at home what a run on another machine needs'),
  'aot': ('aot', 'does a model fit a machine, and how fast is it? Compiles ahead of time'),
}


def run():
  name = sys.argv[1] if len(sys.argv) > 1 else ''
  if name in cli.HELP:
    print(f'{__doc__}\nPrograms, each with its own --help:')
    print('\n'.join(f'  {name:19}{what}' for name, (_, what) in PROGRAMS.items()))
    sys.exit(cli.OK)
  if name and not name.startswith('-') and name not in PROGRAMS:
    hint = did_you_mean('train' if name == 'main' else name, PROGRAMS)
    sys.exit(cli.fail(f'expected one of {", ".join(PROGRAMS)}, got {name!r}{hint}'))
  if name in PROGRAMS:
    del sys.argv[1]
  module, _ = PROGRAMS[name if name in PROGRAMS else 'train']
  runpy.run_module(f'moejax.{module}', run_name='__main__', alter_sys=True)


if __name__ == '__main__':
  run()
