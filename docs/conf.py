"""The documentation site: ``python -m sphinx -M html docs site -W --keep-going`` writes it to ``site/html``."""

import nodeshape

project = "nodeshape"
release = nodeshape.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

myst_heading_anchors = 3

napoleon_use_ivar = True
napoleon_attr_annotations = False

autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
add_module_names = False

html_theme = "furo"
pygments_dark_style = "github-dark"
html_title = "nodeshape"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_copyright = False
html_show_sphinx = False
html_copy_source = False
