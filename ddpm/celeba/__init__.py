r"""Faces and their captions: CelebA as people have it, faces drawn by hand, attributes to sentences and back."""
