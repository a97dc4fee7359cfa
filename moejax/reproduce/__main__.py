"""The claims of the papers in miniature, each with seeds, intervals and verdicts.

python -m moejax.reproduce moe_mamba --quick
python -m moejax.reproduce mot --scale=gpu
python -m moejax.reproduce fine_grained --report
python -m moejax.reproduce figure
"""

import importlib
import os

from absl import flags

from moejax import cli, files

_FLAGS = flags.FLAGS


def _define():
  scales = ['laptop', 'gpu', 'paper']
  meaning = 'laptop: two cores; gpu: one H100; paper: prints what its runs would take.'
  flags.DEFINE_enum('scale', 'laptop', scales, meaning)
  flags.DEFINE_bool('quick', False, 'A quarter of an hour on two cores, for the sign only.')
  flags.DEFINE_bool('report', False, 'Train nothing; report on the runs that are finished.')
  flags.DEFINE_string('chip', 'H100', 'For --scale=paper: such as v5e, v5p, H100.')
  meaning = 'Folder of runs and report; default: reproduce/CLAIM.'
  cli.define_path('workdir', None, meaning, bucket=True)


def _claim(name):
  return importlib.import_module(f'moejax.reproduce.{name}').CLAIM


def _reproduce(name):
  from moejax.reproduce import design as design_lib, paper, report, stages

  claim = _claim(name)
  scale, quick = _FLAGS.scale, _FLAGS.quick
  if quick and scale != 'laptop':
    raise ValueError(f'--quick is a form of --scale=laptop, got --scale={scale}; leave out one.')
  if scale == 'paper':
    print(claim.title, claim.says, '', sep='\n')
    print('\n'.join(paper.describe(claim.published, _FLAGS.chip)))
    return cli.OK
  design = claim.design(scale, quick, design_lib.UNIT)
  form = '_quick' if quick else '' if scale == 'laptop' else f'_{scale}'
  workdir = files.absolute(_FLAGS.workdir or f'reproduce/{name}{form}')
  code = cli.OK
  if _FLAGS.report:
    if not files.exists(workdir):
      raise ValueError(f'--report: {workdir} does not exist; leave out --report to train.')
  else:
    print(design_lib.describe_cost(design, scale, os.cpu_count() or 1), flush=True)
    code = stages.train(design, workdir)
  print(report.write(claim, design, workdir))
  print(f'written to {workdir}: report.md, plots and CSV files')
  return code


def moe_mamba():
  """MoE-Mamba (arXiv:2401.04081): experts make Mamba learn faster."""
  return _reproduce('moe_mamba')


def mot():
  """Mixture of Tokens (arXiv:2310.15961) learns faster than a dense Transformer."""
  return _reproduce('mot')


def fine_grained():
  """Fine-grained experts (arXiv:2402.07871): loss falls with granularity, by a law."""
  return _reproduce('fine_grained')


_CLAIMS = (mot, fine_grained, moe_mamba)


def _define_figure():
  meaning = 'Folder with a report of every claim, in a folder CLAIM.'
  cli.define_path('folder', 'reproduce', meaning, bucket=True)


def figure():
  """Draws the leads of all three claims beside each other, from their reports."""
  from moejax.reproduce import figure as figure_lib

  folder, panels = files.path(_FLAGS.folder), {}
  for claim in _CLAIMS:
    title, comparison = _claim(claim.__name__).panel
    panels[title] = figure_lib.read(folder / claim.__name__ / f'{comparison}.csv')
  figure_lib.write(panels, folder / 'claims.png')
  print(f'written to {folder}: claims.png')
  return cli.OK


COMMANDS = {main.__name__: cli.Command(_define, main) for main in _CLAIMS}
COMMANDS['figure'] = cli.Command(_define_figure, figure)


if __name__ == '__main__':
  cli.run_command(COMMANDS)
