"""The model of lm-evaluation-harness: scores against logits, windows, modes, a task of files."""

import functools
import json
import os

import jax
import numpy as np
import pytest

lm_eval = pytest.importorskip('lm_eval')

from lm_eval.api.instance import Instance  # noqa: E402

from configs import dense, mot  # noqa: E402
from moejax import config as config_lib, convert, eval_harness, model as model_lib  # noqa: E402

pytestmark = pytest.mark.heavy

LENGTH = 24
PAIRS = [('def f(', 'x):'), ('', 'import os'), ('a' * 40, 'b'), ('xy', 'abc' * 20), ('d', 'ef')]


def _requests(kind, arguments):
  return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Runs of small models: fresh parameters, large enough that tokens matter."""
  folder = tmp_path_factory.mktemp('runs')
  (folder / 'text').mkdir()
  for i in range(40):
    (folder / 'text' / f'{i}.txt').write_text(f'def function_{i}(x):\n  return x * {i}\n' * 5)
  for name, module in (('dense', dense), ('mot', mot)):
    config = module.get_config('debug')
    config.data.update({'source': 'text', 'files': f'{folder}/text/*.txt'})
    config.data.sequence_length = LENGTH
    config.model.init_scale = 3.0
    run_config = config_lib.resolve(config)
    init = jax.jit(model_lib.init_params, static_argnums=0)
    params = init(run_config.model, jax.random.key(0))
    convert.write_run(config, run_config, params, folder / name)
  return folder


@pytest.fixture(scope='module')
def model(folder):
  """`model('dense', mode=...)`, each made once."""
  return functools.cache(
    lambda name, **options: eval_harness.MoejaxLM(folder / name, batch_size=3, **options)
  )


def _direct(lm, inputs, targets):
  """Sum of log-probabilities of the last inputs' targets, and whether they are the likeliest."""
  ids = np.array([inputs])
  logits = model_lib.bind(lm._model, lm._params)(ids)[0, -len(targets) :]
  scores = np.asarray(jax.nn.log_softmax(logits))[np.arange(len(targets)), targets]
  return scores.sum(), bool((np.asarray(logits).argmax(-1) == targets).all())


def test_scores_are_those_of_the_logits(model):
  lm = model('dense')
  results = lm.loglikelihood(_requests('loglikelihood', PAIRS), disable_tqdm=True)
  for (context, continuation), (total, greedy) in zip(PAIRS, results, strict=True):
    ids = [1, *lm.tok_encode(continuation)]
    if context:
      ids = lm.tok_encode(context + continuation)
    n = len(lm.tok_encode(continuation))
    if n <= LENGTH:
      want, is_greedy = _direct(lm, ids[-LENGTH - 1 : -1], ids[-n:])
    else:  # in windows of the context's length, the last with as much context as fits
      parts = [ids[-n - 1 :][i : i + LENGTH + 1] for i in (0, LENGTH)]
      parts.append(ids[-LENGTH - 1 :])
      counts = (LENGTH, LENGTH, n - 2 * LENGTH)
      found = [_direct(lm, p[:-1], p[-c:]) for p, c in zip(parts, counts, strict=True)]
      want, is_greedy = sum(f[0] for f in found), all(f[1] for f in found)
    np.testing.assert_allclose(total, want, rtol=1e-4)
    assert greedy == is_greedy


def test_a_greedy_continuation_is_greedy(model):
  lm = model('dense')
  settings = {'until': [], 'max_gen_toks': 5}
  (text,) = lm.generate_until(_requests('generate_until', [('def ', settings)]), disable_tqdm=True)
  if '\ufffd' not in text and text:  # valid UTF-8 is encoded as it was generated
    ((_, greedy),) = lm.loglikelihood(_requests('loglikelihood', [('def ', text)]), True)
    assert greedy


def test_rolling_scores_every_token_once(model):
  lm, text = model('dense'), 'import numpy as np\nimport jax\n'
  (total, empty) = lm.loglikelihood_rolling(
    _requests('loglikelihood_rolling', [(text,), ('',)]), disable_tqdm=True
  )
  ids = [1, *lm.tok_encode(text)]
  first = _direct(lm, ids[:LENGTH], ids[1 : LENGTH + 1])[0]
  rest = _direct(lm, ids[-LENGTH - 1 : -1], ids[LENGTH + 1 :])[0]
  np.testing.assert_allclose(total, first + rest, rtol=1e-4)
  assert empty == 0


