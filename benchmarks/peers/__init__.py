"""moejax beside the programs that one would take in its place, on this machine's CPU.

`python -m benchmarks.peers --output=DIR` (docs/peers.md).
"""
