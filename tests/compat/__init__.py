r"""Our numbers against diffusers' and transformers', which only these tests import (extra `compat`)."""
