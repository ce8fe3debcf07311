r"""How fast we are, beside diffusers on the same machine: `python tests/benchmarks`; no part of the tests."""
