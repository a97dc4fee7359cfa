"""Costs of compiled programs: known costs of a model, and HLO as written by the TPU compiler."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec as P

from moejax import flops, model as model_lib
from moejax.aot import hlo
from tests import tiny


def _compile(f, *args):
  return hlo.cost(jax.jit(f).lower(*args).compile().as_text())


@pytest.mark.parametrize('blocks', [1, 3])
def test_flops_are_those_of_the_model(blocks):
  config = tiny.model_config(blocks=((('attention', 'mlp'), blocks),))
  params = jax.eval_shape(lambda: model_lib.init_params(config, jax.random.key(0)))
  loss = lambda params, batch: model_lib.bind(config, params).loss(batch)[0]
  got = _compile(jax.grad(loss), params, tiny.batch())
  per_token = flops.training_flops_per_token(config, tiny.L)['model']
  assert got.flops == per_token * tiny.B * tiny.L


def test_loops_count_every_iteration():
  mesh = jax.make_mesh((2, 4), ('a', 'b'), axis_types=(AxisType.Auto,) * 2)

  def exchange(x, _):
    x = jax.lax.all_to_all(x, 'b', 0, 1, tiled=True).reshape(x.shape)
    return x, jax.lax.psum(x.sum(), 'a')

  f = jax.shard_map(
    lambda x: jax.lax.scan(exchange, x, None, length=5),
    mesh=mesh,
    in_specs=P(('a', 'b')),
    out_specs=(P(('a', 'b')), P()),
    check_vma=False,
  )
  got = _compile(f, jnp.zeros((32, 8))).collectives
  groups = {c.kind: hlo.device_groups(c.groups, 8).tolist() for c in got}
  assert groups == {
    'all-to-all': [[0, 1, 2, 3], [4, 5, 6, 7]],
    'all-reduce': [[0, 4], [1, 5], [2, 6], [3, 7]],
  }
  assert {c.kind: (c.bytes, n) for c, n in got.items()} == {
    'all-to-all': (4 * 8 * 4, 5),
    'all-reduce': (4, 5),
  }


def test_kernels_of_attention_count_the_pairs_of_a_causal_mask():
  kernel = 'custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={'
  text = f"""
%body (p: bf16[2,4,256,64]) -> bf16[2,4,256,64] {{
  %p = bf16[2,4,256,64]{{3,2,1,0}} parameter(0)
  %mask = s8[1,2,2]{{2,1,0}} constant(0)
  ROOT %splash_mha_dkv_alone.1 = bf16[2,4,256,64] custom-call(%mask, %p, %p, %p), {kernel}
"tiles":"1"
}}}}, metadata={{op_name="attention"}}
}}

ENTRY %main (p: bf16[2,4,256,64]) -> bf16[2,4,256,64] {{
  %p = bf16[2,4,256,64]{{3,2,1,0}} parameter(0)
  ROOT %call = bf16[2,4,256,64]{{3,2,1,0}} call(%p), to_apply=%body
}}
"""
  got = hlo.cost(text)
  assert got.flops == 4 * 2 * (2 * 4 * 64) * 256**2 / 2
  assert got.memory_bytes == 4 + 4 * (2 * 4 * 256 * 64 * 2)


def test_indexing_counts_only_accessed_elements():
  height, width, steps = 512, 1024, 16
  stack = jnp.zeros((steps, height, width))
  body = lambda total, slice_: (total + slice_, None)
  f = lambda stack: jax.lax.scan(body, jnp.zeros((height, width)), stack)[0]
  array = 4 * height * width
  # Every step reads a slice and the total and writes the total; one write precedes the loop.
  assert 3 * steps * array <= _compile(f, stack).memory_bytes < 3.3 * steps * array


@pytest.mark.parametrize(
  'text, groups',
  [
    ('{}', [[0, 1, 2, 3, 4, 5, 6, 7]]),
    ('{{0,2},{1,3}}', [[0, 2], [1, 3]]),
    ('[2,4]<=[8]', [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ('[2,4]<=[4,2]T(1,0)', [[0, 2, 4, 6], [1, 3, 5, 7]]),
    ("mesh['x'=2,'y'=4] {'y'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ("mesh['x'=2,'y'=4] {'x'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ("mesh['x'=2,'y'=2,'z'=2] {'x','z'}", [[0, 1, 4, 5], [2, 3, 6, 7]]),
    ("mesh['x'=8] {'x':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
    ("mesh['x'=2,'y'=4], device_ids=([4,2]T(1,0)) {'x'}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
  ],
)
def test_groups(text, groups):
  assert hlo.device_groups(text, 8).tolist() == groups


def test_unknown_groups_are_an_error():
  with pytest.raises(ValueError, match='unknown HLO syntax: mesh of old'):
    hlo.device_groups('mesh of old', 8)


def test_a_tpu_program():
  """HLO as written by the TPU compiler.

  An asynchronous all-gather that overlaps a matmul; a reduce-scatter in a fusion; a loop unrolled
  by two; an all-reduce over slices by the host; buffers in on-chip memory, S(1); tiles.
  """
  got = hlo.cost((pathlib.Path(__file__).parent / 'tpu.hlo').read_text())
  assert {c.kind: (c.bytes, n) for c, n in got.collectives.items()} == {
    'all-gather': (32 * 128 * 2, 1),
    'reduce-scatter': (32 * 128 * 4, 1),
    'all-reduce': (8 * 128 * 4, 1),
  }
  assert [c.groups for c in got.collectives if c.kind == 'all-reduce'] == [hlo.SLICES]
  assert got.flops == 2 * 8 * 16 * 24 * 32  # a batch of 8 matmuls
  tile = 8 * 128 * 4  # of [8, 1]; read and written, with the 4-byte counter
  assert got.memory_bytes == 5 * (2 * tile + 3 * 4 + 2 * 4)


@pytest.mark.parametrize(
  'kind, sent', [('all-gather', 75), ('all-reduce', 150), ('collective-permute', 100)]
)
def test_bytes_sent(kind, sent):
  assert hlo.sent_bytes(hlo.Collective(kind, '', 100), 4) == sent


def test_convolutions_do_not_count_padding():
  image, kernel = jnp.zeros((2, 3, 9)), jnp.zeros((5, 3, 4))
  convolve = functools.partial(
    jax.lax.conv_general_dilated,
    window_strides=(2,),
    padding=[(3, 3)],
    dimension_numbers=('NCH', 'OIH', 'NCH'),
  )
  positions = convolve(jnp.ones((1, 1, 9)), jnp.ones((1, 1, 4)))  # products per position
  assert _compile(convolve, image, kernel).flops == 2 * 2 * 3 * 5 * np.sum(positions)
