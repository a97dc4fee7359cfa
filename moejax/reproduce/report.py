"""The report of a reproduction, from the runs that are finished: markdown, plots, CSV files."""

import os
import pathlib
import platform

from moejax import cli, files, report as run_report, text
from moejax.compare import explain, plot, table
from moejax.reproduce import figure, law, stages
from moejax.reproduce.criteria import judge
from moejax.reproduce.design import Claim, Design
from moejax.reproduce.results import Results


def write(claim: Claim, design: Design, workdir: pathlib.Path) -> str:
  """Writes report.md and what it shows; returns the verdicts as text."""
  results = Results(design, workdir)
  findings = [(criterion, judge(criterion, results)) for criterion in design.criteria]
  rows = [
    ['claim', 'in the paper', 'measured here', 'verdict'],
    *([c.text, c.paper, f.measured, f'**{f.verdict}**'] for c, f in findings),
  ]
  missing = _missing(results)
  parts = [
    f'# {claim.title}',
    missing and f'**This report is partial: {missing}.**',
    '## Verdicts\n\nThe criteria stood in the code before the runs. Leads are in nats per token, '
    'intervals of 95% over seeds.',
    text.markdown(rows),
    f'## In the paper\n\n{claim.says}',
    f'## Here\n\n{design.setting} {_seeds(design)}',
    *(_comparison(title, names, results, workdir) for title, names in design.comparisons.items()),
    _rates(design, workdir),
    '\n'.join(['## Predictions', '', *lines]) if (lines := law.describe(workdir)) else '',
    _made(results),
  ]
  files.write(workdir / 'report.md', '\n\n'.join(filter(None, parts)) + '\n')
  _write_csv(findings, workdir / 'verdicts.csv')
  lines = [f'{f.verdict}: {c.text}: {f.measured}' for c, f in findings]
  return '\n'.join([*lines, *([f'partial: {missing}'] if missing else [])])


def _seeds(design):
  """Which seeds the models have."""
  show = lambda seeds: ', '.join(map(str, seeds))
  own = [f'{model.name} {show(model.seeds)}' for model in design.models if model.seeds]
  return '; '.join([f'Seeds: {show(design.seeds)}', *own]) + '.'


def _missing(results):
  return f'{results.missing} of {results.total} runs are missing' if results.missing else ''


def _comparison(title, names, results, workdir):
  """Tables and plots of a baseline and others."""
  members = results.members(names)
  if not members or members[0][0][0] != names[0]:
    return f'## {title}\n\nNo finished run of {names[0]}, the baseline.'
  models = [model for _, model in members]
  rows = table.make_rows(models)
  table.write_csv(rows, workdir / f'{title}.csv')
  longest = {name: steps for (name, steps), _ in members}
  lengths = {steps for name, steps in longest.items() if len(longest) == 1 or name != names[0]}
  shown = [
    model
    for (name, steps), model in members
    if (steps in lengths if name == names[0] else steps == longest[name])
  ]
  run_report.save_figure(plot.draw(shown), workdir / f'{title}.png')
  pictures = [f'![losses]({title}.png)']
  if leads := figure.read(workdir / f'{title}.csv'):
    figure.write({title: leads}, workdir / f'{title}-lead.png')
    pictures.append(f'![leads]({title}-lead.png)')
  notes = explain.explanation([run for model in models for run in model.runs])
  tables = f'```\n{table.describe(rows)}\n\n{notes}\n```'
  return '\n\n'.join([f'## {title}', *pictures, tables])


def _rates(design, workdir):
  """The learning rates that were tried, and those that were used."""
  rows = [['model', 'peak rate', 'losses of the rates that were tried']]
  for name, entry in stages.read_rates(design, workdir).items():
    tried = ', '.join(f'{rate}: {loss:.4f}' for rate, loss in entry['tried'].items())
    ends = [*map(float, entry['tried'])]
    beyond = ends and entry['rate'] in (ends[0], ends[-1])
    note = '; the best is at the end of these, and may be beyond' if beyond else ''
    rows.append([name, f'{entry["rate"]:g}', (tried or 'none: found before') + note])
  what = f'One seed, runs of {design.rate_steps:,} steps; the best is used for runs of all lengths.'
  return f'## Learning rates\n\n{what}\n\n{text.markdown(rows)}'


def _made(results):
  """How the runs and the report were made."""
  summaries = [run.summary for model in results.models.values() for run in model.runs]
  known = lambda name: sorted({str(summary[name]) for summary in summaries if summary.get(name)})
  dates = known('date')
  versions = next((summary['versions'] for summary in summaries if 'versions' in summary), {})
  rows = [
    ['command', f'`{cli.portable_command()}`'],
    ['commit', ', '.join(known('commit')) or run_report.git_commit() or 'unknown'],
    ['runs ended', ' to '.join(dict.fromkeys(dates[:1] + dates[-1:]))],
    ['machine', f'{platform.processor() or platform.machine()}, {os.cpu_count()} cores'],
    ['versions', ', '.join(f'{name} {version}' for name, version in versions.items())],
    ['corpus', f'{results.design.fields["data.source"]}, fingerprint {" ".join(known("corpus"))}'],
  ]
  return f'## How it was made\n\n{text.markdown([["", ""], *rows])}'


def _write_csv(findings, path):
  rows = ([c.text, c.paper, f.measured, f.verdict] for c, f in findings)
  files.write_csv(path, [['criterion', 'paper', 'measured', 'verdict'], *rows])
