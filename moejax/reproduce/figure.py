"""Leads over a baseline against tokens per active parameter, from the CSV files of reports."""

import csv
import io
import pathlib

from matplotlib.ticker import LogLocator, NullLocator

from moejax import files, report, seeds

Leads = dict[str, list[tuple[float, seeds.Estimate]]]  # the points of a model, by its name


def read(path: pathlib.Path) -> Leads:
  """The leads in the CSV file of a comparison.

  Raises:
    ValueError: there is no such file.
  """
  if not files.exists(path):
    raise ValueError(
      f'{path} does not exist; python -m moejax.reproduce {path.parent.name} makes it.'
    )
  table = io.StringIO(files.read(path).decode(), newline='')
  rows = [row for row in csv.DictReader(table) if row['lead']]
  leads = {}
  for row in rows:
    lead = seeds.Estimate(*(float(row[f'lead{end}'] or 'nan') for end in ('', '_low', '_high')))
    name = row['model'].rpartition('-')[0]  # without its steps
    leads.setdefault(name, []).append((float(row['tokens_active']), lead))
  return leads


def write(panels: dict[str, Leads], path: pathlib.Path) -> None:
  """Panels beside each other, by their titles: a line per model, with intervals over seeds."""
  figure, all_axes = report.new_figures(len(panels), (6 * len(panels) + 1, 5))
  for axes, (title, leads) in zip(all_axes, panels.items(), strict=True):
    for name, points in leads.items():
      tokens, found = zip(*points, strict=True)
      halves = [lead.high - lead.value if lead.has_interval else 0 for lead in found]
      style = {'marker': 'o', 'capsize': 3, 'label': report.plain_label(name)}
      axes.errorbar(tokens, [lead.value for lead in found], halves, **style)
    axes.axhline(0, color='0.5', linewidth=1)
    axes.set(title=title, xscale='log', xlabel='tokens per active parameter')
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter('{x:g}')
    axes.legend(frameon=False, fontsize='small', ncols=2)
  all_axes[0].set_ylabel('lead over the baseline (nats per token)')
  report.save_figure(figure, path)
