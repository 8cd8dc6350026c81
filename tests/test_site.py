"""The course as a site and as a book: made without torch or a run, and every address in it leads somewhere, in a browser that reaches nothing else."""
import functools
import http.server
import json
import os
import re
import subprocess
import sys
import threading
import xml.dom.minidom
import zipfile
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import house
import pytest
from conftest import NBS, ROOT
from filelock import FileLock
from test_progress import chromium

pytest.importorskip('sphinx_book_theme', reason='Sphinx is not installed: pip install -e ".[docs]"')
pytest.importorskip('myst_nb', reason='myst-nb is not installed: pip install -e ".[docs]"')
sys.path.insert(0, str(ROOT/'docs'))
import course  # noqa: E402

# A build that cannot import torch or the package, nor run a notebook.
BUILD = """
import sys, nbclient
for name in ('torch', 'exp'): sys.modules[name] = None
nbclient.NotebookClient.execute = None
from sphinx.cmd.build import main
sys.exit(main(sys.argv[1:]))
"""


def built(base, *args):
    "Builds once for all processes of the tests; a warning is a failure."
    out = (base.parent if 'PYTEST_XDIST_WORKER' in os.environ else base)/f'docs-{args[1] if args else "html"}'
    with FileLock(f'{out}.lock'):
        if not (out/'done').exists():
            r = subprocess.run([sys.executable, '-c', BUILD, '-q', '-W', '--keep-going', *args, '-d', f'{out}-trees', '-c', 'docs', '.', str(out)],
                               cwd=ROOT, capture_output=True, text=True)
            assert r.returncode == 0, r.stdout + r.stderr
            (out/'done').touch()
    return out


@pytest.fixture(scope='session')
def site(tmp_path_factory): return built(tmp_path_factory.getbasetemp())


class Page(HTMLParser):
    "Addresses on a page, by tag, and the ids that it has."
    def __init__(self, path):
        super().__init__()
        self.targets, self.ids = [], set()
        self.feed(path.read_text(encoding='utf-8'))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs[k] for k in ('id', 'name') if attrs.get(k)}
        self.targets += [(tag, attrs[k]) for k in ('href', 'src') if attrs.get(k)]


@functools.cache
def page(path): return Page(path)


def dead(root, paths):
    "Addresses that lead nowhere, or fetch something from elsewhere."
    for p in paths:
        for tag, to in page(p).targets:
            if re.match('(https?:)?//', to):
                if tag != 'a': yield f'{p.relative_to(root)} fetches {to}'
                continue
            if to.startswith(('data:', 'mailto:')): continue
            file, anchor = urldefrag(re.sub(r'\?[^#]*', '', to))
            file = p.parent/unquote(file) if file else p
            if not file.is_file(): yield f'{p.relative_to(root)} -> {to}'
            elif anchor and file.suffix in ('.html', '.xhtml') and unquote(anchor) not in page(file.resolve()).ids: yield f'{p.relative_to(root)} -> {to}: no such place'


def test_every_address_on_the_site_leads_somewhere(site):
    paths = [p.resolve() for p in site.rglob('*.html') if '_static' not in p.parts]
    assert len(paths) > len(NBS) and not [*dead(site.resolve(), paths)]


def text(path): return re.sub('<[^>]+>', '', path.read_text(encoding='utf-8'))


@pytest.mark.parametrize('nb', house.notebooks(), ids=lambda n: n.name)
def test_a_page_for_each_notebook(site, nb):
    "With its number, its minutes, what comes before and after, answers folded, and without the exporter's marks."
    path = site/nb.path.relative_to(ROOT).with_suffix('.html')
    raw, lessons = path.read_text(encoding='utf-8'), [n for n in house.notebooks() if n.is_lesson]
    assert re.search(rf'<h1>{nb.name.split("_")[0]} · ', raw) and re.search(r'\d+ minutes · makes', text(path))
    if nb.name != '00_export': assert not re.search(r'(?m)^ *# *\|? *(export|default_exp)\b', re.sub('<[^>]+>', '', raw))
    assert len(re.findall(r'<summary[^>]*>\s*<[^>]*>Answer \d', raw)) >= 1
    if nb.is_lesson:
        i = lessons.index(nb)
        for way, other in (('prev', lessons[i - 1] if i else None), ('next', (lessons + [None])[i + 1])):
            found = re.search(rf'<a class="{"left-prev" if way == "prev" else "right-next"}"\s+href="([^"]*)"', raw)
            if other: assert found and Path(found[1]).stem == other.name, way


