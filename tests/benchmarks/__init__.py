r"""How fast we are, beside diffusers on the same machine: `python -m tests.benchmarks`; no part of the tests."""
