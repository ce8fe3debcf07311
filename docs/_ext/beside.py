r"""The directive `beside`: every class and function of a file, its docstring on the left and its source on the right.

    ```{beside} ddpm/diffusion.py
    ```

Docstrings are read as this project writes them: paragraphs, `$$` equations, `$` formulas within a line of text,
lists, doctests, sections such as `Args:`, and names in backticks, which become links where the project defines them.
`write_pages` writes the page that holds the directive for every file of the house, so that a new file has its page
without being asked.
"""

import html
import re
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

from docutils import nodes
from parsed import ROOT, Thing, files, meant, module_name, page_of, parse
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import make_id

SECTION = re.compile(r"(Args|Attributes|Callable|Letters|Raises|Returns|Shapes):(?: (?=\S)|$)", re.MULTILINE)
GREEK = {"alpha_bar": r"\bar\alpha", "eps": r"\epsilon"} | {
    name: f"\\{name}" for name in ("alpha", "beta", "sigma")
}
SYMBOL = re.compile(r"\b(alpha_bar|alpha|beta|sigma|eps|x|z)_(\{[^}]*\}|[0tsT]\b)")
QUAD = re.compile(r"\\q?quad\b\s*")  # between equations that share one pair of $$
ITEM = re.compile(r"([\w`*, ]+): (.*)", re.DOTALL)


