"""Corpora, tokenizers and batches. TensorFlow is imported only when a seqio task is read."""

from moejax.data.batch import Batch, Loader
from moejax.data.config import DataConfig
from moejax.data.loader import make_loader
from moejax.data.tokenizer import Tokenizer, make_tokenizer

__all__ = ['Batch', 'DataConfig', 'Loader', 'Tokenizer', 'make_loader', 'make_tokenizer']
