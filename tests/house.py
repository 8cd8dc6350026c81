"""What tests/test_house.py holds, measured: how long a notebook takes to read, how dense its module is, who imports whom.

    python tests/house.py            every notebook and module with its figures, and what is over a ceiling
    python tests/house.py --index    write the tables of notebooks in nbs/index.ipynb

Minutes: 200 words of prose or docstring a minute, 10 seconds for every other line of code that is not blank. Branches: the cyclomatic
complexity of a function, with conditional expressions, `and`/`or` and the filters of comprehensions. Weight of a statement: the names,
calls, attributes, operators and subscripts in it; nine in ten have no more. Heavy: statements of more than 25, beyond one in a hundred."""
import ast
import io
import json
import re
import sys
import tokenize
from functools import cache, cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LESSON = dict(minutes=60, lines=250, cells=130, wide=0, long=0, picture_kb=60, first=15)
LONGER = dict.fromkeys(('08_data_block', '09_optimizers', '09b_learner', '10_transforms'), dict(minutes=75))
SECOND_READING = dict(minutes=75, lines=250, cells=130, wide=0, long=0, picture_kb=60)
MODULE = dict(branches=12, weight=15, heavy=0, wide=0, patches=0)
# What has been reached, never to be exceeded; the aims are 900 minutes and 100,000 characters for the lessons, 220,000 for everything.
LESSONS_TOGETHER, EVERYTHING = dict(minutes=1206, chars=135_950), dict(chars=273_510)
WIDTH, CELL = 100, 20                            # columns of a line; lines of a cell that holds no class and no whole script
STRANGERS = [('learner', 'data_block datasets pictures fast_batches transforms', 'the loop knows no pictures'),
             ('optimizers fast_optimizers', 'callbacks learner', 'a step knows no loop'),
             ('convnets batchnorm xresnet', 'callbacks learner checkpoints', 'a net knows no loop and no files'),
             ('transforms mixup mixed_precision', 'checkpoints', 'a transform knows no files'),
             ('train_imagenette', 'interpret', 'training needs no looking')]


def source(cell): return ''.join(cell['source'])


def parsed(src):
    "The syntax tree of a cell without its magics; empty where it is no Python even then."
    try: return ast.parse('\n'.join('' if re.match(r'\s*[%!]', l) else l for l in src.splitlines()))
    except SyntaxError: return ast.Module([], [])


def docstring(o):
    "The docstring's own node, of a module, a class or a function, or None."
    if not isinstance(o, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) or ast.get_docstring(o) is None: return None
    return o.body[0]


def read(src):
    "What there is to read in a cell of code: its lines but for docstrings, and the docstrings' words."
    try: said = [(o, docstring(o)) for o in ast.walk(ast.parse(src)) if docstring(o) and not isinstance(o, ast.Module)]
    except SyntaxError: said = []
    at = {n for o, e in said if e.lineno > o.lineno for n in range(e.lineno, e.end_lineno + 1)}
    lines = [l for n, l in enumerate(src.splitlines(), 1) if l.strip() and n not in at]
    return lines, sum(len(ast.get_docstring(o).split()) for o, _ in said)


def shows(cell):
    "Whether the output of a cell has a picture, or the table of a training."
    for o in cell.get('outputs', []):
        data = o.get('data', {})
        text = ''.join([*o.get('text', []), *data.get('text/plain', []), *data.get('text/html', [])])
        if any(k.startswith('image/') for k in data) or re.search('train_loss|valid_loss|<svg', text): return True
    return False


def imported(tree):
    "Modules of exp that are named anywhere in `tree`, with the names taken from each: `(module, name or None)`. Module None: exp itself."
    for o in ast.walk(tree):
        if isinstance(o, ast.Import):
            for a in o.names:
                if a.name.split('.')[0] == 'exp': yield ('.'.join(a.name.split('.')[1:]) or None), None
        elif isinstance(o, ast.ImportFrom):
            full = '.'.join(k for k in ('exp' if o.level else '', o.module) if k)                     # `.x` in a module is `exp.x` in its cell
            if full == 'exp': yield from ((a.name, None) if a.name in modules() else (None, a.name) for a in o.names)
            elif full.startswith('exp.'): yield from ((full[4:], a.name) for a in o.names)


