"""The parts by name.

Each is a module with `TITLE`, `ABOUT` (how to read its table), `cases(tiny)` (by name, functions of
`limits.Limits` that return a row) and `table(rows)` (of the rows without an error, in Markdown).
"""

from benchmarks.accelerator import chip, decoding, ops, profile, steps, values

PARTS = {
  'chip': chip,
  'values': values,
  'steps': steps,
  'ops': ops,
  'profile': profile,
  'decoding': decoding,
}