def test_the_side_bar_has_second_readings_under_their_lessons(site):
    nav = (site/'nbs/index.html').read_text(encoding='utf-8')
    nav = nav[nav.index('bd-links'):nav.index('bd-article')]
    order = list(dict.fromkeys(Path(h).stem for h in re.findall(r'href="([^"#]+)\.html"', nav)))
    order = [n for n in order if n[0].isdigit()]
    assert sorted(order) == sorted(n.name for n in house.notebooks())
    for n in house.notebooks():
        if not n.is_lesson: assert order.index(n.needs().name) < order.index(n.name)
    lessons = [n.name for n in house.notebooks() if n.is_lesson]
    assert [n for n in order if n in lessons] == lessons


def test_names_lead_to_the_cells_that_make_them(site):
    import exp
    listed = re.findall(r'<a class="name[^"]*" href="([^"#]+)#(\w+)"', (site/'docs/names.html').read_text(encoding='utf-8'))
    modules = {n.module for n in house.notebooks()}
    assert {name for _, name in listed} >= {n for n in dir(exp) if n[0] != '_'} - modules - {'export'}
    for href, name in listed:
        raw = (site/'docs'/href).resolve().read_text(encoding='utf-8')
        cell = re.sub('<[^>]+>', '', raw[(at := raw.index(f'id="{name}"')):at + 60_000])
        assert re.search(rf'(?m)(^|\b)((def|class) {name}\b|{name}\b[^=\n]*(: [^=\n]+)? ?=)', cell), name


def test_plain_words_are_no_names_where_nobody_means_them():
    assert course.where('train', course.pages()['08_data_block']) is None
    assert course.where('train', course.pages()['11b_train_imagenette']).name == '11b_train_imagenette'
    assert course.where('train', course.pages()['11g_exp_train']).name == '11g_exp_train'
    assert course.where('Learner', course.pages()['01_datasets']).name == '09b_learner'


# links in what is read elsewhere: JupyterLab (its root is the repository), a code host

def links(path):
    if path.suffix == '.md': found = path.read_text(encoding='utf-8')
    else: found = '\n'.join(course.source(c) for c in course.read(path)['cells'] if c['cell_type'] == 'markdown')
    found = re.sub(r'(?s)```.*?```|`[^`\n]*`', '', found)
    return {a or b for a, b in re.findall(r'\]\(([^)\s]+)\)|(?:href|src)="([^"]+)"', found)}


@pytest.mark.parametrize('path', [*NBS, *ROOT.glob('*.md'), *ROOT.glob('docs/*.md')], ids=lambda p: p.name)
def test_links_name_files(path):
    "A folder opens nothing in JupyterLab, and what lies above its root cannot be reached."
    for to in links(path):
        if re.match('[a-z]+:|#', to): continue
        target = (path.parent/unquote(urldefrag(to)[0])).resolve()
        assert target.is_file() and ROOT in target.parents, to


# a browser that reaches nothing else

@pytest.fixture(scope='module')
def browser():
    sync = pytest.importorskip('playwright.sync_api', reason='Playwright is not installed: pip install playwright')
    exe = chromium()
    if exe is None: pytest.skip('there is no Chromium here (Debian: apt-get install chromium), or name it in EXP_CHROMIUM')
    flags = '--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync'.split()
    with sync.sync_playwright() as pw:
        b = pw.chromium.launch(executable_path=exe, args=flags)
        yield b
        b.close()


