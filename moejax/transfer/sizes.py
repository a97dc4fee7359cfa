"""The sizes of a model between which something shall transfer: one axis of a sweep."""

from moejax import cli
from moejax.sweep import axes
from moejax.sweep.axes import Axis

# Fields that grow with the width of a model, unless they are 0: derived from others.
_WIDTHS = ('model.d_ff', 'model.moe.shared_width', 'model.mot.expert_width')


def make_axis(config, overrides, widths=(), depths=(), zipped=()) -> Axis:
  """The axis of sizes that flags describe.

  Args:
    config, overrides: as `axes.make_cells` takes them.
    widths: of the model; hidden widths stay in proportion.
    depths: numbers of blocks; patterns keep their shares.
    zipped: texts 'FIELD=VALUE,VALUE,...', as of `moejax.sweep --zip`.

  Raises:
    ValueError: not exactly one of the three is given, or it does not fit the config.
  """
  if sum(map(bool, (widths, depths, zipped))) != 1:
    raise ValueError('give one of --widths, --depths and --zip: which sizes to compare.')
  flags = [f'--config.{field}={text}' for field, text in overrides.items()]
  model = cli.config_of([f'--config={config}', *flags]).model
  texts = list(zipped)
  if widths:
    texts = list(_of_widths(model, cli.integers('widths', widths)))
  elif depths:
    texts = [_of_depths(model, cli.integers('depths', depths))]
  (axis,) = axes.parse([], texts)
  if len(axis.points) < 2:
    raise ValueError('give at least two sizes, such as --widths=32,64,128.')
  return axis


def _of_widths(model, widths):
  """Texts 'FIELD=VALUE,...' of all fields that follow the width."""
  yield _text('model.d_model', widths)
  for field in _WIDTHS:
    value = model
    for part in field.split('.')[1:]:
      value = value[part]
    if value:
      yield _text(field, [_share(field, value, w, model.d_model, 'width') for w in widths])


def _of_depths(model, depths):
  blocks = sum(repeats for _, repeats in model.blocks)
  share = lambda repeats, depth: _share('model.blocks', repeats, depth, blocks, 'depth')
  return _text(
    'model.blocks',
    [
      tuple((pattern, share(repeats, depth)) for pattern, repeats in model.blocks)
      for depth in depths
    ],
  )


def _text(field, values):
  return f'{field}={",".join(map(str, values))}'


def _share(field, value, size, base, what):
  """value * size / base, a positive integer."""
  if value * size % base or value * size < base:
    raise ValueError(
      f'{field} = {value} at {what} {base} has no whole share at {what} {size}: choose multiples.'
    )
  return value * size // base


def base_of(axis) -> str:
  """The first size of an axis in the syntax of `model.base`: the shape to transfer from."""
  pairs = zip(axis.fields, axis.points[0], strict=True)
  return ','.join(f'{field.removeprefix("model.")}={value}' for field, value in pairs)


def number(axis, run_config) -> float:
  """The size of a model on an axis: the first field's number, of `model.blocks` that of blocks."""
  field = axis.fields[0]
  value = run_config
  for part in field.split('.'):
    value = getattr(value, part)
  if field == 'model.blocks':
    return len(run_config.model.sublayers)
  if type(value) not in (int, float) or value <= 0:
    raise ValueError(f'--zip {field}: the first field must be a positive number or model.blocks.')
  return value
