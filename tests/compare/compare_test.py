"""Comparing runs."""

import csv
import json
import pathlib
import re
import shlex

import pytest

from moejax import compare, config as config_lib, metrics, report
from moejax.compare import runs as runs_lib, table as table_lib
from moejax.sweep import axes


def _run(folder, corpus='c', loss=1.5, config=None, **summary):
  """A finished run; `config`: flat, of what differs from the defaults."""
  writer = metrics.MetricsWriter(folder, 0)
  for step in (10, 20):
    writer.write(step, {'loss': loss + 1 / step})
  writer.write(20, {'loss': loss}, prefix='validation')
  writer.close()
  summary = {
    'corpus': corpus,
    'tokenizer': 't',
    'parameters': {'total': 2e6, 'active': 1e6},
    'flops_per_token': {'model': 6e6},
    'tokens_seen': 1e6,
    'validation': {'loss': loss},
    'seconds': 60,
  } | summary
  if config is not None:
    saved = config_lib.baseline()
    saved.update_from_flattened_dict({'train.steps': 20} | config)
    summary |= {'config': saved.to_dict(), 'tokens_seen': 5e4 * saved.train.steps}
  report.write_summary(folder, summary)
  return json.loads((folder / 'summary.json').read_text())


def _seeds(folder, losses, config=None, first=0, **summary):
  """Runs of one model with these losses, by seed; returns their folders."""
  folders = [folder.with_name(f'{folder.name}-s{i}') for i in range(len(losses))]
  for i, (path, loss) in enumerate(zip(folders, losses, strict=True)):
    _run(path, loss=loss, config=(config or {}) | {'train.seed': first + i}, **summary)
  return folders


def _table(folders):
  """`compare.compare` without files."""
  return table_lib.describe(table_lib.make_rows(compare.models(compare.read(folders))))


def _column(table, heading):
  """The cells below a heading, of the first table that has it."""
  lines = next(part for part in table.split('\n\n') if heading in part).splitlines()
  starts = [m.start() for m in re.finditer(r'\S+', lines[0])]
  column = next(i for i, start in enumerate(starts) if lines[0][start:].startswith(heading))
  return [line[starts[column] : ([*starts, None])[column + 1]].strip() for line in lines[1:]]