@pytest.fixture(params=['file', 'http'])
def base(request, site):
    "The site's address, as a folder and on a server."
    if request.param == 'file': yield site.as_uri() + '/'; return
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/'
    server.shutdown()
    server.server_close()


@pytest.fixture
def tab(browser, base):
    "A page that is refused everything but the site; what it asked for is in `tab.refused`."
    ctx = browser.new_context(viewport={'width': 1400, 'height': 900})
    page = ctx.new_page()
    page.refused = []
    def guard(route):
        if route.request.url.startswith((base, 'data:')): route.continue_()
        else: page.refused.append(route.request.url); route.abort()
    page.route('**/*', guard)
    yield page
    ctx.close()


def opened(tab, address):
    tab.goto(address)
    tab.wait_for_function('!window.MathJax || !document.querySelector(".math") || (MathJax.startup && MathJax.startup.promise)')
    tab.evaluate('() => window.MathJax && MathJax.startup && MathJax.startup.promise.then(() => null)')


WIDER = '''() => [...document.querySelectorAll('.cell_input pre')].filter(o => o.scrollWidth > o.clientWidth).map(o => o.textContent.slice(0, 60))'''


def test_pages_in_a_browser(tab, base, site):
    "Nothing is asked for elsewhere, all mathematics is drawn, no page scrolls sideways; on a laptop a hundred columns of code fit."
    where = [*site.glob('nbs/[0-9]*.html'), site/'index.html', site/'docs/names.html', *site.glob('nbs/more/*.html')]
    if base.startswith('http'): where = [site/n for n in ('index.html', 'nbs/09_optimizers.html', 'nbs/11a_interpret.html', 'docs/names.html')]
    for p in where:
        opened(tab, base + p.relative_to(site).as_posix())
        maths = tab.evaluate('[document.querySelectorAll("mjx-container").length, document.querySelectorAll("[data-mjx-error], mjx-merror").length]')
        assert maths == [len(re.findall('class="math notranslate', p.read_text(encoding='utf-8'))), 0], p.name
        for width in (1400, 390):
            tab.set_viewport_size({'width': width, 'height': 900})
            assert tab.evaluate('document.documentElement.scrollWidth') <= width, f'{p.name} at {width} pixels'
            if width == 1400: assert not tab.evaluate(WIDER), p.name
        if p.stem == '09_optimizers': assert maths[0] > 20
    assert not tab.refused


def test_search_finds_the_lesson(tab, base):
    tab.goto(base + 'search.html?q=trust+ratio')
    tab.wait_for_selector('#search-results li a')
    assert '09_optimizers' in tab.evaluate('document.querySelector("#search-results li a").href')
    assert not tab.refused


def test_dark(browser, site):
    "Night: dark ground, light letters, and figures, which have black letters, on white."
    ctx = browser.new_context(color_scheme='dark')
    tab = ctx.new_page()
    tab.goto(site.as_uri() + '/nbs/09_optimizers.html')
    ground, letters, figure = tab.evaluate('''() => [[document.body, 'backgroundColor'], [document.querySelector('article p'), 'color'], [document.querySelector('.cell_output img'), 'backgroundColor']]
        .map(([o, k]) => getComputedStyle(o)[k].match(/[0-9.]+/g).slice(0, 3).reduce((a, b) => a + +b, 0)/3)''')
    assert ground < 60 and letters > 140 and figure > 150
    ctx.close()


def test_the_book(tmp_path_factory):
    "An EPUB that is well formed, has every notebook in its contents, formulas that need no script, and no dead address."
    out = built(tmp_path_factory.getbasetemp(), '-b', 'epub', '-D', 'html_math_renderer=mathml')
    book = zipfile.ZipFile(out/'lesson11.epub')
    names = book.namelist()
    assert names[0] == 'mimetype' and book.getinfo('mimetype').compress_type == zipfile.ZIP_STORED
    for n in names:
        if n.endswith(('.xhtml', '.opf', '.ncx')): xml.dom.minidom.parseString(book.read(n))
    nav = book.read('nav.xhtml').decode()
    assert not [n.name for n in house.notebooks() if f'{n.name}.xhtml' not in nav]
    assert '<math' in book.read('nbs/09_optimizers.xhtml').decode() and not [n for n in names if n.endswith('tex-svg.js')]
    folder = tmp_path_factory.mktemp('book')
    book.extractall(folder)
    assert not [*dead(folder, [p for p in folder.rglob('*.xhtml')])]


