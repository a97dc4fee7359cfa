"""moejax: pre-training of mixture-of-experts language models in JAX."""

import time

STARTED = time.monotonic()  # about when the program was
__version__ = '0.1.0'
