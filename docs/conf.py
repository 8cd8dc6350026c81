"""The course as a site: `make docs`. Sphinx reads the notebooks as they are committed; what it must see otherwise is changed here."""
import json
import re
import sys
from importlib.metadata import distribution
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import course
from docutils import nodes

project, author, version = course.setting('name'), course.setting('author'), course.setting('version')
copyright = author
extensions = ['myst_nb', 'sphinx.ext.mathjax']
root_doc, include_patterns = 'nbs/index', ['nbs/*.ipynb', 'nbs/more/*.ipynb', 'docs/*.md', 'C*.md']
exclude_patterns = ['**/.ipynb_checkpoints']

nb_execution_mode = 'off'
nb_ipywidgets_js, nb_merge_streams = {}, True
myst_enable_extensions, myst_heading_anchors = ['dollarmath', 'amsmath', 'attrs_block'], 3
suppress_warnings = ['misc.highlighting_failure']                # an ellipsis where a reader's own code goes

html_theme, html_title = 'sphinx_book_theme', 'lesson11'
html_copy_source = False
html_extra_path = ['_root']                                    # the address without a name leads to nbs/index.html
# MathJax in one file, which draws its letters: there are no fonts to be fetched.
html_static_path = ['_static', str(distribution('sphinx-mathjax-offline').locate_file('sphinx-mathjax-offline/static/mathjax/tex-svg.js'))]
html_css_files, html_math_renderer, mathjax_path = ['course.css'], 'mathjax', 'tex-svg.js'

epub_show_urls, epub_tocscope, epub_tocdepth, epub_tocdup = 'no', 'includehidden', 2, False
epub_exclude_files = ['index.html', '_static/tex-svg.js']

repository = course.setting('repository')
html_theme_options = dict(use_download_button=bool(repository), use_fullscreen_button=False, show_toc_level=2,
                          search_as_you_type=False, footer_content_items='copyright.html')
if repository:
    html_copy_source = True
    html_theme_options |= dict(repository_url=repository, repository_branch='main', path_to_docs='', use_repository_button=True,
                               launch_buttons={'colab_url': 'https://colab.research.google.com'})


def toctree(pages, caption=''):
    "A table of contents that shows in the side bar only."
    heading = f':caption: {caption}\n' if caption else ''
    return f'```{{toctree}}\n:hidden:\n{heading}\n' + '\n'.join(f'/{p}' for p in pages) + '\n```\n'


def begins(page):
    "What stands under the title of a page: how long it takes, what it makes, what may be read after it."
    more = ', '.join(f'[{course.number(p.name)}](/{p.doc}.ipynb)' for p in course.seconds(page))
    after = [] if page.is_lesson else [f'second reading, after [{course.number(page.after)}](/{course.pages()[page.after].doc}.ipynb)']
    parts = [*after, f'{page.minutes} minutes', f'makes `{page.module}`', *([f'second readings: {more}'] if more else [])]
    tree = toctree(p.doc for p in course.seconds(page)) if more else ''
    return f'\n\n{{.facts}}\n{" · ".join(parts)}\n\n{tree}\n'


def prepared(nb, page):
    "A notebook as the site shows it."
    names = course.made(page)
    cells, answer = [], ''
    for c in nb['cells']:
        src = course.source(c)
        if '## Exercises' in src: answer = 'Answer'
        if answer and (m := re.match(r'# (?:Answer )?(\d+)', src)): answer = f'Answer {m[1]}'
        if c['cell_type'] == 'code' and page.name != '00_export': src = course.without_marks(src)
        if 'course' in c['metadata'].get('tags', []) or not src.strip(): continue
        if c['cell_type'] == 'code':
            c['metadata'] = {'names': [f'cell-{c["id"]}', *(n for n, (at, _) in names.items() if at == c['id'])]}
            if answer: c['metadata'] |= {'tags': ['hide-cell'], 'mystnb': dict.fromkeys(('code_prompt_show', 'code_prompt_hide'), answer)}
        cells.append({**c, 'source': src})
    def show(page, piece): return f'<a href="#cell-{course.cell_with(page, piece)}">this cell</a>'
    if made := course.questions(page, show): cells.append(dict(cell_type='markdown', id='questions', metadata={}, source=made))
    cells[0]['source'] = re.sub('^# (.+)', lambda m: f'# {course.number(page.name)} · {m[1]}{begins(page)}', cells[0]['source'])
    return {**nb, 'cells': cells}


