"""The report of a reproduction, from the runs that are finished: markdown, plots, CSV files."""

import csv
import datetime
import io
import math
import os
import pathlib
import platform

from moejax import cli, compare, files, report as run_report
from moejax.compare import plot, table
from moejax.reproduce import law, stages
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
    _markdown(rows),
    f'## In the paper\n\n{claim.says}',
    f'## Here\n\n{design.setting} Seeds: {", ".join(map(str, design.seeds))}.',
    *(_comparison(title, names, results, workdir) for title, names in design.comparisons.items()),
    _rates(design, workdir),
    '\n'.join(['## Predictions', '', *lines]) if (lines := law.describe(workdir)) else '',
    _made(results),
  ]
  files.write(workdir / 'report.md', '\n\n'.join(filter(None, parts)) + '\n')
  _write_csv(findings, workdir / 'verdicts.csv')
  lines = [f'{f.verdict}: {c.text}: {f.measured}' for c, f in findings]
  return '\n'.join([*lines, *([f'partial: {missing}'] if missing else [])])


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
  if _plot_leads(members, rows, workdir / f'{title}-lead.png'):
    pictures.append(f'![leads]({title}-lead.png)')
  notes = compare.notes([run for model in models for run in model.runs])
  text = f'```\n{table.describe(rows)}\n\n{notes}\n```'
  return '\n\n'.join([f'## {title}', *pictures, text])


def _plot_leads(members, rows, path):
  """Lead over the baseline against tokens per active parameter; whether there is one."""
  figure, axes = run_report.new_figure(
    xlabel='tokens per active parameter', ylabel='lead over the baseline (nats per token)'
  )
  lines = {}
  for ((name, _), model), row in zip(members, rows, strict=True):
    if not math.isnan(row.lead.value):
      active = model.summary['parameters']['active']
      lines.setdefault(name, []).append((model.tokens / active, row.lead))
  for name, points in lines.items():
    tokens, leads = zip(*points, strict=True)
    halves = [lead.high - lead.value if lead.has_interval else 0 for lead in leads]
    values = [lead.value for lead in leads]
    axes.errorbar(tokens, values, halves, marker='o', capsize=3, label=run_report.plain_label(name))
  if lines:
    axes.axhline(0, color='0.5', linewidth=1)
    axes.set_xscale('log')
    axes.legend(frameon=False)
    run_report.save_figure(figure, path)
  return bool(lines)


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
  return f'## Learning rates\n\n{what}\n\n{_markdown(rows)}'


def _made(results):
  """How the report was made."""
  model = next(iter(results.models.values()), None)
  versions = (model.summary.get('versions') if model else None) or {}
  rows = [
    ['command', f'`{cli.portable_command()}`'],
    ['commit', run_report.git_commit() or 'unknown'],
    ['date', f'{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC'],
    ['machine', f'{platform.processor() or platform.machine()}, {os.cpu_count()} cores'],
    ['versions', ', '.join(f'{name} {version}' for name, version in versions.items())],
    ['corpus', str(model.summary['corpus'] if model else '')],
  ]
  return f'## How it was made\n\n{_markdown([["", ""], *rows])}'


def _markdown(rows):
  heading, *body = ([cell.replace('|', '\\|') for cell in row] for row in rows)
  return '\n'.join(f'| {" | ".join(r)} |' for r in (heading, ['---'] * len(heading), *body))


def _write_csv(findings, path):
  output = io.StringIO()
  lines = csv.writer(output, lineterminator='\n')
  lines.writerow(['criterion', 'paper', 'measured', 'verdict'])
  lines.writerows([c.text, c.paper, f.measured, f.verdict] for c, f in findings)
  files.write(path, output.getvalue())