def test_runs_are_plotted_and_tabulated(tmp_path):
  _run(tmp_path / 'dense', loss=1.5)
  _run(tmp_path / 'mot', loss=1.25)
  table = compare.compare([tmp_path / 'dense', tmp_path / 'mot'], tmp_path / 'both.png')
  assert table.splitlines()[2].split()[0] == 'mot' and '1.2500' in table
  assert _column(table, 'parameters') == ['2M', '2M']
  assert (tmp_path / 'both.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize('name', ['folder', 'a.foo', 'png'])
def test_a_plot_of_no_known_format_is_refused(tmp_path, name):
  _run(tmp_path / 'dense')
  (tmp_path / 'folder').mkdir()
  with pytest.raises(ValueError, match=f'--output=.*/{name}: expected a name that ends in .png'):
    compare.compare([tmp_path / 'dense'], tmp_path / name)
  assert sorted(path.name for path in tmp_path.iterdir()) == ['dense', 'folder']


def test_unfinished_runs_are_compared_and_marked(tmp_path):
  _run(tmp_path / 'dense', loss=1.5)
  summary = _run(tmp_path / 'mot', loss=1.25) | {'finished': False, 'validation': {}}
  report.write_summary(tmp_path / 'mot', summary | {'config': {'train': {'steps': 3000}}})
  runs = [tmp_path / 'dense', tmp_path / 'mot']
  table = compare.compare(runs, tmp_path / 'both.png')
  assert _column(table, 'validation') == ['1.5000', '1.2500']
  notes = compare.notes(compare.read(runs))
  assert '\nunfinished: mot, evaluated at step 20 of 3000\n' in notes
  assert _column(table, 'lead') == ['-', '-']


def test_runs_on_different_data_are_rejected(tmp_path):
  _run(tmp_path / 'a')
  _run(tmp_path / 'b', corpus='another')
  with pytest.raises(ValueError, match='different corpora'):
    compare.compare([tmp_path / 'a', tmp_path / 'b'], tmp_path / 'both.png')


def test_a_folder_without_a_run_is_named(tmp_path):
  with pytest.raises(ValueError, match='nothing holds no run with a checkpoint'):
    compare.compare([tmp_path / 'nothing'], tmp_path / 'both.png')


def test_runs_in_folders_of_the_same_name_are_distinguished(tmp_path):
  for name, loss in {'a/dense': 1.5, 'b/dense': 1.25, 'b/mot': 1.0, 'c/x/mot': 1.0}.items():
    _run(tmp_path / name, loss=loss)
  folders = [tmp_path / name for name in ('a/dense', 'b/dense', 'b/mot', 'c/x/mot')]
  table = compare.compare(folders, tmp_path / 'all.png')
  assert _column(table, 'model') == ['a/dense', 'b/dense', 'b/mot', 'x/mot']
  assert _column(table, 'validation') == ['1.5000', '1.2500', '1.0000', '1.0000']
  assert table == compare.compare(folders, tmp_path / 'new' / 'folder' / 'all.png')


def test_a_path_that_ends_like_another_is_distinguished():
  paths = [pathlib.Path(p) for p in ('/runs/dense', '/old/runs/dense', '/old')]
  assert [runs_lib._name(p, paths) for p in paths] == ['/runs/dense', 'old/runs/dense', 'old']


def test_a_run_given_twice_counts_once_by_its_first_name(tmp_path, monkeypatch):
  _run(tmp_path / 'dense')
  (tmp_path / 'latest').symlink_to('dense')
  monkeypatch.chdir(tmp_path)
  runs = ['latest', './dense/', tmp_path / 'dense', 'nothing/../dense']
  assert _column(compare.compare(runs, 'both.png'), 'model') == ['latest']
  monkeypatch.chdir(tmp_path / 'dense')
  assert _column(compare.compare(['.'], 'both.png'), 'model') == ['dense']


@pytest.mark.parametrize(
  'text',
  [
    '',
    '{"corpus": "c"',
    '[]',
    '{"corpus": "c", "tokenizer": "t", "parameters": 3}',
    '\xff',
    '[' * 100_000,
  ],
)
def test_an_incomplete_or_older_summary_is_named(tmp_path, text):
  _run(tmp_path / 'a')
  (tmp_path / 'a' / 'summary.json').write_text(text)
  with pytest.raises(ValueError, match='a/summary.json is incomplete or from another version'):
    compare.compare([tmp_path / 'a'], tmp_path / 'both.png')


def test_a_corpus_that_is_no_text_is_an_incomplete_summary(tmp_path):
  summary = _run(tmp_path / 'a') | {'corpus': {'name': 'c'}}
  report.write_summary(tmp_path / 'a', summary)
  with pytest.raises(ValueError, match='a/summary.json is incomplete or from another version'):
    compare.compare([tmp_path / 'a'], tmp_path / 'both.png')


def test_a_run_without_its_metrics_is_named(tmp_path):
  _run(tmp_path / 'a')
  (tmp_path / 'a' / 'metrics.jsonl').unlink()
  with pytest.raises(ValueError, match='a has no validation loss in its metrics.jsonl'):
    compare.compare([tmp_path / 'a'], tmp_path / 'both.png')


DENSE, MOT = [1.50, 1.52, 1.51], [1.42, 1.43, 1.41]
LAYERS = {'model.blocks': ((('attention', 'mot'), 4),)}


def test_runs_that_differ_in_their_seed_are_one_model(tmp_path):
  changed = {'train.log_interval': 1, 'model.remat': 'full'}
  folders = _seeds(tmp_path / 'dense', DENSE) + _seeds(tmp_path / 'mot', MOT, LAYERS)
  _run(tmp_path / 'dense-s3', loss=1.55, config=changed | {'train.seed': 3})
  table = _table([*folders, tmp_path / 'dense-s3'])
  assert _column(table, 'model') == ['dense', 'mot']
  assert _column(table, 'seeds') == ['4', '3']
  assert _column(table, 'validation') == ['1.5200 ± 0.0344', '1.4200 ± 0.0248']
  assert _column(table, 'lead') == ['-', '+0.1000 ± 0.0328']
  assert 'noise of seeds: 0.0179 nats' in compare.notes(
    compare.read(folders + [tmp_path / 'dense-s3'])
  )


def test_a_difference_within_the_noise_prints_as_none(tmp_path):
  folders = _seeds(tmp_path / 'dense', DENSE) + _seeds(
    tmp_path / 'mot', [1.51, 1.49, 1.505], LAYERS
  )
  table = _table(folders)
  assert _column(table, 'lead') == ['-', 'none (+0.0083 ± 0.0502)']
  assert 'none: within the noise of seeds.' in compare.notes(compare.read(folders))


def test_one_seed_has_no_interval_and_says_so(tmp_path):
  folders = _seeds(tmp_path / 'dense', [1.5]) + _seeds(tmp_path / 'mot', MOT, LAYERS)
  table = _table(folders)
  assert _column(table, 'lead') == ['-', '+0.0800 (one seed)']
  assert _column(table, 'mid-schedule')[1].endswith('(one seed)')
  assert 'one seed: dense-s0. A difference may be noise' in compare.notes(compare.read(folders))


def test_the_same_run_again_is_not_another_seed(tmp_path):
  folders = _seeds(tmp_path / 'dense', [1.5, 1.5]) + _seeds(tmp_path / 'again', [1.5, 1.5])
  table = _table(folders)
  assert _column(table, 'model') == ['dense', 'again'] and _column(table, 'seeds') == ['2', '2']


def test_what_a_seed_does_to_both_models_cancels(tmp_path):
  shifts = [0.0, 0.2, -0.1]
  shifted = lambda losses: [x + shift for x, shift in zip(losses, shifts, strict=True)]
  folders = _seeds(tmp_path / 'dense', shifted(DENSE)) + _seeds(
    tmp_path / 'mot', shifted(MOT), LAYERS
  )
  assert _column(_table(folders), 'lead') == ['-', '+0.0900 ± 0.0248']
  others = _seeds(tmp_path / 'other', shifted(MOT), LAYERS | {'model.d_ff': 64}, first=3)
  larger = _seeds(tmp_path / 'batch', shifted(MOT), LAYERS | {'data.batch_size': 16})
  assert (
    _column(_table([*folders, *others, *larger]), 'lead')[2:] == ['none (+0.0900 ± 0.3651)'] * 2
  )


def _lengths(folder, warmup=lambda steps: 50):
  """The dense model for 1x, 1.5x, 2x and 3x the steps; folders."""
  folders = []
  for steps, loss in {20: 1.51, 30: 1.46, 40: 1.42, 60: 1.35}.items():
    losses = [loss - 0.01, loss, loss + 0.01]
    config = {'train.steps': steps, 'optimizer.warmup_steps': warmup(steps)}
    folders += _seeds(folder / f'dense-{steps}', losses, config)
  return folders


@pytest.mark.parametrize('warmup', [lambda steps: 5, lambda steps: steps // 4])
def test_matched_schedules(tmp_path, warmup):
  first = {'optimizer.warmup_steps': 5}
  folders = _lengths(tmp_path, warmup) + _seeds(tmp_path / 'mot', MOT, LAYERS | first)
  folders += _seeds(tmp_path / 'best', [1.0, 1.01, 1.0], LAYERS | {'model.d_ff': 64})
  folders += _seeds(tmp_path / 'worst', [2.0, 2.01, 2.0], LAYERS | {'model.d_ff': 32})
  table = _table(folders)
  longer = ['dense-20', 'dense-20-1.5x', 'dense-20-2x', 'dense-20-3x']
  assert _column(table, 'model') == [*longer, 'mot', 'best', 'worst']
  *baseline, mot, best, worst = _column(table, 'matched')
  assert baseline == ['-'] * 4 and best == '>3x' and worst == '<1x'
  value, low, high = map(float, re.findall(r'([\d.]+)x', mot))
  assert value == pytest.approx(2) and 1.4 < low < 1.9 and 2.1 < high < 2.6
  assert 'not measured' not in compare.notes(compare.read(folders))


def test_what_is_no_length_of_the_baseline(tmp_path):
  resumed = {'history': [{'from_step': 20, 'changes': {'train.steps': [20, 40]}}]}
  folders = _seeds(tmp_path / 'dense', DENSE)
  folders += _seeds(tmp_path / 'resumed', MOT, {'train.steps': 40}, **resumed)
  folders += _seeds(tmp_path / 'other', MOT, {'train.steps': 40, 'optimizer.peak_lr': 1.0})
  folders += _seeds(tmp_path / 'warm', MOT, {'train.steps': 40, 'optimizer.warmup_steps': 73})
  table = _table(folders)
  assert _column(table, 'model') == ['dense', 'resumed', 'other', 'warm']
  assert _column(table, 'matched') == ['-'] + ['not measured'] * 3


def test_a_fork_is_a_length_of_the_baseline(tmp_path):
  folders = _seeds(tmp_path / 'dense', DENSE)
  origin = {'forked_from': 'dense-s0', 'step': 16}
  folders += _seeds(tmp_path / 'more', MOT, {'train.steps': 40}, origin=origin)
  folders += _seeds(tmp_path / 'tuned', MOT, {'train.steps': 60}, origin={'optimizer': 'keep'})
  assert _column(_table(folders), 'model') == ['dense', 'dense-2x', 'tuned']


def test_the_command_for_what_is_not_measured(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  folders = _seeds(tmp_path / 'runs/dense', DENSE) + _seeds(tmp_path / 'runs/mot', MOT, LAYERS)
  notes = compare.notes(compare.read(folders))
  assert 'matched: not measured. Train the baseline for 1.5x, 2x, 3x the steps' in notes
  command = notes.splitlines()[-1].strip()
  assert command == (
    'python -m moejax.sweep --config=configs/run.py:runs/dense-s0 --workdir=runs/dense-longer '
    '--grid train.steps=30,40,60 --grid train.seed=0,1,2'
  )
  config = json.loads((folders[0] / 'summary.json').read_text())['config']
  (folders[0] / 'config.json').write_text(json.dumps(config))
  words = shlex.split(command)
  grid = [word for flag, word in zip(words, words[1:], strict=False) if flag == '--grid']
  cells = axes.make_cells('configs/run.py:runs/dense-s0', {}, axes.parse(grid, []))
  assert len(cells) == 9 and {cell.steps for cell in cells} == {30, 40, 60}
  for cell in cells:  # once trained, they are lengths of the baseline
    changes = {'train.steps': cell.steps, 'train.seed': cell.values['train.seed']}
    _run(tmp_path / 'runs/dense-longer' / cell.name, config=changes)
  table = _table([*folders, 'runs/dense-longer'])
  assert _column(table, 'model') == ['dense', 'dense-1.5x', 'dense-2x', 'dense-3x', 'mot']
  assert _column(table, 'matched')[-1] == '>3x'


def test_a_table_for_programs(tmp_path):
  folders = _seeds(tmp_path / 'dense', DENSE) + _seeds(tmp_path / 'mot', MOT, LAYERS)
  compare.compare(folders, tmp_path / 'a.svg')
  with (tmp_path / 'a.csv').open(newline='') as file:
    dense, mot = csv.DictReader(file)
  assert mot['model'] == 'mot' and mot['folders'].split()[0] == 'mot-s0'
  assert float(mot['lead']) == pytest.approx(0.09) and dense['lead'] == dense['lead_low'] == ''
  assert float(mot['lead_low']) > 0.05 and mot['matched'] == '' and mot['seeds'] == '3'
  assert float(mot['flops']) == 6e12 and float(mot['seconds']) == 60


def test_different_amounts_of_validation_are_warned_of(tmp_path):
  _run(tmp_path / 'a', validation={'loss': 1.5, 'tokens': 100, 'whole_split': True})
  _run(tmp_path / 'b', validation={'loss': 1.5, 'tokens': 200, 'whole_split': True})
  notes = compare.notes(compare.read([tmp_path / 'a', tmp_path / 'b']))
  assert 'warning: validation losses are averages over 100, 200 tokens' in notes
  assert 'the whole validation split: 100 tokens or the whole' in notes


def test_how_the_training_loss_is_to_be_read(tmp_path):
  training = {'epochs': 0.5, 'clipped': 0.25}
  _run(tmp_path / 'a', training=training)
  _run(tmp_path / 'b', training=training | {'epochs': 2.0})
  notes = lambda *names: compare.notes(compare.read([tmp_path / name for name in names]))
  assert 'last quarter of the steps, of text not seen before.' in notes('a')
  assert 'last quarter of the steps, of text seen up to 2 times.' in notes('a', 'b')
  assert _column(_table([tmp_path / 'a']), 'clipped') == ['25%']
  _run(tmp_path / 'c')
  assert 'last quarter of the steps.' in notes('a', 'c')
  assert _column(_table([tmp_path / 'c']), 'clipped') == ['-']


def test_the_final_evaluation_counts(tmp_path):
  _run(tmp_path / 'a', loss=1.5, validation={'loss': 1.25})
  assert _column(_table([tmp_path / 'a']), 'validation') == ['1.2500']


@pytest.mark.parametrize(
  ('names', 'common'),
  [
    (['dense-s0', 'dense-s1'], 'dense'),
    (['steps=200_seed=0', 'steps=200_seed=1'], 'steps=200'),
    (['seed=0_peak_lr=0.1', 'seed=1_peak_lr=0.1'], 'peak_lr=0.1'),
    (['s0/dense', 's1/dense'], 'dense'),
    (['dense0', 'dense1'], 'dense'),
    (['a', 'b'], 'a'),
    (['dense', 'dense-s1'], 'dense'),
    (['dense-s0'], 'dense-s0'),
  ],
)
def test_the_name_of_a_model(names, common):
  assert runs_lib._common_name(names) == common
