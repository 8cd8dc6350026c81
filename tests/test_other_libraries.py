"""docs/other_libraries.md does what it says, with no network: each piece of code is run, after the first, where its library is installed."""
import ast
import importlib.util
import re

import pytest
from conftest import ROOT, python, small_env

PAGE = (ROOT/'docs/other_libraries.md').read_text(encoding='utf-8')
COMMON, *PIECES = re.findall(r'(?ms)^```python\n(.*?)^```', PAGE)
TITLES = [t.split(':')[0] for t in re.findall(r'(?m)^## (.*)', PAGE)]
ALONE = '''
import socket
connect = socket.socket.connect
def on_this_machine(self, to):
    if self.family != getattr(socket, 'AF_UNIX', None) and to[0] not in ('127.0.0.1', '::1', 'localhost'): raise OSError(f'the network is asked: {to}')
    return connect(self, to)
socket.socket.connect = on_this_machine
'''


def test_every_recipe_has_its_code(): assert len(TITLES) == len(PIECES) == 9


@pytest.mark.parametrize('piece', PIECES, ids=TITLES)
def test_a_recipe(piece, data_home, tmp_path):
    wanted = {(o.module if isinstance(o, ast.ImportFrom) else o.names[0].name).split('.')[0] for o in ast.parse(piece).body if isinstance(o, (ast.Import, ast.ImportFrom))}
    lacking = sorted(m for m in wanted if not importlib.util.find_spec(m))
    if lacking: pytest.skip(f'not installed: {", ".join(lacking)}')
    script = tmp_path/'recipe.py'
    script.write_text('\n'.join([ALONE, f'import os\nos.chdir({str(tmp_path)!r})', COMMON, piece, 'print("done")']), encoding='utf-8')
    env = dict(PYTHONPATH=str(ROOT), HF_HUB_OFFLINE='1', HF_HOME=str(tmp_path), WANDB_ERROR_REPORTING='false', NO_ALBUMENTATIONS_UPDATE='1', WANDB_SILENT='true')
    r = python(script, env={**small_env(data_home), **env})
    assert not r.returncode and r.stdout.endswith('done\n'), r.stdout[-500:] + r.stderr[-3000:]
