"""What the site needs to know of the notebooks, read from their text: nothing is imported, nothing executed.

    python docs/course.py            writes into each notebook its questions, and a last cell that leads on
    python docs/course.py --check    says only which are out of step (exit status 1)"""
import ast
import configparser
import json
import os
import re
import sys
from functools import cache
from pathlib import Path
from textwrap import shorten

ROOT = Path(__file__).resolve().parent.parent
EXPORTED = re.compile(r'(\s*#.*\n)*?\s*#\s*\|?\s*export[is]?\s*$', re.M)
MARK = re.compile(r'\s*#\s*\|?\s*(export[is]?|default_exp\s+\S+|hide\w*|collapse\w*)\s*$')


def setting(name):
    "A line of settings.ini; empty where there is none."
    ini = configparser.ConfigParser()
    ini.read(ROOT/'settings.ini', encoding='utf-8')
    return ini['DEFAULT'].get(name, '')


def read(path): return json.loads(path.read_text(encoding='utf-8'))


def source(cell): return ''.join(cell['source'])


def number(name): return name.split('_')[0]


def title(nb): return re.match('# (.+)', source(nb['cells'][0]))[1]


class Page:
    "A notebook: its file, its place in the course, and what the table in nbs/index.ipynb says of it."
    def __init__(self, link, after, minutes, module, said):
        self.doc, self.name, self.after = f'nbs/{link}', Path(link).stem, after
        self.minutes, self.module, self.said = minutes, module, said
        self.path, self.is_lesson = ROOT/f'nbs/{link}.ipynb', after is None

    @property
    def nb(self): return read(self.path)


@cache
def pages():
    "`{name: Page}` of lessons and second readings, in the order in which one reads them."
    text = '\n'.join(source(c) for c in read(ROOT/'nbs/index.ipynb')['cells'])
    rows = [re.split(r'(?<!\\)\| ?', l)[1:-1] for l in text.splitlines() if re.match(r'\| \[\d', l)]
    found = []
    for link, *after, minutes, module, said in rows:
        after = after[0].strip() if after else None
        found.append(Page(re.search(r'\((.+)\.ipynb\)', link)[1], after, int(minutes), module.strip(' `'), said.strip()))
    lessons = [p for p in found if p.is_lesson]
    return {p.name: p for lesson in lessons for p in [lesson, *seconds(lesson, found)]}


def seconds(lesson, among=None): return [p for p in among or pages().values() if p.after == lesson.name]


def around(page):
    "The pages before and after `page`: from a lesson to the next lesson, from a second reading to what follows it."
    line = [p for p in pages().values() if p.is_lesson or not page.is_lesson]
    i = line.index(page)
    return line[i - 1] if i else None, line[i + 1] if i + 1 < len(line) else None


def without_marks(src):
    "The source of a cell without the exporter's marks at its top."
    lines = src.splitlines(keepends=True)
    top = next((i for i, l in enumerate(lines) if not re.match(r'\s*(#.*)?$', l)), len(lines))
    return ''.join(l for i, l in enumerate(lines) if i >= top or not MARK.match(l))


def comment(src, line):
    "What a comment says at the end of a line."
    return (re.search(r'\s# *(.+)$', src.splitlines()[line - 1]) or ['', ''])[1]