def names_page():
    "A table for each module: names, and what they say of themselves."
    for page in course.pages().values():
        if not course.made(page): continue
        yield f'\n## {page.module}\n\nMade in [{course.number(page.name)} · {course.title(page.nb)}](/{page.doc}.ipynb).\n\n'
        yield '| name | what it says of itself |\n|---|---|\n'
        for name, (_, said) in course.made(page).items():
            yield '| `{}` | {} |\n'.format(name, said.replace('|', r'\|'))


def on_read(app, docname, text):
    name = docname.split('/')[-1]
    if docname == 'docs/names': text[0] += ''.join(names_page())
    if name == 'index':
        nb = json.loads(text[0])
        for c in nb['cells']:
            if c['cell_type'] == 'code' and course.without_marks(course.source(c)) != course.source(c): c['metadata']['tags'] = ['hide-cell']
        lessons = [p.doc for p in course.pages().values() if p.is_lesson]
        beside = ['docs/names', 'docs/colab', 'docs/distributed', 'docs/other_libraries', 'CONTRIBUTING', 'CHANGELOG']
        nb['cells'].append(dict(cell_type='markdown', id='contents', metadata={}, source=toctree(lessons, 'Lessons') + '\n' + toctree(beside, 'Beside them')))
    elif name in course.pages():
        page = course.pages()[name]
        nb = prepared(json.loads(text[0]), page)
    else: return
    text[0] = json.dumps(nb)


def on_doctree(app, tree):
    "Gives the cell that makes a name that name's address."
    for cell in tree.findall(nodes.container):
        cell['ids'] += (cell.get('cell_metadata') or {}).get('names', [])


def section_of(node):
    "Of a name on the page of names: the page that makes the module under whose heading it stands."
    while not isinstance(node, nodes.section): node = node.parent
    return {p.module: p for p in course.pages().values()}.get(node[0].astext())


def on_resolved(app, tree, docname):
    "Names in backticks lead to the cells that make them."
    here = course.pages().get(docname.split('/')[-1])
    for o in [*tree.findall(nodes.literal)]:
        name = o.astext().removesuffix('()')
        page = section_of(o) if docname == 'docs/names' else course.where(name, here)
        if page is None or name not in course.made(page) or isinstance(o.parent, (nodes.title, nodes.reference)): continue
        uri = '' if page is here else app.builder.get_relative_uri(docname, page.doc)
        o.replace_self(nodes.reference('', '', o.deepcopy(), internal=True, refuri=f'{uri}#{name}', classes=['name']))


def on_page(app, docname, template, context, tree):
    "Before and after a lesson are lessons. (myst-nb's style sheet comes too late to be packed into the book.)"
    if app.builder.name == 'epub': context['css_files'] = [c for c in context['css_files'] if 'mystnb' not in str(c.filename)]
    page = course.pages().get(docname.split('/')[-1])
    if page is None: return
    for key, other in zip(('prev', 'next'), course.around(page)):
        if other is not None: context[key] = dict(link=app.builder.get_relative_uri(docname, other.doc), title=nodes_title(app, other.doc))


def nodes_title(app, doc): return app.builder.render_partial(app.env.titles[doc])['title']


def visit_mathml(self, node):
    "Formulas of the book, which a reader shows without any script."
    from latex2mathml.converter import convert
    self.body.append(convert(node.astext(), display='block' if isinstance(node, nodes.math_block) else 'inline'))
    raise nodes.SkipNode


def setup(app):
    app.add_html_math_renderer('mathml', (visit_mathml, None), (visit_mathml, None))
    app.connect('source-read', on_read)
    app.connect('doctree-read', on_doctree)
    app.connect('doctree-resolved', on_resolved)
    app.connect('html-page-context', on_page)