class Beside(SphinxDirective):
    r"""`{beside} FILE`: the whole file, public things first, then the rest of its source."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        file = self.arguments[0]
        for name in ("README.md", *files()):  # a link needs to know every name there is
            self.env.note_dependency(str(ROOT / name))
        modules = {m.name: m for m in map(parse, files())}
        self.module = modules[module_name(file)]
        things = [thing for m in modules.values() for thing in m.things]
        self.known = [name for thing in things for name in names_of(thing)]
        self.outermost = {name for thing in things for name in thing.names}
        domain, node_id = self.env.domains.python_domain, f"module-{self.module.name}"
        domain.note_module(self.module.name, node_id, self.module.docstring.partition("\n")[0], "", False)
        intro = nodes.container(classes=["module-docstring"], ids=[node_id])
        intro += self.docstring(self.module.docstring)
        return [intro, *self.index(), *map(self.section, self.module.things), *self.rest()]

    def section(self, thing: Thing) -> nodes.section:
        r"""Heading, docstring and source of a thing; its documented methods follow as sections of their own."""
        section = nodes.section(classes=["thing"])
        for name in (*thing.names, *thing.untold):
            self.target(section, name, thing.kind if name in thing.names else "method")
        title = nodes.title()
        for i, name in enumerate(thing.names[:3]):
            title += [nodes.Text(", ")] * (i > 0) + [nodes.literal("", self.short(name))]
        title += [nodes.Text(", ...")] * (len(thing.names) > 3)
        code = nodes.container(classes=["source"])
        code += nodes.paragraph("", f"{self.module.file}, line {thing.line}", classes=["place"])
        code += python(thing.code)
        row = nodes.container(classes=["beside" if thing.docstring else "alone"])
        if thing.docstring:
            told = nodes.container(classes=["told"])
            told += self.docstring(thing.docstring)
            row += told
        row += code
        section += [title, row, *map(self.section, thing.members)]
        return section

    def target(self, section: nodes.section, name: str, kind: str):
        r"""Let `name` be found by references, the index and the search."""
        node_id = make_id(self.env, self.state.document, "", name)
        section["ids"].append(node_id)
        self.env.domains.python_domain.note_object(name, kind, node_id, location=section)

    def short(self, name: str) -> str:
        return name.removeprefix(self.module.name + ".")

    def index(self) -> list[nodes.Node]:
        r"""A line of links to all that follows."""
        line = nodes.paragraph(classes=["things"])
        for name in (name for thing in self.module.things for name in thing.names):
            line += [nodes.Text(" ")] * bool(line.children) + [self.link(name, self.short(name))]
        return [line] if line.children else []

    def rest(self) -> list[nodes.Node]:
        if not self.module.rest:
            return []
        section = nodes.section(ids=["rest-of-the-file"], classes=["thing"])
        section += [nodes.title("", "The rest of the file"), python(self.module.rest)]
        return [section]

    def link(self, name: str, text: str) -> addnodes.pending_xref:
        link = addnodes.pending_xref(
            "",
            nodes.literal(text, text),
            refdomain="py",
            reftype="obj",
            reftarget=name,
            refdoc=self.env.docname,
            refwarn=True,
            refexplicit=True,
        )
        return link

    # ------------------------------------------------------------------------------------------- docstrings

    def docstring(self, text: str) -> Iterator[nodes.Node]:
        r"""The nodes of a docstring; every second part between `$$` is an equation."""
        for i, part in enumerate(text.split("$$")):
            if i % 2:
                for equation in QUAD.split(part.strip()):  # set as inline math, which breaks lines at = and +
                    math = nodes.math("", rf"\displaystyle {equation}")
                    yield nodes.paragraph("", "", math, classes=["equation"])
            else:
                yield from self.blocks(part)

    def blocks(self, text: str) -> Iterator[nodes.Node]:
        text = SECTION.sub(lambda match: "\n" + match[0], text)
        for block in re.split(r"\n\s*\n", text.strip("\n")):
            lines = block.rstrip().split("\n")
            if not block.strip():
                continue
            if block.startswith(">>> "):
                yield nodes.literal_block(block, block, language="pycon", classes=["doctest"])
            elif section := SECTION.match(block):
                yield from self.labelled(section[1], block[section.end() :])
            elif all(line.startswith("    ") for line in lines) or re.search(r"\S {3,}\S", block):
                yield nodes.literal_block(dedent(block), dedent(block), language="text")
            elif block.startswith("- "):
                items = re.split(r"^- ", block, flags=re.MULTILINE)[1:]
                yield nodes.bullet_list("", *(nodes.list_item("", self.paragraph(item)) for item in items))
            else:
                yield self.paragraph(block)

    def labelled(self, label: str, text: str) -> Iterator[nodes.Node]:
        r"""A section: one paragraph, or a list of `name: description`."""
        strong = nodes.strong("", label)
        if not text.startswith("\n"):
            yield self.paragraph(text, strong, nodes.Text(" "))
            return
        items = re.split(r"\n(?=\S)", dedent(text).strip("\n"))
        pairs = [ITEM.fullmatch(item) for item in items]
        if not all(pairs):
            yield self.paragraph(text, strong, nodes.Text(" "))
            return
        yield nodes.paragraph("", "", strong)
        described = nodes.definition_list(classes=["arguments"])
        for pair in pairs:
            term = nodes.term("", "", *self.inline(pair[1] if "`" in pair[1] else f"`{pair[1]}`"))
            described += nodes.definition_list_item("", term, nodes.definition("", self.paragraph(pair[2])))
        yield described

    def paragraph(self, text: str, *before: nodes.Node) -> nodes.paragraph:
        return nodes.paragraph("", "", *before, *self.inline(" ".join(text.split())))

    def inline(self, text: str) -> Iterator[nodes.Node]:
        r"""Text with $formulas$, in which `names` are literals, and links where the project knows the name."""
        for i, part in enumerate(text.split("`")):
            if i % 2 == 0:
                for j, piece in enumerate(part.split("$")):
                    yield from [nodes.math("", piece)] if j % 2 else typeset(piece)
            elif (target := self.lookup(part)) is None:
                yield nodes.literal(part, part)
            else:
                yield self.link(target, part)

    def lookup(self, name: str) -> str | None:
        r"""The full name of what `name` means here: in this file, or the only one of that name in the house."""
        found = [full for full in self.known if full.endswith("." + name)]
        own = [full for full in found if full.startswith(self.module.name + ".")]
        found = own or [
            full for full in found if full in self.outermost or "." in name
        ]  # no stranger's bare method
        return found[0] if len(found) == 1 else None


def typeset(text: str) -> Iterator[nodes.Node]:
    r"""Text whose symbols with an index, such as x_0 and alpha_{t|s}, are set as mathematics."""
    end = 0
    for match in SYMBOL.finditer(text):
        yield nodes.Text(text[end : match.start()])
        yield nodes.math("", f"{GREEK.get(match[1], match[1])}_{{{match[2].strip('{}')}}}")
        end = match.end()
    yield nodes.Text(text[end:])


def names_of(thing: Thing) -> list[str]:
    r"""All full names that have a place in the section of a thing."""
    return [*thing.names, *thing.untold, *(name for member in thing.members for name in names_of(member))]


def python(code: str) -> nodes.literal_block:
    return nodes.literal_block(code, code, language="python")


def write_pages(app: Sphinx):
    r"""A page for each file of the house, below docs/code, and README's table over them."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    house = readme.partition("## The house\n")[2].partition("\n## ")[0]
    house = house.replace("](", "](../").replace("](../docs/", "](../")
    order = "\n".join(f"/{page_of(file)}" for file in files())
    pages = {"code/index": f"# The code\n{house}\n\n```{{toctree}}\n:hidden:\n\n{order}\n```\n"}
    for file in files():
        title = file.removeprefix("ddpm/").replace("_", "\\_")
        pages[page_of(file)] = f"---\nhide-toc: true\n---\n\n# {title}\n\n```{{beside}} {file}\n```\n"
    for path in app.srcdir.glob("code/*.md"):  # of files that an earlier version had
        if f"code/{path.stem}" not in pages:
            path.unlink()
    for name, text in pages.items():
        path = app.srcdir / f"{name}.md"
        path.parent.mkdir(exist_ok=True)
        if (
            not path.exists() or path.read_text(encoding="utf-8") != text
        ):  # what is the same is not built again
            path.write_text(text, encoding="utf-8")