class Notebook:
    "A notebook as it is committed."
    def __init__(self, path):
        self.path, self.name, self.is_lesson = path, path.stem, path.parent.name == 'nbs'
        self.cells = [c for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if source(c).strip()]
        self.code = [c for c in self.cells if c['cell_type'] == 'code']
        self.exported = [c for c in self.code if re.match(r'(?m)(\s*#.*\n)*\s*#\s*\|?\s*export[is]?\s*$', source(c))]
        m = re.match(r'(\d+)([a-z]*)_', self.name)
        self.number = (int(m[1]), m[2]) if m else (0, '')                      # `09b_learner` -> (9, 'b')
        found = [m[1] for c in self.code if (m := re.search(r'^\s*#\s*\|?\s*default_exp\s+(\S+)', source(c), re.M))]
        self.module = found[0] if found else None

    @cached_property
    def figures(self):
        minutes, first = 0., None
        for c in self.cells:
            if c['cell_type'] == 'code':
                lines, words = read(source(c))
                minutes += len(lines)/6 + words/200
                if first is None and shows(c): first = round(minutes)
            elif c['cell_type'] == 'markdown': minutes += len(source(c).split())/200
        body = [l for c in self.code for l in source(c).splitlines()]
        pictures = [p for c in self.code for o in c.get('outputs', []) for k, p in o.get('data', {}).items() if k.startswith('image/')]
        has_class = {c['id'] for c in self.code if any(isinstance(o, ast.ClassDef) for o in ast.walk(parsed(source(c)))) or source(c).startswith('%%writefile')}
        return dict(minutes=round(minutes), first=first, cells=len(self.cells), wide=sum(len(l) > WIDTH for l in body),
                    picture_kb=max((len(''.join(p))*3//4000 for p in pictures), default=0),      # of base64
                    lines=sum(len(read(source(c))[0]) - 1 for c in self.exported),
                    long=sum(len(read(source(c))[0]) > CELL for c in self.code if c['id'] not in has_class))

    def imports(self, cells=None):
        "`(module, name)` of exp in these cells; by default in all of code."
        return {i for c in (self.code if cells is None else cells) for i in imported(parsed(source(c)))}

    def needs(self):
        "The last lesson that this one imports, or else the one before it."
        before = [n for n in notebooks() if n.is_lesson and n.number < self.number]
        taken = [n for n in before if n.module in {m for m, _ in self.imports()}]
        return [*before[:1], *before, *taken][-1]

    def promise(self):
        "The sentence under its title."
        m = re.match(r'# .+\n\n> (.+)', source(self.cells[0]))
        return m[1].replace('|', r'\|') if m else ''


@cache
def notebooks():
    "All but the index, in the order of their numbers."
    found = [Notebook(p) for folder in ('nbs', 'nbs/more') for p in (ROOT/folder).glob('[0-9]*.ipynb')]
    return sorted(found, key=lambda n: n.number)


@cache
def modules():
    "`{module: the notebook that makes it}`."
    return {n.module: n for n in notebooks() if n.module}


def branches(f):
    n, todo = 1, [*ast.iter_child_nodes(f)]
    while todo:
        o = todo.pop()
        if isinstance(o, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)): continue             # they count for themselves
        if isinstance(o, (ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.Assert, ast.match_case)): n += 1
        if isinstance(o, ast.BoolOp): n += len(o.values) - 1
        if isinstance(o, ast.comprehension): n += 1 + len(o.ifs)
        todo += ast.iter_child_nodes(o)
    return n


WEIGHTY = (ast.Name, ast.Call, ast.Attribute, ast.BinOp, ast.BoolOp, ast.Compare, ast.IfExp, ast.Subscript, ast.comprehension, ast.Lambda,
           ast.NamedExpr, ast.Starred, ast.UnaryOp)


def weights(tree):
    "Of each simple statement and each head of a loop or condition, what it weighs."
    simple = (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Return, ast.Raise, ast.Delete)
    for o in ast.walk(tree):
        if isinstance(o, simple) or (isinstance(o, ast.Expr) and not isinstance(o.value, ast.Constant)): parts = [o]
        elif isinstance(o, (ast.If, ast.While)): parts = [o.test]
        elif isinstance(o, ast.For): parts = [o.iter, o.target]
        else: continue
        yield sum(isinstance(x, WEIGHTY) for p in parts for x in ast.walk(p))


def characters(src):
    "Characters of code: without comments, docstrings and white space."
    told = {(e.lineno, e.col_offset) for o in ast.walk(ast.parse(src)) if (e := docstring(o))}
    blank = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    tokens = tokenize.generate_tokens(io.StringIO(src).readline)
    return sum(len(t.string) for t in tokens if t.type not in blank and t.start not in told)


def patches(tree):
    "How often a module puts something onto a class: `@patch`, and attributes of a class that it has imported."
    foreign = {name for _, name in imported(tree) if name and name[0].isupper()}
    n = 0
    for o in ast.walk(tree):
        if isinstance(o, (ast.FunctionDef, ast.AsyncFunctionDef)): n += any('patch' in ast.unparse(d) for d in o.decorator_list)
        if isinstance(o, (ast.Assign, ast.AugAssign)):
            for t in o.targets if isinstance(o, ast.Assign) else [o.target]:
                n += isinstance(t, ast.Attribute) and isinstance(t.value, ast.Name) and t.value.id in foreign
        if isinstance(o, ast.Call) and ast.unparse(o.func) == 'setattr': n += isinstance(o.args[0], ast.Name) and o.args[0].id in foreign
    return n


@cache
def module_figures(name):
    src = (ROOT/'exp'/f'{name}.py').read_text(encoding='utf-8')
    tree = ast.parse(src)
    src, ws = re.sub(r'(?ms)^__all__ = \[.*?\]\n', '', src), sorted(weights(tree)) or [0]             # nbdev's line is not ours
    functions = [(branches(o), o.name) for o in ast.walk(tree) if isinstance(o, (ast.FunctionDef, ast.AsyncFunctionDef))]
    most, at = max(functions, default=(0, ''))
    return dict(chars=characters(src), branches=most, at=at, weight=ws[int(.9*(len(ws) - 1))],
                heavy=max(0, sum(w > 25 for w in ws) - max(1, len(ws)//100)),
                wide=sum(len(l) > WIDTH and l.lstrip()[0] != '#' for l in src.splitlines()), patches=patches(tree))


def over(got, ceilings, where):
    return [f'{where}: {k} {got[k]}, at most {most}' for k, most in ceilings.items() if (got[k] or 0) > most]


def upward(nb):
    "Imports that do not go down the numbers to a module by its name."
    for module, name in sorted(nb.imports(), key=str):
        maker = modules().get(module)
        if module is None: yield f'{nb.name}: imports {name or "all"} from exp itself: say which module'
        elif maker is None: yield f'{nb.name}: imports exp.{module}, which no notebook makes'
        elif maker is not nb and maker.number >= nb.number: yield f'{nb.name}: imports exp.{module} of the later {maker.name}'
    yield from (f'{nb.name}: exports `from exp.{module} import *`' for module, name in nb.imports(nb.exported) if name == '*')


def aside(nb):
    "Second readings that a lesson imports, in whatever cell."
    taken = {modules()[m].name for m, _ in nb.imports() if m in modules() and not modules()[m].is_lesson}
    return [f'{nb.name}: a lesson, and imports of the second reading {name}' for name in sorted(taken) if nb.is_lesson]


def strangers(nb):
    "Modules that this notebook's module must not know, and does."
    known = {m for m, _ in nb.imports(nb.exported)}
    return [f'{nb.name}: exports imports of {", ".join(met)}: {why}' for who, whom, why in STRANGERS
            if nb.module in who.split() and (met := sorted(known & {*whom.split()}))]


def faults(nb):
    "All that is measured of a notebook and its module and is over its ceiling or out of order."
    ceilings = {**LESSON, **LONGER.get(nb.name, {})} if nb.is_lesson else SECOND_READING
    out = [*over(nb.figures, ceilings, nb.name), *upward(nb), *aside(nb), *strangers(nb)]
    if nb.figures['first'] is None and nb.is_lesson and nb.name != '00_export': out.append(f'{nb.name}: no picture and no training in it')
    if nb.module: out += over(module_figures(nb.module), MODULE, f'exp/{nb.module}.py')
    return out


def totals():
    lessons = [n for n in notebooks() if n.is_lesson]
    together = dict(minutes=sum(n.figures['minutes'] for n in lessons), chars=sum(module_figures(n.module)['chars'] for n in lessons))
    return together, dict(chars=sum(module_figures(m)['chars'] for m in modules()))


HEADS = {True: '| lesson | minutes | module | what you have at its end |', False: '| second reading | after | minutes | module | what it adds |'}
INDEX = ROOT/'nbs/index.ipynb'


def rows(text):
    "The rows of both tables in `text`: `{notebook: [cells of the row]}`, the link first."
    found = [[c.strip() for c in re.split(r'(?<!\\)\|', l)[1:-1]] for l in text.splitlines() if re.match(r'\| \[\d', l)]
    return {re.match(r'\[(\w+)\]', r[0])[1]: r for r in found}


def row(nb, said):
    link = f'[{nb.name}]({nb.path.relative_to(INDEX.parent).as_posix()})'
    after = [] if nb.is_lesson else [nb.needs().name]
    return [link, *after, str(nb.figures['minutes']), f'`exp.{nb.module}`', said]


def with_tables(text):
    "`text` with both tables made anew; the last column stays as somebody wrote it, and is the notebook's own sentence where nobody has."
    old = rows(text)
    for is_lesson, head in HEADS.items():
        new = [row(n, old[n.name][-1] if n.name in old else n.promise()) for n in notebooks() if n.is_lesson == is_lesson]
        table = [head, '|' + '---|'*(head.count('|') - 1), *(f'| {" | ".join(r)} |' for r in new)]
        text = re.sub(rf'(?m)^{re.escape(head)}\n(\|.*\n)*', lambda m, t=table: '\n'.join(t) + '\n', text)
    return text


def write_index():
    raw = json.loads(INDEX.read_text(encoding='utf-8'))
    for c in raw['cells']:
        if c['cell_type'] == 'markdown': c['source'] = with_tables(source(c)).splitlines(keepends=True)
    INDEX.write_text(json.dumps(raw, ensure_ascii=False, indent=1) + '\n', encoding='utf-8')


def main():
    if '--index' in sys.argv[1:]: return write_index()
    for nb in notebooks():
        f, m = nb.figures, module_figures(nb.module) if nb.module else {}
        print(f'{nb.name:24}', *(f'{k} {v}'.ljust(len(k) + 5) for k, v in {**f, **{k: m[k] for k in m if k not in ('wide', 'at')}}.items()))
    print(*(o for nb in notebooks() for o in faults(nb)), sep='\n')
    print('lessons together: {minutes} minutes, {chars} characters of code'.format(**totals()[0]), f'everything: {totals()[1]["chars"]}', sep='\n')


if __name__ == '__main__': main()
