"""Where moejax.variants was before; for config files that import it from here."""

from moejax.variants import *  # noqa: F403