LINK = re.compile(r'(?<!!)\[([^][\n"]+)\]\(\.\./([\w./]+)(?:#cell-id=([\w-]+))?\)')
DOTTED = re.compile(r"\w+(\.\w+)+")


def link_pages(app: Sphinx, docname: str, source: list[str]):
    r"""Links between files of the repository, which GitHub's readers follow, become links between pages here.

    `[vae.KLVAE](../ddpm/vae.py)` goes to the class, `[vae.py](../ddpm/vae.py)` to the page; a file in a room is
    called `training.caches.Latents` or `caches.Latents`. A link to a notebook goes to its page or, with
    `#cell-id=`, its cell. Notebooks stand one folder deeper here than there.
    """

    def link(match: re.Match) -> str:
        text, file, cell = match[1].replace("`", ""), match[2], match[3]
        if file in files() and DOTTED.fullmatch(text) and not text.endswith(".py"):
            return f"{{py:obj}}`{text} <{meant(text, file)}>`"
        if file in files():
            return f"{{doc}}`{text} </{page_of(file)}>`"
        if cell:
            return f"{{ref}}`{text} <{cell_label(cell)}>`"
        if file.endswith(".ipynb"):
            return f"{{doc}}`{text} </{file.removesuffix('.ipynb')}>`"
        if file.startswith("docs/") and file.endswith(".md"):
            return f"{{doc}}`{text} </{file[5:-3]}>`"
        return f"[{match[1]}](../../{file})" if docname.startswith("notebooks/") else match[0]

    source[0] = LINK.sub(link, source[0])
    if docname.startswith("notebooks/"):
        source[0] = source[0].replace("](../docs/images/", "](../images/")


def cell_label(cell: str) -> str:
    return f"cell-id={cell}"  # as JupyterLab has it in addresses


def label_cells(app: Sphinx, doctree: nodes.document):
    r"""Let the code cells of a notebook be found by their ids, which are its number and their place in it."""
    docname = app.env.docname
    for node in doctree.findall(nodes.container) if docname.startswith("notebooks/") else ():
        if node.get("nb_element") == "cell_code":
            label = cell_label(f"{docname[10:12]}-{node['cell_index'] + 1:02}")
            node["ids"].append(label)
            app.env.domains.standard_domain.anonlabels[label] = docname, label


def inline_diagrams(app: Sphinx, doctree: nodes.document, docname: str):
    r"""Set diagrams into the page, so that their boxes link to the code and their ink is the theme's."""
    root = "../" * docname.count("/")
    for image in list(doctree.findall(nodes.image)):
        if "/diagram-" not in image["uri"]:
            continue
        svg = (Path(app.srcdir) / image["uri"]).read_text(encoding="utf-8")
        svg = re.sub("<style>.*</style>", "", svg).replace('href="code/', f'href="{root}code/')
        label = html.escape(image["alt"])
        svg = svg.replace("<svg", f'<svg role="group" aria-label="{label}"', 1)
        image.replace_self(nodes.raw("", svg, format="html"))


def level_captions(app: Sphinx, page: str, template: str, context: dict, doctree):
    r"""Sphinx gives the captions of the sidebar the role of headings, but not the level that the role demands."""
    tree = context.get("furo_navigation_tree", "")
    context["furo_navigation_tree"] = tree.replace('role="heading"', 'role="heading" aria-level="2"')


def setup(app: Sphinx):
    app.add_directive("beside", Beside)
    app.connect("builder-inited", write_pages)
    app.connect("source-read", link_pages)
    app.connect("doctree-read", label_cells)
    app.connect("doctree-resolved", inline_diagrams)
    app.connect("html-page-context", level_captions, priority=900)  # after furo's
    return {"parallel_read_safe": False}