@pytest.mark.parametrize(
  'name, mode, alone',
  [
    ('dense', 'mixed', True),
    ('mot', 'mixed', False),
    ('mot', 'discrete', False),
    ('mot', 'unmixed', True),
    ('mot', 'mixed_with_corpus', True),
  ],
)
def test_who_depends_on_whom(model, name, mode, alone):
  lm = model(name) if name == 'dense' else model(name, mode=mode)
  assert lm.leaks == (not alone) == lm.get_model_info()['leaks']
  score = lambda pairs: lm.loglikelihood(_requests('loglikelihood', pairs), disable_tqdm=True)
  forward, backward = score(PAIRS), score(PAIRS[::-1])[::-1]
  np.testing.assert_allclose([f[0] for f in forward], [b[0] for b in backward], rtol=1e-5)
  (by_itself,) = score(PAIRS[:1])
  assert np.isclose(by_itself[0], forward[0][0], rtol=1e-5) == alone
  prompts = [('def ', {'until': ['\n'], 'max_gen_toks': 6}), ('import os', {'max_gen_toks': 40})]
  say = lambda prompts: lm.generate_until(_requests('generate_until', prompts), disable_tqdm=True)
  texts = say(prompts)
  assert len(texts) == 2 and '\n' not in texts[0]
  if alone:
    assert say(prompts[::-1])[::-1] == texts and say(prompts[1:]) == texts[1:]


def test_settings_of_generation():
  sampling, length = eval_harness._settings({'until': 'x', 'temperature': 0.5, 'max_gen_toks': 7})
  assert (sampling.temperature, sampling.stop, length) == (0.5, ('x',), 7)
  sampling, length = eval_harness._settings({'do_sample': False, 'top_p': 1, 'until': ['', '\n']})
  assert (sampling.temperature, sampling.stop, length) == (0, ('\n',), 256)


@pytest.mark.parametrize(
  'options, message',
  [
    ({'mode': 'blended'}, 'expected one of mixed, unmixed'),
    ({'batch_size': 'auto'}, "--batch_size: expected a number of requests, got 'auto'"),
    ({'mod': 'mixed'}, "expected workdir, mode, group_size or SECTION.FIELD, got 'mod'"),
    ({'workdir': 'nowhere'}, 'holds no run'),
  ],
)
def test_bad_arguments_are_one_clear_error(folder, options, message):
  with pytest.raises(ValueError, match=message):
    eval_harness.MoejaxLM(**{'workdir': folder / 'mot'} | options)


TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder}/{name}.jsonl}}
test_split: test
"""
CHOICES = """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""
PERPLEXITY = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity}]
"""


def test_tasks_of_local_files(model, tmp_path, monkeypatch):
  monkeypatch.setitem(os.environ, 'HF_HUB_OFFLINE', '1')
  import datasets

  monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'cache')
  documents = {
    'which': [{'question': 'def f', 'choices': ['(x)', '((('], 'answer': i % 2} for i in range(4)],
    'texts': [{'text': 'import os\n' * (i + 1)} for i in range(3)],
  }
  for name, kind in (('which', CHOICES), ('texts', PERPLEXITY)):
    (tmp_path / f'{name}.yaml').write_text(TASK.format(name=name, folder=tmp_path) + kind)
    lines = '\n'.join(map(json.dumps, documents[name]))
    (tmp_path / f'{name}.jsonl').write_text(lines)
  from lm_eval.tasks import TaskManager

  results = lm_eval.simple_evaluate(
    model=model('mot', mode='mixed_with_corpus'),
    tasks=['which', 'texts'],
    task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
    bootstrap_iters=0,
  )
  assert results['results']['which']['acc,none'] == 0.5
  texts = [(document['text'],) for document in documents['texts']]
  lm = model('mot', mode='mixed_with_corpus')
  nats = -sum(lm.loglikelihood_rolling(_requests('loglikelihood_rolling', texts), True))
  perplexity = np.exp(nats / sum(len(text) for (text,) in texts))
  assert results['results']['texts']['byte_perplexity,none'] == pytest.approx(perplexity, rel=1e-4)
  assert results['config']['mode'] == 'mixed_with_corpus' and not results['config']['leaks']
