r"""Tests of the built site in a browser; a package, so that its conftest.py and that of tests/ have two names."""
