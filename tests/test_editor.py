"""What an editor that checks types says of scripts that use the package as its users do: nothing of those that are right.

A script more is a file more in tests/editor. It is read by pyright and run. In misspelt.py each line with `# wrong` must be reported."""
import json
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from conftest import ROOT, python, small_env

SCRIPTS = sorted((ROOT/'tests/editor').glob('*.py'))

# Two of pyright's rules are against the protocols of the slides, not against anybody's code: `_defaults` on a function, and a stat whose
# `update` names the hypers it wants.
SETTINGS = dict(typeCheckingMode='standard', reportFunctionMemberAccess=False, reportIncompatibleMethodOverride=False)


def said():
    "`{script: {line: what pyright reports of it}}`, of one run over all; skips where it cannot run."
    tried = python('-m', 'pyright', '--version')
    if tried.returncode: pytest.skip(f'no pyright here, or no node for it (pip install -e ".[dev]"): {tried.stderr.strip()[-200:]}')
    with TemporaryDirectory() as d:                                                      # a project of its own, elsewhere, like a user's
        for p in SCRIPTS: shutil.copy(p, d)
        Path(d, 'pyrightconfig.json').write_text(json.dumps(dict(extraPaths=[str(ROOT)], **SETTINGS)))
        r = python('-m', 'pyright', '--project', d, '--pythonpath', sys.executable, '--outputjson')
    assert r.returncode in (0, 1), r.stdout + r.stderr
    out, found = json.loads(r.stdout), {p.stem: {} for p in SCRIPTS}
    assert out['summary']['filesAnalyzed'] == len(SCRIPTS)
    for d in out['generalDiagnostics']:
        lines = found[Path(d['file']).stem]
        lines.setdefault(d['range']['start']['line'] + 1, []).append(d['message'])
    return found


def test_an_editor_reports_what_is_wrong_and_nothing_else():
    faults, reported = [], said()
    for path in SCRIPTS:
        wrong = {i for i, line in enumerate(path.read_text().splitlines(), 1) if line.endswith('# wrong')}
        false = [f'{path.name}:{i}: {" ".join(m)}' for i, m in sorted(reported[path.stem].items()) if i not in wrong]
        missed = [f'{path.name}:{i}: nothing is reported' for i in sorted(wrong - {*reported[path.stem]})]
        faults += false + missed
    assert not faults, '\n'.join(faults)


def test_the_scripts_run(data_home):
    "All in one process, for the time that torch takes to load."
    code = f"import runpy\nfor p in {[str(p) for p in SCRIPTS if p.stem != 'misspelt']}: print(p); runpy.run_path(p, run_name='__main__')"
    r = python('-c', code, env={**small_env(data_home), 'PYTHONPATH': str(ROOT)})
    assert r.returncode == 0, r.stdout[-300:] + r.stderr[-2000:]
