"""The scan of Mamba and the products of Mamba-2 compiled ahead of time for a TPU, and counted.

  pip install -e .[tpu-aot]
  python benchmarks/selective_scan_tpu.py --topology=v5e:2x2 --dtype=bfloat16

Prints counts per 65,536 states (8 positions of 512 channels of 16 states), all from the
compiler. None is a time: nothing runs, and memory stalls are not counted.

  kernel  bundles (very long instruction words, one per cycle at best) in the loops of
          `impl='tpu_kernel'`, and in the rest of a grid step
  XLA     XLA's estimated cycles of every operation of `impl='tpu'`, both passes, times the trip
          counts of the enclosing loops
  Mamba-2 the same of `ssd.ssd`, in heads of 64 channels
"""

import os
import pathlib
import re
import tempfile

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.experimental import topologies

from moejax.ops import selective_scan, selective_scan_tpu, ssd

_TOPOLOGY = flags.DEFINE_string('topology', 'v5e:2x2', 'Target topology; one of its chips is used.')
_DTYPE = flags.DEFINE_enum('dtype', 'bfloat16', ['bfloat16', 'float32'], 'Dtype of activations.')
_SHAPE = flags.DEFINE_list(
  'shape', ['8', '2048', '1536', '16'], 'Sequences, positions, channels, states per channel.'
)
_UNIT = 65536
_HEAD = 64  # channels of Mamba-2


def compiled(impl, device):
  """The compiled program of a scan and all its gradients; impl 'ssd': of Mamba-2."""
  B, L, I, N = map(int, _SHAPE.value)
  shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.dtype(_DTYPE.value))
  wide, narrow, vector = shape(B, L, I), shape(B, L, N), shape(I)
  args = wide, wide, shape(I, N), narrow, narrow, vector, wide, vector

  scan = lambda *args: selective_scan.selective_scan(*args, impl=impl)[0]
  if impl == 'ssd':
    H, group = I // _HEAD, shape(B, L, 1, N)
    wide, of_head = shape(B, L, H, _HEAD), jax.ShapeDtypeStruct((H,), jnp.float32)
    args = wide, shape(B, L, H), of_head, group, group, of_head, of_head
    scan = lambda *args: ssd.ssd(*args, chunk=ssd.CHUNKS['tpu'])[0]

  def run(dy, *args):
    y, backward = jax.vjp(scan, *args)
    return y, backward(dy)

  f = jax.jit(run, in_shardings=jax.sharding.SingleDeviceSharding(device))
  return f.trace(wide, *args).lower(lowering_platforms=('tpu',)).compile()


def bundles(path):
  """Bundles of a grid step outside its loops, then of one iteration of each loop."""
  counts = [0]
  for mark, depth in re.findall(r'^ *\w+ +(\w\w)? *: (>*) *\{', path.read_text(), re.MULTILINE):
    if depth == '>>' and mark == 'LB':
      counts.append(0)
    if depth:
      counts[-1 if depth == '>>' else 0] += 1
  return counts


def estimated_cycles(text):
  """Estimated cycles of an XLA program, times the trip counts of the enclosing loops."""
  bodies = dict(re.findall(r'^(?:ENTRY )?%(\S+) \(.*?\{\n(.*?)^\}', text, re.MULTILINE | re.DOTALL))

  def total(name):
    cycles = 0
    for line in bodies[name].splitlines():
      if loop := re.search(r' while\(.*condition=%([^,]+), body=%([^,]+)', line):
        trips = max(map(int, re.findall(r' constant\((\d+)\)', bodies[loop[1]])))
        cycles += trips * total(loop[2])
      elif estimate := re.search(r'"estimated_cycles":"(\d+)"', line):
        cycles += int(estimate[1])
    return cycles

  return total(re.search(r'^ENTRY %(\S+)', text, re.MULTILINE)[1])


def main(argv):
  del argv
  os.environ.update(TPU_SKIP_MDS_QUERY='1', ALLOW_MULTIPLE_LIBTPU_LOAD='1')
  jax.config.update('jax_platforms', 'cpu')
  B, L, I, N = map(int, _SHAPE.value)
  with tempfile.TemporaryDirectory() as folder:
    dump = f'--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true'
    os.environ['LIBTPU_INIT_ARGS'] = dump  # read when the compiler loads: on the next line
    device = topologies.get_topology_desc(_TOPOLOGY.value, 'tpu').devices[0]
    print(f'{device.device_kind}, jax {jax.__version__}, {_DTYPE.value}, B={B} L={L} I={I} N={N}')
    compiled('tpu_kernel', device)
    counts = {}
    for which in ('forward', 'backward'):
      (path,) = pathlib.Path(folder).glob(f'*{which}_kernel*-final_bundles.txt')
      counts[which] = bundles(path)
  tile = next(size for size in selective_scan_tpu._TILES if I % size == 0)
  for which, (outside, *loops) in counts.items():
    per_group = _UNIT / (selective_scan_tpu._ROWS * tile * N)
    per_chunk = _UNIT / (selective_scan_tpu.chunk_size(L) * tile * N)
    parts = ' + '.join(f'{n * per_group:.0f}' for n in loops)
    print(f'kernel, {which}: {parts} bundles in loops, {outside * per_chunk:.0f} outside')
  for name, impl in (('XLA', 'tpu'), ('Mamba-2', 'ssd')):
    cycles = estimated_cycles(compiled(impl, device).as_text())
    print(f'{name}, both: {cycles * _UNIT / (B * L * I * N):.0f} cycles estimated')


if __name__ == '__main__':
  app.run(main)
