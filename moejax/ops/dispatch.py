"""Moves tokens to the rows of their experts and back, as a Plan says.

`dispatch`, experts on all rows, `combine`: large products, for accelerators and for experts on
other devices. `moejax.ops.expert_loop` fuses all three, a few experts at a time.

Forward and backward passes of both are gathers, and the rows of a token are summed in a fixed
order, without atomics: results are reproducible.
"""

import jax
import jax.numpy as jnp


@jax.custom_vjp
def dispatch(x_TD, plan):
  """Rows of all experts, [E, G*C, D] or ragged [rows, D], like `plan.token`.

  An empty row holds some token; its weight is 0, and its gradient is never read.
  """
  return x_TD.at[plan.token].get(mode='promise_in_bounds')


@jax.custom_vjp
def combine(rows, plan):
  """y_TD, the sum of the rows of every token, which experts have multiplied by `plan.weight`.

  Empty rows are not read; tokens without a row get 0. Sums are in float32 at least.
  """
  D = rows.shape[-1]
  rows_RD = rows.reshape(-1, D)
  R = rows_RD.shape[0]
  last = plan.rows_by_token.shape[0] - 1

  def add_row(i, y_TD):
    row_T = plan.rows_by_token[jnp.minimum(plan.row_start_T + i, last)]
    next_TD = rows_RD.at[jnp.minimum(row_T, R - 1)].get(mode='promise_in_bounds')
    return y_TD + jnp.where(((i < plan.rows_per_token_T) & (row_T < R))[:, None], next_TD, 0)

  y_TD = jnp.zeros((plan.rows_per_token_T.shape[0], D), jnp.promote_types(rows.dtype, jnp.float32))
  if plan.max_per_token <= 8:  # one fused pass
    for i in range(plan.max_per_token):
      y_TD = add_row(i, y_TD)
  else:
    y_TD = jax.lax.fori_loop(0, plan.rows_per_token_T.max(), add_row, y_TD)
  return y_TD.astype(rows.dtype)


# Each is the transpose of the other. The gradient of the weights comes from the experts.
dispatch.defvjp(
  lambda x_TD, plan: (dispatch(x_TD, plan), plan),
  lambda plan, d_rows: (combine(d_rows, plan), None),
)
combine.defvjp(
  lambda rows, plan: (combine(rows, plan), plan),
  lambda plan, dy_TD: (dispatch(dy_TD, plan), None),
)