def defines(src):
    "Names that the top level of a cell defines: `{name: first line of its docstring; of a constant its comment, or its value}`."
    try: tree = ast.parse(src)
    except SyntaxError: return {}                                   # magics are no Python
    found = {}
    for o in tree.body:
        if isinstance(o, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found[o.name] = (ast.get_docstring(o) or '').split('\n')[0]
        targets = [*getattr(o, 'targets', []), *([o.target] if isinstance(o, ast.AnnAssign) else [])]
        for t in [n for target in targets for n in getattr(target, 'elts', [target])]:
            if isinstance(t, ast.Name): found[t.id] = comment(src, o.lineno) or f'`{shorten(ast.unparse(o.value), 70, placeholder=" …")}`'
    return found


def imports(src):
    "Names that a cell takes from modules of the package."
    try: tree = ast.parse(src)
    except SyntaxError: return set()
    taken = [o for o in ast.walk(tree) if isinstance(o, ast.ImportFrom) and (o.module or '').startswith('exp')]
    return {a.name for o in taken for a in o.names}


def code(page): return [c for c in page.nb['cells'] if c['cell_type'] == 'code']


@cache
def made(page):
    "Public names that a notebook makes: `{name: (id of the cell, what it says of itself)}`."
    text = (ROOT/page.module.replace('.', '/')).with_suffix('.py').read_text(encoding='utf-8')
    public, found = ast.literal_eval(re.search(r'(?ms)^__all__ = (\[.*?\])', text)[1]), {}
    for c in code(page):
        if not EXPORTED.match(source(c)): continue
        found |= {n: (c['id'], said) for n, said in defines(source(c)).items() if n in public}
    return found


@cache
def home():
    "`{public name: the page that makes it}`; of two the lower-numbered."
    return {n: p for p in sorted(pages().values(), key=lambda p: p.name, reverse=True) for n in made(p)}


@cache
def known(page):
    "Names that the code of a page makes or imports."
    return {*made(page)}.union(*(imports(source(c)) for c in code(page)))


def where(name, page):
    """The page that a name in backticks on `page` means, or None. A word that is a name and also plain English, say `train`,
    is meant where the page's code knows it."""
    if page and name in made(page): return page
    plain = name.islower() and '_' not in name
    if plain and page and name not in known(page): return None
    return home().get(name)


# Lessons at the ceiling of their minutes (tests/house.py): their questions stand on the site alone, until there is room.
FULL = ('01_datasets', '06_convnets', '07c_items', '08_data_block', '09_optimizers', '09ca_files', '09d_checkpoints', '10_transforms')

# what is put into the notebooks: cells tagged `course`, made from docs/quizzes.txt, the index and settings.ini

def cell_with(page, piece):
    "The id of the one code cell of a page that has `piece` in it."
    found = [c['id'] for c in code(page) if 'course' not in c['metadata'].get('tags', []) and piece in source(c)]
    if len(found) != 1: raise ValueError(f'docs/quizzes.txt, {page.name}: {len(found)} cells have {piece!r} in them; one is wanted')
    return found[0]


@cache
def quizzes():
    "`{lesson: [(question, answer, piece of the cell that shows it)]}`."
    _, *parts = re.split(r'(?m)^## ', (ROOT/'docs/quizzes.txt').read_text(encoding='utf-8'))
    return {p.split('\n')[0].strip(): re.findall(r'(?m)^\? (.+)\n! (.+)\n@ (.+)$', p) for p in parts}


def questions(page, show=lambda page, piece: f'`{piece.strip()}`'):
    "The questions of a lesson as Markdown, each answer folded; `show` names the cell that shows it."
    asked = [f'{i}. {question}\n\n   <details><summary>Answer</summary>\n\n   {answer} Shown by {show(page, piece)}.\n\n   </details>\n'
             for i, (question, answer, piece) in enumerate(quizzes().get(page.name, []), 1)]
    return '## Questions\n\n' + '\n'.join(asked) if asked else ''


def onward(page):
    "Where to go from a notebook: the pages around it, the contents, its second readings."
    def link(to, text): return f'[{text}]({Path(os.path.relpath(to, page.path.parent)).as_posix()})'
    before, after = around(page)
    parts = [link(before.path, f'←{number(before.name)}')] if before else []
    parts += [link(ROOT/'nbs/index.ipynb', 'contents'), *([link(after.path, f'{number(after.name)}→')] if after else [])]
    more = [link(p.path, number(p.name)) for p in seconds(page)]
    return ' · '.join([*parts, *(['beside: ' + ', '.join(more)] if more else [])])


def install(page, repository):
    "Code that fetches and installs the course where it is not, on a borrowed machine; elsewhere it does nothing."
    folder = page.path.parent.relative_to(ROOT).as_posix()
    up = Path(os.path.relpath(ROOT, page.path.parent)).as_posix()
    return ("from importlib.util import find_spec\nif not find_spec('exp'):                                  # on Colab, Kaggle …\n"
            f'    !git clone -q {repository} lesson11\n    %cd lesson11/{folder}\n    %pip install -q {up}')


def cell(kind, id, text):
    made = dict(cell_type=kind, id=id, metadata={'tags': ['course']}, source=text.splitlines(keepends=True))
    return made | (dict(execution_count=None, outputs=[]) if kind == 'code' else {})


def with_course(page, repository=''):
    "The notebook with the cells that are made for it, and its answers folded and numbered."
    nb, answers = page.nb, False
    cells = [c for c in nb['cells'] if 'course' not in c['metadata'].get('tags', [])]
    for c in cells:
        answers = answers or bool(re.search('(?m)^## Exercises', source(c)))
        if not answers or c['cell_type'] != 'code': continue
        c['metadata']['jupyter'] = c['metadata'].get('jupyter', {}) | dict(source_hidden=True, outputs_hidden=True)
        c['source'][:1] = [re.sub(r'^# (\d)', r'# Answer \1', line) for line in c['source'][:1]]
    if repository and page.is_lesson: cells.insert(1, cell('code', 'install', install(page, repository)))
    made = questions(page) if page.name not in FULL else ''
    cells += ([cell('markdown', 'questions', made)] if made else []) + [cell('markdown', 'onward', onward(page))]
    for n, c in enumerate((c for c in cells if c['cell_type'] == 'code' and source(c).strip()), 1):
        c['execution_count'] = n
        for o in c['outputs']:
            if o.get('execution_count'): o['execution_count'] = n
    return nb | {'cells': cells}


def main():
    stale = []
    for page in pages().values():
        text = json.dumps(with_course(page, setting('repository')), ensure_ascii=False, indent=1) + '\n'
        if text == page.path.read_text(encoding='utf-8'): continue
        stale.append(f'{page.doc}.ipynb')
        if '--check' not in sys.argv[1:]: page.path.write_text(text, encoding='utf-8', newline='\n')
    if '--check' in sys.argv[1:] and stale: sys.exit('out of step, python docs/course.py writes them: ' + ', '.join(stale))
    print(*stale, sep='\n')


if __name__ == '__main__': main()
