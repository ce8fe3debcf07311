r"""Sphinx's settings; `python -m sphinx -W -n -b html docs OUT` builds the site, with the network off."""

import re
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))

project = "ddpm"
package = (HERE.parent / "ddpm/__init__.py").read_text(encoding="utf-8")
release = re.search(r'__version__ = "(.+)"', package)[1]
html_title = f"ddpm {release}"

extensions = ["myst_nb", "sphinxcontrib.katex", "beside"]
exclude_patterns = ["_*", "**.ipynb_checkpoints"]
nb_execution_mode = "off"  # notebooks are committed with their outputs
myst_enable_extensions = ["dollarmath", "attrs_block"]
myst_heading_anchors = 3

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["beside.css", "plots.css"]
html_js_files = ["focus.js"]
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False
smartquotes = False  # an ellipsis in a docstring is three dots of Python
html_theme_options = {
    "light_css_variables": {
        "font-stack--monospace": "ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace"
    }
}
highlight_language = "sh"  # of blocks without a language: commands
pygments_style, pygments_dark_style = "github-light", "github-dark"  # both pass WCAG AA

# KaTeX's script comes with sphinxcontrib-katex, its style sheet and fonts, of the same version, are in _static.
html_math_renderer = "katex"
katex_css_path = "katex/katex.min.css"
katex_options = "{throwOnError: true, strict: 'error'}"

# Notebooks stand beside docs/, where Sphinx cannot see them; index.md lists those that are to be pages.
shutil.rmtree(HERE / "notebooks", ignore_errors=True)
if (HERE.parent / "notebooks").is_dir():
    shutil.copytree(HERE.parent / "notebooks", HERE / "notebooks", ignore=shutil.ignore_patterns(".*"))
