r"""From pictures to weights: the two loops, their optimizers, caches, run folders, several processes, the dry run."""
