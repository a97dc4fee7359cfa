"""Pure functions of arrays: each fast form stands beside a plain one that says what it computes."""