# what docs/course.py puts into the notebooks

def tagged(nb): return [c for c in nb['cells'] if 'course' in c['metadata'].get('tags', [])]


@pytest.mark.parametrize('page', course.pages().values(), ids=course.pages())
def test_questions_and_the_way_on(page, monkeypatch):
    "Three to five questions a lesson, each with the one cell that shows its answer; on writing them, all else stays, and a second time changes nothing."
    asked = course.quizzes().get(page.name, [])
    assert len(asked) in ((3, 4, 5) if page.is_lesson else (0,))
    for question, answer, piece in asked: assert course.cell_with(page, piece) and question.endswith('?')
    before, after = page.nb, course.with_course(page)
    rest = [c for c in after['cells'] if c not in tagged(after)]
    assert [c['source'][1:] for c in rest] == [c['source'][1:] for c in before['cells'] if c not in tagged(before)]
    read, again = course.read, json.dumps(after)
    monkeypatch.setattr(course, 'read', lambda path: json.loads(again) if path == page.path else read(path))
    assert course.with_course(page) == after
    text = ''.join(course.source(c) for c in tagged(after))
    assert text.count('<details>') == text.count('</details>') == (0 if page.name in course.FULL else len(asked))
    for to in re.findall(r'\]\((.+?\.ipynb)\)', text): assert (page.path.parent/to).is_file(), to
    if tagged(before): assert before == after, 'python docs/course.py'


def test_all_notebooks_have_their_questions_or_none_has():
    assert len({bool(tagged(p.nb)) for p in course.pages().values()}) == 1, 'python docs/course.py'


def test_a_first_cell_installs_where_the_course_is_not(monkeypatch, tmp_path):
    "With an address in settings.ini, in lessons only; here it does nothing, and where the package is missing it clones, goes there and installs."
    lesson, second = course.pages()['09_optimizers'], course.pages()['09a_fast_optimizers']
    assert 'install' not in [c.get('id') for c in course.with_course(lesson)['cells'] + course.with_course(second, 'https://host/course')['cells']]
    nb = course.with_course(lesson, 'https://host/course')
    cell = nb['cells'][1]
    assert cell['id'] == 'install' and [c['execution_count'] for c in nb['cells'] if c['cell_type'] == 'code'][:3] == [1, 2, 3]
    from IPython.core.inputtransformer2 import TransformerManager
    code, said = TransformerManager().transform_cell(course.source(cell)), []
    shell = type('Shell', (), dict(system=said.append, run_line_magic=lambda self, *a: said.append(' '.join(a))))()
    shell.system = said.append
    exec(code, {'get_ipython': lambda: shell})
    assert said == []
    import importlib.util
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    exec(code, {'get_ipython': lambda: shell})
    assert said == ['git clone -q https://host/course lesson11', 'cd lesson11/nbs', 'pip install -q ..']


@pytest.mark.parametrize('repository', ['', 'https://github.com/somebody/course'])
def test_buttons_take_the_address_from_one_setting(repository, monkeypatch):
    import runpy
    monkeypatch.setattr(course, 'setting', lambda name: repository if name == 'repository' else name)
    monkeypatch.setitem(sys.modules, 'course', course)
    conf = runpy.run_path(str(ROOT/'docs/conf.py'))
    options = conf['html_theme_options']
    assert ('launch_buttons' in options) == options['use_download_button'] == conf['html_copy_source'] == bool(repository)
    assert options.get('repository_url', '') == repository


def test_no_button_without_an_address(site):
    if course.setting('repository'): pytest.skip('there is an address')
    raw = (site/'nbs/09_optimizers.html').read_text(encoding='utf-8')
    assert 'colab.research' not in raw and 'download-source-button' not in raw
