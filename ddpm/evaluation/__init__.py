r"""A run in numbers: adherence, Frechet distance, bits/dim and more."""
