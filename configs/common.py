"""For config files of one's own that import what moejax.variants holds by its former name."""

from moejax.variants import *  # noqa: F403
